//! k-means by Lloyd's iterations, Euclidean and spherical, with restarts.
//!
//! Both metrics are one computation. The spherical one scales rows and centres to unit length,
//! where `1 − cos(x, c) = ‖x − c‖² / 2`; centres are the directions of the arithmetic means of the
//! unit rows (the E-step of Huang et al. 2023, arXiv:2111.11821).

use anyhow::{Result, ensure};
use collective::Communicator;
use kernels::similarity::{RowFormat, product};

use crate::clustering::{Clustering, KMeans, Metric};
use crate::iterations::{Facts, iterate};
use crate::lloyd::Points;
use crate::points;
use crate::seeding;

/// Groups the rows of `points` `(N, D)` into clusters around `K` centres.
///
/// Each restart begins with greedy k-means++ (`2 + ⌊ln K⌋` candidates for each centre, drawn in
/// proportion to the distance from the centres so far) and alternates assignment and means until
/// the assignment repeats, the centres shift by no more than the tolerance, or the limit of
/// iterations is reached. Returns the assignment of lowest inertia over all iterations of all
/// restarts, with its centres.
///
/// An empty cluster gets, as its next centre, the point farthest from its own centre (of equals the
/// lowest index). Where all points lie on their centres nothing is moved, so with fewer distinct
/// points than clusters the surplus clusters stay empty.
///
/// The result depends on `seed` and the points only, not on the number of threads.
///
/// # Errors
///
/// `points` is not an `(n, d)` matrix of finite numbers, there are fewer than `K` points, a value of
/// `config` is out of range, or, for [`Metric::Spherical`], a row is shorter than 1e-12. The message
/// names the row.
pub fn k_means(
    points: &[f32],
    n: usize,
    d: usize,
    config: &KMeans,
    seed: u64,
) -> Result<Clustering> {
    k_means_on_ranks(points, n, d, config, seed, &Communicator::single())
}

/// [`k_means`] whose restarts are divided among `ranks`. The result has the same bits on any number of them.
///
/// - `points`: the same on all ranks.
///
/// # Errors
///
/// Those of [`k_means`], or a rank has ended.
pub fn k_means_on_ranks(
    points: &[f32],
    n: usize,
    d: usize,
    config: &KMeans,
    seed: u64,
    ranks: &Communicator,
) -> Result<Clustering> {
    restarts(&CheckedPoints::new(points, n, d, None, config)?, config, seed, ranks)
}

/// [`k_means`] with a weight for each point, `(N,)`: a point of weight 2 counts as two points.
///
/// A point of weight 0 takes no part in seeding, means and inertia, but is assigned to its nearest
/// centre.
///
/// # Errors
///
/// Those of [`k_means`]; a weight is negative or not finite, or fewer than `K` are above 0.
pub fn k_means_weighted(
    points: &[f32],
    weights: &[f32],
    d: usize,
    config: &KMeans,
    seed: u64,
) -> Result<Clustering> {
    let points = CheckedPoints::new(points, weights.len(), d, Some(weights), config)?;
    restarts(&points, config, seed, &Communicator::single())
}

/// [`k_means`] from given centres `(K, D)`: one start, `config.restarts` is ignored.
///
/// # Errors
///
/// Those of [`k_means`], for the centres too.
pub fn k_means_from(
    points: &[f32],
    n: usize,
    d: usize,
    centres: &[f32],
    config: &KMeans,
) -> Result<Clustering> {
    from_centres(&CheckedPoints::new(points, n, d, None, config)?, centres, config)
}

/// [`k_means_weighted`] from given centres `(K, D)`: one start, `config.restarts` is ignored.
///
/// # Errors
///
/// Those of [`k_means_weighted`], for the centres too.
pub fn k_means_weighted_from(
    points: &[f32],
    weights: &[f32],
    d: usize,
    centres: &[f32],
    config: &KMeans,
) -> Result<Clustering> {
    from_centres(
        &CheckedPoints::new(points, weights.len(), d, Some(weights), config)?,
        centres,
        config,
    )
}

