//! A picture to be stored in `images.safetensors`, and its row there.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use stage::Split;

use crate::images::Id;
use crate::picture::{Encoding, Picture, decode};

/// A picture to be stored, which is known to decode.
#[derive(Debug, Clone)]
pub struct StoredPicture {
    id: Id,
    encoding: Encoding,
    channels: usize,
    size: [u32; 2],
    bytes: Vec<u8>,
}

impl StoredPicture {
    /// A JPEG, PNG or WebP file, which is stored unchanged. It is decoded once, to grey (1) or colour
    /// (3), as a check.
    ///
    /// # Errors
    ///
    /// It is of another kind, broken, cut short or too large. The message does not name the file.
    pub fn file(bytes: Vec<u8>, channels: usize) -> Result<Self> {
        let picture = decode(&bytes, channels)?;
        let encoding = Encoding::of(&bytes).context("what was decoded has an encoding")?;
        Self::new(encoding, &picture, bytes)
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
        Ok(Self {
            id: Sha256::digest(&bytes).into(),
            encoding,
            channels: picture.channels,
            size: [u32::try_from(picture.height)?, u32::try_from(picture.width)?],
            bytes,
        })
    }

    /// The SHA-256 of the bytes.
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
        let Self { id, encoding, size, .. } = *self;
        PictureRow { id, split, encoding, size, length: self.bytes.len() as u64 }
    }
}

/// A row of `images.safetensors`, without the bytes of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureRow {
    /// SHA-256 of the stored bytes.
    pub id: Id,
    /// The part of the data set that it belongs to.
    pub split: Split,
    /// The encoding of the bytes.
    pub encoding: Encoding,
    /// Height and width of the decoded picture.
    pub size: [u32; 2],
    /// Number of bytes.
    pub length: u64,
}
