//! The program `assort`: see the library.

fn main() -> std::process::ExitCode {
    assort::program(std::env::args_os())
}
