//! Stage: TURTLE, the labelling of frozen embeddings that linear classifiers learn best.
//!
//! Gadetsky, Jiang and Brbić 2024 (arXiv:2406.07236). A linear task encoder proposes soft labels; a
//! linear classifier, initialised again at every step, learns them for a few steps; the encoder moves so
//! that the classifier's cross-entropy falls and all clusters stay in use. The right learning rates differ
//! between data sets, so the search runs under each pair of rates of the table, and keeps the labelling of
//! the highest [generalisation score](assignment::Generalisation). No ground truth is used.
//!
//! - Reads `embeddings`, of which the `backbone` rows; `previous`, this stage's last round, if any; and
//!   `earlier`, the run before, after which it numbers the clusters ([`frozen::numbers`]).
//! - Writes `pseudo-labels.safetensors` and `head.safetensors`, form `linear`.
//!
//! Departures from the authors' program: rows are standardised, because their scale decides how sharp the
//! first labels are; one space of features, as one file of embeddings is read (the [`model`] takes
//! several). k-means on the same rows is always run. Everything is computed on the CPU. Ranks share the pairs of
//! rates, the search for neighbours and the restarts of k-means.
//!
//! Start at [`cluster`]: the method in order. [`model`] has the equations.

pub mod config;
pub mod model;
pub mod search;

use anyhow::{Context, Result};
use assignment::{adjusted_rand_index, argmax_rows, contingency};
use data::PseudoLabels;
use frozen::product::FlatMatrix;
use frozen::result::{HeadResult, cluster_sizes};
use frozen::rows::{FrozenEmbeddings, Standardisation, cosine_neighbours};
use frozen::state::HeadState;
use serde_json::json;
use stage::container::Tensor;
use stage::random::stream;
use stage::{Effort, Job, Output, Ranks, Spec, Stage};

use crate::config::Config;
use crate::model::LinearLayer;
use crate::search::Search;

/// The stage: see the documentation of the crate.
pub struct Turtle;

impl Stage for Turtle {
    const SPEC: Spec = Spec {
        name: "turtle",
        algorithm: 3,
        inputs: frozen::INPUTS,
        outputs: &[Output::PseudoLabels],
        ranks: Ranks::Any,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check()?;
        frozen::check_splits(job)?;
        Ok(Effort::NONE)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        frozen::run(job, |embeddings| cluster(config, embeddings, job))
    }
}

/// The method: the search under each pair of rates, the best labelling, k-means beside it. The first rank writes
/// the head and returns the pseudo-labels; the others return `None`.
///
/// # Errors
///
/// The search diverges or collapses ([`stage::Diverged`]), the user interrupts ([`stage::Interrupted`]), a
/// row has no direction, or a file cannot be written.
pub fn cluster(
    config: &Config,
    embeddings: FrozenEmbeddings,
    job: &Job,
) -> Result<Option<PseudoLabels>> {
    let (width, clusters, ranks) = (embeddings.width, job.data.clusters, &job.communicator);
    let standardisation = Standardisation::of(&embeddings.rows, width);
    let rows = standardisation.apply(&embeddings.rows);
    let state = HeadState::new(job, search::KIND, &embeddings, config)?;
    let mut search = Search::resume_or_start(config, job, width, state)?;
    search.run(&rows, width)?;

    let layers = search.encoders.iter().map(|encoder| encoder.effective());
    let own = layers.map(|layer| Labelling::new(layer, &rows, width, config, job));
    let found = Labelling::gathered(own.collect::<Result<Vec<Labelling>>>()?, job)?;
    let (neighbours, similarity) = cosine_neighbours(
        &embeddings.rows,
        width,
        config.reliable.neighbours.min(embeddings.count() - 1),
        ranks,
    )?;
    let k_means = config.k_means.assign(&embeddings.rows, width, clusters, job.seed, ranks)?;
    if !ranks.is_first() {
        return Ok(None);
    }

    // The labelling that generalises best, among those that use the most clusters, because a single cluster
    // would be learnt without error. Of a tie, the first.
    let scores: Vec<f64> = found.iter().map(|labelling| labelling.score).collect();
    let rank = |one: &Labelling| (one.clusters_in_use(clusters), one.score);
    let better =
        |best: Labelling, next: Labelling| if rank(&next) > rank(&best) { next } else { best };
    let best = found.into_iter().reduce(better).context("there are no learning rates")?;

    let map = HeadResult::numbering(&best.assignment, &embeddings, clusters)?;
    let result = HeadResult {
        assignment: best.assignment.iter().map(|&cluster| map[cluster as usize]).collect(),
        kmeans_assignment: k_means,
        trusted: best.confidence.iter().map(|&c| c >= config.reliable.confidence as f32).collect(),
        confidence: best.confidence,
        neighbours,
        agreeing_neighbours: config.reliable.agreeing,
    };
    let with_k_means =
        contingency(&result.assignment, &result.kmeans_assignment, clusters, clusters)?;
    job.log(&json!({
        "phase": "result",
        "generalisation-scores": scores,
        "sizes": cluster_sizes(&result.assignment, clusters),
        "similarity-of-last-neighbour": similarity,
        "rand-index-with-k-means": adjusted_rand_index(&with_k_means),
    }))?;
    write_head(&best.layer, &map, &standardisation, job)?;
    Ok(Some(result.pseudo_labels(embeddings, job)?))
}

