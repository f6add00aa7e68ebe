//! Batch norm by the fused kernels of `kernels::cuda::norm`.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use kernels::cuda::norm::{self, Channels, NormBackwardValues};
use kernels::cuda::{CudaElement, Extent};

use super::memory::{Lent, from_kernel, lend, tensor_of};
use crate::backend::tensors;
use crate::backend::tensors::norm::Count;
use crate::plan::Norm;

/// The data that a norm keeps for its backward pass.
pub(crate) struct NormInput {
    z: Tensor,
    /// Mean and `1 / √(variance + ε)`, (2, C).
    moments: Tensor,
    /// Values per channel in the batch; `None` for running statistics, which do not depend on the input.
    count: Option<Count>,
}

impl NormInput {
    /// - `z`: (N, P, C) in the type of values; `moments`: (2, C).
    pub fn new(z: &Tensor, moments: Tensor, count: Option<Count>) -> Result<NormInput> {
        Ok(NormInput { z: z.contiguous()?, moments, count })
    }

    /// Whether mean and variance are the batch's, and so depend on the input.
    pub fn is_of_batch(&self) -> bool {
        self.count.is_some()
    }

    fn extent(&self) -> Result<Extent> {
        extent(&self.z)
    }
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
    let z = z.contiguous()?;
    let (moments, running, count) = if batch {
        let all = moments(&z, running, norm.epsilon, norm.momentum)?;
        let running = [all.narrow(0, 2, 1)?.flatten_all()?, all.narrow(0, 3, 1)?.flatten_all()?];
        let count = Count::Here(z.dim(0)? * z.dim(1)?);
        (all.narrow(0, 0, 2)?, Some(running), Some(count))
    } else {
        let [mean, variance] = running;
        let inverse = tensors::norm::inverse(variance, norm.epsilon)?;
        (Tensor::stack(&[mean, &inverse], 0)?, None, None)
    };
    let note = NormInput { z, moments, count };
    Ok(NormOutput { y: apply(norm, &note, residual, parameters)?, running, note })
}

/// Mean and sum of squared deviations of each channel of `z`, (C) each, f32.
pub(super) fn mean_and_squares(z: &Tensor) -> Result<[Tensor; 2]> {
    let (z, count) = (z.contiguous()?, z.dim(0)? * z.dim(1)?);
    let zeros = Tensor::zeros(z.dim(2)?, DType::F32, z.device())?;
    if count == 1 {
        return Ok([z.to_dtype(DType::F32)?.flatten_all()?, zeros]);
    }
    // With momentum 1, running statistics of 0 become those of the batch.
    let all = moments(&z, [&zeros, &zeros], 1., 1.)?;
    let unbiased = all.narrow(0, 3, 1)?.flatten_all()?;
    Ok([all.narrow(0, 0, 1)?.flatten_all()?, (unbiased * (count - 1) as f64)?])
}

/// Mean, `1 / √(variance + ε)`, and running mean and variance after the batch, (4, C).
fn moments(z: &Tensor, running: [&Tensor; 2], epsilon: f64, momentum: f64) -> Result<Tensor> {
    match z.dtype() {
        DType::F32 => moments_of::<f32>(z, running, epsilon, momentum),
        DType::BF16 => moments_of::<bf16>(z, running, epsilon, momentum),
        other => bail!("values are f32 and bf16, not {other:?}"),
    }
}

fn moments_of<T: CudaElement + CudaDType>(
    z: &Tensor,
    [mean, variance]: [&Tensor; 2],
    epsilon: f64,
    momentum: f64,
) -> Result<Tensor> {
    let (extent, stream) = (extent(z)?, z.device().as_cuda_device()?.cuda_stream());
    let (lent, mean, variance) = (lend(z)?, lend(mean)?, lend(variance)?);
    let running = [&mean.view()?, &variance.view()?];
    let found = norm::moments(&stream, extent, &lent.view::<T>()?, running, epsilon, momentum);
    tensor_of(from_kernel(found)?, (4, extent.channels()), z)
}

/// The norm's output by the mean and deviation of `input`, (N, P, C).
pub(super) fn apply(
    norm: &Norm,
    input: &NormInput,
    residual: Option<&Tensor>,
    parameters: [&Tensor; 2],
) -> Result<Tensor> {
    let residual = residual.map(Tensor::contiguous).transpose()?;
    match input.z.dtype() {
        DType::F32 => apply_of::<f32>(norm, input, residual, parameters),
        DType::BF16 => apply_of::<bf16>(norm, input, residual, parameters),
        other => bail!("values are f32 and bf16, not {other:?}"),
    }
}

fn apply_of<T: CudaElement + CudaDType>(
    norm: &Norm,
    input: &NormInput,
    residual: Option<Tensor>,
    [weight, bias]: [&Tensor; 2],
) -> Result<Tensor> {
    let (z, extent) = (&input.z, input.extent()?);
    let stream = z.device().as_cuda_device()?.cuda_stream();
    let (lent_z, lent_residual) = (lend(z)?, residual.as_ref().map(lend).transpose()?);
    let lent = LentChannels::new(&input.moments, weight, bias)?;
    let views = lent.views()?;
    let residual = lent_residual.as_ref().map(Lent::view::<T>).transpose()?;
    let (z_view, channels) = (lent_z.view::<T>()?, views.channels());
    let y = norm::apply(&stream, extent, &z_view, residual.as_ref(), channels, norm.relu);
    tensor_of(from_kernel(y)?, z.dims(), z)
}

