//! The table `[propos]`, and what follows from it.

use anyhow::{Context, Result, ensure};
use assignment::KMeans;
use backbone::{Architecture, Configuration, Predictor, Projector};
use data::views::{Input, Pipeline};
use data::{Images, Loader};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::scatter::Absent;
use training::{
    Advice, Cosine, Groups, LearningRate, Plan, Precision, TargetDecay, Views, check, sampler,
};

use crate::objective::{Extras, NoiseSpace};

/// What ProPos can vary. The experiment file sets every field: there are no defaults in code, and
/// an unknown or missing key is an error. The seed is an argument of the program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Passes over the images.
    pub epochs: usize,
    /// Images per step; each gives two views. 256 is published.
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
    /// Decay τ of the target network at first.
    pub target_decay: f64,
    /// And at last, at the end of half a cosine: 1 is published, but for CIFAR-10, where it stays
    /// at 0.996.
    pub last_target_decay: f64,
    /// First epochs of BYOL alone: without noise and without scattering. Published are those of
    /// warm-up.
    pub byol_epochs: usize,
    /// Epochs from one E-step to the next; 1 is published.
    pub reassign: usize,
    /// Starts of k-means in an E-step; the one of lowest inertia is kept. 10 on each of 4 devices
    /// are published.
    pub kmeans_restarts: usize,
    /// Steps of one start at most.
    pub kmeans_iterations: usize,
    /// Deviation σ of positive sampling: noise on the projection before the predictor.
    pub noise: f64,
    /// Where it is added.
    pub noise_space: NoiseSpace,
    /// Weight λ of prototype scattering.
    pub scatter_weight: f64,
    /// The weight acts as it does in the authors' program on so many devices, which divides its
    /// gradient by their number: 4 with a weight of 0.1 is 0.025 here.
    pub emulate_world_size: usize,
    /// Temperature τ of scattering.
    pub scatter_temperature: f64,
    /// Logit of a cluster that is not in the batch; −10 is published, `-inf` leaves it out.
    pub absent_logit: f64,
    /// Both views through the network as one batch, so that they share their statistics: published
    /// for CIFAR-20 and ImageNet-Dogs. With `false`, statistics are per view, as in BYOL.
    pub concatenate_views: bool,
    /// Order of the images.
    pub sampling: Sampling,
    /// Number type of activations and products.
    pub precision: Precision,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length projections falls below this.
    pub collapse_deviation: f64,
    /// The residual network.
    pub backbone: Architecture,
    /// Behind it.
    pub projector: Projector,
    /// Behind the projector, in the online network alone.
    pub predictor: Predictor,
    /// What the network is fed with.
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
    /// Drawn with replacement so that every cluster of the last E-step has the same share; from
    /// the first epoch on. Published for CIFAR-20 and ImageNet-Dogs.
    Balanced,
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
        self.groups()?;
        self.learning_rate(1)?;
        self.target_decay(1)?;
        check::batch_size(self.batch_size)?;
        check::counts(&[
            ("reassign", self.reassign),
            ("kmeans-restarts", self.kmeans_restarts),
            ("kmeans-iterations", self.kmeans_iterations),
            ("emulate-world-size", self.emulate_world_size),
        ])?;
        check::not_negative(&[("noise", self.noise), ("scatter-weight", self.scatter_weight)])?;
        check::above_zero(&[("scatter-temperature", self.scatter_temperature)])?;
        ensure!(
            self.absent_logit < f64::INFINITY,
            "absent-logit = {}: it must be a number or -inf",
            self.absent_logit
        );
        self.input.check("propos.input")?;
        self.views.check("propos.views")?;
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let images = Images::open(&job.images)?;
        Loader::check(&images, &self.input)?;
        let rows = images.rows(&job.data.train_on);
        sampler::uniform(&rows, self.batch_size, 0, 0)?;
        let scored = images.rows(&job.data.score_on).len();
        Ok(Effort::of_backbone_pictures(self.effort(rows.len(), scored)))
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

    /// Pictures through a backbone: of each of two views once by the online and once by the target
    /// network, and of each image once by the target in every E-step, and for the result.
    pub(crate) fn effort(&self, images: usize, scored: usize) -> f64 {
        let e_steps = self.epochs.div_ceil(self.reassign) * images;
        4. * self.plan(images).pictures() + (e_steps + scored) as f64
    }

    pub(crate) fn groups(&self) -> Result<Groups> {
        Groups::byol(self.momentum, self.weight_decay, self.predictor_learning_rate_factor)
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> Result<LearningRate> {
        let peak = self.peak_learning_rate * self.batch_size as f64 / 256.;
        LearningRate::new(peak, self.warmup_epochs, self.epochs, steps_per_epoch, self.cosine)
    }

    pub(crate) fn target_decay(&self, steps_per_epoch: usize) -> Result<TargetDecay> {
        let steps = self.epochs * steps_per_epoch;
        TargetDecay::between(self.target_decay, self.last_target_decay, steps)
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

    /// The k-means of an E-step and of the result.
    pub(crate) fn k_means(&self, clusters: usize) -> KMeans {
        KMeans {
            iterations: self.kmeans_iterations,
            ..KMeans::spherical(clusters, self.kmeans_restarts)
        }
    }

    /// What is added to BYOL in an epoch, counted from 0.
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
            Sampling::Uniform => sampler::uniform(rows, self.batch_size, seed, epoch),
            Sampling::Balanced => {
                sampler::balanced(rows, assignment, clusters, self.batch_size, seed, epoch)
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
        let text = r#"
            epochs = 1000
            batch-size = 256
            peak-learning-rate = 0.05
            predictor-learning-rate-factor = 10.0
            momentum = 0.9
            weight-decay = 5e-4
            warmup-epochs = 50.0
            cosine = "published"
            target-decay = 0.996
            last-target-decay = 1.0
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
            precision = "f32"
            save-every = 10
            collapse-deviation = 1e-4
            backbone = { depth = "10", width = 2, stem = "3x3" }
            projector = { hidden = 8, width = 4 }
            predictor = { hidden = 8 }
            views = { operations = [{ operation = "noise", deviation = 0.2 }] }
            [input]
            height = 6
            width = 7
            channels = 1
            mean = [0.5]
            std = [0.3]
            clean = []
        "#;
        toml::from_str(text).expect("a table")
    }

    /// ProPos, case 13 in part, and gotcha 1.
    #[test]
    fn extras_begin_behind_warm_up_with_the_weight_of_the_published_devices() {
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
    fn schedules_are_the_published_ones() -> Result<()> {
        let rate = published().learning_rate(76)?;
        assert!((rate.at(50 * 76) - 0.05).abs() < 1e-12);
        assert!((rate.at(1000 * 76) - 0.00030779).abs() < 1e-8, "the tail is not 0");
        let decay = published().target_decay(76)?;
        assert!((decay.at(0) - 0.996).abs() < 1e-12 && decay.at(76_000) == 1.);
        let constant = Config { last_target_decay: 0.996, ..published() }.target_decay(76)?;
        for step in [0, 10_000, 76_000] {
            assert!((constant.at(step) - 0.996).abs() < 1e-15);
        }
        Ok(())
    }

    #[test]
    fn effort_counts_both_networks_and_every_e_step() {
        let config = Config { epochs: 5, reassign: 2, batch_size: 8, ..published() };
        // Five epochs of two batches, four passes each; three E-steps on 20, the result on 24.
        assert_eq!(config.effort(20, 24), 4. * 5. * 16. + 3. * 20. + 24.);
    }

    #[test]
    fn order_is_balanced_over_the_clusters_where_asked_for() -> Result<()> {
        let config = Config { batch_size: 50, ..published() };
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
