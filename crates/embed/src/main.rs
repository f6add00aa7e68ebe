//! The program `embed`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<embed::Embed>()
}
