//! A run: checks the steps of a plan for one seed, and runs each.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::json;
use stage::finished::{self, Digests};
use stage::{DeviceChoice, Effort, Interrupt, Origin, Role, files, progress};

use crate::advice::Advice;
use crate::jobs::MachineShare;
use crate::key::{self, StoreKey, Surroundings};
use crate::plan::{Arm, Step, StepInput};
use crate::process::{MessageTo, Process};
use crate::record::{RecordedStep, RunRecord};
use crate::setup::Setup;
use crate::store::{self, StepState, Store};

/// All steps of one seed, with the key of each.
#[derive(Debug)]
pub struct ExperimentRun<'a> {
    /// Seed of every random draw.
    pub seed: u64,
    setup: &'a Setup<'a>,
    keys: Vec<StoreKey>,
    store: Store,
    /// `runs/<experiment>/<seed>`, where the views are.
    folder: PathBuf,
    /// For each step, the key of its last result by the run that this one replaces.
    earlier: Vec<Option<String>>,
}

impl<'a> ExperimentRun<'a> {
    /// The run of a plan. Its data must be prepared.
    pub fn new(seed: u64, setup: &'a Setup) -> Result<Self> {
        let labels = setup.prepared.labels_identity()?;
        let surroundings = Surroundings {
            seed,
            machine: key::machine(setup.device, setup.session.registry.devices.features),
            images: setup.prepared.images_identity()?,
        };
        let mut keys: Vec<StoreKey> = Vec::with_capacity(setup.plan.steps.len());
        for step in &setup.plan.steps {
            setup.session.interrupt.check()?;
            let identity = |input: &StepInput| match input {
                StepInput::Step(position) => keys[*position].to_string(),
                StepInput::Labels => labels.clone(),
            };
            let mut inputs: BTreeMap<&str, String> =
                step.inputs.iter().map(|(role, input)| (*role, identity(input))).collect();
            let program = setup.programs.get(&step.program);
            let experiment = setup.plan.experiment(step.arm);
            let stages = &setup.session.registry.stages;
            if let Some(stage) = stages.iter().find(|stage| stage.spec.name == step.program)
                && let Some(outside) = stage
                    .identity(experiment, &setup.session.interrupt)
                    .with_context(|| format!("{}: nothing was started", step.name()))?
            {
                inputs.insert("outside", outside);
            }
            keys.push(StoreKey::of_step(step, experiment, program, &surroundings, inputs));
        }
        let store = Store::of_steps(&setup.runs);
        let folder = setup.experiment_folder().join(seed.to_string());
        let replaced = RunRecord::read(&folder).ok();
        let earlier = setup.plan.steps.iter().zip(&keys).map(|(step, key)| {
            replaced.as_ref()?.earlier_than(key.name(), &step.name(), &store).map(str::to_owned)
        });
        let earlier = earlier.collect();
        Ok(Self { seed, setup, keys, store, folder, earlier })
    }

    /// The state of the step at `position`.
    pub fn state(&self, position: usize) -> StepState {
        self.store.state(self.keys[position].name())
    }

    /// Whether the folder of this run records these results for the steps at `positions`, finished or not.
    pub fn is_recorded(&self, positions: &[usize]) -> bool {
        let record = RunRecord::read(&self.folder).ok();
        positions.iter().all(|&position| {
            let (name, key) = (self.setup.plan.steps[position].name(), self.keys[position].name());
            let mut steps = record.iter().flat_map(|record| &record.steps);
            steps.any(|step| step.name == name && step.key == key)
        })
    }

