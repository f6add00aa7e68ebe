//! Starts programs, waits for them, and interprets their exit status.
//!
//! An interrupt is passed on to the running program, and the program stops if this process ends in
//! any way. Our own programs are signalled by the end of their standard input, which this process
//! holds open (see [`stage::Interrupt`]): unlike a signal, it cannot arrive twice. A foreign
//! executable gets SIGTERM. Its standard input is the claim of its folder, so the claim lasts as
//! long as the process.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use stage::{Diverged, Interrupt, Interrupted, MachineFailed, Status, progress};
use tempfile::NamedTempFile;

use crate::cost::{self, StepCost};
use crate::jobs::MachineShare;
use crate::programs::Executable;

/// One start of a program.
#[derive(Debug)]
pub struct Process<'a> {
    /// Its name in messages: `0-embed, seed 0`.
    pub name: &'a str,
    /// The program to start.
    pub program: &'a Executable,
    /// Its arguments.
    pub arguments: &'a [OsString],
    /// Stops it when raised.
    pub interrupt: &'a Interrupt,
    /// Where the message of our own program goes if it fails.
    pub message: MessageTo<'a>,
}

/// Where the message of a failed program goes.
#[derive(Debug, Clone, Copy)]
pub enum MessageTo<'a> {
    /// The program prints it. Our error says that it is above.
    Stderr,
    /// It becomes our error, and nothing else is printed.
    Error,
    /// Like `Error`, and it is appended to this file.
    ErrorAndFile(&'a Path),
    /// Like `Error`, after the name of the process.
    NamedError,
}

/// The file to which a program appends its message.
struct MessageFile<'a> {
    path: Option<&'a Path>,
    /// How much of it others wrote before.
    earlier: usize,
}

