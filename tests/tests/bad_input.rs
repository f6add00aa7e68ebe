//! Bad input: each a clear error that names the file and what to do, exit status 2, and nothing
//! half-written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tests::Bench;
use tests::bench::{stderr, systems};
use tests::pictures::{self, PLAIN};
use tests::tensors::File;

/// A finished run of the tiny experiment, on which the cases build, and one on other pictures:
/// shared by the tests at work, and removed by the last of them.
fn finished() -> Arc<(Bench, Bench)> {
    static SHARED: Mutex<Weak<(Bench, Bench)>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let other = Bench::with_pictures("pldc", |folder| pictures::write(folder, PLAIN, 1));
        let benches = Arc::new((Bench::new(), other));
        benches.0.reproduce(&[]).expect("runs through");
        benches.1.reproduce(&[]).expect("runs through");
        *shared = Arc::downgrade(&benches);
        benches
    })
}

/// A file that a stage is given, and a way in which it is wrong.
struct SpoiltFile {
    name: &'static str,
    /// The program, its round, and the steps it is given by role.
    program: &'static str,
    round: usize,
    inputs: &'static [(&'static str, &'static str)],
    /// The role and the file that are spoilt, and how.
    role: &'static str,
    file: &'static str,
    spoil: fn(&Path),
    /// What the message must say.
    says: &'static [&'static str],
}

const EMBED: (&str, usize, &[(&str, &str)]) = ("embed", 0, &[("network", "0-pretraining")]);
const CLUSTERING: (&str, usize, &[(&str, &str)]) = ("clustering", 0, &[("embeddings", "0-embed")]);
const REFINEMENT: (&str, usize, &[(&str, &str)]) =
    ("prototype-refinement", 1, &[("network", "0-pretraining"), ("pseudo-labels", "0-clustering")]);
const METRICS: (&str, usize, &[(&str, &str)]) =
    ("metrics", 0, &[("pseudo-labels", "0-clustering"), ("labels", "data")]);

const fn case(
    name: &'static str,
    (program, round, inputs): (&'static str, usize, &'static [(&'static str, &'static str)]),
    (role, file): (&'static str, &'static str),
    spoil: fn(&Path),
    says: &'static [&'static str],
) -> SpoiltFile {
    SpoiltFile { name, program, round, inputs, role, file, spoil, says }
}

const NETWORK: (&str, &str) = ("network", "network.safetensors");
const EMBEDDINGS: (&str, &str) = ("embeddings", "embeddings.safetensors");
const LABELS: (&str, &str) = ("pseudo-labels", "pseudo-labels.safetensors");

const CASES: &[SpoiltFile] = &[
    case("missing network", EMBED, NETWORK, remove, &["network.safetensors"]),
    case("truncated network", EMBED, NETWORK, truncate, &["network.safetensors", "run"]),
    case("flipped bit", EMBED, NETWORK, flip, &["network.safetensors", "damaged"]),
    case("weights not finite", EMBED, NETWORK, not_finite, &["network.safetensors", "finite"]),
    case("missing network to refine", REFINEMENT, NETWORK, remove, &["network.safetensors"]),
    case("flipped bit to refine", REFINEMENT, NETWORK, flip, &["network.safetensors", "damaged"]),
    case("refined weights not finite", REFINEMENT, NETWORK, not_finite, &["network.safetensors"]),
    case("missing embeddings", CLUSTERING, EMBEDDINGS, remove, &["embeddings.safetensors"]),
    case("truncated embeddings", CLUSTERING, EMBEDDINGS, truncate, &["embeddings.safetensors"]),
    case("embeddings not finite", CLUSTERING, EMBEDDINGS, not_finite, &["finite"]),
    case("embeddings of other images", CLUSTERING, EMBEDDINGS, foreign, &["embeddings", "images"]),
    case("missing pseudo-labels", REFINEMENT, LABELS, remove, &["pseudo-labels.safetensors"]),
    case(
        "pseudo-labels of other images",
        REFINEMENT,
        LABELS,
        foreign,
        &["pseudo-labels", "images"],
    ),
    case("too few pseudo-labels", REFINEMENT, LABELS, fewer, &["pseudo-labels.safetensors"]),
    case("too many clusters", REFINEMENT, LABELS, more_clusters, &["4", "3"]),
    case("embeddings as pseudo-labels", REFINEMENT, LABELS, other_kind, &["not pseudo-labels"]),
    case("unknown version", REFINEMENT, LABELS, newer, &["format version"]),
    case("pseudo-labels scored on others", METRICS, LABELS, foreign, &["pseudo-labels"]),
    case(
        "truncated ground truth",
        METRICS,
        ("labels", "labels.safetensors"),
        truncate,
        &["labels"],
    ),
];

