//! What the kernels are told: how values are cut into blocks, and an update's factors.

use crate::flat::Adam;

/// Threads of a block, `THREADS` in `grid.h`.
pub(super) const THREADS: u32 = 256;
/// Channels that a block of a norm's kernels takes, `CHANNELS` in `grid.h`.
const CHANNELS: u64 = 32;
/// Rows of a part at least.
const SHORTEST: u64 = 64;
/// Parts at most: enough for every card, few enough to be joined by one block.
const PARTS: u64 = 512;

/// The extent of a value for the kernels of norms: rows (a row for each pixel of each image) by
/// channels, and how many rows are summed at a time. `Extent` in `norm.cu`.
///
/// The parts follow from the extent alone, so that sums have the same bits on every card.
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

    /// Numbers of a value.
    pub fn len(&self) -> usize {
        self.rows as usize * self.channels as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Numbers in a row.
    pub fn channels(&self) -> usize {
        self.channels as usize
    }

    /// Runs of rows that are summed one by one.
    pub(super) fn parts(&self) -> usize {
        self.rows.div_ceil(self.rows_of_part) as usize
    }

    /// Blocks for every part of every channel.
    pub(super) fn blocks(&self) -> [u32; 2] {
        [self.channels.div_ceil(CHANNELS) as u32, self.parts() as u32]
    }

    /// Blocks for every channel, where parts are joined.
    pub(super) fn blocks_of_channels(&self) -> [u32; 2] {
        [self.blocks()[0], 1]
    }
}

/// Blocks for a flat buffer.
pub(super) fn blocks_of(numbers: usize) -> [u32; 2] {
    [numbers.div_ceil(THREADS as usize) as u32, 1]
}

/// What `adam` in `flat.cu` takes after the count: rate and root with the corrections for the step
/// (from 1), β₁, 1 − β₁, β₂, 1 − β₂, ε and the weight decay.
pub(super) fn adam_factors(step: u64, with: Adam) -> [f32; 8] {
    let rest = |beta: f64| 1. - beta.powf(step as f64);
    let rate = with.learning_rate / rest(with.beta_1);
    let root = (1. / rest(with.beta_2)).sqrt();
    let Adam { beta_1, beta_2, epsilon, weight_decay, .. } = with;
    [rate, root, beta_1, 1. - beta_1, beta_2, 1. - beta_2, epsilon, weight_decay]
        .map(|factor| factor as f32)
}
