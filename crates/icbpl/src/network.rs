//! The pretrained backbone, partly frozen, and the small head behind it, with Adam for both.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use backbone::network_file::NamedTensor;
use backbone::{Segment, backbone_file, resnet};
use candle_core::{Device, Tensor};
use layers::{Builder, Network};
use stage::Job;
use stage::container::Container;
use training::ops::unit_rows;
use training::{AdamSegment, Seam, Trained};

use crate::Config;

/// All that learns, and the centroids, which do not.
pub struct Networks {
    /// Picture to embedding, `(B, D)`.
    pub backbone: AdamSegment,
    /// Embedding to feature, `(B, P)`, before it is made unit-length.
    pub head: AdamSegment,
    /// `(K, P)`, constants; kept with the network, which is worth nothing without them.
    pub centroids: Tensor,
}

/// What one view of a batch left behind.
pub struct View {
    backbone: Seam,
    head: Seam,
    /// Unit-length features `z`, in the graph of the head's seam.
    pub features: Tensor,
}

const CENTROIDS: &str = "centroids";

impl Networks {
    /// The pretrained backbone with a head of random first weights and its centroids, computing on
    /// `device`.
    ///
    /// # Errors
    ///
    /// The pretrained file is missing or of another network, a block to be frozen does not exist,
    /// or the centroids do not fit.
    pub fn new(config: &Config, job: &Job, device: &Device) -> Result<Self> {
        let width = config.backbone.embedding_width();
        let plan = head(width, config.head.hidden, config.head.width)?;
        let head = Segment::random("head", plan.with_precision(config.precision.into()), job.seed)?;
        let mut backbone = AdamSegment::new("online.backbone", pretrained(config, job)?);
        for block in &config.frozen {
            backbone.freeze(block, config.frozen_statistics.mode())?;
        }
        let (clusters, width) = (job.data.clusters, config.head.width);
        let places = config.centroids.place(clusters, width, job.seed)?;
        let places = places.into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let centroids = Tensor::from_vec(places, (clusters, width), device)?;
        let head = AdamSegment::new("head", head).on(device)?;
        Ok(Self { backbone: backbone.on(device)?, head, centroids })
    }

    /// One view through backbone and head.
    ///
    /// # Errors
    ///
    /// `pictures` is not `(B, H, W, C)` of the backbone's channels.
    pub fn forward(&mut self, pictures: &Tensor) -> Result<View> {
        let backbone = self.backbone.learn(pictures)?;
        let head = self.head.learn(&backbone.output.as_detached_tensor())?;
        let features = unit_rows(&head.output)?;
        Ok(View { backbone, head, features })
    }

    /// Adds the gradients of the loss to those of this step, view by view.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn backward(
        &mut self,
        views: Vec<View>,
        gradients: &candle_core::backprop::GradStore,
    ) -> Result<()> {
        for view in views {
            let Some(at_feature) = gradients.get(&view.head.output) else { continue };
            let at_embedding = self.head.backward(view.head, at_feature, true)?;
            let at_embedding = at_embedding.context("a gradient at the head's input")?;
            self.backbone.backward(view.backbone, &at_embedding, false)?;
        }
        Ok(())
    }

    /// The first parameter whose gradient is not finite.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn first_gradient_not_finite(&self) -> Result<Option<String>> {
        match self.backbone.first_gradient_not_finite()? {
            Some(name) => Ok(Some(name)),
            None => Ok(self.head.first_gradient_not_finite()?),
        }
    }
}

impl View {
    /// The head's outputs as a constant, `(B, P)`, not normalised.
    pub fn outputs(&self) -> Tensor {
        self.head.output.as_detached_tensor()
    }
}

impl Trained for Networks {
    fn segments(&self) -> Vec<(&'static str, &Segment)> {
        [&self.backbone, &self.head].map(|part| (part.name(), &part.segment)).into()
    }

    fn segments_mut(&mut self) -> Vec<(&'static str, &mut Segment)> {
        [&mut self.backbone, &mut self.head].map(|part| (part.name(), &mut part.segment)).into()
    }

    fn exported(&self) -> &Segment {
        &self.backbone.segment
    }

    fn variables(&self) -> Result<Vec<NamedTensor>> {
        let values = self.centroids.flatten_all()?.to_vec1()?;
        let shape = self.centroids.dims().to_vec();
        Ok(vec![NamedTensor { name: CENTROIDS.into(), shape, values }])
    }

    fn take_up_variables(&mut self, network: &Container) -> Result<()> {
        let (found, wanted) = (network.shape(CENTROIDS)?, self.centroids.dims());
        ensure!(
            found == wanted,
            "`{CENTROIDS}` of `{}` is {found:?}, but the experiment needs {wanted:?}",
            network.path().display()
        );
        let device = self.centroids.device();
        self.centroids = Tensor::from_vec(network.f32(CENTROIDS)?, wanted, device)?;
        Ok(())
    }

    fn memory(&self) -> Result<Vec<NamedTensor>> {
        Ok([self.backbone.memory()?, self.head.memory()?].concat())
    }

    fn take_up_memory(&mut self, state: &Container) -> Result<()> {
        self.backbone.take_up_memory(state)?;
        self.head.take_up_memory(state)
    }
}

/// The backbone as it came: from the file that the table names, or else from the role `backbone`.
///
/// # Errors
///
/// There is neither, the file is missing, has another checksum, or is of another network.
pub fn pretrained(config: &Config, job: &Job) -> Result<Segment> {
    let plan = resnet::plan(&config.backbone, config.input.channels)?;
    let mut segment = Segment::empty(plan.with_precision(config.precision.into()));
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
