//! Report: what a run found, to look at and to go on with.
//!
//! From the prepared pictures and a run's pseudo-labels it writes `clusters.csv`, one line for each
//! picture with its name, cluster and confidence; `report.html`, one page that shows of each cluster
//! the surest and the least sure pictures, the scores, and how training went; and, where asked for,
//! a folder of pictures for each cluster.
//!
//! It reads no labels: the scores are those that `metrics` wrote. It knows no network and no method.
//!
//! - [`clusters`]: which picture is where, and how sure.
//! - [`files`]: the table, and the folders.
//! - [`page`]: the page, with [`thumbnail`]s, [`scores`] and [`curves`].

pub mod clusters;
pub mod curves;
pub mod files;
pub mod page;
pub mod scores;
pub mod thumbnail;

use std::env::ArgsOs;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, FromArgMatches, Parser};
use data::{Images, Names, PseudoLabels};

use crate::clusters::Cluster;
use crate::page::Page;
use crate::scores::Scores;

/// Writes what a run found as a page, a table and folders of pictures.
#[derive(Debug, Clone, Parser)]
pub struct Arguments {
    /// The prepared pictures: images.safetensors.
    #[arg(long, value_name = "FILE")]
    pub images: PathBuf,
    /// Their names: names.safetensors.
    #[arg(long, value_name = "FILE")]
    pub names: PathBuf,
    /// The clusters: pseudo-labels.safetensors.
    #[arg(long, value_name = "FILE")]
    pub pseudo_labels: PathBuf,
    /// A step of the run, whose metrics.json and log.jsonl are told of; several in their order.
    #[arg(long = "step", value_name = "NAME=DIR", value_parser = step)]
    pub steps: Vec<(String, PathBuf)>,
    /// Heading of the page.
    #[arg(long, value_name = "TEXT", default_value = "Clusters")]
    pub title: String,
    /// Pictures of each cluster to show: the surest, and a third as many of the least sure.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub shown: usize,
    /// Also copy every picture to a folder of its cluster.
    #[arg(long)]
    pub pictures: bool,
    /// Folder to write into; created when missing.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

fn step(word: &str) -> Result<(String, PathBuf), String> {
    let (name, folder) = word.split_once('=').ok_or("it is NAME=DIR")?;
    Ok((name.to_owned(), folder.into()))
}

/// Name of the page in the folder of a report.
pub const PAGE: &str = "report.html";

/// The program: the command line `words` in, the exit status out.
pub fn program(words: ArgsOs) -> ExitCode {
    stage::console::start_logging();
    let command = Arguments::command().name("report").version(env!("CARGO_PKG_VERSION"));
    let arguments = match Arguments::from_arg_matches(&command.get_matches_from(words)) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let print = |path: &PathBuf| stage::console::print_line(path.display());
    let result = run(&arguments).and_then(|written| written.iter().try_for_each(print));
    stage::finish("report", &result)
}

/// Writes the report; returns what it wrote, the page first.
///
/// # Errors
///
/// A file is missing or damaged, they are about different pictures, or the report cannot be written.
pub fn run(arguments: &Arguments) -> Result<Vec<PathBuf>> {
    let images = Images::open(&arguments.images)?;
    let names = Names::open(&arguments.names)?;
    let labels = PseudoLabels::open(&arguments.pseudo_labels)?;
    let remedy = "give the images and names that the run was made with";
    names.data_set.require(images.data_set(), remedy)?;
    labels.data_set.require(images.data_set(), remedy)?;
    images.keep_decoded(0); // Each is looked at once.

    let clusters = Cluster::all(&labels);
    let out = &arguments.out;
    fs::create_dir_all(out).with_context(|| format!("creating `{}`", out.display()))?;
    let (page, table, pictures) =
        (out.join(PAGE), out.join(files::TABLE), out.join(files::PICTURES));
    let mut written = vec![page.clone(), table.clone()];
    if arguments.pictures {
        files::copy_pictures(&pictures, &clusters, &images, &names)?;
        written.push(pictures);
    }
    files::write_table(&table, &clusters, &names)?;

    let (mut scores, mut charts) = (Vec::new(), Vec::new());
    for (step, folder) in &arguments.steps {
        if let Some((path, text)) = text_of(&folder.join("metrics.json"))? {
            let found = Scores::of(&text).with_context(|| format!("`{}`", path.display()))?;
            let (round, _) = step.split_once('-').unwrap_or((step, ""));
            scores.extend(found.map(|found| (round.to_owned(), found)));
        }
        if let Some((path, text)) = text_of(&folder.join("log.jsonl"))? {
            let found = curves::charts(&text).with_context(|| format!("`{}`", path.display()))?;
            charts.push((step.clone(), found));
        }
    }
    let html = Page {
        title: &arguments.title,
        facts: facts(&labels),
        scores,
        clusters: &clusters,
        shown: arguments.shown,
        charts,
    }
    .html(&images, &names)?;
    stage::files::write(&page, html.as_bytes())?;
    Ok(written)
}

/// What was found, in a sentence each.
fn facts(labels: &PseudoLabels) -> Vec<String> {
    let (count, clusters) = (labels.index.len(), labels.clusters);
    let reliable = labels.reliable.iter().filter(|reliable| **reliable).count();
    let share = 100. * reliable as f64 / count.max(1) as f64;
    let mut facts = vec![format!(
        "{count} pictures in {clusters} clusters. The number of a cluster has no meaning."
    )];
    if reliable < count {
        facts.push(format!("{reliable} of them ({share:.1} %) are held to be reliable."));
    }
    if let Some(stability) = labels.stability {
        facts.push(format!(
            "{:.1} % stayed where they were when the last round was clustered afresh.",
            100. * stability
        ));
    }
    facts
}

/// A file that need not be there.
fn text_of(path: &Path) -> Result<Option<(&Path, String)>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some((path, text))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading `{}`", path.display())),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use data::images::{Identical, Source, Writer};
    use data::{DataSet, Picture};
    use image::ImageFormat;
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
        let mut writer = Writer::create(&path, 1, Identical::Keep)?;
        for number in 0..7 {
            let pixels = (0..6 * 7).map(|i| (i * i * (3 + number) % 251) as u8).collect();
            let picture = Picture::new(6, 7, 1, pixels)?;
            let source = match number % 2 {
                0 => Source::raw(picture, 1)?,
                _ => {
                    let mut file = std::io::Cursor::new(Vec::new());
                    thumbnail::to_image(&picture)?.write_to(&mut file, ImageFormat::Png)?;
                    Source::file(file.into_inner(), 1)?
                }
            };
            writer.add(&source, Split::Train)?;
        }
        writer.finish(None)?;
        let images = Images::open(&path)?;
        let names = Names { data_set: images.data_set().clone(), ..names() };
        Ok((images, names))
    }

    fn arguments(folder: &Path) -> Result<Arguments> {
        let (images, names) = prepared(folder)?;
        let arguments = Arguments {
            images: folder.join("images.safetensors"),
            names: folder.join("names.safetensors"),
            pseudo_labels: folder.join("pseudo-labels.safetensors"),
            steps: vec![step("0-secu=secu"), step("0-metrics=metrics")]
                .into_iter()
                .map(|step| step.map(|(name, last)| (name, folder.join(last))))
                .collect::<Result<_, String>>()
                .map_err(anyhow::Error::msg)?,
            title: "Photos".into(),
            shown: 24,
            pictures: false,
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
            "{\"epoch\":1,\"loss\":2}\n{\"epoch\":2,\"loss\":1}",
        )?;
        let metrics = r#"{"head":{"acc":0.6,"nmi":0.4,"ari":0.2},"kmeans":{"acc":0.5}}"#;
        fs::write(folder.join("metrics/metrics.json"), metrics)?;
        Ok(arguments)
    }

    #[test]
    fn a_report_is_a_page_and_a_table_and_written_again_as_often_as_asked() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut arguments = arguments(folder.path())?;
        for _ in 0..2 {
            let written = run(&arguments)?;
            let out = &arguments.out;
            assert_eq!(written, [out.join("report.html"), out.join("clusters.csv")]);
            let page = fs::read_to_string(&written[0])?;
            for part in [
                "<h1>Photos</h1>",
                "5 pictures in 3 clusters.",
                "3 of them (60.0 %)",
                "87.5 % stayed",
                "<td>0<td>60.0<td>40.0<td>20.0<td>50.0",
                "0-secu, by epoch",
            ] {
                assert!(page.contains(part), "{part} is not in: {page}");
            }
            assert_eq!(fs::read_to_string(&written[1])?.lines().count(), 6);
            assert!(!out.join("pictures").exists());
        }
        arguments.pictures = true;
        assert_eq!(run(&arguments)?.len(), 3);
        assert!(run(&arguments).is_err(), "the folder of pictures is there");
        Ok(())
    }

    #[test]
    fn files_about_other_pictures_are_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let arguments = arguments(folder.path())?;
        names().write(&arguments.names)?;
        let error = format!("{:#}", run(&arguments).expect_err("other pictures"));
        assert!(error.contains("names.safetensors") && error.contains("other images"), "{error}");
        let arguments = Arguments { pseudo_labels: folder.path().join("none"), ..arguments };
        assert!(run(&arguments).is_err());
        assert!(step("0-secu").is_err());
        Ok(())
    }
}
