//! The program `metrics`: see the library.

fn main() -> std::process::ExitCode {
    metrics::program(std::env::args_os())
}
