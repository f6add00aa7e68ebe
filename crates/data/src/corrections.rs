//! `corrections.toml`: what a person has corrected of the clusters of a run.
//!
//! TOML in UTF-8 with `format-version = 1`. An unknown key is an error, and so is an entry that is there
//! twice. Comments are lost when a program writes the file.
//!
//! ```toml
//! format-version = 1
//!
//! [[cluster]]                   # a cluster that was corrected, or that a correction names
//! number = 3                    # its number in the run in which it was corrected
//! name = "Beaches"              # optional
//! exemplars = ["5f1c…", "09ab…"]   # ids of its pictures of highest score in that run, 1 to 16
//!
//! [[merge]]
//! clusters = [3, 7]             # shown as one cluster, under the first; both have their [[cluster]]
//!
//! [[picture]]
//! id = "77d0…"                  # the SHA-256 of the picture's own file, or of its pixels
//! name = "holiday/1.jpg"        # for the reader: the id alone identifies it
//! cluster = 3                   # it belongs to this cluster, which has its [[cluster]]; or
//! mark = "wrong"                # it is in the wrong cluster; or "outlier": it fits no cluster
//! ```
//!
//! A name is unique, has 1 to 100 characters, no spaces around it, no control characters, and no marks of
//! the direction of writing. A cluster is in at most one merge, and of a merge only the first has a name.
//!
//! # Clusters of another run
//!
//! Another run numbers its clusters in another way, and pictures come and go. So a cluster is found by its
//! exemplars: it is the cluster that holds **more than half** of those that still exist. Where no
//! cluster does, as after a tie, the correction is not applied. If two entries claim one cluster, the
//! one with more exemplars in it has it; of equal ones, the one of lower number; the other is not applied.
//! Clusters that are merged may be one cluster in the other run.
//!
//! Whatever is not applied [is reported](CorrectedClusters::not_applied) and stays in the file. Identical
//! pictures have one id and are corrected alike.
//!
//! - [`Corrections::resolve`] applies corrections to a run, which is given as [`ClusteredPictures`].
//! - [`Corrections::rename`], [`merge`](Corrections::merge), [`unmerge`](Corrections::unmerge),
//!   [`move_pictures`](Corrections::move_pictures), [`mark`](Corrections::mark) and
//!   [`unmark`](Corrections::unmark) edit them. To undo an edit, keep a clone.
//!
//! ```
//! use data::corrections::{ClusteredPictures, Corrections, Membership, PictureMark};
//!
//! # fn main() -> anyhow::Result<()> {
//! // Three pictures in two clusters; of a real run, `ClusteredPictures::of`.
//! let (ids, names) = ([1, 2, 3].map(|byte| [byte; 32]), ["a.jpg", "b.jpg", "c.jpg"].map(String::from));
//! let run = ClusteredPictures::new(2, vec![0, 0, 1], &[0.9, 0.2, 0.7], ids.to_vec(), names.to_vec())?;
//! let mut corrections = Corrections::default();
//! corrections.rename(&run, 1, Some("Beaches"))?;
//! corrections.move_pictures(&run, &[1], 1)?;
//! corrections.mark(&run, &[0], PictureMark::Outlier)?;
//! let corrected = corrections.resolve(&run);
//! assert_eq!(corrected.names[1].as_deref(), Some("Beaches"));
//! assert_eq!(corrected.memberships[1], Membership::Cluster(1));
//! assert_eq!(corrected.memberships[0], Membership::Marked(PictureMark::Outlier));
//! # Ok(())
//! # }
//! ```

mod edit;
mod resolve;
mod run;
#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use stage::console::printable;
use stage::digest::hex;

use crate::images::Id;

pub use resolve::{CorrectedClusters, Membership};
pub use run::ClusteredPictures;

const VERSION: i64 = 1;

/// Most exemplars of a cluster.
const EXEMPLARS: usize = 16;

/// Most characters of a name.
const NAME_CHARACTERS: usize = 100;

