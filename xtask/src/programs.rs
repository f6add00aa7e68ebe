//! The programs that fill the places: this program itself, or foreign executables.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use stage::digest::sha256_of_file;
use stage::{Experiment, Ranks, Spec};

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
    /// Whether its results may depend on the pictures.
    pub depends_on_images: bool,
    /// Processes that share a step of it.
    pub ranks: usize,
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
        let stage = registry.stages.iter().find(|stage| stage.spec.name == name);
        Ok(Self {
            path,
            identity,
            words: Some(words),
            depends_on_clusters: spec.is_none_or(Spec::depends_on_clusters),
            depends_on_images: stage.is_none_or(|stage| stage.depends_on_images),
            ranks: 1,
        })
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
        let path = path.to_owned();
        Ok(Self {
            path,
            identity,
            words: None,
            depends_on_clusters: true,
            depends_on_images: true,
            ranks: 1,
        })
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

    /// A command that starts the processes that share a step, without arguments yet.
    ///
    /// - `sharing`: how many steps share the processors.
    pub fn step_command(&self, sharing: usize) -> Command {
        if self.ranks == 1 {
            let mut command = self.command();
            limit_threads(&mut command, sharing);
            return command;
        }
        let mut command = launcher(self.ranks, &self.path);
        limit_threads(&mut command, self.ranks * sharing);
        command.args(self.words.iter().flatten());
        // The launcher would end its processes at an interrupt of the terminal before they have saved.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command
    }
}

/// A command that starts so many processes of a program on this machine, without arguments yet.
pub fn launcher(ranks: usize, program: &Path) -> Command {
    let mut command = Command::new(LAUNCHER);
    command.arg("-n").arg(ranks.to_string()).arg(program);
    // Open MPI asks root, as in a container, for these two; and by itself starts no more processes
    // than there are cores, and binds each to a few of them.
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(name, "1");
    }
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    command.env("OMPI_MCA_mpi_yield_when_idle", "1");
    command.env("OMPI_MCA_hwloc_base_binding_policy", "none");
    command.env("PRTE_MCA_hwloc_default_binding_policy", "none");
    limit_threads(&mut command, ranks);
    command
}

/// Gives a program its part of the processors, which so many processes share, unless the user's environment says how
/// many threads it has.
fn limit_threads(command: &mut Command, processes: usize) {
    if processes > 1 && env::var_os(THREADS).is_none() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        command.env(THREADS, (cores / processes).max(1).to_string());
    }
}

/// Fails unless this program can share work among so many ranks.
pub fn check_ranks(ranks: usize) -> Result<()> {
    ensure!(ranks.is_power_of_two(), "--ranks {ranks} is not a power of two; ask for 1, 2, 4, ...");
    ensure!(
        ranks == 1 || stage::HAS_MPI,
        "--ranks {ranks} needs MPI, and this program is built without it; install Open MPI and libclang, \
         and build it with `--features mpi`"
    );
    Ok(())
}

/// Starts several processes of a program, connected by MPI.
pub const LAUNCHER: &str = "mpirun";

/// The number of threads of a process that compute.
const THREADS: &str = "RAYON_NUM_THREADS";

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

    /// Lets so many processes share the steps of the programs that can.
    ///
    /// # Errors
    ///
    /// This program is built without MPI, no step can be shared, or a training has fewer groups than ranks.
    pub fn share(
        &mut self,
        experiments: &[&Experiment],
        registry: &Registry,
        ranks: usize,
    ) -> Result<()> {
        if ranks == 1 {
            return Ok(());
        }
        check_ranks(ranks)?;
        let mut are_shared = false;
        for (word, program) in self.0.iter_mut().filter(|(_, program)| program.is_own()) {
            match registry.spec(word).map_or(Ranks::One, |spec| spec.ranks) {
                Ranks::One => continue,
                Ranks::BatchGroups => check_groups(experiments, word, ranks)?,
                Ranks::Any => {}
            }
            program.ranks = ranks;
            are_shared = true;
        }
        ensure!(are_shared, "--ranks {ranks}: no step of this experiment can be shared");
        Ok(())
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

/// Fails where a training divides a batch into fewer groups than there are ranks.
fn check_groups(experiments: &[&Experiment], training: &str, ranks: usize) -> Result<()> {
    let groups = |experiment: &&Experiment| {
        let table: Value = experiment.table(training).ok()?;
        table.pointer("/run/batch-groups")?.as_i64()
    };
    let Some(groups) = experiments.iter().filter_map(groups).min() else { return Ok(()) };
    ensure!(
        ranks as i64 <= groups,
        "`batch-groups` in `[{training}.run]` is {groups}, but --ranks is {ranks}, and each rank needs a \
         group; add --set shared.batch-groups={ranks}. Results depend on the groups in the last bits, but \
         not on the ranks"
    );
    Ok(())
}

fn is_path(word: &str) -> bool {
    word.contains(['/', '\\'])
}

/// The table that a program reads, which has its name.
pub fn table_of(program: &str) -> &str {
    let file = program.rsplit(['/', '\\']).next().unwrap_or(program);
    file.split_once('.').map_or(file, |(stem, _)| stem)
}
