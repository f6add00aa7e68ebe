//! Kills at random moments: the whole group, the command alone, a step alone.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use rand::RngExt;

use super::{COMMANDS, PATIENCE, Trial, Until};

/// What a signal is sent to.
const TARGETS: [&str; 3] = ["group", "command", "step"];

/// Kills until the end, and compares after every few kills.
///
/// # Errors
///
/// The trial itself cannot go on.
pub fn run(trial: &mut Trial, until: Until) -> Result<()> {
    let mut rounds = 0;
    while until.goes_on(rounds) {
        rounds += 1;
        trial.remove_results()?;
        for _ in 0..trial.random.random_range(1..=4) {
            kill_once(trial)?;
        }
        trial.settle("kills", 1)?;
    }
    Ok(())
}

fn kill_once(trial: &mut Trial) -> Result<()> {
    let place = match trial.random.random_range(0..10) {
        0..6 => 0,
        6..8 => 1,
        _ => 2,
    };
    let mut command = trial.command(COMMANDS[place]);
    command.process_group(0).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let seconds = trial.random.random::<f64>() * 1.1 * trial.seconds[place];
    thread::sleep(Duration::from_secs_f64(seconds));
    let target = TARGETS[trial.random.random_range(0..TARGETS.len())];
    let signal = ["-KILL", "-KILL", "-TERM", "-INT"][trial.random.random_range(0..4)];
    let process = match target {
        "group" => format!("-{}", child.id()),
        "command" => child.id().to_string(),
        _ => match children(child.id()).first() {
            Some(step) => step.to_string(),
            None => child.id().to_string(),
        },
    };
    if child.try_wait()?.is_none() {
        let mut kill = Command::new("kill");
        if kill.args([signal, "--", &process]).stderr(Stdio::null()).status()?.success() {
            *trial.counts.kills.entry(target).or_default() += 1;
        }
    }
    let ends_soon = target != "step" || signal != "-KILL";
    if !has_ended(&mut child, ends_soon)? {
        println!("hang: {:?} goes on after {signal} to the {target}", COMMANDS[place]);
        trial.counts.hangs += 1;
        Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).status()?;
        child.wait()?;
    }
    Ok(())
}

/// Waits for the end of the command and of all that it started.
///
/// - `soon`: whether it was asked to stop.
fn has_ended(child: &mut Child, soon: bool) -> Result<bool> {
    let patience = if soon { PATIENCE } else { 6 * PATIENCE };
    let begin = Instant::now();
    while begin.elapsed() < patience {
        let group = format!("-{}", child.id());
        let is_ended = child.try_wait()?.is_some();
        let alive =
            Command::new("kill").args(["-0", "--", &group]).stderr(Stdio::null()).status()?;
        if is_ended && !alive.success() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(false)
}

/// The processes that a process started; none where the system does not say.
fn children(process: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    list.unwrap_or_default().split_whitespace().filter_map(|id| id.parse().ok()).collect()
}
