//! `assort` with stages that compute nothing: the orchestrator's own behaviour in seconds.
//!
//! Its stages have the inputs and outputs of the real ones; the script `fake-program` plays them.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{env, fs};

use anyhow::{Result, bail};
use stage::finished::{self, Digests};
use stage::{
    DeviceChoice, Effort, Job, Library, Origin, Output, Program, Ranks, Role, Spec, Stage,
};
use xtask::{Devices, Helper, Registry};

fn main() -> ExitCode {
    let words: Vec<OsString> = env::args_os().collect();
    let registry = registry();
    let first = words.get(1).and_then(|word| word.to_str()).unwrap_or_default();
    if first == "mark" {
        return stage::finish("mark", &mark(&words[2..]));
    }
    if first == "program" || registry.stages.iter().any(|stage| stage.spec.name == first) {
        return play(&words[1..]);
    }
    xtask::main(registry, words)
}

/// Lets the script play a stage or helper.
fn play(words: &[OsString]) -> ExitCode {
    let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fake-program"));
    script.args(words).env("FAKE_ASSORT", env::current_exe().unwrap_or_default());
    #[cfg(unix)]
    let error = std::os::unix::process::CommandExt::exec(&mut script);
    #[cfg(not(unix))]
    let error = "it needs a shell";
    eprintln!("fake-program does not start: {error}");
    ExitCode::from(2)
}

/// Does what a script cannot: adds the digest to `metrics.json`, and marks the folder as finished.
fn mark(words: &[OsString]) -> Result<()> {
    let [name, out] = words else { bail!("a name and a folder") };
    let (name, out) = (name.to_string_lossy(), Path::new(out));
    let scores = out.join("metrics.json");
    if scores.exists() {
        let values: serde_json::Value = serde_json::from_slice(&fs::read(&scores)?)?;
        stage::json::write(&scores, &values)?;
    }
    finished::mark(out, &name, None, Digests::Listed)
}

/// A stage that does nothing, but has a place.
macro_rules! stage {
    ($type:ident, $name:literal, [$($role:literal from $origin:ident),*], [$($output:ident),*]) => {{
        struct $type;
        impl Stage for $type {
            const SPEC: Spec = Spec {
                name: $name,
                algorithm: 1,
                inputs: &[$(Role::new($role, Origin::$origin)),*],
                outputs: &[$(Output::$output),*],
                ranks: Ranks::One,
            };
            type Config = toml::Table;
            fn check(_: &toml::Table, _: &Job) -> Result<Effort> {
                Ok(Effort::NONE)
            }
            fn run(_: &toml::Table, _: &Job) -> Result<()> {
                bail!("a script plays the stages")
            }
        }
        Program::of::<$type>()
    }};
}

fn registry() -> Registry {
    let mut stages = vec![
        stage!(Pretraining, "pretraining", [], [Network]),
        stage!(Embed, "embed", ["network" from Network], [Embeddings]),
        stage!(
            Clustering,
            "clustering",
            ["embeddings" from Embeddings, "previous" from PreviousRound],
            [PseudoLabels]
        ),
        stage!(
            Refinement,
            "prototype-refinement",
            ["network" from Network, "pseudo-labels" from PseudoLabels, "previous" from PreviousRound],
            [Network]
        ),
        stage!(
            Metrics,
            "metrics",
            ["pseudo-labels" from PseudoLabels, "labels" from Labels, "previous" from EarlierPseudoLabels],
            [Scores]
        ),
        stage!(ProPos, "propos", ["backbone" from Backbone], [Network, PseudoLabels]),
    ];
    let algorithm = env::var("FAKE_ALGORITHM").map_or(1, |number| number.parse().unwrap_or(1));
    stages.iter_mut().for_each(|stage| stage.spec.algorithm = algorithm);
    let helper = |name| Helper { name, algorithm, main: |words| play(&words) };
    Registry {
        stages,
        helpers: ["prepare", "predict", "report", "clusters", "export", "view"]
            .map(helper)
            .to_vec(),
        library: Library::default(),
        data: vec![],
        devices: Devices {
            resolve: |choice| match (choice, env::var_os("FAKE_GPU")) {
                (DeviceChoice::Auto, None) => Ok(DeviceChoice::Cpu),
                (DeviceChoice::Auto, Some(_)) => Ok(DeviceChoice::Cuda(Some(0))),
                (named, _) => Ok(named),
            },
            check: |_| Ok(true),
            features: &[],
            describe: || "computes nothing".to_owned(),
        },
    }
}
