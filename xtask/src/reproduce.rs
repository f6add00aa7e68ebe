//! `assort reproduce` and `assort stage`: run an experiment or one of its steps.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use stage::Experiment;
use stage::console::{print, print_line};

use crate::CommandContext;
use crate::cost::StepCost;
use crate::jobs::{self, RunSteps};
use crate::plan::{Arm, RunPlan};
use crate::prepared::PREPARE;
use crate::result_record::ResultRecord;
use crate::results::{ExperimentResults, MetricsFile, Outcome};
use crate::run::ExperimentRun;
use crate::setup::{self, Setup};

/// The experiment, with its changed values.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct ReproduceOptions {
    /// Name of the experiment, or path of its file.
    pub experiment: String,
    /// Seed of every random draw.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Change a value for this run: table.key=value; can be repeated.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub set: Vec<String>,
    /// Remove the earlier results of these steps and run them again.
    #[arg(long)]
    pub fresh: bool,
    #[command(flatten)]
    pub setup: setup::SetupOptions,
}

/// The experiment with the values that the command line changes.
pub fn resolved(session: &CommandContext, experiment: &str, set: &[String]) -> Result<Experiment> {
    let mut experiment = session.registry.library.open(experiment)?;
    set.iter().try_for_each(|assignment| experiment.set(assignment))?;
    Ok(experiment)
}

/// Runs the unfinished steps of an experiment for these seeds, and prints the table.
///
/// - `jobs`: how many steps run at once.
/// - `record`: the folder for a record of the results.
pub fn reproduce(
    session: &CommandContext,
    options: &ReproduceOptions,
    seeds: &[u64],
    jobs: usize,
    record: Option<&Path>,
    json: bool,
) -> Result<()> {
    let experiment = resolved(session, &options.experiment, &options.set)?;
    let digest = experiment.digest();
    let results = run_seeds(session, experiment, &options.setup, seeds, options.fresh, jobs)?;
    if let Some(results) = results {
        print(results.table())?;
        if let Some(folder) = record {
            let name = ResultRecord::new(&results, digest, &options.set).write(folder)?;
            tracing::info!("recorded the results in `{}`", folder.join(name).display());
        }
        if json {
            print_line(results.json())?;
        }
    }
    Ok(())
}

/// Runs the unfinished steps of an experiment for these seeds. Returns `None` for a dry run.
///
/// - `fresh`: remove earlier results first.
/// - `jobs`: how many steps run at once.
pub fn run_seeds(
    session: &CommandContext,
    experiment: Experiment,
    options: &setup::SetupOptions,
    seeds: &[u64],
    fresh: bool,
    jobs: usize,
) -> Result<Option<ExperimentResults>> {
    let begin = Instant::now();
    let plan = RunPlan::of(&experiment, &session.registry.specs())?;
    let all: Vec<usize> = (0..plan.steps.len()).collect();
    let setup = Setup::new(session, &plan, options)?;
    if options.dry_run && !setup.prepared.is_done() {
        return setup.dry_run_unprepared().map(|()| None);
    }
    let _data = setup.prepare()?;
    let runs =
        seeds.iter().map(|&seed| ExperimentRun::new(seed, &setup)).collect::<Result<Vec<_>>>()?;
    runs.iter().try_for_each(|run| run.check(&all, fresh))?;
    if options.dry_run {
        runs.iter().try_for_each(|run| setup.say_what_would_run(run, &all, fresh))?;
        return Ok(None);
    }
    let steps: Vec<_> = runs.iter().map(|run| RunSteps { run, positions: all.clone() }).collect();
    jobs::execute(&steps, fresh, jobs)?;

    Ok(Some(ExperimentResults {
        title: experiment.title()?,
        system: experiment.system()?,
        experiment: experiment.name,
        step_seconds: step_seconds(&plan, &runs),
        outcomes: runs
            .iter()
            .map(|run| run.removing_damaged(outcome(&plan, run)))
            .collect::<Result<_>>()?,
        seconds: begin.elapsed().as_secs_f64(),
    }))
}

