//! Encoder, projector, prototypes and classifier, with Adam for each.

use std::path::Path;

use anyhow::Result;
use backbone::network_file::{self, NamedTensor};
use backbone::perceptron::linear;
use backbone::{Segment, backbone_file, resnet};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use layers::{Adam, BatchGroups, BatchNorm, Builder, Network};
use rand::RngExt;
use rand_distr::Uniform;
use stage::random::stream;
use training::ops::unit_rows;
use training::{Checkpoint, Seam, Trained, TrainedSegment, TrainedVariable};

use crate::Config;
use crate::bank::Bank;
use crate::config::{NetworkTable, ProjectorWidths};
use crate::loss::unit_rows_in_place;

/// All that learns.
///
/// The classifier sees the encoder's output as a constant: nothing of its loss reaches encoder,
/// projector or prototypes.
pub struct ImcSwavNetworks {
    /// Picture to embedding, `(B, D)`.
    pub encoder: TrainedSegment<Adam>,
    /// Embedding to projection, `(B, P)`: two linear layers with nothing between them.
    pub projector: TrainedSegment<Adam>,
    /// Embedding to logits over the clusters, `(B, K)`.
    pub classifier: TrainedSegment<Adam>,
    /// `(K', P)`.
    pub prototypes: TrainedVariable<Adam>,
    /// The images gathered for the classifier.
    pub bank: Bank,
}

impl ImcSwavNetworks {
    /// Random first weights, computing on `device`; the encoder's are those of the
    /// `backbone.safetensors` in the folder `start`, if one is given.
    ///
    /// # Errors
    ///
    /// A width is zero, or the file is missing, damaged, or of another network.
    pub fn random(
        config: &Config,
        clusters: usize,
        seed: u64,
        start: Option<&Path>,
        device: &Device,
    ) -> Result<Self> {
        let precision = config.run.precision.into();
        let [encoder, projector] = plans(config)?;
        let width = config.network.backbone.embedding_width();
        let classifier = classifier(width, config.network.classifier.hidden, clusters)?;
        let segment = |name: &str, plan: Network| -> Result<Segment> {
            Ok(Segment::random(name, plan.with_precision(precision), seed)?)
        };
        let mut encoder = segment("encoder", encoder)?;
        if let Some(folder) = start {
            backbone_file::read(&folder.join(backbone_file::NAME), &mut encoder)?;
        }
        let projector = segment("projector", projector)?;
        let classifier = segment("classifier", classifier)?;
        Ok(Self {
            encoder: TrainedSegment::new("online.backbone", encoder).on(device)?,
            projector: TrainedSegment::new("online.projector", projector).on(device)?,
            classifier: TrainedSegment::new("classifier", classifier).on(device)?,
            prototypes: first_prototypes(config, seed, device)?,
            bank: Bank::new(device),
        })
    }

    /// The same networks, which divide batches into these groups.
    ///
    /// # Errors
    ///
    /// The GPUs of the ranks cannot be connected.
    pub fn in_groups(self, groups: &BatchGroups) -> Result<Self> {
        Ok(Self {
            encoder: self.encoder.in_groups(groups)?,
            projector: self.projector.in_groups(groups)?,
            classifier: self.classifier.in_groups(groups)?,
            ..self
        })
    }

    /// Makes every prototype unit-length, in place and outside the graph: before each step's
    /// forward pass, so that they are off the sphere by one step when they are saved.
    ///
    /// # Errors
    ///
    /// A prototype is zero.
    pub fn normalise_prototypes(&mut self) -> Result<()> {
        let prototypes = &self.prototypes.variable;
        let (count, width) = prototypes.dims2()?;
        let mut values = prototypes.flatten_all()?.to_vec1::<f32>()?;
        unit_rows_in_place(&mut values, width)?;
        let values = Tensor::from_vec(values, (count, width), prototypes.device())?;
        Ok(prototypes.set(&values)?)
    }

    /// One crop `(B, H, W, C)` through encoder and projector, on its own batch statistics. Returns
    /// the seams at the embedding `(B, D)` and the projection `(B, P)`, not normalised.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the encoder's channels.
    pub fn forward(&mut self, pictures: &Tensor) -> Result<[Seam; 2]> {
        let embedding = self.encoder.forward(pictures)?;
        let projection = self.projector.forward_batch(&embedding)?;
        Ok([embedding, projection])
    }

    /// Cosines between projections and prototypes, `u`, `(B, K')`, in the graph of both.
    ///
    /// # Errors
    ///
    /// The widths differ.
    pub fn scores(&self, projection: &Tensor) -> Result<Tensor> {
        Ok(unit_rows(projection)?.matmul(&self.prototypes.variable.t()?)?)
    }

