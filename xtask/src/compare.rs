//! `cargo xtask compare`: all systems on one data set, with equal backbone and effort, in one table.
//!
//! A system's experiment is `configs/<dataset>.toml` (PLDC) or `configs/<dataset>-<system>.toml`.
//! They must name one data set, one backbone, and efforts that differ by no more than
//! [`TOLERANCE`]: the effort is what every step's program declares under `--check` as
//! `backbone-pictures`, pictures passed through a backbone, with gradient or without, crops
//! weighted by their pixels, pretraining included.
//!
//! The line to beat is k-means on BYOL's embeddings after the same effort: what PLDC's control ends
//! with, which is BYOL trained on for as long as the rounds take.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use toml::Value as Toml;

use crate::cost::Cost;
use crate::plan::{self, Arm, Plan};
use crate::report::{Metrics, Scores, Statistic, aligned, statistic_json};
use crate::run::Run;
use crate::{Bench, Options, resolved};
use stage::Experiment;

/// Largest difference of a system's effort from the first one's, as a share.
const TOLERANCE: f64 = 0.05;

/// What the command line says of a comparison.
#[derive(Debug, Args)]
pub struct Choices {
    /// Run the seeds 0 to N - 1.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Compare although backbones or efforts differ; the table says by how much.
    #[arg(long)]
    unequal: bool,
    /// Print, last, the results as one JSON object.
    #[arg(long)]
    json: bool,
}

/// One system on the data set.
struct System {
    experiment: Experiment,
    plan: Plan,
}

/// Runs what is not done and prints the table.
pub fn run(options: &Options, choices: &Choices) -> Result<()> {
    ensure!(
        options.set.is_empty(),
        "compare runs the experiments as their files are; change a value in a copy of a file, or \
         with `reproduce --set`"
    );
    let systems = systems(&options.experiment)?;
    let first = systems.first().context("no experiment to compare")?;
    for other in &systems[1..] {
        require_one_data_set(&first.experiment, &other.experiment)?;
    }
    let backbones = systems.iter().map(|system| backbone(&system.experiment)).collect::<Vec<_>>();

    let mut rows = Vec::new();
    let mut problems = Vec::new();
    let mut benches = Vec::new();
    for system in &systems {
        benches.push(Bench::set_up(options, &system.plan)?);
    }
    let mut runs: Vec<Vec<Run>> = Vec::new();
    for bench in &benches {
        let Some(data) = bench.data()? else { return bench.say_what_would_run() };
        runs.push((0..choices.seeds).map(|seed| bench.run(seed, data)).collect::<Result<_>>()?);
    }
    let mut efforts = Vec::new();
    for (system, runs) in systems.iter().zip(&runs) {
        efforts.push(effort(system, &runs[0], Arm::Main)?);
    }
    for ((system, effort), backbone) in systems.iter().zip(&efforts).zip(&backbones) {
        let name = &system.experiment.name;
        if *backbone != backbones[0] {
            problems
                .push(format!("`{name}` has another backbone than `{}`", first.experiment.name));
        }
        match relative(*effort, efforts[0]) {
            Some(share) if (share - 1.).abs() <= TOLERANCE => {}
            Some(share) => problems.push(format!(
                "`{name}` passes {:.0} pictures through its backbone, {share:.3} of the {:.0} of \
                 `{}`; change its epochs",
                effort.unwrap_or_default(),
                efforts[0].unwrap_or_default(),
                first.experiment.name
            )),
            None => problems.push(format!(
                "`{name}` has a program that does not declare its effort (`backbone-pictures` \
                 under --check)"
            )),
        }
    }
    if !problems.is_empty() && !choices.unequal {
        bail!(
            "the systems are not comparable: {}; --unequal compares all the same",
            problems.join("; ")
        )
    }
    problems.iter().for_each(|problem| tracing::warn!("{problem}"));
    if options.dry_run {
        for (system, effort) in systems.iter().zip(&efforts) {
            let pictures = effort.map_or("?".to_owned(), |effort| format!("{effort:.0}"));
            println!("{}: {pictures} pictures through the backbone", system.experiment.name);
        }
        return Ok(());
    }

    for (system, runs) in systems.iter().zip(&runs) {
        let arms = |arm: &Arm| *arm != Arm::Pixels;
        for run in runs {
            let steps: Vec<usize> =
                (0..system.plan.steps.len()).filter(|&s| arms(&system.plan.steps[s].arm)).collect();
            run.check(steps.iter().copied())?;
        }
        for run in runs {
            let steps = (0..system.plan.steps.len()).filter(|&s| match system.plan.steps[s].arm {
                Arm::Main => true,
                // Only the first has the control that is the line to beat.
                Arm::Control => std::ptr::eq(system, first),
                Arm::Pixels => false,
            });
            run.execute(steps)?;
        }
    }

    if let Some(row) = line_to_beat(first, &runs[0])? {
        let effort = effort(first, &runs[0][0], Arm::Control)?;
        rows.push(Row { effort: relative(effort, efforts[0]), pictures: effort, ..row });
    }
    for ((system, runs), effort) in systems.iter().zip(&runs).zip(&efforts) {
        let row = result(system, runs)?;
        rows.push(Row { effort: relative(*effort, efforts[0]), pictures: *effort, ..row });
    }
    print!("{}", table(&first.experiment, &rows, choices.seeds, &problems)?);
    if choices.json {
        let rows: Vec<Value> = rows.iter().map(Row::json).collect();
        println!("{}", json!({ "rows": rows, "seeds": choices.seeds, "problems": problems }));
    }
    Ok(())
}

