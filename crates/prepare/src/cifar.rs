//! CIFAR-10 and CIFAR-100 in their binary form.
//!
//! A file is a sequence of records. CIFAR-10: a label byte, then 1,024 red, 1,024 green and 1,024
//! blue bytes of a 32 x 32 picture, row by row. CIFAR-100 has two label bytes: the superclass of
//! 20, then the class of 100. So the 20 superclasses are read from the file, not from a table.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use data::Picture;
use stage::Split;

use crate::collection::{Load, Sink};
use crate::labels::distinct;
use crate::names::{self, file_name};
use crate::{Format, folder};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;

/// Which labels of the records are the ground truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CifarLabels {
    Ten,
    Hundred,
    Superclasses,
}

impl CifarLabels {
    fn classes(self) -> u8 {
        match self {
            Self::Ten => 10,
            Self::Hundred => 100,
            Self::Superclasses => 20,
        }
    }

    /// Bytes before the pixels.
    fn label_bytes(self) -> usize {
        match self {
            Self::Ten => 1,
            Self::Hundred | Self::Superclasses => 2,
        }
    }

    /// The index of the label among them.
    fn position(self) -> usize {
        match self {
            Self::Ten | Self::Superclasses => 0,
            Self::Hundred => 1,
        }
    }

    /// The file that lists the class names, one per line.
    fn names(self) -> &'static str {
        match self {
            Self::Ten => "batches.meta.txt",
            Self::Hundred => "fine_label_names.txt",
            Self::Superclasses => "coarse_label_names.txt",
        }
    }
}

/// Recognises a file of the binary form by its name. Returns whether it is CIFAR-100, and its
/// split.
pub fn recognise(file_name: &str) -> Option<(bool, Split)> {
    match file_name {
        "train.bin" => Some((true, Split::Train)),
        "test.bin" => Some((true, Split::Test)),
        "test_batch.bin" => Some((false, Split::Test)),
        _ => {
            let number = file_name.strip_prefix("data_batch_")?.strip_suffix(".bin")?;
            number.parse::<u8>().ok().map(|_| (false, Split::Train))
        }
    }
}

/// Whether a file of this name lists the class names.
pub fn lists_classes(file_name: &str) -> bool {
    [CifarLabels::Ten, CifarLabels::Hundred, CifarLabels::Superclasses]
        .iter()
        .any(|truth| truth.names() == file_name)
}

/// Finds the files of the binary form in a folder, or in the subfolder that the published archives
/// unpack to. Returns an empty list if there are none.
///
/// # Errors
///
/// The folder holds the Python form.
pub fn find(root: &Path) -> Result<Vec<PathBuf>> {
    let contents = folder::contents(root)?;
    let unpacked = contents.folders.iter().filter(|folder| {
        ["cifar-10-batches-bin", "cifar-100-binary"].contains(&file_name(folder).as_str())
    });
    let folders: Vec<&Path> = std::iter::once(root).chain(unpacked.map(PathBuf::as_path)).collect();
    for folder in folders {
        let files = folder::contents(folder)?.files;
        let names: Vec<String> = files.iter().map(|file| file_name(file)).collect();
        if names.iter().any(|name| recognise(name).is_some()) {
            return Ok(files);
        }
        if names.iter().any(|name| name == "data_batch_1")
            || ["train", "test", "meta"].iter().all(|part| names.iter().any(|name| name == part))
        {
            bail!(
                "`{}` holds the Python form of CIFAR; get the binary one (cifar-10-binary.tar.gz or \
                 cifar-100-binary.tar.gz) and pass its archive or folder",
                folder.display()
            );
        }
    }
    Ok(Vec::new())
}

/// Reads the files that [`find`] found.
///
/// # Errors
///
/// See [`CifarLayout`].
pub fn read(paths: &[PathBuf], format: Format, sink: &mut dyn Sink) -> Result<()> {
    let context = |path: &PathBuf| format!("reading `{}`", path.display());
    let mut layout = CifarLayout::new(format);
    for path in paths {
        let name = file_name(path);
        layout.found(&name)?;
        if lists_classes(&name) {
            layout.list(&name, fs::read(path).with_context(|| context(path))?);
        }
    }
    for path in paths {
        let name = file_name(path);
        if recognise(&name).is_some() {
            let file = File::open(path).with_context(|| context(path))?;
            let size = file.metadata()?.len();
            layout.read(&name, size, &mut BufReader::new(file), sink)?;
        }
    }
    Ok(())
}

/// What must be known about all files before the first is read.
#[derive(Debug)]
pub struct CifarLayout {
    format: Format,
    hundred: Option<bool>,
    lists: Vec<(String, Vec<u8>)>,
}

impl CifarLayout {
    /// Starts without any files.
    pub fn new(format: Format) -> Self {
        Self { format, hundred: None, lists: Vec::new() }
    }

