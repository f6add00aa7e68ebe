//! All stages in one program: `assort <stage> ...`, for machines that are reached by copying files.
//!
//! `assort pretraining --experiment ...` is the program `pretraining`, argument by argument; the
//! same holds for every stage and for `prepare` and `report`. `xtask reproduce <experiment>
//! --programs DIR` takes this program for every stage that has no file of its own in `DIR`. Beside
//! the stages it has `assort gpu-check`, which compares a device with the CPU before work is sent
//! there.
//!
//! This is the one crate that knows all stages, and it computes nothing itself. To add a stage, put
//! its program into the list below.

use std::env::{self, ArgsOs};
use std::ffi::OsString;
use std::process::ExitCode;

use stage::Program;

/// The stages, in the order they run in.
const STAGES: [Program; 10] = [
    Program::of::<pretraining::Pretraining>(),
    Program::of::<embed::Embed>(),
    Program::of::<clustering::Clustering>(),
    Program::of::<prototype_refinement::PrototypeRefinement>(),
    Program::of::<propos::ProPos>(),
    Program::of::<secu::SeCu>(),
    Program::of::<imc_swav::ImcSwav>(),
    Program::of::<icbpl::Icbpl>(),
    Program::of::<metrics::Metrics>(),
    Program::of::<predict::Predict>(),
];

/// The program: the command line `words` in, its own name first; the exit status out, that of the
/// stage, or 2 where the first word names none.
pub fn program(mut words: ArgsOs) -> ExitCode {
    words.next();
    // Looked at, not taken: to the stage's program it is the program's own name.
    let Some(first) = env::args_os().nth(1) else {
        eprintln!("{}", usage());
        return ExitCode::from(2);
    };
    let stage = first.to_string_lossy();
    if stage == "gpu-check" {
        return gpu_check(words.nth(1));
    }
    match (STAGES.iter().find(|program| program.spec.name == stage), stage.as_ref()) {
        (Some(program), _) => program.main(words),
        (None, "prepare") => prepare::program(words),
        (None, "report") => report::program(words),
        (None, "--help" | "-h" | "help") => {
            println!("{}", usage());
            ExitCode::SUCCESS
        }
        (None, "--version" | "-V") => {
            println!("assort {}, computes on {}", env!("CARGO_PKG_VERSION"), devices());
            if cfg!(feature = "cuda") {
                println!("CUDA's libraries, looked for in LD_LIBRARY_PATH and the system's list:");
                libraries().iter().for_each(|library| println!("  {library}"));
            }
            ExitCode::SUCCESS
        }
        (None, other) => {
            eprintln!("assort: there is no stage `{other}`\n\n{}", usage());
            ExitCode::from(2)
        }
    }
}

fn usage() -> String {
    let names: Vec<&str> = STAGES.iter().map(|program| program.spec.name).collect();
    format!(
        "Usage: assort <stage> <arguments of the stage>\n\nStages: prepare, {}, report.\n\
         `assort <stage> --help` tells the arguments.\n\
         `assort gpu-check [DEVICE]` compares a device with the CPU: exit status 1 if they differ.\nThis program computes on {}.",
        names.join(", "),
        devices()
    )
}

/// One training step of small networks on a device beside the same by the CPU's kernels.
///
/// Exit status: 0 where all agree, 1 where something does not, 2 where the device cannot be used.
fn gpu_check(device: Option<OsString>) -> ExitCode {
    let choice = device.as_ref().map_or("auto".into(), |device| device.to_string_lossy()).parse();
    let compared = choice.map_err(anyhow::Error::msg).and_then(|choice| {
        let device = training::network_device(choice)?;
        println!("{:?} beside the CPU's kernels", device.location());
        training::agreement::compare(&device)
    });
    match compared {
        Ok(found) => {
            found.iter().for_each(|agreement| println!("{agreement}"));
            let wrong = found.iter().filter(|agreement| !agreement.holds()).count();
            println!("{} results, {wrong} beyond their bound", found.len());
            ExitCode::from(u8::from(wrong > 0))
        }
        Err(error) => {
            eprintln!("assort gpu-check: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The libraries of CUDA that this program needs, and the files that the system's loader found for
/// them. The program does not start without them.
fn libraries() -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files: Vec<&str> = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    let found = |(name, what): &(&str, &str)| {
        let (stem, _) = name.split_once(".so").unwrap_or((name, ""));
        let file = files.iter().find(|file| file.contains(&format!("/{stem}.so")));
        format!("{name} ({what}): {}", file.unwrap_or(&"not asked for by this build"))
    };
    LIBRARIES.iter().map(found).collect()
}

/// What a program with CUDA needs at run time.
const LIBRARIES: [(&str, &str); 5] = [
    ("libcuda.so.1", "the driver, of release 580 or later"),
    ("libcudart.so.13", "CUDA 13"),
    ("libcublas.so.13", "CUDA 13"),
    ("libcurand.so.10", "CUDA 13"),
    ("libcudnn.so.9", "cuDNN 9, where built with the feature cudnn"),
];

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
