//! Report: shows the result of a run as a page, a table and folders of pictures.
//!
//! From the prepared pictures and the pseudo-labels of a run it writes
//!
//! - `report.html`, a page with a map of all pictures, the clusters, near-duplicates, outliers, how far the
//!   result can be trusted, the metrics, and the training curves;
//! - `clusters.csv`, a line per picture with its name, cluster and confidence;
//! - with `--pictures`, `--copy-to` or `--link-to`, a folder of pictures for each cluster.
//!
//! Page and table are written first. One process at a time writes a report; another one waits for
//! it. Each file, and the folder of pictures, is whole or absent, whenever the program is killed.
//!
//! It is a pure function of the files that it reads: the same bytes every time. Of the ground truth it shows
//! the classes, if it is given; the scores are those that `metrics` wrote. It knows no network and no method.
//! A second program, [`export`], writes embeddings for other tools.
//!
//! - [`clusters`]: the pictures of each cluster.
//! - [`files`]: the table and the folders.
//! - [`analysis`]: neighbours, near-duplicates, outliers and the map, from the embeddings.
//! - [`trust`]: how far the clusters can be trusted.
//! - [`page`]: the page, of a [`gallery`] with [`thumbnail`]s, [`scores`] and [`curves`].

pub mod analysis;
#[cfg(test)]
mod browser;
pub mod clusters;
pub mod curves;
pub mod export;
pub mod files;
pub mod gallery;
mod html;
pub mod page;
pub mod scores;
pub mod thumbnail;
pub mod trust;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, FromArgMatches, Parser};
use data::{Images, Labels, Names, PseudoLabels, RoundMetrics};
use stage::{Claim, Interrupt, console, json};

use crate::analysis::{Analysis, UnitRows};
use crate::clusters::{Cluster, MergedNumbers};
use crate::curves::Chart;
use crate::files::Form;
use crate::gallery::Gallery;
use crate::page::Page;

