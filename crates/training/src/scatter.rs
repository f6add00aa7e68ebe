//! Prototype scattering: pushes the clusters of a batch apart, and makes each alike in both views.

use candle_core::{Result, Tensor, bail};

use crate::ops::unit_rows;

/// How the sum of [`scatter_loss`] treats clusters without an image in the batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Absent {
    /// They are left out of the sum.
    LeftOut,
    /// Each adds a constant, as in the authors' program; with −10 and a temperature of .5 the loss
    /// differs from that without them by about 10⁻⁵.
    Constant {
        /// Number of clusters `K`, absent ones included.
        clusters: usize,
        /// The logit of an absent one, already divided by the temperature.
        logit: f64,
    },
}

/// Measures how close the clusters of a batch are to each other in the online network, and how far
/// each is from the same cluster in the target network.
///
/// With `μₖ`, `μ'ₖ` the unit-length means of cluster `k`'s unit-length projections in the online
/// and the target network, and `S` the clusters with at least one image in the batch:
/// `L_ps = 1/|S| Σ_{k∈S} [−μₖ·μ'ₖ/τ + ln(exp(μₖ·μ'ₖ/τ) + Σ_{j∈S, j≠k} exp(μₖ·μⱼ/τ))]`
/// (prototype scattering, Huang et al. 2023, arXiv:2111.11821); `absent` says what the other
/// clusters add to the sum.
///
/// - `projection`: output of the online projector for one view, `(B, P)`, before the predictor and
///   without noise. Its gradient passes through both sides of `μₖ·μⱼ`.
/// - `target`: output of the target projector for the other view, `(B, P)`. A constant.
/// - `clusters`: of each image, `B`; images without a cluster are left out.
/// - `temperature`: τ.
///
/// Returns a scalar in nats, at least 0; 0 when the batch has fewer than two clusters.
///
/// # Errors
///
/// The shapes do not fit.
pub fn scatter_loss(
    projection: &Tensor,
    target: &Tensor,
    clusters: &[Option<u32>],
    temperature: f64,
    absent: Absent,
) -> Result<Tensor> {
    if target.dims() != projection.dims() {
        bail!(
            "scatter_loss: projections are {:?} but the target's {:?}",
            projection.dims(),
            target.dims()
        )
    }
    let zero = || Tensor::zeros((), projection.dtype(), projection.device()); // Reaches nothing.
    let Some((present, online)) = cluster_means(projection, clusters)? else { return zero() };
    let Some((_, target)) = cluster_means(&target.detach(), clusters)? else { return zero() };
    if present.len() < 2 {
        return zero();
    }

    let own = ((&online * target)?.sum_keepdim(1)? / temperature)?;
    let others = (online.matmul(&online.t()?)? / temperature)?;
    let diagonal = Tensor::eye(present.len(), projection.dtype(), projection.device())?;
    let mut logits = ((others * diagonal.affine(-1., 1.)?)? + diagonal.broadcast_mul(&own)?)?;
    if let Some(constant) = absent.sum(present.len()) {
        let column = Tensor::full(constant, own.dims2()?, own.device())?.to_dtype(own.dtype())?;
        logits = Tensor::cat(&[logits, column], 1)?;
    }
    (logits.log_sum_exp(1)? - own.squeeze(1)?)?.mean_all()
}

impl Absent {
    /// The logarithm of what all absent clusters add to the sum.
    fn sum(self, present: usize) -> Option<f64> {
        match self {
            Self::Constant { clusters, logit } if clusters > present => {
                let sum = logit + ((clusters - present) as f64).ln();
                sum.is_finite().then_some(sum)
            }
            _ => None,
        }
    }
}

