//! Batch norm with the residual sum and the ReLU that follow it, forward and backward.
//!
//! `y = relu((z − mean) · w / √(variance + ε) + b + residual)`, per channel (Ioffe & Szegedy 2015,
//! arXiv:1502.03167, Algorithm 1). Mean and variance are computed in two steps: the convolution that
//! makes the value sums small parts of it while they are in the cache, and [`merge`] joins the parts.
//! Code that restricts the statistics to a subset of images goes between the two steps.
#![expect(unsafe_code, reason = "tasks write disjoint parts of one gradient")]

use crate::element::{ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::parallel::Disjoint;
use crate::variant::for_each_variant;
use crate::{Buffer, Shape, Variant, parallel};

/// Count, mean and sum of squared deviations per channel, over a set of values.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    /// Values per channel.
    pub count: usize,
    /// Mean of each channel, 0 for padding.
    pub mean: Vec<f64>,
    /// `Σ (z − mean)²` of each channel (M2 of Chan et al.), 0 for padding.
    pub squares: Vec<f64>,
}

impl Moments {
    /// The variance that batch norm divides by: `M2 / count`.
    pub fn variance(&self, channel: usize) -> f64 {
        self.squares[channel] / self.count as f64
    }

    /// The unbiased variance for the running statistics: `M2 / (count − 1)`.
    pub fn unbiased_variance(&self, channel: usize) -> f64 {
        self.squares[channel] / (self.count as f64 - 1.)
    }

    /// Joins those of values that follow, by the equation of [`merge`]. The set that is joined to is not
    /// empty.
    pub fn join(&mut self, following: &Moments) {
        let (before, count) = (self.count as f64, following.count as f64);
        let share = count / (before + count);
        let means = self.mean.iter_mut().zip(&following.mean);
        let squares = self.squares.iter_mut().zip(&following.squares);
        for ((mean, following_mean), (squares, following_squares)) in means.zip(squares) {
            let difference = following_mean - *mean;
            *mean += difference * share;
            *squares += following_squares + difference * difference * before * share;
        }
        self.count += following.count;
    }
}

/// Rows of [`SIDE`] numbers for a block of channels in a part: shift, `Σ (z − shift)` and
/// `Σ (z − shift)²`.
const MOMENT_ROWS: usize = 3;
/// Numbers for a block of channels in a part.
pub(crate) const MOMENT_BLOCK: usize = MOMENT_ROWS * SIDE;

/// The length of the sums of all parts: layout (part, block of channels, shift or sum or squares,
/// channel).
///
/// A part is at most 32 pixels of one group of images. Its sums are taken around a shift, the mean of its
/// first pixel. So nothing cancels, however far the mean is from zero.
pub fn moments_len(shape: Shape) -> usize {
    shape.parts() * shape.blocks() * MOMENT_BLOCK
}

/// Computes the sums of a value that was not made by a convolution.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
pub fn moments(variant: Variant, shape: Shape, values: &Buffer, parts: &mut [f32]) {
    assert_eq!(values.len(), shape.len());
    assert_eq!(parts.len(), moments_len(shape));
    by_precision!(values.precision(), T => moments_of(variant, shape, T::of(values), parts));
}

fn moments_of<T: ValueElement>(variant: Variant, shape: Shape, values: &[T], parts: &mut [f32]) {
    let len = shape.blocks() * MOMENT_BLOCK;
    parallel::for_each_chunk(parts, len, 2 * shape.len(), |part, sums| {
        let (from, len, images) = shape.span(part);
        for (at, pixel) in values[from..from + len].chunks_exact(shape.pixel_len()).enumerate() {
            let tiles = pixel.chunks_exact(TILE).zip(sums.chunks_exact_mut(MOMENT_BLOCK));
            for (tile, sums) in tiles {
                add_moments(variant, tile, images, at == 0, sums);
            }
        }
    });
}

