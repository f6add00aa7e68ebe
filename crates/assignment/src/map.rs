//! Two-dimensional maps of points: t-SNE on their nearest neighbours.
//!
//! [`TSne`] places points so that neighbours stay neighbours (van der Maaten and Hinton 2008). Affinities
//! are uniform on the graph of nearest neighbours, which gives almost the map of Gaussian ones (Böhm,
//! Berens and Kobak 2022, arXiv:2007.08902). Repulsion is summed over the cells of a tree (Barnes-Hut; van
//! der Maaten 2014), for up to 16 points of a leaf at once. Distances between separate groups, and the sizes
//! and densities of groups, mean nothing in such a map.
//!
//! Of the kept crates, `bhtsne` 0.7.13 has the same algorithm and takes neighbours, but its source normalises
//! affinities and centres the map by sums whose order depends on the number of threads, and it cannot be
//! stopped; `linfa-tsne` wraps an older one. By their descriptions, `fast-umap` brings a framework of its own,
//! and `annembed` and `umap-rs` search for neighbours only approximately.
//!
//! The same bits on any number of threads: every sum is over one point, one group of points, or in order.

use anyhow::{Result, ensure};
use kernels::Variant;
use kernels::repulsion::{self, LANES, Repulsion};
use kernels::similarity::product;
use rand::RngExt;
use rayon::prelude::*;

use crate::points;

/// The schedule of a map. [`TSne::STANDARD`] is the usual one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TSne {
    /// First iterations, in which attraction is exaggerated, so that groups can pass each other.
    pub early_iterations: usize,
    /// Iterations after them.
    pub late_iterations: usize,
    /// Factor of attraction in the first iterations.
    pub exaggeration: f32,
    /// Largest ratio of a cell's extent to its distance at which the cell counts as one point. 0 sums over
    /// all pairs.
    pub angle: f32,
}

impl TSne {
    /// The schedule of Belkina et al. 2019 with fewer late iterations; the angle is that of whole groups of
    /// points, whose distances are lower bounds, so it is as exact as 0.5 for single points.
    pub const STANDARD: Self =
        Self { early_iterations: 250, late_iterations: 500, exaggeration: 12., angle: 0.7 };

