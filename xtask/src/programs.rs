//! The programs that fill the places: built from this workspace, ready-built, or foreign.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{interrupt, key};

/// The program that makes the data set; it fills no place.
pub const PREPARE: &str = "prepare";

/// A program that can be started.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its file.
    pub path: PathBuf,
    /// What comes before the arguments: nothing, or the stage's name where one file holds all.
    pub words: Vec<String>,
    /// What tells its results from those of another: for our own, the line that `--version`
    /// prints; for a foreign executable, which need not know that flag, the digest of its file.
    pub version: String,
}

/// The programs of a run, by the word that names them in `[stages]`.
#[derive(Debug, Clone)]
pub struct Programs(BTreeMap<String, Program>);

impl Programs {
    /// Builds exactly these programs, in one go; those named by a path are taken as they are.
    ///
    /// - `features`: of cargo, for those programs that have them.
    pub fn build(words: &[&str], features: Option<&str>) -> Result<Self> {
        let crates: Vec<&str> = words.iter().copied().filter(|word| !is_path(word)).collect();
        for name in &crates {
            ensure!(
                Path::new("crates").join(name).join("Cargo.toml").exists(),
                "there is no program `{name}`: `crates/{name}` is missing; `[stages]` may also \
                 name an executable by its path"
            );
        }
        let programs: Vec<_> = crates.iter().map(|&name| (name, name)).collect();
        let built = match crates.is_empty() {
            true => BTreeMap::new(),
            false => cargo_build(&programs, features)?,
        };
        Self::located(words, |name| {
            let path = built.get(name).cloned();
            let path = path.with_context(|| {
                format!("`crates/{name}` builds no program: it needs a `src/main.rs`")
            })?;
            Ok((path, vec![]))
        })
    }

    /// Takes the ready-built programs in `folder`: `assort`, which holds all stages, for those
    /// that have no file of their own there.
    pub fn in_folder(words: &[&str], folder: &Path) -> Result<Self> {
        let file = |name: &str| folder.join(format!("{name}{}", env::consts::EXE_SUFFIX));
        Self::located(words, |name| match (file(name), file(ALL_IN_ONE)) {
            (own, _) if own.is_file() => Ok((own, vec![])),
            (_, all) if all.is_file() => Ok((all, vec![name.to_owned()])),
            (own, _) => bail!(
                "the program `{name}` is missing: there is neither `{}` nor `{ALL_IN_ONE}`, which \
                 holds all of them, in that folder",
                own.display()
            ),
        })
    }

    /// The program that `word` names.
    pub fn get(&self, word: &str) -> &Program {
        self.0.get(word).expect("every program of the plan was located")
    }

    fn located(
        words: &[&str],
        place: impl Fn(&str) -> Result<(PathBuf, Vec<String>)>,
    ) -> Result<Self> {
        let mut programs = BTreeMap::new();
        for &word in words {
            let (path, first) =
                if is_path(word) { (PathBuf::from(word), vec![]) } else { place(word)? };
            ensure!(
                path.is_file(),
                "the program `{word}` is missing: there is no file `{}`",
                path.display()
            );
            let version = match is_path(word) {
                true => format!("sha256 {}", key::digest_of_file(&path)?),
                false => version_of(&path, &first)?,
            };
            programs.insert(word.to_owned(), Program { path, words: first, version });
        }
        Ok(Self(programs))
    }
}

/// The program that holds all stages.
const ALL_IN_ONE: &str = "assort";

fn is_path(word: &str) -> bool {
    word.contains(['/', '\\'])
}

/// Builds these programs, each a crate with the name of its binary, and returns the executables by
/// name.
pub fn cargo_build(
    programs: &[(&str, &str)],
    features: Option<&str>,
) -> Result<BTreeMap<String, PathBuf>> {
    let names: Vec<&str> = programs.iter().map(|(_, name)| *name).collect();
    tracing::info!("building {}", names.join(", "));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--message-format", "json-render-diagnostics"]);
    for (owner, name) in programs {
        command.args(["--package", owner, "--bin", name]);
    }
    if let Some(features) = features {
        command.args(["--features", features]);
    }
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.context("starting cargo to build the programs")?;
    interrupt::check()?;
    ensure!(
        output.status.success(),
        "building {} failed; cargo's messages are above",
        names.join(", ")
    );
    let mut executables = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        // Lines that are no message of cargo's are what build scripts print.
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let name = message.pointer("/target/name").and_then(Value::as_str);
        let executable = message.get("executable").and_then(Value::as_str);
        if let (Some(name), Some(executable)) = (name, executable) {
            executables.insert(name.to_owned(), PathBuf::from(executable));
        }
    }
    Ok(executables)
}

/// The line that `program --version` prints.
fn version_of(program: &Path, words: &[String]) -> Result<String> {
    let output = Command::new(program)
        .args(words)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("starting `{}`", program.display()))?;
    let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if !output.status.success() || line.is_empty() {
        bail!("`{} --version` does not say which algorithm it is", program.display());
    }
    Ok(line)
}
