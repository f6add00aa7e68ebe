//! How even the clusters are.

use anyhow::{Result, ensure};

/// The sizes of the smallest and the largest cluster, divided by the even size `N/K`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    /// In `[0, 1]`: 0 for an empty cluster, 1 for clusters of one size.
    pub smallest: f64,
    /// In `[1, K]`: 1 for clusters of one size, `K` for a single cluster that holds all points.
    pub largest: f64,
}

/// Returns how far the smallest and the largest of `clusters` clusters are from the even size.
///
/// - `assignment`: cluster of each point, `(N,)`. Without points both shares are 0.
///
/// # Errors
///
/// A point lies in a cluster that is not below `clusters`; the message names the point.
pub fn shares(assignment: &[u32], clusters: usize) -> Result<Shares> {
    ensure!(clusters > 0, "shares: clusters is 0; at least one is needed");
    let mut sizes = vec![0usize; clusters];
    for (i, &cluster) in assignment.iter().enumerate() {
        ensure!(
            (cluster as usize) < clusters,
            "shares: point {i} is in cluster {cluster}, but there are {clusters} and they count \
             from 0"
        );
        sizes[cluster as usize] += 1;
    }
    let n = assignment.len().max(1) as f64;
    let share = |size: Option<usize>| size.unwrap_or(0) as f64 * clusters as f64 / n;
    Ok(Shares {
        smallest: share(sizes.iter().copied().min()),
        largest: share(sizes.iter().copied().max()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_relative_to_the_even_size() -> Result<()> {
        // Even clusters have 2 of 6 points.
        assert_eq!(shares(&[0, 0, 0, 1, 1, 2], 3)?, Shares { smallest: 0.5, largest: 1.5 });
        assert_eq!(shares(&[0, 0, 1, 1], 3)?, Shares { smallest: 0., largest: 1.5 });
        assert_eq!(shares(&[1, 1], 2)?, Shares { smallest: 0., largest: 2. });
        assert_eq!(shares(&[], 2)?, Shares { smallest: 0., largest: 0. });
        Ok(())
    }

    #[test]
    fn a_cluster_that_does_not_exist_is_refused() {
        let error = shares(&[0, 2], 2).expect_err("there are two clusters").to_string();
        assert!(error.contains("point 1 is in cluster 2"), "{error}");
        assert!(shares(&[], 0).is_err());
    }
}
