//! Tests that the first command of a fresh checkout compiles no crate twice: once for `xtask`, and again
//! for `assort` because that needs other features of a crate below.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::process::Command;

/// The features of every crate that a package needs, by name and version.
fn features(package: &str) -> BTreeMap<String, BTreeSet<String>> {
    let cargo = env::var_os("CARGO").expect("cargo runs this test");
    let mut tree = Command::new(cargo);
    tree.args(["tree", "--locked", "--offline", "--package", package, "--edges", "normal,build"]);
    let tree = tree.args(["--prefix", "none", "--format", "{p}|{f}"]).output().expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let mut crates = BTreeMap::<_, BTreeSet<_>>::new();
    for line in String::from_utf8(tree.stdout).expect("UTF-8").lines() {
        let (name, features) = line.split_once('|').expect("as in the format");
        let name: Vec<&str> = name.split(' ').take(2).collect();
        let features = features.trim_end_matches(" (*)").to_owned();
        crates.entry(name.join(" ")).or_default().insert(features);
    }
    crates
}

#[test]
fn xtask_and_assort_need_the_same_features() {
    let (xtask, assort) = (features("xtask"), features("assort"));
    assert!(xtask.len() > 50, "{xtask:?}");
    for (name, features) in xtask {
        assert_eq!(
            Some(&features),
            assort.get(&name),
            "`{name}` and all crates above it are compiled twice; ask for the features of `assort` in \
             xtask/Cargo.toml"
        );
    }
}
