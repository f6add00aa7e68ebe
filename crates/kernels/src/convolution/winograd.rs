//! 3×3 convolutions of stride 1 with fewer multiplications: the minimal filtering F(m × m, 3 × 3) of Winograd, as Lavin &
//! Gray use it (2015, arXiv:1509.09308, Section 4.1).
//!
//! A square of m × m output pixels needs (m + 2)² input pixels `d`. Both the square and the kernel `g` are transformed so
//! that one product for each of these positions replaces the sum, `y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A` with the matrices of
//! [`Filter`]: 16 products in place of 36 with m = 2, and 36 in place of 144 with m = 4.
//!
//! Summed over channels, the products of each position are a matrix product. Since all images of a tile share a pixel, the
//! transforms work on whole tiles. The input gradient is the same with the kernel rotated by half a turn. The gradient of the
//! kernel is `Gᵀ [Σ (Bᵀ d B) ⊙ (A dy Aᵀ)] G`.
//!
//! **Rounding.** With unit roundoff `u = 2⁻²⁴`, the error of a plain sum of `n` products is at most
//! `n u Σ|w x|`. Here, with m = 2, a transformed number is a sum of up to 4 of `x`, or of 9 of `w` with weights of up to
//! 9/4 in total, and a result is a sum of 9 sums of products over `C` channels. Its error is at most
//! `81 C (C + 16) u · max|w| · max|x|`, and that of a weight gradient over `N` pixels at most
//! `36 N (N + 16) u · max|x| · max|dy|`. With m = 4 it is `620 C (C + 32) u` and `945 N (N + 32) u`: 620 is the square of the
//! largest sum over positions `j` of `|Aᵀ_ij| Σ_k |Bᵀ_jk| Σ_k |G_jk|`, and 945 that of `|G_jk| Σ_k |Bᵀ_jk| Σ_i |Aᵀ_ij|`. These
//! worst-case bounds are loose; the tests hold the mean error to less than 4 times that of the plain sum.
//!
//! In bfloat16 only m = 2 is used. The transformed numbers are rounded once more, to nearest, by at most `v = 2⁻⁸` of
//! themselves. Products are exact and are summed in f32 as usual. This adds at most
//! `163 C v · max|w| · max|x|` to the error, and little on average: the tests hold the error on random
//! numbers below 0.5 % of the result; `README.md` has the measured one. The gradient of the kernel is the
//! plain sum in bfloat16. Where the processor has no products of bfloat16, transformed numbers are f32, so that both sizes
//! of squares and all three products are as in f32.

#![expect(unsafe_code, reason = "tasks write disjoint tiles of one buffer")]

use std::ops::Range;

use super::columns_of;
use super::filter::Filter;
use super::finish::FinishOf;
use super::packed::arrange_right;
use crate::Variant;
use crate::buffer::{with_scratch, with_scratch_of};
use crate::element::ValueElement;
use crate::layout::{SIDE, Shape, TILE};
use crate::packed_product::INNER;
use crate::parallel::{self, Disjoint};
use crate::tiles::{TileProduct, TileRun, TileSession};
use crate::variant::for_each_variant;

/// Which squares of output pixels are computed at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum SquareSize {
    /// 2 × 2.
    Two,
    /// 4 × 4.
    Four,
}

impl SquareSize {
    /// Positions of a transformed square.
    pub fn positions(self) -> usize {
        match self {
            SquareSize::Two => 16,
            SquareSize::Four => 36,
        }
    }

    /// The squares on a map.
    pub fn on(self, shape: Shape) -> Squares {
        Squares::new(
            match self {
                SquareSize::Two => 2,
                SquareSize::Four => 4,
            },
            shape,
        )
    }

    /// Products of each pair of channels on a map.
    pub fn products(self, shape: Shape) -> usize {
        self.on(shape).count() * self.positions()
    }
}

