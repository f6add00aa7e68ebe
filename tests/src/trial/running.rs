//! Commands of a trial while they run: each has a limit of time.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long a command may take. An undisturbed one takes seconds.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A command that was started, in a process group of its own.
#[derive(Debug)]
pub struct RunningCommand {
    group: String,
    waiting: JoinHandle<io::Result<Output>>,
}

impl RunningCommand {
    /// Starts a command and collects what it says.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.process_group(0).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let group = child.id().to_string();
        Ok(Self { group, waiting: thread::spawn(move || child.wait_with_output()) })
    }

    /// Waits for the end. Past [`LIMIT`] shows what still runs, kills it, and returns `None`.
    pub fn wait(self) -> Result<Option<Output>> {
        let begin = Instant::now();
        let mut pause = Duration::from_millis(1);
        while !self.waiting.is_finished() {
            if begin.elapsed() > LIMIT {
                let shown = ["-o", "pid,stat,time,args", "-g", &self.group];
                Command::new("ps").args(shown).status()?;
                signal("-KILL", &format!("-{}", self.group))?;
                break;
            }
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(20));
        }
        let is_late = begin.elapsed() > LIMIT;
        let ended = self.waiting.join().map_err(|_| anyhow!("waiting for a command panicked"))?;
        if is_late { Ok(None) } else { Ok(Some(ended?)) }
    }
}

/// Sends a signal, `-TERM`, to a process, or to a group with a minus before its number. Returns whether
/// it still ran.
pub fn signal(signal: &str, process: &str) -> Result<bool> {
    let mut kill = Command::new("kill");
    Ok(kill.args([signal, "--", process]).stderr(Stdio::null()).status()?.success())
}
