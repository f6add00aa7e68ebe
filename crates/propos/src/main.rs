//! The program `propos`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<propos::ProPos>()
}
