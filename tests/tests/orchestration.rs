//! Commands on stages that compute nothing: what is started, with what, and when not.
#![cfg(unix)]

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Output;

use serde_json::{Value, json};
use tests::fake::{Fake, assert_status, send, sources, text, until};

fn bench() -> Fake {
    Fake::new(env!("CARGO_BIN_EXE_fake-assort"))
}

const FIRST: [&str; 13] = [
    "prepare ",
    "pretraining 0",
    "embed 0 network",
    "clustering 0 embeddings",
    "metrics 0 pseudo-labels labels",
    "prototype-refinement 1 network pseudo-labels",
    "embed 1 network",
    "clustering 1 embeddings previous",
    "metrics 1 pseudo-labels labels previous",
    // The baseline: no network, no round.
    "embed 0",
    "clustering 0 embeddings",
    "metrics 0 pseudo-labels labels",
    // The control shares everything before its first refinement.
    "prototype-refinement 1 network pseudo-labels",
];

const REST_OF_CONTROL: [&str; 3] = [
    "embed 1 network",
    "clustering 1 embeddings previous",
    "metrics 1 pseudo-labels labels previous",
];

#[test]
fn every_step_runs_once_in_order_and_the_control_only_where_it_differs() {
    let bench = bench();
    let output = bench.reproduce(&["--json"]);
    assert_status(&output, 0);
    assert_eq!(bench.started(), [&FIRST[..], &REST_OF_CONTROL].concat());

    let stdout = text(&output.stdout);
    let json: Value = serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON");
    assert_eq!(json["seeds"], json!([0]));
    assert_eq!(json["scores"]["acc"]["mean"], json!(0.9));
    assert_eq!(json["baselines"]["kmeans-pixels"]["acc"]["mean"], json!(0.6));
    assert_eq!(json["control"]["rounds"][0]["round"], json!(1));
    assert!(stdout.contains("control, round 1") && stdout.contains("90.0"), "{stdout}");

    for view in ["0-pretraining", "1-clustering", "pixels/0-embed", "control/1-embed"] {
        assert!(bench.path("runs/example/0").join(view).join("done.json").exists(), "{view}");
    }
    assert!(stdout.contains("runs/example/0/1-clustering/pseudo-labels.safetensors"), "{stdout}");

    assert_status(&bench.reproduce(&[]), 0);
    assert!(bench.started().is_empty(), "everything is done");
}

#[test]
fn programs_can_follow_the_steps_of_a_run() {
    let bench = bench();
    let events = |arguments: &[&str]| -> Vec<Value> {
        let output = bench.reproduce(arguments);
        assert_status(&output, 0);
        let stderr = text(&output.stderr);
        let lines = stderr.lines().filter(|line| line.starts_with('{'));
        lines.map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let first = events(&["--json"]);
    let of_first = |state| {
        json!({
            "event": "step", "name": "0-pretraining", "seed": 0, "number": 1, "of": 19, "state": state,
        })
    };
    assert_eq!(first[..2], [of_first("starts"), of_first("done")]);
    let numbers: Vec<_> = first.iter().filter(|event| event["state"] != "starts").collect();
    assert_eq!(numbers.len(), 19, "each step ends once: {first:?}");
    let again = events(&["--json"]);
    assert!(again.iter().all(|event| event["state"] == "done already"), "{again:?}");
    assert_eq!(again.len(), 19);
    assert!(events(&[]).is_empty());
}

#[test]
fn a_changed_value_runs_again_what_depends_on_it_and_nothing_else() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    bench.started();
    assert_status(&bench.reproduce(&["--set", "prototype-refinement.noise=0.5"]), 0);
    let expected = [&FIRST[12..], &REST_OF_CONTROL].concat();
    assert_eq!(bench.started(), expected, "the control had noise 0 before and has it now");

    assert_status(&bench.reproduce(&["--set", "pretraining.epochs=3"]), 0);
    let started = bench.started();
    assert_eq!(started.len(), 12, "all but the data and the baseline: {started:?}");

    let mut raised = bench.command(&["reproduce", "example.toml"]);
    assert_status(&raised.env("FAKE_ALGORITHM", "2").output().expect("started"), 0);
    assert_eq!(bench.started().len(), 16, "all of it, by programs with another algorithm");
}