    /// Maps `N` points to two dimensions by minimising
    ///
    /// `KL = Σ_ij p_ij ln(p_ij / q_ij)`, `q_ij = w_ij / Σ_kl w_kl`, `w_ij = 1 / (1 + ‖y_i − y_j‖²)`,
    ///
    /// `p_ij = ([j near i] + [i near j]) / 2kN`, with van der Maaten's momentum and gains, at the learning
    /// rate `N / (4 · exaggeration)`.
    ///
    /// - `start`: rough positions, such as [`principal_plane`]'s; their scale does not matter.
    /// - `neighbours`: the `k` nearest others of each point, `(N, k)`, as
    ///   [`nearest_neighbours`](crate::nearest_neighbours) returns them; 15 are usual.
    /// - `seed`: of the tiny random shifts that separate equal positions.
    /// - `proceed`: called with the number of each iteration before it; an error ends the work.
    ///
    /// Returns the positions, around the origin. Fewer than two points, or points without neighbours, are
    /// at the origin.
    ///
    /// # Errors
    ///
    /// Lengths contradict each other, a neighbour is not one of the points, a start is not finite, or
    /// `proceed` returns an error.
    pub fn map(
        &self,
        start: &[[f32; 2]],
        neighbours: &[u32],
        seed: u64,
        mut proceed: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<[f32; 2]>> {
        let n = start.len();
        ensure!(
            neighbours.len().is_multiple_of(n.max(1)),
            "TSne::map: {} neighbours do not divide among {n} points",
            neighbours.len()
        );
        ensure!(
            neighbours.iter().all(|&j| (j as usize) < n),
            "TSne::map: a neighbour is not one of the {n} points"
        );
        ensure!(
            start.iter().flatten().all(|x| x.is_finite()),
            "TSne::map: a start is not finite; look at what computed it"
        );
        if n < 2 || neighbours.is_empty() {
            return Ok(vec![[0.; 2]; n]);
        }
        let graph = NeighbourGraph::new(neighbours, n);
        let mut descent = Descent::new(small(start, seed));
        let rate = n as f32 / (4. * self.exaggeration);
        for iteration in 0..self.early_iterations + self.late_iterations {
            proceed(iteration)?;
            let is_early = iteration < self.early_iterations;
            let (exaggeration, momentum) =
                if is_early { (self.exaggeration, 0.5) } else { (1., 0.8) };
            let gradient = gradient(&graph, &descent.positions, exaggeration, self.angle);
            descent.step(&gradient, rate, momentum);
            descent.hold_scale();
        }
        Ok(descent.positions)
    }
}

/// Projects each row of `points` `(N, D)` on the two directions of largest variance.
///
/// Found by subspace iteration from random directions, in a fixed number of steps: good enough for the
/// start of a map, not for statistics.
///
/// # Errors
///
/// `points` is not an `(n, d)` matrix of finite numbers; the message names the row.
pub fn principal_plane(points: &[f32], n: usize, d: usize) -> Result<Vec<[f32; 2]>> {
    const STEPS: u64 = 12;
    points::check(points, n, d, "principal_plane")?;
    let means: Vec<f32> =
        points::weighted_means(points, d, None).into_iter().map(|mean| mean as f32).collect();
    let mut random = stage::random::stream(0, "principal-plane", &[d as u64]);
    let mut draw = || -> Vec<f32> { (0..d).map(|_| random.random::<f32>() - 0.5).collect() };
    let mut axes = [draw(), draw()];
    orthonormalise(&mut axes);
    let scores = |axes: &[Vec<f32>; 2]| -> Vec<[f32; 2]> {
        let shifts = [0, 1].map(|a| product(&means, &axes[a]));
        let score = |row: &[f32]| [0, 1].map(|a| (product(row, &axes[a]) - shifts[a]) as f32);
        points.par_chunks(d).map(score).collect()
    };
    for _ in 0..STEPS {
        let scores = scores(&axes);
        axes = [0, 1].map(|a| {
            let weights: Vec<f32> = scores.iter().map(|score| score[a]).collect();
            let sums = points::column_sums(points, d, Some(&weights));
            // The weights sum to zero, up to rounding.
            let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            let centred = sums.iter().zip(&means).map(|(x, &mean)| x - sum * f64::from(mean));
            let largest = centred.clone().fold(0., |most: f64, x| most.max(x.abs())).max(1e-30);
            centred.map(|x| (x / largest) as f32).collect()
        });
        orthonormalise(&mut axes);
    }
    Ok(scores(&axes))
}

/// Makes two rows orthogonal and of unit length; a row without a direction becomes zero.
fn orthonormalise(axes: &mut [Vec<f32>; 2]) {
    let unit = |row: &mut [f32]| {
        let length = product(row, row).sqrt();
        let factor = if length > 1e-6 { 1. / length } else { 0. };
        row.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    };
    let [first, second] = axes;
    unit(first);
    unit(second);
    let along = product(first, second);
    second
        .iter_mut()
        .zip(&*first)
        .for_each(|(y, x)| *y = (f64::from(*y) - along * f64::from(*x)) as f32);
    unit(second);
}

/// Measures how far neighbours in a map are neighbours among the points: Venna and Kaski 2001.
///
/// `1 − 2 / (N k (2N − 3k − 1)) · Σ_i Σ_{j near i in the map only} (rank_i(j) − k)`, where `rank_i(j)`
/// counts from 1, the nearest other point by inner product. In `[0, 1]`: 1 if no point is near in the map
/// that is not among the `k` nearest; about ½ for a random map.
///
/// - `step`: judges the points `i` = 0, `step`, 2 `step` …; 1 judges all. Each is compared with all
///   others: `N² D / step` products.
///
/// # Errors
///
/// `points` is not an `(n, d)` matrix of finite numbers, the map has another number of points, `k` is not
/// in `1..n / 2`, or `step` is 0.
pub fn trustworthiness(
    points: &[f32],
    n: usize,
    d: usize,
    map: &[[f32; 2]],
    k: usize,
    step: usize,
) -> Result<f64> {
    points::check(points, n, d, "trustworthiness")?;
    ensure!(map.len() == n, "trustworthiness: a map of {} points, but there are {n}", map.len());
    ensure!(
        k > 0 && 2 * k < n,
        "trustworthiness: {k} neighbours of {n} points; take 1 to N / 2 − 1"
    );
    ensure!(step > 0, "trustworthiness: a step of 0; 1 judges every point");
    let row = |i: usize| &points[i * d..][..d];
    let excess = |i: usize| -> u64 {
        let others = || (0..n as u32).filter(|&j| j as usize != i);
        let mut near: Vec<(f64, u32)> =
            others().map(|j| (-product(row(i), row(j as usize)), j)).collect();
        near.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut ranks = vec![0; n];
        near.iter().enumerate().for_each(|(rank, &(_, j))| ranks[j as usize] = rank as u64 + 1);
        let mut shown: Vec<(f32, u32)> =
            others().map(|j| (squared_distance(map[i], map[j as usize]), j)).collect();
        shown.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        shown[..k].iter().map(|&(_, j)| ranks[j as usize].saturating_sub(k as u64)).sum()
    };
    let excess: u64 = (0..n).into_par_iter().step_by(step).map(excess).sum();
    let most = (n.div_ceil(step) * k * (2 * n - 3 * k - 1)) as f64;
    Ok(1. - 2. * excess as f64 / most)
}

fn squared_distance(a: [f32; 2], b: [f32; 2]) -> f32 {
    (a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2)
}

/// Standard deviation of the start along its wider axis.
const START: f64 = 1e-4;

/// The start scaled to a standard deviation of [`START`], with random shifts of a hundredth of that.
fn small(start: &[[f32; 2]], seed: u64) -> Vec<[f32; 2]> {
    let (mean, deviation) = (mean(start), deviation(start));
    let factor = if deviation > 0. { START / deviation } else { 0. };
    let mut random = stage::random::stream(seed, "map", &[]);
    let mut shift = || 1e-6 * (f64::from(random.random::<f32>()) - 0.5);
    let place =
        |y: &[f32; 2]| [0, 1].map(|a| ((f64::from(y[a]) - mean[a]) * factor + shift()) as f32);
    start.iter().map(place).collect()
}

/// The standard deviation along the wider axis.
fn deviation(positions: &[[f32; 2]]) -> f64 {
    let mean = mean(positions);
    let square = |y: &[f32; 2]| [0, 1].map(|a| (f64::from(y[a]) - mean[a]).powi(2));
    let sums = positions.iter().map(square).fold([0.; 2], |sums, y| [0, 1].map(|a| sums[a] + y[a]));
    (sums[0].max(sums[1]) / positions.len().max(1) as f64).sqrt()
}

fn mean(positions: &[[f32; 2]]) -> [f64; 2] {
    [0, 1].map(|a| {
        positions.iter().map(|y| f64::from(y[a])).sum::<f64>() / positions.len().max(1) as f64
    })
}

/// The points near each point, and those that it is near to; mutual neighbours are there twice.
struct NeighbourGraph {
    /// Where the points of each point begin, `N + 1`.
    offsets: Vec<usize>,
    points: Vec<u32>,
    /// The affinity of one entry, `1 / 2kN`.
    affinity: f64,
}

impl NeighbourGraph {
    fn new(neighbours: &[u32], n: usize) -> Self {
        let k = neighbours.len() / n;
        let mut offsets = vec![0; n + 1];
        (1..=n).for_each(|i| offsets[i] = k);
        neighbours.iter().for_each(|&j| offsets[j as usize + 1] += 1);
        (0..n).for_each(|i| offsets[i + 1] += offsets[i]);
        let mut ends = offsets.clone();
        let mut points = vec![0; 2 * neighbours.len()];
        let mut push = |i: usize, j: usize| {
            points[ends[i]] = j as u32;
            ends[i] += 1;
        };
        for (entry, &j) in neighbours.iter().enumerate() {
            push(entry / k, j as usize);
            push(j as usize, entry / k);
        }
        Self { offsets, points, affinity: 0.5 / neighbours.len() as f64 }
    }

