//! The forward pass.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use kernels::Shape;

use super::convolution::Product;
use super::norm::{self, Moments, Normalisation};
use super::{Place, dtype, pooling};
use crate::plan::{Norm, Operation, Plan, Work};
use crate::{Mode, Modes, Parameters, Statistics};

/// What one forward pass keeps for its backward pass.
pub(crate) struct Record {
    pub plan: Arc<Plan>,
    /// Of the parameters that the forward pass saw.
    pub version: u64,
    pub shapes: Vec<Shape>,
    /// The values that the backward pass reads; the others are `None`.
    pub(super) values: Vec<Option<Tensor>>,
    /// What each operation keeps beside values.
    pub(super) notes: Vec<Note>,
}

pub(super) enum Note {
    Nothing,
    Normalisation(Normalisation),
    #[cfg(feature = "cuda")]
    OnCuda(super::cuda::Normalisation),
    /// Which tap of each window held the maximum, u8.
    Taps(Tensor),
}

/// [`crate::Network::forward`] for arguments that were checked.
#[expect(clippy::too_many_arguments, reason = "those of the public function, and what it found")]
pub(crate) fn forward(
    plan: &Arc<Plan>,
    place: &Place,
    parameters: &Parameters,
    statistics: &mut Statistics,
    input: &Tensor,
    modes: &Modes,
    shapes: Vec<Shape>,
    keep: bool,
) -> Result<(Tensor, Record)> {
    let input = place.value(input, shapes[0], plan.precision, "the input")?;
    let mut values: Vec<Option<Tensor>> = vec![None; shapes.len()];
    values[0] = Some(input);
    let (notes, running) = (Vec::with_capacity(plan.operations.len()), Vec::new());
    let mut run = Run { plan, place, parameters, modes, shapes, values, notes, running, keep };
    for (at, operation) in plan.operations.iter().enumerate() {
        run.operation(operation, statistics)?;
        run.release(at);
    }
    let output = run.shapes[plan.output];
    let output = run.value(plan.output).reshape((output.images, output.channels))?;
    run.running.sort_by_key(|(range, _)| range.start);
    if !run.running.is_empty() {
        statistics.changed();
    }
    if let Some(numbers) = &mut statistics.flat.elsewhere
        && !run.running.is_empty()
    {
        numbers.replace(run.running)?;
        statistics.changed();
    }
    let version = parameters.version();
    let Run { shapes, values, notes, .. } = run;
    let record = Record { plan: Arc::clone(plan), version, shapes, values, notes };
    Ok((output.to_dtype(DType::F32)?, record))
}

/// A forward pass on its way.
struct Run<'a> {
    plan: &'a Plan,
    place: &'a Place,
    parameters: &'a Parameters,
    modes: &'a Modes,
    shapes: Vec<Shape>,
    values: Vec<Option<Tensor>>,
    notes: Vec<Note>,
    /// Running statistics that change, by their place.
    running: Vec<(Range<usize>, Tensor)>,
    keep: bool,
}

