//! k-means over more points than fit into memory.
//!
//! Points come in [`Shards`], one of which is in memory at a time. Both functions start with k-means
//! on a sample in memory:
//!
//! - [`k_means_streaming`] continues with Lloyd's iterations over all shards. Each pass reads every
//!   shard once and equals an iteration of [`k_means_from`](crate::k_means_from).
//! - [`k_means_mini_batch`] moves the centres after every batch, so that one or a few passes are
//!   enough (Sculley 2010).
//!
//! Besides a shard and the centres, 20 bytes per point are in memory: its cluster now, before and in
//! the best pass, and the two bounds that avoid most comparisons.
//!
//! Several processes can share the shards of [`k_means_streaming`], see [`Shards::shared_by`]. The
//! result has the same bits on any number of ranks.

use std::fmt;

use anyhow::{Context, Result, ensure};
use collective::Communicator;
use kernels::similarity::{RowFormat, product};
use rand::seq::SliceRandom;
use rayon::prelude::*;

use crate::clustering::{Clustering, KMeans, Metric};
use crate::iterations::{
    ClusterSums, Facts, LEAVES, LeafSum, Piece, PointSource, iterate, summed_shift,
};
use crate::lloyd::{Centres, Nearest, Points};
use crate::points;
use crate::sample::sample;

/// Points `(N, D)` in pieces that are read one at a time.
pub struct Shards<'a> {
    width: usize,
    lengths: Vec<usize>,
    read: Box<dyn Fn(usize) -> Result<Vec<f32>> + 'a>,
    ranks: Communicator,
}

impl fmt::Debug for Shards<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, lengths, .. } = self;
        f.debug_struct("Shards").field("width", width).field("lengths", lengths).finish()
    }
}

impl<'a> Shards<'a> {
    /// Creates shards of points of this width.
    ///
    /// - `lengths`: number of points in each shard.
    /// - `read`: returns the rows of a shard; called several times, it must return the same rows.
    pub fn new(
        width: usize,
        lengths: Vec<usize>,
        read: impl Fn(usize) -> Result<Vec<f32>> + 'a,
    ) -> Self {
        Self { width, lengths, read: Box::new(read), ranks: Communicator::single() }
    }

    /// The same shards, shared by ranks: each reads a contiguous part of them.
    ///
    /// # Panics
    ///
    /// There are more than 1,024 ranks.
    pub fn shared_by(self, ranks: &Communicator) -> Self {
        assert!(ranks.size() <= LEAVES, "{} ranks for {LEAVES} leaves", ranks.size());
        Self { ranks: ranks.clone(), ..self }
    }

    /// The shards of this rank, each with its leaf among those of this rank.
    fn own(&self) -> impl Iterator<Item = (usize, usize)> {
        let leaves = LEAVES / self.ranks.size();
        let first = self.ranks.rank() * leaves;
        let start = |leaf: usize| leaf * self.lengths.len() / LEAVES;
        (0..leaves).flat_map(move |leaf| {
            let shards = start(first + leaf)..start(first + leaf + 1);
            shards.map(move |shard| (leaf, shard))
        })
    }

    /// Number of points in the shards of this rank.
    fn own_points(&self) -> usize {
        self.own().map(|(_, shard)| self.lengths[shard]).sum()
    }

    /// Number of points in all shards, N.
    pub fn points(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Reads the rows of a shard.
    ///
    /// # Errors
    ///
    /// It cannot be read, has another length than declared, or a number is not finite. The message
    /// names the shard and the row.
    fn read(&self, shard: usize) -> Result<Vec<f32>> {
        let name = || format!("shard {shard} of {}", self.lengths.len());
        let rows = (self.read)(shard).with_context(name)?;
        points::check(&rows, self.lengths[shard], self.width, "k-means over shards")
            .with_context(name)?;
        Ok(rows)
    }

    /// Draws `count` points of all ranks, in order of index. Reads and checks the shards of this rank.
    fn sample(&self, count: usize, seed: u64) -> Result<Vec<f32>> {
        let mut random = stage::random::stream(seed, "k-means sample", &[]);
        let drawn = sample(self.points(), count, &mut random);
        let mut rows = Vec::with_capacity(drawn.len() * self.width / self.ranks.size());
        for (_, shard) in self.own() {
            let values = self.read(shard)?;
            let first: usize = self.lengths[..shard].iter().sum();
            let own = drawn.partition_point(|&i| i < first)
                ..drawn.partition_point(|&i| i < first + self.lengths[shard]);
            for i in &drawn[own] {
                rows.extend_from_slice(&values[(i - first) * self.width..][..self.width]);
            }
        }
        match self.ranks.size() {
            1 => Ok(rows),
            _ => Ok(self.ranks.all_gather(&rows)?),
        }
    }
}

/// The parameters of k-means over shards, besides those of [`KMeans`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streaming {
    /// Points of the first sample, in memory; at least K. A hundred per cluster are usually enough.
    pub sample: usize,
    /// Most passes over all shards. `KMeans::iterations` limits k-means on the sample only.
    pub passes: usize,
}

