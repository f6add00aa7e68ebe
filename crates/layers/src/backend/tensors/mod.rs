//! The tensor backend: candle's operations, on any of its devices.
//!
//! Forward and backward pass are both written out; candle's autograd takes no part. Only operations
//! that candle has on CUDA and on Metal are used, and nothing is read back to the host within a pass
//! or an update.
//!
//! A value is (N, H·W, C), stored in the network's precision; norms, sums and parameters are f32.
//! The pixels under a window are gathered by [index tables](indices) that depend on the sides of a
//! map alone and stay on the device. So a [convolution](convolution) is one matrix product, and a
//! [max-pool](pooling) a comparison of gathered maps.

pub(super) mod convolution;
pub(super) mod groups;
mod indices;
pub(super) mod norm;
pub(super) mod pooling;
mod vector;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use kernels::convolution::Geometry;
use kernels::pooling::Window;
use kernels::{Precision, Shape};

use super::{NormCall, NormGradientCall, Operand, Operations, ProductCall};
use crate::Parameters;
use crate::flat::Changes;
use crate::plan::{Norm, Product};

use convolution::TensorConvolution;
use indices::IndexTables;
pub(crate) use vector::DeviceVector;

/// A device, and the index tables that all passes on it share.
#[derive(Clone)]
pub(crate) struct Tensors {
    pub device: Device,
    pub precision: Precision,
    pub tables: Arc<IndexTables>,
}

impl Tensors {
    pub fn new(device: &Device, precision: Precision) -> Tensors {
        Tensors { device: device.clone(), precision, tables: Arc::new(IndexTables::on(device)) }
    }

    /// The type that values are stored in.
    pub fn dtype(&self) -> DType {
        match self.precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }
}

impl Operations for Tensors {
    type Value = Tensor;
    type Sums = std::convert::Infallible;
    type Normalised = norm::Centred;
    /// The tap of each window that held the maximum, u8.
    type Argmax = Tensor;

    fn norm_reads(norm: &Norm) -> [bool; 2] {
        // The input is kept centred, in the note.
        [false, norm.relu]
    }

    fn load(&self, tensor: &Tensor, shape: Shape, what: &str) -> Result<Tensor> {
        if tensor.dtype() != DType::F32 || !tensor.device().same_device(&self.device) {
            let (dtype, device) = (tensor.dtype(), tensor.device().location());
            let here = self.device.location();
            bail!("{what} is {dtype:?} on {device:?}, but f32 on {here:?} is expected")
        }
        let value = tensor.detach().contiguous()?;
        value.reshape((shape.images, shape.pixels(), shape.channels))?.to_dtype(self.dtype())
    }

    fn unload(&self, value: &Tensor, _: Shape, dimensions: &[usize]) -> Result<Tensor> {
        value.to_dtype(DType::F32)?.reshape(dimensions)
    }

    fn product(&self, call: ProductCall<Self>) -> Result<(Tensor, Option<Self::Sums>)> {
        let weight = call.parameters.tensor(call.product.weight)?;
        let sum = TensorConvolution::new(&self.tables, call.g).forward(call.input, &weight)?;
        Ok((finish(sum, call.product, call.parameters, call.residual)?, None))
    }

