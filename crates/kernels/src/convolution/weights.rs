//! Weight gradient: parts of the pixels are summed separately and then added in order.
#![expect(unsafe_code, reason = "tasks write disjoint tiles of one buffer")]

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use super::filter::Filter;
use super::strips::StripLayout;
use super::winograd::{
    self, SquareSize, Squares, by_size, stride, transform_gradient, transform_input,
};
use super::{Form, Geometry, columns_of, stem};
use crate::buffer::with_scratch;
use crate::element::{Half, ValueElement, by_precision};
use crate::layout::{SIDE, Shape, TILE};
use crate::parallel::{self, Disjoint};
use crate::tiles::{StripProduct, TileOrder, TileProduct, TileRun, TileSession, product_of_strips};
use crate::transformer::factor_precision;
use crate::transpose::Interleaving;
use crate::variant::for_each_variant;
use crate::{Buffer, BufferPool, Precision, Variant};

/// Pixels of a group that are summed at a time, so that both sides stay in the first-level cache for all
/// taps.
const SEGMENT: usize = 8;
/// [`SEGMENT`] for a tile unit, which would take longer to load and store the sums of fewer pixels than to multiply
/// them. A row of the kernel reads one row of the input for all its taps, and 16 pixels of two blocks on both sides
/// fill 32 KiB.
const UNIT_SEGMENT: usize = 16;
/// Bytes per channel in a strip of pixels, so that both sides and the sums of a pane stay in the
/// second-level cache.
const STRIP: usize = 128;
/// Squares in a strip.
const SQUARES: usize = 4;
/// Blocks of input channels and pairs of blocks of output channels in a pane.
const PANE: (usize, usize) = (4, 2);
/// The number of tasks to aim for, independent of the number of threads.
const TASKS: usize = 32;

/// Adds the gradient of the weights `(O, I, K, K)`: `gradient += inputᵀ · output_gradient`.
///
/// # Panics
///
/// If a slice does not have the length of the geometry.
pub fn weight_gradient(
    variant: Variant,
    g: &Geometry,
    input: &Buffer,
    output_gradient: &Buffer,
    pool: &Arc<BufferPool>,
    gradient: &mut [f32],
) {
    assert_eq!(input.len(), g.input.len());
    assert_eq!(output_gradient.len(), g.output.len());
    assert_eq!(gradient.len(), g.weights_len());
    if stem::applies(g, variant, input.precision()) {
        let (input, output_gradient) = (input.halves(), output_gradient.halves());
        return stem::weight_gradient(variant, g, input, output_gradient, pool, gradient);
    }
    let order = TileOrder::of(variant, input.precision());
    let side_by_side = order.is_paired().then(|| with_groups_as_pixels(g)).flatten();
    let tasks = WeightTasks::new(variant, side_by_side.as_ref().unwrap_or(g), input.precision());
    let mut scratch = pool.take(tasks.len() * tasks.parts);
    if order.is_paired() {
        let (input, output_gradient) = (input.halves(), output_gradient.halves());
        tasks.run(variant, &mut scratch, |session, task, runs, all| {
            tasks.sum_on_unit(session, task, runs, input, output_gradient, pool, all);
        });
        return tasks.merge(&scratch, gradient);
    }
    by_precision!(input.precision(), T => {
        let (input, output_gradient) = (T::of(input), T::of(output_gradient));
        tasks.run(variant, &mut scratch, |session, task, runs, all| match tasks.squares {
            Some(size) => by_size!(size, F => {
                tasks.sum_squares::<F, T, _, _>(session, task, runs, input, output_gradient, all);
            }),
            None => tasks.sum(session, task, runs, input, output_gradient, pool, all),
        });
    });
    tasks.merge(&scratch, gradient);
}

/// A linear layer as one row of pixels, with a pixel for each group of images, so that two of them are
/// neighbours. They lie in memory as those do.
fn with_groups_as_pixels(g: &Geometry) -> Option<Geometry> {
    let row = |shape: Shape| Shape { images: SIDE, width: shape.groups(), ..shape };
    let is_linear = g.kernel == 1 && g.padding == 0 && g.input.pixels() == 1;
    is_linear.then(|| Geometry { input: row(g.input), output: row(g.output), stride: 1, ..*g })
}

