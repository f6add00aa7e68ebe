//! Rows in the order in which products read them.

use crate::element::{ValueElement, by_precision};
use crate::layout::SIDE;
use crate::{Buffer, Precision, Shape};

/// Rows that products read as their left side: tiles of 16 rows × 16 columns, of f32 or bf16, in the order
/// (16 rows, 16 columns, row, column). Padding columns are zero.
pub struct Factors {
    pub(super) shape: Shape,
    pub(super) numbers: Buffer,
}

impl Factors {
    /// Zeros.
    pub fn zeros(precision: Precision, rows: usize, width: usize) -> Factors {
        let shape = Shape::features(rows, width);
        Factors { shape, numbers: Buffer::zeros_of(precision, shape.len()) }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.shape.images
    }

    /// The numbers of a row.
    pub fn columns(&self) -> usize {
        self.shape.channels
    }

    /// Rounds `values` into a row, from a column on.
    ///
    /// # Panics
    ///
    /// If they reach over the end of the row.
    pub fn put(&mut self, row: usize, column: usize, values: &[f32]) {
        assert!(row < self.rows() && column + values.len() <= self.columns());
        let shape = self.shape;
        by_precision!(self.numbers.precision(), T => {
            put(shape, T::of_mut(&mut self.numbers), row, column, values);
        });
    }
}

/// [`Factors::put`] into numbers of one type.
#[inline(always)]
pub(super) fn put<T: ValueElement>(
    shape: Shape,
    numbers: &mut [T],
    row: usize,
    mut column: usize,
    mut values: &[f32],
) {
    let (group, row) = (row / SIDE * shape.pixel_len(), row % SIDE);
    if column.is_multiple_of(SIDE) {
        let (whole, others) = values.as_chunks::<SIDE>();
        for values in whole {
            // Of a constant size: a copy of any other is a call.
            let to: &mut [T; SIDE] = numbers[group + column * SIDE + row * SIDE..]
                .first_chunk_mut()
                .expect("columns of the row");
            for (to, value) in to.iter_mut().zip(values) {
                *to = T::narrow(*value);
            }
            column += SIDE;
        }
        values = others;
    }
    while !values.is_empty() {
        let (block, lane) = (column / SIDE, column % SIDE);
        let (now, later) = values.split_at(values.len().min(SIDE - lane));
        let at = group + (block * SIDE + row) * SIDE + lane;
        for (to, value) in numbers[at..at + now.len()].iter_mut().zip(now) {
            *to = T::narrow(*value);
        }
        (column, values) = (column + now.len(), later);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_put_as_a_packed_value_holds_them() {
        let (rows, width) = (19, 37);
        let numbers: Vec<f32> = (0..rows * width).map(|i| i as f32 - 300.).collect();
        for precision in [Precision::F32, Precision::Bf16] {
            let mut factors = Factors::zeros(precision, rows, width);
            for (row, values) in numbers.chunks(width).enumerate() {
                factors.put(row, 0, &values[..5]);
                factors.put(row, 5, &values[5..]);
            }
            let mut want = Buffer::zeros_of(precision, factors.shape.len());
            factors.shape.pack(&numbers, &mut want);
            assert_eq!(factors.numbers.bytes(), want.bytes());
        }
    }
}
