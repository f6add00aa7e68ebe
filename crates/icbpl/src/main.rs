//! The program `icbpl`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<icbpl::Icbpl>()
}
