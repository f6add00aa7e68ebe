//! `assort compare`: what is comparable on one data set, in tables.
//!
//! The table `systems` has all systems with equal backbone and effort. A system's experiment is
//! `<dataset>` (PLDC) or `<dataset>-<system>`. All must use one data set and one backbone, and their
//! efforts may differ by at most [`TOLERANCE`]. The effort, including pretraining, is what the
//! program of each step declares under `--check`; see [`stage::Effort`]. The baseline is k-means on
//! BYOL's embeddings after the same effort: the result of PLDC's control, which continues BYOL for as
//! long as the rounds take.
//!
//! The tables `heads` and `pretrained` have the heads on one frozen embedding, see [`heads`].

use std::fmt::{self, Write as _};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stage::console::{print, print_line};
use stage::{Effort, Experiment, PictureCost, Spec};
use toml::Value as Toml;

use crate::CommandContext;
use crate::cost::StepCost;
use crate::heads;
use crate::jobs::{self, RunSteps};
use crate::plan::{Arm, RunPlan, StepInput};
use crate::reproduce::resolved;
use crate::results::{ClassAgreement, MetricsFile, Statistic, aligned, scores_json};
use crate::run::ExperimentRun;
use crate::setup::{self, Setup};
use crate::store::Hold;

/// Largest relative difference of a system's effort from that of the first system.
const TOLERANCE: f64 = 0.05;

/// The command line. It changes no value of the experiments: for that, copy a file or use
/// `reproduce --set`.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub struct CompareOptions {
    /// The data set. Its experiment is PLDC; `<data set>-<system>` is that of another system, and
    /// `<data set>-<head>` that of a head on a frozen embedding.
    data_set: String,
    /// The tables to make, separated by commas: systems, heads, pretrained.
    #[arg(long, value_name = "LIST", value_delimiter = ',',
        default_values_t = [ComparedTable::Systems, ComparedTable::Heads])]
    tables: Vec<ComparedTable>,
    /// Run the seeds 0 to N - 1.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Compare systems although backbones or efforts differ; the table says by how much.
    #[arg(long)]
    unequal: bool,
    /// Print the results as one JSON object at the end, and the progress as JSON lines on stderr.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    jobs: jobs::JobsOption,
    #[command(flatten)]
    setup: setup::SetupOptions,
}

/// A table of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComparedTable {
    /// All systems, with equal backbone and effort.
    Systems,
    /// The heads on one frozen embedding that was learnt on these pictures alone.
    Heads,
    /// The heads on the embedding of a published network, which is fetched.
    Pretrained,
}

impl FromStr for ComparedTable {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let all = [Self::Systems, Self::Heads, Self::Pretrained];
        let found = all.into_iter().find(|table| table.to_string() == word);
        found.ok_or_else(|| "must be systems, heads or pretrained".to_owned())
    }
}

impl fmt::Display for ComparedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Systems => "systems",
            Self::Heads => "heads",
            Self::Pretrained => "pretrained",
        })
    }
}

/// Runs the unfinished steps and prints the tables.
pub fn run(session: &CommandContext, options: &CompareOptions) -> Result<()> {
    let groups = groups(session, options)?;
    let setups = groups
        .iter()
        .map(|(_, systems)| {
            systems.iter().map(|s| Setup::new(session, &s.plan, &options.setup)).collect()
        })
        .collect::<Result<Vec<Vec<Setup>>>>()?;
    if let Some(setup) = setups.iter().flatten().find(|setup| !setup.prepared.is_done())
        && options.setup.dry_run
    {
        return setup.dry_run_unprepared();
    }
    let _data = setups.iter().flatten().map(Setup::prepare).collect::<Result<Vec<Hold>>>()?;
    let mut comparisons = Vec::new();
    for ((table, systems), setups) in groups.iter().zip(&setups) {
        let mut entries = Vec::new();
        for (system, setup) in systems.iter().zip(setups) {
            let runs = (0..options.seeds).map(|seed| ExperimentRun::new(seed, setup));
            entries.push(ComparedSystem::new(system, runs.collect::<Result<_>>()?)?);
        }
        comparisons.push(TableComparison::of(*table, entries, &session.registry.specs())?);
    }
    let problems: Vec<&String> = comparisons.iter().flat_map(|table| &table.problems).collect();
    if let [first, others @ ..] = &problems[..]
        && !options.unequal
    {
        let others: String = others.iter().map(|problem| format!("; {problem}")).collect();
        bail!("the systems are not comparable: {first}{others}; --unequal compares them anyway")
    }
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    if options.setup.dry_run {
        return comparisons.iter().try_for_each(TableComparison::print_plan);
    }
    comparisons.iter().try_for_each(TableComparison::check)?;
    let steps: Vec<RunSteps> = comparisons.iter().flat_map(TableComparison::run_steps).collect();
    jobs::execute(&steps, false, options.jobs.jobs)?;
    print_tables(&comparisons, options)
}

