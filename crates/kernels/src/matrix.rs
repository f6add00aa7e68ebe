//! Products of plain matrices on one thread.

use std::ops::Range;

use crate::buffer::with_scratch;
use crate::layout::{SIDE, TILE};
use crate::packed_product::{GROUPS, PackedProduct, RightTiles, blocks, sums_len};
use crate::tiles::prefers_left_transposed;
use crate::transpose::Interleaving;
use crate::{Precision, Variant};

/// The extents of a matrix and its order in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixOrder {
    /// The number of rows.
    pub rows: usize,
    /// The number of columns.
    pub columns: usize,
    /// Whether columns are consecutive in memory, and not rows.
    pub is_transposed: bool,
}

impl MatrixOrder {
    /// Numbers from a column to the next, and from a row to the next.
    fn steps(self) -> [isize; 2] {
        match self.is_transposed {
            false => [1, self.columns as isize],
            true => [self.rows as isize, 1],
        }
    }
}

/// A number type of matrices: f32, which is multiplied in tiles, or f64, by the crate `gemm`.
pub trait MatrixNumber: Copy + 'static + sealed::Product {}

impl MatrixNumber for f32 {}

impl MatrixNumber for f64 {}

mod sealed {
    use super::{MatrixOrder, Variant};

    pub trait Product: Sized {
        fn product(
            variant: Variant,
            a: (&[Self], MatrixOrder),
            b: (&[Self], MatrixOrder),
            product: &mut [Self],
        );
    }
}

/// Writes `a · b` to `product`, row by row. It runs on this thread alone, so that callers divide their work
/// and the bits do not depend on the number of threads. In f32, each number is one chain of multiply-adds along the inner
/// side, so the bits of a row do not depend on the other rows.
///
/// # Panics
///
/// If a slice does not have the length of its matrix, or the extents do not fit.
pub fn multiply<T: MatrixNumber>(
    variant: Variant,
    (a, of_a): (&[T], MatrixOrder),
    (b, of_b): (&[T], MatrixOrder),
    product: &mut [T],
) {
    assert!(a.len() == of_a.rows * of_a.columns && b.len() == of_b.rows * of_b.columns);
    assert!(of_a.columns == of_b.rows && product.len() == of_a.rows * of_b.columns);
    T::product(variant, (a, of_a), (b, of_b), product);
}

