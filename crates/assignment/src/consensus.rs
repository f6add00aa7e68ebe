//! One grouping out of several heads' memberships, and clusters merged by what they share.

use anyhow::{Result, ensure};
use pathfinding::matrix::Matrix;
use pathfinding::prelude::kuhn_munkres;
use rayon::prelude::*;

use crate::argmax::argmax_rows;

/// What several heads agree on.
#[derive(Debug, Clone, PartialEq)]
pub struct Consensus {
    /// Mean of the aligned memberships, `(N, K)`.
    pub memberships: Vec<f32>,
    /// Maps each cluster of each head to one of the consensus, `(H, K)`.
    pub maps: Vec<Vec<u32>>,
}

/// Averages the memberships of several heads after matching their clusters.
///
/// `R ← Q_best`; then, `rounds` times, every head is aligned to `R` by the Hungarian method on
/// `Rᵀ Q_h`, and `R ← mean_h` of the aligned heads. Baydar and Akbas 2025 (arXiv:2511.16213) say that an
/// ensemble of heads is better than its best head; these formulas are ours.
///
/// - `heads`: memberships of each head, `(H, N, K)`, each row a distribution.
/// - `best`: the head whose numbering of the clusters is kept.
/// - `rounds`: alignments, at least 1; 3 suffice in practice.
///
/// # Errors
///
/// There is no head, `best` is not one, `rounds` is 0, or the heads have different sizes.
pub fn consensus(
    heads: &[Vec<f32>],
    clusters: usize,
    best: usize,
    rounds: usize,
) -> Result<Consensus> {
    ensure!(best < heads.len(), "consensus: head {best} of {} heads", heads.len());
    ensure!(rounds > 0, "consensus: rounds is 0; at least one alignment is needed");
    let values = heads[best].len();
    if let Some(other) = heads.iter().position(|head| head.len() != values) {
        anyhow::bail!(
            "consensus: head {other} has {} memberships, but head {best} has {values}",
            heads[other].len()
        );
    }
    ensure!(
        clusters > 0 && values.is_multiple_of(clusters),
        "consensus: {values} memberships do not fill rows of {clusters}"
    );
    let mut memberships = heads[best].clone();
    let mut maps = Vec::new();
    for _ in 0..rounds {
        maps = heads.par_iter().map(|head| alignment(&memberships, head, clusters)).collect();
        memberships = mean_of_aligned(heads, &maps, clusters);
    }
    Ok(Consensus { memberships, maps })
}

/// The cluster of `reference` that each cluster of `head` is: the one-to-one map of the largest
/// `Σ_k (Rᵀ Q)[map[k], k]`.
fn alignment(reference: &[f32], head: &[f32], clusters: usize) -> Vec<u32> {
    let overlap = overlap(head, reference, clusters);
    // Whole numbers, as the method wants them: a part in 2⁴⁰ of the points.
    let unit = (1u64 << 40) as f64 / (head.len() / clusters).max(1) as f64;
    let weights = Matrix::from_fn(clusters, clusters, |(own, other)| {
        (overlap[own * clusters + other] * unit).round() as i64
    });
    kuhn_munkres(&weights).1.into_iter().map(|other| other as u32).collect()
}

