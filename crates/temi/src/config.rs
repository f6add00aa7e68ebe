//! The table `[temi]`, and the [`HeadPlan`] that follows from it and the number of images and clusters.

use anyhow::{Result, ensure};
use frozen::rows::KMeansTable;
use serde::{Deserialize, Serialize};
use training::TargetDecay;
use training::check::{above_zero, at_least, below_one, not_negative, within};

use crate::loss::Objective;
use crate::network::HeadShape;
use crate::schedule::HeadSchedule;

/// The table `[temi]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Heads `H`, trained side by side.
    pub heads: usize,
    /// Clusters of a head for each cluster of `[data]`. Above 1, clusters that the heads confuse are merged
    /// afterwards.
    pub overclustering: f64,
    /// Widths of a head.
    pub network: HeadWidths,
    /// Widths of a head for fewer images than `images`.
    pub small_network: SmallWidths,
    /// Which images are pairs.
    pub neighbours: NeighbourRule,
    /// The objective.
    pub objective: Objective,
    /// The running marginal of each head.
    pub marginal: MarginalRule,
    /// Batches and steps.
    pub run: StepRule,
    /// AdamW.
    pub optimizer: AdamWTable,
    /// Learning rate and target over the steps.
    pub schedule: HeadScheduleTable,
    /// Which heads make the result, and how.
    pub consensus: ConsensusTable,
    /// Which assignments are reliable.
    pub reliable: ReliableRule,
    /// k-means on the same embeddings.
    pub k_means: KMeansTable,
}

/// `[temi.network]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HeadWidths {
    /// Width of the hidden layer.
    pub hidden: usize,
    /// Width of the layer that is scaled to unit length.
    pub bottleneck: usize,
    /// Deviation of the initial weights.
    pub initial_deviation: f64,
}

/// `[temi.small-network]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SmallWidths {
    /// For fewer images than this; 0 turns it off.
    pub images: usize,
    /// See [`HeadWidths`].
    pub hidden: usize,
    /// See [`HeadWidths`].
    pub bottleneck: usize,
}

/// `[temi.neighbours]`: `k = clamp(share · N/K, least, most)`. `k` must be well below the smallest
/// cluster, or pairs join clusters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NeighbourRule {
    /// Share of an even cluster.
    pub share: f64,
    /// Neighbours at least.
    pub least: usize,
    /// Neighbours at most.
    pub most: usize,
}

/// `[temi.marginal]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MarginalRule {
    /// Share of the marginal that a step keeps.
    pub decay: f64,
    /// The same if a batch has fewer than `pairs-per-cluster` pairs for each cluster, because the
    /// marginal of such a batch is noise.
    pub small_batch_decay: f64,
    /// See [`MarginalRule::small_batch_decay`].
    pub pairs_per_cluster: usize,
}

/// `[temi.run]`: `B = min(batch-size, batch-share · N)` pairs a step, `max(passes · N/B, least-steps)`
/// steps. Few images need steps, not passes: 300 steps on 1,500 images ended below k-means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StepRule {
    /// Pairs of one step at most.
    pub batch_size: usize,
    /// Share of the images that a step draws at most.
    pub batch_share: f64,
    /// Passes over the images at least.
    pub passes: f64,
    /// Steps at least.
    pub least_steps: usize,
    /// Steps between checkpoints, and between lines of the log.
    pub save_every: usize,
}

/// `[temi.optimizer]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AdamWTable {
    /// Learning rate after warm-up for 256 pairs; scales linearly with the batch.
    pub learning_rate: f64,
    /// Weight decay of everything but biases.
    pub weight_decay: f64,
}

/// `[temi.schedule]`. Shares are of the steps of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HeadScheduleTable {
    /// Share over which the learning rate rises from 0.
    pub warmup_share: f64,
    /// Share after which the learning rate falls along half a cosine.
    pub fall_from: f64,
    /// Share of the learning rate that is left at the end.
    pub last_rate: f64,
    /// Share at the start in which directions and their scales are frozen; one pass of 100 is published.
    pub still_share: f64,
    /// Decay of the target heads.
    pub target_decay: f64,
    /// The decay in a run of `long-run-steps` steps or more.
    pub long_target_decay: f64,
    /// See [`HeadScheduleTable::long_target_decay`].
    pub long_run_steps: usize,
    /// How far the decay rises towards 1 along half a cosine, as a share; 0 keeps it constant.
    pub target_decay_rise: f64,
}

/// `[temi.consensus]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsensusTable {
    /// Share of the heads that take part, lowest loss first; at least one does.
    pub share: f64,
    /// Alignments of the heads to their mean.
    pub rounds: usize,
    /// Share of the steps, at the end, over which the loss of a head is averaged.
    pub loss_share: f64,
    /// A warning is printed if the mean adjusted Rand index between pairs of heads is below this: the number
    /// of clusters or the backbone may not fit.
    pub warn_below: f64,
}

