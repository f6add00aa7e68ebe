//! In-place updates of flat parameters on CUDA, one kernel each. Different lengths are an error.

use std::sync::Arc;

use cudarc::driver::{CudaStream, CudaView, CudaViewMut, PushKernelArg};

use super::arguments::{adam_factors, blocks_of};
use super::modules::{KernelSource, Result, check, grid, kernel};
use crate::flat::{Adam, Sgd};

/// [`crate::flat::sgd`].
pub fn sgd(
    stream: &Arc<CudaStream>,
    values: &mut CudaViewMut<f32>,
    gradients: &CudaView<f32>,
    momenta: &mut CudaViewMut<f32>,
    with: Sgd,
) -> Result<()> {
    let count = values.len();
    check("gradients", gradients.len(), count)?;
    check("momenta", momenta.len(), count)?;
    if count == 0 {
        return Ok(());
    }
    let kernel = kernel(stream, KernelSource::Flat, "sgd")?;
    let (numbers, rate) = (count as u64, with.learning_rate as f32);
    let (momentum, decay) = (with.momentum as f32, with.weight_decay as f32);
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(values).arg(gradients).arg(momenta).arg(&numbers);
    launch.arg(&rate).arg(&momentum).arg(&decay);
    // SAFETY: the arguments are those of `sgd` in `flat.cu`, and all buffers are `count` long.
    unsafe { launch.launch(grid(blocks_of(count)))? };
    Ok(())
}

/// [`crate::flat::adam`].
pub fn adam(
    stream: &Arc<CudaStream>,
    values: &mut CudaViewMut<f32>,
    gradients: &CudaView<f32>,
    [first, second]: [&mut CudaViewMut<f32>; 2],
    step: u64,
    with: Adam,
) -> Result<()> {
    let count = values.len();
    check("gradients", gradients.len(), count)?;
    check("first moments", first.len(), count)?;
    check("second moments", second.len(), count)?;
    if count == 0 {
        return Ok(());
    }
    let kernel = kernel(stream, KernelSource::Flat, "adam")?;
    let numbers = count as u64;
    let factors = adam_factors(step, with);
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(values).arg(gradients).arg(first).arg(second).arg(&numbers);
    factors.iter().for_each(|factor| {
        launch.arg(factor);
    });
    // SAFETY: the arguments are those of `adam` in `flat.cu`, and all buffers are `count` long.
    unsafe { launch.launch(grid(blocks_of(count)))? };
    Ok(())
}

/// [`crate::flat::follow`].
pub fn follow(
    stream: &Arc<CudaStream>,
    target: &mut CudaViewMut<f32>,
    online: &CudaView<f32>,
    decay: f64,
) -> Result<()> {
    let count = target.len();
    check("online", online.len(), count)?;
    if count == 0 {
        return Ok(());
    }
    let kernel = kernel(stream, KernelSource::Flat, "follow")?;
    let (numbers, share) = (count as u64, (1. - decay) as f32);
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(target).arg(online).arg(&numbers).arg(&share);
    // SAFETY: the arguments are those of `follow` in `flat.cu`, and both buffers are `count` long.
    unsafe { launch.launch(grid(blocks_of(count)))? };
    Ok(())
}
