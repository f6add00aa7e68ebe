//! Estimates the number of clusters: scores candidates on embeddings, without ground truth.
//!
//! Several published indices are computed, because none is right everywhere:
//!
//! | index | high where | source |
//! |---|---|---|
//! | [silhouette](crate::Distances::silhouette) | clusters are compact and far apart | Rousseeuw 1987 |
//! | [stability](NumberScore::stability) | other images of the kind give the same clusters | Lange et al. 2004 |
//! | [prediction strength](prediction_strength) | every cluster is found in other images | Tibshirani and Walther 2005 |
//! | [`gap`] | clusters are tighter than without structure | Tibshirani et al. 2001 |
//! | [eigengap](crate::neighbour_graph_eigenvalues) | the graph of neighbours has as many parts | von Luxburg 2007 |
//! | [generalisation](crate::Generalisation::score) | a linear classifier learns the clusters | Gadetsky et al. 2024 |
//!
//! Stability, prediction strength and generalisation favour few clusters, the gap many. All but the
//! eigengap score k-means, which splits long thin clusters and so counts too many. [`suggested`]
//! weighs all of them and returns a range and its reasons. No index knows what the images show, so
//! the result is a guess.

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::Serialize;
use stage::random;

use crate::clustering::{Clustering, KMeans, Metric};
use crate::k_means::{k_means, k_means_from};
use crate::logistic::Generalisation;
use crate::matching::{Contingency, contingency};
use crate::points;
use crate::rand_index::adjusted_rand_index;
use crate::sample::sample;
use crate::silhouette::Distances;
use crate::spectral::neighbour_graph_eigenvalues;

/// The parameters of an estimate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EstimatorSettings {
    /// Most images to use; drawn at random if there are more.
    pub images: usize,
    /// Most of these images to use for silhouette, gap, eigengap and generalisation.
    pub measured_images: usize,
    /// Starts of k-means on all images.
    pub restarts: usize,
    /// Starts of each k-means on a half, for stability and prediction strength, or for the gap. There are
    /// many of these, whose mean counts.
    pub rough_restarts: usize,
    /// Pairs of halves to compare for stability and prediction strength.
    pub pairs: usize,
    /// Sets without structure that the gap compares with.
    pub references: usize,
    /// Neighbours of each image in the graph of the eigengap.
    pub neighbours: usize,
    /// The largest number of clusters to score.
    pub most_clusters: usize,
    /// How generalisation is measured.
    pub generalisation: Generalisation,
}

/// The scores of one number of clusters; higher is better in all.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NumberScore {
    /// The number of clusters, K.
    pub clusters: usize,
    /// Silhouette of k-means on all images, in `[−1, 1]`.
    pub silhouette: f64,
    /// Mean over pairs of halves of the adjusted Rand index between their groupings, at most 1.
    pub stability: f64,
    /// Standard error of that mean.
    pub stability_error: f64,
    /// Mean over pairs of halves, and their two orders, of the prediction strength, in `[0, 1]`.
    pub prediction_strength: f64,
    /// The gap, in nats.
    pub gap: f64,
    /// Its standard error.
    pub gap_error: f64,
    /// Gap between the `K`-th and the next eigenvalue of the graph of neighbours, in `[0, 2]`.
    pub eigengap: f64,
    /// Generalisation score above that of guessing by the sizes, at most 1: 0 for what cannot be learnt.
    pub generalisation: f64,
}

/// Scores numbers of clusters on embeddings.
pub struct Estimator {
    /// Unit rows, `(N, D)`.
    points: Vec<f32>,
    d: usize,
    settings: EstimatorSettings,
    seed: u64,
    /// The images for the costly indices, their rows, and the distances between them.
    measured: Vec<usize>,
    measured_points: Vec<f32>,
    distances: Distances,
    /// Reference sets: rows like the measured ones, without structure.
    references: Vec<Vec<f32>>,
    /// Eigenvalues of the graph of neighbours: one more than `most_clusters`.
    eigenvalues: Vec<f64>,
}

