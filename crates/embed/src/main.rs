//! The program `embed`; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::run_program("embed", embed::ALGORITHM, embed::Config::check, embed::run)
}
