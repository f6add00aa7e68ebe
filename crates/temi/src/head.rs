//! `head.safetensors`: the heads of the consensus, aligned; see [`data::head`], form `ensemble`.

use std::path::Path;

use anyhow::Result;
use frozen::rows::Standardisation;
use stage::container::Tensor;

use crate::network::{HeadShape, effective_directions};

/// The heads of a consensus, with the cluster of each direction.
pub struct Ensemble<'a> {
    /// Extents of each head.
    pub shape: HeadShape,
    /// The parameters of each head, see [`HeadShape::places`], the best head first.
    pub heads: Vec<&'a [f32]>,
    /// Maps each direction of each head to one of the consensus, `(H, C)`.
    pub maps: Vec<Vec<u32>>,
    /// The cluster of each direction of the consensus, `(C,)`.
    pub clusters: Vec<u32>,
    /// Temperature of the softmax.
    pub temperature: f64,
    /// Mean and deviation of the columns.
    pub standardisation: &'a Standardisation,
}

impl Ensemble<'_> {
    /// Writes the file into `folder`.
    ///
    /// # Errors
    ///
    /// A weight is not finite, or the file cannot be written.
    pub fn write(&self, folder: &Path, clusters: usize) -> Result<()> {
        let HeadShape { width, hidden, bottleneck, clusters: directions } = self.shape;
        let (h, places) = (self.heads.len(), self.shape.places());
        let joined = |place: std::ops::Range<usize>| -> Vec<f32> {
            self.heads.iter().flat_map(|head| &head[place.clone()]).copied().collect()
        };
        let mut aligned = vec![0f32; h * directions * bottleneck];
        for ((head, map), aligned) in
            self.heads.iter().zip(&self.maps).zip(aligned.chunks_exact_mut(directions * bottleneck))
        {
            let own = effective_directions(&self.shape, head);
            for (row, &to) in own.chunks_exact(bottleneck).zip(map) {
                let to = &mut aligned[to as usize * bottleneck..][..bottleneck];
                to.iter_mut().zip(row).for_each(|(to, x)| *to = x / self.temperature as f32);
            }
        }
        let mut sums = vec![0f32; clusters * directions];
        for (direction, &cluster) in self.clusters.iter().enumerate() {
            sums[cluster as usize * directions + direction] = 1.;
        }
        let [hidden_weight, hidden_bias] = [places.hidden_weight, places.hidden_bias].map(joined);
        let bottleneck_values = [places.bottleneck_weight, places.bottleneck_bias].map(joined);
        let [bottleneck_weight, bottleneck_bias] = bottleneck_values;
        data::head::write(
            folder,
            clusters,
            "ensemble",
            &[
                Tensor::f32("mean", &[width], &self.standardisation.mean),
                Tensor::f32("deviation", &[width], &self.standardisation.deviation),
                Tensor::f32("hidden.weight", &[h, hidden, width], &hidden_weight),
                Tensor::f32("hidden.bias", &[h, hidden], &hidden_bias),
                Tensor::f32("bottleneck.weight", &[h, bottleneck, hidden], &bottleneck_weight),
                Tensor::f32("bottleneck.bias", &[h, bottleneck], &bottleneck_bias),
                Tensor::f32("directions", &[h, directions, bottleneck], &aligned),
                Tensor::f32("clusters.weight", &[clusters, directions], &sums),
            ],
        )
    }
}
