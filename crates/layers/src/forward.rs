//! The forward pass: one walk over the plan, for every backend.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use kernels::Shape;

use crate::backend::{Backend, NormCall, Operand, Operations, ProductCall};
use crate::flat::{Changes, Flat, Pending};
use crate::parameters::LARGE_PACKED_BYTES;
use crate::plan::{NetworkOperation, NetworkPlan, Norm, OperationWork, Product};
use crate::tape::{Activations, Kept, Note, TapeRecord};
use crate::{Mode, Modes, Network, Parameters, Statistics, Tape};

impl Network {
    /// Runs the network.
    ///
    /// - `input`: (N, H, W, C) for images, normalised, channels last; (N, D) for features; f32 on
    ///   the network's device. Any N, and any size that leaves a pixel.
    /// - `modes`: which statistics the batch norms use. In [`Mode::Batch`] the running ones in
    ///   `statistics` are updated, once for each call.
    /// - `tape`: an empty tape, to keep what [`backward`](Self::backward) needs. The results are the
    ///   same without one.
    ///
    /// Returns the output (N, D), f32, detached.
    ///
    /// # Errors
    ///
    /// The input has another type, shape or device; a map has no pixel left; batch statistics over a
    /// single value; arguments of another network or backend; a tape that holds a forward pass.
    pub fn forward(
        &self,
        parameters: &Parameters,
        statistics: &mut Statistics,
        input: &Tensor,
        modes: &Modes,
        tape: Option<&mut Tape>,
    ) -> Result<Tensor> {
        if tape.as_ref().is_some_and(|tape| !tape.is_empty()) {
            bail!("the tape holds a forward pass; consume it with `backward` or call `clear`")
        }
        let kept_packings = if tape.is_some() { LARGE_PACKED_BYTES } else { usize::MAX };
        let keep = Keep { activations: tape.is_some(), kept_packings };
        let mut passed = self.pass(parameters, statistics, &[input], modes, keep)?;
        let Passed { output, shapes, kept } = passed.pop().expect("one input");
        if let Some(tape) = tape {
            let (plan, version) = (Arc::clone(&self.0), parameters.version());
            tape.record = Some(TapeRecord { plan, version, shapes, kept });
        }
        Ok(output)
    }

    /// Runs the network on each input, such as the views of a batch, operation by operation: weights are packed
    /// once for all inputs, and then freed. Outputs and running statistics have the same bits as after calls
    /// of [`forward`](Self::forward) without a tape, on one input after the other.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_each(
        &self,
        parameters: &Parameters,
        statistics: &mut Statistics,
        inputs: &[&Tensor],
        modes: &Modes,
    ) -> Result<Vec<Tensor>> {
        let keep = Keep { activations: false, kept_packings: 0 };
        let passed = self.pass(parameters, statistics, inputs, modes, keep)?;
        Ok(passed.into_iter().map(|passed| passed.output).collect())
    }

    fn pass(
        &self,
        parameters: &Parameters,
        statistics: &mut Statistics,
        inputs: &[&Tensor],
        modes: &Modes,
        keep: Keep,
    ) -> Result<Vec<Passed>> {
        let plan = &self.0;
        parameters.check_plan(plan)?;
        statistics.check_plan(plan)?;
        modes.check(&plan.blocks)?;
        let shapes = inputs.iter().map(|input| plan.shapes(input.dims()));
        let shapes = shapes.collect::<Result<Vec<_>>>()?;
        shapes.iter().try_for_each(|shapes| check_counts(plan, shapes, modes))?;
        let needs_groups = keep.activations || uses_batch_statistics(plan, modes) || {
            // Without a tape and batch statistics, the kernels of the CPU compute a row alike in any batch. Products
            // of tensors may round it by the size of the batch, so they keep to the groups where they can.
            !matches!(plan.backend, Backend::GroupedCpu(_))
                && shapes.iter().all(|shapes| shapes[0].images >= plan.backend.groups().0)
        };
        let whole = (!needs_groups).then(|| plan.backend.whole());
        let flat = &mut statistics.flat;
        let pass =
            ForwardArguments { plan, parameters, statistics: flat, inputs, modes, shapes, keep };
        let passed = match whole.as_ref().unwrap_or(&plan.backend) {
            Backend::Cpu(cpu) => kernels::on_workers(|| pass.run(cpu, Kept::Cpu)),
            Backend::Tensors(tensors) => pass.run(tensors, Kept::Tensors),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => pass.run(cuda, Kept::Cuda),
            Backend::GroupedCpu(grouped) => {
                kernels::on_workers(|| pass.run(grouped, Kept::GroupedCpu))
            }
            Backend::GroupedTensors(grouped) => pass.run(grouped, Kept::GroupedTensors),
            #[cfg(feature = "cuda")]
            Backend::GroupedCuda(grouped) => pass.run(grouped, Kept::GroupedCuda),
        }?;
        if uses_batch_statistics(plan, modes) {
            statistics.changed();
        }
        Ok(passed)
    }
}

