//! The files of a published network: configuration, input transform and weights.
//!
//! Weights are `model.safetensors`, or the shards that `model.safetensors.index.json` lists. Pickles,
//! such as `pytorch_model.bin`, are never read: opening one can run any program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use stage::digest::sha256_of_file;

use crate::http::{self, Checksum, Client, Expected};
use crate::repository::{CommitListing, RepositoryCache, is_path, list};
use crate::{Address, Settings};

const CONFIGURATION: &str = "config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Endings of weights that are pickles.
const PICKLES: [&str; 5] = [".bin", ".pt", ".pth", ".pth.tar", ".ckpt"];

/// The files of a network in one folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// `config.json`.
    pub configuration: PathBuf,
    /// `preprocessor_config.json`, where there is one.
    pub preprocessor: Option<PathBuf>,
    /// Safetensors files: one, or shards in order of their names.
    pub weights: Vec<PathBuf>,
}

impl ModelFiles {
    /// Finds the files of a network in `folder`.
    ///
    /// # Errors
    ///
    /// A file is missing; the message names it, and what to do where there are only pickles.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        let configuration = folder.join(CONFIGURATION);
        ensure!(
            configuration.is_file(),
            "`{}` has no {CONFIGURATION}; a published network has {CONFIGURATION}, {WEIGHTS} and \
             mostly {PREPROCESSOR}",
            folder.display()
        );
        let preprocessor = Some(folder.join(PREPROCESSOR)).filter(|path| path.is_file());
        Ok(Self { configuration, preprocessor, weights: weights_in(folder)? })
    }
}

fn weights_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let (whole, index) = (folder.join(WEIGHTS), folder.join(INDEX));
    if whole.is_file() {
        return Ok(vec![whole]);
    }
    if !index.is_file() {
        let entries = fs::read_dir(folder)
            .with_context(|| format!("opening the folder `{}`", folder.display()))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names = names.collect::<Result<BTreeSet<_>>>()?;
        bail!("`{}` {}", folder.display(), without_weights(&names));
    }
    let shards = shards(&index)?;
    let paths: Vec<PathBuf> = shards.iter().map(|shard| folder.join(shard)).collect();
    match paths.iter().find(|path| !path.is_file()) {
        Some(path) => bail!("`{}` is missing; `{INDEX}` beside it names it", path.display()),
        None => Ok(paths),
    }
}

/// The files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read_to_string(index);
    let text = text.with_context(|| format!("opening `{}`", index.display()))?;
    let index_of = serde_json::from_str::<Index>(&text);
    let index_of =
        index_of.with_context(|| format!("`{}` is not an index of shards", index.display()))?;
    let shards: BTreeSet<String> = index_of.weight_map.into_values().collect();
    ensure!(!shards.is_empty(), "`{}` names no shard", index.display());
    let foreign = shards.iter().find(|name| !is_path(name) || name.contains('/'));
    match foreign {
        Some(name) => bail!("`{}` names `{name}`, which is not beside it", index.display()),
        None => Ok(shards),
    }
}

/// Completes a message about a folder or repository with these files and no weights.
fn without_weights(names: &BTreeSet<String>) -> String {
    let is_pickle = |name: &&String| PICKLES.iter().any(|ending| name.ends_with(ending));
    match names.iter().find(is_pickle) {
        Some(pickle) => format!(
            "has its weights in `{pickle}` alone, a pickle, which is never opened because it can run \
             any program; take a repository with {WEIGHTS} (of DINO: timm/vit_small_patch16_224.dino), \
             or convert it with safetensors.torch.save_file in Python"
        ),
        None => format!(
            "has neither {WEIGHTS} nor {INDEX}; it has {}",
            if names.is_empty() {
                "nothing".into()
            } else {
                names.iter().cloned().collect::<Vec<_>>().join(", ")
            }
        ),
    }
}

