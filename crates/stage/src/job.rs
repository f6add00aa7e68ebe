//! The job of one run of a stage.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use collective::Communicator;
use serde::Serialize;
use serde_json::Value;

use crate::digest::sha256;
use crate::progress::{Progress, Unit};
use crate::{DataTable, DeviceChoice, Interrupt, Interrupted, event_file, files, json};

/// The job of one run of a stage: the arguments of its program, and the shared table `[data]`.
#[derive(Debug, Clone)]
pub struct Job {
    /// Name of the stage, and of its table.
    pub name: &'static str,
    /// `images.safetensors`.
    pub images: PathBuf,
    /// Folders of earlier outputs by role.
    pub inputs: BTreeMap<String, PathBuf>,
    /// Folder to write into.
    pub out: PathBuf,
    /// Which round of the loop this is, from 0.
    pub round: usize,
    /// How many rounds follow round 0.
    pub rounds: usize,
    /// Seed of every random draw.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceChoice,
    /// The table `[data]`.
    pub data: DataTable,
    /// Raised when the stage is to save and stop.
    pub interrupt: Interrupt,
    /// The ranks that share the work; the first one writes.
    pub communicator: Communicator,
}

/// Name of the log in a stage's folder.
pub(crate) const LOG: &str = "log.jsonl";

impl Job {
    /// The job of a stage that stands alone: no inputs but the pictures, one round, seed 0, on the
    /// CPU, never interrupted. Set the fields to change it.
    pub fn new(
        name: &'static str,
        images: impl Into<PathBuf>,
        out: impl Into<PathBuf>,
        data: DataTable,
    ) -> Self {
        Self {
            name,
            images: images.into(),
            inputs: BTreeMap::new(),
            out: out.into(),
            round: 0,
            rounds: 0,
            seed: 0,
            device: DeviceChoice::Cpu,
            data,
            interrupt: Interrupt::default(),
            communicator: Communicator::single(),
        }
    }

    /// The stage and its round, as its progress names them: `embed, round 1 of 2`.
    pub fn label(&self) -> String {
        match self.rounds {
            0 => self.name.to_owned(),
            rounds => format!("{}, round {} of {rounds}", self.name, self.round),
        }
    }

    /// The folder of the input `role`.
    ///
    /// # Errors
    ///
    /// It was not given; the message says which flag to add.
    pub fn input(&self, role: &str) -> Result<&Path> {
        self.optional_input(role).with_context(|| {
            format!(
                "{} needs the input {role}; add --in {role}=DIR with the folder that holds it",
                self.name
            )
        })
    }

    /// The folder of the input `role`, if one was given.
    pub fn optional_input(&self, role: &str) -> Option<&Path> {
        self.inputs.get(role).map(PathBuf::as_path)
    }

    /// The same job for this rank alone, which then must not wait for the others.
    pub fn alone(&self) -> Self {
        Self { communicator: Communicator::single(), ..self.clone() }
    }

    /// Fails unless all ranks give the same text: what they read and where they are.
    ///
    /// - `place`: where this rank is, for the message.
    ///
    /// # Errors
    ///
    /// The ranks differ, or one has ended.
    pub fn check_agreement(&self, read: &str, place: &str) -> Result<()> {
        let own = sha256(read.as_bytes()).into_bytes();
        let all = self.communicator.all_gather(&own)?;
        ensure!(
            all.chunks(own.len()).all(|rank| rank == own),
            "the ranks differ in table, seed, images, network or state: rank {} of {} found {place} in `{}`; \
             start all with the same arguments, on one file system",
            self.communicator.rank(),
            self.communicator.size(),
            self.out.display()
        );
        Ok(())
    }

    /// A progress bar of this stage, on the first rank; the others show none.
    pub fn progress(&self, total: u64, unit: Unit) -> Progress {
        match self.communicator.is_first() {
            true => Progress::new(&self.label(), total, unit),
            false => Progress::hidden(),
        }
    }

    /// Fails where any rank was asked to stop. All ranks call it at the same points.
    ///
    /// # Errors
    ///
    /// [`Interrupted`], on all ranks; or a rank has ended.
    pub fn check_interrupt(&self) -> Result<()> {
        match self.communicator.any(self.interrupt.is_raised())? {
            true => Err(Interrupted.into()),
            false => Ok(()),
        }
    }

    /// Appends one JSON object as a line of `log.jsonl`, the one output that may hold times. The line
    /// has a digest, see [`json`]. Its numbers also go to [`EVENTS`](crate::EVENTS), for TensorBoard.
    /// Of several ranks, the first one writes; so do the other methods that change the log.
    pub fn log(&self, line: &impl Serialize) -> Result<()> {
        if !self.communicator.is_first() {
            return Ok(());
        }
        let path = self.out.join(LOG);
        let mut text = json::to_line(line)?;
        text.push('\n');
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("writing `{}`", path.display()))?;
        event_file::append(&self.out, &path, &text)
    }

    /// Keeps the lines of the log that `is_kept` accepts. A resumed stage drops those that a killed run
    /// wrote after its last checkpoint, because their steps run again.
    pub fn retain_log(&self, is_kept: impl Fn(&Value) -> bool) -> Result<()> {
        if !self.communicator.is_first() {
            return Ok(());
        }
        let path = self.out.join(LOG);
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let is_kept = |line: &&str| serde_json::from_str(line).is_ok_and(|line| is_kept(&line));
        let kept: String = text.lines().filter(is_kept).map(|line| format!("{line}\n")).collect();
        event_file::remove(&self.out)?;
        if kept == text { Ok(()) } else { files::write(&path, kept.as_bytes()) }
    }

    /// Removes the log of an earlier attempt. A stage calls it before it starts from scratch, so that
    /// the log describes one attempt.
    pub fn clear_log(&self) -> Result<()> {
        if !self.communicator.is_first() {
            return Ok(());
        }
        event_file::remove(&self.out)?;
        files::remove_if_there(&self.out.join(LOG))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(out: &Path) -> Job {
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
        Job {
            inputs: BTreeMap::from([("network".to_owned(), PathBuf::from("n"))]),
            ..Job::new("example", "i.safetensors", out, data)
        }
    }

    #[test]
    fn a_missing_role_names_the_flag() {
        let job = job(Path::new("o"));
        assert_eq!(job.input("network").expect("given"), Path::new("n"));
        assert_eq!(job.optional_input("previous"), None);
        let error = job.input("embeddings").expect_err("absent").to_string();
        assert!(error.contains("--in embeddings=DIR") && error.contains("example"), "{error}");
    }

    #[test]
    fn log_lines_add_up_until_the_log_is_cleared() {
        let folder = tempfile::tempdir().expect("a folder");
        let job = job(folder.path());
        let epochs = || -> Vec<u64> {
            let log = fs::read_to_string(folder.path().join(LOG)).expect("there");
            let epoch = |line| json::of_line(line).expect("sound")["epoch"].as_u64();
            log.lines().map(|line| epoch(line).expect("a number")).collect()
        };
        job.clear_log().expect("nothing to clear");
        job.log(&serde_json::json!({"epoch": 1})).expect("logged");
        job.log(&serde_json::json!({"epoch": 2})).expect("logged");
        assert_eq!(epochs(), [1, 2]);
        job.retain_log(|line| line["epoch"] != 1).expect("dropped");
        assert_eq!(epochs(), [2]);
        job.clear_log().expect("cleared");
        job.log(&serde_json::json!({"epoch": 1})).expect("logged");
        assert_eq!(epochs(), [1]);
    }
}
