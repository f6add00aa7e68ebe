//! The program `pretraining`: see the library.

fn main() -> std::process::ExitCode {
    pretraining::program(std::env::args_os())
}
