//! The groups of a batch: leaves of the sums over images.

use std::ops::Range;

#[cfg(feature = "nccl")]
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Error, Result, Tensor, bail};
#[cfg(feature = "nccl")]
use collective::Nccl;
use collective::{CommunicationError, Communicator, VectorMemory};

/// The groups of consecutive images into which every batch is divided, and the ranks that share them.
///
/// In training, a network that computes [in groups](crate::Network::in_groups) takes each sum over
/// images once for every group. A binary tree over the groups adds these sums, on one rank or on many:
/// each rank holds a branch of the tree, and the branches meet in sums over the ranks. Results so depend
/// on the number of groups, but not on the number of ranks.
#[derive(Clone, Debug)]
pub struct BatchGroups {
    count: usize,
    communicator: Communicator,
    /// The connection of this rank's GPU, once a network on one computes in groups.
    #[cfg(feature = "nccl")]
    nccl: Arc<OnceLock<Nccl>>,
}

impl BatchGroups {
    /// So many groups, shared evenly by the ranks of `communicator`.
    ///
    /// # Errors
    ///
    /// The number is not a power of two, or there are fewer groups than ranks.
    pub fn new(count: usize, communicator: Communicator) -> Result<Self> {
        if !count.is_power_of_two() {
            bail!("a batch of {count} groups; the number of groups must be a power of two")
        }
        if communicator.size() > count {
            bail!(
                "{} ranks cannot share a batch of {count} groups; ask for as many groups or more",
                communicator.size()
            )
        }
        Ok(Self::of(count, communicator))
    }

    /// The batch as one group, on one rank.
    pub fn one() -> Self {
        Self::of(1, Communicator::single())
    }

    fn of(count: usize, communicator: Communicator) -> Self {
        Self {
            count,
            communicator,
            #[cfg(feature = "nccl")]
            nccl: Arc::default(),
        }
    }

    /// Whether batches are not divided.
    pub fn is_one(&self) -> bool {
        self.count == 1
    }

    /// The ranks that share the groups.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// The groups of this rank.
    pub(crate) fn own(&self) -> usize {
        self.count / self.communicator.size()
    }

    /// The images of this rank, in a batch of `images`.
    pub fn own_images(&self, images: usize) -> Range<usize> {
        let parts = parts(images, self.communicator.size());
        parts.into_iter().nth(self.communicator.rank()).unwrap_or_default()
    }

    /// The rows of this rank, of a tensor that has a row for each image of the batch.
    pub fn own_rows(&self, rows: &Tensor) -> Result<Tensor> {
        if self.communicator.size() == 1 {
            return Ok(rows.clone());
        }
        let own = self.own_images(rows.dim(0)?);
        rows.narrow(0, own.start, own.len())?.contiguous()
    }

    /// The rows of all ranks in order, f32, from those of each.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn all_rows(&self, own: &Tensor) -> Result<Tensor> {
        if self.communicator.size() == 1 {
            return Ok(own.clone());
        }
        let (_, width) = own.dims2()?;
        #[cfg(feature = "nccl")]
        if self.nccl.get().is_some() && own.device().is_cuda() {
            let rows = own.to_dtype(DType::F32)?.flatten_all()?;
            let counts = communicated(self.communicator.all_gather(&[rows.elem_count()]))?;
            let all = self.communicator.gather_vectors(&self.vectors(), rows, &counts)?;
            return all.reshape(((), width.max(1)));
        }
        let rows = own.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
        let all = communicated(self.communicator.all_gather(&rows.to_vec1::<f32>()?))?;
        let count = all.len() / width.max(1);
        Tensor::from_vec(all, (count, width), &Device::Cpu)?.to_device(own.device())
    }

    /// Connects the GPUs of the ranks by NCCL, if they compute on them and the program is built with it. All
    /// ranks call it.
    ///
    /// # Errors
    ///
    /// Some ranks compute on a GPU and some on the CPU; NCCL fails.
    pub(crate) fn connect(&self, device: &Device) -> Result<()> {
        let kind = match device {
            Device::Cpu => 0u8,
            Device::Cuda(_) => 1,
            Device::Metal(_) => 2,
        };
        let kinds = communicated(self.communicator.all_gather(&[kind]))?;
        if let Some(rank) = kinds.iter().position(|kind| *kind != kinds[0]) {
            let [first, other] =
                [kinds[0], kinds[rank]].map(|kind| ["the CPU", "CUDA", "Metal"][usize::from(kind)]);
            bail!(
                "rank 0 computes on {first}, but rank {rank} on {other}; pass a --device that all machines have"
            )
        }
        #[cfg(feature = "nccl")]
        if device.is_cuda() && self.communicator.size() > 1 && self.nccl.get().is_none() {
            let stream = device.as_cuda_device()?.cuda_stream();
            let nccl = communicated(Nccl::connect(&self.communicator, &stream))?;
            self.nccl.get_or_init(|| nccl);
        }
        Ok(())
    }

    /// The sum of a vector over all ranks, on all ranks, in the binary tree of [`Communicator`].
    ///
    /// - `own`: (L), f32, on any device.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn sum(&self, own: Tensor) -> Result<Tensor> {
        self.communicator.sum_vectors(&self.vectors(), own)
    }

    /// What `join(lower, upper)` makes of the vectors of all ranks, on all ranks, in the same tree.
    pub(crate) fn join(
        &self,
        own: Tensor,
        join: impl Fn(Tensor, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.communicator.join_vectors(&self.vectors(), own, join)
    }

    fn vectors(&self) -> TensorVectors<'_> {
        TensorVectors(self)
    }

    /// The images of each group of this rank, which has so many images of the batch.
    ///
    /// # Errors
    ///
    /// A group would be empty.
    pub(crate) fn of_own(&self, images: usize) -> Result<Vec<Range<usize>>> {
        let groups = self.own();
        if images < groups {
            bail!(
                "{images} images for {groups} groups of a batch; each group needs one: ask for fewer \
                 groups, or for larger batches"
            )
        }
        Ok(parts(images, groups))
    }
}

