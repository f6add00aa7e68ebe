//! What a network can vary: the tables `backbone`, `projector` and `predictor` of an experiment.

use serde::{Deserialize, Serialize};

/// A residual network, as the table `backbone` of an experiment says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Architecture {
    /// How many residual blocks each of the four stages has.
    pub depth: Depth,
    /// Channels of the stem and the first stage; 64 is published. Each later stage doubles them,
    /// and blocks with a bottleneck give out four times as many.
    pub width: usize,
    /// What stands before the first stage.
    pub stem: Stem,
}

impl Architecture {
    /// Width D of the embedding: channels of the last stage.
    pub fn embedding_width(&self) -> usize {
        8 * self.width * self.depth.expansion()
    }
}

/// Residual blocks in the four stages, by the usual count of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Depth {
    /// One block a stage.
    #[serde(rename = "10")]
    Ten,
    /// Two blocks a stage.
    #[serde(rename = "18")]
    Eighteen,
    /// Three, four, six and three blocks.
    #[serde(rename = "34")]
    ThirtyFour,
    /// The same number of blocks, each with a bottleneck.
    #[serde(rename = "50")]
    Fifty,
}

impl Depth {
    /// Blocks of each stage.
    pub fn blocks(self) -> [usize; 4] {
        match self {
            Self::Ten => [1, 1, 1, 1],
            Self::Eighteen => [2, 2, 2, 2],
            Self::ThirtyFour | Self::Fifty => [3, 4, 6, 3],
        }
    }

    /// Whether blocks are two 3×3 convolutions or a 3×3 one between two 1×1.
    pub fn has_bottlenecks(self) -> bool {
        self == Self::Fifty
    }

    /// Channels that a block gives out for each of its 3×3 convolution.
    pub fn expansion(self) -> usize {
        if self.has_bottlenecks() { 4 } else { 1 }
    }
}

/// The layers before the first stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stem {
    /// 3×3 convolution, stride 1: for pictures of about 32 pixels and less.
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

/// The projector, as the table `projector` says it: linear, batch norm, ReLU, linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Projector {
    /// Width between its two linear layers; 4096 is published.
    pub hidden: usize,
    /// Width P of the projection; 256 is published.
    pub width: usize,
}

/// The predictor, as the table `predictor` says it: built like the projector, with projections
/// going in and predictions of the same width coming out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Predictor {
    /// Width between its two linear layers; 4096 is published.
    pub hidden: usize,
}
