//! Warps: affine maps and smooth displacements, sampled once.

use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::views::Operation;
use crate::views::canvas::Canvas;
use crate::views::draw::uniform;

/// Buffers that are reused from picture to picture.
#[derive(Debug, Default)]
pub(super) struct WarpBuffers {
    warps: Vec<Warp>,
    /// The positions of rows and columns of pixels, in half-heights and half-widths.
    rows: Vec<f32>,
    columns: Vec<f32>,
    /// The position that each pixel of the result is sampled at, in pixels.
    places: Vec<[f32; 2]>,
    /// The plane that is sampled, with a border of zeros.
    bordered: Vec<f32>,
}

/// A map from positions in the result to positions in the source, both in half-widths and half-heights
/// from the middle, as `(across, down)`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Warp {
    /// `place ↦ matrix · place + shift`.
    Affine { matrix: [[f64; 2]; 2], shift: [f64; 2] },
    /// `place ↦ place + surface(place)`: displacements `(across, down)` at `grid × grid` points, by
    /// row, whose cells tile the picture.
    Elastic { grid: usize, displacements: Vec<[f32; 2]> },
}

/// Draws the parameters of the operations, in their order, and writes the warped `canvas` to `out`.
///
/// A position of the result passes through the maps of all operations, from the last to the first; the
/// canvas is sampled where it ends. Sampling is bilinear, and 0 outside: PyTorch's `grid_sample` with
/// zeros and without aligned corners.
pub(super) fn apply<'a>(
    operations: impl Iterator<Item = &'a Operation>,
    canvas: &Canvas,
    out: &mut Canvas,
    buffers: &mut WarpBuffers,
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
            // Rotation · shear · scale in pixels. The aspect of the picture converts between half-widths
            // and half-heights, so that a circle in a long picture stays a circle.
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
pub(super) fn warp(canvas: &Canvas, out: &mut Canvas, buffers: &mut WarpBuffers) {
    let (height, width) = (canvas.height, canvas.width);
    let WarpBuffers { warps, rows, columns, places, bordered } = buffers;
    let half = |pixel: usize, side: usize| (2 * pixel + 1) as f32 / side as f32 - 1.;
    columns.clear();
    columns.extend((0..width).map(|x| half(x, width)));
    rows.clear();
    rows.extend((0..height).map(|y| half(y, height)));
    places.clear();
    places.extend(rows.iter().flat_map(|&y| columns.iter().map(move |&x| [x, y])));
    let mut remaining = warps.as_slice();
    if let Some((Warp::Elastic { grid, displacements }, before)) = remaining.split_last() {
        displace_pixels(*grid, displacements, rows, columns, places);
        remaining = before;
    }
    for warp in remaining.iter().rev() {
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

/// Evaluates the bicubic surface over the grid at a position, with the outermost points repeated beyond
/// the edge: PyTorch's `interpolate(mode="bicubic")`.
fn surface(grid: usize, displacements: &[[f32; 2]], [x, y]: [f32; 2]) -> [f32; 2] {
    let ((columns, across), (rows, down)) = (points(grid, x), points(grid, y));
    mix(rows.map(|row| mix(columns.map(|column| displacements[row * grid + column]), across)), down)
}

/// Adds the surface to the positions of all pixels. Pixels of a column share their weights, and those of
/// a row the points between the rows of the grid.
fn displace_pixels(
    grid: usize,
    displacements: &[[f32; 2]],
    rows: &[f32],
    columns: &[f32],
    places: &mut [[f32; 2]],
) {
    let columns: Vec<_> = columns.iter().map(|&x| points(grid, x)).collect();
    let mut line = vec![[0f32; 2]; grid];
    for (&y, places) in rows.iter().zip(places.chunks_exact_mut(columns.len())) {
        let (rows, down) = points(grid, y);
        for (column, line) in line.iter_mut().enumerate() {
            *line = mix(rows.map(|row| displacements[row * grid + column]), down);
        }
        for (place, (points, across)) in places.iter_mut().zip(&columns) {
            let [dx, dy] = mix(points.map(|point| line[point]), *across);
            *place = [place[0] + dx, place[1] + dy];
        }
    }
}

/// The four points of a grid around a position along one side, and their weights.
fn points(grid: usize, place: f32) -> ([usize; 4], [f32; 4]) {
    let last = grid as isize - 1;
    let position = ((place + 1.) * grid as f32 - 1.) / 2.;
    let first = position.floor();
    let points = [-1, 0, 1, 2].map(|k| (first as isize + k).clamp(0, last) as usize);
    (points, cubic(position - first))
}

fn mix(displacements: [[f32; 2]; 4], weights: [f32; 4]) -> [f32; 2] {
    let mut sum = [0f32; 2];
    for ([dx, dy], weight) in displacements.into_iter().zip(weights) {
        sum = [sum[0] + weight * dx, sum[1] + weight * dy];
    }
    sum
}

/// Weights of the four points around a position `t` after the second: cubic convolution with a = −0.75.
fn cubic(t: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.) * x - (A + 3.)) * x * x + 1.;
    let far = |x: f32| ((A * x - 5. * A) * x + 8. * A) * x - 4. * A;
    [far(t + 1.), near(t), near(1. - t), far(2. - t)]
}

