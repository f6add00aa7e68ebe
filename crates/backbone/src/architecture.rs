//! The tables `backbone`, `projector` and `predictor` of an experiment.

use serde::{Deserialize, Serialize};

/// A residual network: the table `backbone` of an experiment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Architecture {
    /// Residual blocks in each of the four stages.
    pub depth: Depth,
    /// Channels of the stem and the first stage; 64 is published. Each later stage doubles them, and blocks
    /// with a bottleneck output four times as many.
    pub width: usize,
    /// The layers before the first stage.
    pub stem: Stem,
}

impl Architecture {
    /// Width D of the embedding: the channels of the last stage.
    pub fn embedding_width(&self) -> usize {
        8 * self.width * self.depth.expansion()
    }
}

/// Residual blocks in the four stages, named by the usual count of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Depth {
    /// One block per stage.
    #[serde(rename = "10")]
    Ten,
    /// Two blocks per stage.
    #[serde(rename = "18")]
    Eighteen,
    /// Three, four, six and three blocks.
    #[serde(rename = "34")]
    ThirtyFour,
    /// As many blocks as 34, with bottlenecks.
    #[serde(rename = "50")]
    Fifty,
}

impl Depth {
    /// The number of blocks of each stage.
    pub fn blocks(self) -> [usize; 4] {
        match self {
            Self::Ten => [1, 1, 1, 1],
            Self::Eighteen => [2, 2, 2, 2],
            Self::ThirtyFour | Self::Fifty => [3, 4, 6, 3],
        }
    }

    /// Whether a block is a 3×3 convolution between two 1×1 ones, not two 3×3 ones.
    pub fn has_bottlenecks(self) -> bool {
        self == Self::Fifty
    }

    /// Output channels of a block per channel of its 3×3 convolution.
    pub fn expansion(self) -> usize {
        if self.has_bottlenecks() { 4 } else { 1 }
    }
}

/// The layers before the first stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stem {
    /// 3×3 convolution, stride 1: for images of up to about 32 pixels.
    #[serde(rename = "3x3")]
    Plain,
    /// 3×3 convolution, then a 2×2 max-pool of stride 2 without padding.
    #[serde(rename = "3x3-pool")]
    Pool,
    /// 3×3 convolution, then a 2×2 max-pool of stride 2 with padding 1.
    #[serde(rename = "3x3-pool-padded")]
    PoolPadded,
    /// 7×7 convolution of stride 2, then a 3×3 max-pool of stride 2 with padding 1: ImageNet's.
    #[serde(rename = "7x7")]
    Large,
}

/// The projector: the table `projector`. Linear, batch norm, ReLU, linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Projector {
    /// Width between its two linear layers; 4096 is published.
    pub hidden: usize,
    /// Width P of the projection; 256 is published.
    pub width: usize,
}

/// The predictor: the table `predictor`. Built like the projector, from projections to predictions of the
/// same width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Predictor {
    /// Width between its two linear layers; 4096 is published.
    pub hidden: usize,
}
