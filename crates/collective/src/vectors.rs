//! Sums and gathers of vectors outside host memory, such as tensors on a GPU.

use std::ops::Range;

use crate::{Communicator, Halves, WORTH_SPLITTING};

/// A memory whose vectors ranks exchange and add. Every operation returns a new vector.
///
/// All collective operations are made of [`exchange`](Self::exchange) between two ranks, so that the order of
/// addition is ours, and not that of a library.
pub trait VectorMemory {
    /// Numbers in this memory.
    type Vector;
    /// The error of an operation.
    type Error;

    /// The number of numbers in a vector.
    fn len(&self, vector: &Self::Vector) -> usize;

    /// The numbers of a range of `vector`.
    ///
    /// # Errors
    ///
    /// As the memory has them; the range is within the vector.
    fn part(&self, vector: &Self::Vector, range: Range<usize>)
    -> Result<Self::Vector, Self::Error>;

    /// The numbers of `first`, then those of `second`.
    ///
    /// # Errors
    ///
    /// As the memory has them.
    fn concatenate(
        &self,
        first: Self::Vector,
        second: Self::Vector,
    ) -> Result<Self::Vector, Self::Error>;

    /// `a + b`, of equal lengths.
    ///
    /// # Errors
    ///
    /// As the memory has them.
    fn add(&self, a: &Self::Vector, b: &Self::Vector) -> Result<Self::Vector, Self::Error>;

    /// Sends a vector to rank `partner` and returns the `count` numbers that it sends.
    ///
    /// # Errors
    ///
    /// The partner has ended, or sends another number of numbers.
    fn exchange(
        &self,
        partner: usize,
        sent: &Self::Vector,
        count: usize,
    ) -> Result<Self::Vector, Self::Error>;
}

impl Communicator {
    /// The sum of the vectors of all ranks, on all ranks: bit-identical to that of
    /// [`all_reduce_sum`](Self::all_reduce_sum).
    ///
    /// - `own`: of the same length on all ranks.
    ///
    /// # Errors
    ///
    /// Those of `memory`.
    pub fn sum_vectors<M: VectorMemory>(
        &self,
        memory: &M,
        own: M::Vector,
    ) -> Result<M::Vector, M::Error> {
        if memory.len(&own) < WORTH_SPLITTING * self.size {
            return self.join_vectors(memory, own, |lower, upper| memory.add(&lower, &upper));
        }
        let (mut part, mut levels) = (own, Vec::new());
        for partner in self.partners() {
            let Halves { kept, sent } = Halves::of(0..memory.len(&part), self.rank < partner);
            let received =
                memory.exchange(partner, &memory.part(&part, sent.clone())?, kept.len())?;
            part = memory.add(&memory.part(&part, kept)?, &received)?;
            levels.push((partner, sent.len()));
        }
        for (partner, count) in levels.into_iter().rev() {
            part = self.concatenate_with(memory, partner, part, count)?;
        }
        Ok(part)
    }

    /// What `join` makes of the vectors of all ranks, on all ranks, in a binary tree.
    ///
    /// - `own`: of the same length on all ranks.
    /// - `join(lower, upper)`: joins the vector of higher ranks to that of lower ones; keeps the length.
    ///
    /// # Errors
    ///
    /// Those of `memory` and `join`.
    pub fn join_vectors<M: VectorMemory>(
        &self,
        memory: &M,
        own: M::Vector,
        join: impl Fn(M::Vector, M::Vector) -> Result<M::Vector, M::Error>,
    ) -> Result<M::Vector, M::Error> {
        let mut joined = own;
        for partner in self.partners() {
            let other = memory.exchange(partner, &joined, memory.len(&joined))?;
            joined = match partner < self.rank {
                true => join(other, joined)?,
                false => join(joined, other)?,
            };
        }
        Ok(joined)
    }

    /// The vectors of all ranks, one after the other, on all ranks.
    ///
    /// - `counts`: the length of the vector of each rank.
    ///
    /// # Errors
    ///
    /// Those of `memory`.
    pub fn gather_vectors<M: VectorMemory>(
        &self,
        memory: &M,
        own: M::Vector,
        counts: &[usize],
    ) -> Result<M::Vector, M::Error> {
        let mut all = own;
        for (distance, partner) in self.distances().zip(self.partners()) {
            // The partner has gathered the vectors of its own branch.
            let branch = partner / distance * distance;
            let count = counts[branch..branch + distance].iter().sum();
            all = self.concatenate_with(memory, partner, all, count)?;
        }
        Ok(all)
    }

    /// Exchanges vectors with a partner and concatenates both, in the order of the ranks.
    fn concatenate_with<M: VectorMemory>(
        &self,
        memory: &M,
        partner: usize,
        own: M::Vector,
        count: usize,
    ) -> Result<M::Vector, M::Error> {
        let other = memory.exchange(partner, &own, count)?;
        match partner < self.rank {
            true => memory.concatenate(other, own),
            false => memory.concatenate(own, other),
        }
    }
}
