//! The forward pass.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use kernels::convolution::{self, Direction, Finish};
use kernels::norm::{self, Normalisation};
use kernels::{Buffer, Shape, pooling};

use crate::device;
use crate::plan::{Norm, Operation, Plan, Work};
use crate::profile::{self, Pass};
use crate::tape::{Note, Record};
use crate::{Mode, Modes, Network, Parameters, Statistics, Tape};

impl Network {
    /// Runs the network.
    ///
    /// - `input`: (N, H, W, C) for images, normalised, channels last; (N, D) for features; f32 on
    ///   the network's device. Any N and any size that leaves a pixel.
    /// - `modes`: where batch norms take their statistics. In [`Mode::Batch`] the running ones in
    ///   `statistics` are updated, once for each call.
    /// - `tape`: an empty tape to keep what [`backward`](Self::backward) needs. Without one the
    ///   results are the same and nothing is kept.
    ///
    /// Returns the output (N, D), f32, detached.
    ///
    /// # Errors
    ///
    /// The input has another type, extent or device; a map becomes empty; batch statistics over a
    /// single value; arguments of another network; a tape that still holds a forward pass.
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
            bail!("the tape still holds a forward pass; consume it by `backward` or clear it")
        }
        let shapes = plan.shapes(input.dims())?;
        check_counts(plan, &shapes, modes)?;
        if let Some(place) = &plan.place {
            let keep = tape.is_some();
            let (output, record) =
                device::forward(plan, place, parameters, statistics, input, modes, shapes, keep)?;
            if let Some(tape) = tape {
                tape.on_device = Some(record);
            }
            return Ok(output);
        }
        let input = Numbers::of(input, "the input")?;

        let mut run = Run::new(plan, parameters, statistics, modes, shapes, tape.is_some());
        let (output, record) = kernels::on_workers(|| {
            input.with(|numbers| run.read(numbers));
            for (at, operation) in plan.operations.iter().enumerate() {
                run.operation(operation);
                run.release(at);
            }
            run.finish()
        });
        if let Some(tape) = tape {
            tape.record = Some(record);
        }
        output
    }
}

/// Batch statistics need two values, as in PyTorch: the variance without bias of one is 0/0.
fn check_counts(plan: &Plan, shapes: &[Shape], modes: &Modes) -> Result<()> {
    for operation in &plan.operations {
        let norm = matches!(operation.work, Work::BatchNorm(_));
        let single = shapes[operation.input].count() < 2;
        if norm && single && modes.of(operation.block) == Mode::Batch {
            bail!(
                "`{}`: batch statistics of a single value per channel; take a larger batch or the \
                 running statistics",
                operation.name
            )
        }
    }
    Ok(())
}

/// The numbers of a tensor, read where they lie.
pub(crate) struct Numbers(Tensor);

impl Numbers {
    /// # Errors
    ///
    /// The tensor is not f32 on the CPU.
    pub fn of(tensor: &Tensor, what: &str) -> Result<Numbers> {
        if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() {
            let (dtype, device) = (tensor.dtype(), tensor.device().location());
            bail!("{what} is {dtype:?} on {device:?}, but f32 on the CPU is expected")
        }
        Ok(Numbers(tensor.contiguous()?))
    }

    pub fn with(&self, use_them: impl FnOnce(&[f32])) {
        let (storage, layout) = self.0.storage_and_layout();
        if let (Storage::Cpu(CpuStorage::F32(all)), Some((from, to))) =
            (&*storage, layout.contiguous_offsets())
        {
            use_them(&all[from..to]);
        }
    }
}

/// A forward pass on its way.
struct Run<'a> {
    plan: &'a Arc<Plan>,
    parameters: &'a Parameters,
    statistics: &'a mut Statistics,
    modes: &'a Modes,
    shapes: Vec<Shape>,
    values: Vec<Option<Buffer>>,
    /// Sums of parts, from the convolution that made a value to the norm that reads it.
    moments: Vec<Option<Buffer>>,
    notes: Vec<Note>,
    keep: bool,
}

