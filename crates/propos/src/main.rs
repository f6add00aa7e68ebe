//! The program `propos`: see the library.

fn main() -> std::process::ExitCode {
    propos::program(std::env::args_os())
}
