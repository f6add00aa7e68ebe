//! `assort cluster` on a folder of pictures, with a narrow published network made here.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;
use tests::bench::{assort, stderr};
use tests::pictures::{self, PICTURES, PLAIN};
use tests::published;

/// TEMI in a second: few heads, few steps. Everything else is the program's own experiment.
const QUICK: &str = "
extends = ['data/photos', 'method/temi-pretrained']
[shared]
precision = 'f32'
[temi]
heads = 2
[temi.run]
passes = 1.0
least-steps = 40
";

/// Runs `assort cluster` in `folder` and returns what it printed.
fn cluster(folder: &Path, words: &[&str]) -> Output {
    let mut command = assort();
    command.args(["cluster", "pictures", "--device", "cpu"]).args(words);
    if !words.contains(&"--backbone") {
        command.args(["--backbone", "network"]);
    }
    command.current_dir(folder).output().expect("started")
}

fn succeeds(folder: &Path, words: &[&str]) -> String {
    let output = cluster(folder, words);
    assert!(output.status.success(), "{words:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A folder with pictures of three classes in one folder, a network, and the quick experiment.
fn photographs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let [source, pictures, network, configs] =
        ["source", "pictures", "network", "configs"].map(|name| folder.path().join(name));
    for path in [&source, &pictures, &network, &configs] {
        fs::create_dir(path).expect("created");
    }
    pictures::write(&source, PLAIN, 0).expect("written");
    for class in PLAIN.classes {
        for file in fs::read_dir(source.join(class)).expect("there").flatten() {
            let name = format!("{class}-{}", file.file_name().to_string_lossy());
            fs::rename(file.path(), pictures.join(name)).expect("moved");
        }
    }
    published::write(&network);
    fs::write(configs.join("photos.toml"), QUICK).expect("written");
    folder
}

/// How many pictures the run's `embed` step took from an earlier run.
fn known(folder: &Path) -> u64 {
    let log = fs::read_to_string(folder.join("runs/photos-pictures/0/0-embed/log.jsonl"));
    let log = log.expect("a log");
    let known = log.lines().find_map(|line| {
        serde_json::from_str::<Value>(line).expect("JSON").get("known").and_then(Value::as_u64)
    });
    known.expect("it says so")
}

fn files_in(folder: &Path) -> usize {
    let folders = fs::read_dir(folder).expect("there").flatten();
    folders.map(|folder| fs::read_dir(folder.path()).expect("there").count()).sum()
}

#[test]
fn a_folder_is_grouped_and_only_added_pictures_are_embedded_again() {
    let folder = photographs();
    let folder = folder.path();
    let words = ["--clusters", "3", "--copy-to", "sorted", "--link-to", "links", "--json"];
    let printed = succeeds(folder, &words);
    assert!(printed.contains("90 images, 3 clusters"), "{printed}");
    assert!(printed.contains("report.html") && printed.contains("clusters.csv"), "{printed}");
    let last: Value = serde_json::from_str(printed.lines().last().expect("a line")).expect("JSON");
    assert!(last.is_object(), "{last}");
    assert_eq!([files_in(&folder.join("sorted")), files_in(&folder.join("links"))], [PICTURES; 2]);
    assert_eq!(known(folder), 0);

    // Another number of clusters embeds nothing again.
    let step = fs::canonicalize(folder.join("runs/photos-pictures/0/0-embed")).expect("there");
    succeeds(folder, &["--clusters", "4"]);
    let again = fs::canonicalize(folder.join("runs/photos-pictures/0/0-embed")).expect("there");
    assert_eq!(step, again);

    // Of added pictures, only those are embedded.
    let more = tempfile::tempdir().expect("a folder");
    pictures::write(more.path(), PLAIN, 1).expect("written");
    for number in [1, 4, 7] {
        let from = more.path().join(format!("corners/{number:03}.png"));
        fs::rename(from, folder.join(format!("pictures/new-{number}.png"))).expect("moved");
    }
    let printed = succeeds(folder, &["--clusters", "3"]);
    assert!(printed.contains("93 images, 3 clusters"), "{printed}");
    assert_eq!(known(folder), 90);
}

#[test]
fn the_number_of_clusters_is_estimated_where_none_is_given() {
    let folder = photographs();
    let output = cluster(folder.path(), &[]);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("clusters is an estimate"), "{message}");
}

#[test]
fn what_cannot_be_clustered_is_refused_before_anything_runs() {
    let folder = photographs();
    for (words, part) in [
        (&["--clusters", "1"][..], "from 2"),
        (&["--clusters", "91"], "only 90 pictures"),
        (&["--backbone", "no-such-network"], "no-such-network"),
    ] {
        let output = cluster(folder.path(), words);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {message}");
        assert!(message.contains(part), "{words:?}: {message}");
        assert!(!folder.path().join("runs/.store").exists(), "{words:?}");
    }
}
