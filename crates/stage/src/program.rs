//! From `main` to the stage's `run`, and from its result to the exit status.

use std::collections::BTreeMap;
use std::env::ArgsOs;
use std::fmt::{self, Debug};
use std::fs::{self, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, FromArgMatches};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing_subscriber::EnvFilter;

use crate::{Arguments, DataTable, DeviceChoice, Experiment, files, memory};

/// The file a stage writes last: a folder that holds it is finished.
pub const DONE: &str = "done.json";

/// What a stage is asked to do: its arguments with the shared table `[data]` read.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Name of the program, and of its table.
    pub name: &'static str,
    /// The experiment file, for messages.
    pub experiment: PathBuf,
    /// `images.safetensors`.
    pub images: PathBuf,
    /// Folders of earlier outputs by role.
    pub inputs: BTreeMap<String, PathBuf>,
    /// Folder to write into.
    pub out: PathBuf,
    /// Which round of the loop this is, from 0.
    pub round: usize,
    /// How many rounds follow round 0.
    pub rounds: usize,
    /// Seed of every random draw.
    pub seed: u64,
    /// Where to compute.
    pub device: DeviceChoice,
    /// The table `[data]`.
    pub data: DataTable,
}

impl Stage {
    /// The folder that plays `role`.
    ///
    /// # Errors
    ///
    /// It was not given; the message says which flag to add.
    pub fn input(&self, role: &str) -> Result<&Path> {
        self.optional_input(role).with_context(|| {
            format!(
                "{} needs a {role}: add --in {role}=DIR with the folder that holds it",
                self.name
            )
        })
    }

    /// The folder that plays `role`, where one was given.
    pub fn optional_input(&self, role: &str) -> Option<&Path> {
        self.inputs.get(role).map(PathBuf::as_path)
    }

    /// Says, from the program's check, how many pictures this step will pass through a backbone:
    /// one for each forward pass, with gradient or without, weighted by pixels where a crop is
    /// smaller than the network's input. Under `--check` the program prints it as
    /// `backbone-pictures`, before its table; `cargo xtask compare` holds systems to equal sums.
    pub fn declare_effort(&self, backbone_pictures: f64) {
        BACKBONE_PICTURES.store(backbone_pictures.to_bits(), Ordering::Relaxed);
    }

    /// True once the user or the system asked the program to stop: save at the next step, and
    /// return [`Interrupted`].
    pub fn interrupted(&self) -> bool {
        INTERRUPTED.load(Ordering::Relaxed)
    }

    /// Appends one JSON object as a line of `log.jsonl`, the one file that may hold times.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn log(&self, line: &impl Serialize) -> Result<()> {
        let path = self.out.join("log.jsonl");
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .with_context(|| format!("writing `{}`", path.display()))
    }
}

/// The error of a stage that stopped because it was asked to; it can be resumed. Exit status 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted; the same command goes on from here")
    }
}

impl std::error::Error for Interrupted {}

/// The error of a stage whose training left the finite numbers or collapsed. Exit status 4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diverged(pub String);

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Diverged {}

/// The exit status of a result: 0 done; 2 bad input or arguments; 3 interrupted and resumable;
/// 4 diverged or collapsed.
pub fn exit_code(result: &Result<()>) -> u8 {
    match result {
        Ok(()) => 0,
        Err(error) if error.is::<Interrupted>() => 3,
        Err(error) if error.is::<Diverged>() => 4,
        Err(_) => 2,
    }
}

/// The whole of a stage's `main`: reads arguments and table, checks or runs, says what happened.
///
/// - `name`: of the program; its configuration is the experiment's table `[name]`.
/// - `algorithm`: raised by hand when the stage's results change for the same table, so that
///   nothing computed by the older code is taken for its own.
/// - `check`: what can be found wrong before anything runs. Under `--check` it sees only the
///   inputs that exist already.
/// - `run`: the stage. It is not called when the output folder is finished already.
/// - `words`: the command line, whose first word is the program's name: all of
///   [`std::env::args_os`] in a program of its own, what follows `assort` in that one.
///
/// Returns the exit status, see [`exit_code`]; the error goes to stderr.
pub fn run_program<C: DeserializeOwned + Serialize + Debug>(
    name: &'static str,
    algorithm: u32,
    check: fn(&C, &Stage) -> Result<()>,
    run: fn(&C, &Stage) -> Result<()>,
    words: ArgsOs,
) -> ExitCode {
    start_logging();
    let command = Arguments::command().name(name).version(algorithm_version(algorithm));
    let arguments = match Arguments::from_arg_matches(&command.get_matches_from(words)) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let result = check_or_run(name, algorithm, &arguments, check, run);
    if let Err(error) = &result {
        eprintln!("{name}: {error:#}");
    }
    ExitCode::from(exit_code(&result))
}

