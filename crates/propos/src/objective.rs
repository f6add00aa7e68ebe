//! The loss of a step: views of one image alike, clusters apart.
//!
//! A *direction* is one view in the online network against the other in the target network. Its
//! loss is the alignment of the prediction, which is BYOL's, and the weighted scattering of the
//! clusters' means; a step takes the mean of both directions, not their sum.

use anyhow::Result;
use candle_core::{D, Device, Tensor};
use serde::{Deserialize, Serialize};
use training::loss::regression_loss;
use training::scatter::{Absent, scatter_loss};

/// The space in which the noise of positive sampling is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoiseSpace {
    /// That of projections, as in the authors' program: on projections of length 5 a deviation of
    /// 0.001 has nearly no effect.
    Raw,
    /// That of their directions: `v = q + ‖q‖ σ ε`. Our interpretation of sampling on the unit
    /// sphere; the length is a constant of the gradient.
    Unit,
}

impl NoiseSpace {
    /// The noise for these projections.
    ///
    /// - `noise`: `σ ε`, `(N, P)`.
    /// - `projection`: `q`, `(N, P)`.
    ///
    /// # Errors
    ///
    /// The shapes differ.
    pub fn scale(self, noise: &Tensor, projection: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Raw => Ok(noise.clone()),
            Self::Unit => {
                let length = projection.detach().sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
                noise.broadcast_mul(&length)
            }
        }
    }
}

/// The two extras of ProPos over BYOL as they are in one epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extras {
    /// Deviation σ of positive sampling; 0 for none.
    pub noise: f64,
    /// Where it is added.
    pub noise_space: NoiseSpace,
    /// Weight λ of prototype scattering as it acts on one device; 0 for none.
    pub scatter_weight: f64,
    /// Its temperature τ.
    pub temperature: f64,
    /// How clusters without an image in the batch are treated.
    pub absent: Absent,
}

impl Extras {
    /// `σ ε` of one pass, `(N, P)`; `None` in epochs without noise.
    pub fn noise(
        &self,
        shape: (usize, usize),
        seed: u64,
        draw: [u64; 2],
        device: &Device,
    ) -> Result<Option<Tensor>> {
        Ok(training::noise(self.noise, shape, seed, &draw, device)?)
    }
}

/// The loss of a direction and its two parts.
#[derive(Debug)]
pub struct Direction {
    /// Alignment plus weighted scattering: what is minimised.
    pub loss: Tensor,
    /// `2 − 2 cos` of predictions and target projections.
    pub alignment: Tensor,
    /// Scattering without its weight; `None` if the weight is 0, so that nothing enters the graph
    /// and every bit is BYOL's.
    pub scatter: Option<Tensor>,
}

