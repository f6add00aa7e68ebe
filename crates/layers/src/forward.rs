//! The forward pass: one walk over the plan, for every backend.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use kernels::Shape;

use crate::backend::{Backend, NormCall, Operand, Operations, ProductCall};
use crate::flat::{Changes, Flat, Pending};
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
        let plan = &self.0;
        parameters.check_plan(plan)?;
        statistics.check_plan(plan)?;
        modes.check(&plan.blocks)?;
        if tape.as_ref().is_some_and(|tape| !tape.is_empty()) {
            bail!("the tape holds a forward pass; consume it with `backward` or call `clear`")
        }
        let shapes = plan.shapes(input.dims())?;
        check_counts(plan, &shapes, modes)?;
        let (keep, flat) = (tape.is_some(), &mut statistics.flat);
        let pass = ForwardArguments {
            plan,
            parameters,
            statistics: flat,
            input,
            modes,
            shapes: &shapes,
            keep,
        };
        let needs_groups = keep || uses_batch_statistics(plan, modes) || {
            // Without a tape and batch statistics, the kernels of the CPU compute a row alike in any batch. Products
            // of tensors may round it by the size of the batch, so they keep to the groups where they can.
            !matches!(plan.backend, Backend::GroupedCpu(_))
                && shapes[0].images >= plan.backend.groups().0
        };
        let whole = (!needs_groups).then(|| plan.backend.whole());
        let (output, kept) = match whole.as_ref().unwrap_or(&plan.backend) {
            Backend::Cpu(cpu) => {
                let (output, kept) = kernels::on_workers(|| pass.run(cpu))?;
                (output, Kept::Cpu(kept))
            }
            Backend::Tensors(tensors) => {
                let (output, kept) = pass.run(tensors)?;
                (output, Kept::Tensors(kept))
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => {
                let (output, kept) = pass.run(cuda)?;
                (output, Kept::Cuda(kept))
            }
            Backend::GroupedCpu(grouped) => {
                let (output, kept) = kernels::on_workers(|| pass.run(grouped))?;
                (output, Kept::GroupedCpu(kept))
            }
            Backend::GroupedTensors(grouped) => {
                let (output, kept) = pass.run(grouped)?;
                (output, Kept::GroupedTensors(kept))
            }
            #[cfg(feature = "cuda")]
            Backend::GroupedCuda(grouped) => {
                let (output, kept) = pass.run(grouped)?;
                (output, Kept::GroupedCuda(kept))
            }
        };
        if uses_batch_statistics(plan, modes) {
            statistics.changed();
        }
        if let Some(tape) = tape {
            let (plan, version) = (Arc::clone(plan), parameters.version());
            tape.record = Some(TapeRecord { plan, version, shapes, kept });
        }
        Ok(output)
    }
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
    input: &'a Tensor,
    modes: &'a Modes,
    shapes: &'a [Shape],
    keep: bool,
}

impl ForwardArguments<'_> {
    fn run<B: Operations>(self, backend: &B) -> Result<(Tensor, Activations<B>)> {
        let ForwardArguments { plan, parameters, statistics, input, modes, shapes, keep } = self;
        let input = backend.load(input, shapes[0], "the input")?;
        let mut pending = [Pending::new()];
        let mut pass = ForwardPass {
            backend,
            plan,
            parameters,
            statistics: Changes::of(std::slice::from_mut(statistics), &mut pending),
            modes,
            shapes,
            values: shapes.iter().map(|_| None).collect(),
            sums: shapes.iter().map(|_| None).collect(),
            notes: Vec::with_capacity(plan.operations.len()),
            kept: if keep { plan.kept::<B>() } else { Vec::new() },
        };
        pass.values[0] = Some(input);
        for at in 0..plan.operations.len() {
            pass.operation(at)?;
            pass.release(at);
        }
        pass.finish()
    }
}

/// A forward pass under way.
struct ForwardPass<'a, B: Operations> {
    backend: &'a B,
    plan: &'a NetworkPlan,
    parameters: &'a Parameters,
    statistics: Changes<'a>,
    modes: &'a Modes,
    shapes: &'a [Shape],
    values: Vec<Option<B::Value>>,
    /// Sums over values, from the product that makes a value to the norm that reads it.
    sums: Vec<Option<B::Sums>>,
    notes: Vec<Note<B>>,
    /// As [`NetworkPlan::kept`]; empty without a tape.
    kept: Vec<Option<usize>>,
}

