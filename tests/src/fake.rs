//! A folder with an experiment, for commands on stages that compute nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

/// An experiment and what the commands on it write; removed at its end.
#[derive(Debug)]
pub struct Fake {
    folder: TempDir,
    program: &'static str,
}

/// The folder of this crate.
pub fn sources() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

impl Fake {
    /// A folder with an experiment, pictures, and `foreign`, an executable for `[stages]`.
    ///
    /// - `program`: the file of `fake-assort`, which cargo tells to tests alone.
    pub fn new(program: &'static str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("pictures")).expect("created");
        for (from, to) in [("fake-program", "foreign"), ("example.toml", "example.toml")] {
            fs::copy(sources().join(from), folder.path().join(to)).expect("copied");
        }
        Self { folder, program }
    }

    /// The path of `name` in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command, started in the folder.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.program);
        command.args(words).env("FAKE_LOG", self.path("log")).current_dir(self.folder.path());
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().expect("started")
    }

    /// Runs the experiment with further words.
    pub fn reproduce(&self, words: &[&str]) -> Output {
        self.run(&[&["reproduce", "example.toml"], words].concat())
    }

    /// What was started since the last call, one program a line.
    pub fn started(&self) -> Vec<String> {
        let lines = self.log();
        let _ = fs::remove_file(self.path("log"));
        lines
    }

    /// What was started since [`Fake::started`] was called last.
    pub fn log(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// Waits until the program that `FAKE_WAIT` names is at work, and returns its process.
    pub fn waiting(&self) -> String {
        let file = self.path("log.waiting");
        until("a program waits", || fs::read_to_string(&file).is_ok_and(|id| id.ends_with('\n')));
        let process = fs::read_to_string(&file).expect("there");
        fs::remove_file(&file).expect("removed");
        process.trim().to_owned()
    }
}

/// Waits until `is_so`, and fails after half a minute.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if is_so() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("30 s passed before {what}");
}

/// Sends a signal, `-TERM`, to a process or, with a minus before it, to a group.
#[cfg(unix)]
pub fn send(signal: &str, process: &str) {
    let sent = Command::new("kill").args([signal, "--", process]).status().expect("sent");
    assert!(sent.success(), "kill {signal} {process}");
}

/// What a program printed.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fails, with the program's messages, unless it ended with this status.
pub fn assert_status(output: &Output, status: i32) {
    assert_eq!(output.status.code(), Some(status), "{}", text(&output.stderr));
}
