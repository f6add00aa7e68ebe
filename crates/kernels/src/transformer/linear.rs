//! Linear layers: blocked products with packed weights, and the step that ends them.

use std::ops::Range;

use super::activation::{MultiplyAdd, by_multiply_add, gelu_erf, gelu_quick, gelu_tanh, silu};
use super::{Factors, Gelu};
use crate::buffer::{with_scratch, with_scratch_of};
use crate::element::{Half, ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::packed_product::{PackedProduct, RightTiles, blocks, columns, groups_at_once, sums_len};
use crate::tiles::{self, TileOrder, pair_left};
use crate::transpose::transpose_tiles;
use crate::variant::for_each_variant;
use crate::{Buffer, Precision, Variant};

/// The weights and the bias of a linear layer, packed for products of one variant: tiles of 16 inputs × 16 outputs.
pub struct PackedLinear {
    inputs: usize,
    outputs: usize,
    tiles: RightTiles,
    /// Outputs of each of the two parts of a gated layer; the blocks of a pair are one of each.
    gated: Option<usize>,
    weights: Buffer,
    /// For each packed output, padding included.
    bias: Vec<f32>,
}

impl PackedLinear {
    /// Packs weights (outputs, inputs). Without a bias, it is 0.
    ///
    /// # Panics
    ///
    /// If the lengths do not fit each other.
    pub fn new(
        variant: Variant,
        precision: Precision,
        inputs: usize,
        weights: &[f32],
        bias: Option<&[f32]>,
    ) -> PackedLinear {
        let outputs = weights.len() / inputs;
        let all: Vec<Range<usize>> = blocks(0..outputs).collect();
        PackedLinear::pack((variant, precision), [inputs, outputs], None, weights, bias, &all)
    }

    /// Packs the weights of a gate, followed by as many of what it gates; both (outputs, inputs).
    ///
    /// # Panics
    ///
    /// If the lengths do not fit each other.
    pub fn gated(
        variant: Variant,
        precision: Precision,
        inputs: usize,
        weights: &[f32],
        bias: Option<&[f32]>,
    ) -> PackedLinear {
        let outputs = weights.len() / inputs;
        assert!(outputs.is_multiple_of(2), "gate and up have as many rows");
        let half = outputs / 2;
        let pairs = blocks(0..half).zip(blocks(half..outputs));
        let all: Vec<Range<usize>> = pairs.flat_map(|(gate, up)| [gate, up]).collect();
        PackedLinear::pack((variant, precision), [inputs, outputs], Some(half), weights, bias, &all)
    }

    /// The width of the rows that it reads.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The width of the rows of weights: for a gated layer, gate and up together.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    fn pack(
        (variant, precision): (Variant, Precision),
        [inputs, outputs]: [usize; 2],
        gated: Option<usize>,
        weights: &[f32],
        bias: Option<&[f32]>,
        blocks: &[Range<usize>],
    ) -> PackedLinear {
        assert!(inputs > 0 && weights.len() == outputs * inputs);
        assert!(bias.is_none_or(|bias| bias.len() == outputs));
        let tiles = RightTiles::new(variant, precision, inputs, blocks.len());
        let mut packed = Buffer::zeros_of(precision, tiles.len());
        let mut biases = vec![0f32; blocks.len() * SIDE];
        for (at, rows) in blocks.iter().enumerate() {
            by_precision!(precision, T => {
                pack_block(weights, inputs, rows.clone(), tiles, at, T::of_mut(&mut packed));
            });
            if let Some(bias) = bias {
                biases[at * SIDE..][..rows.len()].copy_from_slice(&bias[rows.clone()]);
            }
        }
        PackedLinear { inputs, outputs, tiles, gated, weights: packed, bias: biases }
    }
}

/// Packs the weights of up to 16 outputs, as block `at`.
fn pack_block<T: ValueElement>(
    weights: &[f32],
    inputs: usize,
    rows: Range<usize>,
    tiles: RightTiles,
    at: usize,
    packed: &mut [T],
) {
    for (block, inner) in blocks(0..inputs).enumerate() {
        let mut tile = [0f32; TILE];
        for (lane, row) in rows.clone().enumerate() {
            for (k, weight) in weights[row * inputs..][inner.clone()].iter().enumerate() {
                tile[k * SIDE + lane] = *weight;
            }
        }
        T::arrange_right(&tile, &mut packed[tiles.tile(block, at)..][..TILE]);
    }
}

