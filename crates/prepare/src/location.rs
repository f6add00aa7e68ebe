//! Locates a source: a path, several files, a folder within an archive, or an address.
//!
//! - `shards/{000..012}.tar` and `data/train-*.parquet` stand for several files of one folder;
//! - `train.zip#ILSVRC/Data/CLS-LOC/train` for a folder within an archive;
//! - `hf://datasets/owner/name@revision/data/train-*.parquet` for files of a repository
//!   ([`mod@repository`]);
//! - `named://cifar-10` for a published set that is downloaded from its publisher ([`named`]).
//!
//! If a file of exactly the given name exists, its special characters have no meaning.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::folder::SOURCE;
use crate::names::{file_name, is_like, path_text, range_of, text};
use crate::{Interrupt, named, repository};

/// A source on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Files of one kind sorted by name, or one file, or one folder.
    pub paths: Vec<PathBuf>,
    /// The folder within an archive to read; empty for all of it.
    pub within: String,
}

impl Local {
    fn of(path: PathBuf) -> Self {
        Self { paths: vec![path], within: String::new() }
    }
}

/// Whether a source is an address on the network.
pub fn is_address(source: &Path) -> bool {
    let text = source.to_string_lossy();
    text.starts_with("hf://") || text.starts_with("named://")
}

/// Checks the form of an address without connecting to it.
///
/// # Errors
///
/// The address is invalid; the message shows the valid form.
pub fn check_address(source: &Path) -> Result<()> {
    let text = source.to_string_lossy();
    match text.strip_prefix("hf://") {
        Some(address) => hub::Address::parse(address).map(|_| ()),
        None => named::find(text.trim_start_matches("named://")).map(|_| ()),
    }
}

/// Finds a source, and downloads one on the network until `interrupt` returns `true`.
///
/// # Errors
///
/// The source does not exist or cannot be downloaded.
pub fn find(source: &Path, interrupt: Interrupt) -> Result<Local> {
    let stated = path_text(source);
    if let Some(address) = stated.strip_prefix("hf://") {
        return Ok(Local { paths: repository::fetch(address, interrupt)?, within: String::new() });
    }
    if let Some(name) = stated.strip_prefix("named://") {
        let (path, within) = named::fetch(name, interrupt)?;
        return Ok(Local { paths: vec![path], within });
    }
    if source.exists() {
        return Ok(Local::of(source.to_owned()));
    }
    if let Some((archive, within)) = split_at_hash(source)
        && archive.is_file()
    {
        return Ok(Local { paths: vec![archive], within });
    }
    let name = file_name(source);
    if name.contains(['*', '{']) {
        let paths = matching(source)?;
        ensure!(!paths.is_empty(), "no file matches `{stated}`; pass another path with {SOURCE}");
        return Ok(Local { paths, within: String::new() });
    }
    // The system's message says why it cannot be opened.
    fs::metadata(source).with_context(|| {
        format!("opening the source `{stated}`; pass the path of the pictures with {SOURCE}")
    })?;
    Ok(Local::of(source.to_owned()))
}

/// Splits `archive.zip#folder/within` at the last `#`. The folder is compared with names as
/// [`names::text`](crate::names::text) renders them, so it may be copied from a message, or be
/// bytes that are not UTF-8.
fn split_at_hash(source: &Path) -> Option<(PathBuf, String)> {
    #[cfg(unix)]
    {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;

        let bytes = source.as_os_str().as_bytes();
        let at = bytes.iter().rposition(|&byte| byte == b'#')?;
        let within = &bytes[at + 1..];
        let within = std::str::from_utf8(within).map_or_else(|_| text(within), str::to_owned);
        Some((Path::new(OsStr::from_bytes(&bytes[..at])).to_owned(), within))
    }
    #[cfg(not(unix))]
    {
        let (archive, within) = source.to_str()?.rsplit_once('#')?;
        Some((archive.into(), within.to_owned()))
    }
}

/// The files in the folder of `pattern` whose names match its last part, sorted.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let name = file_name(pattern);
    let folder = match pattern.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let files = crate::folder::contents(folder)?.files;
    let all: Vec<PathBuf> =
        files.into_iter().filter(|file| is_like(&file_name(file), &name)).collect();
    // Every file of a range must exist.
    if let Some((from, to)) = range_of(&name) {
        let there = all.len() as u64;
        ensure!(
            name.contains('*') || there == to - from + 1,
            "of the {} files `{}` there are {there}; get the others, or pass only those there are",
            to - from + 1,
            pattern.display()
        );
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_must_be_whole_and_an_exact_name_wins_over_a_pattern() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        for name in ["000.tar", "001.tar", "003.tar", "x#y.tar"] {
            fs::write(at(name), "").expect("written");
        }
        let find = |source: &Path| find(source, &|| false);
        let found = find(&at("{000..001}.tar")).expect("both");
        assert_eq!(found.paths, [at("000.tar"), at("001.tar")]);
        assert!(find(&at("{000..003}.tar")).expect_err("3 of 4").to_string().contains("are 3"));
        assert_eq!(find(&at("*.tar")).expect("all").paths.len(), 4);
        assert!(find(&at("*.zip")).is_err());
        assert_eq!(find(&at("x#y.tar")).expect("there"), Local::of(at("x#y.tar")));
        let within = find(&at("000.tar#a/b")).expect("there");
        assert_eq!((within.paths[0].clone(), within.within.as_str()), (at("000.tar"), "a/b"));
    }
}
