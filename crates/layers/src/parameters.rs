//! Parameters, their gradients, optimizer memory, and the updates.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, Tensor, bail};
use kernels::convolution::{Geometry, PackedFor, PackedWeights, Packing};
use kernels::flat::{Adam, Sgd};

use crate::backend::{BackendId, Cpu, Storage};
use crate::block_sums::{BlockSum, BlockSums, PassGradients};
use crate::flat::{EntryKind, Flat, TensorEntry};
use crate::plan::NetworkPlan;
use crate::profile::{self, Pass};
use crate::{BatchGroups, Network};

/// Packed weights that fill more than this are not kept from one pass of training to the next: 3 × 3 weights from 256
/// channels to 256, in Winograd's form F(4 × 4, 3 × 3) in f32, fill 9 MiB.
pub(crate) const LARGE_PACKED_BYTES: usize = 8 << 20;

/// Weights and biases of a network, flat and in f32.
///
/// New ones are 0, but 1 for the weights of batch norms; the architecture initialises them. Frozen
/// blocks ([`set_trainable`](Self::set_trainable)) get no gradient and no update.
pub struct Parameters {
    plan: Arc<NetworkPlan>,
    flat: Flat,
    trainable: Vec<bool>,
    /// Changes whenever the numbers do; no two contents within a process share one.
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
    pub(crate) fn new(plan: &Arc<NetworkPlan>) -> Parameters {
        let backend = plan.backend.id();
        let flat = Flat::filled(&plan.parameters, backend, EntryKind::NormWeight, 1.);
        Parameters::of_flat(plan, flat, vec![true; plan.blocks.len()])
    }

    pub(crate) fn of_flat(plan: &Arc<NetworkPlan>, flat: Flat, trainable: Vec<bool>) -> Parameters {
        let (plan, version) = (Arc::clone(plan), next_version());
        Parameters { plan, flat, trainable, version, packed: Mutex::default() }
    }

    /// A copy for `network`, which has the same entries and may compute on another backend: see
    /// [`Network::on`]. Frozen blocks stay frozen.
    pub fn to(&self, network: &Network) -> Result<Parameters> {
        let flat = self.flat.to(&network.0.parameters, network.0.backend.id())?;
        Ok(Parameters::of_flat(&network.0, flat, self.trainable.clone()))
    }

    /// The entries, in the order in which the builder added them.
    pub fn entries(&self) -> &[TensorEntry] {
        &self.flat.layout.entries
    }

