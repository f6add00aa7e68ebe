//! The program `icbpl`: see the library.

fn main() -> std::process::ExitCode {
    icbpl::program(std::env::args_os())
}
