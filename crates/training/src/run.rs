//! A run that can stop at any moment and resume to the same bytes.
//!
//! Its checkpoint is one file, `state.safetensors`, replaced whole: after a kill it is the old one
//! or the new one. The tensors are described in [`crate::checkpoint`]; its header has
//!
//! - `identity`: stage, round, seed, table and data set; the state of another run is refused;
//! - `epochs`, `steps`: how many are done;
//! - `sums`: sums and counts of the values noted in the current epoch, for its log line;
//! - `finished`: true once the networks are in `network.safetensors`.
//!
//! Of several ranks, the first one writes; all read. A state does not depend on their number, so that a
//! run resumes on any.
//!
//! When the run ends it writes `config.json`, `backbone.safetensors`, `network.safetensors`, and a
//! last state without the networks, from which a later round loads the momenta.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backbone::{backbone_file, network_file};
use candle_core::{Device, Tensor};
use serde::Serialize;
use serde_json::{Map, json};
use stage::container::Header;
use stage::progress::{Progress, Unit};
use stage::{Diverged, Interrupted, Job};

use crate::checkpoint::{self, Checkpoint, Trained};

/// Steps between two reads of loss, deviation and gradients from a GPU.
const STEPS_PER_READING: usize = 10;

/// The length of a run, and when it saves or stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunPlan {
    /// Passes over the images.
    pub epochs: usize,
    /// Steps of one pass, from [`sampler::steps`](crate::sampler::steps).
    pub steps_per_epoch: usize,
    /// Images of one step.
    pub batch_size: usize,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// The run stops when the deviation of unit-length projections falls below this.
    pub collapse_deviation: f64,
    /// Advice for a run that stops, in keys of the stage's table.
    pub advice: Advice,
}

/// Advice for a run that stops. Keys of the stage's table are in backticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advice {
    /// If a number is not finite.
    pub divergence: &'static str,
    /// If all projections are alike.
    pub collapse: &'static str,
}

impl RunPlan {
    /// Pictures of all steps, repetitions included.
    pub fn pictures(&self) -> f64 {
        (self.epochs * self.steps_per_epoch * self.batch_size) as f64
    }
}

/// A training run: its progress, its log, its checkpoints.
pub struct Run<'a> {
    job: &'a Job,
    plan: RunPlan,
    /// Identifies the run in its state, as JSON with sorted keys.
    identity: String,
    /// Epochs done.
    epochs: usize,
    /// Steps done, over all epochs.
    steps: usize,
    /// Sum and count of the values noted in the current epoch, by name.
    sums: BTreeMap<String, (f64, u64)>,
    saved_epochs: Option<usize>,
    epoch_began: Instant,
    /// The time that this rank had waited for others when the epoch began.
    waited_before: Duration,
    steps_here: usize,
    progress: Progress,
}

impl<'a> Run<'a> {
    /// Resumes from the state in the stage's output folder, which is loaded into `trained`; starts
    /// with `trained` as it is if there is none.
    ///
    /// - `table`: the stage's table of the experiment, resolved.
    /// - `fingerprint`: of the data set.
    ///
    /// # Errors
    ///
    /// The state is damaged or belongs to another run.
    pub fn resume_or_start(
        job: &'a Job,
        table: &impl Serialize,
        fingerprint: &str,
        plan: RunPlan,
        trained: &mut impl Trained,
    ) -> Result<Self> {
        let identity = json!({
            "fingerprint": fingerprint,
            "round": job.round,
            "rounds": job.rounds,
            "seed": job.seed,
            "stage": job.name,
            "table": serde_json::to_value(table)?,
        })
        .to_string();
        let steps = (plan.epochs * plan.steps_per_epoch) as u64;
        let unit = Unit::Images(plan.batch_size as u64);
        let progress = job.progress(steps, unit);
        let mut run = Self {
            job,
            plan,
            identity,
            epochs: 0,
            steps: 0,
            sums: BTreeMap::new(),
            saved_epochs: None,
            epoch_began: Instant::now(),
            waited_before: Duration::ZERO,
            steps_here: 0,
            progress,
        };
        if job.out.join(checkpoint::NAME).exists() {
            run.resume(trained)?;
            tracing::info!("resumed after epoch {}, step {}", run.epochs, run.steps);
            let done = run.epochs as u64;
            job.retain_log(|line| line["epoch"].as_u64().is_none_or(|epoch| epoch <= done))?;
        } else {
            job.clear_log()?;
        }
        run.check_agreement()?;
        Ok(run)
    }

