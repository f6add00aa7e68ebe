//! What varies between published Vision Transformers, and the tensors that follow from it.

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

/// Channels of a picture: red, green and blue.
pub const CHANNELS: usize = 3;

/// The largest extent of a plan: far above every published one, and a product of four fits into 64 bits.
const LARGEST: usize = 1 << 15;

/// A Vision Transformer without its numbers (Dosovitskiy et al. 2021, arXiv:2010.11929): covers DINO,
/// DINOv2 with and without registers, DINOv3, MSN, and the vision towers of CLIP and SigLIP.
///
/// With tokens `t`, of which `t = [class, registers, patches]`, every block computes
///
/// `t = t + λ₁ ⊙ A(LN₁(t))`, `t = t + λ₂ ⊙ M(LN₂(t))`,
///
/// where `A` is attention in [`heads`](Self::heads) heads and `M` is the [`Mlp`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TransformerPlan {
    /// Side of a square patch, in pixels.
    pub patch_pixels: usize,
    /// Whether the patch embedding has a bias; CLIP's has none.
    pub patch_bias: bool,
    /// Width `d` of a token.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads of each block, each `d / heads` wide.
    pub heads: usize,
    /// Whether the linear layer that makes the keys has a bias; DINOv3's has none.
    pub key_bias: bool,
    /// The second half of a block.
    pub mlp: Mlp,
    /// Whether a block scales what it adds by a vector, `λ₁` and `λ₂` (LayerScale, arXiv:2103.17239).
    pub layer_scale: bool,
    /// Whether a class token comes first.
    pub class_token: bool,
    /// Register tokens between class token and patches (arXiv:2309.16588).
    pub registers: usize,
    /// How a token knows the position of its patch.
    pub positions: Positions,
    /// Whether a layer norm over all tokens comes before the blocks, as in CLIP.
    pub pre_norm: bool,
    /// The tokens that the last layer norm covers.
    pub final_norm: FinalNorm,
    /// `ε` of every layer norm.
    pub epsilon: f64,
    /// Whether a learned query pools the tokens by attention, as in SigLIP.
    pub attention_pooling: bool,
    /// Width of a linear map of the class token, as in CLIP.
    pub projection: Option<usize>,
}

/// The second half of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", deny_unknown_fields, rename_all = "kebab-case")]
pub enum Mlp {
    /// `down(f(up(x)))`.
    Plain {
        /// Width between the two linear layers.
        hidden: usize,
        /// `f`.
        activation: Activation,
    },
    /// `down(silu(gate(x)) ⊙ up(x))` (SwiGLU, arXiv:2002.05202).
    Gated {
        /// Width of gate and up.
        hidden: usize,
    },
}

impl Mlp {
    /// The width before the last linear layer.
    pub fn hidden(self) -> usize {
        match self {
            Mlp::Plain { hidden, .. } | Mlp::Gated { hidden } => hidden,
        }
    }
}

/// A form of GELU (arXiv:1606.08415).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `x Φ(x)`, with the distribution function of the normal distribution.
    GeluErf,
    /// `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2`.
    GeluTanh,
    /// `x σ(1.702 x)`.
    GeluQuick,
}

/// How a token knows the position of its patch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", deny_unknown_fields, rename_all = "kebab-case")]
pub enum Positions {
    /// A learned vector per patch is added to its token.
    Absolute {
        /// Side of the square grid of learned vectors.
        grid: usize,
        /// How the vectors are resampled to another grid.
        resampling: Resampling,
    },
    /// Queries and keys of patches are rotated (arXiv:2104.09864).
    Rotary {
        /// `θ`, which spaces the frequencies `θ^(−4m/e)` for heads of width `e`.
        base: f64,
    },
}

