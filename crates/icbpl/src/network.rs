//! The pretrained backbone, frozen in part or whole, and the small head after it, with Adam for both.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use backbone::published::{PublishedArchitecture, PublishedConfiguration, PublishedNetwork};
use backbone::{Architecture, Segment, backbone_file, resnet};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use data::views::Input;
use layers::{Adam, BatchGroups, Builder, Network, Transformer};
use serde_json::{Value, json};
use stage::Job;
use training::{Checkpoint, Seam, Trained, TrainedSegment};

use crate::config::{BLOCKS, StartTable};
use crate::{Config, HeadWidths};

/// All that learns, and the centroids, which do not.
pub struct IcbplNetworks {
    /// Picture to embedding, `(B, D)`.
    pub backbone: StartingBackbone,
    /// Embedding to feature, `(B, P)`, before it is made unit-length.
    pub head: TrainedSegment<Adam>,
    /// `(K, P)`, constants of the loss; saved with the network, which is useless without them.
    pub centroids: Var,
}

/// The backbone that a run starts from.
pub enum StartingBackbone {
    /// A residual network, whose blocks learn, except for frozen ones.
    Residual {
        /// Its depth, width and stem.
        architecture: Architecture,
        /// Its plan and values.
        segment: Box<TrainedSegment<Adam>>,
    },
    /// A Vision Transformer, which runs forward only.
    Transformer(Box<Transformer>),
}

/// A forward pass in training.
pub struct IcbplPass {
    /// Where the gradient enters a backbone that learns.
    embedding: Option<Seam>,
    /// `(B, P)`, before it is scaled to unit length.
    pub feature: Seam,
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
        let backbone = StartingBackbone::open(config, job, device)?;
        let head = head(config, backbone.embedding_width())?;
        let head = TrainedSegment::new("head", Segment::random("head", head, job.seed)?);
        let (clusters, width) = (job.data.clusters, config.network.head.width);
        let places = config.centroids.place(clusters, width, job.seed)?;
        let places = places.into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let centroids = Var::from_tensor(&Tensor::from_vec(places, (clusters, width), device)?)?;
        Ok(Self { backbone, head: head.on(device)?, centroids })
    }

    /// The same networks, which divide batches into these groups.
    ///
    /// # Errors
    ///
    /// The GPUs of the ranks cannot be connected.
    pub fn in_groups(self, groups: &BatchGroups) -> Result<Self> {
        let backbone = match self.backbone {
            StartingBackbone::Residual { architecture, segment } => {
                let segment = Box::new(segment.in_groups(groups)?);
                StartingBackbone::Residual { architecture, segment }
            }
            // Each picture passes it by itself.
            transformer => transformer,
        };
        Ok(Self { backbone, head: self.head.in_groups(groups)?, centroids: self.centroids })
    }

    /// Pictures `(B, H, W, C)` of this rank through backbone and head.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the backbone's channels.
    pub fn forward(&mut self, pictures: &Tensor) -> Result<IcbplPass> {
        Ok(match &mut self.backbone {
            StartingBackbone::Residual { segment, .. } => {
                let embedding = segment.forward(pictures)?;
                let feature = self.head.forward_batch(&embedding)?;
                IcbplPass { embedding: Some(embedding), feature }
            }
            StartingBackbone::Transformer(transformer) => {
                let embedding = transformer.forward(pictures)?;
                IcbplPass { embedding: None, feature: self.head.forward(embedding.feature())? }
            }
        })
    }

    /// Announces the backward passes of this step: see [`TrainedSegment::expect_passes`].
    ///
    /// # Errors
    ///
    /// All passes of an earlier announcement have come, and no step was taken since.
    pub fn expect_passes(&mut self, passes: usize) -> Result<()> {
        if let StartingBackbone::Residual { segment, .. } = &mut self.backbone {
            segment.expect_passes(passes)?;
        }
        Ok(self.head.expect_passes(passes)?)
    }

    /// Adds the gradients of the loss to those of this step, pass by pass.
    ///
    /// # Errors
    ///
    /// The loss does not use a pass, or a gradient has another shape than its seam.
    pub fn backward(
        &mut self,
        passes: impl IntoIterator<Item = IcbplPass>,
        gradients: &GradStore,
    ) -> Result<()> {
        for IcbplPass { embedding, feature } in passes {
            match (&mut self.backbone, embedding) {
                (StartingBackbone::Residual { segment, .. }, Some(embedding)) => {
                    let seams = [embedding, feature];
                    training::backward([&mut **segment, &mut self.head], seams, gradients)?;
                }
                _ => training::backward([&mut self.head], [feature], gradients)?,
            }
        }
        Ok(())
    }

    /// One step of Adam at the rates of backbone and head.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn step(&mut self, of_backbone: Adam, of_head: Adam) -> candle_core::Result<()> {
        if let StartingBackbone::Residual { segment, .. } = &mut self.backbone {
            segment.step(of_backbone)?;
        }
        self.head.step(of_head)
    }

    /// The first parameter whose gradient is not finite.
    pub fn first_gradient_not_finite(&mut self) -> candle_core::Result<Option<String>> {
        let of_backbone = match &mut self.backbone {
            StartingBackbone::Residual { segment, .. } => segment.first_gradient_not_finite()?,
            StartingBackbone::Transformer(_) => None,
        };
        match of_backbone {
            Some(name) => Ok(Some(name)),
            None => self.head.first_gradient_not_finite(),
        }
    }

    /// The contents of `config.json`.
    pub(crate) fn configuration(&self, config: &Config) -> Result<Value> {
        let (key, backbone) = match &self.backbone {
            StartingBackbone::Residual { architecture, .. } => ("backbone", json!(architecture)),
            StartingBackbone::Transformer(network) => ("transformer", json!(network.plan())),
        };
        Ok(json!({
            key: backbone,
            "head": config.network.head,
            "channels": config.input.channels,
            "input": serde_json::to_value(&config.input).context("the input of the network")?,
        }))
    }
}

