//! Keys: a step's result is known by everything that it depends on.
//!
//! The key of a step is the SHA-256 of its program's version, its table and `[data]` as resolved,
//! seed, round, kind of device and processor, and of the keys of its inputs. So one pretraining
//! serves all experiments that agree on it, and no changed value reuses an old result.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeMap;
use std::env;
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::plan::{Step, table_of};
use crate::programs::Program;
use stage::Experiment;

/// The name of a result: what it is, and a digest of everything it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    name: String,
    /// What the digest was taken of, for people who wonder why two keys differ.
    pub record: Value,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Key {
    /// The key of a record; `what` goes in front of the digest, so that a path can be read.
    pub fn of(what: &str, record: Value) -> Self {
        // 64 bits of the digest: equal ones by chance are not to be expected in a lifetime of runs.
        let digest = &digest(record.to_string().as_bytes())[..16];
        Self { name: format!("{what}-{digest}"), record }
    }

    /// The key of a step whose inputs have these identities.
    pub fn of_step(
        step: &Step,
        experiment: &Experiment,
        program: &Program,
        surroundings: &Surroundings,
        inputs: BTreeMap<&str, String>,
    ) -> Self {
        let table = |name: &str| serde_json::to_value(experiment.value(name)).unwrap_or_default();
        let mut tables = BTreeMap::from([("data", table("data"))]);
        let name = table_of(&step.program);
        tables.insert(name, table(name));
        if !experiment.has_table(name) {
            // A foreign program may read the table of its place.
            tables.insert(&step.place, table(&step.place));
        }
        let record = json!({
            "program": { "name": name, "version": program.version },
            "tables": tables,
            "round": step.round,
            "rounds": step.rounds,
            "seed": surroundings.seed,
            "machine": machine(&surroundings.device),
            "environment": environment(),
            "images": surroundings.images,
            "inputs": inputs,
        });
        Self::of(&step.place, record)
    }
}

/// What all steps of one run depend on.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Seed of every random draw.
    pub seed: u64,
    /// The device as asked for.
    pub device: String,
    /// Header of the prepared pictures, with their fingerprint and digest.
    pub images: String,
}

/// What computes: the device, and for the processor its instructions, which decide the kernel.
///
/// `auto` is the processor unless the programs are built for a GPU, which their version then says.
fn machine(device: &str) -> String {
    match device {
        "auto" | "cpu" => {
            format!("cpu {} {} {}", env::consts::OS, env::consts::ARCH, instructions())
        }
        gpu => gpu.split(':').next().unwrap_or(gpu).to_owned(),
    }
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    // Tiles and their products of bfloat16: bits 24 and 22. Whether the system lets programs use
    // them is not asked: a result that is computed once more does no harm, one mistaken does.
    let tiles = 1 << 24 | 1 << 22;
    if __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & tiles == tiles {
        "amx"
    } else if is_x86_feature_detected!("avx512bf16") {
        "avx512-bf16"
    } else if is_x86_feature_detected!("avx512f") {
        "avx512"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "avx2"
    } else {
        "plain"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> &'static str {
    "plain"
}

/// The variables that change results: the kernel. Neither the number of threads nor a decoded copy of
/// the pictures does.
fn environment() -> BTreeMap<String, String> {
    env::vars().filter(|(name, _)| name == "ASSORT_KERNEL").collect()
}

/// The state of a file or of all files below a folder: names, lengths and times of change. It is
/// read before pictures are prepared again, so it must be cheap even for millions of them.
pub fn state_of(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut folders = vec![path.to_owned()];
    while let Some(next) = folders.pop() {
        let Ok(metadata) = fs::metadata(&next) else {
            hash.update(format!("{} missing\n", next.display()));
            continue;
        };
        if metadata.is_dir() {
            let mut entries = Vec::new();
            let read = fs::read_dir(&next);
            for entry in read.with_context(|| format!("reading `{}`", next.display()))? {
                entries.push(entry?.path());
            }
            entries.sort();
            folders.extend(entries);
        } else {
            let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            hash.update(format!("{} {} {changed:?}\n", next.display(), metadata.len()));
        }
    }
    Ok(hex(&hash.finalize()))
}

/// The header of one of our tensor files, with the digest of its contents: its identity. The
/// format is described in the crate `stage`, module `container`.
pub fn header_of(path: &Path) -> Result<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        // The format allows 100 MB of header; more is a broken file.
        let length = u64::from_le_bytes(length).min(100_000_000);
        let mut header = Vec::new();
        file.take(length).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = read().with_context(|| format!("opening `{}`", path.display()))?;
    let header: Option<Value> = serde_json::from_slice(&header).ok();
    match header.as_ref().and_then(|header| header.pointer("/__metadata__/assort")) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => bail!(
            "`{}` is broken or was not written by assort; remove its folder and run again",
            path.display()
        ),
    }
}

/// Hex SHA-256 of a file.
pub fn digest_of_file(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("reading `{}`", path.display()))?;
    Ok(digest(&bytes))
}

