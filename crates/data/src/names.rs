//! `names.safetensors`: the source path of each picture.
//!
//! Kind `names`, format version 1. Only `metrics`, `report` and `predict` read it. No training does,
//! because a name often gives away the class.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `bytes` | `(B,)` u8 | the names in UTF-8, one after the other, by row of `images.safetensors` |
//! | `offset` | `(N + 1,)` u64 | name `n` is `bytes[offset[n]..offset[n + 1]]` |
//!
//! Header: `images` and `fingerprint`, see [`DataSet`].

use std::path::Path;

use anyhow::{Context, Result, ensure};
use stage::container::{self, Column, Container, Tensor};

use crate::data_set::{DataSet, check_length};

const KIND: &str = "names";
const VERSION: u64 = 1;

/// The name of every picture: the path of its file, or its path in an archive.
#[derive(Debug, Clone)]
pub struct Names {
    /// The pictures that are named.
    pub data_set: DataSet,
    /// The name of each, by row, `N`.
    pub names: Vec<String>,
}

impl Names {
    /// Writes the file.
    ///
    /// # Errors
    ///
    /// There are more or fewer names than pictures, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        check_length(path, "offset", self.names.len(), self.data_set.images)?;
        let (bytes, offset) = join(&self.names);
        let tensors = [
            Tensor::u8("bytes", &[bytes.len()], &bytes),
            Tensor::u64("offset", &[offset.len()], &offset),
        ];
        container::write(path, KIND, VERSION, self.data_set.header(), &tensors)
    }

    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// It is missing, foreign or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Container::open(path, KIND, VERSION)?;
        let data_set = DataSet::of(&file)?;
        let names = split(path, &file.u8("bytes")?, &file.u64("offset")?)?;
        check_length(path, "offset", names.len(), data_set.images)?;
        Ok(Self { data_set, names })
    }
}

/// Writes `names.safetensors` from names in row order. Its memory does not grow with their number.
#[derive(Debug)]
pub struct NamesWriter {
    bytes: Column<u8>,
    offset: Column<u64>,
}

impl NamesWriter {
    /// Begins a file. Values wait in unnamed temporary files in `folder`.
    pub fn create_in(folder: &Path) -> Result<Self> {
        let mut offset = Column::create_in(folder)?;
        offset.push(&[0])?;
        Ok(Self { bytes: Column::create_in(folder)?, offset })
    }

    /// Appends the name of the next row.
    pub fn push(&mut self, name: &str) -> Result<()> {
        self.bytes.push(name.as_bytes())?;
        self.offset.push(&[self.bytes.len()])
    }

    /// Writes the file.
    ///
    /// # Errors
    ///
    /// There are more or fewer names than pictures, or the file cannot be written.
    pub fn finish(mut self, data_set: &DataSet, path: &Path) -> Result<()> {
        let count = usize::try_from(self.offset.len())?;
        check_length(path, "offset", count - 1, data_set.images)?;
        let length = usize::try_from(self.bytes.len())?;
        let tensors =
            [self.bytes.tensor("bytes", &[length])?, self.offset.tensor("offset", &[count])?];
        container::write(path, KIND, VERSION, data_set.header(), &tensors)
    }
}

/// Joins texts. Returns their bytes, and the offset of each and of the end.
pub(crate) fn join(texts: &[String]) -> (Vec<u8>, Vec<u64>) {
    let mut bytes = Vec::new();
    let mut offset = vec![0];
    for text in texts {
        bytes.extend_from_slice(text.as_bytes());
        offset.push(bytes.len() as u64);
    }
    (bytes, offset)
}

/// The inverse of [`join`].
pub(crate) fn split(path: &Path, bytes: &[u8], offset: &[u64]) -> Result<Vec<String>> {
    let broken = || format!("the offsets of `{}` do not fit its texts", path.display());
    ensure!(offset.first() == Some(&0) && offset.last() == Some(&(bytes.len() as u64)), broken());
    offset
        .windows(2)
        .map(|pair| {
            let range = usize::try_from(pair[0])?..usize::try_from(pair[1])?;
            let text = bytes.get(range).with_context(broken)?;
            Ok(std::str::from_utf8(text).with_context(broken)?.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_written_and_one_too_few_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("names.safetensors");
        let data_set = DataSet { path: path.clone(), images: 3, fingerprint: "f".into() };
        let names = ["dog/1.jpg", "", "Hündin/2.png"].map(String::from).to_vec();
        let mut written = Names { data_set, names };
        written.write(&path).expect("written");
        let read = Names::open(&path).expect("sound");
        assert_eq!(read.names, written.names);
        read.data_set.require(&written.data_set, "").expect("the same");
        let mut writer = NamesWriter::create_in(folder.path()).expect("created");
        written.names.iter().try_for_each(|name| writer.push(name)).expect("added");
        writer.finish(&written.data_set, &path).expect("written");
        assert_eq!(Names::open(&path).expect("sound").names, written.names);
        written.names.pop();
        assert!(written.write(&path).is_err());
    }

    #[test]
    fn offsets_that_do_not_fit_are_refused() {
        let path = Path::new("file");
        assert_eq!(split(path, b"abc", &[0, 1, 3]).expect("sound"), ["a", "bc"]);
        for offset in [&[][..], &[0, 4], &[1, 3], &[0, 2, 1, 3], &[0, 9, 3]] {
            assert!(split(path, b"abc", offset).is_err(), "{offset:?}");
        }
        assert!(split(path, &[0xff], &[0, 1]).is_err(), "not UTF-8");
    }
}