    /// The numbers of the entry with this name, in the order of its shape.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.flat.get(name)
    }

    /// Replaces the numbers of an entry.
    ///
    /// # Errors
    ///
    /// The name is unknown, the number of values differs, or a value is not finite.
    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.changed();
        self.flat.set(name, values)
    }

    /// All numbers, in the order of the entries.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.flat.to_vec()
    }

    /// The name of the first entry with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        self.flat.first_non_finite()
    }

    /// Freezes or unfreezes a block. A frozen block keeps its numbers bit for bit, whatever the
    /// optimizer and its weight decay do, and `backward` computes no gradient for it. An unknown name is
    /// an error.
    pub fn set_trainable(&mut self, block: &str, trainable: bool) -> Result<()> {
        let at = self.plan.find_block(block)?;
        self.trainable[at] = trainable;
        Ok(())
    }

    /// Whether a block is trained; initially all are. An unknown name is an error.
    pub fn trainable(&self, block: &str) -> Result<bool> {
        Ok(self.trainable[self.plan.find_block(block)?])
    }

    /// One step of gradient descent with momentum on the trained blocks: `b ← μ·b + (g + λ·p)`,
    /// `p ← p − lr·b` (PyTorch's SGD without dampening or Nesterov).
    ///
    /// A learning rate of 0 still updates the momenta. Gradients or momenta of another network or backend
    /// are an error.
    pub fn sgd(&mut self, gradients: &Gradients, momenta: &mut Momenta, with: Sgd) -> Result<()> {
        let gradients = gradients.reduced()?;
        gradients.check_like(&self.flat, "the gradients", "the parameters")?;
        momenta.flat.check_like(&self.flat, "the momenta", "the parameters")?;
        self.changed();
        let ranges = self.trained_ranges();
        let (gradients, momenta) = (&gradients.storage, &mut momenta.flat.storage);
        self.flat.storage.sgd(gradients, momenta, &ranges, with)
    }

    /// One step of Adam (arXiv:1412.6980, Algorithm 1) on the trained blocks; counts the step in
    /// `moments`. Gradients or moments of another network or backend are an error.
    pub fn adam(
        &mut self,
        gradients: &Gradients,
        moments: &mut AdamMoments,
        with: Adam,
    ) -> Result<()> {
        let gradients = gradients.reduced()?;
        gradients.check_like(&self.flat, "the gradients", "the parameters")?;
        moments.first.check_like(&self.flat, "the moments", "the parameters")?;
        self.changed();
        let ranges = self.trained_ranges();
        moments.steps += 1;
        let AdamMoments { first, second, steps } = moments;
        let both = [&mut first.storage, &mut second.storage];
        self.flat.storage.adam(&gradients.storage, both, &ranges, *steps, with)
    }

    /// `t ← τ·t + (1 − τ)·o`: the moving average that makes these the target of `online`. All blocks
    /// follow, frozen ones too; statistics are not averaged.
    ///
    /// # Errors
    ///
    /// `online` belongs to another network or backend, or `decay` (τ) is not between 0 and 1.
    pub fn follow(&mut self, online: &Parameters, decay: f64) -> Result<()> {
        online.flat.check_like(&self.flat, "the online parameters", "the target")?;
        if !(0. ..=1.).contains(&decay) {
            bail!("follow: the target decay is {decay}, but must be between 0 and 1")
        }
        self.changed();
        self.flat.storage.follow(&online.flat.storage, decay)
    }

    pub(crate) fn check_plan(&self, plan: &Arc<NetworkPlan>) -> Result<()> {
        self.flat.check_layout(&plan.parameters, "the parameters")?;
        self.flat.check_backend(plan.backend.id(), "the parameters")
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
        packed_for: PackedFor,
        geometry: &Geometry,
        cpu: &Cpu,
    ) -> Arc<PackedWeights> {
        let packing = geometry.packing(cpu.variant, cpu.precision, packed_for);
        let lock = || self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(packed) = lock().get(&(entry, packing)) {
            return Arc::clone(packed);
        }
        let clock = profile::start();
        let packed = Arc::new(PackedWeights::new(packing, self.slice(entry), &cpu.pool));
        let pass = match packed_for {
            PackedFor::Forward => Pass::Forward,
            PackedFor::InputGradient => Pass::Backward,
        };
        profile::stop(clock, pass, || profile::packing(&packing));
        lock().insert((entry, packing), Arc::clone(&packed));
        packed
    }

    /// Frees the packed weights of an entry, if they have more than `bytes`.
    pub(crate) fn free_packed(&self, entry: usize, bytes: usize) {
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        packed.retain(|(of, packing), _| *of != entry || packing.packed_bytes() <= bytes);
    }

    /// How many packings are kept.
    #[cfg(test)]
    pub(crate) fn packings(&self) -> usize {
        self.packed.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn changed(&mut self) {
        self.version = next_version();
        self.packed.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The ranges of the trained blocks.
    fn trained_ranges(&self) -> Vec<Range<usize>> {
        self.flat.layout.ranges(|entry| self.trainable[entry.block])
    }
}

/// Gradients of the parameters, in the same layout. Every backward pass adds to them.
///
/// Those of a network [in groups](Network::in_groups) are kept for each group of this rank, until
/// [`reduce`](Self::reduce) adds them. Only then can they be read.
pub struct Gradients {
    /// One, or one for each group of this rank; the first is the sum once they are reduced.
    flats: Vec<Flat>,
    groups: BatchGroups,
    state: GradientState,
    /// The backward passes that are still to come before the step, once [`expect_passes`](Self::expect_passes) has
    /// said so.
    expected: Option<usize>,
    /// The sums that the last of them has begun.
    sums: Vec<BlockSum>,
}

/// What gradients hold.
#[derive(Clone, Copy, PartialEq)]
enum GradientState {
    Zero,
    /// A part for each group.
    Gathered,
    /// The last backward pass has begun to sum them over the ranks, block by block.
    Summing,
    /// The sum of all groups of all ranks.
    Reduced,
}

impl Gradients {
    pub(crate) fn new(plan: &NetworkPlan) -> Gradients {
        let groups = plan.backend.batch_groups().cloned().unwrap_or_else(BatchGroups::one);
        let flat = |_| Flat::zeros(&plan.parameters, plan.backend.id());
        Gradients {
            flats: (0..groups.own()).map(flat).collect(),
            groups,
            state: GradientState::Zero,
            expected: None,
            sums: Vec::new(),
        }
    }

    /// The entries, the same as those of [`Parameters`].
    pub fn entries(&self) -> &[TensorEntry] {
        &self.flats[0].layout.entries
    }

    /// Sets all gradients to zero, once a step.
    pub fn zero(&mut self) {
        self.flats.iter_mut().for_each(|flat| flat.storage.zero());
        self.state = GradientState::Zero;
        self.expected = None;
        self.sums.clear();
    }

    /// Announces that these gradients will be complete after so many more backward passes, on every rank. During the
    /// last one, the CPUs of several ranks then sum the gradients of a block as soon as they are complete, while the
    /// pass goes on below.
    ///
    /// It changes no number, and holds until [`zero`](Self::zero). One more pass is an error. If fewer come, or if
    /// this is never called, [`reduce`](Self::reduce) makes all sums.
    ///
    /// # Errors
    ///
    /// The last pass of an earlier announcement has come.
    pub fn expect_passes(&mut self, passes: usize) -> Result<()> {
        self.check_open()?;
        self.expected = Some(passes);
        Ok(())
    }

    /// Adds the gradients of all groups of all ranks: the last act before they are read, on every rank.
    /// It does nothing without groups, or if no backward pass came since the last time.
    ///
    /// # Errors
    ///
    /// A rank has ended; or the last backward pass has failed.
    pub fn reduce(&mut self) -> Result<()> {
        match self.state {
            GradientState::Zero | GradientState::Reduced => return Ok(()),
            GradientState::Gathered if self.groups.is_one() => return Ok(()),
            GradientState::Gathered => {
                add_groups(&mut self.flats, Storage::add)?;
                self.flats[0].storage.sum_over_ranks(&self.groups)?;
            }
            GradientState::Summing => {
                let sums = std::mem::take(&mut self.sums);
                if sums.iter().map(BlockSum::len).sum::<usize>() < self.flats[0].layout.len {
                    bail!(
                        "the gradients are incomplete, since the last backward pass or `reduce` has failed; call \
                         `zero` and compute the step again"
                    )
                }
                for sum in sums {
                    sum.finish(&mut self.flats[0])?;
                }
            }
        }
        self.state = GradientState::Reduced;
        Ok(())
    }

    /// The gradient of the entry with this name, in the order of its shape.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.reduced()?.get(name)
    }

    /// Adds other gradients of the same network. Those of another network or backend, or in other
    /// groups, are an error, and so is adding after the last [expected](Self::expect_passes) backward pass.
    pub fn add(&mut self, other: &Gradients) -> Result<()> {
        other.flats[0].check_like(&self.flats[0], "the other gradients", "these")?;
        let (own, others) = (self.flats.len(), other.flats.len());
        if own != others || other.is_summed() {
            bail!("gradients in {others} groups cannot be added to those in {own}")
        }
        let pairs = self.gather()?.iter_mut().zip(&other.flats);
        pairs.into_iter().try_for_each(|(flat, other)| flat.storage.add(&other.storage))
    }

    /// All numbers, in the order of the entries.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.reduced()?.to_vec()
    }

    /// Whether no number is a NaN or an infinity.
    pub fn is_finite(&self) -> Result<bool> {
        Ok(self.first_non_finite()?.is_none())
    }

    /// The name of the first entry with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        self.reduced()?.first_non_finite()
    }

    pub(crate) fn check_plan(&self, plan: &NetworkPlan) -> Result<()> {
        self.flats[0].check_layout(&plan.parameters, "the gradients")?;
        self.flats[0].check_backend(plan.backend.id(), "the gradients")?;
        if self.flats.len() != plan.backend.groups().0 {
            bail!("the gradients and the network divide batches into different groups")
        }
        Ok(())
    }

    /// The gradients of each group, for a backward pass.
    pub(crate) fn gather_pass(&mut self) -> Result<PassGradients<'_>> {
        self.gather()?;
        self.expected = self.expected.map(|passes| passes - 1);
        let on_cpu = matches!(self.flats[0].storage.backend(), BackendId::Cpu);
        let in_background = on_cpu && self.groups.communicator().sums_in_background();
        let sums = (self.expected == Some(0) && in_background).then(|| {
            self.state = GradientState::Summing;
            BlockSums { groups: &self.groups, begun: &mut self.sums }
        });
        Ok(PassGradients { flats: &mut self.flats, sums })
    }

    /// The gradients of each group, to add to.
    fn gather(&mut self) -> Result<&mut [Flat]> {
        self.check_open()?;
        if self.is_summed() {
            bail!("the gradients were reduced; take the step and call `zero` before the next pass")
        }
        self.state = GradientState::Gathered;
        Ok(&mut self.flats)
    }

    /// Fails once the last announced backward pass has come.
    fn check_open(&self) -> Result<()> {
        if self.expected == Some(0) {
            bail!(
                "the last backward pass that `expect_passes` announced has added to the gradients; announce as many \
                 as a step has, or take the step and call `zero` first"
            )
        }
        Ok(())
    }

    fn is_summed(&self) -> bool {
        matches!(self.state, GradientState::Summing | GradientState::Reduced)
    }

    /// The sum over all groups.
    fn reduced(&self) -> Result<&Flat> {
        let summing = self.state == GradientState::Summing;
        if summing || self.state == GradientState::Gathered && !self.groups.is_one() {
            bail!("the gradients of the groups have not been added; call `reduce` first")
        }
        Ok(&self.flats[0])
    }
}

