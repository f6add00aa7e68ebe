//! Where a network is: a repository of the hub, a folder, or a file.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use hub::http::{Checksum, Client};
use hub::{Address, ModelFiles, PublishedModel, Settings};
use stage::Interrupt;
use stage::digest::{sha256, sha256_of_file};

use crate::names::{self, DINOV3, EUPE, NamedNetwork};

/// A network that was found, and is not downloaded yet.
#[derive(Debug)]
pub struct Located {
    /// Where it is.
    pub origin: NetworkOrigin,
    named: Option<&'static NamedNetwork>,
}

/// Where a network is.
#[derive(Debug)]
pub enum NetworkOrigin {
    /// In a repository of the hub.
    Hub(PublishedModel),
    /// On this machine.
    Local(NetworkFiles),
}

/// The files of a network on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkFiles {
    /// `config.json`; none for a lone file of weights.
    pub configuration: Option<PathBuf>,
    /// `preprocessor_config.json`.
    pub preprocessor: Option<PathBuf>,
    /// Safetensors files.
    pub weights: Vec<PathBuf>,
}

impl From<ModelFiles> for NetworkFiles {
    fn from(files: ModelFiles) -> Self {
        let ModelFiles { configuration, preprocessor, weights } = files;
        Self { configuration: Some(configuration), preprocessor, weights }
    }
}

/// Finds the network that `backbone` names, without downloading it.
///
/// # Errors
///
/// There is no such network, or it is neither in the cache nor can the hub be asked. The message says
/// what to do.
pub fn locate(backbone: &str, interrupt: &Interrupt) -> Result<Located> {
    let settings = Settings::read(|name| env::var(name).ok())?;
    locate_with(backbone, &settings, interrupt)
}

/// [`locate`] with other settings.
///
/// # Errors
///
/// As [`locate`].
pub fn locate_with(backbone: &str, settings: &Settings, interrupt: &Interrupt) -> Result<Located> {
    let named = names::find(backbone);
    let address = match (named, backbone.strip_prefix("hf://")) {
        (Some(named), _) => Some(Address {
            revision: named.commit.unwrap_or("main").to_owned(),
            ..Address::parse(named.repository)?
        }),
        (None, Some(address)) => Some(Address::parse(address)?),
        (None, None) => None,
    };
    let Some(address) = address else {
        return Ok(Located { origin: NetworkOrigin::Local(local(backbone)?), named: None });
    };
    let is_interrupted = || interrupt.is_raised();
    let found = PublishedModel::find(&address, settings, &Client::new(&is_interrupted));
    let model = found.with_context(|| {
        format!(
            "finding the backbone `{backbone}` (`assort cluster --backbone scratch` needs none)"
        )
    })?;
    let located = Located { origin: NetworkOrigin::Hub(model), named };
    located.check_stated_digest()?;
    Ok(located)
}

/// The files at a path.
fn local(backbone: &str) -> Result<NetworkFiles> {
    let path = Path::new(backbone);
    if path.is_dir() {
        return Ok(ModelFiles::in_folder(path)?.into());
    }
    if !path.is_file() {
        ensure!(
            !backbone.contains(['/', '\\', '.']),
            "the backbone `{backbone}` is missing: there is no such folder or file; name a folder with config.json and \
             model.safetensors, or a published network such as dinov2-small"
        );
        names::refuse_unknown(backbone)?;
    }
    ensure!(
        path.extension().is_some_and(|ending| ending == "safetensors"),
        "`{backbone}` is not a safetensors file; pickles are never opened, because they can run any \
         program: convert it with safetensors.torch.save_file in Python"
    );
    let beside = |name: &str| Some(path.with_file_name(name)).filter(|path| path.is_file());
    Ok(NetworkFiles {
        configuration: beside("config.json"),
        preprocessor: beside("preprocessor_config.json"),
        weights: vec![path.to_owned()],
    })
}

impl Located {
    /// What the network is, for the keys of results: repository and commit, and the digest of each
    /// file of weights; for a local network, the digests of all its files.
    ///
    /// # Errors
    ///
    /// A local file cannot be read.
    pub fn identity(&self) -> Result<String> {
        match &self.origin {
            NetworkOrigin::Hub(model) => {
                let digests =
                    model.weights().map(|(name, digest)| format!(" {name} {}", digest.digits()));
                let digests: String = digests.collect();
                Ok(format!("{}@{}{digests}", model.repository, model.commit))
            }
            NetworkOrigin::Local(NetworkFiles { configuration, preprocessor, weights }) => {
                let files = configuration.iter().chain(preprocessor).chain(weights);
                let digests = files.map(|path| sha256_of_file(path)).collect::<Result<Vec<_>>>()?;
                Ok(format!("local {}", sha256(digests.join(" ").as_bytes())))
            }
        }
    }

    /// Logs what will be downloaded, and a licence that is not an open-source one.
    pub fn announce(&self) {
        if let NetworkOrigin::Hub(model) = &self.origin {
            let (repository, commit) = (&model.repository, &model.commit);
            match model.missing_bytes() {
                0 => tracing::info!("{repository} at {commit} is in the cache"),
                bytes => tracing::info!(
                    "{repository} at {commit}: {:.1} MB to download",
                    bytes as f64 / 1e6
                ),
            }
        }
        if let Some(licence) = self.licence().filter(|licence| [DINOV3, EUPE].contains(licence)) {
            tracing::warn!("these weights are under the {licence}");
        }
    }

    /// The licence of the weights, where it is known.
    pub fn licence(&self) -> Option<&'static str> {
        match (&self.origin, self.named) {
            (_, Some(named)) => Some(named.licence),
            (NetworkOrigin::Hub(model), None) => names::licence_of(&model.repository),
            (_, None) => None,
        }
    }

    /// Downloads what is missing.
    ///
    /// # Errors
    ///
    /// The hub cannot be reached or refuses, or a file is not what its digest says.
    pub fn fetch(&self, interrupt: &Interrupt) -> Result<NetworkFiles> {
        let settings = Settings::read(|name| env::var(name).ok())?;
        self.fetch_with(&settings, interrupt)
    }

    /// [`Located::fetch`] with other settings.
    ///
    /// # Errors
    ///
    /// As [`Located::fetch`].
    pub fn fetch_with(&self, settings: &Settings, interrupt: &Interrupt) -> Result<NetworkFiles> {
        match &self.origin {
            NetworkOrigin::Hub(model) => {
                let is_interrupted = || interrupt.is_raised();
                Ok(model.fetch(settings, &Client::new(&is_interrupted))?.into())
            }
            NetworkOrigin::Local(files) => Ok(files.clone()),
        }
    }

    /// Fails if the hub's weights differ from those that the short name is pinned to.
    fn check_stated_digest(&self) -> Result<()> {
        let (NetworkOrigin::Hub(model), Some(named)) = (&self.origin, self.named) else {
            return Ok(());
        };
        let Some(known) = named.sha256 else { return Ok(()) };
        let stated = model.weights().next().context("weights")?.1;
        match stated {
            Checksum::Sha256(digest) if digest == known => Ok(()),
            other => bail!(
                "{} at {} has weights with digest {}, but `{}` stands for {known}; empty the cache of \
                 the hub, or name the repository with hf://",
                model.repository,
                model.commit,
                other.digits(),
                named.name
            ),
        }
    }
}
