//! The table `[icbpl]`.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use backbone::Architecture;
use data::Images;
use data::views::{Input, Pipeline};
use layers::{Adam, Mode};
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{Advice, Cosine, LearningRate, RunPlan, RunTable, Views, check, sampler};

use crate::Centroids;
use crate::loss::PairWeights;

/// What an ICBPL run can vary. The experiment sets every field. In parentheses: the value of the
/// released code, of its predecessor (ICBPC), or *ours* where nothing released settles it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Weight of the discrepancy between features and centroids (2, ICBPC).
    pub discrepancy_weight: f64,
    /// Weight of the distance between a picture and its augmented view (1, ours).
    pub view_weight: f64,
    /// Weight of the distance between a picture and its neighbour (1, ours).
    pub neighbour_weight: f64,
    /// Weight of the distance to the nearest centroid (1, ours).
    pub least_distance_weight: f64,
    /// Of a pair's distance, the weight of its cosine part (3, ICBPC).
    pub pair_cosine_weight: f64,
    /// And of the mean absolute difference (8, ICBPC).
    pub pair_absolute_weight: f64,
    /// Other pictures kept as nearest neighbours, of which one is drawn in each step (20).
    pub neighbours: usize,
    /// Whether the picture itself is one more candidate when a neighbour is drawn (true; false ours).
    pub neighbours_include_self: bool,
    /// Blocks that keep their values: `stem`, `layer1` to `layer4` (stem, layer1, layer2), or `all`,
    /// so that the head alone learns. A Vision Transformer needs `all`: fine-tuning its blocks is
    /// not built yet.
    pub frozen: Vec<String>,
    /// Batch-norm statistics that frozen blocks use (batch; running ours).
    pub frozen_statistics: BatchNormStatistics,
    /// How the centroids are found.
    pub centroids: Centroids,
    /// Starts of k-means on the pretrained backbone's embeddings, the baseline.
    pub kmeans_restarts: usize,
    /// The pretrained backbone.
    pub start: StartTable,
    /// Length (401 epochs released; 50 to 100 ours), batches (20 for STL-10, 512 for CIFAR; a
    /// multiple of the clusters ours, so that targets are balanced), checkpoints. Each image of a
    /// batch gives an anchor, an augmented view and a neighbour.
    pub run: RunTable,
    /// Adam.
    pub optimizer: OptimizerTable,
    /// Learning rates, and the delay of a term.
    pub schedule: ScheduleTable,
    /// The head.
    pub network: NetworkTable,
    /// Size and normalisation of the network's input, for neighbours and evaluation too. With a
    /// published network it must be that network's own, which its `config.json` states; size and operations may differ
    /// if the network learns.
    pub input: Input,
    /// From a picture to an anchor, and from its neighbour (the evaluation's operations in the
    /// released script).
    pub anchor: Pipeline,
    /// From a picture to its augmented view.
    pub augmented: Pipeline,
}

/// `[icbpl.optimizer]`: Adam, with a learning rate for each part.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct OptimizerTable {
    /// Learning rate of the backbone's blocks that are not frozen (1e-3; 1e-4 ours).
    pub backbone_learning_rate: f64,
    /// Learning rate of the head, both layers (1e-3; the released optimizer leaves the second out
    /// by mistake).
    pub head_learning_rate: f64,
    /// Decay of the mean of gradients (0.9).
    pub beta_1: f64,
    /// Decay of the mean of squared gradients (0.999).
    pub beta_2: f64,
    /// Added to the root (1e-8).
    pub epsilon: f64,
    /// Weight decay, added to the gradient (0; 1e-4 ours).
    pub weight_decay: f64,
}

/// `[icbpl.schedule]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ScheduleTable {
    /// How both learning rates change over the run (constant; cosine ours).
    pub learning_rate: Schedule,
    /// Epochs before the distance to the nearest centroid acts: it confirms itself, so that clusters
    /// must have settled (5, ours).
    pub least_distance_delay: usize,
}

/// `[icbpl.network]`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetworkTable {
    /// Embedding to feature.
    pub head: HeadWidths,
}