/// Copies a plane into a border of zeros: one row and column before it, two after.
fn add_border(plane: &[f32], height: usize, width: usize, bordered: &mut Vec<f32>) {
    bordered.clear();
    bordered.resize((height + 3) * (width + 3), 0.);
    for (y, row) in plane.chunks_exact(width).enumerate() {
        bordered[(y + 1) * (width + 3) + 1..][..width].copy_from_slice(row);
    }
}

/// Samples a bordered plane bilinearly at positions in pixels.
fn sample(bordered: &[f32], height: usize, width: usize, places: &[[f32; 2]], out: &mut [f32]) {
    let stride = width + 3;
    for (out, &[x, y]) in out.iter_mut().zip(places) {
        // Beyond −1 and beyond the side, all values are 0.
        let (x, y) = (x.clamp(-1., width as f32) + 1., y.clamp(-1., height as f32) + 1.);
        let (column, row) = (x as usize, y as usize);
        let (right, below) = (x - column as f32, y - row as f32);
        let at = row * stride + column;
        let upper = bordered[at] * (1. - right) + bordered[at + 1] * right;
        let lower = bordered[at + stride] * (1. - right) + bordered[at + stride + 1] * right;
        *out = upper * (1. - below) + lower * below;
    }
}

#[cfg(test)]
mod tests {
    use stage::random::stream;

    use super::*;
    use crate::picture::tests::example;

    const HEIGHT: usize = 6;
    const WIDTH: usize = 10;

    fn canvas() -> Canvas {
        let mut canvas = Canvas::default();
        canvas.load(&example(HEIGHT, WIDTH, 3));
        canvas
    }

    fn warped(warps: Vec<Warp>) -> Canvas {
        let mut out = Canvas::default();
        warp(&canvas(), &mut out, &mut WarpBuffers { warps, ..WarpBuffers::default() });
        out
    }

    fn shift(across: f64, down: f64) -> Warp {
        Warp::Affine { matrix: [[1., 0.], [0., 1.]], shift: [across, down] }
    }

    #[test]
    fn whole_shifts_move_pixels_and_bring_in_zeros() {
        let canvas = canvas();
        // Two pixels across of ten are 0.4 half-widths, one down of six is a third half-height.
        for (across, down) in [(2isize, 1isize), (-3, 0), (0, -2), (20, 20), (0, 0)] {
            let got = warped(vec![shift(across as f64 * 0.2, down as f64 / 3.)]);
            for (plane, want) in got.planes().zip(canvas.planes()) {
                for (i, value) in plane.iter().enumerate() {
                    let from = |at: usize, by: isize, side: usize| {
                        at.checked_add_signed(by).filter(|&at| at < side)
                    };
                    let (y, x) = (from(i / WIDTH, down, HEIGHT), from(i % WIDTH, across, WIDTH));
                    let want = y.zip(x).map_or(0., |(y, x)| want[y * WIDTH + x]);
                    assert!((value - want).abs() < 1e-5, "{across}, {down}: {value}, {want}");
                }
            }
        }
    }

    #[test]
    fn half_shifts_mix_neighbours_and_zeros() {
        let got = warped(vec![shift(0.1, 0.)]);
        let want = &canvas().values;
        assert!((got.values[3] - (want[3] + want[4]) / 2.).abs() < 1e-6);
        assert!((got.values[WIDTH - 1] - want[WIDTH - 1] / 2.).abs() < 1e-6);
    }

    #[test]
    fn an_angle_is_an_angle_in_pixels_even_in_a_long_picture() {
        // Largest angle alone: the drawn matrix turns pixel offsets without stretching them.
        let only =
            Operation::Affine { degrees: 90., log_scale: 0., log_aspect: 0., shear: 0., shift: 0. };
        let mut rng = stream(2, "warp", &[]);
        let mut angles = Vec::new();
        for _ in 0..200 {
            let Some(Warp::Affine { matrix: [[a, b], [c, d]], shift }) =
                draw(&only, HEIGHT, WIDTH, &mut rng)
            else {
                panic!("an affine warp")
            };
            assert_eq!(shift, [0., 0.]);
            // From half-widths and half-heights to pixels.
            let aspect = WIDTH as f64 / HEIGHT as f64;
            let (b, c) = (b * aspect, c / aspect);
            assert!((a - d).abs() < 1e-12 && (b + c).abs() < 1e-12);
            assert!((a * a + c * c - 1.).abs() < 1e-12);
            angles.push(c.atan2(a).to_degrees());
        }
        let (least, most) =
            (angles.iter().copied().fold(0., f64::min), angles.iter().copied().fold(0., f64::max));
        assert!((-90. ..-80.).contains(&least) && (80. ..90.).contains(&most), "{least}, {most}");
    }

