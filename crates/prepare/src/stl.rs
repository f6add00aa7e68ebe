//! Reads STL-10 in its binary form.
//!
//! `train_X.bin`, `test_X.bin` and `unlabeled_X.bin` are sequences of pictures of 96 x 96: a red, a
//! green and a blue plane, each *column by column*, as Matlab writes them. `train_y.bin` and
//! `test_y.bin` have one byte per label, from 1 to 10; `class_names.txt` lists the names in that
//! order.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use data::Picture;
use stage::Split;

use crate::collection::{Load, Sink};
use crate::folder;
use crate::labels::distinct;
use crate::names::{self, file_name};

const SIDE: usize = 96;
const PLANE: usize = SIDE * SIDE;
const CLASSES: u8 = 10;

/// Returns the split of a file of pictures by its name; `None` for other files.
pub fn recognise(file_name: &str) -> Option<Split> {
    match file_name {
        "train_X.bin" => Some(Split::Train),
        "test_X.bin" => Some(Split::Test),
        "unlabeled_X.bin" => Some(Split::Unlabelled),
        _ => None,
    }
}

/// Whether a file holds labels or class names.
pub fn is_small(file_name: &str) -> bool {
    ["train_y.bin", "test_y.bin", "class_names.txt"].contains(&file_name)
}

/// Finds the files in a folder, or in the subfolder that the published archive unpacks to. Returns
/// an empty list if there are none.
pub fn find(root: &Path) -> Result<Vec<PathBuf>> {
    for folder in [root.to_owned(), root.join("stl10_binary")] {
        if folder.is_dir() {
            let files = folder::contents(&folder)?.files;
            if files.iter().any(|file| recognise(&file_name(file)).is_some()) {
                return Ok(files);
            }
        }
    }
    Ok(Vec::new())
}

/// Reads the files that [`find`] found.
///
/// # Errors
///
/// See [`StlLabels::read`].
pub fn read(paths: &[PathBuf], sink: &mut dyn Sink) -> Result<()> {
    let mut labels = StlLabels::default();
    let name = |path: &&PathBuf| file_name(path);
    for path in paths.iter().filter(|path| is_small(&name(path))) {
        let bytes = std::fs::read(path).with_context(|| format!("reading `{}`", path.display()))?;
        labels.add(&name(&path), bytes);
    }
    for path in paths.iter().filter(|path| recognise(&name(path)).is_some()) {
        let file = File::open(path).with_context(|| format!("reading `{}`", path.display()))?;
        let size = file.metadata()?.len();
        labels.read(&name(&path), size, &mut BufReader::new(file), sink)?;
    }
    Ok(())
}

/// The files of labels and class names, which must be read before the pictures.
#[derive(Debug, Default)]
pub struct StlLabels(Vec<(String, Vec<u8>)>);

impl StlLabels {
    /// Adds a file.
    pub fn add(&mut self, file_name: &str, bytes: Vec<u8>) {
        self.0.push((file_name.to_owned(), bytes));
    }

    fn file(&self, name: &str) -> Option<&[u8]> {
        let found = self.0.iter().find(|(known, _)| known == name);
        found.map(|(_, bytes)| bytes.as_slice())
    }

    /// The class names, or their numbers if the list is missing or has a wrong length.
    fn classes(&self) -> Vec<String> {
        let text = self.file("class_names.txt").unwrap_or_default();
        let lines = text.split(u8::is_ascii_whitespace).filter(|line| !line.is_empty());
        let names = distinct(lines.map(names::text).collect());
        match names.len() == usize::from(CLASSES) {
            true => names,
            false => (1..=CLASSES).map(|class| class.to_string()).collect(),
        }
    }

    /// Reads a file of pictures.
    ///
    /// # Errors
    ///
    /// The file is truncated, or its labels are missing, too few, too many or out of range.
    pub fn read(
        &self,
        file: &str,
        size: u64,
        bytes: &mut dyn Read,
        sink: &mut dyn Sink,
    ) -> Result<()> {
        let split = recognise(file).with_context(|| format!("`{file}` is not STL-10's"))?;
        let length = 3 * PLANE as u64;
        ensure!(
            size > 0 && size.is_multiple_of(length),
            "`{file}` has {size} bytes, not a whole number of pictures of {length}: it is cut short \
             or not STL-10; get it again"
        );
        let labels = match split {
            Split::Unlabelled => None,
            _ => {
                let name = file.replace("_X", "_y");
                let labels = self.file(&name);
                Some(
                    labels
                        .with_context(|| format!("`{file}` has no labels beside it: `{name}`"))?,
                )
            }
        };
        let count = usize::try_from(size / length)?;
        ensure!(
            labels.is_none_or(|labels| labels.len() == count),
            "`{file}` has {count} pictures but {} labels; get both files again",
            labels.map_or(0, <[u8]>::len)
        );
        let classes = self.classes();
        let mut planes = vec![0; 3 * PLANE];
        for position in 0..count {
            bytes.read_exact(&mut planes).with_context(|| format!("`{file}` is cut short"))?;
            let class = match labels.map(|labels| labels[position]) {
                Some(label) => {
                    ensure!(
                        (1..=CLASSES).contains(&label),
                        "`{file}` is damaged: picture {position} has the label {label}, not one of 1 \
                         to {CLASSES}; get its labels again"
                    );
                    Some(&classes[usize::from(label - 1)])
                }
                None => None,
            };
            if let Some(class) = class
                && !sink.wants(class)?
            {
                continue;
            }
            let load = match sink.is_known() {
                true => Load::Known,
                false => Load::Pixels(Picture::new(SIDE, SIDE, 3, upright(&planes))?),
            };
            let class = class.map(String::as_str);
            sink.picture(format!("{file}:{position}"), class, split, load)?;
        }
        Ok(())
    }
}

