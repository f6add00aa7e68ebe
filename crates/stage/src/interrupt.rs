//! Interrupts: a flag that signals raise and that long work polls.

use std::env;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use collective::Communicator;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::status::{Interrupted, Status};

/// Tells whether the user or the system asked the program to stop.
///
/// A program creates one with [`Interrupt::listen`] and passes clones to long work. The default is
/// raised by [`Interrupt::raise`] alone, not by signals: for tests, and for a caller that handles
/// signals itself.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// An interrupt that SIGINT, SIGTERM and SIGHUP raise, and under [`HELD_BY_STDIN`] the end of
    /// standard input. A second signal ends the process at once, with the exit status of an
    /// interruption: files are replaced atomically, so nothing is lost.
    pub fn listen() -> Result<Self> {
        Self::listen_on_rank(&Communicator::single())
    }

    /// [`listen`](Self::listen), where this process is one of several ranks. Of these the first alone
    /// has a standard input; for the others it ends at once. A training takes an interrupt of any rank
    /// as one of all.
    pub fn listen_on_rank(communicator: &Communicator) -> Result<Self> {
        let interrupt = Self::default();
        for signal in signals() {
            // In this order: the first signal finds the flag down, the second finds it raised.
            let code = i32::from(Status::Interrupted.code());
            flag::register_conditional_shutdown(signal, code, Arc::clone(&interrupt.0))
                .context("listening for interrupts")?;
        }
        if env::var_os(HELD_BY_STDIN).is_some() && communicator.is_first() {
            interrupt.raise_at_end_of(io::stdin());
        }
        interrupt.register()
    }

    /// Raises the flag when `input` ends.
    fn raise_at_end_of(&self, mut input: impl Read + Send + 'static) {
        let interrupt = self.clone();
        thread::spawn(move || {
            // An input that cannot be read has ended too.
            let _ = io::copy(&mut input, &mut io::sink());
            interrupt.raise();
        });
    }

    /// Like [`Interrupt::listen`], but signals never end this process: for a program that waits for
    /// another one, which receives the same signals and ends first.
    pub fn listen_without_exit() -> Result<Self> {
        Self::default().register()
    }

    fn register(self) -> Result<Self> {
        for signal in signals() {
            flag::register(signal, Arc::clone(&self.0)).context("listening for interrupts")?;
        }
        Ok(self)
    }

    /// Raises the flag, as a signal does.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// True once the program was asked to stop: save at the next step, and return [`Interrupted`].
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Fails with [`Interrupted`] once the program was asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.is_raised() { Err(Interrupted.into()) } else { Ok(()) }
    }
}

/// The environment variable under which a program stops at the end of its standard input.
///
/// Whoever starts a program under it keeps the other end of a pipe open: the program then stops when
/// its parent asks it to by closing the pipe, and also when the parent is killed.
pub const HELD_BY_STDIN: &str = "ASSORT_HELD_BY_STDIN";

/// The signals that ask a program to stop.
#[cfg(unix)]
fn signals() -> Vec<i32> {
    let hangup = (!hangup_is_ignored()).then_some(signal_hook::consts::SIGHUP);
    [SIGINT, SIGTERM].into_iter().chain(hangup).collect()
}

/// The signals that ask a program to stop.
#[cfg(not(unix))]
fn signals() -> Vec<i32> {
    vec![SIGINT, SIGTERM]
}

/// True under `nohup`, which lets a program outlive its terminal.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 << (signal_hook::consts::SIGHUP - 1) != 0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn clones_share_the_flag_and_two_interrupts_do_not() {
        let (interrupt, other) = (Interrupt::default(), Interrupt::default());
        let clone = interrupt.clone();
        clone.check().expect("nobody asked");
        interrupt.raise();
        assert!(clone.is_raised() && !other.is_raised());
        assert!(clone.check().expect_err("asked").is::<Interrupted>());
    }

    /// The test of this name in a process of its own, started by this shell command.
    #[cfg(unix)]
    fn in_a_process(test: &str, command: &str) -> Option<i32> {
        let program = std::env::current_exe().expect("this program");
        let name = format!("interrupt::tests::{test}");
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", command]).arg(program).args(["--exact", &name]);
        shell.env(CHILD, test).output().expect("started").status.code()
    }

    /// Says to a test that it is the process to be ended.
    #[cfg(unix)]
    const CHILD: &str = "ASSORT_TEST_OF_INTERRUPTS";

    #[cfg(unix)]
    #[test]
    fn a_second_signal_ends_the_process_with_the_status_of_an_interruption() {
        let name = "a_second_signal_ends_the_process_with_the_status_of_an_interruption";
        if std::env::var(CHILD).is_ok_and(|test| test == name) {
            let interrupt = Interrupt::listen().expect("listens");
            signal_hook::low_level::raise(SIGTERM).expect("raised");
            assert!(interrupt.is_raised(), "the first only raises the flag");
            signal_hook::low_level::raise(SIGINT).expect("raised");
            panic!("the second signal did not end the process");
        }
        assert_eq!(in_a_process(name, "exec \"$0\" \"$@\""), Some(3));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_hangup_interrupts_unless_it_was_ignored_as_under_nohup() {
        let name = "a_hangup_interrupts_unless_it_was_ignored_as_under_nohup";
        if std::env::var(CHILD).is_ok_and(|test| test == name) {
            let interrupt = Interrupt::listen().expect("listens");
            signal_hook::low_level::raise(signal_hook::consts::SIGHUP).expect("raised");
            std::process::exit(if interrupt.is_raised() { 30 } else { 31 });
        }
        // These tests may themselves run under nohup.
        let unless_ignored = if hangup_is_ignored() { 31 } else { 30 };
        assert_eq!(in_a_process(name, "exec \"$0\" \"$@\""), Some(unless_ignored));
        assert_eq!(in_a_process(name, "trap '' HUP; exec \"$0\" \"$@\""), Some(31));
    }

    #[test]
    fn the_end_of_an_input_raises_the_flag_and_its_bytes_do_not() {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let interrupt = Interrupt::default();
        interrupt.raise_at_end_of(reader);
        io::Write::write_all(&mut writer, b"still here").expect("written");
        thread::sleep(Duration::from_millis(50));
        assert!(!interrupt.is_raised());
        drop(writer);
        let raised = (0..1000).any(|_| {
            thread::sleep(Duration::from_millis(10));
            interrupt.is_raised()
        });
        assert!(raised, "not within 10 s");
    }

    #[cfg(unix)]
    #[test]
    fn a_signal_raises_the_flag() {
        let interrupt = Interrupt::listen_without_exit().expect("listens");
        signal_hook::low_level::raise(signal_hook::consts::SIGTERM).expect("raised");
        assert!(interrupt.is_raised());
    }
}
