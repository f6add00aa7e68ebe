//! What must not change a result: the number of threads, names, order, other programs' folders.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use tests::Bench;
use tests::bench::systems;
use tests::pictures::{self, PictureNames};
use tests::tensors::File;

fn assert_same(one: &ResultFiles, other: &ResultFiles, what: &str) {
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>(), "{what}");
    for (name, bytes) in one {
        assert!(*bytes == other[name], "{what} changed {name}");
    }
}

type ResultFiles = BTreeMap<String, Vec<u8>>;

#[test]
fn one_two_and_three_threads_give_the_same_bytes() {
    for system in systems() {
        let run = |threads: &str| {
            let bench = Bench::of(&system);
            let mut command = bench.assort(&["reproduce"]);
            let output = command.env("RAYON_NUM_THREADS", threads).output().expect("started");
            assert!(output.status.success(), "{}", tests::bench::stderr(&output));
            bench.results(0)
        };
        let one = run("1");
        assert_same(&one, &run("2"), &format!("{system}: a second thread"));
        assert_same(&one, &run("3"), &format!("{system}: a third thread"));
    }
}

#[test]
fn another_seed_gives_other_bytes() {
    // Else the comparisons here could not fail.
    for system in systems() {
        let bench = Bench::of(&system);
        bench.reproduce(&["--seeds", "2"]).expect("runs through");
        let other = bench.results(1);
        for (name, bytes) in bench.results(0) {
            assert!(bytes != other[&name], "{system}: the seed does not reach {name}");
        }
    }
}

#[test]
fn a_data_set_renamed_and_sorted_anew_gives_the_same_bytes() {
    // Classes in another order, pictures backwards within each.
    let layout = PictureNames { classes: ["zebra", "mole", "ant"], backwards: true };
    for system in systems() {
        let plain = Bench::of(&system);
        plain.reproduce(&[]).expect("runs through");
        let renamed = Bench::with_pictures(&system, |folder| pictures::write(folder, layout, 0));
        renamed.reproduce(&[]).expect("runs through");
        assert_same(&plain.results(0), &renamed.results(0), &format!("{system}: names and order"));
        let images = |bench: &Bench| fs::read(bench.images()).expect("there");
        assert!(images(&plain) == images(&renamed));
        let names = |bench: &Bench| {
            fs::read(bench.path("runs/tiny/0/data/names.safetensors")).expect("there")
        };
        assert!(names(&plain) != names(&renamed), "the names are kept, away from the pictures");
    }
}

#[test]
fn no_program_changes_what_it_is_given() {
    for system in systems() {
        let bench = Bench::of(&system);
        let mut before = BTreeMap::<PathBuf, Vec<u8>>::new();
        let mut steps = bench.steps();
        let rounds: Vec<usize> = steps.iter().map(|(_, round)| *round).collect();
        let last = rounds.into_iter().max().expect("a round");
        steps.extend((0..=last).map(|round| ("metrics".to_owned(), round)));
        for (place, round) in steps {
            let words = ["stage", &place, "--round", &round.to_string()];
            let output = bench.assort(&words).output().expect("started");
            let message = tests::bench::stderr(&output);
            assert!(output.status.success(), "{system}, {words:?}: {message}");
            // All weights, batch-norm statistics and heads lie in these files.
            for (path, bytes) in &before {
                let now = fs::read(path).expect("still there");
                let path = path.display();
                assert!(*bytes == now, "{system}, {words:?} changed `{path}`");
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
        assert!(before.keys().any(|path| path.ends_with("network.safetensors")));
        holds("network.safetensors", &["weight", "bias", "running_mean", "running_var"]);
        // Of a head, its layers or its centres.
        for path in before.keys().filter(|path| path.ends_with("head.safetensors")) {
            let tensors = File::read(path).expect("a tensor file").tensors;
            let found = tensors.keys().any(|name| name == "centres" || name.ends_with("bias"));
            assert!(found, "`{}` holds no head", path.display());
        }
    }
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
