//! What `head.safetensors` computes: from a row of embeddings to a cluster and how sure it is.
//!
//! The forms are those of [`data::head`]. Each is a chain of layers that ends in a number for every
//! cluster, the largest of which is taken, the lowest cluster of equals.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{D, Device, Tensor};
use data::{Embeddings, Space};
use stage::container::Container;

/// A head, ready to be applied.
#[derive(Debug)]
pub struct Head {
    /// Width of the rows that it takes.
    pub width: usize,
    space: Space,
    clusters: usize,
    layers: Vec<Layer>,
    sureness: Sureness,
    file: String,
}

#[derive(Debug)]
enum Layer {
    /// Rows made this long.
    Length(f64),
    /// `x Wᵀ + b`, with `Wᵀ` of `(inputs, outputs)`.
    Linear(Tensor, Tensor),
    /// `x ∘ scale + shift`: batch norm on its running statistics.
    Norm(Tensor, Tensor),
    Relu,
}

/// What the numbers of the clusters say of the picture.
#[derive(Debug, Clone, Copy)]
enum Sureness {
    /// Logits: the softmax.
    Softmax,
    /// Cosines: `(1 + cos) / 2`.
    Cosine,
    /// `2 x·c − |c|²`, which is `|x|² − d²` for the distance `d`: `1 / (1 + d²)`.
    Distance,
}

/// The clusters of some pictures.
#[derive(Debug, Default, PartialEq)]
pub struct Predictions {
    /// Cluster of each.
    pub assignment: Vec<u32>,
    /// Of each, in `[0, 1]`: for a network the probability of its cluster; for centres
    /// `(1 + cos) / 2` of the nearest, or `1 / (1 + d²)` where distances are Euclidean.
    pub confidence: Vec<f32>,
}

impl Predictions {
    /// Puts others behind these.
    pub fn extend(&mut self, others: Self) {
        self.assignment.extend(others.assignment);
        self.confidence.extend(others.confidence);
    }
}

/// As in the networks that trained: PyTorch's.
const NORM_EPSILON: f64 = 1e-5;

impl Head {
    /// Reads the head in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing or damaged, of an unknown form, or its tensors do not fit together.
    pub fn open(folder: &Path) -> Result<Self> {
        let file = data::head::open(folder)?;
        let (layers, space, sureness) = match (
            file.header_text("form")?,
            file.header_text("metric"),
        ) {
            ("network", _) => {
                let width = extents(&file, "hidden.weight")?[1];
                let layers = vec![
                    Layer::Length((width as f64).sqrt()),
                    linear(&file, "hidden")?,
                    Layer::Relu,
                    linear(&file, "output")?,
                ];
                (layers, Space::Backbone, Sureness::Softmax)
            }
            ("classifier", _) => {
                let layers = vec![
                    linear(&file, "hidden1")?,
                    norm(&file, "norm1")?,
                    Layer::Relu,
                    linear(&file, "hidden2")?,
                    norm(&file, "norm2")?,
                    Layer::Relu,
                    linear(&file, "output")?,
                ];
                (layers, Space::Backbone, Sureness::Softmax)
            }
            ("centres", Ok("spherical")) => {
                let centres = unit_rows(&matrix(&file, "centres")?, 1.)?;
                let none = Tensor::zeros(centres.dims()[0], centres.dtype(), &Device::Cpu)?;
                let layers =
                    vec![Layer::Length(1.), Layer::Linear(centres.t()?.contiguous()?, none)];
                (layers, Space::Projection, Sureness::Cosine)
            }
            ("centres", Ok("euclidean")) => {
                let centres = matrix(&file, "centres")?;
                let shift = centres.sqr()?.sum(D::Minus1)?.neg()?;
                let layers = vec![Layer::Linear((centres.t()?.contiguous()? * 2.)?, shift)];
                (layers, Space::Projection, Sureness::Distance)
            }
            (form, metric) => bail!(
                "`{}` holds a head of form `{form}`{}, which this program does not know; take the \
                 `predict` of the version that wrote it",
                file.path().display(),
                metric.map(|metric| format!(" with metric `{metric}`")).unwrap_or_default()
            ),
        };
        let mut widths = layers.iter().filter_map(|layer| match layer {
            Layer::Linear(weight, _) => Some((weight.dims()[0], weight.dims()[1])),
            _ => None,
        });
        let first = widths.next().context("every form has a linear layer")?;
        let last = widths.try_fold(first, |before, after| {
            (before.1 == after.0).then_some((before.0, after.1)).with_context(|| {
                format!(
                    "`{}`: a layer gives {} values to one that takes {}",
                    file.path().display(),
                    before.1,
                    after.0
                )
            })
        })?;
        let clusters = usize::try_from(file.header_number("clusters")?)?;
        ensure!(
            last.1 == clusters,
            "`{}` says that there are {clusters} clusters, but tells {} apart; cluster again",
            file.path().display(),
            last.1
        );
        let file = file.path().display().to_string();
        Ok(Self { width: first.0, space, clusters, layers, sureness, file })
    }

