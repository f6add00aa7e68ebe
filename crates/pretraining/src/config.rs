//! The table `[pretraining]`.

use anyhow::{Context, Result};
use backbone::{Architecture, Configuration, Predictor, Projector};
use data::views::{Input, Pipeline};
use data::{Images, Loader};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{
    Advice, Cosine, Groups, LearningRate, Plan, Precision, TargetDecay, Views, check, sampler,
};

/// What a pretraining run can vary. The experiment file sets every field: there are no defaults
/// in code, and an unknown or missing key is an error. The seed is an argument of the program.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Passes over the images.
    pub epochs: usize,
    /// Images per step; each gives two views.
    pub batch_size: usize,
    /// Learning rate after warm-up, for 256 images; scales linearly with `batch_size`.
    pub peak_learning_rate: f64,
    /// The predictor learns faster by this factor; 10 is published.
    pub predictor_learning_rate_factor: f64,
    /// Share of the last step's direction that a step keeps.
    pub momentum: f64,
    /// Weight decay of every parameter, batch norm and biases included.
    pub weight_decay: f64,
    /// Epochs over which the learning rate rises from 0.
    pub warmup_epochs: f64,
    /// How the learning rate falls after them.
    pub cosine: Cosine,
    /// Decay τ of the target network at first; rises to 1 along a cosine (section 3.2 of BYOL).
    pub target_decay: f64,
    /// Deviation σ of the noise on the projection before the predictor; 0 is BYOL, 0.001 the
    /// positive sampling of ProPos.
    pub noise: f64,
    /// Number type of activations and products.
    pub precision: Precision,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length projections falls below this.
    pub collapse_deviation: f64,
    /// Order of the images.
    pub sampling: Sampling,
    /// The residual network.
    pub backbone: Architecture,
    /// Behind it.
    pub projector: Projector,
    /// Behind the projector, in the online network alone.
    pub predictor: Predictor,
    /// What the network is fed with, here and in every later stage.
    pub input: Input,
    /// From a picture to a view.
    pub views: Pipeline,
}

/// Order of the images of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// Every image once.
    Uniform,
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
        check::batch_size(self.batch_size)?;
        self.groups()?;
        self.learning_rate(1)?;
        self.target_decay(1)?;
        check::not_negative(&[("noise", self.noise)])?;
        self.input.check("pretraining.input")?;
        self.views.check("pretraining.views")?;
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let images = Images::open(&job.images)?;
        Loader::check(&images, &self.input)?;
        let rows = images.rows(&job.data.train_on);
        sampler::uniform(&rows, self.batch_size, 0, 0)?;
        // Two views through the online network, two through the target.
        Ok(Effort::of_backbone_pictures(4. * self.plan(rows.len()).pictures()))
    }

    /// Length of the run and its checkpoints.
    pub(crate) fn plan(&self, images: usize) -> Plan {
        Plan {
            epochs: self.epochs,
            steps_per_epoch: sampler::steps(images, self.batch_size),
            batch_size: self.batch_size.min(images),
            save_every: self.save_every,
            collapse_deviation: self.collapse_deviation,
            advice: Advice {
                divergence: "a lower `peak-learning-rate`",
                collapse: "a higher `target-decay`, a lower `peak-learning-rate` or milder `views`",
            },
        }
    }

    pub(crate) fn groups(&self) -> Result<Groups> {
        Groups::byol(self.momentum, self.weight_decay, self.predictor_learning_rate_factor)
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> Result<LearningRate> {
        let peak = self.peak_learning_rate * self.batch_size as f64 / 256.;
        LearningRate::new(peak, self.warmup_epochs, self.epochs, steps_per_epoch, self.cosine)
    }

    pub(crate) fn target_decay(&self, steps_per_epoch: usize) -> Result<TargetDecay> {
        TargetDecay::new(self.target_decay, self.epochs * steps_per_epoch)
    }

    /// What `config.json` will say.
    pub(crate) fn configuration(&self) -> Result<Configuration> {
        Ok(Configuration {
            backbone: self.backbone,
            projector: self.projector,
            predictor: self.predictor,
            channels: self.input.channels,
            input: serde_json::to_value(&self.input).context("`input` of the experiment")?,
        })
    }

    /// Two views of every image.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        Views::new(images, [&self.views; 2], &self.input, seed)
    }
}
