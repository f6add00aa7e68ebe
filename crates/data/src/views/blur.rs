//! Gaussian blur, rows and columns apart.

use anyhow::{Result, ensure};
use kernels::image;

use crate::views::canvas::Canvas;

/// Memory that is used again for the next picture.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    kernel: Vec<f32>,
    row: Vec<f32>,
    starts: Vec<usize>,
    weights: Vec<f32>,
}

/// Weights below this share of the middle one are left out: together they would move a value by
/// less than a hundredth of a step between bytes.
const NEGLIGIBLE: f64 = 1e-6;

/// Writes the blurred `canvas` to `out`: torchvision's `gaussian_blur` with a kernel of `extent`
/// pixels and this standard deviation in pixels. Edges are mirrored without repeating the edge.
///
/// # Errors
///
/// The picture is too small to be mirrored that far.
pub(super) fn apply(
    canvas: &Canvas,
    out: &mut Canvas,
    extent: usize,
    deviation: f64,
    b: &mut Buffers,
) -> Result<()> {
    let (height, width) = (canvas.height, canvas.width);
    ensure!(
        extent / 2 < height.min(width),
        "blur with `kernel = {extent}` needs pictures of more than {} pixels, but this one has \
         {height}×{width}; choose a smaller kernel",
        extent / 2
    );
    half_kernel(extent, deviation, &mut b.kernel);
    let radius = b.kernel.len() - 1;
    b.weights.clear();
    b.weights.extend(b.kernel[1..].iter().rev().chain(&b.kernel));
    b.row.resize(width + 2 * radius, 0.);
    out.reshape(height, width, canvas.channels);
    for (plane, out) in canvas.planes().zip(out.planes_mut()) {
        for (y, line) in out.chunks_exact_mut(width).enumerate() {
            b.starts.clear();
            let rows = 0..=2 * radius;
            b.starts.extend(rows.map(|k| mirrored(y + k, radius, height) * width));
            image::mix_rows(&mut b.row[radius..radius + width], plane, &b.starts, &b.weights);
            for distance in 1..=radius {
                b.row[radius - distance] = b.row[radius + distance];
                b.row[radius + width - 1 + distance] = b.row[radius + width - 1 - distance];
            }
            image::blur_row(line, &b.row, &b.kernel);
        }
    }
    Ok(())
}

/// The weights of the middle and of each distance from it; all `extent` of them would have sum 1.
fn half_kernel(extent: usize, deviation: f64, kernel: &mut Vec<f32>) {
    let weight = |distance: usize| (-0.5 * (distance as f64 / deviation).powi(2)).exp();
    let sum = 1. + 2. * (1..=extent / 2).map(weight).sum::<f64>();
    kernel.clear();
    let heavy = (0..=extent / 2).map(weight).take_while(|&weight| weight >= NEGLIGIBLE);
    kernel.extend(heavy.map(|weight| (weight / sum) as f32));
}

/// The row that stands at `position - before`, counted back from the edges of `length` rows.
fn mirrored(position: usize, before: usize, length: usize) -> usize {
    if position < before {
        before - position
    } else if position - before >= length {
        2 * length - 2 - (position - before)
    } else {
        position - before
    }
}
