//! A run of heads that can stop after any step and resume to the same bits.
//!
//! Its state, see [`frozen::state`], is of kind `temi-state`. For `H` heads of `P`
//! parameters and `K` directions: `online`, `target`, `first-moments`, `second-moments` `(H, P)` and
//! `marginals` `(H, K)`, f32; `sums (2, H)` u64: the bits of f64, the losses of the current log line and
//! those that choose the best head.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use frozen::state::HeadState;
use serde_json::json;
use stage::container::{Container, Tensor};
use stage::{Diverged, Job};

use crate::config::HeadPlan;
use crate::learner::LearningHead;

/// The kind of the state.
pub const KIND: &str = "temi-state";

/// The heads in training, the number of steps done, and the losses.
pub struct HeadRun<'a> {
    /// The heads of this rank.
    pub heads: Vec<LearningHead<f32>>,
    /// Steps done.
    pub steps: usize,
    job: &'a Job,
    plan: HeadPlan,
    state: HeadState<'a>,
    /// Sums of the losses of each head of all ranks since the last line of the log.
    recent: Vec<f64>,
    /// Sums of the same over the last `loss_steps` steps of the run.
    last: Vec<f64>,
    line_began: Instant,
    line_steps: usize,
}

impl<'a> HeadRun<'a> {
    /// Resumes from the state in the job's folder, or starts with `heads`. Returns whether it started.
    ///
    /// - `heads`: those of this rank.
    /// - `count`: the number of heads of all ranks.
    ///
    /// # Errors
    ///
    /// The state is damaged or belongs to another run.
    pub fn resume_or_start(
        job: &'a Job,
        plan: HeadPlan,
        state: HeadState<'a>,
        heads: impl FnOnce() -> Vec<LearningHead<f32>>,
        count: usize,
    ) -> Result<(Self, bool)> {
        let mut run = Self {
            heads: vec![],
            steps: 0,
            job,
            plan,
            state,
            recent: vec![0.; count],
            last: vec![0.; count],
            line_began: Instant::now(),
            line_steps: 0,
        };
        let Some((file, steps)) = run.state.open()? else {
            run.heads = heads();
            return Ok((run, true));
        };
        run.steps = steps;
        run.load(&file, count)?;
        tracing::info!("resumed after step {} of {}", run.steps, run.plan.steps);
        run.state.drop_later_log_lines(run.steps)?;
        Ok((run, false))
    }

    /// Records a step and the losses of the heads of all ranks.
    ///
    /// # Errors
    ///
    /// A loss is not finite: [`Diverged`].
    pub fn note(&mut self, losses: &[f64]) -> Result<()> {
        if let Some(head) = losses.iter().position(|loss| !loss.is_finite()) {
            let message = format!(
                "the loss of head {head} is {} at step {}; try a lower `learning-rate` in \
                 `[temi.optimizer]`",
                losses[head],
                self.steps + 1
            );
            return Err(Diverged(message).into());
        }
        let is_last = self.steps + self.plan.loss_steps >= self.plan.steps;
        for ((recent, last), loss) in self.recent.iter_mut().zip(&mut self.last).zip(losses) {
            *recent += loss;
            *last += if is_last { *loss } else { 0. };
        }
        self.steps += 1;
        self.line_steps += 1;
        Ok(())
    }

    /// Mean loss of each head over the last steps of the run, which have been taken.
    pub fn losses(&self) -> Vec<f64> {
        let steps = self.plan.loss_steps.min(self.plan.steps) as f64;
        self.last.iter().map(|sum| sum / steps).collect()
    }

    /// Writes a line of the log: the mean loss since the last one.
    pub fn log(&mut self, every: usize) -> Result<()> {
        let steps = match self.steps % every {
            0 => every.min(self.steps),
            since => since,
        };
        let mean = |sum: f64| sum / steps as f64;
        let seconds = self.line_began.elapsed().as_secs_f64();
        self.job.log(&json!({
            "phase": "train",
            "step": self.steps,
            "loss": mean(self.recent.iter().sum::<f64>() / self.recent.len() as f64),
            "lowest-loss": mean(self.recent.iter().copied().fold(f64::INFINITY, f64::min)),
            "learning-rate": self.plan.learning_rate.at(self.steps - 1),
            "steps-per-second": self.line_steps as f64 / seconds.max(1e-9),
        }))?;
        self.recent.fill(0.);
        (self.line_began, self.line_steps) = (Instant::now(), 0);
        Ok(())
    }

