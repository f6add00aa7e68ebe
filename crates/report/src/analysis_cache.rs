//! What is computed from the embeddings of a run, kept in a folder for the next page.
//!
//! `A` pictures are analysed, named by *place* as in [`crate::analysis`]; `K` is the number of clusters that the
//! run found. The header of both files has `key`, a digest of everything that the content depends on.
//!
//! `map.safetensors` holds an [`Analysis`]: kind `report-map`, format version 1. `report` and `view` share it.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `places` | `(A,)` u32 | the analysed pictures, ascending |
//! | `map` | `(A, 2)` f32 | their positions |
//! | `neighbours` | `(A, k)` u32 | rows of the nearest others, nearest first |
//! | `outliers` | `(O,)` u32 | places |
//! | `duplicates` | `(P,)` u32 | places of the near-duplicates, group after group |
//! | `duplicate-ends` | `(G,)` u32 | where each group ends |
//! | `duplicate-kinds` | `(G,)` u8 | 1 for a group of exact duplicates |
//! | `duplicate-similarities` | `(G,)` f32 | the lowest cosine that joins each group |
//!
//! Header: `duplicate-similarity`, the limit, as text.
//!
//! `clusters.safetensors` holds a [`ClusterAnalysis`] of the run's own clusters, and how far two halves of the
//! pictures agree: kind `report-clusters`, format version 1. With it `view` starts without reading embeddings.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `second-best` | `(A,)` u32 | index of the second-best cluster; 2³² − 1 where there is none |
//! | `similar` | `(K, s)` u32 | the most similar other clusters, the most similar first |
//!
//! Header: `halves`, see [`trust::between_halves`], as text or null.

use std::cell::OnceCell;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use data::PseudoLabels;
use serde_json::Value;
use stage::console::counted;
use stage::container::{self, Container, Header, Tensor};
use stage::{Claim, Interrupt, digest};

use crate::analysis::{Analysis, ClusterAnalysis, Duplicates, UnitRows};
use crate::trust;

/// Names of the files.
const MAP: &str = "map.safetensors";
const CLUSTERS: &str = "clusters.safetensors";

const VERSION: u64 = 1;

/// Raised when the analysis of the same embeddings gives other results.
const ALGORITHM: u32 = 2;

/// Most similar clusters to keep of each.
const SIMILAR: usize = 8;

/// The embeddings of a run, which are read when something has to be computed from them, and the folder for
/// what was computed.
pub struct AnalysisCache<'a> {
    /// Nothing is kept without one.
    folder: Option<&'a Path>,
    embeddings: &'a Path,
    labels: &'a PseudoLabels,
    rows: OnceCell<UnitRows>,
}

/// What [`AnalysisCache::of_clusters`] gives.
#[derive(Debug, PartialEq)]
pub struct RunClusters {
    /// The analysis of the clusters that the run found.
    pub analysis: ClusterAnalysis,
    /// How far two halves of the pictures agree.
    pub halves: Option<f64>,
}

impl<'a> AnalysisCache<'a> {
    /// A cache of what the `embeddings` say about the pictures of `labels`. The `folder` is created when
    /// something is kept.
    pub fn new(folder: Option<&'a Path>, embeddings: &'a Path, labels: &'a PseudoLabels) -> Self {
        Self { folder, embeddings, labels, rows: OnceCell::new() }
    }

    /// The embeddings of the analysed pictures.
    ///
    /// # Errors
    ///
    /// The embeddings are missing, damaged, or about other pictures.
    pub fn rows(&self) -> Result<&UnitRows> {
        if let Some(rows) = self.rows.get() {
            return Ok(rows);
        }
        let rows = UnitRows::open(self.embeddings, self.labels)?;
        Ok(self.rows.get_or_init(|| rows))
    }

    /// Reads the analysis, or computes and keeps it.
    ///
    /// # Errors
    ///
    /// The embeddings are missing, damaged, or about other pictures, or the program is interrupted. That a file
    /// could not be kept is a warning.
    pub fn of_pictures(&self, interrupt: &Interrupt) -> Result<Analysis> {
        let key = self.key("map", &[&self.labels.index])?;
        self.open_or_compute(MAP, &key, interrupt, || {
            tracing::info!("computing the map of {}", counted(self.labels.index.len(), "picture"));
            Analysis::of(self.rows()?, interrupt)
        })
    }

