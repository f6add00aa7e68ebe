//! The four terms of the loss, and the targets of the first.
//!
//! `B` features `z` of unit length, `(B, D)`; `K` centroids, constants. The predecessor's code
//! (ICBPC) settles the discrepancy and the distance of a pair; how the terms go together and the
//! last one are our reading of ICBPL's abstract.

use candle_core::{D, DType, Result, Tensor};
use training::ops::{pick, sum};

/// The centroid of each of `count` targets: all centroids in turn, again and again.
pub fn targets(clusters: usize, count: usize) -> Vec<u32> {
    (0..count).map(|place| (place % clusters) as u32).collect()
}

/// The targets of a batch: rows of `centroids` `(K, D)`, `(B, D)`.
///
/// # Errors
///
/// `centroids` is not a matrix.
pub fn target_rows(centroids: &Tensor, count: usize) -> Result<Tensor> {
    let (clusters, _) = centroids.dims2()?;
    centroids.index_select(&Tensor::new(targets(clusters, count), centroids.device())?, 0)
}

/// Maximum mean discrepancy between features and targets: how far their distributions are apart,
/// whatever the order of the rows.
///
/// With `X = [S; T]`, squared distances `d` of all pairs of rows and their mean
/// `w₀ = Σ d / ((2B)² − 2B)`, a constant:
///
/// `k = Σ_{i=0..4} exp(−d / (w₀ 2ⁱ / 4))`, `L = mean(k_SS + k_TT − k_ST − k_TS)`.
///
/// - `features`: S, unit rows, `(B, D)`.
/// - `targets`: T, unit rows, `(B, D)`; constants.
///
/// Returns a scalar of at least 0, up to rounding; 0 where both have the same rows in any order.
///
/// # Errors
///
/// The shapes differ.
pub fn discrepancy(features: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let distances = squared_distances(features, targets)?;
    discrepancy_with(&distances, &bandwidth(&distances)?)
}

/// `d`: squared distances of all rows of `[S; T]`, `2 − 2 cos` for rows of unit length, never
/// below 0: `(2B, 2B)`.
///
/// # Errors
///
/// The shapes differ.
pub fn squared_distances(features: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if features.dims() != targets.dims() {
        candle_core::bail!(
            "discrepancy: features {:?} but targets {:?}",
            features.dims(),
            targets.dims()
        )
    }
    let all = Tensor::cat(&[features, &targets.detach()], 0)?;
    all.matmul(&all.t()?)?.affine(-2., 2.)?.maximum(0f64)
}

/// `w₀`, the mean squared distance of two different rows: a constant, so that no gradient can
/// shrink the loss by stretching the scale.
///
/// # Errors
///
/// `distances` is not square.
pub fn bandwidth(distances: &Tensor) -> Result<Tensor> {
    let (n, _) = distances.dims2()?;
    let pairs = (n * n - n) as f64;
    distances.detach().sum_all()? / pairs
}

/// [`discrepancy`] for a given bandwidth.
///
/// # Errors
///
/// `distances` is not square with an even number of rows.
pub fn discrepancy_with(distances: &Tensor, bandwidth: &Tensor) -> Result<Tensor> {
    let (n, _) = distances.dims2()?;
    let half = n / 2;
    let kernel = kernel(distances, bandwidth)?;
    // +1 for pairs of one set, −1 for pairs across.
    let side: Vec<f64> = (0..n).map(|row| if row < half { 1. } else { -1. }).collect();
    let side = Tensor::from_vec(side, (n, 1), distances.device())?.to_dtype(kernel.dtype())?;
    let signs = side.matmul(&side.t()?)?;
    (kernel * signs)?.sum_all()? / (half * half) as f64
}

/// Five Gaussians, each twice as wide as the one before, summed.
fn kernel(distances: &Tensor, bandwidth: &Tensor) -> Result<Tensor> {
    // All rows in one place have no distance, and any bandwidth.
    let scaled = distances.broadcast_div(&bandwidth.maximum(1e-12)?)?;
    let gaussian = |width: f64| (&scaled * (-1. / width))?.exp();
    let terms = [0.25, 0.5, 1., 2., 4.].map(gaussian).into_iter().collect::<Result<Vec<_>>>()?;
    sum(terms)
}