/// Runs [`k_means`](crate::k_means) on a sample, then Lloyd's iterations over all shards.
///
/// The result covers all points; its `restart` is the one of the sample. Splitting the same points
/// into other shards changes only the rounding of sums.
///
/// # Errors
///
/// Those of [`k_means`](crate::k_means), with the name of the shard; a shard cannot be read.
pub fn k_means_streaming(
    shards: &Shards,
    config: &KMeans,
    streaming: &Streaming,
    seed: u64,
) -> Result<Clustering> {
    let start = Start::new(shards, config, streaming, seed)?;
    let mut centres = start.on_sample.centres.clone();
    points::shift(&mut centres, &start.origin);
    start.finish(shards, centres, &KMeans { iterations: streaming.passes, ..*config })
}

/// Runs [`k_means`](crate::k_means) on a sample, then moves the centres after every `batch` points
/// (Sculley 2010), and finally assigns all points.
///
/// A centre is the mean of all points that were assigned to it when their batch was read, beginning
/// with the sample. Shards are read in random order, and the points of a shard too. Passes end when
/// the centres shift by no more than the tolerance. A cluster that got no point in a pass is
/// re-seeded at the point of the last batch that is farthest from its centre. `iterations` of the
/// result counts passes, without the final one.
///
/// # Errors
///
/// Those of [`k_means_streaming`]; `batch` is 0.
pub fn k_means_mini_batch(
    shards: &Shards,
    config: &KMeans,
    streaming: &Streaming,
    batch: usize,
    seed: u64,
) -> Result<Clustering> {
    ensure!(batch > 0, "k_means_mini_batch: batch is 0; 4,096 points or more are usual");
    ensure!(
        shards.ranks.size() == 1,
        "k_means_mini_batch: its batches follow one another on one rank; use k_means_streaming on several"
    );
    let start = Start::new(shards, config, streaming, seed)?;
    let source = start.source(shards);
    let mut running = Running::new(&start, &source, config)?;
    let (mut passes, mut reseeded, mut converged) = (0, 0, false);
    while passes < streaming.passes && !converged {
        let before = running.centres.clone();
        let moved = running.pass(&source, batch, seed, passes)?;
        let shift = summed_shift(&before, &running.centres, shards.width, config.metric);
        converged = moved == 0 && shift <= config.tolerance * start.variance;
        passes += 1;
        reseeded += moved;
    }
    if reseeded > 0 {
        tracing::info!("k-means: {reseeded} clusters without a point in a pass were re-seeded");
    }
    let found = start.finish(shards, running.centres, &KMeans { iterations: 1, ..*config })?;
    Ok(Clustering { iterations: passes, converged, reseeded: reseeded + found.reseeded, ..found })
}

/// The state before the first pass over all shards.
struct Start {
    on_sample: Clustering,
    sample: Vec<f32>,
    metric: Metric,
    /// The mean of the sample, subtracted from Euclidean rows so that a common offset costs no
    /// precision.
    origin: Vec<f32>,
    squares: f64,
    variance: f64,
}

