//! Between candle's tensors and the memory that CUDA kernels take.

use std::error::Error;
use std::ops::Range;

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Storage, StorageRef, Tensor, bail};

#[cfg(feature = "nccl")]
use crate::groups::communicated;

/// A tensor's memory, borrowed while a kernel is launched on it.
pub(super) struct Lent<'a> {
    storage: StorageRef<'a>,
    range: Range<usize>,
}

pub(super) fn lend(tensor: &Tensor) -> Result<Lent<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(Lent { storage, range: from..to }),
        None => bail!("the kernels take contiguous tensors, not {layout:?}"),
    }
}

impl Lent<'_> {
    pub fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage.as_cuda_slice::<T>()?.slice(self.range.clone())),
            _ => bail!("the kernels for CUDA take tensors on CUDA"),
        }
    }
}

/// A copy of a tensor's numbers, which nothing else reads.
pub(super) fn copy(tensor: &Tensor) -> Result<CudaSlice<f32>> {
    let stream = tensor.device().as_cuda_device()?.cuda_stream();
    let lent = lend(tensor)?;
    match stream.clone_dtod(&lent.view::<f32>()?) {
        Ok(copy) => Ok(copy),
        Err(error) => bail!("{error}"),
    }
}

/// The memory that a kernel wrote, as a tensor on the device of `like`.
pub(super) fn tensor_of<T: CudaDType>(
    slice: CudaSlice<T>,
    shape: impl Into<candle_core::Shape>,
    like: &Tensor,
) -> Result<Tensor> {
    let device = like.device().as_cuda_device()?.clone();
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device));
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

pub(super) fn from_kernel<R>(
    result: std::result::Result<R, Box<dyn Error + Send + Sync>>,
) -> Result<R> {
    match result {
        Ok(value) => Ok(value),
        Err(error) => bail!("a CUDA kernel failed: {error}"),
    }
}

/// Sends a vector of f32 to another rank's GPU, and returns the `count` numbers that it sends.
#[cfg(feature = "nccl")]
pub(crate) fn exchange(
    nccl: &collective::Nccl,
    partner: usize,
    sent: &Tensor,
    count: usize,
) -> Result<Tensor> {
    let stream = sent.device().as_cuda_device()?.cuda_stream();
    let mut received = match stream.alloc_zeros::<f32>(count) {
        Ok(received) => received,
        Err(error) => bail!("{error}"),
    };
    let lent = lend(sent)?;
    communicated(nccl.exchange(partner, &lent.view()?, &mut received))?;
    tensor_of(received, count, sent)
}
