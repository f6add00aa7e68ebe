//! Training of all heads on pairs of neighbours.

use anyhow::Result;
use frozen::product::FlatMatrix;
use rand::RngExt;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use stage::progress::Unit;
use stage::random::stream;
use stage::{Interrupted, Job};

use crate::config::{Config, HeadPlan};
use crate::learner::{HeadUpdate, LearningHead, step};
use crate::loss;
use crate::network::{HeadPass, HeadShape};
use crate::state::HeadRun;

/// The heads of this rank before their first step, each drawn separately.
pub fn first_heads(config: &Config, plan: &HeadPlan, job: &Job) -> Vec<LearningHead<f32>> {
    let seed = stage::random::derived(job.seed, &format!("temi round {}", job.round));
    let deviation = config.network.initial_deviation;
    (job.communicator.share(config.heads))
        .map(|head| LearningHead::new(&plan.shape, plan.shape.random(deviation, seed, head as u64)))
        .collect()
}

/// Takes the remaining steps, in which each rank trains some of the heads.
///
/// - `rows`: standardised embeddings, `(N, D)`.
/// - `neighbours`: `(N, k)`.
///
/// # Errors
///
/// A loss is not finite ([`stage::Diverged`]), the user interrupts ([`Interrupted`]), or log or state
/// cannot be written.
pub fn train(
    config: &Config,
    plan: &HeadPlan,
    rows: &[f32],
    neighbours: &[u32],
    run: &mut HeadRun,
    job: &Job,
) -> Result<()> {
    let mut progress = job.progress(plan.steps as u64, Unit::Steps);
    let mut pairs = Pairs::new(plan, rows, neighbours, job);
    while run.steps < plan.steps {
        let update = HeadUpdate {
            objective: config.objective,
            marginal_decay: plan.marginal_decay,
            learning_rate: plan.learning_rate.at(run.steps),
            weight_decay: config.optimizer.weight_decay,
            target_decay: plan.target_decay.at(run.steps),
            step: run.steps as u64 + 1,
            still_steps: plan.still_steps as u64,
        };
        let drawn = pairs.of_step(run.steps);
        let drawn = FlatMatrix::new(&drawn, plan.shape.width)?;
        let losses = step(&mut run.heads, &plan.shape, drawn, &update, &job.communicator)?;
        run.note(&losses)?;
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        progress.at(run.steps as u64, &format!("loss {mean:.4}"));
        if run.steps.is_multiple_of(config.run.save_every) || run.steps == plan.steps {
            run.log(config.run.save_every)?;
            run.save()?;
        }
        // A signal may reach one rank alone.
        if job.communicator.any(job.interrupt.is_raised())? {
            run.save()?;
            return Err(Interrupted.into());
        }
    }
    Ok(())
}

/// Pairs of an image and one of its neighbours, drawn by epoch and step alone.
struct Pairs<'a> {
    plan: &'a HeadPlan,
    rows: &'a [f32],
    neighbours: &'a [u32],
    job: &'a Job,
    /// The images of an epoch in their order, and which epoch that is.
    order: Vec<u32>,
    epoch: Option<usize>,
}

impl<'a> Pairs<'a> {
    fn new(plan: &'a HeadPlan, rows: &'a [f32], neighbours: &'a [u32], job: &'a Job) -> Self {
        Self { plan, rows, neighbours, job, order: vec![], epoch: None }
    }

    /// The rows of a step's pairs: the images, then their neighbours, `(2B, D)`. Leaves out the last
    /// images of an epoch if they do not fill a batch.
    ///
    /// - `step`: counted from 0.
    fn of_step(&mut self, step: usize) -> Vec<f32> {
        let (width, batch) = (self.plan.shape.width, self.plan.batch);
        let images = self.rows.len() / width;
        let batches = images / batch;
        let epoch = step / batches;
        let round = self.job.round as u64;
        if self.epoch != Some(epoch) {
            self.order = (0..images as u32).collect();
            let counters = [round, epoch as u64];
            self.order.shuffle(&mut stream(self.job.seed, "temi order", &counters));
            self.epoch = Some(epoch);
        }
        let drawn = &self.order[step % batches * batch..][..batch];
        let mut random = stream(self.job.seed, "temi neighbours", &[round, step as u64]);
        let each = self.plan.neighbours;
        let partner = |&image: &u32| match each {
            0 => image,
            _ => self.neighbours[image as usize * each + random.random_range(0..each)],
        };
        let partners: Vec<u32> = drawn.iter().map(partner).collect();
        let mut rows = Vec::with_capacity(2 * batch * width);
        for &image in drawn.iter().chain(&partners) {
            rows.extend_from_slice(&self.rows[image as usize * width..][..width]);
        }
        rows
    }
}

/// Memberships of all images by each target head, `(H, N, K)`.
///
/// # Errors
///
/// The rows have another width than the heads.
pub fn memberships(
    heads: &[LearningHead<f32>],
    plan: &HeadPlan,
    temperature: f64,
    rows: &[f32],
) -> Result<Vec<Vec<f32>>> {
    const ROWS_AT_ONCE: usize = 512;
    let of_head = |head: &LearningHead<f32>| -> Result<Vec<f32>> {
        let HeadShape { width, clusters, .. } = plan.shape;
        let mut found = Vec::with_capacity(rows.len() / width * clusters);
        let mut pass = HeadPass::default();
        for part in rows.chunks(ROWS_AT_ONCE * width) {
            pass.forward(&plan.shape, &head.target, FlatMatrix::new(part, width)?)?;
            found.extend(loss::memberships(&pass.logits, clusters, temperature).memberships);
        }
        Ok(found)
    };
    heads.par_iter().map(of_head).collect()
}
