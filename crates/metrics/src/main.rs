//! The program `metrics`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::run_program("metrics", 1, metrics::check, metrics::run)
}
