//! The program `clusters` alone, which the tests of this crate start; people call `assort clusters`.

fn main() -> std::process::ExitCode {
    metrics::clusters::program(std::env::args_os().collect())
}
