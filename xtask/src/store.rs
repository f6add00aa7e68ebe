//! The store: every result under its key, and the views that users open.
//!
//! `runs/.store/<key>/` is the output of one step; it is finished when it has `done.json`. Beside
//! it, `<key>.json` has the values that the key is a digest of; commands lock that file while they
//! work on the step or read its result. `runs/<experiment>/<seed>/<round>-<place>` is a link to the
//! folder. Experiments share the results of identical steps.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use stage::{Claim, Interrupt, Status, files, finished};

use crate::key::StoreKey;

/// Results by key, below one folder.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

/// The state of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepState {
    /// It was never started.
    New,
    /// It was started but is not finished; it can be resumed.
    Started,
    /// It is finished.
    Done,
}

/// A lock for working on a step or reading its result, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Hold(File);

impl Hold {
    /// The locked file. A process that inherits it keeps the lock until it ends.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Store {
    /// The results of steps below the folder `runs`.
    pub fn of_steps(runs: &Path) -> Self {
        Self { folder: runs.join(".store") }
    }

    /// The prepared data sets below the folder `runs`.
    pub fn of_data(runs: &Path) -> Self {
        Self { folder: runs.join(".data") }
    }

    /// Removes what killed commands left in the store's folder.
    pub fn remove_abandoned(&self) -> Result<()> {
        files::remove_abandoned(&self.folder)
    }

    /// The folder of the result `key`.
    pub fn path(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    /// The file `<key>.<name>` beside the folder of a result.
    pub fn beside(&self, key: &str, name: &str) -> PathBuf {
        self.folder.join(format!("{key}.{name}"))
    }

    /// The state of the step of `key`.
    pub fn state(&self, key: &str) -> StepState {
        let folder = self.path(key);
        if finished::is_finished(&folder) {
            StepState::Done
        } else if folder.exists() {
            StepState::Started
        } else {
            StepState::New
        }
    }

    /// Locks `key` exclusively; waits while another command works on it or reads it.
    pub fn claim(&self, key: &StoreKey, interrupt: &Interrupt) -> Result<Hold> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("creating `{}`", self.folder.display()))?;
        let path = self.beside(key.name(), "json");
        let open = File::options().create(true).append(true).read(true).open(&path);
        let file = open.with_context(|| format!("opening `{}`", path.display()))?;
        lock(&file, File::try_lock, key.name(), interrupt)?;
        let record = format!("{:#}\n", key.record);
        if !fs::read(&path).is_ok_and(|found| found == record.as_bytes()) {
            // New, or damaged. It is not replaced: it is locked.
            let write = || file.set_len(0).and_then(|()| (&file).write_all(record.as_bytes()));
            write().with_context(|| format!("writing `{}`", path.display()))?;
        }
        Ok(Hold(file))
    }

    /// Prevents the removal of the finished result `key`; waits while another command works on it.
    ///
    /// # Errors
    ///
    /// It is not finished.
    pub fn hold(&self, key: &str, interrupt: &Interrupt) -> Result<Hold> {
        self.hold_if_finished(key, interrupt)?.with_context(|| {
            format!(
                "the result `{}` is missing or damaged; `assort reproduce` or `assort cluster` with the same \
                 values makes it again",
                self.path(key).display()
            )
        })
    }

    /// The same where the result may be missing: `None` if it is not finished.
    pub fn hold_if_finished(&self, key: &str, interrupt: &Interrupt) -> Result<Option<Hold>> {
        if self.state(key) != StepState::Done {
            return Ok(None);
        }
        // A step that was started manually has no record yet; the next claim writes it.
        let path = self.beside(key, "json");
        let open = File::options().create(true).append(true).read(true).open(&path);
        let file = open.with_context(|| format!("opening `{}`", path.display()))?;
        lock(&file, File::try_lock_shared, key, interrupt)?;
        Ok((self.state(key) == StepState::Done).then_some(Hold(file)))
    }

    /// Returns `result`. If it failed because of its input, first removes the results among the
    /// finished ones in `keys` that have damaged files, so that the same command makes them again.
    /// The error then says so.
    pub fn removing_damaged<'a, T>(
        &self,
        result: Result<T>,
        keys: impl IntoIterator<Item = &'a str>,
        interrupt: &Interrupt,
    ) -> Result<T> {
        let Err(error) = result else { return result };
        if Status::of_error(&error) != Status::BadInput {
            return Err(error);
        }
        let mut removed = BTreeSet::new();
        for key in keys.into_iter().collect::<BTreeSet<_>>() {
            removed.extend(self.remove_damaged(key, interrupt)?);
        }
        if removed.is_empty() {
            return Err(error);
        }
        Err(error.context(format!(
            "{} was changed after it was written, and is removed; `assort reproduce` or \
             `assort cluster` with the same values makes it again",
            removed.into_iter().collect::<Vec<_>>().join(", ")
        )))
    }

    fn remove_damaged(&self, key: &str, interrupt: &Interrupt) -> Result<Vec<String>> {
        let damaged = || finished::damaged(&self.path(key));
        if self.state(key) != StepState::Done || damaged()?.is_empty() {
            return Ok(vec![]);
        }
        let file = File::options().create(true).append(true).open(self.beside(key, "json"))?;
        lock(&file, File::try_lock, key, interrupt)?;
        let removed = damaged()?; // Another command may have made them again meanwhile.
        removed.iter().try_for_each(fs::remove_file)?;
        Ok(removed.iter().map(|path| format!("`{}`", path.display())).collect())
    }

    /// Removes the result of `key`, finished or not. The caller has claimed it.
    pub fn forget(&self, key: &StoreKey, _: &Hold, interrupt: &Interrupt) -> Result<()> {
        let folder = self.path(key.name());
        if !folder.exists() {
            return Ok(());
        }
        // The program that writes there may outlive the command that started it.
        let _writer = Claim::wait(&folder, interrupt)?;
        // Renamed first: a kill in the middle must not leave a state without its log or its results.
        let removed = temporary(&folder);
        let remove = || -> io::Result<()> {
            let _ = fs::remove_dir_all(&removed);
            fs::rename(&folder, &removed)?;
            // Another command may remove it too.
            let _ = fs::remove_dir_all(&removed);
            Ok(())
        };
        remove().with_context(|| format!("removing `{}`", folder.display()))
    }
}

