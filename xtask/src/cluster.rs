//! `assort cluster`: groups a folder of photographs.
//!
//! It runs the experiment `photos` or `photos-scratch` like any other: prepare, embed with a
//! published backbone, cluster, report. If the number of clusters is not given, the steps up to the
//! embeddings run first, and the helper `clusters` estimates the number from those.
//!
//! The messages of the programs may name tables and keys, which this command does not have. They go to
//! [`ERRORS`], and the user reads one message, see [`Advice`].
//!
//! If the folder of the run has corrections by hand, the report applies them after clustering, also when
//! pictures were added. No head is trained on them.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stage::console::{counted, print, print_line, printable};
use stage::{DeviceChoice, Experiment, Output, Status};

use crate::CommandContext;
use crate::advice::Advice;
use crate::clusters::{CLUSTERS, EMBEDDINGS};
use crate::jobs::{self, RunSteps};
use crate::owner;
use crate::plan::{Arm, RunPlan};
use crate::prepared::PreparedData;
use crate::process::Process;
use crate::programs::Executable;
use crate::record::CORRECTIONS;
use crate::report::{self, PAGE, ReportOptions, ReportSummary, TABLE};
use crate::reproduce::run_seeds;
use crate::results::{ExperimentResults, MetricsFile};
use crate::run::ExperimentRun;
use crate::setup::{Setup, SetupOptions};
use crate::store::{Hold, StepState};

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
    /// Print nothing but one JSON object with the results, and the progress as JSON lines on stderr.
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
            Ok(clusters) if clusters >= LEAST => Ok(Self::Given(clusters)),
            _ => Err("give a number from 2, or auto".to_owned()),
        }
    }
}

/// The file with the messages of failed programs, in the folder of the experiment's runs.
const ERRORS: &str = "errors.log";

/// The backbone name for training one on the pictures alone.
const SCRATCH: &str = "scratch";

/// Seed of every random draw.
const SEED: u64 = 0;

/// The fewest clusters, and the fewest pictures that can be grouped.
const LEAST: usize = 2;

/// The fewest pictures that allow an estimate, which compares halves of them.
const LEAST_TO_ESTIMATE: usize = 2 * LEAST;

/// The most clusters that an estimate considers.
const MOST: usize = 50;

/// Groups the pictures, and prints the clusters and where the page, table and folders are.
pub fn run(session: &CommandContext, options: &ClusterOptions) -> Result<()> {
    let pictures = crate::source::absolute_source(&options.path)?;
    check_flags(session, options, &pictures)?;
    let mut experiment = experiment(session, options, &pictures)?;
    find_outside(session, &experiment).context("--backbone")?;
    crate::source::mark_results(&options.runs, &pictures, "--runs")?;
    if let Some(out) = &options.out {
        crate::source::mark_results(out, &pictures, "--out")?;
    }
    experiment.name = owner::claim(&options.runs, &experiment.name, &pictures, &session.interrupt)?;
    let runs = options.runs.join(&experiment.name);
    let (run, advice) =
        (runs.join(SEED.to_string()), Advice::Cluster { errors: runs.join(ERRORS) });
    let setup = setup_options(options, &advice);
    check_corrections(&run)?;
    check_folders(options, &run)?;
    let _data = prepare(session, options, &experiment, &pictures, &advice)?;
    let (clusters, range) = match options.clusters {
        ClusterCount::Given(clusters) => (clusters, None),
        ClusterCount::Auto => {
            // The steps before the estimate do not depend on the number, but it must fit the pictures.
            experiment.set(&format!("data.clusters={LEAST}"))?;
            let (clusters, range) = estimated(session, options, &experiment, &setup)?;
            (clusters, Some(range))
        }
    };
    experiment.set(&format!("data.clusters={clusters}"))?;
    if picture_folders(options).any(|(_, folder)| folder.exists()) {
        let plan = RunPlan::of(&experiment, &session.registry.specs())?;
        let setup = Setup::new(session, &plan, &setup)?;
        let all: Vec<usize> = (0..plan.steps.len()).collect();
        refuse_earlier_folders(options, &ExperimentRun::new(SEED, &setup)?, &all)?;
    }
    let results = run_seeds(session, experiment, &setup, &[SEED], false, 1)?;
    let results = results.context("a run that is not dry has results")?;
    let (copy_to, link_to) = (options.copy_to.clone(), options.link_to.clone());
    let page = ReportOptions::of_run(&run, options.out.clone());
    let report =
        report::summarised(session, &page.with_folders(copy_to, link_to), &runs.join(ERRORS))?;
    let grouping = Grouping { options, run, range, results, report };
    match options.json {
        true => print_line(grouping.json()?),
        false => print(grouping.text()),
    }
}

