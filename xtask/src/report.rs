//! `assort report`: shows a run as a page, a table and folders of pictures.
//!
//! This module finds the files of the run; the helper `report` writes the output.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use stage::{Output, Spec};

use crate::CommandContext;
use crate::clusters::EMBEDDINGS;
use crate::prepared::source_folder;
use crate::process::{MessageTo, Process};
use crate::programs::Executable;
use crate::record::{Recorded, RecordedStep, Which};

/// The command line.
#[derive(Debug, clap::Args)]
pub struct ReportOptions {
    #[command(flatten)]
    which: Which,
    /// Pictures of each cluster to show: the most confident, and a third as many of the least.
    #[arg(long, value_name = "N", default_value_t = SHOWN)]
    shown: usize,
    /// Most pictures on the page, so that it stays small; a thumbnail has 5 to 10 kB.
    #[arg(long, value_name = "N", default_value_t = THUMBNAILS)]
    thumbnails: usize,
    /// Show the clusters as the run has them, without the corrections of corrections.toml in its folder.
    #[arg(long)]
    no_corrections: bool,
    /// Show these clusters as one, under the first number; can be repeated.
    #[arg(long, value_name = "K,K")]
    merge: Vec<String>,
    /// Also copy every picture to a folder of its cluster, in `pictures` beside the page.
    #[arg(long)]
    pictures: bool,
    /// Also copy every picture to a folder of its cluster, in DIR.
    #[arg(long, value_name = "DIR")]
    copy_to: Option<PathBuf>,
    /// Also link to every picture from a folder of its cluster, in DIR.
    #[arg(long, value_name = "DIR")]
    link_to: Option<PathBuf>,
    /// The folder that the pictures were read from, if it was moved; links point into it, and large
    /// pictures are copied from it.
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,
    /// Folder to write into; by default `report` in the run's folder.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Pictures of each cluster that the page shows by default.
const SHOWN: usize = 24;

/// Pictures that the page has by default.
const THUMBNAILS: usize = 2000;

impl ReportOptions {
    /// Options for a page and a table of the run in the folder `run`, without folders of pictures.
    ///
    /// - `out`: the output folder; `report` in the run's folder if `None`.
    pub fn of_run(run: &Path, out: Option<PathBuf>) -> Self {
        Self {
            which: Which::of_folder(run),
            shown: SHOWN,
            thumbnails: THUMBNAILS,
            no_corrections: false,
            merge: vec![],
            pictures: false,
            copy_to: None,
            link_to: None,
            source: None,
            out,
        }
    }

