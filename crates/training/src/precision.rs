//! The number type of activations and products.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// What activations and products are computed in, as the key `precision` says it. Master weights,
/// accumulation, statistics and losses are f32 in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats with the exponent of f32.
    Bf16,
}

impl Precision {
    /// Checks that the layers can compute in it.
    ///
    /// # Errors
    ///
    /// They cannot.
    pub fn check(self) -> Result<()> {
        match self {
            Self::F32 => Ok(()),
            Self::Bf16 => bail!(
                "precision = \"bf16\": this program's layers compute in f32 alone; set \
                 precision = \"f32\""
            ),
        }
    }
}
