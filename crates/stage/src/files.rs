//! Files that are whole or absent: written to a temporary file, flushed, then renamed.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

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
    // Results are shared: the umask sets the permissions, not the caution of temporary files.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut temporary = builder.tempfile_in(folder)?;
    fill(temporary.as_file_mut())?;
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    // Elsewhere a folder cannot be opened as a file.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Prefix of the names of temporary files. A killed process can leave one, which
/// [`remove_unfinished`] removes.
pub const TEMPORARY: &str = ".unfinished-";

/// Replaces the file `path` atomically with these bytes; see [`replace`].
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| Ok(file.write_all(bytes)?))
}

/// Removes the temporary files that a killed process left in `folder`.
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
