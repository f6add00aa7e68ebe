//! Convolutions of few channels on a tile unit, such as the first one, which reads a picture.
//!
//! The unit multiplies 32 numbers of the inner side at once. So all taps of a row of the kernel are taken together:
//! 7 taps of 3 channels are 21 numbers, and a kernel of 7 × 7 needs 7 products instead of 49.
//!
//! Forward, each image has the pixels of a row next to each other, and a product reads 32 numbers from the first pixel
//! that its taps meet; the weights are zero beyond the last tap. For the weight gradient, whose inner side are images, the
//! taps and channels are rows: each is a copy of the pixels of a row that the tap meets.

use std::ops::Range;
use std::sync::Arc;

use super::finish::FinishOf;
use super::packed::arrange_right;
use super::strips::StripLayout;
use super::{Geometry, columns_of};
use crate::buffer::{with_scratch, with_scratch_of};
use crate::element::{Half, strips_into};
use crate::layout::{SIDE, TILE};
use crate::parallel::{self, Disjoint};
use crate::tiles::{StripProduct, TileOrder, TileRun, TileSession, product_of_strips};
use crate::{BufferPool, Precision, Variant};

/// Numbers along the inner side of one product of the unit.
const INNER: usize = 2 * SIDE;
/// Rows of output pixels whose source is arranged at a time.
const ROWS: usize = 8;
/// Parts of the pixels that the weight gradient sums separately, independent of the number of threads.
const PARTS: usize = 32;
/// Pixels of a row that the weight gradient sums at a time.
const SEGMENT: usize = 32;

/// Whether the products of a convolution take this form.
pub(super) fn applies(g: &Geometry, variant: Variant, precision: Precision) -> bool {
    let taken = 2..=INNER / g.input.channels.max(1);
    TileOrder::of(variant, precision).is_paired() && taken.contains(&g.kernel)
}

/// Numbers in the packed weights.
pub(super) fn packed_len(kernel: usize, out_channels: usize) -> usize {
    kernel * 2 * out_channels.div_ceil(SIDE) * TILE
}

/// Packs weights `(O, I, K, K)` in the order (pair of output blocks, row of the kernel, block of the pair, column of the
/// kernel × channel): for each row, 32 numbers along the inner side.
pub(super) fn pack(
    kernel: usize,
    [in_channels, out_channels]: [usize; 2],
    weights: &[f32],
    packed: &mut [Half],
) {
    let blocks = out_channels.div_ceil(SIDE);
    for (pair, packed) in packed.chunks_mut(kernel * 4 * TILE).enumerate() {
        let columns = columns_of(blocks, pair);
        for (row, packed) in packed.chunks_exact_mut(2 * columns * TILE).enumerate() {
            let tiles = (0..columns).flat_map(|column| [(column, 0), (column, 1)]);
            for ((column, half), to) in tiles.zip(packed.chunks_exact_mut(TILE)) {
                let mut tile = [0f32; TILE];
                let first = (2 * pair + column) * SIDE;
                for out in first..(first + SIDE).min(out_channels) {
                    for inner in half * SIDE..((half + 1) * SIDE).min(kernel * in_channels) {
                        let (tap, channel) = (inner / in_channels, inner % in_channels);
                        let weight = ((out * in_channels + channel) * kernel + row) * kernel + tap;
                        tile[inner % SIDE * SIDE + out - first] = weights[weight];
                    }
                }
                arrange_right(Variant::fastest(), &tile, to);
            }
        }
    }
}

/// Rows of the source, each as (image, pixel, channel), with zeros left and right.
struct SourceRows<'a> {
    g: &'a Geometry,
    /// Numbers in a row of one image.
    len: usize,
}

