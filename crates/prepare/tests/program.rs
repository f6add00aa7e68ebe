//! Tests the program: arguments, exit status, messages, files.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const TABLE: &str = r#"
[prepare]
source = "SOURCE"
format = "auto"
classes = []
images-per-class = 0
images-at-most = 0
channels = 1
broken-share = 0.01
identical = "keep"
stored-shorter-side = 0
"#;

/// The digits that ship with the project.
fn digits() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/digits").display().to_string()
}

fn call(folder: &Path, table: &str, more: &[&str]) -> Output {
    let experiment = folder.join("example.toml");
    fs::write(&experiment, table).expect("written");
    Command::new(env!("CARGO_BIN_EXE_prepare"))
        .arg("--experiment")
        .arg(experiment)
        .arg("--out")
        .arg(folder.join("out"))
        .args(more)
        .output()
        .expect("started")
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_digits_are_prepared_once_with_all_their_pictures_and_labels() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = TABLE.replace("SOURCE", "nowhere");
    let first = call(folder.path(), &table, &["--source", &digits()]);
    assert_eq!(first.status.code(), Some(0), "{}", message(&first));
    let out = folder.path().join("out");
    let mark: stage::finished::FinishedMark =
        stage::json::read(&out.join("done.json")).expect("finished");
    assert_eq!((&*mark.stage, mark.algorithm), ("prepare", Some(prepare::ALGORITHM)));

    let images = data::Images::open(&out.join(prepare::IMAGES)).expect("sound");
    let labels = data::Labels::open(&out.join(prepare::LABELS)).expect("sound");
    assert_eq!(images.len(), 1797);
    let mut counts = [0; 10];
    for label in labels.labels {
        counts[label.expect("known") as usize] += 1;
    }
    // As the study's table of the data set has them.
    assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
    for row in 0..1797 {
        let picture = images.picture(row).expect("sound");
        assert_eq!((picture.height, picture.width, picture.channels), (8, 8, 1));
        // Ink from 0 to 16, stored as the nearest of 0 to 255, comes back exactly.
        let ink = |value: u8| (f64::from(value) * 16. / 255.).round();
        for &value in &picture.pixels {
            assert_eq!((ink(value) * 255. / 16.).round(), f64::from(value));
        }
    }

    fs::remove_file(out.join(prepare::IMAGES)).expect("removed");
    let again = call(folder.path(), &table, &["--source", &digits()]);
    assert_eq!(again.status.code(), Some(0));
    assert!(message(&again).contains("lacks a file"), "{}", message(&again));
    assert!(out.join(prepare::IMAGES).exists());
    let again = call(folder.path(), &table, &["--source", &digits()]);
    assert!(message(&again).contains("is finished"), "{}", message(&again));
}