/// What `<stage> --version` prints, and `xtask` makes part of a stage's key.
fn algorithm_version(algorithm: u32) -> clap::builder::Str {
    format!("algorithm {algorithm}").into()
}

fn check_or_run<C: DeserializeOwned + Serialize + Debug>(
    name: &'static str,
    algorithm: u32,
    arguments: &Arguments,
    check: fn(&C, &Stage) -> Result<()>,
    run: fn(&C, &Stage) -> Result<()>,
) -> Result<()> {
    let experiment = Experiment::read(&arguments.experiment)?;
    let config: C = experiment.table(name)?;
    let data: DataTable = experiment.table("data")?;
    data.check()?;
    let stage = Stage {
        name,
        experiment: arguments.experiment.clone(),
        images: arguments.images.clone(),
        inputs: arguments.inputs_by_role()?,
        out: arguments.out.clone(),
        round: arguments.round,
        rounds: arguments.rounds,
        seed: arguments.seed,
        device: arguments.device,
        data,
    };
    if stage.round > stage.rounds {
        bail!("--round {} lies behind the last, --rounds {}", stage.round, stage.rounds);
    }
    check(&config, &stage)?;
    if arguments.check {
        let pictures = f64::from_bits(BACKBONE_PICTURES.load(Ordering::Relaxed));
        print!("backbone-pictures = {pictures:?}\n\n[{name}]\n{}", toml::to_string(&config)?);
        return Ok(());
    }
    let advised = |error| memory::advise(error, name, &config);
    run_once(&stage, algorithm, || run(&config, &stage).map_err(advised))
}

/// Runs a stage whose folder is not finished, and marks the folder when it is.
fn run_once(stage: &Stage, algorithm: u32, run: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = stage.out.join(DONE);
    if done.exists() {
        tracing::info!("`{}` is finished; remove it to run again", stage.out.display());
        return Ok(());
    }
    fs::create_dir_all(&stage.out)
        .with_context(|| format!("creating the output folder `{}`", stage.out.display()))?;
    files::remove_unfinished(&stage.out)?;
    // Asking twice ends the program at once; what was saved stays whole.
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(3);
        }
    })
    .context("listening for interrupts")?;
    run()?;
    let mark = serde_json::json!({ "algorithm": algorithm, "stage": stage.name });
    files::write(&done, format!("{mark}\n").as_bytes())
}

/// Bits of what [`Stage::declare_effort`] was told last; 0 for a program without a backbone.
static BACKBONE_PICTURES: AtomicU64 = AtomicU64::new(0);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Sends log lines to stderr, `info` and above unless `RUST_LOG` says otherwise.
pub fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call in one process, as in tests, finds the first in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_what_happened_through_added_context() {
        assert_eq!(exit_code(&Ok(())), 0);
        assert_eq!(exit_code(&Err(anyhow::anyhow!("no such file"))), 2);
        assert_eq!(exit_code(&Err(anyhow::Error::new(Interrupted).context("epoch 3"))), 3);
        assert_eq!(exit_code(&Err(anyhow::Error::new(Diverged("loss is NaN".into())))), 4);
    }

    fn stage(out: &Path) -> Stage {
        Stage {
            name: "example",
            experiment: "e.toml".into(),
            images: "i.safetensors".into(),
            inputs: BTreeMap::from([("network".to_owned(), PathBuf::from("n"))]),
            out: out.to_owned(),
            round: 0,
            rounds: 0,
            seed: 0,
            device: DeviceChoice::Cpu,
            data: DataTable { clusters: 2, train_on: vec![], score_on: vec![] },
        }
    }

    #[test]
    fn a_missing_role_names_the_flag() {
        let stage = stage(Path::new("o"));
        assert_eq!(stage.input("network").expect("given"), Path::new("n"));
        assert_eq!(stage.optional_input("previous"), None);
        let error = stage.input("embeddings").expect_err("absent").to_string();
        assert!(error.contains("--in embeddings=DIR") && error.contains("example"), "{error}");
    }

    #[test]
    fn a_finished_folder_is_not_run_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let stage = stage(&folder.path().join("out"));
        let mut runs = 0;
        let mut once = || {
            runs += 1;
            Ok(())
        };
        run_once(&stage, 1, &mut once).expect("runs");
        run_once(&stage, 1, &mut once).expect("is finished");
        assert_eq!(runs, 1);
        stage.log(&serde_json::json!({"epoch": 1})).expect("logged");
        stage.log(&serde_json::json!({"epoch": 2})).expect("logged");
        let log = fs::read_to_string(stage.out.join("log.jsonl")).expect("there");
        assert_eq!(log, "{\"epoch\":1}\n{\"epoch\":2}\n");
    }
}
