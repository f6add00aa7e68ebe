//! The operations that losses may use.
//!
//! Elementwise arithmetic, `exp`, `log`, `sqr`, sums and means of candle are sound, and so are
//! candle-nn's `softmax`, `log_softmax` and `cross_entropy`; its custom operations, such as
//! `softmax_last_dim`, have no gradient. The functions here replace unsound ones: the gradient of
//! `sqrt` at a zero row is NaN, each of several equal maxima gets the whole gradient, and `relu` has
//! slope 1 at 0. All of these are tested against finite differences, and to give the same bits for
//! any number of threads.

use candle_core::{D, Result, Tensor};

/// Scales rows to unit length: `x / sqrt(max(Σ x², 10⁻²⁴))`, along the last axis.
///
/// A zero row stays zero, with a finite gradient.
///
/// # Errors
///
/// `x` is a scalar, or of integers.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(1e-24)?.sqrt()?;
    x.broadcast_div(&length)
}

/// Mean length of rows, a scalar without gradient, for a log: noise of a fixed deviation has no
/// effect on long projections.
///
/// # Errors
///
/// `rows` is not a matrix of floats.
pub fn mean_length(rows: &Tensor) -> Result<Tensor> {
    rows.detach().sqr()?.sum(1)?.sqrt()?.mean_all()
}

/// The sum of tensors of one shape, added in their order.
///
/// # Errors
///
/// There is no tensor, or the shapes differ.
pub fn sum(terms: impl IntoIterator<Item = Tensor>) -> Result<Tensor> {
    let mut terms = terms.into_iter();
    let Some(first) = terms.next() else { candle_core::bail!("sum: no terms") };
    terms.try_fold(first, |sum, term| sum + term)
}

/// The entry `index[n]` of each row `n`: `(N, K)` and `(N,)` u32 to `(N,)`.
///
/// # Errors
///
/// `x` is not a matrix, `index` has another length, or an index is out of range.
pub fn pick(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let (n, _) = x.dims2()?;
    if index.dims() != [n] {
        candle_core::bail!("pick: {n} rows but indices of shape {:?}", index.dims())
    }
    x.gather(&index.unsqueeze(1)?, 1)?.squeeze(1)
}