    /// The targets of the heads of all ranks on the first rank, none on the others.
    ///
    /// # Errors
    ///
    /// A rank has ended.
    pub fn targets(&self) -> Result<Vec<Vec<f32>>> {
        self.gathered(|head| &head.target)
    }

    fn gathered(&self, of: PartOf) -> Result<Vec<Vec<f32>>> {
        let own = self.heads.iter().map(|head| of(head).clone()).collect();
        Ok(self.job.communicator.gather(own)?)
    }

    /// Writes the state. All ranks call it.
    pub fn save(&self) -> Result<()> {
        let (heads, shape) = (self.recent.len(), self.plan.shape);
        let joined = |of: PartOf| anyhow::Ok(self.gathered(of)?.concat());
        let sums: Vec<u64> = self.recent.iter().chain(&self.last).map(|x| x.to_bits()).collect();
        let parts = PARTS.iter().map(|(_, of)| joined(*of)).collect::<Result<Vec<_>>>()?;
        let mut tensors = vec![Tensor::u64("sums", &[2, heads], &sums)];
        for ((name, _), values) in PARTS.iter().zip(&parts) {
            tensors.push(Tensor::f32(*name, &[heads, shape.parameters()], values));
        }
        let marginals = joined(|head| &head.marginal)?;
        tensors.push(Tensor::f32("marginals", &[heads, shape.clusters], &marginals));
        self.state.write(self.steps, &tensors)
    }

    fn load(&mut self, file: &Container, heads: usize) -> Result<()> {
        let own = self.job.communicator.share(heads);
        let rows = |name: &str, columns: usize| -> Result<Vec<Vec<f32>>> {
            let values = file.f32(name)?;
            ensure!(
                values.len() == heads * columns,
                "`{name}` of `{}` has {} values where these heads have {heads} × {columns}: it \
                 is of another experiment; remove this file and run again",
                file.path().display(),
                values.len()
            );
            let own = &values[own.start * columns..own.end * columns];
            Ok(own.chunks_exact(columns).map(<[f32]>::to_vec).collect())
        };
        let parameters = self.plan.shape.parameters();
        let parts = PARTS.iter().map(|(name, _)| rows(name, parameters));
        let mut parts = parts.collect::<Result<Vec<_>>>()?.into_iter().map(Vec::into_iter);
        let marginals = rows("marginals", self.plan.shape.clusters)?;
        let (online, target) = (parts.next(), parts.next());
        let (first, second) = (parts.next(), parts.next());
        let all = online.zip(target).zip(first.zip(second)).context("four parts")?;
        let ((online, target), (first, second)) = all;
        self.heads =
            (online.zip(target).zip(first.zip(second)).zip(marginals))
                .map(|(((online, target), (first_moments, second_moments)), marginal)| {
                    LearningHead { online, target, first_moments, second_moments, marginal }
                })
                .collect();
        let sums: Vec<f64> = file.u64("sums")?.into_iter().map(f64::from_bits).collect();
        ensure!(sums.len() == 2 * heads, "`{}` has no sums of losses", file.path().display());
        self.recent = sums[..heads].to_vec();
        self.last = sums[heads..].to_vec();
        Ok(())
    }
}

/// A part of a head.
type PartOf = fn(&LearningHead<f32>) -> &Vec<f32>;

/// The parts of a head that have a value for each parameter.
const PARTS: [(&str, PartOf); 4] = [
    ("online", |head| &head.online),
    ("target", |head| &head.target),
    ("first-moments", |head| &head.first_moments),
    ("second-moments", |head| &head.second_moments),
];
