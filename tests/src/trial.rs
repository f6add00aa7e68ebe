//! Trials of the whole program: kills, damaged files, full disks, commands at once.
//!
//! A trial runs a tiny experiment undisturbed, with its report and its predictions, and keeps every
//! byte that must be the same. Then it disturbs: after each round the same commands, undisturbed,
//! must lead to the same bytes. [`Counts`] says how often they did not.

pub mod crash;
pub mod hostile;
pub mod mutation;
mod running;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use stage::container::{self, Container};
use stage::finished;

use crate::Bench;
use running::RunningCommand;

/// Files with times, by the end of their names.
const LOGS: [&str; 3] = [".jsonl", "log.sha256", stage::EVENTS];

/// How long a program may go on after it was asked to stop.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was tried, and what went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Signals that ended a program, by what they were sent to.
    pub kills: BTreeMap<&'static str, usize>,
    /// Signals that came after the program's end.
    pub too_late: usize,
    /// Bits that were flipped in files, and files that were cut or deleted.
    pub damages: BTreeMap<&'static str, usize>,
    /// Commands that met a full disk.
    pub full_disks: usize,
    /// Rounds of two or three commands at once.
    pub rounds_at_once: usize,
    /// Inputs that were changed and given to a reader.
    pub mutations: usize,
    /// The same commands, undisturbed, failed afterwards.
    pub lost: usize,
    /// They succeeded, with other bytes.
    pub wrong: usize,
    /// A program went on for more than 10 s after it was asked to stop, took more than two minutes, or
    /// panicked.
    pub hangs: usize,
    /// Temporary files that were left over.
    pub left_over: usize,
    /// Damaged files that no command had to read, found by their digests.
    pub unread: usize,
    /// Pages that reported a damaged log and left its curves out.
    pub damaged_logs: usize,
}

impl Counts {
    /// True if nothing went wrong.
    pub fn is_sound(&self) -> bool {
        self.lost + self.wrong + self.hangs + self.left_over == 0
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |counts: &BTreeMap<&str, usize>| counts.values().sum::<usize>();
        let kills = sum(&self.kills);
        writeln!(f, "{kills} kills {:?}, {} too late", self.kills, self.too_late)?;
        writeln!(f, "{} damaged files {:?}", sum(&self.damages), self.damages)?;
        writeln!(f, "{} full disks, {} rounds at once", self.full_disks, self.rounds_at_once)?;
        writeln!(f, "{} mutations", self.mutations)?;
        writeln!(
            f,
            "{} unread damaged files, {} damaged logs reported",
            self.unread, self.damaged_logs
        )?;
        write!(
            f,
            "{} lost, {} wrong, {} hangs or panics, {} files left",
            self.lost, self.wrong, self.hangs, self.left_over
        )
    }
}

/// When a trial ends.
#[derive(Debug, Clone, Copy)]
pub struct Until {
    began: Instant,
    time: Duration,
    rounds: usize,
}

impl Until {
    /// After this time.
    pub fn minutes(minutes: f64) -> Self {
        let time = Duration::from_secs_f64(60. * minutes);
        Self { began: Instant::now(), time, rounds: usize::MAX }
    }

    /// After so many rounds.
    pub fn rounds(rounds: usize) -> Self {
        Self { began: Instant::now(), time: Duration::MAX, rounds }
    }

    /// True before the end, after so many rounds.
    pub fn goes_on(&self, rounds: usize) -> bool {
        rounds < self.rounds && self.began.elapsed() < self.time
    }
}

/// A tiny experiment, with the results and the duration of an undisturbed run.
#[derive(Debug)]
pub struct Trial {
    bench: Bench,
    assort: PathBuf,
    wanted: BTreeMap<String, Vec<u8>>,
    /// For each command the folders that it makes, and the seconds that each took.
    work: [BTreeMap<PathBuf, f64>; 3],
    /// What each command takes where nothing is left to do.
    idle: [f64; 3],
    random: ChaCha8Rng,
    /// What was tried so far.
    pub counts: Counts,
}

/// The commands of an undisturbed run, in order.
const COMMANDS: [&[&str]; 3] = [&["reproduce"], &["report", "--pictures"], &["predict"]];

