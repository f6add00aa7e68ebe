//! Parallel loops on the threads of the current rayon pool.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one buffer")]

use std::marker::PhantomData;

use rayon::prelude::*;

/// Below this many operations, a loop costs less than waking another thread.
const WORTH_SHARING: usize = 200_000;

/// Runs `work` on a thread of the current pool, so that the many small parallel loops inside it do not
/// each enter the pool from outside.
pub fn on_workers<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() { work() } else { rayon::scope(|_| work()) }
}

/// The number of threads of the current pool, which share the work of a kernel.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Calls `task(0)` to `task(tasks - 1)`, in any order and on any thread.
///
/// `operations` is a rough count for all tasks together; below a threshold they run on this thread.
pub(crate) fn for_each(tasks: usize, operations: usize, task: impl Fn(usize) + Sync + Send) {
    if tasks <= 1 || operations < WORTH_SHARING || rayon::current_num_threads() == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// Calls `task(i, chunk)` for every `len` elements of `slice`, in any order and on any thread.
pub(crate) fn for_each_chunk<T: Send>(
    slice: &mut [T],
    len: usize,
    operations: usize,
    task: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    if slice.is_empty() {
        return;
    }
    if slice.len() <= len || operations < WORTH_SHARING || rayon::current_num_threads() == 1 {
        slice.chunks_mut(len).enumerate().for_each(|(i, chunk)| task(i, chunk));
    } else {
        slice.par_chunks_mut(len).enumerate().for_each(|(i, chunk)| task(i, chunk));
    }
}

/// [`for_each_chunk`] of two slices, split at the same indices.
pub(crate) fn for_each_chunk_of_two<T: Send, U: Send>(
    first: &mut [T],
    second: &mut [U],
    len: usize,
    operations: usize,
    task: impl Fn(usize, &mut [T], &mut [U]) + Sync + Send,
) {
    if first.is_empty() {
        return;
    }
    if first.len() <= len || operations < WORTH_SHARING || rayon::current_num_threads() == 1 {
        let chunks = first.chunks_mut(len).zip(second.chunks_mut(len));
        chunks.enumerate().for_each(|(i, (a, b))| task(i, a, b));
    } else {
        let chunks = first.par_chunks_mut(len).zip(second.par_chunks_mut(len));
        chunks.enumerate().for_each(|(i, (a, b))| task(i, a, b));
    }
}

/// A slice of which several tasks write disjoint parts.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are only available through `part`, whose callers promise that no two tasks hold
// overlapping ones; numbers of type `T: Send` may be written from any thread.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The `len` elements from index `from`.
    ///
    /// # Safety
    ///
    /// While the result lives, no overlapping part exists.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [T] {
        assert!(from <= self.len && len <= self.len - from, "part {from}+{len} of {}", self.len);
        // SAFETY: inside the slice by the assertion; unique by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}
