//! Stage: refines a network by neighbours, and by pseudo-labels that change while it learns.
//!
//! The online and target networks of BYOL (Grill et al. 2020, arXiv:2006.07733) continue to learn that
//! two views of one image are the same. Two things are added. *Neighbours*: an image is drawn to a
//! mixture of its other view and of images that are near it, if it is near them too. *Self-training*:
//! a clustering network on the embedding learns the pseudo-labels of reliable images, and its gradient
//! goes on through the backbone. The target network, a moving average, labels all images again before
//! every epoch, in a label pass over the un-augmented pictures; neighbours smooth the labels. There are
//! no prototypes, and no threshold decides when the labels act: a cluster has as many reliable images as
//! its confidence allows.
//!
//! This is our reading of what recent methods have in common, not a published method, and no gain over
//! its control is known. Neighbours in the target and the filter at the borders are in CoNR (Yu et
//! al. 2023, arXiv:2312.07806), the share by confidence in CDC (Jia et al. 2025, arXiv:2403.02998), the mean
//! over clusters in SCAN (Van Gansbeke et al. 2020, arXiv:2005.12320). Our choices: neighbours must be
//! mutual, the mixture is not scaled to unit length, labels are smoothed over neighbours and come from
//! the moving average, and an image that was not clustered is never reliable.
//!
//! - Reads `images.safetensors`, `network` (the last training stage), `pseudo-labels` (the last
//!   clustering, with its head), and from the second round on `previous` (this stage's last round:
//!   momenta).
//! - Writes `network.safetensors`, `backbone.safetensors`, `config.json`, `state.safetensors`, and
//!   `head.safetensors`: the moving average of the clustering network, or the head that was read if
//!   none learnt. The next clustering has it among its candidates.
//!
//! Start at the `run` of [`NeighbourRefinement`]; the losses are in [`loss`], the choice of labels and
//! neighbours in [`selection`], the values of an experiment in [`Config`].

mod bank;
mod config;
mod head;
pub mod loss;
pub mod selection;
#[cfg(test)]
mod tests;

use std::fs;

use anyhow::{Context, Result, ensure};
use backbone::{Configuration, Segment};
use candle_core::{DType, Device, Tensor};
use data::views::Input;
use data::{Images, Loader, PseudoLabels};
use layers::{BatchGroups, Sgd};
use stage::{Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};
use training::loss::regression_loss;
use training::ops::mean_length;
use training::{
    Checkpoint, Learner, Run, Seam, SgdTable, Trained, Views, outputs, pictures, sampler,
};

pub use config::Config;

use crate::bank::{FirstNeighbours, LabelBank, LabelPass};
use crate::head::OnlineHead;
use crate::loss::{balanced_cross_entropy, mixture, mixture_loss};

/// The stage: see the documentation of the crate.
pub struct NeighbourRefinement;

impl Stage for NeighbourRefinement {
    const SPEC: Spec = Spec {
        name: "neighbour-refinement",
        algorithm: 2,
        inputs: &[
            Role::new("network", Origin::Network),
            Role::new("pseudo-labels", Origin::PseudoLabels),
            Role::new("previous", Origin::PreviousRound),
        ],
        outputs: &[Output::Network, Output::RefinedHead],
        ranks: Ranks::BatchGroups,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        ensure!(
            job.round >= 1,
            "--round is 0; refinement follows a clustering, so its rounds count from 1"
        );
        let images = Images::of_job(job)?;
        let device = training::network_device(job.device)?;
        let groups = config.run.groups(job)?; // Shared by the ranks.
        let rows = images.rows(&job.data.train_on);
        let found = PseudoLabels::of_job(job, &images)?;
        let network = job.input("network")?;
        let configuration = Configuration::read(network)?;
        let input: Input = configuration.input()?;
        let model = RefinedModel::open(config, &configuration, &found, &rows, job)?;
        let mut model = model.in_groups(&groups)?;

        let seed = draws(job.seed);
        let steps_per_epoch = sampler::steps(rows.len(), config.run.batch_size);
        let (epochs, epochs_before) =
            (job.rounds * config.run.epochs, (job.round - 1) * config.run.epochs);
        // Where one schedule spans all rounds, this one begins where the last one ended.
        let scheduled_rounds = config.scheduled_rounds(job.rounds);
        let scheduled_before = config.scheduled_before(job.round, steps_per_epoch);
        let learning_rate = config.learning_rate(scheduled_rounds, steps_per_epoch);
        let target_decay = config.target_decay(scheduled_rounds, steps_per_epoch);
        let plan = config.plan(steps_per_epoch);
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut model)?;
        let views = Views::new(&images, [&config.views; 2], &input, seed).in_groups(&groups);