/// `[icbpl.start]`: the pretrained backbone that a run starts from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", tag = "kind")]
pub enum StartTable {
    /// A residual network in a file, under timm's or torchvision's names, such as Barlow Twins' or
    /// DINO's ResNet-50.
    File {
        /// A safetensors file; relative to the root of the workspace.
        file: PathBuf,
        /// Its SHA-256 in hex digits. Empty takes any file, and then a result's key does not tell
        /// which it was.
        sha256: String,
        /// Depth, width and stem of the network in the file.
        backbone: Architecture,
    },
    /// The `backbone.safetensors` of the role `backbone`, which another stage trained.
    Stage {
        /// Depth, width and stem of the network in the file.
        backbone: Architecture,
    },
    /// The published network in the role `backbone`, a residual network or a Vision Transformer,
    /// as the stage `pretrained` leaves it; its `config.json` describes it.
    Published {},
}

impl StartTable {
    fn architecture(&self) -> Option<&Architecture> {
        match self {
            Self::File { backbone, .. } | Self::Stage { backbone } => Some(backbone),
            Self::Published {} => None,
        }
    }
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
    /// The same in every step.
    Constant,
    /// Along half a cosine that ends at 0.
    Cosine,
}

/// Batch-norm statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchNormStatistics {
    /// Those of the batch, which move the running ones.
    Batch,
    /// The running ones, which stay.
    Running,
}

impl BatchNormStatistics {
    pub(crate) fn mode(self) -> Mode {
        match self {
            Self::Batch => Mode::Batch,
            Self::Running => Mode::Running,
        }
    }
}

impl Config {
    /// Checks values, device, pictures and the pretrained file before anything runs.
    ///
    /// # Errors
    ///
    /// A value is out of range, the device or the file does not exist, or the pictures do
    /// not fit.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        let table = |name: &str| format!("{}.{name}", job.name);
        self.run.check(job.name)?;
        ensure!(
            self.run.batch_size >= job.data.clusters,
            "`batch-size` in `[{}]` is {}; the discrepancy is estimated in a batch, which must hold \
             each of the {} centroids, and several times as many images are advised",
            table("run"),
            self.run.batch_size,
            job.data.clusters
        );
        let counts = [("neighbours", self.neighbours), ("kmeans-restarts", self.kmeans_restarts)];
        check::at_least(job.name, 1, &counts)?;
        let weights = [
            ("discrepancy-weight", self.discrepancy_weight),
            ("view-weight", self.view_weight),
            ("neighbour-weight", self.neighbour_weight),
            ("least-distance-weight", self.least_distance_weight),
            ("pair-cosine-weight", self.pair_cosine_weight),
            ("pair-absolute-weight", self.pair_absolute_weight),
        ];
        check::not_negative(job.name, &weights)?;
        ensure!(
            weights[..3].iter().any(|(_, weight)| *weight > 0.),
            "`discrepancy-weight`, `view-weight` and `neighbour-weight` in `[{}]` are all 0; nothing \
             would be learnt before `least-distance-delay`",
            job.name
        );
        for block in &self.frozen {
            ensure!(
                block == ALL_BLOCKS || BLOCKS.contains(&block.as_str()),
                "`frozen` in `[{}]` names `{block}`; the blocks of a backbone are {}, and `all`",
                job.name,
                BLOCKS.join(", ")
            );
        }

