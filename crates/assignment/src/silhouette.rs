//! The silhouette of a grouping: how compact and how far apart its clusters are, without any truth.
//!
//! It is taken in Euclidean distance. A high silhouette does not prove that the clusters mean
//! anything.

use rayon::prelude::*;

/// The distances between points, for the silhouettes of many groupings of the same points.
#[derive(Debug, Clone)]
pub struct Distances {
    /// `(N, N)`.
    values: Vec<f32>,
    n: usize,
}

impl Distances {
    /// Computes the distances between all rows of `points` `(N, d)`.
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

    /// Computes the silhouette of a grouping of all points: Rousseeuw 1987.
    ///
    /// The mean over points of `(b − a) / max(a, b)`, where `a` is the mean distance to the other
    /// points of the own cluster, and `b` the smallest mean distance to the points of another one; 0
    /// for a cluster's only point. In `[−1, 1]`, higher is better; 0 if only one cluster has points.
    ///
    /// - `assignment`: cluster of each point, `(N,)`, below `clusters`.
    pub fn silhouette(&self, assignment: &[u32], clusters: usize) -> f64 {
        let mut sizes = vec![0usize; clusters];
        assignment.iter().for_each(|&k| sizes[k as usize] += 1);
        if sizes.iter().filter(|&&size| size > 0).count() < 2 {
            return 0.;
        }
        let of_points: Vec<f64> = (assignment.par_iter().zip(self.values.par_chunks(self.n)))
            .map(|(&own, distances)| of_point(own as usize, assignment, &sizes, distances))
            .collect();
        of_points.iter().sum::<f64>() / of_points.len() as f64
    }
}

fn of_point(own: usize, assignment: &[u32], sizes: &[usize], distances: &[f32]) -> f64 {
    if sizes[own] == 1 {
        return 0.;
    }
    let mut sums = vec![0f64; sizes.len()];
    for (&k, &distance) in assignment.iter().zip(distances) {
        sums[k as usize] += f64::from(distance);
    }
    let within = sums[own] / (sizes[own] - 1) as f64;
    let between = (sums.iter().zip(sizes).enumerate())
        .filter(|&(k, (_, &size))| k != own && size > 0)
        .map(|(_, (sum, &size))| sum / size as f64)
        .fold(f64::INFINITY, f64::min);
    let larger = within.max(between);
    if larger == 0. { 0. } else { (between - within) / larger }
}

fn distance(x: &[f32], y: &[f32]) -> f64 {
    let squares = x.iter().zip(y).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2));
    squares.sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silhouettes_agree_with_scikit_learn() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../tests/silhouette.json")).expect("JSON");
        for (i, case) in fixture["cases"].as_array().expect("cases").iter().enumerate() {
            let number = |key: &str| case[key].as_u64().expect("a number") as usize;
            let points: Vec<f32> = serde_json::from_value(case["points"].clone()).expect("f32");
            let assignment: Vec<u32> =
                serde_json::from_value(case["assignment"].clone()).expect("u32");
            let got = Distances::new(&points, number("d")).silhouette(&assignment, number("k"));
            let want = case["silhouette"].as_f64().expect("a score");
            // Distances are kept in f32.
            assert!((got - want).abs() < 1e-7, "case {i}: got {got}, want {want}");
        }
    }

    #[test]
    fn empty_clusters_change_nothing_and_a_single_one_has_no_silhouette() {
        let distances = Distances::new(&[0f32, 1., 5., 7.], 1);
        let tight = distances.silhouette(&[0, 0, 1, 1], 2);
        // Point 0: within 1, between 6; point 1: 1, 5; point 2: 2, 4.5; point 3: 2, 6.5.
        let want = (5. / 6. + 4. / 5. + 2.5 / 4.5 + 4.5 / 6.5) / 4.;
        assert!((tight - want).abs() < 1e-12, "got {tight}, want {want}");
        assert_eq!(tight, distances.silhouette(&[0, 0, 3, 3], 5));
        assert_eq!(distances.silhouette(&[2; 4], 4), 0.);
        // The only point of a cluster counts 0.
        let alone = distances.silhouette(&[0, 0, 0, 1], 2);
        let want = (4. / 7. + 3.5 / 6. + (2. - 4.5) / 4.5) / 4.;
        assert!((alone - want).abs() < 1e-7, "got {alone}, want {want}");
    }
}
