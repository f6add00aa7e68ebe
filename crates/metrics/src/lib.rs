//! Metrics: scores the result of a round, against the ground truth if there is one.
//!
//! This is the only stage that reads labels, and `metrics.json` is its only output. Cluster numbers
//! are arbitrary, so every score is invariant to renumbering.
//!
//! - [`round`]: the scores of one round; [`data::metrics`] is the form of `metrics.json`.
//! - [`agreement`]: scores of a grouping against another one or the truth: ACC, NMI, ARI, AMI.
//! - [`calibration`]: whether a confidence is the probability of being right.
//! - [`clusters`]: the program that estimates the number of clusters.
//!
//! ```
//! use assignment::{adjusted_rand_index, contingency};
//! use metrics::agreement::accuracy;
//!
//! // The clusters are the classes, renumbered, but for one point.
//! let (clusters, classes) = ([2, 2, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]);
//! let table = contingency(&clusters, &classes, 3, 3)?;
//! assert_eq!(accuracy(&table), 5. / 6.);
//! assert!(adjusted_rand_index(&table) < 1.);
//! # anyhow::Ok(())
//! ```

pub mod agreement;
pub mod calibration;
pub mod clusters;
pub mod round;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use data::{Labels, PseudoLabels, RoundMetrics};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};

/// The table `[metrics]`. It has no values, so that all experiments are scored in the same way.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {}

const PSEUDO_LABELS: &str = "pseudo-labels.safetensors";
const LABELS: &str = "labels.safetensors";

const REMEDY: &str = "score pseudo-labels with the labels that were prepared with their images";

/// The stage: see the documentation of the crate.
pub struct Metrics;

impl Stage for Metrics {
    const SPEC: Spec = Spec {
        name: "metrics",
        algorithm: 2,
        inputs: &[
            Role::new("pseudo-labels", Origin::PseudoLabels),
            Role::new("labels", Origin::Labels),
            Role::new("previous", Origin::EarlierPseudoLabels),
        ],
        outputs: &[Output::Scores],
        ranks: Ranks::One,
    };
    type Config = Config;

    /// Opens the inputs that exist already, and checks that they are about the same images.
    fn check(_: &Config, job: &Job) -> Result<Effort> {
        let exists =
            |role, file| job.optional_input(role).map(|d| d.join(file)).filter(|p| p.exists());
        let scored =
            exists("pseudo-labels", PSEUDO_LABELS).map(|p| PseudoLabels::open(&p)).transpose()?;
        let labels = exists("labels", LABELS).map(|p| Labels::open(&p)).transpose()?;
        if let (Some(scored), Some(labels)) = (&scored, &labels) {
            scored.data_set.require(&labels.data_set, REMEDY)?;
        }
        Ok(Effort::NONE)
    }

    /// Reads the pseudo-labels, and if given the ground truth and the pseudo-labels of the last round, in
    /// role `previous`; writes `metrics.json`.
    fn run(_: &Config, job: &Job) -> Result<()> {
        let scored = PseudoLabels::open(&job.input("pseudo-labels")?.join(PSEUDO_LABELS))?;
        let labels =
            job.optional_input("labels").map(|d| Labels::open(&d.join(LABELS))).transpose()?;
        let previous = job
            .optional_input("previous")
            .map(|d| PseudoLabels::open(&d.join(PSEUDO_LABELS)))
            .transpose()?;
        scored.require_clusters(job.data.clusters)?;
        if let Some(labels) = &labels {
            scored.data_set.require(&labels.data_set, REMEDY)?;
        }
        if let Some(previous) = &previous {
            let remedy = "name the pseudo-labels of this run's last round";
            scored.data_set.require(&previous.data_set, remedy)?;
        }
        let mut metrics = round::metrics(&scored, labels.as_ref(), previous.as_ref())?;
        // Some systems predict twice from one training, such as IMC-SwAV with refreshed statistics.
        for (name, path) in other_results(job.input("pseudo-labels")?)? {
            let other = PseudoLabels::open(&path)?;
            other.data_set.require(&scored.data_set, "cluster again from these images")?;
            metrics.others.insert(name, round::metrics(&other, labels.as_ref(), None)?.head);
        }
        metrics.write(&job.out.join(RoundMetrics::FILE))
    }
}

