//! Shared by the programs behind `cargo xtask bench`: runs ours and peers in turn, and prints a table.
//!
//! A program `bench-<what>` is a binary of the crate that owns the work. For each of its works it
//! starts two or more *sides*, each in its own process: itself again for ours, see [`Side::ours`],
//! and a Python for each peer, see [`Peers`]. A side prepares its work, does it once to warm up, and
//! then waits. [`compare`] lets the sides take turns, round by round, so that a slow minute of the
//! machine affects all of them. Peak memory is measured per process, so per side.
//!
//! A [`Comparison`] holds the medians over the rounds, and the median, smallest and largest of the
//! rounds' ratios. A ratio above 1 means that ours is faster, whatever the unit. [`ComparisonTable`] prints the
//! comparisons one by one, and with `--json` one object at the end:
//!
//! ```json
//! {"rows": [{"work": "…", "unit": "images/s", "ours": 0, "peer": 0, "ratio": 0, "ratio-min": 0,
//!            "ratio-max": 0, "processor-ratio": 0, "peak-mb": 0, "peer-peak-mb": 0,
//!            "peer-name": "…", "peer-note": "…"}]}
//! ```
//!
//! with `null` if there is no peer, and further keys of the work. The [`Machine`] is printed first, and stands
//! in the object too. With `--history FILE` each row is appended to a [`History`], and the last one of
//! the same work stands beside it.
//!
//! This crate knows no work.

mod comparison;
mod history;
mod machine;
pub mod photograph;
mod side;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::available_parallelism;

use anyhow::Result;

pub use comparison::{BenchUnit, Comparison, ComparisonTable, compare};
pub use history::History;
pub use machine::Machine;
pub use side::{Measurement, Peers, Side, missing_packages, peak_megabytes, serve};

/// The arguments that every bench program takes.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArguments {
    /// Python to compare with. The program names the packages that it lacks.
    #[arg(long, value_name = "PATH")]
    pub peer_python: Option<PathBuf>,
    /// Print the rows as one JSON object at the end.
    #[arg(long)]
    pub json: bool,
    /// Run only the works whose name contains this.
    #[arg(long, value_name = "WORD", default_value = "")]
    pub only: String,
    /// Measurements of each side.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub rounds: u64,
    /// Threads of each side; by default one per processor.
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZero<usize>>,
    /// Append each row to this file, and print the last ratio of the same work on this processor beside it.
    #[arg(long, value_name = "FILE", requires = "commit")]
    pub history: Option<PathBuf>,
    /// The commit that is measured.
    #[arg(long, value_name = "HASH")]
    pub commit: Option<String>,
}

impl BenchArguments {
    /// Returns the number of threads of each side.
    pub fn threads(&self) -> usize {
        self.threads.or_else(|| available_parallelism().ok()).map_or(1, NonZero::get)
    }

    /// Tests whether `--only` selects a work of this name.
    pub fn wants(&self, work: &str) -> bool {
        work.contains(&self.only)
    }
}

/// Prints the error of a bench program, and returns the exit status.
pub fn exit(name: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::from(2)
        }
    }
}
