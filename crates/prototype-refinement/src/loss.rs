//! What refinement adds to the regression loss: each image toward the prototype of its cluster,
//! and the clusters apart from each other.
//!
//! Both losses see an online projection before the predictor and without noise, and take it to
//! unit length themselves. Both act on the reliable images of a batch alone, which are those of
//! weight above 0. Where there are none they are exactly 0 and reach nothing.

use candle_core::{D, Result, Tensor, bail};
use training::ops::{log_softmax, log_sum_exp, pick, unit_rows};

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
        &log_softmax(&logits.broadcast_add(&without_absent(&prototypes)?)?)?,
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

/// How near the clusters of a batch are to each other, for the online network, and how far each is
/// from itself in the target network.
///
/// With `μₖ`, `μ'ₖ` the unit-length means of cluster `k`'s unit-length projections in the online
/// and the target network, and `S` the clusters with at least one reliable image in the batch:
/// `L_ps = 1/|S| Σ_{k∈S} [−μₖ·μ'ₖ/τ + ln(exp(μₖ·μ'ₖ/τ) + Σ_{j∈S, j≠k} exp(μₖ·μⱼ/τ))]`
/// (prototype scattering, Huang et al. 2023, arXiv:2111.11821). Clusters that are absent are left
/// out, where the authors' program sets their logits to −10. That this loss, on the reliable images
/// alone, is the paper's cluster constraint is our reading.
///
/// - `projection`: output of the online projector for one view, `(B, P)`. Its gradient passes
///   through both sides of `μₖ·μⱼ`.
/// - `target`: output of the target projector for the other view, `(B, P)`. A constant.
/// - `marks`: clusters, and which images are reliable; weights above 0 count alike.
/// - `temperature`: τ.
///
/// Returns a scalar in nats, at least 0; 0 when fewer than two clusters are there.
///
/// # Errors
///
/// The shapes do not fit.
pub fn scatter_loss(
    projection: &Tensor,
    target: &Tensor,
    marks: &Marks,
    temperature: f64,
) -> Result<Tensor> {
    let (b, _) = projection.dims2()?;
    if target.dims() != projection.dims() {
        bail!(
            "scatter_loss: projections are {:?} but the target's {:?}",
            projection.dims(),
            target.dims()
        )
    }
    marks.check("scatter_loss", b)?;
    let Some((clusters, online)) = cluster_means(projection, marks)? else {
        return zero_like(projection);
    };
    let Some((_, target)) = cluster_means(&target.detach(), marks)? else {
        return zero_like(projection);
    };
    if clusters.len() < 2 {
        return zero_like(projection);
    }

    let own = ((&online * target)?.sum_keepdim(1)? / temperature)?;
    let others = (online.matmul(&online.t()?)? / temperature)?;
    let diagonal = Tensor::eye(clusters.len(), projection.dtype(), projection.device())?;
    let logits = ((others * diagonal.affine(-1., 1.)?)? + diagonal.broadcast_mul(&own)?)?;
    (log_sum_exp(&logits)? - own)?.mean_all()
}

/// `μ`: unit-length means of the unit-length rows of each cluster, over the reliable images.
///
/// - `rows`: `(B, P)`. The gradient passes.
///
/// Returns the clusters that have a reliable image, ascending, and `(|S|, P)`; `None` where there
/// is no such cluster.
///
/// # Errors
///
/// The device refuses.
pub(crate) fn cluster_means(rows: &Tensor, marks: &Marks) -> Result<Option<(Vec<u32>, Tensor)>> {
    let reliable = |i: &usize| marks.weights[*i] > 0.0;
    let images = 0..marks.weights.len();
    let mut clusters: Vec<u32> =
        images.clone().filter(reliable).map(|i| marks.pseudo_labels[i]).collect();
    clusters.sort_unstable();
    clusters.dedup();
    if clusters.is_empty() {
        return Ok(None);
    }
    // A product with this matrix takes the means.
    let mut averages = Vec::with_capacity(clusters.len() * images.len());
    for &cluster in &clusters {
        let member = |i: &usize| reliable(i) && marks.pseudo_labels[*i] == cluster;
        let share = 1.0 / images.clone().filter(member).count() as f64;
        averages.extend(images.clone().map(|i| if member(&i) { share } else { 0.0 }));
    }
    let shape = (clusters.len(), images.len());
    let averages = Tensor::from_vec(averages, shape, rows.device())?.to_dtype(rows.dtype())?;
    Ok(Some((clusters, unit_rows(&averages.matmul(&unit_rows(rows)?)?)?)))
}

