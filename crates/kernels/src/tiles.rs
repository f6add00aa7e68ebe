//! Products of tiles: the innermost loops of convolutions and linear layers, one per variant.
//!
//! A tile is 16 × 16 numbers, row by row, 1 KiB (see [`crate::Shape`]). All three products of a
//! convolution are sums of tile products: output = Σ input · weights, input gradient =
//! Σ output gradient · weightsᵀ, weight gradient = Σ inputᵀ · output gradient.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "vector intrinsics on tiles addressed from a base pointer")
)]

use crate::Variant;
use crate::layout::{SIDE, TILE};
use crate::number::{Half, Number};
use crate::variant::{Instructions, for_each_variant};

/// One term of a sum: where the tile on the left and the one or two tiles on the right begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    /// Offset of the left tile.
    pub left: usize,
    /// Offset of the first right tile; a second one follows it.
    pub right: usize,
    /// How many of the 16 products along the inner side to add; the others are zero.
    pub depth: usize,
}

/// What to compute of `output = Σ left · right`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    /// Rows of the output tile wanted, at most 16; the kernels compute a few more where that is
    /// cheaper than to stop.
    pub rows: usize,
    /// Output tiles side by side, 1 or 2: 16 or 32 columns.
    pub columns: usize,
    /// Add to what the output holds instead of replacing it.
    pub add: bool,
}

/// `output (+)= Σ left · right`, or with `TRANSPOSED` `Σ leftᵀ · right`, over the pairs in order.
///
/// Each number of the output is one chain of multiply-adds in the order of `pairs` and, inside a
/// pair, of the inner side: cutting the pairs into several calls with `add` changes no bit.
pub(crate) fn product<const TRANSPOSED: bool>(
    variant: Variant,
    left: &[f32],
    right: &[f32],
    pairs: &[Pair],
    output: &mut [f32],
    sum: Sum,
) {
    assert!((1..=2).contains(&sum.columns) && sum.rows <= SIDE);
    assert!(output.len() >= sum.columns * TILE);
    let (last_left, last_right) = (left.len(), right.len());
    for pair in pairs {
        assert!(pair.left + TILE <= last_left && pair.depth <= SIDE);
        assert!(pair.right + sum.columns * TILE <= last_right);
    }
    match variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 | Instructions::Avx512Bf16 => {
            // SAFETY: a `Variant` exists only where its instructions do; every tile lies inside
            // its slice (checked for each pair and for the output above).
            unsafe { x86::avx512::<TRANSPOSED>(left, right, pairs, output, sum) }
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => {
            // SAFETY: as above.
            unsafe { x86::avx2::<TRANSPOSED>(left, right, pairs, output, sum) }
        }
        Instructions::Portable => portable::<TRANSPOSED>(left, right, pairs, output, sum),
    }
}

/// [`product`] of bfloat16 tiles, summed in f32.
///
/// Tiles on the right hold pairs along the inner side next to each other: (inner / 2, column,
/// inner % 2). So do those on the left with `TRANSPOSED`, (inner / 2, row, inner % 2).
pub(crate) fn product_of_halves<const TRANSPOSED: bool>(
    variant: Variant,
    left: &[Half],
    right: &[Half],
    pairs: &[Pair],
    output: &mut [f32],
    sum: Sum,
) {
    assert!((1..=2).contains(&sum.columns) && sum.rows <= SIDE);
    assert!(output.len() >= sum.columns * TILE);
    for pair in pairs {
        assert!(pair.left + TILE <= left.len() && pair.depth <= SIDE);
        assert!(pair.right + sum.columns * TILE <= right.len());
    }
    match variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512Bf16 => {
            // SAFETY: a `Variant` exists only where its instructions do; every tile lies inside
            // its slice (checked for each pair and for the output above).
            unsafe { x86::avx512_bf16::<TRANSPOSED>(left, right, pairs, output, sum) }
        }
        _ => widened(variant, TRANSPOSED, left, right, pairs, output, sum),
    }
}

