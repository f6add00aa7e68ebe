//! Embeddings of an interrupted run, or of an earlier run of the same network on other pictures, which
//! need not be computed again.
//!
//! An embedding depends on its picture as it is stored, the network and the arithmetic alone, so a copy has
//! the same bits. Kept in `state.safetensors`, kind `known-embeddings`, format
//! version 1:
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `id` | `(M, 32)` u8 | the pictures, by the SHA-256 of their stored bytes |
//! | `backbone` | `(M, D)` f32 | their embeddings |
//!
//! Header: `network`, a digest of everything but the picture; see [`identity`].

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use data::images::Id;
use serde_json::json;
use stage::Job;
use stage::container::{self, Container, Header, Tensor};
use stage::digest::{sha256, sha256_of_file};
use training::Precision;

const FILE: &str = "state.safetensors";
const KIND: &str = "known-embeddings";
const VERSION: u64 = 1;

/// A digest of everything but the picture that an embedding depends on: the network's files, precision,
/// device and kernels.
pub fn identity(network: &Path, precision: Precision, device: &str) -> Result<String> {
    let kernels = layers::Variant::selected().map_err(anyhow::Error::msg)?;
    let parts = json!({
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
    /// The position of each picture's embedding among the rows of `values`.
    places: HashMap<Id, usize>,
    /// The pictures in the order of their embeddings.
    ids: Vec<Id>,
    values: Vec<f32>,
}

impl KnownEmbeddings {
    /// Loads the embeddings of an interrupted run in the job's folder, and those in the folder of the role
    /// `earlier`, unless they are of another network. A damaged file is reported and skipped.
    pub fn of_job(job: &Job, identity: String, width: usize) -> Self {
        let mut known =
            Self { identity, width, places: HashMap::new(), ids: Vec::new(), values: Vec::new() };
        let folders = [Some(job.out.as_path()), job.optional_input("earlier")];
        for path in folders.into_iter().flatten().map(|folder| folder.join(FILE)) {
            if path.exists()
                && let Err(error) = known.add_from(&path)
            {
                tracing::warn!("computing embeddings again: {error:#}");
            }
        }
        known
    }

    fn add_from(&mut self, path: &Path) -> Result<()> {
        let file = Container::open(path, KIND, VERSION)?;
        if file.header_text("network")? != self.identity {
            return Ok(());
        }
        let (ids, values) = (file.u8("id")?, file.f32("backbone")?);
        let count = ids.len() / size_of::<Id>();
        ensure!(
            values.len() == count * self.width && ids.len() == count * size_of::<Id>(),
            "`{}` has {} numbers for {count} embeddings of width {}",
            path.display(),
            values.len(),
            self.width
        );
        for (id, row) in ids.chunks_exact(size_of::<Id>()).zip(values.chunks_exact(self.width)) {
            self.insert(id.try_into().context("an id of 32 bytes")?, row);
        }
        Ok(())
    }

    /// The digest of what the embeddings depend on besides their picture.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The embedding of a picture, if it is known.
    pub fn get(&self, id: &Id) -> Option<&[f32]> {
        let place = *self.places.get(id)?;
        self.values.get(place * self.width..(place + 1) * self.width)
    }

    /// Adds the embedding of a picture.
    pub fn insert(&mut self, id: Id, embedding: &[f32]) {
        if !self.places.contains_key(&id) {
            self.places.insert(id, self.ids.len());
            self.ids.push(id);
            self.values.extend_from_slice(embedding);
        }
    }

    /// Saves the embeddings for later runs. Of several ranks, the first one does.
    pub fn save(&self, job: &Job) -> Result<()> {
        if !job.communicator.is_first() {
            return Ok(());
        }
        let (count, ids) = (self.ids.len(), self.ids.as_flattened());
        let tensors = [
            Tensor::u8("id", &[count, size_of::<Id>()], ids),
            Tensor::f32("backbone", &[count, self.width], &self.values),
        ];
        let header = Header::from([("network".into(), self.identity.clone().into())]);
        container::write(&job.out.join(FILE), KIND, VERSION, header, &tensors)
    }
}
