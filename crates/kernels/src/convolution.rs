//! Convolutions: any kernel, stride and padding, forward and both gradients.
//!
//! An output pixel of a group of 16 images is a sum of tile products over the taps that meet the
//! input and the blocks of input channels. Taps beyond the border are left out, so nothing is
//! copied or padded: on a map of one pixel a 3×3 convolution costs one tap, not nine. The input
//! gradient is the same sum with taps and channels turned around; with a stride, each input pixel
//! meets only the taps of its own parity.
#![expect(unsafe_code, reason = "tasks write disjoint pixels or tiles of one buffer")]

use std::ops::Range;

use crate::layout::{SIDE, TILE};
use crate::linear::add_to_rows;
use crate::norm::{MOMENT_BLOCK, add_moments, moments_len};
use crate::parallel::{self, Disjoint};
use crate::tiles::{Pair, Sum, product};
use crate::{Shape, Variant};

/// Tile products between loads of the sums: 16 pairs of right tiles fill 32 KiB of first-level
/// cache and serve every pixel of a task before the next 16 come.
const CHUNK: usize = 16;
/// Pixels of a group summed at a time in the weight gradient, for the same reason.
const SEGMENT: usize = 8;
/// Independent tasks wanted of a weight gradient, whatever the number of threads.
const WEIGHT_TASKS: usize = 32;

/// A convolution between two values of known extent. A linear layer is one with kernel 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// What it reads.
    pub input: Shape,
    /// What it writes.
    pub output: Shape,
    /// Side of the square kernel, in pixels.
    pub kernel: usize,
    /// Input pixels from one output pixel to the next.
    pub stride: usize,
    /// Zero pixels added on each side.
    pub padding: usize,
}

