//! Records of results, which are kept in the repository, and the tables that are made from them.
//!
//! `assort reproduce … --record configs/results` writes one; `cargo xtask results` makes the tables of the
//! documentation from all of them, so that no number is typed. A table stands between two lines:
//!
//! ```text
//! <!-- results: made by `cargo xtask results` -->
//! <!-- end of results -->
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::results::ExperimentResults;

/// The results of an experiment, and what is needed to get them again. File: `<experiment>.json`, or
/// `<experiment>-<start of the digest>.json` if values were changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ResultRecord {
    /// Name of the experiment.
    pub experiment: String,
    /// SHA-256 of the resolved experiment.
    pub digest: String,
    /// The values that `--set` changed.
    pub changes: Vec<String>,
    /// The commit of the folder in which the command ran, with `+` if files differed from it; `None` outside of a
    /// repository.
    pub commit: Option<String>,
    /// Its name as the system reports it.
    pub processor: Option<String>,
    /// Logical processors that the run could use.
    pub cores: usize,
    /// Elapsed seconds of each step, one for each seed. A step that two arms share is counted once.
    pub step_seconds: BTreeMap<String, Vec<f64>>,
    /// Scores by round, of the control and of the baselines, as `reproduce --json` prints them.
    pub results: Value,
}

impl ResultRecord {
    /// The record of these results.
    ///
    /// - `digest`: of the resolved experiment.
    /// - `changes`: the values that `--set` changed.
    pub fn new(results: &ExperimentResults, digest: String, changes: &[String]) -> Self {
        let mut json = results.json();
        if let Some(object) = json.as_object_mut() {
            // Paths and times of one machine.
            for key in ["assignments", "seconds", "experiment"] {
                object.remove(key);
            }
        }
        Self {
            experiment: results.experiment.clone(),
            digest,
            changes: changes.to_vec(),
            commit: commit(),
            processor: processor(),
            cores: thread::available_parallelism().map_or(1, usize::from),
            step_seconds: results.step_seconds.clone(),
            results: json,
        }
    }

    /// Writes it to `folder`, and returns the name of the file.
    pub fn write(&self, folder: &Path) -> Result<String> {
        let name = match self.changes.is_empty() {
            true => format!("{}.json", self.experiment),
            false => format!("{}-{:.8}.json", self.experiment, self.digest),
        };
        let text = serde_json::to_string_pretty(self)? + "\n";
        stage::files::write(&folder.join(&name), text.as_bytes())?;
        Ok(name)
    }

    /// All records in `folder`, by file name; none if there is no such folder.
    pub fn read_all(folder: &Path) -> Result<Vec<Self>> {
        let mut paths = match fs::read_dir(folder) {
            Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => vec![],
            Err(error) => return Err(error).context(format!("reading `{}`", folder.display())),
        };
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        let read = |path: &std::path::PathBuf| {
            let record = serde_json::from_str(&fs::read_to_string(path)?);
            record.with_context(|| format!("`{}` is not a record of results", path.display()))
        };
        paths.iter().map(read).collect()
    }

    /// A score in percent, `98.5 ± 0.8`, or `-`.
    fn percent(&self, pointer: &str) -> String {
        let number = |key: &str| self.results.pointer(&format!("{pointer}/{key}"))?.as_f64();
        match (number("mean"), number("std")) {
            (Some(mean), Some(deviation)) => {
                format!("{:.1} ± {:.1}", 100. * mean, 100. * deviation)
            }
            (Some(mean), None) => format!("{:.1}", 100. * mean),
            _ => "-".to_owned(),
        }
    }

    /// What is gained over the control: `+1.3 (bound +0.8): gain`, or `-` without a control.
    fn gain(&self) -> String {
        let value = |key: &str| self.results.pointer(&format!("/control/gain/acc/{key}"));
        let Some(mean) = value("mean").and_then(Value::as_f64) else { return "-".to_owned() };
        let bound = value("bound").and_then(Value::as_f64);
        match (bound, value("gain").and_then(Value::as_bool)) {
            (Some(bound), Some(is_gain)) => {
                let verdict = if is_gain { "gain" } else { "no gain shown" };
                format!("{:+.1} (bound {:+.1}): {verdict}", 100. * mean, 100. * bound)
            }
            _ => format!("{:+.1}", 100. * mean),
        }
    }

    fn cells(&self) -> Vec<String> {
        let seeds = self.results["seeds"].as_array();
        let seeds: Vec<String> = seeds.into_iter().flatten().map(Value::to_string).collect();
        let seconds: f64 = self.step_seconds.values().flatten().sum();
        let mut name = format!("`{}`", self.experiment);
        self.changes.iter().for_each(|change| name += &format!(", `{change}`"));
        vec![
            name,
            self.results["images"].to_string(),
            seeds.join(" "),
            self.percent("/baselines/kmeans-embedding/acc"),
            self.percent("/rounds/0/head/acc"),
            format!("**{}**", self.percent("/scores/acc")),
            self.percent("/control/scores/acc"),
            self.gain(),
            self.percent("/scores/nmi"),
            self.percent("/scores/ari"),
            format!("{:.1}", seconds * self.cores as f64 / 3600.),
            self.commit.as_ref().map_or("-".to_owned(), |commit| format!("`{commit}`")),
        ]
    }
}

const COLUMNS: [&str; 12] = [
    "experiment",
    "pictures",
    "seeds",
    "k-means on the pretrained embedding",
    "round 0",
    "**last round**",
    "control",
    "gain over the control",
    "NMI",
    "ARI",
    "core-hours",
    "commit",
];

