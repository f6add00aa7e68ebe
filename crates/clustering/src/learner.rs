//! A clustering network that learns: a [`Head`] as a segment with its gradients and its optimizer.
//!
//! The network runs outside candle's autograd, which would take four times as long: it keeps every
//! intermediate, and with few clusters there is little arithmetic between them.

use candle_core::backprop::GradStore;
use candle_core::{Device, Result};
use layers::{Adam, Builder, Network};
use training::{Seam, TrainedSegment, backward};

use crate::head::{Head, HeadShape};

/// Adam's usual decays and `ε`; no weight decay.
const ADAM: Adam =
    Adam { learning_rate: 0., beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0. };

/// The network with the weights of `head`, on `device`, before its first step.
///
/// # Errors
///
/// An extent is 0.
pub fn learner(head: &Head, device: &Device) -> Result<TrainedSegment<Adam>> {
    with_weights(plan(head.shape)?.on(device), head)
}

/// One step of Adam along the gradient that candle found at `seam`.
pub fn step(
    learner: &mut TrainedSegment<Adam>,
    seam: Seam,
    gradients: &GradStore,
    learning_rate: f64,
) -> Result<()> {
    backward([&mut *learner], [seam], gradients)?;
    learner.step(Adam { learning_rate, ..ADAM })
}

/// The weights of a [`learner`] of this shape.
pub fn weights(learner: &TrainedSegment<Adam>, shape: HeadShape) -> Result<Head> {
    let values = |name| learner.segment.parameters.get(name);
    Ok(Head {
        shape,
        hidden_weight: values("hidden.weight")?,
        hidden_bias: values("hidden.bias")?,
        output_weight: values("output.weight")?,
        output_bias: values("output.bias")?,
    })
}

fn with_weights(plan: Network, head: &Head) -> Result<TrainedSegment<Adam>> {
    let mut learner = TrainedSegment::empty("head", plan);
    let parameters = &mut learner.segment.parameters;
    parameters.set("hidden.weight", &head.hidden_weight)?;
    parameters.set("hidden.bias", &head.hidden_bias)?;
    parameters.set("output.weight", &head.output_weight)?;
    parameters.set("output.bias", &head.output_bias)?;
    Ok(learner)
}

/// `W₂ relu(W₁ x + b₁) + b₂`.
fn plan(HeadShape { width, hidden, clusters }: HeadShape) -> Result<Network> {
    let mut builder = Builder::features(width);
    builder.block("head");
    let input = builder.input();
    let hidden = builder.linear("hidden", input, hidden)?;
    let hidden = builder.relu(hidden)?;
    let output = builder.linear("output", hidden, clusters)?;
    builder.finish(output)
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;
    use candle_core::Tensor;

    use super::*;

    const SHAPE: HeadShape = HeadShape { width: 5, hidden: 4, clusters: 3 };

    /// `W₂ relu(W₁ x + b₁) + b₂`, written out.
    fn plain(head: &Head, x: &[f32]) -> Vec<f32> {
        let layer = |weight: &[f32], bias: &[f32], x: &[f32]| -> Vec<f32> {
            let rows = weight.chunks_exact(x.len()).zip(bias);
            rows.map(|(w, b)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + b).collect()
        };
        let hidden = layer(&head.hidden_weight, &head.hidden_bias, x);
        let hidden: Vec<f32> = hidden.into_iter().map(|h| h.max(0.0)).collect();
        layer(&head.output_weight, &head.output_bias, &hidden)
    }

    fn rows() -> Result<Tensor> {
        Tensor::new(&[[0.3f32, -1.2, 0.7, 2.0, 0.1], [-0.4, 0.0, 0.9, 0.2, -0.7]], &Cpu)
    }

    #[test]
    fn logits_are_those_of_the_formula() -> Result<()> {
        let head = Head::random(SHAPE, 1, &[0]);
        let mut learner = learner(&head, &Cpu)?;
        let rows = rows()?;
        let logits = learner.evaluate(&rows)?.to_vec2::<f32>()?;
        for (row, output) in rows.to_vec2::<f32>()?.iter().zip(&logits) {
            for (want, got) in plain(&head, row).iter().zip(output) {
                assert!((want - got).abs() < 1e-6, "got {got}, want {want}");
            }
        }
        assert_eq!(learner.forward(&rows)?.to_vec2::<f32>()?, logits);
        assert_eq!(weights(&learner, SHAPE)?, head);
        Ok(())
    }

    #[test]
    fn a_step_goes_down_and_moves_every_layer() -> Result<()> {
        let head = Head::random(SHAPE, 1, &[0]);
        let mut learner = learner(&head, &Cpu)?;
        let loss = |logits: &Tensor| logits.sqr()?.sum_all();
        let before = loss(&learner.evaluate(&rows()?)?)?.to_scalar::<f32>()?;
        for _ in 0..20 {
            let seam = learner.forward(&rows()?)?;
            let gradients = loss(&seam)?.backward()?;
            step(&mut learner, seam, &gradients, 0.01)?;
        }
        let after = loss(&learner.evaluate(&rows()?)?)?.to_scalar::<f32>()?;
        assert!(after < 0.8 * before, "{before} to {after}");
        let moved = weights(&learner, SHAPE)?;
        assert!(moved.hidden_weight != head.hidden_weight && moved.hidden_bias != head.hidden_bias);
        assert!(moved.output_weight != head.output_weight && moved.output_bias != head.output_bias);
        Ok(())
    }

    #[test]
    fn tensor_operations_of_any_device_learn_what_the_kernels_learn() -> Result<()> {
        let head = Head::random(SHAPE, 1, &[0]);
        let mut kernels = learner(&head, &Cpu)?;
        let mut other = with_weights(plan(SHAPE)?.by_tensor_operations(&Cpu), &head)?;
        for learner in [&mut kernels, &mut other] {
            for _ in 0..5 {
                let seam = learner.forward(&rows()?)?;
                let gradients = seam.sqr()?.sum_all()?.backward()?;
                step(learner, seam, &gradients, 0.01)?;
            }
        }
        let (want, got) = (weights(&kernels, SHAPE)?, weights(&other, SHAPE)?);
        assert_ne!(want, head);
        for (want, got) in [
            (want.hidden_weight, got.hidden_weight),
            (want.hidden_bias, got.hidden_bias),
            (want.output_weight, got.output_weight),
            (want.output_bias, got.output_bias),
        ] {
            assert_eq!(want.len(), got.len());
            assert!(want.iter().zip(&got).all(|(w, g)| (w - g).abs() < 1e-5), "{want:?} {got:?}");
        }
        Ok(())
    }
}
