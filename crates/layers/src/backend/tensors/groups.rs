//! Batch norm over groups of a batch, by tensor operations.
//!
//! Moments and sums of a group are vectors on the device, so that nothing is read back to the host where the
//! ranks exchange them by NCCL.

use candle_core::{Result, Tensor};
use collective::tree;
use kernels::Shape;

use super::Tensors;
use super::norm::{self, Centred, Count, NormGradients};
use crate::backend::grouped::Divisible;
use crate::backend::{NormCall, NormGradientCall, Operand};
use crate::flat::Changes;
use crate::groups::BatchGroups;
use crate::plan::Norm;

/// Count, means and sums of squared deviations, (1 + 2·C) f32.
pub(crate) struct GroupMoments(Tensor);

impl GroupMoments {
    /// - `count`: of values per channel; `mean`, `squares`: (C) each, f32.
    pub fn new(count: usize, mean: &Tensor, squares: &Tensor) -> Result<GroupMoments> {
        let count = Tensor::full(count as f32, 1, mean.device())?;
        Ok(GroupMoments(Tensor::cat(&[&count, mean, squares], 0)?))
    }

    /// Those of all groups of all ranks.
    pub fn of_batch(groups: &BatchGroups, own: Vec<GroupMoments>) -> Result<GroupMoments> {
        let own = joined(own.into_iter().map(|moments| moments.0), join)?;
        Ok(GroupMoments(groups.join(own, join)?))
    }

    fn parts(moments: &Tensor) -> Result<[Tensor; 3]> {
        let channels = moments.dim(0)? / 2;
        let (mean, squares) = (moments.narrow(0, 1, channels)?, 1 + channels);
        Ok([moments.narrow(0, 0, 1)?, mean, moments.narrow(0, squares, channels)?])
    }
}

/// The moments of two sets of values from those of each: Chan, Golub & LeVeque 1983, Eq. 2.1.
fn join(lower: Tensor, upper: Tensor) -> Result<Tensor> {
    let [before, mean, squares] = GroupMoments::parts(&lower)?;
    let [count, upper_mean, upper_squares] = GroupMoments::parts(&upper)?;
    let total = (&before + &count)?;
    let share = (count / &total)?;
    let difference = (upper_mean - &mean)?;
    let mean = (mean + difference.broadcast_mul(&share)?)?;
    let between = difference.sqr()?.broadcast_mul(&(before * share)?)?;
    let squares = ((squares + upper_squares)? + between)?;
    Tensor::cat(&[total, mean, squares], 0)
}

/// The tree over the vectors of the groups of a rank.
fn joined(
    own: impl IntoIterator<Item = Tensor>,
    join: impl Fn(Tensor, Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let own = own.into_iter().map(Some);
    let mut failed = Ok(());
    let all = tree(own, |lower: &mut Option<Tensor>, upper| {
        if let (Some(below), Some(above)) = (lower.take(), upper) {
            match join(below, above) {
                Ok(both) => *lower = Some(both),
                Err(error) => failed = Err(error),
            }
        }
    });
    failed?;
    Ok(all.flatten().expect("a rank has a group"))
}

/// The sum over the groups of this rank, and over all ranks if `of_ranks`.
pub(in crate::backend) fn sum(
    groups: &BatchGroups,
    own: Vec<Tensor>,
    of_ranks: bool,
) -> Result<Tensor> {
    let own = joined(own, |lower, upper| lower + upper)?;
    if of_ranks { groups.sum(own) } else { Ok(own) }
}

/// The halves of a vector (2·C), (C) each.
pub(in crate::backend) fn halves(vector: &Tensor) -> Result<[Tensor; 2]> {
    let channels = vector.dim(0)? / 2;
    Ok([vector.narrow(0, 0, channels)?, vector.narrow(0, channels, channels)?])
}

/// Mean and `1 / √(variance + ε)` that all groups are normalised by, (C) each.
pub(crate) struct GroupNormalisation {
    pub mean: Tensor,
    pub inverse: Tensor,
    /// Values per channel in the batch; `None` for running statistics.
    pub count: Option<Count>,
}

impl GroupNormalisation {
    /// By the moments of the batch, which update the running ones, or by the running ones.
    pub fn new(
        norm: &Norm,
        moments: Option<GroupMoments>,
        statistics: &mut Changes,
    ) -> Result<GroupNormalisation> {
        let [mean, variance] = [norm.running_mean, norm.running_variance];
        let running = [statistics.tensor(mean)?, statistics.tensor(variance)?];
        let Some(GroupMoments(moments)) = moments else {
            let [mean, variance] = running;
            let inverse = norm::inverse(&variance, norm.epsilon)?;
            return Ok(GroupNormalisation { mean, inverse, count: None });
        };
        let [count, of_batch, squares] = GroupMoments::parts(&moments)?;
        let unbiased = squares.broadcast_div(&(&count - 1.)?)?;
        statistics.push(mean, norm::follow(&running[0], &of_batch, norm.momentum)?);
        statistics.push(variance, norm::follow(&running[1], &unbiased, norm.momentum)?);
        let inverse = norm::inverse(&squares.broadcast_div(&count)?, norm.epsilon)?;
        Ok(GroupNormalisation { mean: of_batch, inverse, count: Some(Count::OfGroups(count)) })
    }
}

impl Divisible for Tensors {
    type Moments = GroupMoments;
    type Normalisation = GroupNormalisation;
    type Kept = Centred;
    /// Gradients of bias and weight, (2·C).
    type GradientSums = Tensor;

    const SIDE_BY_SIDE: bool = false;

    fn moments(&self, _: Shape, z: &Tensor, _: Option<Self::Sums>) -> Result<GroupMoments> {
        let (_, moments) = Centred::of_batch(z, 1.)?;
        let squares = (&moments.variance * moments.count as f64)?;
        GroupMoments::new(moments.count, &moments.mean, &squares)
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
    ) -> Result<(Tensor, Centred)> {
        let NormCall { norm, parameters, residual, .. } = *call;
        let centred = Centred::of(input.value(), &n.mean, &n.inverse, n.count.clone())?;
        let (weight, bias) = (parameters.tensor(norm.weight)?, parameters.tensor(norm.bias)?);
        centred.apply(&weight, &bias, residual, norm.relu, self.dtype())
    }

    fn normalised<'a>(_: &'a GroupNormalisation, kept: &'a Centred) -> &'a Centred {
        kept
    }

    fn is_of_batch(centred: &Centred) -> bool {
        centred.is_of_batch()
    }

    fn gradient_sums(
        &self,
        call: &NormGradientCall<Self>,
        gradient: &mut Tensor,
    ) -> Result<Tensor> {
        if let Some(output) = call.relu_output() {
            *gradient = norm::relu_gradient(gradient, output)?;
        }
        let found = NormGradients::of(call.normalised, gradient)?;
        Tensor::cat(&[found.bias, found.weight], 0)
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
        let at_input = if of_input {
            let found = NormGradients::by_sums(call.normalised, &gradient, halves(sums)?)?;
            Some(found.input(&parameters.tensor(norm.weight)?, gradient.dtype())?)
        } else {
            None
        };
        Ok([at_input, of_residual.then_some(gradient)])
    }
}

/// Pushes a group's gradients of bias and weight, (2·C).
pub(in crate::backend) fn push_weight_gradients(
    norm: &Norm,
    sums: &Tensor,
    gradients: &mut Changes,
) -> Result<()> {
    let [bias, weight] = halves(sums)?;
    gradients.push(norm.weight, weight);
    gradients.push(norm.bias, bias);
    Ok(())
}
