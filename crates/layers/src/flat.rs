//! Named entries in flat storage.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use crate::backend::{BackendId, DeviceVector, Storage};

/// The role of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Weights of a convolution, (O, I, KH, KW).
    ConvolutionWeight,
    /// Weights of a linear layer, (O, I).
    LinearWeight,
    /// Bias of a linear layer, (O).
    LinearBias,
    /// Factor of a batch norm, (C).
    NormWeight,
    /// Shift of a batch norm, (C).
    NormBias,
    /// Running mean of a batch norm, (C). Only in [`crate::Statistics`].
    RunningMean,
    /// Running variance of a batch norm, (C). Only in [`crate::Statistics`].
    RunningVariance,
}

/// A named tensor inside a flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// The name given to the builder and `.weight`, `.bias`, `.running_mean` or `.running_var`.
    pub name: String,
    /// Shape, in PyTorch's order.
    pub shape: Vec<usize>,
    /// Range of its numbers in the flat storage, in the order of `shape`.
    pub range: Range<usize>,
    /// Its role.
    pub kind: EntryKind,
    /// Index of its block in [`crate::Network::blocks`].
    pub block: usize,
}

/// The entries of flat storage.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct FlatLayout {
    pub entries: Vec<TensorEntry>,
    pub len: usize,
    by_name: HashMap<String, usize>,
}

impl FlatLayout {
    /// Appends an entry and returns its index.
    pub fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        kind: EntryKind,
        block: usize,
    ) -> Result<usize> {
        let mut len = 1usize;
        for side in &shape {
            len = match len.checked_mul(*side) {
                Some(len) if len <= isize::MAX as usize / 8 => len,
                _ => bail!("`{name}` of shape {shape:?} does not fit into memory"),
            };
        }
        if self.by_name.insert(name.clone(), self.entries.len()).is_some() {
            bail!("two layers are named `{name}`; give each layer its own name")
        }
        let range = self.len..self.len + len;
        self.len += len;
        self.entries.push(TensorEntry { name, shape, range, kind, block });
        Ok(self.entries.len() - 1)
    }

    /// The ranges of some entries; neighbours are joined.
    pub fn ranges(&self, of: impl Fn(&TensorEntry) -> bool) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for entry in self.entries.iter().filter(|entry| of(entry)) {
            match ranges.last_mut() {
                Some(last) if last.end == entry.range.start => last.end = entry.range.end,
                _ => ranges.push(entry.range.clone()),
            }
        }
        ranges
    }

    pub fn find(&self, name: &str) -> Result<&TensorEntry> {
        match self.by_name.get(name) {
            Some(at) => Ok(&self.entries[*at]),
            None => bail!(
                "no entry is named `{name}`; there are {} from `{}` to `{}`",
                self.entries.len(),
                self.entries.first().map_or("", |e| &e.name),
                self.entries.last().map_or("", |e| &e.name)
            ),
        }
    }
}

/// A layout with its numbers.
#[derive(Clone)]
pub(crate) struct Flat {
    pub layout: Arc<FlatLayout>,
    pub storage: Storage,
}

impl Flat {
    pub fn zeros(layout: &Arc<FlatLayout>, backend: BackendId) -> Flat {
        let storage = Storage::new(backend, layout.len, None);
        Flat { layout: Arc::clone(layout), storage }
    }

    /// With this value in every entry of a kind, and zeros in the others.
    pub fn filled(
        layout: &Arc<FlatLayout>,
        backend: BackendId,
        kind: EntryKind,
        value: f32,
    ) -> Flat {
        let mut numbers = vec![0.; layout.len];
        for entry in layout.entries.iter().filter(|entry| entry.kind == kind) {
            numbers[entry.range.clone()].fill(value);
        }
        Flat::with(layout, backend, numbers)
    }

    pub fn with(layout: &Arc<FlatLayout>, backend: BackendId, numbers: Vec<f32>) -> Flat {
        let storage = Storage::new(backend, layout.len, Some(numbers));
        Flat { layout: Arc::clone(layout), storage }
    }