/// Adds to the first storage those of the other groups, in a binary tree over the groups.
pub(crate) fn add_groups(
    flats: &mut [Flat],
    add: impl Fn(&mut Storage, &Storage) -> Result<()>,
) -> Result<()> {
    let mut distance = 1;
    while distance < flats.len() {
        for lower in (0..flats.len()).step_by(2 * distance) {
            let (below, above) = flats.split_at_mut(lower + distance);
            add(&mut below[lower].storage, &above[0].storage)?;
        }
        distance *= 2;
    }
    Ok(())
}

/// The memory of [`Parameters::sgd`] between steps: the direction `b` of the last one, initially 0.
#[derive(Clone)]
pub struct Momenta {
    flat: Flat,
}

impl Momenta {
    pub(crate) fn new(plan: &NetworkPlan) -> Momenta {
        Momenta { flat: Flat::zeros(&plan.parameters, plan.backend.id()) }
    }

    /// A copy for `network`, as [`Parameters::to`].
    pub fn to(&self, network: &Network) -> Result<Momenta> {
        let flat = self.flat.to(&network.0.parameters, network.0.backend.id())?;
        Ok(Momenta { flat })
    }

    /// The entries, the same as those of [`Parameters`].
    pub fn entries(&self) -> &[TensorEntry] {
        &self.flat.layout.entries
    }

