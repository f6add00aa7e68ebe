//! The search for a labelling under each pair of learning rates, which can stop after any step.
//!
//! Its state, see [`frozen::state`], is of kind `turtle-state`. Header: `rates`, the current pair, and
//! `steps` done with it. `encoders (R, P)` f32: the encoder under each pair, as weights, biases, scales;
//! `first-moment (P,)` and `second-moment (P,)` f32 of the current pair.

use anyhow::{Result, ensure};
use frozen::product::FlatMatrix;
use frozen::state::HeadState;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use stage::container::{Container, Tensor};
use stage::progress::{Progress, Unit};
use stage::random::stream;
use stage::{Diverged, Interrupted, Job};

use crate::config::{Config, RatePair};
use crate::model::{LinearLayer, ListAdam, TaskEncoder, inner_loss, labels, outer_loss};

/// The kind of the state.
pub const KIND: &str = "turtle-state";

/// The encoders under each pair of learning rates, and the progress of the search.
pub struct Search<'a> {
    /// One for each pair.
    pub encoders: Vec<TaskEncoder<f32>>,
    config: &'a Config,
    job: &'a Job,
    state: HeadState<'a>,
    /// The current pair, and steps done with it.
    pair: usize,
    steps: usize,
    adam: ListAdam<f32>,
}

impl<'a> Search<'a> {
    /// Resumes from the state in the job's folder, or starts. The encoders start alike under all pairs.
    ///
    /// # Errors
    ///
    /// The state is damaged or belongs to another run.
    pub fn resume_or_start(
        config: &'a Config,
        job: &'a Job,
        width: usize,
        state: HeadState<'a>,
    ) -> Result<Self> {
        let mut random = stream(job.seed, "turtle encoder", &[job.round as u64]);
        let encoder = TaskEncoder::new(first_layer(width, job.data.clusters, &mut random));
        let adam = ListAdam::new(parameters(&encoder).count());
        let encoders = vec![encoder; config.rates.len()];
        let mut search = Self { encoders, config, job, state, pair: 0, steps: 0, adam };
        if let Some(file) = search.state.open()? {
            search.load(&file)?;
            tracing::info!("resumed at rates {}, after step {}", search.pair, search.steps);
            search.state.drop_later_log_lines(search.pair * config.steps + search.steps)?;
        }
        Ok(search)
    }

    /// Takes the remaining steps.
    ///
    /// - `rows`: standardised embeddings, `(N, D)`.
    ///
    /// # Errors
    ///
    /// A loss is not finite ([`Diverged`]), the user interrupts ([`Interrupted`]), or a file cannot be
    /// written.
    pub fn run(&mut self, rows: &[f32], width: usize) -> Result<()> {
        let total = self.config.steps * self.config.rates.len();
        let mut progress = Progress::new(&self.job.label(), total as u64, Unit::Steps);
        let whole = [FlatMatrix::new(rows, width)?];
        let images = rows.len() / width;
        while self.pair < self.config.rates.len() {
            let drawn = (self.config.batch_size < images).then(|| self.batch(rows, width));
            let (loss, entropy) = match &drawn {
                Some(drawn) => self.step(&[FlatMatrix::new(drawn, width)?], width)?,
                None => self.step(&whole, width)?,
            };
            self.steps += 1;
            let done = self.pair * self.config.steps + self.steps;
            progress.at(done as u64, &format!("loss {loss:.4}"));
            let is_last = self.steps == self.config.steps;
            let is_due = self.steps.is_multiple_of(self.config.save_every) || is_last;
            if is_due {
                self.job.log(&json!({
                    "phase": "train",
                    "rates": self.pair,
                    "step": done,
                    "cross-entropy": loss,
                    "entropy": entropy,
                }))?;
            }
            if is_last {
                (self.pair, self.steps) = (self.pair + 1, 0);
                self.adam = ListAdam::new(parameters(&self.encoders[0]).count());
            }
            if is_due || self.job.interrupt.is_raised() {
                self.save()?;
            }
            if self.job.interrupt.is_raised() {
                return Err(Interrupted.into());
            }
        }
        Ok(())
    }

