//! The search for a labelling under each pair of learning rates, which can stop after any step. All pairs
//! take a step before any takes the next, and each rank takes those of some pairs.
//!
//! Its state, see [`frozen::state`], is of kind `turtle-state`. For `R` pairs and `P` parameters: `encoders`,
//! as weights, biases, scales, `first-moments` and `second-moments` `(R, P)` f32.

use anyhow::{Result, ensure};
use frozen::product::FlatMatrix;
use frozen::state::HeadState;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use stage::container::{Container, Tensor};
use stage::progress::Unit;
use stage::random::stream;
use stage::{Diverged, Interrupted, Job};

use crate::config::{Config, RatePair};
use crate::model::{LinearLayer, ListAdam, TaskEncoder, inner_loss, labels, outer_loss};

/// The kind of the state.
pub const KIND: &str = "turtle-state";

/// The encoders under each pair of learning rates, and the progress of the search.
pub struct Search<'a> {
    /// One for each pair of this rank.
    pub encoders: Vec<TaskEncoder<f32>>,
    optimizers: Vec<ListAdam<f32>>,
    /// The pairs of this rank.
    rates: &'a [RatePair],
    config: &'a Config,
    job: &'a Job,
    state: HeadState<'a>,
    /// Steps done with each pair.
    steps: usize,
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
        let rates = &config.rates[job.communicator.share(config.rates.len())];
        let optimizers = vec![ListAdam::new(parameters(&encoder).count()); rates.len()];
        let encoders = vec![encoder; rates.len()];
        let mut search = Self { encoders, optimizers, rates, config, job, state, steps: 0 };
        if let Some((file, steps)) = search.state.open()? {
            search.steps = steps;
            search.load(&file)?;
            tracing::info!("resumed after step {steps} of {}", config.steps);
            search.state.drop_later_log_lines(steps)?;
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
        let mut progress = self.job.progress(self.config.steps as u64, Unit::Steps);
        let whole = [FlatMatrix::new(rows, width)?];
        let images = rows.len() / width;
        while self.steps < self.config.steps {
            let drawn = (self.config.batch_size < images).then(|| self.batch(rows, width));
            let losses = match &drawn {
                Some(drawn) => self.step(&[FlatMatrix::new(drawn, width)?], width)?,
                None => self.step(&whole, width)?,
            };
            self.steps += 1;
            let [losses, entropies] =
                [0, 1].map(|i| losses.iter().map(|of| of[i]).collect::<Vec<_>>());
            let lowest = losses.iter().copied().fold(f32::INFINITY, f32::min);
            progress.at(self.steps as u64, &format!("lowest loss {lowest:.4}"));
            let is_last = self.steps == self.config.steps;
            let is_due = self.steps.is_multiple_of(self.config.save_every) || is_last;
            if is_due {
                self.job.log(&json!({
                    "phase": "train",
                    "step": self.steps,
                    "cross-entropy": losses,
                    "entropy": entropies,
                }))?;
            }
            // A signal may reach one rank alone.
            let is_interrupted = self.job.communicator.any(self.job.interrupt.is_raised())?;
            if is_due || is_interrupted {
                self.save()?;
            }
            if is_interrupted {
                return Err(Interrupted.into());
            }
        }
        Ok(())
    }

    /// One step under every pair of rates. Returns cross-entropy and entropy under each pair of all ranks.
    fn step(&mut self, spaces: &[FlatMatrix<f32>], width: usize) -> Result<Vec<[f32; 2]>> {
        let own = (0..self.rates.len()).map(|pair| self.step_under(pair, spaces, width));
        let own = own.collect::<Result<Vec<_>>>()?;
        let found = self.job.communicator.all_gather(&own)?;
        let is_finite = |of: &[f32; 2]| of.iter().all(|x| x.is_finite());
        if let Some(pair) = found.iter().position(|of| !is_finite(of)) {
            let RatePair { inner, outer } = self.config.rates[pair];
            let message = format!(
                "the loss is {} at step {} under inner rate {inner} and outer rate {outer}; remove this pair \
                 from `rates` in `[turtle]`",
                found[pair][0],
                self.steps + 1
            );
            return Err(Diverged(message).into());
        }
        Ok(found)
    }

    /// One step of an encoder: labels, a new classifier trained on them, the outer gradient. Returns
    /// cross-entropy and entropy.
    fn step_under(
        &mut self,
        pair: usize,
        spaces: &[FlatMatrix<f32>],
        width: usize,
    ) -> Result<[f32; 2]> {
        let RatePair { inner, outer } = self.rates[pair];
        let encoders = std::slice::from_ref(&self.encoders[pair]);
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
        let gradients = parameters(&found.gradients[0]);
        self.optimizers[pair].step(outer, parameters_mut(&mut self.encoders[pair]), gradients);
        Ok([found.cross_entropy, found.entropy])
    }

    fn batch(&self, rows: &[f32], width: usize) -> Vec<f32> {
        let counters = [self.job.round as u64, self.steps as u64];
        let mut random = stream(self.job.seed, "turtle batch", &counters);
        let drawn = assignment::sample(rows.len() / width, self.config.batch_size, &mut random);
        drawn.into_iter().flat_map(|i| &rows[i * width..][..width]).copied().collect()
    }

    fn save(&self) -> Result<()> {
        let gather = |own: Vec<Vec<f32>>| anyhow::Ok(self.job.communicator.gather(own)?.concat());
        let of_encoder = |encoder| parameters(encoder).copied().collect();
        let encoders = gather(self.encoders.iter().map(of_encoder).collect())?;
        let moments = || self.optimizers.iter().map(ListAdam::moments);
        let first = gather(moments().map(|(first, _)| first.to_vec()).collect())?;
        let second = gather(moments().map(|(_, second)| second.to_vec()).collect())?;
        let pairs = self.config.rates.len();
        let shape = [pairs, encoders.len() / pairs];
        let tensors = [
            Tensor::f32("encoders", &shape, &encoders),
            Tensor::f32("first-moments", &shape, &first),
            Tensor::f32("second-moments", &shape, &second),
        ];
        self.state.write(self.steps, &tensors)
    }

    fn load(&mut self, file: &Container) -> Result<()> {
        let pairs = self.config.rates.len();
        let own = self.job.communicator.share(pairs);
        let Some(count) = self.encoders.first().map(|encoder| parameters(encoder).count()) else {
            return Ok(());
        };
        let rows = |name: &str| -> Result<Vec<Vec<f32>>> {
            let values = file.f32(name)?;
            ensure!(
                values.len() == pairs * count,
                "`{name}` of `{}` are of encoders of another size; remove the folder",
                file.path().display()
            );
            let own = &values[own.start * count..own.end * count];
            Ok(own.chunks_exact(count).map(<[f32]>::to_vec).collect())
        };
        for (encoder, values) in self.encoders.iter_mut().zip(rows("encoders")?) {
            parameters_mut(encoder).zip(values).for_each(|(to, from)| *to = from);
        }
        let moments = rows("first-moments")?.into_iter().zip(rows("second-moments")?);
        let resumed = |(first, second)| ListAdam::resumed(first, second, self.steps);
        self.optimizers = moments.map(resumed).collect();
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
