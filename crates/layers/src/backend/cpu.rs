//! The CPU backend: the kernels of the crate `kernels`, on the threads of the current rayon pool.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, bail};
use kernels::convolution::{self, Finish, Geometry, PackedFor};
use kernels::norm::{self, Normalisation};
use kernels::pooling::{self, Window};
use kernels::{Buffer, BufferPool, Precision, Shape, Variant, linear};

use super::{NormCall, NormGradientCall, Operand, Operations, ProductCall};
use crate::Parameters;
use crate::flat::Changes;
use crate::plan::{Norm, Product};
use crate::profile::{self, Pass};

/// Kernels of one variant, and the memory of the values they make.
#[derive(Clone)]
pub(crate) struct Cpu {
    pub variant: Variant,
    pub precision: Precision,
    pub pool: Arc<BufferPool>,
}

impl Cpu {
    pub fn new(variant: Variant, precision: Precision) -> Cpu {
        Cpu { variant, precision, pool: BufferPool::new() }
    }

    /// Memory for a value.
    fn buffer(&self, len: usize) -> Buffer {
        self.pool.take_of(self.precision, len)
    }

    /// The total to add to, or memory for the first share.
    fn total(&self, total: Option<Buffer>, len: usize) -> (Buffer, bool) {
        match total {
            Some(total) => (total, true),
            None => (self.buffer(len), false),
        }
    }

    /// Stops the clock of an operation that passes over a value so many times.
    fn passed(&self, clock: Option<Instant>, kind: &str, pass: Pass, shape: Shape, times: usize) {
        profile::stop(clock, pass, || profile::passes(kind, shape, self.precision, times));
    }

    /// The moments of a value, from the sums that the preceding product has computed, if it has.
    pub fn moments(&self, shape: Shape, input: &Buffer, sums: Option<Buffer>) -> norm::Moments {
        let parts = sums.unwrap_or_else(|| {
            let mut parts = self.pool.take(norm::moments_len(shape));
            norm::moments(self.variant, shape, input, &mut parts);
            parts
        });
        norm::merge(shape, &parts)
    }

    /// Mean and deviation: those of the batch, which update the running ones, or the running ones.
    pub fn normalisation(
        norm: &Norm,
        shape: Shape,
        moments: Option<norm::Moments>,
        statistics: &mut Changes,
    ) -> Normalisation {
        let mut n = Normalisation {
            mean: vec![0.; shape.padded_channels()],
            inverse_deviation: vec![0.; shape.padded_channels()],
            batch: moments.is_some(),
        };
        let inverse = |variance: f64| 1. / (variance + norm.epsilon).sqrt();
        if let Some(moments) = moments {
            for channel in 0..shape.channels {
                n.mean[channel] = moments.mean[channel];
                n.inverse_deviation[channel] = inverse(moments.variance(channel));
            }
            update_running(norm, &moments, statistics);
        } else {
            for (to, mean) in n.mean.iter_mut().zip(statistics.slice(norm.running_mean)) {
                *to = f64::from(*mean);
            }
            let variances = statistics.slice(norm.running_variance);
            for (to, variance) in n.inverse_deviation.iter_mut().zip(variances) {
                *to = inverse(f64::from(*variance));
            }
        }
        n
    }

    /// Applies a batch norm with this mean and deviation.
    pub fn normalise(
        &self,
        call: &NormCall<Self>,
        input: Operand<Buffer>,
        n: &Normalisation,
    ) -> Buffer {
        let NormCall { norm, shape, parameters, residual, .. } = *call;
        let (weight, bias) = (parameters.slice(norm.weight), parameters.slice(norm.bias));
        let (variant, relu) = (self.variant, norm.relu);
        match input {
            Operand::Owned(mut value) => {
                let into = &mut value;
                norm::forward_in_place(variant, shape, into, n, weight, bias, residual, relu);
                value
            }
            Operand::Borrowed(input) => {
                let mut output = self.buffer(shape.len());
                let into = &mut output;
                norm::forward(variant, shape, input, n, weight, bias, residual, relu, into);
                output
            }
        }
    }