#[test]
fn seeds_share_the_data_and_the_table_has_their_mean() {
    let bench = bench();
    let output = bench.reproduce(&["--seeds", "3", "--json"]);
    assert_status(&output, 0);
    assert_eq!(bench.started().len(), 1 + 3 * 15);
    let stdout = text(&output.stdout);
    let json: Value = serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON");
    assert_eq!(json["scores"]["acc"]["values"], json!([0.9, 0.91, 0.92]));
    assert!(stdout.contains("91.0 ± 1.0"), "{stdout}");

    assert_status(&bench.reproduce(&["--seed", "1"]), 0);
    assert!(bench.started().is_empty());
    let corrections = bench.path("runs/example/1/corrections.toml");
    fs::write(&corrections, "by hand").expect("written");
    assert_status(&bench.reproduce(&["--seed", "1", "--fresh"]), 0);
    assert_eq!(bench.started().len(), 15, "the steps of this seed, not the data");
    assert_eq!(fs::read(&corrections).expect("there"), b"by hand");
    assert_status(&bench.reproduce(&["--seed", "0"]), 0);
    assert!(bench.started().is_empty(), "another seed is not forgotten");
}

#[test]
fn jobs_run_at_once_and_give_what_one_at_a_time_gives() {
    let (one, three) = (bench(), bench());
    let scores = |output: &Output| {
        assert_status(output, 0);
        let stdout = text(&output.stdout);
        let line = stdout.lines().last().expect("a line");
        let mut json: Value = serde_json::from_str(line).expect("JSON");
        json.as_object_mut().expect("an object").retain(|key, _| !key.contains("seconds"));
        json
    };
    let words = ["reproduce", "example.toml", "--seeds", "3", "--json"];
    let expected = scores(&one.run(&words));
    let mut command = three.command(&words);
    command.args(["--jobs", "3"]).env("FAKE_MEET", "pretraining 3").env_remove("RAYON_NUM_THREADS");
    assert_eq!(scores(&command.output().expect("started")), expected);

    let (mut by_one, mut by_three) = (one.started(), three.started());
    by_one.sort();
    by_three.sort();
    assert_eq!(by_three, by_one);

    // Each has its part of the processors, and its own name in front of its progress.
    let cores = std::thread::available_parallelism().expect("known").get();
    let met = fs::read_to_string(three.path("log.met")).expect("there");
    let mut met: Vec<&str> = met.lines().collect();
    met.sort();
    let threads = (cores / 3).max(1);
    let expected = [0, 1, 2].map(|seed| format!("{seed} {threads} 0-pretraining, seed {seed}"));
    assert_eq!(met, expected);
}

#[test]
fn every_job_that_fails_is_named() {
    let bench = bench();
    let mut command = bench.command(&["reproduce", "example.toml", "--seeds", "2", "--jobs", "2"]);
    command.env("FAKE_MEET", "pretraining 2").env("FAKE_FAIL", "pretraining 2");
    let output = command.output().expect("started");
    assert_status(&output, 2);
    let stderr = text(&output.stderr);
    for seed in [0, 1] {
        let message = format!("0-pretraining, seed {seed}: a message of its own");
        assert_eq!(stderr.matches(&message).count(), 1, "{stderr}");
    }
}

#[test]
fn a_failure_starts_nothing_more_and_other_jobs_end() {
    let bench = bench();
    let words = ["reproduce", "example.toml", "--seeds", "2", "--jobs", "2"];
    let mut command = bench.command(&words);
    command.env("FAKE_MEET", "pretraining 2").env("FAKE_FAIL", "pretraining/1 4");
    let output = command.output().expect("started");
    assert_status(&output, 4);
    let stderr = text(&output.stderr);
    let last = stderr.lines().last().expect("a line");
    let named = "0-pretraining, seed 1 diverged or collapsed: a message of its own";
    assert!(last.contains(named), "{stderr}");
    assert_eq!(stderr.matches("a message of its own").count(), 1, "{stderr}");
    assert!(bench.path("runs/example/0/0-pretraining/done.json").exists(), "it had started");
    assert!(!bench.path("runs/example/1/0-embed").exists());
    bench.started();
    assert_status(&bench.run(&words), 0);
    assert!(bench.started().contains(&"pretraining 0 again".to_owned()));
}

#[test]
fn a_helper_that_fails_leaves_one_message() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    for (helper, words) in [
        ("report", &["report", "example"][..]),
        ("view", &["view", "example"]),
        ("export", &["export", "example", "--format", "npy"]),
        ("clusters", &["clusters", "example"]),
        ("prepare", &["prepare", "hf://models/owner/name"]),
    ] {
        let mut command = bench.command(words);
        let output = command.env("FAKE_FAIL", format!("{helper} 2")).output().expect("started");
        assert_status(&output, 2);
        assert_eq!(text(&output.stderr), "assort: a message of its own\n", "{words:?}");
    }
}

