//! `head.safetensors`: what tells an embedding's cluster, for pictures that come later.
//!
//! Kind `head`, format version 1. Header: `clusters`, K; `form`, one of
//!
//! - `network`: the clustering network. Tensors `hidden.weight (H, D)`, `hidden.bias (H,)`,
//!   `output.weight (K, H)`, `output.bias (K,)`, all f32. Takes `backbone` rows of the embeddings,
//!   scaled to length `√D`; ReLU lies between its layers.
//! - `centres`: tensor `centres (K, P)` f32. Takes `projection` rows; the cluster is that of the
//!   nearest centre by the header's `metric`, `spherical` or `euclidean`. Written by ProPos, SeCu
//!   and ICBPL, whose projection is its head's output, and by clustering where no network is
//!   trained.
//! - `classifier`: IMC-SwAV's. Tensors `hidden1`, `norm1`, `hidden2`, `norm2`, `output` with
//!   `.weight` and `.bias`, the norms with `.running_mean` and `.running_var` too, all f32. Takes
//!   `backbone` rows as they are: linear, batch norm, ReLU; the same again; linear.
//!
//! Output `k` of each is cluster `k` of the `pseudo-labels.safetensors` beside it.

use std::path::Path;

use anyhow::{Context, Result};
use stage::container::{self, Container, Header, Tensor};

const KIND: &str = "head";
const VERSION: u64 = 1;

/// File name of a head inside its stage's folder.
pub const FILE: &str = "head.safetensors";

/// Writes a head of one of the forms without a metric into `folder`.
///
/// # Errors
///
/// A value is not finite, or the file system refuses.
pub fn write(folder: &Path, clusters: usize, form: &str, tensors: &[Tensor]) -> Result<()> {
    let header =
        [("clusters".to_owned(), clusters.into()), ("form".to_owned(), form.to_owned().into())];
    write_with(folder, Header::from(header), tensors)
}

/// Writes centres, `(K, P)` row by row, that are compared by `metric`.
///
/// # Errors
///
/// A value is not finite, or the file system refuses.
pub fn write_centres(folder: &Path, centres: &[f32], clusters: usize, metric: &str) -> Result<()> {
    let header = [
        ("clusters".to_owned(), clusters.into()),
        ("form".to_owned(), "centres".into()),
        ("metric".to_owned(), metric.to_owned().into()),
    ];
    let shape = [clusters, centres.len() / clusters];
    write_with(folder, Header::from(header), &[Tensor::f32("centres", &shape, centres)])
}

fn write_with(folder: &Path, header: Header, tensors: &[Tensor]) -> Result<()> {
    container::write(&folder.join(FILE), KIND, VERSION, header, tensors).context("writing the head")
}

/// Opens and checks the head in `folder`.
///
/// # Errors
///
/// The file is missing, foreign or damaged.
pub fn open(folder: &Path) -> Result<Container> {
    Container::open(&folder.join(FILE), KIND, VERSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_as_written() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let values = [1., 0., 0.5, -0.5, 0.25, 3.];
        write_centres(folder.path(), &values, 2, "spherical")?;
        let file = open(folder.path())?;
        assert_eq!(file.header_number("clusters")?, 2);
        assert_eq!(
            (file.header_text("form")?, file.header_text("metric")?),
            ("centres", "spherical")
        );
        assert_eq!((file.shape("centres")?, file.f32("centres")?), (&[2, 3][..], values.to_vec()));

        let bias = [Tensor::f32("output.bias", &[6], &values)];
        write(folder.path(), 6, "classifier", &bias)?;
        let file = open(folder.path())?;
        assert_eq!(
            (file.header_text("form")?, file.f32("output.bias")?),
            ("classifier", values.to_vec())
        );
        let message = write_centres(folder.path(), &[f32::NAN, 1.], 2, "spherical");
        assert!(format!("{:#}", message.expect_err("not a number")).contains("writing the head"));
        Ok(())
    }
}