/// The labels of the rows by one encoder, and how well a classifier learns them.
struct Labelling {
    layer: LinearLayer<f32>,
    assignment: Vec<u32>,
    confidence: Vec<f32>,
    score: f64,
}

impl Labelling {
    fn new(
        layer: LinearLayer<f32>,
        rows: &[f32],
        width: usize,
        config: &Config,
        job: &Job,
    ) -> Result<Self> {
        let clusters = job.data.clusters;
        let logs = layer.softmax_of_all(FlatMatrix::new(rows, width)?)?.logs;
        let (assignment, confidence) = argmax_rows(&logs, clusters)?;
        let mut random = stream(job.seed, "turtle score", &[]);
        let drawn = assignment::sample(assignment.len(), config.generalisation.images, &mut random);
        let some: Vec<f32> =
            drawn.iter().flat_map(|&i| &rows[i * width..][..width]).copied().collect();
        let labels: Vec<u32> = drawn.iter().map(|&i| assignment[i]).collect();
        let score = config.generalisation.score();
        let score = score.score(&some, width, &labels, clusters, job.seed)?;
        let confidence = confidence.into_iter().map(f32::exp).collect();
        Ok(Self { layer, assignment, confidence, score })
    }

    /// The labellings of all ranks on the first rank, in the order of the pairs of rates; none on the others.
    fn gathered(own: Vec<Self>, job: &Job) -> Result<Vec<Self>> {
        let ranks = &job.communicator;
        let weights = ranks.gather(own.iter().map(|one| one.layer.weight.clone()).collect())?;
        let biases = ranks.gather(own.iter().map(|one| one.layer.bias.clone()).collect())?;
        let scores = ranks.gather(own.iter().map(|one| vec![one.score]).collect())?;
        let labels = own.into_iter().map(|one| (one.assignment, one.confidence));
        let (assignments, confidences) = labels.unzip();
        let labels = ranks.gather(assignments)?.into_iter().zip(ranks.gather(confidences)?);
        let labellings = labels.enumerate().map(|(pair, (assignment, confidence))| Self {
            layer: LinearLayer { weight: weights[pair].clone(), bias: biases[pair].clone() },
            assignment,
            confidence,
            score: scores[pair][0],
        });
        Ok(labellings.collect())
    }

    fn clusters_in_use(&self, clusters: usize) -> usize {
        cluster_sizes(&self.assignment, clusters).into_iter().filter(|&size| size > 0).count()
    }
}

/// Writes `head.safetensors`, form `linear`, its clusters numbered by `map`.
fn write_head(
    layer: &LinearLayer<f32>,
    map: &[u32],
    standardisation: &Standardisation,
    job: &Job,
) -> Result<()> {
    let (clusters, width) = (layer.bias.len(), standardisation.mean.len());
    let (mut weight, mut bias) = (vec![0.; layer.weight.len()], vec![0.; clusters]);
    for ((row, &b), &to) in layer.weight.chunks_exact(width).zip(&layer.bias).zip(map) {
        weight[to as usize * width..][..width].copy_from_slice(row);
        bias[to as usize] = b;
    }
    data::head::write(
        &job.out,
        clusters,
        "linear",
        &[
            Tensor::f32("mean", &[width], &standardisation.mean),
            Tensor::f32("deviation", &[width], &standardisation.deviation),
            Tensor::f32("output.weight", &[clusters, width], &weight),
            Tensor::f32("output.bias", &[clusters], &bias),
        ],
    )
}
