//! The table `[neighbour-refinement]`, and what follows from it.

use anyhow::Result;
use data::Images;
use data::views::Pipeline;
use serde::{Deserialize, Serialize};
use stage::{Effort, Job};
use training::{
    Advice, LearningRate, RunPlan, RunTable, ScheduleTable, SgdTable, TargetDecay, check, sampler,
};

/// What this refinement can vary. The experiment sets every field. The shape of the networks and the
/// size of their input are those of the networks that are refined.
///
/// With `cross-entropy-weight` and `neighbour-share` 0 it is BYOL, bit for bit, and there is no label
/// pass. With one of them 0 it is self-training alone, or neighbours alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Share β of the neighbours in what an image is drawn to: see [`mixture`](crate::loss::mixture).
    pub neighbour_share: f64,
    /// Most neighbours m that an image is drawn to.
    pub neighbours: usize,
    /// Nearest neighbours k₁ among which both of a pair must have the other.
    pub candidate_neighbours: usize,
    /// Weight λ of the [cross-entropy](crate::loss::balanced_cross_entropy) to the pseudo-labels.
    pub cross_entropy_weight: f64,
    /// Epochs of the first round over which it rises linearly from 0.
    pub cross_entropy_ramp_epochs: f64,
    /// Share ε of a label that is spread evenly over all clusters.
    pub label_smoothing: f64,
    /// Nearest neighbours whose memberships are averaged with an image's own: see
    /// [`smoothed`](crate::selection::smoothed).
    pub smoothing_neighbours: usize,
    /// Of the clustering networks, the share that must agree on an image whose pseudo-label is trained
    /// on: see [`reliable`](crate::selection::reliable).
    pub least_agreement: f64,
    /// Share θ of the images that are drawn to their neighbours at first, the most central ones: see
    /// [`central`](crate::selection::central). It rises linearly to 1.
    pub first_central_share: f64,
    /// Part of all epochs after which it is 1.
    pub central_ramp: f64,
    /// Epochs from one label pass to the next.
    pub refresh_epochs: usize,
    /// Of the reliable images, the share whose pseudo-labels are exchanged at random among each other.
    /// A check, not a method: 1 must not gain.
    pub permuted_share: f64,
    /// The clustering network learns faster than the backbone by this factor.
    pub head_learning_rate_factor: f64,
    /// Length of a round, batches, checkpoints.
    pub run: RunTable,
    /// Whether every round has a schedule of its own, with its own warm-up, and starts without momentum:
    /// for networks that were changed between rounds. With `false` one schedule spans all rounds.
    pub new_schedule_each_round: bool,
    /// SGD. The first round starts without momentum, the later ones continue that of the round
    /// before; the clustering network starts without it in every round.
    pub optimizer: SgdTable,
    /// Learning rate and target decay.
    pub schedule: ScheduleTable,
    /// The operations that make a view of a picture; each gives two.
    pub views: Pipeline,
}

impl Config {
    /// Checks values, device and pictures before anything runs.
    ///
    /// # Errors
    ///
    /// A value is out of range, or the device does not exist.
    pub(crate) fn check(&self, job: &Job) -> Result<Effort> {
        training::network_device(job.device)?;
        self.run.check(job.name)?;
        self.optimizer.check(job.name)?;
        self.schedule.check(job.name, self.scheduled_rounds(job.rounds) * self.run.epochs)?;
        self.views.check(&format!("{}.views", job.name))?;
        let counts = [
            ("neighbours", self.neighbours),
            ("candidate-neighbours", self.candidate_neighbours),
            ("refresh-epochs", self.refresh_epochs),
        ];
        check::at_least(job.name, 1, &counts)?;
        let of_candidates =
            [("neighbours", self.neighbours), ("smoothing-neighbours", self.smoothing_neighbours)];
        for (key, value) in of_candidates {
            check::within(job.name, key, value as f64, 0. ..=self.candidate_neighbours as f64)?;
        }
        let weights = [
            ("cross-entropy-weight", self.cross_entropy_weight),
            ("cross-entropy-ramp-epochs", self.cross_entropy_ramp_epochs),
            ("head-learning-rate-factor", self.head_learning_rate_factor),
        ];
        check::not_negative(job.name, &weights)?;
        check::above_zero(job.name, &[("first-central-share", self.first_central_share)])?;
        let shares = [
            ("neighbour-share", self.neighbour_share),
            ("label-smoothing", self.label_smoothing),
            ("least-agreement", self.least_agreement),
            ("first-central-share", self.first_central_share),
            ("central-ramp", self.central_ramp),
            ("permuted-share", self.permuted_share),
        ];
        for (key, value) in shares {
            check::within(job.name, key, value, 0. ..=1.)?;
        }
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let images = Images::open(&job.images)?.rows(&job.data.train_on).len();
        self.run.check_groups(job.name, self.run.batch_size.min(images))?;
        Ok(self.effort(images))
    }