/// Where the outputs of a linear layer go. Rows of `to` begin with the first row that is read.
pub enum LinearOutput<'a> {
    /// Rounded to the precision of `to`, whose rows are as wide as the outputs.
    Rows {
        /// Receives the rows.
        to: &'a mut Buffer,
        /// Index of the first row in `to`.
        first: usize,
    },
    /// Added to f32 rows, as wide as the outputs.
    Add {
        /// Receives the sum.
        to: &'a mut [f32],
        /// The row of `to` for each output row.
        spread: Spread,
    },
    /// Through a GELU, as factors of the next layer.
    Gelu {
        /// Receives the factors.
        to: &'a mut Factors,
        /// Which GELU.
        gelu: Gelu,
    },
    /// `silu(gate) · up`, as factors of the next layer; for a [gated](PackedLinear::gated) layer.
    Gated {
        /// Receives the factors.
        to: &'a mut Factors,
    },
}

/// Maps output rows to rows of a larger array: each `run` rows of outputs begin `stride` rows apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// Consecutive rows.
    pub run: usize,
    /// Rows from the beginning of a run to that of the next.
    pub stride: usize,
    /// Row of the first output row.
    pub first: usize,
    /// Output rows before the first one of this call.
    pub skip: usize,
}

impl Spread {
    /// Every row to the row of the same index.
    pub const NONE: Spread = Spread { run: usize::MAX, stride: 0, first: 0, skip: 0 };

    fn row(self, row: usize) -> usize {
        if self == Spread::NONE {
            return row;
        }
        let row = self.skip + row;
        row / self.run * self.stride + self.first + row % self.run
    }
}

/// `x Wᵀ + b` for some rows of `input`, written as `to` says.
///
/// # Panics
///
/// If the rows do not begin at a multiple of 16, widths, precisions or lengths do not fit, or the layer is packed for
/// another variant whose products take another order.
pub fn linear(
    variant: Variant,
    layer: &PackedLinear,
    input: &Factors,
    rows: Range<usize>,
    mut to: LinearOutput,
) {
    assert!(input.columns() == layer.inputs && rows.end <= input.rows());
    assert!(rows.start.is_multiple_of(SIDE));
    assert_eq!(matches!(to, LinearOutput::Gated { .. }), layer.gated.is_some());
    let precision = layer.weights.precision();
    let inner = layer.inputs.div_ceil(SIDE);
    let group = inner * TILE;
    let order = TileOrder::of(variant, precision);
    assert_eq!(order, layer.tiles.order(), "the layer is packed for another variant");
    let transposes = precision == Precision::F32 && tiles::prefers_left_transposed(variant);
    let at_once = rows.len().min(groups_at_once(order) * SIDE);
    let sums_len = sums_len(transposes, layer.inputs, layer.tiles.blocks(), at_once);
    for first in (0..rows.len()).step_by(at_once.max(1)) {
        let count = (rows.len() - first).min(at_once);
        let tiles = (rows.start + first) / SIDE * group;
        let tiles = tiles..tiles + count.div_ceil(SIDE) * group;
        let done = first..first + count;
        if transposes {
            let left = &f32::of(&input.numbers)[tiles];
            with_scratch(left.len() + sums_len, |scratch| {
                let (transposed, sums) = scratch.split_at_mut(left.len());
                transpose_tiles(variant, left, transposed);
                multiply::<f32, true>(variant, layer, transposed, done, sums, &mut to);
            });
        } else if order.is_paired() {
            let left = &Half::of(&input.numbers)[tiles];
            let len = count.div_ceil(SIDE) * layer.tiles.inner() * TILE;
            with_scratch_of::<Half, _>(len, sums_len, |paired, sums| {
                pair_left(variant, inner, left, paired);
                multiply::<Half, false>(variant, layer, paired, done, sums, &mut to);
            });
        } else {
            with_scratch(sums_len, |sums| {
                by_precision!(precision, T => {
                    let left = &T::of(&input.numbers)[tiles];
                    multiply::<T, false>(variant, layer, left, done, sums, &mut to);
                });
            });
        }
    }
}

