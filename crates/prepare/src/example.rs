//! Generates small sources for the tests.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use anyhow::Result;
use data::{Images, Labels, Names, Picture};
use flate2::Compression;
use flate2::write::GzEncoder;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};

use crate::{Config, Format, Identical, Options};

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
        stored_shorter_side: 0,
    }
}

/// A temporary folder, removed on drop.
pub fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_owned();
    (folder, path)
}

/// Writes a file and creates its parent folders.
pub fn put(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
    fs::write(path, bytes).expect("written");
}

/// Pixels without symmetry, different for each `seed`.
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

/// Encodes a picture as a file.
pub fn encoded(picture: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    picture.write_to(&mut file, format).expect("encoded");
    file.into_inner()
}

/// A PNG file, different for each `seed`.
pub fn png(seed: usize) -> Vec<u8> {
    encoded(&colour(seed), ImageFormat::Png)
}

/// A JPEG file, different for each `seed`.
pub fn jpeg(seed: usize) -> Vec<u8> {
    encoded(&colour(seed), ImageFormat::Jpeg)
}

/// Compresses bytes with gzip.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("packed");
    encoder.finish().expect("packed")
}

/// A tar archive of these files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    tar_of(&files.iter().map(|(name, bytes)| (Path::new(name), *bytes)).collect::<Vec<_>>())
}

/// A tar archive of these files, whose names need not be UTF-8.
pub fn tar_of(files: &[(&Path, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *bytes).expect("added");
    }
    archive.into_inner().expect("whole")
}

/// A zip file of these files as written on Unix, every other one deflated.
pub fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    let bytes: Vec<_> = files.iter().map(|(name, bytes)| (name.as_bytes(), *bytes)).collect();
    zip_from(3, 0, &bytes)
}

/// A zip file written on the system `host` (0 is DOS, 3 Unix), with these flags for each entry.
pub fn zip_from(host: u8, flags: u16, files: &[(&[u8], &[u8])]) -> Vec<u8> {
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for (number, (name, bytes)) in files.iter().enumerate() {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        let mut deflated = flate2::write::DeflateEncoder::new(Vec::new(), Compression::fast());
        deflated.write_all(bytes).expect("packed");
        let deflated = deflated.finish().expect("packed");
        let (method, packed) = if number % 2 == 1 { (8u16, &deflated[..]) } else { (0, *bytes) };
        let place = archive.len() as u32;
        let mut common = Vec::new();
        common.extend([20, 0]);
        common.extend(flags.to_le_bytes());
        common.extend(method.to_le_bytes());
        common.extend([0; 4]);
        common.extend(crc.sum().to_le_bytes());
        common.extend((packed.len() as u32).to_le_bytes());
        common.extend((bytes.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0; 2]);
        archive.extend(*b"PK\x03\x04");
        archive.extend(&common);
        archive.extend(*name);
        archive.extend(packed);
        directory.extend(*b"PK\x01\x02\x14");
        directory.push(host);
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(place.to_le_bytes());
        directory.extend(*name);
    }
    let (start, count) = (archive.len() as u32, files.len() as u16);
    archive.extend(&directory);
    archive.extend(*b"PK\x05\x06\0\0\0\0");
    archive.extend(count.to_le_bytes());
    archive.extend(count.to_le_bytes());
    archive.extend((directory.len() as u32).to_le_bytes());
    archive.extend(start.to_le_bytes());
    archive.extend([0; 2]);
    archive
}

/// A Parquet file as Python's `datasets` writes it: pictures with their paths, and numeric labels
/// whose names are in the metadata.
pub fn parquet(rows: &[(&str, &[u8], i64)], names: &[&str]) -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::metadata::KeyValue;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;

    let schema = "message schema {
        optional group image { optional binary bytes; optional binary path (UTF8); }
        optional int64 label;
    }";
    let schema = parquet::schema::parser::parse_message_type(schema).expect("a schema");
    let features = serde_json::json!({ "info": { "features": {
        "image": { "_type": "Image" },
        "label": { "names": names, "_type": "ClassLabel" },
    }}});
    let field = KeyValue::new("huggingface".to_owned(), features.to_string());
    let properties = WriterProperties::builder()
        .set_key_value_metadata(Some(vec![field]))
        .set_compression(parquet::basic::Compression::SNAPPY)
        .build();
    let mut writer =
        SerializedFileWriter::new(Vec::new(), schema.into(), properties.into()).expect("begun");
    for rows in rows.chunks(3) {
        let mut group = writer.next_row_group().expect("a group");
        let columns: [Vec<ByteArray>; 2] = [
            rows.iter().map(|row| row.1.to_vec().into()).collect(),
            rows.iter().map(|row| row.0.into()).collect(),
        ];
        for values in columns {
            let mut column = group.next_column().expect("sound").expect("a column");
            let levels = vec![2; values.len()];
            let typed = column.typed::<ByteArrayType>();
            typed.write_batch(&values, Some(&levels), None).expect("written");
            column.close().expect("closed");
        }
        let mut column = group.next_column().expect("sound").expect("a column");
        let labels: Vec<i64> = rows.iter().map(|row| row.2).collect();
        let levels = vec![1; labels.len()];
        let typed = column.typed::<Int64Type>();
        typed.write_batch(&labels, Some(&levels), None).expect("written");
        column.close().expect("closed");
        group.close().expect("closed");
    }
    writer.into_inner().expect("whole")
}

/// What a run wrote.
pub struct PreparedFiles {
    /// The images file, byte for byte.
    pub bytes: Vec<u8>,
    /// The images file, opened.
    pub images: Images,
    /// Names by row.
    pub names: Vec<String>,
    /// Names of the classes by row.
    pub classes: Vec<Option<String>>,
    /// The classes in the order of their numbers.
    pub class_names: Vec<String>,
    /// The content of `skipped.json`.
    pub skipped: serde_json::Value,
}

/// Prepares a source in a new folder.
pub fn prepare(source: &Path, config: &Config) -> Result<PreparedFiles> {
    prepare_with(source, config, &Options::default())
}

/// Prepares a source in a new folder with these options.
pub fn prepare_with(source: &Path, config: &Config, options: &Options) -> Result<PreparedFiles> {
    let (_folder, out) = scratch();
    if let Err(error) = crate::run(config, source, &out, options) {
        let left = fs::read_dir(&out).expect("readable").count();
        assert_eq!(left, 0, "a failed run leaves nothing behind");
        return Err(error);
    }
    Ok(open(&out))
}

/// Opens what a run wrote into `out`.
pub fn open(out: &Path) -> PreparedFiles {
    open_files(out).expect("whole files")
}

fn open_files(out: &Path) -> Result<PreparedFiles> {
    let path = out.join(crate::IMAGES);
    let bytes = fs::read(&path)?;
    let images = Images::open(&path)?;
    let names = Names::open(&out.join(crate::NAMES))?;
    let labels = Labels::open(&out.join(crate::LABELS))?;
    images.data_set().require(&names.data_set, "")?;
    images.data_set().require(&labels.data_set, "")?;
    let class = |label: &Option<u32>| label.map(|label| labels.classes[label as usize].clone());
    Ok(PreparedFiles {
        bytes,
        classes: labels.labels.iter().map(class).collect(),
        class_names: labels.classes.clone(),
        names: names.names,
        skipped: serde_json::from_slice(&fs::read(out.join(crate::SKIPPED))?)?,
        images,
    })
}

/// The error message of a run that must fail.
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

impl PreparedFiles {
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
