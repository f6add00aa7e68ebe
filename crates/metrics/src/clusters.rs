//! The program `clusters`: estimates the number of clusters in embeddings.
//!
//! `assort clusters RUN [--from 2] [--to 50] [--json]` starts it on a run's embeddings.
//! [`assignment::number`] explains the scores.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use assignment::Generalisation;
use assignment::number::{Estimator, EstimatorSettings, NumberScore, Suggestion, suggested};
use clap::Parser;
use data::{Embeddings, Space};
use rayon::prelude::*;
use serde_json::json;
use stage::console::{print_line, start_logging};
use stage::progress::{Progress, Unit};

/// Scores numbers of clusters on embeddings, and recommends one: a guess.
#[derive(Debug, Parser)]
#[command(name = "clusters", version)]
struct EstimateArguments {
    /// The output of `embed`: embeddings.safetensors.
    #[arg(long, value_name = "FILE")]
    embeddings: PathBuf,
    /// Fewest clusters.
    #[arg(long, value_name = "K", default_value_t = 2)]
    from: usize,
    /// Most clusters; by default 50, or a quarter of the images if that is less.
    #[arg(long, value_name = "K")]
    to: Option<usize>,
    /// Rows to use: `projection`, on which a run clusters, or `backbone`.
    #[arg(long, default_value = "projection", value_parser = space)]
    space: Space,
    /// Most images to use; drawn at random if there are more.
    #[arg(long, value_name = "N", default_value_t = 3000)]
    images: usize,
    /// Pairs of halves to compare for the stability.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pairs: usize,
    /// Starts of k-means on all images.
    #[arg(long, value_name = "N", default_value_t = 5)]
    restarts: usize,
    /// Sets without structure to compare with for the gap.
    #[arg(long, value_name = "N", default_value_t = 3)]
    references: usize,
    /// Neighbours of each image in the graph of the eigengap.
    #[arg(long, value_name = "N", default_value_t = 15)]
    neighbours: usize,
    /// Seed of every random draw.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Print the scores as one JSON object at the end.
    #[arg(long)]
    json: bool,
}

fn space(word: &str) -> Result<Space, String> {
    match word {
        "projection" => Ok(Space::Projection),
        "backbone" => Ok(Space::Backbone),
        _ => Err("must be projection or backbone".into()),
    }
}

/// The most clusters to try by default.
const MOST: usize = 50;

/// Most images to use for the indices of quadratic cost.
const MEASURED_IMAGES: usize = 1500;

/// Starts of each k-means on a half of the images or on images without structure.
const ROUGH_RESTARTS: usize = 2;

/// Few folds and iterations: the score of many numbers is compared, not published.
const GENERALISATION: Generalisation = Generalisation { folds: 3, weight: 1., iterations: 30 };

/// The program: the command line `words` in, the exit status out.
pub fn program(words: Vec<OsString>) -> ExitCode {
    start_logging();
    stage::finish("clusters", &run(&EstimateArguments::parse_from(words)))
}

fn run(arguments: &EstimateArguments) -> Result<()> {
    let EstimateArguments { from, images, pairs, restarts, seed, .. } = *arguments;
    let EstimateArguments { references, neighbours, .. } = *arguments;
    ensure!(from >= 2, "--from {from}: a single cluster has no scores; begin with 2");
    let path = arguments.embeddings.display();
    let file = Embeddings::open(&arguments.embeddings)?;
    let ((rows, width), count) = (file.rows(arguments.space), file.index.len());
    let used = images.min(count);
    let to = arguments.to.unwrap_or_else(|| MOST.min(used / 4).max(from));
    ensure!(from <= to, "--from {from} --to {to}: the range is empty");
    ensure!(
        to <= used / 2,
        "--to {to}: halves of {used} images are compared, so at most {} clusters are possible",
        used / 2
    );
    let settings = EstimatorSettings {
        images,
        measured_images: MEASURED_IMAGES,
        restarts,
        rough_restarts: ROUGH_RESTARTS,
        pairs,
        references,
        neighbours,
        most_clusters: to,
        generalisation: GENERALISATION,
    };
    let estimator =
        Estimator::new(rows, width, &settings, seed).with_context(|| format!("`{path}`"))?;
    print_line(format_args!("{used} of {} images of `{path}`\n", count))?;
    print_line(format_args!(
        "{:>8} {:>10} {:>9} {:>8} {:>7} {:>8} {:>9}",
        "clusters", "silhouette", "stability", "strength", "gap", "eigengap", "generalis."
    ))?;
    let mut candidates = vec![];
    // On a terminal, the growing table is the sign of life.
    let mut progress = (!std::io::stdout().is_terminal())
        .then(|| Progress::new("numbers of clusters", (to + 1 - from) as u64, Unit::Steps));
    // Some numbers at a time: parts of a score use one thread alone.
    let numbers: Vec<usize> = (from..=to).collect();
    for numbers in numbers.chunks(2 * rayon::current_num_threads()) {
        let scores = numbers.par_iter().map(|&clusters| estimator.score(clusters));
        for candidate in scores.collect::<Result<Vec<NumberScore>>>()? {
            print_line(line(&candidate))?;
            candidates.push(candidate);
            progress.iter_mut().for_each(|progress| progress.step(""));
        }
    }
    drop(progress);
    let suggestion = suggested(&candidates);
    print_line(format_args!("\n{}", advice(suggestion.as_ref())))?;
    if arguments.json {
        let object = json!({
            "images": used,
            "candidates": candidates,
            "recommended": suggestion.as_ref().map(|suggestion| suggestion.clusters),
            "range": suggestion.as_ref().map(|suggestion| suggestion.range),
            "reasons": suggestion.map(|suggestion| suggestion.reasons),
            "is-a-guess": true,
        });
        print_line(object)?;
    }
    Ok(())
}

fn line(candidate: &NumberScore) -> String {
    let NumberScore { clusters, silhouette, stability, prediction_strength, gap, .. } = candidate;
    let NumberScore { eigengap, generalisation, .. } = candidate;
    format!(
        "{clusters:8} {silhouette:10.3} {stability:9.3} {prediction_strength:8.3} {gap:7.3} {eigengap:8.3} \
         {generalisation:9.3}"
    )
}

fn advice(suggestion: Option<&Suggestion>) -> String {
    let Some(Suggestion { clusters, range: [from, to], reasons }) = suggestion else {
        return "No number of clusters is better than chance here.".to_owned();
    };
    let mut text = match from == to {
        true => format!("{clusters} clusters. Each index alone says:\n"),
        false => format!(
            "{clusters} clusters; {from} to {to} are nearly as good. Each index alone says:\n"
        ),
    };
    for vote in reasons {
        text.push_str(&format!("  {:20} {:4}  {}\n", vote.index, vote.clusters, vote.rule));
    }
    text + "This is a guess: all of them measure embeddings, not what the images show. Look at \
            pictures of the clusters; ask for more clusters and merge, or for fewer."
}
