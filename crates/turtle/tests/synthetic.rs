//! The whole stage on made-up features: what it finds, and that stopping changes nothing.

use std::fs;
use std::path::Path;

use anyhow::Result;
use assignment::contingency;
use data::{DataSet, Embeddings, PseudoLabels};
use fixture::features::{MadeFeatures, nuisance};
use fixture::outputs;
use frozen::rows::FrozenEmbeddings;
use stage::{Interrupted, Job, Stage};
use turtle::Turtle;
use turtle::config::{Config, RatePair};

/// The table of `configs/stage/turtle.toml`, with few steps.
fn table(steps: usize, batch_size: usize) -> Config {
    let mut config = fixture::published::<Turtle>();
    (config.steps, config.batch_size, config.save_every) = (steps, batch_size, 3);
    config.generalisation.folds = 5;
    config.generalisation.iterations = 100;
    config
}

fn accuracy(assignment: &[u32], made: &MadeFeatures) -> Result<f64> {
    let count = made.class_count;
    let table = contingency(assignment, &made.classes, count, count)?;
    let hits =
        table.best_map().into_iter().enumerate().filter_map(|(row, column)| {
            column.map(|column| f64::from(table.at(row, column as usize)))
        });
    Ok(hits.sum::<f64>() / assignment.len() as f64)
}

/// Accuracies of the labelling and of k-means, and the generalisation scores of the pairs of rates.
fn accuracies(config: &Config, count: usize, seed: u64) -> Result<(f64, f64, Vec<f64>)> {
    let made = nuisance(count, 10, 6, 0.55, seed);
    let count = made.classes.len();
    let folder = tempfile::tempdir()?;
    let job = Job { seed: 1, ..Job::new("turtle", "none", folder.path(), fixture::data(10, &[])) };
    let embeddings = FrozenEmbeddings {
        data_set: DataSet { path: "made up".into(), images: count, fingerprint: "f".into() },
        index: (0..count as u32).collect(),
        width: made.width,
        rows: made.rows.clone().into(),
        projection_width: made.width,
        projections: made.rows.clone().into(),
        previous: None,
        earlier: None,
    };
    let labels = turtle::cluster(config, embeddings, &job)?.expect("one rank");
    let log = fs::read_to_string(folder.path().join("log.jsonl"))?;
    let line: serde_json::Value = serde_json::from_str(log.lines().last().expect("a line"))?;
    let scores = serde_json::from_value(line["generalisation-scores"].clone())?;
    let found = accuracy(&labels.assignment, &made)?;
    Ok((found, accuracy(&labels.kmeans_assignment, &made)?, scores))
}

fn with_rates(steps: usize, rates: &[(f64, f64)]) -> Config {
    let rates = rates.iter().map(|&(inner, outer)| RatePair { inner, outer }).collect();
    Config { rates, save_every: 1000, ..table(steps, 10_000) }
}

/// With rates of 1e-3 the encoder hardly leaves its start, and the score tells.
#[test]
fn the_generalisation_score_chooses_the_rates_that_find_more() -> Result<()> {
    let slow = accuracies(&with_rates(150, &[(1e-3, 1e-3)]), 800, 1)?;
    let fast = accuracies(&with_rates(150, &[(1e-2, 1e-2)]), 800, 1)?;
    let (found, _, scores) = accuracies(&with_rates(150, &[(1e-3, 1e-3), (1e-2, 1e-2)]), 800, 1)?;
    println!("1e-3: {slow:?}; 1e-2: {fast:?}; both: {found}");
    assert_eq!(scores, [slow.2[0], fast.2[0]]);
    assert!(scores[1] > scores[0], "{scores:?}");
    assert!(found == fast.0 && found > slow.0 + 0.05, "{found}, {}", slow.0);
    Ok(())
}

