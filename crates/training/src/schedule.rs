//! Learning rate and target decay over a run. Steps count from 1.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cosine {
    /// Along half a cosine that ends at 0 with the last epoch.
    ToZero,
    /// Published by ProPos: the cosine divides by all epochs, those of warm-up included, and so ends
    /// above 0 (at 0.62 % of the peak after 50 of 1,000 epochs of warm-up).
    Published,
    /// Published by ProPos for CIFAR-20: a cosine that begins at epoch 0 and changes once an epoch;
    /// the linear warm-up ends on it.
    PublishedByEpoch,
}

/// The learning rate of every step.
#[derive(Debug, Clone, PartialEq)]
pub struct LearningRate {
    peak: f64,
    epochs: f64,
    steps_per_epoch: f64,
    shape: Curve,
}

/// How the learning rate changes.
#[derive(Debug, Clone, PartialEq)]
enum Curve {
    Constant,
    Cosine { cosine: Cosine, warmup_epochs: f64 },
    Still { still_steps: f64, warmup_steps: f64 },
    Drops { warmup_steps: usize, epochs: Vec<usize>, factor: f64 },
}

impl LearningRate {
    /// A schedule that rises from 0 to `peak` over `warmup_epochs`, then falls along a cosine.
    ///
    /// - `peak`: the rate at the end of warm-up, for this batch size.
    /// - `warmup_epochs`: at least 0 and below `epochs`.
    pub fn cosine(
        peak: f64,
        warmup_epochs: f64,
        epochs: usize,
        steps_per_epoch: usize,
        cosine: Cosine,
    ) -> Self {
        Self::of(peak, epochs, steps_per_epoch, Curve::Cosine { cosine, warmup_epochs })
    }

    /// The same rate in every step.
    pub fn constant(rate: f64) -> Self {
        Self::of(rate, 1, 1, Curve::Constant)
    }

    /// SeCu's schedule: a rate of 0 in the first epochs, in which the centres move to the random
    /// projections; then a rise to `peak`, then half a cosine that ends just above 0.
    ///
    /// - `still_epochs`: epochs at a rate of 0; 1 is published.
    /// - `warmup_epochs`: epochs after them in which the rate rises; 10 are published.
    pub fn after_still_epochs(
        peak: f64,
        still_epochs: usize,
        warmup_epochs: usize,
        epochs: usize,
        steps_per_epoch: usize,
    ) -> Self {
        let [still_steps, warmup_steps] =
            [still_epochs, warmup_epochs].map(|epochs| (epochs * steps_per_epoch) as f64);
        Self::of(peak, epochs, steps_per_epoch, Curve::Still { still_steps, warmup_steps })
    }

    /// IMC-SwAV's schedule: a rise to `peak` over the first steps; from each epoch of `drops` on, counted
    /// from 0, the rate is multiplied by `factor`.
    pub fn with_drops(
        peak: f64,
        warmup_steps: usize,
        drops: &[usize],
        factor: f64,
        steps_per_epoch: usize,
    ) -> Self {
        let shape = Curve::Drops { warmup_steps, epochs: drops.to_vec(), factor };
        Self::of(peak, 1, steps_per_epoch, shape)
    }

    fn of(peak: f64, epochs: usize, steps_per_epoch: usize, shape: Curve) -> Self {
        Self { peak, epochs: epochs as f64, steps_per_epoch: steps_per_epoch as f64, shape }
    }

    /// The rate of step `step`, counted from 1.
    pub fn at(&self, step: usize) -> f64 {
        let half_cosine = |part: f64| 0.5 * self.peak * (1. + (PI * part).cos());
        let done = step as f64 - 1.;
        match &self.shape {
            Curve::Constant => self.peak,
            Curve::Cosine { cosine, warmup_epochs } => {
                let (epoch, warmup) = (step as f64 / self.steps_per_epoch, *warmup_epochs);
                match cosine {
                    Cosine::PublishedByEpoch if epoch <= warmup => {
                        half_cosine(warmup / self.epochs) * epoch / warmup
                    }
                    Cosine::PublishedByEpoch => {
                        half_cosine((done / self.steps_per_epoch).floor() / self.epochs)
                    }
                    _ if epoch < warmup => self.peak * epoch / warmup,
                    Cosine::Published => half_cosine((epoch - warmup) / self.epochs),
                    Cosine::ToZero => half_cosine((epoch - warmup) / (self.epochs - warmup)),
                }
            }
            // `η max(1, n − s) / w`, then `η (1 + cos(π (n − s − w) / (T − s − w))) / 2`, with `n`
            // steps done, `s` standing still, `w` of warm-up and `T` in all.
            Curve::Still { still_steps, .. } if done < *still_steps => 0.,
            Curve::Still { still_steps, warmup_steps } => {
                let since = done - still_steps;
                if since < *warmup_steps {
                    return self.peak * since.max(1.) / warmup_steps;
                }
                let all = self.epochs * self.steps_per_epoch;
                half_cosine((since - warmup_steps) / (all - still_steps - warmup_steps))
            }
            Curve::Drops { warmup_steps, epochs, factor } => {
                let epoch = (done / self.steps_per_epoch).floor();
                let passed = epochs.iter().filter(|&&drop| drop as f64 <= epoch).count();
                let rate = self.peak * factor.powi(passed as i32);
                if step > *warmup_steps { rate } else { rate * step as f64 / *warmup_steps as f64 }
            }
        }
    }
}

