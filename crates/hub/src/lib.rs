//! Downloads, and files from the Hugging Face Hub: `hf://datasets/owner/name` and `hf://owner/model`.
//!
//! A revision and a path may follow the name, in which `*` matches any characters, as in
//! `hf://datasets/owner/name@main/data/train-*.parquet`. All files come from one commit, which the hub
//! names first; a revision of 40 hexadecimal digits is a commit and pins them for good.
//!
//! The cache has the layout of crate `hf-hub`, which Python shares: `blobs/<digest>`,
//! `snapshots/<commit>/<path>` as links to them, `refs/<revision>`. Downloading is our own ([`http`]):
//! the transport of `hf-hub` 0.5 sends the token to any host that a file is redirected to, compares no
//! digest, and ignores `HF_HUB_CACHE`, `HF_TOKEN` and `HF_HUB_OFFLINE`. A large file is checked by the SHA-256 that the hub states for it, a small one by
//! its name in git.
//!
//! Environment variables: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

pub mod http;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;
use ureq::http::StatusCode;

use crate::http::{Checksum, Client, Expected, Refused};

/// A repository of the hub and some of its files: the text after `hf://`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Whether it is a repository of data, not of a model.
    pub is_dataset: bool,
    /// Owner and name.
    pub name: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// A pattern for the paths of its files; empty for all.
    pub pattern: String,
}

impl Address {
    /// Parses the text after `hf://`.
    ///
    /// # Errors
    ///
    /// The message says what an address looks like.
    pub fn parse(text: &str) -> Result<Self> {
        let context = || {
            format!(
                "`hf://{text}` is not an address of the hub: one is like \
                 hf://datasets/owner/name@revision/path, without `datasets/` for a model"
            )
        };
        let (is_dataset, rest) = match text.strip_prefix("datasets/") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (owner, rest) = rest.split_once('/').with_context(context)?;
        let end = rest.find(['@', '/']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        let (revision, pattern) = match rest.strip_prefix('@') {
            Some(rest) => split_revision(rest),
            None => ("main", rest.trim_start_matches('/')),
        };
        let is_word = |word: &str| {
            !word.is_empty()
                && !word.starts_with('.')
                && word.chars().all(|sign| sign.is_ascii_alphanumeric() || "-_.".contains(sign))
        };
        let revision = revision.replace("%2F", "/");
        ensure!(is_word(owner) && is_word(name) && is_path(&revision), context());
        let name = format!("{owner}/{name}");
        Ok(Self { is_dataset, name, revision, pattern: pattern.to_owned() })
    }

    fn repo(&self) -> Repo {
        let kind = if self.is_dataset { RepoType::Dataset } else { RepoType::Model };
        Repo::with_revision(self.name.clone(), kind, self.revision.clone())
    }

    /// Where the hub lists the files of this revision.
    fn api_url(&self, endpoint: &str) -> String {
        let kind = if self.is_dataset { "datasets" } else { "models" };
        let revision = escaped(&self.revision).replace('/', "%2F");
        format!("{endpoint}/api/{kind}/{}/revision/{revision}?blobs=true", self.name)
    }

    /// Where the hub has the file `name` of a commit.
    fn file_url(&self, endpoint: &str, commit: &str, name: &str) -> String {
        let kind = if self.is_dataset { "datasets/" } else { "" };
        format!("{endpoint}/{kind}{}/resolve/{commit}/{}", self.name, escaped(name))
    }
}

/// `refs/pr/7` and `refs/convert/parquet` have slashes of their own.
fn split_revision(text: &str) -> (&str, &str) {
    let slashes = if text.starts_with("refs/") { 2 } else { 0 };
    match text.match_indices('/').nth(slashes) {
        Some((at, _)) => (&text[..at], &text[at + 1..]),
        None => (text, ""),
    }
}

/// The user's settings, from environment variables.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The server: `HF_ENDPOINT`.
    pub endpoint: String,
    /// Where files are kept: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// The user's access token: `HF_TOKEN`, or the file `HF_TOKEN_PATH`, or `token` in `HF_HOME`.
    pub token: Option<String>,
    /// Whether to use the cache only: `HF_HUB_OFFLINE`.
    pub is_offline: bool,
}

