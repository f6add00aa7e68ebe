//! The result of a label pass: projections, neighbours and pseudo-labels of all images.

use anyhow::Result;
use assignment::{chance_corrected_agreement, nearest_neighbours_on_ranks, shares};
use candle_core::{Device, Tensor};
use data::PseudoLabels;
use rand::seq::SliceRandom;
use stage::Job;
use training::{Checkpoint, Run, Trained};

use crate::Config;
use crate::selection::{NO_NEIGHBOUR, central, labels, mutual, reliable, smoothed};

/// Projections, neighbours and pseudo-labels of the images that are trained on, as the last label pass
/// found them. They are constants of the losses.
#[derive(Debug)]
pub(crate) struct LabelBank {
    clusters: usize,
    width: usize,
    /// Maps each row of the images file to its index among the images that are trained on.
    places: Vec<Option<usize>>,
    /// Share of the clustering networks that agree on each image, at the start of the round.
    agreement: Vec<f32>,
    /// Of unit length, `(N, P)`.
    projections: Vec<f32>,
    /// Those that an image is drawn to, `(N, m)`; none of an image at a border.
    neighbours: Vec<u32>,
    /// `(N,)`; empty without a clustering network.
    pseudo_labels: Vec<u32>,
    /// Whether the pseudo-label is trained on, 0 or 1, `(N,)`; empty as above.
    reliable: Vec<u32>,
    /// The graph by which all rounds measure their labels.
    first: FirstNeighbours,
}

/// The neighbours that the first label pass of the first round found, `(N, k)`: index values that were
/// computed in different embeddings are not comparable.
#[derive(Debug, Default)]
pub(crate) struct FirstNeighbours(pub(crate) Vec<u32>);

impl Trained for FirstNeighbours {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        file.list("first-neighbours", &mut self.0)
    }

    fn exported(&self) -> Option<&backbone::Segment> {
        None
    }
}

/// The outputs of the target network for all images.
pub(crate) struct LabelPass {
    /// Of unit length, `(N, P)`.
    pub(crate) projections: Vec<f32>,
    /// `(N, K)`; empty without a clustering network.
    pub(crate) memberships: Vec<f32>,
}

impl LabelBank {
    /// An empty bank for the images `rows`.
    ///
    /// - `found`: the last clustering's result. An image that it lacks has no agreement.
    /// - `width`: `P`, of a projection.
    /// - `images`: number of rows of the images file.
    pub(crate) fn new(
        found: &PseudoLabels,
        rows: &[u32],
        width: usize,
        images: usize,
        first: FirstNeighbours,
    ) -> Self {
        let mut places = vec![None; images];
        rows.iter().enumerate().for_each(|(place, &row)| places[row as usize] = Some(place));
        let mut agreement = vec![0.; rows.len()];
        for (i, &row) in found.index.iter().enumerate() {
            if let Some(place) = places[row as usize] {
                agreement[place] = found.head_agreement.as_ref().map_or(1., |share| share[i]);
            }
        }
        Self {
            clusters: found.clusters,
            width,
            places,
            agreement,
            projections: Vec::new(),
            neighbours: Vec::new(),
            pseudo_labels: Vec::new(),
            reliable: Vec::new(),
            first,
        }
    }