/// The split of a weight gradient into tasks: (part of the pixels, pane of the weights). It depends on the
/// shape alone, since parts are added afterwards. A task goes through its part in strips of a few rows of
/// pixels, and adds each strip to its whole pane before the next.
///
/// In [Winograd's form](winograd) a strip is a few squares of pixels, and each kernel has one sum per position
/// instead of 9.
struct WeightTasks<'a> {
    g: &'a Geometry,
    /// The squares of Winograd's form, or `None` for the plain sum.
    squares: Option<SquareSize>,
    parts: usize,
    /// Panes along the input and along the output channels.
    panes: (usize, usize),
    /// Rows of output pixels in a strip; rows are counted over all groups.
    rows: usize,
    strips: usize,
}

/// A part of the pixels, some blocks of input channels and some pairs of blocks of output channels.
struct WeightTask {
    part: usize,
    blocks: Range<usize>,
    pairs: Range<usize>,
}

/// One side of the product: the tiles of some blocks of channels in some rows of pixels.
struct StripSide<'a, T> {
    numbers: &'a [T],
    /// The first row of pixels in the numbers, counted over all groups.
    first_row: usize,
    width: usize,
    /// Distance between pixels, in numbers.
    step: usize,
}

impl<'a, T: ValueElement> StripSide<'a, T> {
    /// The rows in place, or copied to `memory` and arranged if the products need that.
    fn new(
        variant: Variant,
        numbers: &'a [T],
        shape: Shape,
        rows: Range<usize>,
        blocks: &Range<usize>,
        memory: &'a mut [T],
    ) -> StripSide<'a, T> {
        let (width, pixel_len) = (shape.width, shape.pixel_len());
        if !T::ARRANGED {
            let numbers = &numbers[blocks.start * TILE..];
            return StripSide { numbers, first_row: 0, width, step: pixel_len };
        }
        let step = blocks.len() * TILE;
        let pixels = rows.start * width..rows.end * width;
        for (pixel, to) in pixels.zip(memory.chunks_exact_mut(step)) {
            let from = &numbers[pixel * pixel_len + blocks.start * TILE..][..step];
            T::arrange(variant, from, to);
        }
        StripSide { numbers: memory, first_row: rows.start, width, step }
    }

    fn offset(&self, row: usize, x: usize) -> usize {
        ((row - self.first_row) * self.width + x) * self.step
    }
}

/// The runs of a strip, in the order of addition.
#[derive(Default)]
struct StripRuns {
    all: Vec<TileRun>,
    /// Groups of runs: the sum of the weights that they belong to, and the end of the group.
    ends: Vec<(usize, usize)>,
}

impl StripRuns {
    /// Makes a group of the runs since the last one, if there are any.
    fn end(&mut self, sum: usize) {
        if self.all.len() > self.ends.last().map_or(0, |last| last.1) {
            self.ends.push((sum, self.all.len()));
        }
    }
}

/// A place in the pane of a task: two blocks of input channels, or one, and a pair of blocks of output channels.
struct PanePlace {
    /// The first block and the pair, counted from those of the task.
    block: usize,
    pair: usize,
    /// Input channels in the first block.
    rows: usize,
    /// Blocks of the pair.
    columns: usize,
}

/// Calls `work` with the lists of this thread, so that they grow only once.
fn with_runs(work: impl FnOnce(&mut StripRuns)) {
    thread_local! {
        static RUNS: Cell<StripRuns> = const { Cell::new(StripRuns { all: Vec::new(), ends: Vec::new() }) };
    }
    let mut runs = RUNS.take();
    work(&mut runs);
    RUNS.set(runs);
}

impl<'a> WeightTasks<'a> {
    fn new(variant: Variant, g: &'a Geometry, precision: Precision) -> Self {
        let squares = match (factor_precision(variant, precision), g.form(variant, precision)) {
            (Precision::F32, Form::Winograd(size)) => Some(size),
            // In bf16 the transforms and 16 sums would cost as much as the products save.
            _ => None,
        };
        let rows = (STRIP / precision.bytes() / g.output.width).max(1);
        let strips = match squares {
            Some(size) => (g.output.groups() * size.on(g.output).count()).div_ceil(SQUARES),
            None => (g.output.groups() * g.output.height).div_ceil(rows),
        };
        let pairs = g.output.blocks().div_ceil(2);
        let panes = (g.input.blocks().div_ceil(PANE.0), pairs.div_ceil(PANE.1));
        let parts = TASKS.div_ceil(panes.0 * panes.1).min(strips);
        WeightTasks { g, squares, parts, panes, rows, strips }
    }