/// Weights of the parts of a pair's distance; 3 and 8 are published.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairWeights {
    /// Of the cosine part.
    pub cosine: f64,
    /// Of the mean absolute difference.
    pub absolute: f64,
}

/// The distance of two features that should be equal ("composite cosine distance"):
/// `c · mean(2.1 − 2 cos(a, b)) + l · mean |a − b|`, over images, and over images and dimensions.
/// Both sides learn.
///
/// - `a`, `b`: unit rows, `(B, D)`.
///
/// Returns a scalar; `0.1 c` for equal features.
///
/// # Errors
///
/// The shapes differ.
pub fn pair_distance(a: &Tensor, b: &Tensor, weights: PairWeights) -> Result<Tensor> {
    let cosine = (a * b)?.sum(D::Minus1)?.affine(-2., 2.1)?.mean_all()?;
    let absolute = (a - b)?.abs()?.mean_all()?;
    (cosine * weights.cosine)? + (absolute * weights.absolute)?
}

/// Pulls each feature to its nearest centroid: `mean(1 − max_k cos(z, c_k))`.
///
/// The centroid is the one of lowest index among equals; the gradient flows through its cosine
/// alone.
///
/// Returns a scalar in `[0, 2]`.
///
/// # Errors
///
/// The widths differ.
pub fn least_distance(features: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    let cosines = features.matmul(&centroids.detach().t()?)?;
    let nearest = cosines.detach().argmax(D::Minus1)?;
    pick(&cosines, &nearest)?.affine(-1., 1.)?.mean_all()
}

