//! Exact nearest neighbours by inner product.
//!
//! The product of each pair is computed once for both rows, approximately and a tile at a time
//! ([`kernels::similarity`]). Each row keeps a shortlist: the rows that may be among its nearest,
//! given the proven bound on the error of a product. At the end the few on the shortlist are
//! compared in `f64`, so the result equals that of `f64` products of all pairs. Ranks divide the pairs, and merge
//! their lists by those products.

use std::cmp::Ordering;
use std::sync::Mutex;

use anyhow::{Result, ensure};
use bytemuck::{Pod, Zeroable};
use collective::Communicator;
use kernels::similarity::{
    Bound, GROUP, LANES, Panel, RowFormat, RowGroups, Rows, Tile, product, products, reached,
    rows_reached,
};
use rayon::prelude::*;

use crate::points;

/// Finds the `k` other rows of highest inner product for each row of `points` `(N, D)`.
///
/// For rows of unit length the inner product is the cosine. A row is not its own neighbour. Equal
/// products (in `f64`) are ordered by index. Returns `(N, k)` indices, nearest first.
///
/// # Errors
///
/// `points` is not an `(n, d)` matrix of finite numbers (the message names the row), or there are
/// fewer than `k` other rows.
pub fn nearest_neighbours(points: &[f32], n: usize, d: usize, k: usize) -> Result<Vec<u32>> {
    nearest_neighbours_on_ranks(points, n, d, k, &Communicator::single())
}

/// [`nearest_neighbours`] whose comparisons are divided among `ranks`. The result has the same bits on any number
/// of them.
///
/// - `points`: the same on all ranks.
///
/// # Errors
///
/// Those of [`nearest_neighbours`], or a rank has ended.
pub fn nearest_neighbours_on_ranks(
    points: &[f32],
    n: usize,
    d: usize,
    k: usize,
    ranks: &Communicator,
) -> Result<Vec<u32>> {
    search(points, n, d, k, None, ranks)
}

/// Returns the share of each point's neighbours that are in its cluster, `(N,)` in `[0, 1]`.
///
/// - `neighbours`: `(N, m)` without the point itself. With `m = 0` every share is 1.
pub fn share_of_agreeing_neighbours(assignment: &[u32], neighbours: &[u32]) -> Vec<f32> {
    let each = neighbours.len() / assignment.len().max(1);
    if each == 0 {
        return vec![1.; assignment.len()];
    }
    let same = |(own, row): (&u32, &[u32])| {
        let count = row.iter().filter(|&&j| assignment[j as usize] == *own).count();
        count as f32 / each as f32
    };
    assignment.iter().zip(neighbours.chunks_exact(each)).map(same).collect()
}

/// Returns how much more often neighbours are in one cluster than by chance:
/// `κ = (a − e) / (1 − e)`, with the mean share `a` of each point's neighbours that are in its cluster, and
/// `e = Σ_k π_k²` for clusters with shares `π` of the points.
///
/// 1 if all neighbours agree, 0 at chance and for a single cluster, and below 0 if neighbours avoid each
/// other. The share `a` alone would reward clusters that collapse. Compare labellings on one and the
/// same list of neighbours.
///
/// - `assignment`: cluster of each point, `(N,)`, below `clusters`.
/// - `neighbours`: `(N, m)` without the point itself.
///
/// # Errors
///
/// `neighbours` is not `N` lists of one length, or a cluster is not below `clusters`.
pub fn chance_corrected_agreement(
    assignment: &[u32],
    neighbours: &[u32],
    clusters: usize,
) -> Result<f64> {
    let n = assignment.len();
    ensure!(
        n > 0 && !neighbours.is_empty() && neighbours.len().is_multiple_of(n),
        "chance_corrected_agreement: {} neighbours of {n} points",
        neighbours.len()
    );
    let mut sizes = vec![0usize; clusters];
    for &cluster in assignment {
        ensure!(
            (cluster as usize) < clusters,
            "chance_corrected_agreement: a point is in cluster {cluster}, but there are {clusters}"
        );
        sizes[cluster as usize] += 1;
    }
    let by_chance: f64 = sizes.iter().map(|&size| (size as f64 / n as f64).powi(2)).sum();
    if sizes.iter().filter(|&&size| size > 0).count() < 2 {
        return Ok(0.);
    }
    let shares = share_of_agreeing_neighbours(assignment, neighbours);
    let agreement = shares.into_iter().map(f64::from).sum::<f64>() / n as f64;
    Ok((agreement - by_chance) / (1. - by_chance))
}

