//! The table `[imc-swav]`.

use anyhow::{Context, Result, ensure};
use backbone::Architecture;
use data::Images;
use data::views::{Input, Operation, Pipeline};
use layers::Adam;
use serde::{Deserialize, Serialize};
use serde_json::json;
use stage::{Effort, Job, PictureCost, Split};
use training::{Advice, LearningRate, RunPlan, RunTable, Views, check, sampler};

/// What an IMC-SwAV run can vary. The experiment sets every field; published values stand in
/// parentheses.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Splits whose images the classifier learns from; those of `[data] train-on`, but for sets
    /// like STL-10, whose unlabelled part holds other classes.
    pub classify_on: Vec<Split>,
    /// Prototypes K' (1000).
    pub prototypes: usize,
    /// Temperature τ of predictions (0.1).
    pub temperature: f64,
    /// Entropy ε of the codes (0.05).
    pub code_epsilon: f64,
    /// Rounds of Sinkhorn's algorithm (3).
    pub code_rounds: usize,
    /// Weight β of the clusters' entropy against their information on the prototypes (4).
    pub entropy_weight: f64,
    /// Logits beyond this size are penalised (5).
    pub logit_limit: f64,
    /// Weight of that penalty (0.01).
    pub logit_penalty: f64,
    /// Which batch-norm statistics the result is predicted with; the other is written beside it.
    pub evaluation: Evaluation,
    /// Most batches of scored pictures that refresh the statistics (50).
    pub refresh_batches: usize,
    /// Starts of k-means on the embeddings, which is reported beside the classifier.
    pub kmeans_restarts: usize,
    /// Length (500 epochs), batches (256; 512 for a hundred clusters and more), checkpoints.
    pub run: RunTable,
    /// Adam.
    pub optimizer: OptimizerTable,
    /// Learning rate.
    pub schedule: ScheduleTable,
    /// Backbone, projector, classifier.
    pub network: NetworkTable,
    /// Size and normalisation of the network's input when it is evaluated.
    pub input: Input,
    /// Crops whose codes the others predict (2).
    pub large: Crops,
    /// The other crops (4).
    pub small: Crops,
}

/// `[imc-swav.optimizer]`: Adam, for everything that learns.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct OptimizerTable {
    /// Learning rate after warm-up (5e-4).
    pub learning_rate: f64,
    /// Decay of the mean of gradients (0.8).
    pub beta_1: f64,
    /// Decay of the mean of squared gradients (0.999).
    pub beta_2: f64,
    /// Added to the root (1e-8).
    pub epsilon: f64,
    /// Weight decay, added to the gradient (1e-5).
    pub weight_decay: f64,
}

/// `[imc-swav.schedule]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ScheduleTable {
    /// Steps over which the learning rate rises, and in which the prototypes stand still (500).
    pub warmup_steps: usize,
    /// Epochs from which the learning rate is lower by the factor (150, 300, 400).
    pub learning_rate_drops: Vec<usize>,
    /// The factor of each of them (0.4).
    pub learning_rate_factor: f64,
}

/// `[imc-swav.network]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetworkTable {
    /// The residual network: picture to embedding.
    pub backbone: Architecture,
    /// Embedding to projection.
    pub projector: ProjectorWidths,
    /// Embedding to logits over the clusters.
    pub classifier: ClassifierWidths,
}

/// Widths of the two linear layers between embedding and projection.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProjectorWidths {
    /// Between them (512).
    pub hidden: usize,
    /// Width P of the projection (128).
    pub width: usize,
}

/// Widths of the classifier.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ClassifierWidths {
    /// Of its two hidden layers (1024).
    pub hidden: usize,
}

/// Crops of one size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Crops {
    /// How many of each picture.
    pub count: usize,
    /// Rows of pixels.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
    /// From a picture to a crop.
    pub operations: Vec<Operation>,
}

/// Batch-norm statistics that the result is predicted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evaluation {
    /// Those gathered in training, which mix crops of two sizes.
    RunningStatistics,
    /// Those refreshed on scored pictures before they are predicted: published. No label is used,
    /// but a picture's cluster then depends on the others.
    RefreshedStatistics,
}

