//! What a run needs to know of the networks it saves, whatever they are.

use anyhow::Result;
use backbone::Segment;
use backbone::network_file::NamedTensor;
use stage::container::Container;

/// Networks with their optimizer: what a [`Run`](crate::Run) saves, checks and takes up again.
///
/// [`Learner`](crate::Learner) is one, with a target network and SGD. A stage with other networks
/// has its own, and the same run.
pub trait Trained {
    /// The segments by their names in `network.safetensors`.
    fn segments(&self) -> Vec<(&'static str, &Segment)>;

    /// The same, to be filled from a file.
    fn segments_mut(&mut self) -> Vec<(&'static str, &mut Segment)>;

    /// The backbone that others go on from: `backbone.safetensors`.
    fn exported(&self) -> &Segment;

    /// Parameters outside segments, such as prototypes: they go into `network.safetensors` too.
    ///
    /// # Errors
    ///
    /// They cannot be read from the device.
    fn variables(&self) -> Result<Vec<NamedTensor>> {
        Ok(Vec::new())
    }

    /// Takes up what [`variables`](Self::variables) gave.
    ///
    /// # Errors
    ///
    /// One is missing or has another shape.
    fn take_up_variables(&mut self, _network: &Container) -> Result<()> {
        Ok(())
    }

    /// What the optimizer remembers between steps, under names of its own.
    ///
    /// # Errors
    ///
    /// It cannot be read from the device.
    fn memory(&self) -> Result<Vec<NamedTensor>>;

    /// Takes up what [`memory`](Self::memory) gave.
    ///
    /// # Errors
    ///
    /// A tensor is missing or belongs to another network.
    fn take_up_memory(&mut self, state: &Container) -> Result<()>;
}
