//! Forward pass and input gradient: every pixel gathers what its taps meet.
#![expect(unsafe_code, reason = "tasks write disjoint pixels and channels of one buffer")]

use std::ops::Range;

use super::{Geometry, columns_of, panel_len, winograd};
use crate::element::{Element, by_precision};
use crate::layout::{SIDE, TILE};
use crate::linear::finish_tile;
use crate::norm::{MOMENT_BLOCK, add_moments, moments_len};
use crate::parallel::{self, Disjoint};
use crate::tiles::{Product, Session, TileRun};
use crate::{Buffer, Shape, Variant};

/// The last step of a convolution: `relu(sum + bias + residual)`, each part as asked.
#[derive(Clone, Copy, Default)]
pub struct Finish<'a> {
    /// A number for each output channel, padded to whole blocks.
    pub bias: Option<&'a [f32]>,
    /// A value of the output's shape.
    pub residual: Option<&'a Buffer>,
    /// Whether a ReLU ends it.
    pub relu: bool,
}

/// `output = finish(weights ∗ input)`. `packed` comes from [`super::pack_forward`].
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
    input: &Buffer,
    packed: &Buffer,
    finish: Finish,
    output: &mut Buffer,
    moments: Option<&mut [f32]>,
) {
    assert!(finish.bias.is_none_or(|bias| bias.len() == g.output.padded_channels()));
    assert!(finish.residual.is_none_or(|residual| residual.len() == g.output.len()));
    assert!(moments.as_ref().is_none_or(|m| m.len() == moments_len(g.output)));
    let moments = moments.map(Disjoint::new);
    if g.winograd(variant, output.precision()) {
        return by_precision!(output.precision(), T => {
            let (from, to) = ((T::of(input), g.input), (T::of_mut(output), g.output));
            let Finish { bias, residual, relu } = finish;
            let last = Last { bias, residual: residual.map(T::of), relu, moments };
            winograd::convolve(variant, g, from, T::of(packed), to, false, &last);
        });
    }
    let side = |count: usize, limit: usize| -> Vec<Vec<(usize, usize)>> {
        let taps = |at: usize| (0..g.kernel).map(move |tap| (tap, at * g.stride + tap));
        let inside = |(tap, at): (usize, usize)| {
            at.checked_sub(g.padding).filter(|at| *at < limit).map(|at| (tap, at))
        };
        (0..count).map(|at| taps(at).filter_map(inside).collect()).collect()
    };
    let rows = side(g.output.height, g.input.height);
    let columns = side(g.output.width, g.input.width);
    let meets = Meets::new(rows, columns, g.kernel, 1, g.stride);
    by_precision!(output.precision(), T => {
        let (from, to) = ((T::of(input), g.input), (T::of_mut(output), g.output));
        let Finish { bias, residual, relu } = finish;
        let last = Last { bias, residual: residual.map(T::of), relu, moments };
        gather(variant, g, from, T::of(packed), &meets, to, false, &last);
    });
}

/// `input_gradient (+)= weightsᵀ ∗ output_gradient`; `packed` comes from
/// [`super::pack_backward`].
///
/// With `add` it adds to what `input_gradient` holds, otherwise it replaces it.
pub fn input_gradient(
    variant: Variant,
    g: &Geometry,
    output_gradient: &Buffer,
    packed: &Buffer,
    input_gradient: &mut Buffer,
    add: bool,
) {
    if g.winograd(variant, input_gradient.precision()) {
        return by_precision!(input_gradient.precision(), T => {
            let last = Last { bias: None, residual: None, relu: false, moments: None };
            let from = (T::of(output_gradient), g.output);
            let to = (T::of_mut(input_gradient), g.input);
            winograd::convolve(variant, g, from, T::of(packed), to, add, &last);
        });
    }
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
    let meets = Meets::new(rows, columns, g.kernel, g.stride, 1);
    by_precision!(input_gradient.precision(), T => {
        let last = Last { bias: None, residual: None, relu: false, moments: None };
        let from = (T::of(output_gradient), g.output);
        let to = (T::of_mut(input_gradient), g.input);
        gather(variant, g, from, T::of(packed), &meets, to, add, &last);
    });
}

/// For each row and each column of the value that is written: the taps that meet the value that is
/// read, and where.
struct Meets {
    rows: Vec<Vec<(usize, usize)>>,
    columns: Vec<Vec<(usize, usize)>>,
    kernel: usize,
    /// Columns from one to the next that meets taps alike: 1, or the stride in an input gradient.
    period: usize,
    /// Whether a column meets the same taps as the one a period later.
    alike: Vec<bool>,
    /// Pixels of the value that is read from what a column meets to what the other one does.
    apart: usize,
}