impl Estimator {
    /// Draws images from the rows of `points` `(N, d)`, and scales them to unit length.
    ///
    /// # Errors
    ///
    /// The settings are out of range, or a row has no direction; the message names it.
    pub fn new(points: &[f32], d: usize, settings: &EstimatorSettings, seed: u64) -> Result<Self> {
        let EstimatorSettings { images, measured_images, pairs, references, .. } = *settings;
        let EstimatorSettings { restarts, rough_restarts, .. } = *settings;
        ensure!(
            d > 0 && points.len().is_multiple_of(d),
            "{} numbers do not fill rows of width {d}",
            points.len()
        );
        ensure!(
            images > 0 && measured_images > 1 && pairs > 0 && references > 0,
            "images, pairs and references must be at least 1, and 2 images are measured"
        );
        ensure!(
            restarts > 0 && rough_restarts > 0,
            "restarts and rough-restarts must be at least 1"
        );
        let mut random = random::stream(seed, "clusters: images", &[]);
        let drawn = sample(points.len() / d, images, &mut random);
        let mut rows = Vec::with_capacity(drawn.len() * d);
        for &i in &drawn {
            let row = &points[i * d..][..d];
            let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            ensure!(
                length >= 1e-12 && length.is_finite(),
                "row {i} has length {length:e}, so it has no direction; look at what computed it"
            );
            rows.extend(row.iter().map(|&x| (f64::from(x) / length) as f32));
        }
        let mut random = random::stream(seed, "clusters: silhouette", &[]);
        let measured = sample(drawn.len(), measured_images, &mut random);
        let near: Vec<f32> = measured.iter().flat_map(|&i| &rows[i * d..][..d]).copied().collect();
        let references =
            (0..references as u64).map(|number| without_structure(&near, d, seed, number));
        let count = (settings.most_clusters + 1).min(measured.len());
        let neighbours = settings.neighbours.min(measured.len().saturating_sub(1));
        Ok(Self {
            distances: Distances::new(&near, d),
            references: references.collect(),
            eigenvalues: match neighbours {
                0 => vec![0.; count],
                k => neighbour_graph_eigenvalues(&near, measured.len(), d, k, count)?,
            },
            measured_points: near,
            points: rows,
            d,
            settings: *settings,
            seed,
            measured,
        })
    }

    /// Number of images used, N.
    pub fn images(&self) -> usize {
        self.points.len() / self.d
    }

    /// Scores one number of clusters.
    ///
    /// # Errors
    ///
    /// `clusters` is below 2, or above half the number of images or `most_clusters`.
    pub fn score(&self, clusters: usize) -> Result<NumberScore> {
        let n = self.images();
        ensure!(clusters >= 2, "{clusters} clusters cannot be scored; at least 2 are needed");
        ensure!(
            n / 2 >= clusters,
            "{clusters} clusters cannot be compared between halves of {n} images; at most {} can",
            n / 2
        );
        ensure!(
            clusters < self.eigenvalues.len(),
            "{clusters} clusters cannot be scored; these settings and images allow at most {}",
            self.eigenvalues.len() - 1
        );
        let seed = random::derived(self.seed, "clusters: all images");
        let all = self.k_means(&self.points, clusters, self.settings.restarts, seed)?;
        let assignment: Vec<u32> = self.measured.iter().map(|&i| all.assignment[i]).collect();
        let pairs = (0..self.settings.pairs).into_par_iter();
        let pairs = pairs.map(|pair| self.agreement(clusters, pair));
        let pairs = pairs.collect::<Result<Vec<(f64, f64)>>>()?;
        let (stabilities, strengths): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
        let (stability, stability_error) = mean_and_error(&stabilities);
        let (gap, gap_error) = self.gap(clusters)?;
        Ok(NumberScore {
            clusters,
            silhouette: self.distances.silhouette(&assignment, clusters),
            stability,
            stability_error,
            prediction_strength: mean_and_error(&strengths).0,
            gap,
            gap_error,
            eigengap: self.eigenvalues[clusters] - self.eigenvalues[clusters - 1],
            generalisation: self.generalisation(&assignment, clusters)?,
        })
    }

