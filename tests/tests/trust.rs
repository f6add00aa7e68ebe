//! What must hold whatever else happens: no second writer, nothing lost in silence, no stale result.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tests::fake::{Fake, assert_status, send, text, until};

fn bench() -> Fake {
    Fake::new(env!("CARGO_BIN_EXE_fake-assort"))
}

/// The words that put the foreign executable into the place of clustering.
const FOREIGN: [&str; 2] = ["--set", "stages.clustering=./foreign"];

/// Starts `reproduce` in a group of its own, so that signals can be sent to it alone.
fn start(bench: &Fake, waits: &str, words: &[&str]) -> std::process::Child {
    let mut command = bench.command(&[&["reproduce", "example.toml"], words].concat());
    command.env("FAKE_WAIT", waits).process_group(0).stderr(Stdio::null());
    command.spawn().expect("started")
}

#[test]
fn a_signal_to_the_command_alone_reaches_the_step() {
    for (waits, words) in [("clustering", &[][..]), ("foreign", &FOREIGN)] {
        for signal in ["-TERM", "-INT"] {
            let bench = bench();
            let mut command = start(&bench, waits, words);
            bench.waiting();
            send(signal, &command.id().to_string());
            assert_eq!(command.wait().expect("ended").code(), Some(3), "{waits} {signal}");
            let last = bench.log().pop().expect("a line");
            assert_eq!(last, format!("{waits} saves"), "{signal}");
        }
    }
}

#[test]
fn a_step_ends_with_the_command_that_started_it() {
    let bench = bench();
    let mut command = start(&bench, "clustering", &[]);
    bench.waiting();
    send("-KILL", &command.id().to_string());
    command.wait().expect("ended");
    until("the step saves", || bench.log().last().is_some_and(|line| line == "clustering saves"));
    assert_status(&bench.reproduce(&[]), 0);
}

#[test]
fn a_foreign_step_that_outlives_its_command_keeps_its_folder() {
    let bench = bench();
    let mut command = start(&bench, "foreign", &FOREIGN);
    let process = bench.waiting();
    send("-KILL", &command.id().to_string());
    command.wait().expect("ended");
    bench.started();

    let mut second = start(&bench, "nothing", &FOREIGN);
    thread::sleep(Duration::from_millis(800));
    assert!(bench.log().is_empty(), "a second writer: {:?}", bench.log());
    send("-TERM", &process);
    assert!(second.wait().expect("ended").success());
    assert_eq!(bench.started()[..2], ["foreign saves", "foreign 0 embeddings again"]);
}

#[test]
fn fresh_waits_for_whoever_reads_the_result_and_removes_no_more_than_it_runs() {
    let bench = bench();
    let mut reader = start(&bench, "embed", &[]);
    bench.waiting();
    let mut fresh = bench.command(&["stage", "pretraining", "example.toml", "--fresh"]);
    let mut fresh = fresh.stderr(Stdio::null()).spawn().expect("started");
    thread::sleep(Duration::from_millis(800));
    let pretraining = bench.path("runs/example/0/0-pretraining");
    assert!(pretraining.join("done.json").exists(), "it is being read");
    send("-TERM", &reader.id().to_string());
    assert_eq!(reader.wait().expect("ended").code(), Some(3));
    assert!(fresh.wait().expect("ended").success());
    assert_eq!(bench.started().last().expect("a line"), "pretraining 0");
    assert!(pretraining.join("done.json").exists());

    // A run that is started again and interrupted has lost only the step that it was at.
    assert_status(&bench.reproduce(&[]), 0);
    let mut fresh = start(&bench, "embed", &["--fresh"]);
    bench.waiting();
    send("-TERM", &fresh.id().to_string());
    assert_eq!(fresh.wait().expect("ended").code(), Some(3));
    let run = bench.path("runs/example/0");
    assert!(!run.join("0-embed/done.json").exists());
    assert!(run.join("0-clustering/done.json").exists() && run.join("1-embed/done.json").exists());
}

#[test]
fn a_run_repeats_what_another_command_removes_under_it() {
    let bench = bench();
    let pretraining = bench.path("runs/example/0/0-pretraining");
    let mut command = bench.command(&["reproduce", "example.toml"]);
    let output = command.env("FAKE_REMOVE", &pretraining).output().expect("started");
    assert_status(&output, 0);
    let started = bench.started();
    let repeated = started.iter().filter(|line| line.starts_with("pretraining 0")).count();
    // Removed after every round; the main arm and the control need it once more each.
    assert_eq!(repeated, 3, "{started:?}");
    let stderr = text(&output.stderr);
    assert!(stderr.contains("0-pretraining: another command removed it"), "{stderr}");
}

