//! 3×3 convolutions of stride 1 with 16 multiplications instead of 36: the minimal filtering F(2×2, 3×3)
//! of Winograd, as Lavin & Gray use it (2015, arXiv:1509.09308, Section 4.1).
//!
//! A square of 2 × 2 output pixels needs 4 × 4 input pixels `d`. Both the square and the kernel `g` are
//! transformed so that 16 products, position by position, replace the sum:
//!
//! `y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A`, with
//!
//! ```text
//!      1  0 −1  0         1    0    0
//! Bᵀ = 0  1  1  0    G =  ½    ½    ½    Aᵀ = 1  1  1  0
//!      0 −1  1  0         ½   −½    ½         0  1 −1 −1
//!      0  1  0 −1         0    0    1
//! ```
//!
//! Summed over channels, the products of each position are a matrix product. The transforms only add (and
//! halve). Since all images of a tile share a pixel, they work on whole tiles. The input gradient is the
//! same with the kernel rotated by half a turn. The gradient of the kernel is
//! `Gᵀ [Σ (Bᵀ d B) ⊙ (A dy Aᵀ)] G`.
//!
//! **Rounding.** With unit roundoff `u = 2⁻²⁴`, the error of a plain sum of `n` products is at most
//! `n u Σ|w x|`. Here a transformed number is a sum of up to 4 of `x`, or of 9 of `w` with weights of up to
//! 9/4 in total, and a result is a sum of 9 sums of products over `C` channels. Its error is at most
//! `81 C (C + 16) u · max|w| · max|x|`, and that of a weight gradient over `N` pixels at most
//! `36 N (N + 16) u · max|x| · max|dy|`. These worst-case bounds are loose; the tests hold the mean error to
//! less than 4 times that of the plain sum.
//!
//! In bfloat16 the transformed numbers are rounded once more, to nearest, by at most `v = 2⁻⁸` of
//! themselves. Products are exact and are summed in f32 as usual. This adds at most
//! `163 C v · max|w| · max|x|` to the error, and little on average: the tests hold the error on random
//! numbers below 0.5 % of the result; `README.md` has the measured one. The gradient of the kernel is the
//! plain sum in bfloat16.

#![expect(unsafe_code, reason = "tasks write disjoint tiles of one buffer")]

use std::ops::Range;

use super::finish::FinishOf;
use super::packed::arrange_right;
use super::{Geometry, columns_of};
#[cfg(test)]
use crate::Precision;
use crate::Variant;
use crate::buffer::{with_scratch, with_scratch_of};
use crate::element::ValueElement;
use crate::layout::{SIDE, Shape, TILE};
use crate::parallel::{self, Disjoint};
use crate::tiles::{TileProduct, TileRun, TileSession};
use crate::variant::for_each_variant;

/// Positions of a transformed square.
pub(super) const POSITIONS: usize = 16;
/// Bytes of transformed squares that a task holds at a time. They and their weights fit into the
/// second-level cache.
const HELD: usize = 512 << 10;
/// Distance between positions for this many tiles. The extra cache lines keep the positions of a number
/// from falling into the same cache sets.
pub(super) fn stride(tiles: usize) -> usize {
    tiles * TILE + NEAR * SIDE
}
/// Images whose sums, of all positions and a pair of blocks, fit into the first-level cache.
const NEAR: usize = 16;

/// Squares of 2 × 2 pixels that cover a map, row by row.
#[derive(Clone, Copy)]
pub(super) struct Squares {
    rows: usize,
    columns: usize,
}

impl Squares {
    pub fn of(shape: Shape) -> Squares {
        Squares { rows: shape.height.div_ceil(2), columns: shape.width.div_ceil(2) }
    }

    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// The upper left pixel of a square.
    pub fn corner(&self, square: usize) -> (usize, usize) {
        (square / self.columns * 2, square % self.columns * 2)
    }
}

