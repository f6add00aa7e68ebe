//! The prepared data set: the pictures of an experiment, converted for the stages.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stage::{Claim, Experiment, Interrupt, container, digest, files};

use crate::advice::Advice;
use crate::key::StoreKey;
use crate::process::{MessageTo, Process};
use crate::programs::Executable;
use crate::source::{mark_results, plain_name, state_of, text_of};
use crate::store::{Hold, StepState, Store};
use crate::{CommandContext, EmbeddedData};

/// The helper that makes the data set.
pub const PREPARE: &str = "prepare";

/// The file that records the source of the pictures. It is written after the source is known not to
/// have changed meanwhile.
const SOURCE: &str = "source.json";

/// The folder of `prepare`'s journal, which it removes at its end.
const JOURNAL: &str = "unfinished";

/// A data set that is or will be prepared.
#[derive(Debug)]
pub struct PreparedData<'a> {
    /// Its folder, with pictures, names and ground truth.
    pub folder: PathBuf,
    /// Its name in the store.
    pub key: StoreKey,
    session: &'a CommandContext,
    experiment: Experiment,
    source: PathBuf,
    state: String,
    advice: Advice,
    program: Executable,
    store: Store,
}

impl<'a> PreparedData<'a> {
    /// The data set of this experiment, below the folder `runs`.
    ///
    /// - `source`: replaces the experiment's own source.
    /// - `advice`: of the command, for messages.
    ///
    /// # Errors
    ///
    /// There is no such source.
    pub fn of(
        session: &'a CommandContext,
        experiment: &Experiment,
        source: Option<&Path>,
        runs: &Path,
        advice: &Advice,
    ) -> Result<Self> {
        let program = Executable::own(PREPARE, &session.registry)?;
        let source = match source {
            Some(source) => source.to_owned(),
            None => own_source(session, experiment, runs)?,
        };
        mark_results(runs, &source, "--runs")?;
        let state = state_of(&source, &session.interrupt)?;
        let record = json!({
            "program": program.identity,
            "table": experiment.value("prepare"),
            "source": text_of(&source),
            "state": state,
        });
        let name = source.file_stem().unwrap_or("data".as_ref()).to_string_lossy();
        let key = StoreKey::of(&plain_name(&name), record);
        let store = Store::of_data(runs);
        let (folder, experiment) = (store.path(key.name()), experiment.clone());
        let advice = advice.clone();
        Ok(Self { folder, key, session, experiment, source, state, advice, program, store })
    }

    /// Whether it is completely prepared.
    pub fn is_done(&self) -> bool {
        // Another text is a damaged one: the key is made of both.
        let is_known =
            fs::read_to_string(self.folder.join(SOURCE)).is_ok_and(|t| t == self.known());
        self.store.state(self.key.name()) == StepState::Done && is_known
    }

    /// Whether a program that was killed at its very end left its journal. The next one removes it.
    fn is_littered(&self) -> bool {
        self.folder.join(JOURNAL).exists()
    }

    /// Prepares the data unless it is done. The returned hold prevents its removal.
    ///
    /// - `memory`: approximate limit in MiB.
    /// - `fresh`: prepare again even if it is done.
    ///
    /// # Errors
    ///
    /// The program fails, or the source changed while it was read.
    pub fn make(&self, memory: Option<u64>, fresh: bool) -> Result<Hold> {
        let interrupt = &self.session.interrupt;
        self.store.remove_abandoned()?;
        files::remove_abandoned(&self.folder)?;
        if fresh || !self.is_done() || self.is_littered() {
            let claim = self.store.claim(&self.key, interrupt)?;
            let is_half_known =
                self.store.state(self.key.name()) == StepState::Done && !self.is_done();
            if fresh || is_half_known {
                self.store.forget(&self.key, &claim, interrupt)?;
            }
            if !self.is_done() || self.is_littered() {
                self.prepare(memory, &claim)?;
            }
        }
        self.store.hold(self.key.name(), interrupt)
    }

    fn prepare(&self, memory: Option<u64>, claim: &Hold) -> Result<()> {
        let mut arguments = self.arguments()?;
        if let Some(memory) = memory {
            arguments.extend(["--memory".into(), memory.to_string().into()]);
        }
        self.process(&arguments).run(Some(claim.file()))?;
        let interrupt = &self.session.interrupt;
        if state_of(&self.source, interrupt)? != self.state {
            self.store.forget(&self.key, claim, interrupt)?;
            bail!(
                "`{}` changed while its pictures were prepared, so the result was removed; run the \
                 same command again when nobody writes there",
                self.source.display()
            )
        }
        files::write(&self.folder.join(SOURCE), self.known().as_bytes())
    }

    /// The contents of [`SOURCE`].
    fn known(&self) -> String {
        format!("{}\n", json!({ "source": text_of(&self.source), "state": self.state }))
    }

    /// Checks the source and the table `[prepare]` without writing pictures. Returns how many pictures there
    /// are, also unreadable ones, if the source shows that without being read.
    pub fn check(&self) -> Result<Option<usize>> {
        let mut arguments = self.arguments()?;
        arguments.push("--check".into());
        let printed: toml::Table = self.process(&arguments).printed()?.parse()?;
        let count = printed.get("pictures").and_then(toml::Value::as_integer);
        Ok(count.and_then(|count| count.try_into().ok()))
    }

