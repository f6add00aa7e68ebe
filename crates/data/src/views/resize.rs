//! Cropping and resizing in one pass.
//!
//! Each value of the result is a weighted sum over a few rows and a few columns.
//!
//! With the triangle, rows are mixed first, because they are contiguous in memory, and the mixed row is
//! still in the nearest cache when its columns are mixed. Pillow mixes columns first and rounds to bytes
//! in between; without rounding the order makes no difference.
//!
//! The cubic can leave the range of values at edges, and Pillow clips after each of its two passes.
//! So columns are mixed first and their sums clipped, then rows. The result is within one step of
//! Pillow's; with a single clip at the end it is up to 11 steps off on noise.

use std::ops::Range;

use anyhow::{Result, ensure};
use kernels::image::{self, Mix};

use crate::picture::{Picture, Pixels};
use crate::views::Filter;
use crate::views::canvas::Canvas;

/// A part of a picture, the size that it is resized to, and the part of the result that is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Area {
    /// Top, left, height and width of the part.
    part: [usize; 4],
    /// Height and width after resizing.
    to: [usize; 2],
    /// Top, left, height and width of the part of the result that is kept.
    cut: [usize; 4],
    filter: Filter,
}

impl Area {
    /// A part (top, left, height, width), resized to a size (height, width), all of which is kept.
    pub(super) fn new(part: [usize; 4], to: [usize; 2], filter: Filter) -> Self {
        Self { part, to, cut: [0, 0, to[0], to[1]], filter }
    }

    /// All of a picture of `size` (height, width), its shorter side resized to `pixels` and the longer
    /// rounded down.
    pub(super) fn shorter([height, width]: [usize; 2], pixels: usize, filter: Filter) -> Self {
        let shorter = height.min(width) as f64;
        let to = [height, width].map(|side| (pixels as f64 * side as f64 / shorter) as usize);
        Self::new([0, 0, height, width], to, filter)
    }

    /// The same area, of which only the middle square is kept.
    ///
    /// - `round`: rounds the top and left margins if they end in half a pixel.
    ///
    /// # Errors
    ///
    /// The square does not fit.
    pub(super) fn cut_to_centre(self, pixels: usize, round: fn(f64) -> f64) -> Result<Self> {
        let [height, width] = self.to;
        ensure!(
            height.min(width) >= pixels,
            "centre-crop needs {pixels}×{pixels} pixels, but the picture has {height}×{width}; put \
             resize-shorter before it"
        );
        let [top, left] = self.to.map(|side| round((side - pixels) as f64 / 2.));
        Ok(Self { cut: [top as usize, left as usize, pixels, pixels], ..self })
    }

    /// Sets the weights of rows, times `scale`, and of columns.
    fn set(&self, b: &mut ResizeBuffers, scale: f64) {
        let [_, _, height, width] = self.part;
        let [top, left, to_height, to_width] = self.cut;
        b.rows.set(height, self.to[0], top..top + to_height, self.filter, scale);
        b.columns.set(width, self.to[1], left..left + to_width, self.filter, 1.);
    }
}

/// Buffers that are reused from picture to picture.
#[derive(Debug, Default)]
pub(super) struct ResizeBuffers {
    row: Vec<f32>,
    rows: Axis,
    columns: Axis,
    /// The columns of the cubic's first pass, before rows are mixed.
    middle: Vec<f32>,
    /// Keeps one side unchanged.
    unit: Axis,
}

/// Resizes an area of a picture in bytes.
pub(super) fn from_picture<'a>(
    picture: impl Into<Pixels<'a>>,
    area: &Area,
    out: &mut Canvas,
    b: &mut ResizeBuffers,
) {
    let picture = picture.into();
    let channels = picture.channels;
    out.reshape(area.cut[2], area.cut[3], channels);
    let ([top, left, _, width], stride) = (area.part, picture.width * channels);
    let part = &picture.bytes[top * stride + left * channels..];
    if area.filter == Filter::Bicubic {
        return in_two_passes(area, out, b, 1. / 255., |first, rows, columns, row, middle| {
            let part = &part[first * stride..];
            image::resize_bytes(part, stride, width, channels, rows, columns, row, middle);
        });
    }
    area.set(b, 1. / 255.);
    let (rows, columns) = (b.rows.mix(), b.columns.mix());
    let (row, values) = (&mut b.row, &mut out.values);
    image::resize_bytes(part, stride, width, channels, rows, columns, row, values);
}

