//! The mark of a finished folder: `done.json`, which lists what was written there.
//!
//! It is an object of [`json`] with the keys `stage`, `algorithm` where a stage has one, and `files`:
//! for each file its length and, unless the writer knows better, its SHA-256. A folder counts as
//! finished while each listed file exists with its length. Logs (`*.jsonl`) and hidden files are not
//! listed. `log.jsonl` holds times, so its SHA-256 is in `log.sha256` beside it; a result is complete
//! without both.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{digest, files, job, json};

/// The file that is written last: it marks its folder as finished.
pub const DONE: &str = "done.json";

/// The file with the digest of the log.
const LOG_DIGEST: &str = "log.sha256";

/// What `done.json` holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishedMark {
    /// What wrote the folder.
    pub stage: String,
    /// Version of the results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<u32>,
    /// The outputs by name.
    files: BTreeMap<String, OutputFile>,
    /// Whether the stage wrote a log.
    log: bool,
}

/// A file of a finished folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OutputFile {
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// Whether [`mark`] reads all outputs again to compute their digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digests {
    /// The mark has them, so that [`damaged`] finds a changed file.
    Listed,
    /// The files carry digests themselves and are too large to be read again.
    InFiles,
}

/// Marks `folder` as finished by `stage`, and lists the files that are there now.
pub fn mark(folder: &Path, stage: &str, algorithm: Option<u32>, digests: Digests) -> Result<()> {
    let mut outputs = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading `{}`", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let grows = name.ends_with(".jsonl");
        let is_ours = [DONE, LOG_DIGEST].contains(&&*name);
        if !metadata.is_file() || name.starts_with('.') || grows || is_ours {
            continue;
        }
        let sha256 = match digests {
            Digests::Listed => Some(digest::sha256_of_file(&entry.path())?),
            Digests::InFiles => None,
        };
        outputs.insert(name, OutputFile { bytes: metadata.len(), sha256 });
    }
    let log = folder.join(job::LOG);
    if log.exists() {
        files::write(&folder.join(LOG_DIGEST), digest::sha256_of_file(&log)?.as_bytes())?;
    }
    let log = log.exists();
    let mark = FinishedMark { stage: stage.to_owned(), algorithm, files: outputs, log };
    json::write(&folder.join(DONE), &mark)
}

/// Fails where the log of a finished folder was changed or removed after the folder was marked.
pub fn require_log(folder: &Path) -> Result<()> {
    if !read(folder).is_some_and(|mark| mark.log) {
        return Ok(());
    }
    let path = folder.join(job::LOG);
    let written = fs::read_to_string(folder.join(LOG_DIGEST)).ok();
    ensure!(
        path.exists() && written == Some(digest::sha256_of_file(&path)?),
        "the log `{}` was changed or removed after its step ended",
        path.display()
    );
    Ok(())
}

/// True if the folder is marked and each listed file exists with its length.
pub fn is_finished(folder: &Path) -> bool {
    read(folder).is_some_and(|mark| {
        mark.files.iter().all(|(name, file)| {
            fs::metadata(folder.join(name)).is_ok_and(|found| found.len() == file.bytes)
        })
    })
}

/// Returns the listed files that differ from what was written, by their digests.
///
/// # Errors
///
/// A file cannot be read.
pub fn damaged(folder: &Path) -> Result<Vec<PathBuf>> {
    let Some(mark) = read(folder) else { return Ok(vec![]) };
    let mut damaged = Vec::new();
    for (name, file) in mark.files {
        let path = folder.join(name);
        if let Some(sha256) = file.sha256
            && path.exists()
            && digest::sha256_of_file(&path)? != sha256
        {
            damaged.push(path);
        }
    }
    Ok(damaged)
}

