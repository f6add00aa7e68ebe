//! Layer norm over rows.

use super::Factors;
use super::factors::put;
use crate::element::{ValueElement, by_precision};
use crate::layout::SIDE;
use crate::variant::for_each_variant;
use crate::{Shape, Variant};

/// Layer norm (Ba et al. 2016, arXiv:1607.06450): `(x − mean) / √(variance + ε) · weight + bias` over a row,
/// with the biased variance.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// A factor for each column.
    pub weight: &'a [f32],
    /// A number added to each column.
    pub bias: &'a [f32],
    /// `ε`.
    pub epsilon: f32,
}

/// Normalises rows into the first rows of `to`.
///
/// # Panics
///
/// If the widths differ, or `to` has fewer rows.
pub fn layer_norm(variant: Variant, rows: &[f32], norm: LayerNorm, to: &mut Factors) {
    let (shape, width) = (to.shape, to.columns());
    check(rows, &norm, width);
    assert!(rows.len() / width <= to.rows());
    by_precision!(to.numbers.precision(), T => {
        into_factors(variant, rows, &norm, shape, T::of_mut(&mut to.numbers));
    });
}

/// Normalises rows in place.
///
/// # Panics
///
/// If the rows do not have the width of the norm.
pub fn layer_norm_in_place(variant: Variant, rows: &mut [f32], norm: LayerNorm) {
    check(rows, &norm, norm.weight.len());
    in_place(variant, rows, &norm);
}

fn check(rows: &[f32], norm: &LayerNorm, width: usize) {
    assert!(norm.weight.len() == width && norm.bias.len() == width);
    assert!(width > 0 && rows.len().is_multiple_of(width));
}

for_each_variant! {
    fn into_factors<T: ValueElement>(rows: &[f32], norm: &LayerNorm, shape: Shape, to: &mut [T]) {
        let width = norm.weight.len();
        for (at, row) in rows.chunks_exact(width).enumerate() {
            let (mean, scale) = moments(row, norm.epsilon);
            let columns = row.chunks(SIDE).zip(norm.weight.chunks(SIDE)).zip(norm.bias.chunks(SIDE));
            for (block, ((row, weight), bias)) in columns.enumerate() {
                let mut values = [0f32; SIDE];
                for (value, ((x, w), b)) in values.iter_mut().zip(row.iter().zip(weight).zip(bias)) {
                    *value = (x - mean) * scale * w + b;
                }
                put(shape, to, at, block * SIDE, &values[..row.len()]);
            }
        }
    }
}

for_each_variant! {
    fn in_place(rows: &mut [f32], norm: &LayerNorm) {
        for row in rows.chunks_exact_mut(norm.weight.len()) {
            let (mean, scale) = moments(row, norm.epsilon);
            for (x, (w, b)) in row.iter_mut().zip(norm.weight.iter().zip(norm.bias)) {
                *x = (*x - mean) * scale * w + b;
            }
        }
    }
}

/// The mean of a row and `1 / √(variance + ε)`.
#[inline(always)]
fn moments(row: &[f32], epsilon: f32) -> (f32, f32) {
    let mean = sum(row, |x| x) / row.len() as f32;
    let variance = sum(row, |x| (x - mean) * (x - mean)) / row.len() as f32;
    (mean, 1. / (variance + epsilon).sqrt())
}

/// The sum in 16 lanes, then over the lanes.
#[inline(always)]
fn sum(row: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let (whole, remainder) = row.as_chunks::<SIDE>();
    let mut lanes = [0f32; SIDE];
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += of(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(remainder) {
        *lane += of(*value);
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transformer::tests::{noise, rounded, ways};

    #[test]
    fn rows_are_normalised_as_in_f64() {
        let (rows, width, epsilon) = (19, 37, 1e-6);
        let x: Vec<f32> = noise(1, rows * width).iter().map(|x| 3. * x + 5.).collect();
        let (weight, bias) = (noise(2, width), noise(3, width));
        let norm = LayerNorm { weight: &weight, bias: &bias, epsilon };
        for (variant, precision) in ways() {
            let mut factors = Factors::zeros(precision, rows, width);
            layer_norm(variant, &x, norm, &mut factors);
            let mut got = vec![0.; rows * width];
            factors.shape.unpack(&factors.numbers, &mut got);
            let mut in_place = x.clone();
            layer_norm_in_place(variant, &mut in_place, norm);
            for (at, row) in x.chunks(width).enumerate() {
                let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
                let square = |x: &f32| (f64::from(*x) - mean).powi(2);
                let variance = row.iter().map(square).sum::<f64>() / width as f64;
                let scale = 1. / (variance + f64::from(epsilon)).sqrt();
                for (column, x) in row.iter().enumerate() {
                    let (w, b) = (f64::from(weight[column]), f64::from(bias[column]));
                    let want = (f64::from(*x) - mean) * scale * w + b;
                    let exact = f64::from(in_place[at * width + column]);
                    assert!((exact - want).abs() < 4e-6, "{variant}: {exact}, {want}");
                    // The factor is the same number, rounded.
                    let factor = f64::from(got[at * width + column]);
                    assert_eq!(factor, rounded(precision, in_place[at * width + column]));
                }
            }
        }
    }

    #[test]
    fn a_constant_row_becomes_the_bias() {
        let norm = LayerNorm { weight: &[2., 3.], bias: &[0.5, -1.], epsilon: 1e-12 };
        let mut rows = [7., 7.];
        layer_norm_in_place(Variant::fastest(), &mut rows, norm);
        assert_eq!(rows, [0.5, -1.]);
    }
}