#[test]
fn a_spoilt_file_is_named_with_a_remedy_and_nothing_is_written() {
    let benches = finished();
    let bench = &benches.0;
    let mut complaints = Vec::new();
    for case in CASES {
        let spoilt = tempfile::tempdir().expect("a folder");
        let mut folders = Vec::new();
        for (role, step) in case.inputs {
            let folder = spoilt.path().join(role);
            copy(&bench.step(step), &folder);
            folders.push((*role, folder));
        }
        (case.spoil)(&spoilt.path().join(case.role).join(case.file));
        let inputs: Vec<(&str, &Path)> =
            folders.iter().map(|(role, folder)| (*role, folder.as_path())).collect();
        let out = spoilt.path().join("out");
        let mut command = bench.stage(case.program, case.round, &inputs, "unused");
        let output = replace_out(&mut command, &out).output().expect("started");
        complaints.extend(complaint(case.name, &output, case.says, &out));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn spoilt_images_and_an_absent_device_are_refused_by_every_system() {
    for system in systems() {
        let bench = prepared(&system);
        let folder = tempfile::tempdir().expect("a folder");
        let images = folder.path().join("images.safetensors");
        let out = folder.path().join("out");
        let start = |extra: &[&str]| {
            let mut command = tests::bench::assort();
            command.arg(bench.first()).arg("--experiment").arg(bench.path("tiny.toml"));
            command.arg("--images").arg(&images).arg("--out").arg(&out).args(extra);
            command.output().expect("started")
        };
        let refused = |what: &str, extra: &[&str], says: &[&str]| {
            assert_refused(&format!("{system}, {what}"), &start(extra), says, &out);
        };
        refused("no images", &[], &["images.safetensors"]);
        for (name, spoil) in [("truncated", truncate as fn(&Path)), ("flipped", flip)] {
            fs::copy(bench.images(), &images).expect("copied");
            spoil(&images);
            refused(name, &[], &["images.safetensors"]);
        }
        fs::copy(bench.images(), &images).expect("copied");
        refused("no device", &["--device", "cuda"], &["cuda", "--device"]);
        refused("no such device", &["--device", "tpu"], &["tpu"]);
    }
}

/// The experiment of a system with its pictures prepared.
fn prepared(system: &str) -> Bench {
    let bench = Bench::of(system);
    let output = bench.assort(&["stage", "prepare"]).output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    bench
}

#[test]
fn a_spoilt_checkpoint_is_not_resumed() {
    for system in systems() {
        let bench = prepared(&system);
        let first = bench.first();
        let output = bench.assort(&["stage", &first]).output().expect("started");
        assert!(output.status.success(), "{system}: {}", stderr(&output));
        let saved = bench.step(&format!("0-{first}")).join("state.safetensors");
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out");
        for (name, spoil) in [("truncated", truncate as fn(&Path)), ("flipped", flip)] {
            fs::create_dir_all(&out).expect("created");
            let state = out.join("state.safetensors");
            fs::copy(&saved, &state).expect("copied");
            spoil(&state);
            let mut command = bench.stage(&first, 0, &[], "unused");
            let output = replace_out(&mut command, &out).output().expect("started");
            let message = stderr(&output);
            assert_eq!(output.status.code(), Some(2), "{system}, {name}: {message}");
            assert!(message.contains("state.safetensors"), "{system}, {name}: {message}");
            assert!(!out.join("network.safetensors").exists() && !out.join("done.json").exists());
            fs::remove_dir_all(&out).expect("removed");
        }
    }
}

#[test]
fn an_unknown_or_missing_key_is_found_before_the_first_stage() {
    for system in systems() {
        let mut bench = Bench::of(&system);
        let (last, _) = bench.steps().pop().expect("a step");
        let known = format!("`{}`", bench.key_of(&last));
        bench.set(&format!("{last}.ephocs"), 3);
        let output = bench.assort(&["reproduce"]).output().expect("started");
        assert_eq!(output.status.code(), Some(2));
        let table = format!("[{last}]");
        for part in [&table, "`ephocs`", &known, "tiny.toml", "nothing was started"] {
            assert!(stderr(&output).contains(part), "{part} is not in: {}", stderr(&output));
        }
        let store = bench.path("runs/.store");
        assert!(!store.exists(), "no step has begun");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn an_empty_folder_is_refused() {
    let bench = Bench::with_pictures("pldc", |_| Ok(()));
    let output = bench.assort(&["reproduce"]).output().expect("started");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("pictures"), "{}", stderr(&output));
    assert!(!bench.path("runs/.store").exists());
    assert_eq!(tensor_files(&bench.path("runs")), Vec::<PathBuf>::new());
}

#[test]
fn broken_pictures_are_listed_and_too_many_are_refused() {
    let with_broken = |count: usize| {
        Bench::with_pictures("pldc", move |folder| {
            pictures::write(folder, PLAIN, 0)?;
            for number in 0..count {
                fs::write(folder.join(format!("bars/broken-{number}.png")), "no picture")?;
            }
            Ok(())
        })
    };
    // 4 of 94 is below the 5 % that the experiment allows, 6 of 96 above.
    let few = with_broken(4);
    let results = few.reproduce(&[]).expect("runs through");
    assert_eq!(results["images"], json!(pictures::PICTURES));
    let skipped = fs::read_to_string(few.path("runs/tiny/0/data/skipped.json")).expect("there");
    let _: Value = serde_json::from_str(&skipped).expect("JSON");
    for number in 0..4 {
        assert!(skipped.contains(&format!("broken-{number}.png")), "{skipped}");
    }

    let many = with_broken(6);
    let output = many.assort(&["reproduce"]).output().expect("started");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    for part in ["6", "broken-share"] {
        assert!(stderr(&output).contains(part), "{part} is not in: {}", stderr(&output));
    }
    assert_eq!(tensor_files(&many.path("runs")), Vec::<PathBuf>::new());
}

/// Fails unless the status is 2, the message has these parts, and nothing was written.
fn assert_refused(name: &str, output: &Output, says: &[&str], out: &Path) {
    assert_eq!(complaint(name, output, says, out), None);
}

/// What is wrong with a refusal.
fn complaint(name: &str, output: &Output, says: &[&str], out: &Path) -> Option<String> {
    let message = stderr(output);
    if output.status.code() != Some(2) || message.contains("panicked") {
        return Some(format!("{name}: {}: {message}", output.status));
    }
    if let Some(part) = says.iter().find(|part| !message.contains(**part)) {
        return Some(format!("{name}: {part} is not in: {message}"));
    }
    let mut written = fs::read_dir(out).into_iter().flatten().flatten();
    let file = written
        .find(|entry| !["log.jsonl", stage::EVENTS].iter().any(|log| entry.file_name() == *log))?;
    Some(format!("{name}: left {:?}", file.file_name()))
}

/// The same command with another `--out`.
fn replace_out(command: &mut Command, out: &Path) -> Command {
    let mut replaced = Command::new(command.get_program());
    let mut is_value = false;
    for word in command.get_args() {
        replaced.arg(if is_value { out.as_os_str() } else { word });
        is_value = word == "--out";
    }
    replaced
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("created");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// Tensor files below a folder, finished or not.
fn tensor_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            found.extend(tensor_files(&path));
        } else if name.ends_with(".safetensors") || name.starts_with(".unfinished-") {
            found.push(path);
        }
    }
    found
}

fn remove(path: &Path) {
    fs::remove_file(path).expect("removed");
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).expect("there");
    fs::write(path, &bytes[..bytes.len() * 2 / 3]).expect("written");
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("there");
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    fs::write(path, bytes).expect("written");
}

