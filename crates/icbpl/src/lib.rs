//! Stage: ICBPL, a pretrained backbone fine-tuned towards evenly spread centroids.
//!
//! `K` points are spread evenly over the sphere before anything is learnt, one for each cluster.
//! Training draws the distribution of features to the even mixture of these centroids (maximum mean
//! discrepancy), each picture to its augmented view, each picture to one of its nearest neighbours,
//! found once with the pretrained backbone, and, after a few epochs, each feature to the centroid
//! that is nearest already. The cluster of a picture is the centroid of largest cosine (Zhu, Hu,
//! Wang 2024, arXiv:2408.01920).
//!
//! The released code is not complete, and the paper's equations were not to be had: its abstract
//! names the terms, the predecessor's code (ICBPC, Entropy 2022, 24(11):1533) settles the
//! discrepancy and the distance of a pair. How they go together, their weights, the delay, which
//! pictures are neighbours and how long to train are our reading; each is a value of the
//! experiment and marked as *ours* in [`Config`].
//!
//! Reads `images.safetensors`, and the pretrained backbone: from the file that the table names, or
//! the `backbone.safetensors` in the role `backbone`. Writes `network.safetensors` (backbone, head,
//! centroids), `backbone.safetensors`, `config.json`, `state.safetensors`, `log.jsonl`,
//! `head.safetensors` (the centroids) and
//! `pseudo-labels.safetensors`, whose k-means is on the embeddings of the backbone as it came: the
//! baseline that fine-tuning must beat.
//!
//! The losses are in [`loss`], the centroids in [`Centroids`]; the order of a step is [`run`].

mod centroids;
mod config;
pub mod loss;
pub mod network;

use anyhow::{Context, Result, ensure};
use assignment::{KMeans, Metric, nearest_neighbours, nearest_neighbours_and_self};
use candle_core::{Device, Tensor};
use data::head::{self, CentreMetric};
use data::{Found, Images, Loader, PseudoLabels};
use layers::{Mode, Modes};
use rand::RngExt;
use serde_json::json;
use stage::random::stream;
use stage::{Effort, Job, Output, Role, Spec, Stage};
use training::ops::unit_rows;
use training::{Run, pictures, sampler};

pub use centroids::Centroids;
pub use config::{Config, HeadWidths, Pretrained, Schedule, Statistics};

use crate::loss::{discrepancy, least_distance, nearest_centroids, pair_distance, target_rows};
use crate::network::{Networks, pretrained};

/// The stage: see the documentation of the crate.
pub struct Icbpl;

