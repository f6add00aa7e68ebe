//! Trials of the whole program: kills, damaged files, full disks, commands at once.
//!
//! A trial runs a tiny experiment undisturbed, with its report and its predictions, and keeps every
//! byte that must be the same. Then it disturbs: after each round the same commands, undisturbed,
//! must lead to the same bytes. [`Counts`] says how often they did not.

pub mod crash;
pub mod hostile;
pub mod mutation;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use stage::finished;

use crate::Bench;

/// How long a program may go on after it was asked to stop.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was tried, and what went wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Signals that ended a program, by what they were sent to.
    pub kills: BTreeMap<&'static str, usize>,
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
    /// A program went on for more than 10 s after it was asked to stop, or panicked.
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
        writeln!(f, "{} kills {:?}", sum(&self.kills), self.kills)?;
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
    /// Duration of `reproduce`, the report and `predict`.
    seconds: [f64; 3],
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
            seconds: [0.; 3],
            random: stage::random::stream(seed, "trial", &[]),
            counts: Counts::default(),
        };
        for (place, words) in COMMANDS.into_iter().enumerate() {
            let begin = Instant::now();
            let output = trial.command(words).output()?;
            ensure!(output.status.success(), "{words:?} fails: {}", text(&output.stderr));
            trial.seconds[place] = begin.elapsed().as_secs_f64();
        }
        trial.wanted = trial.snapshot()?;
        ensure!(trial.wanted.keys().any(|name| name.contains("predictions")), "no predictions");
        ensure!(trial.wanted.keys().any(|name| name.ends_with("report.html")), "no report");
        Ok(trial)
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
        command.arg("--runs").arg(self.runs()).stdin(Stdio::null());
        command
    }

    /// The bytes of everything that must be the same, by path; files with times are left out.
    fn snapshot(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.runs().join("tiny/0")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                let name = path.strip_prefix(self.runs())?.to_string_lossy().into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if !name.ends_with(".jsonl") && !name.ends_with("log.sha256") {
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
        for path in self.damaged()? {
            fs::remove_file(path)?;
            self.counts.unread += 1;
        }
        if !self.is_same(what, attempts, |_| true)? {
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
        if !names.is_empty() {
            println!("wrong after {what}: {names:?}");
            self.counts.wrong += 1;
        }
        Ok(names.is_empty())
    }

    /// Files that differ from what their step wrote, by the digests in `done.json`.
    fn damaged(&self) -> Result<Vec<PathBuf>> {
        let mut damaged = Vec::new();
        let mut folders = vec![self.runs().join(".store")];
        while let Some(folder) = folders.pop() {
            damaged.extend(finished::damaged(&folder)?);
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                }
            }
        }
        Ok(damaged)
    }

    fn succeeds(&mut self, what: &str, words: &[&str], attempts: usize) -> Result<bool> {
        for attempt in 1..=attempts {
            let output = self.command(words).output()?;
            self.note_panic(what, &output);
            if output.status.success() {
                return Ok(true);
            }
            let stderr = text(&output.stderr);
            let pictures = self.runs().join("tiny/0/report/pictures");
            if stderr.contains("holds other pictures") && pictures.exists() {
                // They show a round that the run has passed, or were damaged; it says: move them.
                fs::remove_dir_all(pictures)?;
                return self.succeeds(what, words, attempts);
            }
            if attempt == attempts {
                println!("lost after {what}: {words:?} {}: {}", output.status, tail(&stderr));
            }
            self.follow_advice(&stderr)?;
        }
        Ok(false)
    }

    /// Follows the advice of a message about a damaged file: removes it, and makes it again.
    fn follow_advice(&self, stderr: &str) -> Result<()> {
        let runs = fs::canonicalize(self.runs())?;
        for word in stderr.split('`') {
            let path = Path::new(word);
            let is_ours = path.is_absolute() && path.is_file() && path.starts_with(&runs);
            if is_ours || path.starts_with(self.runs()) && path.is_file() {
                fs::remove_file(path)?;
            }
        }
        // A report or a prediction reads what `reproduce` makes.
        self.command(COMMANDS[0]).output()?;
        Ok(())
    }

    fn note_panic(&mut self, what: &str, output: &Output) {
        let stderr = text(&output.stderr);
        if output.status.code() == Some(101) || stderr.contains("panicked at") {
            println!("panic after {what}: {}", tail(&stderr));
            self.counts.hangs += 1;
        }
    }

    /// Temporary files below the runs.
    fn left_over(&self) -> Result<Vec<PathBuf>> {
        let mut left = Vec::new();
        let mut folders = vec![self.runs()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let is_temporary = ["unfinished", ".partial", ".tmp"];
                if is_temporary.iter().any(|part| name.contains(part)) {
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
            self.command(words).output()?;
        }
        Ok(())
    }

    /// Removes some results, or all, so that there is work again.
    fn remove_results(&mut self) -> Result<()> {
        if self.random.random_bool(0.2) {
            fs::remove_dir_all(self.runs())?;
            return Ok(());
        }
        let mut results = Vec::new();
        for folder in [".store", ".data"] {
            for entry in fs::read_dir(self.runs().join(folder))? {
                results.push(entry?.path());
            }
        }
        results.retain(|path| path.is_dir());
        results.sort();
        for _ in 0..self.random.random_range(1..=3) {
            let path = &results[self.random.random_range(0..results.len())];
            if path.exists() {
                fs::remove_dir_all(path)?;
            }
        }
        let report = self.runs().join("tiny/0/report");
        if report.exists() && self.random.random_bool(0.5) {
            fs::remove_dir_all(report)?;
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The last lines of a program's output.
fn tail(stderr: &str) -> String {
    let lines: Vec<&str> = stderr.lines().collect();
    lines[lines.len().saturating_sub(4)..].join(" | ")
}
