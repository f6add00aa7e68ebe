//! Products of matrices that are packed in tiles, in blocks that stay in the caches.

use std::ops::Range;

use crate::element::ValueElement;
use crate::layout::{SIDE, TILE};
use crate::tiles::{TileProduct, TileRun, TileSession};
use crate::variant::Variant;

/// Tiles along the inner side per pass over the rows. Their right factors, for two blocks of columns, stay in
/// the first-level cache beside as many left ones: 16 KiB in f32, 8 KiB in bf16.
pub(crate) const INNER: usize = 8;

/// Groups of 16 rows whose sums are kept at a time: 16 KiB with two blocks of columns.
pub(crate) const GROUPS: usize = 8;

/// Bytes of transposed left factors that all blocks of columns read again: they fit into a second-level cache of 512 KiB
/// (measured on Zen 3).
const NEAR: usize = 384 << 10;

/// How many groups of rows to compute at a time where left tiles are transposed: an even number, at least 2, whose left
/// factors of `group` f32 each fill at most [`NEAR`] if they can. Otherwise it is [`GROUPS`].
pub(crate) fn near_groups(group: usize) -> usize {
    (NEAR / size_of::<f32>() / group / 2 * 2).clamp(2, GROUPS)
}

/// Blocks of 16 columns in a pair; the last pair may have one.
pub(crate) fn columns(blocks: usize, pair: usize) -> usize {
    (blocks - 2 * pair).min(2)
}

/// Where the first tile of a block of 16 right columns is, in the order (pair of blocks, block along the inner side, block
/// of the pair) for `inner` tiles along the inner side. The next ones follow [`columns`] tiles apart.
pub(crate) fn first_tile(inner: usize, block: usize) -> usize {
    (block / 2 * 2 * inner + block % 2) * TILE
}

/// Up to [`GROUPS`] groups of 16 rows, times a packed right side.
pub(crate) struct PackedProduct<'a, T> {
    /// The left tiles, in the order (group, block along the inner side).
    pub left: &'a [T],
    /// The right tiles, see [`first_tile`].
    pub right: &'a [T],
    /// Length of the inner side.
    pub inner: usize,
    /// Blocks of 16 columns.
    pub blocks: usize,
    /// Rows of the left side.
    pub rows: usize,
}

/// Sums of up to [`GROUPS`] groups of rows and two blocks of columns, aligned for vector stores.
#[repr(align(64))]
struct PairSums([f32; GROUPS * 2 * TILE]);

impl<T: ValueElement> PackedProduct<'_, T> {
    /// Calls `finish(pair, sums)` with the tiles of each pair of blocks of columns, in the order (group, block of the
    /// pair). Left tiles are transposed if `TRANSPOSED`.
    pub fn for_each_pair<const TRANSPOSED: bool>(
        &self,
        variant: Variant,
        mut finish: impl FnMut(usize, &[f32]),
    ) {
        let session = TileSession::begin(variant);
        let inner = self.inner.div_ceil(SIDE);
        let mut sums = PairSums([0.; GROUPS * 2 * TILE]);
        let twos = self.rows.div_ceil(2 * SIDE);
        for pair in 0..self.blocks.div_ceil(2) {
            let columns = columns(self.blocks, pair);
            let sums = &mut sums.0[..self.rows.div_ceil(SIDE) * columns * TILE];
            for first in (0..inner).step_by(INNER) {
                let at = first_tile(inner, 2 * pair) + first * columns * TILE;
                let length = (self.inner - first * SIDE).min(INNER * SIDE);
                // The right tiles of the next pass follow in memory. Each call fetches its share of them.
                let panel = length.div_ceil(SIDE) * columns * TILE;
                for (two, outputs) in sums.chunks_mut(2 * columns * TILE).enumerate() {
                    let left_at = (2 * two * inner + first) * TILE;
                    let runs = [TileRun { left: left_at, right: at, inner: length }];
                    let product = TileProduct {
                        runs: &runs,
                        apart: inner * TILE,
                        rows: (self.rows - two * 2 * SIDE).min(SIDE),
                        columns,
                        add: first > 0,
                        ahead: at + panel + two * panel / twos,
                    };
                    let (a, b) = outputs.split_at_mut(columns * TILE);
                    let (left, right) = (self.left, self.right);
                    if b.is_empty() {
                        T::product::<TRANSPOSED>(&session, left, right, &product, &mut [a]);
                    } else {
                        T::product::<TRANSPOSED>(&session, left, right, &product, &mut [a, b]);
                    }
                }
            }
            finish(pair, sums);
        }
    }
}

/// A range in parts of 16.
pub(crate) fn blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(SIDE).map(move |from| from..(from + SIDE).min(end))
}
