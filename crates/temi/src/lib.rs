//! Stage: TEMI, many small heads on frozen embeddings, and what they agree on.
//!
//! Adaloglou, Michels, Kalisch, Kollmann 2023 (arXiv:2303.17896). Each step takes images and one of the
//! nearest neighbours of each. The online head's output for one is pulled to the target head's output for
//! the other by pointwise mutual information, which the running marginal keeps balanced; pairs on which
//! the target heads disagree weigh less. The paper keeps the head of the lowest loss. Here the result is the
//! consensus of the heads ([`assignment::consensus`]), which was better in six of seven measured runs.
//!
//! - Reads `embeddings`, of which the `backbone` rows; `previous`, this stage's last round, if any; and
//!   `earlier`, the run before, after which it numbers the clusters ([`frozen::numbers`]).
//! - Writes `pseudo-labels.safetensors` and `head.safetensors`, form `ensemble`. A picture is reliable if
//!   nearly all heads and its neighbours agree on its cluster.
//!
//! k-means on the same rows is always run; its clusters stand in the file and its agreement with the
//! heads in the log. Everything is computed on the CPU, whatever `--device` says: the heads are small. Ranks
//! share the heads, the search for neighbours and the restarts of k-means.
//! The objective favours clusters of equal size; [`Objective::balance`](loss::Objective) below 1 weakens that.
//!
//! Start at [`cluster`]: the method in order. [`learner::step`] is one step, [`loss`] the objective.

pub mod config;
pub mod fit;
pub mod head;
pub mod learner;
pub mod loss;
pub mod network;
pub mod schedule;
pub mod state;

use anyhow::Result;
use assignment::{
    adjusted_rand_index, agreement, argmax_rows, consensus, contingency, merged_clusters,
};
use data::PseudoLabels;
use frozen::result::{HeadResult, cluster_sizes};
use frozen::rows::{FrozenEmbeddings, Standardisation, cosine_neighbours};
use frozen::state::HeadState;
use serde_json::json;
use stage::{Effort, Job, Output, Ranks, Spec, Stage};

use crate::config::{Config, HeadPlan};
use crate::head::Ensemble;
use crate::state::HeadRun;

/// The stage: see the documentation of the crate.
pub struct Temi;

impl Stage for Temi {
    const SPEC: Spec = Spec {
        name: "temi",
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

/// The method: neighbours, the heads, k-means, the consensus of the heads. The first rank writes the head and
/// returns the pseudo-labels; the others return `None`.
///
/// # Errors
///
/// The heads diverge or collapse ([`stage::Diverged`]), the user interrupts ([`stage::Interrupted`]), a
/// row has no direction, or a file cannot be written.
pub fn cluster(
    config: &Config,
    embeddings: FrozenEmbeddings,
    job: &Job,
) -> Result<Option<PseudoLabels>> {
    let (width, clusters, ranks) = (embeddings.width, job.data.clusters, &job.communicator);
    let plan = config.plan(embeddings.count(), width, clusters);
    let state = HeadState::new(job, state::KIND, &embeddings, config)?;
    let first = || fit::first_heads(config, &plan, job);
    let (mut run, starts) = HeadRun::resume_or_start(job, plan, state, first, config.heads)?;

    // Neighbours on the raw rows; the heads see standardised ones.
    let (neighbours, similarity) =
        cosine_neighbours(&embeddings.rows, width, plan.neighbours, ranks)?;
    let standardisation = Standardisation::of(&embeddings.rows, width);
    let rows = standardisation.apply(&embeddings.rows);
    if starts {
        job.log(&json!({
            "phase": "neighbours",
            "neighbours": plan.neighbours,
            "similarity-of-last": similarity,
            "batch": plan.batch,
            "steps": plan.steps,
        }))?;
    }
    fit::train(config, &plan, &rows, &neighbours, &mut run, job)?;

    let k_means = config.k_means.assign(&embeddings.rows, width, clusters, job.seed, ranks)?;
    let own = fit::memberships(&run.heads, &plan, config.objective.temperature, &rows)?;
    let (all, targets) = (ranks.gather(own)?, run.targets()?);
    if !ranks.is_first() {
        return Ok(None);
    }

    // The consensus of the heads; the one of the lowest loss numbers the clusters.
    let losses = run.losses();
    let order = by_loss(&losses);
    let taken = &order[..((config.consensus.share * order.len() as f64).ceil() as usize).max(1)];
    let chosen: Vec<Vec<f32>> = taken.iter().map(|&head| all[head].clone()).collect();
    let found = consensus(&chosen, plan.shape.clusters, 0, config.consensus.rounds)?;
    let groups = merged_clusters(&found.memberships, plan.shape.clusters, clusters)?;
    let memberships = added_up(&found.memberships, &groups, clusters);
    let (assignment, confidence) = argmax_rows(&memberships, clusters)?;
    let map = HeadResult::numbering(&assignment, &embeddings, clusters)?;
    let groups = mapped(&groups, &map);
    let assignment = mapped(&assignment, &map);
    let maps: Vec<Vec<u32>> = found.maps.iter().map(|own| mapped(own, &groups)).collect();
    let agreement = agreement(&chosen, &maps, &assignment, plan.shape.clusters)?;

    let result = HeadResult {
        kmeans_assignment: k_means,
        confidence,
        trusted: agreement.iter().map(|&share| share >= config.reliable.heads as f32).collect(),
        neighbours,
        agreeing_neighbours: config.reliable.neighbours,
        assignment,
    };
    log_result(config, &plan, &all, &losses, &agreement, &result, job)?;
    Ensemble {
        shape: plan.shape,
        heads: taken.iter().map(|&head| &*targets[head]).collect(),
        maps: found.maps,
        clusters: groups,
        temperature: config.objective.temperature,
        standardisation: &standardisation,
    }
    .write(&job.out, clusters)?;
    Ok(Some(result.pseudo_labels(embeddings, job)?))
}

/// Indices of the heads by rising loss; ties keep their order.
fn by_loss(losses: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..losses.len()).collect();
    order.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]));
    order
}