/// `max(x, 0)` with slope 0 at 0, as in every other framework.
///
/// # Errors
///
/// `x` is of integers.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    x.mul(&x.detach().gt(0f64)?.to_dtype(x.dtype())?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device::Cpu, Var};
    use candle_nn::loss::cross_entropy;
    use candle_nn::ops::{log_softmax, softmax};

    use super::*;

    #[test]
    fn mean_length_is_over_the_rows() -> Result<()> {
        let rows = Tensor::new(&[[3f32, -4.], [0., 1.], [0., 0.]], &Cpu)?;
        assert_eq!(mean_length(&rows)?.to_scalar::<f32>()?, 2.);
        Ok(())
    }

    /// Compares candle's gradient of `Σ w ∘ f(x)` with central differences, for fixed uneven `w`.
    fn check_gradient(f: impl Fn(&Tensor) -> Result<Tensor>, at: &[[f64; 3]; 2]) -> Result<()> {
        let value = |x: &Tensor| -> Result<Tensor> {
            let y = f(x)?;
            let count = y.elem_count();
            let weights: Vec<f64> = (0..count).map(|i| 0.3 + 0.7 * (i * i) as f64).collect();
            (y.clone() * Tensor::from_vec(weights, y.shape(), &Cpu)?)?.sum_all()
        };
        let x = Var::new(at, &Cpu)?;
        let gradients = value(&x)?.backward()?;
        let analytic = gradients.get(&x).expect("a gradient").to_vec2::<f64>()?;
        let h = 1e-6;
        for i in 0..2 {
            for j in 0..3 {
                let (mut up, mut down) = (*at, *at);
                up[i][j] += h;
                down[i][j] -= h;
                let up = value(&Tensor::new(&up, &Cpu)?)?.to_scalar::<f64>()?;
                let down = value(&Tensor::new(&down, &Cpu)?)?.to_scalar::<f64>()?;
                let (got, want) = (analytic[i][j], (up - down) / (2. * h));
                assert!((got - want).abs() < 1e-7, "d/dx[{i}][{j}]: got {got}, want {want}");
            }
        }
        Ok(())
    }

    const AT: [[f64; 3]; 2] = [[0.3, -1.2, 0.7], [2.0, 0.1, -0.4]];
    const TIES: [[f64; 3]; 2] = [[0.5, 0.5, 0.5], [2.0, 2.0, -0.4]];

    #[test]
    fn gradients_match_central_differences() -> Result<()> {
        for at in [&AT, &TIES] {
            check_gradient(unit_rows, at)?;
            check_gradient(|x| x.log_sum_exp(1), at)?;
            check_gradient(|x| log_softmax(x, 1), at)?;
            check_gradient(|x| softmax(x, 1), at)?;
            check_gradient(|x| cross_entropy(x, &Tensor::new(&[2u32, 1], &Cpu)?), at)?;
            check_gradient(relu, at)?;
            check_gradient(|x| pick(x, &Tensor::new(&[2u32, 1], &Cpu)?), at)?;
        }
        Ok(())
    }

    #[test]
    fn values_match_hand_computation() -> Result<()> {
        let x = Tensor::new(&[[3f64, 4.], [0., 0.]], &Cpu)?;
        assert_eq!(unit_rows(&x)?.to_vec2::<f64>()?, [[0.6, 0.8], [0., 0.]]);
        // ln(e³ + e⁴) = 4 + ln(1 + 1/e).
        let sums = x.log_sum_exp(1)?.to_vec1::<f64>()?;
        assert!((sums[0] - 4.313261687518223).abs() < 1e-12, "{sums:?}");
        assert!((sums[1] - 2f64.ln()).abs() < 1e-12, "{sums:?}");
        let logs = log_softmax(&x, 1)?.to_vec2::<f64>()?;
        assert!((logs[0][0] + 1.313261687518223).abs() < 1e-12, "{logs:?}");
        assert!((softmax(&x, 1)?.to_vec2::<f64>()?[1][1] - 0.5).abs() < 1e-12);
        assert_eq!(pick(&x, &Tensor::new(&[1u32, 0], &Cpu)?)?.to_vec1::<f64>()?, [4., 0.]);
        assert!(pick(&x, &Tensor::new(&[1u32], &Cpu)?).is_err());
        let rows = [x.get(0)?, x.get(1)?, x.get(0)?];
        assert_eq!(sum(rows)?.to_vec1::<f64>()?, [6., 8.]);
        assert!(sum([]).is_err());
        let signs = Tensor::new(&[-1f64, 0., 2.], &Cpu)?;
        assert_eq!(relu(&signs)?.to_vec1::<f64>()?, [0., 0., 2.]);
        Ok(())
    }

    #[test]
    fn extreme_values_stay_finite() -> Result<()> {
        let large = Tensor::new(&[[1e4f32, -1e4, 0.]], &Cpu)?;
        assert_eq!(large.log_sum_exp(1)?.to_vec1::<f32>()?, [1e4]);
        for f in [unit_rows, relu] {
            let zero = Var::zeros((2, 3), DType::F32, &Cpu)?;
            let gradients = f(&zero)?.sum_all()?.backward()?;
            let gradient = gradients.get(&zero).expect("a gradient").flatten_all()?;
            assert!(gradient.to_vec1::<f32>()?.iter().all(|g| g.is_finite()));
        }
        let zero = Var::zeros(3, DType::F64, &Cpu)?;
        let gradients = relu(&zero)?.sum_all()?.backward()?;
        assert_eq!(gradients.get(&zero).expect("a gradient").to_vec1::<f64>()?, [0.; 3]);
        Ok(())
    }

    /// A head's loss and every gradient of it, as one number that differs when any bit does.
    fn bits_of_a_head() -> Result<u64> {
        let values = |shape: (usize, usize), salt: usize| -> Result<Var> {
            let count = shape.0 * shape.1;
            let values: Vec<f32> = (0..count)
                .map(|i| ((i * 7919 + salt * 104_729) % 1009) as f32 / 1009. - 0.5)
                .collect();
            Var::from_tensor(&Tensor::from_vec(values, shape, &Cpu)?)
        };
        let mut bits = 0u64;
        for (n, d, hidden, k) in [(512, 512, 512, 10), (509, 128, 128, 15), (37, 128, 128, 20)] {
            let variables = [
                values((n, d), 1)?,
                values((d, hidden), 2)?,
                values((1, hidden), 3)?,
                values((hidden, k), 4)?,
            ];
            let [x, first, bias, second] = &variables;
            let inner = relu(&unit_rows(x)?.matmul(first)?.broadcast_add(bias)?)?;
            let logits = inner.matmul(second)?;
            let index = Tensor::from_iter((0..n as u32).map(|i| i % k as u32), &Cpu)?;
            let entropy = softmax(&logits, 1)?.mean(0)?;
            let entropy = (&entropy * entropy.log()?)?.sum_all()?;
            let loss = (pick(&log_softmax(&logits, 1)?, &index)?.mean_all()? + entropy)?;
            let gradients = loss.backward()?;
            let mut all = loss.flatten_all()?.to_vec1::<f32>()?;
            for variable in &variables {
                let gradient = gradients.get(variable).expect("a gradient");
                all.extend(gradient.flatten_all()?.to_vec1::<f32>()?);
            }
            for value in all {
                bits = bits.rotate_left(5).wrapping_mul(0x9E37_79B9_7F4A_7C15)
                    ^ u64::from(value.to_bits());
            }
        }
        Ok(bits)
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
        const ASKED: &str = "TRAINING_TEST_PRINTS_BITS";
        let name = "ops::tests::any_number_of_threads_gives_the_same_bits";
        if std::env::var_os(ASKED).is_some() {
            println!("bits {:016x}", bits_of_a_head()?);
            return Ok(());
        }
        // candle reads its number of threads once a process, so that each needs its own.
        let run = |threads: &str| -> String {
            let output = std::process::Command::new(std::env::current_exe().expect("this test"))
                .args([name, "--exact", "--nocapture"])
                .env(ASKED, "1")
                .env("RAYON_NUM_THREADS", threads)
                .output()
                .expect("the test runs itself");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let start = text.find("bits ").expect("bits are printed");
            text[start..start + 21].to_owned()
        };
        let one = run("1");
        for threads in ["2", "3", "8"] {
            assert_eq!(run(threads), one, "{threads} threads");
        }
        Ok(())
    }
}
