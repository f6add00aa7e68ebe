//! Tile products with AVX2, AVX-512, and AVX-512 with bfloat16 products.
//!
//! The sums of a block of rows and columns stay in registers over all terms. Each step loads one
//! register per right column and multiplies it with one number of each left row. 8 rows × 2 columns keep
//! 16 sums in flight, twice what two multipliers with a latency of 4 cycles need, with 10 loads for 16
//! products.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::{TileProduct, TileRun};
use crate::element::{Half, ValueElement};
use crate::layout::{SIDE, TILE};

/// Numbers in a line of the cache.
const LINE: usize = 16;

/// # Safety
///
/// The processor has AVX-512; every tile lies inside its slice.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512<const TRANSPOSED: bool>(
    left: &[f32],
    right: &[f32],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    for (side, output) in outputs.iter_mut().enumerate() {
        let (r, o) = (right.as_ptr(), output.as_mut_ptr());
        // SAFETY: promised by the caller; the second half begins at row 8 of 16.
        unsafe {
            let l = left.as_ptr().add(side * product.apart);
            let TileProduct { runs, add, .. } = *product;
            match (product.columns, product.rows) {
                // An image has one or three channels: the weight gradient of the first layer.
                (2, ..=4) => avx512_block::<TRANSPOSED, 4, 2>(l, r, runs, o, 0, add),
                (2, ..=8) => avx512_block::<TRANSPOSED, 8, 2>(l, r, runs, o, 0, add),
                (2, _) => {
                    avx512_block::<TRANSPOSED, 8, 2>(l, r, runs, o, 0, add);
                    avx512_block::<TRANSPOSED, 8, 2>(l, r, runs, o, 8, add);
                }
                (_, ..=8) => avx512_block::<TRANSPOSED, 8, 1>(l, r, runs, o, 0, add),
                (_, _) => avx512_block::<TRANSPOSED, 16, 1>(l, r, runs, o, 0, add),
            }
        }
    }
}

/// Multiplies one number of each left row with one register of each right tile. A macro, since the sums
/// must stay in registers and the compiler need not inline functions with target features.
macro_rules! avx512_step {
    ($transposed:expr, $sums:ident, $left:ident, $right:ident, $k:expr) => {{
        let mut factors = [_mm512_setzero_ps(); COLUMNS];
        for column in 0..COLUMNS {
            factors[column] = _mm512_loadu_ps($right.add(column * TILE + $k * SIDE));
        }
        for row in 0..ROWS {
            let at = if $transposed { $k * SIDE + row } else { row * SIDE + $k };
            let value = _mm512_set1_ps(*$left.add(at));
            for column in 0..COLUMNS {
                $sums[row][column] = _mm512_fmadd_ps(value, factors[column], $sums[row][column]);
            }
        }
    }};
}

/// Computes `ROWS` × `COLUMNS` registers of 16 sums, from row `first` of the tiles.
#[target_feature(enable = "avx512f")]
unsafe fn avx512_block<const TRANSPOSED: bool, const ROWS: usize, const COLUMNS: usize>(
    left: *const f32,
    right: *const f32,
    runs: &[TileRun],
    output: *mut f32,
    first: usize,
    add: bool,
) {
    // SAFETY: the caller promises that the tiles lie inside their slices; `first + ROWS`, `k` and
    // `COLUMNS` stay inside the 16 rows and 16 columns of a tile and the adjacent tiles. The pointers end
    // at most one tile past the last one.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); COLUMNS]; ROWS];
        if add {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (column, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(output.add(column * TILE + (first + row) * SIDE));
                }
            }
        }
        let left = left.add(if TRANSPOSED { first } else { first * SIDE });
        for run in runs {
            let (mut left, mut right) = (left.add(run.left), right.add(run.right));
            // 16 unrolled steps, so that every address has a constant offset from two pointers.
            for _ in 0..run.inner / SIDE {
                for k in 0..SIDE {
                    avx512_step!(TRANSPOSED, sums, left, right, k);
                }
                left = left.wrapping_add(TILE);
                right = right.wrapping_add(COLUMNS * TILE);
            }
            match run.inner % SIDE {
                // An image of three channels.
                3 => {
                    for k in 0..3 {
                        avx512_step!(TRANSPOSED, sums, left, right, k);
                    }
                }
                count => {
                    for k in 0..count {
                        avx512_step!(TRANSPOSED, sums, left, right, k);
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (column, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(output.add(column * TILE + (first + row) * SIDE), *sum);
            }
        }
    }
}

/// # Safety
///
/// The processor has AVX-512 with BF16; every tile lies inside its slice.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn avx512_bf16<const TRANSPOSED: bool>(
    left: &[Half],
    right: &[Half],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    for (side, output) in outputs.iter_mut().enumerate() {
        let (r, o) = (right.as_ptr(), output.as_mut_ptr());
        // SAFETY: promised by the caller; the second half begins at row 8 of 16.
        unsafe {
            let l = left.as_ptr().add(side * product.apart);
            let TileProduct { runs, add, .. } = *product;
            match (product.columns, product.rows) {
                // An image has one or three channels: the weight gradient of the first layer.
                (2, ..=4) => bf16_block::<TRANSPOSED, 4, 2>(l, r, runs, o, 0, add),
                (2, ..=8) => bf16_block::<TRANSPOSED, 8, 2>(l, r, runs, o, 0, add),
                (2, _) => {
                    bf16_block::<TRANSPOSED, 8, 2>(l, r, runs, o, 0, add);
                    bf16_block::<TRANSPOSED, 8, 2>(l, r, runs, o, 8, add);
                }
                (_, ..=8) => bf16_block::<TRANSPOSED, 8, 1>(l, r, runs, o, 0, add),
                (_, _) => bf16_block::<TRANSPOSED, 16, 1>(l, r, runs, o, 0, add),
            }
        }
    }
}

