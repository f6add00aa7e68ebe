//! Tables of an experiment that several training stages have, `[<stage>.run]` and so on.
//!
//! | table | stages |
//! |---|---|
//! | [`run`](RunTable) | all that train |
//! | [`optimizer`](SgdTable), [`schedule`](ScheduleTable) | pretraining, prototype-refinement, propos |
//! | [`network`](NetworkTable) | pretraining, propos |
//!
//! The other systems have an optimizer, a schedule and a network of their own in tables of these
//! names. As everywhere, the experiment sets every key.

use anyhow::{Context, Result, ensure};
use backbone::{Architecture, Configuration, Predictor, Projector};
use data::views::Input;
use layers::BatchGroups;
use serde::{Deserialize, Serialize};
use stage::{Job, PictureCost};

use crate::run::{Advice, RunPlan};
use crate::schedule::{Cosine, LearningRate, TargetDecay};
use crate::{Precision, check};

/// `[<stage>.run]`: how long a stage trains, on how many images at once, and when it saves or stops.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RunTable {
    /// Passes over the images; of a refinement, in each round.
    pub epochs: usize,
    /// Images per step.
    pub batch_size: usize,
    /// Groups into which a batch is divided, a power of two: as many ranks or fewer can share the run, and
    /// its results do not depend on how many do. They depend on the groups in the last bits.
    pub batch_groups: usize,
    /// Number type of activations and products.
    pub precision: Precision,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length projections falls below this.
    pub collapse_deviation: f64,
}

impl RunTable {
    /// Checks the values.
    ///
    /// - `stage`: name of the stage, for messages.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(&self, stage: &str) -> Result<()> {
        let table = format!("{stage}.run");
        check::at_least(&table, 1, &[("epochs", self.epochs), ("save-every", self.save_every)])?;
        check::at_least(&table, 2, &[("batch-size", self.batch_size)])?;
        let (groups, images) = (self.batch_groups, self.batch_size);
        ensure!(
            groups.is_power_of_two() && groups <= images,
            "`batch-groups` in `[{table}]` is {groups}; it must be a power of two and at most `batch-size`, {images}"
        );
        check::not_negative(&table, &[("collapse-deviation", self.collapse_deviation)])
    }

    /// The groups of a batch, shared by the ranks of `job`.
    ///
    /// # Errors
    ///
    /// There are more ranks than groups; the message names the key.
    pub fn groups(&self, job: &Job) -> Result<BatchGroups> {
        let (groups, ranks, table) = (self.batch_groups, job.communicator.size(), job.name);
        ensure!(
            ranks <= groups,
            "`batch-groups` in `[{table}.run]` is {groups}, but {ranks} ranks were started, and each needs a group; \
             start fewer, or set {ranks} or more with --set {table}.run.batch-groups={ranks}"
        );
        if ranks > 1 && job.communicator.is_first() && !job.communicator.sums_in_background() {
            tracing::warn!(
                "gradients are summed over the ranks only after the backward passes: this MPI does not let several \
                 threads send at a time; one with MPI_THREAD_MULTIPLE sums them meanwhile"
            );
        }
        Ok(BatchGroups::new(groups, job.communicator.clone())?)
    }

    /// Checks that the batches of an epoch over so many images can be divided.
    ///
    /// - `smallest`: images of its smallest batch.
    ///
    /// # Errors
    ///
    /// A group would be empty; the message names the key.
    pub fn check_groups(&self, stage: &str, smallest: usize) -> Result<()> {
        ensure!(
            self.batch_groups <= smallest,
            "`batch-groups` in `[{stage}.run]` is {}, but a batch has {smallest} images, and each group needs \
             one; choose fewer groups, or another `batch-size` than {}",
            self.batch_groups,
            self.batch_size
        );
        Ok(())
    }

    /// A run over this many images.
    ///
    /// - `steps_per_epoch`: from [`steps`](crate::sampler::steps) or
    ///   [`steps_of_every`](crate::sampler::steps_of_every).
    pub fn plan(&self, images: usize, steps_per_epoch: usize, advice: Advice) -> RunPlan {
        RunPlan {
            epochs: self.epochs,
            steps_per_epoch,
            batch_size: self.batch_size.min(images),
            save_every: self.save_every,
            collapse_deviation: self.collapse_deviation,
            advice,
        }
    }
}