    /// Sums per kernel: one for each tap or position.
    fn sums(&self) -> usize {
        self.squares.map_or(self.g.taps(), SquareSize::positions)
    }

    /// The length of the sums of one part.
    fn len(&self) -> usize {
        self.sums() * self.g.input.blocks() * self.g.output.blocks() * TILE
    }

    /// Sums every part into its range of the scratch memory.
    fn run(
        &self,
        variant: Variant,
        scratch: &mut [f32],
        sum: impl Fn(&TileSession, &WeightTask, &mut StripRuns, &Disjoint<f32>) + Sync + Send,
    ) {
        let all = Disjoint::new(scratch);
        let count = self.parts * self.panes.0 * self.panes.1;
        parallel::for_each(count, self.g.operations(), |task| {
            let (session, task) = (TileSession::begin(variant), self.task(task));
            // The first strip of squares writes all sums.
            let unwritten = if self.squares.is_none() { task.blocks.clone() } else { 0..0 };
            for block in unwritten {
                for pair in task.pairs.clone() {
                    let (at, len) = self.tiles(task.part, block, pair);
                    // SAFETY: a task owns its part of its blocks and pairs.
                    unsafe { all.part(at, len) }.fill(0.);
                }
            }
            with_runs(|runs| sum(&session, &task, runs, &all));
        });
    }

    fn task(&self, task: usize) -> WeightTask {
        let panes = self.panes.0 * self.panes.1;
        let (pane, part) = (task % panes, task / panes);
        let (block, pair) = (pane / self.panes.1 * PANE.0, pane % self.panes.1 * PANE.1);
        let pairs = self.g.output.blocks().div_ceil(2);
        WeightTask {
            part,
            blocks: block..(block + PANE.0).min(self.g.input.blocks()),
            pairs: pair..(pair + PANE.1).min(pairs),
        }
    }

    /// The range in the scratch memory, as first index and length, of the sums of a block of input channels
    /// and a pair of blocks of output channels: contiguous tiles (sum, output block of the pair).
    fn tiles(&self, part: usize, block: usize, pair: usize) -> (usize, usize) {
        let (inputs, outputs) = (self.g.input.blocks(), self.g.output.blocks());
        let len = self.sums() * TILE;
        let columns = columns_of(outputs, pair);
        (((part * inputs + block) * outputs + 2 * pair) * len, columns * len)
    }

    #[expect(clippy::too_many_arguments, reason = "source and destination")]
    fn sum<T: ValueElement>(
        &self,
        session: &TileSession,
        task: &WeightTask,
        runs: &mut StripRuns,
        input: &[T],
        output_gradient: &[T],
        pool: &Arc<BufferPool>,
        all: &Disjoint<f32>,
    ) {
        let g = self.g;
        let outputs = 2 * task.pairs.start..(2 * task.pairs.end).min(g.output.blocks());
        let strips =
            task.part * self.strips / self.parts..(task.part + 1) * self.strips / self.parts;
        let memory = |rows: usize, shape: Shape, blocks: usize| {
            let len = if T::ARRANGED { rows * shape.width * blocks * TILE } else { 0 };
            pool.take_of(T::PRECISION, len)
        };
        let most = strips.clone().map(|strip| self.rows_read(&self.rows_of(strip)).len()).max();
        let mut left_memory = memory(most.unwrap_or(0), g.input, task.blocks.len());
        let mut right_memory = memory(self.rows, g.output, outputs.len());
        for strip in strips {
            let rows = self.rows_of(strip);
            let (read, memory) = (self.rows_read(&rows), T::of_mut(&mut left_memory));
            let variant = session.variant();
            let left = StripSide::new(variant, input, g.input, read, &task.blocks, memory);
            let (written, memory) = (rows.clone(), T::of_mut(&mut right_memory));
            let right =
                StripSide::new(variant, output_gradient, g.output, written, &outputs, memory);
            self.collect(rows, &left, &right, runs);
            self.sum_strip(session, task, left.numbers, right.numbers, runs, true, all);
        }
    }

