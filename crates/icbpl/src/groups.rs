//! Hands each group of pictures to a centroid of its own before the first step.
//!
//! The paper fixes the centroids in advance and says nothing of where the features begin. A random
//! head maps all pictures into a narrow cone, so that most of them are nearest to one or two
//! centroids. The loss moves features towards the mixture of all centroids and towards their
//! neighbours; it does not care which group comes to which centroid, and can leave two groups at one
//! centroid, or one group at two.
//!
//! Here, k-means finds `K` groups in the embeddings of the pretrained backbone. The bias of the head
//! is shifted so that the mean feature is zero, and the simplex of centroids is turned so that each
//! group is nearest to a different centroid. From then on centroids are constants, as published.
//! This is our reading of what the paper leaves open.

use anyhow::Result;
use assignment::{KMeans, k_means_on_ranks};
use candle_core::{Device, Tensor};
use stage::Job;

use crate::Config;
use crate::centroids::turned_to;
use crate::network::IcbplNetworks;

/// The bias of the head's last layer.
const BIAS: &str = "output.bias";

/// Shifts the head's bias and turns the centroids of `networks`.
///
/// - `embeddings`: those of the pictures to train on by the pretrained backbone, `(N, D)`.
/// - `unit`: the same at unit length.
pub(crate) fn hand_over(
    config: &Config,
    embeddings: &[f32],
    unit: &[f32],
    networks: &mut IcbplNetworks,
    job: &Job,
    device: &Device,
) -> Result<()> {
    let (clusters, width) = (job.data.clusters, config.network.head.width);
    let embedding_width = networks.backbone.embedding_width();
    let count = embeddings.len() / embedding_width;
    let k_means = KMeans::spherical(clusters, config.kmeans_restarts);
    let ranks = &job.communicator;
    let groups = k_means_on_ranks(unit, count, embedding_width, &k_means, job.seed, ranks)?;

    let embeddings = Tensor::from_slice(embeddings, (count, embedding_width), device)?;
    let features: Vec<f32> = networks.head.evaluate(&embeddings)?.flatten_all()?.to_vec1()?;
    let mean = mean_row(&features, width);
    let parameters = &mut networks.head.segment.parameters;
    let bias = parameters.get(BIAS)?;
    let bias: Vec<f32> = bias.iter().zip(&mean).map(|(bias, mean)| bias - *mean as f32).collect();
    parameters.set(BIAS, &bias)?;

    let means = means_of_groups(&features, &mean, &groups.assignment, clusters);
    let places = turned_to(&means, clusters, width, job.seed);
    let places: Vec<f32> = places.into_iter().map(|x| x as f32).collect();
    Ok(networks.centroids.set(&Tensor::from_vec(places, (clusters, width), device)?)?)
}

/// The mean of rows `(N, P)`.
fn mean_row(rows: &[f32], width: usize) -> Vec<f64> {
    let count = (rows.len() / width) as f64;
    let mut mean = vec![0f64; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(mean, &x)| *mean += f64::from(x) / count);
    }
    mean
}

/// The mean unit-length feature of each group, `(K, P)`, after `origin` is subtracted from the
/// features `(N, P)`; zeros for an empty group.
fn means_of_groups(features: &[f32], origin: &[f64], group_of: &[u32], groups: usize) -> Vec<f64> {
    let width = origin.len();
    let mut means = vec![0f64; groups * width];
    let mut sizes = vec![0f64; groups];
    for (row, &group) in features.chunks_exact(width).zip(group_of) {
        let row: Vec<f64> = row.iter().zip(origin).map(|(&x, o)| f64::from(x) - o).collect();
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
        let mean = &mut means[group as usize * width..][..width];
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / length);
        sizes[group as usize] += 1.;
    }
    for (mean, size) in means.chunks_exact_mut(width).zip(sizes) {
        mean.iter_mut().for_each(|x| *x /= size.max(1.));
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_those_of_centred_unit_features() {
        // Around (1, 1): (3, 4) and (0, 2) of group 1, (-5, 0) of group 0; group 2 is empty.
        let features = [4f32, 5., -4., 1., 1., 3.];
        let means = means_of_groups(&features, &[1., 1.], &[1, 0, 1], 3);
        for (got, want) in means.iter().zip([-1., 0., 0.3, 0.9, 0., 0.]) {
            assert!((got - want).abs() < 1e-12, "{means:?}");
        }
        assert_eq!(mean_row(&[1., 2., 3., 6.], 2), [2., 4.]);
    }
}
