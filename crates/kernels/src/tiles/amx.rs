//! Products of bfloat16 tiles with AMX, Intel's tile unit: eight registers of up to 16 rows of 64 bytes,
//! and one instruction that adds the product of two registers to a third.
//!
//! The blocking is written once over a small interface ([`TileUnit`]) with two implementations: the
//! instructions ([`Real`]) and an emulation ([`Emulated`]), after the operation sections of TILELOADD,
//! TILESTORED, TILEZERO and TDPBF16PS in the Intel 64 and IA-32 Architectures Software Developer's
//! Manual. So the code around the unit is tested on any x86-64 processor with AVX2. If a processor has the
//! unit, [`usable`] compares it with the emulation before it is used.
//!
//! A tile of this crate is 16 × 16 numbers, half of what a register can take along the inner side. So two
//! tiles lie side by side and are multiplied at once: see [`super::TileOrder`].
//!
//! Six of the eight registers are in use, although a product of two left and two right registers would read
//! each of them only once with all eight. On a Xeon of the fourth generation (Sapphire Rapids), four
//! products with their loads then take 30 ns at times and 105 ns at others, for seconds in a row; with six
//! registers and one load more they take 30 ns at all times. Our reading: registers are renamed only while
//! some are free, and when other programs use the same core, it has no more than eight.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _MM_HINT_T0, _mm_prefetch, _xgetbv};
use std::cell::Cell;
use std::sync::OnceLock;

use super::{StripProduct, TileProduct, TileRun};
use crate::element::{Half, ValueElement};
use crate::layout::{SIDE, TILE};

/// The operations of a tile unit on registers 0 to 7, with the sizes in [`CONFIGURATION`].
pub(super) trait TileUnit {
    /// Loads a register from rows that begin `stride` bytes apart.
    ///
    /// # Safety
    ///
    /// All rows of the register lie in readable memory.
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);

    /// Stores a register to rows that begin `stride` bytes apart.
    ///
    /// # Safety
    ///
    /// All rows of the register lie in memory that the caller may write.
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);

    /// Sets a register to zero.
    ///
    /// # Safety
    ///
    /// The registers of this thread are set up.
    unsafe fn zero<const T: usize>(&mut self);

    /// `C += A · B` of bfloat16, where the rows of `B` hold pairs along the inner side.
    ///
    /// # Safety
    ///
    /// The registers of this thread are set up.
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// The operand of `LDTILECFG`: palette 1, rows and bytes per row of each register.
#[repr(C, align(64))]
struct TileConfiguration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Registers 0 to 3 hold sums, 16 rows of 16 f32. Register 4 holds two left tiles, 16 rows of 32 bfloat16;
/// 5 holds two right tiles, 16 rows of 16 pairs.
static CONFIGURATION: TileConfiguration = TileConfiguration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Bytes per row of a register.
const ROW: usize = 64;
/// Numbers of two tiles, which a register holds.
const PAIR: usize = 2 * TILE;

/// Distances between the tiles of a product, in numbers.
#[derive(Clone, Copy)]
struct Strides {
    /// From each row of left numbers to the next.
    left_row: usize,
    /// From two left tiles to the next two along the inner side.
    left: usize,
    /// From each left side to the next.
    apart: usize,
    /// From two right tiles to the next two along the inner side.
    right: usize,
    /// From a column of right tiles to the next.
    column: usize,
    /// To right tiles that a later product reads, or 0.
    ahead: usize,
}

/// Cache lines that each step fetches of what a later product reads.
const LINES_AHEAD: usize = 4;
/// Numbers in a cache line.
const LINE: usize = 2 * SIDE;