for_each_variant! {
    /// Adds a tile to the sums of its part; the first tile sets the shift.
    pub(crate) fn add_moments<T: ValueElement>(
        tile: &[T],
        images: usize,
        first: bool,
        sums: &mut [f32],
    ) {
        let (shift, rest) = sums.split_at_mut(SIDE);
        let (sum, square) = rest.split_at_mut(SIDE);
        if first {
            shift.fill(0.);
            sum.fill(0.);
            square.fill(0.);
            for row in tile.chunks_exact(SIDE).take(images) {
                for lane in 0..SIDE {
                    shift[lane] += row[lane].wide();
                }
            }
            let share = 1. / images as f32;
            for shift in shift.iter_mut() {
                *shift *= share;
            }
        }
        let mut shifts = [0f32; SIDE];
        shifts.copy_from_slice(shift);
        let (mut totals, mut squares) = ([0f32; SIDE], [0f32; SIDE]);
        for row in tile.chunks_exact(SIDE).take(images) {
            for lane in 0..SIDE {
                let deviation = row[lane].wide() - shifts[lane];
                totals[lane] += deviation;
                squares[lane] += deviation * deviation;
            }
        }
        for lane in 0..SIDE {
            sum[lane] += totals[lane];
            square[lane] += squares[lane];
        }
    }
}

/// Joins the parts in order: for two sets with counts `a`, `b` and `δ = mean_b − mean_a`,
/// `mean = mean_a + δ·b/(a+b)`, `M2 = M2_a + M2_b + δ²·a·b/(a+b)` (Chan, Golub & LeVeque 1983,
/// Eq. 2.1), in f64.
///
/// # Panics
///
/// If `parts` does not have the length of the shape.
pub fn merge(shape: Shape, parts: &[f32]) -> Moments {
    assert_eq!(parts.len(), moments_len(shape));
    let channels = shape.padded_channels();
    let mut all = Moments { count: 0, mean: vec![0.; channels], squares: vec![0.; channels] };
    for (part, sums) in parts.chunks_exact(shape.blocks() * MOMENT_BLOCK).enumerate() {
        let (group, pixels) = shape.part(part);
        let count = (pixels.len() * shape.images_in(group)) as f64;
        let before = all.count as f64;
        let share = count / (before + count);
        let means = all.mean.chunks_exact_mut(SIDE).zip(all.squares.chunks_exact_mut(SIDE));
        for ((means, squares), sums) in means.zip(sums.chunks_exact(MOMENT_BLOCK)) {
            for lane in 0..SIDE {
                let sum = f64::from(sums[SIDE + lane]);
                let mean = f64::from(sums[lane]) + sum / count;
                let square = f64::from(sums[2 * SIDE + lane]) - sum * sum / count;
                let difference = mean - means[lane];
                means[lane] += difference * share;
                squares[lane] += square.max(0.) + difference * difference * before * share;
            }
        }
        all.count += count as usize;
    }
    all
}

/// Mean and deviation that the forward pass applies to each channel (0 for padding) and the backward pass
/// needs again.
#[derive(Clone, Debug, Default)]
pub struct Normalisation {
    /// The mean that is subtracted.
    pub mean: Vec<f64>,
    /// `1 / √(variance + ε)`.
    pub inverse_deviation: Vec<f64>,
    /// Whether mean and deviation are those of the batch, so that gradients flow through them.
    pub batch: bool,
}

impl Normalisation {
    /// The mean rounded to f32, and its rounding error: with a mean of a thousand deviations, the error is
    /// a ten-thousandth of one.
    fn rounded(&self, channel: usize) -> (f32, f64) {
        let mean = self.mean[channel] as f32;
        (mean, self.mean[channel] - f64::from(mean))
    }
}

/// `output = relu((input − mean) · inverse_deviation · weight + bias + residual)`; ReLU and residual are
/// optional. `weight` and `bias` have one number per channel without padding.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
#[expect(clippy::too_many_arguments, reason = "the terms of one equation")]
pub fn forward(
    variant: Variant,
    shape: Shape,
    input: &Buffer,
    n: &Normalisation,
    weight: &[f32],
    bias: &[f32],
    residual: Option<&Buffer>,
    relu: bool,
    output: &mut Buffer,
) {
    let affine = Affine::new(shape, n, weight, bias);
    by_precision!(output.precision(), T => {
        let (input, residual) = (Some(T::of(input)), residual.map(T::of));
        apply_everywhere(variant, shape, input, &affine, residual, relu, T::of_mut(output));
    });
}

