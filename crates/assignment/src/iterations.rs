//! Lloyd's iterations: alternate assignment and means, over points in memory or in shards, on one rank
//! or shared by several.
//!
//! Sums over points are taken for each leaf of a tree, and then added in the tree. A rank has whole
//! branches, so that the sums have the same bits on any number of ranks.

use std::ops::Range;

use anyhow::Result;
use collective::Communicator;
use kernels::similarity::{RowFormat, add_row, product};
use rayon::prelude::*;

use crate::clustering::{Clustering, KMeans, Metric};
use crate::lloyd::{self, Centres, Nearest, Points};
use crate::points;

/// Points that every iteration reads again, in one piece or in several.
pub trait PointSource {
    /// Calls `visit` with each piece of this rank, in order.
    ///
    /// # Errors
    ///
    /// A piece cannot be read, or `visit` fails.
    fn each(&self, visit: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()>;

    /// The ranks that share the points, each with those that follow the points of the ranks before it.
    fn ranks(&self) -> Communicator {
        Communicator::single()
    }
}

/// Some of the points of a rank.
pub struct Piece<'a, 'b> {
    /// The number of the first one, among those of this rank.
    pub first: usize,
    /// The leaf that it belongs to, among those of this rank.
    pub leaf: usize,
    /// The points.
    pub points: &'a Points<'b>,
}

impl Piece<'_, '_> {
    /// The numbers of the points, among those of this rank.
    fn range(&self) -> Range<usize> {
        self.first..self.first + self.points.len()
    }
}

/// Points in memory: one piece.
impl PointSource for Points<'_> {
    fn each(&self, visit: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        visit(Piece { first: 0, leaf: 0, points: self })
    }
}

/// Leaves of the tree that adds sums over points; as many ranks or fewer can share them.
pub const LEAVES: usize = 1024;

/// The sum of the leaves of this rank, taken while they come one after another: at most one value for
/// each level of the tree is in memory.
pub struct LeafSum<T> {
    /// Leaves below each sum, and the sum; `None` where all of them are empty. Larger ones come first.
    branches: Vec<(usize, Option<T>)>,
    /// Adds the second value to the first.
    add: fn(&mut T, T),
}

impl<T> LeafSum<T> {
    /// No leaf yet.
    pub fn new(add: fn(&mut T, T)) -> Self {
        Self { branches: Vec::new(), add }
    }

    /// The value of the leaf with this number, of those of this rank. `value` makes it where it is new.
    pub fn leaf(&mut self, number: usize, value: impl FnOnce() -> T) -> &mut T {
        let done: usize = self.branches.iter().map(|(leaves, _)| leaves).sum();
        let is_new = done <= number;
        for _ in done..=number {
            self.join_equal();
            self.branches.push((1, None));
        }
        let (_, last) = self.branches.last_mut().expect("a leaf was pushed");
        if is_new {
            *last = Some(value());
        }
        last.as_mut().expect("a leaf that is not new has a value")
    }

    /// The sum of all leaves; `None` if all are empty.
    pub fn sum(mut self) -> Option<T> {
        while self.branches.len() > 1 {
            self.join_last();
        }
        self.branches.pop().and_then(|(_, sum)| sum)
    }

    fn join_equal(&mut self) {
        while let [.., (lower, _), (upper, _)] = self.branches[..]
            && lower == upper
        {
            self.join_last();
        }
    }

    fn join_last(&mut self) {
        let (Some((upper_leaves, upper)), Some((leaves, lower))) =
            (self.branches.pop(), self.branches.pop())
        else {
            return;
        };
        let joined = match (lower, upper) {
            (Some(mut lower), Some(upper)) => {
                (self.add)(&mut lower, upper);
                Some(lower)
            }
            (lower, upper) => lower.or(upper),
        };
        self.branches.push((leaves + upper_leaves, joined));
    }
}

/// Sums over all points that are computed once, before the first iteration.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Number of points of this rank.
    pub n: usize,
    /// Width of a point, D.
    pub d: usize,
    /// Weight of each point, `(N,)`; without weights each counts 1.
    pub weights: Option<&'a [f32]>,
    /// `Σ w ‖x‖²`.
    pub squares: f64,
    /// Mean of the columns' variances.
    pub variance: f64,
}

impl Facts<'_> {
    fn weight(&self, i: usize) -> f64 {
        self.weights.map_or(1., |weights| f64::from(weights[i]))
    }
}

