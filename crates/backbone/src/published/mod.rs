//! Published networks: checkpoints in the layouts of transformers, timm and torchvision.
//!
//! [`read`] takes a `config.json`, which says the [`CheckpointFamily`], and safetensors files, and returns the
//! network under one internal naming. Transformers' `dinov2`, `dinov2_with_registers`, `dinov3_vit`,
//! `vit` (DINO), `vit_msn`, and the vision towers of `clip` and `siglip` are known, in the names of
//! their files and in those that transformers 5 gives to modules; so are timm's Vision Transformers of
//! the same families, and residual networks with timm's or torchvision's names.
//!
//! [`write()`] puts the network into the files of this project, and [`PublishedConfiguration`] finds it
//! there.
//!
//! A tensor that is missing, unknown or of another shape is an error that names it. Tensors beside the
//! backbone, such as classifiers and text towers, are ignored: see `is_beside` in `layout.rs`.

mod config;
mod file;
mod layout;
mod residual;
mod tensors;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use layers::TransformerWeights;
use serde_json::Value;

use crate::{Architecture, Segment};
use config::HubConfig;
use layout::{Layout, internal};
use tensors::FileTensors;

pub use file::{Provenance, PublishedArchitecture, PublishedConfiguration, write};

/// The family of a checkpoint. It decides the input transform if no file states one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointFamily {
    /// DINO and MSN in the layout of transformers (`vit`, `vit_msn`).
    Vit,
    /// DINOv2, with registers and without (`dinov2`, `dinov2_with_registers`).
    Dinov2,
    /// DINOv3 (`dinov3_vit`).
    Dinov3,
    /// CLIP's vision tower (`clip`, `clip_vision_model`).
    Clip,
    /// SigLIP's vision tower (`siglip`, `siglip_vision_model`).
    Siglip,
    /// A Vision Transformer with timm's names.
    Timm,
    /// A residual network with the names of timm and torchvision.
    Residual,
}

impl CheckpointFamily {
    /// The family that the text of a `config.json` names.
    ///
    /// # Errors
    ///
    /// It names none that is known; the message lists those that are.
    pub fn of_configuration(text: &str) -> Result<Self> {
        Ok(HubConfig::parse(text)?.family)
    }
}

/// A network with its numbers.
#[derive(Clone)]
pub enum PublishedNetwork {
    /// A Vision Transformer, which runs forward only.
    Transformer(Box<TransformerWeights>),
    /// A residual network, which can be trained further.
    Residual {
        /// Its depth, width and stem.
        architecture: Architecture,
        /// Its plan with parameters and statistics.
        segment: Box<Segment>,
    },
}

impl PublishedNetwork {
    /// Width D of the embedding.
    pub fn embedding_width(&self) -> usize {
        match self {
            Self::Transformer(weights) => weights.plan().feature_width(),
            Self::Residual { architecture, .. } => architecture.embedding_width(),
        }
    }
}

/// Reads a published network.
///
/// - `configuration`: its `config.json`; without one, only residual networks can be read.
/// - `weights`: its safetensors files, one or several shards.
///
/// # Errors
///
/// A file is missing, damaged or a pickle; the family is not known; or a tensor is missing, unknown, of
/// another shape than the configuration says, or not finite. The message names file and tensor.
pub fn read(configuration: Option<&Path>, weights: &[PathBuf]) -> Result<PublishedNetwork> {
    let config = configuration.map(read_configuration).transpose()?;
    let mut tensors = FileTensors::open(weights)?;
    let residual = config.as_ref().is_none_or(|config| config.family == CheckpointFamily::Residual);
    if residual && tensors.has("conv1.weight") {
        return residual::read(tensors);
    }
    let Some(config) = config else {
        bail!(
            "{} needs the config.json that it was published with, because names of tensors do not say \
             its activation and its epsilon; put both into one folder and name that",
            tensors.origin()
        )
    };
    let layout = Layout::of(&config, &mut tensors)?;
    let plan = layout.plan(&config, &tensors)?;
    let given = internal(&layout, &plan, &mut tensors)?;
    let weights = TransformerWeights::new(&plan, given)
        .with_context(|| format!("reading {}", tensors.origin()))?;
    Ok(PublishedNetwork::Transformer(Box::new(weights)))
}

fn read_configuration(path: &Path) -> Result<HubConfig> {
    let text = std::fs::read_to_string(path);
    let text = text.with_context(|| format!("opening `{}`", path.display()))?;
    HubConfig::parse(&text).with_context(|| format!("reading `{}`", path.display()))
}

/// The table `pretrained_cfg` of timm's `config.json`, which describes the input; `None` in other files.
///
/// # Errors
///
/// The text is not JSON.
pub fn timm_input(configuration: &str) -> Result<Option<Value>> {
    let value: Value = serde_json::from_str(configuration)?;
    Ok(value.get("pretrained_cfg").cloned())
}

#[cfg(test)]
mod tests;