    /// Compares the groupings of all images that two halves of the images lead to: adjusted Rand index
    /// of all images, and prediction strength, mean of both orders.
    fn agreement(&self, clusters: usize, pair: usize) -> Result<(f64, f64)> {
        let mut order: Vec<usize> = (0..self.images()).collect();
        // The same halves for every number of clusters, which makes the scores comparable.
        order.shuffle(&mut random::stream(self.seed, "clusters: halves", &[pair as u64]));
        let seed = random::derived(self.seed, &format!("clusters: pair {pair}"));
        let (first, second) = order.split_at(order.len() / 2);
        let grouping = |half: &[usize]| -> Result<Vec<u32>> {
            let rows: Vec<f32> =
                half.iter().flat_map(|&i| &self.points[i * self.d..][..self.d]).copied().collect();
            let centres = self.roughly(&rows, clusters, seed)?.centres;
            let once = KMeans { iterations: 1, ..config(clusters, 1) };
            Ok(k_means_from(&self.points, self.images(), self.d, &centres, &once)?.assignment)
        };
        let (by_first, by_second) = (grouping(first)?, grouping(second)?);
        let strength = |own: &[u32], other: &[u32], half: &[usize]| -> Result<f64> {
            let of = |grouping: &[u32]| half.iter().map(|&i| grouping[i]).collect::<Vec<u32>>();
            Ok(prediction_strength(&contingency(&of(own), &of(other), clusters, clusters)?))
        };
        let strengths =
            [strength(&by_second, &by_first, second)?, strength(&by_first, &by_second, first)?];
        let index = adjusted_rand_index(&contingency(&by_first, &by_second, clusters, clusters)?);
        Ok((index, (strengths[0] + strengths[1]) / 2.))
    }

    fn gap(&self, clusters: usize) -> Result<(f64, f64)> {
        let seed = random::derived(self.seed, "clusters: gap");
        let within = |rows: &[f32]| -> Result<f64> {
            let found = self.roughly(rows, clusters, seed)?;
            Ok(found.inertia.max(f64::MIN_POSITIVE).ln())
        };
        let sets = self.references.par_iter().chain(rayon::iter::once(&self.measured_points));
        let mut found = sets.map(|rows| within(rows)).collect::<Result<Vec<f64>>>()?;
        let own = found.pop().context("the images themselves")?;
        Ok(gap(own, &found))
    }

    /// `(score − Σ p²) / (1 − Σ p²)` with the shares `p` of the clusters.
    fn generalisation(&self, assignment: &[u32], clusters: usize) -> Result<f64> {
        let mut sizes = vec![0f64; clusters];
        assignment.iter().for_each(|&cluster| sizes[cluster as usize] += 1.);
        let n = assignment.len() as f64;
        let chance: f64 = sizes.iter().map(|size| (size / n).powi(2)).sum();
        let rows = &self.measured_points;
        let score =
            self.settings.generalisation.score(rows, self.d, assignment, clusters, self.seed)?;
        Ok(if chance < 1. { (score - chance) / (1. - chance) } else { 0. })
    }

    fn roughly(&self, rows: &[f32], clusters: usize, seed: u64) -> Result<Clustering> {
        self.k_means(rows, clusters, self.settings.rough_restarts, seed)
    }

    fn k_means(
        &self,
        rows: &[f32],
        clusters: usize,
        restarts: usize,
        seed: u64,
    ) -> Result<Clustering> {
        k_means(rows, rows.len() / self.d, self.d, &config(clusters, restarts), seed)
    }
}

fn config(clusters: usize, restarts: usize) -> KMeans {
    KMeans { clusters, metric: Metric::Spherical, restarts, iterations: 100, tolerance: 1e-4 }
}

/// Shuffles each column of `rows` separately, which keeps its values but no structure between columns.
fn without_structure(rows: &[f32], d: usize, seed: u64, number: u64) -> Vec<f32> {
    let n = rows.len() / d;
    let columns: Vec<Vec<f32>> = (0..d)
        .into_par_iter()
        .map(|column| {
            let mut values: Vec<f32> = rows.iter().skip(column).step_by(d).copied().collect();
            let counters = [number, column as u64];
            values.shuffle(&mut random::stream(seed, "clusters: no structure", &counters));
            values
        })
        .collect();
    let mut shuffled: Vec<f32> =
        (0..n).flat_map(|i| columns.iter().map(move |column| column[i])).collect();
    for row in shuffled.chunks_exact_mut(d) {
        // A row of zeros has no direction: take an arbitrary one.
        if points::squared_distance(row, &vec![0.; d]) < 1e-24 {
            row[0] = 1.;
        }
    }
    shuffled
}

/// The gap `mean_b log W_b − log W` of `log W`, and its standard error `s √(1 + 1/B)`.
///
/// `W` is the inertia of k-means, `W_b` that on `B` sets without structure: Tibshirani, Walther and Hastie
/// 2001. There the sets are uniform in a box; here each column is shuffled, because a box around many
/// correlated columns is nearly empty.
///
/// - `references`: `log W_b`, at least one.
pub fn gap(log_inertia: f64, references: &[f64]) -> (f64, f64) {
    let count = references.len() as f64;
    let mean = references.iter().sum::<f64>() / count;
    let variance = references.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    (mean - log_inertia, (variance * (1. + 1. / count)).sqrt())
}

