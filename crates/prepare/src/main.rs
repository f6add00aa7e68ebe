//! The program `prepare` alone, which the tests of this crate start; people call `assort prepare`.

fn main() -> std::process::ExitCode {
    prepare::program(std::env::args_os().collect())
}