impl Start {
    fn new(shards: &Shards, config: &KMeans, streaming: &Streaming, seed: u64) -> Result<Self> {
        let (n, d) = (shards.points(), shards.width);
        let Streaming { sample, passes } = *streaming;
        config.check(n, "k-means over shards")?;
        ensure!(passes > 0, "k-means over shards: passes is 0; at least one is needed");
        ensure!(
            sample >= config.clusters,
            "k-means over shards: a sample of {sample} points cannot fill {} clusters; draw more",
            config.clusters
        );
        ensure!(d > 0, "k-means over shards: the points have width 0");
        let sample = shards.sample(sample, seed)?;
        let on_sample = crate::k_means(&sample, sample.len() / d, d, config, seed)
            .context("in k-means on the first sample of the shards")?;
        let origin = match config.metric {
            Metric::Spherical => vec![0.; d],
            Metric::Euclidean => points::column_sums(&sample, d, None)
                .iter()
                .map(|sum| (sum / (sample.len() / d) as f64) as f32)
                .collect(),
        };
        let mut start =
            Self { on_sample, sample, metric: config.metric, origin, squares: 0., variance: 0. };
        // The columns, and last the squares.
        let mut leaves = LeafSum::new(|sum: &mut Vec<f64>, more: Vec<f64>| {
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        });
        start.source(shards).each(&mut |piece| {
            let sum = leaves.leaf(piece.leaf, || vec![0f64; d + 1]);
            let columns = points::column_sums(piece.points.values, d, None);
            sum.iter_mut().zip(columns).for_each(|(sum, more)| *sum += more);
            sum[d] += piece.points.squares.iter().sum::<f64>();
            Ok(())
        })?;
        let mut sums = leaves.sum().unwrap_or_else(|| vec![0.; d + 1]);
        shards.ranks.all_reduce_sum(&mut sums)?;
        let squares = sums.pop().expect("the last value");
        let mean_square: f64 = sums.iter().map(|sum| (sum / n as f64).powi(2)).sum();
        start.variance = (squares / n as f64 - mean_square).max(0.) / d as f64;
        start.squares = squares;
        Ok(start)
    }

    fn source<'a>(&'a self, shards: &'a Shards<'a>) -> ShardSource<'a> {
        ShardSource { shards, metric: self.metric, origin: &self.origin }
    }

    /// Runs Lloyd's iterations over all shards, starting from centres relative to the origin.
    fn finish(&self, shards: &Shards, centres: Vec<f32>, config: &KMeans) -> Result<Clustering> {
        let Self { origin, squares, variance, .. } = self;
        let (n, d) = (shards.own_points(), shards.width);
        let facts = Facts { n, d, weights: None, squares: *squares, variance: *variance };
        let found = iterate(&self.source(shards), &facts, centres, config)?;
        let restart = self.on_sample.restart;
        Ok(Clustering { restart, ..found }.relative_to(origin))
    }
}

/// Reads shards for the iterations: unit rows, or rows relative to the origin.
struct ShardSource<'a> {
    shards: &'a Shards<'a>,
    metric: Metric,
    origin: &'a [f32],
}

impl ShardSource<'_> {
    fn read(&self, shard: usize) -> Result<Vec<f32>> {
        let count = self.shards.lengths.len();
        self.prepare(self.shards.read(shard)?).with_context(|| format!("shard {shard} of {count}"))
    }

    fn prepare(&self, mut rows: Vec<f32>) -> Result<Vec<f32>> {
        match self.metric {
            Metric::Euclidean => points::shift(&mut rows, self.origin),
            Metric::Spherical => {
                points::scale(&mut rows, self.shards.width, "k-means over shards")?
            }
        }
        Ok(rows)
    }
}

impl PointSource for ShardSource<'_> {
    fn each(&self, visit: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
        let mut first = 0;
        for (leaf, shard) in self.shards.own() {
            let rows = self.read(shard)?;
            let points = Points::new(&rows, self.shards.width, RowFormat::fastest());
            visit(Piece { first, leaf, points: &points })?;
            first += points.len();
        }
        Ok(())
    }

    fn ranks(&self) -> Communicator {
        self.shards.ranks.clone()
    }
}

/// The centres between two batches.
struct Running {
    metric: Metric,
    /// Relative to the origin.
    centres: Vec<f32>,
    /// Over all points read so far.
    sums: ClusterSums,
}

