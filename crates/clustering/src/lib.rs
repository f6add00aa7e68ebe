//! Stage: from embeddings to clusters, and which assignments to trust. It knows no pictures, and no
//! network but its own small ones.
//!
//! k-means on the projections gives a first set of clusters. Then small networks are trained on
//! the frozen embeddings, so that an image and its neighbours fall into one cluster and all clusters
//! are used (SCAN, Van Gansbeke et al. 2020); half of them start from k-means, half at random. The
//! one with the lowest loss is kept. Its assignments are the pseudo-labels; those with confident
//! outputs and agreeing neighbours are marked as reliable. Ranks share the restarts of k-means, the search for
//! neighbours and the networks.
//!
//! This is the second stage of PLDC. The paper's abstract says that a clustering network yields
//! reliable assignments which serve as pseudo-labels. Everything beyond that sentence is our
//! interpretation. The number of restarts, the step count and starting half the heads at random were
//! chosen on the digits.
//!
//! - Reads `embeddings` (one folder), `previous`: this stage's last round, if any, `refined-head`: its
//!   network as a refinement trained it further, if one did, and of `images.safetensors` the ids and
//!   splits alone.
//! - Writes `pseudo-labels.safetensors` and [`head.safetensors`](head).
//!
//! Start at [`cluster`]: the method in order.

pub mod fit;
pub mod head;
pub mod learner;
pub mod loss;
pub mod reliability;

use anyhow::{Context, Result, bail, ensure};
use assignment::{KMeans, Metric, k_means_on_ranks, nearest_neighbours_on_ranks};
use data::head::CentreMetric;
use data::{Embeddings, Images, PseudoLabels};
use serde::{Deserialize, Serialize};
use serde_json::json;
use stage::container::Floats;
use stage::{Diverged, Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};

use crate::fit::{Candidate, lowest_loss};
use crate::head::{Head, HeadShape};

/// The table `[clustering]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Networks `R`; the one with the lowest loss is kept. With 0, k-means is the result.
    pub heads: usize,
    /// Width `H` of their hidden layer.
    pub hidden: usize,
    /// Starts of k-means; the one with the lowest inertia is kept.
    pub kmeans_restarts: usize,
    /// Steps of one start of k-means at most.
    pub kmeans_iterations: usize,
    /// Distance of k-means: by angle, or Euclidean.
    pub kmeans_metric: KMeansMetric,
    /// Nearest neighbours of each image, by the angle between projections. With 0, an image agrees
    /// with itself alone.
    pub neighbours: usize,
    /// Images per step.
    pub batch_size: usize,
    /// Passes over the images in which the first half of the networks learn k-means' clusters.
    pub start_epochs: usize,
    /// Passes over the images after that, for all networks.
    pub epochs: usize,
    /// Steps after the start at least: more epochs are added until there are as many.
    pub least_steps: usize,
    /// Learning rate of Adam, constant.
    pub learning_rate: f64,
    /// Weight λ of the entropy, which keeps all clusters in use.
    pub entropy_weight: f64,
    /// Share η of each cluster that is taken as reliable, in the first and in the last round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reliable_share: Option<[f64; 2]>,
    /// In its place: the confidence above which an image is reliable, whatever its cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reliable_confidence: Option<f64>,
}

/// Distance of k-means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KMeansMetric {
    /// `1 − cos`: rows are taken at unit length.
    Spherical,
    /// Squared Euclidean distance of the rows as they are.
    Euclidean,
}

/// The stage: see the documentation of the crate.
pub struct Clustering;

impl Stage for Clustering {
    const SPEC: Spec = Spec {
        name: "clustering",
        algorithm: 5,
        inputs: &[
            Role::new("embeddings", Origin::Embeddings),
            Role::new("previous", Origin::PreviousRound),
            Role::new("refined-head", Origin::RefinedHead),
        ],
        outputs: &[Output::PseudoLabels],
        ranks: Ranks::Any,
    };
    type Config = Config;

