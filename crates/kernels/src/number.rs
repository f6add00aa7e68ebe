//! The numbers that values are stored as.

use crate::layout::SIDE;
use crate::tiles::{self, Pair, Sum};
use crate::{Buffer, Variant};

/// How values and their gradients are stored and multiplied inside a network. Parameters, their
/// gradients, statistics and all sums are f32 or better in both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16: the upper half of a 32-bit float, 8 bits of mantissa. Products of two are exact
    /// and are added in f32.
    Bf16,
}

impl Precision {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// A number as it is stored.
pub(crate) trait Number: Copy + Send + Sync + 'static {
    /// Tile products between loads of the sums. 16 pairs of f32 tiles on the right fill 32 KiB of
    /// first-level cache and serve every pixel of a task before the next 16 come; a bf16 output
    /// cannot hold sums on the way, so there all come at once.
    const CHUNK: usize;

    /// Where a tile on the right of a product holds (inner, column).
    fn place(inner: usize, column: usize) -> usize;
    fn wide(self) -> f32;
    /// Rounds to the nearest, ties to even.
    fn narrow(value: f32) -> Self;
    fn of(buffer: &Buffer) -> &[Self];
    fn of_mut(buffer: &mut Buffer) -> &mut [Self];
    /// The same slice when it can hold sums as they are.
    fn as_sums(slice: &mut [Self]) -> Option<&mut [f32]>;
    /// `output (+)= Σ left · right` or, with `TRANSPOSED`, `Σ leftᵀ · right`: see [`tiles`].
    fn product<const TRANSPOSED: bool>(
        variant: Variant,
        left: &[Self],
        right: &[Self],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    );
}

impl Number for f32 {
    const CHUNK: usize = 16;

    #[inline(always)]
    fn place(inner: usize, column: usize) -> usize {
        inner * SIDE + column
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }

    fn of(buffer: &Buffer) -> &[f32] {
        buffer
    }

    fn of_mut(buffer: &mut Buffer) -> &mut [f32] {
        buffer
    }

    fn as_sums(slice: &mut [f32]) -> Option<&mut [f32]> {
        Some(slice)
    }

    fn product<const TRANSPOSED: bool>(
        variant: Variant,
        left: &[f32],
        right: &[f32],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    ) {
        tiles::product::<TRANSPOSED>(variant, left, right, pairs, output, sum);
    }
}

/// The bits of a bfloat16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Half(pub u16);

impl Number for Half {
    const CHUNK: usize = usize::MAX;

    #[inline(always)]
    fn place(inner: usize, column: usize) -> usize {
        inner / 2 * 2 * SIDE + 2 * column + inner % 2
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Half {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        // A NaN whose mantissa rounds away would become an infinity.
        Half(if value.is_nan() { 0x7fc0 } else { (rounded >> 16) as u16 })
    }

    fn of(buffer: &Buffer) -> &[Half] {
        buffer.halves()
    }

    fn of_mut(buffer: &mut Buffer) -> &mut [Half] {
        buffer.halves_mut()
    }

    fn as_sums(_: &mut [Half]) -> Option<&mut [f32]> {
        None
    }

    fn product<const TRANSPOSED: bool>(
        variant: Variant,
        left: &[Half],
        right: &[Half],
        pairs: &[Pair],
        output: &mut [f32],
        sum: Sum,
    ) {
        tiles::product_of_halves::<TRANSPOSED>(variant, left, right, pairs, output, sum);
    }
}

/// Evaluates an expression with a type name that stands for the numbers of a precision.
macro_rules! by_precision {
    ($precision:expr, $number:ident => $body:expr) => {
        match $precision {
            $crate::Precision::F32 => {
                type $number = f32;
                $body
            }
            $crate::Precision::Bf16 => {
                type $number = $crate::number::Half;
                $body
            }
        }
    };
}
pub(crate) use by_precision;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_as_bfloat16_does() {
        let mut state = 1u32;
        for _ in 0..10_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(state);
            let (half, want) = (Half::narrow(value), half::bf16::from_f32(value));
            if value.is_nan() {
                assert!(half.wide().is_nan());
            } else {
                assert_eq!(half.0, want.to_bits(), "{value}");
                assert_eq!(half.wide(), want.to_f32(), "{value}");
            }
        }
        assert_eq!(Half::narrow(f32::MAX).wide(), f32::INFINITY);
        assert_eq!(Half::narrow(-0.).0, 0x8000);
        assert!(Half::narrow(f32::from_bits(0x7f80_0001)).wide().is_nan());
    }
}
