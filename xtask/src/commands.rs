//! The command line.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use stage::console::{print, print_line, start_logging};
use stage::{DeviceChoice, Interrupt, Spec, Status};

use crate::programs::{self, HELPER};
use crate::reproduce::resolved;
use crate::{
    CommandContext, Registry, cluster, clusters, compare, export, jobs, predict, prepare, report,
    reproduce, view,
};

/// Sorts unlabelled images into groups: deep image clustering.
#[derive(Debug, Parser)]
#[command(name = "assort", bin_name = "assort", disable_version_flag = true)]
struct AssortCli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Group a folder of photographs by their embeddings from a published backbone.
    #[command(after_help = "\
Run it again after adding pictures or with another number of clusters: finished steps are not repeated.

Examples
  assort cluster photos/
  assort cluster photos/ --clusters 12 --copy-to sorted/")]
    Cluster {
        #[command(flatten)]
        options: cluster::ClusterOptions,
    },
    /// Run an experiment from pictures to scores; finished steps are not repeated.
    #[command(after_help = "\
Examples
  assort reproduce digits --seeds 3
  assort reproduce digits --set pretraining.run.epochs=50
  assort reproduce imagenette-small --images photos/ --set data.clusters=12")]
    Reproduce {
        #[command(flatten)]
        options: reproduce::ReproduceOptions,
        /// Run this many seeds, from --seed on.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        seeds: Option<u64>,
        #[command(flatten)]
        jobs: jobs::JobsOption,
        /// Also write a record of the results into this folder; configs/results keeps those of the project.
        #[arg(long, value_name = "DIR")]
        record: Option<PathBuf>,
        /// Print the results as one JSON object at the end, and the progress as JSON lines on stderr.
        #[arg(long)]
        json: bool,
    },
    /// Convert pictures to the files that every stage reads, and print their folder.
    #[command(after_help = "\
Examples
  assort prepare digits
  assort prepare photos.zip
  assort prepare imagenet-dogs --images ILSVRC2012_img_train.tar")]
    Prepare {
        #[command(flatten)]
        options: prepare::PrepareOptions,
    },
    /// Run one step of an experiment on the results of the steps before it.
    #[command(after_help = "\
Examples
  assort stage pretraining digits
  assort stage clustering digits --round 1")]
    Stage {
        /// The step's place: prepare, a place of the experiment's `[rounds]`, or metrics.
        place: String,
        #[command(flatten)]
        options: reproduce::ReproduceOptions,
        /// The round; by default the first that has this step.
        #[arg(long, value_name = "T")]
        round: Option<usize>,
    },
    /// Run all systems on one data set with equal backbone and effort, and all ways to cluster one frozen
    /// embedding (heads); print a table of each.
    #[command(after_help = "\
Examples
  assort compare digits --seeds 3
  assort compare digits --tables heads")]
    Compare {
        #[command(flatten)]
        options: compare::CompareOptions,
    },
    /// Show a run as a page, a table, and folders of pictures.
    #[command(after_help = "\
Examples
  assort report digits
  assort report digits --merge 3,7 --copy-to sorted/")]
    Report {
        #[command(flatten)]
        options: report::ReportOptions,
    },
    /// Serve the page of a run to a browser on this machine: for large sets.
    #[command(after_help = "\
Prints an address to open in a browser. Ctrl-C ends it.

Example
  assort view digits")]
    View {
        #[command(flatten)]
        options: view::ViewOptions,
    },
    /// Write a run's embeddings and clusters for other tools: NumPy, pandas, a database.
    #[command(after_help = "\
Examples
  assort export digits --format npy
  assort export digits --format parquet --space projection --out tables/")]
    Export {
        #[command(flatten)]
        options: export::ExportOptions,
    },
    /// Assign other pictures to the clusters of a run.
    #[command(after_help = "\
Example
  assort predict digits --images later/")]
    Predict {
        #[command(flatten)]
        options: predict::PredictOptions,
    },
    /// Estimate the number of clusters from a run's embeddings: a curve of scores without ground
    /// truth.
    #[command(after_help = "\
RUN may also be the folder of an embed step, or the file of its embeddings.

Examples
  assort clusters digits --to 20
  assort clusters runs/digits/0/0-embed")]
    Clusters {
        #[command(flatten)]
        options: clusters::ClustersOptions,
    },
    /// List the experiments.
    List,
    /// Print an experiment with every value that a run would use.
    #[command(after_help = "\
Example
  assort show digits --set shared.backbone.width=32")]
    Show {
        /// Name of the experiment, or path of its file.
        experiment: String,
        /// Change a value: table.key=value.
        #[arg(long, value_name = "TABLE.KEY=VALUE")]
        set: Vec<String>,
    },
    /// Compare a device with the CPU: exit status 1 if they differ.
    GpuCheck {
        /// The device: auto, cuda, cuda:N or metal.
        #[arg(default_value_t = DeviceChoice::Auto)]
        device: DeviceChoice,
        /// Compare what this many processes, each on its own GPU, share: their sums and a training step.
        #[arg(long, value_name = "N", default_value_t = 1)]
        ranks: usize,
    },
    /// Print a script that makes a shell complete commands and flags.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page of a command, or of all.
    Man {
        /// A command, such as reproduce.
        command: Option<String>,
    },
}