/// The recorded seconds of each step, one for each seed. A step that two arms share is in the first.
fn step_seconds(plan: &RunPlan, runs: &[ExperimentRun]) -> BTreeMap<String, Vec<f64>> {
    let mut seconds = BTreeMap::<String, Vec<f64>>::new();
    for run in runs {
        for (position, step) in plan.steps.iter().enumerate() {
            let is_new = !(0..position).any(|earlier| run.is_shared(earlier, position));
            if let Some(cost) = StepCost::read(&run.folder(position)).filter(|_| is_new) {
                seconds.entry(step.name()).or_default().push(cost.seconds);
            }
        }
    }
    seconds
}

/// Runs one step on the results of the steps before it, and prints its folder.
///
/// - `place`: the step's place; `prepare` prepares the data.
pub fn stage(
    session: &CommandContext,
    options: &ReproduceOptions,
    place: &str,
    round: Option<usize>,
) -> Result<()> {
    let experiment = resolved(session, &options.experiment, &options.set)?;
    let plan = RunPlan::of(&experiment, &session.registry.specs())?;
    let fits = |position: &usize| round.is_none_or(|round| plan.steps[*position].round == round);
    let position = plan.at(Arm::Main, place).find(fits);
    if position.is_none() && place != PREPARE {
        let names: Vec<_> = plan.of_arm(Arm::Main).map(|step| plan.steps[step].name()).collect();
        bail!("`{}` has no such step; its steps are {}", experiment.name, names.join(", "))
    }
    let setup = Setup::new(session, &plan, &options.setup)?;
    let (is_dry, fresh) = (options.setup.dry_run, options.fresh);
    if is_dry && !setup.prepared.is_done() {
        return setup.dry_run_unprepared();
    }
    let _data = setup.prepare()?;
    let run = ExperimentRun::new(options.seed, &setup)?;
    let Some(position) = position else {
        run.publish()?;
        return print_line(setup.prepared.folder.display());
    };
    if let Some(missing) = run.missing_input(position) {
        bail!(
            "{} needs {}, which is not finished; run `assort stage {} {} --round {} --seed {}` \
             first",
            plan.steps[position].name(),
            missing.name(),
            missing.place.name,
            options.experiment,
            missing.round,
            options.seed
        )
    }
    run.check(&[position], fresh)?;
    if is_dry {
        return setup.say_what_would_run(&run, &[position], fresh);
    }
    jobs::execute(&[RunSteps { run: &run, positions: vec![position] }], fresh, 1)?;
    print_line(run.view(position).display())
}

/// Reads the scores of one seed.
fn outcome(plan: &RunPlan, run: &ExperimentRun) -> Result<Outcome> {
    let read = |position: usize| MetricsFile::read(&run.folder(position));
    let main: Vec<usize> = plan.scores(Arm::Main).collect();
    let differs = |control: &usize| !main.iter().any(|&main| run.is_shared(main, *control));
    let scored: Vec<usize> = main.iter().filter_map(|&scores| plan.scored_by(scores)).collect();
    let last = *scored.last().context("no step of the experiment is scored")?;
    let rounds = main.iter().map(|&position| read(position)).collect::<Result<Vec<_>>>()?;
    // A system of one phase has no network from before clustering.
    let is_pretrained = scored.first().is_some_and(|&first| plan.clusters_alone(first));
    Ok(Outcome {
        seed: run.seed,
        embedding: rounds.first().filter(|_| is_pretrained).cloned(),
        rounds,
        pixels: plan.scores(Arm::Pixels).next().map(read).transpose()?,
        control: plan
            .scores(Arm::Control)
            .filter(differs)
            .map(|position| Ok((plan.steps[position].round, read(position)?)))
            .collect::<Result<_>>()?,
        assignments: run.view(last).join("pseudo-labels.safetensors"),
    })
}
