//! `cargo xtask`: runs the stages of an experiment in order, and reports what they found.
//!
//! It starts programs and links none of them but the contract, `stage`; a stage is whatever answers to the arguments. From
//! the command line to the table: the [experiment](Experiment) says everything but the seed; the [`plan`]
//! says which steps that makes and what each is given; the [`programs`] are built or found; the
//! data are [`prepared`]; every step has a [`key`], under which its result is kept in the
//! [`store`]; the [`run`] checks all steps and starts those that are not done; the [`report`] is
//! the table at the end. What a run has left is [`finished`]; [`look`] makes a page of it.

mod bench;
mod clusters;
mod compare;
mod cost;
mod cuda_toolchain;
mod finished;
mod interrupt;
mod key;
mod look;
mod plan;
mod predict;
mod prepare;
mod prepared;
mod programs;
mod report;
mod run;
mod status;
mod store;

use std::collections::BTreeMap;
use std::env;
use std::io::IsTerminal;
use std::path::{Path, PathBuf, absolute};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::plan::{Arm, Plan};
use crate::prepared::Prepared;
use crate::programs::{PREPARE, Programs};
use crate::report::{Metrics, Outcome, Report};
use crate::run::Run;
use crate::store::State;
use stage::{Experiment, Library};

/// Runs the experiments of this workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs an experiment from pictures to scores; what is done already is not done again.
    Reproduce {
        #[command(flatten)]
        options: Options,
        /// Run the seeds 0 to N - 1.
        #[arg(long, value_name = "N", conflicts_with = "seed", value_parser = clap::value_parser!(u64).range(1..))]
        seeds: Option<u64>,
        /// Print, last, the results as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Brings pictures into the form that every stage reads, and prints the folder that holds them.
    Prepare {
        #[command(flatten)]
        options: prepare::Options,
    },
    /// Runs all systems on one data set, with equal backbone and effort, and prints one table.
    Compare {
        /// `experiment` is the data set's: its file is PLDC, `<experiment>-<system>.toml` another.
        #[command(flatten)]
        options: Options,
        #[command(flatten)]
        choices: compare::Choices,
    },
    /// Runs one step of an experiment, on what the steps before it left.
    Stage {
        /// What the step is for: prepare, or a place of the experiment's `[rounds]`, or metrics.
        place: String,
        #[command(flatten)]
        options: Options,
        /// Which round; the first that has this step when not given.
        #[arg(long, value_name = "T")]
        round: Option<usize>,
    },
    /// Sets up what building with `--features cuda,cudnn` needs, and prints the variables to set:
    /// eval "$(cargo xtask cuda-toolchain)".
    CudaToolchain {
        /// Where to keep it: about 3 GB.
        #[arg(long, value_name = "DIR", default_value = ".cuda")]
        folder: PathBuf,
        /// A Python with pip.
        #[arg(long, value_name = "PATH", default_value = "python3")]
        python: PathBuf,
        /// Compute capability of the card, without its point: 80 A100, 89 L4, 90 H100 and H200.
        #[arg(long, value_name = "N", default_value_t = 90)]
        capability: u32,
    },
    /// Times our programs, and other libraries beside them.
    Bench {
        #[command(flatten)]
        options: bench::Options,
    },
    /// Writes a finished run as a page to look at, a table, and folders of pictures.
    Report {
        #[command(flatten)]
        options: look::Options,
    },
    /// Tells which clusters other pictures belong to, by what a run has learnt.
    Predict {
        #[command(flatten)]
        options: predict::Options,
    },
    /// Guesses how many clusters a run's embeddings hold: a curve of scores without ground truth.
    /// RUN may also be the folder of an embed step.
    Clusters {
        #[command(flatten)]
        options: clusters::Options,
    },
    /// Names the experiments.
    List,
    /// Prints an experiment with every value as a run would use it.
    Show {
        /// Name of the experiment, or path of its file.
        experiment: String,
        /// Change a value: table.key=value.
        #[arg(long, value_name = "TABLE.KEY=VALUE")]
        set: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Options {
    /// Name of the experiment, or path of its file.
    experiment: String,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Seed of every random draw.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Change a value for this run: table.key=value; may be given several times.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    set: Vec<String>,
    /// Where the pictures are, instead of the experiment's own source.
    #[arg(long, value_name = "PATH")]
    images: Option<PathBuf>,
    /// Check everything and say what would run, but run nothing.
    #[arg(long)]
    dry_run: bool,
    /// Forget what these steps found before, and run them again.
    #[arg(long)]
    fresh: bool,
    /// Use the programs in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Build the programs with these features of cargo: cuda, cudnn, metal.
    #[arg(long, value_name = "LIST", conflicts_with = "programs")]
    features: Option<String>,
    /// Keep results in this folder.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    runs: PathBuf,
}

impl Options {
    /// Makes the paths absolute that are seen from where the user stands, before the program goes
    /// to the root of the workspace. `runs` is there, unless the user says otherwise.
    fn resolve_paths(&mut self) -> Result<()> {
        let paths = [self.images.as_mut(), self.programs.as_mut()];
        for path in paths.into_iter().flatten() {
            *path = prepared::absolute_source(path)?;
        }
        if self.runs != Path::new("runs") {
            self.runs = absolute(&self.runs)?;
        }
        self.experiment = absolute_experiment(&self.experiment)?;
        Ok(())
    }
}

/// The name of an experiment as it is, a path to one made absolute.
fn absolute_experiment(word: &str) -> Result<String> {
    match word.ends_with(".toml") || word.contains(['/', '\\']) {
        true => Ok(absolute(word)?.to_string_lossy().into_owned()),
        false => Ok(word.to_owned()),
    }
}

fn main() -> ExitCode {
    start_logging();
    match follow(CommandLine::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(status::of(&error))
        }
    }
}

fn follow(command: Command) -> Result<()> {
    match command {
        Command::Reproduce { mut options, seeds, json } => {
            options.resolve_paths()?;
            go_to_root()?;
            let seeds = seeds.map_or(vec![options.seed], |count| (0..count).collect());
            reproduce(&options, &seeds, json)
        }
        Command::Prepare { mut options } => {
            options.resolve_paths()?;
            go_to_root()?;
            interrupt::listen()?;
            prepare::run(&options)
        }
        Command::Compare { mut options, choices } => {
            options.resolve_paths()?;
            go_to_root()?;
            interrupt::listen()?;
            compare::run(&options, &choices)
        }
        Command::Stage { place, mut options, round } => {
            options.resolve_paths()?;
            go_to_root()?;
            stage(&options, &place, round)
        }
        Command::CudaToolchain { folder, python, capability } => {
            go_to_root()?;
            print!("{}", cuda_toolchain::set_up(&absolute(folder)?, &python, capability)?);
            Ok(())
        }
        Command::Bench { mut options } => {
            options.resolve_paths()?;
            go_to_root()?;
            interrupt::listen()?;
            bench::run(&options)
        }
        Command::Clusters { mut options } => {
            options.resolve_paths()?;
            go_to_root()?;
            clusters::run(&options)
        }
        Command::Report { mut options } => {
            options.resolve_paths()?;
            go_to_root()?;
            look::run(&options)
        }
        Command::Predict { mut options } => {
            options.resolve_paths()?;
            go_to_root()?;
            interrupt::listen()?;
            predict::run(&options)
        }
        Command::List => {
            go_to_root()?;
            list()
        }
        Command::Show { experiment, set } => {
            let experiment = absolute_experiment(&experiment)?;
            go_to_root()?;
            print!("{}", resolved(&experiment, &set)?.to_toml());
            Ok(())
        }
    }
}

/// Paths in experiments and messages are seen from the root of the workspace: the one that
/// `cargo xtask` was said in, which is not the one this program was built in where a checkout was
/// moved or copied with its build. Where this program was copied to a machine without a workspace,
/// the folder it is started in stands for the root, if the experiments are there.
fn go_to_root() -> Result<()> {
    let said_in = env::var_os("CARGO_MANIFEST_DIR");
    let built_in = Some(env!("CARGO_MANIFEST_DIR").into());
    let root = [said_in, built_in]
        .into_iter()
        .flatten()
        .map(|xtask| Path::new(&xtask).join(".."))
        .find(|root| root.join(stage::FOLDER).is_dir());
    if let Some(root) = root {
        return env::set_current_dir(&root)
            .with_context(|| format!("going to `{}`", root.display()));
    }
    ensure!(
        Path::new(stage::FOLDER).is_dir(),
        "there is no folder `{}` here; start this program in the folder that holds it",
        stage::FOLDER
    );
    Ok(())
}

fn reproduce(options: &Options, seeds: &[u64], json: bool) -> Result<()> {
    let begin = Instant::now();
    interrupt::listen()?;
    let experiment = resolved(&options.experiment, &options.set)?;
    let plan = Plan::of(&experiment)?;
    let all = 0..plan.steps.len();
    let bench = Bench::set_up(options, &plan)?;
    let Some(data) = bench.data()? else { return bench.say_what_would_run() };
    let runs = seeds.iter().map(|&seed| bench.run(seed, data)).collect::<Result<Vec<_>>>()?;

    if options.fresh && !options.dry_run {
        runs.iter().try_for_each(|run| run.forget(all.clone()))?;
    }
    runs.iter().try_for_each(|run| run.check(all.clone()))?;
    if options.dry_run {
        runs.iter().for_each(|run| say_what_would_run(&plan, run, all.clone()));
        return Ok(());
    }
    runs.iter().try_for_each(|run| run.execute(all.clone()))?;

    let report = Report {
        experiment: experiment.name.clone(),
        title: experiment.title()?,
        system: experiment.system()?,
        outcomes: runs.iter().map(|run| outcome(&plan, run)).collect::<Result<_>>()?,
        seconds: begin.elapsed().as_secs_f64(),
    };
    print!("{}", report.table());
    if json {
        println!("{}", report.json());
    }
    Ok(())
}

fn stage(options: &Options, place: &str, round: Option<usize>) -> Result<()> {
    interrupt::listen()?;
    let experiment = resolved(&options.experiment, &options.set)?;
    let plan = Plan::of(&experiment)?;
    let fits = |position: &usize| round.is_none_or(|round| plan.steps[*position].round == round);
    let position = plan.at(Arm::Main, place).find(fits);
    if position.is_none() && place != PREPARE {
        let steps = plan.steps.iter().filter(|step| step.arm == Arm::Main);
        let names: Vec<_> = steps.map(|step| step.name()).collect();
        bail!("`{}` has no such step; its steps are {}", experiment.name, names.join(", "))
    }
    let bench = Bench::set_up(options, &plan)?;
    let Some(data) = bench.data()? else { return bench.say_what_would_run() };
    let Some(position) = position else {
        println!("{}", data.folder.display());
        return Ok(());
    };
    let run = bench.run(options.seed, data)?;
    if let Some(missing) = run.missing_input(position) {
        bail!(
            "{} needs {}, which is not finished; run `cargo xtask stage {} {} --round {} --seed \
             {}` first",
            plan.steps[position].name(),
            missing.name(),
            missing.place,
            options.experiment,
            missing.round,
            options.seed
        )
    }
    if options.fresh && !options.dry_run {
        run.forget([position])?;
    }
    run.check([position])?;
    if options.dry_run {
        say_what_would_run(&plan, &run, [position]);
        return Ok(());
    }
    run.execute([position])?;
    println!("{}", run.view(position).display());
    Ok(())
}

fn list() -> Result<()> {
    let names = Library::default().names()?;
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    for name in names {
        let experiment = Library::default().open(&name)?;
        println!("{name:width$}  {:8} {}", experiment.system()?, experiment.title()?);
    }
    Ok(())
}

/// The experiment with the values that the command line changes.
fn resolved(experiment: &str, set: &[String]) -> Result<Experiment> {
    let mut experiment = Library::default().open(experiment)?;
    set.iter().try_for_each(|assignment| experiment.set(assignment))?;
    Ok(experiment)
}

/// What is ready before the first step: programs, resolved experiments, data.
struct Bench<'a> {
    options: &'a Options,
    plan: &'a Plan,
    programs: Programs,
    experiment_files: BTreeMap<Arm, PathBuf>,
    prepared: Prepared,
}

