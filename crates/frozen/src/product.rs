//! Arithmetic of heads on flat rows: matrix products, softmax, Adam.

use anyhow::Result;
use candle_core::{Device, Tensor, WithDType};

/// A number type that heads are trained in: f32, and f64 in tests.
pub trait HeadFloat: num_traits::Float + WithDType + std::iter::Sum {
    /// `x Φ(x)` and its derivative `Φ(x) + x φ(x)`, where `Φ` and `φ` are distribution and density of
    /// the normal distribution: the Gaussian error linear unit (Hendrycks and Gimpel 2016).
    fn gelu(self) -> (Self, Self);

    /// The larger of both numbers.
    fn at_least(self, other: Self) -> Self {
        num_traits::Float::max(self, other)
    }

    /// The nearest number of this type.
    fn of(value: f64) -> Self {
        <Self as WithDType>::from_f64(value)
    }

    /// The same number in f64.
    fn wide(self) -> f64 {
        WithDType::to_f64(self)
    }
}

impl HeadFloat for f32 {
    /// Within 4e-7 of the exact value for `|x|` up to 10. One exponential serves the value and the
    /// derivative, and the loop over a row becomes vector instructions; `erf` after Abramowitz and
    /// Stegun 1964, 7.1.26.
    fn gelu(self) -> (f32, f32) {
        let z = self.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let bell = exponential(-z * z);
        let t = 1. / (1. + 0.327_591_1 * z);
        let tail = ((((1.061_405_4 * t - 1.453_152_1) * t + 1.421_413_8) * t - 0.284_496_72) * t
            + 0.254_829_6)
            * t
            * bell;
        let phi = if self < 0. { 0.5 * tail } else { 1. - 0.5 * tail };
        (self * phi, phi + self * bell * 0.398_942_3)
    }
}

impl HeadFloat for f64 {
    fn gelu(self) -> (f64, f64) {
        let phi = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (self * phi, phi + self * (-0.5 * self * self).exp() * 0.398_942_280_401_432_7)
    }
}

/// `eˣ` for `x ≤ 0`, within a share of `(2 + |x|) · 1e-7`; below -87 about 1e-38.
fn exponential(x: f32) -> f32 {
    let scaled = (x * std::f32::consts::LOG2_E).max(-126.);
    let whole = (scaled - 0.5) as i32;
    let f = (scaled - whole as f32) * std::f32::consts::LN_2;
    let series =
        1. + f * (1. + f * (0.5 + f * (1. / 6. + f * (1. / 24. + f * (1. / 120. + f / 720.)))));
    f32::from_bits((whole.wrapping_add(127) as u32) << 23) * series
}

/// A matrix of `rows × columns`; products do not copy it.
#[derive(Debug, Clone)]
pub struct FlatMatrix(Tensor);

impl FlatMatrix {
    /// Copies `values`, row by row.
    ///
    /// # Errors
    ///
    /// They do not fill rows of `columns`.
    pub fn new<T: HeadFloat>(values: &[T], columns: usize) -> Result<Self> {
        Ok(Self(Tensor::from_slice(values, (values.len() / columns, columns), &Device::Cpu)?))
    }

    /// The transposed matrix, without a copy.
    ///
    /// # Errors
    ///
    /// None for a matrix.
    pub fn transposed(&self) -> Result<Self> {
        Ok(Self(self.0.t()?))
    }

    /// `self · other`, row by row. Bit-identical for any number of threads.
    ///
    /// # Errors
    ///
    /// The extents do not fit.
    pub fn times<T: HeadFloat>(&self, other: &Self) -> Result<Vec<T>> {
        Ok(self.0.matmul(&other.0)?.flatten_all()?.to_vec1()?)
    }
}

/// Replaces each row of `logits` `(N, K)` by its `log softmax`.
pub fn log_softmax<T: HeadFloat>(logits: &mut [T], clusters: usize) {
    for row in logits.chunks_exact_mut(clusters) {
        let sum = log_sum(row);
        row.iter_mut().for_each(|x| *x -= sum);
    }
}

