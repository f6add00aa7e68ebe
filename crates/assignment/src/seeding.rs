//! The first centres of k-means: greedy k-means++.
//!
//! All restarts advance together, so that each step reads the points once for the candidates of all
//! restarts. A candidate matters only to points that it is nearer to than their centre. Tiles of
//! approximate products with proven bounds ([`kernels::similarity`]) find the points that it may be
//! nearer to.

use kernels::similarity::{
    Bound, GROUP, LANES, Panel, RowFormat, RowGroups, Rows, Tile, product, products, reached,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use rayon::prelude::*;

use crate::lloyd::Points;

/// Points of one partial sum of the distances. Depends on the shape alone.
const PART: usize = 16 * LANES;

/// Number of candidates for each new centre: `2 + ⌊ln K⌋`.
pub fn candidates(clusters: usize) -> usize {
    2 + (clusters as f64).ln() as usize
}

/// Number of restarts that can advance together within about 300 MB.
pub fn together(n: usize, clusters: usize) -> usize {
    ((1 << 25) / (n * candidates(clusters))).max(1)
}

/// Returns the faster format. With few clusters a candidate is nearer to so many points that its
/// distance from all of them is needed anyway, which floats give directly.
pub fn format(clusters: usize) -> RowFormat {
    if clusters <= 16 { RowFormat::Floats } else { RowFormat::fastest() }
}

/// Chooses `K` points as centres for each generator: Arthur and Vassilvitskii 2007, greedy variant.
///
/// The first centre is drawn uniformly. For each further one, [`candidates`] points are drawn in
/// proportion to their squared distance from the nearest centre so far, and the one that leaves the
/// smallest sum of these distances is taken. If all points lie on centres, the draw is uniform.
/// Weights multiply the probability of a point and its distance.
pub fn greedy_k_means_plus_plus(
    points: &Points,
    weights: Option<&[f32]>,
    clusters: usize,
    randoms: &mut [ChaCha8Rng],
) -> Vec<Vec<f32>> {
    let n = points.squares.len();
    let mut restarts: Vec<Restart> =
        randoms.iter_mut().map(|random| Restart::new(n, weights, random)).collect();
    for step in 0..clusters {
        let count = if step == 0 { 1 } else { candidates(clusters) };
        let drawn: Vec<usize> = restarts.iter_mut().flat_map(|r| r.draw(count)).collect();
        let parts = offer(points, &restarts, &drawn, count);
        for (r, restart) in restarts.iter_mut().enumerate() {
            let gain = |c: usize| parts.iter().map(|part| part[r * count + c].gain).sum::<f64>();
            let gains: Vec<f64> = (0..count).map(gain).collect();
            // The largest gain leaves the smallest sum; the first of equals.
            let best = (1..count).fold(0, |best, c| if gains[c] > gains[best] { c } else { best });
            let chosen = r * count + best;
            restart.centres.push(drawn[chosen]);
            restart.add_centre(parts.iter().map(|part| &part[chosen]));
        }
    }
    let rows =
        |restart: &Restart| restart.centres.iter().flat_map(|&i| points.row(i)).copied().collect();
    restarts.iter().map(rows).collect()
}

/// The state of one restart.
struct Restart<'a> {
    random: &'a mut ChaCha8Rng,
    weights: Option<&'a [f32]>,
    centres: Vec<usize>,
    /// Squared distance of each point from the nearest centre so far.
    nearest: Vec<f32>,
    /// The weighted sum of these distances over each part.
    parts: Vec<f64>,
}

impl<'a> Restart<'a> {
    fn new(n: usize, weights: Option<&'a [f32]>, random: &'a mut ChaCha8Rng) -> Self {
        let parts = vec![0.; n.div_ceil(PART)];
        Self { random, weights, centres: vec![], nearest: vec![f32::INFINITY; n], parts }
    }

    fn draw(&mut self, count: usize) -> Vec<usize> {
        (0..count).map(|_| draw(&self.parts, &self.nearest, self.weights, self.random)).collect()
    }

    fn weight(&self, i: usize) -> f64 {
        weight(self.weights, i)
    }

