//! Stage: ICBPL, a pretrained backbone fine-tuned towards evenly spread centroids.
//!
//! Before training, `K` centroids are spread evenly over the sphere, one for each cluster. Training
//! pulls the distribution of features to the even mixture of these centroids (maximum mean
//! discrepancy), each picture to its augmented view, each picture to one of its nearest neighbours,
//! found once with the pretrained backbone, and, after a few epochs, each feature to its nearest
//! centroid. The cluster of a picture is the centroid of largest cosine (Zhu, Hu, Wang 2024,
//! arXiv:2408.01920).
//!
//! The released code is incomplete, and we could not read the paper's equations: its abstract names
//! the terms, the predecessor's code (ICBPC, Entropy 2022, 24(11):1533) settles the discrepancy and
//! the distance of a pair. Their combination and weights, the delay, the choice of neighbours and
//! the length of training are our interpretation; each is a value of the experiment and marked as
//! *ours* in [`Config`].
//!
//! The backbone that a run starts from is a [`StartTable`]: a file, such as Barlow Twins' or DINO's
//! ResNet-50; what another stage trained on the same pictures; or a published network. A Vision
//! Transformer stays as it is and the head alone learns: fine-tuning its blocks is not built yet.
//!
//! - Reads `images.safetensors`, and the pretrained backbone: the file that the table names, or the
//!   network in the role `backbone`.
//! - Writes `network.safetensors` (backbone, head, centroids), `backbone.safetensors`, `config.json`,
//!   `state.safetensors`, `log.jsonl`, `head.safetensors` (the centroids) and
//!   `pseudo-labels.safetensors`, whose k-means is on the embeddings of the pretrained backbone: the
//!   baseline that fine-tuning must beat. A transformer, which did not change, is not written again.
//!
//! Start at the `run` of [`Icbpl`]; the losses are in [`loss`], the centroids in [`Centroids`], and
//! what brings each group of pictures to a centroid of its own in [`groups`].

mod centroids;
mod config;
pub mod groups;
pub mod loss;
mod neighbours;
pub mod network;

use anyhow::Result;
use assignment::{KMeans, argmax_rows, k_means_on_ranks};
use backbone::Segment;
use candle_core::{Device, Tensor};
use data::head::{self, CentreMetric};
use data::{Found, Images, Loader, PseudoLabels};
use stage::{Effort, Job, Output, Ranks, Role, Spec, Stage};
use training::ops::{sum, unit_rows};
use training::{Checkpoint, Run, Trained, outputs, pictures, sampler};

pub use centroids::Centroids;
pub use config::{BatchNormStatistics, Config, HeadWidths, Schedule, StartTable};

use crate::loss::{discrepancy, least_distance, nearest_centroids, pair_distance, target_rows};
use crate::neighbours::Neighbours;
use crate::network::{IcbplNetworks, StartingBackbone};

/// The stage: see the documentation of the crate.
pub struct Icbpl;

impl Stage for Icbpl {
    const SPEC: Spec = Spec {
        name: "icbpl",
        algorithm: 5,
        inputs: &[Role::BACKBONE],
        outputs: &[Output::Network, Output::PseudoLabels],
        ranks: Ranks::BatchGroups,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        let images = Images::of_job(job)?;
        let device = training::network_device(job.device)?;
        let groups = config.run.groups(job)?; // Shared by the ranks.
        let rows = images.rows(&job.data.train_on);
        let plan = config.plan(rows.len());

        if let Some(warning) = config.input.stored_too_small(images.reduced_side()) {
            tracing::warn!("{warning}");
        }
        let networks = IcbplNetworks::new(config, job, &device)?.in_groups(&groups)?;
        let mut model = IcbplModel { networks, neighbours: Neighbours::none(&rows, config) };
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut model)?;
        if model.neighbours.is_empty() {
            let [embeddings, unit] = embed(config, &images, &rows, job, &device)?;
            model.neighbours.find(config, &unit, job)?;
            if config.centroids == Centroids::TurnedToGroups {
                groups::hand_over(config, &embeddings, &unit, &mut model.networks, job, &device)?;
            }
        }
        let rates = config.learning_rates(plan.steps_per_epoch);
        let views = config.views(&images, job.seed).in_groups(&groups);
        let neighbours = config.neighbour_views(&images, job.seed).in_groups(&groups);

        while let Some(epoch) = run.next_epoch() {
            let order = sampler::uniform(&rows, config.run.batch_size, job.seed, epoch)?;
            let drawn = model.neighbours.draw(&order, job.seed, epoch)?;
            let batches = views.epoch(epoch, order, run.batches_done())?;
            let neighbours = neighbours.epoch(epoch, drawn, run.batches_done())?;
            for (batch, neighbours) in batches.zip(neighbours) {
                let [anchors, views] = pictures(batch?, &device)?;
                let [neighbours] = pictures(neighbours?, &device)?;
                let networks = &mut model.networks;
                let anchor = networks.forward(&anchors)?;
                let view = networks.forward(&views)?;
                let neighbour = networks.forward(&neighbours)?;
                run.note_projections(&anchor.feature)?; // An error when they have collapsed.

                let features = [&anchor, &view, &neighbour].map(|pass| unit_rows(&pass.feature));
                let [z, view_z, neighbour_z] = features;
                let features = [&z?, &view_z?, &neighbour_z?];
                let loss = objective(config, epoch, features, &networks.centroids, &mut run)?;
                run.note_loss(&loss)?; // An error when it is not finite.

                let gradients = loss.backward()?;
                // The loss does not use a view whose term has weight 0.
                let view = (config.view_weight > 0.).then_some(view);
                let neighbour = (config.neighbour_weight > 0.).then_some(neighbour);
                let passes: Vec<_> =
                    [Some(anchor), view, neighbour].into_iter().flatten().collect();
                networks.expect_passes(passes.len())?; // Ranks sum the gradients during the last one.
                networks.backward(passes, &gradients)?;
                run.check_gradients(&device, || networks.first_gradient_not_finite())?;
                let [of_backbone, of_head] = rates.each_ref().map(|rate| rate.at(run.step() - 1));
                networks.step(config.adam(of_backbone), config.adam(of_head))?;
                run.end_step(&mut model)?; // Saves when the program is asked to stop.
            }
            run.end_epoch(&mut model)?; // Writes a log line, and a checkpoint when due.
        }
        let configuration = model.networks.configuration(config)?;
        run.finish(&mut model, &configuration)?;
        let found = predict(config, &images, &mut model.networks, job, &device)?;
        if !job.communicator.is_first() {
            return Ok(()); // The first rank writes the result.
        }
        let by = CentreMetric::Cosine;
        head::write_centres(&job.out, &found.prototypes, job.data.clusters, by)?;
        PseudoLabels::of_one_phase(job, &images, found)?.write(&job.out.join(PseudoLabels::FILE))
    }
}