    /// What is found wrong in the table before anything runs.
    ///
    /// # Errors
    ///
    /// A value out of its range; the message names the key.
    fn check(config: &Config, job: &Job) -> Result<Effort> {
        let at_least_1 = [
            ("hidden", config.hidden),
            ("kmeans-restarts", config.kmeans_restarts),
            ("kmeans-iterations", config.kmeans_iterations),
            ("batch-size", config.batch_size),
        ];
        for (key, value) in at_least_1 {
            ensure!(value >= 1, "`{key}` in `[clustering]` is {value}; it must be at least 1");
        }
        ensure!(
            config.learning_rate > 0.0 && config.learning_rate.is_finite(),
            "clustering.learning-rate must be a number above 0, not {}",
            config.learning_rate
        );
        ensure!(
            config.entropy_weight >= 0.0 && config.entropy_weight.is_finite(),
            "clustering.entropy-weight must be 0 or a number above, not {}",
            config.entropy_weight
        );
        match config.reliability()? {
            Reliability::Share(shares) => ensure!(
                shares.iter().all(|share| *share > 0.0 && *share <= 1.0),
                "clustering.reliable-share must be two shares above 0 and at most 1, not {shares:?}"
            ),
            Reliability::Confidence(threshold) => ensure!(
                (0.0..1.0).contains(&threshold),
                "clustering.reliable-confidence must be at least 0 and below 1, not {threshold}"
            ),
        }
        training::network_device(job.device)?;
        Ok(Effort::NONE)
    }

    /// Files in, files out: reads the embeddings and the last round, clusters, writes the pseudo-labels
    /// and the head.
    ///
    /// # Errors
    ///
    /// An input is missing, broken or of another data set; the clusters collapse into one or the loss
    /// leaves the finite numbers ([`Diverged`]); the user interrupts ([`stage::Interrupted`]).
    fn run(config: &Config, job: &Job) -> Result<()> {
        job.clear_log()?; // It starts from scratch after an interruption.
        let images = Images::open(&job.images)?;
        let embeddings = Embeddings::open(&job.input("embeddings")?.join(EMBEDDINGS))?;
        embeddings.data_set.require(images.data_set(), "embed these images again")?;
        let rows = images.rows(&job.data.score_on);
        ensure!(
            embeddings.index == rows,
            "`{}` has {} embeddings but {} images are to be scored; embed again",
            embeddings.data_set.path.display(),
            embeddings.index.len(),
            rows.len()
        );
        let read = format!("{} {} {} {config:?}", images.fingerprint(), job.seed, job.round);
        job.check_agreement(&read, &format!("{} embeddings", rows.len()))?;
        let (data_set, index) = (embeddings.data_set.clone(), embeddings.index.clone());
        let projection_width = embeddings.projection_width;
        let features = Features::from(embeddings);
        let previous = match job.optional_input("previous") {
            Some(folder) => {
                let labels = PseudoLabels::open(&folder.join(PSEUDO_LABELS))?;
                labels.data_set.require(&data_set, "start the rounds again from one data set")?;
                labels.require_clusters(job.data.clusters)?;
                ensure!(
                    labels.index == index,
                    "`{}` has {} assignments but {} images are to be scored; start the rounds again \
                     with one `score-on`",
                    labels.data_set.path.display(),
                    labels.index.len(),
                    index.len()
                );
                let refined = job.optional_input("refined-head").unwrap_or(folder);
                let head = (config.heads > 0)
                    .then(|| Head::read(refined, config.shape(&features, job)))
                    .transpose()?;
                Some(Previous { assignment: labels.assignment, head })
            }
            None => None,
        };

        let Some(clusters) = cluster(config, features, previous.as_ref(), job)? else {
            return Ok(()); // The first rank writes the result.
        };
        match &clusters.head {
            Some(head) => head.write(&job.out)?,
            None => {
                let by = clusters.centre_metric;
                data::head::write_centres(&job.out, &clusters.centres, job.data.clusters, by)?;
            }
        }
        PseudoLabels {
            data_set,
            clusters: job.data.clusters,
            index,
            assignment: clusters.assignment,
            kmeans_assignment: clusters.kmeans_assignment,
            confidence: clusters.confidence,
            score: clusters.score,
            reliable: clusters.reliable,
            projection_width,
            prototypes: clusters.prototypes,
            stability: clusters.restarted_stability,
            head_agreement: clusters.head_agreement,
        }
        .write(&job.out.join(PSEUDO_LABELS))
    }
}

const EMBEDDINGS: &str = "embeddings.safetensors";
const PSEUDO_LABELS: &str = "pseudo-labels.safetensors";

/// The embeddings of `N` images as clustering takes them. Those of a file stay in it, so that they may exceed the
/// memory.
#[derive(Debug, Clone)]
pub struct Features {
    /// Images `N`.
    pub count: usize,
    /// The target backbone's outputs for un-augmented images, `(N, D)`.
    pub backbone: Floats,
    /// The target projector's for the same, `(N, P)`.
    pub projection: Floats,
    /// The target backbone's for `V` augmented copies, `(V, N, D)`; `V` may be 0.
    pub backbone_views: Floats,
}

