//! Report: shows the result of a run as a page, a table and folders of pictures.
//!
//! From the prepared pictures and the pseudo-labels of a run it writes
//!
//! - `report.html`, a page with a map of all pictures, the clusters, near-duplicates, outliers, how far the
//!   result can be trusted, the metrics, and the training curves;
//! - `clusters.csv`, a line per picture with its name, cluster and confidence;
//! - with `--pictures`, `--copy-to` or `--link-to`, a folder of pictures for each cluster.
//!
//! With `--corrections` all three show the clusters as a person corrected them, see [`data::corrections`]. That is a
//! final relabelling: no head is trained on corrections, and the scores are those of the run.
//!
//! Page and table are written first. One process at a time writes a report; another one waits for
//! it. Each file, and the folder of pictures, is whole or absent, whenever the program is killed.
//!
//! It is a pure function of the files that it reads: the same bytes every time. Of the ground truth it shows
//! the classes, if it is given; the scores are those that `metrics` wrote. It knows no network and no method.
//! A second program, [`export`], writes embeddings for other tools. A third one, [`view`], serves the page to a
//! browser, for sets that are too large for one file and for corrections.
//!
//! - [`run_files`]: the files of a run, and what is shown of its steps.
//! - [`clusters`]: the pictures of each cluster.
//! - [`files`]: the table and the folders.
//! - [`analysis`]: neighbours, near-duplicates, outliers and the map, from the embeddings; kept for the next page
//!   by [`analysis_cache`].
//! - [`trust`]: how far the clusters can be trusted.
//! - [`page`]: the page, of a [`gallery`] with [`thumbnail`]s, [`scores`] and [`curves`].

pub mod analysis;
pub mod analysis_cache;
#[cfg(test)]
mod browser_tests;
pub mod clusters;
pub mod curves;
pub mod export;
pub mod files;
pub mod gallery;
mod html;
pub mod page;
pub mod run_files;
pub mod scores;
pub mod thumbnail;
pub mod trust;
pub mod view;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, FromArgMatches, Parser};
use data::corrections::{ClusteredPictures, CorrectedClusters, Corrections};
use data::{Images, Names, PseudoLabels};
use stage::console::{self, counted};
use stage::{Claim, Interrupt};

use crate::analysis::{ClusterAnalysis, UnitRows};
use crate::clusters::{Cluster, MergedNumbers};
use crate::files::Form;
use crate::gallery::Gallery;
use crate::page::Page;
use crate::run_files::{RunFiles, ShownRun};

/// Shows the result of a run as a page, a table and folders of pictures.
#[derive(Debug, Clone, Parser)]
pub struct ReportArguments {
    /// The files of the run.
    #[command(flatten)]
    pub run: RunFiles,
    /// Pictures of each cluster to show: those of highest score, and a third as many of lowest score.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub shown: usize,
    /// Most pictures on the page, so that it stays small; a thumbnail has 5 to 10 kB.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub thumbnails: usize,
    /// Corrections by hand to apply: corrections.toml.
    #[arg(long, value_name = "FILE")]
    pub corrections: Option<PathBuf>,
    /// The run that the corrections are about, where the pictures of the report are others: the folder of its
    /// images.safetensors and names.safetensors. Clusters are then renamed and merged only.
    #[arg(long, value_name = "DIR", requires_all = ["corrections", "corrected_pseudo_labels"])]
    pub corrected_data: Option<PathBuf>,
    /// The pseudo-labels of that run.
    #[arg(long, value_name = "FILE", requires = "corrected_data")]
    pub corrected_pseudo_labels: Option<PathBuf>,
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
    /// Print the clusters as one JSON object instead of the paths.
    #[arg(long)]
    pub json: bool,
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
    let result =
        Interrupt::listen().and_then(|interrupt| run(&arguments, &interrupt)).and_then(|written| {
            match arguments.json {
                true => console::print_line(written.json()),
                false => written.paths.iter().try_for_each(print),
            }
        });
    stage::finish("report", &result)
}

/// A report that was written.
#[derive(Debug)]
pub struct WrittenReport {
    /// The paths, the page first.
    pub paths: Vec<PathBuf>,
    /// The clusters that it shows, then the marked pictures.
    pub clusters: Vec<Cluster>,
    /// The measures of trust on the page, by name.
    pub trust: BTreeMap<&'static str, f64>,
}

