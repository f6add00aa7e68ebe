//! The trainable numbers of a network, their gradients, and the updates.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, bail};
use kernels::convolution::{self, Geometry};
use kernels::flat::{Adam, Sgd};
use kernels::{Buffer, Precision};

use crate::flat::{Entry, Flat, Kind, Layout};
use crate::plan::Plan;

/// Weights and biases in one flat f32 buffer.
///
/// At first all zero but the weights of batch norms, which are 1: an architecture fills them.
/// Frozen blocks ([`set_trainable`](Self::set_trainable)) get no gradient and no update.
pub struct Parameters {
    plan: Arc<Plan>,
    flat: Flat,
    trainable: Vec<bool>,
    /// Never the same for two different contents within a process.
    version: u64,
    packed: Mutex<HashMap<(usize, Direction, Precision), Arc<Buffer>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

fn next_version() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Clone for Parameters {
    fn clone(&self) -> Parameters {
        Parameters {
            plan: Arc::clone(&self.plan),
            flat: self.flat.clone(),
            trainable: self.trainable.clone(),
            version: next_version(),
            packed: Mutex::default(),
        }
    }
}

impl Parameters {
    pub(crate) fn new(plan: &Arc<Plan>) -> Parameters {
        let mut flat = Flat::zeros(&plan.parameters);
        for entry in &plan.parameters.entries {
            if entry.kind == Kind::NormWeight {
                flat.values[entry.range.clone()].fill(1.);
            }
        }
        Parameters {
            plan: Arc::clone(plan),
            flat,
            trainable: vec![true; plan.blocks.len()],
            version: next_version(),
            packed: Mutex::default(),
        }
    }

    /// The entries, in the order in which the builder was told of them.
    pub fn entries(&self) -> &[Entry] {
        &self.flat.layout.entries
    }

    /// The numbers of an entry, in the order of its shape.
    ///
    /// # Errors
    ///
    /// No entry has that name.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.flat.get(name)
    }

    /// Replaces the numbers of an entry.
    ///
    /// # Errors
    ///
    /// No entry has that name, it holds another number of values, or one is not finite.
    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.changed();
        self.flat.set(name, values)
    }

    /// All numbers, in the order of the entries.
    pub fn to_vec(&self) -> Vec<f32> {
        self.flat.values.to_vec()
    }

    /// The name of the first entry with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Option<&str> {
        self.flat.first_non_finite()
    }

    /// Freezes a block or sets it free. A frozen one keeps its numbers, bit for bit, whatever the
    /// optimizer and its weight decay do, and `backward` computes no gradient for it.
    ///
    /// # Errors
    ///
    /// The network has no block of that name.
    pub fn set_trainable(&mut self, block: &str, trainable: bool) -> Result<()> {
        let at = self.plan.find_block(block)?;
        self.trainable[at] = trainable;
        Ok(())
    }

    /// Whether a block is trained; all are at first.
    ///
    /// # Errors
    ///
    /// The network has no block of that name.
    pub fn trainable(&self, block: &str) -> Result<bool> {
        Ok(self.trainable[self.plan.find_block(block)?])
    }

    /// One step of gradient descent with momentum on the blocks that are trained:
    /// `b ← μ·b + (g + λ·p)`, `p ← p − lr·b` (PyTorch's SGD without dampening or Nesterov).
    ///
    /// A learning rate of 0 still updates the momenta.
    ///
    /// # Errors
    ///
    /// `gradients` or `momenta` belong to another network.
    pub fn sgd(&mut self, gradients: &Gradients, momenta: &mut Momenta, with: Sgd) -> Result<()> {
        gradients.flat.check_layout(&self.flat.layout, "the gradients")?;
        momenta.flat.check_layout(&self.flat.layout, "the momenta")?;
        self.changed();
        for range in self.trained_ranges() {
            kernels::flat::sgd(
                &mut self.flat.values[range.clone()],
                &gradients.flat.values[range.clone()],
                &mut momenta.flat.values[range],
                with,
            );
        }
        Ok(())
    }

    /// One step of Adam (arXiv:1412.6980, Algorithm 1) on the blocks that are trained; counts the
    /// step in `moments`.
    ///
    /// # Errors
    ///
    /// `gradients` or `moments` belong to another network.
    pub fn adam(
        &mut self,
        gradients: &Gradients,
        moments: &mut AdamMoments,
        with: Adam,
    ) -> Result<()> {
        gradients.flat.check_layout(&self.flat.layout, "the gradients")?;
        moments.first.check_layout(&self.flat.layout, "the moments")?;
        self.changed();
        moments.steps += 1;
        for range in self.trained_ranges() {
            kernels::flat::adam(
                &mut self.flat.values[range.clone()],
                &gradients.flat.values[range.clone()],
                &mut moments.first.values[range.clone()],
                &mut moments.second.values[range],
                moments.steps,
                with,
            );
        }
        Ok(())
    }

    /// `t ← τ·t + (1 − τ)·o`: the moving average that makes these the target of `online`. All
    /// blocks follow, trained or not; statistics are not averaged.
    ///
    /// # Errors
    ///
    /// `online` belongs to another network, or `decay` (τ) is not between 0 and 1.
    pub fn follow(&mut self, online: &Parameters, decay: f64) -> Result<()> {
        online.flat.check_layout(&self.flat.layout, "the online parameters")?;
        if !(0. ..=1.).contains(&decay) {
            bail!("follow: the target decay is {decay}, but must lie between 0 and 1")
        }
        self.changed();
        kernels::flat::follow(&mut self.flat.values, &online.flat.values, decay);
        Ok(())
    }

    pub(crate) fn check_plan(&self, plan: &Arc<Plan>) -> Result<()> {
        self.flat.check_layout(&plan.parameters, "the parameters")
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn is_trained(&self, block: usize) -> bool {
        self.trainable[block]
    }

    pub(crate) fn of(&self, entry: usize) -> &[f32] {
        &self.flat.values[self.entries()[entry].range.clone()]
    }

    /// The weights of an entry as the kernels want them, arranged once after each change.
    pub(crate) fn packed(
        &self,
        entry: usize,
        direction: Direction,
        geometry: &Geometry,
        plan: &Plan,
    ) -> Arc<Buffer> {
        let key = (entry, direction, plan.precision);
        if let Some(packed) = self.packed.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(packed);
        }
        let mut packed = plan.pool.take_of(plan.precision, geometry.packed_len());
        match direction {
            Direction::Forward => {
                convolution::pack_forward(geometry, self.of(entry), &mut packed);
            }
            Direction::Backward => {
                convolution::pack_backward(geometry, self.of(entry), &mut packed);
            }
        }
        let packed = Arc::new(packed);
        let mut all = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(key, Arc::clone(&packed));
        packed
    }

    fn changed(&mut self) {
        self.version = next_version();
        self.packed.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Runs of entries whose blocks are trained.
    fn trained_ranges(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for entry in self.entries().iter().filter(|entry| self.trainable[entry.block]) {
            match ranges.last_mut() {
                Some(last) if last.end == entry.range.start => last.end = entry.range.end,
                _ => ranges.push(entry.range.clone()),
            }
        }
        ranges
    }
}

