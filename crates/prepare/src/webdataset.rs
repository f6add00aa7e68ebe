//! Reads WebDataset: tar archives in which the files of one sample share a key.
//!
//! The key of `000/17.jpg`, `000/17.cls` and `000/17.json` is `000/17`. The class is the text of
//! `.cls`, or else `label`, `cls`, `class` or `class_name` of the `.json`. Several shards are one
//! data set; a shard belongs to the test split if its name says so.
//!
//! Keys may contain dots, and the files of a sample may be anywhere in their shard. A picture's
//! label is in the `.cls` or `.json` whose stem is the longest prefix of the picture's name that
//! ends before a dot. So each shard is read in two passes, first for labels, then for pictures. Of
//! the pictures that share a label, the one with the fewest extensions is read (`17.jpg` before
//! `17.depth.png`), and the others are listed as skipped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use stage::Split;

use crate::archive::{self, Member};
use crate::collection::{Load, Sink};
use crate::folder::SOURCE;
use crate::labels::class_for;
use crate::names::{self, split_name, split_of};
use crate::picture;
use crate::sorter::{SortedRecords, Sorter};

/// Splits a path at the last dot of its file name.
pub fn stem_and_extension(name: &str) -> (&str, &str) {
    let file = name.len() - split_name(name).1.len();
    match name[file..].rfind('.') {
        Some(point) => (&name[..file + point], &name[file + point + 1..]),
        None => (name, ""),
    }
}

/// The possible keys of a path, longest first: the path itself, and its prefixes before each dot of
/// the file name.
pub fn keys(name: &str) -> impl Iterator<Item = &str> {
    let file = name.len() - split_name(name).1.len();
    let points = name[file..].rmatch_indices('.').map(move |(at, _)| file + at);
    std::iter::once(name.len()).chain(points).map(|end| &name[..end])
}

/// The size limit for a `.cls` or `.json` file, in bytes.
const MOST_TEXT_BYTES: u64 = 1 << 20;

/// The content of a `.cls` or `.json` file beside a picture.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Sidecar {
    /// Its class.
    pub label: Option<String>,
    /// The file name of the picture in the original data set.
    filename: Option<String>,
    is_cls: bool,
}

impl Sidecar {
    /// Reads a `.cls` or `.json` file. One that is too long or invalid gives no label.
    ///
    /// # Errors
    ///
    /// The archive is damaged.
    pub fn read(member: &mut dyn Member) -> Result<Self> {
        let is_cls = member.name().as_ref().is_ok_and(|name| !is_json(name));
        let bytes = member.read(MOST_TEXT_BYTES)?.unwrap_or_default();
        if is_cls {
            let label = Some(names::text(bytes.trim_ascii())).filter(|label| !label.is_empty());
            return Ok(Self { label, filename: None, is_cls });
        }
        let json: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
        let field = |key: &str| match json.as_ref()?.get(key)? {
            serde_json::Value::String(text) => Some(text.clone()),
            serde_json::Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let label = ["label", "cls", "class", "class_name"].into_iter().find_map(field);
        Ok(Self { label, filename: field("filename"), is_cls })
    }
}

fn is_json(name: &str) -> bool {
    stem_and_extension(name).1.eq_ignore_ascii_case("json")
}

fn is_sidecar(name: &str) -> bool {
    is_json(name) || stem_and_extension(name).1.eq_ignore_ascii_case("cls")
}

/// Reads the samples of all shards as one data set. Of a single shard, reads those below its folder
/// `within`.
///
/// # Errors
///
/// A shard is damaged, or there are no pictures.
pub fn read(
    shards: &[PathBuf],
    within: &str,
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    let mut samples = 0;
    for (shard, name) in shards.iter().zip(names::below_common_folder(shards)) {
        let mut labels = ShardLabels::of(shard, within, sink)?;
        let prefix = if shards.len() > 1 { format!("{name}/") } else { String::new() };
        let split = split_of(&name);
        archive::each(shard, within, |member| {
            let inner = match member.name() {
                Ok(inner) => inner.clone(),
                Err((name, reason)) => {
                    sink.ignored(format!("{prefix}{name}"), (*reason).to_owned())?;
                    return Ok(true);
                }
            };
            let name = format!("{prefix}{inner}");
            if !is_sidecar(&inner) && !is_picture(member, &inner)? {
                sink.ignored(name, "is not a picture".into())?;
                return Ok(true);
            }
            match labels.next()? {
                Verdict::Nothing => {}
                Verdict::LeftOut(reason) => sink.ignored(name, reason)?,
                Verdict::Picture { label, filename } => {
                    samples += 1;
                    let file = filename.as_deref().unwrap_or("");
                    let class = class_for(label, &[&inner, file], classes);
                    hand_over(member, name, class, split, sink)?;
                }
            }
            Ok(true)
        })?;
    }
    ensure!(samples > 0, "the shards hold no pictures; pass another source with {SOURCE}");
    Ok(())
}

fn is_picture(member: &mut dyn Member, name: &str) -> Result<bool> {
    Ok(picture::has_extension(name) || picture::is_start(&member.start()?))
}

fn hand_over(
    member: &mut dyn Member,
    name: String,
    class: Option<String>,
    split: Split,
    sink: &mut dyn Sink,
) -> Result<()> {
    if let Some(class) = &class
        && !sink.wants(class)?
    {
        return Ok(());
    }
    let load = match sink.is_known() {
        true => Load::Known,
        false => match member.read(sink.file_bytes())? {
            Ok(bytes) => Load::Bytes(bytes),
            Err(reason) => Load::Broken(reason),
        },
    };
    sink.picture(name, class.as_deref(), split, load)
}

/// A picture or sidecar of a shard.
#[derive(Serialize, Deserialize)]
struct ShardPart {
    /// Its index among the pictures and sidecars of the shard.
    place: u64,
    name: String,
    sidecar: Option<Sidecar>,
}

/// What to do with a picture or sidecar.
#[derive(Serialize, Deserialize)]
enum Verdict {
    /// Read the picture with this label.
    Picture { label: Option<String>, filename: Option<String> },
    /// Nothing: a sidecar that was used.
    Nothing,
    /// Skip it, for this reason.
    LeftOut(String),
}

/// The verdicts on the pictures and sidecars of a shard, in shard order. They are sorted on disk,
/// so memory does not grow with their number.
struct ShardLabels {
    verdicts: SortedRecords,
}

impl ShardLabels {
    /// Reads a shard's names and labels and decides on every picture and sidecar.
    fn of(shard: &Path, within: &str, sink: &dyn Sink) -> Result<Self> {
        let mut parts = Sorter::new(sink.folder());
        let mut place = 0u64;
        archive::each(shard, within, |member| {
            let Ok(name) = member.name().clone() else { return Ok(true) };
            let sidecar = match is_sidecar(&name) {
                true => Some(Sidecar::read(member)?),
                false if is_picture(member, &name)? => None,
                false => return Ok(true),
            };
            let part = serde_json::to_vec(&ShardPart { place, name: name.clone(), sidecar })?;
            // The shortest key, which all parts of a sample share; names have no zero byte.
            let key = keys(&name).last().unwrap_or(&name);
            parts.push(&[key.as_bytes(), &[0], &place.to_be_bytes(), &part])?;
            place += 1;
            Ok(true)
        })?;
        let mut verdicts = Sorter::new(sink.folder());
        let mut group: Vec<ShardPart> = Vec::new();
        let mut last_key = Vec::new();
        for record in parts.sorted()? {
            let record = record?;
            let end = record.iter().position(|&byte| byte == 0).context("a key")?;
            if last_key != record[..end] {
                decide(&group, &mut verdicts)?;
                group.clear();
                last_key = record[..end].to_owned();
            }
            group.push(serde_json::from_slice(&record[end + 9..])?);
        }
        decide(&group, &mut verdicts)?;
        Ok(Self { verdicts: verdicts.sorted()? })
    }

