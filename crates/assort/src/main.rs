//! The program `assort`: see the library.

fn main() -> std::process::ExitCode {
    xtask::main(assort::registry(), std::env::args_os().collect())
}