fn search(
    points: &[f32],
    n: usize,
    d: usize,
    k: usize,
    format: Option<RowFormat>,
    ranks: &Communicator,
) -> Result<Vec<u32>> {
    points::check(points, n, d, "nearest_neighbours")?;
    let most = n.saturating_sub(1);
    ensure!(
        k <= most,
        "nearest_neighbours: {k} neighbours of each of {n} points; at most {most} exist"
    );
    ensure!(
        u32::try_from(n).is_ok(),
        "nearest_neighbours: {n} points; at most 2³² − 1 can be indexed"
    );
    if k == 0 {
        return Ok(vec![]);
    }
    let format = format.unwrap_or_else(|| cheapest(points, n, d, k));
    let rows = Rows::new(points, d, format);
    let groups = RowGroups::new(&rows, &[]);
    let bound = Bound::new(&rows, 0.);
    let search = Search { points, d, k, rows, groups, bound };
    // Both blocks of a pair fit into the cache, and all threads have work. The result does not depend
    // on it.
    let block = (n / 16).clamp(1, 40 * LANES).next_multiple_of(LANES);
    let blocks: Vec<Mutex<Block>> = (0..n.div_ceil(block))
        .map(|b| Mutex::new(Block::new(b * block, block.min(n - b * block), k)))
        .collect();
    for pairs in rounds(blocks.len()).iter().skip(ranks.rank()).step_by(ranks.size()) {
        pairs.par_iter().for_each_init(
            || (Panel::new(d, format), Tile::default()),
            |(panel, tile), &(a, b)| {
                let mut lanes = lock(&blocks[a]);
                if a == b {
                    search.compare(&mut lanes, None, panel, tile);
                } else {
                    search.compare(&mut lanes, Some(&mut *lock(&blocks[b])), panel, tile);
                }
            },
        );
    }
    if ranks.size() == 1 {
        let mut neighbours = vec![0u32; n * k];
        search.resolve_all(&blocks, block, &mut neighbours, |&(_, index)| index);
        return Ok(neighbours);
    }
    let mut ranked = vec![RankedRow::NONE; n * k];
    search.resolve_all(&blocks, block, &mut ranked, |&(product, index)| RankedRow {
        product,
        index: index.into(),
    });
    drop(blocks);
    ranks.all_reduce(&mut ranked, |lower, upper| {
        lower.par_chunks_mut(k).zip(upper.par_chunks(k)).for_each(|(own, other)| {
            let mut both = [&*own, other].concat();
            both.sort_unstable_by(RankedRow::nearer);
            own.copy_from_slice(&both[..k]);
        });
    })?;
    Ok(ranked.iter().map(|row| row.index as u32).collect())
}

/// A row that may be among the nearest of another one, with their exact product.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct RankedRow {
    product: f64,
    index: u64,
}

impl RankedRow {
    /// In place of a row that a rank did not find: farther than all others.
    const NONE: Self = Self { product: f64::NEG_INFINITY, index: u64::MAX };