impl<'a> Bench<'a> {
    fn set_up(options: &'a Options, plan: &'a Plan) -> Result<Self> {
        let mut words = plan.programs();
        words.push(PREPARE);
        let programs = match &options.programs {
            Some(folder) => Programs::in_folder(&words, folder)?,
            None => Programs::build(&words, options.features.as_deref())?,
        };
        let experiment_files = run::write_experiments(plan, &options.runs)?;
        let prepared = Prepared::of(
            plan.experiment(Arm::Main),
            options.images.as_deref(),
            programs.get(PREPARE),
            &options.runs,
        )?;
        Ok(Self { options, plan, programs, experiment_files, prepared })
    }

    /// The data, prepared; nothing when they are not and nothing may run.
    fn data(&self) -> Result<Option<&Prepared>> {
        if self.options.dry_run {
            return Ok(self.prepared.is_done().then_some(&self.prepared));
        }
        let file = &self.experiment_files[&Arm::Main];
        let source = self.options.images.as_deref();
        self.prepared.make(file, source, self.programs.get(PREPARE), None)?;
        let view = self.options.runs.join(&self.plan.experiment(Arm::Main).name).join("data");
        store::show(&view, &self.prepared.folder)?;
        Ok(Some(&self.prepared))
    }

    fn run<'b>(&'b self, seed: u64, data: &'b Prepared) -> Result<Run<'b>> {
        let Self { options, plan, programs, experiment_files, .. } = self;
        Run::new(seed, plan, programs, data, &options.device, experiment_files, &options.runs)
    }