/// [`forward`] in place.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
#[expect(clippy::too_many_arguments, reason = "the terms of one equation")]
pub fn forward_in_place(
    variant: Variant,
    shape: Shape,
    values: &mut Buffer,
    n: &Normalisation,
    weight: &[f32],
    bias: &[f32],
    residual: Option<&Buffer>,
    relu: bool,
) {
    let affine = Affine::new(shape, n, weight, bias);
    by_precision!(values.precision(), T => {
        let residual = residual.map(T::of);
        apply_everywhere(variant, shape, None, &affine, residual, relu, T::of_mut(values));
    });
}

/// `input` is `None` if `output` holds it.
fn apply_everywhere<T: ValueElement>(
    variant: Variant,
    shape: Shape,
    input: Option<&[T]>,
    affine: &Affine,
    residual: Option<&[T]>,
    relu: bool,
    output: &mut [T],
) {
    assert!(input.is_none_or(|input| input.len() == shape.len()));
    assert!(residual.is_none_or(|residual| residual.len() == shape.len()));
    for_each_pixel(shape, output, |from, images, output| {
        let input = input.map(|input| &input[from..from + output.len()]);
        let residual = residual.map(|residual| &residual[from..from + output.len()]);
        apply(variant, input, affine, residual, relu, images, output);
    });
}

/// Calls `task(offset, images, tiles)` for every pixel of every group.
fn for_each_pixel<T: ValueElement>(
    shape: Shape,
    values: &mut [T],
    task: impl Fn(usize, usize, &mut [T]) + Sync + Send,
) {
    assert_eq!(values.len(), shape.len());
    let len = shape.pixel_len();
    let pixels = shape.pixels();
    parallel::for_each_chunk(values, len, shape.len(), |at, values| {
        task(at * len, shape.images_in(at / pixels), values);
    });
}

/// Mean, factor and shift per channel: `y = (z − mean) · factor + shift`.
struct Affine {
    mean: Vec<f32>,
    factor: Vec<f32>,
    shift: Vec<f32>,
}

impl Affine {
    fn new(shape: Shape, n: &Normalisation, weight: &[f32], bias: &[f32]) -> Affine {
        let channels = shape.padded_channels();
        assert_eq!((weight.len(), bias.len()), (shape.channels, shape.channels));
        assert_eq!((n.mean.len(), n.inverse_deviation.len()), (channels, channels));
        let zeros = || vec![0f32; channels];
        let mut affine = Affine { mean: zeros(), factor: zeros(), shift: zeros() };
        for channel in 0..shape.channels {
            let (mean, error) = n.rounded(channel);
            let factor = f64::from(weight[channel]) * n.inverse_deviation[channel];
            affine.mean[channel] = mean;
            affine.factor[channel] = factor as f32;
            affine.shift[channel] = (f64::from(bias[channel]) - error * factor) as f32;
        }
        affine
    }
}

for_each_variant! {
    fn apply<T: ValueElement>(
        input: Option<&[T]>,
        affine: &Affine,
        residual: Option<&[T]>,
        relu: bool,
        images: usize,
        output: &mut [T],
    ) {
        for (block, tile) in output.chunks_exact_mut(TILE).enumerate() {
            let mean = &affine.mean[block * SIDE..][..SIDE];
            let factor = &affine.factor[block * SIDE..][..SIDE];
            let shift = &affine.shift[block * SIDE..][..SIDE];
            for (image, row) in tile.chunks_exact_mut(SIDE).enumerate() {
                if image >= images {
                    row.fill(T::narrow(0.));
                    continue;
                }
                let at = block * TILE + image * SIDE;
                let mut values = [0f32; SIDE];
                let input = input.map_or(&*row, |input| &input[at..at + SIDE]);
                for lane in 0..SIDE {
                    values[lane] = (input[lane].wide() - mean[lane]) * factor[lane] + shift[lane];
                }
                if let Some(residual) = residual {
                    for (value, residual) in values.iter_mut().zip(&residual[at..at + SIDE]) {
                        *value += residual.wide();
                    }
                }
                if relu {
                    for value in &mut values {
                        // Not `max`, which would hide a NaN.
                        *value = if *value <= 0. { 0. } else { *value };
                    }
                }
                for (to, value) in row.iter_mut().zip(values) {
                    *to = T::narrow(value);
                }
            }
        }
    }
}