#[test]
fn a_folder_in_the_place_of_a_view_is_not_touched() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    bench.started();
    let view = bench.path("runs/example/0/0-embed");
    fs::remove_file(&view).expect("a link");
    fs::create_dir(&view).expect("created");
    fs::write(view.join("notes"), "mine").expect("written");
    let output = bench.reproduce(&["--fresh"]);
    assert_status(&output, 2);
    let stderr = text(&output.stderr);
    assert!(stderr.contains("0-embed") && stderr.contains("move it away"), "{stderr}");
    assert_eq!(fs::read_to_string(view.join("notes")).expect("there"), "mine");
    assert!(bench.started().is_empty(), "it is said before a step starts");
}

#[test]
fn report_and_views_are_those_of_the_last_plan() {
    let bench = bench();
    let labels_of = |view: &str| {
        let step = fs::canonicalize(bench.path("runs/example/0").join(view)).expect("a view");
        step.join("pseudo-labels.safetensors")
    };
    let reported = || {
        bench.started();
        let output = bench.run(&["report", "example"]);
        assert_status(&output, 0);
        let line = bench.started().pop().expect("the report was started");
        let labels = line.split(' ').find(|word| word.starts_with('/')).expect("a path").to_owned();
        (labels, text(&output.stderr))
    };
    assert_status(&bench.reproduce(&["--set", "rounds.rounds=2"]), 0);
    assert_eq!(Path::new(&reported().0), labels_of("2-clustering"));
    assert_status(&bench.reproduce(&["--set", "rounds.rounds=0", "--set", "rounds.then=[]"]), 0);
    for stale in ["1-embed", "2-clustering", "control/1-embed"] {
        assert!(fs::symlink_metadata(bench.path("runs/example/0").join(stale)).is_err(), "{stale}");
    }
    let (labels, messages) = reported();
    assert_eq!(Path::new(&labels), labels_of("0-clustering"));
    assert!(!messages.contains("is not finished"), "{messages}");

    // A dry run changes nothing; a run that has begun is the one that is shown, as far as it is.
    assert_status(&bench.reproduce(&["--dry-run"]), 0);
    assert_eq!(reported().0, labels);
    let mut failing = bench.command(&["reproduce", "example.toml", "--set", "rounds.rounds=2"]);
    failing.args(["--set", "embed.pixels=true"]).env("FAKE_FAIL", "prototype-refinement 4");
    assert_status(&failing.output().expect("started"), 4);
    let (labels, messages) = reported();
    assert_eq!(Path::new(&labels), labels_of("0-clustering"));
    assert!(messages.contains("1-prototype-refinement is missing"), "{messages}");
    let output = bench.run(&["predict", "example", "--images", "pictures"]);
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("is not finished"), "{}", text(&output.stderr));
}

#[test]
fn predictions_follow_from_the_record_of_a_finished_run() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    // Neither is a run: an experiment that was checked, and one that somebody saved later.
    assert_status(&bench.reproduce(&["--set", "data.clusters=7", "--dry-run"]), 0);
    fs::write(bench.path("runs/example/experiment-zzzzzzzz.toml"), "nonsense = 1")
        .expect("written");
    bench.started();
    let words = ["predict", "example", "--images", "pictures"];
    assert_status(&bench.run(&words), 0);
    let started = bench.started();
    let steps: Vec<&str> =
        started.iter().map(|line| line.split(' ').next().expect("a name")).collect();
    assert_eq!(steps, ["prepare", "embed", "predict", "metrics", "report"]);
    let experiments: Vec<String> = fs::read_dir(bench.path("runs/.store"))
        .expect("there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| fs::read_to_string(path).expect("readable"))
        .collect();
    assert_eq!(experiments.len(), 1);
    assert!(experiments[0].contains("clusters = 3"), "{}", experiments[0]);

    // Two at once, of two runs on the same pictures: each its own.
    assert_status(&bench.reproduce(&["--seed", "1", "--set", "data.clusters=4"]), 0);
    fs::create_dir(bench.path("other")).expect("created");
    let predict = |seed: &'static str| {
        let words = ["predict", "example", "--images", "other", "--seed", seed];
        bench.command(&words).stderr(Stdio::piped()).spawn().expect("started")
    };
    for child in [predict("0"), predict("1")] {
        assert_status(&child.wait_with_output().expect("ended"), 0);
    }
}