/// A network in a repository of the hub, at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedModel {
    /// Owner and name of the repository.
    pub repository: String,
    /// The commit that all of its files are from.
    pub commit: String,
    address: Address,
    files: BTreeMap<String, ModelFile>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelFile {
    expected: Expected,
    is_here: bool,
}

impl PublishedModel {
    /// Looks up the files of a network without downloading them.
    ///
    /// The commit of a branch is looked up once and then taken from the cache, so that a result can be
    /// repeated; remove `refs/<branch>` in the cache to look again.
    ///
    /// # Errors
    ///
    /// The network is not in the cache and the hub cannot be reached, refuses, or has no weights that
    /// can be read. The message says what to do.
    pub fn find(address: &Address, settings: &Settings, client: &Client) -> Result<Self> {
        ensure!(
            !address.is_dataset && address.pattern.is_empty(),
            "`hf://{}{}` is not the address of a network, which is like hf://owner/name@revision",
            if address.is_dataset { "datasets/" } else { "" },
            address.name
        );
        let kept = RepositoryCache::new(address, settings);
        let commit = kept.commit(&address.revision);
        if let Some(found) = commit.as_ref().and_then(|c| in_cache(address, &kept, c).transpose()) {
            return found;
        }
        ensure!(
            !settings.is_offline,
            "{}",
            by_hand(address, &kept, "HF_HUB_OFFLINE forbids a download")
        );
        let revision = commit.unwrap_or(address.revision.clone());
        let at_commit = Address { revision, ..address.clone() };
        let advised = |error: anyhow::Error| match error.is::<stage::Interrupted>() {
            true => error,
            false => error.context(by_hand(address, &kept, "asking the hub failed")),
        };
        let listing = list(&at_commit, settings, client).map_err(advised)?;
        kept.remember(&listing.commit, &address.revision)?;
        Self::listed(address, &kept, &listing)
    }

    fn listed(address: &Address, kept: &RepositoryCache, listing: &CommitListing) -> Result<Self> {
        let names: BTreeSet<String> = listing.files.keys().cloned().collect();
        let is_shard = |name: &String| name.starts_with("model-") && name.ends_with(".safetensors");
        let mut wanted: Vec<String> = match (names.contains(WEIGHTS), names.contains(INDEX)) {
            (true, _) => vec![WEIGHTS.to_owned()],
            (false, true) => names
                .iter()
                .filter(|name| is_shard(name))
                .cloned()
                .chain([INDEX.to_owned()])
                .collect(),
            (false, false) => bail!("{} {}", address.name, without_weights(&names)),
        };
        ensure!(names.contains(CONFIGURATION), "{} has no {CONFIGURATION}", address.name);
        wanted.push(CONFIGURATION.to_owned());
        wanted.extend(names.get(PREPROCESSOR).cloned());
        if !names.contains(PREPROCESSOR) {
            // `huggingface_hub` marks files that a repository does not have like this.
            let mark = kept.root.join(".no_exist").join(&listing.commit).join(PREPROCESSOR);
            fs::create_dir_all(mark.parent().context("a folder")?)
                .and_then(|()| fs::write(&mark, b""))
                .with_context(|| format!("writing `{}`", mark.display()))?;
        }
        let folder = kept.snapshot(&listing.commit);
        let file = |name: String| {
            let (expected, is_here) = (listing.file(&name)?.clone(), folder.join(&name).exists());
            Ok((name, ModelFile { expected, is_here }))
        };
        Ok(Self {
            repository: address.name.clone(),
            commit: listing.commit.clone(),
            address: address.clone(),
            files: wanted.into_iter().map(file).collect::<Result<_>>()?,
        })
    }

