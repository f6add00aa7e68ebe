//! Drives the real programs end to end on the CPU, as a person would: by arguments and files.
//!
//! It links no stage. [`Bench`] is a folder with pictures, an experiment and the runs on it;
//! [`pictures`] draws three classes of small pictures, [`published`] a narrow network; [`tensors`] reads and writes tensor files
//! from their description alone, also wrong ones. [`fake`] is a folder for commands on stages that
//! compute nothing; [`trial`] disturbs the program and counts what goes wrong.

pub mod bench;
pub mod fake;
pub mod pictures;
pub mod published;
pub mod tensors;
#[cfg(unix)]
pub mod trial;

pub use bench::Bench;
