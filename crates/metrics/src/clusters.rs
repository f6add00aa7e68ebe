//! The program `clusters`: estimates the number of clusters in embeddings.
//!
//! `assort clusters RUN [--from 2] [--to 50] [--json]` starts it on a run's embeddings.
//! [`crate::number`] explains the scores.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use data::{EmbeddingRows, Space};
use serde_json::json;
use stage::console::{print_line, start_logging};

use crate::number::{self, Estimator, EstimatorSettings, NumberScore};

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
    /// Most clusters.
    #[arg(long, value_name = "K", default_value_t = 50)]
    to: usize,
    /// Rows to use: `projection`, on which a run clusters, or `backbone`.
    #[arg(long, default_value = "projection", value_parser = space)]
    space: Space,
    /// Most images to use; drawn at random if there are more.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    images: usize,
    /// Pairs of halves to compare for the stability.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pairs: usize,
    /// Starts of each k-means.
    #[arg(long, value_name = "N", default_value_t = 5)]
    restarts: usize,
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

/// Most images to use for the silhouette, whose cost is quadratic.
const SILHOUETTE_IMAGES: usize = 3000;

/// The program: the command line `words` in, the exit status out.
pub fn program(words: Vec<OsString>) -> ExitCode {
    start_logging();
    stage::finish("clusters", &run(&EstimateArguments::parse_from(words)))
}

fn run(arguments: &EstimateArguments) -> Result<()> {
    let EstimateArguments { from, to, images, pairs, restarts, seed, .. } = *arguments;
    ensure!(from >= 2, "--from {from}: a single cluster has no scores; begin with 2");
    ensure!(from <= to, "--from {from} --to {to}: the range is empty");
    let path = arguments.embeddings.display();
    let file = EmbeddingRows::open(&arguments.embeddings, arguments.space)?;
    let settings =
        EstimatorSettings { images, silhouette_images: SILHOUETTE_IMAGES, restarts, pairs };
    let estimator = Estimator::new(&file.rows(0..file.len()), file.width(), &settings, seed)
        .with_context(|| format!("`{path}`"))?;
    let used = estimator.images();
    ensure!(
        to <= used / 2,
        "--to {to}: halves of {used} images are compared, so at most {} clusters are possible",
        used / 2
    );
    print_line(format_args!("{used} of {} images of `{path}`\n", file.len()))?;
    print_line(format_args!("{:>8} {:>10} {:>9}    error", "clusters", "silhouette", "stability"))?;
    let mut candidates = vec![];
    for clusters in from..=to {
        let candidate = estimator.score(clusters)?;
        print_line(line(&candidate))?;
        candidates.push(candidate);
    }
    let recommended = number::recommended(&candidates).map(|candidate| candidate.clusters);
    print_line(format_args!("\n{}", advice(recommended)))?;
    if arguments.json {
        let object = json!({
            "images": used,
            "candidates": candidates,
            "recommended": recommended,
            "is-a-guess": true,
        });
        print_line(object)?;
    }
    Ok(())
}

fn line(candidate: &NumberScore) -> String {
    let NumberScore { clusters, silhouette, stability, stability_error } = *candidate;
    let bar = "#".repeat((stability.max(0.) * 40.).round() as usize);
    format!("{clusters:8} {silhouette:10.3} {stability:9.3}    {stability_error:.3} {bar}")
}

fn advice(recommended: Option<usize>) -> String {
    let guess = "This is a guess: both scores measure how well k-means separates these embeddings, \
                 not what the images show, and both can favour a coarser grouping than the one you \
                 seek. Look at the scores above, and at pictures of the clusters.";
    match recommended {
        Some(clusters) => format!(
            "{clusters} clusters: the highest silhouette among the numbers that are most stable under \
             resampling. {guess}"
        ),
        None => format!("No number of clusters is better than chance here. {guess}"),
    }
}
