//! The state of an interrupted run, from which a stage resumes to the same bits.
//!
//! `state.safetensors`, version 2, of a kind of its own for each stage. Header: `identity`, so that the
//! state of another run is refused, and `steps`, the steps done; the tensors are those of the stage. It is
//! removed once the result is written.
//!
//! The state holds the heads of all ranks, so that another number of ranks can resume.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use stage::Job;
use stage::container::{self, Container, Header, Tensor};

use crate::rows::FrozenEmbeddings;

const FILE: &str = "state.safetensors";
const VERSION: u64 = 2;

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

    /// Opens the state of an interrupted run, and returns it with the steps done. If there is none, clears
    /// the log and returns `None`.
    ///
    /// # Errors
    ///
    /// The state is damaged or belongs to another run, or the ranks differ in what they read.
    pub fn open(&self) -> Result<Option<(Container, usize)>> {
        let path = self.job.out.join(FILE);
        let found = path.exists().then(|| self.read(&path)).transpose()?;
        let place = format!("step {}", found.as_ref().map_or(0, |(_, steps)| *steps));
        self.job.check_agreement(&[&self.identity, &*place].concat(), &place)?;
        if found.is_none() {
            self.job.clear_log()?;
        }
        Ok(found)
    }

    fn read(&self, path: &Path) -> Result<(Container, usize)> {
        let file = Container::open(path, self.kind, VERSION)?;
        ensure!(
            file.header_text("identity")? == self.identity,
            "`{}` belongs to another run (its table, seed, round or images differ); remove the folder, \
             or name another with --out",
            path.display()
        );
        let steps = file.header_number("steps")? as usize;
        Ok((file, steps))
    }

    /// Removes the log lines of later steps than `done`, which run again, and that of the result.
    pub fn drop_later_log_lines(&self, done: usize) -> Result<()> {
        self.job.retain_log(|line| match line["step"].as_u64() {
            Some(step) => step <= done as u64,
            None => line["phase"] != "result",
        })
    }

    /// Writes the state on the first rank. All ranks call it, and none goes on before it is on disk.
    ///
    /// - `tensors`: of the heads of all ranks; those of the first rank are written.
    pub fn write(&self, steps: usize, tensors: &[Tensor]) -> Result<()> {
        if self.job.communicator.is_first() {
            let header = Header::from([
                ("identity".to_owned(), self.identity.clone().into()),
                ("steps".to_owned(), steps.into()),
            ]);
            container::write(&self.job.out.join(FILE), self.kind, VERSION, header, tensors)?;
        }
        Ok(self.job.communicator.barrier()?)
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
