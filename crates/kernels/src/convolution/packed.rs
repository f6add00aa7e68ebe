//! Weights in the order in which tile products read them.

use std::sync::Arc;

use super::filter::Filter;
use super::winograd::{self, SquareSize, by_size};
use super::{Geometry, columns_of, panel_len, stem};
use crate::buffer::with_scratch;
use crate::element::{ValueElement, by_precision};
use crate::layout::{SIDE, TILE};
use crate::tiles::TileOrder;
use crate::transformer::factor_precision;
use crate::transpose::Interleaving;
use crate::variant::for_each_variant;
use crate::{Buffer, BufferPool, Precision, Variant, parallel};

/// The product of a convolution that reads packed weights. The weight gradient reads none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PackedFor {
    /// The output, from the input.
    Forward,
    /// The input gradient, from the output gradient.
    InputGradient,
}

/// The algorithm of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// The plain sum over taps and input channels.
    Direct,
    /// Winograd's form, with fewer products: see `winograd.rs`.
    Winograd(SquareSize),
    /// The taps of a row of the kernel together, for few input channels: see `stem.rs`.
    RowsOfTaps,
}

/// Everything that decides the order and the type of packed weights.
///
/// Convolutions with equal packings share packed weights. The size of the map counts only where it
/// decides the form, so that one layer may need two packings for crops of two sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    packed_for: PackedFor,
    form: Form,
    precision: Precision,
    order: TileOrder,
    in_channels: usize,
    out_channels: usize,
    kernel: usize,
}

impl Geometry {
    /// The packing of the weights for one product of this convolution, with the kernels of this variant
    /// on values of this precision.
    pub fn packing(
        &self,
        variant: Variant,
        precision: Precision,
        packed_for: PackedFor,
    ) -> Packing {
        let form = self.form_of(variant, precision, packed_for);
        let precision = match form {
            Form::Winograd(_) => factor_precision(variant, precision),
            Form::Direct | Form::RowsOfTaps => precision,
        };
        Packing {
            packed_for,
            form,
            precision,
            order: TileOrder::of(variant, precision),
            in_channels: self.input.channels,
            out_channels: self.output.channels,
            kernel: self.kernel,
        }
    }
}

impl Packing {
    /// Numbers in the packed weights.
    pub fn packed_len(&self) -> usize {
        let (read, written) = self.channels();
        let tiles = self.blocks_read(read) * written.div_ceil(SIDE) * TILE;
        match self.form {
            Form::Direct => self.taps() * tiles,
            Form::Winograd(size) => size.positions() * tiles,
            Form::RowsOfTaps => stem::packed_len(self.kernel, self.out_channels),
        }
    }

    /// Bytes of the packed weights.
    pub fn packed_bytes(&self) -> usize {
        self.packed_len() * self.precision.bytes()
    }

    /// Numbers in the weights `(O, I, K, K)`.
    pub fn weights_len(&self) -> usize {
        self.out_channels * self.in_channels * self.taps()
    }

    fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// Blocks of channels that the product reads, those of zeros included.
    fn blocks_read(&self, channels: usize) -> usize {
        self.order.inner_tiles(channels.div_ceil(SIDE))
    }

    /// Channels that the product reads and channels that it writes.
    fn channels(&self) -> (usize, usize) {
        match self.packed_for {
            PackedFor::Forward => (self.in_channels, self.out_channels),
            PackedFor::InputGradient => (self.out_channels, self.in_channels),
        }
    }
}

/// Weights packed for one product of a convolution.
pub struct PackedWeights {
    packing: Packing,
    numbers: Buffer,
}

impl PackedWeights {
    /// Packs weights `(O, I, K, K)` into memory of the pool: tiles of 16 channels read × 16 channels
    /// written, in the order (pair of blocks written, tap, block read, block of the pair), where the last two are in
    /// the order of the product. In Winograd's form, transformed positions take the place of taps.
    ///
    /// # Panics
    ///
    /// When `weights` has another length than the packing says.
    pub fn new(packing: Packing, weights: &[f32], pool: &Arc<BufferPool>) -> PackedWeights {
        assert_eq!(weights.len(), packing.weights_len());
        let mut numbers = pool.take_of(packing.precision, packing.packed_len());
        if packing.form == Form::RowsOfTaps {
            let channels = [packing.in_channels, packing.out_channels];
            stem::pack(packing.kernel, channels, weights, numbers.halves_mut());
            return PackedWeights { packing, numbers };
        }
        by_precision!(packing.precision, T => {
            let packed = T::of_mut(&mut numbers);
            match packing.form {
                Form::Direct => pack_direct(packing, weights, packed),
                Form::Winograd(size) => by_size!(size, F => {
                    pack_winograd::<F, T, _, _>(packing, weights, packed);
                }),
                Form::RowsOfTaps => unreachable!("packed above"),
            }
        });
        PackedWeights { packing, numbers }
    }

    /// The packed numbers, for a product that needs this packing.
    ///
    /// # Panics
    ///
    /// When the weights were packed otherwise.
    pub(super) fn numbers(&self, needed: Packing) -> &Buffer {
        assert!(
            self.packing == needed,
            "the weights are packed as {:?}, but the product needs {needed:?}",
            self.packing
        );
        &self.numbers
    }
}