    /// Runs the program of every unfinished step with `--check` on the inputs that exist, so that
    /// errors in a table are found before the first step starts.
    ///
    /// - `fresh`: check finished steps too.
    pub fn check(&self, positions: &[usize], fresh: bool) -> Result<()> {
        let mut checked = BTreeSet::new();
        let mut failed = Vec::new();
        // Each message once, with the steps that gave it: one wrong value may concern many.
        let mut messages: Vec<(String, Vec<String>)> = Vec::new();
        for &position in positions {
            let step = &self.setup.plan.steps[position];
            let is_done = self.state(position) == StepState::Done;
            if is_done && !fresh || !checked.insert((step.arm, &step.program)) {
                continue;
            }
            self.interrupt().check()?;
            if let Err(error) = self.start_check(position) {
                if error.is::<stage::Interrupted>() {
                    return Err(error);
                }
                let (name, text) = (step.name(), format!("{error:#}"));
                match text.strip_prefix(&format!("{}: ", check_name(&name))) {
                    Some(message) => match messages.iter_mut().find(|(text, _)| text == message) {
                        Some((_, steps)) => steps.push(name),
                        None => messages.push((message.to_owned(), vec![name])),
                    },
                    None => messages.push((text, vec![])),
                }
                failed.push((step, error));
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        if self.setup.advice == Advice::Experiment {
            for (message, steps) in &messages {
                match &steps[..] {
                    [] => tracing::error!("{message}"),
                    steps => tracing::error!("{}: {message}", check_name(&steps.join(", "))),
                }
            }
        }
        let setup = self.setup;
        let files: Vec<_> =
            setup.experiment_files.values().map(|file| format!("`{}`", file.display())).collect();
        let experiment = setup.main().path.display().to_string();
        match &setup.advice {
            Advice::Experiment => bail!(
                "{} failed, the messages are above; nothing was started. The experiment is \
                 `{experiment}`; with --set and [control] it became {}",
                if failed.len() == 1 { "a check" } else { "checks" },
                files.join(", ")
            ),
            Advice::Cluster { .. } => {
                let advised = failed.into_iter().map(|(step, error)| {
                    let error = setup.advice.add_to(error, &step.program, setup.device);
                    format!("{error:#}")
                });
                bail!("{}", advised.collect::<Vec<_>>().join("; "))
            }
        }
    }

    /// The effort that the step's program declares; `None` if it declares none.
    pub fn declared_effort(&self, position: usize) -> Result<Option<Effort>> {
        self.start_check(position).map(|printed| Effort::of_check(&printed))
    }

    /// Runs the step's program with `--check` and returns its stdout.
    fn start_check(&self, position: usize) -> Result<String> {
        let is_done = |position| self.state(position) == StepState::Done;
        let mut arguments = self.arguments(position, is_done);
        arguments.push("--check".into());
        let name = check_name(&self.setup.plan.steps[position].name());
        let mut process = self.process(position, &name, &arguments);
        if let MessageTo::Stderr = process.message {
            process.message = MessageTo::NamedError;
        }
        process.printed()
    }

    /// Runs one of these steps, unless it is finished, and links its result.
    ///
    /// - `index`: its index in `positions`.
    /// - `fresh`: remove its earlier result first.
    /// - `share`: what it has of the machine.
    pub fn execute_step(
        &self,
        positions: &[usize],
        index: usize,
        fresh: bool,
        share: MachineShare,
    ) -> Result<()> {
        let (position, number, of) = (positions[index], index + 1, positions.len());
        let events = StepEvents { run: self, position, number, of, share };
        self.removing_damaged(self.execute_one(&events, fresh))
    }

    /// Calls [`Store::removing_damaged`] for all steps of the run.
    pub fn removing_damaged<T>(&self, result: Result<T>) -> Result<T> {
        let keys = self.keys.iter().map(StoreKey::name);
        self.store.removing_damaged(result, keys, self.interrupt())
    }

    /// Publishes this plan in the run's folder, where other commands read it.
    pub fn publish(&self) -> Result<()> {
        self.record().publish(&self.folder, &self.setup.runs, self.interrupt())
    }

    fn execute_one(&self, events: &StepEvents, fresh: bool) -> Result<()> {
        self.interrupt().check()?;
        let position = events.position;
        let step = &self.setup.plan.steps[position];
        let name = format!("{}, seed {}", step.name(), self.seed);
        let key = &self.keys[position];
        let folder = self.folder(position);
        let is_done = || -> Result<bool> {
            let is_done = self.state(position) == StepState::Done;
            if is_done {
                store::show(&self.view(position), &folder)?;
                tracing::info!("{name}: done already, `{}`", folder.display());
                events.send("done already");
            }
            Ok(is_done)
        };
        // A finished result is not claimed, because others may read it for hours.
        if !fresh && is_done()? {
            return Ok(());
        }
        let (claim, _inputs) = loop {
            self.repeat_removed_inputs(events)?;
            let claim = self.store.claim(key, self.interrupt())?;
            if !fresh && is_done()? {
                return Ok(());
            }
            if let Some(inputs) = self.hold_inputs(step)? {
                break (claim, inputs);
            }
        };
        if fresh {
            self.store.forget(key, &claim, self.interrupt())?;
        }
        let state = match self.state(position) {
            StepState::New => "starts",
            _ => "resumes",
        };
        let StepEvents { number, of, .. } = events;
        tracing::info!("{name}: {state}, step {number} of {of}, `{}`", folder.display());
        events.send(state);
        fs::create_dir_all(&folder).with_context(|| format!("creating `{}`", folder.display()))?;
        if !self.setup.programs.get(&step.program).is_own() {
            // Our own programs remove leftovers of a killed process; foreign ones may not.
            files::remove_unfinished(&folder)?;
            finished::prepare_to_resume(&folder)?;
        }
        store::show(&self.view(position), &folder)?;
        let begin = Instant::now();
        let arguments = self.arguments(position, |_| true);
        let mut process = self.process(position, &name, &arguments);
        if events.share.is_named {
            // What several steps print cannot be told apart.
            process.message = MessageTo::NamedError;
        }
        let ended = process.run_in(&folder, claim.file(), events.share);
        let Setup { advice, device, .. } = self.setup;
        ended.map_err(|error| advice.add_to(error, &step.program, *device))?;
        if !finished::is_finished(&folder) {
            // Exit status 0 means done; a foreign program need not write the mark.
            finished::mark(&folder, step.place.name, None, Digests::Listed)?;
        }
        tracing::info!("{name}: done in {:.1} s", begin.elapsed().as_secs_f64());
        events.send("done");
        Ok(())
    }

    /// The role and the folder of the same step of the run that this one replaces, where the stage
    /// makes use of it.
    fn earlier_result(&self, position: usize) -> Option<(&'static str, PathBuf)> {
        let step = &self.setup.plan.steps[position];
        // Another program in that place need not know the role.
        if step.program != step.place.name {
            return None;
        }
        let reads = |role: &&Role| role.origin == Origin::EarlierRun;
        let role = step.place.inputs.iter().find(reads)?;
        let folder = self.store.path(self.earlier[position].as_ref()?);
        folder.exists().then_some((role.name, folder))
    }

    /// Runs the steps again that this one needs and that another command has removed since; waits while
    /// it is at them.
    fn repeat_removed_inputs(&self, events: &StepEvents) -> Result<()> {
        for position in input_steps(&self.setup.plan.steps[events.position]) {
            if self.state(position) != StepState::Done {
                let input = self.setup.plan.steps[position].name();
                tracing::warn!("{input}: another command removed it; running it again");
                self.execute_one(&StepEvents { position, ..*events }, false)?;
            }
        }
        Ok(())
    }

    /// Prevents the removal of the step's inputs while it runs; `None` if one is missing.
    fn hold_inputs(&self, step: &Step) -> Result<Option<Vec<store::Hold>>> {
        let hold = |position: usize| {
            self.store.hold_if_finished(self.keys[position].name(), self.interrupt())
        };
        let held = input_steps(step).map(hold).collect::<Result<Vec<_>>>()?;
        Ok(held.into_iter().collect())
    }

    fn process<'b>(
        &'b self,
        position: usize,
        name: &'b str,
        arguments: &'b [OsString],
    ) -> Process<'b> {
        let program = self.setup.programs.get(&self.setup.plan.steps[position].program);
        let (interrupt, message) = (self.interrupt(), self.setup.advice.message());
        Process { name, program, arguments, interrupt, message }
    }