/// Alternates assignment and means, starting from `centres`, until a stop rule is met.
pub fn iterate(
    source: &dyn PointSource,
    facts: &Facts,
    mut centres: Vec<f32>,
    config: &KMeans,
) -> Result<Clustering> {
    let Facts { n, d, variance, .. } = *facts;
    let mut best = Clustering {
        assignment: vec![],
        centres: vec![],
        inertia: f64::INFINITY,
        restart: 0,
        iterations: 0,
        converged: false,
        reseeded: 0,
    };
    let ranks = source.ranks();
    let mut nearest = Nearest::unassigned(n);
    let mut sums = ClusterSums::new(config.clusters, d);
    let mut drift = vec![];
    let mut last = false;
    for iteration in 1..=config.iterations {
        let changed = step(source, facts, &mut nearest, &mut sums, &centres, &drift)?;
        let inertia = sums.inertia(&centres, config.metric, facts.squares);
        best.iterations = iteration;
        if inertia < best.inertia {
            best.inertia = inertia;
            best.assignment.clone_from(&nearest.assignment);
            best.centres.clone_from(&centres);
        }
        if last || changed == 0 {
            best.converged = true;
            break;
        }
        let moved = reseed_empty(source, facts, &mut nearest, &mut sums, &centres)?;
        best.reseeded += moved;
        let next = sums.means(&centres, config.metric);
        drift = lloyd::drift(&centres, &next, d);
        let shift = summed_shift(&centres, &next, d, config.metric);
        // One more step, so that the assignment belongs to the centres that met the tolerance.
        last = shift <= config.tolerance * variance && moved == 0;
        centres = next;
    }
    if ranks.size() > 1 {
        best.assignment = ranks.all_gather(&best.assignment)?;
    }
    Ok(best)
}

/// Assigns all points and updates the sums; returns how many points changed their cluster.
fn step(
    source: &dyn PointSource,
    facts: &Facts,
    nearest: &mut Nearest,
    sums: &mut ClusterSums,
    centres: &[f32],
    drift: &[f32],
) -> Result<usize> {
    let packed = Centres::new(centres, facts.d, RowFormat::fastest());
    let new = || Changes::new(sums.counts.len(), facts.d);
    let mut leaves = LeafSum::new(Changes::add);
    source.each(&mut |piece| {
        let range = piece.range();
        let before = nearest.assignment[range.clone()].to_vec();
        piece.points.assign(nearest.part(range.clone()), &packed, drift);
        let changes = leaves.leaf(piece.leaf, new);
        changes.note(piece.points, facts, piece.first, &before, &nearest.assignment[range]);
        Ok(())
    })?;
    let changes = sum_over_ranks(leaves, &source.ranks(), new)?;
    sums.apply(&changes);
    Ok(changes.points)
}

/// Returns the sum over centres of the distance between `from` and `to`.
pub fn summed_shift(from: &[f32], to: &[f32], d: usize, metric: Metric) -> f64 {
    let squares: f64 =
        from.chunks(d).zip(to.chunks(d)).map(|(x, y)| points::squared_distance(x, y)).sum();
    match metric {
        Metric::Euclidean => squares,
        Metric::Spherical => squares / 2.,
    }
}

/// The sum of the points of each cluster.
pub struct ClusterSums {
    d: usize,
    /// `Σ w x`, `(K, D)`.
    sums: Vec<f64>,
    /// `Σ w`.
    masses: Vec<f64>,
    /// Number of points with a weight above 0.
    pub counts: Vec<usize>,
}

/// Points compared in one task. Depends on the shape alone.
const PART: usize = 1024;

/// Rows of one partial sum. The partial sums are added in order, so threads change no bit.
const SUM_PART: usize = 2048;

impl ClusterSums {
    /// Empty sums of `k` clusters of points of width `d`.
    pub fn new(k: usize, d: usize) -> Self {
        Self { d, sums: vec![0.; k * d], masses: vec![0.; k], counts: vec![0; k] }
    }

    /// Moves points between the clusters.
    fn apply(&mut self, changes: &Changes) {
        let rows = self.sums.par_chunks_mut(self.d).zip(changes.sums.par_chunks(self.d));
        rows.zip(&changes.moves).filter(|(_, moves)| **moves > 0).for_each(|((sum, change), _)| {
            sum.iter_mut().zip(change).for_each(|(sum, change)| *sum += change);
        });
        for (k, count) in self.counts.iter_mut().enumerate() {
            *count = count.strict_add_signed(changes.counts[k] as isize);
            // Exactly 0 for an empty cluster, without the rounding error of the subtraction.
            self.masses[k] = if *count == 0 { 0. } else { self.masses[k] + changes.masses[k] };
        }
    }

