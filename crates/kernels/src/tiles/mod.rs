//! Products of tiles: the innermost loops of convolutions and linear layers, one for each variant.
//!
//! A tile is 16 × 16 numbers, row by row (see [`crate::Shape`]). All three products of a
//! convolution are sums of tile products: output = Σ input · weights, input gradient =
//! Σ output gradient · weightsᵀ, weight gradient = Σ inputᵀ · output gradient.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "vector intrinsics on tiles addressed from a base pointer")
)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::{operations as amx_operations, usable as amx_is_usable};

use std::cell::RefCell;
use std::marker::PhantomData;

use crate::element::{Half, ValueElement};
use crate::layout::{SIDE, TILE};
use crate::variant::{Instructions, for_each_variant};
use crate::{Buffer, Precision, Variant};

/// Consecutive terms of a sum, whose tiles are contiguous on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileRun {
    /// Offset of the first left tile; the others follow.
    pub left: usize,
    /// Offset of the first right tile. Each term has [`TileProduct::columns`] of them.
    pub right: usize,
    /// Length of the inner side, at least 1: 16 per tile, fewer in the last.
    pub inner: usize,
}

impl TileRun {
    fn tiles(&self) -> usize {
        self.inner.div_ceil(SIDE)
    }
}

/// A sum of tile products, `output = Σ left · right`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileProduct<'a> {
    /// The terms, added in order.
    pub runs: &'a [TileRun],
    /// Distance from each left tile to that of the second output.
    pub apart: usize,
    /// Rows of the output tile to compute, at most 16; a kernel may compute more where that is cheaper.
    pub rows: usize,
    /// Output tiles next to each other, 1 or 2: 16 or 32 columns.
    pub columns: usize,
    /// Whether to add to the outputs instead of replacing them.
    pub add: bool,
    /// Where right tiles begin that a later product will read: they may be fetched into the cache meanwhile.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "the portable form fetches nothing")
    )]
    pub ahead: usize,
}

impl TileProduct<'_> {
    /// # Panics
    ///
    /// If a tile exceeds its slice, or a count is out of range. `paired`: of tiles that are [paired](TileOrder).
    fn check(&self, left: usize, right: usize, paired: bool, outputs: &[&mut [f32]]) {
        assert!((1..=2).contains(&self.columns) && self.rows <= SIDE);
        assert!((1..=2).contains(&outputs.len()));
        assert!(outputs.iter().all(|output| output.len() >= self.columns * TILE));
        let apart = self.apart * (outputs.len() - 1);
        for run in self.runs {
            let len = TileOrder { paired }.inner_tiles(run.tiles()) * TILE;
            assert!(run.left + apart + len <= left && run.right + self.columns * len <= right);
        }
    }
}

/// The order of the tiles of a product along its inner side.
///
/// Left tiles follow one another, and so do right ones, where each term has as many as there are columns. A tile
/// unit takes two terms at once. So its tiles are *paired*: two left tiles lie side by side, 16 rows of 32 numbers, and
/// two right tiles of one column one after the other. Their count is even; the second one of the last pair may
/// be zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TileOrder {
    paired: bool,
}

impl TileOrder {
    /// The order that products of this variant and precision take.
    pub fn of(variant: Variant, precision: Precision) -> TileOrder {
        TileOrder { paired: precision == Precision::Bf16 && variant.has_tile_unit() }
    }

    pub fn is_paired(self) -> bool {
        self.paired
    }

    /// The number of tiles along an inner side of `tiles`, those of zeros included.
    pub fn inner_tiles(self, tiles: usize) -> usize {
        if self.paired { tiles.next_multiple_of(2) } else { tiles }
    }

    /// The place of a right tile among those of its product, in tiles: the one of term `inner` in one of
    /// `columns` columns.
    pub fn place(self, inner: usize, column: usize, columns: usize) -> usize {
        if self.paired {
            inner / 2 * 2 * columns + 2 * column + inner % 2
        } else {
            inner * columns + column
        }
    }
}

