//! k-means by Lloyd's iterations, Euclidean and spherical, with restarts.
//!
//! Both metrics are one computation. The spherical one scales rows and centres to unit length,
//! where `1 − cos(x, c) = ‖x − c‖² / 2`; centres are the directions of the arithmetic means of the
//! unit rows (the E-step of Huang et al. 2023, arXiv:2111.11821).

use anyhow::{Result, ensure};
use kernels::similarity::{Precision, add_row, product};
use rayon::prelude::*;

use crate::lloyd::{self, Nearest, Points};
use crate::points;
use crate::seeding;

/// How far apart two rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// `‖x − c‖²`.
    Euclidean,
    /// `1 − cos(x, c)`: lengths do not matter.
    Spherical,
}

/// What a k-means can vary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KMeans {
    /// Clusters `K`, at least 1 and at most the number of points.
    pub clusters: usize,
    /// Distance between a point and a centre.
    pub metric: Metric,
    /// Independent starts by greedy k-means++; the lowest inertia wins.
    pub restarts: usize,
    /// Assignment steps of each restart at most.
    pub iterations: usize,
    /// A restart ends when the summed shift of the centres is at most this times the mean variance
    /// of the (for [`Metric::Spherical`], unit) rows' columns. 0 leaves only repeated assignments.
    pub tolerance: f64,
}

/// The best grouping that was seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Clustering {
    /// Cluster of each point, `(N,)`: its nearest centre in `centres`, the lowest index of equals.
    pub assignment: Vec<u32>,
    /// `(K, D)` row-major; of unit length for [`Metric::Spherical`].
    pub centres: Vec<f32>,
    /// Sum over points of the distance to their centre, in the metric's unit.
    pub inertia: f64,
    /// Which restart it came from, from 0.
    pub restart: usize,
    /// Assignment steps that this restart took.
    pub iterations: usize,
    /// Whether this restart met a stop rule, rather than the limit of iterations.
    pub converged: bool,
    /// Empty clusters that were given the farthest point as centre, over all restarts.
    pub reseeded: usize,
}

/// Groups the rows of `points` `(N, D)` into clusters around `K` centres.
///
/// Each restart begins with greedy k-means++ (`2 + ⌊ln K⌋` candidates for each centre, drawn in
/// proportion to the distance from the centres so far) and alternates assignment and means until
/// the assignment repeats, the centres shift by no more than the tolerance, or the iterations are
/// used up. The assignment of lowest inertia over all iterations of all restarts is returned with
/// the centres it refers to.
///
/// A cluster that no point is nearest to is given, as its next centre, the point that is farthest
/// from its own centre (ties: the lowest index), unless all points lie on their centres: so where
/// there are fewer distinct points than clusters, the surplus clusters stay empty.
///
/// The result depends on `seed` and the points alone, not on the number of threads.
///
/// # Errors
///
/// The points are no `(n, d)` matrix of finite numbers, there are fewer than `K`, a value of
/// `config` is out of range, or, for [`Metric::Spherical`], a row is shorter than 1e-12. A row is
/// named by its index.
pub fn k_means(
    points: &[f32],
    n: usize,
    d: usize,
    config: &KMeans,
    seed: u64,
) -> Result<Clustering> {
    ensure!(config.restarts > 0, "k_means: restarts is 0; at least one is needed");
    let rows = Rows::new(points, n, d, config)?;
    let prepared = rows.prepare();
    let mut best: Option<Clustering> = None;
    let mut reseeded = 0;
    let seeding = Points::new(&rows.values, d, seeding::precision(config.clusters));
    let restarts: Vec<usize> = (0..config.restarts).collect();
    for together in restarts.chunks(seeding::together(n, config.clusters)) {
        let stream = |&restart: &usize| stage::random::stream(seed, "k-means++", &[restart as u64]);
        let mut randoms: Vec<_> = together.iter().map(stream).collect();
        let starts = seeding::greedy_k_means_plus_plus(&seeding, config.clusters, &mut randoms);
        for (&restart, centres) in together.iter().zip(starts) {
            let found = Clustering { restart, ..lloyd(&rows, &prepared, centres, config) };
            reseeded += found.reseeded;
            if best.as_ref().is_none_or(|best| found.inertia < best.inertia) {
                best = Some(found);
            }
        }
    }
    let best = best.expect("there was at least one restart");
    if reseeded > 0 {
        tracing::info!("k-means: {reseeded} empty clusters were re-seeded at the farthest point");
    }
    Ok(Clustering { reseeded, ..rows.restore(best) })
}

