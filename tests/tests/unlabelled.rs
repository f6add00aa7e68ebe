//! A flat folder of pictures: no ground truth, so no scores, but a result.

use serde_json::Value;
use tests::Bench;
use tests::bench::{assort, stderr, systems};
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
    let output = bench.assort(&["reproduce", "--json"]).output().expect("started");
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
    assert!(stdout.contains("assort report"), "{stdout}");
    is_reported(&bench, &assignment);
}

/// The clusters to look at: every picture under its name, with its cluster, and as a copy.
fn is_reported(bench: &Bench, assignment: &[u32]) {
    let mut command = assort();
    let run = bench.path("runs/tiny/0");
    command.arg("report").arg(&run).arg("--pictures");
    let output = command.output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let page = std::fs::read_to_string(run.join("report/report.html")).expect("a page");
    assert!(page.contains("Cluster 2 ") && page.contains(", by epoch"), "{page}");
    assert!(!page.contains("<h2>Scores"), "there is no ground truth");

    let table = std::fs::read_to_string(run.join("report/clusters.csv")).expect("a table");
    let mut sizes = [0; 3];
    for line in table.lines().skip(1) {
        let [name, cluster, ..] = line.split(',').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let original = std::fs::read(bench.path("pictures").join(name)).expect("an original");
        let folder = run.join("report/pictures").join(cluster);
        let copies = std::fs::read_dir(folder).expect("a folder").flatten();
        let copy = copies.map(|copy| copy.path()).find(|copy| {
            let copy = copy.file_name().unwrap_or_default().to_string_lossy();
            copy.split_once('-').is_some_and(|(_, found)| found == name)
        });
        assert!(std::fs::read(copy.expect("a copy")).expect("readable") == original, "{name}");
        sizes[cluster.parse::<usize>().expect("a number")] += 1;
    }
    let mut want = [0; 3];
    assignment.iter().for_each(|&cluster| want[cluster as usize] += 1);
    assert_eq!(sizes, want);
    assert_eq!(table.lines().count(), 1 + assignment.len());
}
