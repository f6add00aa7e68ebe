//! Random samples without repetition.

use std::collections::BTreeSet;

use rand::{Rng, RngExt};

/// Draws `count` different numbers below `n`, in ascending order; all of them if `n <= count`.
///
/// Floyd's algorithm (Bentley and Floyd 1987): all subsets are equally likely, and the time depends
/// on `count` only.
pub fn sample(n: usize, count: usize, random: &mut impl Rng) -> Vec<usize> {
    if count >= n {
        return (0..n).collect();
    }
    let mut drawn = BTreeSet::new();
    for last in n - count..n {
        let i = random.random_range(0..=last as u64) as usize;
        if !drawn.insert(i) {
            drawn.insert(last);
        }
    }
    drawn.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_ascending_without_repetition_and_fair() {
        let mut random = stage::random::stream(1, "test", &[]);
        let mut times = [0; 10];
        for _ in 0..2000 {
            let drawn = sample(10, 3, &mut random);
            assert!(drawn.len() == 3 && drawn.windows(2).all(|pair| pair[0] < pair[1]));
            drawn.iter().for_each(|&i| times[i] += 1);
        }
        // 600 times each; the standard deviation is 20.
        assert!(times.iter().all(|n| (500..700).contains(n)), "{times:?}");
        assert_eq!(sample(3, 5, &mut random), [0, 1, 2]);
        assert!(sample(3, 0, &mut random).is_empty());
    }
}