impl From<Embeddings> for Features {
    fn from(embeddings: Embeddings) -> Self {
        Self {
            count: embeddings.index.len(),
            backbone: embeddings.backbone,
            projection: embeddings.projection,
            backbone_views: embeddings.backbone_views,
        }
    }
}

/// What the last round of this stage left.
#[derive(Debug, Clone)]
pub struct Previous {
    /// Its assignment, `(N,)`: this round's clusters are numbered after it.
    pub assignment: Vec<u32>,
    /// Its network, one of this round's candidates: as it was kept, or as it was refined since.
    pub head: Option<Head>,
}

/// The result of clustering `N` images into `K` clusters; one numbering holds for all of it.
#[derive(Debug, Clone)]
pub struct Clusters {
    /// Cluster of each image, `(N,)`.
    pub assignment: Vec<u32>,
    /// k-means' cluster of each image, `(N,)`.
    pub kmeans_assignment: Vec<u32>,
    /// Largest membership of each image, `(N,)`.
    pub confidence: Vec<f32>,
    /// Confidence times agreement of the neighbours, `(N,)`.
    pub score: Vec<f32>,
    /// Whether an image is to be trusted, `(N,)`.
    pub reliable: Vec<bool>,
    /// Unit-length means of the reliable projections, weighted by score, `(K, P)`; a row of zeros
    /// for a cluster without any.
    pub prototypes: Vec<f32>,
    /// Centres of k-means, `(K, P)`.
    pub centres: Vec<f32>,
    /// How they are compared with projections.
    pub centre_metric: CentreMetric,
    /// The network that was kept; none when `heads` is 0.
    pub head: Option<Head>,
    /// Share of images whose cluster is that of the last round; none in the first.
    pub stability: Option<f64>,
    /// The same for the best network that was started afresh: a network that continues the last
    /// round agrees with it, right or wrong.
    pub restarted_stability: Option<f64>,
    /// Share of the networks that agree on each image with the one that was kept, `(N,)`; none when
    /// `heads` is 0.
    pub head_agreement: Option<Vec<f32>>,
}

/// The rule by which an image is reliable.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reliability {
    Share([f64; 2]),
    Confidence(f64),
}

impl Config {
    fn reliability(&self) -> Result<Reliability> {
        match (self.reliable_share, self.reliable_confidence) {
            (Some(shares), None) => Ok(Reliability::Share(shares)),
            (None, Some(threshold)) => Ok(Reliability::Confidence(threshold)),
            (both, _) => bail!(
                "`[clustering]` must set exactly one of `reliable-share` and `reliable-confidence`; it \
                 sets {}",
                if both.is_some() { "both" } else { "neither" }
            ),
        }
    }

    fn k_means(&self, clusters: usize) -> KMeans {
        KMeans {
            metric: match self.kmeans_metric {
                KMeansMetric::Spherical => Metric::Spherical,
                KMeansMetric::Euclidean => Metric::Euclidean,
            },
            iterations: self.kmeans_iterations,
            ..KMeans::spherical(clusters, self.kmeans_restarts)
        }
    }

    fn shape(&self, features: &Features, job: &Job) -> HeadShape {
        HeadShape {
            width: features.backbone.len() / features.count.max(1),
            hidden: self.hidden,
            clusters: job.data.clusters,
        }
    }
}

