//! Encoder, projector, prototypes and classifier, with Adam for each.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use backbone::network_file::{self, NamedTensor};
use backbone::perceptron::linear;
use backbone::{Segment, backbone_file, resnet};
use candle_core::{Device, Tensor, Var};
use layers::{BatchNorm, Builder, Network};
use rand::RngExt;
use rand_distr::Uniform;
use stage::container::Container;
use stage::random::stream;
use training::ops::unit_rows;
use training::{Adam, AdamSegment, Seam, Trained};

use crate::Config;
use crate::loss::unit_rows_in_place;

/// All that learns.
///
/// The classifier sees the encoder's output as a constant: nothing of its loss reaches encoder,
/// projector or prototypes.
pub struct Networks {
    /// Picture to embedding, `(B, D)`.
    pub encoder: AdamSegment,
    /// Embedding to projection, `(B, P)`: two linear layers with nothing between them.
    pub projector: AdamSegment,
    /// Embedding to logits over the clusters, `(B, K)`.
    pub classifier: AdamSegment,
    /// `(K', P)`.
    pub prototypes: Var,
    optimizer: Adam,
}

/// What one crop of a batch left behind.
pub struct Crop {
    encoder: Seam,
    projector: Seam,
    /// Cosines between projections and prototypes, `u`, in the graph of both.
    pub scores: Tensor,
}

impl Crop {
    /// The embeddings as a constant, `(B, D)`.
    pub fn embedding(&self) -> Tensor {
        self.encoder.output.as_detached_tensor()
    }

    /// The projections as a constant, `(B, P)`, not normalised.
    pub fn projection(&self) -> Tensor {
        self.projector.output.as_detached_tensor()
    }
}

const PROTOTYPES: &str = "prototypes";

impl Networks {
    /// Random first weights, computing on `device`; the encoder's are those of `backbone`, a
    /// `backbone.safetensors`, where one is given.
    ///
    /// # Errors
    ///
    /// A width is zero, the file is missing or of another network, or the device fails.
    pub fn random(
        config: &Config,
        clusters: usize,
        seed: u64,
        backbone: Option<&Path>,
        device: &Device,
    ) -> Result<Self> {
        let precision = config.precision.into();
        let encoder = resnet::plan(&config.backbone, config.input.channels)?;
        let width = config.backbone.embedding_width();
        let projector = linear(width, config.projector.hidden, config.projector.width)?;
        let classifier = classifier(width, config.classifier.hidden, clusters)?;
        let segment = |name: &str, plan: Network| -> Result<Segment> {
            Ok(Segment::random(name, plan.with_precision(precision), seed)?)
        };
        let prototypes = first_prototypes(config, seed, device)?;
        let optimizer = Adam::new(vec![(PROTOTYPES, prototypes.clone())])?;
        let mut encoder = segment("encoder", encoder)?;
        if let Some(file) = backbone {
            backbone_file::read(file, &mut encoder)?;
        }
        let projector = segment("projector", projector)?;
        let classifier = segment("classifier", classifier)?;
        Ok(Self {
            encoder: AdamSegment::new("online.backbone", encoder).on(device)?,
            projector: AdamSegment::new("online.projector", projector).on(device)?,
            classifier: AdamSegment::new("classifier", classifier).on(device)?,
            prototypes,
            optimizer,
        })
    }

    /// Makes every prototype unit-length, in place and outside the graph: before each step's
    /// forward pass, so that they are off the sphere by one step when they are saved.
    ///
    /// # Errors
    ///
    /// A prototype is zero.
    pub fn normalise_prototypes(&mut self) -> Result<()> {
        let (_, width) = self.prototypes.dims2()?;
        let mut values = self.prototypes.flatten_all()?.to_vec1::<f32>()?;
        unit_rows_in_place(&mut values, width)?;
        let shape = self.prototypes.shape().clone();
        Ok(self.prototypes.set(&Tensor::from_vec(values, shape, self.prototypes.device())?)?)
    }

    /// One crop through encoder and projector, on statistics of its own, and against the
    /// prototypes.
    ///
    /// # Errors
    ///
    /// `pictures` is not `(B, H, W, C)` of the encoder's channels.
    pub fn forward(&mut self, pictures: &Tensor) -> Result<Crop> {
        let encoder = self.encoder.learn(pictures)?;
        let projector = self.projector.learn(&encoder.output.as_detached_tensor())?;
        let scores = unit_rows(&projector.output)?.matmul(&self.prototypes.t()?)?;
        Ok(Crop { encoder, projector, scores })
    }