/// Corrections of clusters by hand; see the [module](self). The default has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Corrections {
    /// By number.
    clusters: BTreeMap<u32, KnownCluster>,
    /// Numbers of clusters that are shown as one.
    merges: Vec<Vec<u32>>,
    pictures: BTreeMap<Id, CorrectedPicture>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownCluster {
    name: Option<String>,
    exemplars: Vec<Id>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct CorrectedPicture {
    name: String,
    correction: PictureCorrection,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PictureCorrection {
    MovedTo(u32),
    Marked(PictureMark),
}

/// Why a picture belongs to no cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PictureMark {
    /// It is in the wrong cluster.
    Wrong,
    /// It fits no cluster.
    Outlier,
}

impl PictureMark {
    /// Its word in files and on pages.
    pub fn word(self) -> &'static str {
        match self {
            Self::Wrong => "wrong",
            Self::Outlier => "outlier",
        }
    }
}

/// The file as TOML has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct CorrectionsFile {
    #[serde(rename = "format-version")]
    _format_version: i64,
    #[serde(default)]
    cluster: Vec<ClusterTable>,
    #[serde(default)]
    merge: Vec<MergeTable>,
    #[serde(default)]
    picture: Vec<PictureTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClusterTable {
    number: u32,
    name: Option<String>,
    exemplars: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MergeTable {
    clusters: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PictureTable {
    id: String,
    name: String,
    cluster: Option<u32>,
    mark: Option<PictureMark>,
}

impl Corrections {
    /// Name of the file in the folder of a run.
    pub const FILE: &str = "corrections.toml";

    /// Reads and checks the file. A missing file has no corrections.
    ///
    /// # Errors
    ///
    /// It is not TOML, is of another version, or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            text => text.with_context(|| format!("reading `{}`", path.display()))?,
        };
        Self::of_text(&text).with_context(|| {
            format!(
                "the corrections `{}` are not usable; edit them, or move them away",
                path.display()
            )
        })
    }

    /// Replaces the file atomically.
    pub fn write(&self, path: &Path) -> Result<()> {
        stage::files::write(path, self.to_text().as_bytes())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads corrections from the text of a file.
    ///
    /// # Errors
    ///
    /// As [`Corrections::open`].
    pub fn of_text(text: &str) -> Result<Self> {
        let table: toml::Table = toml::from_str(text)?;
        let version = table.get("format-version").context("`format-version` is missing")?;
        ensure!(
            version.as_integer() == Some(VERSION),
            "`format-version` is {version}, but this program knows {VERSION} only; use a newer program"
        );
        let file: CorrectionsFile = toml::from_str(text)?;
        let mut read = Self::default();
        for ClusterTable { number, name, exemplars } in file.cluster {
            let exemplars = exemplars.iter().map(|text| id_of(text)).collect::<Result<_>>();
            let exemplars =
                exemplars.with_context(|| format!("the exemplars of cluster {number}"))?;
            let cluster = KnownCluster { name, exemplars };
            let before = read.clusters.insert(number, cluster);
            ensure!(before.is_none(), "there are two [[cluster]] of number {number}");
        }
        read.merges = file.merge.into_iter().map(|merge| merge.clusters).collect();
        for PictureTable { id, name, cluster, mark } in file.picture {
            let correction = match (cluster, mark) {
                (Some(number), None) => PictureCorrection::MovedTo(number),
                (None, Some(mark)) => PictureCorrection::Marked(mark),
                _ => {
                    bail!("picture `{}` needs `cluster` or `mark`, and not both", printable(&name))
                }
            };
            let id = id_of(&id).with_context(|| format!("picture `{}`", printable(&name)))?;
            match read.pictures.entry(id) {
                Entry::Vacant(entry) => entry.insert(CorrectedPicture { name, correction }),
                Entry::Occupied(_) => bail!("there are two [[picture]] of id {}", hex(&id)),
            };
        }
        read.check()?;
        Ok(read)
    }

    /// Returns the text of the file.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "# Corrections of clusters by hand. Pictures are known by the SHA-256 of their files.\n\
             format-version = {VERSION}\n"
        );
        let quoted = |word: &str| toml::Value::from(word).to_string();
        for (number, cluster) in &self.clusters {
            let _ = write!(text, "\n[[cluster]]\nnumber = {number}\n");
            if let Some(name) = &cluster.name {
                let _ = writeln!(text, "name = {}", quoted(name));
            }
            let exemplars: String =
                cluster.exemplars.iter().map(|id| format!("    \"{}\",\n", hex(id))).collect();
            let _ = writeln!(text, "exemplars = [\n{exemplars}]");
        }
        for merge in &self.merges {
            let _ = writeln!(text, "\n[[merge]]\nclusters = {merge:?}");
        }
        let mut pictures: Vec<(&Id, &CorrectedPicture)> = self.pictures.iter().collect();
        pictures.sort_by_key(|(_, picture)| &picture.name); // Stable.
        for (id, CorrectedPicture { name, correction }) in pictures {
            let _ = write!(text, "\n[[picture]]\nid = \"{}\"\nname = {}\n", hex(id), quoted(name));
            let _ = match correction {
                PictureCorrection::MovedTo(number) => writeln!(text, "cluster = {number}"),
                PictureCorrection::Marked(mark) => writeln!(text, "mark = \"{}\"", mark.word()),
            };
        }
        text
    }

    /// Fails unless the entries fit together; see the [module](self).
    fn check(&self) -> Result<()> {
        let mut names = BTreeSet::new();
        for (number, KnownCluster { name, exemplars }) in &self.clusters {
            let (count, distinct) = (exemplars.len(), exemplars.iter().collect::<BTreeSet<_>>());
            ensure!(
                (1..=EXEMPLARS).contains(&count) && distinct.len() == count,
                "cluster {number} needs 1 to {EXEMPLARS} different exemplars, by which it is found in a run"
            );
            if let Some(name) = name {
                check_name(name).with_context(|| format!("the name of cluster {number}"))?;
                ensure!(names.insert(name), "two clusters have the name `{name}`");
            }
        }
        let known = |number: &u32, by: &str| -> Result<()> {
            let is_known = self.clusters.contains_key(number);
            ensure!(is_known, "{by} names cluster {number}, which has no [[cluster]]");
            Ok(())
        };
        let mut merged = BTreeSet::new();
        for merge in &self.merges {
            ensure!(merge.len() > 1, "a [[merge]] needs two or more clusters, not {merge:?}");
            for (rank, number) in merge.iter().enumerate() {
                known(number, "a [[merge]]")?;
                ensure!(
                    merged.insert(number),
                    "cluster {number} is in a [[merge]] twice, or in two"
                );
                ensure!(
                    rank == 0 || self.clusters[number].name.is_none(),
                    "cluster {number} is shown as cluster {} and cannot have a name; name that one",
                    merge[0]
                );
            }
        }
        for picture in self.pictures.values() {
            if let PictureCorrection::MovedTo(number) = &picture.correction {
                known(number, &format!("picture `{}`", printable(&picture.name)))?;
            }
        }
        Ok(())
    }

    /// The numbers that are shown as one cluster with `number`: its merge, or itself.
    fn group(&self, number: u32) -> Vec<u32> {
        let merge = self.merges.iter().find(|merge| merge.contains(&number));
        merge.cloned().unwrap_or_else(|| vec![number])
    }

    /// All groups; each cluster is in one.
    fn groups(&self) -> Vec<Vec<u32>> {
        let groups = self.clusters.keys().map(|&number| self.group(number));
        let first_of_own = self.clusters.keys().zip(groups);
        first_of_own
            .filter(|(number, group)| **number == group[0])
            .map(|(_, group)| group)
            .collect()
    }
}

/// Fails unless `name` can be the name of a cluster.
fn check_name(name: &str) -> Result<()> {
    let characters = name.chars().count();
    ensure!(
        (1..=NAME_CHARACTERS).contains(&characters),
        "a name has 1 to {NAME_CHARACTERS} characters, not {characters}"
    );
    ensure!(name.trim() == name, "a name has no spaces around it");
    ensure!(
        printable(name) == name,
        "a name has no control characters and no marks of the direction of writing: `{}`",
        printable(name)
    );
    Ok(())
}

/// Reads an id from 64 hexadecimal digits.
fn id_of(text: &str) -> Result<Id> {
    let is_hex = text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    ensure!(is_hex, "`{}` is not an id of 64 hexadecimal digits", printable(text));
    let mut id = Id::default();
    for (place, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * place..2 * place + 2], 16)?;
    }
    Ok(id)
}