    /// Fails unless it tells `clusters` clusters apart.
    ///
    /// # Errors
    ///
    /// There are others.
    pub fn require_clusters(&self, clusters: usize) -> Result<()> {
        ensure!(
            self.clusters == clusters,
            "`{}` has {} clusters but the experiment asks for {clusters}; predict with the experiment \
             of the head's run",
            self.file,
            self.clusters
        );
        Ok(())
    }

    /// The rows that it takes, and their width.
    pub fn rows_of<'a>(&self, embeddings: &'a Embeddings) -> (&'a [f32], usize) {
        match self.space {
            Space::Backbone => (&embeddings.backbone, embeddings.width),
            Space::Projection => (&embeddings.projection, embeddings.projection_width),
        }
    }

    /// What it takes, in a word.
    pub fn space_name(&self) -> &'static str {
        match self.space {
            Space::Backbone => "embeddings",
            Space::Projection => "projections",
        }
    }

    /// The clusters of some rows, one after the other.
    ///
    /// # Errors
    ///
    /// They are not of its width.
    pub fn predict(&self, rows: &[f32]) -> Result<Predictions> {
        let rows = Tensor::from_slice(rows, (rows.len() / self.width, self.width), &Device::Cpu)?;
        let mut values = rows.clone();
        for layer in &self.layers {
            values = match layer {
                Layer::Length(length) => unit_rows(&values, *length)?,
                Layer::Linear(weight, bias) => values.matmul(weight)?.broadcast_add(bias)?,
                Layer::Norm(scale, shift) => values.broadcast_mul(scale)?.broadcast_add(shift)?,
                Layer::Relu => values.maximum(0.)?,
            };
        }
        let squares = rows.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?;
        let mut found = Predictions::default();
        for (row, square) in values.to_vec2::<f32>()?.into_iter().zip(squares) {
            let mut largest = 0;
            for cluster in 1..row.len() {
                if row[cluster] > row[largest] {
                    largest = cluster;
                }
            }
            let best = f64::from(row[largest]);
            let sure = match self.sureness {
                Sureness::Softmax => {
                    1. / row.iter().map(|&value| (f64::from(value) - best).exp()).sum::<f64>()
                }
                Sureness::Cosine => (1. + best) / 2.,
                Sureness::Distance => 1. / (1. + (f64::from(square) - best).max(0.)),
            };
            found.assignment.push(largest as u32);
            found.confidence.push(sure.clamp(0., 1.) as f32);
        }
        Ok(found)
    }
}

/// Rows of this length; a row of zeros stays one.
fn unit_rows(rows: &Tensor, length: f64) -> candle_core::Result<Tensor> {
    let lengths = rows.sqr()?.sum_keepdim(D::Minus1)?.maximum(1e-24)?.sqrt()?;
    rows.broadcast_div(&lengths)? * length
}

