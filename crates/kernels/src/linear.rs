//! The bias of a linear layer. Its product is a [`crate::convolution`] with kernel 1.

use crate::layout::{SIDE, TILE};
use crate::variant::for_each_variant;
use crate::{Shape, Variant, parallel};

/// Adds `bias`, padded to whole blocks of channels, to every real image and pixel.
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn add_bias(variant: Variant, shape: Shape, bias: &[f32], values: &mut [f32]) {
    assert_eq!(bias.len(), shape.padded_channels());
    assert_eq!(values.len(), shape.len());
    let pixels = shape.pixels();
    parallel::for_each_chunk(values, shape.pixel_len(), shape.len(), |at, pixel| {
        add_to_rows(variant, pixel, shape.images_in(at / pixels), bias);
    });
}

for_each_variant! {
    fn add_to_rows(tiles: &mut [f32], images: usize, bias: &[f32]) {
        for (tile, bias) in tiles.chunks_exact_mut(TILE).zip(bias.chunks_exact(SIDE)) {
            for row in tile.chunks_exact_mut(SIDE).take(images) {
                for (value, bias) in row.iter_mut().zip(bias) {
                    *value += bias;
                }
            }
        }
    }
}

/// Adds the sums over images and pixels to `gradient`, one per real channel.
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn bias_gradient(
    variant: Variant,
    shape: Shape,
    output_gradient: &[f32],
    gradient: &mut [f32],
) {
    assert_eq!(output_gradient.len(), shape.len());
    assert_eq!(gradient.len(), shape.channels);
    parallel::for_each_chunk(gradient, SIDE, shape.len(), |block, gradient| {
        let mut sums = [0f32; SIDE];
        sum_rows(variant, output_gradient, shape.pixel_len(), block, &mut sums);
        for (gradient, sum) in gradient.iter_mut().zip(sums) {
            *gradient += sum;
        }
    });
}

for_each_variant! {
    /// Rows of a tile first, then tiles: two short chains instead of one long.
    fn sum_rows(tiles: &[f32], pixel_len: usize, block: usize, totals: &mut [f32; SIDE]) {
        for pixel in tiles.chunks_exact(pixel_len) {
            let mut sums = [0f32; SIDE];
            for row in pixel[block * TILE..][..TILE].chunks_exact(SIDE) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += value;
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total += sum;
            }
        }
    }
}
