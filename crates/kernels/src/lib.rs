//! The machine: what a network's layers cost in time is decided here.
//!
//! Products of tiles, convolutions, batch norm, pooling, updates of flat parameter buffers and
//! [rows of pictures](image). What decides the time is written once in plain Rust and once more per
//! instruction set that is worth it, chosen when the program runs ([`Variant`]). Nearly all `unsafe`
//! of the workspace lives in this crate. It knows no network, no parameter's name and no training:
//! `layers` puts its functions together.
//!
//! Values inside a network live in a layout of this crate's choice ([`Shape`]); its users hold them
//! in a [`Buffer`] and never index into it.
//!
//! **Same bits on any number of threads.** Every sum over images or pixels is cut into parts by the
//! shape of the data alone, each part is summed by one thread in a fixed order, and the parts are
//! added in a fixed order. The number of threads decides who does a part, never what a part is.

//!
//! **Where the time goes.** The example `speed` of `layers` prints it: kind of layer × direction, with
//! milliseconds, share of the processor's peak and bytes moved. On one core with AVX-512 and its
//! bfloat16 products (Zen 5), ResNet-18 on 32 × 32 pictures in bf16: 3×3 convolutions of stride 1 run at
//! 89 % of the peak forward and for the input gradient and at 74 % for the weights' gradient, those of
//! stride 2 at 88, 85 and 64 %, 1×1 and the three channels of a picture at 20 to 67 %; products are
//! 92 % of the time, batch norm 4 %, weights arranged anew 3 %. In f32 the same 3×3 convolutions take
//! 16 multiplications where the plain sum has 36 (`convolution/winograd.rs`), except on maps of less
//! than 6 pixels a side. Next would be: the weights' gradient, whose sums are loaded and stored once
//! for every 8 pixels; and the 7×7 stem, where three channels fill 3 of 4 places in bf16.
//!
//! **AMX** ([`Variant`] `amx`, chosen where it is found) has not run on a processor yet and no time of it
//! is known: see `tiles/amx.rs` for what was tested, and how a unit that computes something else is
//! left alone. Its tiles are filled by half along the inner side, since blocks have 16 channels.

mod buffer;
pub mod convolution;
#[cfg(any(test, feature = "cuda"))]
#[expect(unsafe_code, reason = "kernels on a GPU, and as C in tests")]
pub mod cuda;
#[cfg(feature = "cudnn")]
#[expect(unsafe_code, reason = "memory of a GPU, and cuDNN's calls on it")]
pub mod cudnn;
pub mod flat;
pub mod image;
mod layout;
pub mod linear;
pub mod norm;
mod number;
mod pages;
mod parallel;
mod peak;
pub mod pooling;
#[expect(unsafe_code, reason = "the vector instructions of a processor")]
pub mod similarity;
mod tiles;
mod variant;

pub use buffer::{Buffer, Pool};
pub use layout::Shape;
pub use number::Precision;
pub use pages::zeros;
pub use parallel::{on_workers, threads};
pub use peak::peak;
pub use variant::Variant;