fn linear(file: &Container, name: &str) -> Result<Layer> {
    let weight = matrix(file, &format!("{name}.weight"))?;
    let bias = vector(file, &format!("{name}.bias"), weight.dims()[0])?;
    Ok(Layer::Linear(weight.t()?.contiguous()?, bias))
}

/// Batch norm on its running statistics.
fn norm(file: &Container, name: &str) -> Result<Layer> {
    let width = file.f32(&format!("{name}.weight"))?.len();
    let part = |part: &str| vector(file, &format!("{name}.{part}"), width);
    let (variance, mean) = (part("running_var")?, part("running_mean")?);
    let scale = (part("weight")? / (variance + NORM_EPSILON)?.sqrt()?)?;
    let shift = (part("bias")? - (mean * &scale)?)?;
    Ok(Layer::Norm(scale, shift))
}

fn matrix(file: &Container, name: &str) -> Result<Tensor> {
    let [rows, columns] = extents(file, name)?;
    Ok(Tensor::from_vec(file.f32(name)?, (rows, columns), &Device::Cpu)?)
}

fn extents(file: &Container, name: &str) -> Result<[usize; 2]> {
    let shape = file.shape(name)?;
    match shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok([rows, columns]),
        _ => bail!("tensor `{name}` of `{}` is no matrix but {shape:?}", file.path().display()),
    }
}

