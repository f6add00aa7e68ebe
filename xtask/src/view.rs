//! `assort view`: serves the page of a run to a browser on this machine.
//!
//! This module finds the files of the run; the helper `view` serves them.

use std::ffi::OsString;

use anyhow::Result;

use crate::CommandContext;
use crate::process::Process;
use crate::programs::Executable;
use crate::record::{CORRECTIONS, Recorded, Which};
use crate::report::{embeddings_of, inputs, last_clusters};

/// The command line.
#[derive(Debug, clap::Args)]
pub struct ViewOptions {
    #[command(flatten)]
    which: Which,
    /// Port of this machine to listen at; 0 takes any free one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    port: u16,
}

/// The helper that serves the page.
pub const VIEW: &str = "view";

/// Serves the page of a run, finished or not, until the command is interrupted.
///
/// # Errors
///
/// The run has no clusters yet.
pub fn run(session: &CommandContext, options: &ViewOptions) -> Result<()> {
    let run = options.which.find()?;
    run.removing_damaged(serve(session, &run, options), &session.interrupt)
}

fn serve(session: &CommandContext, run: &Recorded, options: &ViewOptions) -> Result<()> {
    let steps = run.finished();
    let specs = session.registry.specs();
    let last = last_clusters(run, &specs)?;
    run.warn_if_unfinished(format_args!("the page shows the result up to {}", last.name));
    let _held = run.hold(&steps, &session.interrupt)?;
    let mut arguments = inputs(run, &steps, last, embeddings_of(&steps, last, &specs));
    for (flag, value) in [
        ("--corrections", run.folder.join(CORRECTIONS).into()),
        ("--port", OsString::from(options.port.to_string())),
    ] {
        arguments.extend([flag.into(), value]);
    }
    let program = Executable::own(VIEW, &session.registry)?;
    let interrupt = &session.interrupt;
    Process::of_helper(VIEW, &program, &arguments, interrupt).show()
}