/// Prints the tables, and if asked for one JSON object.
fn print_tables(comparisons: &[TableComparison], options: &CompareOptions) -> Result<()> {
    let mut object = json!({ "seeds": options.seeds, "rows": [], "problems": [] });
    for (position, comparison) in comparisons.iter().enumerate() {
        let rows = comparison.rows()?;
        if position > 0 {
            print_line("")?;
        }
        print(comparison.text(&rows, options.seeds)?)?;
        let rows: Vec<Value> = rows.iter().map(CompareRow::json).collect();
        match comparison.table {
            ComparedTable::Systems => {
                object["rows"] = rows.into();
                object["problems"] = comparison.problems.clone().into();
            }
            table => object[table.to_string()] = rows.into(),
        }
    }
    if options.json { print_line(object) } else { Ok(()) }
}

/// An experiment on the data set: a system, or a head on a frozen embedding.
pub struct System {
    /// The experiment.
    pub experiment: Experiment,
    /// Its steps.
    pub plan: RunPlan,
}

impl System {
    /// Opens the experiment of this name.
    pub fn open(session: &CommandContext, name: &str) -> Result<Self> {
        let experiment = resolved(session, name, &[])?;
        let plan = RunPlan::of(&experiment, &session.registry.specs())?;
        Ok(Self { experiment, plan })
    }
}

/// The experiments of each table that is asked for, in their order.
fn groups(
    session: &CommandContext,
    options: &CompareOptions,
) -> Result<Vec<(ComparedTable, Vec<System>)>> {
    let of_table = |&table: &ComparedTable| -> Result<_> {
        let data_set = &options.data_set;
        Ok((
            table,
            match table {
                ComparedTable::Systems => systems(session, data_set)?,
                ComparedTable::Heads => heads::experiments(session, data_set, "")?,
                ComparedTable::Pretrained => heads::experiments(session, data_set, "-pretrained")?,
            },
        ))
    };
    let mut groups = options.tables.iter().map(of_table).collect::<Result<Vec<_>>>()?;
    groups.retain(|(_, systems)| !systems.is_empty());
    let all: Vec<&System> = groups.iter().flat_map(|(_, systems)| systems).collect();
    let first = all.first().with_context(|| {
        format!(
            "`{}` has no experiment for these tables; `assort list` prints all",
            options.data_set
        )
    })?;
    for other in &all[1..] {
        require_one_data_set(&first.experiment, &other.experiment)?;
    }
    Ok(groups)
}

/// The systems on a data set: PLDC first, then those that are one stage.
fn systems(session: &CommandContext, data_set: &str) -> Result<Vec<System>> {
    let known = session.registry.library.names()?;
    let mut systems = vec![System::open(session, data_set)?];
    for stage in session.registry.specs().iter().filter(|stage| stage.is_one_phase()) {
        let word = format!("{data_set}-{}", stage.name);
        if known.contains(&word) {
            systems.push(System::open(session, &word)?);
        } else {
            tracing::warn!("there is no experiment `{word}`: skipping {}", stage.name);
        }
    }
    Ok(systems)
}

