//! Metrics: says how good a grouping is, against the ground truth where there is one.
//!
//! The one stage that reads labels, and it gives them to nobody: it writes `metrics.json` and that
//! is all. Cluster numbers have no meaning, so every comparison is invariant to their permutation.
//!
//! - [`agreement`]: scores of a grouping against another one or the truth: ACC, NMI, ARI and more.
//! - [`geometry`]: scores of a grouping against the points it groups, without any truth.
//! - [`confidence`]: whether confidences mean what they say.
//! - [`number`]: how many clusters there may be, a guess; the program `clusters`.
//! - [`report`]: what is computed for one round, and the form of `metrics.json`.

pub mod agreement;
pub mod confidence;
pub mod geometry;
pub mod number;
pub mod report;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use data::{Labels, PseudoLabels};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job, Origin, Output, Role, Spec, Stage};

use crate::report::Report;

/// The table `[metrics]`: it has no values, so that two experiments are always scored alike.
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
        algorithm: 1,
        inputs: &[
            Role::new("pseudo-labels", Origin::PseudoLabels),
            Role::new("labels", Origin::Labels),
            Role::new("previous", Origin::EarlierPseudoLabels),
        ],
        outputs: &[Output::Scores],
    };
    type Config = Config;

    /// Opens those inputs that exist already, and compares what they are about.
    ///
    /// # Errors
    ///
    /// An input is not usable or belongs to other images.
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

    /// Reads `pseudo-labels.safetensors` in role `pseudo-labels`, the ground truth in role `labels`
    /// and the last round's in role `previous`, where given; writes `metrics.json`.
    ///
    /// # Errors
    ///
    /// A file is missing or damaged, or they are about different images.
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
        let report = Report::new(&scored, labels.as_ref(), previous.as_ref())?;
        let mut report = serde_json::to_value(&report)?;
        // Some systems predict twice from one training, as IMC-SwAV with refreshed statistics.
        let mut others = serde_json::Map::new();
        for (name, path) in other_results(job.input("pseudo-labels")?)? {
            let other = PseudoLabels::open(&path)?;
            other.data_set.require(&scored.data_set, "cluster again from these images")?;
            let other = Report::new(&other, labels.as_ref(), None)?;
            others.insert(name, serde_json::to_value(other.head)?);
        }
        if !others.is_empty() {
            report["others"] = others.into();
        }
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        stage::files::write(&job.out.join("metrics.json"), text.as_bytes())
    }
}

/// Results beside the first in its folder, `pseudo-labels-<name>.safetensors`, by name.
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
        let text = fs::read_to_string(job.out.join("metrics.json"))?;
        let read: BTreeMap<String, serde_json::Value> = serde_json::from_str(&text)?;
        let keys: Vec<&str> = read.keys().map(String::as_str).collect();
        let want = ["clusters", "head", "images", "kmeans", "reliable", "sizes", "stability"];
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
        let text = fs::read_to_string(job.out.join("metrics.json"))?;
        let read: serde_json::Value = serde_json::from_str(&text)?;
        assert_eq!(read["head"]["acc"], 0.75);
        assert_eq!(read["others"]["running-statistics"]["acc"], 1.0);
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
