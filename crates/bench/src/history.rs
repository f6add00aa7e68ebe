//! The rows of earlier benchmarks, so that a loss shows.
//!
//! A file of lines, an object each: a [`Comparison`] as `--json` prints it, with `date` (UTC, RFC 3339),
//! `commit`, `threads` and `machine`.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{Comparison, Machine};

/// Earlier rows, and the file that new ones are appended to.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    rows: Vec<Value>,
    commit: String,
    threads: usize,
    machine: Machine,
}

impl History {
    /// Reads the file at `path`, which may be missing.
    ///
    /// - `commit`: of the program that is measured.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or a line is not an object.
    pub fn open(path: &Path, commit: &str, threads: usize, machine: &Machine) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.with_context(|| format!("reading `{}`", path.display()))?,
        };
        let row = |(number, line): (usize, &str)| {
            serde_json::from_str(line).with_context(|| {
                let number = number + 1;
                format!("line {number} of `{}` is damaged; remove that line", path.display())
            })
        };
        let rows = text.lines().enumerate().map(row).collect::<Result<_>>()?;
        let (path, commit) = (path.to_owned(), commit.to_owned());
        Ok(Self { path, rows, commit, threads, machine: machine.clone() })
    }

    /// Says how `row` compares with the last one of the same work, peer, processor and number of threads;
    /// `None` if there is none.
    pub fn compared(&self, row: &Comparison) -> Option<String> {
        let before = self.rows.iter().rev().find(|before| {
            before["work"] == row.work.as_str()
                && before["threads"] == self.threads
                && before["machine"]["processor"] == self.machine.processor.as_str()
                && before["peer-name"] == json!(row.peer_name)
        })?;
        let number = |key: &str| before[key].as_f64();
        let commit = before["commit"].as_str().unwrap_or("an unknown commit");
        let (ratio, least, most) = (number("ratio")?, number("ratio-min")?, number("ratio-max")?);
        let verdict = match (row.ratio_min?, row.ratio_max?) {
            (_, now) if now < least => "LOSS: ",
            (now, _) if now > most => "gain: ",
            _ => "",
        };
        Some(format!("{verdict}{ratio:.2} at {commit}"))
    }

    /// Appends `row` to the file.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn append(&self, row: &Comparison) -> Result<()> {
        let mut line = serde_json::to_value(row)?;
        line["date"] = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true).into();
        line["commit"] = self.commit.as_str().into();
        line["threads"] = self.threads.into();
        line["machine"] = serde_json::to_value(&self.machine)?;
        let context = || format!("writing `{}`", self.path.display());
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder).with_context(context)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&self.path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
            .with_context(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(processor: &str) -> Machine {
        Machine { processor: processor.into(), instructions: vec![], processors: 2, busy: None }
    }

    fn row(ratio: f64) -> Comparison {
        Comparison {
            work: "w".into(),
            keys: serde_json::Map::new(),
            unit: "s".into(),
            ours: 1.,
            peer: Some(ratio),
            ratio: Some(ratio),
            ratio_min: Some(ratio - 0.1),
            ratio_max: Some(ratio + 0.1),
            processor_ratio: None,
            peak_mb: 1.,
            peer_peak_mb: None,
            peer_name: Some("p".into()),
            peer_note: None,
        }
    }

    #[test]
    fn a_loss_is_named_with_the_commit_that_was_faster() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("bench/w.jsonl");
        let open = |commit: &str, threads, processor: &str| {
            History::open(&path, commit, threads, &machine(processor)).expect("readable")
        };
        let first = open("aaaaaaa", 2, "X");
        assert_eq!(first.compared(&row(2.)), None);
        first.append(&row(2.)).expect("written");
        let second = open("bbbbbbb", 2, "X");
        let said = |ratio| second.compared(&row(ratio)).expect("a row before");
        assert_eq!(said(2.05), "2.00 at aaaaaaa");
        assert_eq!(said(1.5), "LOSS: 2.00 at aaaaaaa");
        assert_eq!(said(2.5), "gain: 2.00 at aaaaaaa");
        // Of another machine, number of threads, work or peer nothing follows.
        assert_eq!(open("b", 2, "Y").compared(&row(2.)), None);
        assert_eq!(open("b", 1, "X").compared(&row(2.)), None);
        for other in [
            Comparison { work: "v".into(), ..row(2.) },
            Comparison { peer_name: Some("q".into()), ..row(2.) },
        ] {
            assert_eq!(second.compared(&other), None);
        }
        second.append(&row(1.5)).expect("written");
        let last = open("ccccccc", 2, "X").compared(&row(1.5));
        assert_eq!(last.as_deref(), Some("1.50 at bbbbbbb"));
        let text = fs::read_to_string(&path).expect("there");
        let line: Value = serde_json::from_str(text.lines().next().expect("a line")).expect("JSON");
        for key in ["date", "commit", "threads", "machine", "work", "ratio", "peer-name"] {
            assert!(line.get(key).is_some(), "{key} is not in {line}");
        }
        fs::write(&path, text + "{\n").expect("written");
        let error = History::open(&path, "d", 2, &machine("X")).expect_err("damaged").to_string();
        assert!(error.contains("line 3"), "{error}");
    }
}