/// `output = max(input, 0)`; a NaN stays a NaN.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
pub fn relu_forward(variant: Variant, shape: Shape, input: &Buffer, output: &mut Buffer) {
    assert_eq!(input.len(), shape.len());
    by_precision!(input.precision(), T => {
        let input = T::of(input);
        for_each_pixel(shape, T::of_mut(output), |from, _, output| {
            rectify(variant, &input[from..from + output.len()], output);
        });
    });
}

for_each_variant! {
    fn rectify<T: ValueElement>(input: &[T], output: &mut [T]) {
        for (output, input) in output.iter_mut().zip(input) {
            *output = if input.wide() <= 0. { T::narrow(0.) } else { *input };
        }
    }
}

/// Sets the gradient to zero where the ReLU's output is zero: `relu'(0) = 0`, as in PyTorch.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
pub fn relu_backward(variant: Variant, shape: Shape, output: &Buffer, gradient: &mut Buffer) {
    assert_eq!(output.len(), shape.len());
    by_precision!(output.precision(), T => {
        let output = T::of(output);
        for_each_pixel(shape, T::of_mut(gradient), |from, _, gradient| {
            mask(variant, &output[from..from + gradient.len()], gradient);
        });
    });
}

for_each_variant! {
    fn mask<T: ValueElement>(output: &[T], gradient: &mut [T]) {
        for (gradient, output) in gradient.iter_mut().zip(output) {
            *gradient = if output.wide() <= 0. { T::narrow(0.) } else { *gradient };
        }
    }
}

/// `Σ g` and `Σ g · (z − mean)` per channel, over all images and pixels.
#[derive(Clone, Debug, Default)]
pub struct GradientSums {
    /// `M`, values per channel.
    pub count: usize,
    /// `Σ g`.
    pub plain: Vec<f64>,
    /// `Σ g · (z − mean)`.
    pub centred: Vec<f64>,
}

/// The length of scratch memory for [`gradient_sums`]: layout (part, block of channels, plain or
/// centred, channel).
pub fn gradient_sums_len(shape: Shape) -> usize {
    shape.parts() * shape.blocks() * 2 * SIDE
}

/// The ReLU that follows a batch norm. It blocks the gradient where its output is zero.
#[derive(Clone, Copy)]
pub enum Relu<'a> {
    /// There is none.
    Absent,
    /// The output is at hand. Where it is zero, [`gradient_sums`] sets the gradient to zero in place, so
    /// that [`input_gradient`] finds it blocked.
    Output(&'a Buffer),
    /// The output is recomputed from the norm's input, with this weight and bias; there is no residual.
    /// The gradient in memory is left unchanged.
    Recomputed(&'a [f32], &'a [f32]),
}

impl Relu<'_> {
    /// The affine map that recomputes the output.
    fn affine(&self, shape: Shape, n: &Normalisation) -> Option<Affine> {
        match self {
            Relu::Recomputed(weight, bias) => Some(Affine::new(shape, n, weight, bias)),
            Relu::Absent | Relu::Output(_) => None,
        }
    }
}