/// `[temi.reliable]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ReliableRule {
    /// Least share of the heads that agree with the consensus.
    pub heads: f64,
    /// Least share of the neighbours in the same cluster.
    pub neighbours: f64,
}

impl Config {
    /// Checks the values.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(&self) -> Result<()> {
        let Self { network, small_network, neighbours, objective, marginal, .. } = self;
        at_least("temi", 1, &[("heads", self.heads)])?;
        let widths = [("hidden", network.hidden), ("bottleneck", network.bottleneck)];
        at_least("temi.network", 1, &widths)?;
        above_zero("temi.network", &[("initial-deviation", network.initial_deviation)])?;
        let widths = [("hidden", small_network.hidden), ("bottleneck", small_network.bottleneck)];
        at_least("temi.small-network", 1, &widths)?;
        above_zero("temi.neighbours", &[("share", neighbours.share)])?;
        at_least("temi.neighbours", 1, &[("least", neighbours.least)])?;
        at_least("temi.neighbours", neighbours.least, &[("most", neighbours.most)])?;
        let floor = objective.marginal_floor;
        above_zero(
            "temi.objective",
            &[("temperature", objective.temperature), ("marginal-floor", floor)],
        )?;
        within("temi.objective", "beta", objective.beta, 0.5..=1.)?;
        within("temi.objective", "balance", objective.balance, 0. ..=1.)?;
        let decays = [("decay", marginal.decay), ("small-batch-decay", marginal.small_batch_decay)];
        below_one("temi.marginal", &decays)?;
        within("temi", "overclustering", self.overclustering, 1. ..=100.)?;
        self.check_run()
    }

    fn check_run(&self) -> Result<()> {
        let Self { run, optimizer, schedule, consensus, reliable, .. } = self;
        at_least(
            "temi.run",
            1,
            &[
                ("batch-size", run.batch_size),
                ("least-steps", run.least_steps),
                ("save-every", run.save_every),
            ],
        )?;
        within("temi.run", "batch-share", run.batch_share, f64::MIN_POSITIVE..=1.)?;
        not_negative("temi.run", &[("passes", run.passes)])?;
        above_zero("temi.optimizer", &[("learning-rate", optimizer.learning_rate)])?;
        not_negative("temi.optimizer", &[("weight-decay", optimizer.weight_decay)])?;
        let table = "temi.schedule";
        for (key, value) in [
            ("warmup-share", schedule.warmup_share),
            ("fall-from", schedule.fall_from),
            ("last-rate", schedule.last_rate),
            ("still-share", schedule.still_share),
            ("target-decay", schedule.target_decay),
            ("long-target-decay", schedule.long_target_decay),
            ("target-decay-rise", schedule.target_decay_rise),
        ] {
            within(table, key, value, 0. ..=1.)?;
        }
        ensure!(
            schedule.fall_from >= schedule.warmup_share,
            "`fall-from` in `[{table}]` is {}; it must be at least `warmup-share`, {}",
            schedule.fall_from,
            schedule.warmup_share
        );
        within("temi.consensus", "share", consensus.share, 0. ..=1.)?;
        within("temi.consensus", "loss-share", consensus.loss_share, f64::MIN_POSITIVE..=1.)?;
        within("temi.consensus", "warn-below", consensus.warn_below, -1. ..=1.)?;
        at_least("temi.consensus", 1, &[("rounds", consensus.rounds)])?;
        within("temi.reliable", "heads", reliable.heads, 0. ..=1.)?;
        within("temi.reliable", "neighbours", reliable.neighbours, 0. ..=1.)?;
        self.k_means.check("temi")
    }

    /// The numbers of a run on `images` embeddings of this width, for `clusters` clusters.
    pub fn plan(&self, images: usize, width: usize, clusters: usize) -> HeadPlan {
        let HeadWidths { hidden, bottleneck, .. } = match images < self.small_network.images {
            true => HeadWidths {
                hidden: self.small_network.hidden,
                bottleneck: self.small_network.bottleneck,
                ..self.network
            },
            false => self.network,
        };
        let trained = ((clusters as f64 * self.overclustering).round() as usize).min(images);
        let run = &self.run;
        let share = (run.batch_share * images as f64) as usize;
        let batch = run.batch_size.min(share).max(1).min(images);
        let passes = (run.passes * images as f64 / batch as f64).ceil() as usize;
        let steps = passes.max(run.least_steps);
        let even = images as f64 / trained as f64;
        let NeighbourRule { share, least, most } = self.neighbours;
        let neighbours = ((share * even) as usize).clamp(least, most).min(images - 1);
        let table = &self.schedule;
        let base = match steps < table.long_run_steps {
            true => table.target_decay,
            false => table.long_target_decay,
        };
        let of_steps = |share: f64| (share * steps as f64).round() as usize;
        let peak = self.optimizer.learning_rate * batch as f64 / 256.;
        let is_small = batch < self.marginal.pairs_per_cluster * trained;
        HeadPlan {
            shape: HeadShape { width, hidden, bottleneck, clusters: trained },
            batch,
            steps,
            neighbours,
            still_steps: of_steps(table.still_share),
            loss_steps: of_steps(self.consensus.loss_share).max(1),
            marginal_decay: match is_small {
                true => self.marginal.small_batch_decay,
                false => self.marginal.decay,
            },
            learning_rate: HeadSchedule {
                peak,
                last: peak * table.last_rate,
                warmup_steps: of_steps(table.warmup_share),
                fall_from: of_steps(table.fall_from),
                steps,
            },
            target_decay: TargetDecay::new(
                base,
                base + (1. - base) * table.target_decay_rise,
                steps,
            ),
        }
    }
}