/// [`k_means`] from given centres `(K, D)`, once; `config.restarts` is not looked at.
///
/// # Errors
///
/// As [`k_means`], for the centres too.
pub fn k_means_from(
    points: &[f32],
    n: usize,
    d: usize,
    centres: &[f32],
    config: &KMeans,
) -> Result<Clustering> {
    let rows = Rows::new(points, n, d, config)?;
    points::check(centres, config.clusters, d, "k_means_from, centres")?;
    let centres = match config.metric {
        Metric::Spherical => points::unit_rows(centres, d, "k_means_from, centres")?,
        Metric::Euclidean => rows.shift(centres),
    };
    Ok(rows.restore(lloyd(&rows, &rows.prepare(), centres, config)))
}

/// The points as the iterations take them.
struct Rows {
    /// `(N, D)`: unit rows, or rows relative to `origin`.
    values: Vec<f32>,
    d: usize,
    metric: Metric,
    /// What was subtracted from Euclidean rows, so that a common offset costs no precision.
    origin: Vec<f32>,
    /// `Σ ‖x‖²`.
    squares: f64,
    /// Variance of the columns, their mean.
    variance: f64,
}

impl Rows {
    fn new(points: &[f32], n: usize, d: usize, config: &KMeans) -> Result<Self> {
        points::check(points, n, d, "k_means")?;
        let k = config.clusters;
        ensure!(k > 0, "k_means: clusters is 0; at least one is needed");
        ensure!(n >= k, "k_means: {n} points cannot fill {k} clusters; ask for fewer clusters");
        ensure!(config.iterations > 0, "k_means: iterations is 0; at least one is needed");
        ensure!(
            config.tolerance >= 0. && config.tolerance.is_finite(),
            "k_means: tolerance is {}; it is a share of the variance, 0 or above",
            config.tolerance
        );
        let (values, origin) = match config.metric {
            Metric::Spherical => (points::unit_rows(points, d, "k_means")?, vec![0.; d]),
            Metric::Euclidean => {
                let origin = column_means(points, d).iter().map(|&x| x as f32).collect::<Vec<_>>();
                (shifted(points, &origin), origin)
            }
        };
        let squares: f64 = sum_rows(&values, d, |row| product(row, row));
        let mean_square: f64 = column_means(&values, d).iter().map(|m| m * m).sum();
        let variance = (squares / n as f64 - mean_square).max(0.) / d as f64;
        Ok(Self { values, d, metric: config.metric, origin, squares, variance })
    }

    fn prepare(&self) -> Points<'_> {
        Points::new(&self.values, self.d, Precision::fastest())
    }

    fn shift(&self, centres: &[f32]) -> Vec<f32> {
        shifted(centres, &self.origin)
    }

    /// Undoes what [`Rows::new`] did to the points, for the centres.
    fn restore(&self, mut found: Clustering) -> Clustering {
        for row in found.centres.chunks_mut(self.d) {
            row.iter_mut().zip(&self.origin).for_each(|(x, o)| *x += o);
        }
        found
    }
}

fn shifted(rows: &[f32], origin: &[f32]) -> Vec<f32> {
    let mut rows = rows.to_vec();
    rows.par_chunks_mut(origin.len())
        .for_each(|row| row.iter_mut().zip(origin).for_each(|(x, o)| *x -= o));
    rows
}

/// Rows of one part of a sum: parts follow from the shape alone.
const PART: usize = 1024;

/// The sum over rows of `f`, parts of [`PART`] rows added in order.
fn sum_rows(rows: &[f32], d: usize, f: impl Fn(&[f32]) -> f64 + Sync) -> f64 {
    let parts: Vec<f64> =
        rows.par_chunks(PART * d).map(|part| part.chunks(d).map(&f).sum()).collect();
    parts.iter().sum()
}

/// The mean of each column, parts of [`PART`] rows added in order.
fn column_means(rows: &[f32], d: usize) -> Vec<f64> {
    let parts: Vec<Vec<f64>> = rows
        .par_chunks(PART * d)
        .map(|part| {
            let mut sums = vec![0f64; d];
            for row in part.chunks(d) {
                sums.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x));
            }
            sums
        })
        .collect();
    let mut means = vec![0f64; d];
    for part in &parts {
        means.iter_mut().zip(part).for_each(|(m, s)| *m += s);
    }
    let n = (rows.len() / d) as f64;
    means.iter_mut().for_each(|m| *m /= n);
    means
}

