//! A run that can stop at any moment and go on to the same bytes.
//!
//! Its checkpoint is one file, `state.safetensors`, replaced whole: a kill leaves the old one or
//! the new one, and nothing of two epochs can mix. It is a [container] of kind
//! `state`, version 1:
//!
//! - header `identity`: stage, round, seed, table and data set it belongs to; another run's state is
//!   refused. `epochs`, `steps`: how many are done. `sums`: what the log will say of the epoch under
//!   way. `finished`: true once the run's network is in its own files.
//! - `<segment>.*`: the networks, as in `network.safetensors`; not once finished.
//! - `momenta.<segment>.<parameter>`: the optimizer's, see [`Trained::memory`].
//! - `stage.<name>`: what the stage keeps beside them, see [`Run::keep`].
//!
//! When the run ends it writes `config.json`, `backbone.safetensors`, `network.safetensors`, and a
//! last state without the networks, from which a later round takes the momenta.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use backbone::backbone_file;
use backbone::network_file::{self, NamedTensor};
use candle_core::{Device, Tensor};
use serde::Serialize;
use serde_json::{Map, Value, json};
use stage::container::{self, Container, Header};
use stage::progress::Progress;
use stage::{Diverged, Interrupted, Job};

use crate::trained::Trained;
use crate::{Learner, Online};

/// Kind of the state file.
const KIND: &str = "state";
/// Its format version.
const VERSION: u64 = 1;
/// Steps on a GPU from one reading of loss, deviation and gradients to the next.
const STEPS_PER_READING: usize = 10;
/// Its name in a stage's output folder.
const NAME: &str = "state.safetensors";

/// How long a run is and when it saves or stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Passes over the images.
    pub epochs: usize,
    /// Steps of one pass, from [`sampler::steps`](crate::sampler::steps).
    pub steps_per_epoch: usize,
    /// Images of one step.
    pub batch_size: usize,
    /// Epochs between checkpoints.
    pub save_every: usize,
    /// Stops the run when the deviation of the target's unit-length projections falls below this.
    pub collapse_deviation: f64,
}

impl Plan {
    /// Pictures of all steps together, each counted as often as it comes.
    pub fn pictures(&self) -> f64 {
        (self.epochs * self.steps_per_epoch * self.batch_size) as f64
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    ///
    /// No epoch, no epoch between checkpoints, or a deviation that is not a number from 0.
    pub fn check(&self) -> Result<()> {
        ensure!(self.epochs > 0, "epochs = 0: at least 1 is needed");
        ensure!(self.save_every > 0, "save-every = 0: at least 1 epoch lies between checkpoints");
        ensure!(
            self.collapse_deviation.is_finite() && self.collapse_deviation >= 0.,
            "collapse-deviation = {}: it must be a number that is not negative",
            self.collapse_deviation
        );
        Ok(())
    }
}

/// A training run: where it stands, what it logs, when it saves.
pub struct Run<'a> {
    job: &'a Job,
    plan: Plan,
    /// What the state must agree with to be this run's, as JSON with sorted keys.
    identity: String,
    /// Epochs done.
    epochs: usize,
    /// Steps done, over all epochs.
    steps: usize,
    /// Sum and count of what was noted in the epoch under way, by name.
    sums: BTreeMap<String, (f64, u64)>,
    kept: BTreeMap<String, NamedTensor>,
    saved_epochs: Option<usize>,
    epoch_began: Instant,
    steps_here: usize,
    progress: Progress,
}

impl<'a> Run<'a> {
    /// Begins at the state in the stage's output folder, or with `learner` as it is where there is
    /// none.
    ///
    /// - `table`: the stage's table of the experiment, resolved.
    /// - `fingerprint`: of the data set.
    ///
    /// # Errors
    ///
    /// The state there is damaged or belongs to another run; or `plan` is not usable.
    pub fn resume_or_start(
        job: &'a Job,
        table: &impl Serialize,
        fingerprint: &str,
        plan: Plan,
        learner: &mut impl Trained,
    ) -> Result<Self> {
        plan.check()?;
        let identity = json!({
            "fingerprint": fingerprint,
            "round": job.round,
            "rounds": job.rounds,
            "seed": job.seed,
            "stage": job.name,
            "table": serde_json::to_value(table)?,
        })
        .to_string();
        let progress = Progress::new(job.name, (plan.epochs * plan.steps_per_epoch) as u64);
        let mut run = Self {
            job,
            plan,
            identity,
            epochs: 0,
            steps: 0,
            sums: BTreeMap::new(),
            kept: BTreeMap::new(),
            saved_epochs: None,
            epoch_began: Instant::now(),
            steps_here: 0,
            progress,
        };
        if job.out.join(NAME).exists() {
            run.resume(learner)?;
            tracing::info!("going on from epoch {}, step {}", run.epochs, run.steps);
            run.forget_later_log_lines()?;
        } else {
            job.clear_log()?;
        }
        Ok(run)
    }