/// `Qᵀ R`, `(K, K)`: the points, by membership, that each cluster of `first` shares with each of
/// `second`.
fn overlap(first: &[f32], second: &[f32], clusters: usize) -> Vec<f64> {
    /// Points of one partial sum: depends on the shape alone.
    const PART: usize = 4096;
    let parts: Vec<Vec<f64>> = (first.par_chunks(PART * clusters))
        .zip(second.par_chunks(PART * clusters))
        .map(|(first, second)| {
            let mut sums = vec![0f64; clusters * clusters];
            for (first, second) in first.chunks(clusters).zip(second.chunks(clusters)) {
                for (sums, &a) in sums.chunks_mut(clusters).zip(first) {
                    for (sum, &b) in sums.iter_mut().zip(second) {
                        *sum += f64::from(a) * f64::from(b);
                    }
                }
            }
            sums
        })
        .collect();
    let mut sums = vec![0f64; clusters * clusters];
    for part in &parts {
        sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    sums
}

fn mean_of_aligned(heads: &[Vec<f32>], maps: &[Vec<u32>], clusters: usize) -> Vec<f32> {
    let mut mean = vec![0f32; heads[0].len()];
    mean.par_chunks_mut(clusters).enumerate().for_each(|(i, mean)| {
        let mut sums = vec![0f64; clusters];
        for (head, map) in heads.iter().zip(maps) {
            for (&value, &to) in head[i * clusters..][..clusters].iter().zip(map) {
                sums[to as usize] += f64::from(value);
            }
        }
        let heads = heads.len() as f64;
        mean.iter_mut().zip(sums).for_each(|(mean, sum)| *mean = (sum / heads) as f32);
    });
    mean
}

/// The share of the heads that agree with an assignment of `N` points, `(N,)`: whose cluster of largest
/// membership, mapped, is that of the point.
///
/// - `heads`: memberships of each head, `(H, N, K)`.
/// - `maps`: for each head, the cluster of the assignment for each of its `K`.
///
/// # Errors
///
/// A head does not fill rows of `clusters`.
pub fn agreement(
    heads: &[Vec<f32>],
    maps: &[Vec<u32>],
    assignment: &[u32],
    clusters: usize,
) -> Result<Vec<f32>> {
    let mut agreeing = vec![0f32; assignment.len()];
    for (head, map) in heads.iter().zip(maps) {
        let (own, _) = argmax_rows(head, clusters)?;
        for ((agreeing, own), &common) in agreeing.iter_mut().zip(own).zip(assignment) {
            *agreeing += f32::from(map[own as usize] == common);
        }
    }
    agreeing.iter_mut().for_each(|agreeing| *agreeing /= heads.len() as f32);
    Ok(agreeing)
}

/// Merges clusters until `fewer` are left.
///
/// Heads with too many clusters split a group, each in another way, so that the parts share
/// memberships. Each step merges the pair of the largest `(RᵀR)_ab / √((RᵀR)_aa (RᵀR)_bb)`, the first of
/// a tie, and adds its columns of `R`. That needs no pass over the points.
///
/// - `memberships`: `R`, `(N, K)`.
///
/// Returns the new cluster of each of the `K`, numbered in the order of their first member.
///
/// # Errors
///
/// `fewer` is 0 or above `clusters`, or the memberships do not fill rows.
pub fn merged_clusters(memberships: &[f32], clusters: usize, fewer: usize) -> Result<Vec<u32>> {
    ensure!(
        clusters > 0 && memberships.len().is_multiple_of(clusters),
        "merged_clusters: {} memberships do not fill rows of {clusters}",
        memberships.len()
    );
    ensure!(
        (1..=clusters).contains(&fewer),
        "merged_clusters: {clusters} clusters cannot become {fewer}; ask for 1 to {clusters}"
    );
    let mut shared = overlap(memberships, memberships, clusters);
    let mut group: Vec<usize> = (0..clusters).collect();
    let mut alive: Vec<usize> = (0..clusters).collect();
    while alive.len() > fewer {
        let mut best = (f64::NEG_INFINITY, alive[0], alive[1]);
        for (i, &a) in alive.iter().enumerate() {
            for &b in &alive[i + 1..] {
                let size = shared[a * clusters + a] * shared[b * clusters + b];
                let likeness = shared[a * clusters + b] / size.sqrt().max(f64::MIN_POSITIVE);
                if likeness > best.0 {
                    best = (likeness, a, b);
                }
            }
        }
        let (_, kept, gone) = best;
        for other in 0..clusters {
            shared[kept * clusters + other] += shared[gone * clusters + other];
        }
        for other in 0..clusters {
            shared[other * clusters + kept] += shared[other * clusters + gone];
        }
        group.iter_mut().filter(|group| **group == gone).for_each(|group| *group = kept);
        alive.retain(|&cluster| cluster != gone);
    }
    let number = |kept| alive.iter().position(|&cluster| cluster == kept).unwrap_or(0) as u32;
    Ok(group.into_iter().map(number).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads on frozen embeddings, case T8: head 1 is swapped.
    #[test]
    fn heads_are_aligned_and_averaged() -> Result<()> {
        let heads = [
            vec![0.9, 0.1, 0.8, 0.2, 0.3, 0.7],
            vec![0.2, 0.8, 0.4, 0.6, 0.9, 0.1],
            vec![0.6, 0.4, 0.4, 0.6, 0.1, 0.9],
        ];
        let found = consensus(&heads, 2, 0, 3)?;
        let want = [23. / 30., 7. / 30., 0.6, 0.4, 1. / 6., 5. / 6.];
        for (got, want) in found.memberships.iter().zip(want) {
            assert!((got - want).abs() < 1e-7, "got {got}, want {want}");
        }
        let (assignment, _) = argmax_rows(&found.memberships, 2)?;
        assert_eq!(assignment, [0, 0, 1]);
        assert_eq!(agreement(&heads, &found.maps, &assignment, 2)?, [1., 2. / 3., 1.]);
        assert_eq!(found.maps, [[0, 1], [1, 0], [0, 1]]);
        let other = argmax_rows(&consensus(&heads, 2, 1, 3)?.memberships, 2)?.0;
        assert_eq!(other, [1, 1, 0], "the best head numbers the clusters");
        Ok(())
    }

    #[test]
    fn heads_that_do_not_fit_are_refused() {
        let heads = [vec![0.5; 4], vec![0.5; 6]];
        let error = consensus(&heads, 2, 0, 3).expect_err("sizes").to_string();
        assert!(error.contains("head 1 has 6") && error.contains("head 0 has 4"), "{error}");
        assert!(consensus(&heads[..1], 3, 0, 3).is_err());
        assert!(consensus(&heads[..1], 2, 1, 3).is_err());
        assert!(consensus(&heads[..1], 2, 0, 0).is_err());
    }

    #[test]
    fn a_split_group_is_merged_before_whole_ones() -> Result<()> {
        // Points waver between clusters 1 and 3; clusters 0 and 2 are sure.
        let rows = [
            [0.98, 0.01, 0.01, 0.0],
            [0.01, 0.55, 0.0, 0.44],
            [0.0, 0.4, 0.01, 0.59],
            [0.01, 0.0, 0.98, 0.01],
        ];
        let memberships = rows.concat();
        assert_eq!(merged_clusters(&memberships, 4, 4)?, [0, 1, 2, 3]);
        assert_eq!(merged_clusters(&memberships, 4, 3)?, [0, 1, 2, 1]);
        assert_eq!(merged_clusters(&memberships, 4, 1)?, [0; 4]);
        assert!(merged_clusters(&memberships, 4, 0).is_err());
        assert!(merged_clusters(&memberships, 4, 5).is_err());
        Ok(())
    }

    /// After a merge the sum decides: 0 and 1 are alike; of their sum and 2 the likeness is
    /// `.3 / √(2.4 · 1.02)`, above that of 2 and 3.
    #[test]
    fn merging_goes_on_with_the_sum() -> Result<()> {
        let rows = [
            [0.6f32, 0.4, 0.0, 0.0],
            [0.4, 0.6, 0.0, 0.0],
            [0.1, 0.1, 0.7, 0.1],
            [0.0, 0.0, 0.0, 1.0],
        ];
        assert_eq!(merged_clusters(&rows.concat(), 4, 2)?, [0, 0, 0, 1]);
        Ok(())
    }
}
