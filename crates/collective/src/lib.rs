//! Processes that compute one thing together, as ranks `0` to `size − 1`: sums, gathers, broadcasts.
//!
//! A [`Communicator`] is one rank's end of the connection. Its sums are binary trees over the ranks,
//! `((0 + 1) + (2 + 3)) + …`, so that a sum over the leaves of a larger tree has the same bits for
//! any number of ranks that holds whole branches of it. The number of ranks is a power of two.
//!
//! | backend | ranks |
//! |---|---|
//! | [`Communicator::single`] | one: nothing is sent, and every operation returns at once |
//! | [`Communicator::of_environment`] | the processes that `mpirun` or `srun` started, with the feature `mpi` |
//! | [`Communicator::threads`] | threads of one process, for tests |
//!
//! Vectors outside host memory are summed by the same tree through a [`VectorMemory`], such as that of GPUs,
//! whose messages the feature `nccl` sends by `Nccl`.
//!
//! All ranks call the same operations in the same order. A rank that ends makes the operations of the
//! others fail. [Sums in the background](Communicator::sum_in_background) go on while a rank computes, beside its
//! other operations and in an order of their own.
//!
//! ```
//! use collective::Communicator;
//!
//! let ranks = Communicator::threads(4)?;
//! std::thread::scope(|scope| {
//!     for rank in ranks {
//!         scope.spawn(move || {
//!             let mut numbers = [rank.rank() as f32, 1.];
//!             rank.all_reduce_sum(&mut numbers).expect("all ranks run");
//!             assert_eq!(numbers, [6., 4.]);
//!         });
//!     }
//! });
//! # Ok::<(), collective::CommunicationError>(())
//! ```
//!
//! This crate knows no tensor and no network.

mod background;
mod error;
mod launch;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod threads;
mod vectors;

use std::ops::{AddAssign, Range};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytemuck::Pod;

pub use background::PendingSum;
pub use error::CommunicationError;
pub use launch::Place;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use vectors::VectorMemory;

use crate::background::Background;
use crate::threads::ThreadRank;

type Result<T> = std::result::Result<T, CommunicationError>;

/// One rank's end of the connection to the others. Clones are the same end.
#[derive(Clone, Debug)]
pub struct Communicator {
    rank: usize,
    size: usize,
    end: Arc<End>,
}

/// The state that clones of a communicator share.
#[derive(Debug)]
struct End {
    /// Started by the first sum in the background. Dropped before the links, which it may still use.
    background: OnceLock<Background>,
    links: Links,
    /// Links between the same ranks for the sums in the background alone.
    second: Option<Links>,
    /// See [`Communicator::sums_made`].
    made: Arc<AtomicUsize>,
    /// Nanoseconds: see [`Communicator::waited`].
    waited: AtomicU64,
}

/// How messages travel.
#[derive(Clone, Debug)]
enum Links {
    Single,
    Threads(Arc<ThreadRank>),
    #[cfg(feature = "mpi")]
    Mpi(Arc<mpi::World>),
    /// Messages that are apart from those of `Mpi`, and a thread that sleeps while it waits for them.
    #[cfg(feature = "mpi")]
    MpiInBackground(Arc<mpi::World>),
}

/// Fewer numbers than this for each rank are summed whole: latency outweighs their bytes.
const WORTH_SPLITTING: usize = 1024;

impl Communicator {
    /// The only rank.
    pub fn single() -> Self {
        Self::of(0, 1, Links::Single, None)
    }

    /// As many ranks as threads of this process will take, each with its own communicator.
    ///
    /// # Errors
    ///
    /// The number is not a power of two.
    pub fn threads(size: usize) -> Result<Vec<Self>> {
        Self::threads_with_latency(size, Duration::ZERO)
    }

    /// As [`threads`](Self::threads), over links on which every exchange takes so long: to see what a rank waits
    /// for.
    ///
    /// # Errors
    ///
    /// The number is not a power of two.
    pub fn threads_with_latency(size: usize, latency: Duration) -> Result<Vec<Self>> {
        check_size(size)?;
        let all = || ThreadRank::all(size, latency).into_iter().map(Arc::new).map(Links::Threads);
        let ranks = all().zip(all()).enumerate();
        let end = |(rank, (links, second))| Self::of(rank, size, links, Some(second));
        Ok(ranks.map(end).collect())
    }