/// Fails unless two experiments use the same pictures and number of clusters.
fn require_one_data_set(one: &Experiment, other: &Experiment) -> Result<()> {
    for table in ["data", "prepare"] {
        ensure!(
            one.value(table) == other.value(table),
            "`{}` and `{}` have different tables `[{table}]`; only systems on one data set can be \
             compared",
            one.path.display(),
            other.path.display()
        );
    }
    Ok(())
}

/// The distinct backbones in the tables of an experiment: shapes of networks to train under
/// `network.backbone`, names of published networks under `backbone`.
pub fn backbones(experiment: &Experiment, stages: &[Spec]) -> Vec<Toml> {
    let mut found = Vec::new();
    for stage in stages.iter().filter(|stage| stage.trains()) {
        let table = experiment.value(stage.name);
        let within = |key: &str| table.and_then(|table| table.get(key)?.get("backbone"));
        let trained = within("network").or(within("start"));
        let of_stage = trained.or(table.and_then(|table| table.get("backbone")));
        found.extend(of_stage.filter(|backbone| !found.contains(backbone)));
    }
    found.into_iter().cloned().collect()
}

/// A system with its runs, one for each seed.
pub struct ComparedSystem<'a> {
    /// The experiment and its steps.
    pub system: &'a System,
    /// A run for each seed.
    pub runs: Vec<ExperimentRun<'a>>,
}

impl<'a> ComparedSystem<'a> {
    fn new(system: &'a System, runs: Vec<ExperimentRun<'a>>) -> Result<Self> {
        ensure!(!runs.is_empty(), "no seed to compare");
        Ok(Self { system, runs })
    }

    /// The name of the experiment.
    pub fn name(&self) -> &str {
        &self.system.experiment.name
    }

    /// The position of the last step of `arm` that writes scores.
    pub fn last_scores(&self, arm: Arm) -> Result<usize> {
        let last = self.system.plan.scores(arm).last();
        last.with_context(|| format!("no step of `{}` is scored", self.name()))
    }

    /// The multiply-adds of each step of the plan; `None` where a program does not declare them.
    fn multiply_adds(&self) -> Result<Vec<Option<f64>>> {
        let plan = &self.system.plan;
        let declared = (0..plan.steps.len()).map(|step| self.runs[0].declared_effort(step));
        Ok(multiply_adds(plan, &declared.collect::<Result<Vec<_>>>()?))
    }

    /// A row with these scores, read from the step at `scores`, and with the cost of the steps
    /// `paid`.
    pub fn row(
        &self,
        name: String,
        scores: usize,
        of: fn(&MetricsFile) -> Option<ClassAgreement>,
        paid: &[usize],
    ) -> Result<CompareRow> {
        let found = self
            .runs
            .iter()
            .map(|run| Ok(of(&run.removing_damaged(MetricsFile::read(&run.folder(scores)))?)))
            .collect::<Result<Vec<_>>>()?;
        let score = |part: fn(ClassAgreement) -> Option<f64>| {
            Statistic::of(found.iter().map(|scores| scores.and_then(part)))
        };
        let costs: Vec<Option<StepCost>> = self.runs.iter().map(|run| cost(run, paid)).collect();
        let seconds = costs.iter().map(|cost| cost.map(|cost| cost.seconds));
        Ok(CompareRow {
            system: name,
            experiment: self.name().to_owned(),
            scores: [score(|s| s.acc), score(|s| s.nmi), score(|s| s.ari)],
            seconds: Statistic::of(seconds),
            peak_bytes: costs.iter().flatten().filter_map(|cost| cost.peak_bytes).max(),
            multiply_adds: None,
            effort: None,
        })
    }
}

/// The cost of these steps; `None` if one has no recorded cost.
fn cost(run: &ExperimentRun, steps: &[usize]) -> Option<StepCost> {
    let mut costs = steps.iter().map(|&step| StepCost::read(&run.folder(step)));
    costs.try_fold(StepCost::default(), |sum, cost| Some(sum.and(cost?)))
}