    /// Replaces everything by what follows from a new label pass, and notes how it is for the log.
    ///
    /// - `epoch`: counted over all rounds, from 0.
    /// - `epochs`: of all rounds.
    ///
    /// # Errors
    ///
    /// A projection is not finite.
    pub(crate) fn refresh(
        &mut self,
        config: &Config,
        pass: LabelPass,
        [epoch, epochs]: [usize; 2],
        job: &Job,
        run: &mut Run,
    ) -> Result<()> {
        let images = self.agreement.len();
        let count = config.candidate_neighbours.min(images - 1);
        let nearest = nearest_neighbours_on_ranks(
            &pass.projections,
            images,
            self.width,
            count,
            &job.communicator,
        )?;
        self.projections = pass.projections;
        self.neighbours = mutual(&nearest, images, config.neighbours)?;
        if self.first.0.is_empty() {
            self.first.0.clone_from(&nearest);
        }
        if !pass.memberships.is_empty() {
            let before = std::mem::take(&mut self.pseudo_labels);
            self.label(config, &pass.memberships, &nearest)?;
            self.drop_neighbours_at_borders(config.kept_share(epoch, epochs))?;
            // Permuted labels differ at every pass, so the log has no `changed-labels` then.
            let before = if config.permuted_share == 0. { before } else { Vec::new() };
            self.note_labels(&before, run)?;
            self.permute(config.permuted_share, job.seed, epoch);
        }
        let with_neighbours =
            self.neighbours.chunks_exact(config.neighbours).filter(|of| of[0] != NO_NEIGHBOUR);
        run.note("with-neighbours", with_neighbours.count() as f64 / images as f64);
        Ok(())
    }

    fn label(&mut self, config: &Config, memberships: &[f32], nearest: &[u32]) -> Result<()> {
        let smoothed = smoothed(memberships, self.clusters, nearest, config.smoothing_neighbours);
        self.pseudo_labels = labels(&smoothed, self.clusters);
        let reliable = reliable(
            &smoothed,
            &self.pseudo_labels,
            self.clusters,
            &self.agreement,
            config.least_agreement,
        );
        self.reliable = reliable.into_iter().map(u32::from).collect();
        Ok(())
    }

    /// Removes the neighbours of the images at the borders of clusters.
    fn drop_neighbours_at_borders(&mut self, share: f64) -> Result<()> {
        let kept =
            central(&self.projections, self.width, &self.pseudo_labels, self.clusters, share)?;
        let most = self.neighbours.len() / kept.len();
        for (kept, neighbours) in kept.into_iter().zip(self.neighbours.chunks_exact_mut(most)) {
            if !kept {
                neighbours.fill(NO_NEIGHBOUR);
            }
        }
        Ok(())
    }

    fn note_labels(&self, before: &[u32], run: &mut Run) -> Result<()> {
        let images = self.pseudo_labels.len() as f64;
        let reliable: u32 = self.reliable.iter().sum();
        run.note("reliable-share", f64::from(reliable) / images);
        run.note("smallest-cluster", shares(&self.pseudo_labels, self.clusters)?.smallest);
        let agreement =
            chance_corrected_agreement(&self.pseudo_labels, &self.first.0, self.clusters)?;
        run.note("chance-corrected-agreement", agreement);
        if !before.is_empty() {
            let changed = before.iter().zip(&self.pseudo_labels).filter(|(a, b)| a != b).count();
            run.note("changed-labels", changed as f64 / images);
        }
        Ok(())
    }

    /// Exchanges the pseudo-labels of some reliable images among each other.
    fn permute(&mut self, share: f64, seed: u64, epoch: usize) {
        if share == 0. {
            return;
        }
        let mut random = stage::random::stream(seed, "permuted labels", &[epoch as u64]);
        let mut chosen: Vec<usize> =
            (0..self.reliable.len()).filter(|&i| self.reliable[i] == 1).collect();
        chosen.shuffle(&mut random);
        chosen.truncate((share * chosen.len() as f64).round() as usize);
        let mut labels: Vec<u32> = chosen.iter().map(|&i| self.pseudo_labels[i]).collect();
        labels.shuffle(&mut random);
        chosen.into_iter().zip(labels).for_each(|(i, label)| self.pseudo_labels[i] = label);
    }

    /// The pseudo-labels of a batch that are trained on.
    ///
    /// - `rows`: rows of the images file.
    pub(crate) fn reliable_labels(&self, rows: &[u32]) -> Vec<Option<u32>> {
        let label = |&row: &u32| {
            let place = self.places[row as usize]?;
            (*self.reliable.get(place)? == 1).then(|| self.pseudo_labels[place])
        };
        rows.iter().map(label).collect()
    }