    /// Reads the analysis of the clusters that the run found, or computes and keeps it.
    ///
    /// # Errors
    ///
    /// See [`Self::of_pictures`].
    pub fn of_clusters(&self, interrupt: &Interrupt) -> Result<RunClusters> {
        let clusters = [self.labels.clusters as u32];
        let labels = [&self.labels.index, &self.labels.assignment, &clusters[..]];
        let key = self.key("clusters", &labels)?;
        self.open_or_compute(CLUSTERS, &key, interrupt, || {
            let (rows, labels) = (self.rows()?, self.labels);
            let mut analysis = ClusterAnalysis::of(rows, &labels.assignment, labels.clusters);
            analysis.similar.iter_mut().for_each(|others| others.truncate(SIMILAR));
            Ok(RunClusters { analysis, halves: trust::between_halves(labels, rows)? })
        })
    }

    fn open_or_compute<T: CacheFile>(
        &self,
        name: &str,
        key: &str,
        interrupt: &Interrupt,
        compute: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let Some(folder) = self.folder else { return compute() };
        let path = folder.join(name);
        // One program computes it; others that want it wait and read it.
        let claim = Claim::wait(folder, interrupt);
        interrupt.check()?;
        if path.exists() {
            match read(&path, key) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => tracing::debug!("the run has changed since `{}`", path.display()),
                Err(error) => tracing::warn!("{error:#}; it is computed again"),
            }
        }
        let computed = compute()?;
        let write = |_: &Claim| {
            fs::create_dir_all(folder)?;
            stage::files::remove_unfinished(folder)?;
            computed.write(&path, Header::from([("key".into(), key.into())]))
        };
        if let Err(error) = claim.as_ref().map_err(|error| anyhow!("{error:#}")).and_then(write) {
            // The page needs the content, not the file: the folder may be read-only.
            tracing::warn!("the next page computes this again: {error:#}");
        }
        Ok(computed)
    }

    /// The digest of everything that a file depends on.
    fn key(&self, what: &str, values: &[&[u32]]) -> Result<String> {
        let header = container::header_text(self.embeddings)?; // Has the digest of the tensors.
        let texts = [what, &header, &self.labels.data_set.fingerprint];
        let mut bytes = ALGORITHM.to_le_bytes().to_vec();
        for part in texts.map(str::as_bytes) {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        }
        for values in values {
            bytes.extend((values.len() as u64).to_le_bytes());
            bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        }
        Ok(digest::sha256(&bytes))
    }
}

/// What a file of the cache holds, and how it is written and read.
trait CacheFile: Sized {
    const KIND: &'static str;

    /// Writes the file, with more entries in its `header`.
    fn write(&self, path: &Path, header: Header) -> Result<()>;

    fn read(file: &Container) -> Result<Self>;
}

/// Reads a file; `None` if it is about other inputs.
fn read<T: CacheFile>(path: &Path, key: &str) -> Result<Option<T>> {
    let file = Container::open(path, T::KIND, VERSION)?;
    if file.header_text("key")? != key {
        return Ok(None);
    }
    let content = T::read(&file).with_context(|| format!("reading `{}`", path.display()))?;
    Ok(Some(content))
}

impl CacheFile for Analysis {
    const KIND: &'static str = "report-map";

    fn write(&self, path: &Path, mut header: Header) -> Result<()> {
        let Self { places, neighbours, each, map, duplicates, outliers, .. } = self;
        let (count, groups) = (places.len(), duplicates.len());
        let in_groups: Vec<u32> =
            duplicates.iter().flat_map(|group| group.places.clone()).collect();
        let mut end = 0;
        let ends = duplicates.iter().map(|group| {
            end += group.places.len() as u32;
            end
        });
        let ends: Vec<u32> = ends.collect();
        let kinds: Vec<u8> = duplicates.iter().map(|group| u8::from(group.is_exact)).collect();
        let similarities: Vec<f32> = duplicates.iter().map(|group| group.similarity).collect();
        let map: Vec<f32> = map.iter().flatten().copied().collect();
        header.insert("duplicate-similarity".into(), text(self.duplicate_similarity));
        let tensors = [
            Tensor::u32("places", &[count], places),
            Tensor::f32("map", &[count, 2], &map),
            Tensor::u32("neighbours", &[count, *each], neighbours),
            Tensor::u32("outliers", &[outliers.len()], outliers),
            Tensor::u32("duplicates", &[in_groups.len()], &in_groups),
            Tensor::u32("duplicate-ends", &[groups], &ends),
            Tensor::u8("duplicate-kinds", &[groups], &kinds),
            Tensor::f32("duplicate-similarities", &[groups], &similarities),
        ];
        container::write(path, Self::KIND, VERSION, header, &tensors)
    }

    fn read(file: &Container) -> Result<Self> {
        let map = file.f32("map")?;
        let found = Self {
            places: file.u32("places")?,
            neighbours: file.u32("neighbours")?,
            each: file.shape("neighbours")?.get(1).copied().unwrap_or(0),
            map: map.chunks(2).map(|at| [at[0], at[1]]).collect(),
            duplicates: duplicates(file)?,
            duplicate_similarity: number(file.header("duplicate-similarity")?)
                .context("the limit of near-duplicates")?,
            outliers: file.u32("outliers")?,
        };
        let count = found.places.len();
        ensure!(
            found.map.len() == count && found.neighbours.len() == count * found.each,
            "its tensors have different numbers of pictures"
        );
        Ok(found)
    }
}

