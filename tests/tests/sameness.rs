//! What must not change a result: the number of threads, names, order, other programs' folders.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tests::Bench;
use tests::pictures::{self, Layout, PLAIN};
use tests::tensors::File;

/// The files that a run leaves and others build on.
const RESULTS: [(&str, &str); 7] = [
    ("0-pretraining", "network.safetensors"),
    ("0-pretraining", "backbone.safetensors"),
    ("0-embed", "embeddings.safetensors"),
    ("0-clustering", "pseudo-labels.safetensors"),
    ("1-prototype-refinement", "network.safetensors"),
    ("1-embed", "embeddings.safetensors"),
    ("1-clustering", "pseudo-labels.safetensors"),
];

fn results(bench: &Bench) -> Vec<Vec<u8>> {
    RESULTS.iter().map(|(step, file)| bench.bytes(step, file)).collect()
}

fn assert_same(one: &[Vec<u8>], other: &[Vec<u8>], what: &str) {
    for ((one, other), (step, file)) in one.iter().zip(other).zip(RESULTS) {
        assert!(one == other, "{what} changed {step}/{file}");
    }
}

#[test]
fn one_two_and_three_threads_give_the_same_bytes() {
    let run = |threads: &str| {
        let bench = Bench::new();
        let mut command = bench.xtask(&["reproduce"]);
        let output = command.env("RAYON_NUM_THREADS", threads).output().expect("started");
        assert!(output.status.success(), "{}", tests::bench::stderr(&output));
        results(&bench)
    };
    let one = run("1");
    assert_same(&one, &run("2"), "a second thread");
    assert_same(&one, &run("3"), "a third thread");
}

#[test]
fn another_seed_gives_other_bytes() {
    // Else the comparisons here could not fail.
    let bench = Bench::new();
    bench.reproduce(&["--seeds", "2"]).expect("runs through");
    for (step, file) in RESULTS {
        let other = fs::read(bench.path("runs/tiny/1").join(step).join(file)).expect("there");
        assert!(bench.bytes(step, file) != other, "the seed does not reach {step}/{file}");
    }
}

#[test]
fn a_data_set_renamed_and_sorted_anew_gives_the_same_bytes() {
    let plain = Bench::new();
    plain.reproduce(&[]).expect("runs through");
    // Classes in another order, pictures backwards within each.
    let layout = Layout { classes: ["zebra", "mole", "ant"], backwards: true };
    let renamed = Bench::with_pictures(|folder| pictures::write(folder, layout, 0));
    renamed.reproduce(&[]).expect("runs through");
    assert_same(&results(&plain), &results(&renamed), "names and order");
    let images = |bench: &Bench| fs::read(bench.images()).expect("there");
    assert!(images(&plain) == images(&renamed));
    let names =
        |bench: &Bench| fs::read(bench.path("runs/tiny/data/names.safetensors")).expect("there");
    assert!(names(&plain) != names(&renamed), "the names are kept, away from the pictures");
}

#[test]
fn no_program_changes_what_it_is_given() {
    let bench = Bench::with_pictures(|folder| pictures::write(folder, PLAIN, 0));
    let mut before = BTreeMap::<PathBuf, Vec<u8>>::new();
    for words in [
        &["stage", "pretraining"][..],
        &["stage", "embed"],
        &["stage", "clustering"],
        &["stage", "prototype-refinement"],
        &["stage", "embed", "--round", "1"],
        &["stage", "clustering", "--round", "1"],
        &["stage", "metrics", "--round", "0"],
        &["stage", "metrics", "--round", "1"],
    ] {
        let is_there = |name: &str| before.keys().any(|path| path.ends_with(name));
        match words[1] {
            "clustering" => assert!(is_there("network.safetensors")),
            "prototype-refinement" => assert!(is_there("head.safetensors")),
            _ => {}
        }
        let output = bench.xtask(words).output().expect("started");
        assert!(output.status.success(), "{words:?}: {}", tests::bench::stderr(&output));
        // All weights, batch-norm statistics and heads lie in these files.
        for (path, bytes) in &before {
            let now = fs::read(path).expect("still there");
            assert!(*bytes == now, "{words:?} changed `{}`", Path::new(path).display());
        }
        before = files(&bench.path("runs/.store"));
    }
    let holds = |file: &str, ends: &[&str]| {
        for path in before.keys().filter(|path| path.ends_with(file)) {
            let tensors = File::read(path).expect("a tensor file").tensors;
            for end in ends {
                let found = tensors.keys().any(|name| name.ends_with(end));
                assert!(found, "`{}` has no tensor that ends in {end}", path.display());
            }
        }
    };
    holds("network.safetensors", &["weight", "bias", "running_mean", "running_var"]);
    holds("head.safetensors", &["weight", "bias"]);
}

/// All files below a folder but the logs, with their bytes.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            found.append(&mut files(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).expect("readable"));
        }
    }
    found
}
