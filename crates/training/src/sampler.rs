//! The images of each step. An order depends on seed and epoch alone, so that a resumed epoch
//! continues where it stopped.

use anyhow::{Result, bail, ensure};
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::seq::SliceRandom;

/// Steps of an epoch over `count` images: whole batches, but at least one.
pub fn steps(count: usize, batch_size: usize) -> usize {
    (count / batch_size.max(1)).max(1)
}

/// Every image once, in random order, without the last incomplete batch. Fewer images than a batch
/// make one smaller batch.
///
/// - `rows`: rows of the images file.
///
/// # Errors
///
/// Fewer than two images or a batch size below two: batch statistics need two.
pub fn uniform(rows: &[u32], batch_size: usize, seed: u64, epoch: usize) -> Result<Vec<Vec<u32>>> {
    check(rows.len(), batch_size)?;
    let mut order = rows.to_vec();
    order.shuffle(&mut stage::random::stream(seed, "order of images", &[epoch as u64]));
    Ok(into_batches(&order, batch_size))
}

/// Images drawn with replacement, each with weight `N / N_k` for `N_k` images in its cluster: every
/// cluster has the same share of an epoch. As many batches as [`uniform`] makes.
///
/// - `rows`: rows of the images file.
/// - `assignment`: the cluster of each of them, below `clusters`.
///
/// # Errors
///
/// As [`uniform`]; or an assignment is missing or not below `clusters`.
pub fn balanced(
    rows: &[u32],
    assignment: &[u32],
    clusters: usize,
    batch_size: usize,
    seed: u64,
    epoch: usize,
) -> Result<Vec<Vec<u32>>> {
    check(rows.len(), batch_size)?;
    ensure!(
        rows.len() == assignment.len(),
        "{} images but {} assignments; cluster again from these images",
        rows.len(),
        assignment.len()
    );
    let draw = WeightedIndex::new(balanced_weights(assignment, clusters)?)?;
    let mut random = stage::random::stream(seed, "balanced draw of images", &[epoch as u64]);
    let count = steps(rows.len(), batch_size) * batch_size.min(rows.len());
    let order: Vec<u32> = (0..count).map(|_| rows[draw.sample(&mut random)]).collect();
    Ok(into_batches(&order, batch_size))
}

/// `N / N_k` of each image, `N_k` counted by cluster number, so that an empty cluster shifts none.
fn balanced_weights(assignment: &[u32], clusters: usize) -> Result<Vec<f64>> {
    let mut sizes = vec![0usize; clusters];
    for &cluster in assignment {
        match sizes.get_mut(cluster as usize) {
            Some(size) => *size += 1,
            None => bail!("an assignment to cluster {cluster}, but there are {clusters} clusters"),
        }
    }
    let count = assignment.len() as f64;
    Ok(assignment.iter().map(|&cluster| count / sizes[cluster as usize] as f64).collect())
}

/// Steps of an epoch of [`every`]: the last batch may be a smaller one.
pub fn steps_of_every(count: usize, batch_size: usize) -> usize {
    let rest_of_one = usize::from(count % batch_size.max(1) == 1);
    count.saturating_sub(rest_of_one).div_ceil(batch_size.max(1)).max(1)
}

/// Images of the smallest batch of [`every`].
pub fn smallest_of_every(count: usize, batch_size: usize) -> usize {
    match count % batch_size.max(1) {
        _ if count < batch_size => count,
        0 | 1 => batch_size,
        rest => rest,
    }
}

/// Every image once, in random order, with the last incomplete batch. If that has a single image, the
/// batch before takes it, because batch statistics need two.
///
/// - `rows`: rows of the images file.
///
/// # Errors
///
/// As [`uniform`].
pub fn every(rows: &[u32], batch_size: usize, seed: u64, epoch: usize) -> Result<Vec<Vec<u32>>> {
    check(rows.len(), batch_size)?;
    let mut order = rows.to_vec();
    order.shuffle(&mut stage::random::stream(seed, "order of images", &[epoch as u64]));
    let mut batches: Vec<Vec<u32>> = order.chunks(batch_size).map(<[u32]>::to_vec).collect();
    if batches.len() > 1 && batches.last().is_some_and(|rest| rest.len() == 1) {
        let rest = batches.pop().unwrap_or_default();
        batches.last_mut().into_iter().for_each(|last| last.extend(&rest));
    }
    Ok(batches)
}

