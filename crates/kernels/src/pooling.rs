//! Max-pool and global average pool, forward and backward.

use crate::convolution::output_side;
use crate::element::{ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::variant::for_each_variant;
use crate::{Buffer, Shape, Variant, parallel};

/// A square window that moves over a value. Padding counts as −∞.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The shape of the value it reads.
    pub input: Shape,
    /// The shape of the value it writes.
    pub output: Shape,
    /// Side of the window, in pixels.
    pub kernel: usize,
    /// Input pixels from one window to the next.
    pub stride: usize,
    /// Padding on each side, at most half the window.
    pub padding: usize,
}

impl Window {
    /// The windows over `input`; `None` if none fits, if the padding exceeds half the window (a window
    /// could contain no pixel), or if the window has more than 256 pixels.
    pub fn new(input: Shape, kernel: usize, stride: usize, padding: usize) -> Option<Window> {
        if padding > kernel / 2 || kernel > 16 {
            return None;
        }
        let height = output_side(input.height, kernel, stride, padding)?;
        let width = output_side(input.width, kernel, stride, padding)?;
        Some(Window { input, output: Shape { height, width, ..input }, kernel, stride, padding })
    }

    /// The taps of a window inside the input along one side, each with its input pixel.
    fn taps(&self, at: usize, limit: usize) -> impl Iterator<Item = (usize, usize)> {
        let (first, padding) = (at * self.stride, self.padding);
        (0..self.kernel).filter_map(move |tap| {
            (first + tap).checked_sub(padding).filter(|from| *from < limit).map(|from| (tap, from))
        })
    }

    /// The windows along one side that contain the input pixel `at`, each with the tap on it.
    fn windows(&self, at: usize, limit: usize) -> impl Iterator<Item = (usize, usize)> {
        let (stride, padding) = (self.stride, self.padding);
        (0..self.kernel).filter_map(move |tap| {
            let steps = (at + padding).checked_sub(tap)?;
            let window = steps / stride;
            (steps.is_multiple_of(stride) && window < limit).then_some((tap, window))
        })
    }
}

/// Computes the maximum of every window, and in `taps` the index of its pixel within the window: the
/// first of equal ones in reading order, or the last NaN.
///
/// # Panics
///
/// If a slice does not have the length of its shape.
pub fn max_forward(
    variant: Variant,
    w: &Window,
    input: &Buffer,
    output: &mut Buffer,
    taps: &mut [u8],
) {
    assert_eq!(input.len(), w.input.len());
    assert_eq!(output.len(), w.output.len());
    assert_eq!(taps.len(), w.output.len());
    by_precision!(input.precision(), T => {
        max_forward_of::<T>(variant, w, T::of(input), T::of_mut(output), taps);
    });
}

fn max_forward_of<T: ValueElement>(
    variant: Variant,
    w: &Window,
    input: &[T],
    output: &mut [T],
    taps: &mut [u8],
) {
    let len = w.output.pixel_len();
    let operations = w.output.len() * w.kernel * w.kernel;
    parallel::for_each_chunk_of_two(output, taps, len, operations, |at, output, taps| {
        let (group, pixel) = (at / w.output.pixels(), at % w.output.pixels());
        let (y, x) = (pixel / w.output.width, pixel % w.output.width);
        let mut first = true;
        for (tap_y, from_y) in w.taps(y, w.input.height) {
            for (tap_x, from_x) in w.taps(x, w.input.width) {
                let from = ((group * w.input.height + from_y) * w.input.width + from_x) * len;
                let tap = (tap_y * w.kernel + tap_x) as u8;
                let input = &input[from..from + len];
                if std::mem::take(&mut first) {
                    output.copy_from_slice(input);
                    taps.fill(tap);
                } else {
                    larger(variant, input, tap, output, taps);
                }
            }
        }
    });
}

for_each_variant! {
    fn larger<T: ValueElement>(input: &[T], tap: u8, output: &mut [T], taps: &mut [u8]) {
        let rows = output.chunks_exact_mut(SIDE).zip(taps.chunks_exact_mut(SIDE));
        for ((output, taps), input) in rows.zip(input.chunks_exact(SIDE)) {
            for lane in 0..SIDE {
                let value = input[lane].wide();
                let wins = value > output[lane].wide() || value.is_nan();
                taps[lane] = if wins { tap } else { taps[lane] };
                output[lane] = if wins { input[lane] } else { output[lane] };
            }
        }
    }
}

/// Sends the gradient of each window to the pixel of its maximum. With `add`, adds to `gradient`,
/// otherwise replaces it.
///
/// # Panics
///
/// If a slice does not have the length of its shape.
pub fn max_backward(
    variant: Variant,
    w: &Window,
    output_gradient: &Buffer,
    taps: &[u8],
    gradient: &mut Buffer,
    add: bool,
) {
    assert_eq!(gradient.len(), w.input.len());
    assert_eq!(output_gradient.len(), w.output.len());
    assert_eq!(taps.len(), w.output.len());
    by_precision!(gradient.precision(), T => {
        max_backward_of::<T>(variant, w, T::of(output_gradient), taps, T::of_mut(gradient), add);
    });
}

