//! The picture between two operations: one plane of floats for each channel.

use anyhow::{Result, ensure};
use kernels::image;

use crate::picture::Pixels;
use crate::views::Input;

/// A picture in floats of range `[0, 1]`, `(channels, height, width)`.
#[derive(Debug, Default, Clone)]
pub(super) struct Canvas {
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) channels: usize,
    pub(super) values: Vec<f32>,
}

impl Canvas {
    /// Changes the size. The values afterwards are arbitrary.
    pub(super) fn reshape(&mut self, height: usize, width: usize, channels: usize) {
        (self.height, self.width, self.channels) = (height, width, channels);
        self.values.resize(height * width * channels, 0.);
    }

    /// Copies a picture.
    pub(super) fn load<'a>(&mut self, picture: impl Into<Pixels<'a>>) {
        let picture = picture.into();
        self.reshape(picture.height, picture.width, picture.channels);
        let channels = picture.channels;
        for (channel, plane) in self.planes_mut().enumerate() {
            image::plane_of_bytes(plane, &picture.bytes[channel..], channels, 1. / 255.);
        }
    }

    /// Number of pixels.
    pub(super) fn pixels(&self) -> usize {
        self.height * self.width
    }

    pub(super) fn planes(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.pixels())
    }

    pub(super) fn planes_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let pixels = self.pixels();
        self.values.chunks_exact_mut(pixels)
    }

    /// The planes of red, green and blue; none of a grey picture.
    pub(super) fn colours(&mut self) -> Option<[&mut [f32]; 3]> {
        if self.channels != 3 {
            return None;
        }
        let pixels = self.pixels();
        let (red, rest) = self.values.split_at_mut(pixels);
        let (green, blue) = rest.split_at_mut(pixels);
        Some([red, green, blue])
    }

    /// Mirrors left and right.
    pub(super) fn flip(&mut self) {
        let width = self.width;
        for row in self.values.chunks_exact_mut(width) {
            row.reverse();
        }
    }

    /// Writes `(value − mean) / std`, channels innermost.
    pub(super) fn normalise(&mut self, input: &Input, out: &mut [f32]) -> Result<()> {
        ensure!(
            out.len() == self.values.len(),
            "a view of {} values into {}",
            self.values.len(),
            out.len()
        );
        let scale = |channel: usize| (1. / input.std[channel]) as f32;
        let shift = |channel: usize| (-input.mean[channel] / input.std[channel]) as f32;
        match self.colours() {
            Some([red, green, blue]) => {
                let (scale, shift) = ([0, 1, 2].map(scale), [0, 1, 2].map(shift));
                image::interleave(out, red, green, blue, scale, shift);
            }
            None => {
                out.copy_from_slice(&self.values);
                image::scale_and_shift(out, scale(0), shift(0));
            }
        }
        Ok(())
    }
}
