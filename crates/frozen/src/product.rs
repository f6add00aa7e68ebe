//! Arithmetic of heads on flat rows: matrix products, softmax, Adam.

use std::fmt::{Debug, Display};

use anyhow::{Error, Result, ensure};
use kernels::Variant;
use kernels::matrix::{self, MatrixNumber, MatrixOrder};

/// A number type that heads are trained in: f32, and f64 in tests.
pub trait HeadFloat:
    num_traits::Float
    + num_traits::NumAssignOps
    + std::iter::Sum
    + Debug
    + Display
    + Default
    + Send
    + Sync
    + MatrixNumber
    + bytemuck::Pod
{
    /// `x Φ(x)` and its derivative `Φ(x) + x φ(x)`, where `Φ` and `φ` are distribution and density of
    /// the normal distribution: the Gaussian error linear unit (Hendrycks and Gimpel 2016).
    fn gelu(self) -> (Self, Self);

    /// `eˣ` for `x ≤ 0`.
    fn exponential(self) -> Self;

    /// The nearest number of this type.
    fn of(value: f64) -> Self;

    /// The same number in f64.
    fn wide(self) -> f64;

    /// The larger of both numbers.
    fn at_least(self, other: Self) -> Self {
        num_traits::Float::max(self, other)
    }
}

// Inlined, so that the loops over them in other crates become vector instructions.
impl HeadFloat for f32 {
    /// Within 4e-7 of the exact value for `|x|` up to 10. One exponential serves the value and the
    /// derivative; `erf` after Abramowitz and Stegun 1964, 7.1.26.
    #[inline(always)]
    fn gelu(self) -> (f32, f32) {
        let z = self.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let bell = (-z * z).exponential();
        let t = 1. / (1. + 0.327_591_1 * z);
        let tail = ((((1.061_405_4 * t - 1.453_152_1) * t + 1.421_413_8) * t - 0.284_496_72) * t
            + 0.254_829_6)
            * t
            * bell;
        let phi = if self < 0. { 0.5 * tail } else { 1. - 0.5 * tail };
        (self * phi, phi + self * bell * 0.398_942_3)
    }

    /// Within a share of 2e-7 down to −87, and about 1e-38 below.
    #[inline(always)]
    fn exponential(self) -> f32 {
        kernels::transformer::exp(self)
    }

