//! The loss of a clustering network: agreement between neighbours, and use of all clusters.
//!
//! Memberships are `(B, K)` for `B` images and `K` clusters: rows of a softmax.

use candle_core::{D, Result, Tensor, bail};

/// The smallest product of two memberships whose logarithm is taken, so that two outputs
/// without a common cluster give a large loss and not an infinite one.
pub const FLOOR: f64 = 1e-8;

/// How little two images that should be in one cluster agree.
///
/// `L_con = −1/B Σᵢ ln max(pᵢ·p̃ᵢ, 10⁻⁸)`: Van Gansbeke et al. 2020 (SCAN), Eq. 2, first term.
///
/// - `anchor`: memberships `p` of one view of each image, `(B, K)`.
/// - `neighbour`: memberships `p̃` of a view of a neighbour of each image, or of itself, `(B, K)`.
///
/// The gradient reaches both. Returns a scalar in `[0, 18.43]` nats: 0 when every pair is in one
/// cluster for certain.
///
/// # Errors
///
/// The shapes differ, or are not those of matrices.
pub fn consistency(anchor: &Tensor, neighbour: &Tensor) -> Result<Tensor> {
    anchor.dims2()?;
    if anchor.dims() != neighbour.dims() {
        bail!("consistency: anchors are {:?} but neighbours {:?}", anchor.dims(), neighbour.dims())
    }
    let products = (anchor * neighbour)?.sum(D::Minus1)?;
    products.maximum(FLOOR)?.log()?.mean_all()?.neg()
}

/// Entropy of the clusters' shares in a batch: high when all clusters are used alike.
///
/// `H = −Σₖ p̄ₖ ln max(p̄ₖ, 10⁻⁸)` with `p̄ = 1/B Σᵢ pᵢ`: Van Gansbeke et al. 2020, Eq. 2, second term.
///
/// - `memberships`: `p`, `(B, K)`.
///
/// Returns a scalar in `[0, ln K]` nats: 0 when all images lie in one cluster.
///
/// # Errors
///
/// `memberships` is not a matrix.
pub fn entropy(memberships: &Tensor) -> Result<Tensor> {
    memberships.dims2()?;
    let shares = memberships.mean(0)?;
    (&shares * shares.maximum(FLOOR)?.log()?)?.sum_all()?.neg()
}

/// The loss of a clustering network: `L₂ = L_con − λ H`, see [`consistency`] and [`entropy`].
///
/// - `anchor`, `neighbour`: memberships as in [`consistency`]; the entropy is the anchors'.
/// - `entropy_weight`: λ.
///
/// Returns a scalar: `−λ ln K` at best, `(1 − λ) ln K` for uniform memberships, 0 for one cluster.
///
/// # Errors
///
/// As [`consistency`].
pub fn clustering_loss(anchor: &Tensor, neighbour: &Tensor, entropy_weight: f64) -> Result<Tensor> {
    consistency(anchor, neighbour)? - (entropy(anchor)? * entropy_weight)?
}