#[test]
fn archives_of_one_name_do_not_share_their_table() {
    let bench = bench();
    for folder in ["one", "two"] {
        fs::create_dir(bench.path(folder)).expect("created");
        fs::write(bench.path(folder).join("set.tar.gz"), folder).expect("written");
    }
    for (folder, clusters) in [("one", 3), ("two", 4)] {
        let source = format!("{folder}/set.tar.gz");
        let set = format!("prepare.source='{clusters}'");
        let words = ["prepare", "example.toml", "--images", &source, "--set", &set];
        assert_status(&bench.run(&words), 0);
    }
    let tables: Vec<String> = fs::read_dir(bench.path("runs/.data"))
        .expect("there")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .map(|path| fs::read_to_string(path).expect("readable"))
        .collect();
    assert_eq!(tables.len(), 2);
    assert_ne!(tables[0], tables[1]);
}

#[test]
fn a_source_that_changes_while_it_is_read_is_not_kept() {
    let bench = bench();
    fs::write(bench.path("pictures/a.png"), "1").expect("written");
    let mut changing = bench.command(&["reproduce", "example.toml"]);
    let output = changing.env("FAKE_CHANGE", bench.path("pictures/a.png")).output();
    let output = output.expect("started");
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("changed while"), "{}", text(&output.stderr));
    assert_eq!(bench.started(), ["prepare "], "no step runs on it");
    // Not even where the source is what it was before.
    fs::write(bench.path("pictures/a.png"), "1").expect("written");
    assert_status(&bench.reproduce(&[]), 0);
    assert_eq!(bench.started()[0], "prepare ");
}

#[test]
fn a_value_that_many_steps_refuse_is_named_once_with_all_of_them() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    let mut refusing = bench.command(&["reproduce", "example.toml", "--dry-run", "--fresh"]);
    let output = refusing.env("FAKE_REFUSE", "two clusters at least").output();
    let output = output.expect("started");
    assert_status(&output, 2);
    let stderr = text(&output.stderr);
    let named: Vec<&str> =
        stderr.lines().filter(|line| line.contains("two clusters at least")).collect();
    assert_eq!(named.len(), 1, "{stderr}");
    let steps = "the check of 0-pretraining, 0-embed, 0-clustering, 0-metrics, ";
    assert!(named[0].contains(steps) && named[0].contains("control/0-embed"), "{stderr}");
}

#[test]
fn a_dry_run_finds_what_is_wrong_before_anything_is_prepared() {
    let bench = bench();
    let refused = |words: &[&str], part: &str| {
        let output = bench.reproduce(&[&["--dry-run"], words].concat());
        assert_status(&output, 2);
        let stderr = text(&output.stderr);
        assert!(stderr.contains(part), "{part} is not in: {stderr}");
    };
    refused(&["--images", "nowhere"], "no source of pictures");
    refused(&["--set", "data.clusters=0"], "clusters");
    refused(&["--set", "data.clusters=-1"], "clusters");
    refused(&["--set", "data.clusters=1"], "clusters");
    let mut command = bench.command(&["reproduce", "example.toml", "--dry-run"]);
    assert_status(&command.env("FAKE_CHECK", "prepare").output().expect("started"), 2);
    assert!(bench.started().is_empty() && !bench.path("runs/.store").exists());

    // The fake prepares 30 pictures.
    assert_status(&bench.run(&["prepare", "example.toml"]), 0);
    refused(&["--set", "data.clusters=31"], "only 30 pictures");
    assert_status(&bench.reproduce(&["--dry-run", "--set", "data.clusters=30"]), 0);
}

#[test]
fn a_dry_run_says_that_it_starts_foreign_executables() {
    let bench = bench();
    assert_status(&bench.run(&["prepare", "example.toml"]), 0);
    let output = bench.reproduce(&[&["--dry-run"][..], &FOREIGN].concat());
    assert_status(&output, 0);
    let stdout = text(&output.stdout);
    assert!(stdout.contains("`./foreign` is a foreign executable"), "{stdout}");
    assert!(!text(&bench.reproduce(&["--dry-run"]).stdout).contains("foreign"));
}

/// Whether a process has a handler of SIGTERM yet, where that can be read.
fn heeds_sigterm(process: &str) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{process}/status")) else {
        thread::sleep(Duration::from_secs(1));
        return true;
    };
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    caught.is_some_and(|mask| mask & (1 << 14) != 0)
}

