//! Kernels of our own on CUDA, in place of a pass over memory for each tensor operation.
//!
//! Compiled and type-checked; the kernels were tested as C, not yet on a GPU.

use std::error::Error;
use std::ops::Range;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Storage, StorageRef, Tensor, bail};
use half::bf16;
use kernels::cuda::norm::{self, Channels, Passed};
use kernels::cuda::{CudaElement, Extent, flat};
use kernels::flat::{Adam, Sgd};

use crate::plan::Norm;

/// What a norm's forward pass keeps for its backward pass.
pub(super) struct Normalisation {
    z: Tensor,
    /// Mean and `1 / √(variance + ε)`, (2, C).
    moments: Tensor,
    /// Whether they are the batch's, and so depend on the input.
    batch: bool,
}

/// What a norm gives.
pub(super) struct Normalised {
    pub y: Tensor,
    /// Running mean and variance after the batch, (C) each; `None` where they were used.
    pub running: Option<[Tensor; 2]>,
    pub note: Normalisation,
}

/// `relu((z − mean) · weight / √(variance + ε) + bias + residual)`, with residual and ReLU as asked.
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
) -> Result<Normalised> {
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
) -> Result<Normalised> {
    let (extent, stream) = (extent(&z)?, z.device().as_cuda_device()?.cuda_stream());
    let (lent_z, lent_residual) = (lend(&z)?, residual.as_ref().map(lend).transpose()?);
    let view_z = lent_z.view::<T>()?;
    let (moments, running) = if batch {
        let (mean, variance) = (lend(mean)?, lend(variance)?);
        let running = [&mean.view()?, &variance.view()?];
        let found = norm::moments(&stream, extent, &view_z, running, norm.epsilon, norm.momentum);
        let all = made(of_kernel(found)?, (4, extent.channels()), &z)?;
        let running = [all.narrow(0, 2, 1)?.flatten_all()?, all.narrow(0, 3, 1)?.flatten_all()?];
        (all.narrow(0, 0, 2)?, Some(running))
    } else {
        let inverse = super::norm::inverse(variance, norm.epsilon)?;
        (Tensor::stack(&[mean, &inverse], 0)?, None)
    };
    let y = {
        let lent = LentChannels::new(&moments, weight, bias)?;
        let views = lent.views()?;
        let residual = lent_residual.as_ref().map(Lent::view::<T>).transpose()?;
        let channels = views.channels();
        norm::apply(&stream, extent, &view_z, residual.as_ref(), channels, norm.relu)
    };
    let y = made(of_kernel(y)?, z.dims(), &z)?;
    drop((view_z, lent_residual));
    drop(lent_z);
    Ok(Normalised { y, running, note: Normalisation { z, moments, batch } })
}

/// What flows back through a norm.
pub(super) struct Gradients {
    /// Of weight and bias, (C) each.
    pub weight: Tensor,
    pub bias: Tensor,
    /// Of the input and of the residual, (N, P, C), where they were wanted.
    pub input: Option<Tensor>,
    pub residual: Option<Tensor>,
}

/// - `relu_output`: the norm's output where a ReLU ended it; `wanted`: whether the gradients of the
///   input and of the residual are of use.
pub(super) fn gradients(
    note: &Normalisation,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    parameters: [&Tensor; 2],
    wanted: [bool; 2],
) -> Result<Gradients> {
    let gradient = gradient.contiguous()?;
    match gradient.dtype() {
        DType::F32 => gradients_of::<f32>(note, &gradient, relu_output, parameters, wanted),
        DType::BF16 => gradients_of::<bf16>(note, &gradient, relu_output, parameters, wanted),
        other => bail!("gradients are f32 and bf16, not {other:?}"),
    }
}

fn gradients_of<T: CudaElement + CudaDType>(
    note: &Normalisation,
    gradient: &Tensor,
    relu_output: Option<&Tensor>,
    [weight, bias]: [&Tensor; 2],
    wanted: [bool; 2],
) -> Result<Gradients> {
    let Normalisation { z, moments, batch } = note;
    let (extent, stream) = (extent(z)?, z.device().as_cuda_device()?.cuda_stream());
    let (lent_gradient, lent_z) = (lend(gradient)?, lend(z)?);
    let lent_output = relu_output.map(lend).transpose()?;
    let (gradient, z_view) = (lent_gradient.view::<T>()?, lent_z.view::<T>()?);
    let output = lent_output.as_ref().map(Lent::view::<T>).transpose()?;
    let passed = Passed { gradient: &gradient, relu_output: output.as_ref(), z: &z_view };
    let lent = LentChannels::new(moments, weight, bias)?;
    let views = lent.views()?;
    let sums = of_kernel(norm::gradients(&stream, extent, passed, views.channels()))?;
    let of_values = {
        let sums = batch.then(|| sums.as_view());
        norm::gradients_of_values(&stream, extent, passed, views.channels(), sums.as_ref(), wanted)
    };
    let [input, residual] = of_kernel(of_values)?;
    let value = |slice: CudaSlice<T>| made(slice, z.dims(), z);
    let sums = made(sums, (2, extent.channels()), z)?;
    Ok(Gradients {
        bias: sums.narrow(0, 0, 1)?.flatten_all()?,
        weight: sums.narrow(0, 1, 1)?.flatten_all()?,
        input: input.map(value).transpose()?,
        residual: residual.map(value).transpose()?,
    })
}