/// Runs the command line `words`, which start with the program's name, and returns the exit status.
///
/// The second word is a command, or the name of a stage followed by its command line.
pub fn main(registry: Registry, words: Vec<OsString>) -> ExitCode {
    let word = |position: usize| words.get(position).and_then(|word| word.to_str());
    let stage = registry.stages.iter().find(|stage| Some(stage.spec.name) == word(1));
    if let Some(stage) = stage {
        let name = OsString::from(format!("assort {}", stage.spec.name));
        return stage.main([name].into_iter().chain(words[2..].iter().cloned()));
    }
    let is_helper = word(1) == Some(HELPER);
    let helper = registry.helpers.iter().find(|helper| Some(helper.name) == word(2));
    if let Some(helper) = helper.filter(|_| is_helper) {
        return (helper.main)(words[2..].to_vec());
    }
    start_logging();
    let version = matches!(word(1), Some("--version" | "-V"));
    let result = match version {
        true => print_line(version_of(&registry)).map(|()| ExitCode::SUCCESS),
        false => parsed_and_followed(registry, words),
    };
    match result {
        Ok(status) => status,
        Err(error) => stage::finish("assort", &Err(error)),
    }
}

fn version_of(registry: &Registry) -> String {
    format!("assort {}, {}", env!("CARGO_PKG_VERSION"), (registry.devices.describe)())
}

/// Parses the words and runs the command.
fn parsed_and_followed(registry: Registry, words: Vec<OsString>) -> Result<ExitCode> {
    let matches = match command(&registry).try_get_matches_from(words) {
        Ok(matches) => matches,
        Err(error) => return explained(&error),
    };
    let parsed = match AssortCli::from_arg_matches(&matches) {
        Ok(parsed) => parsed,
        Err(error) => return explained(&error),
    };
    let session = CommandContext { registry, interrupt: Interrupt::listen_without_exit()? };
    follow(&session, parsed.command)
}

/// Prints help, or the error in the command line, as plain text: [`print()`] escapes colours.
fn explained(error: &clap::Error) -> Result<ExitCode> {
    if error.use_stderr() {
        stage::console::print_error(error.render());
        return Ok(Status::BadInput.into());
    }
    print(error.render())?;
    Ok(ExitCode::SUCCESS)
}

/// The command line with the stages, for parsing, help, completions and manual pages.
fn command(registry: &Registry) -> clap::Command {
    let stages = registry.stages.iter().map(|stage| {
        stage::StageArguments::command()
            .name(stage.spec.name)
            .about("Run one stage alone: files in, files out")
            .hide(true)
    });
    AssortCli::command()
        .subcommands(stages)
        .help_template(HELP.replace("{stages}", &stage_names(&registry.specs())))
}

/// The names of the stages, in lines of at most 78 characters.
fn stage_names(stages: &[Spec]) -> String {
    let (mut text, mut width) = (String::new(), 0);
    for stage in stages {
        let separator = match width {
            0 => "",
            width if width + 1 + stage.name.len() > 78 => "\n  ",
            _ => " ",
        };
        width = stage.name.len() + if separator == " " { width + 1 } else { 0 };
        text.extend([separator, stage.name]);
    }
    text
}

/// The help of the whole program, on one screen.
const HELP: &str = "\
{about}

Usage: assort COMMAND …, assort COMMAND --help

Group photographs
  cluster PATH            into a page, a table, folders of pictures
Run an experiment
  reproduce EXPERIMENT    from pictures to scores; finished steps are kept
  stage PLACE EXPERIMENT  one step of it
  compare DATA-SET        all systems on one data set; all ways to cluster
  prepare WHAT            convert pictures to the files that every stage reads
Look at the results
  report RUN              a page, a table, folders of pictures
  view RUN                the same page in a browser, for large sets
  predict RUN             assign other pictures to clusters (--images PATH)
  export RUN              embeddings as .npy or Parquet, for other tools
  clusters RUN            estimate the number of clusters
Look around
  list                    the experiments
  show EXPERIMENT         one of them, with every value
  gpu-check [DEVICE]      compare a device with the CPU, or several with one
  completions SHELL       for bash, elvish, fish, powershell, zsh
  man [COMMAND]           manual pages
Single stages (assort STAGE --help)
  {stages}

Examples
  assort cluster photos/ --clusters 12 --copy-to sorted/
  assort reproduce digits --seeds 3
  assort report digits
  assort reproduce imagenette-small --images photos/ --set data.clusters=12
  assort predict imagenette-small --images later/

Exit status: 0 done, 2 bad input, 3 interrupted (the same command resumes),
4 diverged or collapsed, 5 the machine failed.
";

