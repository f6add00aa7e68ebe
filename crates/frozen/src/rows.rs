//! The embeddings of a job, standardised for heads, and k-means on them.

use anyhow::{Result, ensure};
use assignment::{KMeans, Metric, k_means_on_ranks, nearest_neighbours_on_ranks};
use collective::Communicator;
use data::{DataSet, Embeddings, Images, PseudoLabels};
use serde::{Deserialize, Serialize};
use stage::Job;
use stage::container::Floats;

use crate::numbers::EarlierClusters;

/// The embeddings of the `N` pictures that a job scores.
#[derive(Debug, Clone)]
pub struct FrozenEmbeddings {
    /// The data set that the pictures belong to.
    pub data_set: DataSet,
    /// The pictures, as ascending rows of `images.safetensors`.
    pub index: Vec<u32>,
    /// Width `D` of an embedding.
    pub width: usize,
    /// Outputs of the backbone, `(N, D)`.
    pub rows: Floats,
    /// Width `P` of a projection.
    pub projection_width: usize,
    /// Projections, `(N, P)`.
    pub projections: Floats,
    /// The assignment of this stage's last round, `(N,)`, if there was one.
    pub previous: Option<Vec<u32>>,
    /// The clusters of the run before, if there was one.
    pub earlier: Option<EarlierClusters>,
}

impl FrozenEmbeddings {
    /// Reads the roles `embeddings` and `previous`, and checks that they belong to the job's pictures;
    /// reads `earlier`, whose pictures may be others.
    ///
    /// # Errors
    ///
    /// A file is missing, damaged, or of other pictures; there are fewer pictures than clusters.
    pub fn open(job: &Job) -> Result<Self> {
        let images = Images::open(&job.images)?;
        let path = job.input("embeddings")?.join("embeddings.safetensors");
        let read = Embeddings::open(&path)?;
        read.data_set.require(images.data_set(), "embed these images again")?;
        let (index, clusters) = (images.rows(&job.data.score_on), job.data.clusters);
        ensure!(
            read.index == index,
            "`{}` has {} embeddings but {} images are to be scored; embed again",
            path.display(),
            read.index.len(),
            index.len()
        );
        ensure!(
            index.len() >= clusters,
            "{} images cannot be sorted into {clusters} clusters; ask for fewer clusters",
            index.len()
        );
        let previous = match job.optional_input("previous") {
            None => None,
            Some(folder) => {
                let labels = PseudoLabels::open(&folder.join(PseudoLabels::FILE))?;
                labels.data_set.require(&read.data_set, "start the rounds again")?;
                labels.require_clusters(clusters)?;
                ensure!(
                    labels.index == index,
                    "`{}` has {} assignments but {} images are to be scored; start the rounds again",
                    labels.data_set.path.display(),
                    labels.index.len(),
                    index.len()
                );
                Some(labels.assignment)
            }
        };
        let earlier = EarlierClusters::of_job(job, &images, &index);
        Ok(Self {
            data_set: read.data_set,
            index,
            width: read.width,
            rows: read.backbone,
            projection_width: read.projection_width,
            projections: read.projection,
            previous,
            earlier,
        })
    }

    /// Number `N` of pictures.
    pub fn count(&self) -> usize {
        self.index.len()
    }
}

/// The `k` nearest other rows of each row by cosine, nearest first, `(N, k)`, and the mean cosine of
/// the `k`-th. The ranks share the search.
///
/// # Errors
///
/// A row has no direction, or there are fewer than `k` other rows; with `k = 0` both are fine. Or a rank
/// has ended.
pub fn cosine_neighbours(
    rows: &[f32],
    width: usize,
    k: usize,
    ranks: &Communicator,
) -> Result<(Vec<u32>, f64)> {
    if k == 0 {
        return Ok((vec![], 1.));
    }
    let unit = unit_rows(rows, width);
    let n = rows.len() / width;
    let found = nearest_neighbours_on_ranks(&unit, n, width, k, ranks)?;
    let cosine = |(i, &j): (usize, &u32)| -> f64 {
        let (x, y) = (&unit[i * width..][..width], &unit[j as usize * width..][..width]);
        x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    };
    let last = found.iter().skip(k - 1).step_by(k);
    Ok((found.clone(), last.enumerate().map(cosine).sum::<f64>() / n as f64))
}

/// Rows at unit length; a row of zeros stays.
pub fn unit_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut unit = rows.to_vec();
    for row in unit.chunks_exact_mut(width) {
        let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
        let factor = (1. / squares.sqrt().max(1e-12)) as f32;
        row.iter_mut().for_each(|x| *x *= factor);
    }
    unit
}

/// Mean and deviation of each column, of the rows that a head was trained on.
///
/// `predict` applies those of the training, so they are part of `head.safetensors`.
#[derive(Debug, Clone, PartialEq)]
pub struct Standardisation {
    /// `(D,)`.
    pub mean: Vec<f32>,
    /// Unbiased, `(D,)`; 1 for a column without variance, which then becomes 0.
    pub deviation: Vec<f32>,
}

