//! Training curves: a small chart for each number in the `log.jsonl` of a step.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::{Map, Value};
use stage::json;

use crate::html::escaped;

/// One number of the log over the epochs, or a list of numbers, such as the losses of several heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// Its key; `phase: key` if the step has phases.
    pub name: String,
    /// One value per epoch for each line; NaN if the log has none.
    pub lines: Vec<Vec<f64>>,
}

/// Keys of time and speed, which get no chart.
const NO_CHART: [&str; 6] =
    ["epoch", "step", "phase", "seconds", "waiting-seconds", "images-per-second"];

/// Returns the charts of a log, whose lines are JSON objects: losses first, then the others by name.
///
/// Lines without an `epoch` or a `step` are ignored, and numbers with fewer than two values get no chart. If an
/// epoch occurs again in its phase, the step was restarted from there, and the earlier lines from
/// that epoch on are dropped. A truncated last line is dropped too.
///
/// # Errors
///
/// A line is damaged; the message names it.
pub fn charts(log: &str) -> Result<Vec<Chart>> {
    let mut phases: Vec<(String, Vec<LogLine>)> = Vec::new();
    for (number, text) in (1..).zip(log.split_inclusive('\n')) {
        let whole = text.strip_suffix('\n').unwrap_or(text);
        let line = match json::of_line(whole) {
            Ok(line) => line,
            Err(_) if is_cut_off(text) => break,
            Err(error) => return Err(error).with_context(|| format!("line {number}")),
        };
        let Some(epoch) = epoch(&line) else { continue };
        let phase = line.get("phase").and_then(Value::as_str).unwrap_or_default();
        match phases.iter().position(|(known, _)| known == phase) {
            Some(at) => {
                let lines = &mut phases[at].1;
                let kept = lines.partition_point(|line| self::epoch(line) < Some(epoch));
                let is_restart = kept < lines.len();
                lines.truncate(kept);
                lines.push(line);
                if is_restart {
                    phases.truncate(at + 1);
                }
            }
            None => phases.push((phase.to_owned(), vec![line])),
        }
    }
    let mut charts: Vec<Chart> =
        phases.iter().flat_map(|(phase, rows)| charts_of(phase, rows)).collect();
    charts.sort_by_key(|chart| !chart.name.contains("loss")); // Stable.
    Ok(charts)
}

/// Whether this is a truncated line, and not one whose line break was changed.
fn is_cut_off(text: &str) -> bool {
    let mut without_last = text.chars();
    without_last.next_back();
    !text.ends_with('\n') && json::of_line(without_last.as_str()).is_err()
}

/// A line of a log.
type LogLine = Map<String, Value>;

/// The epoch of a line, or the step where a stage counts no epochs.
fn epoch(line: &LogLine) -> Option<u64> {
    line.get("epoch").or_else(|| line.get("step"))?.as_u64()
}

fn charts_of(phase: &str, rows: &[LogLine]) -> Vec<Chart> {
    let mut numbers: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for (epoch, row) in rows.iter().enumerate() {
        for (key, value) in row.iter().filter(|(key, _)| !NO_CHART.contains(&key.as_str())) {
            let values = match value {
                Value::Number(_) => std::slice::from_ref(value),
                Value::Array(values) => values,
                _ => continue,
            };
            let lines = numbers.entry(key).or_default();
            for (number, value) in values.iter().enumerate() {
                if let Some(value) = value.as_f64() {
                    if lines.len() <= number {
                        lines.resize(number + 1, vec![f64::NAN; rows.len()]);
                    }
                    lines[number][epoch] = value;
                }
            }
        }
    }
    let enough = |lines: &Vec<Vec<f64>>| {
        lines.iter().any(|line| line.iter().filter(|value| value.is_finite()).count() > 1)
    };
    let name = |key: &str| if phase.is_empty() { key.into() } else { format!("{phase}: {key}") };
    let numbers = numbers.into_iter().filter(|(_, lines)| enough(lines));
    numbers.map(|(key, lines)| Chart { name: name(key), lines }).collect()
}

/// Size of a drawing, in its own units.
const WIDTH: f64 = 220.;
const HEIGHT: f64 = 70.;

impl Chart {
    /// Draws the chart as an SVG element: epochs from left to right, values from bottom to top.
    pub fn svg(&self) -> String {
        let (least, most) = self.range();
        let epochs = self.lines.first().map_or(0, Vec::len);
        let x = |epoch: usize| WIDTH * epoch as f64 / (epochs.max(2) - 1) as f64;
        let y = |value: f64| match most > least {
            true => HEIGHT * (most - value) / (most - least),
            false => HEIGHT / 2.,
        };
        let mut svg = format!(
            "<svg viewBox=\"-2 -2 {} {}\" role=\"img\" aria-label=\"{}\">",
            WIDTH + 4.,
            HEIGHT + 4.,
            escaped(&self.name)
        );
        for line in &self.lines {
            // A gap in the values is a gap in the line.
            let mut pen = 'M';
            svg.push_str("<path d=\"");
            for (epoch, &value) in line.iter().enumerate() {
                if value.is_finite() {
                    let _ = write!(svg, "{pen}{:.1} {:.1}", x(epoch), y(value));
                    pen = 'L';
                } else {
                    pen = 'M';
                }
            }
            svg.push_str("\"/>");
        }
        svg.push_str("</svg>");
        svg
    }

