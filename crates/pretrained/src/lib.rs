//! Pretrained: a published network in the place of pretraining.
//!
//! `backbone` names it: a short name such as `dinov2-small` ([`names`]), a repository of the Hugging
//! Face Hub such as `hf://facebook/dinov2-small@<commit>`, or a folder with `config.json` and
//! `model.safetensors`. Its weights come under one naming ([`backbone::published`]), and its
//! `preprocessor_config.json` becomes the input of the network ([`transform`]).
//!
//! Writes `network.safetensors`, `backbone.safetensors` and `config.json`, which `embed` and `predict`
//! read like any other network. The network is only run forward from here on.
//!
//! ```toml
//! [stages]
//! pretraining = "pretrained"
//!
//! [pretrained]
//! backbone = "dinov2-small"
//! ```
//!
//! A result is cached by the commit and the digests of the weights, never by a branch
//! ([`source::Located::identity`]).

pub mod names;
pub mod source;
pub mod transform;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use backbone::published::{self, CheckpointFamily, Provenance, PublishedNetwork};
use data::Images;
use serde::{Deserialize, Serialize};
use stage::digest::sha256_of_file;
use stage::{Effort, Interrupt, Job, Output, Ranks, Spec, Stage};

use source::{Located, NetworkOrigin};
use transform::NativeSide;

/// The table `[pretrained]`. The experiment file sets every field.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// A short name, `hf://owner/name@revision`, or the path of a folder or of a safetensors file.
    pub backbone: String,
}

/// The stage: see the documentation of the crate.
pub struct PretrainedNetwork;

impl Stage for PretrainedNetwork {
    const SPEC: Spec = Spec {
        name: "pretrained",
        algorithm: 1,
        inputs: &[],
        outputs: &[Output::Network],
        ranks: Ranks::One,
    };
    type Config = Config;

    const DEPENDS_ON_IMAGES: bool = false;

    fn identity(config: &Config, interrupt: &Interrupt) -> Result<Option<String>> {
        locate(config, interrupt)?.identity().map(Some)
    }

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        let located = locate(config, &job.interrupt)?;
        if job.images.exists() {
            let channels = Images::open(&job.images)?.channels();
            ensure!(
                channels == 3,
                "`{}` has pictures of {channels} channel, but published networks take 3; prepare the \
                 images again with `channels = 3` in table `[prepare]`",
                job.images.display()
            );
        }
        located.announce();
        Ok(Effort::NONE)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        job.clear_log()?;
        let located = locate(config, &job.interrupt)?;
        located.announce();
        let files = located.fetch(&job.interrupt)?;
        let family = family(&files)?;
        let network = published::read(files.configuration.as_deref(), &files.weights)?;
        let input = transform::input(family, &files, side(&network))?;
        input.check("input")?;
        if let PublishedNetwork::Transformer(weights) = &network {
            weights.plan().patch_grid(input.height, input.width)?;
        }
        let provenance = provenance(&located, &files)?;
        job.log(&serde_json::json!({
            "network": config.backbone,
            "width": network.embedding_width(),
            "provenance": provenance,
        }))?;
        published::write(&job.out, &network, &input, provenance)
    }
}

/// Finds the network, without downloading it. Of one on this machine, reads the configuration too.
fn locate(config: &Config, interrupt: &Interrupt) -> Result<Located> {
    let located = source::locate(&config.backbone, interrupt)?;
    if let NetworkOrigin::Local(files) = &located.origin {
        transform::input(family(files)?, files, NativeSide::unknown())?.check("input")?;
    }
    Ok(located)
}

/// The family of a network; without a `config.json`, it can only be a residual one.
fn family(files: &source::NetworkFiles) -> Result<CheckpointFamily> {
    let Some(path) = &files.configuration else { return Ok(CheckpointFamily::Residual) };
    let text = text_of(path)?;
    CheckpointFamily::of_configuration(&text)
        .with_context(|| format!("reading `{}`", path.display()))
}

fn text_of(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("opening `{}`", path.display()))
}

/// The side of the pictures for which the positions were learned.
fn side(network: &PublishedNetwork) -> NativeSide {
    match network {
        PublishedNetwork::Transformer(weights) => match weights.plan().positions {
            layers::Positions::Absolute { grid, .. } => {
                NativeSide::of(grid * weights.plan().patch_pixels)
            }
            layers::Positions::Rotary { .. } => NativeSide::unknown(),
        },
        PublishedNetwork::Residual { .. } => NativeSide::unknown(),
    }
}

fn provenance(located: &Located, files: &source::NetworkFiles) -> Result<Provenance> {
    let digest = |path: &PathBuf| {
        let name = path.file_name().context("a file name")?.to_string_lossy().into_owned();
        Ok((name, sha256_of_file(path)?))
    };
    let sha256 = files.weights.iter().map(digest).collect::<Result<BTreeMap<_, _>>>()?;
    let (repository, commit) = match &located.origin {
        NetworkOrigin::Hub(model) => (Some(model.repository.clone()), Some(model.commit.clone())),
        NetworkOrigin::Local(_) => (None, None),
    };
    let licence = located.licence().map(str::to_owned);
    Ok(Provenance { repository, commit, sha256, licence })
}

#[cfg(test)]
mod tests;
