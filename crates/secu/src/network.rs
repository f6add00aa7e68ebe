//! The network and its heads, and how they learn.

use std::path::Path;

use anyhow::Result;
use backbone::{Segment, backbone_file};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use layers::{BatchGroups, Sgd};
use training::ops::unit_rows;
use training::{Checkpoint, Seam, Trained, TrainedSegment};

use crate::Config;
use crate::heads::SeCuHead;
use crate::monitor::Monitor;

/// Backbone, projector and heads. There is no target network and no predictor.
pub struct SeCuNetworks {
    backbone: TrainedSegment<Sgd>,
    projector: TrainedSegment<Sgd>,
    /// The heads.
    pub heads: Vec<SeCuHead>,
    /// Watches the clusters of each batch.
    pub monitor: Monitor,
}

impl SeCuNetworks {
    /// Random first weights, computing on `device`; the backbone's are those of the
    /// `backbone.safetensors` in the folder `start`, if one is given.
    ///
    /// - `images`: number of images to train on.
    ///
    /// # Errors
    ///
    /// A width is zero, or the backbone is missing, damaged, or of another network.
    pub fn random(
        config: &Config,
        images: usize,
        start: Option<&Path>,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let [backbone, projector] = config.plans()?;
        // As `encoder` its 3×3 stem starts by Kaiming's fan-out, as published.
        let mut backbone = Segment::random("encoder", backbone, seed)?;
        if let Some(folder) = start {
            backbone_file::read(&folder.join(backbone_file::NAME), &mut backbone)?;
        }
        let projector = Segment::random("projector", projector, seed)?;
        let width = config.network.projector.width;
        let head = |(number, &clusters): (usize, &usize)| {
            SeCuHead::random(number, clusters, width, images, config.constraint, seed, device)
        };
        let steps_per_epoch = config.plan(images).steps_per_epoch;
        Ok(Self {
            backbone: TrainedSegment::new("online.backbone", backbone).on(device)?,
            projector: TrainedSegment::new("online.projector", projector).on(device)?,
            heads: config.heads.iter().enumerate().map(head).collect::<Result<_>>()?,
            monitor: Monitor::new(config.least_distinct_ids, steps_per_epoch),
        })
    }

    /// The same networks, which divide batches into these groups.
    ///
    /// # Errors
    ///
    /// The GPUs of the ranks cannot be connected.
    pub fn in_groups(self, groups: &BatchGroups) -> Result<Self> {
        let (backbone, projector) =
            (self.backbone.in_groups(groups)?, self.projector.in_groups(groups)?);
        Ok(Self { backbone, projector, ..self })
    }

    /// A view `(N, H, W, C)` through backbone and projector, on batch statistics. Returns the seams
    /// at the embedding and at the projection `(N, P)`, which is not normalised.
    ///
    /// # Errors
    ///
    /// `view` does not have the backbone's shape.
    pub fn forward(&mut self, view: &Tensor) -> Result<[Seam; 2]> {
        let embedding = self.backbone.forward(view)?;
        let projection = self.projector.forward_batch(&embedding)?;
        Ok([embedding, projection])
    }

    /// Announces the backward passes of this step: see [`TrainedSegment::expect_passes`].
    ///
    /// # Errors
    ///
    /// All passes of an earlier announcement have come, and no step was taken since.
    pub fn expect_passes(&mut self, passes: usize) -> Result<()> {
        self.backbone.expect_passes(passes)?;
        Ok(self.projector.expect_passes(passes)?)
    }

    /// Adds the gradients of a view to those of this step.
    ///
    /// # Errors
    ///
    /// A gradient has another shape than its seam.
    pub fn backward(&mut self, seams: [Seam; 2], gradients: &GradStore) -> Result<()> {
        Ok(training::backward([&mut self.backbone, &mut self.projector], seams, gradients)?)
    }

