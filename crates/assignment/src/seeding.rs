//! Where k-means begins: greedy k-means++.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use rayon::prelude::*;

use crate::points;

/// Points of one part of the distances' sum: parts follow from the shape alone.
const PART: usize = 1024;

/// Candidates that each new centre is chosen from: `2 + ⌊ln K⌋`.
pub fn candidates(clusters: usize) -> usize {
    2 + (clusters as f64).ln() as usize
}

/// `K` rows of `values` `(N, D)` as centres: Arthur and Vassilvitskii 2007, greedy variant.
///
/// The first is drawn uniformly. Each further one is the best of [`candidates`] rows drawn in
/// proportion to their squared distance from the centres so far: that which leaves the smallest sum
/// of these distances. Where all rows lie on a centre, the draw is uniform.
pub fn greedy_k_means_plus_plus(
    values: &[f32],
    d: usize,
    clusters: usize,
    random: &mut ChaCha8Rng,
) -> Vec<f32> {
    let n = values.len() / d;
    let row = |i: usize| &values[i * d..][..d];
    let squares: Vec<f32> =
        values.par_chunks(d).map(|x| points::squared_length(x) as f32).collect();
    let first = below(n, random);
    let mut centres = row(first).to_vec();
    let mut nearest = vec![f32::INFINITY; n];
    let (mut parts, mut distances) = closer(values, &squares, &nearest, row(first));
    nearest.copy_from_slice(&distances);
    while centres.len() < clusters * d {
        let mut best: Option<(f64, usize, Vec<f64>, Vec<f32>)> = None;
        for _ in 0..candidates(clusters) {
            let candidate = draw(&parts, &nearest, random);
            let (new_parts, new_distances) = closer(values, &squares, &nearest, row(candidate));
            let sum = new_parts.iter().sum();
            if best.as_ref().is_none_or(|best| sum < best.0) {
                best = Some((sum, candidate, new_parts, new_distances));
            }
        }
        let (_, chosen, new_parts, new_distances) = best.expect("there are at least 2 candidates");
        centres.extend_from_slice(row(chosen));
        (parts, distances) = (new_parts, new_distances);
        nearest.copy_from_slice(&distances);
    }
    centres
}

/// The squared distances to the nearest centre if `candidate` became one, and their sums by part.
fn closer(
    values: &[f32],
    squares: &[f32],
    nearest: &[f32],
    candidate: &[f32],
) -> (Vec<f64>, Vec<f32>) {
    let d = candidate.len();
    let square = points::squared_length(candidate) as f32;
    let mut distances = vec![0f32; nearest.len()];
    let parts = distances
        .par_chunks_mut(PART)
        .zip(values.par_chunks(PART * d))
        .zip(squares.par_chunks(PART).zip(nearest.par_chunks(PART)))
        .map(|((distances, rows), (squares, nearest))| {
            let mut sum = 0f64;
            for (i, row) in rows.chunks(d).enumerate() {
                let distance = (squares[i] + square - 2. * points::dot(row, candidate)).max(0.);
                distances[i] = distance.min(nearest[i]);
                sum += f64::from(distances[i]);
            }
            sum
        })
        .collect();
    (parts, distances)
}

/// A row drawn in proportion to its distance.
fn draw(parts: &[f64], distances: &[f32], random: &mut ChaCha8Rng) -> usize {
    let total: f64 = parts.iter().sum();
    if total <= 0. {
        return below(distances.len(), random);
    }
    let mut left = uniform(random) * total;
    let mut part = 0;
    while part + 1 < parts.len() && left >= parts[part] {
        left -= parts[part];
        part += 1;
    }
    let rows = &distances[part * PART..distances.len().min((part + 1) * PART)];
    let mut last = part * PART;
    for (i, &distance) in rows.iter().enumerate().filter(|(_, distance)| **distance > 0.) {
        last = part * PART + i;
        left -= f64::from(distance);
        if left < 0. {
            break;
        }
    }
    last
}

/// A number in `[0, 1)`.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// An index below `n`; the bias of rounding is below 2⁻⁵³ · n.
fn below(n: usize, random: &mut ChaCha8Rng) -> usize {
    ((uniform(random) * n as f64) as usize).min(n - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_candidates_grows_with_the_logarithm() {
        let counts: Vec<usize> = [10, 15, 20, 200].iter().map(|&k| candidates(k)).collect();
        assert_eq!(counts, [4, 4, 4, 7]);
    }

    #[test]
    fn rows_are_drawn_in_proportion_to_their_distance() {
        let distances: Vec<f32> =
            (0..3000).map(|i| if i % 1000 == 7 { 1. + (i / 1000) as f32 } else { 0. }).collect();
        let parts: Vec<f64> =
            distances.chunks(PART).map(|p| p.iter().map(|&x| f64::from(x)).sum()).collect();
        let mut random = stage::random::stream(1, "test", &[]);
        let mut drawn = [0f64; 3];
        for _ in 0..6000 {
            let row = draw(&parts, &distances, &mut random);
            assert_eq!(row % 1000, 7);
            drawn[row / 1000] += 1.;
        }
        for (i, count) in drawn.iter().enumerate() {
            assert!((count / 1000. - (i + 1) as f64).abs() < 0.15, "{drawn:?}");
        }
    }

    #[test]
    fn the_greedy_choice_leaves_the_smallest_sum() {
        // Three far groups: greedy seeding takes one of each, whatever the seed.
        let values: Vec<f32> =
            (0..90).map(|i| (i % 3) as f32 * 100. + (i / 3) as f32 * 0.01).collect();
        for seed in 0..20 {
            let mut random = stage::random::stream(seed, "test", &[]);
            let mut groups: Vec<i32> = greedy_k_means_plus_plus(&values, 1, 3, &mut random)
                .iter()
                .map(|x| (x / 100.).round() as i32)
                .collect();
            groups.sort_unstable();
            assert_eq!(groups, [0, 1, 2]);
        }
    }
}
