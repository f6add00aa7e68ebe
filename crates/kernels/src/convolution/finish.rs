//! The last step of a convolution: bias, residual sum and ReLU, and the sums for a batch norm.
#![expect(unsafe_code, reason = "tasks write disjoint pixels and channels of one buffer")]

use super::columns_of;
use crate::element::ValueElement;
use crate::layout::{SIDE, TILE};
use crate::norm::{MOMENT_BLOCK, add_moments};
use crate::parallel::Disjoint;
use crate::tiles::TileSession;
use crate::variant::for_each_variant;
use crate::{Buffer, Shape};

/// The last step of a convolution: `relu(sum + bias + residual)`, each part optional.
#[derive(Clone, Copy, Default)]
pub struct Finish<'a> {
    /// A number for each output channel, padded to whole blocks.
    pub bias: Option<&'a [f32]>,
    /// A value of the output's shape.
    pub residual: Option<&'a Buffer>,
    /// Whether a ReLU ends it.
    pub relu: bool,
}

/// [`Finish`] for values of one type, with room for the sums of a batch norm.
pub(super) struct FinishOf<'a, T> {
    bias: Option<&'a [f32]>,
    residual: Option<&'a [T]>,
    relu: bool,
    moments: Option<Disjoint<'a, f32>>,
}

impl<'a, T: ValueElement> FinishOf<'a, T> {
    pub fn new(finish: Finish<'a>, moments: Option<Disjoint<'a, f32>>) -> Self {
        let Finish { bias, residual, relu } = finish;
        FinishOf { bias, residual: residual.map(T::of), relu, moments }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        !self.changes() && self.moments.is_none()
    }

    fn changes(&self) -> bool {
        self.bias.is_some() || self.residual.is_some() || self.relu
    }

    /// Finishes one part of a value, in a pair of blocks of channels; the caller's task owns both.
    pub fn part(
        &self,
        session: &TileSession,
        to: &Disjoint<T>,
        shape: Shape,
        part: usize,
        pair: usize,
    ) {
        if self.is_empty() {
            return;
        }
        let &FinishOf { bias, residual, relu, ref moments } = self;
        let (changes, variant) = (self.changes(), session.variant());
        let (from, len, images) = shape.span(part);
        for column in 0..columns_of(shape.blocks(), pair) {
            let block = 2 * pair + column;
            let mut sums = moments.as_ref().map(|moments| {
                let at = (part * shape.blocks() + block) * MOMENT_BLOCK;
                // SAFETY: a task owns its parts in its pairs of blocks.
                unsafe { moments.part(at, MOMENT_BLOCK) }
            });
            for (at, pixel) in (from..from + len).step_by(shape.pixel_len()).enumerate() {
                // SAFETY: as above; the sums of this part and pair are complete.
                let tile = unsafe { to.part(pixel + block * TILE, TILE) };
                if changes {
                    let bias = bias.map(|bias| &bias[block * SIDE..][..SIDE]);
                    let residual = residual.map(|r| &r[pixel + block * TILE..][..TILE]);
                    finish_tile(variant, tile, images, bias, residual, relu);
                }
                if let Some(sums) = &mut sums {
                    add_moments(variant, tile, images, at == 0, sums);
                }
            }
        }
    }
}

for_each_variant! {
    /// `relu(x + bias + residual)` for the real images of a tile.
    fn finish_tile<T: ValueElement>(
        tile: &mut [T],
        images: usize,
        bias: Option<&[f32]>,
        residual: Option<&[T]>,
        relu: bool,
    ) {
        let mut biases = [0f32; SIDE];
        if let Some(bias) = bias {
            biases.copy_from_slice(&bias[..SIDE]);
        }
        for (image, row) in tile.chunks_exact_mut(SIDE).take(images).enumerate() {
            let mut values = [0f32; SIDE];
            for lane in 0..SIDE {
                values[lane] = row[lane].wide() + biases[lane];
            }
            if let Some(residual) = residual {
                let residual = &residual[image * SIDE..][..SIDE];
                for lane in 0..SIDE {
                    values[lane] += residual[lane].wide();
                }
            }
            if relu {
                for value in &mut values {
                    // Not `max`, which would hide a NaN.
                    *value = if *value <= 0. { 0. } else { *value };
                }
            }
            for lane in 0..SIDE {
                row[lane] = T::narrow(values[lane]);
            }
        }
    }
}
