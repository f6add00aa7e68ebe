//! Whether a confidence is the probability of being right.

use anyhow::{Result, ensure};

/// Computes the expected calibration error: the mean distance between confidence and accuracy.
///
/// `Σ_b (n_b / N) · |accuracy_b − confidence_b|` over `bins` intervals of equal width, which include
/// their upper end (the first also 0): Guo et al. 2017 (arXiv:1706.04599), Eq. 3.
///
/// - `confidence`: the confidence of each assignment, `(N,)`, in `[0, 1]`.
/// - `correct`: whether the assignment is right, `(N,)`.
///
/// Returns a value in `[0, 1]`, 0 for perfect calibration or no points.
///
/// # Errors
///
/// The lengths differ, `bins` is 0, or a confidence is out of range; the message names the point.
pub fn calibration_error(confidence: &[f32], correct: &[bool], bins: usize) -> Result<f64> {
    ensure!(bins > 0, "calibration_error: bins is 0; 15 are usual");
    ensure!(
        confidence.len() == correct.len(),
        "calibration_error: {} confidences but {} outcomes; both must be of the same images",
        confidence.len(),
        correct.len()
    );
    // By bin, the sum of correct − confidence: n_b cancels.
    let mut gaps = vec![0f64; bins];
    for (i, (&confidence, &correct)) in confidence.iter().zip(correct).enumerate() {
        ensure!(
            (0. ..=1.).contains(&confidence),
            "calibration_error: the confidence of point {i} is {confidence}; it must be in [0, 1]"
        );
        let bin = (f64::from(confidence) * bins as f64).ceil() as usize;
        gaps[bin.saturating_sub(1)] += f64::from(u8::from(correct)) - f64::from(confidence);
    }
    let total: f64 = gaps.iter().map(|gap| gap.abs()).sum();
    Ok(total / confidence.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_mean_gap_by_bin() -> Result<()> {
        // Two bins: (0, .5] holds .5 wrong, .25 right; (.5, 1] holds .75 right, 1 right.
        let error = calibration_error(&[0.5, 0.25, 0.75, 1.], &[false, true, true, true], 2)?;
        assert!((error - (0.25 + 0.25) / 4.).abs() < 1e-12, "{error}");
        assert_eq!(calibration_error(&[1., 1., 0.], &[true, true, false], 15)?, 0.);
        assert_eq!(calibration_error(&[], &[], 15)?, 0.);
        Ok(())
    }

    #[test]
    fn bad_confidences_are_named() {
        let error = calibration_error(&[0.5, f32::NAN], &[true, true], 5).expect_err("NaN");
        assert!(error.to_string().contains("point 1"), "{error}");
        assert!(calibration_error(&[0.5], &[true, true], 5).is_err());
        assert!(calibration_error(&[0.5], &[true], 0).is_err());
    }
}
