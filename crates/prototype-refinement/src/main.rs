//! The program `prototype-refinement`: see the library of this crate.

use prototype_refinement::{ALGORITHM, check, run};

fn main() -> std::process::ExitCode {
    stage::run_program("prototype-refinement", ALGORITHM, check, run)
}