    /// The plan of a run whose data are not prepared yet, so that nothing has a key.
    fn say_what_would_run(&self) -> Result<()> {
        println!("prepare: runs, into {}", self.prepared.folder.display());
        println!("then every step is checked, and these run:");
        self.plan.steps.iter().for_each(|step| println!("{}", step.name()));
        Ok(())
    }
}

fn say_what_would_run(plan: &Plan, run: &Run, positions: impl IntoIterator<Item = usize>) {
    for position in positions {
        let what = match run.state(position) {
            State::New => "runs",
            State::Started => "goes on",
            State::Done => "is done",
        };
        println!("{}, seed {}: {what}", plan.steps[position].name(), run.seed);
        println!("  {}", run.command_line(position));
    }
}

/// Reads what the steps of one seed found.
fn outcome(plan: &Plan, run: &Run) -> Result<Outcome> {
    let read = |position: usize| Metrics::read(&run.folder(position));
    let main: Vec<usize> = plan.at(Arm::Main, "metrics").collect();
    let differs = |control: &usize| !main.iter().any(|&main| run.is_shared(main, *control));
    let scored: Vec<usize> = main.iter().filter_map(|&metrics| plan.scored_by(metrics)).collect();
    let last = *scored.last().context("nothing that the experiment runs is scored")?;
    let rounds = main.iter().map(|&position| read(position)).collect::<Result<Vec<_>>>()?;
    // A system of one phase has no network that knows nothing of clusters yet.
    let is_pretrained = scored.first().is_some_and(|&first| plan.clusters_alone(first));
    Ok(Outcome {
        seed: run.seed,
        embedding: rounds.first().filter(|_| is_pretrained).cloned(),
        rounds,
        pixels: plan.at(Arm::Pixels, "metrics").next().map(read).transpose()?,
        control: plan
            .at(Arm::Control, "metrics")
            .filter(differs)
            .map(|position| Ok((plan.steps[position].round, read(position)?)))
            .collect::<Result<_>>()?,
        assignments: run.view(last).join("pseudo-labels.safetensors"),
    })
}

/// Sends log lines to stderr, `info` and above unless `RUST_LOG` says otherwise.
fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
