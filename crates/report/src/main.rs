//! The program `report`: see the library.

fn main() -> std::process::ExitCode {
    report::program(std::env::args_os())
}
