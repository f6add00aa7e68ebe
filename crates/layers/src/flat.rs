//! Numbers with names in one flat buffer.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use kernels::Buffer;

use crate::device::{Numbers, Place};

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
    /// Where the CPU's kernels find them; empty where they are `elsewhere`.
    pub values: Buffer,
    /// On a device of candle's.
    pub elsewhere: Option<Numbers>,
}

impl Flat {
    pub fn zeros(layout: &Arc<Layout>, place: Option<&Arc<Place>>) -> Flat {
        Flat::with(layout, place, None)
    }

    /// With the same number in all entries of a kind, and zeros elsewhere.
    pub fn filled(
        layout: &Arc<Layout>,
        place: Option<&Arc<Place>>,
        kind: Kind,
        value: f32,
    ) -> Flat {
        let mut values = vec![0.; layout.len];
        for entry in layout.entries.iter().filter(|entry| entry.kind == kind) {
            values[entry.range.clone()].fill(value);
        }
        Flat::with(layout, place, Some(values))
    }

    /// With these numbers, or zeros.
    pub fn with(
        layout: &Arc<Layout>,
        place: Option<&Arc<Place>>,
        values: Option<Vec<f32>>,
    ) -> Flat {
        let elsewhere = place.map(|place| Numbers::new(&place.device, layout.len, values.clone()));
        let mut here = Buffer::zeros(if elsewhere.is_none() { layout.len } else { 0 });
        if let (None, Some(values)) = (&elsewhere, values) {
            here.copy_from_slice(&values);
        }
        Flat { layout: Arc::clone(layout), values: here, elsewhere }
    }

    pub fn get(&self, name: &str) -> Result<Vec<f32>> {
        let range = &self.layout.find(name)?.range;
        match &self.elsewhere {
            Some(numbers) => numbers.read(range),
            None => Ok(self.values[range.clone()].to_vec()),
        }
    }

    /// All numbers, in the order of the entries.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        match &self.elsewhere {
            Some(numbers) => numbers.read(&(0..self.layout.len)),
            None => Ok(self.values.to_vec()),
        }
    }

    /// The same numbers in another place, for a network with the same entries.
    pub fn to(&self, layout: &Arc<Layout>, place: Option<&Arc<Place>>) -> Result<Flat> {
        self.check_layout(layout, "the numbers")?;
        Ok(Flat::with(layout, place, Some(self.to_vec()?)))
    }

    /// Sets all to zero.
    pub fn zero(&mut self) {
        match &mut self.elsewhere {
            Some(numbers) => numbers.zero(),
            None => self.values.fill(0.),
        }
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
        match &mut self.elsewhere {
            Some(numbers) => numbers.write(&entry.range, values),
            None => {
                self.values[entry.range.clone()].copy_from_slice(values);
                Ok(())
            }
        }
    }

    /// An error that names `what` unless the numbers lie where a network computes.
    pub fn check_place(&self, place: Option<&Arc<Place>>, what: &str) -> Result<()> {
        let here = self.elsewhere.as_ref().map(Numbers::device);
        let there = place.map(|place| &place.device);
        let same = match (here, there) {
            (Some(here), Some(there)) => here.same_device(there),
            (here, there) => here.is_none() && there.is_none(),
        };
        if !same {
            let name = |device: Option<&candle_core::Device>| match device {
                Some(device) => format!("on {:?}", device.location()),
                None => "for the CPU's kernels".to_owned(),
            };
            bail!(
                "{what} lie {}, but the network computes {}; bring both to one device",
                name(here),
                name(there)
            )
        }
        Ok(())
    }

    /// An error that names `what` unless both have the same entries and lie in the same place.
    pub fn check_like(&self, other: &Flat, what: &str) -> Result<()> {
        self.check_layout(&other.layout, what)?;
        let same = match (&self.elsewhere, &other.elsewhere) {
            (Some(a), Some(b)) => a.device().same_device(b.device()),
            (a, b) => a.is_none() && b.is_none(),
        };
        if !same {
            bail!("{what} lie on another device than the parameters")
        }
        Ok(())
    }

    /// An entry's numbers as a tensor of its shape, where they are on a device of candle's.
    pub fn tensor(&self, entry: usize) -> Result<Tensor> {
        let entry = &self.layout.entries[entry];
        match &self.elsewhere {
            Some(numbers) => numbers.of(&entry.range)?.reshape(entry.shape.as_slice()),
            None => bail!("`{}` lies on the CPU", entry.name),
        }
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
    pub fn first_non_finite(&self) -> Result<Option<&str>> {
        let at = match &self.elsewhere {
            None => kernels::flat::first_non_finite(&self.values),
            // The whole is read only where there is something to find.
            Some(numbers) if numbers.are_finite()? => None,
            Some(_) => kernels::flat::first_non_finite(&self.to_vec()?),
        };
        let entry = |at| self.layout.entries.iter().find(|entry| entry.range.contains(&at));
        Ok(at.and_then(entry).map(|entry| entry.name.as_str()))
    }
}
