//! Training of the clustering networks on frozen embeddings, and the measure by which one is kept.

use anyhow::Result;
use assignment::argmax_rows;
use candle_core::{Device, Tensor};
use candle_nn::loss::cross_entropy;
use candle_nn::ops::softmax;
use layers::Adam;
use rand::RngExt;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde_json::json;
use stage::progress::{Progress, Unit};
use stage::random::stream;
use stage::{Diverged, Job};
use training::TrainedSegment;

use crate::head::{Head, HeadShape};
use crate::{Config, Features, Previous, learner, loss};

/// A way to cluster the images, and how well it does by its own measure.
#[derive(Debug)]
pub struct Candidate {
    /// The network; none for the centres of k-means.
    pub head: Option<Head>,
    /// It went on from the last round's network.
    pub continued: bool,
    /// The cluster with the largest membership of each un-augmented image, `(N,)`.
    pub assignment: Vec<u32>,
    /// That membership, `(N,)`.
    pub confidence: Vec<f32>,
    /// [`loss::expected_clustering_loss`] of the memberships.
    pub loss: f64,
}

impl Candidate {
    /// Measures `memberships`, `(N, K)`.
    ///
    /// # Errors
    ///
    /// A membership is NaN.
    pub fn new(
        head: Option<Head>,
        continued: bool,
        memberships: &[f32],
        clusters: usize,
        neighbours: &[u32],
        entropy_weight: f64,
    ) -> Result<Self> {
        let loss =
            loss::expected_clustering_loss(memberships, clusters, neighbours, entropy_weight);
        let (assignment, confidence) = argmax_rows(memberships, clusters)?;
        Ok(Self { head, continued, assignment, confidence, loss })
    }
}

/// The candidate with the lowest loss, the first of equals; none of none.
pub fn lowest_loss<'a>(
    candidates: impl IntoIterator<Item = &'a Candidate>,
) -> Option<&'a Candidate> {
    candidates.into_iter().min_by(|a, b| a.loss.total_cmp(&b.loss))
}

/// Trains the networks side by side and measures each on the un-augmented images. Each rank takes some of them.
/// The first one returns the candidates of all ranks, the others return none.
///
/// The first half, rounded up, start from k-means' clusters. The last one continues the last round's
/// network, if there is one and more than one network is trained. The others start at random.
///
/// - `features`: of `N` images.
/// - `kmeans_assignment`: `(N,)`.
/// - `neighbours`: `N × m` rows.
///
/// # Errors
///
/// A loss is not finite ([`Diverged`]), the user interrupts ([`stage::Interrupted`]), the log cannot be
/// written, the device fails, or a rank has ended.
pub fn train(
    config: &Config,
    features: &Features,
    kmeans_assignment: &[u32],
    neighbours: &[u32],
    previous: Option<&Previous>,
    job: &Job,
) -> Result<Vec<Candidate>> {
    let shape = config.shape(features, job);
    let device = training::network_device(job.device)?;
    let embeddings = DrawnEmbeddings::new(features, shape.width, &device);
    let steps = FitSteps::new(config, &embeddings, neighbours, job);
    let own = job.communicator.share(config.heads);
    let FirstHeads { mut heads, continued } = first_heads(config, shape, previous, job);

    // The first half learns the clusters of k-means.
    let labels = Tensor::new(kmeans_assignment, &device)?;
    let from_kmeans = config.heads.div_ceil(2).clamp(own.start, own.end) - own.start;
    steps.take(&mut heads[..from_kmeans], "start", config.start_epochs, |draw| {
        let labels = labels.index_select(&Tensor::new(&*draw.images, &device)?, 0)?;
        Ok((embeddings.views(&draw.anchors)?, move |logits: &Tensor| {
            cross_entropy(logits, &labels)
        }))
    })?;

    // All learn to agree between neighbours and views, and to use all clusters.
    let epochs = config.epochs.max(config.least_steps.div_ceil(steps.per_epoch));
    steps.take(&mut heads, "consistency", epochs, |draw| {
        let views = [&*draw.anchors, &*draw.neighbours].concat();
        Ok((embeddings.views(&views)?, |logits: &Tensor| {
            let memberships = softmax(logits, 1)?;
            let anchors = memberships.narrow(0, 0, steps.batch_size)?;
            let neighbours = memberships.narrow(0, steps.batch_size, steps.batch_size)?;
            loss::clustering_loss(&anchors, &neighbours, config.entropy_weight)
        }))
    })?;

    let candidates = own.zip(heads).map(|(number, head)| {
        let continued = continued == Some(number);
        let memberships = embeddings.memberships(&head)?;
        let (k, weight) = (shape.clusters, config.entropy_weight);
        Candidate::new(Some(head), continued, &memberships, k, neighbours, weight)
    });
    gathered(candidates.collect::<Result<_>>()?, shape, job)
}