/// [`super::product_of_halves`] of one or two left sides and one or two columns.
///
/// # Safety
///
/// Every tile lies inside its slice, and the registers of this thread are set up.
pub(super) unsafe fn product<U: TileUnit>(
    unit: &mut U,
    left: &[Half],
    right: &[Half],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    let TileProduct { runs, apart, columns, add, ahead, .. } = *product;
    let right_stride = columns * PAIR;
    let strides =
        Strides { left_row: 2 * SIDE, left: PAIR, apart, right: right_stride, column: PAIR, ahead };
    // SAFETY: promised by the caller.
    unsafe { sums(unit, [left, right], runs, columns, strides, add, outputs) }
}

/// [`super::product_of_strips`] of one or two left sides and one or two columns.
///
/// # Safety
///
/// As for [`product`].
pub(super) unsafe fn product_of_strips<U: TileUnit>(
    unit: &mut U,
    left: &[Half],
    right: &[Half],
    product: &StripProduct,
    outputs: &mut [&mut [f32]],
) {
    let StripProduct { runs, left_row, apart, column, columns, add } = *product;
    let strides = Strides { left_row, left: 2 * SIDE, apart, right: PAIR, column, ahead: 0 };
    // SAFETY: promised by the caller.
    unsafe { sums(unit, [left, right], runs, columns, strides, add, outputs) }
}

/// # Safety
///
/// As for [`product`].
unsafe fn sums<U: TileUnit>(
    unit: &mut U,
    [left, right]: [&[Half]; 2],
    runs: &[TileRun],
    columns: usize,
    strides: Strides,
    add: bool,
    outputs: &mut [&mut [f32]],
) {
    let (left, right) = (left.as_ptr(), right.as_ptr());
    // SAFETY: promised by the caller; the type parameters of `sum` are the numbers of outputs and columns.
    unsafe {
        match (outputs, columns) {
            ([a], 1) => sum::<U, 1, 1>(unit, left, right, runs, strides, [a.as_mut_ptr(); 2], add),
            ([a], _) => sum::<U, 1, 2>(unit, left, right, runs, strides, [a.as_mut_ptr(); 2], add),
            ([a, b], 1) => {
                let outputs = [a.as_mut_ptr(), b.as_mut_ptr()];
                sum::<U, 2, 1>(unit, left, right, runs, strides, outputs, add);
            }
            ([a, b], _) => {
                let outputs = [a.as_mut_ptr(), b.as_mut_ptr()];
                sum::<U, 2, 2>(unit, left, right, runs, strides, outputs, add);
            }
            _ => unreachable!("a product has one or two outputs"),
        }
    }
}

/// The sums of side `s` and column `c` are in register `2 s + c`.
///
/// # Safety
///
/// As for [`product`]; there are `SIDES` outputs of `COLUMNS` tiles.
#[inline(always)]
unsafe fn sum<U: TileUnit, const SIDES: usize, const COLUMNS: usize>(
    unit: &mut U,
    left: *const Half,
    right: *const Half,
    runs: &[TileRun],
    strides: Strides,
    outputs: [*mut f32; 2],
    add: bool,
) {
    let left_row = strides.left_row * size_of::<Half>();
    // SAFETY: the caller promises that the tiles lie inside their slices. Rows of right tiles and of sums
    // have no gaps. The pointers end at most one step past the last one.
    unsafe {
        let second = |output: *mut f32| output.add(TILE).cast::<u8>();
        if add {
            unit.load::<0>(outputs[0].cast(), ROW);
            if COLUMNS == 2 {
                unit.load::<1>(second(outputs[0]), ROW);
            }
            if SIDES == 2 {
                unit.load::<2>(outputs[1].cast(), ROW);
            }
            if SIDES == 2 && COLUMNS == 2 {
                unit.load::<3>(second(outputs[1]), ROW);
            }
        } else {
            unit.zero::<0>();
            unit.zero::<1>();
            unit.zero::<2>();
            unit.zero::<3>();
        }
        let mut ahead = right.wrapping_add(strides.ahead);
        for run in runs {
            let (mut left, mut right) = (left.add(run.left), right.add(run.right));
            for _ in 0..run.inner.div_ceil(2 * SIDE) {
                if strides.ahead > 0 {
                    for line in 0..LINES_AHEAD {
                        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line * LINE).cast());
                    }
                    ahead = ahead.wrapping_add(LINES_AHEAD * LINE);
                }
                unit.load::<4>(left.cast(), left_row);
                unit.load::<5>(right.cast(), ROW);
                unit.multiply::<0, 4, 5>();
                if COLUMNS == 2 {
                    unit.load::<5>(right.add(strides.column).cast(), ROW);
                    unit.multiply::<1, 4, 5>();
                }
                if SIDES == 2 {
                    // Register 5 has the last column, so the sides take turns in the order of columns.
                    unit.load::<4>(left.add(strides.apart).cast(), left_row);
                    if COLUMNS == 2 {
                        unit.multiply::<3, 4, 5>();
                        unit.load::<5>(right.cast(), ROW);
                    }
                    unit.multiply::<2, 4, 5>();
                }
                left = left.wrapping_add(strides.left);
                right = right.wrapping_add(strides.right);
            }
        }
        unit.store::<0>(outputs[0].cast(), ROW);
        if COLUMNS == 2 {
            unit.store::<1>(second(outputs[0]), ROW);
        }
        if SIDES == 2 {
            unit.store::<2>(outputs[1].cast(), ROW);
        }
        if SIDES == 2 && COLUMNS == 2 {
            unit.store::<3>(second(outputs[1]), ROW);
        }
    }
}

