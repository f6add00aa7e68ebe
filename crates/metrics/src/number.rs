//! How many clusters there may be: candidates scored on embeddings, without any truth.
//!
//! Two things are asked of a number of clusters. Are the clusters it gives compact and apart? The
//! [`silhouette`](crate::geometry) says so. And does k-means find the same clusters from other
//! images of the same kind? [Stability](Candidate::stability) says so: two disjoint halves of the
//! images are grouped each by itself, all images are assigned to the nearest centres of both, and
//! the two groupings are compared (Lange et al. 2004; by the adjusted Rand index, so that few and
//! many clusters start from the same zero).
//!
//! The [recommended] candidate is the most stable one, as in that work; where others are as stable
//! within the error of the estimate, the silhouette decides. Neither score knows what the images
//! show, and both can favour a coarser grouping than the one sought: it is a guess. (The product of
//! both scores was looked at too: on the digits' last embeddings it prefers 14 clusters to the 10
//! that are there, by a hair.)

use anyhow::{Result, ensure};
use assignment::{Clustering, KMeans, Metric, contingency, k_means, k_means_from, sample};
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::agreement::adjusted_rand_index;
use crate::geometry::Distances;

/// What the scoring of candidates can vary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Images that are looked at; drawn where there are more.
    pub images: usize,
    /// Images, of these, between which the silhouette takes distances.
    pub silhouette_images: usize,
    /// Starts of each k-means.
    pub restarts: usize,
    /// Pairs of halves that are compared for the stability.
    pub pairs: usize,
}

/// What was found for one number of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Candidate {
    /// The number of clusters, K.
    pub clusters: usize,
    /// Of k-means on all images, in `[−1, 1]`.
    pub silhouette: f64,
    /// The mean over pairs of halves of their groupings' adjusted Rand index, at most 1.
    pub stability: f64,
    /// Standard error of that mean.
    pub stability_error: f64,
}

/// Embeddings whose number of clusters is asked for.
pub struct Embeddings {
    /// Unit rows, `(N, D)`.
    points: Vec<f32>,
    d: usize,
    settings: Settings,
    seed: u64,
    /// Images of the silhouette, and the distances between them.
    measured: Vec<usize>,
    distances: Distances,
}

impl Embeddings {
    /// Draws from the rows of `points` `(N, d)`; directions count, lengths do not.
    ///
    /// # Errors
    ///
    /// The settings are out of range, or a row has no direction; the message names it.
    pub fn new(points: &[f32], d: usize, settings: &Settings, seed: u64) -> Result<Self> {
        let Settings { images, silhouette_images, restarts, pairs } = *settings;
        ensure!(
            d > 0 && points.len().is_multiple_of(d),
            "{} numbers are no rows of {d}",
            points.len()
        );
        ensure!(
            images > 0 && silhouette_images > 1 && restarts > 0 && pairs > 0,
            "images, restarts and pairs must be at least 1, and the silhouette takes 2 images"
        );
        let mut random = stage::random::stream(seed, "clusters: images", &[]);
        let drawn = sample(points.len() / d, images, &mut random);
        let mut rows = Vec::with_capacity(drawn.len() * d);
        for &i in &drawn {
            let row = &points[i * d..][..d];
            let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            ensure!(
                length >= 1e-12 && length.is_finite(),
                "row {i} has length {length:e}, so it has no direction; look at what embedded it"
            );
            rows.extend(row.iter().map(|&x| (f64::from(x) / length) as f32));
        }
        let mut random = stage::random::stream(seed, "clusters: silhouette", &[]);
        let measured = sample(drawn.len(), silhouette_images, &mut random);
        let near: Vec<f32> = measured.iter().flat_map(|&i| &rows[i * d..][..d]).copied().collect();
        let distances = Distances::new(&near, d);
        Ok(Self { points: rows, d, settings: *settings, seed, measured, distances })
    }

    /// Images that are looked at, N.
    pub fn images(&self) -> usize {
        self.points.len() / self.d
    }

    /// Scores one number of clusters.
    ///
    /// # Errors
    ///
    /// It is below 2, or a half of the images cannot fill so many.
    pub fn score(&self, clusters: usize) -> Result<Candidate> {
        let n = self.images();
        ensure!(clusters >= 2, "{clusters} clusters cannot be scored; the least is 2");
        ensure!(
            n / 2 >= clusters,
            "{clusters} clusters cannot be compared between halves of {n} images; at most {} can",
            n / 2
        );
        let all = self.k_means(&self.points, clusters, 0)?;
        let assignment: Vec<u32> = self.measured.iter().map(|&i| all.assignment[i]).collect();
        let silhouette = self.distances.silhouette(&assignment, clusters);
        let pairs = (0..self.settings.pairs).map(|pair| self.agreement(clusters, pair));
        let agreements = pairs.collect::<Result<Vec<f64>>>()?;
        let stability = agreements.iter().sum::<f64>() / agreements.len() as f64;
        Ok(Candidate {
            clusters,
            silhouette,
            stability,
            stability_error: standard_error(&agreements, stability),
        })
    }

