//! Small sources for the tests, made where they are needed.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use data::images::Identical;
use data::{Images, Labels, Names, Picture};
use flate2::Compression;
use flate2::write::GzEncoder;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};

use crate::{Config, Format};

/// A table that keeps everything.
pub fn config() -> Config {
    Config {
        source: String::new(),
        format: Format::Auto,
        classes: Vec::new(),
        images_per_class: 0,
        images_at_most: 0,
        channels: 3,
        broken_share: 0.0,
        identical: Identical::Keep,
    }
}

/// A folder that is gone after the test.
pub fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    (folder, path)
}

/// Writes a file, and the folders it lies in.
pub fn put(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    fs::write(path, bytes).expect("written");
}

/// Pixels without symmetry, other ones for each `seed`.
pub fn pixels(height: usize, width: usize, channels: usize, seed: usize) -> Vec<u8> {
    let value = |i: usize| (i * i * 7 + i * (seed + 3) * 13 + seed * 101) % 251;
    (0..height * width * channels).map(|i| value(i) as u8).collect()
}

/// A picture of 4 rows and 6 columns in colour.
pub fn colour(seed: usize) -> DynamicImage {
    RgbImage::from_raw(6, 4, pixels(4, 6, 3, seed)).expect("fits").into()
}

/// A picture of 4 rows and 6 columns in grey.
pub fn grey(seed: usize) -> DynamicImage {
    GrayImage::from_raw(6, 4, pixels(4, 6, 1, seed)).expect("fits").into()
}

/// A file of a picture.
pub fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, format).expect("encoded");
    file.into_inner()
}

/// A PNG file, another one for each `seed`.
pub fn png(seed: usize) -> Vec<u8> {
    encoded(&colour(seed), ImageFormat::Png)
}

/// A JPEG file, another one for each `seed`.
pub fn jpeg(seed: usize) -> Vec<u8> {
    encoded(&colour(seed), ImageFormat::Jpeg)
}

/// The same bytes, packed.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("packed");
    encoder.finish().expect("packed")
}

/// A tar archive of these files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *bytes).expect("added");
    }
    archive.into_inner().expect("whole")
}

/// What a run wrote.
pub struct Prepared {
    /// The images file, byte for byte.
    pub bytes: Vec<u8>,
    /// The same, open.
    pub images: Images,
    /// Names by row.
    pub names: Vec<String>,
    /// Names of the classes by row.
    pub classes: Vec<Option<String>>,
    /// The classes in the order of their numbers.
    pub class_names: Vec<String>,
    /// The list of what was skipped.
    pub skipped: serde_json::Value,
}

/// Prepares a source in a folder of its own.
pub fn prepare(source: &Path, config: &Config) -> Result<Prepared> {
    let (_folder, out) = scratch();
    if let Err(error) = crate::run(config, source, &out) {
        let left = fs::read_dir(&out).expect("readable").count();
        assert_eq!(left, 0, "a failed run leaves nothing behind");
        return Err(error);
    }
    let path = out.join(crate::IMAGES);
    let bytes = fs::read(&path)?;
    let images = Images::open(&path)?;
    let names = Names::open(&out.join(crate::NAMES))?;
    let labels = Labels::open(&out.join(crate::LABELS))?;
    images.data_set().require(&names.data_set, "")?;
    images.data_set().require(&labels.data_set, "")?;
    let class = |label: &Option<u32>| label.map(|label| labels.classes[label as usize].clone());
    Ok(Prepared {
        bytes,
        classes: labels.labels.iter().map(class).collect(),
        class_names: labels.classes.clone(),
        names: names.names,
        skipped: serde_json::from_slice(&fs::read(out.join(crate::SKIPPED))?)?,
        images,
    })
}

/// The message of a run that must fail.
pub fn refusal(source: &Path, config: &Config) -> String {
    match prepare(source, config) {
        Ok(_) => panic!("`{}` was prepared", source.display()),
        Err(error) => format!("{error:#}"),
    }
}

/// Asserts that a message has all these parts.
pub fn assert_has(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

impl Prepared {
    /// The row of a name.
    pub fn row(&self, name: &str) -> u32 {
        let row = self.names.iter().position(|other| other == name);
        row.unwrap_or_else(|| panic!("no `{name}` in {:?}", self.names)) as u32
    }

    /// The class of a name.
    pub fn class(&self, name: &str) -> Option<&str> {
        self.classes[self.row(name) as usize].as_deref()
    }

    /// The picture of a name.
    pub fn picture(&self, name: &str) -> Picture {
        (*self.images.picture(self.row(name)).expect("sound")).clone()
    }

    /// Names and reasons of a list in `skipped.json`.
    pub fn skipped(&self, list: &str) -> Vec<(String, String)> {
        let text =
            |entry: &serde_json::Value, key: &str| entry[key].as_str().expect(key).to_owned();
        let entries = self.skipped[list].as_array().expect(list).iter();
        entries.map(|entry| (text(entry, "name"), text(entry, "reason"))).collect()
    }
}
