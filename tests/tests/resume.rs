//! Killed at any moment and started again, a run ends with the same bytes.
#![cfg(unix)]

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tests::Bench;
use tests::bench::systems;

/// Kills spread over whole runs.
const ANYWHERE: usize = 15;
/// Kills while a file is being written.
const INSIDE_A_SAVE: usize = 5;

fn assert_same(bench: &Bench, reference: &Bench) {
    let (results, wanted) = (bench.results(0), reference.results(0));
    for (name, bytes) in &wanted {
        assert!(results.get(name) == Some(bytes), "{name} differs");
    }
    let left = unfinished(&bench.path("runs/.store"));
    assert!(left.is_empty(), "half-written files are left: {left:?}");
}

#[test]
fn killed_at_twenty_moments_a_run_ends_with_the_same_bytes() {
    for system in systems() {
        let reference = Bench::of(&system);
        let begin = Instant::now();
        reference.reproduce(&[]).expect("runs through");
        let whole = begin.elapsed();

        kill_anywhere(&system, &reference, whole);
        kill_inside_saves(&system, &reference);
    }
}

#[test]
fn interrupted_by_the_user_a_run_goes_on_where_it_was() {
    for system in systems() {
        let reference = Bench::of(&system);
        reference.reproduce(&[]).expect("runs through");
        // On a busy machine the first stage may be over before the signal comes.
        let bench = (0..50).find_map(|_| interrupted_in_first_stage(&system));
        let bench = bench.unwrap_or_else(|| panic!("{system} always ended before the signal"));

        bench.reproduce(&[]).expect("goes on");
        assert_same(&bench, &reference);
        let epochs = |bench: &Bench| {
            let log = first_step(bench).join("log.jsonl");
            fs::read_to_string(log).expect("there").lines().count()
        };
        assert!(epochs(&bench) < 2 * epochs(&reference), "{system} began anew");
    }
}

/// Interrupts a run when its first stage has logged two epochs. None where the signal came after
/// that stage had ended.
fn interrupted_in_first_stage(system: &str) -> Option<Bench> {
    let bench = Bench::of(system);
    let mut run = start_group(&mut bench.assort(&["reproduce"]));
    let log = first_step(&bench).join("log.jsonl");
    while fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < 2 {
        if run.try_wait().expect("waited").is_some() {
            return None;
        }
        thread::sleep(Duration::from_millis(1));
    }
    signal("-INT", &run);
    let status = run.wait().expect("ended");
    if first_step(&bench).join("network.safetensors").exists() {
        return None;
    }
    assert_eq!(status.code(), Some(3), "the status of a run that can go on");
    Some(bench)
}

/// The folder of the first stage of a run.
fn first_step(bench: &Bench) -> PathBuf {
    bench.step(&format!("0-{}", bench.first()))
}

/// Kills whole runs, `assort` and the step at work, after drawn times.
fn kill_anywhere(system: &str, reference: &Bench, whole: Duration) {
    let mut kills = 0;
    let mut draw = 0.5;
    while kills < ANYWHERE {
        let bench = Bench::of(system);
        loop {
            // Multiples of the golden ratio are spread evenly, however many are drawn.
            draw = (draw + 0.618_033_988_749_895) % 1.;
            let mut run = start_group(&mut bench.assort(&["reproduce"]));
            if kills < ANYWHERE && !ended_within(&mut run, whole.mul_f64(0.05 + 0.6 * draw)) {
                kill_group(&mut run);
                kills += 1;
                continue;
            }
            let status = run.wait().expect("ended");
            assert!(status.success(), "{system}: {status} after {kills} kills");
            break;
        }
        assert_same(&bench, reference);
    }
}

/// Kills the first stage, which trains, whenever a file of its is seen half-written.
fn kill_inside_saves(system: &str, reference: &Bench) {
    let mut kills = 0;
    let mut benches = 0;
    while kills < INSIDE_A_SAVE {
        benches += 1;
        assert!(benches <= 50, "{system}: a save was hit only {kills} times");
        let bench = Bench::of(system);
        let (mut command, out) = first_stage(&bench);
        loop {
            let before = unfinished(&out);
            let mut run = start_group(&mut command);
            if kills < INSIDE_A_SAVE && saw_unfinished(&mut run, &out, &before) {
                run.kill().expect("killed");
                run.wait().expect("ended");
                // Only what is left behind proves that the kill came before the rename.
                kills += usize::from(unfinished(&out).iter().any(|file| !before.contains(file)));
                continue;
            }
            let status = run.wait().expect("ended");
            assert!(status.success(), "{system}: {status} after {kills} kills inside a save");
            break;
        }
        bench.reproduce(&[]).expect("goes on");
        assert_same(&bench, reference);
    }
}

/// The command by which `assort` would start the first stage, and the folder it writes into.
fn first_stage(bench: &Bench) -> (Command, PathBuf) {
    // The data must be prepared for the step to have a place in the store.
    let prepare = bench.assort(&["stage", "prepare"]).output();
    assert!(prepare.expect("started").status.success());
    let dry = bench.assort(&["stage", &bench.first(), "--dry-run"]).output().expect("started");
    let text = String::from_utf8(dry.stdout).expect("UTF-8");
    let line = text.lines().find(|line| line.contains("--out")).expect("a command");
    let words: Vec<&str> = line.split_whitespace().collect();
    let out = words.iter().position(|word| *word == "--out").expect("the flag") + 1;
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    (command, PathBuf::from(words[out]))
}

fn start_group(command: &mut Command) -> Child {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.process_group(0).spawn().expect("started")
}

fn kill_group(child: &mut Child) {
    signal("-KILL", child);
    child.wait().expect("ended");
}

/// Sends a signal to the child and all that it started, as a terminal does.
fn signal(signal: &str, child: &Child) {
    let group = format!("-{}", child.id());
    let sent = Command::new("kill").args([signal, "--", &group]).status().expect("sent");
    assert!(sent.success());
}

fn ended_within(child: &mut Child, time: Duration) -> bool {
    let begin = Instant::now();
    while begin.elapsed() < time {
        if child.try_wait().expect("waited").is_some() {
            return true;
        }
        thread::sleep(Duration::from_millis(2));
    }
    false
}

/// Waits until a half-written file appears in `folder` that was not there before; false when the
/// program ended first.
fn saw_unfinished(child: &mut Child, folder: &Path, before: &[PathBuf]) -> bool {
    loop {
        if unfinished(folder).iter().any(|file| !before.contains(file)) {
            return true;
        }
        if child.try_wait().expect("waited").is_some() {
            return false;
        }
    }
}

/// Half-written files below a folder.
fn unfinished(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(".unfinished-") {
            found.push(path);
        } else if path.is_dir() {
            found.extend(unfinished(&path));
        }
    }
    found
}
