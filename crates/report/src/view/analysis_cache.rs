//! `map.safetensors`: the analysis of a run, cached so that the next `assort view` starts at once.
//!
//! Kind `report-analysis`, format version 1. `A` pictures are analysed, named by *place* as in
//! [`crate::analysis`]; `K` is the number of clusters that the run found.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `places` | `(A,)` u32 | the analysed pictures, ascending |
//! | `map` | `(A, 2)` f32 | their positions |
//! | `neighbours` | `(A, k)` u32 | rows of the nearest others, nearest first |
//! | `second-best` | `(A,)` u32 | index of the second-best cluster; 2³² − 1 where there is none |
//! | `similar` | `(K, s)` u32 | the most similar other clusters, the most similar first |
//! | `outliers` | `(O,)` u32 | places |
//! | `duplicates` | `(P,)` u32 | places of the near-duplicates, group after group |
//! | `duplicate-ends` | `(G,)` u32 | where each group ends |
//! | `duplicate-kinds` | `(G,)` u8 | 1 for a group of exact duplicates |
//! | `duplicate-similarities` | `(G,)` f32 | the lowest cosine that joins each group |
//!
//! Header: `key`, a digest of everything that the analysis depends on; `duplicate-similarity`, the limit, and
//! `halves`, how far two halves of the pictures agree (see [`trust::between_halves`]), or null: numbers as text.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use data::PseudoLabels;
use serde_json::Value;
use stage::container::{self, Container, Header, Tensor};
use stage::{Interrupt, digest};

use crate::analysis::{Analysis, Duplicates, UnitRows};
use crate::trust;

/// Name of the file in the folder of a report.
pub const CACHE: &str = "map.safetensors";

const KIND: &str = "report-analysis";
const VERSION: u64 = 1;

/// Raised when the analysis of the same files gives other results.
const ALGORITHM: u32 = 1;

/// Most similar clusters to keep of each.
const SIMILAR: usize = 8;

/// An analysis without the embeddings that it was made of.
#[derive(Debug)]
pub struct CachedAnalysis {
    /// The analysis; its rows have places and no values.
    pub analysis: Analysis,
    /// Index of the second-best cluster of each analysed picture, by row; `u32::MAX` where there is none.
    pub second_best: Vec<u32>,
    /// How far two halves of the pictures agree.
    pub halves: Option<f64>,
}

impl CachedAnalysis {
    /// Reads the analysis from `path`, or makes it and writes it there.
    ///
    /// # Errors
    ///
    /// The embeddings are missing or damaged, the file cannot be written, or the program is interrupted.
    pub fn open_or_compute(
        path: &Path,
        embeddings: &Path,
        labels: &PseudoLabels,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let key = key(embeddings, labels)?;
        if path.exists() {
            match Self::read(path, &key) {
                Ok(Some(cached)) => return Ok(cached),
                Ok(None) => tracing::info!("the run has changed since `{}`", path.display()),
                Err(error) => tracing::warn!("{error:#}; it is made again"),
            }
        }
        tracing::info!(
            "computing the map of {} pictures, once; later starts read it from `{}`",
            labels.index.len(),
            path.display()
        );
        let cached = Self::compute(embeddings, labels, interrupt)?;
        cached.write(path, &key)?;
        Ok(cached)
    }

    fn compute(embeddings: &Path, labels: &PseudoLabels, interrupt: &Interrupt) -> Result<Self> {
        let rows = UnitRows::open(embeddings, labels)?;
        let mut analysis = Analysis::of(rows, &labels.assignment, labels.clusters, interrupt)?;
        let halves = trust::between_halves(labels, &analysis.rows)?;
        let second_best = analysis.second_best_of_all(&labels.assignment);
        analysis.rows.values = Vec::new();
        analysis.similar_clusters.iter_mut().for_each(|others| others.truncate(SIMILAR));
        Ok(Self { analysis, second_best, halves })
    }

    fn write(&self, path: &Path, key: &str) -> Result<()> {
        let Analysis { rows, neighbours, each, map, duplicates, outliers, .. } = &self.analysis;
        let count = rows.places.len();
        let groups = duplicates.len();
        let places: Vec<u32> = duplicates.iter().flat_map(|group| group.places.clone()).collect();
        let mut end = 0;
        let ends = duplicates.iter().map(|group| {
            end += group.places.len() as u32;
            end
        });
        let ends: Vec<u32> = ends.collect();
        let kinds: Vec<u8> = duplicates.iter().map(|group| u8::from(group.is_exact)).collect();
        let similarities: Vec<f32> =
            duplicates.iter().map(|group| group.similarity as f32).collect();
        let similar = &self.analysis.similar_clusters;
        let each_similar = similar.first().map_or(0, Vec::len);
        let all_similar = similar.concat();
        let map: Vec<f32> = map.iter().flatten().copied().collect();
        let header = Header::from([
            ("key".into(), key.into()),
            ("duplicate-similarity".into(), text(self.analysis.duplicate_similarity)),
            ("halves".into(), self.halves.map_or(Value::Null, text)),
        ]);
        let tensors = [
            Tensor::u32("places", &[count], &rows.places),
            Tensor::f32("map", &[count, 2], &map),
            Tensor::u32("neighbours", &[count, *each], neighbours),
            Tensor::u32("second-best", &[count], &self.second_best),
            Tensor::u32("similar", &[similar.len(), each_similar], &all_similar),
            Tensor::u32("outliers", &[outliers.len()], outliers),
            Tensor::u32("duplicates", &[places.len()], &places),
            Tensor::u32("duplicate-ends", &[groups], &ends),
            Tensor::u8("duplicate-kinds", &[groups], &kinds),
            Tensor::f32("duplicate-similarities", &[groups], &similarities),
        ];
        container::write(path, KIND, VERSION, header, &tensors)
    }

