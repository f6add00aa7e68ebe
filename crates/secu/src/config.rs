//! The table `[secu]`, and what follows from it.

use anyhow::{Context, Result, ensure};
use backbone::{Architecture, Projector, perceptron, resnet};
use data::views::{Input, Pipeline};
use data::{Images, Loader};
use layers::{Network, Sgd};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{Advice, LearningRate, Plan, Precision, Views, check, sampler};

use crate::constraint::Constraint;
use crate::heads::Temperatures;

/// What SeCu can vary. The experiment file sets every field: there are no defaults in code, and an
/// unknown or missing key is an error. The seed is an argument of the program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Passes over the images.
    pub epochs: usize,
    /// Images per step; each gives two views. 128 is published; the last batch of an epoch has what
    /// is left.
    pub batch_size: usize,
    /// Learning rate of the network at its peak, whatever the batch size.
    pub learning_rate: f64,
    /// Learning rate of the centres, constant.
    pub centre_learning_rate: f64,
    /// First epochs in which only the centres move: they fill the store of assignments.
    pub still_epochs: usize,
    /// Epochs after them in which the network's learning rate rises.
    pub warmup_epochs: usize,
    /// Share of the last step's direction that a step keeps.
    pub momentum: f64,
    /// Weight decay of every parameter, batch norm, biases and centres included.
    pub weight_decay: f64,
    /// Number of clusters of each head; the head with as many as the experiment asks for gives the
    /// result.
    pub heads: Vec<usize>,
    /// Temperature of the network's loss, tₓ.
    pub temperature: f64,
    /// Temperature of the centres' loss, t_w.
    pub centre_temperature: f64,
    /// Share of the assigned cluster in the network's target, τ; the rest is what the network makes
    /// of the other view.
    pub assigned_share: f64,
    /// What keeps the clusters from becoming one.
    pub constraint: Constraint,
    /// Number type of activations and products.
    pub precision: Precision,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length projections falls below this.
    pub collapse_deviation: f64,
    /// Behind warm-up, the run stops when every batch of as many steps as an epoch has holds fewer
    /// clusters than this, see [`monitor`](crate::monitor).
    pub least_distinct_ids: usize,
    /// The residual network.
    pub backbone: Architecture,
    /// Behind it.
    pub projector: Projector,
    /// What the network is fed with.
    pub input: Input,
    /// From a picture to its first view; published is one that is always blurred.
    pub views_1: Pipeline,
    /// From a picture to its second view; published is one that is sometimes solarised.
    pub views_2: Pipeline,
}

/// `config.json` beside the network: what it was built from and fed with.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Configuration<'a> {
    backbone: Architecture,
    projector: Projector,
    heads: &'a [usize],
    channels: usize,
    input: &'a Input,
}

impl Config {
    /// Finds what is wrong before anything runs.
    ///
    /// # Errors
    ///
    /// A value lies outside its range, or the device is not there; the message names the key.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        self.plan(self.batch_size).check()?;
        self.schedule(1)?;
        self.constraint.check()?;
        self.head(job)?;
        check::batch_size(self.batch_size)?;
        ensure!(
            self.heads.iter().all(|&clusters| clusters >= 2),
            "heads = {:?}: each needs at least 2 clusters",
            self.heads
        );
        check::below_one(&[("momentum", self.momentum)])?;
        ensure!(
            (0. ..=1.).contains(&self.assigned_share),
            "assigned-share = {}: it must lie in [0, 1]",
            self.assigned_share
        );
        check::not_negative(&[
            ("centre-learning-rate", self.centre_learning_rate),
            ("weight-decay", self.weight_decay),
        ])?;
        check::above_zero(&[
            ("temperature", self.temperature),
            ("centre-temperature", self.centre_temperature),
        ])?;
        self.input.check("secu.input")?;
        self.views_1.check("secu.views-1")?;
        self.views_2.check("secu.views-2")?;
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let images = Images::open(&job.images)?;
        Loader::check(&images, &self.input)?;
        let rows = images.rows(&job.data.train_on);
        sampler::every(&rows, self.batch_size, 0, 0)?;
        // Two views of each image, and each scored image once for the result.
        let scored = images.rows(&job.data.score_on).len();
        Ok(Effort::of_backbone_pictures((2 * self.epochs * rows.len() + scored) as f64))
    }

    /// Length of the run and its checkpoints.
    pub(crate) fn plan(&self, images: usize) -> Plan {
        Plan {
            epochs: self.epochs,
            steps_per_epoch: sampler::steps_of_every(images, self.batch_size),
            batch_size: self.batch_size.min(images),
            save_every: self.save_every,
            collapse_deviation: self.collapse_deviation,
            advice: Advice {
                divergence: "a lower `learning-rate` or `centre-learning-rate`",
                collapse: "a lower `learning-rate`, or milder `views-1` and `views-2`",
            },
        }
    }

    /// Which head gives the result.
    ///
    /// # Errors
    ///
    /// None has as many clusters as the experiment asks for.
    pub(crate) fn head(&self, job: &Job) -> Result<usize> {
        let clusters = job.data.clusters;
        self.heads.iter().position(|&head| head == clusters).with_context(|| {
            format!(
                "heads = {:?}: none has the {clusters} clusters of table `[data]`; name {clusters} \
                 among them",
                self.heads
            )
        })
    }

    pub(crate) fn schedule(&self, steps: usize) -> Result<LearningRate> {
        let (still, warmup) = (self.still_epochs, self.warmup_epochs);
        LearningRate::after_still_epochs(self.learning_rate, still, warmup, self.epochs, steps)
    }

    pub(crate) fn temperatures(&self) -> Temperatures {
        Temperatures {
            network: self.temperature,
            centres: self.centre_temperature,
            assigned_share: self.assigned_share,
        }
    }

    pub(crate) fn centre_rule(&self) -> Sgd {
        Sgd {
            learning_rate: self.centre_learning_rate,
            momentum: self.momentum,
            weight_decay: self.weight_decay,
        }
    }

    /// The plans of backbone and projector.
    pub(crate) fn plans(&self) -> Result<[Network; 2]> {
        let backbone = resnet::plan(&self.backbone, self.input.channels)?;
        let Projector { hidden, width } = self.projector;
        let projector = perceptron::plan(self.backbone.embedding_width(), hidden, width)?;
        Ok([backbone, projector].map(|plan| plan.with_precision(self.precision.into())))
    }

    /// What `config.json` will say.
    pub(crate) fn configuration(&self) -> Configuration<'_> {
        Configuration {
            backbone: self.backbone,
            projector: self.projector,
            heads: &self.heads,
            channels: self.input.channels,
            input: &self.input,
        }
    }

    /// Both views of every image.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        Views::new(images, [&self.views_1, &self.views_2], &self.input, seed)
    }
}
