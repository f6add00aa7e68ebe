//! Prepare: turns pictures, however they come, into the one form that every stage reads.
//!
//! Reads a [`Source`]: IDX files ([`idx`]), the binary form of CIFAR ([`cifar`]), a
//! folder of JPEG and PNG pictures ([`folder`]), or a tar archive of either ([`archive`]). Writes
//! `images.safetensors`, ordered by content ([`collection`] says why), `names.safetensors`,
//! `labels.safetensors`, and `skipped.json`, which lists what was left out. Their formats are those
//! of crate `data`.
//!
//! No stage links this crate, and it knows none. To add a source, see [`source`]; what an
//! experiment can vary, [`Config`]; the order of things, [`run`].

pub mod archive;
pub mod cifar;
pub mod collection;
#[cfg(test)]
mod example;
pub mod folder;
pub mod idx;
pub mod picture;
mod program;
pub mod source;

use std::path::Path;

use anyhow::{Result, ensure};
use data::images::Identical;
use serde::{Deserialize, Serialize};
use stage::{DONE, files};

pub use program::program;

use crate::collection::Collection;
use crate::source::Source;

/// Raised by hand when the same source and table give other files.
pub const ALGORITHM: u32 = 1;

/// The pictures: what stages are given as `--images`.
pub const IMAGES: &str = "images.safetensors";
/// Where each picture lies in the source.
pub const NAMES: &str = "names.safetensors";
/// The ground truth.
pub const LABELS: &str = "labels.safetensors";
/// What was left out; see [`collection::Skipped`].
pub const SKIPPED: &str = "skipped.json";

/// What preparing can vary: the table `[prepare]` of an experiment. There are no defaults in code.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// File or folder with the pictures; relative to the working directory.
    pub source: String,
    /// How the pictures come.
    pub format: Format,
    /// The classes to keep, in any order; all where none is named.
    pub classes: Vec<String>,
    /// How many pictures each class must have, broken ones counted; 0 for any number.
    pub images_per_class: usize,
    /// Keeps the first by content order, which is a fair sample; 0 keeps all.
    pub images_at_most: usize,
    /// Channels of every picture: 1 grey, 3 colour.
    pub channels: usize,
    /// The largest share of pictures that may be broken; they are skipped and listed.
    pub broken_share: f64,
    /// What to do with pictures whose bytes another one has too.
    pub identical: Identical,
}

/// How pictures come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Whatever the source turns out to be.
    Auto,
    /// IDX files in a folder.
    Idx,
    /// CIFAR-10 or CIFAR-100 in binary form, with 10 or 100 classes.
    Cifar,
    /// CIFAR-100 in binary form, with its 20 superclasses.
    #[serde(rename = "cifar-20")]
    Cifar20,
    /// A folder of pictures.
    Folder,
    /// An archive of pictures.
    Tar,
}

impl Config {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    ///
    /// A value makes no sense; the message names it.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.channels == 1 || self.channels == 3,
            "`channels = {}` in table `[prepare]`: 1 is grey, 3 is colour",
            self.channels
        );
        ensure!(
            (0.0..1.0).contains(&self.broken_share),
            "`broken-share = {}` in table `[prepare]`: a share from 0 up to, not including, 1",
            self.broken_share
        );
        ensure!(
            self.classes.len() != 1,
            "`classes` in table `[prepare]` names one class only; name two at least, or none to \
             keep all"
        );
        let mut sorted: Vec<&String> = self.classes.iter().collect();
        sorted.sort();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            anyhow::bail!("`classes` in table `[prepare]` names `{}` twice", pair[0]);
        }
        Ok(())
    }

    /// Whether a class of the source is kept.
    pub fn keeps(&self, class: &str) -> bool {
        self.classes.is_empty() || self.classes.iter().any(|kept| kept == class)
    }

    /// Checks the numbers of pictures of the classes that are kept.
    ///
    /// # Errors
    ///
    /// A class has another number than the experiment says, or there are no classes.
    pub fn check_images_per_class(&self, counts: &[(&str, usize)]) -> Result<()> {
        let wanted = self.images_per_class;
        if wanted == 0 {
            return Ok(());
        }
        ensure!(
            !counts.is_empty(),
            "`images-per-class = {wanted}` asks for classes, but the source is flat: it has no \
             class folders (ILSVRC-2012's `val` comes like that); name the train folder"
        );
        let wrong: Vec<_> = counts.iter().filter(|(_, count)| *count != wanted).collect();
        let some: Vec<String> =
            wrong.iter().take(4).map(|(class, count)| format!("`{class}` has {count}")).collect();
        ensure!(
            wrong.is_empty(),
            "{} of {} classes do not have the {wanted} pictures that `images-per-class` asks for: \
             {}{}; get the whole data set, or set `images-per-class = 0` to go on with this one, \
             whose scores are then not comparable with published ones",
            wrong.len(),
            counts.len(),
            some.join(", "),
            if wrong.len() > some.len() { ", ..." } else { "" }
        );
        Ok(())
    }
}

/// Checks the table and looks at the source, without reading it all.
///
/// # Errors
///
/// A value makes no sense, or the source is not of its format.
pub fn check(config: &Config, source: &Path) -> Result<Source> {
    config.check()?;
    ensure!(
        !source.as_os_str().is_empty(),
        "no source is named: name where the pictures lie with {}",
        folder::SOURCE
    );
    Source::recognise(source, config)
}

/// Source in, files out. A folder that is finished is left as it is.
///
/// # Errors
///
/// See [`check`] and [`Collection::finish`]. Then nothing is written.
pub fn run(config: &Config, source: &Path, out: &Path) -> Result<()> {
    let done = out.join(DONE);
    if done.exists() {
        tracing::info!("`{}` is finished; remove it to prepare again", out.display());
        return Ok(());
    }
    let found = check(config, source)?;
    tracing::info!("`{}` is {}", source.display(), found.description());
    let mut collection = Collection::new(config, out, found.expected())?;
    files::remove_unfinished(out)?;
    found.read(&mut collection)?;
    let (images, classes) = collection.finish()?;
    tracing::info!("wrote {images} images of {classes} classes to `{}`", out.display());
    let mark = serde_json::json!({ "algorithm": ALGORITHM, "stage": "prepare" });
    files::write(&done, format!("{mark}\n").as_bytes())
}
