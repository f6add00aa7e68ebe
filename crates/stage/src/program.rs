//! From a command line to a stage's `run`, and from its result to the exit status.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail, ensure};
use clap::{CommandFactory, FromArgMatches};
use collective::Communicator;

use crate::arguments::StageArguments;
use crate::{
    Claim, DataTable, Experiment, Interrupt, Job, Ranks, Role, Spec, Stage, Status, console, files,
    finished, memory, status,
};

/// A stage with its type erased: an entry of a registry.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// What an orchestrator must know of the stage.
    pub spec: Spec,
    /// See [`Stage::DEPENDS_ON_IMAGES`].
    pub depends_on_images: bool,
    run: fn(Vec<OsString>, &Communicator) -> Result<()>,
    check_table: fn(&Experiment) -> Result<()>,
    identity: fn(&Experiment, &Interrupt) -> Result<Option<String>>,
}

impl Program {
    /// The program of a stage.
    pub const fn of<S: Stage>() -> Self {
        Self {
            spec: S::SPEC,
            depends_on_images: S::DEPENDS_ON_IMAGES,
            run: check_or_run::<S>,
            check_table: check_table::<S>,
            identity: |experiment, interrupt| {
                S::identity(&experiment.table(S::SPEC.name)?, interrupt)
            },
        }
    }

    /// Fails where the stage's table of the experiment, or `[data]`, has unknown, missing or
    /// mistyped keys. It needs no pictures.
    pub fn check_table(&self, experiment: &Experiment) -> Result<()> {
        (self.check_table)(experiment)
    }

    /// Names what the stage reads from outside the run: see [`Stage::identity`].
    pub fn identity(
        &self,
        experiment: &Experiment,
        interrupt: &Interrupt,
    ) -> Result<Option<String>> {
        (self.identity)(experiment, interrupt)
    }

    /// Reads arguments and table, checks or runs the stage, prints an error, and returns the exit
    /// status.
    ///
    /// - `words`: the command line, whose first word is the program's name.
    pub fn main(&self, words: impl IntoIterator<Item = OsString>) -> ExitCode {
        console::start_logging();
        let communicator = match Communicator::of_environment() {
            Ok(communicator) => communicator,
            Err(error) => return status::finish(self.spec.name, &Err(error.into())),
        };
        let result = (self.run)(words.into_iter().collect(), &communicator);
        match (&result, communicator.size()) {
            (Err(error), 2..) => end_all(self.spec.name, &communicator, error),
            _ => status::finish(self.spec.name, &result),
        }
    }
}

/// Prints the error of a rank, and ends all ranks: the others would wait for this one.
fn end_all(name: &str, communicator: &Communicator, error: &Error) -> ! {
    let (rank, ranks) = (communicator.rank(), communicator.size());
    let status = Status::of_error(error);
    if rank > 0 && matches!(status, Status::Interrupted | Status::Diverged) {
        // All ranks come to these ends at the same step. The first one says so, and ends this one.
        thread::sleep(Duration::from_secs(10));
    }
    console::print_error(format_args!("{name}, rank {rank} of {ranks}: {error:#}"));
    communicator.abort(status.code())
}

/// Fails where the stage's table of the experiment, or `[data]`, cannot be used.
fn check_table<S: Stage>(experiment: &Experiment) -> Result<()> {
    experiment.table::<S::Config>(S::SPEC.name)?;
    experiment.table::<DataTable>("data")?.check()
}

/// The `main` of a stage that is a separate executable.
pub fn main<S: Stage>() -> ExitCode {
    Program::of::<S>().main(std::env::args_os())
}

/// What each `--in ROLE=DIR` of a stage is, a line for each role.
fn roles(spec: &Spec) -> String {
    let width = spec.inputs.iter().map(|role| role.name.len()).max().unwrap_or(0);
    let line = |role: &Role| {
        let optional = if role.origin.is_optional() { " (optional)" } else { "" };
        format!("  {:width$}  {}{optional}", role.name, role.origin.description())
    };
    let lines: Vec<String> = spec.inputs.iter().map(line).collect();
    match lines.as_slice() {
        [] => String::new(),
        lines => format!("Roles of --in:\n{}", lines.join("\n")),
    }
}

