//! The table `[propos]`, and what follows from it.

use anyhow::{Result, ensure};
use assignment::KMeans;
use data::Images;
use data::views::{Input, Pipeline};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job, PictureCost};
use training::scatter::Absent;
use training::{
    Advice, LearningRate, NetworkTable, RunPlan, RunTable, ScheduleTable, SgdTable, TargetDecay,
    Views, check, sampler,
};

use crate::JoinedViews;
use crate::objective::{Extras, NoiseSpace};

/// What ProPos can vary. The experiment sets every field; the seed is an argument of the program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// First epochs of BYOL alone: without noise and without scattering. Published are those of
    /// warm-up.
    pub byol_epochs: usize,
    /// Epochs from one E-step to the next; 1 is published.
    pub reassign: usize,
    /// Starts of k-means in an E-step; the one of lowest inertia is kept. 10 on each of 4 devices
    /// are published.
    pub kmeans_restarts: usize,
    /// Most iterations of one start.
    pub kmeans_iterations: usize,
    /// Deviation σ of positive sampling: noise on the projection before the predictor.
    pub noise: f64,
    /// The space in which it is added.
    pub noise_space: NoiseSpace,
    /// Weight λ of prototype scattering.
    pub scatter_weight: f64,
    /// The weight acts as in the authors' program on this many devices, which divides its gradient
    /// by their number: 4 with a weight of 0.1 is 0.025 here.
    pub emulate_world_size: usize,
    /// Temperature τ of scattering.
    pub scatter_temperature: f64,
    /// Logit of a cluster without an image in the batch; −10 is published, `-inf` leaves it out.
    pub absent_logit: f64,
    /// Both views through the network as one batch, so that they share their statistics: published
    /// for CIFAR-20 and ImageNet-Dogs. `batch-groups` then divides the batch evenly. With `false`, statistics
    /// are per view, as in BYOL.
    pub concatenate_views: bool,
    /// Order of the images.
    pub sampling: Sampling,
    /// Length, batches (256 published), checkpoints.
    pub run: RunTable,
    /// SGD.
    pub optimizer: SgdTable,
    /// Learning rate and target decay.
    pub schedule: ScheduleTable,
    /// Backbone, projector, predictor.
    pub network: NetworkTable,
    /// Size and normalisation of the network's input.
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
    /// Drawn with replacement so that every cluster of the last E-step has the same share; from
    /// the first epoch on. Published for CIFAR-20 and ImageNet-Dogs.
    Balanced,
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
        let counts = [
            ("reassign", self.reassign),
            ("kmeans-restarts", self.kmeans_restarts),
            ("kmeans-iterations", self.kmeans_iterations),
            ("emulate-world-size", self.emulate_world_size),
        ];
        check::at_least(job.name, 1, &counts)?;
        let weights = [("noise", self.noise), ("scatter-weight", self.scatter_weight)];
        check::not_negative(job.name, &weights)?;
        check::above_zero(job.name, &[("scatter-temperature", self.scatter_temperature)])?;
        ensure!(
            self.absent_logit < f64::INFINITY,
            "`absent-logit` in `[{}]` is {}; it must be a number or -inf",
            job.name,
            self.absent_logit
        );
        self.input.check(&format!("{}.input", job.name))?;
        self.views.check(&format!("{}.views", job.name))?;
        let cost = self.network.picture_cost(&self.input)?;
        let Some(pictures) = check::pictures(job, &self.input)? else { return Ok(Effort::NONE) };
        let images = self.plan(pictures.trained).batch_size;
        self.run.check_groups(job.name, images)?;
        ensure!(
            !self.concatenate_views || images.is_multiple_of(self.run.batch_groups),
            "`batch-groups` in `[{0}.run]` is {1}, which does not divide a batch of {images} images evenly, as \
             `concatenate-views = true` needs it; choose fewer groups, or another `batch-size`",
            job.name,
            self.run.batch_groups
        );
        let multiply_adds = self.multiply_adds(pictures.trained, pictures.scored, &cost);
        Ok(Effort::of_multiply_adds(multiply_adds, cost))
    }

    pub(crate) fn plan(&self, images: usize) -> RunPlan {
        self.run.plan(images, sampler::steps(images, self.run.batch_size), Advice::BYOL)
    }

    /// Of each of two views once by the online and once by the target network, and of each image once
    /// by the target in every E-step and for the result.
    fn multiply_adds(&self, images: usize, scored: usize, cost: &PictureCost) -> f64 {
        let e_steps = self.run.epochs.div_ceil(self.reassign) * images;
        let views = 2. * self.plan(images).pictures();
        views * (cost.learning + cost.projection) + (e_steps + scored) as f64 * cost.projection
    }

    /// How both views pass as one batch, if they do.
    ///
    /// - `images`: of a batch.
    pub(crate) fn joined_views(&self, images: usize) -> Option<JoinedViews> {
        let of_group = images / self.run.batch_groups;
        self.concatenate_views.then_some(JoinedViews { images: of_group })
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> LearningRate {
        let RunTable { epochs, batch_size, .. } = self.run;
        self.schedule.learning_rate(&self.optimizer, batch_size, epochs, steps_per_epoch)
    }

    pub(crate) fn target_decay(&self, steps_per_epoch: usize) -> TargetDecay {
        self.schedule.target_decay(self.run.epochs * steps_per_epoch)
    }

    /// The k-means of an E-step and of the result.
    pub(crate) fn k_means(&self, clusters: usize) -> KMeans {
        KMeans {
            iterations: self.kmeans_iterations,
            ..KMeans::spherical(clusters, self.kmeans_restarts)
        }
    }

    /// Noise and scattering in an epoch, counted from 0.
    pub(crate) fn extras(&self, epoch: usize, clusters: usize) -> Extras {
        let is_on = epoch >= self.byol_epochs;
        let weight = self.scatter_weight / self.emulate_world_size as f64;
        Extras {
            noise: if is_on { self.noise } else { 0. },
            noise_space: self.noise_space,
            scatter_weight: if is_on { weight } else { 0. },
            temperature: self.scatter_temperature,
            absent: Absent::Constant { clusters, logit: self.absent_logit },
        }
    }

    /// The batches of an epoch.
    ///
    /// - `rows`: the images, as rows of the images file.
    /// - `assignment`: the cluster of each of them.
    ///
    /// # Errors
    ///
    /// There are too few images.
    pub(crate) fn order(
        &self,
        rows: &[u32],
        assignment: &[u32],
        clusters: usize,
        seed: u64,
        epoch: usize,
    ) -> Result<Vec<Vec<u32>>> {
        match self.sampling {
            Sampling::Uniform => sampler::uniform(rows, self.run.batch_size, seed, epoch),
            Sampling::Balanced => {
                sampler::balanced(rows, assignment, clusters, self.run.batch_size, seed, epoch)
            }
        }
    }

    /// Two views of every image.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        Views::new(images, [&self.views; 2], &self.input, seed)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The published table for ImageNet-Dogs, with a network and pictures for a test.
    pub(crate) fn published() -> Config {
        fixture::table(
            r#"
            byol-epochs = 50
            reassign = 1
            kmeans-restarts = 40
            kmeans-iterations = 300
            noise = 0.001
            noise-space = "raw"
            scatter-weight = 0.1
            emulate-world-size = 4
            scatter-temperature = 0.5
            absent-logit = -10.0
            concatenate-views = false
            sampling = "balanced"
            views = { operations = [{ operation = "noise", deviation = 0.2 }] }
            [run]
            epochs = 1000
            batch-size = 256
            batch-groups = 1
            precision = "f32"
            save-every = 10
            collapse-deviation = 1e-4
            [optimizer]
            peak-learning-rate = 0.05
            predictor-learning-rate-factor = 10.0
            momentum = 0.9
            weight-decay = 5e-4
            [schedule]
            warmup-epochs = 50.0
            cosine = "published"
            target-decay = 0.996
            last-target-decay = 1.0
            [network]
            backbone = { depth = "10", width = 2, stem = "3x3" }
            projector = { hidden = 8, width = 4 }
            predictor = { hidden = 8 }
        "#,
        )
    }

    /// ProPos, case 13 in part, and gotcha 1.
    #[test]
    fn extras_begin_after_warm_up_with_the_weight_of_the_published_devices() {
        let config = published();
        for epoch in [0, 49] {
            let extras = config.extras(epoch, 15);
            assert_eq!((extras.noise, extras.scatter_weight), (0., 0.), "epoch {epoch}, from 0");
        }
        let extras = config.extras(50, 15);
        assert_eq!((extras.noise, extras.scatter_weight), (0.001, 0.025));
        assert_eq!(extras.temperature, 0.5);
        assert_eq!(extras.absent, Absent::Constant { clusters: 15, logit: -10. });
        let alone = Config { emulate_world_size: 1, ..config };
        assert_eq!(alone.extras(50, 15).scatter_weight, 0.1);
    }

    #[test]
    fn schedules_are_the_published_ones() {
        let rate = published().learning_rate(76);
        assert!((rate.at(50 * 76) - 0.05).abs() < 1e-12);
        assert!((rate.at(1000 * 76) - 0.00030779).abs() < 1e-8, "the tail is not 0");
        let decay = published().target_decay(76);
        assert!((decay.at(0) - 0.996).abs() < 1e-12 && decay.at(76_000) == 1.);
        let mut constant = published();
        constant.schedule.last_target_decay = 0.996;
        let constant = constant.target_decay(76);
        for step in [0, 10_000, 76_000] {
            assert!((constant.at(step) - 0.996).abs() < 1e-15);
        }
    }

    #[test]
    fn effort_counts_both_networks_and_every_e_step() {
        let mut config = Config { reassign: 2, ..published() };
        (config.run.epochs, config.run.batch_size) = (5, 8);
        // Five epochs of two batches, four passes each; three E-steps on 20, the result on 24.
        let cost = PictureCost { embedding: f64::NAN, projection: 1., learning: 100. };
        assert_eq!(config.multiply_adds(20, 24, &cost), 2. * 5. * 16. * 101. + 3. * 20. + 24.);
    }

    #[test]
    fn order_is_balanced_over_the_clusters_where_asked_for() -> Result<()> {
        let mut config = published();
        config.run.batch_size = 50;
        let rows: Vec<u32> = (0..100).collect();
        let assignment: Vec<u32> = (0..100).map(|i| u32::from(i < 10)).collect();
        let small = |config: &Config| -> Result<usize> {
            let order = config.order(&rows, &assignment, 2, 1, 3)?;
            Ok(order.concat().iter().filter(|&&row| row < 10).count())
        };
        let drawn = small(&config)?;
        assert!((30..70).contains(&drawn), "half of 100 draws, not {drawn}");
        assert_eq!(small(&Config { sampling: Sampling::Uniform, ..config })?, 10);
        Ok(())
    }
}