    pub(crate) fn plan(&self, steps_per_epoch: usize) -> RunPlan {
        self.run.plan(self.run.batch_size, steps_per_epoch, Advice::BYOL)
    }

    /// Pictures through the networks in a round: of each of two views once through the online and once
    /// through the target network, and in every label pass each of the `images` once through the
    /// target. The clustering network, with less than a hundredth of the backbone's arithmetic, is not
    /// counted.
    fn effort(&self, images: usize) -> Effort {
        let passes =
            if self.has_label_pass() { self.run.epochs.div_ceil(self.refresh_epochs) } else { 0 };
        let steps = sampler::steps(images, self.run.batch_size);
        let batch_size = self.run.batch_size.min(images);
        let views = 2. * self.run.plan(batch_size, steps, Advice::BYOL).pictures();
        Effort::of_pictures(0., views + (passes * images) as f64, views)
    }

    /// Whether the target network passes over all pictures between epochs.
    pub(crate) fn has_label_pass(&self) -> bool {
        self.neighbour_share > 0. || self.cross_entropy_weight > 0.
    }

    /// Whether a clustering network takes part: it learns by the cross-entropy, and finds the borders
    /// of clusters.
    pub(crate) fn has_head(&self) -> bool {
        self.cross_entropy_weight > 0.
            || (self.neighbour_share > 0. && self.first_central_share < 1.)
    }

    /// The rounds that one schedule spans, out of these.
    pub(crate) fn scheduled_rounds(&self, rounds: usize) -> usize {
        if self.new_schedule_each_round { 1 } else { rounds.max(1) }
    }

    /// The steps of earlier rounds in the schedule of this round, which counts from 1.
    pub(crate) fn scheduled_before(&self, round: usize, steps_per_epoch: usize) -> usize {
        let rounds = if self.new_schedule_each_round { 0 } else { round - 1 };
        rounds * self.run.epochs * steps_per_epoch
    }

    /// - `rounds`: that it spans.
    pub(crate) fn learning_rate(&self, rounds: usize, steps_per_epoch: usize) -> LearningRate {
        let (epochs, batch_size) = (rounds * self.run.epochs, self.run.batch_size);
        self.schedule.learning_rate(&self.optimizer, batch_size, epochs, steps_per_epoch)
    }

    /// - `rounds`: that it spans.
    pub(crate) fn target_decay(&self, rounds: usize, steps_per_epoch: usize) -> TargetDecay {
        self.schedule.target_decay(rounds * self.run.epochs * steps_per_epoch)
    }

    /// The weight λ of the cross-entropy.
    ///
    /// - `epochs`: passed since the first round began, with fractions.
    pub(crate) fn weight(&self, epochs: f64) -> f64 {
        let ramp = match self.cross_entropy_ramp_epochs {
            0. => 1.,
            length => (epochs / length).min(1.),
        };
        self.cross_entropy_weight * ramp
    }

    /// The share θ of the images that are drawn to their neighbours.
    ///
    /// - `epoch`: counted over all rounds, from 0.
    /// - `epochs`: of all rounds.
    pub(crate) fn kept_share(&self, epoch: usize, epochs: usize) -> f64 {
        let length = self.central_ramp * epochs as f64;
        let ramp = if length > 0. { (epoch as f64 / length).min(1.) } else { 1. };
        self.first_central_share + (1. - self.first_central_share) * ramp
    }
}

#[cfg(test)]
mod tests {
    use stage::PictureCost;

    use super::*;
    use crate::NeighbourRefinement;

    fn config() -> Config {
        crate::tests::config()
    }

    #[test]
    fn every_experiment_of_the_project_has_a_usable_table() {
        fixture::assert_experiments_are_usable::<NeighbourRefinement>();
    }

    #[test]
    fn advice_names_keys_of_the_table() {
        let Advice { divergence, collapse } = config().plan(20).advice;
        fixture::assert_names_keys([divergence, collapse], &config());
    }