    /// `Σ_j w_ij (y_i − y_j)` over the entries of point `i`.
    fn pull(&self, positions: &[[f32; 2]], i: usize) -> [f32; 2] {
        let own = positions[i];
        let mut pull = [0f32; 2];
        for &j in &self.points[self.offsets[i]..self.offsets[i + 1]] {
            let other = positions[j as usize];
            let weight = 1. / (1. + squared_distance(own, other));
            (0..2).for_each(|a| pull[a] += weight * (own[a] - other[a]));
        }
        pull
    }
}

/// The gradient at each position,
/// `4 Σ_j (exaggeration · p_ij − q_ij) w_ij (y_i − y_j)`: van der Maaten and Hinton 2008, Eq. 5.
fn gradient(
    graph: &NeighbourGraph,
    positions: &[[f32; 2]],
    exaggeration: f32,
    angle: f32,
) -> Vec<[f32; 2]> {
    let (push, total) = Tree::new(positions).repulsion(angle);
    let pull_factor = (4. * f64::from(exaggeration) * graph.affinity) as f32;
    // Points so far apart that `f32` adds nothing no longer repel each other.
    let push_factor = if total > 0. { (4. / total) as f32 } else { 0. };
    (0..positions.len())
        .into_par_iter()
        .map(|i| {
            let pull = graph.pull(positions, i);
            [0, 1].map(|a| pull_factor * pull[a] - push_factor * push[i][a])
        })
        .collect()
}

/// Gradient descent with momentum and a gain for each coordinate, which grows while its gradient keeps its
/// direction: Jacobs 1988, as in van der Maaten's programs.
struct Descent {
    positions: Vec<[f32; 2]>,
    updates: Vec<[f32; 2]>,
    gains: Vec<[f32; 2]>,
}

impl Descent {
    fn new(positions: Vec<[f32; 2]>) -> Self {
        let n = positions.len();
        Self { positions, updates: vec![[0.; 2]; n], gains: vec![[1.; 2]; n] }
    }

