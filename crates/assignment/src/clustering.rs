//! The options and the result of k-means.

use anyhow::{Result, ensure};

/// The distance between a point and a centre.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// `‖x − c‖²`.
    Euclidean,
    /// `1 − cos(x, c)`, whatever the lengths.
    Spherical,
}

/// The parameters of k-means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KMeans {
    /// Number of clusters `K`, from 1 to the number of points.
    pub clusters: usize,
    /// Distance to minimise.
    pub metric: Metric,
    /// Independent starts by greedy k-means++; the result of lowest inertia is kept.
    pub restarts: usize,
    /// Most assignment steps of each restart.
    pub iterations: usize,
    /// A restart ends when the summed shift of the centres is at most this times the mean variance
    /// of the (for [`Metric::Spherical`], unit) rows' columns. 0 leaves only repeated assignments.
    pub tolerance: f64,
}

impl KMeans {
    /// Spherical k-means that stops where scikit-learn's does: after 300 iterations, or at a
    /// tolerance of 10⁻⁴.
    pub fn spherical(clusters: usize, restarts: usize) -> Self {
        let metric = Metric::Spherical;
        Self { clusters, metric, restarts, iterations: 300, tolerance: 1e-4 }
    }

    /// Checks what does not depend on the values of the `n` points.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message begins with `function`.
    pub(crate) fn check(&self, n: usize, function: &str) -> Result<()> {
        let k = self.clusters;
        ensure!(k > 0, "{function}: clusters is 0; at least one is needed");
        ensure!(n >= k, "{function}: {n} points cannot fill {k} clusters; ask for fewer clusters");
        ensure!(self.iterations > 0, "{function}: iterations is 0; at least one is needed");
        ensure!(
            self.tolerance >= 0. && self.tolerance.is_finite(),
            "{function}: tolerance is {}; it is a share of the variance, 0 or above",
            self.tolerance
        );
        Ok(())
    }
}

/// The grouping of lowest inertia over all iterations of all restarts.
#[derive(Debug, Clone, PartialEq)]
pub struct Clustering {
    /// Cluster of each point, `(N,)`: the nearest of `centres`, the lowest index of equals.
    pub assignment: Vec<u32>,
    /// `(K, D)` row-major; of unit length for [`Metric::Spherical`].
    pub centres: Vec<f32>,
    /// Sum over points of the distance to their centre, in the metric's unit.
    pub inertia: f64,
    /// The restart that found it, from 0.
    pub restart: usize,
    /// Assignment steps of this restart.
    pub iterations: usize,
    /// Whether this restart met a stop rule before the limit of iterations.
    pub converged: bool,
    /// Empty clusters whose centre was moved to the farthest point, over all restarts.
    pub reseeded: usize,
}

impl Clustering {
    /// Adds `origin` to the centres, which were found on points relative to it, and logs re-seeding.
    pub(crate) fn relative_to(mut self, origin: &[f32]) -> Self {
        if self.reseeded > 0 {
            let reseeded = self.reseeded;
            tracing::info!(
                "k-means: {reseeded} empty clusters were re-seeded at the farthest point"
            );
        }
        for row in self.centres.chunks_mut(origin.len()) {
            row.iter_mut().zip(origin).for_each(|(x, o)| *x += o);
        }
        self
    }
}
