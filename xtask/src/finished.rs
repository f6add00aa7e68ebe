//! What a run has left under `runs/<experiment>/<seed>`: its steps, one view each.

use std::fs;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, ensure};
use toml::{Table, Value};

/// Which run a command is about.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// A run's folder (runs/digits/0), or an experiment's name.
    pub run: String,
    /// Which run of an experiment; and the seed of every random draw.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Use the programs in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// Where the results of runs are.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs: PathBuf,
}

impl Which {
    /// Makes the paths absolute that are seen from where the user stands.
    pub fn resolve_paths(&mut self) -> Result<()> {
        if Path::new(&self.run).exists() {
            self.run = absolute(&self.run)?.to_string_lossy().into_owned();
        }
        if let Some(programs) = &mut self.programs {
            *programs = absolute(&*programs)?;
        }
        if self.runs != Path::new("runs") {
            self.runs = absolute(&self.runs)?;
        }
        Ok(())
    }

    /// The run.
    ///
    /// # Errors
    ///
    /// As [`Finished::find`].
    pub fn find(&self) -> Result<Finished> {
        Finished::find(&self.run, &self.runs, self.seed)
    }
}

/// The steps of a run that have begun.
#[derive(Debug)]
pub struct Finished {
    /// The run's folder.
    pub folder: PathBuf,
    /// The experiment as it ran last, beside it.
    pub experiment: Option<PathBuf>,
    /// By round, and there as the experiment orders them.
    pub steps: Vec<Step>,
}

/// One of them.
#[derive(Debug, PartialEq)]
pub struct Step {
    /// The round, from 0.
    pub round: usize,
    /// What it is for: `clustering`.
    pub place: String,
    /// Where its files are.
    pub folder: PathBuf,
}

impl Finished {
    /// The run that a word means: its folder, or that of an experiment and a seed.
    ///
    /// # Errors
    ///
    /// There is no such folder, or it cannot be read.
    pub fn find(run: &str, runs: &Path, seed: u64) -> Result<Self> {
        let named = PathBuf::from(run);
        let folder = if named.is_dir() { named } else { runs.join(run).join(seed.to_string()) };
        ensure!(
            folder.is_dir(),
            "there is no run `{run}`: neither that folder nor `{}`; `cargo xtask reproduce {run}` \
             makes one",
            folder.display()
        );
        let mut steps = Vec::new();
        let entries = fs::read_dir(&folder);
        for entry in entries.with_context(|| format!("reading `{}`", folder.display()))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some((round, place)) = name.split_once('-') else { continue };
            if let Ok(round) = round.parse() {
                steps.push(Step { round, place: place.into(), folder: target(&entry.path()) });
            }
        }
        let experiment = folder.parent().and_then(last_experiment);
        let [first, then] = experiment.as_deref().map_or_else(Default::default, places);
        let position = |step: &Step| {
            let order = if step.round == 0 { &first } else { &then };
            let known = order.iter().position(|place| *place == step.place);
            known.unwrap_or(order.len())
        };
        steps.sort_by(|a, b| {
            (a.round, position(a), &a.place).cmp(&(b.round, position(b), &b.place))
        });
        Ok(Self { folder, experiment, steps })
    }

    /// The run in words: `digits, seed 0`.
    pub fn name(&self) -> String {
        let part =
            |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let experiment = self.folder.parent().map(part).unwrap_or_default();
        format!("{experiment}, seed {}", part(&self.folder))
    }

    /// The last step that left `file`.
    pub fn last_with(&self, file: &str) -> Option<&Step> {
        self.steps.iter().rev().find(|step| step.folder.join(file).is_file())
    }
}

/// Where a view leads; where links are not to be had, it is a file that holds the path.
pub fn target(view: &Path) -> PathBuf {
    match fs::read_to_string(view) {
        Ok(path) if view.is_file() => path.into(),
        _ => view.to_owned(),
    }
}

/// The file in the folder of an experiment that was written last.
fn last_experiment(folder: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(folder).ok()?.flatten().filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("experiment-") && name.ends_with(".toml")
    });
    let modified = |entry: &fs::DirEntry| entry.metadata().and_then(|found| found.modified()).ok();
    files.max_by_key(modified).map(|entry| entry.path())
}

/// The places of an experiment in their order, in the first and in later rounds. A file that cannot
/// be read is no error: they only put the steps in order.
fn places(experiment: &Path) -> [Vec<String>; 2] {
    let last = fs::read_to_string(experiment).ok();
    let table = last.and_then(|text| text.parse::<Table>().ok()).unwrap_or_default();
    ["first", "then"].map(|key| {
        let found = table.get("rounds").and_then(|rounds| rounds.get(key)?.as_array());
        found.into_iter().flatten().filter_map(Value::as_str).map(String::from).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_by_round_and_as_the_experiment_orders_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let run = runs.join("digits/3");
        for step in [
            "10-embed",
            "2-clustering",
            "2-embed",
            "2-metrics",
            "0-pretraining",
            "0-clustering",
            "x-embed",
            "report",
        ] {
            fs::create_dir_all(run.join(step)).expect("created");
        }
        let named = |found: &Finished| -> Vec<String> {
            found.steps.iter().map(|step| format!("{}-{}", step.round, step.place)).collect()
        };
        let find = |name: &str| Finished::find(name, &runs, 3).expect("a run");
        let by_name =
            ["0-clustering", "0-pretraining", "2-clustering", "2-embed", "2-metrics", "10-embed"];
        assert_eq!(named(&find("digits")), by_name);
        let rounds = "[rounds]\nfirst = ['pretraining', 'embed', 'clustering']\nthen = ['refinement', 'embed', 'clustering']";
        fs::write(runs.join("digits/experiment-1.toml"), rounds).expect("written");
        let ordered =
            ["0-pretraining", "0-clustering", "2-embed", "2-clustering", "2-metrics", "10-embed"];
        assert_eq!(named(&find("digits")), ordered);
        assert_eq!(named(&find(&run.to_string_lossy())), ordered);

        for step in ["0-clustering", "2-clustering"] {
            fs::write(run.join(step).join("a"), step).expect("written");
        }
        assert_eq!(find("digits").last_with("a").expect("there").round, 2);
        assert!(find("digits").last_with("b").is_none());
        // A view without links.
        let elsewhere = folder.path().join("elsewhere");
        fs::create_dir(&elsewhere).expect("created");
        fs::write(elsewhere.join("a"), "a").expect("written");
        fs::write(run.join("11-embed"), elsewhere.to_string_lossy().as_bytes()).expect("written");
        assert_eq!(find("digits").last_with("a").expect("there").folder, elsewhere);
    }

    #[test]
    fn a_run_that_is_not_there_is_said() {
        let error = Finished::find("digits", Path::new("none"), 0).expect_err("no run").to_string();
        assert!(error.contains("cargo xtask reproduce digits"), "{error}");
    }
}