    /// Reads the file; `None` if it is about other inputs.
    fn read(path: &Path, key: &str) -> Result<Option<Self>> {
        let file = Container::open(path, KIND, VERSION)?;
        if file.header_text("key")? != key {
            return Ok(None);
        }
        let places = file.u32("places")?;
        let each = file.shape("neighbours")?.get(1).copied().unwrap_or(0);
        let each_similar = file.shape("similar")?.get(1).copied().unwrap_or(0);
        let clusters = file.shape("similar")?.first().copied().unwrap_or(0);
        let similar = file.u32("similar")?;
        let similar = (0..clusters).map(|k| similar[k * each_similar..][..each_similar].to_vec());
        let map = file.f32("map")?;
        let cached = Self {
            analysis: Analysis {
                neighbours: file.u32("neighbours")?,
                each,
                map: map.chunks(2).map(|at| [at[0], at[1]]).collect(),
                duplicates: duplicates(&file)?,
                duplicate_similarity: number(file.header("duplicate-similarity")?)
                    .context("the limit of near-duplicates")?,
                outliers: file.u32("outliers")?,
                means: Vec::new(),
                similar_clusters: similar.collect(),
                rows: UnitRows { places, values: Vec::new(), width: 0 },
            },
            second_best: file.u32("second-best")?,
            halves: number(file.header("halves")?),
        };
        let count = cached.analysis.rows.places.len();
        ensure!(
            cached.analysis.map.len() == count && cached.second_best.len() == count,
            "`{}` contradicts itself",
            path.display()
        );
        Ok(Some(cached))
    }
}

/// A number as text, from which [`number`] reads the same bits.
fn text(number: f64) -> Value {
    number.to_string().into()
}

fn number(value: &Value) -> Option<f64> {
    value.as_str()?.parse().ok()
}

fn duplicates(file: &Container) -> Result<Vec<Duplicates>> {
    let (places, ends) = (file.u32("duplicates")?, file.u32("duplicate-ends")?);
    let (kinds, similarities) = (file.u8("duplicate-kinds")?, file.f32("duplicate-similarities")?);
    let mut start = 0;
    let group = |(g, &end): (usize, &u32)| {
        let end = end as usize;
        let places = places.get(start..end).context("a group ends beyond the last place")?;
        start = end;
        let similarity = similarities[g].into();
        Ok(Duplicates { places: places.to_vec(), similarity, is_exact: kinds[g] == 1 })
    };
    ensure!(kinds.len() == ends.len() && similarities.len() == ends.len(), "groups differ");
    ends.iter().enumerate().map(group).collect()
}

/// The digest of everything that the analysis depends on.
fn key(embeddings: &Path, labels: &PseudoLabels) -> Result<String> {
    let mut bytes = ALGORITHM.to_le_bytes().to_vec();
    bytes.extend(container::header_text(embeddings)?.as_bytes()); // Has the digest of the tensors.
    bytes.extend(labels.data_set.fingerprint.as_bytes());
    bytes.extend((labels.clusters as u64).to_le_bytes());
    for values in [&labels.index, &labels.assignment] {
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(digest::sha256(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::browser::inputs;

    #[test]
    fn an_analysis_is_read_as_it_was_made_and_made_again_for_other_inputs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let files = inputs(folder.path())?.run;
        let embeddings = files.embeddings.context("embeddings")?;
        let mut labels = PseudoLabels::open(&files.pseudo_labels)?;
        let (path, nobody) = (folder.path().join(CACHE), Interrupt::default());
        let made = CachedAnalysis::open_or_compute(&path, &embeddings, &labels, &nobody)?;
        // One that is interrupted cannot make it.
        let stop = Interrupt::default();
        stop.raise();
        let read = CachedAnalysis::open_or_compute(&path, &embeddings, &labels, &stop)?;
        assert_eq!(read.analysis.map, made.analysis.map);
        assert_eq!(read.analysis.neighbours, made.analysis.neighbours);
        assert_eq!(read.analysis.similar_clusters, made.analysis.similar_clusters);
        assert_eq!(read.analysis.outliers, made.analysis.outliers);
        let (groups, again) = (&made.analysis.duplicates, &read.analysis.duplicates);
        assert_eq!(groups.len(), again.len());
        assert!(groups.iter().zip(again).all(|(a, b)| a.places == b.places));
        assert_eq!((read.second_best, read.halves), (made.second_best, made.halves));
        // Changed clusters, or a damaged file: it is made again.
        labels.assignment.rotate_left(1);
        assert!(CachedAnalysis::open_or_compute(&path, &embeddings, &labels, &stop).is_err());
        std::fs::write(&path, "no analysis")?;
        CachedAnalysis::open_or_compute(&path, &embeddings, &labels, &nobody)?;
        CachedAnalysis::open_or_compute(&path, &embeddings, &labels, &stop)?;
        Ok(())
    }
}
