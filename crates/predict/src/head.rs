//! Applies `head.safetensors`: from a row of embeddings to a cluster and a confidence.
//!
//! [`data::head`] specifies the forms of a head. Each gives one value per cluster; the largest value
//! decides, the lowest cluster of equals. The confidence is computed as in the run that wrote the
//! head, so a picture of the run gets the same confidence here as in the run's pseudo-labels.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use assignment::argmax_rows;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::func::Func;
use candle_nn::ops::softmax;
use candle_nn::{Linear, Module, ModuleT, VarBuilder, batch_norm, func, linear};
use data::head::CentreMetric;
use data::{Embeddings, Space};
use stage::container::Container;

/// A head that is read and checked.
#[derive(Debug)]
pub struct LoadedHead {
    /// Width of the rows that it takes.
    pub width: usize,
    space: Space,
    clusters: usize,
    network: Func<'static>,
    confidence: Confidence,
    file: String,
}

/// How the confidence follows from the values of the clusters.
#[derive(Debug, Clone, Copy)]
enum Confidence {
    /// The softmax of the values divided by this temperature.
    Softmax(f64),
    /// `(1 + v) / 2` of the largest value, a cosine.
    Cosine,
    /// The largest value, a membership.
    Membership,
}

/// The clusters of some pictures.
#[derive(Debug, Default, PartialEq)]
pub struct Predictions {
    /// Cluster of each picture.
    pub assignment: Vec<u32>,
    /// Confidence of each picture, in `[0, 1]`; [`data::pseudo_labels`] says what it means.
    pub confidence: Vec<f32>,
}

impl LoadedHead {
    /// Reads the head in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing or damaged, of an unknown form, or its tensors contradict each other.
    pub fn open(folder: &Path) -> Result<Self> {
        let file = data::head::open(folder)?;
        let name = file.path().display().to_string();
        let clusters = usize::try_from(file.header_number("clusters")?)?;
        Self::read(&file, clusters).with_context(|| format!("reading the head `{name}`"))
    }

    fn read(file: &Container, clusters: usize) -> Result<Self> {
        let (width, space, network, confidence) = match file.header_text("form")? {
            "network" => {
                let (width, network) = clustering_network(file, clusters)?;
                (width, Space::Backbone, network, Confidence::Softmax(1.))
            }
            "classifier" => {
                let (width, network) = classifier(file, clusters)?;
                (width, Space::Backbone, network, Confidence::Softmax(1.))
            }
            "ensemble" => {
                let (width, network) = ensemble(file, clusters)?;
                (width, Space::Backbone, network, Confidence::Membership)
            }
            "linear" => {
                let (width, network) = linear_head(file, clusters)?;
                (width, Space::Backbone, network, Confidence::Softmax(1.))
            }
            "centres" => {
                let nearest = CentreMetric::of(file)?;
                let confidence = match nearest {
                    CentreMetric::Cosine => Confidence::Cosine,
                    CentreMetric::CosineSoftmax { temperature }
                    | CentreMetric::DistanceSoftmax { temperature } => {
                        Confidence::Softmax(temperature)
                    }
                };
                let (width, network) = centres(file, clusters, nearest)?;
                (width, Space::Projection, network, confidence)
            }
            form => bail!(
                "its form `{form}` is unknown; use the `predict` of the version that wrote it"
            ),
        };
        let file = file.path().display().to_string();
        Ok(Self { width, space, clusters, network, confidence, file })
    }

    /// Fails unless the head has `clusters` clusters, as the experiment says.
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

    /// Returns the rows of `embeddings` that the head takes, and their width.
    pub fn rows_of<'a>(&self, embeddings: &'a Embeddings) -> (&'a [f32], usize) {
        let (rows, width) = embeddings.rows(self.space);
        (rows, width)
    }

    /// Returns what the rows are called in messages.
    pub fn space_name(&self) -> &'static str {
        match self.space {
            Space::Backbone => "embeddings",
            Space::Projection => "projections",
        }
    }

    /// Returns cluster and confidence of each row.
    ///
    /// # Errors
    ///
    /// `rows` is not a matrix of the head's width, or holds a number that is not finite.
    pub fn predict(&self, rows: &[f32]) -> Result<Predictions> {
        let rows = Tensor::from_slice(rows, (rows.len() / self.width, self.width), &Device::Cpu)?;
        let values = self.network.forward(&rows)?.flatten_all()?.to_vec1::<f32>()?;
        let (assignment, largest) = argmax_rows(&values, self.clusters)?;
        let confidence = |(row, &largest): (&[f32], &f32)| {
            let largest = f64::from(largest);
            let confidence = match self.confidence {
                Confidence::Softmax(temperature) => {
                    let relative = |&v: &f32| ((f64::from(v) - largest) / temperature).exp();
                    1. / row.iter().map(relative).sum::<f64>()
                }
                Confidence::Cosine => (1. + largest) / 2.,
                Confidence::Membership => largest,
            };
            confidence.clamp(0., 1.) as f32
        };
        let confidence = values.chunks_exact(self.clusters).zip(&largest).map(confidence).collect();
        Ok(Predictions { assignment, confidence })
    }
}