        while let Some(epoch) = run.next_epoch() {
            // Neighbours and pseudo-labels of all images, by the target network as it is now.
            if run.batches_done() == 0 && epoch % config.refresh_epochs == 0 {
                let place = [epochs_before + epoch, epochs];
                model.refresh(config, &images, &rows, &input, place, job, &mut run)?;
            }
            let epoch = epochs_before + epoch;
            let batches = sampler::uniform(&rows, config.run.batch_size, seed, epoch)?;
            for batch in views.epoch(epoch, batches, run.batches_done())? {
                let batch = batch?;
                let step = epochs_before * steps_per_epoch + run.step(); // Over all rounds, from 1.
                let weight = config.weight(step as f64 / steps_per_epoch as f64);
                let constants = model.constants(config, &batch.rows, weight, &device)?;
                let [view_1, view_2] = pictures(batch, &device)?;
                let RefinedModel { learner: Learner { online, target }, head, .. } = &mut model;

                // Batch statistics, no tape.
                let [target_1, target_2] = target.project([&view_1, &view_2])?;
                run.note_projections(&target_1)?; // An error when they have collapsed.
                let directions = [(&view_1, &target_2), (&view_2, &target_1)];
                online.expect_passes(directions.len())?; // Ranks sum gradients during the last one.
                if let (Some(head), Some(_)) = (head.as_mut(), &constants.labels) {
                    head.expect_passes(directions.len())?;
                }
                for (view, projection) in directions {
                    let seams = online.forward(view, None)?; // Variables of candle's.
                    let pass = match (head.as_mut(), &constants.labels) {
                        (Some(head), Some(_)) => Some(head.forward(&seams[0])?),
                        _ => None,
                    };
                    let logits = pass.as_ref().map(|pass| &*pass.logits);
                    let loss = objective(&seams, projection, logits, &constants, &mut run)?;
                    run.note_loss(&loss)?; // An error when it is not finite.
                    // Mean of both directions, not their sum.
                    let mut gradients = (loss * 0.5)?.backward()?;
                    if let (Some(head), Some(pass)) = (head.as_mut(), pass) {
                        head.backward(pass, &mut gradients, &seams[0])?;
                    }
                    online.backward(seams, &gradients)?; // Adds to the gradients.
                }
                run.check_gradients(&device, || model.first_gradient_not_finite())?;
                let step = scheduled_before + run.step();
                model.step(config, learning_rate.at(step), target_decay.at(step))?;
                run.end_step(&mut model)?; // Saves when the program is asked to stop.
            }
            run.end_epoch(&mut model)?; // Writes a log line, and a checkpoint when due.
        }
        if job.communicator.is_first() {
            match &model.head {
                Some(head) => head.write(&job.out)?,
                None => copy_head(job)?,
            }
        }
        run.finish(&mut model, &configuration)
    }
}

/// Passes the head of the last clustering on, so that the next one has the same candidates in every
/// arm of an experiment.
fn copy_head(job: &Job) -> Result<()> {
    let path = job.input("pseudo-labels")?.join(data::head::FILE);
    let bytes = fs::read(&path)
        .with_context(|| format!("reading the head `{}`; cluster again", path.display()))?;
    stage::files::write(&job.out.join(data::head::FILE), &bytes)
}

/// Everything that a checkpoint holds.
struct RefinedModel {
    learner: Learner,
    /// None if neither a loss nor the choice of neighbours needs it.
    head: Option<OnlineHead>,
    /// None without a label pass.
    bank: Option<LabelBank>,
    device: Device,
}

/// What the losses of a batch take beside the networks' outputs.
struct BatchConstants {
    /// Weight λ.
    weight: f64,
    /// ε.
    label_smoothing: f64,
    /// Of the reliable images; `None` if there is none, or no cross-entropy.
    labels: Option<Vec<Option<u32>>>,
    /// Means of the neighbours, and their share in what an image is drawn to.
    pulls: Option<(Tensor, Tensor)>,
}

impl RefinedModel {
    fn open(
        config: &Config,
        configuration: &Configuration,
        found: &PseudoLabels,
        rows: &[u32],
        job: &Job,
    ) -> Result<Self> {
        let (optimizer, precision) = (config.optimizer, config.run.precision);
        let device = training::network_device(job.device)?;
        let mut learner =
            Learner::open(job.input("network")?, configuration, optimizer, precision)?;
        let mut first = FirstNeighbours::default();
        if job.round > 1 {
            let previous = job.input("previous")?;
            if !config.new_schedule_each_round {
                learner.load_momenta(previous)?;
            }
            if config.has_label_pass() {
                training::load_state(previous, &mut first)?;
            }
        }
        let width = configuration.backbone_plan()?.output_width();
        let open =
            || OnlineHead::open(job.input("pseudo-labels")?, width, job.data.clusters, &device);
        let head = config.has_head().then(open).transpose()?;
        let images = found.data_set.images;
        let width = configuration.projector_plan()?.output_width();
        let bank =
            config.has_label_pass().then(|| LabelBank::new(found, rows, width, images, first));
        Ok(Self { learner: learner.on(&device)?, head, bank, device })
    }