impl Stage for Icbpl {
    const SPEC: Spec = Spec {
        name: "icbpl",
        algorithm: 2,
        inputs: &[Role::BACKBONE],
        outputs: &[Output::Network, Output::PseudoLabels],
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    /// Files in, files out; goes on where an interrupted run stopped.
    ///
    /// # Errors
    ///
    /// An input is missing, damaged or foreign; the run was interrupted, diverged or collapsed.
    fn run(config: &Config, job: &Job) -> Result<()> {
        let images = Images::of_job(job)?;
        let device = training::network_device(job.device)?;
        let rows = images.rows(&job.data.train_on);
        let plan = config.plan(rows.len());

        let mut networks = Networks::new(config, job, &device)?;
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut networks)?;
        let neighbours = Neighbours::found_or_kept(config, &images, &rows, job, &device, &mut run)?;

        while let Some(epoch) = run.next_epoch() {
            let done = run.batches_done(); // Above 0 in an epoch that is resumed.
            let order = sampler::uniform(&rows, config.batch_size, job.seed, epoch)?;
            let beside = neighbours.drawn(&order, job.seed, epoch)?;
            let beside = config.neighbour_loader(&images, beside, done, job.seed, epoch)?;
            let anchors = config.loader(&images, order, done, job.seed, epoch)?;
            for (batch, beside) in anchors.zip(beside) {
                let (batch, beside) = (batch?, beside?);
                let [anchors, augmented] = pictures(batch.shape(), batch.views, &device)?;
                let [beside] = pictures(beside.shape(), beside.views, &device)?;
                let anchor = networks.forward(&anchors)?;
                let view = networks.forward(&augmented)?;
                let neighbour = networks.forward(&beside)?;
                run.note_projections(&anchor.outputs())?; // An error when they have collapsed.

                let z = &anchor.features;
                let targets = target_rows(&networks.centroids, z.dims()[0])?;
                let mut loss = Sum::default();
                let mut add = |name: &str, weight: f64, term: Tensor| -> Result<()> {
                    run.note(name, f64::from(term.to_scalar::<f32>()?));
                    loss.add((term * weight)?)
                };
                add("discrepancy", config.discrepancy_weight, discrepancy(z, &targets)?)?;
                let pair = config.pair();
                add("view-distance", config.view_weight, pair_distance(z, &view.features, pair)?)?;
                let of_neighbour = pair_distance(z, &neighbour.features, pair)?;
                add("neighbour-distance", config.neighbour_weight, of_neighbour)?;
                let least = least_distance(z, &networks.centroids)?;
                let settled = epoch >= config.least_distance_delay;
                let weight = if settled { config.least_distance_weight } else { 0. };
                add("least-distance", weight, least)?;
                let loss = loss.total()?;
                run.note_loss(&loss)?; // An error when it is not finite.

                let gradients = loss.backward()?;
                networks.backward(vec![anchor, view, neighbour], &gradients)?;
                run.refuse_gradient(networks.first_gradient_not_finite()?)?;
                let [of_backbone, of_head] = config.rates(run.step(), plan.steps_per_epoch)?;
                networks.backbone.step(config.adam(of_backbone))?;
                networks.head.step(config.adam(of_head))?;
                run.end_step(&networks)?; // A checkpoint when the program is asked to stop.
            }
            run.end_epoch(&networks)?; // One line in the log; a checkpoint when due.
        }
        run.finish(&networks, &config.configuration()?)?;

        let found = predict(config, &images, &mut networks, job, &device)?;
        let by = CentreMetric::Cosine;
        head::write_centres(&job.out, &found.prototypes, job.data.clusters, by)?;
        PseudoLabels::of_one_phase(job, &images, found)?.write(&job.out.join(PseudoLabels::FILE))
    }
}

/// A loss put together term by term.
#[derive(Default)]
struct Sum(Option<Tensor>);

impl Sum {
    fn add(&mut self, term: Tensor) -> Result<()> {
        self.0 = Some(match self.0.take() {
            Some(sum) => (sum + term)?,
            None => term,
        });
        Ok(())
    }

    fn total(self) -> Result<Tensor> {
        self.0.context("a loss of no term")
    }
}

/// The nearest neighbours of every image that is trained on, found once and never again.
#[derive(Debug, Clone, PartialEq)]
struct Neighbours {
    /// The images, ascending.
    rows: Vec<u32>,
    /// Places in `rows`, `(N, k)`, nearest first.
    places: Vec<u32>,
    each: usize,
}

impl Neighbours {
    /// Those that the run keeps, or else found in the embeddings of the pretrained backbone.
    fn found_or_kept(
        config: &Config,
        images: &Images,
        rows: &[u32],
        job: &Job,
        device: &Device,
        run: &mut Run,
    ) -> Result<Self> {
        let each = config.neighbours;
        if let Some(kept) = run.kept(NEIGHBOURS) {
            let places: Vec<u32> = kept.iter().map(|&place| place as u32).collect();
            ensure!(places.len() == rows.len() * each, "the state holds other neighbours");
            return Ok(Self { rows: rows.to_vec(), places, each });
        }
        job.log(&json!({ "backbone": match &config.pretrained {
            Some(pretrained) => pretrained.file.display().to_string(),
            None => "role backbone".to_owned(),
        }}))?;
        let embeddings = embed(config, images, rows, job, device)?;
        let places = nearest(&embeddings, rows.len(), each, config.neighbours_include_self)?;
        // Places are below 2²⁴ as long as there are not more images than f32 can count.
        ensure!(
            rows.len() <= 1 << 24,
            "{} images are more than neighbours are kept for",
            rows.len()
        );
        let kept = places.iter().map(|&place| place as f32).collect();
        run.keep(NEIGHBOURS, &[rows.len(), each], kept);
        Ok(Self { rows: rows.to_vec(), places, each })
    }

