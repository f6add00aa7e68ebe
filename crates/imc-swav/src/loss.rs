//! The three losses: swapped prediction for encoder and prototypes, information and a limit on the
//! logits for the classifier.
//!
//! Every sum over pairs of crops is a mean over them; `B` images, `V` crops, `K'` prototypes, `K`
//! clusters.

use anyhow::{Context, ensure};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{log_softmax, softmax};
use training::ops::{relu, sum};

/// Sinkhorn codes of one crop: soft assignments to prototypes that use all of them alike.
///
/// `q = Sinkhorn(exp(u / ε))`, see [`assignment::sinkhorn`], whose largest score of all is taken
/// out first; a maximum for each image would change the result of three rounds. A constant: no
/// gradient flows through it.
///
/// - `scores`: `u`, cosines between images and prototypes, `(B, K')`.
///
/// # Errors
///
/// A score is not finite, or `epsilon` is not above 0.
pub fn codes(scores: &Tensor, epsilon: f64, rounds: usize) -> anyhow::Result<Tensor> {
    let (n, k) = scores.dims2()?;
    let values = scores.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
    let values = values.flatten_all()?.to_vec1::<f64>()?;
    let codes = assignment::sinkhorn(&values, n, k, epsilon, rounds)
        .context("codes of a crop's scores over the prototypes")?;
    let codes = Tensor::from_vec(codes, (n, k), &Device::Cpu)?.to_dtype(scores.dtype())?;
    Ok(codes.to_device(scores.device())?)
}

/// Swapped prediction: every other crop is to predict the code of a large one.
///
/// `l(i, p) = 1/B Σ_b Σ_j −q_i[b, j] ln max(softmax(u_p / τ)[b, j], 10⁻¹⁷)`, the mean over all
/// large crops `i` and all crops `p ≠ i`: Caron et al. 2020 (arXiv:2006.09882), Eq. 2, as IMC-SwAV
/// takes it over.
///
/// - `scores`: `u` of every crop, the large ones first, `V` times `(B, K')`.
/// - `codes`: `q` of the large crops; constants.
///
/// Returns a scalar of at least 0 nats; `ln K'` for uniform predictions.
///
/// # Errors
///
/// There is no pair of crops, or shapes differ.
pub fn swapped_prediction_loss(
    scores: &[Tensor],
    codes: &[Tensor],
    temperature: f64,
) -> Result<Tensor> {
    let pairs = swapped_pairs(codes.len(), scores.len());
    if pairs == 0 {
        candle_core::bail!(
            "swapped_prediction_loss: {} codes and {} crops make no pair",
            codes.len(),
            scores.len()
        )
    }
    let mut terms = Vec::new();
    for (p, scores) in scores.iter().enumerate() {
        let others = codes.iter().enumerate().filter(|(i, _)| *i != p).map(|(_, q)| q.detach());
        let others: Vec<Tensor> = others.collect();
        if others.is_empty() {
            continue; // The only large crop has no other one to predict.
        }
        let log = log_softmax(&(scores / temperature)?, D::Minus1)?.maximum(LOG_FLOOR)?;
        terms.push((sum(others)? * log)?.sum(D::Minus1)?.mean_all()?);
    }
    sum(terms)? * (-1. / pairs as f64)
}

/// `ln 10⁻¹⁷`: below it a probability counts as that, without a gradient. Cosines over a
/// temperature of 0.1 do not come near.
const LOG_FLOOR: f64 = -39.143_946_580_898_77;

/// Pairs of a large crop and another one.
pub fn swapped_pairs(large: usize, crops: usize) -> usize {
    large * crops.saturating_sub(1)
}