/// Copies left tiles to paired ones, for as many groups of `inner` tiles as there are.
pub(crate) fn pair_left<T: ValueElement>(variant: Variant, inner: usize, from: &[T], to: &mut [T]) {
    let padded = inner.next_multiple_of(2) * TILE;
    for (from, to) in from.chunks_exact(inner * TILE).zip(to.chunks_exact_mut(padded)) {
        pair_tiles(variant, from, to);
    }
}

for_each_variant! {
    fn pair_tiles<T: ValueElement>(from: &[T], to: &mut [T]) {
        for (from, to) in from.chunks(2 * TILE).zip(to.chunks_exact_mut(2 * TILE)) {
            let (first, second) = from.split_at(TILE);
            let second = if second.is_empty() { &T::zeros()[..] } else { second };
            let tiles = first.chunks_exact(SIDE).zip(second.chunks_exact(SIDE));
            for ((first, second), to) in tiles.zip(to.chunks_exact_mut(2 * SIDE)) {
                to[..SIDE].copy_from_slice(first);
                to[SIDE..].copy_from_slice(second);
            }
        }
    }
}

/// A sum of products, `output = Σ left · right`, for a tile unit, whose left side lies in rows that are longer than a tile.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StripProduct<'a> {
    /// The terms, added in order. Their lengths are multiples of 32. The right tiles of one column follow one another.
    pub runs: &'a [TileRun],
    /// Numbers in each row of the left side.
    pub left_row: usize,
    /// Distance from the left numbers to those of the second output.
    pub apart: usize,
    /// Distance from a column of right tiles to the next.
    pub column: usize,
    /// Output tiles next to each other, 1 or 2.
    pub columns: usize,
    /// Whether to add to the outputs instead of replacing them.
    pub add: bool,
}

impl StripProduct<'_> {
    /// # Panics
    ///
    /// If a tile exceeds its slice, or a count is out of range.
    fn check(&self, left: usize, right: usize, outputs: &[&mut [f32]]) {
        assert!((1..=2).contains(&self.columns) && (1..=2).contains(&outputs.len()));
        assert!(outputs.iter().all(|output| output.len() >= self.columns * TILE));
        let last_row = (outputs.len() - 1) * self.apart + (SIDE - 1) * self.left_row;
        let last_column = (self.columns - 1) * self.column;
        for run in self.runs {
            assert!(run.inner.is_multiple_of(2 * SIDE));
            assert!(run.left + last_row + run.inner <= left);
            assert!(run.right + last_column + run.tiles() * TILE <= right);
        }
    }
}

/// `outputs (+)= Σ left · right`, with the tile unit of the session's variant. Right tiles hold pairs along the inner side:
/// (inner / 2, column, inner % 2).
///
/// # Panics
///
/// If the variant has no tile unit, or a tile lies outside its slice.
pub(crate) fn product_of_strips(
    session: &TileSession,
    left: &[Half],
    right: &[Half],
    product: &StripProduct,
    outputs: &mut [&mut [f32]],
) {
    product.check(left.len(), right.len(), outputs);
    match session.variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Amx => {
            // SAFETY: the session has set up this thread's tile registers; every tile lies inside
            // its slice (checked above).
            unsafe { amx::product_of_strips(&mut amx::Real, left, right, product, outputs) }
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::AmxEmulated => {
            let mut unit = amx::Emulated::new();
            // SAFETY: every tile lies inside its slice (checked above).
            unsafe { amx::product_of_strips(&mut unit, left, right, product, outputs) }
        }
        _ => unreachable!("{} has no tile unit", session.variant),
    }
}

/// Permission to multiply tiles on this thread, one per task. With AMX, it sets up the tile registers and
/// clears them when dropped, so it cannot leave its thread.
pub(crate) struct TileSession {
    variant: Variant,
    sums: RefCell<[TwoTiles; 2]>,
    not_send: PhantomData<*const ()>,
}