    /// Adds points that had no cluster before.
    pub fn add(&mut self, points: &Points, assignment: &[u32]) {
        let n = points.len();
        let facts = Facts { n, d: self.d, weights: None, squares: 0., variance: 0. };
        let mut changes = Changes::new(self.counts.len(), self.d);
        changes.note(points, &facts, 0, &vec![lloyd::UNASSIGNED; n], assignment);
        self.apply(&changes);
    }

    /// Replaces the points of a cluster by a single one.
    pub fn restart(&mut self, k: usize, row: &[f32]) {
        let sum = &mut self.sums[k * self.d..][..self.d];
        sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum = f64::from(x));
        (self.masses[k], self.counts[k]) = (1., 1);
    }

    /// Width of a point, D.
    pub fn width(&self) -> usize {
        self.d
    }

    /// Returns `Σ w ‖x − c‖²`, computed as `Σ w ‖x‖² + Σ_k (m_k ‖c_k‖² − 2 s_k·c_k)`; half of it for
    /// the spherical metric.
    fn inertia(&self, centres: &[f32], metric: Metric, squares: f64) -> f64 {
        let of_centres: f64 =
            (self.sums.chunks(self.d).zip(centres.chunks(self.d)).zip(&self.masses))
                .map(|((sum, centre), &mass)| {
                    let dot: f64 = sum.iter().zip(centre).map(|(s, &c)| s * f64::from(c)).sum();
                    mass * product(centre, centre) - 2. * dot
                })
                .sum();
        let inertia = (squares + of_centres).max(0.);
        match metric {
            Metric::Euclidean => inertia,
            Metric::Spherical => inertia / 2.,
        }
    }

    /// Returns the means, of unit length if spherical. A cluster without points, or whose points
    /// cancel out, keeps its centre.
    pub fn means(&self, centres: &[f32], metric: Metric) -> Vec<f32> {
        let mut means = centres.to_vec();
        for ((mean, sum), &mass) in
            means.chunks_mut(self.d).zip(self.sums.chunks(self.d)).zip(&self.masses)
        {
            let divisor = match metric {
                Metric::Euclidean => mass,
                Metric::Spherical => {
                    let length = sum.iter().map(|s| s * s).sum::<f64>().sqrt();
                    // The sum of opposite unit rows is a rounding error, not a direction.
                    if length > 1e-6 * mass { length } else { 0. }
                }
            };
            if mass > 0. && divisor > 0. {
                mean.iter_mut().zip(sum).for_each(|(m, s)| *m = (s / divisor) as f32);
            }
        }
        means
    }
}

/// What is to be added to [`ClusterSums`] when points change their clusters.
struct Changes {
    d: usize,
    sums: Vec<f64>,
    masses: Vec<f64>,
    counts: Vec<i64>,
    /// Points that enter or leave each cluster. Without any, its sums are zero.
    moves: Vec<u64>,
    /// Points that changed their cluster.
    points: usize,
}

impl Changes {
    fn new(k: usize, d: usize) -> Self {
        let (counts, moves) = (vec![0; k], vec![0; k]);
        Self { d, sums: vec![0.; k * d], masses: vec![0.; k], counts, moves, points: 0 }
    }