    /// Records that a file of this name exists.
    ///
    /// # Errors
    ///
    /// There are files of both CIFAR-10 and CIFAR-100.
    pub fn found(&mut self, file_name: &str) -> Result<()> {
        if let Some((hundred, _)) = recognise(file_name) {
            ensure!(
                *self.hundred.get_or_insert(hundred) == hundred,
                "files of CIFAR-10 and of CIFAR-100 are mixed; put each set into its own folder"
            );
        }
        Ok(())
    }

    /// Adds a file of class names.
    pub fn list(&mut self, file_name: &str, bytes: Vec<u8>) {
        self.lists.push((file_name.to_owned(), bytes));
    }

    fn truth(&self) -> Result<CifarLabels> {
        match (self.hundred.unwrap_or_default(), self.format) {
            (true, Format::Cifar20) => Ok(CifarLabels::Superclasses),
            (true, _) => Ok(CifarLabels::Hundred),
            (false, Format::Cifar20) => bail!(
                "`format = \"cifar-20\"` asks for the superclasses of CIFAR-100, but this is CIFAR-10"
            ),
            (false, _) => Ok(CifarLabels::Ten),
        }
    }

    /// The class names, or their numbers if the list is missing or has a wrong length.
    fn classes(&self, truth: CifarLabels) -> Vec<String> {
        let count = usize::from(truth.classes());
        self.lists
            .iter()
            .find(|(name, _)| name == truth.names())
            .map(|(_, bytes)| {
                let lines = bytes.split(u8::is_ascii_whitespace).filter(|line| !line.is_empty());
                distinct(lines.map(names::text).collect())
            })
            .filter(|names: &Vec<String>| names.len() == count)
            .unwrap_or_else(|| (0..count).map(|class| class.to_string()).collect())
    }

    /// Passes the pictures of a file to `sink`, named by file and position.
    ///
    /// # Errors
    ///
    /// The file is truncated, a label is out of range, or CIFAR-10 is read with superclasses.
    pub fn read(
        &self,
        file: &str,
        size: u64,
        bytes: &mut dyn Read,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let (truth, split) = (self.truth()?, recognise(file).map_or(Split::Train, |(_, s)| s));
        let classes = self.classes(truth);
        let length = truth.label_bytes() + 3 * PLANE;
        ensure!(
            size > 0 && size.is_multiple_of(length as u64),
            "`{file}` has {size} bytes, not a whole number of records of {length}: it is cut short or \
             not CIFAR-{}; get it again",
            if truth == CifarLabels::Ten { 10 } else { 100 }
        );
        let mut record = vec![0; length];
        for position in 0..size / length as u64 {
            bytes.read_exact(&mut record).with_context(|| format!("`{file}` is cut short"))?;
            let label = record[truth.position()];
            ensure!(
                label < truth.classes(),
                "`{file}` is damaged: record {position} has the label {label} of {} classes; get it \
                 again",
                truth.classes()
            );
            let class = &classes[usize::from(label)];
            if sink.wants(class)? {
                let pixels = interleaved(&record[truth.label_bytes()..]);
                let load = Load::Pixels(Picture::new(SIDE, SIDE, 3, pixels)?);
                sink.picture(format!("{file}:{position}"), Some(class), split, load)?;
            }
        }
        Ok(())
    }
}