/// The sums of two tiles, aligned to a cache line.
#[repr(align(64))]
struct TwoTiles([f32; 2 * TILE]);

impl TileSession {
    pub fn begin(variant: Variant) -> TileSession {
        #[cfg(target_arch = "x86_64")]
        if variant.instructions() == Instructions::Amx {
            amx::begin();
        }
        let sums = RefCell::new([0; 2].map(|_| TwoTiles([0.; 2 * TILE])));
        TileSession { variant, sums, not_send: PhantomData }
    }

    /// Calls `work` with memory for the sums of one or two outputs, with arbitrary contents.
    pub fn with_sums<R>(&self, work: impl FnOnce(&mut [f32], &mut [f32]) -> R) -> R {
        let [sums, others] = &mut *self.sums.borrow_mut();
        work(&mut sums.0, &mut others.0)
    }

    pub fn variant(&self) -> Variant {
        self.variant
    }
}

impl Drop for TileSession {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.variant.instructions() == Instructions::Amx {
            amx::end();
        }
    }
}

/// `output (+)= Σ left · right`, or `Σ leftᵀ · right` with `TRANSPOSED`, over the terms in order. A second
/// output receives the same sum with every left tile shifted by [`apart`](TileProduct::apart).
///
/// Each output number is one chain of multiply-adds, in the order of the terms and of the inner side. So
/// splitting the terms into several calls with `add` changes no bit.
pub(crate) fn product<const TRANSPOSED: bool>(
    session: &TileSession,
    left: &[f32],
    right: &[f32],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    product.check(left.len(), right.len(), false, outputs);
    match session.variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx => {
            // SAFETY: a `Variant` exists only if the processor has its instructions; every tile lies inside
            // its slice (checked above).
            unsafe { x86::avx512::<TRANSPOSED>(left, right, product, outputs) }
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 | Instructions::AmxEmulated => {
            // SAFETY: as above.
            unsafe { x86::avx2::<TRANSPOSED>(left, right, product, outputs) }
        }
        Instructions::Portable => {
            for (side, output) in outputs.iter_mut().enumerate() {
                portable::<TRANSPOSED>(left, right, product, side * product.apart, output);
            }
        }
    }
}

/// [`product`] of bfloat16 tiles, summed in f32.
///
/// Right tiles hold pairs along the inner side: (inner / 2, column, inner % 2). So do left tiles with
/// `TRANSPOSED`, (inner / 2, row, inner % 2). A tile unit takes [paired](TileOrder) tiles, and none transposed.
pub(crate) fn product_of_halves<const TRANSPOSED: bool>(
    session: &TileSession,
    left: &[Half],
    right: &[Half],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    let paired = session.variant.has_tile_unit();
    assert!(!(TRANSPOSED && paired), "a tile unit takes no transposed tiles");
    product.check(left.len(), right.len(), paired, outputs);
    match session.variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Amx => {
            // SAFETY: the session has set up this thread's tile registers; every tile lies inside
            // its slice (checked above).
            unsafe { amx::product(&mut amx::Real, left, right, product, outputs) }
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::AmxEmulated => {
            // SAFETY: every tile lies inside its slice (checked above).
            unsafe { amx::product(&mut amx::Emulated::new(), left, right, product, outputs) }
        }
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512Bf16 => {
            // SAFETY: a `Variant` exists only if the processor has its instructions; every tile lies inside
            // its slice (checked above).
            unsafe { x86::avx512_bf16::<TRANSPOSED>(left, right, product, outputs) }
        }
        _ => widened::<TRANSPOSED>(session, left, right, product, outputs),
    }
}

