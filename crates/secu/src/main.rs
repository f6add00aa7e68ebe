//! The program `secu`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<secu::SeCu>()
}