/// The values of `map` at these places.
fn mapped(places: &[u32], map: &[u32]) -> Vec<u32> {
    places.iter().map(|&place| map[place as usize]).collect()
}

/// Sums the memberships of directions to those of their clusters, `(N, K)`.
fn added_up(memberships: &[f32], groups: &[u32], clusters: usize) -> Vec<f32> {
    let mut sums = vec![0f32; memberships.len() / groups.len() * clusters];
    for (row, sums) in memberships.chunks_exact(groups.len()).zip(sums.chunks_exact_mut(clusters)) {
        row.iter().zip(groups).for_each(|(x, &group)| sums[group as usize] += x);
    }
    sums
}

/// Writes the last line of the log, and warns where the heads disagree.
fn log_result(
    config: &Config,
    plan: &HeadPlan,
    heads: &[Vec<f32>],
    losses: &[f64],
    agreement: &[f32],
    result: &HeadResult,
    job: &Job,
) -> Result<()> {
    let (clusters, directions) = (job.data.clusters, plan.shape.clusters);
    let own = heads.iter().map(|head| Ok(argmax_rows(head, directions)?.0));
    let own = own.collect::<Result<Vec<Vec<u32>>>>()?;
    let pairs = (0..own.len()).flat_map(|a| (a + 1..own.len()).map(move |b| (a, b)));
    let index = |(a, b): (usize, usize)| {
        Ok(adjusted_rand_index(&contingency(&own[a], &own[b], directions, directions)?))
    };
    let pairs = pairs.map(index).collect::<Result<Vec<f64>>>()?;
    let mean = (!pairs.is_empty()).then(|| pairs.iter().sum::<f64>() / pairs.len() as f64);
    let with_k_means =
        contingency(&result.assignment, &result.kmeans_assignment, clusters, clusters)?;
    let best = by_loss(losses)[0];
    let with_best = contingency(&result.assignment, &own[best], clusters, directions)?;
    job.log(&json!({
        "phase": "result",
        "losses": losses,
        "best-head": best,
        "sizes": cluster_sizes(&result.assignment, clusters),
        "agreement": agreement.iter().map(|&x| f64::from(x)).sum::<f64>() / agreement.len() as f64,
        "rand-index-between-heads": mean,
        "lowest-rand-index-between-heads": pairs.iter().copied().reduce(f64::min),
        "rand-index-with-best-head": adjusted_rand_index(&with_best),
        "rand-index-with-k-means": adjusted_rand_index(&with_k_means),
    }))?;
    if let Some(mean) = mean.filter(|&mean| mean < config.consensus.warn_below) {
        tracing::warn!(
            "the heads disagree (adjusted Rand index {mean:.2} between pairs): the number of clusters or the \
             backbone may not fit these images"
        );
    }
    Ok(())
}
