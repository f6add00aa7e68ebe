//! The backward pass: one walk over the plan from its end, for every backend.

use candle_core::{DType, Result, Tensor, bail};
use kernels::Shape;

use crate::backend::{Backend, NormGradientCall, Operations};
use crate::block_sums::{BlockSums, PassGradients};
use crate::flat::{Changes, Pending};
use crate::multiply_adds::needed;
use crate::parameters::LARGE_PACKED_BYTES;
use crate::plan::{NetworkOperation, NetworkPlan, Norm, OperationWork, Product};
use crate::tape::{Activations, Kept, Note, TapeRecord};
use crate::{Gradients, Network, Parameters, Tape};

impl Network {
    /// Adds to `gradients` what the forward pass on `tape` contributes, and empties the tape.
    ///
    /// - `parameters`: unchanged since the forward pass.
    /// - `gradient`: of the loss with respect to the output, (N, D), f32 on the network's device.
    /// - `input_gradient`: whether to return the gradient of the input too, in the input's shape.
    ///   Otherwise the pass stops below the lowest trained block.
    ///
    /// Frozen blocks get no gradient, and gradients are passed through them only if something below
    /// needs them.
    ///
    /// # Errors
    ///
    /// An empty tape; a gradient of another type or shape than the output; parameters that were
    /// changed since; arguments of another network or backend; gradients that expect no further pass. The tape
    /// then keeps its forward pass. It is empty after an error of the computation itself: memory is freed as the
    /// pass goes back.
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
        gradients.check_plan(plan)?;
        let Some(record) = &tape.record else {
            bail!("the tape is empty; run `forward` with it first")
        };
        check_record(plan, record)?;
        if record.version != parameters.version() {
            bail!("the parameters have changed since the forward pass on this tape")
        }
        let output = record.shapes[plan.output];
        if gradient.dims() != [output.images, output.channels] {
            let wanted = (output.images, output.channels);
            bail!("the output is {wanted:?} but its gradient is {:?}", gradient.dims())
        }
        check_gradient(plan, gradient)?;
        let needed = needed(plan, |block| parameters.is_trained(block), input_gradient);
        let gradients = gradients.gather_pass()?;
        let TapeRecord { shapes, kept, .. } = tape.record.take().expect("it was there above");
        let pass = BackwardArguments { plan, parameters, shapes, gradient, gradients, needed };
        match (&plan.backend, kept) {
            (Backend::Cpu(cpu), Kept::Cpu(kept)) => kernels::on_workers(|| pass.run(cpu, kept)),
            (Backend::Tensors(tensors), Kept::Tensors(kept)) => pass.run(tensors, kept),
            #[cfg(feature = "cuda")]
            (Backend::Cuda(cuda), Kept::Cuda(kept)) => pass.run(cuda, kept),
            (Backend::GroupedCpu(grouped), Kept::GroupedCpu(kept)) => {
                kernels::on_workers(|| pass.run(grouped, kept))
            }
            (Backend::GroupedTensors(grouped), Kept::GroupedTensors(kept)) => {
                pass.run(grouped, kept)
            }
            #[cfg(feature = "cuda")]
            (Backend::GroupedCuda(grouped), Kept::GroupedCuda(kept)) => pass.run(grouped, kept),
            _ => unreachable!("the backends of tape and network were compared"),
        }
    }
}

/// Fails unless the gradient has the type and the device of the output.
fn check_gradient(plan: &NetworkPlan, gradient: &Tensor) -> Result<()> {
    let device = plan.backend.id().device();
    if gradient.dtype() != DType::F32 || !gradient.device().same_device(&device) {
        let (dtype, there) = (gradient.dtype(), gradient.device().location());
        let here = device.location();
        bail!("the gradient is {dtype:?} on {there:?}, but f32 on {here:?} is expected")
    }
    Ok(())
}

/// Fails unless a forward pass of this plan, on this backend, made the record.
fn check_record(plan: &NetworkPlan, record: &TapeRecord) -> Result<()> {
    let (here, there) = (plan.backend.id(), record.plan.backend.id());
    if !here.same(there) {
        bail!("the tape was recorded with {there}, but the network computes with {here}")
    }
    if !plan.is_same(&record.plan) {
        bail!("the tape belongs to another network")
    }
    Ok(())
}

