//! Addresses: the text after `hf://`.

use anyhow::{Context, Result, ensure};
use hf_hub::{Repo, RepoType};

use crate::repository::is_path;

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

    pub(crate) fn repo(&self) -> Repo {
        let kind = if self.is_dataset { RepoType::Dataset } else { RepoType::Model };
        Repo::with_revision(self.name.clone(), kind, self.revision.clone())
    }

    /// The address at which the hub lists the files of this revision.
    pub(crate) fn api_url(&self, endpoint: &str) -> String {
        let kind = if self.is_dataset { "datasets" } else { "models" };
        let revision = escaped(&self.revision).replace('/', "%2F");
        format!("{endpoint}/api/{kind}/{}/revision/{revision}?blobs=true", self.name)
    }

    /// The address of the file `name` at a commit.
    pub(crate) fn file_url(&self, endpoint: &str, commit: &str, name: &str) -> String {
        let kind = if self.is_dataset { "datasets/" } else { "" };
        format!("{endpoint}/{kind}{}/resolve/{commit}/{}", self.name, escaped(name))
    }
}

/// Splits the text after `@` into revision and path. `refs/pr/7` and `refs/convert/parquet` contain slashes.
fn split_revision(text: &str) -> (&str, &str) {
    let slashes = if text.starts_with("refs/") { 2 } else { 0 };
    match text.match_indices('/').nth(slashes) {
        Some((at, _)) => (&text[..at], &text[at + 1..]),
        None => (text, ""),
    }
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
}