    /// The record that `report`, `predict` and `clusters` read.
    fn record(&self) -> RunRecord {
        let steps = self.setup.plan.steps.iter().zip(&self.keys).zip(&self.earlier);
        let steps = steps.map(|((step, key), earlier)| RecordedStep {
            name: step.name(),
            place: step.place.name.to_owned(),
            round: step.round,
            is_main: step.arm == Arm::Main,
            key: key.to_string(),
            earlier: earlier.clone(),
        });
        let file = self.setup.main_file().file_name().unwrap_or_default();
        let data = self.setup.prepared.key.to_string();
        RunRecord::new(file.to_string_lossy().into_owned(), self.seed, data, steps.collect())
    }

    fn interrupt(&self) -> &Interrupt {
        &self.setup.session.interrupt
    }

    /// The view of a step's result.
    pub fn view(&self, position: usize) -> PathBuf {
        self.folder.join(self.setup.plan.steps[position].name())
    }

    /// The folder of a step's result.
    pub fn folder(&self, position: usize) -> PathBuf {
        self.store.path(self.keys[position].name())
    }

    /// The name of a step's result in the store.
    pub fn key(&self, position: usize) -> &str {
        self.keys[position].name()
    }

    /// The row of a step.
    pub fn arm(&self, position: usize) -> Arm {
        self.setup.plan.steps[position].arm
    }

