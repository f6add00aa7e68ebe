//! The table `[icbpl]`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use backbone::Architecture;
use data::views::{Input, Pipeline};
use data::{Images, Loader};
use layers::Mode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use stage::{Effort, Job};
use training::{Advice, Cosine, LearningRate, Plan, Precision, Views, check, sampler};

use crate::Centroids;
use crate::loss::PairWeights;

/// What an ICBPL run can vary. The experiment file sets every field. In parentheses: the value of
/// the released code, of its predecessor (ICBPC), or *ours* where nothing released settles it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Passes over the images (401 released; 50 to 100 ours).
    pub epochs: usize,
    /// Images per step, of which each gives an anchor, an augmented view and a neighbour (20 for
    /// STL-10, 512 for CIFAR; a multiple of the clusters ours, so that targets are balanced).
    pub batch_size: usize,
    /// Learning rate of the stages that are trained (1e-3; 1e-4 ours).
    pub backbone_learning_rate: f64,
    /// Learning rate of the head, both layers (1e-3; the released optimiser leaves the second out
    /// by mistake).
    pub head_learning_rate: f64,
    /// How both go over the run (constant; cosine ours).
    pub schedule: Schedule,
    /// Decay of the mean of gradients (0.9).
    pub beta_1: f64,
    /// Decay of the mean of squared gradients (0.999).
    pub beta_2: f64,
    /// Added to the root (1e-8).
    pub epsilon: f64,
    /// Weight decay, added to the gradient (0; 1e-4 ours).
    pub weight_decay: f64,
    /// Weight of the discrepancy between features and centroids (2, ICBPC).
    pub discrepancy_weight: f64,
    /// Weight of the distance between a picture and its augmented view (1, ours).
    pub view_weight: f64,
    /// Weight of the distance between a picture and its neighbour (1, ours).
    pub neighbour_weight: f64,
    /// Weight of the distance to the nearest centroid (1, ours).
    pub least_distance_weight: f64,
    /// Epochs before that term acts: it confirms itself, so that clusters must have settled (5,
    /// ours).
    pub least_distance_delay: usize,
    /// Of a pair's distance, the weight of its cosine part (3, ICBPC).
    pub pair_cosine_weight: f64,
    /// And of the mean absolute difference (8, ICBPC).
    pub pair_absolute_weight: f64,
    /// Nearest neighbours among which one is drawn in each step (20).
    pub neighbours: usize,
    /// Whether a picture counts as its own first neighbour (true; false ours).
    pub neighbours_include_self: bool,
    /// Blocks that keep their values: `stem`, `layer1` to `layer4` (stem, layer1, layer2).
    pub frozen: Vec<String>,
    /// Batch-norm statistics that frozen blocks use (batch; running ours).
    pub frozen_statistics: Statistics,
    /// How the centroids are found.
    pub centroids: Centroids,
    /// Starts of k-means on the pretrained backbone's embeddings, the baseline.
    pub kmeans_restarts: usize,
    /// Number type of activations and products.
    pub precision: Precision,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length features falls below this.
    pub collapse_deviation: f64,
    /// The file with the pretrained backbone; without it, the role `backbone`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pretrained: Option<Pretrained>,
    /// The residual network that the file holds.
    pub backbone: Architecture,
    /// Behind it.
    pub head: HeadWidths,
    /// What the network is fed with, for neighbours and evaluation too.
    pub input: Input,
    /// From a picture to an anchor, and from its neighbour (the evaluation's operations in the
    /// released script).
    pub anchor: Pipeline,
    /// From a picture to its augmented view.
    pub augmented: Pipeline,
}

/// A backbone from elsewhere, under timm's or torchvision's names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pretrained {
    /// A safetensors file; relative to the root of the workspace.
    pub file: PathBuf,
    /// Its SHA-256 in hex digits. Empty takes any file, and then a result's key does not tell
    /// which it was.
    pub sha256: String,
}

/// Widths of the head: linear, ReLU, linear.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HeadWidths {
    /// Between its two layers (512).
    pub hidden: usize,
    /// Width P of a feature (100).
    pub width: usize,
}

/// Learning rates over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// As they are.
    Constant,
    /// Along half a cosine that ends at 0.
    Cosine,
}

/// Batch-norm statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Statistics {
    /// Those of the batch, which move the running ones.
    Batch,
    /// The running ones, which stay.
    Running,
}

impl Statistics {
    pub(crate) fn mode(self) -> Mode {
        match self {
            Self::Batch => Mode::Batch,
            Self::Running => Mode::Running,
        }
    }
}

