//! Damaged and missing files, full disks, and commands at once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use rand::RngExt;

use super::running::RunningCommand;
use super::{COMMANDS, Trial, Until, tail, text};

/// Disturbs until the end, one kind after the other.
///
/// # Errors
///
/// The trial itself cannot go on.
pub fn run(trial: &mut Trial, until: Until) -> Result<()> {
    const KINDS: [fn(&mut Trial) -> Result<()>; 7] =
        [damage, at_once, full_disk, damage, at_once, damage, damage];
    let mut rounds = 0;
    while until.goes_on(rounds) {
        KINDS[rounds % KINDS.len()](trial)?;
        rounds += 1;
    }
    Ok(())
}

/// Damages some files of a finished run. Whatever a command then shows must be right, or the command
/// fails and says what to do; at the end everything is as it was.
fn damage(trial: &mut Trial) -> Result<()> {
    let mut files = files(trial)?;
    files.sort();
    let mut damaged = Vec::new();
    for _ in 0..trial.random.random_range(1..=12) {
        let path = &files[trial.random.random_range(0..files.len())];
        let Ok(mut bytes) = fs::read(path) else { continue };
        let kind = match trial.random.random_range(0..20) {
            0..17 if !bytes.is_empty() => {
                let at = trial.random.random_range(0..bytes.len());
                bytes[at] ^= 1 << trial.random.random_range(0..8);
                fs::write(path, bytes)?;
                "flips"
            }
            0..19 if !bytes.is_empty() => {
                bytes.truncate(trial.random.random_range(0..bytes.len()));
                fs::write(path, bytes)?;
                "cuts"
            }
            _ => {
                fs::remove_file(path)?;
                "deletions"
            }
        };
        *trial.counts.damages.entry(kind).or_default() += 1;
        damaged.push(format!("{kind} in {}", path.strip_prefix(trial.runs())?.display()));
    }
    let what = format!("damaged files {damaged:?}");
    if !show_something(trial, &what)? {
        return trial.start_over();
    }
    // The results that a damaged one leads to are computed again, so that it is read.
    for place in [0, 2] {
        if trial.random.random_bool(0.7) {
            trial.remove_results(place)?;
        }
    }
    trial.settle(&what, 8)
}

/// Runs a command beside damaged files: it fails, or what it shows is right. Returns whether it was.
fn show_something(trial: &mut Trial, what: &str) -> Result<bool> {
    let place = trial.random.random_range(0..COMMANDS.len());
    let what = format!("{what}, by {:?}", COMMANDS[place]);
    let Some(output) = trial.output(&what, COMMANDS[place])? else { return Ok(false) };
    let stderr = text(&output.stderr);
    // A result that is damaged is not finished any more; the page says how far the run is.
    if !output.status.success() || stderr.contains("is not finished") {
        return Ok(true);
    }
    match place {
        1 => trial.is_shown(&what, |name| {
            name.starts_with("tiny/0/report/") && !name.ends_with("done.json")
        }),
        2 => trial
            .is_shown(&what, |name| name.contains("/predictions/") && name.contains("/report/")),
        _ => Ok(true),
    }
}

/// All files of the run that a program reads again.
fn files(trial: &Trial) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![trial.runs()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// A command that may write no file beyond a limit, as on a full disk: by the signal that ends it, or
/// by the error where the signal is ignored.
fn full_disk(trial: &mut Trial) -> Result<()> {
    trial.remove_results(0)?;
    for _ in 0..trial.random.random_range(1..=4) {
        let words = COMMANDS[trial.random.random_range(0..COMMANDS.len())];
        let blocks = 1 << trial.random.random_range(0..9);
        let trap = if trial.random.random_bool(0.7) { "trap '' XFSZ; " } else { "" };
        let script = format!("{trap}ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let plain = trial.command(words);
        let mut limited = Command::new("sh");
        limited.arg("-c").arg(script).arg(plain.get_program()).args(plain.get_args());
        let running = RunningCommand::start(&mut limited)?;
        let output = trial.end_of(running, "a full disk", words)?;
        let has_failed = output.is_some_and(|output| !output.status.success());
        trial.counts.full_disks += usize::from(has_failed);
    }
    trial.settle("full disks", 1)
}

const AT_ONCE: [&[&str]; 6] = [
    &["reproduce"],
    &["reproduce", "--fresh"],
    &["report", "--pictures"],
    &["predict"],
    &["stage", "embed"],
    &["stage", "clustering", "--round", "1"],
];

/// What a command says that another one was in the way of.
const IN_THE_WAY: [&str; 5] = [
    "run the same command again",
    "is not finished",
    "has no clusters yet",
    "there is no run",
    "is not the folder of a run",
];

/// Two or three commands on one run at once. They succeed, or say that another one is in the way.
fn at_once(trial: &mut Trial) -> Result<()> {
    if trial.random.random_bool(0.5) {
        trial.remove_results(0)?;
    }
    let mut all = Vec::new();
    for _ in 0..trial.random.random_range(2..=3) {
        let words = AT_ONCE[trial.random.random_range(0..AT_ONCE.len())];
        all.push((words, RunningCommand::start(&mut trial.command(words))?));
        thread::sleep(Duration::from_secs_f64(0.3 * trial.random.random::<f64>()));
    }
    for (words, running) in all {
        let Some(output) = trial.end_of(running, "commands at once", words)? else { continue };
        let stderr = text(&output.stderr);
        let is_told = IN_THE_WAY.iter().any(|words| stderr.contains(words));
        if !output.status.success() && !is_told {
            println!("at once: {words:?} {}: {}", output.status, tail(&stderr));
            trial.counts.lost += 1;
        }
    }
    trial.counts.rounds_at_once += 1;
    trial.settle("commands at once", 1)
}
