//! The table `[pretraining]`.

use anyhow::Result;
use data::Images;
use data::views::{Input, Pipeline};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{
    Advice, LearningRate, NetworkTable, RunPlan, RunTable, ScheduleTable, SgdTable, TargetDecay,
    Views, check, sampler,
};

/// What a pretraining run can vary. The experiment sets every field; the seed is an argument of the
/// program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Deviation σ of the noise on the projection before the predictor; 0 is BYOL, 0.001 the
    /// positive sampling of ProPos.
    pub noise: f64,
    /// Order of the images.
    pub sampling: Sampling,
    /// Length, batches, checkpoints.
    pub run: RunTable,
    /// SGD.
    pub optimizer: SgdTable,
    /// Learning rate and target decay.
    pub schedule: ScheduleTable,
    /// Backbone, projector, predictor.
    pub network: NetworkTable,
    /// Size and normalisation of the network's input, here and in every later stage.
    pub input: Input,
    /// The operations that make a view of a picture; each gives two.
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
    /// Checks values, device and pictures before anything runs.
    ///
    /// # Errors
    ///
    /// A value is out of range, the device does not exist, or the pictures do not fit.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        self.run.check(job.name)?;
        self.optimizer.check(job.name)?;
        self.schedule.check(job.name, self.run.epochs)?;
        self.network.check(job.name)?;
        check::not_negative(job.name, &[("noise", self.noise)])?;
        self.input.check(&format!("{}.input", job.name))?;
        self.views.check(&format!("{}.views", job.name))?;
        let cost = self.network.picture_cost(&self.input)?;
        let Some(pictures) = check::pictures(job, &self.input)? else { return Ok(Effort::NONE) };
        self.run.check_groups(job.name, self.plan(pictures.trained).batch_size)?;
        // Two views through the online network, two through the target.
        let views = 2. * self.plan(pictures.trained).pictures();
        Ok(Effort::of_multiply_adds(views * (cost.learning + cost.projection), cost))
    }

    pub(crate) fn plan(&self, images: usize) -> RunPlan {
        self.run.plan(images, sampler::steps(images, self.run.batch_size), Advice::BYOL)
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> LearningRate {
        let RunTable { epochs, batch_size, .. } = self.run;
        self.schedule.learning_rate(&self.optimizer, batch_size, epochs, steps_per_epoch)
    }

    pub(crate) fn target_decay(&self, steps_per_epoch: usize) -> TargetDecay {
        self.schedule.target_decay(self.run.epochs * steps_per_epoch)
    }

    /// Two views of every image.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        Views::new(images, [&self.views; 2], &self.input, seed)
    }
}
