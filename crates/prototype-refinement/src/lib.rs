//! Stage: refines a network with the clusters that were found with it.
//!
//! The online and target networks of BYOL (Grill et al. 2020, arXiv:2006.07733) continue to learn
//! that two views of one image are the same. Two losses are added for the images whose pseudo-labels
//! are reliable: one pulls each image to the prototype of its cluster and away from the others, one
//! pushes the clusters' means apart and keeps each alike between views. No pair of images is ever
//! pushed apart, so that no two images of one cluster can be.
//!
//! This is the third stage of PLDC, prototype-based representation learning. The paper's abstract
//! gives its idea; losses, weights and schedules are our interpretation. The first loss waits for
//! stable pseudo-labels, because it did harm before on the digits.
//!
//! - Reads `images.safetensors`, `network` (the last training stage), `pseudo-labels` (the last
//!   clustering), and from the second round on `previous` (this stage's last round: momenta).
//! - Writes `network.safetensors`, `backbone.safetensors`, `config.json`, `state.safetensors`.
//!
//! Start at the `run` of [`PrototypeRefinement`]; the losses are in [`loss`], the values of an
//! experiment in [`Config`].

mod config;
pub mod loss;
mod marked;
mod prototypes;

use anyhow::{Result, ensure};
use backbone::{Configuration, Segment};
use candle_core::Tensor;
use data::{Images, PseudoLabels};
use serde_json::json;
use stage::{Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};
use training::loss::regression_loss;
use training::ops::mean_length;
use training::scatter::{Absent, scatter_loss};
use training::{Checkpoint, Learner, Run, Seam, Trained, Views, pictures, sampler};

pub use config::{Config, PrototypeUpdate, Sampling};

use crate::loss::{Marks, sample_to_prototype_loss};
use crate::marked::Marked;
use crate::prototypes::Prototypes;

/// The stage: see the documentation of the crate.
pub struct PrototypeRefinement;

impl Stage for PrototypeRefinement {
    const SPEC: Spec = Spec {
        name: "prototype-refinement",
        algorithm: 6,
        inputs: &[
            Role::new("network", Origin::Network),
            Role::new("pseudo-labels", Origin::PseudoLabels),
            Role::new("previous", Origin::PreviousRound),
        ],
        outputs: &[Output::Network],
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
        let labels = PseudoLabels::of_job(job, &images)?;
        let marked = Marked::new(&labels, images.len());

        let network = job.input("network")?;
        let configuration = Configuration::read(network)?;
        let input: data::views::Input = configuration.input()?;
        let mut learner =
            Learner::open(network, &configuration, config.optimizer, config.run.precision)?;
        if job.round > 1 {
            learner.load_momenta(job.input("previous")?)?;
        }
        let prototypes = Prototypes::of(&labels, &device)?;
        let learner = learner.on(&device)?.in_groups(&groups)?;
        let mut model = RefinementModel { learner, prototypes };
        let pulls = config.pulls(labels.stability);

        let seed = draws(job.seed);
        // One schedule spans all rounds: this one begins where the last one ended.
        let steps_per_epoch = sampler::steps(rows.len(), config.run.batch_size);
        let epochs_before = (job.round - 1) * config.run.epochs;
        let learning_rate = config.learning_rate(job.rounds, steps_per_epoch);
        let target_decay = config.target_decay(job.rounds, steps_per_epoch);
        let plan = config.plan(steps_per_epoch);
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut model)?;
        let views = Views::new(&images, [&config.views; 2], &input, seed).in_groups(&groups);
        if run.step() == 1 {
            job.log(&json!({ "stability": labels.stability, "drawn-to-prototypes": pulls }))?;
        }

