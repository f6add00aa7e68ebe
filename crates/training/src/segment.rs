//! Segments that learn, and the seams between them and candle.
//!
//! Backbone, projector and predictor run outside candle's autograd, forward and backward. A
//! [`Seam`] is an output opened to candle as a variable: the loss is candle's, and the gradient at
//! a seam is the one that candle finds plus the one that the next segment's backward pass returns.

use std::ops::Deref;

use backbone::Segment;
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use layers::{Adam, BatchGroups, Gradients, Mode, Modes, Network, Tape};

use crate::checkpoint::Checkpoint;
use crate::optimizer::Optimizer;

/// A segment that learns by the update rule `O`: its values, their gradients, and the optimizer's
/// moments.
pub struct TrainedSegment<O: Optimizer> {
    /// Its plan with its values.
    pub segment: Segment,
    name: &'static str,
    modes: Modes,
    gradients: Gradients,
    memory: O::Memory,
    groups: BatchGroups,
}

/// The result of one forward pass of a segment: the output, opened to candle as a variable, and the
/// tape for the backward pass. It dereferences to the output, which has the rows of all ranks: each rank
/// computes the loss of the whole batch, and passes the gradient of its own rows back.
pub struct Seam {
    output: Var,
    tape: Tape,
}

impl Deref for Seam {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.output
    }
}

impl TrainedSegment<Adam> {
    /// The steps taken so far.
    pub fn steps(&self) -> u64 {
        self.memory.steps()
    }
}

impl<O: Optimizer> TrainedSegment<O> {
    /// Wraps `segment` before its first step, under its name in files. All blocks learn, on batch
    /// statistics.
    pub fn new(name: &'static str, segment: Segment) -> Self {
        let modes = Modes::all(segment.network(), Mode::Batch);
        let (gradients, memory) = (segment.network().gradients(), O::memory(segment.network()));
        Self { segment, name, modes, gradients, memory, groups: BatchGroups::one() }
    }

    /// The same segment, which divides batches into these groups in training.
    ///
    /// # Errors
    ///
    /// The GPUs of the ranks cannot be connected.
    pub fn in_groups(self, groups: &BatchGroups) -> Result<Self> {
        if groups.is_one() && self.groups.is_one() {
            return Ok(self);
        }
        let segment = self.segment.in_groups(groups)?;
        let gradients = segment.network().gradients();
        Ok(Self { segment, gradients, groups: groups.clone(), ..self })
    }

    /// A segment of this plan whose values are still to be set.
    pub fn empty(name: &'static str, plan: Network) -> Self {
        Self::new(name, Segment::empty(plan))
    }

    /// The groups into which it divides batches.
    pub(crate) fn groups(&self) -> &BatchGroups {
        &self.groups
    }

    /// The same segment on `device`, with the optimizer's memory and without gathered gradients.
    pub fn on(&self, device: &Device) -> Result<Self> {
        self.moved(|segment| segment.on(device))
    }

    pub(crate) fn moved(&self, to: impl FnOnce(&Segment) -> Result<Segment>) -> Result<Self> {
        let segment = to(&self.segment)?;
        let memory = O::moved(&self.memory, segment.network())?;
        let gradients = segment.network().gradients();
        let (modes, groups) = (self.modes.clone(), self.groups.clone());
        Ok(Self { segment, name: self.name, modes, gradients, memory, groups })
    }

    /// Freezes a block: its values stay the same to the bit. On [`Mode::Running`] its statistics do
    /// too; on [`Mode::Batch`] its output depends on the other pictures of a batch.
    ///
    /// # Errors
    ///
    /// There is no block of that name.
    pub fn freeze(&mut self, block: &str, statistics: Mode) -> Result<()> {
        self.segment.parameters.set_trainable(block, false)?;
        self.modes.set(block, statistics)
    }

    /// The output for `input` in training.
    ///
    /// - `input`: of the pictures of this rank.
    ///
    /// # Errors
    ///
    /// `input` has another shape than the plan takes.
    pub fn forward(&mut self, input: &Tensor) -> Result<Seam> {
        let mut tape = self.segment.network().tape();
        let output = self.segment.forward(input, &self.modes, Some(&mut tape))?;
        Ok(Seam { output: Var::from_tensor(&self.groups.all_rows(&output)?)?, tape })
    }

    /// The output for the rows of a whole batch in training, such as the output of another segment.
    ///
    /// # Errors
    ///
    /// `input` has another shape than the plan takes.
    pub fn forward_batch(&mut self, input: &Tensor) -> Result<Seam> {
        self.forward(&self.groups.own_rows(input)?)
    }

    /// The output for `input` on running statistics, which does not depend on the other rows;
    /// nothing is kept for a backward pass.
    ///
    /// # Errors
    ///
    /// `input` has another shape than the plan takes.
    pub fn evaluate(&mut self, input: &Tensor) -> Result<Tensor> {
        let modes = Modes::all(self.segment.network(), Mode::Running);
        self.segment.forward(input, &modes, None)
    }

