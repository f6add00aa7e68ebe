//! Weight gradient: parts of the pixels are summed apart and added in order.
#![expect(unsafe_code, reason = "tasks write disjoint tiles of one buffer")]

use std::sync::Arc;

use super::{Geometry, columns_of};
use crate::layout::{SIDE, TILE};
use crate::number::{Half, Number};
use crate::parallel::{self, Disjoint};
use crate::tiles::{Pair, Sum};
use crate::variant::for_each_variant;
use crate::{Buffer, Pool, Precision, Variant};

/// Pixels of a group summed at a time, so that both sides stay in the first-level cache for all
/// taps.
const SEGMENT: usize = 8;
/// Independent tasks wanted, whatever the number of threads.
const TASKS: usize = 32;

/// `gradient += inputᵀ · output_gradient`: adds the gradient of the weights `(O, I, K, K)`.
///
/// # Panics
///
/// When a slice has another length than the geometry says.
pub fn weight_gradient(
    variant: Variant,
    g: &Geometry,
    input: &Buffer,
    output_gradient: &Buffer,
    pool: &Arc<Pool>,
    gradient: &mut [f32],
) {
    assert_eq!(input.len(), g.input.len());
    assert_eq!(output_gradient.len(), g.output.len());
    assert_eq!(gradient.len(), g.weights_len());
    let tasks = WeightTasks::new(g);
    let mut scratch = pool.take(g.packed_len() * tasks.parts);
    match input.precision() {
        Precision::F32 => {
            tasks.run(variant, f32::of(input), f32::of(output_gradient), &mut scratch);
        }
        Precision::Bf16 => {
            let input = pair_images(variant, pool, input);
            let output_gradient = pair_images(variant, pool, output_gradient);
            let (input, output_gradient) = (Half::of(&input), Half::of(&output_gradient));
            tasks.run(variant, input, output_gradient, &mut scratch);
        }
    }
    tasks.merge(&scratch, gradient);
}

/// A copy whose tiles hold two images' numbers of a channel side by side, as the product of
/// bfloat16 tiles wants its inner side.
fn pair_images(variant: Variant, pool: &Arc<Pool>, values: &Buffer) -> Buffer {
    let mut paired = pool.take_of(Precision::Bf16, values.len());
    let (from, to) = (Half::of(values), Half::of_mut(&mut paired));
    let len = 16 * TILE;
    parallel::for_each_chunk(to, len, from.len(), |at, to| {
        pair_rows(variant, &from[at * len..][..to.len()], to);
    });
    paired
}

for_each_variant! {
    fn pair_rows(from: &[Half], to: &mut [Half]) {
        let rows = from.chunks_exact(2 * SIDE).zip(to.chunks_exact_mut(2 * SIDE));
        for (from, to) in rows {
            for lane in 0..SIDE {
                to[2 * lane] = from[lane];
                to[2 * lane + 1] = from[SIDE + lane];
            }
        }
    }
}

/// How a weight gradient is cut: (part of the pixels, block of input channels, pair of blocks of
/// output channels). By shape alone, since parts are added afterwards.
struct WeightTasks<'a> {
    g: &'a Geometry,
    parts: usize,
    pairs: usize,
    /// Segments of at most [`SEGMENT`] pixels over all groups.
    segments: usize,
    segments_per_row: usize,
    rows_per_segment: usize,
}

impl<'a> WeightTasks<'a> {
    fn new(g: &'a Geometry) -> Self {
        let pairs = g.output.blocks().div_ceil(2);
        let segments_per_row = g.output.width.div_ceil(SEGMENT);
        let rows_per_segment = (SEGMENT / g.output.width).max(1);
        let rows = g.output.groups() * g.output.height;
        let segments = rows.div_ceil(rows_per_segment) * segments_per_row;
        let tiles = g.input.blocks() * pairs;
        let parts = TASKS.div_ceil(tiles).min(segments);
        WeightTasks { g, parts, pairs, segments, segments_per_row, rows_per_segment }
    }

    /// Sums every part into its place in the scratch.
    fn run<T: Number>(
        &self,
        variant: Variant,
        input: &[T],
        output_gradient: &[T],
        scratch: &mut [f32],
    ) {
        let all = Disjoint::new(scratch);
        parallel::for_each(self.count(), self.g.operations(), |task| {
            let (at, len) = self.tiles(task);
            // SAFETY: `tiles` gives every task its own place.
            let tiles = unsafe { all.part(at, len) };
            self.sum(variant, task, input, output_gradient, tiles);
        });
    }

    fn count(&self) -> usize {
        self.parts * self.g.input.blocks() * self.pairs
    }

