//! Repositories of the hub and their cache on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use hf_hub::{Cache, CacheRepo};
use serde::Deserialize;
use ureq::http::StatusCode;

use crate::http::{Checksum, Client, Expected, Refused};
use crate::{Address, Settings};

/// The files of an address at one commit, on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder of the commit in the cache.
    pub folder: PathBuf,
    /// Paths of the chosen files below it, in order.
    pub names: Vec<String>,
}

/// Downloads the files of an address that are missing from the cache.
///
/// - `choose`: from the paths of all files, in order, to those that are wanted.
///
/// # Errors
///
/// The hub cannot be reached, refuses, or has no such files.
pub fn fetch(
    address: &Address,
    settings: &Settings,
    client: &Client,
    choose: impl Fn(Vec<String>) -> Result<Vec<String>>,
) -> Result<Snapshot> {
    let kept = RepositoryCache::new(address, settings);
    if settings.is_offline {
        let folder = kept.snapshot_of(address)?;
        let mut names = Vec::new();
        list_files(&folder, "", &mut names)?;
        names.sort();
        return Ok(Snapshot { names: choose(names)?, folder });
    }
    let listing = list(address, settings, client)?;
    let names = choose(listing.files.keys().cloned().collect())?;
    for name in &names {
        let file = listing.file(name)?;
        kept.fetch(address, &listing.commit, name, file, client)?;
    }
    kept.remember(&listing.commit, &address.revision)?;
    Ok(Snapshot { folder: kept.snapshot(&listing.commit), names })
}

/// The files of a repository at one commit, as the hub states them. All are downloaded from that
/// commit, even if the branch moves meanwhile.
#[derive(Debug)]
pub(crate) struct CommitListing {
    pub(crate) commit: String,
    /// By path; an error for a file without a usable digest.
    pub(crate) files: BTreeMap<String, Result<Expected, String>>,
}

impl CommitListing {
    /// The expected length and digest of a listed file.
    pub(crate) fn file(&self, name: &str) -> Result<&Expected> {
        self.files[name].as_ref().map_err(|error| anyhow!("{error}"))
    }
}

/// Asks the hub which files a revision has.
pub(crate) fn list(
    address: &Address,
    settings: &Settings,
    client: &Client,
) -> Result<CommitListing> {
    let url = address.api_url(&settings.endpoint);
    let text = client.text(&url, settings.token.as_deref());
    let text = text.map_err(|error| explained(error, address)).with_context(|| {
        format!(
            "looking up {} on the hub; without a network, HF_HUB_OFFLINE=1 uses what is in `{}`",
            address.name,
            settings.cache.display()
        )
    })?;
    let info: Info = serde_json::from_str(&text)
        .with_context(|| format!("the answer of `{url}` is not one of the hub"))?;
    ensure!(is_commit(&info.sha), "the hub names `{}` as a commit", info.sha);
    ensure!(
        !is_commit(&address.revision) || address.revision == info.sha,
        "the hub has commit {} in place of {}",
        info.sha,
        address.revision
    );
    tracing::info!("{} is at commit {}", address.name, info.sha);
    let siblings = info.siblings.into_iter().filter(|sibling| is_path(&sibling.rfilename));
    let files = siblings.map(|sibling| (sibling.rfilename.clone(), sibling.expected())).collect();
    Ok(CommitListing { commit: info.sha, files })
}

/// The hub's answer about a revision.
#[derive(Debug, Deserialize)]
struct Info {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    #[serde(alias = "oid")]
    sha256: String,
    size: Option<u64>,
}

impl Sibling {
    fn expected(self) -> Result<Expected, String> {
        let name = self.rfilename;
        let (digest, bytes) = match (self.lfs, self.blob_id) {
            (Some(lfs), _) => (Checksum::Sha256(lfs.sha256), lfs.size.or(self.size)),
            (None, Some(id)) => (Checksum::Git(id), self.size),
            (None, None) => return Err(format!("the hub states no digest for `{name}`")),
        };
        let digits = digest.digits();
        if digits.len() < 40 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("the hub states `{digits}` as the digest of `{name}`"));
        }
        Ok(Expected { bytes, digest })
    }
}

/// Whether a path of a repository stays below the folder it is put into.
pub(crate) fn is_path(path: &str) -> bool {
    let is_part = |part: &str| !["", ".", ".."].contains(&part);
    !path.contains(['\0', ':', '\\']) && path.split('/').all(is_part)
}

pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Adds advice to a refusal of the hub.
pub(crate) fn explained(error: anyhow::Error, address: &Address) -> anyhow::Error {
    let Some(refused) = error.downcast_ref::<Refused>() else { return error };
    let Address { name, revision, .. } = address;
    let kind = if address.is_dataset { "datasets/" } else { "" };
    let page = format!("https://huggingface.co/{kind}{name}");
    let advice = match (refused.code.as_deref(), refused.status) {
        (Some("GatedRepo"), _) => format!(
            "{name} is gated: accept its licence at {page}, then set HF_TOKEN to a token of your \
             account"
        ),
        (Some("RevisionNotFound"), _) => {
            format!("{name} has no revision `{revision}`; its branches and commits are at {page}")
        }
        (Some("EntryNotFound"), _) => format!("the file is not in {name}; see {page}"),
        (None, StatusCode::FORBIDDEN) if refused.message.is_some() => format!(
            "the token may not read {name}; give it the permission to read public gated \
             repositories, and accept the licence at {page}"
        ),
        (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND) => format!(
            "there is no such repository as {name}, or it is not public; check its name, accept its \
             terms at {page}, and set HF_TOKEN to a token that may read it"
        ),
        (_, StatusCode::TOO_MANY_REQUESTS) => {
            "the hub allows no more requests for now; wait some minutes, or set HF_TOKEN, since a \
             user who is known may ask more often"
                .to_owned()
        }
        (_, status) if status.is_server_error() => {
            "the hub is out of service; try again later: finished downloads are kept".to_owned()
        }
        _ => return error,
    };
    error.context(advice)
}

/// The part of the cache for one repository, in the layout of Python's `huggingface_hub`.
pub(crate) struct RepositoryCache<'a> {
    settings: &'a Settings,
    cache: CacheRepo,
    pub(crate) root: PathBuf,
}

impl<'a> RepositoryCache<'a> {
    pub(crate) fn new(address: &Address, settings: &'a Settings) -> Self {
        let repo = address.repo();
        let root = settings.cache.join(repo.folder_name());
        Self { settings, cache: Cache::new(settings.cache.clone()).repo(repo), root }
    }

    /// Whether only the cache may be used.
    pub(crate) fn is_offline(&self) -> bool {
        self.settings.is_offline
    }

    /// The folder of a commit.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.pointer_path(commit)
    }

    /// The commit of a revision; of a branch, the one that was downloaded last.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// The folder of the commit that was downloaded last.
    fn snapshot_of(&self, address: &Address) -> Result<PathBuf> {
        let folder = self.commit(&address.revision).map(|commit| self.snapshot(&commit));
        folder.filter(|folder| folder.is_dir()).with_context(|| {
            format!(
                "revision {} of {} is not in `{}`, and HF_HUB_OFFLINE forbids to download it; unset it",
                address.revision,
                address.name,
                self.root.display()
            )
        })
    }

    /// Records the commit of a branch.
    pub(crate) fn remember(&self, commit: &str, revision: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        self.cache.create_ref(commit).context("writing into the cache of the hub")
    }

    /// Downloads a file into `blobs` and links it from the snapshot, unless it is there.
    pub(crate) fn fetch(
        &self,
        address: &Address,
        commit: &str,
        name: &str,
        expected: &Expected,
        client: &Client,
    ) -> Result<()> {
        let pointer = self.snapshot(commit).join(name);
        if pointer.exists() {
            return Ok(());
        }
        let blob = self.root.join("blobs").join(expected.digest.digits());
        if !blob.exists() {
            let (url, partial) = (
                address.file_url(&self.settings.endpoint, commit, name),
                blob.with_extension("incomplete"),
            );
            let token = self.settings.token.as_deref();
            let fetched = client.fetch(&url, token, expected, &partial, &blob);
            fetched.map_err(|error| explained(error, address))?;
        }
        link(&blob, &pointer, name).with_context(|| format!("linking `{}`", pointer.display()))
    }
}

fn list_files(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{prefix}{file}");
        match path.is_dir() {
            true => list_files(&path, &format!("{name}/"), names)?,
            false => names.push(name),
        }
    }
    Ok(())
}

/// Links the file `name` of a snapshot to its blob, by a relative path, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path, name: &str) -> Result<()> {
    fs::create_dir_all(pointer.parent().context("a folder")?)?;
    // There may be a link to a removed blob.
    let _ = fs::remove_file(pointer);
    #[cfg(unix)]
    {
        let up = "../".repeat(2 + name.matches('/').count());
        let target = Path::new(&up).join("blobs").join(blob.file_name().context("a name")?);
        std::os::unix::fs::symlink(target, pointer)?;
    }
    #[cfg(not(unix))]
    fs::copy(blob, pointer)?;
    Ok(())
}
