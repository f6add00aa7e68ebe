//! Pretraining: teaches a backbone, without labels, that two views of one image are the same.
//!
//! An online network predicts the projection that a target network computes from the other view;
//! the target is the moving average of the online network (BYOL, Grill et al. 2020, arXiv:2006.07733). No pair of
//! different images is ever pushed apart, so that no two images of one cluster can be.
//!
//! Reads `images.safetensors`, and from the optional role `backbone` a `backbone.safetensors` to
//! start from. Writes `network.safetensors` (online and target, with projector and predictor: the
//! next stage continues from it), `backbone.safetensors` (the target backbone alone),
//! `config.json`, `state.safetensors`, and `log.jsonl`, one object per epoch.
//!
//! Start at the `run` of [`Pretraining`]; a step is [`step`], the loss is in [`training::loss`], the
//! values of an experiment in [`Config`].

mod config;

use anyhow::Result;
use candle_core::Tensor;
use data::Images;
use stage::{Effort, Job, Output, Ranks, Role, Spec, Stage};
use training::loss::regression_loss;
use training::{Learner, Run, pictures, sampler};

pub use config::{Config, Sampling};

/// The stage: see the documentation of the crate.
pub struct Pretraining;

impl Stage for Pretraining {
    const SPEC: Spec = Spec {
        name: "pretraining",
        algorithm: 4,
        inputs: &[Role::BACKBONE],
        outputs: &[Output::Network],
        ranks: Ranks::BatchGroups,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        let images = Images::of_job(job)?;
        let device = training::network_device(job.device)?;
        let groups = config.run.groups(job)?; // Shared by the ranks.
        let rows = images.rows(&job.data.train_on);
        let plan = config.plan(rows.len());
        let learning_rate = config.learning_rate(plan.steps_per_epoch);
        let target_decay = config.target_decay(plan.steps_per_epoch);
        let configuration = config.network.configuration(&config.input)?;

        let mut learner =
            Learner::random(&configuration, config.optimizer, config.run.precision, job.seed)?;
        if let Some(folder) = job.optional_input("backbone") {
            learner.load_backbone(folder)?;
        }
        let mut learner = learner.on(&device)?.in_groups(&groups)?;
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut learner)?;
        let views = config.views(&images, job.seed).in_groups(&groups);

        while let Some(epoch) = run.next_epoch() {
            let order = sampler::uniform(&rows, config.run.batch_size, job.seed, epoch)?;
            for batch in views.epoch(epoch, order, run.batches_done())? {
                let rates = Rates {
                    learning_rate: learning_rate.at(run.step()),
                    target_decay: target_decay.at(run.step()),
                    noise: config.noise,
                    seed: job.seed,
                };
                step(&mut run, &mut learner, &pictures(batch?, &device)?, rates)?;
                run.end_step(&mut learner)?; // Saves when the program is asked to stop.
            }
            run.end_epoch(&mut learner)?; // Writes a log line, and a checkpoint when due.
        }
        run.finish(&mut learner, &configuration)
    }
}

/// The rates of one [`step`], and its noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Of the optimizer, η.
    pub learning_rate: f64,
    /// Of the target network, τ.
    pub target_decay: f64,
    /// Deviation σ of the noise on the projection.
    pub noise: f64,
    /// Seed of the noise.
    pub seed: u64,
}

