//! Pictures, from the loader to a network on its device.

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
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
/// outputs, row by row and in order.
///
/// - `network`: from pictures `(B, H, W, C)` to as many outputs `(B, …)` as are wanted.
///
/// # Errors
///
/// A picture cannot be read, or `network` fails.
pub fn outputs<const N: usize>(
    loader: Loader,
    device: &Device,
    mut network: impl FnMut(&Tensor) -> Result<[Tensor; N]>,
) -> Result<[Vec<f32>; N]> {
    let mut all = [const { Vec::new() }; N];
    for batch in loader {
        let [pictures] = pictures(batch?, device)?;
        for (all, output) in all.iter_mut().zip(network(&pictures)?) {
            all.extend(output.flatten_all()?.to_vec1::<f32>()?);
        }
    }
    Ok(all)
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
