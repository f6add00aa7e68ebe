//! Claims: one process at a time writes into a folder.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf, absolute};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Interrupt;

/// The right to write into a folder, held until it is dropped or the process ends, even by a kill.
///
/// It is a lock on the file `.<name>.lock` beside the folder, so that the holder may remove and
/// recreate the folder. The file is removed with the claim.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// The locked file; `None` where the file system has no locks.
    file: Option<File>,
}

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(200);

impl Claim {
    /// Claims `folder`, which need not exist. While another process holds it, logs that once and
    /// waits.
    ///
    /// # Errors
    ///
    /// The interrupt is raised while it waits, or the lock cannot be written.
    pub fn wait(folder: &Path, interrupt: &Interrupt) -> Result<Self> {
        let path = lock_beside(folder)?;
        let mut waits = false;
        loop {
            match try_lock(&path).with_context(|| format!("locking `{}`", path.display()))? {
                Attempt::Locked(file) => return Ok(Self { path, file: Some(file) }),
                Attempt::Unsupported(error) => {
                    tracing::warn!(
                        "`{}` cannot be locked ({error}); let no other command write to `{}`",
                        path.display(),
                        folder.display()
                    );
                    return Ok(Self { path, file: None });
                }
                Attempt::Taken if !waits => {
                    waits = true;
                    tracing::info!(
                        "another process is writing to `{}`; waiting for it",
                        folder.display()
                    );
                }
                Attempt::Taken => {}
            }
            interrupt.check()?;
            thread::sleep(PAUSE);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // On other systems, a waiting process could not see that its file was removed.
        if self.file.is_some() && cfg!(unix) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The file to lock for `folder`.
fn lock_beside(folder: &Path) -> Result<PathBuf> {
    let folder = absolute(folder).with_context(|| format!("finding `{}`", folder.display()))?;
    let (Some(parent), Some(name)) = (folder.parent(), folder.file_name()) else {
        anyhow::bail!("`{}` cannot be written to; name a folder in it", folder.display());
    };
    fs::create_dir_all(parent).with_context(|| format!("creating `{}`", parent.display()))?;
    let mut lock = std::ffi::OsString::from(".");
    lock.push(name);
    lock.push(LOCK);
    Ok(parent.join(lock))
}

/// The end of the names of lock files, which begin with a dot.
const LOCK: &str = ".lock";

/// True for the name of a file that a claim locks.
pub(crate) fn is_lock(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(LOCK)
}

/// Removes the lock file `path`, which a killed process left, unless a process holds it. One that is
/// about to lock it finds that it has lost its name, and makes a new one.
pub(crate) fn remove_if_free(path: &Path) {
    // Elsewhere whoever waits could not tell that its file has lost its name.
    if cfg!(unix)
        && let Ok(file) = File::options().append(true).open(path)
        && file.try_lock().is_ok()
        && has_name(&file, path)
    {
        let _ = fs::remove_file(path);
    }
}

enum Attempt {
    Locked(File),
    Taken,
    Unsupported(io::Error),
}

fn try_lock(path: &Path) -> io::Result<Attempt> {
    let file = match File::options().create(true).append(true).open(path) {
        Ok(file) => file,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            return Ok(Attempt::Unsupported(error));
        }
        Err(error) => return Err(error),
    };
    match file.try_lock() {
        Ok(()) if has_name(&file, path) => Ok(Attempt::Locked(file)),
        // The last holder removed it between our opening and our locking.
        Ok(()) | Err(TryLockError::WouldBlock) => Ok(Attempt::Taken),
        Err(TryLockError::Error(error)) => Ok(Attempt::Unsupported(error)),
    }
}

/// True where `path` still leads to `file`.
#[cfg(unix)]
fn has_name(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(file), Ok(named)) => identity(file) == identity(named),
        _ => false,
    }
}

#[cfg(not(unix))]
fn has_name(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_writers_has_the_folder_at_a_time_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out");
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let _claim = Claim::wait(&out, &Interrupt::default()).expect("claimed");
                    // Fails where a second one is inside.
                    fs::create_dir(&out).expect("alone");
                    thread::sleep(Duration::from_millis(5));
                    fs::remove_dir(&out).expect("alone");
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 0);
    }

    #[test]
    fn who_waits_can_be_interrupted() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out");
        let held = Claim::wait(&out, &Interrupt::default()).expect("free");
        let interrupt = Interrupt::default();
        interrupt.raise();
        let error = Claim::wait(&out, &interrupt).expect_err("asked to stop");
        assert!(error.is::<crate::Interrupted>(), "{error:#}");
        drop(held);
        Claim::wait(&out, &interrupt).expect("free again");
    }

    #[test]
    fn a_folder_named_from_inside_is_the_same_folder() {
        let lock = lock_beside(Path::new("out")).expect("a path");
        assert!(lock.is_absolute() && lock.ends_with(".out.lock"), "{}", lock.display());
        assert!(lock_beside(Path::new("/")).is_err());
    }
}