impl SourceRows<'_> {
    fn new(g: &Geometry) -> SourceRows<'_> {
        let channels = g.input.channels;
        let read = (g.output.width - 1) * g.stride * channels + INNER;
        // A pixel is copied with a number of the next one.
        let written = (g.padding + g.input.width) * channels + 1;
        let lines = read.max(written).div_ceil(INNER);
        // An odd number of cache lines, so that the rows of 16 images do not displace each other.
        SourceRows { g, len: (lines | 1) * INNER }
    }

    /// Arranges some rows, counted over all groups.
    fn arrange(&self, from: &[Half], rows: Range<usize>, to: &mut [Half]) {
        let (shape, channels) = (self.g.input, self.g.input.channels);
        to.fill(Half(0));
        for (row, to) in rows.zip(to.chunks_exact_mut(SIDE * self.len)) {
            let pixels = &from[row * shape.width * TILE..][..shape.width * TILE];
            for (x, pixel) in pixels.chunks_exact(TILE).enumerate() {
                let at = (self.g.padding + x) * channels;
                let images = pixel.chunks_exact(SIDE).zip(to.chunks_exact_mut(self.len));
                for (from, to) in images {
                    if channels == 3 {
                        // One word: the fourth number is zero, and where the next pixel goes.
                        to[at..at + 4].copy_from_slice(&from[..4]);
                    } else {
                        to[at..at + channels].copy_from_slice(&from[..channels]);
                    }
                }
            }
        }
    }
}

/// Rows of the input that a row of outputs meets, as (row of the kernel, row of the input).
fn rows_met(g: &Geometry, row: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..g.kernel).filter_map(move |tap| Some((tap, g.row_met(row, tap)?)))
}

/// The rows of the input from the first to the last that some rows of outputs meet.
fn rows_read(g: &Geometry, rows: Range<usize>) -> Range<usize> {
    let all = rows.flat_map(|row| rows_met(g, row)).map(|(_, row)| row);
    let ends = all.fold(None, |ends: Option<(usize, usize)>, row| {
        Some(ends.map_or((row, row), |(first, last)| (first.min(row), last.max(row))))
    });
    ends.map_or(0..0, |(first, last)| first..last + 1)
}

/// `output = finish(weights ∗ input)`.
pub(super) fn forward(
    variant: Variant,
    g: &Geometry,
    from: &[Half],
    packed: &[Half],
    to: &mut [Half],
    finish: &FinishOf<Half>,
) {
    assert_eq!(from.len(), g.input.len());
    assert_eq!(to.len(), g.output.len());
    assert_eq!(packed.len(), packed_len(g.kernel, g.output.channels));
    let (shape, rows) = (g.output, SourceRows::new(g));
    let parts = shape.parts();
    let wanted = 4 * rayon::current_num_threads();
    // The split into tasks does not affect the result: no sum crosses a task.
    let per_task = parts.div_ceil(wanted).max(1);
    let at_once = (ROWS * shape.width).div_ceil(shape.part_pixels()).min(per_task);
    let to = Disjoint::new(to);
    parallel::for_each(parts.div_ceil(per_task), g.operations(), |task| {
        let session = TileSession::begin(variant);
        let end = ((task + 1) * per_task).min(parts);
        for first in (task * per_task..end).step_by(at_once) {
            let parts = first..(first + at_once).min(end);
            let read = rows_read(g, shape.rows_of_parts(&parts));
            with_scratch_of::<Half, _>(read.len() * SIDE * rows.len, 0, |source, _| {
                rows.arrange(from, read.clone(), source);
                let work = ForwardParts { g, rows: &rows, source, first_row: read.start, packed };
                for part in parts {
                    for pair in 0..shape.blocks().div_ceil(2) {
                        work.sum(&session, part, pair, &to);
                        finish.part(&session, &to, shape, part, pair);
                    }
                }
            });
        }
    });
}

struct ForwardParts<'a> {
    g: &'a Geometry,
    rows: &'a SourceRows<'a>,
    source: &'a [Half],
    /// The first row of the source, counted over all groups.
    first_row: usize,
    packed: &'a [Half],
}

