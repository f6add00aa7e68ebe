//! Batch norm with the residual sum and the ReLU that follow it, forward and backward.
//!
//! `y = relu((z − mean) · w / √(variance + ε) + b + residual)`, per channel (Ioffe & Szegedy 2015,
//! arXiv:1502.03167, Algorithm 1). Mean and variance are made in two steps: [`moments`] takes them
//! over small parts of the value, where the data are, and [`merge`] joins the parts. What is to
//! decide over which images a statistic runs acts between the two.

use crate::layout::{SIDE, TILE};
use crate::variant::for_each_variant;
use crate::{Shape, Variant, parallel};

/// Count, mean and sum of squared deviations of every channel, over some set of values.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    /// Values per channel.
    pub count: usize,
    /// Mean of each channel, padded channels 0.
    pub mean: Vec<f64>,
    /// `Σ (z − mean)²` of each channel (M2 of Chan et al.), padded channels 0.
    pub squares: Vec<f64>,
}

impl Moments {
    /// Variance as batch norm divides by it: `M2 / count`.
    pub fn variance(&self, channel: usize) -> f64 {
        self.squares[channel] / self.count as f64
    }

    /// Variance as the running statistics keep it, without bias: `M2 / (count − 1)`.
    pub fn unbiased_variance(&self, channel: usize) -> f64 {
        self.squares[channel] / (self.count as f64 - 1.)
    }
}

/// Numbers that [`moments`] writes: two per part and padded channel.
pub fn moments_len(shape: Shape) -> usize {
    shape.parts() * 2 * shape.padded_channels()
}

/// Mean and `Σ (z − mean)²` of each part (at most 32 pixels of one group of images) and channel.
///
/// A part is small enough to stay in the first cache, so the squares are taken around the part's
/// own mean in a second pass: nothing cancels, however far the mean is from zero. Layout: (part;
/// mean, squares; padded channel).
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn moments(variant: Variant, shape: Shape, values: &[f32], parts: &mut [f32]) {
    assert_eq!(values.len(), shape.len());
    assert_eq!(parts.len(), moments_len(shape));
    let channels = shape.padded_channels();
    parallel::for_each_chunk(parts, 2 * channels, 2 * shape.len(), |part, moments| {
        let (mean, squares) = moments.split_at_mut(channels);
        let (values, images) = pixels_of(shape, part, values);
        part_moments(variant, values, shape.pixel_len(), images, mean, squares);
    });
}

/// The tiles of a part, and how many images of them are real.
fn pixels_of(shape: Shape, part: usize, values: &[f32]) -> (&[f32], usize) {
    let (from, len, images) = span_of(shape, part);
    (&values[from..from + len], images)
}

fn span_of(shape: Shape, part: usize) -> (usize, usize, usize) {
    let (group, pixels) = shape.part(part);
    let from = (group * shape.pixels() + pixels.start) * shape.pixel_len();
    (from, pixels.len() * shape.pixel_len(), shape.images_in(group))
}

for_each_variant! {
    fn part_moments(
        values: &[f32],
        pixel_len: usize,
        images: usize,
        means: &mut [f32],
        squares: &mut [f32],
    ) {
        let count = (values.len() / pixel_len * images) as f32;
        let blocks = means.chunks_exact_mut(SIDE).zip(squares.chunks_exact_mut(SIDE));
        for (block, (means, squares)) in blocks.enumerate() {
            let mut mean = [0f32; SIDE];
            for pixel in values.chunks_exact(pixel_len) {
                for row in pixel[block * TILE..][..TILE].chunks_exact(SIDE).take(images) {
                    for (mean, value) in mean.iter_mut().zip(row) {
                        *mean += value;
                    }
                }
            }
            for mean in &mut mean {
                *mean /= count;
            }
            let mut square = [0f32; SIDE];
            for pixel in values.chunks_exact(pixel_len) {
                for row in pixel[block * TILE..][..TILE].chunks_exact(SIDE).take(images) {
                    for ((square, value), mean) in square.iter_mut().zip(row).zip(mean) {
                        let deviation = value - mean;
                        *square += deviation * deviation;
                    }
                }
            }
            means.copy_from_slice(&mean);
            squares.copy_from_slice(&square);
        }
    }
}