/// The experiments of a data set: PLDC's first, then those of the systems that are one stage.
fn systems(data_set: &str) -> Result<Vec<System>> {
    let mut systems = Vec::new();
    let open = |word: &str| -> Result<System> {
        let experiment = resolved(word, &[])?;
        let plan = Plan::of(&experiment)?;
        Ok(System { experiment, plan })
    };
    systems.push(open(data_set)?);
    for name in plan::systems() {
        let word = format!("{data_set}-{name}");
        if Path::new(stage::FOLDER).join(format!("{word}.toml")).exists() {
            systems.push(open(&word)?);
        } else {
            tracing::warn!("there is no experiment `{word}`: {name} is left out");
        }
    }
    Ok(systems)
}

/// Fails unless two experiments are about the same pictures and as many clusters.
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

/// The backbones that the tables of an experiment name, each once.
fn backbone(experiment: &Experiment) -> Vec<Toml> {
    let mut found = Vec::new();
    for place in plan::trained_places() {
        let of_place = experiment.value(place).and_then(|table| table.get("backbone"));
        found.extend(of_place.filter(|backbone| !found.contains(backbone)));
    }
    found.into_iter().cloned().collect()
}

/// Pictures that all steps of an arm pass through a backbone; nothing where a program that trains
/// does not tell.
fn effort(system: &System, run: &Run, arm: Arm) -> Result<Option<f64>> {
    let mut sum = 0.;
    for (position, step) in system.plan.steps.iter().enumerate() {
        if step.arm == arm {
            match run.declared_effort(position)? {
                Some(pictures) => sum += pictures,
                None => return Ok(None),
            }
        }
    }
    Ok(Some(sum))
}

fn relative(effort: Option<f64>, to: Option<f64>) -> Option<f64> {
    Some(effort? / to.filter(|to| *to > 0.)?)
}

/// One line of the table.
#[derive(Debug, Clone)]
struct Row {
    system: String,
    experiment: String,
    /// ACC, NMI, ARI.
    scores: [Option<Statistic>; 3],
    /// Of one seed.
    seconds: Option<Statistic>,
    peak_bytes: Option<u64>,
    /// Pictures through the backbone, and their share of the first system's.
    pictures: Option<f64>,
    effort: Option<f64>,
}

impl Row {
    fn json(&self) -> Value {
        let [acc, nmi, ari] = &self.scores;
        json!({
            "system": self.system,
            "experiment": self.experiment,
            "scores": {
                "acc": statistic_json(acc),
                "nmi": statistic_json(nmi),
                "ari": statistic_json(ari),
            },
            "seconds": self.seconds.as_ref().map(|seconds| seconds.mean),
            "peak-memory-bytes": self.peak_bytes,
            "backbone-pictures": self.pictures,
            "relative-effort": self.effort,
        })
    }
}