    /// Returns the verdict on the next picture or sidecar.
    fn next(&mut self) -> Result<Verdict> {
        let record = self.verdicts.next().context("the shard changed while it was read")??;
        Ok(serde_json::from_slice(&record[8..])?)
    }
}

/// The sidecars and pictures of one key.
#[derive(Default)]
struct Sample<'a> {
    sidecars: Vec<&'a ShardPart>,
    pictures: Vec<&'a ShardPart>,
}

/// Decides on parts whose names are equal up to their first dot.
fn decide(group: &[ShardPart], verdicts: &mut Sorter) -> Result<()> {
    let mut add = |part: &ShardPart, verdict: Verdict| {
        verdicts.push(&[&part.place.to_be_bytes(), &serde_json::to_vec(&verdict)?])
    };
    let mut samples: BTreeMap<&str, Sample> = BTreeMap::new();
    for part in group.iter().filter(|part| part.sidecar.is_some()) {
        samples.entry(stem_and_extension(&part.name).0).or_default().sidecars.push(part);
    }
    for part in group.iter().filter(|part| part.sidecar.is_none()) {
        match keys(&part.name).find(|key| samples.contains_key(key)) {
            Some(key) => samples.entry(key).or_default().pictures.push(part),
            None => add(part, Verdict::Picture { label: None, filename: None })?,
        }
    }
    for (key, mut sample) in samples {
        sample
            .pictures
            .sort_by_key(|part| (part.name[key.len()..].matches('.').count(), part.place));
        for (number, part) in sample.pictures.iter().enumerate() {
            add(
                part,
                match number {
                    0 => sample.verdict(),
                    _ => Verdict::LeftOut(format!("is a further picture of the sample `{key}`")),
                },
            )?;
        }
        for part in &sample.sidecars {
            add(
                part,
                match sample.pictures.is_empty() {
                    false => Verdict::Nothing,
                    true => Verdict::LeftOut("is a label without a picture".into()),
                },
            )?;
        }
    }
    Ok(())
}

impl Sample<'_> {
    /// The verdict on its first picture, with the label of `.cls` if there is one.
    fn verdict(&self) -> Verdict {
        let mut sidecars: Vec<&Sidecar> =
            self.sidecars.iter().filter_map(|part| part.sidecar.as_ref()).collect();
        sidecars.sort_by_key(|sidecar| !sidecar.is_cls);
        let label = sidecars.iter().find_map(|sidecar| sidecar.label.clone());
        Verdict::Picture { label, filename: sidecars.iter().find_map(|s| s.filename.clone()) }
    }
}