/// Transforms weights `(O, I, 3, 3)` and packs them as tiles in the order (pair of blocks written,
/// position, block read, block of the pair).
///
/// `nine(from, to, kernels)` fills in the nine weights between a channel that is read and each channel of a
/// block that is written.
pub(super) fn pack<T: ValueElement>(
    from_channels: usize,
    to_channels: usize,
    packed: &mut [T],
    nine: impl Fn(usize, Range<usize>, &mut [Lanes; 9]) + Sync + Send,
) {
    let (from_blocks, to_blocks) = (from_channels.div_ceil(SIDE), to_channels.div_ceil(SIDE));
    let all = POSITIONS * from_blocks * TILE;
    assert_eq!(packed.len(), all * to_blocks);
    parallel::for_each_chunk(packed, 2 * all, 8 * all * to_blocks, |pair, packed| {
        let columns = columns_of(to_blocks, pair);
        with_scratch(POSITIONS * TILE, |scratch| {
            for (column, block) in (0..columns).flat_map(|c| (0..from_blocks).map(move |f| (c, f)))
            {
                let first = (2 * pair + column) * SIDE;
                let lanes = first..(first + SIDE).min(to_channels);
                scratch.fill(0.);
                for from in block * SIDE..((block + 1) * SIDE).min(from_channels) {
                    let mut kernels = [[0.; SIDE]; 9];
                    nine(from, lanes.clone(), &mut kernels);
                    transform_kernels(
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
    fn transform_kernels(g: &[Lanes; 9], to: &mut [f32]) {
        let mut half = [[0f32; SIDE]; 12];
        for x in 0..3 {
            for lane in 0..SIDE {
                let (a, b, c) = (g[x][lane], g[3 + x][lane], g[6 + x][lane]);
                half[x][lane] = a;
                half[3 + x][lane] = 0.5 * (a + b + c);
                half[6 + x][lane] = 0.5 * (a - b + c);
                half[9 + x][lane] = c;
            }
        }
        for y in 0..4 {
            let [a, b, c] = [&half[3 * y], &half[3 * y + 1], &half[3 * y + 2]];
            let first = 4 * y * TILE;
            store(to, first, #[inline(always)] |lane| a[lane]);
            store(to, first + TILE, #[inline(always)] |lane| 0.5 * (a[lane] + b[lane] + c[lane]));
            store(to, first + 2 * TILE, #[inline(always)] |lane| 0.5 * (a[lane] - b[lane] + c[lane]));
            store(to, first + 3 * TILE, #[inline(always)] |lane| c[lane]);
        }
    }
}

/// The largest error of a sum of this many products with factors of at most 1 in magnitude, for an output
/// or, with `weights`, for a weight.
#[cfg(test)]
pub(super) fn bound(precision: Precision, terms: usize, weights: bool) -> f64 {
    let n = if weights { terms } else { terms / 9 } as f64;
    let factor = if weights { 36. } else { 81. };
    let rounded = if precision == Precision::Bf16 { 163. * n * (-8f64).exp2() } else { 0. };
    factor * n * (n + 16.) * (-24f64).exp2() + rounded
}

for_each_variant! {
    /// `Gᵀ m G` of 16 × 16 kernels, in place: from tiles of the 16 positions to tiles of the nine taps.
    pub(super) fn gradients_of_kernels(sums: &mut [f32]) {
        for at in (0..TILE).step_by(SIDE) {
            let mut half = [[0f32; SIDE]; 12];
            for x in 0..4 {
                let [a, b, c, d] =
                    std::array::from_fn(#[inline(always)] |y| row(sums, (4 * y + x) * TILE + at));
                for lane in 0..SIDE {
                    half[x][lane] = a[lane] + 0.5 * (b[lane] + c[lane]);
                    half[4 + x][lane] = 0.5 * (b[lane] - c[lane]);
                    half[8 + x][lane] = 0.5 * (b[lane] + c[lane]) + d[lane];
                }
            }
            for y in 0..3 {
                let [a, b, c, d] = [&half[4 * y], &half[4 * y + 1], &half[4 * y + 2], &half[4 * y + 3]];
                let first = 3 * y * TILE + at;
                store(sums, first, #[inline(always)] |lane| a[lane] + 0.5 * (b[lane] + c[lane]));
                store(sums, first + TILE, #[inline(always)] |lane| 0.5 * (b[lane] - c[lane]));
                store(sums, first + 2 * TILE, #[inline(always)] |lane| 0.5 * (b[lane] + c[lane]) + d[lane]);
            }
        }
    }
}

/// `to (+)= packed ∗ from`, both maps of the same size.
pub(super) fn convolve<T: ValueElement>(
    variant: Variant,
    g: &Geometry,
    (from, from_shape): (&[T], Shape),
    packed: &[T],
    (to, to_shape): (&mut [T], Shape),
    add: bool,
    finish: &FinishOf<T>,
) {
    assert_eq!(from.len(), from_shape.len());
    assert_eq!(to.len(), to_shape.len());
    let (blocks, to_blocks) = (from_shape.blocks(), to_shape.blocks());
    assert_eq!(packed.len(), POSITIONS * blocks * to_blocks * TILE);
    let (pairs, wanted) = (to_blocks.div_ceil(2), 4 * parallel::threads());
    // The split into tasks does not affect the result: no sum crosses a task.
    let bands = Bands::of(to_shape, wanted.div_ceil(to_shape.groups()));
    let squares_tasks = to_shape.groups() * bands.count;
    let pair_tasks = wanted.div_ceil(squares_tasks).min(pairs.div_ceil(2));
    let held = (HELD / (POSITIONS * blocks * TILE * size_of::<T>())).clamp(2, 8);
    let (left_len, sums_len) = (POSITIONS * stride(held * blocks), POSITIONS * stride(2));
    let to = Disjoint::new(to);
    let parts = to_shape.parts() / to_shape.groups();
    parallel::for_each(squares_tasks * pair_tasks, g.operations(), |task| {
        let (task, pair_task) = (task / pair_tasks, task % pair_tasks);
        let (group, band) = (task / bands.count, task % bands.count);
        let pairs = pair_task * pairs / pair_tasks..(pair_task + 1) * pairs / pair_tasks;
        let session = TileSession::begin(variant);
        let squares = bands.squares(band);
        let work = Convolve { session: &session, from, from_shape, packed, to: &to, to_shape, add };
        with_scratch_of::<T, _>(left_len, sums_len, |left, sums| {
            for first in squares.clone().step_by(held) {
                let squares = first..(first + held).min(squares.end);
                work.squares(group, squares, pairs.clone(), left, sums);
            }
        });
        if bands.whole {
            for (part, pair) in bands.parts(band).flat_map(|p| pairs.clone().map(move |q| (p, q))) {
                finish.part(&session, &to, to_shape, group * parts + part, pair);
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

/// A map split into bands of an even number of rows.
struct Bands {
    shape: Shape,
    rows: usize,
    count: usize,
    /// Whether every band consists of whole parts of the map.
    whole: bool,
}

impl Bands {
    /// Bands of whole parts if these are enough tasks, otherwise as many bands as possible.
    fn of(shape: Shape, wanted: usize) -> Bands {
        let whole = |rows: &usize| (rows * shape.width).is_multiple_of(shape.part_pixels());
        let rows = (2..=shape.height).step_by(2).find(whole).unwrap_or(shape.height);
        let count = shape.height.div_ceil(rows);
        if count < wanted {
            return Bands { shape, rows: 2, count: shape.height.div_ceil(2), whole: rows == 2 };
        }
        Bands { shape, rows, count, whole: true }
    }

    fn rows(&self, band: usize) -> Range<usize> {
        band * self.rows..((band + 1) * self.rows).min(self.shape.height)
    }

    fn squares(&self, band: usize) -> Range<usize> {
        let (rows, columns) = (self.rows(band), self.shape.width.div_ceil(2));
        rows.start / 2 * columns..rows.end.div_ceil(2) * columns
    }

    fn parts(&self, band: usize) -> Range<usize> {
        let (rows, part) = (self.rows(band), self.shape.part_pixels());
        rows.start * self.shape.width / part..(rows.end * self.shape.width).div_ceil(part)
    }
}

struct Convolve<'a, T> {
    session: &'a TileSession,
    from: &'a [T],
    from_shape: Shape,
    packed: &'a [T],
    to: &'a Disjoint<'a, T>,
    to_shape: Shape,
    add: bool,
}

impl<T: ValueElement> Convolve<'_, T> {
    /// Transforms some squares of a group, multiplies, and transforms back.
    fn squares(
        &self,
        group: usize,
        squares: Range<usize>,
        pairs: Range<usize>,
        left: &mut [T],
        sums: &mut [f32],
    ) {
        let (blocks, to_blocks) = (self.from_shape.blocks(), self.to_shape.blocks());
        let (map, count) = (Squares::of(self.to_shape), squares.len());
        let (variant, step) = (self.session.variant(), stride(count * blocks));
        for (at, square) in squares.clone().enumerate() {
            let to = &mut left[at * blocks * TILE..];
            let (from, shape, corner) = (self.from, self.from_shape, map.corner(square));
            transform_input(variant, from, shape, group, corner, 0..blocks, to, step);
        }
        for pair in pairs {
            let columns = columns_of(to_blocks, pair);
            let sums_step = stride(columns);
            // The weights of the pair stay in the second-level cache for all squares, and the sums of a few
            // images in the first-level cache from their products to the end.
            for (at, square) in squares.clone().enumerate() {
                for images in (0..SIDE).step_by(NEAR).map(|first| first..first + NEAR) {
                    let left = &left[at * blocks * TILE + images.start * SIDE..];
                    self.multiply(pair, left, step, &mut sums[images.start * SIDE..], sums_step);
                    for column in 0..columns {
                        let (corner, block) = (map.corner(square), 2 * pair + column);
                        let sums = &sums[column * TILE..];
                        self.write(group, corner, block, images.clone(), sums, sums_step);
                    }
                }
            }
        }
    }

    /// Multiplies all positions of some images of a square, for a pair of blocks.
    fn multiply(&self, pair: usize, left: &[T], step: usize, sums: &mut [f32], sums_step: usize) {
        let (blocks, to_blocks) = (self.from_shape.blocks(), self.to_shape.blocks());
        let columns = columns_of(to_blocks, pair);
        for position in 0..POSITIONS {
            let right = (POSITIONS * 2 * pair + position * columns) * blocks * TILE;
            let runs = &[TileRun { left: 0, right, inner: self.from_shape.channels }];
            let product = TileProduct { runs, apart: 0, rows: NEAR, columns, add: false, ahead: 0 };
            let (left, sums) = (&left[position * step..], &mut sums[position * sums_step..]);
            T::product::<false>(self.session, left, self.packed, &product, &mut [sums]);
        }
    }

    /// Writes `Aᵀ m A` of some images of a square and block; the 16 tiles lie `step` numbers apart in
    /// `sums`.
    fn write(
        &self,
        group: usize,
        (y, x): (usize, usize),
        block: usize,
        images: Range<usize>,
        sums: &[f32],
        step: usize,
    ) {
        let shape = self.to_shape;
        let numbers = images.start * SIDE..images.end * SIDE;
        let mut unused = [[T::near(0.); NEAR * SIDE]; 4];
        let mut unused = unused.each_mut().map(Some);
        let outputs = std::array::from_fn(|at| {
            let (y, x) = (y + at / 2, x + at % 2);
            if y >= shape.height || x >= shape.width {
                return unused[at].take().expect("each is taken once");
            }
            let pixel = (group * shape.height + y) * shape.width + x;
            let from = pixel * shape.pixel_len() + block * TILE + numbers.start;
            // SAFETY: a task owns the pixels of its bands, and those of a square differ.
            let rows = unsafe { self.to.part(from, numbers.len()) };
            rows.try_into().expect("NEAR rows")
        });
        let sums = std::array::from_fn(|position| {
            let rows = &sums[position * step..][numbers.clone()];
            rows.try_into().expect("NEAR rows")
        });
        transform_output(self.session.variant(), sums, outputs, self.add);
    }
}

/// Writes `Bᵀ d B` of a square in some blocks of channels; the tiles of the 16 positions lie `step` numbers
/// apart in `to`.
#[expect(clippy::too_many_arguments, reason = "source, position and destination")]
pub(super) fn transform_input<T: ValueElement>(
    variant: Variant,
    from: &[T],
    shape: Shape,
    group: usize,
    (y, x): (usize, usize),
    blocks: Range<usize>,
    to: &mut [T],
    step: usize,
) {
    let pixels: [&[[T; TILE]]; POSITIONS] = std::array::from_fn(|at| {
        let inside = |at: usize, limit: usize| at.checked_sub(1).filter(|at| *at < limit);
        match (inside(y + at / 4, shape.height), inside(x + at % 4, shape.width)) {
            (Some(y), Some(x)) => {
                let pixel = (group * shape.height + y) * shape.width + x;
                let first = pixel * shape.pixel_len() + blocks.start * TILE;
                from[first..first + blocks.len() * TILE].as_chunks().0
            }
            _ => &[],
        }
    });
    for block in 0..blocks.len() {
        // Padding is zero.
        let tiles = pixels.map(|pixel| pixel.get(block).unwrap_or(T::zeros()));
        forward_transform(variant, tiles, positions(&mut to[block * TILE..], step));
    }
}

/// The tiles of the 16 positions, `step` numbers apart.
fn positions<T>(to: &mut [T], step: usize) -> [&mut [T; TILE]; POSITIONS] {
    let mut tiles = to.chunks_mut(step).filter_map(|tiles| tiles.first_chunk_mut());
    std::array::from_fn(|_| tiles.next().expect("room for 16 positions"))
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

/// Computes a row number by number and stores it, rounded.
#[inline(always)]
fn store<T: ValueElement>(to: &mut [T], at: usize, number: impl Fn(usize) -> f32) {
    let to = &mut to[at..at + SIDE];
    let mut row = [0f32; SIDE];
    for (lane, value) in row.iter_mut().enumerate() {
        *value = number(lane);
    }
    for lane in 0..SIDE {
        to[lane] = T::near(row[lane]);
    }
}

for_each_variant! {
    /// `Bᵀ d B`: from the tiles of 4 × 4 pixels to those of 16 positions.
    fn forward_transform<T: ValueElement>(
        tiles: [&[T; TILE]; POSITIONS],
        to: [&mut [T; TILE]; POSITIONS],
    ) {
        for at in (0..TILE).step_by(SIDE) {
            let mut half = [[0f32; SIDE]; POSITIONS];
            for x in 0..4 {
                let (a, b) = (row(tiles[x], at), row(tiles[4 + x], at));
                let (c, d) = (row(tiles[8 + x], at), row(tiles[12 + x], at));
                for lane in 0..SIDE {
                    half[x][lane] = a[lane] - c[lane];
                    half[4 + x][lane] = b[lane] + c[lane];
                    half[8 + x][lane] = c[lane] - b[lane];
                    half[12 + x][lane] = b[lane] - d[lane];
                }
            }
            for y in 0..4 {
                let (a, b) = (&half[4 * y], &half[4 * y + 1]);
                let (c, d) = (&half[4 * y + 2], &half[4 * y + 3]);
                store(to[4 * y], at, #[inline(always)] |lane| a[lane] - c[lane]);
                store(to[4 * y + 1], at, #[inline(always)] |lane| b[lane] + c[lane]);
                store(to[4 * y + 2], at, #[inline(always)] |lane| c[lane] - b[lane]);
                store(to[4 * y + 3], at, #[inline(always)] |lane| b[lane] - d[lane]);
            }
        }
    }
}

for_each_variant! {
    /// `Aᵀ m A`: from rows of the tiles of 16 positions to rows of the tiles of 2 × 2 pixels.
    fn transform_output<T: ValueElement>(
        sums: [&[f32; NEAR * SIDE]; POSITIONS],
        outputs: [&mut [T; NEAR * SIDE]; 4],
        add: bool,
    ) {
        let [first, second, third, fourth] = outputs;
        for at in (0..NEAR * SIDE).step_by(SIDE) {
            let (mut upper, mut lower) = ([[0f32; SIDE]; 4], [[0f32; SIDE]; 4]);
            for x in 0..4 {
                let (a, b) = (row(sums[x], at), row(sums[4 + x], at));
                let (c, d) = (row(sums[8 + x], at), row(sums[12 + x], at));
                for lane in 0..SIDE {
                    upper[x][lane] = a[lane] + b[lane] + c[lane];
                    lower[x][lane] = b[lane] - c[lane] - d[lane];
                }
            }
            for (half, left, right) in
                [(&upper, &mut *first, &mut *second), (&lower, &mut *third, &mut *fourth)]
            {
                let [a, b, c, d] = half;
                let (mut even, mut odd) = ([0f32; SIDE], [0f32; SIDE]);
                for lane in 0..SIDE {
                    even[lane] = a[lane] + b[lane] + c[lane];
                    odd[lane] = b[lane] - c[lane] - d[lane];
                }
                if add {
                    let (old_left, old_right) = (row(left, at), row(right, at));
                    for lane in 0..SIDE {
                        even[lane] += old_left[lane];
                        odd[lane] += old_right[lane];
                    }
                }
                let (left, right) = (&mut left[at..at + SIDE], &mut right[at..at + SIDE]);
                for lane in 0..SIDE {
                    left[lane] = T::narrow(even[lane]);
                    right[lane] = T::narrow(odd[lane]);
                }
            }
        }
    }
}

for_each_variant! {
    /// `A dy Aᵀ`: from the tiles of 2 × 2 pixels to those of 16 positions.
    fn gradient_transform<T: ValueElement>(tiles: [&[T; TILE]; 4], to: [&mut [T; TILE]; POSITIONS]) {
        for at in (0..TILE).step_by(SIDE) {
            let (mut left, mut right) = ([[0f32; SIDE]; 4], [[0f32; SIDE]; 4]);
            for (half, x) in [(&mut left, 0), (&mut right, 1)] {
                let (a, b) = (row(tiles[x], at), row(tiles[2 + x], at));
                for lane in 0..SIDE {
                    half[0][lane] = a[lane];
                    half[1][lane] = a[lane] + b[lane];
                    half[2][lane] = a[lane] - b[lane];
                    half[3][lane] = -b[lane];
                }
            }
            for y in 0..4 {
                let (a, b) = (&left[y], &right[y]);
                store(to[4 * y], at, #[inline(always)] |lane| a[lane]);
                store(to[4 * y + 1], at, #[inline(always)] |lane| a[lane] + b[lane]);
                store(to[4 * y + 2], at, #[inline(always)] |lane| a[lane] - b[lane]);
                store(to[4 * y + 3], at, #[inline(always)] |lane| -b[lane]);
            }
        }
    }
}

/// Writes `A dy Aᵀ` of a square in some blocks of channels; the tiles of the 16 positions lie `step`
/// numbers apart in `to`.
#[expect(clippy::too_many_arguments, reason = "source, position and destination")]
pub(super) fn transform_gradient<T: ValueElement>(
    variant: Variant,
    from: &[T],
    shape: Shape,
    group: usize,
    (y, x): (usize, usize),
    blocks: Range<usize>,
    to: &mut [T],
    step: usize,
) {
    for (at, block) in blocks.enumerate() {
        let tiles = std::array::from_fn(|pixel| {
            let (y, x) = (y + pixel / 2, x + pixel % 2);
            if y >= shape.height || x >= shape.width {
                return T::zeros();
            }
            let pixel = (group * shape.height + y) * shape.width + x;
            let tile = from[pixel * shape.pixel_len() + block * TILE..].first_chunk();
            tile.expect("a tile of a value")
        });
        gradient_transform(variant, tiles, positions(&mut to[at * TILE..], step));
    }
}
