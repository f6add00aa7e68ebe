//! 3×3 convolutions of stride 1 in f32 with 16 multiplications where the plain sum has 36: the
//! minimal filtering F(2×2, 3×3) of Winograd as Lavin & Gray use it (2015, arXiv:1509.09308, Section 4.1).
//!
//! A square of 2 × 2 output pixels needs 4 × 4 input pixels `d`. Both the square and the kernel `g`
//! are brought into a form in which 16 products, position by position, take the place of the sum:
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
//! Summed over channels, the products of each position are a product of matrices. The transforms
//! only add (and halve), and since all images of a tile share a pixel they work on whole tiles. The
//! input gradient is the same with the kernel turned around; the gradient of the kernel is
//! `Gᵀ [Σ (Bᵀ d B) ⊙ (A dy Aᵀ)] G`.
//!
//! **Rounding.** With unit roundoff `u = 2⁻²⁴`, a plain sum of `n` products is off by at most
//! `n u Σ|w x|`. Here a transformed number is the sum of up to 4 of `x` or, with weights up to 9/4
//! in all, 9 of `w`, and a result the sum of 9 products' sums over `C` channels: it is off by at most
//! `81 C (C + 16) u · max|w| · max|x|`, and a weight gradient over `N` pixels by at most
//! `36 N (N + 16) u · max|x| · max|dy|`. These bounds are far off, as such bounds are; the tests hold
//! the error in the mean to less than 4 times that of the plain sum. Not for bfloat16, whose 8 bits
//! would round the transformed numbers again.

#![expect(unsafe_code, reason = "tasks write disjoint tiles of one buffer")]

use std::ops::Range;

use super::gather::Last;
use super::{Geometry, columns_of};
use crate::Variant;
use crate::buffer::with_scratch;
use crate::layout::{SIDE, Shape, TILE};
use crate::parallel::{self, Disjoint};
use crate::tiles::{self, Product, Run, Session};
use crate::variant::for_each_variant;

/// Positions of a transformed square.
pub(super) const POSITIONS: usize = 16;
/// Bytes of transformed squares that a task holds at a time: the second-level cache holds them
/// beside the weights they meet.
const HELD: usize = 512 << 10;
/// Numbers from position to position, for so many tiles: a few cache lines more than these, or all
/// positions of a number would fall into the same sets of the caches.
pub(super) fn stride(tiles: usize) -> usize {
    tiles * TILE + 5 * SIDE
}
/// Tile products between loads of the sums: their right sides stay in the first-level cache.
const CHUNK: usize = 16;

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

/// Weights `(O, I, 3, 3)` in Winograd's form, `weight(from, to)` giving the nine of a channel that
/// is read and one that is written: tiles in the order (pair of blocks written, position, block
/// read, block of the pair).
pub(super) fn pack(
    from_channels: usize,
    to_channels: usize,
    packed: &mut [f32],
    weight: impl Fn(usize, usize) -> [f32; 9] + Sync + Send,
) {
    let (from_blocks, to_blocks) = (from_channels.div_ceil(SIDE), to_channels.div_ceil(SIDE));
    let all = POSITIONS * from_blocks * TILE;
    assert_eq!(packed.len(), all * to_blocks);
    parallel::for_each_chunk(packed, 2 * all, 8 * all * to_blocks, |pair, packed| {
        let columns = columns_of(to_blocks, pair);
        let position = from_blocks * columns * TILE;
        packed.fill(0.);
        for lane in 0..(to_channels - 2 * pair * SIDE).min(columns * SIDE) {
            for from in 0..from_channels {
                let (block, row) = (from / SIDE, from % SIDE);
                let at = (block * columns + lane / SIDE) * TILE + row * SIDE + lane % SIDE;
                let transformed = transform_kernel(weight(from, 2 * pair * SIDE + lane));
                for (to, value) in packed[at..].iter_mut().step_by(position).zip(transformed) {
                    *to = value;
                }
            }
        }
    });
}

