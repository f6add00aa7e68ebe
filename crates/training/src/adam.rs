//! Adam for parameters that candle holds: heads and centres.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

/// Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1) without weight decay, for candle's
/// variables; those a loss does not reach are left as they are.
///
/// Only elementwise operations: the same bits for any number of threads.
#[derive(Debug)]
pub struct Adam {
    variables: Vec<Moments>,
    learning_rate: f64,
    beta_1: f64,
    beta_2: f64,
    epsilon: f64,
    steps: i32,
}

#[derive(Debug)]
struct Moments {
    variable: Var,
    first: Tensor,
    second: Tensor,
}

impl Adam {
    /// An optimizer at step 0.
    ///
    /// - `beta_1`, `beta_2`: decay of the gradient's first and second moment; .9 and .999 are usual.
    /// - `epsilon`: added to the root of the second moment; 1e-8 is usual.
    ///
    /// # Errors
    ///
    /// The device refuses memory for the moments.
    pub fn new(
        variables: Vec<Var>,
        learning_rate: f64,
        beta_1: f64,
        beta_2: f64,
        epsilon: f64,
    ) -> Result<Self> {
        let variables = variables
            .into_iter()
            .map(|variable| {
                let (first, second) = (variable.zeros_like()?, variable.zeros_like()?);
                Ok(Moments { variable, first, second })
            })
            .collect::<Result<_>>()?;
        Ok(Self { variables, learning_rate, beta_1, beta_2, epsilon, steps: 0 })
    }

    /// `m ← β₁ m + (1−β₁) g`, `v ← β₂ v + (1−β₂) g²`,
    /// `x ← x − η · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε)`.
    ///
    /// # Errors
    ///
    /// A gradient has another shape than its variable.
    pub fn step(&mut self, gradients: &GradStore) -> Result<()> {
        self.steps += 1;
        let correction_1 = 1. - self.beta_1.powi(self.steps);
        let correction_2 = 1. - self.beta_2.powi(self.steps);
        for Moments { variable, first, second } in &mut self.variables {
            let Some(gradient) = gradients.get(variable) else { continue };
            *first = ((&*first * self.beta_1)? + (gradient * (1. - self.beta_1))?)?;
            *second = ((&*second * self.beta_2)? + (gradient.sqr()? * (1. - self.beta_2))?)?;
            let root = ((&*second / correction_2)?.sqrt()? + self.epsilon)?;
            let change = ((&*first * (self.learning_rate / correction_1))? / root)?;
            // Detached, or the moments would keep the graph of every step before.
            variable.set(&variable.as_detached_tensor().sub(&change)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    #[test]
    fn two_steps_match_hand_computation() -> Result<()> {
        let x = Var::new(&[1f64, -2.], &Cpu)?;
        let unused = Var::new(&[5f64], &Cpu)?;
        let mut adam = Adam::new(vec![x.clone(), unused.clone()], 0.1, 0.9, 0.999, 1e-8)?;
        // Gradient 2x: the first step moves by the learning rate against the gradient's sign.
        adam.step(&x.sqr()?.sum_all()?.backward()?)?;
        let first = x.to_vec1::<f64>()?;
        assert!((first[0] - 0.9).abs() < 1e-8 && (first[1] + 1.9).abs() < 1e-8, "{first:?}");
        adam.step(&x.sqr()?.sum_all()?.backward()?)?;
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
}