/// One restart: assignment and means in turn, from `centres` on.
fn lloyd(rows: &Rows, points: &Points, mut centres: Vec<f32>, config: &KMeans) -> Clustering {
    let Rows { d, metric, squares, variance, .. } = *rows;
    let mut best = Clustering {
        assignment: vec![],
        centres: vec![],
        inertia: f64::INFINITY,
        restart: 0,
        iterations: 0,
        converged: false,
        reseeded: 0,
    };
    let mut nearest = Nearest::unknown(points.squares.len());
    let mut sums = Sums::new(config.clusters, d);
    let mut drift = vec![];
    let mut last = false;
    for iteration in 1..=config.iterations {
        let before = nearest.assignment.clone();
        points.assign(&mut nearest, &centres, &drift);
        let changed = sums.follow(points.values, &before, &nearest.assignment);
        let inertia = sums.inertia(&centres, d, metric, squares);
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
        let moved = reseed_empty(points.values, &mut nearest, &mut sums, &centres, d);
        best.reseeded += moved;
        let next = sums.means(&centres, d, metric);
        drift = lloyd::drift(&centres, &next, d);
        let shift = summed_shift(&centres, &next, d, metric);
        // Once more, so that the assignment belongs to the centres that met the tolerance.
        last = shift <= config.tolerance * variance && moved == 0;
        centres = next;
    }
    best
}

/// The summed shift between two sets of centres.
fn summed_shift(from: &[f32], to: &[f32], d: usize, metric: Metric) -> f64 {
    let squares: f64 =
        from.chunks(d).zip(to.chunks(d)).map(|(x, y)| points::squared_distance(x, y)).sum();
    match metric {
        Metric::Euclidean => squares,
        Metric::Spherical => squares / 2.,
    }
}

/// Sum and count of the points of each cluster.
struct Sums {
    /// `(K, D)`.
    sums: Vec<f64>,
    counts: Vec<usize>,
}

/// Rows that are added up at a time; the partial sums are then added in order.
const SUM_PART: usize = 2048;

impl Sums {
    fn new(k: usize, d: usize) -> Self {
        Self { sums: vec![0.; k * d], counts: vec![0; k] }
    }

