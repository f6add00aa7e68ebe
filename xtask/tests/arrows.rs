//! Holds the manifests against the drawn arrows: which crate may build on which.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

/// Every crate of the workspace with those of ours it may depend on. A crate may name only crates
/// above it here, so the arrows can make no circle; no stage names a stage.
const ARROWS: [(&str, &[&str]); 24] = [
    // The ground.
    ("kernels", &[]),
    ("stage", &[]),
    ("bench", &[]),
    ("layers", &["bench", "kernels"]),
    ("assignment", &["stage", "kernels"]),
    ("data", &["stage", "bench", "kernels"]),
    ("backbone", &["stage", "layers"]),
    ("training", &["stage", "layers", "backbone"]),
    ("fixture", &["stage", "data", "backbone"]),
    // The programs.
    ("prepare", &["stage", "data"]),
    ("pretraining", &["stage", "bench", "data", "layers", "backbone", "training", "fixture"]),
    ("embed", &["stage", "bench", "data", "layers", "backbone", "training"]),
    ("clustering", &["stage", "data", "assignment", "layers", "training"]),
    ("prototype-refinement", &["stage", "data", "assignment", "layers", "backbone", "training"]),
    ("propos", &["stage", "data", "assignment", "layers", "backbone", "training", "fixture"]),
    ("secu", &["stage", "data", "assignment", "layers", "backbone", "training", "fixture"]),
    ("imc-swav", &["stage", "data", "assignment", "layers", "backbone", "training", "fixture"]),
    ("icbpl", &["stage", "data", "assignment", "layers", "backbone", "training", "fixture"]),
    ("metrics", &["stage", "bench", "data", "assignment"]),
    ("predict", &["stage", "data", "assignment"]),
    ("report", &["stage", "data"]),
    // All programs in one.
    (
        "assort",
        &[
            "stage",
            "training",
            "prepare",
            "pretraining",
            "embed",
            "clustering",
            "prototype-refinement",
            "propos",
            "secu",
            "imc-swav",
            "icbpl",
            "metrics",
            "predict",
            "report",
        ],
    ),
    // What starts programs links none of them.
    ("xtask", &["stage"]),
    ("tests", &[]),
];

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
        folders.push(entry.expect("readable").path());
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

/// All dependencies of a manifest: normal, for tests, for build scripts, for single targets.
fn dependencies(manifest: &Table) -> BTreeSet<String> {
    let mut tables = vec![manifest];
    if let Some(Value::Table(targets)) = manifest.get("target") {
        tables.extend(targets.values().filter_map(Value::as_table));
    }
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let found = tables.iter().flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)));
    found.filter_map(Value::as_table).flat_map(|table| table.keys().cloned()).collect()
}

#[test]
fn the_manifests_keep_to_the_arrows() {
    let members = manifests();
    let ours: BTreeSet<&str> = members.iter().map(|(name, _)| name.as_str()).collect();
    for (name, manifest) in &members {
        let (_, allowed) = ARROWS
            .iter()
            .find(|(known, _)| known == name)
            .unwrap_or_else(|| panic!("`{name}` has no arrows yet: draw them here"));
        for dependency in dependencies(manifest) {
            assert!(
                !ours.contains(dependency.as_str()) || allowed.contains(&dependency.as_str()),
                "`{name}` depends on `{dependency}`, and no arrow leads there"
            );
        }
    }
}

#[test]
fn the_arrows_point_down() {
    for (position, (name, allowed)) in ARROWS.iter().enumerate() {
        for below in *allowed {
            let known = ARROWS[..position].iter().any(|(other, _)| other == below);
            assert!(known, "`{name}` may not depend on `{below}`, which is not below it");
        }
    }
}

#[test]
fn versions_and_lints_stand_in_the_root_alone() {
    for (name, manifest) in manifests() {
        assert_eq!(manifest["package"]["version"]["workspace"], Value::Boolean(true), "{name}");
        for (dependency, value) in manifest["dependencies"].as_table().into_iter().flatten() {
            let inherited = value.get("workspace") == Some(&Value::Boolean(true));
            assert!(inherited, "`{name}` gives `{dependency}` a version of its own");
        }
        // Only the kernels are free to write `unsafe`; whoever else does marks the one place.
        let inherits = manifest["lints"].get("workspace") == Some(&Value::Boolean(true));
        assert!(inherits || name == "kernels", "`{name}` has lints of its own");
    }
}
