//! What the trained networks say of every scored picture.

use anyhow::Result;
use assignment::{KMeans, Metric};
use candle_core::{Device, Tensor};
use data::{Found, Images, Loader};
use layers::{Mode, Modes};
use stage::Job;
use training::ops::{softmax, unit_rows};

use crate::network::Networks;
use crate::{Config, Evaluation};

/// Predicts the clusters of all scored pictures.
///
/// With refreshed statistics, up to `refresh-batches` batches of the same pictures first pass the
/// encoder and the classifier on batch statistics. `networks` are changed by that in nothing but
/// their running statistics.
///
/// # Errors
///
/// A picture cannot be read, or the program was interrupted.
pub fn predict(
    config: &Config,
    images: &Images,
    networks: &mut Networks,
    evaluation: Evaluation,
    job: &Job,
    device: &Device,
) -> Result<Found> {
    let rows = images.rows(&job.data.score_on);
    if evaluation == Evaluation::RefreshedStatistics {
        refresh(config, images, &rows, networks, device)?;
    }
    let (clusters, width) = (job.data.clusters, config.backbone.embedding_width());
    let (mut embeddings, mut projections) = (Vec::new(), Vec::new());
    let (mut assignment, mut confidence) = (Vec::new(), Vec::new());
    for batch in Loader::clean(images, &rows, &config.input)? {
        let batch = batch?;
        let shape = batch.shape();
        let pictures = batch.views.into_iter().next().unwrap_or_default();
        let pictures = Tensor::from_vec(pictures, shape, device)?;
        let embedding = networks.encoder.apply(&pictures)?;
        let projection = unit_rows(&networks.projector.apply(&embedding)?)?;
        let memberships = softmax(&networks.classifier.apply(&embedding)?)?;
        for row in memberships.to_vec2::<f32>()? {
            let (cluster, largest) = largest(&row);
            assignment.push(cluster as u32);
            confidence.push(largest);
        }
        embeddings.extend(unit_rows(&embedding)?.flatten_all()?.to_vec1::<f32>()?);
        projections.extend(projection.flatten_all()?.to_vec1::<f32>()?);
        job.interrupt.check()?;
    }
    let k_means = KMeans {
        clusters,
        metric: Metric::Spherical,
        restarts: config.kmeans_restarts,
        iterations: KMEANS_ITERATIONS,
        tolerance: KMEANS_TOLERANCE,
    };
    let kmeans = assignment::k_means(&embeddings, rows.len(), width, &k_means, job.seed)?;
    let projection_width = config.projector.width;
    let weights = vec![1.; rows.len()];
    let prototypes =
        assignment::prototypes(&projections, projection_width, &assignment, &weights, clusters)?;
    Ok(Found {
        assignment,
        kmeans_assignment: kmeans.assignment,
        confidence,
        projection_width,
        prototypes,
    })
}

/// Steps of one start of k-means at most, and the change at which it ends.
const KMEANS_ITERATIONS: usize = 300;
const KMEANS_TOLERANCE: f64 = 1e-4;

/// Passes un-augmented pictures through encoder and classifier on batch statistics, in batches of
/// training's size: the running statistics move towards theirs.
fn refresh(
    config: &Config,
    images: &Images,
    rows: &[u32],
    networks: &mut Networks,
    device: &Device,
) -> Result<()> {
    let batches: Vec<Vec<u32>> = rows
        .chunks(config.batch_size)
        .filter(|batch| batch.len() > 1 || rows.len() == 1)
        .take(config.refresh_batches)
        .map(<[u32]>::to_vec)
        .collect();
    let pipelines = vec![config.input.clean()];
    // Nothing is drawn by chance: seed and epoch do not matter.
    let loader = Loader::new(images, batches, pipelines, &config.input, 0, 0, Loader::threads())?;
    for batch in loader {
        let batch = batch?;
        let shape = batch.shape();
        let pictures = batch.views.into_iter().next().unwrap_or_default();
        let mut value = Tensor::from_vec(pictures, shape, device)?;
        for part in [&mut networks.encoder, &mut networks.classifier] {
            let modes = Modes::all(part.segment.network(), Mode::Batch);
            value = part.segment.forward(&value, &modes, None)?;
        }
    }
    Ok(())
}

/// The largest value and its place, the first among equals.
fn largest(row: &[f32]) -> (usize, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    for (place, &value) in row.iter().enumerate() {
        if value > best.1 {
            best = (place, value);
        }
    }
    best
}
