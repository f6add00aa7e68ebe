//! Sources of pictures: renders their paths and computes the state that identifies them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf, absolute};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use stage::files::RESULTS_MARK;
use stage::{Interrupt, files};

/// Makes the path of a source absolute; returns an address on the network unchanged.
pub fn absolute_source(source: &Path) -> Result<PathBuf> {
    match is_address(source) {
        true => Ok(source.to_owned()),
        false => absolute(source).with_context(|| format!("finding `{}`", source.display())),
    }
}

/// Whether a source is an address on the network, such as `hf://datasets/owner/name`.
fn is_address(source: &Path) -> bool {
    source.to_string_lossy().contains("://")
}

/// Renders a path as text, different for each path: bytes that are not UTF-8 become `\xNN`.
pub fn text_of(path: &Path) -> String {
    let chunks = path.as_os_str().as_encoded_bytes().utf8_chunks();
    let mut text = String::new();
    for chunk in chunks {
        text.push_str(&chunk.valid().replace('\\', r"\\"));
        text.extend(chunk.invalid().iter().map(|byte| format!(r"\x{byte:02x}")));
    }
    text
}

/// Replaces the characters of a name that could be special in a path or a shell.
pub fn plain_name(name: &str) -> String {
    name.replace(|sign: char| !(sign.is_alphanumeric() || "-_.".contains(sign)), "-")
}

/// Whether there is a source at this path. True for an address on the network, of which nothing is known.
pub fn exists(source: &Path) -> bool {
    seen_of(source).is_ok()
}

/// The file or folder whose state identifies a source: the archive before a `#`, or the folder of a
/// pattern. `None` for a source on the network, whose address states the revision.
///
/// # Errors
///
/// There is no such source.
fn seen_of(source: &Path) -> Result<Option<PathBuf>> {
    if is_address(source) {
        return Ok(None);
    }
    if source.exists() {
        return Ok(Some(source.to_owned()));
    }
    let text = source.to_string_lossy();
    let archive = text.rsplit_once('#').map(|(archive, _)| PathBuf::from(archive));
    let folder = source.parent().filter(|_| text.contains(['*', '{'])).map(Path::to_owned);
    match [archive, folder].into_iter().flatten().find(|path| path.exists()) {
        Some(path) => Ok(Some(path)),
        None => bail!(
            "there is no source of pictures `{}`; pass a folder, an archive, a manifest or an \
             address with --images PATH, or as `source` in table `[prepare]`",
            source.display()
        ),
    }
}

/// Resolves links and `..`, also in a path whose last parts do not exist yet.
pub fn resolved(path: &Path) -> Result<PathBuf> {
    let path = absolute(path).with_context(|| format!("finding `{}`", path.display()))?;
    let mut existing = path.as_path();
    while !existing.exists() {
        match existing.parent() {
            Some(parent) => existing = parent,
            None => return Ok(path),
        }
    }
    let missing = path.strip_prefix(existing)?;
    let existing = fs::canonicalize(existing);
    let existing = existing.with_context(|| format!("finding `{}`", path.display()))?;
    match missing.as_os_str().is_empty() {
        true => Ok(existing),
        false => Ok(existing.join(missing)),
    }
}

/// Whether `folder` is in the folder of pictures `source` or is that folder.
pub fn is_inside(folder: &Path, source: &Path) -> Result<bool> {
    Ok(source.is_dir() && resolved(folder)?.starts_with(resolved(source)?))
}

/// Marks a folder of results inside the source, so that its files are neither pictures nor a change of the
/// source. Does nothing to a folder elsewhere.
///
/// - `flag`: the option that names the folder, for the message.
///
/// # Errors
///
/// The folder is the source itself, or may hold pictures of the source.
pub fn mark_results(folder: &Path, source: &Path, flag: &str) -> Result<()> {
    let mark = folder.join(RESULTS_MARK);
    if !is_inside(folder, source)? || mark.exists() {
        return Ok(());
    }
    let is_known = [".store", ".data"].iter().any(|name| folder.join(name).is_dir());
    let is_free = !folder.exists() || is_known || entries(folder)?.is_empty();
    if !is_free || resolved(folder)? == resolved(source)? {
        bail!(
            "{flag} `{}`: the results would be among the pictures of `{}`; name a new folder or one \
             elsewhere",
            folder.display(),
            source.display()
        )
    }
    fs::create_dir_all(folder).with_context(|| format!("creating `{}`", folder.display()))?;
    files::write(&mark, b"")
}

/// A digest of the names, sizes and modification times of all files of a source, without the folders of
/// results in it.
///
/// It is computed whenever pictures may have to be prepared, so it must be cheap for millions of
/// files. Follows links to folders, and visits each folder once.
pub fn state_of(source: &Path, interrupt: &Interrupt) -> Result<String> {
    let Some(seen) = seen_of(source)? else { return Ok("on the network".to_owned()) };
    let mut hash = Sha256::new();
    let mut paths = vec![seen.clone()];
    let mut looked_at = BTreeSet::new();
    while let Some(path) = paths.pop() {
        interrupt.check()?;
        let Ok(metadata) = fs::metadata(&path) else {
            hash.update(format!("{} missing\n", text_of(&path)));
            continue;
        };
        if metadata.is_dir() {
            if path != seen && path.join(RESULTS_MARK).exists() {
                continue;
            }
            let folder = fs::canonicalize(&path);
            let folder = folder.with_context(|| format!("reading `{}`", path.display()))?;
            hash.update(format!("{} folder\n", text_of(&path)));
            if looked_at.insert(folder) {
                paths.extend(entries(&path)?);
            }
        } else {
            let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            hash.update(format!("{} {} {changed:?}\n", text_of(&path), metadata.len()));
        }
    }
    Ok(stage::digest::hex(&hash.finalize()))
}

