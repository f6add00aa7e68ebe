//! What a program says: results on stdout, log lines and errors on stderr.
//!
//! Use [`print()`] and [`print_error`] in place of `println!` and `eprintln!`, which panic where the
//! reader has gone (`assort list | head -1`).

use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

/// Prints `text` to stdout as it is, without a newline. A reader that has gone is not an error: the
/// program goes on without it.
pub fn print(text: impl Display) -> Result<()> {
    to(&mut io::stdout().lock(), text).context("printing to stdout")
}

/// Prints `text` and a newline to stdout, see [`print()`].
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

fn to(out: &mut impl Write, text: impl Display) -> io::Result<()> {
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Prints `text` and a newline to stderr, where that can be written to.
pub fn print_error(text: impl Display) {
    // There is no other place left to report a failure to.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Sends log lines to stderr, `info` and above unless `RUST_LOG` says otherwise.
pub fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call in one process, as in tests, finds the first in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        // They would go to stderr too, and panic where it is closed.
        .log_internal_errors(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Failing(ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_error_but_a_full_disk_is() {
        let mut text = Vec::new();
        to(&mut text, "1 of 2").expect("written");
        assert_eq!(text, b"1 of 2");
        to(&mut Failing(ErrorKind::BrokenPipe), "1 of 2").expect("nobody reads");
        assert!(to(&mut Failing(ErrorKind::StorageFull), "1 of 2").is_err());
    }
}
