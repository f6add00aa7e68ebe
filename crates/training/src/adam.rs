//! Adam: for parameters that candle holds, such as prototypes, and for whole segments.

use anyhow::Context as _;
use backbone::Segment;
use backbone::network_file::NamedTensor;
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use layers::{AdamMoments, Gradients, Mode, Modes, Tape};
use stage::container::Container;

/// Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1) for candle's variables; those a loss does
/// not reach are left as they are.
///
/// Only elementwise operations: the same bits for any number of threads.
#[derive(Debug)]
pub struct Adam {
    variables: Vec<Moments>,
    steps: u64,
}

#[derive(Debug)]
struct Moments {
    name: String,
    variable: Var,
    first: Tensor,
    second: Tensor,
}

impl Adam {
    /// An optimizer at step 0, of variables by the names that its memory has in files.
    ///
    /// # Errors
    ///
    /// The device refuses memory for the moments.
    pub fn new(variables: Vec<(&str, Var)>) -> Result<Self> {
        let variables = variables
            .into_iter()
            .map(|(name, variable)| {
                let (first, second) = (variable.zeros_like()?, variable.zeros_like()?);
                Ok(Moments { name: name.to_owned(), variable, first, second })
            })
            .collect::<Result<_>>()?;
        Ok(Self { variables, steps: 0 })
    }

    /// `g ← g + λ x`, `m ← β₁ m + (1−β₁) g`, `v ← β₂ v + (1−β₂) g²`,
    /// `x ← x − η · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε)`: the weight decay λ is coupled.
    ///
    /// # Errors
    ///
    /// A gradient has another shape than its variable.
    pub fn step(&mut self, gradients: &GradStore, with: layers::Adam) -> Result<()> {
        self.steps += 1;
        let layers::Adam { learning_rate, beta_1, beta_2, epsilon, weight_decay } = with;
        let correction_1 = 1. - beta_1.powf(self.steps as f64);
        let correction_2 = 1. - beta_2.powf(self.steps as f64);
        for Moments { variable, first, second, .. } in &mut self.variables {
            let Some(gradient) = gradients.get(variable) else { continue };
            // Detached, or the moments would keep the graph of every step before.
            let value = variable.as_detached_tensor();
            let gradient = (gradient + (&value * weight_decay)?)?;
            *first = ((&*first * beta_1)? + (&gradient * (1. - beta_1))?)?;
            *second = ((&*second * beta_2)? + (gradient.sqr()? * (1. - beta_2))?)?;
            let root = ((&*second / correction_2)?.sqrt()? + epsilon)?;
            let change = ((&*first * (learning_rate / correction_1))? / root)?;
            variable.set(&value.sub(&change)?)?;
        }
        Ok(())
    }

    /// The moments and the steps taken, for a file of f32.
    ///
    /// # Errors
    ///
    /// They cannot be read from the device.
    pub fn memory(&self) -> anyhow::Result<Vec<NamedTensor>> {
        let mut tensors = Vec::new();
        for Moments { name, first, second, .. } in &self.variables {
            tensors.extend(of_moments(name, first.dims(), values(first)?, values(second)?));
            tensors.push(of_steps(name, self.steps));
        }
        Ok(tensors)
    }

    /// Takes up what [`memory`](Self::memory) gave.
    ///
    /// # Errors
    ///
    /// A tensor is missing or has another shape.
    pub fn take_up_memory(&mut self, state: &Container) -> anyhow::Result<()> {
        for Moments { name, first, second, .. } in &mut self.variables {
            for (moment, which) in [(first, FIRST), (second, SECOND)] {
                let values = state.f32(&format!("adam.{name}.{which}"))?;
                *moment = Tensor::from_vec(values, moment.shape(), moment.device())?;
            }
            self.steps = steps_in(state, name)?;
        }
        Ok(())
    }
}

/// A segment that learns by Adam: plan, values, gradients and moments.
pub struct AdamSegment {
    /// Its plan with its values.
    pub segment: Segment,
    name: &'static str,
    modes: Modes,
    gradients: Gradients,
    moments: AdamMoments,
}

/// What one forward pass of an [`AdamSegment`] left behind.
pub struct Seam {
    /// The output, opened to candle.
    pub output: Var,
    tape: Tape,
}

impl AdamSegment {
    /// `segment` before its first step, under the name that it has in files. All of it learns, on
    /// batch statistics.
    pub fn new(name: &'static str, segment: Segment) -> Self {
        let modes = Modes::all(segment.network(), Mode::Batch);
        let (gradients, moments) =
            (segment.network().gradients(), segment.network().adam_moments());
        Self { segment, name, modes, gradients, moments }
    }

    /// The same segment, computing on `device`, moments included. Between steps: gradients that
    /// were gathered are forgotten.
    ///
    /// # Errors
    ///
    /// A device fails.
    pub fn on(&self, device: &Device) -> Result<Self> {
        let segment = self.segment.on(device)?;
        let moments = self.moments.to(segment.network())?;
        let gradients = segment.network().gradients();
        Ok(Self { segment, name: self.name, modes: self.modes.clone(), gradients, moments })
    }

