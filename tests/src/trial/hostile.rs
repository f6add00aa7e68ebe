//! Damaged and missing files, full disks, and commands at once.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::RngExt;

use super::{COMMANDS, Trial, Until, tail, text};

/// Disturbs until the end, one kind after the other.
///
/// # Errors
///
/// The trial itself cannot go on.
pub fn run(trial: &mut Trial, until: Until) -> Result<()> {
    let mut rounds = 0;
    while until.goes_on(rounds) {
        match rounds % 4 {
            0 | 1 => damage(trial)?,
            2 => full_disk(trial)?,
            _ => at_once(trial)?,
        }
        rounds += 1;
    }
    Ok(())
}

/// Damages some files of a finished run. Whatever a command then shows must be right, or the command
/// fails and says what to do; at the end everything is as it was.
fn damage(trial: &mut Trial) -> Result<()> {
    let mut files = files(trial)?;
    files.sort();
    for _ in 0..trial.random.random_range(1..=4) {
        let path = &files[trial.random.random_range(0..files.len())];
        let Ok(mut bytes) = fs::read(path) else { continue };
        let kind = match trial.random.random_range(0..10) {
            0..7 if !bytes.is_empty() => {
                let at = trial.random.random_range(0..bytes.len());
                bytes[at] ^= 1 << trial.random.random_range(0..8);
                fs::write(path, bytes)?;
                "flips"
            }
            0..8 if !bytes.is_empty() => {
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
    }
    // The results that a damaged one leads to are computed again, so that it is read.
    trial.remove_results()?;
    let predictions = trial.runs().join("tiny/0/predictions");
    if predictions.exists() {
        fs::remove_dir_all(predictions)?;
    }
    for entry in fs::read_dir(trial.runs()).into_iter().flatten().flatten() {
        if entry.file_name() == ".store" {
            remove_predictions(&entry.path())?;
        }
    }
    trial.settle("damaged files", 4)
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

fn remove_predictions(store: &std::path::Path) -> Result<()> {
    for entry in fs::read_dir(store)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("predictions-") && path.is_dir() {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

/// A command that may write no file beyond a limit, as on a full disk: by the signal that ends it, or
/// by the error where the signal is ignored.
fn full_disk(trial: &mut Trial) -> Result<()> {
    trial.remove_results()?;
    for _ in 0..trial.random.random_range(1..=4) {
        let words = COMMANDS[trial.random.random_range(0..COMMANDS.len())];
        let blocks = 1 << trial.random.random_range(0..9);
        let trap = if trial.random.random_bool(0.7) { "trap '' XFSZ; " } else { "" };
        let script = format!("{trap}ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let plain = trial.command(words);
        let mut limited = Command::new("sh");
        limited.arg("-c").arg(script).arg(plain.get_program()).args(plain.get_args());
        let output = limited.stdin(Stdio::null()).output()?;
        trial.note_panic("a full disk", &output);
        trial.counts.full_disks += usize::from(!output.status.success());
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

/// Two or three commands on one run at once. They succeed, or say that another one is in the way.
fn at_once(trial: &mut Trial) -> Result<()> {
    if trial.random.random_bool(0.5) {
        trial.remove_results()?;
    }
    let mut children = Vec::new();
    for _ in 0..trial.random.random_range(2..=3) {
        let words = AT_ONCE[trial.random.random_range(0..AT_ONCE.len())];
        let mut command = trial.command(words);
        command.process_group(0).stdout(Stdio::null()).stderr(Stdio::piped());
        children.push((words, command.spawn()?));
        thread::sleep(Duration::from_secs_f64(0.3 * trial.random.random::<f64>()));
    }
    for (words, child) in children {
        let process = child.id();
        let waiting = thread::spawn(move || child.wait_with_output());
        let begin = Instant::now();
        while !waiting.is_finished() && begin.elapsed() < Duration::from_secs(180) {
            thread::sleep(Duration::from_millis(20));
        }
        if !waiting.is_finished() {
            println!("hang: {words:?} beside other commands");
            trial.counts.hangs += 1;
            Command::new("kill").args(["-KILL", "--", &format!("-{process}")]).status()?;
        }
        if let Ok(output) = waiting.join() {
            let output = output?;
            trial.note_panic("commands at once", &output);
            let stderr = text(&output.stderr);
            let says_why = ["run the same command again", "is not finished", "has no clusters yet"];
            let says_why =
                says_why.iter().chain(&["there is no run", "is not the folder of a run"]);
            let is_told = says_why.into_iter().any(|words| stderr.contains(words));
            if !output.status.success() && !is_told {
                let needs = stderr.contains("which is not finished");
                trial.counts.lost += usize::from(!needs);
                println!("at once: {words:?} {}: {}", output.status, tail(&stderr));
            }
        }
    }
    trial.counts.rounds_at_once += 1;
    trial.settle("commands at once", 1)
}