/// Evaluates an expression with `$filter` as the [`Filter`] of a size.
macro_rules! by_size {
    ($size:expr, $filter:ident => $result:expr) => {
        match $size {
            $crate::convolution::winograd::SquareSize::Two => {
                type $filter = $crate::convolution::filter::Two;
                $result
            }
            $crate::convolution::winograd::SquareSize::Four => {
                type $filter = $crate::convolution::filter::Four;
                $result
            }
        }
    };
}
pub(super) use by_size;

/// Bytes of transformed squares that a task holds at a time; it holds at least two squares. Where squares are small or channels
/// few, they and their weights fit into the second-level cache.
const HELD: usize = 512 << 10;
/// Squares of 4 × 4 pixels that a task takes together, of several groups where a whole map has fewer.
const JOINED: usize = 8;
/// Distance between positions for this many tiles. The extra cache lines keep the positions of a number
/// from falling into the same cache sets.
pub(super) fn stride(tiles: usize) -> usize {
    tiles * TILE + TILE
}

/// Squares of pixels that cover a map, row by row.
#[derive(Clone, Copy)]
pub(super) struct Squares {
    side: usize,
    rows: usize,
    columns: usize,
}

impl Squares {
    /// The squares of `side` pixels on a map.
    pub fn new(side: usize, shape: Shape) -> Squares {
        Squares { side, rows: shape.height.div_ceil(side), columns: shape.width.div_ceil(side) }
    }

    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// The group and the upper left pixel of a square, counted over all groups.
    pub fn place(&self, square: usize) -> (usize, (usize, usize)) {
        let (group, square) = (square / self.count(), square % self.count());
        (group, (square / self.columns * self.side, square % self.columns * self.side))
    }
}

/// Transforms weights `(O, I, 3, 3)` and packs them as tiles in the order (pair of blocks written,
/// position, block read, block of the pair).
///
/// `nine(from, to, kernels)` fills in the nine weights between a channel that is read and each channel of a
/// block that is written.
pub(super) fn pack<F: Filter<N, M>, T: ValueElement, const N: usize, const M: usize>(
    from_channels: usize,
    to_channels: usize,
    packed: &mut [T],
    nine: impl Fn(usize, Range<usize>, &mut [Lanes; 9]) + Sync + Send,
) {
    let (from_blocks, to_blocks) = (from_channels.div_ceil(SIDE), to_channels.div_ceil(SIDE));
    let all = N * N * from_blocks * TILE;
    assert_eq!(packed.len(), all * to_blocks);
    parallel::for_each_chunk(packed, 2 * all, 8 * all * to_blocks, |pair, packed| {
        let columns = columns_of(to_blocks, pair);
        with_scratch(N * N * TILE, |scratch| {
            for (column, block) in (0..columns).flat_map(|c| (0..from_blocks).map(move |f| (c, f)))
            {
                let first = (2 * pair + column) * SIDE;
                let lanes = first..(first + SIDE).min(to_channels);
                scratch.fill(0.);
                for from in block * SIDE..((block + 1) * SIDE).min(from_channels) {
                    let mut kernels = [[0.; SIDE]; 9];
                    nine(from, lanes.clone(), &mut kernels);
                    transform_kernels::<F, N, M>(
                        Variant::fastest(),
                        &kernels,
                        &mut scratch[from % SIDE * SIDE..],
                    );
                }
                for (position, tile) in scratch.as_chunks::<TILE>().0.iter().enumerate() {
                    let at = ((position * from_blocks + block) * columns + column) * TILE;
                    arrange_right(Variant::fastest(), tile, &mut packed[at..at + TILE]);
                }
            }
        });
    });
}

for_each_variant! {
    /// `G g Gᵀ` of 16 interleaved kernels; the positions lie a tile apart.
    fn transform_kernels<F: Filter<N, M>; const N, const M>(g: &[Lanes; 9], to: &mut [f32]) {
        let mut half = [[[0f32; SIDE]; 3]; N];
        for x in 0..3 {
            let column = each_lane(&[g[x], g[3 + x], g[6 + x]], F::taps);
            for (half, numbers) in half.iter_mut().zip(column) {
                half[x] = numbers;
            }
        }
        for (y, half) in half.iter().enumerate() {
            for (x, numbers) in each_lane(half, F::taps).iter().enumerate() {
                store(to, (y * N + x) * TILE, numbers);
            }
        }
    }
}