    /// The epoch to do now, from 0; `None` when all are done.
    pub fn next_epoch(&mut self) -> Option<usize> {
        self.epoch_began = Instant::now();
        self.steps_here = 0;
        (self.epochs < self.plan.epochs).then_some(self.epochs)
    }

    /// Batches of this epoch that are done already: 0, but for a resumed epoch.
    pub fn batches_done(&self) -> usize {
        self.steps - self.epochs * self.plan.steps_per_epoch
    }

    /// Number of the step under way, over all epochs, from 1.
    pub fn step(&self) -> usize {
        self.steps + 1
    }

    /// Adds `value` to what the log says of this epoch: the mean over its notes of that name.
    pub fn note(&mut self, name: &str, value: f64) {
        let (sum, count) = self.sums.entry(name.to_owned()).or_insert((0., 0));
        *sum += value;
        *count += 1;
    }

    /// Notes a scalar that a device computed; on a GPU, of every tenth step.
    ///
    /// # Errors
    ///
    /// It is no scalar of f32, or the device fails.
    pub fn note_scalar(&mut self, name: &str, scalar: &Tensor) -> Result<()> {
        if self.reads(scalar.device()) {
            self.note(name, f64::from(scalar.to_scalar::<f32>()?));
        }
        Ok(())
    }

    /// Notes the loss of this step, a scalar; or that of each direction, as the log has the mean.
    /// On a GPU, of every tenth step.
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