    /// Adds folders of pictures: copies, or links to the originals.
    pub fn with_folders(self, copy_to: Option<PathBuf>, link_to: Option<PathBuf>) -> Self {
        Self { copy_to, link_to, ..self }
    }
}

/// The helper that writes the report.
pub const REPORT: &str = "report";

/// The file of a step's clusters.
pub const LABELS: &str = "pseudo-labels.safetensors";

/// Name of the table in the folder of a report.
pub const TABLE: &str = "clusters.csv";

/// Name of the page in the folder of a report.
pub const PAGE: &str = "report.html";

/// Writes the report of a run, finished or not.
///
/// # Errors
///
/// The run has no clusters yet.
pub fn run(session: &CommandContext, options: &ReportOptions) -> Result<()> {
    let run = options.which.find()?;
    let written = write(session, &run, options, false, |process| process.show());
    run.removing_damaged(written, &session.interrupt)
}

/// Like [`run`], but prints nothing and returns what was written.
///
/// - `errors`: the file for the message of the helper, which the error has too.
pub fn summarised(
    session: &CommandContext,
    options: &ReportOptions,
    errors: &Path,
) -> Result<ReportSummary> {
    let run = options.which.find()?;
    let printed = write(session, &run, options, true, |process| {
        Process { message: MessageTo::ErrorAndFile(errors), ..*process }.printed()
    });
    let printed = run.removing_damaged(printed, &session.interrupt)?;
    serde_json::from_str(&printed)
        .with_context(|| format!("reading what the helper `{REPORT}` printed: {printed}"))
}

/// The object that the helper `report` prints with `--json`.
#[derive(Debug, Deserialize)]
pub struct ReportSummary {
    /// The clusters, as corrected.
    pub clusters: Vec<ClusterSize>,
    /// The measures of trust that the run allows: `heads`, `k-means`, `neighbours`, `halves`.
    #[serde(default)]
    pub trust: BTreeMap<String, f64>,
}

/// A cluster and how many pictures it has.
#[derive(Debug, Deserialize)]
pub struct ClusterSize {
    /// Its number.
    pub number: usize,
    /// Its name, if a person named it.
    pub name: Option<String>,
    /// How many pictures it has.
    pub pictures: usize,
}

impl ReportSummary {
    /// The size of each cluster, with its name if it has one: `0 (Beaches): 12, 1: 7`.
    pub fn sizes(&self) -> String {
        let size = |cluster: &ClusterSize| match &cluster.name {
            Some(name) => format!("{} ({name}): {}", cluster.number, cluster.pictures),
            None => format!("{}: {}", cluster.number, cluster.pictures),
        };
        self.clusters.iter().map(size).collect::<Vec<_>>().join(", ")
    }
}

/// Starts the helper on the files of a run.
///
/// - `as_json`: it prints a [`ReportSummary`] instead of paths.
fn write<T>(
    session: &CommandContext,
    run: &Recorded,
    options: &ReportOptions,
    as_json: bool,
    start: impl FnOnce(&Process) -> Result<T>,
) -> Result<T> {
    let steps = run.finished();
    let specs = session.registry.specs();
    let last = last_clusters(run, &specs)?;
    run.warn_if_unfinished(format_args!("the report shows the result up to {}", last.name));
    let _held = run.hold(&steps, &session.interrupt)?;
    let program = Executable::own(REPORT, &session.registry)?;
    let embedded = embeddings_of(&steps, last, &specs);
    let mut arguments = arguments(run, &steps, last, embedded, options);
    if let Some(corrections) = run.corrections().filter(|_| !options.no_corrections) {
        tracing::info!(
            "applying the corrections of `{}`; `assort report --no-corrections` shows the run without them",
            corrections.display()
        );
        arguments.extend(["--corrections".into(), corrections.into()]);
    }
    if as_json {
        arguments.push("--json".into());
    }
    let interrupt = &session.interrupt;
    let process = Process::of_helper(REPORT, &program, &arguments, interrupt);
    start(&process)
}

/// The run's last finished step that clusters.
///
/// # Errors
///
/// There is none.
pub fn last_clusters<'a>(run: &'a Recorded, stages: &[Spec]) -> Result<&'a RecordedStep> {
    run.last(stages, Spec::clusters).with_context(|| {
        format!(
            "`{}` has no clusters yet: no clustering step is finished; `assort reproduce` resumes the run",
            run.folder.display()
        )
    })
}

/// The step whose embeddings show the clusters of the step `last`, if there is one: the first after it, where
/// `last` trains the network itself, or the last one before it.
pub fn embeddings_of<'a>(
    steps: &[&'a RecordedStep],
    last: &RecordedStep,
    stages: &[Spec],
) -> Option<&'a RecordedStep> {
    let embeds = |step: &&&RecordedStep| {
        let spec = stages.iter().find(|stage| stage.name == step.place);
        spec.is_some_and(|spec| spec.outputs.contains(&Output::Embeddings))
    };
    let at = steps.iter().position(|step| step.key == last.key && step.name == last.name)?;
    let trains = stages.iter().any(|stage| stage.name == last.place && stage.trains());
    let after = steps[at..].iter().find(embeds).filter(|_| trains);
    after.or_else(|| steps[..at].iter().rfind(embeds)).copied()
}