/// [`kernels::flat::sgd`] of these ranges: values and momenta afterwards.
pub(super) fn sgd(
    values: &Tensor,
    gradients: &Tensor,
    momenta: &Tensor,
    ranges: &[Range<usize>],
    with: Sgd,
) -> Result<[Tensor; 2]> {
    let stream = values.device().as_cuda_device()?.cuda_stream();
    let (mut new_values, mut new_momenta) = (copy(values)?, copy(momenta)?);
    let lent = lend(gradients)?;
    let gradients = lent.view::<f32>()?;
    for range in ranges {
        of_kernel(flat::sgd(
            &stream,
            &mut new_values.slice_mut(range.clone()),
            &gradients.slice(range.clone()),
            &mut new_momenta.slice_mut(range.clone()),
            with,
        ))?;
    }
    Ok([made(new_values, values.dims(), values)?, made(new_momenta, values.dims(), values)?])
}

/// [`kernels::flat::adam`] of these ranges: values and both moments afterwards.
pub(super) fn adam(
    values: &Tensor,
    gradients: &Tensor,
    moments: [&Tensor; 2],
    ranges: &[Range<usize>],
    step: u64,
    with: Adam,
) -> Result<[Tensor; 3]> {
    let stream = values.device().as_cuda_device()?.cuda_stream();
    let (mut new_values, [first, second]) = (copy(values)?, moments);
    let (mut first, mut second) = (copy(first)?, copy(second)?);
    let lent = lend(gradients)?;
    let gradients = lent.view::<f32>()?;
    for range in ranges {
        of_kernel(flat::adam(
            &stream,
            &mut new_values.slice_mut(range.clone()),
            &gradients.slice(range.clone()),
            [&mut first.slice_mut(range.clone()), &mut second.slice_mut(range.clone())],
            step,
            with,
        ))?;
    }
    let value = |slice| made(slice, values.dims(), values);
    Ok([value(new_values)?, value(first)?, value(second)?])
}

/// [`kernels::flat::follow`]: the target afterwards.
pub(super) fn follow(target: &Tensor, online: &Tensor, decay: f64) -> Result<Tensor> {
    let stream = target.device().as_cuda_device()?.cuda_stream();
    let mut followed = copy(target)?;
    let lent = lend(online)?;
    of_kernel(flat::follow(&stream, &mut followed.as_view_mut(), &lent.view()?, decay))?;
    made(followed, target.dims(), target)
}

/// A tensor's memory, held while a kernel is started on it.
struct Lent<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

fn lend(tensor: &Tensor) -> Result<Lent<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(Lent { storage, range: from..to }),
        None => bail!("the kernels take contiguous tensors, not {layout:?}"),
    }
}

impl Lent<'_> {
    fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage.as_cuda_slice::<T>()?.slice(self.range.clone())),
            _ => bail!("the kernels for CUDA take tensors on CUDA"),
        }
    }
}

/// Memory of a norm's numbers for each channel.
struct LentChannels<'a> {
    /// Mean and inverse deviation, one after the other.
    moments: Lent<'a>,
    weight: Lent<'a>,
    bias: Lent<'a>,
}

/// The same to be read by a kernel.
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

/// A copy of a tensor's numbers that nothing else sees.
fn copy(tensor: &Tensor) -> Result<CudaSlice<f32>> {
    let stream = tensor.device().as_cuda_device()?.cuda_stream();
    let lent = lend(tensor)?;
    match stream.clone_dtod(&lent.view::<f32>()?) {
        Ok(copy) => Ok(copy),
        Err(error) => bail!("{error}"),
    }
}

/// What a kernel made, as a tensor beside `like`.
fn made<T: CudaDType>(
    slice: CudaSlice<T>,
    shape: impl Into<candle_core::Shape>,
    like: &Tensor,
) -> Result<Tensor> {
    let device = like.device().as_cuda_device()?.clone();
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

fn of_kernel<R>(made: std::result::Result<R, Box<dyn Error + Send + Sync>>) -> Result<R> {
    match made {
        Ok(made) => Ok(made),
        Err(error) => bail!("a kernel for CUDA: {error}"),
    }
}