/// What the command prints at its end.
struct Grouping<'a> {
    options: &'a ClusterOptions,
    /// The folder of the run.
    run: PathBuf,
    /// The plausible numbers of clusters, if the number was estimated.
    range: Option<[usize; 2]>,
    results: ExperimentResults,
    report: ReportSummary,
}

impl Grouping<'_> {
    /// The path of a file of the report.
    fn reported(&self, name: &str) -> PathBuf {
        let own = || self.run.join("report");
        self.options.out.clone().unwrap_or_else(own).join(name)
    }

    fn last(&self) -> Option<&MetricsFile> {
        self.results.outcomes.first()?.rounds.last()
    }

    /// Share of the pictures whose cluster is called reliable.
    fn reliable_share(&self) -> Option<f64> {
        self.last()?.reliable?.share
    }

    fn trust(&self, name: &str) -> Option<f64> {
        self.report.trust.get(name).copied()
    }

    /// The text for people.
    fn text(&self) -> String {
        let clusters = self.report.clusters.len();
        let pictures = self.last().map_or(0, |last| last.images);
        let mut lines = vec![format!(
            "{} in {}; {:.0} s",
            counted(pictures, "picture"),
            counted(clusters, "cluster"),
            self.results.seconds
        )];
        if let Some([from, to]) = self.range {
            lines.push(format!("the number is an estimate; {from} to {to} are plausible"));
        }
        lines.push(format!("pictures by cluster: {}", printable(&self.report.sizes())));
        if let Some(share) = self.reliable_share() {
            lines.push(format!("reliable: {:.1} % of the pictures", 100. * share));
        }
        let agreements = [("heads", "among the heads"), ("k-means", "with k-means")];
        let agreements = agreements
            .map(|(name, words)| self.trust(name).map(|value| format!("{words} {value:.2}")));
        let agreements: Vec<String> = agreements.into_iter().flatten().collect();
        if !agreements.is_empty() {
            lines.push(format!(
                "agreement (adjusted Rand index, 1 is full): {}",
                agreements.join(", ")
            ));
        }
        if let Some(scores) = self.results.scores() {
            lines.push(format!("\nagreement with the folders, in percent:\n{scores}"));
        }
        let (page, table) = (self.reported(PAGE), self.reported(TABLE));
        let paths = [
            ("page", Some(&page)),
            ("table", Some(&table)),
            ("copies", self.options.copy_to.as_ref()),
            ("links", self.options.link_to.as_ref()),
        ];
        let paths = paths.into_iter().filter_map(|(word, path)| Some((word, path?)));
        lines.extend(
            paths.map(|(word, path)| format!("{word}: {}", printable(&path.to_string_lossy()))),
        );
        lines.push(format!("to correct the clusters: assort view {}\n", self.run.display()));
        lines.join("\n")
    }

    /// The results of the run with what a script asks for: the README lists the fields.
    fn json(&self) -> Result<Value> {
        let clusters = &self.report.clusters;
        let sizes: serde_json::Map<String, Value> = clusters
            .iter()
            .map(|cluster| (cluster.number.to_string(), cluster.pictures.into()))
            .collect();
        let names: serde_json::Map<String, Value> = clusters
            .iter()
            .filter_map(|cluster| Some((cluster.number.to_string(), cluster.name.clone()?.into())))
            .collect();
        let mut json = self.results.json();
        let object = json.as_object_mut().context("the results are one object")?;
        for (key, value) in [
            ("run", json!(self.run)),
            ("page", json!(self.reported(PAGE))),
            ("table", json!(self.reported(TABLE))),
            ("copies", json!(self.options.copy_to)),
            ("links", json!(self.options.link_to)),
            ("clusters", json!(clusters.len())),
            ("sizes", sizes.into()),
            ("names", names.into()),
            ("is-estimate", json!(self.range.is_some())),
            ("plausible-range", json!(self.range)),
            ("reliable-share", json!(self.reliable_share())),
            ("agreement-of-heads", json!(self.trust("heads"))),
            ("agreement-with-k-means", json!(self.trust("k-means"))),
        ] {
            object.insert(key.to_owned(), value);
        }
        Ok(json)
    }
}

