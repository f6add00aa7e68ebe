//! Changed bytes for every reader of `stage`: tensor files, experiments, JSON with digests, logs, marks.
//!
//! A reader may fail, but must not panic; and a file that carries a digest must not be read as
//! something else. The readers of sources have their own, `prepare::fuzz`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use stage::container::{self, Container};
use stage::{Experiment, finished, json};

use super::{Trial, Until};

/// A file of a run or an experiment, by the reader that it is for.
struct Sample {
    name: String,
    bytes: Vec<u8>,
    reader: fn(&Path, &[u8]) -> Result<bool>,
}

/// Changes samples and reads them until the end.
///
/// # Errors
///
/// The trial itself cannot go on.
pub fn run(trial: &mut Trial, until: Until) -> Result<()> {
    let samples = samples(trial)?;
    ensure!(samples.len() > 10, "only {} files to change", samples.len());
    let folder = tempfile::tempdir()?;
    let mut rounds = 0;
    while until.goes_on(rounds) {
        rounds += 1;
        let sample = &samples[trial.random.random_range(0..samples.len())];
        let other = &samples[trial.random.random_range(0..samples.len())];
        let mut bytes = sample.bytes.clone();
        change(&mut bytes, &other.bytes, &mut trial.random);
        if bytes == sample.bytes {
            continue;
        }
        trial.counts.mutations += 1;
        let path = folder.path().join(&sample.name);
        fs::write(&path, &bytes)?;
        match catch_unwind(AssertUnwindSafe(|| (sample.reader)(&path, &sample.bytes))) {
            Ok(Ok(false)) => {
                println!("wrong: a changed `{}` is read as something else", sample.name);
                fs::write(folder.path().join(format!("{}.kept", sample.name)), &bytes)?;
                trial.counts.wrong += 1;
            }
            Ok(_) => {}
            Err(_) => {
                println!("panic: on a changed `{}`: {}", sample.name, hex(&bytes));
                trial.counts.hangs += 1;
            }
        }
    }
    Ok(())
}

/// Every kind of file that the run has once.
fn samples(trial: &Trial) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for (path, bytes) in &trial.wanted {
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        let is_known = samples.iter().any(|known: &Sample| known.name == name);
        if is_known || bytes.len() > 1 << 20 {
            continue;
        }
        let reader = match Path::new(&name).extension().and_then(|end| end.to_str()) {
            Some("safetensors") => tensors,
            Some("json") if bytes.windows(8).any(|part| part == b"\"sha256\"") => object,
            _ => continue,
        };
        samples.push(Sample { name, bytes: bytes.clone(), reader });
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("systems");
    for entry in fs::read_dir(&folder).with_context(|| format!("`{}`", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        samples.push(Sample { name, bytes: fs::read(&path)?, reader: experiment });
    }
    let line = json::to_line(&serde_json::json!({"epoch": 3, "loss": 0.5, "phase": "start"}))?;
    samples.push(Sample { name: "log.jsonl".into(), bytes: line.into_bytes(), reader: log_line });
    Ok(samples)
}

/// A tensor file that opens must hold what was written, whatever its padding is.
fn tensors(path: &Path, original: &[u8]) -> Result<bool> {
    let header: Value = serde_json::from_str(&container::header_text(path)?)?;
    let kind = header["kind"].as_str().context("no kind")?.to_owned();
    let version = header["format-version"].as_u64().context("no version")?;
    let changed = Container::open(path, &kind, version)?;
    let beside = path.with_extension("original");
    fs::write(&beside, original)?;
    let original = Container::open(&beside, &kind, version)?;
    let names: Vec<&str> = changed.names().collect();
    let same = |name: &&str| match (changed.f32(name), original.f32(name)) {
        (Ok(one), Ok(other)) => one == other,
        (one, other) => one.is_err() == other.is_err(),
    };
    Ok(names == original.names().collect::<Vec<_>>() && names.iter().all(same))
}

fn object(path: &Path, original: &[u8]) -> Result<bool> {
    let _ = finished::is_finished(path.parent().unwrap_or(path));
    let read: Value = json::read(path)?;
    Ok(read == serde_json::from_slice::<Value>(original)?)
}

fn log_line(path: &Path, original: &[u8]) -> Result<bool> {
    let read = json::of_line(&fs::read_to_string(path)?)?;
    Ok(Value::Object(read) == serde_json::from_slice::<Value>(original)?)
}

/// An experiment has no digest: another text is another experiment.
fn experiment(path: &Path, _: &[u8]) -> Result<bool> {
    let experiment = Experiment::of_text("changed", &fs::read_to_string(path)?)?;
    experiment.table::<stage::DataTable>("data")?.check()?;
    experiment.source()?;
    let _ = (experiment.title(), experiment.system(), experiment.to_toml());
    Ok(true)
}

/// Flips, replaces, cuts, repeats and inserts bytes.
fn change(bytes: &mut Vec<u8>, other: &[u8], random: &mut ChaCha8Rng) {
    const EXTREMES: [u64; 6] = [0, 0x7f, 0xff, 0x7fff_ffff, i64::MAX as u64, u64::MAX];
    for _ in 0..random.random_range(1..=3) {
        if bytes.is_empty() {
            return;
        }
        // Half of the changes hit the beginning, where lengths and headers are.
        let near = if random.random_bool(0.5) { bytes.len().min(256) } else { bytes.len() };
        let at = random.random_range(0..near);
        let length = random.random_range(1..64);
        match random.random_range(0..6) {
            0 | 1 => bytes[at] ^= 1 << random.random_range(0..8),
            2 => {
                let value = EXTREMES[random.random_range(0..EXTREMES.len())].to_le_bytes();
                bytes.iter_mut().skip(at).zip(value).for_each(|(old, new)| *old = new);
            }
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..(at + length).min(bytes.len()))),
            _ if !other.is_empty() => {
                let from = random.random_range(0..other.len());
                let piece = other[from..(from + length).min(other.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {}
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(4096).map(|byte| format!("{byte:02x}")).collect()
}
