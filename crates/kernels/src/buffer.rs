//! Buffers for values: aligned memory, reused from step to step.
#![expect(unsafe_code, reason = "memory aligned to cache lines is viewed as numbers")]

use std::alloc::{Layout, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
/// From two huge pages on, memory of the system begins at one and the system is asked to use them: a step
/// touches hundreds of megabytes, where each small page costs a fault at first use and an entry in the
/// translation cache.
struct Lines {
    start: NonNull<BufferLine>,
    len: usize,
    owner: Owner,
}

/// Where memory goes when it is dropped.
enum Owner {
    System,
    /// A slab of a pool.
    Pool(Arc<BufferPool>, usize),
}

// SAFETY: `Lines` owns its memory, which holds plain numbers.
unsafe impl Send for Lines {}
// SAFETY: as above; shared, it is only read.
unsafe impl Sync for Lines {}

impl Lines {
    fn zeros(len: usize) -> Lines {
        let owner = Owner::System;
        if len == 0 {
            return Lines { start: NonNull::dangling(), len, owner };
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
        Lines { start, len, owner }
    }

    fn layout(len: usize) -> Layout {
        let layout = Layout::array::<BufferLine>(len).expect("shapes fit into the address space");
        let huge = layout.size() >= 2 * HUGE_PAGE;
        if huge { layout.align_to(HUGE_PAGE).expect("a power of two") } else { layout }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        match &self.owner {
            _ if self.len == 0 => {}
            Owner::Pool(pool, slab) => pool.put(*slab, self.start, self.len),
            // SAFETY: allocated in `zeros` with the same layout, and owned by `self`.
            Owner::System => unsafe {
                std::alloc::dealloc(self.start.as_ptr().cast(), Lines::layout(self.len));
            },
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

/// Numbers that begin on a cache line. Dropping a buffer returns its memory to the [`BufferPool`] that it is from.
///
/// A buffer of f32 dereferences to its numbers; only the kernels read those of another precision.
pub struct Buffer {
    lines: Lines,
    len: usize,
    precision: Precision,
}

impl Buffer {
    /// `len` f32 zeros, outside any pool.
    pub fn zeros(len: usize) -> Buffer {
        Buffer::zeros_of(Precision::F32, len)
    }

    /// `len` zeros, outside any pool.
    pub fn zeros_of(precision: Precision, len: usize) -> Buffer {
        Buffer { lines: Lines::zeros(lines_of(precision, len)), len, precision }
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

/// Views an even number of halves, at an address that is a multiple of 4, as half as many words.
///
/// # Panics
///
/// If the number is odd, or the address is not a multiple of 4.
pub(crate) fn words_within(halves: &mut [Half]) -> &mut [u32] {
    let (address, len) = (halves.as_mut_ptr().cast::<u32>(), halves.len());
    assert!(len.is_multiple_of(2) && address.is_aligned());
    // SAFETY: the same initialised bytes, aligned as just checked; any bits are valid for both, and the
    // borrow is passed on.
    unsafe { std::slice::from_raw_parts_mut(address, len / 2) }
}

/// Memory for buffers, which is used again, so that a step after the first asks the system for none.
///
/// Memory comes from the system in large slabs, of which only what has been written takes up memory. A buffer
/// is cut from the first free range that is long enough, and free ranges side by side become one. So in a backward
/// pass, the small maps of the last layers make room for the large gradients of the first.
#[derive(Default)]
pub struct BufferPool {
    slabs: Mutex<Vec<Slab>>,
}

/// Bytes of a slab, unless a buffer is larger.
const SLAB: usize = if cfg!(miri) { 1 << 20 } else { 512 << 20 };

/// Memory of the system, and which of it is free.
struct Slab {
    /// Lines from here are cut.
    start: NonNull<BufferLine>,
    /// Free ranges of lines, in order; no two touch.
    free: Vec<Range<usize>>,
    /// The line after the last one that was ever in use.
    touched: usize,
    /// The memory itself, which is reached through `start` alone.
    _memory: Vec<f32>,
}

// SAFETY: a slab owns the memory that its pointer leads to, which holds plain numbers.
unsafe impl Send for Slab {}

impl Slab {
    /// A slab of at least so many lines.
    fn new(lines: usize) -> Slab {
        let bytes = (lines * size_of::<BufferLine>()).max(SLAB);
        // Whole pages of zeros, which the system sets up once they are written.
        let mut memory = pages::zeros((bytes + HUGE_PAGE) / size_of::<f32>());
        let offset = memory.as_ptr().align_offset(HUGE_PAGE);
        let start = NonNull::from(&mut memory[offset..]).cast();
        let all = 0..bytes / size_of::<BufferLine>();
        Slab { start, free: vec![all], touched: 0, _memory: memory }
    }

    /// Cuts lines from the first free range that is long enough.
    fn take(&mut self, wanted: usize) -> Option<NonNull<BufferLine>> {
        let at = self.free.iter().position(|range| range.len() >= wanted)?;
        let first = self.free[at].start;
        self.free[at].start += wanted;
        if self.free[at].is_empty() {
            self.free.remove(at);
        }
        self.touched = self.touched.max(first + wanted);
        // SAFETY: the line lies in the memory, whose ranges are inside of it.
        Some(unsafe { self.start.add(first) })
    }

    /// Joins lines that are free again to the free ranges beside them.
    fn put(&mut self, start: NonNull<BufferLine>, len: usize) {
        // SAFETY: `take` made the pointer from `self.start`.
        let first = usize::try_from(unsafe { start.offset_from(self.start) }).expect("behind it");
        let (mut freed, mut at) =
            (first..first + len, self.free.partition_point(|range| range.start < first));
        if self.free.get(at).is_some_and(|after| after.start == freed.end) {
            freed.end = self.free.remove(at).end;
        }
        if at > 0 && self.free[at - 1].end == freed.start {
            at -= 1;
            freed.start = self.free.remove(at).start;
        }
        self.free.insert(at, freed);
    }
}

impl BufferPool {
    /// An empty pool.
    pub fn new() -> Arc<BufferPool> {
        Arc::default()
    }

    /// Bytes from the start of each slab to the end of its farthest buffer so far: what the pool has used.
    pub fn touched(&self) -> usize {
        let slabs = self.slabs();
        slabs.iter().map(|slab| slab.touched * size_of::<BufferLine>()).sum()
    }

    /// A buffer of `len` f32 with arbitrary contents.
    pub fn take(self: &Arc<BufferPool>, len: usize) -> Buffer {
        self.take_of(Precision::F32, len)
    }

    /// A buffer of `len` numbers with arbitrary contents.
    pub fn take_of(self: &Arc<BufferPool>, precision: Precision, len: usize) -> Buffer {
        let wanted = lines_of(precision, len);
        if wanted == 0 {
            return Buffer::zeros_of(precision, len);
        }
        let mut slabs = self.slabs();
        let found = |slabs: &mut Vec<Slab>| {
            let mut slabs = slabs.iter_mut().enumerate();
            slabs.find_map(|(at, slab)| Some((at, slab.take(wanted)?)))
        };
        let (slab, start) = found(&mut slabs).unwrap_or_else(|| {
            slabs.push(Slab::new(wanted));
            found(&mut slabs).expect("the new slab is long enough")
        });
        let owner = Owner::Pool(Arc::clone(self), slab);
        Buffer { lines: Lines { start, len: wanted, owner }, len, precision }
    }

    fn put(&self, slab: usize, start: NonNull<BufferLine>, len: usize) {
        self.slabs()[slab].put(start, len);
    }

    fn slabs(&self) -> MutexGuard<'_, Vec<Slab>> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
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
        assert_eq!(pool.touched(), 2 * 3 * 64);
    }

    #[test]
    fn large_memory_begins_at_a_huge_page_and_is_zero() {
        let mut buffer = Buffer::zeros(2 * HUGE_PAGE);
        let first = BufferPool::new().take(2 * HUGE_PAGE);
        for buffer in [&buffer, &first] {
            assert_eq!(buffer.as_ptr() as usize % HUGE_PAGE, 0);
            assert!(buffer.iter().all(|value| *value == 0.));
        }
        *buffer.last_mut().expect("many") = 1.;
        assert_eq!(buffer.clone()[2 * HUGE_PAGE - 1], 1.);
        assert!(BufferPool::new().take(0).is_empty() && Buffer::zeros(0).is_empty());
    }

    #[test]
    fn free_ranges_side_by_side_become_one() {
        let pool = BufferPool::new();
        let mut parts: Vec<Option<Buffer>> = (0..4).map(|_| Some(pool.take(1000))).collect();
        let places: Vec<_> = parts.iter().flatten().map(|part| part.as_ptr()).collect();
        // Joined to nothing, to the one behind it, to the rest of the slab, and to both sides.
        for (freed, ranges) in [(1, 2), (0, 2), (3, 2), (2, 1)] {
            parts[freed] = None;
            assert_eq!(pool.slabs()[0].free.len(), ranges, "{freed}");
        }
        let all = pool.take(4000);
        assert_eq!(all.as_ptr(), places[0]);
    }

    #[test]
    fn a_buffer_that_no_slab_holds_gets_one_of_its_own() {
        let pool = BufferPool::new();
        let small = pool.take(100);
        let large = pool.take(SLAB / size_of::<f32>());
        let next = pool.take(100);
        assert_eq!(next.as_ptr() as usize - small.as_ptr() as usize, 7 * 64);
        drop([small, large, next]);
        assert_eq!(pool.touched(), 2 * 7 * 64 + SLAB);
    }
}