#[test]
fn commands_say_which_step_they_show_where_a_later_one_is_missing() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    let last = fs::canonicalize(bench.path("runs/example/0/1-embed")).expect("a link");
    fs::remove_file(last.join("done.json")).expect("removed");
    for (words, shown) in [
        (&["report", "example"][..], "1-clustering"),
        (&["view", "example"], "1-clustering"),
        (&["export", "example", "--format", "npy"], "0-embed without clusters"),
        (&["clusters", "example"], "0-embed"),
    ] {
        let output = bench.run(words);
        assert_status(&output, 0);
        let stderr = text(&output.stderr);
        assert!(stderr.contains("1-embed is missing") && stderr.contains(shown), "{stderr}");
    }
}

#[test]
fn a_run_whose_plan_cannot_be_written_starts_nothing() {
    let bench = bench();
    assert_status(&bench.run(&["prepare", "example.toml"]), 0);
    fs::create_dir_all(bench.path("runs/example")).expect("created");
    fs::write(bench.path("runs/example/0"), "in the way").expect("written");
    bench.started();
    let output = bench.reproduce(&["--seeds", "2", "--jobs", "2"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("runs/example/0"), "{}", text(&output.stderr));
    assert!(bench.started().is_empty());
}

#[test]
fn an_interrupt_reaches_all_jobs() {
    let bench = bench();
    let mut command = bench.command(&["reproduce", "example.toml", "--seeds", "2", "--jobs", "2"]);
    let child = command.env("FAKE_WAIT", "pretraining").process_group(0).spawn().expect("started");
    let waiting = || fs::read_to_string(bench.path("log.waiting")).unwrap_or_default();
    until("two programs wait", || waiting().lines().count() == 2);
    send("-TERM", &child.id().to_string());
    let output = child.wait_with_output().expect("ended");
    assert_status(&output, 3);
    let saved = bench.started().iter().filter(|line| *line == "pretraining saves").count();
    assert_eq!(saved, 2);
}

#[test]
fn a_wrong_table_is_found_before_the_first_step() {
    let bench = bench();
    let mut command = bench.command(&["reproduce", "example.toml"]);
    let output = command.env("FAKE_CHECK", "prototype-refinement").output().expect("started");
    assert_status(&output, 2);
    assert_eq!(bench.started(), ["prepare "]);
    let stderr = text(&output.stderr);
    for part in ["prototype-refinement: unknown field", "nothing was started", "example.toml"] {
        assert!(stderr.contains(part), "{part} is not in: {stderr}");
    }

    let output = bench.reproduce(&["--set", "clustering.head=3"]);
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("its keys are heads, kmeans-metric, neighbours"));
    assert!(bench.started().is_empty());
}

#[test]
fn a_program_that_fails_decides_the_status_and_goes_on_in_its_folder() {
    let bench = bench();
    for (failure, status, message) in [
        ("embed 3", 3, "the same command resumes"),
        ("embed 4", 4, "diverged or collapsed"),
        ("embed 2", 2, "0-embed, seed 0 failed with exit status 2"),
        ("embed 5", 5, "because of the machine"),
        ("embed 101", 2, "exit status 101"),
    ] {
        let mut command = bench.command(&["reproduce", "example.toml"]);
        let output = command.env("FAKE_FAIL", failure).output().expect("started");
        assert_status(&output, status);
        let stderr = text(&output.stderr);
        assert!(stderr.contains(message), "{message} is not in: {stderr}");
        assert!(stderr.contains("embed: a message of its own"), "{stderr}");
        assert!(output.stdout.is_empty(), "no result, so nothing on stdout");
    }
    bench.started();
    assert_status(&bench.reproduce(&[]), 0);
    assert_eq!(bench.started()[0], "embed 0 network again");
}

#[test]
fn an_interrupt_lets_the_program_save_and_the_same_command_goes_on() {
    let bench = bench();
    let mut command = bench.command(&["reproduce", "example.toml"]);
    // A group of its own, so that the signal reaches it as Ctrl-C on a terminal would.
    let child = command.env("FAKE_WAIT", "clustering").process_group(0).spawn().expect("started");
    bench.waiting();
    send("-INT", &format!("-{}", child.id()));
    let output = child.wait_with_output().expect("ended");
    assert_eq!(output.status.code(), Some(3));
    let started = bench.started();
    assert_eq!(started.last().expect("a line"), "clustering saves");
    assert_eq!(started.len(), 5, "nothing was started after it: {started:?}");

    assert_status(&bench.reproduce(&[]), 0);
    assert_eq!(bench.started()[0], "clustering 0 embeddings again");
}