/// Computes the sums that the backward pass needs, of the gradient of the ReLU's output.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
pub fn gradient_sums(
    variant: Variant,
    shape: Shape,
    gradient: &mut Buffer,
    relu: Relu,
    input: &Buffer,
    n: &Normalisation,
    scratch: &mut [f32],
) -> GradientSums {
    by_precision!(input.precision(), T => {
        sums_of_parts(variant, shape, T::of_mut(gradient), relu, T::of(input), n, scratch);
    });
    let channels = shape.padded_channels();
    let mut sums = GradientSums {
        count: shape.count(),
        plain: vec![0.; channels],
        centred: vec![0.; channels],
    };
    for part in scratch.chunks_exact(shape.blocks() * 2 * SIDE) {
        for (block, part) in part.chunks_exact(2 * SIDE).enumerate() {
            for lane in 0..SIDE {
                sums.plain[block * SIDE + lane] += f64::from(part[lane]);
                sums.centred[block * SIDE + lane] += f64::from(part[SIDE + lane]);
            }
        }
    }
    for channel in 0..channels {
        sums.centred[channel] -= n.rounded(channel).1 * sums.plain[channel];
    }
    sums
}

fn sums_of_parts<T: ValueElement>(
    variant: Variant,
    shape: Shape,
    gradient: &mut [T],
    relu: Relu,
    input: &[T],
    n: &Normalisation,
    scratch: &mut [f32],
) {
    let affine = relu.affine(shape, n);
    let output = if let Relu::Output(output) = relu { Some(T::of(output)) } else { None };
    assert_eq!(gradient.len(), shape.len());
    assert_eq!(input.len(), shape.len());
    assert!(output.is_none_or(|output| output.len() == shape.len()));
    assert_eq!(scratch.len(), gradient_sums_len(shape));
    let channels = shape.padded_channels();
    let mean: Vec<f32> = (0..channels).map(|channel| n.rounded(channel).0).collect();
    let (gradient, len) = (Disjoint::new(gradient), shape.blocks() * 2 * SIDE);
    parallel::for_each_chunk(scratch, len, 2 * shape.len(), |part, sums| {
        let (from, len, _) = shape.span(part);
        // SAFETY: parts do not overlap, and each belongs to one task.
        let gradient = unsafe { gradient.part(from, len) };
        let output = output.map(|output| &output[from..from + len]);
        let input = &input[from..from + len];
        let affine = affine.as_ref();
        part_sums(variant, gradient, output, affine, input, shape.pixel_len(), &mean, sums);
    });
}

for_each_variant! {
    /// Padded rows have gradient zero and add nothing.
    fn part_sums<T: ValueElement>(
        gradient: &mut [T],
        output: Option<&[T]>,
        recompute: Option<&Affine>,
        input: &[T],
        pixel_len: usize,
        mean: &[f32],
        sums: &mut [f32],
    ) {
        if let Some(output) = output {
            for (gradient, output) in gradient.iter_mut().zip(output) {
                *gradient = if output.wide() <= 0. { T::narrow(0.) } else { *gradient };
            }
        }
        for (block, sums) in sums.chunks_exact_mut(2 * SIDE).enumerate() {
            let mut means = [0f32; SIDE];
            means.copy_from_slice(&mean[block * SIDE..][..SIDE]);
            // Without a ReLU to recompute, the output counts as 1.
            let (mut factors, mut shifts) = ([0f32; SIDE], [1f32; SIDE]);
            if let Some(affine) = recompute {
                factors.copy_from_slice(&affine.factor[block * SIDE..][..SIDE]);
                shifts.copy_from_slice(&affine.shift[block * SIDE..][..SIDE]);
            }
            let (mut plain, mut centred) = ([0f32; SIDE], [0f32; SIDE]);
            let pixels = gradient.chunks_exact(pixel_len).zip(input.chunks_exact(pixel_len));
            for (gradient, input) in pixels {
                let gradient = gradient[block * TILE..][..TILE].chunks_exact(SIDE);
                let input = input[block * TILE..][..TILE].chunks_exact(SIDE);
                for (gradient, input) in gradient.zip(input) {
                    for lane in 0..SIDE {
                        let (gradient, input) = (gradient[lane].wide(), input[lane].wide());
                        let deviation = input - means[lane];
                        let output = deviation * factors[lane] + shifts[lane];
                        let gradient = if output <= 0. { 0. } else { gradient };
                        plain[lane] += gradient;
                        centred[lane] += gradient * deviation;
                    }
                }
            }
            sums[..SIDE].copy_from_slice(&plain);
            sums[SIDE..].copy_from_slice(&centred);
        }
    }
}

