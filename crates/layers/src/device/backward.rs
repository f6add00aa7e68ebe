//! The backward pass.

use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use kernels::Shape;

use super::convolution::Product;
use super::forward::{Note, Record};
use super::{Place, channel_sums, norm, pooling};
use crate::plan::{Input, Norm, Operation, Plan, Work};
use crate::{Gradients, Parameters};

/// [`crate::Network::backward`] for arguments that were checked.
///
/// - `needed`: for each value, whether its gradient is of use.
pub(crate) fn backward(
    plan: &Plan,
    place: &Place,
    parameters: &Parameters,
    record: &Record,
    gradient: &Tensor,
    gradients: &mut Gradients,
    needed: Vec<bool>,
) -> Result<Option<Tensor>> {
    let shape = record.shapes[plan.output];
    let gradient = place.value(gradient, shape, plan.precision, "the gradient")?;
    let mut values: Vec<Option<Tensor>> = vec![None; record.shapes.len()];
    values[plan.output] = Some(gradient);
    let of_input = needed[0];
    let found = Vec::new();
    let mut run = Run { plan, place, parameters, record, needed, values, found };
    for at in (0..plan.operations.len()).rev() {
        run.operation(at)?;
    }
    run.found.sort_by_key(|(range, _)| range.start);
    if let Some(numbers) = &mut gradients.flat.elsewhere {
        numbers.add_pieces(run.found)?;
    }
    if !of_input {
        return Ok(None);
    }
    let Shape { images, height, width, channels } = record.shapes[0];
    let dimensions = match plan.input {
        Input::Images(_) => vec![images, height, width, channels],
        Input::Features(_) => vec![images, channels],
    };
    match run.values[0].take() {
        Some(gradient) => gradient.to_dtype(DType::F32)?.reshape(dimensions).map(Some),
        None => Tensor::zeros(dimensions, DType::F32, &place.device).map(Some),
    }
}

/// A backward pass on its way.
struct Run<'a> {
    plan: &'a Plan,
    place: &'a Place,
    parameters: &'a Parameters,
    record: &'a Record,
    needed: Vec<bool>,
    /// Gradients of values: what the operations above have added so far.
    values: Vec<Option<Tensor>>,
    /// Gradients of parameters, by their place.
    found: Vec<(Range<usize>, Tensor)>,
}

impl Run<'_> {
    fn operation(&mut self, at: usize) -> Result<()> {
        let (operation, record) = (&self.plan.operations[at], self.record);
        // Taken, so that its memory is free for the gradients below.
        let Some(gradient) = self.values[operation.output].take() else { return Ok(()) };
        if !self.needed[operation.output] {
            return Ok(());
        }
        let shape = record.shapes[operation.input];
        let passed = match (&operation.work, &record.notes[at]) {
            (Work::Product { weight, bias, .. }, _) => {
                return self.product(operation, *weight, *bias, &gradient);
            }
            (Work::BatchNorm(norm), Note::Normalisation(note)) => {
                return self.batch_norm(operation, norm, note, gradient);
            }
            #[cfg(feature = "cuda")]
            (Work::BatchNorm(norm), Note::OnCuda(note)) => {
                return self.batch_norm_on_cuda(operation, norm, note, &gradient);
            }
            (Work::Relu, _) => norm::relu_gradient(&gradient, self.kept(operation.output))?,
            (Work::MaxPool { .. }, Note::Taps(taps)) => {
                let w = self.plan.window(operation, &record.shapes).expect("as in forward");
                pooling::max_backward(self.place, &w, &gradient, taps)?
            }
            (Work::AveragePool, _) => pooling::average_backward(shape, &gradient)?,
            (Work::BatchNorm(_) | Work::MaxPool { .. }, _) => return Ok(()),
        };
        self.hand_on(operation.input, passed)
    }

    fn product(
        &mut self,
        operation: &Operation,
        weight: usize,
        bias: Option<usize>,
        gradient: &Tensor,
    ) -> Result<()> {
        let g = self.plan.geometry(operation, &self.record.shapes).expect("as in forward");
        let product = Product::new(self.place, g);
        if self.parameters.is_trained(operation.block) {
            let of_weight = product.weight_gradient(self.kept(operation.input), gradient)?;
            self.note_parameter(weight, of_weight);
            if let Some(bias) = bias {
                let of_bias = channel_sums(&gradient.to_dtype(DType::F32)?)?;
                self.note_parameter(bias, of_bias);
            }
        }
        if self.needed[operation.input] {
            let weight = self.parameters.tensor(weight)?;
            let passed = product.input_gradient(gradient, &weight)?;
            self.hand_on(operation.input, passed)?;
        }
        Ok(())
    }

    fn batch_norm(
        &mut self,
        operation: &Operation,
        norm: &Norm,
        note: &norm::Normalisation,
        gradient: Tensor,
    ) -> Result<()> {
        let gradient = if norm.relu {
            norm::relu_gradient(&gradient, self.kept(operation.output))?
        } else {
            gradient
        };
        let of_norm = norm::Gradients::of(note, &gradient)?;
        if self.needed[operation.input] {
            let weight = self.parameters.tensor(norm.weight)?;
            let passed = of_norm.input(&weight, gradient.dtype())?;
            self.hand_on(operation.input, passed)?;
        }
        if self.parameters.is_trained(operation.block) {
            self.note_parameter(norm.weight, of_norm.weight);
            self.note_parameter(norm.bias, of_norm.bias);
        }
        match norm.residual.filter(|residual| self.needed[*residual]) {
            Some(residual) => self.hand_on(residual, gradient),
            None => Ok(()),
        }
    }

    #[cfg(feature = "cuda")]
    fn batch_norm_on_cuda(
        &mut self,
        operation: &Operation,
        norm: &Norm,
        note: &super::cuda::Normalisation,
        gradient: &Tensor,
    ) -> Result<()> {
        let residual = norm.residual.filter(|residual| self.needed[*residual]);
        // Without a ReLU the residual's gradient is the output's.
        let wanted = [self.needed[operation.input], residual.is_some() && norm.relu];
        let output = norm.relu.then(|| self.kept(operation.output));
        let (weight, bias) =
            (self.parameters.tensor(norm.weight)?, self.parameters.tensor(norm.bias)?);
        let found = super::cuda::gradients(note, gradient, output, [&weight, &bias], wanted)?;
        if let Some(passed) = found.input {
            self.hand_on(operation.input, passed)?;
        }
        if self.parameters.is_trained(operation.block) {
            self.note_parameter(norm.weight, found.weight);
            self.note_parameter(norm.bias, found.bias);
        }
        match residual {
            Some(residual) => {
                self.hand_on(residual, found.residual.unwrap_or_else(|| gradient.clone()))
            }
            None => Ok(()),
        }
    }

    fn note_parameter(&mut self, entry: usize, gradient: Tensor) {
        self.found.push((self.parameters.entries()[entry].range.clone(), gradient));
    }

    /// Adds to the gradient of a value, or becomes it.
    fn hand_on(&mut self, value: usize, gradient: Tensor) -> Result<()> {
        self.values[value] = Some(match self.values[value].take() {
            Some(total) => (total + gradient)?,
            None => gradient,
        });
        Ok(())
    }

    /// A value that the forward pass kept.
    fn kept(&self, value: usize) -> &Tensor {
        let kept = self.record.values[value].as_ref();
        kept.expect("the forward pass keeps what the backward pass reads")
    }
}
