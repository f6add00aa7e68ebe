//! The two losses of a head: one moves the network toward frozen centres, the other the centres
//! toward their images.
//!
//! They share no parameter. The first sees a copy of the centres from the beginning of the epoch
//! and reaches the network alone; the second sees the projections as constants and reaches the
//! centres alone, and of those only the ones that images are assigned to.

use candle_core::{Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::ops::{log_softmax, softmax};

/// How far the centres are from their images: a cross-entropy whose gradient reaches only the centre
/// that an image is assigned to.
///
/// `L_c = −1/B Σᵢ ln softmax(sᵢ/τ)_{yᵢ}` with similarities `s`, of which only `s_{i,yᵢ}` carries
/// gradient (stable cluster discrimination, Qian 2023, arXiv:2311.14310): an image pulls its own
/// centre by `1 − p`, so that hard images count more, and never pushes another. Training by the
/// plain cross-entropy, which has the same value, diverges.
///
/// - `similarity`: `s`, products of unit-length projections, constants, and unit-length centres,
///   `(B, K)`.
/// - `ids`: `y`, cluster of each image, `(B,)` u32.
/// - `temperature`: τ.
///
/// Returns a scalar in nats, at least 0.
///
/// # Errors
///
/// The shapes do not fit, or an id is not below `K`.
pub fn centre_loss(similarity: &Tensor, ids: &Tensor, temperature: f64) -> Result<Tensor> {
    masked_cross_entropy(similarity, &similarity.detach(), ids, temperature)
}

/// The cross-entropy of the entries of `free` at `ids` and of `frozen` elsewhere.
fn masked_cross_entropy(
    free: &Tensor,
    frozen: &Tensor,
    ids: &Tensor,
    temperature: f64,
) -> Result<Tensor> {
    let own = one_hot(ids, free)?;
    let others = own.affine(-1., 1.)?;
    let logits = (((free * own)? + (frozen * others)?)? / temperature)?;
    cross_entropy(&logits, ids)
}

/// How far the images are from their targets among the frozen centres, for both views.
///
/// With logits `L₁`, `L₂` of the views and the targets `q₁ = α e_t + (1 − α) softmax(L₂)`,
/// `q₂ = α e_t + (1 − α) softmax(L₁)`, each a constant made of the assigned cluster and of the
/// prediction for the *other* view: `L_x = −1/(2B) Σᵢ Σₖ [q₁ ln softmax(L₁) + q₂ ln softmax(L₂)]`
/// (Qian 2023, arXiv:2311.14310).
///
/// - `logits`: of view 1 and 2: products with the frozen unit-length centres, divided by the
///   temperature, `(B, K)` each.
/// - `ids`: `t`, `(B,)` u32: the cluster of each image in the epoch before, or in the first epoch
///   its new one.
/// - `assigned_share`: α (τ in the paper), 0.2 is published.
///
/// Returns a scalar in nats, at least the targets' mean entropy.
///
/// # Errors
///
/// The shapes do not fit, or an id is not below `K`.
pub fn representation_loss(
    logits: [&Tensor; 2],
    ids: &Tensor,
    assigned_share: f64,
) -> Result<Tensor> {
    let [logits_1, logits_2] = logits;
    if logits_1.dims() != logits_2.dims() {
        bail!("representation_loss: {:?} and {:?}", logits_1.dims(), logits_2.dims())
    }
    let toward_other = |of: &Tensor, other: &Tensor| -> Result<Tensor> {
        let target = target(other, ids, assigned_share)?;
        (target * log_softmax(of, 1)?)?.sum(1)?.neg()?.mean_all()
    };
    (toward_other(logits_1, logits_2)? + toward_other(logits_2, logits_1)?)? * 0.5
}

/// `α e_t + (1 − α) softmax(L)`, a constant: `(B, K)`.
fn target(other_view: &Tensor, ids: &Tensor, assigned_share: f64) -> Result<Tensor> {
    let predicted = softmax(&other_view.detach(), 1)?;
    (one_hot(ids, other_view)? * assigned_share)? + (predicted * (1. - assigned_share))?
}

/// A 1 at the id of each row, 0 elsewhere, like `(B, K)`.
fn one_hot(ids: &Tensor, like: &Tensor) -> Result<Tensor> {
    let (images, clusters) = like.dims2()?;
    if ids.dims() != [images] {
        bail!("one_hot: {images} rows but ids of shape {:?}", ids.dims())
    }
    let columns = Tensor::arange(0u32, clusters as u32, like.device())?.unsqueeze(0)?;
    ids.unsqueeze(1)?.broadcast_eq(&columns)?.to_dtype(like.dtype())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};
    use training::ops::unit_rows;

    use super::*;

    /// The centres of cases 1 to 3: of lengths 2, ½ and 3.
    const CENTRES: [[f64; 2]; 3] = [[2., 0.], [0., 0.5], [-3., 0.]];

    fn matrix<const N: usize, const D: usize>(rows: [[f64; D]; N]) -> Tensor {
        Tensor::new(&rows, &Cpu).expect("a matrix")
    }

    fn ids(ids: &[u32]) -> Tensor {
        Tensor::new(ids, &Cpu).expect("a vector")
    }

    fn similarity(z: &Tensor, centres: &Tensor) -> Result<Tensor> {
        z.matmul(&unit_rows(centres)?.t()?)
    }

    /// Value and gradient at the raw centres.
    fn centre(z: &Tensor, y: &[u32], temperature: f64) -> Result<(f64, Vec<Vec<f64>>)> {
        let centres = Var::from_tensor(&matrix(CENTRES))?;
        let loss = centre_loss(&similarity(z, &centres)?, &ids(y), temperature)?;
        let gradients = loss.backward()?;
        Ok((loss.to_scalar()?, gradients.get(&centres).expect("a gradient").to_vec2()?))
    }

    #[track_caller]
    fn assert_close(got: f64, want: f64, within: f64) {
        assert!((got - want).abs() < within, "got {got}, want {want}");
    }

    /// SeCu, case T1.
    #[test]
    fn centre_loss_has_the_specified_values_and_gradient() -> Result<()> {
        let z = matrix([[1., 0.], [0.6, 0.8]]);
        let found = similarity(&z, &matrix(CENTRES))?.to_vec2::<f64>()?;
        assert_eq!(found, [[1., 0., -1.], [0.6, 0.8, -0.6]]);
        let (loss, gradient) = centre(&z, &[0, 1], 1.)?;
        assert_close(loss, 0.566447440, 1e-9);
        assert_eq!([&gradient[0], &gradient[2]], [&[0., 0.], &[0., 0.]]);
        assert_close(gradient[1][0], -0.309489, 1e-6);
        assert_close(gradient[1][1], 0., 1e-12);
        assert_close(centre(&z, &[0, 1], 0.05)?.0, 0.009074965, 1e-9);

        // The plain cross-entropy, with the same value, has the gradient that must not be.
        let centres = Var::from_tensor(&matrix(CENTRES))?;
        let logits = similarity(&z, &centres)?;
        let plain = cross_entropy(&logits, &ids(&[0, 1]))?;
        assert_close(plain.to_scalar()?, 0.566447440, 1e-9);
        let plain = plain.backward()?.get(&centres).expect("a gradient").to_vec2::<f64>()?;
        for (got, want) in
            [(plain[0][1], 0.079283), (plain[1][0], -0.064761), (plain[2][1], 0.015920)]
        {
            assert_close(got, want, 1e-6);
        }
        Ok(())
    }

    /// SeCu, case T2.
    #[test]
    fn two_images_of_one_centre_add_up_and_the_others_stay() -> Result<()> {
        let z = matrix([[0.6, 0.8], [0.8, 0.6]]);
        let (loss, gradient) = centre(&z, &[0, 0], 0.5)?;
        assert_close(loss, 0.742950251, 1e-9);
        assert_close(gradient[0][0], 0., 1e-12);
        assert_close(gradient[0][1], -0.369786, 1e-6);
        assert_eq!(gradient[1..], [[0., 0.], [0., 0.]]);
        let p = softmax(&(similarity(&z, &matrix(CENTRES))? / 0.5)?, 1)?.to_vec2::<f64>()?;
        let want = [[0.387215, 0.577657, 0.035127], [0.584425, 0.391752, 0.023822]];
        for (got, want) in p.iter().flatten().zip(want.iter().flatten()) {
            assert_close(*got, *want, 1e-6);
        }
        Ok(())
    }

    /// SeCu, case T11.
    #[test]
    fn lengths_of_centres_change_no_loss_and_divide_their_gradient() -> Result<()> {
        let z = unit_rows(&matrix([[0.3, -1.2], [2.0, 0.1], [0.5, 0.9]]))?;
        let of = |scale: f64| -> Result<(f64, Vec<Vec<f64>>)> {
            let centres = Var::from_tensor(&(matrix([[0.4, 0.7], [-0.9, 0.2]]) * scale)?)?;
            let loss = centre_loss(&similarity(&z, &centres)?, &ids(&[0, 1, 0]), 0.3)?;
            let gradients = loss.backward()?;
            Ok((loss.to_scalar()?, gradients.get(&centres).expect("a gradient").to_vec2()?))
        };
        let ((loss, gradient), (loss_5, gradient_5)) = (of(1.)?, of(5.)?);
        assert_close(loss, loss_5, 1e-12);
        for ((a, b), centre) in gradient.iter().zip(&gradient_5).zip([[0.4, 0.7], [-0.9, 0.2]]) {
            assert_close(a[0], 5. * b[0], 1e-12);
            assert_close(a[1], 5. * b[1], 1e-12);
            assert_close(a[0] * centre[0] + a[1] * centre[1], 0., 1e-12);
            assert!(a[0].abs() > 1e-3, "a gradient that is 0 shows nothing");
        }
        Ok(())
    }

    /// Only the entry at the id is free; the rest stands still as centres move.
    #[test]
    fn centre_gradient_matches_central_differences_of_the_free_entries() -> Result<()> {
        let z = unit_rows(&matrix([[0.3, -1.2], [2.0, 0.1], [0.5, 0.9]]))?;
        let at = [[0.4, 0.7], [-0.9, 0.2], [0.1, -0.8]];
        let y = ids(&[0, 2, 0]);
        let frozen = similarity(&z, &matrix(at))?;
        let value = |at: [[f64; 2]; 3]| -> Result<f64> {
            let free = similarity(&z, &matrix(at))?;
            masked_cross_entropy(&free, &frozen, &y, 0.3)?.to_scalar()
        };
        let centres = Var::from_tensor(&matrix(at))?;
        let loss = centre_loss(&similarity(&z, &centres)?, &y, 0.3)?;
        let gradients = loss.backward()?;
        let analytic = gradients.get(&centres).expect("a gradient").to_vec2::<f64>()?;
        assert_eq!(analytic[1], [0., 0.], "no image is assigned to it");
        for i in 0..3 {
            for j in 0..2 {
                let (mut up, mut down) = (at, at);
                up[i][j] += 1e-6;
                down[i][j] -= 1e-6;
                let want = (value(up)? - value(down)?) / 2e-6;
                assert_close(analytic[i][j], want, 1e-8);
            }
        }
        Ok(())
    }

    fn view_logits(temperature: f64) -> Result<[Tensor; 2]> {
        let centres = matrix(CENTRES);
        let of = |z: [[f64; 2]; 1]| similarity(&matrix(z), &centres)? / temperature;
        Ok([of([[1., 0.]])?, of([[0.6, 0.8]])?])
    }

    /// SeCu, case T3.
    #[test]
    fn representation_loss_has_the_specified_values_and_gradient() -> Result<()> {
        let t = ids(&[0]);
        let [logits_1, logits_2] = view_logits(1.)?;
        for (other, want) in [
            (&logits_2, [0.517133, 0.387348, 0.095519]),
            (&logits_1, [0.732193, 0.195783, 0.072024]),
        ] {
            let got = target(other, &t, 0.2)?.to_vec2::<f64>()?;
            for (got, want) in got[0].iter().zip(want) {
                assert_close(*got, want, 1e-6);
            }
        }
        let loss = representation_loss([&logits_1, &logits_2], &t, 0.2)?;
        assert_close(loss.to_scalar()?, 0.979276475, 1e-9);
        let [sharp_1, sharp_2] = view_logits(0.05)?;
        let loss = representation_loss([&sharp_1, &sharp_2], &t, 0.2)?;
        assert_close(loss.to_scalar()?, 9.865185282, 1e-9);
        let one = |of: &Tensor, other: &Tensor| -> Result<f64> {
            (target(other, &t, 0.2)? * log_softmax(of, 1)?)?.sum_all()?.neg()?.to_scalar()
        };
        assert_close(one(&logits_1, &logits_2)?, 0.985991241, 1e-9);
        assert_close(one(&logits_2, &logits_1)?, 0.972561709, 1e-9);
        assert_close(one(&sharp_1, &sharp_2)?, 15.712220643, 1e-9);
        assert_close(one(&sharp_2, &sharp_1)?, 4.018149921, 1e-9);

        let free = Var::from_tensor(&logits_1)?;
        let gradients = representation_loss([&free, &logits_2], &t, 0.2)?.backward()?;
        let gradient = gradients.get(&free).expect("a gradient").to_vec2::<f64>()?;
        // The specified gradient of view 1 alone; the loss is the mean of both views.
        for (got, want) in gradient[0].iter().zip([0.148107, -0.142619, -0.005488]) {
            assert_close(*got, want / 2., 1e-6);
        }
        Ok(())
    }

    #[test]
    fn representation_gradient_matches_central_differences_with_targets_held() -> Result<()> {
        let at = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4];
        let other = matrix([[0.1, 0.8, -0.5], [-0.3, 0.6, 0.2]]);
        let t = ids(&[2, 0]);
        let tensor = |at: &[f64; 6]| Tensor::from_slice(at, (2, 3), &Cpu);
        let target_2 = target(&tensor(&at)?, &t, 0.2)?;
        let value = |at: &[f64; 6]| -> Result<f64> {
            let q_1 = target(&other, &t, 0.2)?;
            let own = (q_1 * log_softmax(&tensor(at)?, 1)?)?.sum(1)?.mean_all()?;
            let held = (&target_2 * log_softmax(&other, 1)?)?.sum(1)?.mean_all()?;
            ((own + held)? * -0.5)?.to_scalar()
        };
        let logits = Var::from_tensor(&tensor(&at)?)?;
        let loss = representation_loss([&logits, &other], &t, 0.2)?;
        assert_close(loss.to_scalar()?, value(&at)?, 1e-12);
        let gradients = loss.backward()?;
        let analytic = gradients.get(&logits).expect("a gradient").flatten_all()?;
        for (i, got) in analytic.to_vec1::<f64>()?.into_iter().enumerate() {
            let (mut up, mut down) = (at, at);
            up[i] += 1e-6;
            down[i] -= 1e-6;
            assert_close(got, (value(&up)? - value(&down)?) / 2e-6, 1e-8);
        }
        Ok(())
    }

    #[test]
    fn both_views_reach_the_network_and_neither_through_the_others_target() -> Result<()> {
        let t = ids(&[0]);
        let [logits_1, logits_2] = view_logits(1.)?;
        let (free_1, free_2) = (Var::from_tensor(&logits_1)?, Var::from_tensor(&logits_2)?);
        let both = representation_loss([&free_1, &free_2], &t, 0.2)?.backward()?;
        let alone = representation_loss([&free_1, &logits_2], &t, 0.2)?.backward()?;
        let gradient = |store: &candle_core::backprop::GradStore| {
            store.get(&free_1).expect("a gradient").to_vec2::<f64>()
        };
        assert_eq!(gradient(&both)?, gradient(&alone)?);
        assert!(both.get(&free_2).is_some());
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let s = matrix([[1., 0., -1.], [0.6, 0.8, -0.6]]);
        assert!(centre_loss(&s, &ids(&[0]), 1.).is_err());
        assert!(centre_loss(&s, &ids(&[0, 3]), 1.).is_err());
        assert!(
            representation_loss([&s, &s.narrow(0, 0, 1).expect("a row")], &ids(&[0, 1]), 0.2)
                .is_err()
        );
    }
}
