//! Predict: assigns pictures that came after the training to the clusters of a run.
//!
//! A run leaves a network and a head. `embed` computes embeddings of the new pictures with the
//! network; this program applies the head to them. Nothing is trained, and each picture is assigned
//! independently: one picture is enough.
//!
//! Reads `embeddings.safetensors` from the role `embeddings` and `head.safetensors` from the role
//! `head`. Writes `pseudo-labels.safetensors`, which `metrics` and `report` read like those of a
//! run. There every picture is reliable, the score is the confidence, and the k-means assignment is
//! the assignment, as no k-means runs. A prototype is the unit-length mean of the projections of its
//! pictures, or zeros if it has none.
//!
//! It knows no picture, no network and no method. [`head`] reads what a method left.

pub mod head;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use assignment::prototypes;
use data::{Embeddings, PseudoLabels};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job, Origin, Ranks, Role, Spec, Stage};

use crate::head::{LoadedHead, Predictions};

/// The table `[predict]`. It has no values: the head determines everything.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {}

/// Pictures that pass through the head at once.
const AT_ONCE: usize = 4096;

/// The stage: see the documentation of the crate.
pub struct Predict;

impl Stage for Predict {
    const SPEC: Spec = Spec {
        name: "predict",
        algorithm: 2,
        inputs: &[
            Role::new("head", Origin::PseudoLabels),
            Role::new("embeddings", Origin::Embeddings),
        ],
        outputs: &[],
        ranks: Ranks::One,
    };
    type Config = Config;

    /// Opens the head if it exists already, and checks its number of clusters.
    fn check(_: &Config, job: &Job) -> Result<Effort> {
        if let Some(folder) = job.optional_input("head")
            && folder.join(data::head::FILE).exists()
        {
            LoadedHead::open(folder)?.require_clusters(job.data.clusters)?;
        }
        Ok(Effort::NONE)
    }

    /// Applies the head to the embeddings and writes the pseudo-labels.
    fn run(_: &Config, job: &Job) -> Result<()> {
        let head = LoadedHead::open(job.input("head")?)?;
        head.require_clusters(job.data.clusters)?;
        let file: PathBuf = job.input("embeddings")?.join("embeddings.safetensors");
        let embeddings = Embeddings::open(&file)?;
        let (rows, width) = head.rows_of(&embeddings);
        ensure!(
            width == head.width,
            "the head in `{}` takes {} of width {}, but those of `{}` have {width}; embed with the network \
             of the head's run",
            job.input("head")?.display(),
            head.space_name(),
            head.width,
            file.display()
        );
        let mut found = Predictions::default();
        for rows in rows.chunks(AT_ONCE * width) {
            let part = head.predict(rows)?;
            found.assignment.extend(part.assignment);
            found.confidence.extend(part.confidence);
        }
        let Embeddings { data_set, index, projection_width, projection, .. } = embeddings;
        let clusters = job.data.clusters;
        let weights = vec![1.; index.len()];
        let prototypes =
            prototypes(&projection, projection_width, &found.assignment, &weights, clusters)?;
        PseudoLabels {
            data_set,
            clusters,
            reliable: vec![true; index.len()],
            index,
            kmeans_assignment: found.assignment.clone(),
            assignment: found.assignment,
            score: found.confidence.clone(),
            confidence: found.confidence,
            stability: None,
            head_agreement: None,
            projection_width,
            prototypes,
        }
        .write(&job.out.join(PseudoLabels::FILE))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use data::DataSet;
    use data::head::CentreMetric;
    use stage::DataTable;

    use super::*;

    fn job(folder: &Path, clusters: usize) -> Job {
        let data = DataTable { clusters, train_on: vec![], score_on: vec![] };
        Job {
            inputs: BTreeMap::from([
                ("head".to_owned(), folder.to_owned()),
                ("embeddings".to_owned(), folder.to_owned()),
            ]),
            ..Job::new("predict", "i.safetensors", folder, data)
        }
    }

    /// Three of five pictures, with embeddings of width 3 and projections of width 2.
    fn write_embeddings(folder: &Path) -> Result<()> {
        let path = folder.join("embeddings.safetensors");
        Embeddings {
            data_set: DataSet { path: path.clone(), images: 5, fingerprint: "f".into() },
            index: vec![0, 2, 4],
            width: 3,
            projection_width: 2,
            views: 0,
            backbone: vec![1., 0., 0., 0., 1., 0., 0., 0., 1.].into(),
            projection: vec![0.6, 0.8, 1., 0., 0., -1.].into(),
            backbone_views: vec![].into(),
        }
        .write(&path)
    }

    #[test]
    fn pictures_get_the_cluster_of_the_nearest_centre() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write_embeddings(folder.path())?;
        let centres = [0., 2., 3., 0., -1., 0.];
        data::head::write_centres(folder.path(), &centres, 3, CentreMetric::Cosine)?;
        Predict::run(&Config {}, &job(folder.path(), 3))?;
        let found = PseudoLabels::open(&folder.path().join(PseudoLabels::FILE))?;
        // The last is orthogonal to two centres: the lower number wins.
        assert_eq!((found.assignment, found.index), (vec![0, 1, 1], vec![0, 2, 4]));
        for (got, want) in found.confidence.iter().zip([0.9, 1., 0.5]) {
            assert!((got - want).abs() < 1e-6, "{got}, want {want}");
        }
        assert_eq!(found.score, found.confidence);
        assert_eq!(found.reliable, [true; 3]);
        let half = 0.5f32.sqrt();
        for (got, want) in found.prototypes.iter().zip([0.6, 0.8, half, -half, 0., 0.]) {
            assert!((got - want).abs() < 1e-6, "{got}, want {want}");
        }
        Ok(())
    }

