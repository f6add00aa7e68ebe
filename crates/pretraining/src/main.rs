//! The program `pretraining`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<pretraining::Pretraining>()
}
