//! The assignment step of k-means: the nearest centre of each point, looked for only where needed.
//!
//! The result is that of comparing every point with every centre in `f64`, ties by the lowest index.
//! Two things save most of the work and change nothing:
//!
//! - Screening: a tile of approximate products with proven bounds ([`kernels::similarity`]) leaves
//!   one centre for most points; where it leaves several, those are compared in `f64`.
//! - Bounds that survive an iteration (Hamerly 2010): a point keeps an upper bound on the distance
//!   from its centre and a lower bound on that from all others. Centres that move change both by
//!   their drift at most, by the triangle inequality. One far-moving centre would spoil all lower
//!   bounds, so the centres that move most are compared with every point, and only the drift of
//!   the calm rest is subtracted; how many are taken for moving is what a sample of points finds
//!   cheapest.

use std::ops::Range;

use kernels::similarity::{
    Bound, GROUP, Groups, LANES, Panel, Precision, Rows, Tile, product, products, reached,
};
use rayon::prelude::*;

use crate::points;

/// Points of one task.
const PART: usize = 16 * LANES;

/// What is known of each point between two assignment steps: 12 bytes a point.
pub struct Nearest {
    /// Cluster of each point; [`UNASSIGNED`] before the first step.
    pub assignment: Vec<u32>,
    /// At least the distance from the own centre.
    upper: Vec<f32>,
    /// At most the distance from every other centre.
    lower: Vec<f32>,
}

/// Cluster of a point that was never assigned.
pub const UNASSIGNED: u32 = u32::MAX;

impl Nearest {
    /// Nothing is known of `n` points.
    pub fn unknown(n: usize) -> Self {
        Self { assignment: vec![UNASSIGNED; n], upper: vec![f32::INFINITY; n], lower: vec![0.; n] }
    }

    /// What is known of consecutive points.
    pub fn part(&mut self, points: Range<usize>) -> NearestPart<'_> {
        NearestPart {
            assignment: &mut self.assignment[points.clone()],
            upper: &mut self.upper[points.clone()],
            lower: &mut self.lower[points],
        }
    }

    /// Puts a point into a cluster by decree; the next step looks for its centre anew.
    pub fn place(&mut self, point: usize, cluster: u32) {
        self.assignment[point] = cluster;
        self.upper[point] = f32::INFINITY;
        self.lower[point] = 0.;
    }
}

/// What is known of some of the points.
pub struct NearestPart<'a> {
    assignment: &'a mut [u32],
    upper: &'a mut [f32],
    lower: &'a mut [f32],
}

/// The points, as all assignment steps of all restarts use them.
pub struct Points<'a> {
    /// `(N, D)`.
    pub values: &'a [f32],
    /// Width of a point.
    pub d: usize,
    /// Each point's `‖x‖²`.
    pub squares: Vec<f64>,
    /// For the products.
    pub rows: Rows<'a>,
}

impl<'a> Points<'a> {
    /// Prepares the rows of `values` `(N, d)`, which are finite.
    pub fn new(values: &'a [f32], d: usize, precision: Precision) -> Self {
        let squares = values.par_chunks(d).map(|row| product(row, row)).collect();
        Self { values, d, squares, rows: Rows::new(values, d, precision) }
    }

    /// Number of points.
    pub fn len(&self) -> usize {
        self.squares.len()
    }

