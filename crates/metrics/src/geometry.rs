//! Scores of a grouping against the points it groups, without any truth.
//!
//! They say how compact and how far apart the groups lie in the given space, in Euclidean distance.
//! A high score is no proof that the groups mean anything.

use anyhow::{Result, ensure};
use rayon::prelude::*;

/// Points of which each is in a cluster.
#[derive(Debug, Clone, Copy)]
pub struct Grouped<'a> {
    points: &'a [f32],
    d: usize,
    assignment: &'a [u32],
    clusters: usize,
}

impl<'a> Grouped<'a> {
    /// `points` `(N, d)` row-major, and the cluster of each below `clusters`.
    ///
    /// # Errors
    ///
    /// The lengths contradict each other, a number is not finite or a cluster out of range (the
    /// message names the point), or fewer than two clusters have points.
    pub fn new(
        points: &'a [f32],
        d: usize,
        assignment: &'a [u32],
        clusters: usize,
    ) -> Result<Self> {
        ensure!(d > 0, "the points have width 0");
        ensure!(
            assignment.len().checked_mul(d) == Some(points.len()),
            "{} assignments of points of width {d}, but {} numbers; both must be of the same images",
            assignment.len(),
            points.len()
        );
        if let Some(i) = points.iter().position(|x| !x.is_finite()) {
            anyhow::bail!("point {} holds {}; only finite numbers can be scored", i / d, points[i]);
        }
        if let Some(i) = assignment.iter().position(|&k| k as usize >= clusters) {
            anyhow::bail!("point {i} is in cluster {} of {clusters}", assignment[i]);
        }
        let grouped = Self { points, d, assignment, clusters };
        let filled = grouped.sizes().iter().filter(|&&size| size > 0).count();
        ensure!(
            filled >= 2,
            "{filled} of {clusters} clusters have points; at least two are compared"
        );
        Ok(grouped)
    }

    fn row(&self, i: usize) -> &'a [f32] {
        &self.points[i * self.d..][..self.d]
    }

    fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.clusters];
        self.assignment.iter().for_each(|&k| sizes[k as usize] += 1);
        sizes
    }

    /// The mean of each cluster with points, `(K, D)`; zeros for the others.
    fn centres(&self) -> Vec<f64> {
        let mut sums = vec![0f64; self.clusters * self.d];
        for (row, &k) in self.points.chunks(self.d).zip(self.assignment) {
            let sum = &mut sums[k as usize * self.d..][..self.d];
            sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x));
        }
        for (sum, size) in sums.chunks_mut(self.d).zip(self.sizes()) {
            sum.iter_mut().for_each(|s| *s /= size.max(1) as f64);
        }
        sums
    }

    /// The squared distance of each point from the centre of its cluster.
    fn squared_distances(&self, centres: &[f64]) -> Vec<f64> {
        self.points
            .par_chunks(self.d)
            .zip(self.assignment)
            .map(|(row, &k)| {
                let centre = &centres[k as usize * self.d..][..self.d];
                row.iter().zip(centre).map(|(&x, c)| (f64::from(x) - c).powi(2)).sum()
            })
            .collect()
    }
}

/// How much nearer points lie to their own cluster than to the next: Rousseeuw 1987.
///
/// The mean of `(b − a) / max(a, b)`, with `a` the mean distance to the other points of the own
/// cluster and `b` the smallest mean distance to those of another; 0 for a cluster's only point.
/// In `[−1, 1]`, higher is better.
///
/// With more points than `sample`, that many are drawn by `seed` and the rest is not looked at, as
/// the cost grows with the square.
///
/// # Errors
///
/// The sample holds points of fewer than two clusters.
pub fn silhouette(grouped: &Grouped, sample: usize, seed: u64) -> Result<f64> {
    let mut random = stage::random::stream(seed, "silhouette", &[]);
    let drawn = assignment::sample(grouped.assignment.len(), sample, &mut random);
    let mut sizes = vec![0usize; grouped.clusters];
    drawn.iter().for_each(|&i| sizes[grouped.assignment[i] as usize] += 1);
    let filled = sizes.iter().filter(|&&size| size > 0).count();
    ensure!(
        filled >= 2,
        "silhouette: {} sampled points are of {filled} cluster; sample more points",
        drawn.len()
    );
    let clusters: Vec<u32> = drawn.iter().map(|&i| grouped.assignment[i]).collect();
    let row = |i: usize| grouped.row(drawn[i]);
    Ok(mean_silhouette(&clusters, &sizes, |i, j| distance(row(i), row(j))))
}