/// Adds the gradient of the weight: `Σ g·(z − mean)/deviation`.
pub fn weight_gradient(n: &Normalisation, sums: &GradientSums, gradient: &mut [f32]) {
    for (channel, gradient) in gradient.iter_mut().enumerate() {
        *gradient += (sums.centred[channel] * n.inverse_deviation[channel]) as f32;
    }
}

/// Adds the gradient of the bias: `Σ g`.
pub fn bias_gradient(sums: &GradientSums, gradient: &mut [f32]) {
    for (gradient, sum) in gradient.iter_mut().zip(&sums.plain) {
        *gradient += *sum as f32;
    }
}

/// The gradient of the input from that of the ReLU's output, after [`gradient_sums`].
///
/// With batch statistics over the `M` values of `sums`, which may be more than these, and `s = 1/deviation`:
/// `dz = w·s · (g − Σg/M − (z − mean)·s²·Σg(z − mean)/M)`; with running ones `dz = w·s · g`.
/// `gradient` is `None` if `result` holds it.
///
/// # Panics
///
/// If a slice does not have the length of the shape.
#[expect(clippy::too_many_arguments, reason = "the terms of one equation")]
pub fn input_gradient(
    variant: Variant,
    shape: Shape,
    input: &Buffer,
    n: &Normalisation,
    weight: &[f32],
    sums: &GradientSums,
    relu: Relu,
    gradient: Option<&Buffer>,
    result: &mut Buffer,
) {
    let back = BackwardAffine::new(shape, n, weight, sums, relu.affine(shape, n).as_ref());
    by_precision!(input.precision(), T => {
        let (gradient, result) = (gradient.map(T::of), T::of_mut(result));
        back_apply_everywhere(variant, shape, T::of(input), &back, gradient, result);
    });
}

fn back_apply_everywhere<T: ValueElement>(
    variant: Variant,
    shape: Shape,
    input: &[T],
    back: &BackwardAffine,
    gradient: Option<&[T]>,
    result: &mut [T],
) {
    assert_eq!(input.len(), shape.len());
    assert!(gradient.is_none_or(|gradient| gradient.len() == shape.len()));
    for_each_pixel(shape, result, |from, images, result| {
        let input = &input[from..from + result.len()];
        let gradient = gradient.map(|gradient| &gradient[from..from + result.len()]);
        back_apply(variant, input, gradient, back, images, result);
    });
}

/// `dz = factor · (g − plain − (z − mean) · slope)`, where `g` counts as zero unless
/// `(z − mean) · relu_factor + relu_shift > 0`.
struct BackwardAffine {
    mean: Vec<f32>,
    factor: Vec<f32>,
    plain: Vec<f32>,
    slope: Vec<f32>,
    /// The affine map whose ReLU is recomputed; 0 and 1 if there is none to recompute.
    relu_factor: Vec<f32>,
    relu_shift: Vec<f32>,
}

impl BackwardAffine {
    fn new(
        shape: Shape,
        n: &Normalisation,
        weight: &[f32],
        sums: &GradientSums,
        relu: Option<&Affine>,
    ) -> BackwardAffine {
        let zeros = || vec![0f32; shape.padded_channels()];
        let mut back = BackwardAffine {
            mean: zeros(),
            factor: zeros(),
            plain: zeros(),
            slope: zeros(),
            relu_factor: relu.map_or_else(zeros, |affine| affine.factor.clone()),
            relu_shift: relu
                .map_or_else(|| vec![1.; shape.padded_channels()], |affine| affine.shift.clone()),
        };
        let count = sums.count as f64;
        for (channel, weight) in weight.iter().enumerate() {
            let inverse = n.inverse_deviation[channel];
            let (mean, error) = n.rounded(channel);
            back.mean[channel] = mean;
            back.factor[channel] = (f64::from(*weight) * inverse) as f32;
            if n.batch {
                let slope = sums.centred[channel] * inverse * inverse / count;
                back.slope[channel] = slope as f32;
                back.plain[channel] = (sums.plain[channel] / count - error * slope) as f32;
            }
        }
        back
    }
}

