//! The learning rate of the network; that of the centres is constant.

use std::f64::consts::PI;

use anyhow::{Result, ensure};

/// 0 in the first epochs, in which the centres find their places among random projections; then a
/// linear warm-up, then half a cosine that ends just above 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    peak: f64,
    still: f64,
    warmup: f64,
    all: f64,
}

impl LearningRate {
    /// A schedule over `epochs` epochs of `steps` steps.
    ///
    /// - `peak`: the rate behind warm-up.
    /// - `still_epochs`: epochs at a rate of 0; 1 is published.
    /// - `warmup_epochs`: epochs after them in which the rate rises; 10 are published.
    ///
    /// # Errors
    ///
    /// The peak is not a positive number, or no epoch is left behind warm-up.
    pub fn new(
        peak: f64,
        still_epochs: usize,
        warmup_epochs: usize,
        epochs: usize,
        steps: usize,
    ) -> Result<Self> {
        ensure!(peak.is_finite() && peak > 0., "learning-rate = {peak}: it must be above 0");
        ensure!(
            still_epochs + warmup_epochs < epochs,
            "still-epochs = {still_epochs} and warmup-epochs = {warmup_epochs}: together they must \
             be below the {epochs} epochs"
        );
        let [still, warmup, all] =
            [still_epochs, warmup_epochs, epochs].map(|epochs| (epochs * steps) as f64);
        Ok(Self { peak, still, warmup, all })
    }

    /// The rate of step `step`, counted from 0: `η max(1, it − s) / w` in warm-up, then
    /// `η (1 + cos(π (it − s − w) / (T − s − w))) / 2`, for `s` steps standing still, `w` of
    /// warm-up and `T` in all.
    pub fn at(&self, step: usize) -> f64 {
        let since = step as f64 - self.still;
        if since < 0. {
            0.
        } else if since < self.warmup {
            self.peak * since.max(1.) / self.warmup
        } else {
            let part = (since - self.warmup) / (self.all - self.still - self.warmup);
            self.peak * (1. + (PI * part).cos()) / 2.
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SeCu, case T9.
    #[test]
    fn the_published_schedule_has_the_specified_values() -> Result<()> {
        let rate = LearningRate::new(0.2, 1, 10, 401, 391)?;
        for (epoch, step, want) in [
            (0, 0, 0.),
            (0, 390, 0.),
            (1, 0, 0.000051151),
            (1, 1, 0.000051151),
            (2, 0, 0.02),
            (6, 0, 0.1),
            (10, 390, 0.199948849),
            (11, 0, 0.2),
            (206, 0, 0.1),
            (400, 0, 0.000003244),
        ] {
            let got = rate.at(epoch * 391 + step);
            assert!((got - want).abs() < 1e-9, "({epoch}, {step}): got {got}, want {want}");
        }
        Ok(())
    }

    #[test]
    fn a_schedule_without_an_end_is_refused() {
        assert!(LearningRate::new(0.2, 1, 10, 11, 391).is_err());
        assert!(LearningRate::new(0., 1, 1, 11, 391).is_err());
        let at_once = LearningRate::new(0.2, 0, 0, 2, 4).expect("sound");
        assert_eq!((at_once.at(0), at_once.at(4)), (0.2, 0.1));
    }
}
