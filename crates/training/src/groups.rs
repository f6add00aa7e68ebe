//! How backbone, projector and predictor of the online network learn.

/// What differs between the segments.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// The learning rate of the step is multiplied by this. At 0 the segment stays as it is, but
    /// its momentum is updated.
    pub learning_rate_factor: f64,
    /// Weight decay of all parameters, batch norms and biases included, as ProPos and PLDC publish
    /// it.
    pub weight_decay: f64,
}

/// The groups of the online network, and the momentum that they share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Groups {
    /// Share of the last step's direction that this step keeps; 0.9 is usual.
    pub momentum: f64,
    /// Of the backbone.
    pub backbone: Group,
    /// Of the projector.
    pub projector: Group,
    /// Of the predictor.
    pub predictor: Group,
}

impl Groups {
    /// BYOL's: one weight decay for all, and a predictor that learns faster by a factor.
    ///
    /// # Errors
    ///
    /// A value is negative or not finite, or the momentum is 1 or more.
    pub fn byol(
        momentum: f64,
        weight_decay: f64,
        predictor_learning_rate_factor: f64,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            (0. ..1.).contains(&momentum),
            "momentum = {momentum}: it must be at least 0 and below 1"
        );
        for (key, value) in [
            ("weight-decay", weight_decay),
            ("predictor-learning-rate-factor", predictor_learning_rate_factor),
        ] {
            anyhow::ensure!(
                value.is_finite() && value >= 0.,
                "{key} = {value}: it must be a number that is not negative"
            );
        }
        let group = Group { learning_rate_factor: 1., weight_decay };
        let predictor = Group { learning_rate_factor: predictor_learning_rate_factor, ..group };
        Ok(Self { momentum, backbone: group, projector: group, predictor })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Learner;
    use crate::learner::tests::{learner, part, pictures};
    use crate::loss::regression_loss;

    /// The gradients of one pass of the online network, before its step.
    fn gather(learner: &mut Learner, number: u64) -> anyhow::Result<()> {
        let projection = learner.target.project(&pictures(number + 1)?)?;
        let pass = learner.online.forward(&pictures(number)?, None)?;
        let gradients = regression_loss(&pass[2], &projection)?.backward()?;
        Ok(learner.online.backward(pass, &gradients)?)
    }

    #[test]
    fn steps_follow_the_rule_with_each_group_at_its_own_rate() -> anyhow::Result<()> {
        for (segment, name, factor) in
            [(0, "layer2.0.conv1.weight", 1.), (1, "norm.bias", 1.), (2, "hidden.weight", 10.)]
        {
            let mut learner = learner(1)?;
            let value = |l: &mut Learner| part(&mut l.online, segment).segment.parameters.get(name);
            let gradient = |l: &mut Learner| part(&mut l.online, segment).gradient(name);
            gather(&mut learner, 10)?;
            let g_1 = gradient(&mut learner)?;
            let p_0 = value(&mut learner)?;
            learner.online.step(0.05)?;
            let p_1 = value(&mut learner)?;
            assert!(gradient(&mut learner)?.iter().all(|g| *g == 0.));
            gather(&mut learner, 20)?;
            let g_2 = gradient(&mut learner)?;
            learner.online.step(0.02)?;
            let p_2 = value(&mut learner)?;
            for i in 0..p_0.len() {
                let b_1 = g_1[i] + 5e-4 * p_0[i];
                let b_2 = 0.9 * b_1 + g_2[i] + 5e-4 * p_1[i];
                assert!((p_1[i] - (p_0[i] - 0.05 * factor * b_1)).abs() < 1e-6, "{name}[{i}]");
                assert!((p_2[i] - (p_1[i] - 0.02 * factor * b_2)).abs() < 1e-6, "{name}[{i}]");
            }
        }
        Ok(())
    }

    #[test]
    fn a_group_at_rate_zero_stands_still_while_its_momentum_goes_on() -> anyhow::Result<()> {
        let mut learner = learner(1)?;
        let mut groups = Groups::byol(0.9, 0., 1.)?;
        groups.projector.learning_rate_factor = 0.;
        learner.online.groups = groups;
        let value = |l: &Learner| l.online.projector.segment.parameters.get("output.weight");
        let before = value(&learner)?;
        gather(&mut learner, 10)?;
        let gradient = learner.online.projector.gradient("output.weight")?;
        assert!(gradient.iter().any(|g| *g != 0.));
        learner.online.step(0.1)?;
        assert_eq!(value(&learner)?, before);

        // Without a new gradient, what moves it now is the momentum of the step before.
        learner.online.groups.projector.learning_rate_factor = 1.;
        learner.online.step(0.1)?;
        for ((after, before), g) in value(&learner)?.iter().zip(&before).zip(&gradient) {
            assert!((after - (before - 0.1 * 0.9 * g)).abs() < 1e-6);
        }
        Ok(())
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(Groups::byol(0.9, 5e-4, 10.).is_ok());
        assert!(Groups::byol(1., 5e-4, 10.).is_err());
        assert!(Groups::byol(0.9, -1., 10.).is_err());
        assert!(Groups::byol(0.9, 0., f64::NAN).is_err());
    }
}
