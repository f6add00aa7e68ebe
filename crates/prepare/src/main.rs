//! The program `prepare`: see the library.

fn main() -> std::process::ExitCode {
    prepare::program(std::env::args_os())
}
