//! The prepared data set: the pictures of an experiment in the form that every stage reads.

use std::ffi::OsString;
use std::path::{Path, PathBuf, absolute};

use anyhow::Result;
use serde_json::json;

use crate::key::{self, Key};
use crate::programs::Program;
use crate::run::start;
use crate::store::{State, Store};
use stage::Experiment;

/// A source as it is seen from anywhere: a path made absolute, an address on the network as it is.
pub fn absolute_source(source: &Path) -> Result<PathBuf> {
    match source.to_string_lossy().contains("://") {
        true => Ok(source.to_owned()),
        false => Ok(absolute(source)?),
    }
}

/// The file or folder by whose state a source is known: the archive in whose folder it lies, the
/// folder of files that are named by a pattern. What lies on the network has no state here: its
/// address says which revision it is.
fn seen_of(source: &Path) -> PathBuf {
    let text = source.to_string_lossy();
    if source.exists() || text.contains("://") {
        return source.to_owned();
    }
    match text.rsplit_once('#') {
        Some((archive, _)) if Path::new(archive).exists() => archive.into(),
        _ if text.contains(['*', '{']) => source.parent().unwrap_or(source).to_owned(),
        _ => source.to_owned(),
    }
}

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
            "table": experiment.value("prepare"),
            "source": source,
            "state": key::state_of(&seen_of(&source))?,
        });
        let name = source.file_stem().unwrap_or("data".as_ref()).to_string_lossy();
        let is_plain = |sign: char| sign.is_alphanumeric() || "-_.".contains(sign);
        let name = name.replace(|sign| !is_plain(sign), "-");
        let key = Key::of(&name, record);
        let store = Store::new(runs.join(".data"));
        Ok(Self { folder: store.path(&key), key, store })
    }

    /// True when nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.store.state(&self.key) == State::Done
    }

    /// Removes the data, finished or not.
    pub fn forget(&self) -> Result<()> {
        let _claim = self.store.claim(&self.key)?;
        self.store.forget(&self.key)
    }

    /// Prepares the data, unless they are; with `memory` MiB if that is given.
    pub fn make(
        &self,
        experiment_file: &Path,
        source: Option<&Path>,
        program: &Program,
        memory: Option<u64>,
    ) -> Result<()> {
        let _claim = self.store.claim(&self.key)?;
        if self.is_done() {
            return Ok(());
        }
        let mut arguments: Vec<OsString> = vec!["--experiment".into(), experiment_file.into()];
        if let Some(source) = source {
            arguments.extend(["--source".into(), source.into()]);
        }
        if let Some(memory) = memory {
            arguments.extend(["--memory".into(), memory.to_string().into()]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_known_by_what_is_there_of_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("x.zip"), "1").expect("written");
        assert_eq!(seen_of(&at("x.zip")), at("x.zip"));
        assert_eq!(seen_of(&at("x.zip#a/b")), at("x.zip"));
        assert_eq!(seen_of(&at("*.zip")), folder.path());
        assert_eq!(seen_of(&at("{0..9}.tar")), folder.path());
        assert_eq!(seen_of(&at("none")), at("none"));
        let address = Path::new("hf://datasets/a/b@v1");
        assert_eq!(seen_of(address), address);
        assert_eq!(absolute_source(address).expect("as it is"), address);
        assert!(absolute_source(Path::new("x")).expect("a path").is_absolute());
    }
}