impl Trained for IcbplNetworks {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        if let StartingBackbone::Residual { segment, .. } = &mut self.backbone {
            segment.checkpoint(file)?;
        }
        self.head.checkpoint(file)?;
        file.variable("centroids", &self.centroids)
    }

    /// None for a transformer, which stays as it was published.
    fn exported(&self) -> Option<&Segment> {
        match &self.backbone {
            StartingBackbone::Residual { segment, .. } => Some(&segment.segment),
            StartingBackbone::Transformer(_) => None,
        }
    }
}

impl StartingBackbone {
    /// The pretrained backbone that `[icbpl.start]` names, on `device`.
    ///
    /// # Errors
    ///
    /// There is none, the file has another checksum or is of another network, a block to be frozen
    /// does not exist, or a transformer is to be trained.
    pub fn open(config: &Config, job: &Job, device: &Device) -> Result<Self> {
        let architecture = match &config.start {
            StartTable::File { backbone, .. } | StartTable::Stage { backbone } => *backbone,
            StartTable::Published {} => return Self::published(config, job, device),
        };
        let mut segment = Segment::empty(residual_plan(config, &architecture)?);
        backbone_file::read(&backbone_path(config, job)?, &mut segment)?;
        Self::residual(config, architecture, segment, device)
    }

    /// The network that the stage `pretrained` left.
    fn published(config: &Config, job: &Job, device: &Device) -> Result<Self> {
        let folder = role_folder(job)?;
        let found = described(config, folder)?;
        let precision = config.run.precision.into();
        Ok(match found.network(folder)? {
            PublishedNetwork::Transformer(weights) => {
                Self::Transformer(Box::new(Transformer::new(&weights, device, precision)?))
            }
            PublishedNetwork::Residual { architecture, segment } => {
                let segment = segment.with_network(residual_plan(config, &architecture)?)?;
                Self::residual(config, architecture, segment, device)?
            }
        })
    }

    fn residual(
        config: &Config,
        architecture: Architecture,
        segment: Segment,
        device: &Device,
    ) -> Result<Self> {
        let mut segment = TrainedSegment::new("online.backbone", segment);
        for block in config.frozen_blocks() {
            segment.freeze(block, config.frozen_statistics.mode())?;
        }
        Ok(Self::Residual { architecture, segment: Box::new(segment.on(device)?) })
    }

    /// Width D of the embedding.
    pub fn embedding_width(&self) -> usize {
        match self {
            Self::Residual { architecture, .. } => architecture.embedding_width(),
            Self::Transformer(network) => network.plan().feature_width(),
        }
    }

