//! Stochastic gradient descent with momentum.

use backbone::Segment;
use candle_core::Result;
use layers::Momenta;

use crate::Online;

/// What the parameters of one segment have of their own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// The learning rate of the step is multiplied by this; 0 holds the segment still, while its
    /// momentum goes on.
    pub learning_rate_factor: f64,
    /// Weight decay, of batch norm and biases too, as ProPos and PLDC publish it.
    pub weight_decay: f64,
}

/// The groups of the online network, and what they share.
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

/// SGD with momentum, without dampening or Nesterov's change: `b ← μ b + (g + λ p)`,
/// `p ← p − η b`, with `b = 0` at first.
pub struct Sgd {
    groups: Groups,
    pub(crate) momenta: [Momenta; 3],
}

impl Sgd {
    /// An optimizer of `online` whose momenta are zero.
    pub fn new(online: &Online, groups: Groups) -> Self {
        Self { groups, momenta: online.segments().map(|segment| segment.network().momenta()) }
    }

    /// The same optimizer for `online`, which may compute on another device.
    ///
    /// # Errors
    ///
    /// A device fails, or `online` is another network.
    pub(crate) fn on(&self, online: &Online) -> Result<Self> {
        let [a, b, c] = &self.momenta;
        let [to_a, to_b, to_c] = online.segments().map(Segment::network);
        Ok(Self { groups: self.groups, momenta: [a.to(to_a)?, b.to(to_b)?, c.to(to_c)?] })
    }

    /// One step along the gradients gathered since the last one, which are then zero again.
    ///
    /// - `learning_rate`: η, from a [`LearningRate`](crate::LearningRate).
    ///
    /// # Errors
    ///
    /// The device refuses. Gradients are taken as they are: see
    /// [`Run::check_gradients`](crate::Run::check_gradients).
    pub fn step(&mut self, online: &mut Online, learning_rate: f64) -> Result<()> {
        let Groups { momentum, backbone, projector, predictor } = self.groups;
        let Online { backbone: a, projector: b, predictor: c, gradients, .. } = online;
        let segments = [a, b, c].into_iter().zip([backbone, projector, predictor]);
        for ((segment, group), (gradients, momenta)) in
            segments.zip(gradients.iter_mut().zip(&mut self.momenta))
        {
            let rule = layers::Sgd {
                learning_rate: learning_rate * group.learning_rate_factor,
                momentum,
                weight_decay: group.weight_decay,
            };
            segment.parameters.sgd(gradients, momenta, rule)?;
            gradients.zero();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learner::tests::{learner, pictures};
    use crate::loss::regression_loss;
    use crate::{Learner, Pass};

    /// One pass of the online network and its gradients, not yet stepped along.
    fn gather(learner: &mut Learner, number: u64) -> anyhow::Result<()> {
        let projection = learner.target.project(&pictures(number + 1)?)?;
        let pass: Pass = learner.online.forward(&pictures(number)?, None)?;
        let gradients = regression_loss(pass.prediction(), &projection)?.backward()?;
        Ok(learner.online.backward(pass, &gradients)?)
    }

    #[test]
    fn steps_follow_the_rule_with_each_group_at_its_own_rate() -> anyhow::Result<()> {
        let mut learner = learner(1)?;
        for (segment, name, factor) in
            [(0, "layer2.0.conv1.weight", 1.), (1, "norm.bias", 1.), (2, "hidden.weight", 10.)]
        {
            let value = |l: &Learner| l.online.segments()[segment].parameters.get(name);
            gather(&mut learner, 10)?;
            let g_1 = learner.online.gradients[segment].get(name)?;
            let p_0 = value(&learner)?;
            let mut fresh = Sgd::new(&learner.online, Groups::byol(0.9, 5e-4, 10.)?);
            fresh.step(&mut learner.online, 0.05)?;
            let p_1 = value(&learner)?;
            assert!(learner.online.gradients[segment].get(name)?.iter().all(|g| *g == 0.));
            gather(&mut learner, 20)?;
            let g_2 = learner.online.gradients[segment].get(name)?;
            fresh.step(&mut learner.online, 0.02)?;
            let p_2 = value(&learner)?;
            for i in 0..p_0.len() {
                let b_1 = g_1[i] + 5e-4 * p_0[i];
                let b_2 = 0.9 * b_1 + g_2[i] + 5e-4 * p_1[i];
                assert!((p_1[i] - (p_0[i] - 0.05 * factor * b_1)).abs() < 1e-6, "{name}[{i}]");
                assert!((p_2[i] - (p_1[i] - 0.02 * factor * b_2)).abs() < 1e-6, "{name}[{i}]");
            }
        }
        Ok(())
    }

    /// ProPos, case 12.
    #[test]
    fn two_steps_have_the_specified_values() -> anyhow::Result<()> {
        // One weight at 1 whose gradient is 0.1 twice: a linear layer on an input of 1.
        let mut builder = layers::Builder::features(1);
        builder.block("only");
        let input = builder.input();
        let output = builder.linear("layer", input, 1)?;
        let network = builder.finish(output)?;
        let mut segment = backbone::Segment::empty(network);
        segment.parameters.set("layer.weight", &[1.])?;
        let (mut gradients, mut momenta) =
            (segment.network().gradients(), segment.network().momenta());
        let modes = layers::Modes::all(segment.network(), layers::Mode::Batch);
        let one = candle_core::Tensor::new(&[[1f32]], &candle_core::Device::Cpu)?;
        let at_output = (&one * 0.1)?;
        let rule = layers::Sgd { learning_rate: 0.05, momentum: 0.9, weight_decay: 5e-4 };
        for want in [0.994975, 0.98542763] {
            let mut tape = segment.network().tape();
            segment.forward(&one, &modes, Some(&mut tape))?;
            segment.backward(&mut tape, &at_output, &mut gradients, false)?;
            segment.parameters.sgd(&gradients, &mut momenta, rule)?;
            gradients.zero();
            let got = f64::from(segment.parameters.get("layer.weight")?[0]);
            assert!((got - want).abs() < 1e-7, "got {got}, want {want}");
        }
        Ok(())
    }

    #[test]
    fn a_group_at_rate_zero_stands_still_while_its_momentum_goes_on() -> anyhow::Result<()> {
        let mut learner = learner(1)?;
        let mut groups = Groups::byol(0.9, 0., 1.)?;
        groups.projector.learning_rate_factor = 0.;
        let mut sgd = Sgd::new(&learner.online, groups);
        let before = learner.online.projector.parameters.get("output.weight")?;
        gather(&mut learner, 10)?;
        let gradient = learner.online.gradients[1].get("output.weight")?;
        assert!(gradient.iter().any(|g| *g != 0.));
        sgd.step(&mut learner.online, 0.1)?;
        assert_eq!(learner.online.projector.parameters.get("output.weight")?, before);

        // Without a new gradient, what moves it now is the momentum of the step before.
        sgd.groups.projector.learning_rate_factor = 1.;
        sgd.step(&mut learner.online, 0.1)?;
        let after = learner.online.projector.parameters.get("output.weight")?;
        for ((after, before), g) in after.iter().zip(&before).zip(&gradient) {
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
