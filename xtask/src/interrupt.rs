//! Interrupts: the program at work is left to save and stop, then the run stops.
//!
//! A terminal sends Ctrl-C to every program of the group, so the one at work hears it too; all
//! that is needed here is not to end before it.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use crate::status::Stop;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Listens from now on.
pub fn listen() -> Result<()> {
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))
        .context("listening for interrupts")
}

/// True once the user or the system asked to stop.
pub fn seen() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Fails once the user or the system asked to stop.
pub fn check() -> Result<()> {
    if seen() { Err(Stop::Interrupted.into()) } else { Ok(()) }
}