    fn step(&mut self, gradient: &[[f32; 2]], rate: f32, momentum: f32) {
        let of_point = (self.updates.par_iter_mut().zip(&mut self.gains))
            .zip(self.positions.par_iter_mut().zip(gradient));
        of_point.for_each(|((update, gain), (position, gradient))| {
            for a in 0..2 {
                let is_turning = (gradient[a] > 0.) == (update[a] > 0.);
                gain[a] = if is_turning { (gain[a] * 0.8).max(0.01) } else { gain[a] + 0.2 };
                update[a] = momentum * update[a] - rate * gain[a] * gradient[a];
                position[a] += update[a];
            }
        });
        let mean = mean(&self.positions);
        self.positions
            .par_iter_mut()
            .for_each(|y| (0..2).for_each(|a| y[a] = (f64::from(y[a]) - mean[a]) as f32));
    }

    /// Scales a map that shrinks to nothing back to the deviation of the start.
    ///
    /// Where no groups of points are apart, exaggerated attraction outweighs repulsion everywhere, and each
    /// iteration shrinks the map. Far below 1 all weights are equal and an iteration is linear, so its scale
    /// means nothing; but `f32` ends at 10⁻³⁸.
    fn hold_scale(&mut self) {
        const SMALLEST: f64 = 1e-2 * START;
        let deviation = deviation(&self.positions);
        if deviation > 0. && deviation < SMALLEST {
            let factor = START / deviation;
            let scale = |y: &mut [f32; 2]| *y = y.map(|x| (f64::from(x) * factor) as f32);
            self.positions.iter_mut().for_each(scale);
            self.updates.iter_mut().for_each(scale);
        }
    }
}

/// Points of a leaf of the tree.
const LEAF: usize = LANES;

/// Levels of the tree: bits of a coordinate in a Morton code.
const LEVELS: u32 = 16;

/// Points sorted along a Morton curve, and the cells that hold runs of them, each before its parts.
struct Tree {
    /// The point at each place of the curve.
    points: Vec<u32>,
    positions: Vec<[f32; 2]>,
    cells: Vec<Cell>,
}

struct Cell {
    /// Mean of the positions.
    centre: [f32; 2],
    count: f32,
    /// Longer side of the box around the positions.
    extent: f32,
    /// Places of the points.
    first: u32,
    end: u32,
    /// The cell after this one and its parts.
    next: u32,
    is_leaf: bool,
}

impl Tree {
    fn new(positions: &[[f32; 2]]) -> Self {
        let [low, high] = bounds(positions);
        let longer = (high[0] - low[0]).max(high[1] - low[1]);
        let scale = if longer > 0. { ((1u32 << LEVELS) - 1) as f32 / longer } else { 0. };
        let code = |y: &[f32; 2]| {
            let [x, y] = [0, 1].map(|a| u64::from(spread(((y[a] - low[a]) * scale) as u32)));
            x | y << 1
        };
        let mut keys: Vec<u64> =
            positions.par_iter().enumerate().map(|(i, y)| code(y) << 32 | i as u64).collect();
        keys.par_sort_unstable();
        let points: Vec<u32> = keys.iter().map(|&key| key as u32).collect();
        let positions = points.par_iter().map(|&i| positions[i as usize]).collect();
        let mut tree = Self { points, positions, cells: Vec::new() };
        tree.add(&keys, 0, 2 * LEVELS);
        tree
    }