    /// Notes the deviation of projections `(N, P)`, made unit-length here: the root of their
    /// variance over the images, averaged over the P directions. It is at most `1/√P`, and 0 when
    /// all images have the same projection.
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
            return Err(self.diverged("the target's projection is not finite"));
        }
        if deviation < self.plan.collapse_deviation {
            return Err(Diverged(format!(
                "the projections collapsed at {}: their deviation is {deviation:.2e}, below \
                 collapse-deviation = {:.2e}; {}; a higher target-decay, a lower \
                 peak-learning-rate or milder views are the usual cures",
                self.place(),
                self.plan.collapse_deviation,
                self.last_checkpoint()
            ))
            .into());
        }
        self.note("deviation", deviation);
        Ok(())
    }

    /// Looks through the gradients of this step, before the optimizer takes them.
    ///
    /// # Errors
    ///
    /// One is not finite: [`Diverged`], with epoch, step and parameter.
    pub fn check_gradients(&self, online: &Online) -> Result<()> {
        if !self.reads(&online.backbone.network().device()) {
            return Ok(());
        }
        self.refuse_gradient(online.first_gradient_not_finite()?)
    }

    /// Whether this step reads back what `device` computed. A GPU stands still while the host
    /// waits for a number, so that there every tenth step does, and the first one of each epoch;
    /// what they let pass in between is found by the next one, and by every save.
    fn reads(&self, device: &Device) -> bool {
        device.is_cpu() || self.batches_done().is_multiple_of(STEPS_PER_READING)
    }

    /// Stops the run at a gradient that is not finite.
    ///
    /// - `not_finite`: the first such parameter, as `<segment>.<parameter>`, if there is one.
    ///
    /// # Errors
    ///
    /// There is: [`Diverged`], with epoch, step and parameter.
    pub fn refuse_gradient(&self, not_finite: Option<String>) -> Result<()> {
        match not_finite {
            None => Ok(()),
            Some(name) => Err(self.diverged(&format!("the gradient of `{name}` is not finite"))),
        }
    }

    /// Keeps a tensor of the stage's own in the state, under `name`.
    pub fn keep(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        let tensor = NamedTensor { name: format!("{STAGE}{name}"), shape: shape.to_vec(), values };
        self.kept.insert(name.to_owned(), tensor);
    }

    /// Keeps nothing under `name` from now on.
    pub fn drop_kept(&mut self, name: &str) {
        self.kept.remove(name);
    }

    /// What was kept under `name`, also by the run that this one goes on from.
    pub fn kept(&self, name: &str) -> Option<&[f32]> {
        self.kept.get(name).map(|tensor| tensor.values.as_slice())
    }

    /// Ends a step. When the program was asked to stop, the run is saved first.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], or the state cannot be written.
    pub fn end_step(&mut self, learner: &impl Trained) -> Result<()> {
        self.steps += 1;
        self.steps_here += 1;
        let loss = self.mean("loss").map(|loss| format!("loss {loss:.4}")).unwrap_or_default();
        self.progress.at(self.steps as u64, &loss);
        if self.job.interrupt.is_raised() {
            self.save(learner)?;
            return Err(Interrupted.into());
        }
        Ok(())
    }

    /// Ends an epoch: a line in the log, and a checkpoint when one is due.
    ///
    /// # Errors
    ///
    /// Log or state cannot be written, or a parameter is not finite.
    pub fn end_epoch(&mut self, learner: &impl Trained) -> Result<()> {
        self.epochs += 1;
        self.log_epoch()?;
        self.sums.clear();
        if self.epochs.is_multiple_of(self.plan.save_every) || self.epochs == self.plan.epochs {
            self.save(learner)?;
        }
        Ok(())
    }

    /// Writes what the run was for: `config.json`, `backbone.safetensors`, `network.safetensors`,
    /// and the last state, with momenta and step but without the networks.
    ///
    /// - `configuration`: what the network is built from again, such as a
    ///   [`Configuration`](backbone::Configuration).
    ///
    /// # Errors
    ///
    /// A file cannot be written, or a parameter is not finite.
    pub fn finish(&self, learner: &impl Trained, configuration: &impl Serialize) -> Result<()> {
        self.check_parameters(learner)?;
        let out = &self.job.out;
        backbone::write_configuration(out, configuration)?;
        backbone_file::write(out, learner.exported())?;
        network_file::write_tensors(out, &networks(learner)?)?;
        self.write_state(learner, true)
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
            "{what} at {}; {}; a lower peak-learning-rate is the usual cure",
            self.place(),
            self.last_checkpoint()
        ))
        .into()
    }

    fn save(&mut self, learner: &impl Trained) -> Result<()> {
        self.check_parameters(learner)?;
        self.write_state(learner, false)?;
        self.saved_epochs = Some(self.epochs);
        Ok(())
    }

    fn check_parameters(&self, learner: &impl Trained) -> Result<()> {
        for (prefix, segment) in learner.segments() {
            if let Some(name) = segment.first_non_finite()? {
                return Err(self.diverged(&format!("`{prefix}.{name}` is not finite")));
            }
        }
        Ok(())
    }

    fn write_state(&self, learner: &impl Trained, finished: bool) -> Result<()> {
        let mut tensors = learner.memory()?;
        if !finished {
            tensors.extend(networks(learner)?);
        }
        let views: Vec<_> =
            tensors.iter().chain(self.kept.values()).map(NamedTensor::as_f32).collect();
        let header = Header::from([
            ("identity".into(), self.identity.clone().into()),
            ("epochs".into(), self.epochs.into()),
            ("steps".into(), self.steps.into()),
            ("sums".into(), json!(self.sums.iter().map(as_bits).collect::<BTreeMap<_, _>>())),
            ("finished".into(), finished.into()),
        ]);
        container::write(&self.job.out.join(NAME), KIND, VERSION, header, &views)
    }

    fn resume(&mut self, learner: &mut impl Trained) -> Result<()> {
        let out = &self.job.out;
        let state = Container::open(&out.join(NAME), KIND, VERSION)?;
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
        for (prefix, segment) in learner.segments_mut() {
            network_file::fill(network, prefix, segment)?;
        }
        learner.take_up_variables(network)?;
        learner.take_up_memory(&state)?;
        for name in state.names().filter_map(|name| name.strip_prefix(STAGE)) {
            let full = format!("{STAGE}{name}");
            self.keep(name, state.shape(&full)?, state.f32(&full)?);
        }
        Ok(())
    }

    /// Drops log lines of epochs behind the checkpoint that a killed run had written: they come
    /// again.
    fn forget_later_log_lines(&self) -> Result<()> {
        let path = self.job.out.join("log.jsonl");
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let is_kept = |line: &&str| {
            serde_json::from_str::<Value>(line).is_ok_and(|value| {
                value.get("epoch").and_then(Value::as_u64).is_none_or(|e| e <= self.epochs as u64)
            })
        };
        let kept: String = text.lines().filter(is_kept).map(|line| format!("{line}\n")).collect();
        if kept == text { Ok(()) } else { stage::files::write(&path, kept.as_bytes()) }
    }
}

/// A sum as its bits: a fraction written as decimals may come back as its neighbour.
fn as_bits((name, (sum, count)): (&String, &(f64, u64))) -> (String, (u64, u64)) {
    (name.clone(), (sum.to_bits(), *count))
}

const STAGE: &str = "stage.";

