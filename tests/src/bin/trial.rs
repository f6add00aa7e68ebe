//! `trial crash | hostile | fuzz`: disturbs `assort` and counts what goes wrong; `cargo xtask trial`
//! builds and starts it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use tests::trial::{Trial, Until, crash, hostile, mutation};

/// Disturbs `assort` on a tiny experiment; fails unless all counts of faults are 0.
#[derive(Debug, Parser)]
struct TrialCli {
    /// What to do to it.
    what: TrialKind,
    /// The program.
    #[arg(long, value_name = "FILE")]
    assort: PathBuf,
    /// How long.
    #[arg(long, value_name = "M", default_value_t = 1.)]
    minutes: f64,
    /// Seed of the random moments, files and bits.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TrialKind {
    /// Kills commands and steps at random moments.
    Crash,
    /// Damages files, fills the disk, runs commands at once.
    Hostile,
    /// Gives changed bytes to readers.
    Fuzz,
}

fn main() -> Result<ExitCode> {
    let TrialCli { what, assort, minutes, seed } = TrialCli::parse();
    let mut trial = Trial::new(&assort, seed)?;
    let until = Until::minutes(minutes);
    match what {
        TrialKind::Crash => crash::run(&mut trial, until)?,
        TrialKind::Hostile => hostile::run(&mut trial, until)?,
        TrialKind::Fuzz => mutation::run(&mut trial, until)?,
    }
    println!("{}", trial.counts);
    Ok(if trial.counts.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