impl WrittenReport {
    /// `{"clusters": [{"number": 3, "name": "Beaches", "pictures": 12}, …], "trust": {"k-means": 0.9, …}}`,
    /// without marked pictures.
    fn json(&self) -> serde_json::Value {
        let clusters = self.clusters.iter().filter(|cluster| cluster.mark.is_none());
        let shown = clusters.map(|Cluster { number, name, members, .. }| {
            serde_json::json!({ "number": number, "name": name, "pictures": members.len() })
        });
        serde_json::json!({ "clusters": shown.collect::<Vec<_>>(), "trust": self.trust })
    }
}

/// Writes the report.
///
/// # Errors
///
/// An input is missing or damaged, the inputs are about different pictures, an output cannot be
/// written, or the program is interrupted.
pub fn run(arguments: &ReportArguments, interrupt: &Interrupt) -> Result<WrittenReport> {
    let ShownRun { images, names, labels, truth } = arguments.run.open()?;
    let corrected = corrected(arguments, &images, &names, &labels)?;
    let clusters = match &corrected {
        Some(corrected) => Cluster::corrected(&labels, corrected),
        None => Cluster::all(&labels),
    };
    let clusters = Cluster::merged(clusters, &arguments.merge)?;
    let out = &arguments.out;
    let _claim = Claim::wait(out, interrupt)?;
    fs::create_dir_all(out).with_context(|| format!("creating `{}`", out.display()))?;
    stage::files::remove_unfinished(out)?;
    files::remove_incomplete(&out.join(files::PICTURES))?;
    let analyses = arguments.run.analyses(&labels);
    let analysis = analyses.as_ref().map(|found| found.of_pictures(interrupt)).transpose()?;
    let rows = analyses.as_ref().map(|found| found.rows()).transpose()?;
    let of_clusters = rows.map(|rows| analysis_of(&clusters, rows, &labels)).unwrap_or_default();
    let halves = rows.map(|rows| trust::between_halves(&labels, rows)).transpose()?.flatten();
    let steps = arguments.run.steps()?;
    let mut facts = facts(&labels);
    facts.extend(corrected.iter().flat_map(corrections_facts));
    facts.extend(arguments.merge.iter().map(MergedNumbers::fact));
    facts.extend(steps.facts);
    let trust = trust::measures(&labels, steps.between_heads, analysis.as_ref(), halves)?;
    let trust_by_name = trust.iter().map(|measure| (measure.name, measure.value)).collect();
    let html = Page {
        title: &arguments.run.title,
        facts,
        trust,
        metrics: steps.metrics,
        gallery: Gallery {
            images: &images,
            names: &names,
            labels: &labels,
            clusters: &clusters,
            truth: truth.as_ref(),
            analysis: analysis.as_ref(),
            similar: &of_clusters.similar,
            second_best: &of_clusters.second_best,
            shown: arguments.shown,
            is_served: false,
        },
        thumbnails: arguments.thumbnails,
        charts: steps.charts,
        served: None,
    }
    .html()?;
    let mut paths = vec![out.join(PAGE), out.join(files::TABLE)];
    stage::files::write(&paths[0], html.as_bytes())?;
    files::write_table(&paths[1], &clusters, &names)?;
    let beside = arguments.pictures.then(|| out.join(files::PICTURES));
    let source = arguments.source.as_deref();
    let copy = Form::Copy { images: &images, source };
    let copies = beside.iter().chain(&arguments.copy_to).map(|folder| (folder, copy));
    let links = arguments.link_to.iter().zip(source.map(Form::LinkTo));
    for (folder, form) in copies.chain(links) {
        files::write_pictures(folder, form, &clusters, &names, interrupt)?;
        paths.push(folder.clone());
    }
    Ok(WrittenReport { paths, clusters, trust: trust_by_name })
}

/// Applies the corrections, if any are given, and warns of those that could not be applied.
fn corrected(
    arguments: &ReportArguments,
    images: &Images,
    names: &Names,
    labels: &PseudoLabels,
) -> Result<Option<CorrectedClusters>> {
    let Some(path) = &arguments.corrections else { return Ok(None) };
    ensure!(path.exists(), "there is no file `{}`", path.display());
    let corrections = Corrections::open(path)?;
    let corrected = match (&arguments.corrected_data, &arguments.corrected_pseudo_labels) {
        (Some(data), Some(file)) => {
            let images = Images::open(&data.join("images.safetensors"))?;
            let names = Names::open(&data.join("names.safetensors"))?;
            let learnt = PseudoLabels::open(file)?;
            ensure!(
                labels.clusters == learnt.clusters,
                "`{}` has {} clusters but `{}` has {}; predict with the head of that run",
                arguments.run.pseudo_labels.display(),
                labels.clusters,
                file.display(),
                learnt.clusters
            );
            let run = ClusteredPictures::of(&learnt, &images, &names)?;
            corrections.resolve(&run).of_other_pictures(&labels.assignment)
        }
        _ => corrections.resolve(&ClusteredPictures::of(labels, images, names)?),
    };
    corrected.not_applied.iter().for_each(|sentence| tracing::warn!("{sentence}"));
    Ok(Some(corrected))
}