impl MessageFile<'_> {
    /// What the file has now.
    fn contents(&self) -> String {
        let bytes = self.path.and_then(|path| fs::read(path).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The message without the name of the program before it.
    fn message(&self) -> Option<String> {
        Some(self.contents().get(self.earlier..)?.trim().split_once(": ")?.1.to_owned())
    }
}

/// Where the stdout of a program goes.
#[derive(Debug, Clone, Copy)]
enum OutputTo {
    /// To our stderr: stdout is for results.
    Stderr,
    /// To our stdout, unchanged.
    Stdout,
    /// To the caller.
    Caller,
}

impl<'a> Process<'a> {
    /// A helper that a command starts alone: its message becomes the error of the command.
    pub fn of_helper(
        name: &'a str,
        program: &'a Executable,
        arguments: &'a [OsString],
        interrupt: &'a Interrupt,
    ) -> Self {
        Self { name, program, arguments, interrupt, message: MessageTo::Error }
    }

    /// Runs the program to its end; its stdout goes to our stderr.
    ///
    /// - `claim`: of the folder it writes to.
    pub fn run(&self, claim: Option<&File>) -> Result<()> {
        self.wait(OutputTo::Stderr, claim).map(drop)
    }

    /// Like [`Process::run`], for a step that writes to `folder`; its cost is recorded there.
    ///
    /// - `share`: what it has of the machine.
    pub fn run_in(&self, folder: &Path, claim: &File, share: MachineShare) -> Result<()> {
        let mut command = self.program.step_command(share.steps);
        if share.is_named {
            command.env(progress::STEP, self.name);
        }
        let (ended, cost) = self.wait_for(command, OutputTo::Stderr, Some(claim))?;
        cost.add_to(folder)?;
        ended.map(drop)
    }

    /// Like [`Process::run`], but its stdout goes to our stdout.
    pub fn show(&self) -> Result<()> {
        self.wait(OutputTo::Stdout, None).map(drop)
    }

    /// Runs the program to its end and returns its stdout.
    pub fn printed(&self) -> Result<String> {
        self.wait(OutputTo::Caller, None)
    }

    /// Runs the program to its end and returns its stdout where that goes to the caller.
    fn wait(&self, output: OutputTo, claim: Option<&File>) -> Result<String> {
        self.wait_for(self.program.command(), output, claim)?.0
    }

    /// Runs a command to its end. Returns its result and what it cost.
    fn wait_for(
        &self,
        command: Command,
        output: OutputTo,
        claim: Option<&File>,
    ) -> Result<(Result<String>, StepCost)> {
        let own = match self.message {
            MessageTo::Error | MessageTo::NamedError => {
                Some(NamedTempFile::new().context("creating a temporary file")?)
            }
            MessageTo::Stderr | MessageTo::ErrorAndFile(_) => None,
        };
        let path = match self.message {
            MessageTo::ErrorAndFile(path) => Some(path),
            _ => own.as_ref().map(NamedTempFile::path),
        };
        let mut file = MessageFile { path, earlier: 0 };
        file.earlier = file.contents().len();
        let (status, printed, cost) = self.run_command(command, output, claim, path)?;
        Ok((self.ended(status, file.message()).map(|()| printed), cost))
    }

    fn run_command(
        &self,
        mut command: Command,
        output: OutputTo,
        claim: Option<&File>,
        message_file: Option<&Path>,
    ) -> Result<(ExitStatus, String, StepCost)> {
        let started = PathBuf::from(command.get_program());
        let began = Instant::now();
        let mut run = || -> io::Result<_> {
            let mut child = self.complete(&mut command, output, claim, message_file)?.spawn()?;
            let printed = child.stdout.take().map(|mut stdout| {
                thread::spawn(move || {
                    let mut bytes = Vec::new();
                    stdout.read_to_end(&mut bytes).map(|_| bytes)
                })
            });
            let (status, peak_bytes) = self.watch(&mut child)?;
            let printed = match printed.map(thread::JoinHandle::join) {
                Some(Ok(bytes)) => bytes?,
                _ => Vec::new(),
            };
            let cost = StepCost { seconds: began.elapsed().as_secs_f64(), peak_bytes };
            Ok((status, String::from_utf8_lossy(&printed).into_owned(), cost))
        };
        run().with_context(|| {
            format!("starting the program `{}`; is it there, and executable?", started.display())
        })
    }

    /// Adds arguments, standard streams and variables.
    fn complete<'c>(
        &self,
        command: &'c mut Command,
        output: OutputTo,
        claim: Option<&File>,
        message_file: Option<&Path>,
    ) -> io::Result<&'c mut Command> {
        command.args(self.arguments);
        command.stdout(match output {
            OutputTo::Stderr => Stdio::from(io::stderr()),
            OutputTo::Stdout => Stdio::inherit(),
            OutputTo::Caller => Stdio::piped(),
        });
        command.stdin(match (self.program.is_own(), claim) {
            (true, _) => Stdio::piped(),
            (false, Some(claim)) => claim.try_clone()?.into(),
            (false, None) => Stdio::null(),
        });
        if self.program.is_own() {
            command.env(stage::HELD_BY_STDIN, "1");
        }
        if let Some(file) = message_file {
            command.env(stage::ERROR_FILE, file);
        }
        if progress::is_json() {
            command.env(progress::JSON_PROGRESS, "1");
        }
        Ok(command)
    }

    /// Waits for the end. Meanwhile passes on an interrupt and measures the peak memory.
    fn watch(&self, child: &mut Child) -> io::Result<(ExitStatus, Option<u64>)> {
        let mut stdin = child.stdin.take();
        let mut is_told = false;
        let mut peak_bytes = None;
        let mut pause = Duration::from_millis(1);
        loop {
            peak_bytes = peak_bytes.max(cost::peak_of(child.id()));
            if let Some(status) = child.try_wait()? {
                return Ok((status, peak_bytes));
            }
            if self.interrupt.is_raised() && !is_told {
                is_told = true;
                stdin.take();
                if !self.program.is_own() {
                    terminate(child);
                }
            }
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(50));
        }
    }

    /// Converts the exit status to a result.
    ///
    /// - `message`: that of the program, if it was not printed.
    fn ended(&self, status: ExitStatus, message: Option<String>) -> Result<()> {
        let Self { name, .. } = self;
        let with_message = |what: &str| match &message {
            Some(message) => format!("{what}: {message}"),
            None => format!("{what}; its message is above"),
        };
        match status.code() {
            Some(code) => match Status::from_code(code) {
                Some(Status::Done) => Ok(()),
                Some(Status::Interrupted) => Err(Interrupted.into()),
                Some(Status::Diverged) => {
                    Err(Diverged(with_message(&format!("{name} diverged or collapsed"))).into())
                }
                Some(Status::MachineFailed) => Err(MachineFailed(format!(
                    "{}; what it saved is kept",
                    with_message(&format!("{name} failed because of the machine"))
                ))
                .into()),
                // As a shell, `mpirun` adds 128 to the signal that ended a rank.
                None if self.program.ranks > 1 && code > 128 => Err(MachineFailed(format!(
                    "a rank of {name} was ended by signal {}, the message above says which; what was \
                     saved is kept, and the same command resumes from there",
                    code - 128
                ))
                .into()),
                _ => match &message {
                    Some(message) if matches!(self.message, MessageTo::NamedError) => {
                        bail!("{name}: {message}")
                    }
                    Some(message) => bail!("{message}"),
                    None => bail!("{name} failed with exit status {code}; its message is above"),
                },
            },
            None if self.interrupt.is_raised() => Err(Interrupted.into()),
            None => Err(killed(name, status)),
        }
    }
}

/// Asks a foreign executable to stop.
#[cfg(unix)]
fn terminate(child: &Child) {
    use rustix::process::{Pid, Signal, kill_process};

    // It may have ended already, which is fine.
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
}

#[cfg(not(unix))]
fn terminate(_: &Child) {}

/// The error for a program that was killed or crashed.
fn killed(name: &str, status: ExitStatus) -> Error {
    let remedy = match signal_of(status) {
        Some(SIGKILL) => {
            ": probably because memory ran out; what it saved is kept, and the same command \
             resumes from there"
        }
        Some(SIGXFSZ) => {
            ": it wrote a file larger than `ulimit -f` allows; raise that limit and run the same \
             command again"
        }
        _ => ": it crashed; its message is above, if there is one",
    };
    MachineFailed(format!("{name} was ended by {status}{remedy}")).into()
}

const SIGKILL: i32 = 9;
const SIGXFSZ: i32 = 25;

#[cfg(unix)]
fn signal_of(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal_of(_: ExitStatus) -> Option<i32> {
    None
}
