//! Flat f32 numbers in the memory of one backend.

use std::ops::Range;

use candle_core::Result;
use kernels::Buffer;
use kernels::flat::{Adam, Sgd};

use super::BackendId;
#[cfg(feature = "cuda")]
use super::cuda;
use super::tensors::DeviceVector;
use crate::groups::{BatchGroups, communicated};

/// Parameters, gradients, optimizer memory or statistics of a whole network.
///
/// Updates combine storages of one backend only; [`Flat::check_like`](crate::flat::Flat::check_like)
/// compares the backends first and reports both.
#[derive(Clone)]
pub(crate) enum Storage {
    Cpu(Buffer),
    Tensors(DeviceVector),
    #[cfg(feature = "cuda")]
    Cuda(DeviceVector),
}

/// Why numbers of two backends cannot meet in an update or a pass.
const CHECKED: &str = "the backends were compared before";

impl Storage {
    /// These numbers, or zeros.
    pub fn new(backend: BackendId, len: usize, numbers: Option<Vec<f32>>) -> Storage {
        match backend {
            BackendId::Cpu => {
                let mut buffer = Buffer::zeros(len);
                if let Some(numbers) = numbers {
                    buffer.copy_from_slice(&numbers);
                }
                Storage::Cpu(buffer)
            }
            BackendId::Tensors(device) => Storage::Tensors(DeviceVector::new(device, len, numbers)),
            #[cfg(feature = "cuda")]
            BackendId::Cuda(device) => Storage::Cuda(DeviceVector::new(device, len, numbers)),
        }
    }