/// Computes up to [`groups_at_once`] groups of rows, whose tiles are `left`, each transposed if `TRANSPOSED`.
fn multiply<T: ValueElement, const TRANSPOSED: bool>(
    variant: Variant,
    layer: &PackedLinear,
    left: &[T],
    rows: Range<usize>,
    sums: &mut [f32],
    store: &mut LinearOutput,
) {
    let (right, tiles) = (T::of(&layer.weights), layer.tiles);
    let product = PackedProduct { left, right, tiles, inner: layer.inputs, rows: rows.len() };
    product.for_each_pair::<TRANSPOSED>(variant, sums, |pair, sums| {
        let columns = columns(tiles.blocks(), pair);
        FinishedPair { layer, rows: rows.clone(), pair, columns }.store(variant, sums, store);
    });
}

/// Complete sums of some rows and one pair of output blocks.
struct FinishedPair<'a> {
    layer: &'a PackedLinear,
    /// Among those of the call.
    rows: Range<usize>,
    pair: usize,
    columns: usize,
}

impl FinishedPair<'_> {
    fn store(&self, variant: Variant, sums: &[f32], store: &mut LinearOutput) {
        for (group, sums) in sums.chunks(self.columns * TILE).enumerate() {
            let row = self.rows.start + group * SIDE;
            let rows = (self.rows.end - row).min(SIDE);
            if let LinearOutput::Gated { to } = store {
                let (gate, up) = sums.split_at(TILE);
                let biases = [0, 1].map(|column| self.bias(column));
                let shape = to.shape;
                assert!(row + rows <= to.rows() && 2 * to.columns() == self.layer.outputs);
                let at = row / SIDE * shape.pixel_len() + self.pair * TILE;
                by_precision!(to.numbers.precision(), T => {
                    let to = &mut T::of_mut(&mut to.numbers)[at..][..TILE];
                    by_multiply_add!(variant, M => {
                        store_gated::<T, M>(variant, gate, up, biases, to);
                    });
                });
                continue;
            }
            for (column, tile) in sums.chunks(TILE).enumerate() {
                self.store_tile(variant, tile, column, row..row + rows, store);
            }
        }
    }

    fn store_tile(
        &self,
        variant: Variant,
        tile: &[f32],
        column: usize,
        rows: Range<usize>,
        store: &mut LinearOutput,
    ) {
        let (width, bias, block) = (self.layer.outputs, self.bias(column), 2 * self.pair + column);
        let columns = block * SIDE..((block + 1) * SIDE).min(width);
        match store {
            LinearOutput::Rows { to, first } => {
                let rows = *first + rows.start..*first + rows.end;
                by_precision!(to.precision(), T => {
                    store_rows(variant, tile, bias, T::of_mut(to), width, rows, columns);
                });
            }
            LinearOutput::Add { to, spread } => {
                add_rows(variant, tile, bias, to, width, rows, columns, *spread);
            }
            LinearOutput::Gelu { to, gelu } => {
                assert!(rows.end <= to.rows() && to.columns() == width);
                let at = rows.start / SIDE * to.shape.pixel_len() + block * TILE;
                by_precision!(to.numbers.precision(), T => {
                    let to = &mut T::of_mut(&mut to.numbers)[at..][..TILE];
                    by_multiply_add!(variant, M => {
                        store_gelu::<T, M>(variant, tile, bias, *gelu, to);
                    });
                });
            }
            LinearOutput::Gated { .. } => unreachable!("stored in pairs"),
        }
    }

    fn bias(&self, column: usize) -> &[f32; SIDE] {
        let bias = self.layer.bias[(2 * self.pair + column) * SIDE..].first_chunk();
        bias.expect("one for each packed output")
    }
}

for_each_variant! {
    fn store_rows<T: ValueElement>(
        tile: &[f32],
        bias: &[f32; SIDE],
        to: &mut [T],
        width: usize,
        rows: Range<usize>,
        columns: Range<usize>,
    ) {
        for (sums, row) in tile.chunks_exact(SIDE).zip(rows) {
            let to = &mut to[row * width..][columns.start..];
            fetch(to, 2 * SIDE);
            if let Some(to) = whole_block(to, &columns) {
                for lane in 0..SIDE {
                    to[lane] = T::narrow(sums[lane] + bias[lane]);
                }
            } else {
                for (lane, to) in to[..columns.len()].iter_mut().enumerate() {
                    *to = T::narrow(sums[lane] + bias[lane]);
                }
            }
        }
    }
}