fn check_or_run<S: Stage>(words: Vec<OsString>, communicator: &Communicator) -> Result<()> {
    let spec = S::SPEC;
    let version = format!("algorithm {}", spec.algorithm);
    let command = StageArguments::command()
        .name(spec.name)
        .version(version)
        .about("Run this stage alone: files in, files out")
        .after_help(roles(&spec));
    let arguments = match StageArguments::from_arg_matches(&command.get_matches_from(words)) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let ranks = communicator.size();
    ensure!(
        ranks == 1 || spec.ranks != Ranks::One,
        "{ranks} ranks were started, but {} computes in one process; start it alone",
        spec.name
    );
    let interrupt = Interrupt::listen_on_rank(communicator)?;
    let experiment = Experiment::read(&arguments.experiment)?;
    let config: S::Config = experiment.table(spec.name)?;
    let (is_check, job) = (arguments.check, job(&spec, arguments, &experiment, interrupt)?);
    let job = Job { communicator: communicator.clone(), ..job };
    let effort = S::check(&config, &job)?;
    if is_check && !communicator.is_first() {
        return Ok(());
    }
    if is_check {
        let (effort, config) = (toml::to_string(&effort)?, toml::to_string(&config)?);
        return console::print(format_args!("{effort}\n[{}]\n{config}", spec.name));
    }
    let job = if S::DEPENDS_ON_IMAGES { job } else { Job { images: PathBuf::new(), ..job } };
    let advise = |error| memory::advise(error, spec.name, &config);
    run_once(&spec, &job, || S::run(&config, &job).map_err(advise))
}

fn job(
    spec: &Spec,
    arguments: StageArguments,
    experiment: &Experiment,
    interrupt: Interrupt,
) -> Result<Job> {
    let StageArguments { images, out, round, rounds, seed, device, .. } = arguments;
    ensure!(round <= rounds, "--round {round} is after the last round, --rounds {rounds}");
    let mut data: DataTable = experiment.table("data")?;
    data.check()?;
    if !spec.depends_on_clusters() {
        data.clusters = 0;
    }
    let inputs = inputs_by_role(spec, arguments.inputs)?;
    Ok(Job {
        inputs,
        round,
        rounds,
        seed,
        device,
        interrupt,
        ..Job::new(spec.name, images, out, data)
    })
}

fn inputs_by_role(
    spec: &Spec,
    inputs: Vec<(String, PathBuf)>,
) -> Result<BTreeMap<String, PathBuf>> {
    let mut roles = BTreeMap::new();
    for (role, path) in inputs {
        if !spec.inputs.iter().any(|input| input.name == role) {
            let known: Vec<_> = spec.inputs.iter().map(|input| input.name).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            bail!("--in {role}=: {} has no such input; its inputs: {known}", spec.name);
        }
        let given = path.display().to_string();
        if let Some(first) = roles.insert(role.clone(), path) {
            bail!("--in {role}= is given twice, as `{}` and `{given}`; keep one", first.display());
        }
    }
    Ok(roles)
}

