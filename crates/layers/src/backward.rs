//! The backward pass.

use candle_core::{Device, Result, Tensor, bail};
use kernels::convolution::{self, Direction};
use kernels::norm;
use kernels::{Buffer, Shape, linear, pooling};

use crate::device;
use crate::forward::Numbers;
use crate::plan::{Norm, Operation, Plan, Work};
use crate::profile::{self, Pass};
use crate::tape::{Note, Record};
use crate::{Gradients, Network, Parameters, Tape};

impl Network {
    /// Adds to `gradients` what the forward pass on `tape` contributes, and empties the tape.
    ///
    /// - `parameters`: as they were in the forward pass.
    /// - `gradient`: of the loss with respect to the output, (N, D), f32 on the network's device.
    /// - `input_gradient`: whether to go on to the input and return its gradient, in the input's
    ///   shape. Otherwise the pass stops below the lowest block that is trained.
    ///
    /// Frozen blocks get no gradient; what they pass on is computed only if something below needs
    /// it.
    ///
    /// # Errors
    ///
    /// An empty tape; a gradient of another type or extent than the output; parameters that were
    /// changed since; arguments of another network. The tape keeps its forward pass then.
    pub fn backward(
        &self,
        parameters: &Parameters,
        tape: &mut Tape,
        gradient: &Tensor,
        gradients: &mut Gradients,
        input_gradient: bool,
    ) -> Result<Option<Tensor>> {
        let plan = &self.0;
        parameters.check_plan(plan)?;
        gradients.flat.check_layout(&plan.parameters, "the gradients")?;
        gradients.flat.check_place(plan.place.as_ref(), "the gradients")?;
        let (other, version, output) = match (&plan.place, &tape.record, &tape.on_device) {
            (None, Some(r), _) => (&r.plan, r.version, r.shapes[plan.output]),
            (Some(_), _, Some(r)) => (&r.plan, r.version, r.shapes[plan.output]),
            _ => bail!("the tape is empty; run `forward` with it first"),
        };
        if other.parameters != plan.parameters
            || other.channels != plan.channels
            || other.precision != plan.precision
        {
            bail!("the tape belongs to another network")
        }
        if version != parameters.version() {
            bail!("the parameters have changed since the forward pass on this tape")
        }
        if gradient.dims() != [output.images, output.channels] {
            let wanted = (output.images, output.channels);
            bail!("the output is {wanted:?} but its gradient is {:?}", gradient.dims())
        }
        let needed = needed(plan, parameters, input_gradient);
        if let (Some(place), Some(record)) = (&plan.place, &tape.on_device) {
            let at_input =
                device::backward(plan, place, parameters, record, gradient, gradients, needed)?;
            tape.clear();
            return Ok(at_input);
        }
        let gradient = Numbers::of(gradient, "the gradient")?;
        let Some(record) = tape.record.take() else { return Ok(None) };

        let values = record.shapes.iter().map(|_| None).collect();
        let mut run = Run { plan, parameters, record, gradients, needed, values };
        kernels::on_workers(|| {
            gradient.with(|numbers| run.read(numbers));
            for at in (0..plan.operations.len()).rev() {
                run.operation(at);
            }
        });
        if input_gradient { run.input_gradient().map(Some) } else { Ok(None) }
    }
}

/// For each value, whether its gradient is of use: some trained parameter, or the input when
/// asked, lies at or below it.
fn needed(plan: &Plan, parameters: &Parameters, input_gradient: bool) -> Vec<bool> {
    let mut needed = vec![false; plan.channels.len()];
    needed[0] = input_gradient;
    for operation in &plan.operations {
        let (own, residual) = match &operation.work {
            Work::Product { .. } => (true, None),
            Work::BatchNorm(norm) => (true, norm.residual),
            Work::Relu | Work::MaxPool { .. } | Work::AveragePool => (false, None),
        };
        needed[operation.output] = needed[operation.input]
            || residual.is_some_and(|r| needed[r])
            || own && parameters.is_trained(operation.block);
    }
    needed
}

/// A backward pass on its way.
struct Run<'a> {
    plan: &'a Plan,
    parameters: &'a Parameters,
    record: Record,
    gradients: &'a mut Gradients,
    needed: Vec<bool>,
    /// Gradients of values: what the operations above have added so far.
    values: Vec<Option<Buffer>>,
}

