//! Sinkhorn-Knopp: soft assignments with clusters of equal mass.

use anyhow::{Result, bail, ensure};

/// Computes soft assignments `(N, K)` from `scores` `(N, K)`: Caron et al. 2020 (arXiv:2006.09882),
/// section 3.
///
/// `Q = exp(scores / epsilon)`; then `rounds` times: each cluster is scaled to mass `1/K`, then each
/// point to mass `1/N`. Finally every row is scaled to sum to 1. The masses of the clusters become
/// equal only in the limit of many rounds.
///
/// The largest of all scores is subtracted before the exponential, which only avoids overflow.
/// (Subtracting the largest of each row would change the result of a few rounds.) A point whose
/// scores are all more than `600 epsilon` below the largest is raised to that level, so that its
/// values do not all underflow; its mass in the first sums is negligible either way.
///
/// # Errors
///
/// `scores` is not an `(n, k)` matrix of finite numbers, or `epsilon` is not above 0.
pub fn sinkhorn(
    scores: &[f64],
    n: usize,
    k: usize,
    epsilon: f64,
    rounds: usize,
) -> Result<Vec<f64>> {
    ensure!(
        k > 0 && n.checked_mul(k) == Some(scores.len()),
        "sinkhorn: {n} points with {k} scores each need {n}·{k} numbers, but there are {}",
        scores.len()
    );
    if let Some(i) = scores.iter().position(|score| !score.is_finite()) {
        bail!(
            "sinkhorn: row {} holds {} in column {}; all numbers must be finite: look at what \
             computed this row",
            i / k,
            scores[i],
            i % k
        );
    }
    ensure!(
        epsilon > 0. && epsilon.is_finite(),
        "sinkhorn: epsilon is {epsilon}; it must be above 0"
    );
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut mass = Vec::with_capacity(n * k);
    for row in scores.chunks(k) {
        let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let top = largest.min(highest + 600. * epsilon);
        mass.extend(row.iter().map(|&s| ((s - top) / epsilon).exp()));
    }
    for _ in 0..rounds {
        let mut clusters = vec![0f64; k];
        for row in mass.chunks(k) {
            clusters.iter_mut().zip(row).for_each(|(sum, q)| *sum += q);
        }
        for row in mass.chunks_mut(k) {
            row.iter_mut()
                .zip(&clusters)
                .for_each(|(q, sum)| *q /= sum.max(f64::MIN_POSITIVE) * k as f64);
            scale(row, 1. / n as f64);
        }
    }
    mass.chunks_mut(k).for_each(|row| scale(row, 1.));
    Ok(mass)
}

/// Scales `row` to sum to `target`.
fn scale(row: &mut [f64], target: f64) {
    let factor = target / row.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    row.iter_mut().for_each(|q| *q *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: [f64; 8] = [2., 0., 1., 0., 1., 0.5, 0., 0.2];

    fn first_column(rounds: usize) -> Vec<f64> {
        let q = sinkhorn(&SCORES, 4, 2, 1., rounds).expect("valid");
        for row in q.chunks(2) {
            assert!((row[0] + row[1] - 1.).abs() < 1e-12);
        }
        q.iter().step_by(2).copied().collect()
    }

    #[test]
    fn three_rounds_match_the_worked_example() {
        let want = [0.765_136, 0.545_138, 0.420_930, 0.265_231];
        let got = first_column(3);
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        assert!((got.iter().sum::<f64>() - 1.996_435).abs() < 1e-6);
    }

    #[test]
    fn many_rounds_balance_the_clusters() {
        let want = [0.765_874, 0.546_158, 0.421_934, 0.266_034];
        let got = first_column(200);
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        assert!((got.iter().sum::<f64>() - 2.).abs() < 1e-6);
    }

    #[test]
    fn extreme_scores_stay_finite() {
        let scores = [1000., 0., -1000., -2000., 500., 500.];
        let q = sinkhorn(&scores, 3, 2, 0.05, 3).expect("valid");
        for row in q.chunks(2) {
            assert!((row[0] + row[1] - 1.).abs() < 1e-12, "{q:?}");
        }
        // Only the undecided point can go to the second cluster.
        for (q, want) in q.iter().zip([1., 0., 1., 0., 0., 1.]) {
            assert!((q - want).abs() < 1e-9, "{q} {want}");
        }
        assert!(sinkhorn(&scores, 3, 2, 0., 3).is_err());
        assert!(sinkhorn(&scores, 2, 2, 1., 3).is_err());
        let error = sinkhorn(&[0., 1., f64::NAN, 1.], 2, 2, 1., 3).expect_err("not a number");
        assert!(error.to_string().contains("row 1 holds NaN in column 0"), "{error}");
    }
}