/// The clustering network: rows of length `√D`, linear, ReLU, linear.
fn clustering_network(file: &Container, clusters: usize) -> Result<(usize, Func<'static>)> {
    let weights = weights(file)?;
    let [hidden, width] = matrix(file, "hidden.weight")?;
    let first = linear(width, hidden, weights.pp("hidden"))?;
    let output = linear(hidden, clusters, weights.pp("output"))?;
    let length = (width as f64).sqrt();
    let network =
        move |rows: &Tensor| output.forward(&first.forward(&(unit_rows(rows)? * length)?)?.relu()?);
    Ok((width, func(network)))
}

/// IMC-SwAV's classifier: linear, batch norm, ReLU; the same again; linear.
fn classifier(file: &Container, clusters: usize) -> Result<(usize, Func<'static>)> {
    let weights = weights(file)?;
    let [hidden_1, width] = matrix(file, "hidden1.weight")?;
    let [hidden_2, _] = matrix(file, "hidden2.weight")?;
    let linear_1 = linear(width, hidden_1, weights.pp("hidden1"))?;
    let norm_1 = batch_norm(hidden_1, NORM_EPSILON, weights.pp("norm1"))?;
    let linear_2 = linear(hidden_1, hidden_2, weights.pp("hidden2"))?;
    let norm_2 = batch_norm(hidden_2, NORM_EPSILON, weights.pp("norm2"))?;
    let output = linear(hidden_2, clusters, weights.pp("output"))?;
    let network = move |rows: &Tensor| {
        let rows = norm_1.forward_t(&linear_1.forward(rows)?, false)?.relu()?;
        output.forward(&norm_2.forward_t(&linear_2.forward(&rows)?, false)?.relu()?)
    };
    Ok((width, func(network)))
}

/// TEMI's heads: standardised rows; of each head linear, GELU, linear, unit length, directions, softmax;
/// the mean over the heads; directions added up to clusters.
fn ensemble(file: &Container, clusters: usize) -> Result<(usize, Func<'static>)> {
    let weights = weights(file)?;
    let &[heads, hidden, width] = file.shape("hidden.weight")? else {
        bail!("tensor `hidden.weight` must have three extents; run its stage again");
    };
    let [_, directions] = matrix(file, "clusters.weight")?;
    let &[_, bottleneck] = file.shape("bottleneck.bias")? else {
        bail!("tensor `bottleneck.bias` must be a matrix; run its stage again");
    };
    let standardise = standardisation(&weights, width)?;
    // The first layers of all heads are one product.
    let hidden_weight = weights.get((heads, hidden, width), "hidden.weight")?;
    let hidden_bias = weights.get((heads, hidden), "hidden.bias")?.flatten_all()?;
    let first = Linear::new(hidden_weight.reshape((heads * hidden, width))?, Some(hidden_bias));
    let second = weights.get((heads, bottleneck, hidden), "bottleneck.weight")?.transpose(1, 2)?;
    let bias = weights.get((heads, bottleneck), "bottleneck.bias")?.unsqueeze(1)?;
    let last = weights.get((heads, directions, bottleneck), "directions")?.transpose(1, 2)?;
    let sums = weights.get((clusters, directions), "clusters.weight")?.t()?;
    let network = move |rows: &Tensor| {
        let hidden = first.forward(&standardise.forward(rows)?)?.gelu_erf()?;
        let hidden = hidden.reshape(((), heads, hidden.dim(1)? / heads))?.transpose(0, 1)?;
        let rows = hidden.contiguous()?.matmul(&second)?.broadcast_add(&bias)?;
        let memberships = softmax(&unit_rows(&rows)?.matmul(&last)?, D::Minus1)?;
        memberships.mean(0)?.matmul(&sums)
    };
    Ok((width, func(network)))
}