/// The gradients of bias and weight, (2, C).
///
/// - `gradient`: contiguous.
/// - `relu_output`: the norm's output, if a ReLU ends it.
pub(super) fn gradient_sums(
    note: &NormInput,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    parameters: [&Tensor; 2],
) -> Result<Tensor> {
    match gradient.dtype() {
        DType::F32 => gradient_sums_of::<f32>(note, gradient, relu_output, parameters),
        DType::BF16 => gradient_sums_of::<bf16>(note, gradient, relu_output, parameters),
        other => bail!("gradients are f32 and bf16, not {other:?}"),
    }
}

fn gradient_sums_of<T: CudaElement + CudaDType>(
    note: &NormInput,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    [weight, bias]: [&Tensor; 2],
) -> Result<Tensor> {
    let (z, extent) = (&note.z, note.extent()?);
    let stream = z.device().as_cuda_device()?.cuda_stream();
    let lent = LentValues::new(gradient, relu_output, z)?;
    let (gradient, output, z_view) = lent.views::<T>()?;
    let values =
        NormBackwardValues { gradient: &gradient, relu_output: output.as_ref(), z: &z_view };
    let lent = LentChannels::new(&note.moments, weight, bias)?;
    let views = lent.views()?;
    let sums = from_kernel(norm::gradients(&stream, extent, values, views.channels()))?;
    tensor_of(sums, (2, extent.channels()), z)
}

/// The gradients of the input and of the residual, (N, P, C), as far as they are wanted.
///
/// - `gradient`: contiguous.
/// - `sums`: the gradients of bias and weight over the whole batch, 2·C numbers; not read on running
///   statistics.
pub(super) fn value_gradients(
    note: &NormInput,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    parameters: [&Tensor; 2],
    sums: &Tensor,
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let rows = note.z.dim(0)? * note.z.dim(1)?;
    let sums = match &note.count {
        None => None,
        // The kernel divides by the rows that it sees.
        Some(Count::OfGroups(count)) => {
            Some((sums.broadcast_div(count)? * rows as f64)?.contiguous()?)
        }
        Some(Count::Here(_)) => Some(sums.clone()),
    };
    match gradient.dtype() {
        DType::F32 => {
            value_gradients_of::<f32>(note, gradient, relu_output, parameters, sums, wanted)
        }
        DType::BF16 => {
            value_gradients_of::<bf16>(note, gradient, relu_output, parameters, sums, wanted)
        }
        other => bail!("gradients are f32 and bf16, not {other:?}"),
    }
}

fn value_gradients_of<T: CudaElement + CudaDType>(
    note: &NormInput,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    [weight, bias]: [&Tensor; 2],
    sums: Option<Tensor>,
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let (z, extent) = (&note.z, note.extent()?);
    let stream = z.device().as_cuda_device()?.cuda_stream();
    let lent = LentValues::new(gradient, relu_output, z)?;
    let (gradient, output, z_view) = lent.views::<T>()?;
    let values =
        NormBackwardValues { gradient: &gradient, relu_output: output.as_ref(), z: &z_view };
    let lent = LentChannels::new(&note.moments, weight, bias)?;
    let views = lent.views()?;
    let lent_sums = sums.as_ref().map(lend).transpose()?;
    let sums = lent_sums.as_ref().map(Lent::view::<f32>).transpose()?;
    let of_values =
        norm::gradients_of_values(&stream, extent, values, views.channels(), sums.as_ref(), wanted);
    let [input, residual] = from_kernel(of_values)?;
    let value = |slice: CudaSlice<T>| tensor_of(slice, z.dims(), z);
    Ok([input.map(value).transpose()?, residual.map(value).transpose()?])
}

/// The memory of the values that the backward pass reads.
struct LentValues<'a> {
    gradient: Lent<'a>,
    relu_output: Option<Lent<'a>>,
    z: Lent<'a>,
}

impl<'a> LentValues<'a> {
    fn new(
        gradient: &'a Tensor,
        relu_output: Option<&'a Tensor>,
        z: &'a Tensor,
    ) -> Result<LentValues<'a>> {
        let relu_output = relu_output.map(lend).transpose()?;
        Ok(LentValues { gradient: lend(gradient)?, relu_output, z: lend(z)? })
    }

    /// Views of gradient, output and input.
    #[expect(clippy::type_complexity, reason = "a view each")]
    fn views<T: CudaDType>(
        &self,
    ) -> Result<(CudaView<'_, T>, Option<CudaView<'_, T>>, CudaView<'_, T>)> {
        let output = self.relu_output.as_ref().map(Lent::view::<T>).transpose()?;
        Ok((self.gradient.view()?, output, self.z.view()?))
    }
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
