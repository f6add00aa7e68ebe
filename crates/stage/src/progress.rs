//! Progress of a long step on stderr: a bar on a terminal, log lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Progress of a step whose length may be unknown.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    label: String,
    length: u64,
    done: u64,
    last_line: Instant,
}

/// Least time between two log lines.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

impl Progress {
    /// Shows `label` and the share of `length` that is done. A length of 0 is unknown.
    pub fn new(label: &str, length: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let (template, bar) = match length {
                0 => ("{prefix:22} {spinner} {pos} {msg} {elapsed}", ProgressBar::no_length()),
                _ => ("{prefix:22} {bar:32} {pos}/{len} {msg} {eta}", ProgressBar::new(length)),
            };
            let style = ProgressStyle::with_template(template);
            let bar = bar.with_prefix(label.to_owned());
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, label: label.to_owned(), length, done: 0, last_line: Instant::now() }
    }

    /// Sets the amount that is done; `note` is shown beside it, such as the loss.
    pub fn at(&mut self, done: u64, note: &str) {
        self.done = done;
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(note.to_owned());
            }
            None if self.last_line.elapsed() >= BETWEEN_LINES => {
                self.last_line = Instant::now();
                match self.length {
                    0 => tracing::info!("{} {done} {note}", self.label),
                    length => tracing::info!("{} {done}/{length} {note}", self.label),
                }
            }
            None => {}
        }
    }

    /// Adds one to the amount that is done.
    pub fn step(&mut self, note: &str) {
        self.at(self.done + 1, note);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
