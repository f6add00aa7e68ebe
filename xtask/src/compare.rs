//! `assort compare`: all systems on one data set, with equal backbone and effort, in one table.
//!
//! A system's experiment is `<dataset>` (PLDC) or `<dataset>-<system>`. All must use one data set
//! and one backbone, and their efforts may differ by at most [`TOLERANCE`]. The effort, including
//! pretraining, is what the program of each step declares under `--check`; see [`stage::Effort`].
//!
//! The baseline is k-means on BYOL's embeddings after the same effort: the result of PLDC's
//! control, which continues BYOL for as long as the rounds take.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stage::console::{print, print_line};
use stage::{Effort, Experiment, PictureCost, Spec};
use toml::Value as Toml;

use crate::CommandContext;
use crate::cost::StepCost;
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
    /// The data set. Its experiment is PLDC; `<data set>-<system>` is that of another system.
    data_set: String,
    /// Run the seeds 0 to N - 1.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Compare although backbones or efforts differ; the table says by how much.
    #[arg(long)]
    unequal: bool,
    /// Print the results as one JSON object at the end.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    setup: setup::SetupOptions,
}

/// Runs the unfinished steps and prints the table.
pub fn run(session: &CommandContext, options: &CompareOptions) -> Result<()> {
    let systems = systems(session, &options.data_set)?;
    let setups = systems
        .iter()
        .map(|system| Setup::new(session, &system.plan, &options.setup))
        .collect::<Result<Vec<_>>>()?;
    if let Some(setup) = setups.iter().find(|setup| !setup.prepared.is_done())
        && options.setup.dry_run
    {
        return setup.dry_run_unprepared();
    }
    let _data = setups.iter().map(Setup::prepare).collect::<Result<Vec<Hold>>>()?;
    let mut entries = Vec::new();
    for (system, setup) in systems.iter().zip(&setups) {
        let runs = (0..options.seeds).map(|seed| ExperimentRun::new(seed, setup));
        entries.push(ComparedSystem::new(system, runs.collect::<Result<_>>()?)?);
    }
    let comparison = SystemComparison::of(entries, &session.registry.specs())?;
    if !comparison.problems.is_empty() && !options.unequal {
        bail!(
            "the systems are not comparable: {}; --unequal compares them anyway",
            comparison.problems.join("; ")
        )
    }
    comparison.problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    if options.setup.dry_run {
        return comparison.print_efforts();
    }
    comparison.execute()?;
    let rows = comparison.rows()?;
    print(table(
        &comparison.first().system.experiment,
        &rows,
        options.seeds,
        &comparison.problems,
    )?)?;
    if options.json {
        let rows: Vec<Value> = rows.iter().map(CompareRow::json).collect();
        let problems = &comparison.problems;
        print_line(json!({ "rows": rows, "seeds": options.seeds, "problems": problems }))?;
    }
    Ok(())
}

/// A system's experiment on the data set.
struct System {
    experiment: Experiment,
    plan: RunPlan,
}

