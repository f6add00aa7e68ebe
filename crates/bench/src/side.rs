//! The processes that take turns.
//!
//! A side prints one JSON object per line: first `{"ready": true}` or `{"ready": true, "note": "…"}`
//! when it is warm, then one [`Measurement`] for each line that it reads. It ends at the end of its
//! input.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::TempDir;

/// The result of one turn of a side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measurement {
    /// Duration of the turn.
    pub seconds: f64,
    /// Processor time, summed over processors; 0 if the system does not report it. Other programs
    /// affect it less than the duration.
    pub processor_seconds: f64,
    /// Amount of work done, for example images.
    pub amount: f64,
    /// Peak memory of the side so far, in 10⁶ bytes; 0 if the system does not report it.
    pub peak_mb: f64,
}

/// A running side.
pub struct Side {
    name: String,
    /// Note that the side gave when it was ready.
    note: Option<String>,
    child: Child,
    /// `None` tells the side to end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// Holds the stderr of the side, for an error message.
    folder: TempDir,
}

impl Side {
    /// Starts this program again with arguments that make it call [`serve`].
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn ours(arguments: &[&str], threads: usize) -> Result<Self> {
        Self::of_this_program("ours", arguments, threads)
    }

    /// [`Side::ours`] under another name, to compare two works of this program.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn of_this_program(name: &str, arguments: &[&str], threads: usize) -> Result<Self> {
        let program = std::env::current_exe().context("finding this program's file")?;
        Self::of_program(name, &program, arguments, threads)
    }

    /// Starts another program whose arguments make it call [`serve`].
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn of_program(
        name: &str,
        program: &Path,
        arguments: &[&str],
        threads: usize,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(arguments).env("RAYON_NUM_THREADS", threads.to_string());
        Self::start(name, command)
    }

    fn start(name: &str, mut command: Command) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a temporary folder")?;
        let errors = File::create(folder.path().join(ERRORS))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("starting {name}: {:?}", command.get_program()))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a pipe for its output")?;
        let output = BufReader::new(output);
        Ok(Self { name: name.to_owned(), note: None, child, input, output, folder })
    }

    /// Name of the side.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Note that the side gave when it was ready.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Waits until the side is warm.
    ///
    /// # Errors
    ///
    /// The side failed; the message ends with its stderr.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        #[derive(Deserialize)]
        struct Ready {
            ready: bool,
            note: Option<String>,
        }
        let Ready { ready, note } = self.read()?;
        ensure!(ready, "{} is not ready", self.name);
        self.note = note;
        Ok(())
    }

    /// Lets the side do its work once.
    ///
    /// # Errors
    ///
    /// The side failed; the message ends with its stderr.
    pub fn turn(&mut self) -> Result<Measurement> {
        if let Some(input) = &mut self.input {
            // If the side has ended, reading its answer gives the reason.
            let _ = input.write_all(b"\n").and_then(|()| input.flush());
        }
        self.read()
    }

    fn read<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let mut line = String::new();
        let count = self.output.read_line(&mut line)?;
        if count == 0 {
            let status = self.child.wait()?;
            let errors = fs::read_to_string(self.folder.path().join(ERRORS)).unwrap_or_default();
            let lines: Vec<&str> = errors.lines().collect();
            let last = lines[lines.len().saturating_sub(12)..].join("\n");
            bail!("{} ended with {status}; its last lines:\n{last}", self.name)
        }
        serde_json::from_str(&line)
            .with_context(|| format!("{} printed `{line}` instead of a measurement", self.name))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.input = None;
        // The side may still compute; its result is not needed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const ERRORS: &str = "stderr";

/// The Python that runs the peers.
#[derive(Debug)]
pub struct Peers {
    python: PathBuf,
    /// Holds the program of the peers.
    folder: TempDir,
}

impl Peers {
    /// Checks that `python` has `packages`, and writes `program` for it.
    ///
    /// - `program`: Python source. It imports `serve(step, note=None)` from `side`, warms up, and
    ///   calls it; `step()` does the work once and returns the amount done.
    ///
    /// # Errors
    ///
    /// `python` is not a Python, or lacks packages; the message says how to install them.
    pub fn new(python: &Path, packages: &[&str], program: &str) -> Result<Self> {
        let missing = missing_packages(python, packages)?;
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(String::as_str).collect();
            bail!(
                "the Python `{}` lacks {}; install with `{0} -m pip install {}`, or leave out \
                 --peer-python to time ours alone",
                python.display(),
                names.join(", "),
                names.iter().map(|name| distribution(name)).collect::<Vec<_>>().join(" "),
            )
        }
        let folder = tempfile::tempdir().context("making a temporary folder")?;
        fs::write(folder.path().join("side.py"), include_str!("side.py"))?;
        fs::write(folder.path().join("peer.py"), program)?;
        Ok(Self { python: python.to_owned(), folder })
    }

    /// Starts a peer of this name.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(&self, name: &str, arguments: &[&str], threads: usize) -> Result<Side> {
        let mut command = Command::new(&self.python);
        command.arg(self.folder.path().join("peer.py")).args(arguments);
        for variable in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"] {
            command.env(variable, threads.to_string());
        }
        Side::start(name, command)
    }
}

