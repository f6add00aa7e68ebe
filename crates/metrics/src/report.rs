//! What is computed for one round.

use anyhow::{Result, ensure};
use assignment::{Contingency, contingency, optimal_map};
use data::{Labels, PseudoLabels};
use serde::Serialize;

use crate::agreement::{Mean, accuracy, adjusted_rand_index, hits, normalized_mutual_information};

/// `metrics.json`. What needs ground truth is `null` where none is known.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Images that were grouped, M.
    pub images: usize,
    /// Clusters, K.
    pub clusters: usize,
    /// The clustering network's assignments against the truth.
    pub head: Option<Scores>,
    /// The assignments of k-means on the same embeddings against the truth.
    pub kmeans: Option<Scores>,
    /// The images whose assignment may be trained on.
    pub reliable: Reliable,
    /// Share of images that kept their cluster since the last round, after the best renumbering;
    /// `null` in the first.
    pub stability: Option<f64>,
    /// Images in each cluster of the clustering network, largest first.
    pub sizes: Vec<u64>,
}

/// A grouping against the truth; fractions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Scores {
    /// [`accuracy`].
    pub acc: f64,
    /// [`normalized_mutual_information`] by the arithmetic mean.
    pub nmi: f64,
    /// [`adjusted_rand_index`].
    pub ari: f64,
}

/// The reliable set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Reliable {
    /// Share of the images that it holds.
    pub share: f64,
    /// Accuracy inside it, under the map from clusters to classes that is best for all images;
    /// `null` without ground truth inside it.
    pub acc: Option<f64>,
}

impl Report {
    /// Computes the report of one round.
    ///
    /// Images without a known class count in everything that needs none, and in nothing else.
    ///
    /// # Errors
    ///
    /// The rounds grouped different images or into different numbers of clusters.
    pub fn new(
        scored: &PseudoLabels,
        labels: Option<&Labels>,
        previous: Option<&PseudoLabels>,
    ) -> Result<Self> {
        let (images, clusters) = (scored.index.len(), scored.clusters);
        let truth = labels.map(|labels| Truth::new(scored, labels)).filter(|t| !t.class.is_empty());
        match &truth {
            None => tracing::info!("no image has a known class: writing what needs none"),
            Some(truth) if truth.class.len() < images => {
                let known = truth.class.len();
                tracing::info!("{known} of {images} images have a known class: scoring these");
            }
            Some(_) => {}
        }
        let reliable = scored.reliable.iter().filter(|&&reliable| reliable).count();
        Ok(Self {
            images,
            clusters,
            head: truth.as_ref().map(|t| t.scores(&scored.assignment, clusters)).transpose()?,
            kmeans: truth
                .as_ref()
                .map(|t| t.scores(&scored.kmeans_assignment, clusters))
                .transpose()?,
            reliable: Reliable {
                share: reliable as f64 / images.max(1) as f64,
                acc: truth.as_ref().map(|t| t.reliable_accuracy(scored)).transpose()?.flatten(),
            },
            stability: previous.map(|previous| stability(scored, previous)).transpose()?,
            sizes: sizes(&scored.assignment, clusters),
        })
    }
}

/// The images whose class is known.
struct Truth {
    /// Their places among the grouped images.
    place: Vec<usize>,
    class: Vec<u32>,
    classes: usize,
}

impl Truth {
    fn new(scored: &PseudoLabels, labels: &Labels) -> Self {
        let known = scored.index.iter().enumerate();
        let (place, class) =
            known.filter_map(|(i, &row)| Some((i, labels.labels[row as usize]?))).unzip();
        Self { place, class, classes: labels.classes.len() }
    }

    fn table(&self, assignment: &[u32], clusters: usize) -> Result<Contingency> {
        let known: Vec<u32> = self.place.iter().map(|&i| assignment[i]).collect();
        contingency(&known, &self.class, clusters, self.classes)
    }

    fn scores(&self, assignment: &[u32], clusters: usize) -> Result<Scores> {
        let table = self.table(assignment, clusters)?;
        Ok(Scores {
            acc: accuracy(&table),
            nmi: normalized_mutual_information(&table, Mean::Arithmetic),
            ari: adjusted_rand_index(&table),
        })
    }

    fn reliable_accuracy(&self, scored: &PseudoLabels) -> Result<Option<f64>> {
        let map = self.table(&scored.assignment, scored.clusters)?.best_map();
        let inside = |of: &dyn Fn(usize) -> u32| -> Vec<u32> {
            (0..self.place.len()).filter(|&j| scored.reliable[self.place[j]]).map(of).collect()
        };
        let clusters = inside(&|j| scored.assignment[self.place[j]]);
        let classes = inside(&|j| self.class[j]);
        let table = contingency(&clusters, &classes, scored.clusters, self.classes)?;
        Ok((!classes.is_empty()).then(|| hits(&table, &map) as f64 / classes.len() as f64))
    }
}

/// The share of images that kept their cluster, after the best renumbering.
///
/// # Errors
///
/// The two groupings are of different images or have different numbers of clusters.
pub fn stability(scored: &PseudoLabels, previous: &PseudoLabels) -> Result<f64> {
    let (now, before) = (scored.data_set.path.display(), previous.data_set.path.display());
    ensure!(
        scored.index == previous.index,
        "`{now}` groups other images than `{before}`; name the pseudo-labels of this run's last round"
    );
    ensure!(
        scored.clusters == previous.clusters,
        "`{now}` has {} clusters but `{before}` has {}; name the pseudo-labels of this run's last \
         round",
        scored.clusters,
        previous.clusters
    );
    kept(&scored.assignment, &previous.assignment, scored.clusters)
}