#[test]
fn a_long_plan_is_checked_in_time_and_can_be_interrupted() {
    let bench = bench();
    assert_status(&bench.run(&["prepare", "example.toml"]), 0);
    let words = ["reproduce", "example.toml", "--dry-run", "--set", "rounds.rounds=20000"];
    let mut command = bench.command(&words);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut command = command.spawn().expect("started");
    let id = command.id().to_string();
    until("it heeds signals", || heeds_sigterm(&id));
    send("-TERM", &id);
    let mut status = None;
    until("it ends", || {
        status = command.try_wait().expect("waited");
        status.is_some()
    });
    let code = status.expect("ended").code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}");
}

#[test]
fn a_flag_that_would_do_nothing_is_refused() {
    let bench = bench();
    for flag in [&["--seed", "5"][..], &["--fresh"], &["--set", "data.clusters=4"]] {
        let output = bench.run(&[&["compare", "example"], flag].concat());
        assert_status(&output, 2);
        let stderr = text(&output.stderr);
        assert!(stderr.contains("unexpected argument"), "{flag:?}: {stderr}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let bench = bench();
    let script = |script: &str| {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(env!("CARGO_BIN_EXE_fake-assort"));
        command.env("FAKE_LOG", bench.path("log")).current_dir(bench.path(""));
        command.output().expect("started")
    };
    for commands in ["show example.toml", "--help", "man", "completions bash"] {
        let output = script(&format!("{{ sleep 0.2; \"$0\" {commands}; echo $? >&2; }} | true"));
        assert_eq!(text(&output.stderr).trim(), "0", "{commands}");
    }
    let output =
        script("{ \"$0\" reproduce example.toml 3>&1 1>&2 2>&3; echo $? >&2; } | head -c 1");
    assert_eq!(text(&output.stderr).lines().last(), Some("0"), "stderr is closed");
}

#[test]
fn a_path_that_is_not_text_is_a_path() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let bench = bench();
    let folder = OsStr::from_bytes(b"caf\xe9");
    fs::create_dir(bench.path("").join(folder)).expect("created");
    for subcommand in ["reproduce", "prepare"] {
        let mut command = bench.command(&[subcommand, "example.toml", "--images"]);
        assert_status(&command.arg(folder).output().expect("started"), 0);
    }
    let mut command = bench.command(&["prepare"]);
    assert_status(&command.arg(folder).output().expect("started"), 0);
    let twin = OsStr::from_bytes(b"caf\xe8");
    fs::create_dir(bench.path("").join(twin)).expect("created");
    bench.started();
    let mut command = bench.command(&["prepare", "example.toml", "--images"]);
    assert_status(&command.arg(twin).output().expect("started"), 0);
    assert_eq!(bench.started(), ["prepare "], "another folder is another source");
}

#[test]
fn links_in_a_source_that_lead_back_do_not_hang() {
    let bench = bench();
    for name in ["a", "b"] {
        symlink(".", bench.path("pictures").join(name)).expect("linked");
    }
    assert_status(&bench.reproduce(&[]), 0);
}

#[test]
fn auto_stands_for_the_device_that_it_is_here() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    bench.started();
    assert_status(&bench.reproduce(&["--device", "cpu"]), 0);
    assert!(bench.started().is_empty(), "auto was the CPU");
    let mut command = bench.command(&["reproduce", "example.toml"]);
    assert_status(&command.env("FAKE_GPU", "1").output().expect("started"), 0);
    let started = bench.started();
    assert_eq!(started[0], "pretraining 0 on cuda:0", "nothing of the CPU's is reused");
    assert_eq!(started.len(), 15);
}

#[test]
fn the_record_names_what_a_run_used() {
    let bench = bench();
    assert_status(
        &bench.reproduce(&["--seeds", "2", "--set", "prototype-refinement.noise=0.5"]),
        0,
    );
    for seed in 0..2 {
        let folder = bench.path("runs/example").join(seed.to_string());
        let text = fs::read_to_string(folder.join("run.json")).expect("a record");
        let record: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(record["seed"], seed);
        let experiment = record["experiment"].as_str().expect("a name");
        let experiment = fs::read_to_string(bench.path("runs/example").join(experiment));
        assert!(experiment.expect("beside the run").contains("noise = 0.5"));
        let data = bench.path("runs/.data").join(record["data"].as_str().expect("a key"));
        assert_eq!(
            fs::canonicalize(folder.join("data")).expect("a view"),
            fs::canonicalize(data).expect("there")
        );
        for step in record["steps"].as_array().expect("steps") {
            let of = |key: &str| step[key].as_str().expect("text").to_owned();
            let view = fs::canonicalize(folder.join(of("name"))).expect("a view");
            assert!(view.ends_with(of("key")), "{step}");
        }
    }
}
