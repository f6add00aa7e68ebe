//! Attention of one picture.

use super::Factors;
use super::activation::{MultiplyAdd, by_multiply_add, exp_by};
use super::factors::put;
use crate::buffer::with_scratch_of;
use crate::element::{ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::packed_product::{RightTiles, columns};
use crate::tiles::{TileProduct, TileRun, TileSession, pair_left};
use crate::variant::for_each_variant;
use crate::{Buffer, Shape, Variant};

/// Queries, keys or values of one picture: equally spaced rows of a buffer.
#[derive(Clone, Copy)]
pub struct TokenRows<'a> {
    /// The buffer.
    pub numbers: &'a Buffer,
    /// Index of the first number of the first row.
    pub first: usize,
    /// Numbers from the beginning of a row to that of the next.
    pub stride: usize,
    /// The number of rows.
    pub rows: usize,
}

/// Rotary positions (Su et al. 2021, arXiv:2104.09864): the rotation of each pair `(x_j, x_{j + e/2})` of a
/// head of width `e`.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// Tokens before the first one that is rotated.
    pub prefix: usize,
    /// Cosines, (tokens after the prefix, e/2).
    pub cosines: &'a [f32],
    /// Sines, as the cosines.
    pub sines: &'a [f32],
}

/// Attention in several heads (Vaswani et al. 2017, arXiv:1706.03762): `softmax(Q Kᵀ / √e) V`.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// Heads, side by side in each row.
    pub heads: usize,
    /// The width of a head, `e`.
    pub head_width: usize,
    /// `Q`.
    pub queries: TokenRows<'a>,
    /// `K`.
    pub keys: TokenRows<'a>,
    /// `V`, as many rows as keys.
    pub values: TokenRows<'a>,
    /// Rotates queries and keys.
    pub rotation: Option<Rotation<'a>>,
}

/// Computes the attention of one picture into rows of `to`, from `first_row` on: one row for each query,
/// the heads side by side.
///
/// # Panics
///
/// If lengths, widths or precisions do not fit each other.
pub fn attention(variant: Variant, call: &Attention, to: &mut Factors, first_row: usize) {
    assert_eq!(call.keys.rows, call.values.rows);
    assert!(call.keys.rows > 0 && call.head_width > 0);
    assert!(first_row + call.queries.rows <= to.rows());
    if let Some(Rotation { prefix, cosines, sines }) = call.rotation {
        let rotated = call.keys.rows.max(call.queries.rows).saturating_sub(prefix);
        assert!(call.head_width.is_multiple_of(2) && cosines.len() == sines.len());
        assert_eq!(cosines.len(), rotated * (call.head_width / 2));
    }
    assert_eq!(call.heads * call.head_width, to.columns());
    let shape = to.shape;
    by_precision!(to.numbers.precision(), T => {
        let to = Destination { shape, numbers: T::of_mut(&mut to.numbers), first_row };
        of_picture::<T>(variant, call, to);
    });
}

struct Destination<'a, T> {
    shape: Shape,
    numbers: &'a mut [T],
    first_row: usize,
}

/// The extents of one head, as counts and in blocks of 16.
#[derive(Clone, Copy)]
struct HeadExtent {
    width: usize,
    queries: usize,
    keys: usize,
    blocks: usize,
    query_blocks: usize,
    key_blocks: usize,
}

impl HeadExtent {
    fn of(call: &Attention) -> HeadExtent {
        let [width, queries, keys] = [call.head_width, call.queries.rows, call.keys.rows];
        let [blocks, query_blocks, key_blocks] = [width, queries, keys].map(|n| n.div_ceil(SIDE));
        HeadExtent { width, queries, keys, blocks, query_blocks, key_blocks }
    }
}