/// `[<stage>.optimizer]` of BYOL: SGD with momentum, and a predictor that learns faster.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SgdTable {
    /// Learning rate after warm-up, for 256 images; scales linearly with `batch-size`.
    pub peak_learning_rate: f64,
    /// The predictor learns faster by this factor; 10 is published for BYOL.
    pub predictor_learning_rate_factor: f64,
    /// Share of the last step's direction that a step keeps.
    pub momentum: f64,
    /// Weight decay of every parameter, batch norms and biases included.
    pub weight_decay: f64,
}

impl Advice {
    /// For BYOL and the methods built on it.
    pub const BYOL: Self = Self {
        divergence: "a lower `peak-learning-rate`",
        collapse: "a higher `target-decay`, a lower `peak-learning-rate` or milder `views`",
    };
}

impl SgdTable {
    /// Checks the values, as [`RunTable::check`].
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(&self, stage: &str) -> Result<()> {
        let table = format!("{stage}.optimizer");
        check::above_zero(&table, &[("peak-learning-rate", self.peak_learning_rate)])?;
        check::below_one(&table, &[("momentum", self.momentum)])?;
        check::not_negative(
            &table,
            &[
                ("weight-decay", self.weight_decay),
                ("predictor-learning-rate-factor", self.predictor_learning_rate_factor),
            ],
        )
    }
}

/// `[<stage>.schedule]` of BYOL: of the learning rate and of the target network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ScheduleTable {
    /// Epochs over which the learning rate rises from 0.
    pub warmup_epochs: f64,
    /// How the learning rate falls after them.
    pub cosine: Cosine,
    /// Decay τ of the target network at first (section 3.2 of BYOL).
    pub target_decay: f64,
    /// The decay at last, at the end of half a cosine: 1 is published, but for ProPos on CIFAR-10,
    /// where it stays at 0.996.
    pub last_target_decay: f64,
}

impl ScheduleTable {
    /// Checks the values for a run of this many epochs, as [`RunTable::check`].
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(&self, stage: &str, epochs: usize) -> Result<()> {
        let table = format!("{stage}.schedule");
        let (warmup, base, last) = (self.warmup_epochs, self.target_decay, self.last_target_decay);
        check::within(&table, "warmup-epochs", warmup, 0. ..epochs as f64)?;
        check::within(&table, "target-decay", base, 0. ..=1.)?;
        check::within(&table, "last-target-decay", last, base..=1.)
    }

    /// The learning rate over `epochs` epochs.
    pub fn learning_rate(
        &self,
        optimizer: &SgdTable,
        batch_size: usize,
        epochs: usize,
        steps_per_epoch: usize,
    ) -> LearningRate {
        let peak = optimizer.peak_learning_rate * batch_size as f64 / 256.;
        LearningRate::cosine(peak, self.warmup_epochs, epochs, steps_per_epoch, self.cosine)
    }

    /// The decay of the target network over this many steps.
    pub fn target_decay(&self, steps: usize) -> TargetDecay {
        TargetDecay::new(self.target_decay, self.last_target_decay, steps)
    }
}

/// `[<stage>.network]` of BYOL.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetworkTable {
    /// The residual network: picture to embedding.
    pub backbone: Architecture,
    /// Embedding to projection.
    pub projector: Projector,
    /// Projection to prediction, in the online network alone.
    pub predictor: Predictor,
}

impl NetworkTable {
    /// Checks the widths, as [`RunTable::check`].
    ///
    /// # Errors
    ///
    /// One is 0; the message names the key.
    pub fn check(&self, stage: &str) -> Result<()> {
        let widths = [
            ("backbone.width", self.backbone.width),
            ("projector.hidden", self.projector.hidden),
            ("projector.width", self.projector.width),
            ("predictor.hidden", self.predictor.hidden),
        ];
        check::at_least(&format!("{stage}.network"), 1, &widths)
    }

    /// What a picture costs in networks of this table.
    ///
    /// # Errors
    ///
    /// A width is 0, or the input is too small for the backbone.
    pub fn picture_cost(&self, input: &Input) -> Result<PictureCost> {
        let configuration = self.configuration(input)?;
        let [backbone, projector] =
            [configuration.backbone_plan()?, configuration.projector_plan()?];
        let predictor = configuration.predictor_plan()?;
        crate::picture_cost([&backbone, &projector], Some(&predictor), &[], input)
    }

