//! The two losses: views and neighbours alike, and reliable images in the cluster of their
//! pseudo-label.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_nn::ops::log_softmax;
use training::ops::unit_rows;

/// The mixture that a prediction is drawn to: `tᵢ = (1 − wᵢ) n(z'ᵢ) + wᵢ mᵢ`, with `n(x) = x / ‖x‖`.
///
/// Its length is below 1 where the neighbours disagree with the view, which weakens a doubtful pull. It is
/// not scaled to unit length, or an image with opposed neighbours would be drawn in a random direction
/// with full strength.
///
/// - `projection`: output `z'` of the target projector for the other view, `(N, P)`. A constant.
/// - `neighbours`: mean `m` of the unit-length projections of each image's neighbours, `(N, P)`. A constant;
///   zeros where the weight is 0.
/// - `weights`: `w`, `(N, 1)`, in `[0, 1]`. With 0 a row is that of BYOL.
///
/// Returns `(N, P)`.
///
/// # Errors
///
/// The shapes do not fit.
pub fn mixture(
    projection: &Tensor,
    neighbours: &Tensor,
    weights: &Tensor,
) -> candle_core::Result<Tensor> {
    let own = unit_rows(&projection.detach())?.broadcast_mul(&weights.affine(-1., 1.)?)?;
    own + neighbours.detach().broadcast_mul(weights)?
}

/// Regression to a mixture of unit vectors: `L = 1/N Σᵢ (2 − 2 n(gᵢ)·tᵢ)`.
///
/// It equals the mixture of the regression losses of BYOL for each part of `t`, with the same weights.
///
/// - `prediction`: output `g` of the online predictor, `(N, P)`.
/// - `mixture`: `t`, from [`mixture`](mixture()), `(N, P)`. A constant: no gradient reaches it.
///
/// Returns a scalar in `[0, 4]`; its lowest value is `2 − 2 ‖t‖`, not 0.
///
/// # Errors
///
/// `prediction` is not a matrix, or `mixture` has another shape.
pub fn mixture_loss(prediction: &Tensor, mixture: &Tensor) -> candle_core::Result<Tensor> {
    let (n, width) = prediction.dims2()?;
    if mixture.dims() != [n, width] {
        candle_core::bail!(
            "mixture_loss: prediction is ({n}, {width}) but the mixture is {:?}",
            mixture.dims()
        )
    }
    let cosine = (unit_rows(prediction)? * mixture.detach())?.sum(1)?;
    cosine.affine(-2., 2.)?.mean_all()
}

