//! The scores of one round.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use assignment::{Contingency, adjusted_rand_index, contingency, optimal_map};
use data::metrics::{ClassScores, Reliable, Scores};
use data::{Labels, PseudoLabels, RoundMetrics};

use crate::agreement::{
    Mean, accuracy, adjusted_mutual_information, class_scores, hits, normalized_mutual_information,
};
use crate::calibration::calibration_error;

/// Computes the scores of one round.
///
/// Images without a known class are left out of the scores that need one, and of no other.
///
/// # Errors
///
/// The rounds grouped different images, or into different numbers of clusters.
pub fn metrics(
    scored: &PseudoLabels,
    labels: Option<&Labels>,
    previous: Option<&PseudoLabels>,
) -> Result<RoundMetrics> {
    let (images, clusters) = (scored.index.len(), scored.clusters);
    let truth =
        labels.map(|labels| KnownClasses::new(scored, labels)).filter(|t| !t.class.is_empty());
    match &truth {
        None => {
            tracing::info!("no image has a known class: only scores without classes are written")
        }
        Some(truth) if truth.class.len() < images => {
            let known = truth.class.len();
            tracing::info!("{known} of {images} images have a known class: only these are scored");
        }
        Some(_) => {}
    }
    let table_of = |assignment: &[u32]| {
        truth.as_ref().map(|truth| truth.table(assignment, clusters)).transpose()
    };
    let (table, kmeans) = (table_of(&scored.assignment)?, table_of(&scored.kmeans_assignment)?);
    let map = table.as_ref().map(Contingency::best_map).unwrap_or_default();
    let reliable = scored.reliable.iter().filter(|&&reliable| reliable).count();
    Ok(RoundMetrics {
        images,
        clusters,
        head: table.as_ref().map(scores),
        kmeans: kmeans.as_ref().map(scores),
        reliable: Reliable {
            share: reliable as f64 / images.max(1) as f64,
            acc: truth.as_ref().map(|t| t.reliable_accuracy(scored, &map)).transpose()?.flatten(),
        },
        stability: previous.map(|previous| stability(scored, previous)).transpose()?,
        sizes: sizes(&scored.assignment, clusters),
        calibration_error: truth.as_ref().map(|t| t.calibration_error(scored, &map)).transpose()?,
        classes: truth.as_ref().zip(table.as_ref()).map(|(t, table)| t.class_scores(table, &map)),
        confusion: table
            .as_ref()
            .map(|t| t.counts.chunks(t.columns).map(<[u32]>::to_vec).collect()),
        others: BTreeMap::new(),
    })
}

/// Computes the scores of a grouping against the truth.
fn scores(table: &Contingency) -> Scores {
    Scores {
        acc: accuracy(table),
        nmi: normalized_mutual_information(table, Mean::Arithmetic),
        ari: adjusted_rand_index(table),
        ami: adjusted_mutual_information(table),
    }
}

/// The images whose class is known.
struct KnownClasses<'a> {
    /// Their positions among the grouped images.
    positions: Vec<usize>,
    class: Vec<u32>,
    classes: &'a [String],
}

impl<'a> KnownClasses<'a> {
    fn new(scored: &PseudoLabels, labels: &'a Labels) -> Self {
        let known = scored.index.iter().enumerate();
        let (positions, class) =
            known.filter_map(|(i, &row)| Some((i, labels.labels[row as usize]?))).unzip();
        Self { positions, class, classes: &labels.classes }
    }

    fn table(&self, assignment: &[u32], clusters: usize) -> Result<Contingency> {
        let known: Vec<u32> = self.positions.iter().map(|&i| assignment[i]).collect();
        contingency(&known, &self.class, clusters, self.classes.len())
    }

    fn reliable_accuracy(&self, scored: &PseudoLabels, map: &[Option<u32>]) -> Result<Option<f64>> {
        let (positions, class): (Vec<usize>, Vec<u32>) = (self.positions.iter().zip(&self.class))
            .filter(|&(&i, _)| scored.reliable[i])
            .map(|(&i, &class)| (i, class))
            .unzip();
        let reliable = KnownClasses { positions, class, classes: self.classes };
        let inside = reliable.table(&scored.assignment, scored.clusters)?;
        let n = reliable.class.len();
        Ok((n > 0).then(|| hits(&inside, map) as f64 / n as f64))
    }

