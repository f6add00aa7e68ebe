//! Gaussian blur, as two passes: over rows and over columns.

use anyhow::{Result, ensure};
use kernels::image;

use crate::views::canvas::Canvas;

/// Buffers that are reused from picture to picture.
#[derive(Debug, Default)]
pub(super) struct BlurBuffers {
    kernel: Vec<f32>,
    row: Vec<f32>,
}

/// Weights below this share of the middle one are dropped. Together they would change a value by less
/// than a hundredth of a step between bytes.
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
    b: &mut BlurBuffers,
) -> Result<()> {
    let (height, width) = (canvas.height, canvas.width);
    ensure!(
        extent / 2 < height.min(width),
        "`kernel` of a blur is {extent}, which needs more than {} pixels a side, but this picture has \
         {height}×{width}; choose a smaller kernel",
        extent / 2
    );
    half_kernel(extent, deviation, &mut b.kernel);
    b.row.resize(width + 2 * (b.kernel.len() - 1), 0.);
    out.reshape(height, width, canvas.channels);
    for (plane, out) in canvas.planes().zip(out.planes_mut()) {
        image::blur_plane(plane, width, &b.kernel, &mut b.row, out);
    }
    Ok(())
}

/// Computes the weights of the middle and of each distance from it. All `extent` weights sum to 1.
fn half_kernel(extent: usize, deviation: f64, kernel: &mut Vec<f32>) {
    let weight = |distance: usize| (-0.5 * (distance as f64 / deviation).powi(2)).exp();
    let sum = 1. + 2. * (1..=extent / 2).map(weight).sum::<f64>();
    kernel.clear();
    let heavy = (0..=extent / 2).map(weight).take_while(|&weight| weight >= NEGLIGIBLE);
    kernel.extend(heavy.map(|weight| (weight / sum) as f32));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::example;

    /// torchvision's way: pad by reflection, then convolve with the whole kernel in two dimensions.
    fn by_definition(canvas: &Canvas, extent: usize, deviation: f64) -> Vec<f64> {
        let (height, width) = (canvas.height as isize, canvas.width as isize);
        let half = extent as isize / 2;
        let weight = |at: isize| (-0.5 * (at as f64 / deviation).powi(2)).exp();
        let sum: f64 = (-half..=half).map(weight).sum();
        let mirror = |at: isize, side: isize| (side - 1 - (side - 1 - at.abs()).abs()) as usize;
        let mut out = Vec::new();
        for plane in canvas.planes() {
            for y in 0..height {
                for x in 0..width {
                    let mut value = 0.;
                    for dy in -half..=half {
                        for dx in -half..=half {
                            let at = mirror(y + dy, height) * canvas.width + mirror(x + dx, width);
                            value += weight(dy) * weight(dx) / (sum * sum) * f64::from(plane[at]);
                        }
                    }
                    out.push(value);
                }
            }
        }
        out
    }

    #[test]
    fn blurring_agrees_with_the_definition() {
        let mut canvas = Canvas::default();
        canvas.load(&example(13, 17, 3));
        let mut out = Canvas::default();
        let mut buffers = BlurBuffers::default();
        for (extent, deviation) in [(1, 1.), (3, 0.5), (9, 0.1), (9, 1.3), (23, 2.), (25, 5.)] {
            apply(&canvas, &mut out, extent, deviation, &mut buffers).expect("large enough");
            let want = by_definition(&canvas, extent, deviation);
            for (got, want) in out.values.iter().zip(want) {
                let error = (f64::from(*got) - want).abs();
                assert!(error < 2e-6, "{extent}, {deviation}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn a_picture_too_small_to_be_mirrored_is_refused() {
        let mut canvas = Canvas::default();
        canvas.load(&example(4, 9, 1));
        let error = apply(&canvas, &mut Canvas::default(), 9, 1., &mut BlurBuffers::default());
        let error = error.expect_err("4 rows").to_string();
        assert!(error.contains("`kernel` of a blur is 9") && error.contains("4×9"), "{error}");
        apply(&canvas, &mut Canvas::default(), 7, 1., &mut BlurBuffers::default())
            .expect("4 rows do");
    }
}
