//! Prepare: converts pictures from many formats into the files that every stage reads.
//!
//! Finds or downloads the source ([`location`], [`hub`], [`named`]), detects its format
//! ([`source`]) and reads it: IDX files ([`idx`]), the binary forms of CIFAR and STL-10 ([`cifar`],
//! [`stl`]), folders of pictures ([`folder`]), tar and zip archives of any of these ([`archive`]),
//! WebDataset ([`webdataset`]), Parquet ([`parquet_file`]), manifests ([`manifest`]). Writes
//! `images.safetensors`, ordered by content ([`assemble`] says why), `names.safetensors`,
//! `labels.safetensors`, and `skipped.json`, which lists what was skipped. Crate `data` defines
//! their formats.
//!
//! Memory use does not grow with the number of pictures, and an interrupted run can be resumed
//! ([`collection`]). No source is trusted: every size, name and offset that a file states is
//! checked before use ([`picture`]).
//!
//! The readers are our own: those of candle-datasets load a whole data set as f32, four bytes for each
//! byte of a pixel, know no other format, and drop what they cannot read.
//!
//! No stage links this crate, and it knows none. To add a source, see [`source`]; what an
//! experiment can vary, [`Config`]; the order of things, [`run`].

pub mod archive;
pub mod assemble;
pub mod cifar;
pub mod collection;
#[cfg(all(test, unix))]
mod containers;
#[cfg(test)]
mod example;
pub mod folder;
mod foreign;
pub mod fuzz;
mod guard;
#[cfg(test)]
mod hostile;
pub mod idx;
pub mod journal;
pub mod labels;
pub mod location;
pub mod manifest;
pub mod named;
pub mod names;
pub mod packed;
pub mod parquet_file;
mod parquet_pages;
pub mod picture;
mod program;
pub mod repository;
pub mod sorter;
pub mod source;
pub mod stl;
pub mod tar_file;
pub mod webdataset;
pub mod zip_file;

use std::io;
use std::path::Path;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use stage::{DONE, Interrupted, files, finished};

pub use program::program;

use crate::collection::Collection;
use crate::journal::Journal;
use crate::location::Local;
use crate::source::PictureSource;

/// The version of the output: raised when the same source and table give other files.
pub const ALGORITHM: u32 = 4;

/// The file of pictures, which stages receive as `--images`.
pub const IMAGES: &str = "images.safetensors";
/// The file of each picture's path in the source.
pub const NAMES: &str = "names.safetensors";
/// The file of ground truth.
pub const LABELS: &str = "labels.safetensors";
/// The list of skipped files, with reasons; see [`assemble`].
pub const SKIPPED: &str = "skipped.json";

/// Settings: the table `[prepare]` of an experiment. There are no defaults in code.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Where the pictures are: a path relative to the working directory, or an address; see
    /// [`location`].
    pub source: String,
    /// The format of the source.
    pub format: Format,
    /// The classes to keep, in any order; empty keeps all.
    pub classes: Vec<String>,
    /// How many pictures each class must have, including broken ones; 0 allows any number.
    pub images_per_class: usize,
    /// Most pictures to keep: the first in content order, a random sample; 0 keeps all.
    pub images_at_most: usize,
    /// Channels of every picture: 1 grey, 3 colour.
    pub channels: usize,
    /// The largest fraction of pictures that may be broken. Broken ones are skipped and listed.
    pub broken_share: f64,
    /// What to do with pictures that have the same bytes.
    pub identical: Identical,
    /// Longest shorter side, in pixels, at which a picture file is stored. A larger picture is decoded
    /// once and stored at this size, as JPEG of quality 95, so that later steps do not decode 12
    /// megapixels to see 224 × 224; it stays the same picture in every other respect. 0 stores all
    /// files as they are. Sources of arrays, such as CIFAR, are never changed.
    pub stored_shorter_side: usize,
}

