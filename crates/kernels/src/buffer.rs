//! Buffers for values: aligned memory, reused from step to step.
#![expect(unsafe_code, reason = "memory aligned to cache lines is viewed as numbers")]

use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Precision;
use crate::element::{Half, ValueElement};
use crate::pages::{self, HUGE_PAGE};

/// Numbers in one cache line and in one AVX-512 register.
const LINE: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct BufferLine([f32; LINE]);

/// Initialised memory of a fixed length.
///
/// From two huge pages on, it begins at one and the system is asked to use them: a step touches
/// hundreds of megabytes, where each small page costs a fault at first use and an entry in the
/// translation cache.
struct Lines {
    start: NonNull<BufferLine>,
    len: usize,
}

// SAFETY: `Lines` owns its memory, which holds plain numbers.
unsafe impl Send for Lines {}
// SAFETY: as above; shared, it is only read.
unsafe impl Sync for Lines {}

impl Lines {
    fn zeros(len: usize) -> Lines {
        if len == 0 {
            return Lines { start: NonNull::dangling(), len };
        }
        let layout = Lines::layout(len);
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc(layout) };
        let Some(start) = NonNull::new(memory.cast::<BufferLine>()) else {
            handle_alloc_error(layout)
        };
        if layout.align() == HUGE_PAGE {
            pages::advise_huge_pages(memory, layout.size());
        }
        // SAFETY: the memory was just allocated with this size; zero bytes are zeros of every precision.
        unsafe { memory.write_bytes(0, layout.size()) };
        Lines { start, len }
    }

    fn layout(len: usize) -> Layout {
        let layout = Layout::array::<BufferLine>(len).expect("shapes fit into the address space");
        let huge = layout.size() >= 2 * HUGE_PAGE;
        if huge { layout.align_to(HUGE_PAGE).expect("a power of two") } else { layout }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeros` with the same layout, and owned by `self`.
            unsafe { std::alloc::dealloc(self.start.as_ptr().cast(), Lines::layout(self.len)) }
        }
    }
}

impl Deref for Lines {
    type Target = [BufferLine];

    fn deref(&self) -> &[BufferLine] {
        // SAFETY: `len` initialised lines begin at `start`; for 0, any aligned address is valid.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [BufferLine] {
        // SAFETY: as above; `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Numbers that begin on a cache line. Dropping a buffer returns its memory to its [`BufferPool`].
///
/// A buffer of f32 dereferences to its numbers; only the kernels read those of another precision.
pub struct Buffer {
    lines: Lines,
    len: usize,
    precision: Precision,
    pool: Option<Arc<BufferPool>>,
}

impl Buffer {
    /// `len` f32 zeros, outside any pool.
    pub fn zeros(len: usize) -> Buffer {
        Buffer::zeros_of(Precision::F32, len)
    }

    /// `len` zeros, outside any pool.
    pub fn zeros_of(precision: Precision, len: usize) -> Buffer {
        let lines = Lines::zeros(lines_of(precision, len));
        Buffer { lines, len, precision, pool: None }
    }

    /// How the numbers are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The count of numbers.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no numbers.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the numbers of another buffer.
    ///
    /// # Panics
    ///
    /// If length or precision differ.
    pub fn copy_from(&mut self, other: &Buffer) {
        assert_eq!((self.len, self.precision), (other.len, other.precision));
        self.bytes_mut().copy_from_slice(other.bytes());
    }

    pub(crate) fn halves(&self) -> &[Half] {
        assert_eq!(self.precision, Precision::Bf16);
        // SAFETY: the lines hold at least `2 * len` initialised bytes, aligned to 64; any bits are valid for
        // `Half`, a transparent `u16`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn halves_mut(&mut self) -> &mut [Half] {
        assert_eq!(self.precision, Precision::Bf16);
        // SAFETY: as above; `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }

    /// The numbers as bytes.
    pub fn bytes(&self) -> &[u8] {
        let bytes = self.precision.bytes() * self.len;
        // SAFETY: the lines hold at least that many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), bytes) }
    }

    /// The numbers as bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.precision.bytes() * self.len;
        // SAFETY: as above, and any bytes are valid numbers.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), bytes) }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        let mut copy = Buffer::zeros_of(self.precision, self.len);
        copy.copy_from(self);
        copy
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        assert_eq!(self.precision, Precision::F32);
        // SAFETY: `BufferLine` is `repr(C)` and exactly 16 `f32` (64 bytes, aligned to 64), so the lines are
        // `16 * lines.len()` contiguous initialised numbers, and `len` is at most that.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.precision, Precision::F32);
        // SAFETY: as above; `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.put(std::mem::replace(&mut self.lines, Lines::zeros(0)));
        }
    }
}

