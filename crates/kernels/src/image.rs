//! Image operations for augmentation.
//!
//! Each function is plain Rust over slices, compiled once per [`Variant`]; the fastest is chosen at run
//! time. No product is fused with an addition and every sum has a fixed order, so all variants give the
//! same bits.
//!
//! A plane is one channel, row by row, in f32 of range `[0, 1]`.

use crate::Variant;
use crate::variant::for_each_variant;

/// Compiles a body for every variant and calls the fastest; `name::at` calls a given one.
macro_rules! in_the_fastest_variant {
    ($(#[$attribute:meta])* pub fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments, reason = "sizes and slices, each with its name")]
        pub fn $name($($argument: $type),*) {
            $name::at(Variant::fastest(), $($argument),*);
        }

        mod $name {
            #[allow(unused_imports, reason = "some bodies use nothing from outside")]
            use super::*;

            for_each_variant! {
                pub(super) fn at($($argument: $type),*) $body
            }
        }
    };
}

/// The weights of a resize along one side: pixel `i` is a weighted sum of `taps` values from index
/// `starts[i]`, with the weights `weights[i · taps..][..taps]`.
#[derive(Debug, Clone, Copy)]
pub struct Mix<'a> {
    /// The index of the first value of each pixel.
    pub starts: &'a [u32],
    /// Values per pixel, the same for all; some weights may be 0.
    pub taps: usize,
    /// `(pixels, taps)`.
    pub weights: &'a [f32],
}

impl Mix<'_> {
    #[inline(always)]
    fn at(&self, pixel: usize) -> (usize, &[f32]) {
        (self.starts[pixel] as usize, &self.weights[pixel * self.taps..][..self.taps])
    }
}

in_the_fastest_variant! {
    /// Resizes an image of bytes with 1 or 3 interleaved `channels` to the planes `out`: first along the
    /// `rows` of `width` pixels, then along the `columns`.
    ///
    /// `stride` is the distance between rows in bytes. `memory` is overwritten.
    ///
    /// # Panics
    ///
    /// If a slice is too short for the indices of the mixes.
    pub fn resize_bytes(
        bytes: &[u8],
        stride: usize,
        width: usize,
        channels: usize,
        rows: Mix<'_>,
        columns: Mix<'_>,
        memory: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (to_height, to_width) = (rows.starts.len(), columns.starts.len());
        let values = width * channels;
        // One value more than the pixels need, for the fourth lane.
        memory.resize(values + 1 + 4 * to_width, 0.);
        let (mixed, lanes) = memory.split_at_mut(values + 1);
        for y in 0..to_height {
            let (start, weights) = rows.at(y);
            mix_rows(&mut mixed[..values], weights, |k| &bytes[(start + k) * stride..][..values]);
            let line = y * to_width;
            if channels == 3 {
                mix_colour_columns(out, to_height * to_width, line, mixed, columns, lanes);
            } else {
                mix_columns(&mut out[line..line + to_width], mixed, columns);
            }
        }
    }
}

in_the_fastest_variant! {
    /// [`resize_bytes`] for planes of floats, each of `plane` values with `stride` values per row. The
    /// resized part begins at index `first` of each plane.
    ///
    /// # Panics
    ///
    /// If a slice is too short for the indices of the mixes.
    pub fn resize_planes(
        planes: &[f32],
        plane: usize,
        first: usize,
        stride: usize,
        width: usize,
        rows: Mix<'_>,
        columns: Mix<'_>,
        memory: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (to_height, to_width) = (rows.starts.len(), columns.starts.len());
        memory.resize(6 * width + 1 + 4 * to_width, 0.);
        let (mixed, rest) = memory.split_at_mut(3 * width);
        let (colours, lanes) = rest.split_at_mut(3 * width + 1);
        for y in 0..to_height {
            let (start, weights) = rows.at(y);
            let at = first + start * stride;
            for (mixed, plane) in mixed.chunks_exact_mut(width).zip(planes.chunks_exact(plane)) {
                mix_rows(mixed, weights, |k| &plane[at + k * stride..][..width]);
            }
            let line = y * to_width;
            if planes.len() == 3 * plane {
                // Interleaved, the three channels share each weight.
                let (red, rest) = mixed.split_at(width);
                let (green, blue) = rest.split_at(width);
                interleave_planes(&mut colours[..3 * width], red, green, blue, [1.; 3], [0.; 3]);
                mix_colour_columns(out, to_height * to_width, line, colours, columns, lanes);
            } else {
                mix_columns(&mut out[line..line + to_width], mixed, columns);
            }
        }
    }
}