impl Geometry {
    /// The convolution of `input` to `channels` channels, or `None` when no output pixel is left
    /// or kernel or stride is 0.
    pub fn new(
        input: Shape,
        channels: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Option<Geometry> {
        let height = output_side(input.height, kernel, stride, padding)?;
        let width = output_side(input.width, kernel, stride, padding)?;
        let output = Shape { height, width, channels, ..input };
        Some(Geometry { input, output, kernel, stride, padding })
    }

    /// Numbers in the weights, in the order (output channel, input channel, row, column).
    pub fn weights_len(&self) -> usize {
        self.output.channels * self.input.channels * self.taps()
    }

    /// Numbers in the packed weights, forward or backward.
    pub fn packed_len(&self) -> usize {
        self.taps() * self.input.blocks() * self.output.blocks() * TILE
    }

    /// Numbers of scratch that [`weight_gradient`] needs.
    pub fn scratch_len(&self) -> usize {
        self.packed_len() * WeightTasks::new(self).parts
    }

    /// Multiplications of the forward pass, not counting the border.
    fn operations(&self) -> usize {
        self.output.count() * self.output.channels * self.input.channels * self.taps()
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }
}

/// Pixels of the output along one side: `⌊(side + 2·padding − kernel) / stride⌋ + 1`, or `None`
/// when the kernel is larger than the padded input.
pub(crate) fn output_side(
    side: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Option<usize> {
    if side == 0 || kernel == 0 || stride == 0 {
        return None;
    }
    let padded = padding.checked_mul(2)?.checked_add(side)?;
    Some(padded.checked_sub(kernel)? / stride + 1)
}

/// Arranges weights `(O, I, K, K)` for [`forward`]: tiles of 16 input × 16 output channels, in the
/// order (pair of output blocks, tap, input block, output block of the pair).
pub fn pack_forward(g: &Geometry, weights: &[f32], packed: &mut [f32]) {
    let (inputs, taps) = (g.input.channels, g.taps());
    pack(g, weights, packed, g.input, g.output, |from, to| (to * inputs + from) * taps);
}

/// Arranges weights `(O, I, K, K)` for [`input_gradient`]: the same with input and output turned
/// around.
pub fn pack_backward(g: &Geometry, weights: &[f32], packed: &mut [f32]) {
    let (inputs, taps) = (g.input.channels, g.taps());
    pack(g, weights, packed, g.output, g.input, |from, to| (from * inputs + to) * taps);
}

/// `first_tap` says where the taps of a channel `from` that is read and a channel `to` that is
/// written begin.
fn pack(
    g: &Geometry,
    weights: &[f32],
    packed: &mut [f32],
    from: Shape,
    to: Shape,
    first_tap: impl Fn(usize, usize) -> usize + Sync + Send,
) {
    assert_eq!(weights.len(), g.weights_len());
    assert_eq!(packed.len(), g.packed_len());
    let taps = g.taps();
    let panel = panel_len(taps, from.blocks());
    parallel::for_each_chunk(packed, panel, g.packed_len(), |pair, packed| {
        packed.fill(0.);
        let columns = columns_of(to.blocks(), pair);
        for column in 0..columns {
            let block = 2 * pair + column;
            for to_channel in block * SIDE..block * SIDE + to.channels_in(block) {
                for from_channel in 0..from.channels {
                    let at = first_tap(from_channel, to_channel);
                    let (from_block, row) = (from_channel / SIDE, from_channel % SIDE);
                    for (tap, weight) in weights[at..at + taps].iter().enumerate() {
                        let tile = (tap * from.blocks() + from_block) * columns + column;
                        packed[tile * TILE + row * SIDE + to_channel % SIDE] = *weight;
                    }
                }
            }
        }
    });
}

/// Numbers in the packed weights of one pair of blocks that are written.
fn panel_len(taps: usize, from_blocks: usize) -> usize {
    2 * taps * from_blocks * TILE
}

/// Blocks in a pair: 2, or 1 in the last pair of an odd number.
fn columns_of(blocks: usize, pair: usize) -> usize {
    (blocks - 2 * pair).min(2)
}

/// `output = weights ∗ input + bias`. `packed` comes from [`pack_forward`]; `bias` is padded to whole
/// blocks of channels.
///
/// `moments`, when given, receives the sums that [`crate::norm::merge`] makes into mean and
/// variance, taken while the output is in the cache; it holds [`crate::norm::moments_len`] numbers.
///
/// # Panics
///
/// When a slice has another length than the geometry says.
pub fn forward(
    variant: Variant,
    g: &Geometry,
    input: &[f32],
    packed: &[f32],
    bias: Option<&[f32]>,
    output: &mut [f32],
    moments: Option<&mut [f32]>,
) {
    assert!(bias.is_none_or(|bias| bias.len() == g.output.padded_channels()));
    assert!(moments.as_ref().is_none_or(|m| m.len() == moments_len(g.output)));
    let moments = moments.map(Disjoint::new);
    let finish = Finish { bias, moments };
    let side = |count: usize, limit: usize| -> Vec<Vec<(usize, usize)>> {
        let taps = |at: usize| (0..g.kernel).map(move |tap| (tap, at * g.stride + tap));
        let inside = |(tap, at): (usize, usize)| {
            at.checked_sub(g.padding).filter(|at| *at < limit).map(|at| (tap, at))
        };
        (0..count).map(|at| taps(at).filter_map(inside).collect()).collect()
    };
    let rows = side(g.output.height, g.input.height);
    let columns = side(g.output.width, g.input.width);
    let meets = Meets { rows, columns, kernel: g.kernel };
    gather(variant, g, (input, g.input), packed, &meets, (output, g.output), false, &finish);
}

/// `input_gradient (+)= weightsᵀ ∗ output_gradient`; `packed` comes from [`pack_backward`].
///
/// With `add` it adds to what `input_gradient` holds, otherwise it replaces it.
pub fn input_gradient(
    variant: Variant,
    g: &Geometry,
    output_gradient: &[f32],
    packed: &[f32],
    input_gradient: &mut [f32],
    add: bool,
) {
    let side = |count: usize, limit: usize| -> Vec<Vec<(usize, usize)>> {
        let meets = |at: usize, tap: usize| {
            let steps = (at + g.padding).checked_sub(tap)?;
            let output = steps / g.stride;
            (steps.is_multiple_of(g.stride) && output < limit).then_some((tap, output))
        };
        (0..count).map(|at| (0..g.kernel).filter_map(|tap| meets(at, tap)).collect()).collect()
    };
    let rows = side(g.input.height, g.output.height);
    let columns = side(g.input.width, g.output.width);
    let meets = Meets { rows, columns, kernel: g.kernel };
    let finish = Finish { bias: None, moments: None };
    let to = (input_gradient, g.input);
    gather(variant, g, (output_gradient, g.output), packed, &meets, to, add, &finish);
}

/// For each row and each column of the value that is written: the taps that meet the value that is
/// read, and where.
struct Meets {
    rows: Vec<Vec<(usize, usize)>>,
    columns: Vec<Vec<(usize, usize)>>,
    kernel: usize,
}

/// What happens to a pixel once its sum is complete.
struct Finish<'a> {
    bias: Option<&'a [f32]>,
    moments: Option<Disjoint<'a, f32>>,
}

/// Every pixel of `to` as a sum over taps and channel blocks of `from`.
#[expect(clippy::too_many_arguments, reason = "what is read, by what, what is written")]
fn gather(
    variant: Variant,
    g: &Geometry,
    (from, from_shape): (&[f32], Shape),
    packed: &[f32],
    meets: &Meets,
    (to, to_shape): (&mut [f32], Shape),
    add: bool,
    finish: &Finish,
) {
    assert_eq!(from.len(), from_shape.len());
    assert_eq!(to.len(), to_shape.len());
    assert_eq!(packed.len(), g.packed_len());
    let parts = to_shape.parts();
    let pairs = to_shape.blocks().div_ceil(2);
    // How the work is cut has no influence on the result: no sum crosses a task.
    let wanted = 4 * rayon::current_num_threads();
    let per_task = (parts.div_ceil(wanted)).max(32 / to_shape.part_pixels()).max(1);
    let part_tasks = parts.div_ceil(per_task);
    let pair_tasks = wanted.div_ceil(part_tasks).min(pairs);
    let to = Disjoint::new(to);
    parallel::for_each(part_tasks * pair_tasks, g.operations(), |task| {
        let (part_task, pair_task) = (task / pair_tasks, task % pair_tasks);
        let parts = part_task * per_task..((part_task + 1) * per_task).min(parts);
        let pairs = pair_task * pairs / pair_tasks..(pair_task + 1) * pairs / pair_tasks;
        let to = &to;
        let gather = Gather { variant, from, from_shape, packed, meets, to, to_shape, add, finish };
        for pair in pairs {
            gather.pair_of_blocks(parts.clone(), pair);
        }
    });
}

struct Gather<'a> {
    variant: Variant,
    from: &'a [f32],
    from_shape: Shape,
    packed: &'a [f32],
    meets: &'a Meets,
    to: &'a Disjoint<'a, f32>,
    to_shape: Shape,
    add: bool,
    finish: &'a Finish<'a>,
}

