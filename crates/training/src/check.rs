//! What values of a table must be, as several stages ask for it. Every message names the key.

use anyhow::{Result, ensure};

/// Batch statistics need two images.
///
/// # Errors
///
/// The batch is smaller.
pub fn batch_size(value: usize) -> Result<()> {
    ensure!(value >= 2, "batch-size = {value}: at least 2");
    Ok(())
}

/// Counts that must not be 0.
///
/// # Errors
///
/// One is.
pub fn counts(values: &[(&str, usize)]) -> Result<()> {
    for (key, value) in values {
        ensure!(*value > 0, "{key} = 0: at least 1 is needed");
    }
    Ok(())
}

/// Numbers that must be above 0.
///
/// # Errors
///
/// One is not, or is not finite.
pub fn above_zero(values: &[(&str, f64)]) -> Result<()> {
    for (key, value) in values {
        ensure!(value.is_finite() && *value > 0., "{key} = {value}: it must be above 0");
    }
    Ok(())
}

/// Numbers that must be 0 or above, such as weights.
///
/// # Errors
///
/// One is not, or is not finite.
pub fn not_negative(values: &[(&str, f64)]) -> Result<()> {
    for (key, value) in values {
        ensure!(
            value.is_finite() && *value >= 0.,
            "{key} = {value}: it must be a number that is not negative"
        );
    }
    Ok(())
}

/// Numbers in `[0, 1)`, such as the decay of a mean.
///
/// # Errors
///
/// One is not.
pub fn below_one(values: &[(&str, f64)]) -> Result<()> {
    for (key, value) in values {
        ensure!((0. ..1.).contains(value), "{key} = {value}: it must be at least 0 and below 1");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_where_they_are_said_to_be_and_messages_name_the_key() {
        assert!(batch_size(2).is_ok() && batch_size(1).is_err());
        assert!(counts(&[("a", 1), ("b", 7)]).is_ok());
        let (infinite, nan) = (f64::INFINITY, f64::NAN);
        for (check, good, bad) in [
            (above_zero as fn(&[(&str, f64)]) -> Result<()>, [1e-9, 3.], [0., -1., infinite, nan]),
            (not_negative, [0., 3.], [-1e-9, -1., infinite, nan]),
            (below_one, [0., 0.999], [-1e-9, 1., infinite, nan]),
        ] {
            assert!(check(&good.map(|value| ("key", value))).is_ok());
            for value in bad {
                let error = check(&[("good", 0.5), ("bad-key", value)]).expect_err("out of range");
                assert!(error.to_string().starts_with(&format!("bad-key = {value}: ")), "{error}");
            }
        }
        let error = counts(&[("a", 1), ("bad-key", 0)]).expect_err("none").to_string();
        assert_eq!(error, "bad-key = 0: at least 1 is needed");
    }
}