fn check(count: usize, batch_size: usize) -> Result<()> {
    ensure!(
        count >= 2,
        "{count} images to train on: at least 2 are needed; see `train-on` in table `[data]`"
    );
    ensure!(batch_size >= 2, "a batch of {batch_size}: batch statistics need at least 2 images");
    Ok(())
}

fn into_batches(order: &[u32], batch_size: usize) -> Vec<Vec<u32>> {
    order.chunks_exact(batch_size.min(order.len())).map(<[u32]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_takes_every_image_once_and_drops_the_rest() -> Result<()> {
        let rows: Vec<u32> = (100..137).collect();
        let batches = uniform(&rows, 10, 5, 3)?;
        assert_eq!(batches.len(), steps(37, 10));
        assert!(batches.iter().all(|batch| batch.len() == 10));
        let mut seen: Vec<u32> = batches.concat();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 30);
        assert!(seen.iter().all(|row| rows.contains(row)));
        assert_eq!(batches, uniform(&rows, 10, 5, 3)?);
        assert_ne!(batches, uniform(&rows, 10, 5, 4)?);
        assert_ne!(batches, uniform(&rows, 10, 6, 3)?);
        Ok(())
    }

    #[test]
    fn every_image_comes_once_with_the_rest_in_a_batch_of_its_own() -> Result<()> {
        for (count, sizes) in
            [(37, vec![10, 10, 10, 7]), (31, vec![10, 10, 11]), (30, vec![10; 3]), (3, vec![3])]
        {
            let rows: Vec<u32> = (100..100 + count).collect();
            let batches = every(&rows, 10, 5, 3)?;
            assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), sizes);
            assert_eq!(steps_of_every(count as usize, 10), sizes.len());
            let smallest = sizes.iter().min().copied();
            assert_eq!(Some(smallest_of_every(count as usize, 10)), smallest);
            let mut seen = batches.concat();
            assert_ne!(seen, rows);
            seen.sort_unstable();
            assert_eq!(seen, rows);
            assert_ne!(batches, every(&rows, 10, 5, 4)?);
        }
        // As published for CIFAR: 391 steps, the last of 80 images.
        assert_eq!(steps_of_every(50_000, 128), 391);
        assert!(every(&[4], 10, 0, 0).is_err());
        Ok(())
    }

    #[test]
    fn fewer_images_than_a_batch_make_one_batch() -> Result<()> {
        assert_eq!(uniform(&[4, 7, 9], 64, 0, 0)?.concat().len(), 3);
        assert_eq!(balanced(&[4, 7, 9], &[0, 0, 1], 2, 64, 0, 0)?.concat().len(), 3);
        for wrong in [uniform(&[4], 64, 0, 0), uniform(&[], 64, 0, 0), uniform(&[1, 2], 1, 0, 0)] {
            assert!(wrong.is_err());
        }
        Ok(())
    }

    /// ProPos, case 11.
    #[test]
    fn balanced_gives_every_cluster_the_same_mass() -> Result<()> {
        let assignment = [0, 0, 0, 0, 0, 0, 2, 2, 2, 3];
        let weights = balanced_weights(&assignment, 4)?;
        for (weight, want) in weights.iter().zip([10. / 6.; 6].into_iter().chain([10. / 3.; 3])) {
            assert!((weight - want).abs() < 1e-6, "got {weight}, want {want}");
        }
        assert_eq!(weights[9], 10.);

        let rows: Vec<u32> = (0..10).collect();
        let mut drawn = [0usize; 10];
        for epoch in 0..3000 {
            for row in balanced(&rows, &assignment, 4, 10, 1, epoch)?.concat() {
                drawn[row as usize] += 1;
            }
        }
        let shares = [&drawn[..6], &drawn[6..9], &drawn[9..]]
            .map(|part| part.iter().sum::<usize>() as f64 / 30_000.);
        assert!(shares.iter().all(|share| (share - 1. / 3.).abs() < 0.01), "{shares:?}");
        Ok(())
    }

    #[test]
    fn foreign_assignments_are_refused() {
        assert!(balanced(&[0, 1, 2], &[0, 1], 2, 2, 0, 0).is_err());
        assert!(balanced(&[0, 1, 2], &[0, 1, 2], 2, 2, 0, 0).is_err());
    }
}