impl Gather<'_> {
    /// Two blocks of channels of every pixel in `parts`.
    fn pair_of_blocks(&self, parts: Range<usize>, pair: usize) {
        let all = self.meets.kernel * self.meets.kernel * self.from_shape.blocks();
        let chunk = all.div_ceil(all.div_ceil(CHUNK));
        let mut list = Vec::with_capacity(chunk);
        for begin in (0..all).step_by(chunk) {
            let terms = begin..(begin + chunk).min(all);
            for part in parts.clone() {
                let (group, pixels) = self.to_shape.part(part);
                for pixel in pixels {
                    self.pixel(group, pixel, pair, terms.clone(), &mut list);
                }
                if terms.end == all {
                    self.finish(part, pair);
                }
            }
        }
    }

    /// Bias and moments of one part, in the pair's blocks.
    fn finish(&self, part: usize, pair: usize) {
        let Finish { bias, moments } = self.finish;
        if bias.is_none() && moments.is_none() {
            return;
        }
        let (from, len, images) = self.to_shape.span(part);
        let pixel_len = self.to_shape.pixel_len();
        for column in 0..columns_of(self.to_shape.blocks(), pair) {
            let block = 2 * pair + column;
            let mut sums = moments.as_ref().map(|moments| {
                let at = (part * self.to_shape.blocks() + block) * MOMENT_BLOCK;
                // SAFETY: a task owns its parts in its pairs of blocks.
                unsafe { moments.part(at, MOMENT_BLOCK) }
            });
            for (at, pixel) in (from..from + len).step_by(pixel_len).enumerate() {
                // SAFETY: as above; the sums of this part and pair are complete.
                let tile = unsafe { self.to.part(pixel + block * TILE, TILE) };
                if let Some(bias) = bias {
                    add_to_rows(self.variant, tile, images, &bias[block * SIDE..][..SIDE]);
                }
                if let Some(sums) = &mut sums {
                    add_moments(self.variant, tile, images, at == 0, sums);
                }
            }
        }
    }

    /// Adds the terms (tap, block of channels) to one pixel; the first terms replace what it holds
    /// unless the whole gather adds.
    fn pixel(
        &self,
        group: usize,
        pixel: usize,
        pair: usize,
        terms: Range<usize>,
        list: &mut Vec<Pair>,
    ) {
        let columns = columns_of(self.to_shape.blocks(), pair);
        let panel = pair * panel_len(self.meets.kernel * self.meets.kernel, self.blocks_read());
        let add = self.add || terms.start > 0;
        list.clear();
        let (y, x) = (pixel / self.to_shape.width, pixel % self.to_shape.width);
        let (first_tap, last_tap) =
            (terms.start / self.blocks_read(), (terms.end - 1) / self.blocks_read());
        for &(tap_y, from_y) in &self.meets.rows[y] {
            for &(tap_x, from_x) in &self.meets.columns[x] {
                let tap = tap_y * self.meets.kernel + tap_x;
                if tap < first_tap || tap > last_tap {
                    continue;
                }
                let from_pixel =
                    (group * self.from_shape.height + from_y) * self.from_shape.width + from_x;
                let first = tap * self.blocks_read();
                let blocks = terms.start.max(first)..terms.end.min(first + self.blocks_read());
                for term in blocks {
                    let block = term - first;
                    list.push(Pair {
                        left: from_pixel * self.from_shape.pixel_len() + block * TILE,
                        right: panel + term * columns * TILE,
                        depth: self.from_shape.channels_in(block),
                    });
                }
            }
        }
        if list.is_empty() && add {
            return;
        }
        let at = (group * self.to_shape.pixels() + pixel) * self.to_shape.pixel_len();
        // SAFETY: a task owns its parts' pixels in its pairs of blocks; no other task writes them.
        let output = unsafe { self.to.part(at + 2 * pair * TILE, columns * TILE) };
        let sum = Sum { rows: SIDE, columns, add };
        product::<false>(self.variant, self.from, self.packed, list, output, sum);
    }

    fn blocks_read(&self) -> usize {
        self.from_shape.blocks()
    }
}