/// The mean over points of how much nearer they lie to their own cluster than to the next.
///
/// - `clusters`: of each point, `(N,)`; `sizes`: points of each cluster.
fn mean_silhouette(
    clusters: &[u32],
    sizes: &[usize],
    distance: impl Fn(usize, usize) -> f64 + Sync,
) -> f64 {
    let values: Vec<f64> = (0..clusters.len())
        .into_par_iter()
        .map(|i| point_silhouette(i, clusters, sizes, &distance))
        .collect();
    values.iter().sum::<f64>() / values.len() as f64
}

fn point_silhouette(
    i: usize,
    clusters: &[u32],
    sizes: &[usize],
    distance: impl Fn(usize, usize) -> f64,
) -> f64 {
    let own = clusters[i] as usize;
    if sizes[own] == 1 {
        return 0.;
    }
    let mut distances = vec![0f64; sizes.len()];
    for (j, &k) in clusters.iter().enumerate() {
        distances[k as usize] += distance(i, j);
    }
    let within = distances[own] / (sizes[own] - 1) as f64;
    let between = (distances.iter().zip(sizes).enumerate())
        .filter(|&(k, (_, &size))| k != own && size > 0)
        .map(|(_, (sum, &size))| sum / size as f64)
        .fold(f64::INFINITY, f64::min);
    let larger = within.max(between);
    if larger == 0. { 0. } else { (between - within) / larger }
}

/// The distances between points, kept: for the silhouettes of many groupings of the same points.
#[derive(Debug, Clone)]
pub struct Distances {
    /// `(N, N)`.
    values: Vec<f32>,
    n: usize,
}

impl Distances {
    /// Between all rows of `points` `(N, d)`.
    pub fn new(points: &[f32], d: usize) -> Self {
        let n = points.len() / d;
        let mut values = vec![0f32; n * n];
        values.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, values)| {
            for (value, row) in values.iter_mut().zip(points.chunks(d)) {
                *value = distance(&points[i * d..][..d], row) as f32;
            }
        });
        Self { values, n }
    }

    /// [`silhouette`] of a grouping of all points; 0 where only one cluster has points.
    pub fn silhouette(&self, assignment: &[u32], clusters: usize) -> f64 {
        let mut sizes = vec![0usize; clusters];
        assignment.iter().for_each(|&k| sizes[k as usize] += 1);
        if sizes.iter().filter(|&&size| size > 0).count() < 2 {
            return 0.;
        }
        mean_silhouette(assignment, &sizes, |i, j| f64::from(self.values[i * self.n + j]))
    }
}

fn distance(x: &[f32], y: &[f32]) -> f64 {
    let squares = x.iter().zip(y).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2));
    squares.sum::<f64>().sqrt()
}

/// How alike each cluster is to the one most like it: Davies and Bouldin 1979.
///
/// The mean over clusters of `max_l (s_k + s_l) / ‖c_k − c_l‖`, with `s` the mean distance of a
/// cluster's points from its centre `c`. From 0, lower is better; a pair with one centre counts 0.
pub fn davies_bouldin(grouped: &Grouped) -> f64 {
    let (centres, sizes) = (grouped.centres(), grouped.sizes());
    let mut spread = vec![0f64; sizes.len()];
    for (square, &k) in grouped.squared_distances(&centres).iter().zip(grouped.assignment) {
        spread[k as usize] += square.sqrt() / sizes[k as usize] as f64;
    }
    let centre = |k: usize| &centres[k * grouped.d..][..grouped.d];
    let filled: Vec<usize> = (0..sizes.len()).filter(|&k| sizes[k] > 0).collect();
    let likeness = |k: usize, l: usize| {
        let between: f64 = centre(k).iter().zip(centre(l)).map(|(x, y)| (x - y).powi(2)).sum();
        if between == 0. { 0. } else { (spread[k] + spread[l]) / between.sqrt() }
    };
    let worst: Vec<f64> = filled
        .par_iter()
        .map(|&k| filled.iter().filter(|&&l| l != k).map(|&l| likeness(k, l)).fold(0., f64::max))
        .collect();
    worst.iter().sum::<f64>() / filled.len() as f64
}

