//! Batch norm with the residual sum and the ReLU that follow it.
//!
//! Computed in f32, whatever values are stored as. The mean is subtracted before squares are summed,
//! and its rounding error is corrected, so that a mean far from zero costs no digits.

use candle_core::{DType, Result, Tensor};

use super::channel_sums;

/// Sums over images and pixels of a map.
pub(super) struct BatchMoments {
    /// (C), f32.
    pub mean: Tensor,
    /// (C), f32, without correction for the degrees of freedom.
    pub variance: Tensor,
    /// Values per channel.
    pub count: usize,
}

impl BatchMoments {
    /// The variance with correction for the degrees of freedom, as the running one keeps it.
    pub fn unbiased_variance(&self) -> Result<Tensor> {
        &self.variance * (self.count as f64 / (self.count - 1) as f64)
    }
}

/// A norm's input without its mean, and its deviation.
pub(crate) struct Centred {
    /// The input minus its rounded mean, (N, P, C).
    centred: Tensor,
    /// The rounding error of the mean, which `centred` still contains, (C).
    residue: Tensor,
    /// `1 / √(variance + ε)`, (C).
    inverse: Tensor,
    /// Values per channel in the batch; `None` for running statistics, which do not depend on the input.
    count: Option<Count>,
}

/// Values per channel.
#[derive(Clone)]
pub(crate) enum Count {
    /// All are in this value.
    Here(usize),
    /// In all groups of a batch, (1), f32.
    OfGroups(Tensor),
}

impl Count {
    /// `x` / count, for (C).
    fn share(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Count::Here(count) => x / *count as f64,
            Count::OfGroups(count) => x.broadcast_div(count),
        }
    }
}

impl Centred {
    /// By mean and deviation that were found before.
    pub(super) fn of(
        z: &Tensor,
        mean: &Tensor,
        inverse: &Tensor,
        count: Option<Count>,
    ) -> Result<Centred> {
        let centred = z.to_dtype(DType::F32)?.broadcast_sub(mean)?;
        Ok(Centred { centred, residue: mean.zeros_like()?, inverse: inverse.clone(), count })
    }

    /// Whether mean and variance are the batch's, and so depend on the input.
    pub(super) fn is_of_batch(&self) -> bool {
        self.count.is_some()
    }

    /// By the batch's own statistics.
    pub(super) fn of_batch(z: &Tensor, epsilon: f64) -> Result<(Centred, BatchMoments)> {
        let z = z.to_dtype(DType::F32)?;
        let (n, pixels, _) = z.dims3()?;
        let count = n * pixels;
        let mean = (channel_sums(&z)? / count as f64)?;
        let centred = z.broadcast_sub(&mean)?;
        let residue = (channel_sums(&centred)? / count as f64)?;
        let squares = (channel_sums(&centred.sqr()?)? / count as f64)?;
        let variance = (squares - residue.sqr()?)?.relu()?;
        let inverse = inverse(&variance, epsilon)?;
        let moments = BatchMoments { mean: (mean + &residue)?, variance, count };
        let count = Some(Count::Here(count));
        Ok((Centred { centred, residue, inverse, count }, moments))
    }

    /// By running statistics, (C) each.
    pub fn of_running(
        z: &Tensor,
        mean: &Tensor,
        variance: &Tensor,
        epsilon: f64,
    ) -> Result<Centred> {
        Centred::of(z, mean, &inverse(variance, epsilon)?, None)
    }

    /// `relu((z − mean) · weight / √(variance + ε) + bias + residual)`, residual and ReLU optional, in
    /// the type of values; and itself with `centred` in that type, for the backward pass.
    pub fn apply(
        self,
        weight: &Tensor,
        bias: &Tensor,
        residual: Option<&Tensor>,
        relu: bool,
        dtype: DType,
    ) -> Result<(Tensor, Centred)> {
        let Centred { centred, residue, inverse, count } = self;
        let scale = (weight * &inverse)?;
        let shift = (bias - (&residue * &scale)?)?;
        let mut y = centred.broadcast_mul(&scale)?.broadcast_add(&shift)?;
        if let Some(residual) = residual {
            y = (y + residual.to_dtype(DType::F32)?)?;
        }
        if relu {
            y = y.relu()?;
        }
        let centred = centred.to_dtype(dtype)?;
        Ok((y.to_dtype(dtype)?, Centred { centred, residue, inverse, count }))
    }
}

pub(in crate::backend) fn inverse(variance: &Tensor, epsilon: f64) -> Result<Tensor> {
    (variance + epsilon)?.sqrt()?.recip()
}

/// `r + m·(b − r)`, the running value after a batch's value `b`.
pub(in crate::backend) fn follow(
    running: &Tensor,
    batch: &Tensor,
    momentum: f64,
) -> Result<Tensor> {
    running + ((batch - running)? * momentum)?
}

/// The gradient of a ReLU's input, where `y` is its output: 0 where `y` is 0.
pub(super) fn relu_gradient(gradient: &Tensor, y: &Tensor) -> Result<Tensor> {
    gradient * y.sign()?
}

/// Gradients of a norm's parameters, (C) each; [`input`](Self::input) gives that of its input.
pub(super) struct NormGradients<'a> {
    note: &'a Centred,
    /// Of the norm's output before sum and ReLU, (N, P, C), f32.
    gradient: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
}

impl<'a> NormGradients<'a> {
    /// - `gradient`: of the norm's output before sum and ReLU.
    pub fn of(note: &'a Centred, gradient: &Tensor) -> Result<NormGradients<'a>> {
        let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
        let bias = channel_sums(&gradient)?;
        let centred = note.centred.to_dtype(DType::F32)?;
        let products = channel_sums(&(&gradient * centred)?)?;
        // Σ g · (z − mean) / √(variance + ε)
        let weight = ((products - (&note.residue * &bias)?)? * &note.inverse)?;
        Ok(NormGradients { note, gradient, weight, bias })
    }

    /// By sums that were found before.
    ///
    /// - `gradient`: of the norm's output before sum and ReLU.
    /// - `[bias, weight]`: over the whole batch.
    pub fn by_sums(
        note: &'a Centred,
        gradient: &Tensor,
        [bias, weight]: [Tensor; 2],
    ) -> Result<NormGradients<'a>> {
        let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
        Ok(NormGradients { note, gradient, weight, bias })
    }

    /// `γ/σ · (g − Σg/M − ẑ·Σ(g·ẑ)/M)` for batch statistics, `γ/σ · g` for running ones.
    pub fn input(&self, weight: &Tensor, dtype: DType) -> Result<Tensor> {
        let note = self.note;
        let scale = (weight * &note.inverse)?;
        let scaled = self.gradient.broadcast_mul(&scale)?;
        let Some(count) = &note.count else { return scaled.to_dtype(dtype) };
        let share = count.share(&scale)?;
        let of_unit = ((&share * &self.weight)? * &note.inverse)?;
        let constant = ((&of_unit * &note.residue)? - (share * &self.bias)?)?;
        let centred = note.centred.to_dtype(DType::F32)?.broadcast_mul(&of_unit)?;
        (scaled - centred)?.broadcast_add(&constant)?.to_dtype(dtype)
    }
}
