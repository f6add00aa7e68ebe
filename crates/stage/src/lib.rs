//! The contract of a stage program: what every program of `assort` shares with every other.
//!
//! A stage is a program with files in and files out. This crate holds what makes them one family,
//! whatever they compute: the [arguments](Arguments), how a program [reads its own
//! table](Experiment::table) of the experiment file, its [exit status](run_program), the
//! [container] every tensor file is written in, the [counter-based randomness](random) that makes
//! a run the same on any number of threads, and the [progress] a person sees.
//!
//! It knows no image, no network and no method. To write a stage, see [`run_program`].

mod arguments;
pub mod container;
mod experiment;
pub mod files;
mod memory;
mod program;
pub mod progress;
pub mod random;

pub use arguments::{Arguments, DeviceChoice};
pub use experiment::{DataTable, Experiment, Split};
pub use program::{DONE, Diverged, Interrupted, Stage, exit_code, run_program, start_logging};
