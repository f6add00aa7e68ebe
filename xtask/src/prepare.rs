//! `assort prepare`: converts the pictures of an experiment, or any others, for the stages.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use stage::Experiment;
use stage::console::{print, print_line};

use crate::CommandContext;
use crate::advice::Advice;
use crate::prepared::{PREPARE, PreparedData};
use crate::process::Process;
use crate::programs::Executable;
use crate::source::absolute_source;

/// The command line.
#[derive(Debug, Args)]
pub struct PrepareOptions {
    /// An experiment, by name or file; or a source of pictures: a folder, an archive, a manifest,
    /// `hf://datasets/owner/name`, `named://cifar-10`.
    what: OsString,
    /// Read the experiment's pictures from here instead of its own source.
    #[arg(long, value_name = "PATH")]
    images: Option<PathBuf>,
    /// Change a value: prepare.key=value; may be given several times.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    set: Vec<String>,
    /// Approximate memory limit in MiB; 512 if not given.
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Prepare again, even if the result exists.
    #[arg(long)]
    fresh: bool,
    /// Keep the data below this folder.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    runs: PathBuf,
}

/// The table for pictures that belong to no experiment: all of them, in colour.
const TABLE: &str = r#"
title = "Pictures"
system = "none"

[prepare]
source = ""
format = "auto"
classes = []
images-per-class = 0
images-at-most = 0
channels = 3
broken-share = 0.01
identical = "keep"
stored-shorter-side = 0
"#;

impl PrepareOptions {
    /// The experiment, and the source if it differs from the experiment's own.
    fn experiment(&self, session: &CommandContext) -> Result<(Experiment, Option<PathBuf>)> {
        let library = &session.registry.library;
        let what = self.what.to_string_lossy();
        if what.ends_with(".toml") || library.names()?.iter().any(|name| *name == what) {
            return Ok((library.open(&what)?, self.images.clone()));
        }
        let is_path = what.contains(['/', '\\']) || Path::new(&self.what).exists();
        if !is_path {
            // The message lists the experiments.
            library.open(&what).with_context(|| {
                format!("`{what}` is neither an experiment nor a folder or file")
            })?;
        }
        let source = self.images.clone().unwrap_or_else(|| PathBuf::from(&self.what));
        Ok((Experiment::of_text("pictures", TABLE)?, Some(source)))
    }
}

/// Prepares the pictures and prints their folder.
pub fn run(session: &CommandContext, options: &PrepareOptions) -> Result<()> {
    let (mut experiment, source) = options.experiment(session)?;
    options.set.iter().try_for_each(|assignment| experiment.set(assignment))?;
    let source = source.as_deref().map(absolute_source).transpose()?;
    if let Some(address) = source.as_ref().and_then(|source| model_address(source)) {
        return fetch(session, address);
    }
    let prepared = PreparedData::of(
        session,
        &experiment,
        source.as_deref(),
        &options.runs,
        &Advice::Experiment,
    )?;
    prepared.make(options.memory, options.fresh)?;
    print_line(prepared.folder.display())
}

/// Downloads the files of a model and prints their paths.
fn fetch(session: &CommandContext, address: String) -> Result<()> {
    let program = Executable::own(PREPARE, &session.registry)?;
    let arguments = ["--fetch".into(), address.into()];
    let process = Process::of_helper(PREPARE, &program, &arguments, &session.interrupt);
    print(process.printed()?)
}

/// The address if the source is a model on the hub, which has files but no pictures.
fn model_address(source: &Path) -> Option<String> {
    let text = source.to_string_lossy();
    let is_model = text.starts_with("hf://") && !text.starts_with("hf://datasets/");
    is_model.then(|| text.into_owned())
}