/// The picture with a shorter side of `pixels`, by the cubic, rounded to bytes.
pub(crate) fn shrink(picture: &Picture, pixels: usize) -> Result<Picture> {
    let size = [picture.height, picture.width];
    let (mut canvas, mut buffers) = (Canvas::default(), ResizeBuffers::default());
    from_picture(picture, &Area::shorter(size, pixels, Filter::Bicubic), &mut canvas, &mut buffers);
    let channels = canvas.channels;
    let mut bytes = vec![0; canvas.values.len()];
    for (channel, plane) in canvas.planes().enumerate() {
        let places = bytes.iter_mut().skip(channel).step_by(channels);
        places.zip(plane).for_each(|(byte, value)| *byte = (value * 255.).round() as u8);
    }
    Picture::new(canvas.height, canvas.width, channels, bytes)
}

/// Resizes an area of a picture in floats.
pub(super) fn from_canvas(canvas: &Canvas, area: &Area, out: &mut Canvas, b: &mut ResizeBuffers) {
    out.reshape(area.cut[2], area.cut[3], canvas.channels);
    let ([top, left, _, width], stride) = (area.part, canvas.width);
    let (plane, start) = (canvas.pixels(), top * stride + left);
    let from = &canvas.values;
    if area.filter == Filter::Bicubic {
        return in_two_passes(area, out, b, 1., |first, rows, columns, row, middle| {
            let start = start + first * stride;
            image::resize_planes(from, plane, start, stride, width, rows, columns, row, middle);
        });
    }
    area.set(b, 1.);
    let (rows, columns) = (b.rows.mix(), b.columns.mix());
    let to = &mut out.values;
    image::resize_planes(from, plane, start, stride, width, rows, columns, &mut b.row, to);
}

/// Mixes columns, clips, mixes rows, clips.
///
/// - `mix_columns`: writes the rows from a first one on, each with its columns mixed, to planes.
fn in_two_passes(
    area: &Area,
    out: &mut Canvas,
    b: &mut ResizeBuffers,
    scale: f64,
    mix_columns: impl FnOnce(usize, Mix<'_>, Mix<'_>, &mut Vec<f32>, &mut [f32]),
) {
    area.set(b, 1.);
    let (first, count) = b.rows.begin_at_zero();
    let width = area.cut[3];
    b.middle.resize(count * width * out.channels, 0.);
    b.unit.set_unit(count, scale);
    mix_columns(first, b.unit.mix(), b.columns.mix(), &mut b.row, &mut b.middle);
    image::scale_and_shift_clamped(&mut b.middle, 1., 0.);
    b.unit.set_unit(width, 1.);
    let (rows, columns, from, to) = (b.rows.mix(), b.unit.mix(), &b.middle, &mut out.values);
    image::resize_planes(from, count * width, 0, width, width, rows, columns, &mut b.row, to);
    image::scale_and_shift_clamped(to, 1., 0.);
}

/// The weights of each place along one side of the result, as Pillow's `precompute_coeffs`.
#[derive(Debug, Default)]
struct Axis {
    /// The first place with a weight.
    starts: Vec<u32>,
    /// The number of weights, the same for all places; some may be 0.
    taps: usize,
    /// `(places, taps)`; each row sums to `scale`.
    weights: Vec<f32>,
}

impl Axis {
    /// Sets the weights for resizing `from` values to `to`, of the places in `wanted`.
    fn set(&mut self, from: usize, to: usize, wanted: Range<usize>, filter: Filter, scale: f64) {
        match filter {
            Filter::Bilinear => self.set_by(from, to, wanted, 1., triangle, scale),
            Filter::Bicubic => self.set_by(from, to, wanted, 2., cubic, scale),
        }
    }

