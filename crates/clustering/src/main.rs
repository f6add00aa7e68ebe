//! The program `clustering`: see the library of this crate.

fn main() -> std::process::ExitCode {
    stage::run_program("clustering", clustering::ALGORITHM, clustering::check, clustering::run)
}
