//! The numbers of a transformer, checked against its plan.

use std::collections::BTreeMap;

use candle_core::{Result, bail};

use crate::TransformerPlan;

/// The numbers of a Vision Transformer by name, in f32 and row by row: exactly the
/// [tensors](TransformerPlan::tensors) of its plan, each of the right length and finite.
#[derive(Clone, Debug, PartialEq)]
pub struct TransformerWeights {
    plan: TransformerPlan,
    tensors: BTreeMap<String, Vec<f32>>,
}

impl TransformerWeights {
    /// Takes the numbers and checks them: shape and numbers of each tensor, by name.
    ///
    /// # Errors
    ///
    /// The plan contradicts itself; a tensor is missing, unknown or of another shape; a number is not
    /// finite. The error names the tensor.
    pub fn new(
        plan: &TransformerPlan,
        mut given: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    ) -> Result<TransformerWeights> {
        plan.check()?;
        let mut tensors = BTreeMap::new();
        for wanted in plan.tensors() {
            let (name, want) = (wanted.name, wanted.shape);
            let Some((shape, numbers)) = given.remove(&name) else {
                bail!("the transformer's tensor `{name}` {want:?} is missing")
            };
            if shape != want || numbers.len() != want.iter().product::<usize>() {
                bail!(
                    "the transformer's tensor `{name}` is {shape:?} with {} numbers, and must be {want:?}",
                    numbers.len()
                )
            }
            if let Some(at) = numbers.iter().position(|number| !number.is_finite()) {
                bail!("the transformer's tensor `{name}` has {} at index {at}", numbers[at])
            }
            tensors.insert(name, numbers);
        }
        if let Some(name) = given.keys().next() {
            bail!("the tensor `{name}` is unknown: this transformer has none of that name")
        }
        Ok(TransformerWeights { plan: plan.clone(), tensors })
    }

    /// The plan that the numbers fit.
    pub fn plan(&self) -> &TransformerPlan {
        &self.plan
    }

    /// The numbers of a tensor of the plan, or `None` if the plan has no such tensor.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    /// The numbers of a tensor that the plan must have.
    pub(crate) fn tensor(&self, name: &str) -> &[f32] {
        self.get(name).unwrap_or_else(|| panic!("a checked transformer has `{name}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transformer::tests::{noise_weights, plan};

    /// Pretrained networks, case T14: each fault is an error that names the tensor.
    #[test]
    fn a_missing_unknown_or_misshapen_tensor_is_an_error_that_names_it() {
        let plan = plan();
        let all = noise_weights(&plan, 1);
        assert!(TransformerWeights::new(&plan, all.clone()).is_ok());
        let fails = |given| {
            let error = TransformerWeights::new(&plan, given).expect_err("a fault");
            error.to_string()
        };
        for name in all.keys() {
            let mut given = all.clone();
            given.remove(name);
            assert!(fails(given).contains(&format!("`{name}`")), "missing {name}");

            let mut given = all.clone();
            given.get_mut(name).expect("there").0.push(1);
            assert!(fails(given).contains(&format!("`{name}`")), "shape of {name}");

            let mut given = all.clone();
            *given.get_mut(name).expect("there").1.last_mut().expect("numbers") = f32::NAN;
            assert!(fails(given).contains(&format!("`{name}`")), "NaN in {name}");
        }
        let mut given = all.clone();
        given.insert("blocks.9.q.weight".to_owned(), (vec![1], vec![1.]));
        assert!(fails(given).contains("`blocks.9.q.weight`"));
    }
}