    fn set_by(
        &mut self,
        from: usize,
        to: usize,
        wanted: Range<usize>,
        radius: f64,
        weight: impl Fn(f64) -> f64,
        scale: f64,
    ) {
        let ratio = from as f64 / to as f64;
        let stretch = ratio.max(1.);
        let (support, shrink) = (radius * stretch, 1. / stretch);
        // The range below is `2 · support` long, so it has at most this many whole numbers. Rounding may
        // add one, whose weight is 0 up to rounding.
        self.taps = ((2. * support).ceil() as usize).min(from);
        self.starts.clear();
        self.weights.clear();
        self.weights.resize(wanted.len() * self.taps, 0.);
        for (place, weights) in wanted.zip(self.weights.chunks_exact_mut(self.taps)) {
            let centre = (place as f64 + 0.5) * ratio;
            let first = ((centre - support + 0.5) as usize).min(from - 1);
            let end = ((centre + support + 0.5) as usize).min(from).max(first + 1);
            // Near the end, the row of weights begins earlier, so that it stays inside.
            let start = first.min(from - self.taps);
            self.starts.push(start as u32);
            let mut sum = 0.;
            for (position, slot) in (first..end).zip(&mut weights[first - start..]) {
                let weight = weight((position as f64 + 0.5 - centre) * shrink);
                *slot = weight as f32;
                sum += weight;
            }
            let share = (scale / sum) as f32;
            weights.iter_mut().for_each(|weight| *weight *= share);
        }
    }

    /// Sets one weight per place: the place itself, times `scale`.
    fn set_unit(&mut self, places: usize, scale: f64) {
        self.taps = 1;
        self.starts.clear();
        self.starts.extend(0..places as u32);
        self.weights.clear();
        self.weights.resize(places, scale as f32);
    }

    /// Makes places relative to the first that is used. Returns that place and the number of used
    /// ones.
    fn begin_at_zero(&mut self) -> (usize, usize) {
        let first = self.starts.iter().copied().min().unwrap_or_default();
        let last = self.starts.iter().copied().max().unwrap_or_default();
        self.starts.iter_mut().for_each(|start| *start -= first);
        (first as usize, (last - first) as usize + self.taps)
    }

    fn mix(&self) -> Mix<'_> {
        Mix { starts: &self.starts, taps: self.taps, weights: &self.weights }
    }
}

fn triangle(x: f64) -> f64 {
    (1. - x.abs()).max(0.)
}

