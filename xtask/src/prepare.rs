//! `cargo xtask prepare`: the pictures of an experiment, or any others, in the form of the stages.

use std::fs;
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result};
use clap::Args;

use crate::prepared::{self, Prepared};
use crate::programs::{PREPARE, Programs};
use crate::store;
use stage::{Experiment, Library};

/// The command line.
#[derive(Debug, Args)]
pub struct Options {
    /// An experiment, by name or file; or where pictures lie: a folder, an archive, a manifest,
    /// `hf://datasets/owner/name`, `named://cifar-10`.
    what: String,
    /// Where the experiment's pictures are, instead of its own source.
    #[arg(long, value_name = "PATH")]
    images: Option<PathBuf>,
    /// Change a value: prepare.key=value; may be given several times.
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    set: Vec<String>,
    /// How much memory preparing may take, about, in MiB; 512 if not given.
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Prepare again, also what is there.
    #[arg(long)]
    fresh: bool,
    /// Use the programs in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Keep the data below this folder.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    runs: PathBuf,
}

/// How pictures are prepared that belong to no experiment: all of them, in colour.
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
"#;

impl Options {
    /// Makes the paths absolute that are seen from where the user stands.
    ///
    /// # Errors
    ///
    /// There is no such place.
    pub fn resolve_paths(&mut self) -> Result<()> {
        for path in [self.images.as_mut(), self.programs.as_mut()].into_iter().flatten() {
            *path = prepared::absolute_source(path)?;
        }
        if self.runs != Path::new("runs") {
            self.runs = absolute(&self.runs)?;
        }
        // A name of an experiment is looked up where the experiments are, anything else is a path.
        let is_file = self.what.ends_with(".toml");
        if is_file || self.what.contains(['/', '\\']) || Path::new(&self.what).exists() {
            let path = prepared::absolute_source(Path::new(&self.what))?;
            self.what = path.to_string_lossy().into_owned();
        }
        Ok(())
    }

    /// The experiment, and the source if it is another than the experiment's own.
    fn experiment(&self) -> Result<(Experiment, Option<PathBuf>)> {
        let named = Path::new(stage::FOLDER).join(format!("{}.toml", self.what));
        if self.what.ends_with(".toml") || named.is_file() {
            return Ok((Library::default().open(&self.what)?, self.images.clone()));
        }
        let is_path = self.what.contains(['/', '\\']);
        if !is_path {
            // The message says which experiments there are.
            Library::default().open(&self.what).with_context(|| {
                format!("`{}` is neither an experiment nor a folder or file", self.what)
            })?;
        }
        let source = self.images.clone().unwrap_or_else(|| PathBuf::from(&self.what));
        Ok((Experiment::of_text("pictures", TABLE)?, Some(source)))
    }
}

/// Prepares, and prints the folder that holds the pictures then.
///
/// # Errors
///
/// The program says why.
pub fn run(options: &Options) -> Result<()> {
    let (mut experiment, source) = options.experiment()?;
    options.set.iter().try_for_each(|assignment| experiment.set(assignment))?;
    let programs = match &options.programs {
        Some(folder) => Programs::in_folder(&[PREPARE], folder)?,
        None => Programs::build(&[PREPARE], None)?,
    };
    let program = programs.get(PREPARE);
    if let Some(address) = source.as_ref().and_then(|source| model_address(source)) {
        let arguments = ["--fetch".into(), address.into()];
        print!("{}", crate::run::printed(PREPARE, program, &arguments)?);
        return Ok(());
    }
    let prepared = Prepared::of(&experiment, source.as_deref(), program, &options.runs)?;
    if options.fresh {
        prepared.forget()?;
    }
    let file = prepared.folder.with_extension("toml");
    fs::create_dir_all(options.runs.join(".data"))
        .and_then(|()| fs::write(&file, experiment.to_toml()))
        .with_context(|| format!("writing `{}`", file.display()))?;
    prepared.make(&file, source.as_deref(), program, options.memory)?;
    store::show(&options.runs.join(&experiment.name).join("data"), &prepared.folder)?;
    println!("{}", prepared.folder.display());
    Ok(())
}

/// The address of a model on the hub, which has files but no pictures.
fn model_address(source: &Path) -> Option<String> {
    let text = source.to_string_lossy();
    let is_model = text.starts_with("hf://") && !text.starts_with("hf://datasets/");
    is_model.then(|| text.into_owned())
}
