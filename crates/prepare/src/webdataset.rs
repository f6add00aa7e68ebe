//! WebDataset: tar archives in which the files of one sample lie side by side under one key.
//!
//! Of `000/17.jpg`, `000/17.cls` and `000/17.json` the key is `000/17`: the path up to the first point
//! of its last part. The class is what `.cls` says, else `label`, `cls`, `class` or `class_name` of
//! the `.json`. Several shards are one set; a shard belongs to the test split if its name says so.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use stage::Split;

use crate::archive::{self, Member};
use crate::collection::{Load, Sink};
use crate::folder::SOURCE;
use crate::labels::class_for;
use crate::names::{file_name, split_name, split_of};
use crate::picture;

/// The key of a file's sample, and what is left of its name.
pub fn key_and_extension(name: &str) -> (&str, &str) {
    let file = name.len() - split_name(name).1.len();
    match name[file..].find('.') {
        Some(point) => (&name[..file + point], &name[file + point + 1..]),
        None => (name, ""),
    }
}

/// Whether a file beside a picture tells its class.
pub fn is_sidecar(extension: &str) -> bool {
    ["cls", "json"].contains(&extension.to_ascii_lowercase().as_str())
}

/// The longest `.cls` and `.json`.
const MOST_TEXT_BYTES: u64 = 1 << 20;

/// Reads the samples of all shards.
///
/// # Errors
///
/// A shard is damaged, or there are no samples.
pub fn read(shards: &[PathBuf], classes: &[String], sink: &mut dyn Sink) -> Result<()> {
    let mut samples = 0;
    for shard in shards {
        let name = file_name(shard);
        let prefix = if shards.len() > 1 { format!("{name}/") } else { String::new() };
        let mut sample = Sample::default();
        let mut hand_over = |sample: &mut Sample, sink: &mut dyn Sink| {
            samples += usize::from(sample.picture.is_some());
            sample.hand_over(&prefix, split_of(&name), classes, sink)
        };
        archive::each(shard, |member| {
            let inner = match member.name() {
                Ok(inner) => inner.clone(),
                Err((name, reason)) => {
                    hand_over(&mut sample, sink)?;
                    sink.ignored(format!("{prefix}{name}"), reason.clone())?;
                    return Ok(true);
                }
            };
            let (key, extension) = key_and_extension(&inner);
            if sample.key != key {
                hand_over(&mut sample, sink)?;
                sample.key = key.to_owned();
            }
            sample.take(member, &inner, extension, sink)?;
            Ok(true)
        })?;
        hand_over(&mut sample, sink)?;
    }
    ensure!(
        samples > 0,
        "the shards hold no pictures with `.cls` or `.json` beside them; name another source with \
         {SOURCE}"
    );
    Ok(())
}

/// The files of one key, as far as they were met.
#[derive(Default)]
struct Sample {
    key: String,
    picture: Option<(String, Load)>,
    cls: Option<String>,
    json: Option<serde_json::Value>,
}

impl Sample {
    fn take(
        &mut self,
        member: &mut dyn Member,
        name: &str,
        extension: &str,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        if is_sidecar(extension) {
            // A class in a file that is too long to name one is not known.
            let bytes = member.read(MOST_TEXT_BYTES)?.unwrap_or_default();
            match extension.eq_ignore_ascii_case("cls") {
                true => self.cls = Some(String::from_utf8_lossy(&bytes).trim().to_owned()),
                false => self.json = serde_json::from_slice(&bytes).ok(),
            }
        } else if picture::has_extension(name) && self.picture.is_none() {
            let load = match sink.is_known() {
                true => Load::Known,
                false => match member.read(sink.file_bytes())? {
                    Ok(bytes) => Load::Bytes(bytes),
                    Err(reason) => Load::Broken(reason),
                },
            };
            self.picture = Some((name.to_owned(), load));
        }
        Ok(())
    }

    fn hand_over(
        &mut self,
        prefix: &str,
        split: Split,
        classes: &[String],
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let Self { picture, cls, json, .. } = std::mem::take(self);
        let Some((name, load)) = picture else { return Ok(()) };
        let field = |key: &str| match json.as_ref()?.get(key)? {
            serde_json::Value::String(text) => Some(text.clone()),
            serde_json::Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let label = cls
            .filter(|cls| !cls.is_empty())
            .or_else(|| ["label", "cls", "class", "class_name"].into_iter().find_map(field));
        let file = field("filename");
        let class = class_for(label, &[&name, file.as_deref().unwrap_or("")], classes);
        if let Some(class) = &class
            && !sink.wants(class)?
        {
            return Ok(());
        }
        sink.picture(format!("{prefix}{name}"), class.as_deref(), split, load)
    }
}