    /// A point.
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.values[i * self.d..][..self.d]
    }

    /// Finds the nearest centre of every point, the lowest index of equals.
    ///
    /// `nearest` is what is known of these points; `drift` is how far each centre moved since the
    /// last step, from above, and empty at the first.
    pub fn assign(&self, nearest: NearestPart, centres: &Centres, drift: &[f32]) {
        let precision = self.rows.precision();
        let moving = self.moving(&nearest, drift, centres);
        let parts = (nearest.assignment.par_chunks_mut(PART))
            .zip(nearest.upper.par_chunks_mut(PART).zip(nearest.lower.par_chunks_mut(PART)));
        parts.enumerate().for_each_init(
            || Scratch::new(self.d, precision),
            |scratch, (part, (assignment, (upper, lower)))| {
                let mut part = Part { points: self, first: part * PART, assignment, upper, lower };
                let open = part.open(centres, drift, moving.as_ref(), scratch);
                for lanes in open.chunks(LANES) {
                    part.search(centres, lanes, scratch);
                }
            },
        );
    }

    /// The centres to compare with every point, so that the others count as calm; `None` where
    /// every point has to be compared with all centres anyway.
    fn moving(&self, nearest: &NearestPart, drift: &[f32], centres: &Centres) -> Option<Moving> {
        if drift.is_empty() {
            return None;
        }
        let mut order: Vec<u32> = (0..drift.len() as u32).collect();
        order.sort_by(|&a, &b| drift[b as usize].total_cmp(&drift[a as usize]).then(a.cmp(&b)));
        let k = drift.len();
        let step = (nearest.assignment.len() / 4096).max(1);
        let mut best: Option<(f64, usize)> = None;
        let mut is_moving = vec![false; k];
        let mut marked = 0;
        for count in [0, k / 32, k / 16, k / 8, k / 4].into_iter().filter(|&m| m < k) {
            order[marked..count.max(marked)].iter().for_each(|&c| is_moving[c as usize] = true);
            marked = count;
            let calm = drift[order[count] as usize];
            let sample = (0..nearest.assignment.len()).step_by(step);
            let sampled = sample.len();
            let open = sample
                .filter(|&i| {
                    let own = nearest.assignment[i] as usize;
                    // Unlike the step itself, without a tightened upper bound.
                    is_moving[own] || nearest.upper[i] + drift[own] >= nearest.lower[i] - calm
                })
                .count();
            let panels = count.div_ceil(GROUP) as f64 / k.div_ceil(GROUP) as f64;
            let cost = panels + open as f64 / sampled as f64;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, count));
            }
        }
        let (_, count) = best.filter(|&(cost, _)| cost < 0.9 || k <= 4 * GROUP)?;
        Some(Moving::new(&order[..count], drift[order[count] as usize], centres))
    }
}

/// All centres, packed for products.
pub struct Centres<'a> {
    values: &'a [f32],
    d: usize,
    /// `‖c‖² / 2`.
    halves: Vec<f64>,
    groups: Groups,
    bound: Bound,
    precision: Precision,
}

impl<'a> Centres<'a> {
    /// Packs the rows of `values` `(K, d)`; `precision` is that of the points.
    pub fn new(values: &'a [f32], d: usize, precision: Precision) -> Self {
        let halves: Vec<f64> = values.chunks(d).map(|c| product(c, c) / 2.).collect();
        let rows = Rows::new(values, d, precision);
        let minus: Vec<f32> = halves.iter().map(|&h| h as f32).collect();
        let bound = Bound::new(&rows, minus.iter().copied().fold(0., f32::max));
        Self { values, d, halves, groups: Groups::new(&rows, &minus), bound, precision }
    }

    fn row(&self, k: usize) -> &'a [f32] {
        &self.values[k * self.d..][..self.d]
    }

    /// `x·c − ‖c‖²/2`: the higher, the nearer.
    fn score(&self, x: &[f32], k: usize) -> f64 {
        product(x, self.row(k)) - self.halves[k]
    }
}

/// The centres that every point is compared with.
struct Moving {
    is_moving: Vec<bool>,
    groups: Groups,
    /// At least the drift of all others.
    calm: f32,
}

impl Moving {
    fn new(moving: &[u32], calm: f32, centres: &Centres) -> Self {
        let mut is_moving = vec![false; centres.halves.len()];
        moving.iter().for_each(|&k| is_moving[k as usize] = true);
        let values: Vec<f32> =
            moving.iter().flat_map(|&k| centres.row(k as usize)).copied().collect();
        let minus: Vec<f32> = moving.iter().map(|&k| centres.halves[k as usize] as f32).collect();
        let rows = Rows::new(&values, centres.d, centres.precision);
        Self { is_moving, groups: Groups::new(&rows, &minus), calm }
    }
}

/// Memory of one task.
struct Scratch {
    panel: Panel,
    tiles: Vec<Tile>,
}

impl Scratch {
    fn new(d: usize, precision: Precision) -> Self {
        Self { panel: Panel::new(d, precision), tiles: vec![Tile::default()] }
    }
}

/// The points of one task.
struct Part<'a, 'b> {
    points: &'b Points<'a>,
    first: usize,
    assignment: &'b mut [u32],
    upper: &'b mut [f32],
    lower: &'b mut [f32],
}

