//! `config.json`: the architecture of a network and the form of its input.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use layers::Network;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Architecture, Predictor, Projector, perceptron, resnet};

/// The name of the file, next to `network.safetensors` and `backbone.safetensors`.
pub const CONFIGURATION: &str = "config.json";

/// Everything needed to rebuild a network and to prepare its input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Configuration {
    /// The residual network.
    pub backbone: Architecture,
    /// The projector after it.
    pub projector: Projector,
    /// The predictor after the projector, in the online network only.
    pub predictor: Predictor,
    /// Channels of an image: 1 or 3.
    pub channels: usize,
    /// Size, mean, deviation and operations of the images. This crate does not interpret them; see
    /// [`Configuration::input`].
    pub input: Value,
}

impl Configuration {
    /// Reads `config.json` in `folder`. An error names the file.
    pub fn read(folder: &Path) -> Result<Self> {
        read(folder)
    }

    /// The part that maps images to projections.
    pub fn encoder(&self) -> Encoder {
        let Self { backbone, projector, channels, ref input, .. } = *self;
        Encoder { backbone, projector, channels, input: input.clone() }
    }

    /// Writes `config.json` in `folder` atomically.
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_configuration(folder, self)
    }

    /// The input, as a type of the caller.
    pub fn input<I: DeserializeOwned>(&self) -> Result<I> {
        input(&self.input)
    }

    /// The plan of the backbone. A width of 0 is an error.
    pub fn backbone_plan(&self) -> candle_core::Result<Network> {
        self.encoder().backbone_plan()
    }

    /// The plan of the projector. A width of 0 is an error.
    pub fn projector_plan(&self) -> candle_core::Result<Network> {
        self.encoder().projector_plan(true)
    }

    /// The plan of the predictor. A width of 0 is an error.
    pub fn predictor_plan(&self) -> candle_core::Result<Network> {
        perceptron::plan(self.projector.width, self.predictor.hidden, self.projector.width)
    }
}

/// The part of a `config.json` that every network with a projector has: from image to embedding and
/// projection. Keys of other parts, such as heads, are ignored.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Encoder {
    /// The residual network.
    pub backbone: Architecture,
    /// The projector after it.
    pub projector: Projector,
    /// Channels of an image: 1 or 3.
    pub channels: usize,
    /// As in [`Configuration`].
    pub input: Value,
}

impl Encoder {
    /// Reads `config.json` in `folder`. An error names the file.
    pub fn read(folder: &Path) -> Result<Self> {
        read(folder)
    }

    /// The input, as a type of the caller.
    pub fn input<I: DeserializeOwned>(&self) -> Result<I> {
        input(&self.input)
    }

    /// The plan of the backbone. A width of 0 is an error.
    pub fn backbone_plan(&self) -> candle_core::Result<Network> {
        resnet::plan(&self.backbone, self.channels)
    }

    /// The plan of the projector, with batch norm and ReLU between its two layers or without. A width of 0
    /// is an error.
    pub fn projector_plan(&self, with_norm: bool) -> candle_core::Result<Network> {
        let Projector { hidden, width } = self.projector;
        let input = self.backbone.embedding_width();
        match with_norm {
            true => perceptron::plan(input, hidden, width),
            false => perceptron::linear(input, hidden, width),
        }
    }
}

fn read<T: DeserializeOwned>(folder: &Path) -> Result<T> {
    let path = folder.join(CONFIGURATION);
    let text = fs::read_to_string(&path).with_context(|| {
        format!(
            "opening the configuration of a network `{}`; the stage that trained the network writes it next \
             to network.safetensors",
            path.display()
        )
    })?;
    serde_json::from_str(&text).with_context(|| {
        format!("`{}` is not the configuration of an assort network", path.display())
    })
}

fn input<I: DeserializeOwned>(value: &Value) -> Result<I> {
    I::deserialize(value).context("`input` in config.json is invalid")
}

/// Writes `config.json` in `folder` atomically, for a network with other parts than a [`Configuration`].
pub fn write_configuration(folder: &Path, configuration: &impl Serialize) -> Result<()> {
    // Via `Value`, whose keys are sorted, so that equal configurations are equal bytes.
    let text = serde_json::to_string_pretty(&serde_json::to_value(configuration)?)?;
    stage::files::write(&folder.join(CONFIGURATION), format!("{text}\n").as_bytes())
}