        let OptimizerTable { beta_1, beta_2, epsilon, weight_decay, .. } = self.optimizer;
        let positive = [
            ("backbone-learning-rate", self.optimizer.backbone_learning_rate),
            ("head-learning-rate", self.optimizer.head_learning_rate),
            ("epsilon", epsilon),
        ];
        let optimizer = table("optimizer");
        check::above_zero(&optimizer, &positive)?;
        check::below_one(&optimizer, &[("beta-1", beta_1), ("beta-2", beta_2)])?;
        check::not_negative(&optimizer, &[("weight-decay", weight_decay)])?;
        let head = self.network.head;
        let widths = [("head.hidden", head.hidden), ("head.width", head.width)];
        check::at_least(&table("network"), 1, &widths)?;
        if let Some(backbone) = self.start.architecture() {
            check::at_least(&table("start"), 1, &[("backbone.width", backbone.width)])?;
        }
        self.centroids.check(job.data.clusters, head.width)?;
        self.input.check(&table("input"))?;
        self.anchor.check(&table("anchor"))?;
        self.augmented.check(&table("augmented"))?;
        self.check_published(job)?;
        let Some(pictures) = check::pictures(job, &self.input)? else { return Ok(Effort::NONE) };
        self.run.check_groups(job.name, self.plan(pictures.trained).batch_size)?;
        // A run is about to begin.
        if let StartTable::File { file, .. } = &self.start {
            ensure!(
                file.is_file(),
                "the pretrained backbone `{}` does not exist; the experiment says what it is. Put \
                 it there, or name another of its shape with --set icbpl.start.file=FILE",
                file.display()
            );
        }
        ensure!(
            self.neighbours < pictures.trained,
            "`neighbours` in `[{}]` is {}, but there are {} images to train on",
            job.name,
            self.neighbours,
            pictures.trained
        );
        self.effort(pictures.trained, pictures.scored)
    }

    /// The network in the role `backbone`, where it exists already.
    fn check_published(&self, job: &Job) -> Result<()> {
        if let (StartTable::Published {}, Some(folder)) =
            (&self.start, job.optional_input("backbone"))
            && folder.join(backbone::CONFIGURATION).exists()
        {
            crate::network::described(self, folder)?;
        }
        Ok(())
    }

    fn effort(&self, trained: usize, scored: usize) -> Result<Effort> {
        let steps = self.plan(trained).pictures();
        // The search for neighbours; the baseline.
        let embedded = (trained + scored) as f64;
        let Some(backbone) = self.start.architecture() else {
            return Ok(Effort::of_pictures(embedded + 3. * steps + scored as f64, 0., 0.));
        };
        let plan = crate::network::residual_plan(self, backbone)?;
        let head = crate::network::head(self, backbone.embedding_width())?;
        let frozen: Vec<String> = self.frozen_blocks().into_iter().map(str::to_owned).collect();
        let cost = training::picture_cost([&plan, &head], None, &frozen, &self.input)?;
        // Anchor, view and neighbour, of which the loss uses those whose terms have a weight.
        let unused = [self.view_weight, self.neighbour_weight].iter().filter(|w| **w == 0.).count();
        let of_image = (3 - unused) as f64 * cost.learning + unused as f64 * cost.projection;
        let of_result = scored as f64 * cost.projection;
        let multiply_adds = steps * of_image + embedded * cost.embedding + of_result;
        Ok(Effort::of_multiply_adds(multiply_adds, cost))
    }

    /// The names of the blocks that keep their values, with `all` spelt out.
    pub(crate) fn frozen_blocks(&self) -> Vec<&str> {
        let mut blocks: Vec<&str> = self.frozen.iter().map(String::as_str).collect();
        if blocks.contains(&ALL_BLOCKS) {
            blocks = BLOCKS.to_vec();
        }
        blocks
    }

    pub(crate) fn plan(&self, images: usize) -> RunPlan {
        let advice = Advice {
            divergence: "a lower `backbone-learning-rate` or `head-learning-rate`",
            collapse: "a higher `discrepancy-weight` or a lower `backbone-learning-rate`",
        };
        self.run.plan(images, sampler::steps(images, self.run.batch_size), advice)
    }

    /// Learning rates of backbone and head. A run asks for step 0 first, so that its first step has the peak.
    pub(crate) fn learning_rates(&self, steps_per_epoch: usize) -> [LearningRate; 2] {
        let OptimizerTable { backbone_learning_rate, head_learning_rate, .. } = self.optimizer;
        [backbone_learning_rate, head_learning_rate].map(|rate| match self.schedule.learning_rate {
            Schedule::Constant => LearningRate::constant(rate),
            Schedule::Cosine => {
                LearningRate::cosine(rate, 0., self.run.epochs, steps_per_epoch, Cosine::ToZero)
            }
        })
    }

    pub(crate) fn adam(&self, learning_rate: f64) -> Adam {
        let OptimizerTable { beta_1, beta_2, epsilon, weight_decay, .. } = self.optimizer;
        Adam { learning_rate, beta_1, beta_2, epsilon, weight_decay }
    }

    /// The weights of the parts of a pair's distance.
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
}

/// The blocks of a residual backbone.
pub(crate) const BLOCKS: [&str; 5] = ["stem", "layer1", "layer2", "layer3", "layer4"];

/// Stands for all of them in `frozen`.
const ALL_BLOCKS: &str = "all";