fn of_picture<T: ValueElement>(variant: Variant, call: &Attention, mut to: Destination<T>) {
    let head = HeadExtent::of(call);
    let session = TileSession::begin(variant);
    let key_tiles = RightTiles::new(variant, T::PRECISION, head.width, head.key_blocks);
    let value_tiles = RightTiles::new(variant, T::PRECISION, head.keys, head.blocks);
    let is_paired = key_tiles.order().is_paired();
    let query_len = head.query_blocks * head.blocks * TILE;
    let [score_len, output_len] = [head.key_blocks, head.blocks].map(|n| 2 * n * TILE);
    // Two groups of queries or weights.
    let paired_len = 2 * key_tiles.inner().max(value_tiles.inner()) * TILE;
    let paired_len = if is_paired { paired_len } else { 0 };
    let factor_len = query_len + key_tiles.len() + value_tiles.len() + score_len + paired_len;
    let plain_len = head.queries.max(head.keys) * head.width;
    let sum_len = score_len + output_len + plain_len;
    with_scratch_of::<T, _>(factor_len, sum_len, |factors, sums| {
        let (queries, factors) = factors.split_at_mut(query_len);
        let (keys, factors) = factors.split_at_mut(key_tiles.len());
        let (values, factors) = factors.split_at_mut(value_tiles.len());
        let (weights, paired) = factors.split_at_mut(score_len);
        // Zeros along the inner side stay as they are; those of keys and values are not written again.
        keys.fill(T::narrow(0.));
        values.fill(T::narrow(0.));
        let (scores, sums) = sums.split_at_mut(score_len);
        let (output, plain) = sums.split_at_mut(output_len);
        for at in (0..call.heads).map(|h| h * head.width) {
            let rotation = call.rotation.as_ref();
            load(
                variant,
                T::of(call.queries.numbers),
                &call.queries,
                at,
                head.width,
                rotation,
                plain,
            );
            pack_rows(variant, plain, head.width, head.queries, queries);
            load(variant, T::of(call.keys.numbers), &call.keys, at, head.width, rotation, plain);
            pack_columns(variant, plain, head.width, head.keys, key_tiles, keys);
            load(variant, T::of(call.values.numbers), &call.values, at, head.width, None, plain);
            pack_inner(variant, plain, head.width, head.keys, value_tiles, values);
            let packed = PackedHead { queries, keys, key_tiles, values, value_tiles };
            for first in (0..head.query_blocks).step_by(2) {
                let sums = attend(&session, head, &packed, first, scores, weights, output, paired);
                write(variant, head, at, first, output, &sums, &mut to);
            }
        }
    });
}

/// The factors of one head.
struct PackedHead<'a, T> {
    queries: &'a [T],
    keys: &'a [T],
    key_tiles: RightTiles,
    values: &'a [T],
    value_tiles: RightTiles,
}

/// Computes the attention of one or two groups of 16 queries, from group `first` on. Writes weighted sums of
/// values to `output`, in tiles (group, block), and returns the divisor of each row. Left tiles are paired in `paired`
/// where the products need that.
#[expect(clippy::too_many_arguments, reason = "factors and memory for what comes between")]
fn attend<T: ValueElement>(
    session: &TileSession,
    head: HeadExtent,
    packed: &PackedHead<T>,
    first: usize,
    scores: &mut [f32],
    weights: &mut [T],
    output: &mut [f32],
    paired: &mut [T],
) -> [f32; 2 * SIDE] {
    let rows = (head.queries - first * SIDE).min(2 * SIDE);
    let queries = &packed.queries[first * head.blocks * TILE..];
    let of_scores = Multiplication { rows, inner: head.width, tiles: packed.key_tiles };
    of_scores.run(session, queries, packed.keys, scores, paired);
    let scale = 1. / (head.width as f32).sqrt();
    let (len, mut sums) = (head.key_blocks * TILE, [1f32; 2 * SIDE]);
    for (side, sums) in sums.chunks_mut(SIDE).take(rows.div_ceil(SIDE)).enumerate() {
        let (scores, weights) =
            (&mut scores[side * len..][..len], &mut weights[side * len..][..len]);
        let variant = session.variant();
        by_multiply_add!(variant, M => {
            softmax::<T, M>(variant, scores, head.keys, scale, weights, sums);
        });
    }
    let of_output = Multiplication { rows, inner: head.keys, tiles: packed.value_tiles };
    of_output.run(session, weights, packed.values, output, paired);
    sums
}

/// The product of one or two groups of rows with all columns.
struct Multiplication {
    /// Rows in both groups.
    rows: usize,
    inner: usize,
    tiles: RightTiles,
}

impl Multiplication {
    /// Writes tiles in the order (group, block of columns).
    fn run<T: ValueElement>(
        &self,
        session: &TileSession,
        left: &[T],
        right: &[T],
        to: &mut [f32],
        paired: &mut [T],
    ) {
        let (inner, groups) = (self.inner.div_ceil(SIDE), self.rows.div_ceil(SIDE));
        let left = if self.tiles.order().is_paired() {
            pair_left(session.variant(), inner, &left[..groups * inner * TILE], paired);
            &*paired
        } else {
            left
        };
        let blocks = self.tiles.blocks();
        let (a, b) = to.split_at_mut(blocks * TILE);
        for pair in 0..blocks.div_ceil(2) {
            let columns = columns(blocks, pair);
            let right_at = self.tiles.tile(0, 2 * pair);
            let runs = [TileRun { left: 0, right: right_at, inner: self.inner }];
            let rows = self.rows.min(SIDE);
            let product = TileProduct {
                runs: &runs,
                apart: self.tiles.inner() * TILE,
                rows,
                columns,
                add: false,
                ahead: 0,
            };
            let at = 2 * pair * TILE..(2 * pair + columns) * TILE;
            let a = &mut a[at.clone()];
            if self.rows > SIDE {
                T::product::<false>(session, left, right, &product, &mut [a, &mut b[at]]);
            } else {
                T::product::<false>(session, left, right, &product, &mut [a]);
            }
        }
    }
}

