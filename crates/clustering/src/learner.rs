//! A clustering network that learns: forward to the seam at its logits, and the step back from it.
//!
//! The network itself is one of [`layers`], outside candle's autograd, which would take four times
//! as long: it keeps every intermediate, and with `K` small there is little arithmetic between
//! them. The loss on the logits is candle's.

use std::fmt;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use layers::{
    Adam, AdamMoments, Builder, Gradients, Mode, Modes, Network, Parameters, Statistics, Tape,
};

use crate::head::{Head, Shape};

/// Adam's usual decays and `ε`; no weight decay.
const ADAM: Adam =
    Adam { learning_rate: 0., beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0. };

/// One clustering network with its gradients and its optimizer.
pub struct Learner {
    shape: Shape,
    network: Network,
    modes: Modes,
    parameters: Parameters,
    /// Without batch norm there are none; the plan asks for them.
    statistics: Statistics,
    gradients: Gradients,
    moments: AdamMoments,
    tape: Tape,
}

impl Learner {
    /// Takes up the weights of `head`, to compute on `device`; the optimizer starts afresh.
    ///
    /// # Errors
    ///
    /// An extent is 0, or the device fails.
    pub fn new(head: &Head, device: &Device) -> Result<Self> {
        Self::of(plan(head.shape)?.on(device), head)
    }

    fn of(network: Network, head: &Head) -> Result<Self> {
        let shape = head.shape;
        let mut parameters = network.parameters();
        parameters.set("hidden.weight", &head.hidden_weight)?;
        parameters.set("hidden.bias", &head.hidden_bias)?;
        parameters.set("output.weight", &head.output_weight)?;
        parameters.set("output.bias", &head.output_bias)?;
        Ok(Self {
            shape,
            modes: Modes::all(&network, Mode::Running),
            parameters,
            statistics: network.statistics(),
            gradients: network.gradients(),
            moments: network.adam_moments(),
            tape: network.tape(),
            network,
        })
    }

    /// Its weights as they are now.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn head(&self) -> Result<Head> {
        Ok(Head {
            shape: self.shape,
            hidden_weight: self.parameters.get("hidden.weight")?,
            hidden_bias: self.parameters.get("hidden.bias")?,
            output_weight: self.parameters.get("output.weight")?,
            output_bias: self.parameters.get("output.bias")?,
        })
    }

    /// Outputs before the softmax, `(B, K)`, of embeddings of length `√D`, `(B, D)`.
    ///
    /// # Errors
    ///
    /// `embeddings` has another width.
    pub fn logits(&mut self, embeddings: &Tensor) -> Result<Tensor> {
        let (network, modes) = (&self.network, &self.modes);
        network.forward(&self.parameters, &mut self.statistics, embeddings, modes, None)
    }

    /// The same as a seam: a variable of candle's. [`step`](Self::step) takes its gradient.
    ///
    /// # Errors
    ///
    /// `embeddings` has another width.
    pub fn seam(&mut self, embeddings: &Tensor) -> Result<Var> {
        let (network, modes, tape) = (&self.network, &self.modes, &mut self.tape);
        let statistics = &mut self.statistics;
        let logits =
            network.forward(&self.parameters, statistics, embeddings, modes, Some(tape))?;
        Var::from_tensor(&logits)
    }

    /// One step of Adam along the gradient that candle found at the last seam.
    ///
    /// # Errors
    ///
    /// No loss used the seam.
    pub fn step(&mut self, seam: &Var, gradients: &GradStore, learning_rate: f64) -> Result<()> {
        let Some(gradient) = gradients.get(seam) else {
            candle_core::bail!("the loss does not use the logits of the clustering network")
        };
        let (network, into) = (&self.network, &mut self.gradients);
        network.backward(&self.parameters, &mut self.tape, gradient, into, false)?;
        self.parameters.adam(into, &mut self.moments, Adam { learning_rate, ..ADAM })?;
        into.zero();
        Ok(())
    }
}

impl fmt::Debug for Learner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Learner").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// `W₂ relu(W₁ x + b₁) + b₂`.
fn plan(Shape { width, hidden, clusters }: Shape) -> Result<Network> {
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

    use super::*;

    const SHAPE: Shape = Shape { width: 5, hidden: 4, clusters: 3 };

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
        let mut learner = Learner::new(&head, &Cpu)?;
        let rows = rows()?;
        let logits = learner.logits(&rows)?.to_vec2::<f32>()?;
        for (row, output) in rows.to_vec2::<f32>()?.iter().zip(&logits) {
            for (want, got) in plain(&head, row).iter().zip(output) {
                assert!((want - got).abs() < 1e-6, "got {got}, want {want}");
            }
        }
        assert_eq!(learner.seam(&rows)?.to_vec2::<f32>()?, logits);
        assert_eq!(learner.head()?, head);
        Ok(())
    }

    #[test]
    fn a_step_goes_down_and_moves_every_layer() -> Result<()> {
        let head = Head::random(SHAPE, 1, &[0]);
        let mut learner = Learner::new(&head, &Cpu)?;
        let loss = |logits: &Tensor| logits.sqr()?.sum_all();
        let before = loss(&learner.logits(&rows()?)?)?.to_scalar::<f32>()?;
        for _ in 0..20 {
            let seam = learner.seam(&rows()?)?;
            learner.step(&seam, &loss(&seam)?.backward()?, 0.01)?;
        }
        let after = loss(&learner.logits(&rows()?)?)?.to_scalar::<f32>()?;
        assert!(after < 0.8 * before, "{before} to {after}");
        let moved = learner.head()?;
        assert!(moved.hidden_weight != head.hidden_weight && moved.hidden_bias != head.hidden_bias);
        assert!(moved.output_weight != head.output_weight && moved.output_bias != head.output_bias);
        Ok(())
    }

    #[test]
    fn tensor_operations_of_any_device_learn_what_the_kernels_learn() -> Result<()> {
        let head = Head::random(SHAPE, 1, &[0]);
        let mut kernels = Learner::new(&head, &Cpu)?;
        let mut other = Learner::of(plan(SHAPE)?.by_tensor_operations(&Cpu), &head)?;
        for learner in [&mut kernels, &mut other] {
            for _ in 0..5 {
                let seam = learner.seam(&rows()?)?;
                learner.step(&seam, &seam.sqr()?.sum_all()?.backward()?, 0.01)?;
            }
        }
        let (want, got) = (kernels.head()?, other.head()?);
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

    #[test]
    fn a_loss_beside_the_seam_is_an_error() -> Result<()> {
        let mut learner = Learner::new(&Head::random(SHAPE, 1, &[0]), &Cpu)?;
        let seam = learner.seam(&rows()?)?;
        let other = Var::zeros(1, candle_core::DType::F32, &Cpu)?;
        assert!(learner.step(&seam, &other.sqr()?.backward()?, 0.01).is_err());
        Ok(())
    }
}