/// Everything that a checkpoint holds.
struct IcbplModel {
    networks: IcbplNetworks,
    neighbours: Neighbours,
}

impl Trained for IcbplModel {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.networks.checkpoint(file)?;
        self.neighbours.checkpoint(file)
    }

    fn exported(&self) -> Option<&Segment> {
        self.networks.exported()
    }
}

/// The weighted sum of the four terms. A weight of 0 leaves a term out of the graph and of the log.
///
/// - `features`: unit rows of the pictures, of their views and of their neighbours, `(B, P)` each.
fn objective(
    config: &Config,
    epoch: usize,
    [z, view, neighbour]: [&Tensor; 3],
    centroids: &Tensor,
    run: &mut Run,
) -> Result<Tensor> {
    let targets = target_rows(centroids, z.dim(0)?)?;
    let pair = config.pair();
    // The last term confirms itself: it waits until the clusters have settled.
    let is_settled = epoch >= config.schedule.least_distance_delay;
    let least_weight = if is_settled { config.least_distance_weight } else { 0. };
    type Term<'a> = &'a dyn Fn() -> candle_core::Result<Tensor>;
    let terms: [(&str, f64, Term); 4] = [
        ("discrepancy", config.discrepancy_weight, &|| discrepancy(z, &targets)),
        ("view-distance", config.view_weight, &|| pair_distance(z, view, pair)),
        ("neighbour-distance", config.neighbour_weight, &|| pair_distance(z, neighbour, pair)),
        ("least-distance", least_weight, &|| least_distance(z, centroids)),
    ];
    let mut weighted = Vec::new();
    for (name, weight, term) in terms {
        if weight > 0. {
            let term = term()?;
            run.note_scalar(name, &term)?;
            weighted.push((term * weight)?);
        }
    }
    run.note_scalar("nearest-centroids", &nearest_centroids(z, centroids)?)?;
    Ok(sum(weighted)?)
}

/// Embeddings of un-augmented pictures by the pretrained backbone, `(N, D)`, on running statistics, and
/// the same at unit length.
fn embed(
    config: &Config,
    images: &Images,
    rows: &[u32],
    job: &Job,
    device: &Device,
) -> Result<[Vec<f32>; 2]> {
    let mut backbone = StartingBackbone::open(config, job, device)?;
    let loader = Loader::clean(images, rows, &config.input)?;
    outputs(loader, device, &job.communicator, |pictures| {
        job.interrupt.check()?;
        let embeddings = backbone.evaluate(pictures)?;
        let unit = unit_rows(&embeddings)?;
        Ok([embeddings, unit])
    })
}

/// The cluster of every picture to score: the centroid of largest cosine, and for comparison k-means
/// on the embeddings of the pretrained backbone.
///
/// The confidence is `(1 + cos) / 2`; the prototypes are the centroids.
///
/// # Errors
///
/// A picture cannot be read, or the program was interrupted.
pub fn predict(
    config: &Config,
    images: &Images,
    networks: &mut IcbplNetworks,
    job: &Job,
    device: &Device,
) -> Result<Found> {
    let rows = images.rows(&job.data.score_on);
    let loader = Loader::clean(images, &rows, &config.input)?;
    let [cosines] = outputs(loader, device, &job.communicator, |pictures| {
        job.interrupt.check()?;
        let embedding = networks.backbone.evaluate(pictures)?;
        let features = unit_rows(&networks.head.evaluate(&embedding)?)?;
        Ok([features.matmul(&networks.centroids.t()?)?])
    })?;
    let (assignment, cosines) = argmax_rows(&cosines, job.data.clusters)?;
    let [_, embeddings] = embed(config, images, &rows, job, device)?;
    let k_means = KMeans::spherical(job.data.clusters, config.kmeans_restarts);
    let width = embeddings.len() / rows.len();
    let ranks = &job.communicator;
    let kmeans = k_means_on_ranks(&embeddings, rows.len(), width, &k_means, job.seed, ranks)?;
    Ok(Found {
        assignment,
        kmeans_assignment: kmeans.assignment,
        confidence: cosines.iter().map(|cosine| ((1. + cosine) / 2.).clamp(0., 1.)).collect(),
        projection_width: config.network.head.width,
        prototypes: networks.centroids.flatten_all()?.to_vec1()?,
    })
}

#[cfg(test)]
mod tests;