/// Shows the result of a run as a page, a table and folders of pictures.
#[derive(Debug, Clone, Parser)]
pub struct ReportArguments {
    /// The prepared pictures: images.safetensors.
    #[arg(long, value_name = "FILE")]
    pub images: PathBuf,
    /// Their names: names.safetensors.
    #[arg(long, value_name = "FILE")]
    pub names: PathBuf,
    /// The clusters: pseudo-labels.safetensors.
    #[arg(long, value_name = "FILE")]
    pub pseudo_labels: PathBuf,
    /// The embeddings that were clustered: embeddings.safetensors. Without them there is no map.
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,
    /// The ground truth to show beside the clusters: labels.safetensors.
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,
    /// A step of the run, whose metrics.json and log.jsonl are shown. Repeat for several, in order.
    #[arg(long = "step", value_name = "NAME=DIR", value_parser = step)]
    pub steps: Vec<(String, PathBuf)>,
    /// Heading of the page.
    #[arg(long, value_name = "TEXT", default_value = "Clusters")]
    pub title: String,
    /// Pictures of each cluster to show: those of highest score, and a third as many of lowest score.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub shown: usize,
    /// Most pictures on the page, so that it stays small; a thumbnail has 5 to 10 kB.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub thumbnails: usize,
    /// Show these clusters as one, under the first number. Repeat for several.
    #[arg(long, value_name = "K,K")]
    pub merge: Vec<MergedNumbers>,
    /// Also copy every picture to a folder of its cluster, in `pictures` beside the page.
    #[arg(long)]
    pub pictures: bool,
    /// Also copy every picture to a folder of its cluster, in DIR.
    #[arg(long, value_name = "DIR")]
    pub copy_to: Option<PathBuf>,
    /// Also link to every picture from a folder of its cluster, in DIR.
    #[arg(long, value_name = "DIR", requires = "source")]
    pub link_to: Option<PathBuf>,
    /// The folder that the pictures were read from; links point into it, and pictures that were
    /// prepared smaller than they are are copied from it.
    #[arg(long, value_name = "DIR")]
    pub source: Option<PathBuf>,
    /// Folder to write into; created if missing.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

fn step(word: &str) -> Result<(String, PathBuf), String> {
    let (name, folder) = word.split_once('=').ok_or("the form is NAME=DIR")?;
    Ok((name.to_owned(), folder.into()))
}

/// Name of the page in the folder of a report.
pub const PAGE: &str = "report.html";

/// Runs the command line `words` and returns the exit status.
pub fn program(words: Vec<OsString>) -> ExitCode {
    console::start_logging();
    let command = ReportArguments::command().name("report").version(env!("CARGO_PKG_VERSION"));
    let arguments = match ReportArguments::from_arg_matches(&command.get_matches_from(words)) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let print = |path: &PathBuf| console::print_line(console::printable(&path.to_string_lossy()));
    let result = Interrupt::listen()
        .and_then(|interrupt| run(&arguments, &interrupt))
        .and_then(|written| written.iter().try_for_each(print));
    stage::finish("report", &result)
}

/// Writes the report; returns the paths that it wrote, the page first.
///
/// # Errors
///
/// An input is missing or damaged, the inputs are about different pictures, an output cannot be
/// written, or the program is interrupted.
pub fn run(arguments: &ReportArguments, interrupt: &Interrupt) -> Result<Vec<PathBuf>> {
    let images = Images::open(&arguments.images)?;
    let names = Names::open(&arguments.names)?;
    let labels = PseudoLabels::open(&arguments.pseudo_labels)?;
    let remedy = "give the images and names that the run was made with";
    names.data_set.require(images.data_set(), remedy)?;
    labels.data_set.require(images.data_set(), remedy)?;
    images.keep_decoded(0); // Each picture is decoded once.
    let truth = arguments.labels.as_deref().map(Labels::open).transpose()?;
    if let Some(truth) = &truth {
        truth
            .data_set
            .require(images.data_set(), "give the labels that were prepared with the images")?;
    }
    let truth = truth.filter(|truth| truth.labels.iter().any(Option::is_some));

    let clusters = Cluster::merged(Cluster::all(&labels), &arguments.merge)?;
    let out = &arguments.out;
    let _claim = Claim::wait(out, interrupt)?;
    fs::create_dir_all(out).with_context(|| format!("creating `{}`", out.display()))?;
    stage::files::remove_unfinished(out)?;
    files::remove_incomplete(&out.join(files::PICTURES))?;
    let analysis = analysis(arguments, &labels, &clusters, interrupt)?;
    let (mut metrics, mut charts, mut facts) = (Vec::new(), Vec::new(), facts(&labels));
    let mut between_heads = None;
    facts.extend(arguments.merge.iter().map(MergedNumbers::fact));
    for (step, folder) in &arguments.steps {
        let path = folder.join(RoundMetrics::FILE);
        if path.exists() {
            let (round, _) = step.split_once('-').unwrap_or((step, ""));
            metrics.push((round.to_owned(), RoundMetrics::read(&path)?));
        }
        match StepLog::read(folder) {
            Ok(log) => {
                between_heads = log.between_heads.or(between_heads);
                charts.push((step.clone(), log.charts));
            }
            Err(error) => {
                tracing::warn!("{error:#}; its curves are left out");
                facts.push(format!(
                    "The log of {step} was changed after it was written: its curves are left out."
                ));
            }
        }
    }
    let html = Page {
        title: &arguments.title,
        facts,
        trust: trust::measures(&labels, between_heads, analysis.as_ref())?,
        metrics,
        gallery: Gallery {
            images: &images,
            names: &names,
            labels: &labels,
            clusters: &clusters,
            truth: truth.as_ref(),
            analysis: analysis.as_ref(),
            shown: arguments.shown,
        },
        thumbnails: arguments.thumbnails,
        charts,
    }
    .html()?;
    let mut written = vec![out.join(PAGE), out.join(files::TABLE)];
    stage::files::write(&written[0], html.as_bytes())?;
    files::write_table(&written[1], &clusters, &names)?;
    let beside = arguments.pictures.then(|| out.join(files::PICTURES));
    let source = arguments.source.as_deref();
    let copy = Form::Copy { images: &images, source };
    let copies = beside.iter().chain(&arguments.copy_to).map(|folder| (folder, copy));
    let links = arguments.link_to.iter().zip(source.map(Form::LinkTo));
    for (folder, form) in copies.chain(links) {
        files::write_pictures(folder, form, &clusters, &names, interrupt)?;
        written.push(folder.clone());
    }
    Ok(written)
}

/// The paragraphs below the heading.
fn facts(labels: &PseudoLabels) -> Vec<String> {
    let (count, clusters) = (labels.index.len(), labels.clusters);
    let mut facts =
        vec![format!("{count} pictures in {clusters} clusters. Cluster numbers are arbitrary.")];
    if let Some(stability) = labels.stability {
        facts.push(format!(
            "A clustering network that was trained from scratch in the last round put {:.1} % of them \
             into the same clusters as the round before.",
            100. * stability
        ));
    }
    facts
}

/// The analysis of the embeddings, if they are given.
fn analysis(
    arguments: &ReportArguments,
    labels: &PseudoLabels,
    clusters: &[Cluster],
    interrupt: &Interrupt,
) -> Result<Option<Analysis>> {
    let Some(path) = &arguments.embeddings else { return Ok(None) };
    let rows = UnitRows::open(path, labels)?;
    let own = Cluster::of_places(clusters, labels.index.len());
    Ok(Some(Analysis::of(rows, &own, clusters.len(), interrupt)?))
}

/// What the page shows of the log of a step; nothing where it has no log.
#[derive(Default)]
struct StepLog {
    charts: Vec<Chart>,
    /// Mean adjusted Rand index between pairs of heads.
    between_heads: Option<f64>,
}

impl StepLog {
    fn read(folder: &Path) -> Result<Self> {
        stage::finished::require_log(folder)?;
        let log = folder.join("log.jsonl");
        if !log.exists() {
            return Ok(Self::default());
        }
        let name = || format!("reading the log `{}`", log.display());
        let text = fs::read_to_string(&log).with_context(name)?;
        let charts = curves::charts(&text).with_context(name)?;
        let lines = text.lines().filter_map(|line| json::of_line(line).ok());
        let mut indices = lines.filter_map(|line| line.get("rand-index-between-heads")?.as_f64());
        Ok(Self { charts, between_heads: indices.next_back() })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use data::images::{self, StoredPicture};
    use data::metrics::{Reliable, Scores};
    use data::{DataSet, Picture};
    use image::ImageFormat;
    use serde_json::json;
    use stage::Split;

    use super::*;

    /// Five of seven pictures in three clusters, of which one is empty.
    pub(crate) fn labels() -> PseudoLabels {
        PseudoLabels {
            data_set: data_set(),
            clusters: 3,
            index: vec![0, 1, 3, 5, 6],
            assignment: vec![0, 0, 2, 0, 0],
            kmeans_assignment: vec![0, 0, 2, 0, 0],
            confidence: vec![0.75, 0.5, 1., 0.75, 0.5],
            score: vec![0.25, 0.5, 1., 0.7, 0.5],
            reliable: vec![false, true, true, true, false],
            stability: Some(0.875),
            projection_width: 1,
            prototypes: vec![0.; 3],
        }
    }

    pub(crate) fn names() -> Names {
        let mut names: Vec<String> = (0..7).map(|row| format!("photos/{row}.png")).collect();
        names[0] = "<photos>/0.png".into();
        names[6] = "photos/6, again.png".into();
        Names { data_set: data_set(), names }
    }

    fn data_set() -> DataSet {
        DataSet { path: "memory".into(), images: 7, fingerprint: "0".repeat(64) }
    }

    /// Seven grey pictures, neither square nor symmetric; some came as PNG files, some as pixels.
    pub(crate) fn prepared(folder: &Path) -> Result<(Images, Names)> {
        let path = folder.join("images.safetensors");
        let mut sources = Vec::new();
        for number in 0..7 {
            let pixels = (0..6 * 7).map(|i| (i * i * (3 + number) % 251) as u8).collect();
            let picture = Picture::new(6, 7, 1, pixels)?;
            let source = match number % 2 {
                0 => StoredPicture::raw(picture, 1)?,
                _ => {
                    let mut file = std::io::Cursor::new(Vec::new());
                    thumbnail::to_image(&picture)?.write_to(&mut file, ImageFormat::Png)?;
                    StoredPicture::file(file.into_inner(), 1)?
                }
            };
            sources.push((source, Split::Train));
        }
        images::write(&path, 1, sources)?;
        let images = Images::open(&path)?;
        let names = Names { data_set: images.data_set().clone(), ..names() };
        Ok((images, names))
    }

    /// Without ground truth.
    pub(crate) fn metrics() -> RoundMetrics {
        RoundMetrics {
            images: 5,
            clusters: 3,
            head: None,
            kmeans: None,
            reliable: Reliable { share: 0.6, acc: None },
            stability: None,
            sizes: vec![4, 1, 0],
            calibration_error: None,
            classes: None,
            confusion: None,
            others: BTreeMap::new(),
        }
    }

    fn arguments(folder: &Path) -> Result<ReportArguments> {
        let (images, names) = prepared(folder)?;
        let arguments = ReportArguments {
            images: folder.join("images.safetensors"),
            names: folder.join("names.safetensors"),
            pseudo_labels: folder.join("pseudo-labels.safetensors"),
            embeddings: None,
            labels: None,
            steps: vec![step("0-secu=secu"), step("0-metrics=metrics")]
                .into_iter()
                .map(|step| step.map(|(name, last)| (name, folder.join(last))))
                .collect::<Result<_, String>>()
                .map_err(anyhow::Error::msg)?,
            title: "Photos".into(),
            shown: 24,
            thumbnails: 2000,
            merge: vec![],
            pictures: false,
            copy_to: None,
            link_to: None,
            source: None,
            out: folder.join("out/report"),
        };
        names.write(&arguments.names)?;
        PseudoLabels { data_set: images.data_set().clone(), ..labels() }
            .write(&arguments.pseudo_labels)?;
        for (_, folder) in &arguments.steps {
            fs::create_dir_all(folder)?;
        }
        fs::write(
            folder.join("secu/log.jsonl"),
            curves::tests::log(&[json!({"epoch": 1, "loss": 2}), json!({"epoch": 2, "loss": 1})]),
        )?;
        let scores = |acc| Some(Scores { acc, nmi: 0.4, ari: 0.2, ami: 0.3 });
        RoundMetrics { head: scores(0.6), kmeans: scores(0.5), ..metrics() }
            .write(&folder.join("metrics").join(RoundMetrics::FILE))?;
        Ok(arguments)
    }

    #[test]
    fn a_report_is_a_page_and_a_table_and_can_be_rewritten() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut arguments = arguments(folder.path())?;
        for _ in 0..2 {
            let written = run(&arguments, &Interrupt::default())?;
            let out = &arguments.out;
            assert_eq!(written, [out.join("report.html"), out.join("clusters.csv")]);
            let page = fs::read_to_string(&written[0])?;
            for part in [
                "<h1>Photos</h1>",
                "5 pictures in 3 clusters.",
                "put 87.5 % of them",
                "<td>0<td>60.0<td>40.0<td>20.0<td>30.0<td>50.0",
                "0-secu, by epoch",
            ] {
                assert!(page.contains(part), "{part} is not in: {page}");
            }
            assert_eq!(fs::read_to_string(&written[1])?.lines().count(), 6);
            // The share of reliable pictures may be a value of the experiment: not a result.
            assert!(!page.contains("reliable"), "{page}");
            assert!(!out.join("pictures").exists());
        }
        arguments.pictures = true;
        for _ in 0..2 {
            assert_eq!(run(&arguments, &Interrupt::default())?.len(), 3);
        }
        // If other pictures are in its place, page and table are still written.
        fs::write(arguments.out.join("pictures/mine"), "mine")?;
        fs::remove_file(arguments.out.join("report.html"))?;
        assert!(run(&arguments, &Interrupt::default()).is_err());
        assert!(arguments.out.join("report.html").exists());
        Ok(())
    }