    /// The first gradient that is not finite, by its name in files.
    pub fn first_gradient_not_finite(
        &mut self,
        gradients: &GradStore,
    ) -> candle_core::Result<Option<String>> {
        for segment in [&mut self.backbone, &mut self.projector] {
            if let Some(name) = segment.first_gradient_not_finite()? {
                return Ok(Some(name));
            }
        }
        for head in &self.heads {
            if let Some(name) = head.gradient_not_finite(gradients)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// One step of network and centres, each at its own rate. At a rate of 0 the network stays as
    /// it is, but its momentum is updated.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64, centres: Sgd) -> Result<()> {
        let rule = Sgd { learning_rate, ..centres };
        self.backbone.step(rule)?;
        self.projector.step(rule)?;
        self.heads.iter_mut().try_for_each(|head| head.descend(gradients, centres))
    }

    /// Unit-length projections of pictures `(N, P)` on running statistics: each row depends on its
    /// own picture alone.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the backbone's shape.
    pub fn project(&mut self, pictures: &Tensor) -> Result<Tensor> {
        let embedding = self.backbone.evaluate(pictures)?;
        Ok(unit_rows(&self.projector.evaluate(&embedding)?)?)
    }
}

impl Trained for SeCuNetworks {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.backbone.checkpoint(file)?;
        self.projector.checkpoint(file)?;
        self.heads.iter_mut().try_for_each(|head| head.checkpoint(file))?;
        self.monitor.checkpoint(file)
    }

    fn exported(&self) -> Option<&Segment> {
        Some(&self.backbone.segment)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use backbone::Stem;

    use super::*;

    /// The authors' `_make_stem` draws by Kaiming's fan-out: √(2 / (64 · 9)) = 0.0589 for 64
    /// channels, where PyTorch's default would give 0.111.
    #[test]
    fn the_stem_starts_with_the_published_deviation() -> Result<()> {
        let mut config = crate::tests::config();
        config.network.backbone.width = 64;
        config.input.channels = 3;
        assert_eq!(config.network.backbone.stem, Stem::Plain);
        let networks = SeCuNetworks::random(&config, 8, None, 1, &Device::Cpu)?;
        let stem = networks.backbone.segment.parameters.get("conv1.weight")?;
        assert_eq!(stem.len(), 64 * 3 * 9);
        let deviation = (stem.iter().map(|w| w * w).sum::<f32>() / stem.len() as f32).sqrt();
        assert!((deviation - 0.0589).abs() < 0.003, "{deviation}"); // 3 standard errors are 0.003.
        Ok(())
    }

    /// What reaches the backbone through both views is the slope of the loss along it.
    #[test]
    fn the_backbones_gradient_matches_central_differences() -> Result<()> {
        const WEIGHT: &str = "layer3.0.conv2.weight";
        let config = crate::tests::config();
        let noise = |number: u64, width: usize| -> Result<Tensor> {
            let noise = training::noise(1., (8, width), number, &[], &Device::Cpu)?;
            noise.context("a deviation above 0")
        };
        let pictures = [noise(1, 42)?.reshape((8, 6, 7, 1))?, noise(2, 42)?.reshape((8, 6, 7, 1))?];
        let weights = [noise(3, 4)?, noise(4, 4)?];
        let mut networks = SeCuNetworks::random(&config, 8, None, 1, &Device::Cpu)?;
        let loss = |networks: &mut SeCuNetworks| -> Result<(Tensor, [[Seam; 2]; 2])> {
            let views = [networks.forward(&pictures[0])?, networks.forward(&pictures[1])?];
            let sum = |view: usize| (&*views[view][1] * &weights[view])?.sum_all();
            Ok(((sum(0)? + sum(1)?)?, views))
        };
        let (value, views) = loss(&mut networks)?;
        let gradients = value.backward()?;
        for view in views {
            networks.backward(view, &gradients)?;
        }
        let gradient = networks.backbone.gradient(WEIGHT)?;
        let length = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let at = networks.backbone.segment.parameters.get(WEIGHT)?;
        let mut value_at = |h: f32| -> Result<f32> {
            let along = at.iter().zip(&gradient).map(|(x, g)| x + h * g / length);
            networks.backbone.segment.parameters.set(WEIGHT, &along.collect::<Vec<_>>())?;
            Ok(loss(&mut networks)?.0.to_scalar()?)
        };
        let slope = (value_at(1e-2)? - value_at(-1e-2)?) / 2e-2;
        assert!((slope - length).abs() < 0.02 * length, "{slope}, want {length}");
        Ok(())
    }
}
