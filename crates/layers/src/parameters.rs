//! The trainable numbers of a network, their gradients, and the updates.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor, bail};
use kernels::convolution::{Direction, Geometry, PackedWeights, Packing};
use kernels::flat::{Adam, Sgd};

use crate::Network;
use crate::backend::Cpu;
use crate::flat::{Entry, Flat, Kind};
use crate::plan::Plan;
use crate::profile::{self, Pass};

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
    /// Weights packed for the CPU kernels, by entry. Cleared on every change.
    packed: Mutex<HashMap<(usize, Packing), Arc<PackedWeights>>>,
}

pub(crate) fn next_version() -> u64 {
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
        let place = plan.backend.place();
        let flat = Flat::filled(&plan.parameters, place, Kind::NormWeight, 1.);
        Parameters::of_flat(plan, flat, vec![true; plan.blocks.len()])
    }

    pub(crate) fn of_flat(plan: &Arc<Plan>, flat: Flat, trainable: Vec<bool>) -> Parameters {
        let (plan, version) = (Arc::clone(plan), next_version());
        Parameters { plan, flat, trainable, version, packed: Mutex::default() }
    }

    /// The same numbers for `network`, which has the same entries and may compute elsewhere: see
    /// [`Network::on`]. What is frozen stays frozen.
    ///
    /// # Errors
    ///
    /// They belong to another network, or their device fails.
    pub fn to(&self, network: &Network) -> Result<Parameters> {
        let flat = self.flat.to(&network.0.parameters, network.0.backend.place())?;
        Ok(Parameters::of_flat(&network.0, flat, self.trainable.clone()))
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
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.flat.to_vec()
    }

    /// The name of the first entry with a NaN or an infinity.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
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
        gradients.flat.check_like(&self.flat, "the gradients", "the parameters")?;
        momenta.flat.check_like(&self.flat, "the momenta", "the parameters")?;
        self.changed();
        let ranges = self.trained_ranges();
        let (gradients, momenta) = (&gradients.flat.storage, &mut momenta.flat.storage);
        self.flat.storage.sgd(gradients, momenta, &ranges, with)
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
        gradients.flat.check_like(&self.flat, "the gradients", "the parameters")?;
        moments.first.check_like(&self.flat, "the moments", "the parameters")?;
        self.changed();
        let ranges = self.trained_ranges();
        moments.steps += 1;
        let AdamMoments { first, second, steps } = moments;
        let both = [&mut first.storage, &mut second.storage];
        self.flat.storage.adam(&gradients.flat.storage, both, &ranges, *steps, with)
    }

    /// `t ← τ·t + (1 − τ)·o`: the moving average that makes these the target of `online`. All
    /// blocks follow, trained or not; statistics are not averaged.
    ///
    /// # Errors
    ///
    /// `online` belongs to another network, or `decay` (τ) is not between 0 and 1.
    pub fn follow(&mut self, online: &Parameters, decay: f64) -> Result<()> {
        online.flat.check_like(&self.flat, "the online parameters", "the target")?;
        if !(0. ..=1.).contains(&decay) {
            bail!("follow: the target decay is {decay}, but must lie between 0 and 1")
        }
        self.changed();
        self.flat.storage.follow(&online.flat.storage, decay)
    }

    pub(crate) fn check_plan(&self, plan: &Arc<Plan>) -> Result<()> {
        self.flat.check_layout(&plan.parameters, "the parameters")?;
        self.flat.check_place(plan.backend.place(), "the parameters")
    }

    pub(crate) fn flat(&self) -> &Flat {
        &self.flat
    }

    /// An entry as a tensor of its shape, for the backends that compute with tensors.
    pub(crate) fn tensor(&self, entry: usize) -> Result<Tensor> {
        self.flat.tensor(entry)
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn is_trained(&self, block: usize) -> bool {
        self.trainable[block]
    }

    /// An entry's numbers, for the CPU backend.
    pub(crate) fn slice(&self, entry: usize) -> &[f32] {
        self.flat.slice(entry)
    }

    /// The weights of an entry, packed for one product: packed once after each change.
    ///
    /// Maps of two sizes may need two packings of the same weights.
    pub(crate) fn packed(
        &self,
        entry: usize,
        direction: Direction,
        geometry: &Geometry,
        cpu: &Cpu,
    ) -> Arc<PackedWeights> {
        let packing = geometry.packing(cpu.variant, cpu.precision, direction);
        let lock = || self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(packed) = lock().get(&(entry, packing)) {
            return Arc::clone(packed);
        }
        let clock = profile::start();
        let packed = Arc::new(PackedWeights::new(packing, self.slice(entry), &cpu.pool));
        let pass = match direction {
            Direction::Forward => Pass::Forward,
            Direction::Backward => Pass::Backward,
        };
        profile::stop(clock, pass, || profile::packing(&packing, cpu.precision));
        lock().insert((entry, packing), Arc::clone(&packed));
        packed
    }

    /// Frees the packed weights that forward and backward passes cache. The next pass packs them
    /// again, so call it when the parameters are about to change.
    pub fn free_packed_weights(&self) {
        self.packed.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
    pub(crate) fn new(plan: &Plan) -> Gradients {
        Gradients { flat: Flat::zeros(&plan.parameters, plan.backend.place()) }
    }

    /// The entries, as those of [`Parameters`].
    pub fn entries(&self) -> &[Entry] {
        &self.flat.layout.entries
    }

    /// Sets all to zero: once a step.
    pub fn zero(&mut self) {
        self.flat.storage.zero();
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
        other.flat.check_like(&self.flat, "the other gradients", "these")?;
        self.flat.storage.add(&other.flat.storage)
    }

    /// All numbers, in the order of the entries.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.flat.to_vec()
    }

    /// Whether no number is a NaN or an infinity.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn is_finite(&self) -> Result<bool> {
        Ok(self.first_non_finite()?.is_none())
    }

    /// The name of the first entry with a NaN or an infinity.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        self.flat.first_non_finite()
    }
}

/// What [`Parameters::sgd`] remembers between steps: the direction `b` of the last one, 0 at first.
#[derive(Clone)]
pub struct Momenta {
    flat: Flat,
}

impl Momenta {
    pub(crate) fn new(plan: &Plan) -> Momenta {
        Momenta { flat: Flat::zeros(&plan.parameters, plan.backend.place()) }
    }

    /// The same numbers for `network`, as [`Parameters::to`].
    ///
    /// # Errors
    ///
    /// They belong to another network, or their device fails.
    pub fn to(&self, network: &Network) -> Result<Momenta> {
        let flat = self.flat.to(&network.0.parameters, network.0.backend.place())?;
        Ok(Momenta { flat })
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
    pub(crate) fn new(plan: &Plan) -> AdamMoments {
        let zeros = || Flat::zeros(&plan.parameters, plan.backend.place());
        AdamMoments { first: zeros(), second: zeros(), steps: 0 }
    }

    /// The same numbers for `network`, as [`Parameters::to`].
    ///
    /// # Errors
    ///
    /// They belong to another network, or their device fails.
    pub fn to(&self, network: &Network) -> Result<AdamMoments> {
        let to = |flat: &Flat| flat.to(&network.0.parameters, network.0.backend.place());
        let (first, second) = (to(&self.first)?, to(&self.second)?);
        Ok(AdamMoments { first, second, steps: self.steps })
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
