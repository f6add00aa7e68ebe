//! The record of a run: the plan that `runs/<experiment>/<seed>` shows.
//!
//! `run.json` has the experiment file, the prepared data and the key of every step of one plan. A
//! run writes it, together with the views, when it starts and again when it ends. If two commands
//! with different values run at once, the last to end is shown. `report`, `predict`, `export` and
//! `clusters` read what the record names, never other files in the folder.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use stage::{Claim, Experiment, Interrupt, Spec, digest, files, json};

use crate::owner;
use crate::store::{self, Hold, StepState, Store};

/// Name of the record in the folder of a run.
const FILE: &str = "run.json";

/// Name of the corrections by hand in the folder of a run. They belong to a person: no command removes them.
pub const CORRECTIONS: &str = "corrections.toml";

/// The view of the prepared data in the folder of a run.
const DATA: &str = "data";

const VERSION: u32 = 2;

/// One plan: the experiment of a run, and the keys of its results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunRecord {
    /// Version of this format.
    format_version: u32,
    /// The file of the resolved experiment, in the folder of the experiment.
    pub experiment: String,
    /// The seed.
    pub seed: u64,
    /// Key of the prepared data.
    pub data: String,
    /// All steps in order.
    pub steps: Vec<RecordedStep>,
}

/// A step of the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RecordedStep {
    /// The path of its view in the folder of the run: `0-embed`, `control/1-embed`.
    pub name: String,
    /// Its place.
    pub place: String,
    /// The round, from 0.
    pub round: usize,
    /// Whether it belongs to the experiment itself, not to a baseline or the control.
    pub is_main: bool,
    /// The key of its result.
    pub key: String,
    /// The key of its last finished result before this one, by another run in the same folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier: Option<String>,
}

impl RunRecord {
    /// The record of a plan.
    pub fn new(experiment: String, seed: u64, data: String, steps: Vec<RecordedStep>) -> Self {
        Self { format_version: VERSION, experiment, seed, data, steps }
    }

    /// The record in the folder of a run.
    ///
    /// # Errors
    ///
    /// There is none, or it is damaged or of another version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        ensure!(
            path.exists(),
            "`{}` is not the folder of a run: it has no `{FILE}`, which `assort reproduce` and \
             `assort stage` write",
            folder.display()
        );
        let advice = || {
            format!(
                "`{}` is damaged or of another version; `assort reproduce` writes it again",
                path.display()
            )
        };
        let record: Self = json::read(&path).with_context(advice)?;
        ensure!(record.format_version == VERSION, advice());
        Ok(record)
    }

    /// The last result of the step `name` that is not `key`: the one in this record, or, until that is
    /// finished, the one before it.
    pub fn earlier_than(&self, key: &str, name: &str, store: &Store) -> Option<&str> {
        let step = self.steps.iter().find(|step| step.name == name)?;
        let (last, before) = (Some(&step.key), step.earlier.as_ref());
        let is_done = store.state(&step.key) == StepState::Done;
        let found = if is_done && step.key != key { last } else { before.or(last) };
        found.map(String::as_str).filter(|&found| found != key)
    }

    /// Fails if a view of this plan would replace something that is not a view.
    pub fn require_replaceable(&self, folder: &Path) -> Result<()> {
        let names = self.steps.iter().map(|step| step.name.as_str()).chain([DATA]);
        names.map(|name| folder.join(name)).try_for_each(|view| store::require_replaceable(&view))
    }

    /// Writes the record and replaces the views of `folder` by those of this plan's started steps.
    pub fn publish(&self, folder: &Path, runs: &Path, interrupt: &Interrupt) -> Result<()> {
        self.require_replaceable(folder)?;
        let _claim = Claim::wait(folder, interrupt)?;
        files::remove_abandoned(folder)?;
        json::write(&folder.join(FILE), self)?;
        let steps = Store::of_steps(runs);
        let is_begun = |step: &&RecordedStep| steps.state(&step.key) != StepState::New;
        let begun: Vec<&RecordedStep> = self.steps.iter().filter(is_begun).collect();
        remove_views_but(folder, &begun.iter().map(|step| step.name.as_str()).collect())?;
        for step in begun {
            store::show(&folder.join(&step.name), &steps.path(&step.key))?;
        }
        store::show(&folder.join(DATA), &Store::of_data(runs).path(&self.data))
    }
}

