//! The learning rate, counted in steps.

use std::f64::consts::PI;

/// A linear rise from 0, then the peak, then half a cosine to the last rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadSchedule {
    /// The rate after warm-up.
    pub peak: f64,
    /// The rate that the cosine ends at.
    pub last: f64,
    /// Steps of the rise; the last of them has the peak.
    pub warmup_steps: usize,
    /// Step after which the rate falls.
    pub fall_from: usize,
    /// Steps of the run.
    pub steps: usize,
}

impl HeadSchedule {
    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        let Self { peak, last, warmup_steps, fall_from, steps } = *self;
        if step < warmup_steps {
            return peak * step as f64 / (warmup_steps - 1).max(1) as f64;
        }
        if step < fall_from {
            return peak;
        }
        let share = (step - fall_from) as f64 / (steps - fall_from).max(1) as f64;
        last + 0.5 * (peak - last) * (1. + (PI * share).cos())
    }
}

#[cfg(test)]
mod tests {
    use training::TargetDecay;

    use super::*;

    #[track_caller]
    fn assert_relative(got: f64, want: f64) {
        assert!((got - want).abs() <= 1e-6 * want, "got {got}, want {want}");
    }

    /// Heads on frozen embeddings, case T5: 10 steps an epoch, 100 epochs, 20 of them warm-up.
    #[test]
    fn rates_have_the_specified_values() {
        let schedule =
            HeadSchedule { peak: 4e-4, last: 4e-4, warmup_steps: 200, fall_from: 200, steps: 1000 };
        for (step, want) in
            [(0, 0.), (1, 2.010050e-6), (100, 2.010050e-4), (199, 4e-4), (200, 4e-4), (999, 4e-4)]
        {
            assert_relative(schedule.at(step), want);
        }
        let schedule = HeadSchedule { peak: 2e-4, last: 2e-6, ..schedule };
        for (step, want) in [(200, 2e-4), (600, 1.01e-4), (999, 2.000763e-6)] {
            assert_relative(schedule.at(step), want);
        }
        let decay = TargetDecay::new(0.996, 1., 1000);
        for (step, want) in [(0, 0.996), (500, 0.998), (999, 0.99999999)] {
            assert!((decay.at(step) - want).abs() < 1e-8, "{}", decay.at(step));
        }
    }

    #[test]
    fn the_peak_is_held_until_the_rate_falls() {
        let schedule =
            HeadSchedule { peak: 1., last: 0., warmup_steps: 10, fall_from: 50, steps: 100 };
        assert_eq!([schedule.at(9), schedule.at(10), schedule.at(50)], [1.; 3]);
        assert!((schedule.at(75) - 0.5).abs() < 1e-12 && schedule.at(99) < 1e-3);
        let still = HeadSchedule { warmup_steps: 0, fall_from: 100, ..schedule };
        assert_eq!([still.at(0), still.at(99)], [1., 1.]);
    }
}
