//! Pictures, from the loader to a network on its device.

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use collective::Communicator;
use data::views::{Input, Pipeline};
use data::{Batch, Images, Loader};
use layers::BatchGroups;

/// The views of a run's pictures: threads make them ahead of the steps that need them.
#[derive(Debug)]
pub struct Views<'a> {
    images: &'a Images,
    /// For each view, its operations, and its size and normalisation.
    views: Vec<(Pipeline, Input)>,
    seed: u64,
    /// Divides batches among ranks.
    groups: BatchGroups,
}

impl<'a> Views<'a> {
    /// One view by each of these pipelines.
    ///
    /// - `seed`: of the random draws, which depend on it, on epoch, row and view alone.
    pub fn new<'p>(
        images: &'a Images,
        pipelines: impl IntoIterator<Item = &'p Pipeline>,
        input: &Input,
        seed: u64,
    ) -> Self {
        let view = |pipeline: &Pipeline| (pipeline.clone(), input.clone());
        Self::of_sizes(images, pipelines.into_iter().map(view).collect(), seed)
    }

    /// Views of several sizes: each pipeline with the input that it fills.
    pub fn of_sizes(images: &'a Images, views: Vec<(Pipeline, Input)>, seed: u64) -> Self {
        Self { images, views, seed, groups: BatchGroups::one() }
    }

    /// The same views, of the pictures of this rank alone in each batch.
    pub fn in_groups(self, groups: &BatchGroups) -> Self {
        Self { groups: groups.clone(), ..self }
    }

    /// The batches of an epoch, each a list of rows of the images file, without the first `done`.
    ///
    /// # Errors
    ///
    /// The pictures have other channels than the input, or a row does not exist.
    pub fn epoch(&self, epoch: usize, batches: Vec<Vec<u32>>, done: usize) -> Result<Loader> {
        let (views, threads) = (self.views.clone(), Loader::threads());
        let loader =
            Loader::crops(self.images, batches, done, views, self.seed, epoch as u64, threads)?;
        Ok(loader.only(|pictures| self.groups.own_images(pictures)))
    }
}

/// The views of a batch on `device`, `(O, H, W, C)` each for the pictures of this rank, which may differ
/// in size.
pub fn tensors(batch: Batch, device: &Device) -> Result<Vec<Tensor>> {
    let Batch { own, views, sizes, channels, .. } = batch;
    let tensor = |(values, [height, width]): (Vec<f32>, [usize; 2])| {
        Ok(Tensor::from_vec(values, (own.len(), height, width, channels), device)?)
    };
    views.into_iter().zip(sizes).map(tensor).collect()
}

/// The same where the number of views is known.
///
/// # Errors
///
/// The batch has another number of views, or the device is out of memory.
pub fn pictures<const VIEWS: usize>(batch: Batch, device: &Device) -> Result<[Tensor; VIEWS]> {
    let found = batch.views.len();
    ensure!(
        found == VIEWS,
        "a batch has {found} views of each picture, but the step takes {VIEWS}"
    );
    let tensors = tensors(batch, device)?;
    tensors.try_into().map_err(|_| anyhow!("a batch lacks the size of a view"))
}

/// Passes every picture of `loader`, which has one view of each, through `network`, and returns its
/// outputs on all ranks, row by row and in order.
///
/// - `ranks`: each of them passes a part of every batch.
/// - `network`: from pictures `(B, H, W, C)` to as many outputs `(B, …)` as are wanted. The output of a
///   picture must not depend on the others.
///
/// # Errors
///
/// A picture cannot be read, or `network` or a rank fails.
pub fn outputs<const N: usize>(
    loader: Loader,
    device: &Device,
    ranks: &Communicator,
    mut network: impl FnMut(&Tensor) -> Result<[Tensor; N]>,
) -> Result<[Vec<f32>; N]> {
    let mut all = [const { Vec::new() }; N];
    let mut batches = DividedBatches::new(loader, device, ranks)?;
    while let Some((_, outputs)) = batches.next(&mut network)? {
        all.iter_mut().zip(outputs).for_each(|(all, output)| all.extend(output));
    }
    Ok(all)
}

/// Batches of one view that pass through a network, each divided among the ranks.
#[derive(Debug)]
pub struct DividedBatches<'a> {
    loader: Loader,
    device: &'a Device,
    ranks: &'a Communicator,
}

impl<'a> DividedBatches<'a> {
    /// The batches of a loader that was not asked for one yet.
    ///
    /// # Errors
    ///
    /// The number of ranks is not a power of two.
    pub fn new(loader: Loader, device: &'a Device, ranks: &'a Communicator) -> Result<Self> {
        let parts = BatchGroups::new(ranks.size(), ranks.clone())?;
        let loader = loader.only(|pictures| parts.own_images(pictures));
        Ok(Self { loader, device, ranks })
    }

    /// The rows of the next batch in the images file, and its outputs on all ranks, as
    /// [`outputs`]; `None` after the last batch.
    ///
    /// # Errors
    ///
    /// As [`outputs`].
    #[expect(clippy::type_complexity, reason = "rows, and the outputs of each kind")]
    pub fn next<const N: usize>(
        &mut self,
        network: impl FnOnce(&Tensor) -> Result<[Tensor; N]>,
    ) -> Result<Option<(Vec<u32>, [Vec<f32>; N])>> {
        let Some(batch) = self.loader.next() else { return Ok(None) };
        let mut batch = batch?;
        let rows = std::mem::take(&mut batch.rows);
        let mut outputs = [const { Vec::new() }; N];
        // A small batch may have no picture for this rank.
        if !batch.own.is_empty() {
            let [pictures] = pictures(batch, self.device)?;
            for (output, tensor) in outputs.iter_mut().zip(network(&pictures)?) {
                *output = tensor.flatten_all()?.to_vec1::<f32>()?;
            }
        }
        if self.ranks.size() > 1 {
            for output in &mut outputs {
                *output = self.ranks.all_gather(output)?;
            }
        }
        Ok(Some((rows, outputs)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    /// Views of one picture of 2 × 3 pixels and 2 channels, and of one of 1 × 3.
    fn batch(views: Vec<Vec<f32>>) -> Batch {
        let sizes = views.iter().map(|values| [values.len() / 6, 3]).collect();
        Batch { rows: vec![7], own: 0..1, views, sizes, height: 2, width: 3, channels: 2 }
    }

    #[test]
    fn views_keep_their_order_size_and_layout() -> Result<()> {
        let view = |range: std::ops::Range<u8>| range.map(f32::from).collect::<Vec<f32>>();
        let [one, other] = pictures(batch(vec![view(0..12), view(50..56)]), &Cpu)?;
        assert_eq!((one.dims(), other.dims()), (&[1, 2, 3, 2][..], &[1, 1, 3, 2][..]));
        assert_eq!(one.get(0)?.get(1)?.to_vec2::<f32>()?, [[6., 7.], [8., 9.], [10., 11.]]);
        assert_eq!(other.flatten_all()?.to_vec1::<f32>()?, view(50..56));
        Ok(())
    }

    #[test]
    fn other_numbers_of_views_or_values_are_refused() {
        for views in [vec![vec![0.; 12]], vec![vec![0.; 12]; 3], vec![vec![0.; 12], vec![0.; 5]]] {
            assert!(pictures::<2>(batch(views), &Cpu).is_err());
        }
    }
}