/// Like [`avx512_step`], with two products along the inner side at a time.
macro_rules! bf16_step {
    ($transposed:expr, $sums:ident, $left:ident, $right:ident, $k:expr) => {{
        let mut factors = [_mm512_setzero_si512(); COLUMNS];
        for column in 0..COLUMNS {
            let at = column * TILE / 2 + $k * SIDE;
            factors[column] = _mm512_loadu_si512($right.add(at).cast());
        }
        for row in 0..ROWS {
            let at = if $transposed { $k * SIDE + row } else { row * SIDE / 2 + $k };
            let value = _mm512_set1_epi32($left.add(at).read_unaligned());
            for column in 0..COLUMNS {
                $sums[row][column] = _mm512_dpbf16_ps(
                    $sums[row][column],
                    transmute::<__m512i, __m512bh>(value),
                    transmute::<__m512i, __m512bh>(factors[column]),
                );
            }
        }
    }};
}

/// Like [`avx512_block`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn bf16_block<const TRANSPOSED: bool, const ROWS: usize, const COLUMNS: usize>(
    left: *const Half,
    right: *const Half,
    runs: &[TileRun],
    output: *mut f32,
    first: usize,
    add: bool,
) {
    // SAFETY: the caller promises that the tiles lie inside their slices; `first + ROWS`, the 8 pairs
    // along the inner side and `COLUMNS` stay inside the 16 rows and 16 columns of a tile and the adjacent
    // tiles. Any 512 bits are a valid `__m512bh`. The pointers end at most one tile past the last one.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); COLUMNS]; ROWS];
        if add {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (column, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(output.add(column * TILE + (first + row) * SIDE));
                }
            }
        }
        let left = left.add(if TRANSPOSED { 2 * first } else { first * SIDE });
        for run in runs {
            let mut left = left.add(run.left).cast::<i32>();
            let mut right = right.add(run.right).cast::<i32>();
            for _ in 0..run.inner / SIDE {
                for k in 0..SIDE / 2 {
                    bf16_step!(TRANSPOSED, sums, left, right, k);
                }
                left = left.wrapping_add(TILE / 2);
                right = right.wrapping_add(COLUMNS * TILE / 2);
            }
            match (run.inner % SIDE).div_ceil(2) {
                // An image of three channels.
                2 => {
                    bf16_step!(TRANSPOSED, sums, left, right, 0);
                    bf16_step!(TRANSPOSED, sums, left, right, 1);
                }
                count => {
                    for k in 0..count {
                        bf16_step!(TRANSPOSED, sums, left, right, k);
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (column, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(output.add(column * TILE + (first + row) * SIDE), *sum);
            }
        }
    }
}

/// # Safety
///
/// The processor has AVX2 and FMA; every tile lies inside its slice.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<const TRANSPOSED: bool>(
    left: &[f32],
    right: &[f32],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    let mut ahead = right.as_ptr().wrapping_add(product.ahead);
    for (side, output) in outputs.iter_mut().enumerate() {
        for column in 0..product.columns {
            // SAFETY: promised by the caller; the blocks are rows of 16.
            unsafe {
                let l = left.as_ptr().add(side * product.apart);
                let r = right.as_ptr().add(column * TILE);
                let o = output.as_mut_ptr().add(column * TILE);
                if product.rows <= 4 {
                    ahead = avx2_block::<TRANSPOSED, 4>(l, r, product, o, 0, ahead);
                    continue;
                }
                ahead = avx2_block::<TRANSPOSED, 6>(l, r, product, o, 0, ahead);
                if product.rows > 6 {
                    ahead = avx2_block::<TRANSPOSED, 6>(l, r, product, o, 6, ahead);
                }
                if product.rows > 12 {
                    ahead = avx2_block::<TRANSPOSED, 4>(l, r, product, o, 12, ahead);
                }
            }
        }
    }
}