/// The prediction strength: the smallest share, over the clusters of some images, of pairs of a cluster's
/// images that clusters found on other images put together too. In `[0, 1]`.
///
/// `min_k Σ_c n_kc (n_kc − 1) / (n_k (n_k − 1))`: Tibshirani and Walther 2005. A cluster of one image, or of
/// none, counts as 1, which is left out of the minimum.
///
/// - `table`: rows are the images' own clusters, columns those by the centres of the others.
pub fn prediction_strength(table: &Contingency) -> f64 {
    let pairs = |n: f64| n * (n - 1.);
    let of_cluster = |row: &[u32]| {
        let size: f64 = row.iter().map(|&n| f64::from(n)).sum();
        (size >= 2.).then(|| row.iter().map(|&n| pairs(f64::from(n))).sum::<f64>() / pairs(size))
    };
    table.counts.chunks_exact(table.columns).filter_map(of_cluster).fold(1., f64::min)
}

/// Returns the mean of `values` and its standard error; the error of a single value is 0.
fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, if values.len() < 2 { 0. } else { (squares / (n - 1.) / n).sqrt() })
}

/// A guess at the number of clusters.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Suggestion {
    /// The number to try first.
    pub clusters: usize,
    /// The fewest and the most clusters that are nearly as good.
    pub range: [usize; 2],
    /// What each index says alone, of those that say anything.
    pub reasons: Vec<IndexVote>,
}

/// What one index says.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct IndexVote {
    /// The index.
    pub index: &'static str,
    /// The number that it prefers by its published rule.
    pub clusters: usize,
    /// The rule, in words.
    pub rule: &'static str,
}

/// Suggests the number with the highest mean of the indices; of a tie, the fewest clusters. The range is
/// from the first to the last number whose mean is within [`NEARLY`] of the highest.
///
/// Stability, prediction strength, eigengap and generalisation count as they are: an index that is nearly
/// constant decides nothing. Stability and generalisation may fall below 0, and the eigengap rises to 2.
/// Silhouette and gap have no common unit, so they count as shares of their largest value, the gap up to
/// where it stops rising by more than its error. A gap that rises to the last candidate has found no
/// number: it does not count, because it would only stretch the range. A number that is merely stable,
/// such as 2, needs a silhouette too. The weights are ours.
///
/// `None` if no candidate has stability and silhouette above 0, or there is none.
pub fn suggested(candidates: &[NumberScore]) -> Option<Suggestion> {
    candidates.iter().find(|c| c.stability > 0. && c.silhouette > 0.)?;
    let means = mean_indices(candidates);
    let best = first_largest(&means)?;
    let near: Vec<usize> = (0..means.len()).filter(|&i| means[i] >= means[best] - NEARLY).collect();
    let clusters = |place: usize| candidates[place].clusters;
    Some(Suggestion {
        clusters: clusters(best),
        range: [clusters(*near.first()?), clusters(*near.last()?)],
        reasons: votes(candidates),
    })
}

/// Numbers whose mean index is within this of the best are nearly as good.
pub const NEARLY: f64 = 0.07;

/// The mean over the indices of each candidate, `(candidates,)`.
fn mean_indices(candidates: &[NumberScore]) -> Vec<f64> {
    let silhouettes = of_largest(candidates.iter().map(|c| c.silhouette).collect());
    let known =
        |c: &NumberScore| c.stability + c.prediction_strength + c.eigengap + c.generalisation;
    let sums = candidates.iter().zip(silhouettes).map(|(c, silhouette)| known(c) + silhouette);
    match gap_rule(candidates) {
        None => sums.map(|sum| sum / 5.).collect(),
        Some(stop) => {
            let gaps = of_largest(risen_gap(candidates, stop));
            sums.zip(gaps).map(|(sum, gap)| (sum + gap) / 6.).collect()
        }
    }
}

/// Values as shares of the largest, those below 0 as 0; all 0 if none is above.
fn of_largest(values: Vec<f64>) -> Vec<f64> {
    let largest = values.iter().copied().fold(0., f64::max);
    let share = |x: f64| if largest > 0. { x.max(0.) / largest } else { 0. };
    values.into_iter().map(share).collect()
}