/// The method: k-means and neighbours, networks, the best of them, the reliable assignments. The first rank
/// returns the result, the others `None`.
///
/// # Errors
///
/// There are fewer images than clusters; the clusters collapse into one or a loss is not finite
/// ([`Diverged`]); the user interrupts ([`stage::Interrupted`]); the log cannot be written; a rank has ended.
pub fn cluster(
    config: &Config,
    features: Features,
    previous: Option<&Previous>,
    job: &Job,
) -> Result<Option<Clusters>> {
    let (n, k, ranks) = (features.count, job.data.clusters, &job.communicator);
    ensure!(n >= k, "{n} images cannot be sorted into {k} clusters; ask for fewer clusters");
    let projection_width = features.projection.len() / n;
    let unit_projection = with_length(&features.projection, projection_width, 1.0);

    // First clusters, and who is near whom.
    let rows = &features.projection;
    let (kmeans_config, seed) = (config.k_means(k), job.seed);
    let kmeans = k_means_on_ranks(rows, n, projection_width, &kmeans_config, seed, ranks)?;
    let neighbours = match config.neighbours.min(n - 1) {
        0 => Vec::new(),
        m => nearest_neighbours_on_ranks(&unit_projection, n, projection_width, m, ranks)?,
    };

    // The networks, and the one that agrees best with itself on un-augmented images.
    let mut candidates = match config.heads {
        0 => Vec::new(),
        _ => fit::train(config, &features, &kmeans.assignment, &neighbours, previous, job)?,
    };
    if !ranks.is_first() {
        return Ok(None);
    }
    let centre_metric = centre_metric(rows, projection_width, config.kmeans_metric);
    if config.heads == 0 {
        let centres = &kmeans.centres;
        let memberships = distance_memberships(rows, projection_width, centres, centre_metric);
        let weight = config.entropy_weight;
        candidates.push(Candidate::new(None, false, &memberships, k, &neighbours, weight)?);
    }
    let best = lowest_loss(&candidates).context("there is no clustering network")?;
    let (assignment, confidence) = (&best.assignment, best.confidence.clone());
    if k > 1 && assignment.iter().all(|&cluster| cluster == assignment[0]) {
        let message = "all images fell into one cluster; a larger clustering.entropy-weight or a \
                       better pretrained network is the usual cure";
        return Err(Diverged(message.into()).into());
    }

    // The order of clusters has no meaning: they are numbered as in the last round.
    let mut head = best.head.clone();
    let (assignment, stability) = match previous {
        Some(last) => {
            let map = assignment::optimal_map(assignment, &last.assignment, k)?;
            if let Some(head) = &mut head {
                head.renumber(&map);
            }
            let assignment = renumber(assignment, &map);
            let stability = share_of_equal(&assignment, &last.assignment);
            (assignment, Some(stability))
        }
        None => (assignment.clone(), None),
    };
    let kmeans_map = assignment::optimal_map(&kmeans.assignment, &assignment, k)?;
    let restarted_stability = match (previous, lowest_loss(fresh(&candidates))) {
        (Some(last), Some(restarted)) => {
            let map = assignment::optimal_map(&restarted.assignment, &last.assignment, k)?;
            Some(share_of_equal(&renumber(&restarted.assignment, &map), &last.assignment))
        }
        _ => None,
    };

    let head_agreement = (config.heads > 0)
        .then(|| share_of_agreeing_heads(&candidates, &assignment, k))
        .transpose()?;

    // Whom to trust, and what they look like in the middle.
    let agreement = assignment::share_of_agreeing_neighbours(&assignment, &neighbours);
    let score: Vec<f32> = confidence.iter().zip(&agreement).map(|(c, a)| c * a).collect();
    let (reliable, share) = match config.reliability()? {
        Reliability::Share(shares) => {
            let share = reliability::share(shares, job.round, job.rounds);
            (reliability::reliable(&assignment, &score, k, share), Some(share))
        }
        Reliability::Confidence(threshold) => {
            (reliability::confident(&confidence, threshold), None)
        }
    };
    let weight: Vec<f32> =
        score.iter().zip(&reliable).map(|(&s, &r)| if r { s } else { 0.0 }).collect();
    let prototypes =
        assignment::prototypes(&unit_projection, projection_width, &assignment, &weight, k)?;

    job.log(&json!({
        "phase": "result",
        "losses": candidates.iter().map(|candidate| candidate.loss).collect::<Vec<_>>(),
        "kept": best.loss,
        "kept-continued": best.continued,
        "stability": stability,
        "restarted-stability": restarted_stability,
        "reliable-share": share,
    }))?;
    Ok(Some(Clusters {
        assignment,
        kmeans_assignment: renumber(&kmeans.assignment, &kmeans_map),
        confidence,
        score,
        reliable,
        prototypes,
        centres: permute_rows(&kmeans.centres, projection_width, &kmeans_map),
        centre_metric,
        head,
        stability,
        restarted_stability,
        head_agreement,
    }))
}

/// The share of the candidates that agree with `assignment` on each image, `(N,)`. Each is renumbered so
/// that it agrees on the most images.
fn share_of_agreeing_heads(
    candidates: &[Candidate],
    assignment: &[u32],
    clusters: usize,
) -> Result<Vec<f32>> {
    let mut agreeing = vec![0usize; assignment.len()];
    for candidate in candidates {
        let other = &candidate.assignment;
        let map = assignment::optimal_map(other, assignment, clusters)?;
        for (count, (own, &other)) in agreeing.iter_mut().zip(assignment.iter().zip(other)) {
            *count += usize::from(map[other as usize] == *own);
        }
    }
    Ok(agreeing.iter().map(|&count| count as f32 / candidates.len() as f32).collect())
}