impl Evaluation {
    /// Both.
    pub const ALL: [Self; 2] = [Self::RunningStatistics, Self::RefreshedStatistics];

    /// As the table has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RunningStatistics => "running-statistics",
            Self::RefreshedStatistics => "refreshed-statistics",
        }
    }
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
        let counts = [
            ("prototypes", self.prototypes),
            ("large.count", self.large.count),
            ("kmeans-restarts", self.kmeans_restarts),
        ];
        check::at_least(job.name, 1, &counts)?;
        let positive = [("temperature", self.temperature), ("code-epsilon", self.code_epsilon)];
        check::above_zero(job.name, &positive)?;
        let weights = [
            ("entropy-weight", self.entropy_weight),
            ("logit-limit", self.logit_limit),
            ("logit-penalty", self.logit_penalty),
        ];
        check::not_negative(job.name, &weights)?;

        let OptimizerTable { learning_rate, beta_1, beta_2, epsilon, weight_decay } =
            self.optimizer;
        let optimizer = table("optimizer");
        check::above_zero(&optimizer, &[("learning-rate", learning_rate), ("epsilon", epsilon)])?;
        check::below_one(&optimizer, &[("beta-1", beta_1), ("beta-2", beta_2)])?;
        check::not_negative(&optimizer, &[("weight-decay", weight_decay)])?;
        let factor = self.schedule.learning_rate_factor;
        check::above_zero(&table("schedule"), &[("learning-rate-factor", factor)])?;
        let NetworkTable { backbone, projector, classifier } = self.network;
        let widths = [
            ("backbone.width", backbone.width),
            ("projector.hidden", projector.hidden),
            ("projector.width", projector.width),
            ("classifier.hidden", classifier.hidden),
        ];
        check::at_least(&table("network"), 1, &widths)?;
        ensure!(
            self.crops() > 1,
            "`large.count` and `small.count` in `[{}]` are 1 and 0; a crop needs another one to \
             predict",
            job.name
        );
        ensure!(
            self.evaluation == Evaluation::RunningStatistics || self.refresh_batches > 0,
            "`refresh-batches` in `[{}]` is 0; `evaluation = \"refreshed-statistics\"` needs at \
             least 1",
            job.name
        );
        self.input.check(&table("input"))?;
        for (name, crops) in [("large", &self.large), ("small", &self.small)] {
            self.crop_input(crops).check(&table(name))?;
            crops.pipeline().check(&table(name))?;
        }
        for split in &self.classify_on {
            ensure!(
                job.data.train_on.contains(split),
                "`classify-on` in `[{}]` names {split:?}, which `train-on` in `[data]` does not",
                job.name
            );
        }
        let (whole, of_crops) = self.costs()?;
        let Some(pictures) = check::pictures(job, &self.input)? else { return Ok(Effort::NONE) };
        let plan = self.plan(pictures.trained);
        self.run.check_groups(job.name, plan.batch_size)?;
        let classified = pictures.images.rows(&self.classify_on).len();
        ensure!(
            classified >= plan.batch_size,
            "the splits {:?} of `classify-on` have {classified} images, but the classifier learns \
             from {} at once; lower `batch-size` in `[{}]`",
            self.classify_on,
            plan.batch_size,
            table("run")
        );
        let refreshed = pictures.scored.min(self.refresh_batches * self.run.batch_size);
        // Both evaluations, and the pictures that refresh the second.
        let evaluated = (2 * pictures.scored + refreshed) as f64;
        let multiply_adds = plan.pictures() * of_crops + evaluated * whole.embedding;
        Ok(Effort::of_multiply_adds(multiply_adds, whole))
    }

    /// What a picture costs that is whole, and what all its crops cost together when the network
    /// learns from them.
    fn costs(&self) -> Result<(PictureCost, f64)> {
        let [encoder, projector] = crate::network::plans(self)?;
        let cost = |input: &Input| training::picture_cost([&encoder, &projector], None, &[], input);
        let mut of_crops = 0.;
        for crops in [&self.large, &self.small].into_iter().filter(|crops| crops.count > 0) {
            of_crops += crops.count as f64 * cost(&self.crop_input(crops))?.learning;
        }
        Ok((cost(&self.input)?, of_crops))
    }

    /// Crops V of each picture.
    pub fn crops(&self) -> usize {
        self.large.count + self.small.count
    }

    pub(crate) fn plan(&self, images: usize) -> RunPlan {
        let advice = Advice {
            divergence: "a lower `learning-rate`",
            collapse: "a lower `learning-rate` or a higher `code-epsilon`",
        };
        self.run.plan(images, sampler::steps(images, self.run.batch_size), advice)
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> LearningRate {
        let ScheduleTable { warmup_steps, learning_rate_drops, learning_rate_factor } =
            &self.schedule;
        LearningRate::with_drops(
            self.optimizer.learning_rate,
            *warmup_steps,
            learning_rate_drops,
            *learning_rate_factor,
            steps_per_epoch,
        )
    }

    pub(crate) fn adam(&self, learning_rate: f64) -> Adam {
        let OptimizerTable { beta_1, beta_2, epsilon, weight_decay, .. } = self.optimizer;
        Adam { learning_rate, beta_1, beta_2, epsilon, weight_decay }
    }

    fn crop_input(&self, crops: &Crops) -> Input {
        Input { height: crops.height, width: crops.width, ..self.input.clone() }
    }

    /// All crops of every image, the large ones first.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        let of = |crops: &Crops| vec![(crops.pipeline(), self.crop_input(crops)); crops.count];
        Views::of_sizes(images, [of(&self.large), of(&self.small)].concat(), seed)
    }

    /// The contents of `config.json`.
    pub(crate) fn configuration(&self) -> Result<serde_json::Value> {
        Ok(json!({
            "backbone": self.network.backbone,
            "projector": self.network.projector,
            "classifier": self.network.classifier,
            "prototypes": self.prototypes,
            "channels": self.input.channels,
            "input": serde_json::to_value(&self.input).context("the input of the network")?,
        }))
    }
}

