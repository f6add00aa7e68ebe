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

use std::path::Path;

use anyhow::{Context, Result, ensure};
use stage::container::{self, Column, Container, Floats, Tensor};

use crate::data_set::{DataSet, check_index, check_length};
use crate::images::folder_of;

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
    pub backbone: Floats,
    /// Their projections, `(M, P)`.
    pub projection: Floats,
    /// Embeddings of the views, `(V, M, D)`.
    pub backbone_views: Floats,
}

impl Embeddings {
    /// Writes the file.
    ///
    /// # Errors
    ///
    /// A length contradicts another, a number is not finite, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check(path)?;
        let widths = [self.width, self.projection_width];
        let mut writer = EmbeddingWriter::create_in(folder_of(path), widths, self.views)?;
        writer.push(&self.backbone, &self.projection)?;
        writer.push_views(&self.backbone_views)?;
        writer.finish(path, &self.data_set, &self.index)
    }

    /// Opens and checks the file. It may be larger than memory: its values are read when they are asked for.
    ///
    /// # Errors
    ///
    /// It is missing, foreign, damaged, or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Container::map(path, KIND, VERSION)?;
        let read = Self {
            data_set: DataSet::of(&file)?,
            index: file.u32("index")?,
            width: last_extent(&file, "backbone")?,
            projection_width: last_extent(&file, "projection")?,
            views: file.shape("backbone-views")?.first().copied().unwrap_or(0),
            backbone: file.floats("backbone")?,
            projection: file.floats("projection")?,
            backbone_views: file.floats("backbone-views")?,
        };
        read.check(path)?;
        Ok(read)
    }

    /// A matrix and its width.
    pub fn rows(&self, space: Space) -> (&Floats, usize) {
        match space {
            Space::Backbone => (&self.backbone, self.width),
            Space::Projection => (&self.projection, self.projection_width),
        }
    }

    fn check(&self, path: &Path) -> Result<()> {
        let (m, d) = (self.index.len(), self.width);
        check_index(path, &self.index, self.data_set.images)?;
        check_length(path, "backbone", self.backbone.len(), m * d)?;
        check_length(path, "projection", self.projection.len(), m * self.projection_width)?;
        check_length(path, "backbone-views", self.backbone_views.len(), self.views * m * d)
    }
}

/// A matrix of an embeddings file, of the un-augmented pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Embeddings of the backbone.
    Backbone,
    /// Their projections.
    Projection,
}

/// Writes an embeddings file in the order in which pictures pass through a network, and keeps no embedding in
/// memory.
#[derive(Debug)]
pub struct EmbeddingWriter {
    width: usize,
    projection_width: usize,
    views: usize,
    backbone: Column<f32>,
    projection: Column<f32>,
    backbone_views: Column<f32>,
}

impl EmbeddingWriter {
    /// Keeps values in temporary files in `folder` until [`finish`](EmbeddingWriter::finish).
    ///
    /// - `widths`: D of an embedding, P of a projection.
    /// - `views`: augmented views V of each picture.
    ///
    /// # Errors
    ///
    /// The folder cannot be written into.
    pub fn create_in(folder: &Path, widths: [usize; 2], views: usize) -> Result<Self> {
        let column = || Column::create_in(folder);
        let [width, projection_width] = widths;
        let (backbone, projection, backbone_views) = (column()?, column()?, column()?);
        Ok(Self { width, projection_width, views, backbone, projection, backbone_views })
    }

    /// Adds embeddings of the next un-augmented pictures, and their projections.
    ///
    /// # Errors
    ///
    /// The disk is full.
    pub fn push(&mut self, backbone: &[f32], projection: &[f32]) -> Result<()> {
        self.backbone.push(backbone)?;
        self.projection.push(projection)
    }

    /// Adds embeddings of the next augmented views: all pictures of the first view, then of the second one.
    ///
    /// # Errors
    ///
    /// The disk is full.
    pub fn push_views(&mut self, backbone: &[f32]) -> Result<()> {
        self.backbone_views.push(backbone)
    }

    /// Writes the file `path` about the pictures `index`.
    ///
    /// # Errors
    ///
    /// As [`Embeddings::write`]; a picture or a view was not pushed.
    pub fn finish(mut self, path: &Path, data_set: &DataSet, index: &[u32]) -> Result<()> {
        check_index(path, index, data_set.images)?;
        let (m, d, p, views) = (index.len(), self.width, self.projection_width, self.views);
        let tensors = [
            Tensor::u32("index", &[m], index),
            self.backbone.tensor("backbone", &[m, d])?,
            self.projection.tensor("projection", &[m, p])?,
            self.backbone_views.tensor("backbone-views", &[views, m, d])?,
        ];
        container::write(path, KIND, VERSION, data_set.header(), &tensors)
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
            backbone: vec![1., 2., 3., 4., 5., 6.].into(),
            projection: vec![1., -1., 1.].into(),
            backbone_views: (0u8..12).map(f32::from).collect::<Vec<_>>().into(),
        }
    }

    #[test]
    fn embeddings_are_read_as_written_also_without_views() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("embeddings.safetensors");
        let mut written = example(&path);
        for views in [2, 0] {
            written.views = views;
            written.backbone_views = written.backbone_views[..6 * views].to_vec().into();
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
    fn a_file_written_in_pieces_has_the_bytes_of_one_written_at_once() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (path, other) = (folder.path().join("once"), folder.path().join("in-pieces"));
        let example = example(&path);
        example.write(&path)?;
        let writer = |views| EmbeddingWriter::create_in(folder.path(), [2, 1], views);
        let refused = |writer: EmbeddingWriter| -> String {
            let error = writer.finish(&other, &example.data_set, &example.index);
            format!("{:#}", error.expect_err("refused"))
        };
        let mut pieces = writer(2)?;
        pieces.push(&example.backbone[..4], &example.projection[..2])?;
        pieces.push(&example.backbone[4..], &example.projection[2..])?;
        for view in example.backbone_views.chunks(5) {
            pieces.push_views(view)?;
        }
        pieces.finish(&other, &example.data_set, &example.index)?;
        assert_eq!(std::fs::read(&path)?, std::fs::read(&other)?);

        let mut no_number = writer(0)?;
        no_number.push(&[1., 2., 3., f32::NAN, 5., 6.], &[1.; 3])?;
        let error = refused(no_number);
        assert!(error.contains("value 3 is NaN") && error.contains("backbone"), "{error}");
        // Three embeddings of width 1 are not those of width 2, nor is one view two.
        let mut short = writer(0)?;
        short.push(&[1.; 3], &[1.; 3])?;
        assert!(refused(short).contains("backbone"));
        let mut one_view = writer(2)?;
        one_view.push(&[1.; 6], &[1.; 3])?;
        one_view.push_views(&[1.; 6])?;
        assert!(refused(one_view).contains("backbone-views"));
        Ok(())
    }

    #[test]
    fn a_changed_byte_is_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("embeddings.safetensors");
        example(&path).write(&path).expect("written");
        let mut bytes = std::fs::read(&path).expect("there");
        *bytes.last_mut().expect("a byte") ^= 1;
        std::fs::write(&path, bytes).expect("written");
        let error = Embeddings::open(&path).expect_err("damaged");
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