/// The unit of the processor.
pub(super) struct Real;

impl TileUnit for Real {
    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller promises that the registers are set up and the rows readable.
        unsafe {
            asm!(
                "tileloadd tmm{register}, [{from} + {stride}*1]",
                register = const T, from = in(reg) from, stride = in(reg) stride,
                options(nostack, preserves_flags, readonly)
            );
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the caller promises that the registers are set up and the rows writable.
        unsafe {
            asm!(
                "tilestored [{to} + {stride}*1], tmm{register}",
                register = const T, to = in(reg) to, stride = in(reg) stride,
                options(nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    unsafe fn zero<const T: usize>(&mut self) {
        // SAFETY: the caller promises that the registers are set up.
        unsafe {
            asm!(
                "tilezero tmm{register}",
                register = const T,
                options(nomem, nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller promises that the registers are set up.
        unsafe {
            asm!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C, a = const A, b = const B,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

thread_local! {
    /// The number of open sessions on this thread.
    static OPEN: Cell<usize> = const { Cell::new(0) };
}

/// Sets up the registers of this thread, for its first open session.
pub(super) fn begin() {
    OPEN.set(OPEN.get() + 1);
    if OPEN.get() == 1 {
        // SAFETY: only the variant `Amx` opens sessions here, and it exists only if the processor has the
        // instructions; the configuration is valid for palette 1.
        unsafe {
            asm!(
                "ldtilecfg [{configuration}]",
                configuration = in(reg) &raw const CONFIGURATION,
                options(nostack, preserves_flags, readonly)
            );
        }
    }
}

/// Clears the registers of this thread after its last session, so that the system need not save them.
pub(super) fn end() {
    OPEN.set(OPEN.get() - 1);
    if OPEN.get() == 0 {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// Multiplies registers `times` rounds and returns the number of operations. Only for callers with the
/// variant `Amx`.
pub(crate) fn operations(times: usize) -> f64 {
    begin();
    let mut unit = Real;
    // SAFETY: `begin` has set up the registers of this thread.
    unsafe {
        unit.zero::<0>();
        unit.zero::<1>();
        unit.zero::<2>();
        unit.zero::<3>();
        unit.zero::<4>();
        unit.zero::<5>();
        for _ in 0..times {
            unit.multiply::<0, 4, 5>();
            unit.multiply::<1, 4, 5>();
            unit.multiply::<2, 4, 5>();
            unit.multiply::<3, 4, 5>();
        }
    }
    end();
    (times * 4 * 2 * SIDE * PAIR) as f64
}

/// An emulation of the unit after the manual, at about a thousandth of the speed.
pub(super) struct Emulated {
    registers: [[[u8; 64]; 16]; 8],
}

impl Emulated {
    pub fn new() -> Emulated {
        Emulated { registers: [[[0; 64]; 16]; 8] }
    }
}

/// Rows and bytes per row of a register.
fn extent(register: usize) -> (usize, usize) {
    (usize::from(CONFIGURATION.rows[register]), usize::from(CONFIGURATION.bytes[register]))
}

impl TileUnit for Emulated {
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        let (rows, bytes) = extent(T);
        self.registers[T] = [[0; 64]; 16];
        for (row, to) in self.registers[T].iter_mut().enumerate().take(rows) {
            // SAFETY: the caller promises that these bytes are readable.
            let from = unsafe { std::slice::from_raw_parts(from.add(row * stride), bytes) };
            to[..bytes].copy_from_slice(from);
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        let (rows, bytes) = extent(T);
        for (row, from) in self.registers[T].iter().enumerate().take(rows) {
            // SAFETY: the caller promises that these bytes are writable and not shared.
            let to = unsafe { std::slice::from_raw_parts_mut(to.add(row * stride), bytes) };
            to.copy_from_slice(&from[..bytes]);
        }
    }

    unsafe fn zero<const T: usize>(&mut self) {
        self.registers[T] = [[0; 64]; 16];
    }

    unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
        let [mut sums, a, b] = [C, A, B].map(|register| self.registers[register]);
        assert!(extent(A).1 == 4 * extent(B).0 && extent(B).1 == extent(C).1);
        // SAFETY: `AmxEmulated` exists only if the processor has AVX2 and FMA.
        unsafe { multiply(&mut sums, &a, &b, extent(C).0, extent(B).0) }
        self.registers[C] = sums;
    }
}

type Register = [[u8; 64]; 16];

/// TDPBF16PS: the products of the first numbers of all pairs are added in order, and separately those of
/// the second numbers; then both sums are added, and the result is added to the destination. All
/// additions are fused with their product and round to nearest, ties to even. Denormal inputs and outputs
/// are flushed to zero. Compiled for FMA, so that the fused multiplication is one instruction.
#[target_feature(enable = "avx2,fma")]
fn multiply(sums: &mut Register, a: &Register, b: &Register, rows: usize, pairs: usize) {
    let float = |row: &[u8; 64], at: usize| {
        f32::from_le_bytes([row[4 * at], row[4 * at + 1], row[4 * at + 2], row[4 * at + 3]])
    };
    let half = |row: &[u8; 64], at: usize| {
        flushed(Half(u16::from_le_bytes([row[2 * at], row[2 * at + 1]])).wide())
    };
    for (sums, a) in sums.iter_mut().zip(a).take(rows) {
        let (mut first, mut second) = ([0f32; SIDE], [0f32; SIDE]);
        for (k, b) in b.iter().enumerate().take(pairs) {
            for lane in 0..SIDE {
                first[lane] = flushed(half(a, 2 * k).mul_add(half(b, 2 * lane), first[lane]));
                let factor = half(b, 2 * lane + 1);
                second[lane] = flushed(half(a, 2 * k + 1).mul_add(factor, second[lane]));
            }
        }
        for lane in 0..SIDE {
            let both = flushed(first[lane] + second[lane]);
            let total = flushed(flushed(float(sums, lane)) + both);
            sums[4 * lane..4 * lane + 4].copy_from_slice(&total.to_le_bytes());
        }
    }
}

/// Flushes a denormal number to zero with its sign.
#[inline(always)]
fn flushed(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0f32.copysign(value) } else { value }
}

/// Whether this process may use the unit and its results agree with [`Emulated`]. Checked once; a unit that
/// disagrees is not used, with a warning.
pub(crate) fn usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| {
        let found = present() && permitted();
        if !found {
            return false;
        }
        begin();
        let agrees = agrees(&mut Real);
        end();
        if !agrees {
            tracing::warn!(
                "the AMX unit of this processor computes wrong products; bfloat16 is computed without it"
            );
        }
        agrees
    })
}

/// Whether the processor has tiles of the size used here and products of bfloat16, and the system saves
/// tile registers.
fn present() -> bool {
    // Leaf 7: AMX-BF16 and AMX-TILE. Leaf 1: OSXSAVE, without which XCR0 cannot be read.
    if __cpuid(0).eax < 0x1d || __cpuid(1).ecx & 1 << 27 == 0 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    if features & 1 << 22 == 0 || features & 1 << 24 == 0 {
        return false;
    }
    // SAFETY: the processor reports OSXSAVE.
    let saved = unsafe { xcr0() };
    // Palette 1: bytes of a register, then bytes of a row and registers, then rows.
    let palette = __cpuid_count(0x1d, 1);
    saved & (3 << 17) == 3 << 17
        && palette.eax >> 16 >= 1024
        && palette.ebx & 0xffff >= 64
        && palette.ebx >> 16 >= 8
        && palette.ecx & 0xffff >= 16
}

/// # Safety
///
/// The processor has XSAVE and the system uses it.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: promised by the caller; register 0 always exists.
    unsafe { _xgetbv(0) }
}

/// Requests tile registers for this process from Linux: `arch_prctl(ARCH_REQ_XCOMP_PERM,
/// XFEATURE_XTILEDATA)`, required since Linux 5.16. On other systems this is untested and the unit is not
/// used.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        let answer: isize;
        // SAFETY: the system call (158 on x86-64) accesses no memory of this process; it overwrites rcx and
        // r11.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") 158isize => answer,
                in("rdi") 0x1023, in("rsi") 18,
                out("rcx") _, out("r11") _,
                options(nostack)
            );
        }
        answer == 0
    }
    #[cfg(not(target_os = "linux"))]
    {
        false
    }
}

/// Compares a unit with [`Emulated`]: bit for bit on small integers, where the order of additions does not
/// matter, and within `2⁻²⁰ Σ |a b|` on others.
fn agrees<U: TileUnit>(unit: &mut U) -> bool {
    let runs = [
        TileRun { left: 0, right: 0, inner: 4 * SIDE },
        TileRun { left: 4 * TILE, right: 8 * TILE, inner: 2 * SIDE },
    ];
    [true, false].into_iter().all(|whole| {
        let [left, right] = test_values(whole);
        [(1, 1), (1, 2), (2, 1), (2, 2)].into_iter().all(|(sides, columns)| {
            [false, true].into_iter().all(|add| {
                let wanted = TileProduct {
                    runs: &runs,
                    apart: 2 * TILE,
                    rows: SIDE,
                    columns,
                    add,
                    ahead: 0,
                };
                let [mut got, mut want] = [0; 2].map(|_| [[3f32; 2 * TILE]; 2]);
                // SAFETY: the slices hold 8 and 12 tiles, and the runs with `apart` and two columns use no
                // more; the caller has set up the registers.
                unsafe {
                    let mut outputs = got.each_mut().map(|output| &mut output[..]);
                    product(unit, &left, &right, &wanted, &mut outputs[..sides]);
                    let mut outputs = want.each_mut().map(|output| &mut output[..]);
                    let mut emulated = Emulated::new();
                    product(&mut emulated, &left, &right, &wanted, &mut outputs[..sides]);
                }
                // 96 products of at most 1, added to 3.
                let bound = if whole { 0. } else { 128. * (-20f32).exp2() };
                let pairs = got.as_flattened().iter().zip(want.as_flattened());
                pairs.into_iter().all(|(got, want)| (got - want).abs() <= bound)
            })
        })
    })
}

/// Left and right tiles, of integers from -3 to 3 or of numbers from -1 to 1.
fn test_values(whole: bool) -> [Vec<Half>; 2] {
    let mut state = 1u32;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let small = (state >> 16) % 255;
        let value = if whole { small % 7 } else { small } as f32 - if whole { 3. } else { 127. };
        Half::narrow(if whole { value } else { value / 127. })
    };
    let left = (0..8 * TILE).map(|_| value()).collect();
    let right = (0..12 * TILE).map(|_| value()).collect();
    [left, right]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A faulty unit.
    struct Wrong(Emulated);

    impl TileUnit for Wrong {
        unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
            // SAFETY: promised by the caller.
            unsafe { self.0.load::<T>(from, stride) }
        }
        unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
            // SAFETY: promised by the caller.
            unsafe { self.0.store::<T>(to, stride) }
        }
        unsafe fn zero<const T: usize>(&mut self) {
            // SAFETY: promised by the caller.
            unsafe { self.0.zero::<T>() }
        }
        unsafe fn multiply<const C: usize, const A: usize, const B: usize>(&mut self) {
            // One register in place of another, as with a wrong encoding.
            // SAFETY: promised by the caller.
            unsafe { self.0.multiply::<0, A, B>() }
        }
    }

