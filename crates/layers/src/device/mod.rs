//! Networks on any device of candle's, by its tensor operations.
//!
//! The same plans, numbers and tapes as on the CPU, where kernels of our own do the work. Forward
//! and backward pass are both written out; candle's autograd takes no part. Only operations that
//! candle has on CUDA and on Metal are used, and nothing is read back to the host within a pass or
//! an update.
//!
//! A value is (N, H·W, C), stored in the network's precision; norms, sums and parameters are f32.
//! What a pixel sees is gathered by [`indices`] that depend on the sides of a map alone and stay on
//! the device, so that a [convolution](convolution) is one matrix product and a
//! [max-pool](pooling) a comparison of gathered maps.
//!
//! On CUDA two things are done otherwise: batch norm and updates by kernels of our own
//! (`kernels::cuda`), and convolutions by cuDNN where the feature `cudnn` is on.

mod backward;
mod convolution;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cudnn")]
mod cudnn;
mod forward;
mod indices;
mod norm;
mod numbers;
mod pooling;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Tensor, bail};
use kernels::{Precision, Shape};

use indices::{Part, Windows};

pub(crate) use backward::backward;
pub(crate) use forward::{Record, forward};
pub(crate) use numbers::Numbers;

/// Tables of indices by what they tell of which windows.
type Tables = HashMap<(Windows, Part), Arc<[Tensor]>>;

/// Where a network computes by tensor operations, and what its passes share.
pub(crate) struct Place {
    pub device: Device,
    indices: Mutex<Tables>,
}

impl Place {
    pub fn new(device: &Device) -> Place {
        Place { device: device.clone(), indices: Mutex::default() }
    }

    /// The indices of these windows, made and brought to the device once.
    fn indices(&self, windows: Windows, part: Part) -> Result<Arc<[Tensor]>> {
        let lock = || self.indices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&(windows, part)) {
            return Ok(Arc::clone(known));
        }
        let made: Arc<[Tensor]> = windows.tensors(part, &self.device)?.into();
        lock().insert((windows, part), Arc::clone(&made));
        Ok(made)
    }

    /// A tensor of the caller's as a value.
    fn value(
        &self,
        tensor: &Tensor,
        shape: Shape,
        precision: Precision,
        what: &str,
    ) -> Result<Tensor> {
        if tensor.dtype() != DType::F32 || !tensor.device().same_device(&self.device) {
            let (dtype, device) = (tensor.dtype(), tensor.device().location());
            let here = self.device.location();
            bail!("{what} is {dtype:?} on {device:?}, but f32 on {here:?} is expected")
        }
        let value = tensor.detach().contiguous()?;
        value.reshape((shape.images, shape.pixels(), shape.channels))?.to_dtype(dtype(precision))
    }
}

/// What values are stored as.
fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
    }
}

/// `a · b`. candle's CPU has no product of bf16: there it is taken in f32 and rounded once, as the
/// other devices do.
fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dtype() == DType::BF16 && a.device().is_cpu() {
        return a.to_dtype(DType::F32)?.matmul(&b.to_dtype(DType::F32)?)?.to_dtype(DType::BF16);
    }
    a.matmul(b)
}

/// `Σₙₚ x`, (N, P, C) to (C), f32: sums of each image first, then over the images.
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
