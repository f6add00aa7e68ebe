//! Index tables: which pixel lies under which window.
//!
//! A table is for one image; every image of a batch is gathered by the same one. Where there is no
//! pixel it holds [`NOWHERE`], for which candle's `index_select` gives zeros on every device.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Tensor};
use kernels::convolution::Geometry;
use kernels::pooling;

/// Marks a tap beyond the border.
const NOWHERE: u32 = u32::MAX;

/// Tables by the windows and the kind.
type Tables = HashMap<(Windows, IndexTable), Arc<[Tensor]>>;

/// The index tables on one device, each created when it is first needed.
pub(crate) struct IndexTables {
    device: Device,
    tables: Mutex<Tables>,
}

impl IndexTables {
    pub fn on(device: &Device) -> IndexTables {
        IndexTables { device: device.clone(), tables: Mutex::default() }
    }

    pub(super) fn get(&self, windows: Windows, table: IndexTable) -> Result<Arc<[Tensor]>> {
        let lock = || self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&(windows, table)) {
            return Ok(Arc::clone(known));
        }
        let made: Arc<[Tensor]> = windows.tensors(table, &self.device)?.into();
        lock().insert((windows, table), Arc::clone(&made));
        Ok(made)
    }
}

/// Square windows over a map, of a convolution or a pool.
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

/// A kind of index table. A tap is one pixel of a window, counted row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum IndexTable {
    /// One table (window, tap): the pixel under the tap.
    PixelOfWindow,
    /// One table (pixel, tap): the window whose tap lies on the pixel.
    WindowOfPixel,
    /// One table for each window that can cover a pixel, by pixel: `window · taps + tap`.
    TapsOfPixel,
    /// The same as pairs of tables: the window, and its tap as u8.
    WindowsAndTapsOfPixel,
    /// One table for each tap, by window: the pixel under the tap, or beyond the border the first
    /// pixel of the window.
    PixelOfTap,
    /// Two tables of u8: by window, the first tap inside the border; all taps.
    FirstTapOfWindow,
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

    pub fn of_pool(w: &pooling::Window) -> Windows {
        Windows {
            input: [w.input.height, w.input.width],
            output: [w.output.height, w.output.width],
            kernel: w.kernel,
            stride: w.stride,
            padding: w.padding,
        }
    }

    /// Whether window `i` is pixel `i`.
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

    /// The pixel under a tap of a window, if it lies inside the border.
    fn pixel(&self, window: usize, tap: usize) -> Option<usize> {
        let side = |at: usize, tap: usize, limit: usize| {
            (at * self.stride + tap).checked_sub(self.padding).filter(|pixel| *pixel < limit)
        };
        let y = side(window / self.output[1], tap / self.kernel, self.input[0])?;
        let x = side(window % self.output[1], tap % self.kernel, self.input[1])?;
        Some(y * self.input[1] + x)
    }

    /// Every (window, tap, pixel) where the tap lies on the pixel.
    fn triples(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..self.count()).flat_map(move |window| {
            (0..self.taps())
                .filter_map(move |tap| self.pixel(window, tap).map(|pixel| (window, tap, pixel)))
        })
    }

    pub fn tensors(&self, table: IndexTable, device: &Device) -> Result<Vec<Tensor>> {
        let tensor = |table: Vec<u32>| {
            let len = table.len();
            Tensor::from_vec(table, len, device)
        };
        match table {
            IndexTable::PixelOfWindow => Ok(vec![tensor(self.pixel_of_window())?]),
            IndexTable::WindowOfPixel => Ok(vec![tensor(self.window_of_pixel())?]),
            IndexTable::TapsOfPixel => self.taps_of_pixel().into_iter().map(tensor).collect(),
            IndexTable::PixelOfTap => {
                (0..self.taps()).map(|tap| tensor(self.pixel_of_tap(tap))).collect()
            }
            IndexTable::FirstTapOfWindow => {
                let taps: Vec<u8> = (0..self.count()).map(|at| self.first_tap(at) as u8).collect();
                let first = Tensor::from_vec(taps, (1, self.count(), 1), device)?;
                let all: Vec<u8> = (0..self.taps()).map(|tap| tap as u8).collect();
                Ok(vec![first, Tensor::from_vec(all, self.taps(), device)?])
            }
            IndexTable::WindowsAndTapsOfPixel => {
                let taps = self.taps() as u32;
                let mut pairs = Vec::new();
                for table in self.taps_of_pixel() {
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

    fn pixel_of_window(&self) -> Vec<u32> {
        let mut table = vec![NOWHERE; self.count() * self.taps()];
        for (window, tap, pixel) in self.triples() {
            table[window * self.taps() + tap] = pixel as u32;
        }
        table
    }

    fn window_of_pixel(&self) -> Vec<u32> {
        let mut table = vec![NOWHERE; self.pixels() * self.taps()];
        for (window, tap, pixel) in self.triples() {
            table[pixel * self.taps() + tap] = window as u32;
        }
        table
    }

    fn taps_of_pixel(&self) -> Vec<Vec<u32>> {
        let mut found = vec![0; self.pixels()];
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for (window, tap, pixel) in self.triples() {
            if found[pixel] == tables.len() {
                tables.push(vec![NOWHERE; self.pixels()]);
            }
            tables[found[pixel]][pixel] = (window * self.taps() + tap) as u32;
            found[pixel] += 1;
        }
        tables
    }

    fn pixel_of_tap(&self, tap: usize) -> Vec<u32> {
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
        assert_eq!(
            WINDOWS.pixel_of_window(),
            [N, N, N, N, 0, 1, N, 2, 3, N, 2, 3, N, 4, 5, N, N, N]
        );
        let windows = WINDOWS.window_of_pixel();
        assert_eq!(windows[..9], [N, N, N, N, 0, N, N, N, N]);
        assert_eq!(windows[18..27], [N, 1, N, N, N, N, N, 0, N]);
        // The pixels of the middle row lie under both windows.
        assert_eq!(WINDOWS.taps_of_pixel(), [[4, 5, 7, 8, 13, 14], [N, N, 10, 11, N, N]]);
        assert_eq!(WINDOWS.pixel_of_tap(4), [0, 4]);
        assert_eq!(WINDOWS.pixel_of_tap(0), [0, 2]);
        assert_eq!(WINDOWS.pixel_of_tap(8), [3, 2]);
        assert_eq!([0, 1].map(|at| WINDOWS.first_tap(at)), [4, 1]);
    }
}