impl Meets {
    fn new(
        rows: Vec<Vec<(usize, usize)>>,
        columns: Vec<Vec<(usize, usize)>>,
        kernel: usize,
        period: usize,
        apart: usize,
    ) -> Meets {
        let alike = |at: usize| {
            let Some(other) = columns.get(at + period) else { return false };
            columns[at].iter().map(|m| m.0).eq(other.iter().map(|m| m.0))
        };
        let alike = (0..columns.len()).map(alike).collect();
        Meets { rows, columns, kernel, period, alike, apart }
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }
}

/// What happens to a pixel once its sum is complete.
pub(super) struct Last<'a, T> {
    bias: Option<&'a [f32]>,
    residual: Option<&'a [T]>,
    relu: bool,
    moments: Option<Disjoint<'a, f32>>,
}

impl<T: Element> Last<'_, T> {
    /// Whether there is a last step at all.
    pub fn is_something(&self) -> bool {
        self.changes() || self.moments.is_some()
    }

    fn changes(&self) -> bool {
        self.bias.is_some() || self.residual.is_some() || self.relu
    }

    /// The last step and the moments of one part of a value, in a pair of blocks of channels, which
    /// the caller's task owns.
    pub fn part(
        &self,
        session: &Session,
        to: &Disjoint<T>,
        shape: Shape,
        part: usize,
        pair: usize,
    ) {
        let &Last { bias, residual, relu, ref moments } = self;
        let changes = self.changes();
        if !self.is_something() {
            return;
        }
        let variant = session.variant();
        let (from, len, images) = shape.span(part);
        for column in 0..columns_of(shape.blocks(), pair) {
            let block = 2 * pair + column;
            let mut sums = moments.as_ref().map(|moments| {
                let at = (part * shape.blocks() + block) * MOMENT_BLOCK;
                // SAFETY: a task owns its parts in its pairs of blocks.
                unsafe { moments.part(at, MOMENT_BLOCK) }
            });
            for (at, pixel) in (from..from + len).step_by(shape.pixel_len()).enumerate() {
                // SAFETY: as above; the sums of this part and pair are complete.
                let tile = unsafe { to.part(pixel + block * TILE, TILE) };
                if changes {
                    let bias = bias.map(|bias| &bias[block * SIDE..][..SIDE]);
                    let residual = residual.map(|r| &r[pixel + block * TILE..][..TILE]);
                    finish_tile(variant, tile, images, bias, residual, relu);
                }
                if let Some(sums) = &mut sums {
                    add_moments(variant, tile, images, at == 0, sums);
                }
            }
        }
    }
}

/// Bytes of the value that is read that stay in the second-level cache while all blocks of
/// channels are made from them.
const NEAR: usize = 384 << 10;

/// Every pixel of `to` as a sum over taps and channel blocks of `from`.
#[expect(clippy::too_many_arguments, reason = "what is read, by what, what is written")]
fn gather<T: Element>(
    variant: Variant,
    g: &Geometry,
    (from, from_shape): (&[T], Shape),
    packed: &[T],
    meets: &Meets,
    (to, to_shape): (&mut [T], Shape),
    add: bool,
    last: &Last<T>,
) {
    assert_eq!(from.len(), from_shape.len());
    assert_eq!(to.len(), to_shape.len());
    assert_eq!(packed.len(), g.packed_len(variant, T::PRECISION));
    let parts = to_shape.parts();
    let pairs = to_shape.blocks().div_ceil(2);
    // How the work is cut has no influence on the result: no sum crosses a task.
    let wanted = 4 * rayon::current_num_threads();
    let per_task = (parts.div_ceil(wanted)).max(32 / to_shape.part_pixels()).max(1);
    let part_tasks = parts.div_ceil(per_task);
    let pair_tasks = wanted.div_ceil(part_tasks).min(pairs);
    let read = size_of_val(from).div_ceil(parts);
    let near = (NEAR / read).clamp(1, per_task);
    let to = Disjoint::new(to);
    parallel::for_each(part_tasks * pair_tasks, g.operations(), |task| {
        let (part_task, pair_task) = (task / pair_tasks, task % pair_tasks);
        let parts = part_task * per_task..((part_task + 1) * per_task).min(parts);
        let pairs = pair_task * pairs / pair_tasks..(pair_task + 1) * pairs / pair_tasks;
        let session = Session::begin(variant);
        let (to, session) = (&to, &session);
        let gather = Gather { session, from, from_shape, packed, meets, to, to_shape, add, last };
        for first in parts.clone().step_by(near) {
            for pair in pairs.clone() {
                gather.pair_of_blocks(first..(first + near).min(parts.end), pair);
            }
        }
    });
}