for_each_variant! {
    /// `gradient` is `None` if `result` holds it.
    fn back_apply<T: ValueElement>(
        input: &[T],
        gradient: Option<&[T]>,
        back: &BackwardAffine,
        images: usize,
        result: &mut [T],
    ) {
        let tiles = result.chunks_exact_mut(TILE).zip(input.chunks_exact(TILE));
        for (block, (result, input)) in tiles.enumerate() {
            let mean = &back.mean[block * SIDE..][..SIDE];
            let factor = &back.factor[block * SIDE..][..SIDE];
            let plain = &back.plain[block * SIDE..][..SIDE];
            let slope = &back.slope[block * SIDE..][..SIDE];
            let relu_factor = &back.relu_factor[block * SIDE..][..SIDE];
            let relu_shift = &back.relu_shift[block * SIDE..][..SIDE];
            let rows = result.chunks_exact_mut(SIDE).zip(input.chunks_exact(SIDE));
            for (image, (result, input)) in rows.enumerate() {
                if image >= images {
                    result.fill(T::narrow(0.));
                    continue;
                }
                let at = block * TILE + image * SIDE;
                let gradient = gradient.map_or(&*result, |gradient| &gradient[at..at + SIDE]);
                let mut values = [0f32; SIDE];
                for lane in 0..SIDE {
                    let (gradient, input) = (gradient[lane].wide(), input[lane].wide());
                    let deviation = input - mean[lane];
                    let output = deviation * relu_factor[lane] + relu_shift[lane];
                    let gradient = if output <= 0. { 0. } else { gradient };
                    let centred = deviation * slope[lane];
                    values[lane] = factor[lane] * (gradient - plain[lane] - centred);
                }
                for (to, value) in result.iter_mut().zip(values) {
                    *to = T::narrow(value);
                }
            }
        }
    }
}

/// `total += gradient`, for a value that several layers read.
///
/// # Panics
///
/// If the lengths differ.
pub fn add(variant: Variant, shape: Shape, gradient: &Buffer, total: &mut Buffer) {
    assert_eq!(gradient.len(), shape.len());
    by_precision!(gradient.precision(), T => {
        let gradient = T::of(gradient);
        for_each_pixel(shape, T::of_mut(total), |from, _, total| {
            add_tiles(variant, &gradient[from..from + total.len()], total);
        });
    });
}

