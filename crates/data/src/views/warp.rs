//! Moving pixels: affine maps and smooth displacements, sampled once.

use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::views::Operation;
use crate::views::canvas::Canvas;
use crate::views::draw::uniform;

/// Memory that is used again for the next picture.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    warps: Vec<Warp>,
    /// Where each pixel of the result comes from, in pixels.
    places: Vec<[f32; 2]>,
    /// The plane that is sampled, with a border of zeros.
    bordered: Vec<f32>,
}

/// A map from the places of a result to the places of what it is made from, both in half-widths and
/// half-heights from the middle, as `(across, down)`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Warp {
    /// `place ↦ matrix · place + shift`.
    Affine { matrix: [[f64; 2]; 2], shift: [f64; 2] },
    /// `place ↦ place + surface(place)`: displacements `(across, down)` at `grid × grid` points, by
    /// row, whose cells tile the picture.
    Elastic { grid: usize, displacements: Vec<[f32; 2]> },
}

/// Draws what the operations need, in their order, and writes the warped `canvas` to `out`.
///
/// The result at a place is the first operation's input at the place that the last operation, then
/// the one before it, and so on to the first, send it to. Between pixels values are bilinear, and 0
/// outside: `grid_sample` of PyTorch with zeros and without aligned corners.
pub(super) fn apply<'a>(
    operations: impl Iterator<Item = &'a Operation>,
    canvas: &Canvas,
    out: &mut Canvas,
    buffers: &mut Buffers,
    rng: &mut ChaCha8Rng,
) {
    let (height, width) = (canvas.height, canvas.width);
    buffers.warps.clear();
    buffers.warps.extend(operations.filter_map(|operation| draw(operation, height, width, rng)));
    warp(canvas, out, buffers);
}

fn draw(operation: &Operation, height: usize, width: usize, rng: &mut ChaCha8Rng) -> Option<Warp> {
    match *operation {
        Operation::Affine { degrees, log_scale, log_aspect, shear, shift } => {
            let mut either_way = |most: f64| uniform(rng, -most, most);
            let (sin, cos) = either_way(degrees).to_radians().sin_cos();
            let scale = either_way(log_scale);
            let aspect = either_way(log_aspect) / 2.;
            let (across, down) = ((scale + aspect).exp(), (scale - aspect).exp());
            let shear = either_way(shear);
            let shift = [either_way(shift), either_way(shift)];
            // Rotation · shear · scale in pixels; half-widths and half-heights turn into each other
            // by the picture's aspect, so that a circle in a long picture stays one.
            let (h, w) = (height as f64, width as f64);
            let matrix = [
                [cos * across, (cos * shear - sin) * down * h / w],
                [sin * across * w / h, (sin * shear + cos) * down],
            ];
            Some(Warp::Affine { matrix, shift })
        }
        Operation::Elastic { grid, deviation } => {
            let mut normal = || -> f32 {
                let normal: f32 = StandardNormal.sample(rng);
                deviation as f32 * normal
            };
            let displacements = (0..grid * grid).map(|_| [normal(), normal()]).collect();
            Some(Warp::Elastic { grid, displacements })
        }
        _ => None,
    }
}

/// Writes the canvas, warped by `buffers.warps`, to `out`.
pub(super) fn warp(canvas: &Canvas, out: &mut Canvas, buffers: &mut Buffers) {
    let (height, width) = (canvas.height, canvas.width);
    let Buffers { warps, places, bordered } = buffers;
    let half = |pixel: usize, side: usize| (2 * pixel + 1) as f32 / side as f32 - 1.;
    places.clear();
    places.extend(
        (0..height).flat_map(|y| (0..width).map(move |x| [half(x, width), half(y, height)])),
    );
    for warp in warps.iter().rev() {
        warp.send(places);
    }
    let to_pixel = |place: f32, side: usize| ((place + 1.) * side as f32 - 1.) / 2.;
    for [x, y] in places.iter_mut() {
        (*x, *y) = (to_pixel(*x, width), to_pixel(*y, height));
    }
    out.reshape(height, width, canvas.channels);
    for (plane, out) in canvas.planes().zip(out.planes_mut()) {
        add_border(plane, height, width, bordered);
        sample(bordered, height, width, places, out);
    }
}

impl Warp {
    fn send(&self, places: &mut [[f32; 2]]) {
        match self {
            Self::Affine { matrix, shift } => {
                let [[a, b], [c, d]] = matrix.map(|row| row.map(|value| value as f32));
                let [e, f] = shift.map(|value| value as f32);
                for [x, y] in places {
                    (*x, *y) = (a * *x + b * *y + e, c * *x + d * *y + f);
                }
            }
            Self::Elastic { grid, displacements } => {
                for place in places {
                    let [across, down] = surface(*grid, displacements, *place);
                    *place = [place[0] + across, place[1] + down];
                }
            }
        }
    }
}

/// The bicubic surface over the grid at a place, with the outermost points repeated beyond the edge:
/// what PyTorch's `interpolate(mode="bicubic")` gives at the places of pixels.
fn surface(grid: usize, displacements: &[[f32; 2]], [x, y]: [f32; 2]) -> [f32; 2] {
    let last = grid as isize - 1;
    let axis = |place: f32| {
        let position = ((place + 1.) * grid as f32 - 1.) / 2.;
        let first = position.floor();
        let points = [-1, 0, 1, 2].map(|k| (first as isize + k).clamp(0, last) as usize);
        (points, cubic(position - first))
    };
    let ((columns, across), (rows, down)) = (axis(x), axis(y));
    let mut sum = [0f32; 2];
    for (row, down) in rows.into_iter().zip(down) {
        for (column, across) in columns.into_iter().zip(across) {
            let [dx, dy] = displacements[row * grid + column];
            let weight = down * across;
            sum[0] += weight * dx;
            sum[1] += weight * dy;
        }
    }
    sum
}

/// Weights of the four points around, `t` behind the second: cubic convolution with a = −0.75.
fn cubic(t: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.) * x - (A + 3.)) * x * x + 1.;
    let far = |x: f32| ((A * x - 5. * A) * x + 8. * A) * x - 4. * A;
    [far(t + 1.), near(t), near(1. - t), far(2. - t)]
}

/// Copies a plane into the middle of zeros: one row and column before, two behind.
fn add_border(plane: &[f32], height: usize, width: usize, bordered: &mut Vec<f32>) {
    bordered.clear();
    bordered.resize((height + 3) * (width + 3), 0.);
    for (y, row) in plane.chunks_exact(width).enumerate() {
        bordered[(y + 1) * (width + 3) + 1..][..width].copy_from_slice(row);
    }
}

/// Bilinear values of a bordered plane at places in pixels.
fn sample(bordered: &[f32], height: usize, width: usize, places: &[[f32; 2]], out: &mut [f32]) {
    let stride = width + 3;
    for (out, &[x, y]) in out.iter_mut().zip(places) {
        // From −1 and from the side on there are only zeros to mix.
        let (x, y) = (x.clamp(-1., width as f32) + 1., y.clamp(-1., height as f32) + 1.);
        let (column, row) = (x as usize, y as usize);
        let (right, below) = (x - column as f32, y - row as f32);
        let at = row * stride + column;
        let upper = bordered[at] * (1. - right) + bordered[at + 1] * right;
        let lower = bordered[at + stride] * (1. - right) + bordered[at + stride + 1] * right;
        *out = upper * (1. - below) + lower * below;
    }
}