    /// Announces the backward passes of this step through encoder and projector: see
    /// [`TrainedSegment::expect_passes`].
    ///
    /// # Errors
    ///
    /// All passes of an earlier announcement have come, and no step was taken since.
    pub fn expect_passes(&mut self, passes: usize) -> Result<()> {
        self.encoder.expect_passes(passes)?;
        Ok(self.projector.expect_passes(passes)?)
    }

    /// Adds the gradients of the swapped prediction to those of this step: for projector and
    /// encoder crop by crop. Those of the prototypes stay in `gradients`.
    ///
    /// # Errors
    ///
    /// A gradient has another shape than its seam.
    pub fn backward(&mut self, crops: Vec<[Seam; 2]>, gradients: &GradStore) -> Result<()> {
        for seams in crops {
            training::backward([&mut self.encoder, &mut self.projector], seams, gradients)?;
        }
        Ok(())
    }

    /// One step of everything that learns.
    ///
    /// - `gradients`: of the swapped prediction, for the prototypes.
    /// - `moves_prototypes`: false in the first steps; then their moments stay as they are too.
    /// - `classifies`: whether a full batch was gathered. Before the first one the classifier keeps still. Later it
    ///   also steps without a batch, on gradients of zero: the authors' program has one Adam, and `zero_grad` of
    ///   PyTorch 1.6 sets gradients to zero, not to `None`.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        rule: Adam,
        moves_prototypes: bool,
        classifies: bool,
    ) -> Result<()> {
        self.encoder.step(rule)?;
        self.projector.step(rule)?;
        if moves_prototypes {
            self.prototypes.step(gradients, rule)?;
        }
        if classifies || self.classifier.steps() > 0 {
            self.classifier.step(rule)?;
        }
        Ok(())
    }

    /// Writes the classifier, with the statistics of training, as the `head.safetensors` in
    /// `folder`.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn write_head(&self, folder: &Path, clusters: usize) -> Result<()> {
        let mut tensors = network_file::tensors("classifier", &self.classifier.segment)?;
        for tensor in &mut tensors {
            tensor.name = tensor.name.replacen("classifier.", "", 1);
        }
        let views: Vec<_> = tensors.iter().map(NamedTensor::as_f32).collect();
        data::head::write(folder, clusters, "classifier", &views)
    }

    /// The first gradient that is not finite, by its name in files.
    pub fn first_gradient_not_finite(
        &mut self,
        gradients: &GradStore,
    ) -> candle_core::Result<Option<String>> {
        for part in [&mut self.encoder, &mut self.projector, &mut self.classifier] {
            if let Some(name) = part.first_gradient_not_finite()? {
                return Ok(Some(name));
            }
        }
        self.prototypes.gradient_not_finite(gradients)
    }
}

impl Trained for ImcSwavNetworks {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.encoder.checkpoint(file)?;
        self.projector.checkpoint(file)?;
        self.classifier.checkpoint(file)?;
        self.prototypes.checkpoint(file)?;
        self.bank.checkpoint(file)
    }

    fn exported(&self) -> Option<&Segment> {
        Some(&self.encoder.segment)
    }
}

/// Uniform within `±1/√P`, like the first weights of a linear layer without bias.
fn first_prototypes(config: &Config, seed: u64, device: &Device) -> Result<TrainedVariable<Adam>> {
    let (count, width) = (config.prototypes, config.network.projector.width);
    let bound = 1. / (width as f64).sqrt();
    let uniform = Uniform::new(-bound, bound)?;
    let mut random = stream(seed, "weights of prototypes", &[]);
    let values = (0..count * width).map(|_| random.sample(uniform) as f32).collect::<Vec<_>>();
    let values = Tensor::from_vec(values, (count, width), device)?;
    Ok(TrainedVariable::new("prototypes", &values)?)
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

/// The plans of encoder and projector.
///
/// # Errors
///
/// A width is 0.
pub(crate) fn plans(config: &Config) -> Result<[Network; 2]> {
    let NetworkTable { backbone, projector: ProjectorWidths { hidden, width }, .. } =
        config.network;
    let projector = linear(backbone.embedding_width(), hidden, width)?;
    Ok([resnet::plan(&backbone, config.input.channels)?, projector])
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
        let mut networks = ImcSwavNetworks::random(&config(), 3, 1, None, &Device::Cpu)?;
        let bound = 1. / (config().network.projector.width as f32).sqrt();
        let first = networks.prototypes.variable.flatten_all()?.to_vec1::<f32>()?;
        assert!(first.iter().all(|v| v.abs() <= bound));
        networks.normalise_prototypes()?;
        for row in networks.prototypes.variable.to_vec2::<f32>()? {
            assert!((row.iter().map(|v| v * v).sum::<f32>() - 1.).abs() < 1e-6);
        }
        Ok(())
    }
}
