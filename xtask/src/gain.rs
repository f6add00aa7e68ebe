//! What an experiment gains over its control, in differences that are paired by seed.
//!
//! The rule was fixed before any run was scored: a gain is a mean difference of at least one point whose
//! one-sided 95 % bound is above 0. Anything else is "no gain shown", also a mean of two points of seeds
//! that scatter.

use std::fmt;

use serde_json::{Value, json};

/// Least mean difference that is called a gain, as a fraction.
const LEAST_GAIN: f64 = 0.01;

/// Differences of one score between an experiment and its control, one per seed.
#[derive(Debug, Clone, PartialEq)]
pub struct PairedGain {
    differences: Vec<f64>,
}

impl PairedGain {
    /// The differences of these pairs, `(experiment, control)`; `None` if a score is missing or there is
    /// no pair.
    pub fn of(pairs: impl IntoIterator<Item = (Option<f64>, Option<f64>)>) -> Option<Self> {
        let differences: Vec<f64> = pairs
            .into_iter()
            .map(|(ours, control)| Some(ours? - control?))
            .collect::<Option<_>>()?;
        (!differences.is_empty()).then_some(Self { differences })
    }

    /// Their mean `Δ`.
    pub fn mean(&self) -> f64 {
        self.differences.iter().sum::<f64>() / self.differences.len() as f64
    }

    /// The lower end of the one-sided 95 % interval of the mean, `Δ − t s / √n`, with the sample deviation `s`
    /// of the differences and Student's `t` of `n − 1` degrees of freedom; `None` for one pair.
    pub fn bound(&self) -> Option<f64> {
        let (n, mean) = (self.differences.len(), self.mean());
        let t = T_95.get(n.checked_sub(2)?).unwrap_or(&T_95[T_95.len() - 1]);
        let squares: f64 = self.differences.iter().map(|d| (d - mean).powi(2)).sum();
        let deviation = (squares / (n - 1) as f64).sqrt();
        Some(mean - t * deviation / (n as f64).sqrt())
    }

    /// Whether it is a gain by the rule of the [module](self); `None` for one pair.
    pub fn is_gain(&self) -> Option<bool> {
        Some(self.bound()? > 0. && self.mean() >= LEAST_GAIN)
    }

    /// As JSON, with fractions.
    pub fn json(&self) -> Value {
        json!({
            "mean": self.mean(),
            "bound": self.bound(),
            "values": self.differences,
            "gain": self.is_gain(),
        })
    }
}

/// `+1.3 (95 % bound +0.8)`, in points.
impl fmt::Display for PairedGain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:+.1}", 100. * self.mean())?;
        match self.bound() {
            Some(bound) => write!(f, " (95 % bound {:+.1})", 100. * bound),
            None => Ok(()),
        }
    }
}

/// Student's t for a one-sided 95 % bound, of 1 to 19 degrees of freedom. More have the last, which is on
/// the safe side.
const T_95: [f64; 19] = [
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771,
    1.761, 1.753, 1.746, 1.740, 1.734, 1.729,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn points(differences: &[f64]) -> PairedGain {
        let pair = |&d: &f64| (Some(0.5 + d / 100.), Some(0.5));
        PairedGain::of(differences.iter().map(pair)).expect("pairs")
    }

    /// Refinement, case 11.
    #[test]
    fn a_gain_needs_a_point_and_a_bound_above_zero() {
        for (differences, mean, bound, is_gain) in [
            (&[1.6, 0.9, 2.1, 1.2, 0.7][..], 1.3, 0.764872, true),
            (&[1.6, -0.9, 2.1, 1.2, -0.7], 0.66, -0.648360, false),
            (&[1.6, 0.9, 2.1], 1.533333, 0.517143, true),
            // Sure, but small.
            (&[0.9, 0.91, 0.9], 0.903333, 0.893600, false),
            // Large, but of seeds that scatter.
            (&[9., -1., 1.], 3., -5.920747, false),
        ] {
            let found = points(differences);
            assert!((100. * found.mean() - mean).abs() < 1e-5, "{differences:?}: {found}");
            let got = 100. * found.bound().expect("several");
            assert!((got - bound).abs() < 1e-4, "{differences:?}: got {got}, want {bound}");
            assert_eq!(found.is_gain(), Some(is_gain), "{differences:?}");
        }
    }

    #[test]
    fn one_pair_has_no_bound_and_a_missing_score_no_difference() {
        let one = points(&[1.3]);
        assert_eq!((one.bound(), one.is_gain()), (None, None));
        assert_eq!(one.to_string(), "+1.3");
        assert_eq!(points(&[1.6, 0.9, 2.1, 1.2, 0.7]).to_string(), "+1.3 (95 % bound +0.8)");
        assert!(one.json()["bound"].is_null() && one.json()["gain"].is_null());
        assert_eq!(PairedGain::of([(Some(1.), None)]), None);
        assert_eq!(PairedGain::of([]), None);
    }
}
