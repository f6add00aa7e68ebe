//! Progress of a long step on stderr: a bar on a terminal, log lines elsewhere, JSON for programs.
//!
//! A command with `--json` calls [`use_json`] and sets [`JSON_PROGRESS`] for the programs that it starts. Each
//! event is then one line of stderr, an object with the key `event`. Other lines of stderr are text for
//! people.
//!
//! - `progress`: `label` names the work, or the step where several run at once; `done` of `of` (0 if unknown) is
//!   finished; `note` is such as the loss. Once two amounts are known, there are also `per-second` of `unit` and `seconds-left`. At most one event a
//!   second is sent, and one at the end.
//! - `step`: the step `name` of `seed`, `number` of `of` in its run, has the `state` `starts`, `resumes`,
//!   `done` or `done already`.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::console;

/// Environment variable that makes a program report its progress as JSON.
pub const JSON_PROGRESS: &str = "ASSORT_JSON_PROGRESS";

/// Environment variable with the name of a step that may run beside others. The step's progress then has that name,
/// and is printed in lines: two bars would overwrite each other.
pub const STEP: &str = "ASSORT_STEP";

/// Set once for the whole process, like the log's subscriber. It changes what is printed and no result.
static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Reports the progress of this process, and of the programs that it starts, as JSON.
pub fn use_json() {
    IS_JSON.store(true, Ordering::Relaxed);
}

/// Returns whether progress is reported as JSON.
pub fn is_json() -> bool {
    IS_JSON.load(Ordering::Relaxed) || std::env::var_os(JSON_PROGRESS).is_some()
}

/// Prints an event for programs; nothing if progress is not reported as JSON.
pub fn event(event: &Value) {
    if is_json() {
        console::print_error(event);
    }
}

/// What is counted. A rate is shown in these units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Steps, epochs or candidates, as the label says.
    Steps,
    /// Steps of this many images.
    Images(u64),
    /// Bytes.
    Bytes,
}

impl Unit {
    /// The rate in units, and their name, where `steps` are counted in a second.
    fn rate(self, steps: f64) -> (f64, &'static str) {
        match self {
            Self::Steps => (steps, "steps"),
            Self::Images(each) => (steps * each as f64, "images"),
            Self::Bytes => (steps, "bytes"),
        }
    }
}

/// Progress of a step whose length may be unknown.
#[derive(Debug)]
pub struct Progress {
    form: ProgressForm,
    label: String,
    unit: Unit,
    length: u64,
    done: u64,
    /// The first amount that was set, and when: what was done before does not count in the rate.
    first: Option<(Instant, u64)>,
    last_line: Option<Instant>,
}

#[derive(Debug)]
enum ProgressForm {
    Bar(ProgressBar),
    Lines,
    Json,
    Hidden,
}

/// Least time between two log lines.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Least time between two events.
const BETWEEN_EVENTS: Duration = Duration::from_secs(1);

impl Progress {
    /// Shows `label` and the share of `length` that is done. A length of 0 is unknown.
    pub fn new(label: &str, length: u64, unit: Unit) -> Self {
        let step = std::env::var(STEP).ok();
        let label = step.as_deref().unwrap_or(label);
        let form = if is_json() {
            ProgressForm::Json
        } else if step.is_none() && std::io::stderr().is_terminal() {
            ProgressForm::Bar(bar(label, length))
        } else {
            ProgressForm::Lines
        };
        // Many steps are over before a first log line is due.
        let last_line = matches!(form, ProgressForm::Lines).then(Instant::now);
        Self { form, label: label.to_owned(), unit, length, done: 0, first: None, last_line }
    }

    /// Shows nothing, where another process shows the same work.
    pub fn hidden() -> Self {
        let (form, label) = (ProgressForm::Hidden, String::new());
        Self { form, label, unit: Unit::Steps, length: 0, done: 0, first: None, last_line: None }
    }

