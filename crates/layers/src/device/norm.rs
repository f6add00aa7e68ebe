//! Batch norm with the sum and the ReLU that follow it.
//!
//! In f32 whatever values are stored as. The batch's mean is taken off before squares are summed,
//! and what rounding left of it is corrected, so that a mean far from zero costs no digits.

use candle_core::{DType, Result, Tensor};

use super::channel_sums;

/// Sums over images and pixels of a map.
pub(super) struct Moments {
    /// (C), f32.
    pub mean: Tensor,
    /// (C), f32, without correction for the degrees of freedom.
    pub variance: Tensor,
    /// Values per channel.
    pub count: usize,
}

/// A norm's input and its mean and deviation.
pub(super) struct Normalisation {
    /// The input less (nearly) its mean, (N, P, C).
    centred: Tensor,
    /// What of the mean is still in `centred`, (C).
    rest: Tensor,
    /// `1 / √(variance + ε)`, (C).
    inverse: Tensor,
    /// Whether mean and variance are the batch's, and so depend on the input.
    batch: bool,
}

impl Normalisation {
    /// By the batch's own statistics.
    pub fn of_batch(z: &Tensor, epsilon: f64) -> Result<(Normalisation, Moments)> {
        let z = z.to_dtype(DType::F32)?;
        let (n, pixels, _) = z.dims3()?;
        let count = n * pixels;
        let mean = (channel_sums(&z)? / count as f64)?;
        let centred = z.broadcast_sub(&mean)?;
        let rest = (channel_sums(&centred)? / count as f64)?;
        let squares = (channel_sums(&centred.sqr()?)? / count as f64)?;
        let variance = (squares - rest.sqr()?)?.relu()?;
        let inverse = inverse(&variance, epsilon)?;
        let moments = Moments { mean: (mean + &rest)?, variance, count };
        Ok((Normalisation { centred, rest, inverse, batch: true }, moments))
    }

    /// By running statistics, (C) each.
    pub fn of_running(
        z: &Tensor,
        mean: &Tensor,
        variance: &Tensor,
        epsilon: f64,
    ) -> Result<Normalisation> {
        let centred = z.to_dtype(DType::F32)?.broadcast_sub(mean)?;
        let (rest, inverse) = (mean.zeros_like()?, inverse(variance, epsilon)?);
        Ok(Normalisation { centred, rest, inverse, batch: false })
    }

    /// `relu((z − mean) · weight / √(variance + ε) + bias + residual)`, with residual and ReLU as
    /// asked, in the type of values; and itself with `centred` in that type, to be kept.
    pub fn apply(
        self,
        weight: &Tensor,
        bias: &Tensor,
        residual: Option<&Tensor>,
        relu: bool,
        dtype: DType,
    ) -> Result<(Tensor, Normalisation)> {
        let Normalisation { centred, rest, inverse, batch } = self;
        let scale = (weight * &inverse)?;
        let shift = (bias - (&rest * &scale)?)?;
        let mut y = centred.broadcast_mul(&scale)?.broadcast_add(&shift)?;
        if let Some(residual) = residual {
            y = (y + residual.to_dtype(DType::F32)?)?;
        }
        if relu {
            y = y.relu()?;
        }
        let centred = centred.to_dtype(dtype)?;
        Ok((y.to_dtype(dtype)?, Normalisation { centred, rest, inverse, batch }))
    }
}

pub(super) fn inverse(variance: &Tensor, epsilon: f64) -> Result<Tensor> {
    (variance + epsilon)?.sqrt()?.recip()
}

/// `r + m·(b − r)`, the running value after a batch's value `b`.
pub(super) fn follow(running: &Tensor, batch: &Tensor, momentum: f64) -> Result<Tensor> {
    running + ((batch - running)? * momentum)?
}

/// What flows back through a ReLU whose output was `y`: nothing where that is 0.
pub(super) fn relu_gradient(gradient: &Tensor, y: &Tensor) -> Result<Tensor> {
    gradient * y.sign()?
}

/// Gradients of a norm's parameters, (C) each, and the way to that of its input.
pub(super) struct Gradients<'a> {
    note: &'a Normalisation,
    /// Of the norm's output before sum and ReLU, (N, P, C), f32.
    gradient: Tensor,
    pub weight: Tensor,
    pub bias: Tensor,
}

impl<'a> Gradients<'a> {
    /// - `gradient`: of the norm's output before sum and ReLU.
    pub fn of(note: &'a Normalisation, gradient: &Tensor) -> Result<Gradients<'a>> {
        let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
        let bias = channel_sums(&gradient)?;
        let centred = note.centred.to_dtype(DType::F32)?;
        let products = channel_sums(&(&gradient * centred)?)?;
        // Σ g · (z − mean) / √(variance + ε)
        let weight = ((products - (&note.rest * &bias)?)? * &note.inverse)?;
        Ok(Gradients { note, gradient, weight, bias })
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
        let constant = ((&of_unit * &note.rest)? - (share * &self.bias)?)?;
        let centred = note.centred.to_dtype(DType::F32)?.broadcast_mul(&of_unit)?;
        (scaled - centred)?.broadcast_add(&constant)?.to_dtype(dtype)
    }
}