/// The negative mutual information of clusters and prototypes, with a push to balanced clusters.
///
/// For every ordered pair `(a, b)` of crops, `a = b` included, with the joint
/// `P = softmax(y_a)ᵀ softmax(u_b / τ)` scaled to sum to 1 and its marginals `P_y` and `P_u`:
///
/// `l = Σ P (ln P_u − ln P) + β Σ P ln P_y = H(Y|U) − β H(Y) = −I(Y; U) − (β − 1) H(Y)`,
///
/// the mean over the `V²` pairs. β = 1 is plain information; above, clusters are pushed to one
/// size. Logarithms are of `max(P, 10⁻³⁰)`, so that `0 ln 0` is 0 (a departure from the published
/// code, where it is NaN).
///
/// - `logits`: `y` of every crop, `V` times `(B, K)`.
/// - `scores`: `u` of every crop, `V` times `(B, K')`; constants.
/// - `entropy_weight`: β.
///
/// Returns scalars in nats; the loss is at least `−β ln K`.
///
/// # Errors
///
/// No crop, or shapes differ.
pub fn information_loss(
    logits: &[Tensor],
    scores: &[Tensor],
    temperature: f64,
    entropy_weight: f64,
) -> Result<Information> {
    let (Some(first), Some(u)) = (logits.first(), scores.first()) else {
        candle_core::bail!("information_loss: no crop")
    };
    let ((n, k), (m, prototypes)) = (first.dims2()?, u.dims2()?);
    if n != m {
        candle_core::bail!("information_loss: {n} rows of logits but {m} of scores")
    }
    let y = logits.iter().map(|y| softmax(y, 1)).collect::<Result<Vec<_>>>()?;
    let u = scores.iter().map(|u| softmax(&(u.detach() / temperature)?, 1));
    let u = u.collect::<Result<Vec<_>>>()?;
    // The joints of all pairs in one product: (V, K) rows by (V, K') columns.
    let joint = Tensor::cat(&y, 1)?.t()?.matmul(&Tensor::cat(&u, 1)?)?;
    let joint = joint.reshape((logits.len(), k, scores.len(), prototypes))?;
    let mass = joint.sum_keepdim((1, 3))?;
    let joint = joint.broadcast_div(&mass)?;
    let log = |p: &Tensor| p.maximum(1e-30)?.log();
    let of_prototypes = joint.sum_keepdim(1)?;
    let of_clusters = joint.sum_keepdim(3)?;
    let pairs = (logits.len() * scores.len()) as f64;
    let conditional = (&joint * log(&of_prototypes)?.broadcast_sub(&log(&joint)?)?)?;
    let entropy = (&of_clusters * log(&of_clusters)?)?;
    let conditional_entropy = (conditional.sum_all()? / pairs)?;
    let entropy = (entropy.sum_all()? * (-1. / pairs))?;
    let loss = (&conditional_entropy - (&entropy * entropy_weight)?)?;
    Ok(Information { loss, conditional_entropy, entropy })
}

/// The [`information_loss`] and its parts.
#[derive(Debug)]
pub struct Information {
    /// `l`.
    pub loss: Tensor,
    /// `H(Y|U)`.
    pub conditional_entropy: Tensor,
    /// `H(Y)`.
    pub entropy: Tensor,
}

/// Keeps logits from saturating: `w · 1/B Σ_b Σ_c relu(|y[b, c]| − limit)`, the mean over the
/// crops (and so over all pairs, in which each crop comes equally often).
///
/// - `logits`: `y` of every crop, `V` times `(B, K)`.
/// - `weight`: `w`, 0.01 published; `limit`: 5 published.
///
/// # Errors
///
/// No crop, or shapes differ.
pub fn logit_penalty(logits: &[Tensor], limit: f64, weight: f64) -> Result<Tensor> {
    let excess = |logits: &Tensor| relu(&(logits.abs()? - limit)?)?.sum(D::Minus1)?.mean_all();
    let terms = logits.iter().map(excess).collect::<Result<Vec<_>>>()?;
    sum(terms)? * (weight / logits.len() as f64)
}

