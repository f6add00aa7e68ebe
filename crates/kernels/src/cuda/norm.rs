//! Batch norm with the sum and the ReLU that follow it, on CUDA.
//!
//! `y = relu((z − mean) · w · inverse + b + residual)` with `inverse = 1 / √(variance + ε)`, per channel
//! (arXiv:1502.03167, Algorithm 1). Values are (rows, channels), a row for each pixel of each image.
//! Forward two kernels find the batch's moments and one applies them; backward two find the gradients
//! of weight and bias and one those of the values. Sums over rows are f32 within a part and f64 from
//! part to part; mean and variance do not cancel however far the mean is from zero.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, PushKernelArg};

use super::Extent;
use super::modules::{CudaElement, Result, check, grid, kernel};

/// What stands for a tensor that is not there.
const NULL: u64 = 0;

/// A norm's numbers for each channel, (channels) each.
#[derive(Clone, Copy)]
pub struct Channels<'a> {
    /// Mean of the batch, or the running one.
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

/// The batch's mean and `1 / √(variance + ε)`, and the running mean and variance after it, (4,
/// channels): `running ← (1 − momentum)·running + momentum·batch`, the variance without bias.
///
/// - `z`: (rows, channels), at least two rows; `running`: mean and variance before, (channels) each.
///
/// # Errors
///
/// A length does not fit the extent; the driver refuses.
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
    // SAFETY: the first kernel writes all of it before the second reads it.
    let mut parts = unsafe { stream.alloc::<f32>(extent.parts() * 2 * channels)? };
    let of_parts = kernel(stream, T::NORM, "moments_of_parts")?;
    let mut launch = stream.launch_builder(&of_parts);
    launch.arg(z).arg(&mut parts).arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, with the lengths that the extent says.
    unsafe { launch.launch(grid(extent.blocks()))? };

    // SAFETY: the kernel writes all of it.
    let mut result = unsafe { stream.alloc::<f32>(4 * channels)? };
    let (epsilon, momentum) = (epsilon as f32, momentum as f32);
    let joined = kernel(stream, T::NORM, "moments")?;
    let mut launch = stream.launch_builder(&joined);
    launch.arg(&parts).arg(running[0]).arg(running[1]).arg(&mut result);
    launch.arg(&extent).arg(&epsilon).arg(&momentum);
    // SAFETY: the arguments are those in `norm.cu`, with the lengths that the extent says.
    unsafe { launch.launch(grid(extent.blocks_of_channels()))? };
    Ok(result)
}

/// `relu((z − mean) · w · inverse + b + residual)`, (rows, channels), with residual and ReLU as asked.
///
/// # Errors
///
/// A length does not fit the extent; the driver refuses.
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
    // SAFETY: the kernel writes all of it.
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
    // SAFETY: the arguments are those in `norm.cu`, with the lengths that the extent says.
    unsafe { launch.launch(grid(extent.blocks()))? };
    Ok(y)
}

/// What the backward pass reads of the forward pass.
#[derive(Clone, Copy)]
pub struct Passed<'a, T> {
    /// The gradient of the output.
    pub gradient: &'a CudaView<'a, T>,
    /// The output, where a ReLU ended it.
    pub relu_output: Option<&'a CudaView<'a, T>>,
    /// The input.
    pub z: &'a CudaView<'a, T>,
}

impl<T: CudaElement> Passed<'_, T> {
    fn check(&self, extent: &Extent) -> Result<()> {
        let lengths = [self.gradient.len(), self.z.len()];
        let output = self.relu_output.map(CudaView::len);
        let mut all = lengths.into_iter().chain(output);
        all.try_for_each(|len| check("a norm's value", len, extent.len()))
    }
}

/// The gradients of bias and weight, (2, channels): `Σ g` and `Σ g · (z − mean) · inverse`, with `g`
/// what of the gradient passes the ReLU.
///
/// # Errors
///
/// A length does not fit the extent; the driver refuses.
pub fn gradients<T: CudaElement>(
    stream: &Arc<CudaStream>,
    extent: Extent,
    passed: Passed<T>,
    channels: Channels,
) -> Result<CudaSlice<f32>> {
    passed.check(&extent)?;
    channels.check(&extent)?;
    // SAFETY: the first kernel writes all of it before the second reads it.
    let mut parts = unsafe { stream.alloc::<f32>(extent.parts() * 2 * extent.channels())? };
    let of_parts = kernel(stream, T::NORM, "gradients_of_parts")?;
    let mut launch = stream.launch_builder(&of_parts);
    launch.arg(passed.gradient);
    match passed.relu_output {
        Some(y) => launch.arg(y),
        None => launch.arg(&NULL),
    };
    launch.arg(passed.z).arg(channels.mean).arg(channels.inverse).arg(&mut parts).arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, with the lengths that the extent says.
    unsafe { launch.launch(grid(extent.blocks()))? };

    // SAFETY: the kernel writes all of it.
    let mut result = unsafe { stream.alloc::<f32>(2 * extent.channels())? };
    let joined = kernel(stream, T::NORM, "gradients")?;
    let mut launch = stream.launch_builder(&joined);
    launch.arg(&parts).arg(&mut result).arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, with the lengths that the extent says.
    unsafe { launch.launch(grid(extent.blocks_of_channels()))? };
    Ok(result)
}

/// The gradients of the input and of the residual, (rows, channels) each.
///
/// - `sums`: what [`gradients`] gave where mean and deviation are the batch's, and so depend on the
///   input; `None` for running ones.
/// - `wanted`: whether the gradient of the input, and that of the residual, is of use.
///
/// # Errors
///
/// A length does not fit the extent; the driver refuses.
pub fn gradients_of_values<T: CudaElement>(
    stream: &Arc<CudaStream>,
    extent: Extent,
    passed: Passed<T>,
    channels: Channels,
    sums: Option<&CudaView<f32>>,
    wanted: [bool; 2],
) -> Result<[Option<CudaSlice<T>>; 2]> {
    passed.check(&extent)?;
    channels.check(&extent)?;
    check(
        "a norm's sums",
        sums.map_or(2 * extent.channels(), CudaView::len),
        2 * extent.channels(),
    )?;
    let mut made: [Option<CudaSlice<T>>; 2] = [None, None];
    for (made, wanted) in made.iter_mut().zip(wanted) {
        if wanted {
            // SAFETY: the kernel writes all of it.
            *made = Some(unsafe { stream.alloc::<T>(extent.len())? });
        }
    }
    if made.iter().all(Option::is_none) {
        return Ok(made);
    }
    let kernel = kernel(stream, T::NORM, "gradients_of_values")?;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(passed.gradient);
    match passed.relu_output {
        Some(y) => launch.arg(y),
        None => launch.arg(&NULL),
    };
    launch.arg(passed.z).arg(channels.mean).arg(channels.inverse).arg(channels.weight);
    match sums {
        Some(sums) => launch.arg(sums),
        None => launch.arg(&NULL),
    };
    for made in &mut made {
        match made {
            Some(made) => launch.arg(made),
            None => launch.arg(&NULL),
        };
    }
    launch.arg(&extent);
    // SAFETY: the arguments are those in `norm.cu`, with the lengths that the extent says.
    unsafe { launch.launch(grid(extent.blocks()))? };
    Ok(made)
}
