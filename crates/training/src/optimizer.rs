//! Update rules: stochastic gradient descent with momentum, and Adam.
//!
//! They are our own because candle-nn's cannot resume a run to the same bits: its SGD has no
//! momentum, and the moments of its AdamW are private.

use anyhow::{Context as _, Result};
use candle_core::Tensor;
use layers::{Adam, AdamMoments, Gradients, Momenta, Network, Parameters, Sgd};

use crate::checkpoint::Checkpoint;

/// An update rule with its values for one step: `Sgd` or `Adam`.
///
/// It updates a segment's parameters by its kernels, and a candle variable by elementwise
/// operations, which give the same bits for any number of threads.
pub trait Optimizer: Copy {
    /// The moments of a segment, kept between steps.
    type Memory;

    /// Names of the moments of a candle variable.
    const MOMENTS: &'static [&'static str];

    /// The memory before the first step.
    fn memory(network: &Network) -> Self::Memory;

    /// The same memory for `network`, which may compute on another device.
    ///
    /// # Errors
    ///
    /// It is another network.
    fn moved(memory: &Self::Memory, network: &Network) -> candle_core::Result<Self::Memory>;

    /// One step of a segment's parameters.
    ///
    /// # Errors
    ///
    /// Gradients or memory belong to another network.
    fn step(
        self,
        parameters: &mut Parameters,
        gradients: &Gradients,
        memory: &mut Self::Memory,
    ) -> candle_core::Result<()>;

    /// Saves or loads the memory of the segment `name`.
    ///
    /// # Errors
    ///
    /// The file lacks it, or has that of another network.
    fn checkpoint(memory: &mut Self::Memory, name: &str, file: &mut Checkpoint) -> Result<()>;

    /// The value of a candle variable after step `step`, counted from 1; updates its moments, one
    /// for each of [`MOMENTS`](Self::MOMENTS).
    ///
    /// # Errors
    ///
    /// The shapes differ.
    fn updated(
        self,
        value: &Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor],
        step: u64,
    ) -> candle_core::Result<Tensor>;
}

const MOMENTUM: &str = "momentum";
const FIRST: &str = "first-moment";
const SECOND: &str = "second-moment";
/// Name of the number of steps taken.
pub(crate) const STEPS: &str = "steps";

/// SGD with momentum, without dampening or Nesterov's change: `b ← μ b + (g + λ p)`,
/// `p ← p − η b`, with `b = 0` at first. A learning rate η of 0 still updates `b`.
impl Optimizer for Sgd {
    type Memory = Momenta;
    const MOMENTS: &'static [&'static str] = &[MOMENTUM];

    fn memory(network: &Network) -> Momenta {
        network.momenta()
    }

    fn moved(memory: &Momenta, network: &Network) -> candle_core::Result<Momenta> {
        memory.to(network)
    }

    fn step(
        self,
        parameters: &mut Parameters,
        gradients: &Gradients,
        memory: &mut Momenta,
    ) -> candle_core::Result<()> {
        parameters.sgd(gradients, memory, self)
    }

    fn checkpoint(memory: &mut Momenta, name: &str, file: &mut Checkpoint) -> Result<()> {
        for entry in memory.entries().to_vec() {
            let full = format!("{MOMENTUM}.{name}.{}", entry.name);
            let loaded = file.exchange(&full, &entry.shape, || Ok(memory.get(&entry.name)?))?;
            if let Some(values) = loaded {
                memory.set(&entry.name, &values).with_context(|| of_another_network(&full))?;
            }
        }
        Ok(())
    }

    fn updated(
        self,
        value: &Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor],
        _step: u64,
    ) -> candle_core::Result<Tensor> {
        let Self { learning_rate, momentum: decay, weight_decay } = self;
        let [momentum] = moments else { candle_core::bail!("SGD has one moment") };
        let gradient = (gradient + (value * weight_decay)?)?;
        *momentum = ((&*momentum * decay)? + gradient)?;
        value - (&*momentum * learning_rate)?
    }
}

/// Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1) with coupled weight decay λ:
/// `g ← g + λ p`, `m ← β₁ m + (1−β₁) g`, `v ← β₂ v + (1−β₂) g²`,
/// `p ← p − η · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε)`.
impl Optimizer for Adam {
    type Memory = AdamMoments;
    const MOMENTS: &'static [&'static str] = &[FIRST, SECOND];

    fn memory(network: &Network) -> AdamMoments {
        network.adam_moments()
    }

    fn moved(memory: &AdamMoments, network: &Network) -> candle_core::Result<AdamMoments> {
        memory.to(network)
    }

    fn step(
        self,
        parameters: &mut Parameters,
        gradients: &Gradients,
        memory: &mut AdamMoments,
    ) -> candle_core::Result<()> {
        parameters.adam(gradients, memory, self)
    }

    fn checkpoint(memory: &mut AdamMoments, name: &str, file: &mut Checkpoint) -> Result<()> {
        let steps = format!("{STEPS}.{name}");
        if let Some(&[steps]) = file.exchange(&steps, &[1], || Ok(vec![memory.steps()]))?.as_deref()
        {
            memory.set_steps(steps);
        }
        for entry in memory.entries().to_vec() {
            let full = format!("{name}.{}", entry.name);
            let (first, second) = memory.get(&entry.name)?;
            let mut exchange = |which: &str, moment: Vec<f32>| {
                file.exchange(&format!("{which}.{full}"), &entry.shape, || Ok(moment))
            };
            let loaded = exchange(FIRST, first)?.zip(exchange(SECOND, second)?);
            if let Some((first, second)) = loaded {
                let set = memory.set(&entry.name, &first, &second);
                set.with_context(|| of_another_network(&full))?;
            }
        }
        Ok(())
    }

    fn updated(
        self,
        value: &Tensor,
        gradient: &Tensor,
        moments: &mut [Tensor],
        step: u64,
    ) -> candle_core::Result<Tensor> {
        let Self { learning_rate, beta_1, beta_2, epsilon, weight_decay } = self;
        let [first, second] = moments else { candle_core::bail!("Adam has two moments") };
        let correction_1 = 1. - beta_1.powf(step as f64);
        let correction_2 = 1. - beta_2.powf(step as f64);
        let gradient = (gradient + (value * weight_decay)?)?;
        *first = ((&*first * beta_1)? + (&gradient * (1. - beta_1))?)?;
        *second = ((&*second * beta_2)? + (gradient.sqr()? * (1. - beta_2))?)?;
        let root = ((&*second / correction_2)?.sqrt()? + epsilon)?;
        let change = ((&*first * (learning_rate / correction_1))? / root)?;
        value - change
    }
}

fn of_another_network(name: &str) -> String {
    format!("the saved state holds `{name}` of another network")
}

#[cfg(test)]
mod tests {
    use backbone::Segment;
    use candle_core::Device::Cpu;
    use stage::container::Header;

    use super::*;
    use crate::checkpoint::{self, Trained};
    use crate::{TrainedSegment, TrainedVariable};

    const ADAM: Adam =
        Adam { learning_rate: 0.1, beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0. };
    const SGD: Sgd = Sgd { learning_rate: 0.05, momentum: 0.9, weight_decay: 5e-4 };

    /// One weight at `value`, times an input of 1.
    fn one_weight<O: Optimizer>(value: f32) -> Result<TrainedSegment<O>> {
        let mut builder = layers::Builder::features(1);
        builder.block("only");
        let input = builder.input();
        let output = builder.linear("layer", input, 1)?;
        let mut segment = Segment::empty(builder.finish(output)?);
        segment.parameters.set("layer.weight", &[value])?;
        Ok(TrainedSegment::new("one", segment))
    }

    fn weight<O: Optimizer>(one: &TrainedSegment<O>) -> Result<f64> {
        Ok(f64::from(one.segment.parameters.get("layer.weight")?[0]))
    }

    /// A step of segment and variable along the same gradient, whatever their values.
    fn step<O: Optimizer>(
        segment: &mut TrainedSegment<O>,
        variable: &mut TrainedVariable<O>,
        gradient: f64,
        rule: O,
    ) -> Result<()> {
        let one = Tensor::new(&[[1f32]], &Cpu)?;
        let seam = segment.forward(&one)?;
        segment.backward(seam, &(&one * gradient)?, false)?;
        segment.step(rule)?;
        let loss = (variable.variable.as_tensor() * gradient)?.sum_all()?;
        Ok(variable.step(&loss.backward()?, rule)?)
    }

    /// Two steps from `start` along these gradients lead to these values.
    fn assert_two_steps<O: Optimizer>(
        rule: O,
        start: f64,
        steps: [(f64, f64); 2],
        within: f64,
    ) -> Result<()> {
        let mut segment = one_weight(start as f32)?;
        let mut variable = TrainedVariable::new("x", &Tensor::new(&[start], &Cpu)?)?;
        for (gradient, want) in steps {
            step(&mut segment, &mut variable, gradient, rule)?;
            let got = variable.variable.to_vec1::<f64>()?[0];
            assert!((got - want).abs() < within, "variable: got {got}, want {want}");
            let got = weight(&segment)?;
            assert!((got - want).abs() < 2e-7, "segment: got {got}, want {want}");
        }
        Ok(())
    }

    /// ProPos, case 12.
    #[test]
    fn sgd_has_the_specified_values() -> Result<()> {
        assert_two_steps(SGD, 1., [(0.1, 0.994975), (0.1, 0.98542763)], 1e-8)
    }

    /// IMC-SwAV, case T14: coupled decay and a first β of 0.8, by hand to twelve digits.
    #[test]
    fn adam_has_the_specified_values() -> Result<()> {
        let rule = Adam { learning_rate: 5e-4, beta_1: 0.8, weight_decay: 1e-5, ..ADAM };
        assert_two_steps(rule, 2., [(0.3, 1.999500000017), (-0.1, 1.999326011048)], 1e-12)
    }

