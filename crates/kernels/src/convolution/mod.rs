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

pub use gather::{Finish, forward, input_gradient};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::number::{Half, Number};
    use crate::{Buffer, Pool, Precision, Variant};

    /// Small whole numbers: every product and sum is exact in f32, in any order.
    fn whole(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|at| ((at * 7919 + seed * 104_729) % 1013 % 7) as f32 - 3.).collect()
    }

    fn stored(precision: Precision, value: f32) -> f32 {
        match precision {
            Precision::F32 => value,
            Precision::Bf16 => Half::narrow(value).wide(),
        }
    }

    /// Calls `meet(input pixel, output pixel, tap)`, pixels over all images, for every tap inside.
    fn for_each_tap(g: &Geometry, mut meet: impl FnMut(usize, usize, usize)) {
        let pixels = (0..g.input.images)
            .flat_map(|n| (0..g.output.height).map(move |y| (n, y)))
            .flat_map(|(n, y)| (0..g.output.width).map(move |x| (n, y, x)));
        for (to, (n, y, x)) in pixels.enumerate() {
            for tap in 0..g.taps() {
                let from_y = y * g.stride + tap / g.kernel;
                let from_x = x * g.stride + tap % g.kernel;
                let rows = g.padding..g.padding + g.input.height;
                let columns = g.padding..g.padding + g.input.width;
                if rows.contains(&from_y) && columns.contains(&from_x) {
                    let row = n * g.input.height + from_y - g.padding;
                    meet(row * g.input.width + from_x - g.padding, to, tap);
                }
            }
        }
    }

    #[test]
    fn all_three_products_are_exact_on_whole_numbers() {
        let pool = Pool::new();
        for (images, h, w, from, to, kernel, stride, padding) in [
            (1, 1, 1, 1, 1, 3, 1, 1),
            (3, 5, 4, 3, 5, 3, 1, 1),
            (17, 4, 11, 17, 33, 3, 1, 1),
            (16, 5, 6, 18, 20, 3, 2, 1),
            (2, 9, 7, 3, 16, 7, 2, 3),
            (5, 3, 5, 40, 7, 1, 2, 0),
            (33, 1, 1, 37, 50, 1, 1, 0),
        ] {
            let input = Shape::new(images, h, w, from);
            let g = Geometry::new(input, to, kernel, stride, padding).expect("a convolution");
            let x = whole(1, input.count() * from);
            let weights = whole(2, g.weights_len());
            let dy = whole(3, g.output.count() * to);
            let bias = whole(4, to);
            let mut y: Vec<f32> = (0..g.output.count()).flat_map(|_| bias.clone()).collect();
            let (mut dx, mut dw) = (vec![1.; x.len()], vec![2.; weights.len()]);
            for_each_tap(&g, |at, out, tap| {
                for (i, o) in (0..from).flat_map(|i| (0..to).map(move |o| (i, o))) {
                    let weight = (o * from + i) * g.taps() + tap;
                    y[out * to + o] += x[at * from + i] * weights[weight];
                    dx[at * from + i] += dy[out * to + o] * weights[weight];
                    dw[weight] += x[at * from + i] * dy[out * to + o];
                }
            });
            for precision in [Precision::F32, Precision::Bf16] {
                for variant in Variant::testable() {
                    let what = format!("{variant} {precision:?} {g:?}");
                    let buffer = |len| Buffer::zeros_of(precision, len);
                    let (mut tiles, mut packed) = (buffer(input.len()), buffer(g.packed_len()));
                    let mut output = buffer(g.output.len());
                    input.pack(&x, &mut tiles);
                    pack_forward(&g, &weights, &mut packed);
                    let mut padded = vec![0.; g.output.padded_channels()];
                    padded[..to].copy_from_slice(&bias);
                    let mut residual = buffer(g.output.len());
                    g.output.pack(&dy, &mut residual);
                    let bias_alone = Finish { bias: Some(&padded), ..Finish::default() };
                    let all = Finish { residual: Some(&residual), relu: true, ..bias_alone };
                    let mut rows = vec![0.; y.len()];
                    for finish in [bias_alone, all] {
                        forward(variant, &g, &tiles, &packed, finish, &mut output, None);
                        g.output.unpack(&output, &mut rows);
                        for ((got, sum), residual) in rows.iter().zip(&y).zip(&dy) {
                            let want = if finish.relu { (sum + residual).max(0.) } else { *sum };
                            // The sum is rounded before the last step and after it.
                            let large = sum.abs() + residual.abs();
                            let unit = if precision == Precision::F32 { 0. } else { large / 100. };
                            assert!((got - want).abs() <= unit, "{what}: {got}, want {want}");
                        }
                    }

                    let mut gradient = vec![2.; weights.len()];
                    g.output.pack(&dy, &mut output);
                    weight_gradient(variant, &g, &tiles, &output, &pool, &mut gradient);
                    assert_eq!(gradient, dw, "{what}");

                    pack_backward(&g, &weights, &mut packed);
                    input.pack(&vec![1.; x.len()], &mut tiles);
                    input_gradient(variant, &g, &output, &packed, &mut tiles, true);
                    let mut rows = vec![0.; x.len()];
                    input.unpack(&tiles, &mut rows);
                    let want: Vec<f32> = dx.iter().map(|x| stored(precision, *x)).collect();
                    assert_eq!(rows, want, "{what}");
                }
            }
        }
    }
}