/// The folders for sorted pictures that the user names, by their flags.
fn picture_folders(options: &ClusterOptions) -> impl Iterator<Item = (&'static str, &Path)> {
    [("--copy-to", &options.copy_to), ("--link-to", &options.link_to)]
        .into_iter()
        .filter_map(|(flag, folder)| Some((flag, folder.as_deref()?)))
}

/// Fails where a flag cannot be used, before anything is read or written.
fn check_flags(session: &CommandContext, options: &ClusterOptions, pictures: &Path) -> Result<()> {
    let path = options.path.display();
    ensure!(
        crate::source::exists(pictures),
        "PATH `{path}`: there is no such folder or file; pass a folder of pictures, an archive, or an address \
         such as hf://datasets/owner/name"
    );
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
    ensure!(
        options.link_to.is_none() || options.path.is_dir(),
        "--link-to: `{path}` is not a folder, so there are no files to link to; use --copy-to"
    );
    let folders = [("--runs", Some(&*options.runs)), ("--out", options.out.as_deref())];
    let folders = folders.into_iter().filter_map(|(flag, folder)| Some((flag, folder?)));
    for (flag, folder) in folders.chain(picture_folders(options)) {
        if let Some(file) = folder.ancestors().find(|path| path.exists())
            && !file.is_dir()
        {
            bail!("{flag} `{}`: `{}` is a file; name a folder", folder.display(), file.display());
        }
    }
    (session.registry.devices.resolve)(options.device).map(drop)
}

/// Prepares the pictures unless they are prepared. Fails where they are too few for the number of clusters:
/// before they are read, if the source shows how many there are.
fn prepare(
    session: &CommandContext,
    options: &ClusterOptions,
    experiment: &Experiment,
    pictures: &Path,
    advice: &Advice,
) -> Result<Hold> {
    let prepared = PreparedData::of(session, experiment, Some(pictures), &options.runs, advice)?;
    let explained = |error: Error| match Status::of_error(&error) {
        Status::BadInput => error.context(format!("PATH `{}`", options.path.display())),
        _ => error,
    };
    if !prepared.is_done()
        && let Some(count) = prepared.check().map_err(explained)?
    {
        check_count(options, count)?;
    }
    let data = prepared.make(None, false).map_err(explained)?;
    check_count(options, prepared.count()?)?;
    Ok(data)
}

/// Fails where there are too few pictures to group, or fewer than the clusters that the user asks for.
fn check_count(options: &ClusterOptions, count: usize) -> Result<()> {
    let (path, pictures) = (options.path.display(), counted(count, "picture"));
    ensure!(count >= LEAST, "PATH `{path}` holds only {pictures}; grouping needs at least {LEAST}");
    match options.clusters {
        ClusterCount::Auto if count < LEAST_TO_ESTIMATE => bail!(
            "PATH `{path}` holds only {pictures}; an estimate of the number of clusters needs at least \
             {LEAST_TO_ESTIMATE}: pass --clusters {LEAST}"
        ),
        ClusterCount::Given(clusters) if clusters > count => bail!(
            "--clusters {clusters}: PATH `{path}` holds only {pictures}; ask for fewer clusters, or pass \
             --clusters auto for an estimate"
        ),
        _ => Ok(()),
    }
}