    /// Adds the cell of a run of keys, which starts at place `first`, and its parts.
    ///
    /// - `bits`: low bits of the codes in which the keys may differ.
    fn add(&mut self, keys: &[u64], first: usize, bits: u32) {
        let own = self.cells.len();
        let positions = &self.positions[first..first + keys.len()];
        let is_leaf = keys.len() <= LEAF || bits == 0;
        let [low, high] = bounds(positions);
        let sums =
            positions.iter().fold([0f64; 2], |sums, y| [0, 1].map(|a| sums[a] + f64::from(y[a])));
        self.cells.push(Cell {
            centre: sums.map(|sum| (sum / keys.len() as f64) as f32),
            count: keys.len() as f32,
            extent: (high[0] - low[0]).max(high[1] - low[1]),
            first: first as u32,
            end: (first + keys.len()) as u32,
            next: 0,
            is_leaf,
        });
        if !is_leaf {
            let quadrant = |key: u64| key >> (32 + bits - 2) & 3;
            let mut start = 0;
            while start < keys.len() {
                let of = quadrant(keys[start]);
                let end = start + keys[start..].partition_point(|&key| quadrant(key) == of);
                self.add(&keys[start..end], first + start, bits - 2);
                start = end;
            }
        }
        self.cells[own].next = self.cells.len() as u32;
    }

    /// Returns `Σ_j w_ij² (y_i − y_j)` for each point, and `Σ_ij w_ij` over all pairs of different points.
    fn repulsion(&self, angle: f32) -> (Vec<[f32; 2]>, f64) {
        let leaves: Vec<&Cell> = self.cells.iter().filter(|cell| cell.is_leaf).collect();
        let groups: Vec<(usize, usize)> = leaves
            .iter()
            .flat_map(|leaf| {
                let (first, end) = (leaf.first as usize, leaf.end as usize);
                (first..end).step_by(LEAF).map(move |start| (start, end.min(start + LEAF)))
            })
            .collect();
        let sums: Vec<Repulsion> =
            groups.par_iter().map(|&(start, end)| self.repel(start, end, angle)).collect();
        let mut push = vec![[0.; 2]; self.points.len()];
        let mut total = 0.;
        for (&(start, end), lanes) in groups.iter().zip(&sums) {
            for (lane, &point) in self.points[start..end].iter().enumerate() {
                push[point as usize] = [lanes.push[0][lane], lanes.push[1][lane]];
                // Without the pair of the point with itself.
                total += f64::from(lanes.weight[lane]) - 1.;
            }
        }
        (push, total)
    }

