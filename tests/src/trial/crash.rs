//! Kills at random moments: the whole group, the command alone, a step alone.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::RngExt;

use super::running::signal;
use super::{COMMANDS, PATIENCE, Trial, Until};

/// What a signal is sent to.
const TARGETS: [&str; 3] = ["group", "command", "step"];

/// Kills until the end, and compares after every few kills of one command.
///
/// # Errors
///
/// The trial itself cannot go on.
pub fn run(trial: &mut Trial, until: Until) -> Result<()> {
    let mut rounds = 0;
    while until.goes_on(rounds) {
        rounds += 1;
        let place = [0, 0, 0, 0, 0, 1, 2, 2][trial.random.random_range(0..8)];
        let is_fresh = place == 0 && trial.random.random_bool(0.2);
        for _ in 0..trial.random.random_range(1..=4) {
            let is_done = trial.expected_seconds(place) <= trial.idle[place];
            if is_done && !is_fresh {
                trial.remove_results(place)?;
            }
            kill_once(trial, place, is_fresh)?;
        }
        trial.settle(if is_fresh { "kills of --fresh" } else { "kills" }, 1)?;
    }
    Ok(())
}

/// Starts a command and sends a signal at a moment before its probable end.
fn kill_once(trial: &mut Trial, place: usize, is_fresh: bool) -> Result<()> {
    let mut command = trial.command(COMMANDS[place]);
    let mut seconds = trial.expected_seconds(place);
    if is_fresh {
        command.arg("--fresh");
        seconds = trial.idle[place] + trial.work[place].values().sum::<f64>();
    }
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    thread::sleep(Duration::from_secs_f64(0.95 * seconds * trial.random.random::<f64>()));
    let target = TARGETS[trial.random.random_range(0..TARGETS.len())];
    let name = ["-KILL", "-KILL", "-TERM", "-INT"][trial.random.random_range(0..4)];
    let process = match target {
        "group" => format!("-{}", child.id()),
        "command" => child.id().to_string(),
        _ => children(child.id()).first().map_or(child.id(), |step| *step).to_string(),
    };
    if child.try_wait()?.is_none() && signal(name, &process)? {
        *trial.counts.kills.entry(target).or_default() += 1;
    } else {
        trial.counts.too_late += 1;
    }
    // A command that lost a step may have others to end.
    let patience = if target == "step" { 6 * PATIENCE } else { PATIENCE };
    if !has_ended(&mut child, patience)? {
        println!("hang: {:?} is still at work after {name} to the {target}", COMMANDS[place]);
        trial.counts.hangs += 1;
        signal("-KILL", &format!("-{}", child.id()))?;
        child.wait()?;
    }
    Ok(())
}

/// Waits for the end of the command and of all that it started.
fn has_ended(child: &mut Child, patience: Duration) -> Result<bool> {
    let begin = Instant::now();
    while begin.elapsed() < patience {
        let is_ended = child.try_wait()?.is_some();
        if is_ended && !signal("-0", &format!("-{}", child.id()))? {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(false)
}

/// The processes that a process started; none where the system does not say.
fn children(process: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    list.unwrap_or_default().split_whitespace().filter_map(|id| id.parse().ok()).collect()
}