impl Marks {
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

    fn target() -> Tensor {
        matrix(&[&[0.1, -1., 0.2], &[1., 0.4, 0.3], &[0.2, 0.8, 0.9], &[-0.6, 0.1, 1.]])
    }

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        let c = unit_rows(&matrix(&[&[1., 0.2, 0.], &[-0.3, 1., 0.4], &[0., 0., 1.]]))?;
        let mut marks = marks(&[0, 2, 1, 2]);
        marks.weights = vec![0.5, 0.9, 0.0, 0.2];
        check_gradient(|q| sample_to_prototype_loss(q, &c, &marks, 0.2))?;
        check_gradient(|q| scatter_loss(q, &target(), &marks, 0.5))?;
        marks.weights[2] = 0.1;
        check_gradient(|q| scatter_loss(q, &target(), &marks, 0.5))
    }

    #[test]
    fn scatter_values_match_hand_computation() -> Result<()> {
        let eye = Tensor::eye(3, DType::F64, &Cpu)?;
        assert_close(value(scatter_loss(&eye, &eye, &marks(&[0, 1, 2]), 0.5)), 0.239545);
        for (k, even, collapsed) in [
            (4, 0.189339, 4f64.ln()),
            (10, 0.680726, 10f64.ln()),
            (15, 0.971713, 15f64.ln()),
            (20, 1.198294, 20f64.ln()),
        ] {
            let labels: Vec<u32> = (0..k as u32).collect();
            let mu = simplex(k);
            assert_close(value(scatter_loss(&mu, &mu, &marks(&labels), 0.5)), even);
            let same = Tensor::ones((k, 3), DType::F64, &Cpu)?;
            assert_close(value(scatter_loss(&same, &same, &marks(&labels), 0.5)), collapsed);
        }
        Ok(())
    }

    /// Case 2 of ProPos: means of unit rows, at unit length again. With the two means as clusters
    /// of their own, the loss is the same.
    #[test]
    fn prototypes_are_unit_means_of_unit_rows() -> Result<()> {
        let rows = matrix(&[&[2., 0.], &[0., 0.5], &[-3., 0.], &[-1., -1.]]);
        let means = matrix(&[&[1., 1.], &[-0.9238795, -0.3826834]]);
        let of_rows = value(scatter_loss(&rows, &rows, &marks(&[0, 0, 1, 1]), 0.5));
        let of_means = value(scatter_loss(&means, &means, &marks(&[0, 1]), 0.5));
        assert_close(of_rows, of_means);

        let (clusters, means) = cluster_means(&rows, &marks(&[0, 0, 1, 1]))?.expect("two clusters");
        assert_eq!(clusters, [0, 1]);
        let diagonal = 0.5f64.sqrt(); // The .707107 of ProPos, case 2.
        let want = [diagonal, diagonal, -0.923880, -0.382683];
        for (got, want) in means.flatten_all()?.to_vec1::<f64>()?.into_iter().zip(want) {
            assert_close(got, want);
        }
        Ok(())
    }

    /// Case 5 of ProPos, with the absent cluster left out.
    #[test]
    fn absent_clusters_are_left_out_of_rows_and_columns() {
        let mu = matrix(&[&[1., 0.], &[0., 1.], &[-1., 0.]]);
        let target = matrix(&[&[0.6, 0.8], &[0., 1.], &[-0.8, 0.6]]);
        assert_close(value(scatter_loss(&mu, &target, &marks(&[0, 1, 2]), 0.5)), 0.246684);

        // Images that are not reliable, of a cluster of their own and of others, change nothing.
        let more = matrix(&[&[1., 0.], &[0.3, 0.3], &[0., 1.], &[-1., 0.], &[9., 1.]]);
        let more_target = matrix(&[&[0.6, 0.8], &[1., 2.], &[0., 1.], &[-0.8, 0.6], &[1., 1.]]);
        let mut some = marks(&[0, 3, 1, 2, 1]);
        some.weights = vec![0.3, 0.0, 0.9, 1.0, 0.0];
        assert_close(value(scatter_loss(&more, &more_target, &some, 0.5)), 0.246684);
    }

    #[test]
    fn one_cluster_or_none_is_exactly_zero_and_reaches_nothing() -> Result<()> {
        let q = Var::from_tensor(&Tensor::from_slice(&Q, (4, 3), &Cpu)?)?;
        let mut none = marks(&[0, 1, 2, 0]);
        none.weights = vec![0.0; 4];
        let c = Tensor::eye(3, DType::F64, &Cpu)?;
        for loss in [
            scatter_loss(&q, &target(), &marks(&[1, 1, 1, 1]), 0.5)?,
            scatter_loss(&q, &target(), &none, 0.5)?,
            sample_to_prototype_loss(&q, &c, &none, 0.2)?,
        ] {
            assert_eq!(loss.to_scalar::<f64>()?, 0.0);
            assert!(loss.backward()?.get(&q).is_none());
        }
        Ok(())
    }

    /// Case 6 of ProPos.
    #[test]
    fn scatter_gradient_is_the_known_one() -> Result<()> {
        let q = Var::from_tensor(&matrix(&[&[1., 0.], &[1., 1.], &[0., 2.], &[-1., 1.]]))?;
        let k = Var::from_tensor(&matrix(&[&[2., 0.], &[1., 0.5], &[-0.5, 1.], &[-1., 1.]]))?;
        let loss = scatter_loss(&q, &k, &marks(&[0, 0, 1, 1]), 0.5)?;
        assert_close(loss.to_scalar()?, 0.131750);
        let gradients = loss.backward()?;
        let got = gradients.get(&q).expect("a gradient").to_vec2::<f64>()?;
        let want = [[0., 0.133205], [-0.066602, 0.066602], [0.068895, 0.], [0.068895, 0.068895]];
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert_close(*got, *want);
        }
        assert!(gradients.get(&k).is_none(), "the target is a constant");
        Ok(())
    }

    #[test]
    fn numbers_of_clusters_and_order_of_images_have_no_meaning() -> Result<()> {
        let q = Tensor::from_slice(&Q, (4, 3), &Cpu)?;
        let c = unit_rows(&matrix(&[&[1., 0.2, 0.], &[-0.3, 1., 0.4], &[0., 0., 1.]]))?;
        let mut here = marks(&[0, 2, 1, 2]);
        here.weights = vec![0.5, 0.9, 0.3, 0.2];
        let losses = |q: &Tensor, target: &Tensor, c: &Tensor, marks: &Marks| {
            [
                value(sample_to_prototype_loss(q, c, marks, 0.2)),
                value(scatter_loss(q, target, marks, 0.5)),
            ]
        };
        let want = losses(&q, &target(), &c, &here);

        // Cluster 0 becomes 2, 1 becomes 0, 2 becomes 1.
        let renamed = Marks { pseudo_labels: vec![2, 1, 0, 1], weights: here.weights.clone() };
        let got = losses(&q, &target(), &permuted(&c, &[1, 2, 0]), &renamed);
        (0..2).for_each(|i| assert_close(got[i], want[i]));

        let order = [2, 0, 3, 1];
        let turned = Marks {
            pseudo_labels: order.map(|i| here.pseudo_labels[i as usize]).to_vec(),
            weights: order.map(|i| here.weights[i as usize]).to_vec(),
        };
        let got = losses(&permuted(&q, &order), &permuted(&target(), &order), &c, &turned);
        (0..2).for_each(|i| assert_close(got[i], want[i]));
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let q = Tensor::from_slice(&Q, (4, 3), &Cpu)?;
        let c = Tensor::eye(3, DType::F64, &Cpu)?;
        assert!(sample_to_prototype_loss(&q, &c, &marks(&[0, 1]), 0.2).is_err());
        assert!(sample_to_prototype_loss(&q, &c.narrow(1, 0, 2)?, &marks(&[0; 4]), 0.2).is_err());
        assert!(sample_to_prototype_loss(&q, &c, &marks(&[0, 1, 2, 3]), 0.2).is_err());
        assert!(scatter_loss(&q, &c, &marks(&[0, 1, 2, 0]), 0.5).is_err());
        assert!(scatter_loss(&q, &q, &marks(&[0]), 0.5).is_err());
        Ok(())
    }
}