/// The largest error of a sum of this many products with factors of at most 1 in magnitude, for an output
/// or, with `weights`, for a weight.
#[cfg(test)]
pub(super) fn bound(size: SquareSize, rounds: bool, terms: usize, weights: bool) -> f64 {
    let n = if weights { terms } else { terms / 9 } as f64;
    let (factor, others) = match (size, weights) {
        (SquareSize::Two, false) => (81., 16.),
        (SquareSize::Two, true) => (36., 16.),
        (SquareSize::Four, false) => (620., 32.),
        (SquareSize::Four, true) => (945., 32.),
    };
    let rounded = if rounds { 163. * n * (-8f64).exp2() } else { 0. };
    factor * n * (n + others) * (-24f64).exp2() + rounded
}

for_each_variant! {
    /// `Gᵀ m G` of 16 × 16 kernels, in place: from tiles of all positions to tiles of the nine taps.
    pub(super) fn gradients_of_kernels<F: Filter<N, M>; const N, const M>(sums: &mut [f32]) {
        for at in (0..TILE).step_by(SIDE) {
            let mut half = [[[0f32; SIDE]; N]; 3];
            for x in 0..N {
                let mut column = [[0f32; SIDE]; N];
                for (y, numbers) in column.iter_mut().enumerate() {
                    *numbers = row(sums, (N * y + x) * TILE + at);
                }
                for (half, numbers) in half.iter_mut().zip(each_lane(&column, F::taps_gradient)) {
                    half[x] = numbers;
                }
            }
            for (y, half) in half.iter().enumerate() {
                for (x, numbers) in each_lane(half, F::taps_gradient).iter().enumerate() {
                    store(sums, (3 * y + x) * TILE + at, numbers);
                }
            }
        }
    }
}

/// `to (+)= packed ∗ from`, both maps of the same size.
///
/// - `U`: the type of transformed numbers and of the packed weights.
pub(super) fn convolve<F, T, U, const N: usize, const M: usize>(
    variant: Variant,
    operations: usize,
    (from, from_shape): (&[T], Shape),
    packed: &[U],
    (to, to_shape): (&mut [T], Shape),
    add: bool,
    finish: &FinishOf<T>,
) where
    F: Filter<N, M>,
    T: ValueElement,
    U: ValueElement,
{
    assert_eq!(from.len(), from_shape.len());
    assert_eq!(to.len(), to_shape.len());
    let (blocks, to_blocks) = (from_shape.blocks(), to_shape.blocks());
    assert_eq!(packed.len(), N * N * blocks * to_blocks * TILE);
    let (pairs, wanted) = (to_blocks.div_ceil(2), 4 * parallel::threads());
    // The split into tasks does not affect the result: no sum crosses a task.
    let bands = Bands::of(to_shape, M, wanted.div_ceil(to_shape.groups()));
    let map = Squares::new(M, to_shape);
    // Groups of images that share what is read of the weights, where those outweigh a map. Not so many that threads idle.
    let joined = if M == 4 && bands.count == 1 { JOINED / map.count() } else { 1 };
    let joined = joined.min(to_shape.groups() * pairs.div_ceil(2) / wanted).max(1);
    let squares_tasks = to_shape.groups().div_ceil(joined) * bands.count;
    let pair_tasks = wanted.div_ceil(squares_tasks).min(pairs.div_ceil(2));
    let held = (HELD / (N * N * blocks * TILE * size_of::<U>())).clamp(2, 8);
    let (left_len, sums_len) = (N * N * stride(held * blocks), N * N * stride(2 * held));
    let to = Disjoint::new(to);
    let parts = to_shape.parts() / to_shape.groups();
    parallel::for_each(squares_tasks * pair_tasks, operations, |task| {
        let (task, pair_task) = (task / pair_tasks, task % pair_tasks);
        let (first, band) = (task / bands.count * joined, task % bands.count);
        let groups = first..(first + joined).min(to_shape.groups());
        let pairs = pair_task * pairs / pair_tasks..(pair_task + 1) * pairs / pair_tasks;
        let session = TileSession::begin(variant);
        let in_map = bands.squares(band);
        let squares =
            groups.start * map.count() + in_map.start..(groups.end - 1) * map.count() + in_map.end;
        let work = Convolve { session: &session, from, from_shape, packed, to: &to, to_shape, add };
        with_scratch_of::<U, _>(left_len, sums_len, |left, sums| {
            for first in squares.clone().step_by(held) {
                let squares = first..(first + held).min(squares.end);
                work.squares::<F, N, M>(squares, pairs.clone(), left, sums);
            }
        });
        if bands.whole {
            let all =
                groups.flat_map(|group| bands.parts(band).map(move |part| group * parts + part));
            for (part, pair) in all.flat_map(|part| pairs.clone().map(move |pair| (part, pair))) {
                finish.part(&session, &to, to_shape, part, pair);
            }
        }
    });
    if !bands.whole && !finish.is_empty() {
        parallel::for_each(to_shape.parts() * pairs, to_shape.len(), |task| {
            let session = TileSession::begin(variant);
            finish.part(&session, &to, to_shape, task / pairs, task % pairs);
        });
    }
}

