//! The loss that pretraining and refinement share. Losses of one method live in its stage.

use candle_core::{Result, Tensor, bail};

use crate::ops::unit_rows;

/// Mean squared distance between unit-length online predictions and target projections.
///
/// `L = 1/N Σₙ ‖p̄ₙ − z̄ₙ‖² = 1/N Σₙ (2 − 2 cos(pₙ, zₙ))`: Grill et al. 2020, Eq. 2
/// (arXiv:2006.07733), for one order of the two views. The caller takes the mean of both orders.
///
/// - `prediction`: output of the online predictor, `(N, D)`.
/// - `projection`: output of the target projector, `(N, D)`. A constant: no gradient reaches it.
///
/// Returns a scalar in `[0, 4]`, without unit: 0 for equal directions, 2 for orthogonal ones.
///
/// # Errors
///
/// `prediction` is not a matrix, or `projection` has another shape.
pub fn regression_loss(prediction: &Tensor, projection: &Tensor) -> Result<Tensor> {
    let (n, d) = prediction.dims2()?;
    if projection.dims() != [n, d] {
        bail!("regression_loss: prediction is ({n}, {d}) but projection is {:?}", projection.dims())
    }
    let cosine = (unit_rows(prediction)? * unit_rows(&projection.detach())?)?.sum(1)?;
    cosine.affine(-2., 2.)?.mean_all()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};

    use super::*;

    #[test]
    fn value_matches_hand_computation() -> Result<()> {
        let prediction = Tensor::new(&[[3f64, 4.], [1., 0.]], &Cpu)?;
        let projection = Tensor::new(&[[4f64, 3.], [0., 2.]], &Cpu)?;
        // Row 1: cos = (3·4 + 4·3) / (5·5) = 0.96, so 0.08. Row 2: orthogonal, so 2.
        let loss = regression_loss(&prediction, &projection)?.to_scalar::<f64>()?;
        assert!((loss - 1.04).abs() < 1e-9, "got {loss}");
        Ok(())
    }

    /// ProPos, case 1.
    #[test]
    fn value_is_that_of_the_specified_case_and_blind_to_length() -> Result<()> {
        // Cosines 0.6 and 0: (0.8 + 2) / 2.
        let projection = Tensor::new(&[[1f64, 0.], [0., 2.]], &Cpu)?;
        for (rows, scale) in [
            ([[3f64, 4.], [1., 0.]], 1.),
            ([[0.3, 0.4], [70., 0.]], 1.),
            ([[3., 4.], [1., 0.]], 9.),
        ] {
            let prediction = Tensor::new(&rows, &Cpu)?;
            let projection = (&projection * scale)?;
            let loss = regression_loss(&prediction, &projection)?.to_scalar::<f64>()?;
            assert!((loss - 1.4).abs() < 1e-9, "got {loss}");
        }
        assert!(regression_loss(&projection, &projection.narrow(0, 0, 1)?).is_err());
        Ok(())
    }

    #[test]
    fn gradient_matches_central_differences() -> Result<()> {
        let at = [[0.3f64, -1.2, 0.7], [2.0, 0.1, -0.4]];
        let projection = Tensor::new(&[[1.0f64, 0.5, -0.3], [-0.2, 0.9, 0.6]], &Cpu)?;
        let value = |x: [[f64; 3]; 2]| -> Result<f64> {
            regression_loss(&Tensor::new(&x, &Cpu)?, &projection)?.to_scalar()
        };
        let prediction = Var::new(&at, &Cpu)?;
        let gradients = regression_loss(&prediction, &projection)?.backward()?;
        let analytic = gradients.get(&prediction).expect("a gradient").to_vec2::<f64>()?;
        let h = 1e-5;
        for (i, row) in analytic.iter().enumerate() {
            for (j, &got) in row.iter().enumerate() {
                let (mut up, mut down) = (at, at);
                up[i][j] += h;
                down[i][j] -= h;
                let want = (value(up)? - value(down)?) / (2. * h);
                assert!((got - want).abs() < 1e-8, "d/dx[{i}][{j}]: got {got}, want {want}");
            }
        }
        Ok(())
    }

    /// ProPos, case 1, its gradient.
    #[test]
    fn target_receives_no_gradient() -> Result<()> {
        let prediction = Var::new(&[[0.3f64, -1.2], [2.0, 0.1]], &Cpu)?;
        let projection = Var::new(&[[1.0f64, 0.5], [-0.2, 0.9]], &Cpu)?;
        let gradients = regression_loss(&prediction, &projection)?.backward()?;
        assert!(gradients.get(&prediction).is_some());
        assert!(gradients.get(&projection).is_none());
        Ok(())
    }
}