/// Joins the parts in order: for two sets with counts `a`, `b` and `δ = mean_b − mean_a`,
/// `mean = mean_a + δ·b/(a+b)`, `M2 = M2_a + M2_b + δ²·a·b/(a+b)` (Chan, Golub & LeVeque 1983,
/// Eq. 2.1), in f64.
///
/// # Panics
///
/// When `parts` has another length than the shape says.
pub fn merge(shape: Shape, parts: &[f32]) -> Moments {
    assert_eq!(parts.len(), moments_len(shape));
    let channels = shape.padded_channels();
    let mut all = Moments { count: 0, mean: vec![0.; channels], squares: vec![0.; channels] };
    for (part, moments) in parts.chunks_exact(2 * channels).enumerate() {
        let (group, pixels) = shape.part(part);
        let count = pixels.len() * shape.images_in(group);
        let total = (all.count + count) as f64;
        let share = count as f64 / total;
        let cross = all.count as f64 * share;
        let (mean, squares) = moments.split_at(channels);
        for channel in 0..channels {
            let difference = f64::from(mean[channel]) - all.mean[channel];
            all.mean[channel] += difference * share;
            all.squares[channel] += f64::from(squares[channel]) + difference * difference * cross;
        }
        all.count += count;
    }
    all
}

/// What the forward pass applies to each channel, padded channels 0, and the backward pass needs.
#[derive(Clone, Debug, Default)]
pub struct Normalisation {
    /// Mean that is taken off.
    pub mean: Vec<f32>,
    /// `1 / √(variance + ε)`.
    pub inverse_deviation: Vec<f32>,
    /// Whether mean and deviation came from the values themselves, so that gradients flow through
    /// them.
    pub batch: bool,
}

/// `output = relu((input − mean) · inverse_deviation · weight + bias + residual)`; ReLU and
/// residual as asked. `weight` and `bias` have one number per real channel.
///
/// # Panics
///
/// When a slice has another length than the shape says.
#[expect(clippy::too_many_arguments, reason = "the terms of one equation")]
pub fn forward(
    variant: Variant,
    shape: Shape,
    input: &[f32],
    n: &Normalisation,
    weight: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    relu: bool,
    output: &mut [f32],
) {
    assert_eq!(input.len(), shape.len());
    assert!(residual.is_none_or(|r| r.len() == shape.len()));
    let affine = Affine::new(shape, n, weight, bias);
    for_each_part(shape, output, |from, images, output| {
        let input = &input[from..from + output.len()];
        let residual = residual.map(|r| &r[from..from + output.len()]);
        apply(variant, Some(input), &affine, residual, relu, images, output);
    });
}

/// [`forward`] with the output in the place of the input.
///
/// # Panics
///
/// When a slice has another length than the shape says.
#[expect(clippy::too_many_arguments, reason = "the terms of one equation")]
pub fn forward_in_place(
    variant: Variant,
    shape: Shape,
    values: &mut [f32],
    n: &Normalisation,
    weight: &[f32],
    bias: &[f32],
    residual: Option<&[f32]>,
    relu: bool,
) {
    assert!(residual.is_none_or(|r| r.len() == shape.len()));
    let affine = Affine::new(shape, n, weight, bias);
    for_each_part(shape, values, |from, images, values| {
        let residual = residual.map(|r| &r[from..from + values.len()]);
        apply(variant, None, &affine, residual, relu, images, values);
    });
}

/// Calls `task(offset, images, tiles)` for every pixel of every group.
fn for_each_part(shape: Shape, values: &mut [f32], task: impl Fn(usize, usize, &mut [f32]) + Sync) {
    assert_eq!(values.len(), shape.len());
    let len = shape.pixel_len();
    let pixels = shape.pixels();
    parallel::for_each_chunk(values, len, 2 * shape.len(), |at, values| {
        task(at * len, shape.images_in(at / pixels), values);
    });
}

/// Mean, factor and shift of each padded channel: `y = (z − mean) · factor + shift`.
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
        let mut factor = vec![0.; channels];
        let mut shift = vec![0.; channels];
        for channel in 0..shape.channels {
            factor[channel] = weight[channel] * n.inverse_deviation[channel];
            shift[channel] = bias[channel];
        }
        Affine { mean: n.mean.clone(), factor, shift }
    }
}

