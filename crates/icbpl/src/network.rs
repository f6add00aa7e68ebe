//! The pretrained backbone, partly frozen, and the small head after it, with Adam for both.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use backbone::{Segment, backbone_file, resnet};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use layers::{Adam, Builder, Network};
use stage::Job;
use training::{Checkpoint, Seam, Trained, TrainedSegment};

use crate::Config;
use crate::config::NetworkTable;

/// All that learns, and the centroids, which do not.
pub struct IcbplNetworks {
    /// Picture to embedding, `(B, D)`.
    pub backbone: TrainedSegment<Adam>,
    /// Embedding to feature, `(B, P)`, before it is made unit-length.
    pub head: TrainedSegment<Adam>,
    /// `(K, P)`, constants of the loss; saved with the network, which is useless without them.
    pub centroids: Var,
}

impl IcbplNetworks {
    /// The pretrained backbone with a head of random first weights and its centroids, computing on
    /// `device`.
    ///
    /// # Errors
    ///
    /// The pretrained file is missing or of another network, a block to be frozen does not exist,
    /// or the centroids do not fit.
    pub fn new(config: &Config, job: &Job, device: &Device) -> Result<Self> {
        let [_, plan] = plans(config)?;
        let head = Segment::random("head", plan, job.seed)?;
        let mut backbone = TrainedSegment::new("online.backbone", pretrained(config, job)?);
        for block in &config.frozen {
            backbone.freeze(block, config.frozen_statistics.mode())?;
        }
        let (clusters, width) = (job.data.clusters, config.network.head.width);
        let places = config.centroids.place(clusters, width, job.seed)?;
        let places = places.into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let centroids = Var::from_tensor(&Tensor::from_vec(places, (clusters, width), device)?)?;
        let head = TrainedSegment::new("head", head).on(device)?;
        Ok(Self { backbone: backbone.on(device)?, head, centroids })
    }

    /// Pictures `(B, H, W, C)` through backbone and head. Returns the seams at the embedding and at
    /// the feature `(B, P)`, before it is scaled to unit length.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the backbone's channels.
    pub fn forward(&mut self, pictures: &Tensor) -> Result<[Seam; 2]> {
        let embedding = self.backbone.forward(pictures)?;
        let feature = self.head.forward(&embedding)?;
        Ok([embedding, feature])
    }

    /// Adds the gradients of the loss to those of this step, pass by pass.
    ///
    /// # Errors
    ///
    /// The loss does not use a pass, or a gradient has another shape than its seam.
    pub fn backward(
        &mut self,
        passes: impl IntoIterator<Item = [Seam; 2]>,
        gradients: &GradStore,
    ) -> Result<()> {
        for seams in passes {
            training::backward([&mut self.backbone, &mut self.head], seams, gradients)?;
        }
        Ok(())
    }

    /// The first parameter whose gradient is not finite.
    pub fn first_gradient_not_finite(&self) -> candle_core::Result<Option<String>> {
        match self.backbone.first_gradient_not_finite()? {
            Some(name) => Ok(Some(name)),
            None => self.head.first_gradient_not_finite(),
        }
    }
}

impl Trained for IcbplNetworks {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.backbone.checkpoint(file)?;
        self.head.checkpoint(file)?;
        file.variable("centroids", &self.centroids)
    }

    fn exported(&self) -> &Segment {
        &self.backbone.segment
    }
}

/// The plans of backbone and head.
///
/// # Errors
///
/// A width is 0.
pub(crate) fn plans(config: &Config) -> Result<[Network; 2]> {
    let NetworkTable { backbone, head: table } = config.network;
    let plans = [
        resnet::plan(&backbone, config.input.channels)?,
        head(backbone.embedding_width(), table.hidden, table.width)?,
    ];
    Ok(plans.map(|plan| plan.with_precision(config.run.precision.into())))
}

/// The pretrained backbone: from the file that the table names, or else from the role `backbone`.
///
/// # Errors
///
/// There is neither, the file is missing, has another checksum, or is of another network.
pub fn pretrained(config: &Config, job: &Job) -> Result<Segment> {
    let [plan, _] = plans(config)?;
    let mut segment = Segment::empty(plan);
    backbone_file::read(&pretrained_file(config, job)?, &mut segment)?;
    Ok(segment)
}

fn pretrained_file(config: &Config, job: &Job) -> Result<PathBuf> {
    let Some(pretrained) = &config.pretrained else {
        let Some(folder) = job.optional_input("backbone") else {
            bail!(
                "icbpl starts from a pretrained backbone, and was given none: name a file with \
                 `pretrained = {{ file = \"..\", sha256 = \"\" }}` in table `[icbpl]`, or let \
                 `pretraining` stand before it in `[rounds]` (the program's flag is --in \
                 backbone=DIR)"
            )
        };
        return Ok(folder.join(backbone_file::NAME));
    };
    if !pretrained.sha256.is_empty() {
        let found = stage::digest::sha256_of_file(&pretrained.file).context("the backbone")?;
        ensure!(
            found == pretrained.sha256,
            "`{}` has the SHA-256 {found}, but `sha256` in table `[icbpl.pretrained]` says {}; \
             fetch the file again, or correct the table",
            pretrained.file.display(),
            pretrained.sha256
        );
    }
    Ok(pretrained.file.clone())
}

/// Linear, ReLU, linear.
fn head(input: usize, hidden: usize, output: usize) -> candle_core::Result<Network> {
    let mut builder = Builder::features(input);
    builder.block("head");
    let value = builder.input();
    let value = builder.linear("hidden", value, hidden)?;
    let value = builder.relu(value)?;
    let value = builder.linear("output", value, output)?;
    builder.finish(value)
}
