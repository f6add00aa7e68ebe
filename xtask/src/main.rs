//! `cargo xtask`: commands for a checkout.
//!
//! It runs benches, disturbs the program in trials, takes the pictures of the documentation and sets up the
//! toolchain for a CUDA build. Every other command is one of `assort`: it builds that program and runs it with
//! the same words in the root of the workspace.

mod bench;
#[cfg(unix)]
mod cuda_toolchain;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use stage::console::{print_error, start_logging};
use xtask::cargo;

/// Builds `assort` and runs it with these words in the root of the workspace.
///
/// `cargo xtask reproduce digits` is `assort reproduce digits`, and so on: `cargo xtask help` lists
/// the commands. Paths are relative to the root of the workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct XtaskCli {
    /// Build `assort` with these cargo features: cuda, cudnn, metal, mpi, nccl.
    #[arg(long, value_name = "LIST", global = true)]
    features: Option<String>,
    #[command(subcommand)]
    command: XtaskCommand,
}

#[derive(Debug, Subcommand)]
enum XtaskCommand {
    /// Sets up what building with `--features cuda,cudnn,nccl` needs, and prints the variables to set:
    /// eval "$(cargo xtask cuda-toolchain)".
    CudaToolchain {
        /// Where to keep it: about 3 GB.
        #[arg(long, value_name = "DIR", default_value = ".cuda")]
        folder: PathBuf,
        /// A Python with pip.
        #[arg(long, value_name = "PATH", default_value = "python3")]
        python: PathBuf,
        /// Compute capability of the card without its dot: 80 A100, 89 L4, 90 H100 and H200.
        #[arg(long, value_name = "N", default_value_t = 90)]
        capability: u32,
    },
    /// Times our programs, and other libraries for comparison.
    Bench {
        #[command(flatten)]
        options: bench::BenchOptions,
    },
    /// Disturbs `assort` with kills, damaged files, full disks, concurrent commands and changed
    /// bytes, and counts what goes wrong.
    Trial {
        /// crash, hostile or fuzz.
        what: String,
        /// How long to run.
        #[arg(long, value_name = "M", default_value_t = 1.)]
        minutes: f64,
        /// Seed of the random moments, files and bits.
        #[arg(long, value_name = "S", default_value_t = 0)]
        seed: u64,
    },
    /// Takes the pictures of the documentation from the page of a run, in a headless Chromium.
    Pictures {
        /// Arguments for the program that takes them; `-- --help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
        rest: Vec<OsString>,
    },
    /// Makes the table of results in `configs/README.md` from the records in `configs/results`.
    Results,
    /// A command of `assort`.
    #[command(external_subcommand)]
    Assort(Vec<OsString>),
}

fn main() -> ExitCode {
    start_logging();
    let XtaskCli { features, command } = XtaskCli::parse();
    let result = match command {
        XtaskCommand::CudaToolchain { folder, python, capability } => {
            set_up_cuda(&folder, &python, capability)
        }
        XtaskCommand::Bench { options } => bench::run(options),
        XtaskCommand::Trial { what, minutes, seed } => trial(&what, minutes, seed),
        XtaskCommand::Pictures { rest } => pictures(&rest),
        XtaskCommand::Results => results(),
        XtaskCommand::Assort(words) => assort(words, features),
    };
    result.unwrap_or_else(|error| stage::finish("xtask", &Err(error)))
}

#[cfg(unix)]
fn set_up_cuda(folder: &Path, python: &Path, capability: u32) -> Result<ExitCode> {
    let folder = cargo::root()?.join(folder);
    stage::console::print(cuda_toolchain::set_up(&folder, python, capability)?)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(unix))]
fn set_up_cuda(_: &Path, _: &Path, _: u32) -> Result<ExitCode> {
    anyhow::bail!("cuda-toolchain sets up libraries for Linux only; install CUDA 13 here")
}

