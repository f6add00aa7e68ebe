//! The assignment step of k-means: finds the nearest centre of each point.
//!
//! The result equals a comparison of every point with every centre in `f64`; of equals the lowest
//! index wins. Two methods avoid most of the work without changing the result:
//!
//! - Screening: a tile of approximate products with proven bounds ([`kernels::similarity`]) leaves
//!   one centre for most points. If it leaves several, those are compared in `f64`.
//! - Bounds kept between iterations (Hamerly 2010): each point has an upper bound on the distance
//!   from its centre and a lower bound on the distance from all others. By the triangle inequality,
//!   a centre that moves changes both by at most its drift. A single centre that moves far would
//!   make all lower bounds useless. So the fastest centres are compared with every point, and the
//!   lower bounds shrink only by the drift of the slow ones. A sample of points decides how many
//!   centres count as fast.

use std::ops::Range;

use kernels::similarity::{
    Bound, GROUP, LANES, Panel, RowFormat, RowGroups, Rows, Tile, product, products, reached,
};
use rayon::prelude::*;

use crate::points;

/// Points of one task.
const PART: usize = 16 * LANES;

/// The nearest centre of each point and its bounds, kept between steps: 12 bytes per point.
pub struct Nearest {
    /// Cluster of each point; [`UNASSIGNED`] before the first step.
    pub assignment: Vec<u32>,
    /// Upper bound on the distance from the own centre.
    upper: Vec<f32>,
    /// Lower bound on the distance from every other centre.
    lower: Vec<f32>,
}

/// Cluster of a point before its first assignment.
pub const UNASSIGNED: u32 = u32::MAX;

impl Nearest {
    /// `n` points without a cluster.
    pub fn unassigned(n: usize) -> Self {
        Self { assignment: vec![UNASSIGNED; n], upper: vec![f32::INFINITY; n], lower: vec![0.; n] }
    }

    /// Borrows a range of the points.
    pub fn part(&mut self, points: Range<usize>) -> NearestPart<'_> {
        NearestPart {
            assignment: &mut self.assignment[points.clone()],
            upper: &mut self.upper[points.clone()],
            lower: &mut self.lower[points],
        }
    }

    /// Moves a point to a cluster and drops its bounds, so that the next step searches its centre.
    pub fn reassign(&mut self, point: usize, cluster: u32) {
        self.assignment[point] = cluster;
        self.upper[point] = f32::INFINITY;
        self.lower[point] = 0.;
    }
}

/// A range of [`Nearest`].
pub struct NearestPart<'a> {
    assignment: &'a mut [u32],
    upper: &'a mut [f32],
    lower: &'a mut [f32],
}

/// Points with what all assignment steps of all restarts need of them.
pub struct Points<'a> {
    /// `(N, D)`.
    pub values: &'a [f32],
    /// Width of a point.
    pub d: usize,
    /// Each point's `‖x‖²`.
    pub squares: Vec<f64>,
    /// Packed for approximate products.
    pub rows: Rows<'a>,
}

impl<'a> Points<'a> {
    /// Packs the rows of `values` `(N, d)`, which must be finite.
    pub fn new(values: &'a [f32], d: usize, format: RowFormat) -> Self {
        let squares = values.par_chunks(d).map(|row| product(row, row)).collect();
        Self { values, d, squares, rows: Rows::new(values, d, format) }
    }

    /// Number of points.
    pub fn len(&self) -> usize {
        self.squares.len()
    }