    /// [`sum`](Self::sum) on a tile unit.
    #[expect(clippy::too_many_arguments, reason = "source and destination")]
    fn sum_on_unit(
        &self,
        session: &TileSession,
        task: &WeightTask,
        runs: &mut StripRuns,
        input: &[Half],
        output_gradient: &[Half],
        pool: &Arc<BufferPool>,
        all: &Disjoint<f32>,
    ) {
        let (layout, outputs, variant) =
            (StripLayout::new(self.g), self.outputs(task), session.variant());
        let [left_len, right_len] =
            [layout.left_len(task.blocks.len()), outputs.len() * layout.column()];
        let strips = self.strips_of(task);
        let most = strips.clone().map(|strip| self.rows_read(&self.rows_of(strip)).len()).max();
        let memory = |rows: usize, len: usize| pool.take_of(Precision::Bf16, rows * len);
        let mut left = memory(most.unwrap_or(0), left_len);
        let mut right = memory(self.rows, right_len);
        let (left, right) = (left.halves_mut(), right.halves_mut());
        for strip in strips {
            let (rows, read) = (self.rows_of(strip), self.rows_read(&self.rows_of(strip)));
            for (row, to) in read.clone().zip(left.chunks_exact_mut(left_len)) {
                layout.arrange_left(variant, input, row, &task.blocks, to);
            }
            for (row, to) in rows.clone().zip(right.chunks_exact_mut(right_len)) {
                layout.arrange_right(variant, output_gradient, row, &outputs, to);
            }
            self.collect_segments(layout, rows, read.start, [left_len, right_len], runs);
            self.for_each_sum(task, runs, all, |place, runs, outputs| {
                let left = &left[place.block * SIDE * layout.left_row()..];
                let right = &right[2 * place.pair * layout.column()..];
                let (left_row, column) = (layout.left_row(), layout.column());
                let (apart, columns) = (SIDE * left_row, place.columns);
                let product = StripProduct { runs, left_row, apart, column, columns, add: true };
                product_of_strips(session, left, right, &product, outputs);
            });
        }
    }

    /// Collects the runs of a strip for a tile unit: for some pixels at a time and each tap, one run for each row of
    /// pixels whose tap lies inside the input or left or right of it.
    fn collect_segments(
        &self,
        layout: StripLayout,
        strip: Range<usize>,
        first_read: usize,
        [left_len, right_len]: [usize; 2],
        runs: &mut StripRuns,
    ) {
        let g = self.g;
        runs.all.clear();
        runs.ends.clear();
        let rows_at_once = (UNIT_SEGMENT / layout.width).max(1);
        for first in strip.clone().step_by(rows_at_once) {
            for begin in (0..layout.width).step_by(UNIT_SEGMENT) {
                let pixels = UNIT_SEGMENT.min(layout.width - begin);
                for tap in 0..g.taps() {
                    for row in first..(first + rows_at_once).min(strip.end) {
                        let Some(read) = g.row_met(row, tap / g.kernel) else { continue };
                        runs.all.push(TileRun {
                            left: (read - first_read) * left_len
                                + layout.left(begin, tap % g.kernel),
                            right: (row - strip.start) * right_len + begin * TILE,
                            inner: pixels * SIDE,
                        });
                    }
                    runs.end(tap);
                }
            }
        }
    }

    /// Sums a part in Winograd's form.
    fn sum_squares<F, T, const N: usize, const M: usize>(
        &self,
        session: &TileSession,
        task: &WeightTask,
        runs: &mut StripRuns,
        input: &[T],
        output_gradient: &[T],
        all: &Disjoint<f32>,
    ) where
        F: Filter<N, M>,
        T: ValueElement,
    {
        let g = self.g;
        let (blocks, outputs) = (task.blocks.len(), self.outputs(task));
        let (squares, variant) = (Squares::new(M, g.output), session.variant());
        let len = |blocks: usize| N * N * stride(SQUARES * blocks);
        with_scratch(len(blocks) + len(outputs.len()), |memory| {
            let (left, right) = memory.split_at_mut(len(blocks));
            for strip in self.strips_of(task) {
                let first = strip * SQUARES;
                let count = SQUARES.min(g.output.groups() * squares.count() - first);
                for at in 0..count {
                    let (group, corner) = squares.place(first + at);
                    let read = task.blocks.clone();
                    let to = &mut left[at * blocks * TILE..];
                    let step = stride(count * blocks);
                    transform_input::<F, T, f32, N, M>(
                        variant, input, g.input, group, corner, read, to, step,
                    );
                    let (from, read) = (output_gradient, outputs.clone());
                    let to = &mut right[at * outputs.len() * TILE..];
                    let step = stride(count * outputs.len());
                    transform_gradient::<F, T, N, M>(
                        variant, from, g.output, group, corner, read, to, step,
                    );
                }
                runs.all.clear();
                runs.ends.clear();
                for position in 0..N * N {
                    runs.all.extend((0..count).map(|at| TileRun {
                        left: position * stride(count * blocks) + at * blocks * TILE,
                        right: position * stride(count * outputs.len()) + at * outputs.len() * TILE,
                        inner: SIDE,
                    }));
                    runs.ends.push((position, runs.all.len()));
                }
                let add = strip > self.strips_of(task).start;
                self.sum_strip::<f32>(session, task, left, right, runs, add, all);
            }
        });
    }