for_each_variant! {
    fn add_rows(
        tile: &[f32],
        bias: &[f32; SIDE],
        to: &mut [f32],
        width: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        spread: Spread,
    ) {
        for (sums, row) in tile.chunks_exact(SIDE).zip(rows) {
            let to = &mut to[spread.row(row) * width..][columns.start..];
            fetch(to, 2 * SIDE);
            if let Some(to) = whole_block(to, &columns) {
                for lane in 0..SIDE {
                    to[lane] += sums[lane] + bias[lane];
                }
            } else {
                for (lane, to) in to[..columns.len()].iter_mut().enumerate() {
                    *to += sums[lane] + bias[lane];
                }
            }
        }
    }
}

/// The numbers of a block of 16 columns, of constant size, so that loops over them become registers. The last
/// block of a row may have fewer.
#[inline(always)]
fn whole_block<'a, T>(numbers: &'a mut [T], columns: &Range<usize>) -> Option<&'a mut [T; SIDE]> {
    if columns.len() == SIDE { numbers.first_chunk_mut() } else { None }
}

/// Fetches the cache line of a number, if it is one of these. Blocks of columns are stored row by row, and rows are too far
/// apart for the processor to foresee what the next blocks need.
#[inline(always)]
fn fetch<T>(numbers: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(number) = numbers.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a fetch changes nothing, and the number exists.
        #[expect(unsafe_code, reason = "the intrinsic takes a pointer")]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>((&raw const *number).cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (numbers, at);
}

for_each_variant! {
    fn store_gelu<T: ValueElement, M: MultiplyAdd>(
        tile: &[f32],
        bias: &[f32; SIDE],
        gelu: Gelu,
        to: &mut [T],
    ) {
        match gelu {
            Gelu::Erf => store_through(tile, bias, to, gelu_erf::<M>),
            Gelu::Tanh => store_through(tile, bias, to, gelu_tanh::<M>),
            Gelu::Quick => store_through(tile, bias, to, gelu_quick::<M>),
        }
    }
}

#[inline(always)]
fn store_through<T: ValueElement>(
    tile: &[f32],
    bias: &[f32; SIDE],
    to: &mut [T],
    through: impl Fn(f32) -> f32,
) {
    for (to, sums) in to.chunks_exact_mut(SIDE).zip(tile.chunks_exact(SIDE)) {
        for lane in 0..SIDE {
            to[lane] = T::narrow(through(sums[lane] + bias[lane]));
        }
    }
}