    /// The steps whose results a step reads.
    pub fn inputs(&self, position: usize) -> impl Iterator<Item = usize> {
        input_steps(&self.setup.plan.steps[position])
    }

    /// Whether two steps share one result.
    pub fn is_shared(&self, one: usize, other: usize) -> bool {
        self.keys[one] == self.keys[other]
    }

    /// The first unfinished step that this one needs.
    pub fn missing_input(&self, position: usize) -> Option<&'a Step> {
        let plan = self.setup.plan;
        let missing = |input: &usize| self.state(*input) != StepState::Done;
        input_steps(&plan.steps[position]).find(missing).map(|input| &plan.steps[input])
    }

    /// The command line of a step, for display.
    pub fn command_line(&self, position: usize) -> String {
        let program = self.setup.programs.get(&self.setup.plan.steps[position].program);
        let arguments = self.arguments(position, |_| true);
        let arguments = arguments.iter().map(|word| word.to_string_lossy().into_owned());
        program.typed().into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
    }

    /// The arguments of a step, with the inputs that satisfy `wanted`.
    fn arguments(&self, position: usize, wanted: impl Fn(usize) -> bool) -> Vec<OsString> {
        let step = &self.setup.plan.steps[position];
        let folder = |input: &StepInput| match input {
            StepInput::Step(position) if !wanted(*position) => None,
            StepInput::Step(position) => Some(self.folder(*position)),
            StepInput::Labels => Some(self.setup.prepared.folder.clone()),
        };
        let inputs = step.inputs.iter().filter_map(|(role, input)| Some((*role, folder(input)?)));
        let inputs = inputs.chain(self.earlier_result(position));
        let call = Call {
            experiment: &self.setup.experiment_files[&step.arm],
            images: &self.setup.prepared.images(),
            round: step.round,
            rounds: step.rounds,
            seed: self.seed,
            device: self.setup.device,
        };
        call.arguments(inputs, &self.folder(position))
    }
}

/// What messages call the check of a step, or of several.
fn check_name(steps: &str) -> String {
    format!("the check of {steps}")
}

/// The steps whose results a step reads.
fn input_steps(step: &Step) -> impl Iterator<Item = usize> {
    step.inputs.iter().filter_map(|(_, input)| match input {
        StepInput::Step(position) => Some(*position),
        StepInput::Labels => None,
    })
}

/// A step among those that a command runs, for programs that follow its progress.
struct StepEvents<'a> {
    run: &'a ExperimentRun<'a>,
    position: usize,
    /// From 1.
    number: usize,
    of: usize,
    share: MachineShare,
}

impl StepEvents<'_> {
    fn send(&self, state: &str) {
        progress::event(&json!({
            "event": "step",
            "name": self.run.setup.plan.steps[self.position].name(),
            "seed": self.run.seed,
            "number": self.number,
            "of": self.of,
            "state": state,
        }));
    }
}

/// The arguments of a stage besides its inputs and output.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Its experiment file.
    pub experiment: &'a Path,
    /// The prepared pictures.
    pub images: &'a Path,
    /// The round, from 0.
    pub round: usize,
    /// How many rounds follow round 0.
    pub rounds: usize,
    /// Seed of every random draw.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceChoice,
}

impl Call<'_> {
    /// The command line of a stage that reads `inputs`, folders by role, and writes to `out`.
    pub fn arguments(
        &self,
        inputs: impl IntoIterator<Item = (&'static str, PathBuf)>,
        out: &Path,
    ) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |flag: &str, value: OsString| arguments.extend([flag.into(), value]);
        add("--experiment", self.experiment.into());
        add("--images", self.images.into());
        for (role, folder) in inputs {
            let mut value = OsString::from(format!("{role}="));
            value.push(folder);
            add("--in", value);
        }
        add("--out", out.into());
        add("--round", self.round.to_string().into());
        add("--rounds", self.rounds.to_string().into());
        add("--seed", self.seed.to_string().into());
        add("--device", self.device.to_string().into());
        arguments
    }
}