    /// The momentum of the entry with this name.
    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.flat.get(name)
    }

    /// Replaces the momentum of an entry, to resume.
    ///
    /// # Errors
    ///
    /// The name is unknown, the number of values differs, or a value is not finite.
    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        self.flat.set(name, values)
    }
}

/// The memory of [`Parameters::adam`] between steps: both moments and the number of steps.
#[derive(Clone)]
pub struct AdamMoments {
    first: Flat,
    second: Flat,
    steps: u64,
}

impl AdamMoments {
    pub(crate) fn new(plan: &NetworkPlan) -> AdamMoments {
        let zeros = || Flat::zeros(&plan.parameters, plan.backend.id());
        AdamMoments { first: zeros(), second: zeros(), steps: 0 }
    }

    /// A copy for `network`, as [`Parameters::to`].
    pub fn to(&self, network: &Network) -> Result<AdamMoments> {
        let to = |flat: &Flat| flat.to(&network.0.parameters, network.0.backend.id());
        let (first, second) = (to(&self.first)?, to(&self.second)?);
        Ok(AdamMoments { first, second, steps: self.steps })
    }

    /// The entries, the same as those of [`Parameters`].
    pub fn entries(&self) -> &[TensorEntry] {
        &self.first.layout.entries
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The mean of the gradients and the mean of the squared gradients of the entry with this name.
    pub fn get(&self, name: &str) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((self.first.get(name)?, self.second.get(name)?))
    }

    /// Replaces both moments of an entry, to resume.
    ///
    /// # Errors
    ///
    /// The name is unknown, the number of values differs, or a value is not finite.
    pub fn set(&mut self, name: &str, first: &[f32], second: &[f32]) -> Result<()> {
        self.first.set(name, first)?;
        self.second.set(name, second)
    }

    /// Replaces the number of steps taken, to resume.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }
}