/// The format of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Detected from the source.
    Auto,
    /// Photographs: as [`Auto`](Self::Auto), but the pictures of a folder or an archive may lie at any depth. Its
    /// folders count as ground truth only if each picture is directly in the folder of a class.
    Photos,
    /// IDX files in a folder.
    Idx,
    /// CIFAR-10 or CIFAR-100 in binary form, with 10 or 100 classes.
    Cifar,
    /// CIFAR-100 in binary form, with its 20 superclasses.
    #[serde(rename = "cifar-20")]
    Cifar20,
    /// STL-10 in binary form.
    #[serde(rename = "stl-10")]
    Stl10,
    /// A folder of pictures.
    Folder,
    /// A tar archive of pictures, or one archive per class.
    Tar,
    /// A zip file of pictures.
    Zip,
    /// Shards of WebDataset.
    #[serde(rename = "webdataset")]
    WebDataset,
    /// Parquet files that hold pictures or paths of pictures.
    Parquet,
    /// A manifest in CSV.
    Manifest,
}

/// Returns whether the user asked the program to stop.
pub type Interrupt<'a> = &'a (dyn Fn() -> bool + Sync);

/// What to do with pictures that have the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identical {
    /// Keeps all of them, as published counts and scores do: CIFAR and ILSVRC-2012 hold some
    /// duplicates.
    Keep,
    /// Keeps the first: for a collection with many copies of one picture.
    Drop,
}

/// Options that do not change the data set, except that `memory` decides which pictures are too
/// large.
pub struct Options<'a> {
    /// Approximate memory limit in bytes: [`picture::MEMORY`] by default.
    pub memory: u64,
    /// Bytes of pictures per output file: [`data::images::PART_BYTES`] by default.
    pub part_bytes: u64,
    /// Returns whether the user asked to stop.
    pub interrupted: Interrupt<'a>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        let part_bytes = data::images::PART_BYTES;
        Self { memory: picture::MEMORY, part_bytes, interrupted: &|| false }
    }
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Options {{ memory: {}, part_bytes: {} }}", self.memory, self.part_bytes)
    }
}

impl Config {
    /// Checks the ranges of values.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.channels == 1 || self.channels == 3,
            "`channels = {}` in table `[prepare]`: 1 is grey, 3 is colour",
            self.channels
        );
        ensure!(
            (0.0..1.0).contains(&self.broken_share),
            "`broken-share = {}` in table `[prepare]`: it must be at least 0 and less than 1",
            self.broken_share
        );
        ensure!(
            self.classes.len() != 1,
            "`classes` in table `[prepare]` names only one class; name at least two, or none to \
             keep all"
        );
        let mut sorted: Vec<&String> = self.classes.iter().collect();
        sorted.sort();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            anyhow::bail!("`classes` in table `[prepare]` names `{}` twice", pair[0]);
        }
        Ok(())
    }

    /// Whether the experiment keeps a class of the source.
    pub fn keeps(&self, class: &str) -> bool {
        self.classes.is_empty() || self.classes.iter().any(|kept| kept == class)
    }

    /// Whether pictures may lie at any depth: photographs may, unless the experiment asks for classes.
    pub fn allows_any_depth(&self) -> bool {
        let wants_classes = !self.classes.is_empty() || self.images_per_class > 0;
        self.format == Format::Photos && !wants_classes
    }

    /// Checks that each kept class has `images_per_class` pictures.
    ///
    /// # Errors
    ///
    /// A class has another number of pictures, or the source has no classes.
    pub fn check_images_per_class(&self, counts: &[(&str, usize)]) -> Result<()> {
        let wanted = self.images_per_class;
        if wanted == 0 {
            return Ok(());
        }
        ensure!(
            !counts.is_empty(),
            "`images-per-class = {wanted}` asks for classes, but the source is flat: it has no \
             class folders (like ILSVRC-2012's `val`); use the train folder"
        );
        let wrong: Vec<_> = counts.iter().filter(|(_, count)| *count != wanted).collect();
        let some: Vec<String> =
            wrong.iter().take(4).map(|(class, count)| format!("`{class}` has {count}")).collect();
        ensure!(
            wrong.is_empty(),
            "{} of {} classes do not have the {wanted} pictures that `images-per-class` asks for: \
             {}{}; get the whole data set, or set `images-per-class = 0` to continue with this \
             one, whose scores are not comparable with published ones",
            wrong.len(),
            counts.len(),
            some.join(", "),
            if wrong.len() > some.len() { ", ..." } else { "" }
        );
        Ok(())
    }
}