/// `out[i] = Σ_k weights[k] · row(k)[i]`, in blocks whose sums stay in registers. The last block overlaps
/// the previous one where the width is not a multiple.
#[inline(always)]
fn mix_rows<'a, T: Copy + Into<f32> + 'a>(
    out: &mut [f32],
    weights: &[f32],
    row: impl Fn(usize) -> &'a [T] + Copy,
) {
    in_blocks(
        out,
        #[inline(always)]
        |at, sums: &mut [f32]| match sums.len() {
            64 => mix_block::<64, T>(sums, at, weights, row),
            32 => mix_block::<32, T>(sums, at, weights, row),
            16 => mix_block::<16, T>(sums, at, weights, row),
            4 => mix_block::<4, T>(sums, at, weights, row),
            _ => mix_block::<1, T>(sums, at, weights, row),
        },
    );
}

#[inline(always)]
fn mix_block<'a, const N: usize, T: Copy + Into<f32> + 'a>(
    out: &mut [f32],
    at: usize,
    weights: &[f32],
    row: impl Fn(usize) -> &'a [T] + Copy,
) {
    let mut sums = [0f32; N];
    for (k, &weight) in weights.iter().enumerate() {
        let values = block::<N, T>(row(k), at);
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += weight * value.into();
        }
    }
    out.copy_from_slice(&sums);
}

/// Calls `fill` with the index and the slice of blocks of 64, 32, 16, 4 or 1 values that cover `out`.
#[inline(always)]
fn in_blocks(out: &mut [f32], fill: impl Fn(usize, &mut [f32])) {
    let width = out.len();
    let mut at = 0;
    for size in [64, 32, 16, 4, 1] {
        while at + size <= width {
            fill(at, &mut out[at..at + size]);
            at += size;
        }
        // The rest is shorter than this block, which may overlap finished values.
        if at < width && size <= 32 && width >= size {
            at = width - size;
            fill(at, &mut out[at..]);
            return;
        }
    }
}

#[inline(always)]
fn block<const N: usize, T>(values: &[T], at: usize) -> &[T; N] {
    values[at..at + N].try_into().expect("a slice of N has N values")
}

/// `out[x] = Σ_k weights[x · taps + k] · row[starts[x] + k]`.
#[inline(always)]
fn mix_columns(out: &mut [f32], row: &[f32], columns: Mix<'_>) {
    match columns.taps {
        2 => mix_columns_of::<2>(out, row, columns),
        3 => mix_columns_of::<3>(out, row, columns),
        4 => mix_columns_of::<4>(out, row, columns),
        5 => mix_columns_of::<5>(out, row, columns),
        6 => mix_columns_of::<6>(out, row, columns),
        _ => {
            for (x, out) in out.iter_mut().enumerate() {
                let (start, weights) = columns.at(x);
                let values = &row[start..start + weights.len()];
                *out = values
                    .iter()
                    .zip(weights)
                    .fold(0., |sum, (value, weight)| sum + value * weight);
            }
        }
    }
}

#[inline(always)]
fn mix_columns_of<const TAPS: usize>(out: &mut [f32], row: &[f32], columns: Mix<'_>) {
    let weights = columns.weights.as_chunks::<TAPS>().0;
    for ((out, &start), weights) in out.iter_mut().zip(columns.starts).zip(weights) {
        let values = block::<TAPS, f32>(row, start as usize);
        *out = values.iter().zip(weights).fold(0., |sum, (value, weight)| sum + value * weight);
    }
}