/// A map split into bands of whole squares.
struct Bands {
    shape: Shape,
    /// Pixels along the side of a square.
    side: usize,
    rows: usize,
    count: usize,
    /// Whether every band consists of whole parts of the map.
    whole: bool,
}

impl Bands {
    /// Bands of whole parts if these are enough tasks, otherwise as many bands as possible.
    fn of(shape: Shape, side: usize, wanted: usize) -> Bands {
        let whole = |rows: &usize| (rows * shape.width).is_multiple_of(shape.part_pixels());
        let rows = (side..=shape.height).step_by(side).find(whole).unwrap_or(shape.height);
        let count = shape.height.div_ceil(rows);
        if count < wanted {
            let (count, whole) = (shape.height.div_ceil(side), rows == side);
            return Bands { shape, side, rows: side, count, whole };
        }
        Bands { shape, side, rows, count, whole: true }
    }

    fn rows(&self, band: usize) -> Range<usize> {
        band * self.rows..((band + 1) * self.rows).min(self.shape.height)
    }

    fn squares(&self, band: usize) -> Range<usize> {
        let (rows, columns) = (self.rows(band), self.shape.width.div_ceil(self.side));
        rows.start / self.side * columns..rows.end.div_ceil(self.side) * columns
    }

    fn parts(&self, band: usize) -> Range<usize> {
        let (rows, part) = (self.rows(band), self.shape.part_pixels());
        rows.start * self.shape.width / part..(rows.end * self.shape.width).div_ceil(part)
    }
}

struct Convolve<'a, T, U> {
    session: &'a TileSession,
    from: &'a [T],
    from_shape: Shape,
    packed: &'a [U],
    to: &'a Disjoint<'a, T>,
    to_shape: Shape,
    add: bool,
}