fn restarts(
    rows: &CheckedPoints,
    config: &KMeans,
    seed: u64,
    ranks: &Communicator,
) -> Result<Clustering> {
    ensure!(config.restarts > 0, "k_means: restarts is 0; at least one is needed");
    let CheckedPoints { values, d, facts, .. } = rows;
    let mut best: Option<Clustering> = None;
    let mut reseeded = 0;
    let packed = rows.packed();
    let seeding = Points::new(values, *d, seeding::format(config.clusters));
    let restarts: Vec<usize> = (ranks.rank()..config.restarts).step_by(ranks.size()).collect();
    for together in restarts.chunks(seeding::together(facts.n, config.clusters)) {
        let stream = |&restart: &usize| stage::random::stream(seed, "k-means++", &[restart as u64]);
        let mut randoms: Vec<_> = together.iter().map(stream).collect();
        let starts = seeding::greedy_k_means_plus_plus(
            &seeding,
            facts.weights,
            config.clusters,
            &mut randoms,
        );
        for (&restart, centres) in together.iter().zip(starts) {
            let found = Clustering { restart, ..iterate(&packed, facts, centres, config)? };
            reseeded += found.reseeded;
            if best.as_ref().is_none_or(|best| found.inertia < best.inertia) {
                best = Some(found);
            }
        }
    }
    let best = best_of_ranks(best.map(|best| Clustering { reseeded, ..best }), ranks)?;
    Ok(best.relative_to(&rows.origin))
}

/// The clustering of lowest inertia on all ranks, of equals that of the first restart.
///
/// - `own`: the best of this rank; `None` on a rank without restarts.
fn best_of_ranks(own: Option<Clustering>, ranks: &Communicator) -> Result<Clustering> {
    if ranks.size() == 1 {
        return Ok(own.expect("there was at least one restart"));
    }
    let reseeded = own.as_ref().map_or(0, |own| own.reseeded);
    let own_key =
        own.as_ref().map_or([u64::MAX; 2], |own| [own.inertia.to_bits(), own.restart as u64]);
    // Bits of numbers that are not negative are ordered as the numbers.
    let keys = ranks.all_gather(&own_key)?;
    let best_key = keys.as_chunks().0.iter().min().copied().unwrap_or(own_key);
    let own = own.filter(|_| own_key == best_key);
    let [assignment, iterations] = match &own {
        Some(own) => [&own.assignment[..], &[own.iterations as u32, u32::from(own.converged)]],
        None => [&[][..], &[]],
    };
    let (assignment, run) = (ranks.all_gather(assignment)?, ranks.all_gather(iterations)?);
    let centres = ranks.all_gather(own.as_ref().map_or(&[][..], |own| &own.centres))?;
    let mut total = [reseeded as u64];
    ranks.all_reduce_sum(&mut total)?;
    Ok(Clustering {
        assignment,
        centres,
        inertia: f64::from_bits(best_key[0]),
        restart: best_key[1] as usize,
        iterations: run[0] as usize,
        converged: run[1] != 0,
        reseeded: total[0] as usize,
    })
}

fn from_centres(rows: &CheckedPoints, centres: &[f32], config: &KMeans) -> Result<Clustering> {
    points::check(centres, config.clusters, rows.d, "k_means_from, centres")?;
    let mut centres = centres.to_vec();
    match config.metric {
        Metric::Spherical => points::scale(&mut centres, rows.d, "k_means_from, centres")?,
        Metric::Euclidean => points::shift(&mut centres, &rows.origin),
    }
    Ok(iterate(&rows.packed(), &rows.facts, centres, config)?.relative_to(&rows.origin))
}

/// Points that are checked and scaled or shifted, ready for the iterations.
struct CheckedPoints<'a> {
    /// `(N, D)`: unit rows, or rows relative to `origin`.
    values: Vec<f32>,
    d: usize,
    /// The mean, subtracted from Euclidean rows so that a common offset costs no precision.
    origin: Vec<f32>,
    facts: Facts<'a>,
}

