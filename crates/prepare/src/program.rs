//! `prepare --experiment FILE [--source PATH] --out DIR [--memory MIB] [--check]`

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser};
use stage::{Claim, Experiment, Interrupt, console};

use crate::{ALGORITHM, Config, Options, folder, location, names, picture};

/// Turns pictures into the files that every stage reads.
#[derive(Debug, Parser)]
struct PrepareArguments {
    /// Experiment file; the program reads its table `[prepare]`.
    #[arg(long, value_name = "FILE", required_unless_present = "fetch")]
    experiment: Option<PathBuf>,
    /// Where the pictures are, overriding the table's `source`: a path, `hf://datasets/owner/name`,
    /// or `named://cifar-10`.
    #[arg(long, value_name = "PATH")]
    source: Option<PathBuf>,
    /// How messages name the source, if a command with another flag starts this program.
    #[arg(long, value_name = "FLAG", hide = true, allow_hyphen_values = true)]
    source_flag: Option<String>,
    /// Folder to write into; created when missing.
    #[arg(long, value_name = "DIR", required_unless_present = "fetch")]
    out: Option<PathBuf>,
    /// Approximate memory limit in MiB; pictures that need more to decode are skipped.
    #[arg(long, value_name = "MIB", default_value_t = picture::MEMORY >> 20,
          value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    memory: u64,
    /// Only download an address, such as `hf://owner/model`, and print the path of the copy.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "experiment")]
    fetch: Option<String>,
    /// Check the table and the source, print the table, and the number of pictures if that is known
    /// already, and stop.
    #[arg(long)]
    check: bool,
}

/// The program: the command line `words` in, the exit status out.
pub fn program(words: Vec<OsString>) -> ExitCode {
    console::start_logging();
    let command =
        PrepareArguments::command().name("prepare").version(format!("algorithm {ALGORITHM}"));
    let arguments = match PrepareArguments::from_arg_matches(&command.get_matches_from(words)) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    stage::finish("prepare", &check_or_run(&arguments))
}

fn check_or_run(arguments: &PrepareArguments) -> Result<()> {
    // An interrupt is safe at any time: the journal keeps what was read.
    let interrupt = Interrupt::listen()?;
    let interrupted = || interrupt.is_raised();
    if let Some(flag) = &arguments.source_flag {
        folder::name_source(flag.clone());
    }
    if let Some(address) = &arguments.fetch {
        for path in location::find(Path::new(address), &interrupted)?.paths {
            console::print_line(path.display())?;
        }
        return Ok(());
    }
    let (Some(experiment), Some(out)) = (&arguments.experiment, &arguments.out) else {
        bail!("--experiment and --out are missing");
    };
    let mut config: Config = Experiment::read(experiment)?.table("prepare")?;
    if let Some(source) = &arguments.source {
        config.source = names::path_text(source);
    }
    let source = arguments.source.clone().unwrap_or_else(|| PathBuf::from(&config.source));
    if arguments.check {
        let count = crate::check(&config, &source)?;
        let count = count.map(|count| format!("pictures = {count}\n")).unwrap_or_default();
        return console::print(format_args!("{count}[prepare]\n{}", toml::to_string(&config)?));
    }
    let options =
        Options { memory: arguments.memory << 20, interrupted: &interrupted, ..Options::default() };
    // The command that started an earlier process may have been killed before that process ended.
    let _claim = Claim::wait(out, &interrupt)?;
    crate::run(&config, &source, out, &options)?;
    if let Some(bytes) = peak_memory() {
        tracing::info!("peak memory: {} MiB", bytes >> 20);
    }
    Ok(())
}

/// The peak memory of this process in bytes, if the system reports it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}
