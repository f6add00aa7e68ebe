//! The program people install: every command and every stage in one file.
//!
//! `assort reproduce digits` runs an experiment, `assort pretraining --experiment …` one stage of it:
//! a step of a run is a process of this same program. The experiments and the digits are part of the
//! file, so that it works in an empty folder on a machine reached by copying it; a folder `configs`
//! beside it wins over the built-in experiments.
//!
//! This is the one crate that knows all stages, and it computes nothing itself. To add a stage, name
//! its crate in the manifest and put a line into [`registry`]; the orchestrator, crate `xtask`,
//! derives everything else from the stage's specification.

mod devices;
mod embedded;

use stage::{Library, Program};
use xtask::{Helper, Registry};

/// It has the arguments of a stage, but no place in an experiment.
const PREDICT: Program = Program::of::<predict::Predict>();

/// All stages, and what else the program brings along.
pub fn registry() -> Registry {
    Registry {
        stages: vec![
            Program::of::<pretraining::Pretraining>(),
            Program::of::<pretrained::PretrainedNetwork>(),
            Program::of::<embed::Embed>(),
            Program::of::<clustering::Clustering>(),
            Program::of::<prototype_refinement::PrototypeRefinement>(),
            Program::of::<neighbour_refinement::NeighbourRefinement>(),
            Program::of::<soft_reset::SoftReset>(),
            Program::of::<metrics::Metrics>(),
            Program::of::<propos::ProPos>(),
            Program::of::<secu::SeCu>(),
            Program::of::<imc_swav::ImcSwav>(),
            Program::of::<icbpl::Icbpl>(),
            Program::of::<temi::Temi>(),
            Program::of::<turtle::Turtle>(),
        ],
        helpers: vec![
            Helper { name: "prepare", algorithm: prepare::ALGORITHM, main: prepare::program },
            Helper {
                name: "predict",
                algorithm: PREDICT.spec.algorithm,
                main: |w| PREDICT.main(w),
            },
            Helper { name: "report", algorithm: 0, main: report::program },
            Helper { name: "view", algorithm: 0, main: report::view::program },
            Helper { name: "export", algorithm: 0, main: report::export::program },
            Helper { name: "clusters", algorithm: 0, main: metrics::clusters::program },
        ],
        library: Library { embedded: embedded::experiments(), ..Library::default() },
        data: embedded::data(),
        devices: devices::DEVICES,
    }
}