    /// A copy for another backend and a network with the same entries.
    pub fn to(&self, layout: &Arc<FlatLayout>, backend: BackendId) -> Result<Flat> {
        self.check_layout(layout, "the numbers")?;
        Ok(Flat::with(layout, backend, self.to_vec()?))
    }

    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        self.storage.read(&self.layout.find(name)?.range)
    }

    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let entry = self.layout.find(name)?;
        if values.len() != entry.range.len() {
            let (shape, len) = (&entry.shape, entry.range.len());
            bail!("`{name}` of shape {shape:?} holds {len} numbers, got {}", values.len())
        }
        if let Some(at) = kernels::flat::first_non_finite(values) {
            bail!("`{name}`: value {at} is {}; the source is damaged or diverged", values[at])
        }
        self.storage.write(&entry.range, values)
    }

    /// All numbers, in the order of the entries.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.storage.read(&(0..self.layout.len))
    }

    /// The name of the first entry with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        let Some(at) = self.storage.first_non_finite()? else { return Ok(None) };
        let entry = self.layout.entries.iter().find(|entry| entry.range.contains(&at));
        Ok(entry.map(|entry| entry.name.as_str()))
    }

    /// An entry's numbers, for the CPU backend.
    pub fn slice(&self, entry: usize) -> &[f32] {
        &self.storage.buffer()[self.layout.entries[entry].range.clone()]
    }

    /// An entry as a tensor of its shape, for the backends that compute with tensors.
    pub fn tensor(&self, entry: usize) -> Result<Tensor> {
        let entry = &self.layout.entries[entry];
        self.storage.vector().of(&entry.range)?.reshape(entry.shape.as_slice())
    }

    /// Fails unless both have the same entries and are stored for the same backend.
    pub fn check_like(&self, other: &Flat, what: &str, of: &str) -> Result<()> {
        self.check_layout(&other.layout, what)?;
        let (here, there) = (self.storage.backend(), other.storage.backend());
        if !here.same(there) {
            bail!("{what} are stored for {here}, but {of} for {there}; move both to one backend")
        }
        Ok(())
    }

    /// Fails unless the numbers are stored for the backend of a network.
    pub fn check_backend(&self, network: BackendId, what: &str) -> Result<()> {
        let here = self.storage.backend();
        if !here.same(network) {
            bail!(
                "{what} are stored for {here}, but the network computes with {network}; move both \
                 to one backend"
            )
        }
        Ok(())
    }

    /// Fails unless the entries are the same.
    pub fn check_layout(&self, other: &Arc<FlatLayout>, what: &str) -> Result<()> {
        if !Arc::ptr_eq(&self.layout, other) && self.layout != *other {
            bail!(
                "{what} belong to another network: {} entries with {} numbers, expected {} with {}",
                self.layout.entries.len(),
                self.layout.len,
                other.entries.len(),
                other.len
            )
        }
        Ok(())
    }
}

/// Entries that one pass changes.
///
/// Host memory is changed at once. Tensors are immutable: their new entries wait until the pass has
/// ended, and are then joined with the others in one operation.
pub(crate) struct Changes<'a> {
    /// One, or one for each group of the batch: see [`groups`](Self::groups).
    flats: &'a mut [Flat],
    /// The waiting entries of each.
    pending: &'a mut [Pending],
}

/// Entries of tensors that wait for the end of a pass, with their ranges.
pub(crate) type Pending = Vec<(Range<usize>, Tensor)>;

impl<'a> Changes<'a> {
    /// - `pending`: empty, one for each of `flats`.
    pub fn of(flats: &'a mut [Flat], pending: &'a mut [Pending]) -> Changes<'a> {
        Changes { flats, pending }
    }

    /// What is changed.
    pub fn flats(&mut self) -> &mut [Flat] {
        self.flats
    }

    /// The changes by each group of the batch.
    pub fn groups(&mut self) -> impl Iterator<Item = Changes<'_>> {
        let groups = self.flats.iter_mut().zip(self.pending.iter_mut());
        groups.map(|(flat, pending)| {
            Changes::of(std::slice::from_mut(flat), std::slice::from_mut(pending))
        })
    }

    /// An entry as a tensor of its shape, as it was before the pass.
    pub fn tensor(&self, entry: usize) -> Result<Tensor> {
        self.flats[0].tensor(entry)
    }

    /// An entry's numbers to change, for the CPU backend.
    pub fn slice(&mut self, entry: usize) -> &mut [f32] {
        let range = self.flats[0].layout.entries[entry].range.clone();
        &mut self.flats[0].storage.buffer_mut()[range]
    }

    /// A change of an entry, for the backends that compute with tensors.
    pub fn push(&mut self, entry: usize, change: Tensor) {
        self.pending[0].push((self.flats[0].layout.entries[entry].range.clone(), change));
    }

    /// Replaces the entries by what was pushed.
    pub fn replace(self) -> Result<()> {
        self.join(DeviceVector::replace)
    }

    /// Adds to the entries what was pushed.
    pub fn add(self) -> Result<()> {
        self.join(DeviceVector::add_pieces)
    }

    fn join(self, join: impl Fn(&mut DeviceVector, Pending) -> Result<()>) -> Result<()> {
        for (flat, pending) in self.flats.iter_mut().zip(self.pending) {
            if !pending.is_empty() {
                pending.sort_by_key(|(range, _)| range.start);
                join(flat.storage.vector_mut(), std::mem::take(pending))?;
            }
        }
        Ok(())
    }
}
