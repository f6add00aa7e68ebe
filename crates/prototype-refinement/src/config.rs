//! The table `[prototype-refinement]`, and what follows from it.

use anyhow::{Context, Result, ensure};
use assignment::shares;
use data::Images;
use data::views::Pipeline;
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{
    Advice, LearningRate, RunPlan, RunTable, ScheduleTable, SgdTable, TargetDecay, check, sampler,
};

/// What a refinement can vary. The experiment sets every field. The shape of the networks and the
/// size of their input are those of the network that is refined.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Deviation σ of the noise on the projection before the predictor.
    pub noise: f64,
    /// Weight of [`sample_to_prototype_loss`](crate::loss::sample_to_prototype_loss), once the gate
    /// is open.
    pub sample_to_prototype_weight: f64,
    /// Its weight is 0 until the stability between two rounds of clustering is above this: wrong
    /// pseudo-labels are confident ones, and the loss would pull their images to wrong prototypes.
    /// The first round has no stability; below 0 the gate is open from there on.
    pub sample_to_prototype_gate: f64,
    /// Weight of [`scatter_loss`](training::scatter::scatter_loss).
    pub scatter_weight: f64,
    /// Temperature τ of the first of the two.
    pub sample_to_prototype_temperature: f64,
    /// Temperature τ of the second.
    pub scatter_temperature: f64,
    /// Epochs of the first round over which both weights rise linearly from 0.
    pub ramp_epochs: f64,
    /// When the prototypes move.
    pub prototypes: PrototypeUpdate,
    /// Order of the images.
    pub sampling: Sampling,
    /// Length of a round, batches, checkpoints.
    pub run: RunTable,
    /// SGD. The first round starts without momentum, the later ones continue that of the round
    /// before.
    pub optimizer: SgdTable,
    /// Learning rate and target decay, over all rounds: warm-up is in the first one.
    pub schedule: ScheduleTable,
    /// The operations that make a view of a picture; each gives two.
    pub views: Pipeline,
}

/// When the prototypes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrototypeUpdate {
    /// Before every epoch: computed from all reliable images by the target network of that moment.
    Epoch,
    /// Before the first epoch of a round as above, and after every step `c ← n(.9 c + .1 μ')` with
    /// the step's means `μ'`.
    MovingAverage,
}

/// Order of the images of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// Every image once.
    Uniform,
    /// Drawn with replacement so that every cluster has the same share; uniform for a round whose
    /// smallest cluster holds less than .3 of its even share, for drawing from a cluster that is
    /// wrong multiplies its errors.
    Balanced,
}

/// Of its even share `N/K`, what the smallest cluster must hold for balanced sampling.
const LEAST_SHARE_FOR_BALANCE: f64 = 0.3;