#[test]
fn a_dry_run_starts_nothing() {
    let bench = bench();
    let output = bench.reproduce(&["--dry-run"]);
    assert_status(&output, 0);
    assert!(text(&output.stdout).contains("1-prototype-refinement"));
    assert!(bench.started().is_empty() && !bench.path("runs/.store").exists());

    assert_status(
        &bench.command(&["stage", "pretraining", "example.toml"]).output().expect("started"),
        0,
    );
    bench.started();
    let output = bench.reproduce(&["--dry-run", "--fresh"]);
    assert_status(&output, 0);
    let stdout = text(&output.stdout);
    assert!(stdout.contains("0-pretraining, seed 0: runs again"), "{stdout}");
    assert!(
        stdout.contains("0-embed, seed 0: runs") && stdout.contains("--in network="),
        "{stdout}"
    );
    assert!(bench.started().is_empty());
    assert!(bench.path("runs/example/0/0-pretraining/done.json").exists());
}

#[test]
fn a_stage_runs_alone_on_what_the_run_has_found() {
    let bench = bench();
    let stage = |words: &[&str]| {
        let (place, rest) = words.split_first().expect("a place");
        let words: Vec<_> = ["stage", place, "example.toml"].iter().chain(rest).copied().collect();
        bench.command(&words).output().expect("started")
    };
    let output = stage(&["embed"]);
    assert_status(&output, 2);
    let stderr = text(&output.stderr);
    assert!(
        stderr.contains("assort stage pretraining") && stderr.contains("--round 0"),
        "{stderr}"
    );

    assert_status(&stage(&["prepare"]), 0);
    assert_eq!(bench.started(), ["prepare "], "once, though two commands asked for it");
    assert_status(&stage(&["pretraining"]), 0);
    let output = stage(&["embed"]);
    assert_status(&output, 0);
    assert_eq!(bench.started(), ["pretraining 0", "embed 0 network"]);
    assert_eq!(text(&output.stdout).trim(), "runs/example/0/0-embed");

    let output = stage(&["embed", "--round", "1"]);
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("1-prototype-refinement"));
    let output = stage(&["embedding"]);
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("1-clustering"), "the steps are named");
}

#[test]
fn a_foreign_executable_takes_a_place() {
    let bench = bench();
    let foreign = bench.path("foreign");
    let set = format!("stages.clustering={}", foreign.display());
    assert_status(&bench.reproduce(&["--set", &set]), 0);
    let started = bench.started();
    assert!(started.contains(&"foreign 1 embeddings previous".to_owned()), "{started:?}");
    assert!(started.contains(&"clustering 0 embeddings".to_owned()), "the baseline: {started:?}");
    assert_status(&bench.reproduce(&["--set", &set]), 0);
    assert!(bench.started().is_empty(), "exit status 0 marks its folder as finished");

    let output = bench.reproduce(&["--set", "stages.clustering=./none"]);
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("`./none` of `[stages]` is missing"));
}

/// Puts a system of one phase in the place of the example.
fn one_phase(bench: &Fake, first: &str) {
    let text = fs::read_to_string(sources().join("example.toml")).expect("there");
    let tables = text.parse::<toml::Table>().expect("TOML");
    let mut tables: toml::Table =
        tables.into_iter().filter(|(name, _)| name != "embed" && name != "clustering").collect();
    let changes = format!(
        "system = 'ProPos'\n[rounds]\nrounds = 0\nfirst = {first}\nthen = []\n\
         [stages]\npretraining = 'pretraining'\npropos = 'propos'\nmetrics = 'metrics'\n\
         [control]\n'propos.noise' = 0.0\n[propos]\nnoise = 1.0\n"
    );
    tables.extend(changes.parse::<toml::Table>().expect("TOML"));
    fs::write(bench.path("example.toml"), tables.to_string()).expect("written");
}