impl Settings {
    /// Settings from the variables that `variable` looks up.
    ///
    /// # Errors
    ///
    /// No cache folder is known.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let home = match variable("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => http::cache_folder()?.join("huggingface"),
        };
        let token_file = variable("HF_TOKEN_PATH").map_or(home.join("token"), PathBuf::from);
        let token = variable("HF_TOKEN").or_else(|| fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let is_yes = |value: String| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase());
        let endpoint = variable("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: variable("HF_HUB_CACHE").map_or(home.join("hub"), PathBuf::from),
            token,
            is_offline: variable("HF_HUB_OFFLINE").is_some_and(is_yes),
        })
    }
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
    let choose = |mut names: Vec<String>| {
        names.retain(|name| is_path(name));
        names.sort();
        choose(names)
    };
    let repo = address.repo();
    let kept = Cache::new(settings.cache.clone()).repo(repo.clone());
    let root = settings.cache.join(repo.folder_name());
    if settings.is_offline {
        let folder = kept_snapshot(address, &kept, &root)?;
        let mut names = Vec::new();
        list_files(&folder, "", &mut names)?;
        return Ok(Snapshot { names: choose(names)?, folder });
    }
    let url = address.api_url(&settings.endpoint);
    let text = client.text(&url, settings.token.as_deref()).map_err(explain_refusal);
    let text = text.with_context(|| {
        format!(
            "looking up {} on the hub; without a network, HF_HUB_OFFLINE=1 uses what is in `{}`",
            address.name,
            settings.cache.display()
        )
    })?;
    let info: Info = serde_json::from_str(&text)
        .with_context(|| format!("`{url}` does not answer as the hub does"))?;
    ensure!(is_commit(&info.sha), "the hub names `{}` as a commit", info.sha);
    ensure!(
        !is_commit(&address.revision) || address.revision == info.sha,
        "the hub has commit {} in place of {}",
        info.sha,
        address.revision
    );
    tracing::info!("{} is at commit {}", address.name, info.sha);
    let folder = kept.pointer_path(&info.sha);
    let siblings: BTreeMap<String, Sibling> =
        info.siblings.into_iter().map(|sibling| (sibling.rfilename.clone(), sibling)).collect();
    let names = choose(siblings.keys().cloned().collect())?;
    for name in &names {
        let url = address.file_url(&settings.endpoint, &info.sha, name);
        fetch_one(client, &url, settings, &siblings[name], &root, &folder)?;
    }
    if !is_commit(&address.revision) {
        kept.create_ref(&info.sha).context("writing into the cache of the hub")?;
    }
    Ok(Snapshot { folder, names })
}

/// Whether a path of a repository stays below the folder it is put into.
fn is_path(path: &str) -> bool {
    let is_part = |part: &str| !["", ".", ".."].contains(&part);
    !path.contains(['\0', ':', '\\']) && path.split('/').all(is_part)
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Says what to do about a refusal.
fn explain_refusal(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)) => error.context(
            "there is no such repository, or it is not public; check its name, accept its terms \
             where it is published, and set HF_TOKEN to a token that may read it",
        ),
        _ => error,
    }
}