/// The loss of one direction.
///
/// - `prediction`: `g(q + noise)`, `(N, P)`.
/// - `projection`: `q`, `(N, P)`: before the predictor, without noise, not normalised.
/// - `target`: the target network's projection of the other view, `(N, P)`. A constant.
/// - `clusters`: of each image, `N`. Both views of an image are in its cluster.
///
/// # Errors
///
/// The shapes do not fit.
pub fn direction(
    prediction: &Tensor,
    projection: &Tensor,
    target: &Tensor,
    clusters: &[Option<u32>],
    extras: &Extras,
) -> Result<Direction> {
    let alignment = regression_loss(prediction, target)?;
    if extras.scatter_weight == 0. {
        return Ok(Direction { loss: alignment.clone(), alignment, scatter: None });
    }
    let scatter = scatter_loss(projection, target, clusters, extras.temperature, extras.absent)?;
    let loss = (&alignment + (&scatter * extras.scatter_weight)?)?;
    Ok(Direction { loss, alignment, scatter: Some(scatter) })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};

    use super::*;

    fn extras(scatter_weight: f64) -> Extras {
        Extras {
            noise: 0.1,
            noise_space: NoiseSpace::Raw,
            scatter_weight,
            temperature: 0.5,
            absent: Absent::Constant { clusters: 3, logit: -10. },
        }
    }

    fn matrix(rows: [[f64; 2]; 4]) -> Tensor {
        Tensor::new(&rows, &Cpu).expect("a matrix")
    }

    fn q() -> Tensor {
        matrix([[1., 0.], [1., 1.], [0., 2.], [-1., 1.]])
    }

    fn target() -> Tensor {
        matrix([[2., 0.], [1., 0.5], [-0.5, 1.], [-1., 1.]])
    }

    const CLUSTERS: [Option<u32>; 4] = [Some(0), Some(0), Some(1), Some(1)];

    /// ProPos, case 1 and ProPos, case 6 joined: the alignment of `q` itself as prediction, and
    /// the scattering with its weight.
    #[test]
    fn the_loss_is_alignment_plus_weighted_scattering() -> Result<()> {
        let found = direction(&q(), &q(), &target(), &CLUSTERS, &extras(0.1))?;
        let value = |tensor: &Tensor| tensor.to_scalar::<f64>();
        // Cosines 1, 3/√10, 2/√5, 1 of the rows.
        let cosines = [1., 3. / 10f64.sqrt(), 2. / 5f64.sqrt(), 1.];
        let alignment = cosines.iter().map(|cosine| 2. - 2. * cosine).sum::<f64>() / 4.;
        assert!((value(&found.alignment)? - alignment).abs() < 1e-12);
        let scatter = found.scatter.as_ref().expect("weighted");
        // The specified .131750, and e⁻¹⁰ for the third cluster, which is absent.
        assert!((value(scatter)? - 0.131750).abs() < 1e-5, "{scatter}");
        assert!((value(&found.loss)? - alignment - 0.1 * value(scatter)?).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn without_weight_it_is_byol_and_nothing_else_enters_the_graph() -> Result<()> {
        let projection = Var::from_tensor(&q())?;
        let prediction = Var::from_tensor(&q())?;
        let found = direction(&prediction, &projection, &target(), &CLUSTERS, &extras(0.))?;
        assert!(found.scatter.is_none());
        let plain = regression_loss(&prediction, &target())?.to_scalar::<f64>()?;
        assert_eq!(found.loss.to_scalar::<f64>()?, plain);
        let gradients = found.loss.backward()?;
        assert!(gradients.get(&projection).is_none() && gradients.get(&prediction).is_some());
        Ok(())
    }

    #[test]
    fn the_target_is_a_constant_and_scattering_reaches_the_projection_alone() -> Result<()> {
        let [prediction, projection] = [Var::from_tensor(&q())?, Var::from_tensor(&q())?];
        let target = Var::from_tensor(&target())?;
        let found = direction(&prediction, &projection, &target, &CLUSTERS, &extras(0.1))?;
        let gradients = found.loss.backward()?;
        assert!(gradients.get(&target).is_none());
        let got = gradients.get(&projection).expect("scattering").to_vec2::<f64>()?;
        // A tenth of case 6; the absent cluster changes the fifth decimal.
        let want = [[0., 0.133205], [-0.066602, 0.066602], [0.068895, 0.], [0.068895, 0.068895]];
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((got - 0.1 * want).abs() < 2e-6, "got {got}, want a tenth of {want}");
        }
        let scatter = found.scatter.expect("weighted").backward()?;
        assert!(scatter.get(&prediction).is_none(), "it acts before the predictor");
        Ok(())
    }

    #[test]
    fn gradient_matches_central_differences() -> Result<()> {
        let at = [0.3, -1.2, 0.7, 2.0, 0.1, -0.4, 0.5, 0.9];
        let loss = |rows: &Tensor| -> Result<Tensor> {
            let prediction = (rows * 2.)?.broadcast_add(&Tensor::new(&[0.5, -0.25], &Cpu)?)?;
            Ok(direction(&prediction, rows, &target(), &CLUSTERS, &extras(0.7))?.loss)
        };
        let tensor = |at: &[f64; 8]| Tensor::from_slice(at, (4, 2), &Cpu);
        let rows = Var::from_tensor(&tensor(&at)?)?;
        let gradients = loss(&rows)?.backward()?;
        let analytic = gradients.get(&rows).expect("a gradient").flatten_all()?.to_vec1::<f64>()?;
        for (i, got) in analytic.into_iter().enumerate() {
            let (mut up, mut down) = (at, at);
            up[i] += 1e-6;
            down[i] -= 1e-6;
            let value =
                |at: &[f64; 8]| Ok::<_, anyhow::Error>(loss(&tensor(at)?)?.to_scalar::<f64>()?);
            let want = (value(&up)? - value(&down)?) / 2e-6;
            assert!((got - want).abs() < 1e-8, "d/dx[{i}]: got {got}, want {want}");
        }
        Ok(())
    }

    #[test]
    fn noise_in_unit_space_grows_with_the_projection() -> Result<()> {
        let noise = matrix([[0.1, 0.], [0., 0.2], [0.3, 0.], [0., -0.1]]);
        let raw = NoiseSpace::Raw.scale(&noise, &q())?.to_vec2::<f64>()?;
        assert_eq!(raw, noise.to_vec2::<f64>()?);
        let unit = NoiseSpace::Unit.scale(&noise, &q())?.to_vec2::<f64>()?;
        let lengths = [1., 2f64.sqrt(), 2., 2f64.sqrt()];
        for ((unit, raw), length) in unit.iter().zip(&raw).zip(lengths) {
            for (unit, raw) in unit.iter().zip(raw) {
                assert!((unit - raw * length).abs() < 1e-12);
            }
        }
        let projection = Var::from_tensor(&q())?;
        let scaled = NoiseSpace::Unit.scale(&noise, &projection)?.sum_all()?;
        assert!(scaled.backward()?.get(&projection).is_none(), "the length is a constant");
        Ok(())
    }

    /// ProPos, case 15: what the authors' gather over `W` devices does to the gradient
    /// of scattering, and so what `emulate-world-size` divides by.
    #[test]
    fn a_gather_that_drops_the_others_gradients_divides_by_the_world_size() -> Result<()> {
        const WORLD: usize = 4;
        let draw = |salt: usize| -> Result<Tensor> {
            let values = (0..32).map(|i| (((i * 37 + salt * 91) % 53) as f64 / 26.5 - 1.).sin());
            Ok(Tensor::from_iter(values, &Cpu)?.reshape((16, 2))?)
        };
        let (q, target) = (draw(1)?, draw(2)?);
        let clusters: Vec<Option<u32>> = (0..16).map(|i| Some(i % 3)).collect();
        let loss = |q: &Tensor| scatter_loss(q, &target, &clusters, 0.5, Absent::LeftOut);

        let all = Var::from_tensor(&q)?;
        let one_device = loss(&all)?.backward()?;
        let one_device = one_device.get(&all).expect("a gradient").to_vec2::<f64>()?;
        for correct in [false, true] {
            let locals: Vec<Var> = (0..WORLD)
                .map(|rank| Var::from_tensor(&q.narrow(0, 4 * rank, 4)?))
                .collect::<candle_core::Result<_>>()?;
            // Every device computes the whole loss; the mean over devices is what is stepped along.
            let mut sums = vec![vec![[0.; 2]; 4]; WORLD];
            for rank in 0..WORLD {
                let gathered: Vec<Tensor> = locals
                    .iter()
                    .enumerate()
                    .map(|(other, local)| match correct || other == rank {
                        true => local.as_tensor().clone(),
                        false => local.detach(),
                    })
                    .collect();
                let gradients = loss(&Tensor::cat(&gathered, 0)?)?.backward()?;
                for (sum, local) in sums.iter_mut().zip(&locals) {
                    let Some(gradient) = gradients.get(local) else { continue };
                    for (sum, row) in sum.iter_mut().zip(gradient.to_vec2::<f64>()?) {
                        (0..2).for_each(|i| sum[i] += row[i] / WORLD as f64);
                    }
                }
            }
            let factor = if correct { 1. } else { 1. / WORLD as f64 };
            for (got, want) in sums.concat().iter().zip(&one_device) {
                for (got, want) in got.iter().zip(want) {
                    assert!((got - factor * want).abs() < 1e-12, "got {got}, want {want}");
                }
            }
        }
        Ok(())
    }
}
