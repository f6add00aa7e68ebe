//! The types in which values are stored.

use crate::Buffer;
use crate::Variant;
use crate::buffer::halves_within;
use crate::layout::{SIDE, TILE};
use crate::tiles::{self, StripProduct, TileProduct, TileSession};
use crate::variant::for_each_variant;

/// How values and their gradients are stored and multiplied inside a network. Parameters, their
/// gradients, statistics and all sums are f32 or better in both cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16: the upper half of a 32-bit float, with 8 bits of mantissa. Products are exact and are
    /// added in f32.
    Bf16,
}

impl Precision {
    /// Bytes per number.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// A number of a stored value.
pub(crate) trait ValueElement: Copy + Send + Sync + 'static {
    /// Tile products between loads of the sums. 16 pairs of right f32 tiles fill 32 KiB of first-level
    /// cache and serve every pixel of a part before the next 16. A bf16 output cannot hold intermediate
    /// sums, so there all products come at once.
    const CHUNK: usize;

    /// The precision with this type.
    const PRECISION: Precision;
    /// Whether a product along images needs [arranged](Self::arrange) tiles.
    const ARRANGED: bool;

    /// Rounds a tile (inner, column) and arranges it for the right side of a product.
    fn arrange_right(from: &[f32; TILE], to: &mut [Self]);
    fn wide(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn narrow(value: f32) -> Self;
    /// [`narrow`](Self::narrow) for a sum of stored numbers, cheaper: ties round away from zero. A NaN
    /// stays a NaN.
    fn near(value: f32) -> Self;
    /// A tile of zeros.
    fn zeros() -> &'static [Self; TILE];
    /// Scratch memory as numbers of this type.
    fn within(memory: &mut [f32]) -> &mut [Self];
    fn of(buffer: &Buffer) -> &[Self];
    /// Copies tiles for a product along images: the numbers of two images side by side, channel by channel.
    fn arrange(variant: Variant, from: &[Self], to: &mut [Self]);
    fn of_mut(buffer: &mut Buffer) -> &mut [Self];
    /// `outputs (+)= Σ left · right`, or `Σ leftᵀ · right` with `TRANSPOSED`: see [`tiles`].
    fn product<const TRANSPOSED: bool>(
        session: &TileSession,
        left: &[Self],
        right: &[Self],
        product: &TileProduct,
        outputs: &mut [&mut [f32]],
    );
    /// [`product`](Self::product) without transposition, rounded to the type of the value.
    fn product_into(
        session: &TileSession,
        left: &[Self],
        right: &[Self],
        product: &TileProduct,
        output: &mut [Self],
        other: Option<&mut [Self]>,
    );
}

impl ValueElement for f32 {
    const CHUNK: usize = 16;
    const PRECISION: Precision = Precision::F32;
    const ARRANGED: bool = false;

    #[inline(always)]
    fn arrange_right(from: &[f32; TILE], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn near(value: f32) -> f32 {
        value
    }

    fn zeros() -> &'static [f32; TILE] {
        static ZEROS: [f32; TILE] = [0.; TILE];
        &ZEROS
    }

    fn within(memory: &mut [f32]) -> &mut [f32] {
        memory
    }

    fn of(buffer: &Buffer) -> &[f32] {
        buffer
    }

    fn arrange(_: Variant, from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn of_mut(buffer: &mut Buffer) -> &mut [f32] {
        buffer
    }

    fn product<const TRANSPOSED: bool>(
        session: &TileSession,
        left: &[f32],
        right: &[f32],
        product: &TileProduct,
        outputs: &mut [&mut [f32]],
    ) {
        tiles::product::<TRANSPOSED>(session, left, right, product, outputs);
    }

    fn product_into(
        session: &TileSession,
        left: &[f32],
        right: &[f32],
        product: &TileProduct,
        output: &mut [f32],
        other: Option<&mut [f32]>,
    ) {
        match other {
            None => f32::product::<false>(session, left, right, product, &mut [output]),
            Some(other) => {
                f32::product::<false>(session, left, right, product, &mut [output, other]);
            }
        }
    }
}

/// The bits of a bfloat16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Half(pub u16);

impl ValueElement for Half {
    const CHUNK: usize = usize::MAX;
    const PRECISION: Precision = Precision::Bf16;
    const ARRANGED: bool = true;