    /// Where a task's sums lie in the scratch: (tap, output block of the pair) tiles in a row.
    fn tiles(&self, task: usize) -> (usize, usize) {
        let (inputs, taps) = (self.g.input.blocks(), self.g.taps());
        let (pair, rest) = (task % self.pairs, task / self.pairs);
        let blocks = self.g.output.blocks();
        let columns = columns_of(blocks, pair);
        // `rest` counts (part, input block): each has one tile a tap and output block.
        debug_assert!(rest < self.parts * inputs);
        ((rest * blocks + 2 * pair) * taps * TILE, columns * taps * TILE)
    }

    /// Sums one part of the pixels for one block of input and one pair of output channels.
    fn sum<T: Number>(
        &self,
        variant: Variant,
        task: usize,
        input: &[T],
        output_gradient: &[T],
        tiles: &mut [f32],
    ) {
        let g = self.g;
        let (pair, rest) = (task % self.pairs, task / self.pairs);
        let (block, part) = (rest % g.input.blocks(), rest / g.input.blocks());
        let columns = columns_of(g.output.blocks(), pair);
        let sum = Sum { rows: g.input.channels_in(block), columns, add: true };
        let segments = part * self.segments / self.parts..(part + 1) * self.segments / self.parts;
        tiles.fill(0.);
        let mut list = Vec::with_capacity(SEGMENT);
        for segment in segments {
            for tap in 0..g.taps() {
                list.clear();
                self.meet(segment, tap, block, pair, &mut list);
                if !list.is_empty() {
                    let tile = &mut tiles[tap * columns * TILE..][..columns * TILE];
                    T::product::<true>(variant, input, output_gradient, &list, tile, sum);
                }
            }
        }
    }

    /// The pixels of a segment whose tap lies inside the input.
    fn meet(&self, segment: usize, tap: usize, block: usize, pair: usize, list: &mut Vec<Pair>) {
        let g = self.g;
        let (tap_y, tap_x) = (tap / g.kernel, tap % g.kernel);
        let begin = segment % self.segments_per_row * SEGMENT;
        let end = (begin + SEGMENT).min(g.output.width);
        let first_row = segment / self.segments_per_row * self.rows_per_segment;
        let rows = g.output.groups() * g.output.height;
        for row in first_row..(first_row + self.rows_per_segment).min(rows) {
            let (group, y) = (row / g.output.height, row % g.output.height);
            let Some(from_y) = (y * g.stride + tap_y).checked_sub(g.padding) else { continue };
            if from_y >= g.input.height {
                continue;
            }
            for x in begin..end {
                let Some(from_x) = (x * g.stride + tap_x).checked_sub(g.padding) else { continue };
                if from_x >= g.input.width {
                    break;
                }
                let from = (group * g.input.height + from_y) * g.input.width + from_x;
                list.push(Pair {
                    left: from * g.input.pixel_len() + block * TILE,
                    right: (row * g.output.width + x) * g.output.pixel_len() + 2 * pair * TILE,
                    depth: SIDE,
                });
            }
        }
    }

    /// Adds the parts in order, and the sum to the gradient.
    fn merge(&self, scratch: &[f32], gradient: &mut [f32]) {
        let g = self.g;
        let (inputs, taps) = (g.input.channels, g.taps());
        let per_block = SIDE * inputs * taps;
        parallel::for_each_chunk(gradient, per_block, scratch.len(), |block, gradient| {
            let mut totals = vec![0f32; taps * TILE];
            for input_block in 0..g.input.blocks() {
                self.total(scratch, input_block, block, &mut totals);
                let first = input_block * SIDE * taps;
                let len = g.input.channels_in(input_block) * taps;
                for (lane, gradient) in gradient.chunks_exact_mut(inputs * taps).enumerate() {
                    let rows = gradient[first..first + len].chunks_exact_mut(taps);
                    for (row, gradient) in rows.enumerate() {
                        let totals = totals[row * SIDE + lane..].iter().step_by(TILE);
                        for (gradient, total) in gradient.iter_mut().zip(totals) {
                            *gradient += total;
                        }
                    }
                }
            }
        });
    }

    /// The sum over parts of the tiles, one a tap, of a block of input and of output channels.
    fn total(&self, scratch: &[f32], input_block: usize, block: usize, totals: &mut [f32]) {
        let (blocks, taps) = (self.g.output.blocks(), self.g.taps());
        let (pair, column) = (block / 2, block % 2);
        let columns = columns_of(blocks, pair);
        let first = (input_block * blocks + 2 * pair) * taps + column;
        totals.fill(0.);
        for part in scratch.chunks_exact(self.g.packed_len()) {
            for (tap, totals) in totals.chunks_exact_mut(TILE).enumerate() {
                let part = &part[(first + tap * columns) * TILE..][..TILE];
                for (total, value) in totals.iter_mut().zip(part) {
                    *total += value;
                }
            }
        }
    }
}