impl Config {
    /// Finds what is wrong before anything runs.
    ///
    /// # Errors
    ///
    /// A value lies outside its range, or the device is not there.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        self.plan(self.batch_size).check()?;
        ensure!(
            self.batch_size >= job.data.clusters.max(2),
            "batch-size = {}: the discrepancy is estimated in a batch, which must hold each of the \
             {} centroids; several times as many images are advised",
            self.batch_size,
            job.data.clusters
        );
        check::above_zero(&[
            ("backbone-learning-rate", self.backbone_learning_rate),
            ("head-learning-rate", self.head_learning_rate),
            ("epsilon", self.epsilon),
        ])?;
        check::not_negative(&[
            ("weight-decay", self.weight_decay),
            ("discrepancy-weight", self.discrepancy_weight),
            ("view-weight", self.view_weight),
            ("neighbour-weight", self.neighbour_weight),
            ("least-distance-weight", self.least_distance_weight),
            ("pair-cosine-weight", self.pair_cosine_weight),
            ("pair-absolute-weight", self.pair_absolute_weight),
        ])?;
        ensure!(
            self.discrepancy_weight + self.view_weight + self.neighbour_weight > 0.,
            "discrepancy-weight, view-weight and neighbour-weight are all 0: nothing would be learnt \
             before epoch {}",
            self.least_distance_delay
        );
        check::below_one(&[("beta-1", self.beta_1), ("beta-2", self.beta_2)])?;
        check::counts(&[
            ("neighbours", self.neighbours),
            ("kmeans-restarts", self.kmeans_restarts),
            ("backbone.width", self.backbone.width),
            ("head.hidden", self.head.hidden),
            ("head.width", self.head.width),
        ])?;
        for block in &self.frozen {
            ensure!(
                BLOCKS.contains(&block.as_str()),
                "frozen names `{block}`; the blocks of a backbone are {}",
                BLOCKS.join(", ")
            );
        }
        self.centroids.check(job.data.clusters, self.head.width)?;
        self.input.check("icbpl.input")?;
        self.anchor.check("icbpl.anchor")?;
        self.augmented.check("icbpl.augmented")?;
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        // Where a run is about to begin.
        if let Some(Pretrained { file, .. }) = &self.pretrained {
            ensure!(
                file.is_file(),
                "the pretrained backbone `{}` is not there; the experiment file says what it is. \
                 Put it there, or name another of its shape with --set icbpl.pretrained.file=FILE",
                file.display()
            );
        }
        let images = Images::open(&job.images)?;
        Loader::check(&images, &self.input)?;
        let rows = images.rows(&job.data.train_on);
        sampler::uniform(&rows, self.batch_size, 0, 0)?;
        ensure!(
            self.neighbours < rows.len(),
            "neighbours = {}, but there are {} images to train on",
            self.neighbours,
            rows.len()
        );
        let plan = self.plan(rows.len());
        let scored = images.rows(&job.data.score_on).len();
        // Anchor, view and neighbour; the search for neighbours; the result and its baseline.
        Ok(Effort::of_backbone_pictures(3. * plan.pictures() + (rows.len() + 2 * scored) as f64))
    }

    pub(crate) fn plan(&self, images: usize) -> Plan {
        Plan {
            epochs: self.epochs,
            steps_per_epoch: sampler::steps(images, self.batch_size),
            batch_size: self.batch_size.min(images),
            save_every: self.save_every,
            collapse_deviation: self.collapse_deviation,
            advice: Advice {
                divergence: "a lower `backbone-learning-rate` or `head-learning-rate`",
                collapse: "a higher `discrepancy-weight` or a lower `backbone-learning-rate`",
            },
        }
    }

    /// Learning rates of backbone and head; steps count from 0.
    pub(crate) fn learning_rates(&self, steps_per_epoch: usize) -> Result<[LearningRate; 2]> {
        let of = |rate| match self.schedule {
            Schedule::Constant => Ok(LearningRate::constant(rate)),
            Schedule::Cosine => {
                LearningRate::new(rate, 0., self.epochs, steps_per_epoch, Cosine::ToZero)
            }
        };
        Ok([of(self.backbone_learning_rate)?, of(self.head_learning_rate)?])
    }

    pub(crate) fn adam(&self, learning_rate: f64) -> layers::Adam {
        let Self { beta_1, beta_2, epsilon, weight_decay, .. } = *self;
        layers::Adam { learning_rate, beta_1, beta_2, epsilon, weight_decay }
    }

    /// How a pair's distance is put together.
    pub fn pair(&self) -> PairWeights {
        PairWeights { cosine: self.pair_cosine_weight, absolute: self.pair_absolute_weight }
    }

    /// Every image as anchor and as augmented view.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        Views::new(images, [&self.anchor, &self.augmented], &self.input, seed)
    }

    /// Neighbours, made as anchors are, with their own random draws.
    pub(crate) fn neighbour_views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        let seed = stage::random::derived(seed, "views of neighbours");
        Views::new(images, [&self.anchor], &self.input, seed)
    }

    /// What `config.json` will say.
    pub(crate) fn configuration(&self) -> Result<serde_json::Value> {
        Ok(json!({
            "backbone": self.backbone,
            "head": self.head,
            "channels": self.input.channels,
            "input": serde_json::to_value(&self.input).context("`input` of the experiment")?,
        }))
    }
}

const BLOCKS: [&str; 5] = ["stem", "layer1", "layer2", "layer3", "layer4"];
