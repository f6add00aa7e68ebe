//! The memory layout of values.

use std::ops::Range;

use crate::element::{ValueElement, by_precision};
use crate::{Buffer, parallel};

/// Images in a group and channels in a block: the side of a tile.
pub(crate) const SIDE: usize = 16;
/// Numbers in a tile.
pub(crate) const TILE: usize = SIDE * SIDE;

/// The extent of a value: images, rows, columns and channels. Features are maps of one pixel.
///
/// A value is stored as tiles of 16 images × 16 channels, in the order (group of 16 images, row,
/// column, block of 16 channels, image, channel). A tile of f32 is 1 KiB of contiguous memory, one
/// AVX-512 register per image. A product of tiles needs no packing and no bounds checks. The images of a
/// tile share a pixel, so padding is skipped for all of them at once.
///
/// The last group and the last block are padded with zeros. They stay zero: every kernel writes whole
/// tiles and writes zeros there, so the padding never reaches statistics, gradients or outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Images, `N`.
    pub images: usize,
    /// Rows of pixels, `H`.
    pub height: usize,
    /// Columns of pixels, `W`.
    pub width: usize,
    /// Channels, `C`.
    pub channels: usize,
}

impl Shape {
    /// Images of `height` × `width` pixels.
    pub fn new(images: usize, height: usize, width: usize, channels: usize) -> Shape {
        Shape { images, height, width, channels }
    }

    /// Rows of `width` features: one pixel each.
    pub fn features(images: usize, width: usize) -> Shape {
        Shape::new(images, 1, 1, width)
    }

    /// The length of a buffer for this value, or `None` if it exceeds the address space.
    pub fn checked_len(&self) -> Option<usize> {
        let tiles = self.images.div_ceil(SIDE).checked_mul(self.height)?.checked_mul(self.width)?;
        let len = tiles.checked_mul(self.channels.div_ceil(SIDE))?.checked_mul(TILE)?;
        (len <= isize::MAX as usize / 8).then_some(len)
    }

    /// The length of a buffer for this value.
    pub fn len(&self) -> usize {
        self.groups() * self.pixels() * self.blocks() * TILE
    }

    /// Whether the value has no numbers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values per channel: images × pixels.
    pub fn count(&self) -> usize {
        self.images * self.pixels()
    }

    /// Pixels of one image.
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Groups of 16 images; the last may be partly filled.
    pub(crate) fn groups(&self) -> usize {
        self.images.div_ceil(SIDE)
    }

    /// Blocks of 16 channels; the last may be partly filled.
    pub(crate) fn blocks(&self) -> usize {
        self.channels.div_ceil(SIDE)
    }

    /// Channels including the padding of the last block.
    pub fn padded_channels(&self) -> usize {
        self.blocks() * SIDE
    }

    /// Numbers at one pixel of one group.
    pub(crate) fn pixel_len(&self) -> usize {
        self.blocks() * TILE
    }

    /// Images in a group, without padding.
    pub(crate) fn images_in(&self, group: usize) -> usize {
        (self.images - group * SIDE).min(SIDE)
    }

    /// Channels in a block, without padding.
    pub(crate) fn channels_in(&self, block: usize) -> usize {
        (self.channels - block * SIDE).min(SIDE)
    }

    /// Pixels in a part, the unit of statistics: at most 32, of one group.
    pub(crate) fn part_pixels(&self) -> usize {
        self.pixels().min(32)
    }

    /// Parts of all groups.
    pub(crate) fn parts(&self) -> usize {
        self.groups() * self.parts_per_group()
    }

    /// The group and the pixels of a part.
    pub(crate) fn part(&self, part: usize) -> (usize, Range<usize>) {
        let (group, part) = (part / self.parts_per_group(), part % self.parts_per_group());
        let first = part * self.part_pixels();
        (group, first..(first + self.part_pixels()).min(self.pixels()))
    }

    /// The rows of pixels of some parts, counted over all groups.
    pub(crate) fn rows_of_parts(&self, parts: &Range<usize>) -> Range<usize> {
        let row = |group: usize, pixel: usize| group * self.height + pixel / self.width;
        let (first_group, first) = self.part(parts.start);
        let (last_group, last) = self.part(parts.end - 1);
        row(first_group, first.start)..row(last_group, last.end - 1) + 1
    }

    /// The tiles of a part, as first index and count of numbers, and its images without padding.
    pub(crate) fn span(&self, part: usize) -> (usize, usize, usize) {
        let (group, pixels) = self.part(part);
        let from = (group * self.pixels() + pixels.start) * self.pixel_len();
        (from, pixels.len() * self.pixel_len(), self.images_in(group))
    }

    fn parts_per_group(&self) -> usize {
        self.pixels().div_ceil(self.part_pixels())
    }

    /// Fills `tiles` from `rows` in the order (N, H, W, C).
    ///
    /// # Panics
    ///
    /// If a slice does not have the length of the shape.
    pub fn pack(&self, rows: &[f32], tiles: &mut Buffer) {
        assert_eq!(rows.len(), self.count() * self.channels);
        assert_eq!(tiles.len(), self.len());
        by_precision!(tiles.precision(), T => self.pack_of(rows, T::of_mut(tiles)));
    }

    fn pack_of<T: ValueElement>(&self, rows: &[f32], tiles: &mut [T]) {
        let (pixels, channels) = (self.pixels(), self.channels);
        parallel::for_each_chunk(tiles, self.pixel_len(), self.len(), |at, tile| {
            let (group, pixel) = (at / pixels, at % pixels);
            tile.fill(T::narrow(0.));
            for image in 0..self.images_in(group) {
                let from = ((group * SIDE + image) * pixels + pixel) * channels;
                let row = &rows[from..from + channels];
                for (block, part) in row.chunks(SIDE).enumerate() {
                    let to = block * TILE + image * SIDE;
                    for (to, value) in tile[to..to + part.len()].iter_mut().zip(part) {
                        *to = T::narrow(*value);
                    }
                }
            }
        });
    }

    /// The inverse of [`pack`](Self::pack).
    ///
    /// # Panics
    ///
    /// If a slice does not have the length of the shape.
    pub fn unpack(&self, tiles: &Buffer, rows: &mut [f32]) {
        assert_eq!(rows.len(), self.count() * self.channels);
        assert_eq!(tiles.len(), self.len());
        by_precision!(tiles.precision(), T => self.unpack_of(T::of(tiles), rows));
    }

    fn unpack_of<T: ValueElement>(&self, tiles: &[T], rows: &mut [f32]) {
        let (pixels, channels) = (self.pixels(), self.channels);
        parallel::for_each_chunk(rows, pixels * channels, self.len(), |at, row| {
            let (group, image) = (at / SIDE, at % SIDE);
            for (pixel, row) in row.chunks_mut(channels).enumerate() {
                let tile = (group * pixels + pixel) * self.pixel_len();
                for (block, part) in row.chunks_mut(SIDE).enumerate() {
                    let from = tile + block * TILE + image * SIDE;
                    for (to, value) in part.iter_mut().zip(&tiles[from..]) {
                        *to = value.wide();
                    }
                }
            }
        });
    }
}