    /// One step of the encoder: labels, a new classifier trained on them, the outer gradient. Returns
    /// cross-entropy and entropy.
    fn step(&mut self, spaces: &[FlatMatrix<f32>], width: usize) -> Result<(f32, f32)> {
        let RatePair { inner, outer } = self.config.rates[self.pair];
        let encoders = std::slice::from_ref(&self.encoders[self.pair]);
        let (labels, _) = labels(encoders, spaces)?;
        // The draw depends on the step alone, so that a resumed run is the same run.
        let counters = [self.job.round as u64, self.steps as u64];
        let mut random = stream(self.job.seed, "turtle classifier", &counters);
        let mut classifier = first_layer(width, self.job.data.clusters, &mut random);
        let mut adam = ListAdam::new(classifier.weight.len() + classifier.bias.len());
        for _ in 0..self.config.inner_steps {
            let (_, gradient) = inner_loss(&classifier, spaces[0], &labels)?;
            let LinearLayer { weight, bias } = &mut classifier;
            let gradients = gradient.weight.iter().chain(&gradient.bias);
            adam.step(inner, weight.iter_mut().chain(bias), gradients);
        }
        let found = outer_loss(encoders, &[classifier], spaces, self.config.balance)?;
        if !(found.cross_entropy.is_finite() && found.entropy.is_finite()) {
            let message = format!(
                "the loss is {} at step {} under inner rate {inner} and outer rate {outer}; remove this pair \
                 from `rates` in `[turtle]`",
                found.cross_entropy,
                self.steps + 1
            );
            return Err(Diverged(message).into());
        }
        let gradients = parameters(&found.gradients[0]);
        self.adam.step(outer, parameters_mut(&mut self.encoders[self.pair]), gradients);
        Ok((found.cross_entropy, found.entropy))
    }

    fn batch(&self, rows: &[f32], width: usize) -> Vec<f32> {
        let counters = [self.job.round as u64, self.steps as u64];
        let mut random = stream(self.job.seed, "turtle batch", &counters);
        let drawn = assignment::sample(rows.len() / width, self.config.batch_size, &mut random);
        drawn.into_iter().flat_map(|i| &rows[i * width..][..width]).copied().collect()
    }

    fn save(&self) -> Result<()> {
        let count = parameters(&self.encoders[0]).count();
        let encoders: Vec<f32> = self.encoders.iter().flat_map(parameters).copied().collect();
        let (first, second) = self.adam.moments();
        let tensors = [
            Tensor::f32("encoders", &[self.encoders.len(), count], &encoders),
            Tensor::f32("first-moment", &[count], first),
            Tensor::f32("second-moment", &[count], second),
        ];
        self.state.write(&[("rates", self.pair), ("steps", self.steps)], &tensors)
    }

    fn load(&mut self, file: &Container) -> Result<()> {
        self.pair = file.header_number("rates")? as usize;
        self.steps = file.header_number("steps")? as usize;
        let count = parameters(&self.encoders[0]).count();
        let encoders = file.f32("encoders")?;
        let (first, second) = (file.f32("first-moment")?, file.f32("second-moment")?);
        ensure!(
            encoders.len() == count * self.encoders.len()
                && first.len() == count
                && second.len() == count,
            "`{}` has encoders of another size; remove the folder",
            file.path().display()
        );
        for (encoder, values) in self.encoders.iter_mut().zip(encoders.chunks_exact(count)) {
            parameters_mut(encoder).zip(values).for_each(|(to, &from)| *to = from);
        }
        self.adam = ListAdam::resumed(first, second, self.steps);
        Ok(())
    }
}

/// Weights and biases uniform in `±1/√d`: PyTorch's start of a linear layer.
fn first_layer(width: usize, clusters: usize, random: &mut ChaCha8Rng) -> LinearLayer<f32> {
    let bound = 1. / (width as f32).sqrt();
    let mut draw = |count| (0..count).map(|_| random.random_range(-bound..bound)).collect();
    LinearLayer { weight: draw(clusters * width), bias: draw(clusters) }
}

fn parameters(encoder: &TaskEncoder<f32>) -> impl Iterator<Item = &f32> {
    encoder.layer.weight.iter().chain(&encoder.layer.bias).chain(&encoder.scale)
}

fn parameters_mut(encoder: &mut TaskEncoder<f32>) -> impl Iterator<Item = &mut f32> {
    let LinearLayer { weight, bias } = &mut encoder.layer;
    weight.iter_mut().chain(bias).chain(&mut encoder.scale)
}