/// Nine runs of 500 steps: the pair of the highest score finds more than k-means on every seed.
#[test]
fn the_highest_score_beats_k_means_on_three_seeds() -> Result<()> {
    for seed in 0..3 {
        let mut best = (0., 0.);
        for rates in [(1e-3, 1e-3), (1e-3, 1e-2), (1e-2, 1e-2)] {
            let (found, k_means, scores) = accuracies(&with_rates(500, &[rates]), 2000, seed)?;
            println!("seed {seed}, {rates:?}: {found}, k-means {k_means}, score {}", scores[0]);
            if scores[0] > best.0 {
                best = (scores[0], found - k_means);
            }
        }
        assert!(best.1 > 0.1, "seed {seed}: {best:?}");
    }
    Ok(())
}

fn stage_job(folder: &Path, out: &str) -> Job {
    nuisance(120, 4, 2, 0.2, 5).job("turtle", folder, out)
}

/// Interrupted after every single step, with batches smaller than the set.
#[test]
fn a_run_resumes_to_the_same_bytes_after_any_step() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let whole = stage_job(folder.path(), "whole");
    Turtle::run(&table(5, 50), &whole)?;
    let parts = stage_job(folder.path(), "parts");
    parts.interrupt.raise();
    let mut stops = 0;
    while let Err(error) = Turtle::run(&table(5, 50), &parts) {
        assert!(error.is::<Interrupted>(), "{error:#}");
        stops += 1;
        assert!(stops <= 5, "a step is taken each time");
    }
    assert_eq!(stops, 5);
    let (want, got) = (outputs(&whole.out), outputs(&parts.out));
    let names: Vec<&String> = want.keys().collect();
    let all = ["head.safetensors", "log.jsonl", "numbers.safetensors", "pseudo-labels.safetensors"];
    assert_eq!(names, all);
    assert!(want == got, "other bytes");
    let other = Job { seed: 9, ..stage_job(folder.path(), "other") };
    other.interrupt.raise();
    assert!(Turtle::run(&table(5, 50), &other).is_err());
    let again = Job { seed: 8, ..other };
    let error = Turtle::run(&table(5, 50), &again).expect_err("another seed").to_string();
    assert!(error.contains("another run"), "{error}");
    Ok(())
}

/// Three pairs of rates, of which four ranks leave one rank without.
#[test]
fn ranks_write_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fixture::assert_same_on_ranks::<Turtle>(&table(5, 50), |out| stage_job(folder.path(), out));
    Ok(())
}

#[test]
fn another_number_of_ranks_resumes_to_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (config, whole) = (table(5, 50), stage_job(folder.path(), "whole"));
    Turtle::run(&config, &whole)?;
    let parts = stage_job(folder.path(), "parts");
    let ranks = [2, 4, 1].into_iter().cycle();
    let stops =
        ranks.take_while(|&ranks| fixture::stops_on_ranks::<Turtle>(&config, &parts, ranks));
    assert_eq!(stops.count(), 5, "a step is taken each time");
    fixture::assert_same_outputs(&whole, &parts);
    Ok(())
}

#[test]
fn the_head_gives_the_assignments_of_the_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let job = stage_job(folder.path(), "out");
    Turtle::run(&table(5, 50), &job)?;
    let labels = PseudoLabels::open(&job.out.join(PseudoLabels::FILE))?;
    let head = data::head::open(&job.out)?;
    assert_eq!((head.header_text("form")?, head.header_number("clusters")?), ("linear", 4));
    let [mean, deviation, weight, bias] = [
        head.f32("mean")?,
        head.f32("deviation")?,
        head.f32("output.weight")?,
        head.f32("output.bias")?,
    ];
    let rows = Embeddings::open(&folder.path().join("embeddings.safetensors"))?.backbone;
    let width = mean.len();
    for (row, &cluster) in rows.chunks(width).zip(&labels.assignment) {
        let logit = |k: usize| -> f32 {
            let x = row.iter().zip(&mean).zip(&deviation).map(|((x, m), s)| (x - m) / s);
            x.zip(&weight[k * width..]).map(|(x, w)| x * w).sum::<f32>() + bias[k]
        };
        let own = logit(cluster as usize);
        assert!((0..4).all(|k| logit(k) <= own + 1e-5));
    }
    Ok(())
}
