//! The contract of a stage: what every program of `assort` shares with every other.
//!
//! A [`Stage`] turns files into files. This crate holds what makes the stages one family, whatever
//! they compute: what a stage [declares](Spec), the [arguments](StageArguments) of its program, the
//! [`Experiment`] with one table for each stage, the exit [`Status`], the [`container`] that every
//! tensor file is written in, the counter-based [randomness](random) that makes a run
//! bit-identical on any number of threads, [interrupts](Interrupt) and [`progress`].
//!
//! It knows no image, no network and no method.
//!
//! ```
//! use anyhow::Result;
//! use serde::{Deserialize, Serialize};
//! use stage::{Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};
//!
//! /// Puts each picture into the cluster of its number: an ablation that must lose.
//! pub struct InTurns;
//!
//! /// The table `[in-turns]` of the experiment.
//! #[derive(Debug, Serialize, Deserialize)]
//! #[serde(deny_unknown_fields, rename_all = "kebab-case")]
//! pub struct Config {
//!     /// Pictures that are skipped before the first.
//!     pub offset: u32,
//! }
//!
//! impl Stage for InTurns {
//!     const SPEC: Spec = Spec {
//!         name: "in-turns",
//!         algorithm: 1,
//!         inputs: &[Role::new("embeddings", Origin::Embeddings)],
//!         outputs: &[Output::PseudoLabels],
//!         ranks: Ranks::One,
//!     };
//!     type Config = Config;
//!
//!     fn check(_: &Config, _: &Job) -> Result<Effort> {
//!         Ok(Effort::NONE)
//!     }
//!
//!     fn run(config: &Config, job: &Job) -> Result<()> {
//!         let folder = job.input("embeddings")?;
//!         tracing::info!("reading `{}` from {}", folder.display(), config.offset);
//!         job.interrupt.check()
//!     }
//! }
//! # tracing::info!("{:?}", stage::Program::of::<InTurns>().spec);
//!
//! // An executable of its own: `fn main() -> ExitCode { stage::main::<InTurns>() }`.
//! ```

mod arguments;
mod change;
mod claim;
pub mod console;
pub mod container;
mod contract;
mod data_table;
pub mod digest;
mod event_file;
mod experiment;
pub mod files;
pub mod finished;
mod interrupt;
mod job;
pub mod json;
mod library;
mod memory;
mod program;
pub mod progress;
pub mod random;
mod shared;
mod status;

/// Whether this program is built with MPI, by which several processes share a training.
pub const HAS_MPI: bool = cfg!(feature = "mpi");

pub use arguments::{DeviceChoice, StageArguments};
pub use claim::Claim;
pub use contract::{Effort, Origin, Output, PictureCost, Ranks, Role, Spec, Stage};
pub use data_table::{DataTable, Split};
pub use event_file::EVENTS;
pub use experiment::{Experiment, Rounds};
pub use finished::DONE;
pub use interrupt::{HELD_BY_STDIN, Interrupt};
pub use job::Job;
pub use library::{FOLDER, Library};
pub use program::{Program, main};
pub use status::{Diverged, ERROR_FILE, Interrupted, MachineFailed, Status, finish};