    /// Sums over all points for those at the places `start..end`.
    fn repel(&self, start: usize, end: usize, angle: f32) -> Repulsion {
        let positions = &self.positions[start..end];
        let [low, high] = bounds(positions);
        let mut sources = Vec::new();
        let mut place = 0;
        while let Some(cell) = self.cells.get(place) {
            let gap = |a: usize| (low[a] - cell.centre[a]).max(cell.centre[a] - high[a]).max(0.);
            let distance = gap(0).powi(2) + gap(1).powi(2);
            // Points of a leaf that is too full are as good as equal: the cell could not be split.
            let is_one = cell.is_leaf && cell.count > LEAF as f32;
            if is_one || cell.extent * cell.extent < angle * angle * distance {
                sources.push([cell.centre[0], cell.centre[1], cell.count]);
                place = cell.next as usize;
            } else if cell.is_leaf {
                let others = &self.positions[cell.first as usize..cell.end as usize];
                sources.extend(others.iter().map(|&[x, y]| [x, y, 1.]));
                place = cell.next as usize;
            } else {
                place += 1;
            }
        }
        let mut lanes = [[0.; LANES]; 2];
        for (lane, point) in positions.iter().enumerate() {
            (0..2).for_each(|a| lanes[a][lane] = point[a]);
        }
        let mut sums = Repulsion::default();
        repulsion::add(Variant::fastest(), &lanes, &sources, &mut sums);
        sums
    }
}

/// The lowest and the highest coordinates.
fn bounds(positions: &[[f32; 2]]) -> [[f32; 2]; 2] {
    let start = [[f32::INFINITY; 2], [f32::NEG_INFINITY; 2]];
    positions.iter().fold(start, |[low, high], y| {
        [[0, 1].map(|a| low[a].min(y[a])), [0, 1].map(|a| high[a].max(y[a]))]
    })
}

/// Moves the 16 low bits of a number to the even bits.
fn spread(number: u32) -> u32 {
    let mut x = number & 0xffff;
    for (shift, mask) in [(8, 0x00ff_00ff), (4, 0x0f0f_0f0f), (2, 0x3333_3333), (1, 0x5555_5555)] {
        x = (x | x << shift) & mask;
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nearest_neighbours;

    /// Unit rows around as many random directions as there are groups, in turns, with noise in three
    /// columns.
    fn groups(n: usize, d: usize, groups: usize, noise: f32) -> Vec<f32> {
        let mut random = stage::random::stream(5, "map-test", &[n as u64]);
        let mut draw = || random.random::<f32>() - 0.5;
        let centres: Vec<f32> = (0..groups * d).map(|_| draw()).collect();
        let mut value = |i: usize| {
            let noise = if i % d < 3 { noise * draw() } else { 0. };
            centres[i / d % groups * d + i % d] + noise
        };
        let mut rows: Vec<f32> = (0..n * d).map(&mut value).collect();
        points::scale(&mut rows, d, "test").expect("directions");
        rows
    }

    fn positions(n: usize, spread: f32) -> Vec<[f32; 2]> {
        let mut random = stage::random::stream(6, "map-test", &[n as u64]);
        let mut draw = || spread * (random.random::<f32>() - 0.5);
        (0..n).map(|_| [draw(), draw()]).collect()
    }

    #[test]
    fn the_gradient_of_three_points_is_that_computed_by_hand() {
        let graph = NeighbourGraph::new(&[1, 0, 0], 3);
        let at = [[0., 0.], [1., 0.], [0., 2.]];
        let found = gradient(&graph, &at, 1., 0.);
        // p₀₁ = 1/3, p₀₂ = 1/6; w₀₁ = 1/2, w₀₂ = 1/5, w₁₂ = 1/6; q₀₁ = 15/52, q₀₂ = 3/26.
        let want = [-2. * (1. / 3. - 15. / 52.), -1.6 * (1. / 6. - 3. / 26.)];
        for a in 0..2 {
            assert!((found[0][a] - want[a]).abs() < 1e-6, "{found:?}, want {want:?}");
        }
    }

    /// `Σ p ln p − exaggeration · Σ p ln w + ln Σ w`, which is KL where nothing is exaggerated.
    fn divergence(graph: &NeighbourGraph, at: &[[f64; 2]], exaggeration: f64) -> f64 {
        let weight = |i: usize, j: usize| {
            1. / (1. + (at[i][0] - at[j][0]).powi(2) + (at[i][1] - at[j][1]).powi(2))
        };
        let (mut all, mut value) = (0., 0.);
        for i in 0..at.len() {
            let near = &graph.points[graph.offsets[i]..graph.offsets[i + 1]];
            for j in (0..at.len()).filter(|&j| j != i) {
                all += weight(i, j);
                let p = near.iter().filter(|&&other| other as usize == j).count() as f64
                    * graph.affinity;
                if p > 0. {
                    value += p * p.ln() - exaggeration * p * weight(i, j).ln();
                }
            }
        }
        value + all.ln()
    }

    #[test]
    fn the_gradient_matches_central_differences() -> Result<()> {
        let (n, d, h) = (40, 6, 1e-5);
        let graph = NeighbourGraph::new(&nearest_neighbours(&groups(n, d, 3, 1.), n, d, 4)?, n);
        let at = positions(n, 3.);
        let exact: Vec<[f64; 2]> = at.iter().map(|y| y.map(f64::from)).collect();
        for exaggeration in [1f32, 12.] {
            let found = gradient(&graph, &at, exaggeration, 0.);
            for i in 0..n {
                for a in 0..2 {
                    let value = |by: f64| {
                        let mut at = exact.clone();
                        at[i][a] += by;
                        divergence(&graph, &at, f64::from(exaggeration))
                    };
                    let want = (value(h) - value(-h)) / (2. * h);
                    let got = f64::from(found[i][a]);
                    assert!(
                        (got - want).abs() < 1e-6 * f64::from(exaggeration),
                        "{got}, want {want}"
                    );
                }
            }
        }
        Ok(())
    }

    #[test]
    fn cells_of_the_tree_stand_for_their_points() {
        // Spread out, with many equal positions among them.
        let mut at = positions(3000, 60.);
        (0..400).for_each(|i| at[i] = at[0]);
        let tree = Tree::new(&at);
        let (exact, all) = tree.repulsion(0.);
        let (found, total) = tree.repulsion(TSne::STANDARD.angle);
        let length = |rows: &[[f32; 2]]| rows.iter().flatten().map(|x| x * x).sum::<f32>().sqrt();
        let difference: Vec<[f32; 2]> =
            (found.iter().zip(&exact)).map(|(a, b)| [a[0] - b[0], a[1] - b[1]]).collect();
        let error = length(&difference) / length(&exact);
        assert!(error < 0.02, "relative error {error}");
        assert!((total / all - 1.).abs() < 0.005, "{total}, want {all}");
        // All pairs, by hand.
        let sum = |i: usize| -> f64 {
            let weight = |other: &[f32; 2]| 1. / (1. + f64::from(squared_distance(at[i], *other)));
            at.iter().map(weight).sum::<f64>() - 1.
        };
        let want: f64 = (0..at.len()).map(sum).sum();
        assert!((all / want - 1.).abs() < 1e-5, "{all}, want {want}");
    }

    fn map(points: &[f32], n: usize, d: usize, k: usize) -> Result<Vec<[f32; 2]>> {
        let near = nearest_neighbours(points, n, d, k)?;
        let schedule = TSne { late_iterations: 250, ..TSne::STANDARD };
        schedule.map(&principal_plane(points, n, d)?, &near, 0, |_| Ok(()))
    }

    #[test]
    fn neighbours_in_a_map_are_neighbours_among_the_points() -> Result<()> {
        let (n, d) = (600, 16);
        let points = groups(n, d, 6, 0.8);
        let found = map(&points, n, d, 15)?;
        let trust = trustworthiness(&points, n, d, &found, 12, 1)?;
        assert!(trust > 0.98, "{trust}");
        // Only the groups are right, or nothing.
        let mut within = found.clone();
        (0..n).for_each(|i| within[i] = found[(i + 6 * (i % 7)) % n]);
        let of_groups = trustworthiness(&points, n, d, &within, 12, 1)?;
        assert!(of_groups < 0.95, "{of_groups}");
        let of_nothing = trustworthiness(&points, n, d, &positions(n, 1.), 12, 1)?;
        assert!(of_nothing < 0.6, "{of_nothing}");
        Ok(())
    }

    #[test]
    fn a_map_of_points_without_groups_does_not_shrink_to_nothing() -> Result<()> {
        let (n, d) = (600, 64);
        let mut random = stage::random::stream(7, "map-test", &[]);
        let mut points: Vec<f32> = (0..n * d).map(|_| random.random::<f32>() - 0.5).collect();
        points::scale(&mut points, d, "test")?;
        let (start, near) =
            (principal_plane(&points, n, d)?, nearest_neighbours(&points, n, d, 15)?);
        let exaggerated = TSne { late_iterations: 0, exaggeration: 40., ..TSne::STANDARD };
        let shrunk = exaggerated.map(&start, &near, 0, |_| Ok(()))?;
        assert!(deviation(&shrunk) > 1e-3 * START, "{}", deviation(&shrunk));
        let found =
            TSne { late_iterations: 500, ..exaggerated }.map(&start, &near, 0, |_| Ok(()))?;
        assert!(deviation(&found) > 1., "{}", deviation(&found));
        let trust = trustworthiness(&points, n, d, &found, 12, 1)?;
        let of_nothing = trustworthiness(&points, n, d, &positions(n, 1.), 12, 1)?;
        assert!(trust > of_nothing + 0.15, "{trust}, {of_nothing} at random");
        Ok(())
    }

    #[test]
    fn any_number_of_threads_makes_the_same_map_and_the_work_can_be_stopped() -> Result<()> {
        let (n, d) = (300, 8);
        let points = groups(n, d, 4, 1.);
        let want = map(&points, n, d, 10)?;
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            assert_eq!(pool.install(|| map(&points, n, d, 10))?, want);
        }
        let near = nearest_neighbours(&points, n, d, 10)?;
        let stop = |iteration| {
            ensure!(iteration < 3, "stopped");
            Ok(())
        };
        let error = TSne::STANDARD.map(&want, &near, 0, stop).expect_err("stopped").to_string();
        assert_eq!(error, "stopped");
        Ok(())
    }

    #[test]
    fn few_and_equal_points_have_a_finite_map() -> Result<()> {
        for n in [0, 1] {
            assert_eq!(
                TSne::STANDARD.map(&vec![[3., 1.]; n], &[], 0, |_| Ok(()))?,
                vec![[0.; 2]; n]
            );
        }
        for (n, k) in [(2, 1), (3, 2), (40, 5)] {
            let equal = [1f32, 0.].repeat(n);
            let found = map(&equal, n, 2, k)?;
            assert!(found.iter().flatten().all(|x| x.is_finite()), "{n}: {found:?}");
            let [low, high] = bounds(&found);
            assert!(high[0] - low[0] < 1000. && high[0] > low[0], "{n}: {found:?}");
        }
        let refused = |start: &[[f32; 2]], near: &[u32]| {
            TSne::STANDARD.map(start, near, 0, |_| Ok(())).expect_err("refused").to_string()
        };
        assert!(refused(&[[0.; 2]; 2], &[1, 2]).contains("not one of the 2"));
        assert!(refused(&[[0.; 2]; 2], &[1]).contains("do not divide"));
        assert!(refused(&[[f32::NAN; 2]; 2], &[1, 0]).contains("not finite"));
        Ok(())
    }

    #[test]
    fn the_principal_plane_has_the_largest_variances() -> Result<()> {
        // Wide along (3, 4) / 5, less along (−4, 3) / 5, least along the third axis, around (7, 7, 7).
        let draws = positions(500, 2.);
        let points: Vec<f32> = (draws.iter().enumerate())
            .flat_map(|(i, &[u, v])| {
                let w = 0.01 * (i % 7) as f32;
                [7. + 3. * u * 3. - v * 0.8, 7. + 3. * u * 4. + v * 0.6, 7. + w]
            })
            .collect();
        let plane = principal_plane(&points, 500, 3)?;
        let product = |a: usize, b: fn(&[f32; 2]) -> f32| {
            plane.iter().zip(&draws).map(|(x, draw)| x[a] * b(draw)).sum::<f32>().abs()
        };
        let own: f32 = draws.iter().map(|draw| draw[0] * draw[0]).sum();
        assert!((product(0, |draw| draw[0]) / own - 15.).abs() < 0.2);
        assert!(product(1, |draw| draw[1]) > 10. * product(1, |draw| draw[0]));
        assert!(mean(&plane).iter().all(|x| x.abs() < 1e-3));
        Ok(())
    }

    #[test]
    fn trustworthiness_is_that_computed_by_hand() -> Result<()> {
        let angles = [0f32, 10., 30., 60., 100.];
        let points: Vec<f32> = (angles.iter().map(|angle| angle.to_radians()))
            .flat_map(|angle| [angle.cos(), angle.sin()])
            .collect();
        let line = |at: [f32; 5]| at.map(|x| [x, 0.]);
        assert_eq!(trustworthiness(&points, 5, 2, &line(angles), 1, 1)?, 1.);
        // Points 0 and 3 changed places: nearest in the map are 2, 3, 1, 1, 0, of ranks 2, 3, 1, 3, 4.
        let found = trustworthiness(&points, 5, 2, &line([60., 10., 30., 0., 100.]), 1, 1)?;
        assert!((found - (1. - 16. / 30.)).abs() < 1e-12, "{found}");
        // Points 0, 2 and 4 alone: ranks 2, 1 and 4.
        let found = trustworthiness(&points, 5, 2, &line([60., 10., 30., 0., 100.]), 1, 2)?;
        assert!((found - (1. - 8. / 18.)).abs() < 1e-12, "{found}");
        assert!(trustworthiness(&points, 5, 2, &line(angles), 3, 1).is_err());
        Ok(())
    }
}
