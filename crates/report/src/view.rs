//! The program `view`: the page of a run, served to a browser on this machine.
//!
//! `assort view RUN` starts it. The page is that of [`crate::page`], but its pictures, names and map are sent
//! when they are seen, so that 100,000 pictures open at once; and it can be corrected.
//!
//! - [`access`]: who may ask.
//! - [`server`]: which address gives what.
//! - [`served`]: the run behind it, and its thumbnails.
//! - [`edits`]: corrections, saved at once.

pub mod access;
pub mod edits;
pub mod served;
pub mod server;
#[cfg(test)]
pub(crate) mod tests;

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use stage::Interrupt;
use stage::console::{print_line, start_logging};

use crate::run_files::RunFiles;
use crate::view::access::AccessControl;
use crate::view::served::ServedRun;

/// Serves the page of a run to a browser on this machine.
#[derive(Debug, Clone, Parser)]
#[command(name = "view", version)]
pub struct ViewArguments {
    /// The files of the run.
    #[command(flatten)]
    pub run: RunFiles,
    /// Port of this machine to listen at; 0 takes any free one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub port: u16,
    /// The corrections to read and write: corrections.toml. It need not exist.
    #[arg(long, value_name = "FILE")]
    pub corrections: PathBuf,
}

/// The program: the command line `words` in, the exit status out.
pub fn program(words: Vec<OsString>) -> ExitCode {
    start_logging();
    let arguments = ViewArguments::parse_from(words);
    let result = Interrupt::listen().and_then(|interrupt| run(&arguments, &interrupt));
    stage::finish("view", &result)
}

/// Serves the page until the program is interrupted. The first line of stdout is the address.
///
/// # Errors
///
/// An input is missing or damaged, the inputs are about different pictures, the port is taken, or the program
/// is interrupted before it serves.
pub fn run(arguments: &ViewArguments, interrupt: &Interrupt) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port)).with_context(|| {
        let port = arguments.port;
        format!(
            "listening at port {port} of this machine; give another one with --port, or 0 for any"
        )
    })?;
    let access = AccessControl::new(
        listener.local_addr().context("finding the port of this server")?.port(),
    )?;
    let served = Arc::new(ServedRun::open(arguments, interrupt)?);
    print_line(access.address())?;
    tracing::info!("open the address in a browser; Ctrl-C ends this program");
    server::serve(listener, access, served, interrupt)
}