/// Checks the table and recognises the source without reading all of it. Of a source on the
/// network only the address is checked. Returns how many pictures there are, if that is known already.
///
/// # Errors
///
/// A value is out of range, or the source does not have its format.
pub fn check(config: &Config, source: &Path) -> Result<Option<usize>> {
    config.check()?;
    ensure!(
        !source.as_os_str().is_empty(),
        "no source is given: pass the path of the pictures with {}",
        folder::SOURCE
    );
    match location::is_address(source) {
        true => location::check_address(source).map(|()| None),
        false => {
            let found = PictureSource::recognise(&location::find(source, &|| false)?, config)?;
            Ok(Some(found.expected()).filter(|&count| count > 0))
        }
    }
}

/// Prepares `source` into the folder `out`. Leaves a finished folder alone and resumes an
/// interrupted one.
///
/// # Errors
///
/// See [`check`] and [`Collection::finish`]. On error no file is written. The journal is kept if a
/// later run can resume from it.
pub fn run(config: &Config, source: &Path, out: &Path, options: &Options) -> Result<()> {
    if finished::is_finished(out) {
        tracing::info!("`{}` is finished; remove it to prepare again", out.display());
        // A kill just before the end leaves these.
        files::remove_unfinished(out)?;
        Journal::remove(out);
        return Ok(());
    }
    if out.join(DONE).exists() {
        tracing::warn!("`{}` lacks a file that it should have; preparing again", out.display());
        finished::clear(out)?;
    }
    if !location::is_address(source) {
        check(config, source)?;
    }
    config.check()?;
    let local = location::find(source, options.interrupted)?;
    let found = PictureSource::recognise(&local, config)?;
    tracing::info!("`{}` is {}", source.display(), found.description());
    let result = gather(config, options, &local, &found, source, out);
    if result.as_ref().is_err_and(|error| !can_go_on(error)) {
        Journal::remove(out);
    }
    let assembled = result?;
    let assemble::Assembled { images, classes } = assembled;
    let images = stage::console::counted(images, "image");
    let of_classes = match classes {
        0 => String::new(),
        1 => " of 1 class".into(),
        _ => format!(" of {classes} classes"),
    };
    tracing::info!("wrote {images}{of_classes} to `{}`", out.display());
    let digests = finished::Digests::InFiles;
    finished::mark_outputs(out, "prepare", Some(ALGORITHM), digests, is_output)?;
    Journal::remove(out);
    Ok(())
}

/// Whether this program writes a file of this name. Others keep theirs in the same folder: `data` a
/// decoded copy of the pictures, the caller a record of the source.
fn is_output(name: &str) -> bool {
    let is_part = name.starts_with("images-") && name.contains("-of-");
    is_part || [IMAGES, NAMES, LABELS, SKIPPED].contains(&name)
}

fn gather(
    config: &Config,
    options: &Options,
    local: &Local,
    found: &PictureSource,
    source: &Path,
    out: &Path,
) -> Result<assemble::Assembled> {
    // Everything that decides what is read and how it is stored.
    let identity = serde_json::json!({
        "algorithm": ALGORITHM,
        "channels": config.channels,
        "classes": config.classes,
        "format": config.format,
        "memory": options.memory,
        "source": names::path_text(source),
        "state": found.state(),
        "stored-shorter-side": config.stored_shorter_side,
    });
    let identity = identity.to_string();
    let mut collection = Collection::open(config, options, out, &identity, found.expected())?;
    files::remove_unfinished(out)?;
    if !collection.is_whole() {
        found.read(local, config, &mut collection)?;
    }
    collection.finish()
}

/// Whether the same command can resume after this error: the user interrupted, or the disk failed
/// in a way that may be fixed.
fn can_go_on(error: &anyhow::Error) -> bool {
    let may_be_cured = |error: &io::Error| {
        use io::ErrorKind::{InvalidData, InvalidInput, NotFound, Other, UnexpectedEof};
        ![InvalidData, InvalidInput, NotFound, Other, UnexpectedEof].contains(&error.kind())
    };
    error.is::<Interrupted>()
        || error.chain().any(|cause| cause.downcast_ref().is_some_and(may_be_cured))
}