/// Cross-entropy to the pseudo-labels of the reliable images: the mean over the clusters that have
/// one in the batch, of the mean over their images.
///
/// `L = 1/|P| Σₖ 1/nₖ Σᵢ CE_ε(xᵢ, k)` with `CE_ε(x, k) = −(1 − ε) log pₖ − ε/K Σⱼ log pⱼ` and
/// `p = softmax(x)`. Without smoothing it is the class-weighted form of SCAN's self-labelling (Van
/// Gansbeke et al. 2020, arXiv:2005.12320): weights `1 / nₖ`, divided by their sum.
///
/// - `logits`: of the clustering network, `(N, K)`.
/// - `pseudo_labels`: cluster of each image, below `K`; `None` where it is not reliable.
/// - `smoothing`: ε, in `[0, 1]`.
///
/// Returns a scalar, in nats; `None` without a reliable image, so that nothing enters the graph.
///
/// # Errors
///
/// The numbers of images differ, or a cluster is not below `K`.
pub fn balanced_cross_entropy(
    logits: &Tensor,
    pseudo_labels: &[Option<u32>],
    smoothing: f64,
) -> Result<Option<Tensor>> {
    let (n, clusters) = logits.dims2()?;
    ensure!(
        pseudo_labels.len() == n
            && pseudo_labels.iter().flatten().all(|&k| (k as usize) < clusters),
        "balanced_cross_entropy: {} pseudo-labels for logits ({n}, {clusters}); each must be below \
         {clusters}",
        pseudo_labels.len()
    );
    let mut sizes = vec![0usize; clusters];
    pseudo_labels.iter().flatten().for_each(|&k| sizes[k as usize] += 1);
    let present = sizes.iter().filter(|&&size| size > 0).count();
    if present == 0 {
        return Ok(None);
    }
    let mut weights = vec![0f64; n * clusters];
    for (row, label) in weights.chunks_exact_mut(clusters).zip(pseudo_labels) {
        let Some(label) = label.map(|label| label as usize) else { continue };
        let weight = 1. / (present * sizes[label]) as f64;
        row.fill(weight * smoothing / clusters as f64);
        row[label] += weight * (1. - smoothing);
    }
    let weights = Tensor::from_vec(weights, (n, clusters), &Device::Cpu)?
        .to_dtype(logits.dtype())?
        .to_device(logits.device())?;
    Ok(Some((log_softmax(logits, 1)? * weights)?.sum_all()?.neg()?))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};
    use training::loss::regression_loss;

    use super::*;

    /// The loss of refinement, case 5, and its gradient: one image with `g = (3, 4)` and `z' = (1, 0)`.
    fn drawn(neighbours: [f64; 2], weight: f64) -> Result<(f64, Vec<f64>)> {
        let prediction = Var::new(&[[3f64, 4.]], &Cpu)?;
        let target = mixture(
            &Tensor::new(&[[1f64, 0.]], &Cpu)?,
            &Tensor::new(&[neighbours], &Cpu)?,
            &Tensor::new(&[[weight]], &Cpu)?,
        )?;
        let loss = mixture_loss(&prediction, &target)?;
        let gradients = loss.backward()?;
        let gradient = gradients.get(&prediction).expect("a gradient").to_vec2::<f64>()?;
        Ok((loss.to_scalar()?, gradient.concat()))
    }

    /// Refinement, case 5.
    #[test]
    fn neighbours_are_mixed_into_what_an_image_is_drawn_to() -> Result<()> {
        for (neighbours, weight, loss, gradient) in [
            ([0., 0.], 0., 0.8, [-0.256, 0.192]),
            ([0., 1.], 0.5, 0.6, [-0.032, 0.024]),
            ([0.3, 0.9], 0.5, 0.5, [-0.08, 0.06]),
        ] {
            let (got, at) = drawn(neighbours, weight)?;
            assert!((got - loss).abs() < 1e-12, "{neighbours:?}: got {got}, want {loss}");
            for (got, want) in at.iter().zip(gradient) {
                assert!((got - want).abs() < 1e-12, "{neighbours:?}: got {at:?}");
            }
            assert!((3. * at[0] + 4. * at[1]).abs() < 1e-12, "orthogonal to the prediction");
        }
        let two = mixture(
            &Tensor::new(&[[1f64, 0.]], &Cpu)?,
            &Tensor::new(&[[0.3f64, 0.9]], &Cpu)?,
            &Tensor::new(&[[0.5f64]], &Cpu)?,
        )?;
        let two = two.to_vec2::<f64>()?.concat();
        assert!((two[0] - 0.65).abs() < 1e-12 && (two[1] - 0.45).abs() < 1e-12, "not of length 1");
        Ok(())
    }

    const PREDICTION: [[f32; 3]; 4] =
        [[0.3, -1.2, 0.7], [2., 0.1, -0.4], [0.5, 0.2, 0.1], [-1., 0.3, 2.]];
    const PROJECTION: [[f32; 3]; 4] =
        [[1., 0.5, -0.3], [-0.2, 0.9, 0.6], [0.1, 0.4, 0.3], [0., 0.2, -5.]];

    /// Refinement, case 5, at the end, and case 15.
    #[test]
    fn without_neighbours_it_is_the_loss_of_byol_to_the_bit() -> Result<()> {
        let projection = Tensor::new(&PROJECTION, &Cpu)?;
        let none = Tensor::zeros((4, 3), candle_core::DType::F32, &Cpu)?;
        let weights = none.narrow(1, 0, 1)?.contiguous()?;
        let of = |loss: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| -> Result<Vec<f32>> {
            let prediction = Var::new(&PREDICTION, &Cpu)?;
            let loss = loss(&prediction)?;
            let mut all = vec![loss.to_scalar::<f32>()?];
            let gradients = loss.backward()?;
            all.extend(gradients.get(&prediction).expect("one").to_vec2::<f32>()?.concat());
            Ok(all)
        };
        let byol = of(&|prediction| regression_loss(prediction, &projection))?;
        let mixed =
            of(&|prediction| mixture_loss(prediction, &mixture(&projection, &none, &weights)?))?;
        assert_eq!(mixed, byol);
        Ok(())
    }

    /// Refinement, case 15.
    #[test]
    fn lengths_and_the_order_of_rows_change_no_loss() -> Result<()> {
        let prediction = Tensor::new(&PREDICTION, &Cpu)?;
        let projection = Tensor::new(&PROJECTION, &Cpu)?;
        let neighbours = Tensor::new(&PREDICTION, &Cpu)?;
        let weights = Tensor::new(&[[0.5f32], [0.], [0.25], [1.]], &Cpu)?;
        let value = |g: &Tensor, z: &Tensor, m: &Tensor, w: &Tensor| -> Result<f32> {
            Ok(mixture_loss(g, &mixture(z, m, w)?)?.to_scalar()?)
        };
        let want = value(&prediction, &projection, &neighbours, &weights)?;
        let scaled = value(&(&prediction * 7.)?, &(&projection * 0.1)?, &neighbours, &weights)?;
        assert!((scaled - want).abs() < 1e-6, "{scaled} {want}");
        let order = Tensor::new(&[2u32, 0, 3, 1], &Cpu)?;
        let of = |rows: &Tensor| rows.index_select(&order, 0);
        let other = value(&of(&prediction)?, &of(&projection)?, &of(&neighbours)?, &of(&weights)?)?;
        assert!((other - want).abs() < 1e-6, "{other} {want}");

        let (logits, labels) = (Tensor::new(&PREDICTION, &Cpu)?, [Some(0), None, Some(2), Some(0)]);
        let permuted: Vec<_> = [2, 0, 3, 1].iter().map(|&i| labels[i]).collect();
        let cross_entropy = |logits: &Tensor, labels: &[Option<u32>]| -> Result<f32> {
            Ok(balanced_cross_entropy(logits, labels, 0.1)?.expect("reliable ones").to_scalar()?)
        };
        let want = cross_entropy(&logits, &labels)?;
        assert!((cross_entropy(&of(&logits)?, &permuted)? - want).abs() < 1e-6);
        // Clusters renamed 0 → 1, 1 → 2, 2 → 0, columns and labels alike.
        let renamed = logits.index_select(&Tensor::new(&[2u32, 0, 1], &Cpu)?, 1)?;
        let labels = labels.map(|label| label.map(|k: u32| (k + 1) % 3));
        assert!((cross_entropy(&renamed, &labels)? - want).abs() < 1e-6);
        Ok(())
    }

    /// Compares candle's gradient of a scalar with central differences.
    fn assert_gradient(
        at: [[f64; 3]; 4],
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Vec<Vec<f64>>> {
        let value =
            |x: [[f64; 3]; 4]| -> Result<f64> { Ok(loss(&Tensor::new(&x, &Cpu)?)?.to_scalar()?) };
        let x = Var::new(&at, &Cpu)?;
        let gradients = loss(&x)?.backward()?;
        let analytic = gradients.get(&x).expect("a gradient").to_vec2::<f64>()?;
        for (i, row) in analytic.iter().enumerate() {
            for (j, &got) in row.iter().enumerate() {
                let (mut up, mut down) = (at, at);
                up[i][j] += 1e-5;
                down[i][j] -= 1e-5;
                let want = (value(up)? - value(down)?) / 2e-5;
                assert!((got - want).abs() < 1e-8, "d/dx[{i}][{j}]: got {got}, want {want}");
            }
        }
        Ok(analytic)
    }

    const LOGITS: [[f64; 3]; 4] = [[2., 0., 0.], [0., 1., 0.], [1., 0., 0.], [0., 0., 3.]];
    const LABELS: [Option<u32>; 4] = [Some(0), Some(0), None, Some(2)];

    /// Refinement, case 3.
    #[test]
    fn cross_entropy_and_its_gradient_are_those_of_the_specified_case() -> Result<()> {
        for (smoothing, loss, rows) in [
            (
                0.,
                0.495209,
                [
                    [-0.053253, 0.026627, 0.026627],
                    [-0.197015, 0.144029, 0.052985],
                    [0.; 3],
                    [0.022639, 0.022639, -0.045279],
                ],
            ),
            (
                0.1,
                0.620209,
                [
                    [-0.036587, 0.018293, 0.018293],
                    [f64::NAN; 3],
                    [0.; 3],
                    [0.005973, 0.005973, -0.011945],
                ],
            ),
        ] {
            let of = |logits: &Tensor| -> Result<Tensor> {
                Ok(balanced_cross_entropy(logits, &LABELS, smoothing)?.expect("reliable ones"))
            };
            let got = of(&Tensor::new(&LOGITS, &Cpu)?)?.to_scalar::<f64>()?;
            assert!((got - loss).abs() < 1e-6, "got {got}, want {loss}");
            let gradient = assert_gradient(LOGITS, of)?;
            for (got, want) in gradient.concat().iter().zip(rows.concat()) {
                assert!(want.is_nan() || (got - want).abs() < 1e-6, "got {got}, want {want}");
            }
        }
        let one = balanced_cross_entropy(&Tensor::new(&LOGITS, &Cpu)?, &[Some(0); 4], 0.)?;
        let one = one.expect("reliable ones").to_scalar::<f64>()?;
        assert!((one - 1.359339).abs() < 1e-6, "got {one}");
        Ok(())
    }

    #[test]
    fn without_reliable_images_there_is_no_cross_entropy_and_foreign_labels_are_refused()
    -> Result<()> {
        let logits = Tensor::new(&LOGITS, &Cpu)?;
        assert!(balanced_cross_entropy(&logits, &[None; 4], 0.1)?.is_none());
        assert!(balanced_cross_entropy(&logits, &[None; 3], 0.1).is_err());
        assert!(balanced_cross_entropy(&logits, &[Some(3), None, None, None], 0.1).is_err());
        let large = Tensor::new(&[[1e4f32, -1e4, 0.]], &Cpu)?;
        let loss = balanced_cross_entropy(&large, &[Some(1)], 0.1)?.expect("one");
        assert!(loss.to_scalar::<f32>()?.is_finite());
        assert!(mixture_loss(&logits, &logits.narrow(0, 0, 1)?).is_err());
        Ok(())
    }

    #[test]
    fn the_gradient_of_the_mixture_loss_matches_central_differences() -> Result<()> {
        let at = [[0.3, -1.2, 0.7], [2., 0.1, -0.4], [0.5, 0.2, 0.1], [-1., 0.3, 2.]];
        let target = mixture(
            &Tensor::new(&LOGITS, &Cpu)?,
            &Tensor::new(&at, &Cpu)?,
            &Tensor::new(&[[0.5f64], [0.], [0.25], [1.]], &Cpu)?,
        )?;
        assert_gradient(at, |x| Ok(mixture_loss(x, &target)?))?;
        Ok(())
    }

    #[test]
    fn what_an_image_is_drawn_to_receives_no_gradient() -> Result<()> {
        let [prediction, projection, neighbours, weights] = [
            Var::new(&PREDICTION, &Cpu)?,
            Var::new(&PROJECTION, &Cpu)?,
            Var::new(&PREDICTION, &Cpu)?,
            Var::new(&[[0.5f32], [0.], [0.25], [1.]], &Cpu)?,
        ];
        let target = mixture(&projection, &neighbours, &weights)?;
        let gradients = mixture_loss(&prediction, &target)?.backward()?;
        assert!(gradients.get(&prediction).is_some());
        for constant in [&projection, &neighbours, &weights] {
            assert!(gradients.get(constant).is_none());
        }
        Ok(())
    }
}