/// [`mix_columns`] for three interleaved channels in `row`, written to three planes of `plane` values at
/// index `line`. `lanes` is memory for four values per pixel.
#[inline(always)]
fn mix_colour_columns(
    out: &mut [f32],
    plane: usize,
    line: usize,
    row: &[f32],
    columns: Mix<'_>,
    lanes: &mut [f32],
) {
    let width = columns.starts.len();
    let lanes = &mut lanes.as_chunks_mut::<4>().0[..width];
    match columns.taps {
        1 => mix_colour_columns_of::<1>(lanes, row, columns),
        2 => mix_colour_columns_of::<2>(lanes, row, columns),
        3 => mix_colour_columns_of::<3>(lanes, row, columns),
        4 => mix_colour_columns_of::<4>(lanes, row, columns),
        5 => mix_colour_columns_of::<5>(lanes, row, columns),
        6 => mix_colour_columns_of::<6>(lanes, row, columns),
        7 => mix_colour_columns_of::<7>(lanes, row, columns),
        8 => mix_colour_columns_of::<8>(lanes, row, columns),
        taps => {
            for (x, lanes) in lanes.iter_mut().enumerate() {
                let (start, weights) = columns.at(x);
                *lanes = mix_pixel(&row[3 * start..3 * (start + taps) + 1], weights);
            }
        }
    }
    let (red, rest) = out.split_at_mut(plane);
    let (green, blue) = rest.split_at_mut(plane);
    let [red, green, blue] = [red, green, blue].map(|plane| &mut plane[line..line + width]);
    for (((red, green), blue), lanes) in red.iter_mut().zip(green).zip(blue).zip(lanes) {
        (*red, *green, *blue) = (lanes[0], lanes[1], lanes[2]);
    }
}

#[inline(always)]
fn mix_colour_columns_of<const TAPS: usize>(lanes: &mut [[f32; 4]], row: &[f32], columns: Mix<'_>) {
    let weights = columns.weights.as_chunks::<TAPS>().0;
    for (lanes, (&start, weights)) in lanes.iter_mut().zip(columns.starts.iter().zip(weights)) {
        *lanes = mix_pixel(&row[3 * start as usize..][..3 * TAPS + 1], weights);
    }
}

/// One pixel of three channels. A vector of four lanes takes each pixel and one value of the next, so
/// `values` has one value more than the pixels. The fourth lane is kept although nothing reads it:
/// without it the compiler would not use vectors.
#[inline(always)]
fn mix_pixel(values: &[f32], weights: &[f32]) -> [f32; 4] {
    let mut sums = [0f32; 4];
    for (k, &weight) in weights.iter().enumerate() {
        for (sum, value) in sums.iter_mut().zip(block::<4, f32>(values, 3 * k)) {
            *sum += weight * value;
        }
    }
    sums
}

in_the_fastest_variant! {
    /// Convolves a plane with a symmetric kernel along columns and rows: `kernel[0]` is the weight of the
    /// centre, `kernel[d]` that of the two values at distance `d`. Edges are mirrored without repeating
    /// the edge.
    ///
    /// `row` is memory for a row and twice the reach of the kernel.
    ///
    /// # Panics
    ///
    /// If the reach of the kernel is not smaller than the plane, or the lengths do not match.
    pub fn blur_plane(
        plane: &[f32],
        width: usize,
        kernel: &[f32],
        row: &mut [f32],
        out: &mut [f32],
    ) {
        let (height, reach) = (plane.len() / width, kernel.len() - 1);
        assert!(reach < height && reach < width && out.len() == plane.len());
        assert_eq!(row.len(), width + 2 * reach);
        let line = |y: usize| &plane[y * width..][..width];
        for (y, out) in out.chunks_exact_mut(width).enumerate() {
            let above = |distance: usize| line(y.abs_diff(distance));
            let below = |distance: usize| line((height - 1) - (height - 1).abs_diff(y + distance));
            mix_pairs(&mut row[reach..reach + width], kernel, above, below);
            for distance in 1..=reach {
                row[reach - distance] = row[reach + distance];
                row[reach + width - 1 + distance] = row[reach + width - 1 - distance];
            }
            let left = |distance: usize| &row[reach - distance..][..width];
            let right = |distance: usize| &row[reach + distance..][..width];
            mix_pairs(out, kernel, left, right);
        }
    }
}