/// The rows of one table, and the reasons why its systems are not comparable.
struct TableComparison<'a> {
    table: ComparedTable,
    entries: Vec<ComparedSystem<'a>>,
    /// Of each system, the multiply-adds of each step; empty for heads.
    multiply_adds: Vec<Vec<Option<f64>>>,
    problems: Vec<String>,
    notes: Vec<String>,
}

impl<'a> TableComparison<'a> {
    fn of(table: ComparedTable, entries: Vec<ComparedSystem<'a>>, stages: &[Spec]) -> Result<Self> {
        if table != ComparedTable::Systems {
            heads::require_one_embedding(&entries)?;
            let notes = vec![heads::note(table, &entries[0].system.experiment, stages)];
            return Ok(Self { table, entries, multiply_adds: vec![], problems: vec![], notes });
        }
        let multiply_adds =
            entries.iter().map(ComparedSystem::multiply_adds).collect::<Result<_>>()?;
        let notes = vec![
            "effort: multiply-adds of the networks, forward and backward, as a share of the first \
             system's"
                .to_owned(),
        ];
        let mut compared = Self { table, entries, multiply_adds, problems: vec![], notes };
        compared.problems = compared.unequal(stages);
        let unequal = compared.problems.iter().map(|problem| format!("not equal: {problem}"));
        compared.notes.extend(unequal);
        Ok(compared)
    }

    /// In what backbones and efforts of systems differ.
    fn unequal(&self, stages: &[Spec]) -> Vec<String> {
        let first = &self.entries[0];
        let (its_backbones, its_effort) =
            (backbones(&first.system.experiment, stages), self.effort(0, Arm::Main));
        let mut problems = Vec::new();
        for (position, entry) in self.entries.iter().enumerate() {
            let name = entry.name();
            if backbones(&entry.system.experiment, stages) != its_backbones {
                problems.push(format!("`{name}` has another backbone than `{}`", first.name()));
            }
            let effort = self.effort(position, Arm::Main);
            match relative(effort, its_effort) {
                Some(share) if (share - 1.).abs() <= TOLERANCE => {}
                Some(share) => problems.push(format!(
                    "`{name}` takes {:.3e} multiply-adds, {share:.3} of the {:.3e} of `{}`; change its \
                     epochs",
                    effort.unwrap_or_default(),
                    its_effort.unwrap_or_default(),
                    first.name()
                )),
                None => problems.push(format!(
                    "`{name}` has a program that does not declare its effort \
                     (`multiply-adds` under --check)"
                )),
            }
        }
        problems
    }

    /// The multiply-adds of all steps of an arm of the system at `position`; `None` if a program
    /// does not declare them.
    fn effort(&self, position: usize, arm: Arm) -> Option<f64> {
        let of_steps = self.multiply_adds.get(position)?;
        self.entries[position].system.plan.of_arm(arm).map(|step| of_steps[step]).sum()
    }

    /// Prints what would be compared.
    fn print_plan(&self) -> Result<()> {
        for (position, entry) in self.entries.iter().enumerate() {
            let name = entry.name();
            if self.table != ComparedTable::Systems {
                let folder = entry.runs[0].folder(heads::embedding(entry)?);
                print_line(format_args!("{name}: on `{}` for seed 0", folder.display()))?;
                continue;
            }
            let effort = self.effort(position, Arm::Main);
            let effort = effort.map_or("?".to_owned(), |effort| format!("{effort:.4e}"));
            print_line(format_args!("{name}: {effort} multiply-adds"))?;
        }
        Ok(())
    }

    /// The steps to run of the entry at `position`: its own, and the control of the first system as
    /// the baseline.
    fn steps(&self, position: usize) -> Vec<usize> {
        let plan = &self.entries[position].system.plan;
        let has_baseline = position == 0 && self.table == ComparedTable::Systems;
        let control = plan.of_arm(Arm::Control).filter(|_| has_baseline);
        plan.of_arm(Arm::Main).chain(control).collect()
    }

