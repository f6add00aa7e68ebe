//! Flat f32 numbers on a candle device, and their updates by tensor operations.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor, bail};
use kernels::flat::{Adam, Sgd};

/// Flat f32 numbers on a device.
///
/// The tensor is replaced and never written to, so that clones and views may share its memory. The
/// numbers stay on the host until something computes with them, so that filling them entry by entry
/// costs no transfers.
#[derive(Clone)]
pub(crate) struct DeviceVector {
    device: Device,
    len: usize,
    /// The numbers, once they are on the device.
    tensor: OnceLock<Tensor>,
    /// The numbers before that; `None` for zeros.
    host: Option<Vec<f32>>,
}

impl DeviceVector {
    pub fn new(device: &Device, len: usize, host: Option<Vec<f32>>) -> DeviceVector {
        DeviceVector { device: device.clone(), len, tensor: OnceLock::new(), host }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn zero(&mut self) {
        *self = DeviceVector::new(&self.device, self.len, None);
    }

    /// All numbers, (len).
    pub fn all(&self) -> Result<Tensor> {
        if let Some(tensor) = self.tensor.get() {
            return Ok(tensor.clone());
        }
        let tensor = match &self.host {
            Some(host) => Tensor::from_slice(host, self.len, &self.device)?,
            None => Tensor::zeros(self.len, DType::F32, &self.device)?,
        };
        Ok(self.tensor.get_or_init(|| tensor).clone())
    }

    /// Replaces all numbers by a tensor (len) on the same device.
    pub fn set_all(&mut self, tensor: Tensor) {
        self.host = None;
        self.tensor = OnceLock::from(tensor);
    }

    /// A range of the numbers, as a vector.
    pub fn of(&self, range: &Range<usize>) -> Result<Tensor> {
        self.all()?.narrow(0, range.start, range.len())
    }

    pub fn read(&self, range: &Range<usize>) -> Result<Vec<f32>> {
        match (self.tensor.get(), &self.host) {
            (Some(tensor), _) => tensor.narrow(0, range.start, range.len())?.to_vec1(),
            (None, Some(host)) => Ok(host[range.clone()].to_vec()),
            (None, None) => Ok(vec![0.; range.len()]),
        }
    }

    pub fn write(&mut self, range: &Range<usize>, values: &[f32]) -> Result<()> {
        if self.tensor.get().is_some() {
            let piece = Tensor::from_slice(values, values.len(), &self.device)?;
            return self.replace(vec![(range.clone(), piece)]);
        }
        let host = self.host.get_or_insert_with(|| vec![0.; self.len]);
        host[range.clone()].copy_from_slice(values);
        Ok(())
    }

    /// The index of the first NaN or infinity. The numbers are read only if there is one.
    pub fn first_non_finite(&self) -> Result<Option<usize>> {
        match (self.tensor.get(), &self.host) {
            // 0 · x is NaN for every x that is not finite, and so is the sum.
            (Some(tensor), _) if (tensor * 0.)?.sum_all()?.to_scalar::<f32>()? == 0. => Ok(None),
            (Some(tensor), _) => Ok(kernels::flat::first_non_finite(&tensor.to_vec1::<f32>()?)),
            (None, Some(host)) => Ok(kernels::flat::first_non_finite(host)),
            (None, None) => Ok(None),
        }
    }

    /// Replaces pieces of any shape, given in order and without overlap.
    pub fn replace(&mut self, pieces: Vec<(Range<usize>, Tensor)>) -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        let old = self.all()?;
        let tensor = self.join(pieces, |gap| old.narrow(0, gap.start, gap.len()))?;
        self.set_all(tensor);
        Ok(())
    }

    /// Adds pieces of any shape, given in order and without overlap.
    pub fn add_pieces(&mut self, pieces: Vec<(Range<usize>, Tensor)>) -> Result<()> {
        if pieces.is_empty() {
            return Ok(());
        }
        let device = self.device.clone();
        let sum = self.join(pieces, |gap| Tensor::zeros(gap.len(), DType::F32, &device))?;
        self.add_tensor(sum)
    }

    pub fn add(&mut self, other: &DeviceVector) -> Result<()> {
        self.add_tensor(other.all()?)
    }

    fn add_tensor(&mut self, other: Tensor) -> Result<()> {
        let zero = self.tensor.get().is_none() && self.host.is_none();
        let sum = if zero { other } else { (self.all()? + other)? };
        self.set_all(sum);
        Ok(())
    }

