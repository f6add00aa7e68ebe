//! What the programs behind `cargo xtask bench` share: ours and peers take turns, and one table says
//! what came of it.
//!
//! A program `bench-<what>` is a binary of the crate that owns the work. It has a list of works; for
//! each it starts two or more *sides*, processes of their own: itself again for ours, see
//! [`Side::ours`], and a Python for each peer, see [`Peers`]. A side prepares its work, does it once
//! to warm up, and then waits. [`compare`] lets the sides take turns, round by round, so that a slow
//! minute of the machine hits all of them; peak memory is that of one side, because a process is.
//!
//! What is said of a work is a [`Row`]: medians over the rounds, and the ratio of each round, its
//! median with the least and the most. A ratio above 1 says that ours is faster, whatever the unit.
//! [`Report`] prints rows as they come, and with `--json` one object at the end:
//!
//! ```json
//! {"rows": [{"work": "…", "unit": "images/s", "ours": 0, "peer": 0, "ratio": 0, "ratio-min": 0,
//!            "ratio-max": 0, "processor-ratio": 0, "peak-mb": 0, "peer-peak-mb": 0,
//!            "peer-name": "…", "peer-note": "…"}]}
//! ```
//!
//! with `null` where there is no peer, and further keys that a work has of its own.
//!
//! This crate knows no work.

mod row;
mod side;

use std::num::NonZero;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::available_parallelism;

use anyhow::Result;

pub use row::{Report, Row, Unit, compare};
pub use side::{Measurement, Peers, Side, peak_megabytes, serve};

/// The arguments that every bench program takes.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// A Python to compare with; it needs the packages that the program names when they are not
    /// there.
    #[arg(long, value_name = "PATH")]
    pub peer_python: Option<PathBuf>,
    /// Print, last, the rows as one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Only the works whose name contains this.
    #[arg(long, value_name = "WORD", default_value = "")]
    pub only: String,
    /// Measurements of each side.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub rounds: u64,
    /// Threads of each side; as many as there are processors when not given.
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZero<usize>>,
}

impl Arguments {
    /// Threads of each side.
    pub fn threads(&self) -> usize {
        self.threads.or_else(|| available_parallelism().ok()).map_or(1, NonZero::get)
    }

    /// Whether a work of this name is asked for.
    pub fn wants(&self, work: &str) -> bool {
        work.contains(&self.only)
    }
}

/// The exit status of a bench program; its error goes to stderr.
pub fn exit(name: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {error:#}");
            ExitCode::from(2)
        }
    }
}