/// Converts red, green and blue planes to one RGB triple per pixel.
fn interleaved(planes: &[u8]) -> Vec<u8> {
    let plane = planes.len() / 3;
    (0..plane)
        .flat_map(|pixel| [planes[pixel], planes[plane + pixel], planes[2 * plane + pixel]])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::example::{assert_has, config, gzip, pixels, prepare, put, refusal, scratch, tar};

    /// A record: its label bytes, then three planes of pixels without symmetry.
    fn record(labels: &[u8], seed: usize) -> Vec<u8> {
        [labels, &pixels(3 * SIDE, SIDE, 1, seed)].concat()
    }

    #[test]
    fn planes_become_pixels_row_by_row() {
        let (_folder, path) = scratch();
        put(&path.join("data_batch_1.bin"), &[record(&[3], 0), record(&[9], 1)].concat());
        put(&path.join("test_batch.bin"), &record(&[0], 2));
        let read = prepare(&path, &config()).expect("sound");
        let picture = read.picture("data_batch_1.bin:1");
        assert_eq!((picture.height, picture.width, picture.channels), (32, 32, 3));
        let planes = pixels(3 * SIDE, SIDE, 1, 1);
        for (row, column, channel) in [(0, 0, 0), (0, 31, 0), (5, 2, 1), (2, 5, 1), (31, 0, 2)] {
            let value = picture.pixels[(row * 32 + column) * 3 + channel];
            assert_eq!(value, planes[(channel * 32 + row) * 32 + column], "{row} {column}");
        }
        assert_eq!(read.class("data_batch_1.bin:0"), Some("3"));
        assert_eq!(read.images.rows(&[Split::Test]), [read.row("test_batch.bin:0")]);
    }

    #[test]
    fn classes_and_superclasses_of_cifar_100_come_from_the_file() {
        let (_folder, path) = scratch();
        let inner = path.join("cifar-100-binary");
        let coarse: String = (0..20).map(|class| format!("group{class}\n")).collect();
        put(&inner.join("coarse_label_names.txt"), coarse.as_bytes());
        put(&inner.join("train.bin"), &[record(&[7, 99], 0), record(&[19, 4], 1)].concat());
        put(&inner.join("test.bin"), &record(&[7, 50], 2));
        let fine = prepare(&path, &config()).expect("sound");
        assert_eq!(fine.class("train.bin:0"), Some("99"), "there is no list of fine names");
        let groups = Config { format: Format::Cifar20, ..config() };
        let groups = prepare(&path, &groups).expect("sound");
        assert_eq!(groups.class("train.bin:0"), Some("group7"));
        assert_eq!(groups.class("train.bin:1"), Some("group19"));
        assert_eq!(groups.class("test.bin:0"), Some("group7"));
        assert_eq!(groups.bytes, fine.bytes, "ground truth is not in the images");
    }

    #[test]
    fn an_archive_packed_or_not_gives_the_same_images() {
        let (_folder, path) = scratch();
        let batch = [record(&[3], 0), record(&[9], 1)].concat();
        let names =
            "airplane automobile bird cat deer dog frog horse ship truck\n\n".replace(' ', "\n");
        let files: [(&str, &[u8]); 2] = [
            ("cifar-10-batches-bin/data_batch_1.bin", &batch),
            ("cifar-10-batches-bin/batches.meta.txt", names.as_bytes()),
        ];
        put(&path.join("folder/data_batch_1.bin"), &batch);
        put(&path.join("c.tar"), &tar(&files));
        put(&path.join("c.tar.gz"), &gzip(&tar(&files)));
        let folder = prepare(&path.join("folder"), &config()).expect("sound");
        for archive in ["c.tar", "c.tar.gz"] {
            let read = prepare(&path.join(archive), &config()).expect("sound");
            assert_eq!(read.bytes, folder.bytes);
            assert_eq!(read.class("data_batch_1.bin:0"), Some("cat"));
            assert_eq!(read.class("data_batch_1.bin:1"), Some("truck"));
        }
        let two = ["truck", "cat"].map(String::from).to_vec();
        let chosen = Config { classes: two.clone(), images_per_class: 1, ..config() };
        assert_eq!(prepare(&path.join("c.tar"), &chosen).expect("sound").names.len(), 2);
        let counted = Config { images_per_class: 2, ..chosen };
        assert_has(&refusal(&path.join("c.tar"), &counted), &["2 of 2 classes", "`cat` has 1"]);
        let missing = Config { classes: ["cat", "cow"].map(String::from).to_vec(), ..config() };
        assert_has(&refusal(&path.join("c.tar"), &missing), &["no class `cow`", "`cat`"]);
    }

    #[test]
    fn what_is_not_cifar_is_refused() {
        let sound = record(&[1], 0);
        let cases: [(&str, &[u8], &[&str]); 5] = [
            ("data_batch_2.bin", &sound[1..], &["data_batch_2.bin", "3072 bytes", "cut short"]),
            ("data_batch_2.bin", &[], &["data_batch_2.bin", "0 bytes"]),
            ("data_batch_2.bin", &record(&[10], 0), &["record 0", "label 10", "10 classes"]),
            ("train.bin", &record(&[1, 2], 0), &["CIFAR-10 and of CIFAR-100"]),
            ("test_batch.bin", &record(&[1, 2], 0), &["test_batch.bin", "3074 bytes"]),
        ];
        for (name, bytes, parts) in cases {
            let (_folder, path) = scratch();
            put(&path.join("data_batch_1.bin"), &[record(&[1], 0), record(&[2], 1)].concat());
            put(&path.join(name), bytes);
            assert_has(&refusal(&path, &config()), parts);
        }
        let (_folder, path) = scratch();
        put(&path.join("data_batch_1.bin"), &sound);
        let groups = Config { format: Format::Cifar20, ..config() };
        assert_has(&refusal(&path, &groups), &["superclasses", "CIFAR-10"]);
        assert_has(&refusal(&path, &config()), &["one class only"]);
        let (_folder, path) = scratch();
        put(&path.join("data_batch_1"), &sound);
        assert_has(&refusal(&path, &config()), &["Python form", "cifar-10-binary.tar.gz"]);
        let empty = Config { format: Format::Cifar, ..config() };
        let (_folder, path) = scratch();
        put(&path.join("notes.txt"), b"nothing");
        assert_has(&refusal(&path, &empty), &["no binary files of CIFAR", "notes.txt"]);
    }
}