    /// Takes points that changed their cluster from one sum to the other; returns how many did.
    fn follow(&mut self, values: &[f32], before: &[u32], after: &[u32]) -> usize {
        let k = self.counts.len();
        let d = self.sums.len() / k;
        let changed: Vec<usize> = (0..after.len())
            .into_par_iter()
            .with_min_len(PART)
            .filter(|&i| before[i] != after[i])
            .collect();
        // The rows that join and leave each cluster, in the order of the points.
        let mut members: Vec<Vec<(u32, f64)>> = vec![vec![]; k];
        for &i in &changed {
            members[after[i] as usize].push((i as u32, 1.));
            self.counts[after[i] as usize] += 1;
            if before[i] != lloyd::UNASSIGNED {
                members[before[i] as usize].push((i as u32, -1.));
                self.counts[before[i] as usize] -= 1;
            }
        }
        self.sums.par_chunks_mut(d).zip(&members).for_each(|(sum, members)| {
            let parts: Vec<Vec<f64>> = members
                .par_chunks(SUM_PART)
                .map(|part| {
                    let mut sum = vec![0f64; d];
                    for &(i, sign) in part {
                        add_row(&mut sum, &values[i as usize * d..][..d], sign);
                    }
                    sum
                })
                .collect();
            for part in &parts {
                sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        });
        changed.len()
    }

    /// `Σ ‖x − c‖²` by `Σ ‖x‖² + Σ_k (n_k ‖c_k‖² − 2 s_k·c_k)`, or its half for unit rows.
    fn inertia(&self, centres: &[f32], d: usize, metric: Metric, squares: f64) -> f64 {
        let rest: f64 = (self.sums.chunks(d).zip(centres.chunks(d)).zip(&self.counts))
            .map(|((sum, centre), &count)| {
                let dot: f64 = sum.iter().zip(centre).map(|(s, &c)| s * f64::from(c)).sum();
                count as f64 * product(centre, centre) - 2. * dot
            })
            .sum();
        let inertia = (squares + rest).max(0.);
        match metric {
            Metric::Euclidean => inertia,
            Metric::Spherical => inertia / 2.,
        }
    }

    /// The means, of unit length if spherical; a cluster without points or direction stays.
    fn means(&self, centres: &[f32], d: usize, metric: Metric) -> Vec<f32> {
        let mut means = centres.to_vec();
        for ((mean, sum), &count) in means.chunks_mut(d).zip(self.sums.chunks(d)).zip(&self.counts)
        {
            let divisor = match metric {
                Metric::Euclidean => count as f64,
                Metric::Spherical => {
                    let length = sum.iter().map(|s| s * s).sum::<f64>().sqrt();
                    // Opposite unit rows leave rounding errors, not a direction.
                    if length > 1e-6 * count as f64 { length } else { 0. }
                }
            };
            if divisor > 0. {
                mean.iter_mut().zip(sum).for_each(|(m, s)| *m = (s / divisor) as f32);
            }
        }
        means
    }

    fn move_point(&mut self, row: &[f32], from: usize, to: usize) {
        let d = row.len();
        add_row(&mut self.sums[from * d..][..d], row, -1.);
        add_row(&mut self.sums[to * d..][..d], row, 1.);
        self.counts[from] -= 1;
        self.counts[to] += 1;
    }
}

/// Gives each empty cluster the point farthest from its own centre; returns how many got one.
fn reseed_empty(
    values: &[f32],
    nearest: &mut Nearest,
    sums: &mut Sums,
    centres: &[f32],
    d: usize,
) -> usize {
    let empty: Vec<usize> = (0..sums.counts.len()).filter(|&k| sums.counts[k] == 0).collect();
    if empty.is_empty() {
        return 0;
    }
    let mut farthest: Vec<(f64, usize)> = values
        .par_chunks(d)
        .zip(&nearest.assignment)
        .enumerate()
        .map(|(i, (row, &k))| {
            let centre = &centres[k as usize * d..][..d];
            let distance = points::squared_distance(row, centre);
            // A point that differs from its centre by rounding alone is not far from it.
            let size = product(row, row).max(product(centre, centre));
            (if distance > 1e-12 * size { distance } else { 0. }, i)
        })
        .filter(|&(distance, _)| distance > 0.)
        .collect();
    farthest.par_sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut candidates = farthest.iter();
    let mut reseeded = 0;
    for k in empty {
        // A cluster's only point stays where it is.
        let alone = |i: usize| sums.counts[nearest.assignment[i] as usize] == 1;
        let Some(&(_, i)) = candidates.find(|&&(_, i)| !alone(i)) else {
            break;
        };
        sums.move_point(&values[i * d..][..d], nearest.assignment[i] as usize, k);
        nearest.place(i, k as u32);
        reseeded += 1;
    }
    reseeded
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPHERICAL: KMeans = KMeans {
        clusters: 3,
        metric: Metric::Spherical,
        restarts: 4,
        iterations: 300,
        tolerance: 1e-4,
    };
    const EUCLIDEAN: KMeans = KMeans { metric: Metric::Euclidean, ..SPHERICAL };

    /// Three directions, two points each.
    const PAIRS: [f32; 12] = [1., 0.1, 1., -0.1, 0.1, 1., -0.1, 1., -1., 0.05, -1., -0.05];

    fn blobs(n: usize, d: usize, k: usize, seed: u64) -> Vec<f32> {
        use rand::RngExt;
        let mut random = stage::random::stream(seed, "blobs", &[]);
        let centres: Vec<f32> = (0..k * d).map(|_| random.random::<f32>() * 8.).collect();
        (0..n * d)
            .map(|i| centres[(i / d % k) * d + i % d] + random.random::<f32>() - 0.5)
            .collect()
    }

    #[test]
    fn the_worked_example_has_its_labels_and_inertia() -> Result<()> {
        let centres = [1., 0., 0., 1., -1., 0.];
        let once = KMeans { iterations: 1, ..SPHERICAL };
        let found = k_means_from(&PAIRS, 6, 2, &centres, &once)?;
        assert_eq!(found.assignment, [0, 0, 1, 1, 2, 2]);
        assert!((found.inertia - 0.022_346_6).abs() < 1e-7, "{}", found.inertia);
        Ok(())
    }

    #[test]
    fn a_row_may_be_scaled_without_effect_when_spherical() -> Result<()> {
        let points = blobs(60, 5, 3, 1);
        let mut scaled = points.clone();
        scaled.chunks_mut(5).enumerate().for_each(|(i, row)| {
            row.iter_mut().for_each(|x| *x *= 0.25 * (1 + i % 7) as f32);
        });
        let (a, b) =
            (k_means(&points, 60, 5, &SPHERICAL, 3)?, k_means(&scaled, 60, 5, &SPHERICAL, 3)?);
        assert_eq!(a.assignment, b.assignment);
        assert!((a.inertia - b.inertia).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn inertia_never_rises_and_belongs_to_the_assignment() -> Result<()> {
        let (n, d) = (500, 7);
        let points = blobs(n, d, 9, 2);
        for config in [EUCLIDEAN, SPHERICAL] {
            let mut before = f64::INFINITY;
            for iterations in 1..12 {
                let config =
                    KMeans { clusters: 6, restarts: 1, iterations, tolerance: 0., ..config };
                let found = k_means(&points, n, d, &config, 5)?;
                assert!(found.inertia <= before * (1. + 1e-12));
                before = found.inertia;
                let rows = match config.metric {
                    Metric::Euclidean => points.clone(),
                    Metric::Spherical => points::unit_rows(&points, d, "test")?,
                };
                let direct: f64 = (rows.chunks(d).zip(&found.assignment))
                    .map(|(x, &k)| {
                        points::squared_distance(x, &found.centres[k as usize * d..][..d])
                    })
                    .sum();
                let direct = if config.metric == Metric::Spherical { direct / 2. } else { direct };
                assert!((direct - found.inertia).abs() < 1e-5 * direct, "{direct} {found:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_same_seed_and_any_number_of_threads_give_the_same_bits() -> Result<()> {
        let points = blobs(3000, 9, 12, 4);
        let config = KMeans { clusters: 12, restarts: 2, ..EUCLIDEAN };
        let want = k_means(&points, 3000, 9, &config, 7)?;
        assert_ne!(want.centres, k_means(&points, 3000, 9, &config, 8)?.centres);
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let found = pool.install(|| k_means(&points, 3000, 9, &config, 7))?;
            assert_eq!(found, want);
        }
        Ok(())
    }

    #[test]
    fn separate_groups_are_found() -> Result<()> {
        let points = blobs(400, 6, 4, 9);
        for config in [EUCLIDEAN, SPHERICAL] {
            let found = k_means(&points, 400, 6, &KMeans { clusters: 4, ..config }, 0)?;
            for i in 4..400 {
                assert_eq!(found.assignment[i], found.assignment[i % 4]);
            }
            assert!(found.converged);
        }
        Ok(())
    }

    #[test]
    fn an_offset_common_to_all_points_changes_no_assignment() -> Result<()> {
        let points = blobs(200, 4, 5, 3);
        let far: Vec<f32> = points.iter().map(|x| x + 4096.).collect();
        let config = KMeans { clusters: 5, ..EUCLIDEAN };
        let (near, far) =
            (k_means(&points, 200, 4, &config, 1)?, k_means(&far, 200, 4, &config, 1)?);
        assert_eq!(near.assignment, far.assignment);
        assert!((near.inertia / far.inertia - 1.).abs() < 1e-3);
        Ok(())
    }

    #[test]
    fn an_empty_cluster_gets_the_farthest_point() -> Result<()> {
        let points = [0f32, 1., 2., 10., 50., 51.];
        let start = [1f32, 50., 1000.];
        let found = k_means_from(&points, 6, 1, &start, &KMeans { tolerance: 0., ..EUCLIDEAN })?;
        assert_eq!(found.assignment, [0, 0, 0, 2, 1, 1]);
        assert_eq!(found.centres, [1., 50.5, 10.]);
        assert_eq!(found.reseeded, 1);
        assert!((found.inertia - 2.5).abs() < 1e-4, "{}", found.inertia);
        Ok(())
    }

    #[test]
    fn degenerate_inputs_have_defined_results() -> Result<()> {
        for config in [EUCLIDEAN, SPHERICAL] {
            let same = [0.3f32, 0.4].repeat(50);
            let found = k_means(&same, 50, 2, &config, 0)?;
            assert_eq!((found.assignment, found.reseeded), (vec![0; 50], 0));
            assert!(found.inertia < 1e-9 && found.converged, "{}", found.inertia);

            let one = k_means(&PAIRS, 6, 2, &KMeans { clusters: 1, ..config }, 0)?;
            assert_eq!(one.assignment, [0; 6]);

            let each = k_means(&PAIRS, 6, 2, &KMeans { clusters: 6, ..config }, 0)?;
            let mut clusters = each.assignment.clone();
            clusters.sort_unstable();
            assert_eq!(clusters, [0, 1, 2, 3, 4, 5]);
            assert!(each.inertia < 1e-6);

            // Two distinct points, three clusters: one stays empty.
            let two = [1f32, 0., 0., 1., 1., 0., 0., 1.];
            let found = k_means(&two, 4, 2, &config, 0)?;
            assert_eq!(found.assignment[0], found.assignment[2]);
            assert_eq!(found.assignment[1], found.assignment[3]);
            assert_ne!(found.assignment[0], found.assignment[1]);
            assert!(found.inertia < 1e-9);
        }
        // Opposite rows have no mean direction; their centre stays a unit vector.
        let opposite = [1f32, 0., -1., 0.];
        let found = k_means(&opposite, 2, 2, &KMeans { clusters: 1, ..SPHERICAL }, 0)?;
        assert!((product(&found.centres, &found.centres) - 1.).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn tiny_and_huge_points_are_grouped_like_others() -> Result<()> {
        let points = blobs(300, 5, 4, 6);
        let config = KMeans { clusters: 4, ..EUCLIDEAN };
        for scale in [1e-30, 1e-12, 1e15] {
            let scaled: Vec<f32> = points.iter().map(|x| x * scale).collect();
            let spherical = KMeans { metric: Metric::Spherical, ..config };
            if scale < 1e-20 {
                let error = k_means(&scaled, 300, 5, &spherical, 2).expect_err("no direction");
                assert!(error.to_string().contains("row 0"), "{error}");
            }
            for config in [config, spherical].into_iter().take(if scale < 1e-20 { 1 } else { 2 }) {
                let found = k_means(&scaled, 300, 5, &config, 2)?;
                assert!(found.inertia.is_finite() && found.inertia > 0., "{scale}");
                for i in 4..300 {
                    assert_eq!(found.assignment[i], found.assignment[i % 4], "{scale}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn iterations_from_given_centres_agree_with_scikit_learn() -> Result<()> {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../tests-data/k-means.json"))?;
        for (i, case) in fixture["cases"].as_array().expect("cases").iter().enumerate() {
            let number = |key: &str| case[key].as_u64().expect("a number") as usize;
            let floats = |key: &str| serde_json::from_value::<Vec<f32>>(case[key].clone());
            let (n, d, clusters) = (number("n"), number("d"), number("k"));
            let config = KMeans { clusters, tolerance: 0., ..EUCLIDEAN };
            let found = k_means_from(&floats("points")?, n, d, &floats("start")?, &config)?;
            let want: Vec<u32> = serde_json::from_value(case["assignment"].clone())?;
            assert_eq!(found.assignment, want, "case {i}");
            for (got, want) in found.centres.iter().zip(floats("centres")?) {
                assert!((got - want).abs() < 2e-6, "case {i}: {got} {want}");
            }
            let inertia = case["inertia"].as_f64().expect("a number");
            assert!((found.inertia / inertia - 1.).abs() < 1e-6, "case {i}: {}", found.inertia);
        }
        Ok(())
    }

    #[test]
    fn bad_input_is_refused_with_the_row() {
        let refused = |points: &[f32], n, config: &KMeans| {
            k_means(points, n, 2, config, 0).expect_err("refused").to_string()
        };
        let mut points = PAIRS;
        points[5] = f32::INFINITY;
        assert!(refused(&points, 6, &EUCLIDEAN).contains("row 2"));
        points[4..6].fill(0.);
        assert!(refused(&points, 6, &SPHERICAL).contains("row 2"));
        assert!(refused(&PAIRS, 6, &KMeans { clusters: 7, ..EUCLIDEAN }).contains("6 points"));
        assert!(refused(&PAIRS, 6, &KMeans { clusters: 0, ..EUCLIDEAN }).contains("clusters"));
        assert!(refused(&PAIRS, 6, &KMeans { restarts: 0, ..EUCLIDEAN }).contains("restarts"));
        assert!(refused(&PAIRS, 6, &KMeans { iterations: 0, ..EUCLIDEAN }).contains("iterations"));
        assert!(refused(&PAIRS, 6, &KMeans { tolerance: -1., ..EUCLIDEAN }).contains("tolerance"));
        assert!(refused(&[], 0, &EUCLIDEAN).contains("0 points"));
    }
}