struct Gather<'a, T> {
    session: &'a Session,
    from: &'a [T],
    from_shape: Shape,
    packed: &'a [T],
    meets: &'a Meets,
    to: &'a Disjoint<'a, T>,
    to_shape: Shape,
    add: bool,
    last: &'a Last<'a, T>,
}

impl<T: Element> Gather<'_, T> {
    /// Two blocks of channels of every pixel in `parts`.
    fn pair_of_blocks(&self, parts: Range<usize>, pair: usize) {
        let all = self.meets.taps() * self.from_shape.blocks();
        let chunk = all.div_ceil(all.div_ceil(T::CHUNK));
        let mut runs = Vec::with_capacity(self.meets.taps());
        for begin in (0..all).step_by(chunk) {
            let terms = begin..(begin + chunk).min(all);
            for part in parts.clone() {
                let (group, pixels) = self.to_shape.part(part);
                self.pixels(group, pixels, pair, terms.clone(), &mut runs);
                if terms.end == all {
                    self.last.part(self.session, self.to, self.to_shape, part, pair);
                }
            }
        }
    }

    /// Adds the terms (tap, block of channels) to each pixel, two at a time where two in a row
    /// meet the same taps.
    fn pixels(
        &self,
        group: usize,
        pixels: Range<usize>,
        pair: usize,
        terms: Range<usize>,
        runs: &mut Vec<TileRun>,
    ) {
        let mut done = 0u64;
        for (at, pixel) in pixels.clone().enumerate() {
            if done >> at & 1 == 1 {
                continue;
            }
            let (y, x) = (pixel / self.to_shape.width, pixel % self.to_shape.width);
            let other = pixel + self.meets.period;
            let other = (self.meets.alike[x] && other < pixels.end).then_some(other);
            if other.is_some() {
                done |= 1 << (at + self.meets.period);
            }
            self.runs(group, (y, x), pair, terms.clone(), runs);
            self.sum(group, pixel, other, pair, terms.start > 0, runs);
        }
    }

    /// What a pixel sums: a run for each tap.
    fn runs(
        &self,
        group: usize,
        (y, x): (usize, usize),
        pair: usize,
        terms: Range<usize>,
        runs: &mut Vec<TileRun>,
    ) {
        let blocks = self.from_shape.blocks();
        let columns = columns_of(self.to_shape.blocks(), pair);
        let panel = pair * panel_len(self.meets.taps(), blocks);
        runs.clear();
        for &(tap_y, from_y) in &self.meets.rows[y] {
            for &(tap_x, from_x) in &self.meets.columns[x] {
                let first = (tap_y * self.meets.kernel + tap_x) * blocks;
                let begin = terms.start.max(first);
                let end = terms.end.min(first + blocks);
                if begin >= end {
                    continue;
                }
                let pixel =
                    (group * self.from_shape.height + from_y) * self.from_shape.width + from_x;
                let block = begin - first;
                let rest = self.from_shape.channels - block * SIDE;
                runs.push(TileRun {
                    left: pixel * self.from_shape.pixel_len() + block * TILE,
                    right: panel + begin * columns * TILE,
                    inner: rest.min((end - begin) * SIDE),
                });
            }
        }
    }

    /// Adds the runs to one pixel, and the same ones moved along to another; the first terms
    /// replace what they hold unless the whole gather adds.
    fn sum(
        &self,
        group: usize,
        pixel: usize,
        other: Option<usize>,
        pair: usize,
        later: bool,
        runs: &[TileRun],
    ) {
        let columns = columns_of(self.to_shape.blocks(), pair);
        let add = self.add || later;
        if runs.is_empty() && add {
            return;
        }
        let place = |pixel: usize| {
            let at = (group * self.to_shape.pixels() + pixel) * self.to_shape.pixel_len();
            // SAFETY: a task owns its parts' pixels in its pairs of blocks, no other task writes
            // them, and `pixel` and `other` differ.
            unsafe { self.to.part(at + 2 * pair * TILE, columns * TILE) }
        };
        let apart = self.meets.apart * self.from_shape.pixel_len();
        let product = Product { runs, apart, rows: SIDE, columns, add };
        let (output, other) = (place(pixel), other.map(place));
        T::product_into(self.session, self.from, self.packed, &product, output, other);
    }
}