impl<T: ValueElement, U: ValueElement> Convolve<'_, T, U> {
    /// Transforms some squares, counted over all groups, multiplies, and transforms back.
    fn squares<F: Filter<N, M>, const N: usize, const M: usize>(
        &self,
        squares: Range<usize>,
        pairs: Range<usize>,
        left: &mut [U],
        sums: &mut [f32],
    ) {
        let (blocks, to_blocks) = (self.from_shape.blocks(), self.to_shape.blocks());
        let (map, count) = (Squares::new(M, self.to_shape), squares.len());
        let (variant, step) = (self.session.variant(), stride(count * blocks));
        for (at, square) in squares.clone().enumerate() {
            let to = &mut left[at * blocks * TILE..];
            let (group, corner) = map.place(square);
            let (from, shape) = (self.from, self.from_shape);
            transform_input::<F, T, U, N, M>(
                variant,
                from,
                shape,
                group,
                corner,
                0..blocks,
                to,
                step,
            );
        }
        let at_once = Self::at_once::<M>(count);
        for pair in pairs {
            let columns = columns_of(to_blocks, pair);
            let sums_step = stride(at_once * columns);
            for first in (0..count).step_by(at_once) {
                let near = first..(first + at_once).min(count);
                let left = &left[first * blocks * TILE..];
                self.multiply(N * N, near.len(), pair, left, step, sums, sums_step);
                for (at, square) in near.enumerate() {
                    let (group, corner) = map.place(squares.start + square);
                    for column in 0..columns {
                        let (block, sums) =
                            (2 * pair + column, &sums[(at * columns + column) * TILE..]);
                        self.write::<F, N, M>(group, corner, block, sums, sums_step);
                    }
                }
            }
        }
    }

    /// Squares that are multiplied at a time, of `held` transformed ones. Of squares of 2 × 2 pixels, the weights of all
    /// positions stay in the second-level cache, and the sums of one square in the first-level cache. Those of 4 × 4 pixels are
    /// too large for both: the weights of a position are read once for all squares.
    fn at_once<const M: usize>(held: usize) -> usize {
        if M == 2 { 1 } else { held }
    }

    /// Multiplies all positions of some squares, for a pair of blocks.
    #[expect(clippy::too_many_arguments, reason = "source and destination")]
    fn multiply(
        &self,
        positions: usize,
        squares: usize,
        pair: usize,
        left: &[U],
        step: usize,
        sums: &mut [f32],
        sums_step: usize,
    ) {
        let (blocks, to_blocks) = (self.from_shape.blocks(), self.to_shape.blocks());
        let columns = columns_of(to_blocks, pair);
        for position in 0..positions {
            let right = (positions * 2 * pair + position * columns) * blocks * TILE;
            let sums = &mut sums[position * sums_step..][..squares * columns * TILE];
            for first in (0..blocks).step_by(INNER) {
                let inner = (self.from_shape.channels - first * SIDE).min(INNER * SIDE);
                let right = right + first * columns * TILE;
                // The weights of the next pass follow in memory. Each call fetches its share of them.
                let panel = inner.div_ceil(SIDE) * columns * TILE;
                for (two, outputs) in sums.chunks_mut(2 * columns * TILE).enumerate() {
                    let left = &left[position * step + 2 * two * blocks * TILE..];
                    let runs = &[TileRun { left: first * TILE, right, inner }];
                    let product = TileProduct {
                        runs,
                        apart: blocks * TILE,
                        rows: SIDE,
                        columns,
                        add: first > 0,
                        ahead: right + panel + two * panel / squares.div_ceil(2),
                    };
                    let (a, b) = outputs.split_at_mut(columns * TILE);
                    if b.is_empty() {
                        U::product::<false>(self.session, left, self.packed, &product, &mut [a]);
                    } else {
                        U::product::<false>(self.session, left, self.packed, &product, &mut [a, b]);
                    }
                }
            }
        }
    }

    /// Writes `Aᵀ m A` of a square and block; the tiles of all positions lie `step` numbers apart in `sums`.
    fn write<F: Filter<N, M>, const N: usize, const M: usize>(
        &self,
        group: usize,
        (y, x): (usize, usize),
        block: usize,
        sums: &[f32],
        step: usize,
    ) {
        let shape = self.to_shape;
        let output = |row: usize, column: usize| {
            let (y, x) = (y + row, x + column);
            if y >= shape.height || x >= shape.width {
                return None;
            }
            let pixel = (group * shape.height + y) * shape.width + x;
            let from = pixel * shape.pixel_len() + block * TILE;
            // SAFETY: a task owns the pixels of its bands in its pairs of blocks, and those of a square differ.
            let tile = unsafe { self.to.part(from, TILE) };
            Some(tile.try_into().expect("a tile"))
        };
        let mut outputs =
            std::array::from_fn(|row| std::array::from_fn(|column| output(row, column)));
        let sums = std::array::from_fn(|row| {
            std::array::from_fn(|column| {
                let tile = &sums[(row * N + column) * step..][..TILE];
                tile.try_into().expect("a tile")
            })
        });
        transform_output::<F, T, N, M>(self.session.variant(), &sums, &mut outputs, self.add);
    }
}

