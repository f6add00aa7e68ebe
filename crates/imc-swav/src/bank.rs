//! The bank: images gathered over several steps, until the classifier has a batch to learn from.
//!
//! Where every image takes part it holds one batch and is emptied at once. Where only one split
//! does, as on STL-10, it fills over about twenty steps.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use training::Checkpoint;

/// Embeddings and scores of gathered images, by crop; constants.
#[derive(Debug, Clone)]
pub struct Bank {
    /// By crop, `(n, D)`.
    pub embeddings: Vec<Tensor>,
    /// By crop, `(n, K')`.
    pub scores: Vec<Tensor>,
    device: Device,
}

impl Bank {
    /// No images yet.
    pub fn new(device: &Device) -> Self {
        Self { embeddings: Vec::new(), scores: Vec::new(), device: device.clone() }
    }

    /// The number of images gathered.
    pub fn len(&self) -> usize {
        self.embeddings.first().map_or(0, |rows| rows.dims()[0])
    }

    /// True if no image is gathered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds those rows of a batch that take part.
    ///
    /// - `embeddings`, `scores`: by crop, `(B, D)` and `(B, K')`.
    /// - `rows`: indices in the batch, ascending.
    ///
    /// # Errors
    ///
    /// Shapes differ from those gathered before.
    pub fn add(&mut self, embeddings: &[Tensor], scores: &[Tensor], rows: &[u32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let chosen = Tensor::new(rows, &self.device)?;
        let append = |gathered: &mut Vec<Tensor>, new: &[Tensor]| -> Result<()> {
            let mut all = Vec::with_capacity(new.len());
            for (crop, new) in new.iter().enumerate() {
                let whole = rows.len() == new.dims()[0];
                let new = new.detach();
                let new = if whole { new } else { new.index_select(&chosen, 0)? };
                all.push(match gathered.get(crop) {
                    Some(before) => Tensor::cat(&[before, &new], 0)?,
                    None => new,
                });
            }
            *gathered = all;
            Ok(())
        };
        append(&mut self.embeddings, embeddings)?;
        append(&mut self.scores, scores)
    }

    /// Removes and returns everything once there are `enough` images.
    pub fn take(&mut self, enough: usize) -> Option<Bank> {
        let empty = Self::new(&self.device);
        (self.len() >= enough).then(|| std::mem::replace(self, empty))
    }

    /// Saves or loads the gathered images, as `stage.bank-embeddings` and `stage.bank-scores`,
    /// `(V, n, …)`.
    ///
    /// # Errors
    ///
    /// The file lacks them.
    pub fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        for (name, crops) in
            [("bank-embeddings", &mut self.embeddings), ("bank-scores", &mut self.scores)]
        {
            let mut stacked = match crops.is_empty() {
                true => Tensor::zeros(0, DType::F32, &self.device)?,
                false => Tensor::stack(crops, 0)?,
            };
            file.tensor(name, &mut stacked)?;
            let crop = |number| stacked.get(number);
            *crops = (0..stacked.dims()[0]).map(crop).collect::<candle_core::Result<_>>()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crops(first: f32) -> Result<[Tensor; 2]> {
        let rows = |salt: f32| {
            let values: Vec<f32> = (0..8).map(|i| first + salt + i as f32).collect();
            Tensor::from_vec(values, (4, 2), &Device::Cpu)
        };
        Ok([rows(0.)?, rows(100.)?])
    }

    /// IMC-SwAV, case T15: B = 4; 1, 0, 2, 1 images take part.
    #[test]
    fn the_classifier_waits_until_a_batch_is_gathered() -> Result<()> {
        let mut bank = Bank::new(&Device::Cpu);
        let steps: [(&[u32], bool); 4] =
            [(&[2], false), (&[], false), (&[0, 3], false), (&[1], true)];
        for (step, (rows, full)) in steps.into_iter().enumerate() {
            let crops = crops(10. * step as f32)?;
            bank.add(&crops, &crops, rows)?;
            let taken = bank.take(4);
            assert_eq!(taken.is_some(), full, "step {}", step + 1);
            if let Some(taken) = taken {
                assert_eq!(taken.len(), 4);
                let first = taken.embeddings[0].to_vec2::<f32>()?;
                assert_eq!(first, [[4., 5.], [20., 21.], [26., 27.], [32., 33.]]);
                let second = taken.scores[1].to_vec2::<f32>()?;
                assert_eq!(second[3], [132., 133.]);
            }
        }
        assert!(bank.is_empty());
        Ok(())
    }
}