    /// Announces the backward passes of this step, before the first one. In the last of them, ranks begin to sum the
    /// gradients of each block as soon as they are complete, and [`step`](Self::step) waits for the others: see
    /// [`Gradients::expect_passes`]. Without it, [`step`](Self::step) makes all sums.
    ///
    /// # Errors
    ///
    /// All passes of an earlier announcement have come, and no step was taken since.
    pub fn expect_passes(&mut self, passes: usize) -> Result<()> {
        self.gradients.expect_passes(passes)
    }

    /// Adds the gradients of one forward pass to those of this step; returns the gradient at the
    /// input if `input_gradient` asks for it.
    ///
    /// - `at_output`: gradient of the loss at the seam.
    ///
    /// # Errors
    ///
    /// `at_output` has another shape than the seam, or more passes come than were
    /// [announced](Self::expect_passes).
    pub fn backward(
        &mut self,
        mut seam: Seam,
        at_output: &Tensor,
        input_gradient: bool,
    ) -> Result<Option<Tensor>> {
        self.segment.backward(&mut seam.tape, at_output, &mut self.gradients, input_gradient)
    }

    /// One step along the gradients gathered since the last one, over all ranks, which are then zero
    /// again.
    ///
    /// It does not check gradients: see [`Run::check_gradients`](crate::Run::check_gradients).
    pub fn step(&mut self, rule: O) -> Result<()> {
        self.gradients.reduce()?;
        rule.step(&mut self.segment.parameters, &self.gradients, &mut self.memory)?;
        self.gradients.zero();
        Ok(())
    }

    /// The first parameter whose gradient is not finite, as `<segment>.<parameter>`.
    pub fn first_gradient_not_finite(&mut self) -> Result<Option<String>> {
        self.gradients.reduce()?;
        let name = self.gradients.first_non_finite()?;
        Ok(name.map(|name| format!("{}.{name}", self.name)))
    }

    /// The gathered gradient of a parameter.
    ///
    /// # Errors
    ///
    /// There is no parameter of that name.
    pub fn gradient(&self, parameter: &str) -> Result<Vec<f32>> {
        self.gradients.get(parameter)
    }

    /// Saves or loads values, statistics and the optimizer's memory.
    ///
    /// # Errors
    ///
    /// The file holds another network.
    pub fn checkpoint(&mut self, file: &mut Checkpoint) -> anyhow::Result<()> {
        file.segment(self.name, &mut self.segment)?;
        O::checkpoint(&mut self.memory, self.name, file)
    }
}

/// The backward pass through a chain of segments, each fed with the output of the one before: adds
/// the gradients of one pass to those of this step.
///
/// - `seams`: the seam of each segment's forward pass.
/// - `gradients`: candle's gradients at the seams. The loss need not use a seam that is the input of
///   a later segment.
///
/// # Errors
///
/// The loss does not use the output of the last segment, so that nothing would reach the chain; or a
/// gradient has another shape than its seam.
pub fn backward<O: Optimizer, const N: usize>(
    chain: [&mut TrainedSegment<O>; N],
    seams: [Seam; N],
    gradients: &GradStore,
) -> Result<()> {
    let mut from_next: Option<Tensor> = None;
    for (place, (segment, seam)) in chain.into_iter().zip(seams).enumerate().rev() {
        let of_loss = gradients.get(&seam).map(|rows| segment.groups.own_rows(rows)).transpose()?;
        let at_seam = match (from_next, of_loss) {
            (Some(next), Some(loss)) => (next + loss)?,
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => candle_core::bail!(
                "backward: the loss does not depend on the output of segment `{}`; leave the \
                 segment out of the chain, or do not detach its output",
                segment.name
            ),
        };
        from_next = segment.backward(seam, &at_seam, place > 0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::learner::tests::{learner, pictures};

    #[test]
    fn a_loss_that_does_not_reach_the_chain_is_an_error_that_names_its_last_segment()
    -> anyhow::Result<()> {
        let mut online = learner(1)?.online;
        let seams = online.forward(&pictures(1)?, None)?;
        let of_projection = seams[1].sqr()?.mean_all()?.backward()?;
        let error = online.backward(seams, &of_projection).expect_err("no prediction").to_string();
        assert!(
            error.contains("`online.predictor`") && error.contains("does not depend"),
            "{error}"
        );
        let seams = online.forward(&pictures(1)?, None)?;
        let of_prediction = seams[2].sqr()?.mean_all()?.backward()?;
        online.backward(seams, &of_prediction)?;
        assert!(online.backbone.gradient("conv1.weight")?.iter().any(|&value| value != 0.));
        Ok(())
    }
}
