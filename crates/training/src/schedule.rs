//! Learning rate and target decay over a run. Steps count from 1.

use std::f64::consts::PI;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cosine {
    /// Along half a cosine that ends at 0 with the last epoch.
    ToZero,
    /// As ProPos publishes it: the cosine divides by all epochs, those of warm-up included, so that
    /// it ends above 0 (at 0.62 % of the peak after 50 of 1,000 epochs of warm-up).
    Published,
    /// As ProPos publishes it for CIFAR-20: a cosine that began at epoch 0 and moves once an epoch,
    /// by whole epochs done; a linear warm-up leads to its value at the end of warm-up.
    PublishedByEpoch,
}

/// The learning rate of every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRate {
    peak: f64,
    warmup_epochs: f64,
    epochs: f64,
    steps_per_epoch: f64,
    cosine: Cosine,
}

impl LearningRate {
    /// A schedule over `epochs` epochs of `steps_per_epoch` steps.
    ///
    /// - `peak`: learning rate at the end of warm-up, for this batch size.
    /// - `warmup_epochs`: the rate rises linearly from 0 over so many epochs.
    ///
    /// # Errors
    ///
    /// The peak is not a positive number, or warm-up is negative or as long as the run.
    pub fn new(
        peak: f64,
        warmup_epochs: f64,
        epochs: usize,
        steps_per_epoch: usize,
        cosine: Cosine,
    ) -> Result<Self> {
        ensure!(
            peak.is_finite() && peak > 0.,
            "a peak-learning-rate of {peak}: it must be above 0"
        );
        let epochs = epochs as f64;
        ensure!(
            (0. ..epochs).contains(&warmup_epochs),
            "warmup-epochs = {warmup_epochs}: it must be at least 0 and below the {epochs} epochs"
        );
        Ok(Self { peak, warmup_epochs, epochs, steps_per_epoch: steps_per_epoch as f64, cosine })
    }

    /// The rate of step `step`, counted from 1.
    pub fn at(&self, step: usize) -> f64 {
        let epoch = step as f64 / self.steps_per_epoch;
        let warmup = self.warmup_epochs;
        let half_cosine = |part: f64| 0.5 * self.peak * (1. + (PI * part).cos());
        match self.cosine {
            Cosine::PublishedByEpoch if epoch <= warmup => {
                half_cosine(warmup / self.epochs) * epoch / warmup
            }
            Cosine::PublishedByEpoch => {
                half_cosine(((step as f64 - 1.) / self.steps_per_epoch).floor() / self.epochs)
            }
            _ if epoch < warmup => self.peak * epoch / warmup,
            Cosine::Published => half_cosine((epoch - warmup) / self.epochs),
            Cosine::ToZero => half_cosine((epoch - warmup) / (self.epochs - warmup)),
        }
    }
}

/// The decay of the target network: `τ₁ − (τ₁ − τ) (cos(π n / T) + 1) / 2` at step `n` of `T`, from
/// τ up to τ₁, which is 1 as a rule (Grill et al. 2020, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetDecay {
    base: f64,
    last: f64,
    steps: f64,
}

impl TargetDecay {
    /// A schedule from `base` to 1 over `steps` steps.
    ///
    /// # Errors
    ///
    /// `base` lies outside `[0, 1]`.
    pub fn new(base: f64, steps: usize) -> Result<Self> {
        Self::between(base, 1., steps)
    }

    /// A schedule from `base` to `last` over `steps` steps; equal ones make it constant.
    ///
    /// # Errors
    ///
    /// `base` lies outside `[0, 1]`, or `last` outside `[base, 1]`.
    pub fn between(base: f64, last: f64, steps: usize) -> Result<Self> {
        ensure!((0. ..=1.).contains(&base), "target-decay = {base}: it must lie in [0, 1]");
        ensure!(
            (base..=1.).contains(&last),
            "last-target-decay = {last}: it must lie between target-decay = {base} and 1"
        );
        Ok(Self { base, last, steps: steps as f64 })
    }

    /// The decay behind step `step`, counted from 1.
    pub fn at(&self, step: usize) -> f64 {
        let rest = (self.last - self.base) * ((PI * step as f64 / self.steps).cos() + 1.) / 2.;
        self.last - rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_rates(schedule: LearningRate, steps: usize, expected: &[(f64, f64)], within: f64) {
        for &(epoch, want) in expected {
            let got = schedule.at((epoch * steps as f64) as usize);
            assert!((got - want).abs() < within, "epoch {epoch}: got {got}, want {want}");
        }
    }

    /// ProPos, case 7; the predictor's factor is tested with the optimizer.
    #[test]
    fn published_learning_rate_has_the_specified_values() -> Result<()> {
        let schedule = LearningRate::new(0.05, 50., 1000, 234, Cosine::Published)?;
        let expected =
            [(25., 0.025), (50., 0.05), (300., 0.04267767), (550., 0.025), (1000., 0.00030779)];
        assert_rates(schedule, 234, &expected, 1e-8);
        assert!((schedule.at(1) - 4.27e-6).abs() < 5e-9, "{}", schedule.at(1));

        let schedule = LearningRate::new(0.05, 50., 1000, 234, Cosine::PublishedByEpoch)?;
        let expected = [(25., 0.0248461), (50., 0.0496922), (300., 0.0397581)];
        assert_rates(schedule, 234, &expected, 1e-7);
        assert_eq!(schedule.at(299 * 234 + 1), schedule.at(300 * 234));
        Ok(())
    }

    #[test]
    fn learning_rate_of_refinement_ends_at_zero() -> Result<()> {
        let schedule = LearningRate::new(0.02, 5., 200, 76, Cosine::ToZero)?;
        assert_rates(schedule, 76, &[(5., 0.02), (102.5, 0.01), (200., 0.)], 1e-12);
        assert!(LearningRate::new(0.02, 200., 200, 76, Cosine::ToZero).is_err());
        assert!(LearningRate::new(f64::NAN, 1., 200, 76, Cosine::ToZero).is_err());
        Ok(())
    }

    /// ProPos, case 8: the decay.
    #[test]
    fn target_decay_has_the_specified_values() -> Result<()> {
        let schedule = TargetDecay::new(0.996, 1000 * 234)?;
        let expected = [(0, 0.996), (300, 0.99682443), (525, 0.99815692), (1000, 1.)];
        for (epoch, want) in expected {
            let got = schedule.at(epoch * 234);
            assert!((got - want).abs() < 1e-8, "epoch {epoch}: got {got}, want {want}");
        }
        assert!(TargetDecay::new(1.5, 10).is_err());

        let constant = TargetDecay::between(0.996, 0.996, 10)?;
        assert!((0..=10).all(|step| constant.at(step) == 0.996));
        let half = TargetDecay::between(0.5, 0.9, 10)?;
        assert!((half.at(5) - 0.7).abs() < 1e-12 && (half.at(10) - 0.9).abs() < 1e-12);
        assert!(TargetDecay::between(0.5, 0.4, 10).is_err());
        assert!(TargetDecay::between(0.5, 1.1, 10).is_err());
        Ok(())
    }
}
