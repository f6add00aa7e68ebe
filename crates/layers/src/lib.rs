//! The layers of a network, forward and backward: safe, explicit, bit-identical for any number of
//! threads.
//!
//! A [`Network`] is an immutable plan, assembled with a [`Builder`]: blocks of convolutions, batch
//! norms, pools and linear layers, with residual sums. It holds no numbers. Those are in
//! [`Parameters`], [`Gradients`], [`Statistics`] and [`Tape`]s, which the network creates:
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use candle_core::{Device, Tensor};
//! use layers::{BatchNorm, Builder, Convolution, Mode, Modes, Sgd};
//!
//! let mut b = Builder::images(3);
//! b.block("stem");
//! let input = b.input();
//! let c = Convolution { out_channels: 16, kernel: 3, stride: 1, padding: 1 };
//! let z = b.convolution("conv1", input, c)?;
//! let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
//! let y = b.batch_norm("bn1", z, norm)?;
//! let embedding = b.global_average_pool(y)?;
//! let network = b.finish(embedding)?;
//!
//! let (mut parameters, mut gradients) = (network.parameters(), network.gradients());
//! let (mut statistics, mut momenta) = (network.statistics(), network.momenta());
//! let modes = Modes::all(&network, Mode::Batch);
//! let mut tape = network.tape();
//!
//! let pictures = Tensor::ones((2, 8, 8, 3), candle_core::DType::F32, &Device::Cpu)?;
//! let output = network.forward(&parameters, &mut statistics, &pictures, &modes, Some(&mut tape))?;
//! let gradient = output.ones_like()?; // Of the loss: in a real step, from candle's autograd.
//! network.backward(&parameters, &mut tape, &gradient, &mut gradients, false)?;
//! let sgd = Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 5e-4 };
//! parameters.sgd(&gradients, &mut momenta, sgd)?;
//! gradients.zero();
//! # Ok(())
//! # }
//! ```
//!
//! The output is detached. A caller wraps it in a `Var`, lets candle differentiate the loss, and
//! passes the gradient to [`Network::backward`]. A step may hold any number of tapes, of any input
//! sizes; their gradients add.
//!
//! A network computes on the CPU with the kernels of the crate `kernels`, and with [`Network::on`] on
//! any other candle device. To see where the time goes, use [`profile`].
//!
//! A [`Transformer`] is a Vision Transformer for inference, with the numbers of a published checkpoint. Its
//! [`TransformerPlan`] has a switch for all that differs between the published families:
//!
//! ```
//! use layers::{Activation, FinalNorm, Mlp, Positions, Resampling, TransformerPlan};
//!
//! let dinov2_small = TransformerPlan {
//!     patch_pixels: 14,
//!     patch_bias: true,
//!     width: 384,
//!     depth: 12,
//!     heads: 6,
//!     key_bias: true,
//!     mlp: Mlp::Plain { hidden: 1536, activation: Activation::GeluErf },
//!     layer_scale: true,
//!     class_token: true,
//!     registers: 0,
//!     positions: Positions::Absolute { grid: 37, resampling: Resampling::Size },
//!     pre_norm: false,
//!     final_norm: FinalNorm::AllTokens,
//!     epsilon: 1e-6,
//!     attention_pooling: false,
//!     projection: None,
//! };
//! dinov2_small.check().expect("values that fit together");
//! assert_eq!(dinov2_small.tensors()[0].name, "cls");
//! ```
//!
//! A batch may be divided into groups that several processes share: see [`BatchGroups`].
//!
//! This crate knows no other architecture, no file, no loss and no schedule.

mod backend;
mod backward;
mod block_sums;
mod flat;
mod forward;
mod groups;
mod inference;
mod modes;
mod multiply_adds;
mod network;
mod parameters;
mod plan;
pub mod profile;
mod statistics;
mod tape;
mod transformer;

pub use flat::{EntryKind, TensorEntry};
pub use groups::BatchGroups;
pub use inference::Inference;
pub use kernels::flat::{Adam, Sgd};
pub use kernels::{Precision, Variant};
pub use modes::{Mode, Modes};
pub use multiply_adds::MultiplyAdds;
pub use network::{BatchNorm, Builder, Convolution, Network, Pool, Value};
pub use parameters::{AdamMoments, Gradients, Momenta, Parameters};
pub use statistics::Statistics;
pub use tape::Tape;
pub use transformer::{
    Activation, FinalNorm, Mlp, Positions, Resampling, TokensAfter, Transformer, TransformerOutput,
    TransformerPlan, TransformerTensor, TransformerWeights,
};
