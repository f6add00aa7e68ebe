//! The state of an interrupted run, from which a stage resumes to the same bits.
//!
//! `state.safetensors`, version 1, of a kind of its own for each stage. Header: `identity`, so that the
//! state of another run is refused, and counts; the tensors are those of the stage. It is removed once
//! the result is written.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use stage::Job;
use stage::container::{self, Container, Header, Tensor};

use crate::rows::FrozenEmbeddings;

const FILE: &str = "state.safetensors";
const VERSION: u64 = 1;

/// The file of a run's state.
pub struct HeadState<'a> {
    job: &'a Job,
    kind: &'static str,
    identity: String,
}

impl<'a> HeadState<'a> {
    /// The state of a job on these embeddings.
    ///
    /// - `table`: the stage's table of the experiment.
    ///
    /// # Errors
    ///
    /// The table cannot be written as JSON: a fault of this program.
    pub fn new(
        job: &'a Job,
        kind: &'static str,
        embeddings: &FrozenEmbeddings,
        table: &impl Serialize,
    ) -> Result<Self> {
        let identity = json!({
            "fingerprint": embeddings.data_set.fingerprint,
            "round": job.round,
            "seed": job.seed,
            "stage": job.name,
            "table": serde_json::to_value(table)?,
        });
        Ok(Self { job, kind, identity: identity.to_string() })
    }

    /// Opens the state of an interrupted run. If there is none, clears the log and returns `None`.
    ///
    /// # Errors
    ///
    /// The state is damaged or belongs to another run.
    pub fn open(&self) -> Result<Option<Container>> {
        let path = self.job.out.join(FILE);
        if !path.exists() {
            self.job.clear_log()?;
            return Ok(None);
        }
        let file = Container::open(&path, self.kind, VERSION)?;
        ensure!(
            file.header_text("identity")? == self.identity,
            "`{}` belongs to another run (its table, seed, round or images differ); remove the folder, \
             or name another with --out",
            path.display()
        );
        Ok(Some(file))
    }

    /// Removes the log lines of later steps than `done`, which run again, and that of the result.
    pub fn drop_later_log_lines(&self, done: usize) -> Result<()> {
        self.job.retain_log(|line| match line["step"].as_u64() {
            Some(step) => step <= done as u64,
            None => line["phase"] != "result",
        })
    }

    /// Writes the state.
    ///
    /// - `counts`: header fields.
    pub fn write(&self, counts: &[(&str, usize)], tensors: &[Tensor]) -> Result<()> {
        let counts = counts.iter().map(|&(name, count)| (name.to_owned(), count.into()));
        let mut header: Header = counts.collect();
        header.insert("identity".to_owned(), self.identity.clone().into());
        container::write(&self.job.out.join(FILE), self.kind, VERSION, header, tensors)
    }
}

/// Removes the state of a job if there is one.
///
/// # Errors
///
/// The file system refuses.
pub fn remove(job: &Job) -> Result<()> {
    let path = job.out.join(FILE);
    match path.exists() {
        true => fs::remove_file(&path).with_context(|| format!("removing `{}`", path.display())),
        false => Ok(()),
    }
}