/// Writes `Bᵀ d B` of a square in some blocks of channels; the tiles of the positions lie `step` numbers
/// apart in `to`.
#[expect(clippy::too_many_arguments, reason = "source, position and destination")]
pub(super) fn transform_input<F, T, U, const N: usize, const M: usize>(
    variant: Variant,
    from: &[T],
    shape: Shape,
    group: usize,
    (y, x): (usize, usize),
    blocks: Range<usize>,
    to: &mut [U],
    step: usize,
) where
    F: Filter<N, M>,
    T: ValueElement,
    U: ValueElement,
{
    let inside = |at: usize, limit: usize| at.checked_sub(1).filter(|at| *at < limit);
    let pixel = |row: usize, column: usize| -> &[[T; TILE]] {
        match (inside(y + row, shape.height), inside(x + column, shape.width)) {
            (Some(y), Some(x)) => {
                let pixel = (group * shape.height + y) * shape.width + x;
                let first = pixel * shape.pixel_len() + blocks.start * TILE;
                from[first..first + blocks.len() * TILE].as_chunks().0
            }
            _ => &[],
        }
    };
    let pixels: [[&[[T; TILE]]; N]; N] =
        std::array::from_fn(|row| std::array::from_fn(|column| pixel(row, column)));
    for block in 0..blocks.len() {
        // Padding is zero.
        let tiles = pixels.map(|row| row.map(|pixel| pixel.get(block).unwrap_or(T::zeros())));
        let mut to = positions(&mut to[block * TILE..], step);
        forward_transform::<F, T, U, N, M>(variant, &tiles, &mut to);
    }
}

/// The tiles of all positions, `step` numbers apart.
fn positions<U, const N: usize>(to: &mut [U], step: usize) -> [[&mut [U; TILE]; N]; N] {
    let mut tiles = to.chunks_mut(step).filter_map(|tiles| tiles.first_chunk_mut());
    std::array::from_fn(|_| std::array::from_fn(|_| tiles.next().expect("room for all positions")))
}

/// 16 numbers that are processed together.
type Lanes = [f32; SIDE];

#[inline(always)]
fn row<T: ValueElement>(from: &[T], at: usize) -> Lanes {
    let from = &from[at..at + SIDE];
    let mut row = [0f32; SIDE];
    for (lane, value) in row.iter_mut().enumerate() {
        *value = from[lane].wide();
    }
    row
}

/// Does the transform of a line in each lane.
#[inline(always)]
fn each_lane<const FROM: usize, const TO: usize>(
    line: &[Lanes; FROM],
    transform: impl Fn([f32; FROM]) -> [f32; TO],
) -> [Lanes; TO] {
    let mut result = [[0f32; SIDE]; TO];
    for lane in 0..SIDE {
        let mut numbers = [0f32; FROM];
        for (number, row) in numbers.iter_mut().zip(line) {
            *number = row[lane];
        }
        for (row, number) in result.iter_mut().zip(transform(numbers)) {
            row[lane] = number;
        }
    }
    result
}

/// Stores numbers, rounded.
#[inline(always)]
fn store<U: ValueElement>(to: &mut [U], at: usize, row: &Lanes) {
    let to = &mut to[at..at + SIDE];
    for lane in 0..SIDE {
        to[lane] = U::near(row[lane]);
    }
}

for_each_variant! {
    /// `Bᵀ d B`: from the tiles of N × N pixels to those of as many positions.
    fn forward_transform<F: Filter<N, M>, T: ValueElement, U: ValueElement; const N, const M>(
        tiles: &[[&[T; TILE]; N]; N],
        to: &mut [[&mut [U; TILE]; N]; N],
    ) {
        for at in (0..TILE).step_by(SIDE) {
            let mut half = [[[0f32; SIDE]; N]; N];
            for x in 0..N {
                let mut column = [[0f32; SIDE]; N];
                for (numbers, tiles) in column.iter_mut().zip(tiles) {
                    *numbers = row(tiles[x], at);
                }
                for (half, numbers) in half.iter_mut().zip(each_lane(&column, F::input)) {
                    half[x] = numbers;
                }
            }
            for (half, to) in half.iter().zip(to.iter_mut()) {
                for (to, numbers) in to.iter_mut().zip(&each_lane(half, F::input)) {
                    store(&mut **to, at, numbers);
                }
            }
        }
    }
}

