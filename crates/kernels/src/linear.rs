//! The bias of a linear layer. Its product is a [convolution](crate::convolution) with kernel 1,
//! which adds the bias.

use crate::layout::{SIDE, TILE};
use crate::number::{Number, by_precision};
use crate::variant::for_each_variant;
use crate::{Buffer, Shape, Variant, parallel};

for_each_variant! {
    /// Adds the bias to the real images of tiles side by side.
    pub(crate) fn add_to_rows<T: Number>(tiles: &mut [T], images: usize, bias: &[f32]) {
        for (tile, bias) in tiles.chunks_exact_mut(TILE).zip(bias.chunks_exact(SIDE)) {
            for row in tile.chunks_exact_mut(SIDE).take(images) {
                for (value, bias) in row.iter_mut().zip(bias) {
                    *value = T::narrow(value.wide() + bias);
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
    output_gradient: &Buffer,
    gradient: &mut [f32],
) {
    assert_eq!(output_gradient.len(), shape.len());
    assert_eq!(gradient.len(), shape.channels);
    parallel::for_each_chunk(gradient, SIDE, shape.len(), |block, gradient| {
        let mut sums = [0f32; SIDE];
        by_precision!(output_gradient.precision(), T => {
            sum_rows(variant, T::of(output_gradient), shape.pixel_len(), block, &mut sums);
        });
        for (gradient, sum) in gradient.iter_mut().zip(sums) {
            *gradient += sum;
        }
    });
}

for_each_variant! {
    /// Rows of a tile first, then tiles: two short chains instead of one long.
    fn sum_rows<T: Number>(tiles: &[T], pixel_len: usize, block: usize, totals: &mut [f32; SIDE]) {
        for pixel in tiles.chunks_exact(pixel_len) {
            let mut sums = [0f32; SIDE];
            for row in pixel[block * TILE..][..TILE].chunks_exact(SIDE) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += value.wide();
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total += sum;
            }
        }
    }
}