/// Rewrites the file with a change and a digest that fits.
fn change(path: &Path, change: impl FnOnce(&mut File)) {
    let mut file = File::read(path).expect("sound");
    change(&mut file);
    file.write(path).expect("written");
}

/// Makes one number of each tensor NaN: a program need not read them all.
fn not_finite(path: &Path) {
    change(path, |file| {
        for tensor in file.tensors.values_mut().filter(|tensor| tensor.dtype == Dtype::F32) {
            let last = tensor.bytes.len().saturating_sub(4);
            tensor.bytes.truncate(last);
            tensor.bytes.extend_from_slice(&f32::NAN.to_le_bytes());
        }
    });
}

/// Puts the file of the run on other pictures in the place of this one.
fn foreign(path: &Path) {
    let name = path.file_name().expect("a name");
    let step = if name == "embeddings.safetensors" { "0-embed" } else { "0-clustering" };
    fs::copy(finished().1.step(step).join(name), path).expect("copied");
}

/// Drops the last picture.
fn fewer(path: &Path) {
    change(path, |file| {
        for (name, tensor) in &mut file.tensors {
            if name != "prototypes" {
                let size = tensor.bytes.len() / tensor.shape[0];
                tensor.shape[0] -= 1;
                tensor.bytes.truncate(tensor.shape[0] * size);
            }
        }
    });
}

/// Adds a cluster, one more than the experiment asks for.
fn more_clusters(path: &Path) {
    change(path, |file| {
        file.header.insert("clusters".into(), 4.into());
        let prototypes = file.tensors.get_mut("prototypes").expect("there");
        let row = prototypes.bytes.len() / prototypes.shape[0];
        prototypes.bytes.extend_from_within(..row);
        prototypes.shape[0] += 1;
    });
}

fn other_kind(path: &Path) {
    fs::copy(finished().0.step("0-embed").join("embeddings.safetensors"), path).expect("copied");
}

fn newer(path: &Path) {
    change(path, |file| {
        file.header.insert("format-version".into(), 99.into());
    });
}