    fn nearer(&self, other: &Self) -> Ordering {
        nearer(&(self.product, self.index), &(other.product, other.index))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it compares")
}

/// Returns every pair of blocks once, in rounds whose pairs share no block (the circle method).
fn rounds(blocks: usize) -> Vec<Vec<(usize, usize)>> {
    let mut rounds = vec![(0..blocks).map(|b| (b, b)).collect::<Vec<_>>()];
    let seats = blocks.next_multiple_of(2);
    for round in 0..seats.saturating_sub(1) {
        let seat = |i: usize| if i == 0 { 0 } else { 1 + (i - 1 + round) % (seats - 1) };
        let pairs = (0..seats / 2).map(|i| (seat(i), seat(seats - 1 - i)));
        let real = pairs.filter(|&(a, b)| a < blocks && b < blocks);
        rounds.push(real.map(|(a, b)| (a.min(b), a.max(b))).collect());
    }
    rounds
}

/// Estimates which format is faster. Rounding to bytes is fast, but if many rows are almost as
/// near as the `k`-th, too many of them remain to be compared exactly.
fn cheapest(points: &[f32], n: usize, d: usize, k: usize) -> RowFormat {
    if RowFormat::fastest() == RowFormat::Floats || n < 4 * LANES {
        return RowFormat::Floats;
    }
    // Compares a sample of rows with a larger one, both spread over all rows.
    let sample = |count: usize| -> Vec<f32> {
        let step = (n / count).max(1);
        points.chunks(d).step_by(step).take(count).flatten().copied().collect()
    };
    let (queries, others) = (sample(2 * LANES), sample(4096));
    let (queries, others) =
        (Rows::new(&queries, d, RowFormat::Bytes), Rows::new(&others, d, RowFormat::Bytes));
    let groups = RowGroups::new(&others, &[]);
    let bound = Bound::new(&others, 0.);
    let share = others.len() as f64 / n as f64;
    let nth = ((k as f64 * share) as usize).min(others.len() - 1);
    let (mut panel, mut tile) = (Panel::new(d, RowFormat::Bytes), Tile::default());
    let mut left = 0usize;
    for first in (0..queries.len()).step_by(LANES) {
        let lanes = LANES.min(queries.len() - first);
        panel.fill(&queries, first..first + lanes);
        let mut values = vec![vec![]; lanes];
        for group in 0..groups.len() {
            products(&panel, &groups, group, &mut tile);
            for j in 0..GROUP {
                values.iter_mut().zip(tile.row(j)).for_each(|(values, &x)| values.push(x));
            }
        }
        for (lane, values) in values.iter_mut().enumerate() {
            values.sort_unstable_by(|a, b| b.total_cmp(a));
            let least = values[nth] - 2. * bound.of(queries.extents[first + lane]);
            left += values.iter().filter(|&&x| x >= least).count();
        }
    }
    let exact = left as f64 / queries.len() as f64 / share;
    // Screening by bytes saves three quarters of half the products. An exact product of rows at
    // random addresses costs about as much as 30 screened ones.
    if 30. * exact < 0.75 * n as f64 / 2. * 4. { RowFormat::Bytes } else { RowFormat::Floats }
}

/// The input that all tasks share.
struct Search<'a> {
    points: &'a [f32],
    d: usize,
    k: usize,
    rows: Rows<'a>,
    groups: RowGroups,
    bound: Bound,
}

/// Consecutive rows, the first of which is row `first`, and the shortlist of each.
struct Block {
    first: usize,
    shortlists: Vec<Shortlist>,
    /// The product that a row must reach to enter each shortlist, padded with infinity to whole
    /// panels.
    thresholds: Vec<f32>,
}

impl Block {
    fn new(first: usize, len: usize, k: usize) -> Self {
        let mut thresholds = vec![f32::NEG_INFINITY; len];
        thresholds.resize(len.next_multiple_of(LANES), f32::INFINITY);
        Self { first, shortlists: (0..len).map(|_| Shortlist::new(k)).collect(), thresholds }
    }
}

/// Rows that may be among the nearest of one row.
struct Shortlist {
    /// The best so far by exact product, nearest first. Empty until exact products are needed.
    exact: Vec<(f64, u32)>,
    /// The others: approximate product and index.
    approximate: Vec<(f32, u32)>,
    /// Length of `approximate` at which it is thinned out.
    capacity: usize,
}

impl Shortlist {
    fn new(k: usize) -> Self {
        Self { exact: vec![], approximate: vec![], capacity: 4 * k + 16 }
    }
}