    /// The sums of a norm's backward pass. Where the norm's output is at hand, they set the gradient to
    /// zero where the ReLU is.
    pub fn gradient_sums(
        &self,
        call: &NormGradientCall<Self>,
        gradient: &mut Buffer,
    ) -> norm::GradientSums {
        let NormGradientCall { shape, normalised: n, .. } = *call;
        let (input, relu) = (call.input.expect(NORM_INPUT), relu_of(call));
        let mut scratch = self.pool.take(norm::gradient_sums_len(shape));
        norm::gradient_sums(self.variant, shape, gradient, relu, input, n, &mut scratch)
    }

    /// Adds the gradients of a norm's weight and bias.
    pub fn norm_weight_gradients(
        call: &NormGradientCall<Self>,
        sums: &norm::GradientSums,
        gradients: &mut Changes,
    ) {
        norm::weight_gradient(call.normalised, sums, gradients.slice(call.norm.weight));
        norm::bias_gradient(sums, gradients.slice(call.norm.bias));
    }

    /// The gradients of a norm's input and residual, as far as they are wanted.
    pub fn norm_value_gradients(
        &self,
        call: &NormGradientCall<Self>,
        sums: &norm::GradientSums,
        mut gradient: Buffer,
    ) -> [Option<Buffer>; 2] {
        let NormGradientCall { norm, shape, parameters, normalised: n, .. } = *call;
        let (input, relu) = (call.input.expect(NORM_INPUT), relu_of(call));
        let (variant, weight) = (self.variant, parameters.slice(norm.weight));
        let of_input = |from: Option<&Buffer>, into: &mut Buffer| {
            norm::input_gradient(variant, shape, input, n, weight, sums, relu, from, into);
        };
        match call.wanted {
            [false, false] => [None, None],
            [true, false] => {
                of_input(None, &mut gradient);
                [Some(gradient), None]
            }
            // The residual's gradient is the sum's own, so the input's needs other memory.
            [input_wanted, true] => {
                let into = input_wanted.then(|| {
                    let mut into = self.buffer(shape.len());
                    of_input(Some(&gradient), &mut into);
                    into
                });
                [into, Some(gradient)]
            }
        }
    }
}

const NORM_INPUT: &str = "a norm on the CPU reads its input again";

/// The ReLU of a norm, for its backward pass.
fn relu_of<'a>(call: &NormGradientCall<'a, Cpu>) -> norm::Relu<'a> {
    let NormGradientCall { norm, parameters, output, .. } = *call;
    match (norm.relu, norm.residual) {
        (false, _) => norm::Relu::Absent,
        (true, None) => {
            norm::Relu::Recomputed(parameters.slice(norm.weight), parameters.slice(norm.bias))
        }
        (true, Some(_)) => norm::Relu::Output(output.expect("with a residual, and its output too")),
    }
}

/// `running ← (1 − momentum)·running + momentum·batch`, the variance without bias, as PyTorch.
fn update_running(norm: &Norm, moments: &norm::Moments, statistics: &mut Changes) {
    let momentum = norm.momentum;
    let mix = |old: f32, new: f64| ((1. - momentum) * f64::from(old) + momentum * new) as f32;
    for (channel, value) in statistics.slice(norm.running_mean).iter_mut().enumerate() {
        *value = mix(*value, moments.mean[channel]);
    }
    for (channel, value) in statistics.slice(norm.running_variance).iter_mut().enumerate() {
        *value = mix(*value, moments.unbiased_variance(channel));
    }
}

impl Operations for Cpu {
    type Value = Buffer;
    type Sums = Buffer;
    type Normalised = Normalisation;
    /// Bytes, in a buffer of the pool.
    type Argmax = Buffer;

    const PACKS_WEIGHTS: bool = true;

    fn norm_reads(norm: &Norm) -> [bool; 2] {
        // Without a residual the input shows where the ReLU is zero.
        [true, norm.relu && norm.residual.is_some()]
    }