    #[test]
    fn a_value_out_of_range_is_refused() {
        let data = fixture::data(3, &[stage::Split::Train]);
        let job = Job::new("neighbour-refinement", "none", "none", data);
        let with = |change: fn(&mut Config)| {
            let mut config = config();
            change(&mut config);
            config
        };
        let wrong = [
            (with(|c| c.neighbour_share = 1.5), "neighbour-share"),
            (with(|c| c.neighbours = 0), "neighbours"),
            (with(|c| c.neighbours = 99), "neighbours"),
            (with(|c| c.candidate_neighbours = 0), "candidate-neighbours"),
            (with(|c| c.smoothing_neighbours = 99), "smoothing-neighbours"),
            (with(|c| c.cross_entropy_weight = -1.), "cross-entropy-weight"),
            (with(|c| c.cross_entropy_ramp_epochs = f64::NAN), "cross-entropy-ramp-epochs"),
            (with(|c| c.label_smoothing = 1.1), "label-smoothing"),
            (with(|c| c.least_agreement = 2.), "least-agreement"),
            (with(|c| c.first_central_share = 0.), "first-central-share"),
            (with(|c| c.first_central_share = 1.1), "first-central-share"),
            (with(|c| c.central_ramp = -0.1), "central-ramp"),
            (with(|c| c.refresh_epochs = 0), "refresh-epochs"),
            (with(|c| c.permuted_share = -0.1), "permuted-share"),
            (with(|c| c.head_learning_rate_factor = -1.), "head-learning-rate-factor"),
            (with(|c| c.run.epochs = 0), "epochs"),
            (with(|c| c.schedule.warmup_epochs = 99.), "warmup-epochs"),
        ];
        fixture::assert_refused::<NeighbourRefinement>(&job, wrong);
    }

    /// Refinement, case 7.
    #[test]
    fn shares_and_weights_rise_as_specified() {
        let mut config = config();
        (config.first_central_share, config.central_ramp) = (0.8, 0.25);
        for (epoch, want) in [(0, 0.8), (4, 0.9), (8, 1.), (16, 1.)] {
            let got = config.kept_share(epoch, 32);
            assert!((got - want).abs() < 1e-12, "epoch {epoch}: got {got}, want {want}");
        }
        config.central_ramp = 0.;
        assert_eq!(config.kept_share(0, 32), 1.);
        (config.cross_entropy_weight, config.cross_entropy_ramp_epochs) = (0.5, 4.);
        for (epochs, want) in [(0., 0.), (1., 0.125), (2., 0.25), (4., 0.5), (20., 0.5)] {
            assert!((config.weight(epochs) - want).abs() < 1e-12, "epoch {epochs}");
        }
        config.cross_entropy_ramp_epochs = 0.;
        assert_eq!(config.weight(0.), 0.5);
    }

    /// Refinement, case 16: forward 1, backward 2.
    #[test]
    fn the_label_pass_is_paid_for_by_an_eighth_more_epochs_of_the_control() {
        let cost = PictureCost { embedding: 1., projection: 1., learning: 3. };
        let of = |config: &Config| -> f64 {
            config.effort(640).multiply_adds(Some(cost)).expect("the cost is given") / 640.
        };
        let mut config = config();
        (config.run.batch_size, config.refresh_epochs) = (64, 1);
        let control = Config { neighbour_share: 0., cross_entropy_weight: 0., ..config.clone() };
        let with_epochs = |config: &Config, epochs: usize| {
            let mut config = config.clone();
            config.run.epochs = epochs;
            of(&config)
        };
        assert_eq!(with_epochs(&config, 32), 288.);
        for (refined, controlled) in [(32, 36), (16, 18), (8, 9)] {
            assert_eq!(with_epochs(&config, refined), with_epochs(&control, controlled));
        }
        config.refresh_epochs = 3;
        assert_eq!(with_epochs(&config, 16), 8. * 16. + 6.);
        let labels_alone = Config { neighbour_share: 0., refresh_epochs: 1, ..config };
        assert_eq!(with_epochs(&labels_alone, 16), 9. * 16.);
    }

    #[test]
    fn one_schedule_spans_all_rounds_or_each_has_its_own() {
        let mut config = config();
        config.run.epochs = 10;
        assert_eq!((config.scheduled_rounds(2), config.scheduled_before(2, 5)), (2, 50));
        config.new_schedule_each_round = true;
        assert_eq!((config.scheduled_rounds(2), config.scheduled_before(2, 5)), (1, 0));
        config.schedule.warmup_epochs = 10.;
        let data = fixture::data(3, &[stage::Split::Train]);
        let job = Job { rounds: 2, ..Job::new("neighbour-refinement", "none", "none", data) };
        assert!(config.check(&job).is_err(), "a round has no more epochs than its warm-up");
        config.new_schedule_each_round = false;
        assert!(config.check(&job).is_ok());
    }

    #[test]
    fn a_head_takes_part_where_it_learns_or_finds_borders() {
        let with = |neighbour_share: f64, cross_entropy_weight: f64, first_central_share: f64| {
            Config { neighbour_share, cross_entropy_weight, first_central_share, ..config() }
        };
        assert!(with(0.5, 0.5, 1.).has_head() && with(0., 0.5, 1.).has_head());
        assert!(with(0.5, 0., 0.8).has_head());
        assert!(!with(0.5, 0., 1.).has_head() && with(0.5, 0., 1.).has_label_pass());
        assert!(!with(0., 0., 0.8).has_head() && !with(0., 0., 0.8).has_label_pass());
    }
}
