//! Cutting out and resizing in one pass.
//!
//! Each value of the result is a weighted sum over a few rows and a few columns. Rows are mixed
//! first, because they lie in memory as the processor likes them; the one mixed row is still in the
//! nearest cache when its columns are mixed. Pillow mixes columns first and rounds to bytes in
//! between; without rounding the order makes no difference.

use kernels::image;

use crate::Picture;
use crate::views::Filter;
use crate::views::canvas::Canvas;

/// A part of a picture, and the size it is to have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Area {
    pub(super) top: usize,
    pub(super) left: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    pub(super) to_height: usize,
    pub(super) to_width: usize,
    pub(super) filter: Filter,
}

/// Memory that is used again for the next picture.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    row: Vec<f32>,
    rows: Axis,
    columns: Axis,
}

/// Resizes an area of a picture in bytes.
pub(super) fn from_picture(picture: &Picture, area: &Area, out: &mut Canvas, b: &mut Buffers) {
    let channels = picture.channels;
    let stride = picture.width * channels;
    b.rows.set(area.height, area.to_height, area.filter, 1. / 255.);
    b.columns.set(area.width, area.to_width, area.filter, 1.);
    out.reshape(area.to_height, area.to_width, channels);
    // One value more than the pixels have, for the lane that colour drops.
    b.row.resize(area.width * channels + 1, 0.);
    let pixels = out.pixels();
    for y in 0..area.to_height {
        let (start, weights) = b.rows.at(y);
        let first = (area.top + start) * stride + area.left * channels;
        let mixed = &mut b.row[..area.width * channels];
        image::mix_byte_rows(mixed, &picture.pixels[first..], stride, weights);
        let line = y * area.to_width..(y + 1) * area.to_width;
        match out.colours() {
            Some(planes) => {
                let [red, green, blue] = planes.map(|plane| &mut plane[line.clone()]);
                let Axis { starts, weights, .. } = &b.columns;
                image::mix_colour_columns(red, green, blue, &b.row, starts, weights);
            }
            None => {
                debug_assert!(line.end <= pixels);
                let Axis { starts, weights, .. } = &b.columns;
                image::mix_columns(&mut out.values[line], &b.row, starts, weights);
            }
        }
    }
    hold_to_range(out, area.filter);
}

/// Resizes an area of a picture in floats.
pub(super) fn from_canvas(canvas: &Canvas, area: &Area, out: &mut Canvas, b: &mut Buffers) {
    b.rows.set(area.height, area.to_height, area.filter, 1.);
    b.columns.set(area.width, area.to_width, area.filter, 1.);
    out.reshape(area.to_height, area.to_width, canvas.channels);
    b.row.resize(area.width, 0.);
    let Buffers { row, rows, columns } = b;
    let mut starts = Vec::with_capacity(rows.taps);
    for (plane, out) in canvas.planes().zip(out.planes_mut()) {
        for (y, line) in out.chunks_exact_mut(area.to_width).enumerate() {
            let (start, weights) = rows.at(y);
            let first = (area.top + start) * canvas.width + area.left;
            starts.clear();
            starts.extend((0..weights.len()).map(|k| first + k * canvas.width));
            image::mix_rows(row, plane, &starts, weights);
            image::mix_columns(line, row, &columns.starts, &columns.weights);
        }
    }
    hold_to_range(out, area.filter);
}

/// The cubic has negative weights, so its sums can leave the range.
fn hold_to_range(out: &mut Canvas, filter: Filter) {
    if filter == Filter::Bicubic {
        image::scale_and_shift_clamped(&mut out.values, 1., 0.);
    }
}

/// What each place along one side of the result is mixed from, as Pillow's `precompute_coeffs`.
#[derive(Debug, Default)]
struct Axis {
    /// The first place each is mixed from.
    starts: Vec<u32>,
    /// How many are mixed, the same for all; some weights may be 0.
    taps: usize,
    /// `(places, taps)`, each row of sum `scale`.
    weights: Vec<f32>,
}

