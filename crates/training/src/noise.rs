//! Gaussian noise.

use candle_core::{Device, Result, Tensor};
use rand_distr::{Distribution, StandardNormal};

/// `σ ε` with `ε ~ N(0, I)` of this shape; `None` if σ is 0, so that nothing enters the graph.
///
/// - `deviation`: σ.
/// - `counters`: such as step and direction. Equal counters give equal noise.
pub fn noise(
    deviation: f64,
    shape: (usize, usize),
    seed: u64,
    counters: &[u64],
    device: &Device,
) -> Result<Option<Tensor>> {
    if deviation == 0. {
        return Ok(None);
    }
    let mut random = stage::random::stream(seed, "noise", counters);
    let values: Vec<f32> = StandardNormal
        .sample_iter(&mut random)
        .take(shape.0 * shape.1)
        .map(|value: f64| (deviation * value) as f32)
        .collect();
    Tensor::from_vec(values, shape, device).map(Some)
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    #[test]
    fn noise_has_the_deviation_asked_for_and_none_is_none() -> Result<()> {
        assert!(noise(0., (2, 3), 1, &[1], &Cpu)?.is_none());
        let draw = |counters: &[u64]| -> Result<Vec<f32>> {
            noise(0.2, (100, 50), 1, counters, &Cpu)?.expect("noise").flatten_all()?.to_vec1()
        };
        let values = draw(&[4, 1])?;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 5000.;
        assert!((variance.sqrt() / 0.2 - 1.).abs() < 0.03, "{variance}");
        assert_eq!(values, draw(&[4, 1])?);
        assert_ne!(values, draw(&[4, 0])?);
        Ok(())
    }
}