impl ForwardParts<'_> {
    /// Computes two blocks of channels of every pixel of a part: two neighbours in a row at a time.
    fn sum(&self, session: &TileSession, part: usize, pair: usize, to: &Disjoint<Half>) {
        let (g, shape) = (self.g, self.g.output);
        let columns = columns_of(shape.blocks(), pair);
        let (group, mut pixels) = shape.part(part);
        let mut runs = Vec::with_capacity(g.kernel);
        while let Some(pixel) = pixels.next() {
            let (y, x) = (pixel / shape.width, pixel % shape.width);
            let met = rows_met(g, group * shape.height + y);
            runs.clear();
            runs.extend(met.map(|(tap, row)| TileRun {
                left: (row - self.first_row) * SIDE * self.rows.len
                    + x * g.stride * g.input.channels,
                right: (2 * pair * g.kernel + tap * columns) * 2 * TILE,
                inner: INNER,
            }));
            let has_other = x + 1 < shape.width && !pixels.is_empty();
            let place = |pixel: usize| {
                let at = (group * shape.pixels() + pixel) * shape.pixel_len() + 2 * pair * TILE;
                // SAFETY: a task owns its parts, and the two pixels differ.
                #[expect(unsafe_code, reason = "tasks write disjoint pixels of one buffer")]
                unsafe {
                    to.part(at, columns * TILE)
                }
            };
            let product = StripProduct {
                runs: &runs,
                left_row: self.rows.len,
                apart: g.stride * g.input.channels,
                column: 2 * TILE,
                columns,
                add: false,
            };
            let other = has_other.then(|| place(pixel + 1));
            if has_other {
                pixels.next();
            }
            strips_into(session, self.source, self.packed, &product, place(pixel), other);
        }
    }
}

/// Adds the gradient of the weights `(O, I, K, K)`.
pub(super) fn weight_gradient(
    variant: Variant,
    g: &Geometry,
    input: &[Half],
    output_gradient: &[Half],
    pool: &Arc<BufferPool>,
    gradient: &mut [f32],
) {
    let sums = GradientSums::new(g);
    let rows = g.output.groups() * g.output.height;
    let parts = PARTS.min(rows);
    let mut scratch = pool.take(parts * sums.len());
    let all = Disjoint::new(&mut scratch);
    parallel::for_each(parts, g.operations(), |part| {
        let session = TileSession::begin(variant);
        // SAFETY: each task has a part of its own.
        #[expect(unsafe_code, reason = "tasks write disjoint parts of one buffer")]
        let to = unsafe { all.part(part * sums.len(), sums.len()) };
        to.fill(0.);
        let rows = part * rows / parts..(part + 1) * rows / parts;
        sums.sum(&session, rows, input, output_gradient, pool, to);
    });
    sums.merge(&scratch, gradient);
}

/// Sums of the weight gradient: for each row of the kernel and pair of output blocks, tiles of (column of the kernel ×
/// channel) × output channels.
struct GradientSums<'a> {
    g: &'a Geometry,
    layout: StripLayout<'a>,
    /// Blocks of 16 of (column of the kernel × channel): 1 or 2.
    sides: usize,
}