/// Whether products of f32 tiles are faster with transposed left tiles, where many of them read the same left
/// tiles. AVX2 loads six left numbers for each term. By rows they lie 64 bytes apart and cannot be loaded two at
/// a time; transposed they are neighbours.
pub(crate) fn prefers_left_transposed(variant: Variant) -> bool {
    match variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => true,
        _ => false,
    }
}

/// Tiles of a run that are widened at a time: 16 KiB of both sides stay in the first-level cache.
const WIDENED: usize = 4;

/// [`product_of_halves`] without instructions for it. Products of bfloat16 are exact in f32, so it widens a
/// few tiles at a time and multiplies those.
fn widened<const TRANSPOSED: bool>(
    session: &TileSession,
    left: &[Half],
    right: &[Half],
    product: &TileProduct,
    outputs: &mut [&mut [f32]],
) {
    thread_local! {
        static MEMORY: RefCell<Buffer> = RefCell::new(Buffer::zeros(4 * WIDENED * TILE));
    }
    let (variant, columns) = (session.variant, product.columns);
    MEMORY.with_borrow_mut(|memory| {
        let (wide_left, wide_right) = memory.split_at_mut(2 * WIDENED * TILE);
        let mut add = product.add;
        for run in product.runs {
            for first in (0..run.tiles()).step_by(WIDENED) {
                let inner = (run.inner - first * SIDE).min(WIDENED * SIDE);
                let len = inner.div_ceil(SIDE) * TILE;
                let sides = wide_left.chunks_exact_mut(WIDENED * TILE).take(outputs.len());
                for (side, to) in sides.enumerate() {
                    let from = &left[run.left + first * TILE + side * product.apart..][..len];
                    if TRANSPOSED {
                        widen_pairs(variant, from, to);
                    } else {
                        widen(variant, from, to);
                    }
                }
                let from = &right[run.right + columns * first * TILE..][..columns * len];
                widen_pairs(variant, from, wide_right);
                let runs = [TileRun { left: 0, right: 0, inner }];
                let part =
                    TileProduct { runs: &runs, apart: WIDENED * TILE, add, ahead: 0, ..*product };
                self::product::<TRANSPOSED>(session, wide_left, wide_right, &part, outputs);
                add = true;
            }
        }
    });
}

for_each_variant! {
    pub(crate) fn widen(from: &[Half], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.wide();
        }
    }
}

/// Rounds sums to bfloat16.
///
/// # Panics
///
/// If there is not a sum for each output.
pub(crate) fn round(variant: Variant, sums: &[f32], output: &mut [Half]) {
    assert_eq!(sums.len(), output.len());
    match variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512Bf16 | Instructions::Amx => {
            // SAFETY: both variants exist only if the processor has bfloat16 instructions.
            unsafe { x86::round(sums, output) }
        }
        _ => round_by_bits(variant, sums, output),
    }
}

for_each_variant! {
    fn round_by_bits(sums: &[f32], output: &mut [Half]) {
        for (output, sum) in output.iter_mut().zip(sums) {
            *output = Half::narrow(*sum);
        }
    }
}

/// Widens pairs along the inner side, (inner / 2, lane, inner % 2), to (inner, lane).
#[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "one form for all"))]
fn widen_pairs(variant: Variant, from: &[Half], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if variant != Variant::PORTABLE {
        // SAFETY: every variant but the portable one has AVX2.
        return unsafe { x86::widen_pairs(from, to) };
    }
    for (from, to) in from.chunks_exact(2 * SIDE).zip(to.chunks_exact_mut(2 * SIDE)) {
        for lane in 0..SIDE {
            to[lane] = from[2 * lane].wide();
            to[SIDE + lane] = from[2 * lane + 1].wide();
        }
    }
}

/// Rows whose sums fit into the registers of the baseline: 32 of 4 numbers on ARM, 16 elsewhere.
const PORTABLE_ROWS: usize = if cfg!(target_arch = "aarch64") { 4 } else { 2 };