/// `out[i] = kernel[0] · before(0)[i] + Σ_d kernel[d] · (before(d)[i] + after(d)[i])`.
#[inline(always)]
fn mix_pairs<'a>(
    out: &mut [f32],
    kernel: &[f32],
    before: impl Fn(usize) -> &'a [f32] + Copy,
    after: impl Fn(usize) -> &'a [f32] + Copy,
) {
    in_blocks(
        out,
        #[inline(always)]
        |at, sums: &mut [f32]| match sums.len() {
            64 => mix_pair_block::<64>(sums, at, kernel, before, after),
            32 => mix_pair_block::<32>(sums, at, kernel, before, after),
            16 => mix_pair_block::<16>(sums, at, kernel, before, after),
            4 => mix_pair_block::<4>(sums, at, kernel, before, after),
            _ => mix_pair_block::<1>(sums, at, kernel, before, after),
        },
    );
}

#[inline(always)]
fn mix_pair_block<'a, const N: usize>(
    out: &mut [f32],
    at: usize,
    kernel: &[f32],
    before: impl Fn(usize) -> &'a [f32] + Copy,
    after: impl Fn(usize) -> &'a [f32] + Copy,
) {
    let mut sums = *block::<N, f32>(before(0), at);
    for sum in &mut sums {
        *sum *= kernel[0];
    }
    for (distance, &weight) in (1..).zip(&kernel[1..]) {
        let before = block::<N, f32>(before(distance), at);
        let after = block::<N, f32>(after(distance), at);
        for ((sum, &before), &after) in sums.iter_mut().zip(before).zip(after) {
            *sum += weight * (before + after);
        }
    }
    out.copy_from_slice(&sums);
}

in_the_fastest_variant! {
    /// Extracts one of `channels` interleaved channels of bytes, scaled:
    /// `out[i] = scale · bytes[i · channels]`.
    pub fn plane_of_bytes(out: &mut [f32], bytes: &[u8], channels: usize, scale: f32) {
        if channels == 1 {
            for (out, &byte) in out.iter_mut().zip(bytes) {
                *out = scale * f32::from(byte);
            }
        } else {
            for (out, pixel) in out.iter_mut().zip(bytes.chunks(channels)) {
                *out = scale * f32::from(pixel[0]);
            }
        }
    }
}

in_the_fastest_variant! {
    /// Interleaves three planes, each scaled and shifted:
    /// `out[3i + c] = scale[c] · plane_c[i] + shift[c]`.
    ///
    /// # Panics
    ///
    /// If the lengths do not match.
    pub fn interleave(
        out: &mut [f32],
        red: &[f32],
        green: &[f32],
        blue: &[f32],
        scale: [f32; 3],
        shift: [f32; 3],
    ) {
        interleave_planes(out, red, green, blue, scale, shift);
    }
}

#[inline(always)]
fn interleave_planes(
    out: &mut [f32],
    red: &[f32],
    green: &[f32],
    blue: &[f32],
    scale: [f32; 3],
    shift: [f32; 3],
) {
    let n = red.len();
    assert!(green.len() == n && blue.len() == n && out.len() == 3 * n);
    let planes = red.iter().zip(green).zip(blue);
    for (out, ((&red, &green), &blue)) in out.as_chunks_mut::<3>().0.iter_mut().zip(planes) {
        *out = [scale[0] * red + shift[0], scale[1] * green + shift[1], scale[2] * blue + shift[2]];
    }
}

in_the_fastest_variant! {
    /// `values[i] ← scale · values[i] + shift`.
    pub fn scale_and_shift(values: &mut [f32], scale: f32, shift: f32) {
        for value in values {
            *value = scale * *value + shift;
        }
    }
}

in_the_fastest_variant! {
    /// `values[i] ← scale · values[i] + shift`, clamped to `[0, 1]`.
    pub fn scale_and_shift_clamped(values: &mut [f32], scale: f32, shift: f32) {
        for value in values {
            *value = (scale * *value + shift).clamp(0., 1.);
        }
    }
}

/// The weights of red, green and blue in grey, as in torchvision's `rgb_to_grayscale`.
pub const GREY: [f32; 3] = [0.2989, 0.587, 0.114];

#[inline(always)]
fn grey(red: f32, green: f32, blue: f32) -> f32 {
    GREY[0] * red + GREY[1] * green + GREY[2] * blue
}