impl<'a> CheckedPoints<'a> {
    fn new(
        points: &[f32],
        n: usize,
        d: usize,
        weights: Option<&'a [f32]>,
        config: &KMeans,
    ) -> Result<Self> {
        points::check(points, n, d, "k_means")?;
        config.check(n, "k_means")?;
        if let Some(weights) = weights {
            check_weights(weights, config.clusters)?;
        }
        let mut values = points.to_vec();
        let mut origin = vec![0.; d];
        match config.metric {
            Metric::Spherical => points::scale(&mut values, d, "k_means")?,
            Metric::Euclidean => {
                let means = points::weighted_means(points, d, weights);
                origin.iter_mut().zip(means).for_each(|(origin, mean)| *origin = mean as f32);
                points::shift(&mut values, &origin);
            }
        }
        let mass = weights.map_or(n as f64, |w| w.iter().map(|&w| f64::from(w)).sum());
        let squares = points::sum_rows(&values, d, |i, row| {
            weights.map_or(1., |weights| f64::from(weights[i])) * product(row, row)
        });
        let mean_square: f64 =
            points::weighted_means(&values, d, weights).iter().map(|m| m * m).sum();
        let variance = (squares / mass - mean_square).max(0.) / d as f64;
        Ok(Self { values, d, origin, facts: Facts { n, d, weights, squares, variance } })
    }

    fn packed(&self) -> Points<'_> {
        Points::new(&self.values, self.d, RowFormat::fastest())
    }
}

