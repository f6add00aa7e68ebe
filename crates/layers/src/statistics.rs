//! Running mean and variance of every batch norm.

use candle_core::Result;
use kernels::norm::Moments;

use crate::flat::{Flat, Kind};
use crate::parameters::next_version;
use crate::plan::Plan;
use crate::{Entry, Network};

/// Running mean and variance of every batch norm: at first 0 and 1.
#[derive(Clone)]
pub struct Statistics {
    pub(crate) flat: Flat,
    /// Another number after every change.
    version: u64,
}

impl Statistics {
    pub(crate) fn new(plan: &Plan) -> Statistics {
        let place = plan.place.as_ref();
        Statistics::of_flat(Flat::filled(&plan.statistics, place, Kind::RunningVariance, 1.))
    }

    pub(crate) fn of_flat(flat: Flat) -> Statistics {
        Statistics { flat, version: next_version() }
    }

    /// The same numbers for `network`, as [`Parameters::to`](crate::Parameters::to).
    ///
    /// # Errors
    ///
    /// They belong to another network, or their device fails.
    pub fn to(&self, network: &Network) -> Result<Statistics> {
        let flat = self.flat.to(&network.0.statistics, network.0.place.as_ref())?;
        Ok(Statistics::of_flat(flat))
    }

    /// The entries, `<name>.running_mean` and `<name>.running_var` for each batch norm in turn.
    pub fn entries(&self) -> &[Entry] {
        &self.flat.layout.entries
    }

    /// The numbers of an entry.
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

    /// `running ← (1 − momentum)·running + momentum·batch`, the variance without bias, as PyTorch.
    pub(crate) fn update(
        &mut self,
        mean: usize,
        variance: usize,
        moments: &Moments,
        momentum: f64,
    ) {
        self.changed();
        let mix = |old: f32, new: f64| ((1. - momentum) * f64::from(old) + momentum * new) as f32;
        let [mean, variance] = [mean, variance].map(|at| self.entries()[at].range.clone());
        for (channel, value) in self.flat.values[mean].iter_mut().enumerate() {
            *value = mix(*value, moments.mean[channel]);
        }
        for (channel, value) in self.flat.values[variance].iter_mut().enumerate() {
            *value = mix(*value, moments.unbiased_variance(channel));
        }
    }

    pub(crate) fn check_plan(&self, plan: &Plan) -> Result<()> {
        self.flat.check_layout(&plan.statistics, "the statistics")?;
        self.flat.check_place(plan.place.as_ref(), "the statistics")
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn changed(&mut self) {
        self.version = next_version();
    }

    pub(crate) fn of(&self, entry: usize) -> &[f32] {
        &self.flat.values[self.entries()[entry].range.clone()]
    }
}