impl CacheFile for RunClusters {
    const KIND: &'static str = "report-clusters";

    fn write(&self, path: &Path, mut header: Header) -> Result<()> {
        let ClusterAnalysis { similar, second_best } = &self.analysis;
        let each = similar.first().map_or(0, Vec::len);
        header.insert("halves".into(), self.halves.map_or(Value::Null, text));
        let all = similar.concat();
        let tensors = [
            Tensor::u32("second-best", &[second_best.len()], second_best),
            Tensor::u32("similar", &[similar.len(), each], &all),
        ];
        container::write(path, Self::KIND, VERSION, header, &tensors)
    }

    fn read(file: &Container) -> Result<Self> {
        let shape = file.shape("similar")?;
        let [clusters, each] = shape[..] else { bail!("`similar` is no matrix") };
        let similar = file.u32("similar")?;
        let similar = (0..clusters).map(|k| similar[k * each..][..each].to_vec());
        let (similar, second_best) = (similar.collect(), file.u32("second-best")?);
        let halves = number(file.header("halves")?);
        Ok(Self { analysis: ClusterAnalysis { similar, second_best }, halves })
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
        let similarity = similarities[g];
        Ok(Duplicates { places: places.to_vec(), similarity, is_exact: kinds[g] == 1 })
    };
    ensure!(kinds.len() == ends.len() && similarities.len() == ends.len(), "groups differ");
    ends.iter().enumerate().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::browser_tests::inputs;

    #[test]
    fn an_analysis_is_read_as_it_was_computed_and_computed_again_for_other_inputs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let files = inputs(folder.path())?.run;
        let mut embeddings = data::Embeddings::open(&files.embeddings.context("embeddings")?)?;
        let mut rows = embeddings.backbone.to_vec();
        rows.copy_within(..embeddings.width, embeddings.width); // A duplicate.
        embeddings.backbone = rows.into();
        let changed = folder.path().join("with-a-duplicate");
        embeddings.write(&changed)?;
        let embeddings = changed;
        let labels = PseudoLabels::open(&files.pseudo_labels)?;
        let kept = folder.path().join("kept");
        let (nobody, stop) = (Interrupt::default(), Interrupt::default());
        stop.raise(); // One that is interrupted cannot compute the map.
        let cache = |labels| AnalysisCache::new(Some(&kept), &embeddings, labels);
        assert!(cache(&labels).of_pictures(&stop).is_err());
        let computed = cache(&labels).of_pictures(&nobody)?;
        assert!(!computed.duplicates.is_empty() && !computed.outliers.is_empty());
        assert_eq!(cache(&labels).of_pictures(&nobody)?, computed);
        let clusters = cache(&labels).of_clusters(&nobody)?;
        assert!(clusters.halves.is_some());
        // Both are read, and the embeddings are not.
        let read = cache(&labels);
        assert_eq!(read.of_clusters(&nobody)?, clusters);
        assert_eq!(read.of_pictures(&nobody)?, computed);
        assert!(read.rows.get().is_none());
        // Other clusters of the same pictures have the same map.
        let mut others = labels.clone();
        others.assignment.rotate_left(1);
        let changed = cache(&others);
        changed.of_pictures(&nobody)?;
        assert!(changed.rows.get().is_none());
        assert_ne!(
            changed.of_clusters(&nobody)?.analysis.second_best,
            clusters.analysis.second_best
        );
        // What is damaged is computed again, and so is what could not be kept.
        for name in [MAP, CLUSTERS] {
            fs::write(kept.join(name), "no analysis")?;
        }
        assert_eq!(cache(&labels).of_pictures(&nobody)?, computed);
        cache(&labels).of_clusters(&nobody)?;
        let no_folder = AnalysisCache::new(Some(&files.images), &embeddings, &labels);
        assert_eq!(no_folder.of_pictures(&nobody)?, computed);
        assert!(super::read::<RunClusters>(&kept.join(CLUSTERS), "another key")?.is_none());
        Ok(())
    }

    #[test]
    fn nothing_is_kept_without_a_folder() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let files = inputs(folder.path())?.run;
        let embeddings = files.embeddings.context("embeddings")?;
        let labels = PseudoLabels::open(&files.pseudo_labels)?;
        let before = fs::read_dir(folder.path())?.count();
        AnalysisCache::new(None, &embeddings, &labels).of_pictures(&Interrupt::default())?;
        assert_eq!(fs::read_dir(folder.path())?.count(), before);
        Ok(())
    }
}