/// The candidates of all ranks on the first rank, in their order; none on the others.
fn gathered(own: Vec<Candidate>, shape: HeadShape, job: &Job) -> Result<Vec<Candidate>> {
    let ranks = &job.communicator;
    let continued = ranks.gather(own.iter().map(|one| vec![u8::from(one.continued)]).collect())?;
    let losses = ranks.gather(own.iter().map(|one| vec![one.loss]).collect())?;
    let flat = |one: &Candidate| one.head.as_ref().map(Head::flat).unwrap_or_default();
    let heads = ranks.gather(own.iter().map(flat).collect())?;
    let labels = own.into_iter().map(|one| (one.assignment, one.confidence));
    let (assignments, confidences) = labels.unzip();
    let labels = ranks.gather(assignments)?.into_iter().zip(ranks.gather(confidences)?);
    let candidates = labels.enumerate().map(|(number, (assignment, confidence))| Candidate {
        head: Some(Head::of_flat(shape, &heads[number])),
        continued: continued[number] == [1],
        assignment,
        confidence,
        loss: losses[number][0],
    });
    Ok(candidates.collect())
}

/// The heads of this rank before training, and the number of the last round's among those of all ranks.
struct FirstHeads {
    heads: Vec<Head>,
    continued: Option<usize>,
}

fn first_heads(
    config: &Config,
    shape: HeadShape,
    previous: Option<&Previous>,
    job: &Job,
) -> FirstHeads {
    let last = config.heads - 1;
    let previous = previous.and_then(|previous| previous.head.as_ref()).filter(|_| last > 0);
    let first = |number: usize| match previous {
        Some(head) if number == last => head.clone(),
        _ => Head::random(shape, job.seed, &[job.round as u64, number as u64]),
    };
    let heads = job.communicator.share(config.heads).map(first).collect();
    FirstHeads { heads, continued: previous.map(|_| last) }
}

/// Embeddings as the file has them. Those that a step draws are scaled to length `√D`, on the device that computes.
struct DrawnEmbeddings<'a> {
    /// Of un-augmented images, `(N, D)`, as they are.
    clean: &'a [f32],
    /// Of augmented copies, `(V·N, D)`, all images of a copy together; the un-augmented ones where
    /// there are no copies.
    views: &'a [f32],
    width: usize,
    device: &'a Device,
}

impl<'a> DrawnEmbeddings<'a> {
    fn new(features: &'a Features, width: usize, device: &'a Device) -> Self {
        let clean = &features.backbone;
        let views =
            if features.backbone_views.is_empty() { clean } else { &features.backbone_views };
        Self { clean, views, width, device }
    }

    /// The views in `rows`, `(rows, D)`.
    fn views(&self, rows: &[u32]) -> Result<Tensor> {
        let row = |&row: &u32| &self.views[row as usize * self.width..][..self.width];
        let mut chosen = Vec::with_capacity(rows.len() * self.width);
        rows.iter().for_each(|at| chosen.extend_from_slice(row(at)));
        self.scaled(chosen)
    }

    fn scaled(&self, mut rows: Vec<f32>) -> Result<Tensor> {
        crate::scale_to_length(&mut rows, self.width, (self.width as f32).sqrt());
        let count = rows.len() / self.width;
        Ok(Tensor::from_vec(rows, (count, self.width), self.device)?)
    }

    fn count(&self) -> usize {
        self.clean.len() / self.width
    }

    fn view_count(&self) -> usize {
        self.views.len() / self.clean.len()
    }

    /// Memberships of the un-augmented images by a network, `(N, K)`.
    fn memberships(&self, head: &Head) -> Result<Vec<f32>> {
        const ROWS_AT_ONCE: usize = 4096;
        let mut learner = learner::learner(head, self.device)?;
        let mut memberships = Vec::with_capacity(self.count() * head.shape.clusters);
        for rows in self.clean.chunks(ROWS_AT_ONCE * self.width) {
            let rows = self.scaled(rows.to_vec())?;
            let part = softmax(&learner.evaluate(&rows)?, 1)?;
            memberships.extend(part.flatten_all()?.to_vec1::<f32>()?);
        }
        Ok(memberships)
    }
}

/// What one step draws.
struct Draw {
    /// The images of the batch, `(B,)`.
    images: Vec<u32>,
    /// For each a view of it, as a row of the views, `(B,)`.
    anchors: Vec<u32>,
    /// For each a view of one of its neighbours or of itself, `(B,)`.
    neighbours: Vec<u32>,
}

/// The steps of a phase: what is drawn, the update, the log.
struct FitSteps<'a> {
    config: &'a Config,
    job: &'a Job,
    device: &'a Device,
    images: usize,
    view_count: usize,
    neighbours: &'a [u32],
    batch_size: usize,
    per_epoch: usize,
}

impl<'a> FitSteps<'a> {
    fn new(
        config: &'a Config,
        embeddings: &DrawnEmbeddings<'a>,
        neighbours: &'a [u32],
        job: &'a Job,
    ) -> Self {
        let images = embeddings.count();
        let batch_size = config.batch_size.min(images);
        Self {
            config,
            job,
            device: embeddings.device,
            images,
            view_count: embeddings.view_count(),
            neighbours,
            batch_size,
            // A last batch of few images would ask for few clusters: it is left out.
            per_epoch: images / batch_size,
        }
    }