/// Keys' cubic convolution with a = −0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1. {
        ((A + 2.) * x - (A + 3.)) * x * x + 1.
    } else if x < 2. {
        (((x - 5.) * x + 8.) * x - 4.) * A
    } else {
        0.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::example;

    #[test]
    fn enlarging_matches_torchvision() {
        // A part of 6×5 pixels, and what `resized_crop(antialias=True)` makes of it in float64.
        #[rustfmt::skip]
        let part = [
            0.2845921, 0.7176963, 0.8503943, 0.9448388, 0.7087417,
            0.7325796, 0.2366562, 0.5427639, 0.8902573, 0.4074956,
            0.8462336, 0.717714, 0.8346637, 0.0230868, 0.480399,
            0.6451479, 0.8791046, 0.8098553, 0.9362763, 0.4823753,
            0.657332, 0.0706146, 0.1736716, 0.26357, 0.9526989,
            0.1585857, 0.6332083, 0.1647576, 0.8458183, 0.0087487f32,
        ];
        let places = [(0, 0), (3, 9), (8, 2), (10, 14), (15, 15)];
        let bilinear = [0.2845921, 0.7410915, 0.7419292, 0.6881418, 0.0087487f32];
        // Clipped after each pass, as Pillow does; torchvision, which does not clip, has 0.7325717 and
        // −0.1932206 in the last two places.
        let bicubic = [0.1826797, 0.7953717, 0.749813, 0.7323705, 0f32];
        let mut canvas = Canvas::default();
        canvas.reshape(9, 8, 1);
        canvas.values.fill(0.5);
        for (y, row) in part.chunks(5).enumerate() {
            canvas.values[(y + 2) * 8 + 1..][..5].copy_from_slice(row);
        }
        for (filter, want) in [(Filter::Bilinear, bilinear), (Filter::Bicubic, bicubic)] {
            let mut out = Canvas::default();
            let area = Area::new([2, 1, 6, 5], [16, 16], filter);
            from_canvas(&canvas, &area, &mut out, &mut ResizeBuffers::default());
            for ((y, x), want) in places.into_iter().zip(want) {
                let got = out.values[y * 16 + x];
                assert!((got - want).abs() < 1e-6, "{filter:?} at {y}, {x}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn shrinking_is_resizing_the_shorter_side_rounded_to_bytes() {
        // Neither square nor symmetric; the longer side, 7 · 31 / 20, is rounded down.
        for (size, to) in [([20, 31], [7, 10]), ([31, 20], [10, 7])] {
            // Far from both ends of the range, so that nothing is clipped.
            let pixels = (0..size[0] * size[1] * 3).map(|i| (i * 37 % 101 + 70) as u8).collect();
            let picture = Picture::new(size[0], size[1], 3, pixels).expect("sound");
            let got = shrink(&picture, 7).expect("smaller");
            assert_eq!([got.height, got.width], to);
            for (place, byte) in got.pixels.iter().enumerate() {
                let (channel, x, y) = (place % 3, place / 3 % to[1], place / 3 / to[1]);
                let rows = weights(size[0], to[0], y, Filter::Bicubic);
                let columns = weights(size[1], to[1], x, Filter::Bicubic);
                let pixel = |(at, weight): (usize, &f64), row: usize| {
                    weight * f64::from(picture.pixels[(row * size[1] + at) * 3 + channel])
                };
                let want: f64 = (0..size[0])
                    .map(|row| {
                        rows[row] * columns.iter().enumerate().map(|c| pixel(c, row)).sum::<f64>()
                    })
                    .sum();
                assert!((f64::from(*byte) - want).abs() < 0.501, "{place}: {byte}, {want}");
            }
        }
    }

    /// The weights of one place by their definition, without any of the shortcuts.
    fn weights(from: usize, to: usize, place: usize, filter: Filter) -> Vec<f64> {
        let ratio = from as f64 / to as f64;
        let (stretch, centre) = (ratio.max(1.), (place as f64 + 0.5) * ratio);
        let weight = |x: f64| match filter {
            Filter::Bilinear => (1. - x.abs()).max(0.),
            Filter::Bicubic if x.abs() < 1. => 1.5 * x.abs().powi(3) - 2.5 * x * x + 1.,
            Filter::Bicubic if x.abs() < 2. => {
                -0.5 * x.abs().powi(3) + 2.5 * x * x - 4. * x.abs() + 2.
            }
            Filter::Bicubic => 0.,
        };
        let all: Vec<f64> =
            (0..from).map(|at| weight((at as f64 + 0.5 - centre) / stretch)).collect();
        let sum: f64 = all.iter().sum();
        all.iter().map(|weight| weight / sum).collect()
    }

    #[test]
    fn both_ways_agree_with_the_definition_at_every_scale() {
        let mut buffers = ResizeBuffers::default();
        for channels in [1, 3] {
            let picture = example(19, 26, channels);
            let mut canvas = Canvas::default();
            canvas.load(&picture);
            for (part, to) in [
                ([0, 0, 19, 26], [19, 26]),
                ([0, 0, 19, 26], [5, 7]),
                ([3, 2, 11, 23], [8, 40]),
                ([18, 0, 1, 26], [3, 3]),
                ([4, 25, 15, 1], [6, 2]),
                ([2, 3, 17, 22], [1, 1]),
            ] {
                for filter in [Filter::Bilinear, Filter::Bicubic] {
                    let area = Area::new(part, to, filter);
                    let (mut bytes, mut floats) = (Canvas::default(), Canvas::default());
                    from_picture(&picture, &area, &mut bytes, &mut buffers);
                    from_canvas(&canvas, &area, &mut floats, &mut buffers);
                    let size = (bytes.height, bytes.width, bytes.channels);
                    assert_eq!(size, (to[0], to[1], channels));
                    for channel in 0..channels {
                        for (y, x) in [(0, 0), (to[0] / 2, to[1] / 3), (to[0] - 1, to[1] - 1)] {
                            let rows = weights(part[2], to[0], y, filter);
                            let columns = weights(part[3], to[1], x, filter);
                            let mut want = 0.;
                            for (i, row) in rows.iter().enumerate() {
                                let mut across = 0.;
                                for (j, column) in columns.iter().enumerate() {
                                    let at = (part[0] + i) * 26 + part[1] + j;
                                    let byte = picture.pixels[at * channels + channel];
                                    across += column * f64::from(byte) / 255.;
                                }
                                want += row * across.clamp(0., 1.);
                            }
                            let at = (channel * to[0] + y) * to[1] + x;
                            for got in [bytes.values[at], floats.values[at]] {
                                let error = (f64::from(got) - want.clamp(0., 1.)).abs();
                                assert!(error < 1e-6, "{area:?} {channel} {y} {x}: {got}, {want}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn resizing_and_cutting_in_one_is_both_after_each_other() {
        let picture = example(21, 34, 3);
        let whole = Area::new([0, 0, 21, 34], [12, 19], Filter::Bicubic);
        let (mut resized, mut cut, mut at_once) = Default::default();
        let mut buffers = ResizeBuffers::default();
        from_picture(&picture, &whole, &mut resized, &mut buffers);
        let middle = Area::new([0, 0, 12, 19], [12, 19], Filter::Bilinear);
        let middle = middle.cut_to_centre(8, f64::round_ties_even).expect("fits");
        from_canvas(&resized, &middle, &mut cut, &mut buffers);
        from_picture(
            &picture,
            &whole.cut_to_centre(8, f64::round_ties_even).expect("fits"),
            &mut at_once,
            &mut buffers,
        );
        assert_eq!(cut.values, at_once.values);
        // The middle 8 of 19 begin at 5.5, which Python rounds to the even 6.
        assert_eq!(cut.values[0], resized.values[2 * 19 + 6]);
        assert!(whole.cut_to_centre(13, f64::floor).is_err());
    }

    #[test]
    fn the_cubic_is_clipped_after_its_columns_and_after_its_rows() {
        // Two rows, white left and black right, in opposite order: each overshoots in the middle.
        let picture = Picture::new(2, 4, 1, vec![255, 255, 0, 0, 0, 0, 255, 255]).expect("sound");
        let mut out = Canvas::default();
        let area = Area::new([0, 0, 2, 4], [1, 8], Filter::Bicubic);
        from_picture(&picture, &area, &mut out, &mut ResizeBuffers::default());
        // At place 2, whose centre is 1.25, the weights are −9, 111, 29 and −3 of 128.
        let first = 102. / 128.;
        assert!((out.values[2] - first / 2. - (1. - first) / 2.).abs() < 1e-6, "{:?}", out.values);
        // At place 1 the first row gives 1.07, clipped to 1, the second −0.07, clipped to 0.
        let picture = Picture::new(1, 4, 1, vec![255, 255, 0, 0]).expect("sound");
        from_picture(
            &picture,
            &Area::new([0, 0, 1, 4], [1, 8], Filter::Bicubic),
            &mut out,
            &mut ResizeBuffers::default(),
        );
        assert_eq!((out.values[1], out.values[6]), (1., 0.));
    }

    #[test]
    fn halving_a_row_weighs_by_a_stretched_triangle() {
        // Arguments −1/4, 1/4, 3/4: weights 3, 3 and 1 sevenths.
        let picture = Picture::new(1, 4, 1, vec![70, 140, 210, 0]).expect("sound");
        let mut out = Canvas::default();
        let area = Area::new([0, 0, 1, 4], [1, 2], Filter::Bilinear);
        from_picture(&picture, &area, &mut out, &mut ResizeBuffers::default());
        let want = [(3. * 70. + 3. * 140. + 210.) / 7., (140. + 3. * 210.) / 7.];
        for (got, want) in out.values.iter().zip(want) {
            assert!((got * 255. - want).abs() < 1e-4, "{got}, {want}");
        }
    }
}