/// What a forward pass leaves behind.
#[derive(Clone, Copy)]
struct Keep {
    /// Whether a backward pass follows.
    activations: bool,
    /// Packed weights of more bytes are freed after their use.
    kept_packings: usize,
}

/// The result of a forward pass of one input.
struct Passed {
    output: Tensor,
    shapes: Vec<Shape>,
    kept: Kept,
}

/// Batch statistics need two values, as in PyTorch: the unbiased variance of one is 0/0.
fn check_counts(plan: &NetworkPlan, shapes: &[Shape], modes: &Modes) -> Result<()> {
    for operation in &plan.operations {
        let norm = matches!(operation.work, OperationWork::BatchNorm(_));
        let single = shapes[operation.input].count() * plan.backend.ranks() < 2;
        if norm && single && modes.of(operation.block) == Mode::Batch {
            bail!(
                "`{}`: batch statistics of a single value per channel; use a larger batch or \
                 running statistics",
                operation.name
            )
        }
    }
    Ok(())
}

fn uses_batch_statistics(plan: &NetworkPlan, modes: &Modes) -> bool {
    plan.operations.iter().any(|operation| {
        matches!(operation.work, OperationWork::BatchNorm(_))
            && modes.of(operation.block) == Mode::Batch
    })
}

/// The checked arguments of a forward pass.
struct ForwardArguments<'a> {
    plan: &'a NetworkPlan,
    parameters: &'a Parameters,
    statistics: &'a mut Flat,
    inputs: &'a [&'a Tensor],
    modes: &'a Modes,
    /// Of the values of each input.
    shapes: Vec<Vec<Shape>>,
    keep: Keep,
}

impl ForwardArguments<'_> {
    /// Passes the inputs through the operations together where they can share packed weights, and else one
    /// after the other.
    fn run<B: Operations>(
        self,
        backend: &B,
        of: impl Fn(Activations<B>) -> Kept,
    ) -> Result<Vec<Passed>> {
        let ForwardArguments { plan, parameters, statistics, inputs, modes, shapes, keep } = self;
        let together = if B::PACKS_WEIGHTS { inputs.len().max(1) } else { 1 };
        let (mut inputs, mut passed) = (inputs.iter().zip(shapes), Vec::new());
        loop {
            let inputs = inputs.by_ref().take(together);
            let flows = inputs.map(|(input, shapes)| Flow::new(backend, input, shapes));
            let mut flows = flows.collect::<Result<Vec<_>>>()?;
            if flows.is_empty() {
                return Ok(passed);
            }
            let mut pending = [Pending::new()];
            let mut pass = ForwardPass {
                backend,
                plan,
                parameters,
                statistics: Changes::of(std::slice::from_mut(statistics), &mut pending),
                modes,
                kept: if keep.activations { plan.kept::<B>() } else { Vec::new() },
            };
            for (at, operation) in plan.operations.iter().enumerate() {
                for flow in &mut flows {
                    pass.operation(at, flow)?;
                    pass.release(at, flow);
                }
                if let OperationWork::Product(product) = &operation.work {
                    parameters.free_packed(product.weight, keep.kept_packings);
                }
            }
            for flow in flows {
                let (output, shapes, activations) = pass.finish(flow)?;
                passed.push(Passed { output, shapes, kept: of(activations) });
            }
            pass.statistics.replace()?;
        }
    }
}

/// A forward pass under way.
struct ForwardPass<'a, B: Operations> {
    backend: &'a B,
    plan: &'a NetworkPlan,
    parameters: &'a Parameters,
    statistics: Changes<'a>,
    modes: &'a Modes,
    /// As [`NetworkPlan::kept`]; empty without a tape.
    kept: Vec<Option<usize>>,
}

/// What has become of one input so far.
struct Flow<B: Operations> {
    shapes: Vec<Shape>,
    values: Vec<Option<B::Value>>,
    /// Sums over values, from the product that makes a value to the norm that reads it.
    sums: Vec<Option<B::Sums>>,
    notes: Vec<Note<B>>,
}

