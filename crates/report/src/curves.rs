//! How training went: a small chart for each number of a step's `log.jsonl`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// One number of the log over the epochs, or several that were logged as a list, as the losses of
/// several heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    /// Its key, behind the phase where the step has phases.
    pub name: String,
    /// One value for each epoch, by line; NaN where an epoch has none.
    pub lines: Vec<Vec<f64>>,
}

/// What says when, or how fast, and not what was learnt.
const NO_CHART: [&str; 5] = ["epoch", "step", "phase", "seconds", "images-per-second"];

/// The charts of a log, of which every line is a JSON object: those of the losses first, others by
/// name. Lines without an `epoch` are remarks; numbers with fewer than two values are left out.
///
/// # Errors
///
/// A line is not a JSON object; the message says which.
pub fn charts(log: &str) -> Result<Vec<Chart>> {
    let mut phases: Vec<(String, Vec<Map<String, Value>>)> = Vec::new();
    for (number, line) in (1..).zip(log.lines()) {
        let row: Map<String, Value> =
            serde_json::from_str(line).with_context(|| format!("line {number}"))?;
        if !row.get("epoch").is_some_and(Value::is_u64) {
            continue;
        }
        let phase = row.get("phase").and_then(Value::as_str).unwrap_or_default().to_owned();
        match phases.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, rows)) => rows.push(row),
            None => phases.push((phase, vec![row])),
        }
    }
    let mut charts: Vec<Chart> =
        phases.iter().flat_map(|(phase, rows)| charts_of(phase, rows)).collect();
    charts.sort_by_key(|chart| !chart.name.contains("loss")); // Stable.
    Ok(charts)
}

fn charts_of(phase: &str, rows: &[Map<String, Value>]) -> Vec<Chart> {
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
    /// The chart as an SVG element: epochs from left to right, the smallest value at the bottom, the
    /// largest at the top.
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
            crate::page::escaped(&self.name)
        );
        for line in &self.lines {
            // A gap ends a stroke.
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

    /// The smallest and the largest value.
    pub fn range(&self) -> (f64, f64) {
        let values = self.lines.iter().flatten().copied().filter(|value| value.is_finite());
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| {
            (least.min(value), most.max(value))
        })
    }

    /// The first line's last value.
    pub fn last(&self) -> Option<f64> {
        self.lines.first()?.iter().rev().copied().find(|value| value.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_a_log_becomes_a_chart() -> Result<()> {
        let log = r#"{"remark":"no epoch"}
            {"epoch":0,"phase":"start","losses":[2.0,3.0]}
            {"epoch":1,"phase":"start","losses":[1.0,2.5]}
            {"epoch":1,"step":7,"seconds":3.5,"entropy":0.5,"loss":4,"once":1,"text":"a"}
            {"epoch":2,"step":14,"seconds":3.0,"entropy":null,"loss":2}
            {"epoch":3,"step":21,"seconds":3.0,"entropy":0.25,"loss":3}"#;
        let charts = charts(log)?;
        let names: Vec<&str> = charts.iter().map(|chart| chart.name.as_str()).collect();
        assert_eq!(names, ["start: losses", "loss", "entropy"]);
        assert_eq!(charts[0].lines, [[2., 1.], [3., 2.5]]);
        assert_eq!((charts[1].range(), charts[1].last()), ((2., 4.), Some(3.)));
        assert!(charts[2].lines[0][1].is_nan());
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
    fn a_broken_line_is_named() {
        let error = charts("{\"epoch\":1}\n{\"epo").expect_err("broken");
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
    }
}
