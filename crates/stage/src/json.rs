//! JSON that carries its own digest: files such as `metrics.json`, and the lines of a log.
//!
//! A file is one object, a key per line, sorted. Its last line is `sha256`: the SHA-256 in hex of
//! the file's bytes with the 64 digits of the digest replaced by zeros.
//!
//! A line of a log is one object. Its last key is `crc32`: the CRC-32 in hex of the line without that
//! key and the comma before it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

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

/// Returns a non-empty object as a line of a log, without the line break.
pub fn to_line(object: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(object)?;
    let body = text.strip_suffix('}').context("a line of a log is an object")?;
    Ok(format!("{body}{BEFORE_CRC}{}{AFTER_CRC}", crc_of(body)))
}

/// Reads a line of a log and checks its digest.
///
/// # Errors
///
/// The line was changed since it was written, or cut off.
pub fn of_line(line: &str) -> Result<Map<String, Value>> {
    let (body, crc) = line
        .strip_suffix(AFTER_CRC)
        .and_then(|line| line.rsplit_once(BEFORE_CRC))
        .context("the line has no digest: it is damaged or of an older version")?;
    ensure!(crc == crc_of(body), "the line was changed after it was written: its digest is wrong");
    Ok(serde_json::from_str(line)?)
}

/// The text before the digits of a line's digest, and the text after them.
const BEFORE_CRC: &str = ",\"crc32\":\"";
const AFTER_CRC: &str = "\"}";

/// Returns the digest of an object, given as `body` without its closing brace.
fn crc_of(body: &str) -> String {
    let mut hash = crc32fast::Hasher::new();
    hash.update(body.as_bytes());
    hash.update(b"}");
    format!("{:08x}", hash.finalize())
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
    fn every_changed_byte_and_every_cut_of_a_line_is_found() -> Result<()> {
        let object = json!({"epoch": 3, "loss": 0.5, "phase": "start"});
        let line = to_line(&object)?;
        // The CRC-32 of `{"epoch":3,"loss":0.5,"phase":"start"}`, by zlib.
        assert_eq!(line, r#"{"epoch":3,"loss":0.5,"phase":"start","crc32":"3c11f825"}"#);
        assert_eq!(of_line(&line)?["loss"], 0.5);
        for i in 0..line.len() {
            for bit in 0..7 {
                let mut changed = line.clone().into_bytes();
                changed[i] ^= 1 << bit;
                assert!(of_line(&String::from_utf8(changed)?).is_err(), "bit {bit} of byte {i}");
            }
            assert!(of_line(&line[..i]).is_err(), "cut at {i}");
        }
        assert!(to_line(&json!(3)).is_err());
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
