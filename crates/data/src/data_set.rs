//! Which pictures a file is about.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use stage::container::{Container, Header};

/// The pictures a file is about: how many, and the fingerprint of the lot.
///
/// Every file that has a value per picture carries both in its header, as `images` and
/// `fingerprint`, and a reader of two such files [requires](DataSet::require) them to be the same.
#[derive(Debug, Clone)]
pub struct DataSet {
    /// The file that said so, for messages.
    pub path: PathBuf,
    /// Number of pictures, N.
    pub images: usize,
    /// Hex SHA-256 over the ordered ids, splits and sizes of the pictures; see [`crate::images`].
    pub fingerprint: String,
}

impl DataSet {
    /// Fails unless this file and `other` are about the same pictures.
    ///
    /// `remedy` says what to do, such as `"cluster again from these images"`.
    ///
    /// # Errors
    ///
    /// They are not; the message names both files and ends in the remedy.
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

/// Enough of a fingerprint to tell two apart on one line.
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

/// Fails unless `index` is ascending, without repetition, and below `images`.
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
