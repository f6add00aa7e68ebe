//! `embeddings.safetensors`: the target network's outputs for every picture.
//!
//! Kind `embeddings`, format version 1.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `index` | `(M,)` u32 | the pictures, as ascending rows of `images.safetensors`: those of the splits that are scored |
//! | `backbone` | `(M, D)` f32 | embedding of the un-augmented picture |
//! | `projection` | `(M, P)` f32 | its projection, of unit length |
//! | `backbone-views` | `(V, M, D)` f32 | embeddings of `V` augmented views; `V` may be 0 |
//!
//! Header: `images` and `fingerprint` of the whole data set, see [`DataSet`].
//! The pixel baseline has the same form, with flattened thumbnails as both embedding and
//! projection, which then is not of unit length.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use stage::container::{self, Container, Contents, Tensor};

use crate::data_set::{DataSet, check_index, check_length};
use crate::images::map;

const KIND: &str = "embeddings";
const VERSION: u64 = 1;

/// Embeddings of `M` pictures: un-augmented, projected, and of `V` views.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// The data set that the pictures belong to.
    pub data_set: DataSet,
    /// The pictures, as ascending rows of `images.safetensors`, `M`.
    pub index: Vec<u32>,
    /// Width of an embedding, `D`.
    pub width: usize,
    /// Width of a projection, `P`.
    pub projection_width: usize,
    /// Number of augmented views, `V`.
    pub views: usize,
    /// Embeddings of the un-augmented pictures, `(M, D)`.
    pub backbone: Vec<f32>,
    /// Their projections, `(M, P)`.
    pub projection: Vec<f32>,
    /// Embeddings of the views, `(V, M, D)`.
    pub backbone_views: Vec<f32>,
}

impl Embeddings {
    /// Writes the file.
    ///
    /// # Errors
    ///
    /// A length contradicts another, a number is not finite, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check(path)?;
        let (m, d, p, v) = (self.index.len(), self.width, self.projection_width, self.views);
        let tensors = [
            Tensor::u32("index", &[m], &self.index),
            Tensor::f32("backbone", &[m, d], &self.backbone),
            Tensor::f32("projection", &[m, p], &self.projection),
            Tensor::f32("backbone-views", &[v, m, d], &self.backbone_views),
        ];
        container::write(path, KIND, VERSION, self.data_set.header(), &tensors)
    }

    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// It is missing, foreign, damaged, or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Container::open(path, KIND, VERSION)?;
        let read = Self {
            data_set: DataSet::of(&file)?,
            index: file.u32("index")?,
            width: last_extent(&file, "backbone")?,
            projection_width: last_extent(&file, "projection")?,
            views: file.shape("backbone-views")?.first().copied().unwrap_or(0),
            backbone: file.f32("backbone")?,
            projection: file.f32("projection")?,
            backbone_views: file.f32("backbone-views")?,
        };
        read.check(path)?;
        Ok(read)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let (m, d) = (self.index.len(), self.width);
        check_index(path, &self.index, self.data_set.images)?;
        check_length(path, "backbone", self.backbone.len(), m * d)?;
        check_length(path, "projection", self.projection.len(), m * self.projection_width)?;
        check_length(path, "backbone-views", self.backbone_views.len(), self.views * m * d)
    }
}

/// A matrix of an embeddings file that may be larger than memory.
#[derive(Debug)]
pub struct EmbeddingRows {
    map: Mmap,
    /// The offset of its values in the file.
    start: usize,
    rows: usize,
    width: usize,
}

/// A matrix of an embeddings file, of the un-augmented pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Embeddings of the backbone.
    Backbone,
    /// Their projections.
    Projection,
}