fn lock(
    file: &File,
    try_lock: fn(&File) -> Result<(), TryLockError>,
    key: &str,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut waits = false;
    loop {
        match try_lock(file) {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => {
                if !waits {
                    tracing::info!("another command uses {key}; waiting for it");
                }
                waits = true;
                interrupt.check()?;
                thread::sleep(Duration::from_millis(200));
            }
            // A file system without locks: the user must avoid two commands at once.
            Err(TryLockError::Error(_)) => return Ok(()),
        }
    }
}

/// Makes `view` a link to the folder `target`, or, on a system without links, a text file with its
/// path.
///
/// # Errors
///
/// `view` exists and is neither: it may be the user's data.
pub fn show(view: &Path, target: &Path) -> Result<()> {
    require_replaceable(view)?;
    let put = || -> io::Result<()> {
        fs::create_dir_all(view.parent().unwrap_or(Path::new(".")))?;
        let target = fs::canonicalize(target)?;
        // Renamed into place, so that a reader finds either the old view or the new one.
        let beside = temporary(view);
        loop {
            let _ = fs::remove_file(&beside);
            link(&target, &beside).or_else(|_| fs::write(&beside, target.display().to_string()))?;
            match fs::rename(&beside, view) {
                // Another command removed it as abandoned.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                renamed => return renamed,
            }
        }
    };
    put().with_context(|| format!("linking `{}` to `{}`", view.display(), target.display()))
}

