//! The nearest neighbours of every picture, found once with the pretrained backbone.

use anyhow::{Context, Result};
use assignment::nearest_neighbours_on_ranks;
use rand::RngExt;
use serde_json::json;
use stage::Job;
use stage::random::stream;
use training::Checkpoint;

use crate::{Config, StartTable};

/// The nearest neighbours of every picture to train on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Neighbours {
    /// The pictures as rows of the images file, ascending.
    pub(crate) rows: Vec<u32>,
    /// Indices into `rows`, `(N, k)`, nearest first; empty before they are found.
    pub(crate) nearest: Vec<u32>,
    /// Candidates of each picture: `neighbours`, and 1 more with `neighbours-include-self`.
    pub(crate) each: usize,
}

impl Neighbours {
    /// Not found yet.
    pub(crate) fn none(rows: &[u32], config: &Config) -> Self {
        let each = config.neighbours + usize::from(config.neighbours_include_self);
        Self { rows: rows.to_vec(), nearest: Vec::new(), each }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.nearest.is_empty()
    }

    /// Finds them in the unit-length `embeddings` of the pretrained backbone, `(N, D)`.
    pub(crate) fn find(&mut self, config: &Config, embeddings: &[f32], job: &Job) -> Result<()> {
        job.log(&json!({ "backbone": match &config.start {
            StartTable::File { file, .. } => file.display().to_string(),
            StartTable::Stage { .. } | StartTable::Published {} => "role backbone".to_owned(),
        }}))?;
        let (count, k) = (self.rows.len(), config.neighbours);
        let width = embeddings.len() / count;
        let others = nearest_neighbours_on_ranks(embeddings, count, width, k, &job.communicator)?;
        self.nearest = match config.neighbours_include_self {
            true => with_self(&others, k),
            false => others,
        };
        Ok(())
    }

    /// For each picture of each batch, one of its neighbours, all equally likely.
    pub(crate) fn draw(
        &self,
        batches: &[Vec<u32>],
        seed: u64,
        epoch: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let draw = |row: &u32| -> Result<u32> {
            let place = self.rows.binary_search(row).ok().context("a row that is trained on")?;
            let mut random = stream(seed, "neighbours", &[epoch as u64, u64::from(*row)]);
            let chosen = self.nearest[place * self.each + random.random_range(0..self.each)];
            Ok(self.rows[chosen as usize])
        };
        batches.iter().map(|batch| batch.iter().map(draw).collect()).collect()
    }

    /// Saves or loads them, as `stage.neighbours`.
    pub(crate) fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        file.list("neighbours", &mut self.nearest)
    }
}

/// Puts each row before its `k` neighbours, `(N, k + 1)`.
pub(crate) fn with_self(others: &[u32], k: usize) -> Vec<u32> {
    let rows = others.chunks_exact(k).zip(0..);
    rows.flat_map(|(others, row)| [&[row], others].concat()).collect()
}