/// Converts planes stored column by column to pixels stored row by row.
fn upright(planes: &[u8]) -> Vec<u8> {
    let mut pixels = vec![0; planes.len()];
    for (at, pixel) in pixels.chunks_exact_mut(3).enumerate() {
        let (row, column) = (at / SIDE, at % SIDE);
        for (channel, value) in pixel.iter_mut().enumerate() {
            *value = planes[channel * PLANE + column * SIDE + row];
        }
    }
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::example::{assert_has, config, gzip, pixels, prepare, put, refusal, scratch, tar};

    fn planes(seed: usize) -> Vec<u8> {
        pixels(3 * SIDE, SIDE, 1, seed)
    }

    fn files() -> Vec<(&'static str, Vec<u8>)> {
        let names = "airplane bird car cat deer dog horse monkey ship truck";
        vec![
            ("test_X.bin", planes(2)),
            ("test_y.bin", vec![1]),
            ("train_X.bin", [planes(0), planes(1)].concat()),
            ("train_y.bin", vec![10, 3]),
            ("unlabeled_X.bin", planes(3)),
            ("class_names.txt", names.replace(' ', "\n").into_bytes()),
            ("fold_indices.txt", b"0 1".to_vec()),
        ]
    }

    #[test]
    fn pictures_are_upright_and_in_their_splits() {
        let (_folder, path) = scratch();
        for (name, bytes) in files() {
            put(&path.join("stl10_binary").join(name), &bytes);
        }
        let read = prepare(&path, &config()).expect("sound");
        assert_eq!(read.names.len(), 4);
        let picture = read.picture("train_X.bin:1");
        assert_eq!((picture.height, picture.width, picture.channels), (96, 96, 3));
        // Neither symmetric nor square in what it holds: a transposed reader fails here.
        let stored = planes(1);
        for (row, column, channel) in [(0, 0, 0), (0, 95, 0), (5, 2, 1), (2, 5, 1), (95, 0, 2)] {
            let value = picture.pixels[(row * 96 + column) * 3 + channel];
            assert_eq!(value, stored[(channel * 96 + column) * 96 + row], "{row} {column}");
        }
        assert_eq!(read.class("train_X.bin:0"), Some("truck"));
        assert_eq!(read.class("train_X.bin:1"), Some("car"));
        assert_eq!(read.class("unlabeled_X.bin:0"), None);
        assert_eq!(read.images.rows(&[Split::Test]), [read.row("test_X.bin:0")]);
        assert_eq!(read.images.rows(&[Split::Unlabelled]), [read.row("unlabeled_X.bin:0")]);

        let entries: Vec<(String, Vec<u8>)> =
            files().into_iter().map(|(name, b)| (format!("stl10_binary/{name}"), b)).collect();
        let entries: Vec<(&str, &[u8])> = entries.iter().map(|(n, b)| (&**n, &**b)).collect();
        put(&path.join("stl10_binary.tar.gz"), &gzip(&tar(&entries)));
        let packed = prepare(&path.join("stl10_binary.tar.gz"), &config()).expect("sound");
        assert_eq!(packed.bytes, read.bytes);
        assert_eq!(packed.classes, read.classes);
        let some = Config { classes: vec!["car".into(), "truck".into()], ..config() };
        assert_eq!(prepare(&path, &some).expect("sound").names.len(), 3);
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let cases: [(&str, Vec<u8>, &[&str]); 4] = [
            ("train_X.bin", planes(0)[1..].to_vec(), &["`train_X.bin`", "cut short"]),
            ("train_y.bin", vec![1], &["2 pictures but 1 labels"]),
            ("train_y.bin", vec![1, 11], &["label 11", "picture 1"]),
            ("test_X.bin", vec![], &["`test_X.bin` has 0 bytes"]),
        ];
        for (name, bytes, parts) in cases {
            let (_folder, path) = scratch();
            for (other, bytes) in files() {
                put(&path.join(other), &bytes);
            }
            put(&path.join(name), &bytes);
            assert_has(&refusal(&path, &config()), parts);
        }
    }
}