    /// For each image of each batch, one of its neighbours, each as likely.
    fn drawn(&self, batches: &[Vec<u32>], seed: u64, epoch: usize) -> Result<Vec<Vec<u32>>> {
        let draw = |row: &u32| -> Result<u32> {
            let place = self.rows.binary_search(row).ok().context("a row that is trained on")?;
            let mut random = stream(seed, "neighbours", &[epoch as u64, u64::from(*row)]);
            let chosen = self.places[place * self.each + random.random_range(0..self.each)];
            Ok(self.rows[chosen as usize])
        };
        batches.iter().map(|batch| batch.iter().map(draw).collect()).collect()
    }
}

const NEIGHBOURS: &str = "neighbours";

/// The `k` rows of highest inner product, `(N, k)`; with the row itself among them or not.
fn nearest(points: &[f32], n: usize, k: usize, and_self: bool) -> Result<Vec<u32>> {
    let width = points.len() / n;
    match and_self {
        true => nearest_neighbours_and_self(points, n, width, k),
        false => nearest_neighbours(points, n, width, k),
    }
}

/// Unit-length embeddings of un-augmented pictures by the backbone as it came, `(N, D)`, on running
/// statistics.
fn embed(
    config: &Config,
    images: &Images,
    rows: &[u32],
    job: &Job,
    device: &Device,
) -> Result<Vec<f32>> {
    let mut backbone = pretrained(config, job)?.on(device)?;
    let modes = Modes::all(backbone.network(), Mode::Running);
    let mut embeddings = Vec::new();
    for batch in Loader::clean(images, rows, &config.input)? {
        let batch = batch?;
        let [pictures] = pictures(batch.shape(), batch.views, device)?;
        let embedding = unit_rows(&backbone.forward(&pictures, &modes, None)?)?;
        embeddings.extend(embedding.flatten_all()?.to_vec1::<f32>()?);
        job.interrupt.check()?;
    }
    Ok(embeddings)
}

/// The cluster of every scored picture: the centroid of largest cosine. Beside it, k-means on the
/// embeddings of the backbone as it came.
///
/// As confidence stands `(1 + cos) / 2`; as prototypes, the centroids.
///
/// # Errors
///
/// A picture cannot be read, or the program was interrupted.
pub fn predict(
    config: &Config,
    images: &Images,
    networks: &mut Networks,
    job: &Job,
    device: &Device,
) -> Result<Found> {
    let rows = images.rows(&job.data.score_on);
    let (mut assignment, mut confidence) = (Vec::new(), Vec::new());
    for batch in Loader::clean(images, &rows, &config.input)? {
        let batch = batch?;
        let [pictures] = pictures(batch.shape(), batch.views, device)?;
        let embedding = networks.backbone.apply(&pictures)?;
        let features = unit_rows(&networks.head.apply(&embedding)?)?;
        let (nearest, cosines) = nearest_centroids(&features, &networks.centroids)?;
        assignment.extend(nearest);
        let cosines = cosines.to_vec1::<f32>()?;
        confidence.extend(cosines.iter().map(|cosine| ((1. + cosine) / 2.).clamp(0., 1.)));
        job.interrupt.check()?;
    }
    let embeddings = embed(config, images, &rows, job, device)?;
    let k_means = KMeans {
        clusters: job.data.clusters,
        metric: Metric::Spherical,
        restarts: config.kmeans_restarts,
        iterations: KMEANS_ITERATIONS,
        tolerance: KMEANS_TOLERANCE,
    };
    let width = config.backbone.embedding_width();
    let kmeans = assignment::k_means(&embeddings, rows.len(), width, &k_means, job.seed)?;
    Ok(Found {
        assignment,
        kmeans_assignment: kmeans.assignment,
        confidence,
        projection_width: config.head.width,
        prototypes: networks.centroids.flatten_all()?.to_vec1()?,
    })
}

/// Steps of one start of k-means at most, and the change at which it ends.
const KMEANS_ITERATIONS: usize = 300;
const KMEANS_TOLERANCE: f64 = 1e-4;

#[cfg(test)]
mod tests;