    /// The values of a point.
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.values[i * self.d..][..self.d]
    }

    /// Finds the nearest centre of every point, the lowest index of equals.
    ///
    /// - `nearest`: the result of the last step; updated.
    /// - `drift`: upper bound on how far each centre moved since the last step; empty at the first.
    pub fn assign(&self, nearest: NearestPart, centres: &Centres, drift: &[f32]) {
        let format = self.rows.format();
        let fast = self.fast_centres(&nearest, drift, centres);
        let parts = (nearest.assignment.par_chunks_mut(PART))
            .zip(nearest.upper.par_chunks_mut(PART).zip(nearest.lower.par_chunks_mut(PART)));
        parts.enumerate().for_each_init(
            || Scratch::new(self.d, format),
            |scratch, (part, (assignment, (upper, lower)))| {
                let mut task =
                    PointsTask { points: self, first: part * PART, assignment, upper, lower };
                let undecided = task.undecided(centres, drift, fast.as_ref(), scratch);
                for lanes in undecided.chunks(LANES) {
                    task.search(centres, lanes, scratch);
                }
            },
        );
    }

    /// Chooses the fast centres, which are compared with every point; `None` if it is cheaper to
    /// compare every point with all centres.
    fn fast_centres(
        &self,
        nearest: &NearestPart,
        drift: &[f32],
        centres: &Centres,
    ) -> Option<FastCentres> {
        if drift.is_empty() {
            return None;
        }
        let mut order: Vec<u32> = (0..drift.len() as u32).collect();
        order.sort_by(|&a, &b| drift[b as usize].total_cmp(&drift[a as usize]).then(a.cmp(&b)));
        let k = drift.len();
        let step = (nearest.assignment.len() / 4096).max(1);
        let mut best: Option<(f64, usize)> = None;
        let mut is_fast = vec![false; k];
        let mut marked = 0;
        for count in [0, k / 32, k / 16, k / 8, k / 4].into_iter().filter(|&m| m < k) {
            order[marked..count.max(marked)].iter().for_each(|&c| is_fast[c as usize] = true);
            marked = count;
            let slow_drift = drift[order[count] as usize];
            let sample = (0..nearest.assignment.len()).step_by(step);
            let sampled = sample.len();
            let undecided = sample
                .filter(|&i| {
                    let own = nearest.assignment[i] as usize;
                    // Unlike the step itself, this does not tighten the upper bound.
                    is_fast[own] || nearest.upper[i] + drift[own] >= nearest.lower[i] - slow_drift
                })
                .count();
            let panels = count.div_ceil(GROUP) as f64 / k.div_ceil(GROUP) as f64;
            let cost = panels + undecided as f64 / sampled as f64;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, count));
            }
        }
        let (_, count) = best.filter(|&(cost, _)| cost < 0.9 || k <= 4 * GROUP)?;
        Some(FastCentres::new(&order[..count], drift[order[count] as usize], centres))
    }
}

/// All centres, packed for products.
pub struct Centres<'a> {
    values: &'a [f32],
    d: usize,
    /// `‖c‖² / 2`.
    halves: Vec<f64>,
    groups: RowGroups,
    bound: Bound,
    format: RowFormat,
}

impl<'a> Centres<'a> {
    /// Packs the rows of `values` `(K, d)`; `format` is that of the points.
    pub fn new(values: &'a [f32], d: usize, format: RowFormat) -> Self {
        let halves: Vec<f64> = values.chunks(d).map(|c| product(c, c) / 2.).collect();
        let rows = Rows::new(values, d, format);
        let minus: Vec<f32> = halves.iter().map(|&h| h as f32).collect();
        let bound = Bound::new(&rows, minus.iter().copied().fold(0., f32::max));
        Self { values, d, halves, groups: RowGroups::new(&rows, &minus), bound, format }
    }

    fn row(&self, k: usize) -> &'a [f32] {
        &self.values[k * self.d..][..self.d]
    }

    /// `x·c − ‖c‖²/2`: the higher, the nearer.
    fn score(&self, x: &[f32], k: usize) -> f64 {
        product(x, self.row(k)) - self.halves[k]
    }
}

/// The centres that moved most, packed for a comparison with every point.
struct FastCentres {
    is_fast: Vec<bool>,
    groups: RowGroups,
    /// Upper bound on the drift of all other centres.
    slow_drift: f32,
}

