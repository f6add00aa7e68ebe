//! The program `prototype-refinement`: see the library.

fn main() -> std::process::ExitCode {
    prototype_refinement::program(std::env::args_os())
}
