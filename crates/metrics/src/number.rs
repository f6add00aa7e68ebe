//! Estimates the number of clusters: scores candidates on embeddings, without any truth.
//!
//! Each number of clusters is judged by two scores. The [`silhouette`](Distances::silhouette) measures
//! whether its clusters are compact and far apart. [Stability](NumberScore::stability) measures
//! whether k-means finds the same clusters in other images of the same kind: two disjoint halves of
//! the images are clustered independently, all images are assigned to the nearest centres of each
//! half, and the two groupings are compared (Lange et al. 2004). The comparison uses the adjusted
//! Rand index, which is 0 for random groupings with few and with many clusters.
//!
//! The [recommended] number is the most stable one, as in that work; the silhouette decides among
//! those that are as stable within the standard error. Neither score knows what the images show, and
//! both can favour a coarser grouping than the one you seek, so the result is a guess. (The product
//! of both scores is no better: on the digits' last embeddings it slightly prefers 14 clusters to
//! the true 10.)

use anyhow::{Result, ensure};
use assignment::{
    Clustering, Distances, KMeans, Metric, adjusted_rand_index, contingency, k_means, k_means_from, sample};
use rand::seq::SliceRandom;
use serde::Serialize;
use stage::random;


/// The parameters of an estimate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EstimatorSettings {
    /// Most images to use; drawn at random if there are more.
    pub images: usize,
    /// Most of these images to use for the silhouette, whose cost is quadratic.
    pub silhouette_images: usize,
    /// Starts of each k-means.
    pub restarts: usize,
    /// Pairs of halves to compare for the stability.
    pub pairs: usize,
}

/// The scores of one number of clusters.
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
}

/// Scores numbers of clusters on embeddings.
pub struct Estimator {
    /// Unit rows, `(N, D)`.
    points: Vec<f32>,
    d: usize,
    settings: EstimatorSettings,
    seed: u64,
    /// The images of the silhouette, and the distances between them.
    measured: Vec<usize>,
    distances: Distances,
}