    #[test]
    fn adam_matches_hand_computation() -> Result<()> {
        // A gradient of 2x: the first step moves by the learning rate against its sign. Then, for
        // x = 1: m = 0.1·2·0.9 + 0.1·1.8 = 0.36, of 1 − 0.81; v = 0.001·4·0.999 + 0.001·3.24, of
        // 1 − 0.998001.
        let (m, v) = (0.36f64 / 0.19, (0.003996f64 + 0.00324) / 0.001999);
        let second = 0.9 - 0.1 * m / (v.sqrt() + 1e-8);
        assert_two_steps(ADAM, 1., [(2., 0.9), (1.8, second)], 1e-7)
    }

    #[test]
    fn a_variable_without_a_gradient_keeps_its_momentum() -> Result<()> {
        let rule = Sgd { learning_rate: 0.5, momentum: 0.9, weight_decay: 0.1 };
        let mut variable = TrainedVariable::new("x", &Tensor::new(&[2f64], &Cpu)?)?;
        let gradients = (variable.variable.sum_all()? * 3.)?.backward()?;
        variable.step(&gradients, rule)?;
        let (momentum, moved) = (3.2, 2. - 0.5 * 3.2);
        assert!((variable.variable.to_vec1::<f64>()?[0] - moved).abs() < 1e-12);
        let none = Tensor::new(0f64, &Cpu)?.backward()?;
        variable.step(&none, rule)?;
        let want = moved - 0.5 * (0.9 * momentum + 0.1 * moved);
        assert!((variable.variable.to_vec1::<f64>()?[0] - want).abs() < 1e-12);
        Ok(())
    }

    /// SeCu, case T10.
    #[test]
    fn a_rate_of_zero_moves_nothing_but_gathers_momentum() -> Result<()> {
        let start = Tensor::new(&[[0.3f32, -2.]], &Cpu)?;
        let mut variable = TrainedVariable::new("x", &start)?;
        let gradients = variable.variable.sum_all()?.backward()?; // A gradient of 1.
        let still = Sgd { learning_rate: 0., momentum: 0.9, weight_decay: 0. };
        for _ in 0..391 {
            variable.step(&gradients, still)?;
        }
        assert_eq!(variable.variable.to_vec2::<f32>()?, start.to_vec2::<f32>()?);
        // The momentum is 10 by now; without a gradient, .9 of it moves the variable.
        let none = Tensor::new(0f32, &Cpu)?.backward()?;
        variable.step(&none, Sgd { learning_rate: 1., ..still })?;
        let moved = variable.variable.to_vec2::<f32>()?;
        assert!((moved[0][0] - (0.3 - 9.)).abs() < 1e-4 && (moved[0][1] + 11.).abs() < 1e-4);
        Ok(())
    }

    /// A segment and a variable, to be saved.
    struct Both<O: Optimizer>(TrainedSegment<O>, TrainedVariable<O>);

    impl<O: Optimizer> Trained for Both<O> {
        fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
            self.0.checkpoint(file)?;
            self.1.checkpoint(file)
        }

        fn exported(&self) -> Option<&Segment> {
            Some(&self.0.segment)
        }
    }

    fn assert_resumes<O: Optimizer>(rule: O) -> Result<()> {
        let folder = tempfile::tempdir()?;
        let start = || -> Result<Both<O>> {
            Ok(Both(one_weight(2.)?, TrainedVariable::new("x", &Tensor::new(&[1f32, -2.], &Cpu)?)?))
        };
        let mut one = start()?;
        for gradient in [0.3, -0.7, 0.2] {
            step(&mut one.0, &mut one.1, gradient, rule)?;
        }
        Checkpoint::of(&mut one)?.write(folder.path(), Header::new(), true)?;
        let mut other = start()?;
        let file = checkpoint::open(folder.path())?;
        Checkpoint::load(Some(&file), Some(&file), &mut other)?;
        for both in [&mut one, &mut other] {
            step(&mut both.0, &mut both.1, 0.1, rule)?;
        }
        assert_eq!(weight(&one.0)?, weight(&other.0)?);
        assert_eq!(one.1.variable.to_vec1::<f32>()?, other.1.variable.to_vec1::<f32>()?);
        Ok(())
    }

    #[test]
    fn a_saved_optimizer_resumes_to_the_same_bits() -> Result<()> {
        assert_resumes(SGD)?;
        assert_resumes(ADAM)
    }

    #[test]
    fn a_state_of_another_shape_is_refused_by_name() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut one = Both::<Sgd>(
            one_weight(2.)?,
            TrainedVariable::new("x", &Tensor::new(&[1f32, -2.], &Cpu)?)?,
        );
        Checkpoint::of(&mut one)?.write(folder.path(), Header::new(), true)?;
        let file = checkpoint::open(folder.path())?;
        one.1 = TrainedVariable::new("x", &Tensor::new(&[1f32], &Cpu)?)?;
        let error = Checkpoint::load(Some(&file), Some(&file), &mut one).expect_err("two values");
        assert!(error.to_string().contains("`x` of `"), "{error}");
        one.1 = TrainedVariable::new("y", &Tensor::new(&[1f32], &Cpu)?)?;
        let error = Checkpoint::load(Some(&file), Some(&file), &mut one).expect_err("no y");
        assert!(error.to_string().contains("`y`"), "{error}");
        Ok(())
    }
}