impl<B: Operations> Flow<B> {
    fn new(backend: &B, input: &Tensor, shapes: Vec<Shape>) -> Result<Self> {
        let mut values: Vec<Option<B::Value>> = shapes.iter().map(|_| None).collect();
        values[0] = Some(backend.load(input, shapes[0], "the input")?);
        let sums = shapes.iter().map(|_| None).collect();
        Ok(Self { shapes, values, sums, notes: Vec::new() })
    }

    fn value(&self, value: usize) -> &B::Value {
        self.values[value].as_ref().expect(AVAILABLE)
    }
}

impl<B: Operations> ForwardPass<'_, B> {
    fn operation(&mut self, at: usize, flow: &mut Flow<B>) -> Result<()> {
        let operation = &self.plan.operations[at];
        let (backend, shape) = (self.backend, flow.shapes[operation.input]);
        let (output, note) = match &operation.work {
            OperationWork::Product(product) => {
                (self.product(operation, product, flow)?, Note::Nothing)
            }
            OperationWork::BatchNorm(norm) => self.batch_norm(at, norm, flow)?,
            OperationWork::Relu => {
                (backend.relu(shape, flow.value(operation.input))?, Note::Nothing)
            }
            OperationWork::MaxPool { .. } => {
                let w = self.plan.window(operation, &flow.shapes).expect("shapes were checked");
                let (output, argmax) = backend.max_pool(&w, flow.value(operation.input))?;
                (output, Note::Argmax(argmax))
            }
            OperationWork::AveragePool => {
                (backend.average_pool(shape, flow.value(operation.input))?, Note::Nothing)
            }
        };
        flow.values[operation.output] = Some(output);
        flow.notes.push(if self.keeps_nothing() { Note::Nothing } else { note });
        Ok(())
    }

    fn product(
        &self,
        operation: &NetworkOperation,
        product: &Product,
        flow: &mut Flow<B>,
    ) -> Result<B::Value> {
        let sums = self.plan.feeds_norm[operation.output]
            .is_some_and(|block| self.modes.of(block) == Mode::Batch);
        let (output, sums) = self.backend.product(ProductCall {
            product,
            g: self.plan.geometry(operation, &flow.shapes).expect("shapes were checked"),
            parameters: self.parameters,
            input: flow.value(operation.input),
            residual: product.residual.map(|residual| flow.value(residual)),
            sums,
        })?;
        flow.sums[operation.output] = sums;
        Ok(output)
    }

    fn batch_norm(
        &mut self,
        at: usize,
        norm: &Norm,
        flow: &mut Flow<B>,
    ) -> Result<(B::Value, Note<B>)> {
        let operation = &self.plan.operations[at];
        // Without a tape the output replaces the input, if nothing else reads that.
        let last = self.plan.last_use[operation.input] == at;
        let in_place = last && self.keeps_nothing() && norm.residual != Some(operation.input);
        let owned = if in_place { flow.values[operation.input].take() } else { None };
        let sums = flow.sums[operation.input].take();
        let call = NormCall {
            norm,
            shape: flow.shapes[operation.input],
            batch: self.modes.of(operation.block) == Mode::Batch,
            parameters: self.parameters,
            residual: norm.residual.map(|residual| flow.value(residual)),
            sums,
        };
        let input = match owned {
            Some(value) => Operand::Owned(value),
            None => Operand::Borrowed(flow.value(operation.input)),
        };
        let (output, normalised) = self.backend.batch_norm(call, input, &mut self.statistics)?;
        Ok((output, Note::Normalised(normalised)))
    }

    /// Frees the values that nothing reads after operation `at`.
    fn release(&self, at: usize, flow: &mut Flow<B>) {
        for (value, last_use) in self.plan.last_use.iter().enumerate() {
            if *last_use == at && !self.keeps(value) {
                flow.values[value] = None;
            }
        }
    }

    fn finish(&self, mut flow: Flow<B>) -> Result<(Tensor, Vec<Shape>, Activations<B>)> {
        let (output, shape) = (self.plan.output, flow.shapes[self.plan.output]);
        let dimensions = [shape.images, shape.channels];
        let tensor = self.backend.unload(flow.value(output), shape, &dimensions)?;
        if !self.keeps(output) {
            flow.values[output] = None;
        }
        let Flow { shapes, values, notes, .. } = flow;
        Ok((tensor, shapes, Activations { values, notes }))
    }

    fn keeps_nothing(&self) -> bool {
        self.kept.is_empty()
    }

    fn keeps(&self, value: usize) -> bool {
        self.kept.get(value).is_some_and(Option::is_some)
    }
}

const AVAILABLE: &str = "a value stays until its last use";
