//! The network that embeds: one of a training stage, or a published one.

use std::path::Path;

use anyhow::Result;
use backbone::published::{PublishedConfiguration, PublishedNetwork};
use backbone::{Encoder, Segment};
use candle_core::{Device, Tensor};
use data::views::Input;
use layers::Transformer;
use training::ops::unit_rows;
use training::{Precision, Target};

/// From pictures to embeddings and unit-length projections.
pub struct EmbeddingNetwork {
    kind: Kind,
    /// Which network of the file it is, for the log.
    pub found: &'static str,
    /// Size, mean and deviation of the pictures.
    pub input: Input,
    /// Width D of the embedding.
    pub width: usize,
    /// Width P of the projection.
    pub projection_width: usize,
}

enum Kind {
    /// With a projector.
    Trained(Box<Target>),
    Transformer(Box<Transformer>),
    Residual(Box<Segment>),
}

impl EmbeddingNetwork {
    /// Opens the network in `folder`: the target network, or the online network if there is no
    /// target.
    ///
    /// # Errors
    ///
    /// A file is missing, damaged or of another network.
    pub fn open(folder: &Path, precision: Precision, device: &Device) -> Result<Self> {
        if let Some(published) = PublishedConfiguration::find(folder)? {
            return Self::published(&published, folder, precision, device);
        }
        let encoder = Encoder::read(folder)?;
        let (target, found) = Target::open(folder, &encoder, precision)?;
        Ok(Self {
            kind: Kind::Trained(Box::new(target.on(device)?)),
            found,
            input: encoder.input()?,
            width: encoder.backbone.embedding_width(),
            projection_width: encoder.projector.width,
        })
    }

    fn published(
        configuration: &PublishedConfiguration,
        folder: &Path,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let kind = match configuration.network(folder)? {
            PublishedNetwork::Transformer(weights) => {
                let transformer = Transformer::new(&weights, device, precision.into())?;
                Kind::Transformer(Box::new(transformer))
            }
            PublishedNetwork::Residual { segment, .. } => {
                let plan = segment.network().clone().with_precision(precision.into());
                Kind::Residual(Box::new(segment.with_network(plan)?.on(device)?))
            }
        };
        let width = configuration.embedding_width();
        let input = configuration.input()?;
        Ok(Self { kind, found: "published", input, width, projection_width: width })
    }

    /// True for a published network, whose projection is its embedding at unit length.
    pub fn is_published(&self) -> bool {
        !matches!(self.kind, Kind::Trained(_))
    }

    /// The embedding `(N, D)` and the unit-length projection `(N, P)` of pictures `(N, H, W, C)`.
    pub fn embed(&mut self, pictures: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        if let Kind::Trained(target) = &mut self.kind {
            return target.embed(pictures);
        }
        let embedding = self.embedding(pictures)?;
        let unit = unit_rows(&embedding)?;
        Ok((embedding, unit))
    }

    /// The embedding `(N, D)` of pictures alone.
    pub fn embedding(&mut self, pictures: &Tensor) -> candle_core::Result<Tensor> {
        match &mut self.kind {
            Kind::Trained(target) => target.embedding(pictures),
            Kind::Transformer(transformer) => Ok(transformer.forward(pictures)?.feature().clone()),
            Kind::Residual(segment) => segment.infer(pictures),
        }
    }
}
