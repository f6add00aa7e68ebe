//! `assort clusters`: estimates the number of clusters from a run's embeddings.
//!
//! This module finds the file of embeddings; the helper `clusters` computes and prints.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result};
use stage::{Output, Spec};

use crate::CommandContext;
use crate::process::Process;
use crate::programs::Executable;
use crate::record::{Recorded, RecordedStep, Which};
use crate::store::Hold;

/// The command line.
#[derive(Debug, clap::Args)]
pub struct ClustersOptions {
    #[command(flatten)]
    which: Which,
    /// Smallest number of clusters to try.
    #[arg(long, value_name = "K", default_value_t = 2)]
    from: usize,
    /// Largest number of clusters to try; by default 50, or a quarter of the pictures if that is less.
    #[arg(long, value_name = "K")]
    to: Option<usize>,
    /// Print the curve as one JSON object at the end, and the progress as JSON lines on stderr.
    #[arg(long)]
    pub json: bool,
    /// Arguments for the helper; `-- --help` lists them.
    #[arg(last = true, value_name = "ARGUMENT")]
    rest: Vec<OsString>,
}

/// The helper that computes the estimate.
pub const CLUSTERS: &str = "clusters";

/// The file that a step writes if it embeds.
pub const EMBEDDINGS: &str = "embeddings.safetensors";

/// Finds the embeddings and starts the helper on them.
pub fn run(session: &CommandContext, options: &ClustersOptions) -> Result<()> {
    let (embeddings, _held) = embeddings_of(session, &options.which)?;
    let program = Executable::own(CLUSTERS, &session.registry)?;
    let mut arguments: Vec<OsString> = vec!["--embeddings".into(), embeddings.into()];
    for (flag, value) in [
        ("--from", Some(options.from as u64)),
        ("--to", options.to.map(|to| to as u64)),
        ("--seed", Some(options.which.seed)),
    ] {
        let value = value.map(|value| [flag.into(), value.to_string().into()]);
        arguments.extend(value.into_iter().flatten());
    }
    if options.json {
        arguments.push("--json".into());
    }
    arguments.extend(options.rest.iter().cloned());
    let interrupt = &session.interrupt;
    Process::of_helper(CLUSTERS, &program, &arguments, interrupt).show()
}

/// Finds the embeddings that `which` names: a file, a file in a folder, or the output of the run's
/// last finished step that embeds.
fn embeddings_of(session: &CommandContext, which: &Which) -> Result<(PathBuf, Vec<Hold>)> {
    let named = PathBuf::from(&which.run);
    for file in [named.clone(), named.join(EMBEDDINGS)] {
        if file.is_file() && file.extension().is_some_and(|extension| extension == "safetensors") {
            return Ok((file, Vec::new()));
        }
    }
    let run = which.find()?;
    let step = last_embeddings(&run, &session.registry.specs())?;
    run.warn_if_unfinished(format_args!("the estimate is for the embeddings of {}", step.name));
    let held = run.hold(&[step], &session.interrupt)?;
    Ok((run.path(step).join(EMBEDDINGS), held))
}

/// The run's last finished step that embeds.
///
/// # Errors
///
/// There is none.
pub fn last_embeddings<'a>(run: &'a Recorded, stages: &[Spec]) -> Result<&'a RecordedStep> {
    run.last(stages, |stage| stage.outputs.contains(&Output::Embeddings)).with_context(|| {
        format!(
            "`{}` holds no embeddings: neither `{EMBEDDINGS}` nor a finished step `<round>-embed`; \
             `assort reproduce` resumes the run",
            run.folder.display()
        )
    })
}
