//! The identity of a data set, which every file about its pictures states.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use stage::container::{Container, Header};

/// The pictures that a file is about: their number and their common fingerprint.
///
/// Every file with a value per picture states both in its header, as `images` and `fingerprint`. A
/// reader of two such files [requires](DataSet::require) them to be equal.
#[derive(Debug, Clone)]
pub struct DataSet {
    /// The file that states it, for messages.
    pub path: PathBuf,
    /// Number of pictures, N.
    pub images: usize,
    /// Hex SHA-256 over the ids, splits and sizes of the pictures in their order; see
    /// [`crate::images`].
    pub fingerprint: String,
}

impl DataSet {
    /// Fails unless this file and `other` are about the same pictures.
    ///
    /// `remedy` says what to do, such as `"cluster again from these images"`.
    ///
    /// # Errors
    ///
    /// The message names both files and ends in the remedy.
    pub fn require(&self, other: &Self, remedy: &str) -> Result<()> {
        let (path, other_path) = (self.path.display(), other.path.display());
        if self.images != other.images {
            bail!(
                "`{path}` is about {} images but `{other_path}` about {}; {remedy}",
                self.images,
                other.images
            );
        }
        ensure!(
            self.fingerprint == other.fingerprint,
            "`{path}` is about other images than `{other_path}` (fingerprint {} against {}); \
             {remedy}",
            short(&self.fingerprint),
            short(&other.fingerprint)
        );
        Ok(())
    }

    /// Reads the two header fields of an open file.
    pub(crate) fn of(file: &Container) -> Result<Self> {
        Ok(Self {
            path: file.path().to_owned(),
            images: usize::try_from(file.header_number("images")?)?,
            fingerprint: file.header_text("fingerprint")?.to_owned(),
        })
    }

    /// The two header fields of a file to be written.
    pub(crate) fn header(&self) -> Header {
        Header::from([
            ("images".into(), self.images.into()),
            ("fingerprint".into(), self.fingerprint.clone().into()),
        ])
    }
}

/// The beginning of a fingerprint, long enough to distinguish two.
fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or(fingerprint)
}

/// Fails unless tensor `name` of `path` has `wanted` values.
pub(crate) fn check_length(path: &Path, name: &str, found: usize, wanted: usize) -> Result<()> {
    ensure!(
        found == wanted,
        "tensor `{name}` of `{}` has {found} values, not {wanted}; run its stage again",
        path.display()
    );
    Ok(())
}

/// Fails unless `index` ascends strictly and stays below `images`.
pub(crate) fn check_index(path: &Path, index: &[u32], images: usize) -> Result<()> {
    let ascending = index.windows(2).all(|pair| pair[0] < pair[1]);
    let inside = index.last().is_none_or(|&last| (last as usize) < images);
    ensure!(
        ascending && inside,
        "tensor `index` of `{}` is not a list of ascending rows below {images}; run its stage again",
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_counts_and_other_pictures_are_refused_with_both_files_and_the_remedy() {
        let data_set = |path: &str, images, fingerprint: &str| DataSet {
            path: path.into(),
            images,
            fingerprint: fingerprint.into(),
        };
        let images = data_set("images.safetensors", 5, "0123456789abcdef");
        images.require(&data_set("b", 5, "0123456789abcdef"), "unused").expect("the same");
        for other in [data_set("labels", 4, "0123456789abcdef"), data_set("labels", 5, "fe")] {
            let error = other.require(&images, "prepare again").expect_err("others").to_string();
            for part in ["`labels`", "`images.safetensors`", "prepare again"] {
                assert!(error.contains(part), "{part} is not in: {error}");
            }
        }
    }

    #[test]
    fn an_index_is_ascending_and_inside() {
        let check = |index: &[u32]| check_index(Path::new("file"), index, 4);
        assert!(check(&[]).is_ok() && check(&[0, 3]).is_ok());
        assert!(check(&[0, 4]).is_err() && check(&[1, 1]).is_err() && check(&[2, 1]).is_err());
    }
}