    #[test]
    fn drawn_maps_have_the_scale_aspect_and_shift_asked_for() {
        let operation = Operation::Affine {
            degrees: 0.,
            log_scale: 0.15,
            log_aspect: 0.1,
            shear: 0.,
            shift: 0.2,
        };
        let mut rng = stream(2, "warp", &[]);
        let mut most = [0f64; 3];
        for _ in 0..500 {
            let Some(Warp::Affine { matrix: [[a, b], [c, d]], shift }) =
                draw(&operation, HEIGHT, WIDTH, &mut rng)
            else {
                panic!("an affine warp")
            };
            assert_eq!((b, c), (0., 0.));
            let found = [(a * d).ln() / 2., (a / d).ln(), shift[0].abs().max(shift[1].abs())];
            for (most, found) in most.iter_mut().zip(found) {
                *most = most.max(found.abs());
            }
        }
        for (most, limit) in most.into_iter().zip([0.15, 0.1, 0.2]) {
            assert!((0.95 * limit..=limit + 1e-12).contains(&most), "{most} of {limit}");
        }
    }

    #[test]
    fn the_surface_is_pytorchs_bicubic_interpolation() {
        // By hand: at t = ½ Keys' weights with a = −0.75 are −3/32, 19/32, 19/32, −3/32.
        let weights = cubic(0.5);
        for (got, want) in weights.into_iter().zip([-0.09375, 0.59375, 0.59375, -0.09375]) {
            assert!((got - want).abs() < 1e-6, "{got}, {want}");
        }
        let grid: Vec<[f32; 2]> = (0..16).map(|i| [(i * i) as f32, 100. - 7. * i as f32]).collect();
        // The middle of each cell is its grid point.
        for (i, want) in grid.iter().enumerate() {
            let place = [(i % 4) as f32, (i / 4) as f32].map(|cell| (2. * cell + 1.) / 4. - 1.);
            let got = surface(4, &grid, place);
            assert!((got[0] - want[0]).abs() < 1e-3 && (got[1] - want[1]).abs() < 1e-3);
        }
        // Between the first two points of the first row, the edge is repeated to the left.
        let got = surface(4, &grid, [-0.5, -0.75]);
        let want =
            -0.09375 * grid[0][0] + 0.59375 * (grid[0][0] + grid[1][0]) - 0.09375 * grid[2][0];
        assert!((got[0] - want).abs() < 1e-4, "{got:?}, {want}");
        // Beyond the corner nothing changes any more.
        let got = surface(4, &grid, [9., 9.]);
        assert!((got[0] - grid[15][0]).abs() < 1e-3 && (got[1] - grid[15][1]).abs() < 1e-3);
    }

    #[test]
    fn warps_are_composed_from_the_last_to_the_first() {
        // Mirroring and then moving by two pixels is not moving and then mirroring.
        let mirror = || Warp::Affine { matrix: [[-1., 0.], [0., 1.]], shift: [0., 0.] };
        let canvas = canvas();
        let first = &canvas.values[..WIDTH];
        let got = warped(vec![mirror(), shift(0.4, 0.)]);
        assert!((got.values[0] - first[WIDTH - 3]).abs() < 1e-5);
        let got = warped(vec![shift(0.4, 0.), mirror()]);
        assert!((got.values[0] - 0.).abs() < 1e-5);
        assert!((got.values[WIDTH - 1] - first[2]).abs() < 1e-5);
    }

    #[test]
    fn elastic_and_affine_sample_once_where_both_send_a_pixel() {
        let affine = Warp::Affine { matrix: [[0.9, 0.2], [-0.1, 1.1]], shift: [0.05, -0.1] };
        let displacements: Vec<[f32; 2]> =
            (0..9).map(|i| [0.02 * i as f32, 0.1 - 0.03 * i as f32]).collect();
        let got =
            warped(vec![affine, Warp::Elastic { grid: 3, displacements: displacements.clone() }]);
        let plane = &canvas().values[..HEIGHT * WIDTH];
        let value = |y: isize, x: isize| {
            let inside = (0..HEIGHT as isize).contains(&y) && (0..WIDTH as isize).contains(&x);
            if inside { plane[y as usize * WIDTH + x as usize] } else { 0. }
        };
        for (y, x) in [(0, 0), (2, 7), (5, 9), (3, 0)] {
            let place =
                [(2 * x + 1) as f32 / WIDTH as f32 - 1., (2 * y + 1) as f32 / HEIGHT as f32 - 1.];
            let moved = surface(3, &displacements, place);
            let (u, v) = (place[0] + moved[0], place[1] + moved[1]);
            let (u, v) = (0.9 * u + 0.2 * v + 0.05, -0.1 * u + 1.1 * v - 0.1);
            let (column, row) =
                (((u + 1.) * WIDTH as f32 - 1.) / 2., ((v + 1.) * HEIGHT as f32 - 1.) / 2.);
            let (right, below) = (column - column.floor(), row - row.floor());
            let (left, top) = (column.floor() as isize, row.floor() as isize);
            let want = value(top, left) * (1. - right) * (1. - below)
                + value(top, left + 1) * right * (1. - below)
                + value(top + 1, left) * (1. - right) * below
                + value(top + 1, left + 1) * right * below;
            let got = got.values[y * WIDTH + x];
            assert!((got - want).abs() < 1e-5, "{y}, {x}: {got}, {want}");
        }
    }
}