    fn calibration_error(&self, scored: &PseudoLabels, map: &[Option<u32>]) -> Result<f64> {
        let is_right = |(&i, &class): (&usize, &u32)| {
            // Rounding may leave a confidence above 1, by less than 10⁻⁵.
            (scored.confidence[i].min(1.), map[scored.assignment[i] as usize] == Some(class))
        };
        let (confidence, correct): (Vec<f32>, Vec<bool>) =
            self.positions.iter().zip(&self.class).map(is_right).unzip();
        calibration_error(&confidence, &correct, CALIBRATION_BINS)
    }

    fn class_scores(&self, table: &Contingency, map: &[Option<u32>]) -> Vec<ClassScores> {
        let cluster = |class: usize| map.iter().position(|&of| of == Some(class as u32));
        (class_scores(table, map)
            .into_iter()
            .zip(table.column_sums())
            .zip(self.classes)
            .enumerate())
        .map(|(class, ((score, images), name))| ClassScores {
            name: name.clone(),
            images,
            cluster: cluster(class).map(|cluster| cluster as u32),
            precision: score.precision,
            recall: score.recall,
        })
        .collect()
    }
}

/// Bins of the calibration error, as in Guo et al. 2017.
const CALIBRATION_BINS: usize = 15;

/// Returns the share of images that kept their cluster, after the best renumbering.
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

/// Returns the share of points whose cluster in `new`, after the best renumbering, is that in `old`.
///
/// Between rounds it measures whether a method converges; between seeds, whether it finds one answer.
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
            head_agreement: None,
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
    fn known_images_are_scored_under_one_map() -> Result<()> {
        let mut classes = OLD.map(Some);
        classes[8] = None;
        let mut reliable = [false; 9];
        reliable[2..5].fill(true); // One of these three is in the wrong cluster.
        let mut scored = pseudo_labels(&NEW, &reliable);
        scored.confidence[0] += 1e-6; // A rounding error.
        let metrics = metrics(&scored, Some(&labels(&classes)), Some(&scored))?;
        let head = metrics.head.expect("truth is known");
        assert!((head.acc - 7. / 8.).abs() < 1e-12);
        assert!((metrics.kmeans.expect("truth is known").acc - 3. / 8.).abs() < 1e-12);
        assert!((metrics.reliable.acc.expect("known") - 2. / 3.).abs() < 1e-12);
        assert!((metrics.reliable.share - 1. / 3.).abs() < 1e-12);
        assert_eq!(metrics.stability, Some(1.));
        assert_eq!(metrics.sizes, [4, 3, 2]);
        // Clusters 0, 1, 2 are best named b, c, a; of c one image is in cluster 1 with one of a.
        let classes = metrics.classes.expect("known");
        let row = |i: usize| {
            let ClassScores { ref name, images, cluster, precision, recall } = classes[i];
            (name.as_str(), images, cluster, precision, recall)
        };
        assert_eq!(row(0), ("a", 3, Some(2), Some(1.), Some(2. / 3.)));
        assert_eq!(row(1), ("b", 3, Some(0), Some(1.), Some(1.)));
        assert_eq!(row(2), ("c", 2, Some(1), Some(2. / 3.), Some(1.)));
        let confusion = metrics.confusion.expect("known");
        assert_eq!(confusion, [vec![0, 3, 0], vec![1, 0, 2], vec![2, 0, 0]]);
        // All are certain, and one of eight is wrong.
        assert_eq!(metrics.calibration_error, Some(1. / 8.));
        Ok(())
    }

    #[test]
    fn without_truth_the_other_scores_remain() -> Result<()> {
        let scored = pseudo_labels(&NEW, &[true; 9]);
        for labels in [None, Some(labels(&[None; 9]))] {
            let metrics = metrics(&scored, labels.as_ref(), None)?;
            assert_eq!((metrics.head, metrics.kmeans, metrics.reliable.acc), (None, None, None));
            assert_eq!((&metrics.classes, &metrics.confusion), (&None, &None));
            assert_eq!(metrics.calibration_error, None);
            let json = serde_json::to_value(&metrics)?;
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
        let metrics = metrics(&scored, Some(&labels(&OLD.map(Some))), None)?;
        assert_eq!(metrics.reliable, Reliable { share: 0., acc: None });
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