for_each_variant! {
    /// `input` is `None` when the output holds it.
    fn apply(
        input: Option<&[f32]>,
        affine: &Affine,
        residual: Option<&[f32]>,
        relu: bool,
        images: usize,
        output: &mut [f32],
    ) {
        for (block, tile) in output.chunks_exact_mut(TILE).enumerate() {
            let mean = &affine.mean[block * SIDE..][..SIDE];
            let factor = &affine.factor[block * SIDE..][..SIDE];
            let shift = &affine.shift[block * SIDE..][..SIDE];
            for (image, row) in tile.chunks_exact_mut(SIDE).enumerate() {
                if image >= images {
                    row.fill(0.);
                    continue;
                }
                let at = block * TILE + image * SIDE;
                if let Some(input) = input {
                    row.copy_from_slice(&input[at..at + SIDE]);
                }
                for lane in 0..SIDE {
                    row[lane] = (row[lane] - mean[lane]) * factor[lane] + shift[lane];
                }
                if let Some(residual) = residual {
                    for (value, residual) in row.iter_mut().zip(&residual[at..at + SIDE]) {
                        *value += residual;
                    }
                }
                if relu {
                    for value in row.iter_mut() {
                        // Not `max`: a NaN must come through.
                        *value = if *value <= 0. { 0. } else { *value };
                    }
                }
            }
        }
    }
}

/// `output = max(input, 0)`; a NaN comes through.
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn relu_forward(variant: Variant, shape: Shape, input: &[f32], output: &mut [f32]) {
    assert_eq!(input.len(), shape.len());
    for_each_part(shape, output, |from, _, output| {
        rectify(variant, &input[from..from + output.len()], output);
    });
}

for_each_variant! {
    fn rectify(input: &[f32], output: &mut [f32]) {
        for (output, input) in output.iter_mut().zip(input) {
            *output = if *input <= 0. { 0. } else { *input };
        }
    }
}

/// Sets the gradient to zero where the ReLU's output is zero: `relu'(0) = 0`, as PyTorch has it.
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn relu_backward(variant: Variant, shape: Shape, output: &[f32], gradient: &mut [f32]) {
    assert_eq!(output.len(), shape.len());
    for_each_part(shape, gradient, |from, _, gradient| {
        mask(variant, &output[from..from + gradient.len()], gradient);
    });
}

for_each_variant! {
    fn mask(output: &[f32], gradient: &mut [f32]) {
        for (gradient, output) in gradient.iter_mut().zip(output) {
            *gradient = if *output <= 0. { 0. } else { *gradient };
        }
    }
}

/// `Σ g` and `Σ g · (z − mean)` of each padded channel, over all images and pixels.
#[derive(Clone, Debug, Default)]
pub struct GradientSums {
    /// `Σ g`.
    pub plain: Vec<f64>,
    /// `Σ g · (z − mean)`.
    pub centred: Vec<f64>,
}

/// Takes the sums that the backward pass needs; `scratch` holds [`moments_len`] numbers.
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn gradient_sums(
    variant: Variant,
    shape: Shape,
    gradient: &[f32],
    input: &[f32],
    n: &Normalisation,
    scratch: &mut [f32],
) -> GradientSums {
    assert_eq!(gradient.len(), shape.len());
    assert_eq!(input.len(), shape.len());
    assert_eq!(scratch.len(), moments_len(shape));
    let channels = shape.padded_channels();
    parallel::for_each_chunk(scratch, 2 * channels, 2 * shape.len(), |part, sums| {
        let (gradient, _) = pixels_of(shape, part, gradient);
        let (input, _) = pixels_of(shape, part, input);
        let (plain, centred) = sums.split_at_mut(channels);
        part_sums(variant, gradient, input, shape.pixel_len(), &n.mean, plain, centred);
    });
    let mut sums = GradientSums { plain: vec![0.; channels], centred: vec![0.; channels] };
    for part in scratch.chunks_exact(2 * channels) {
        let (plain, centred) = part.split_at(channels);
        for channel in 0..channels {
            sums.plain[channel] += f64::from(plain[channel]);
            sums.centred[channel] += f64::from(centred[channel]);
        }
    }
    sums
}

for_each_variant! {
    /// Rows beyond the last image have gradient zero and add nothing.
    fn part_sums(
        gradient: &[f32],
        input: &[f32],
        pixel_len: usize,
        mean: &[f32],
        plain: &mut [f32],
        centred: &mut [f32],
    ) {
        let blocks = plain.chunks_exact_mut(SIDE).zip(centred.chunks_exact_mut(SIDE));
        for (block, (plain, centred)) in blocks.enumerate() {
            let mean: &[f32; SIDE] = mean[block * SIDE..][..SIDE].try_into().expect("16 lanes");
            let mut sums = [0f32; SIDE];
            let mut centred_sums = [0f32; SIDE];
            let pixels = gradient.chunks_exact(pixel_len).zip(input.chunks_exact(pixel_len));
            for (gradient, input) in pixels {
                let gradient = gradient[block * TILE..][..TILE].chunks_exact(SIDE);
                let input = input[block * TILE..][..TILE].chunks_exact(SIDE);
                for (gradient, input) in gradient.zip(input) {
                    for lane in 0..SIDE {
                        sums[lane] += gradient[lane];
                        centred_sums[lane] += gradient[lane] * (input[lane] - mean[lane]);
                    }
                }
            }
            plain.copy_from_slice(&sums);
            centred.copy_from_slice(&centred_sums);
        }
    }
}