for_each_variant! {
    fn store_gated<T: ValueElement, M: MultiplyAdd>(gate: &[f32], up: &[f32], biases: [&[f32; SIDE]; 2], to: &mut [T]) {
        let rows = gate.chunks_exact(SIDE).zip(up.chunks_exact(SIDE));
        for (to, (gate, up)) in to.chunks_exact_mut(SIDE).zip(rows) {
            for lane in 0..SIDE {
                let value = silu::<M>(gate[lane] + biases[0][lane]) * (up[lane] + biases[1][lane]);
                to[lane] = T::narrow(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed_product::{GROUPS, INNER};
    use crate::transformer::activation::Separate;
    use crate::transformer::tests::{noise, rounded, ways};

    /// Sizes that are not multiples of a tile, of two blocks of columns, of [`GROUPS`] or of [`INNER`].
    const ROWS: usize = GROUPS * SIDE + 37;
    const INPUTS: usize = INNER * SIDE + 21;
    const OUTPUTS: usize = 2 * SIDE + 5;

    struct LayerCase {
        weights: Vec<f32>,
        bias: Vec<f32>,
        input: Vec<f32>,
    }

    impl LayerCase {
        fn new(outputs: usize) -> LayerCase {
            let weights = noise(1, outputs * INPUTS);
            LayerCase { weights, bias: noise(2, outputs), input: noise(3, ROWS * INPUTS) }
        }

        fn factors(&self, precision: Precision) -> Factors {
            let mut factors = Factors::zeros(precision, ROWS, INPUTS);
            factors.shape.pack(&self.input, &mut factors.numbers);
            factors
        }

        /// One output in f64, of factors as the precision holds them.
        fn plain(&self, precision: Precision, row: usize, output: usize) -> f64 {
            let (x, w) = (&self.input[row * INPUTS..], &self.weights[output * INPUTS..]);
            let product = |(x, w): (&f32, &f32)| rounded(precision, *x) * rounded(precision, *w);
            let sum: f64 = x[..INPUTS].iter().zip(&w[..INPUTS]).map(product).sum();
            sum + f64::from(self.bias[output])
        }
    }

    /// A chain of 277 sums of up to about 30 in size, each rounded by half of 2⁻²³ of it.
    const BOUND: f64 = 277. * 30. * 6e-8;

    fn unpacked(factors: &Factors) -> Vec<f32> {
        let mut rows = vec![0.; factors.rows() * factors.columns()];
        factors.shape.unpack(&factors.numbers, &mut rows);
        rows
    }

    #[test]
    fn outputs_are_sums_of_products_and_bias() {
        let case = LayerCase::new(OUTPUTS);
        for (variant, precision) in ways() {
            let (input, bias) = (case.factors(precision), Some(&case.bias[..]));
            let layer = PackedLinear::new(variant, precision, INPUTS, &case.weights, bias);
            let mut added = vec![1f32; ROWS * OUTPUTS];
            let store = LinearOutput::Add { to: &mut added, spread: Spread::NONE };
            linear(variant, &layer, &input, 0..ROWS, store);
            for (at, got) in added.iter().enumerate() {
                let want = 1. + case.plain(precision, at / OUTPUTS, at % OUTPUTS);
                assert!((f64::from(*got) - want).abs() < BOUND, "{variant} {at}: {got}, {want}");
            }

            let mut written = Buffer::zeros_of(precision, (ROWS + 3) * OUTPUTS);
            linear(
                variant,
                &layer,
                &input,
                0..ROWS,
                LinearOutput::Rows { to: &mut written, first: 3 },
            );
            by_precision!(precision, T => {
                let rows = T::of(&written);
                assert!(rows[..3 * OUTPUTS].iter().all(|x| x.wide() == 0.));
                for (at, got) in rows[3 * OUTPUTS..].iter().enumerate() {
                    let want = case.plain(precision, at / OUTPUTS, at % OUTPUTS);
                    let bound = BOUND + if precision == Precision::Bf16 { want.abs() / 256. } else { 0. };
                    assert!((f64::from(got.wide()) - want).abs() < bound, "{variant} {at}");
                }
            });
        }
    }

    #[test]
    fn a_row_has_the_same_bits_among_any_others() {
        let case = LayerCase::new(OUTPUTS);
        for (variant, precision) in ways() {
            let input = case.factors(precision);
            let layer = PackedLinear::new(variant, precision, INPUTS, &case.weights, None);
            let mut all = vec![0f32; ROWS * OUTPUTS];
            let store = LinearOutput::Add { to: &mut all, spread: Spread::NONE };
            linear(variant, &layer, &input, 0..ROWS, store);
            for row in [0, 15, 16, 100, ROWS - 1] {
                let mut alone = Factors::zeros(precision, 1, INPUTS);
                alone.put(0, 0, &case.input[row * INPUTS..][..INPUTS]);
                let mut one = vec![0f32; OUTPUTS];
                let store = LinearOutput::Add { to: &mut one, spread: Spread::NONE };
                linear(variant, &layer, &alone, 0..1, store);
                assert_eq!(one, all[row * OUTPUTS..][..OUTPUTS], "{variant} {row}");
            }
        }
    }

    #[test]
    fn a_long_inner_side_in_parts_gives_the_same_bits() {
        let inputs = 4096; // More than one part with AVX2.
        let (weights, input) = (noise(1, OUTPUTS * inputs), noise(3, ROWS * inputs));
        for (variant, precision) in ways() {
            let layer = PackedLinear::new(variant, precision, inputs, &weights, None);
            let mut factors = Factors::zeros(precision, ROWS, inputs);
            factors.shape.pack(&input, &mut factors.numbers);
            let mut all = vec![0f32; ROWS * OUTPUTS];
            let to = LinearOutput::Add { to: &mut all, spread: Spread::NONE };
            linear(variant, &layer, &factors, 0..ROWS, to);
            for first in (0..ROWS).step_by(SIDE) {
                let rows = first..(first + SIDE).min(ROWS);
                let mut part = vec![0f32; rows.len() * OUTPUTS];
                let to = LinearOutput::Add { to: &mut part, spread: Spread::NONE };
                linear(variant, &layer, &factors, rows, to);
                assert_eq!(part, all[first * OUTPUTS..][..part.len()], "{variant}, row {first}");
            }
        }
    }

    #[test]
    fn later_rows_are_spread_over_a_larger_array() {
        for variant in Variant::available() {
            rows_are_spread(variant);
        }
    }

    fn rows_are_spread(variant: Variant) {
        let (case, precision) = (LayerCase::new(OUTPUTS), Precision::F32);
        let layer = PackedLinear::new(variant, precision, INPUTS, &case.weights, Some(&case.bias));
        // Runs of 10 rows begin 12 rows apart, from row 2 on; the first 32 rows are left out.
        let spread = Spread { run: 10, stride: 12, first: 2, skip: 32 };
        let rows = ROWS.div_ceil(10) * 12;
        let mut to = vec![0f32; rows * OUTPUTS];
        let store = LinearOutput::Add { to: &mut to, spread };
        linear(variant, &layer, &case.factors(precision), 32..ROWS, store);
        for (at, got) in to.iter().enumerate() {
            let (row, output) = (at / OUTPUTS, at % OUTPUTS);
            let source = (row % 12).checked_sub(2).map(|at| row / 12 * 10 + at);
            let source = source.filter(|source| (32..ROWS).contains(source));
            let want = source.map_or(0., |source| case.plain(precision, source, output));
            assert!((f64::from(*got) - want).abs() < BOUND, "{row}, {output}");
        }
    }

    #[test]
    fn activations_end_a_layer_and_padding_stays_zero() {
        let case = LayerCase::new(OUTPUTS);
        let forms = [
            (Gelu::Erf, gelu_erf::<Separate> as fn(f32) -> f32),
            (Gelu::Tanh, gelu_tanh::<Separate>),
            (Gelu::Quick, gelu_quick::<Separate>),
        ];
        for (variant, precision) in ways() {
            let input = case.factors(precision);
            let layer =
                PackedLinear::new(variant, precision, INPUTS, &case.weights, Some(&case.bias));
            for (gelu, plain) in forms {
                let mut to = Factors::zeros(precision, ROWS, OUTPUTS);
                linear(variant, &layer, &input, 0..ROWS, LinearOutput::Gelu { to: &mut to, gelu });
                for (at, got) in unpacked(&to).into_iter().enumerate() {
                    let sum = case.plain(precision, at / OUTPUTS, at % OUTPUTS) as f32;
                    check_rounded(precision, got, plain(sum));
                }
                // Column 37 of 48, of the first row.
                by_precision!(precision, T => assert_eq!(T::of(&to.numbers)[2 * TILE + 5].wide(), 0.));
            }
        }
    }

    #[test]
    fn the_first_half_of_a_gated_layer_is_the_gate() {
        let case = LayerCase::new(2 * OUTPUTS);
        for (variant, precision) in ways() {
            let layer =
                PackedLinear::gated(variant, precision, INPUTS, &case.weights, Some(&case.bias));
            assert_eq!((layer.inputs(), layer.outputs()), (INPUTS, 2 * OUTPUTS));
            let mut to = Factors::zeros(precision, ROWS, OUTPUTS);
            let input = case.factors(precision);
            linear(variant, &layer, &input, 0..ROWS, LinearOutput::Gated { to: &mut to });
            for (at, got) in unpacked(&to).into_iter().enumerate() {
                let (row, output) = (at / OUTPUTS, at % OUTPUTS);
                let gate = case.plain(precision, row, output) as f32;
                let up = case.plain(precision, row, OUTPUTS + output) as f32;
                check_rounded(precision, got, silu::<Separate>(gate) * up);
            }
        }
    }

    fn check_rounded(precision: Precision, got: f32, want: f32) {
        let rounding = if precision == Precision::Bf16 { want.abs() / 256. } else { 0. };
        let bound = 30. * BOUND as f32 + rounding;
        assert!((got - want).abs() < bound, "{got}, {want}");
    }
}