    #[test]
    fn merged_clusters_are_one_in_page_and_table() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let merge = vec!["2,0".parse().map_err(anyhow::Error::msg)?];
        let arguments = ReportArguments { merge, ..arguments(folder.path())? };
        let written = run(&arguments, &Interrupt::default())?;
        let (page, table) = (fs::read_to_string(&written[0])?, fs::read_to_string(&written[1])?);
        assert!(page.contains("Cluster 2 <small>5 pictures") && !page.contains("Cluster 0"));
        assert!(page.contains("Clusters 2, 0 are shown as cluster 2"), "{page}");
        assert!(table.lines().skip(1).all(|line| line.contains(",2,")), "{table}");
        let merge = vec!["0,3".parse().map_err(anyhow::Error::msg)?];
        let error = run(&ReportArguments { merge, ..arguments }, &Interrupt::default());
        let error = error.expect_err("no cluster 3").to_string();
        assert!(error.contains("--merge 0,3") && error.contains("no cluster 3"), "{error}");
        Ok(())
    }

    #[test]
    fn curves_of_a_changed_log_are_left_out_and_the_page_says_so() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = arguments(folder.path())?;
        let step = folder.path().join("secu");
        stage::finished::mark(&step, "secu", None, stage::finished::Digests::Listed)?;
        let page = || -> Result<String> {
            run(&arguments, &Interrupt::default())?;
            Ok(fs::read_to_string(arguments.out.join("report.html"))?)
        };
        assert!(page()?.contains("0-secu, by epoch"));
        // Whole lines are missing: the lines that are left are sound.
        let log = fs::read_to_string(step.join("log.jsonl"))?;
        let first = log.split_inclusive('\n').next().expect("a line");
        for changed in [first.to_owned(), log.replace("epoch", "epocx")] {
            fs::write(step.join("log.jsonl"), changed)?;
            let page = page()?;
            assert!(!page.contains("0-secu, by epoch"));
            assert!(page.contains("The log of 0-secu was changed"), "{page}");
        }
        Ok(())
    }

    #[test]
    fn changed_scores_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = arguments(folder.path())?;
        let path = folder.path().join("metrics/metrics.json");
        fs::write(&path, fs::read_to_string(&path)?.replace("0.6", "0.9"))?;
        let error = run(&arguments, &Interrupt::default()).expect_err("changed").to_string();
        assert!(error.contains("metrics.json") && error.contains("was changed"), "{error}");
        Ok(())
    }

    #[test]
    fn two_reports_at_once_give_a_complete_report() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = ReportArguments { pictures: true, ..arguments(folder.path())? };
        std::thread::scope(|scope| {
            let reports: Vec<_> =
                (0..4).map(|_| scope.spawn(|| run(&arguments, &Interrupt::default()))).collect();
            for report in reports {
                assert_eq!(report.join().expect("no panic").expect("written").len(), 3);
            }
        });
        let count = |folder: &str| fs::read_dir(arguments.out.join(folder)).map(Iterator::count);
        assert_eq!((count("")?, count("pictures")?, count("pictures/0")?), (3, 3, 4));
        Ok(())
    }

    #[test]
    fn files_about_other_pictures_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = arguments(folder.path())?;
        names().write(&arguments.names)?;
        let error =
            format!("{:#}", run(&arguments, &Interrupt::default()).expect_err("other pictures"));
        assert!(error.contains("names.safetensors") && error.contains("other images"), "{error}");
        let arguments = ReportArguments { pseudo_labels: folder.path().join("none"), ..arguments };
        assert!(run(&arguments, &Interrupt::default()).is_err());
        assert!(step("0-secu").is_err());
        Ok(())
    }
}
