//! Rows of numbers: checks, scaling, and sums that are bit-identical for any number of threads.

use anyhow::{Result, bail, ensure};
use kernels::similarity::{add_row, product};
use rayon::prelude::*;

/// Shorter rows have no direction.
const SHORTEST: f64 = 1e-12;

/// Rows of a larger squared length are refused, because products in `f32` could overflow.
const LONGEST_SQUARED: f64 = 1e36;

/// Checks that `points` is a matrix of `n` rows of `d` finite numbers of sensible size.
///
/// # Errors
///
/// The length is not `n · d`, `d` is 0, a number is not finite, or a row is longer than 10¹⁸. The
/// message names the row.
pub fn check(points: &[f32], n: usize, d: usize, function: &str) -> Result<()> {
    ensure!(d > 0, "{function}: the points have width 0");
    ensure!(
        n.checked_mul(d) == Some(points.len()),
        "{function}: {n} points of width {d} need {n}·{d} numbers, but there are {}",
        points.len()
    );
    // A number that is not finite makes the sum infinite or NaN, which the range does not contain.
    let is_valid = |row: &[f32]| (0. ..LONGEST_SQUARED).contains(&product(row, row));
    let bad = points.par_chunks(d).position_first(|row| !is_valid(row));
    if let Some(row) = bad {
        let Some(column) = points[row * d..][..d].iter().position(|x| !x.is_finite()) else {
            bail!(
                "{function}: row {row} is longer than 1e18; divide all points by a common factor"
            );
        };
        bail!(
            "{function}: row {row} holds {} in column {column}; all numbers must be finite: look at what \
             computed this row",
            points[row * d + column]
        );
    }
    Ok(())
}

/// Scales rows to unit length.
///
/// # Errors
///
/// A row is shorter than 1e-12, so it has no direction; the message names it.
pub fn scale(rows: &mut [f32], d: usize, function: &str) -> Result<()> {
    let zero = rows.par_chunks_mut(d).enumerate().filter_map(|(i, row)| {
        let length = product(row, row).sqrt();
        if length < SHORTEST {
            return Some(i);
        }
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
        None
    });
    if let Some(row) = zero.min() {
        bail!(
            "{function}: row {row} is shorter than {SHORTEST:e}, so it has no direction; leave it out or \
             use the Euclidean metric"
        );
    }
    Ok(())
}

/// Subtracts `origin` from every row.
pub fn shift(rows: &mut [f32], origin: &[f32]) {
    rows.par_chunks_mut(origin.len())
        .for_each(|row| row.iter_mut().zip(origin).for_each(|(x, o)| *x -= o));
}

/// Rows of one partial sum. Depends on the shape alone.
const PART: usize = 1024;

/// Sums `f(index, row)` over all rows; the partial sums of [`PART`] rows are added in order.
pub fn sum_rows(rows: &[f32], d: usize, f: impl Fn(usize, &[f32]) -> f64 + Sync) -> f64 {
    let sum = |(part, rows): (usize, &[f32])| -> f64 {
        rows.chunks(d).enumerate().map(|(i, row)| f(part * PART + i, row)).sum()
    };
    let parts: Vec<f64> = rows.par_chunks(PART * d).enumerate().map(sum).collect();
    parts.iter().sum()
}

/// Sums each column, weighted; the partial sums of [`PART`] rows are added in order.
pub fn column_sums(rows: &[f32], d: usize, weights: Option<&[f32]>) -> Vec<f64> {
    let parts: Vec<Vec<f64>> = rows
        .par_chunks(PART * d)
        .enumerate()
        .map(|(part, rows)| {
            let mut sums = vec![0f64; d];
            for (i, row) in rows.chunks(d).enumerate() {
                add_row(&mut sums, row, weights.map_or(1., |w| f64::from(w[part * PART + i])));
            }
            sums
        })
        .collect();
    let mut sums = vec![0f64; d];
    for part in &parts {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    sums
}

/// Returns the weighted mean of each column.
pub fn weighted_means(rows: &[f32], d: usize, weights: Option<&[f32]>) -> Vec<f64> {
    let mass = match weights {
        Some(weights) => weights.iter().map(|&w| f64::from(w)).sum(),
        None => (rows.len() / d) as f64,
    };
    column_sums(rows, d, weights).into_iter().map(|sum| sum / mass).collect()
}

/// Returns `Σ (x − y)²` in `f64`, which is accurate for small differences too.
pub fn squared_distance(x: &[f32], y: &[f32]) -> f64 {
    x.iter()
        .zip(y)
        .map(|(&x, &y)| {
            let difference = f64::from(x) - f64::from(y);
            difference * difference
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_row() {
        let mut points = vec![1f32; 12];
        assert!(check(&points, 4, 3, "f").is_ok());
        assert!(check(&points, 5, 3, "f").expect_err("too few").to_string().contains("12"));
        points[7] = f32::NAN;
        let error = check(&points, 4, 3, "f").expect_err("not finite").to_string();
        assert!(error.contains("row 2") && error.contains("column 1"), "{error}");
        points[7] = 1e19;
        let error = check(&points, 4, 3, "f").expect_err("too long").to_string();
        assert!(error.contains("row 2") && error.contains("common factor"), "{error}");
        points[6..9].fill(0.);
        let error = scale(&mut points, 3, "f").expect_err("no direction").to_string();
        assert!(error.contains("row 2"), "{error}");
    }

    #[test]
    fn lengths_and_distances_are_right() {
        let mut unit = [3., 4., -5., 12.];
        scale(&mut unit, 2, "f").expect("not zero");
        for (got, want) in unit.iter().zip([0.6, 0.8, -5. / 13., 12. / 13.]) {
            assert!((got - want).abs() < 1e-7);
        }
        assert_eq!(squared_distance(&[1., 2.], &[4., -2.]), 25.);
    }
}