    /// Adds the gradients of the swapped prediction to those of this step: for projector and
    /// encoder crop by crop. Those of the prototypes stay in `gradients`.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn backward(
        &mut self,
        crops: Vec<Crop>,
        gradients: &candle_core::backprop::GradStore,
    ) -> Result<()> {
        for crop in crops {
            let Some(at_projection) = gradients.get(&crop.projector.output) else { continue };
            let at_embedding = self.projector.backward(crop.projector, at_projection, true)?;
            let at_embedding = at_embedding.context("a gradient at the projector's input")?;
            self.encoder.backward(crop.encoder, &at_embedding, false)?;
        }
        Ok(())
    }

    /// One step of everything that learns in it.
    ///
    /// - `gradients`: of the swapped prediction, for the prototypes.
    /// - `moves_prototypes`: false while they wait; then no moment and no step is counted either.
    /// - `classifies`: false in a step whose images are still gathered.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn step(
        &mut self,
        gradients: &candle_core::backprop::GradStore,
        with: layers::Adam,
        moves_prototypes: bool,
        classifies: bool,
    ) -> Result<()> {
        self.encoder.step(with)?;
        self.projector.step(with)?;
        if moves_prototypes {
            self.optimizer.step(gradients, with)?;
        }
        if classifies {
            self.classifier.step(with)?;
        }
        Ok(())
    }

    /// Writes the classifier, with the statistics of training, as the `head.safetensors` in
    /// `folder`.
    ///
    /// # Errors
    ///
    /// The device refuses, or the file system.
    pub fn write_head(&self, folder: &Path, clusters: usize) -> Result<()> {
        let mut tensors = network_file::tensors("classifier", &self.classifier.segment)?;
        for tensor in &mut tensors {
            tensor.name = tensor.name.replacen("classifier.", "", 1);
        }
        let views: Vec<_> = tensors.iter().map(NamedTensor::as_f32).collect();
        data::head::write(folder, clusters, "classifier", &views)
    }

    /// The first parameter of a segment whose gradient is not finite.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn first_gradient_not_finite(&self) -> Result<Option<String>> {
        for part in [&self.encoder, &self.projector, &self.classifier] {
            if let Some(name) = part.first_gradient_not_finite()? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

impl Trained for Networks {
    fn segments(&self) -> Vec<(&'static str, &Segment)> {
        [&self.encoder, &self.projector, &self.classifier]
            .map(|part| (part.name(), &part.segment))
            .into()
    }

    fn segments_mut(&mut self) -> Vec<(&'static str, &mut Segment)> {
        [&mut self.encoder, &mut self.projector, &mut self.classifier]
            .map(|part| (part.name(), &mut part.segment))
            .into()
    }

    fn exported(&self) -> &Segment {
        &self.encoder.segment
    }

    fn variables(&self) -> Result<Vec<NamedTensor>> {
        let values = self.prototypes.flatten_all()?.to_vec1()?;
        let shape = self.prototypes.dims().to_vec();
        Ok(vec![NamedTensor { name: PROTOTYPES.into(), shape, values }])
    }

    fn take_up_variables(&mut self, network: &Container) -> Result<()> {
        let (found, wanted) = (network.shape(PROTOTYPES)?, self.prototypes.dims());
        ensure!(
            found == wanted,
            "`{PROTOTYPES}` of `{}` is {found:?}, but the experiment needs {wanted:?}",
            network.path().display()
        );
        let values = Tensor::from_vec(network.f32(PROTOTYPES)?, wanted, self.prototypes.device())?;
        Ok(self.prototypes.set(&values)?)
    }

    fn memory(&self) -> Result<Vec<NamedTensor>> {
        let mut tensors = self.optimizer.memory()?;
        for part in [&self.encoder, &self.projector, &self.classifier] {
            tensors.extend(part.memory()?);
        }
        Ok(tensors)
    }

    fn take_up_memory(&mut self, state: &Container) -> Result<()> {
        self.optimizer.take_up_memory(state)?;
        for part in [&mut self.encoder, &mut self.projector, &mut self.classifier] {
            part.take_up_memory(state)?;
        }
        Ok(())
    }
}

/// Uniform within `±1/√P`, as a linear layer without bias begins.
fn first_prototypes(config: &Config, seed: u64, device: &Device) -> Result<Var> {
    let (count, width) = (config.prototypes, config.projector.width);
    let bound = 1. / (width as f64).sqrt();
    let uniform = Uniform::new(-bound, bound)?;
    let mut random = stream(seed, "weights of prototypes", &[]);
    let values = (0..count * width).map(|_| random.sample(uniform) as f32).collect::<Vec<_>>();
    Ok(Var::from_tensor(&Tensor::from_vec(values, (count, width), device)?)?)
}

/// Linear, batch norm, ReLU; the same again; linear.
fn classifier(input: usize, hidden: usize, clusters: usize) -> candle_core::Result<Network> {
    let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
    let mut builder = Builder::features(input);
    builder.block("classifier");
    let mut value = builder.input();
    for layer in ["1", "2"] {
        value = builder.linear(&format!("hidden{layer}"), value, hidden)?;
        value = builder.batch_norm(&format!("norm{layer}"), value, norm)?;
    }
    let value = builder.linear("output", value, clusters)?;
    builder.finish(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::config;

    fn count(network: &Network) -> usize {
        network.parameters().entries().iter().map(|entry| entry.range.len()).sum()
    }

    #[test]
    fn networks_have_the_published_sizes() -> Result<()> {
        assert_eq!(count(&linear(512, 512, 128)?), 328_320);
        assert_eq!(count(&classifier(512, 1024, 10)?), 1_589_258);
        Ok(())
    }

    #[test]
    fn prototypes_begin_as_a_linear_layer_and_are_made_unit_length() -> Result<()> {
        let mut networks = Networks::random(&config(), 3, 1, None, &Device::Cpu)?;
        let bound = 1. / (config().projector.width as f32).sqrt();
        let first = networks.prototypes.flatten_all()?.to_vec1::<f32>()?;
        assert!(first.iter().all(|v| v.abs() <= bound));
        networks.normalise_prototypes()?;
        for row in networks.prototypes.to_vec2::<f32>()? {
            assert!((row.iter().map(|v| v * v).sum::<f32>() - 1.).abs() < 1e-6);
        }
        Ok(())
    }
}
