//! Arguments of the kernels: the split of values into blocks, and the factors of an update.

use crate::flat::Adam;

/// Threads per block, `THREADS` in `grid.h`.
pub(super) const THREADS: u32 = 256;
/// Channels per block in the kernels of norms, `CHANNELS` in `grid.h`.
const CHANNELS: u64 = 32;
/// The fewest rows of a part.
const SHORTEST: u64 = 64;
/// The most parts: enough for every card, few enough to be joined by one block.
const PARTS: u64 = 512;

/// The size of a value for the kernels of norms: rows (one per pixel of each image) × channels, and the rows
/// of a part. `Extent` in `norm.cu`.
///
/// The parts depend on the size alone, so that sums have the same bits on every card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Extent {
    rows: u64,
    channels: u64,
    rows_of_part: u64,
}

impl Extent {
    /// - `rows`: images times pixels; `channels`: numbers in a row.
    pub fn new(rows: usize, channels: usize) -> Extent {
        let (rows, channels) = (rows as u64, channels as u64);
        Extent { rows, channels, rows_of_part: rows.div_ceil(PARTS).max(SHORTEST) }
    }

    /// The count of numbers in the value.
    pub fn len(&self) -> usize {
        self.rows as usize * self.channels as usize
    }

    /// Whether the value is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The count of numbers in a row.
    pub fn channels(&self) -> usize {
        self.channels as usize
    }

    /// The parts, ranges of rows that are summed separately.
    pub(super) fn parts(&self) -> usize {
        self.rows.div_ceil(self.rows_of_part) as usize
    }

    /// The grid over all channels and parts.
    pub(super) fn blocks(&self) -> [u32; 2] {
        [self.channels.div_ceil(CHANNELS) as u32, self.parts() as u32]
    }

    /// The grid over all channels, for joining parts.
    pub(super) fn blocks_of_channels(&self) -> [u32; 2] {
        [self.blocks()[0], 1]
    }
}

/// The grid over a flat buffer.
pub(super) fn blocks_of(numbers: usize) -> [u32; 2] {
    [numbers.div_ceil(THREADS as usize) as u32, 1]
}

/// The arguments of `adam` in `flat.cu` after the count: rate and root with the corrections for the step
/// (from 1), β₁, 1 − β₁, β₂, 1 − β₂, ε and the weight decay.
pub(super) fn adam_factors(step: u64, with: Adam) -> [f32; 8] {
    let correction = |beta: f64| 1. - beta.powf(step as f64);
    let rate = with.learning_rate / correction(with.beta_1);
    let root = (1. / correction(with.beta_2)).sqrt();
    let Adam { beta_1, beta_2, epsilon, weight_decay, .. } = with;
    [rate, root, beta_1, 1. - beta_1, beta_2, 1. - beta_2, epsilon, weight_decay]
        .map(|factor| factor as f32)
}
