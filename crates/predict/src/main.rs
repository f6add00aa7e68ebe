//! The program `predict`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<predict::Predict>()
}