    /// Fails unless all ranks resume the same run from the same step.
    fn check_agreement(&self) -> Result<()> {
        let step = format!("step {}", self.steps);
        self.job.check_agreement(&[&self.identity, &*step].concat(), &step)
    }

    /// The next epoch, from 0; `None` when all are done.
    pub fn next_epoch(&mut self) -> Option<usize> {
        self.epoch_began = Instant::now();
        self.waited_before = self.job.communicator.waited();
        self.steps_here = 0;
        (self.epochs < self.plan.epochs).then_some(self.epochs)
    }

    /// Batches of this epoch that are done: 0 unless the run was resumed in it.
    pub fn batches_done(&self) -> usize {
        self.steps - self.epochs * self.plan.steps_per_epoch
    }

    /// The current step, over all epochs, from 1.
    pub fn step(&self) -> usize {
        self.steps + 1
    }

    /// Notes `value` for this epoch's log line, which has the mean of all values noted under `name`.
    pub fn note(&mut self, name: &str, value: f64) {
        let (sum, count) = self.sums.entry(name.to_owned()).or_insert((0., 0));
        *sum += value;
        *count += 1;
    }

    /// Notes a scalar of f32 that a device computed; on a GPU only that of every tenth step.
    ///
    /// # Errors
    ///
    /// It is not a scalar of f32.
    pub fn note_scalar(&mut self, name: &str, scalar: &Tensor) -> Result<()> {
        if self.reads(scalar.device()) {
            self.note(name, f64::from(scalar.to_scalar::<f32>()?));
        }
        Ok(())
    }

