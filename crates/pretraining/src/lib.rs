//! Pretraining: teaches a backbone, without labels, that two views of one image are the same.
//!
//! An online network predicts what a target network makes of the other view; the target is the
//! moving average of the online network (BYOL, Grill et al. 2020, arXiv:2006.07733). No pair of
//! different images is ever pushed apart, so that no two images of one cluster can be.
//!
//! Reads `images.safetensors`, and from the optional role `backbone` a `backbone.safetensors` to
//! start from. Writes `network.safetensors` (online and target, with projector and predictor: the
//! next stage goes on from there), `backbone.safetensors` (the target backbone alone),
//! `config.json`, `state.safetensors`, and `log.jsonl`, one object per epoch.
//!
//! To change the objective, see [`training::loss`]; the order of a step, [`run`]; what varies,
//! [`Config`].

mod config;

use anyhow::{Result, bail};
use backbone::backbone_file;
use candle_core::{Device, Tensor};
use data::{Batch, Images};
use stage::Stage;
use training::loss::regression_loss;
use training::{Learner, Run, Target, sampler};

pub use config::{Config, Sampling};

/// Raised when the results change for the same table.
pub const ALGORITHM: u32 = 1;

/// Files in, files out; goes on where an interrupted run stopped.
///
/// # Errors
///
/// An input is missing, damaged or foreign; the run was interrupted, diverged or collapsed.
pub fn run(config: &Config, stage: &Stage) -> Result<()> {
    let images = Images::open(&stage.images)?;
    let device = training::network_device(stage.device)?;
    let rows = images.rows(&stage.data.train_on);
    let plan = config.plan(rows.len());
    let learning_rate = config.learning_rate(plan.steps_per_epoch)?;
    let target_decay = config.target_decay(plan.steps_per_epoch)?;
    let configuration = config.configuration()?;

    let mut learner = Learner::random(&configuration, config.groups()?, stage.seed)?;
    if let Some(folder) = stage.optional_input("backbone") {
        backbone_file::read(&folder.join(backbone_file::NAME), &mut learner.online.backbone)?;
        learner.target = Target::copy_of(&learner.online);
    }
    let mut run = Run::resume_or_start(stage, config, images.fingerprint(), plan, &mut learner)?;

    while let Some(epoch) = run.next_epoch() {
        let order = sampler::uniform(&rows, config.batch_size, stage.seed, epoch)?;
        for batch in config.loader(&images, order, run.batches_done(), stage.seed, epoch)? {
            let Learner { online, target, optimizer } = &mut learner;
            let [view_1, view_2] = views(batch?, &device)?;
            let target_1 = target.project(&view_1)?; // Batch statistics, no tape.
            let target_2 = target.project(&view_2)?;
            run.note_projections(&target_1)?; // An error when they have collapsed.
            let directions = [(&view_1, &target_2), (&view_2, &target_1)];
            for (direction, (view, projection)) in directions.into_iter().enumerate() {
                let draw = [run.step() as u64, direction as u64];
                let noise =
                    training::noise(config.noise, projection.dims2()?, stage.seed, &draw, &device)?;
                let pass = online.forward(view, noise.as_ref())?; // Its outputs are seams: candle `Var`s.
                let loss = regression_loss(pass.prediction(), projection)?;
                run.note_loss(&loss)?; // An error when it is not finite.
                // Mean of both directions, not their sum; adds to the gradients.
                online.backward(pass, &(loss * 0.5)?.backward()?)?;
            }
            run.check_gradients(online)?;
            optimizer.step(online, learning_rate.at(run.step()))?;
            target.follow(online, target_decay.at(run.step()))?;
            run.end_step(&learner)?; // A checkpoint when the program is asked to stop.
        }
        run.end_epoch(&learner)?; // One line in the log; a checkpoint when due.
    }
    run.finish(&learner, &configuration)
}

/// The two views of a batch as tensors `(N, H, W, C)`.
fn views(batch: Batch, device: &Device) -> Result<[Tensor; 2]> {
    let shape = (batch.rows.len(), batch.height, batch.width, batch.channels);
    let mut views = batch.views.into_iter();
    match (views.next(), views.next(), views.next()) {
        (Some(view_1), Some(view_2), None) => {
            Ok([Tensor::from_vec(view_1, shape, device)?, Tensor::from_vec(view_2, shape, device)?])
        }
        _ => bail!("a batch does not hold two views of each image"),
    }
}
