//! The program `clustering`: see the library.

fn main() -> std::process::ExitCode {
    clustering::program(std::env::args_os())
}