for_each_variant! {
    /// Writes the rows of one or two groups, from group `first` on, divided by their sums, to columns from `at` on.
    fn write<T: ValueElement>(
        head: HeadExtent,
        at: usize,
        first: usize,
        output: &[f32],
        sums: &[f32; 2 * SIDE],
        to: &mut Destination<T>,
    ) {
        let rows = (head.queries - first * SIDE).min(2 * SIDE);
        for (row, sum) in sums.iter().enumerate().take(rows) {
            let tiles = &output[row / SIDE * head.blocks * TILE..][..head.blocks * TILE];
            for (block, tile) in tiles.chunks_exact(TILE).enumerate() {
                let width = (head.width - block * SIDE).min(SIDE);
                let from: &[f32; SIDE] = tile[row % SIDE * SIDE..].first_chunk().expect("a row");
                let values = from.map(|x| x / sum);
                let (row, column) = (to.first_row + first * SIDE + row, at + block * SIDE);
                put(to.shape, to.numbers, row, column, &values[..width]);
            }
        }
    }
}

for_each_variant! {
    /// Widens one head of all rows to f32, (row, e), and rotates it.
    fn load<T: ValueElement>(
        numbers: &[T],
        from: &TokenRows,
        column: usize,
        width: usize,
        rotation: Option<&Rotation>,
        to: &mut [f32],
    ) {
        for (row, to) in to.chunks_exact_mut(width).take(from.rows).enumerate() {
            let from = &numbers[from.first + row * from.stride + column..][..width];
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.wide();
            }
            let Some(rotation) = rotation else { continue };
            let Some(row) = row.checked_sub(rotation.prefix) else { continue };
            let half = width / 2;
            let (cosines, sines) = (&rotation.cosines[row * half..], &rotation.sines[row * half..]);
            let (first, second) = to.split_at_mut(half);
            for (((x, y), c), s) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                (*x, *y) = (*x * c - *y * s, *y * c + *x * s);
            }
        }
    }
}

for_each_variant! {
    /// Packs rows as the left side of a product: tiles in the order (group, block).
    fn pack_rows<T: ValueElement>(plain: &[f32], width: usize, rows: usize, to: &mut [T]) {
        to.fill(T::narrow(0.));
        let shape = Shape::features(rows, width);
        for (row, values) in plain.chunks_exact(width).take(rows).enumerate() {
            put(shape, to, row, 0, values);
        }
    }
}

for_each_variant! {
    /// Packs rows as the columns of a right side.
    fn pack_columns<T: ValueElement>(
        plain: &[f32],
        width: usize,
        rows: usize,
        tiles: RightTiles,
        to: &mut [T],
    ) {
        let blocks = width.div_ceil(SIDE);
        for (group, values) in plain[..rows * width].chunks(SIDE * width).enumerate() {
            for block in 0..blocks {
                // Of a constant size, so that the transposition becomes shuffles of registers.
                let mut square = [[0f32; SIDE]; SIDE];
                for (square, values) in square.iter_mut().zip(values.chunks_exact(width)) {
                    for (to, value) in square.iter_mut().zip(&values[block * SIDE..]) {
                        *to = *value;
                    }
                }
                let mut tile = [[0f32; SIDE]; SIDE];
                for k in 0..SIDE {
                    for row in 0..SIDE {
                        tile[k][row] = square[row][k];
                    }
                }
                let at = tiles.tile(block, group);
                let tile = tile.as_flattened().first_chunk().expect("256 numbers");
                T::arrange_right(tile, &mut to[at..at + TILE]);
            }
        }
    }
}

