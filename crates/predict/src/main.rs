//! The program `predict`: see the library.

fn main() -> std::process::ExitCode {
    predict::program(std::env::args_os())
}