fn arguments(
    run: &Recorded,
    steps: &[&RecordedStep],
    last: &RecordedStep,
    embedded: Option<&RecordedStep>,
    options: &ReportOptions,
) -> Vec<OsString> {
    let out = options.out.clone().unwrap_or_else(|| run.folder.join("report"));
    let mut arguments = inputs(run, steps, last, embedded);
    for (flag, value) in [
        ("--out", out),
        ("--shown", options.shown.to_string().into()),
        ("--thumbnails", options.thumbnails.to_string().into()),
    ] {
        arguments.extend([flag.into(), value.into()]);
    }
    for clusters in &options.merge {
        arguments.extend(["--merge".into(), clusters.into()]);
    }
    if options.pictures {
        arguments.push("--pictures".into());
    }
    let source = options.source.clone().or_else(|| source_folder(&run.data()));
    let folders =
        [("--copy-to", &options.copy_to), ("--link-to", &options.link_to), ("--source", &source)];
    for (flag, folder) in folders {
        arguments.extend(folder.iter().flat_map(|folder| [flag.into(), folder.into()]));
    }
    arguments
}

/// The arguments of `report` and `view` that name the files of a run.
pub fn inputs(
    run: &Recorded,
    steps: &[&RecordedStep],
    last: &RecordedStep,
    embedded: Option<&RecordedStep>,
) -> Vec<OsString> {
    let pictures = run.data();
    let mut arguments: Vec<OsString> = Vec::new();
    for (flag, value) in [
        ("--images", pictures.join("images.safetensors")),
        ("--names", pictures.join("names.safetensors")),
        ("--pseudo-labels", run.path(last).join(LABELS)),
        ("--title", run.name().into()),
        ("--cache", run.folder.join("report/cache")),
    ] {
        arguments.extend([flag.into(), value.into()]);
    }
    let embeddings = embedded.map(|step| run.path(step).join(EMBEDDINGS));
    let labels = Some(pictures.join("labels.safetensors")).filter(|labels| labels.exists());
    for (flag, file) in [("--embeddings", embeddings), ("--labels", labels)] {
        arguments.extend(file.into_iter().flat_map(|file| [flag.into(), file.into()]));
    }
    for step in steps {
        let mut word = OsString::from(format!("{}=", step.name));
        word.push(run.path(step));
        arguments.extend(["--step".into(), word]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGES: [Spec; 4] = [
        spec("pretraining", &[Output::Network]),
        spec("embed", &[Output::Embeddings]),
        spec("clustering", &[Output::PseudoLabels]),
        spec("propos", &[Output::Network, Output::PseudoLabels]),
    ];

    const fn spec(name: &'static str, outputs: &'static [Output]) -> Spec {
        Spec { name, algorithm: 1, inputs: &[], outputs, ranks: stage::Ranks::One }
    }

    /// The key of the step whose embeddings show the clusters of the step at `last`.
    fn shown(places: &[&str], last: usize) -> Option<String> {
        let step = |(number, place): (usize, &&str)| RecordedStep {
            name: format!("0-{place}"),
            place: (*place).to_owned(),
            round: 0,
            is_main: true,
            key: number.to_string(),
            earlier: None,
        };
        let steps: Vec<RecordedStep> = places.iter().enumerate().map(step).collect();
        let steps: Vec<&RecordedStep> = steps.iter().collect();
        embeddings_of(&steps, steps[last], &STAGES).map(|step| step.key.clone())
    }

    #[test]
    fn clusters_are_shown_by_the_embeddings_they_were_made_of() {
        let rounds = ["pretraining", "embed", "clustering", "pretraining", "embed", "clustering"];
        assert_eq!(shown(&rounds, 2).as_deref(), Some("1"));
        assert_eq!(shown(&rounds, 5).as_deref(), Some("4"));
        assert_eq!(shown(&["propos", "embed"], 0).as_deref(), Some("1"));
        // A run that was interrupted before it embedded again.
        assert_eq!(shown(&["propos"], 0), None);
        assert_eq!(shown(&["pretraining", "embed", "propos"], 2).as_deref(), Some("1"));
    }
}
