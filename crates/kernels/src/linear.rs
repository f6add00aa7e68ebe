//! The bias gradient of a linear layer. The layer itself is a [convolution](crate::convolution) with
//! kernel 1, which adds the bias as its last step.

use crate::element::{ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::variant::for_each_variant;
use crate::{Buffer, Shape, Variant, parallel};

/// Adds the sums over images and pixels to `gradient`, one per channel without padding.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
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
    /// Sums the rows of a tile first, then the tiles: two short chains instead of a long one.
    fn sum_rows<T: ValueElement>(tiles: &[T], pixel_len: usize, block: usize, totals: &mut [f32; SIDE]) {
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
