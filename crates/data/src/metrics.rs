//! `metrics.json`: the scores of one round, as the stage `metrics` writes them.
//!
//! A JSON object with a digest, see [`stage::json`]. Scores are fractions. What needs ground truth is
//! `null` if no image has a known class.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// The scores of one round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RoundMetrics {
    /// Images that were grouped, M.
    pub images: usize,
    /// Clusters, K.
    pub clusters: usize,
    /// The method's assignments against the truth.
    pub head: Option<Scores>,
    /// The assignments of k-means on the same embeddings against the truth.
    pub kmeans: Option<Scores>,
    /// The images whose assignment may be trained on.
    pub reliable: Reliable,
    /// Share of images that kept their cluster since the last round, after the best renumbering;
    /// `null` in the first round.
    pub stability: Option<f64>,
    /// Images in each cluster, largest first.
    pub sizes: Vec<u64>,
    /// Mean distance between confidence and accuracy, in `[0, 1]`.
    pub calibration_error: Option<f64>,
    /// The scores of each class, in the order of the labels.
    pub classes: Option<Vec<ClassScores>>,
    /// Images of each cluster (row) in each class (column).
    pub confusion: Option<Vec<Vec<u32>>>,
    /// Other results of the same training, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub others: BTreeMap<String, Option<Scores>>,
}

/// A grouping against the truth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Accuracy under the best one-to-one map of clusters to classes.
    pub acc: f64,
    /// Normalised mutual information, by the arithmetic mean.
    pub nmi: f64,
    /// Adjusted Rand index.
    pub ari: f64,
    /// Adjusted mutual information, by the arithmetic mean.
    pub ami: f64,
}

/// The reliable images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Reliable {
    /// Share of all images. A value of the experiment may fix it.
    pub share: f64,
    /// Accuracy among them, under the map from clusters to classes that is best for all images;
    /// `null` if none of them has a known class.
    pub acc: Option<f64>,
}

/// One class against the cluster that the best one-to-one map gives it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassScores {
    /// Name of the class.
    pub name: String,
    /// Images of the class.
    pub images: u64,
    /// Its cluster; `null` if there are more classes than clusters.
    pub cluster: Option<u32>,
    /// Share of the cluster's images that are of the class; `null` if the cluster has none.
    pub precision: Option<f64>,
    /// Share of the class's images that are in the cluster; `null` if the class has none.
    pub recall: Option<f64>,
}

impl RoundMetrics {
    /// Name of the file in the output folder of a stage.
    pub const FILE: &str = "metrics.json";

    /// Writes the file.
    pub fn write(&self, path: &Path) -> Result<()> {
        stage::json::write(path, self)
    }

    /// Reads the file and checks its digest.
    ///
    /// # Errors
    ///
    /// It is missing, damaged, or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        stage::json::read(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_read_as_written_and_a_changed_digit_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(RoundMetrics::FILE);
        let scores = Scores { acc: 0.75, nmi: 0.5, ari: 0.25, ami: 0.125 };
        let metrics = RoundMetrics {
            images: 4,
            clusters: 2,
            head: Some(scores),
            kmeans: None,
            reliable: Reliable { share: 0.5, acc: None },
            stability: None,
            sizes: vec![3, 1],
            calibration_error: Some(0.1),
            classes: Some(vec![ClassScores {
                name: "cat \"1\"".into(),
                images: 4,
                cluster: Some(1),
                precision: Some(1.),
                recall: None,
            }]),
            confusion: Some(vec![vec![3], vec![1]]),
            others: BTreeMap::from([("running-statistics".into(), Some(scores))]),
        };
        metrics.write(&path)?;
        assert_eq!(RoundMetrics::read(&path)?, metrics);
        let text = std::fs::read_to_string(&path)?;
        std::fs::write(&path, text.replace("0.75", "0.85"))?;
        let error = RoundMetrics::read(&path).expect_err("changed").to_string();
        assert!(error.contains("was changed"), "{error}");
        Ok(())
    }
}