    /// - `second`: links for sums in the background, where there can be any.
    fn of(rank: usize, size: usize, links: Links, second: Option<Links>) -> Self {
        let second = second.filter(|_| size > 1);
        let (background, made, waited) = Default::default();
        Self { rank, size, end: Arc::new(End { background, links, second, made, waited }) }
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks, a power of two.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether this is rank 0, the one that writes files.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// The time that this rank has spent in its operations with others so far: in waiting for them and in
    /// sending. Of a sum in the background, only the wait for its end counts. What other libraries send does not.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.end.waited.load(Ordering::Relaxed))
    }

    /// Replaces `values` by their sums over all ranks, on all ranks, added in a binary tree.
    ///
    /// # Errors
    ///
    /// A rank has ended, or has another number of values.
    pub fn all_reduce_sum<T: Pod + AddAssign>(&self, values: &mut [T]) -> Result<()> {
        if values.len() < WORTH_SPLITTING * self.size {
            // The order of two terms does not matter.
            return self.all_reduce(values, |total, other| add(total, other));
        }
        let kept = self.reduce_parts(values)?;
        self.gather_parts(values, kept)
    }

    /// Replaces `values` by what `join` makes of those of all ranks, on all ranks, in a binary tree.
    ///
    /// - `join(lower, upper)`: joins the values of higher ranks to those of lower ones.
    ///
    /// # Errors
    ///
    /// As [`all_reduce_sum`](Self::all_reduce_sum).
    pub fn all_reduce<T: Pod>(
        &self,
        values: &mut [T],
        join: impl Fn(&mut [T], &[T]),
    ) -> Result<()> {
        let mut other = vec![T::zeroed(); if self.size > 1 { values.len() } else { 0 }];
        for partner in self.partners() {
            self.exchange(partner, values, &mut other)?;
            if partner < self.rank {
                join(&mut other, values);
                values.copy_from_slice(&other);
            } else {
                join(values, &other);
            }
        }
        Ok(())
    }

    /// The values of all ranks in the order of the ranks. Ranks may have different numbers of values.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn all_gather<T: Pod>(&self, own: &[T]) -> Result<Vec<T>> {
        let mut all = own.to_vec();
        for partner in self.partners() {
            let other = self.exchange_any(partner, &all)?;
            let (low, high) = if partner < self.rank { (other, all) } else { (all, other) };
            all = [low, high].concat();
        }
        Ok(all)
    }

    /// The items of this rank, where the ranks share `count` of them: consecutive ones. The numbers of items
    /// of two ranks differ by at most 1. Values that are gathered of all items are in their order.
    pub fn share(&self, count: usize) -> Range<usize> {
        let start = |rank: usize| rank * count / self.size;
        start(self.rank)..start(self.rank + 1)
    }

    /// The lists of all ranks on rank 0, in the order of the ranks; none on the others.
    ///
    /// - `own`: such as a list for each item of [`share`](Self::share). Ranks may have different numbers
    ///   of lists, and lists different lengths.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn gather<T: Pod>(&self, own: Vec<Vec<T>>) -> Result<Vec<Vec<T>>> {
        let mut all = own;
        for (distance, partner) in self.distances().zip(self.partners()) {
            let mut count = [0u64];
            self.exchange(partner, &[all.len() as u64], &mut count)?;
            if !self.rank.is_multiple_of(2 * distance) {
                for list in all {
                    self.exchange_any(partner, &list)?;
                }
                return Ok(vec![]);
            }
            for _ in 0..count[0] {
                all.push(self.exchange_any(partner, &[])?);
            }
        }
        Ok(all)
    }

    /// Replaces `values` by those of rank 0.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn broadcast<T: Pod>(&self, values: &mut Vec<T>) -> Result<()> {
        for (distance, partner) in self.distances().zip(self.partners()) {
            if self.rank < distance {
                self.exchange_any(partner, values)?;
            } else if self.rank < 2 * distance {
                *values = self.exchange_any(partner, &[])?;
            }
        }
        Ok(())
    }

    /// Returns once all ranks have called it.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn barrier(&self) -> Result<()> {
        self.all_reduce::<u8>(&mut [], |_, _| ())
    }

    /// Whether the flag of any rank is set.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn any(&self, flag: bool) -> Result<bool> {
        let mut flag = [u8::from(flag)];
        self.all_reduce(&mut flag, |one, other| one[0] |= other[0])?;
        Ok(flag[0] != 0)
    }

    /// Ends this process with a failure, and with it the others: they would wait for it.
    ///
    /// - `code`: the exit status.
    pub fn abort(&self, code: u8) -> ! {
        #[cfg(feature = "mpi")]
        if let Links::Mpi(world) = &self.end.links {
            world.abort(code)
        }
        std::process::exit(i32::from(code))
    }

    /// Distances from a rank to its partners, nearest first: the tree from its leaves up.
    fn distances(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        (0..self.size.trailing_zeros()).map(|level| 1 << level)
    }

    fn partners(&self) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let rank = self.rank;
        self.distances().map(move |distance| rank ^ distance)
    }

    /// Sums over all ranks the part of `values` that it returns: the other parts are sent to partners,
    /// half of what is left at each level (recursive halving, Thakur et al. 2005, section 4.3).
    fn reduce_parts<T: Pod + AddAssign>(&self, values: &mut [T]) -> Result<Vec<Halves>> {
        let (mut all, mut part) = (Vec::new(), 0..values.len());
        for partner in self.partners() {
            let halves = Halves::of(part, self.rank < partner);
            let mut other = vec![T::zeroed(); halves.kept.len()];
            self.exchange(partner, &values[halves.sent.clone()], &mut other)?;
            add(&mut values[halves.kept.clone()], &other);
            part = halves.kept.clone();
            all.push(halves);
        }
        Ok(all)
    }

    /// Fetches the sums of the other parts, in the reverse order.
    fn gather_parts<T: Pod>(&self, values: &mut [T], mut halves: Vec<Halves>) -> Result<()> {
        for partner in self.partners().rev() {
            let Some(Halves { kept, sent }) = halves.pop() else { break };
            let mut other = vec![T::zeroed(); sent.len()];
            self.exchange(partner, &values[kept], &mut other)?;
            values[sent].copy_from_slice(&other);
        }
        Ok(())
    }

    /// Sends values to a partner and receives as many as it is known to send.
    ///
    /// # Errors
    ///
    /// The partner has ended, or sends another number of values.
    pub fn exchange<T: Pod>(&self, partner: usize, sent: &[T], received: &mut [T]) -> Result<()> {
        let (sent, received) = (bytemuck::cast_slice(sent), bytemuck::cast_slice_mut(received));
        let clock = Instant::now();
        match &self.end.links {
            Links::Single => {}
            Links::Threads(links) => links.exchange(partner, sent, received)?,
            #[cfg(feature = "mpi")]
            Links::Mpi(world) => world.exchange(partner, sent, received),
            #[cfg(feature = "mpi")]
            Links::MpiInBackground(world) => world.exchange_in_background(partner, sent, received),
        }
        self.end.waited_since(clock);
        Ok(())
    }

    /// Sends values to a partner and receives its own, whose number is not known.
    fn exchange_any<T: Pod>(&self, partner: usize, sent: &[T]) -> Result<Vec<T>> {
        let mut count = [0u64];
        self.exchange(partner, &[sent.len() as u64], &mut count)?;
        let mut received = vec![T::zeroed(); count[0] as usize];
        self.exchange(partner, sent, &mut received)?;
        Ok(received)
    }
}