/// Orders by falling product, equal products by index.
fn nearer<T: PartialOrd, I: Ord>(a: &(T, I), b: &(T, I)) -> Ordering {
    // Products are finite, so they can be compared.
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

impl Search<'_> {
    /// Compares all rows of a block with all rows of another, or with its own, and updates the
    /// shortlists of both.
    fn compare(
        &self,
        lanes: &mut Block,
        other: Option<&mut Block>,
        panel: &mut Panel,
        tile: &mut Tile,
    ) {
        let (first, len) = (lanes.first, lanes.shortlists.len());
        let mut other = other;
        let (other_first, other_len) =
            other.as_ref().map_or((first, len), |b| (b.first, b.shortlists.len()));
        for start in (0..len).step_by(LANES) {
            let count = LANES.min(len - start);
            panel.fill(&self.rows, first + start..first + start + count);
            for group in 0..other_len.div_ceil(GROUP) {
                products(panel, &self.groups, other_first / GROUP + group, tile);
                self.offer_group(lanes, start, tile, other_first + group * GROUP);
                if let Some(other) = &mut other {
                    self.offer_lanes(other, group * GROUP, tile, first + start, count);
                }
            }
        }
    }

    /// Offers the rows of the tile's group, from row `from` on, to the shortlists of the lanes.
    fn offer_group(&self, block: &mut Block, start: usize, tile: &Tile, from: usize) {
        let thresholds: &[f32; LANES] =
            block.thresholds[start..].first_chunk().expect("padded to whole panels");
        let mut hits = reached(&tile.largest, thresholds);
        while hits != 0 {
            let lane = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            for j in 0..GROUP {
                // The padding rows of the last group have the product −∞.
                let value = tile.row(j)[lane];
                if value > f32::NEG_INFINITY && value >= block.thresholds[start + lane] {
                    self.offer(block, start + lane, value, from + j);
                }
            }
        }
    }

    /// Offers the rows of the lanes, `count` from row `from` on, to the shortlists of the group.
    fn offer_lanes(&self, block: &mut Block, start: usize, tile: &Tile, from: usize, count: usize) {
        let thresholds = block.thresholds[start..].first_chunk().expect("padded to whole panels");
        let mut hits = rows_reached(tile, thresholds);
        while hits != 0 {
            let j = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            for (lane, &value) in tile.row(j)[..count].iter().enumerate() {
                if value >= block.thresholds[start + j] {
                    self.offer(block, start + j, value, from + lane);
                }
            }
        }
    }

    /// Adds `row` to a shortlist, unless it is the row that the shortlist belongs to.
    fn offer(&self, block: &mut Block, position: usize, value: f32, row: usize) {
        let own = block.first + position;
        if own == row {
            return;
        }
        let shortlist = &mut block.shortlists[position];
        shortlist.approximate.push((value, row as u32));
        if shortlist.approximate.len() >= shortlist.capacity {
            block.thresholds[position] = self.thin_out(own, shortlist);
        }
    }

    /// Upper bound on the error of an approximate product of this row.
    fn error(&self, own: usize) -> f64 {
        f64::from(self.bound.of(self.rows.extents[own])) * (1. + 1e-6)
    }

    /// Drops rows that cannot be among the nearest, and returns the product that a new one must
    /// reach.
    fn thin_out(&self, own: usize, shortlist: &mut Shortlist) -> f32 {
        if shortlist.exact.is_empty() {
            let (_, &mut (kth, _), _) =
                shortlist.approximate.select_nth_unstable_by(self.k - 1, nearer);
            // The k-th best is at least `kth − error`, and looks at most one more error smaller.
            let least = below(f64::from(kth) - 2. * self.error(own));
            shortlist.approximate.retain(|&(value, _)| value >= least);
            let left = shortlist.approximate.len();
            if left <= 16 * self.k + 256 {
                shortlist.capacity = shortlist.capacity.max(2 * left);
                return least;
            }
        }
        // Too many similar products: from now on keep the nearest by exact product.
        self.resolve(own, shortlist);
        shortlist.capacity = 8 * self.k + 128;
        below(shortlist.exact[self.k - 1].0 - self.error(own))
    }

    /// Finds the nearest of the rows that each row was compared with, converts them and writes them to `found`,
    /// `(N, k)`. Of fewer than `k`, the last places stay as they are.
    ///
    /// - `block`: rows in a block.
    fn resolve_all<T: Send>(
        &self,
        blocks: &[Mutex<Block>],
        block: usize,
        found: &mut [T],
        convert: impl Fn(&(f64, u32)) -> T + Sync,
    ) {
        found.par_chunks_mut(block * self.k).zip(blocks).for_each(|(found, block)| {
            let mut block = lock(block);
            let first = block.first;
            for (i, (found, shortlist)) in
                found.chunks_mut(self.k).zip(&mut block.shortlists).enumerate()
            {
                self.resolve(first + i, shortlist);
                found.iter_mut().zip(&shortlist.exact).for_each(|(to, from)| *to = convert(from));
            }
        });
    }

    /// Moves the `k` best to `exact`, and clears the others.
    fn resolve(&self, own: usize, shortlist: &mut Shortlist) {
        let row = |i: usize| &self.points[i * self.d..][..self.d];
        let error = self.error(own);
        let Shortlist { exact, approximate, .. } = shortlist;
        // By falling approximate product, so that the loop can end early.
        approximate.sort_unstable_by(nearer);
        for &(value, i) in &*approximate {
            if exact.len() == self.k && f64::from(value) + error < exact[self.k - 1].0 {
                break;
            }
            let candidate = (product(row(own), row(i as usize)), i);
            let rank = exact.partition_point(|other| nearer(other, &candidate).is_lt());
            if rank < self.k {
                exact.truncate(self.k - 1);
                exact.insert(rank, candidate);
            }
        }
        approximate.clear();
    }
}

