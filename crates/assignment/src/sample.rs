//! Some of many, each set of them as likely as another.

use std::collections::BTreeSet;

use rand::{Rng, RngExt};

/// `count` of the numbers below `n`, ascending, without repetition; all if there are no more.
///
/// Floyd's algorithm (Bentley and Floyd 1987): every subset is as likely as another, and the time
/// grows with `count` alone.
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
