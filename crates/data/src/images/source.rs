//! A picture to be stored, and what `images.safetensors` says of it.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use stage::Split;

use crate::images::Id;
use crate::picture::{Encoding, Picture, decode};

/// A picture on its way into the file: its bytes as they will be stored, known to be readable.
#[derive(Debug, Clone)]
pub struct Source {
    id: Id,
    encoding: Encoding,
    channels: usize,
    size: [u32; 2],
    bytes: Vec<u8>,
}

impl Source {
    /// A JPEG, PNG or WebP file, which is stored as it is. It is decoded once, to grey (1) or colour
    /// (3), to make sure that it can be.
    ///
    /// # Errors
    ///
    /// It is none of them, is broken, cut short or too large; the message says which, but not where the
    /// file came from.
    pub fn file(bytes: Vec<u8>, channels: usize) -> Result<Self> {
        let picture = decode(&bytes, channels)?;
        let encoding = Encoding::of(&bytes).context("what was decoded has an encoding")?;
        Self::new(encoding, &picture, bytes)
    }

    /// Raw pixels, for sources that have no file per picture. Grey becomes colour, or colour grey,
    /// if `channels` asks for it, before the id is taken.
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

    /// The bytes as they are stored, without a copy.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// What the file says of it besides its bytes.
    pub fn row(&self, split: Split) -> Row {
        let Self { id, encoding, size, .. } = *self;
        Row { id, split, encoding, size, length: self.bytes.len() as u64 }
    }
}

/// What `images.safetensors` says of a picture besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// SHA-256 of the stored bytes.
    pub id: Id,
    /// Which part of the data set it belongs to.
    pub split: Split,
    /// How the bytes are to be read.
    pub encoding: Encoding,
    /// Height and width of the decoded picture.
    pub size: [u32; 2],
    /// How many bytes there are.
    pub length: u64,
}