    /// How far two halves of the images lead to the same grouping of all.
    fn agreement(&self, clusters: usize, pair: usize) -> Result<f64> {
        let mut order: Vec<usize> = (0..self.images()).collect();
        // The same halves for every candidate, so that candidates differ by themselves alone.
        order.shuffle(&mut stage::random::stream(self.seed, "clusters: halves", &[pair as u64]));
        let (first, second) = order.split_at(order.len() / 2);
        let groupings = [first, second].map(|half| {
            let rows: Vec<f32> =
                half.iter().flat_map(|&i| &self.points[i * self.d..][..self.d]).copied().collect();
            let centres = self.k_means(&rows, clusters, 1 + pair)?.centres;
            let once = KMeans { iterations: 1, ..self.config(clusters) };
            Ok(k_means_from(&self.points, self.images(), self.d, &centres, &once)?.assignment)
        });
        let [first, second]: [Result<Vec<u32>>; 2] = groupings;
        Ok(adjusted_rand_index(&contingency(&first?, &second?, clusters, clusters)?))
    }

    fn k_means(&self, rows: &[f32], clusters: usize, purpose: usize) -> Result<Clustering> {
        let seed = self.seed.wrapping_add(purpose as u64);
        k_means(rows, rows.len() / self.d, self.d, &self.config(clusters), seed)
    }

    fn config(&self, clusters: usize) -> KMeans {
        let restarts = self.settings.restarts;
        KMeans { clusters, metric: Metric::Spherical, restarts, iterations: 100, tolerance: 1e-4 }
    }
}

/// Of the values' mean; 0 for a single value, whose error is not known.
fn standard_error(values: &[f64], mean: f64) -> f64 {
    let n = values.len() as f64;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    if values.len() < 2 { 0. } else { (squares / (n - 1.) / n).sqrt() }
}

/// The most stable candidate; of those that lie within its standard error, the one of the highest
/// silhouette, and the fewest clusters of equals. `None` where stability and silhouette are not
/// above 0, so that nothing speaks for any of them.
pub fn recommended(candidates: &[Candidate]) -> Option<&Candidate> {
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

    const SETTINGS: Settings =
        Settings { images: 1000, silhouette_images: 200, restarts: 4, pairs: 3 };

    /// Points around `groups` directions.
    fn groups(n: usize, d: usize, groups: usize, noise: f32) -> Vec<f32> {
        let mut random = stage::random::stream(5, "groups", &[]);
        let centres: Vec<f32> = (0..groups * d).map(|_| random.random::<f32>() - 0.5).collect();
        (0..n * d)
            .map(|i| centres[(i / d % groups) * d + i % d] + noise * (random.random::<f32>() - 0.5))
            .collect()
    }

    #[test]
    fn separate_groups_are_counted() -> Result<()> {
        let points = groups(600, 16, 7, 0.4);
        let embeddings = Embeddings::new(&points, 16, &SETTINGS, 1)?;
        let candidates = (2..=12).map(|k| embeddings.score(k)).collect::<Result<Vec<_>>>()?;
        let best = recommended(&candidates).expect("some score is above 0");
        assert_eq!(best.clusters, 7, "{candidates:?}");
        assert!(best.stability > 0.99 && best.silhouette > 0.5, "{best:?}");
        // More clusters split groups, and not twice alike.
        assert!(candidates[10].stability < 0.95, "{:?}", candidates[10]);
        assert_eq!(embeddings.score(5)?, candidates[3]);
        Ok(())
    }

    #[test]
    fn equal_points_recommend_nothing_and_few_are_refused() -> Result<()> {
        let embeddings = Embeddings::new(&[0.6, 0.8].repeat(40), 2, &SETTINGS, 0)?;
        let candidate = embeddings.score(3)?;
        assert_eq!((candidate.silhouette, candidate.stability_error), (0., 0.));
        assert!(recommended(&[candidate]).is_none());
        let error = embeddings.score(21).expect_err("too many").to_string();
        assert!(error.contains("at most 20"), "{error}");
        assert!(embeddings.score(1).is_err());
        let error =
            Embeddings::new(&[1., 0., 0., 0.], 2, &SETTINGS, 0).err().expect("no direction");
        assert!(error.to_string().contains("row 1"), "{error}");
        Ok(())
    }

    #[test]
    fn stability_decides_and_silhouette_among_those_as_stable() {
        let candidate = |clusters, silhouette, stability, stability_error| Candidate {
            clusters,
            silhouette,
            stability,
            stability_error,
        };
        let of = |candidates: &[Candidate]| recommended(candidates).map(|best| best.clusters);
        let (coarse, sought) = (candidate(2, 0.3, 0.94, 0.01), candidate(5, 0.5, 0.95, 0.02));
        let (fine, lucky) = (candidate(6, 0.6, 0.9, 0.1), candidate(7, 0.2, 0.96, 0.015));
        assert_eq!(of(&[coarse, sought, fine]), Some(5));
        assert_eq!(of(&[coarse, sought, fine, lucky]), Some(5));
        assert_eq!(of(&[candidate(3, -0.1, 0.9, 0.1), candidate(4, 0.1, 0., 0.)]), None);
        assert_eq!(of(&[]), None);
        assert!((standard_error(&[1., 2., 3.], 2.) - (1f64 / 3.).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn only_so_many_images_are_looked_at() -> Result<()> {
        let points = groups(500, 4, 3, 0.2);
        let few = Settings { images: 120, ..SETTINGS };
        let embeddings = Embeddings::new(&points, 4, &few, 0)?;
        assert_eq!((embeddings.images(), embeddings.measured.len()), (120, 120));
        Ok(())
    }
}
