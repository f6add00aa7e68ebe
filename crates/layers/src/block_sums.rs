//! Sums of gradients over the ranks, block by block, while the backward pass goes on below.

use std::ops::Range;

use candle_core::Result;
use collective::PendingSum;

use crate::flat::Flat;
use crate::groups::{BatchGroups, communicated};
use crate::parameters::add_groups;

/// The sum of the gradients of one block over all groups of all ranks, which is being made.
pub(crate) struct BlockSum {
    /// The entries of the block, one after the other.
    ranges: Vec<Range<usize>>,
    sum: PendingSum<f32>,
}

impl BlockSum {
    /// Numbers in the block.
    pub fn len(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Waits for the sum and writes it to `flat`.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn finish(self, flat: &mut Flat) -> Result<()> {
        let sum = communicated(self.sum.wait())?;
        let (mut rest, into) = (sum.as_slice(), flat.storage.buffer_mut());
        for range in self.ranges {
            let (own, others) = rest.split_at(range.len());
            into[range].copy_from_slice(own);
            rest = others;
        }
        Ok(())
    }
}

/// The gradients that a backward pass adds to.
pub(crate) struct PassGradients<'a> {
    /// One, or one for each group of this rank.
    pub flats: &'a mut [Flat],
    /// In the last pass of a step.
    pub sums: Option<BlockSums<'a>>,
}

/// The sums that the last backward pass of a step begins.
pub(crate) struct BlockSums<'a> {
    pub groups: &'a BatchGroups,
    pub begun: &'a mut Vec<BlockSum>,
}

impl BlockSums<'_> {
    /// Begins the sum of a block, to whose gradients nothing will be added. All ranks come to their blocks in the
    /// same order.
    pub fn begin(&mut self, block: usize, flats: &mut [Flat]) -> Result<()> {
        let ranges = flats[0].layout.ranges(|entry| entry.block == block);
        if ranges.is_empty() {
            return Ok(());
        }
        add_groups(flats, |total, other| {
            let (total, other) = (total.buffer_mut(), other.buffer());
            for range in &ranges {
                kernels::flat::add(&mut total[range.clone()], &other[range.clone()]);
            }
            Ok(())
        })?;
        // The other blocks are in the same memory, so this one is copied.
        let own = flats[0].storage.buffer();
        let own: Vec<&[f32]> = ranges.iter().map(|range| &own[range.clone()]).collect();
        let sum = self.groups.communicator().sum_in_background(own.concat());
        self.begun.push(BlockSum { ranges, sum });
        Ok(())
    }
}
