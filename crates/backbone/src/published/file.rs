//! A published network in the files of this project.
//!
//! `network.safetensors` has the container of every network, with the tensors `online.backbone.<name>`:
//! a transformer's names are those of [`layers::TransformerPlan::tensors`], a residual network's are
//! timm's. There is no projector. `backbone.safetensors` holds the same tensors without the prefix.
//! `config.json` is a [`PublishedConfiguration`].

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use layers::{TransformerPlan, TransformerWeights};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use stage::container::{self, Container, Header};

use super::PublishedNetwork;
use super::tensors::ShapedNumbers;
use crate::network_file::NamedTensor;
use crate::{
    Architecture, CONFIGURATION, Segment, backbone_file, network_file, resnet, write_configuration,
};

const PREFIX: &str = "online.backbone";

/// `config.json` of a network that others have trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PublishedConfiguration {
    /// What the network is made of.
    pub published: PublishedArchitecture,
    /// Channels of a picture.
    pub channels: usize,
    /// Size, mean, deviation and operations of the pictures, as in
    /// [`Configuration`](crate::Configuration::input).
    pub input: Value,
    /// Where the network comes from.
    pub provenance: Provenance,
}

/// What a published network is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PublishedArchitecture {
    /// A Vision Transformer.
    Transformer(TransformerPlan),
    /// A residual network.
    Residual(Architecture),
}

/// Where a network comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Provenance {
    /// Owner and name of its repository on the hub; none for a local folder.
    pub repository: Option<String>,
    /// The commit of the repository.
    pub commit: Option<String>,
    /// SHA-256 of each file of weights, by file name.
    pub sha256: BTreeMap<String, String>,
    /// The licence, where it is known.
    pub licence: Option<String>,
}

impl PublishedConfiguration {
    /// Reads `config.json` in `folder`; `None` where it is that of another network.
    ///
    /// # Errors
    ///
    /// The file is missing or damaged.
    pub fn find(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(CONFIGURATION);
        let shown = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("opening `{shown}`"))?;
        let context = || format!("`{shown}` is not the configuration of an assort network");
        let value: Value = serde_json::from_str(&text).with_context(context)?;
        match value.get("published") {
            Some(_) => Self::deserialize(value).map(Some).with_context(context),
            None => Ok(None),
        }
    }

    /// The input, as a type of the caller.
    pub fn input<I: DeserializeOwned>(&self) -> Result<I> {
        I::deserialize(&self.input).context("`input` in config.json is invalid")
    }

    /// Width D of the embedding.
    pub fn embedding_width(&self) -> usize {
        match &self.published {
            PublishedArchitecture::Transformer(plan) => plan.feature_width(),
            PublishedArchitecture::Residual(architecture) => architecture.embedding_width(),
        }
    }

    /// Reads the network in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network than this configuration's.
    pub fn network(&self, folder: &Path) -> Result<PublishedNetwork> {
        let file = network_file::open(folder)?;
        Ok(match &self.published {
            PublishedArchitecture::Transformer(plan) => {
                let weights = TransformerWeights::new(plan, tensors(&file)?)
                    .with_context(|| format!("reading `{}`", file.path().display()))?;
                PublishedNetwork::Transformer(Box::new(weights))
            }
            PublishedArchitecture::Residual(architecture) => {
                let mut segment = Segment::empty(resnet::plan(architecture, self.channels)?);
                network_file::load(&file, PREFIX, &mut segment)?;
                let (architecture, segment) = (*architecture, Box::new(segment));
                PublishedNetwork::Residual { architecture, segment }
            }
        })
    }
}

fn tensors(file: &Container) -> Result<BTreeMap<String, ShapedNumbers>> {
    let named = file.names().filter_map(|name| {
        let inner = name.strip_prefix(PREFIX)?.strip_prefix('.')?;
        Some((inner.to_owned(), name.to_owned()))
    });
    let read = |(inner, name): (String, String)| {
        Ok((inner, (file.shape(&name)?.to_vec(), file.f32(&name)?)))
    };
    named.map(read).collect()
}

/// Writes `network.safetensors`, `backbone.safetensors` and `config.json` in `folder`, each atomically.
///
/// - `input`: how pictures become the network's input.
pub fn write(
    folder: &Path,
    network: &PublishedNetwork,
    input: &impl Serialize,
    provenance: Provenance,
) -> Result<()> {
    let published = match network {
        PublishedNetwork::Transformer(weights) => {
            let tensors = of_transformer(weights, PREFIX);
            network_file::write_tensors(folder, &tensors)?;
            let mut bare = tensors;
            let start = PREFIX.len() + 1;
            bare.iter_mut().for_each(|tensor| drop(tensor.name.drain(..start)));
            let views: Vec<_> = bare.iter().map(NamedTensor::as_f32).collect();
            let path = folder.join(backbone_file::NAME);
            let (kind, version) = (backbone_file::KIND, backbone_file::VERSION);
            container::write(&path, kind, version, Header::new(), &views)?;
            PublishedArchitecture::Transformer(weights.plan().clone())
        }
        PublishedNetwork::Residual { architecture, segment } => {
            network_file::write(folder, &[(PREFIX, segment)])?;
            backbone_file::write(folder, segment)?;
            PublishedArchitecture::Residual(*architecture)
        }
    };
    let input = serde_json::to_value(input)?;
    let configuration = PublishedConfiguration { published, channels: 3, input, provenance };
    write_configuration(folder, &configuration)
}

fn of_transformer(weights: &TransformerWeights, prefix: &str) -> Vec<NamedTensor> {
    let tensor = |tensor: layers::TransformerTensor| {
        let values = weights.get(&tensor.name).map(<[f32]>::to_vec)?;
        Some(NamedTensor { name: format!("{prefix}.{}", tensor.name), shape: tensor.shape, values })
    };
    weights.plan().tensors().into_iter().filter_map(tensor).collect()
}
