//! Embeddings of an interrupted run, or of an earlier run of the same network on other pictures, which
//! need not be computed again.
//!
//! An embedding depends on its picture as it is stored, the network and the arithmetic alone, so a copy has
//! the same bits. Kept in `state.safetensors`, and until all pictures are embedded in parts, `known-1.safetensors`
//! and so on, one for each time that something was saved. All are of kind `known-embeddings`, format version 1:
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `id` | `(M, 32)` u8 | the pictures, by the SHA-256 of their stored bytes |
//! | `backbone` | `(M, D)` f32 | their embeddings |
//!
//! Header: `network`, a digest of everything but the picture; see [`identity`].
//!
//! The files are mapped: only ids and the places of embeddings are in memory.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use data::images::Id;
use serde_json::json;
use stage::container::{self, Column, Container, Floats, Header, Tensor};
use stage::digest::{sha256, sha256_of_file};
use stage::{Job, Stage, files};
use training::Precision;

use crate::Embed;

const FILE: &str = "state.safetensors";
/// The names of parts begin with this; their number follows.
const PART: &str = "known-";
const KIND: &str = "known-embeddings";
const VERSION: u64 = 1;

/// A digest of everything but the picture that an embedding depends on: the network's files, precision,
/// device, kernels and the version of the algorithm.
pub fn identity(network: &Path, precision: Precision, device: &str) -> Result<String> {
    let kernels = layers::Variant::selected().map_err(anyhow::Error::msg)?;
    let parts = json!({
        "algorithm": Embed::SPEC.algorithm,
        "network": sha256_of_file(&network.join("network.safetensors"))?,
        "configuration": sha256_of_file(&network.join(backbone::CONFIGURATION))?,
        "precision": precision,
        "device": device,
        "kernels": kernels.name(),
    });
    Ok(sha256(parts.to_string().as_bytes()))
}

/// Embeddings by picture.
#[derive(Debug)]
pub struct KnownEmbeddings {
    identity: String,
    width: usize,
    /// For each picture, the part that holds its embedding, and the row of it. Embeddings that are not saved yet are the
    /// last part.
    places: HashMap<Id, (usize, usize)>,
    /// The pictures in the order of their embeddings.
    ids: Vec<Id>,
    /// The mapped files.
    parts: Vec<Floats>,
    /// Embeddings that are not saved yet.
    unsaved: Vec<f32>,
}

impl KnownEmbeddings {
    /// Finds the embeddings in the folder of the role `earlier`, and those of an interrupted run in the job's folder, unless
    /// they are of another network. A damaged file is reported and skipped.
    ///
    /// # Errors
    ///
    /// The job's folder cannot be read.
    pub fn of_job(job: &Job, identity: String, width: usize) -> Result<Self> {
        let mut known = Self {
            identity,
            width,
            places: HashMap::new(),
            ids: Vec::new(),
            parts: Vec::new(),
            unsaved: Vec::new(),
        };
        let earlier = job.optional_input("earlier").map(|folder| folder.join(FILE));
        let own = parts_in(&job.out)?.into_iter().map(|(_, path)| path);
        for path in earlier.into_iter().chain([job.out.join(FILE)]).chain(own) {
            if path.exists()
                && let Err(error) = known.add_from(&path)
            {
                tracing::warn!("computing embeddings again: {error:#}");
            }
        }
        Ok(known)
    }

    fn add_from(&mut self, path: &Path) -> Result<()> {
        let file = Container::map(path, KIND, VERSION)?;
        if file.header_text("network")? != self.identity {
            return Ok(());
        }
        let (ids, values) = (file.u8("id")?, file.floats("backbone")?);
        let count = ids.len() / size_of::<Id>();
        ensure!(
            values.len() == count * self.width && ids.len() == count * size_of::<Id>(),
            "`{}` has {} numbers for {count} embeddings of width {}",
            path.display(),
            values.len(),
            self.width
        );
        let (ids, _) = ids.as_chunks::<{ size_of::<Id>() }>();
        for (row, &id) in ids.iter().enumerate() {
            self.note(id, row);
        }
        self.parts.push(values);
        Ok(())
    }

    /// Records that the embedding of a picture is in this row of the next part. Returns whether the picture is new.
    fn note(&mut self, id: Id, row: usize) -> bool {
        let place = (self.parts.len(), row);
        let is_new = *self.places.entry(id).or_insert(place) == place;
        if is_new {
            self.ids.push(id);
        }
        is_new
    }

    /// The digest of what the embeddings depend on besides their picture.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The embedding of a picture, if it is known.
    pub fn get(&self, id: &Id) -> Option<&[f32]> {
        let (part, row) = *self.places.get(id)?;
        let values = self.parts.get(part).map_or(&*self.unsaved, |part| part);
        values.get(row * self.width..(row + 1) * self.width)
    }

    /// Adds the embedding of a picture.
    pub fn insert(&mut self, id: Id, embedding: &[f32]) {
        if self.note(id, self.unsaved.len() / self.width) {
            self.unsaved.extend_from_slice(embedding);
        }
    }

    /// Saves what was added since the last time, as a part of its own.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn save(&mut self, job: &Job) -> Result<()> {
        let count = self.unsaved.len() / self.width;
        if count == 0 {
            return Ok(());
        }
        let last = parts_in(&job.out)?.last().map_or(0, |(number, _)| *number);
        let path = job.out.join(format!("{PART}{}.safetensors", last + 1));
        let ids = self.ids[self.ids.len() - count..].as_flattened();
        let backbone = Tensor::f32("backbone", &[count, self.width], &self.unsaved);
        self.write(&path, Tensor::u8("id", &[count, size_of::<Id>()], ids), backbone)?;
        self.parts.push(Container::map(&path, KIND, VERSION)?.floats("backbone")?);
        self.unsaved.clear();
        Ok(())
    }

    /// Gathers all embeddings in one file, for later runs, and removes the parts.
    ///
    /// # Errors
    ///
    /// It cannot be written, or the parts cannot be removed.
    pub fn finish(mut self, job: &Job) -> Result<Self> {
        let count = self.ids.len();
        let mut backbone = Column::create_in(&job.out)?;
        for id in &self.ids {
            backbone.push(self.get(id).context("a row for each picture")?)?;
        }
        // Some systems do not replace a mapped file.
        (self.parts, self.unsaved) = (vec![], vec![]);
        let ids = Tensor::u8("id", &[count, size_of::<Id>()], self.ids.as_flattened());
        let path = job.out.join(FILE);
        self.write(&path, ids, backbone.tensor("backbone", &[count, self.width])?)?;
        for (_, part) in parts_in(&job.out)? {
            files::remove_if_there(&part)?;
        }
        (self.places, self.ids) = (HashMap::new(), vec![]);
        self.add_from(&path)?;
        Ok(self)
    }

    fn write(&self, path: &Path, ids: Tensor, backbone: Tensor) -> Result<()> {
        let header = Header::from([("network".into(), self.identity.clone().into())]);
        container::write(path, KIND, VERSION, header, &[ids, backbone])
    }
}

/// The parts in a folder, by their numbers.
fn parts_in(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let reading = || format!("reading `{}`", folder.display());
    let mut parts = vec![];
    for entry in fs::read_dir(folder).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix(PART).and_then(|rest| rest.strip_suffix(".safetensors"));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            parts.push((number, path));
        }
    }
    parts.sort();
    Ok(parts)
}