/// Returns those of `packages` that `python` lacks.
///
/// # Errors
///
/// `python` is not a Python.
pub fn missing_packages(python: &Path, packages: &[&str]) -> Result<BTreeSet<String>> {
    const ASK: &str = "import importlib.util as u, sys\n\
                       print(*[p for p in sys.argv[1:] if u.find_spec(p) is None])";
    let output = Command::new(python)
        .args(["-c", ASK])
        .args(packages)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("--peer-python: starting `{}`", python.display()))?;
    ensure!(
        output.status.success(),
        "--peer-python: `{}` is not a Python 3: {}",
        python.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// What `pip` calls the package with a module of this name.
fn distribution(module: &str) -> &str {
    match module {
        "faiss" => "faiss-cpu",
        "PIL" => "pillow",
        "sklearn" => "scikit-learn",
        _ => module,
    }
}

/// Runs our side: calls `step` once to warm up, then once for each line of stdin.
///
/// - `step`: does the work once and returns the amount done.
pub fn serve(mut step: impl FnMut() -> Result<f64>) -> Result<()> {
    step()?;
    print(&json!({ "ready": true }))?;
    for line in std::io::stdin().lines() {
        line?;
        let (processor, start) = (processor_seconds(), Instant::now());
        let amount = step()?;
        let seconds = start.elapsed().as_secs_f64();
        let processor_seconds = processor_seconds() - processor;
        print(&Measurement { seconds, processor_seconds, amount, peak_mb: peak_megabytes() })?;
    }
    Ok(())
}

fn print(line: &impl Serialize) -> Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// Returns the processor time of this process in seconds; 0 if the system does not report it.
fn processor_seconds() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may contain spaces: user and system time, in hundredths of a second.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.
}

/// Returns the peak memory of this process in 10⁶ bytes; 0 if the system does not report it.
pub fn peak_megabytes() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kilobytes.and_then(|k| k.parse::<f64>().ok()).unwrap_or(0.) * 1024e-6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Side {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Side::start("peer", command).expect("started")
    }

    #[test]
    fn a_side_answers_turn_by_turn() -> Result<()> {
        let mut side = shell(
            r#"echo '{"ready": true, "note": "eager"}'
            for amount in 3 4; do
                read line
                echo "{\"seconds\": 0.5, \"processor-seconds\": 1, \"amount\": $amount, \"peak-mb\": 7}"
            done"#,
        );
        side.wait_until_ready()?;
        assert_eq!(side.note(), Some("eager"));
        assert_eq!(side.turn()?.amount, 3.);
        assert_eq!(
            side.turn()?,
            Measurement { seconds: 0.5, processor_seconds: 1., amount: 4., peak_mb: 7. }
        );
        Ok(())
    }

    #[test]
    fn a_failed_side_gives_its_stderr() {
        let mut side = shell("echo 'no such model' >&2; exit 5");
        let message = side.wait_until_ready().expect_err("ended").to_string();
        assert!(message.contains("no such model") && message.contains('5'), "{message}");
        let mut side = shell("echo nonsense");
        let message = format!("{:#}", side.turn().expect_err("no JSON"));
        assert!(message.contains("nonsense"), "{message}");
    }

    #[test]
    fn missing_packages_of_a_python_are_named() {
        let Err(error) = Peers::new(Path::new("no-such-python"), &["torch"], "") else {
            panic!("no such file")
        };
        assert!(format!("{error:#}").contains("no-such-python"));
        let folder = tempfile::tempdir().expect("a folder");
        let fake = folder.path().join("python");
        fs::write(&fake, "#!/bin/sh\necho torch lightly\n").expect("written");
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&fake, executable).expect("allowed");
        let message = Peers::new(&fake, &["torch", "lightly"], "").expect_err("lacks").to_string();
        assert!(message.contains("-m pip install lightly torch"), "{message}");
        assert_eq!(["faiss", "torch"].map(distribution), ["faiss-cpu", "torch"]);
    }

    #[test]
    fn memory_and_processor_time_are_this_process_s() {
        let before = (peak_megabytes(), processor_seconds());
        let large = vec![1u8; 200_000_000];
        assert!(large.iter().map(|&byte| u64::from(byte)).sum::<u64>() == 200_000_000);
        if cfg!(target_os = "linux") {
            assert!(peak_megabytes() > before.0.max(190.));
            assert!(processor_seconds() >= before.1 && processor_seconds() < 1000.);
        }
    }
}