/// The gap up to the place where it stops rising, level from there on.
fn risen_gap(candidates: &[NumberScore], stop: usize) -> Vec<f64> {
    (0..candidates.len()).map(|i| candidates[i.min(stop)].gap).collect()
}

/// The place of the fewest clusters with `gap(K) ≥ gap(K + 1) − s(K + 1)`, if there are any.
fn gap_rule(candidates: &[NumberScore]) -> Option<usize> {
    let stops = |pair: &[NumberScore]| pair[0].gap >= pair[1].gap - pair[1].gap_error;
    candidates.windows(2).position(stops)
}

fn first_largest(values: &[f64]) -> Option<usize> {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best })
}

fn votes(candidates: &[NumberScore]) -> Vec<IndexVote> {
    let of =
        |index: fn(&NumberScore) -> f64| -> Vec<f64> { candidates.iter().map(index).collect() };
    let stability = of(|c| c.stability);
    let stable = first_largest(&stability).and_then(|most| {
        let least = candidates[most].stability - candidates[most].stability_error;
        stability.iter().rposition(|&stability| stability >= least)
    });
    let strong = candidates.iter().rposition(|c| c.prediction_strength >= STRONG);
    let all: [(&'static str, Option<usize>, &'static str); 6] = [
        ("silhouette", first_largest(&of(|c| c.silhouette)), "the highest"),
        ("stability", stable, "the most clusters within the error of the highest"),
        ("prediction strength", strong, "the most clusters of at least 0.8"),
        ("gap", gap_rule(candidates), "the fewest clusters after which it does not rise"),
        ("eigengap", first_largest(&of(|c| c.eigengap)), "the highest"),
        ("generalisation", first_largest(&of(|c| c.generalisation)), "the highest"),
    ];
    all.into_iter()
        .filter_map(|(index, place, rule)| {
            Some(IndexVote { index, clusters: candidates[place?].clusters, rule })
        })
        .collect()
}