fn follow(session: &CommandContext, command: Command) -> Result<ExitCode> {
    match command {
        Command::Cluster { options } => {
            report_progress(options.json);
            cluster::run(session, &options)
        }
        Command::Reproduce { options, seeds, jobs, record, json } => {
            report_progress(json);
            let seeds = (0..seeds.unwrap_or(1))
                .map(|more| options.seed.saturating_add(more))
                .collect::<Vec<_>>();
            reproduce::reproduce(session, &options, &seeds, jobs.jobs, record.as_deref(), json)
        }
        Command::Prepare { options } => prepare::run(session, &options),
        Command::Stage { place, options, round } => {
            reproduce::stage(session, &options, &place, round)
        }
        Command::Compare { options } => {
            report_progress(options.json);
            compare::run(session, &options)
        }
        Command::Report { options } => report::run(session, &options),
        Command::View { options } => view::run(session, &options),
        Command::Export { options } => export::run(session, &options),
        Command::Predict { options } => predict::run(session, &options),
        Command::Clusters { options } => {
            report_progress(options.json);
            clusters::run(session, &options)
        }
        Command::List => list(session),
        Command::Show { experiment, set } => print(resolved(session, &experiment, &set)?.to_toml()),
        Command::GpuCheck { device, ranks } if ranks != 1 => {
            return check_on_ranks(device, ranks);
        }
        Command::GpuCheck { device, .. } => {
            let agrees = (session.registry.devices.check)(device)?;
            return Ok(ExitCode::from(u8::from(!agrees)));
        }
        Command::Completions { shell } => print(completions(&session.registry, shell)?),
        Command::Man { command } => print(manual(&session.registry, command.as_deref())?),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Starts this command on several ranks, and returns their exit status.
fn check_on_ranks(device: DeviceChoice, ranks: usize) -> Result<ExitCode> {
    programs::check_ranks(ranks)?;
    let program = env::current_exe().context("finding the file of this program")?;
    let mut command = programs::launcher(ranks, &program);
    command.arg("gpu-check").arg(device.to_string());
    let status = command.status().with_context(|| format!("starting `{}`", programs::LAUNCHER))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(Status::MachineFailed.code())))
}

/// Reports the progress as JSON, if that is wanted.
fn report_progress(as_json: bool) {
    if as_json {
        stage::progress::use_json();
    }
}

fn list(session: &CommandContext) -> Result<()> {
    let library = &session.registry.library;
    let names = library.names()?;
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0);
    for name in names {
        let experiment = library.open(&name)?;
        let (system, title) = (experiment.system()?, experiment.title()?);
        print_line(format_args!("{name:width$}  {system:8} {title}"))?;
    }
    Ok(())
}

fn completions(registry: &Registry, shell: Shell) -> Result<String> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command(registry), "assort", &mut text);
    String::from_utf8(text).context("completions are text")
}

/// The manual page of a command, or of the whole program.
fn manual(registry: &Registry, name: Option<&str>) -> Result<String> {
    let mut whole = command(registry);
    whole.build();
    let command = match name {
        None => whole,
        Some(name) => match whole.find_subcommand(name) {
            Some(found) => found.clone().name(format!("assort-{name}")),
            None => bail!("there is no command `{name}`; `assort --help` lists them"),
        },
    };
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    String::from_utf8(text).context("a manual page is text")
}

#[cfg(test)]
mod tests {
    use stage::Ranks;

    use super::*;

    #[test]
    fn the_command_line_is_valid() {
        AssortCli::command().debug_assert();
    }

    #[test]
    fn help_fits_one_screen_and_names_every_command() {
        let help = HELP;
        assert!(help.lines().count() <= 40, "{} lines", help.lines().count());
        assert!(help.lines().all(|line| line.chars().count() <= 80));
        let mut whole = AssortCli::command();
        whole.build();
        for command in whole.get_subcommands_mut().filter(|one| one.get_name() != "help") {
            let name = command.get_name().to_owned();
            assert!(help.contains(&format!("\n  {name} ")), "{name} is missing");
            // Without a long text anywhere, `--help` prints the short form.
            let is_long = command.get_arguments().any(|one| one.get_long_help().is_some());
            assert!(!is_long && command.get_long_about().is_none(), "{name}");
            let own = command.render_help().to_string();
            assert!(own.lines().count() <= 28, "{name}: {} lines", own.lines().count());
            let has_example = own.contains(&format!("  assort {name} "));
            let is_plain = ["list", "gpu-check", "completions", "man"].contains(&&*name);
            assert!(has_example || is_plain, "{name} has no example");
        }
    }

    #[test]
    fn names_of_stages_are_wrapped() {
        let spec = |name| Spec { name, algorithm: 0, inputs: &[], outputs: &[], ranks: Ranks::One };
        assert_eq!(stage_names(&[spec("a"), spec("b")]), "a b");
        let long = [spec("prototype-refinement"); 5];
        let lines = stage_names(&long);
        assert_eq!(lines.lines().count(), 2);
        assert!(lines.lines().all(|line| line.trim().len() <= 78), "{lines}");
        assert_eq!(lines.split_whitespace().count(), 5);
    }
}
