//! A manifest in CSV: which files are pictures, and their classes if they are known.
//!
//! The first line names the columns: one of `path`, `file`, `filename`, `image` and their kin has the
//! paths, seen from the manifest's folder; one of `label`, `class`, `category` and `target`, if it is
//! there, the classes; `split`, if it is there, `train`, `test` or `unlabelled`. A file without such a
//! line has the path first and the class, if any, second. Fields are parted by commas, in `.tsv` by
//! tabs.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use csv::{ReaderBuilder, StringRecord};
use stage::Split;

use crate::collection::{Load, Sink};
use crate::labels::class_for;
use crate::names::split_of;
use crate::picture;

/// What a column of paths may be called.
pub const PATHS: [&str; 8] =
    ["path", "file", "filename", "file_name", "filepath", "image", "image_path", "img"];

const LABELS: [&str; 5] = ["label", "class", "category", "target", "class_name"];

/// The longest line, so that a quotation mark without its partner does not make one of a whole
/// file.
const MOST_LINE_BYTES: u64 = 1 << 20;

/// Where a file that a manifest names lies.
pub fn beside(manifest: &Path, path: &str) -> PathBuf {
    manifest.parent().unwrap_or(Path::new("")).join(path)
}

/// Whether a file is named as a manifest.
pub fn is_manifest(name: &str) -> bool {
    [".csv", ".tsv"].iter().any(|ending| name.to_ascii_lowercase().ends_with(ending))
}

/// Reads a manifest; its pictures are named by their paths in it.
///
/// # Errors
///
/// It is not CSV, has no column of paths, or a line is too long.
pub fn read(manifest: &Path, classes: &[String], sink: &mut dyn Sink) -> Result<()> {
    let context = || format!("reading the manifest `{}`", manifest.display());
    let file = File::open(manifest).with_context(context)?;
    read_from(file, manifest, classes, sink).with_context(context)
}

fn read_from(
    file: impl Read,
    manifest: &Path,
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    let delimiter = match manifest.extension().is_some_and(|extension| extension == "tsv") {
        true => b'\t',
        false => b',',
    };
    let left = Rc::new(Cell::new(0));
    let limited = Limited { inner: BufReader::new(file), left: left.clone() };
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(limited);
    let mut record = StringRecord::new();
    let mut next = |record: &mut StringRecord| {
        left.set(MOST_LINE_BYTES);
        reader.read_record(record)
    };
    ensure!(next(&mut record)?, "it is empty");
    if let Some(first) = record.get(0).and_then(|first| first.strip_prefix('\u{feff}')) {
        let rest = record.iter().skip(1);
        record = std::iter::once(first).chain(rest).collect();
    }
    let named = |names: &[&str]| {
        record.iter().position(|field| names.contains(&field.to_ascii_lowercase().as_str()))
    };
    let (path, label, split) = (named(&PATHS), named(&LABELS), named(&["split"]));
    let first_is_picture = record.get(0).is_some_and(picture::has_extension);
    let (path, label, mut there) = match path {
        Some(path) => (path, label, next(&mut record)?),
        None => {
            ensure!(
                first_is_picture,
                "its first line names no column of paths: call one of them `path`, and that of \
                 classes, if there are any, `label`"
            );
            (0, Some(1), true)
        }
    };
    while there {
        if let Some(path) = record.get(path).filter(|path| !path.is_empty()) {
            let label = label.and_then(|at| record.get(at)).filter(|label| !label.is_empty());
            let class = class_for(label.map(str::to_owned), &[path], classes);
            let split = split.and_then(|at| record.get(at)).map_or(Split::Train, split_of);
            let wanted = match &class {
                Some(class) => sink.wants(class)?,
                None => true,
            };
            if wanted {
                let load = Load::File(beside(manifest, path));
                sink.picture(path.to_owned(), class.as_deref(), split, load)?;
            }
        }
        there = next(&mut record)?;
    }
    Ok(())
}

/// Passes on so many bytes, then fails.
struct Limited<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let left = self.left.get().checked_sub(read as u64);
        self.left.set(left.ok_or_else(|| {
            io::Error::other(format!("a line of more than {MOST_LINE_BYTES} bytes"))
        })?);
        Ok(read)
    }
}
