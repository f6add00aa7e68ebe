//! Every experiment that ships is understood by the programs that it names.

use std::fs;
use std::path::Path;
use std::process::Output;

use tests::bench::{assort, stderr};
use tests::pictures::{self, PLAIN, PictureNames};

/// `assort` on an experiment that ships, but on the tiny pictures and in `folder`.
fn on_tiny_pictures(words: &[&str], folder: &Path) -> Output {
    let mut command = assort();
    command.args(words).arg("--images").arg(folder.join("pictures"));
    command.arg("--runs").arg(folder.join("runs"));
    for assignment in
        ["prepare.classes=[]", "prepare.images-per-class=0", "prepare.format=\"auto\""]
    {
        command.args(["--set", assignment]);
    }
    command.output().expect("started")
}

/// An experiment with every value.
fn shown(name: &str) -> toml::Table {
    let output = assort().args(["show", name]).output().expect("started");
    String::from_utf8(output.stdout).expect("UTF-8").parse().expect("TOML")
}

#[test]
fn every_shipped_experiment_passes_the_checks_of_all_its_steps() {
    let folder = tempfile::tempdir().expect("a folder");
    // As many pictures as the largest number of clusters asks for, all different.
    for (seed, classes) in [PLAIN.classes, ["a", "b", "c"], ["d", "e", "f"]].into_iter().enumerate()
    {
        let layout = PictureNames { classes, ..PLAIN };
        pictures::write(&folder.path().join("pictures"), layout, seed as u64).expect("written");
    }
    let network = folder.path().join("network");
    fs::create_dir(&network).expect("created");
    tests::published::write(&network);
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut count = 0;
    for entry in fs::read_dir(&configs).expect("experiments") {
        let file = entry.expect("readable").file_name();
        // Beside the experiments lie what they extend, in folders, and their digests.
        let Some(name) = file.to_str().expect("UTF-8").strip_suffix(".toml") else { continue };
        let experiment = shown(name);
        let network = format!("pretrained.backbone='{}'", network.display());
        let of_network: &[&str] = match experiment.get("pretrained") {
            Some(_) => &["--set", &network],
            None => &[],
        };
        let prepare = [&["stage", "prepare", name], of_network].concat();
        let prepared = on_tiny_pictures(&prepare, folder.path());
        assert!(prepared.status.success(), "{name}: {}", stderr(&prepared));
        let mut words = [&["reproduce", name, "--dry-run"], of_network].concat();
        let backbone = folder.path().join("backbone.safetensors");
        let named = format!("icbpl.start.file='{}'", backbone.display());
        let start = experiment.get("icbpl").map(|icbpl| &icbpl["start"]["kind"]);
        if start.is_some_and(|kind| kind.as_str() == Some("file")) {
            // What it starts from does not ship, and must be there before a run begins.
            let lacking = on_tiny_pictures(&words, folder.path());
            assert!(stderr(&lacking).contains("--set icbpl.start.file"), "{name}");
            fs::write(&backbone, "in its place").expect("written");
            words.extend(["--set", &named]);
        }
        let checked = on_tiny_pictures(&words, folder.path());
        assert!(checked.status.success(), "{name}: {}", stderr(&checked));
        let plan = String::from_utf8(checked.stdout).expect("UTF-8");
        for step in expected_steps(&experiment) {
            assert!(plan.contains(&format!("{step}, ")), "{name} has no {step}: {plan}");
        }
        count += 1;
    }
    assert!(count > 0, "no experiment ships");
}

/// Some of the steps that an experiment's `[rounds]` and `[control]` ask for.
fn expected_steps(tables: &toml::Table) -> Vec<String> {
    let rounds = tables["rounds"]["rounds"].as_integer().expect("a number");
    let first = tables["rounds"]["first"].as_array().expect("places");
    let places = first.iter().map(|place| place.as_str().expect("a name"));
    let mut steps: Vec<String> = places.map(|place| format!("0-{place}")).collect();
    steps.push(format!("{rounds}-metrics"));
    if tables.get("embed").is_some() && tables.get("clustering").is_some() {
        steps.push("pixels/0-metrics".into());
    }
    let control = tables.get("control").and_then(toml::Value::as_table);
    if control.is_some_and(|control| !control.is_empty()) {
        steps.push(format!("control/{rounds}-metrics"));
    }
    steps
}

#[test]
fn the_digits_are_the_set_that_their_readme_describes() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = assort();
    command.args(["stage", "prepare", "digits"]).arg("--runs").arg(folder.path());
    let output = command.output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("1797 images of 10 classes"), "{}", stderr(&output));
}