/// `G g Gᵀ`.
fn transform_kernel(g: [f32; 9]) -> [f32; POSITIONS] {
    let four = |a: f32, b: f32, c: f32| [a, 0.5 * (a + b + c), 0.5 * (a - b + c), c];
    let columns: [[f32; 4]; 3] = std::array::from_fn(|x| four(g[x], g[3 + x], g[6 + x]));
    let rows =
        std::array::from_fn::<_, 4, _>(|y| four(columns[0][y], columns[1][y], columns[2][y]));
    std::array::from_fn(|at| rows[at / 4][at % 4])
}

/// The most that a result can be off when all factors are at most 1 in size: of a sum of so many
/// products, for an output or, with `weights`, for a weight.
#[cfg(test)]
pub(super) fn bound(terms: usize, weights: bool) -> f64 {
    let n = if weights { terms } else { terms / 9 } as f64;
    let factor = if weights { 36. } else { 81. };
    factor * n * (n + 16.) * (-24f64).exp2()
}

/// `Gᵀ m G` of the 16 sums of a weight.
pub(super) fn gradient_of_kernel(m: [f32; POSITIONS]) -> [f32; 9] {
    let three =
        |a: f32, b: f32, c: f32, d: f32| [a + 0.5 * (b + c), 0.5 * (b - c), 0.5 * (b + c) + d];
    let columns: [[f32; 3]; 4] =
        std::array::from_fn(|x| three(m[x], m[4 + x], m[8 + x], m[12 + x]));
    let rows = std::array::from_fn::<_, 3, _>(|y| {
        three(columns[0][y], columns[1][y], columns[2][y], columns[3][y])
    });
    std::array::from_fn(|at| rows[at / 3][at % 3])
}

/// `to (+)= packed ∗ from`, both maps of the same size.
pub(super) fn convolve(
    variant: Variant,
    g: &Geometry,
    (from, from_shape): (&[f32], Shape),
    packed: &[f32],
    (to, to_shape): (&mut [f32], Shape),
    add: bool,
    last: &Last<f32>,
) {
    assert_eq!(from.len(), from_shape.len());
    assert_eq!(to.len(), to_shape.len());
    let (blocks, to_blocks) = (from_shape.blocks(), to_shape.blocks());
    assert_eq!(packed.len(), POSITIONS * blocks * to_blocks * TILE);
    let bands = Bands::of(to_shape);
    let held = (HELD / (POSITIONS * blocks * TILE * size_of::<f32>())).clamp(2, 8);
    let (left_len, sums_len) = (POSITIONS * stride(held * blocks), POSITIONS * stride(held * 2));
    let to = Disjoint::new(to);
    let parts = to_shape.parts() / to_shape.groups();
    parallel::for_each(to_shape.groups() * bands.count, g.operations(), |task| {
        let (group, band) = (task / bands.count, task % bands.count);
        let session = Session::begin(variant);
        let squares = bands.squares(band);
        let work = Convolve { session: &session, from, from_shape, packed, to: &to, to_shape, add };
        with_scratch(left_len + sums_len, |memory| {
            let (left, sums) = memory.split_at_mut(left_len);
            for first in squares.clone().step_by(held) {
                work.squares(group, first..(first + held).min(squares.end), left, sums);
            }
        });
        for part in bands.parts(band) {
            for pair in 0..to_blocks.div_ceil(2) {
                last.part(&session, &to, to_shape, group * parts + part, pair);
            }
        }
    });
}

/// Rows of a map, an even number each time, that are whole parts of it.
struct Bands {
    shape: Shape,
    rows: usize,
    count: usize,
}

