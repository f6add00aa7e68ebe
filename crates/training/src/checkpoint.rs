//! `state.safetensors`: everything that a run needs to resume to the same bytes.
//!
//! A [container] of kind `state`, version 2. Header: see [`crate::run`]. Tensors:
//!
//! - the networks, named as in `network.safetensors`; not once the run is finished, when they are
//!   in that file;
//! - the optimizer's moments of each parameter `p`: `momentum.<p>`, or `first-moment.<p>`,
//!   `second-moment.<p>` and for each segment the `steps` taken, u64;
//! - `stage.<name>`: other state of the stage, f32, u32 or u64.
//!
//! A [`Checkpoint`] visits all of these to save or to load them, so that a type lists its state once.

use std::path::Path;

use anyhow::{Result, ensure};
use backbone::Segment;
use backbone::network_file::{self, NamedTensor};
use candle_core::{Tensor, Var};
use stage::container::{self, Container, Header};

/// Kind of the file.
const KIND: &str = "state";
/// Its format version.
const VERSION: u64 = 2;
/// Its name in a stage's output folder.
pub(crate) const NAME: &str = "state.safetensors";

/// Everything that a [`Run`](crate::Run) saves and loads: a [`Learner`](crate::Learner), or the
/// networks and other state of a stage.
pub trait Trained {
    /// Passes everything that a checkpoint holds to `file`, which saves or loads it.
    ///
    /// # Errors
    ///
    /// A tensor to be loaded is missing or belongs to another network.
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()>;

    /// The backbone that later stages start from: `backbone.safetensors`. None where it did not learn, so
    /// that the stage before has left it already.
    fn exported(&self) -> Option<&Segment>;
}

/// A checkpoint that is being saved or loaded.
pub struct Checkpoint<'a>(Access<'a>);

enum Access<'a> {
    Save {
        network: Vec<NamedTensor>,
        state: Vec<StateTensor>,
    },
    /// A part without a file is left unchanged.
    Load {
        network: Option<&'a Container>,
        state: Option<&'a Container>,
    },
}

impl<'a> Checkpoint<'a> {
    /// Collects the tensors of `trained` to be saved.
    pub(crate) fn of(trained: &mut impl Trained) -> Result<Self> {
        let mut file = Self(Access::Save { network: Vec::new(), state: Vec::new() });
        trained.checkpoint(&mut file)?;
        Ok(file)
    }

    /// Loads `trained` from the given files; the rest of it is left unchanged.
    pub(crate) fn load(
        network: Option<&'a Container>,
        state: Option<&'a Container>,
        trained: &mut impl Trained,
    ) -> Result<()> {
        trained.checkpoint(&mut Self(Access::Load { network, state }))
    }

    /// Parameters and statistics of a segment, as `<name>.<parameter>` of the network file.
    ///
    /// # Errors
    ///
    /// The file holds another network.
    pub fn segment(&mut self, name: &str, segment: &mut Segment) -> Result<()> {
        match &mut self.0 {
            Access::Save { network, .. } => network.extend(network_file::tensors(name, segment)?),
            Access::Load { network: Some(file), .. } => network_file::load(file, name, segment)?,
            Access::Load { network: None, .. } => {}
        }
        Ok(())
    }

    /// A tensor beside the segments, such as prototypes, as `name` of the network file.
    ///
    /// # Errors
    ///
    /// The file has none of this shape.
    pub fn variable(&mut self, name: &str, variable: &Var) -> Result<()> {
        match &mut self.0 {
            Access::Save { network, .. } => {
                let (name, shape) = (name.to_owned(), variable.dims().to_vec());
                network.push(NamedTensor { name, shape, values: values(variable)? });
            }
            Access::Load { network: Some(file), .. } => {
                let (found, wanted) = (file.shape(name)?, variable.dims());
                ensure!(
                    found == wanted,
                    "`{name}` of `{}` is {found:?}, but the experiment needs {wanted:?}",
                    file.path().display()
                );
                let values = Tensor::from_vec(file.f32(name)?, wanted, variable.device())?;
                variable.set(&values)?;
            }
            Access::Load { network: None, .. } => {}
        }
        Ok(())
    }

    /// Saves what `current` returns as the tensor `name` of the state file, or returns the values
    /// that the file has.
    ///
    /// # Errors
    ///
    /// The file has no such tensor of this type.
    pub fn exchange<T: Element>(
        &mut self,
        name: &str,
        shape: &[usize],
        current: impl FnOnce() -> Result<Vec<T>>,
    ) -> Result<Option<Vec<T>>> {
        match &mut self.0 {
            Access::Save { state, .. } => {
                let values = T::erased(current()?);
                state.push(StateTensor { name: name.to_owned(), shape: shape.to_vec(), values });
                Ok(None)
            }
            Access::Load { state, .. } => state.map(|file| T::read(file, name)).transpose(),
        }
    }

    /// A list of the stage, as `stage.<name>` of the state file; its length may change.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::exchange`].
    pub fn list<T: Element>(&mut self, name: &str, list: &mut Vec<T>) -> Result<()> {
        let loaded = self.exchange(&of_stage(name), &[list.len()], || Ok(list.clone()))?;
        loaded.into_iter().for_each(|loaded| *list = loaded);
        Ok(())
    }

    /// A count of the stage, as `stage.<name>` of the state file.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::exchange`].
    pub fn count(&mut self, name: &str, count: &mut u64) -> Result<()> {
        let loaded = self.exchange(&of_stage(name), &[1], || Ok(vec![*count]))?;
        loaded.into_iter().flatten().for_each(|loaded| *count = loaded);
        Ok(())
    }