in_the_fastest_variant! {
    /// Adds the values to `total`, in an order that depends only on their count.
    pub fn add_up(values: &[f32], total: &mut f32) {
        let mut sums = [0f32; 16];
        let chunks = values.chunks_exact(16);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (sum, &value) in sums.iter_mut().zip(chunk) {
                *sum += value;
            }
        }
        for (sum, &value) in sums.iter_mut().zip(rest) {
            *sum += value;
        }
        *total += sums.iter().sum::<f32>();
    }
}

in_the_fastest_variant! {
    /// Replaces the three planes by their grey.
    pub fn to_grey(red: &mut [f32], green: &mut [f32], blue: &mut [f32]) {
        for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
            let grey = grey(*red, *green, *blue);
            (*red, *green, *blue) = (grey, grey, grey);
        }
    }
}

in_the_fastest_variant! {
    /// Blends each pixel with its own grey: `factor · colour + (1 − factor) · grey`, clamped to `[0, 1]`.
    pub fn saturate(red: &mut [f32], green: &mut [f32], blue: &mut [f32], factor: f32) {
        for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
            let grey = (1. - factor) * grey(*red, *green, *blue);
            *red = (factor * *red + grey).clamp(0., 1.);
            *green = (factor * *green + grey).clamp(0., 1.);
            *blue = (factor * *blue + grey).clamp(0., 1.);
        }
    }
}

in_the_fastest_variant! {
    /// Rotates the hue of each pixel by `turn` of the colour circle, keeping HSV saturation and value.
    pub fn turn_hue(red: &mut [f32], green: &mut [f32], blue: &mut [f32], turn: f32) {
        for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
            let (r, g, b) = (*red, *green, *blue);
            let (high, low) = (r.max(g).max(b), r.min(g).min(b));
            let chroma = high - low;
            // Grey has no hue; any finite number is fine, since its weight is 0.
            let per_chroma = 1. / if chroma == 0. { 1. } else { chroma };
            let of_red = (g - b) * per_chroma;
            let of_green = 2. + (b - r) * per_chroma;
            let of_blue = 4. + (r - g) * per_chroma;
            let hue = if high == r { of_red } else if high == g { of_green } else { of_blue };
            let hue = hue + 6. * turn;
            *red = from_hue(hue + 5., high, chroma);
            *green = from_hue(hue + 3., high, chroma);
            *blue = from_hue(hue + 1., high, chroma);
        }
    }
}

/// A channel of a colour from its angle to the hue, in sixths of the circle.
#[inline(always)]
fn from_hue(angle: f32, high: f32, chroma: f32) -> f32 {
    let angle = angle - 6. * (angle * (1. / 6.)).floor();
    high - chroma * angle.min(4. - angle).clamp(0., 1.)
}

in_the_fastest_variant! {
    /// `values[i] ← values[i]^exponent` for values in `[0, 1]`, with a relative error of about 10⁻⁶.
    pub fn power(values: &mut [f32], exponent: f32) {
        for value in values {
            *value = power_of(*value, exponent);
        }
    }
}

/// `x^y` for `x` in `[0, 1]` and `y > 0` as `2^(y log₂ x)`, without branches, so that it is the same on
/// every platform and can be vectorised.
#[inline(always)]
fn power_of(x: f32, y: f32) -> f32 {
    let normal = x.max(f32::MIN_POSITIVE);
    // x = 2^e · m with m in [√½, √2): subtracting the bits of √½ moves the exponent's boundary.
    const ROOT_HALF: i32 = 0x3f35_04f3;
    let bits = normal.to_bits() as i32;
    // It never wraps, but a check would prevent vectorisation.
    let exponent = bits.wrapping_sub(ROOT_HALF) >> 23;
    let m = f32::from_bits(bits.wrapping_sub(exponent << 23) as u32);
    // log₂ m = 2/ln 2 · artanh(s) with s = (m − 1)/(m + 1), |s| < 0.172.
    let s = (m - 1.) / (m + 1.);
    let t = s * s;
    let series = 1. + t * (1. / 3. + t * (1. / 5. + t * (1. / 7. + t * (1. / 9.))));
    let log = exponent as f32 + s * series * (2. * std::f32::consts::LOG2_E);
    // 2^z = 2^n · 2^f with f in [−½, ½]; below 2^−126 the result is 0.
    let z = (y * log).max(-126.);
    let n = (z + 0.5).floor();
    let f = (z - n) * std::f32::consts::LN_2;
    let tail = 1. / 24. + f * (1. / 120. + f * (1. / 720. + f * (1. / 5040.)));
    let mantissa = 1. + f * (1. + f * (0.5 + f * (1. / 6. + f * tail)));
    let scale = f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32);
    if x < f32::MIN_POSITIVE { 0. } else { mantissa * scale }
}