/// Like [`avx512_step`], with two registers of 8 columns.
macro_rules! avx2_step {
    ($transposed:expr, $sums:ident, $left:ident, $right:ident, $k:expr) => {{
        let low = _mm256_loadu_ps($right.add($k * SIDE));
        let high = _mm256_loadu_ps($right.add($k * SIDE + 8));
        for row in 0..ROWS {
            let at = if $transposed { $k * SIDE + row } else { row * SIDE + $k };
            let value = _mm256_set1_ps(*$left.add(at));
            $sums[row][0] = _mm256_fmadd_ps(value, low, $sums[row][0]);
            $sums[row][1] = _mm256_fmadd_ps(value, high, $sums[row][1]);
        }
    }};
}

/// Computes `ROWS` rows × 16 columns from row `first` of the tiles. 6 rows keep 12 sums in flight, enough
/// for two multipliers with a latency of 4 or 5 cycles; the factors need 3 of the 16 registers. Fetches a line
/// from `ahead` with each tile, and returns where it got to: weights that come from the third-level cache
/// or from memory cost a sixth of the time of a transformer otherwise.
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_block<const TRANSPOSED: bool, const ROWS: usize>(
    left: *const f32,
    right: *const f32,
    product: &TileProduct,
    output: *mut f32,
    first: usize,
    mut ahead: *const f32,
) -> *const f32 {
    // SAFETY: the caller promises that the tiles lie inside their slices; `first + ROWS`, `k` and both
    // halves of 8 columns stay inside a tile. The pointers end at most one tile past the last one.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
        if product.add {
            for (row, sums) in sums.iter_mut().enumerate() {
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(output.add((first + row) * SIDE + half * 8));
                }
            }
        }
        let left = left.add(if TRANSPOSED { first } else { first * SIDE });
        for run in product.runs {
            let (mut left, mut right) = (left.add(run.left), right.add(run.right));
            for _ in 0..run.inner / SIDE {
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                ahead = ahead.wrapping_add(LINE);
                for k in 0..SIDE {
                    avx2_step!(TRANSPOSED, sums, left, right, k);
                }
                left = left.wrapping_add(TILE);
                right = right.wrapping_add(product.columns * TILE);
            }
            for k in 0..run.inner % SIDE {
                avx2_step!(TRANSPOSED, sums, left, right, k);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(output.add((first + row) * SIDE + half * 8), *sum);
            }
        }
    }
    ahead
}

/// See [`super::widen_pairs`]. A pair is one word: its lower half, shifted up, and its upper half are the two
/// numbers in f32.
#[target_feature(enable = "avx2")]
pub(super) fn widen_pairs(from: &[Half], to: &mut [f32]) {
    let upper = _mm256_set1_epi32(-0x1_0000);
    for (from, to) in from.chunks_exact(2 * SIDE).zip(to.chunks_exact_mut(2 * SIDE)) {
        let (from, to) = (from.as_ptr().cast::<__m256i>(), to.as_mut_ptr().cast::<__m256i>());
        for half in 0..2 {
            // SAFETY: 32 pairs of bytes are two registers, and 32 floats are four.
            unsafe {
                let pairs = _mm256_loadu_si256(from.add(half));
                _mm256_storeu_si256(to.add(half), _mm256_slli_epi32::<16>(pairs));
                _mm256_storeu_si256(to.add(2 + half), _mm256_and_si256(pairs, upper));
            }
        }
    }
}

/// See [`super::round`]. The instruction rounds as [`Half::narrow`] does, but makes denormal numbers zero.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn round(sums: &[f32], output: &mut [Half]) {
    let (whole, rest) = sums.as_chunks::<SIDE>();
    let (rounded, others) = output.as_chunks_mut::<SIDE>();
    for (sums, output) in whole.iter().zip(rounded) {
        // SAFETY: 16 floats are a register, and 16 halves are half of one; any bits are valid for both.
        unsafe {
            let halves = _mm512_cvtneps_pbh(_mm512_loadu_ps(sums.as_ptr()));
            _mm256_storeu_si256(output.as_mut_ptr().cast(), transmute::<__m256bh, __m256i>(halves));
        }
    }
    for (sum, output) in rest.iter().zip(others) {
        *output = Half::narrow(*sum);
    }
}