    /// The name that it has in files.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Freezes a block: its values stay as they are, to the bit. On running statistics these do
    /// too; on those of the batch its output goes on changing with every batch.
    ///
    /// # Errors
    ///
    /// There is no block of that name.
    pub fn freeze(&mut self, block: &str, statistics: Mode) -> Result<()> {
        self.segment.parameters.set_trainable(block, false)?;
        self.modes.set(block, statistics)
    }

    /// The output for `input`, as a seam; what the backward pass needs is kept.
    ///
    /// # Errors
    ///
    /// `input` has another shape than the plan takes.
    pub fn learn(&mut self, input: &Tensor) -> Result<Seam> {
        let mut tape = self.segment.network().tape();
        let output = self.segment.forward(input, &self.modes, Some(&mut tape))?;
        Ok(Seam { output: Var::from_tensor(&output)?, tape })
    }

    /// The output for `input` on running statistics, nothing kept: each row by itself.
    ///
    /// # Errors
    ///
    /// `input` has another shape than the plan takes.
    pub fn apply(&mut self, input: &Tensor) -> Result<Tensor> {
        let modes = Modes::all(self.segment.network(), Mode::Running);
        self.segment.forward(input, &modes, None)
    }

    /// Adds the gradients of one pass to those of this step; the gradient at the input where
    /// `input_gradient` asks for it.
    ///
    /// - `at_output`: gradient of the loss at the seam.
    ///
    /// # Errors
    ///
    /// `at_output` has another shape than the seam.
    pub fn backward(
        &mut self,
        seam: Seam,
        at_output: &Tensor,
        input_gradient: bool,
    ) -> Result<Option<Tensor>> {
        let Seam { mut tape, .. } = seam;
        self.segment.backward(&mut tape, at_output, &mut self.gradients, input_gradient)
    }

    /// One step along the gradients gathered since the last one, which are then zero again.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn step(&mut self, with: layers::Adam) -> Result<()> {
        self.segment.parameters.adam(&self.gradients, &mut self.moments, with)?;
        self.gradients.zero();
        Ok(())
    }

    /// The first parameter whose gradient is not finite, as `<segment>.<parameter>`.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn first_gradient_not_finite(&self) -> Result<Option<String>> {
        let name = self.gradients.first_non_finite()?;
        Ok(name.map(|name| format!("{}.{name}", self.name)))
    }

    /// The gathered gradient of a parameter.
    ///
    /// # Errors
    ///
    /// There is no parameter of that name.
    pub fn gradient(&self, parameter: &str) -> Result<Vec<f32>> {
        self.gradients.get(parameter)
    }

    /// The moments and the steps taken.
    ///
    /// # Errors
    ///
    /// They cannot be read from the device.
    pub fn memory(&self) -> anyhow::Result<Vec<NamedTensor>> {
        let mut tensors = vec![of_steps(self.name, self.moments.steps())];
        for entry in self.moments.entries() {
            let (first, second) = self.moments.get(&entry.name)?;
            let name = format!("{}.{}", self.name, entry.name);
            tensors.extend(of_moments(&name, &entry.shape, first, second));
        }
        Ok(tensors)
    }

    /// Takes up what [`memory`](Self::memory) gave.
    ///
    /// # Errors
    ///
    /// A tensor is missing or belongs to another network.
    pub fn take_up_memory(&mut self, state: &Container) -> anyhow::Result<()> {
        self.moments.set_steps(steps_in(state, self.name)?);
        for entry in self.moments.entries().to_vec() {
            let moment = |which| state.f32(&format!("adam.{}.{}.{which}", self.name, entry.name));
            self.moments.set(&entry.name, &moment(FIRST)?, &moment(SECOND)?).with_context(
                || format!("`{}` holds the moments of another network", state.path().display()),
            )?;
        }
        Ok(())
    }
}

const FIRST: &str = "first-moment";
const SECOND: &str = "second-moment";

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1()
}

fn of_moments(name: &str, shape: &[usize], first: Vec<f32>, second: Vec<f32>) -> [NamedTensor; 2] {
    [(FIRST, first), (SECOND, second)].map(|(which, values)| NamedTensor {
        name: format!("adam.{name}.{which}"),
        shape: shape.to_vec(),
        values,
    })
}

/// A count in two parts that f32 holds exactly.
fn of_steps(name: &str, steps: u64) -> NamedTensor {
    let values = vec![(steps >> 20) as f32, (steps & 0xF_FFFF) as f32];
    NamedTensor { name: format!("adam.{name}.steps"), shape: vec![2], values }
}