impl Bands {
    fn of(shape: Shape) -> Bands {
        let whole = |rows: &usize| (rows * shape.width).is_multiple_of(shape.part_pixels());
        let rows = (2..=shape.height).step_by(2).find(whole).unwrap_or(shape.height);
        Bands { shape, rows, count: shape.height.div_ceil(rows) }
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

struct Convolve<'a> {
    session: &'a Session,
    from: &'a [f32],
    from_shape: Shape,
    packed: &'a [f32],
    to: &'a Disjoint<'a, f32>,
    to_shape: Shape,
    add: bool,
}

impl Convolve<'_> {
    /// Some squares of a group: transform, multiply, transform back.
    fn squares(&self, group: usize, squares: Range<usize>, left: &mut [f32], sums: &mut [f32]) {
        let (blocks, to_blocks) = (self.from_shape.blocks(), self.to_shape.blocks());
        let (map, count) = (Squares::of(self.to_shape), squares.len());
        let (variant, step) = (self.session.variant(), stride(count * blocks));
        for (at, square) in squares.clone().enumerate() {
            let to = &mut left[at * blocks * TILE..];
            let (from, shape, corner) = (self.from, self.from_shape, map.corner(square));
            transform_input(variant, from, shape, group, corner, 0..blocks, to, step);
        }
        for pair in 0..to_blocks.div_ceil(2) {
            let columns = columns_of(to_blocks, pair);
            let sums_step = stride(count * columns);
            for position in 0..POSITIONS {
                let sums = &mut sums[position * sums_step..];
                self.multiply(position, pair, count, &left[position * step..], sums);
            }
            for (at, square) in squares.clone().enumerate() {
                for column in 0..columns {
                    let sums = &sums[(at * columns + column) * TILE..];
                    self.write(group, map.corner(square), 2 * pair + column, sums, sums_step);
                }
            }
        }
    }

    /// One position of some squares, in a pair of blocks.
    fn multiply(&self, position: usize, pair: usize, count: usize, left: &[f32], sums: &mut [f32]) {
        let (blocks, to_blocks) = (self.from_shape.blocks(), self.to_shape.blocks());
        let columns = columns_of(to_blocks, pair);
        let panel = (POSITIONS * 2 * pair + position * columns) * blocks * TILE;
        for begin in (0..blocks).step_by(CHUNK) {
            let end = (begin + CHUNK).min(blocks);
            let inner = (self.from_shape.channels - begin * SIDE).min((end - begin) * SIDE);
            for (at, output) in sums.chunks_mut(columns * TILE).take(count).enumerate() {
                let run = Run {
                    left: (at * blocks + begin) * TILE,
                    right: panel + begin * columns * TILE,
                    inner,
                };
                let (runs, add) = (&[run], begin > 0);
                let product = Product { runs, apart: 0, rows: SIDE, columns, add };
                tiles::product::<false>(self.session, left, self.packed, &product, &mut [output]);
            }
        }
    }

    /// `Aᵀ m A` of one square and block; `sums` holds the 16 tiles so far apart.
    fn write(&self, group: usize, (y, x): (usize, usize), block: usize, sums: &[f32], step: usize) {
        let shape = self.to_shape;
        let mut nowhere = [[0f32; TILE]; 4];
        let mut nowhere = nowhere.each_mut().map(|tile| Some(&mut tile[..]));
        let outputs = std::array::from_fn(|at| {
            let (y, x) = (y + at / 2, x + at % 2);
            if y >= shape.height || x >= shape.width {
                return nowhere[at].take().expect("each is taken once");
            }
            let pixel = (group * shape.height + y) * shape.width + x;
            // SAFETY: a task owns its bands' pixels, and those of a square differ.
            unsafe { self.to.part(pixel * shape.pixel_len() + block * TILE, TILE) }
        });
        let sums = std::array::from_fn(|position| &sums[position * step..][..TILE]);
        transform_output(self.session.variant(), sums, outputs, self.add);
    }
}

/// `Bᵀ d B` of one square in some blocks of channels; the tiles of the 16 positions lie `step`
/// numbers apart in `to`.
#[expect(clippy::too_many_arguments, reason = "what is read, where, and what is written")]
pub(super) fn transform_input(
    variant: Variant,
    from: &[f32],
    shape: Shape,
    group: usize,
    (y, x): (usize, usize),
    blocks: Range<usize>,
    to: &mut [f32],
    step: usize,
) {
    let pixels: [&[f32]; POSITIONS] = std::array::from_fn(|at| {
        let inside = |at: usize, limit: usize| at.checked_sub(1).filter(|at| *at < limit);
        match (inside(y + at / 4, shape.height), inside(x + at % 4, shape.width)) {
            (Some(y), Some(x)) => {
                let pixel = (group * shape.height + y) * shape.width + x;
                &from[pixel * shape.pixel_len() + blocks.start * TILE..][..blocks.len() * TILE]
            }
            _ => &[],
        }
    });
    for block in 0..blocks.len() {
        let tiles = pixels.map(|pixel| pixel.get(block * TILE..(block + 1) * TILE));
        forward_transform(
            variant,
            tiles.map(|tile| tile.unwrap_or(&ZEROS)),
            &mut to[block * TILE..],
            step,
        );
    }
}

