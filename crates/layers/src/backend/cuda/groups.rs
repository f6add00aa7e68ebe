//! Batch norm over groups of a batch, by the fused kernels, with the joined sums as tensors between them.

use candle_core::{Result, Tensor};
use kernels::Shape;

use super::{Cuda, norm};
use crate::backend::grouped::Divisible;
use crate::backend::tensors::groups::{
    GroupMoments, GroupNormalisation, push_weight_gradients, sum,
};
use crate::backend::{NormCall, NormGradientCall, Operand};
use crate::flat::Changes;
use crate::groups::BatchGroups;
use crate::plan::Norm;

impl Divisible for Cuda {
    type Moments = GroupMoments;
    type Normalisation = GroupNormalisation;
    type Kept = norm::NormInput;
    /// Gradients of bias and weight, (2·C).
    type GradientSums = Tensor;

    const SIDE_BY_SIDE: bool = false;

    fn moments(&self, shape: Shape, z: &Tensor, _: Option<Self::Sums>) -> Result<GroupMoments> {
        let [mean, squares] = norm::mean_and_squares(z)?;
        GroupMoments::new(shape.count(), &mean, &squares)
    }

    fn join_moments(groups: &BatchGroups, own: Vec<GroupMoments>) -> Result<GroupMoments> {
        GroupMoments::of_batch(groups, own)
    }

    fn normalisation(
        norm: &Norm,
        _: Shape,
        moments: Option<GroupMoments>,
        statistics: &mut Changes,
    ) -> Result<GroupNormalisation> {
        GroupNormalisation::new(norm, moments, statistics)
    }

    fn normalise(
        &self,
        call: &NormCall<Self>,
        input: Operand<Tensor>,
        n: &GroupNormalisation,
    ) -> Result<(Tensor, norm::NormInput)> {
        let NormCall { norm, parameters, residual, .. } = *call;
        let (weight, bias) = (parameters.tensor(norm.weight)?, parameters.tensor(norm.bias)?);
        let moments = Tensor::stack(&[&n.mean, &n.inverse], 0)?;
        let input = norm::NormInput::new(input.value(), moments, n.count.clone())?;
        Ok((norm::apply(norm, &input, residual, [&weight, &bias])?, input))
    }

    fn normalised<'a>(_: &'a GroupNormalisation, kept: &'a norm::NormInput) -> &'a norm::NormInput {
        kept
    }

    fn is_of_batch(input: &norm::NormInput) -> bool {
        input.is_of_batch()
    }

    fn gradient_sums(
        &self,
        call: &NormGradientCall<Self>,
        gradient: &mut Tensor,
    ) -> Result<Tensor> {
        let NormGradientCall { norm, parameters, .. } = *call;
        let (weight, bias) = (parameters.tensor(norm.weight)?, parameters.tensor(norm.bias)?);
        *gradient = gradient.contiguous()?;
        norm::gradient_sums(call.normalised, gradient, call.relu_output(), [&weight, &bias])?
            .flatten_all()
    }

    fn norm_weight_gradients(
        call: &NormGradientCall<Self>,
        sums: &Tensor,
        gradients: &mut Changes,
    ) -> Result<()> {
        push_weight_gradients(call.norm, sums, gradients)
    }

    fn join_gradient_sums(groups: &BatchGroups, own: Vec<Tensor>, batch: bool) -> Result<Tensor> {
        sum(groups, own, batch)
    }

    fn norm_value_gradients(
        &self,
        call: &NormGradientCall<Self>,
        sums: &Tensor,
        gradient: Tensor,
    ) -> Result<[Option<Tensor>; 2]> {
        let NormGradientCall { norm, parameters, wanted: [of_input, of_residual], .. } = *call;
        let (weight, bias) = (parameters.tensor(norm.weight)?, parameters.tensor(norm.bias)?);
        // Without a ReLU the residual's gradient is the output's.
        let wanted = [of_input, of_residual && norm.relu];
        let (input, output) = (call.normalised, call.relu_output());
        let [at_input, at_residual] =
            norm::value_gradients(input, &gradient, output, [&weight, &bias], sums, wanted)?;
        Ok([at_input, of_residual.then(|| at_residual.unwrap_or(gradient))])
    }
}
