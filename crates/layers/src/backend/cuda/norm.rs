//! Batch norm by the fused kernels of `kernels::cuda::norm`.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use kernels::cuda::norm::{self, Channels, NormBackwardValues};
use kernels::cuda::{CudaElement, Extent};

use super::memory::{Lent, from_kernel, lend, tensor_of};
use crate::backend::tensors;
use crate::plan::Norm;

/// The data that a norm keeps for its backward pass.
pub(crate) struct NormInput {
    z: Tensor,
    /// Mean and `1 / √(variance + ε)`, (2, C).
    moments: Tensor,
    /// Whether they are the batch's, and so depend on the input.
    batch: bool,
}

/// The results of a norm.
pub(super) struct NormOutput {
    pub y: Tensor,
    /// Running mean and variance after the batch, (C) each; `None` in running mode.
    pub running: Option<[Tensor; 2]>,
    pub note: NormInput,
}

/// `relu((z − mean) · weight / √(variance + ε) + bias + residual)`, residual and ReLU optional.
///
/// - `z`: (N, P, C) in the type of values; `[weight, bias]` and `running` mean and variance: (C) each.
/// - `batch`: whether mean and variance are those of `z`, or the running ones.
pub(super) fn normalise(
    norm: &Norm,
    z: &Tensor,
    residual: Option<&Tensor>,
    parameters: [&Tensor; 2],
    running: [&Tensor; 2],
    batch: bool,
) -> Result<NormOutput> {
    let (z, residual) = (z.contiguous()?, residual.map(Tensor::contiguous).transpose()?);
    match z.dtype() {
        DType::F32 => normalise_of::<f32>(norm, z, residual, parameters, running, batch),
        DType::BF16 => normalise_of::<bf16>(norm, z, residual, parameters, running, batch),
        other => bail!("values are f32 and bf16, not {other:?}"),
    }
}

fn normalise_of<T: CudaElement + CudaDType>(
    norm: &Norm,
    z: Tensor,
    residual: Option<Tensor>,
    [weight, bias]: [&Tensor; 2],
    [mean, variance]: [&Tensor; 2],
    batch: bool,
) -> Result<NormOutput> {
    let (extent, stream) = (extent(&z)?, z.device().as_cuda_device()?.cuda_stream());
    let (lent_z, lent_residual) = (lend(&z)?, residual.as_ref().map(lend).transpose()?);
    let view_z = lent_z.view::<T>()?;
    let (moments, running) = if batch {
        let (mean, variance) = (lend(mean)?, lend(variance)?);
        let running = [&mean.view()?, &variance.view()?];
        let found = norm::moments(&stream, extent, &view_z, running, norm.epsilon, norm.momentum);
        let all = tensor_of(from_kernel(found)?, (4, extent.channels()), &z)?;
        let running = [all.narrow(0, 2, 1)?.flatten_all()?, all.narrow(0, 3, 1)?.flatten_all()?];
        (all.narrow(0, 0, 2)?, Some(running))
    } else {
        let inverse = tensors::norm::inverse(variance, norm.epsilon)?;
        (Tensor::stack(&[mean, &inverse], 0)?, None)
    };
    let y = {
        let lent = LentChannels::new(&moments, weight, bias)?;
        let views = lent.views()?;
        let residual = lent_residual.as_ref().map(Lent::view::<T>).transpose()?;
        let channels = views.channels();
        norm::apply(&stream, extent, &view_z, residual.as_ref(), channels, norm.relu)
    };
    let y = tensor_of(from_kernel(y)?, z.dims(), &z)?;
    drop((view_z, lent_residual));
    drop(lent_z);
    Ok(NormOutput { y, running, note: NormInput { z, moments, batch } })
}

/// The gradients of a norm.
pub(super) struct FusedGradients {
    /// Of weight and bias, (C) each.
    pub weight: Tensor,
    pub bias: Tensor,
    /// Of the input and of the residual, (N, P, C), as far as they are wanted.
    pub input: Option<Tensor>,
    pub residual: Option<Tensor>,
}