impl Config {
    /// Checks values, device and pictures before anything runs.
    ///
    /// # Errors
    ///
    /// A value is out of range, or the device does not exist.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        self.run.check(job.name)?;
        self.optimizer.check(job.name)?;
        self.schedule.check(job.name, job.rounds.max(1) * self.run.epochs)?;
        self.views.check(&format!("{}.views", job.name))?;
        let weights = [
            ("noise", self.noise),
            ("sample-to-prototype-weight", self.sample_to_prototype_weight),
            ("scatter-weight", self.scatter_weight),
            ("ramp-epochs", self.ramp_epochs),
        ];
        check::not_negative(job.name, &weights)?;
        let temperatures = [
            ("sample-to-prototype-temperature", self.sample_to_prototype_temperature),
            ("scatter-temperature", self.scatter_temperature),
        ];
        check::above_zero(job.name, &temperatures)?;
        ensure!(
            self.sample_to_prototype_gate <= 1.,
            "`sample-to-prototype-gate` in `[{}]` is {}; a stability is at most 1: set \
             `sample-to-prototype-weight` to 0.0 to leave the loss out",
            job.name,
            self.sample_to_prototype_gate
        );
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let images = Images::open(&job.images)?;
        let count = |splits| images.rows(splits).len();
        let steps = sampler::steps(count(&job.data.train_on), self.run.batch_size);
        let scored = count(&job.data.score_on);
        let images = count(&job.data.train_on);
        self.run.check_groups(job.name, self.run.batch_size.min(images))?;
        Ok(self.effort(steps, scored, job.round))
    }

    pub(crate) fn plan(&self, steps_per_epoch: usize) -> RunPlan {
        self.run.plan(self.run.batch_size, steps_per_epoch, Advice::BYOL)
    }

    /// Pictures through the networks in a round: of each of two views once through the online and once
    /// through the target network, and for the prototypes, where images may be drawn to them, each reliable
    /// image once by the target.
    ///
    /// An upper bound: before the clusterings are there, neither the round in which the gate opens
    /// nor the reliable among the `scored` images are known. In the first round, which has no
    /// stability, and wherever the gate cannot open it is exact.
    pub(crate) fn effort(&self, steps_per_epoch: usize, scored: usize, round: usize) -> Effort {
        let highest_stability = (round > 1).then_some(1.);
        let passes = match self.prototypes {
            _ if !self.pulls(highest_stability) => 0,
            PrototypeUpdate::Epoch => self.run.epochs,
            PrototypeUpdate::MovingAverage => 1,
        };
        let views = 2. * self.plan(steps_per_epoch).pictures();
        Effort::of_pictures(0., views + (passes * scored) as f64, views)
    }

    /// Over all rounds; its steps count from the first step of the first round.
    pub(crate) fn learning_rate(&self, rounds: usize, steps_per_epoch: usize) -> LearningRate {
        let (epochs, batch_size) = (rounds * self.run.epochs, self.run.batch_size);
        self.schedule.learning_rate(&self.optimizer, batch_size, epochs, steps_per_epoch)
    }

    /// Over all rounds, as [`Config::learning_rate`].
    pub(crate) fn target_decay(&self, rounds: usize, steps_per_epoch: usize) -> TargetDecay {
        self.schedule.target_decay(rounds * self.run.epochs * steps_per_epoch)
    }

    /// Weights of the two losses of this stage at a step, `(sample to prototype, scatter)`.
    ///
    /// - `epochs`: passed since the first round began, with fractions.
    /// - `stability`: of the pseudo-labels, where a round before gives one.
    pub(crate) fn weights(&self, epochs: f64, stability: Option<f64>) -> (f64, f64) {
        let ramp = match self.ramp_epochs {
            0. => 1.,
            length => (epochs / length).min(1.),
        };
        let pull = if self.pulls(stability) { self.sample_to_prototype_weight } else { 0. };
        (pull * ramp, self.scatter_weight * ramp)
    }

    /// Whether images are drawn to prototypes in a round whose pseudo-labels have this stability.
    pub(crate) fn pulls(&self, stability: Option<f64>) -> bool {
        self.sample_to_prototype_weight > 0.
            && stability.unwrap_or(0.) > self.sample_to_prototype_gate
    }

    /// The batches of an epoch.
    ///
    /// - `rows`: the images, as rows of the images file.
    /// - `pseudo_labels`: of each of them; `None` where an image has none.
    /// - `epoch`: counted over all rounds, from 0.
    ///
    /// # Errors
    ///
    /// There are too few images, or some without a pseudo-label for balanced sampling.
    pub(crate) fn order(
        &self,
        rows: &[u32],
        pseudo_labels: &[Option<u32>],
        clusters: usize,
        seed: u64,
        epoch: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let uniform = || sampler::uniform(rows, self.run.batch_size, seed, epoch);
        if self.sampling == Sampling::Uniform {
            return uniform();
        }
        let labels: Vec<u32> = pseudo_labels.iter().copied().collect::<Option<_>>().context(
            "some images of `train-on` have no pseudo-label, because they are not in `score-on`; \
             set prototype-refinement.sampling = \"uniform\"",
        )?;
        if shares(&labels, clusters)?.smallest < LEAST_SHARE_FOR_BALANCE {
            return uniform();
        }
        sampler::balanced(rows, &labels, clusters, self.run.batch_size, seed, epoch)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The published-size table of the specification.
    pub(crate) fn published() -> Config {
        let text = r#"
            noise = 0.001
            sample-to-prototype-weight = 0.1
            sample-to-prototype-gate = 0.99
            scatter-weight = 0.1
            sample-to-prototype-temperature = 0.2
            scatter-temperature = 0.5
            ramp-epochs = 5.0
            prototypes = "epoch"
            sampling = "balanced"
            views = { operations = [{ operation = "flip", probability = 0.5 }] }
            [run]
            epochs = 40
            batch-size = 256
            batch-groups = 1
            precision = "f32"
            save-every = 10
            collapse-deviation = 1e-4
            [optimizer]
            peak-learning-rate = 0.02
            predictor-learning-rate-factor = 10.0
            momentum = 0.9
            weight-decay = 5e-4
            [schedule]
            warmup-epochs = 5.0
            cosine = "to-zero"
            target-decay = 0.996
            last-target-decay = 1.0
        "#;
        toml::from_str(text).expect("a table")
    }

    #[test]
    fn effort_counts_prototypes_in_rounds_whose_gate_may_open() {
        let mut config = published();
        (config.run.epochs, config.run.batch_size) = (5, 8);
        let views = 2. * 5. * 3. * 8.; // Five epochs of three batches.
        let effort = |prototypes: f64| Effort::of_pictures(0., views + prototypes, views);
        assert_eq!(config.effort(3, 20, 1), effort(0.), "no stability, no prototypes");
        assert_eq!(config.effort(3, 20, 2), effort(5. * 20.));
        let moving = Config { prototypes: PrototypeUpdate::MovingAverage, ..config.clone() };
        assert_eq!(moving.effort(3, 20, 2), effort(20.));
        let open = Config { sample_to_prototype_gate: -1., ..config.clone() };
        assert_eq!(open.effort(3, 20, 1), effort(5. * 20.));
        for (what, never) in [
            ("gate", Config { sample_to_prototype_gate: 1., ..config.clone() }),
            ("weight", Config { sample_to_prototype_weight: 0., ..config.clone() }),
        ] {
            assert_eq!(never.effort(3, 20, 2), effort(0.), "{what}");
        }
    }

    #[test]
    fn every_experiment_of_the_project_has_a_usable_table() {
        fixture::assert_experiments_are_usable::<crate::PrototypeRefinement>();
    }

    #[test]
    fn advice_names_keys_of_the_table() {
        let training::Advice { divergence, collapse } = published().plan(20).advice;
        fixture::assert_names_keys([divergence, collapse], &published());
    }

    #[test]
    fn one_schedule_spans_all_rounds() {
        let rate = published().learning_rate(5, 100);
        for (epoch, want) in [(2.5, 0.01), (5., 0.02), (102.5, 0.01), (200., 0.)] {
            let got = rate.at((epoch * 100.) as usize);
            assert!((got - want).abs() < 1e-9, "epoch {epoch}: got {got}, want {want}");
        }
        let decay = published().target_decay(5, 100);
        assert!((decay.at(0) - 0.996).abs() < 1e-12 && (decay.at(20_000) - 1.).abs() < 1e-12);
    }

    #[test]
    fn weights_rise_in_the_first_epochs_and_the_gate_holds_one_back() {
        let config = published();
        let assert_weights = |epochs, stability, want: (f64, f64)| {
            let got = config.weights(epochs, stability);
            let close = (got.0 - want.0).abs() < 1e-12 && (got.1 - want.1).abs() < 1e-12;
            assert!(close, "{epochs} {stability:?}: got {got:?}, want {want:?}");
        };
        assert_weights(0., None, (0., 0.));
        assert_weights(2.5, None, (0., 0.05));
        assert_weights(60., None, (0., 0.1));
        assert_weights(60., Some(0.99), (0., 0.1));
        assert_weights(60., Some(0.991), (0.1, 0.1));
        let open = Config { sample_to_prototype_gate: -1., ..published() };
        assert_eq!(open.weights(60., None), (0.1, 0.1));
        let at_once = Config { ramp_epochs: 0., ..published() };
        assert_eq!(at_once.weights(0., None), (0., 0.1));
    }

    #[test]
    fn balanced_sampling_waits_for_clusters_of_some_size() -> Result<()> {
        let labels = |small: usize| -> Vec<Option<u32>> {
            (0..100).map(|i| Some(u32::from(i < small))).collect()
        };
        let rows: Vec<u32> = (0..100).collect();
        let mut config = published();
        config.run.batch_size = 50;
        // .3 of the even share of 50 is 15.
        let uniform = sampler::uniform(&rows, 50, 1, 3)?;
        assert_eq!(config.order(&rows, &labels(14), 2, 1, 3)?, uniform);
        assert_eq!(config.order(&rows, &labels(0), 2, 1, 3)?, uniform);
        let balanced = config.order(&rows, &labels(15), 2, 1, 3)?;
        assert_ne!(balanced, uniform);
        let small = balanced.concat().iter().filter(|&&row| row < 15).count();
        assert!((30..70).contains(&small), "half of 100 draws, not {small}");

        let mut one_missing = labels(15);
        one_missing[7] = None;
        let error = config.order(&rows, &one_missing, 2, 1, 3).expect_err("a missing label");
        assert!(error.to_string().contains("score-on"), "{error}");
        let uniform_config = Config { sampling: Sampling::Uniform, ..config };
        assert_eq!(uniform_config.order(&rows, &one_missing, 2, 1, 3)?, uniform);
        Ok(())
    }
}