impl<'a> Run<'a> {
    fn new(
        plan: &'a Arc<Plan>,
        parameters: &'a Parameters,
        statistics: &'a mut Statistics,
        modes: &'a Modes,
        shapes: Vec<Shape>,
        keep: bool,
    ) -> Self {
        let none = || shapes.iter().map(|_| None).collect();
        let (values, moments) = (none(), none());
        let notes = Vec::with_capacity(plan.operations.len());
        Run { plan, parameters, statistics, modes, shapes, values, moments, notes, keep }
    }

    fn read(&mut self, numbers: &[f32]) {
        let clock = profile::start();
        let mut input = self.value_buffer(self.shapes[0].len());
        self.shapes[0].pack(numbers, &mut input);
        self.passed(clock, "input", 0, 1);
        self.values[0] = Some(input);
    }

    fn operation(&mut self, operation: &Operation) {
        let note = match &operation.work {
            Work::Product { weight, bias, residual, relu, .. } => {
                self.product(operation, *weight, *bias, *residual, *relu)
            }
            Work::BatchNorm(norm) => self.batch_norm(operation, norm),
            Work::Relu => self.relu(operation),
            Work::MaxPool { .. } => self.max_pool(operation),
            Work::AveragePool => self.average_pool(operation),
        };
        self.notes.push(if self.keep { note } else { Note::Nothing });
    }

    fn product(
        &mut self,
        operation: &Operation,
        weight: usize,
        bias: Option<usize>,
        residual: Option<usize>,
        relu: bool,
    ) -> Note {
        let plan = self.plan;
        let g = plan.geometry(operation, &self.shapes).expect("shapes were checked");
        let packed = self.parameters.packed(weight, Direction::Forward, &g, plan);
        let bias = bias.map(|bias| {
            let mut padded = vec![0.; g.output.padded_channels()];
            padded[..g.output.channels].copy_from_slice(self.parameters.of(bias));
            padded
        });
        let mut moments = plan.feeds_norm[operation.output]
            .filter(|block| self.modes.of(*block) == Mode::Batch)
            .map(|_| self.take(norm::moments_len(g.output)));
        let mut output = self.value_buffer(g.output.len());
        let clock = profile::start();
        convolution::forward(
            plan.variant,
            &g,
            self.value(operation.input),
            &packed,
            Finish { bias: bias.as_deref(), residual: residual.map(|r| self.value(r)), relu },
            &mut output,
            moments.as_deref_mut(),
        );
        profile::stop(clock, Pass::Forward, || profile::product(&g, plan.precision));
        self.moments[operation.output] = moments;
        self.values[operation.output] = Some(output);
        Note::Nothing
    }

    fn batch_norm(&mut self, operation: &Operation, norm: &Norm) -> Note {
        let clock = profile::start();
        let variant = self.plan.variant;
        let shape = self.shapes[operation.input];
        let n = self.normalisation(operation, norm);
        let (weight, bias) = (self.parameters.of(norm.weight), self.parameters.of(norm.bias));
        // Without a tape the output takes the place of the input if nothing else reads that.
        let last = self.plan.last_use[operation.input] == self.notes.len();
        let in_place = last && !self.keep && norm.residual != Some(operation.input);
        let output = if in_place {
            let mut values = self.values[operation.input].take().expect("a value before its use");
            let residual = norm.residual.map(|r| self.value(r));
            norm::forward_in_place(
                variant,
                shape,
                &mut values,
                &n,
                weight,
                bias,
                residual,
                norm.relu,
            );
            values
        } else {
            let mut output = self.value_buffer(shape.len());
            let (input, residual) =
                (self.value(operation.input), norm.residual.map(|r| self.value(r)));
            norm::forward(
                variant,
                shape,
                input,
                &n,
                weight,
                bias,
                residual,
                norm.relu,
                &mut output,
            );
            output
        };
        self.values[operation.output] = Some(output);
        self.passed(clock, "batch norm", operation.input, 2 + usize::from(norm.residual.is_some()));
        Note::Normalisation(n)
    }