impl<'a> GradientSums<'a> {
    fn new(g: &'a Geometry) -> GradientSums<'a> {
        let sides = (g.kernel * g.input.channels).div_ceil(SIDE);
        GradientSums { g, layout: StripLayout::new(g), sides }
    }

    fn len(&self) -> usize {
        self.g.kernel * self.sides * self.g.output.blocks() * TILE
    }

    /// Where the tiles of a row of the kernel and a pair begin: (side, block of the pair).
    fn tiles(&self, tap: usize, pair: usize) -> usize {
        (tap * self.g.output.blocks() + 2 * pair) * self.sides * TILE
    }

    /// Adds some rows of pixels, counted over all groups.
    fn sum(
        &self,
        session: &TileSession,
        rows: Range<usize>,
        input: &[Half],
        output_gradient: &[Half],
        pool: &Arc<BufferPool>,
        to: &mut [f32],
    ) {
        let (g, layout, variant) = (self.g, self.layout, session.variant());
        let blocks = 0..g.output.blocks();
        let row_len = layout.width * SIDE;
        let (plain_len, left_len) = (layout.left_len(1), self.sides * SIDE * row_len);
        let right_len = blocks.len() * layout.column();
        let most = (ROWS - 1) * g.stride + g.kernel;
        let memory = |len: usize| pool.take_of(Precision::Bf16, len);
        let (mut plain, mut left) = (memory(plain_len), memory(most * left_len));
        let mut right = memory(ROWS * right_len);
        let (plain, left, right) = (plain.halves_mut(), left.halves_mut(), right.halves_mut());
        let mut first = rows.start;
        while first < rows.end {
            // Not beyond a group, so that the rows between two groups are not read.
            let group_end = (first / g.output.height + 1) * g.output.height;
            let strip = first..(first + ROWS).min(rows.end).min(group_end);
            let read = rows_read(g, strip.clone());
            for (row, to) in read.clone().zip(left.chunks_exact_mut(left_len)) {
                layout.arrange_left(variant, input, row, &(0..1), plain);
                self.copy_taps(plain, to);
            }
            for (row, to) in strip.clone().zip(right.chunks_exact_mut(right_len)) {
                layout.arrange_right(variant, output_gradient, row, &blocks, to);
            }
            self.add(session, strip.clone(), read.start, left, right, to);
            first = strip.end;
        }
    }

    /// Copies the pixels that each tap and channel meets at the outputs of a row.
    fn copy_taps(&self, plain: &[Half], to: &mut [Half]) {
        let (g, channels, layout) = (self.g, self.g.input.channels, self.layout);
        let rows = to.chunks_exact_mut(layout.width * SIDE).enumerate();
        for (inner, to) in rows {
            if inner >= g.kernel * channels {
                to.fill(Half(0));
                continue;
            }
            let (tap, channel) = (inner / channels, inner % channels);
            let from = channel * layout.left_row() + layout.left(0, tap);
            to.copy_from_slice(&plain[from..from + to.len()]);
        }
    }

    fn add(
        &self,
        session: &TileSession,
        strip: Range<usize>,
        first_read: usize,
        left: &[Half],
        right: &[Half],
        to: &mut [f32],
    ) {
        let (g, layout) = (self.g, self.layout);
        let row_len = layout.width * SIDE;
        let (left_len, right_len) =
            (self.sides * SIDE * row_len, g.output.blocks() * layout.column());
        let mut runs = Vec::with_capacity(ROWS);
        let segments = (0..layout.width).step_by(SEGMENT);
        for (begin, tap) in segments.flat_map(|begin| (0..g.kernel).map(move |tap| (begin, tap))) {
            runs.clear();
            for row in strip.clone() {
                let Some(read) = g.row_met(row, tap) else { continue };
                runs.push(TileRun {
                    left: (read - first_read) * left_len + begin * SIDE,
                    right: (row - strip.start) * right_len + begin * TILE,
                    inner: SEGMENT.min(layout.width - begin) * SIDE,
                });
            }
            for pair in 0..g.output.blocks().div_ceil(2) {
                let columns = columns_of(g.output.blocks(), pair);
                let product = StripProduct {
                    runs: &runs,
                    left_row: row_len,
                    apart: SIDE * row_len,
                    column: layout.column(),
                    columns,
                    add: true,
                };
                let right = &right[2 * pair * layout.column()..];
                let tiles = &mut to[self.tiles(tap, pair)..][..self.sides * columns * TILE];
                let (a, b) = tiles.split_at_mut(columns * TILE);
                if b.is_empty() {
                    product_of_strips(session, left, right, &product, &mut [a]);
                } else {
                    product_of_strips(session, left, right, &product, &mut [a, b]);
                }
            }
        }
    }

    /// Adds the parts in order, and the sum to the gradient.
    fn merge(&self, scratch: &[f32], gradient: &mut [f32]) {
        let (g, inputs) = (self.g, self.g.input.channels);
        with_scratch(self.len(), |totals| {
            totals.fill(0.);
            for part in scratch.chunks_exact(self.len()) {
                totals.iter_mut().zip(part).for_each(|(total, part)| *total += part);
            }
            for (at, gradient) in gradient.iter_mut().enumerate() {
                let (tap, row) = (at % g.kernel, at / g.kernel % g.kernel);
                let weight = at / (g.kernel * g.kernel);
                let (channel, out) = (weight % inputs, weight / inputs);
                let (inner, pair) = (tap * inputs + channel, out / SIDE / 2);
                let columns = columns_of(g.output.blocks(), pair);
                let tile = inner / SIDE * columns + out / SIDE % 2;
                let place = inner % SIDE * SIDE + out % SIDE;
                *gradient += totals[self.tiles(row, pair) + tile * TILE + place];
            }
        });
    }
}
