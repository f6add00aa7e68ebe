//! Minimal filtering F(m, 3): `m` outputs of a filter with 3 taps from `m + 2` products.
//!
//! `y = Aᵀ [(G g) ⊙ (Bᵀ d)]` for the inputs `d`, the taps `g` and the outputs `y_i = Σ_k d_{i+k} g_k` (Winograd 1980; Lavin
//! and Gray 2015, arXiv:1509.09308). The matrices come from polynomials that are evaluated at `m + 1` points and at infinity,
//! multiplied there, and interpolated (Toom and Cook): column `j` of `Aᵀ` holds the powers of point `p_j`, row `j` of
//! `G` its powers over `Π_{k≠j} (p_j − p_k)`, row `j` of `Bᵀ` the coefficients of `Π_{k≠j} (x − p_k)`; a row of
//! both may change its sign.

/// The transforms of F(M, 3) for one line, where N = M + 2. In two dimensions each is done along columns and then along
/// rows, which makes F(M × M, 3 × 3).
pub(super) trait Filter<const N: usize, const M: usize>: 'static {
    /// `Bᵀ d`.
    fn input(d: [f32; N]) -> [f32; N];

    /// `G g`.
    fn taps(g: [f32; 3]) -> [f32; N];

    /// `Aᵀ m`.
    fn output(m: [f32; N]) -> [f32; M];

    /// `A y`: the transpose of [`Filter::output`], for gradients.
    fn output_gradient(y: [f32; M]) -> [f32; N];

    /// `Gᵀ m`: the transpose of [`Filter::taps`], for gradients.
    fn taps_gradient(m: [f32; N]) -> [f32; 3];
}

/// F(2, 3) at the points 0, 1, −1:
///
/// ```text
///      1  0 −1  0         1    0    0
/// Bᵀ = 0  1  1  0    G =  ½    ½    ½    Aᵀ = 1  1  1  0
///      0 −1  1  0         ½   −½    ½         0  1 −1 −1
///      0  1  0 −1         0    0    1
/// ```
pub(super) struct Two;

impl Filter<4, 2> for Two {
    #[inline(always)]
    fn input([a, b, c, d]: [f32; 4]) -> [f32; 4] {
        [a - c, b + c, c - b, b - d]
    }

    #[inline(always)]
    fn taps([a, b, c]: [f32; 3]) -> [f32; 4] {
        [a, 0.5 * (a + b + c), 0.5 * (a - b + c), c]
    }

    #[inline(always)]
    fn output([a, b, c, d]: [f32; 4]) -> [f32; 2] {
        [a + b + c, b - c - d]
    }

    #[inline(always)]
    fn output_gradient([a, b]: [f32; 2]) -> [f32; 4] {
        [a, a + b, a - b, -b]
    }

    #[inline(always)]
    fn taps_gradient([a, b, c, d]: [f32; 4]) -> [f32; 3] {
        [a + 0.5 * (b + c), 0.5 * (b - c), 0.5 * (b + c) + d]
    }
}

/// F(4, 3) at the points 0, ±√2, ±√½. With ±1, ±2, the usual ones, the error is twice as large. With `r = √2`, `s = √½`:
///
/// ```text
///      1  0 −5/2  0    1    0         1     0     0
///      0 −s −½    r    1    0         1/6   r/6   1/3         1  1    1   1    1   0
/// Bᵀ = 0  s −½   −r    1    0    G =  1/6  −r/6   1/3    Aᵀ = 0  r   −r   s   −s   0
///      0 −r −2    s    1    0        −2/3  −r/3  −1/3         0  2    2   ½    ½   0
///      0  r −2   −s    1    0        −2/3   r/3  −1/3         0  2r  −2r  s/2 −s/2 1
///      0  1  0   −5/2  0    1         0     0     1
/// ```
pub(super) struct Four;

const R: f32 = std::f32::consts::SQRT_2;
const S: f32 = std::f32::consts::FRAC_1_SQRT_2;

impl Filter<6, 4> for Four {
    #[inline(always)]
    fn input([a, b, c, d, e, f]: [f32; 6]) -> [f32; 6] {
        let (near, far) = (R * d - S * b, S * d - R * b);
        let (halves, twos) = (e - 0.5 * c, e - 2. * c);
        [a - 2.5 * c + e, halves + near, halves - near, twos + far, twos - far, b - 2.5 * d + f]
    }

    #[inline(always)]
    fn taps([a, b, c]: [f32; 3]) -> [f32; 6] {
        let (near, far) = ((a + 2. * c) / 6., -(2. * a + c) / 3.);
        let (b_near, b_far) = (R / 6. * b, R / 3. * b);
        [a, near + b_near, near - b_near, far - b_far, far + b_far, c]
    }

    #[inline(always)]
    fn output([a, b, c, d, e, f]: [f32; 6]) -> [f32; 4] {
        let (sum, difference) = (b + c, R * (b - c));
        let (small_sum, small_difference) = (d + e, S * (d - e));
        [
            a + sum + small_sum,
            difference + small_difference,
            2. * sum + 0.5 * small_sum,
            2. * difference + 0.5 * small_difference + f,
        ]
    }

    #[inline(always)]
    fn output_gradient([a, b, c, d]: [f32; 4]) -> [f32; 6] {
        let (even, odd) = (a + 2. * c, R * (b + 2. * d));
        let (small_even, small_odd) = (a + 0.5 * c, S * (b + 0.5 * d));
        [a, even + odd, even - odd, small_even + small_odd, small_even - small_odd, d]
    }

    #[inline(always)]
    fn taps_gradient([a, b, c, d, e, f]: [f32; 6]) -> [f32; 3] {
        let (sum, difference) = (b + c, b - c);
        let (small_sum, small_difference) = (d + e, d - e);
        [
            a + sum / 6. - small_sum * (2. / 3.),
            R / 6. * difference - R / 3. * small_difference,
            (sum - small_sum) / 3. + f,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Outputs are the plain sums, and the transforms for gradients are the transposes.
    fn is_a_filter<F: Filter<N, M>, const N: usize, const M: usize>() {
        let d: [f32; N] = std::array::from_fn(|i| (i * i % 7) as f32 - 2.5);
        let g = [0.75f32, -1.5, 0.625];
        let (transformed, taps) = (F::input(d), F::taps(g));
        let y = F::output(std::array::from_fn(|i| transformed[i] * taps[i]));
        for (i, y) in y.iter().enumerate() {
            let want = dot(&d[i..i + 3], &g);
            assert!((y - want).abs() < 1e-5, "output {i}: {y}, want {want}");
        }
        let other: [f32; M] = std::array::from_fn(|i| 1.25 - i as f32);
        let (a, b) = (dot(&F::output(d), &other), dot(&d, &F::output_gradient(other)));
        assert!((a - b).abs() < 1e-4, "{a}, {b}");
        let (a, b) = (dot(&F::taps(g), &d), dot(&g, &F::taps_gradient(d)));
        assert!((a - b).abs() < 1e-5, "{a}, {b}");
    }

    #[test]
    fn both_filters_are_the_plain_sum() {
        is_a_filter::<Two, 4, 2>();
        is_a_filter::<Four, 6, 4>();
    }
}
