//! The program `embed`: see the library.

fn main() -> std::process::ExitCode {
    embed::program(std::env::args_os())
}