impl Trial {
    /// Runs the experiment of PLDC undisturbed.
    ///
    /// - `assort`: the program.
    ///
    /// # Errors
    ///
    /// A command fails.
    pub fn new(assort: &Path, seed: u64) -> Result<Self> {
        let mut trial = Self {
            bench: Bench::new(),
            assort: assort.to_owned(),
            wanted: BTreeMap::new(),
            work: Default::default(),
            idle: [0.; 3],
            random: stage::random::stream(seed, "trial", &[]),
            counts: Counts::default(),
        };
        for place in 0..COMMANDS.len() {
            let before = trial.results()?;
            let seconds = trial.seconds_of(place)?;
            let made = trial.results()?.into_iter().filter(|path| !before.contains(path));
            let made: Vec<PathBuf> = made.collect();
            trial.idle[place] = trial.seconds_of(place)?;
            // What no step has recorded, such as `prepare`, is shared by the folders without a record.
            let known: BTreeMap<PathBuf, f64> =
                made.iter().filter_map(|path| Some((path.clone(), cost_of(path)?))).collect();
            let rest = (seconds - trial.idle[place] - known.values().sum::<f64>()).max(0.);
            let share = rest / (made.len() - known.len()).max(1) as f64;
            let seconds = |path: &PathBuf| known.get(path).copied().unwrap_or(share);
            trial.work[place] = made.iter().map(|path| (path.clone(), seconds(path))).collect();
        }
        trial.wanted = trial.snapshot()?;
        ensure!(trial.wanted.keys().any(|name| name.contains("predictions")), "no predictions");
        ensure!(trial.wanted.keys().any(|name| name.ends_with("report.html")), "no report");
        Ok(trial)
    }

    /// Runs a command undisturbed.
    fn seconds_of(&mut self, place: usize) -> Result<f64> {
        let begin = Instant::now();
        let output = self.output("nothing", COMMANDS[place])?.context("it takes too long")?;
        ensure!(output.status.success(), "{:?} fails: {}", COMMANDS[place], text(&output.stderr));
        Ok(begin.elapsed().as_secs_f64())
    }

    /// The seconds that a command will probably take now.
    fn expected_seconds(&self, place: usize) -> f64 {
        let missing = self.work[place].iter().filter(|(path, _)| !is_whole(path));
        self.idle[place] + missing.map(|(_, seconds)| seconds).sum::<f64>()
    }

    fn runs(&self) -> PathBuf {
        self.bench.path("runs")
    }