/// What lies beyond the border.
static ZEROS: [f32; TILE] = [0.; TILE];

/// 16 numbers that are treated alike.
type Row = [f32; SIDE];

#[inline(always)]
fn row(from: &[f32], at: usize) -> &Row {
    from[at..at + SIDE].try_into().expect("a slice of 16 has 16 numbers")
}

/// Stores a row made number by number.
#[inline(always)]
fn store(to: &mut [f32], at: usize, number: impl Fn(usize) -> f32) {
    let mut row = [0f32; SIDE];
    for (lane, value) in row.iter_mut().enumerate() {
        *value = number(lane);
    }
    to[at..at + SIDE].copy_from_slice(&row);
}

for_each_variant! {
    /// `Bᵀ d B` of a tile of each of 4 × 4 pixels.
    fn forward_transform(tiles: [&[f32]; POSITIONS], to: &mut [f32], step: usize) {
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
                let first = 4 * y * step + at;
                store(to, first, #[inline(always)] |lane| a[lane] - c[lane]);
                store(to, first + step, #[inline(always)] |lane| b[lane] + c[lane]);
                store(to, first + 2 * step, #[inline(always)] |lane| c[lane] - b[lane]);
                store(to, first + 3 * step, #[inline(always)] |lane| b[lane] - d[lane]);
            }
        }
    }
}

for_each_variant! {
    /// `Aᵀ m A` of a tile of each of 16 positions, to a tile of each of 2 × 2 pixels.
    fn transform_output(sums: [&[f32]; POSITIONS], outputs: [&mut [f32]; 4], add: bool) {
        let [first, second, third, fourth] = outputs;
        for at in (0..TILE).step_by(SIDE) {
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
                    let (before, behind) = (row(left, at), row(right, at));
                    for lane in 0..SIDE {
                        even[lane] += before[lane];
                        odd[lane] += behind[lane];
                    }
                }
                left[at..at + SIDE].copy_from_slice(&even);
                right[at..at + SIDE].copy_from_slice(&odd);
            }
        }
    }
}

for_each_variant! {
    /// `A dy Aᵀ` of a tile of each of 2 × 2 pixels; the tiles of the positions lie `step` numbers
    /// apart in `to`.
    fn gradient_transform(tiles: [&[f32]; 4], to: &mut [f32], step: usize) {
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
                let first = 4 * y * step + at;
                store(to, first, #[inline(always)] |lane| a[lane]);
                store(to, first + step, #[inline(always)] |lane| a[lane] + b[lane]);
                store(to, first + 2 * step, #[inline(always)] |lane| a[lane] - b[lane]);
                store(to, first + 3 * step, #[inline(always)] |lane| -b[lane]);
            }
        }
    }
}

/// `A dy Aᵀ` of one square in some blocks of channels; the tiles of the 16 positions lie `step`
/// numbers apart in `to`.
#[expect(clippy::too_many_arguments, reason = "what is read, where, and what is written")]
pub(super) fn transform_gradient(
    variant: Variant,
    from: &[f32],
    shape: Shape,
    group: usize,
    (y, x): (usize, usize),
    blocks: Range<usize>,
    to: &mut [f32],
    step: usize,
) {
    for (at, block) in blocks.enumerate() {
        let tiles = std::array::from_fn(|pixel| {
            let (y, x) = (y + pixel / 2, x + pixel % 2);
            if y >= shape.height || x >= shape.width {
                return &ZEROS[..];
            }
            let pixel = (group * shape.height + y) * shape.width + x;
            &from[pixel * shape.pixel_len() + block * TILE..][..TILE]
        });
        gradient_transform(variant, tiles, &mut to[at * TILE..], step);
    }
}
