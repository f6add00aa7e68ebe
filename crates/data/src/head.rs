//! `head.safetensors`: assigns an embedding to a cluster, even for new pictures.
//!
//! Kind `head`, format version 1. Header: `clusters`, K; `form`, one of
//!
//! - `network`: the clustering network. Tensors `hidden.weight (H, D)`, `hidden.bias (H,)`,
//!   `output.weight (K, H)`, `output.bias (K,)`, all f32. Takes `backbone` rows of the embeddings,
//!   scaled to length `√D`; linear, ReLU, linear.
//! - `classifier`: IMC-SwAV's. Tensors `hidden1`, `norm1`, `hidden2`, `norm2`, `output` with
//!   `.weight` and `.bias`, the norms with `.running_mean` and `.running_var` too, all f32. Takes
//!   unscaled `backbone` rows; linear, batch norm, ReLU; the same again; linear.
//! - `centres`: tensor `centres (K, P)` f32. Takes `projection` rows; the cluster is that of the
//!   nearest centre by the header's `metric`, `spherical` or `euclidean`. [`CentreMetric`] defines
//!   the confidence. Written by ProPos, SeCu and ICBPL, whose projection is the output of their
//!   head, and by clustering if it trains no network.
//!
//! - `ensemble`: TEMI's heads, aligned to each other, the one of the lowest loss first. Tensors `mean (D,)`
//!   and `deviation (D,)`; for `H` heads with `C` directions each `hidden.weight (H, E, D)`,
//!   `hidden.bias (H, E)`, `bottleneck.weight (H, F, E)`, `bottleneck.bias (H, F)`,
//!   `directions (H, C, F)`; `clusters.weight (K, C)`, which adds directions up to clusters; all f32.
//!   Takes `backbone` rows, standardised; linear, GELU, linear, unit length, product with the directions,
//!   softmax; the mean over the heads; product with `clusters.weight`. That is the confidence.
//! - `linear`: TURTLE's. Tensors `mean (D,)`, `deviation (D,)`, `output.weight (K, D)`, `output.bias
//!   (K,)`, all f32. Takes `backbone` rows, standardised; linear.
//!
//! The confidence of the other forms is the softmax of the output. Output `k` is cluster `k` of the
//! `pseudo-labels.safetensors` in the same folder.

use std::path::Path;

use anyhow::{Context, Result, bail};
use stage::container::{self, Container, Header, Tensor};

const KIND: &str = "head";
const VERSION: u64 = 1;

/// File name of a head inside its stage's folder.
pub const FILE: &str = "head.safetensors";

/// Writes a head of any form but `centres` into `folder`.
///
/// # Errors
///
/// A value is not finite, or the file cannot be written.
pub fn write(folder: &Path, clusters: usize, form: &str, tensors: &[Tensor]) -> Result<()> {
    let header =
        [("clusters".to_owned(), clusters.into()), ("form".to_owned(), form.to_owned().into())];
    write_with(folder, Header::from(header), tensors)
}

/// How a projection is compared with the centres, and how confidence follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CentreMetric {
    /// By the cosine; the confidence is `(1 + cos) / 2`. Header: `metric` `spherical`.
    Cosine,
    /// By the cosine; the confidence is the softmax of `cos / temperature`. Header: `metric`
    /// `spherical`, and `temperature`.
    CosineSoftmax {
        /// Above 0.
        temperature: f64,
    },
    /// By the distance `d`; the confidence is the softmax of `−d² / temperature`. Header: `metric`
    /// `euclidean`, and `temperature`.
    DistanceSoftmax {
        /// Above 0.
        temperature: f64,
    },
}

impl CentreMetric {
    /// Reads the comparison from the header of a head of form `centres`.
    ///
    /// # Errors
    ///
    /// The metric is unknown, or the temperature is missing or not above 0.
    pub fn of(file: &Container) -> Result<Self> {
        let temperature = match file.header("temperature") {
            Ok(value) => Some(value.as_f64().filter(|&t| t > 0.).with_context(|| {
                format!("the temperature of its confidence is {value}; it must be above 0")
            })?),
            Err(_) => None,
        };
        Ok(match (file.header_text("metric")?, temperature) {
            ("spherical", None) => Self::Cosine,
            ("spherical", Some(temperature)) => Self::CosineSoftmax { temperature },
            ("euclidean", Some(temperature)) => Self::DistanceSoftmax { temperature },
            ("euclidean", None) => {
                bail!("it has no `temperature`, so it is of an older version; cluster again")
            }
            (metric, _) => bail!(
                "its metric `{metric}` is unknown; use the `predict` of the version that wrote it"
            ),
        })
    }
}

/// Writes the centres `(K, P)`, row by row, into `folder`.
///
/// # Errors
///
/// A value is not finite, or the file cannot be written.
pub fn write_centres(
    folder: &Path,
    centres: &[f32],
    clusters: usize,
    by: CentreMetric,
) -> Result<()> {
    let (metric, temperature) = match by {
        CentreMetric::Cosine => ("spherical", None),
        CentreMetric::CosineSoftmax { temperature } => ("spherical", Some(temperature)),
        CentreMetric::DistanceSoftmax { temperature } => ("euclidean", Some(temperature)),
    };
    let mut header = Header::from([
        ("clusters".to_owned(), clusters.into()),
        ("form".to_owned(), "centres".into()),
        ("metric".to_owned(), metric.into()),
    ]);
    header.extend(temperature.map(|temperature| ("temperature".to_owned(), temperature.into())));
    let shape = [clusters, centres.len() / clusters];
    write_with(folder, header, &[Tensor::f32("centres", &shape, centres)])
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
        for by in [
            CentreMetric::Cosine,
            CentreMetric::CosineSoftmax { temperature: 0.1 },
            CentreMetric::DistanceSoftmax { temperature: 2.5 },
        ] {
            write_centres(folder.path(), &values, 2, by)?;
            assert_eq!(CentreMetric::of(&open(folder.path())?)?, by);
        }
        write_centres(folder.path(), &values, 2, CentreMetric::Cosine)?;
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
        let message = write_centres(folder.path(), &[f32::NAN, 1.], 2, CentreMetric::Cosine);
        assert!(format!("{:#}", message.expect_err("not a number")).contains("writing the head"));
        Ok(())
    }

    #[test]
    fn an_unknown_comparison_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for (metric, temperature, want) in [
            ("manhattan", None, "metric `manhattan`"),
            ("euclidean", None, "older version"),
            ("spherical", Some(0.), "above 0"),
        ] {
            let mut header = Header::from([("metric".to_owned(), metric.into())]);
            header.extend(temperature.map(|t| ("temperature".to_owned(), serde_json::json!(t))));
            write_with(folder.path(), header, &[])?;
            let error = CentreMetric::of(&open(folder.path())?).expect_err("unknown").to_string();
            assert!(error.contains(want), "{error}");
        }
        Ok(())
    }
}
