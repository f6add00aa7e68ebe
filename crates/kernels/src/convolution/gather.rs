//! Forward pass and input gradient: every pixel gathers the pixels that its taps meet.
#![expect(unsafe_code, reason = "tasks write disjoint pixels and channels of one buffer")]

use std::ops::Range;

use super::finish::FinishOf;
use super::winograd::{by_size, convolve};
use super::{Finish, Form, Geometry, PackedFor, PackedWeights, columns_of, panel_len, stem};
use crate::buffer::with_scratch_of;
use crate::element::{ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::norm::moments_len;
use crate::parallel::{self, Disjoint};
use crate::tiles::{TileOrder, TileProduct, TileRun, TileSession, pair_left};
use crate::{Buffer, Shape, Variant};

/// `output = finish(weights ∗ input)`.
///
/// `moments`, if given, holds [`crate::norm::moments_len`] numbers and receives sums of the output,
/// taken while it is in the cache; [`crate::norm::merge`] turns them into mean and variance.
///
/// # Panics
///
/// When a slice has another length than the geometry says, or the weights are packed for another
/// product than this one.
pub fn forward(
    variant: Variant,
    g: &Geometry,
    input: &Buffer,
    packed: &PackedWeights,
    finish: Finish,
    output: &mut Buffer,
    moments: Option<&mut [f32]>,
) {
    assert!(finish.bias.is_none_or(|bias| bias.len() == g.output.padded_channels()));
    assert!(finish.residual.is_none_or(|residual| residual.len() == g.output.len()));
    assert!(moments.as_ref().is_none_or(|m| m.len() == moments_len(g.output)));
    let (precision, moments) = (output.precision(), moments.map(Disjoint::new));
    let packed = packed.numbers(g.packing(variant, precision, PackedFor::Forward));
    if g.form_of(variant, precision, PackedFor::Forward) == Form::RowsOfTaps {
        let finish = FinishOf::new(finish, moments);
        let (input, output) = (input.halves(), output.halves_mut());
        return stem::forward(variant, g, input, packed.halves(), output, &finish);
    }
    by_precision!(precision, T => {
        let (from, to) = ((T::of(input), g.input), (T::of_mut(output), g.output));
        let finish = FinishOf::new(finish, moments);
        in_form(variant, g, from, packed, forward_taps, to, false, &finish);
    });
}

/// `input_gradient (+)= weightsᵀ ∗ output_gradient`: with `add`, adds to what `input_gradient`
/// holds, otherwise replaces it.
///
/// # Panics
///
/// When a slice has another length than the geometry says, or the weights are packed for another
/// product than this one.
pub fn input_gradient(
    variant: Variant,
    g: &Geometry,
    output_gradient: &Buffer,
    packed: &PackedWeights,
    input_gradient: &mut Buffer,
    add: bool,
) {
    let precision = input_gradient.precision();
    let packed = packed.numbers(g.packing(variant, precision, PackedFor::InputGradient));
    by_precision!(precision, T => {
        let from = (T::of(output_gradient), g.output);
        let to = (T::of_mut(input_gradient), g.input);
        let finish = FinishOf::new(Finish::default(), None);
        in_form(variant, g, from, packed, backward_taps, to, add, &finish);
    });
}

/// A product in the form that the weights are packed for.
#[expect(clippy::too_many_arguments, reason = "source, weights and destination")]
fn in_form<T: ValueElement>(
    variant: Variant,
    g: &Geometry,
    from: (&[T], Shape),
    packed: &Buffer,
    taps: fn(&Geometry) -> Taps,
    to: (&mut [T], Shape),
    add: bool,
    finish: &FinishOf<T>,
) {
    match g.form(variant, T::PRECISION) {
        Form::Winograd(size) => by_precision!(packed.precision(), U => {
            let (work, packed) = (g.operations(), U::of(packed));
            by_size!(size, F => {
                convolve::<F, T, U, _, _>(variant, work, from, packed, to, add, finish);
            });
        }),
        Form::Direct => gather(variant, g, from, T::of(packed), &taps(g), to, add, finish),
        Form::RowsOfTaps => unreachable!("`form` gives none of these"),
    }
}

fn forward_taps(g: &Geometry) -> Taps {
    let side = |count: usize, limit: usize| -> Vec<Vec<(usize, usize)>> {
        let taps = |at: usize| (0..g.kernel).map(move |tap| (tap, at * g.stride + tap));
        let inside = |(tap, at): (usize, usize)| {
            at.checked_sub(g.padding).filter(|at| *at < limit).map(|at| (tap, at))
        };
        (0..count).map(|at| taps(at).filter_map(inside).collect()).collect()
    };
    let rows = side(g.output.height, g.input.height);
    let columns = side(g.output.width, g.input.width);
    Taps::new(rows, columns, g.kernel, 1, g.stride)
}

fn backward_taps(g: &Geometry) -> Taps {
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
    Taps::new(rows, columns, g.kernel, g.stride, 1)
}

/// The taps of the kernel inside the source, for each row and column of the destination.
struct Taps {
    /// Per row of the destination: (tap, row of the source).
    rows: Vec<Vec<(usize, usize)>>,
    /// Per column of the destination: (tap, column of the source).
    columns: Vec<Vec<(usize, usize)>>,
    kernel: usize,
    /// Distance of columns that may use the same taps: 1, or the stride in an input gradient.
    period: usize,
    /// Whether a column uses the same taps as the column one period later.
    alike: Vec<bool>,
    /// Source pixels between what two such columns read.
    apart: usize,
}

impl Taps {
    fn new(
        rows: Vec<Vec<(usize, usize)>>,
        columns: Vec<Vec<(usize, usize)>>,
        kernel: usize,
        period: usize,
        apart: usize,
    ) -> Taps {
        let alike = |at: usize| {
            let Some(other) = columns.get(at + period) else { return false };
            columns[at].iter().map(|m| m.0).eq(other.iter().map(|m| m.0))
        };
        let alike = (0..columns.len()).map(alike).collect();
        Taps { rows, columns, kernel, period, alike, apart }
    }

    fn count(&self) -> usize {
        self.kernel * self.kernel
    }
}

/// Bytes of the source that stay in the second-level cache while all blocks of channels are made from
/// them.
const NEAR: usize = 384 << 10;

/// Computes every pixel of `to` as a sum over taps and channel blocks of `from`.
#[expect(clippy::too_many_arguments, reason = "source, weights and destination")]
fn gather<T: ValueElement>(
    variant: Variant,
    g: &Geometry,
    (from, from_shape): (&[T], Shape),
    packed: &[T],
    taps: &Taps,
    (to, to_shape): (&mut [T], Shape),
    add: bool,
    finish: &FinishOf<T>,
) {
    assert_eq!(from.len(), from_shape.len());
    assert_eq!(to.len(), to_shape.len());
    let parts = to_shape.parts();
    let pairs = to_shape.blocks().div_ceil(2);
    // The split into tasks does not affect the result: no sum crosses a task.
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
        let session = TileSession::begin(variant);
        let (to, session) = (&to, &session);
        for first in parts.clone().step_by(near) {
            let parts = first..(first + near).min(parts.end);
            with_source(variant, (from, from_shape), taps, to_shape, &parts, |source| {
                let gather =
                    Gather { session, source, from_shape, packed, taps, to, to_shape, add, finish };
                for pair in pairs.clone() {
                    gather.pair_of_blocks(parts.clone(), pair);
                }
            });
        }
    });
}

