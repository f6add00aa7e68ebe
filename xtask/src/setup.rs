//! Sets up a run before its first step: programs, device, resolved experiments, data.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use stage::console::print_line;
use stage::{DeviceChoice, Experiment, files};

use crate::CommandContext;
use crate::advice::Advice;
use crate::plan::{Arm, RunPlan};
use crate::prepared::PreparedData;
use crate::programs::Programs;
use crate::record;
use crate::run::ExperimentRun;
use crate::store::{Hold, StepState};

/// Where to compute, on which pictures, and where results are kept.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub struct SetupOptions {
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Share each training, embedding and clustering among this many processes, which `mpirun` starts; a power of
    /// two.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub ranks: usize,
    /// Read the pictures from here instead of the experiment's own source.
    #[arg(long, value_name = "PATH")]
    pub images: Option<PathBuf>,
    /// Check everything, foreign executables with --check too, and print what would run.
    #[arg(long)]
    pub dry_run: bool,
    /// Keep results in this folder.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs: PathBuf,
    /// What to advise when a step fails.
    #[arg(skip)]
    pub advice: Advice,
}

/// Everything that the first step of a plan needs.
#[derive(Debug)]
pub struct Setup<'a> {
    pub session: &'a CommandContext,
    pub plan: &'a RunPlan,
    pub programs: Programs,
    /// Where to compute, with `auto` resolved.
    pub device: DeviceChoice,
    /// The file of each arm's resolved experiment, which its steps read.
    pub experiment_files: BTreeMap<Arm, PathBuf>,
    pub prepared: PreparedData<'a>,
    /// The folder of all results.
    pub runs: PathBuf,
    /// What to advise when a step fails.
    pub advice: Advice,
}

impl<'a> Setup<'a> {
    /// Finds the programs and the device, writes the experiments, and checks the source.
    pub fn new(
        session: &'a CommandContext,
        plan: &'a RunPlan,
        options: &SetupOptions,
    ) -> Result<Self> {
        let experiment = plan.experiment(Arm::Main);
        for folder in [&*experiment.name, ".store", ".data"] {
            files::remove_abandoned(&options.runs.join(folder))?;
        }
        let source = options.images.as_deref().map(crate::source::absolute_source).transpose()?;
        let mut programs = Programs::find(&plan.programs(), &session.registry)?;
        let arms: Vec<_> = plan.steps.iter().map(|step| plan.experiment(step.arm)).collect();
        programs.share(&arms, &session.registry, options.ranks)?;
        Ok(Self {
            session,
            plan,
            programs,
            device: (session.registry.devices.resolve)(options.device)?,
            prepared: PreparedData::of(
                session,
                experiment,
                source.as_deref(),
                &options.runs,
                &options.advice,
            )?,
            experiment_files: write_experiments(plan, &options.runs)?,
            runs: options.runs.clone(),
            advice: options.advice.clone(),
        })
    }

    /// The experiment itself.
    pub fn main(&self) -> &Experiment {
        self.plan.experiment(Arm::Main)
    }

    /// The file of the experiment itself.
    pub fn main_file(&self) -> &Path {
        &self.experiment_files[&Arm::Main]
    }

    /// The folder of the experiment's runs.
    pub fn experiment_folder(&self) -> PathBuf {
        self.runs.join(&self.main().name)
    }

    /// Prepares the data unless it is done. The returned hold prevents its removal.
    pub fn prepare(&self) -> Result<Hold> {
        let data = self.prepared.make(None, false)?;
        self.prepared.require_enough_pictures()?;
        Ok(data)
    }

    /// Checks the tables of a run and prints what would run, before its data is prepared and its
    /// steps have keys.
    pub fn dry_run_unprepared(&self) -> Result<()> {
        self.prepared.check()?;
        for step in &self.plan.steps {
            let experiment = self.plan.experiment(step.arm);
            let stages = &self.session.registry.stages;
            let own = stages.iter().find(|program| program.spec.name == step.program);
            if let Some(program) = own {
                program.check_table(experiment)?;
            }
        }
        print_line(format_args!("prepare: runs, into {}", self.prepared.folder.display()))?;
        print_line("then every step is checked on the pictures, and these run:")?;
        self.plan.steps.iter().try_for_each(|step| print_line(step.name()))
    }

    /// Prints what each of these steps of a run would do.
    pub fn say_what_would_run(
        &self,
        run: &ExperimentRun,
        positions: &[usize],
        fresh: bool,
    ) -> Result<()> {
        for &position in positions {
            self.session.interrupt.check()?;
            let what = match run.state(position) {
                StepState::Done if fresh => "runs again",
                StepState::Done => "is done",
                StepState::Started if fresh => "starts again",
                StepState::Started => "resumes",
                StepState::New => "runs",
            };
            let name = self.plan.steps[position].name();
            print_line(format_args!("{name}, seed {}: {what}", run.seed))?;
            print_line(format_args!("  {}", run.command_line(position)))?;
        }
        for program in self.programs.foreign() {
            let path = program.path.display();
            print_line(format_args!(
                "`{path}` is a foreign executable: it was started with --check"
            ))?;
        }
        Ok(())
    }
}

/// Writes the resolved experiment of each arm below `runs`. Its name depends on its contents, so
/// that editing the original file does not affect a run that has started.
fn write_experiments(plan: &RunPlan, runs: &Path) -> Result<BTreeMap<Arm, PathBuf>> {
    let mut experiment_files = BTreeMap::new();
    for (arm, experiment) in &plan.arms {
        let text =
            format!("# `{}`, resolved.\n{}", experiment.path.display(), experiment.to_toml());
        let digest = record::digest_of(text.as_bytes());
        let path = runs.join(&experiment.name).join(format!("{arm}-{digest}.toml"));
        files::write(&path, text.as_bytes())?;
        experiment_files.insert(*arm, path);
    }
    Ok(experiment_files)
}
