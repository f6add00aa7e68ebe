//! Memory for values: aligned, and reused from step to step.
#![expect(unsafe_code, reason = "a cache-line-aligned buffer is viewed as the numbers it holds")]

use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::Precision;
use crate::element::{Element, Half};

/// Numbers in one cache line and in one AVX-512 register.
const LINE: usize = 16;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

/// Bytes of a huge page. From twice as many on, memory begins at one and the system is asked to use
/// them: a step touches hundreds of megabytes, and each small page costs a fault the first time and
/// a place in the translation cache ever after.
const HUGE_PAGE: usize = 2 << 20;

/// Memory of a fixed length, all of it initialised.
struct Lines {
    start: NonNull<Line>,
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
        let Some(start) = NonNull::new(memory.cast::<Line>()) else { handle_alloc_error(layout) };
        if layout.align() == HUGE_PAGE {
            advise_huge_pages(memory, layout.size());
        }
        // SAFETY: all of it was just allocated; zero bytes are zeros of every precision.
        unsafe { memory.write_bytes(0, layout.size()) };
        Lines { start, len }
    }

    fn layout(len: usize) -> Layout {
        let layout = Layout::array::<Line>(len).expect("shapes fit into the address space");
        let huge = layout.size() >= 2 * HUGE_PAGE;
        if huge { layout.align_to(HUGE_PAGE).expect("a power of two") } else { layout }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeros` with the same layout, and nobody else's.
            unsafe { std::alloc::dealloc(self.start.as_ptr().cast(), Lines::layout(self.len)) }
        }
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: `len` initialised lines from `start` on; when it is 0, any aligned place will do.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as above; `&mut self` makes the borrow the only one.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// Asks for huge pages; a system that has none to give says so, and small ones serve as well.
#[cfg_attr(
    not(all(target_os = "linux", not(miri))),
    expect(unused_variables, reason = "Linux asks")
)]
fn advise_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        use std::ffi::{c_int, c_void};
        unsafe extern "C" {
            /// Of the C library, which the standard library links.
            fn madvise(start: *mut c_void, bytes: usize, advice: c_int) -> c_int;
        }
        const MADV_HUGEPAGE: c_int = 14;
        // SAFETY: the range is one allocation of whole pages but for its end; this advice changes
        // no contents.
        unsafe { madvise(start.cast(), bytes & !(HUGE_PAGE - 1), MADV_HUGEPAGE) };
    }
}

/// A run of numbers that starts on a cache line. It goes back to its [`BufferPool`] when dropped.
///
/// One of f32 dereferences to its numbers; what is stored otherwise only the kernels read.
pub struct Buffer {
    lines: Lines,
    len: usize,
    precision: Precision,
    pool: Option<Arc<BufferPool>>,
}

impl Buffer {
    /// `len` zeros, f32, that belong to no pool.
    pub fn zeros(len: usize) -> Buffer {
        Buffer::zeros_of(Precision::F32, len)
    }

    /// `len` zeros that belong to no pool.
    pub fn zeros_of(precision: Precision, len: usize) -> Buffer {
        let lines = Lines::zeros(lines_of(precision, len));
        Buffer { lines, len, precision, pool: None }
    }

    /// How its numbers are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Overwrites it with another of the same kind.
    ///
    /// # Panics
    ///
    /// When length or precision differ.
    pub fn copy_from(&mut self, other: &Buffer) {
        assert_eq!((self.len, self.precision), (other.len, other.precision));
        self.bytes_mut().copy_from_slice(other.bytes());
    }

    pub(crate) fn halves(&self) -> &[Half] {
        assert_eq!(self.precision, Precision::Bf16);
        // SAFETY: the lines hold at least `2 * len` initialised bytes, aligned to 64; `Half` is a
        // transparent `u16`, for which any bits are valid.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn halves_mut(&mut self) -> &mut [Half] {
        assert_eq!(self.precision, Precision::Bf16);
        // SAFETY: as above; `&mut self` makes the borrow the only one.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }

    /// The same memory as bytes.
    pub fn bytes(&self) -> &[u8] {
        let bytes = self.precision.bytes() * self.len;
        // SAFETY: the lines hold at least that many initialised bytes.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), bytes) }
    }

    /// The same memory as bytes, to write.
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
        // SAFETY: `Line` is `repr(C)` and exactly 16 `f32` (64 bytes, aligned to 64), so the lines
        // are `16 * lines.len()` initialised numbers in a row, and `len` is at most that.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.precision, Precision::F32);
        // SAFETY: as above; `&mut self` makes the borrow the only one.
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
    (len * precision.bytes()).div_ceil(size_of::<Line>())
}

/// Runs `work` on memory of this thread's own with whatever values its last use left in it. It grows
/// with the first use that needs more and stays until the thread ends.
///
/// # Panics
///
/// When `work` asks for it again.
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

/// [`with_scratch`] for `len` numbers as values store them and `sums` of f32.
pub(crate) fn with_scratch_of<T: Element, R>(
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

/// Memory of 32-bit numbers as twice as many halves.
pub(crate) fn halves_within(memory: &mut [f32]) -> &mut [Half] {
    // SAFETY: the same initialised bytes, at a place fit for the larger type; any bits are valid for
    // both, and the borrow goes on.
    unsafe { std::slice::from_raw_parts_mut(memory.as_mut_ptr().cast(), 2 * memory.len()) }
}

/// Buffers that wait to be used again, so that a step after the first allocates nothing.
#[derive(Default)]
pub struct BufferPool {
    /// Sorted by size.
    free: Mutex<Vec<Lines>>,
    allocated: AtomicUsize,
}

impl BufferPool {
    /// A pool without buffers.
    pub fn new() -> Arc<BufferPool> {
        Arc::default()
    }

    /// How often it had no fitting buffer and allocated one.
    pub fn allocations(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }

    /// A buffer of `len` f32 with whatever values its last use left in it.
    pub fn take(self: &Arc<BufferPool>, len: usize) -> Buffer {
        self.take_of(Precision::F32, len)
    }

    /// A buffer of `len` numbers with whatever values its last use left in it.
    ///
    /// It takes the smallest waiting buffer that is large enough, if that wastes at most half.
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
    fn buffers_are_aligned_and_come_back() {
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
    fn a_small_request_leaves_a_large_buffer_alone() {
        let pool = BufferPool::new();
        drop(pool.take(10_000));
        let small = pool.take(100);
        let large = pool.take(10_000);
        assert!(small.lines.len() < 10 && large.lines.len() == 625);
    }
}
