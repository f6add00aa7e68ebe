//! Synthetic photographs, for works that decode pictures.
//!
//! Noise whose amplitude falls with its frequency, as in photographs, ellipses and boxes with sharp
//! edges, and a little noise of a sensor: decoding one costs about as much as a photograph.

use anyhow::{Result, ensure};
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};
use rand::Rng;

/// Draws a picture, as JPEG of quality 90 with colour at half the resolution. One of 500 × 375 pixels has
/// about 40 KB.
///
/// # Errors
///
/// The picture has no pixels.
pub fn jpeg(height: u16, width: u16, rng: &mut impl Rng) -> Result<Vec<u8>> {
    ensure!(height > 0 && width > 0, "a picture of {width} × {height} has no pixels");
    let pixels = pixels(height.into(), width.into(), rng);
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, 90);
    encoder.set_sampling_factor(SamplingFactor::R_4_2_0);
    encoder.encode(&pixels, width, height, ColorType::Rgb)?;
    Ok(file)
}

/// Draws the pixels of a picture, `(H, W, 3)`.
pub fn pixels(height: usize, width: usize, rng: &mut impl Rng) -> Vec<u8> {
    let mut values = vec![128f32; height * width * 3];
    for (cells, weight) in [(2, 60.), (5, 50.), (12, 25.), (30, 14.), (80, 8.), (180, 4.)] {
        add_noise(&mut values, width, cells.min(width), weight, rng);
    }
    for _ in 0..8 {
        let round = rng.next_u32().is_multiple_of(2);
        let mut part = |end: usize| unit(rng) * end as f32;
        let (x, y) = (part(width), part(height));
        let (a, b) = (1. + part(width / 5), 1. + part(height / 5));
        let colour = [part(256), part(256), part(256)];
        for (i, pixel) in values.chunks_exact_mut(3).enumerate() {
            let (dx, dy) = (((i % width) as f32 - x) / a, ((i / width) as f32 - y) / b);
            let inside = if round { dx * dx + dy * dy < 1. } else { dx.abs().max(dy.abs()) < 1. };
            if inside {
                for (value, colour) in pixel.iter_mut().zip(colour) {
                    *value = 0.25 * *value + 0.75 * colour;
                }
            }
        }
    }
    let byte = |value: &f32| (value + 6. * (unit(rng) - 0.5)).clamp(0., 255.).round() as u8;
    values.iter().map(byte).collect()
}

/// Adds normal-like noise that varies over a `cells`-th of the width, interpolated bilinearly.
fn add_noise(values: &mut [f32], width: usize, cells: usize, weight: f32, rng: &mut impl Rng) {
    let height = values.len() / 3 / width;
    let rows = (cells * height).div_ceil(width) + 2;
    let grid: Vec<[f32; 3]> = (0..rows * (cells + 2))
        .map(|_| [0; 3].map(|_| 3. * (unit(rng) + unit(rng) - 1.)))
        .collect();
    for (i, pixel) in values.chunks_exact_mut(3).enumerate() {
        let at = |place: usize| place as f32 * cells as f32 / width as f32;
        let (x, y) = (at(i % width), at(i / width));
        let (column, row) = (x as usize, y as usize);
        let (right, below) = (x - column as f32, y - row as f32);
        let corner = row * (cells + 2) + column;
        for (channel, value) in pixel.iter_mut().enumerate() {
            let mix = |at: usize| grid[at][channel] * (1. - right) + grid[at + 1][channel] * right;
            *value += weight * (mix(corner) * (1. - below) + mix(corner + cells + 2) * below);
        }
    }
}

/// A number in `[0, 1)`.
fn unit(rng: &mut impl Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 24) as f32
}