impl FastCentres {
    fn new(fast: &[u32], slow_drift: f32, centres: &Centres) -> Self {
        let mut is_fast = vec![false; centres.halves.len()];
        fast.iter().for_each(|&k| is_fast[k as usize] = true);
        let values: Vec<f32> =
            fast.iter().flat_map(|&k| centres.row(k as usize)).copied().collect();
        let minus: Vec<f32> = fast.iter().map(|&k| centres.halves[k as usize] as f32).collect();
        let rows = Rows::new(&values, centres.d, centres.format);
        Self { is_fast, groups: RowGroups::new(&rows, &minus), slow_drift }
    }
}

/// Buffers of one task, reused by the next.
struct Scratch {
    panel: Panel,
    tiles: Vec<Tile>,
}

impl Scratch {
    fn new(d: usize, format: RowFormat) -> Self {
        Self { panel: Panel::new(d, format), tiles: vec![Tile::default()] }
    }
}

/// The points of one task: the first is point `first` of all.
struct PointsTask<'a, 'b> {
    points: &'b Points<'a>,
    first: usize,
    assignment: &'b mut [u32],
    upper: &'b mut [f32],
    lower: &'b mut [f32],
}

impl PointsTask<'_, '_> {
    /// Updates the bounds, and returns the points of the task that they leave undecided.
    fn undecided(
        &mut self,
        centres: &Centres,
        drift: &[f32],
        fast: Option<&FastCentres>,
        scratch: &mut Scratch,
    ) -> Vec<usize> {
        let Some(fast) = fast else {
            return (0..self.assignment.len()).collect();
        };
        let (mut undecided, mut decided) = (vec![], vec![]);
        for i in 0..self.assignment.len() {
            let own = self.assignment[i] as usize;
            self.upper[i] = up(self.upper[i] + drift[own]);
            self.lower[i] = down(self.lower[i] - fast.slow_drift);
            if !fast.is_fast[own] && self.upper[i] >= self.lower[i] {
                self.tighten(i, centres);
            }
            let is_undecided = fast.is_fast[own] || self.upper[i] >= self.lower[i];
            (if is_undecided { &mut undecided } else { &mut decided }).push(i);
        }
        if !fast.groups.is_empty() {
            for lanes in decided.chunks(LANES) {
                self.compare_fast(fast, centres, lanes, scratch, &mut undecided);
            }
            // In order of index, so that a panel reads rows that are close in memory.
            undecided.sort_unstable();
        }
        undecided
    }

    /// Replaces the upper bound by the exact distance.
    fn tighten(&mut self, i: usize, centres: &Centres) {
        let point = self.first + i;
        let score = centres.score(self.points.row(point), self.assignment[i] as usize);
        self.upper[i] = distance_above(self.points.squares[point], score);
    }

    /// Compares points with the fast centres, and adds those that may be nearest to one of them to
    /// `undecided`.
    fn compare_fast(
        &mut self,
        fast: &FastCentres,
        centres: &Centres,
        lanes: &[usize],
        scratch: &mut Scratch,
        undecided: &mut Vec<usize>,
    ) {
        let first = self.first;
        scratch.panel.fill(&self.points.rows, lanes.iter().map(|&i| first + i));
        let mut best = [f32::NEG_INFINITY; LANES];
        let tile = &mut scratch.tiles[0];
        for group in 0..fast.groups.len() {
            products(&scratch.panel, &fast.groups, group, tile);
            best.iter_mut().zip(&tile.largest).for_each(|(best, &x)| *best = best.max(x));
        }
        for (&i, &best) in lanes.iter().zip(&best) {
            let point = first + i;
            let error = centres.bound.of(self.points.rows.extents[point]);
            let score = f64::from(best) + f64::from(error);
            let away = distance_below(self.points.squares[point], score);
            self.lower[i] = self.lower[i].min(away);
            if self.upper[i] >= self.lower[i] {
                self.tighten(i, centres);
                if self.upper[i] >= self.lower[i] {
                    undecided.push(i);
                }
            }
        }
    }