impl sealed::Product for f64 {
    fn product(
        _: Variant,
        (a, of_a): (&[f64], MatrixOrder),
        (b, of_b): (&[f64], MatrixOrder),
        product: &mut [f64],
    ) {
        let ([a_column, a_row], [b_column, b_row]) = (of_a.steps(), of_b.steps());
        // SAFETY: the steps address the numbers of each matrix, which its slice has (checked by `multiply`);
        // `product` is a slice of its own.
        unsafe {
            gemm::gemm(
                of_a.rows,
                of_b.columns,
                of_a.columns,
                product.as_mut_ptr(),
                1,
                of_b.columns as isize,
                false,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                b_column,
                b_row,
                0.,
                1.,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

impl sealed::Product for f32 {
    fn product(
        variant: Variant,
        (a, of_a): (&[f32], MatrixOrder),
        (b, of_b): (&[f32], MatrixOrder),
        product: &mut [f32],
    ) {
        let (inner, width) = (of_a.columns, of_b.columns);
        if inner == 0 {
            return product.fill(0.);
        }
        let group = inner.div_ceil(SIDE) * TILE;
        // A transposed matrix has transposed tiles in memory.
        let transposes = of_a.is_transposed || prefers_left_transposed(variant);
        let blocks = width.div_ceil(SIDE);
        let tiles = RightTiles::new(variant, Precision::F32, inner, blocks);
        let (right_len, left_len) = (tiles.len(), GROUPS.min(of_a.rows.div_ceil(SIDE)) * group);
        let rows_at_once = of_a.rows.min(GROUPS * SIDE);
        let sums_len = sums_len(transposes, inner, blocks, rows_at_once);
        with_scratch(right_len + left_len + sums_len, |scratch| {
            let (right, scratch) = scratch.split_at_mut(right_len);
            let (left, sums) = scratch.split_at_mut(left_len);
            pack_right(variant, (b, of_b), tiles, right);
            for first in (0..of_a.rows).step_by(GROUPS * SIDE) {
                let rows = first..(first + GROUPS * SIDE).min(of_a.rows);
                let product = &mut product[rows.start * width..rows.end * width];
                pack_left(variant, (a, of_a), rows.clone(), transposes, left);
                let packed = PackedProduct { left, right, tiles, inner, rows: rows.len() };
                let finish = |pair, sums: &[f32]| unpack(sums, pair, width, product);
                if transposes {
                    packed.for_each_pair::<true>(variant, sums, finish);
                } else {
                    packed.for_each_pair::<false>(variant, sums, finish);
                }
            }
        });
    }
}

/// Packs the right side of a product. Columns past the last one are zero.
fn pack_right(
    variant: Variant,
    (b, of_b): (&[f32], MatrixOrder),
    tiles: RightTiles,
    right: &mut [f32],
) {
    let (inner, width) = (of_b.rows, of_b.columns);
    for (block, lanes) in blocks(0..width).enumerate() {
        let row = |k: usize| tiles.tile(k / SIDE, block) + k % SIDE * SIDE;
        if lanes.len() < SIDE {
            (0..inner).for_each(|k| right[row(k)..][..SIDE].fill(0.));
        }
        if of_b.is_transposed {
            let (start, place) = (|lane| (lanes.start + lane) * inner, |k| row(k) / SIDE);
            let rows = Interleaving { count: lanes.len(), len: inner, start, place };
            rows.rows_to_lanes(variant, b, right);
        } else {
            for (k, from) in b.chunks_exact(width).enumerate() {
                copy_lanes(&from[lanes.clone()], &mut right[row(k)..]);
            }
        }
    }
}

/// Packs some rows of the left side in tiles, in the order (16 rows, block along the inner side); each is transposed if
/// `transposes`. Rows past the last one are zero.
fn pack_left(
    variant: Variant,
    (a, of_a): (&[f32], MatrixOrder),
    rows: Range<usize>,
    transposes: bool,
    left: &mut [f32],
) {
    let (inner, height) = (of_a.columns, of_a.rows);
    let groups = left.chunks_exact_mut(inner.div_ceil(SIDE) * TILE);
    for (lanes, tiles) in blocks(rows).zip(groups) {
        if lanes.len() < SIDE {
            tiles.fill(0.);
        }
        if of_a.is_transposed {
            for (from, to) in a.chunks_exact(height).zip(tiles.chunks_exact_mut(SIDE)) {
                copy_lanes(&from[lanes.clone()], to);
            }
        } else if transposes {
            let (start, place) = (|lane| (lanes.start + lane) * inner, |k| k);
            let rows = Interleaving { count: lanes.len(), len: inner, start, place };
            rows.rows_to_lanes(variant, a, tiles);
        } else {
            for (lane, row) in lanes.enumerate() {
                let from = a[row * inner..][..inner].chunks(SIDE);
                for (from, tile) in from.zip(tiles.chunks_exact_mut(TILE)) {
                    copy_lanes(from, &mut tile[lane * SIDE..]);
                }
            }
        }
    }
}

/// Copies up to 16 numbers. All 16 go through registers; a copy of any other length is a call.
#[inline(always)]
fn copy_lanes(from: &[f32], to: &mut [f32]) {
    match (from.first_chunk::<SIDE>(), to.first_chunk_mut::<SIDE>()) {
        (Some(from), Some(to)) => {
            for (to, from) in to.iter_mut().zip(from) {
                *to = *from;
            }
        }
        _ => to[..from.len()].copy_from_slice(from),
    }
}

/// Writes the sums of a pair of blocks of columns to the rows of `product`.
fn unpack(sums: &[f32], pair: usize, width: usize, product: &mut [f32]) {
    let first = 2 * pair * SIDE;
    let count = (width - first).min(2 * SIDE);
    let groups = sums.chunks(count.div_ceil(SIDE) * TILE);
    for (sums, rows) in groups.zip(product.chunks_mut(SIDE * width)) {
        for (row, to) in rows.chunks_exact_mut(width).enumerate() {
            let to = to[first..][..count].chunks_mut(SIDE);
            for (to, tile) in to.zip(sums.chunks_exact(TILE)) {
                let count = to.len();
                copy_lanes(&tile[row * SIDE..][..count], to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transformer::tests::noise;

    const A: MatrixOrder = MatrixOrder { rows: 2, columns: 3, is_transposed: false };
    const B: MatrixOrder = MatrixOrder { rows: 3, columns: 2, is_transposed: false };

    #[test]
    fn matrices_and_transposed_ones_are_multiplied() {
        let (a, b) = ([1f64, 2., 3., 4., 5., 6.], [1., 0., 2., 1., 0., 3.]);
        let mut product = [9.; 4];
        multiply(Variant::fastest(), (&a, A), (&b, B), &mut product);
        assert_eq!(product, [5., 11., 14., 23.]);
        let turned = [1., 4., 2., 5., 3., 6.];
        let mut same = [9.; 4];
        multiply(
            Variant::fastest(),
            (&turned, MatrixOrder { is_transposed: true, ..A }),
            (&b, B),
            &mut same,
        );
        assert_eq!(same, product);
        let b = [1f32, 2., 0., 0., 1., 3.];
        let mut product = [0.; 4];
        let a = a.map(|x| x as f32);
        multiply(
            Variant::fastest(),
            (&a, A),
            (&b, MatrixOrder { is_transposed: true, ..B }),
            &mut product,
        );
        assert_eq!(product, [5., 11., 14., 23.]);
    }

    fn plain(a: &[f32], b: &[f32], [rows, inner, width]: [usize; 3]) -> Vec<f64> {
        let number = |at: usize| {
            let (row, column) = (at / width, at % width);
            (0..inner)
                .map(|k| f64::from(a[row * inner + k]) * f64::from(b[k * width + column]))
                .sum()
        };
        (0..rows * width).map(number).collect()
    }

    fn transposed(values: &[f32], width: usize) -> Vec<f32> {
        let rows = values.len() / width;
        (0..values.len()).map(|at| values[at % rows * width + at / rows]).collect()
    }

    /// Extents of one number, below and past a tile, of whole tiles, of more rows than are computed at a time, and of an inner
    /// side that is added in several passes.
    #[test]
    fn products_of_every_order_and_extent_are_sums_of_products() {
        for [rows, inner, width] in
            [[1, 1, 1], [3, 37, 5], [16, 16, 32], [31, 130, 47], [300, 20, 33], [40, 4099, 18]]
        {
            let (a, b) = (noise(1, rows * inner), noise(2, inner * width));
            let want = plain(&a, &b, [rows, inner, width]);
            let (turned_a, turned_b) = (transposed(&a, inner), transposed(&b, width));
            for (variant, turns_a, turns_b) in Variant::testable().into_iter().flat_map(|v| {
                [(false, false), (false, true), (true, false), (true, true)].map(|(a, b)| (v, a, b))
            }) {
                let of_a = MatrixOrder { rows, columns: inner, is_transposed: turns_a };
                let of_b = MatrixOrder { rows: inner, columns: width, is_transposed: turns_b };
                let mut product = vec![f32::NAN; rows * width];
                let left = if turns_a { &turned_a } else { &a };
                let right = if turns_b { &turned_b } else { &b };
                // What an earlier product has left in the memory must not matter.
                with_scratch(1 << 19, |scratch| scratch.fill(f32::NAN));
                multiply(variant, (left, of_a), (right, of_b), &mut product);
                // Each of `inner` terms of at most 1 is rounded once or twice.
                let bound = inner as f64 * 64. * 6e-8;
                for (got, want) in product.iter().zip(&want) {
                    assert!((f64::from(*got) - want).abs() < bound, "{variant} {of_a:?} {of_b:?}");
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_among_any_others() {
        // Many rows multiply this inner side in parts, and one row alone in one part.
        let [rows, inner, width] = [150, 1700, 70];
        let (a, b) = (noise(1, rows * inner), noise(2, inner * width));
        let of_b = MatrixOrder { rows: inner, columns: width, is_transposed: false };
        for variant in Variant::testable() {
            let product = |rows: Range<usize>| {
                let mut product = vec![0.; rows.len() * width];
                let of_a = MatrixOrder { rows: rows.len(), columns: inner, is_transposed: false };
                let a = &a[rows.start * inner..rows.end * inner];
                multiply(variant, (a, of_a), (&b, of_b), &mut product);
                product
            };
            let all = product(0..rows);
            for row in [0, 17, 128, 149] {
                assert_eq!(product(row..row + 1), all[row * width..][..width], "{variant}, {row}");
            }
        }
    }

    #[test]
    fn without_an_inner_side_a_product_is_zero() {
        let mut product = [9f32; 6];
        let of_a = MatrixOrder { rows: 2, columns: 0, is_transposed: false };
        let of_b = MatrixOrder { rows: 0, columns: 3, is_transposed: false };
        multiply(Variant::fastest(), (&[], of_a), (&[], of_b), &mut product);
        assert_eq!(product, [0.; 6]);
    }

    #[test]
    #[should_panic(expected = "a.len()")]
    fn a_slice_that_is_too_short_is_refused() {
        multiply(Variant::fastest(), (&[1f32; 5], A), (&[1.; 6], B), &mut [0.; 4]);
    }
}