impl Run<'_> {
    fn read(&mut self, numbers: &[f32]) {
        let shape = self.record.shapes[self.plan.output];
        let mut gradient = self.value_buffer(shape.len());
        shape.pack(numbers, &mut gradient);
        self.values[self.plan.output] = Some(gradient);
    }

    fn operation(&mut self, at: usize) {
        let plan = self.plan;
        let operation = &plan.operations[at];
        // Taken, so that its memory is free for the gradients below.
        let Some(gradient) = self.values[operation.output].take() else { return };
        if !self.needed[operation.output] {
            return;
        }
        let clock = profile::start();
        let (kind, times) = match &operation.work {
            Work::Product { weight, bias, .. } => {
                // It has clocks of its own.
                return self.product(operation, *weight, *bias, &gradient);
            }
            Work::BatchNorm(norm) => {
                self.batch_norm(at, norm, gradient);
                // Gradient and input are read for the sums; with a residual before a ReLU the output
                // is, too, and the gradient is written. Then gradient and input are read and a
                // gradient is written.
                ("batch norm", if norm.relu && norm.residual.is_some() { 7 } else { 5 })
            }
            Work::Relu => {
                self.relu(operation, gradient);
                ("relu", 3)
            }
            Work::MaxPool { .. } => {
                self.max_pool(at, &gradient);
                ("max-pool", 2)
            }
            Work::AveragePool => {
                self.average_pool(operation, &gradient);
                ("average pool", 1)
            }
        };
        let (shape, precision) = (self.record.shapes[operation.input], plan.precision);
        profile::stop(clock, Pass::Backward, || profile::passes(kind, shape, precision, times));
    }

    fn product(
        &mut self,
        operation: &Operation,
        weight: usize,
        bias: Option<usize>,
        gradient: &Buffer,
    ) {
        let variant = self.plan.variant;
        let g = self.plan.geometry(operation, &self.record.shapes).expect("as in forward");
        if self.parameters.is_trained(operation.block) {
            let input = kept(&self.record, operation.input);
            let into = self.gradients.of_mut(weight);
            let clock = profile::start();
            convolution::weight_gradient(variant, &g, input, gradient, &self.plan.pool, into);
            if let Some(bias) = bias {
                linear::bias_gradient(variant, g.output, gradient, self.gradients.of_mut(bias));
            }
            profile::stop(clock, Pass::Weights, || profile::product(&g, self.plan.precision));
        }
        if self.needed[operation.input] {
            let packed = self.parameters.packed(weight, Direction::Backward, &g, self.plan);
            let clock = profile::start();
            let (mut into, add) = self.into(operation.input, g.input);
            convolution::input_gradient(variant, &g, gradient, &packed, &mut into, add);
            profile::stop(clock, Pass::Backward, || profile::product(&g, self.plan.precision));
            self.values[operation.input] = Some(into);
        }
    }

    fn batch_norm(&mut self, at: usize, norm: &Norm, mut gradient: Buffer) {
        let plan = self.plan;
        let (operation, variant) = (&plan.operations[at], plan.variant);
        let shape = self.record.shapes[operation.input];
        let mut scratch = plan.pool.take(norm::gradient_sums_len(shape));
        let record = &self.record;
        let Note::Normalisation(n) = &record.notes[at] else { return };
        let input = kept(record, operation.input);
        let weight = self.parameters.of(norm.weight);
        let relu = match (norm.relu, norm.residual) {
            (false, _) => norm::Relu::Absent,
            (true, None) => norm::Relu::Again(weight, self.parameters.of(norm.bias)),
            (true, Some(_)) => norm::Relu::Output(kept(record, operation.output)),
        };
        let sums = norm::gradient_sums(variant, shape, &mut gradient, relu, input, n, &mut scratch);
        if self.parameters.is_trained(operation.block) {
            norm::weight_gradient(n, &sums, self.gradients.of_mut(norm.weight));
            norm::bias_gradient(&sums, self.gradients.of_mut(norm.bias));
        }
        let (needed, residual) =
            (self.needed[operation.input], norm.residual.filter(|r| self.needed[*r]));
        let Some(residual) = residual else {
            if needed {
                let result = &mut gradient;
                norm::input_gradient(variant, shape, input, n, weight, &sums, relu, None, result);
                self.hand_on(operation.input, shape, gradient);
            }
            return;
        };
        // The residual's gradient is the sum's own, so the input's needs memory of its own.
        if needed {
            let mut result = plan.pool.take_of(plan.precision, shape.len());
            let from = Some(&gradient);
            let into = &mut result;
            norm::input_gradient(variant, shape, input, n, weight, &sums, relu, from, into);
            self.hand_on(operation.input, shape, result);
        }
        self.hand_on(residual, shape, gradient);
    }

    fn relu(&mut self, operation: &Operation, mut gradient: Buffer) {
        let shape = self.record.shapes[operation.input];
        let output = kept(&self.record, operation.output);
        norm::relu_backward(self.plan.variant, shape, output, &mut gradient);
        self.hand_on(operation.input, shape, gradient);
    }

    fn max_pool(&mut self, at: usize, gradient: &Buffer) {
        let operation = &self.plan.operations[at];
        let w = self.plan.window(operation, &self.record.shapes).expect("as in forward");
        let (mut into, add) = self.into(operation.input, w.input);
        if let Note::Taps(taps) = &self.record.notes[at] {
            let variant = self.plan.variant;
            pooling::max_backward(variant, &w, gradient, taps.bytes(), &mut into, add);
        }
        self.values[operation.input] = Some(into);
    }

    fn average_pool(&mut self, operation: &Operation, gradient: &Buffer) {
        let shape = self.record.shapes[operation.input];
        let (mut into, add) = self.into(operation.input, shape);
        pooling::average_backward(self.plan.variant, shape, gradient, &mut into, add);
        self.values[operation.input] = Some(into);
    }

    fn input_gradient(&mut self) -> Result<Tensor> {
        let shape = self.record.shapes[0];
        let mut rows = vec![0.; shape.count() * shape.channels];
        if let Some(gradient) = self.values[0].take() {
            shape.unpack(&gradient, &mut rows);
        }
        match self.plan.input {
            crate::plan::Input::Images(_) => {
                let Shape { images, height, width, channels } = shape;
                Tensor::from_vec(rows, (images, height, width, channels), &Device::Cpu)
            }
            crate::plan::Input::Features(_) => {
                Tensor::from_vec(rows, (shape.images, shape.channels), &Device::Cpu)
            }
        }
    }

    /// The gradient of a value, to be added to or, when it is new, to be replaced.
    fn into(&mut self, value: usize, shape: Shape) -> (Buffer, bool) {
        match self.values[value].take() {
            Some(gradient) => (gradient, true),
            None => (self.value_buffer(shape.len()), false),
        }
    }

    /// Adds to the gradient of a value, or becomes it.
    fn hand_on(&mut self, value: usize, shape: Shape, gradient: Buffer) {
        match &mut self.values[value] {
            Some(total) => norm::add(self.plan.variant, shape, &gradient, total),
            none => *none = Some(gradient),
        }
    }

    fn value_buffer(&self, len: usize) -> Buffer {
        self.plan.pool.take_of(self.plan.precision, len)
    }
}