fn max_backward_of<T: ValueElement>(
    variant: Variant,
    w: &Window,
    output_gradient: &[T],
    taps: &[u8],
    gradient: &mut [T],
    add: bool,
) {
    let len = w.input.pixel_len();
    let operations = w.output.len() * w.kernel * w.kernel;
    parallel::for_each_chunk(gradient, len, operations, |at, gradient| {
        let (group, pixel) = (at / w.input.pixels(), at % w.input.pixels());
        let (y, x) = (pixel / w.input.width, pixel % w.input.width);
        if !add {
            gradient.fill(T::narrow(0.));
        }
        for (tap_y, to_y) in w.windows(y, w.output.height) {
            for (tap_x, to_x) in w.windows(x, w.output.width) {
                let from = ((group * w.output.height + to_y) * w.output.width + to_x) * len;
                let tap = (tap_y * w.kernel + tap_x) as u8;
                let (from, taps) = (&output_gradient[from..from + len], &taps[from..from + len]);
                add_where(variant, from, taps, tap, gradient);
            }
        }
    });
}

for_each_variant! {
    fn add_where<T: ValueElement>(from: &[T], taps: &[u8], tap: u8, gradient: &mut [T]) {
        let rows = gradient.chunks_exact_mut(SIDE).zip(taps.chunks_exact(SIDE));
        for ((gradient, taps), from) in rows.zip(from.chunks_exact(SIDE)) {
            for lane in 0..SIDE {
                let share = if taps[lane] == tap { from[lane].wide() } else { 0. };
                gradient[lane] = T::narrow(gradient[lane].wide() + share);
            }
        }
    }
}

/// Computes the mean over all pixels: features of the same channels.
///
/// # Panics
///
/// If a slice does not have the length of its shape.
pub fn average_forward(variant: Variant, input_shape: Shape, input: &Buffer, output: &mut Buffer) {
    assert_eq!(input.len(), input_shape.len());
    assert_eq!(output.len(), input_shape.groups() * input_shape.pixel_len());
    by_precision!(input.precision(), T => {
        average_forward_of::<T>(variant, input_shape, T::of(input), T::of_mut(output));
    });
}

fn average_forward_of<T: ValueElement>(
    variant: Variant,
    input_shape: Shape,
    input: &[T],
    output: &mut [T],
) {
    let len = input_shape.pixel_len();
    let pixels = input_shape.pixels();
    parallel::for_each_chunk(output, TILE, input.len(), |at, output| {
        let (group, block) = (at / input_shape.blocks(), at % input_shape.blocks());
        let input = &input[group * pixels * len..][..pixels * len];
        mean_of_pixels(variant, input, len, block, output);
    });
}

for_each_variant! {
    fn mean_of_pixels<T: ValueElement>(input: &[T], pixel_len: usize, block: usize, output: &mut [T]) {
        let mut sums = [0f32; TILE];
        for pixel in input.chunks_exact(pixel_len) {
            for (sum, value) in sums.iter_mut().zip(&pixel[block * TILE..][..TILE]) {
                *sum += value.wide();
            }
        }
        let share = 1. / (input.len() / pixel_len) as f32;
        for (output, sum) in output.iter_mut().zip(sums) {
            *output = T::narrow(sum * share);
        }
    }
}

/// Sends each pixel its share of the gradient of the mean. With `add`, adds to `gradient`, otherwise
/// replaces it.
///
/// # Panics
///
/// If a slice does not have the length of its shape.
pub fn average_backward(
    variant: Variant,
    input_shape: Shape,
    output_gradient: &Buffer,
    gradient: &mut Buffer,
    add: bool,
) {
    assert_eq!(gradient.len(), input_shape.len());
    assert_eq!(output_gradient.len(), input_shape.groups() * input_shape.pixel_len());
    by_precision!(gradient.precision(), T => {
        let (from, to) = (T::of(output_gradient), T::of_mut(gradient));
        average_backward_of::<T>(variant, input_shape, from, to, add);
    });
}

fn average_backward_of<T: ValueElement>(
    variant: Variant,
    input_shape: Shape,
    output_gradient: &[T],
    gradient: &mut [T],
    add: bool,
) {
    let len = input_shape.pixel_len();
    let pixels = input_shape.pixels();
    let share = 1. / pixels as f32;
    parallel::for_each_chunk(gradient, len, input_shape.len(), |at, gradient| {
        let from = &output_gradient[at / pixels * len..][..len];
        spread(variant, from, share, add, gradient);
    });
}

for_each_variant! {
    fn spread<T: ValueElement>(from: &[T], share: f32, add: bool, gradient: &mut [T]) {
        if !add {
            gradient.fill(T::narrow(0.));
        }
        for (gradient, from) in gradient.iter_mut().zip(from) {
            *gradient = T::narrow(gradient.wide() + from.wide() * share);
        }
    }
}