    /// The digests of its weights, by file name.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Checksum)> {
        let weights = self.files.iter().filter(|(name, _)| name.ends_with(".safetensors"));
        weights.map(|(name, file)| (name.as_str(), &file.expected.digest))
    }

    /// Bytes that [`PublishedModel::fetch`] will download.
    pub fn missing_bytes(&self) -> u64 {
        let missing = self.files.values().filter(|file| !file.is_here);
        missing.filter_map(|file| file.expected.bytes).sum()
    }

    /// Downloads the files that the cache lacks, and checks the digests of all.
    ///
    /// # Errors
    ///
    /// As [`PublishedModel::find`]; or a file is not what its digest says.
    pub fn fetch(&self, settings: &Settings, client: &Client) -> Result<ModelFiles> {
        let kept = RepositoryCache::new(&self.address, settings);
        let folder = kept.snapshot(&self.commit);
        if self.missing_bytes() > 0 {
            tracing::info!(
                "downloading {:.1} MB of {} into `{}`",
                self.missing_bytes() as f64 / 1e6,
                self.repository,
                settings.cache.display()
            );
        }
        for (name, ModelFile { expected, .. }) in &self.files {
            let path = folder.join(name);
            if path.exists()
                && let Err(error) = http::check(&path, expected)
            {
                let path = path.display();
                ensure!(!settings.is_offline, "`{path}` is damaged: {error:#}; download it again");
                tracing::warn!("downloading `{path}` again: {error:#}");
                // The blob first: the link leads to it.
                fs::remove_file(fs::canonicalize(folder.join(name))?)?;
                let _ = fs::remove_file(folder.join(name));
            }
            kept.fetch(&self.address, &self.commit, name, expected, client)?;
        }
        ModelFiles::in_folder(&folder)
    }
}

/// The network at `commit`, if the cache has all of its files.
fn in_cache(
    address: &Address,
    kept: &RepositoryCache,
    commit: &str,
) -> Result<Option<PublishedModel>> {
    let folder = kept.snapshot(commit);
    let Ok(found) = ModelFiles::in_folder(&folder) else { return Ok(None) };
    let mark = kept.root.join(".no_exist").join(commit).join(PREPROCESSOR);
    if found.preprocessor.is_none() && !mark.exists() && !kept.is_offline() {
        return Ok(None); // The hub may have one.
    }
    let is_whole = found.weights.iter().any(|path| path.ends_with(WEIGHTS));
    let index = Some(folder.join(INDEX)).filter(|_| !is_whole);
    let paths = found.weights.into_iter().chain(found.preprocessor).chain(index);
    let file = |path: PathBuf| {
        let name = path.file_name().context("a file name")?.to_string_lossy().into_owned();
        Ok((name, ModelFile { expected: cached_digest(&path)?, is_here: true }))
    };
    let files = paths.chain([found.configuration]).map(file).collect::<Result<_>>()?;
    let (repository, commit) = (address.name.clone(), commit.to_owned());
    Ok(Some(PublishedModel { repository, commit, address: address.clone(), files }))
}

/// The digest of a cached file: the name of its blob, or its SHA-256 if that name is not a digest.
fn cached_digest(path: &Path) -> Result<Expected> {
    let blob = fs::canonicalize(path).with_context(|| format!("opening `{}`", path.display()))?;
    let name = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let is_digest = name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let digest = match name.len() {
        64 if is_digest => Checksum::Sha256(name),
        40 if is_digest => Checksum::Git(name),
        _ => Checksum::Sha256(sha256_of_file(path)?),
    };
    Ok(Expected { bytes: None, digest })
}

/// Explains how to get a network without this program.
fn by_hand(address: &Address, kept: &RepositoryCache, reason: &str) -> String {
    let Address { name, revision, .. } = address;
    format!(
        "{name} at {revision} is not in `{}`, and {reason}; on a machine with a network, run \
         `hf download {name} --revision {revision} {CONFIGURATION} {PREPROCESSOR} {WEIGHTS}` and copy that \
         folder here, or download these files from https://huggingface.co/{name}/tree/{revision} into \
         one folder and set `backbone` (`--backbone` of `assort cluster`) to its path",
        kept.root.display()
    )
}