/// Vectors of tensors (L), f32, which travel by NCCL between GPUs that it connects, and else through host
/// memory.
struct TensorVectors<'a>(&'a BatchGroups);

impl VectorMemory for TensorVectors<'_> {
    type Vector = Tensor;
    type Error = Error;

    fn len(&self, vector: &Tensor) -> usize {
        vector.elem_count()
    }

    fn part(&self, vector: &Tensor, range: Range<usize>) -> Result<Tensor> {
        vector.narrow(0, range.start, range.len())
    }

    fn concatenate(&self, first: Tensor, second: Tensor) -> Result<Tensor> {
        Tensor::cat(&[first, second], 0)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a + b
    }

    fn exchange(&self, partner: usize, sent: &Tensor, count: usize) -> Result<Tensor> {
        #[cfg(feature = "nccl")]
        if let (Some(nccl), true) = (self.0.nccl.get(), sent.device().is_cuda()) {
            return crate::backend::cuda_exchange(nccl, partner, sent, count);
        }
        let mut received = vec![0f32; count];
        let numbers = sent.to_vec1::<f32>()?;
        communicated(self.0.communicator.exchange(partner, &numbers, &mut received))?;
        Tensor::from_vec(received, count, sent.device())
    }
}

/// Halves a range of images, then its halves, until there are so many parts, a power of two. So the parts
/// of a part are parts of the whole. Their sizes differ by 1 at most.
fn parts(images: usize, count: usize) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = std::iter::once(0..images).collect();
    while all.len() < count {
        let halves = |part: Range<usize>| {
            let middle = part.start + part.len() / 2;
            [part.start..middle, middle..part.end]
        };
        all = all.into_iter().flat_map(halves).collect();
    }
    all
}

/// The result of a collective operation, with candle's error.
pub(crate) fn communicated<T>(result: std::result::Result<T, CommunicationError>) -> Result<T> {
    result.map_err(Error::wrap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_of_a_rank_are_groups_of_the_batch() -> Result<()> {
        for images in 8..40 {
            let whole = parts(images, 8);
            assert_eq!(whole.iter().map(Range::len).sum::<usize>(), images);
            assert!(whole.iter().all(|part| part.len().abs_diff(images / 8) <= 1), "{whole:?}");
            for ranks in [1, 2, 4, 8] {
                let mut found = Vec::new();
                for rank in Communicator::threads(ranks).map_err(Error::wrap)? {
                    let groups = BatchGroups::new(8, rank)?;
                    let own = groups.own_images(images);
                    let parts = groups.of_own(own.len())?.into_iter();
                    found.extend(parts.map(|part| own.start + part.start..own.start + part.end));
                }
                assert_eq!(found, whole, "{ranks} ranks");
            }
        }
        Ok(())
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() -> Result<()> {
        let four = Communicator::threads(4).map_err(Error::wrap)?.remove(3);
        let error = BatchGroups::new(2, four.clone()).expect_err("too few").to_string();
        assert!(error.contains("4 ranks") && error.contains("2 groups"), "{error}");
        assert!(
            BatchGroups::new(6, four.clone()).is_err()
                && BatchGroups::new(0, four.clone()).is_err()
        );
        let groups = BatchGroups::new(8, four)?;
        let error = groups.of_own(1).expect_err("an empty group").to_string();
        assert!(error.contains("1 images for 2 groups"), "{error}");
        Ok(())
    }
}
