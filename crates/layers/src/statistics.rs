//! Running mean and variance of every batch norm.

use candle_core::Result;

use crate::flat::{EntryKind, Flat};
use crate::parameters::next_version;
use crate::plan::NetworkPlan;
use crate::{Network, TensorEntry};

/// Running mean and variance of every batch norm, initially 0 and 1.
#[derive(Clone)]
pub struct Statistics {
    pub(crate) flat: Flat,
    /// Changes whenever the numbers do.
    version: u64,
}

impl Statistics {
    pub(crate) fn new(plan: &NetworkPlan) -> Statistics {
        let backend = plan.backend.id();
        Statistics::of_flat(Flat::filled(&plan.statistics, backend, EntryKind::RunningVariance, 1.))
    }

    pub(crate) fn of_flat(flat: Flat) -> Statistics {
        Statistics { flat, version: next_version() }
    }

    /// A copy for `network`, as [`Parameters::to`](crate::Parameters::to).
    pub fn to(&self, network: &Network) -> Result<Statistics> {
        let flat = self.flat.to(&network.0.statistics, network.0.backend.id())?;
        Ok(Statistics::of_flat(flat))
    }

    /// The entries, `<name>.running_mean` and `<name>.running_var` for each batch norm in turn.
    pub fn entries(&self) -> &[TensorEntry] {
        &self.flat.layout.entries
    }

    /// The numbers of the entry with this name.
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

    pub(crate) fn check_plan(&self, plan: &NetworkPlan) -> Result<()> {
        self.flat.check_layout(&plan.statistics, "the statistics")?;
        self.flat.check_backend(plan.backend.id(), "the statistics")
    }

    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn changed(&mut self) {
        self.version = next_version();
    }
}