    #[inline(always)]
    fn arrange_right(from: &[f32; TILE], to: &mut [Half]) {
        let rows = from.chunks_exact(2 * SIDE).zip(to.chunks_exact_mut(2 * SIDE));
        for (from, to) in rows {
            for column in 0..SIDE {
                to[2 * column] = Half::narrow(from[column]);
                to[2 * column + 1] = Half::narrow(from[SIDE + column]);
            }
        }
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

    #[inline(always)]
    fn near(value: f32) -> Half {
        // The lower half of a NaN comes from stored numbers and is zero, so there is no carry.
        Half((value.to_bits().wrapping_add(0x8000) >> 16) as u16)
    }

    fn zeros() -> &'static [Half; TILE] {
        static ZEROS: [Half; TILE] = [Half(0); TILE];
        &ZEROS
    }

    fn within(memory: &mut [f32]) -> &mut [Half] {
        halves_within(memory)
    }

    fn of(buffer: &Buffer) -> &[Half] {
        buffer.halves()
    }

    fn arrange(variant: Variant, from: &[Half], to: &mut [Half]) {
        pair_images(variant, from, to);
    }

    fn of_mut(buffer: &mut Buffer) -> &mut [Half] {
        buffer.halves_mut()
    }

    fn product<const TRANSPOSED: bool>(
        session: &TileSession,
        left: &[Half],
        right: &[Half],
        product: &TileProduct,
        outputs: &mut [&mut [f32]],
    ) {
        tiles::product_of_halves::<TRANSPOSED>(session, left, right, product, outputs);
    }

    fn product_into(
        session: &TileSession,
        left: &[Half],
        right: &[Half],
        product: &TileProduct,
        output: &mut [Half],
        other: Option<&mut [Half]>,
    ) {
        let add = product.add;
        into_rounded(session, add, output, other, |outputs| match product.runs {
            [] if !add => outputs.iter_mut().for_each(|sums| sums.fill(0.)),
            _ => Half::product::<false>(session, left, right, product, outputs),
        });
    }
}

/// Calls `sum` with the sums of one or two outputs, which hold the outputs with `add` and arbitrary numbers without, and
/// rounds them.
fn into_rounded(
    session: &TileSession,
    add: bool,
    output: &mut [Half],
    other: Option<&mut [Half]>,
    sum: impl FnOnce(&mut [&mut [f32]]),
) {
    let variant = session.variant();
    session.with_sums(|sums, others| {
        let (sums, others) = (&mut sums[..output.len()], &mut others[..output.len()]);
        if add {
            tiles::widen(variant, output, sums);
        }
        match other {
            None => sum(&mut [&mut *sums]),
            Some(other) => {
                if add {
                    tiles::widen(variant, other, others);
                }
                sum(&mut [&mut *sums, &mut *others]);
                tiles::round(variant, others, other);
            }
        }
        tiles::round(variant, sums, output);
    });
}

/// [`tiles::product_of_strips`], rounded.
pub(crate) fn strips_into(
    session: &TileSession,
    left: &[Half],
    right: &[Half],
    product: &StripProduct,
    output: &mut [Half],
    other: Option<&mut [Half]>,
) {
    let add = product.add;
    into_rounded(session, add, output, other, |outputs| {
        tiles::product_of_strips(session, left, right, product, outputs);
    });
}

for_each_variant! {
    pub(crate) fn pair_images(from: &[Half], to: &mut [Half]) {
        let rows = from.chunks_exact(2 * SIDE).zip(to.chunks_exact_mut(2 * SIDE));
        for (from, to) in rows {
            for lane in 0..SIDE {
                to[2 * lane] = from[lane];
                to[2 * lane + 1] = from[SIDE + lane];
            }
        }
    }
}

/// Evaluates an expression in which a type name stands for the element of a precision.
macro_rules! by_precision {
    ($precision:expr, $number:ident => $body:expr) => {
        match $precision {
            $crate::Precision::F32 => {
                type $number = f32;
                $body
            }
            $crate::Precision::Bf16 => {
                type $number = $crate::element::Half;
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
        for (value, want) in [(1., 1.), (1. + 1. / 256., 1. + 1. / 128.), (-3.01, -3.015625)] {
            assert_eq!(Half::near(value).wide(), want, "{value}");
        }
        assert_eq!(Half::near(f32::INFINITY).wide(), f32::INFINITY);
        for nan in [0x7fc0, 0xffff, 0x7f81].map(|bits| Half(bits).wide()) {
            assert!(Half::near(nan).wide().is_nan() && Half::near(nan - 1.).wide().is_nan());
        }
        assert!(Half::narrow(f32::from_bits(0x7f80_0001)).wide().is_nan());
    }
}