/// The checked arguments of a backward pass.
struct BackwardArguments<'a> {
    plan: &'a NetworkPlan,
    parameters: &'a Parameters,
    shapes: Vec<Shape>,
    gradient: &'a Tensor,
    gradients: PassGradients<'a>,
    needed: Vec<bool>,
}

impl BackwardArguments<'_> {
    /// Returns the input's gradient if it is needed.
    fn run<B: Operations>(self, backend: &B, kept: Activations<B>) -> Result<Option<Tensor>> {
        let BackwardArguments { plan, parameters, shapes, gradient, gradients, needed } = self;
        let gradient = backend.load(gradient, shapes[plan.output], "the gradient")?;
        let PassGradients { flats, sums } = gradients;
        let mut pending = vec![Pending::new(); flats.len()];
        let mut pass = BackwardPass {
            backend,
            plan,
            parameters,
            values: shapes.iter().map(|_| None).collect(),
            shapes,
            kept,
            first_reader: plan.kept::<B>(),
            recomputed: plan.recomputed::<B>(),
            gradients: Changes::of(flats, &mut pending),
            sums,
            needed,
        };
        pass.values[plan.output] = Some(gradient);
        for at in (0..plan.operations.len()).rev() {
            pass.operation(at)?;
            pass.release(at);
            pass.begin_sum(at)?;
        }
        pass.finish()
    }
}

/// A backward pass under way.
struct BackwardPass<'a, B: Operations> {
    backend: &'a B,
    plan: &'a NetworkPlan,
    parameters: &'a Parameters,
    shapes: Vec<Shape>,
    kept: Activations<B>,
    /// As [`NetworkPlan::kept`].
    first_reader: Vec<Option<usize>>,
    /// As [`NetworkPlan::recomputed`].
    recomputed: Vec<Option<usize>>,
    gradients: Changes<'a>,
    /// In the last pass of a step.
    sums: Option<BlockSums<'a>>,
    /// Gradients of values: the sum of what their readers have sent back so far.
    values: Vec<Option<B::Value>>,
    needed: Vec<bool>,
}