/// [`clustering_loss`] on given memberships, its expectation over the draw of the
/// neighbour: the measure by which one network is kept. No label enters it.
///
/// `1/N Σᵢ 1/(m+1) Σ_{j ∈ NN(i) ∪ {i}} −ln max(pᵢ·pⱼ, 10⁻⁸) − λ H` with the entropy over all `N`.
///
/// - `memberships`: `p` on un-augmented images, `N × K`, row by row.
/// - `neighbours`: `N × m` rows, row by row; `m` may be 0.
///
/// # Panics
///
/// A neighbour is not below `N`.
pub fn expected_clustering_loss(
    memberships: &[f32],
    clusters: usize,
    neighbours: &[u32],
    entropy_weight: f64,
) -> f64 {
    let rows: Vec<&[f32]> = memberships.chunks_exact(clusters).collect();
    let each = neighbours.len() / rows.len();
    let product = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let mut disagreement = 0.0;
    let mut shares = vec![0.0; clusters];
    for (i, row) in rows.iter().enumerate() {
        let with_itself = -product(row, row).max(FLOOR).ln();
        let with_neighbours: f64 = neighbours[i * each..(i + 1) * each]
            .iter()
            .map(|&j| -product(row, rows[j as usize]).max(FLOOR).ln())
            .sum();
        disagreement += (with_itself + with_neighbours) / (each + 1) as f64;
        for (share, &p) in shares.iter_mut().zip(*row) {
            *share += f64::from(p);
        }
    }
    let n = rows.len() as f64;
    let entropy: f64 = shares.iter().map(|s| s / n).map(|p| -p * p.max(FLOOR).ln()).sum();
    disagreement / n - entropy_weight * entropy
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device::Cpu, IndexOp, Var};
    use candle_nn::ops::softmax;

    use super::*;

    fn matrix(rows: &[[f64; 2]]) -> Tensor {
        let flat: Vec<f64> = rows.iter().flatten().copied().collect();
        Tensor::from_vec(flat, (rows.len(), 2), &Cpu).expect("rows of two")
    }

    fn scalar(values: &Tensor) -> f64 {
        values.to_scalar().expect("a scalar")
    }

    #[test]
    fn values_match_hand_computation() -> Result<()> {
        let anchor = matrix(&[[0.8, 0.2], [0.3, 0.7]]);
        let neighbour = matrix(&[[0.9, 0.1], [0.2, 0.8]]);
        // Products .74 and .62; shares (.55, .45).
        let close = |got: Tensor, want: f64| assert!((scalar(&got) - want).abs() < 1e-6, "{got}");
        close(consistency(&anchor, &neighbour)?, 0.389570);
        close(entropy(&anchor)?, 0.688139);
        close(clustering_loss(&anchor, &neighbour, 5.0)?, -3.051124);
        close(clustering_loss(&anchor, &neighbour, 2.0)?, -0.986707);
        Ok(())
    }

    #[test]
    fn the_best_the_uniform_and_the_collapsed_output_have_their_known_values() -> Result<()> {
        for (k, best, uniform) in [
            (10, -11.512925, -9.210340),
            (15, -13.540251, -10.832201),
            (20, -14.978661, -11.982929),
        ] {
            let outputs = [
                (Tensor::eye(k, DType::F64, &Cpu)?, best),
                (Tensor::full(1.0 / k as f64, (k, k), &Cpu)?, uniform),
                (Tensor::eye(k, DType::F64, &Cpu)?.i(0)?.repeat((k, 1))?, 0.0),
            ];
            for (p, want) in outputs {
                let got = scalar(&clustering_loss(&p, &p, 5.0)?);
                assert!((got - want).abs() < 1e-5, "K = {k}: got {got}, want {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn no_common_cluster_is_a_large_loss_with_finite_gradients() -> Result<()> {
        let anchor = Var::from_tensor(&matrix(&[[1.0, 0.0]]))?;
        let loss = consistency(&anchor, &matrix(&[[0.0, 1.0]]))?;
        assert!((scalar(&loss) - 18.420681).abs() < 1e-5);
        let gradients = loss.backward()?;
        let gradient = gradients.get(&anchor).expect("a gradient").flatten_all()?;
        assert!(gradient.to_vec1::<f64>()?.iter().all(|g| g.is_finite()));
        Ok(())
    }

    /// Compares the gradient of `loss` at logits `at` with central differences.
    fn check_gradient(at: &[f64], loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let shape = (at.len() / 3, 3);
        let value =
            |x: &[f64]| -> Result<f64> { Ok(scalar(&loss(&Tensor::from_slice(x, shape, &Cpu)?)?)) };
        let logits = Var::from_tensor(&Tensor::from_slice(at, shape, &Cpu)?)?;
        let gradients = loss(&logits)?.backward()?;
        let analytic = gradients.get(&logits).expect("a gradient").flatten_all()?;
        for (i, got) in analytic.to_vec1::<f64>()?.into_iter().enumerate() {
            let (mut up, mut down) = (at.to_vec(), at.to_vec());
            up[i] += 1e-5;
            down[i] -= 1e-5;
            let want = (value(&up)? - value(&down)?) / 2e-5;
            assert!((got - want).abs() < 1e-8, "d/dx[{i}]: got {got}, want {want}");
        }
        Ok(())
    }

    const LOGITS: [f64; 12] = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4, 0.0, 0.9, 0.2, -0.7, 0.4, 1.1];

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        // The second half of the rows are the neighbours of the first, so both sides are moved.
        check_gradient(&LOGITS, |x| {
            let p = softmax(x, 1)?;
            clustering_loss(&p.narrow(0, 0, 2)?, &p.narrow(0, 2, 2)?, 5.0)
        })?;
        check_gradient(&LOGITS, |x| entropy(&softmax(x, 1)?))
    }

    #[test]
    fn the_gradient_reaches_anchor_and_neighbour() -> Result<()> {
        let anchor = Var::from_tensor(&matrix(&[[0.8, 0.2], [0.3, 0.7]]))?;
        let neighbour = Var::from_tensor(&matrix(&[[0.9, 0.1], [0.2, 0.8]]))?;
        let gradients = clustering_loss(&anchor, &neighbour, 5.0)?.backward()?;
        for (side, name) in [(&anchor, "anchor"), (&neighbour, "neighbour")] {
            let gradient = gradients.get(side).expect(name).abs()?.min_all()?;
            assert!(gradient.to_scalar::<f64>()? > 0.0, "no gradient at the {name}");
        }
        Ok(())
    }

    #[test]
    fn the_expected_loss_is_the_mean_over_all_draws() -> Result<()> {
        let p = [[0.8f64, 0.2], [0.3, 0.7], [0.6, 0.4]];
        let neighbours = [1u32, 2, 0];
        let flat: Vec<f32> = p.iter().flatten().map(|&x| x as f32).collect();
        let with = |order: [usize; 3]| {
            scalar(&consistency(&matrix(&p), &matrix(&order.map(|i| p[i]))).expect("a loss"))
        };
        let want = (with([0, 1, 2]) + with([1, 2, 0])) / 2.0 - 5.0 * scalar(&entropy(&matrix(&p))?);
        let got = expected_clustering_loss(&flat, 2, &neighbours, 5.0);
        assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
        // Without neighbours only the agreement with itself is left.
        let alone = expected_clustering_loss(&flat, 2, &[], 0.0);
        assert!((alone - with([0, 1, 2])).abs() < 1e-6);
        Ok(())
    }
}
