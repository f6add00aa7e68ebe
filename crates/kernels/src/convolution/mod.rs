//! Convolutions: any kernel, stride and padding, forward and both gradients.
//!
//! An output pixel of a group of 16 images is a sum of tile products over the taps that meet the
//! input and the blocks of input channels. Taps beyond the border are left out, so nothing is
//! copied or padded: on a map of one pixel a 3×3 convolution costs one tap, not nine. The input
//! gradient is the same sum with taps and channels turned around; with a stride, each input pixel
//! meets only the taps of its own parity.

mod gather;
mod pack;
mod weights;

pub use gather::{forward, input_gradient};
pub use pack::{pack_backward, pack_forward};
pub use weights::weight_gradient;

use crate::Shape;
use crate::layout::TILE;

/// A convolution between two values of known extent. A linear layer is one with kernel 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// What it reads.
    pub input: Shape,
    /// What it writes.
    pub output: Shape,
    /// Side of the square kernel, in pixels.
    pub kernel: usize,
    /// Input pixels from one output pixel to the next.
    pub stride: usize,
    /// Zero pixels added on each side.
    pub padding: usize,
}

impl Geometry {
    /// The convolution of `input` to `channels` channels, or `None` when no output pixel is left
    /// or kernel or stride is 0.
    pub fn new(
        input: Shape,
        channels: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Option<Geometry> {
        let height = output_side(input.height, kernel, stride, padding)?;
        let width = output_side(input.width, kernel, stride, padding)?;
        let output = Shape { height, width, channels, ..input };
        Some(Geometry { input, output, kernel, stride, padding })
    }

    /// Numbers in the weights, in the order (output channel, input channel, row, column).
    pub fn weights_len(&self) -> usize {
        self.output.channels * self.input.channels * self.taps()
    }

    /// Numbers in the packed weights, forward or backward.
    pub fn packed_len(&self) -> usize {
        self.taps() * self.input.blocks() * self.output.blocks() * TILE
    }

    /// Numbers of scratch that [`weight_gradient`] needs.
    pub fn scratch_len(&self) -> usize {
        self.packed_len() * weights::parts(self)
    }

    /// Multiplications of the forward pass, not counting the border.
    fn operations(&self) -> usize {
        self.output.count() * self.output.channels * self.input.channels * self.taps()
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }
}

/// Pixels of the output along one side: `⌊(side + 2·padding − kernel) / stride⌋ + 1`, or `None`
/// when the kernel is larger than the padded input.
pub(crate) fn output_side(
    side: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Option<usize> {
    if side == 0 || kernel == 0 || stride == 0 {
        return None;
    }
    let padded = padding.checked_mul(2)?.checked_add(side)?;
    Some(padded.checked_sub(kernel)? / stride + 1)
}

/// Numbers in the packed weights of one pair of blocks that are written.
fn panel_len(taps: usize, from_blocks: usize) -> usize {
    2 * taps * from_blocks * TILE
}

/// Blocks in a pair: 2, or 1 in the last pair of an odd number.
fn columns_of(blocks: usize, pair: usize) -> usize {
    (blocks - 2 * pair).min(2)
}