impl Part<'_, '_> {
    /// The points whose nearest centre the bounds leave open, as places in the part.
    fn open(
        &mut self,
        centres: &Centres,
        drift: &[f32],
        moving: Option<&Moving>,
        scratch: &mut Scratch,
    ) -> Vec<usize> {
        let Some(moving) = moving else {
            return (0..self.assignment.len()).collect();
        };
        let (mut open, mut closed) = (vec![], vec![]);
        for i in 0..self.assignment.len() {
            let own = self.assignment[i] as usize;
            self.upper[i] = up(self.upper[i] + drift[own]);
            self.lower[i] = down(self.lower[i] - moving.calm);
            if !moving.is_moving[own] && self.upper[i] >= self.lower[i] {
                self.tighten(i, centres);
            }
            let is_open = moving.is_moving[own] || self.upper[i] >= self.lower[i];
            (if is_open { &mut open } else { &mut closed }).push(i);
        }
        if !moving.groups.is_empty() {
            for lanes in closed.chunks(LANES) {
                self.compare_moving(moving, centres, lanes, scratch, &mut open);
            }
            // In their order, so that a panel's rows lie near each other in memory.
            open.sort_unstable();
        }
        open
    }

    /// Replaces the upper bound by the distance itself.
    fn tighten(&mut self, i: usize, centres: &Centres) {
        let point = self.first + i;
        let score = centres.score(self.points.row(point), self.assignment[i] as usize);
        self.upper[i] = distance_above(self.points.squares[point], score);
    }

    /// Compares points with the moving centres; those that one of them may win become open.
    fn compare_moving(
        &mut self,
        moving: &Moving,
        centres: &Centres,
        lanes: &[usize],
        scratch: &mut Scratch,
        open: &mut Vec<usize>,
    ) {
        let first = self.first;
        scratch.panel.fill(&self.points.rows, lanes.iter().map(|&i| first + i));
        let mut best = [f32::NEG_INFINITY; LANES];
        let tile = &mut scratch.tiles[0];
        for group in 0..moving.groups.len() {
            products(&scratch.panel, &moving.groups, group, tile);
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
                    open.push(i);
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
        let mut found = [Found::NONE; LANES];
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
struct Found {
    cluster: usize,
    /// Its exact score; computed only when there is a second one to compare with.
    score: Option<f64>,
}

impl Found {
    const NONE: Self = Self { cluster: usize::MAX, score: None };

    /// Centres come in the order of their indices, so that equals leave the lowest.
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

/// Relative slack that covers the roundings of a bound.
const SLACK: f64 = 1e-12;

/// At least `‖x − c‖`, from `‖x‖²` and at most `x·c − ‖c‖²/2`.
fn distance_above(square: f64, score: f64) -> f32 {
    up((square * (1. + SLACK) - 2. * score + SLACK * score.abs()).max(0.).sqrt() as f32)
}

/// At most `‖x − c‖`, from `‖x‖²` and at least `x·c − ‖c‖²/2`.
fn distance_below(square: f64, score: f64) -> f32 {
    down((square * (1. - SLACK) - 2. * score - SLACK * score.abs()).max(0.).sqrt() as f32)
}

fn up(x: f32) -> f32 {
    x * (1. + 2. * f32::EPSILON) + f32::MIN_POSITIVE
}

fn down(x: f32) -> f32 {
    x - 2. * f32::EPSILON * x.abs() - f32::MIN_POSITIVE
}

/// How far each centre moved, from above.
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

    /// Every point with every centre, in `f64`.
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

    /// Centres that move by a random share of a random few, as in late iterations, and by more.
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
        for precision in [Precision::Bytes, Precision::Floats] {
            for (n, d, k) in [(2000, 16, 70), (1000, 5, 3), (900, 40, 200), (60, 1, 8)] {
                let values = random_rows(n, d, 1);
                // Two equal centres: the lower index wins.
                let mut centres = values[..k * d].to_vec();
                centres.copy_within(0..d, (k - 1) * d);
                let points = Points::new(&values, d, precision);
                let mut nearest = Nearest::unknown(n);
                let mut drifts = vec![];
                for step in 0..12 {
                    let packed = Centres::new(&centres, d, precision);
                    points.assign(nearest.part(0..n), &packed, &drifts);
                    let want = plain(&values, &centres, d);
                    assert_eq!(nearest.assignment, want, "{precision:?} {n} {d} {k} {step}");
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
                        nearest.place(7, 0);
                    }
                    let next = moved(&centres, d, step);
                    drifts = drift(&centres, &next, d);
                    centres = next;
                }
            }
        }
    }
}