    /// Checks all steps.
    fn check(&self) -> Result<()> {
        self.entries.iter().enumerate().try_for_each(|(position, entry)| {
            let steps = self.steps(position);
            entry.runs.iter().try_for_each(|run| run.check(&steps, false))
        })
    }

    /// All steps, in order.
    fn run_steps(&self) -> impl Iterator<Item = RunSteps<'_>> {
        self.entries.iter().enumerate().flat_map(|(position, entry)| {
            let positions = self.steps(position);
            entry.runs.iter().map(move |run| RunSteps { run, positions: positions.clone() })
        })
    }

    /// The rows: the baseline, then one per system or head.
    fn rows(&self) -> Result<Vec<CompareRow>> {
        if self.table != ComparedTable::Systems {
            return heads::rows(&self.entries);
        }
        let whole = self.effort(0, Arm::Main);
        let row = |position: usize, name, arm, of: fn(&MetricsFile) -> _| -> Result<CompareRow> {
            let entry = &self.entries[position];
            let paid: Vec<usize> = entry.system.plan.of_arm(arm).collect();
            let multiply_adds = self.effort(position, arm);
            let row = entry.row(name, entry.last_scores(arm)?, of, &paid)?;
            Ok(CompareRow { effort: relative(multiply_adds, whole), multiply_adds, ..row })
        };
        let mut rows = Vec::new();
        if self.entries[0].system.plan.scores(Arm::Control).next().is_some() {
            let name = "k-means on BYOL".to_owned();
            rows.push(row(0, name, Arm::Control, |metrics| metrics.kmeans)?);
        }
        for (position, entry) in self.entries.iter().enumerate() {
            let name = entry.system.experiment.system()?;
            rows.push(row(position, name, Arm::Main, |metrics| metrics.head)?);
        }
        Ok(rows)
    }

    /// The table as text.
    fn text(&self, rows: &[CompareRow], seeds: u64) -> Result<String> {
        let title = self.entries[0].system.experiment.title()?;
        let (title, columns) = match self.table {
            ComparedTable::Systems => (title, COLUMNS.len()),
            ComparedTable::Heads => (format!("{title}, heads on one frozen embedding"), 6),
            ComparedTable::Pretrained => (format!("{title}, heads on a published network"), 6),
        };
        Ok(table(&title, rows, &COLUMNS[..columns], seeds, &self.notes))
    }
}

/// The multiply-adds of each step, from the effort that its program declares. A step that passes
/// pictures through the network of an earlier step takes the cost per picture from that step.
fn multiply_adds(plan: &RunPlan, declared: &[Option<Effort>]) -> Vec<Option<f64>> {
    let mut networks: Vec<Option<PictureCost>> = Vec::new();
    let mut costs = Vec::new();
    for (step, effort) in plan.steps.iter().zip(declared) {
        let read = step.inputs.iter().find_map(|(role, input)| match input {
            StepInput::Step(position) if *role == "network" => networks[*position],
            _ => None,
        });
        costs.push(effort.and_then(|effort| effort.multiply_adds(read)));
        networks.push(effort.and_then(|effort| effort.network()).or(read));
    }
    costs
}

fn relative(effort: Option<f64>, to: Option<f64>) -> Option<f64> {
    Some(effort? / to.filter(|to| *to > 0.)?)
}

/// One line of a table.
#[derive(Debug, Clone)]
pub struct CompareRow {
    /// What the line is called.
    pub system: String,
    experiment: String,
    /// ACC, NMI, ARI.
    pub scores: [Option<Statistic>; 3],
    /// For one seed.
    pub seconds: Option<Statistic>,
    /// The largest of all steps.
    pub peak_bytes: Option<u64>,
    /// Multiply-adds, and their ratio to the first system's.
    multiply_adds: Option<f64>,
    effort: Option<f64>,
}