/// Variance between clusters over variance within: Caliński and Harabasz 1974.
///
/// `(B / (K − 1)) / (W / (N − K))` with `B = Σ_k n_k ‖c_k − c‖²`, `W` the inertia and `K` the
/// clusters with points. From 0, higher is better; 1 if nothing varies within.
pub fn calinski_harabasz(grouped: &Grouped) -> f64 {
    let (centres, sizes) = (grouped.centres(), grouped.sizes());
    let (n, d) = (grouped.assignment.len(), grouped.d);
    let mut mean = vec![0f64; d];
    for (centre, &size) in centres.chunks(d).zip(&sizes) {
        mean.iter_mut().zip(centre).for_each(|(m, c)| *m += c * size as f64 / n as f64);
    }
    let between: f64 = (centres.chunks(d).zip(&sizes))
        .map(|(centre, &size)| {
            let square: f64 = centre.iter().zip(&mean).map(|(c, m)| (c - m).powi(2)).sum();
            size as f64 * square
        })
        .sum();
    let within: f64 = grouped.squared_distances(&centres).iter().sum();
    let filled = sizes.iter().filter(|&&size| size > 0).count();
    if within == 0. {
        return 1.;
    }
    between * (n - filled) as f64 / (within * (filled - 1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_agree_with_scikit_learn() -> Result<()> {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../tests/geometry.json"))?;
        for (i, case) in fixture["cases"].as_array().expect("cases").iter().enumerate() {
            let number = |key: &str| case[key].as_u64().expect("a number") as usize;
            let points: Vec<f32> = serde_json::from_value(case["points"].clone())?;
            let assignment: Vec<u32> = serde_json::from_value(case["assignment"].clone())?;
            let grouped = Grouped::new(&points, number("d"), &assignment, number("k"))?;
            for (name, got) in [
                ("silhouette", silhouette(&grouped, usize::MAX, 0)?),
                ("davies-bouldin", davies_bouldin(&grouped)),
                ("calinski-harabasz", calinski_harabasz(&grouped)),
            ] {
                let want = case[name].as_f64().expect("a score");
                assert!(
                    (got - want).abs() < 1e-9 * want.abs().max(1.),
                    "case {i}, {name}: got {got}, want {want}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn a_sample_says_about_what_all_points_say() -> Result<()> {
        let points: Vec<f32> =
            (0..400).map(|i| (i % 4) as f32 * 10. + (i / 4) as f32 * 0.01).collect();
        let assignment: Vec<u32> = (0..400).map(|i| i % 4).collect();
        let grouped = Grouped::new(&points, 1, &assignment, 4)?;
        let (all, some) = (silhouette(&grouped, 400, 0)?, silhouette(&grouped, 80, 0)?);
        assert!((all - some).abs() < 0.02 && all > 0.9, "{all} {some}");
        assert_eq!(some, silhouette(&grouped, 80, 0)?);
        assert_ne!(some, silhouette(&grouped, 80, 1)?);
        let kept = Distances::new(&points, 1).silhouette(&assignment, 4);
        assert!((all - kept).abs() < 1e-6, "{all} {kept}");
        assert_eq!(Distances::new(&points, 1).silhouette(&[2; 400], 4), 0.);
        Ok(())
    }

    #[test]
    fn empty_clusters_change_nothing_and_bad_input_is_refused() -> Result<()> {
        let points = [0f32, 1., 5., 7.];
        let (tight, loose) = (
            Grouped::new(&points, 1, &[0, 0, 1, 1], 2)?,
            Grouped::new(&points, 1, &[0, 0, 3, 3], 5)?,
        );
        assert_eq!(davies_bouldin(&tight), davies_bouldin(&loose));
        assert_eq!(calinski_harabasz(&tight), calinski_harabasz(&loose));
        assert_eq!(silhouette(&tight, 9, 0)?, silhouette(&loose, 9, 0)?);
        let refused = |points: &[f32], assignment: &[u32]| {
            Grouped::new(points, 1, assignment, 2).expect_err("refused").to_string()
        };
        assert!(refused(&points, &[0, 0, 0, 0]).contains("1 of 2"));
        assert!(refused(&points, &[0, 0, 0, 2]).contains("point 3"));
        assert!(refused(&[0., f32::NAN], &[0, 1]).contains("point 1"));
        assert!(refused(&points, &[0, 1]).contains("2 assignments"));
        Ok(())
    }
}
