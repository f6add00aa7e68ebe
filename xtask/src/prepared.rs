//! The prepared data set: the pictures of an experiment in the form that every stage reads.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::json;

use crate::experiment::Experiment;
use crate::key::{self, Key};
use crate::programs::Program;
use crate::run::start;
use crate::store::{State, Store};

/// A data set that is prepared, or will be.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Its folder, with pictures, names and ground truth.
    pub folder: PathBuf,
    key: Key,
    store: Store,
}

impl Prepared {
    /// Where the data of this experiment lie. `source` is what the command line names instead of
    /// the experiment's own.
    pub fn of(
        experiment: &Experiment,
        source: Option<&Path>,
        program: &Program,
        runs: &Path,
    ) -> Result<Self> {
        let source = match source {
            Some(source) => source.to_owned(),
            None => experiment.source()?.into(),
        };
        let record = json!({
            "version": program.version,
            "table": experiment.table("prepare"),
            "source": source,
            "state": key::state_of(&source)?,
        });
        let name = source.file_stem().unwrap_or("data".as_ref()).to_string_lossy();
        let key = Key::of(&name, record);
        let store = Store::new(runs.join(".data"));
        Ok(Self { folder: store.path(&key), key, store })
    }

    /// True when nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.store.state(&self.key) == State::Done
    }

    /// Prepares the data, unless they are.
    pub fn make(
        &self,
        experiment_file: &Path,
        source: Option<&Path>,
        program: &Program,
    ) -> Result<()> {
        let _claim = self.store.claim(&self.key)?;
        if self.is_done() {
            return Ok(());
        }
        let mut arguments: Vec<OsString> = vec!["--experiment".into(), experiment_file.into()];
        if let Some(source) = source {
            arguments.extend(["--source".into(), source.into()]);
        }
        arguments.extend(["--out".into(), self.folder.clone().into()]);
        start("prepare", program, &arguments)
    }

    /// The pictures.
    pub fn images(&self) -> PathBuf {
        self.folder.join("images.safetensors")
    }

    /// What tells these pictures from any others.
    pub fn images_identity(&self) -> Result<String> {
        key::header_of(&self.images())
    }

    /// What tells this ground truth from any other.
    pub fn labels_identity(&self) -> Result<String> {
        key::header_of(&self.folder.join("labels.safetensors"))
    }
}
