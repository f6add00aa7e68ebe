//! The corrections of a session: each edit is in the file before it is on the page, and can be undone.
//!
//! Two tabs show one revision or another, and another program may write the file. So an edit names the revision
//! that its page shows, and the file is compared with what was read or written last, under a claim on it. An edit
//! of another revision, or on a changed file, is refused, and nothing is lost.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Error, Result};
use data::corrections::{ClusteredPictures, CorrectedClusters, Corrections, PictureMark};
use serde::Deserialize;
use stage::{Claim, Interrupt, digest};

/// An edit of the page, and the revision that it was made on.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EditRequest {
    revision: u64,
    edit: Edit,
}

/// What a page can change. Clusters are given by number, pictures by place.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Edit {
    Rename { cluster: u32, name: Option<String> },
    Merge { clusters: Vec<u32> },
    Unmerge { cluster: u32 },
    Move { places: Vec<u32>, cluster: u32 },
    Mark { places: Vec<u32>, mark: PictureMark },
    Unmark { places: Vec<u32> },
    Undo,
}

/// Why an edit was not made. The file is unchanged; after a conflict, the page shows its present content.
#[derive(Debug)]
pub enum EditError {
    /// The page shows an earlier state.
    Conflict(String),
    /// The edit makes no sense here.
    Unusable(Error),
    /// The file could not be read or written.
    Machine(Error),
}

/// Most edits that can be undone.
const UNDONE: usize = 100;

/// The corrections of one run, and their file.
#[derive(Debug)]
pub struct EditSession {
    path: PathBuf,
    run: ClusteredPictures,
    corrections: Corrections,
    /// The digest of the file when it was read or written last; `None` where there was none.
    seen: Option<String>,
    /// The states before the edits of this session, the latest last.
    earlier: Vec<Corrections>,
    revision: u64,
    interrupt: Interrupt,
}

impl EditSession {
    /// Reads the corrections of a run.
    ///
    /// # Errors
    ///
    /// The file is not usable.
    pub fn open(path: PathBuf, run: ClusteredPictures, interrupt: &Interrupt) -> Result<Self> {
        let mut session = Self {
            path,
            run,
            corrections: Corrections::default(),
            seen: None,
            earlier: Vec::new(),
            revision: 0,
            interrupt: interrupt.clone(),
        };
        session.refresh()?;
        Ok(session)
    }

    /// Reads the file again if another program changed it; returns whether it did.
    ///
    /// # Errors
    ///
    /// The file is not usable.
    pub fn refresh(&mut self) -> Result<bool> {
        let found = self.digest()?;
        if found == self.seen {
            return Ok(false);
        }
        self.corrections = Corrections::open(&self.path)?;
        self.seen = found;
        self.earlier.clear();
        self.revision += 1;
        Ok(true)
    }

    /// Makes an edit and writes the file.
    ///
    /// # Errors
    ///
    /// See [`EditError`].
    pub fn make(&mut self, request: EditRequest) -> Result<(), EditError> {
        let _claim = Claim::wait(&self.path, &self.interrupt).map_err(EditError::Machine)?;
        if self.refresh().map_err(EditError::Machine)? {
            return Err(EditError::Conflict(format!(
                "Not saved: another program changed `{}`. The page now shows what is there; make the \
                 correction again.",
                self.path.display()
            )));
        }
        if request.revision != self.revision {
            return Err(EditError::Conflict(
                "Not saved: the clusters were corrected in another tab. The page now shows that; make the \
                 correction again."
                    .into(),
            ));
        }
        let is_undo = matches!(request.edit, Edit::Undo);
        let next = self.next(request.edit).map_err(EditError::Unusable)?;
        next.write(&self.path).map_err(EditError::Machine)?;
        self.seen = Some(digest::sha256(next.to_text().as_bytes()));
        let before = std::mem::replace(&mut self.corrections, next);
        if is_undo {
            self.earlier.pop();
        } else {
            self.earlier.push(before);
            self.earlier.drain(..self.earlier.len().saturating_sub(UNDONE));
        }
        self.revision += 1;
        Ok(())
    }

    /// The corrections after an edit.
    fn next(&self, edit: Edit) -> Result<Corrections> {
        let (run, mut next) = (&self.run, self.corrections.clone());
        match edit {
            Edit::Undo => {
                return self.earlier.last().cloned().context("there is nothing left to undo");
            }
            Edit::Rename { cluster, name } => next.rename(run, cluster, name.as_deref()),
            Edit::Merge { clusters } => next.merge(run, &clusters),
            Edit::Unmerge { cluster } => next.unmerge(run, cluster),
            Edit::Move { places, cluster } => next.move_pictures(run, &places, cluster),
            Edit::Mark { places, mark } => next.mark(run, &places, mark),
            Edit::Unmark { places } => next.unmark(run, &places),
        }?;
        Ok(next)
    }

    /// The clusters after the corrections.
    pub fn corrected(&self) -> CorrectedClusters {
        self.corrections.resolve(&self.run)
    }

    /// Counts what has changed; pages name it in their edits.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether an edit of this session can be undone.
    pub fn can_undo(&self) -> bool {
        !self.earlier.is_empty()
    }

    /// Whether there are corrections.
    pub fn is_corrected(&self) -> bool {
        !self.corrections.is_empty()
    }

    fn digest(&self) -> Result<Option<String>> {
        match fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            bytes => {
                let bytes = bytes.with_context(|| format!("reading `{}`", self.path.display()))?;
                Ok(Some(digest::sha256(&bytes)))
            }
        }
    }
}
