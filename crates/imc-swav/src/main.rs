//! The program `imc-swav`: see the library.

fn main() -> std::process::ExitCode {
    imc_swav::program(std::env::args_os())
}
