//! The mark of a finished folder: `done.json`, which lists what was written there.
//!
//! It is an object of [`json`] with the keys `stage`, `algorithm` where a stage has one, and `files`:
//! for each file its length and, unless the writer knows better, its SHA-256. A folder counts as
//! finished while each listed file exists with its length. Logs (`*.jsonl`), which grow, and hidden
//! files are not listed.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{digest, json};

/// The file that is written last: it marks its folder as finished.
pub const DONE: &str = "done.json";

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
}

/// A file of a finished folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OutputFile {
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// Whether [`mark`] reads all outputs once more for their digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digests {
    /// The mark has them, so that [`damaged`] finds a changed file.
    Listed,
    /// The files carry digests themselves and are too large to be read again.
    InFiles,
}

/// Marks `folder` as finished by `stage`, with the files that lie there now.
pub fn mark(folder: &Path, stage: &str, algorithm: Option<u32>, digests: Digests) -> Result<()> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).with_context(|| format!("reading `{}`", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let grows = name.ends_with(".jsonl");
        if !metadata.is_file() || name.starts_with('.') || grows || name == DONE {
            continue;
        }
        let sha256 = match digests {
            Digests::Listed => Some(digest::sha256_of_file(&entry.path())?),
            Digests::InFiles => None,
        };
        files.insert(name, OutputFile { bytes: metadata.len(), sha256 });
    }
    json::write(&folder.join(DONE), &FinishedMark { stage: stage.to_owned(), algorithm, files })
}

/// True for a folder that is marked and still has each listed file in its length.
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

/// Removes the mark of a folder that is not finished any more, and what it lists: a stage that found
/// its state but not its results would have nothing to do.
pub fn clear(folder: &Path) -> Result<()> {
    let listed = read(folder).map(|mark| mark.files.into_keys().collect()).unwrap_or_else(Vec::new);
    for name in listed.iter().map(String::as_str).chain([DONE]) {
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

/// The mark; `None` where there is none, or where it is damaged.
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
