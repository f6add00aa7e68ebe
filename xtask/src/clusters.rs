//! `cargo xtask clusters`: guesses how many clusters a run's embeddings hold.
//!
//! Which file that is, is decided here; what is computed, and how it is printed, is the affair of
//! the program `clusters` of the crate `metrics`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::finished::{Finished, Step, Which};
use crate::programs;

/// What is asked for on the command line.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    which: Which,
    /// Fewest clusters.
    #[arg(long, value_name = "K", default_value_t = 2)]
    from: usize,
    /// Most clusters.
    #[arg(long, value_name = "K", default_value_t = 50)]
    to: usize,
    /// Print, last, the curve as one JSON object.
    #[arg(long)]
    json: bool,
    /// For the program itself; `-- --help` says what it takes.
    #[arg(last = true, value_name = "ARGUMENT")]
    rest: Vec<OsString>,
}

impl Options {
    /// Makes the paths absolute that are seen from where the user stands.
    pub fn resolve_paths(&mut self) -> Result<()> {
        self.which.resolve_paths()
    }
}

/// Finds the embeddings, and lets the program speak.
///
/// # Errors
///
/// There are no embeddings, the program cannot be built, or it fails.
pub fn run(options: &Options) -> Result<()> {
    let embeddings = embeddings_of(&options.which.run, &options.which.runs, options.which.seed)?;
    let program = match &options.which.programs {
        Some(folder) => folder.join(format!("{PROGRAM}{}", env::consts::EXE_SUFFIX)),
        None => programs::cargo_build(&[("metrics", PROGRAM)], None)?
            .remove(PROGRAM)
            .with_context(|| format!("cargo built no `{PROGRAM}`"))?,
    };
    let mut command = Command::new(&program);
    command.arg("--embeddings").arg(embeddings);
    for (flag, value) in [
        ("--from", options.from as u64),
        ("--to", options.to as u64),
        ("--seed", options.which.seed),
    ] {
        command.arg(flag).arg(value.to_string());
    }
    if options.json {
        command.arg("--json");
    }
    let status = command.args(&options.rest).status();
    let status = status.with_context(|| format!("starting `{}`", program.display()))?;
    ensure!(status.success(), "{PROGRAM} ended with {status}; what it said is above");
    Ok(())
}

const PROGRAM: &str = "clusters";
const FILE: &str = "embeddings.safetensors";

/// The file that `run` means: itself, that in the folder, or that of the last round.
fn embeddings_of(run: &str, runs: &Path, seed: u64) -> Result<PathBuf> {
    let named = PathBuf::from(run);
    if named.is_file() {
        return Ok(named);
    }
    if named.is_dir() && named.join(FILE).is_file() {
        return Ok(named.join(FILE));
    }
    let run = Finished::find(run, runs, seed)?;
    let has = |step: &&Step| step.place == "embed" && step.folder.join(FILE).is_file();
    match run.steps.iter().rev().find(has) {
        Some(step) => Ok(step.folder.join(FILE)),
        None => bail!(
            "`{}` holds no embeddings: neither `{FILE}` nor a finished step `<round>-embed`; let \
             the run come that far",
            run.folder.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_last_round_s_embeddings_are_taken_however_the_run_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let run = runs.join("digits/3");
        for step in ["2-embed", "10-embed", "11-clustering", "12-embed", "x-embed"] {
            fs::create_dir_all(run.join(step)).expect("created");
            if step != "12-embed" {
                fs::write(run.join(step).join(FILE), step).expect("written");
            }
        }
        let find = |name: &str| embeddings_of(name, &runs, 3);
        let want = run.join("10-embed").join(FILE);
        assert_eq!(find("digits").expect("a run"), want);
        assert_eq!(find(&run.to_string_lossy()).expect("a run"), want);
        let step = run.join("2-embed");
        assert_eq!(find(&step.to_string_lossy()).expect("a step"), step.join(FILE));
        let file = step.join(FILE);
        assert_eq!(find(&file.to_string_lossy()).expect("a file"), file);
        // A view without links.
        fs::write(run.join("13-embed"), step.to_string_lossy().as_bytes()).expect("written");
        assert_eq!(find("digits").expect("a run"), file);
    }

    #[test]
    fn what_is_not_there_is_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let runs = folder.path().join("runs");
        let error = embeddings_of("digits", &runs, 0).expect_err("no run").to_string();
        assert!(error.contains("cargo xtask reproduce digits"), "{error}");
        fs::create_dir_all(runs.join("digits/0/0-embed")).expect("created");
        let error = embeddings_of("digits", &runs, 0).expect_err("no file").to_string();
        assert!(error.contains("holds no embeddings"), "{error}");
    }
}