/// The folder of the commit that was downloaded last.
fn kept_snapshot(address: &Address, kept: &CacheRepo, root: &Path) -> Result<PathBuf> {
    let commit = match is_commit(&address.revision) {
        true => Some(address.revision.clone()),
        false => fs::read_to_string(root.join("refs").join(&address.revision)).ok(),
    };
    let snapshot = commit.map(|commit| kept.pointer_path(commit.trim()));
    snapshot.filter(|snapshot| snapshot.is_dir()).with_context(|| {
        format!(
            "revision {} of {} is not in `{}`, and HF_HUB_OFFLINE forbids to download it; unset it",
            address.revision,
            address.name,
            root.display()
        )
    })
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

/// Downloads a file into `blobs` and links it from the snapshot.
fn fetch_one(
    client: &Client,
    url: &str,
    settings: &Settings,
    sibling: &Sibling,
    root: &Path,
    snapshot: &Path,
) -> Result<()> {
    let name = &sibling.rfilename;
    let (digest, bytes, blob) = match (&sibling.lfs, &sibling.blob_id) {
        (Some(lfs), _) => {
            let digest = Checksum::Sha256(lfs.sha256.clone());
            (digest, lfs.size.or(sibling.size), &lfs.sha256)
        }
        (None, Some(id)) => (Checksum::Git(id.clone()), sibling.size, id),
        (None, None) => bail!("the hub states no digest for `{name}`"),
    };
    let is_digest = blob.len() >= 40 && blob.bytes().all(|byte| byte.is_ascii_hexdigit());
    ensure!(is_digest, "the hub states `{blob}` as the digest of `{name}`");
    let (pointer, blob) = (snapshot.join(name), root.join("blobs").join(blob));
    if pointer.exists() {
        return Ok(());
    }
    if !blob.exists() {
        let partial = blob.with_extension("incomplete");
        let expected = Expected { bytes, digest };
        let token = settings.token.as_deref();
        client.fetch(url, token, &expected, &partial, &blob).map_err(explain_refusal)?;
    }
    link(&blob, &pointer, name).with_context(|| format!("linking `{}`", pointer.display()))
}

/// Links the file `name` of a snapshot to its blob, by a relative path, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path, name: &str) -> Result<()> {
    fs::create_dir_all(pointer.parent().context("a folder")?)?;
    // A link to a blob that was removed may be there.
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

/// Percent-encodes a path.
fn escaped(path: &str) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                text.push(byte.into());
            }
            byte => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let parse = |text: &str| Address::parse(text).expect(text);
        let plain = parse("datasets/ILSVRC/imagenet-1k");
        assert_eq!((plain.is_dataset, plain.name.as_str()), (true, "ILSVRC/imagenet-1k"));
        assert_eq!((plain.revision.as_str(), plain.pattern.as_str()), ("main", ""));
        let full = parse("datasets/a/b@v1.0/data/train-*.parquet");
        assert_eq!(
            (full.revision.as_str(), full.pattern.as_str()),
            ("v1.0", "data/train-*.parquet")
        );
        assert_eq!(parse("timm/resnet18.a1_in1k").name, "timm/resnet18.a1_in1k");
        assert!(!parse("timm/resnet18/model.safetensors").is_dataset);
        let converted = parse("datasets/a/b@refs/convert/parquet/default/*");
        assert_eq!(converted.revision, "refs/convert/parquet");
        assert_eq!(converted.pattern, "default/*");
        assert_eq!(parse("datasets/a/b@refs%2Fpr%2F7").revision, "refs/pr/7");
        assert_eq!(
            converted.api_url("https://hub"),
            "https://hub/api/datasets/a/b/revision/refs%2Fconvert%2Fparquet?blobs=true"
        );
        assert_eq!(
            parse("timm/net").file_url("https://hub", "0123", "a b/c.bin"),
            "https://hub/timm/net/resolve/0123/a%20b/c.bin"
        );
        for wrong in ["", "a", "datasets/a", "../a/b", "a/..", "a/b@../c", "a/b@", "a b/c", "a/b?x"]
        {
            assert!(Address::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn settings_are_those_of_the_environment() {
        let folder = tempfile::tempdir().expect("a folder");
        let home = folder.path().display().to_string();
        let read = |variables: &[(&str, &str)]| {
            let find = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            Settings::read(find).expect("a home")
        };
        fs::write(folder.path().join("token"), "of the file\n").expect("written");
        let settings = read(&[("HF_HOME", &home)]);
        assert_eq!(settings.endpoint, "https://huggingface.co");
        assert_eq!(settings.cache, folder.path().join("hub"));
        assert_eq!(settings.token.as_deref(), Some("of the file"));
        assert!(!settings.is_offline);
        let settings = read(&[
            ("HF_HOME", &home),
            ("HF_HUB_CACHE", "elsewhere"),
            ("HF_TOKEN", "of the variable"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert_eq!(settings.endpoint, "http://mirror");
        assert_eq!(settings.cache, Path::new("elsewhere"));
        assert_eq!(settings.token.as_deref(), Some("of the variable"));
        assert!(settings.is_offline);
        assert!(!read(&[("HF_HOME", &home), ("HF_HUB_OFFLINE", "0")]).is_offline);
        fs::write(folder.path().join("other"), "of another file").expect("written");
        let other = folder.path().join("other").display().to_string();
        let settings = read(&[("HF_HOME", &home), ("HF_TOKEN_PATH", &other)]);
        assert_eq!(settings.token.as_deref(), Some("of another file"));
    }
}
