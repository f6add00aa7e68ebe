//! The program `pretraining`; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    stage::run_program(
        "pretraining",
        pretraining::ALGORITHM,
        pretraining::Config::check,
        pretraining::run,
    )
}