/// `log Σ exp(x)`.
pub fn log_sum<T: HeadFloat>(row: &[T]) -> T {
    let largest = row.iter().copied().fold(T::neg_infinity(), T::at_least);
    largest + row.iter().map(|&x| (x - largest).exp()).sum::<T>().ln()
}

/// Adds every row to `sums`.
pub fn add_rows<T: HeadFloat>(sums: &mut [T], rows: &[T]) {
    for row in rows.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += x);
    }
}

/// One step of AdamW for single parameters, with the usual `β₁ = 0.9`, `β₂ = 0.999` and `ε = 1e-8`.
///
/// `θ ← (1 − ηλ) θ − η / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)`: Kingma and Ba 2015 for `λ = 0`,
/// Loshchilov and Hutter 2019, as PyTorch computes it.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep<T> {
    kept: T,
    rate: T,
    correction: T,
}

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;

impl<T: HeadFloat> AdamStep<T> {
    /// Step `t`, counted from 1, with learning rate η and weight decay λ.
    pub fn new(learning_rate: f64, weight_decay: f64, step: u64) -> Self {
        let step = i32::try_from(step).unwrap_or(i32::MAX);
        Self {
            kept: T::of(1. - learning_rate * weight_decay),
            rate: T::of(learning_rate / (1. - BETA_1.powi(step))),
            correction: T::of(1. / (1. - BETA_2.powi(step)).sqrt()),
        }
    }

    /// Moves the parameter `x`, and its moments of the gradient and of its square.
    pub fn apply(&self, x: &mut T, gradient: T, first: &mut T, second: &mut T) {
        *first = T::of(BETA_1) * *first + T::of(1. - BETA_1) * gradient;
        *second = T::of(BETA_2) * *second + T::of(1. - BETA_2) * gradient * gradient;
        *x = self.kept * *x - self.rate * *first / (second.sqrt() * self.correction + T::of(1e-8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_take_transposed_matrices() -> Result<()> {
        let a = FlatMatrix::new(&[1f32, 2., 3., 4., 5., 6.], 3)?;
        let b = FlatMatrix::new(&[1f32, 0., 2., 0., 1., 1.], 3)?;
        assert_eq!(a.times::<f32>(&b.transposed()?)?, [7., 5., 16., 11.]);
        assert_eq!(a.transposed()?.times::<f32>(&b)?, [1., 4., 6., 2., 5., 9., 3., 6., 12.]);
        assert!(a.times::<f32>(&b).is_err());
        Ok(())
    }

    #[test]
    fn gelu_in_f32_is_near_that_in_f64() {
        for i in -1000..=1000 {
            let x = i as f32 / 100.;
            let ((value, slope), (want, want_slope)) = (x.gelu(), f64::from(x).gelu());
            assert!((f64::from(value) - want).abs() < 4e-7 * want.abs().max(1.), "{x}: {value}");
            assert!((f64::from(slope) - want_slope).abs() < 4e-7, "{x}: {slope}, {want_slope}");
        }
        // Φ(1) = .8413447461, φ(1) = .2419707245.
        let (value, slope) = 1f64.gelu();
        assert!((value - 0.8413447461).abs() < 1e-10 && (slope - 1.0833154706).abs() < 1e-10);
    }

    #[test]
    fn exponentials_are_near_those_of_the_standard_library() {
        for i in 0..9000 {
            let x = -(i as f32) / 100.;
            let (got, want) = (f64::from(exponential(x)), f64::from(x).exp());
            let bound = (2. - f64::from(x)) * 1e-7;
            assert!((got - want).abs() <= bound * want + 2e-38, "{x}: {got}, {want}");
        }
        assert_eq!(exponential(0.), 1.);
    }
}