impl End {
    fn waited_since(&self, clock: Instant) {
        self.waited.fetch_add(clock.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

/// The halves of a part of some values.
struct Halves {
    kept: Range<usize>,
    sent: Range<usize>,
}

impl Halves {
    fn of(part: Range<usize>, keeps_first: bool) -> Self {
        let middle = part.start + part.len() / 2;
        let (first, second) = (part.start..middle, middle..part.end);
        if keeps_first {
            Self { kept: first, sent: second }
        } else {
            Self { kept: second, sent: first }
        }
    }
}

/// Joins neighbours, then their results, until one is left: the binary tree over a power of two of
/// leaves. All sums that do not depend on the number of ranks are made by it below the ranks.
///
/// - `join(lower, upper)`: joins the upper leaf to the lower one.
///
/// Returns `None` if there is no leaf.
pub fn tree<T>(leaves: impl IntoIterator<Item = T>, mut join: impl FnMut(&mut T, T)) -> Option<T> {
    let mut level: Vec<T> = leaves.into_iter().collect();
    while level.len() > 1 {
        let mut leaves = level.into_iter();
        let mut above = Vec::new();
        while let Some(mut lower) = leaves.next() {
            if let Some(upper) = leaves.next() {
                join(&mut lower, upper);
            }
            above.push(lower);
        }
        level = above;
    }
    level.pop()
}

fn add<T: Pod + AddAssign>(total: &mut [T], other: &[T]) {
    total.iter_mut().zip(other).for_each(|(total, other)| *total += *other);
}

/// Fails unless the number of ranks is a power of two.
fn check_size(size: usize) -> Result<()> {
    if size.is_power_of_two() {
        return Ok(());
    }
    Err(CommunicationError::new(format!(
        "{size} ranks were started; start a power of two, such as {}",
        size.next_power_of_two()
    )))
}

#[cfg(test)]
mod tests;