    /// Makes a candidate a centre, given its offer to each part.
    fn add_centre<'b>(&mut self, offers: impl Iterator<Item = &'b Offer>) {
        let weights = self.weights;
        for (part, ((offer, nearest), sum)) in
            offers.zip(self.nearest.chunks_mut(PART)).zip(&mut self.parts).enumerate()
        {
            for &(i, distance) in &offer.nearer {
                nearest[i as usize] = distance;
            }
            if !offer.nearer.is_empty() {
                let weighted =
                    |(i, &x): (usize, &f32)| weight(weights, part * PART + i) * f64::from(x);
                *sum = nearest.iter().enumerate().map(weighted).sum();
            }
        }
    }
}

/// The effect that a candidate would have on a part.
#[derive(Clone, Default)]
struct Offer {
    /// The points that it is nearer to than their centre: index in the part, and squared distance.
    nearer: Vec<(u16, f32)>,
    /// Decrease of the sum of distances.
    gain: f64,
}

/// Computes the offer of every candidate, `count` per restart, to every part.
fn offer(points: &Points, restarts: &[Restart], drawn: &[usize], count: usize) -> Vec<Vec<Offer>> {
    let (n, d, format) = (points.squares.len(), points.d, points.rows.format());
    let values: Vec<f32> = drawn.iter().flat_map(|&i| points.row(i)).copied().collect();
    let halves: Vec<f32> = drawn.iter().map(|&i| (points.squares[i] / 2.) as f32).collect();
    let rows = Rows::new(&values, d, format);
    let groups = RowGroups::new(&rows, &halves);
    let bound = Bound::new(&rows, halves.iter().copied().fold(0., f32::max));
    let candidates = Candidates { points, drawn, count, groups, bound };
    (0..n.div_ceil(PART))
        .into_par_iter()
        .map_init(
            || (Panel::new(d, format), Tile::default()),
            |(panel, tile), part| {
                let mut offers = vec![Offer::default(); drawn.len()];
                let end = n.min((part + 1) * PART);
                for first in (part * PART..end).step_by(LANES) {
                    let lanes = first..end.min(first + LANES);
                    panel.fill(&points.rows, lanes.clone());
                    candidates.offer(restarts, lanes, panel, tile, &mut offers);
                }
                offers
            },
        )
        .collect()
}

/// The candidates of one step.
struct Candidates<'a, 'b> {
    points: &'b Points<'a>,
    drawn: &'b [usize],
    /// Candidates of each restart.
    count: usize,
    groups: RowGroups,
    bound: Bound,
}

impl Candidates<'_, '_> {
    fn offer(
        &self,
        restarts: &[Restart],
        lanes: std::ops::Range<usize>,
        panel: &Panel,
        tile: &mut Tile,
        offers: &mut [Offer],
    ) {
        // `‖x − c‖² < D` is `x·c − ‖c‖²/2 > (‖x‖² − D) / 2`; the error of the product is subtracted.
        let thresholds: Vec<[f32; LANES]> = restarts
            .iter()
            .map(|restart| {
                let mut thresholds = [f32::INFINITY; LANES];
                for (threshold, i) in thresholds.iter_mut().zip(lanes.clone()) {
                    let least = (self.points.squares[i] - f64::from(restart.nearest[i])) / 2.;
                    let error = self.bound.of(self.points.rows.extents[i]);
                    *threshold = least as f32 - error * 1.01;
                }
                thresholds
            })
            .collect();
        for group in 0..self.groups.len() {
            products(panel, &self.groups, group, tile);
            for c in (group * GROUP..self.drawn.len()).take(GROUP) {
                let (row, r) = (tile.row(c - group * GROUP), c / self.count);
                let mut hits = reached(row, &thresholds[r]);
                while hits != 0 {
                    let lane = hits.trailing_zeros() as usize;
                    hits &= hits - 1;
                    let i = lanes.start + lane;
                    let (distance, nearest) =
                        (self.distance(i, c, row[lane]), restarts[r].nearest[i]);
                    if distance < nearest {
                        offers[c].nearer.push(((i % PART) as u16, distance));
                        offers[c].gain +=
                            restarts[r].weight(i) * (f64::from(nearest) - f64::from(distance));
                    }
                }
            }
        }
    }