/// Pixels of the source, with their tiles in the order of the product.
struct Source<'a, T> {
    numbers: &'a [T],
    /// The first pixel, counted over all groups.
    first_pixel: usize,
    /// Blocks of channels of a pixel, those of zeros included.
    blocks: usize,
}

impl<T> Source<'_, T> {
    /// Distance between pixels, in numbers.
    fn pixel_len(&self) -> usize {
        self.blocks * TILE
    }
}

/// Calls `work` with the rows of the source that some parts of the destination need: in place, or copied if the
/// product takes paired tiles. A pixel is copied once for all taps and all blocks of channels.
fn with_source<T: ValueElement>(
    variant: Variant,
    (from, from_shape): (&[T], Shape),
    taps: &Taps,
    to_shape: Shape,
    parts: &Range<usize>,
    work: impl FnOnce(Source<T>),
) {
    let order = TileOrder::of(variant, T::PRECISION);
    let blocks = order.inner_tiles(from_shape.blocks());
    if !order.is_paired() {
        return work(Source { numbers: from, first_pixel: 0, blocks });
    }
    let (height, width) = (from_shape.height, from_shape.width);
    let rows_read = to_shape.rows_of_parts(parts).flat_map(|row| {
        let rows = taps.rows[row % to_shape.height].iter();
        rows.map(move |(_, from)| row / to_shape.height * height + from)
    });
    let (first, last) =
        rows_read.fold((usize::MAX, 0), |(first, last), row| (first.min(row), last.max(row)));
    // Without any row, all sums are empty.
    let pixels = if first > last { 0..0 } else { first * width..(last + 1) * width };
    with_scratch_of::<T, _>(pixels.len() * blocks * TILE, 0, |numbers, _| {
        let read = pixels.start * from_shape.pixel_len()..pixels.end * from_shape.pixel_len();
        pair_left(variant, from_shape.blocks(), &from[read], numbers);
        work(Source { numbers, first_pixel: pixels.start, blocks });
    });
}

