//! The pseudo-labels by row of the images file, and the prototypes of the reliable ones.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use data::views::Input;
use data::{Images, Loader, PseudoLabels};
use stage::Job;
use training::{Target, outputs};

use crate::loss::Marks;

/// Pseudo-label and weight of every row of the images file.
#[derive(Debug)]
pub(crate) struct Marked {
    clusters: usize,
    projection_width: usize,
    pseudo_labels: Vec<Option<u32>>,
    /// The score where it is reliable, else 0.
    weights: Vec<f32>,
}

impl Marked {
    pub(crate) fn new(labels: &PseudoLabels, images: usize) -> Self {
        let mut pseudo_labels = vec![None; images];
        let mut weights = vec![0.; images];
        for (i, &row) in labels.index.iter().enumerate() {
            pseudo_labels[row as usize] = Some(labels.assignment[i]);
            if labels.reliable[i] {
                weights[row as usize] = labels.score[i];
            }
        }
        let PseudoLabels { clusters, projection_width, .. } = *labels;
        Self { clusters, projection_width, pseudo_labels, weights }
    }

    /// The pseudo-labels of `rows`, where they have one.
    pub(crate) fn pseudo_labels(&self, rows: &[u32]) -> Vec<Option<u32>> {
        rows.iter().map(|&row| self.pseudo_labels[row as usize]).collect()
    }

    /// What the losses take of a batch. A row without a pseudo-label has weight 0.
    pub(crate) fn marks(&self, rows: &[u32]) -> Marks {
        let label = |&row: &u32| self.pseudo_labels[row as usize].unwrap_or(0);
        Marks {
            pseudo_labels: rows.iter().map(label).collect(),
            weights: rows.iter().map(|&row| self.weights[row as usize]).collect(),
        }
    }

    /// Unit-length means of the reliable images' projections by `target`, weighted by score:
    /// `(K, P)` row by row, from un-augmented pictures and running statistics.
    ///
    /// # Errors
    ///
    /// A picture cannot be read.
    pub(crate) fn prototypes(
        &self,
        images: &Images,
        input: &Input,
        target: &mut Target,
        device: &Device,
        job: &Job,
    ) -> Result<Vec<f32>> {
        let rows: Vec<u32> = (0..)
            .zip(&self.weights)
            .filter(|(_, weight)| **weight > 0.)
            .map(|(row, _)| row)
            .collect();
        let loader = Loader::clean(images, &rows, input)?;
        let project = |pictures: &Tensor| Ok([target.embed(pictures)?.1]);
        let [projections] = outputs(loader, device, &job.communicator, project)?;
        let Marks { pseudo_labels, weights } = self.marks(&rows);
        let (width, clusters) = (self.projection_width, self.clusters);
        assignment::prototypes(&projections, width, &pseudo_labels, &weights, clusters).context(
            "the network's projections do not fit the pseudo-labels; cluster again with this \
             network",
        )
    }
}
