//! Weights as the tile products want them.

use super::{Geometry, columns_of, panel_len, winograd};
use crate::buffer::with_scratch;
use crate::element::{Element, by_precision};
use crate::layout::{SIDE, TILE};
use crate::variant::for_each_variant;
use crate::{Buffer, Variant, parallel};

/// Arranges weights `(O, I, K, K)` for [`super::forward`]: tiles of 16 input × 16 output channels,
/// in the order (pair of output blocks, tap, input block, output block of the pair); in Winograd's
/// form, (pair of output blocks, position, input block, output block of the pair). The variant is the
/// one that is to multiply them.
///
/// # Panics
///
/// When a slice has another length than the geometry says.
pub fn pack_forward(variant: Variant, g: &Geometry, weights: &[f32], packed: &mut Buffer) {
    assert_eq!(weights.len(), g.weights_len());
    if g.winograd(variant, packed.precision()) {
        let inputs = g.input.channels;
        return by_precision!(packed.precision(), T => {
            winograd::pack(inputs, g.output.channels, T::of_mut(packed), |from, to, kernels| {
                for (lane, to) in to.enumerate() {
                    let weights = &weights[(to * inputs + from) * 9..][..9];
                    for (kernel, weight) in kernels.iter_mut().zip(weights) {
                        kernel[lane] = *weight;
                    }
                }
            });
        });
    }
    let (inputs, taps) = (g.input.channels, g.taps());
    let (from_blocks, to_blocks) = (g.input.blocks(), g.output.blocks());
    by_precision!(packed.precision(), T => {
        pack::<T>(variant, g, T::of_mut(packed), from_blocks, to_blocks, |from, to, tiles| {
            for lane in 0..g.output.channels_in(to) {
                let first = ((to * SIDE + lane) * inputs + from * SIDE) * taps;
                let weights = &weights[first..][..g.input.channels_in(from) * taps];
                for (row, weights) in weights.chunks_exact(taps).enumerate() {
                    set(tiles, row * SIDE + lane, weights);
                }
            }
        });
    });
}

/// Arranges weights `(O, I, K, K)` for [`super::input_gradient`]: the same with input and output
/// turned around, and in Winograd's form the kernels too.
///
/// # Panics
///
/// When a slice has another length than the geometry says.
pub fn pack_backward(variant: Variant, g: &Geometry, weights: &[f32], packed: &mut Buffer) {
    assert_eq!(weights.len(), g.weights_len());
    let (inputs, taps) = (g.input.channels, g.taps());
    if g.winograd(variant, packed.precision()) {
        return by_precision!(packed.precision(), T => {
            winograd::pack(g.output.channels, inputs, T::of_mut(packed), |from, to, kernels| {
                let weights = &weights[(from * inputs + to.start) * 9..][..to.len() * 9];
                for (lane, weights) in weights.chunks_exact(9).enumerate() {
                    for (kernel, weight) in kernels.iter_mut().rev().zip(weights) {
                        kernel[lane] = *weight;
                    }
                }
            });
        });
    }
    let (from_blocks, to_blocks) = (g.output.blocks(), g.input.blocks());
    by_precision!(packed.precision(), T => {
        pack::<T>(variant, g, T::of_mut(packed), from_blocks, to_blocks, |from, to, tiles| {
            for row in 0..g.output.channels_in(from) {
                let first = ((from * SIDE + row) * inputs + to * SIDE) * taps;
                let weights = &weights[first..][..g.input.channels_in(to) * taps];
                for (lane, weights) in weights.chunks_exact(taps).enumerate() {
                    set(tiles, row * SIDE + lane, weights);
                }
            }
        });
    });
}

/// Sets one place of each tap's tile.
#[inline(always)]
fn set(tiles: &mut [[f32; TILE]], place: usize, taps: &[f32]) {
    for (tile, weight) in tiles.iter_mut().zip(taps) {
        tile[place] = *weight;
    }
}

for_each_variant! {
    pub(super) fn arrange_right<T: Element>(from: &[f32; TILE], to: &mut [T]) {
        T::arrange_right(from, to);
    }
}

/// Calls `fill(block read, block written, a tile for each tap)` for all of them. The tiles, zero at
/// first, are small enough to be filled in any order; from there they go on row by row.
fn pack<T: Element>(
    variant: Variant,
    g: &Geometry,
    packed: &mut [T],
    from_blocks: usize,
    to_blocks: usize,
    fill: impl Fn(usize, usize, &mut [[f32; TILE]]) + Sync + Send,
) {
    assert_eq!(packed.len(), g.packed_len(variant, T::PRECISION));
    let panel = panel_len(g.taps(), from_blocks);
    parallel::for_each_chunk(packed, panel, 2 * g.weights_len(), |pair, packed| {
        let columns = columns_of(to_blocks, pair);
        let stride = from_blocks * columns;
        with_scratch(g.taps() * TILE, |scratch| {
            let tiles = scratch.as_chunks_mut::<TILE>().0;
            for (column, from) in (0..columns).flat_map(|c| (0..from_blocks).map(move |f| (c, f))) {
                tiles.as_flattened_mut().fill(0.);
                fill(from, 2 * pair + column, tiles);
                for (tap, tile) in tiles.iter().enumerate() {
                    let at = (tap * stride + from * columns + column) * TILE;
                    arrange_right(Variant::fastest(), tile, &mut packed[at..at + TILE]);
                }
            }
        });
    });
}
