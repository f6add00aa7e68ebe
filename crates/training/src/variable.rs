//! Candle variables that learn beside the segments, such as prototypes.

use std::marker::PhantomData;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use crate::checkpoint::Checkpoint;
use crate::optimizer::{Optimizer, STEPS};

/// A candle variable that learns by the update rule `O`, with the optimizer's moments.
#[derive(Debug)]
pub struct TrainedVariable<O> {
    /// Its value, for losses.
    pub variable: Var,
    name: String,
    moments: Vec<Tensor>,
    steps: u64,
    rule: PhantomData<O>,
}

impl<O: Optimizer> TrainedVariable<O> {
    /// A variable before its first step, under its name in files.
    pub fn new(name: impl Into<String>, value: &Tensor) -> Result<Self> {
        let variable = Var::from_tensor(value)?;
        let moments = O::MOMENTS.iter().map(|_| value.zeros_like()).collect::<Result<_>>()?;
        Ok(Self { variable, name: name.into(), moments, steps: 0, rule: PhantomData })
    }

    /// Takes one step. The gradient is zero if the loss does not reach the variable; momentum and weight
    /// decay still apply.
    pub fn step(&mut self, gradients: &GradStore, rule: O) -> Result<()> {
        self.steps += 1;
        // Detached, or the moments would keep the graphs of all earlier steps.
        let value = self.variable.as_detached_tensor();
        let zero;
        let gradient = match gradients.get(&self.variable) {
            Some(gradient) => gradient,
            None => {
                zero = value.zeros_like()?;
                &zero
            }
        };
        let value = rule.updated(&value, &gradient.detach(), &mut self.moments, self.steps)?;
        self.variable.set(&value)
    }

    /// The variable's name if its gradient is not finite.
    pub fn gradient_not_finite(&self, gradients: &GradStore) -> Result<Option<String>> {
        let Some(gradient) = gradients.get(&self.variable) else { return Ok(None) };
        let sum = gradient.abs()?.sum_all()?.to_scalar::<f32>()?;
        Ok((!sum.is_finite()).then(|| self.name.clone()))
    }

    /// Saves or loads the value and the optimizer's memory.
    ///
    /// # Errors
    ///
    /// The file lacks them, or has another shape.
    pub fn checkpoint(&mut self, file: &mut Checkpoint) -> anyhow::Result<()> {
        file.variable(&self.name, &self.variable)?;
        for (which, moment) in O::MOMENTS.iter().zip(&mut self.moments) {
            file.state_tensor(&format!("{which}.{}", self.name), moment)?;
        }
        let steps =
            file.exchange(&format!("{STEPS}.{}", self.name), &[1], || Ok(vec![self.steps]))?;
        steps.into_iter().flatten().for_each(|steps| self.steps = steps);
        Ok(())
    }
}