#[test]
fn a_check_prints_the_table_and_writes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = call(folder.path(), &TABLE.replace("SOURCE", &digits()), &["--check"]);
    assert_eq!(output.status.code(), Some(0), "{}", message(&output));
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(printed.starts_with("pictures = 1797\n[prepare]\n"), "{printed}");
    assert!(printed.contains("images-at-most = 0"), "{printed}");
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_wrong_table_or_source_ends_with_2_and_writes_nothing() {
    let digits = digits();
    let cases = [
        (TABLE.replace("broken-share", "broken"), "unknown field `broken`"),
        (TABLE.replace("channels = 1\n", ""), "missing field `channels`"),
        (TABLE.replace("channels = 1", "channels = 4"), "1 is grey, 3 is colour"),
        (TABLE.replace("share = 0.01", "share = 1.5"), "`broken-share = 1.5`"),
        (TABLE.replace("\"auto\"", "\"rar\""), "unknown variant `rar`"),
        (TABLE.replace("\"auto\"", "\"tar\""), "set `format = \"auto\"`"),
        (TABLE.replace("[]", "[\"1\"]"), "names only one class"),
        (TABLE.replace("[]", "[\"1\", \"2\", \"1\"]"), "names `1` twice"),
        (TABLE.replace("SOURCE", "no/such/folder"), "opening the source `no/such/folder`"),
        (TABLE.replace("SOURCE", ""), "no source is given"),
        (TABLE.replace("per-class = 0", "per-class = 178"), "9 of 10 classes"),
        (TABLE.replace("[]", "[\"1\", \"ten\"]"), "no class `ten`"),
    ];
    for (table, part) in cases {
        let folder = tempfile::tempdir().expect("a folder");
        let output = call(folder.path(), &table.replace("SOURCE", &digits), &[]);
        let message = message(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("prepare: ") && message.contains(part), "{part}: {message}");
        let left = fs::read_dir(folder.path().join("out")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "{part}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_prepare")).output().expect("started");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn skipped_files_are_counted_by_reason_on_stderr() {
    let folder = tempfile::tempdir().expect("a folder");
    let set = folder.path().join("set");
    fs::create_dir(&set).expect("created");
    let picture: image::DynamicImage = image::GrayImage::new(3, 2).into();
    for name in ["0.png", "1.png"] {
        picture.save(set.join(name)).expect("written");
    }
    for (name, bytes) in [("2.png", &b""[..]), ("3.png", b"\x89PNG\r\n\x1a\nx"), ("a.txt", b"x")] {
        fs::write(set.join(name), bytes).expect("written");
    }
    fs::write(set.join(".DS_Store"), b"x").expect("written");
    let table = TABLE.replace("SOURCE", &set.display().to_string());
    let output = call(folder.path(), &table.replace("0.01", "0.6"), &[]);
    let message = message(&output);
    assert_eq!(output.status.code(), Some(0), "{message}");
    for part in [
        "cannot read 2 pictures: 1 × is broken, 1 × is empty",
        "skipped files or folders: 1 × is hidden, 1 × is not a picture",
        "identical to an earlier one, and kept: 1 picture",
        "skipped.json` lists them by name",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn pictures_that_only_just_may_be_decoded_stay_within_the_memory() {
    let folder = tempfile::tempdir().expect("a folder");
    // 23 million pixels of 16-bit colour with transparency: 176 MiB each before they are converted.
    let raw = vec![7u16; 4 * 4800 * 4800];
    let picture = image::ImageBuffer::<image::Rgba<u16>, _>::from_raw(4800, 4800, raw);
    let picture: image::DynamicImage = picture.expect("fits").into();
    let path = folder.path().join("set/0.png");
    fs::create_dir(folder.path().join("set")).expect("created");
    picture.save(&path).expect("written");
    drop(picture);
    fs::copy(&path, folder.path().join("set/1.png")).expect("copied");
    let source = folder.path().join("set").display().to_string();
    let output = call(folder.path(), &TABLE.replace("SOURCE", &source), &[]);
    let message = message(&output);
    assert_eq!(output.status.code(), Some(0), "{message}");
    let (_, peak) = message.split_once("peak memory: ").expect("said");
    let peak: u64 = peak.split(' ').next().expect("a number").parse().expect("a number");
    assert!((100..512).contains(&peak), "{message}");
    fs::remove_dir_all(folder.path().join("out")).expect("removed");
    let output = call(folder.path(), &TABLE.replace("SOURCE", &source), &["--memory", "256"]);
    assert_eq!(output.status.code(), Some(2), "with half of it they are too large");
}

#[test]
fn every_experiment_says_what_to_prepare() {
    let experiments = stage::Library::in_folder("../../configs").experiments().expect("sound");
    for experiment in &experiments {
        let name = &experiment.name;
        let config: prepare::Config = experiment.table("prepare").expect("a whole table");
        let data: stage::DataTable = experiment.table("data").expect("a whole table");
        config.check().expect("sound");
        data.check().expect("sound");
        let classes = config.classes.len();
        assert!(classes == 0 || classes == data.clusters, "{name}");
        // Of ILSVRC-2012, the published subsets have 1,300 pictures a class.
        assert_eq!(config.images_per_class == 1300, classes > 0, "{name}");
    }
    assert!(experiments.len() >= 9);
}
