//! `assort export`: a run's embeddings and clusters for other tools.
//!
//! This module finds the files of the run; the helper `export` writes the output.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;
use stage::Spec;

use crate::CommandContext;
use crate::clusters::{EMBEDDINGS, last_embeddings};
use crate::process::Process;
use crate::programs::Executable;
use crate::record::{Recorded, Which};
use crate::report::LABELS;

/// The command line.
#[derive(Debug, clap::Args)]
pub struct ExportOptions {
    #[command(flatten)]
    which: Which,
    /// npy: arrays for NumPy, and a list of names. parquet: one table with name, cluster, embedding.
    #[arg(long, value_name = "FORM", value_parser = ["npy", "parquet"])]
    format: String,
    /// Which vector to write of each picture: backbone, its embedding, or projection, the projector's output for it.
    #[arg(long, value_name = "SPACE", default_value = "backbone", value_parser = ["backbone", "projection"])]
    space: String,
    /// Folder to write into; by default `export` in the run's folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// The helper that writes the files.
pub const EXPORT: &str = "export";

/// Writes the files and prints their paths.
///
/// # Errors
///
/// The run has no embeddings.
pub fn run(session: &CommandContext, options: &ExportOptions) -> Result<()> {
    let run = options.which.find()?;
    run.removing_damaged(write(session, &run, options), &session.interrupt)
}

fn write(session: &CommandContext, run: &Recorded, options: &ExportOptions) -> Result<()> {
    let stages = session.registry.specs();
    let embed = last_embeddings(run, &stages)?;
    // In an unfinished run, the last clusters may be of earlier embeddings.
    let clusters = run.unfinished().is_none().then(|| run.last(&stages, Spec::clusters)).flatten();
    run.warn_if_unfinished(format_args!(
        "exporting the embeddings of {} without clusters",
        embed.name
    ));
    let steps: Vec<_> = [embed].into_iter().chain(clusters).collect();
    let _held = run.hold(&steps, &session.interrupt)?;
    let mut arguments: Vec<OsString> = Vec::new();
    let labels = clusters.map(|step| ("--pseudo-labels", run.path(step).join(LABELS).into()));
    for (flag, value) in [
        ("--embeddings", run.path(embed).join(EMBEDDINGS).into()),
        ("--names", run.data().join("names.safetensors").into()),
        ("--format", OsString::from(&options.format)),
        ("--space", OsString::from(&options.space)),
        ("--out", options.out.clone().unwrap_or_else(|| run.folder.join("export")).into()),
    ]
    .into_iter()
    .chain(labels)
    {
        arguments.extend([flag.into(), value]);
    }
    let program = Executable::own(EXPORT, &session.registry)?;
    let interrupt = &session.interrupt;
    Process::of_helper(EXPORT, &program, &arguments, interrupt).show()
}