fn steps_in(state: &Container, name: &str) -> anyhow::Result<u64> {
    let name = format!("adam.{name}.steps");
    match state.f32(&name)?[..] {
        [high, low] => Ok(((high as u64) << 20) + low as u64),
        _ => anyhow::bail!("tensor `{name}` of `{}` is no count", state.path().display()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;
    use stage::container::{self, Header};

    use super::*;

    const RULE: layers::Adam = layers::Adam {
        learning_rate: 0.1,
        beta_1: 0.9,
        beta_2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.,
    };

    #[test]
    fn two_steps_match_hand_computation() -> Result<()> {
        let x = Var::new(&[1f64, -2.], &Cpu)?;
        let unused = Var::new(&[5f64], &Cpu)?;
        let mut adam = Adam::new(vec![("x", x.clone()), ("unused", unused.clone())])?;
        // Gradient 2x: the first step moves by the learning rate against the gradient's sign.
        adam.step(&x.sqr()?.sum_all()?.backward()?, RULE)?;
        let first = x.to_vec1::<f64>()?;
        assert!((first[0] - 0.9).abs() < 1e-8 && (first[1] + 1.9).abs() < 1e-8, "{first:?}");
        adam.step(&x.sqr()?.sum_all()?.backward()?, RULE)?;
        // x = 1: m = 0.1·2·0.9 + 0.1·1.8 = 0.36, of 1 − 0.81; v = 0.001·4·0.999 + 0.001·3.24, of
        // 1 − 0.998001.
        let (m, v) = (0.36f64 / 0.19, (0.003996f64 + 0.00324) / 0.001999);
        let want = 0.9 - 0.1 * m / (v.sqrt() + 1e-8);
        assert!(
            (x.to_vec1::<f64>()?[0] - want).abs() < 1e-7,
            "{:?}, want {want}",
            x.to_vec1::<f64>()
        );
        assert_eq!(unused.to_vec1::<f64>()?, [5.]);
        Ok(())
    }

    /// IMC-SwAV, case T14: coupled decay and a first β of 0.8, by hand to twelve digits.
    #[test]
    fn coupled_weight_decay_has_the_specified_values() -> anyhow::Result<()> {
        let rule = layers::Adam {
            learning_rate: 5e-4,
            beta_1: 0.8,
            beta_2: 0.999,
            epsilon: 1e-8,
            weight_decay: 1e-5,
        };
        let x = Var::new(&[2f64], &Cpu)?;
        let mut adam = Adam::new(vec![("x", x.clone())])?;
        let mut segment = one_weight(2.)?;
        let one = Tensor::new(&[[1f32]], &Cpu)?;
        for (gradient, want) in [(0.3, 1.999500000017), (-0.1, 1.999326011048)] {
            adam.step(&(&x.as_tensor().clone() * gradient)?.sum_all()?.backward()?, rule)?;
            let got = x.to_vec1::<f64>()?[0];
            assert!((got - want).abs() < 1e-12, "got {got}, want {want}");
            let seam = segment.learn(&one)?;
            segment.backward(seam, &(&one * gradient)?, false)?;
            segment.step(rule)?;
            let got = f64::from(segment.segment.parameters.get("layer.weight")?[0]);
            assert!((got - want).abs() < 2e-7, "got {got}, want {want}");
        }
        Ok(())
    }

    /// One weight at `value`, times an input of 1.
    fn one_weight(value: f32) -> anyhow::Result<AdamSegment> {
        let mut builder = layers::Builder::features(1);
        builder.block("only");
        let input = builder.input();
        let output = builder.linear("layer", input, 1)?;
        let mut segment = Segment::empty(builder.finish(output)?);
        segment.parameters.set("layer.weight", &[value])?;
        Ok(AdamSegment::new("one", segment))
    }

    #[test]
    fn what_is_remembered_is_taken_up() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("state.safetensors");
        let one = Tensor::new(&[[1f32]], &Cpu)?;
        let start = || -> anyhow::Result<_> {
            let x = Var::new(&[1f32, -2.], &Cpu)?;
            Ok((Adam::new(vec![("x", x.clone())])?, x, one_weight(2.)?))
        };
        let step = |adam: &mut Adam, x: &Var, segment: &mut AdamSegment| -> anyhow::Result<()> {
            adam.step(&x.sqr()?.sum_all()?.backward()?, RULE)?;
            let seam = segment.learn(&one)?;
            let gradient = seam.output.as_detached_tensor();
            segment.backward(seam, &gradient, false)?;
            Ok(segment.step(RULE)?)
        };
        let (mut adam, x, mut segment) = start()?;
        for _ in 0..3 {
            step(&mut adam, &x, &mut segment)?;
        }
        let tensors = [adam.memory()?, segment.memory()?].concat();
        let views: Vec<_> = tensors.iter().map(NamedTensor::as_f32).collect();
        container::write(&path, "state", 1, Header::new(), &views)?;
        let (mut again, y, mut other) = start()?;
        y.set(x.as_tensor())?;
        for name in ["layer.weight", "layer.bias"] {
            other.segment.parameters.set(name, &segment.segment.parameters.get(name)?)?;
        }
        let state = Container::open(&path, "state", 1)?;
        again.take_up_memory(&state)?;
        other.take_up_memory(&state)?;
        step(&mut adam, &x, &mut segment)?;
        step(&mut again, &y, &mut other)?;
        assert_eq!(x.to_vec1::<f32>()?, y.to_vec1::<f32>()?);
        assert_eq!(segment.segment.parameters.to_vec()?, other.segment.parameters.to_vec()?);
        let large = of_steps("x", (1 << 30) + 7);
        assert_eq!(large.values, [1024., 7.]);
        Ok(())
    }
}