    /// Mean and deviation by the block's mode; updates the running ones when the batch's are used.
    fn normalisation(&mut self, operation: &Operation, norm: &Norm) -> Normalisation {
        let shape = self.shapes[operation.input];
        let mut n = Normalisation {
            mean: vec![0.; shape.padded_channels()],
            inverse_deviation: vec![0.; shape.padded_channels()],
            batch: self.modes.of(operation.block) == Mode::Batch,
        };
        let inverse = |variance: f64| 1. / (variance + norm.epsilon).sqrt();
        if n.batch {
            let parts = self.moments[operation.input].take().unwrap_or_else(|| {
                let mut parts = self.take(norm::moments_len(shape));
                norm::moments(self.plan.variant, shape, self.value(operation.input), &mut parts);
                parts
            });
            let moments = norm::merge(shape, &parts);
            for channel in 0..shape.channels {
                n.mean[channel] = moments.mean[channel];
                n.inverse_deviation[channel] = inverse(moments.variance(channel));
            }
            let (mean, variance) = (norm.running_mean, norm.running_variance);
            self.statistics.update(mean, variance, &moments, norm.momentum);
        } else {
            for (to, mean) in n.mean.iter_mut().zip(self.statistics.of(norm.running_mean)) {
                *to = f64::from(*mean);
            }
            let variances = self.statistics.of(norm.running_variance);
            for (to, variance) in n.inverse_deviation.iter_mut().zip(variances) {
                *to = inverse(f64::from(*variance));
            }
        }
        n
    }

    fn relu(&mut self, operation: &Operation) -> Note {
        let clock = profile::start();
        let shape = self.shapes[operation.input];
        let mut output = self.value_buffer(shape.len());
        norm::relu_forward(self.plan.variant, shape, self.value(operation.input), &mut output);
        self.passed(clock, "relu", operation.input, 2);
        self.values[operation.output] = Some(output);
        Note::Nothing
    }

    fn max_pool(&mut self, operation: &Operation) -> Note {
        let clock = profile::start();
        let w = self.plan.window(operation, &self.shapes).expect("shapes were checked");
        let mut output = self.value_buffer(w.output.len());
        let mut taps = self.take(w.output.len() / size_of::<f32>());
        let input = self.value(operation.input);
        pooling::max_forward(self.plan.variant, &w, input, &mut output, taps.bytes_mut());
        self.passed(clock, "max-pool", operation.input, 2);
        self.values[operation.output] = Some(output);
        Note::Taps(taps)
    }

    fn average_pool(&mut self, operation: &Operation) -> Note {
        let clock = profile::start();
        let mut output = self.value_buffer(self.shapes[operation.output].len());
        let shape = self.shapes[operation.input];
        let input = self.value(operation.input);
        pooling::average_forward(self.plan.variant, shape, input, &mut output);
        self.passed(clock, "average pool", operation.input, 2);
        self.values[operation.output] = Some(output);
        Note::Nothing
    }

    fn passed(&self, clock: Option<Instant>, kind: &str, value: usize, times: usize) {
        let (shape, precision) = (self.shapes[value], self.plan.precision);
        profile::stop(clock, Pass::Forward, || profile::passes(kind, shape, precision, times));
    }

    /// Gives back the memory of values that nothing reads after operation `at`.
    fn release(&mut self, at: usize) {
        for (value, buffer) in self.values.iter_mut().enumerate() {
            if self.plan.last_use[value] == at && !(self.keep && self.plan.kept[value]) {
                *buffer = None;
            }
        }
    }

    fn finish(mut self) -> (Result<Tensor>, Record) {
        let shape = self.shapes[self.plan.output];
        let mut rows = vec![0.; shape.count() * shape.channels];
        shape.unpack(self.value(self.plan.output), &mut rows);
        let output = Tensor::from_vec(rows, (shape.images, shape.channels), &Device::Cpu);
        if !self.plan.kept[self.plan.output] {
            self.values[self.plan.output] = None;
        }
        let record = Record {
            plan: Arc::clone(self.plan),
            version: self.parameters.version(),
            shapes: self.shapes,
            values: self.values,
            notes: self.notes,
        };
        (output, record)
    }

    fn value(&self, value: usize) -> &Buffer {
        self.values[value].as_ref().expect("a value is there until its last use")
    }

    fn value_buffer(&self, len: usize) -> Buffer {
        self.plan.pool.take_of(self.plan.precision, len)
    }

    /// Of f32, whatever values are stored as.
    fn take(&self, len: usize) -> Buffer {
        self.plan.pool.take(len)
    }
}
