//! `events.out.tfevents.assort`: the numbers of a stage's log for TensorBoard, as in
//! `tensorboard --logdir runs/digits`.
//!
//! It repeats `log.jsonl` for display. No stage reads it, and no digest covers it. When lines are removed from
//! the log, the file is removed too; the next line writes all of it again. Each number of a line is a scalar
//! named after its key, or `<phase>/<key>` if the line has a `phase`; an element of a list is
//! `<key>/<index>`. Its step is the line's `step`, else its `epoch`, else 0.
//!
//! A record is the length of its data (u64), the masked CRC-32C of those eight bytes (u32), the data, and
//! their masked CRC-32C, all little-endian (TensorFlow's TFRecord). The data is an [`Event`] in Protocol
//! Buffers' form, with the field numbers of TensorFlow's `event.proto` and `summary.proto`.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use prost::Message;
use serde_json::Value;

use crate::files;

/// Name of the file in a stage's folder. TensorBoard looks for `tfevents`.
pub const EVENTS: &str = "events.out.tfevents.assort";

/// The first event of each file.
const VERSION: &str = "brain.Event:2";

#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// Appends the line `text` of the log at `log`; all of its lines where `folder` has no such file.
pub fn append(folder: &Path, log: &Path, text: &str) -> Result<()> {
    let path = folder.join(EVENTS);
    let bytes = match path.exists() {
        true => records(text),
        false => {
            let log =
                fs::read_to_string(log).with_context(|| format!("reading `{}`", log.display()))?;
            let first = Event { file_version: Some(VERSION.into()), ..event_at(0) };
            [record(&first), records(&log)].concat()
        }
    };
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(&bytes))
        .with_context(|| format!("writing `{}`", path.display()))
}

/// Removes the file, if there is one.
pub fn remove(folder: &Path) -> Result<()> {
    files::remove_if_there(&folder.join(EVENTS))
}

/// The records of lines of a log.
fn records(lines: &str) -> Vec<u8> {
    lines.lines().filter_map(event_of).flat_map(|event| record(&event)).collect()
}

/// The event of a line; `None` if it holds no number.
fn event_of(line: &str) -> Option<Event> {
    let Value::Object(line) = serde_json::from_str(line).ok()? else { return None };
    let step = ["step", "epoch"].iter().find_map(|key| line.get(*key)?.as_i64());
    let prefix = line
        .get("phase")
        .and_then(Value::as_str)
        .map_or(String::new(), |phase| format!("{phase}/"));
    let mut value = Vec::new();
    for (key, found) in line.iter().filter(|(key, _)| !["step", "epoch"].contains(&key.as_str())) {
        let tag = format!("{prefix}{key}");
        match found {
            Value::Array(list) => {
                let numbers =
                    list.iter().enumerate().filter_map(|(i, one)| Some((i, one.as_f64()?)));
                value.extend(numbers.map(|(i, number)| scalar(format!("{tag}/{i}"), number)));
            }
            one => value.extend(one.as_f64().map(|number| scalar(tag, number))),
        }
    }
    let summary = (!value.is_empty()).then_some(Summary { value })?;
    Some(Event { summary: Some(summary), ..event_at(step.unwrap_or(0)) })
}

fn scalar(tag: String, value: f64) -> Scalar {
    Scalar { tag, simple_value: value as f32 }
}

/// An event of this moment without content.
fn event_at(step: i64) -> Event {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Event { wall_time: now.as_secs_f64(), step, file_version: None, summary: None }
}

fn record(event: &Event) -> Vec<u8> {
    let data = event.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    let sum = |bytes: &[u8]| masked_sum(bytes).to_le_bytes();
    [&length[..], &sum(&length), &data, &sum(&data)].concat()
}

/// The CRC-32C, rotated by 15 bits, plus a constant: TensorFlow masks sums because data may hold sums itself.
fn masked_sum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    /// Reads records back and checks their sums.
    fn events(folder: &Path) -> Vec<Event> {
        let mut bytes = &fs::read(folder.join(EVENTS)).expect("there")[..];
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let (length, rest) = bytes.split_at(8);
            let (sum, rest) = rest.split_at(4);
            assert_eq!(sum, masked_sum(length).to_le_bytes());
            let length = u64::from_le_bytes(length.try_into().expect("8 bytes")) as usize;
            let (data, rest) = rest.split_at(length);
            assert_eq!(rest[..4], masked_sum(data).to_le_bytes());
            events.push(Event::decode(data).expect("an event"));
            bytes = &rest[4..];
        }
        events
    }

    fn logged(folder: &Path, lines: &[Value]) {
        let log = folder.join("log.jsonl");
        for line in lines {
            let line = format!("{line}\n");
            let mut text = fs::read_to_string(&log).unwrap_or_default();
            text += &line;
            fs::write(&log, text).expect("written");
            append(folder, &log, &line).expect("appended");
        }
    }

    #[test]
    fn numbers_of_the_log_are_scalars_at_their_step() {
        let folder = tempfile::tempdir().expect("a folder");
        logged(
            folder.path(),
            &[
                json!({"epoch": 1, "step": 28, "loss": 0.5, "crc32": "00"}),
                json!({"phase": "head", "epoch": 3, "losses": [1.5, 2.5]}),
                json!({"network": "x"}),
                json!({"images": 7}),
            ],
        );
        let events = events(folder.path());
        let found: Vec<_> = events
            .iter()
            .map(|event| {
                let values = event.summary.iter().flat_map(|summary| &summary.value);
                let values: Vec<_> = values.map(|v| (v.tag.clone(), v.simple_value)).collect();
                (event.file_version.as_deref(), event.step, values)
            })
            .collect();
        let of = |values: &[(&str, f32)]| -> Vec<(String, f32)> {
            values.iter().map(|&(tag, value)| (tag.to_owned(), value)).collect()
        };
        let want = [
            (Some(VERSION), 0, vec![]),
            (None, 28, of(&[("loss", 0.5)])),
            (None, 3, of(&[("head/losses/0", 1.5), ("head/losses/1", 2.5)])),
            (None, 0, of(&[("images", 7.)])),
        ];
        assert_eq!(found, want);
    }

    #[test]
    fn a_file_that_was_removed_is_written_again_from_the_log() {
        let folder = tempfile::tempdir().expect("a folder");
        logged(folder.path(), &[json!({"epoch": 1, "loss": 1}), json!({"epoch": 2, "loss": 2})]);
        remove(folder.path()).expect("removed");
        remove(folder.path()).expect("nothing to remove");
        logged(folder.path(), &[json!({"epoch": 3, "loss": 3})]);
        let steps: Vec<i64> = events(folder.path()).iter().map(|event| event.step).collect();
        assert_eq!(steps, [0, 1, 2, 3]);
    }

    /// The value for "123456789" that the CRC-32C is defined by, and a whole record as TensorFlow writes it.
    #[test]
    fn sums_and_fields_are_those_of_tensorflow() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let event = Event { wall_time: 1., step: 2, file_version: Some("v".into()), summary: None };
        let want = [0x09, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0x10, 2, 0x1a, 1, b'v'];
        assert_eq!(event.encode_to_vec(), want);
        let scalar = Summary { value: vec![scalar("a".into(), 1.)] };
        let event = Event { wall_time: 0., step: 0, file_version: None, summary: Some(scalar) };
        let want = [0x2a, 10, 0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0x3f];
        assert_eq!(event.encode_to_vec(), want);
    }
}
