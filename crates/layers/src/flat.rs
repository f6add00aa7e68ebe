//! Numbers with names in one flat buffer.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, bail};
use kernels::Buffer;

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
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
pub struct Entry {
    /// The name given to the builder and `.weight`, `.bias`, `.running_mean` or `.running_var`.
    pub name: String,
    /// Extent, in PyTorch's order.
    pub shape: Vec<usize>,
    /// Where its numbers lie, in the order of `shape`.
    pub range: Range<usize>,
    /// What it is for.
    pub kind: Kind,
    /// Index of its block in [`crate::Network::blocks`].
    pub block: usize,
}

/// The entries of a buffer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub entries: Vec<Entry>,
    pub len: usize,
    by_name: HashMap<String, usize>,
}

impl Layout {
    /// Appends an entry and returns its index.
    pub fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        kind: Kind,
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
            bail!("the name `{name}` is taken; every layer needs a name of its own")
        }
        let range = self.len..self.len + len;
        self.len += len;
        self.entries.push(Entry { name, shape, range, kind, block });
        Ok(self.entries.len() - 1)
    }

    pub fn find(&self, name: &str) -> Result<&Entry> {
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
    pub layout: Arc<Layout>,
    pub values: Buffer,
}

impl Flat {
    pub fn zeros(layout: &Arc<Layout>) -> Flat {
        Flat { layout: Arc::clone(layout), values: Buffer::zeros(layout.len) }
    }

    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.values[self.layout.find(name)?.range.clone()].to_vec())
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
        self.values[entry.range.clone()].copy_from_slice(values);
        Ok(())
    }

    /// An error that names `what` unless both have the same entries.
    pub fn check_layout(&self, other: &Arc<Layout>, what: &str) -> Result<()> {
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

    /// The name of the first entry with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Option<&str> {
        let at = kernels::flat::first_non_finite(&self.values)?;
        let entry = self.layout.entries.iter().find(|entry| entry.range.contains(&at))?;
        Some(&entry.name)
    }
}