/// The table of these records, in Markdown.
pub fn table(records: &[ResultRecord]) -> String {
    if records.is_empty() {
        return "No run is recorded yet.\n".to_owned();
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&COLUMNS.map(str::to_owned));
    text += &format!("|{}\n", "---|".repeat(COLUMNS.len()));
    text.extend(records.iter().map(|record| line(&record.cells())));
    text
}

/// The records of the repository.
const FOLDER: &str = "configs/results";
/// The document with their table.
const DOCUMENT: &str = "configs/README.md";

/// Makes the table of the documentation from the records of the repository.
///
/// - `root`: of the workspace.
pub fn update_documentation(root: &Path) -> Result<()> {
    let (path, records) = (root.join(DOCUMENT), ResultRecord::read_all(&root.join(FOLDER))?);
    let reading = || format!("reading `{}`", path.display());
    let text = fs::read_to_string(&path).with_context(reading)?;
    let text = with_table(&text, &table(&records)).with_context(reading)?;
    stage::files::write(&path, text.as_bytes())
}

const BEGIN: &str = "<!-- results: made by `cargo xtask results` -->\n";
const END: &str = "<!-- end of results -->\n";

/// `text` with `table` between its two lines; see the [module](self).
///
/// # Errors
///
/// A line is missing, or they are in the wrong order.
pub fn with_table(text: &str, table: &str) -> Result<String> {
    let place = text.find(BEGIN).map(|at| at + BEGIN.len()).zip(text.find(END));
    let (begin, end) = place.with_context(|| {
        format!("the lines `{}` and `{}` must both be there", BEGIN.trim(), END.trim())
    })?;
    ensure!(begin <= end, "`{}` stands before `{}`", END.trim(), BEGIN.trim());
    Ok(format!("{}\n{table}\n{}", &text[..begin], &text[end..]))
}

fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short", "HEAD"])?;
    let is_clean = git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty();
    Some(if is_clean { commit } else { commit + "+" })
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record() -> ResultRecord {
        ResultRecord {
            experiment: "example".into(),
            digest: "0123456789abcdef".into(),
            changes: vec![],
            commit: Some("abc1234".into()),
            processor: None,
            cores: 2,
            step_seconds: BTreeMap::from([
                ("0-pretraining".into(), vec![1800., 1800.]),
                ("1-embed".into(), vec![900., 900.]),
            ]),
            results: json!({
                "seeds": [0, 1],
                "images": 300,
                "rounds": [{ "head": { "acc": { "mean": 0.5, "std": 0.01 } } }],
                "scores": {
                    "acc": { "mean": 0.612, "std": 0.004 },
                    "nmi": { "mean": 0.4, "std": null },
                    "ari": null,
                },
                "baselines": { "kmeans-embedding": null },
                "control": {
                    "scores": { "acc": { "mean": 0.6, "std": 0. } },
                    "gain": { "acc": { "mean": 0.012, "bound": -0.001, "gain": false } },
                },
            }),
        }
    }

    #[test]
    fn records_are_read_as_written_and_changed_values_make_another_file() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let changed = ResultRecord { changes: vec!["a.b=1".into()], ..record() };
        assert_eq!(record().write(folder.path())?, "example.json");
        assert_eq!(changed.write(folder.path())?, "example-01234567.json");
        fs::write(folder.path().join("README.md"), "no record")?;
        assert_eq!(ResultRecord::read_all(folder.path())?, [changed, record()]);
        assert!(ResultRecord::read_all(&folder.path().join("none"))?.is_empty());
        fs::write(folder.path().join("other.json"), "{}")?;
        let error = ResultRecord::read_all(folder.path()).expect_err("another file");
        assert!(format!("{error:#}").contains("other.json"), "{error:#}");
        Ok(())
    }

    #[test]
    fn the_table_has_a_row_for_each_record() {
        let text = table(&[record()]);
        let row = text.lines().last().expect("a row");
        assert_eq!(
            row,
            "| `example` | 300 | 0 1 | - | 50.0 ± 1.0 | **61.2 ± 0.4** | 60.0 ± 0.0 | +1.2 (bound -0.1): \
             no gain shown | 40.0 | - | 3.0 | `abc1234` |"
        );
        assert_eq!(
            row.matches('|').count(),
            text.lines().nth(1).unwrap_or("").matches('|').count()
        );
        assert_eq!(table(&[]), "No run is recorded yet.\n");
    }

    #[test]
    fn the_table_replaces_what_is_between_its_lines() -> Result<()> {
        let text = format!("above\n{BEGIN}old\n{END}below\n");
        let new = with_table(&text, "new\n")?;
        assert_eq!(new, format!("above\n{BEGIN}\nnew\n\n{END}below\n"));
        assert_eq!(with_table(&new, "new\n")?, new);
        assert!(with_table("nothing", "new\n").is_err());
        assert!(with_table(&format!("{END}{BEGIN}"), "new\n").is_err());
        Ok(())
    }

    #[test]
    fn tables_of_the_documentation_are_those_of_the_records() -> Result<()> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let table = table(&ResultRecord::read_all(&root.join(FOLDER))?);
        let text = fs::read_to_string(root.join(DOCUMENT))?;
        assert!(with_table(&text, &table)? == text, "run `cargo xtask results`");
        Ok(())
    }
}