for_each_variant! {
    fn widened(
        transposed: bool,
        left: &[Half],
        right: &[Half],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    ) {
        for column in 0..sum.columns {
            for row in 0..sum.rows {
                let (first, step) = if transposed { (2 * row, 2 * SIDE) } else { (row * SIDE, 2) };
                let output = &mut output[column * TILE + row * SIDE..][..SIDE];
                let mut total = [0f32; SIDE];
                if sum.add {
                    total.copy_from_slice(output);
                }
                for pair in pairs {
                    let left = &left[pair.left..][..TILE];
                    let right = &right[pair.right + column * TILE..][..TILE];
                    let right = right.chunks_exact(2 * SIDE).take(pair.depth.div_ceil(2));
                    for (k, right) in right.enumerate() {
                        let (even, odd) = (left[first + k * step], left[first + k * step + 1]);
                        let (even, odd) = (even.wide(), odd.wide());
                        for lane in 0..SIDE {
                            total[lane] += even * right[2 * lane].wide();
                            total[lane] += odd * right[2 * lane + 1].wide();
                        }
                    }
                }
                output.copy_from_slice(&total);
            }
        }
    }
}

/// Rows whose sums the baseline's registers hold: 32 of 4 numbers on ARM, 16 elsewhere.
const PORTABLE_ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

fn portable<const TRANSPOSED: bool>(
    left: &[f32],
    right: &[f32],
    pairs: &[Pair],
    output: &mut [f32],
    sum: Sum,
) {
    for column in 0..sum.columns {
        for first in (0..sum.rows).step_by(PORTABLE_ROWS) {
            let output = &mut output[column * TILE + first * SIDE..][..PORTABLE_ROWS * SIDE];
            let mut totals = [[0f32; SIDE]; PORTABLE_ROWS];
            if sum.add {
                totals.as_flattened_mut().copy_from_slice(output);
            }
            for pair in pairs {
                let left = &left[pair.left..][..TILE];
                let right = &right[pair.right + column * TILE..][..TILE];
                for (k, right) in right.chunks_exact(SIDE).take(pair.depth).enumerate() {
                    for (row, totals) in totals.iter_mut().enumerate() {
                        let row = first + row;
                        let factor = left[if TRANSPOSED { k * SIDE + row } else { row * SIDE + k }];
                        for (total, right) in totals.iter_mut().zip(right) {
                            *total = multiply_add(factor, *right, *total);
                        }
                    }
                }
            }
            output.copy_from_slice(totals.as_flattened());
        }
    }
}