fn portable<const TRANSPOSED: bool>(
    left: &[f32],
    right: &[f32],
    product: &TileProduct,
    from: usize,
    output: &mut [f32],
) {
    for column in 0..product.columns {
        for first in (0..product.rows).step_by(PORTABLE_ROWS) {
            let output = &mut output[column * TILE + first * SIDE..][..PORTABLE_ROWS * SIDE];
            let mut totals = [[0f32; SIDE]; PORTABLE_ROWS];
            if product.add {
                totals.as_flattened_mut().copy_from_slice(output);
            }
            for run in product.runs {
                for tile in 0..run.tiles() {
                    let left = tile_rows(&left[from + run.left + tile * TILE..]);
                    let at = run.right + (tile * product.columns + column) * TILE;
                    let right = tile_rows(&right[at..]);
                    let inner = (run.inner - tile * SIDE).min(SIDE);
                    // In arrays, so that nothing but the sums and the factors is left in the loop.
                    let rows: &[[f32; SIDE]; PORTABLE_ROWS] = rows_from(left, first);
                    for k in 0..inner {
                        let turned: &[f32; PORTABLE_ROWS] = rows_from(&left[k], first);
                        for (row, totals) in totals.iter_mut().enumerate() {
                            let factor = if TRANSPOSED { turned[row] } else { rows[row][k] };
                            for (total, right) in totals.iter_mut().zip(&right[k]) {
                                *total = multiply_add(factor, *right, *total);
                            }
                        }
                    }
                }
            }
            output.copy_from_slice(totals.as_flattened());
        }
    }
}

/// The rows of the tile at the beginning of `tiles`.
fn tile_rows(tiles: &[f32]) -> &[[f32; SIDE]; SIDE] {
    tiles[..TILE].as_chunks().0.first_chunk().expect("a tile has 16 rows")
}

/// Some rows of a block, from `first` on.
#[inline(always)]
fn rows_from<T, const ROWS: usize>(all: &[T; SIDE], first: usize) -> &[T; ROWS] {
    all[first..].first_chunk().expect("blocks divide the rows of a tile")
}

