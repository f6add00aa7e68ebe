//! The E-step: spherical k-means on the target network's projections of the un-augmented images.
//!
//! The target uses its running statistics, as wherever a picture is embedded. k-means starts from
//! the same random draws in every epoch. The numbers of the clusters change from one E-step to the
//! next; nothing depends on them.

use anyhow::Result;
use assignment::{Clustering, k_means_on_ranks, optimal_map, shares};
use candle_core::Device;
use data::{Found, Images, Loader};
use stage::Job;
use training::{Checkpoint, Run, Target, outputs};

use crate::Config;

/// The clusters that the last E-step found among the images to train on.
#[derive(Debug)]
pub struct EStepClusters<'a> {
    config: &'a Config,
    job: &'a Job,
    images: &'a Images,
    device: &'a Device,
    rows: Vec<u32>,
    /// Cluster of each of `rows`; empty before the first E-step.
    assignment: Vec<u32>,
    /// Maps each row of the images file to its index in `rows`.
    places: Vec<Option<usize>>,
}

impl<'a> EStepClusters<'a> {
    /// No clusters yet, of the images `rows`.
    pub fn new(
        config: &'a Config,
        job: &'a Job,
        images: &'a Images,
        rows: Vec<u32>,
        device: &'a Device,
    ) -> Self {
        let mut places = vec![None; images.len()];
        rows.iter().enumerate().for_each(|(place, &row)| places[row as usize] = Some(place));
        Self { config, job, images, device, rows, assignment: Vec::new(), places }
    }

    /// The E-step.
    ///
    /// Notes for the log the mean distance `1 − cos` to the centres as `inertia`, the size of the
    /// smallest cluster over the even size as `smallest-cluster`, and the share of images whose
    /// cluster changed as `reassigned`.
    ///
    /// # Errors
    ///
    /// A picture cannot be read, or there are fewer images than clusters.
    pub fn find(&mut self, target: &mut Target, run: &mut Run) -> Result<()> {
        let (clusters, images) = (self.job.data.clusters, self.rows.len());
        let projections =
            project(self.config, self.job, self.images, &self.rows, target, self.device)?;
        let found = e_step(self.config, self.job, &projections, images)?;
        let before = std::mem::replace(&mut self.assignment, found.assignment);
        run.note("inertia", found.inertia / images as f64);
        run.note("smallest-cluster", shares(&self.assignment, clusters)?.smallest);
        if !before.is_empty() {
            run.note("reassigned", changed(&self.assignment, &before, clusters)?);
        }
        Ok(())
    }

    /// Saves or loads the clusters, as `stage.assignment`.
    ///
    /// # Errors
    ///
    /// The file lacks them.
    pub fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        file.list("assignment", &mut self.assignment)
    }

    /// The batches of an epoch.
    ///
    /// # Errors
    ///
    /// There are too few images.
    pub fn order(&self, epoch: usize) -> Result<Vec<Vec<u32>>> {
        let (clusters, seed) = (self.job.data.clusters, self.job.seed);
        self.config.order(&self.rows, &self.assignment, clusters, seed, epoch)
    }

    /// The clusters of these rows of the images file.
    pub fn of(&self, rows: &[u32]) -> Vec<Option<u32>> {
        rows.iter().map(|&row| Some(self.assignment[self.places[row as usize]?])).collect()
    }
}

/// The clusters that k-means finds among the images that are scored: the result of the method.
///
/// The confidence is the softmax of `cos(x, c)` at [`CONFIDENCE_TEMPERATURE`].
///
/// # Errors
///
/// A picture cannot be read, or there are fewer images than clusters.
pub fn result(
    config: &Config,
    job: &Job,
    images: &Images,
    target: &mut Target,
    device: &Device,
) -> Result<Found> {
    let rows = images.rows(&job.data.score_on);
    let projections = project(config, job, images, &rows, target, device)?;
    let found = e_step(config, job, &projections, rows.len())?;
    let width = config.network.projector.width;
    let confidence = projections
        .chunks_exact(width)
        .zip(&found.assignment)
        .map(|(row, &cluster)| confidence(row, &found.centres, cluster))
        .collect();
    Ok(Found {
        kmeans_assignment: found.assignment.clone(),
        assignment: found.assignment,
        confidence,
        projection_width: width,
        prototypes: found.centres,
    })
}