    #[test]
    fn more_pictures_than_fit_into_one_pass_are_all_predicted() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (count, path) = (AT_ONCE + 3, folder.path().join("embeddings.safetensors"));
        let row = |row: usize| if row.is_multiple_of(3) { [1., 0.] } else { [0., 1.] };
        Embeddings {
            data_set: DataSet { path: path.clone(), images: count, fingerprint: "f".into() },
            index: (0..count as u32).collect(),
            width: 1,
            projection_width: 2,
            views: 0,
            backbone: vec![1.; count].into(),
            projection: (0..count).flat_map(row).collect::<Vec<_>>().into(),
            backbone_views: vec![].into(),
        }
        .write(&path)?;
        let by = CentreMetric::DistanceSoftmax { temperature: 1. };
        data::head::write_centres(folder.path(), &[1., 0., 0., 1.], 2, by)?;
        Predict::run(&Config {}, &job(folder.path(), 2))?;
        let found = PseudoLabels::open(&folder.path().join(PseudoLabels::FILE))?.assignment;
        let want = |row: usize| u32::from(!row.is_multiple_of(3));
        assert_eq!(found, (0..count).map(want).collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn a_missing_head_passes_the_check() -> Result<()> {
        let folder = tempfile::tempdir()?;
        assert_eq!(Predict::check(&Config {}, &job(folder.path(), 2))?, Effort::NONE);
        Ok(())
    }

    #[test]
    fn a_head_of_another_network_or_number_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write_embeddings(folder.path())?;
        data::head::write_centres(
            folder.path(),
            &[1., 0., 0., 0., 1., 0.],
            2,
            CentreMetric::Cosine,
        )?;
        let error =
            format!("{:#}", Predict::run(&Config {}, &job(folder.path(), 2)).expect_err("width"));
        assert!(error.contains("projections of width 3") && error.contains("have 2"), "{error}");
        let error =
            Predict::check(&Config {}, &job(folder.path(), 3)).expect_err("clusters").to_string();
        assert!(error.contains("2 clusters") && error.contains("asks for 3"), "{error}");
        Ok(())
    }
}