    /// The embedding `(B, D)` of pictures `(B, H, W, C)`, which does not depend on other pictures.
    ///
    /// # Errors
    ///
    /// `pictures` have another shape than the network takes.
    pub fn evaluate(&mut self, pictures: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Residual { segment, .. } => segment.evaluate(pictures),
            Self::Transformer(network) => Ok(network.forward(pictures)?.feature().clone()),
        }
    }
}

/// The configuration of the published network in `folder`, checked against the table.
///
/// # Errors
///
/// It is not a published network, takes another input than `[icbpl.input]` says (one that learns: another mean,
/// deviation or number of channels), or is a transformer that is not frozen.
pub(crate) fn described(config: &Config, folder: &Path) -> Result<PublishedConfiguration> {
    let shown = folder.display();
    let found = PublishedConfiguration::find(folder)?.with_context(|| {
        format!(
            "the network in `{shown}` was trained by a stage; `kind = \"published\"` in \
             `[icbpl.start]` needs the stage `pretrained` in the place `pretraining`"
        )
    })?;
    let is_frozen = BLOCKS.iter().all(|block| config.frozen_blocks().contains(block));
    let mut differences = differences(&config.input, &found.input()?)?;
    // A network that learns may be taught another size.
    differences.retain(|(key, _)| is_frozen || ["channels", "mean", "std"].contains(&&**key));
    let differences: Vec<String> = differences.into_iter().map(|(_, shown)| shown).collect();
    ensure!(
        differences.is_empty(),
        "`[icbpl.input]` is not the input that the network in `{shown}` was published with: {}. Set this in \
         `[shared.input]` or `[icbpl.input]` of the experiment",
        differences.join("; ")
    );
    let is_transformer = matches!(found.published, PublishedArchitecture::Transformer(_));
    ensure!(
        is_frozen || !is_transformer,
        "`{shown}` has a Vision Transformer, whose blocks cannot be trained here; set \
         `frozen = [\"all\"]` in `[icbpl]`, so that the head alone learns"
    );
    Ok(found)
}

/// The keys in which an input differs from the published one. With each: what it is, and what it must be.
fn differences(input: &Input, published: &Input) -> Result<Vec<(String, String)>> {
    let [input, published] = [input, published].map(serde_json::to_value);
    let (input, published) = (input?, published?);
    let keys = published.as_object().context("a table")?.keys();
    let differing = keys.filter(|&key| input[key] != published[key]);
    let shown = |key: &String| format!("`{key}` is {}, and must be {}", input[key], published[key]);
    Ok(differing.map(|key| (key.clone(), shown(key))).collect())
}

/// The plan of a residual backbone.
///
/// # Errors
///
/// A width is 0.
pub(crate) fn residual_plan(config: &Config, architecture: &Architecture) -> Result<Network> {
    let plan = resnet::plan(architecture, config.input.channels)?;
    Ok(plan.with_precision(config.run.precision.into()))
}

/// The plan of the head: linear, ReLU, linear.
///
/// # Errors
///
/// A width is 0.
pub(crate) fn head(config: &Config, embedding_width: usize) -> Result<Network> {
    let HeadWidths { hidden, width } = config.network.head;
    let mut builder = Builder::features(embedding_width);
    builder.block("head");
    let value = builder.input();
    let value = builder.linear("hidden", value, hidden)?;
    let value = builder.relu(value)?;
    let value = builder.linear("output", value, width)?;
    Ok(builder.finish(value)?.with_precision(config.run.precision.into()))
}

/// The folder of the stage before.
fn role_folder(job: &Job) -> Result<&Path> {
    job.optional_input("backbone").context(
        "icbpl starts from a pretrained backbone, and was given none: name a file with `kind = \
         \"file\"` and its `sha256` in table `[icbpl.start]`, or let `pretraining` stand before it in \
         `[rounds]` (the program's flag is --in backbone=DIR)",
    )
}

fn backbone_path(config: &Config, job: &Job) -> Result<PathBuf> {
    let StartTable::File { file, sha256, .. } = &config.start else {
        return Ok(role_folder(job)?.join(backbone_file::NAME));
    };
    if !sha256.is_empty() {
        let found = stage::digest::sha256_of_file(file).context("the backbone")?;
        ensure!(
            found == *sha256,
            "`{}` has the SHA-256 {found}, but `sha256` in table `[icbpl.start]` says {sha256}; fetch \
             the file again, or correct the table",
            file.display()
        );
    }
    Ok(file.clone())
}