in_the_fastest_variant! {
    /// `values[i] ← 1 − values[i]` where it is at least `threshold`.
    pub fn solarise(values: &mut [f32], threshold: f32) {
        for value in values {
            *value = if *value >= threshold { 1. - *value } else { *value };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` pseudo-random values in `[0, 1)`.
    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.).collect()
    }

    /// Starts and weights of mixes of three values, at every other index.
    fn mix(pixels: usize) -> (Vec<u32>, Vec<f32>) {
        let starts = (0..pixels as u32).map(|pixel| 2 * pixel).collect();
        (starts, values(3 * pixels + 5)[5..].to_vec())
    }

    #[test]
    fn resizing_mixes_rows_and_columns_at_every_width() {
        for (height, width, taps) in [(1, 1, 3), (2, 7, 3), (3, 40, 1), (4, 70, 12)] {
            let (starts, _) = mix(width.max(height));
            let weights = values(taps * width.max(height));
            let rows = Mix { starts: &starts[..height], taps: 3, weights: &values(3 * height) };
            let columns = Mix { starts: &starts[..width], taps, weights: &weights[..taps * width] };
            let (from_height, from_width) = (2 * height + 1, 2 * (width - 1) + taps);
            for channels in [1, 3] {
                let stride = from_width * channels + 2;
                let bytes: Vec<u8> =
                    values(stride * from_height).iter().map(|v| (v * 255.) as u8).collect();
                let mut want = Vec::new();
                for channel in 0..channels {
                    for y in 0..height {
                        for x in 0..width {
                            let mut sum = 0f64;
                            for (i, row) in rows.at(y).1.iter().enumerate() {
                                for (j, column) in columns.at(x).1.iter().enumerate() {
                                    let at = (2 * y + i) * stride + (2 * x + j) * channels;
                                    let byte = f64::from(bytes[at + channel]);
                                    sum += f64::from(row * column) * byte;
                                }
                            }
                            want.push(sum);
                        }
                    }
                }
                let plane = from_height * (from_width + 1);
                let mut planes = vec![7.; plane * channels];
                for (i, &byte) in bytes.iter().enumerate() {
                    let (y, x) = (i / stride, i % stride / channels);
                    if x < from_width {
                        let at = y * (from_width + 1) + x + 1;
                        planes[i % stride % channels * plane + at] = f32::from(byte);
                    }
                }
                let (mut memory, mut out) = (vec![0.; 1000], vec![0.; want.len()]);
                let close = |out: &[f32]| {
                    for (got, want) in out.iter().zip(&want) {
                        assert!(
                            (f64::from(*got) - want).abs() < 1e-5 * want.max(1.),
                            "{got}, {want}"
                        );
                    }
                };
                resize_bytes(
                    &bytes,
                    stride,
                    from_width,
                    channels,
                    rows,
                    columns,
                    &mut memory,
                    &mut out,
                );
                close(&out);
                resize_planes(
                    &planes,
                    plane,
                    1,
                    from_width + 1,
                    from_width,
                    rows,
                    columns,
                    &mut memory,
                    &mut out,
                );
                close(&out);
            }
        }
    }

    #[test]
    fn blurring_mixes_pairs_in_both_directions_and_mirrors_edges() {
        // By hand: a row of 4 with kernel ½, ¼ becomes (a/2 + b/2, …, d/2 + c/2).
        let plane = [4f32, 8., 0., 2., 4., 8., 0., 2.];
        let mut out = [0.; 8];
        blur_plane(&plane, 4, &[0.5, 0.25], &mut [0.; 6], &mut out);
        assert_eq!(out[..4], [6., 5., 2.5, 1.]);
        assert_eq!(out[4..], out[..4]);
        let upright = [4f32, 4., 8., 8., 0., 0., 2., 2.];
        blur_plane(&upright, 2, &[0.5, 0.25], &mut [0.; 4], &mut out);
        assert_eq!(out, [6., 6., 5., 5., 2.5, 2.5, 1., 1.]);
    }

    #[test]
    fn every_variant_gives_the_same_bits() {
        for variant in Variant::available() {
            let (height, width) = (9, 75);
            let (starts, _) = mix(width);
            let weights = values(4 * width);
            let rows = Mix { starts: &starts[..height], taps: 3, weights: &weights[..3 * height] };
            let columns = Mix { starts: &starts, taps: 4, weights: &weights };
            let bytes: Vec<u8> =
                values(19 * 153 * 3).iter().map(|value| (value * 255.) as u8).collect();
            let all = |variant| {
                let mut planes = vec![0.; 3 * height * width];
                let mut memory = Vec::new();
                resize_bytes::at(
                    variant,
                    &bytes,
                    153 * 3,
                    153,
                    3,
                    rows,
                    columns,
                    &mut memory,
                    &mut planes,
                );
                scale_and_shift_clamped::at(variant, &mut planes, 1. / 800., 0.1);
                let mut total = 0.;
                add_up::at(variant, &planes, &mut total);
                let (red, rest) = planes.split_at_mut(height * width);
                let (green, blue) = rest.split_at_mut(height * width);
                turn_hue::at(variant, red, green, blue, 0.3);
                saturate::at(variant, red, green, blue, 1.3);
                let mut blurred = vec![0.; height * width];
                let kernel = [0.3, 0.2, 0.1, 0.05];
                blur_plane::at(
                    variant,
                    red,
                    width,
                    &kernel,
                    &mut vec![0.; width + 6],
                    &mut blurred,
                );
                power::at(variant, green, 0.7);
                solarise::at(variant, blue, 0.5);
                let mut out = vec![0.; 3 * height * width];
                interleave::at(variant, &mut out, &blurred, green, blue, [2.; 3], [0.1; 3]);
                (total, out)
            };
            assert!(all(variant) == all(Variant::PORTABLE), "{variant}");
        }
    }

    #[test]
    fn planes_are_extracted_and_interleaved() {
        let bytes: Vec<u8> = (0..60).collect();
        let planes: Vec<Vec<f32>> = (0..3)
            .map(|channel| {
                let mut plane = vec![0.; 20];
                plane_of_bytes(&mut plane, &bytes[channel..], 3, 0.5);
                plane
            })
            .collect();
        assert_eq!(planes[1][2], 3.5);
        let mut out = vec![0.; 60];
        let scale = [2., 4., 6.];
        interleave(&mut out, &planes[0], &planes[1], &planes[2], scale, [0., 1., 2.]);
        for (i, &got) in out.iter().enumerate() {
            assert_eq!(got, f32::from(bytes[i]) * 0.5 * scale[i % 3] + (i % 3) as f32);
        }
    }

    #[test]
    fn powers_are_those_of_the_standard_library() {
        for exponent in [0.3f32, 0.60653, 1., 1.64872, 5.] {
            let mut got = values(1009);
            got.extend([0., 1., 1e-30, f32::MIN_POSITIVE, 1e-40]);
            let before = got.clone();
            power(&mut got, exponent);
            for (x, got) in before.iter().zip(got) {
                let want = f64::from(*x).powf(f64::from(exponent));
                let tolerance = 2e-6 * want + 1e-11;
                assert!((f64::from(got) - want).abs() < tolerance, "{x}^{exponent}: {got}, {want}");
            }
        }
    }

    #[test]
    fn a_sum_contains_every_value_once() {
        for n in [0u16, 1, 16, 17, 100] {
            let ones: Vec<f32> = (0..n).map(f32::from).collect();
            let mut total = 5.;
            add_up(&ones, &mut total);
            assert_eq!(total, 5. + f32::from(n * n.saturating_sub(1) / 2));
        }
    }
}