/// A rule by which learned positions are resampled from a grid of side `M` to one of side `g`: bicubic in
/// each, with other kernels and other source coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resampling {
    /// Source `(i + ½) M/g − ½`, kernel with a = −0.75, four taps: transformers' `dinov2`, `vit`, `clip`
    /// and `siglip`.
    Size,
    /// Source `(i + ½) M/(g + 0.1) − ½`, otherwise as [`Size`](Self::Size): the original code of DINO and
    /// of DINOv2 without registers.
    Offset,
    /// Kernel with a = −0.5, stretched by M/g where that is above 1: timm, and transformers'
    /// `dinov2_with_registers`.
    Antialias,
}

/// The tokens that the last layer norm covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FinalNorm {
    /// All of them.
    AllTokens,
    /// The class token; the patches stay as the last block left them.
    ClassToken,
}

/// The name and the shape of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransformerTensor {
    /// The name, such as `blocks.0.q.weight`.
    pub name: String,
    /// The extents.
    pub shape: Vec<usize>,
}

impl TransformerPlan {
    /// The width of one attention head, `e`.
    pub fn head_width(&self) -> usize {
        self.width / self.heads
    }

    /// Tokens before the first patch.
    pub fn prefix(&self) -> usize {
        usize::from(self.class_token) + self.registers
    }

    /// The width of the [feature](crate::TransformerOutput::feature).
    pub fn feature_width(&self) -> usize {
        self.projection.unwrap_or(self.width)
    }

    /// Rows and columns of patches in a picture of this size.
    ///
    /// # Errors
    ///
    /// A side is not a multiple of the patch, so that pixels would be dropped.
    pub fn patch_grid(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let p = self.patch_pixels;
        let divides = |side: usize| side > 0 && side.is_multiple_of(p);
        if !divides(height) || !divides(width) {
            bail!(
                "a picture of {height} × {width} pixels does not divide into patches of {p} × {p}; \
                 resize it to multiples of {p}"
            )
        }
        Ok((height / p, width / p))
    }

    /// Checks that the values fit together.
    ///
    /// # Errors
    ///
    /// A value is 0 or too large, or two values contradict each other. The error names them.
    pub fn check(&self) -> Result<()> {
        let absolute = match self.positions {
            Positions::Absolute { grid, .. } => grid,
            Positions::Rotary { .. } => 1,
        };
        let counts = [
            ("patch-pixels", self.patch_pixels, 1),
            ("width", self.width, 1),
            ("depth", self.depth, 1),
            ("heads", self.heads, 1),
            ("mlp.hidden", self.mlp.hidden(), 1),
            ("registers", self.registers, 0),
            ("positions.grid", absolute, 1),
            ("projection", self.projection.unwrap_or(1), 1),
        ];
        for (name, value, least) in counts {
            if !(least..=LARGEST).contains(&value) {
                bail!("transformer: {name} is {value}, and must be from {least} to {LARGEST}")
            }
        }
        if !self.width.is_multiple_of(self.heads) {
            bail!("transformer: width {} does not divide into {} heads", self.width, self.heads)
        }
        if !(self.epsilon > 0. && self.epsilon < 1.) {
            bail!("transformer: epsilon is {}, and must be above 0 and below 1", self.epsilon)
        }
        if let Positions::Rotary { base } = self.positions {
            if !(base.is_finite() && base > 1.) {
                bail!("transformer: the rotary base is {base}, and must be above 1")
            }
            if !self.head_width().is_multiple_of(4) {
                bail!(
                    "transformer: rotary positions need a head width that is a multiple of 4, and it is {}",
                    self.head_width()
                )
            }
        }
        self.check_output()
    }

    fn check_output(&self) -> Result<()> {
        let needs_class = self.projection.is_some() || self.final_norm == FinalNorm::ClassToken;
        if needs_class && !self.class_token {
            bail!("transformer: a projection or a norm of the class token needs a class token")
        }
        if self.attention_pooling && self.projection.is_some() {
            bail!("transformer: attention pooling and a projection exclude each other")
        }
        if self.attention_pooling && self.final_norm == FinalNorm::ClassToken {
            bail!(
                "transformer: attention pooling reads all tokens, so the final norm must cover them"
            )
        }
        if self.attention_pooling && matches!(self.mlp, Mlp::Gated { .. }) {
            bail!("transformer: attention pooling has a plain MLP, but the blocks' is gated")
        }
        Ok(())
    }

