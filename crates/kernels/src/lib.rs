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
//! **Where the time goes.** `cargo xtask bench train -- --profile` prints it: parts of a step of BYOL, then
//! kind of layer × direction, with milliseconds, share of the processor's peak and bytes moved. On two
//! cores with AVX-512 and its bfloat16 products (Zen 5), in bf16, ResNet-18 @32, ResNet-34 @96 and @224:
//!
//! | | share of the time | share of the peak of products |
//! |---|---|---|
//! | 3×3 stride 1, forward and input gradient | 45 to 46 % | 89 to 113 % |
//! | 3×3 stride 1, gradient of the weights | 24 to 27 % | 54 to 70 % |
//! | 3×3 stride 2, all | 5 to 12 % | 49 to 78 % |
//! | batch norm | 5 to 7 % | (28 to 39 GB/s) |
//! | weights, arranged anew | 4 to 7 % | |
//! | stem, 3×3 or 7×7 | 1 to 6 % | 20 to 37 % |
//! | 1×1 stride 2 | 1 to 3 % | 26 to 41 % |
//!
//! More than 100 % is Winograd's form (`convolution/winograd.rs`), which 3×3 convolutions of stride 1 take
//! on maps of at least 6 pixels a side: 16 products, counted as the 36 of the plain sum. Next would be the
//! gradient of the weights, whose form in bf16 is the plain sum; the stem, whose three channels fill 3 of
//! 4 places and 3 of 16 of the memory (four pixels of a square side by side would fill 12); and batch norm's
//! sums, which could be taken where the gradient is made.
//!
//! **Memory safety.** All tests of this crate pass under AddressSanitizer, each variant of the processor
//! and the emulation of AMX included, in about two minutes:
//! `RUSTFLAGS=-Zsanitizer=address cargo +nightly test -p kernels --lib --target x86_64-unknown-linux-gnu`.
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
mod element;
pub mod flat;
pub mod image;
mod layout;
pub mod linear;
pub mod norm;
mod pages;
mod parallel;
mod peak;
pub mod pooling;
#[expect(unsafe_code, reason = "the vector instructions of a processor")]
pub mod similarity;
mod tiles;
mod variant;

pub use buffer::{Buffer, BufferPool};
pub use element::Precision;
pub use layout::Shape;
pub use pages::zeros;
pub use parallel::{on_workers, threads};
pub use peak::peak;
pub use variant::Variant;