/// Fails where a folder for sorted pictures exists, but these steps were neither done before nor are those of the last
/// run: the folder then holds an earlier grouping, which the report would refuse after all steps have run.
/// Otherwise the report compares the pictures.
fn refuse_earlier_folders(
    options: &ClusterOptions,
    run: &ExperimentRun,
    positions: &[usize],
) -> Result<()> {
    let is_done = positions.iter().all(|&position| run.state(position) == StepState::Done);
    match picture_folders(options).find(|(_, folder)| folder.exists()) {
        Some((flag, folder)) if !is_done && !run.is_recorded(positions) => bail!(
            "{flag} `{}` holds an earlier grouping: of other pictures, into another number of clusters, or by \
             another backbone, machine or version of assort; name a new folder, or move it away",
            folder.display()
        ),
        _ => Ok(()),
    }
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

fn setup_options(options: &ClusterOptions, advice: &Advice) -> SetupOptions {
    SetupOptions {
        device: options.device,
        ranks: 1,
        images: Some(options.path.clone()),
        dry_run: false,
        runs: options.runs.clone(),
        advice: advice.clone(),
    }
}

/// Runs the steps up to the first embeddings of the prepared pictures. Returns the number of clusters
/// estimated from them, and the plausible numbers, from least to most.
fn estimated(
    session: &CommandContext,
    options: &ClusterOptions,
    experiment: &Experiment,
    setup: &SetupOptions,
) -> Result<(usize, [usize; 2])> {
    let plan = RunPlan::of(experiment, &session.registry.specs())?;
    let embeds =
        |&position: &usize| plan.steps[position].place.outputs.contains(&Output::Embeddings);
    let embed = plan.of_arm(Arm::Main).find(embeds);
    let embed = embed.with_context(|| format!("`{}` has no step that embeds", experiment.name))?;
    let positions: Vec<usize> = (0..=embed).collect();
    let setup = Setup::new(session, &plan, setup)?;
    let run = ExperimentRun::new(SEED, &setup)?;
    refuse_earlier_folders(options, &run, &positions)?;
    run.check(&positions, false)?;
    jobs::execute(&[RunSteps { run: &run, positions }], false, 1)?;
    let (count, results) = (setup.prepared.count()?, run.folder(embed));
    let step = results.file_name().unwrap_or_default().to_string_lossy();
    let scored = Scored {
        estimator: ESTIMATOR,
        step: step.into_owned(),
        most: MOST.min(count / 4).max(LEAST),
    };
    let folder = setup.experiment_folder().join(SEED.to_string());
    let kept = folder.join("number-of-clusters.json");
    let estimate = match stage::json::read::<KeptEstimate>(&kept) {
        Ok(kept) if kept.scored == scored => kept.estimate,
        // Nothing kept, of other embeddings, or damaged: it is computed anew.
        _ => {
            let estimate = estimate(&setup, &results.join(EMBEDDINGS), scored.most)?;
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

fn estimate(setup: &Setup, embeddings: &Path, most: usize) -> Result<Estimate> {
    let program = Executable::own(CLUSTERS, &setup.session.registry)?;
    let most = most.to_string();
    let mut arguments: Vec<OsString> = vec!["--embeddings".into(), embeddings.into()];
    arguments.extend(["--from", &LEAST.to_string(), "--to", &most, "--json"].map(OsString::from));
    tracing::info!(
        "estimating the number of clusters, from {LEAST} to {most}; --clusters K takes K and skips this"
    );
    let (interrupt, message) = (&setup.session.interrupt, setup.advice.message());
    let process =
        Process { name: CLUSTERS, program: &program, arguments: &arguments, interrupt, message };
    let printed = process.printed();
    let printed = printed.map_err(|error| setup.advice.add_to(error, CLUSTERS, setup.device))?;
    let last = printed.lines().last().unwrap_or_default();
    serde_json::from_str(last)
        .with_context(|| format!("reading the estimate of the helper `{CLUSTERS}`: {last}"))
}

/// The number that an estimate recommends for this many pictures, and the plausible numbers.
fn chosen(estimate: Estimate, count: usize) -> Result<(usize, [usize; 2])> {
    match estimate.recommended {
        Some(clusters) => {
            let [from, to] = estimate.range.unwrap_or([clusters; 2]);
            tracing::info!(
                "{clusters} clusters is an estimate, from {from} to {to} it could be; `assort clusters` \
                 shows how it was made, --clusters K sets another number, and `assort report` with \
                 --merge K,K shows two clusters as one"
            );
            Ok((clusters, [from, to]))
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
