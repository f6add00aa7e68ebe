//! Heads on one frozen embedding: their table, and what other commands make of such runs.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;
use tests::bench::{assort, stderr};
use tests::pictures::{self, PICTURES, PLAIN};
use tests::published;

/// What the heads share: the pictures and the network.
const EMBEDDING: &str = "
extends = ['data/photos', 'method/frozen-pretrained']
title = 'Tiny'
[shared]
precision = 'f32'
[data]
clusters = 3
[pretrained]
backbone = 'network'
";

/// The heads, each in a second.
const HEADS: [(&str, &str); 3] = [
    (
        "clustering",
        "[clustering]\nheads = 2\nhidden = 32\nneighbours = 5\nstart-epochs = 100\nlearning-rate = 5e-3",
    ),
    ("temi", "[temi]\nheads = 2\nrun.passes = 1.0\nrun.least-steps = 40"),
    ("turtle", "[turtle]\nsteps = 20"),
];

/// A folder with pictures of three classes, a narrow published network, and the experiments.
fn bench() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let [pictures, network, configs] =
        ["pictures", "network", "configs"].map(|name| folder.path().join(name));
    for path in [&network, &configs] {
        fs::create_dir(path).expect("created");
    }
    pictures::write(&pictures, PLAIN, 0).expect("written");
    published::write(&network);
    fs::create_dir(configs.join("embedding")).expect("created");
    fs::write(configs.join("embedding/tiny.toml"), EMBEDDING).expect("written");
    for (head, table) in HEADS {
        let text = format!("extends = ['embedding/tiny', 'method/{head}']\n{table}\n");
        fs::write(configs.join(format!("tiny-{head}-pretrained.toml")), text).expect("written");
    }
    folder
}

/// Runs `assort` in `folder`.
fn run(folder: &Path, words: &[&str]) -> Output {
    assort().args(words).current_dir(folder).output().expect("started")
}

fn succeeds(folder: &Path, words: &[&str]) -> String {
    let output = run(folder, words);
    assert!(output.status.success(), "{words:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

const COMPARE: [&str; 7] =
    ["compare", "tiny", "--tables", "pretrained", "--images", "pictures", "--device"];

/// `name,cluster` of each line of a report's table, by name.
fn clusters(table: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(table).expect("a table");
    let pair = |line: &str| {
        let mut cells = line.split(',').map(str::to_owned);
        (cells.next().expect("a name"), cells.next().expect("a cluster"))
    };
    let mut pairs: Vec<_> = text.lines().skip(1).map(pair).collect();
    pairs.sort();
    pairs
}

#[test]
fn heads_on_one_embedding_are_rows_of_one_table_and_runs_like_any_other() {
    let folder = bench();
    let folder = folder.path();
    let printed = succeeds(folder, &[&COMPARE[..], &["cpu", "--json"]].concat());
    for part in ["heads on a published network", "`network`", "seen ImageNet", "\nTEMI", "\nTURTLE"]
    {
        assert!(printed.contains(part), "{part} is not in: {printed}");
    }
    assert!(printed.contains("TEMI, TURTLE"), "one k-means, on the same rows: {printed}");
    let last: Value = serde_json::from_str(printed.lines().last().expect("a line")).expect("JSON");
    let rows = last["pretrained"].as_array().expect("rows");
    let named = |row: &&Value| row["system"] == "TEMI";
    let temi = rows.iter().find(named).expect("a row");
    assert_eq!(temi["experiment"], "tiny-temi-pretrained");
    assert!(temi["scores"]["acc"]["mean"].as_f64() > Some(0.3), "{temi}");
    let embeddings = fs::read_dir(folder.join("runs/.store")).expect("there").flatten();
    let embeddings = embeddings.filter(|entry| {
        entry.path().is_dir() && entry.file_name().to_string_lossy().starts_with("embed-")
    });
    assert_eq!(embeddings.count(), 1, "one embedding for all heads");

    // The run's own pictures get the same clusters again.
    let run = "runs/tiny-temi-pretrained/0";
    let predicted = succeeds(folder, &["predict", run, "--images", "pictures", "--device", "cpu"]);
    assert!(predicted.contains("90 images: ACC "), "{predicted}");
    let table = predicted.lines().find_map(|line| line.trim().strip_prefix("table: "));
    succeeds(folder, &["report", run]);
    let report = folder.join(run).join("report/clusters.csv");
    let of_run = clusters(&report);
    assert_eq!(clusters(&folder.join(table.expect("a path"))), of_run);

    // Clusters that a person finds alike are shown as one.
    succeeds(folder, &["report", run, "--merge", "0,2"]);
    let merged = of_run.into_iter().map(|(name, cluster)| match &*cluster {
        "2" => (name, "0".to_owned()),
        _ => (name, cluster),
    });
    assert_eq!(clusters(&report), merged.collect::<Vec<_>>());

    // Its embeddings are files for other tools.
    let written = succeeds(folder, &["export", run, "--format", "npy"]);
    let files: Vec<&str> = written.lines().collect();
    assert_eq!(files.len(), 3, "{written}");
    let bytes = fs::metadata(folder.join(files[0])).expect("there").len() as usize;
    assert!((PICTURES * 8 * 4..PICTURES * 8 * 4 + 200).contains(&bytes), "{bytes} bytes");
    let names = fs::read(folder.join(files[1])).expect("there");
    let names: Vec<String> = serde_json::from_slice(&names).expect("a list");
    assert!(names.len() == PICTURES && names.iter().any(|name| name == "bars/000.png"));
    let written = succeeds(folder, &["export", run, "--format", "parquet", "--out", "out"]);
    assert_eq!(written.trim(), "out/embeddings.parquet");
}

#[test]
fn heads_on_different_embeddings_are_refused() {
    let folder = bench();
    let folder = folder.path();
    let turtle = folder.join("configs/tiny-turtle-pretrained.toml");
    let text = fs::read_to_string(&turtle).expect("there");
    fs::write(&turtle, format!("{text}\n[embed]\nviews = 1\n")).expect("written");
    let output = run(folder, &[&COMPARE[..], &["cpu"]].concat());
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    for part in ["tiny-turtle-pretrained", "do not share one embedding", "they differ in `[embed]`"]
    {
        assert!(stderr(&output).contains(part), "{part} is not in: {}", stderr(&output));
    }
    let output = run(folder, &["compare", "tiny", "--tables", "heads", "--images", "pictures"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("no experiment `tiny-temi`"), "{}", stderr(&output));
}