    /// The blocks of output channels of a task.
    fn outputs(&self, task: &WeightTask) -> Range<usize> {
        2 * task.pairs.start..(2 * task.pairs.end).min(self.g.output.blocks())
    }

    /// The strips of a task's part.
    fn strips_of(&self, task: &WeightTask) -> Range<usize> {
        task.part * self.strips / self.parts..(task.part + 1) * self.strips / self.parts
    }

    /// The rows of output pixels in a strip.
    fn rows_of(&self, strip: usize) -> Range<usize> {
        let rows = self.g.output.groups() * self.g.output.height;
        strip * self.rows..((strip + 1) * self.rows).min(rows)
    }

    /// The rows of input pixels that some rows of output pixels need, including rows in between.
    fn rows_read(&self, rows: &Range<usize>) -> Range<usize> {
        let g = self.g;
        let top =
            |row: usize| (row / g.output.height * g.input.height, row % g.output.height * g.stride);
        let ((first, above), (last, below)) = (top(rows.start), top(rows.end - 1));
        let begin = above.saturating_sub(g.padding).min(g.input.height);
        let end = (below + g.kernel).saturating_sub(g.padding).min(g.input.height);
        first + begin..(last + end).max(first + begin)
    }

    /// Collects the runs of a strip: for some pixels at a time and each tap, the pixels whose tap lies inside
    /// the input.
    fn collect<T: ValueElement>(
        &self,
        strip: Range<usize>,
        left: &StripSide<T>,
        right: &StripSide<T>,
        runs: &mut StripRuns,
    ) {
        let g = self.g;
        runs.all.clear();
        runs.ends.clear();
        let rows_at_once = (SEGMENT / g.output.width).max(1);
        for first in strip.clone().step_by(rows_at_once) {
            let rows = first..(first + rows_at_once).min(strip.end);
            for begin in (0..g.output.width).step_by(SEGMENT) {
                for tap in 0..g.taps() {
                    for row in rows.clone() {
                        let columns = begin..(begin + SEGMENT).min(g.output.width);
                        self.collect_row(row, columns, tap, left, right, &mut runs.all);
                    }
                    runs.end(tap);
                }
            }
        }
    }

    /// Collects the pixels of a row whose tap lies inside the input.
    fn collect_row<T: ValueElement>(
        &self,
        row: usize,
        columns: Range<usize>,
        tap: usize,
        left: &StripSide<T>,
        right: &StripSide<T>,
        runs: &mut Vec<TileRun>,
    ) {
        let g = self.g;
        let Some(read) = g.row_met(row, tap / g.kernel) else { return };
        for x in columns {
            let from_x = (x * g.stride + tap % g.kernel).checked_sub(g.padding);
            let Some(from_x) = from_x.filter(|x| *x < g.input.width) else { continue };
            runs.push(TileRun {
                left: left.offset(read, from_x),
                right: right.offset(row, x),
                inner: SIDE,
            });
        }
    }

