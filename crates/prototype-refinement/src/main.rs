//! The program `prototype-refinement`: see the library.

fn main() -> std::process::ExitCode {
    stage::main::<prototype_refinement::PrototypeRefinement>()
}