/// What a system ended with, by its own assignments.
fn result(system: &System, runs: &[Run]) -> Result<Row> {
    let last = system.plan.at(Arm::Main, "metrics").last();
    let last = last.context("nothing that the experiment runs is scored")?;
    let name = system.experiment.system()?;
    row(system, runs, name, Arm::Main, last, |metrics| metrics.head)
}

/// k-means on the embeddings that the control ends with.
fn line_to_beat(system: &System, runs: &[Run]) -> Result<Option<Row>> {
    let Some(last) = system.plan.at(Arm::Control, "metrics").last() else { return Ok(None) };
    let name = "k-means on BYOL".to_owned();
    row(system, runs, name, Arm::Control, last, |metrics| metrics.kmeans).map(Some)
}

fn row(
    system: &System,
    runs: &[Run],
    name: String,
    arm: Arm,
    metrics: usize,
    of: fn(&Metrics) -> Option<Scores>,
) -> Result<Row> {
    let found = runs
        .iter()
        .map(|run| Ok(of(&Metrics::read(&run.folder(metrics))?)))
        .collect::<Result<Vec<_>>>()?;
    let score = |part: fn(Scores) -> Option<f64>| {
        Statistic::of(found.iter().map(|scores| scores.and_then(part)))
    };
    let costs: Vec<Option<Cost>> = runs.iter().map(|run| cost(system, run, arm)).collect();
    let seconds = costs.iter().map(|cost| cost.map(|cost| cost.seconds));
    Ok(Row {
        system: name,
        experiment: system.experiment.name.clone(),
        scores: [score(|s| s.acc), score(|s| s.nmi), score(|s| s.ari)],
        seconds: Statistic::of(seconds),
        peak_bytes: costs.iter().flatten().filter_map(|cost| cost.peak_bytes).max(),
        pictures: None,
        effort: None,
    })
}

/// Cost of all steps of an arm; nothing where one ran before costs were kept.
fn cost(system: &System, run: &Run, arm: Arm) -> Option<Cost> {
    let steps = system.plan.steps.iter().enumerate().filter(|(_, step)| step.arm == arm);
    let mut costs = steps.map(|(position, _)| Cost::read(&run.folder(position)));
    costs.try_fold(Cost::default(), |sum, cost| Some(sum.and(cost?)))
}

const COLUMNS: [&str; 7] = ["", "ACC", "NMI", "ARI", "seconds", "peak MB", "effort"];

/// The table, scores in per cent, seconds of one seed.
fn table(experiment: &Experiment, rows: &[Row], seeds: u64, problems: &[String]) -> Result<String> {
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
        "\neffort: pictures through the backbone, by pixels, as a share of the first system's\n",
    );
    for problem in problems {
        let _ = writeln!(text, "not equal: {problem}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn experiment(text: &str) -> Experiment {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("example.toml");
        std::fs::write(&path, text).expect("written");
        Experiment::read(&path).expect("TOML")
    }

    const TEXT: &str = r#"
        [data]
        clusters = 3
        [prepare]
        source = "a"
        [pretraining.backbone]
        width = 4
        [secu.backbone]
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
    fn backbones_are_those_of_the_places_that_train() {
        assert_eq!(backbone(&experiment(TEXT)).len(), 1);
        let two = TEXT.replacen("width = 4", "width = 5", 1);
        assert_eq!(backbone(&experiment(&two)).len(), 2);
        assert_ne!(backbone(&experiment(&two)), backbone(&experiment(TEXT)));
    }

    #[test]
    fn the_table_has_a_row_for_each_system_and_says_what_is_not_equal() {
        let scores = |value: f64| Statistic::of([Some(value), Some(value)].into_iter());
        let row = Row {
            system: "SeCu".into(),
            experiment: "digits-secu".into(),
            scores: [scores(0.9), scores(0.8), None],
            seconds: scores(61.),
            peak_bytes: Some(120_000_000),
            pictures: Some(1000.),
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
