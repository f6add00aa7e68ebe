//! Where a source is: a path, several, part of an archive, or somewhere on the network.
//!
//! - `shards/{000..012}.tar` and `data/train-*.parquet` stand for several files of one folder;
//! - `train.zip#ILSVRC/Data/CLS-LOC/train` for a folder within an archive;
//! - `hf://datasets/owner/name@revision/data/train-*.parquet` for files of a repository ([`mod@repository`]);
//! - `named://cifar-10` for a published set that is fetched from where it is published ([`named`]).
//!
//! A file whose whole name is there is that file, whatever signs are in it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::folder::SOURCE;
use crate::names::{file_name, is_like, path_text, range_of, text};
use crate::{Interrupt, named, repository};

/// A source that lies on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Files of one kind in order of their names, or one file, or one folder.
    pub paths: Vec<PathBuf>,
    /// The folder within an archive that counts; empty for all of it.
    pub within: String,
}

impl Local {
    fn of(path: PathBuf) -> Self {
        Self { paths: vec![path], within: String::new() }
    }
}

/// Whether a source lies somewhere on the network.
pub fn is_address(source: &Path) -> bool {
    let text = source.to_string_lossy();
    text.starts_with("hf://") || text.starts_with("named://")
}

/// Checks that an address is one, without going there.
///
/// # Errors
///
/// It is not; the message says what one looks like.
pub fn check_address(source: &Path) -> Result<()> {
    let text = source.to_string_lossy();
    match text.strip_prefix("hf://") {
        Some(address) => hub::Address::parse(address).map(|_| ()),
        None => named::find(text.trim_start_matches("named://")).map(|_| ()),
    }
}

/// Finds a source. One on the network is downloaded, until `interrupt` says to stop.
///
/// # Errors
///
/// There is no such source, or it cannot be downloaded.
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
        ensure!(!paths.is_empty(), "no file is named like `{stated}`; name others with {SOURCE}");
        return Ok(Local { paths, within: String::new() });
    }
    // The message of the system says why not.
    fs::metadata(source).with_context(|| {
        format!("opening the source `{stated}`; name where the pictures lie with {SOURCE}")
    })?;
    Ok(Local::of(source.to_owned()))
}

/// The two parts of `archive.zip#folder/within`. The second is compared with names as
/// [`names::text`](crate::names::text) renders them: it may be such a rendering, as messages have it,
/// or bytes that are not UTF-8.
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

/// The files in the folder of `pattern` that are named like its last part, sorted.
fn matching(pattern: &Path) -> Result<Vec<PathBuf>> {
    let name = file_name(pattern);
    let folder = match pattern.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let files = crate::folder::contents(folder)?.files;
    let all: Vec<PathBuf> =
        files.into_iter().filter(|file| is_like(&file_name(file), &name)).collect();
    // A range says which files there must be.
    if let Some((from, to)) = range_of(&name) {
        let there = all.len() as u64;
        ensure!(
            name.contains('*') || there == to - from + 1,
            "of the {} files `{}` there are {there}; get the others, or name those there are",
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
    fn a_range_is_whole_and_a_whole_name_is_taken_as_it_is() {
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