fn vector(file: &Container, name: &str, length: usize) -> Result<Tensor> {
    let values = file.f32(name)?;
    ensure!(
        values.len() == length,
        "tensor `{name}` of `{}` has {} values, not {length}",
        file.path().display(),
        values.len()
    );
    Ok(Tensor::from_vec(values, length, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use data::head;
    use stage::container::Tensor as Named;

    use super::*;

    #[track_caller]
    fn assert_near(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
        }
    }

    /// By hand: `x` of length √2 is (√2, 0) and (0, −√2); hidden (√2 + 1, 0) and (1, √2); logits
    /// (√2 + 1, 0, 0.5) and (1, √2, 0.5).
    #[test]
    fn a_network_takes_embeddings_at_length_of_the_root_of_their_width() -> Result<()> {
        let folder = tempfile::tempdir()?;
        head::write(
            folder.path(),
            3,
            "network",
            &[
                Named::f32("hidden.weight", &[2, 2], &[1., 0., 0., -1.]),
                Named::f32("hidden.bias", &[2], &[1., 0.]),
                Named::f32("output.weight", &[3, 2], &[1., 0., 0., 1., 0., 0.]),
                Named::f32("output.bias", &[3], &[0., 0., 0.5]),
            ],
        )?;
        let head = Head::open(folder.path())?;
        assert_eq!((head.width, head.space_name()), (2, "embeddings"));
        let found = head.predict(&[5., 0., 0., -0.1])?;
        assert_eq!(found.assignment, [0, 1]);
        let root = 2f64.sqrt();
        let softmax = |logits: [f64; 3], k: usize| {
            (logits[k].exp() / logits.iter().map(|logit| logit.exp()).sum::<f64>()) as f32
        };
        assert_near(
            &found.confidence,
            &[softmax([root + 1., 0., 0.5], 0), softmax([1., root, 0.5], 1)],
        );
        Ok(())
    }

    #[test]
    fn centres_are_compared_by_their_metric() -> Result<()> {
        let folder = tempfile::tempdir()?;
        // (1, 0.4) is nearer to (1, 1) by angle, to (1.2, 0) by distance.
        let centres = [3., 3., 1.2, 0.];
        head::write_centres(folder.path(), &centres, 2, "spherical")?;
        let found = Head::open(folder.path())?.predict(&[1., 0.45])?;
        let cosine = 1.45 / (2f32 * (1. + 0.45 * 0.45)).sqrt();
        assert_eq!(found.assignment, [0]);
        assert_near(&found.confidence, &[(1. + cosine) / 2.]);
        head::write_centres(folder.path(), &centres, 2, "euclidean")?;
        let head = Head::open(folder.path())?;
        let found = head.predict(&[1., 0.45])?;
        assert_eq!((found.assignment, head.space_name()), (vec![1], "projections"));
        assert_near(&found.confidence, &[1. / (1. + 0.04 + 0.45 * 0.45)]);
        Ok(())
    }

    /// Of width 1 all along: `x ↦ 2x + 1 ↦ 2 (· − 3) + 1 ↦ relu ↦ 10 − · ↦ · / 2 ↦ relu ↦ ± (· − 1)`.
    #[test]
    fn a_classifier_is_linear_norm_and_relu_twice_then_linear() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let one = |name: &'static str, value: &'static [f32]| Named::f32(name, &[1], value);
        let weight = |name: &'static str, value: &'static [f32]| Named::f32(name, &[1, 1], value);
        // The first is so small that the ε beside it counts: `2 √(3·10⁻⁵ + ε) / √(3·10⁻⁵ + ε)` is 2.
        let (small, four) = ([3e-5f32], [4f32 - 1e-5]);
        let weight_1 = [2. * 4e-5f32.sqrt()];
        head::write(
            folder.path(),
            2,
            "classifier",
            &[
                weight("hidden1.weight", &[2.]),
                one("hidden1.bias", &[1.]),
                Named::f32("norm1.weight", &[1], &weight_1),
                one("norm1.bias", &[1.]),
                one("norm1.running_mean", &[3.]),
                Named::f32("norm1.running_var", &[1], &small),
                weight("hidden2.weight", &[-1.]),
                one("hidden2.bias", &[10.]),
                one("norm2.weight", &[1.]),
                one("norm2.bias", &[0.]),
                one("norm2.running_mean", &[0.]),
                Named::f32("norm2.running_var", &[1], &four),
                Named::f32("output.weight", &[2, 1], &[1., -1.]),
                Named::f32("output.bias", &[2], &[-1., 1.]),
            ],
        )?;
        let head = Head::open(folder.path())?;
        // 2 → 5 → 5 → 5 → 2.5 → logits 1.5, −1.5. 9 → 19 → 33 → −23 → 0 → −1, 1. −9 → … 0 → 10 → 5 → 4, −4.
        let found = head.predict(&[2., 9., -9.])?;
        assert_eq!(found.assignment, [0, 1, 0]);
        let sigmoid = |x: f32| 1. / (1. + (-x).exp());
        assert_near(&found.confidence, &[sigmoid(3.), sigmoid(2.), sigmoid(8.)]);
        Ok(())
    }

    #[test]
    fn what_is_no_head_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let message = || format!("{:#}", Head::open(folder.path()).expect_err("no head"));
        head::write_centres(folder.path(), &[1., 0.], 2, "manhattan")?;
        assert!(message().contains("metric `manhattan`"), "{}", message());
        head::write(folder.path(), 2, "tree", &[])?;
        assert!(message().contains("form `tree`"), "{}", message());
        let network = |hidden: usize, clusters: usize| {
            let (weights, biases) = (vec![0.5; 64], vec![0.5; 8]);
            head::write(
                folder.path(),
                clusters,
                "network",
                &[
                    Named::f32("hidden.weight", &[hidden, 2], &weights[..2 * hidden]),
                    Named::f32("hidden.bias", &[hidden], &biases[..hidden]),
                    Named::f32("output.weight", &[3, 4], &weights[..12]),
                    Named::f32("output.bias", &[3], &biases[..3]),
                ],
            )
        };
        for (hidden, shape) in [(0, "[0, 2]"), (5, "5 values")] {
            network(hidden, 3)?;
            assert!(message().contains(shape), "{}", message());
        }
        network(5, 3)?;
        assert!(message().contains("gives 5 values to one that takes 4"), "{}", message());
        network(4, 2)?;
        assert!(message().contains("says that there are 2 clusters"), "{}", message());
        network(4, 3)?;
        Head::open(folder.path())?;
        Ok(())
    }
}