    /// Notes the loss of this step, or that of each direction; on a GPU only that of every tenth
    /// step.
    ///
    /// # Errors
    ///
    /// It is not finite: [`Diverged`], with epoch and step.
    pub fn note_loss(&mut self, loss: &Tensor) -> Result<()> {
        if !self.reads(loss.device()) {
            return Ok(());
        }
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(self.diverged(&format!("the loss is {value}")));
        }
        self.note("loss", value);
        Ok(())
    }

    /// Notes the deviation of projections `(N, P)` once they are scaled to unit length: the root of
    /// their variance over the images, averaged over the P directions. It is at most `1/√P`, and 0
    /// when all images have the same projection.
    ///
    /// # Errors
    ///
    /// It is below the plan's `collapse_deviation`: [`Diverged`], with epoch and step.
    pub fn note_projections(&mut self, projections: &Tensor) -> Result<()> {
        if !self.reads(projections.device()) {
            return Ok(());
        }
        let deviation = deviation_of_unit_rows(projections)?;
        if deviation.is_nan() {
            return Err(self.diverged("a projection is not finite"));
        }
        if deviation < self.plan.collapse_deviation {
            return Err(Diverged(format!(
                "the projections collapsed at {}: their deviation is {deviation:.2e}, below \
                 `collapse-deviation` = {:.2e}; {}; try {}",
                self.place(),
                self.plan.collapse_deviation,
                self.last_checkpoint(),
                self.plan.advice.collapse
            ))
            .into());
        }
        self.note("deviation", deviation);
        Ok(())
    }

    /// Checks the gradients of this step, before the optimizer takes them; on a GPU only those of
    /// every tenth step.
    ///
    /// - `first_not_finite`: looks for the first parameter whose gradient is not finite.
    ///
    /// # Errors
    ///
    /// There is one: [`Diverged`], with epoch, step and parameter.
    pub fn check_gradients(
        &self,
        device: &Device,
        first_not_finite: impl FnOnce() -> candle_core::Result<Option<String>>,
    ) -> Result<()> {
        if !self.reads(device) {
            return Ok(());
        }
        match first_not_finite()? {
            None => Ok(()),
            Some(name) => Err(self.diverged(&format!("the gradient of `{name}` is not finite"))),
        }
    }

    /// Whether this step reads back what `device` computed. A GPU idles while the host waits for a
    /// number, so that only every tenth step reads there, and the first one of each epoch. A number
    /// that is not finite is then found by the next reading, and by every save.
    fn reads(&self, device: &Device) -> bool {
        device.is_cpu() || self.batches_done().is_multiple_of(STEPS_PER_READING)
    }

    /// Ends a step. Saves the run when the program has been asked to stop.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], or the state cannot be written.
    pub fn end_step(&mut self, trained: &mut impl Trained) -> Result<()> {
        self.steps += 1;
        self.steps_here += 1;
        let loss = self.mean("loss").map(|loss| format!("loss {loss:.4}")).unwrap_or_default();
        self.progress.at(self.steps as u64, &loss);
        // A signal may reach the ranks at different steps, or one of them alone.
        if self.job.communicator.any(self.job.interrupt.is_raised())? {
            self.save(trained)?;
            return Err(Interrupted.into());
        }
        Ok(())
    }

    /// Ends an epoch: writes its log line, and a checkpoint when one is due.
    ///
    /// # Errors
    ///
    /// A value is not finite, or log or state cannot be written.
    pub fn end_epoch(&mut self, trained: &mut impl Trained) -> Result<()> {
        self.epochs += 1;
        self.log_epoch()?;
        self.sums.clear();
        if self.epochs.is_multiple_of(self.plan.save_every) || self.epochs == self.plan.epochs {
            self.save(trained)?;
        }
        Ok(())
    }

    /// Writes `config.json`, `backbone.safetensors`, `network.safetensors`, and the last state,
    /// without the networks.
    ///
    /// - `configuration`: everything needed to build the network again, such as a
    ///   [`Configuration`](backbone::Configuration).
    ///
    /// # Errors
    ///
    /// A value is not finite, or a file cannot be written.
    pub fn finish(&self, trained: &mut impl Trained, configuration: &impl Serialize) -> Result<()> {
        let file = self.finite(trained)?;
        let out = &self.job.out;
        if self.job.communicator.is_first() {
            backbone::write_configuration(out, configuration)?;
            if let Some(backbone) = trained.exported() {
                backbone_file::write(out, backbone)?;
            }
            network_file::write_tensors(out, file.network())?;
        }
        self.write(&file, true)
    }

    fn log_epoch(&self) -> Result<()> {
        let seconds = self.epoch_began.elapsed().as_secs_f64();
        let images = (self.steps_here * self.plan.batch_size) as f64;
        let mut line = Map::new();
        line.insert("epoch".into(), self.epochs.into());
        line.insert("step".into(), self.steps.into());
        for (name, (sum, count)) in &self.sums {
            line.insert(name.clone(), (sum / *count as f64).into());
        }
        line.insert("seconds".into(), seconds.into());
        if self.job.communicator.size() > 1 {
            let waited = self.job.communicator.waited().saturating_sub(self.waited_before);
            line.insert("waiting-seconds".into(), waited.as_secs_f64().into());
        }
        line.insert("images-per-second".into(), (images / seconds.max(1e-9)).into());
        self.job.log(&line)
    }

    fn mean(&self, name: &str) -> Option<f64> {
        self.sums.get(name).map(|(sum, count)| sum / *count as f64)
    }

    fn place(&self) -> String {
        format!("epoch {}, step {}", self.epochs + 1, self.step())
    }

    fn last_checkpoint(&self) -> String {
        match self.saved_epochs {
            Some(epoch) => format!("last checkpoint: epoch {epoch}"),
            None => "no checkpoint yet".to_owned(),
        }
    }

    fn diverged(&self, what: &str) -> anyhow::Error {
        Diverged(format!(
            "{what} at {}; {}; try {}",
            self.place(),
            self.last_checkpoint(),
            self.plan.advice.divergence
        ))
        .into()
    }

    fn save(&mut self, trained: &mut impl Trained) -> Result<()> {
        self.write(&self.finite(trained)?, false)?;
        self.saved_epochs = Some(self.epochs);
        Ok(())
    }

    /// What there is to save, all of it finite.
    fn finite(&self, trained: &mut impl Trained) -> Result<Checkpoint<'static>> {
        let file = Checkpoint::of(trained)?;
        match file.first_not_finite() {
            None => Ok(file),
            Some(name) => Err(self.diverged(&format!("`{name}` is not finite"))),
        }
    }

    fn write(&self, file: &Checkpoint, finished: bool) -> Result<()> {
        let header = Header::from([
            ("identity".into(), self.identity.clone().into()),
            ("epochs".into(), self.epochs.into()),
            ("steps".into(), self.steps.into()),
            ("sums".into(), json!(self.sums.iter().map(as_bits).collect::<BTreeMap<_, _>>())),
            ("finished".into(), finished.into()),
        ]);
        if self.job.communicator.is_first() {
            file.write(&self.job.out, header, !finished)?;
        }
        // No rank goes on, or ends, before the state is on disk.
        Ok(self.job.communicator.barrier()?)
    }

    fn resume(&mut self, trained: &mut impl Trained) -> Result<()> {
        let out = &self.job.out;
        let state = checkpoint::open(out)?;
        ensure!(
            state.header_text("identity")? == self.identity,
            "`{}` belongs to another run (its table, seed, round or images differ); remove the \
             folder, or name another with --out",
            state.path().display()
        );
        self.epochs = state.header_number("epochs")? as usize;
        self.steps = state.header_number("steps")? as usize;
        let sums: BTreeMap<String, (u64, u64)> =
            serde_json::from_value(state.header("sums")?.clone())
                .with_context(|| format!("`sums` of `{}`", state.path().display()))?;
        self.sums = sums.into_iter().map(|(k, (sum, n))| (k, (f64::from_bits(sum), n))).collect();
        self.saved_epochs = Some(self.epochs);
        let finished = state.header("finished")?.as_bool() == Some(true);
        let network = if finished { &network_file::open(out)? } else { &state };
        Checkpoint::load(Some(network), Some(&state), trained)
    }
}

