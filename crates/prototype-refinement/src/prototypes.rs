//! Prototypes: the unit-length centres of the clusters among the projections, and how they move.

use anyhow::Result;
use candle_core::{Device, Tensor};
use data::PseudoLabels;
use training::Checkpoint;
use training::scatter::cluster_means;

use crate::loss::Marks;

/// Share of a prototype that a moving average keeps at each step.
const MOVING_AVERAGE_DECAY: f64 = 0.9;

/// The prototypes of all clusters, `(K, P)`: unit rows, or zeros for a cluster without reliable
/// images. Constants of the loss.
#[derive(Debug)]
pub(crate) struct Prototypes {
    rows: Tensor,
}

impl Prototypes {
    /// Those that clustering wrote, computed with the network that is refined here.
    pub(crate) fn of(labels: &PseudoLabels, device: &Device) -> Result<Self> {
        let shape = (labels.clusters, labels.projection_width);
        Ok(Self { rows: Tensor::from_slice(&labels.prototypes, shape, device)? })
    }

    pub(crate) fn rows(&self) -> &Tensor {
        &self.rows
    }

    /// Replaces them by `rows`, `(K, P)` row by row.
    pub(crate) fn set(&mut self, rows: &[f32]) -> Result<()> {
        self.rows = Tensor::from_slice(rows, self.rows.dims2()?, self.rows.device())?;
        Ok(())
    }

    /// `cₖ ← n(.9 cₖ + .1 μ'ₖ)` for the clusters of the batch that have a reliable image.
    ///
    /// - `targets`: projections of both views by the target network, `(B, P)` each; `μ'` is the
    ///   unit-length mean over both.
    pub(crate) fn follow(&mut self, targets: [&Tensor; 2], marks: &Marks) -> Result<()> {
        let both = Tensor::cat(&targets, 0)?;
        let reliable = marks.reliable().repeat(2);
        let Some((clusters, means)) = cluster_means(&both, &reliable)? else { return Ok(()) };
        let width = self.rows.dim(1)?;
        let mut rows = self.rows.flatten_all()?.to_vec1::<f32>()?;
        for (cluster, mean) in clusters.into_iter().zip(means.to_vec2::<f32>()?) {
            let row = &mut rows[cluster as usize * width..][..width];
            for (c, m) in row.iter_mut().zip(mean) {
                let moved = MOVING_AVERAGE_DECAY * f64::from(*c)
                    + (1. - MOVING_AVERAGE_DECAY) * f64::from(m);
                *c = moved as f32;
            }
            let length = row.iter().map(|&c| f64::from(c).powi(2)).sum::<f64>().sqrt().max(1e-12);
            row.iter_mut().for_each(|c| *c = (f64::from(*c) / length) as f32);
        }
        self.set(&rows)
    }

    /// Saves or loads them, as `stage.prototypes`.
    pub(crate) fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        file.tensor("prototypes", &mut self.rows)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    #[test]
    fn a_moving_average_goes_a_tenth_of_the_way() -> Result<()> {
        let rows = Tensor::new(&[[1f32, 0.], [0.6, 0.8], [1., 0.]], &Cpu)?;
        let mut prototypes = Prototypes { rows };
        // Cluster 0 lies at (0, 1) in both views, cluster 1 has no image, cluster 2 none to trust.
        let target = Tensor::new(&[[0f32, 3.], [0., 0.5], [0., 1.]], &Cpu)?;
        let marks = Marks { pseudo_labels: vec![0, 0, 2], weights: vec![0.5, 1., 0.] };
        prototypes.follow([&target, &target], &marks)?;
        let got = prototypes.rows().to_vec2::<f32>()?;
        assert!((got[0][0] - 0.993884).abs() < 1e-6 && (got[0][1] - 0.110432).abs() < 1e-6);
        assert_eq!(got[1..], [[0.6, 0.8], [1., 0.]]);
        Ok(())
    }

    #[test]
    fn without_reliable_images_they_stay() -> Result<()> {
        let rows = Tensor::new(&[[1f32, 0.], [0.6, 0.8]], &Cpu)?;
        let mut prototypes = Prototypes { rows };
        let target = Tensor::new(&[[0f32, 3.]], &Cpu)?;
        let marks = Marks { pseudo_labels: vec![0], weights: vec![0.] };
        prototypes.follow([&target, &target], &marks)?;
        assert_eq!(prototypes.rows().to_vec2::<f32>()?, [[1., 0.], [0.6, 0.8]]);
        assert!(prototypes.set(&[1.; 5]).is_err());
        Ok(())
    }
}