    pub fn backend(&self) -> BackendId<'_> {
        match self {
            Storage::Cpu(_) => BackendId::Cpu,
            Storage::Tensors(vector) => BackendId::Tensors(vector.device()),
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => BackendId::Cuda(vector.device()),
        }
    }

    pub fn read(&self, range: &Range<usize>) -> Result<Vec<f32>> {
        match self {
            Storage::Cpu(buffer) => Ok(buffer[range.clone()].to_vec()),
            Storage::Tensors(vector) => vector.read(range),
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => vector.read(range),
        }
    }

    pub fn write(&mut self, range: &Range<usize>, values: &[f32]) -> Result<()> {
        match self {
            Storage::Cpu(buffer) => {
                buffer[range.clone()].copy_from_slice(values);
                Ok(())
            }
            Storage::Tensors(vector) => vector.write(range, values),
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => vector.write(range, values),
        }
    }

    pub fn zero(&mut self) {
        match self {
            Storage::Cpu(buffer) => buffer.fill(0.),
            Storage::Tensors(vector) => vector.zero(),
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => vector.zero(),
        }
    }

    /// The index of the first NaN or infinity.
    pub fn first_non_finite(&self) -> Result<Option<usize>> {
        match self {
            Storage::Cpu(buffer) => Ok(kernels::flat::first_non_finite(buffer)),
            Storage::Tensors(vector) => vector.first_non_finite(),
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => vector.first_non_finite(),
        }
    }

    /// The numbers in host memory, for the CPU backend.
    pub fn buffer(&self) -> &Buffer {
        match self {
            Storage::Cpu(buffer) => buffer,
            _ => unreachable!("{CHECKED}"),
        }
    }

    /// [`buffer`](Self::buffer), to write.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        match self {
            Storage::Cpu(buffer) => buffer,
            _ => unreachable!("{CHECKED}"),
        }
    }

    /// The numbers on a device, for the backends that compute with tensors.
    pub fn vector(&self) -> &DeviceVector {
        match self {
            Storage::Cpu(_) => unreachable!("{CHECKED}"),
            Storage::Tensors(vector) => vector,
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => vector,
        }
    }

    /// [`vector`](Self::vector), to change.
    pub fn vector_mut(&mut self) -> &mut DeviceVector {
        match self {
            Storage::Cpu(_) => unreachable!("{CHECKED}"),
            Storage::Tensors(vector) => vector,
            #[cfg(feature = "cuda")]
            Storage::Cuda(vector) => vector,
        }
    }

    /// [`kernels::flat::sgd`] on these ranges.
    pub fn sgd(
        &mut self,
        gradients: &Storage,
        momenta: &mut Storage,
        ranges: &[Range<usize>],
        with: Sgd,
    ) -> Result<()> {
        match (self, gradients, momenta) {
            (Storage::Cpu(values), Storage::Cpu(gradients), Storage::Cpu(momenta)) => {
                for range in ranges {
                    let [values, momenta] =
                        [&mut *values, &mut *momenta].map(|buffer| &mut buffer[range.clone()]);
                    kernels::flat::sgd(values, &gradients[range.clone()], momenta, with);
                }
                Ok(())
            }
            (Storage::Tensors(values), Storage::Tensors(gradients), Storage::Tensors(momenta)) => {
                values.sgd(gradients, momenta, ranges, with)
            }
            #[cfg(feature = "cuda")]
            (Storage::Cuda(values), Storage::Cuda(gradients), Storage::Cuda(momenta)) => {
                cuda::sgd(values, gradients, momenta, ranges, with)
            }
            _ => unreachable!("{CHECKED}"),
        }
    }

    /// [`kernels::flat::adam`] on these ranges; `step` counts from 1.
    pub fn adam(
        &mut self,
        gradients: &Storage,
        [first, second]: [&mut Storage; 2],
        ranges: &[Range<usize>],
        step: u64,
        with: Adam,
    ) -> Result<()> {
        match (self, gradients, first, second) {
            (
                Storage::Cpu(values),
                Storage::Cpu(gradients),
                Storage::Cpu(first),
                Storage::Cpu(second),
            ) => {
                for range in ranges {
                    let [values, first, second] = [&mut *values, &mut *first, &mut *second]
                        .map(|buffer| &mut buffer[range.clone()]);
                    let gradients = &gradients[range.clone()];
                    kernels::flat::adam(values, gradients, first, second, step, with);
                }
                Ok(())
            }
            (
                Storage::Tensors(values),
                Storage::Tensors(gradients),
                Storage::Tensors(first),
                Storage::Tensors(second),
            ) => values.adam(gradients, [first, second], ranges, step, with),
            #[cfg(feature = "cuda")]
            (
                Storage::Cuda(values),
                Storage::Cuda(gradients),
                Storage::Cuda(first),
                Storage::Cuda(second),
            ) => cuda::adam(values, gradients, [first, second], ranges, step, with),
            _ => unreachable!("{CHECKED}"),
        }
    }

    /// [`kernels::flat::follow`].
    pub fn follow(&mut self, online: &Storage, decay: f64) -> Result<()> {
        match (self, online) {
            (Storage::Cpu(target), Storage::Cpu(online)) => {
                kernels::flat::follow(target, online, decay);
                Ok(())
            }
            (Storage::Tensors(target), Storage::Tensors(online)) => target.follow(online, decay),
            #[cfg(feature = "cuda")]
            (Storage::Cuda(target), Storage::Cuda(online)) => cuda::follow(target, online, decay),
            _ => unreachable!("{CHECKED}"),
        }
    }

    /// Replaces the numbers by their sums over all ranks.
    pub fn sum_over_ranks(&mut self, groups: &BatchGroups) -> Result<()> {
        if let Storage::Cpu(buffer) = self {
            return communicated(groups.communicator().all_reduce_sum(buffer));
        }
        let vector = self.vector_mut();
        let sum = groups.sum(vector.all()?)?;
        vector.set_all(sum);
        Ok(())
    }

    /// `total ← total + other`.
    pub fn add(&mut self, other: &Storage) -> Result<()> {
        match (self, other) {
            (Storage::Cpu(total), Storage::Cpu(other)) => {
                kernels::flat::add(total, other);
                Ok(())
            }
            (Storage::Tensors(total), Storage::Tensors(other)) => total.add(other),
            #[cfg(feature = "cuda")]
            (Storage::Cuda(total), Storage::Cuda(other)) => total.add(other),
            _ => unreachable!("{CHECKED}"),
        }
    }
}
