//! Output of a program: results on stdout, log lines and errors on stderr.
//!
//! Use [`print()`] and [`print_error`] instead of `println!` and `eprintln!`. Those panic when the
//! pipe is closed (`assort list | head -1`), and print escape sequences in file names, which can
//! colour, erase or forge lines of a terminal. `tracing` escapes log lines.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

/// Prints `text` to stdout, without a newline. Escapes control characters except line breaks and
/// tabs, see [`printable`]. A closed pipe is not an error: the program continues without output.
pub fn print(text: impl Display) -> Result<()> {
    to(&mut io::stdout().lock(), text).context("printing to stdout")
}

/// Prints `text` and a newline to stdout, see [`print()`].
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

fn to(out: &mut impl Write, text: impl Display) -> io::Result<()> {
    let text = text.to_string();
    let text = escaped(&text, |c| is_unsafe(c) && c != '\n' && c != '\t');
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Prints `text` and a newline to stderr if that is open; escaped as by [`print()`].
pub fn print_error(text: impl Display) {
    // A failure to report an error cannot be reported anywhere.
    let _ = to(&mut io::stderr().lock(), format_args!("{text}\n"));
}

/// A number with a noun, which gets an s unless there is one: `1 picture`, `2 pictures`.
pub fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Escapes a name, so that it stays on its line and changes nothing in a terminal.
///
/// Control characters, line breaks among them, and those that reverse the direction of writing
/// become `\u001b` and the like. That form is the same text in JSON and TOML.
pub fn printable(name: &str) -> Cow<'_, str> {
    escaped(name, is_unsafe)
}

fn escaped(text: &str, escape: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&escape) {
        return text.into();
    }
    let each = |c: char| match escape(c) {
        true => format!("\\u{:04x}", u32::from(c)),
        false => c.to_string(),
    };
    text.chars().map(each).collect::<String>().into()
}

/// Control characters, line and paragraph separators, and marks of the direction of writing.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2066}'..='\u{2069}')
}

/// Sends log lines to stderr, `info` and above unless `RUST_LOG` says otherwise.
pub fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // In tests, a process may call this twice; the first call counts.
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
    fn escape_sequences_of_names_do_not_reach_the_terminal() {
        let name = "a\u{1b}[31m\r\n\u{9b}2J\u{202e}gnp.jpg ä日本";
        let want = r"a\u001b[31m\u000d\u000a\u009b2J\u202egnp.jpg ä日本";
        assert_eq!(printable(name), want);
        assert!(matches!(printable("ä日本 b.png"), Cow::Borrowed("ä日本 b.png")));
        // The same name to a reader of JSON.
        let read: String = serde_json::from_str(&format!("\"{want}\"")).expect("JSON");
        assert_eq!(read, name);
        let mut text = Vec::new();
        to(&mut text, "1\t2\n\u{1b}[0m").expect("written");
        assert_eq!(text, b"1\t2\n\\u001b[0m");
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
