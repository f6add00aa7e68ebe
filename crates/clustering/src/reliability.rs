//! Which pseudo-labels to trust: by score, the best of each cluster, or by confidence.
//!
//! All of it is our interpretation: the paper says that assignments are reliable, not how.

/// Marks in each cluster the best `⌈η N_k⌉` of its `N_k` images by score, at least one.
///
/// Ranks are taken within a cluster and not over all images, so that a hard cluster is not left
/// without reliable images. Of equal scores the lower index is the better.
///
/// - `share`: η, in `(0, 1]`.
///
/// Returns `(N,)`: whether each image is reliable.
pub fn reliable(assignment: &[u32], scores: &[f32], clusters: usize, share: f64) -> Vec<bool> {
    let mut members = vec![Vec::new(); clusters];
    for (i, &k) in assignment.iter().enumerate() {
        members[k as usize].push(i);
    }
    let mut marks = vec![false; assignment.len()];
    for mut cluster in members {
        // The sort is stable, and the members are in the order of their index.
        cluster.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        // Without the small number, .7 of 10 would be 8.
        let keep = (share * cluster.len() as f64 - 1e-9).ceil().max(1.0) as usize;
        for &i in cluster.iter().take(keep) {
            marks[i] = true;
        }
    }
    marks
}

/// Marks the images whose confidence is above `threshold`: one measure for all clusters, so that a
/// hard one may be left without any.
///
/// - `confidence`: `(N,)` in `[0, 1]`.
///
/// Returns `(N,)`: whether each image is reliable.
pub fn confident(confidence: &[f32], threshold: f64) -> Vec<bool> {
    // At the precision of the confidence, so that a value equal to the threshold is not above it.
    confidence.iter().map(|&c| c > threshold as f32).collect()
}

/// The share η of each cluster that round `round` of `rounds` keeps: linear from `first` to `last`.
///
/// The clustering of round `r` is what refinement round `r + 1` learns from, so the last share
/// belongs to round `rounds − 1`; the clustering after it is the result, and keeps that share.
pub fn share([first, last]: [f64; 2], round: usize, rounds: usize) -> f64 {
    let steps = rounds.saturating_sub(1);
    if steps == 0 {
        return first;
    }
    first + (last - first) * round.min(steps) as f64 / steps as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: [f32; 8] = [0.99, 0.95, 0.9, 0.6, 0.97, 0.5, 0.45, 0.4];
    const ASSIGNMENT: [u32; 8] = [0, 0, 0, 0, 1, 1, 1, 1];

    fn chosen(share: f64, scores: &[f32]) -> Vec<usize> {
        let marks = reliable(&ASSIGNMENT, scores, 2, share);
        (0..8).filter(|&i| marks[i]).collect()
    }

    #[test]
    fn the_best_share_of_each_cluster_is_kept() {
        assert_eq!(chosen(0.5, &SCORES), [0, 1, 4, 5]);
        assert_eq!(chosen(0.25, &SCORES), [0, 4]);
        assert_eq!(chosen(0.01, &SCORES), [0, 4], "a cluster keeps at least one");
        assert_eq!(chosen(1.0, &SCORES).len(), 8);
        assert_eq!(chosen(0.5, &SCORES.map(|s| s * 0.1)), chosen(0.5, &SCORES), "scale is nothing");
        assert_eq!(chosen(0.25, &[0.5; 8]), [0, 4], "ties go by index");
        let sizes: Vec<usize> =
            (1..=20).map(|i| chosen(f64::from(i) / 20.0, &SCORES).len()).collect();
        assert!(sizes.is_sorted(), "{sizes:?}");
    }

    #[test]
    fn what_equals_the_threshold_is_not_above_it() {
        let above = |threshold| -> Vec<usize> {
            let marks = confident(&SCORES, threshold);
            (0..8).filter(|&i| marks[i]).collect()
        };
        assert_eq!(above(0.95), [0, 4]);
        assert_eq!(above(0.94), [0, 1, 4]);
        assert_eq!(above(0.99), [0usize; 0]);
    }

    #[test]
    fn an_empty_cluster_and_an_exact_share_are_no_trouble() {
        assert_eq!(reliable(&[0, 0], &[0.1, 0.2], 3, 0.5), [false, true]);
        let ten = reliable(&[0; 10], &[0.5; 10], 1, 0.7);
        assert_eq!(ten.iter().filter(|&&reliable| reliable).count(), 7);
    }

    #[test]
    fn the_share_rises_over_the_rounds_that_are_learnt_from() {
        for (round, want) in [0.5, 0.6, 0.7, 0.8, 0.9, 0.9].into_iter().enumerate() {
            assert!((share([0.5, 0.9], round, 5) - want).abs() < 1e-12, "round {round}");
        }
        assert_eq!(share([0.5, 0.9], 0, 1), 0.5);
        assert_eq!(share([0.5, 0.9], 0, 0), 0.5);
    }
}