/// A sum as its bits: decimals may not be read back to the same float.
fn as_bits((name, (sum, count)): (&String, &(f64, u64))) -> (String, (u64, u64)) {
    (name.clone(), (sum.to_bits(), *count))
}

/// The root of the variance of unit-length rows, averaged over the directions; NaN when a row is
/// not finite.
fn deviation_of_unit_rows(rows: &Tensor) -> Result<f64> {
    let (n, width) = rows.dims2()?;
    let mut mean = vec![0f64; width];
    let mut squares = 0.;
    for row in rows.to_vec2::<f32>()? {
        let length_squared = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        if !length_squared.is_finite() {
            return Ok(f64::NAN);
        }
        let length = length_squared.max(1e-24).sqrt();
        squares += length_squared / length.powi(2) / n as f64;
        for (mean, &x) in mean.iter_mut().zip(&row) {
            *mean += f64::from(x) / length / n as f64;
        }
    }
    let variance = squares - mean.iter().map(|m| m * m).sum::<f64>();
    Ok((variance.max(0.) / width as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use backbone::Segment;
    use candle_core::Device::Cpu;
    use stage::DataTable;

    use super::*;
    use crate::checkpoint::NAME;
    use crate::learner::tests::{SGD, learner, pictures, tiny};
    use crate::loss::regression_loss;
    use crate::{Learner, Precision};

    const PLAN: RunPlan = RunPlan {
        epochs: 3,
        steps_per_epoch: 2,
        batch_size: 6,
        save_every: 2,
        collapse_deviation: 1e-4,
        advice: Advice { divergence: "a lower `rate`", collapse: "a higher `decay`" },
    };

    /// BYOL's networks and a list that grows with every step.
    struct TestNetworks {
        learner: Learner,
        steps: Vec<u32>,
    }

    impl Trained for TestNetworks {
        fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
            self.learner.checkpoint(file)?;
            file.list("steps", &mut self.steps)
        }

        fn exported(&self) -> Option<&Segment> {
            self.learner.exported()
        }
    }

    fn job(out: &Path) -> Job {
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
        Job::new("example", "i.safetensors", out, data)
    }

    /// A whole run, or the rest of one; without `finish` when it is killed or stopped before
    /// this step of this call.
    fn train(out: &Path, kill_at: Option<usize>, stop_at: Option<usize>) -> Result<()> {
        let job = job(out);
        let mut networks = TestNetworks { learner: learner(4)?, steps: Vec::new() };
        let mut run = Run::resume_or_start(&job, &"table", "images", PLAN, &mut networks)?;
        let mut done = 0;
        while let Some(epoch) = run.next_epoch() {
            for batch in run.batches_done()..2 {
                if kill_at == Some(done) {
                    return Ok(());
                }
                let Learner { online, target } = &mut networks.learner;
                let number = (10 * epoch + batch) as u64;
                let [projection] = target.project([&pictures(2 * number)?])?;
                run.note_projections(&projection)?;
                let seams = online.forward(&pictures(2 * number + 1)?, None)?;
                let loss = regression_loss(&seams[2], &projection)?;
                run.note_loss(&loss)?;
                online.backward(seams, &loss.backward()?)?;
                run.check_gradients(&Cpu, || online.first_gradient_not_finite())?;
                online.step(0.05)?;
                target.follow(online, 0.9)?;
                networks.steps.push(run.step() as u32);
                done += 1;
                run.end_step(&mut networks)?;
                if stop_at == Some(done) {
                    return run.save(&mut networks);
                }
            }
            run.end_epoch(&mut networks)?;
        }
        assert_eq!(networks.steps, [1, 2, 3, 4, 5, 6]);
        run.finish(&mut networks, &tiny())
    }

    fn files(folder: &Path) -> Vec<Vec<u8>> {
        [NAME, network_file::NAME, backbone_file::NAME, backbone::CONFIGURATION]
            .map(|name| fs::read(folder.join(name)).expect(name))
            .to_vec()
    }

    #[test]
    fn a_run_killed_or_stopped_anywhere_ends_in_the_same_bytes() -> Result<()> {
        let whole = tempfile::tempdir()?;
        train(whole.path(), None, None)?;
        let want = files(whole.path());
        for step in 0..6 {
            for (kill, stop) in [(Some(step), None), (None, Some(step))] {
                let folder = tempfile::tempdir()?;
                train(folder.path(), kill, stop)?;
                train(folder.path(), Some(1), None)?;
                train(folder.path(), None, None)?;
                assert!(files(folder.path()) == want, "stopped at step {step}: {kill:?} {stop:?}");
                let log = fs::read_to_string(folder.path().join("log.jsonl"))?;
                assert_eq!(log.lines().count(), 3, "{log}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_kill_while_the_run_ends_changes_nothing() -> Result<()> {
        let folder = tempfile::tempdir()?;
        train(folder.path(), None, None)?;
        let want = files(folder.path());
        for lost in [network_file::NAME, backbone_file::NAME, backbone::CONFIGURATION] {
            // The state before the last is the one of the last epoch, with the networks.
            let again = tempfile::tempdir()?;
            let job = job(again.path());
            train(again.path(), None, Some(6))?;
            fs::copy(folder.path().join(lost), again.path().join(lost))?;
            train(&job.out, None, None)?;
            assert!(files(again.path()) == want, "{lost}");
        }
        train(folder.path(), None, None)?;
        assert!(files(folder.path()) == want, "a finished run finishes again");
        Ok(())
    }

    #[test]
    fn the_next_round_loads_the_momenta_alone() -> Result<()> {
        let folder = tempfile::tempdir()?;
        train(folder.path(), None, None)?;
        let state = checkpoint::open(folder.path())?;
        assert_eq!(state.u32("stage.steps")?, [1, 2, 3, 4, 5, 6]);
        let mut next = Learner::open(folder.path(), &tiny(), SGD, Precision::F32)?;
        let moments = |learner: &mut Learner| -> Result<Vec<Vec<f32>>> {
            let file = Checkpoint::of(learner)?;
            let momenta = file.floats().filter(|(name, ..)| name.starts_with("momentum."));
            Ok(momenta.map(|(_, _, values)| values.to_vec()).collect())
        };
        assert!(moments(&mut next)?.concat().iter().all(|value| *value == 0.));
        next.online.backbone.segment.parameters.set("bn1.bias", &[5., 6.])?;
        next.load_momenta(folder.path())?;
        assert!(moments(&mut next)?.iter().all(|momentum| momentum.iter().any(|v| *v != 0.)));
        assert_eq!(next.online.backbone.segment.parameters.get("bn1.bias")?, [5., 6.]);
        Ok(())
    }

    #[test]
    fn a_foreign_or_damaged_state_is_refused_by_name() -> Result<()> {
        let folder = tempfile::tempdir()?;
        train(folder.path(), Some(5), None)?;
        let message = |job: &Job| {
            let mut learner = learner(4).expect("a learner");
            let run = Run::resume_or_start(job, &"table", "images", PLAN, &mut learner);
            format!("{:#}", run.err().expect("refused"))
        };
        let other = Job { seed: 1, ..job(folder.path()) };
        let text = message(&other);
        assert!(text.contains("another run") && text.contains(NAME), "{text}");
        let path = folder.path().join(NAME);
        let mut bytes = fs::read(&path)?;
        *bytes.last_mut().expect("a byte") ^= 1;
        fs::write(&path, &bytes)?;
        let text = message(&job(folder.path()));
        assert!(text.contains("damaged") && text.contains(NAME), "{text}");
        Ok(())
    }

    #[test]
    fn a_run_that_leaves_the_finite_numbers_or_collapses_stops_and_says_where() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path());
        let mut learner = learner(4)?;
        let mut run = Run::resume_or_start(&job, &"table", "images", PLAN, &mut learner)?;
        let check = |result: Result<()>, words: &[&str]| {
            let error = result.expect_err("a stop");
            assert!(error.is::<Diverged>(), "{error}");
            for word in words.iter().chain(&["epoch 1, step 1", "; try a "]) {
                assert!(error.to_string().contains(word), "{word} is not in: {error}");
            }
        };
        check(run.note_loss(&Tensor::new(f32::NAN, &Cpu)?), &["the loss is NaN", "lower `rate`"]);
        check(
            run.note_projections(&Tensor::new(&[[3f32, 4.], [6., 8.]], &Cpu)?),
            &["collapsed", "higher `decay`"],
        );
        check(
            run.note_projections(&Tensor::zeros((3, 2), candle_core::DType::F32, &Cpu)?),
            &["collapsed"],
        );
        check(
            run.note_projections(&Tensor::new(&[[f32::NAN, 4.], [6., 8.]], &Cpu)?),
            &["projection"],
        );
        run.note_projections(&Tensor::new(&[[3f32, 4.], [-8., 6.]], &Cpu)?)?;
        let online = &mut learner.online;
        run.check_gradients(&Cpu, || online.first_gradient_not_finite())?;

        let seams = online.forward(&pictures(1)?, None)?;
        let loss = (seams[2].sum_all()? * f64::NAN)?;
        online.backward(seams, &loss.backward()?)?;
        let checked = run.check_gradients(&Cpu, || online.first_gradient_not_finite());
        check(checked, &["gradient of `online."]);
        online.step(0.1)?;
        check(run.save(&mut learner), &["`online.backbone.conv1.weight` is not finite"]);
        Ok(())
    }

    #[test]
    fn deviation_matches_hand_computation() -> Result<()> {
        // Unit rows (0.6, 0.8) and (−0.8, 0.6): mean (−0.1, 0.7), variances 0.49 and 0.01.
        let rows = Tensor::new(&[[3f32, 4.], [-8., 6.]], &Cpu)?;
        assert!((deviation_of_unit_rows(&rows)? - 0.5).abs() < 1e-9);
        Ok(())
    }
}