/// Removes the views in `folder` and its subfolders that are not in `kept`, and what killed commands
/// left in the subfolders.
fn remove_views_but(folder: &Path, kept: &BTreeSet<&str>) -> Result<()> {
    let mut views = Vec::new();
    for name in entries(folder)? {
        let path = folder.join(&name);
        if path.is_dir() && !path.is_symlink() {
            files::remove_abandoned(&path)?;
            views.extend(entries(&path)?.into_iter().map(|below| format!("{name}/{below}")));
        } else {
            views.push(name);
        }
    }
    let is_step = |view: &String| {
        let name = view.rsplit('/').next().unwrap_or(view);
        let round = name.split_once('-').map(|(round, _)| round.parse::<usize>());
        matches!(round, Some(Ok(_)))
    };
    for view in views.iter().filter(|view| is_step(view) && !kept.contains(view.as_str())) {
        let path = folder.join(view);
        if store::is_view(&path) {
            fs::remove_file(&path).with_context(|| format!("removing `{}`", path.display()))?;
        }
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let read = || format!("reading `{}`", folder.display());
    let entries = fs::read_dir(folder).with_context(read)?;
    entries
        .map(|entry| Ok(entry.with_context(read)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Selects the run for a command.
#[derive(Debug, Clone, clap::Args)]
pub struct Which {
    /// A run's folder (runs/digits/0), or an experiment's name or file.
    pub run: String,
    /// The run's seed, if RUN is an experiment; also the seed of every random draw.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// The folder of all results.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs: PathBuf,
}

/// A run with its record.
#[derive(Debug)]
pub struct Recorded {
    /// The run's folder.
    pub folder: PathBuf,
    /// The folder of all runs.
    pub runs: PathBuf,
    /// The plan.
    pub record: RunRecord,
}

impl Which {
    /// The run in a folder.
    pub fn of_folder(folder: &Path) -> Self {
        Self { run: folder.to_string_lossy().into_owned(), seed: 0, runs: PathBuf::new() }
    }

    /// Finds the run.
    ///
    /// # Errors
    ///
    /// There is no such run, or it has no record.
    pub fn find(&self) -> Result<Recorded> {
        let named = PathBuf::from(&self.run);
        let word = self.run.strip_suffix(".toml").unwrap_or(&self.run);
        let name = Path::new(word).file_name().unwrap_or_default();
        let by_name = self.runs.join(name).join(self.seed.to_string());
        let folder = if named.is_dir() { named } else { by_name };
        ensure!(
            folder.is_dir(),
            "there is no run `{}`: neither that folder nor `{}`; {}",
            self.run,
            folder.display(),
            self.runs_here()
        );
        Recorded::open(folder)
    }

    /// What runs there are in place of one that is not found.
    fn runs_here(&self) -> String {
        let has_run = |experiment: &Path| {
            let runs = fs::read_dir(experiment).into_iter().flatten().flatten();
            runs.into_iter().any(|run| run.path().join(FILE).is_file())
        };
        let folders = fs::read_dir(&self.runs).into_iter().flatten().flatten();
        let folders = folders.map(|folder| folder.path()).filter(|folder| has_run(folder));
        let mut names: Vec<String> = folders
            .filter_map(|folder| Some(folder.file_name()?.to_string_lossy().into_owned()))
            .collect();
        names.sort_unstable();
        if names.is_empty() {
            return "`assort reproduce EXPERIMENT` makes one, and `assort cluster FOLDER`"
                .to_owned();
        }
        let more = names.split_off(names.len().min(10));
        let more =
            if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
        format!("there are runs of {}{more}", names.join(", "))
    }
}

impl Recorded {
    fn open(folder: PathBuf) -> Result<Self> {
        let record = RunRecord::read(&folder)?;
        let absolute = fs::canonicalize(&folder)?;
        let runs = absolute.parent().and_then(Path::parent);
        let runs = runs.with_context(|| format!("`{}` has no parent folder", folder.display()))?;
        Ok(Self { runs: runs.to_owned(), folder, record })
    }

    /// The name of the run for messages: `digits, seed 0`.
    pub fn name(&self) -> String {
        format!("{}, seed {}", self.experiment_name(), self.record.seed)
    }

    /// The name of the experiment.
    pub fn experiment_name(&self) -> String {
        let folder = fs::canonicalize(&self.folder).unwrap_or_else(|_| self.folder.clone());
        let experiment = folder.parent().and_then(Path::file_name).unwrap_or_default();
        experiment.to_string_lossy().into_owned()
    }

    /// The resolved experiment.
    ///
    /// # Errors
    ///
    /// Its file is missing, or was changed: its name states a digest of the contents.
    pub fn experiment(&self) -> Result<Experiment> {
        let path = self.runs.join(self.experiment_name()).join(&self.record.experiment);
        let text = fs::read(&path).with_context(|| format!("opening `{}`", path.display()))?;
        ensure!(
            self.record.experiment.ends_with(&format!("-{}.toml", digest_of(&text))),
            "`{}` was changed after it was written; {} with the same values writes it again",
            path.display(),
            self.command()
        );
        Experiment::read(&path)
    }

    /// The command that made the run, without its flags.
    pub fn command(&self) -> String {
        match owner::pictures_of(&self.runs.join(self.experiment_name())) {
            Some(pictures) => format!("`assort cluster {pictures}`"),
            None => format!("`assort reproduce {}`", self.experiment_name()),
        }
    }

    /// The folder of the prepared data.
    pub fn data(&self) -> PathBuf {
        Store::of_data(&self.runs).path(&self.record.data)
    }

    /// The file of corrections by hand, if there is one.
    pub fn corrections(&self) -> Option<PathBuf> {
        Some(self.folder.join(CORRECTIONS)).filter(|path| path.exists())
    }

    /// The folder of a step's result.
    pub fn path(&self, step: &RecordedStep) -> PathBuf {
        Store::of_steps(&self.runs).path(&step.key)
    }

    /// The finished steps of the experiment itself, in order.
    pub fn finished(&self) -> Vec<&RecordedStep> {
        let store = Store::of_steps(&self.runs);
        let is_done =
            |step: &&RecordedStep| step.is_main && store.state(&step.key) == StepState::Done;
        self.record.steps.iter().filter(is_done).collect()
    }

    /// The first unfinished step of the experiment itself.
    pub fn unfinished(&self) -> Option<&RecordedStep> {
        let store = Store::of_steps(&self.runs);
        let is_open =
            |step: &&RecordedStep| step.is_main && store.state(&step.key) != StepState::Done;
        self.record.steps.iter().find(is_open)
    }

    /// Warns if the run is not finished.
    ///
    /// - `consequence`: what the command does then: "the report shows the result up to 0-clustering".
    pub fn warn_if_unfinished(&self, consequence: fmt::Arguments) {
        if let Some(unfinished) = self.unfinished() {
            tracing::warn!(
                "{} is not finished: {} is missing or damaged; {}. `assort reproduce` makes it",
                self.name(),
                unfinished.name,
                consequence
            );
        }
    }

    /// The last finished step whose place satisfies `fits`.
    pub fn last(&self, stages: &[Spec], fits: fn(&Spec) -> bool) -> Option<&RecordedStep> {
        let is_fit = |step: &&RecordedStep| {
            stages.iter().any(|stage| stage.name == step.place && fits(stage))
        };
        self.finished().into_iter().rev().find(is_fit)
    }

    /// Calls [`Store::removing_damaged`] for all steps of the run. The caller must hold none of them.
    pub fn removing_damaged<T>(&self, result: Result<T>, interrupt: &Interrupt) -> Result<T> {
        let keys = self.record.steps.iter().map(|step| &*step.key);
        Store::of_steps(&self.runs).removing_damaged(result, keys, interrupt)
    }

    /// Prevents the removal of these steps' results and of the data while they are read.
    pub fn hold(&self, steps: &[&RecordedStep], interrupt: &Interrupt) -> Result<Vec<Hold>> {
        let data = Store::of_data(&self.runs).hold(&self.record.data, interrupt);
        let store = Store::of_steps(&self.runs);
        let steps = steps.iter().map(|step| store.hold(&step.key, interrupt));
        [data].into_iter().chain(steps).collect()
    }
}

/// The part of a resolved experiment's file name that depends on its contents.
pub fn digest_of(experiment: &[u8]) -> String {
    digest::sha256(experiment)[..8].to_owned()
}

#[cfg(test)]
mod tests {
    use stage::Ranks;
    use stage::finished::{self, Digests};

    use super::*;

    /// A record of these steps, all of them started, and those in `done` finished.
    fn record(runs: &Path, names: &[&str], done: &[&str]) -> RunRecord {
        let store = Store::of_steps(runs);
        let step = |name: &&str| {
            let (round, place) =
                name.rsplit('/').next().and_then(|name| name.split_once('-')).expect("a step");
            let key = format!("{place}-{round}");
            fs::create_dir_all(store.path(&key)).expect("created");
            if done.contains(name) {
                finished::mark(&store.path(&key), name, None, Digests::Listed).expect("marked");
            }
            let is_main = !name.contains('/');
            let round = round.parse().expect("a number");
            let (name, place) = ((*name).into(), place.into());
            RecordedStep { name, place, round, is_main, key, earlier: None }
        };
        fs::create_dir_all(Store::of_data(runs).path("data-1")).expect("created");
        let steps = names.iter().map(step).collect();
        RunRecord::new("experiment-1.toml".into(), 3, "data-1".into(), steps)
    }

    fn views(folder: &Path) -> Vec<String> {
        let mut views = entries(folder).expect("a folder");
        views.retain(|name| name != FILE);
        views.sort();
        views
    }

    #[test]
    fn the_views_are_those_of_the_last_plan_and_nothing_else_is_touched() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let run = runs.join("digits/3");
        let long = ["0-embed", "1-embed", "2-embed", "control/1-embed", "control/2-embed"];
        let publish =
            |names: &[&str]| record(&runs, names, &[]).publish(&run, &runs, &Interrupt::default());
        publish(&long).expect("written");
        assert_eq!(views(&run), ["0-embed", "1-embed", "2-embed", "control", "data"]);
        fs::create_dir(run.join("9-mine")).expect("created");
        publish(&["0-embed", "1-embed", "control/1-embed"]).expect("written");
        assert_eq!(views(&run), ["0-embed", "1-embed", "9-mine", "control", "data"]);
        assert_eq!(views(&run.join("control")), ["1-embed"]);

        // A user's folder in the place of a view: refused before anything is changed.
        fs::create_dir(run.join("2-embed")).expect("created");
        let error = publish(&long).expect_err("a folder").to_string();
        assert!(error.contains("2-embed"), "{error}");
        assert_eq!(views(&run.join("control")), ["1-embed"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_files_of_killed_commands_are_removed_and_seen_by_nobody() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let runs = folder.path().join("runs");
        let run = runs.join("digits/3");
        let record = record(&runs, &["0-embed", "control/1-embed"], &["0-embed"]);
        record.publish(&run, &runs, &Interrupt::default())?;
        for left in [".unfinished-0-embed.17", "control/.unfinished-1-embed.17"] {
            std::os::unix::fs::symlink(Store::of_steps(&runs).path("embed-0"), run.join(left))?;
        }
        fs::write(run.join(".unfinished-run"), "{")?;
        fs::write(run.join(".report.lock"), "")?;
        let which = Which { run: "digits".into(), seed: 3, runs: runs.clone() };
        assert_eq!(which.find()?.finished(), [&record.steps[0]]);
        std::thread::sleep(std::time::Duration::from_millis(150));
        record.publish(&run, &runs, &Interrupt::default())?;
        assert_eq!(views(&run), ["0-embed", "control", "data"]);
        assert_eq!(views(&run.join("control")), ["1-embed"]);
        Ok(())
    }

    #[test]
    fn the_earlier_result_of_a_step_is_the_last_finished_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let store = Store::of_steps(&runs);
        let finished = record(&runs, &["0-embed"], &["0-embed"]);
        let key = "embed-0";
        let earlier = |record: &RunRecord, key| {
            record.earlier_than(key, "0-embed", &store).map(str::to_owned)
        };
        assert_eq!(earlier(&finished, "embed-1").as_deref(), Some(key));
        assert_eq!(earlier(&finished, key), None, "itself");
        assert_eq!(finished.earlier_than(key, "0-temi", &store), None);

        // The next run was interrupted: it is not finished, but the one before it is.
        let mut next = finished.clone();
        (next.steps[0].key, next.steps[0].earlier) = ("embed-1".into(), Some(key.into()));
        assert_eq!(earlier(&next, "embed-1").as_deref(), Some(key), "resumed");
        assert_eq!(earlier(&next, "embed-2").as_deref(), Some(key), "another one");
        // With nothing before it, what it has done is all that there is.
        next.steps[0].earlier = None;
        assert_eq!(earlier(&next, "embed-2").as_deref(), Some("embed-1"));
        // Back to the first values: the result is there, and the one before stays known.
        let mut back = finished;
        back.steps[0].earlier = Some("embed-1".into());
        assert_eq!(earlier(&back, key).as_deref(), Some("embed-1"));
        assert_eq!(earlier(&back, "embed-3").as_deref(), Some(key));
    }

    #[test]
    fn a_run_is_found_by_name_by_file_and_by_folder_and_reads_what_its_record_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let run = runs.join("digits/3");
        let names = ["0-pretraining", "0-clustering", "1-clustering", "control/1-clustering"];
        let record = record(&runs, &names, &["0-pretraining", "0-clustering"]);
        record.publish(&run, &runs, &Interrupt::default()).expect("written");
        let find = |name: &str| Which { run: name.into(), seed: 3, runs: runs.clone() }.find();
        for word in ["digits", "configs/digits.toml", &run.to_string_lossy()] {
            let found = find(word).expect("a run");
            assert_eq!(found.record, record, "{word}");
            assert_eq!(found.name(), "digits, seed 3", "{word}");
        }
        let found = find("digits").expect("a run");
        assert_eq!(found.unfinished().map(|step| step.name.as_str()), Some("1-clustering"));
        let outputs = &[stage::Output::PseudoLabels];
        let clustering =
            Spec { name: "clustering", algorithm: 1, inputs: &[], outputs, ranks: Ranks::One };
        let last = found.last(&[clustering], Spec::clusters).expect("one is finished");
        assert_eq!(last.name, "0-clustering");
        assert!(finished::is_finished(&found.path(last)));

        let error = find("photos").expect_err("no run").to_string();
        assert!(error.contains("there are runs of digits"), "{error}");
        let empty = Which { run: "photos".into(), seed: 3, runs: runs.join("none") };
        let error = empty.find().expect_err("no runs").to_string();
        assert!(error.contains("assort reproduce") && error.contains("assort cluster"), "{error}");
        fs::create_dir_all(runs.join("photos/3")).expect("created");
        let error = find("photos").expect_err("no record").to_string();
        assert!(error.contains(FILE), "{error}");
        fs::write(runs.join("photos/3").join(FILE), "{}").expect("written");
        find("photos").expect_err("a damaged record");
    }

    #[test]
    fn a_changed_record_and_a_changed_experiment_are_not_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let runs = folder.path().join("runs");
        let run = runs.join("digits/3");
        let text = "[data]\nclusters = 3\n";
        let experiment = format!("experiment-{}.toml", digest_of(text.as_bytes()));
        let record = RunRecord { experiment, ..record(&runs, &["0-embed"], &["0-embed"]) };
        record.publish(&run, &runs, &Interrupt::default())?;
        let which = Which { run: "digits".into(), seed: 3, runs: runs.clone() };
        let path = runs.join("digits").join(&record.experiment);
        fs::write(&path, text)?;
        assert!(which.find()?.experiment()?.value("data").is_some());
        fs::write(&path, text.replace('3', "7"))?;
        let error = which.find()?.experiment().expect_err("changed").to_string();
        assert!(error.contains("experiment-") && error.contains("assort reproduce"), "{error}");

        let changed = fs::read_to_string(run.join(FILE))?.replace("\"seed\": 3", "\"seed\": 7");
        fs::write(run.join(FILE), changed)?;
        let error = which.find().expect_err("changed").to_string();
        assert!(error.contains(FILE) && error.contains("assort reproduce"), "{error}");
        Ok(())
    }
}