impl EmbeddingRows {
    /// Maps and checks the file. Values are read on demand.
    ///
    /// # Errors
    ///
    /// It is missing, foreign, or damaged.
    pub fn open(path: &Path, space: Space) -> Result<Self> {
        let opening = || format!("opening the {KIND} `{}`", path.display());
        let map = map(&File::open(path).with_context(opening)?).with_context(opening)?;
        let contents = Contents::parse(path, &map, KIND, VERSION)?;
        contents.verify(path, &map)?;
        let name = match space {
            Space::Backbone => "backbone",
            Space::Projection => "projection",
        };
        let place = contents.tensors.get(name);
        let matrix = place.and_then(|place| match place.shape[..] {
            [rows, width] if place.bytes.len() == 4 * rows * width => Some((place, rows, width)),
            _ => None,
        });
        let (place, rows, width) = matrix.with_context(|| {
            format!("`{}` has no matrix `{name}` of f32; run its stage again", path.display())
        })?;
        Ok(Self { start: place.bytes.start, rows, width, map })
    }

    /// Number of rows, M.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Width of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Reads some rows, concatenated.
    ///
    /// # Panics
    ///
    /// The range exceeds the number of rows.
    pub fn rows(&self, rows: Range<usize>) -> Vec<f32> {
        assert!(rows.end <= self.rows, "row {} of {}", rows.end, self.rows);
        let bytes =
            self.start + 4 * self.width * rows.start..self.start + 4 * self.width * rows.end;
        let number = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
        self.map[bytes].as_chunks::<4>().0.iter().map(number).collect()
    }
}

/// The last extent of a tensor with at least two.
fn last_extent(file: &Container, name: &str) -> Result<usize> {
    let shape = file.shape(name)?;
    ensure!(
        shape.len() >= 2,
        "tensor `{name}` of `{}` has shape {shape:?}, not rows of numbers; run its stage again",
        file.path().display()
    );
    shape.last().copied().context("a shape of at least two extents has a last one")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(path: &Path) -> Embeddings {
        Embeddings {
            data_set: DataSet { path: path.to_owned(), images: 5, fingerprint: "f".into() },
            index: vec![0, 2, 4],
            width: 2,
            projection_width: 1,
            views: 2,
            backbone: vec![1., 2., 3., 4., 5., 6.],
            projection: vec![1., -1., 1.],
            backbone_views: (0u8..12).map(f32::from).collect(),
        }
    }

    #[test]
    fn embeddings_are_read_as_written_also_without_views() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("embeddings.safetensors");
        let mut written = example(&path);
        for views in [2, 0] {
            written.views = views;
            written.backbone_views.truncate(6 * views);
            written.write(&path).expect("written");
            let read = Embeddings::open(&path).expect("sound");
            assert_eq!(read.index, written.index);
            assert_eq!((read.width, read.projection_width, read.views), (2, 1, views));
            assert_eq!(read.backbone, written.backbone);
            assert_eq!(read.projection, written.projection);
            assert_eq!(read.backbone_views, written.backbone_views);
        }
    }

    #[test]
    fn rows_are_those_of_the_whole_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("embeddings.safetensors");
        let written = example(&path);
        written.write(&path).expect("written");
        let backbone = EmbeddingRows::open(&path, Space::Backbone).expect("sound");
        assert_eq!((backbone.len(), backbone.width(), backbone.is_empty()), (3, 2, false));
        assert_eq!(backbone.rows(1..3), written.backbone[2..]);
        assert!(backbone.rows(3..3).is_empty());
        let projection = EmbeddingRows::open(&path, Space::Projection).expect("sound");
        assert_eq!(projection.rows(0..3), written.projection);
        let mut bytes = std::fs::read(&path).expect("there");
        *bytes.last_mut().expect("a byte") ^= 1;
        std::fs::write(&path, bytes).expect("written");
        let error = EmbeddingRows::open(&path, Space::Backbone).expect_err("damaged");
        assert!(error.to_string().contains("damaged"), "{error}");
    }

    #[test]
    fn contradictions_are_refused() {
        let path = Path::new("embeddings.safetensors");
        example(path).check(path).expect("sound");
        let spoilt: [fn(&mut Embeddings); 5] = [
            |e| e.index[1] = 0,
            |e| e.index[2] = 5,
            |e| e.width = 3,
            |e| e.projection_width = 2,
            |e| e.views = 1,
        ];
        for (case, spoil) in spoilt.iter().enumerate() {
            let mut embeddings = example(path);
            spoil(&mut embeddings);
            assert!(embeddings.check(path).is_err(), "case {case}");
        }
    }
}
