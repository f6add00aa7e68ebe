//! A picture to be stored in `images.safetensors`, and its row there.

use anyhow::{Context, Result};
use jpeg_encoder::{ColorType, Encoder};
use sha2::{Digest, Sha256};
use stage::Split;

use crate::images::Id;
use crate::picture::{Encoding, Picture, decode};
use crate::views::resize::shrink;

/// A picture to be stored, which is known to decode.
#[derive(Debug, Clone)]
pub struct StoredPicture {
    id: Id,
    encoding: Encoding,
    channels: usize,
    size: [u32; 2],
    stored_id: Id,
    stored_size: [u32; 2],
    bytes: Vec<u8>,
}

/// JPEG quality of a picture that is stored smaller than it was. At 95 and with all of its colours
/// (4:4:4), no value moves by more than a few steps of 255, and the file is a quarter of a PNG's.
const QUALITY: u8 = 95;

impl StoredPicture {
    /// A JPEG, PNG or WebP file, which is stored unchanged. It is decoded once, to grey (1) or colour
    /// (3), as a check.
    ///
    /// # Errors
    ///
    /// It is of another kind, broken, cut short or too large. The message does not name the file.
    pub fn file(bytes: Vec<u8>, channels: usize) -> Result<Self> {
        Self::file_within(bytes, channels, usize::MAX)
    }

    /// [`StoredPicture::file`], but a picture with a longer shorter side than `shorter_side` is stored
    /// at that size: turned by its EXIF orientation, resized by the cubic with antialiasing that
    /// published networks use, and encoded as JPEG. It stays the same picture: its id and the size that
    /// identifies it are those of the file.
    ///
    /// A picture that would still have a side of more than 65,535 pixels, which JPEG does not allow,
    /// keeps its bytes.
    ///
    /// # Errors
    ///
    /// As [`StoredPicture::file`].
    pub fn file_within(bytes: Vec<u8>, channels: usize, shorter_side: usize) -> Result<Self> {
        let picture = decode(&bytes, channels)?;
        let encoding = Encoding::of(&bytes).context("what was decoded has an encoding")?;
        let mut stored = Self::new(encoding, &picture, bytes)?;
        if picture.height.min(picture.width) > shorter_side {
            stored.bytes = stored.reduced(picture, shorter_side)?;
        }
        Ok(stored)
    }

    /// The bytes to store of a `picture` that is too large, after noting their form.
    fn reduced(&mut self, picture: Picture, shorter_side: usize) -> Result<Vec<u8>> {
        let small = shrink(&picture, shorter_side)?;
        drop(picture);
        let (Ok(width), Ok(height)) = (u16::try_from(small.width), u16::try_from(small.height))
        else {
            return Ok(std::mem::take(&mut self.bytes));
        };
        let colours = if small.channels == 1 { ColorType::Luma } else { ColorType::Rgb };
        let mut bytes = Vec::new();
        Encoder::new(&mut bytes, QUALITY).encode(&small.pixels, width, height, colours)?;
        self.encoding = Encoding::Jpeg;
        self.stored_id = Sha256::digest(&bytes).into();
        self.stored_size = [height.into(), width.into()];
        Ok(bytes)
    }

    /// Raw pixels, for sources without a file per picture. They are converted to `channels`, grey (1)
    /// or colour (3), before the id is computed.
    ///
    /// # Errors
    ///
    /// The picture is too large for the file format.
    pub fn raw(picture: Picture, channels: usize) -> Result<Self> {
        let mut picture = picture.with_channels(channels);
        let pixels = std::mem::take(&mut picture.pixels);
        Self::new(Encoding::Raw, &picture, pixels)
    }

    fn new(encoding: Encoding, picture: &Picture, bytes: Vec<u8>) -> Result<Self> {
        let id = Sha256::digest(&bytes).into();
        let size = [u32::try_from(picture.height)?, u32::try_from(picture.width)?];
        let channels = picture.channels;
        Ok(Self { id, encoding, channels, size, stored_id: id, stored_size: size, bytes })
    }

    /// The SHA-256 of the picture's own file, or of its pixels.
    pub fn id(&self) -> Id {
        self.id
    }

