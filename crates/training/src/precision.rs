//! The number type of activations and products.

use serde::{Deserialize, Serialize};

/// The number type of activations and products: the key `precision`. Master weights
/// and their gradients, accumulation, statistics and losses are f32 in either case, so that a
/// network file fits both.
///
/// Runs end with the same scores in both; `crates/kernels/README.md` has the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the exponent of f32 and 8 bits of mantissa.
    Bf16,
}

impl From<Precision> for layers::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}