impl Axis {
    fn set(&mut self, from: usize, to: usize, filter: Filter, scale: f64) {
        let ratio = from as f64 / to as f64;
        let (radius, weight): (f64, fn(f64) -> f64) = match filter {
            Filter::Bilinear => (1., triangle),
            Filter::Bicubic => (2., cubic),
        };
        let stretch = ratio.max(1.);
        let support = radius * stretch;
        let range = |place: usize| {
            let centre = (place as f64 + 0.5) * ratio;
            let first = ((centre - support + 0.5) as usize).min(from - 1);
            let end = ((centre + support + 0.5) as usize).min(from).max(first + 1);
            (centre, first, end)
        };
        self.taps = (0..to).map(range).map(|(_, first, end)| end - first).max().unwrap_or(1);
        self.starts.clear();
        self.weights.clear();
        self.weights.resize(to * self.taps, 0.);
        for (place, weights) in self.weights.chunks_exact_mut(self.taps).enumerate() {
            let (centre, first, end) = range(place);
            // Near the end the row of weights begins earlier, so that it does not stick out.
            let start = first.min(from - self.taps);
            self.starts.push(start as u32);
            let at = |position: usize| weight((position as f64 + 0.5 - centre) / stretch);
            let sum: f64 = (first..end).map(at).sum();
            for position in first..end {
                weights[position - start] = (at(position) / sum * scale) as f32;
            }
        }
    }

    fn at(&self, place: usize) -> (usize, &[f32]) {
        (self.starts[place] as usize, &self.weights[place * self.taps..][..self.taps])
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

    fn area([top, left, height, width]: [usize; 4], to: [usize; 2], filter: Filter) -> Area {
        Area { top, left, height, width, to_height: to[0], to_width: to[1], filter }
    }

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
        // Pillow holds the last one, −0.1932206, to the range.
        let bicubic = [0.1826797, 0.7953717, 0.749813, 0.7325717, 0f32];
        let mut canvas = Canvas::default();
        canvas.reshape(9, 8, 1);
        canvas.values.fill(0.5);
        for (y, row) in part.chunks(5).enumerate() {
            canvas.values[(y + 2) * 8 + 1..][..5].copy_from_slice(row);
        }
        for (filter, want) in [(Filter::Bilinear, bilinear), (Filter::Bicubic, bicubic)] {
            let mut out = Canvas::default();
            let area = area([2, 1, 6, 5], [16, 16], filter);
            from_canvas(&canvas, &area, &mut out, &mut Buffers::default());
            for ((y, x), want) in places.into_iter().zip(want) {
                let got = out.values[y * 16 + x];
                assert!((got - want).abs() < 1e-6, "{filter:?} at {y}, {x}: {got}, not {want}");
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
        let mut buffers = Buffers::default();
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
                    let area = area(part, to, filter);
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
                                for (j, column) in columns.iter().enumerate() {
                                    let at = (part[0] + i) * 26 + part[1] + j;
                                    let byte = picture.pixels[at * channels + channel];
                                    want += row * column * f64::from(byte) / 255.;
                                }
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
    fn halving_a_row_weighs_by_a_stretched_triangle() {
        // Arguments −1/4, 1/4, 3/4: weights 3, 3 and 1 sevenths.
        let picture = Picture::new(1, 4, 1, vec![70, 140, 210, 0]).expect("sound");
        let mut out = Canvas::default();
        let area = area([0, 0, 1, 4], [1, 2], Filter::Bilinear);
        from_picture(&picture, &area, &mut out, &mut Buffers::default());
        let want = [(3. * 70. + 3. * 140. + 210.) / 7., (140. + 3. * 210.) / 7.];
        for (got, want) in out.values.iter().zip(want) {
            assert!((got * 255. - want).abs() < 1e-4, "{got}, {want}");
        }
    }
}