/// The systems on a data set: PLDC first, then those that are one stage.
fn systems(session: &CommandContext, data_set: &str) -> Result<Vec<System>> {
    let stages = session.registry.specs();
    let open = |word: &str| -> Result<System> {
        let experiment = resolved(session, word, &[])?;
        let plan = RunPlan::of(&experiment, &stages)?;
        Ok(System { experiment, plan })
    };
    let known = session.registry.library.names()?;
    let mut systems = vec![open(data_set)?];
    for stage in stages.iter().filter(|stage| stage.is_one_phase()) {
        let word = format!("{data_set}-{}", stage.name);
        if known.contains(&word) {
            systems.push(open(&word)?);
        } else {
            tracing::warn!("there is no experiment `{word}`: skipping {}", stage.name);
        }
    }
    for other in &systems[1..] {
        require_one_data_set(&systems[0].experiment, &other.experiment)?;
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

/// The distinct backbones in the tables of an experiment.
fn backbone(experiment: &Experiment, stages: &[Spec]) -> Vec<Toml> {
    let mut found = Vec::new();
    for stage in stages.iter().filter(|stage| stage.trains()) {
        let network = experiment.value(stage.name).and_then(|table| table.get("network"));
        let of_stage = network.and_then(|table| table.get("backbone"));
        found.extend(of_stage.filter(|backbone| !found.contains(backbone)));
    }
    found.into_iter().cloned().collect()
}

/// A system with its runs, one for each seed, and its declared effort.
struct ComparedSystem<'a> {
    system: &'a System,
    runs: Vec<ExperimentRun<'a>>,
    /// Multiply-adds of each step of the plan; `None` if a program does not declare them.
    multiply_adds: Vec<Option<f64>>,
    /// Multiply-adds of all steps of the experiment itself.
    effort: Option<f64>,
}

impl<'a> ComparedSystem<'a> {
    fn new(system: &'a System, runs: Vec<ExperimentRun<'a>>) -> Result<Self> {
        let run = runs.first().context("no seed to compare")?;
        let declared = (0..system.plan.steps.len()).map(|position| run.declared_effort(position));
        let multiply_adds = multiply_adds(&system.plan, &declared.collect::<Result<Vec<_>>>()?);
        let mut entry = Self { system, runs, multiply_adds, effort: None };
        entry.effort = entry.effort_of(Arm::Main);
        Ok(entry)
    }

    fn name(&self) -> &str {
        &self.system.experiment.name
    }

    /// The multiply-adds of all steps of an arm; `None` if a program does not declare them.
    fn effort_of(&self, arm: Arm) -> Option<f64> {
        self.system.plan.of_arm(arm).map(|position| self.multiply_adds[position]).sum()
    }

    /// A row with these scores of the last step of `arm` that writes scores.
    fn row(
        &self,
        name: String,
        arm: Arm,
        of: fn(&MetricsFile) -> Option<ClassAgreement>,
    ) -> Result<CompareRow> {
        let last = self.system.plan.scores(arm).last();
        let last = last.context("no step of the experiment is scored")?;
        let found = self
            .runs
            .iter()
            .map(|run| Ok(of(&run.removing_damaged(MetricsFile::read(&run.folder(last)))?)))
            .collect::<Result<Vec<_>>>()?;
        let score = |part: fn(ClassAgreement) -> Option<f64>| {
            Statistic::of(found.iter().map(|scores| scores.and_then(part)))
        };
        let costs: Vec<Option<StepCost>> =
            self.runs.iter().map(|run| self.cost(run, arm)).collect();
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

    /// The cost of all steps of an arm; `None` if one has no recorded cost.
    fn cost(&self, run: &ExperimentRun, arm: Arm) -> Option<StepCost> {
        let costs = self.system.plan.of_arm(arm).map(|step| StepCost::read(&run.folder(step)));
        costs.into_iter().try_fold(StepCost::default(), |sum, cost| Some(sum.and(cost?)))
    }
}

/// All systems, PLDC first, and the reasons why they are not comparable.
struct SystemComparison<'a> {
    entries: Vec<ComparedSystem<'a>>,
    problems: Vec<String>,
}

impl<'a> SystemComparison<'a> {
    fn of(entries: Vec<ComparedSystem<'a>>, stages: &[Spec]) -> Result<Self> {
        let first = entries.first().context("no experiment to compare")?;
        let mut problems = Vec::new();
        let its_backbone = backbone(&first.system.experiment, stages);
        for entry in &entries {
            let name = entry.name();
            if backbone(&entry.system.experiment, stages) != its_backbone {
                problems.push(format!("`{name}` has another backbone than `{}`", first.name()));
            }
            match relative(entry.effort, first.effort) {
                Some(share) if (share - 1.).abs() <= TOLERANCE => {}
                Some(share) => problems.push(format!(
                    "`{name}` takes {:.3e} multiply-adds, {share:.3} of the {:.3e} of `{}`; change its \
                     epochs",
                    entry.effort.unwrap_or_default(),
                    first.effort.unwrap_or_default(),
                    first.name()
                )),
                None => problems.push(format!(
                    "`{name}` has a program that does not declare its effort \
                     (`multiply-adds` under --check)"
                )),
            }
        }
        Ok(Self { entries, problems })
    }

    fn first(&self) -> &ComparedSystem<'a> {
        &self.entries[0]
    }

    fn print_efforts(&self) -> Result<()> {
        for entry in &self.entries {
            let effort = entry.effort.map_or("?".to_owned(), |effort| format!("{effort:.4e}"));
            print_line(format_args!("{}: {effort} multiply-adds", entry.name()))?;
        }
        Ok(())
    }

    /// Runs all systems, and the control of the first as the baseline.
    fn execute(&self) -> Result<()> {
        let steps = |position: usize, entry: &ComparedSystem| -> Vec<usize> {
            let plan = &entry.system.plan;
            let control = plan.of_arm(Arm::Control).filter(|_| position == 0);
            plan.of_arm(Arm::Main).chain(control).collect()
        };
        for (position, entry) in self.entries.iter().enumerate() {
            let steps = steps(position, entry);
            entry.runs.iter().try_for_each(|run| run.check(&steps, false))?;
        }
        for (position, entry) in self.entries.iter().enumerate() {
            let steps = steps(position, entry);
            entry.runs.iter().try_for_each(|run| run.execute(&steps, false))?;
        }
        Ok(())
    }

    /// The row of the baseline, then one row per system.
    fn rows(&self) -> Result<Vec<CompareRow>> {
        let first = self.first();
        let mut rows = Vec::new();
        let mut add = |row: CompareRow, effort: Option<f64>| {
            rows.push(CompareRow {
                effort: relative(effort, first.effort),
                multiply_adds: effort,
                ..row
            });
        };
        if first.system.plan.scores(Arm::Control).next().is_some() {
            let name = "k-means on BYOL".to_owned();
            let row = first.row(name, Arm::Control, |metrics| metrics.kmeans)?;
            add(row, first.effort_of(Arm::Control));
        }
        for entry in &self.entries {
            let name = entry.system.experiment.system()?;
            add(entry.row(name, Arm::Main, |metrics| metrics.head)?, entry.effort);
        }
        Ok(rows)
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

/// One line of the table.
#[derive(Debug, Clone)]
struct CompareRow {
    system: String,
    experiment: String,
    /// ACC, NMI, ARI.
    scores: [Option<Statistic>; 3],
    /// For one seed.
    seconds: Option<Statistic>,
    peak_bytes: Option<u64>,
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
    experiment: &Experiment,
    rows: &[CompareRow],
    seeds: u64,
    problems: &[String],
) -> Result<String> {
    let mut text = format!("{}, seeds 0 to {}\n\n", experiment.title()?, seeds - 1);
    let absent = || "-".to_owned();
    let mut lines = vec![COLUMNS.map(str::to_owned).to_vec()];
    for row in rows {
        let scores = row.scores.iter().map(|s| s.as_ref().map_or_else(absent, Statistic::percent));
        let mut line: Vec<String> = [row.system.clone()].into_iter().chain(scores).collect();
        let seconds = row.seconds.as_ref().map(|seconds| format!("{:.0}", seconds.mean));
        line.push(seconds.unwrap_or_else(absent));
        let megabytes = |bytes: u64| format!("{:.0}", bytes as f64 / 1e6);
        line.push(row.peak_bytes.map_or_else(absent, megabytes));
        line.push(row.effort.map_or_else(absent, |share| format!("{share:.3}")));
        lines.push(line);
    }
    text.push_str(&aligned(&lines));
    text.push_str(
        "\neffort: multiply-adds of the networks, forward and backward, as a share of the first \
         system's\n",
    );
    for problem in problems {
        let _ = writeln!(text, "not equal: {problem}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use stage::{Origin, Output, Role};

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
        let trained = |name| Spec { name, algorithm: 1, inputs: &[], outputs: &[Output::Network] };
        let stages = [trained("pretraining"), trained("secu")];
        let backbones = |text: &str| backbone(&experiment(text), &stages);
        assert_eq!(backbones(TEXT).len(), 1);
        let two = TEXT.replacen("width = 4", "width = 5", 1);
        assert_eq!(backbones(&two).len(), 2);
        assert_ne!(backbones(&two), backbones(TEXT));
        let scorer = Spec { name: "secu", algorithm: 1, inputs: &[], outputs: &[Output::Scores] };
        assert_eq!(backbone(&experiment(&two), &[stages[0], scorer]).len(), 1);
    }

    #[test]
    fn a_step_costs_what_a_picture_costs_in_the_network_that_it_reads() -> Result<()> {
        const NETWORK: &[Role] = &[Role::new("network", Origin::Network)];
        let stage = |name, inputs, outputs| Spec { name, algorithm: 1, inputs, outputs };
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
        let named = experiment("title = \"Example\"");
        let text =
            table(&named, std::slice::from_ref(&row), 2, &["a problem".into()]).expect("a table");
        for part in ["SeCu", "90.0 ± 0.0", "80.0 ± 0.0", "-", "61", "120", "1.020", "a problem"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let json = row.json();
        assert_eq!(json["system"], "SeCu");
        assert_eq!(json["scores"]["acc"]["mean"], 0.9);
        assert!(json["scores"]["ari"].is_null());
        assert_eq!(json["seconds"], 61.);
        assert_eq!(relative(None, Some(1.)), None);
        assert_eq!(relative(Some(1.), Some(0.)), None);
    }
}