/// A path beside `path` under a temporary name. A killed process can leave it;
/// [`files::remove_abandoned`] removes it.
fn temporary(path: &Path) -> PathBuf {
    let mut name = OsString::from(files::TEMPORARY);
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}

/// Fails if the path of a view holds something else.
pub fn require_replaceable(view: &Path) -> Result<()> {
    match fs::symlink_metadata(view) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Ok(_) if is_view(view) => Ok(()),
        _ => bail!(
            "`{}` is not a link that this program made; move it away and run the same command \
             again",
            view.display()
        ),
    }
}

/// Whether a path is a view: a link, or a text file in place of one.
pub fn is_view(path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => true,
        // Paths are not longer than that.
        Ok(found) if found.is_file() && found.len() <= 4096 => {
            fs::read_to_string(path).is_ok_and(|text| Path::new(&text).is_absolute())
        }
        _ => false,
    }
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

/// The path of `target` relative to `folder`, so that `runs/` can be moved as a whole.
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

    fn key() -> StoreKey {
        StoreKey::of("embed", serde_json::json!({"views": 8}))
    }

    #[test]
    fn a_result_is_new_then_started_then_done_then_forgotten() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, interrupt) = (Store::of_steps(folder.path()), Interrupt::default());
        let key = key();
        let claim = store.claim(&key, &interrupt).expect("free");
        assert_eq!(store.state(key.name()), StepState::New);
        store.forget(&key, &claim, &interrupt).expect("nothing to forget");
        fs::create_dir_all(store.path(key.name())).expect("created");
        assert_eq!(store.state(key.name()), StepState::Started);
        let folder = store.path(key.name());
        finished::mark(&folder, "embed", None, finished::Digests::Listed).expect("marked");
        assert_eq!(store.state(key.name()), StepState::Done);
        store.forget(&key, &claim, &interrupt).expect("forgotten");
        assert_eq!(store.state(key.name()), StepState::New);
    }

    #[test]
    fn a_claim_keeps_others_out_and_says_what_the_key_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, interrupt) = (Store::of_steps(folder.path()), Interrupt::default());
        let key = key();
        let claim = store.claim(&key, &interrupt).expect("free");
        let record = store.beside(key.name(), "json");
        assert!(fs::read_to_string(&record).expect("there").contains("\"views\": 8"));
        let other = File::open(&record).expect("there");
        assert!(matches!(other.try_lock(), Err(TryLockError::WouldBlock)));
        drop(claim);
        other.try_lock().expect("free again");
        drop(other);
        store.claim(&key, &interrupt).expect("free");
        let text = fs::read_to_string(&record).expect("there");
        assert_eq!(text.matches("views").count(), 1, "{text}");
        fs::write(&record, &text[1..]).expect("damaged");
        store.claim(&key, &interrupt).expect("free");
        assert_eq!(fs::read_to_string(&record).expect("there"), text);
    }

    #[test]
    fn readers_share_a_finished_result_and_keep_it_from_being_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, interrupt) = (Store::of_steps(folder.path()), Interrupt::default());
        let key = key();
        let error = store.hold(key.name(), &interrupt).expect_err("nothing").to_string();
        assert!(error.contains("makes it again"), "{error}");
        drop(store.claim(&key, &interrupt).expect("free"));
        store.hold(key.name(), &interrupt).expect_err("not finished");
        fs::create_dir_all(store.path(key.name())).expect("created");
        let folder = store.path(key.name());
        finished::mark(&folder, "embed", None, finished::Digests::Listed).expect("marked");

        let one = store.hold(key.name(), &interrupt).expect("finished");
        let other = store.hold(key.name(), &interrupt).expect("shared");
        interrupt.raise();
        let error = store.claim(&key, &interrupt).expect_err("two read it");
        assert!(error.is::<stage::Interrupted>(), "it waits until it is interrupted: {error:#}");
        drop((one, other));
        store.claim(&key, &interrupt).expect("free");
    }

    #[test]
    fn a_damaged_result_is_removed_after_an_error_and_a_sound_one_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, interrupt) = (Store::of_steps(folder.path()), Interrupt::default());
        for key in ["a", "b"] {
            fs::create_dir_all(store.path(key)).expect("created");
            fs::write(store.path(key).join("file"), key).expect("written");
            finished::mark(&store.path(key), key, None, finished::Digests::Listed).expect("marked");
        }
        let removing = |result| store.removing_damaged(result, ["a", "b", "a"], &interrupt);
        let failed = || Err::<(), _>(anyhow::anyhow!("a reader says why"));
        let error = format!("{:#}", removing(failed()).expect_err("failed"));
        assert_eq!(error, "a reader says why", "nothing is damaged");
        fs::write(store.path("b").join("file"), "c").expect("written");
        removing(Err(stage::Diverged("NaN".into()).into())).expect_err("not the input's fault");
        assert_eq!(store.state("b"), StepState::Done);
        let error = format!("{:#}", removing(failed()).expect_err("failed"));
        assert!(error.contains("b/file") && error.contains("a reader says why"), "{error}");
        assert_eq!((store.state("a"), store.state("b")), (StepState::Done, StepState::Started));
        removing(Ok(())).expect("passed on");
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
        assert_eq!(fs::read_dir(runs.join("digits/0/control")).expect("there").count(), 1);
        let moved = folder.path().join("moved");
        fs::rename(&runs, &moved).expect("moved");
        let file = moved.join("digits/0/control/1-embed/file");
        assert_eq!(fs::read_to_string(file).expect("there"), "two");
    }

    #[test]
    fn a_view_whose_temporary_link_vanishes_is_made_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let view = folder.path().join("0-embed");
        let beside = temporary(&view);
        let ends = std::sync::atomic::AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = fs::remove_file(&beside);
                }
            });
            for _ in 0..200 {
                show(&view, folder.path()).expect("linked");
            }
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(is_view(&view) && fs::symlink_metadata(&beside).is_err());
    }

    #[test]
    fn a_killed_removal_leaves_nothing_in_the_place_of_the_result() {
        let folder = tempfile::tempdir().expect("a folder");
        let (store, interrupt) = (Store::of_steps(folder.path()), Interrupt::default());
        let claim = store.claim(&key(), &interrupt).expect("free");
        let result = store.path(key().name());
        // The state after a kill, and a command of the same number that removes the result again.
        for path in [temporary(&result), result.clone()] {
            fs::create_dir_all(&path).expect("created");
            fs::write(path.join("state"), "1").expect("written");
        }
        store.forget(&key(), &claim, &interrupt).expect("forgotten");
        assert_eq!(store.state(key().name()), StepState::New);
        fs::create_dir(temporary(&result)).expect("created");
        thread::sleep(Duration::from_millis(150));
        store.remove_abandoned().expect("readable");
        let record = format!("{}.json", key().name());
        let left: Vec<_> = fs::read_dir(&store.folder).expect("there").flatten().collect();
        assert_eq!(left.iter().map(|entry| entry.file_name()).collect::<Vec<_>>(), [&*record]);
    }

    #[test]
    fn files_of_the_user_at_the_path_of_a_view_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let view = folder.path().join("0-embed");
        fs::create_dir(&view).expect("created");
        fs::write(view.join("notes"), "mine").expect("written");
        let error = show(&view, folder.path()).expect_err("a folder").to_string();
        assert!(error.contains("0-embed") && error.contains("move it away"), "{error}");
        assert_eq!(fs::read_to_string(view.join("notes")).expect("there"), "mine");
        let file = folder.path().join("1-embed");
        fs::write(&file, "some notes").expect("written");
        show(&file, folder.path()).expect_err("a file");
        assert_eq!(fs::read_to_string(&file).expect("there"), "some notes");
        // A view where the system has no links.
        fs::write(&file, folder.path().display().to_string()).expect("written");
        show(&file, folder.path()).expect("replaced");
    }
}