    /// Compares up to [`LANES`] points with all centres.
    fn search(&mut self, centres: &Centres, lanes: &[usize], scratch: &mut Scratch) {
        let first = self.first;
        let Scratch { panel, tiles } = scratch;
        panel.fill(&self.points.rows, lanes.iter().map(|&i| first + i));
        tiles.resize(centres.groups.len().max(1), Tile::default());
        let mut best = [f32::NEG_INFINITY; LANES];
        let mut second = [f32::NEG_INFINITY; LANES];
        for (group, tile) in tiles.iter_mut().enumerate() {
            products(panel, &centres.groups, group, tile);
            for ((best, second), &x) in best.iter_mut().zip(&mut second).zip(&tile.largest) {
                *second = second.max(best.min(x));
                *best = best.max(x);
            }
        }
        let mut errors = [0f32; LANES];
        let mut thresholds = [f32::INFINITY; LANES];
        for (lane, &i) in lanes.iter().enumerate() {
            errors[lane] = centres.bound.of(self.points.rows.extents[first + i]);
            thresholds[lane] = best[lane] - 2.1 * errors[lane];
        }
        let mut found = [BestCentre::NONE; LANES];
        for (group, tile) in tiles.iter().enumerate() {
            let mut hits = reached(&tile.largest, &thresholds);
            while hits != 0 {
                let lane = hits.trailing_zeros() as usize;
                hits &= hits - 1;
                let row = self.points.row(first + lanes[lane]);
                for j in (0..GROUP).filter(|&j| tile.row(j)[lane] >= thresholds[lane]) {
                    found[lane].consider(group * GROUP + j, |k| centres.score(row, k));
                }
            }
        }
        for (lane, &i) in lanes.iter().enumerate() {
            let found = &found[lane];
            let (group, own) = (found.cluster / GROUP, found.cluster % GROUP);
            let tile = &tiles[group];
            // The best of the other groups, and of the own group's other rows.
            let others = if tile.largest[lane] == best[lane] { second[lane] } else { best[lane] };
            let others =
                (0..GROUP).filter(|&j| j != own).map(|j| tile.row(j)[lane]).fold(others, f32::max);
            let square = self.points.squares[first + i];
            let error = f64::from(errors[lane]);
            let score = found.score.unwrap_or_else(|| f64::from(tile.row(own)[lane]) - error);
            self.assignment[i] = found.cluster as u32;
            self.upper[i] = distance_above(square, score);
            self.lower[i] = distance_below(square, f64::from(others) + error);
        }
    }
}

/// The nearest centre of a point among those that screening left.
#[derive(Clone, Copy)]
struct BestCentre {
    cluster: usize,
    /// Its exact score, computed only if a second centre has to be compared.
    score: Option<f64>,
}

impl BestCentre {
    const NONE: Self = Self { cluster: usize::MAX, score: None };

    /// Keeps the better of the two. Centres come in order of index, so the lowest of equals stays.
    fn consider(&mut self, cluster: usize, score: impl Fn(usize) -> f64) {
        if self.cluster == usize::MAX {
            self.cluster = cluster;
            return;
        }
        let mine = self.score.unwrap_or_else(|| score(self.cluster));
        let other = score(cluster);
        *self = if other > mine {
            Self { cluster, score: Some(other) }
        } else {
            Self { cluster: self.cluster, score: Some(mine) }
        };
    }
}

/// Relative margin for the rounding errors of a bound.
const SLACK: f64 = 1e-12;

/// Returns an upper bound on `‖x − c‖`, given `‖x‖²` and a lower bound on `x·c − ‖c‖²/2`.
fn distance_above(square: f64, score: f64) -> f32 {
    up((square * (1. + SLACK) - 2. * score + SLACK * score.abs()).max(0.).sqrt() as f32)
}

