//! The program `clustering`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<clustering::Clustering>()
}