/// What the page says about corrections.
fn corrections_facts(corrected: &CorrectedClusters) -> Vec<String> {
    let summary = corrected.summary().map(|summary| {
        format!(
            "{summary} The scores, and how far to trust the clusters, are of the run before that."
        )
    });
    summary.into_iter().chain(corrected.not_applied.iter().cloned()).collect()
}

/// The paragraphs below the heading.
fn facts(labels: &PseudoLabels) -> Vec<String> {
    let (count, clusters) = (labels.index.len(), labels.clusters);
    let mut facts = vec![format!(
        "{} in {}. Cluster numbers are arbitrary.",
        counted(count, "picture"),
        counted(clusters, "cluster")
    )];
    if let Some(stability) = labels.stability {
        facts.push(format!(
            "A clustering network that was trained from scratch in the last round put {:.1} % of them \
             into the same clusters as the round before.",
            100. * stability
        ));
    }
    facts
}

/// The analysis of the clusters that are shown.
fn analysis_of(clusters: &[Cluster], rows: &UnitRows, labels: &PseudoLabels) -> ClusterAnalysis {
    let own = Cluster::of_places(clusters, labels.index.len());
    // Marked pictures come last.
    let count = clusters.iter().filter(|cluster| cluster.mark.is_none()).count();
    ClusterAnalysis::of(rows, &own, count)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use data::images::{self, StoredPicture};
    use data::metrics::{Reliable, Scores};
    use data::{DataSet, Picture, RoundMetrics};
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
            head_agreement: None,
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
            run: RunFiles {
                images: folder.join("images.safetensors"),
                names: folder.join("names.safetensors"),
                pseudo_labels: folder.join("pseudo-labels.safetensors"),
                embeddings: None,
                labels: None,
                steps: vec![run_files::step("0-secu=secu"), run_files::step("0-metrics=metrics")]
                    .into_iter()
                    .map(|step| step.map(|(name, last)| (name, folder.join(last))))
                    .collect::<Result<_, String>>()
                    .map_err(anyhow::Error::msg)?,
                title: "Photos".into(),
                cache: None,
            },
            shown: 24,
            thumbnails: 2000,
            merge: vec![],
            pictures: false,
            copy_to: None,
            link_to: None,
            source: None,
            out: folder.join("out/report"),
            corrections: None,
            corrected_data: None,
            corrected_pseudo_labels: None,
            json: false,
        };
        names.write(&arguments.run.names)?;
        PseudoLabels { data_set: images.data_set().clone(), ..labels() }
            .write(&arguments.run.pseudo_labels)?;
        for (_, folder) in &arguments.run.steps {
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
            let written = run(&arguments, &Interrupt::default())?.paths;
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
            assert_eq!(run(&arguments, &Interrupt::default())?.paths.len(), 3);
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
        let written = run(&arguments, &Interrupt::default())?.paths;
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

    /// The first four of the five pictures are in cluster 0 but for row 3.
    #[test]
    fn corrections_are_in_page_table_and_folders() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut arguments = ReportArguments { pictures: true, ..arguments(folder.path())? };
        let clustered = |arguments: &ReportArguments| {
            let labels = PseudoLabels::open(&arguments.run.pseudo_labels)?;
            ClusteredPictures::of(
                &labels,
                &Images::open(&arguments.run.images)?,
                &Names::open(&arguments.run.names)?,
            )
        };
        let of_run = clustered(&arguments)?;
        let path = folder.path().join(Corrections::FILE);
        arguments.corrections = Some(path.clone());
        let error = run(&arguments, &Interrupt::default()).expect_err("no such file").to_string();
        assert!(error.contains("corrections.toml"), "{error}");
        let mut corrections = Corrections::default();
        corrections.rename(&of_run, 0, Some("=<b>Dogs"))?;
        corrections.move_pictures(&of_run, &[0], 2)?;
        corrections.mark(&of_run, &[1], data::corrections::PictureMark::Outlier)?;
        corrections.write(&path)?;

        let written = run(&arguments, &Interrupt::default())?;
        let sizes = json!({ "clusters": [
            { "number": 0, "name": "=<b>Dogs", "pictures": 2 },
            { "number": 1, "name": null, "pictures": 0 },
            { "number": 2, "name": null, "pictures": 2 },
        ], "trust": {} });
        assert_eq!(written.json(), sizes);
        let (page, table) =
            (fs::read_to_string(&written.paths[0])?, fs::read_to_string(&written.paths[1])?);
        for part in [
            "Cluster 0: <bdi>=&lt;b&gt;Dogs</bdi> <small>2 pictures",
            "Cluster 2 <small>2 pictures",
            "Marked as outlier <small>1 picture,",
            "Corrections by hand: 1 cluster named, 1 picture moved, 1 picture marked as outlier. The scores",
            r#""titles":["cluster 0: =\u003cb>Dogs","cluster 1","cluster 2","marked as outlier"]"#,
        ] {
            assert!(page.contains(part), "{part} is not in: {page}");
        }
        for line in [
            "photos/5.png,0,0.7500,0.7000,true,'=<b>Dogs,",
            "<photos>/0.png,2,0.7500,0.2500,false,,",
            "photos/1.png,,0.5000,0.5000,true,,outlier",
        ] {
            assert!(table.lines().any(|found| found == line), "{line} is not in: {table}");
        }
        let pictures = |name: &str| fs::read_dir(arguments.out.join(name)).map(Iterator::count);
        assert_eq!(pictures("pictures/0-=_b_Dogs")?, 2);
        assert_eq!(pictures("pictures/outliers")?, 1);

        // Other pictures: clusters have their names, and nothing is moved.
        let others = folder.path().join("others");
        arguments.corrected_data = Some(folder.path().to_owned());
        arguments.corrected_pseudo_labels = Some(arguments.run.pseudo_labels.clone());
        arguments.pictures = false;
        arguments.run.pseudo_labels = others.clone();
        let labels = PseudoLabels::open(&folder.path().join("pseudo-labels.safetensors"))?;
        PseudoLabels { assignment: vec![2, 2, 2, 0, 2], clusters: 3, ..labels.clone() }
            .write(&others)?;
        let written = run(&arguments, &Interrupt::default())?;
        let sizes: Vec<usize> =
            written.clusters.iter().map(|cluster| cluster.members.len()).collect();
        assert_eq!(sizes, [1, 0, 4]);
        assert_eq!(written.clusters[0].name.as_deref(), Some("=<b>Dogs"));
        PseudoLabels { prototypes: vec![0.; 4], clusters: 4, ..labels }.write(&others)?;
        assert!(run(&arguments, &Interrupt::default()).is_err(), "another number of clusters");
        Ok(())
    }

    #[test]
    fn corrections_that_do_not_fit_are_facts_of_the_page() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut arguments = arguments(folder.path())?;
        let path = folder.path().join(Corrections::FILE);
        let id = "ab".repeat(32);
        fs::write(
            &path,
            format!(
                "format-version = 1\n[[cluster]]\nnumber = 3\nname = \"<i>Dogs\"\nexemplars = [\"{id}\"]\n\
                 [[picture]]\nid = \"{id}\"\nname = \"<script>\"\nmark = \"wrong\"\n"
            ),
        )?;
        arguments.corrections = Some(path);
        let page = fs::read_to_string(&run(&arguments, &Interrupt::default())?.paths[0])?;
        assert!(
            page.contains("<p>Cluster 3 (`&lt;i&gt;Dogs`) of the corrections was not found"),
            "{page}"
        );
        assert!(
            page.contains("<p>1 corrected picture is not in this run: `&lt;script&gt;`.</p>"),
            "{page}"
        );
        assert!(!page.contains("Corrections by hand"), "nothing was applied");
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
                assert_eq!(report.join().expect("no panic").expect("written").paths.len(), 3);
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
        names().write(&arguments.run.names)?;
        let error =
            format!("{:#}", run(&arguments, &Interrupt::default()).expect_err("other pictures"));
        assert!(error.contains("names.safetensors") && error.contains("other images"), "{error}");
        let mut arguments = arguments;
        arguments.run.pseudo_labels = folder.path().join("none");
        assert!(run(&arguments, &Interrupt::default()).is_err());
        assert!(run_files::step("0-secu").is_err());
        Ok(())
    }
}