impl Standardisation {
    /// Measures the columns of `rows` `(N, D)`, `N ≥ 1`.
    pub fn of(rows: &[f32], width: usize) -> Self {
        let n = (rows.len() / width) as f64;
        let mut mean = vec![0f64; width];
        for row in rows.chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x) / n);
        }
        let mut squares = vec![0f64; width];
        for row in rows.chunks_exact(width) {
            for ((square, mean), &x) in squares.iter_mut().zip(&mean).zip(row) {
                *square += (f64::from(x) - mean).powi(2);
            }
        }
        let deviation = |square: f64| {
            let deviation = (square / (n - 1.).max(1.)).sqrt();
            if deviation > 1e-12 { deviation as f32 } else { 1. }
        };
        Self {
            mean: mean.into_iter().map(|mean| mean as f32).collect(),
            deviation: squares.into_iter().map(deviation).collect(),
        }
    }

    /// `(x − mean) / deviation`, column by column.
    pub fn apply(&self, rows: &[f32]) -> Vec<f32> {
        let mut standard = rows.to_vec();
        for row in standard.chunks_exact_mut(self.mean.len()) {
            for ((x, mean), deviation) in row.iter_mut().zip(&self.mean).zip(&self.deviation) {
                *x = (*x - mean) / deviation;
            }
        }
        standard
    }
}

/// `[<stage>.k-means]`: k-means on the same embeddings, whose result stands beside the head's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct KMeansTable {
    /// Starts; the one with the lowest inertia is kept.
    pub restarts: usize,
    /// Steps of one start at most.
    pub iterations: usize,
    /// Whether columns are standardised before rows are scaled to unit length.
    pub standardise: bool,
}

impl KMeansTable {
    /// Checks the values.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(&self, stage: &str) -> Result<()> {
        for (key, value) in [("restarts", self.restarts), ("iterations", self.iterations)] {
            ensure!(value >= 1, "`{key}` in `[{stage}.k-means]` is {value}; it must be at least 1");
        }
        Ok(())
    }

    /// The cluster of each row of `rows` `(N, D)` by the angle between rows. The ranks share the restarts.
    ///
    /// # Errors
    ///
    /// Those of [`k_means_on_ranks`].
    pub fn assign(
        &self,
        rows: &[f32],
        width: usize,
        clusters: usize,
        seed: u64,
        ranks: &Communicator,
    ) -> Result<Vec<u32>> {
        let KMeansTable { restarts, iterations, standardise } = *self;
        let metric = Metric::Spherical;
        let config = KMeans { clusters, metric, restarts, iterations, tolerance: 1e-4 };
        let standard = standardise.then(|| Standardisation::of(rows, width).apply(rows));
        let rows = standard.as_deref().unwrap_or(rows);
        let n = rows.len() / width;
        Ok(k_means_on_ranks(rows, n, width, &config, seed, ranks)?.assignment)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_get_mean_0_and_deviation_1() {
        let rows = [1f32, 5., 3., 5., 8., 5.];
        let standard = Standardisation::of(&rows, 2);
        // Deviation of 1, 3, 8 around 4: √(26 / 2).
        assert_eq!(standard.mean, [4., 5.]);
        assert!((standard.deviation[0] - 13f32.sqrt()).abs() < 1e-6);
        let found = standard.apply(&rows);
        assert!((found[0] + 3. / 13f32.sqrt()).abs() < 1e-6, "{found:?}");
        assert_eq!([found[1], found[3], found[5]], [0.; 3], "a constant column is 0");
        // Other rows are measured by the same means.
        assert!((standard.apply(&[4., 7.])[1] - 2.).abs() < 1e-6);
    }

    #[test]
    fn neighbours_are_those_by_angle() -> Result<()> {
        // Lengths do not matter: (10, 1) is nearer to (1, 0) than (1, 1) is.
        let (found, last) =
            cosine_neighbours(&[1., 0., 10., 1., 1., 1.], 2, 1, &Communicator::single())?;
        assert_eq!(found, [1, 0, 1]);
        let want = [10. / 101f64.sqrt(), 10. / 101f64.sqrt(), 11. / (202f64).sqrt()];
        assert!((last - want.iter().sum::<f64>() / 3.).abs() < 1e-6, "{last}");
        Ok(())
    }

    #[test]
    fn k_means_can_standardise_first() -> Result<()> {
        // The second column separates, the first is large and means nothing.
        let rows: Vec<f32> = (0..40u16)
            .flat_map(|i| [1000. * f32::from(i * 7 % 40) - 2e4, f32::from(i % 2) - 0.5])
            .collect();
        let table = |standardise| KMeansTable { restarts: 5, iterations: 50, standardise };
        let by_column = |found: &[u32]| (0..40).all(|i| (found[i] == found[0]) == (i % 2 == 0));
        let alone = Communicator::single();
        assert!(by_column(&table(true).assign(&rows, 2, 2, 0, &alone)?));
        assert!(!by_column(&table(false).assign(&rows, 2, 2, 0, &alone)?));
        let error = KMeansTable { restarts: 0, ..table(true) }.check("temi").expect_err("none");
        assert!(error.to_string().contains("`restarts` in `[temi.k-means]`"), "{error}");
        Ok(())
    }
}