    /// The same networks, which divide batches into these groups.
    fn in_groups(self, groups: &BatchGroups) -> candle_core::Result<Self> {
        let Self { learner, head, bank, device } = self;
        let head = head.map(|head| head.in_groups(groups)).transpose()?;
        Ok(Self { learner: learner.in_groups(groups)?, head, bank, device })
    }

    /// The label pass: projections and memberships of all un-augmented images by the target network, on
    /// running statistics.
    #[expect(clippy::too_many_arguments, reason = "pictures, and the place in the run")]
    fn refresh(
        &mut self,
        config: &Config,
        images: &Images,
        rows: &[u32],
        input: &Input,
        place: [usize; 2],
        job: &Job,
        run: &mut Run,
    ) -> Result<()> {
        let Self { learner, head, bank: Some(bank), device } = self else { return Ok(()) };
        let loader = Loader::clean(images, rows, input)?;
        let ranks = &job.communicator;
        let [projections, memberships] = outputs(loader, device, ranks, |pictures| {
            let (embedding, projection) = learner.target.embed(pictures)?;
            let memberships = match head {
                Some(head) => head.memberships(&embedding)?,
                None => Tensor::zeros(0, DType::F32, device)?,
            };
            Ok([projection, memberships])
        })?;
        bank.refresh(config, LabelPass { projections, memberships }, place, job, run)
    }

    fn constants(
        &self,
        config: &Config,
        rows: &[u32],
        weight: f64,
        device: &Device,
    ) -> Result<BatchConstants> {
        let share = config.neighbour_share;
        let pulls = self.bank.as_ref().filter(|_| share > 0.);
        let labels = self.bank.as_ref().filter(|_| weight > 0.);
        Ok(BatchConstants {
            weight,
            label_smoothing: config.label_smoothing,
            labels: labels
                .map(|bank| bank.reliable_labels(rows))
                .filter(|labels| labels.iter().any(Option::is_some)),
            pulls: pulls.map(|bank| bank.pulls(rows, share, device)).transpose()?,
        })
    }

    fn first_gradient_not_finite(&mut self) -> candle_core::Result<Option<String>> {
        match (self.learner.online.first_gradient_not_finite()?, &mut self.head) {
            (None, Some(head)) => head.first_gradient_not_finite(),
            (found, _) => Ok(found),
        }
    }

    /// A step of everything that learns. Without a cross-entropy the clustering network stays as it is.
    fn step(&mut self, config: &Config, learning_rate: f64, decay: f64) -> Result<()> {
        let Learner { online, target } = &mut self.learner;
        online.step(learning_rate)?;
        target.follow(online, decay)?;
        if let Some(head) = self.head.as_mut().filter(|_| config.cross_entropy_weight > 0.) {
            let SgdTable { momentum, weight_decay, .. } = config.optimizer;
            let learning_rate = learning_rate * config.head_learning_rate_factor;
            head.step(Sgd { learning_rate, momentum, weight_decay })?;
            head.follow(decay)?;
        }
        Ok(())
    }
}

impl Trained for RefinedModel {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.learner.checkpoint(file)?;
        if let Some(head) = &mut self.head {
            head.checkpoint(file)?;
        }
        self.bank.as_mut().map_or(Ok(()), |bank| bank.checkpoint(file))
    }

    fn exported(&self) -> Option<&Segment> {
        self.learner.exported()
    }
}

/// The loss of one direction. Without neighbours it is BYOL's, and without reliable images there is no
/// cross-entropy in the graph, so that every bit is as in pretraining.
///
/// - `seams`: the online network's embedding, projection and prediction of one view.
/// - `target`: the target's projection of the other view, `(B, P)`.
/// - `logits`: the clustering network's for the embedding, `(B, K)`, where images are reliable.
fn objective(
    [_, projection, prediction]: &[Seam; 3],
    target: &Tensor,
    logits: Option<&Tensor>,
    constants: &BatchConstants,
    run: &mut Run,
) -> Result<Tensor> {
    let mut loss = match &constants.pulls {
        Some((neighbours, shares)) => {
            mixture_loss(prediction, &mixture(target, neighbours, shares)?)?
        }
        None => regression_loss(prediction, target)?,
    };
    run.note_scalar("regression-loss", &loss)?;
    run.note_scalar("projection-length", &mean_length(projection)?)?;
    if let (Some(logits), Some(labels)) = (logits, &constants.labels)
        && let Some(term) = balanced_cross_entropy(logits, labels, constants.label_smoothing)?
    {
        run.note_scalar("cross-entropy", &term)?;
        loss = (loss + (term * constants.weight)?)?;
    }
    Ok(loss)
}

/// The seed of the batches and views of a run's refinement. Epochs count from 0 here as in
/// pretraining; under the run's own seed they would bring its batches and views once more, and the
/// control's extra epochs nothing new.
pub fn draws(seed: u64) -> u64 {
    stage::random::derived(seed, "neighbour-refinement")
}