/// One step of BYOL on two views `(N, H, W, C)` of the same images: each predicts the target's
/// projection of the other.
///
/// # Errors
///
/// The views do not have the backbone's shape; the projections have collapsed; loss or a gradient
/// is not finite.
pub fn step(
    run: &mut Run,
    learner: &mut Learner,
    [view_1, view_2]: &[Tensor; 2],
    rates: Rates,
) -> Result<()> {
    let Learner { online, target } = learner;
    let Rates { learning_rate, target_decay, noise, seed } = rates;
    let [target_1, target_2] = target.project([view_1, view_2])?; // Batch statistics, no tape.
    run.note_projections(&target_1)?; // An error when they have collapsed.
    let directions = [(view_1, &target_2), (view_2, &target_1)];
    online.expect_passes(directions.len())?; // Ranks sum the gradients during the last one.
    for (direction, (view, projection)) in directions.into_iter().enumerate() {
        let draw = [run.step() as u64, direction as u64];
        let noise = training::noise(noise, projection.dims2()?, seed, &draw, projection.device())?;
        let seams = online.forward(view, noise.as_ref())?; // Outputs as variables of candle's.
        let [_, _, prediction] = &seams;
        let loss = regression_loss(prediction, projection)?;
        run.note_loss(&loss)?; // An error when it is not finite.
        // Mean of both directions, not their sum; adds to the gradients.
        online.backward(seams, &(loss * 0.5)?.backward()?)?;
    }
    run.check_gradients(target_1.device(), || online.first_gradient_not_finite())?;
    online.step(learning_rate)?;
    Ok(target.follow(online, target_decay)?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backbone::{Configuration, network_file};
    use candle_core::Device;
    use fixture::{Pictures, network};
    use stage::{DeviceChoice, Split};

    use super::*;

    /// Twenty pictures and a stage that reads them.
    fn job(folder: &Path, out: &str) -> Job {
        let split = |_| Split::Train;
        let pictures = Pictures { count: 20, pixel: fixture::scattered, split };
        fixture::job("pretraining", folder, out, pictures, fixture::data(2, &[Split::Train]))
    }

    fn config() -> Config {
        fixture::table(
            r#"
            noise = 0.0
            sampling = "uniform"
            views = { operations = [{ operation = "noise", deviation = 0.2 }] }
            [run]
            epochs = 3
            batch-size = 8
            batch-groups = 1
            precision = "f32"
            save-every = 1
            collapse-deviation = 1e-6
            [optimizer]
            peak-learning-rate = 0.5
            predictor-learning-rate-factor = 10.0
            momentum = 0.9
            weight-decay = 5e-4
            [schedule]
            warmup-epochs = 1.0
            cosine = "to-zero"
            target-decay = 0.9
            last-target-decay = 1.0
            [network]
            backbone = { depth = "10", width = 2, stem = "3x3" }
            projector = { hidden = 8, width = 4 }
            predictor = { hidden = 8 }
            "#,
        )
    }

    /// The same with some other values.
    fn with(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = config();
        change(&mut config);
        config
    }

    #[test]
    fn equal_runs_are_equal_bytes_and_what_varies_changes_them() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let first = network::<Pretraining>(&config(), &job(folder.path(), "first"));
        assert!(first == network::<Pretraining>(&config(), &job(folder.path(), "again")));
        let other_seed = Job { seed: 4, ..job(folder.path(), "seed") };
        assert!(first != network::<Pretraining>(&config(), &other_seed));
        let with_noise = Config { noise: 0.1, ..config() };
        assert!(first != network::<Pretraining>(&with_noise, &job(folder.path(), "noise")));
        let rounded = with(|c| c.run.precision = training::Precision::Bf16);
        assert!(first != network::<Pretraining>(&rounded, &job(folder.path(), "bf16")));

        let job = job(folder.path(), "first");
        let log = fixture::log(&job);
        assert_eq!(log.len(), 3);
        // The mean of both directions, each in [0, 4].
        let loss = log[0]["loss"].as_f64().expect("a loss");
        assert!((0.2..4.).contains(&loss), "{loss}");
        let written = Configuration::read(&job.out)?;
        assert_eq!(written.input::<data::views::Input>()?, config().input);
        assert_eq!(written.backbone, config().network.backbone);
        Ok(())
    }

    #[test]
    fn ranks_write_the_same_bytes() -> Result<()> {
        for precision in [training::Precision::F32, training::Precision::Bf16] {
            let folder = tempfile::tempdir()?;
            let mut config = Config { noise: 0.1, ..config() };
            // A batch that four groups do not divide evenly.
            (config.run.batch_groups, config.run.batch_size) = (4, 10);
            config.run.precision = precision;
            fixture::assert_same_on_ranks::<Pretraining>(&config, |out| job(folder.path(), out));
        }
        Ok(())
    }

    /// BYOL written down once more, with one loss over both directions instead of one for each.
    #[test]
    fn a_run_is_byol() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (config, job) = (config(), job(folder.path(), "out"));
        Pretraining::run(&config, &job)?;
        let written = network_file::open(&job.out)?;

        let images = Images::open(&job.images)?;
        let rows = images.rows(&[Split::Train]);
        let mut learner = Learner::random(
            &config.network.configuration(&config.input)?,
            config.optimizer,
            config.run.precision,
            3,
        )?;
        let views = config.views(&images, 3);
        let Learner { online, target } = &mut learner;
        let mut step = 0;
        for epoch in 0..3 {
            let order = sampler::uniform(&rows, 8, 3, epoch)?;
            assert_eq!(order.len(), 2);
            for batch in views.epoch(epoch, order, 0)? {
                step += 1;
                let [view_1, view_2] = pictures(batch?, &Device::Cpu)?;
                let [target_1, target_2] = target.project([&view_1, &view_2])?;
                let pass_1 = online.forward(&view_1, None)?;
                let pass_2 = online.forward(&view_2, None)?;
                let loss_1 = regression_loss(&pass_1[2], &target_2)?;
                let loss_2 = regression_loss(&pass_2[2], &target_1)?;
                let gradients = ((loss_1 + loss_2)? / 2.)?.backward()?;
                online.backward(pass_1, &gradients)?;
                online.backward(pass_2, &gradients)?;
                // Two steps an epoch and one epoch of warm-up to 0.5 · 8 / 256.
                let epochs = step as f64 / 2.;
                let cosine = (1. + (std::f64::consts::PI * (epochs - 1.) / 2.).cos()) / 2.;
                let rate = if epochs < 1. { epochs } else { cosine };
                online.step(0.5 / 32. * rate)?;
                let cosine = (1. + (std::f64::consts::PI * step as f64 / 6.).cos()) / 2.;
                target.follow(online, 1. - 0.1 * cosine)?;
            }
        }
        fixture::assert_written(&written, &training::network_tensors(&mut learner)?, 1e-6);
        Ok(())
    }

    #[test]
    fn online_and_target_start_from_a_given_backbone() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let still = with(|c| {
            c.optimizer.peak_learning_rate = 1e-30;
            c.schedule.target_decay = 1.;
            c.optimizer.weight_decay = 0.;
        });
        let job = |out: &str| job(folder.path(), out);
        fixture::assert_starts_from_backbone::<Pretraining>(job, &config(), &still);
        Ok(())
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_runs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        config().check(&job)?;
        let mut colour = config();
        colour.input.channels = 3;
        colour.input.mean = vec![0.5; 3];
        colour.input.std = vec![0.5; 3];
        let wrong = [
            (with(|c| c.run.batch_size = 1), "batch-size"),
            (with(|c| c.run.epochs = 0), "epochs"),
            (with(|c| c.run.save_every = 0), "save-every"),
            (with(|c| c.schedule.warmup_epochs = 3.), "warmup-epochs"),
            (with(|c| c.optimizer.momentum = 1.), "momentum"),
            (with(|c| c.schedule.target_decay = 1.1), "target-decay"),
            (Config { noise: -1., ..config() }, "noise"),
            (with(|c| c.optimizer.peak_learning_rate = 0.), "peak-learning-rate"),
            (colour, "channels"),
        ];
        fixture::assert_refused::<Pretraining>(&job, wrong);
        let elsewhere = Job { device: DeviceChoice::Cuda(None), ..job };
        assert!(config().check(&elsewhere).is_err());
        Ok(())
    }

    #[test]
    fn a_run_whose_projections_collapse_stops() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let strict = with(|c| c.run.collapse_deviation = 0.6);
        let error =
            Pretraining::run(&strict, &job(folder.path(), "out")).expect_err("at most 1/√4");
        assert!(error.is::<stage::Diverged>(), "{error}");
        Ok(())
    }

    #[test]
    fn advice_names_keys_of_the_table() {
        let training::Advice { divergence, collapse } = config().plan(20).advice;
        fixture::assert_names_keys([divergence, collapse], &config());
    }

    #[test]
    fn every_experiment_of_the_project_has_a_usable_table() {
        fixture::assert_experiments_are_usable::<Pretraining>();
    }
}