/// The target's unit-length projections of these images, `(N, P)` row by row.
fn project(
    config: &Config,
    job: &Job,
    images: &Images,
    rows: &[u32],
    target: &mut Target,
    device: &Device,
) -> Result<Vec<f32>> {
    let loader = Loader::clean(images, rows, &config.input)?;
    let ranks = &job.communicator;
    let [projections] = outputs(loader, device, ranks, |pictures| Ok([target.embed(pictures)?.1]))?;
    Ok(projections)
}

fn e_step(config: &Config, job: &Job, projections: &[f32], images: usize) -> Result<Clustering> {
    let k_means_config = config.k_means(job.data.clusters);
    let width = config.network.projector.width;
    k_means_on_ranks(projections, images, width, &k_means_config, job.seed, &job.communicator)
}

/// The share of images whose cluster changed, under the best renumbering.
fn changed(after: &[u32], before: &[u32], clusters: usize) -> Result<f64> {
    let map = optimal_map(after, before, clusters)?;
    let pairs = after.iter().zip(before);
    let changed = pairs.filter(|(after, before)| map[**after as usize] != **before).count();
    Ok(changed as f64 / after.len().max(1) as f64)
}

/// Temperature of the confidence, which k-means does not give: our choice.
pub const CONFIDENCE_TEMPERATURE: f64 = 0.1;

/// Returns `softmax(cos(x, c) / temperature)` at the image's own cluster, for unit rows.
fn confidence(row: &[f32], centres: &[f32], cluster: u32) -> f32 {
    let product = |centre: &[f32]| -> f64 {
        row.iter().zip(centre).map(|(&x, &c)| f64::from(x) * f64::from(c)).sum()
    };
    let logits: Vec<f64> = centres
        .chunks_exact(row.len())
        .map(|centre| product(centre) / CONFIDENCE_TEMPERATURE)
        .collect();
    let own = logits[cluster as usize];
    let sum: f64 = logits.iter().map(|logit| (logit - own).exp()).sum();
    (1. / sum) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_match_hand_computation() -> Result<()> {
        // Clusters renamed 0 → 2, 1 → 0, 2 → 1, and the last image moved.
        assert_eq!(changed(&[2, 2, 2, 0, 0, 0], &[0, 0, 0, 1, 1, 2], 3)?, 1. / 6.);
        Ok(())
    }

    #[test]
    fn images_are_given_the_clusters_of_their_own_rows() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = crate::tests::job(folder.path(), "out");
        let (config, images) = (crate::tests::config(), Images::open(&job.images)?);
        let rows = vec![2, 5, 7, 20];
        let mut clusters = EStepClusters::new(&config, &job, &images, rows, &Device::Cpu);
        clusters.assignment = vec![1, 0, 2, 0];
        let found = clusters.of(&[20, 7, 3, 2, 5, 23]);
        assert_eq!(found, [Some(0), Some(2), None, Some(1), Some(0), None]);
        Ok(())
    }

    #[test]
    fn confidence_is_the_softmax_at_the_own_cluster() {
        let (row, centres) = ([0.6, 0.8], [1., 0., 0., 1., -1., 0.]);
        let logits = [6f64, 8., -6.];
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        for (cluster, logit) in logits.iter().enumerate() {
            let got = f64::from(confidence(&row, &centres, cluster as u32));
            assert!((got - logit.exp() / sum).abs() < 1e-6, "{got}");
        }
    }
}
