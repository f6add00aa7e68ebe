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