impl<B: Operations> BackwardPass<'_, B> {
    fn operation(&mut self, at: usize) -> Result<()> {
        let operation = &self.plan.operations[at];
        // Taken, so that its memory is free for the gradients below. A value that does not lead to the
        // output has none.
        let Some(gradient) = self.values[operation.output].take() else { return Ok(()) };
        if !self.needed[operation.output] {
            return Ok(());
        }
        let (backend, shape) = (self.backend, self.shapes[operation.input]);
        let note = std::mem::replace(&mut self.kept.notes[at], Note::Nothing);
        match (&operation.work, note) {
            (OperationWork::Product(product), _) => self.product(operation, product, &gradient),
            (OperationWork::BatchNorm(norm), Note::Normalised(normalised)) => {
                self.batch_norm(operation, norm, &normalised, gradient)
            }
            (OperationWork::Relu, _) => {
                let output = self.kept.values[operation.output].as_ref().expect(KEPT);
                let gradient = backend.relu_gradient(shape, output, gradient)?;
                self.send(operation.input, gradient)
            }
            (OperationWork::MaxPool { .. }, Note::Argmax(argmax)) => {
                let w = self.plan.window(operation, &self.shapes).expect("as in the forward pass");
                let total = self.values[operation.input].take();
                let total = backend.max_pool_gradient(&w, &argmax, &gradient, total)?;
                self.values[operation.input] = Some(total);
                Ok(())
            }
            (OperationWork::AveragePool, _) => {
                let total = self.values[operation.input].take();
                let total = backend.average_pool_gradient(shape, &gradient, total)?;
                self.values[operation.input] = Some(total);
                Ok(())
            }
            (OperationWork::BatchNorm(_) | OperationWork::MaxPool { .. }, _) => {
                unreachable!("the forward pass of the same plan made the notes")
            }
        }
    }

    fn product(
        &mut self,
        operation: &NetworkOperation,
        product: &Product,
        gradient: &B::Value,
    ) -> Result<()> {
        if product.relu || product.residual.is_some() {
            bail!("`{}`: a batch norm is folded into it; it has no backward pass", operation.name)
        }
        let g = self.plan.geometry(operation, &self.shapes).expect("as in the forward pass");
        if self.parameters.is_trained(operation.block) {
            let again = self.recomputed[operation.input].map(|norm| self.norm_output(norm));
            let again = again.transpose()?;
            let kept = self.kept.values[operation.input].as_ref();
            let input = again.as_ref().or(kept).expect(KEPT);
            self.backend.weight_gradient(product, &g, input, gradient, &mut self.gradients)?;
        }
        if self.needed[operation.input] {
            let (parameters, total) = (self.parameters, self.values[operation.input].take());
            let total = self.backend.input_gradient(product, &g, parameters, gradient, total)?;
            self.values[operation.input] = Some(total);
            parameters.free_packed(product.weight, LARGE_PACKED_BYTES);
        }
        Ok(())
    }

    /// The output of the batch norm at `at` again, as in the forward pass.
    fn norm_output(&self, at: usize) -> Result<B::Value> {
        let operation = &self.plan.operations[at];
        let (OperationWork::BatchNorm(norm), Note::Normalised(normalised)) =
            (&operation.work, &self.kept.notes[at])
        else {
            unreachable!("only batch norms are computed again, before their own backward pass")
        };
        let input = self.kept.values[operation.input].as_ref().expect(KEPT);
        let shape = self.shapes[operation.input];
        self.backend.norm_output(norm, shape, self.parameters, input, normalised)
    }

    fn batch_norm(
        &mut self,
        operation: &NetworkOperation,
        norm: &Norm,
        normalised: &B::Normalised,
        gradient: B::Value,
    ) -> Result<()> {
        let residual = norm.residual.filter(|residual| self.needed[*residual]);
        let call = NormGradientCall {
            norm,
            shape: self.shapes[operation.input],
            parameters: self.parameters,
            trained: self.parameters.is_trained(operation.block),
            wanted: [self.needed[operation.input], residual.is_some()],
            normalised,
            input: self.kept.values[operation.input].as_ref(),
            output: self.kept.values[operation.output].as_ref(),
        };
        let [of_input, of_residual] =
            self.backend.batch_norm_gradients(call, gradient, &mut self.gradients)?;
        if self.needed[operation.input] {
            self.send(operation.input, of_input.expect("asked for"))?;
        }
        match residual {
            Some(residual) => self.send(residual, of_residual.expect("asked for")),
            None => Ok(()),
        }
    }

    /// Frees what no operation below `at` reads.
    fn release(&mut self, at: usize) {
        for (value, first_reader) in self.first_reader.iter().enumerate() {
            if *first_reader == Some(at) {
                self.kept.values[value] = None;
            }
        }
    }

    /// Begins to sum the gradients of a block over the ranks, after the first of its operations, the last that adds
    /// to them.
    fn begin_sum(&mut self, at: usize) -> Result<()> {
        match &mut self.sums {
            Some(sums) if self.plan.is_first_of_block(at) => {
                sums.begin(self.plan.operations[at].block, self.gradients.flats())
            }
            _ => Ok(()),
        }
    }

    /// Adds to the gradient of a value.
    fn send(&mut self, value: usize, gradient: B::Value) -> Result<()> {
        let shape = self.shapes[value];
        self.values[value] = Some(match self.values[value].take() {
            Some(total) => self.backend.add(shape, gradient, total)?,
            None => gradient,
        });
        Ok(())
    }

    fn finish(mut self) -> Result<Option<Tensor>> {
        self.gradients.add()?;
        if !self.needed[0] {
            return Ok(None);
        }
        let shape = self.shapes[0];
        let dimensions = self.plan.input_dimensions(shape);
        match self.values[0].take() {
            Some(gradient) => self.backend.unload(&gradient, shape, &dimensions).map(Some),
            // The output does not depend on the input.
            None => {
                let device = self.plan.backend.id().device();
                Tensor::zeros(dimensions, DType::F32, &device).map(Some)
            }
        }
    }
}

const KEPT: &str = "the forward pass keeps what the backward pass reads";

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
        let with = |parameters: &Parameters, input| {
            needed(&network.0, |block| parameters.is_trained(block), input)
        };
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