/// Removes the mark of a folder that is no longer finished, and the listed files: a stage that found
/// its state without its results would not run again. If the mark itself is damaged, no file can be
/// trusted, and all outputs are removed.
pub fn clear(folder: &Path) -> Result<()> {
    let listed = match read(folder) {
        Some(mark) => mark.files.into_keys().collect(),
        None => outputs(folder)?,
    };
    for name in listed.iter().map(String::as_str).chain([job::LOG, LOG_DIGEST, DONE]) {
        let path = folder.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing `{}`", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Names of files in the formats that stages write.
fn outputs(folder: &Path) -> Result<Vec<String>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("reading `{}`", folder.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_output = |name: &String| name.ends_with(".safetensors") || name.ends_with(".json");
    Ok(names.filter(is_output).collect())
}

/// The mark; `None` if it is missing or damaged.
fn read(folder: &Path) -> Option<FinishedMark> {
    json::read(&folder.join(DONE)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(digests: Digests) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["a", "b", "log.jsonl", ".hidden"] {
            fs::write(folder.path().join(name), name).expect("written");
        }
        mark(folder.path(), "example", Some(3), digests).expect("marked");
        folder
    }

    #[test]
    fn a_folder_is_finished_while_every_listed_file_has_its_length() {
        for digests in [Digests::Listed, Digests::InFiles] {
            let folder = finished(digests);
            let at = |name: &str| folder.path().join(name);
            assert!(is_finished(folder.path()));
            fs::remove_file(at("log.jsonl")).expect("removed");
            fs::write(at(".hidden"), "longer").expect("written");
            assert!(is_finished(folder.path()), "these are not listed");
            fs::write(at("a"), "longer").expect("written");
            assert!(!is_finished(folder.path()));
            fs::write(at("a"), "a").expect("written");
            fs::remove_file(at("b")).expect("removed");
            assert!(!is_finished(folder.path()));
            clear(folder.path()).expect("cleared");
            assert!(!at("a").exists() && !at(DONE).exists() && at(".hidden").exists());
            clear(folder.path()).expect("nothing to clear");
        }
    }

    #[test]
    fn a_changed_or_missing_log_is_found_and_leaves_the_folder_finished() {
        let folder = finished(Digests::InFiles);
        require_log(folder.path()).expect("as it was written");
        for spoil in
            [|path: &Path| fs::write(path, "log.jsonk"), |path: &Path| fs::remove_file(path)]
        {
            spoil(&folder.path().join("log.jsonl")).expect("spoilt");
            let error = require_log(folder.path()).expect_err("changed").to_string();
            assert!(error.contains("log.jsonl") && is_finished(folder.path()), "{error}");
        }
        fs::remove_file(folder.path().join(DONE)).expect("removed");
        require_log(folder.path()).expect("a run under way has no mark");
    }

    #[test]
    fn a_damaged_mark_takes_all_outputs_with_it() {
        let folder = finished(Digests::Listed);
        for name in ["state.safetensors", "notes.txt"] {
            fs::write(folder.path().join(name), name).expect("written");
        }
        fs::write(folder.path().join(DONE), "{").expect("written");
        clear(folder.path()).expect("cleared");
        let left = |name: &str| folder.path().join(name).exists();
        assert!(!left("state.safetensors") && !left("log.jsonl") && !left(DONE));
        assert!(left("notes.txt"), "nobody's output");
    }

    #[test]
    fn a_changed_file_is_found_by_its_digest_and_a_changed_mark_is_none() {
        let folder = finished(Digests::Listed);
        assert_eq!(damaged(folder.path()).expect("read"), Vec::<PathBuf>::new());
        fs::write(folder.path().join("b"), "c").expect("written");
        assert!(is_finished(folder.path()), "lengths are equal");
        assert_eq!(damaged(folder.path()).expect("read"), [folder.path().join("b")]);
        let text = fs::read_to_string(folder.path().join(DONE)).expect("there");
        fs::write(folder.path().join(DONE), text.replace("example", "examples")).expect("written");
        assert!(!is_finished(folder.path()));
    }
}