    /// Writes the experiment file and returns the arguments of the program.
    fn arguments(&self) -> Result<Vec<OsString>> {
        let experiment = self.store.beside(self.key.name(), "toml");
        files::write(&experiment, self.experiment.to_toml().as_bytes())?;
        Ok(vec![
            "--experiment".into(),
            experiment.into(),
            "--source".into(),
            self.source.clone().into(),
            "--source-flag".into(),
            self.advice.source_name().into(),
            "--out".into(),
            self.folder.clone().into(),
        ])
    }

    fn process<'b>(&'b self, arguments: &'b [OsString]) -> Process<'b> {
        Process {
            name: PREPARE,
            program: &self.program,
            arguments,
            interrupt: &self.session.interrupt,
            message: match self.advice.message() {
                // It runs alone, and says all that there is to say.
                MessageTo::Stderr => MessageTo::Error,
                other => other,
            },
        }
    }

    /// The path of the pictures.
    pub fn images(&self) -> PathBuf {
        self.folder.join("images.safetensors")
    }

    /// The header of the pictures, which identifies them.
    pub fn images_identity(&self) -> Result<String> {
        container::header_text(&self.images())
    }

    /// The header of the labels, which identifies them.
    pub fn labels_identity(&self) -> Result<String> {
        container::header_text(&self.folder.join("labels.safetensors"))
    }

    /// How many pictures there are.
    pub fn count(&self) -> Result<usize> {
        let header: Value = serde_json::from_str(&self.images_identity()?)?;
        let count = header["images"].as_u64();
        let count = count.with_context(|| {
            format!("`{}` has no header field `images`", self.images().display())
        })?;
        Ok(count as usize)
    }

    /// Fails if the experiment asks for more clusters than there are pictures.
    pub fn require_enough_pictures(&self) -> Result<()> {
        let images = self.count()?;
        let clusters =
            self.experiment.value("data").and_then(|data| data.get("clusters")?.as_integer());
        if let Some(clusters) = clusters {
            ensure!(
                clusters <= images as i64,
                "`clusters` in table `[data]` is {clusters}, but there are only {images} pictures \
                 in `{}`; ask for fewer with --set data.clusters=K",
                self.source.display()
            );
        }
        Ok(())
    }
}

/// The folder that the prepared data in `data` came from; `None` if it came from an archive or the
/// network, or the folder is gone.
pub fn source_folder(data: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(data.join(SOURCE)).ok()?;
    let known: Value = serde_json::from_str(&text).ok()?;
    Some(PathBuf::from(known["source"].as_str()?)).filter(|source| source.is_dir())
}

/// The source that the experiment names. If that folder is missing but embedded in the program, it
/// is written once below `runs`.
fn own_source(session: &CommandContext, experiment: &Experiment, runs: &Path) -> Result<PathBuf> {
    let source = experiment.source()?;
    let embedded = session.registry.data.iter().find(|data| data.folder == source);
    match embedded {
        Some(embedded) if !Path::new(&source).exists() => {
            unpacked(embedded, runs, &session.interrupt)
        }
        _ => Ok(source.into()),
    }
}

/// Writes the files of an embedded data set, unless they exist, and returns their folder.
fn unpacked(data: &EmbeddedData, runs: &Path, interrupt: &Interrupt) -> Result<PathBuf> {
    let contents: Vec<u8> = data
        .files
        .iter()
        .flat_map(|(name, bytes)| [name.as_bytes(), &bytes.len().to_le_bytes(), *bytes].concat())
        .collect();
    let version = &digest::sha256(&contents)[..16];
    let all = runs.join(".embedded");
    let folder = all.join(version).join(Path::new(data.folder).file_name().unwrap_or_default());
    if folder.exists() {
        return Ok(folder);
    }
    let _claim = Claim::wait(&all, interrupt)?;
    if folder.exists() {
        return Ok(folder);
    }
    let write = || -> Result<()> {
        fs::create_dir_all(&all)?;
        // A killed process leaves its folder.
        files::remove_abandoned(&all)?;
        let partial = all.join(format!("{}{version}", files::TEMPORARY));
        let inside = partial.join(folder.file_name().unwrap_or_default());
        for (name, bytes) in &data.files {
            files::write(&inside.join(name), bytes)?;
        }
        Ok(fs::rename(partial, all.join(version))?)
    };
    write().with_context(|| format!("writing the built-in pictures to `{}`", folder.display()))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_files_are_written_once_under_their_digest() {
        let runs = tempfile::tempdir().expect("a folder");
        let data = |bytes: &'static [u8]| EmbeddedData {
            folder: "data/digits",
            files: vec![("a.gz", bytes), ("b.gz", b"2")],
        };
        let unpacked = |data| unpacked(&data, runs.path(), &Interrupt::default());
        let killed = runs.path().join(".embedded/.unfinished-killed");
        fs::create_dir_all(&killed).expect("created");
        std::thread::sleep(std::time::Duration::from_millis(150));
        let folder = unpacked(data(b"1")).expect("written");
        assert!(folder.ends_with("digits"), "{}", folder.display());
        assert_eq!(fs::read(folder.join("a.gz")).expect("there"), b"1");
        assert_eq!(fs::read(folder.join("b.gz")).expect("there"), b"2");
        let changed = fs::metadata(folder.join("a.gz")).and_then(|found| found.modified());
        assert_eq!(unpacked(data(b"1")).expect("there"), folder);
        let again = fs::metadata(folder.join("a.gz")).and_then(|found| found.modified());
        assert_eq!(again.expect("there"), changed.expect("there"));
        assert_ne!(unpacked(data(b"3")).expect("written"), folder);
        let left = fs::read_dir(runs.path().join(".embedded")).expect("there").count();
        assert_eq!(left, 2, "nothing half-written is left");
    }
}