    fn weight_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        input: &Tensor,
        gradient: &Tensor,
        gradients: &mut Changes,
    ) -> Result<()> {
        let convolution = TensorConvolution::new(&self.tables, *g);
        gradients.push(product.weight, convolution.weight_gradient(input, gradient)?);
        bias_gradient(product, gradient, gradients)
    }

    fn input_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        parameters: &Parameters,
        gradient: &Tensor,
        total: Option<Tensor>,
    ) -> Result<Tensor> {
        let weight = parameters.tensor(product.weight)?;
        let convolution = TensorConvolution::new(&self.tables, *g);
        add_to(total, convolution.input_gradient(gradient, &weight)?)
    }

    fn batch_norm(
        &self,
        call: NormCall<Self>,
        input: Operand<Tensor>,
        statistics: &mut Changes,
    ) -> Result<(Tensor, Self::Normalised)> {
        let NormCall { norm, parameters, residual, .. } = call;
        let input = input.value();
        let [mean, variance] = [norm.running_mean, norm.running_variance];
        let [running_mean, running_variance] =
            [statistics.tensor(mean)?, statistics.tensor(variance)?];
        let centred = if call.batch {
            let (centred, moments) = norm::Centred::of_batch(input, norm.epsilon)?;
            let follow = |running: &Tensor, batch: &Tensor| -> Result<Tensor> {
                norm::follow(running, batch, norm.momentum)
            };
            statistics.push(mean, follow(&running_mean, &moments.mean)?);
            statistics.push(variance, follow(&running_variance, &moments.unbiased_variance()?)?);
            centred
        } else {
            norm::Centred::of_running(input, &running_mean, &running_variance, norm.epsilon)?
        };
        let (weight, bias) = (parameters.tensor(norm.weight)?, parameters.tensor(norm.bias)?);
        centred.apply(&weight, &bias, residual, norm.relu, self.dtype())
    }

    fn batch_norm_gradients(
        &self,
        call: NormGradientCall<Self>,
        gradient: Tensor,
        gradients: &mut Changes,
    ) -> Result<[Option<Tensor>; 2]> {
        let NormGradientCall { norm, parameters, wanted: [of_input, of_residual], .. } = call;
        let gradient = match call.relu_output() {
            Some(output) => norm::relu_gradient(&gradient, output)?,
            None => gradient,
        };
        let found = norm::NormGradients::of(call.normalised, &gradient)?;
        let at_input = if of_input {
            Some(found.input(&parameters.tensor(norm.weight)?, gradient.dtype())?)
        } else {
            None
        };
        if call.trained {
            gradients.push(norm.weight, found.weight);
            gradients.push(norm.bias, found.bias);
        }
        Ok([at_input, of_residual.then_some(gradient)])
    }

    fn relu(&self, _: Shape, input: &Tensor) -> Result<Tensor> {
        input.relu()
    }

    fn relu_gradient(&self, _: Shape, output: &Tensor, gradient: Tensor) -> Result<Tensor> {
        norm::relu_gradient(&gradient, output)
    }

    fn max_pool(&self, w: &Window, input: &Tensor) -> Result<(Tensor, Tensor)> {
        pooling::max_forward(&self.tables, w, input)
    }

    fn max_pool_gradient(
        &self,
        w: &Window,
        argmax: &Tensor,
        gradient: &Tensor,
        total: Option<Tensor>,
    ) -> Result<Tensor> {
        add_to(total, pooling::max_backward(&self.tables, w, gradient, argmax)?)
    }

    fn average_pool(&self, _: Shape, input: &Tensor) -> Result<Tensor> {
        pooling::average_forward(input)
    }

    fn average_pool_gradient(
        &self,
        input_shape: Shape,
        gradient: &Tensor,
        total: Option<Tensor>,
    ) -> Result<Tensor> {
        add_to(total, pooling::average_backward(input_shape, gradient)?)
    }

    fn add(&self, _: Shape, gradient: Tensor, total: Tensor) -> Result<Tensor> {
        total + gradient
    }
}

/// Adds to the total, or is its first share.
pub(super) fn add_to(total: Option<Tensor>, gradient: Tensor) -> Result<Tensor> {
    match total {
        Some(total) => total + gradient,
        None => Ok(gradient),
    }
}

/// The bias, residual sum and ReLU that follow a product, if it has them.
pub(super) fn finish(
    sum: Tensor,
    product: &Product,
    parameters: &Parameters,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let mut output = sum;
    if let Some(bias) = product.bias {
        output = output.broadcast_add(&parameters.tensor(bias)?.to_dtype(output.dtype())?)?;
    }
    if let Some(residual) = residual {
        output = (output + residual)?;
    }
    if product.relu { output.relu() } else { Ok(output) }
}

/// Pushes the gradient of a product's bias, if it has one.
pub(super) fn bias_gradient(
    product: &Product,
    gradient: &Tensor,
    gradients: &mut Changes,
) -> Result<()> {
    if let Some(bias) = product.bias {
        gradients.push(bias, channel_sums(&gradient.to_dtype(DType::F32)?)?);
    }
    Ok(())
}

/// `a · b`. candle has no product of bf16 on the CPU: there it is taken in f32 and rounded once, as
/// the other devices do.
fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dtype() == DType::BF16 && a.device().is_cpu() {
        return a.to_dtype(DType::F32)?.matmul(&b.to_dtype(DType::F32)?)?.to_dtype(DType::BF16);
    }
    a.matmul(b)
}

/// `Σₙₚ x`, (N, P, C) to (C), f32: over the pixels of each image first, then over the images.
fn channel_sums(x: &Tensor) -> Result<Tensor> {
    let (n, pixels, channels) = x.dims3()?;
    let ones = |shape: (usize, usize, usize)| Tensor::ones(shape, DType::F32, x.device());
    let of_images = if n > 1 && pixels > 1 {
        ones((n, 1, pixels))?.matmul(x)?.reshape((1, n, channels))?
    } else {
        x.reshape((1, n * pixels, channels))?
    };
    ones((1, 1, of_images.dim(1)?))?.matmul(&of_images)?.reshape(channels)
}