    /// Sets the amount that is done; `note` is shown beside it, such as the loss.
    pub fn at(&mut self, done: u64, note: &str) {
        let now = Instant::now();
        self.done = done;
        self.first.get_or_insert((now, done));
        let is_due =
            |least| self.last_line.is_none_or(|last| now.saturating_duration_since(last) >= least);
        match &self.form {
            ProgressForm::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(self.details(note, now));
            }
            ProgressForm::Lines if is_due(BETWEEN_LINES) => {
                self.last_line = Some(now);
                tracing::info!("{}", self.line(note, now));
            }
            ProgressForm::Json if is_due(BETWEEN_EVENTS) || done == self.length => {
                self.last_line = Some(now);
                event(&self.event(note, now));
            }
            ProgressForm::Lines | ProgressForm::Json | ProgressForm::Hidden => {}
        }
    }

    /// Adds one to the amount that is done.
    pub fn step(&mut self, note: &str) {
        self.at(self.done + 1, note);
    }

    /// Amounts a second since the first one was set; `None` before the second one.
    fn pace(&self, now: Instant) -> Option<f64> {
        let (began, first) = self.first?;
        let seconds = now.saturating_duration_since(began).as_secs_f64();
        let pace = self.done.saturating_sub(first) as f64 / seconds;
        (seconds > 0. && pace > 0.).then_some(pace)
    }

    /// Seconds until the length is reached, at the pace so far.
    fn seconds_left(&self, now: Instant) -> Option<f64> {
        let left = self.length.checked_sub(self.done).filter(|_| self.length > 0)?;
        Some(left as f64 / self.pace(now)?)
    }

    /// One line: `embed 120/400, 8.1 images/s, 35 s left`.
    fn line(&self, note: &str, now: Instant) -> String {
        let amount = match self.length {
            0 => format!("{} {}", self.label, self.done),
            length => format!("{} {}/{length}", self.label, self.done),
        };
        let left = self.seconds_left(now).map(|seconds| format!("{} left", duration(seconds)));
        let parts = [amount, self.details(note, now), left.unwrap_or_default()];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
    }

    /// The note and the rate.
    fn details(&self, note: &str, now: Instant) -> String {
        let rate = self.pace(now).map(|pace| match self.unit.rate(pace) {
            (rate, "bytes") => format!("{:.1} MB/s", rate / 1e6),
            (rate, unit) if rate < 100. => format!("{rate:.1} {unit}/s"),
            (rate, unit) => format!("{rate:.0} {unit}/s"),
        });
        let note = (!note.is_empty()).then(|| note.to_owned());
        note.into_iter().chain(rate).collect::<Vec<_>>().join(", ")
    }

    fn event(&self, note: &str, now: Instant) -> Value {
        let mut event = json!({
            "event": "progress",
            "label": self.label,
            "done": self.done,
            "of": self.length,
            "note": note,
        });
        if let Some(pace) = self.pace(now) {
            let (rate, unit) = self.unit.rate(pace);
            (event["per-second"], event["unit"]) = (json!(rate), json!(unit));
        }
        if let Some(seconds) = self.seconds_left(now) {
            event["seconds-left"] = json!(seconds);
        }
        event
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let ProgressForm::Bar(bar) = &self.form {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &str, length: u64) -> ProgressBar {
    let (template, bar) = match length {
        0 => ("{prefix:22} {spinner} {pos} {msg} {elapsed}", ProgressBar::no_length()),
        _ => ("{prefix:22} {bar:24} {pos}/{len} {msg}, {eta} left", ProgressBar::new(length)),
    };
    let style = ProgressStyle::with_template(template);
    let bar = bar.with_prefix(label.to_owned());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// A duration for people, in two units at most: `45 s`, `3 min 20 s`, `2 h 5 min`.
fn duration(seconds: f64) -> String {
    let whole = seconds.ceil() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(length: u64, unit: Unit, first: u64, done: u64) -> (Progress, Instant) {
        let began = Instant::now();
        let progress = Progress {
            form: ProgressForm::Lines,
            label: "embed".into(),
            unit,
            length,
            done,
            first: Some((began, first)),
            last_line: None,
        };
        (progress, began + Duration::from_secs(10))
    }

    #[test]
    fn a_line_has_the_amount_the_rate_and_the_time_left() {
        let (steps, now) = progress(400, Unit::Steps, 0, 200);
        assert_eq!(steps.line("loss 0.5", now), "embed 200/400, loss 0.5, 20.0 steps/s, 10 s left");
        // 100 steps here: those before an interruption took no time in this process.
        let (images, now) = progress(1000, Unit::Images(64), 100, 200);
        assert_eq!(images.line("", now), "embed 200/1000, 640 images/s, 1 min 20 s left");
        let (bytes, now) = progress(0, Unit::Bytes, 0, 25_000_000);
        assert_eq!(bytes.line("", now), "embed 25000000, 2.5 MB/s");
    }

    #[test]
    fn nothing_is_said_of_a_rate_before_there_is_one() {
        let (first, now) = progress(10, Unit::Steps, 1, 1);
        assert_eq!(first.line("", now), "embed 1/10");
        let (first, _) = progress(10, Unit::Steps, 0, 1);
        let (began, _) = first.first.expect("set");
        assert_eq!(first.line("", began), "embed 1/10");
        assert!(first.event("", began).get("seconds-left").is_none());
        // More than was expected: pictures that a folder got meanwhile.
        let (more, now) = progress(10, Unit::Steps, 0, 20);
        assert_eq!(more.line("", now), "embed 20/10, 2.0 steps/s");
    }

    #[test]
    fn an_event_has_the_keys_that_are_documented() {
        let (images, now) = progress(1000, Unit::Images(64), 100, 200);
        let want = json!({
            "event": "progress", "label": "embed", "done": 200, "of": 1000, "note": "loss 1",
            "per-second": 640., "unit": "images", "seconds-left": 80.,
        });
        assert_eq!(images.event("loss 1", now), want);
    }

    #[test]
    fn durations_have_two_units() {
        for (seconds, want) in [
            (0., "0 s"),
            (44.2, "45 s"),
            (59.5, "1 min 0 s"),
            (200., "3 min 20 s"),
            (7510., "2 h 5 min"),
        ] {
            assert_eq!(duration(seconds), want);
        }
    }
}