fn results() -> Result<ExitCode> {
    xtask::result_record::update_documentation(&cargo::root()?)?;
    Ok(ExitCode::SUCCESS)
}

/// Builds `assort` and the program that disturbs it, and runs that. `fuzz` first runs the test of
/// `prepare` that fuzzes the readers of sources.
fn trial(what: &str, minutes: f64, seed: u64) -> Result<ExitCode> {
    if what == "fuzz" {
        let seconds = (60. * minutes / 10.).ceil().to_string(); // Each of nine readers, and ours.
        let mut command = cargo::command();
        command.args(["test", "--package", "prepare", "--lib", "fuzz", "--", "--nocapture"]);
        command.env("FUZZ_SECONDS", seconds).env("FUZZ_SEED", seed.to_string());
        let status = command.current_dir(cargo::root()?).status()?;
        anyhow::ensure!(status.success(), "a reader of sources fails; its message is above");
    }
    let assort = cargo::build("assort", "assort", None)?;
    let mut command = Command::new(cargo::build("tests", "trial", None)?);
    command.args([what, "--minutes", &minutes.to_string(), "--seed", &seed.to_string()]);
    become_program(command.arg("--assort").arg(assort))
}

/// Builds `assort` and the program that takes pictures of its page, and runs that.
fn pictures(rest: &[OsString]) -> Result<ExitCode> {
    let assort = cargo::build("assort", "assort", None)?;
    let mut command = Command::new(cargo::build("browser", "page-pictures", None)?);
    become_program(command.arg("--assort").arg(assort).args(rest).current_dir(cargo::root()?))
}

/// Builds `assort` and runs it in place of this process.
fn assort(words: Vec<OsString>, features: Option<String>) -> Result<ExitCode> {
    let (words, found) = without_features(words);
    let features = found.or(features);
    let root = cargo::root()?;
    let assort = cargo::build("assort", "assort", features.as_deref())?;
    if env::current_dir().is_ok_and(|here| here != root) {
        print_error(format_args!("xtask: paths are relative to `{}`", root.display()));
    }
    become_program(Command::new(assort).args(words).current_dir(root))
}

/// Splits the words into those without `--features LIST`, and the list.
fn without_features(words: Vec<OsString>) -> (Vec<OsString>, Option<String>) {
    let (mut kept, mut features) = (Vec::new(), None);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        if text == "--" {
            kept.push(word);
            kept.extend(words.by_ref());
        } else if text == "--features" {
            features = words.next().map(|list| list.to_string_lossy().into_owned());
        } else if let Some(list) = text.strip_prefix("--features=") {
            features = Some(list.to_owned());
        } else {
            kept.push(word);
        }
    }
    (kept, features)
}

/// Replaces this process by a program, so that signals reach it and its exit status is ours.
#[cfg(unix)]
fn become_program(command: &mut Command) -> Result<ExitCode> {
    let error = std::os::unix::process::CommandExt::exec(command);
    Err(error).with_context(|| format!("starting `{}`", command.get_program().display()))
}

/// Starts a program, waits for its end, and returns its exit status.
#[cfg(not(unix))]
fn become_program(command: &mut Command) -> Result<ExitCode> {
    let status = command.status();
    let status =
        status.with_context(|| format!("starting `{}`", command.get_program().display()))?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_removed_anywhere_before_the_arguments_of_the_helper() {
        let split = |line: &str| {
            let (words, features) = without_features(line.split(' ').map(Into::into).collect());
            let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
            (words.join(" "), features)
        };
        let cuda = Some("cuda,cudnn".to_owned());
        let plain = "reproduce digits --seeds 3";
        assert_eq!(split(plain), (plain.to_owned(), None));
        assert_eq!(split("reproduce digits --features cuda,cudnn --seeds 3"), (plain.into(), cuda));
        assert_eq!(split("list --features=metal").1, Some("metal".to_owned()));
        let behind = "clusters digits -- --features x";
        assert_eq!(split(behind), (behind.to_owned(), None));
    }
}