for_each_variant! {
    /// Packs rows as the inner side of a right side.
    fn pack_inner<T: ValueElement>(
        plain: &[f32],
        width: usize,
        rows: usize,
        tiles: RightTiles,
        to: &mut [T],
    ) {
        let blocks = width.div_ceil(SIDE);
        for (group, values) in plain[..rows * width].chunks(SIDE * width).enumerate() {
            for block in 0..blocks {
                let mut tile = [0f32; TILE];
                for (tile, values) in tile.chunks_exact_mut(SIDE).zip(values.chunks_exact(width)) {
                    for (to, value) in tile.iter_mut().zip(&values[block * SIDE..]) {
                        *to = *value;
                    }
                }
                let at = tiles.tile(group, block);
                T::arrange_right(&tile, &mut to[at..at + TILE]);
            }
        }
    }
}

for_each_variant! {
    /// `e^(scale (s − largest))` of 16 rows of scores, in tiles, and the sum of each row.
    fn softmax<T: ValueElement, M: MultiplyAdd>(
        scores: &mut [f32],
        keys: usize,
        scale: f32,
        to: &mut [T],
        sums: &mut [f32],
    ) {
        if !keys.is_multiple_of(SIDE) {
            let last = scores.len() - TILE;
            for row in scores[last..].chunks_exact_mut(SIDE) {
                row[keys % SIDE..].fill(f32::NEG_INFINITY);
            }
        }
        for (row, total) in sums.iter_mut().enumerate() {
            let mut most = [f32::NEG_INFINITY; SIDE];
            for tile in scores.chunks_exact(TILE) {
                for (most, score) in most.iter_mut().zip(&tile[row * SIDE..][..SIDE]) {
                    *most = if *score > *most { *score } else { *most };
                }
            }
            let most = most.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
            let mut lanes = [0f32; SIDE];
            for (tile, to) in scores.chunks_exact(TILE).zip(to.chunks_exact_mut(TILE)) {
                let (scores, to) = (&tile[row * SIDE..][..SIDE], &mut to[row * SIDE..][..SIDE]);
                for lane in 0..SIDE {
                    // Padding keys weigh e⁻⁸⁷ beside a sum of at least 1, and their values are 0.
                    let weight = exp_by::<M>((scores[lane] - most) * scale);
                    lanes[lane] += weight;
                    to[lane] = T::narrow(weight);
                }
            }
            *total = lanes.iter().sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;
    use crate::transformer::tests::{noise, rounded, ways};

    const HEADS: usize = 2;

    /// A picture's queries, keys and values side by side, after three numbers of something else.
    struct PictureCase {
        tokens: usize,
        width: usize,
        numbers: Vec<f32>,
        angles: Vec<f32>,
    }

    impl PictureCase {
        fn new(tokens: usize, width: usize) -> PictureCase {
            let numbers = noise(tokens as u32, 3 + tokens * 3 * HEADS * width);
            let numbers = numbers.iter().map(|x| 2. * x).collect();
            PictureCase { tokens, width, numbers, angles: noise(4, tokens * (width / 2)) }
        }

        fn buffer(&self, precision: Precision) -> Buffer {
            let mut buffer = Buffer::zeros_of(precision, self.numbers.len());
            by_precision!(precision, T => {
                for (to, from) in T::of_mut(&mut buffer).iter_mut().zip(&self.numbers) {
                    *to = T::narrow(*from);
                }
            });
            buffer
        }

        /// One number of a row; `part` is 0 for queries, 1 for keys and 2 for values.
        fn number(&self, precision: Precision, part: usize, row: usize, column: usize) -> f64 {
            let width = HEADS * self.width;
            rounded(precision, self.numbers[3 + row * 3 * width + part * width + column])
        }

        /// A row of one head, rotated after the prefix.
        fn row(
            &self,
            precision: Precision,
            part: usize,
            head: usize,
            row: usize,
            prefix: usize,
        ) -> Vec<f64> {
            let (e, half) = (self.width, self.width / 2);
            let x: Vec<f64> =
                (0..e).map(|j| self.number(precision, part, row, head * e + j)).collect();
            if part == 2 || row < prefix {
                return x;
            }
            let angle = |j: usize| f64::from(self.angles[(row - prefix) * half + j % half]);
            let turned = |j: usize| if j < half { -x[j + half] } else { x[j - half] };
            (0..e).map(|j| x[j] * angle(j).cos() + turned(j) * angle(j).sin()).collect()
        }

        /// Attention in f64.
        fn plain(&self, precision: Precision, prefix: usize, row: usize, head: usize) -> Vec<f64> {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let query = self.row(precision, 0, head, row, prefix);
            let keys = (0..self.tokens).map(|row| self.row(precision, 1, head, row, prefix));
            let scale = (self.width as f64).sqrt();
            let weights: Vec<f64> = keys.map(|key| (dot(&query, &key) / scale).exp()).collect();
            let mut output = vec![0.; self.width];
            for (row, weight) in weights.iter().enumerate() {
                let value = self.row(precision, 2, head, row, prefix);
                output.iter_mut().zip(value).for_each(|(to, value)| *to += weight * value);
            }
            let sum: f64 = weights.iter().sum();
            output.iter().map(|x| x / sum).collect()
        }
    }

    /// The call on a whole picture of this case, with its queries from row `from` on.
    fn call<'a>(
        case: &PictureCase,
        numbers: &'a Buffer,
        from: usize,
        rotation: Option<Rotation<'a>>,
    ) -> Attention<'a> {
        let width = HEADS * case.width;
        let part = |part: usize, from: usize| TokenRows {
            numbers,
            first: 3 + from * 3 * width + part * width,
            stride: 3 * width,
            rows: case.tokens - from,
        };
        let [queries, keys, values] = [part(0, from), part(1, 0), part(2, 0)];
        Attention { heads: HEADS, head_width: case.width, queries, keys, values, rotation }
    }

    fn unpacked(factors: &Factors) -> Vec<f32> {
        let mut rows = vec![0.; factors.rows() * factors.columns()];
        factors.shape.unpack(&factors.numbers, &mut rows);
        rows
    }

    #[test]
    fn every_variant_attends_as_f64_does() {
        let before = 5;
        // Token counts and widths of one tile, and others that are not multiples of a tile.
        for (tokens, e, prefix) in [(1, 4, 0), (16, 16, 0), (37, 20, 0), (37, 20, 5), (70, 36, 1)] {
            let case = PictureCase::new(tokens, e);
            let [cosines, sines] =
                [f32::cos, f32::sin].map(|f| case.angles.iter().map(|a| f(*a)).collect::<Vec<_>>());
            let len = (tokens - prefix) * (e / 2);
            let rotation = Rotation { prefix, cosines: &cosines[..len], sines: &sines[..len] };
            let rotation = (prefix > 0).then_some(rotation);
            let prefix = if prefix > 0 { prefix } else { tokens };
            for (variant, precision) in ways() {
                let numbers = case.buffer(precision);
                let mut to = Factors::zeros(precision, before + tokens, HEADS * e);
                attention(variant, &call(&case, &numbers, 0, rotation), &mut to, before);
                let got = unpacked(&to);
                assert!(got[..before * HEADS * e].iter().all(|x| *x == 0.));
                // f32: chains of 70 numbers below 4, exponents within 2e-7. bf16: rotated factors, weights
                // and results are rounded by up to 1/256 each.
                let bound = if precision == Precision::F32 { 1e-5 } else { 0.03 };
                for (row, head) in (0..tokens).flat_map(|row| [(row, 0), (row, 1)]) {
                    let want = case.plain(precision, prefix, row, head);
                    let at = (before + row) * HEADS * e + head * e;
                    for (got, want) in got[at..].iter().zip(&want) {
                        let off = (f64::from(*got) - want).abs();
                        assert!(
                            off < bound,
                            "{variant} {precision:?} {tokens} {e} {row}: {got}, {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_query_has_the_same_bits_among_any_others() {
        let case = PictureCase::new(50, 24);
        for (variant, precision) in ways() {
            let numbers = case.buffer(precision);
            let mut all = Factors::zeros(precision, 50, HEADS * 24);
            attention(variant, &call(&case, &numbers, 0, None), &mut all, 0);
            let mut last = Factors::zeros(precision, 3, HEADS * 24);
            attention(variant, &call(&case, &numbers, 47, None), &mut last, 0);
            assert_eq!(unpacked(&all)[47 * HEADS * 24..], unpacked(&last), "{variant}");
        }
    }

    #[test]
    fn equal_keys_give_the_mean_of_the_values() {
        let (tokens, e) = (19, 4);
        let mut numbers = Buffer::zeros(tokens * 3 * e);
        for (row, numbers) in numbers.chunks_mut(3 * e).enumerate() {
            numbers[2 * e..].fill(row as f32);
        }
        let part = |part: usize| TokenRows {
            numbers: &numbers,
            first: part * e,
            stride: 3 * e,
            rows: tokens,
        };
        let [queries, keys, values] = [0, 1, 2].map(part);
        let call = Attention { heads: 1, head_width: e, queries, keys, values, rotation: None };
        for variant in Variant::testable() {
            let mut to = Factors::zeros(Precision::F32, tokens, e);
            attention(variant, &call, &mut to, 0);
            assert!(unpacked(&to).iter().all(|x| (x - 9.).abs() < 1e-5), "{variant}");
        }
    }
}
