//! The bank: images gathered over several steps, until the classifier has a batch to learn from.
//!
//! Where every image takes part it holds one batch and is emptied at once. Where only one split
//! does, as on STL-10, it fills over about twenty steps.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use training::Run;

/// Embeddings and scores of gathered images, by crop; constants.
#[derive(Debug, Clone, Default)]
pub struct Bank {
    /// By crop, `(n, D)`.
    pub embeddings: Vec<Tensor>,
    /// By crop, `(n, K')`.
    pub scores: Vec<Tensor>,
}

impl Bank {
    /// Images gathered.
    pub fn len(&self) -> usize {
        self.embeddings.first().map_or(0, |rows| rows.dims()[0])
    }

    /// Whether no image is gathered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds those rows of a batch that take part.
    ///
    /// - `embeddings`, `scores`: by crop, `(B, D)` and `(B, K')`.
    /// - `rows`: places in the batch, ascending.
    ///
    /// # Errors
    ///
    /// Shapes differ from those gathered before.
    pub fn add(&mut self, embeddings: &[Tensor], scores: &[Tensor], rows: &[u32]) -> Result<()> {
        let Some(first) = embeddings.first().filter(|_| !rows.is_empty()) else { return Ok(()) };
        let chosen = Tensor::new(rows, first.device())?;
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

    /// Takes everything out once there are `enough` images.
    pub fn take(&mut self, enough: usize) -> Option<Bank> {
        (self.len() >= enough).then(|| std::mem::take(self))
    }

    /// Hands the run what is gathered, to be saved with the networks.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn keep(&self, run: &mut Run) -> Result<()> {
        for (name, tensors) in [(EMBEDDINGS, &self.embeddings), (SCORES, &self.scores)] {
            if self.is_empty() {
                run.drop_kept(name);
                continue;
            }
            let stacked = Tensor::stack(tensors, 0)?;
            run.keep(name, stacked.dims(), stacked.flatten_all()?.to_vec1()?);
        }
        Ok(())
    }

    /// What the run that this one goes on from had gathered.
    ///
    /// - `crops`: V; `widths`: D and K'.
    ///
    /// # Errors
    ///
    /// The lengths do not fit.
    pub fn kept(run: &Run, crops: usize, widths: [usize; 2], device: &Device) -> Result<Self> {
        let take = |name: &str, width: usize| -> Result<Vec<Tensor>> {
            let Some(values) = run.kept(name) else { return Ok(Vec::new()) };
            let n = values.len() / (crops * width);
            let all = Tensor::from_slice(values, (crops, n, width), device)
                .with_context(|| format!("`{name}` of the saved run"))?;
            Ok((0..crops).map(|crop| all.get(crop)).collect::<candle_core::Result<_>>()?)
        };
        let [embedding, prototypes] = widths;
        Ok(Self { embeddings: take(EMBEDDINGS, embedding)?, scores: take(SCORES, prototypes)? })
    }
}

const EMBEDDINGS: &str = "bank-embeddings";
const SCORES: &str = "bank-scores";

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
        let mut bank = Bank::default();
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
