//! Batch norm with the residual sum and the ReLU that follow it, on CUDA.
//!
//! `y = relu((z − mean) · w · inverse + b + residual)` with `inverse = 1 / √(variance + ε)`, per channel
//! (arXiv:1502.03167, Algorithm 1). Values are (rows, channels), with one row per pixel of each image.
//! Forward, two kernels compute the moments of the batch and one applies them. Backward, two kernels compute
//! the gradients of weight and bias and one those of the values. Sums over rows are f32 within a part and f64
//! across parts; nothing cancels, however far the mean is from zero.
//!
//! A length that does not match the extent is an error.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, PushKernelArg};

use super::Extent;
use super::modules::{CudaElement, Result, check, grid, kernel};

/// The argument for an absent tensor.
const NULL: u64 = 0;

/// The numbers of a norm, (channels) each.
#[derive(Clone, Copy)]
pub struct Channels<'a> {
    /// Mean of the batch, or the running mean.
    pub mean: &'a CudaView<'a, f32>,
    /// `1 / √(variance + ε)`.
    pub inverse: &'a CudaView<'a, f32>,
    /// `w`.
    pub weight: &'a CudaView<'a, f32>,
    /// `b`.
    pub bias: &'a CudaView<'a, f32>,
}

impl Channels<'_> {
    fn check(&self, extent: &Extent) -> Result<()> {
        let all = [self.mean, self.inverse, self.weight, self.bias];
        all.iter().try_for_each(|one| check("a norm's channels", one.len(), extent.channels()))
    }
}

/// Computes mean and `1 / √(variance + ε)` of the batch, and the running mean and variance after it, (4,
/// channels): `running ← (1 − momentum)·running + momentum·batch`, with the unbiased variance.
///
/// - `z`: (rows, channels), at least two rows.
/// - `running`: mean and variance before the batch, (channels) each.
pub fn moments<T: CudaElement>(
    stream: &Arc<CudaStream>,
    extent: Extent,
    z: &CudaView<T>,
    running: [&CudaView<f32>; 2],
    epsilon: f64,
    momentum: f64,
) -> Result<CudaSlice<f32>> {
    let channels = extent.channels();
    check("the norm's input", z.len(), extent.len())?;
    running.iter().try_for_each(|one| check("running statistics", one.len(), channels))?;
    // SAFETY: the first kernel writes all numbers before the second reads them.
    let mut parts = unsafe { stream.alloc::<f32>(extent.parts() * 2 * channels)? };
    let of_parts = kernel(stream, T::NORM, "moments_of_parts")?;
    let mut launch = stream.launch_builder(&of_parts);
    launch.arg(z).arg(&mut parts).arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, and their lengths were checked.
    unsafe { launch.launch(grid(extent.blocks()))? };

    // SAFETY: the kernel writes all numbers.
    let mut result = unsafe { stream.alloc::<f32>(4 * channels)? };
    let (epsilon, momentum) = (epsilon as f32, momentum as f32);
    let joined = kernel(stream, T::NORM, "moments")?;
    let mut launch = stream.launch_builder(&joined);
    launch.arg(&parts).arg(running[0]).arg(running[1]).arg(&mut result);
    launch.arg(&extent).arg(&epsilon).arg(&momentum);
    // SAFETY: the arguments are those in `norm.cu`, and their lengths were checked.
    unsafe { launch.launch(grid(extent.blocks_of_channels()))? };
    Ok(result)
}

/// Computes `relu((z − mean) · w · inverse + b + residual)`, (rows, channels); residual and ReLU are
/// optional.
pub fn apply<T: CudaElement>(
    stream: &Arc<CudaStream>,
    extent: Extent,
    z: &CudaView<T>,
    residual: Option<&CudaView<T>>,
    channels: Channels,
    relu: bool,
) -> Result<CudaSlice<T>> {
    check("the norm's input", z.len(), extent.len())?;
    check("the residual", residual.map_or(extent.len(), CudaView::len), extent.len())?;
    channels.check(&extent)?;
    // SAFETY: the kernel writes all numbers.
    let mut y = unsafe { stream.alloc::<T>(extent.len())? };
    let relu = u32::from(relu);
    let apply = kernel(stream, T::NORM, "apply")?;
    let mut launch = stream.launch_builder(&apply);
    launch.arg(z);
    match residual {
        Some(residual) => launch.arg(residual),
        None => launch.arg(&NULL),
    };
    launch.arg(channels.mean).arg(channels.inverse).arg(channels.weight).arg(channels.bias);
    launch.arg(&mut y).arg(&extent).arg(&relu);
    // SAFETY: the arguments are those in `norm.cu`, and their lengths were checked.
    unsafe { launch.launch(grid(extent.blocks()))? };
    Ok(y)
}

