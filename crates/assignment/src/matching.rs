//! Compares two groupings of the same points: counts shared points, and matches clusters one to one.

use anyhow::{Result, ensure};
use pathfinding::matrix::Matrix;
use pathfinding::prelude::kuhn_munkres;

/// The number of points that each pair of clusters of two groupings shares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contingency {
    /// Clusters of the first grouping.
    pub rows: usize,
    /// Clusters of the second grouping.
    pub columns: usize,
    /// `(rows, columns)`, row-major.
    pub counts: Vec<u32>,
}

impl Contingency {
    /// Points in cluster `row` of the first grouping and `column` of the second.
    pub fn at(&self, row: usize, column: usize) -> u32 {
        self.counts[row * self.columns + column]
    }

    /// Sizes of the first grouping's clusters.
    pub fn row_sums(&self) -> Vec<u64> {
        self.counts
            .chunks(self.columns)
            .map(|row| row.iter().map(|&n| u64::from(n)).sum())
            .collect()
    }

    /// Sizes of the second grouping's clusters.
    pub fn column_sums(&self) -> Vec<u64> {
        let mut sums = vec![0; self.columns];
        for row in self.counts.chunks(self.columns) {
            sums.iter_mut().zip(row).for_each(|(sum, &n)| *sum += u64::from(n));
        }
        sums
    }

    /// Returns the one-to-one map from rows to columns that covers the most points (Hungarian
    /// algorithm).
    ///
    /// If there are more rows than columns, the surplus rows are `None`.
    pub fn best_map(&self) -> Vec<Option<u32>> {
        let width = self.columns.max(self.rows);
        let weights = Matrix::from_fn(self.rows, width, |(row, column)| {
            if column < self.columns { i64::from(self.at(row, column)) } else { 0 }
        });
        let (_, columns) = kuhn_munkres(&weights);
        columns.into_iter().map(|c| (c < self.columns).then_some(c as u32)).collect()
    }
}

/// Counts the points that each pair of clusters of `first` and `second` `(N,)` shares.
///
/// `rows` and `columns` are the numbers of clusters; clusters may be empty.
///
/// # Errors
///
/// The lengths differ, or a cluster is out of range; the message names the point.
pub fn contingency(
    first: &[u32],
    second: &[u32],
    rows: usize,
    columns: usize,
) -> Result<Contingency> {
    ensure!(
        first.len() == second.len(),
        "contingency: one grouping has {} points and the other {}; both must be of the same images",
        first.len(),
        second.len()
    );
    ensure!(
        rows > 0 && columns > 0,
        "contingency: {rows} × {columns} clusters; each grouping needs at least one"
    );
    ensure!(
        u32::try_from(first.len()).is_ok(),
        "contingency: {} points; at most 2³² − 1 can be counted",
        first.len()
    );
    for (grouping, clusters) in [(first, rows), (second, columns)] {
        // The maximum is one fast pass; only an error needs the second one.
        if grouping.iter().max().is_some_and(|&largest| largest as usize >= clusters) {
            let i = grouping.iter().position(|&k| k as usize >= clusters).unwrap_or(0);
            anyhow::bail!(
                "contingency: point {i} is in cluster {}, but there are {clusters} and they count from 0",
                grouping[i]
            );
        }
    }
    let mut counts = vec![0u32; rows * columns];
    for (&row, &column) in first.iter().zip(second) {
        counts[row as usize * columns + column as usize] += 1;
    }
    Ok(Contingency { rows, columns, counts })
}

/// Returns the map from the clusters of `new` to those of `old`: `map[new cluster] = old cluster`.
///
/// It is the permutation of `0..k` under which the two groupings `(N,)` agree on the most points
/// (Hungarian algorithm).
///
/// # Errors
///
/// The lengths differ, or an index is not below `k`.
pub fn optimal_map(new: &[u32], old: &[u32], k: usize) -> Result<Vec<u32>> {
    let map = contingency(new, old, k, k)?.best_map();
    Ok(map.into_iter().map(|old| old.expect("a square table has a complete map")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relabelling_finds_the_permutation() -> Result<()> {
        let old = [0, 0, 0, 1, 1, 1, 2, 2, 2];
        let new = [2, 2, 1, 0, 0, 0, 1, 1, 1];
        let map = optimal_map(&new, &old, 3)?;
        assert_eq!(map, [1, 2, 0]);
        let kept = new.iter().zip(&old).filter(|&(&new, &old)| map[new as usize] == old).count();
        assert_eq!(kept, 8); // Stability 8/9.
        Ok(())
    }

    #[test]
    fn the_best_map_is_not_the_greedy_one() {
        let table = Contingency { rows: 2, columns: 2, counts: vec![5, 4, 4, 0] };
        assert_eq!(table.best_map(), [Some(1), Some(0)]);
    }

    #[test]
    fn unequal_counts_leave_some_unmatched() {
        let tall = Contingency { rows: 3, columns: 2, counts: vec![1, 9, 5, 2, 0, 8] };
        assert_eq!(tall.best_map(), [Some(1), Some(0), None]);
        let wide = Contingency { rows: 2, columns: 3, counts: vec![1, 5, 0, 9, 2, 8] };
        assert_eq!(wide.best_map(), [Some(1), Some(0)]);
        assert_eq!(wide.row_sums(), [6, 19]);
        assert_eq!(wide.column_sums(), [10, 7, 8]);
    }

    #[test]
    fn bad_groupings_are_refused() {
        let error = contingency(&[0, 3], &[0, 0], 3, 1).expect_err("outside").to_string();
        assert!(error.contains("point 1") && error.contains('3'), "{error}");
        assert!(contingency(&[0], &[0, 0], 1, 1).is_err());
        assert!(contingency(&[], &[], 0, 1).is_err());
        assert_eq!(contingency(&[], &[], 1, 2).expect("empty").counts, [0, 0]);
    }
}
