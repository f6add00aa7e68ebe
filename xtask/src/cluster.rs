//! `assort cluster`: groups a folder of photographs.
//!
//! It runs the experiment `photos` or `photos-scratch` like any other: prepare, embed with a
//! published backbone, cluster, report. If the number of clusters is not given, the steps up to the
//! embeddings run first, and the helper `clusters` estimates the number from those.
//!
//! If the folder of the run has corrections by hand, the report applies them after clustering, also when
//! pictures were added. No head is trained on them.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use stage::console::{print, print_line};
use stage::{DeviceChoice, Experiment, Output};

use crate::CommandContext;
use crate::clusters::{CLUSTERS, EMBEDDINGS};
use crate::owner;
use crate::plan::{Arm, RunPlan};
use crate::process::Process;
use crate::programs::Executable;
use crate::record::CORRECTIONS;
use crate::report::{self, ReportOptions, TABLE};
use crate::reproduce::run_seeds;
use crate::run::ExperimentRun;
use crate::setup::{Setup, SetupOptions};

/// The command line.
#[derive(Debug, clap::Args)]
pub struct ClusterOptions {
    /// The pictures: a folder, an archive, or any other source that `assort prepare` reads.
    pub path: PathBuf,
    /// How many clusters: a number, or auto for an estimate.
    #[arg(long, value_name = "K", default_value = "auto")]
    pub clusters: ClusterCount,
    /// The backbone that embeds the pictures: the name of a published one, hf://OWNER/NAME@COMMIT,
    /// a file or folder, or scratch to train one on the pictures alone.
    #[arg(long, value_name = "NAME", default_value = "dinov2-small")]
    pub backbone: String,
    /// Folder for the page and the table; by default `report` in the run's folder.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Copy every picture to a folder of its cluster, in DIR.
    #[arg(long, value_name = "DIR")]
    pub copy_to: Option<PathBuf>,
    /// Link to every picture from a folder of its cluster, in DIR.
    #[arg(long, value_name = "DIR")]
    pub link_to: Option<PathBuf>,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Keep results in this folder.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs: PathBuf,
    /// Print the results as one JSON object at the end, and the progress as JSON lines on stderr.
    #[arg(long)]
    pub json: bool,
}

/// The number of clusters that the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterCount {
    /// Exactly this many.
    Given(usize),
    /// Estimated from the embeddings.
    Auto,
}

impl FromStr for ClusterCount {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word.parse() {
            _ if word == "auto" => Ok(Self::Auto),
            Ok(clusters) if clusters >= 2 => Ok(Self::Given(clusters)),
            _ => Err("give a number from 2, or auto".to_owned()),
        }
    }
}

/// The backbone name for training one on the pictures alone.
const SCRATCH: &str = "scratch";

/// Seed of every random draw.
const SEED: u64 = 0;

/// The most clusters that an estimate considers.
const MOST: usize = 50;

/// Groups the pictures, prints the scores, and prints where the page, table and folders are.
pub fn run(session: &CommandContext, options: &ClusterOptions) -> Result<()> {
    for (flag, folder) in picture_folders(options) {
        ensure!(
            !crate::source::is_inside(folder, &options.path)?,
            "{flag} `{}` is inside the folder of pictures, so the next run would group the sorted \
             pictures too; name a folder elsewhere",
            folder.display()
        );
    }
    if let (Some(copies), Some(links)) = (&options.copy_to, &options.link_to) {
        ensure!(
            crate::source::resolved(copies)? != crate::source::resolved(links)?,
            "--copy-to and --link-to name the same folder `{}`; name two",
            copies.display()
        );
    }
    if options.link_to.is_some() {
        ensure!(
            options.path.is_dir(),
            "--link-to: `{}` is not a folder, so there are no files to link to; use --copy-to",
            options.path.display()
        );
    }
    let setup = setup_options(options);
    let pictures = crate::source::absolute_source(&options.path)?;
    crate::source::require(&pictures)?;
    let mut experiment = experiment(session, options, &pictures)?;
    find_outside(session, &experiment)?;
    crate::source::mark_results(&options.runs, &pictures, "--runs")?;
    if let Some(out) = &options.out {
        crate::source::mark_results(out, &pictures, "--out")?;
    }
    experiment.name = owner::claim(&options.runs, &experiment.name, &pictures, &session.interrupt)?;
    let run = options.runs.join(&experiment.name).join(SEED.to_string());
    check_corrections(&run)?;
    check_folders(options, &run)?;
    let clusters = match options.clusters {
        ClusterCount::Given(clusters) => clusters,
        ClusterCount::Auto => estimated(session, &experiment, &setup)?,
    };
    experiment.set(&format!("data.clusters={clusters}"))?;
    let results = run_seeds(session, experiment, &setup, &[SEED], false)?;
    let results = results.context("a run that is not dry has results")?;
    print(results.table())?;
    print_line("")?;
    let (copy_to, link_to) = (options.copy_to.clone(), options.link_to.clone());
    let page = ReportOptions::of_run(&run, options.out.clone());
    report::run(session, &page.with_folders(copy_to, link_to))?;
    print_line(format_args!("to correct the clusters: assort view {}", run.display()))?;
    if options.json {
        print_line(results.json())?;
    }
    Ok(())
}

