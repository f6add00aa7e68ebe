//! `cargo xtask report`: a finished run as a page, a table and folders of pictures.
//!
//! Which files of the run those are, is decided here; what they look like is the affair of the
//! program `report`.

use std::ffi::OsString;
use std::path::{PathBuf, absolute};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::finished::{Finished, Which, target};
use crate::programs::Programs;

/// What is asked for on the command line.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    which: Which,
    /// Pictures of each cluster to show: the surest, and a third as many of the least sure.
    #[arg(long, value_name = "N", default_value_t = 24)]
    shown: usize,
    /// Also copy every picture to a folder of its cluster.
    #[arg(long)]
    pictures: bool,
    /// Folder to write into; `report` in the run's folder when not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Options {
    /// Makes the paths absolute that are seen from where the user stands.
    pub fn resolve_paths(&mut self) -> Result<()> {
        if let Some(out) = &mut self.out {
            *out = absolute(&*out)?;
        }
        self.which.resolve_paths()
    }
}

/// Finds the run's files, and lets the program write.
///
/// # Errors
///
/// The run has no clusters yet, the program cannot be built, or it fails.
pub fn run(options: &Options) -> Result<()> {
    let run = options.which.find()?;
    let words = words(&run, options)?;
    let programs = match &options.which.programs {
        Some(folder) => Programs::in_folder(&[PROGRAM], folder)?,
        None => Programs::build(&[PROGRAM], None)?,
    };
    let program = programs.get(PROGRAM);
    let status = Command::new(&program.path).args(&program.words).args(words).status();
    let status = status.with_context(|| format!("starting `{}`", program.path.display()))?;
    ensure!(status.success(), "{PROGRAM} ended with {status}; what it said is above");
    Ok(())
}

const PROGRAM: &str = "report";
const FILE: &str = "pseudo-labels.safetensors";

/// The command line of the program.
fn words(run: &Finished, options: &Options) -> Result<Vec<OsString>> {
    let folder = &run.folder;
    let last = run.last_with(FILE).with_context(|| {
        format!(
            "`{}` has no clusters yet: no step left `{FILE}`; let the run come that far",
            folder.display()
        )
    })?;
    let experiment = folder.parent().unwrap_or(folder);
    let pictures = target(&experiment.join("data"));
    let out = options.out.clone().unwrap_or_else(|| folder.join("report"));
    let mut words: Vec<OsString> = Vec::new();
    for (flag, value) in [
        ("--images", pictures.join("images.safetensors")),
        ("--names", pictures.join("names.safetensors")),
        ("--pseudo-labels", last.folder.join(FILE)),
        ("--title", run.name().into()),
        ("--out", out),
        ("--shown", options.shown.to_string().into()),
    ] {
        words.extend([flag.into(), value.into()]);
    }
    for step in &run.steps {
        let mut word = OsString::from(format!("{}-{}=", step.round, step.place));
        word.push(&step.folder);
        words.extend(["--step".into(), word]);
    }
    if options.pictures {
        words.push("--pictures".into());
    }
    Ok(words)
}
