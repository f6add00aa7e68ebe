//! A plan with its values.

use candle_core::{Device, Result, Tensor};
use layers::{Entry, Gradients, Inference, Modes, Network, Parameters, Statistics, Tape};

use crate::initial::Draw;

/// One of the parts a picture passes through, with its values: backbone, projector or predictor.
#[derive(Clone)]
pub struct Segment {
    network: Network,
    /// The values that learning changes.
    pub parameters: Parameters,
    /// Running mean and variance of every batch norm.
    pub statistics: Statistics,
    /// Made when it is first used, anew after changes.
    inference: Option<Inference>,
}

impl Segment {
    /// First weights for `plan`, drawn for the segment `name` of a run with this seed. What is
    /// drawn from stands in the source of this crate's `initial` module, with its reasons.
    ///
    /// # Errors
    ///
    /// A layer cannot take its values: a fault of this program.
    pub fn random(name: &str, plan: Network, seed: u64) -> Result<Self> {
        let mut segment = Self::empty(plan);
        let entries = segment.parameters.entries().to_vec();
        for Entry { name: parameter, shape, kind, range, .. } in &entries {
            let weight = parameter.strip_suffix(".bias").map(|layer| format!("{layer}.weight"));
            let weight_shape = weight
                .and_then(|weight| entries.iter().find(|entry| entry.name == weight))
                .map_or(shape, |entry| &entry.shape);
            let draw = Draw::of(name, parameter, *kind, weight_shape);
            segment.parameters.set(parameter, &draw.values(seed, name, parameter, range.len()))?;
        }
        Ok(segment)
    }

    /// `plan` with values that are to be read from a file: see
    /// [`network_file::fill`](crate::network_file::fill).
    pub fn empty(plan: Network) -> Self {
        let (parameters, statistics) = (plan.parameters(), plan.statistics());
        Self { network: plan, parameters, statistics, inference: None }
    }

    /// The plan.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The first parameter or statistic with a NaN or an infinity.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        match self.parameters.first_non_finite()? {
            None => self.statistics.first_non_finite(),
            found => Ok(found),
        }
    }

    /// The same segment, computing on `device`: see [`Network::on`].
    ///
    /// # Errors
    ///
    /// A device fails.
    pub fn on(&self, device: &Device) -> Result<Self> {
        self.with_network(self.network.on(device))
    }

    /// The same values in `network`, which has the same entries.
    ///
    /// # Errors
    ///
    /// It has others, or a device fails.
    pub fn with_network(&self, network: Network) -> Result<Self> {
        let parameters = self.parameters.to(&network)?;
        let statistics = self.statistics.to(&network)?;
        Ok(Self { network, parameters, statistics, inference: None })
    }

    /// Output of every row of `input`; batch norm as `modes` says. Running statistics are updated
    /// where batch statistics are used. With a tape, what [`Network::backward`] needs is kept.
    ///
    /// # Errors
    ///
    /// `input` does not have the shape that the plan takes.
    pub fn forward(
        &mut self,
        input: &Tensor,
        modes: &Modes,
        tape: Option<&mut Tape>,
    ) -> Result<Tensor> {
        // Training has no use for it, and its memory.
        self.inference = None;
        self.network.forward(&self.parameters, &mut self.statistics, input, modes, tape)
    }

    /// Output of every row of `input` on running statistics, each row by itself: faster than
    /// [`forward`](Self::forward), since batch norms are folded into the weights when they have
    /// changed. See [`Inference`].
    ///
    /// # Errors
    ///
    /// `input` does not have the shape that the plan takes.
    pub fn infer(&mut self, input: &Tensor) -> Result<Tensor> {
        let Self { network, parameters, statistics, inference } = self;
        match inference {
            Some(inference) if inference.is_current(parameters, statistics) => {
                inference.forward(input)
            }
            _ => {
                let new = network.inference(parameters, statistics)?;
                inference.insert(new).forward(input)
            }
        }
    }

    /// Adds the gradients of one forward pass to `gradients`, and empties its tape.
    ///
    /// - `at_output`: gradient of the loss at the output of that pass.
    ///
    /// Returns the gradient at the input where it was asked for.
    ///
    /// # Errors
    ///
    /// The tape is empty, or `at_output` does not have the output's shape.
    pub fn backward(
        &self,
        tape: &mut Tape,
        at_output: &Tensor,
        gradients: &mut Gradients,
        input_gradient: bool,
    ) -> Result<Option<Tensor>> {
        self.network.backward(&self.parameters, tape, at_output, gradients, input_gradient)
    }
}
