//! The table `[imc-swav]`.

use anyhow::{Context, Result, ensure};
use backbone::Architecture;
use data::views::{Input, Operation, Pipeline};
use data::{Images, Loader};
use serde::{Deserialize, Serialize};
use serde_json::json;
use stage::{Effort, Job, Split};
use training::{Advice, LearningRate, Plan, Precision, Views, check, sampler};

/// What an IMC-SwAV run can vary. The experiment file sets every field; published values stand in
/// parentheses.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Passes over the images (500).
    pub epochs: usize,
    /// Images per step (256; 512 for a hundred clusters and more).
    pub batch_size: usize,
    /// Splits whose images the classifier learns from; those of `[data] train-on`, but for sets
    /// like STL-10, whose unlabelled part holds other classes.
    pub classify_on: Vec<Split>,
    /// Learning rate of Adam, for everything that learns (5e-4).
    pub learning_rate: f64,
    /// Decay of the mean of gradients (0.8).
    pub beta_1: f64,
    /// Decay of the mean of squared gradients (0.999).
    pub beta_2: f64,
    /// Added to the root (1e-8).
    pub epsilon: f64,
    /// Weight decay, added to the gradient (1e-5).
    pub weight_decay: f64,
    /// Steps over which the learning rate rises, and the prototypes stand still (500).
    pub warmup_steps: usize,
    /// Epochs from which the learning rate is lower by the factor (150, 300, 400).
    pub learning_rate_drops: Vec<usize>,
    /// The factor of each of them (0.4).
    pub learning_rate_factor: f64,
    /// Prototypes K' (1000).
    pub prototypes: usize,
    /// Temperature τ of predictions (0.1).
    pub temperature: f64,
    /// Entropy ε of the codes (0.05).
    pub code_epsilon: f64,
    /// Rounds of Sinkhorn's algorithm (3).
    pub code_rounds: usize,
    /// Weight β of the clusters' entropy against what they know of the prototypes (4).
    pub entropy_weight: f64,
    /// Size of a logit from which it is penalised (5).
    pub logit_limit: f64,
    /// Weight of that penalty (0.01).
    pub logit_penalty: f64,
    /// Which batch-norm statistics the result is predicted with; the other is written beside it.
    pub evaluation: Evaluation,
    /// Batches of scored pictures, at most, that refresh the statistics (50).
    pub refresh_batches: usize,
    /// Starts of k-means on the embeddings, which is reported beside the classifier.
    pub kmeans_restarts: usize,
    /// Number type of activations and products.
    pub precision: Precision,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length projections falls below this.
    pub collapse_deviation: f64,
    /// The residual network.
    pub backbone: Architecture,
    /// Behind it.
    pub projector: ProjectorWidths,
    /// Beside the projector.
    pub classifier: ClassifierWidths,
    /// What the network is evaluated on.
    pub input: Input,
    /// Crops whose codes the others predict (2).
    pub large: Crops,
    /// The other crops (4).
    pub small: Crops,
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
    /// Finds what is wrong before anything runs.
    ///
    /// # Errors
    ///
    /// A value lies outside its range, or the device is not there.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        self.plan(self.batch_size).check()?;
        check::batch_size(self.batch_size)?;
        self.learning_rate(1)?;
        check::above_zero(&[
            ("epsilon", self.epsilon),
            ("temperature", self.temperature),
            ("code-epsilon", self.code_epsilon),
        ])?;
        check::not_negative(&[
            ("weight-decay", self.weight_decay),
            ("entropy-weight", self.entropy_weight),
            ("logit-limit", self.logit_limit),
            ("logit-penalty", self.logit_penalty),
        ])?;
        check::below_one(&[("beta-1", self.beta_1), ("beta-2", self.beta_2)])?;
        check::counts(&[
            ("prototypes", self.prototypes),
            ("large.count", self.large.count),
            ("kmeans-restarts", self.kmeans_restarts),
            ("backbone.width", self.backbone.width),
            ("projector.hidden", self.projector.hidden),
            ("projector.width", self.projector.width),
            ("classifier.hidden", self.classifier.hidden),
        ])?;
        ensure!(self.crops() > 1, "large.count = 1 and small.count = 0: one crop has no pair");
        ensure!(
            self.evaluation == Evaluation::RunningStatistics || self.refresh_batches > 0,
            "refresh-batches = 0, but evaluation = \"refreshed-statistics\""
        );
        self.input.check("imc-swav.input")?;
        for (name, crops) in [("large", &self.large), ("small", &self.small)] {
            self.crop_input(crops).check(&format!("imc-swav.{name}"))?;
            crops.pipeline().check(&format!("imc-swav.{name}"))?;
        }
        for split in &self.classify_on {
            ensure!(
                job.data.train_on.contains(split),
                "classify-on names {split:?}, which `train-on` in table `[data]` does not"
            );
        }
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let images = Images::open(&job.images)?;
        Loader::check(&images, &self.input)?;
        let rows = images.rows(&job.data.train_on);
        sampler::uniform(&rows, self.batch_size, 0, 0)?;
        let plan = self.plan(rows.len());
        let classified = images.rows(&self.classify_on).len();
        ensure!(
            classified >= plan.batch_size,
            "the splits {:?} of classify-on have {classified} images, but the classifier \
             learns from {} at once; lower batch-size",
            self.classify_on,
            plan.batch_size
        );
        let scored = images.rows(&job.data.score_on).len();
        let refreshed = scored.min(self.refresh_batches * self.batch_size);
        let of_crops = self.pixels_of_crops() * plan.pictures();
        // Both evaluations, and the pictures that refresh the second.
        Ok(Effort::of_backbone_pictures(of_crops + (2 * scored + refreshed) as f64))
    }

    /// Pixels of all crops of a picture, in pictures of the input's size.
    pub fn pixels_of_crops(&self) -> f64 {
        let pixels = |crops: &Crops| (crops.count * crops.height * crops.width) as f64;
        let whole = (self.input.height * self.input.width) as f64;
        (pixels(&self.large) + pixels(&self.small)) / whole
    }

    /// Crops V of each picture.
    pub fn crops(&self) -> usize {
        self.large.count + self.small.count
    }

    pub(crate) fn plan(&self, images: usize) -> Plan {
        Plan {
            epochs: self.epochs,
            steps_per_epoch: sampler::steps(images, self.batch_size),
            batch_size: self.batch_size.min(images),
            save_every: self.save_every,
            collapse_deviation: self.collapse_deviation,
            advice: Advice {
                divergence: "a lower `learning-rate`",
                collapse: "a lower `learning-rate` or a higher `code-epsilon`",
            },
        }
    }

    pub(crate) fn learning_rate(&self, steps_per_epoch: usize) -> Result<LearningRate> {
        LearningRate::with_drops(
            self.learning_rate,
            self.warmup_steps,
            &self.learning_rate_drops,
            self.learning_rate_factor,
            steps_per_epoch,
        )
    }

    pub(crate) fn adam(&self, learning_rate: f64) -> layers::Adam {
        let Self { beta_1, beta_2, epsilon, weight_decay, .. } = *self;
        layers::Adam { learning_rate, beta_1, beta_2, epsilon, weight_decay }
    }

    fn crop_input(&self, crops: &Crops) -> Input {
        Input { height: crops.height, width: crops.width, ..self.input.clone() }
    }

    /// All crops of every image, the large ones first.
    pub(crate) fn views<'a>(&self, images: &'a Images, seed: u64) -> Views<'a> {
        let of = |crops: &Crops| vec![(crops.pipeline(), self.crop_input(crops)); crops.count];
        Views::of_sizes(images, [of(&self.large), of(&self.small)].concat(), seed)
    }

    /// What `config.json` will say.
    pub(crate) fn configuration(&self) -> Result<serde_json::Value> {
        Ok(json!({
            "backbone": self.backbone,
            "projector": self.projector,
            "classifier": self.classifier,
            "prototypes": self.prototypes,
            "channels": self.input.channels,
            "input": serde_json::to_value(&self.input).context("`input` of the experiment")?,
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
    use crate::tests::{config, job};

    #[test]
    fn what_cannot_work_is_refused_before_anything_runs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        config().check(&job)?;
        let alone = Crops { count: 1, ..config().large };
        let none = Crops { count: 0, ..config().small };
        for (wrong, word) in [
            (Config { batch_size: 1, ..config() }, "batch-size"),
            (Config { epochs: 0, ..config() }, "epochs"),
            (Config { learning_rate: 0., ..config() }, "learning-rate"),
            (Config { beta_1: 1., ..config() }, "beta-1"),
            (Config { code_epsilon: 0., ..config() }, "code-epsilon"),
            (Config { entropy_weight: -1., ..config() }, "entropy-weight"),
            (Config { prototypes: 0, ..config() }, "prototypes"),
            (Config { refresh_batches: 0, ..config() }, "refresh-batches"),
            (Config { large: alone, small: none, ..config() }, "no pair"),
            (Config { classify_on: vec![Split::Test], ..config() }, "classify-on"),
            (Config { classify_on: vec![], ..config() }, "classify-on"),
        ] {
            let message = format!("{:#}", wrong.check(&job).expect_err(word));
            assert!(message.contains(word), "{word} is not in: {message}");
        }
        Ok(())
    }

    #[test]
    fn crops_are_counted_by_their_pixels() {
        // Two of 6 × 7 and two of 4 × 5, against 6 × 7.
        assert!((config().pixels_of_crops() - (2. + 2. * 20. / 42.)).abs() < 1e-12);
    }
}
