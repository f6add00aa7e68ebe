//! Checks of tables and pictures before a stage runs. Every message names the key and its table.

use std::ops::{Bound, RangeBounds};

use anyhow::{Result, ensure};
use data::views::Input;
use data::{Images, Loader};
use stage::Job;

/// Checks that counts are large enough.
///
/// # Errors
///
/// One is below `least`.
pub fn at_least(table: &str, least: usize, values: &[(&str, usize)]) -> Result<()> {
    for (key, value) in values {
        ensure!(*value >= least, "`{key}` in `[{table}]` is {value}; it must be at least {least}");
    }
    Ok(())
}

/// Checks numbers that must be above 0.
///
/// # Errors
///
/// One is not, or is not finite.
pub fn above_zero(table: &str, values: &[(&str, f64)]) -> Result<()> {
    for (key, value) in values {
        let is_sound = value.is_finite() && *value > 0.;
        ensure!(is_sound, "`{key}` in `[{table}]` is {value}; it must be above 0");
    }
    Ok(())
}

/// Checks numbers that must be 0 or above, such as weights.
///
/// # Errors
///
/// One is not, or is not finite.
pub fn not_negative(table: &str, values: &[(&str, f64)]) -> Result<()> {
    for (key, value) in values {
        let is_sound = value.is_finite() && *value >= 0.;
        ensure!(is_sound, "`{key}` in `[{table}]` is {value}; it must be 0 or above");
    }
    Ok(())
}

/// Checks numbers in `[0, 1)`, such as the decay of a mean.
///
/// # Errors
///
/// One is out of range.
pub fn below_one(table: &str, values: &[(&str, f64)]) -> Result<()> {
    values.iter().try_for_each(|(key, value)| within(table, key, *value, 0. ..1.))
}

/// Checks that a number is in a range with two ends.
///
/// # Errors
///
/// It is not.
pub fn within(table: &str, key: &str, value: f64, range: impl RangeBounds<f64>) -> Result<()> {
    let number = |bound| match bound {
        Bound::Included(&end) | Bound::Excluded(&end) => end,
        Bound::Unbounded => f64::INFINITY,
    };
    let last = match range.end_bound() {
        Bound::Excluded(end) => format!("below {end}"),
        end => format!("at most {}", number(end)),
    };
    ensure!(
        range.contains(&value),
        "`{key}` in `[{table}]` is {value}; it must be at least {} and {last}",
        number(range.start_bound())
    );
    Ok(())
}

/// The pictures of a job, for a check.
#[derive(Debug)]
pub struct CheckedPictures {
    /// The images file.
    pub images: Images,
    /// How many are trained on.
    pub trained: usize,
    /// How many are scored.
    pub scored: usize,
}

/// Opens the pictures that a stage trains on and checks that they fit its network; `None` before
/// they are prepared. No picture is decoded.
///
/// # Errors
///
/// The file is damaged, its pictures have other channels than `input`, or there are fewer than two
/// to train on.
pub fn pictures(job: &Job, input: &Input) -> Result<Option<CheckedPictures>> {
    if !job.images.exists() {
        return Ok(None);
    }
    let images = Images::open(&job.images)?;
    Loader::check(&images, input)?;
    let count = |splits| images.rows(splits).len();
    let (trained, scored) = (count(&job.data.train_on), count(&job.data.score_on));
    ensure!(
        trained >= 2,
        "`{}` has {trained} images in the splits {:?}, and a training needs at least 2: change \
         `train-on` in table `[data]`, or the source of the pictures",
        job.images.display(),
        job.data.train_on
    );
    Ok(Some(CheckedPictures { images, trained, scored }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_where_they_are_said_to_be_and_messages_name_key_and_table() {
        let (infinite, nan) = (f64::INFINITY, f64::NAN);
        type Check = fn(&str, &[(&str, f64)]) -> Result<()>;
        let checks: [(Check, _, [f64; 4]); 3] = [
            (above_zero, [1e-9, 3.], [0., -1., infinite, nan]),
            (not_negative, [0., 3.], [-1e-9, -1., infinite, nan]),
            (below_one, [0., 0.999], [-1e-9, 1., infinite, nan]),
        ];
        for (check, good, bad) in checks {
            assert!(check("table", &good.map(|value| ("key", value))).is_ok());
            for value in bad {
                let error = check("table", &[("good", 0.5), ("bad-key", value)]).expect_err("out");
                let start = format!("`bad-key` in `[table]` is {value}; it must be ");
                assert!(error.to_string().starts_with(&start), "{error}");
            }
        }
        assert!(at_least("table", 2, &[("a", 2), ("b", 7)]).is_ok());
        let error = at_least("table", 2, &[("a", 2), ("b", 1)]).expect_err("below").to_string();
        assert_eq!(error, "`b` in `[table]` is 1; it must be at least 2");
        let error = within("table", "a", 5., 0. ..5.).expect_err("outside").to_string();
        assert_eq!(error, "`a` in `[table]` is 5; it must be at least 0 and below 5");
        let error = within("table", "a", 1.5, 0.5..=1.).expect_err("outside").to_string();
        assert_eq!(error, "`a` in `[table]` is 1.5; it must be at least 0.5 and at most 1");
        assert!(within("table", "a", 1., 0. ..=1.).is_ok());
    }
}