    /// What the images of a batch are drawn to, `(B, P)`, and with which weight, `(B, 1)`: the mean of
    /// their neighbours' projections with `share`; zeros and 0 without neighbours.
    pub(crate) fn pulls(
        &self,
        rows: &[u32],
        share: f64,
        device: &Device,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let mut means = vec![0f32; rows.len() * self.width];
        let mut weights = vec![0f32; rows.len()];
        let most = self.neighbours.len() / self.agreement.len();
        for ((mean, weight), &row) in means.chunks_exact_mut(self.width).zip(&mut weights).zip(rows)
        {
            let Some(place) = self.places[row as usize] else { continue };
            let neighbours = self.neighbours[place * most..][..most].iter();
            let found: Vec<usize> =
                neighbours.filter(|&&j| j != NO_NEIGHBOUR).map(|&j| j as usize).collect();
            for &j in &found {
                let projection = &self.projections[j * self.width..][..self.width];
                mean.iter_mut().zip(projection).for_each(|(sum, z)| *sum += z / found.len() as f32);
            }
            *weight = if found.is_empty() { 0. } else { share as f32 };
        }
        let (images, width) = (rows.len(), self.width);
        let means = Tensor::from_vec(means, (images, width), device)?;
        Ok((means, Tensor::from_vec(weights, (images, 1), device)?))
    }

    /// Saves or loads what the last label pass found: it is not repeated within an epoch.
    pub(crate) fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        file.list("projections", &mut self.projections)?;
        file.list("neighbours", &mut self.neighbours)?;
        file.list("pseudo-labels", &mut self.pseudo_labels)?;
        file.list("reliable", &mut self.reliable)?;
        self.first.checkpoint(file)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    /// A bank of the rows 0, 2 and 3 of four: the first image has both others as neighbours, the second
    /// none, the third the first.
    fn bank() -> LabelBank {
        LabelBank {
            clusters: 3,
            width: 2,
            places: vec![Some(0), None, Some(1), Some(2)],
            agreement: vec![1.; 3],
            projections: vec![1., 0., 0., 1., 0.6, 0.8],
            neighbours: vec![1, 2, NO_NEIGHBOUR, NO_NEIGHBOUR, 0, NO_NEIGHBOUR],
            pseudo_labels: vec![2, 0, 1],
            reliable: vec![1, 0, 1],
            first: FirstNeighbours::default(),
        }
    }

    #[test]
    fn a_batch_is_drawn_to_the_means_of_its_neighbours() -> Result<()> {
        let (means, weights) = bank().pulls(&[0, 3, 1, 2], 0.5, &Cpu)?;
        let want = [[0.3f32, 0.9], [1., 0.], [0., 0.], [0., 0.]];
        for (got, want) in means.to_vec2::<f32>()?.concat().iter().zip(want.concat()) {
            assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
        }
        assert_eq!(weights.to_vec2::<f32>()?, [[0.5], [0.5], [0.], [0.]]);
        assert_eq!(bank().reliable_labels(&[0, 3, 1, 2]), [Some(2), Some(1), None, None]);
        Ok(())
    }

    #[test]
    fn permuted_labels_are_the_same_ones_of_other_reliable_images() {
        let mut bank = bank();
        bank.pseudo_labels = (0..40).map(|i| i % 3).collect();
        bank.reliable = (0..40).map(|i| u32::from(i < 30)).collect();
        let before = bank.pseudo_labels.clone();
        bank.permute(0., 1, 0);
        assert_eq!(bank.pseudo_labels, before);
        bank.permute(1., 1, 0);
        let sorted = |labels: &[u32]| {
            let mut labels = labels.to_vec();
            labels.sort_unstable();
            labels
        };
        assert_eq!(sorted(&bank.pseudo_labels[..30]), sorted(&before[..30]));
        assert_eq!(bank.pseudo_labels[30..], before[30..]);
        let moved = bank.pseudo_labels.iter().zip(&before).filter(|(a, b)| a != b).count();
        assert!((10..=30).contains(&moved), "two of three by chance, not {moved} of 30");
    }
}
