//! Drives the real programs end to end on the CPU, as a person would: by arguments and files.
//!
//! It links none of them. [`Bench`] is a folder with pictures, an experiment and the runs on it;
//! [`pictures`] draws three classes of small pictures; [`tensors`] reads and writes tensor files
//! from their description alone, also wrong ones.

pub mod bench;
pub mod pictures;
pub mod tensors;

pub use bench::Bench;
