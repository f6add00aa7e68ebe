//! The programs that fill the places: this program itself, or foreign executables.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stage::Spec;
use stage::digest::sha256_of_file;

use crate::Registry;

/// The word before the name of a helper: `assort program prepare --experiment …`.
pub const HELPER: &str = "program";

/// A program that can be started.
#[derive(Debug, Clone)]
pub struct Executable {
    /// Its path.
    pub path: PathBuf,
    /// Identifies its results: name and algorithm of our own program, or the digest of a foreign
    /// executable.
    pub identity: Value,
    /// The words before the arguments that select a stage; empty for a foreign executable.
    pub words: Option<Vec<&'static str>>,
    /// Whether its results may depend on the number of clusters.
    pub depends_on_clusters: bool,
}

impl Executable {
    /// The stage or helper of this name in this program.
    pub fn own(name: &str, registry: &Registry) -> Result<Self> {
        let helper = registry.helpers.iter().find(|helper| helper.name == name);
        let spec = registry.spec(name);
        let (name, algorithm, words) = match (spec, helper) {
            (Some(spec), _) => (spec.name, spec.algorithm, vec![spec.name]),
            (None, Some(helper)) => (helper.name, helper.algorithm, vec![HELPER, helper.name]),
            (None, None) => bail!(
                "there is no stage `{name}`; `[stages]` names one of {}, or an executable by its \
                 path",
                registry.specs().iter().map(|spec| spec.name).collect::<Vec<_>>().join(", ")
            ),
        };
        let path = env::current_exe().context("finding the file of this program")?;
        let identity = json!({ "name": name, "algorithm": algorithm });
        let depends_on_clusters = spec.is_none_or(Spec::depends_on_clusters);
        Ok(Self { path, identity, words: Some(words), depends_on_clusters })
    }

    /// A foreign executable.
    fn foreign(path: &Path) -> Result<Self> {
        ensure!(
            path.is_file(),
            "the program `{}` of `[stages]` is missing: there is no such file",
            path.display()
        );
        let name = table_of(&path.to_string_lossy()).to_owned();
        let identity = json!({ "name": name, "sha256": sha256_of_file(path)? });
        Ok(Self { path: path.to_owned(), identity, words: None, depends_on_clusters: true })
    }

    /// Whether it is a stage of this program, not a foreign executable.
    pub fn is_own(&self) -> bool {
        self.words.is_some()
    }

    /// The words that start it on a command line, without arguments.
    pub fn typed(&self) -> Vec<String> {
        let words = self.words.iter().flatten().map(|word| (*word).to_owned());
        [self.path.display().to_string()].into_iter().chain(words).collect()
    }

    /// A command that starts it, without arguments yet.
    pub fn command(&self) -> Command {
        let Some(words) = &self.words else { return Command::new(&self.path) };
        // A newer build may replace the file during a run, and its results may differ.
        let running = Path::new("/proc/self/exe");
        let mut command = Command::new(if running.exists() { running } else { &self.path });
        #[cfg(unix)]
        std::os::unix::process::CommandExt::arg0(&mut command, &self.path);
        command.args(words);
        command
    }
}

/// The programs of a run, by their name in `[stages]`.
#[derive(Debug, Clone)]
pub struct Programs(BTreeMap<String, Executable>);

impl Programs {
    /// Finds these programs: a word with a slash is the path of a foreign executable.
    pub fn find(words: &[&str], registry: &Registry) -> Result<Self> {
        let found = words.iter().map(|&word| {
            let program = match is_path(word) {
                true => Executable::foreign(Path::new(word))?,
                false => Executable::own(word, registry)?,
            };
            Ok((word.to_owned(), program))
        });
        Ok(Self(found.collect::<Result<_>>()?))
    }

    /// The program that `word` names.
    pub fn get(&self, word: &str) -> &Executable {
        self.0.get(word).expect("every program of the plan was found")
    }

    /// The foreign executables among them.
    pub fn foreign(&self) -> impl Iterator<Item = &Executable> {
        self.0.values().filter(|program| !program.is_own())
    }
}

fn is_path(word: &str) -> bool {
    word.contains(['/', '\\'])
}

/// The table that a program reads, which has its name.
pub fn table_of(program: &str) -> &str {
    let file = program.rsplit(['/', '\\']).next().unwrap_or(program);
    file.split_once('.').map_or(file, |(stem, _)| stem)
}
