//! A finished run tells the clusters of pictures that came later.

use std::fs;
use std::path::Path;
use std::process::Output;

use tests::Bench;
use tests::bench::{program, programs, stderr, systems};
use tests::tensors::File;

/// `cargo xtask predict` by the bench's run on other pictures.
fn predict(bench: &Bench, pictures: &Path) -> Output {
    let mut command = program("xtask");
    command.arg("predict").arg(bench.path("runs/tiny/0")).arg("--images").arg(pictures);
    command.arg("--programs").arg(programs()).arg("--runs").arg(bench.path("runs"));
    command.args(["--device", "cpu"]).output().expect("started")
}

/// Name and cluster of each picture, by name.
fn table(output: &Output) -> Vec<(String, u32)> {
    let stdout = String::from_utf8_lossy(&output.stdout);
    let line = stdout.lines().find_map(|line| line.trim().strip_prefix("table: "));
    let text = fs::read_to_string(line.expect("a path")).expect("a table");
    let mut rows: Vec<(String, u32)> = text
        .lines()
        .skip(1)
        .map(|line| {
            let [name, cluster, ..] = line.split(',').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            (name.to_owned(), cluster.parse().expect("a number"))
        })
        .collect();
    rows.sort();
    rows
}

#[test]
fn the_run_s_own_pictures_get_their_clusters_again_alone_and_together() {
    for system in systems() {
        let bench = Bench::of(&system);
        bench.reproduce(&[]).unwrap_or_else(|error| panic!("{system}: {error:#}"));
        let output = predict(&bench, &bench.path("pictures"));
        if system == "icbpl" {
            // Its network has no projector, which embed says.
            assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
            assert!(stderr(&output).contains("projector"), "{}", stderr(&output));
            continue;
        }
        assert!(output.status.success(), "{system}: {}", stderr(&output));
        assert!(String::from_utf8_lossy(&output.stdout).contains("90 images: ACC "));
        let found = table(&output);
        assert_eq!(found, of_the_run(&bench, &system), "{system}");

        // One of them, where no other has a say; and another time nothing runs.
        let alone = bench.path("alone");
        fs::create_dir(&alone).expect("created");
        let (name, cluster) = &found[42];
        fs::copy(bench.path("pictures").join(name), alone.join("one.png")).expect("copied");
        for _ in 0..2 {
            let output = predict(&bench, &alone);
            assert!(output.status.success(), "{system}: {}", stderr(&output));
            assert!(String::from_utf8_lossy(&output.stdout).contains("1 images: no ground truth"));
            assert_eq!(table(&output), [("one.png".to_owned(), *cluster)], "{system}");
        }
    }
}

/// What the run itself found, by its own program and report.
fn of_the_run(bench: &Bench, system: &str) -> Vec<(String, u32)> {
    let run = bench.path("runs/tiny/0");
    let (place, round) = bench.steps().pop().expect("steps");
    let mut command = program("report");
    let data = bench.path("runs/tiny/data");
    // The head of IMC-SwAV has the statistics of training.
    let file = match system {
        "imc-swav" => "pseudo-labels-running-statistics.safetensors",
        _ => "pseudo-labels.safetensors",
    };
    let labels = run.join(format!("{round}-{place}")).join(file);
    assert_eq!(File::read(&labels).expect("sound").tensors["assignment"].shape, [90]);
    command.arg("--images").arg(data.join("images.safetensors"));
    command.arg("--names").arg(data.join("names.safetensors"));
    command.arg("--pseudo-labels").arg(labels).arg("--out").arg(bench.path("report"));
    let mut output = command.output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    output.stdout = format!("table: {}", bench.path("report/clusters.csv").display()).into();
    table(&output)
}

#[test]
fn a_run_that_has_not_ended_is_said() {
    let bench = Bench::new();
    let output = predict(&bench, &bench.path("pictures"));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("there is no run"), "{}", stderr(&output));
    fs::create_dir_all(bench.path("runs/tiny/0/0-pretraining")).expect("created");
    let output = predict(&bench, &bench.path("pictures"));
    assert!(stderr(&output).contains("network.safetensors"), "{}", stderr(&output));
}