/// Gradients of the parameters, in the same layout. Every `backward` adds to them.
#[derive(Clone)]
pub struct Gradients {
    pub(crate) flat: Flat,
}

impl Gradients {
    pub(crate) fn new(layout: &Arc<Layout>) -> Gradients {
        Gradients { flat: Flat::zeros(layout) }
    }

    /// The entries, as those of [`Parameters`].
    pub fn entries(&self) -> &[Entry] {
        &self.flat.layout.entries
    }

    /// Sets all to zero: once a step.
    pub fn zero(&mut self) {
        self.flat.values.fill(0.);
    }

    /// The gradient of an entry, in the order of its shape.
    ///
    /// # Errors
    ///
    /// No entry has that name.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.flat.get(name)
    }

    /// Adds other gradients of the same network.
    ///
    /// # Errors
    ///
    /// `other` belongs to another network.
    pub fn add(&mut self, other: &Gradients) -> Result<()> {
        other.flat.check_layout(&self.flat.layout, "the gradients")?;
        kernels::flat::add(&mut self.flat.values, &other.flat.values);
        Ok(())
    }

    /// All numbers, in the order of the entries.
    pub fn to_vec(&self) -> Vec<f32> {
        self.flat.values.to_vec()
    }

    /// Whether no number is a NaN or an infinity.
    pub fn is_finite(&self) -> bool {
        self.first_non_finite().is_none()
    }

    /// The name of the first entry with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Option<&str> {
        self.flat.first_non_finite()
    }

    pub(crate) fn of_mut(&mut self, entry: usize) -> &mut [f32] {
        let range = self.flat.layout.entries[entry].range.clone();
        &mut self.flat.values[range]
    }
}

/// What [`Parameters::sgd`] remembers between steps: the direction `b` of the last one, 0 at first.
#[derive(Clone)]
pub struct Momenta {
    flat: Flat,
}

impl Momenta {
    pub(crate) fn new(layout: &Arc<Layout>) -> Momenta {
        Momenta { flat: Flat::zeros(layout) }
    }

    /// The entries, as those of [`Parameters`].
    pub fn entries(&self) -> &[Entry] {
        &self.flat.layout.entries
    }

    /// The momentum of an entry.
    ///
    /// # Errors
    ///
    /// No entry has that name.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.flat.get(name)
    }

    /// Replaces the momentum of an entry, to resume.
    ///
    /// # Errors
    ///
    /// No entry has that name, it holds another number of values, or one is not finite.
    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.flat.set(name, values)
    }
}

/// What [`Parameters::adam`] remembers between steps: both means and the number of steps.
#[derive(Clone)]
pub struct AdamMoments {
    first: Flat,
    second: Flat,
    steps: u64,
}

impl AdamMoments {
    pub(crate) fn new(layout: &Arc<Layout>) -> AdamMoments {
        AdamMoments { first: Flat::zeros(layout), second: Flat::zeros(layout), steps: 0 }
    }

    /// The entries, as those of [`Parameters`].
    pub fn entries(&self) -> &[Entry] {
        &self.first.layout.entries
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The mean of gradients and the mean of squared gradients of an entry.
    ///
    /// # Errors
    ///
    /// No entry has that name.
    pub fn get(&self, name: &str) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((self.first.get(name)?, self.second.get(name)?))
    }

    /// Replaces both means of an entry, to resume.
    ///
    /// # Errors
    ///
    /// No entry has that name, it holds another number of values, or one is not finite.
    pub fn set(&mut self, name: &str, first: &[f32], second: &[f32]) -> Result<()> {
        self.first.set(name, first)?;
        self.second.set(name, second)
    }

    /// Replaces the number of steps taken, to resume.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }
}