    /// Trains `heads` for `epochs` passes, each by Adam from its first step.
    ///
    /// `prepare` gives the embeddings of a step, the same for all networks, and the loss of their
    /// logits. The networks are computed side by side: threads decide which goes first,
    /// never what one computes.
    ///
    /// - `heads`: those of this rank, perhaps none.
    fn take<L: Fn(&Tensor) -> candle_core::Result<Tensor> + Sync>(
        &self,
        heads: &mut [Head],
        phase: &str,
        epochs: usize,
        prepare: impl Fn(&Draw) -> Result<(Tensor, L)>,
    ) -> Result<()> {
        let learner = |head| learner::learner(head, self.device);
        let mut learners = heads.iter().map(learner).collect::<candle_core::Result<Vec<_>>>()?;
        let mut progress = match self.job.communicator.is_first() {
            true => {
                let label = format!("{}, {phase}", self.job.label());
                Progress::new(&label, epochs as u64, Unit::Steps)
            }
            false => Progress::hidden(),
        };
        for epoch in 0..epochs {
            let mut losses = Vec::new();
            for draw in &self.epoch(phase, epoch) {
                self.job.check_interrupt()?;
                if learners.is_empty() {
                    continue;
                }
                let (embeddings, loss) = prepare(draw)?;
                let of_step: Vec<Tensor> = learners
                    .par_iter_mut()
                    .map(|learner| self.step(learner, &embeddings, &loss))
                    .collect::<candle_core::Result<_>>()?;
                losses.push(Tensor::stack(&of_step, 0)?);
            }
            let means = self.means(&losses, phase, epoch)?;
            self.job.log(&json!({ "phase": phase, "epoch": epoch, "losses": means }))?;
            let lowest = means.iter().copied().fold(f64::INFINITY, f64::min);
            progress.step(&format!("lowest loss {lowest:.4}"));
        }
        for (head, learner) in heads.iter_mut().zip(&learners) {
            *head = learner::weights(learner, head.shape)?;
        }
        Ok(())
    }

    /// The mean loss of each network of all ranks over an epoch's steps. Read once an epoch: no step waits
    /// for another device.
    ///
    /// - `losses`: for each step, those of the networks of this rank, `(heads,)`; none where it has no network.
    fn means(&self, losses: &[Tensor], phase: &str, epoch: usize) -> Result<Vec<f64>> {
        let own = match losses.is_empty() {
            true => Vec::new(),
            false => Tensor::stack(losses, 1)?.flatten_all()?.to_vec1::<f32>()?,
        };
        let losses = self.job.communicator.all_gather(&own)?;
        let losses: Vec<&[f32]> = losses.chunks_exact(self.per_epoch).collect();
        for step in 0..self.per_epoch {
            if let Some(loss) = losses.iter().map(|of| of[step]).find(|loss| !loss.is_finite()) {
                let message = format!(
                    "the loss of a clustering network is {loss} in phase {phase}, epoch {epoch}, \
                     step {step}; a lower clustering.learning-rate is the usual cure"
                );
                return Err(Diverged(message).into());
            }
        }
        let share = |loss: &f32| f64::from(*loss) / self.per_epoch as f64;
        Ok(losses.iter().map(|of| of.iter().map(share).sum()).collect())
    }

    /// One step of one network; returns its loss before the step, a scalar.
    fn step(
        &self,
        learner: &mut TrainedSegment<Adam>,
        embeddings: &Tensor,
        loss: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        let logits = learner.forward(embeddings)?;
        let loss = loss(&logits)?;
        learner::step(learner, logits, &loss.backward()?, self.config.learning_rate)?;
        Ok(loss.detach())
    }

    /// The draws of one epoch, a pure function of seed, round, phase and epoch.
    fn epoch(&self, phase: &str, epoch: usize) -> Vec<Draw> {
        let counters = [self.job.round as u64, epoch as u64];
        let purpose = format!("clustering {phase}");
        let mut rng = stream(self.job.seed, &purpose, &counters);
        let mut order: Vec<u32> = (0..self.images as u32).collect();
        order.shuffle(&mut rng);
        order.chunks_exact(self.batch_size).map(|images| self.draw(images, &mut rng)).collect()
    }

    fn draw(&self, images: &[u32], rng: &mut impl rand::Rng) -> Draw {
        let each = self.neighbours.len() / self.images;
        let mut anchors = Vec::with_capacity(images.len());
        let mut neighbours = Vec::with_capacity(images.len());
        for &image in images {
            let view_of = |image: u32, rng: &mut _| {
                (random_below(self.view_count, rng) * self.images) as u32 + image
            };
            anchors.push(view_of(image, rng));
            // One draw in m + 1 is the image itself.
            let neighbour = match random_below(each + 1, rng) {
                0 => image,
                which => self.neighbours[image as usize * each + which - 1],
            };
            neighbours.push(view_of(neighbour, rng));
        }
        Draw { images: images.to_vec(), anchors, neighbours }
    }
}

fn random_below(bound: usize, rng: &mut impl rand::Rng) -> usize {
    rng.random_range(0..bound as u64) as usize
}
