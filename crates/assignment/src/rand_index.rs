//! Whether two groupings of the same points agree, pair by pair.

use crate::matching::Contingency;

/// ARI: the share of pairs on which both sides agree, adjusted for chance.
///
/// `2 (p q − r s) / ((p + r)(r + q) + (p + s)(s + q))`, where `p` pairs are together on both sides,
/// `q` on neither, `r` and `s` on one: Hubert and Arabie 1985. In `[−½, 1]`; about 0 for random
/// groupings, 1 for equal groupings and for no points.
pub fn adjusted_rand_index(table: &Contingency) -> f64 {
    let (a, b) = (table.row_sums(), table.column_sums());
    let square = |sizes: &[u64]| sizes.iter().map(|&x| u128::from(x) * u128::from(x)).sum::<u128>();
    let n = u128::from(a.iter().sum::<u64>());
    let both = table.counts.chunks(TOGETHER).map(sum_of_squares).sum::<u128>();
    let (rows, columns) = (square(&a), square(&b));
    // Ordered pairs, in integers: exact up to the division.
    let (together, only_rows, only_columns) = (both - n, rows - both, columns - both);
    if only_rows == 0 && only_columns == 0 {
        return 1.;
    }
    let apart = (n * n + both - rows - columns) as f64;
    let (p, r, s) = (together as f64, only_rows as f64, only_columns as f64);
    2. * (p * apart - r * s) / ((p + r) * (r + apart) + (p + s) * (s + apart))
}

/// Counts whose squares are added at once.
const TOGETHER: usize = 2048;

fn sum_of_squares(counts: &[u32]) -> u128 {
    // The sum of 2¹² squares of numbers below 2²⁶ fits into 64 bits.
    if counts.iter().all(|&x| x < 1 << 26) {
        return counts.iter().map(|&x| u64::from(x) * u64::from(x)).sum::<u64>().into();
    }
    counts.iter().map(|&x| u128::from(x) * u128::from(x)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_that_of_scikit_learn() {
        // `adjusted_rand_score` of [0, 0, 1, 1] and [0, 0, 1, 2], and of [0, 0, 1, 1] and [0, 1, 0, 1].
        let table = |rows, columns, counts| Contingency { rows, columns, counts };
        let got = adjusted_rand_index(&table(2, 3, vec![2, 0, 0, 0, 1, 1]));
        assert!((got - 4. / 7.).abs() < 1e-12, "{got}");
        let got = adjusted_rand_index(&table(2, 2, vec![1, 1, 1, 1]));
        assert!((got + 0.5).abs() < 1e-12, "{got}");
        assert_eq!(adjusted_rand_index(&table(2, 2, vec![0, 5, 7, 0])), 1.);
    }

    #[test]
    fn large_counts_are_squared_without_loss() {
        let counts = vec![u32::MAX; 5];
        assert_eq!(sum_of_squares(&counts), 5 * u128::from(u32::MAX) * u128::from(u32::MAX));
        assert_eq!(sum_of_squares(&vec![(1 << 26) - 1; 2048]), 2048 * ((1u128 << 26) - 1).pow(2));
    }
}