/// How many centroids are the nearest one of some feature: a scalar of f32 from 1 to K, for the log.
/// Fewer than K in a batch of several times K pictures show that groups share a centroid.
///
/// # Errors
///
/// The widths differ.
pub fn nearest_centroids(features: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    let nearest = features.detach().matmul(&centroids.t()?)?.argmax_keepdim(D::Minus1)?;
    let (clusters, _) = centroids.dims2()?;
    let numbers = Tensor::arange(0u32, clusters as u32, features.device())?.unsqueeze(0)?;
    nearest.broadcast_eq(&numbers)?.to_dtype(DType::F32)?.max(0)?.sum_all()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};
    use training::ops::unit_rows;

    use super::*;
    use crate::Centroids;

    fn rows<const W: usize>(rows: &[[f64; W]]) -> Tensor {
        let flat: Vec<f64> = rows.iter().flatten().copied().collect();
        Tensor::from_vec(flat, (rows.len(), W), &Cpu).expect("rows")
    }

    fn scalar(tensor: &Tensor) -> f64 {
        tensor.to_scalar().expect("a scalar")
    }

    /// Bandwidth and discrepancy.
    fn both(s: &Tensor, t: &Tensor) -> (f64, f64) {
        let distances = squared_distances(s, t).expect("distances");
        (scalar(&bandwidth(&distances).expect("w₀")), scalar(&discrepancy(s, t).expect("L")))
    }

    fn assert_both(got: (f64, f64), bandwidth: f64, value: f64) {
        assert!((got.0 - bandwidth).abs() < 1e-6, "bandwidth {}, want {bandwidth}", got.0);
        assert!((got.1 - value).abs() < 1e-8, "value {}, want {value}", got.1);
    }

    /// ICBPL, case T4.
    #[test]
    fn discrepancy_is_blind_to_order_side_and_rotation() -> Result<()> {
        let s = rows(&[[1., 0.], [0.6, 0.8], [0., 1.], [-0.8, 0.6]]);
        let turned = rows(&[[0., 1.], [1., 0.], [-0.8, 0.6], [0.6, 0.8]]);
        assert!(scalar(&discrepancy(&s, &turned)?).abs() < 1e-12);
        let t = rows(&[[0.28, 0.96], [-1., 0.], [0., -1.], [0.6, -0.8]]);
        let value = scalar(&discrepancy(&s, &t)?);
        assert!(value > 0.1);
        assert!((scalar(&discrepancy(&t, &s)?) - value).abs() < 1e-12);
        let rotation = rows(&[[0.8, 0.6], [-0.6, 0.8]]);
        let moved = discrepancy(&s.matmul(&rotation)?, &t.matmul(&rotation)?)?;
        assert!((scalar(&moved) - value).abs() < 1e-12);
        let turned_t = rows(&[[0.6, -0.8], [0., -1.], [0.28, 0.96], [-1., 0.]]);
        for (s, t) in [(&turned, &t), (&s, &turned_t), (&turned, &turned_t)] {
            assert!((scalar(&discrepancy(s, t)?) - value).abs() < 1e-12);
        }
        assert!(discrepancy(&s, &t.narrow(0, 0, 2)?).is_err());
        Ok(())
    }

    /// ICBPL, case T5; ICBPL, case T6.
    #[test]
    fn discrepancies_of_two_rows_have_the_specified_values() -> Result<()> {
        let opposite = both(&rows(&[[1., 0.], [0., 1.]]), &rows(&[[-1., 0.], [0., -1.]]));
        assert_both(opposite, 2.666667, 3.564948188);
        let (s, t) = (rows(&[[1., 0.], [0.6, 0.8]]), rows(&[[1., 0.], [-1., 0.]]));
        assert_both(both(&s, &t), 2.133333, 1.782474094);
        let distances = squared_distances(&s, &t)?;
        let row = kernel(&distances, &bandwidth(&distances)?)?.get(0)?.to_vec1::<f64>()?;
        for (got, want) in row.iter().zip([5., 3.122325, 5., 1.194815]) {
            assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
        }
        Ok(())
    }

    /// ICBPL, case T7.
    #[test]
    fn discrepancies_to_two_centroids_have_the_specified_values() -> Result<()> {
        let centroids = rows(&[[1., 0.], [-1., 0.]]);
        let targets = target_rows(&centroids, 4)?;
        let features: Vec<[f64; 2]> =
            [0.1f64, 0.2, 1.7, 3.].map(|angle| [angle.cos(), angle.sin()]).to_vec();
        assert_both(both(&rows(&features), &targets), 2.186367, 0.480181683);
        assert_both(both(&rows(&[[1., 0.]; 4]), &targets), 1.714286, 2.012048836);
        let balanced = rows(&[[-1., 0.], [-1., 0.], [1., 0.], [1., 0.]]);
        assert!(scalar(&discrepancy(&balanced, &targets)?).abs() < 1e-12);
        Ok(())
    }

    /// ICBPL, case T8.
    #[test]
    fn collapse_onto_one_centroid_is_never_preferred() -> anyhow::Result<()> {
        let places = Centroids::ClosedForm.place(10, 20, 1)?;
        let centroids = Tensor::from_vec(places, (10, 20), &Cpu)?;
        let targets = target_rows(&centroids, 100)?;
        let collapsed = centroids.narrow(0, 3, 1)?.repeat((100, 1))?;
        assert_both(both(&collapsed, &targets), 1.507538, 3.190981437);
        assert!(scalar(&discrepancy(&targets, &targets)?).abs() < 1e-12);
        Ok(())
    }

    /// ICBPL, case T9.
    #[test]
    fn targets_are_all_centroids_in_turn() {
        let want: Vec<u32> = (0..10).chain(0..10).chain(0..3).collect();
        assert_eq!(targets(10, 23), want);
    }

    const PUBLISHED: PairWeights = PairWeights { cosine: 3., absolute: 8. };

    /// ICBPL, case T10.
    #[test]
    fn pair_distances_have_the_specified_values() -> Result<()> {
        let (a, b) = (rows(&[[1., 0.], [0.6, 0.8]]), rows(&[[0.8, 0.6], [0.6, 0.8]]));
        assert!((scalar(&pair_distance(&a, &b, PUBLISHED)?) - 2.5).abs() < 1e-12);
        let cosine = PairWeights { cosine: 1., absolute: 0. };
        assert!((scalar(&pair_distance(&a, &b, cosine)?) - 0.3).abs() < 1e-12);
        let absolute = PairWeights { cosine: 0., absolute: 1. };
        assert!((scalar(&pair_distance(&a, &b, absolute)?) - 0.2).abs() < 1e-12);
        // A feature and itself, through the normalisation that stands before.
        let raw = Var::from_tensor(&rows(&[[3., 4.], [1., -2.]]))?;
        let z = unit_rows(raw.as_tensor())?;
        let same = pair_distance(&z, &z, cosine)?;
        assert!((scalar(&pair_distance(&z, &z, PUBLISHED)?) - 0.3).abs() < 1e-12);
        let gradients = same.backward()?;
        let gradient = gradients.get(&raw).expect("a gradient").flatten_all()?;
        assert!(gradient.to_vec1::<f64>()?.iter().all(|g| g.abs() < 1e-12));
        Ok(())
    }

    /// ICBPL, case T11.
    #[test]
    fn the_nearest_centroids_have_the_specified_cosines_and_the_lowest_index_wins() -> Result<()> {
        let half = 0.8660254037844386;
        let centroids = rows(&[[1., 0.], [-0.5, half], [-0.5, -half]]);
        let z = rows(&[[0.8, 0.6], [0., 1.], [-1., 0.]]);
        let want = [[0.8, 0.119615, -0.919615], [0., 0.866025, -0.866025], [-1., 0.5, 0.5]];
        for (got, want) in z.matmul(&centroids.t()?)?.to_vec2::<f64>()?.iter().zip(want) {
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?}");
        }
        let z = Var::from_tensor(&z)?;
        let loss = least_distance(&z, &centroids)?;
        assert!((scalar(&loss) - 0.277991532).abs() < 1e-9, "{loss}");
        // The gradient is minus a third of the chosen centroid: 0, and of two equals the first.
        let gradients = loss.backward()?;
        let gradient = gradients.get(&z).expect("a gradient").to_vec2::<f64>()?;
        let centroids = centroids.to_vec2::<f64>()?;
        for (gradient, chosen) in gradient.iter().zip([0, 1, 1]) {
            let mut pairs = gradient.iter().zip(&centroids[chosen]);
            assert!(pairs.all(|(g, c)| (g + c / 3.).abs() < 1e-12), "{gradient:?}");
        }
        Ok(())
    }

    #[test]
    fn nearest_centroids_are_counted_once() -> Result<()> {
        let centroids = rows(&[[1., 0.], [-0.5, 0.866], [-0.5, -0.866]]);
        let counted = |z: &[[f64; 2]]| nearest_centroids(&rows(z), &centroids)?.to_scalar::<f32>();
        assert_eq!(counted(&[[0.8, 0.6], [0.8, -0.6]])?, 1.);
        assert_eq!(counted(&[[-0.8, -0.6], [0., 1.], [0.8, 0.6], [0., 1.]])?, 3.);
        Ok(())
    }

    /// ICBPL, case T12, in `training::ops::unit_rows`, by which features are made unit-length.
    #[test]
    fn unit_rows_have_the_specified_values() -> Result<()> {
        let zero = Var::from_tensor(&rows(&[[3., 4.], [0., 0.]]))?;
        let unit = unit_rows(zero.as_tensor())?;
        assert_eq!(unit.to_vec2::<f64>()?, [[0.6, 0.8], [0., 0.]]);
        let gradients = unit.sum_all()?.backward()?;
        let gradient = gradients.get(&zero).expect("a gradient").flatten_all()?;
        assert!(gradient.to_vec1::<f64>()?.iter().all(|g| g.is_finite()));
        Ok(())
    }

    const AT: [[f64; 2]; 4] = [[0.9, 0.2], [-0.3, 1.1], [0.4, -0.8], [-1.2, -0.1]];

    /// Compares the gradient of `loss` at raw features with central differences.
    fn check_gradient(loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let x = Var::from_tensor(&rows(&AT))?;
        let gradients = loss(x.as_tensor())?.backward()?;
        let got = gradients.get(&x).expect("a gradient").to_vec2::<f64>()?;
        for i in 0..4 {
            for j in 0..2 {
                let (mut up, mut down) = (AT, AT);
                up[i][j] += 1e-6;
                down[i][j] -= 1e-6;
                let want = (scalar(&loss(&rows(&up))?) - scalar(&loss(&rows(&down))?)) / 2e-6;
                assert!((got[i][j] - want).abs() < 1e-7, "{i} {j}: {} {want}", got[i][j]);
            }
        }
        Ok(())
    }

    /// ICBPL, case T15: with the bandwidth held, differences are the gradient that autograd finds without.
    #[test]
    fn the_bandwidth_receives_no_gradient() -> Result<()> {
        let targets = rows(&[[1., 0.], [-1., 0.], [0., 1.], [1., 0.]]);
        let held = bandwidth(&squared_distances(&unit_rows(&rows(&AT))?, &targets)?)?;
        let x = Var::from_tensor(&rows(&AT))?;
        let gradients = discrepancy(&unit_rows(x.as_tensor())?, &targets)?.backward()?;
        let got = gradients.get(&x).expect("a gradient").to_vec2::<f64>()?;
        let with_held =
            |x: &Tensor| discrepancy_with(&squared_distances(&unit_rows(x)?, &targets)?, &held);
        check_gradient(with_held)?;
        let y = Var::from_tensor(&rows(&AT))?;
        let gradients = with_held(y.as_tensor())?.backward()?;
        assert_eq!(got, gradients.get(&y).expect("a gradient").to_vec2::<f64>()?);
        // And differences with a bandwidth that moves are another gradient.
        let moving = |h: f64| -> Result<f64> {
            let mut at = AT;
            at[0][1] += h;
            Ok(scalar(&discrepancy(&unit_rows(&rows(&at))?, &targets)?))
        };
        let difference = (moving(1e-6)? - moving(-1e-6)?) / 2e-6;
        assert!((difference - got[0][1]).abs() > 1e-4, "{difference} {}", got[0][1]);
        Ok(())
    }

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        let other = unit_rows(&rows(&[[0.1, 0.5], [1., 1.], [-0.4, 0.3], [0.2, -2.]]))?;
        let centroids = rows(&[[1., 0.], [-0.5, 0.866], [-0.5, -0.866]]);
        check_gradient(|x| pair_distance(&unit_rows(x)?, &other, PUBLISHED))?;
        check_gradient(|x| pair_distance(&other, &unit_rows(x)?, PUBLISHED))?;
        check_gradient(|x| least_distance(&unit_rows(x)?, &centroids))
    }

    #[test]
    fn centroids_and_targets_receive_no_gradient() -> Result<()> {
        let centroids = Var::from_tensor(&rows(&[[1., 0.], [-0.5, 0.866], [-0.5, -0.866]]))?;
        let x = Var::from_tensor(&unit_rows(&rows(&AT))?)?;
        let gradients = least_distance(x.as_tensor(), centroids.as_tensor())?.backward()?;
        assert!(gradients.get(&x).is_some() && gradients.get(&centroids).is_none());
        let targets = Var::from_tensor(&unit_rows(&rows(&AT))?)?;
        let gradients = discrepancy(x.as_tensor(), targets.as_tensor())?.backward()?;
        assert!(gradients.get(&x).is_some() && gradients.get(&targets).is_none());
        Ok(())
    }

    #[test]
    fn both_sides_of_a_pair_learn() -> Result<()> {
        let a = Var::from_tensor(&unit_rows(&rows(&AT))?)?;
        let b = Var::from_tensor(&rows(&[[0., 1.]; 4]))?;
        let gradients = pair_distance(a.as_tensor(), b.as_tensor(), PUBLISHED)?.backward()?;
        assert!(gradients.get(&a).is_some() && gradients.get(&b).is_some());
        Ok(())
    }
}