impl<B: Operations> ForwardPass<'_, B> {
    fn operation(&mut self, at: usize) -> Result<()> {
        let operation = &self.plan.operations[at];
        let (backend, shape) = (self.backend, self.shapes[operation.input]);
        let (output, note) = match &operation.work {
            OperationWork::Product(product) => (self.product(operation, product)?, Note::Nothing),
            OperationWork::BatchNorm(norm) => self.batch_norm(at, norm)?,
            OperationWork::Relu => {
                (backend.relu(shape, self.value(operation.input))?, Note::Nothing)
            }
            OperationWork::MaxPool { .. } => {
                let w = self.plan.window(operation, self.shapes).expect("shapes were checked");
                let (output, argmax) = backend.max_pool(&w, self.value(operation.input))?;
                (output, Note::Argmax(argmax))
            }
            OperationWork::AveragePool => {
                (backend.average_pool(shape, self.value(operation.input))?, Note::Nothing)
            }
        };
        self.values[operation.output] = Some(output);
        self.notes.push(if self.keeps_nothing() { Note::Nothing } else { note });
        Ok(())
    }

    fn product(&mut self, operation: &NetworkOperation, product: &Product) -> Result<B::Value> {
        let sums = self.plan.feeds_norm[operation.output]
            .is_some_and(|block| self.modes.of(block) == Mode::Batch);
        let (output, sums) = self.backend.product(ProductCall {
            product,
            g: self.plan.geometry(operation, self.shapes).expect("shapes were checked"),
            parameters: self.parameters,
            input: self.value(operation.input),
            residual: product.residual.map(|residual| self.value(residual)),
            sums,
        })?;
        self.sums[operation.output] = sums;
        if !self.keeps_nothing() {
            self.parameters.free_large_packed(product.weight);
        }
        Ok(output)
    }

    fn batch_norm(&mut self, at: usize, norm: &Norm) -> Result<(B::Value, Note<B>)> {
        let operation = &self.plan.operations[at];
        // Without a tape the output replaces the input, if nothing else reads that.
        let last = self.plan.last_use[operation.input] == at;
        let in_place = last && self.keeps_nothing() && norm.residual != Some(operation.input);
        let owned = if in_place { self.values[operation.input].take() } else { None };
        let sums = self.sums[operation.input].take();
        let of = |value: usize| self.values[value].as_ref().expect(AVAILABLE);
        let call = NormCall {
            norm,
            shape: self.shapes[operation.input],
            batch: self.modes.of(operation.block) == Mode::Batch,
            parameters: self.parameters,
            residual: norm.residual.map(of),
            sums,
        };
        let input = match owned {
            Some(value) => Operand::Owned(value),
            None => Operand::Borrowed(of(operation.input)),
        };
        let (output, normalised) = self.backend.batch_norm(call, input, &mut self.statistics)?;
        Ok((output, Note::Normalised(normalised)))
    }

    /// Frees the values that nothing reads after operation `at`.
    fn release(&mut self, at: usize) {
        for (value, last_use) in self.plan.last_use.iter().enumerate() {
            if *last_use == at && !self.keeps(value) {
                self.values[value] = None;
            }
        }
    }

    fn finish(mut self) -> Result<(Tensor, Activations<B>)> {
        let (output, shape) = (self.plan.output, self.shapes[self.plan.output]);
        let dimensions = [shape.images, shape.channels];
        let tensor = self.backend.unload(self.value(output), shape, &dimensions)?;
        if !self.keeps(output) {
            self.values[output] = None;
        }
        self.statistics.replace()?;
        Ok((tensor, Activations { values: self.values, notes: self.notes }))
    }

    fn keeps_nothing(&self) -> bool {
        self.kept.is_empty()
    }

    fn keeps(&self, value: usize) -> bool {
        self.kept.get(value).is_some_and(Option::is_some)
    }

    fn value(&self, value: usize) -> &B::Value {
        self.values[value].as_ref().expect(AVAILABLE)
    }
}

const AVAILABLE: &str = "a value stays until its last use";