impl CompareRow {
    fn json(&self) -> Value {
        json!({
            "system": self.system,
            "experiment": self.experiment,
            "scores": scores_json(&self.scores),
            "seconds": self.seconds.as_ref().map(|seconds| seconds.mean),
            "peak-memory-bytes": self.peak_bytes,
            "multiply-adds": self.multiply_adds,
            "relative-effort": self.effort,
        })
    }
}

const COLUMNS: [&str; 7] = ["", "ACC", "NMI", "ARI", "seconds", "peak MB", "effort"];

/// The table, with scores in percent and the seconds of one seed.
fn table(
    title: &str,
    rows: &[CompareRow],
    columns: &[&str],
    seeds: u64,
    notes: &[String],
) -> String {
    let mut text = format!("{title}, seeds 0 to {}\n\n", seeds - 1);
    let absent = || "-".to_owned();
    let mut lines = vec![columns.iter().map(|&column| column.to_owned()).collect::<Vec<_>>()];
    for row in rows {
        let scores = row.scores.iter().map(|s| s.as_ref().map_or_else(absent, Statistic::percent));
        let mut line: Vec<String> = [row.system.clone()].into_iter().chain(scores).collect();
        let seconds = row.seconds.as_ref().map(|seconds| format!("{:.0}", seconds.mean));
        line.push(seconds.unwrap_or_else(absent));
        let megabytes = |bytes: u64| format!("{:.0}", bytes as f64 / 1e6);
        line.push(row.peak_bytes.map_or_else(absent, megabytes));
        line.push(row.effort.map_or_else(absent, |share| format!("{share:.3}")));
        line.truncate(columns.len());
        lines.push(line);
    }
    text.push_str(&aligned(&lines));
    text.push('\n');
    for note in notes {
        let _ = writeln!(text, "{note}");
    }
    text
}

#[cfg(test)]
mod tests {
    use stage::{Origin, Output, Ranks, Role};

    use super::*;

    fn experiment(text: &str) -> Experiment {
        Experiment::of_text("example", text).expect("TOML")
    }

    const TEXT: &str = r#"
        [data]
        clusters = 3
        [prepare]
        source = "a"
        [pretraining.network.backbone]
        width = 4
        [secu.network.backbone]
        width = 4
    "#;

    #[test]
    fn only_systems_on_one_data_set_are_compared() {
        let one = experiment(TEXT);
        require_one_data_set(&one, &experiment(TEXT)).expect("one data set");
        for changed in ["clusters = 4", "source = \"b\""] {
            let from = if changed.starts_with('c') { "clusters = 3" } else { "source = \"a\"" };
            let other = experiment(&TEXT.replace(from, changed));
            let error = require_one_data_set(&one, &other).expect_err(changed).to_string();
            assert!(error.contains("only systems on one data set"), "{error}");
        }
    }

    #[test]
    fn backbones_are_those_of_the_stages_that_train() {
        let trained = |name| Spec {
            name,
            algorithm: 1,
            inputs: &[],
            outputs: &[Output::Network],
            ranks: Ranks::One,
        };
        let stages = [trained("pretraining"), trained("secu")];
        let found = |text: &str| backbones(&experiment(text), &stages);
        assert_eq!(found(TEXT).len(), 1);
        let two = TEXT.replacen("width = 4", "width = 5", 1);
        assert_eq!(found(&two).len(), 2);
        assert_ne!(found(&two), found(TEXT));
        let scorer = Spec {
            name: "secu",
            algorithm: 1,
            inputs: &[],
            outputs: &[Output::Scores],
            ranks: Ranks::One,
        };
        assert_eq!(backbones(&experiment(&two), &[stages[0], scorer]).len(), 1);
        // ICBPL's table has it where it says what it starts from.
        let started = two.replace("network", "start");
        assert_eq!(found(&started), found(&two));
        // A published network is named, not described.
        let published = format!("{TEXT}\n[pretrained]\nbackbone = 'dinov2-small'");
        let with_pretrained = [stages[0], stages[1], trained("pretrained")];
        let found = backbones(&experiment(&published), &with_pretrained);
        assert_eq!(found[1], "dinov2-small".into(), "{found:?}");
    }