    fn recomputes(norm: &Norm) -> bool {
        // One more pass over a map, against memory for as many maps as the network has such norms. With a
        // residual, that would have to be at hand too.
        norm.residual.is_none()
    }

    fn load(&self, tensor: &Tensor, shape: Shape, what: &str) -> Result<Buffer> {
        if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() {
            let (dtype, device) = (tensor.dtype(), tensor.device().location());
            bail!("{what} is {dtype:?} on {device:?}, but f32 on the CPU is expected")
        }
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(all)), Some((from, to))) =
            (&*storage, layout.contiguous_offsets())
        else {
            unreachable!("type, device and layout were checked above")
        };
        let clock = profile::start();
        let mut value = self.buffer(shape.len());
        shape.pack(&all[from..to], &mut value);
        self.passed(clock, "load", Pass::Forward, shape, 1);
        Ok(value)
    }

    fn unload(&self, value: &Buffer, shape: Shape, dimensions: &[usize]) -> Result<Tensor> {
        let mut rows = vec![0.; shape.count() * shape.channels];
        shape.unpack(value, &mut rows);
        Tensor::from_vec(rows, dimensions, &Device::Cpu)
    }

    fn product(&self, call: ProductCall<Self>) -> Result<(Buffer, Option<Buffer>)> {
        let ProductCall { product, g, parameters, input, residual, sums } = call;
        let packed = parameters.packed(product.weight, PackedFor::Forward, &g, self);
        let bias = product.bias.map(|bias| {
            let mut padded = vec![0.; g.output.padded_channels()];
            padded[..g.output.channels].copy_from_slice(parameters.slice(bias));
            padded
        });
        let mut sums = sums.then(|| self.pool.take(norm::moments_len(g.output)));
        let mut output = self.buffer(g.output.len());
        let finish = Finish { bias: bias.as_deref(), residual, relu: product.relu };
        let clock = profile::start();
        let into = sums.as_deref_mut();
        convolution::forward(self.variant, &g, input, &packed, finish, &mut output, into);
        profile::stop(clock, Pass::Forward, || profile::product(&g, self.precision));
        Ok((output, sums))
    }

    fn weight_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        input: &Buffer,
        gradient: &Buffer,
        gradients: &mut Changes,
    ) -> Result<()> {
        let clock = profile::start();
        let into = gradients.slice(product.weight);
        convolution::weight_gradient(self.variant, g, input, gradient, &self.pool, into);
        if let Some(bias) = product.bias {
            linear::bias_gradient(self.variant, g.output, gradient, gradients.slice(bias));
        }
        profile::stop(clock, Pass::Weights, || profile::product(g, self.precision));
        Ok(())
    }

    fn input_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        parameters: &Parameters,
        gradient: &Buffer,
        total: Option<Buffer>,
    ) -> Result<Buffer> {
        let packed = parameters.packed(product.weight, PackedFor::InputGradient, g, self);
        let clock = profile::start();
        let (mut total, add) = self.total(total, g.input.len());
        convolution::input_gradient(self.variant, g, gradient, &packed, &mut total, add);
        profile::stop(clock, Pass::Backward, || profile::product(g, self.precision));
        Ok(total)
    }

    fn batch_norm(
        &self,
        mut call: NormCall<Self>,
        input: Operand<Buffer>,
        statistics: &mut Changes,
    ) -> Result<(Buffer, Normalisation)> {
        let clock = profile::start();
        let NormCall { norm, shape, residual, .. } = call;
        let sums = call.sums.take();
        let read = input.value();
        let moments = call.batch.then(|| self.moments(shape, read, sums));
        let n = Cpu::normalisation(norm, shape, moments, statistics);
        let output = self.normalise(&call, input, &n);
        let times = 2 + usize::from(residual.is_some());
        self.passed(clock, "batch norm", Pass::Forward, shape, times);
        Ok((output, n))
    }

    fn norm_output(
        &self,
        norm: &Norm,
        shape: Shape,
        parameters: &Parameters,
        input: &Buffer,
        n: &Normalisation,
    ) -> Result<Buffer> {
        let clock = profile::start();
        let (batch, residual, sums) = (n.batch, None, None);
        let call = NormCall { norm, shape, batch, parameters, residual, sums };
        let output = self.normalise(&call, Operand::Borrowed(input), n);
        self.passed(clock, "batch norm", Pass::Backward, shape, 2);
        Ok(output)
    }

    fn batch_norm_gradients(
        &self,
        call: NormGradientCall<Self>,
        mut gradient: Buffer,
        gradients: &mut Changes,
    ) -> Result<[Option<Buffer>; 2]> {
        let clock = profile::start();
        let NormGradientCall { norm, shape, .. } = call;
        let sums = self.gradient_sums(&call, &mut gradient);
        if call.trained {
            Cpu::norm_weight_gradients(&call, &sums, gradients);
        }
        let found = self.norm_value_gradients(&call, &sums, gradient);
        // Gradient and input are read for the sums; with a residual before a ReLU the output is, too,
        // and the gradient is written. Then gradient and input are read and a gradient is written.
        let times = if norm.relu && norm.residual.is_some() { 7 } else { 5 };
        self.passed(clock, "batch norm", Pass::Backward, shape, times);
        Ok(found)
    }

    fn relu(&self, shape: Shape, input: &Buffer) -> Result<Buffer> {
        let clock = profile::start();
        let mut output = self.buffer(shape.len());
        norm::relu_forward(self.variant, shape, input, &mut output);
        self.passed(clock, "relu", Pass::Forward, shape, 2);
        Ok(output)
    }

    fn relu_gradient(&self, shape: Shape, output: &Buffer, mut gradient: Buffer) -> Result<Buffer> {
        let clock = profile::start();
        norm::relu_backward(self.variant, shape, output, &mut gradient);
        self.passed(clock, "relu", Pass::Backward, shape, 3);
        Ok(gradient)
    }

    fn max_pool(&self, w: &Window, input: &Buffer) -> Result<(Buffer, Buffer)> {
        let clock = profile::start();
        let mut output = self.buffer(w.output.len());
        let mut argmax = self.pool.take(w.output.len() / size_of::<f32>());
        pooling::max_forward(self.variant, w, input, &mut output, argmax.bytes_mut());
        self.passed(clock, "max-pool", Pass::Forward, w.input, 2);
        Ok((output, argmax))
    }

    fn max_pool_gradient(
        &self,
        w: &Window,
        argmax: &Buffer,
        gradient: &Buffer,
        total: Option<Buffer>,
    ) -> Result<Buffer> {
        let clock = profile::start();
        let (mut total, add) = self.total(total, w.input.len());
        pooling::max_backward(self.variant, w, gradient, argmax.bytes(), &mut total, add);
        self.passed(clock, "max-pool", Pass::Backward, w.input, 2);
        Ok(total)
    }

    fn average_pool(&self, input_shape: Shape, input: &Buffer) -> Result<Buffer> {
        let clock = profile::start();
        let output_shape = Shape::features(input_shape.images, input_shape.channels);
        let mut output = self.buffer(output_shape.len());
        pooling::average_forward(self.variant, input_shape, input, &mut output);
        self.passed(clock, "average pool", Pass::Forward, input_shape, 2);
        Ok(output)
    }

    fn average_pool_gradient(
        &self,
        input_shape: Shape,
        gradient: &Buffer,
        total: Option<Buffer>,
    ) -> Result<Buffer> {
        let clock = profile::start();
        let (mut total, add) = self.total(total, input_shape.len());
        pooling::average_backward(self.variant, input_shape, gradient, &mut total, add);
        self.passed(clock, "average pool", Pass::Backward, input_shape, 1);
        Ok(total)
    }

    fn add(&self, shape: Shape, gradient: Buffer, mut total: Buffer) -> Result<Buffer> {
        let clock = profile::start();
        norm::add(self.variant, shape, &gradient, &mut total);
        self.passed(clock, "sum of gradients", Pass::Backward, shape, 3);
        Ok(total)
    }
}