/// The share of points whose cluster in `new` is, after the best renumbering, that in `old`.
///
/// Between rounds it tells whether a method settles; between seeds, whether it finds one answer.
/// In `[0, 1]`; 1 for no points.
///
/// # Errors
///
/// The lengths differ, or a cluster is not below `k`.
pub fn kept(new: &[u32], old: &[u32], k: usize) -> Result<f64> {
    let map = optimal_map(new, old, k)?;
    let kept = new.iter().zip(old).filter(|&(&new, &old)| map[new as usize] == old).count();
    Ok(if new.is_empty() { 1. } else { kept as f64 / new.len() as f64 })
}

fn sizes(assignment: &[u32], clusters: usize) -> Vec<u64> {
    let mut sizes = vec![0u64; clusters];
    assignment.iter().for_each(|&k| sizes[k as usize] += 1);
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes
}

#[cfg(test)]
mod tests {
    use data::DataSet;

    use super::*;

    fn pseudo_labels(assignment: &[u32], reliable: &[bool]) -> PseudoLabels {
        let m = assignment.len();
        PseudoLabels {
            data_set: DataSet { path: "p".into(), images: 2 * m, fingerprint: "f".into() },
            clusters: 3,
            index: (0..m as u32).map(|i| 2 * i).collect(),
            assignment: assignment.to_vec(),
            kmeans_assignment: vec![0; m],
            confidence: vec![1.; m],
            score: vec![1.; m],
            reliable: reliable.to_vec(),
            stability: None,
            projection_width: 1,
            prototypes: vec![0.; 3],
        }
    }

    fn labels(classes: &[Option<u32>]) -> Labels {
        // Every other image of the data set was grouped; the rest must not matter.
        Labels {
            data_set: DataSet {
                path: "l".into(),
                images: 2 * classes.len(),
                fingerprint: "f".into(),
            },
            labels: classes.iter().flat_map(|&class| [class, Some(1)]).collect(),
            classes: ["a", "b", "c"].map(String::from).to_vec(),
        }
    }

    const NEW: [u32; 9] = [2, 2, 1, 0, 0, 0, 1, 1, 1];
    const OLD: [u32; 9] = [0, 0, 0, 1, 1, 1, 2, 2, 2];

    #[test]
    fn relabelled_rounds_are_compared_by_the_best_map() -> Result<()> {
        let stable = stability(&pseudo_labels(&NEW, &[true; 9]), &pseudo_labels(&OLD, &[true; 9]))?;
        assert!((stable - 8. / 9.).abs() < 1e-12, "{stable}");
        Ok(())
    }

    #[test]
    fn the_report_scores_known_images_under_one_map() -> Result<()> {
        let mut classes = OLD.map(Some);
        classes[8] = None;
        let mut reliable = [false; 9];
        reliable[2..5].fill(true); // One of these three is in the wrong cluster.
        let scored = pseudo_labels(&NEW, &reliable);
        let report = Report::new(&scored, Some(&labels(&classes)), Some(&scored))?;
        let head = report.head.expect("truth is known");
        assert!((head.acc - 7. / 8.).abs() < 1e-12);
        assert!((report.kmeans.expect("truth is known").acc - 3. / 8.).abs() < 1e-12);
        assert!((report.reliable.acc.expect("known") - 2. / 3.).abs() < 1e-12);
        assert!((report.reliable.share - 1. / 3.).abs() < 1e-12);
        assert_eq!(report.stability, Some(1.));
        assert_eq!(report.sizes, [4, 3, 2]);
        Ok(())
    }

    #[test]
    fn without_truth_the_rest_is_still_written() -> Result<()> {
        let scored = pseudo_labels(&NEW, &[true; 9]);
        for labels in [None, Some(labels(&[None; 9]))] {
            let report = Report::new(&scored, labels.as_ref(), None)?;
            assert_eq!((report.head, report.kmeans, report.reliable.acc), (None, None, None));
            let json = serde_json::to_value(&report)?;
            assert_eq!(json["head"], serde_json::Value::Null);
            assert_eq!(json["stability"], serde_json::Value::Null);
            assert_eq!(json["reliable"]["share"], 1.0);
            assert_eq!(json["sizes"], serde_json::json!([4, 3, 2]));
        }
        Ok(())
    }

    #[test]
    fn nothing_reliable_has_no_accuracy() -> Result<()> {
        let scored = pseudo_labels(&NEW, &[false; 9]);
        let report = Report::new(&scored, Some(&labels(&OLD.map(Some))), None)?;
        assert_eq!(report.reliable, Reliable { share: 0., acc: None });
        Ok(())
    }

    #[test]
    fn rounds_of_other_images_are_refused() {
        let scored = pseudo_labels(&NEW, &[true; 9]);
        let mut other = scored.clone();
        other.index[8] = 17;
        let error = stability(&scored, &other).expect_err("other images").to_string();
        assert!(error.contains("last round"), "{error}");
        other = scored.clone();
        other.clusters = 4;
        assert!(stability(&scored, &other).expect_err("other K").to_string().contains('4'));
    }
}
