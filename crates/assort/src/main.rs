//! All stages in one program: `assort <stage> ...`, for machines that are reached by copying files.
//!
//! `assort pretraining --experiment ...` is the program `pretraining`, argument by argument; the
//! same holds for every stage and for `prepare`. `xtask reproduce <experiment> --programs DIR`
//! takes this program for every stage that has no file of its own in `DIR`.

use std::env::{self, ArgsOs};
use std::process::ExitCode;

/// A stage's program: the command line in, the exit status out.
type Program = fn(ArgsOs) -> ExitCode;

/// The stages, in the order they run in.
const STAGES: [(&str, Program); 10] = [
    ("prepare", prepare::program),
    ("pretraining", pretraining::program),
    ("embed", embed::program),
    ("clustering", clustering::program),
    ("prototype-refinement", prototype_refinement::program),
    ("propos", propos::program),
    ("secu", secu::program),
    ("imc-swav", imc_swav::program),
    ("icbpl", icbpl::program),
    ("metrics", metrics::program),
];

fn main() -> ExitCode {
    let mut words = env::args_os();
    words.next();
    let Some(first) = env::args_os().nth(1) else {
        eprintln!("{}", usage());
        return ExitCode::from(2);
    };
    let stage = first.to_string_lossy();
    match (STAGES.iter().find(|(name, _)| *name == stage), stage.as_ref()) {
        (Some((_, program)), _) => program(words),
        (None, "--help" | "-h" | "help") => {
            println!("{}", usage());
            ExitCode::SUCCESS
        }
        (None, "--version" | "-V") => {
            println!("assort {}, computes on {}", env!("CARGO_PKG_VERSION"), devices());
            ExitCode::SUCCESS
        }
        (None, other) => {
            eprintln!("assort: there is no stage `{other}`\n\n{}", usage());
            ExitCode::from(2)
        }
    }
}

fn usage() -> String {
    let names: Vec<&str> = STAGES.iter().map(|(name, _)| *name).collect();
    format!(
        "Usage: assort <stage> <arguments of the stage>\n\nStages: {}.\n\
         `assort <stage> --help` tells the arguments.\nThis program computes on {}.",
        names.join(", "),
        devices()
    )
}

/// What this program was built for.
fn devices() -> &'static str {
    match (cfg!(feature = "cuda"), cfg!(feature = "metal")) {
        (true, true) => "the CPU, CUDA and Metal",
        (true, false) => "the CPU and CUDA",
        (false, true) => "the CPU and Metal",
        (false, false) => {
            "the CPU alone (rebuild it with --features cuda,cudnn or metal for a GPU)"
        }
    }
}