/// The numbers of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadPlan {
    /// Extents of a head.
    pub shape: HeadShape,
    /// Pairs `B` of one step.
    pub batch: usize,
    /// Steps of the run.
    pub steps: usize,
    /// Neighbours of each image, from which its partner is drawn.
    pub neighbours: usize,
    /// First steps, in which directions are frozen.
    pub still_steps: usize,
    /// Last steps, over which the loss of a head is averaged.
    pub loss_steps: usize,
    /// Share of the marginal that a step keeps.
    pub marginal_decay: f64,
    /// The learning rate.
    pub learning_rate: HeadSchedule,
    /// The share of the target heads that a step keeps.
    pub target_decay: TargetDecay,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published() -> Config {
        fixture::published::<crate::Temi>()
    }

    #[test]
    fn rules_give_the_specified_numbers() -> Result<()> {
        let config = published();
        config.check()?;
        let plan = config.plan(10_000, 384, 10);
        assert_eq!((plan.batch, plan.steps, plan.neighbours), (256, 4000, 50));
        assert_eq!((plan.shape.hidden, plan.shape.bottleneck), (512, 256));
        assert_eq!((plan.still_steps, plan.loss_steps), (40, 400));
        assert_eq!((plan.marginal_decay, plan.target_decay.at(2000)), (0.9, 0.99));
        let small = config.plan(600, 384, 20);
        assert_eq!((small.batch, small.steps, small.neighbours), (150, 4000, 7));
        assert_eq!((small.shape.hidden, small.shape.bottleneck), (256, 128));
        assert_eq!(small.marginal_decay, 0.99, "150 pairs are few for 20 clusters");
        let large = config.plan(50_000, 384, 1000);
        assert_eq!((large.steps, large.neighbours), (19_532, 12));
        assert_eq!(large.target_decay.at(2000), 0.996);
        let twice = Config { overclustering: 2., ..config }.plan(10_000, 384, 10);
        assert_eq!((twice.shape.clusters, twice.neighbours), (20, 50));
        Ok(())
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_its_table_and_key() {
        let refused = |change: fn(&mut Config), place: &str| {
            let mut config = published();
            change(&mut config);
            let error = config.check().expect_err(place).to_string();
            assert!(error.starts_with(place), "{place} does not start: {error}");
        };
        refused(|c| c.heads = 0, "`heads` in `[temi]`");
        refused(|c| c.overclustering = 0.5, "`overclustering` in `[temi]`");
        refused(|c| c.network.hidden = 0, "`hidden` in `[temi.network]`");
        refused(|c| c.objective.beta = 0.4, "`beta` in `[temi.objective]`");
        refused(|c| c.objective.temperature = 0., "`temperature` in `[temi.objective]`");
        refused(|c| c.marginal.decay = 1., "`decay` in `[temi.marginal]`");
        refused(|c| c.neighbours.most = 2, "`most` in `[temi.neighbours]`");
        refused(|c| c.run.batch_share = 0., "`batch-share` in `[temi.run]`");
        refused(|c| c.run.save_every = 0, "`save-every` in `[temi.run]`");
        refused(|c| c.optimizer.learning_rate = f64::NAN, "`learning-rate` in `[temi.optimizer]`");
        refused(|c| c.schedule.fall_from = 0.05, "`fall-from` in `[temi.schedule]`");
        refused(|c| c.consensus.rounds = 0, "`rounds` in `[temi.consensus]`");
        refused(|c| c.reliable.heads = 1.1, "`heads` in `[temi.reliable]`");
        refused(|c| c.k_means.restarts = 0, "`restarts` in `[temi.k-means]`");
    }
}