/// `a · b + c`, fused only if the target always has the instruction: otherwise it would be a library call.
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transpose::transpose_tiles;

    pub(super) fn noise(len: usize) -> Vec<f32> {
        let mut state = 12_345u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608. - 1.
        };
        (0..len).map(|_| next()).collect()
    }

    /// Two runs of two tiles, one of which is not full, and a run of a single product.
    pub(super) const RUNS: [TileRun; 3] = [
        TileRun { left: 0, right: 2 * TILE, inner: 32 },
        TileRun { left: 3 * TILE, right: 0, inner: 21 },
        TileRun { left: TILE, right: 4 * TILE, inner: 1 },
    ];

    /// `Σ left · right` or `Σ leftᵀ · right` in f64, as the product demands.
    fn plain(transposed: bool, data: [&[f32]; 3], product: &TileProduct) -> Vec<f64> {
        let [left, right, output] = data;
        let mut result: Vec<f64> = output.iter().map(|x| f64::from(*x)).collect();
        for (at, result) in result.iter_mut().enumerate().take(product.columns * TILE) {
            let (column, row, lane) = (at / TILE, at % TILE / SIDE, at % SIDE);
            let mut total = if product.add { *result } else { 0. };
            for (run, k) in
                product.runs.iter().flat_map(|run| (0..run.inner).map(move |k| (run, k)))
            {
                let (tile, k) = (k / SIDE, k % SIDE);
                let at = if transposed { k * SIDE + row } else { row * SIDE + k };
                let left = left[run.left + tile * TILE + at];
                let at = (tile * product.columns + column) * TILE + k * SIDE + lane;
                total += f64::from(left) * f64::from(right[run.right + at]);
            }
            *result = total;
        }
        result
    }

    #[test]
    fn every_variant_computes_the_sum_of_products() {
        let (left, right, before) = (noise(6 * TILE), noise(6 * TILE), noise(2 * TILE));
        for variant in Variant::testable() {
            let session = TileSession::begin(variant);
            for (rows, columns, add) in
                [(16, 2, false), (16, 2, true), (16, 1, false), (3, 2, true), (8, 1, true)]
            {
                let wanted = TileProduct { runs: &RUNS, apart: TILE, rows, columns, add, ahead: 0 };
                let mut direct = [before.clone(), before.clone()];
                let mut turned = direct.clone();
                let [a, b] = &mut direct;
                product::<false>(&session, &left, &right, &wanted, &mut [a, b]);
                let [a, b] = &mut turned;
                product::<true>(&session, &left, &right, &wanted, &mut [a, b]);
                for (got, transposed) in [(direct, false), (turned, true)] {
                    for (side, got) in got.iter().enumerate() {
                        let data: [&[f32]; 3] = [&left[side * TILE..], &right, &before];
                        let want = plain(transposed, data, &wanted);
                        for at in (0..columns * TILE).filter(|at| at % TILE < rows * SIDE) {
                            // 54 terms of at most 1, each rounded once or twice.
                            let off = (f64::from(got[at]) - want[at]).abs();
                            assert!(off < 1e-5, "{variant} {wanted:?} {transposed} {at}: {off}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn transposed_left_tiles_give_the_same_bits() {
        let (left, right) = (noise(2 * TILE), noise(4 * TILE));
        let runs = [TileRun { left: 0, right: 0, inner: 2 * SIDE - 3 }];
        for (variant, rows) in Variant::testable().into_iter().flat_map(|v| [(v, 16), (v, 3)]) {
            let wanted =
                TileProduct { runs: &runs, apart: 0, rows, columns: 2, add: false, ahead: 0 };
            let session = TileSession::begin(variant);
            let [mut by_rows, mut by_columns] = [[0f32; 2 * TILE]; 2];
            product::<false>(&session, &left, &right, &wanted, &mut [&mut by_rows]);
            let mut transposed = vec![0.; left.len()];
            transpose_tiles(variant, &left, &mut transposed);
            product::<true>(&session, &transposed, &right, &wanted, &mut [&mut by_columns]);
            let outputs = by_rows.iter().zip(&by_columns).enumerate();
            for (_, (a, b)) in outputs.filter(|(at, _)| at % TILE < rows * SIDE) {
                assert_eq!(a.to_bits(), b.to_bits(), "{variant}, {rows} rows");
            }
        }
    }

    #[test]
    fn splitting_a_sum_into_calls_changes_no_bit() {
        let (left, right) = (noise(4 * TILE), noise(8 * TILE));
        let all_runs = [TileRun { left: 0, right: 0, inner: 64 }];
        let split_runs =
            [0, 1, 2, 3].map(|i| TileRun { left: i * TILE, right: 2 * i * TILE, inner: 16 });
        for variant in Variant::testable() {
            let session = TileSession::begin(variant);
            let (mut whole, mut split) = (vec![0.; 2 * TILE], vec![0.; 2 * TILE]);
            let all = TileProduct {
                runs: &all_runs,
                apart: 0,
                rows: 16,
                columns: 2,
                add: false,
                ahead: 0,
            };
            product::<false>(&session, &left, &right, &all, &mut [&mut whole]);
            let first = TileProduct { runs: &split_runs[..1], ..all };
            product::<false>(&session, &left, &right, &first, &mut [&mut split]);
            let others = TileProduct { runs: &split_runs[1..], add: true, ..all };
            product::<false>(&session, &left, &right, &others, &mut [&mut split]);
            assert!(whole.iter().zip(&split).all(|(a, b)| a.to_bits() == b.to_bits()), "{variant}");
        }
    }

    #[test]
    #[should_panic(expected = "run.left")]
    fn a_tile_outside_its_slice_is_refused() {
        let (left, right) = (noise(2 * TILE), noise(4 * TILE));
        let runs = [TileRun { left: TILE, right: 0, inner: 17 }];
        let wanted =
            TileProduct { runs: &runs, apart: 0, rows: 16, columns: 2, add: false, ahead: 0 };
        let session = TileSession::begin(Variant::PORTABLE);
        product::<false>(&session, &left, &right, &wanted, &mut [&mut [0.; 2 * TILE]]);
    }

    /// The variants with a tile unit.
    fn with_tile_unit() -> impl Iterator<Item = Variant> {
        Variant::testable().into_iter().filter(|variant| variant.has_tile_unit())
    }

    /// Small integers, whose products and sums are exact.
    fn integers(len: usize) -> Vec<Half> {
        (0..len).map(|at| Half::narrow((at * 7919 % 1013 % 7) as f32 - 3.)).collect()
    }

    #[test]
    fn paired_tiles_give_the_sum_of_all_terms_and_their_padding_adds_nothing() {
        for variant in with_tile_unit() {
            let session = TileSession::begin(variant);
            let order = TileOrder::of(variant, Precision::Bf16);
            assert!(order.is_paired() && !TileOrder::of(variant, Precision::F32).is_paired());
            for (inner, columns, sides) in [(1, 1, 1), (2, 2, 2), (3, 2, 2), (5, 1, 2), (4, 2, 1)] {
                let padded = order.inner_tiles(inner);
                // Row by row: (side, row, inner) and (inner, column).
                let (rows, width) = (sides * SIDE, columns * SIDE);
                let (left, right) = (integers(rows * inner * SIDE), integers(inner * SIDE * width));
                let mut tiles = vec![Half(0); sides * inner * TILE];
                for (at, value) in left.iter().enumerate() {
                    let (row, k) = (at / (inner * SIDE), at % (inner * SIDE));
                    let tile = row / SIDE * inner + k / SIDE;
                    tiles[tile * TILE + row % SIDE * SIDE + k % SIDE] = *value;
                }
                // What is there before must not matter.
                let mut paired = vec![Half(0x7fc0); sides * padded * TILE];
                pair_left(variant, inner, &tiles, &mut paired);
                let mut packed = vec![Half(0); padded * columns * TILE];
                for (k, column) in (0..inner).flat_map(|k| (0..columns).map(move |c| (k, c))) {
                    let mut tile = [0f32; TILE];
                    for (row, tile) in tile.chunks_exact_mut(SIDE).enumerate() {
                        let from = &right[(k * SIDE + row) * width + column * SIDE..];
                        tile.iter_mut().zip(from).for_each(|(to, from)| *to = from.wide());
                    }
                    let place = order.place(k, column, columns) * TILE;
                    Half::arrange_right(&tile, &mut packed[place..place + TILE]);
                }
                let runs = [TileRun { left: 0, right: 0, inner: inner * SIDE }];
                let wanted = TileProduct {
                    runs: &runs,
                    apart: padded * TILE,
                    rows: SIDE,
                    columns,
                    add: false,
                    ahead: TILE,
                };
                let mut outputs = [[f32::NAN; 2 * TILE]; 2];
                let mut some: Vec<&mut [f32]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
                let some = &mut some[..sides];
                product_of_halves::<false>(&session, &paired, &packed, &wanted, some);
                for (row, column) in (0..rows).flat_map(|r| (0..width).map(move |c| (r, c))) {
                    let terms = (0..inner * SIDE).map(|k| {
                        left[row * inner * SIDE + k].wide() * right[k * width + column].wide()
                    });
                    let at = column / SIDE * TILE + row % SIDE * SIDE + column % SIDE;
                    let got = outputs[row / SIDE][at];
                    assert_eq!(
                        got,
                        terms.sum::<f32>(),
                        "{variant} {inner} {columns} {row} {column}"
                    );
                }
            }
        }
    }

    /// A product of two outputs and two columns: rows of 50 numbers, of which each run reads 32, and right columns
    /// three tiles apart.
    fn strips(runs: &[TileRun], add: bool) -> StripProduct<'_> {
        StripProduct { runs, left_row: 50, apart: 7, column: 3 * TILE, columns: 2, add }
    }

    const STRIP_LEFT: usize = 15 * 50 + 7 + 9 + 32;
    const STRIP_RUNS: [TileRun; 2] =
        [TileRun { left: 9, right: 0, inner: 32 }, TileRun { left: 2, right: TILE, inner: 32 }];

    #[test]
    fn strips_are_read_where_their_distances_say() {
        for variant in with_tile_unit() {
            let session = TileSession::begin(variant);
            let (left, right) = (integers(STRIP_LEFT), integers(6 * TILE));
            for add in [false, true] {
                let mut outputs = [[2f32; 2 * TILE]; 2];
                let [a, b] = &mut outputs;
                let wanted = strips(&STRIP_RUNS, add);
                product_of_strips(&session, &left, &right, &wanted, &mut [a, b]);
                let places = (0..2 * SIDE).flat_map(|r| (0..2 * SIDE).map(move |c| (r, c)));
                for (row, column) in places {
                    let terms = STRIP_RUNS.iter().flat_map(|run| (0..32).map(move |k| (run, k)));
                    let sum: f32 = terms
                        .map(|(run, k)| {
                            let from = run.left + row / SIDE * 7 + row % SIDE * 50 + k;
                            let tile = run.right + column / SIDE * 3 * TILE;
                            let at = tile + k / 2 * 2 * SIDE + column % SIDE * 2 + k % 2;
                            left[from].wide() * right[at].wide()
                        })
                        .sum();
                    let at = column / SIDE * TILE + row % SIDE * SIDE + column % SIDE;
                    let before = if add { 2. } else { 0. };
                    assert_eq!(outputs[row / SIDE][at], sum + before, "{variant} {row} {column}");
                }
            }
        }
    }

    #[test]
    fn strips_outside_their_slices_are_refused() {
        for variant in with_tile_unit() {
            let tries = [
                // One number too few on the left, and on the right.
                (STRIP_LEFT - 1, 6 * TILE, STRIP_RUNS[0].inner),
                (STRIP_LEFT, 6 * TILE - 1, STRIP_RUNS[0].inner),
                // Half of what the unit takes at once.
                (STRIP_LEFT, 6 * TILE, SIDE),
            ];
            for (left, right, inner) in tries {
                let work = || {
                    let session = TileSession::begin(variant);
                    let runs = [TileRun { inner, ..STRIP_RUNS[0] }, STRIP_RUNS[1]];
                    let mut outputs = [[0f32; 2 * TILE]; 2];
                    let [a, b] = &mut outputs;
                    let (left, right) = (integers(left), integers(right));
                    product_of_strips(&session, &left, &right, &strips(&runs, true), &mut [a, b]);
                };
                assert!(
                    std::panic::catch_unwind(work).is_err(),
                    "{variant} {left} {right} {inner}"
                );
            }
        }
    }

    #[test]
    fn sums_are_rounded_to_the_nearest_half_in_every_variant() {
        let mut sums = noise(5 * SIDE + 3);
        sums[..4].copy_from_slice(&[1. + 1. / 256., 1. + 3. / 256., f32::INFINITY, -0.]);
        sums[4] = f32::NAN;
        for variant in Variant::testable() {
            let mut halves = vec![Half(0); sums.len()];
            round(variant, &sums, &mut halves);
            assert!(halves[4].wide().is_nan(), "{variant}");
            for (at, (half, sum)) in halves.iter().zip(&sums).enumerate().filter(|(at, _)| *at != 4)
            {
                assert_eq!(*half, Half::narrow(*sum), "{variant} {at}");
            }
        }
    }
}
