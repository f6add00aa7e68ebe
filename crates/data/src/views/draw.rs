//! Random draws for augmentation, each from a fixed number of random bits.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// A number in `[0, 1)` with 53 random bits.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 * (1. / (1u64 << 53) as f64)
}

/// A uniform number between `low` and `high`.
pub(super) fn uniform(rng: &mut ChaCha8Rng, low: f64, high: f64) -> f64 {
    low + (high - low) * unit(rng)
}

/// True with this probability.
pub(super) fn chance(rng: &mut ChaCha8Rng, probability: f64) -> bool {
    unit(rng) < probability
}

/// A uniform whole number below `end`.
pub(super) fn below(rng: &mut ChaCha8Rng, end: usize) -> usize {
    ((unit(rng) * end as f64) as usize).min(end - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_cover_their_ranges_evenly() {
        let mut rng = stage::random::stream(1, "draw", &[]);
        let mut counts = [0; 5];
        let (mut mean, mut heads) = (0., 0);
        for _ in 0..10_000 {
            counts[below(&mut rng, 5)] += 1;
            let number = uniform(&mut rng, -1., 3.);
            assert!((-1. ..3.).contains(&number));
            mean += number / 10_000.;
            heads += usize::from(chance(&mut rng, 0.2));
        }
        // Five standard deviations: 40 for a count of 2,000, 0.0115 for the mean.
        assert!(counts.iter().all(|count| (1800..2200).contains(count)), "{counts:?}");
        assert!((mean - 1.).abs() < 0.06, "{mean}");
        assert!((1800..2200).contains(&heads), "{heads}");
        assert!(!chance(&mut rng, 0.) && chance(&mut rng, 1.));
    }
}
