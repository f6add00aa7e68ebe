//! The exponential function and activations.
//!
//! Plain arithmetic without library calls, so that the compiler vectorises loops over these functions.

/// A form of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `x Φ(x)`, with the distribution function of the normal distribution.
    Erf,
    /// `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2`.
    Tanh,
    /// `x σ(1.702 x)`.
    Quick,
}

/// How `a · b + c` is computed. Which one is faster depends on the instructions of a variant.
pub(super) trait MultiplyAdd {
    fn multiply_add(a: f32, b: f32, c: f32) -> f32;
}

/// Rounded once, by an instruction for it. Without one it would be a call.
pub(super) struct Fused;

/// Rounded twice.
pub(super) struct Separate;

impl MultiplyAdd for Fused {
    #[inline(always)]
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl MultiplyAdd for Separate {
    #[inline(always)]
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Evaluates an expression in which a type name stands for the [`MultiplyAdd`] of a variant.
macro_rules! by_multiply_add {
    ($variant:expr, $name:ident => $body:expr) => {
        match $variant == $crate::Variant::PORTABLE {
            true => {
                type $name = $crate::transformer::activation::Separate;
                $body
            }
            false => {
                type $name = $crate::transformer::activation::Fused;
                $body
            }
        }
    };
}
pub(super) use by_multiply_add;

/// `eˣ`, within 2e-7 of its value for `x` in [−87, 88]; outside, the value at the nearer end. NaN stays NaN.
///
/// `x = n ln 2 + r` with `|r| ≤ ln 2 / 2`; the polynomial for `eʳ` and the two parts of `ln 2` are those of
/// Cephes' `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    exp_by::<Separate>(x)
}

/// [`exp`] by one of the two forms of `a · b + c`.
#[inline(always)]
pub(super) fn exp_by<M: MultiplyAdd>(x: f32) -> f32 {
    /// Adding it to a small number rounds that number to an integer, which is then in the lowest bits.
    const SHIFT: f32 = 12_582_912.;
    // Not `clamp`: its vector form is slower.
    let x = if x < -87. { -87. } else { x };
    let x = if x > 88. { 88. } else { x };
    let shifted = M::multiply_add(x, std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = M::multiply_add(n, 2.121_944_4e-4, M::multiply_add(n, -0.693_359_4, x));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = M::multiply_add(p, r, c);
    }
    let power = shifted.to_bits().wrapping_sub(SHIFT.to_bits()).wrapping_add(127) << 23;
    (M::multiply_add(p * r, r, r) + 1.) * f32::from_bits(power)
}

/// `σ(x) = 1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(super) fn sigmoid<M: MultiplyAdd>(x: f32) -> f32 {
    1. / (1. + exp_by::<M>(-x))
}

/// `x Φ(x)`, within 4e-7.
///
/// `Φ(−|x|) = e^(−x²/2) t (a₁ + a₂ t + … + a₅ t⁴) / 2` with `t = 1 / (1 + p |x| / √2)`: Abramowitz and
/// Stegun, formula 7.1.26.
#[inline(always)]
pub(super) fn gelu_erf<M: MultiplyAdd>(x: f32) -> f32 {
    let size = x.abs();
    let t = 1. / M::multiply_add(0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2, size, 1.);
    let mut sum = 1.061_405_4;
    for a in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        sum = M::multiply_add(sum, t, a);
    }
    let tail = 0.5 * sum * t * exp_by::<M>(-0.5 * x * x);
    M::multiply_add(-size, tail, if x > 0. { x } else { 0. })
}

/// `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 = x σ(√(8/π) (x + 0.044715 x³))`.
#[inline(always)]
pub(super) fn gelu_tanh<M: MultiplyAdd>(x: f32) -> f32 {
    x * sigmoid::<M>(1.595_769_2 * M::multiply_add(0.044_715 * x * x, x, x))
}

/// `x σ(1.702 x)`.
#[inline(always)]
pub(super) fn gelu_quick<M: MultiplyAdd>(x: f32) -> f32 {
    x * sigmoid::<M>(1.702 * x)
}

/// `x σ(x)`.
#[inline(always)]
pub(super) fn silu<M: MultiplyAdd>(x: f32) -> f32 {
    x * sigmoid::<M>(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(from: f32, to: f32) -> impl Iterator<Item = f32> {
        (0..=100_000).map(move |i| from + (to - from) * i as f32 / 100_000.)
    }

    #[test]
    fn exp_is_within_its_bound_and_keeps_nan() {
        check_exp(exp);
        check_exp(exp_by::<Fused>);
    }

    fn check_exp(exp: fn(f32) -> f32) {
        for x in grid(-87., 88.) {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.).abs() < 2e-7, "{x}: {got}, {want}");
        }
        assert_eq!(exp(0.), 1.);
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(-1e30) > 0.);
        assert!(exp(f32::INFINITY) > 1e38 && exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    /// Pretrained networks, case T12: the three forms at ±1 (the whole range is below), and silu by hand: σ(1) = 0.731058579.
    #[test]
    fn activations_have_the_published_values() {
        check_published_values::<Separate>();
        check_published_values::<Fused>();
    }

    fn check_published_values<M: MultiplyAdd>() {
        let cases = [
            (gelu_erf::<M> as fn(f32) -> f32, 0.841_344_746, -0.158_655_254),
            (gelu_tanh::<M>, 0.841_191_991, -0.158_808_009),
            (gelu_quick::<M>, 0.845_795_766, -0.154_204_234),
            (silu::<M>, 0.731_058_579, -0.268_941_421),
        ];
        for (f, one, minus_one) in cases {
            assert!((f64::from(f(1.)) - one).abs() < 2e-7, "{}", f(1.));
            assert!((f64::from(f(-1.)) - minus_one).abs() < 2e-7, "{}", f(-1.));
            assert_eq!((f(0.), f(100.), f(-100.).abs() < 1e-30), (0., 100., true));
            assert!(f(f32::NAN).is_nan());
        }
    }

    #[test]
    fn gelu_by_tanh_erf_and_quick_match_f64() {
        check_gelu::<Separate>();
        check_gelu::<Fused>();
    }

    fn check_gelu<M: MultiplyAdd>() {
        for x in grid(-9., 9.) {
            let y = f64::from(x);
            let inner = (2. / std::f64::consts::PI).sqrt() * (y + 0.044715 * y * y * y);
            let tanh = 0.5 * y * (1. + inner.tanh());
            assert!((f64::from(gelu_tanh::<M>(x)) - tanh).abs() < 1e-6, "{x}");
            let erf = y * normal(y);
            let got = gelu_erf::<M>(x);
            assert!((f64::from(got) - erf).abs() < 1e-6, "{x}: {got}, {erf}");
            let quick = y / (1. + (-1.702 * y).exp());
            assert!((f64::from(gelu_quick::<M>(x)) - quick).abs() < 1e-6, "{x}");
        }
    }

    /// `Φ(x)` by its power series, and by its continued fraction far from 0.
    fn normal(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / (2. * std::f64::consts::PI).sqrt();
        if x.abs() < 4. {
            let (mut term, mut sum) = (x, x);
            for n in 1..100 {
                term *= x * x / f64::from(2 * n + 1);
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let fraction = (1..60).rev().fold(x.abs(), |f, n| x.abs() + f64::from(n) / f);
        let tail = density / fraction;
        if x > 0. { 1. - tail } else { tail }
    }
}