/// `μ`: unit-length means of the unit-length rows of each cluster.
///
/// - `rows`: `(B, P)`. The gradient passes.
/// - `clusters`: of each row, `B`; rows without a cluster are left out.
///
/// Returns the clusters of the batch, ascending, and `(|S|, P)`; `None` if it has none.
///
/// # Errors
///
/// `rows` is not a matrix of `B` rows.
pub fn cluster_means(
    rows: &Tensor,
    clusters: &[Option<u32>],
) -> Result<Option<(Vec<u32>, Tensor)>> {
    let (images, _) = rows.dims2()?;
    if clusters.len() != images {
        bail!("cluster_means: {images} rows but clusters for {}", clusters.len())
    }
    let mut present: Vec<u32> = clusters.iter().flatten().copied().collect();
    present.sort_unstable();
    present.dedup();
    if present.is_empty() {
        return Ok(None);
    }
    // A product with this matrix takes the means.
    let mut averages = Vec::with_capacity(present.len() * images);
    for &cluster in &present {
        let member = |&other: &Option<u32>| other == Some(cluster);
        let share = 1.0 / clusters.iter().filter(|other| member(other)).count() as f64;
        averages.extend(clusters.iter().map(|other| if member(other) { share } else { 0.0 }));
    }
    let shape = (present.len(), images);
    let averages = Tensor::from_vec(averages, shape, rows.device())?.to_dtype(rows.dtype())?;
    Ok(Some((present, unit_rows(&averages.matmul(&unit_rows(rows)?)?)?)))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device::Cpu, Var};

    use super::*;

    fn matrix(rows: &[&[f64]]) -> Tensor {
        let flat: Vec<f64> = rows.iter().flat_map(|row| row.iter().copied()).collect();
        Tensor::from_vec(flat, (rows.len(), rows[0].len()), &Cpu).expect("rows of one width")
    }

    fn all(clusters: &[u32]) -> Vec<Option<u32>> {
        clusters.iter().copied().map(Some).collect()
    }

    /// The loss at τ = .5 with absent clusters left out.
    fn scatter(projection: &Tensor, target: &Tensor, clusters: &[u32]) -> Result<Tensor> {
        scatter_loss(projection, target, &all(clusters), 0.5, Absent::LeftOut)
    }

    fn value(loss: Result<Tensor>) -> f64 {
        loss.and_then(|loss| loss.to_scalar()).expect("a scalar")
    }

    #[track_caller]
    fn assert_close(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
    }

    /// Prototypes spread evenly: the corners of a simplex, `(K, K)`.
    fn simplex(k: usize) -> Tensor {
        let mut rows = vec![-1.0 / k as f64; k * k];
        (0..k).for_each(|i| rows[i * k + i] += 1.0);
        unit_rows(&Tensor::from_vec(rows, (k, k), &Cpu).expect("square")).expect("rows")
    }

    /// ProPos, case 3; ProPos, case 4.
    #[test]
    fn values_match_hand_computation() -> Result<()> {
        let eye = Tensor::eye(3, DType::F64, &Cpu)?;
        assert_close(value(scatter(&eye, &eye, &[0, 1, 2])), 0.239545);
        for (k, even, collapsed) in [
            (4, 0.189339, 4f64.ln()),
            (10, 0.680726, 10f64.ln()),
            (15, 0.971713, 2.708050),
            (20, 1.198294, 2.995732),
        ] {
            let clusters: Vec<u32> = (0..k as u32).collect();
            let mu = simplex(k);
            assert_close(value(scatter(&mu, &mu, &clusters)), even);
            let same = Tensor::ones((k, 3), DType::F64, &Cpu)?;
            assert_close(value(scatter(&same, &same, &clusters)), collapsed);
        }
        Ok(())
    }

    /// ProPos, case 2: means of unit rows, at unit length again. With the two means as clusters
    /// of their own, the loss is the same.
    #[test]
    fn prototypes_are_unit_means_of_unit_rows() -> Result<()> {
        let rows = matrix(&[&[2., 0.], &[0., 0.5], &[-3., 0.], &[-1., -1.]]);
        let means = matrix(&[&[1., 1.], &[-0.9238795, -0.3826834]]);
        let of_rows = value(scatter(&rows, &rows, &[0, 0, 1, 1]));
        assert_close(of_rows, value(scatter(&means, &means, &[0, 1])));

        let (present, means) = cluster_means(&rows, &all(&[0, 0, 1, 1]))?.expect("two clusters");
        assert_eq!(present, [0, 1]);
        let diagonal = 0.5f64.sqrt(); // The .707107 of the case.
        let want = [diagonal, diagonal, -0.923880, -0.382683];
        for (got, want) in means.flatten_all()?.to_vec1::<f64>()?.into_iter().zip(want) {
            assert_close(got, want);
        }
        assert!(cluster_means(&rows, &[None; 4])?.is_none());
        Ok(())
    }

    /// ProPos, case 5: three of four clusters are there.
    #[test]
    fn absent_clusters_are_left_out_or_a_small_constant() {
        let mu = matrix(&[&[1., 0.], &[0., 1.], &[-1., 0.]]);
        let target = matrix(&[&[0.6, 0.8], &[0., 1.], &[-0.8, 0.6]]);
        let loss = |absent| value(scatter_loss(&mu, &target, &all(&[0, 1, 2]), 0.5, absent));
        let constant = |clusters, logit| loss(Absent::Constant { clusters, logit });
        assert_close(loss(Absent::LeftOut), 0.246684);
        assert!((constant(4, -10.) - 0.246692).abs() < 5e-7, "{}", constant(4, -10.));
        assert!((loss(Absent::LeftOut) - 0.246684).abs() < 5e-7);
        // The mean of the losses by row, of logits 1.2, 2 and 1.6 on the diagonal.
        assert!((constant(4, -10.) - (0.294139 + 0.239550 + 0.206387) / 3.).abs() < 1e-6);
        assert_eq!(constant(4, f64::NEG_INFINITY), loss(Absent::LeftOut));
        assert_eq!(constant(3, -10.), loss(Absent::LeftOut), "none is absent");
        // By hand: row 1 of logits 1.2, 0, -2, and twice -1.
        let row = |own: f64, others: [f64; 2]| {
            let sum = own.exp() + others.iter().map(|x| x.exp()).sum::<f64>();
            (sum + 2. * (-1f64).exp()).ln() - own
        };
        let want = (row(1.2, [0., -2.]) + row(2., [0., 0.]) + row(1.6, [-2., 0.])) / 3.;
        assert!((constant(5, -1.) - want).abs() < 1e-12);
    }

    #[test]
    fn images_without_a_cluster_change_nothing() {
        let more = matrix(&[&[1., 0.], &[0.3, 0.3], &[0., 1.], &[-1., 0.], &[9., 1.]]);
        let target = matrix(&[&[0.6, 0.8], &[1., 2.], &[0., 1.], &[-0.8, 0.6], &[1., 1.]]);
        let clusters = [Some(0), None, Some(1), Some(2), None];
        let loss = scatter_loss(&more, &target, &clusters, 0.5, Absent::LeftOut);
        assert_close(value(loss), 0.246684);
    }

    const Q: [f64; 12] = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4, 0.5, 0.9, 0.2, -0.7, 0.4, 1.1];

    fn target() -> Tensor {
        matrix(&[&[0.1, -1., 0.2], &[1., 0.4, 0.3], &[0.2, 0.8, 0.9], &[-0.6, 0.1, 1.]])
    }

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        let at = |q: &[f64]| Tensor::from_slice(q, (4, 3), &Cpu);
        let constant = Absent::Constant { clusters: 5, logit: -1. };
        for (clusters, absent) in [
            ([Some(0), Some(2), None, Some(2)], Absent::LeftOut),
            ([Some(0), Some(2), Some(1), Some(2)], Absent::LeftOut),
            ([Some(0), Some(2), Some(1), Some(2)], constant),
        ] {
            let loss = |q: &Tensor| scatter_loss(q, &target(), &clusters, 0.5, absent);
            let q = Var::from_tensor(&at(&Q)?)?;
            let gradients = loss(&q)?.backward()?;
            let analytic = gradients.get(&q).expect("a gradient").flatten_all()?;
            for (i, got) in analytic.to_vec1::<f64>()?.into_iter().enumerate() {
                let (mut up, mut down) = (Q, Q);
                up[i] += 1e-6;
                down[i] -= 1e-6;
                let want = (value(loss(&at(&up)?)) - value(loss(&at(&down)?))) / 2e-6;
                assert!((got - want).abs() < 1e-8, "d/dq[{i}]: got {got}, want {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn one_cluster_or_none_is_exactly_zero_and_reaches_nothing() -> Result<()> {
        let q = Var::from_tensor(&Tensor::from_slice(&Q, (4, 3), &Cpu)?)?;
        for clusters in [[Some(1); 4], [None; 4]] {
            let loss = scatter_loss(&q, &target(), &clusters, 0.5, Absent::LeftOut)?;
            assert_eq!(loss.to_scalar::<f64>()?, 0.0);
            assert!(loss.backward()?.get(&q).is_none());
        }
        Ok(())
    }

    /// ProPos, case 6.
    #[test]
    fn gradient_is_the_known_one_and_the_target_has_none() -> Result<()> {
        let q = Var::from_tensor(&matrix(&[&[1., 0.], &[1., 1.], &[0., 2.], &[-1., 1.]]))?;
        let k = Var::from_tensor(&matrix(&[&[2., 0.], &[1., 0.5], &[-0.5, 1.], &[-1., 1.]]))?;
        let loss = scatter(&q, &k, &[0, 0, 1, 1])?;
        assert_close(loss.to_scalar()?, 0.131750);
        let gradients = loss.backward()?;
        let got = gradients.get(&q).expect("a gradient").to_vec2::<f64>()?;
        let want = [[0., 0.133205], [-0.066602, 0.066602], [0.068895, 0.], [0.068895, 0.068895]];
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert_close(*got, *want);
        }
        for (row, got) in q.to_vec2::<f64>()?.iter().zip(&got) {
            assert!((row[0] * got[0] + row[1] * got[1]).abs() < 1e-12, "lengths do not matter");
        }
        assert!(gradients.get(&k).is_none(), "the target is a constant");
        Ok(())
    }

    /// ProPos, case 14 in part.
    #[test]
    fn numbers_of_clusters_and_order_of_images_have_no_meaning() -> Result<()> {
        let q = Tensor::from_slice(&Q, (4, 3), &Cpu)?;
        let want = value(scatter(&q, &target(), &[0, 2, 1, 2]));
        assert_close(value(scatter(&q, &target(), &[2, 1, 0, 1])), want);
        let order = Tensor::new(&[2u32, 0, 3, 1], &Cpu)?;
        let (q, target) = (q.index_select(&order, 0)?, target().index_select(&order, 0)?);
        assert_close(value(scatter(&q, &target, &[1, 0, 2, 2])), want);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let q = Tensor::from_slice(&Q, (4, 3), &Cpu)?;
        let eye = Tensor::eye(3, DType::F64, &Cpu)?;
        assert!(scatter(&q, &eye, &[0, 1, 2, 0]).is_err());
        assert!(scatter(&q, &q, &[0]).is_err());
        Ok(())
    }
}