/// The folders for sorted pictures that the user names, by their flags.
fn picture_folders(options: &ClusterOptions) -> impl Iterator<Item = (&'static str, &Path)> {
    [("--copy-to", &options.copy_to), ("--link-to", &options.link_to)]
        .into_iter()
        .filter_map(|(flag, folder)| Some((flag, folder.as_deref()?)))
}

/// Fails where a folder for sorted pictures exists although this run has not sorted any, or holds
/// something else than folders of clusters. The report later compares the pictures themselves.
fn check_folders(options: &ClusterOptions, run: &Path) -> Result<()> {
    let report = options.out.clone().unwrap_or_else(|| run.join("report"));
    let is_reported = report.join(TABLE).exists();
    for (flag, folder) in picture_folders(options).filter(|(_, folder)| folder.exists()) {
        let is_cluster = |entry: fs::DirEntry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let begins = name.starts_with(|sign: char| sign.is_ascii_digit());
            entry.path().is_dir() && (begins || ["wrong", "outliers"].contains(&&*name))
        };
        let is_sorted =
            is_reported && fs::read_dir(folder).is_ok_and(|all| all.flatten().all(is_cluster));
        ensure!(
            is_sorted,
            "{flag} `{}` exists already and does not hold the sorted pictures of this run; name a \
             new folder, or move it away",
            folder.display()
        );
    }
    Ok(())
}

/// The experiment, renamed after the pictures.
fn experiment(
    session: &CommandContext,
    options: &ClusterOptions,
    pictures: &Path,
) -> Result<Experiment> {
    let is_scratch = options.backbone == SCRATCH;
    let name = if is_scratch { "photos-scratch" } else { "photos" };
    let mut experiment = session.registry.library.open(name)?;
    if !is_scratch {
        let backbone = toml::Value::from(options.backbone.as_str());
        experiment.set(&format!("pretrained.backbone={backbone}"))?;
    }
    let word = if pictures.is_dir() { pictures.file_name() } else { pictures.file_stem() };
    let word = crate::source::plain_name(&word.unwrap_or_default().to_string_lossy());
    experiment.name = format!("{name}-{word}");
    Ok(experiment)
}

/// Fails where the corrections of the run are not TOML, before anything is computed.
fn check_corrections(run: &Path) -> Result<()> {
    let file = run.join(CORRECTIONS);
    let Ok(text) = fs::read_to_string(&file) else { return Ok(()) };
    text.parse::<toml::Table>()
        .map(|_| ())
        .with_context(|| format!("reading `{}`, the corrections of this run", file.display()))
}

/// Finds what the stages read from outside, so that a backbone that cannot be fetched is noticed before
/// thousands of pictures are prepared.
fn find_outside(session: &CommandContext, experiment: &Experiment) -> Result<()> {
    let stages = session.registry.stages.iter();
    for stage in stages.filter(|stage| experiment.has_table(stage.spec.name)) {
        stage.identity(experiment, &session.interrupt)?;
    }
    Ok(())
}

fn setup_options(options: &ClusterOptions) -> SetupOptions {
    SetupOptions {
        device: options.device,
        ranks: 1,
        images: Some(options.path.clone()),
        dry_run: false,
        runs: options.runs.clone(),
    }
}