for_each_variant! {
    /// `Aᵀ m A`: from rows of the tiles of all positions to rows of the tiles of M × M pixels. Pixels outside the map are
    /// `None`.
    fn transform_output<F: Filter<N, M>, T: ValueElement; const N, const M>(
        sums: &[[&[f32; TILE]; N]; N],
        outputs: &mut [[Option<&mut [T; TILE]>; M]; M],
        add: bool,
    ) {
        for at in (0..TILE).step_by(SIDE) {
            let mut half = [[[0f32; SIDE]; N]; M];
            for x in 0..N {
                let mut column = [[0f32; SIDE]; N];
                for (numbers, sums) in column.iter_mut().zip(sums) {
                    *numbers = row(sums[x], at);
                }
                for (half, numbers) in half.iter_mut().zip(each_lane(&column, F::output)) {
                    half[x] = numbers;
                }
            }
            for (half, outputs) in half.iter().zip(outputs.iter_mut()) {
                for (output, mut numbers) in outputs.iter_mut().zip(each_lane(half, F::output)) {
                    let Some(output) = output else { continue };
                    let output = &mut output[at..at + SIDE];
                    if add {
                        for lane in 0..SIDE {
                            numbers[lane] += output[lane].wide();
                        }
                    }
                    for lane in 0..SIDE {
                        output[lane] = T::narrow(numbers[lane]);
                    }
                }
            }
        }
    }
}

for_each_variant! {
    /// `A dy Aᵀ`: from the tiles of M × M pixels to those of all positions.
    fn gradient_transform<F: Filter<N, M>, T: ValueElement; const N, const M>(
        tiles: &[[&[T; TILE]; M]; M],
        to: &mut [[&mut [f32; TILE]; N]; N],
    ) {
        for at in (0..TILE).step_by(SIDE) {
            let mut half = [[[0f32; SIDE]; M]; N];
            for x in 0..M {
                let mut column = [[0f32; SIDE]; M];
                for (numbers, tiles) in column.iter_mut().zip(tiles) {
                    *numbers = row(tiles[x], at);
                }
                for (half, numbers) in half.iter_mut().zip(each_lane(&column, F::output_gradient)) {
                    half[x] = numbers;
                }
            }
            for (half, to) in half.iter().zip(to.iter_mut()) {
                for (to, numbers) in to.iter_mut().zip(&each_lane(half, F::output_gradient)) {
                    store(&mut **to, at, numbers);
                }
            }
        }
    }
}

/// Writes `A dy Aᵀ` of a square in some blocks of channels; the tiles of the positions lie `step`
/// numbers apart in `to`.
#[expect(clippy::too_many_arguments, reason = "source, position and destination")]
pub(super) fn transform_gradient<F, T, const N: usize, const M: usize>(
    variant: Variant,
    from: &[T],
    shape: Shape,
    group: usize,
    (y, x): (usize, usize),
    blocks: Range<usize>,
    to: &mut [f32],
    step: usize,
) where
    F: Filter<N, M>,
    T: ValueElement,
{
    for (at, block) in blocks.enumerate() {
        let tile = |row: usize, column: usize| -> &[T; TILE] {
            let (y, x) = (y + row, x + column);
            if y >= shape.height || x >= shape.width {
                return T::zeros();
            }
            let pixel = (group * shape.height + y) * shape.width + x;
            let tile = from[pixel * shape.pixel_len() + block * TILE..].first_chunk();
            tile.expect("a tile of a value")
        };
        let tiles = std::array::from_fn(|row| std::array::from_fn(|column| tile(row, column)));
        let mut to = positions(&mut to[at * TILE..], step);
        gradient_transform::<F, T, N, M>(variant, &tiles, &mut to);
    }
}