fn check_weights(weights: &[f32], clusters: usize) -> Result<()> {
    if let Some(i) = weights.iter().position(|w| !(0. ..1e18).contains(w)) {
        anyhow::bail!(
            "k_means: the weight of row {i} is {}; a weight must be finite, at least 0 and below 1e18",
            weights[i]
        );
    }
    let weighted = weights.iter().filter(|&&w| w > 0.).count();
    ensure!(
        weighted >= clusters,
        "k_means: {weighted} points with a weight above 0 cannot fill {clusters} clusters; ask for \
         fewer clusters"
    );
    Ok(())
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
    fn ranks_that_share_the_restarts_find_the_bits_of_one() -> Result<()> {
        let (n, d) = (300, 6);
        for config in [KMeans { clusters: 7, ..SPHERICAL }, KMeans { restarts: 3, ..EUCLIDEAN }] {
            // Of 3 restarts, the last of 4 ranks has none.
            let points = blobs(n, d, 5, 4);
            let want = k_means(&points, n, d, &config, 9)?;
            for count in [2, 4] {
                let run = |ranks| k_means_on_ranks(&points, n, d, &config, 9, &ranks);
                let found = crate::tests::on_ranks(count, run)?;
                assert!(found.iter().all(|found| *found == want), "{count} ranks, {config:?}");
            }
        }
        Ok(())
    }

    /// ProPos, case 9: labels and inertia.
    #[test]
    fn the_worked_example_has_its_labels_and_inertia() -> Result<()> {
        let centres = [1., 0., 0., 1., -1., 0.];
        let once = KMeans { iterations: 1, ..SPHERICAL };
        let found = k_means_from(&PAIRS, 6, 2, &centres, &once)?;
        assert_eq!(found.assignment, [0, 0, 1, 1, 2, 2]);
        assert!((found.inertia - 0.022_346_6).abs() < 1e-7, "{}", found.inertia);
        Ok(())
    }

    /// ProPos, case 9: lengths do not matter.
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

    /// ProPos, case 9: the inertia of iterations.
    #[test]
    fn inertia_never_rises_and_belongs_to_the_assignment() -> Result<()> {
        let (n, d) = (500, 7);
        let points = blobs(n, d, 9, 2);
        for config in [EUCLIDEAN, SPHERICAL] {
            let mut before = f64::INFINITY;
            let config =
                KMeans { clusters: 6, restarts: 1, iterations: 2, tolerance: 0., ..config };
            // The first iteration scores the given centres, the second their means, and the better one is returned:
            // equal inertia only where no point changes its cluster.
            let mut centres = points[..6 * d].to_vec();
            for _ in 1..12 {
                let found = k_means_from(&points, n, d, &centres, &config)?;
                centres.clone_from(&found.centres);
                assert!(found.inertia < before || found.converged, "{} {before}", found.inertia);
                before = found.inertia;
                let rows = match config.metric {
                    Metric::Euclidean => points.clone(),
                    Metric::Spherical => {
                        let mut rows = points.clone();
                        points::scale(&mut rows, d, "test")?;
                        rows
                    }
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

    /// ProPos, case 9: the seed.
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
    fn a_weight_counts_as_so_many_points() -> Result<()> {
        let (n, d) = (240, 3);
        let points = blobs(n, d, 5, 8);
        let weights: Vec<f32> = (0..n).map(|i| (i * 7 % 4) as f32).collect();
        let repeated: Vec<f32> = (points.chunks(d).zip(&weights))
            .flat_map(|(row, &weight)| row.repeat(weight as usize))
            .collect();
        let all = repeated.len() / d;
        for config in [EUCLIDEAN, SPHERICAL] {
            let config = KMeans { clusters: 4, restarts: 3, ..config };
            let start = &points[d..][..4 * d];
            let want = k_means_from(&repeated, all, d, start, &config)?;
            let found = k_means_weighted_from(&points, &weights, d, start, &config)?;
            assert!((found.inertia / want.inertia - 1.).abs() < 1e-6);
            assert_eq!(found.iterations, want.iterations);
            assert!(found.centres.iter().zip(&want.centres).all(|(a, b)| (a - b).abs() < 1e-5));
            let repeat = |(&k, &weight): (&u32, &f32)| vec![k; weight as usize];
            let repeated: Vec<u32> =
                found.assignment.iter().zip(&weights).flat_map(repeat).collect();
            assert_eq!(repeated, want.assignment);

            let ones = k_means_weighted(&points, &vec![1.; n], d, &config, 3)?;
            let plain = k_means(&points, n, d, &config, 3)?;
            assert_eq!((ones.assignment, ones.centres), (plain.assignment, plain.centres));
            // Nothing is drawn from, and no mean moved by, points without weight.
            let few: Vec<f32> = (0..n).map(|i| if i % 5 < 4 { 0.25 } else { 0. }).collect();
            let found = k_means_weighted(&points, &few, d, &config, 0)?;
            let of: Vec<u32> = (0..4).map(|i| found.assignment[i]).collect();
            assert!((0..n).all(|i| i % 5 == 4 || found.assignment[i] == of[i % 5]), "{of:?}");
        }
        let refused = |weights: &[f32], config| {
            k_means_weighted(&points[..weights.len() * d], weights, d, config, 0)
                .expect_err("refused")
                .to_string()
        };
        assert!(refused(&[1., 1., -1., 1.], &EUCLIDEAN).contains("row 2"));
        assert!(refused(&[1., f32::NAN, 1., 1.], &EUCLIDEAN).contains("row 1"));
        assert!(refused(&[1., 0., 0., 1.], &EUCLIDEAN).contains("2 points with a weight"));
        Ok(())
    }

    #[test]
    fn ten_thousand_clusters_and_duplicates_are_in_order() -> Result<()> {
        let (n, d, clusters) = (20_000, 3, 10_000);
        // Each point twice, and as many clusters as distinct points.
        let points: Vec<f32> =
            blobs(clusters, d, 40, 7).chunks(d).flat_map(|row| row.repeat(2)).collect();
        let config = KMeans { clusters, restarts: 1, iterations: 20, ..EUCLIDEAN };
        let found = k_means(&points, n, d, &config, 0)?;
        assert!(found.inertia < 1e-6, "{}", found.inertia);
        let mut used = vec![0; clusters];
        found.assignment.iter().for_each(|&k| used[k as usize] += 1);
        assert!(used.iter().all(|&points| points == 2));
        assert!(found.assignment.chunks(2).all(|pair| pair[0] == pair[1]));
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
            serde_json::from_str(include_str!("../tests/k-means.json"))?;
        for (i, case) in fixture["cases"].as_array().expect("cases").iter().enumerate() {
            let number = |key: &str| case[key].as_u64().expect("a number") as usize;
            let floats = |key: &str| serde_json::from_value::<Vec<f32>>(case[key].clone());
            let (n, d, clusters) = (number("n"), number("d"), number("k"));
            let config = KMeans { clusters, tolerance: 0., ..EUCLIDEAN };
            let (points, start) = (floats("points")?, floats("start")?);
            let found = match case["weights"].is_null() {
                true => k_means_from(&points, n, d, &start, &config)?,
                false => k_means_weighted_from(&points, &floats("weights")?, d, &start, &config)?,
            };
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
