//! The mark of a finished folder: `done.json`, which lists what was written there.
//!
//! It is an object of [`json`] with the keys `stage`, `algorithm` where a stage has one, and `files`:
//! for each file its length and, unless it carries a digest itself, its SHA-256. A folder counts as
//! finished while each listed file exists with its length. Logs (`*.jsonl`), their [`EVENTS`](crate::EVENTS)
//! and hidden files are not listed. `log.jsonl` holds times, so its SHA-256 is in `log.sha256` beside it; a result is complete
//! without both.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{digest, event_file, files, job, json};

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
    /// Tensor files carry digests themselves and are too large to be read again; the mark has those of
    /// the others.
    InFiles,
}

/// Marks `folder` as finished by `stage`, and lists the files that are there now.
pub fn mark(folder: &Path, stage: &str, algorithm: Option<u32>, digests: Digests) -> Result<()> {
    mark_outputs(folder, stage, algorithm, digests, |_| true)
}

/// Like [`mark`], for a folder in which others keep files too: lists only those whose name satisfies
/// `is_output`.
pub fn mark_outputs(
    folder: &Path,
    stage: &str,
    algorithm: Option<u32>,
    digests: Digests,
    is_output: impl Fn(&str) -> bool,
) -> Result<()> {
    let mut outputs = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading `{}`", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let grows = name.ends_with(".jsonl") || name == event_file::EVENTS;
        let is_ours = [DONE, LOG_DIGEST].contains(&&*name);
        if !metadata.is_file() || name.starts_with('.') || grows || is_ours || !is_output(&name) {
            continue;
        }
        let is_listed = digests == Digests::Listed || !name.ends_with(".safetensors");
        let sha256 = is_listed.then(|| digest::sha256_of_file(&entry.path())).transpose()?;
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
    ensure!(
        !read(folder).is_some_and(|mark| mark.log) || log_is(folder, digest_of_log(folder))?,
        "the log `{}` was changed or removed after its step ended",
        folder.join(job::LOG).display()
    );
    Ok(())
}

/// The digest that [`mark`] wrote; `None` where there is none.
fn digest_of_log(folder: &Path) -> Option<String> {
    fs::read_to_string(folder.join(LOG_DIGEST)).ok()
}

fn log_is(folder: &Path, digest: Option<String>) -> Result<bool> {
    let path = folder.join(job::LOG);
    Ok(path.exists() && digest == Some(digest::sha256_of_file(&path)?))
}

/// Prepares a folder that is not finished for its stage to resume. Where it was finished once and
/// something was changed, removes the results: see [`clear`]. Returns whether it did.
pub fn prepare_to_resume(folder: &Path) -> Result<bool> {
    let digest = digest_of_log(folder);
    // A mark that was removed does not make a changed log the right one.
    let has_changed = folder.join(DONE).exists() || digest.is_some() && !log_is(folder, digest)?;
    if has_changed {
        clear(folder)?;
    } else if folder.join(LOG_DIGEST).exists() {
        files::remove_if_there(&folder.join(LOG_DIGEST))?; // The log may grow now.
    }
    Ok(has_changed)
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
    let names =
        listed.iter().map(String::as_str).chain([job::LOG, event_file::EVENTS, LOG_DIGEST, DONE]);
    names.map(|name| folder.join(name)).try_for_each(|path| files::remove_if_there(&path))
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
    fn a_mark_of_some_files_is_the_same_beside_others() {
        let folder = finished(Digests::InFiles);
        let mark = || {
            mark_outputs(folder.path(), "example", None, Digests::InFiles, |name| name < "c")
                .expect("marked");
            fs::read(folder.path().join(DONE)).expect("there")
        };
        let alone = mark();
        fs::write(folder.path().join("source.json"), "another's").expect("written");
        assert_eq!(mark(), alone);
        fs::remove_file(folder.path().join("source.json")).expect("removed");
        assert!(is_finished(folder.path()));
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
    fn a_removed_mark_does_not_make_a_changed_log_the_right_one() {
        for (log, is_kept) in [("log.jsonl", true), ("log.jsonk", false)] {
            let folder = finished(Digests::Listed);
            let at = |name: &str| folder.path().join(name);
            fs::write(at("state.safetensors"), "1").expect("written");
            fs::remove_file(at(DONE)).expect("removed");
            fs::write(at("log.jsonl"), log).expect("written");
            assert_eq!(prepare_to_resume(folder.path()).expect("readable"), !is_kept);
            assert_eq!(at("state.safetensors").exists() && at("log.jsonl").exists(), is_kept);
            assert!(!at(LOG_DIGEST).exists(), "the log may grow");
            assert!(!prepare_to_resume(folder.path()).expect("readable"), "nothing to do");
        }
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
