//! Which pixel meets which window: the tables by which maps are gathered.
//!
//! A table is for one image; every image of a batch is gathered by the same one. Where there is no
//! pixel it holds [`NOWHERE`], for which candle's `index_select` gives zeros on every device.

use candle_core::{Device, Result, Tensor};
use kernels::convolution::Geometry;
use kernels::pooling::Window;

/// No pixel.
const NOWHERE: u32 = u32::MAX;

/// Square windows over a map, as a convolution or a pool has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Windows {
    /// Rows and columns of the map.
    input: [usize; 2],
    /// Rows and columns of windows.
    output: [usize; 2],
    kernel: usize,
    stride: usize,
    padding: usize,
}

/// What a table tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Part {
    /// One table: for each window and tap, the pixel below.
    Seen,
    /// One table: for each pixel and tap, the window that meets the pixel with that tap.
    Seeing,
    /// As many tables as windows cover a pixel: for each pixel, window · taps + tap of the first
    /// one, the second one, and so on.
    Covers,
    /// The same as pairs of tables: the window, and its tap as u8.
    PoolCovers,
    /// One table for each tap: the pixel below it in each window; beyond the border, the first one
    /// that the window has.
    Inside,
    /// Two tables of u8: for each window, the first tap that is not beyond the border; all taps.
    FirstTaps,
}

impl Windows {
    pub fn of_convolution(g: &Geometry) -> Windows {
        Windows {
            input: [g.input.height, g.input.width],
            output: [g.output.height, g.output.width],
            kernel: g.kernel,
            stride: g.stride,
            padding: g.padding,
        }
    }

    pub fn of_pool(w: &Window) -> Windows {
        Windows {
            input: [w.input.height, w.input.width],
            output: [w.output.height, w.output.width],
            kernel: w.kernel,
            stride: w.stride,
            padding: w.padding,
        }
    }

    /// Whether each window is the pixel of its own number.
    pub fn are_pixels(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.padding == 0
    }

    pub fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    fn count(&self) -> usize {
        self.output[0] * self.output[1]
    }

    fn pixels(&self) -> usize {
        self.input[0] * self.input[1]
    }

    /// The pixel below a tap of a window.
    fn pixel(&self, window: usize, tap: usize) -> Option<usize> {
        let side = |at: usize, tap: usize, limit: usize| {
            (at * self.stride + tap).checked_sub(self.padding).filter(|pixel| *pixel < limit)
        };
        let y = side(window / self.output[1], tap / self.kernel, self.input[0])?;
        let x = side(window % self.output[1], tap % self.kernel, self.input[1])?;
        Some(y * self.input[1] + x)
    }

    /// All meetings of a window's tap with a pixel.
    fn meetings(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..self.count()).flat_map(move |window| {
            (0..self.taps())
                .filter_map(move |tap| self.pixel(window, tap).map(|pixel| (window, tap, pixel)))
        })
    }

    pub fn tensors(&self, part: Part, device: &Device) -> Result<Vec<Tensor>> {
        let tensor = |table: Vec<u32>| {
            let len = table.len();
            Tensor::from_vec(table, len, device)
        };
        match part {
            Part::Seen => Ok(vec![tensor(self.seen())?]),
            Part::Seeing => Ok(vec![tensor(self.seeing())?]),
            Part::Covers => self.covers().into_iter().map(tensor).collect(),
            Part::Inside => (0..self.taps()).map(|tap| tensor(self.inside(tap))).collect(),
            Part::FirstTaps => {
                let taps: Vec<u8> = (0..self.count()).map(|at| self.first_tap(at) as u8).collect();
                let first = Tensor::from_vec(taps, (1, self.count(), 1), device)?;
                let all: Vec<u8> = (0..self.taps()).map(|tap| tap as u8).collect();
                Ok(vec![first, Tensor::from_vec(all, self.taps(), device)?])
            }
            Part::PoolCovers => {
                let taps = self.taps() as u32;
                let mut pairs = Vec::new();
                for table in self.covers() {
                    let there = |at: &u32| *at != NOWHERE;
                    let tap = |at: &u32| if there(at) { (at % taps) as u8 } else { 0 };
                    let window = |at: &u32| if there(at) { at / taps } else { NOWHERE };
                    let of_taps: Vec<u8> = table.iter().map(tap).collect();
                    pairs.push(tensor(table.iter().map(window).collect())?);
                    pairs.push(Tensor::from_vec(of_taps, (1, self.pixels(), 1), device)?);
                }
                Ok(pairs)
            }
        }
    }

    fn seen(&self) -> Vec<u32> {
        let mut table = vec![NOWHERE; self.count() * self.taps()];
        for (window, tap, pixel) in self.meetings() {
            table[window * self.taps() + tap] = pixel as u32;
        }
        table
    }

    fn seeing(&self) -> Vec<u32> {
        let mut table = vec![NOWHERE; self.pixels() * self.taps()];
        for (window, tap, pixel) in self.meetings() {
            table[pixel * self.taps() + tap] = window as u32;
        }
        table
    }

    fn covers(&self) -> Vec<Vec<u32>> {
        let mut found = vec![0; self.pixels()];
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for (window, tap, pixel) in self.meetings() {
            if found[pixel] == tables.len() {
                tables.push(vec![NOWHERE; self.pixels()]);
            }
            tables[found[pixel]][pixel] = (window * self.taps() + tap) as u32;
            found[pixel] += 1;
        }
        tables
    }

    fn inside(&self, tap: usize) -> Vec<u32> {
        let first = |window| self.pixel(window, self.first_tap(window));
        (0..self.count())
            .map(|window| {
                let pixel = self.pixel(window, tap).or_else(|| first(window));
                pixel.expect("padding is at most half the window") as u32
            })
            .collect()
    }

    fn first_tap(&self, window: usize) -> usize {
        let inside = (0..self.taps()).find(|tap| self.pixel(window, *tap).is_some());
        inside.expect("padding is at most half the window")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 × 2 pixels under windows of 3 × 3 with stride 2 and padding 1: 2 × 1 of them.
    const WINDOWS: Windows =
        Windows { input: [3, 2], output: [2, 1], kernel: 3, stride: 2, padding: 1 };

    #[test]
    fn tables_of_a_map_that_is_not_square_match_a_drawing() {
        const N: u32 = NOWHERE;
        assert_eq!(WINDOWS.seen(), [N, N, N, N, 0, 1, N, 2, 3, N, 2, 3, N, 4, 5, N, N, N]);
        let seeing = WINDOWS.seeing();
        assert_eq!(seeing[..9], [N, N, N, N, 0, N, N, N, N]);
        assert_eq!(seeing[18..27], [N, 1, N, N, N, N, N, 0, N]);
        // Pixels of the middle row lie below both windows.
        assert_eq!(WINDOWS.covers(), [[4, 5, 7, 8, 13, 14], [N, N, 10, 11, N, N]]);
        assert_eq!(WINDOWS.inside(4), [0, 4]);
        assert_eq!(WINDOWS.inside(0), [0, 2]);
        assert_eq!(WINDOWS.inside(8), [3, 2]);
        assert_eq!([0, 1].map(|at| WINDOWS.first_tap(at)), [4, 1]);
    }
}