/// - `relu_output`: the norm's output, if a ReLU ends it.
/// - `wanted`: whether to compute the gradient of the input, and that of the residual.
pub(super) fn gradients(
    note: &NormInput,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    parameters: [&Tensor; 2],
    wanted: [bool; 2],
) -> Result<FusedGradients> {
    let gradient = gradient.contiguous()?;
    match gradient.dtype() {
        DType::F32 => gradients_of::<f32>(note, &gradient, relu_output, parameters, wanted),
        DType::BF16 => gradients_of::<bf16>(note, &gradient, relu_output, parameters, wanted),
        other => bail!("gradients are f32 and bf16, not {other:?}"),
    }
}

fn gradients_of<T: CudaElement + CudaDType>(
    note: &NormInput,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    [weight, bias]: [&Tensor; 2],
    wanted: [bool; 2],
) -> Result<FusedGradients> {
    let NormInput { z, moments, batch } = note;
    let (extent, stream) = (extent(z)?, z.device().as_cuda_device()?.cuda_stream());
    let (lent_gradient, lent_z) = (lend(gradient)?, lend(z)?);
    let lent_output = relu_output.map(lend).transpose()?;
    let (gradient, z_view) = (lent_gradient.view::<T>()?, lent_z.view::<T>()?);
    let output = lent_output.as_ref().map(Lent::view::<T>).transpose()?;
    let values =
        NormBackwardValues { gradient: &gradient, relu_output: output.as_ref(), z: &z_view };
    let lent = LentChannels::new(moments, weight, bias)?;
    let views = lent.views()?;
    let sums = from_kernel(norm::gradients(&stream, extent, values, views.channels()))?;
    let of_values = {
        let sums = batch.then(|| sums.as_view());
        norm::gradients_of_values(&stream, extent, values, views.channels(), sums.as_ref(), wanted)
    };
    let [input, residual] = from_kernel(of_values)?;
    let value = |slice: CudaSlice<T>| tensor_of(slice, z.dims(), z);
    let sums = tensor_of(sums, (2, extent.channels()), z)?;
    Ok(FusedGradients {
        bias: sums.narrow(0, 0, 1)?.flatten_all()?,
        weight: sums.narrow(0, 1, 1)?.flatten_all()?,
        input: input.map(value).transpose()?,
        residual: residual.map(value).transpose()?,
    })
}

/// The memory of a norm's numbers, (C) each.
struct LentChannels<'a> {
    /// Mean and inverse deviation, one after the other.
    moments: Lent<'a>,
    weight: Lent<'a>,
    bias: Lent<'a>,
}

/// The same as views that a kernel reads.
struct ChannelViews<'a> {
    mean: CudaView<'a, f32>,
    inverse: CudaView<'a, f32>,
    weight: CudaView<'a, f32>,
    bias: CudaView<'a, f32>,
}

impl<'a> LentChannels<'a> {
    fn new(moments: &'a Tensor, weight: &'a Tensor, bias: &'a Tensor) -> Result<LentChannels<'a>> {
        Ok(LentChannels { moments: lend(moments)?, weight: lend(weight)?, bias: lend(bias)? })
    }

    fn views(&self) -> Result<ChannelViews<'_>> {
        let moments = self.moments.view::<f32>()?;
        let channels = moments.len() / 2;
        let (mean, inverse) = (moments.slice(..channels), moments.slice(channels..));
        Ok(ChannelViews { mean, inverse, weight: self.weight.view()?, bias: self.bias.view()? })
    }
}

impl ChannelViews<'_> {
    fn channels(&self) -> Channels<'_> {
        let ChannelViews { mean, inverse, weight, bias } = self;
        Channels { mean, inverse, weight, bias }
    }
}

fn extent(value: &Tensor) -> Result<Extent> {
    let (images, pixels, channels) = value.dims3()?;
    Ok(Extent::new(images * pixels, channels))
}
