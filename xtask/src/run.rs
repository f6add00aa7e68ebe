//! A run: the steps of a plan for one seed, checked, then started one after another.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cost;
use crate::interrupt;
use crate::key::{self, Key, Surroundings};
use crate::plan::{Arm, Input, Plan, Step};
use crate::prepared::Prepared;
use crate::programs::{Program, Programs};
use crate::status::Stop;
use crate::store::{self, DONE, State, Store};

/// All steps of one seed, with the key of each.
#[derive(Debug)]
pub struct Run<'a> {
    /// Seed of every random draw.
    pub seed: u64,
    plan: &'a Plan,
    programs: &'a Programs,
    data: &'a Prepared,
    device: &'a str,
    experiment_files: &'a BTreeMap<Arm, PathBuf>,
    keys: Vec<Key>,
    store: Store,
    /// `runs/<experiment>/<seed>`, where the views are.
    views: PathBuf,
}

impl<'a> Run<'a> {
    /// The run of a plan on prepared data.
    pub fn new(
        seed: u64,
        plan: &'a Plan,
        programs: &'a Programs,
        data: &'a Prepared,
        device: &'a str,
        experiment_files: &'a BTreeMap<Arm, PathBuf>,
        runs: &Path,
    ) -> Result<Self> {
        let images = data.images_identity()?;
        let labels = data.labels_identity()?;
        let surroundings = Surroundings { seed, device: device.to_owned(), images };
        let mut keys: Vec<Key> = Vec::with_capacity(plan.steps.len());
        for step in &plan.steps {
            let identity = |input: &Input| match input {
                Input::Step(position) => keys[*position].to_string(),
                Input::Labels => labels.clone(),
            };
            let inputs = step.inputs.iter().map(|(role, input)| (*role, identity(input))).collect();
            let program = programs.get(&step.program);
            let experiment = plan.experiment(step.arm);
            keys.push(Key::of_step(step, experiment, program, &surroundings, inputs));
        }
        let store = Store::new(runs.join(".store"));
        let views = runs.join(&plan.experiment(Arm::Main).name).join(seed.to_string());
        Ok(Self { seed, plan, programs, data, device, experiment_files, keys, store, views })
    }

    /// How far the step at `position` has come.
    pub fn state(&self, position: usize) -> State {
        self.store.state(&self.keys[position])
    }

    /// Forgets the results of these steps.
    pub fn forget(&self, positions: impl IntoIterator<Item = usize>) -> Result<()> {
        positions.into_iter().try_for_each(|position| self.store.forget(&self.keys[position]))
    }

    /// Runs every program that is not done with `--check`, on the inputs that exist: whatever is
    /// wrong with a table is found before the first step starts.
    pub fn check(&self, positions: impl IntoIterator<Item = usize>) -> Result<()> {
        let mut checked = BTreeSet::new();
        let mut failed = Vec::new();
        for position in positions {
            let step = &self.plan.steps[position];
            let file = &self.experiment_files[&step.arm];
            if self.state(position) == State::Done || !checked.insert((file, &step.program)) {
                continue;
            }
            let mut arguments =
                self.arguments(position, |position| self.state(position) == State::Done);
            arguments.push("--check".into());
            let program = self.programs.get(&step.program);
            let status = command(program, &arguments).stdout(Stdio::null()).status();
            let status = status.with_context(|| starting(program))?;
            if !status.success() {
                failed.push(step.name());
            }
        }
        interrupt::check()?;
        if failed.is_empty() {
            return Ok(());
        }
        let files: Vec<_> =
            self.experiment_files.values().map(|file| format!("`{}`", file.display())).collect();
        bail!(
            "the check of {} failed, the messages are above; nothing was started. The experiment \
             is `{}`; with --set and [control] it became {}",
            failed.join(", "),
            self.plan.experiment(Arm::Main).path.display(),
            files.join(", ")
        )
    }

    /// The pictures that the step's program says it will pass through a backbone; nothing where it
    /// does not say.
    pub fn declared_effort(&self, position: usize) -> Result<Option<f64>> {
        let mut arguments =
            self.arguments(position, |position| self.state(position) == State::Done);
        arguments.push("--check".into());
        let program = self.programs.get(&self.plan.steps[position].program);
        let output = command(program, &arguments).stderr(Stdio::inherit()).output();
        let output = output.with_context(|| starting(program))?;
        if !output.status.success() {
            bail!("the check of {} failed, its message is above", self.plan.steps[position].name())
        }
        let told: Option<toml::Table> =
            std::str::from_utf8(&output.stdout).ok().and_then(|text| text.parse().ok());
        Ok(told.and_then(|told| told.get("backbone-pictures")?.as_float()))
    }

    /// Runs these steps in order; what is done already is linked.
    pub fn execute(&self, positions: impl IntoIterator<Item = usize>) -> Result<()> {
        positions.into_iter().try_for_each(|position| self.execute_one(position))
    }