/// TURTLE's head: standardised rows, linear.
fn linear_head(file: &Container, clusters: usize) -> Result<(usize, Func<'static>)> {
    let weights = weights(file)?;
    let [_, width] = matrix(file, "output.weight")?;
    let standardise = standardisation(&weights, width)?;
    let output = linear(width, clusters, weights.pp("output"))?;
    Ok((width, func(move |rows: &Tensor| output.forward(&standardise.forward(rows)?))))
}

/// `(x − mean) / deviation`, of the rows that a head was trained on.
fn standardisation(weights: &VarBuilder, width: usize) -> Result<Func<'static>> {
    let (mean, deviation) = (weights.get(width, "mean")?, weights.get(width, "deviation")?);
    Ok(func(move |rows: &Tensor| rows.broadcast_sub(&mean)?.broadcast_div(&deviation)))
}

/// The ε of batch norm in the networks that were trained.
const NORM_EPSILON: f64 = 1e-5;

/// Centres: the cosine `x·c / (|x||c|)`, or `2 x·c − |c|²`, which is `|x|² − d²` for the distance `d`.
fn centres(file: &Container, clusters: usize, by: CentreMetric) -> Result<(usize, Func<'static>)> {
    let [_, width] = matrix(file, "centres")?;
    let centres = weights(file)?.get((clusters, width), "centres")?;
    let network = match by {
        CentreMetric::Cosine | CentreMetric::CosineSoftmax { .. } => {
            let cosines = Linear::new(unit_rows(&centres)?, None);
            func(move |rows| cosines.forward(&unit_rows(rows)?))
        }
        CentreMetric::DistanceSoftmax { .. } => {
            let bias = centres.sqr()?.sum(D::Minus1)?.neg()?;
            let products = Linear::new((centres * 2.)?, Some(bias));
            func(move |rows| products.forward(rows))
        }
    };
    Ok((width, network))
}

/// Scales rows to unit length; a row of zeros stays.
fn unit_rows(rows: &Tensor) -> candle_core::Result<Tensor> {
    rows.broadcast_div(&rows.sqr()?.sum_keepdim(D::Minus1)?.maximum(1e-24)?.sqrt()?)
}