/// Hex SHA-256 of these bytes.
pub fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Arm;

    fn experiment(text: &str) -> Experiment {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("example.toml");
        fs::write(&path, text).expect("written");
        Experiment::read(&path).expect("TOML")
    }

    const TEXT: &str = "[data]\nclusters = 3\n[embed]\nviews = 8\n[clustering]\nheads = 6";

    fn step() -> Step {
        Step {
            arm: Arm::Main,
            place: "embed".into(),
            round: 1,
            rounds: 2,
            program: "embed".into(),
            inputs: vec![],
        }
    }

    fn program() -> Program {
        Program { path: "bin/embed".into(), words: vec![], version: "embed algorithm 1".into() }
    }

    fn surroundings() -> Surroundings {
        Surroundings { seed: 0, device: "cpu".into(), images: "some".into() }
    }

    fn key(step: &Step, text: &str, program: &Program, surroundings: &Surroundings) -> String {
        let inputs = BTreeMap::from([("network", "pretraining-1".to_owned())]);
        Key::of_step(step, &experiment(text), program, surroundings, inputs).to_string()
    }

    #[test]
    fn whatever_a_result_depends_on_changes_its_key_and_nothing_else_does() {
        let first = key(&step(), TEXT, &program(), &surroundings());
        assert!(first.starts_with("embed-") && first.len() == "embed-".len() + 16, "{first}");

        let same = [
            key(&step(), &TEXT.replace("heads = 6", "heads = 7"), &program(), &surroundings()),
            key(&Step { arm: Arm::Control, ..step() }, TEXT, &program(), &surroundings()),
            key(
                &step(),
                TEXT,
                &Program { path: "other/embed".into(), ..program() },
                &surroundings(),
            ),
            key(
                &step(),
                TEXT,
                &program(),
                &Surroundings { device: "auto".into(), ..surroundings() },
            ),
        ];
        for other in same {
            assert_eq!(other, first);
        }
        let different = [
            key(&step(), &TEXT.replace("views = 8", "views = 9"), &program(), &surroundings()),
            key(
                &step(),
                &TEXT.replace("clusters = 3", "clusters = 4"),
                &program(),
                &surroundings(),
            ),
            key(&Step { round: 2, ..step() }, TEXT, &program(), &surroundings()),
            key(&Step { rounds: 3, ..step() }, TEXT, &program(), &surroundings()),
            key(
                &step(),
                TEXT,
                &Program { version: "algorithm 2".into(), ..program() },
                &surroundings(),
            ),
            key(&step(), TEXT, &program(), &Surroundings { seed: 1, ..surroundings() }),
            key(
                &step(),
                TEXT,
                &program(),
                &Surroundings { device: "cuda".into(), ..surroundings() },
            ),
            key(
                &step(),
                TEXT,
                &program(),
                &Surroundings { images: "other".into(), ..surroundings() },
            ),
            Key::of_step(&step(), &experiment(TEXT), &program(), &surroundings(), BTreeMap::new())
                .to_string(),
        ];
        for other in different {
            assert_ne!(other, first);
        }
    }

    #[test]
    fn a_foreign_program_is_keyed_by_the_table_of_its_place() {
        let foreign = Step { program: "tools/mine.py".into(), ..step() };
        let one = key(&foreign, TEXT, &program(), &surroundings());
        let changed = TEXT.replace("views = 8", "views = 9");
        assert_ne!(one, key(&foreign, &changed, &program(), &surroundings()));
    }

    #[test]
    fn cards_of_one_kind_share_results() {
        assert_eq!(machine("cuda:1"), "cuda");
        assert_eq!(machine("cuda"), machine("cuda:0"));
        assert_eq!(machine("auto"), machine("cpu"));
        assert_ne!(machine("metal"), machine("cuda"));
    }

    #[test]
    fn a_changed_source_has_another_state() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = || state_of(folder.path()).expect("readable");
        let empty = state();
        fs::create_dir(folder.path().join("cats")).expect("created");
        fs::write(folder.path().join("cats/a.png"), "1").expect("written");
        let one = state();
        fs::write(folder.path().join("cats/b.png"), "2").expect("written");
        let two = state();
        fs::write(folder.path().join("cats/b.png"), "22").expect("written");
        let longer = state();
        fs::rename(folder.path().join("cats/b.png"), folder.path().join("b.png")).expect("moved");
        let states = [empty, one, two, longer, state()];
        for (position, state) in states.iter().enumerate() {
            assert!(!states[..position].contains(state));
        }
        assert_eq!(states[4], state());
        assert_ne!(state_of(&folder.path().join("none")).expect("said"), states[0]);
    }

    #[test]
    fn the_header_is_read_and_a_foreign_file_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("images.safetensors");
        let header = br#"{"__metadata__":{"assort":"{\"kind\":\"images\"}"}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(b"pixels");
        fs::write(&path, &bytes).expect("written");
        assert_eq!(header_of(&path).expect("sound"), r#"{"kind":"images"}"#);
        for broken in [&bytes[..20], &bytes[..4], &[0xff; 64]] {
            fs::write(&path, broken).expect("written");
            let message = format!("{:#}", header_of(&path).expect_err("broken"));
            assert!(message.contains("images.safetensors"), "{message}");
        }
    }
}
