//! Reads IDX, the format of MNIST: a file of pictures and a file of labels for each split.
//!
//! A file is two zero bytes, a byte for the type (08: unsigned bytes), a byte for the number of
//! dimensions, the dimensions as big-endian 32-bit numbers, outermost first, then the values, row
//! by row. Files may be gzip-compressed. A file of pictures has `images` and `idx3` in its name,
//! one of labels `labels` and `idx1`; `test` or `t10k` marks the test split. So
//! `train-images-idx3-ubyte`, `t10k-images.idx3-ubyte.gz` and `usps-test-images-idx3-ubyte.gz` are
//! all found.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use data::Picture;
use data::picture::MOST_PIXELS;
use stage::Split;

use crate::collection::{Load, Sink};
use crate::names::file_name;
use crate::{archive, folder, picture};

/// The two files of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The split of the data set.
    pub split: Split,
    images: PathBuf,
    labels: PathBuf,
    /// The number of pictures by its header.
    pub count: usize,
}

impl Pair {
    /// The two files.
    pub fn files(&self) -> [PathBuf; 2] {
        [self.images.clone(), self.labels.clone()]
    }
}

/// Finds the pairs of a folder and reads their headers. Returns an empty list if there is no IDX
/// file.
///
/// # Errors
///
/// A file of labels is missing, the folder holds two sets, or a header is not IDX or disagrees with
/// that of the other file.
pub fn find(folder: &Path) -> Result<Vec<Pair>> {
    let mut pairs: Vec<Pair> = Vec::new();
    for images in folder::contents(folder)?.files {
        let name = file_name(&images);
        // A copy of one of the pictures, `…idx3-ubyte_649.png`, is a picture.
        if !(name.contains("images") && name.contains("idx3")) || picture::has_extension(&name) {
            continue;
        }
        let labels = partner(&images, &name)?;
        let split = match name.contains("test") || name.contains("t10k") {
            true => Split::Test,
            false => Split::Train,
        };
        if let Some(first) = pairs.iter().find(|pair| pair.split == split) {
            // The same file may exist compressed and uncompressed. Files are sorted by name, so
            // the uncompressed one comes first.
            if name.strip_suffix(".gz") == Some(&file_name(&first.images)) {
                continue;
            }
            bail!(
                "`{}` holds two sets of pictures, `{}` and `{name}`; keep one set in a folder",
                folder.display(),
                file_name(&first.images)
            );
        }
        let mut pair = Pair { split, images, labels, count: 0 };
        pair.count = pair.open()?.count;
        pairs.push(pair);
    }
    pairs.sort_by_key(|pair| pair.split);
    Ok(pairs)
}

/// The file of labels beside a file of pictures, compressed or not.
fn partner(images: &Path, name: &str) -> Result<PathBuf> {
    let labels = name.replace("images", "labels").replace("idx3", "idx1");
    let bare = labels.trim_end_matches(".gz");
    let candidates = [images.with_file_name(bare), images.with_file_name(format!("{bare}.gz"))];
    match candidates.into_iter().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!(
            "`{}` has no labels beside it: put `{bare}` or `{bare}.gz` into the same folder",
            images.display()
        ),
    }
}

/// The open files of a pair, positioned after their headers.
struct Opened {
    count: usize,
    height: usize,
    width: usize,
    images: Box<dyn Read>,
    labels: Box<dyn Read>,
}

impl Pair {
    /// Passes all pictures to `sink`, named by file and position. Classes are the label numbers.
    ///
    /// # Errors
    ///
    /// A file is damaged, truncated or longer than its header says.
    pub fn read(&self, sink: &mut dyn Sink) -> Result<()> {
        let Opened { count, height, width, mut images, mut labels } = self.open()?;
        let labels = payload(&mut labels, count, &self.labels)?;
        let file = file_name(&self.images);
        let file = file.trim_end_matches(".gz");
        let mut pixels = vec![0; height * width];
        for (position, label) in labels.into_iter().enumerate() {
            images.read_exact(&mut pixels).map_err(|error| damaged(&self.images, error))?;
            let class = label.to_string();
            if sink.wants(&class)? {
                let load = Load::Pixels(Picture::new(height, width, 1, pixels.clone())?);
                sink.picture(format!("{file}:{position}"), Some(&class), self.split, load)?;
            }
        }
        check_end(&mut images, &self.images)
    }

