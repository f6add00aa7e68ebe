//! Weights as the tile products want them.

use super::{Geometry, columns_of, panel_len};
use crate::layout::{SIDE, TILE};
use crate::number::{Number, by_precision};
use crate::{Buffer, parallel};

/// Arranges weights `(O, I, K, K)` for [`super::forward`]: tiles of 16 input × 16 output channels,
/// in the order (pair of output blocks, tap, input block, output block of the pair).
///
/// # Panics
///
/// When a slice has another length than the geometry says.
pub fn pack_forward(g: &Geometry, weights: &[f32], packed: &mut Buffer) {
    assert_eq!(weights.len(), g.weights_len());
    by_precision!(packed.precision(), T => forward(g, weights, T::of_mut(packed)));
}

fn forward<T: Number>(g: &Geometry, weights: &[f32], packed: &mut [T]) {
    let (inputs, taps) = (g.input.channels, g.taps());
    pack(g, packed, g.input.blocks(), g.output.blocks(), |from, to, tiles| {
        for lane in 0..g.output.channels_in(to) {
            let first = ((to * SIDE + lane) * inputs + from * SIDE) * taps;
            let weights = &weights[first..][..g.input.channels_in(from) * taps];
            for (row, weights) in weights.chunks_exact(taps).enumerate() {
                tiles.set(row, lane, weights);
            }
        }
    });
}

/// Arranges weights `(O, I, K, K)` for [`super::input_gradient`]: the same with input and output
/// turned around.
///
/// # Panics
///
/// When a slice has another length than the geometry says.
pub fn pack_backward(g: &Geometry, weights: &[f32], packed: &mut Buffer) {
    assert_eq!(weights.len(), g.weights_len());
    by_precision!(packed.precision(), T => backward(g, weights, T::of_mut(packed)));
}

fn backward<T: Number>(g: &Geometry, weights: &[f32], packed: &mut [T]) {
    let (inputs, taps) = (g.input.channels, g.taps());
    pack(g, packed, g.output.blocks(), g.input.blocks(), |from, to, tiles| {
        for row in 0..g.output.channels_in(from) {
            let first = ((from * SIDE + row) * inputs + to * SIDE) * taps;
            let weights = &weights[first..][..g.input.channels_in(to) * taps];
            for (lane, weights) in weights.chunks_exact(taps).enumerate() {
                tiles.set(row, lane, weights);
            }
        }
    });
}

/// The tiles of one block that is read and one that is written, one a tap.
struct Tiles<'a, T> {
    /// From the first tap's tile on.
    packed: &'a mut [T],
    /// Numbers from one tap's tile to the next.
    stride: usize,
}

impl<T: Number> Tiles<'_, T> {
    /// Sets one place of each tap's tile.
    #[inline(always)]
    fn set(&mut self, row: usize, lane: usize, taps: &[f32]) {
        let places = self.packed[T::place(row, lane)..].iter_mut().step_by(self.stride);
        for (packed, weight) in places.zip(taps) {
            *packed = T::narrow(*weight);
        }
    }
}

/// Calls `fill(block read, block written, tiles)` for all of them.
fn pack<T: Number>(
    g: &Geometry,
    packed: &mut [T],
    from_blocks: usize,
    to_blocks: usize,
    fill: impl Fn(usize, usize, &mut Tiles<T>) + Sync + Send,
) {
    assert_eq!(packed.len(), g.packed_len());
    let panel = panel_len(g.taps(), from_blocks);
    parallel::for_each_chunk(packed, panel, 2 * g.packed_len(), |pair, packed| {
        packed.fill(T::narrow(0.));
        let columns = columns_of(to_blocks, pair);
        let stride = from_blocks * columns * TILE;
        for column in 0..columns {
            for from in 0..from_blocks {
                let packed = &mut packed[(from * columns + column) * TILE..];
                fill(from, 2 * pair + column, &mut Tiles { packed, stride });
            }
        }
    });
}
