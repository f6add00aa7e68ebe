//! The unit-length mean of each cluster.

use anyhow::{Result, ensure};

/// Computes the weighted mean of the rows of each cluster, scaled to unit length:
/// `c_k = n(Σ_{i: y_i=k} w_i x_i / Σ w_i)` with `n(x) = x / ‖x‖`.
///
/// - `points`: `(N, D)` row-major, usually of unit length.
/// - `assignment`: cluster of each point, `(N,)`.
/// - `weights`: `(N,)`, at least 0; a point of weight 0 is ignored.
///
/// Returns `(K, D)`. A cluster without weight has a row of zeros.
///
/// # Errors
///
/// The lengths contradict each other, or a cluster is not below `clusters`.
pub fn prototypes(
    points: &[f32],
    d: usize,
    assignment: &[u32],
    weights: &[f32],
    clusters: usize,
) -> Result<Vec<f32>> {
    let n = assignment.len();
    ensure!(
        d > 0 && points.len() == n * d && weights.len() == n,
        "prototypes: {} numbers in rows of {d} and {} weights for {n} points",
        points.len(),
        weights.len()
    );
    let mut sums = vec![0f64; clusters * d];
    for ((row, &cluster), &weight) in points.chunks_exact(d).zip(assignment).zip(weights) {
        let k = cluster as usize;
        ensure!(k < clusters, "prototypes: a point is in cluster {k}, but there are {clusters}");
        for (sum, &x) in sums[k * d..(k + 1) * d].iter_mut().zip(row) {
            *sum += f64::from(weight) * f64::from(x);
        }
    }
    // Dividing by the sum of the weights would not change the direction.
    Ok(sums
        .chunks_exact(d)
        .flat_map(|sum| {
            let length = sum.iter().map(|s| s * s).sum::<f64>().sqrt().max(1e-12);
            sum.iter().map(move |s| (s / length) as f32)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prototype_is_the_direction_of_the_weighted_mean() -> Result<()> {
        let points = [1., 0., 0., 1., 0., 1.];
        let got = prototypes(&points, 2, &[1, 1, 1], &[0.5, 1., 1.], 3)?;
        // The mean of cluster 1 is (.2, .8); clusters 0 and 2 have no member.
        let want = [0., 0., 0.242536, 0.970143, 0., 0.];
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
        }
        // A common factor of the weights changes nothing, and neither does a point of weight 0.
        assert_eq!(got, prototypes(&points, 2, &[1, 1, 1], &[1., 2., 2.], 3)?);
        assert_eq!(prototypes(&points, 2, &[0, 1, 1], &[1., 1., 0.], 2)?, [1., 0., 0., 1.]);
        Ok(())
    }

    #[test]
    fn contradicting_lengths_are_refused() {
        assert!(prototypes(&[1., 0.], 2, &[0, 0], &[1., 1.], 1).is_err());
        assert!(prototypes(&[1., 0.], 2, &[1], &[1.], 1).is_err());
        assert!(prototypes(&[1., 0.], 2, &[0], &[], 1).is_err());
    }
}
