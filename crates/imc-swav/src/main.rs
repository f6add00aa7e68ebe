//! The program `imc-swav`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<imc_swav::ImcSwav>()
}