impl Run<'_> {
    fn operation(&mut self, operation: &Operation, statistics: &Statistics) -> Result<()> {
        let input = self.value(operation.input).clone();
        let (output, note) = match &operation.work {
            Work::Product { weight, bias, .. } => {
                (self.product(operation, &input, *weight, *bias)?, Note::Nothing)
            }
            Work::BatchNorm(norm) => self.batch_norm(operation, &input, norm, statistics)?,
            Work::Relu => (input.relu()?, Note::Nothing),
            Work::MaxPool { .. } => {
                let w = self.plan.window(operation, &self.shapes).expect("shapes were checked");
                let (output, taps) = pooling::max_forward(self.place, &w, &input)?;
                (output, Note::Taps(taps))
            }
            Work::AveragePool => (pooling::average_forward(&input)?, Note::Nothing),
        };
        self.values[operation.output] = Some(output);
        self.notes.push(if self.keep { note } else { Note::Nothing });
        Ok(())
    }

    fn product(
        &self,
        operation: &Operation,
        input: &Tensor,
        weight: usize,
        bias: Option<usize>,
    ) -> Result<Tensor> {
        let g = self.plan.geometry(operation, &self.shapes).expect("shapes were checked");
        let weight = self.parameters.tensor(weight)?;
        let output = Product::new(self.place, g).forward(input, &weight)?;
        match bias {
            Some(bias) => {
                let bias = self.parameters.tensor(bias)?.to_dtype(output.dtype())?;
                output.broadcast_add(&bias)
            }
            None => Ok(output),
        }
    }

    fn batch_norm(
        &mut self,
        operation: &Operation,
        input: &Tensor,
        norm: &Norm,
        statistics: &Statistics,
    ) -> Result<(Tensor, Note)> {
        #[cfg(feature = "cuda")]
        if input.device().is_cuda() {
            return self.batch_norm_on_cuda(operation, input, norm, statistics);
        }
        let n = if self.modes.of(operation.block) == Mode::Batch {
            let (n, moments) = Normalisation::of_batch(input, norm.epsilon)?;
            self.follow(norm, &moments, statistics)?;
            n
        } else {
            let mean = statistics.flat.tensor(norm.running_mean)?;
            let variance = statistics.flat.tensor(norm.running_variance)?;
            Normalisation::of_running(input, &mean, &variance, norm.epsilon)?
        };
        let (weight, bias) =
            (self.parameters.tensor(norm.weight)?, self.parameters.tensor(norm.bias)?);
        let residual = norm.residual.map(|residual| self.value(residual));
        let dtype = dtype(self.plan.precision);
        let (output, n) = n.apply(&weight, &bias, residual, norm.relu, dtype)?;
        Ok((output, Note::Normalisation(n)))
    }

    #[cfg(feature = "cuda")]
    fn batch_norm_on_cuda(
        &mut self,
        operation: &Operation,
        input: &Tensor,
        norm: &Norm,
        statistics: &Statistics,
    ) -> Result<(Tensor, Note)> {
        let (weight, bias) =
            (self.parameters.tensor(norm.weight)?, self.parameters.tensor(norm.bias)?);
        let entries = [norm.running_mean, norm.running_variance];
        let [mean, variance] = entries.map(|entry| statistics.flat.tensor(entry));
        let batch = self.modes.of(operation.block) == Mode::Batch;
        let residual = norm.residual.map(|residual| self.value(residual));
        let (parameters, running) = ([&weight, &bias], [&mean?, &variance?]);
        let made = super::cuda::normalise(norm, input, residual, parameters, running, batch)?;
        for (entry, running) in entries.into_iter().zip(made.running.into_iter().flatten()) {
            self.running.push((statistics.entries()[entry].range.clone(), running));
        }
        Ok((made.y, Note::OnCuda(made.note)))
    }

    /// `running ← (1 − momentum)·running + momentum·batch`, the variance without bias.
    fn follow(&mut self, norm: &Norm, moments: &Moments, statistics: &Statistics) -> Result<()> {
        let unbiased = moments.count as f64 / (moments.count - 1) as f64;
        let variance = (&moments.variance * unbiased)?;
        for (entry, batch) in
            [(norm.running_mean, &moments.mean), (norm.running_variance, &variance)]
        {
            let running = norm::follow(&statistics.flat.tensor(entry)?, batch, norm.momentum)?;
            let range = statistics.entries()[entry].range.clone();
            self.running.push((range, running));
        }
        Ok(())
    }

    /// Forgets values that nothing reads after operation `at`.
    fn release(&mut self, at: usize) {
        for value in 0..self.values.len() {
            if self.plan.last_use[value] == at && !(self.keep && self.is_kept(value)) {
                self.values[value] = None;
            }
        }
    }

    /// Whether the backward pass reads the value. A norm keeps its input in a form of its own.
    fn is_kept(&self, value: usize) -> bool {
        self.plan.operations.iter().any(|operation| match &operation.work {
            Work::Product { .. } => operation.input == value,
            Work::BatchNorm(norm) => norm.relu && operation.output == value,
            Work::Relu => operation.output == value,
            Work::MaxPool { .. } | Work::AveragePool => false,
        })
    }

    fn value(&self, value: usize) -> &Tensor {
        self.values[value].as_ref().expect("a value is there until its last use")
    }
}