/// Scales every row to unit length, outside any graph, as the prototypes are before each step.
///
/// # Errors
///
/// A row is zero: it has no direction.
pub fn unit_rows_in_place(values: &mut [f32], width: usize) -> anyhow::Result<()> {
    for (number, row) in values.chunks_exact_mut(width).enumerate() {
        let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        ensure!(length > 0., "prototype {number} is zero and has no direction");
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};

    use super::*;

    const U: [[f64; 3]; 4] = [[0.9, 0.1, -0.2], [0.8, 0.3, 0.], [0.7, 0.2, 0.6], [0.1, 0.5, 0.4]];
    const PX: [[f64; 3]; 4] = [[0.8, 0., 0.1], [0.6, 0.4, 0.1], [0.5, 0.1, 0.7], [0., 0.6, 0.3]];
    const Y: [[f64; 2]; 4] = [[2., -1.], [1., 0.], [-1., 1.5], [0., 0.5]];

    fn f64s<const W: usize>(rows: &[[f64; W]]) -> Tensor {
        let flat: Vec<f64> = rows.iter().flatten().copied().collect();
        Tensor::from_vec(flat, (rows.len(), W), &Cpu).expect("rows")
    }

    fn q(u: &[[f64; 3]; 4], epsilon: f64, rounds: usize) -> Vec<Vec<f64>> {
        codes(&f64s(u), epsilon, rounds).expect("codes").to_vec2().expect("rows")
    }

    fn column_means(q: &[Vec<f64>]) -> Vec<f64> {
        (0..3).map(|j| q.iter().map(|row| row[j]).sum::<f64>() / q.len() as f64).collect()
    }

    fn assert_near(got: &[f64], want: &[f64], within: f64) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < within, "got {got}, want {want}");
        }
    }

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.to_scalar().expect("a scalar")
    }

    fn information(y: &[Tensor], u: &[Tensor], temperature: f64, weight: f64) -> Result<Tensor> {
        Ok(information_loss(y, u, temperature, weight)?.loss)
    }

    /// IMC-SwAV, case T1; IMC-SwAV, case T2; IMC-SwAV, case T3.
    #[test]
    fn codes_have_the_specified_values() {
        let sharp = q(&U, 0.05, 3);
        let want = [
            [0.999031, 0.000969, 0.],
            [0.718743, 0.281133, 0.000124],
            [0.004775, 0.001868, 0.993357],
            [0., 0.976422, 0.023577],
        ];
        for (got, want) in sharp.iter().zip(&want) {
            assert_near(got, want, 1e-6);
            assert!((got.iter().sum::<f64>() - 1.).abs() < 1e-12);
        }
        assert_near(&column_means(&sharp), &[0.430637, 0.315098, 0.254265], 1e-6);

        let soft = q(&U, 0.5, 3);
        let want = [
            [0.569348, 0.269970, 0.160682],
            [0.420479, 0.363294, 0.216227],
            [0.253206, 0.218771, 0.528023],
            [0.092014, 0.480948, 0.427039],
        ];
        for (got, want) in soft.iter().zip(&want) {
            assert_near(got, want, 1e-6);
        }
        assert_near(&column_means(&soft), &[0.333762, 0.333246, 0.332993], 1e-6);

        let many = q(&U, 0.05, 100);
        assert_near(&column_means(&many), &[1. / 3.; 3], 1e-6);
        assert_near(&many[1], &[0.338114, 0.656032, 0.005854], 1e-6);
    }

    /// IMC-SwAV, case T4.
    #[test]
    fn codes_are_blind_to_what_moves_all_images_alike_and_to_nothing_else() {
        let plain = q(&U, 0.05, 3);
        let changed = |change: &dyn Fn(usize, usize) -> f64, rounds: usize| {
            let mut u = U;
            for (i, row) in u.iter_mut().enumerate() {
                for (j, value) in row.iter_mut().enumerate() {
                    *value += change(i, j);
                }
            }
            q(&u, 0.05, rounds)
        };
        let largest = |a: &[Vec<f64>], b: &[Vec<f64>]| {
            let differences =
                a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs());
            differences.fold(0., f64::max)
        };
        assert!(largest(&plain, &changed(&|_, _| 0.5, 3)) < 1e-12);
        assert!(largest(&plain, &changed(&|_, j| 0.25 * j as f64, 3)) < 1e-12);
        // One image alone.
        let mut shifted = U;
        shifted[1].iter_mut().for_each(|u| *u += 0.3);
        assert!((largest(&q(&U, 0.05, 3), &q(&shifted, 0.05, 3)) - 0.248266).abs() < 1e-6);
        assert!(largest(&q(&U, 0.05, 200), &q(&shifted, 0.05, 200)) < 1e-6);
        // Permuted images are permuted rows.
        let mut turned = U;
        turned.rotate_left(1);
        let mut want = plain;
        want.rotate_left(1);
        assert!(largest(&q(&turned, 0.05, 3), &want) < 1e-12);
    }

    /// IMC-SwAV, case T5.
    #[test]
    fn swapped_terms_have_the_specified_values() -> Result<()> {
        for (epsilon, want) in [(0.05, 0.244068638), (0.5, 2.264659531)] {
            let flat = q(&U, epsilon, 3).concat();
            let code = Tensor::from_vec(flat, (4, 3), &Cpu)?;
            // Of two crops with one code, the one pair left is the term itself.
            let loss = swapped_prediction_loss(&[f64s(&U), f64s(&PX)], &[code], 0.1)?;
            assert!((scalar(&loss) - want).abs() < 1e-9, "{} {want}", scalar(&loss));
        }
        Ok(())
    }

    #[test]
    fn swapped_prediction_is_the_mean_over_its_pairs() -> Result<()> {
        let third = [[0.1, 0.2, -0.5], [0.3, -0.1, 0.], [0.2, 0.9, 0.1], [0.4, 0.4, 0.4]];
        let scores = [f64s(&U), f64s(&PX), f64s(&third)];
        let code = |epsilon| Tensor::from_vec(q(&U, epsilon, 3).concat(), (4, 3), &Cpu);
        let codes = [code(0.05)?, code(0.5)?];
        let alone = |i: usize, p: usize| -> Result<f64> {
            // The first of two crops has the code; the second predicts it.
            let pair = [scores[i].clone(), scores[p].clone()];
            Ok(scalar(&swapped_prediction_loss(&pair, &codes[i..=i], 0.1)?))
        };
        let want = (alone(0, 1)? + alone(0, 2)? + alone(1, 0)? + alone(1, 2)?) / 4.;
        let got = scalar(&swapped_prediction_loss(&scores, &codes, 0.1)?);
        assert!((got - want).abs() < 1e-12, "got {got}, want {want}");
        assert!(swapped_prediction_loss(&scores[..1], &codes[..1], 0.1).is_err());
        Ok(())
    }

    /// IMC-SwAV, case T11.
    #[test]
    fn pairs_are_counted_as_specified() -> Result<()> {
        assert_eq!((swapped_pairs(2, 6), swapped_pairs(2, 2)), (10, 2));
        // The mean over 36 or 4 pairs of one and the same joint is that joint's value.
        for crops in [6, 2] {
            let (y, u) = (vec![f64s(&Y); crops], vec![f64s(&PX); crops]);
            let all = scalar(&information(&y, &u, 0.1, 4.)?);
            assert!((all + 2.259532566).abs() < 1e-9, "{all}");
        }
        // And every ordered pair of two different crops counts once.
        let other = [[0.5, 0.2], [-1., 0.], [0.3, 1.], [2., 0.]];
        let (y, u) = ([f64s(&Y), f64s(&other)], [f64s(&PX), f64s(&U)]);
        let got = scalar(&information(&y, &u, 0.1, 4.)?);
        let mut want = 0.;
        for a in 0..2 {
            for b in 0..2 {
                want += scalar(&information(&y[a..=a], &u[b..=b], 0.1, 4.)?) / 4.;
            }
        }
        assert!((got - want).abs() < 1e-12, "got {got}, want {want}");
        Ok(())
    }

    /// IMC-SwAV, case T6.
    #[test]
    fn information_has_the_specified_value_and_gradient() -> Result<()> {
        let y = Var::from_tensor(&f64s(&Y))?;
        let (of_y, of_u) = ([y.as_tensor().clone()], [f64s(&PX)]);
        let parts = information_loss(&of_y, &of_u, 0.1, 4.)?;
        assert!((scalar(&parts.conditional_entropy) - 0.503659973).abs() < 1e-9);
        assert!((-4. * scalar(&parts.entropy) + 2.763192539).abs() < 1e-9);
        let plain = scalar(&information(&of_y, &of_u, 0.1, 1.)?);
        assert!((plain + 0.187138162).abs() < 1e-9, "{plain}");
        let loss = information(&of_y, &of_u, 0.1, 4.)?;
        assert!((scalar(&loss) + 2.259532566).abs() < 1e-9);
        let gradients = loss.backward()?;
        let got = gradients.get(&y).expect("a gradient").to_vec2::<f64>()?;
        for (row, want) in got.iter().zip([-0.009586, -0.030721, 0.041226, 0.057179]) {
            assert!((row[0] - want).abs() < 1e-6 && (row[1] + want).abs() < 1e-6, "{row:?}");
        }
        Ok(())
    }

    /// IMC-SwAV, case T7; IMC-SwAV, case T8.
    #[test]
    fn uniform_perfect_and_collapsed_classifiers_have_their_known_values() -> Result<()> {
        let uniform = Tensor::zeros((4, 10), DType::F64, &Cpu)?;
        let loss = scalar(&information(&[uniform], &[f64s(&PX)], 0.1, 4.)?);
        assert!((loss + 6.907755279).abs() < 1e-9, "{loss}");
        // Two clusters that the prototypes tell apart, with logits of 20 for them too.
        let certain = f64s(&[[2., 0.], [2., 0.], [0., 2.], [0., 2.]]);
        let twenty = f64s(&[[20., 0.], [20., 0.], [0., 20.], [0., 20.]]);
        let penalty = scalar(&logit_penalty(std::slice::from_ref(&twenty), 5., 0.01)?);
        assert!((penalty - 0.15).abs() < 1e-12, "{penalty}");
        let loss = scalar(&information(&[twenty], std::slice::from_ref(&certain), 0.1, 4.)?);
        assert!((loss + 2.772588639).abs() < 1e-9, "{loss}");
        let one = f64s(&[[20., 0.]; 4]);
        let collapsed = scalar(&information(&[one], &[certain], 0.1, 4.)?);
        assert!((-2e-7..-5e-8).contains(&collapsed), "{collapsed}");
        assert!((collapsed - loss - 2.77).abs() < 0.005, "the balanced one wins by 2.77");
        Ok(())
    }

    /// IMC-SwAV, case T9.
    #[test]
    fn saturated_logits_give_finite_values_and_gradients() -> Result<()> {
        let y = Var::new(&[[120f32, -120.], [120., -120.], [-120., 120.]], &Cpu)?;
        let u = Tensor::new(&[[1f32, 0., -1.], [1., 0., -1.], [-1., 0., 1.]], &Cpu)?;
        let found = information_loss(&[y.as_tensor().clone()], &[u], 0.01, 4.)?;
        let first = found.conditional_entropy.to_scalar::<f32>()?;
        assert!(first.abs() < 1e-6, "{first}");
        let loss = found.loss;
        assert!(loss.to_scalar::<f32>()?.is_finite());
        let gradients = loss.backward()?;
        let gradient = gradients.get(&y).expect("a gradient").flatten_all()?;
        assert!(gradient.to_vec1::<f32>()?.iter().all(|g| g.is_finite()));
        Ok(())
    }

    /// IMC-SwAV, case T10.
    #[test]
    fn the_penalty_has_the_specified_value() -> Result<()> {
        let logits = f64s(&[[6., -8., 0.], [1., 2., -5.]]);
        assert!(
            (scalar(&logit_penalty(std::slice::from_ref(&logits), 5., 0.01)?) - 0.02).abs() < 1e-12
        );
        // Over crops it is the mean.
        let other = f64s(&[[0., 7., 0.], [0., -5., 1.]]); // 0.01 alone.
        assert!((scalar(&logit_penalty(&[logits, other], 5., 0.01)?) - 0.015).abs() < 1e-12);
        Ok(())
    }

    /// Compares the gradient of `loss` at `at` with central differences.
    fn check_gradient<const W: usize>(
        at: &[[f64; W]; 4],
        loss: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let x = Var::from_tensor(&f64s(at))?;
        let gradients = loss(x.as_tensor())?.backward()?;
        let got = gradients.get(&x).expect("a gradient").to_vec2::<f64>()?;
        for i in 0..4 {
            for j in 0..W {
                let (mut up, mut down) = (*at, *at);
                up[i][j] += 1e-6;
                down[i][j] -= 1e-6;
                let want = (scalar(&loss(&f64s(&up))?) - scalar(&loss(&f64s(&down))?)) / 2e-6;
                assert!((got[i][j] - want).abs() < 1e-7, "{i} {j}: {} {want}", got[i][j]);
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        let code = Tensor::from_vec(q(&U, 0.5, 3).concat(), (4, 3), &Cpu)?;
        let codes = [code.clone(), (&code * 0.5)?];
        check_gradient(&PX, |x| {
            swapped_prediction_loss(&[x.clone(), f64s(&U), x.clone()], &codes, 0.1)
        })?;
        let other = [[0.5, 0.2], [-1., 0.], [0.3, 1.], [2., 0.]];
        check_gradient(&Y, |y| {
            information(&[y.clone(), f64s(&other)], &[f64s(&PX), f64s(&U)], 0.1, 4.)
        })?;
        check_gradient(&[[6., -8.], [1., 2.], [5.5, -4.], [-5.5, 7.]], |y| {
            logit_penalty(&[y.clone(), f64s(&Y)], 5., 0.01)
        })
    }

    /// IMC-SwAV, case T12 in the losses: scores get no gradient from information, codes none from the swap.
    #[test]
    fn codes_receive_no_gradient() -> Result<()> {
        let (u, px) = (Var::from_tensor(&f64s(&U))?, Var::from_tensor(&f64s(&PX))?);
        let own = codes(u.as_tensor(), 0.05, 3).expect("codes");
        let scores = [u.as_tensor().clone(), px.as_tensor().clone()];
        let gradients = swapped_prediction_loss(&scores, &[own], 0.1)?.backward()?;
        assert!(gradients.get(&px).is_some());
        // Only the other crop predicts this one's code.
        assert!(gradients.get(&u).is_none());
        let code = Var::from_tensor(&f64s(&PX))?;
        let codes = [code.as_tensor().clone()];
        let scores = Var::from_tensor(&f64s(&U))?;
        let both = [scores.as_tensor().clone(), scores.as_tensor().clone()];
        let gradients = swapped_prediction_loss(&both, &codes, 0.1)?.backward()?;
        assert!(gradients.get(&code).is_none() && gradients.get(&scores).is_some());
        Ok(())
    }

    #[test]
    fn scores_receive_no_gradient_from_information() -> Result<()> {
        let (y, u) = (Var::from_tensor(&f64s(&Y))?, Var::from_tensor(&f64s(&PX))?);
        let loss = information(&[y.as_tensor().clone()], &[u.as_tensor().clone()], 0.1, 4.)?;
        let gradients = loss.backward()?;
        assert!(gradients.get(&y).is_some());
        assert!(gradients.get(&u).is_none());
        Ok(())
    }

    #[test]
    fn rows_are_made_unit_length_and_a_zero_row_is_refused() -> anyhow::Result<()> {
        let mut rows = [3., 4., 0., -2.];
        unit_rows_in_place(&mut rows, 2)?;
        assert_eq!(rows, [0.6, 0.8, 0., -1.]);
        let error = unit_rows_in_place(&mut [1., 0., 0., 0.], 2).expect_err("a zero row");
        assert!(error.to_string().contains("prototype 1"), "{error}");
        Ok(())
    }
}
