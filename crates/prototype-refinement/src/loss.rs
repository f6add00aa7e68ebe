//! The losses that refinement adds to regression: one pulls each image to the prototype of its
//! cluster; the other pushes the clusters apart and is [`training::scatter`].
//!
//! Both losses see an online projection before the predictor and without noise, and take it to
//! unit length themselves. Both act on the reliable images of a batch alone, which are those of
//! weight above 0. Where there are none they are exactly 0 and reach nothing. That scattering, on
//! the reliable images alone, is the paper's cluster constraint is our reading.

use candle_core::{D, Result, Tensor, bail};
use candle_nn::ops::log_softmax;
use training::ops::{pick, unit_rows};

/// The pseudo-labels of a batch of `B` images.
#[derive(Debug, Clone)]
pub struct Marks {
    /// Cluster of each, `B`.
    pub pseudo_labels: Vec<u32>,
    /// Weight of each, `B`: its score where it is reliable, else 0.
    pub weights: Vec<f32>,
}

/// How far images are from the prototypes of their clusters, against those of all others.
///
/// `L_pc = 1/Σw Σᵢ wᵢ [−uᵢ·c_{yᵢ}/τ + ln Σₖ exp(uᵢ·cₖ/τ)]` with `u = q/‖q‖`: a softmax over `K`
/// prototypes, so that negatives exist between clusters and never between images. Our reading of
/// the paper's feature constraint.
///
/// - `projection`: `q`, output of the online projector, `(B, P)`.
/// - `prototypes`: `c`, `(K, P)`, unit rows; a constant. A row of zeros stands for a cluster without
///   reliable images, and has no part in the sum.
/// - `marks`: `y` and `w`.
/// - `temperature`: τ.
///
/// Returns a scalar in nats, at least 0. Its least value depends on the angles between the
/// prototypes: `ln(1 + (K−1) exp(−(1 + 1/(K−1))/τ))` where they are spread evenly.
///
/// # Errors
///
/// The shapes do not fit, or a pseudo-label is not below `K`.
pub fn sample_to_prototype_loss(
    projection: &Tensor,
    prototypes: &Tensor,
    marks: &Marks,
    temperature: f64,
) -> Result<Tensor> {
    let (b, p) = projection.dims2()?;
    let (_, width) = prototypes.dims2()?;
    if width != p {
        bail!("sample_to_prototype_loss: projections of width {p}, but prototypes of {width}")
    }
    marks.check("sample_to_prototype_loss", b)?;
    let total: f64 = marks.weights.iter().map(|&w| f64::from(w)).sum();
    if total == 0.0 {
        return zero_like(projection);
    }
    let prototypes = prototypes.detach();
    let logits = (unit_rows(projection)?.matmul(&prototypes.t()?)? / temperature)?;
    let losses = pick(
        &log_softmax(&logits.broadcast_add(&without_absent(&prototypes)?)?, 1)?,
        &Tensor::new(marks.pseudo_labels.as_slice(), projection.device())?,
    )?
    .neg()?;
    let shares: Vec<f64> = marks.weights.iter().map(|&w| f64::from(w) / total).collect();
    let shares = Tensor::new(shares, projection.device())?.to_dtype(projection.dtype())?;
    (losses * shares)?.sum_all()
}

/// `(1, K)`: 0 for a prototype, and for a row of zeros what makes its softmax exactly 0.
fn without_absent(prototypes: &Tensor) -> Result<Tensor> {
    const NEVER: f64 = -1e9;
    let present = prototypes.sqr()?.sum(D::Minus1)?.gt(0f64)?.to_dtype(prototypes.dtype())?;
    present.affine(-NEVER, NEVER)?.unsqueeze(0)
}

impl Marks {
    /// The cluster of each reliable image, `B`, as [`training::scatter`] takes it.
    pub fn reliable(&self) -> Vec<Option<u32>> {
        let images = self.pseudo_labels.iter().zip(&self.weights);
        images.map(|(&label, &weight)| (weight > 0.0).then_some(label)).collect()
    }

    fn check(&self, function: &str, images: usize) -> Result<()> {
        if self.pseudo_labels.len() != images || self.weights.len() != images {
            bail!(
                "{function}: {images} images but {} pseudo-labels and {} weights",
                self.pseudo_labels.len(),
                self.weights.len()
            )
        }
        Ok(())
    }
}