/// The least prediction strength of clusters that its authors accept; they use 0.8 to 0.9.
const STRONG: f64 = 0.8;

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    const SETTINGS: EstimatorSettings = EstimatorSettings {
        images: 1000,
        measured_images: 200,
        restarts: 4,
        rough_restarts: 4,
        pairs: 3,
        references: 3,
        neighbours: 8,
        most_clusters: 12,
        generalisation: Generalisation { folds: 3, weight: 1., iterations: 50 },
    };

    /// Points around `groups` random directions.
    fn groups(n: usize, d: usize, groups: usize, noise: f32) -> Vec<f32> {
        let mut random = random::stream(5, "groups", &[]);
        let centres: Vec<f32> = (0..groups * d).map(|_| random.random::<f32>() - 0.5).collect();
        (0..n * d)
            .map(|i| centres[(i / d % groups) * d + i % d] + noise * (random.random::<f32>() - 0.5))
            .collect()
    }

    #[test]
    fn separate_groups_are_counted_by_every_index() -> Result<()> {
        let points = groups(600, 16, 7, 0.4);
        let estimator = Estimator::new(&points, 16, &SETTINGS, 1)?;
        let candidates = (2..=12).map(|k| estimator.score(k)).collect::<Result<Vec<_>>>()?;
        let best = suggested(&candidates).expect("some score is above 0");
        assert_eq!(best.clusters, 7, "{candidates:#?}");
        assert!((best.range[0]..=best.range[1]).contains(&7), "{best:?}");
        for vote in &best.reasons {
            let is_rough = ["generalisation", "gap"].contains(&vote.index);
            assert!(vote.clusters == 7 || is_rough, "{vote:?}");
        }
        assert_eq!(best.reasons.len(), 6);
        let seven = &candidates[5];
        assert!(seven.stability > 0.99 && seven.silhouette > 0.5, "{seven:?}");
        assert!(seven.prediction_strength > 0.99 && seven.eigengap > 0.1, "{seven:?}");
        assert!(seven.generalisation > 0.99 && seven.gap > 0.5, "{seven:?}");
        // More clusters split groups, differently in each half.
        assert!(candidates[10].stability < 0.95, "{:?}", candidates[10]);
        assert_eq!(estimator.score(5)?, candidates[3]);
        Ok(())
    }

    #[test]
    fn equal_points_suggest_nothing_and_few_are_refused() -> Result<()> {
        let settings = EstimatorSettings { most_clusters: 30, ..SETTINGS };
        let estimator = Estimator::new(&[0.6, 0.8].repeat(40), 2, &settings, 0)?;
        let candidate = estimator.score(3)?;
        assert_eq!((candidate.silhouette, candidate.stability_error), (0., 0.));
        assert!(suggested(&[candidate]).is_none());
        let error = estimator.score(21).expect_err("too many").to_string();
        assert!(error.contains("at most 20"), "{error}");
        assert!(estimator.score(1).is_err());
        let error = Estimator::new(&[1., 0., 0., 0.], 2, &SETTINGS, 0).err().expect("no direction");
        assert!(error.to_string().contains("row 1"), "{error}");
        let few = Estimator::new(&[0.6, 0.8].repeat(40), 2, &SETTINGS, 0)?;
        let error = few.score(13).expect_err("not announced").to_string();
        assert!(error.contains("at most 12"), "{error}");
        Ok(())
    }

    #[test]
    fn the_gap_and_its_error_have_the_values_of_the_formula() {
        let (found, error) = gap(1., &[2., 4.]);
        assert_eq!((found, error), (2., 1.5f64.sqrt()));
        assert_eq!(gap(3., &[2.]), (-1., 0.));
    }

    #[test]
    fn the_prediction_strength_is_that_of_the_weakest_cluster() {
        let table = |counts: Vec<u32>| Contingency { rows: counts.len() / 2, columns: 2, counts };
        // 4 together: 1; 3 and 1 of 4: (3·2 + 0) / (4·3).
        assert_eq!(prediction_strength(&table(vec![4, 0, 3, 1])), 0.5);
        // Clusters of one image or none do not count.
        assert_eq!(prediction_strength(&table(vec![4, 0, 0, 1, 0, 0])), 1.);
    }

    fn candidate(clusters: usize, silhouette: f64, stability: f64) -> NumberScore {
        NumberScore {
            clusters,
            silhouette,
            stability,
            stability_error: 0.01,
            prediction_strength: stability,
            gap: 0.,
            gap_error: 0.,
            eigengap: 0.,
            generalisation: 0.,
        }
    }

    #[test]
    fn the_mean_of_the_indices_decides() {
        let numbers =
            |candidates: &[NumberScore]| suggested(candidates).map(|s| (s.clusters, s.range));
        // Shares of the largest silhouette 1/3, 1, 2/3; sums 2.33, 2.9, 1.67. The gap stops at once.
        let found = [candidate(2, 0.1, 1.), candidate(3, 0.3, 0.95), candidate(4, 0.2, 0.5)];
        assert_eq!(numbers(&found), Some((3, [3, 3])));
        for (eigengap, clusters) in [(0.4, 3), (0.6, 2)] {
            let first = NumberScore { eigengap, ..found[0] };
            assert_eq!(numbers(&[first, found[1], found[2]]), Some((clusters, [2, 3])));
        }
        assert_eq!(numbers(&[candidate(3, -0.1, 0.9), candidate(4, 0.1, 0.)]), None);
        assert_eq!(numbers(&[]), None);
    }

    #[test]
    fn the_gap_counts_until_it_stops_rising() {
        let with = |clusters, gap, gap_error| NumberScore {
            gap,
            gap_error,
            ..candidate(clusters, 0.1, 0.5)
        };
        let found =
            [with(2, 0.1, 0.01), with(3, 0.5, 0.01), with(4, 0.52, 0.05), with(5, 0.9, 0.01)];
        assert_eq!(gap_rule(&found), Some(1));
        assert_eq!(risen_gap(&found, 1), [0.1, 0.5, 0.5, 0.5]);
        // Shares of the largest gap .2, 1, 1, 1.
        let sums = [0.2, 1., 1., 1.].map(|gap| (0.5 + 0.5 + 1. + gap) / 6.);
        assert_eq!(mean_indices(&found), sums);
        // Without a stop it is as if there were no gap.
        assert_eq!(gap_rule(&found[..2]), None);
        assert_eq!(mean_indices(&found[..2]), [2. / 5.; 2]);
        assert!(votes(&found[..2]).iter().all(|vote| vote.index != "gap"));
    }

    #[test]
    fn no_more_images_are_used_than_asked_for() -> Result<()> {
        let points = groups(500, 4, 3, 0.2);
        let few = EstimatorSettings { images: 120, ..SETTINGS };
        let estimator = Estimator::new(&points, 4, &few, 0)?;
        assert_eq!((estimator.images(), estimator.measured.len()), (120, 120));
        Ok(())
    }
}