/// Finds the other results in the folder, `pseudo-labels-<name>.safetensors`, by name.
fn other_results(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("opening `{}`", folder.display()))? {
        let path = entry?.path();
        let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = file.strip_prefix("pseudo-labels-").and_then(|n| n.strip_suffix(".safetensors"));
        if let Some(name) = name {
            found.push((name.to_owned(), path.clone()));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use data::DataSet;
    use stage::DataTable;

    use super::*;

    fn data_set(fingerprint: &str) -> DataSet {
        DataSet { path: "x".into(), images: 4, fingerprint: fingerprint.into() }
    }

    fn job(folder: &Path, roles: &[&str]) -> Job {
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
        Job {
            inputs: roles.iter().map(|role| (role.to_string(), folder.join("in"))).collect(),
            ..Job::new("metrics", "i.safetensors", folder.join("out"), data)
        }
    }

    fn write_inputs(folder: &Path, fingerprint: &str) -> Result<()> {
        let scored = PseudoLabels {
            data_set: data_set("f"),
            clusters: 2,
            index: vec![0, 1, 2, 3],
            assignment: vec![1, 1, 0, 1],
            kmeans_assignment: vec![0, 1, 0, 1],
            confidence: vec![1.; 4],
            score: vec![1.; 4],
            reliable: vec![true, true, false, false],
            stability: None,
            head_agreement: None,
            projection_width: 1,
            prototypes: vec![1., -1.],
        };
        let labels = Labels {
            data_set: data_set(fingerprint),
            labels: vec![Some(0), Some(0), Some(1), Some(1)],
            classes: vec!["cat".into(), "dog".into()],
        };
        let folder = folder.join("in");
        fs::create_dir_all(&folder)?;
        scored.write(&folder.join(PSEUDO_LABELS))?;
        labels.write(&folder.join(LABELS))
    }

    #[test]
    fn the_file_has_the_agreed_form() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write_inputs(folder.path(), "f")?;
        let job = job(folder.path(), &["pseudo-labels", "labels", "previous"]);
        Metrics::check(&Config {}, &job)?;
        Metrics::run(&Config {}, &job)?;
        let path = job.out.join(RoundMetrics::FILE);
        let read: BTreeMap<String, serde_json::Value> = stage::json::read(&path)?;
        let keys: Vec<&str> = read.keys().map(String::as_str).collect();
        let want = [
            "calibration-error",
            "classes",
            "clusters",
            "confusion",
            "head",
            "images",
            "kmeans",
            "reliable",
            "sha256",
            "sizes",
            "stability",
        ];
        assert_eq!(keys, want);
        assert_eq!(read["images"], 4);
        assert_eq!(read["head"]["acc"], 0.75);
        assert_eq!(read["kmeans"]["acc"], 0.5);
        assert_eq!(read["reliable"], serde_json::json!({ "share": 0.5, "acc": 1.0 }));
        assert_eq!(read["stability"], 1.0);
        assert_eq!(read["sizes"], serde_json::json!([3, 1]));
        Ok(())
    }

    #[test]
    fn a_second_result_of_one_training_is_scored_under_its_name() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write_inputs(folder.path(), "f")?;
        let given = folder.path().join("in");
        let mut other = PseudoLabels::open(&given.join(PSEUDO_LABELS))?;
        other.assignment = vec![0, 0, 1, 1];
        other.write(&given.join("pseudo-labels-running-statistics.safetensors"))?;
        let job = job(folder.path(), &["pseudo-labels", "labels"]);
        Metrics::run(&Config {}, &job)?;
        let read = RoundMetrics::read(&job.out.join(RoundMetrics::FILE))?;
        assert_eq!(read.head.map(|scores| scores.acc), Some(0.75));
        assert_eq!(read.others["running-statistics"].map(|scores| scores.acc), Some(1.));
        Ok(())
    }

    #[test]
    fn labels_of_other_images_and_other_clusters_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write_inputs(folder.path(), "g")?;
        let mut job = job(folder.path(), &["pseudo-labels", "labels"]);
        let checked = Metrics::check(&Config {}, &job).map(|_| ());
        for error in [checked, Metrics::run(&Config {}, &job)] {
            let error = error.expect_err("other images").to_string();
            assert!(error.contains(REMEDY), "{error}");
        }
        job.data.clusters = 3;
        let error = Metrics::run(&Config {}, &job).expect_err("other K").to_string();
        assert!(error.contains("asks for 3"), "{error}");
        assert!(!job.out.join("metrics.json").exists());
        job.inputs.clear();
        Metrics::check(&Config {}, &job)?;
        let error = Metrics::run(&Config {}, &job).expect_err("no input").to_string();
        assert!(error.contains("--in pseudo-labels=DIR"), "{error}");
        Ok(())
    }
}
