//! A finished run assigns clusters to pictures that came later.

use std::fs;
use std::path::Path;
use std::process::Output;

use tests::Bench;
use tests::bench::{assort, stderr, systems};
use tests::tensors::File;

/// `assort predict` by the bench's run on other pictures.
fn predict(bench: &Bench, pictures: &Path) -> Output {
    let mut command = assort();
    command.arg("predict").arg(bench.path("runs/tiny/0")).arg("--images").arg(pictures);
    command.arg("--runs").arg(bench.path("runs"));
    command.args(["--device", "cpu"]).output().expect("started")
}

/// Name, cluster and confidence of each picture, by name.
fn table(output: &Output) -> Vec<(String, u32, f64)> {
    let stdout = String::from_utf8_lossy(&output.stdout);
    let line = stdout.lines().find_map(|line| line.trim().strip_prefix("table: "));
    let text = fs::read_to_string(line.expect("a path")).expect("a table");
    let mut rows: Vec<(String, u32, f64)> = text
        .lines()
        .skip(1)
        .map(|line| {
            let [name, cluster, confidence, ..] = line.split(',').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let number = |text: &str| text.parse().expect("a number");
            (name.to_owned(), cluster.parse().expect("a cluster"), number(confidence))
        })
        .collect();
    rows.sort_by(|a, b| a.0.cmp(&b.0));
    rows
}

#[test]
fn the_run_s_own_pictures_get_the_same_clusters_and_confidences_again() {
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
        let of_the_run = of_the_run(&bench, &system);
        assert_eq!(found.len(), of_the_run.len(), "{system}");
        for (found, of_the_run) in found.iter().zip(&of_the_run) {
            assert_eq!((&found.0, found.1), (&of_the_run.0, of_the_run.1), "{system}");
            // Four decimals are written.
            assert!((found.2 - of_the_run.2).abs() < 2e-4, "{system}: {found:?} {of_the_run:?}");
        }

        // A single one of them gets the same cluster; the second time nothing runs.
        let alone = bench.path("alone");
        fs::create_dir(&alone).expect("created");
        let (name, cluster, _) = &found[42];
        fs::copy(bench.path("pictures").join(name), alone.join("one.png")).expect("copied");
        for _ in 0..2 {
            let output = predict(&bench, &alone);
            assert!(output.status.success(), "{system}: {}", stderr(&output));
            assert!(String::from_utf8_lossy(&output.stdout).contains("1 images: no ground truth"));
            let [(found, alone, _)] = &table(&output)[..] else { panic!("{system}: one picture") };
            assert_eq!((found.as_str(), alone), ("one.png", cluster), "{system}");
        }
    }
}

/// The result of the run itself, by its own program and report.
fn of_the_run(bench: &Bench, system: &str) -> Vec<(String, u32, f64)> {
    let run = bench.path("runs/tiny/0");
    let (place, round) = bench.steps().pop().expect("steps");
    let mut command = assort();
    command.args(["program", "report"]);
    let data = run.join("data");
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
    let started = bench.assort(&["stage", "pretraining"]).output().expect("started");
    assert!(started.status.success(), "{}", stderr(&started));
    let output = predict(&bench, &bench.path("pictures"));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is not finished"), "{}", stderr(&output));
}
