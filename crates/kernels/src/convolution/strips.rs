//! Strips of pixels for the weight gradient on a tile unit, which multiplies the 32 images of two neighbouring pixels at
//! once.
//!
//! Both sides have the pixels of a row next to each other. The left one, the input, has them channel by channel, and
//! with zeros where a kernel reaches beyond the edge, so that every tap meets as many pixels as a row of outputs has.
//! With a stride, pixels that are a stride apart are neighbours.

use std::ops::Range;

use super::Geometry;
use crate::Variant;
use crate::buffer::words_within;
use crate::element::{Half, ValueElement, pair_images};
use crate::layout::{SIDE, TILE};
use crate::transpose::Interleaving;

/// How the rows of a strip lie in memory.
#[derive(Clone, Copy)]
pub(super) struct StripLayout<'a> {
    g: &'a Geometry,
    /// Output pixels in a row, an even number.
    pub width: usize,
    /// Input pixels in a row with each remainder of the stride, an even number.
    phase: usize,
}

impl<'a> StripLayout<'a> {
    pub fn new(g: &'a Geometry) -> StripLayout<'a> {
        let width = g.output.width.next_multiple_of(2);
        let phase = (width + (g.kernel - 1) / g.stride).next_multiple_of(2);
        StripLayout { g, width, phase }
    }

    /// Numbers in a row of pixels for one channel of the input.
    pub fn left_row(&self) -> usize {
        self.g.stride.min(self.g.kernel) * self.phase * SIDE
    }

    /// Numbers in a row of pixels of the input.
    pub fn left_len(&self, blocks: usize) -> usize {
        blocks * SIDE * self.left_row()
    }

    /// Numbers in a row of pixels for one block of channels of the output.
    pub fn column(&self) -> usize {
        self.width * TILE
    }

    /// Where the input pixel lies that a tap in this column of the kernel meets at output pixel `x`, in a row.
    pub fn left(&self, x: usize, tap_x: usize) -> usize {
        (tap_x % self.g.stride * self.phase + x + tap_x / self.g.stride) * SIDE
    }

    /// Arranges a row of the input, counted over all groups.
    pub fn arrange_left(
        &self,
        variant: Variant,
        input: &[Half],
        row: usize,
        blocks: &Range<usize>,
        to: &mut [Half],
    ) {
        let shape = self.g.input;
        let words = words_within(to);
        let channel = self.left_row() / SIDE / 2;
        // Two pixels, (pixel, image / 2, channel, image % 2).
        let mut paired = Pixels([Half(0); 2 * TILE]);
        for (at, block) in blocks.clone().enumerate() {
            let to = &mut words[at * SIDE * channel * SIDE..];
            for place in (0..channel * 2).step_by(2) {
                let (remainder, first) = (place / self.phase, place % self.phase);
                for (pixel, to) in paired.0.chunks_exact_mut(TILE).enumerate() {
                    let x = ((first + pixel) * self.g.stride + remainder)
                        .checked_sub(self.g.padding)
                        .filter(|x| *x < shape.width);
                    match x {
                        Some(x) => {
                            let from = (row * shape.width + x) * shape.pixel_len() + block * TILE;
                            pair_images(variant, &input[from..from + TILE], to);
                        }
                        None => to.fill(Half(0)),
                    }
                }
                let (start, place) = (|lane| lane * SIDE, |c| c * channel + place / 2);
                let rows = Interleaving { count: SIDE, len: SIDE, start, place };
                rows.rows_to_lanes(variant, words_within(&mut paired.0), to);
            }
        }
    }

    /// Arranges a row of the output gradient, counted over all groups.
    pub fn arrange_right(
        &self,
        variant: Variant,
        gradient: &[Half],
        row: usize,
        blocks: &Range<usize>,
        to: &mut [Half],
    ) {
        let shape = self.g.output;
        for (block, to) in blocks.clone().zip(to.chunks_exact_mut(self.column())) {
            for (x, to) in to.chunks_exact_mut(TILE).enumerate() {
                if x == shape.width {
                    to.fill(Half::narrow(0.));
                    continue;
                }
                let from = (row * shape.width + x) * shape.pixel_len() + block * TILE;
                pair_images(variant, &gradient[from..from + TILE], to);
            }
        }
    }
}

/// The numbers of two pixels, aligned to a cache line.
#[repr(align(64))]
struct Pixels([Half; 2 * TILE]);