struct Gather<'a, T> {
    session: &'a TileSession,
    source: Source<'a, T>,
    from_shape: Shape,
    packed: &'a [T],
    taps: &'a Taps,
    to: &'a Disjoint<'a, T>,
    to_shape: Shape,
    add: bool,
    finish: &'a FinishOf<'a, T>,
}

impl<T: ValueElement> Gather<'_, T> {
    /// Computes two blocks of channels of every pixel in `parts`.
    fn pair_of_blocks(&self, parts: Range<usize>, pair: usize) {
        let all = self.taps.count() * self.source.blocks;
        let chunk = all.div_ceil(all.div_ceil(T::CHUNK));
        let mut runs = Vec::with_capacity(self.taps.count());
        for begin in (0..all).step_by(chunk) {
            let terms = begin..(begin + chunk).min(all);
            for part in parts.clone() {
                let (group, pixels) = self.to_shape.part(part);
                self.pixels(group, pixels, pair, terms.clone(), &mut runs);
                if terms.end == all {
                    self.finish.part(self.session, self.to, self.to_shape, part, pair);
                }
            }
        }
    }

    /// Adds the terms (tap, block of channels) to each pixel: two pixels at a time where both use the
    /// same taps.
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
            let other = pixel + self.taps.period;
            let other = (self.taps.alike[x] && other < pixels.end).then_some(other);
            if other.is_some() {
                done |= 1 << (at + self.taps.period);
            }
            self.runs(group, (y, x), pair, terms.clone(), runs);
            self.sum(group, pixel, other, pair, terms.start > 0, runs);
        }
    }

    /// The terms of a pixel's sum: a run for each tap.
    fn runs(
        &self,
        group: usize,
        (y, x): (usize, usize),
        pair: usize,
        terms: Range<usize>,
        runs: &mut Vec<TileRun>,
    ) {
        let blocks = self.source.blocks;
        let columns = columns_of(self.to_shape.blocks(), pair);
        let panel = pair * panel_len(self.taps.count(), blocks);
        runs.clear();
        for &(tap_y, from_y) in &self.taps.rows[y] {
            for &(tap_x, from_x) in &self.taps.columns[x] {
                let first = (tap_y * self.taps.kernel + tap_x) * blocks;
                let begin = terms.start.max(first);
                let end = terms.end.min(first + blocks);
                if begin >= end {
                    continue;
                }
                let pixel =
                    (group * self.from_shape.height + from_y) * self.from_shape.width + from_x;
                let block = begin - first;
                let channels = self.from_shape.channels - block * SIDE;
                let pixel = pixel - self.source.first_pixel;
                runs.push(TileRun {
                    left: pixel * self.source.pixel_len() + block * TILE,
                    right: panel + begin * columns * TILE,
                    inner: channels.min((end - begin) * SIDE),
                });
            }
        }
    }

    /// Adds the runs to one pixel, and the shifted runs to another. The first terms replace what the
    /// pixels hold, unless the whole gather adds.
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
            // SAFETY: a task owns the pixels of its parts in its pairs of blocks, and `pixel` and
            // `other` differ.
            unsafe { self.to.part(at + 2 * pair * TILE, columns * TILE) }
        };
        let apart = self.taps.apart * self.source.pixel_len();
        let product = TileProduct { runs, apart, rows: SIDE, columns, add, ahead: 0 };
        let (output, other) = (place(pixel), other.map(place));
        T::product_into(self.session, self.source.numbers, self.packed, &product, output, other);
    }
}