        while let Some(epoch) = run.next_epoch() {
            let epoch = epochs_before + epoch;
            let (clusters, labels_of_rows) = (job.data.clusters, marked.pseudo_labels(&rows));
            let batches = config.order(&rows, &labels_of_rows, clusters, seed, epoch)?;
            let moves_prototypes = match config.prototypes {
                PrototypeUpdate::Epoch => run.batches_done() == 0,
                PrototypeUpdate::MovingAverage => run.step() == 1,
            };
            if pulls && moves_prototypes {
                let target = &mut model.learner.target;
                let prototypes = marked.prototypes(&images, &input, target, &device, job)?;
                model.prototypes.set(&prototypes)?;
            }
            for batch in views.epoch(epoch, batches, run.batches_done())? {
                let batch = batch?;
                let marks = marked.marks(&batch.rows);
                let [view_1, view_2] = pictures(batch, &device)?;
                let step = epochs_before * steps_per_epoch + run.step(); // Over all rounds, from 1.
                let weights =
                    config.weights(step as f64 / steps_per_epoch as f64, labels.stability);
                let RefinementModel { learner: Learner { online, target }, prototypes } =
                    &mut model;

                // Batch statistics, no tape.
                let [target_1, target_2] = target.project([&view_1, &view_2])?;
                run.note_projections(&target_1)?; // An error when they have collapsed.
                let directions = [(&view_1, &target_2), (&view_2, &target_1)];
                online.expect_passes(directions.len())?; // Ranks sum gradients during the last one.
                for (direction, (view, projection)) in directions.into_iter().enumerate() {
                    let draw = [step as u64, direction as u64];
                    let noise =
                        training::noise(config.noise, projection.dims2()?, seed, &draw, &device)?;
                    let seams = online.forward(view, noise.as_ref())?; // Variables of candle's.
                    let loss = objective(
                        config, &seams, projection, prototypes, &marks, weights, &mut run,
                    )?;
                    run.note_loss(&loss)?; // An error when it is not finite.
                    // Mean of both directions, not their sum.
                    online.backward(seams, &(loss * 0.5)?.backward()?)?; // Adds to the gradients.
                }
                run.check_gradients(&device, || online.first_gradient_not_finite())?;
                online.step(learning_rate.at(step))?;
                target.follow(online, target_decay.at(step))?;
                if pulls && config.prototypes == PrototypeUpdate::MovingAverage {
                    prototypes.follow([&target_1, &target_2], &marks)?;
                }
                run.end_step(&mut model)?; // Saves when the program is asked to stop.
            }
            run.end_epoch(&mut model)?; // Writes a log line, and a checkpoint when due.
        }
        run.finish(&mut model, &configuration)
    }
}

/// Everything that a checkpoint holds.
struct RefinementModel {
    learner: Learner,
    prototypes: Prototypes,
}

impl Trained for RefinementModel {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.learner.checkpoint(file)?;
        self.prototypes.checkpoint(file)
    }

    fn exported(&self) -> Option<&Segment> {
        self.learner.exported()
    }
}

/// The loss of one direction: regression, and the two losses on reliable images. A weight of 0
/// leaves a loss out of the graph, so that every bit is as in pretraining.
///
/// - `seams`: the online network's embedding, projection and prediction of one view.
/// - `target`: the target's projection of the other view, `(B, P)`.
/// - `weights`: of the pull to prototypes, and of scattering.
fn objective(
    config: &Config,
    [_, projection, prediction]: &[Seam; 3],
    target: &Tensor,
    prototypes: &Prototypes,
    marks: &Marks,
    (prototype_weight, scatter_weight): (f64, f64),
    run: &mut Run,
) -> Result<Tensor> {
    let mut loss = regression_loss(prediction, target)?;
    run.note_scalar("regression-loss", &loss)?;
    run.note_scalar("projection-length", &mean_length(projection)?)?;
    if prototype_weight > 0. {
        let temperature = config.sample_to_prototype_temperature;
        let term = sample_to_prototype_loss(projection, prototypes.rows(), marks, temperature)?;
        run.note_scalar("sample-to-prototype-loss", &term)?;
        loss = (loss + (term * prototype_weight)?)?;
    }
    if scatter_weight > 0. {
        let (reliable, temperature) = (marks.reliable(), config.scatter_temperature);
        let term = scatter_loss(projection, target, &reliable, temperature, Absent::LeftOut)?;
        run.note_scalar("scatter-loss", &term)?;
        loss = (loss + (term * scatter_weight)?)?;
    }
    Ok(loss)
}

/// The seed of the batches, views and noise of a run's refinement. Epochs count from 0 here as in
/// pretraining; under the run's own seed they would bring its batches and views once more, and the
/// control's extra epochs nothing new.
pub fn draws(seed: u64) -> u64 {
    stage::random::derived(seed, "prototype-refinement")
}
