//! Files that are whole or absent: written to a temporary file, flushed, then renamed.

use std::fs::{self, File, FileType};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use memmap2::Mmap;

use crate::claim;

/// Replaces the file `path` atomically with what `fill` writes.
///
/// The bytes go to a temporary file in the same folder, which is flushed to disk and renamed; then
/// the folder is flushed. A process killed at any moment leaves the old file or the new one. An
/// error leaves the old one, and no temporary file.
pub fn replace(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    write_beside(path, fill).with_context(|| format!("writing `{}`", path.display()))
}

fn write_beside(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY);
    // Results are shared: take the umask's permissions, not the private ones of temporary files.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut temporary = builder.tempfile_in(folder)?;
    // Locked until it is renamed, so that `remove_abandoned` skips it. Some file systems have no
    // locks.
    let _ = temporary.as_file().try_lock();
    fill(temporary.as_file_mut())?;
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    // On other systems a folder cannot be opened as a file.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Maps a file: the system reads its bytes when they are asked for. A map may exceed the memory.
#[expect(unsafe_code, reason = "mapping a file is unsafe because other programs can change it")]
pub fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the mapping is only read as bytes and numbers, which have no invalid values. No program of ours
    // writes into a file with its final name: see `replace`. What somebody else changes after the check is at
    // worst another value. A file that is truncated while it is mapped, or a disk that fails, ends the program by
    // a signal.
    unsafe { Mmap::map(file) }
}

/// The empty file that marks a folder of results, so that no command reads pictures from it.
pub const RESULTS_MARK: &str = ".assort-results";

/// Prefix of the names of temporary files, links and folders. A killed process can leave one, which
/// [`remove_unfinished`] or [`remove_abandoned`] removes.
pub const TEMPORARY: &str = ".unfinished-";

/// Replaces the file `path` atomically with these bytes; see [`replace`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| Ok(file.write_all(bytes)?))
}

/// Removes the file `path`, which may be missing.
pub fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing `{}`", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes what killed processes left in `folder`, where others may be working now: temporary files of
/// [`replace`], which their writers lock; temporary links; folders that were renamed to be removed; and
/// the lock files of claims that nobody holds. A folder that does not exist has none.
///
/// A writer whose link vanishes makes it again.
pub fn remove_abandoned(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("reading `{}`", folder.display()))?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_old(&entry) && name.starts_with(TEMPORARY) {
            remove_unlocked(&entry.path(), entry.file_type()?);
        } else if is_old(&entry) && claim::is_lock(&name) {
            claim::remove_if_free(&entry.path());
        }
    }
    Ok(())
}

/// Removes a temporary file, link or folder unless its writer locks it. Another process may do the
/// same at any moment, so errors are ignored.
fn remove_unlocked(path: &Path, kind: FileType) {
    let _ = if kind.is_dir() {
        fs::remove_dir_all(path)
    } else if kind.is_symlink() {
        fs::remove_file(path)
    } else {
        File::options().write(true).open(path).and_then(|file| {
            file.try_lock()?;
            fs::remove_file(path)
        })
    };
}

/// True for an entry that did not change this moment: its writer has had the time to lock it.
fn is_old(entry: &fs::DirEntry) -> bool {
    let changed = entry.metadata().and_then(|metadata| metadata.modified());
    changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > Duration::from_millis(100)))
}

/// Removes the temporary files that a killed process left in `folder`. The caller has claimed it.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading `{}`", folder.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_file(entry.path())
                .with_context(|| format!("removing `{}`", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep/file");
        write(&path, b"old").expect("written");
        let failed = replace(&path, |file| {
            file.write_all(b"half")?;
            anyhow::bail!("stopped")
        });
        let message = format!("{:#}", failed.expect_err("stopped"));
        assert!(message.contains("deep/file") && message.contains("stopped"), "{message}");
        assert_eq!(fs::read(&path).expect("there"), b"old");
        assert_eq!(fs::read_dir(folder.path().join("deep")).expect("there").count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_written_file_has_the_permissions_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().expect("a folder");
        let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
        write(&ours, b"x").expect("written");
        fs::write(&plain, b"x").expect("written");
        let mode = |path| fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn abandoned_files_are_removed_and_those_of_a_living_writer_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let names = ["abandoned", "new", "held"].map(|name| format!("{TEMPORARY}{name}"));
        let [abandoned, new, held] = names.map(|name| folder.path().join(name));
        let long_ago = std::time::SystemTime::now() - Duration::from_secs(60);
        for path in [&abandoned, &new, &held] {
            fs::write(path, b"half").expect("written");
            if path != &new {
                let file = File::options().write(true).open(path).expect("there");
                file.set_modified(long_ago).expect("set");
            }
        }
        let writer = File::open(&held).expect("there");
        writer.try_lock().expect("free");
        remove_abandoned(folder.path()).expect("cleared");
        assert!(!abandoned.exists() && new.exists() && held.exists());
        remove_abandoned(&folder.path().join("none")).expect("nothing to clear");
    }

    #[cfg(unix)]
    #[test]
    fn abandoned_links_folders_and_locks_are_removed_and_a_held_claim_is_kept() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at(".unfinished-removed/inside"))?;
        fs::create_dir(at("0-embed"))?;
        std::os::unix::fs::symlink("nowhere", at(".unfinished-0-embed.17"))?;
        fs::write(at(".free.lock"), "")?;
        let claim = crate::Claim::wait(&at("held"), &crate::Interrupt::default())?;
        std::thread::sleep(Duration::from_millis(150));
        remove_abandoned(folder.path())?;
        let mut names: Vec<_> = fs::read_dir(folder.path())?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<_, _>>()?;
        names.sort();
        assert_eq!(names, [".held.lock", "0-embed"]);
        drop(claim);
        Ok(())
    }

    #[test]
    fn unfinished_files_are_cleared_and_others_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join(format!("{TEMPORARY}x")), b"half").expect("written");
        fs::write(folder.path().join("kept"), b"whole").expect("written");
        remove_unfinished(folder.path()).expect("cleared");
        let names: Vec<_> = fs::read_dir(folder.path())
            .expect("there")
            .map(|entry| entry.expect("readable").file_name())
            .collect();
        assert_eq!(names, ["kept"]);
    }
}