impl Crops {
    fn pipeline(&self) -> Pipeline {
        Pipeline { operations: self.operations.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{config, job, with};

    #[test]
    fn what_cannot_work_is_refused_before_anything_runs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        config().check(&job)?;
        let alone = Crops { count: 1, ..config().large };
        let none = Crops { count: 0, ..config().small };
        let wrong = [
            (with(|c| c.run.batch_size = 1), "batch-size"),
            (with(|c| c.run.epochs = 0), "epochs"),
            (with(|c| c.optimizer.learning_rate = 0.), "learning-rate"),
            (with(|c| c.optimizer.beta_1 = 1.), "beta-1"),
            (Config { code_epsilon: 0., ..config() }, "code-epsilon"),
            (Config { entropy_weight: -1., ..config() }, "entropy-weight"),
            (Config { prototypes: 0, ..config() }, "prototypes"),
            (Config { refresh_batches: 0, ..config() }, "refresh-batches"),
            (Config { large: alone, small: none, ..config() }, "needs another one"),
            (Config { classify_on: vec![Split::Test], ..config() }, "classify-on"),
            (Config { classify_on: vec![], ..config() }, "classify-on"),
        ];
        fixture::assert_refused::<crate::ImcSwav>(&job, wrong);
        Ok(())
    }

    #[test]
    fn crops_cost_what_a_picture_of_their_size_costs() -> Result<()> {
        // Two of 6 × 7, the input's size, and two of 4 × 5.
        let (whole, of_crops) = config().costs()?;
        let mut small = config();
        (small.input.height, small.input.width) = (4, 5);
        let small = small.costs()?.0;
        assert!(small.learning < whole.learning && small.embedding > 0.);
        assert_eq!(of_crops, 2. * whole.learning + 2. * small.learning);
        Ok(())
    }
}