fn pack_direct<T: ValueElement>(packing: Packing, weights: &[f32], packed: &mut [T]) {
    let (inputs, taps) = (packing.in_channels, packing.taps());
    let (read, written) = packing.channels();
    let channels_in = |channels: usize, block: usize| (channels - block * SIDE).min(SIDE);
    match packing.packed_for {
        PackedFor::Forward => fill_tiles(packing, packed, |from, to, tiles| {
            let weights = &weights[(to * SIDE * inputs + from * SIDE) * taps..];
            let (count, len) = (channels_in(written, to), channels_in(read, from) * taps);
            let start = |lane| lane * inputs * taps;
            match taps {
                // The usual kernels, whose divisions the compiler turns into products.
                1 => to_tiles(weights, tiles, Interleaving { count, len, start, place: |c| c }),
                9 => {
                    let place = |c| c % 9 * SIDE + c / 9;
                    to_tiles(weights, tiles, Interleaving { count, len, start, place });
                }
                _ => {
                    let place = |c| c % taps * SIDE + c / taps;
                    to_tiles(weights, tiles, Interleaving { count, len, start, place });
                }
            }
        }),
        PackedFor::InputGradient => fill_tiles(packing, packed, |from, to, tiles| {
            for row in 0..channels_in(read, from) {
                let first = ((from * SIDE + row) * inputs + to * SIDE) * taps;
                let weights = &weights[first..][..channels_in(written, to) * taps];
                if taps == 1 {
                    tiles[row * SIDE..][..weights.len()].copy_from_slice(weights);
                    continue;
                }
                let (count, place) = (weights.len() / taps, |tap| tap * SIDE + row);
                let start = |lane| lane * taps;
                to_tiles(weights, tiles, Interleaving { count, len: taps, start, place });
            }
        }),
    }
}

fn to_tiles(
    weights: &[f32],
    tiles: &mut [f32],
    by: Interleaving<impl Fn(usize) -> usize, impl Fn(usize) -> usize>,
) {
    by.rows_to_lanes(Variant::fastest(), weights, tiles);
}

/// Backward, the kernels are rotated by half a turn as well.
fn pack_winograd<F, T, const N: usize, const M: usize>(
    packing: Packing,
    weights: &[f32],
    packed: &mut [T],
) where
    F: Filter<N, M>,
    T: ValueElement,
{
    let inputs = packing.in_channels;
    let (read, written) = packing.channels();
    match packing.packed_for {
        PackedFor::Forward => {
            winograd::pack::<F, T, N, M>(read, written, packed, |from, to, kernels| {
                let weights = &weights[(to.start * inputs + from) * 9..];
                let (count, start) = (to.len(), |lane| lane * inputs * 9);
                let by = Interleaving { count, len: 9, start, place: |tap| tap };
                to_tiles(weights, kernels.as_flattened_mut(), by);
            })
        }
        PackedFor::InputGradient => {
            winograd::pack::<F, T, N, M>(read, written, packed, |from, to, kernels| {
                let weights = &weights[(from * inputs + to.start) * 9..];
                let (count, start) = (to.len(), |lane| lane * 9);
                let by = Interleaving { count, len: 9, start, place: |tap| 8 - tap };
                to_tiles(weights, kernels.as_flattened_mut(), by);
            })
        }
    }
}

/// Calls `fill(block read, block written, the tiles of all taps)` for every pair of blocks. Padding is zero
/// already. The tiles are small enough to be filled in any order; they are then stored row by row.
fn fill_tiles<T: ValueElement>(
    packing: Packing,
    packed: &mut [T],
    fill: impl Fn(usize, usize, &mut [f32]) + Sync + Send,
) {
    assert_eq!(packed.len(), packing.packed_len());
    let (read, written) = packing.channels();
    let (from_blocks, to_blocks) = (packing.blocks_read(read), written.div_ceil(SIDE));
    let panel = panel_len(packing.taps(), from_blocks);
    parallel::for_each_chunk(packed, panel, 2 * packing.weights_len(), |pair, packed| {
        let columns = columns_of(to_blocks, pair);
        let stride = from_blocks * columns;
        with_scratch(packing.taps() * TILE, |scratch| {
            for (column, from) in (0..columns).flat_map(|c| (0..from_blocks).map(move |f| (c, f))) {
                let to = 2 * pair + column;
                if (from + 1) * SIDE > read || (to + 1) * SIDE > written {
                    scratch.fill(0.); // The padding of the last blocks.
                }
                if from * SIDE < read {
                    fill(from, to, scratch);
                }
                let place = packing.order.place(from, column, columns);
                for (tap, tile) in scratch.as_chunks().0.iter().enumerate() {
                    let at = (tap * stride + place) * TILE;
                    arrange_right(Variant::fastest(), tile, &mut packed[at..at + TILE]);
                }
            }
        });
    });
}

for_each_variant! {
    pub(super) fn arrange_right<T: ValueElement>(from: &[f32; TILE], to: &mut [T]) {
        T::arrange_right(from, to);
    }
}