    fn open(&self) -> Result<Opened> {
        let (images_extents, images) = open(&self.images, 3)?;
        let (labels_extents, labels) = open(&self.labels, 1)?;
        let [count, height, width] = images_extents[..] else { unreachable!("three were read") };
        ensure!(
            labels_extents == [count],
            "`{}` has {count} pictures but `{}` has {} labels; get both files again",
            self.images.display(),
            self.labels.display(),
            labels_extents[0]
        );
        ensure!(
            (1..=MOST_PIXELS).contains(&height.saturating_mul(width)),
            "`{}` says its pictures have {height} x {width} pixels: it is damaged",
            self.images.display()
        );
        Ok(Opened { count, height, width, images, labels })
    }
}

/// Opens a file and reads its header, which must have `order` dimensions of unsigned bytes.
fn open(path: &Path, order: u8) -> Result<(Vec<usize>, Box<dyn Read>)> {
    let file = File::open(path).with_context(|| format!("opening `{}`", path.display()))?;
    let mut reader = archive::decompressed(BufReader::new(file), path)?;
    let mut magic = [0; 4];
    reader.read_exact(&mut magic).map_err(|error| damaged(path, error))?;
    ensure!(
        magic == [0, 0, 8, order],
        "`{}` is not an IDX file of {order} dimensions of bytes: it starts with {magic:02x?}, not \
         with [00, 00, 08, {order:02x}]",
        path.display()
    );
    let mut extents = Vec::with_capacity(order.into());
    for _ in 0..order {
        let mut extent = [0; 4];
        reader.read_exact(&mut extent).map_err(|error| damaged(path, error))?;
        extents.push(u32::from_be_bytes(extent) as usize);
    }
    Ok((extents, reader))
}

/// Reads the last `count` bytes of a file. Allocates by what is there, not by what a damaged header
/// states.
fn payload(reader: &mut dyn Read, count: usize, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(count as u64).read_to_end(&mut bytes).map_err(|error| damaged(path, error))?;
    ensure!(
        bytes.len() == count,
        "`{}` is cut short: it holds {} of {count} values; get it again",
        path.display(),
        bytes.len()
    );
    check_end(reader, path)?;
    Ok(bytes)
}

fn check_end(reader: &mut dyn Read, path: &Path) -> Result<()> {
    let more = reader.read(&mut [0]).map_err(|error| damaged(path, error))?;
    ensure!(more == 0, "`{}` holds more than its header says; get it again", path.display());
    Ok(())
}

