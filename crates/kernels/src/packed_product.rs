//! Products of matrices that are packed in tiles, in blocks that stay in the caches.

use std::ops::Range;

use crate::element::ValueElement;
use crate::layout::{SIDE, TILE};
use crate::tiles::{TileOrder, TileProduct, TileRun, TileSession};
use crate::{Precision, Variant};

/// Tiles along the inner side per pass over the rows. Their right factors, for two blocks of columns, stay in
/// the first-level cache beside as many left ones: 16 KiB in f32, 8 KiB in bf16.
pub(crate) const INNER: usize = 8;

/// [`INNER`] for a tile unit, which multiplies 8 tiles in the time that loading and storing the sums takes. 32 KiB of right
/// factors come from the first-level cache, left ones from the second.
const UNIT_INNER: usize = 32;

/// [`GROUPS`] for a tile unit, so that the next right factors arrive while these are multiplied.
const UNIT_GROUPS: usize = 16;

/// Groups of 16 rows that are computed at a time.
pub(crate) const GROUPS: usize = 8;

/// Bytes of transposed left factors that all blocks of columns read again: they fit into a second-level cache of 512 KiB
/// (measured on Zen 3).
const NEAR: usize = 384 << 10;

/// Blocks of 16 columns in a pair; the last pair may have one.
pub(crate) fn columns(blocks: usize, pair: usize) -> usize {
    (blocks - 2 * pair).min(2)
}

/// The order of right tiles: (pair of blocks of 16 columns, block along the inner side, block of the pair), where the
/// last two are in the [order](TileOrder) of the product.
#[derive(Clone, Copy)]
pub(crate) struct RightTiles {
    order: TileOrder,
    /// Tiles along the inner side, those of zeros included.
    inner: usize,
    /// Blocks of 16 columns.
    blocks: usize,
}

impl RightTiles {
    /// For products of this variant and precision, an inner side of this length and as many blocks of columns.
    pub fn new(variant: Variant, precision: Precision, inner: usize, blocks: usize) -> RightTiles {
        let order = TileOrder::of(variant, precision);
        RightTiles { order, inner: order.inner_tiles(inner.div_ceil(SIDE)), blocks }
    }

    pub fn order(self) -> TileOrder {
        self.order
    }

    /// Tiles along the inner side, those of zeros included.
    pub fn inner(self) -> usize {
        self.inner
    }

    /// Blocks of 16 columns.
    pub fn blocks(self) -> usize {
        self.blocks
    }

    /// Numbers in all tiles.
    pub fn len(self) -> usize {
        self.inner * self.blocks * TILE
    }

    /// Where the tile of a block along the inner side and a block of columns begins.
    pub fn tile(self, inner: usize, block: usize) -> usize {
        let columns = columns(self.blocks, block / 2);
        (block / 2 * 2 * self.inner + self.order.place(inner, block % 2, columns)) * TILE
    }
}

/// Groups of 16 rows that are computed at a time.
pub(crate) fn groups_at_once(order: TileOrder) -> usize {
    if order.is_paired() { UNIT_GROUPS } else { GROUPS }
}

/// Up to [`groups_at_once`] groups of 16 rows, times a packed right side.
pub(crate) struct PackedProduct<'a, T> {
    /// The left tiles, in the order (group, block along the inner side), [paired](TileOrder) where the right ones are.
    pub left: &'a [T],
    /// The right tiles.
    pub right: &'a [T],
    /// Their order.
    pub tiles: RightTiles,
    /// Length of the inner side.
    pub inner: usize,
    /// Rows of the left side.
    pub rows: usize,
}

impl<T: ValueElement> PackedProduct<'_, T> {
    /// Calls `finish(pair, sums)` with the tiles of each pair of blocks of columns, in the order (group, block of the
    /// pair). Left tiles are transposed if `TRANSPOSED`.
    ///
    /// All pairs of columns read the same left tiles. Where these do not fit into [`NEAR`], the inner side is cut into parts
    /// that do. Each part is multiplied with all pairs before the next part, and the sums of all pairs are kept
    /// meanwhile. Each sum is added in the same order either way.
    ///
    /// - `sums`: at least [`sums_len`] numbers, with arbitrary contents.
    pub fn for_each_pair<const TRANSPOSED: bool>(
        &self,
        variant: Variant,
        sums: &mut [f32],
        mut finish: impl FnMut(usize, &[f32]),
    ) {
        let session = TileSession::begin(variant);
        let RightTiles { inner, blocks, .. } = self.tiles;
        let pairs = blocks.div_ceil(2);
        let step = if self.tiles.order.is_paired() { UNIT_INNER } else { INNER };
        let groups = self.rows.div_ceil(SIDE);
        let near = near_tiles(TRANSPOSED, inner, groups);
        let twos = groups.div_ceil(2);
        let right_at = |pair: usize, first: usize| self.tiles.tile(first, 2 * pair);
        for from in (0..inner).step_by(near) {
            let end = (from + near).min(inner);
            for pair in 0..pairs {
                let columns = columns(blocks, pair);
                let place = if near == inner { 0 } else { pair * groups * 2 * TILE };
                let sums = &mut sums[place..][..groups * columns * TILE];
                for first in (from..end).step_by(step) {
                    let at = right_at(pair, first);
                    let last = (first + step).min(end);
                    let length = (last * SIDE).min(self.inner) - first * SIDE;
                    let panel = (last - first) * columns * TILE;
                    // The right tiles of the next pass. Each call fetches its share of them.
                    let next = match (last < end, pair + 1 < pairs) {
                        (true, _) => right_at(pair, last),
                        (false, true) => right_at(pair + 1, from),
                        (false, false) => right_at(0, end % inner),
                    };
                    for (two, outputs) in sums.chunks_mut(2 * columns * TILE).enumerate() {
                        let left_at = (2 * two * inner + first) * TILE;
                        let runs = [TileRun { left: left_at, right: at, inner: length }];
                        let product = TileProduct {
                            runs: &runs,
                            apart: inner * TILE,
                            rows: (self.rows - two * 2 * SIDE).min(SIDE),
                            columns,
                            add: first > 0,
                            ahead: next + two * panel / twos,
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
                if end == inner {
                    finish(pair, sums);
                }
            }
        }
    }
}

/// The number of tiles along the inner side in one part, of `inner` in all.
fn near_tiles(transposed: bool, inner: usize, groups: usize) -> usize {
    let near = NEAR / size_of::<f32>() / TILE / groups / INNER * INNER;
    if transposed { near.max(INNER).min(inner) } else { inner }
}

/// Numbers of the sums that [`PackedProduct::for_each_pair`] needs memory for.
///
/// - `inner`: length of the inner side.
/// - `blocks`: blocks of 16 columns.
/// - `rows`: rows of the left side that are computed at a time.
pub(crate) fn sums_len(transposed: bool, inner: usize, blocks: usize, rows: usize) -> usize {
    let (inner, groups) = (inner.div_ceil(SIDE), rows.div_ceil(SIDE));
    let is_near = groups == 0 || near_tiles(transposed, inner, groups) == inner;
    let pairs = if is_near { 1 } else { blocks.div_ceil(2) };
    pairs * groups * 2 * TILE
}

/// A range in parts of 16.
pub(crate) fn blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(SIDE).map(move |from| from..(from + SIDE).min(end))
}