/// Rounds down to `f32`.
fn below(x: f64) -> f32 {
    let rounded = x as f32;
    if f64::from(rounded) > x { rounded.next_down() } else { rounded }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    /// Compares all pairs in `f64`.
    fn plain(points: &[f32], d: usize, k: usize) -> Vec<u32> {
        let mut neighbours = vec![];
        for (i, row) in points.chunks(d).enumerate() {
            let others = points.chunks(d).enumerate().filter(|&(j, _)| j != i);
            let mut products: Vec<(f64, u32)> =
                others.map(|(j, other)| (product(row, other), j as u32)).collect();
            products.sort_unstable_by(nearer);
            neighbours.extend(products[..k].iter().map(|p| p.1));
        }
        neighbours
    }

    fn random_rows(n: usize, d: usize, spread: f32) -> Vec<f32> {
        let mut random = stage::random::stream(n as u64, "rows", &[d as u64]);
        (0..n * d)
            .map(|i| 1. - (i % d % 2) as f32 * 1.5 + spread * (random.random::<f32>() - 0.5))
            .collect()
    }

    /// Refinement, case 9.
    #[test]
    fn agreement_is_corrected_for_chance() -> Result<()> {
        let neighbours = [1, 2, 0, 2, 0, 1, 4, 5, 3, 5, 3, 0];
        for (assignment, want) in [
            ([0, 0, 0, 1, 1, 1], 0.833333),
            ([1, 1, 1, 0, 0, 0], 0.833333),
            ([0, 0, 1, 1, 1, 1], 0.0625),
            ([0, 0, 0, 0, 0, 0], 0.),
            ([0, 1, 0, 1, 0, 1], -0.333333),
        ] {
            let got = chance_corrected_agreement(&assignment, &neighbours, 2)?;
            assert!((got - want).abs() < 1e-6, "{assignment:?}: got {got}, want {want}");
        }
        assert!(chance_corrected_agreement(&[0, 2], &[1, 0], 2).is_err());
        assert!(chance_corrected_agreement(&[0, 1], &[1, 0, 1], 2).is_err());
        assert!(chance_corrected_agreement(&[0, 1], &[], 2).is_err());
        Ok(())
    }

    #[test]
    fn neighbours_are_those_of_all_pairs() -> Result<()> {
        for format in [RowFormat::Bytes, RowFormat::Floats] {
            for (n, d, k) in [(1000, 24, 20), (777, 5, 3), (50, 3, 49), (2, 1, 1), (130, 70, 1)] {
                // Spread out; then so close together that rounding to bytes decides nothing.
                for spread in [2., 1e-3] {
                    let points = random_rows(n, d, spread);
                    let found = search(&points, n, d, k, Some(format), &Communicator::single())?;
                    assert_eq!(found, plain(&points, d, k), "{format:?} {n} {d} {k} {spread}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn near_ties_are_resolved_and_ties_go_by_index() -> Result<()> {
        // Rows that differ in the last bit of one number, in the order of two numbers or not at all. A
        // few are zero, and a few are very long or very short.
        let (n, d) = (900, 19);
        let mut random = stage::random::stream(2, "ties", &[]);
        let row: Vec<f32> = (0..d).map(|_| random.random::<f32>() - 0.3).collect();
        let mut points = vec![];
        for i in 0..n {
            let mut near = row.clone();
            match i % 9 {
                0 => {}
                1 => near.swap(3, 7),
                2 => near.fill(0.),
                3 => near.iter_mut().for_each(|x| *x *= -1.),
                4 if i % 2 == 0 => near.iter_mut().for_each(|x| *x *= 1e-12),
                4 => near.iter_mut().for_each(|x| *x *= 1e9),
                _ => {
                    let j = random.random_range(0..d);
                    near[j] = if i % 2 == 0 { near[j].next_up() } else { near[j].next_down() };
                }
            }
            points.extend(near);
        }
        for format in [RowFormat::Bytes, RowFormat::Floats] {
            for k in [1, 20, n - 1] {
                let found = search(&points, n, d, k, Some(format), &Communicator::single())?;
                assert_eq!(found, plain(&points, d, k), "{format:?} {k}");
            }
        }
        Ok(())
    }

    #[test]
    fn any_number_of_ranks_finds_the_same() -> Result<()> {
        // 40 rows are one block, which the first rank compares. 200 rows are five blocks, and no rank alone compares
        // a row with all 199 others. Every tenth row is there twice.
        for (n, d, k) in [(500, 12, 7), (40, 3, 39), (200, 3, 199), (300, 5, 1)] {
            let mut points = random_rows(n, d, 1.);
            for row in (0..n - 1).step_by(10) {
                points.copy_within(row * d..(row + 1) * d, (row + 1) * d);
            }
            let want = nearest_neighbours(&points, n, d, k)?;
            for count in [2, 4, 8] {
                let run = |ranks| nearest_neighbours_on_ranks(&points, n, d, k, &ranks);
                let found = crate::tests::on_ranks(count, run)?;
                assert!(found.iter().all(|found| *found == want), "{count} ranks, {n} rows");
            }
        }
        Ok(())
    }

    #[test]
    fn any_number_of_threads_finds_the_same() -> Result<()> {
        let points = random_rows(500, 12, 1.);
        let want = nearest_neighbours(&points, 500, 12, 7)?;
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            assert_eq!(pool.install(|| nearest_neighbours(&points, 500, 12, 7))?, want);
        }
        Ok(())
    }

    #[test]
    fn every_pair_of_blocks_meets_once_and_a_round_shares_no_block() {
        for blocks in 1..9 {
            let mut met = vec![];
            for round in rounds(blocks) {
                let mut seated = vec![false; blocks];
                for (a, b) in round {
                    assert!(!seated[a] && (a == b || !seated[b]));
                    (seated[a], seated[b]) = (true, true);
                    met.push((a, b));
                }
            }
            met.sort_unstable();
            let want: Vec<_> = (0..blocks).flat_map(|a| (a..blocks).map(move |b| (a, b))).collect();
            assert_eq!(met, want);
        }
    }

    #[test]
    fn neighbours_are_ordered_by_product_without_self() -> Result<()> {
        let points = [1f32, 0., 0.9, 0.1, 0., 1., -1., 0., 0.5, 0.5];
        let found = nearest_neighbours(&points, 5, 2, 4)?;
        // Products of row 0: 0.9, 0, −1, 0.5 with rows 1 to 4.
        assert_eq!(found[..4], [1, 4, 2, 3]);
        for (i, row) in found.chunks(4).enumerate() {
            assert!(!row.contains(&(i as u32)));
        }
        Ok(())
    }

    #[test]
    fn equal_products_are_ordered_by_index() -> Result<()> {
        let found = nearest_neighbours(&[1f32, 0.].repeat(2000), 2000, 2, 3)?;
        assert_eq!(found[..9], [1, 2, 3, 0, 2, 3, 0, 1, 3]);
        assert_eq!(found[5997..], [0, 1, 2]);
        Ok(())
    }

    #[test]
    fn bad_input_is_refused() {
        let error = nearest_neighbours(&[1., 2.], 2, 1, 2).expect_err("too many").to_string();
        assert!(error.contains("at most 1"), "{error}");
        let error = nearest_neighbours(&[1., f32::NAN], 2, 1, 1).expect_err("NaN").to_string();
        assert!(error.contains("row 1"), "{error}");
        assert!(nearest_neighbours(&[1., 2.], 2, 1, 0).expect("none").is_empty());
    }

    #[test]
    fn the_share_of_agreeing_neighbours_does_not_count_the_point_itself() {
        let shares = share_of_agreeing_neighbours(&[0, 0, 1, 1], &[1, 2, 0, 2, 1, 3, 2, 1]);
        assert_eq!(shares, [0.5; 4]);
        assert_eq!(share_of_agreeing_neighbours(&[0, 1], &[]), [1., 1.]);
    }

    /// Heads on frozen embeddings, case T9.
    #[test]
    fn neighbours_on_the_circle_leave_out_the_row_itself() -> Result<()> {
        let points = [1., 0., 0.96, 0.28, 0.6, 0.8, 0., 1., -0.8, 0.6];
        let found = nearest_neighbours(&points, 5, 2, 2)?;
        assert_eq!([&found[..4], &found[6..]].concat(), [1, 2, 0, 2, 2, 4, 3, 2]);
        // Products of .8 twice, which round apart.
        assert!(found[4..6] == [1, 3] || found[4..6] == [3, 1], "{found:?}");
        Ok(())
    }
}
