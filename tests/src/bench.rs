//! A folder with pictures, an experiment, and the runs on it.
//!
//! Every system has a tiny experiment in `systems/`; what holds for all of them is tested with each,
//! so that a new system only adds its file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::pictures::{self, PLAIN};

/// Everything one test works on; removed at its end.
#[derive(Debug)]
pub struct Bench {
    folder: TempDir,
    experiment: toml::Table,
}

impl Bench {
    /// A folder with the plain pictures and the tiny experiment of PLDC.
    pub fn new() -> Self {
        Self::of("pldc")
    }

    /// A folder with the plain pictures and the tiny experiment of a system.
    pub fn of(system: &str) -> Self {
        Self::with_pictures(system, |folder| pictures::write(folder, PLAIN, 0))
    }

    /// The same with other pictures.
    pub fn with_pictures(system: &str, write: impl FnOnce(&Path) -> Result<()>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let pictures = folder.path().join("pictures");
        fs::create_dir(&pictures).expect("created");
        write(&pictures).expect("written");
        let text = fs::read_to_string(systems_folder().join(system).with_extension("toml"));
        let experiment = text.expect("a system's experiment").parse().expect("TOML");
        let bench = Self { folder, experiment };
        bench.write_experiment();
        bench
    }

    /// The path of `name` in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder where the step `name` (`0-embed`) left its files.
    pub fn step(&self, name: &str) -> PathBuf {
        self.path("runs/tiny/0").join(name)
    }

    /// The steps of the experiment itself, in order: place and round.
    pub fn steps(&self) -> Vec<(String, usize)> {
        let rounds = &self.experiment["rounds"];
        let places = |key: &str| rounds[key].as_array().expect("places").clone();
        let count = rounds["rounds"].as_integer().expect("a number") as usize;
        let mut steps = Vec::new();
        for round in 0..=count {
            for place in places(if round == 0 { "first" } else { "then" }) {
                steps.push((place.as_str().expect("a name").to_owned(), round));
            }
        }
        steps
    }

    /// A key of a table of the experiment.
    pub fn key_of(&self, table: &str) -> String {
        let table = self.experiment[table].as_table().expect("a table");
        table.keys().next().expect("a key").clone()
    }

    /// The first place of the experiment, whose program trains.
    pub fn first(&self) -> String {
        self.steps().remove(0).0
    }

    /// The files that a finished run left and others build on, by step: what must be the same bytes
    /// where nothing differs.
    pub fn results(&self, seed: usize) -> BTreeMap<String, Vec<u8>> {
        let mut results = BTreeMap::new();
        for (place, round) in self.steps() {
            let step = format!("{round}-{place}");
            let folder = self.path("runs/tiny").join(seed.to_string()).join(&step);
            for entry in fs::read_dir(&folder).expect("a finished step").flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".safetensors") && name != "state.safetensors" {
                    let bytes = fs::read(entry.path()).expect("readable");
                    results.insert(format!("{step}/{name}"), bytes);
                }
            }
        }
        assert!(results.keys().any(|name| name.ends_with("/network.safetensors")));
        assert!(results.keys().any(|name| name.ends_with("/pseudo-labels.safetensors")));
        results
    }

    /// The prepared pictures.
    pub fn images(&self) -> PathBuf {
        self.path("runs/tiny/0/data/images.safetensors")
    }

    /// Sets a value of the experiment; `key` has dots between tables.
    pub fn set(&mut self, key: &str, value: impl Into<toml::Value>) {
        let (path, last) = key.rsplit_once('.').expect("a table and a key");
        let mut table = &mut self.experiment;
        for part in path.split('.') {
            table = table[part].as_table_mut().expect("a table");
        }
        table.insert(last.to_owned(), value.into());
        self.write_experiment();
    }

    fn write_experiment(&self) {
        fs::write(self.path("tiny.toml"), self.experiment.to_string()).expect("written");
    }

    /// A command of `assort` on the experiment.
    pub fn assort(&self, words: &[&str]) -> Command {
        let mut command = assort();
        let (subcommand, words) = words.split_first().expect("a subcommand");
        command.arg(subcommand);
        if *subcommand == "stage" {
            command.arg(words[0]).arg(self.path("tiny.toml")).args(&words[1..]);
        } else {
            command.arg(self.path("tiny.toml")).args(words);
        }
        command
            .arg("--images")
            .arg(self.path("pictures"))
            .arg("--runs")
            .arg(self.path("runs"))
            .args(["--device", "cpu"]);
        command
    }

    /// Runs the experiment to its end and returns the JSON object it prints last.
    ///
    /// # Errors
    ///
    /// It does not end with status 0, or prints no such object.
    pub fn reproduce(&self, words: &[&str]) -> Result<Value> {
        let output = self.assort(&[&["reproduce", "--json"], words].concat()).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{}: {stderr}", output.status);
        let stdout = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(stdout.lines().last().context("nothing on stdout")?)
            .with_context(|| format!("no JSON at the end of {stdout}"))
    }

    /// The stage `name`, started as the step of round `round`, with inputs by role.
    pub fn stage(&self, name: &str, round: usize, inputs: &[(&str, &Path)], out: &str) -> Command {
        let mut command = assort();
        command.arg(name);
        command.arg("--experiment").arg(self.path("tiny.toml"));
        command.arg("--images").arg(self.images());
        for (role, folder) in inputs {
            command.arg("--in").arg(format!("{role}={}", folder.display()));
        }
        command.arg("--out").arg(self.path(out));
        command.args(["--round", &round.to_string(), "--rounds", "1", "--seed", "0"]);
        command.args(["--device", "cpu"]);
        command
    }

    /// The bytes of a file that a step left.
    pub fn bytes(&self, step: &str, file: &str) -> Vec<u8> {
        let path = self.step(step).join(file);
        fs::read(&path).unwrap_or_else(|error| panic!("`{}`: {error}", path.display()))
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

/// A command for `assort`, away from the terminal and from the experiments of this workspace.
pub fn assort() -> Command {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(FILE.get_or_init(|| build().expect("assort is built")));
    command.stdin(Stdio::null());
    command
}

/// What a program printed to stderr.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn systems_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systems")
}

/// The systems that have a tiny experiment, by name.
pub fn systems() -> Vec<String> {
    let entries = fs::read_dir(systems_folder()).expect("systems").flatten();
    let stem = |path: PathBuf| Some(path.file_stem()?.to_string_lossy().into_owned());
    let mut systems: Vec<String> = entries.filter_map(|entry| stem(entry.path())).collect();
    systems.sort();
    systems
}

/// Builds `assort`: cargo gives a test only the programs of its own package.
fn build() -> Result<PathBuf> {
    let mut command = xtask::cargo::command();
    command.args(["build", "--message-format", "json-render-diagnostics"]).stdin(Stdio::null());
    command.args(["--package", "assort", "--bin", "assort"]);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output()?;
    anyhow::ensure!(output.status.success(), "{}", stderr(&output));
    let stdout = String::from_utf8_lossy(&output.stdout);
    let mut executables = stdout.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        Some(PathBuf::from(message.get("executable")?.as_str()?))
    });
    executables.next().context("cargo built no program")
}