for_each_variant! {
    fn add_tiles<T: ValueElement>(values: &[T], total: &mut [T]) {
        for (total, value) in total.iter_mut().zip(values) {
            *total = T::narrow(total.wide() + value.wide());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;

    /// 21 images of 7 × 9 pixels and 19 channels: two groups, two parts each, two blocks.
    const SHAPE: Shape = Shape { images: 21, height: 7, width: 9, channels: 19 };

    fn values(offset: f32) -> (Vec<f32>, Buffer) {
        let rows: Vec<f32> = (0..SHAPE.count() * SHAPE.channels)
            .map(|at| offset + ((at * 7919) % 1013) as f32 / 1013.)
            .collect();
        let mut tiles = Buffer::zeros(SHAPE.len());
        tiles.fill(f32::NAN);
        SHAPE.pack(&rows, &mut tiles);
        (rows, tiles)
    }

    #[test]
    fn merged_moments_are_those_of_all_values() {
        for (offset, bound) in [(0., 1e-6), (3000., 1e-3)] {
            let (rows, tiles) = values(offset);
            for variant in Variant::available() {
                let mut parts = vec![f32::NAN; moments_len(SHAPE)];
                moments(variant, SHAPE, &tiles, &mut parts);
                let merged = merge(SHAPE, &parts);
                assert_eq!(merged.count, SHAPE.count());
                for channel in 0..SHAPE.channels {
                    let of_channel = || rows.iter().skip(channel).step_by(SHAPE.channels);
                    let count = SHAPE.count() as f64;
                    let mean = of_channel().map(|x| f64::from(*x)).sum::<f64>() / count;
                    let squares = of_channel().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
                    let off = (merged.mean[channel] - mean).abs();
                    assert!(off < bound * 0.1, "{variant}: mean {off} off at {offset}");
                    let off = (merged.squares[channel] / squares - 1.).abs();
                    assert!(off < bound, "{variant}: variance {off} off at {offset}");
                }
                assert!(merged.squares[SHAPE.channels..].iter().all(|square| *square == 0.));
            }
        }
    }

    /// The ReLU's output, read or recomputed, gives the same gradients bit by bit.
    #[test]
    fn a_recomputed_relu_gives_the_same_bits() {
        for precision in [Precision::F32, Precision::Bf16] {
            let (rows, _) = values(-0.5);
            let value = |rows: &[f32]| {
                let mut tiles = Buffer::zeros_of(precision, SHAPE.len());
                SHAPE.pack(rows, &mut tiles);
                tiles
            };
            let gradient: Vec<f32> = rows.iter().map(|x| (37. * x).sin()).collect();
            let (input, gradient) = (value(&rows), value(&gradient));
            let n = Normalisation {
                mean: vec![0.125; SHAPE.padded_channels()],
                inverse_deviation: vec![2.5; SHAPE.padded_channels()],
                batch: true,
            };
            let weight: Vec<f32> = (0..19).map(|channel| 0.1 * (channel as f32 - 4.)).collect();
            let bias: Vec<f32> = (0..19).map(|channel| 0.05 * (9. - channel as f32)).collect();
            for variant in Variant::available() {
                let mut output = value(&rows);
                forward(variant, SHAPE, &input, &n, &weight, &bias, None, true, &mut output);
                let mut results = Vec::new();
                for relu in [Relu::Output(&output), Relu::Recomputed(&weight, &bias)] {
                    let mut result = gradient.clone();
                    let mut parts = vec![f32::NAN; gradient_sums_len(SHAPE)];
                    let sums =
                        gradient_sums(variant, SHAPE, &mut result, relu, &input, &n, &mut parts);
                    let into = &mut result;
                    input_gradient(variant, SHAPE, &input, &n, &weight, &sums, relu, None, into);
                    results.push((result, sums));
                }
                let [(a, sums), (b, again)] = &results[..] else { panic!("two") };
                assert!(a.bytes() == b.bytes() && a.bytes() != gradient.bytes(), "{variant}");
                assert_eq!((&sums.plain, &sums.centred), (&again.plain, &again.centred));
            }
        }
    }

    #[test]
    fn padding_stays_zero() {
        let (_, tiles) = values(0.5);
        let n = Normalisation {
            mean: vec![0.25; SHAPE.padded_channels()],
            inverse_deviation: vec![2.; SHAPE.padded_channels()],
            batch: true,
        };
        let (weight, bias) = ([1.5; 19], [0.75; 19]);
        for variant in Variant::available() {
            let mut output = tiles.clone();
            output.fill(f32::NAN);
            forward(variant, SHAPE, &tiles, &n, &weight, &bias, None, false, &mut output);
            let real = output.iter().filter(|value| **value != 0.).count();
            assert_eq!(real, SHAPE.count() * SHAPE.channels, "{variant}");
            let (plain, centred) = (vec![3.; 32], vec![2.; 32]);
            let sums = GradientSums { count: SHAPE.count(), plain, centred };
            let mut result = tiles.clone();
            result.fill(f32::NAN);
            for relu in [Relu::Absent, Relu::Recomputed(&weight, &bias)] {
                let gradient = Some(&output);
                input_gradient(
                    variant,
                    SHAPE,
                    &tiles,
                    &n,
                    &weight,
                    &sums,
                    relu,
                    gradient,
                    &mut result,
                );
                let real = result.iter().filter(|value| **value != 0.).count();
                assert_eq!(real, SHAPE.count() * SHAPE.channels, "{variant}");
            }
        }
    }
}