    /// A tensor of floats of the stage, as `stage.<name>` of the state file; its shape may change.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::exchange`].
    pub fn tensor(&mut self, name: &str, tensor: &mut Tensor) -> Result<()> {
        self.state_tensor(&of_stage(name), tensor)
    }

    /// The same under a name without prefix.
    pub(crate) fn state_tensor(&mut self, name: &str, tensor: &mut Tensor) -> Result<()> {
        let loaded = self.exchange(name, tensor.dims(), || values(tensor))?;
        if let (Some(loaded), Access::Load { state: Some(file), .. }) = (loaded, &self.0) {
            *tensor = Tensor::from_vec(loaded, file.shape(name)?, tensor.device())?;
        }
        Ok(())
    }

    /// The name of the first tensor to be saved with a NaN or an infinity.
    pub(crate) fn first_not_finite(&self) -> Option<&str> {
        let mut tensors = self.floats();
        let found = tensors.find(|(_, _, values)| values.iter().any(|value| !value.is_finite()));
        found.map(|(name, _, _)| name)
    }

    /// Name, shape and values of every tensor of floats to be saved, networks first.
    pub(crate) fn floats(&self) -> impl Iterator<Item = (&str, &[usize], &[f32])> {
        let (network, state): (&[NamedTensor], &[StateTensor]) = match &self.0 {
            Access::Save { network, state } => (network, state),
            Access::Load { .. } => (&[], &[]),
        };
        let network = network.iter().map(|NamedTensor { name, shape, values }| {
            (name.as_str(), shape.as_slice(), values.as_slice())
        });
        let state = state.iter().filter_map(|StateTensor { name, shape, values }| match values {
            StateValues::F32(values) => Some((name.as_str(), shape.as_slice(), values.as_slice())),
            StateValues::U32(_) | StateValues::U64(_) => None,
        });
        network.chain(state)
    }

    /// The tensors of `network.safetensors`.
    pub(crate) fn network(&self) -> &[NamedTensor] {
        match &self.0 {
            Access::Save { network, .. } => network,
            Access::Load { .. } => &[],
        }
    }

    /// Writes `state.safetensors` in `folder`, whole or not at all.
    pub(crate) fn write(&self, folder: &Path, header: Header, with_network: bool) -> Result<()> {
        let Access::Save { network, state } = &self.0 else { return Ok(()) };
        let network = if with_network { network.as_slice() } else { &[] };
        let tensors: Vec<_> = network
            .iter()
            .map(NamedTensor::as_f32)
            .chain(state.iter().map(StateTensor::as_container))
            .collect();
        container::write(&folder.join(NAME), KIND, VERSION, header, &tensors)
    }
}

/// Opens the `state.safetensors` in `folder`.
pub(crate) fn open(folder: &Path) -> Result<Container> {
    Container::open(&folder.join(NAME), KIND, VERSION)
}

/// Loads `trained` from the `network.safetensors` in `folder`; its other state is left unchanged.
///
/// # Errors
///
/// The file is missing, damaged, or of another network.
pub fn load_network(folder: &Path, trained: &mut impl Trained) -> Result<()> {
    Checkpoint::load(Some(&network_file::open(folder)?), None, trained)
}

/// Loads what `trained` keeps in a state from the one that a finished run left in `folder`.
///
/// # Errors
///
/// The file is missing, damaged, or lacks a part.
pub fn load_state(folder: &Path, trained: &mut impl Trained) -> Result<()> {
    Checkpoint::load(None, Some(&open(folder)?), trained)
}

/// The tensors of `trained` that go into its `network.safetensors`.
///
/// # Errors
///
/// See [`Trained::checkpoint`].
pub fn network_tensors(trained: &mut impl Trained) -> Result<Vec<NamedTensor>> {
    Ok(Checkpoint::of(trained)?.network().to_vec())
}

/// A tensor to be saved.
struct StateTensor {
    name: String,
    shape: Vec<usize>,
    values: StateValues,
}

/// Values of one of the types that a state file has; see [`Element`].
pub enum StateValues {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// Unsigned 32-bit integers.
    U32(Vec<u32>),
    /// Unsigned 64-bit integers.
    U64(Vec<u64>),
}

impl StateTensor {
    fn as_container(&self) -> container::Tensor<'_> {
        let Self { name, shape, values } = self;
        match values {
            StateValues::F32(values) => container::Tensor::f32(name, shape, values),
            StateValues::U32(values) => container::Tensor::u32(name, shape, values),
            StateValues::U64(values) => container::Tensor::u64(name, shape, values),
        }
    }
}

/// A type that the tensors of a state file can have.
pub trait Element: Copy {
    /// These values, whose type is known at run time.
    fn erased(values: Vec<Self>) -> StateValues;

    /// The tensor `name` of `file`.
    ///
    /// # Errors
    ///
    /// There is no such tensor of this type.
    fn read(file: &Container, name: &str) -> Result<Vec<Self>>;
}

macro_rules! element {
    ($type:ident, $variant:ident) => {
        impl Element for $type {
            fn erased(values: Vec<Self>) -> StateValues {
                StateValues::$variant(values)
            }

            fn read(file: &Container, name: &str) -> Result<Vec<Self>> {
                file.$type(name)
            }
        }
    };
}

element!(f32, F32);
element!(u32, U32);
element!(u64, U64);

fn of_stage(name: &str) -> String {
    format!("stage.{name}")
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