/// Everything that goes into `network.safetensors`.
fn networks(learner: &impl Trained) -> Result<Vec<NamedTensor>> {
    let mut tensors = Vec::new();
    for (prefix, segment) in learner.segments() {
        tensors.extend(network_file::tensors(prefix, segment)?);
    }
    tensors.extend(learner.variables()?);
    Ok(tensors)
}

impl Learner {
    /// Takes the momenta out of the state that a finished run left in `folder`, so that one
    /// optimizer spans several rounds.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network.
    pub fn take_up_momenta(&mut self, folder: &Path) -> Result<()> {
        self.take_up_memory(&Container::open(&folder.join(NAME), KIND, VERSION)?)
    }
}

/// What the state that a finished run left in `folder` keeps under `name` for its stage.
///
/// # Errors
///
/// The file is missing or damaged, or keeps nothing of that name.
pub fn kept_in(folder: &Path, name: &str) -> Result<Vec<f32>> {
    Container::open(&folder.join(NAME), KIND, VERSION)?.f32(&format!("{STAGE}{name}"))
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
    use candle_core::Device::Cpu;
    use stage::DataTable;

    use super::*;
    use crate::Precision;
    use crate::learner::tests::{learner, pictures, tiny};
    use crate::loss::regression_loss;

    const PLAN: Plan = Plan {
        epochs: 3,
        steps_per_epoch: 2,
        batch_size: 6,
        save_every: 2,
        collapse_deviation: 1e-4,
    };

    fn job(out: &Path) -> Job {
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
        Job::new("example", "i.safetensors", out, data)
    }

    /// A whole run, or what is left of it; without `finish` when it is killed or stopped before
    /// this step of this call.
    fn train(out: &Path, kill_at: Option<usize>, stop_at: Option<usize>) -> Result<()> {
        let job = job(out);
        let mut learner = learner(4)?;
        let mut run = Run::resume_or_start(&job, &"table", "images", PLAN, &mut learner)?;
        let mut done = 0;
        while let Some(epoch) = run.next_epoch() {
            for batch in run.batches_done()..2 {
                if kill_at == Some(done) {
                    return Ok(());
                }
                let number = (10 * epoch + batch) as u64;
                let projection = learner.target.project(&pictures(2 * number)?)?;
                run.note_projections(&projection)?;
                let pass = learner.online.forward(&pictures(2 * number + 1)?, None)?;
                let loss = regression_loss(pass.prediction(), &projection)?;
                run.note_loss(&loss)?;
                learner.online.backward(pass, &loss.backward()?)?;
                run.check_gradients(&learner.online)?;
                learner.optimizer.step(&mut learner.online, 0.05)?;
                learner.target.follow(&learner.online, 0.9)?;
                run.keep("step", &[1], vec![run.step() as f32]);
                done += 1;
                run.end_step(&learner)?;
                if stop_at == Some(done) {
                    return run.save(&learner);
                }
            }
            run.end_epoch(&learner)?;
        }
        run.finish(&learner, &tiny())
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
    fn the_next_round_takes_up_momenta_and_what_was_kept() -> Result<()> {
        let folder = tempfile::tempdir()?;
        train(folder.path(), None, None)?;
        assert_eq!(kept_in(folder.path(), "step")?, [6.]);
        assert!(kept_in(folder.path(), "else").is_err());
        let groups = crate::Groups::byol(0.9, 0., 1.)?;
        let mut next = Learner::open(folder.path(), &tiny(), groups, Precision::F32)?;
        let before = next.memory()?;
        next.take_up_momenta(folder.path())?;
        assert!(next.memory()? != before);
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
            for word in words.iter().chain(&["epoch 1, step 1", "usual cure"]) {
                assert!(error.to_string().contains(word), "{word} is not in: {error}");
            }
        };
        check(run.note_loss(&Tensor::new(f32::NAN, &Cpu)?), &["the loss is NaN"]);
        check(run.note_projections(&Tensor::new(&[[3f32, 4.], [6., 8.]], &Cpu)?), &["collapsed"]);
        check(
            run.note_projections(&Tensor::zeros((3, 2), candle_core::DType::F32, &Cpu)?),
            &["collapsed"],
        );
        check(
            run.note_projections(&Tensor::new(&[[f32::NAN, 4.], [6., 8.]], &Cpu)?),
            &["projection"],
        );
        run.note_projections(&Tensor::new(&[[3f32, 4.], [-8., 6.]], &Cpu)?)?;
        run.check_gradients(&learner.online)?;

        let pass = learner.online.forward(&pictures(1)?, None)?;
        let loss = (pass.prediction().sum_all()? * f64::NAN)?;
        learner.online.backward(pass, &loss.backward()?)?;
        check(run.check_gradients(&learner.online), &["gradient of `online."]);
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
