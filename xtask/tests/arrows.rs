//! Tests that the manifests follow the architecture: which crate may depend on which.
//!
//! A crate that is not listed here is a stage or a helper. It may depend on the libraries, except
//! those it must not know, and on no other stage or helper. So a new stage needs no line here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// The libraries, from the machine up: each may build on those above it here, and nothing else.
const LIBRARIES: [(&str, &[&str]); 13] = [
    ("kernels", &[]),
    ("collective", &[]),
    ("stage", &["collective"]),
    ("bench", &[]),
    ("browser", &["stage"]),
    ("hub", &["stage"]),
    ("layers", &["bench", "collective", "kernels"]),
    ("assignment", &["stage", "collective", "kernels"]),
    ("data", &["stage", "bench", "kernels"]),
    ("backbone", &["stage", "layers"]),
    ("training", &["stage", "collective", "data", "layers", "backbone"]),
    ("frozen", &["stage", "collective", "data", "assignment", "kernels"]),
    ("fixture", &["stage", "collective", "data", "layers", "backbone"]),
];

/// Libraries that know networks.
const NETWORKS: &[&str] = &["layers", "backbone", "training"];

/// Libraries that a stage or helper must not depend on.
const IGNORANCE: [(&str, &[&str]); 5] = [
    ("prepare", NETWORKS),
    ("metrics", NETWORKS),
    ("predict", NETWORKS),
    ("report", NETWORKS),
    // It trains heads, but knows no network of pictures.
    ("clustering", &["backbone"]),
];

/// What is above the stages. `None`: everything below it, stages included.
const ABOVE: [(&str, Option<&[&str]>); 3] =
    [("xtask", Some(&["stage"])), ("assort", None), ("tests", Some(&["stage", "xtask"]))];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn manifest(path: &Path) -> Table {
    let text = fs::read_to_string(path).expect("a manifest");
    text.parse().expect("TOML")
}

/// The manifests of all members, by name.
fn manifests() -> Vec<(String, Table)> {
    let mut folders = vec![root().join("xtask"), root().join("tests")];
    for entry in fs::read_dir(root().join("crates")).expect("crates") {
        let path = entry.expect("readable").path();
        folders.extend(path.is_dir().then_some(path)); // Not the README.
    }
    let named = |folder: PathBuf| {
        let manifest = manifest(&folder.join("Cargo.toml"));
        let name = manifest["package"]["name"].as_str().expect("a name").to_owned();
        let file = folder.canonicalize().expect("there");
        assert_eq!(file.file_name().expect("a folder").to_str(), Some(name.as_str()));
        (name, manifest)
    };
    folders.into_iter().map(named).collect()
}

/// All dependencies of a manifest: normal, dev, build, and for single targets.
fn dependencies(manifest: &Table) -> BTreeSet<String> {
    let mut tables = vec![manifest];
    if let Some(Value::Table(targets)) = manifest.get("target") {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let found = tables.iter().flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)));
    found.filter_map(Value::as_table).flat_map(|table| table.keys().cloned()).collect()
}

/// Returns the `dependencies` that `name` may not have.
fn wrong_arrows(name: &str, dependencies: &BTreeSet<&str>) -> Vec<String> {
    let library = LIBRARIES.iter().find(|(library, _)| *library == name);
    let above = ABOVE.iter().find(|(program, _)| *program == name);
    let hidden = IGNORANCE.iter().find(|(stage, _)| *stage == name).map_or(&[][..], |(_, h)| *h);
    let is_library = |other: &str| LIBRARIES.iter().any(|(library, _)| *library == other);
    let is_allowed = |other: &str| match (library, above) {
        (Some((_, allowed)), _) => allowed.contains(&other),
        (None, Some((_, Some(allowed)))) => allowed.contains(&other),
        (None, Some((_, None))) => other != "tests",
        // Only libraries use kernels directly.
        (None, None) => is_library(other) && other != "kernels" && !hidden.contains(&other),
    };
    let wrong = dependencies.iter().filter(|other| !is_allowed(other));
    wrong.map(|other| format!("`{name}` may not depend on `{other}`")).collect()
}

#[test]
fn the_manifests_follow_the_arrows() {
    let members = manifests();
    let ours: BTreeSet<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
    let mut wrong = Vec::new();
    for (name, manifest) in &members {
        let found = dependencies(manifest);
        let found = found.iter().map(String::as_str).filter(|other| ours.contains(other)).collect();
        wrong.extend(wrong_arrows(name, &found));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let named = LIBRARIES.iter().map(|(name, _)| *name).chain(ABOVE.iter().map(|(name, _)| *name));
    for name in named.chain(IGNORANCE.iter().map(|(name, _)| *name)) {
        assert!(ours.contains(name), "there is no crate `{name}` to draw arrows for");
    }
}

#[test]
fn wrong_arrows_are_found_and_a_new_stage_needs_no_line() {
    let wrong = |name: &str, other: &str| !wrong_arrows(name, &BTreeSet::from([other])).is_empty();
    for (name, other) in [
        ("secu", "propos"),
        ("a-new-stage", "pretraining"),
        ("a-new-stage", "xtask"),
        ("a-new-stage", "kernels"),
        ("data", "training"),
        ("kernels", "stage"),
        ("report", "layers"),
        ("clustering", "backbone"),
        ("xtask", "pretraining"),
        ("xtask", "data"),
        ("tests", "pretraining"),
    ] {
        assert!(wrong(name, other), "`{name}` may not build on `{other}`");
    }
    for (name, other) in
        [("a-new-stage", "training"), ("assort", "a-new-stage"), ("assort", "xtask")]
    {
        assert!(!wrong(name, other), "`{name}` may build on `{other}`");
    }
}

#[test]
fn the_arrows_point_down() {
    for (position, (name, allowed)) in LIBRARIES.iter().enumerate() {
        for below in *allowed {
            let known = LIBRARIES[..position].iter().any(|(other, _)| other == below);
            assert!(known, "`{name}` may not build on `{below}`, which is not below it");
        }
    }
}

#[test]
fn versions_and_lints_are_only_in_the_root() {
    for (name, manifest) in manifests() {
        assert_eq!(manifest["package"]["version"]["workspace"], Value::Boolean(true), "{name}");
        for (dependency, value) in manifest["dependencies"].as_table().into_iter().flatten() {
            // Only `assort` names stages, by their paths.
            let inherited = value.get("workspace") == Some(&Value::Boolean(true));
            let is_stage = name == "assort" && value.get("path").is_some();
            assert!(inherited || is_stage, "`{name}` gives `{dependency}` a version");
        }
        // Only `kernels` may use `unsafe` freely; other crates mark each place.
        let inherits = manifest["lints"].get("workspace") == Some(&Value::Boolean(true));
        assert!(inherits || name == "kernels", "`{name}` does not inherit the lints");
    }
}
