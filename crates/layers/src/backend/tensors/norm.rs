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
    /// Whether mean and variance are the batch's, and so depend on the input.
    batch: bool,
}

impl Centred {
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
        Ok((Centred { centred, residue, inverse, batch: true }, moments))
    }

    /// By running statistics, (C) each.
    pub fn of_running(
        z: &Tensor,
        mean: &Tensor,
        variance: &Tensor,
        epsilon: f64,
    ) -> Result<Centred> {
        let centred = z.to_dtype(DType::F32)?.broadcast_sub(mean)?;
        let (residue, inverse) = (mean.zeros_like()?, inverse(variance, epsilon)?);
        Ok(Centred { centred, residue, inverse, batch: false })
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
        let Centred { centred, residue, inverse, batch } = self;
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
        Ok((y.to_dtype(dtype)?, Centred { centred, residue, inverse, batch }))
    }
}

pub(in crate::backend) fn inverse(variance: &Tensor, epsilon: f64) -> Result<Tensor> {
    (variance + epsilon)?.sqrt()?.recip()
}

/// `r + m·(b − r)`, the running value after a batch's value `b`.
pub(super) fn follow(running: &Tensor, batch: &Tensor, momentum: f64) -> Result<Tensor> {
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

    /// `γ/σ · (g − Σg/M − ẑ·Σ(g·ẑ)/M)` for batch statistics, `γ/σ · g` for running ones.
    pub fn input(&self, weight: &Tensor, dtype: DType) -> Result<Tensor> {
        let note = self.note;
        let scale = (weight * &note.inverse)?;
        let scaled = self.gradient.broadcast_mul(&scale)?;
        if !note.batch {
            return scaled.to_dtype(dtype);
        }
        let (n, pixels, _) = self.gradient.dims3()?;
        let share = (scale / (n * pixels) as f64)?;
        let of_unit = ((&share * &self.weight)? * &note.inverse)?;
        let constant = ((&of_unit * &note.residue)? - (share * &self.bias)?)?;
        let centred = note.centred.to_dtype(DType::F32)?.broadcast_mul(&of_unit)?;
        (scaled - centred)?.broadcast_add(&constant)?.to_dtype(dtype)
    }
}
