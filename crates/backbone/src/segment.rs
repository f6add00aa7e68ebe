//! A plan with its parameters and statistics.

use candle_core::{Device, Result, Tensor};
use layers::{
    BatchGroups, Gradients, Inference, Modes, Network, Parameters, Statistics, Tape, TensorEntry,
};

use crate::initial::InitialDistribution;

/// One of the parts that an image passes through: backbone, projector or predictor.
#[derive(Clone)]
pub struct Segment {
    network: Network,
    /// The numbers that training changes.
    pub parameters: Parameters,
    /// Running mean and variance of every batch norm.
    pub statistics: Statistics,
    /// Created at first use, and again after a change.
    inference: Option<Inference>,
}

impl Segment {
    /// A segment with random initial weights, for the segment `name` of a run with this seed. The module
    /// `initial` documents the distributions.
    pub fn random(name: &str, plan: Network, seed: u64) -> Result<Self> {
        let mut segment = Self::empty(plan);
        let entries = segment.parameters.entries().to_vec();
        for TensorEntry { name: parameter, shape, kind, range, .. } in &entries {
            let weight = parameter.strip_suffix(".bias").map(|layer| format!("{layer}.weight"));
            let weight_shape = weight
                .and_then(|weight| entries.iter().find(|entry| entry.name == weight))
                .map_or(shape, |entry| &entry.shape);
            let draw = InitialDistribution::of(name, parameter, *kind, weight_shape);
            segment.parameters.set(parameter, &draw.values(seed, name, parameter, range.len()))?;
        }
        Ok(segment)
    }

    /// A segment whose numbers are loaded next: see [`network_file::load`](crate::network_file::load).
    pub fn empty(plan: Network) -> Self {
        let (parameters, statistics) = (plan.parameters(), plan.statistics());
        Self { network: plan, parameters, statistics, inference: None }
    }

    /// The plan.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The name of the first parameter or statistic with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        match self.parameters.first_non_finite()? {
            None => self.statistics.first_non_finite(),
            found => Ok(found),
        }
    }

    /// A copy on `device`: see [`Network::on`].
    pub fn on(&self, device: &Device) -> Result<Self> {
        self.with_network(self.network.on(device))
    }

    /// The same segment, which divides batches into these groups: see [`Network::in_groups`].
    pub fn in_groups(&self, groups: &BatchGroups) -> Result<Self> {
        self.with_network(self.network.in_groups(groups)?)
    }

    /// A copy for `network`, which must have the same entries.
    pub fn with_network(&self, network: Network) -> Result<Self> {
        let parameters = self.parameters.to(&network)?;
        let statistics = self.statistics.to(&network)?;
        Ok(Self { network, parameters, statistics, inference: None })
    }

    /// The output of every row of `input`, as [`Network::forward`].
    pub fn forward(
        &mut self,
        input: &Tensor,
        modes: &Modes,
        tape: Option<&mut Tape>,
    ) -> Result<Tensor> {
        // Training does not use it, and needs its memory.
        self.inference = None;
        self.network.forward(&self.parameters, &mut self.statistics, input, modes, tape)
    }

    /// The output of every row of each input, as [`Network::forward_each`].
    pub fn forward_each(&mut self, inputs: &[&Tensor], modes: &Modes) -> Result<Vec<Tensor>> {
        self.inference = None;
        self.network.forward_each(&self.parameters, &mut self.statistics, inputs, modes)
    }

    /// The output of every row of `input` on running statistics; each row depends on its own input alone.
    /// Faster than [`forward`](Self::forward), since batch norms are folded into the weights once after
    /// each change: see [`Inference`].
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

    /// Adds the gradients of one forward pass to `gradients` and empties its tape, as
    /// [`Network::backward`].
    ///
    /// - `at_output`: gradient of the loss with respect to the output of that pass.
    ///
    /// Returns the gradient of the input if `input_gradient` is set.
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