/// Adds the gradient of the weight: `Σ g·(z − mean)/deviation`.
pub fn weight_gradient(n: &Normalisation, sums: &GradientSums, gradient: &mut [f32]) {
    for (channel, gradient) in gradient.iter_mut().enumerate() {
        let inverse = f64::from(n.inverse_deviation[channel]);
        *gradient += (sums.centred[channel] * inverse) as f32;
    }
}

/// Adds the gradient of the bias: `Σ g`.
pub fn bias_gradient(sums: &GradientSums, gradient: &mut [f32]) {
    for (gradient, sum) in gradient.iter_mut().zip(&sums.plain) {
        *gradient += *sum as f32;
    }
}

/// Turns the gradient of the output into that of the input, in place.
///
/// With batch statistics over `M` values and `s = 1/deviation`:
/// `dz = w·s · (g − Σg/M − (z − mean)·s²·Σg(z − mean)/M)`; with running ones `dz = w·s · g`.
///
/// # Panics
///
/// When a slice has another length than the shape says.
pub fn input_gradient(
    variant: Variant,
    shape: Shape,
    input: &[f32],
    n: &Normalisation,
    weight: &[f32],
    sums: &GradientSums,
    gradient: &mut [f32],
) {
    let back = Back::new(shape, n, weight, sums);
    for_each_part(shape, gradient, |from, images, gradient| {
        let input = &input[from..from + gradient.len()];
        back_apply(variant, input, &n.mean, &back, images, gradient);
    });
}

/// `dz = factor · (g − plain − (z − mean) · slope)`.
struct Back {
    factor: Vec<f32>,
    plain: Vec<f32>,
    slope: Vec<f32>,
}

impl Back {
    fn new(shape: Shape, n: &Normalisation, weight: &[f32], sums: &GradientSums) -> Back {
        let channels = shape.padded_channels();
        let mut back = Back {
            factor: vec![0.; channels],
            plain: vec![0.; channels],
            slope: vec![0.; channels],
        };
        let count = shape.count() as f64;
        for (channel, weight) in weight.iter().enumerate() {
            let inverse = f64::from(n.inverse_deviation[channel]);
            back.factor[channel] = weight * n.inverse_deviation[channel];
            if n.batch {
                back.plain[channel] = (sums.plain[channel] / count) as f32;
                back.slope[channel] = (sums.centred[channel] * inverse * inverse / count) as f32;
            }
        }
        back
    }
}

for_each_variant! {
    fn back_apply(input: &[f32], mean: &[f32], back: &Back, images: usize, gradient: &mut [f32]) {
        let tiles = gradient.chunks_exact_mut(TILE).zip(input.chunks_exact(TILE));
        for (block, (gradient, input)) in tiles.enumerate() {
            let mean = &mean[block * SIDE..][..SIDE];
            let factor = &back.factor[block * SIDE..][..SIDE];
            let plain = &back.plain[block * SIDE..][..SIDE];
            let slope = &back.slope[block * SIDE..][..SIDE];
            let rows = gradient.chunks_exact_mut(SIDE).zip(input.chunks_exact(SIDE));
            for (image, (gradient, input)) in rows.enumerate() {
                if image >= images {
                    gradient.fill(0.);
                    continue;
                }
                for lane in 0..SIDE {
                    let centred = (input[lane] - mean[lane]) * slope[lane];
                    gradient[lane] = factor[lane] * (gradient[lane] - plain[lane] - centred);
                }
            }
        }
    }
}

/// `total += gradient`, for a value that several layers read.
///
/// # Panics
///
/// When the lengths differ.
pub fn add(variant: Variant, shape: Shape, gradient: &[f32], total: &mut [f32]) {
    assert_eq!(gradient.len(), shape.len());
    for_each_part(shape, total, |from, _, total| {
        add_tiles(variant, &gradient[from..from + total.len()], total);
    });
}

for_each_variant! {
    fn add_tiles(values: &[f32], total: &mut [f32]) {
        for (total, value) in total.iter_mut().zip(values) {
            *total += value;
        }
    }
}