/// How memberships follow from the distance to centres, if no network is trained.
///
/// `softmax_k(−‖x − c_k‖² / (2 τ s²))`, `τ = .1`. Spherical: rows and centres at unit length and
/// `s = 1`, which is the softmax of `cos(x, c_k) / .1`. Euclidean: rows as they are, and `s²` the
/// mean squared distance of the images from their mean, so that the scale of the rows does not
/// matter; for unit-length rows around the origin the two are equal.
fn centre_metric(rows: &[f32], width: usize, metric: KMeansMetric) -> CentreMetric {
    match metric {
        KMeansMetric::Spherical => CentreMetric::CosineSoftmax { temperature: CENTRE_TEMPERATURE },
        KMeansMetric::Euclidean => {
            let variance = variance(rows, width).max(f64::MIN_POSITIVE);
            CentreMetric::DistanceSoftmax { temperature: 2.0 * CENTRE_TEMPERATURE * variance }
        }
    }
}

/// Memberships by distance to centres, `N × K`; see [`centre_metric`].
fn distance_memberships(
    rows: &[f32],
    width: usize,
    centres: &[f32],
    metric: CentreMetric,
) -> Vec<f32> {
    let (rows, centres, temperature) = match metric {
        // Between unit rows, −‖x − c‖² / 2 is cos(x, c) up to a constant.
        CentreMetric::CosineSoftmax { temperature } => {
            (with_length(rows, width, 1.0), with_length(centres, width, 1.0), 2.0 * temperature)
        }
        CentreMetric::DistanceSoftmax { temperature } => {
            (rows.to_vec(), centres.to_vec(), temperature)
        }
        CentreMetric::Cosine => unreachable!("`centre_metric` gives a softmax"),
    };
    let scale = 1.0 / temperature;
    let clusters = centres.len() / width;
    let mut memberships = Vec::with_capacity(rows.len() / width * clusters);
    for row in rows.chunks_exact(width) {
        let logits: Vec<f64> = centres
            .chunks_exact(width)
            .map(|centre| {
                -scale * row.iter().zip(centre).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>()
            })
            .collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        memberships.extend(logits.iter().map(|logit| ((logit - largest).exp() / sum) as f32));
    }
    memberships
}

/// The temperature τ of [`centre_metric`].
const CENTRE_TEMPERATURE: f64 = 0.1;

/// Mean squared distance of rows from their mean.
fn variance(rows: &[f32], width: usize) -> f64 {
    let n = (rows.len() / width) as f64;
    (0..width)
        .map(|column| {
            let values = rows.iter().skip(column).step_by(width).map(|&x| f64::from(x));
            let mean = values.clone().sum::<f64>() / n;
            values.map(|x| (x - mean).powi(2)).sum::<f64>() / n
        })
        .sum()
}

/// Rows scaled to `length`; a row of zeros stays.
fn with_length(rows: &[f32], width: usize, length: f32) -> Vec<f32> {
    let mut scaled = rows.to_vec();
    scale_to_length(&mut scaled, width, length);
    scaled
}

/// Scales each row of `rows` to `length`; a row of zeros stays.
pub(crate) fn scale_to_length(rows: &mut [f32], width: usize, length: f32) {
    for row in rows.chunks_exact_mut(width) {
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let factor = (f64::from(length) / squares.sqrt().max(1e-12)) as f32;
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Networks that do not continue the last round.
fn fresh(candidates: &[Candidate]) -> impl Iterator<Item = &Candidate> {
    candidates.iter().filter(|candidate| !candidate.continued)
}

fn renumber(assignment: &[u32], map: &[u32]) -> Vec<u32> {
    assignment.iter().map(|&cluster| map[cluster as usize]).collect()
}

/// Row `k` becomes row `map[k]`.
fn permute_rows(rows: &[f32], width: usize, map: &[u32]) -> Vec<f32> {
    let mut permuted = vec![0.0; rows.len()];
    for (row, &to) in rows.chunks_exact(width).zip(map) {
        permuted[to as usize * width..][..width].copy_from_slice(row);
    }
    permuted
}

/// Share of places where two assignments are equal.
fn share_of_equal(a: &[u32], b: &[u32]) -> f64 {
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}
