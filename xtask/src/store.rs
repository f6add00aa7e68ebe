//! The store: every result under its key, and the views that people look at.
//!
//! `runs/.store/<key>/` holds what one step wrote, finished when it has `done.json`; beside it,
//! `<key>.json` says what the key was made of. `runs/<experiment>/<seed>/<round>-<place>` is a
//! link to it. Several experiments share what they have in common.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::interrupt;
use crate::key::Key;

/// The file that a finished folder holds, written last.
pub const DONE: &str = "done.json";

/// Results by key, below one folder.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

/// How far a step has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing is there.
    New,
    /// It was started, and goes on when it is started again.
    Started,
    /// It is finished.
    Done,
}

impl Store {
    /// The store in `folder`, which is created when something is put in.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where the result of `key` lies.
    pub fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(key.to_string())
    }

    /// How far the step of `key` has come.
    pub fn state(&self, key: &Key) -> State {
        let folder = self.path(key);
        if folder.join(DONE).exists() {
            State::Done
        } else if folder.exists() {
            State::Started
        } else {
            State::New
        }
    }

    /// Removes the result of `key`, finished or not.
    pub fn forget(&self, key: &Key) -> Result<()> {
        let folder = self.path(key);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing `{}`", folder.display()))
            }
            _ => Ok(()),
        }
    }

    /// Claims `key` for this process until the claim is dropped, so that two commands never write
    /// into one folder; waits while another has it.
    pub fn claim(&self, key: &Key) -> Result<File> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("creating `{}`", self.folder.display()))?;
        let path = self.folder.join(format!("{key}.json"));
        let record = || -> io::Result<File> {
            if !path.exists() {
                fs::write(&path, format!("{:#}\n", key.record))?;
            }
            File::open(&path)
        };
        let file = record().with_context(|| format!("writing `{}`", path.display()))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {
                    if !told {
                        tracing::info!("another command is working on {key}; waiting for it");
                    }
                    told = true;
                    interrupt::check()?;
                    thread::sleep(Duration::from_millis(200));
                }
                // A file system without locks: two commands at once are then the user's to avoid.
                Err(TryLockError::Error(_)) => return Ok(file),
            }
        }
    }
}

/// Makes `view` show the folder `target`: a link, or where links are not to be had a text file
/// that holds its path.
pub fn show(view: &Path, target: &Path) -> Result<()> {
    let put = || -> io::Result<()> {
        if let Some(parent) = view.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::symlink_metadata(view) {
            Ok(old) if old.is_dir() => fs::remove_dir_all(view)?,
            Ok(_) => fs::remove_file(view)?,
            Err(_) => {}
        }
        let target = fs::canonicalize(target)?;
        link(&target, view).or_else(|_| fs::write(view, target.display().to_string()))
    };
    put().with_context(|| format!("linking `{}` to `{}`", view.display(), target.display()))
}

#[cfg(unix)]
fn link(target: &Path, view: &Path) -> io::Result<()> {
    let folder = view.parent().map(fs::canonicalize).transpose()?;
    let target = match folder.and_then(|folder| relative(target, &folder)) {
        Some(relative) => relative,
        None => target.to_owned(),
    };
    std::os::unix::fs::symlink(target, view)
}

#[cfg(windows)]
fn link(target: &Path, view: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_dir(target, view)
}

/// `target` as seen from `folder`, so that the whole of `runs/` can be moved.
#[cfg(unix)]
fn relative(target: &Path, folder: &Path) -> Option<PathBuf> {
    let common = folder.ancestors().find(|ancestor| target.starts_with(ancestor))?;
    let up = folder.strip_prefix(common).ok()?.components().count();
    let down = target.strip_prefix(common).ok()?;
    Some(std::iter::repeat_n(Path::new(".."), up).collect::<PathBuf>().join(down))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_new_then_started_then_done_then_forgotten() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path().join(".store"));
        let key = Key::of("embed", serde_json::json!({"views": 8}));
        assert_eq!(store.state(&key), State::New);
        store.forget(&key).expect("nothing to forget");
        fs::create_dir_all(store.path(&key)).expect("created");
        assert_eq!(store.state(&key), State::Started);
        fs::write(store.path(&key).join(DONE), "{}").expect("written");
        assert_eq!(store.state(&key), State::Done);
        store.forget(&key).expect("forgotten");
        assert_eq!(store.state(&key), State::New);
    }

    #[test]
    fn a_claim_keeps_others_out_and_says_what_the_key_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::new(folder.path().to_owned());
        let key = Key::of("embed", serde_json::json!({"views": 8}));
        let claim = store.claim(&key).expect("free");
        let record = folder.path().join(format!("{key}.json"));
        assert!(fs::read_to_string(&record).expect("there").contains("\"views\": 8"));
        let other = File::open(&record).expect("there");
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(claim);
        other.try_lock().expect("free again");
    }

    #[test]
    fn a_view_follows_the_last_result_and_survives_a_move() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        for name in ["one", "two"] {
            fs::create_dir_all(runs.join(".store").join(name)).expect("created");
            fs::write(runs.join(".store").join(name).join("file"), name).expect("written");
        }
        let view = runs.join("digits/0/control/1-embed");
        for name in ["one", "two"] {
            show(&view, &runs.join(".store").join(name)).expect("linked");
            assert_eq!(fs::read_to_string(view.join("file")).expect("there"), name);
        }
        let moved = folder.path().join("moved");
        fs::rename(&runs, &moved).expect("moved");
        let file = moved.join("digits/0/control/1-embed/file");
        assert_eq!(fs::read_to_string(file).expect("there"), "two");
    }
}
