//! `prepare --experiment FILE [--source PATH] --out DIR [--check]`

use std::env::ArgsOs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, FromArgMatches, Parser};
use stage::Experiment;

use crate::{ALGORITHM, Config};

/// Turns pictures into the files that every stage reads.
#[derive(Debug, Parser)]
struct Arguments {
    /// Experiment file; the program reads its table `[prepare]`.
    #[arg(long, value_name = "FILE")]
    experiment: PathBuf,
    /// File or folder with the pictures, instead of the table's `source`.
    #[arg(long, value_name = "PATH")]
    source: Option<PathBuf>,
    /// Folder to write into; created when missing.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Check the table, look at the source, print the table, and stop.
    #[arg(long)]
    check: bool,
}

/// The program: the command line `words` in, the exit status out.
pub fn program(words: ArgsOs) -> ExitCode {
    stage::start_logging();
    let command = Arguments::command().name("prepare").version(format!("algorithm {ALGORITHM}"));
    let arguments = match Arguments::from_arg_matches(&command.get_matches_from(words)) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let result = check_or_run(&arguments);
    if let Err(error) = &result {
        eprintln!("prepare: {error:#}");
    }
    ExitCode::from(stage::exit_code(&result))
}

fn check_or_run(arguments: &Arguments) -> Result<()> {
    let mut config: Config = Experiment::read(&arguments.experiment)?.table("prepare")?;
    if let Some(source) = &arguments.source {
        config.source = source.to_string_lossy().into_owned();
    }
    let source = arguments.source.clone().unwrap_or_else(|| PathBuf::from(&config.source));
    if arguments.check {
        crate::check(&config, &source)?;
        print!("[prepare]\n{}", toml::to_string(&config)?);
        return Ok(());
    }
    // Nothing has its final name before it is whole, so stopping at any moment is safe.
    ctrlc::set_handler(|| std::process::exit(3)).context("listening for interrupts")?;
    crate::run(&config, &source, &arguments.out)
}