    /// The tensors of the network, in a fixed order. Linear weights are (outputs, inputs).
    ///
    /// | name | shape | meaning |
    /// |---|---|---|
    /// | `cls` | (d) | class token, with its learned position added |
    /// | `registers` | (r, d) | register tokens |
    /// | `positions` | (M², d) | learned positions of the patches, row by row |
    /// | `patch.weight`, `.bias` | (d, 3, p, p), (d) | patch embedding; channel, row, column |
    /// | `pre.weight`, `.bias` | (d) | norm before the blocks |
    /// | `blocks.i.norm1`, `norm2` | (d) | norms of block i, `.weight` and `.bias` each |
    /// | `blocks.i.q`, `k`, `v`, `out` | (d, d), (d) | attention |
    /// | `blocks.i.scale1`, `scale2` | (d) | `λ₁`, `λ₂` |
    /// | `blocks.i.gate`, `up`, `down` | (h, d), (h, d), (d, h) | MLP; `gate` where it is gated |
    /// | `norm` | (d) | final norm |
    /// | `pool.query`, `pool.q` … | (d), as a block's | attention pooling: query, `q`, `k`, `v`, `out`, `norm`, `up`, `down` |
    /// | `projection.weight` | (P, d) | projection, without bias |
    pub fn tensors(&self) -> Vec<TransformerTensor> {
        let (d, p) = (self.width, self.patch_pixels);
        let mut list = TensorList(vec![]);
        if self.class_token {
            list.push("cls", &[d]);
        }
        if self.registers > 0 {
            list.push("registers", &[self.registers, d]);
        }
        if let Positions::Absolute { grid, .. } = self.positions {
            list.push("positions", &[grid * grid, d]);
        }
        list.push("patch.weight", &[d, CHANNELS, p, p]);
        if self.patch_bias {
            list.push("patch.bias", &[d]);
        }
        if self.pre_norm {
            list.norm("pre", d);
        }
        for block in 0..self.depth {
            self.block(&mut list, &format!("blocks.{block}."));
        }
        list.norm("norm", d);
        if self.attention_pooling {
            list.push("pool.query", &[d]);
            for name in ["q", "k", "v", "out"] {
                list.linear(&format!("pool.{name}"), d, d, true);
            }
            list.norm("pool.norm", d);
            list.linear("pool.up", self.mlp.hidden(), d, true);
            list.linear("pool.down", d, self.mlp.hidden(), true);
        }
        if let Some(width) = self.projection {
            list.linear("projection", width, d, false);
        }
        list.0
    }

    fn block(&self, list: &mut TensorList, at: &str) {
        let (d, hidden) = (self.width, self.mlp.hidden());
        list.norm(&format!("{at}norm1"), d);
        for (name, bias) in [("q", true), ("k", self.key_bias), ("v", true), ("out", true)] {
            list.linear(&format!("{at}{name}"), d, d, bias);
        }
        if self.layer_scale {
            list.push(&format!("{at}scale1"), &[d]);
        }
        list.norm(&format!("{at}norm2"), d);
        if let Mlp::Gated { .. } = self.mlp {
            list.linear(&format!("{at}gate"), hidden, d, true);
        }
        list.linear(&format!("{at}up"), hidden, d, true);
        list.linear(&format!("{at}down"), d, hidden, true);
        if self.layer_scale {
            list.push(&format!("{at}scale2"), &[d]);
        }
    }
}

struct TensorList(Vec<TransformerTensor>);

impl TensorList {
    fn push(&mut self, name: &str, shape: &[usize]) {
        self.0.push(TransformerTensor { name: name.to_owned(), shape: shape.to_vec() });
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.push(&format!("{name}.weight"), &[width]);
        self.push(&format!("{name}.bias"), &[width]);
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool) {
        self.push(&format!("{name}.weight"), &[outputs, inputs]);
        if bias {
            self.push(&format!("{name}.bias"), &[outputs]);
        }
    }
}