impl Running {
    /// Starts with the sample as the first batch.
    fn new(start: &Start, source: &ShardSource, config: &KMeans) -> Result<Self> {
        let d = source.shards.width;
        let rows = source.prepare(start.sample.clone())?;
        let sample = Points::new(&rows, d, RowFormat::fastest());
        let mut sums = ClusterSums::new(config.clusters, d);
        sums.add(&sample, &start.on_sample.assignment);
        let mut centres = start.on_sample.centres.clone();
        points::shift(&mut centres, &start.origin);
        Ok(Self { metric: config.metric, centres, sums })
    }

    /// Reads all shards once; returns how many clusters were re-seeded.
    fn pass(
        &mut self,
        source: &ShardSource,
        batch: usize,
        seed: u64,
        pass: usize,
    ) -> Result<usize> {
        let d = source.shards.width;
        let before = self.sums.counts.clone();
        let mut shards: Vec<usize> = (0..source.shards.lengths.len()).collect();
        shards.shuffle(&mut stage::random::stream(seed, "mini-batch shards", &[pass as u64]));
        let mut last = vec![];
        for shard in shards {
            let rows = source.read(shard)?;
            let mut order: Vec<usize> = (0..rows.len() / d).collect();
            let counters = [pass as u64, shard as u64];
            order.shuffle(&mut stage::random::stream(seed, "mini-batch rows", &counters));
            for batch in order.chunks(batch) {
                last = batch.iter().flat_map(|&i| &rows[i * d..][..d]).copied().collect();
                self.update(&Points::new(&last, d, RowFormat::fastest()));
            }
        }
        let empty = (0..before.len()).filter(|&k| self.sums.counts[k] == before[k]).collect();
        Ok(self.reseed(empty, &last))
    }

    /// Assigns a batch and moves its centres.
    fn update(&mut self, batch: &Points) {
        let mut nearest = Nearest::unassigned(batch.len());
        let centres = Centres::new(&self.centres, batch.d, RowFormat::fastest());
        batch.assign(nearest.part(0..batch.len()), &centres, &[]);
        self.sums.add(batch, &nearest.assignment);
        self.centres = self.sums.means(&self.centres, self.metric);
    }

