//! `cargo xtask bench`: builds and starts a bench program.
//!
//! The program `bench-<what>` is a binary of the crate that it times, in `crates/<crate>/src/bin`,
//! and decides what to measure and compare. It prints a table and, with `--json`, one object last;
//! both go to stdout unchanged. Rows are kept in `runs/bench/<what>.jsonl`, so that a loss shows.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf, absolute};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::{become_program, cargo};

/// The command line.
#[derive(Debug, clap::Args)]
pub struct BenchOptions {
    /// What to time: train, embed, data, assignment, heads.
    what: String,
    /// A Python interpreter with the libraries to compare with.
    #[arg(long, value_name = "PATH")]
    peer_python: Option<PathBuf>,
    /// Also time candle's own DINOv2, which is built for it: for embed.
    #[arg(long)]
    peer_candle: bool,
    /// Print the rows as one JSON object at the end.
    #[arg(long)]
    json: bool,
    /// Arguments for the bench program; `-- --help` lists them.
    #[arg(last = true, value_name = "ARGUMENT")]
    rest: Vec<OsString>,
}

/// Builds the bench program and runs it in place of this process.
pub fn run(mut options: BenchOptions) -> Result<ExitCode> {
    options.resolve_python()?;
    let root = cargo::root()?;
    let found = bench_programs(&root.join("crates"))?;
    let what = &options.what;
    let Some(owner) = found.get(what) else {
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        bail!("there is no bench `{what}`; there are {}", names.join(", "))
    };
    ensure!(
        !options.peer_candle || what == "embed",
        "--peer-candle: `{what}` has no peer of candle's; leave it out"
    );
    if TIMES_ASSORT.contains(&&**what) {
        cargo::build("assort", "assort", None)?;
    }
    let mut command = Command::new(cargo::build(owner, &format!("{PREFIX}{what}"), None)?);
    if let Some(python) = &options.peer_python {
        command.arg("--peer-python").arg(python);
    }
    if options.peer_candle {
        let manifest = root.join("crates/bench/peers").join(CANDLE).join("Cargo.toml");
        let target = root.join("target").join(CANDLE);
        command.arg("--peer-candle").arg(cargo::build_outside(&manifest, CANDLE, &target)?);
    }
    if options.json {
        command.arg("--json");
    }
    command.arg("--history").arg(root.join(format!("runs/bench/{what}.jsonl")));
    command.args(["--commit", &commit(&root)]);
    become_program(command.args(&options.rest).current_dir(root))
}

/// The commit of the checkout, with `-dirty` if files differ from it; `unknown` outside of git.
fn commit(root: &Path) -> String {
    let words = ["describe", "--always", "--dirty", "--exclude", "*"];
    let output = Command::new("git").args(words).current_dir(root).output();
    let found = output.ok().filter(|output| output.status.success());
    let text = found.and_then(|output| String::from_utf8(output.stdout).ok());
    text.map_or("unknown".to_owned(), |text| text.trim().to_owned())
}

impl BenchOptions {
    /// Makes the interpreter's path absolute. A bare name is looked up in `PATH`. Links are not
    /// followed, because the Python of a virtual environment is a link.
    fn resolve_python(&mut self) -> Result<()> {
        if let Some(python) = &mut self.peer_python
            && python.components().count() > 1
        {
            *python = absolute(&*python)?;
            ensure!(
                python.exists(),
                "--peer-python: there is no `{}`; pass the Python of an environment, such as \
                 DIR/bin/python of `python3 -m venv DIR`",
                python.display()
            );
        }
        Ok(())
    }
}

const PREFIX: &str = "bench-";

/// The package of the peer that is candle's own, outside of the workspace.
const CANDLE: &str = "candle-dinov2";

/// What is timed by programs that also start `assort`, which they find beside their own file.
const TIMES_ASSORT: [&str; 1] = ["embed"];

/// Finds all bench programs: what each times, and its crate.
fn bench_programs(crates: &Path) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    let entries =
        fs::read_dir(crates).with_context(|| format!("reading `{}`", crates.display()))?;
    for entry in entries {
        let entry = entry?;
        // Most crates have no such folder.
        let Ok(binaries) = fs::read_dir(entry.path().join("src").join("bin")) else { continue };
        for binary in binaries {
            let path = binary?.path();
            let name = path.file_stem().map(|name| name.to_string_lossy().into_owned());
            if let Some(what) = name.as_deref().and_then(|name| name.strip_prefix(PREFIX)) {
                let owner = entry.file_name().to_string_lossy().into_owned();
                found.insert(what.to_owned(), owner);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(what: &str, peer_python: Option<&str>) -> BenchOptions {
        let peer_python = peer_python.map(PathBuf::from);
        BenchOptions {
            what: what.into(),
            peer_python,
            peer_candle: false,
            json: false,
            rest: vec![],
        }
    }

    #[test]
    fn every_bench_program_of_the_workspace_is_found_and_others_are_named() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
        let found = bench_programs(&crates).expect("readable");
        assert_eq!(found.get("train").map(String::as_str), Some("pretraining"));
        assert_eq!(found.get("embed").map(String::as_str), Some("embed"));
        assert_eq!(found.get("assignment").map(String::as_str), Some("metrics"));
        assert!(found.keys().all(|what| !what.is_empty()), "{found:?}");
    }

    #[test]
    fn the_peer_of_candle_is_timed_by_embed_alone_and_has_the_version_of_candle_that_we_have() {
        let train = BenchOptions { peer_candle: true, ..options("train", None) };
        let message = run(train).expect_err("no such peer").to_string();
        assert!(message.contains("--peer-candle") && message.contains("`train`"), "{message}");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let read = |path: &str| -> toml::Table {
            fs::read_to_string(root.join(path)).expect("a manifest").parse().expect("TOML")
        };
        let (ours, peer) =
            (read("Cargo.toml"), read("crates/bench/peers/candle-dinov2/Cargo.toml"));
        let version = ours["workspace"]["dependencies"]["candle-core"].as_str().expect("a version");
        for name in ["candle-core", "candle-nn", "candle-transformers"] {
            assert_eq!(
                peer["dependencies"][name].as_str(),
                Some(&*format!("={version}")),
                "{name}"
            );
        }
    }

    #[test]
    fn a_python_that_is_not_there_is_refused_before_anything_is_built() {
        let folder = tempfile::tempdir().expect("a folder");
        let python = folder.path().join("bin/python");
        let mut missing = options("train", python.to_str());
        let message = missing.resolve_python().expect_err("not there").to_string();
        assert!(message.contains("bin/python"), "{message}");
        // A name without a folder is for the system to find.
        options("train", Some("python3")).resolve_python().expect("a name");
    }
}
