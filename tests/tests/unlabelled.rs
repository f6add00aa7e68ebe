//! A flat folder of pictures: no ground truth, so no scores, but a result.

use serde_json::Value;
use tests::Bench;
use tests::bench::{stderr, systems};
use tests::pictures::{self, PICTURES, PLAIN};
use tests::tensors::File;

#[test]
fn pictures_without_ground_truth_are_clustered_and_their_sizes_told() {
    for system in systems() {
        clusters_pictures_without_ground_truth(&system);
    }
}

fn clusters_pictures_without_ground_truth(system: &str) {
    let bench = Bench::with_pictures(system, |folder| {
        let classes = folder.join("../classes");
        pictures::write(&classes, PLAIN, 0)?;
        for class in PLAIN.classes {
            for entry in std::fs::read_dir(classes.join(class))? {
                let entry = entry?;
                std::fs::rename(entry.path(), folder.join(entry.file_name()))?;
            }
        }
        Ok(())
    });
    let output = bench.xtask(&["reproduce", "--json"]).output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let results: Value =
        serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON");
    assert_eq!(results["scores"]["acc"], Value::Null);
    let last = results["rounds"].as_array().map_or(0, Vec::len) - 1;
    assert!(results["rounds"][last]["reliable"]["share"]["mean"].as_f64() > Some(0.));
    assert!(stdout.contains("no ground truth"), "{stdout}");

    let path = results["assignments"][0].as_str().expect("a path");
    assert!(stdout.contains(&format!("assignments: {path}")), "{stdout}");
    let assignment = File::read(path.as_ref()).expect("sound").tensors["assignment"].to_u32();
    assert_eq!(assignment.len(), PICTURES);
    let mut sizes = [0; 3];
    assignment.iter().for_each(|&cluster| sizes[cluster as usize] += 1);
    sizes.sort_unstable();
    let [least, middle, most] = sizes;
    assert!(stdout.contains(&format!("cluster sizes {most} {middle} {least}")), "{stdout}");
}