    /// Moves the centres of empty clusters to the points of a batch that are farthest from their
    /// centres; returns how many were moved.
    fn reseed(&mut self, empty: Vec<usize>, batch: &[f32]) -> usize {
        let d = self.sums.width();
        let nearest = |row: &[f32]| {
            let distances = self.centres.chunks(d).map(|c| points::squared_distance(row, c));
            distances.fold(f64::INFINITY, f64::min)
        };
        if empty.is_empty() {
            return 0;
        }
        let mut farthest: Vec<(f64, &[f32])> = batch
            .par_chunks(d)
            .map(|row| (nearest(row), row))
            .filter(|&(distance, row)| distance > 1e-12 * product(row, row))
            .collect();
        farthest.sort_by(|a, b| b.0.total_cmp(&a.0));
        let reseeded = empty.len().min(farthest.len());
        for (k, (_, row)) in empty.into_iter().zip(farthest) {
            self.centres[k * d..][..d].copy_from_slice(row);
            self.sums.restart(k, row);
        }
        reseeded
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::k_means;

    const CONFIG: KMeans = KMeans {
        clusters: 12,
        metric: Metric::Euclidean,
        restarts: 3,
        iterations: 100,
        tolerance: 1e-4,
    };
    const STREAMING: Streaming = Streaming { sample: 600, passes: 20 };

    /// Overlapping groups of unequal sizes, far from the origin.
    fn points(n: usize, d: usize, groups: usize) -> Vec<f32> {
        let mut random = stage::random::stream(3, "points", &[]);
        let centres: Vec<f32> = (0..groups * d).map(|_| random.random::<f32>() * 5.).collect();
        let mut rows = Vec::with_capacity(n * d);
        for _ in 0..n {
            let group = random.random_range(0..groups).min(random.random_range(0..groups));
            let row =
                centres[group * d..][..d].iter().map(|c| c + random.random::<f32>() * 2. + 9.);
            rows.extend(row.collect::<Vec<_>>());
        }
        rows
    }

    fn cut<'a>(points: &'a [f32], d: usize, lengths: &[usize]) -> Shards<'a> {
        let ends: Vec<usize> = lengths
            .iter()
            .scan(0, |end, length| {
                *end += length;
                Some(*end)
            })
            .collect();
        let starts = lengths.to_vec();
        Shards::new(d, lengths.to_vec(), move |shard| {
            let end = ends[shard];
            Ok(points[(end - starts[shard]) * d..end * d].to_vec())
        })
    }

    #[test]
    fn a_sample_of_everything_leads_where_k_means_in_memory_does() -> Result<()> {
        let (n, d) = (2000, 6);
        let points = points(n, d, 12);
        for metric in [Metric::Euclidean, Metric::Spherical] {
            let config = KMeans { metric, tolerance: 0., ..CONFIG };
            let want = k_means(&points, n, d, &config, 5)?;
            for lengths in [vec![n], vec![7, 0, 993, 1000]] {
                let streaming = Streaming { sample: n, passes: 10 };
                let shards = cut(&points, d, &lengths);
                let found = k_means_streaming(&shards, &config, &streaming, 5)?;
                assert_eq!(found.assignment, want.assignment);
                assert!((found.inertia / want.inertia - 1.).abs() < 1e-9);
                assert!(found.converged && found.restart == want.restart);
                for (got, want) in found.centres.iter().zip(&want.centres) {
                    assert!((got - want).abs() < 1e-5, "{got} {want}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn both_functions_end_within_a_hundredth_of_k_means_in_memory() -> Result<()> {
        let (n, d) = (6000, 8);
        let points = points(n, d, 12);
        let shards = cut(&points, d, &[1500, 2500, 2000]);
        for metric in [Metric::Euclidean, Metric::Spherical] {
            let config = KMeans { metric, restarts: 10, ..CONFIG };
            let want = k_means(&points, n, d, &config, 1)?.inertia;
            let lloyd = k_means_streaming(&shards, &config, &STREAMING, 1)?;
            let few = Streaming { passes: 3, ..STREAMING };
            let batches = k_means_mini_batch(&shards, &config, &few, 512, 1)?;
            for found in [&lloyd, &batches] {
                assert!(found.inertia < 1.01 * want, "{} {want}", found.inertia);
                // The assignment is that of the centres, and the inertia that of both.
                let (mut inertia, mut rows) = (0., points.clone());
                if metric == Metric::Spherical {
                    points::scale(&mut rows, d, "test")?;
                }
                for (row, &k) in rows.chunks(d).zip(&found.assignment) {
                    let distance = |c: &[f32]| points::squared_distance(row, c);
                    let own = distance(&found.centres[k as usize * d..][..d]);
                    assert!(found.centres.chunks(d).all(|c| distance(c) > own - 1e-4));
                    inertia += own / if metric == Metric::Spherical { 2. } else { 1. };
                }
                assert!((inertia / found.inertia - 1.).abs() < 1e-5);
            }
            assert!(batches.iterations <= 3 && lloyd.iterations <= 20);
        }
        Ok(())
    }

    #[test]
    fn the_same_seed_and_any_number_of_threads_give_the_same_bits() -> Result<()> {
        let (n, d) = (3000, 5);
        let points = points(n, d, 12);
        let shards = || cut(&points, d, &[1000, 1300, 700]);
        let want = k_means_streaming(&shards(), &CONFIG, &STREAMING, 2)?;
        let batches = k_means_mini_batch(&shards(), &CONFIG, &STREAMING, 100, 2)?;
        assert_ne!(batches, k_means_mini_batch(&shards(), &CONFIG, &STREAMING, 100, 3)?);
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let found = pool.scope(|_| k_means_streaming(&shards(), &CONFIG, &STREAMING, 2))?;
            assert_eq!(found, want);
            let found =
                pool.scope(|_| k_means_mini_batch(&shards(), &CONFIG, &STREAMING, 100, 2))?;
            assert_eq!(found, batches);
        }
        Ok(())
    }

    #[test]
    fn ranks_compute_the_bits_of_one() -> Result<()> {
        let (n, d) = (3000, 5);
        let points = points(n, d, 12);
        // Fewer distinct points in the sample than clusters: those that stay empty are moved.
        let mut crowded = points.clone();
        let (first, others) = crowded.split_at_mut(d);
        others[..2700 * d].chunks_mut(d).for_each(|row| row.copy_from_slice(first));
        let many = KMeans { clusters: 60, restarts: 1, ..CONFIG };
        let few = Streaming { sample: 200, passes: 4 };
        let lengths = [900, 0, 400, 500, 1, 499, 300, 400];
        for (points, config, streaming) in [(&points, CONFIG, STREAMING), (&crowded, many, few)] {
            for metric in [Metric::Euclidean, Metric::Spherical] {
                let config = KMeans { metric, ..config };
                let want = k_means_streaming(&cut(points, d, &lengths), &config, &streaming, 2)?;
                assert!(want.iterations > 2);
                assert_eq!(want.reseeded > 0, config.clusters > 12, "{}", want.reseeded);
                for ranks in [2, 4, 8] {
                    let found = crate::tests::on_ranks(ranks, |rank| {
                        let shards = cut(points, d, &lengths).shared_by(&rank);
                        k_means_streaming(&shards, &config, &streaming, 2)
                    })?;
                    assert!(found.iter().all(|found| *found == want), "{ranks} ranks");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_cluster_without_points_restarts_at_a_far_point() -> Result<()> {
        // The sample is of one place, but for the one outlier that becomes a cluster.
        let near: Vec<f32> = (0..4000).map(|i| (i % 10) as f32 * 0.01).collect();
        let config = KMeans { clusters: 2, restarts: 1, ..CONFIG };
        let start =
            Start::new(&cut(&near, 1, &[4000]), &config, &Streaming { sample: 50, passes: 1 }, 0)?;
        let mut far = near;
        far.splice(0..2000, (0..2000).map(|i| 100. + (i % 10) as f32 * 0.01));
        let shards = cut(&far, 1, &[4000]);
        let source = start.source(&shards);
        let mut running = Running::new(&start, &source, &config)?;
        running.centres[1] = -1e6;
        running.sums.restart(1, &[-1e6]);
        assert_eq!(running.pass(&source, 500, 0, 0)?, 1);
        assert!(running.centres[1] > 0., "{:?}", running.centres);
        Ok(())
    }

    #[test]
    fn errors_name_the_shard_and_the_row() {
        let mut rows = points(300, 4, 12);
        let refused = |rows: &[f32], config: &KMeans, streaming: &Streaming| {
            let shards = cut(rows, 4, &[100, 200]);
            k_means_streaming(&shards, config, streaming, 0).expect_err("refused")
        };
        for (value, config) in
            [(f32::NAN, CONFIG), (0., KMeans { metric: Metric::Spherical, ..CONFIG })]
        {
            rows[4 * 105..4 * 106].fill(value);
            let error =
                format!("{:#}", refused(&rows, &config, &Streaming { sample: 30, passes: 2 }));
            assert!(error.contains("shard 1 of 2") && error.contains("row 5"), "{error}");
        }
        rows[4 * 105] = 1.;
        let few = Streaming { sample: 11, ..STREAMING };
        assert!(refused(&rows, &CONFIG, &few).to_string().contains("draw more"));
        let none = Streaming { passes: 0, ..STREAMING };
        assert!(refused(&rows, &CONFIG, &none).to_string().contains("passes"));
        let many = KMeans { clusters: 301, ..CONFIG };
        assert!(refused(&rows, &many, &STREAMING).to_string().contains("300 points"));
        let broken = Shards::new(4, vec![50], |_| anyhow::bail!("the disk is gone"));
        let error = k_means_mini_batch(&broken, &CONFIG, &STREAMING, 10, 0).expect_err("broken");
        assert!(format!("{error:#}").contains("shard 0 of 1: the disk is gone"), "{error:#}");
        let shards = cut(&rows, 4, &[300]);
        let error = k_means_mini_batch(&shards, &CONFIG, &STREAMING, 0, 0).expect_err("no batch");
        assert!(error.to_string().contains("batch is 0"), "{error}");
        let short = Shards::new(4, vec![50], |_| Ok(vec![0.; 12]));
        assert!(k_means_streaming(&short, &CONFIG, &STREAMING, 0).is_err());
    }
}
