//! What the trained networks say of every scored picture.

use anyhow::Result;
use assignment::{KMeans, argmax_rows};
use candle_core::Device;
use candle_nn::ops::softmax;
use data::{Found, Images, Loader};
use layers::{Mode, Modes};
use stage::Job;
use training::ops::unit_rows;
use training::{Views, outputs, pictures};

use crate::network::ImcSwavNetworks;
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
    networks: &mut ImcSwavNetworks,
    evaluation: Evaluation,
    job: &Job,
    device: &Device,
) -> Result<Found> {
    let rows = images.rows(&job.data.score_on);
    if evaluation == Evaluation::RefreshedStatistics {
        refresh(config, images, &rows, networks, device)?;
    }
    let (clusters, width) = (job.data.clusters, config.network.backbone.embedding_width());
    let loader = Loader::clean(images, &rows, &config.input)?;
    let ranks = &job.communicator;
    let [embeddings, projections, memberships] = outputs(loader, device, ranks, |pictures| {
        job.interrupt.check()?;
        let embedding = networks.encoder.evaluate(pictures)?;
        let projection = unit_rows(&networks.projector.evaluate(&embedding)?)?;
        let memberships = softmax(&networks.classifier.evaluate(&embedding)?, 1)?;
        Ok([unit_rows(&embedding)?, projection, memberships])
    })?;
    let (assignment, confidence) = argmax_rows(&memberships, clusters)?;
    let k_means = KMeans::spherical(clusters, config.kmeans_restarts);
    let kmeans = assignment::k_means(&embeddings, rows.len(), width, &k_means, job.seed)?;
    let projection_width = config.network.projector.width;
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

/// Passes un-augmented pictures through encoder and classifier on batch statistics, in batches of
/// training's size: the running statistics move towards theirs.
fn refresh(
    config: &Config,
    images: &Images,
    rows: &[u32],
    networks: &mut ImcSwavNetworks,
    device: &Device,
) -> Result<()> {
    let batches: Vec<Vec<u32>> = rows
        .chunks(config.run.batch_size)
        .filter(|batch| batch.len() > 1 || rows.len() == 1)
        .take(config.refresh_batches)
        .map(<[u32]>::to_vec)
        .collect();
    let clean = Views::new(images, [&config.input.clean()], &config.input, 0);
    for batch in clean.epoch(0, batches, 0)? {
        let [mut value] = pictures(batch?, device)?;
        for part in [&mut networks.encoder, &mut networks.classifier] {
            let modes = Modes::all(part.segment.network(), Mode::Batch);
            value = part.segment.forward(&value, &modes, None)?;
        }
    }
    Ok(())
}