#[test]
fn a_system_of_one_phase_runs_is_scored_and_goes_on() {
    let bench = bench();
    one_phase(&bench, "['propos']");
    let mut command = bench.command(&["reproduce", "example.toml"]);
    let output = command.env("FAKE_FAIL", "propos 3").output().expect("started");
    assert_status(&output, 3);
    assert_eq!(bench.started(), ["prepare ", "propos 0"]);
    let output = bench.reproduce(&["--json"]);
    assert_status(&output, 0);
    let scored = ["metrics 0 pseudo-labels labels"; 2];
    assert_eq!(bench.started(), ["propos 0 again", scored[0], "propos 0", scored[1]]);

    let stdout = text(&output.stdout);
    let json: Value = serde_json::from_str(stdout.lines().last().expect("a line")).expect("JSON");
    assert_eq!(json["system"], json!("ProPos"));
    assert_eq!(json["scores"]["acc"]["mean"], json!(0.9));
    assert_eq!(json["control"]["rounds"][0]["round"], json!(0));
    assert!(stdout.contains("control, round 0") && !stdout.contains("pretrained"), "{stdout}");
    assert!(stdout.contains("runs/example/0/0-propos/pseudo-labels.safetensors"), "{stdout}");

    assert_status(&bench.reproduce(&["--set", "propos.noise=0.0"]), 0);
    assert!(bench.started().is_empty(), "that is the control, which has run");
    let alone = bench.command(&["stage", "propos", "example.toml"]).output().expect("started");
    assert_status(&alone, 0);

    one_phase(&bench, "['pretraining', 'propos']");
    assert_status(&bench.reproduce(&[]), 0);
    let started = bench.started();
    assert_eq!(started[..3], ["pretraining 0", "propos 0 backbone", scored[0]]);
    assert_eq!(started[3..], ["propos 0 backbone", scored[1]], "one backbone serves both");
}

#[test]
fn other_pictures_are_prepared_and_everything_depends_on_them() {
    let bench = bench();
    assert_status(&bench.reproduce(&[]), 0);
    bench.started();
    fs::create_dir(bench.path("photos")).expect("created");
    fs::write(bench.path("photos/a.png"), "1").expect("written");
    assert_status(&bench.reproduce(&["--images", "photos"]), 0);
    // The fake writes the same file for any source, so that the steps are shared.
    assert_eq!(bench.started(), ["prepare "]);
    fs::write(bench.path("photos/b.png"), "2").expect("written");
    assert_status(&bench.reproduce(&["--images", "photos"]), 0);
    assert_eq!(bench.started(), ["prepare "], "a changed folder is prepared again");
}

#[test]
fn pictures_are_prepared_alone_and_shared_with_the_experiment() {
    let bench = bench();
    let prepare = |words: &[&str]| {
        let words: Vec<_> = ["prepare"].iter().chain(words).copied().collect();
        bench.command(&words).output().expect("started")
    };
    let output = prepare(&["example.toml"]);
    assert_status(&output, 0);
    assert_eq!(bench.started(), ["prepare "]);
    let folder = text(&output.stdout).trim().to_owned();
    assert!(bench.path(&folder).join("done.json").exists(), "{folder}");
    assert_status(&prepare(&["example.toml"]), 0);
    assert_status(&bench.reproduce(&[]), 0);
    assert!(!bench.started().contains(&"prepare ".to_owned()), "they are there");
    assert_status(&prepare(&["example.toml", "--fresh"]), 0);
    assert_eq!(bench.started(), ["prepare "]);

    fs::create_dir(bench.path("photos")).expect("created");
    for what in ["photos", "./photos", "hf://datasets/owner/name@v1"] {
        let output = prepare(&[what]);
        assert_status(&output, 0);
        assert!(bench.path(text(&output.stdout).trim()).join("done.json").exists(), "{what}");
    }
    assert_eq!(bench.started().len(), 2, "the folder is one, however it is named");
    let output = prepare(&["photo"]);
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("`photo` is neither"), "{}", text(&output.stderr));
    let mut command = bench.command(&["prepare", "example.toml", "--fresh"]);
    let output = command.env("FAKE_FAIL", "prepare 3").output().expect("started");
    assert_status(&output, 3);
    bench.started();
    assert_status(&prepare(&["example.toml"]), 0);
    assert_eq!(bench.started(), ["prepare  again"], "it goes on in its folder");
}

#[test]
fn an_experiment_is_shown_as_it_would_run() {
    let bench = bench();
    let words = ["show", "example.toml", "--set", "pretraining.epochs=7"];
    let output = bench.command(&words).output().expect("started");
    assert_status(&output, 0);
    assert!(text(&output.stdout).contains("[pretraining]\nepochs = 7\n"));
    let output = bench.command(&["show", "nowhere"]).output().expect("started");
    assert_status(&output, 2);
    assert!(text(&output.stderr).contains("assort list"), "{}", text(&output.stderr));
}