/// A value that the forward pass kept.
fn kept(record: &Record, value: usize) -> &Buffer {
    record.values[value].as_ref().expect("the forward pass keeps what the backward pass reads")
}

#[cfg(test)]
mod tests {
    use crate::{BatchNorm, Builder, Convolution};

    use super::*;

    /// Values: 0 the input, then one for each operation of `stem`, `middle` and `head`.
    fn network() -> Result<Network> {
        let mut b = Builder::images(3);
        let c = Convolution { out_channels: 4, kernel: 3, stride: 1, padding: 1 };
        let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
        b.block("stem");
        let x = b.input();
        let y = b.convolution("conv1", x, c)?;
        b.block("middle");
        let z = b.convolution("conv2", y, c)?;
        let y = b.batch_norm("bn2", z, BatchNorm { residual: Some(y), ..norm })?;
        b.block("head");
        let y = b.global_average_pool(y)?;
        let y = b.linear("fc", y, 2)?;
        b.finish(y)
    }

    #[test]
    fn gradients_are_computed_down_to_the_lowest_trained_block_only() -> Result<()> {
        let network = network()?;
        let mut parameters = network.parameters();
        let with = |parameters: &Parameters, input| needed(&network.0, parameters, input);
        assert_eq!(with(&parameters, false), [false, true, true, true, true, true]);
        assert_eq!(with(&parameters, true), [true; 6]);
        parameters.set_trainable("stem", false)?;
        assert_eq!(with(&parameters, false), [false, false, true, true, true, true]);
        parameters.set_trainable("middle", false)?;
        // The pool above it passes nothing on either.
        assert_eq!(with(&parameters, false), [false, false, false, false, false, true]);
        assert_eq!(with(&parameters, true), [true; 6]);
        parameters.set_trainable("head", false)?;
        assert_eq!(with(&parameters, false), [false; 6]);
        // A trained block below frozen ones needs all above it.
        parameters.set_trainable("stem", true)?;
        assert_eq!(with(&parameters, false), [false, true, true, true, true, true]);
        Ok(())
    }
}