    #[test]
    fn a_unit_with_wrong_products_is_refused() {
        if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
            assert!(agrees(&mut Emulated::new()));
            assert!(!agrees(&mut Wrong(Emulated::new())));
        }
        // If the processor has the unit, this checks it.
        if !cfg!(miri) {
            assert_eq!(usable(), present() && permitted());
        }
    }

    /// One output number, for a left row and a right column that hold `terms`, added to `start`.
    fn one(start: f32, terms: &[(f32, f32)]) -> f32 {
        let mut left = [Half(0); PAIR];
        let mut right = [Half(0); PAIR];
        for (k, (a, b)) in terms.iter().enumerate() {
            left[k] = Half::narrow(*a);
            right[k / 2 * 2 * SIDE + k % 2] = Half::narrow(*b);
        }
        let runs = [TileRun { left: 0, right: 0, inner: SIDE }];
        let wanted =
            TileProduct { runs: &runs, apart: 0, rows: SIDE, columns: 1, add: true, ahead: 0 };
        let mut output = [0f32; TILE];
        output[0] = start;
        // SAFETY: the slices hold the two tiles of each side, and the one of sums.
        unsafe { product(&mut Emulated::new(), &left, &right, &wanted, &mut [&mut output]) };
        output[0]
    }

    #[test]
    fn sums_are_taken_in_the_order_of_the_instruction() {
        if !is_x86_feature_detected!("fma") || !is_x86_feature_detected!("avx2") {
            return;
        }
        let big = (2f32).powi(24);
        // First and second numbers of pairs are summed separately: 2²⁴ absorbs a 1 (ties to even), but the
        // two 1s of the other sum are already 2.
        assert_eq!(one(0., &[(big, 1.), (1., 1.), (0., 0.), (1., 1.)]), big + 2.);
        assert_eq!(one(0., &[(big, 1.), (0., 0.), (1., 1.), (0., 0.), (1., 1.)]), big);
        // The destination is added last.
        assert_eq!(one(-big, &[(big, 1.), (1., 1.)]), 0.);
        assert_eq!(one(-big, &[(big, 1.), (1., 1.), (0., 0.), (1., 1.)]), 2.);
        // Denormal inputs and outputs are flushed to zero.
        let small = f32::MIN_POSITIVE;
        assert_eq!(one(small / 2., &[(1., 1.)]), 1.);
        assert_eq!(one(small / 2., &[]), 0.);
        assert_eq!(one(0., &[(small / 2., 1024.)]), 0.);
        assert_eq!(one(0., &[(small, 0.5)]), 0.);
        assert_eq!(one(0., &[(small, 1.5), (small, -1.)]), 0.);
        assert_eq!(one(0., &[(small, 1.)]), small);
    }
}