/// `gradient += inputᵀ · output_gradient`: adds the gradient of the weights `(O, I, K, K)`.
///
/// `scratch` holds [`Geometry::scratch_len`] numbers; what it held before does not matter.
pub fn weight_gradient(
    variant: Variant,
    g: &Geometry,
    input: &[f32],
    output_gradient: &[f32],
    scratch: &mut [f32],
    gradient: &mut [f32],
) {
    assert_eq!(input.len(), g.input.len());
    assert_eq!(output_gradient.len(), g.output.len());
    assert_eq!(gradient.len(), g.weights_len());
    assert_eq!(scratch.len(), g.scratch_len());
    let tasks = WeightTasks::new(g);
    let all = Disjoint::new(scratch);
    parallel::for_each(tasks.count(), g.operations(), |task| {
        let (at, len) = tasks.tiles(task);
        // SAFETY: `tiles` gives every task its own place.
        let tiles = unsafe { all.part(at, len) };
        tasks.sum(variant, task, input, output_gradient, tiles);
    });
    tasks.merge(scratch, gradient);
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
        let parts = WEIGHT_TASKS.div_ceil(tiles).min(segments);
        WeightTasks { g, parts, pairs, segments, segments_per_row, rows_per_segment }
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
    fn sum(
        &self,
        variant: Variant,
        task: usize,
        input: &[f32],
        output_gradient: &[f32],
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
                    product::<true>(variant, input, output_gradient, &list, tile, sum);
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
        let per_part = self.g.packed_len();
        parallel::for_each_chunk(gradient, inputs * taps, scratch.len(), |channel, gradient| {
            let (output_block, lane) = (channel / SIDE, channel % SIDE);
            let (pair, column) = (output_block / 2, output_block % 2);
            let columns = columns_of(g.output.blocks(), pair);
            for (at, gradient) in gradient.iter_mut().enumerate() {
                let (input, tap) = (at / taps, at % taps);
                let (block, row) = (input / SIDE, input % SIDE);
                let first = (block * g.output.blocks() + 2 * pair) * taps * TILE;
                let tile = first + (tap * columns + column) * TILE + row * SIDE + lane;
                let mut total = 0.;
                for part in 0..self.parts {
                    total += scratch[part * per_part + tile];
                }
                *gradient += total;
            }
        });
    }
}