    #[inline(always)]
    fn of(value: f64) -> f32 {
        value as f32
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl HeadFloat for f64 {
    fn gelu(self) -> (f64, f64) {
        let phi = 0.5 * libm::erfc(-self * std::f64::consts::FRAC_1_SQRT_2);
        (self * phi, phi + self * (-0.5 * self * self).exp() * 0.398_942_280_401_432_7)
    }

    fn exponential(self) -> f64 {
        self.exp()
    }

    fn of(value: f64) -> f64 {
        value
    }

    fn wide(self) -> f64 {
        self
    }
}

/// A view of a matrix of `rows × columns`; transposing it copies nothing.
#[derive(Debug, Clone, Copy)]
pub struct FlatMatrix<'a, T> {
    values: &'a [T],
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl<'a, T: HeadFloat> FlatMatrix<'a, T> {
    /// Views `values` as rows of `columns`.
    ///
    /// # Errors
    ///
    /// They do not fill rows.
    pub fn new(values: &'a [T], columns: usize) -> Result<Self> {
        let count = values.len();
        ensure!(
            columns > 0 && count.is_multiple_of(columns),
            "{count} numbers do not fill rows of {columns}"
        );
        Ok(Self { values, rows: count / columns, columns, is_transposed: false })
    }

    /// The transposed matrix.
    pub fn transposed(self) -> Self {
        let Self { rows, columns, is_transposed, .. } = self;
        Self { rows: columns, columns: rows, is_transposed: !is_transposed, ..self }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Views of `count` consecutive rows each, of fewer at the end. For a matrix that is not transposed.
    pub fn parts(self, count: usize) -> Vec<Self> {
        assert!(!self.is_transposed, "rows of a transposed matrix are not consecutive");
        let parts = self.values.chunks(count * self.columns);
        parts.map(|values| Self { values, rows: values.len() / self.columns, ..self }).collect()
    }

    /// `self · other`, row by row, see [`FlatMatrix::multiply`].
    ///
    /// # Errors
    ///
    /// As [`FlatMatrix::multiply`].
    pub fn times(self, other: FlatMatrix<T>) -> Result<Vec<T>> {
        let mut product = vec![T::zero(); self.rows * other.columns];
        self.multiply(other, &mut product)?;
        Ok(product)
    }

    /// Writes `self · other` to `product`, row by row. It runs on this thread alone, so that callers
    /// divide their work and the bits do not depend on the number of threads.
    ///
    /// # Errors
    ///
    /// The extents do not fit, or `ASSORT_KERNEL` names no kernel of this processor.
    pub fn multiply(self, other: FlatMatrix<T>, product: &mut [T]) -> Result<()> {
        let [m, k, n] = [self.rows, self.columns, other.columns];
        ensure!(
            k == other.rows && product.len() == m * n,
            "a product of {m} × {k} and {} × {n} does not fill {} numbers",
            other.rows,
            product.len()
        );
        let variant = Variant::selected().map_err(Error::msg)?;
        let (left, right) = ((self.values, self.order()), (other.values, other.order()));
        matrix::multiply(variant, left, right, product);
        Ok(())
    }

    fn order(&self) -> MatrixOrder {
        let Self { rows, columns, is_transposed, .. } = *self;
        MatrixOrder { rows, columns, is_transposed }
    }
}

/// The softmax of rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SoftmaxRows<T> {
    /// `log softmax`, `(N, K)`. Exact near memberships of 0.
    pub logs: Vec<T>,
    /// The memberships, `(N, K)`.
    pub memberships: Vec<T>,
}

impl<T: HeadFloat> SoftmaxRows<T> {
    /// `softmax(scale · logits)` of each row of `logits` `(N, K)`.
    pub fn new(logits: &[T], clusters: usize, scale: T) -> Self {
        let mut logs = Vec::with_capacity(logits.len());
        for row in logits.chunks_exact(clusters) {
            let largest = row.iter().fold(T::neg_infinity(), |largest, &x| largest.at_least(x));
            logs.extend(row.iter().map(|&x| scale * (x - largest)));
        }
        let mut memberships: Vec<T> = logs.iter().map(|&x| x.exponential()).collect();
        let rows = logs.chunks_exact_mut(clusters).zip(memberships.chunks_exact_mut(clusters));
        for (logs, memberships) in rows {
            let sum = memberships.iter().copied().sum::<T>();
            let (log, share) = (sum.ln(), T::one() / sum);
            logs.iter_mut().for_each(|x| *x -= log);
            memberships.iter_mut().for_each(|x| *x *= share);
        }
        Self { logs, memberships }
    }
}

/// `x · y`, in parts that become vector instructions.
pub fn dot<T: HeadFloat>(x: &[T], y: &[T]) -> T {
    const LANES: usize = 16;
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = xs.remainder().iter().zip(ys.remainder()).map(|(&x, &y)| x * y).sum::<T>();
    let mut sums = [T::zero(); LANES];
    for (x, y) in xs.zip(ys) {
        sums.iter_mut().zip(x).zip(y).for_each(|((sum, &x), &y)| *sum += x * y);
    }
    sums.into_iter().sum::<T>() + rest
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

    /// [`AdamStep::apply`] for each parameter of a list.
    // A call of its own tells the compiler that the lists do not overlap: it takes vector instructions.
    #[inline(never)]
    pub fn apply_all(&self, x: &mut [T], gradient: &[T], first: &mut [T], second: &mut [T]) {
        let moments = first.iter_mut().zip(second);
        for ((x, &d), (first, second)) in x.iter_mut().zip(gradient).zip(moments) {
            self.apply(x, d, first, second);
        }
    }

    /// Moves the parameter `x`, and its moments of the gradient and of its square.
    #[inline(always)]
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
        assert_eq!(a.times(b.transposed())?, [7., 5., 16., 11.]);
        assert_eq!(a.transposed().times(b)?, [1., 4., 6., 2., 5., 9., 3., 6., 12.]);
        assert_eq!(a.transposed().times(b.transposed().transposed())?, a.transposed().times(b)?);
        assert!(a.times(b).is_err() && a.multiply(b.transposed(), &mut [0.; 3]).is_err());
        assert!(FlatMatrix::new(&[1f32, 2., 3.], 2).is_err());
        let parts = b.parts(2);
        assert_eq!((parts.len(), parts[0].rows()), (1, 2));
        assert_eq!(b.parts(1)[1].times(b.transposed())?, [2., 2.]);
        Ok(())
    }

    #[test]
    fn a_long_product_is_the_sum_of_its_terms() -> Result<()> {
        let x: Vec<f64> = (0..35).map(|i| f64::from(i * 7 % 11) - 5.).collect();
        let want: f64 = x.iter().map(|x| x * x).sum();
        assert_eq!(dot(&x, &x), want);
        assert_eq!(FlatMatrix::new(&x, 35)?.times(FlatMatrix::new(&x, 1)?)?, [want]);
        Ok(())
    }

    /// Rows (0, ln 2, ln 3) and one with a membership that f32 cannot hold.
    #[test]
    fn softmax_has_the_values_of_its_formula() {
        let rows = SoftmaxRows::new(&[0f32, 2f32.ln() / 2., 3f32.ln() / 2., -200., 0., 0.], 3, 2.);
        for (got, want) in rows.memberships.iter().zip([1. / 6., 2. / 6., 0.5, 0., 0.5, 0.5]) {
            assert!((got - want).abs() < 1e-7, "{rows:?}");
        }
        assert!((rows.logs[3] + 400. + 2f32.ln()).abs() < 1e-4, "{rows:?}");
        let nan = SoftmaxRows::new(&[f32::NAN, 0.], 2, 1.);
        assert!(nan.memberships.iter().any(|x| x.is_nan()), "a divergence is not hidden: {nan:?}");
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
        for i in 0..8700 {
            let x = -(i as f32) / 100.;
            let (got, want) = (f64::from(x.exponential()), f64::from(x).exp());
            assert!((got / want - 1.).abs() <= 2e-7, "{x}: {got}, {want}");
        }
        assert_eq!(0f32.exponential(), 1.);
        assert!((-1e30f32).exponential() < 2e-38 && f32::NAN.exponential().is_nan());
    }
}