    #[test]
    fn a_step_costs_what_a_picture_costs_in_the_network_that_it_reads() -> Result<()> {
        const NETWORK: &[Role] = &[Role::new("network", Origin::Network)];
        let stage =
            |name, inputs, outputs| Spec { name, algorithm: 1, inputs, outputs, ranks: Ranks::One };
        let stages = [
            stage("pretraining", &[], &[Output::Network]),
            stage("embed", NETWORK, &[Output::Embeddings]),
            stage("clustering", &[], &[Output::PseudoLabels]),
            stage("refinement", NETWORK, &[Output::Network]),
            stage("metrics", &[], &[Output::Scores]),
        ];
        let experiment = experiment(
            "[rounds]\nrounds = 1\nfirst = ['pretraining', 'embed', 'clustering']\n\
             then = ['refinement', 'embed', 'clustering']\n[stages]\npretraining = 'pretraining'\n\
             embed = 'embed'\nclustering = 'clustering'\nrefinement = 'refinement'\n\
             metrics = 'metrics'\n[control]\n[pretraining]\n[refinement]\n[metrics]\n\
             [embed]\npixels = false\nviews = 2\n\
             [clustering]\nneighbours = 3\nkmeans-metric = 'spherical'",
        );
        let plan = RunPlan::of(&experiment, &stages)?;
        let cost = PictureCost { embedding: 1., projection: 10., learning: 100. };
        let declared = |step: &crate::plan::Step| match step.place.name {
            "pretraining" => Effort::of_multiply_adds(5e3, cost),
            "refinement" => Effort::of_pictures(0., 0., 7.),
            "embed" => Effort::of_pictures(3., 2., 0.),
            _ => Effort::NONE,
        };
        let efforts: Vec<_> = plan.steps.iter().map(|step| Some(declared(step))).collect();
        let priced = multiply_adds(&plan, &efforts);
        let main = plan.of_arm(Arm::Main).map(|at| (plan.steps[at].name(), priced[at]));
        let main: Vec<_> = main.filter(|(_, cost)| *cost != Some(0.)).collect();
        let want = [("0-pretraining", 5e3), ("0-embed", 23.), ("1-refinement", 700.)];
        let want = want.into_iter().chain([("1-embed", 23.)]);
        assert!(main.into_iter().eq(want.map(|(name, cost)| (name.to_owned(), Some(cost)))));
        let silent: Vec<_> = plan.steps.iter().map(|_| None).collect();
        assert!(multiply_adds(&plan, &silent).iter().all(Option::is_none));
        Ok(())
    }

    #[test]
    fn the_table_has_a_row_for_each_system_and_lists_what_is_not_equal() {
        let scores = |value: f64| Statistic::of([Some(value), Some(value)].into_iter());
        let row = CompareRow {
            system: "SeCu".into(),
            experiment: "digits-secu".into(),
            scores: [scores(0.9), scores(0.8), None],
            seconds: scores(61.),
            peak_bytes: Some(120_000_000),
            multiply_adds: Some(1000.),
            effort: relative(Some(1000.), Some(980.)),
        };
        let rows = std::slice::from_ref(&row);
        let text = table("Example", rows, &COLUMNS, 2, &["a problem".into()]);
        for part in ["SeCu", "90.0 ± 0.0", "80.0 ± 0.0", "-", "61", "120", "1.020", "a problem"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let without_effort = table("Example", rows, &COLUMNS[..6], 2, &[]);
        assert!(without_effort.contains("120") && !without_effort.contains("1.020"));
        let json = row.json();
        assert_eq!(json["system"], "SeCu");
        assert_eq!(json["scores"]["acc"]["mean"], 0.9);
        assert!(json["scores"]["ari"].is_null());
        assert_eq!(json["seconds"], 61.);
        assert_eq!(relative(None, Some(1.)), None);
        assert_eq!(relative(Some(1.), Some(0.)), None);
    }
}