    /// Adds what changes where points have other clusters than before.
    ///
    /// - `first`: the number of the first of `points`, among those of this rank.
    /// - `before`, `after`: their clusters before and after the step.
    fn note(
        &mut self,
        points: &Points,
        facts: &Facts,
        first: usize,
        before: &[u32],
        after: &[u32],
    ) {
        let d = self.d;
        let changed: Vec<usize> = (0..after.len())
            .into_par_iter()
            .with_min_len(PART)
            .filter(|&i| before[i] != after[i])
            .collect();
        self.points += changed.len();
        // The rows that enter and leave each cluster, in the order of the points.
        let mut members: Vec<Vec<(u32, f64)>> = vec![vec![]; self.counts.len()];
        for &i in &changed {
            let weight = facts.weight(first + i);
            if weight == 0. {
                continue;
            }
            members[after[i] as usize].push((i as u32, weight));
            self.count(after[i] as usize, 1, weight);
            if before[i] != lloyd::UNASSIGNED {
                members[before[i] as usize].push((i as u32, -weight));
                self.count(before[i] as usize, -1, -weight);
            }
        }
        self.sums.par_chunks_mut(d).zip(&members).for_each(|(sum, members)| {
            let parts: Vec<Vec<f64>> = members
                .par_chunks(SUM_PART)
                .map(|part| {
                    let mut sum = vec![0f64; d];
                    for &(i, weight) in part {
                        add_row(&mut sum, points.row(i as usize), weight);
                    }
                    sum
                })
                .collect();
            for part in &parts {
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        });
    }

    /// Moves one point.
    fn note_move(&mut self, row: &[f32], weight: f64, from: usize, to: usize) {
        for (k, sign) in [(from, -1), (to, 1)] {
            let weight = sign as f64 * weight;
            add_row(&mut self.sums[k * self.d..][..self.d], row, weight);
            self.count(k, sign, weight);
        }
        self.points += 1;
    }

    fn count(&mut self, k: usize, count: i64, mass: f64) {
        self.counts[k] += count;
        self.masses[k] += mass;
        self.moves[k] += 1;
    }

    /// Adds the changes of other points.
    fn add(&mut self, other: Self) {
        let rows = self.sums.par_chunks_mut(self.d).zip(other.sums.par_chunks(self.d));
        rows.zip(&other.moves).filter(|(_, moves)| **moves > 0).for_each(|((sum, more), _)| {
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        });
        for k in 0..self.counts.len() {
            self.counts[k] += other.counts[k];
            self.masses[k] += other.masses[k];
            self.moves[k] += other.moves[k];
        }
        self.points += other.points;
    }
}

/// The sum of the leaves of all ranks; `new` makes one that changes nothing.
fn sum_over_ranks(
    leaves: LeafSum<Changes>,
    ranks: &Communicator,
    new: impl FnOnce() -> Changes,
) -> Result<Changes> {
    let mut sum = leaves.sum().unwrap_or_else(new);
    if ranks.size() > 1 {
        ranks.all_reduce_sum(&mut sum.sums)?;
        ranks.all_reduce_sum(&mut sum.masses)?;
        ranks.all_reduce_sum(&mut sum.counts)?;
        ranks.all_reduce_sum(&mut sum.moves)?;
        let mut points = [sum.points as u64];
        ranks.all_reduce_sum(&mut points)?;
        sum.points = points[0] as usize;
    }
    Ok(sum)
}

/// Moves the points farthest from their centres into the empty clusters, one each; returns how many
/// were moved.
fn reseed_empty(
    source: &dyn PointSource,
    facts: &Facts,
    nearest: &mut Nearest,
    sums: &mut ClusterSums,
    centres: &[f32],
) -> Result<usize> {
    let empty: Vec<usize> = (0..sums.counts.len()).filter(|&k| sums.counts[k] == 0).collect();
    if empty.is_empty() {
        return Ok(0);
    }
    // The only point of a cluster is not moved; at worst every cluster has one of those.
    let wanted = empty.len() + sums.counts.len();
    let mut farthest: Vec<(f64, usize)> = vec![];
    source.each(&mut |piece| {
        farthest.extend(distances(&piece, facts, nearest, centres));
        sort_and_truncate(&mut farthest, wanted);
        Ok(())
    })?;
    let ranks = source.ranks();
    // The points of this rank among those of all.
    let counts: Vec<u64> = ranks.all_gather(&[facts.n as u64])?;
    let before = counts[..ranks.rank()].iter().sum::<u64>() as usize;
    let distances: Vec<f64> = farthest.iter().map(|(distance, _)| *distance).collect();
    let points: Vec<u64> = farthest.iter().map(|(_, i)| (before + i) as u64).collect();
    let own = |(_, i): &(f64, usize)| u64::from(nearest.assignment[*i]);
    let clusters: Vec<u64> = farthest.iter().map(own).collect();
    let (points, clusters) = (ranks.all_gather(&points)?, ranks.all_gather(&clusters)?);
    let mut farthest: Vec<(f64, usize)> =
        ranks.all_gather(&distances)?.into_iter().zip(0..).collect();
    // At equal places of two ranks, the lower one has the lower points.
    sort_and_truncate(&mut farthest, wanted);

    let mut counts = sums.counts.clone();
    let mut candidates =
        farthest.iter().map(|&(_, at)| (points[at] as usize, clusters[at] as usize));
    let mut chosen: Vec<Move> = vec![];
    for to in empty {
        let Some((point, from)) = candidates.find(|&(_, from)| counts[from] != 1) else {
            break;
        };
        counts[from] -= 1;
        chosen.push(Move { point, from, to });
    }
    let new = || Changes::new(sums.counts.len(), facts.d);
    let mut leaves = LeafSum::new(Changes::add);
    source.each(&mut |piece| {
        let range = piece.range();
        for &Move { point, from, to } in &chosen {
            let Some(i) = point.checked_sub(before).filter(|i| range.contains(i)) else { continue };
            let row = piece.points.row(i - piece.first);
            leaves.leaf(piece.leaf, new).note_move(row, facts.weight(i), from, to);
            nearest.reassign(i, to as u32);
        }
        Ok(())
    })?;
    let changes = sum_over_ranks(leaves, &ranks, new)?;
    sums.apply(&changes);
    Ok(chosen.len())
}

/// A point, among those of all ranks, that goes to an empty cluster.
struct Move {
    point: usize,
    from: usize,
    to: usize,
}

/// Keeps the farthest; of equals those of the lowest index.
fn sort_and_truncate(farthest: &mut Vec<(f64, usize)>, count: usize) {
    farthest.par_sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    farthest.truncate(count);
}

/// Returns the weighted points that do not coincide with their centre, with their squared distance.
fn distances(
    piece: &Piece,
    facts: &Facts,
    nearest: &Nearest,
    centres: &[f32],
) -> Vec<(f64, usize)> {
    let d = piece.points.d;
    (piece.range())
        .into_par_iter()
        .filter(|&i| facts.weight(i) > 0.)
        .map(|i| {
            let row = piece.points.row(i - piece.first);
            let centre = &centres[nearest.assignment[i] as usize * d..][..d];
            let distance = points::squared_distance(row, centre);
            // A point that differs from its centre by rounding alone is not far from it.
            let size = product(row, row).max(product(centre, centre));
            (if distance > 1e-12 * size { distance } else { 0. }, i)
        })
        .filter(|&(distance, _)| distance > 0.)
        .collect()
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::k_means_from;

    /// Textbook Lloyd's iterations, until the assignment repeats; no cluster may become empty.
    fn plain(points: &[f32], d: usize, mut centres: Vec<f32>) -> (Vec<u32>, f64) {
        let k = centres.len() / d;
        let mut before = vec![];
        loop {
            let score = |x: &[f32], c: &[f32]| product(x, c) - product(c, c) / 2.;
            let assignment: Vec<u32> = points
                .chunks(d)
                .map(|x| {
                    let best = (0..k).map(|c| (score(x, &centres[c * d..][..d]), c));
                    best.reduce(|a, b| if b.0 > a.0 { b } else { a }).expect("a centre").1 as u32
                })
                .collect();
            if assignment == before {
                let own = |(x, &c): (&[f32], &u32)| {
                    points::squared_distance(x, &centres[c as usize * d..][..d])
                };
                let inertia = points.chunks(d).zip(&assignment).map(own).sum();
                return (assignment, inertia);
            }
            let mut sums = vec![0f64; k * d];
            let mut counts = vec![0f64; k];
            for (x, &c) in points.chunks(d).zip(&assignment) {
                add_row(&mut sums[c as usize * d..][..d], x, 1.);
                counts[c as usize] += 1.;
            }
            for (i, (centre, sum)) in centres.iter_mut().zip(&sums).enumerate() {
                assert!(counts[i / d] > 0., "the test needs points that leave no cluster empty");
                *centre = (sum / counts[i / d]) as f32;
            }
            before = assignment;
        }
    }

    #[test]
    fn the_result_is_that_of_textbook_iterations() -> Result<()> {
        let mut random = stage::random::stream(11, "lloyd", &[]);
        for (n, d, clusters) in [(3000, 12, 40), (2000, 3, 25), (1500, 64, 10), (400, 2, 7)] {
            // Whole numbers around zero: sums are exact and ties are many.
            let mut points: Vec<f32> =
                (0..n * d).map(|_| random.random_range(-8..=8) as f32).collect();
            // As many points again mirrored, so that the mean is zero and nothing is shifted.
            points.extend(points.clone().iter().map(|x| -x));
            let start = points[..clusters * d].to_vec();
            let config = KMeans {
                clusters,
                metric: Metric::Euclidean,
                restarts: 1,
                iterations: 500,
                tolerance: 0.,
            };
            let found = k_means_from(&points, 2 * n, d, &start, &config)?;
            let (assignment, inertia) = plain(&points, d, start);
            assert!(found.converged && found.iterations > 3, "{}", found.iterations);
            assert_eq!(found.assignment, assignment, "{n} {d} {clusters}");
            assert!((found.inertia / inertia - 1.).abs() < 1e-9, "{} {inertia}", found.inertia);
        }
        Ok(())
    }
}
