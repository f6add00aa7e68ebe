//! Products of plain matrices on one thread, by the crate `gemm`.

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

/// A number type of matrices: f32 or f64.
pub trait MatrixNumber: Copy + 'static + sealed::Sealed {
    /// 0 and 1.
    const UNITS: [Self; 2];
}

impl MatrixNumber for f32 {
    const UNITS: [f32; 2] = [0., 1.];
}

impl MatrixNumber for f64 {
    const UNITS: [f64; 2] = [0., 1.];
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// Writes `a · b` to `product`, row by row. It runs on this thread alone, so that callers divide their work
/// and the bits do not depend on the number of threads.
///
/// # Panics
///
/// If a slice does not have the length of its matrix, or the extents do not fit.
pub fn multiply<T: MatrixNumber>(
    (a, of_a): (&[T], MatrixOrder),
    (b, of_b): (&[T], MatrixOrder),
    product: &mut [T],
) {
    let (rows, inner, columns) = (of_a.rows, of_a.columns, of_b.columns);
    assert!(a.len() == rows * inner && b.len() == of_b.rows * columns);
    assert!(inner == of_b.rows && product.len() == rows * columns);
    let ([a_column, a_row], [b_column, b_row]) = (of_a.steps(), of_b.steps());
    let [zero, one] = T::UNITS;
    // SAFETY: the steps address the numbers of each matrix, which its slice has (checked above); `product`
    // is a slice of its own.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            inner,
            product.as_mut_ptr(),
            1,
            columns as isize,
            false,
            a.as_ptr(),
            a_column,
            a_row,
            b.as_ptr(),
            b_column,
            b_row,
            zero,
            one,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MatrixOrder = MatrixOrder { rows: 2, columns: 3, is_transposed: false };
    const B: MatrixOrder = MatrixOrder { rows: 3, columns: 2, is_transposed: false };

    #[test]
    fn matrices_and_transposed_ones_are_multiplied() {
        let (a, b) = ([1f64, 2., 3., 4., 5., 6.], [1., 0., 2., 1., 0., 3.]);
        let mut product = [9.; 4];
        multiply((&a, A), (&b, B), &mut product);
        assert_eq!(product, [5., 11., 14., 23.]);
        let turned = [1., 4., 2., 5., 3., 6.];
        let mut same = [9.; 4];
        multiply((&turned, MatrixOrder { is_transposed: true, ..A }), (&b, B), &mut same);
        assert_eq!(same, product);
        let b = [1f32, 2., 0., 0., 1., 3.];
        let mut product = [0.; 4];
        let a = a.map(|x| x as f32);
        multiply((&a, A), (&b, MatrixOrder { is_transposed: true, ..B }), &mut product);
        assert_eq!(product, [5., 11., 14., 23.]);
    }

    #[test]
    #[should_panic(expected = "a.len()")]
    fn a_slice_that_is_too_short_is_refused() {
        multiply((&[1f32; 5], A), (&[1.; 6], B), &mut [0.; 4]);
    }
}