/// The values that the backward pass reads.
#[derive(Clone, Copy)]
pub struct NormBackwardValues<'a, T> {
    /// The gradient of the output.
    pub gradient: &'a CudaView<'a, T>,
    /// The output, if a ReLU ends the norm.
    pub relu_output: Option<&'a CudaView<'a, T>>,
    /// The input.
    pub z: &'a CudaView<'a, T>,
}

impl<T: CudaElement> NormBackwardValues<'_, T> {
    fn check(&self, extent: &Extent) -> Result<()> {
        let lengths = [self.gradient.len(), self.z.len()];
        let output = self.relu_output.map(CudaView::len);
        let mut all = lengths.into_iter().chain(output);
        all.try_for_each(|len| check("a norm's value", len, extent.len()))
    }
}

/// Computes the gradients of bias and weight, (2, channels): `Σ g` and `Σ g · (z − mean) · inverse`, where
/// `g` is the gradient after the ReLU's backward pass.
pub fn gradients<T: CudaElement>(
    stream: &Arc<CudaStream>,
    extent: Extent,
    values: NormBackwardValues<T>,
    channels: Channels,
) -> Result<CudaSlice<f32>> {
    values.check(&extent)?;
    channels.check(&extent)?;
    // SAFETY: the first kernel writes all numbers before the second reads them.
    let mut parts = unsafe { stream.alloc::<f32>(extent.parts() * 2 * extent.channels())? };
    let of_parts = kernel(stream, T::NORM, "gradients_of_parts")?;
    let mut launch = stream.launch_builder(&of_parts);
    launch.arg(values.gradient);
    match values.relu_output {
        Some(y) => launch.arg(y),
        None => launch.arg(&NULL),
    };
    launch.arg(values.z).arg(channels.mean).arg(channels.inverse).arg(&mut parts).arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, and their lengths were checked.
    unsafe { launch.launch(grid(extent.blocks()))? };

    // SAFETY: the kernel writes all numbers.
    let mut result = unsafe { stream.alloc::<f32>(2 * extent.channels())? };
    let joined = kernel(stream, T::NORM, "gradients")?;
    let mut launch = stream.launch_builder(&joined);
    launch.arg(&parts).arg(&mut result).arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, and their lengths were checked.
    unsafe { launch.launch(grid(extent.blocks_of_channels()))? };
    Ok(result)
}

/// Computes the gradients of the input and of the residual, (rows, channels) each.
///
/// - `sums`: the result of [`gradients`] if mean and deviation are those of the batch, which depend on the
///   input; `None` for running ones.
/// - `wanted`: whether to compute the gradient of the input, and that of the residual.
pub fn gradients_of_values<T: CudaElement>(
    stream: &Arc<CudaStream>,
    extent: Extent,
    values: NormBackwardValues<T>,
    channels: Channels,
    sums: Option<&CudaView<f32>>,
    wanted: [bool; 2],
) -> Result<[Option<CudaSlice<T>>; 2]> {
    values.check(&extent)?;
    channels.check(&extent)?;
    check(
        "a norm's sums",
        sums.map_or(2 * extent.channels(), CudaView::len),
        2 * extent.channels(),
    )?;
    let mut found: [Option<CudaSlice<T>>; 2] = [None, None];
    for (found, wanted) in found.iter_mut().zip(wanted) {
        if wanted {
            // SAFETY: the kernel writes all numbers.
            *found = Some(unsafe { stream.alloc::<T>(extent.len())? });
        }
    }
    if found.iter().all(Option::is_none) {
        return Ok(found);
    }
    let kernel = kernel(stream, T::NORM, "gradients_of_values")?;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(values.gradient);
    match values.relu_output {
        Some(y) => launch.arg(y),
        None => launch.arg(&NULL),
    };
    launch.arg(values.z).arg(channels.mean).arg(channels.inverse).arg(channels.weight);
    match sums {
        Some(sums) => launch.arg(sums),
        None => launch.arg(&NULL),
    };
    for gradient in &mut found {
        match gradient {
            Some(gradient) => launch.arg(gradient),
            None => launch.arg(&NULL),
        };
    }
    launch.arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, and their lengths were checked.
    unsafe { launch.launch(grid(extent.blocks()))? };
    Ok(found)
}