/// A zero that no gradient passes.
fn zero_like(tensor: &Tensor) -> Result<Tensor> {
    Tensor::zeros((), tensor.dtype(), tensor.device())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device::Cpu, Var};

    use super::*;

    fn matrix(rows: &[&[f64]]) -> Tensor {
        let flat: Vec<f64> = rows.iter().flat_map(|row| row.iter().copied()).collect();
        Tensor::from_vec(flat, (rows.len(), rows[0].len()), &Cpu).expect("rows of one width")
    }

    fn marks(pseudo_labels: &[u32]) -> Marks {
        Marks { pseudo_labels: pseudo_labels.to_vec(), weights: vec![1.0; pseudo_labels.len()] }
    }

    fn value(loss: Result<Tensor>) -> f64 {
        loss.and_then(|loss| loss.to_scalar()).expect("a scalar")
    }

    #[track_caller]
    fn assert_close(got: f64, want: f64) {
        assert!((got - want).abs() < 2e-6, "got {got}, want {want}");
    }

    /// Prototypes spread evenly: the corners of a simplex, `(K, K)`.
    fn simplex(k: usize) -> Tensor {
        let mut rows = vec![-1.0 / k as f64; k * k];
        (0..k).for_each(|i| rows[i * k + i] += 1.0);
        unit_rows(&Tensor::from_vec(rows, (k, k), &Cpu).expect("square")).expect("rows")
    }

    fn permuted(rows: &Tensor, order: &[u32]) -> Tensor {
        rows.index_select(&Tensor::new(order, &Cpu).expect("indices"), 0).expect("rows")
    }

    #[test]
    fn sample_to_prototype_values_match_hand_computation() {
        let u = matrix(&[&[1., 0.], &[0., 1.], &[0.6, 0.8]]);
        let c = matrix(&[&[1., 0.], &[0., 1.]]);
        let all = marks(&[0, 1, 1]);
        for (temperature, each) in
            [(0.2, [0.006715, 0.006715, 0.313262]), (0.5, [0.126928, 0.126928, 0.513015])]
        {
            let loss = |marks: &Marks| value(sample_to_prototype_loss(&u, &c, marks, temperature));
            assert_close(loss(&all), each.iter().sum::<f64>() / 3.0);
            for (i, want) in each.into_iter().enumerate() {
                let mut alone = marks(&[0, 1, 1]);
                alone.weights = vec![0.0; 3];
                alone.weights[i] = 0.7;
                assert_close(loss(&alone), want);
            }
            let mut uneven = marks(&[0, 1, 1]);
            uneven.weights = vec![0.5, 0.0, 0.25];
            assert_close(loss(&uneven), (2.0 * each[0] + each[2]) / 3.0);
        }
    }

    #[test]
    fn the_floor_of_even_prototypes_is_known() {
        for (k, floors) in [
            (10, [1.345e-4, 0.034202, 0.680726]),
            (15, [3.111e-4, 0.063914, 0.971713]),
            (20, [5.095e-4, 0.093854, 1.198294]),
        ] {
            let c = simplex(k);
            let labels: Vec<u32> = (0..k as u32).collect();
            for (temperature, want) in [0.1, 0.2, 0.5].into_iter().zip(floors) {
                let got = value(sample_to_prototype_loss(&c, &c, &marks(&labels), temperature));
                assert_close(got, want);
            }
        }
    }

    #[test]
    fn an_absent_prototype_takes_no_share() {
        let u = matrix(&[&[1., 0.2], &[0., 1.]]);
        let c = matrix(&[&[1., 0.], &[0., 1.]]);
        let with_absent = matrix(&[&[1., 0.], &[0., 0.], &[0., 1.]]);
        let got = value(sample_to_prototype_loss(&u, &with_absent, &marks(&[0, 2]), 0.2));
        assert_eq!(got, value(sample_to_prototype_loss(&u, &c, &marks(&[0, 1]), 0.2)));
    }

    #[test]
    fn sample_to_prototype_gradient_is_the_known_one() -> Result<()> {
        let q = Var::from_tensor(&matrix(&[&[0.6, 0.8]]))?;
        let c = Var::from_tensor(&matrix(&[&[1., 0.], &[0., 1.]]))?;
        let gradients = sample_to_prototype_loss(&q, &c, &marks(&[1]), 0.2)?.backward()?;
        let gradient = gradients.get(&q).expect("a gradient").to_vec2::<f64>()?;
        assert_close(gradient[0][0], 1.506072);
        assert_close(gradient[0][1], -1.129554);
        // The length of a projection does not matter.
        assert!((0.6 * gradient[0][0] + 0.8 * gradient[0][1]).abs() < 1e-12);
        assert!(gradients.get(&c).is_none(), "prototypes are constants");
        Ok(())
    }

    const Q: [f64; 12] = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4, 0.5, 0.9, 0.2, -0.7, 0.4, 1.1];

    fn check_gradient(loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let at = |q: &[f64]| Tensor::from_slice(q, (4, 3), &Cpu);
        let q = Var::from_tensor(&at(&Q)?)?;
        let gradients = loss(&q)?.backward()?;
        let analytic = gradients.get(&q).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
        for (i, got) in analytic.into_iter().enumerate() {
            let (mut up, mut down) = (Q, Q);
            up[i] += 1e-6;
            down[i] -= 1e-6;
            let want = (value(loss(&at(&up)?)) - value(loss(&at(&down)?))) / 2e-6;
            assert!((got - want).abs() < 1e-8, "d/dq[{i}]: got {got}, want {want}");
        }
        Ok(())
    }

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        let c = unit_rows(&matrix(&[&[1., 0.2, 0.], &[-0.3, 1., 0.4], &[0., 0., 1.]]))?;
        let mut marks = marks(&[0, 2, 1, 2]);
        marks.weights = vec![0.5, 0.9, 0.0, 0.2];
        check_gradient(|q| sample_to_prototype_loss(q, &c, &marks, 0.2))
    }

    #[test]
    fn without_reliable_images_it_is_exactly_zero_and_reaches_nothing() -> Result<()> {
        let q = Var::from_tensor(&Tensor::from_slice(&Q, (4, 3), &Cpu)?)?;
        let mut none = marks(&[0, 1, 2, 0]);
        none.weights = vec![0.0; 4];
        let c = Tensor::eye(3, DType::F64, &Cpu)?;
        let loss = sample_to_prototype_loss(&q, &c, &none, 0.2)?;
        assert_eq!(loss.to_scalar::<f64>()?, 0.0);
        assert!(loss.backward()?.get(&q).is_none());
        Ok(())
    }

    #[test]
    fn only_reliable_images_have_a_cluster() {
        let mut some = marks(&[0, 3, 1]);
        some.weights = vec![0.3, 0.0, 0.9];
        assert_eq!(some.reliable(), [Some(0), None, Some(1)]);
    }

    #[test]
    fn numbers_of_clusters_and_order_of_images_have_no_meaning() -> Result<()> {
        let q = Tensor::from_slice(&Q, (4, 3), &Cpu)?;
        let c = unit_rows(&matrix(&[&[1., 0.2, 0.], &[-0.3, 1., 0.4], &[0., 0., 1.]]))?;
        let mut here = marks(&[0, 2, 1, 2]);
        here.weights = vec![0.5, 0.9, 0.3, 0.2];
        let want = value(sample_to_prototype_loss(&q, &c, &here, 0.2));

        // Cluster 0 becomes 2, 1 becomes 0, 2 becomes 1.
        let renamed = Marks { pseudo_labels: vec![2, 1, 0, 1], weights: here.weights.clone() };
        let c_renamed = permuted(&c, &[1, 2, 0]);
        assert_close(value(sample_to_prototype_loss(&q, &c_renamed, &renamed, 0.2)), want);

        let order = [2, 0, 3, 1];
        let turned = Marks {
            pseudo_labels: order.map(|i| here.pseudo_labels[i as usize]).to_vec(),
            weights: order.map(|i| here.weights[i as usize]).to_vec(),
        };
        let got = value(sample_to_prototype_loss(&permuted(&q, &order), &c, &turned, 0.2));
        assert_close(got, want);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let q = Tensor::from_slice(&Q, (4, 3), &Cpu)?;
        let c = Tensor::eye(3, DType::F64, &Cpu)?;
        assert!(sample_to_prototype_loss(&q, &c, &marks(&[0, 1]), 0.2).is_err());
        assert!(sample_to_prototype_loss(&q, &c.narrow(1, 0, 2)?, &marks(&[0; 4]), 0.2).is_err());
        assert!(sample_to_prototype_loss(&q, &c, &marks(&[0, 1, 2, 3]), 0.2).is_err());
        Ok(())
    }
}