    /// The contents of `config.json` for a network with this input.
    ///
    /// # Errors
    ///
    /// The input cannot be written as JSON: a fault of this program.
    pub fn configuration(&self, input: &Input) -> Result<Configuration> {
        Ok(Configuration {
            backbone: self.backbone,
            projector: self.projector,
            predictor: self.predictor,
            channels: input.channels,
            input: serde_json::to_value(input).context("the input of the network")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use backbone::{Depth, Stem};

    use super::*;

    const RUN: RunTable = RunTable {
        epochs: 10,
        batch_size: 64,
        batch_groups: 1,
        precision: Precision::F32,
        save_every: 5,
        collapse_deviation: 1e-4,
    };
    const SGD: SgdTable = SgdTable {
        peak_learning_rate: 0.05,
        predictor_learning_rate_factor: 10.,
        momentum: 0.9,
        weight_decay: 5e-4,
    };
    const SCHEDULE: ScheduleTable = ScheduleTable {
        warmup_epochs: 2.,
        cosine: Cosine::ToZero,
        target_decay: 0.9,
        last_target_decay: 1.,
    };
    const NETWORK: NetworkTable = NetworkTable {
        backbone: Architecture { depth: Depth::Ten, width: 2, stem: Stem::Plain },
        projector: Projector { hidden: 8, width: 4 },
        predictor: Predictor { hidden: 8 },
    };

    #[test]
    fn a_value_out_of_range_is_refused_with_its_table_and_key() -> Result<()> {
        RUN.check("s")?;
        SGD.check("s")?;
        SCHEDULE.check("s", 10)?;
        NETWORK.check("s")?;
        let no_hidden = Projector { hidden: 0, width: 4 };
        for (checked, place) in [
            (RunTable { epochs: 0, ..RUN }.check("s"), "`epochs` in `[s.run]`"),
            (RunTable { save_every: 0, ..RUN }.check("s"), "`save-every` in `[s.run]`"),
            (RunTable { batch_size: 1, ..RUN }.check("s"), "`batch-size` in `[s.run]`"),
            (RunTable { batch_groups: 3, ..RUN }.check("s"), "`batch-groups` in `[s.run]`"),
            (RunTable { batch_groups: 128, ..RUN }.check("s"), "`batch-groups` in `[s.run]`"),
            (
                RunTable { batch_groups: 8, ..RUN }.check_groups("s", 7),
                "`batch-groups` in `[s.run]`",
            ),
            (
                RunTable { collapse_deviation: f64::NAN, ..RUN }.check("s"),
                "`collapse-deviation` in `[s.run]`",
            ),
            (
                SgdTable { peak_learning_rate: 0., ..SGD }.check("s"),
                "`peak-learning-rate` in `[s.optimizer]`",
            ),
            (SgdTable { momentum: 1., ..SGD }.check("s"), "`momentum` in `[s.optimizer]`"),
            (SgdTable { weight_decay: -1., ..SGD }.check("s"), "`weight-decay` in `[s.optimizer]`"),
            (
                ScheduleTable { warmup_epochs: 10., ..SCHEDULE }.check("s", 10),
                "`warmup-epochs` in `[s.schedule]`",
            ),
            (
                ScheduleTable { target_decay: 1.1, ..SCHEDULE }.check("s", 10),
                "`target-decay` in `[s.schedule]`",
            ),
            (
                ScheduleTable { last_target_decay: 0.8, ..SCHEDULE }.check("s", 10),
                "`last-target-decay` in `[s.schedule]`",
            ),
            (
                NetworkTable { projector: no_hidden, ..NETWORK }.check("s"),
                "`projector.hidden` in `[s.network]`",
            ),
        ] {
            let error = checked.expect_err(place).to_string();
            assert!(error.starts_with(place), "{place} does not start: {error}");
        }
        Ok(())
    }

    #[test]
    fn the_learning_rate_scales_with_the_batch_and_fewer_images_make_a_smaller_one() {
        let rate = |batch_size| SCHEDULE.learning_rate(&SGD, batch_size, 10, 4).at(8);
        assert!((rate(256) - 0.05).abs() < 1e-15 && (rate(64) - 0.0125).abs() < 1e-15);
        let plan = RUN.plan(20, 1, Advice::BYOL);
        assert_eq!((plan.epochs, plan.batch_size, plan.pictures()), (10, 20, 200.));
    }
}