impl Estimator {
    /// Draws images from the rows of `points` `(N, d)`, and scales them to unit length.
    ///
    /// # Errors
    ///
    /// The settings are out of range, or a row has no direction; the message names it.
    pub fn new(points: &[f32], d: usize, settings: &EstimatorSettings, seed: u64) -> Result<Self> {
        let EstimatorSettings { images, silhouette_images, restarts, pairs } = *settings;
        ensure!(
            d > 0 && points.len().is_multiple_of(d),
            "{} numbers do not fill rows of width {d}",
            points.len()
        );
        ensure!(
            images > 0 && silhouette_images > 1 && restarts > 0 && pairs > 0,
            "images, restarts and pairs must be at least 1, and the silhouette needs 2 images"
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
        let measured = sample(drawn.len(), silhouette_images, &mut random);
        let near: Vec<f32> = measured.iter().flat_map(|&i| &rows[i * d..][..d]).copied().collect();
        let distances = Distances::new(&near, d);
        Ok(Self { points: rows, d, settings: *settings, seed, measured, distances })
    }

    /// Number of images used, N.
    pub fn images(&self) -> usize {
        self.points.len() / self.d
    }

    /// Scores one number of clusters.
    ///
    /// # Errors
    ///
    /// `clusters` is below 2 or above half the number of images.
    pub fn score(&self, clusters: usize) -> Result<NumberScore> {
        let n = self.images();
        ensure!(clusters >= 2, "{clusters} clusters cannot be scored; at least 2 are needed");
        ensure!(
            n / 2 >= clusters,
            "{clusters} clusters cannot be compared between halves of {n} images; at most {} can",
            n / 2
        );
        let seed = random::derived(self.seed, "clusters: all images");
        let all = self.k_means(&self.points, clusters, seed)?;
        let assignment: Vec<u32> = self.measured.iter().map(|&i| all.assignment[i]).collect();
        let silhouette = self.distances.silhouette(&assignment, clusters);
        let pairs = (0..self.settings.pairs).map(|pair| self.agreement(clusters, pair));
        let agreements = pairs.collect::<Result<Vec<f64>>>()?;
        let stability = agreements.iter().sum::<f64>() / agreements.len() as f64;
        Ok(NumberScore {
            clusters,
            silhouette,
            stability,
            stability_error: standard_error(&agreements, stability),
        })
    }

    /// Compares the groupings of all images that two halves of the images lead to.
    fn agreement(&self, clusters: usize, pair: usize) -> Result<f64> {
        let mut order: Vec<usize> = (0..self.images()).collect();
        // The same halves for every number of clusters, which makes the scores comparable.
        order.shuffle(&mut random::stream(self.seed, "clusters: halves", &[pair as u64]));
        let seed = random::derived(self.seed, &format!("clusters: pair {pair}"));
        let (first, second) = order.split_at(order.len() / 2);
        let groupings = [first, second].map(|half| {
            let rows: Vec<f32> =
                half.iter().flat_map(|&i| &self.points[i * self.d..][..self.d]).copied().collect();
            let centres = self.k_means(&rows, clusters, seed)?.centres;
            let once = KMeans { iterations: 1, ..self.config(clusters) };
            Ok(k_means_from(&self.points, self.images(), self.d, &centres, &once)?.assignment)
        });
        let [first, second]: [Result<Vec<u32>>; 2] = groupings;
        Ok(adjusted_rand_index(&contingency(&first?, &second?, clusters, clusters)?))
    }

    fn k_means(&self, rows: &[f32], clusters: usize, seed: u64) -> Result<Clustering> {
        k_means(rows, rows.len() / self.d, self.d, &self.config(clusters), seed)
    }

    fn config(&self, clusters: usize) -> KMeans {
        let restarts = self.settings.restarts;
        KMeans { clusters, metric: Metric::Spherical, restarts, iterations: 100, tolerance: 1e-4 }
    }
}

/// Returns the standard error of the mean of `values`; 0 for a single value.
fn standard_error(values: &[f64], mean: f64) -> f64 {
    let n = values.len() as f64;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    if values.len() < 2 { 0. } else { (squares / (n - 1.) / n).sqrt() }
}

/// Returns the recommended candidate: of those within one standard error of the most stable one, the
/// one of highest silhouette, and of equals the fewest clusters.
///
/// `None` if no such candidate has stability and silhouette above 0.
pub fn recommended(candidates: &[NumberScore]) -> Option<&NumberScore> {
    let most = candidates.iter().max_by(|a, b| a.stability.total_cmp(&b.stability))?;
    let least = most.stability - most.stability_error;
    let stable = candidates.iter().filter(|c| c.stability >= least && c.stability > 0.);
    stable.filter(|c| c.silhouette > 0.).reduce(|best, candidate| {
        if candidate.silhouette > best.silhouette { candidate } else { best }
    })
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    const SETTINGS: EstimatorSettings =
        EstimatorSettings { images: 1000, silhouette_images: 200, restarts: 4, pairs: 3 };

    /// Points around `groups` random directions.
    fn groups(n: usize, d: usize, groups: usize, noise: f32) -> Vec<f32> {
        let mut random = random::stream(5, "groups", &[]);
        let centres: Vec<f32> = (0..groups * d).map(|_| random.random::<f32>() - 0.5).collect();
        (0..n * d)
            .map(|i| centres[(i / d % groups) * d + i % d] + noise * (random.random::<f32>() - 0.5))
            .collect()
    }

    #[test]
    fn separate_groups_are_counted() -> Result<()> {
        let points = groups(600, 16, 7, 0.4);
        let estimator = Estimator::new(&points, 16, &SETTINGS, 1)?;
        let candidates = (2..=12).map(|k| estimator.score(k)).collect::<Result<Vec<_>>>()?;
        let best = recommended(&candidates).expect("some score is above 0");
        assert_eq!(best.clusters, 7, "{candidates:?}");
        assert!(best.stability > 0.99 && best.silhouette > 0.5, "{best:?}");
        // More clusters split groups, differently in each half.
        assert!(candidates[10].stability < 0.95, "{:?}", candidates[10]);
        assert_eq!(estimator.score(5)?, candidates[3]);
        Ok(())
    }

    #[test]
    fn equal_points_recommend_nothing_and_few_are_refused() -> Result<()> {
        let estimator = Estimator::new(&[0.6, 0.8].repeat(40), 2, &SETTINGS, 0)?;
        let candidate = estimator.score(3)?;
        assert_eq!((candidate.silhouette, candidate.stability_error), (0., 0.));
        assert!(recommended(&[candidate]).is_none());
        let error = estimator.score(21).expect_err("too many").to_string();
        assert!(error.contains("at most 20"), "{error}");
        assert!(estimator.score(1).is_err());
        let error = Estimator::new(&[1., 0., 0., 0.], 2, &SETTINGS, 0).err().expect("no direction");
        assert!(error.to_string().contains("row 1"), "{error}");
        Ok(())
    }

    #[test]
    fn stability_decides_and_silhouette_among_equally_stable_ones() {
        let candidate = |clusters, silhouette, stability, stability_error| NumberScore {
            clusters,
            silhouette,
            stability,
            stability_error,
        };
        let of = |candidates: &[NumberScore]| recommended(candidates).map(|best| best.clusters);
        let (coarse, sought) = (candidate(2, 0.3, 0.94, 0.01), candidate(5, 0.5, 0.95, 0.02));
        let (fine, lucky) = (candidate(6, 0.6, 0.9, 0.1), candidate(7, 0.2, 0.96, 0.015));
        assert_eq!(of(&[coarse, sought, fine]), Some(5));
        assert_eq!(of(&[coarse, sought, fine, lucky]), Some(5));
        assert_eq!(of(&[candidate(3, -0.1, 0.9, 0.1), candidate(4, 0.1, 0., 0.)]), None);
        assert_eq!(of(&[]), None);
        assert!((standard_error(&[1., 2., 3.], 2.) - (1f64 / 3.).sqrt()).abs() < 1e-12);
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