/// The entries of a folder, sorted by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, std::io::Error>>()
    });
    let mut entries = read.with_context(|| format!("reading `{}`", folder.display()))?;
    entries.sort();
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_identified_by_its_existing_part() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        fs::write(at("x.zip"), "1").expect("written");
        let seen = |name: &str| seen_of(&at(name)).expect("there").expect("a path");
        assert_eq!(seen("x.zip"), at("x.zip"));
        assert_eq!(seen("x.zip#a/b"), at("x.zip"));
        assert_eq!(seen("*.zip"), folder.path());
        assert_eq!(seen("{0..9}.tar"), folder.path());
        for missing in ["none", "none.zip#a", "none/*.zip"] {
            let error = seen_of(&at(missing)).expect_err(missing).to_string();
            assert!(error.contains(missing) && error.contains("--images"), "{error}");
        }
        let address = Path::new("hf://datasets/a/b@v1");
        assert_eq!(seen_of(address).expect("on the network"), None);
        assert_eq!(absolute_source(address).expect("as it is"), address);
        assert!(absolute_source(Path::new("x")).expect("a path").is_absolute());
    }

    #[test]
    fn a_changed_source_has_another_state() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = || state_of(folder.path(), &Interrupt::default()).expect("readable");
        let empty = state();
        fs::create_dir(folder.path().join("cats")).expect("created");
        fs::write(folder.path().join("cats/a.png"), "1").expect("written");
        let one = state();
        fs::write(folder.path().join("cats/b.png"), "2").expect("written");
        let two = state();
        fs::write(folder.path().join("cats/b.png"), "22").expect("written");
        let longer = state();
        fs::rename(folder.path().join("cats/b.png"), folder.path().join("b.png")).expect("moved");
        let states = [empty, one, two, longer, state()];
        for (position, state) in states.iter().enumerate() {
            assert!(!states[..position].contains(state));
        }
        assert_eq!(states[4], state());
    }

    #[test]
    fn results_inside_a_source_do_not_change_it_and_never_hide_pictures() {
        let folder = tempfile::tempdir().expect("a folder");
        let source = folder.path().join("source");
        fs::create_dir_all(source.join("cats")).expect("created");
        fs::write(source.join("cats/a.png"), "1").expect("written");
        let state = || state_of(&source, &Interrupt::default()).expect("readable");
        let before = state();
        let mark = |name: &str| mark_results(&source.join(name), &source, "--runs");
        for name in ["runs", "deep/er/../runs"] {
            mark(name).expect("a new folder");
            fs::write(source.join(name).join("result.png"), "1").expect("written");
            mark(name).expect("marked already");
        }
        fs::remove_dir_all(source.join("deep")).expect("removed");
        assert_eq!(state(), before);
        for name in ["cats", "", "cats/.."] {
            let error = mark(name).expect_err(name).to_string();
            assert!(error.contains("--runs"), "{error}");
        }
        let elsewhere = folder.path().join("runs");
        mark_results(&elsewhere, &source, "--runs").expect("nothing to do");
        assert!(!elsewhere.exists());
        fs::write(source.join("cats/b.png"), "2").expect("written");
        assert_ne!(state(), before);
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_back_end_and_an_interrupt_ends_a_long_walk() {
        use std::os::unix::fs::symlink;

        let folder = tempfile::tempdir().expect("a folder");
        for name in ["a", "b", "c"] {
            symlink(".", folder.path().join(name)).expect("linked");
        }
        let elsewhere = tempfile::tempdir().expect("a folder");
        symlink(elsewhere.path(), folder.path().join("d")).expect("linked");
        let interrupt = Interrupt::default();
        let before = state_of(folder.path(), &interrupt).expect("ends");
        fs::write(elsewhere.path().join("x.png"), "1").expect("written");
        assert_ne!(
            state_of(folder.path(), &interrupt).expect("ends"),
            before,
            "links are followed"
        );
        interrupt.raise();
        let error = state_of(folder.path(), &interrupt).expect_err("asked to stop");
        assert!(error.is::<stage::Interrupted>(), "{error:#}");
    }

    #[cfg(unix)]
    #[test]
    fn paths_that_are_not_text_have_one_text_each() {
        use std::os::unix::ffi::OsStrExt;

        let text = |bytes: &[u8]| text_of(Path::new(std::ffi::OsStr::from_bytes(bytes)));
        assert_eq!(text("/a/Zoë".as_bytes()), "/a/Zoë");
        assert_eq!(text(b"/a/\xe9\xff.zip"), r"/a/\xe9\xff.zip");
        assert_ne!(text(br"/a/\xe9.zip"), text(b"/a/\xe9.zip"));
    }
}