    /// Adds a strip to the pane, or without `add` writes its sums.
    #[expect(clippy::too_many_arguments, reason = "source and destination")]
    fn sum_strip<T: ValueElement>(
        &self,
        session: &TileSession,
        task: &WeightTask,
        left: &[T],
        right: &[T],
        runs: &StripRuns,
        add: bool,
        all: &Disjoint<f32>,
    ) {
        self.for_each_sum(task, runs, all, |place, runs, outputs| {
            let PanePlace { block, pair, rows, columns } = place;
            let (left, right) = (&left[block * TILE..], &right[2 * pair * TILE..]);
            let product = TileProduct { runs, apart: TILE, rows, columns, add, ahead: 0 };
            T::product::<true>(session, left, right, &product, outputs);
        });
    }

    /// Calls `add` for every group of runs and every place in the pane, with the sums of its one or two blocks of input
    /// channels.
    fn for_each_sum(
        &self,
        task: &WeightTask,
        runs: &StripRuns,
        all: &Disjoint<f32>,
        add: impl Fn(PanePlace, &[TileRun], &mut [&mut [f32]]),
    ) {
        let g = self.g;
        for block in task.blocks.clone().step_by(2) {
            for pair in task.pairs.clone() {
                let columns = columns_of(g.output.blocks(), pair);
                let tile = |block: usize, sum: usize| {
                    let at = self.tiles(task.part, block, pair).0 + sum * columns * TILE;
                    // SAFETY: a task owns its part of its blocks and pairs, and the two blocks differ.
                    unsafe { all.part(at, columns * TILE) }
                };
                let mut begin = 0;
                for &(sum, end) in &runs.ends {
                    let place = PanePlace {
                        block: block - task.blocks.start,
                        pair: pair - task.pairs.start,
                        rows: g.input.channels_in(block),
                        columns,
                    };
                    let runs = &runs.all[begin..end];
                    if block + 1 < task.blocks.end {
                        add(place, runs, &mut [tile(block, sum), tile(block + 1, sum)]);
                    } else {
                        add(place, runs, &mut [tile(block, sum)]);
                    }
                    begin = end;
                }
            }
        }
    }

    /// Adds the parts in order, and the sum to the gradient.
    fn merge(&self, scratch: &[f32], gradient: &mut [f32]) {
        let g = self.g;
        let (inputs, taps) = (g.input.channels, g.taps());
        let per_block = SIDE * inputs * taps;
        let variant = Variant::fastest();
        parallel::for_each_chunk(gradient, per_block, scratch.len(), |block, gradient| {
            let count = gradient.len() / (inputs * taps);
            with_scratch(self.sums() * TILE, |totals| {
                for input_block in 0..g.input.blocks() {
                    self.total(scratch, input_block, block, totals);
                    if let Some(size) = self.squares {
                        by_size!(size, F => {
                            winograd::gradients_of_kernels::<F, _, _>(variant, totals);
                        });
                    }
                    let len = g.input.channels_in(input_block) * taps;
                    let to = &mut gradient[input_block * SIDE * taps..];
                    let start = |lane| lane * inputs * taps;
                    match taps {
                        // The usual kernels, whose divisions the compiler turns into products.
                        1 => Interleaving { count, len, start, place: |c| c }
                            .add_lanes_to_rows(variant, totals, to),
                        9 => Interleaving { count, len, start, place: |c| c % 9 * SIDE + c / 9 }
                            .add_lanes_to_rows(variant, totals, to),
                        _ => {
                            let place = |c| c % taps * SIDE + c / taps;
                            Interleaving { count, len, start, place }
                                .add_lanes_to_rows(variant, totals, to);
                        }
                    }
                }
            });
        });
    }

    /// Adds up the parts for a block of input channels and a block of output channels.
    fn total(&self, scratch: &[f32], input_block: usize, block: usize, totals: &mut [f32]) {
        let (blocks, sums) = (self.g.output.blocks(), self.sums());
        let (pair, column) = (block / 2, block % 2);
        let columns = columns_of(blocks, pair);
        let first = (input_block * blocks + 2 * pair) * sums + column;
        totals.fill(0.);
        for part in scratch.chunks_exact(self.len()) {
            add_tiles(Variant::fastest(), &part[first * TILE..], columns * TILE, totals);
        }
    }
}

for_each_variant! {
    /// Adds tiles that lie `apart` numbers apart to adjacent ones.
    fn add_tiles(from: &[f32], apart: usize, to: &mut [f32]) {
        for (from, to) in from.chunks(apart).zip(to.chunks_exact_mut(TILE)) {
            for (to, from) in to.iter_mut().zip(from) {
                *to += from;
            }
        }
    }
}