fn lines_of(precision: Precision, len: usize) -> usize {
    (len * precision.bytes()).div_ceil(size_of::<BufferLine>())
}

/// Runs `work` on scratch memory of this thread, with arbitrary contents. The memory grows as needed and
/// lives until the thread ends.
///
/// # Panics
///
/// If `work` calls this function again.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<Buffer> = RefCell::new(Buffer::zeros(0));
    }
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < len {
            *scratch = Buffer::zeros(len);
        }
        work(&mut scratch[..len])
    })
}

/// [`with_scratch`] for `len` numbers of a value's type and `sums` of f32.
pub(crate) fn with_scratch_of<T: ValueElement, R>(
    len: usize,
    sums: usize,
    work: impl FnOnce(&mut [T], &mut [f32]) -> R,
) -> R {
    let lines = lines_of(T::PRECISION, len) * LINE;
    with_scratch(lines + sums, |memory| {
        let (numbers, sums) = memory.split_at_mut(lines);
        work(&mut T::within(numbers)[..len], sums)
    })
}

/// Views memory of f32 as twice as many halves.
pub(crate) fn halves_within(memory: &mut [f32]) -> &mut [Half] {
    // SAFETY: the same initialised bytes, aligned for the larger type; any bits are valid for both, and
    // the borrow is passed on.
    unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), 2 * memory.len()) }
}

/// Free buffers for reuse, so that a step after the first allocates nothing.
#[derive(Default)]
pub struct BufferPool {
    /// Sorted by size.
    free: Mutex<Vec<Lines>>,
    allocated: AtomicUsize,
}

impl BufferPool {
    /// An empty pool.
    pub fn new() -> Arc<BufferPool> {
        Arc::default()
    }

    /// How often the pool had no fitting buffer and allocated one.
    pub fn allocations(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    /// A buffer of `len` f32 with arbitrary contents.
    pub fn take(self: &Arc<BufferPool>, len: usize) -> Buffer {
        self.take_of(Precision::F32, len)
    }

    /// A buffer of `len` numbers with arbitrary contents.
    ///
    /// Reuses the smallest free buffer that is large enough, if at most half of it would be wasted.
    pub fn take_of(self: &Arc<BufferPool>, precision: Precision, len: usize) -> Buffer {
        let wanted = lines_of(precision, len);
        if wanted == 0 {
            return Buffer { lines: Lines::zeros(0), len, precision, pool: None };
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = free.partition_point(|lines| lines.len() < wanted);
        let reuse = free.get(at).is_some_and(|lines| lines.len() <= 2 * wanted);
        let lines = reuse.then(|| free.remove(at));
        drop(free);
        let lines = lines.unwrap_or_else(|| {
            self.allocated.fetch_add(1, Ordering::Relaxed);
            Lines::zeros(wanted)
        });
        Buffer { lines, len, precision, pool: Some(Arc::clone(self)) }
    }

    fn put(&self, lines: Lines) {
        if lines.is_empty() {
            return;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let at = free.partition_point(|other| other.len() < lines.len());
        free.insert(at, lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_reused() {
        let pool = BufferPool::new();
        let mut buffer = pool.take(37);
        assert_eq!(buffer.len(), 37);
        assert_eq!(buffer.as_ptr() as usize % 64, 0);
        buffer[36] = 5.;
        let place = buffer.as_ptr();
        drop(buffer);
        let again = pool.take(40);
        assert_eq!(again.as_ptr(), place);
        assert_eq!(again[36], 5.);
        let other = pool.take(40);
        assert_ne!(other.as_ptr(), place);
        assert_eq!(pool.allocations(), 2);
    }

    #[test]
    fn large_memory_begins_at_a_huge_page_and_is_zero() {
        let pool = BufferPool::new();
        let mut buffer = pool.take(2 * HUGE_PAGE);
        assert_eq!(buffer.as_ptr() as usize % HUGE_PAGE, 0);
        assert!(buffer.iter().all(|value| *value == 0.));
        *buffer.last_mut().expect("many") = 1.;
        assert_eq!(buffer.clone()[2 * HUGE_PAGE - 1], 1.);
        assert!(pool.take(0).is_empty() && Buffer::zeros(0).is_empty());
    }

    #[test]
    fn a_small_request_does_not_take_a_large_buffer() {
        let pool = BufferPool::new();
        drop(pool.take(10_000));
        let small = pool.take(100);
        let large = pool.take(10_000);
        assert!(small.lines.len() < 10 && large.lines.len() == 625);
    }
}