    /// A command on the experiment. `predict` gets the experiment's own pictures.
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.assort);
        command.arg(words[0]);
        if words[0] == "stage" {
            command.arg(words[1]).arg(self.bench.path("tiny.toml")).args(&words[2..]);
        } else if words[0] == "reproduce" {
            command.arg(self.bench.path("tiny.toml")).args(&words[1..]);
        } else {
            command.arg("tiny").args(&words[1..]);
        }
        if words[0] != "report" {
            command.arg("--images").arg(self.bench.path("pictures")).args(["--device", "cpu"]);
        }
        command.arg("--runs").arg(self.runs());
        command
    }

    /// Runs a command to its end; `None` where it takes too long, which is counted.
    fn output(&mut self, what: &str, words: &[&str]) -> Result<Option<Output>> {
        let running = RunningCommand::start(&mut self.command(words))?;
        self.end_of(running, what, words)
    }

    fn end_of(
        &mut self,
        running: RunningCommand,
        what: &str,
        words: &[&str],
    ) -> Result<Option<Output>> {
        let output = running.wait()?;
        match &output {
            None => {
                println!(
                    "hang: {words:?} after {what} is still at work after {:?}",
                    running::LIMIT
                );
                self.counts.hangs += 1;
            }
            Some(output) => {
                let stderr = text(&output.stderr);
                if output.status.code() == Some(101) || stderr.contains("panicked at") {
                    println!("panic: {words:?} after {what}: {}", tail(&stderr));
                    self.counts.hangs += 1;
                }
            }
        }
        Ok(output)
    }

    /// The folders of results: of the store, of prepared data, and the report.
    fn results(&self) -> Result<Vec<PathBuf>> {
        let mut results = Vec::new();
        for folder in [".store", ".data"].map(|name| self.runs().join(name)) {
            if folder.exists() {
                for entry in fs::read_dir(folder)? {
                    results.push(entry?.path());
                }
            }
        }
        results.push(self.runs().join("tiny/0/report"));
        results.retain(|path| path.is_dir());
        results.sort();
        Ok(results)
    }

    /// The bytes of everything that must be the same, by path, without [`LOGS`].
    fn snapshot(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.runs().join("tiny/0")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                let name = path.strip_prefix(self.runs())?.to_string_lossy().into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if !LOGS.iter().any(|log| name.ends_with(log)) {
                    let bytes = fs::read(&path).with_context(|| format!("`{}`", path.display()))?;
                    found.insert(name, bytes);
                }
            }
        }
        Ok(found)
    }

    /// Runs all commands undisturbed and compares. A command may first fail with a message that names a
    /// damaged file and what to do. The report must be right even while other files are damaged.
    fn settle(&mut self, what: &str, attempts: usize) -> Result<()> {
        // Files that are younger may have a writer.
        thread::sleep(Duration::from_millis(120));
        let is_settled = self.is_same(what, attempts, |name| name.contains("/report/"))?
            && self.is_whole(what, attempts)?;
        if !is_settled {
            self.start_over()?;
        }
        Ok(())
    }

    /// Removes the damaged files that no command had to read, and makes them again; then every byte must be
    /// as it was, and no other file may be there.
    fn is_whole(&mut self, what: &str, attempts: usize) -> Result<bool> {
        let damaged = self.damaged()?;
        damaged.iter().try_for_each(fs::remove_file)?;
        self.counts.unread += damaged.len();
        let is_same = match damaged.is_empty() {
            true => self.is_shown(what, |_| true)?,
            false => self.is_same(what, attempts, |_| true)?,
        };
        if !is_same {
            return Ok(false);
        }
        let left = self.left_over()?;
        if !left.is_empty() {
            println!("left after {what}: {left:?}");
            self.counts.left_over += left.len();
        }
        Ok(left.is_empty())
    }

    /// Runs all commands undisturbed and compares the files that `fits` names.
    fn is_same(
        &mut self,
        what: &str,
        attempts: usize,
        fits: impl Fn(&str) -> bool,
    ) -> Result<bool> {
        for words in COMMANDS {
            if !self.succeeds(what, words, attempts)? {
                self.counts.lost += 1;
                return Ok(false);
            }
        }
        self.is_shown(what, fits)
    }

    /// Compares the files that `fits` names. A page that tells of a damaged log is told, not wrong.
    fn is_shown(&mut self, what: &str, fits: impl Fn(&str) -> bool) -> Result<bool> {
        let found = match self.snapshot() {
            Ok(found) => found,
            Err(error) => {
                println!("wrong after {what}: {error:#}");
                self.counts.wrong += 1;
                return Ok(false);
            }
        };
        let page = found.get("tiny/0/report/report.html").map(|page| text(page));
        if page.is_some_and(|page| page.contains("its curves are left out")) {
            self.counts.damaged_logs += 1;
            return Ok(false);
        }
        let differs = |name: &&String| fits(name) && found.get(*name) != self.wanted.get(*name);
        let names: BTreeSet<&String> =
            found.keys().chain(self.wanted.keys()).filter(differs).collect();
        for name in &names {
            let [found, wanted] = [found.get(*name), self.wanted.get(*name)];
            println!("wrong after {what}: `{name}`: {}", difference(found, wanted));
        }
        self.counts.wrong += usize::from(!names.is_empty());
        Ok(names.is_empty())
    }

    /// Files that differ from what was written, by their digests in `done.json` or in themselves.
    fn damaged(&self) -> Result<Vec<PathBuf>> {
        let mut damaged = Vec::new();
        let mut folders = vec![self.runs().join(".store"), self.runs().join(".data")];
        while let Some(folder) = folders.pop() {
            damaged.extend(finished::damaged(&folder)?);
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                let (path, is_folder) = (entry.path(), entry.file_type()?.is_dir());
                // Each picture has a digest of its own, which `report --pictures` checks.
                let has_digest = path.ends_with("names.safetensors");
                if is_folder {
                    folders.push(path);
                } else if (has_digest || path.ends_with("labels.safetensors")) && !opens(&path) {
                    damaged.push(path);
                }
            }
        }
        Ok(damaged)
    }

    /// Whether a command succeeds, after the remedies that it names.
    fn succeeds(&mut self, what: &str, words: &[&str], attempts: usize) -> Result<bool> {
        let mut attempts_left = attempts;
        let mut was_moved = false;
        loop {
            let Some(output) = self.output(what, words)? else { return Ok(false) };
            if output.status.success() {
                return Ok(true);
            }
            let stderr = text(&output.stderr);
            let pictures = self.runs().join("tiny/0/report/pictures");
            if !was_moved && stderr.contains("holds other pictures") && pictures.exists() {
                // They show a round that the run has passed, or were damaged; it says: move them.
                fs::remove_dir_all(pictures)?;
                was_moved = true;
            } else {
                attempts_left -= 1;
            }
            if attempts_left == 0 {
                println!("lost after {what}: {words:?} {}: {}", output.status, tail(&stderr));
                return Ok(false);
            }
            self.follow_advice(&stderr)?;
        }
    }

    /// Follows the advice of a message about a damaged file: removes it, and makes it again.
    fn follow_advice(&mut self, stderr: &str) -> Result<()> {
        let runs = fs::canonicalize(self.runs())?;
        for word in stderr.split('`') {
            let path = Path::new(word);
            let is_ours = path.starts_with(&runs) || path.starts_with(self.runs());
            if is_ours && path.is_absolute() && path.is_file() {
                fs::remove_file(path)?;
            }
        }
        // A report or a prediction reads what `reproduce` makes.
        self.output("a damaged file", COMMANDS[0]).map(drop)
    }

    /// Temporary files below the runs.
    fn left_over(&self) -> Result<Vec<PathBuf>> {
        let mut left = Vec::new();
        let mut folders = vec![self.runs()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let temporary = ["unfinished", ".partial", ".tmp", ".incomplete", ".lock"];
                if temporary.iter().any(|part| name.contains(part)) {
                    left.push(entry.path());
                }
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        Ok(left)
    }

    /// Removes everything, so that one fault is counted once.
    fn start_over(&mut self) -> Result<()> {
        fs::remove_dir_all(self.runs())?;
        for words in COMMANDS {
            self.output("a new start", words)?;
        }
        Ok(())
    }

    /// Removes some results of a command, or all, so that it has work again.
    fn remove_results(&mut self, place: usize) -> Result<()> {
        if place == 0 && self.random.random_bool(0.1) {
            return Ok(fs::remove_dir_all(self.runs())?);
        }
        let share = if self.random.random_bool(0.2) { 1. } else { 0.4 };
        let paths: Vec<PathBuf> = self.work[place].keys().cloned().collect();
        for path in paths {
            if path.exists() && self.random.random_bool(share) {
                fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }
}

/// The seconds that a step's folder records; `None` where it has no record.
fn cost_of(folder: &Path) -> Option<f64> {
    let text = fs::read_to_string(folder.join("cost.jsonl")).ok()?;
    let costs = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Some(costs.filter_map(|cost| cost["seconds"].as_f64()).sum())
}

/// Whether a folder of results, or a report, is complete.
fn is_whole(folder: &Path) -> bool {
    finished::is_finished(folder) || folder.join("report.html").exists()
}

/// Whether a tensor file has its digest.
fn opens(path: &Path) -> bool {
    let open = || -> Result<Container> {
        let header: Value = serde_json::from_str(&container::header_text(path)?)?;
        let kind = header["kind"].as_str().context("no kind")?;
        Container::open(path, kind, header["format-version"].as_u64().context("no version")?)
    };
    open().is_ok()
}

/// The first place where two files differ.
fn difference(found: Option<&Vec<u8>>, wanted: Option<&Vec<u8>>) -> String {
    let (Some(found), Some(wanted)) = (found, wanted) else {
        return format!("found: {}, wanted: {}", found.is_some(), wanted.is_some());
    };
    let at = found.iter().zip(wanted).take_while(|(one, other)| one == other).count();
    let part = |bytes: &[u8]| text(&bytes[at.saturating_sub(60)..bytes.len().min(at + 200)]);
    format!("at byte {at}: {:?} in place of {:?}", part(found), part(wanted))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The last lines of a program's output.
fn tail(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}