/// Runs a stage whose folder is not finished, and marks the folder when it is.
///
/// Of several ranks, the first one claims and marks the folder, and the others wait for it.
fn run_once(spec: &Spec, job: &Job, run: impl FnOnce() -> Result<()>) -> Result<()> {
    if !job.communicator.is_first() {
        let is_finished = job.communicator.any(false)?;
        return if is_finished {
            Ok(())
        } else {
            run().and_then(|()| Ok(job.communicator.barrier()?))
        };
    }
    // Before the claim: a finished folder may be on a read-only file system.
    let is_finished = || finished::is_finished(&job.out);
    let say_finished = || {
        job.communicator.any(true)?; // The ranks need not run.
        tracing::info!("`{}` is finished; remove it to run again", job.out.display());
        Ok(())
    };
    if is_finished() {
        return say_finished();
    }
    let _claim = Claim::wait(&job.out, &job.interrupt)?;
    if is_finished() {
        return say_finished();
    }
    fs::create_dir_all(&job.out)
        .with_context(|| format!("creating the output folder `{}`", job.out.display()))?;
    files::remove_unfinished(&job.out)?;
    if finished::prepare_to_resume(&job.out)? {
        tracing::warn!(
            "`{}` was finished, but a file is missing or damaged now; its step runs again",
            job.out.display()
        );
    }
    job.communicator.any(false)?;
    run()?;
    finished::mark(&job.out, spec.name, Some(spec.algorithm), finished::Digests::Listed)?;
    Ok(job.communicator.barrier()?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{DONE, Origin, Role, json};

    const SPEC: Spec = Spec {
        name: "example",
        algorithm: 1,
        inputs: &[
            Role::new("network", Origin::Network),
            Role::new("previous", Origin::PreviousRound),
        ],
        outputs: &[],
        ranks: Ranks::Any,
    };

    fn job(out: &Path) -> Job {
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
        Job::new("example", "i.safetensors", out, data)
    }

    #[test]
    fn a_finished_folder_is_not_run_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let job = job(&folder.path().join("out"));
        let mut runs = 0;
        let mut once = || {
            runs += 1;
            Ok(())
        };
        run_once(&SPEC, &job, &mut once).expect("runs");
        run_once(&SPEC, &job, &mut once).expect("is finished");
        assert_eq!(runs, 1);
        let mark: finished::FinishedMark = json::read(&job.out.join(DONE)).expect("there");
        assert_eq!((mark.algorithm, &*mark.stage), (Some(1), "example"));
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 1, "no lock is left");
    }

    #[test]
    fn a_folder_that_lost_an_output_runs_again_from_scratch() {
        let folder = tempfile::tempdir().expect("a folder");
        let job = job(&folder.path().join("out"));
        let run = || {
            assert!(!job.out.join("state").exists(), "an old state without its results");
            files::write(&job.out.join("state"), b"all done")?;
            files::write(&job.out.join("result"), b"42")
        };
        run_once(&SPEC, &job, run).expect("runs");
        fs::remove_file(job.out.join("result")).expect("removed");
        run_once(&SPEC, &job, run).expect("runs again");
        assert_eq!(fs::read(job.out.join("result")).expect("there"), b"42");
        run_once(&SPEC, &job, || bail!("ran a third time")).expect("is finished");
    }

    #[test]
    fn a_second_writer_waits_for_the_first_and_finds_its_work_done() {
        let folder = tempfile::tempdir().expect("a folder");
        let job = job(&folder.path().join("out"));
        thread::scope(|scope| {
            let claim = Claim::wait(&job.out, &job.interrupt).expect("free");
            let second = scope.spawn(|| run_once(&SPEC, &job, || bail!("ran a second time")));
            thread::sleep(Duration::from_millis(50));
            fs::create_dir_all(&job.out).expect("created");
            finished::mark(&job.out, "first", None, finished::Digests::Listed).expect("marked");
            drop(claim);
            second.join().expect("no panic").expect("nothing to do");
        });
    }

    #[test]
    fn of_several_ranks_the_first_claims_and_marks_and_a_finished_folder_runs_on_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out");
        let runs = std::sync::atomic::AtomicUsize::new(0);
        let on_ranks = || {
            let ranks = Communicator::threads(4).expect("a power of two");
            thread::scope(|scope| {
                for communicator in ranks {
                    let (job, runs) = (Job { communicator, ..job(&out) }, &runs);
                    scope.spawn(move || {
                        let run = || {
                            assert!(job.out.exists(), "the first has made it");
                            runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            Ok(())
                        };
                        run_once(&SPEC, &job, run).expect("runs");
                        assert!(finished::is_finished(&job.out), "the first has marked it");
                    });
                }
            });
            runs.load(std::sync::atomic::Ordering::Relaxed)
        };
        assert_eq!((on_ranks(), on_ranks()), (4, 4));
        assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 1, "no lock is left");
    }

    #[test]
    fn roles_are_read_and_a_second_one_of_a_name_and_a_foreign_one_are_refused() {
        let read = |inputs: &[(&str, &str)]| {
            let given = inputs.iter().map(|(role, path)| ((*role).to_owned(), path.into()));
            inputs_by_role(&SPEC, given.collect())
        };
        let roles = read(&[("network", "a"), ("previous", "b")]).expect("distinct");
        assert_eq!(roles["network"], Path::new("a"));
        assert_eq!(roles["previous"], Path::new("b"));
        let twice = read(&[("network", "a"), ("network", "b")]).expect_err("twice").to_string();
        assert!(twice.contains("`a` and `b`"), "{twice}");
        let foreign = read(&[("netwrok", "a")]).expect_err("foreign").to_string();
        assert!(foreign.contains("network, previous"), "{foreign}");
    }
}