/// `a · b + c`, fused where the target always has the instruction (a call to a library otherwise).
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::mem::transmute;

    use super::{Pair, Sum};
    use crate::layout::{SIDE, TILE};
    use crate::number::Half;

    /// # Safety
    ///
    /// The processor has AVX-512; every pair's tiles and the output's lie inside their slices.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512<const TRANSPOSED: bool>(
        left: &[f32],
        right: &[f32],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    ) {
        let (l, r, o) = (left.as_ptr(), right.as_ptr(), output.as_mut_ptr());
        // SAFETY: the caller's promise; the second half begins at row 8 of a tile of 16 rows.
        unsafe {
            match (sum.columns, sum.rows) {
                // A picture has one channel or three: the weight gradient of the first layer.
                (2, ..=4) => avx512_block::<TRANSPOSED, 4, 2>(l, r, pairs, o, 0, sum.add),
                (2, ..=8) => avx512_block::<TRANSPOSED, 8, 2>(l, r, pairs, o, 0, sum.add),
                (2, _) => {
                    avx512_block::<TRANSPOSED, 8, 2>(l, r, pairs, o, 0, sum.add);
                    avx512_block::<TRANSPOSED, 8, 2>(l, r, pairs, o, 8, sum.add);
                }
                (_, ..=8) => avx512_block::<TRANSPOSED, 8, 1>(l, r, pairs, o, 0, sum.add),
                (_, _) => avx512_block::<TRANSPOSED, 16, 1>(l, r, pairs, o, 0, sum.add),
            }
        }
    }

    /// One number of each row on the left times one register of each tile on the right. A macro,
    /// since the sums must stay in registers and functions with instructions of their own are
    /// inlined only when the compiler likes to.
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
                    $sums[row][column] =
                        _mm512_fmadd_ps(value, factors[column], $sums[row][column]);
                }
            }
        }};
    }

    /// `ROWS` × `COLUMNS` registers of 16 sums, from row `first` of the tiles on.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_block<const TRANSPOSED: bool, const ROWS: usize, const COLUMNS: usize>(
        left: *const f32,
        right: *const f32,
        pairs: &[Pair],
        output: *mut f32,
        first: usize,
        add: bool,
    ) {
        // SAFETY: the caller promises that the tiles lie inside their slices; `first + ROWS`, `k`
        // and `COLUMNS` stay inside a tile's 16 rows, 16 columns and the tiles side by side.
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
            for pair in pairs {
                let (left, right) = (left.add(pair.left), right.add(pair.right));
                // Sixteen written out, so that every address is a constant from two pointers.
                if pair.depth == SIDE {
                    for k in 0..SIDE {
                        avx512_step!(TRANSPOSED, sums, left, right, k);
                    }
                } else {
                    for k in 0..pair.depth {
                        avx512_step!(TRANSPOSED, sums, left, right, k);
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
    /// The processor has AVX-512 with BF16; every pair's tiles and the output's lie inside their
    /// slices.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512_bf16<const TRANSPOSED: bool>(
        left: &[Half],
        right: &[Half],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    ) {
        let (l, r, o) = (left.as_ptr(), right.as_ptr(), output.as_mut_ptr());
        // SAFETY: the caller's promise; the second half begins at row 8 of a tile of 16 rows.
        unsafe {
            match (sum.columns, sum.rows) {
                // A picture has one channel or three: the weight gradient of the first layer.
                (2, ..=4) => bf16_block::<TRANSPOSED, 4, 2>(l, r, pairs, o, 0, sum.add),
                (2, ..=8) => bf16_block::<TRANSPOSED, 8, 2>(l, r, pairs, o, 0, sum.add),
                (2, _) => {
                    bf16_block::<TRANSPOSED, 8, 2>(l, r, pairs, o, 0, sum.add);
                    bf16_block::<TRANSPOSED, 8, 2>(l, r, pairs, o, 8, sum.add);
                }
                (_, ..=8) => bf16_block::<TRANSPOSED, 8, 1>(l, r, pairs, o, 0, sum.add),
                (_, _) => bf16_block::<TRANSPOSED, 16, 1>(l, r, pairs, o, 0, sum.add),
            }
        }
    }

    /// As [`avx512_block`], two products along the inner side at a time.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn bf16_block<const TRANSPOSED: bool, const ROWS: usize, const COLUMNS: usize>(
        left: *const Half,
        right: *const Half,
        pairs: &[Pair],
        output: *mut f32,
        first: usize,
        add: bool,
    ) {
        // SAFETY: the caller promises that the tiles lie inside their slices; `first + ROWS`, the
        // 8 pairs along the inner side and `COLUMNS` stay inside a tile's 16 rows, 16 columns and
        // the tiles side by side. `__m512bh` is 512 bits of any content.
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
            for pair in pairs {
                let left = left.add(pair.left).cast::<i32>();
                let right = right.add(pair.right).cast::<i32>();
                for k in 0..pair.depth.div_ceil(2) {
                    let mut factors = [_mm512_setzero_si512(); COLUMNS];
                    for (column, factor) in factors.iter_mut().enumerate() {
                        *factor =
                            _mm512_loadu_si512(right.add(column * TILE / 2 + k * SIDE).cast());
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let at = if TRANSPOSED { k * SIDE + row } else { row * SIDE / 2 + k };
                        let value: __m512bh =
                            transmute(_mm512_set1_epi32(left.add(at).read_unaligned()));
                        for (sum, factor) in sums.iter_mut().zip(factors) {
                            *sum = _mm512_dpbf16_ps(
                                *sum,
                                value,
                                transmute::<__m512i, __m512bh>(factor),
                            );
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
    /// The processor has AVX2 and FMA; every pair's tiles and the output's lie inside their slices.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<const TRANSPOSED: bool>(
        left: &[f32],
        right: &[f32],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    ) {
        for column in 0..sum.columns {
            for first in (0..sum.rows).step_by(4) {
                // SAFETY: the caller's promise; `first` is 0, 4, 8 or 12 of 16 rows.
                unsafe {
                    let (l, r) = (left.as_ptr(), right.as_ptr().add(column * TILE));
                    let o = output.as_mut_ptr().add(column * TILE);
                    avx2_block::<TRANSPOSED>(l, r, pairs, o, first, sum.add);
                }
            }
        }
    }

    /// 4 rows × 16 columns in 8 registers, from row `first` of the tiles on.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_block<const TRANSPOSED: bool>(
        left: *const f32,
        right: *const f32,
        pairs: &[Pair],
        output: *mut f32,
        first: usize,
        add: bool,
    ) {
        // SAFETY: the caller promises that the tiles lie inside their slices; rows `first..first +
        // 4`, `k` and both halves of 8 columns stay inside a tile.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; 4];
            if add {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (half, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_loadu_ps(output.add((first + row) * SIDE + half * 8));
                    }
                }
            }
            let left = left.add(if TRANSPOSED { first } else { first * SIDE });
            for pair in pairs {
                let (left, right) = (left.add(pair.left), right.add(pair.right));
                for k in 0..pair.depth {
                    let low = _mm256_loadu_ps(right.add(k * SIDE));
                    let high = _mm256_loadu_ps(right.add(k * SIDE + 8));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let at = if TRANSPOSED { k * SIDE + row } else { row * SIDE + k };
                        let value = _mm256_set1_ps(*left.add(at));
                        sums[0] = _mm256_fmadd_ps(value, low, sums[0]);
                        sums[1] = _mm256_fmadd_ps(value, high, sums[1]);
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for (half, sum) in sums.iter().enumerate() {
                    _mm256_storeu_ps(output.add((first + row) * SIDE + half * 8), *sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<f32> {
        let mut state = 12_345u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608. - 1.
        };
        (0..len).map(|_| next()).collect()
    }

    /// Σ left · right in f64, or Σ leftᵀ · right, added to what is there or not.
    fn plain(transposed: bool, data: [&[f32]; 3], pairs: &[Pair], sum: Sum) -> Vec<f64> {
        let [left, right, output] = data;
        let mut result: Vec<f64> = output.iter().map(|x| f64::from(*x)).collect();
        for (at, result) in result.iter_mut().enumerate().take(sum.columns * TILE) {
            let (column, row, lane) = (at / TILE, at % TILE / SIDE, at % SIDE);
            let mut total = if sum.add { *result } else { 0. };
            for pair in pairs {
                for k in 0..pair.depth {
                    let at = if transposed { k * SIDE + row } else { row * SIDE + k };
                    let right = right[pair.right + column * TILE + k * SIDE + lane];
                    total += f64::from(left[pair.left + at]) * f64::from(right);
                }
            }
            *result = total;
        }
        result
    }

    #[test]
    fn every_variant_computes_the_sum_of_products() {
        let (left, right, before) = (noise(5 * TILE), noise(6 * TILE), noise(2 * TILE));
        let pairs = [(0, 2, 16), (3, 0, 16), (4, 3, 5), (1, 4, 1)].map(|(l, r, depth)| Pair {
            left: l * TILE,
            right: r * TILE,
            depth,
        });
        for variant in Variant::available() {
            for (rows, columns, add) in
                [(16, 2, false), (16, 2, true), (16, 1, false), (3, 2, true), (8, 1, true)]
            {
                let sum = Sum { rows, columns, add };
                let data: [&[f32]; 3] = [&left, &right, &before];
                let (mut direct, mut turned) = (before.clone(), before.clone());
                product::<false>(variant, &left, &right, &pairs, &mut direct, sum);
                product::<true>(variant, &left, &right, &pairs, &mut turned, sum);
                for (got, transposed) in [(direct, false), (turned, true)] {
                    let want = plain(transposed, data, &pairs, sum);
                    for at in (0..columns * TILE).filter(|at| at % TILE < rows * SIDE) {
                        // 38 terms of at most 1, each rounded once or twice.
                        let off = (f64::from(got[at]) - want[at]).abs();
                        assert!(off < 1e-5, "{variant} {sum:?} {transposed} at {at}: {off}");
                    }
                }
            }
        }
    }

    #[test]
    fn cutting_a_sum_into_calls_changes_no_bit() {
        let (left, right) = (noise(4 * TILE), noise(5 * TILE));
        let pairs = [0, 1, 2, 3].map(|i| Pair { left: i * TILE, right: i * TILE, depth: 16 });
        for variant in Variant::available() {
            let (mut whole, mut cut) = (vec![0.; 2 * TILE], vec![0.; 2 * TILE]);
            let sum = Sum { rows: 16, columns: 2, add: false };
            product::<false>(variant, &left, &right, &pairs, &mut whole, sum);
            product::<false>(variant, &left, &right, &pairs[..1], &mut cut, sum);
            let add = Sum { add: true, ..sum };
            product::<false>(variant, &left, &right, &pairs[1..], &mut cut, add);
            assert!(whole.iter().zip(&cut).all(|(a, b)| a.to_bits() == b.to_bits()), "{variant}");
        }
    }
}