    /// One tensor of all numbers: the pieces, and `gap` for what lies between them.
    fn join(
        &self,
        pieces: Vec<(Range<usize>, Tensor)>,
        gap: impl Fn(Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (mut parts, mut end) = (Vec::new(), 0);
        for (range, piece) in pieces {
            if range.start < end || range.len() != piece.elem_count() {
                bail!("{} numbers for {range:?} after {end}", piece.elem_count())
            }
            if range.start > end {
                parts.push(gap(end..range.start)?);
            }
            end = range.end;
            parts.push(piece.flatten_all()?);
        }
        if end < self.len {
            parts.push(gap(end..self.len)?);
        }
        match &parts[..] {
            [all] => all.contiguous(),
            parts => Tensor::cat(parts, 0),
        }
    }

    /// [`kernels::flat::sgd`] on these ranges.
    pub fn sgd(
        &mut self,
        gradients: &DeviceVector,
        momenta: &mut DeviceVector,
        ranges: &[Range<usize>],
        with: Sgd,
    ) -> Result<()> {
        let (mut values, mut directions) = (Vec::new(), Vec::new());
        for range in ranges {
            let value = self.of(range)?;
            let gradient = (gradients.of(range)? + (&value * with.weight_decay)?)?;
            let direction = ((momenta.of(range)? * with.momentum)? + gradient)?;
            values.push((range.clone(), (value - (&direction * with.learning_rate)?)?));
            directions.push((range.clone(), direction));
        }
        self.replace(values)?;
        momenta.replace(directions)
    }

    /// [`kernels::flat::adam`] on these ranges; `step` counts from 1.
    pub fn adam(
        &mut self,
        gradients: &DeviceVector,
        [first, second]: [&mut DeviceVector; 2],
        ranges: &[Range<usize>],
        step: u64,
        with: Adam,
    ) -> Result<()> {
        let correction = |beta: f64| 1. - beta.powf(step as f64);
        let rate = with.learning_rate / correction(with.beta_1);
        let root = (1. / correction(with.beta_2)).sqrt();
        let (mut values, mut firsts, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
        for range in ranges {
            let value = self.of(range)?;
            let gradient = (gradients.of(range)? + (&value * with.weight_decay)?)?;
            let mix = |old: Tensor, new: &Tensor, beta: f64| (old * beta)? + (new * (1. - beta))?;
            let mean = mix(first.of(range)?, &gradient, with.beta_1)?;
            let square = mix(second.of(range)?, &gradient.sqr()?, with.beta_2)?;
            let deviation = ((square.sqrt()? * root)? + with.epsilon)?;
            values.push((range.clone(), (value - ((&mean * rate)? / deviation)?)?));
            firsts.push((range.clone(), mean));
            seconds.push((range.clone(), square));
        }
        self.replace(values)?;
        first.replace(firsts)?;
        second.replace(seconds)
    }

    /// [`kernels::flat::follow`].
    pub fn follow(&mut self, online: &DeviceVector, decay: f64) -> Result<()> {
        let target = self.all()?;
        let followed = (&target + ((online.all()? - &target)? * (1. - decay))?)?;
        self.set_all(followed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(values: &[f32]) -> DeviceVector {
        DeviceVector::new(&Device::Cpu, values.len(), Some(values.to_vec()))
    }

    #[test]
    fn pieces_replace_or_add_where_they_belong_and_nothing_else() -> Result<()> {
        let piece = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        let mut n = vector(&[1., 2., 3., 4., 5.]);
        let before = n.clone();
        n.replace(vec![(1..2, piece(&[20.])?), (3..5, piece(&[40., 50.])?.reshape((2, 1))?)])?;
        assert_eq!(n.read(&(0..5))?, [1., 20., 3., 40., 50.]);
        n.add_pieces(vec![(0..2, piece(&[1., 1.])?)])?;
        n.write(&(2..3), &[7.])?;
        assert_eq!(n.read(&(0..5))?, [2., 21., 7., 40., 50.]);
        assert_eq!(before.read(&(0..5))?, [1., 2., 3., 4., 5.]);
        assert!(n.replace(vec![(0..2, piece(&[1.])?)]).is_err());
        n.zero();
        n.add_pieces(vec![(4..5, piece(&[f32::INFINITY])?)])?;
        assert_eq!(n.read(&(0..4))?, [0.; 4]);
        assert_eq!((n.first_non_finite()?, before.first_non_finite()?), (Some(4), None));
        Ok(())
    }
}
