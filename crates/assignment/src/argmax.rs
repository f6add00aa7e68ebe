//! The largest value of each row: from memberships or similarities to clusters.

use anyhow::{Result, bail, ensure};

/// Returns the column of the largest value in each row of `values` `(N, columns)`, and that value.
///
/// Of equal values the first counts.
///
/// # Errors
///
/// `values` is not a matrix of that many columns, or a value is NaN; the message names the row.
pub fn argmax_rows<T: PartialOrd + Copy>(
    values: &[T],
    columns: usize,
) -> Result<(Vec<u32>, Vec<T>)> {
    ensure!(
        columns > 0 && values.len().is_multiple_of(columns) && u32::try_from(columns).is_ok(),
        "argmax_rows: {} values do not fill rows of {columns} columns",
        values.len()
    );
    let (mut places, mut largest) = (vec![], vec![]);
    for (i, row) in values.chunks_exact(columns).enumerate() {
        let mut best = (0, row[0]);
        for (k, &value) in row.iter().enumerate() {
            // NaN is the only value that does not equal itself.
            if value.partial_cmp(&value).is_none() {
                bail!(
                    "argmax_rows: row {i} holds NaN in column {k}; look at what computed this row"
                );
            }
            if value > best.1 {
                best = (k, value);
            }
        }
        places.push(best.0 as u32);
        largest.push(best.1);
    }
    Ok((places, largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equal_values_counts() -> Result<()> {
        let values = [0.2, 0.5, 0.3, 0.4, 0.1, 0.4, -3., -1., -1.];
        assert_eq!(argmax_rows(&values, 3)?, (vec![1, 0, 1], vec![0.5, 0.4, -1.]));
        assert_eq!(argmax_rows(&[f32::NEG_INFINITY; 2], 2)?.0, [0]);
        assert_eq!(argmax_rows::<f64>(&[], 2)?, (vec![], vec![]));
        Ok(())
    }

    #[test]
    fn a_nan_and_a_wrong_width_are_refused() {
        for column in 0..2 {
            let mut values = [1f32, 2., 3., 4.];
            values[2 + column] = f32::NAN;
            let error = argmax_rows(&values, 2).expect_err("NaN").to_string();
            assert!(error.contains(&format!("row 1 holds NaN in column {column}")), "{error}");
        }
        let error = argmax_rows(&[1.; 5], 2).expect_err("half a row").to_string();
        assert!(error.contains("5 values") && error.contains("2 columns"), "{error}");
        assert!(argmax_rows(&[1.; 5], 0).is_err());
    }
}
