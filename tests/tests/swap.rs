//! Another program takes a stage's place: it knows only the arguments and the files.

use serde_json::json;
use tests::Bench;
use tests::tensors::File;

#[test]
fn the_loop_runs_with_a_foreign_clustering() {
    let mut bench = Bench::new();
    bench.set("stages.clustering", env!("CARGO_BIN_EXE_foreign-clustering"));
    let results = bench.reproduce(&[]).expect("runs through");
    assert_eq!(results["rounds"].as_array().map(Vec::len), Some(2));
    assert_eq!(results["images"], json!(90));
    let accuracy = results["scores"]["acc"]["mean"].as_f64().expect("scored");
    assert!(accuracy > 0.5, "chance is 0.33 for three classes: {results}");

    // What the foreign program wrote was trained on, and came out of the last round.
    let last = File::read(&bench.step("1-clustering").join("pseudo-labels.safetensors"));
    let last = last.expect("a sound file");
    assert!(last.tensors["reliable"].bytes.iter().all(|&reliable| reliable == 1));
    assert!(bench.step("1-prototype-refinement").join("network.safetensors").exists());
    assert!(!bench.step("1-clustering").join("head.safetensors").exists());
}