/// The decay of the target network: `τ₁ − (τ₁ − τ) (cos(π n / T) + 1) / 2` after step `n` of `T`,
/// from τ up to τ₁, which is usually 1 (Grill et al. 2020, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetDecay {
    base: f64,
    last: f64,
    steps: f64,
}

impl TargetDecay {
    /// A schedule from `base` to `last` over `steps` steps; equal ones make it constant.
    pub fn new(base: f64, last: f64, steps: usize) -> Self {
        Self { base, last, steps: steps as f64 }
    }

    /// The decay after step `step`, counted from 1.
    pub fn at(&self, step: usize) -> f64 {
        let rest = (self.last - self.base) * ((PI * step as f64 / self.steps).cos() + 1.) / 2.;
        self.last - rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_rates(schedule: &LearningRate, steps: usize, expected: &[(f64, f64)], within: f64) {
        for &(epoch, want) in expected {
            let got = schedule.at((epoch * steps as f64) as usize);
            assert!((got - want).abs() < within, "epoch {epoch}: got {got}, want {want}");
        }
    }

    /// ProPos, case 7; the predictor's factor is tested with the optimizer.
    #[test]
    fn published_learning_rate_has_the_specified_values() {
        let schedule = LearningRate::cosine(0.05, 50., 1000, 234, Cosine::Published);
        let expected =
            [(25., 0.025), (50., 0.05), (300., 0.04267767), (550., 0.025), (1000., 0.00030779)];
        assert_rates(&schedule, 234, &expected, 1e-8);
        assert!((schedule.at(1) - 4.27e-6).abs() < 5e-9, "{}", schedule.at(1));

        let schedule = LearningRate::cosine(0.05, 50., 1000, 234, Cosine::PublishedByEpoch);
        let expected = [(25., 0.0248461), (50., 0.0496922), (300., 0.0397581)];
        assert_rates(&schedule, 234, &expected, 1e-7);
        assert_eq!(schedule.at(299 * 234 + 1), schedule.at(300 * 234));
    }

    #[test]
    fn learning_rate_of_refinement_ends_at_zero() {
        let schedule = LearningRate::cosine(0.02, 5., 200, 76, Cosine::ToZero);
        assert_rates(&schedule, 76, &[(5., 0.02), (102.5, 0.01), (200., 0.)], 1e-12);
    }

    /// SeCu, case T9.
    #[test]
    fn the_rate_after_still_epochs_has_the_specified_values() {
        let rate = LearningRate::after_still_epochs(0.2, 1, 10, 401, 391);
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
            let got = rate.at(epoch * 391 + step + 1);
            assert!((got - want).abs() < 1e-9, "({epoch}, {step}): got {got}, want {want}");
        }
        let at_once = LearningRate::after_still_epochs(0.2, 0, 0, 2, 4);
        assert_eq!((at_once.at(1), at_once.at(5)), (0.2, 0.1));
    }

    /// IMC-SwAV, case T13: learning rates.
    #[test]
    fn the_rate_with_drops_has_the_specified_values() {
        let rate = LearningRate::with_drops(5e-4, 500, &[150, 300, 400], 0.4, 200);
        for (step, want) in [(1, 1e-6), (250, 2.5e-4), (500, 5e-4), (501, 5e-4)] {
            assert!((rate.at(step) - want).abs() < 1e-15, "step {step}");
        }
        for (epochs, want) in
            [([3, 149], 5e-4), ([150, 299], 2e-4), ([300, 399], 8e-5), ([400, 499], 3.2e-5)]
        {
            for epoch in epochs {
                for step in [1, 200] {
                    let got = rate.at(epoch * 200 + step);
                    assert!((got - want).abs() < 1e-15, "epoch {epoch}: {got}");
                }
            }
        }
        assert_eq!(LearningRate::constant(0.3).at(7), 0.3);
    }

    /// ProPos, case 8: the decay.
    #[test]
    fn target_decay_has_the_specified_values() {
        let schedule = TargetDecay::new(0.996, 1., 1000 * 234);
        let expected = [(0, 0.996), (300, 0.99682443), (525, 0.99815692), (1000, 1.)];
        for (epoch, want) in expected {
            let got = schedule.at(epoch * 234);
            assert!((got - want).abs() < 1e-8, "epoch {epoch}: got {got}, want {want}");
        }

        let constant = TargetDecay::new(0.996, 0.996, 10);
        assert!((0..=10).all(|step| constant.at(step) == 0.996));
        let half = TargetDecay::new(0.5, 0.9, 10);
        assert!((half.at(5) - 0.7).abs() < 1e-12 && (half.at(10) - 0.9).abs() < 1e-12);
    }
}
