//! JSON files that carry their own digest, such as `metrics.json`.
//!
//! The file is one object, a key per line, sorted. Its last line is `sha256`: the SHA-256 in hex of
//! the file's bytes with the 64 digits of the digest replaced by zeros.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{digest, files};

/// The text before the digits of the digest, and the text after them.
const BEFORE: &str = "  \"sha256\": \"";
const AFTER: &str = "\"\n}\n";

/// In place of the digest while it is computed.
const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Writes an object to `path`, with its digest.
///
/// # Errors
///
/// `value` is not an object, or the file cannot be written.
pub fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut value = serde_json::to_value(value)?;
    value.sort_all_objects();
    let Value::Object(object) = value else {
        bail!("`{}` must hold an object, not {value}", path.display())
    };
    let mut text = String::from("{\n");
    for (key, value) in &object {
        text += &format!("  {}: {value},\n", Value::from(key.as_str()));
    }
    text += BEFORE;
    let digest = digest_of(&text);
    files::write(path, (text + &digest + AFTER).as_bytes())
}

/// Reads an object from `path` and checks its digest.
///
/// # Errors
///
/// The file is missing, was changed since it was written, or holds other values than `T`.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("reading `{}`", path.display()))?;
    let digits = text.rfind(BEFORE).map(|at| at + BEFORE.len());
    let (before, digest) = digits
        .and_then(|at| Some((&text[..at], text[at..].strip_suffix(AFTER)?)))
        .with_context(|| {
            format!(
                "`{}` has no digest: it is damaged or of an older version; run its step again",
                path.display()
            )
        })?;
    ensure!(
        digest == digest_of(before),
        "`{}` was changed after it was written: its digest is wrong; run its step again",
        path.display()
    );
    serde_json::from_str(&text)
        .with_context(|| format!("`{}` does not hold the expected values", path.display()))
}

/// Returns the digest of the file that begins with `before`.
fn digest_of(before: &str) -> String {
    digest::sha256([before, ZEROS, AFTER].concat().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_written_is_read_and_its_digest_can_be_computed_elsewhere() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("x.json");
        write(&path, &json!({"b": [0.1, null], "a": {"d": 1, "c": "\"\n"}}))?;
        let text = fs::read_to_string(&path)?;
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..3], ["{", r#"  "a": {"c":"\"\n","d":1},"#, r#"  "b": [0.1,null],"#]);
        let digest = lines[3].split('"').nth(3).expect("a digest");
        assert_eq!(digest::sha256(text.replace(digest, ZEROS).as_bytes()), digest);
        let read: BTreeMap<String, Value> = read(&path)?;
        assert_eq!(read["a"]["c"], "\"\n");
        assert!(write(&path, &json!([1])).is_err());
        Ok(())
    }

    #[test]
    fn every_changed_byte_and_every_cut_is_found() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("x.json");
        write(&path, &json!({"acc": 0.25, "name": "ä"}))?;
        let written = fs::read(&path)?;
        for i in 0..written.len() {
            for bit in 0..8 {
                let mut changed = written.clone();
                changed[i] ^= 1 << bit;
                fs::write(&path, changed)?;
                let error = read::<Value>(&path).expect_err("changed").to_string();
                assert!(error.contains("x.json"), "{error}");
            }
            fs::write(&path, &written[..i])?;
            assert!(read::<Value>(&path).is_err(), "cut at {i}");
        }
        Ok(())
    }
}