/// Reads all tensors of a head.
fn weights(file: &Container) -> Result<VarBuilder<'static>> {
    let tensor = |name: &str| -> Result<(String, Tensor)> {
        let tensor = Tensor::from_vec(file.f32(name)?, file.shape(name)?, &Device::Cpu)?;
        Ok((name.to_owned(), tensor))
    };
    let tensors = file.names().map(tensor).collect::<Result<HashMap<_, _>>>()?;
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// Returns the shape of a matrix that is not empty.
fn matrix(file: &Container, name: &str) -> Result<[usize; 2]> {
    match *file.shape(name)? {
        [rows, columns] if rows > 0 && columns > 0 => Ok([rows, columns]),
        ref shape => bail!("tensor `{name}` has the shape {shape:?}; it must be a matrix"),
    }
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
        let head = LoadedHead::open(folder.path())?;
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
        let predict = |by| -> Result<Predictions> {
            head::write_centres(folder.path(), &centres, 2, by)?;
            let head = LoadedHead::open(folder.path())?;
            assert_eq!((head.width, head.space_name()), (2, "projections"));
            head.predict(&[1., 0.45])
        };
        let cosines = [1.45 / (2f32 * (1. + 0.45 * 0.45)).sqrt(), 1. / (1f32 + 0.45 * 0.45).sqrt()];
        let softmax = |own: f32, other: f32| 1. / (1. + (other - own).exp());

        let found = predict(CentreMetric::Cosine)?;
        assert_eq!(found.assignment, [0]);
        assert_near(&found.confidence, &[(1. + cosines[0]) / 2.]);
        let found = predict(CentreMetric::CosineSoftmax { temperature: 0.1 })?;
        assert_eq!(found.assignment, [0]);
        assert_near(&found.confidence, &[softmax(10. * cosines[0], 10. * cosines[1])]);
        let found = predict(CentreMetric::DistanceSoftmax { temperature: 4. })?;
        assert_eq!(found.assignment, [1]);
        let squares = [4. + 2.55 * 2.55, 0.04 + 0.45 * 0.45];
        assert_near(&found.confidence, &[softmax(-squares[1] / 4., -squares[0] / 4.)]);
        Ok(())
    }

    /// All layers of width 1: `x ↦ 2x + 1 ↦ 2 (· − 3) + 1 ↦ relu ↦ 10 − · ↦ · / 2 ↦ relu ↦ ± (· − 1)`.
    #[test]
    fn a_classifier_is_linear_norm_and_relu_twice_then_linear() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let one = |name: &'static str, value: &'static [f32]| Named::f32(name, &[1], value);
        let weight = |name: &'static str, value: &'static [f32]| Named::f32(name, &[1, 1], value);
        // The first variance is so small that ε matters: `2 √(3·10⁻⁵ + ε) / √(3·10⁻⁵ + ε)` is 2.
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
        let head = LoadedHead::open(folder.path())?;
        // 2 → 5 → 5 → 5 → 2.5 → logits 1.5, −1.5. 9 → 19 → 33 → −23 → 0 → −1, 1. −9 → … 0 → 10 → 5 → 4, −4.
        let found = head.predict(&[2., 9., -9.])?;
        assert_eq!(found.assignment, [0, 1, 0]);
        let sigmoid = |x: f32| 1. / (1. + (-x).exp());
        assert_near(&found.confidence, &[sigmoid(3.), sigmoid(2.), sigmoid(8.)]);
        Ok(())
    }

    /// By hand. Two heads of width 1 everywhere but for two directions of width 2; rows have mean 1 and
    /// deviation 2. A large bias makes GELU the identity: `z` is (3, 4)/5 in both heads.
    #[test]
    fn an_ensemble_averages_memberships_and_adds_directions_up() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let bottleneck = [0.075, 0.1, 0.075, 0.1];
        let directions = [1., 0., 0., 1., 0., 0., 1., 0., 0., 0., 0., 0.];
        head::write(
            folder.path(),
            2,
            "ensemble",
            &[
                Named::f32("mean", &[1], &[1.]),
                Named::f32("deviation", &[1], &[2.]),
                Named::f32("hidden.weight", &[2, 1, 1], &[0.5, -0.5]),
                Named::f32("hidden.bias", &[2, 1], &[40., 40.]),
                Named::f32("bottleneck.weight", &[2, 2, 1], &bottleneck),
                Named::f32("bottleneck.bias", &[2, 2], &[0.; 4]),
                Named::f32("directions", &[2, 3, 2], &directions),
                Named::f32("clusters.weight", &[2, 3], &[0., 1., 0., 1., 0., 1.]),
            ],
        )?;
        let head = LoadedHead::open(folder.path())?;
        assert_eq!((head.width, head.space_name()), (1, "embeddings"));
        // Logits (.6, .8, 0) and (.6, 0, 0); cluster 0 is direction 1, cluster 1 the two others.
        let softmax = |logits: [f64; 3], k: usize| {
            logits[k].exp() / logits.iter().map(|logit| logit.exp()).sum::<f64>()
        };
        let second = (softmax([0.6, 0.8, 0.], 1) + softmax([0.6, 0., 0.], 1)) / 2.;
        let found = head.predict(&[1., 3.])?;
        assert_eq!(found.assignment, [1, 1]);
        assert_near(&found.confidence, &[(1. - second) as f32; 2]);
        Ok(())
    }

    #[test]
    fn a_linear_head_takes_standardised_rows() -> Result<()> {
        let folder = tempfile::tempdir()?;
        head::write(
            folder.path(),
            2,
            "linear",
            &[
                Named::f32("mean", &[2], &[1., -1.]),
                Named::f32("deviation", &[2], &[2., 0.5]),
                Named::f32("output.weight", &[2, 2], &[1., 0., 0., 1.]),
                Named::f32("output.bias", &[2], &[0., 0.25]),
            ],
        )?;
        let head = LoadedHead::open(folder.path())?;
        // (5, −1) is (2, 0): logits 2 and 0.25; (1, 0) is (0, 2): 0 and 2.25.
        let found = head.predict(&[5., -1., 1., 0.])?;
        assert_eq!((head.width, found.assignment), (2, vec![0, 1]));
        let sigmoid = |x: f32| 1. / (1. + (-x).exp());
        assert_near(&found.confidence, &[sigmoid(1.75), sigmoid(2.25)]);
        Ok(())
    }

    #[test]
    fn an_unusable_head_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let message = || format!("{:#}", LoadedHead::open(folder.path()).expect_err("unusable"));
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
        network(0, 3)?;
        assert!(message().contains("`hidden.weight` has the shape [0, 2]"), "{}", message());
        // The second layer of the file takes 4 values and gives 3.
        for (hidden, clusters, want) in [(5, 3, "[3, 5]"), (4, 2, "[2, 4]")] {
            network(hidden, clusters)?;
            let message = message();
            assert!(message.contains("output.weight") && message.contains(want), "{message}");
            assert!(
                message.contains("[3, 4]") && message.contains("head.safetensors"),
                "{message}"
            );
        }
        network(4, 3)?;
        LoadedHead::open(folder.path())?;
        Ok(())
    }
}
