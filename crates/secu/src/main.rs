//! The program `secu`: see the library.

fn main() -> std::process::ExitCode {
    secu::program(std::env::args_os())
}
