//! Reads a manifest in CSV: a list of paths of pictures, with their classes if known.
//!
//! The first line names the columns. One column has the paths of pictures, relative to the folder
//! of the manifest; its name is `path`, `file`, `filename`, `image` or similar. Optional columns
//! are the class (`label`, `class`, `category` or `target`) and `split` (`train`, `test` or
//! `unlabelled`). Without such a first line, the first column is the path and the second, if any,
//! the class.
//!
//! The separator is a comma, semicolon, tab or bar. It is detected from the first line, or stated
//! by a line `sep=;` as spreadsheets write it. The text is UTF-8, or UTF-16 with a byte order mark.
//! A path with backslashes that does not exist is read as a Windows path.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use csv::{ReaderBuilder, StringRecord};
use stage::Split;

use crate::collection::{Load, Sink};
use crate::labels::class_for;
use crate::names::split_of;
use crate::picture;

/// Names of a column of paths.
pub const PATHS: [&str; 8] =
    ["path", "file", "filename", "file_name", "filepath", "image", "image_path", "img"];

/// Names of a column of classes.
const LABELS: [&str; 5] = ["label", "class", "category", "target", "class_name"];

/// The longest line, so that an unclosed quotation mark does not turn a whole file into one line.
const MOST_LINE_BYTES: u64 = 1 << 20;

/// Returns the name of a picture in a manifest, and its path.
pub fn locate(manifest: &Path, path: &str) -> (String, PathBuf) {
    let folder = manifest.parent().unwrap_or(Path::new(""));
    let place = folder.join(path);
    match path.contains('\\') && !place.exists() {
        true => {
            let path = path.replace('\\', "/");
            (path.clone(), folder.join(path))
        }
        false => (path.to_owned(), place),
    }
}

/// Whether a file has the name of a manifest.
pub fn is_manifest(name: &str) -> bool {
    [".csv", ".tsv"].iter().any(|ending| name.to_ascii_lowercase().ends_with(ending))
}

/// Reads a manifest. Its pictures are named by their paths in it.
///
/// # Errors
///
/// The file is not CSV, has no column of paths, or a line is too long.
pub fn read(manifest: &Path, classes: &[String], sink: &mut dyn Sink) -> Result<()> {
    let context = || format!("reading the manifest `{}`", manifest.display());
    let text = open(manifest, sink.file_bytes()).with_context(context)?;
    read_from(text, manifest, classes, sink).with_context(context)
}

/// Opens a manifest as UTF-8 without a byte order mark. UTF-16 is held in memory, up to `most`
/// bytes.
fn open(manifest: &Path, most: u64) -> Result<Box<dyn BufRead>> {
    let mut file = BufReader::new(File::open(manifest)?);
    let start = file.fill_buf()?;
    let word = match start {
        [0xff, 0xfe, ..] => u16::from_le_bytes,
        [0xfe, 0xff, ..] => u16::from_be_bytes,
        [0xef, 0xbb, 0xbf, ..] => {
            file.consume(3);
            return Ok(Box::new(file));
        }
        _ => {
            ensure!(
                !start.contains(&0),
                "it holds zero bytes, so it is not text, or UTF-16 without its byte order mark; save \
                 it as UTF-8"
            );
            return Ok(Box::new(file));
        }
    };
    file.consume(2);
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= most, "it is UTF-16 of more than {most} bytes; save it as UTF-8");
    let words: Vec<u16> = bytes.chunks_exact(2).map(|pair| word([pair[0], pair[1]])).collect();
    let text = String::from_utf16(&words).context("it is not UTF-16; save it as UTF-8")?;
    Ok(Box::new(io::Cursor::new(text)))
}

fn read_from(
    mut text: impl BufRead,
    manifest: &Path,
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    let mut first = Vec::new();
    (&mut text).take(MOST_LINE_BYTES).read_until(b'\n', &mut first)?;
    let delimiter = match first.strip_prefix(b"sep=") {
        Some(&[delimiter, ..]) => {
            first.clear();
            delimiter
        }
        _ => delimiter_of(&first, manifest),
    };
    let left = Rc::new(Cell::new(0));
    let limited = Limited { inner: io::Cursor::new(first).chain(text), left: left.clone() };
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(limited);
    let mut record = StringRecord::new();
    let mut next = |record: &mut StringRecord| {
        left.set(MOST_LINE_BYTES);
        let read = reader.read_record(record);
        read.map_err(|error| match error.kind() {
            csv::ErrorKind::Utf8 { pos, .. } => {
                let line = pos.as_ref().map_or(0, csv::Position::line);
                anyhow::anyhow!("line {line} is not UTF-8; save the manifest as UTF-8")
            }
            _ => error.into(),
        })
    };
    ensure!(next(&mut record)?, "it is empty");
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
                "its first line names no column of paths, only `{}`: call the column of paths `path`, \
                 and the column of classes, if any, `label`",
                record.iter().take(8).collect::<Vec<_>>().join("`, `")
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
                let (name, place) = locate(manifest, path);
                sink.picture(name, class.as_deref(), split, Load::File(place))?;
            }
        }
        there = next(&mut record)?;
    }
    Ok(())
}

