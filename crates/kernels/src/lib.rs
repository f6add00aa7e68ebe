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

mod buffer;
pub mod convolution;
pub mod flat;
pub mod image;
mod layout;
pub mod linear;
pub mod norm;
mod number;
mod pages;
mod parallel;
pub mod pooling;
#[expect(unsafe_code, reason = "the vector instructions of a processor")]
pub mod similarity;
mod tiles;
mod variant;

pub use buffer::{Buffer, Pool};
pub use layout::Shape;
pub use number::Precision;
pub use pages::zeros;
pub use parallel::on_workers;
pub use variant::Variant;