/// Returns a lower bound on `‖x − c‖`, given `‖x‖²` and an upper bound on `x·c − ‖c‖²/2`.
fn distance_below(square: f64, score: f64) -> f32 {
    down((square * (1. - SLACK) - 2. * score - SLACK * score.abs()).max(0.).sqrt() as f32)
}

fn up(x: f32) -> f32 {
    x * (1. + 2. * f32::EPSILON) + f32::MIN_POSITIVE
}

fn down(x: f32) -> f32 {
    x - 2. * f32::EPSILON * x.abs() - f32::MIN_POSITIVE
}

/// Returns an upper bound on how far each centre moved.
pub fn drift(from: &[f32], to: &[f32], d: usize) -> Vec<f32> {
    (from.par_chunks(d).zip(to.par_chunks(d)))
        .map(|(from, to)| up(up(points::squared_distance(from, to).sqrt() as f32)))
        .collect()
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    fn random_rows(n: usize, d: usize, seed: u64) -> Vec<f32> {
        let mut random = stage::random::stream(seed, "rows", &[]);
        (0..n * d).map(|_| random.random::<f32>() - 0.5).collect()
    }

    /// Compares every point with every centre, in `f64`.
    fn plain(values: &[f32], centres: &[f32], d: usize) -> Vec<u32> {
        let score = |x: &[f32], c: &[f32]| product(x, c) - product(c, c) / 2.;
        let nearest = |x: &[f32]| {
            let mut best = (f64::NEG_INFINITY, 0);
            for (k, c) in centres.chunks(d).enumerate() {
                if score(x, c) > best.0 {
                    best = (score(x, c), k as u32);
                }
            }
            best.1
        };
        values.chunks(d).map(nearest).collect()
    }

    /// Moves centres as late iterations do: a tenth of them far, half of them little, the others not.
    fn moved(centres: &[f32], d: usize, step: u64) -> Vec<f32> {
        let mut random = stage::random::stream(step, "moved", &[]);
        let mut moved = centres.to_vec();
        for row in moved.chunks_mut(d) {
            let size = match random.random::<f32>() {
                x if x < 0.1 => 0.5,
                x if x < 0.6 => 0.003,
                _ => 0.,
            };
            row.iter_mut().for_each(|x| *x += size * (random.random::<f32>() - 0.5));
        }
        moved
    }

    #[test]
    fn assignments_are_those_of_the_plain_comparison_at_every_step() {
        for format in [RowFormat::Bytes, RowFormat::Floats] {
            for (n, d, k) in [(2000, 16, 70), (1000, 5, 3), (900, 40, 200), (60, 1, 8)] {
                let values = random_rows(n, d, 1);
                // Two equal centres: the lower index wins.
                let mut centres = values[..k * d].to_vec();
                centres.copy_within(0..d, (k - 1) * d);
                let points = Points::new(&values, d, format);
                let mut nearest = Nearest::unassigned(n);
                let mut drifts = vec![];
                for step in 0..12 {
                    let packed = Centres::new(&centres, d, format);
                    points.assign(nearest.part(0..n), &packed, &drifts);
                    let want = plain(&values, &centres, d);
                    assert_eq!(nearest.assignment, want, "{format:?} {n} {d} {k} {step}");
                    for i in 0..n {
                        let own = nearest.assignment[i] as usize;
                        let distance =
                            |c: &[f32]| points::squared_distance(points.row(i), c).sqrt();
                        for (k, centre) in centres.chunks(d).enumerate() {
                            if k == own {
                                assert!(distance(centre) <= f64::from(nearest.upper[i]));
                            } else {
                                assert!(distance(centre) >= f64::from(nearest.lower[i]));
                            }
                        }
                    }
                    if step == 5 {
                        nearest.reassign(7, 0);
                    }
                    let next = moved(&centres, d, step);
                    drifts = drift(&centres, &next, d);
                    centres = next;
                }
            }
        }
    }
}