/// Returns the separator with which the first line names a column of paths, or else begins with the
/// path of a picture.
fn delimiter_of(first: &[u8], manifest: &Path) -> u8 {
    let is_tsv =
        manifest.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("tsv"));
    let candidates = if is_tsv { *b"\t,;|" } else { *b",;\t|" };
    let line = String::from_utf8_lossy(first).to_ascii_lowercase();
    let fields = |delimiter: u8| {
        let trim = |field: &str| field.trim().trim_matches('"').to_owned();
        line.split(char::from(delimiter)).map(trim).collect::<Vec<_>>()
    };
    let names_paths =
        |&delimiter: &u8| fields(delimiter).iter().any(|field| PATHS.contains(&field.as_str()));
    let begins_with_picture = |&delimiter: &u8| matches!(&fields(delimiter)[..], [first, _, ..] if picture::has_extension(first));
    let found = candidates.into_iter().find(names_paths);
    found.or(candidates.into_iter().find(begins_with_picture)).unwrap_or(candidates[0])
}

/// Reads `left` bytes, then fails.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::{PreparedFiles, assert_has, config, png, prepare, put, refusal, scratch};

    /// Makes four pictures in two folders, and a manifest of this name and content.
    fn with_manifest(name: &str, content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let (folder, path) = scratch();
        let names = ["img/cat/0.png", "img/cat/1.png", "img/dog/2.png", "img/dog/3.png"];
        for (seed, name) in names.into_iter().enumerate() {
            put(&path.join(name), &png(seed));
        }
        put(&path.join(name), content);
        (folder, path.join(name))
    }

    fn read(name: &str, content: &[u8]) -> PreparedFiles {
        let (_folder, path) = with_manifest(name, content);
        prepare(&path, &config()).unwrap_or_else(|error| panic!("{name}: {error:#}"))
    }

    #[test]
    fn every_dialect_of_csv_gives_the_same_data_set() {
        let plain = "path,label\nimg/cat/0.png,cat\nimg/cat/1.png,cat\nimg/dog/2.png,dog\n\
                     img/dog/3.png,dog\n";
        let want = read("plain.csv", plain.as_bytes());
        assert_eq!(want.class_names, ["cat", "dog"]);
        let with = |from: &str, to: &str| plain.replace(from, to);
        let utf16 = |text: &str, bytes: fn(u16) -> [u8; 2]| -> Vec<u8> {
            format!("\u{feff}{text}").encode_utf16().flat_map(bytes).collect()
        };
        let cases: [(&str, Vec<u8>); 12] = [
            ("semicolons.csv", with(",", ";").into()),
            ("tabs.csv", with(",", "\t").into()),
            ("tabs.TSV", with(",", "\t").into()),
            ("commas.tsv", plain.into()),
            ("bars.csv", with(",", " | ").into()),
            ("quoted.csv", with("path,label", "\"Path\",\"Label\"").replace(',', ";").into()),
            ("stated.csv", format!("sep=;\r\n{}", with(",", ";").replace('\n', "\r\n")).into()),
            ("windows.csv", with("/", "\\").replace('\n', "\r\n").into()),
            ("marked.csv", format!("\u{feff}{plain}").into()),
            ("utf16le.csv", utf16(&with(",", "\t"), u16::to_le_bytes)),
            ("utf16be.csv", utf16(plain, u16::to_be_bytes)),
            ("bare.csv", with("path,label\n", "").replace(',', ";").into()),
        ];
        for (name, content) in cases {
            let read = read(name, &content);
            assert!(read.bytes == want.bytes, "{name}");
            assert_eq!((&read.names, &read.classes), (&want.names, &want.classes), "{name}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_file_with_a_backslash_in_its_name_is_that_file() {
        let (_folder, path) = with_manifest("m.csv", b"path\nimg\\cat\\0.png\nimg/cat/0.png\n");
        put(&path.with_file_name("img\\cat\\0.png"), &png(7));
        let read = prepare(&path, &config()).expect("sound");
        assert_eq!(read.names.len(), 2);
        assert_eq!(read.picture("img\\cat\\0.png").pixels, crate::example::colour(7).into_bytes());
    }

    #[test]
    fn errors_say_how_to_repair_a_manifest() {
        let cases: [(&str, &[u8], &[&str]); 4] = [
            ("other.csv", b"name;age\nA;1\n", &["`name;age`", "call the column of paths `path`"]),
            ("latin1.csv", b"path\nimg/cat/0.png\nimg/K\xfche.png\n", &["line 3", "as UTF-8"]),
            ("zeros.csv", b"p\0a\0t\0h\0\n\0", &["zero bytes", "as UTF-8"]),
            ("half.csv", b"\xff\xfe\x00\xd8\x00\xd8", &["not UTF-16", "as UTF-8"]),
        ];
        for (name, content, parts) in cases {
            let (_folder, path) = with_manifest(name, content);
            assert_has(&refusal(&path, &config()), &[&[name], parts].concat());
        }
    }
}