    /// Returns the squared distance of a point from a candidate, from the tile's score if that is
    /// accurate enough.
    fn distance(&self, i: usize, candidate: usize, score: f32) -> f32 {
        let other = self.drawn[candidate];
        let squares = self.points.squares[i];
        let distance = match self.points.rows.format() {
            RowFormat::Floats => squares - 2. * f64::from(score),
            RowFormat::Bytes => {
                let product = product(self.points.row(i), self.points.row(other));
                squares + self.points.squares[other] - 2. * product
            }
        };
        distance.max(0.) as f32
    }
}

fn weight(weights: Option<&[f32]>, i: usize) -> f64 {
    weights.map_or(1., |weights| f64::from(weights[i]))
}

/// Draws a point in proportion to its weighted distance.
fn draw(
    parts: &[f64],
    distances: &[f32],
    weights: Option<&[f32]>,
    random: &mut ChaCha8Rng,
) -> usize {
    let total: f64 = parts.iter().sum();
    // Before the first centre, and if all points lie on centres.
    if total <= 0. {
        return match weights {
            None => below(distances.len(), random),
            Some(weights) => {
                let total: f64 = weights.iter().map(|&w| f64::from(w)).sum();
                first_beyond(uniform(random) * total, 0, weights.iter().map(|&w| f64::from(w)))
            }
        };
    }
    let mut left = uniform(random) * total;
    let mut part = 0;
    while part + 1 < parts.len() && left >= parts[part] {
        left -= parts[part];
        part += 1;
    }
    let rows = part * PART..distances.len().min((part + 1) * PART);
    let first = rows.start;
    first_beyond(left, first, rows.map(|i| weight(weights, i) * f64::from(distances[i])))
}

/// Returns the first index, counted from `first`, at which the running sum of `sizes` exceeds `left`;
/// the last one of a size above 0 if none does.
fn first_beyond(mut left: f64, first: usize, sizes: impl Iterator<Item = f64>) -> usize {
    let mut last = first;
    for (i, size) in sizes.enumerate().filter(|&(_, size)| size > 0.) {
        last = first + i;
        left -= size;
        if left < 0. {
            break;
        }
    }
    last
}

/// Draws a number in `[0, 1)`.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws an index below `n`, with a bias below 2⁻⁵³ · n.
fn below(n: usize, random: &mut ChaCha8Rng) -> usize {
    ((uniform(random) * n as f64) as usize).min(n - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ProPos, case 9: the candidates.
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
            let row = draw(&parts, &distances, None, &mut random);
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
            (0..2000).map(|i| (i % 3) as f32 * 100. + (i / 3) as f32 * 0.001).collect();
        for format in [RowFormat::Floats, RowFormat::Bytes] {
            let points = Points::new(&values, 1, format);
            let mut randoms: Vec<_> =
                (0..20).map(|seed| stage::random::stream(seed, "test", &[])).collect();
            for centres in greedy_k_means_plus_plus(&points, None, 3, &mut randoms) {
                let mut groups: Vec<i32> = centres.iter().map(|x| (x / 100.) as i32).collect();
                groups.sort_unstable();
                assert_eq!(groups, [0, 1, 2]);
            }
        }
    }

    #[test]
    fn restarts_together_are_those_alone_and_precision_changes_nothing() {
        let mut random = stage::random::stream(5, "values", &[]);
        let values: Vec<f32> = (0..1000 * 6).map(|_| uniform(&mut random) as f32).collect();
        let stream = |seed| stage::random::stream(seed, "test", &[]);
        let seed = |format, seeds: &[u64]| {
            let mut randoms: Vec<_> = seeds.iter().map(|&seed| stream(seed)).collect();
            greedy_k_means_plus_plus(&Points::new(&values, 6, format), None, 25, &mut randoms)
        };
        let all = seed(RowFormat::Bytes, &[0, 1, 2]);
        for (r, centres) in all.iter().enumerate() {
            assert_eq!(*centres, seed(RowFormat::Bytes, &[r as u64])[0]);
        }
        // Floats round, but these draws lie far enough apart.
        assert_eq!(all, seed(RowFormat::Floats, &[0, 1, 2]));
    }
}