    fn execute_one(&self, position: usize) -> Result<()> {
        interrupt::check()?;
        let step = &self.plan.steps[position];
        let name = format!("{}, seed {}", step.name(), self.seed);
        let key = &self.keys[position];
        let folder = self.store.path(key);
        let _claim = self.store.claim(key)?;
        let before = self.state(position);
        fs::create_dir_all(&folder).with_context(|| format!("creating `{}`", folder.display()))?;
        store::show(&self.view(position), &folder)?;
        match before {
            State::Done => {
                tracing::info!("{name}: done already, `{}`", folder.display());
                return Ok(());
            }
            State::Started => tracing::info!("{name}: goes on, `{}`", folder.display()),
            State::New => tracing::info!("{name}: starts, `{}`", folder.display()),
        }
        let begin = Instant::now();
        let program = self.programs.get(&step.program);
        start_in(&folder, &name, program, &self.arguments(position, |_| true))?;
        if !folder.join(DONE).exists() {
            // Exit status 0 says so; a foreign program need not know the mark.
            let mark = serde_json::json!({ "stage": step.place });
            fs::write(folder.join(DONE), format!("{mark}\n"))
                .with_context(|| format!("marking `{}` as finished", folder.display()))?;
        }
        tracing::info!("{name}: done in {:.1} s", begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// The view of a step's result.
    pub fn view(&self, position: usize) -> PathBuf {
        self.views.join(self.plan.steps[position].name())
    }

    /// The folder of a step's result.
    pub fn folder(&self, position: usize) -> PathBuf {
        self.store.path(&self.keys[position])
    }

    /// True when the results of two steps are one.
    pub fn is_shared(&self, one: usize, other: usize) -> bool {
        self.keys[one] == self.keys[other]
    }

    /// The first step that this one needs and that is not done.
    pub fn missing_input(&self, position: usize) -> Option<&'a Step> {
        let plan = self.plan;
        plan.steps[position].inputs.iter().find_map(|(_, input)| match input {
            Input::Step(input) if self.state(*input) != State::Done => Some(&plan.steps[*input]),
            _ => None,
        })
    }

    /// The command of a step as a person would type it.
    pub fn command_line(&self, position: usize) -> String {
        let program = self.programs.get(&self.plan.steps[position].program);
        let arguments = self.arguments(position, |_| true);
        let arguments = arguments.iter().map(|word| word.to_string_lossy().into_owned());
        let file = [program.path.display().to_string()].into_iter();
        file.chain(program.words.clone()).chain(arguments).collect::<Vec<_>>().join(" ")
    }

    /// The arguments of a step, with those inputs that pass `wanted`.
    fn arguments(&self, position: usize, wanted: impl Fn(usize) -> bool) -> Vec<OsString> {
        let step = &self.plan.steps[position];
        let folder = |input: &Input| match input {
            Input::Step(position) if !wanted(*position) => None,
            Input::Step(position) => Some(self.folder(*position)),
            Input::Labels => Some(self.data.folder.clone()),
        };
        let inputs = step.inputs.iter().filter_map(|(role, input)| Some((*role, folder(input)?)));
        let call = Call {
            experiment: &self.experiment_files[&step.arm],
            images: &self.data.images(),
            round: step.round,
            rounds: step.rounds,
            seed: self.seed,
            device: self.device,
        };
        call.arguments(inputs, &self.folder(position))
    }
}

/// What a stage is told besides its inputs and where to write.
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
    pub device: &'a str,
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
        add("--device", self.device.into());
        arguments
    }
}

/// Writes the resolved experiment of each arm below `runs`, under a name that changes with its
/// contents: a run that takes hours is not changed by an edit of the file it began from.
pub fn write_experiments(plan: &Plan, runs: &Path) -> Result<BTreeMap<Arm, PathBuf>> {
    let mut files = BTreeMap::new();
    for (arm, experiment) in &plan.arms {
        let text =
            format!("# `{}`, resolved.\n{}", experiment.path.display(), experiment.to_toml());
        let digest = &key::digest(text.as_bytes())[..8];
        let path = runs.join(&experiment.name).join(format!("{arm}-{digest}.toml"));
        let write = || -> io::Result<()> {
            fs::create_dir_all(runs.join(&experiment.name))?;
            // Renamed into its place: another command may be reading the same experiment.
            let beside = path.with_extension(format!("{}.unfinished", std::process::id()));
            fs::write(&beside, &text)?;
            fs::rename(&beside, &path)
        };
        write().with_context(|| format!("writing the experiment `{}`", path.display()))?;
        files.insert(*arm, path);
    }
    Ok(files)
}

/// Starts a program that works in `folder`, waits for its end, and adds what it cost to what is kept
/// there.
fn start_in(folder: &Path, name: &str, program: &Program, arguments: &[OsString]) -> Result<()> {
    let began = Instant::now();
    let run = || {
        let mut child = command(program, arguments).stdout(io::stderr()).spawn()?;
        cost::watch(&mut child, began)
    };
    let (status, cost) = run().with_context(|| starting(program))?;
    cost.add_to(folder)?;
    ended(name, status)
}

/// Starts a program and waits for its end. What it prints goes to stderr: stdout is for results.
pub fn start(name: &str, program: &Program, arguments: &[OsString]) -> Result<()> {
    let status = command(program, arguments).stdout(io::stderr()).status();
    ended(name, status.with_context(|| starting(program))?)
}

/// Starts a program, waits for its end, and returns what it printed.
pub fn printed(name: &str, program: &Program, arguments: &[OsString]) -> Result<String> {
    let output = command(program, arguments).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| starting(program))?;
    ended(name, output.status)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn command(program: &Program, arguments: &[OsString]) -> Command {
    let mut command = Command::new(&program.path);
    command.args(&program.words);
    command.args(arguments).stdin(Stdio::null());
    command
}

fn starting(program: &Program) -> String {
    format!("starting the program `{}`; is it executable?", program.path.display())
}

/// What the exit status of the step `name` means for the run.
fn ended(name: &str, status: ExitStatus) -> Result<()> {
    match status.code() {
        Some(0) => Ok(()),
        Some(3) => Err(Stop::Interrupted.into()),
        Some(4) => Err(Stop::Diverged(name.to_owned()).into()),
        Some(code) => {
            bail!("{name} failed with exit status {code}; its message is above")
        }
        None if interrupt::seen() => Err(Stop::Interrupted.into()),
        None => bail!(
            "{name} was killed ({status}); what it saved is kept, and the same command goes on \
             from there"
        ),
    }
}