/// Runs the steps up to the first embeddings and estimates the number of clusters from them.
fn estimated(
    session: &CommandContext,
    experiment: &Experiment,
    options: &SetupOptions,
) -> Result<usize> {
    let plan = RunPlan::of(experiment, &session.registry.specs())?;
    let embeds =
        |&position: &usize| plan.steps[position].place.outputs.contains(&Output::Embeddings);
    let embed = plan.of_arm(Arm::Main).find(embeds);
    let embed = embed.with_context(|| format!("`{}` has no step that embeds", experiment.name))?;
    let positions: Vec<usize> = (0..=embed).collect();
    let setup = Setup::new(session, &plan, options)?;
    let _data = setup.prepare()?;
    let run = ExperimentRun::new(SEED, &setup)?;
    run.check(&positions, false)?;
    run.execute(&positions, false)?;
    let (count, results) = (setup.prepared.count()?, run.folder(embed));
    let step = results.file_name().unwrap_or_default().to_string_lossy();
    let scored =
        Scored { estimator: ESTIMATOR, step: step.into_owned(), most: MOST.min(count / 4).max(2) };
    let folder = setup.experiment_folder().join(SEED.to_string());
    let kept = folder.join("number-of-clusters.json");
    let estimate = match stage::json::read::<KeptEstimate>(&kept) {
        Ok(kept) if kept.scored == scored => kept.estimate,
        // Nothing kept, of other embeddings, or damaged: it is computed anew.
        _ => {
            let estimate = estimate(session, &results.join(EMBEDDINGS), scored.most)?;
            fs::create_dir_all(&folder).with_context(|| format!("`{}`", folder.display()))?;
            stage::json::write(&kept, &KeptEstimate { scored, estimate })?;
            estimate
        }
    };
    chosen(estimate, count)
}

/// Raised when the estimate of the same embeddings changes.
const ESTIMATOR: u32 = 1;

/// What an estimate depends on.
#[derive(PartialEq, Serialize, Deserialize)]
struct Scored {
    estimator: u32,
    /// The key of the step that embedded.
    step: String,
    most: usize,
}

/// The file in the folder of the run that keeps an estimate, so that the command does not compute it
/// again when it resumes or only copies pictures.
#[derive(Serialize, Deserialize)]
struct KeptEstimate {
    scored: Scored,
    estimate: Estimate,
}

/// The last line that the helper `clusters` prints with `--json`.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Estimate {
    recommended: Option<usize>,
    range: Option<[usize; 2]>,
}

fn estimate(session: &CommandContext, embeddings: &Path, most: usize) -> Result<Estimate> {
    let program = Executable::own(CLUSTERS, &session.registry)?;
    let most = most.to_string();
    let mut arguments: Vec<OsString> = vec!["--embeddings".into(), embeddings.into()];
    arguments.extend(["--from", "2", "--to", &most, "--json"].map(OsString::from));
    tracing::info!(
        "estimating the number of clusters, from 2 to {most}; --clusters K takes K and skips this"
    );
    let interrupt = &session.interrupt;
    let process = Process { name: CLUSTERS, program: &program, arguments: &arguments, interrupt };
    let printed = process.printed()?;
    let last = printed.lines().last().unwrap_or_default();
    serde_json::from_str(last)
        .with_context(|| format!("reading the estimate of the helper `{CLUSTERS}`: {last}"))
}

/// The number that an estimate recommends for this many pictures.
fn chosen(estimate: Estimate, count: usize) -> Result<usize> {
    match estimate.recommended {
        Some(clusters) => {
            let [from, to] = estimate.range.unwrap_or([clusters; 2]);
            tracing::info!(
                "{clusters} clusters is an estimate, from {from} to {to} it could be; `assort clusters` \
                 shows how it was made, --clusters K sets another number, and `assort report` with \
                 --merge K,K shows two clusters as one"
            );
            Ok(clusters)
        }
        None => bail!(
            "no number of clusters fits these {count} pictures better than chance; say how many \
             groups you want with --clusters K"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_clusters_is_a_number_or_auto() {
        assert_eq!("auto".parse(), Ok(ClusterCount::Auto));
        assert_eq!("12".parse(), Ok(ClusterCount::Given(12)));
        for word in ["1", "0", "-3", "many", ""] {
            assert!(word.parse::<ClusterCount>().expect_err(word).contains("auto"));
        }
    }
}
