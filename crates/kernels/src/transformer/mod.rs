//! Forward kernels of transformers: linear layers with their last steps, layer norm, attention.
//!
//! Tokens are f32 rows. What a product reads is stored as [`Factors`], in tiles of 16 × 16; its weights are
//! packed once, as a [`PackedLinear`]. Sums, norms and softmax are f32 in both precisions.
//!
//! A call runs on one thread: the caller gives each thread pictures of its own. Every output number is a
//! sum in an order that depends on the widths alone. So the numbers of a picture are the same bits in any
//! batch and on any number of threads.

mod activation;
mod attention;
mod factors;
mod linear;
mod norm;

pub use activation::{Gelu, exp};
pub use attention::{Attention, Rotation, TokenRows, attention};
pub use factors::Factors;
pub use linear::{LinearOutput, PackedLinear, Spread, linear};
pub use norm::{LayerNorm, layer_norm, layer_norm_in_place};

use crate::{Precision, Variant};

/// How this variant stores factors when `wanted` is asked for: as bf16 only where it has instructions for
/// products of bf16. Elsewhere f32 is as fast, and more exact.
pub fn factor_precision(variant: Variant, wanted: Precision) -> Precision {
    if multiplies_bf16(variant) { wanted } else { Precision::F32 }
}

fn multiplies_bf16(variant: Variant) -> bool {
    match variant.instructions() {
        #[cfg(target_arch = "x86_64")]
        crate::variant::Instructions::Avx512Bf16
        | crate::variant::Instructions::Amx
        | crate::variant::Instructions::AmxEmulated => true,
        _ => false,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Numbers in [−1, 1) that look random.
    pub(crate) fn noise(seed: u32, len: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608. - 1.
        };
        (0..len).map(|_| next()).collect()
    }

    /// Every testable variant with each precision in which it stores factors.
    pub(super) fn ways() -> Vec<(Variant, Precision)> {
        let all = Variant::testable().into_iter();
        let pairs = all.flat_map(|v| [Precision::F32, Precision::Bf16].map(|p| (v, p)));
        pairs.filter(|(v, p)| factor_precision(*v, *p) == *p).collect()
    }

    /// The number as a factor of this precision.
    pub(super) fn rounded(precision: Precision, value: f32) -> f64 {
        match precision {
            Precision::F32 => f64::from(value),
            Precision::Bf16 => half::bf16::from_f32(value).to_f64(),
        }
    }

    #[test]
    fn only_variants_with_bf16_products_store_bf16() {
        assert_eq!(factor_precision(Variant::PORTABLE, Precision::Bf16), Precision::F32);
        let emulated = Variant::testable().into_iter().find(|v| v.name() == "amx-emulated");
        if let Some(emulated) = emulated {
            assert_eq!(factor_precision(emulated, Precision::Bf16), Precision::Bf16);
        }
    }
}