fn damaged(path: &Path, error: std::io::Error) -> anyhow::Error {
    anyhow::Error::new(error)
        .context(format!("`{}` is damaged or cut short; get it again", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::Config;
    use crate::example::{assert_has, config, gzip, pixels, prepare, put, refusal, scratch};

    /// A file of these extents and values.
    fn file(extents: &[u32], values: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, extents.len() as u8];
        bytes.extend(extents.iter().flat_map(|extent| extent.to_be_bytes()));
        bytes.extend(values);
        bytes
    }

    /// Three pictures of 3 x 5 for training, packed, and two of 2 x 4 for testing.
    fn example(folder: &Path) {
        let train = [pixels(3, 5, 1, 0), pixels(3, 5, 1, 1), pixels(3, 5, 1, 2)].concat();
        put(&folder.join("x-train-images-idx3-ubyte.gz"), &gzip(&file(&[3, 3, 5], &train)));
        put(&folder.join("x-train-labels-idx1-ubyte.gz"), &gzip(&file(&[3], &[2, 10, 2])));
        let test = [pixels(2, 4, 1, 3), pixels(2, 4, 1, 4)].concat();
        put(&folder.join("t10k-images.idx3-ubyte"), &file(&[2, 2, 4], &test));
        put(&folder.join("t10k-labels.idx1-ubyte"), &file(&[2], &[10, 2]));
    }

    fn grey() -> Config {
        Config { channels: 1, ..config() }
    }

    #[test]
    fn pictures_splits_and_labels_are_read() {
        let (_folder, path) = scratch();
        example(&path);
        let read = prepare(&path, &grey()).expect("sound");
        for position in 0..3 {
            let name = format!("x-train-images-idx3-ubyte:{position}");
            let expected = Picture::new(3, 5, 1, pixels(3, 5, 1, position)).expect("fits");
            assert_eq!(read.picture(&name), expected);
            assert_eq!(read.class(&name), Some(["2", "10", "2"][position]));
            assert!(read.images.rows(&[Split::Train]).contains(&read.row(&name)));
        }
        let expected = Picture::new(2, 4, 1, pixels(2, 4, 1, 4)).expect("fits");
        assert_eq!(read.picture("t10k-images.idx3-ubyte:1"), expected);
        assert_eq!(read.class("t10k-images.idx3-ubyte:1"), Some("2"));
        assert_eq!(read.images.rows(&[Split::Test]).len(), 2);
        assert_eq!(read.class_names, ["2", "10"]);

        let colour = prepare(&path, &config()).expect("sound");
        let threefold: Vec<u8> = pixels(2, 4, 1, 3).into_iter().flat_map(|v| [v; 3]).collect();
        assert_eq!(colour.picture("t10k-images.idx3-ubyte:0").pixels, threefold);
    }

    #[test]
    fn an_unpacked_copy_beside_the_packed_file_is_no_second_set() {
        let (_folder, path) = scratch();
        example(&path);
        let first = prepare(&path, &grey()).expect("sound");
        let copy = fs::read(path.join("t10k-images.idx3-ubyte")).expect("there");
        put(&path.join("t10k-images.idx3-ubyte.gz"), &gzip(&copy));
        assert_eq!(prepare(&path, &grey()).expect("sound").bytes, first.bytes);
        put(&path.join("other-test-images-idx3-ubyte"), &copy);
        put(&path.join("other-test-labels-idx1-ubyte"), &file(&[2], &[0, 1]));
        assert_has(&refusal(&path, &grey()), &["two sets", "other-test", "t10k"]);
    }

    #[test]
    fn damaged_files_are_refused_by_name() {
        let train = "x-train-images-idx3-ubyte.gz";
        let images = |extents, count: usize| gzip(&file(extents, &vec![1; count]));
        let packed = images(&[3, 3, 5], 45);
        let cases: [(&str, Vec<u8>, &[&str]); 9] = [
            (train, images(&[3, 3, 5], 44), &["damaged or cut short", train]),
            (train, images(&[3, 3, 5], 46), &["more than its header says", train]),
            (train, images(&[4, 3, 5], 60), &["4 pictures", "3 labels", train]),
            (train, images(&[3, 0, 5], 0), &["0 x 5 pixels", train]),
            (train, images(&[3, u32::MAX, u32::MAX], 9), &["4294967295 pixels", train]),
            (train, packed[..packed.len() - 3].to_vec(), &["damaged or cut short", train]),
            (train, vec![], &["damaged or cut short", train]),
            (train, gzip(b"<!DOCTYPE html>"), &["not an IDX file", train, "3c"]),
            ("x-train-labels-idx1-ubyte.gz", gzip(&file(&[3], &[1])), &["holds 1 of 3 values"]),
        ];
        for (name, bytes, parts) in cases {
            let (_folder, path) = scratch();
            example(&path);
            put(&path.join(name), &bytes);
            assert_has(&refusal(&path, &grey()), parts);
        }
        let (_folder, path) = scratch();
        example(&path);
        fs::remove_file(path.join("t10k-labels.idx1-ubyte")).expect("removed");
        assert_has(&refusal(&path, &grey()), &["no labels", "`t10k-labels.idx1-ubyte`"]);
    }

    #[test]
    fn a_copy_of_a_picture_of_a_set_is_a_picture() {
        let (_folder, path) = scratch();
        put(&path.join("001-train-images-idx3-ubyte_649.png"), b"a picture, by its name");
        assert!(find(&path).expect("no set").is_empty());
    }

    #[test]
    fn one_file_of_a_set_is_no_source() {
        let (_folder, path) = scratch();
        example(&path);
        let message = refusal(&path.join("t10k-images.idx3-ubyte"), &grey());
        assert_has(&message, &["one file of several", "--source"]);
    }
}
