//! Whose runs the folder of an experiment holds: those of one folder of pictures that `assort cluster`
//! groups.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use stage::{Claim, Interrupt};

/// The file in the folder of an experiment that says whose runs it holds.
const OWNER: &str = "pictures.json";

#[derive(PartialEq, Serialize, Deserialize)]
struct RunOwner {
    /// The absolute path of the pictures, or their address.
    pictures: String,
}

impl RunOwner {
    fn of(pictures: &Path) -> Self {
        Self { pictures: crate::source::text_of(pictures) }
    }
}

/// The folder in `runs` for the runs of these pictures, which is theirs from now on: `name`, or `name` with a
/// number where that holds the runs of other pictures.
pub fn claim(runs: &Path, name: &str, pictures: &Path, interrupt: &Interrupt) -> Result<String> {
    let own = RunOwner::of(pictures);
    let mut found = name.to_owned();
    // Another command may be looking for a folder of the same name.
    let _claim = Claim::wait(&runs.join(name), interrupt)?;
    for number in 2.. {
        let folder = runs.join(&found);
        let file = folder.join(OWNER);
        if !file.exists() {
            let create = fs::create_dir_all(&folder);
            create.with_context(|| format!("creating `{}`", folder.display()))?;
            stage::json::write(&file, &own)?;
            break;
        }
        let owner: RunOwner = stage::json::read(&file)?;
        if owner == own {
            break;
        }
        found = format!("{name}-{number}");
        tracing::info!(
            "the run `{}` is of `{}`; looking for one of these pictures at `{found}`",
            folder.display(),
            owner.pictures
        );
    }
    Ok(found)
}

/// Whose runs the folder of an experiment holds, if `cluster` made it.
pub fn pictures_of(folder: &Path) -> Option<String> {
    stage::json::read::<RunOwner>(&folder.join(OWNER)).ok().map(|owner| owner.pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_keep_their_folder_and_others_of_the_name_get_another() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let runs = folder.path().join("runs");
        let claim = |pictures: &str| {
            claim(&runs, "photos-holiday", Path::new(pictures), &Interrupt::default())
        };
        assert_eq!(claim("/a/holiday")?, "photos-holiday");
        assert_eq!(claim("/b/holiday")?, "photos-holiday-2");
        assert_eq!(claim("/a/holiday")?, "photos-holiday");
        assert_eq!(pictures_of(&runs.join("photos-holiday-2")).as_deref(), Some("/b/holiday"));
        assert_eq!(pictures_of(&runs.join("digits")), None);

        let found = std::thread::scope(|scope| {
            let start = |n: usize| scope.spawn(move || claim(&format!("/{n}/holiday")));
            let all: Vec<_> = (0..8).map(start).collect();
            all.into_iter().map(|one| one.join().expect("no panic")).collect::<Result<Vec<_>>>()
        })?;
        let distinct: std::collections::BTreeSet<_> = found.iter().collect();
        assert_eq!(distinct.len(), 8, "two folders share a run: {found:?}");
        Ok(())
    }
}