    /// Returns the smallest and the largest value.
    pub fn range(&self) -> (f64, f64) {
        let values = self.lines.iter().flatten().copied().filter(|value| value.is_finite());
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| {
            (least.min(value), most.max(value))
        })
    }

    /// Returns the last value of the first line.
    pub fn last(&self) -> Option<f64> {
        self.lines.first()?.iter().rev().copied().find(|value| value.is_finite())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A log of these objects.
    pub(crate) fn log(objects: &[Value]) -> String {
        objects.iter().map(|object| json::to_line(object).expect("an object") + "\n").collect()
    }

    #[test]
    fn every_number_of_a_log_becomes_a_chart() -> Result<()> {
        let charts = charts(&log(&[
            json!({"remark": "no epoch"}),
            json!({"epoch": 0, "phase": "start", "losses": [2., 3.]}),
            json!({"epoch": 1, "phase": "start", "losses": [1., 2.5]}),
            json!({"epoch": 1, "seconds": 3.5, "entropy": 0.5, "loss": 4, "once": 1, "text": "a"}),
            json!({"epoch": 2, "step": 14, "seconds": 3., "entropy": null, "loss": 2}),
            json!({"epoch": 3, "step": 21, "seconds": 3., "entropy": 0.25, "loss": 3}),
        ]))?;
        let names: Vec<&str> = charts.iter().map(|chart| chart.name.as_str()).collect();
        assert_eq!(names, ["start: losses", "loss", "entropy"]);
        assert_eq!(charts[0].lines, [[2., 1.], [3., 2.5]]);
        assert_eq!((charts[1].range(), charts[1].last()), ((2., 4.), Some(3.)));
        assert!(charts[2].lines[0][1].is_nan());
        Ok(())
    }

    #[test]
    fn steps_are_drawn_where_a_stage_counts_no_epochs() -> Result<()> {
        let charts = charts(&log(&[
            json!({"known": 90}),
            json!({"step": 200, "loss": 2., "seconds": 1.}),
            json!({"step": 400, "loss": 1., "seconds": 2.}),
        ]))?;
        assert_eq!((charts.len(), charts[0].name.as_str()), (1, "loss"));
        assert_eq!(charts[0].lines, [[2., 1.]]);
        Ok(())
    }

    #[test]
    fn a_step_that_was_started_again_is_drawn_once() -> Result<()> {
        let line = |phase: &str, epoch: usize, loss: usize| {
            log(&[json!({"phase": phase, "epoch": epoch, "loss": loss})])
        };
        let first =
            [line("start", 0, 9), line("start", 1, 8), line("end", 0, 7), line("end", 1, 6)];
        let second = [line("start", 0, 5), line("start", 1, 4)];
        // The second attempt has not reached the phase `end` yet.
        let restarted = charts(&[first.concat(), second.concat()].concat())?;
        assert_eq!(restarted.len(), 1);
        assert_eq!(
            (restarted[0].name.as_str(), &restarted[0].lines),
            ("start: loss", &vec![vec![5., 4.]])
        );
        // One that resumed at its last checkpoint logs from there on; the last line was cut off.
        let resumed =
            [&first.concat(), &line("end", 1, 3)[..], &line("end", 2, 2), "{\"epo"].concat();
        let resumed = charts(&resumed)?;
        assert_eq!(resumed[1].lines, [[7., 3., 2.]]);
        Ok(())
    }

    #[test]
    fn a_chart_is_drawn_from_left_to_right_and_the_largest_at_the_top() {
        let chart = Chart { name: "a<b".into(), lines: vec![vec![4., f64::NAN, 1., 2.5]] };
        let svg = chart.svg();
        assert!(svg.contains(r#"d="M0.0 0.0M146.7 70.0L220.0 35.0""#), "{svg}");
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"), "{svg}");
        let flat = Chart { name: "flat".into(), lines: vec![vec![1., 1.]] };
        assert!(flat.svg().contains(r#"d="M0.0 35.0L220.0 35.0""#));
    }

    #[test]
    fn every_changed_byte_is_found_and_its_line_named() {
        let line = |loss: f64| json!({"epoch": 1, "loss": loss});
        let (first, last) = (log(&[line(0.5)]), log(&[line(0.25)]));
        let log = [first.as_str(), &last].concat();
        for i in 0..log.len() {
            let mut changed = log.clone().into_bytes();
            changed[i] ^= 1;
            let error = charts(&String::from_utf8(changed).expect("ASCII")).expect_err("changed");
            let number = if i < first.len() { "line 1" } else { "line 2" };
            assert!(format!("{error:#}").contains(number), "byte {i}: {error:#}");
        }
        assert!(charts(&log[..log.len() - 9]).is_ok(), "a process was killed as it wrote");
    }
}