    /// 1 grey, 3 colour.
    pub(super) fn channels(&self) -> usize {
        self.channels
    }

    /// The bytes as they are stored.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes as they are stored, without copying.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Its row in the file, without its bytes.
    pub fn row(&self, split: Split) -> PictureRow {
        let Self { id, encoding, size, stored_id, stored_size, .. } = *self;
        let length = self.bytes.len() as u64;
        PictureRow { id, split, encoding, size, stored_id, stored_size, length }
    }
}

/// A row of `images.safetensors`, without the bytes of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureRow {
    /// SHA-256 of the picture's own file, or of its pixels.
    pub id: Id,
    /// The part of the data set that it belongs to.
    pub split: Split,
    /// The encoding of the bytes.
    pub encoding: Encoding,
    /// Height and width of the picture.
    pub size: [u32; 2],
    /// SHA-256 of the stored bytes: the id, unless the picture is stored smaller.
    pub stored_id: Id,
    /// Height and width as it is stored.
    pub stored_size: [u32; 2],
    /// Number of stored bytes.
    pub length: u64,
}

impl PictureRow {
    /// Whether the picture is stored smaller than it is.
    pub fn is_reduced(&self) -> bool {
        self.stored_id != self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::{example, jpeg, png, with_orientation};

    fn difference(one: &Picture, other: &Picture) -> u8 {
        assert_eq!((one.height, one.width), (other.height, other.width));
        let pairs = one.pixels.iter().zip(&other.pixels);
        pairs.map(|(one, other)| one.abs_diff(*other)).max().expect("pixels")
    }

    #[test]
    fn a_picture_within_the_bound_keeps_its_bytes() -> Result<()> {
        for file in [jpeg(&example(40, 60, 3)), png(&example(60, 40, 1))] {
            let whole = StoredPicture::file(file.clone(), 3)?;
            let kept = StoredPicture::file_within(file.clone(), 3, 40)?;
            assert_eq!(kept.bytes, file);
            assert_eq!(kept.row(Split::Train), whole.row(Split::Train));
            assert!(!kept.row(Split::Train).is_reduced());
        }
        Ok(())
    }

    #[test]
    fn a_larger_picture_is_stored_smaller_and_stays_the_same_picture() -> Result<()> {
        for (channels, file) in [(3, jpeg(&example(40, 60, 3))), (1, png(&example(40, 60, 1)))] {
            let whole = StoredPicture::file(file.clone(), channels)?.row(Split::Test);
            let small = StoredPicture::file_within(file.clone(), channels, 30)?;
            let row = small.row(Split::Test);
            assert_eq!((row.id, row.size, row.split), (whole.id, [40, 60], Split::Test));
            assert_eq!((row.encoding, row.stored_size), (Encoding::Jpeg, [30, 45]));
            assert_eq!(row.stored_id, Id::from(Sha256::digest(small.bytes())));
            assert!(row.is_reduced() && row.length == small.bytes.len() as u64);
            let want = shrink(&decode(&file, channels)?, 30)?;
            assert!(difference(&decode(small.bytes(), channels)?, &want) < 12);
            // The same bits each time.
            assert_eq!(StoredPicture::file_within(file, channels, 30)?.bytes, small.bytes);
        }
        Ok(())
    }

    #[test]
    fn an_exif_orientation_is_obeyed_once() -> Result<()> {
        let turned = with_orientation(jpeg(&example(40, 60, 3)), 6);
        let upright = decode(&turned, 3)?;
        let small = StoredPicture::file_within(turned, 3, 20)?;
        assert_eq!((small.size, small.stored_size), ([60, 40], [30, 20]));
        assert!(difference(&decode(small.bytes(), 3)?, &shrink(&upright, 20)?) < 12);
        Ok(())
    }

    #[test]
    fn a_side_too_long_for_jpeg_keeps_the_file() -> Result<()> {
        let file = png(&Picture::new(4, 66_000 * 2, 1, vec![7; 4 * 66_000 * 2])?);
        let kept = StoredPicture::file_within(file.clone(), 1, 2)?;
        assert_eq!((kept.bytes, kept.encoding), (file, Encoding::Png));
        Ok(())
    }
}
