//! The table `[secu]`, and what follows from it.

use anyhow::{Context, Result, ensure};
use backbone::{Architecture, Projector, perceptron, resnet};
use data::Images;
use data::views::{Input, Pipeline};
use layers::{Network, Sgd};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{Advice, LearningRate, RunPlan, RunTable, Views, check, sampler};

use crate::constraint::Constraint;
use crate::heads::Temperatures;

/// What SeCu can vary. The experiment sets every field; the seed is an argument of the program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Number of clusters of each head; the head with as many as the experiment asks for gives the
    /// result.
    pub heads: Vec<usize>,
    /// Temperature of the network's loss, tₓ.
    pub temperature: f64,
    /// Temperature of the centres' loss, t_w.
    pub centre_temperature: f64,
    /// Share of the assigned cluster in the network's target, τ; the rest is the prediction for the
    /// other view.
    pub assigned_share: f64,
    /// The rule that keeps the clusters from collapsing into one.
    pub constraint: Constraint,
    /// After warm-up, the run stops when the batches of as many steps as an epoch has all hold fewer
    /// clusters than this, see [`monitor`](crate::monitor).
    pub least_distinct_ids: usize,
    /// Length, batches (128 published; the last batch of an epoch may be smaller), checkpoints.
    pub run: RunTable,
    /// SGD of network and centres.
    pub optimizer: OptimizerTable,
    /// Learning rate of the network.
    pub schedule: ScheduleTable,
    /// Backbone and projector.
    pub network: NetworkTable,
    /// Size and normalisation of the network's input.
    pub input: Input,
    /// From a picture to its first view; the published one is always blurred.
    pub views_1: Pipeline,
    /// From a picture to its second view; the published one is sometimes solarised.
    pub views_2: Pipeline,
}

/// `[secu.optimizer]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct OptimizerTable {
    /// Learning rate of the network at its peak, whatever the batch size.
    pub learning_rate: f64,
    /// Learning rate of the centres, constant.
    pub centre_learning_rate: f64,
    /// Share of the last step's direction that a step keeps.
    pub momentum: f64,
    /// Weight decay of every parameter, batch norms, biases and centres included.
    pub weight_decay: f64,
}

/// `[secu.schedule]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ScheduleTable {
    /// First epochs in which only the centres move: they fill the store of assignments.
    pub still_epochs: usize,
    /// Epochs after them in which the network's learning rate rises.
    pub warmup_epochs: usize,
}

/// `[secu.network]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetworkTable {
    /// The residual network: picture to embedding.
    pub backbone: Architecture,
    /// Embedding to projection.
    pub projector: Projector,
}

/// `config.json` beside the network: everything needed to build it again.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct SavedConfiguration<'a> {
    backbone: Architecture,
    projector: Projector,
    heads: &'a [usize],
    channels: usize,
    input: &'a Input,
}

impl Config {
    /// Checks values, device and pictures before anything runs.
    ///
    /// # Errors
    ///
    /// A value is out of range, the device does not exist, or the pictures do not fit.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        let table = |name: &str| format!("{}.{name}", job.name);
        self.run.check(job.name)?;
        self.head(job)?;
        ensure!(
            self.heads.iter().all(|&clusters| clusters >= 2),
            "`heads` in `[{}]` is {:?}; each needs at least 2 clusters",
            job.name,
            self.heads
        );
        check::within(job.name, "assigned-share", self.assigned_share, 0. ..=1.)?;
        let temperatures =
            [("temperature", self.temperature), ("centre-temperature", self.centre_temperature)];
        check::above_zero(job.name, &temperatures)?;
        self.constraint.check(&table("constraint"))?;

        let OptimizerTable { learning_rate, centre_learning_rate, momentum, weight_decay } =
            self.optimizer;
        let optimizer = table("optimizer");
        check::above_zero(&optimizer, &[("learning-rate", learning_rate)])?;
        let values =
            [("centre-learning-rate", centre_learning_rate), ("weight-decay", weight_decay)];
        check::not_negative(&optimizer, &values)?;
        check::below_one(&optimizer, &[("momentum", momentum)])?;
        let ScheduleTable { still_epochs, warmup_epochs } = self.schedule;
        ensure!(
            still_epochs + warmup_epochs < self.run.epochs,
            "`still-epochs` and `warmup-epochs` in `[{}]` are {still_epochs} and {warmup_epochs}; \
             together they must be below the {} epochs",
            table("schedule"),
            self.run.epochs
        );
        let NetworkTable { backbone, projector } = self.network;
        let widths = [
            ("backbone.width", backbone.width),
            ("projector.hidden", projector.hidden),
            ("projector.width", projector.width),
        ];
        check::at_least(&table("network"), 1, &widths)?;
        self.input.check(&table("input"))?;
        self.views_1.check(&table("views-1"))?;
        self.views_2.check(&table("views-2"))?;
        let [backbone, projector] = self.plans()?;
        let cost = training::picture_cost([&backbone, &projector], None, &[], &self.input)?;
        let Some(pictures) = check::pictures(job, &self.input)? else { return Ok(Effort::NONE) };
        let smallest = sampler::smallest_of_every(pictures.trained, self.run.batch_size);
        self.run.check_groups(job.name, smallest)?;
        // Two views of each image, and each scored image once for the result.
        let views = (2 * self.run.epochs * pictures.trained) as f64;
        let multiply_adds = views * cost.learning + pictures.scored as f64 * cost.projection;
        Ok(Effort::of_multiply_adds(multiply_adds, cost))
    }

    pub(crate) fn plan(&self, images: usize) -> RunPlan {
        let advice = Advice {
            divergence: "a lower `learning-rate` or `centre-learning-rate`",
            collapse: "a lower `learning-rate`, or milder `views-1` and `views-2`",
        };
        self.run.plan(images, sampler::steps_of_every(images, self.run.batch_size), advice)
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
                "`heads` in `[secu]` is {:?}; one must have as many clusters as table `[data]`: \
                 add {clusters}",
                self.heads
            )
        })
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> LearningRate {
        let ScheduleTable { still_epochs, warmup_epochs } = self.schedule;
        LearningRate::after_still_epochs(
            self.optimizer.learning_rate,
            still_epochs,
            warmup_epochs,
            self.run.epochs,
            steps_per_epoch,
        )
    }

    pub(crate) fn temperatures(&self) -> Temperatures {
        Temperatures {
            network: self.temperature,
            centres: self.centre_temperature,
            assigned_share: self.assigned_share,
        }
    }

    pub(crate) fn centre_rule(&self) -> Sgd {
        let OptimizerTable { centre_learning_rate, momentum, weight_decay, .. } = self.optimizer;
        Sgd { learning_rate: centre_learning_rate, momentum, weight_decay }
    }

    /// The plans of backbone and projector.
    pub(crate) fn plans(&self) -> Result<[Network; 2]> {
        let NetworkTable { backbone, projector: Projector { hidden, width } } = self.network;
        let projector = perceptron::plan(backbone.embedding_width(), hidden, width)?;
        let backbone = resnet::plan(&backbone, self.input.channels)?;
        Ok([backbone, projector].map(|plan| plan.with_precision(self.run.precision.into())))
    }

    /// The contents of `config.json`.
    pub(crate) fn configuration(&self) -> SavedConfiguration<'_> {
        SavedConfiguration {
            backbone: self.network.backbone,
            projector: self.network.projector,
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
