//! `config.json`: what a network was built from and what it was fed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use layers::Network;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Architecture, Predictor, Projector, perceptron, resnet};

/// Name of the file beside `network.safetensors` and `backbone.safetensors`.
pub const CONFIGURATION: &str = "config.json";

/// Everything that is needed to build the network again and to feed it as it was fed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Configuration {
    /// The residual network.
    pub backbone: Architecture,
    /// The projector behind it.
    pub projector: Projector,
    /// The predictor behind the projector, in the online network alone.
    pub predictor: Predictor,
    /// Channels of a picture: 1 or 3.
    pub channels: usize,
    /// Size, mean, deviation and clean operations of the pictures. This crate knows no pictures,
    /// so that it only carries them; see [`Configuration::input`].
    pub input: Value,
}

impl Configuration {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing or is not such a configuration; the message names it.
    pub fn read(folder: &Path) -> Result<Self> {
        read(folder)
    }

    /// The part that embedding needs.
    pub fn encoder(&self) -> Encoder {
        let Self { backbone, projector, channels, ref input, .. } = *self;
        Encoder { backbone, projector, channels, input: input.clone() }
    }

    /// Writes `config.json` in `folder`, whole or not at all.
    ///
    /// # Errors
    ///
    /// The file system refuses.
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_configuration(folder, self)
    }

    /// The input as the type that the pictures' crate has for it.
    ///
    /// # Errors
    ///
    /// A field is missing, unknown or of another type.
    pub fn input<I: DeserializeOwned>(&self) -> Result<I> {
        input(&self.input)
    }

    /// The plan of the backbone.
    ///
    /// # Errors
    ///
    /// A width is zero.
    pub fn backbone_plan(&self) -> candle_core::Result<Network> {
        self.encoder().backbone_plan()
    }

    /// The plan of the projector.
    ///
    /// # Errors
    ///
    /// A width is zero.
    pub fn projector_plan(&self) -> candle_core::Result<Network> {
        self.encoder().projector_plan(true)
    }

    /// The plan of the predictor.
    ///
    /// # Errors
    ///
    /// A width is zero.
    pub fn predictor_plan(&self) -> candle_core::Result<Network> {
        perceptron::plan(self.projector.width, self.predictor.hidden, self.projector.width)
    }
}

/// The part of a `config.json` that every network with a projector has: from a picture to its
/// embedding and its projection. Keys of other parts, such as heads, are passed over.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Encoder {
    /// The residual network.
    pub backbone: Architecture,
    /// The projector behind it.
    pub projector: Projector,
    /// Channels of a picture: 1 or 3.
    pub channels: usize,
    /// As in a [`Configuration`].
    pub input: Value,
}

impl Encoder {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing or says nothing of these parts; the message names it.
    pub fn read(folder: &Path) -> Result<Self> {
        read(folder)
    }

    /// As [`Configuration::input`].
    ///
    /// # Errors
    ///
    /// A field is missing, unknown or of another type.
    pub fn input<I: DeserializeOwned>(&self) -> Result<I> {
        input(&self.input)
    }

    /// The plan of the backbone.
    ///
    /// # Errors
    ///
    /// A width is zero.
    pub fn backbone_plan(&self) -> candle_core::Result<Network> {
        resnet::plan(&self.backbone, self.channels)
    }

    /// The plan of the projector, with batch norm and ReLU between its two layers or with nothing.
    ///
    /// # Errors
    ///
    /// A width is zero.
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
            "opening the network's configuration `{}`; it is written beside network.safetensors \
             by the stage that trained the network",
            path.display()
        )
    })?;
    serde_json::from_str(&text).with_context(|| {
        format!("`{}` is not the configuration of a network of assort", path.display())
    })
}

fn input<I: DeserializeOwned>(value: &Value) -> Result<I> {
    I::deserialize(value).context("`input` in config.json is not usable")
}

/// Writes `config.json` in `folder`, whole or not at all: of a network with other parts than a
/// [`Configuration`] has.
///
/// # Errors
///
/// The file system refuses.
pub fn write_configuration(folder: &Path, configuration: &impl Serialize) -> Result<()> {
    // Through `Value`, whose keys are sorted: equal configurations are equal bytes.
    let text = serde_json::to_string_pretty(&serde_json::to_value(configuration)?)?;
    stage::files::write(&folder.join(CONFIGURATION), format!("{text}\n").as_bytes())
}
