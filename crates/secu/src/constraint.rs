//! How images are assigned to centres, so that the clusters do not collapse into one.
//!
//! By size: a dual variable makes a cluster more attractive while it holds less than its share. By
//! entropy: joining a large cluster costs, joining a small one pays. Both assign a whole batch at
//! once: its images do not see each other's choice (Qian 2023, arXiv:2311.14310).
//!
//! For few images choose entropy (measured here, not stated in the paper). Duals move by steps: a cluster
//! without images gains ηγ/K in each, in an epoch of n steps nηγ/K. With the published η and γ that
//! is 3.5 on CIFAR-10 (n = 391, K = 10), more than any two similarities differ, but 0.19 on 2,014
//! photographs in batches of 64 (n = 32, K = 15), and the network draws the images together sooner
//! than the duals part them: from the second epoch on a batch held 3.7 of the 15 clusters. A larger η
//! throws the whole batch from cluster to cluster: one a batch at η = 1.2. The counts of the entropy
//! are of all images, however many steps it took to see them: 14.8 of 15.

use anyhow::Result;
use assignment::argmax_rows;
use serde::{Deserialize, Serialize};
use stage::Diverged;
use training::check;

/// The rule, as the key `constraint` of an experiment says it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "rule",
    deny_unknown_fields,
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Constraint {
    /// Every cluster holds at least its share of the images.
    Size {
        /// γ: the least size of a cluster over its even share `N/K`. 1 asks for equal sizes.
        lower_bound: f64,
        /// η: how far the dual variables move in a step, whatever the number of images.
        rate: f64,
    },
    /// The sizes of the clusters have a large entropy.
    Entropy {
        /// α: weight of the entropy; what matters is α over the number of images, 0.12 is published.
        weight: f64,
    },
}

impl Constraint {
    /// Checks the values.
    ///
    /// - `table`: name of this table in the experiment, for messages.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(self, table: &str) -> Result<()> {
        match self {
            Self::Size { lower_bound, rate } => {
                check::within(table, "lower-bound", lower_bound, 0. ..=1.)?;
                check::not_negative(table, &[("rate", rate)])
            }
            Self::Entropy { weight } => check::not_negative(table, &[("weight", weight)]),
        }
    }
}

/// What a head remembers of its clusters from batch to batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Balance {
    constraint: Constraint,
    /// By size: the dual variable ρ of each cluster, never reset. By entropy: the images of each
    /// cluster, `n`.
    values: Vec<f32>,
}

/// What is known of the images of a batch before they are assigned.
#[derive(Debug, Clone, Copy)]
pub enum Before<'a> {
    /// Nothing: it is the first epoch.
    Nothing,
    /// Their clusters of the epoch before, and the number of all images.
    Assigned {
        /// Cluster of each image of the batch.
        ids: &'a [u32],
        /// All images, N.
        images: usize,
    },
}

impl Balance {
    /// Before the first batch.
    pub fn new(constraint: Constraint, clusters: usize) -> Self {
        Self { constraint, values: vec![0.; clusters] }
    }

    /// The dual variables, rounded to f32, or the counts, `K`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The same, for a checkpoint.
    pub(crate) fn values_mut(&mut self) -> &mut Vec<f32> {
        &mut self.values
    }

    /// Assigns the images of a batch, then takes the batch into account.
    ///
    /// - `similarity`: mean over both views, `(B, K)` row by row.
    ///
    /// By size: `y = argmaxₖ sₖ + ρₖ`, then `ρₖ ← ρₖ − η nₖ(batch)/B + ηγ/K`, held at 0 or above
    /// where `γ < 1`. By entropy: `y = argminₖ −sₖ + α δₖ` with `δ` the change in
    /// `Σ (nₖ/b) ln(nₖ/b)`, then `n` follows; see [`Balance::deltas`]. Ties go to the lowest
    /// cluster.
    ///
    /// # Errors
    ///
    /// A similarity is NaN: [`Diverged`].
    pub fn assign(&mut self, similarity: &[f32], before: Before) -> Result<Vec<u32>> {
        let clusters = self.values.len();
        let mut gains = Vec::with_capacity(similarity.len());
        for (image, row) in similarity.chunks_exact(clusters).enumerate() {
            let similarities = row.iter().map(|&s| f64::from(s));
            match self.constraint {
                Constraint::Size { .. } => {
                    let duals = self.values.iter().map(|&dual| f64::from(dual));
                    gains.extend(similarities.zip(duals).map(|(s, dual)| s + dual));
                }
                Constraint::Entropy { weight } => {
                    let deltas = self.deltas(before, image);
                    gains.extend(similarities.zip(deltas).map(|(s, delta)| s - weight * delta));
                }
            }
        }
        let (ids, _) = argmax_rows(&gains, clusters).map_err(|error| {
            Diverged(format!("similarities to centres: {error}; try a lower `learning-rate`"))
        })?;
        self.follow(&ids, before);
        Ok(ids)
    }

    /// `δ` of an image of the batch: how `Σ h(pₖ)` with `h(p) = p ln p` changes when it joins a
    /// cluster.
    ///
    /// In the first epoch `p = n/(b + 1)` for the `b` images counted so far, and
    /// `δₖ = h(pₖ + 1/(b+1)) − h(pₖ)`; nothing at all before the first batch. Later `p = n/N`,
    /// and the image leaves its cluster `o`: `δₖ = h(pₖ + 1/N) − h(pₖ) + h(pₒ − 1/N) − h(pₒ)`,
    /// `δₒ = 0`.
    pub fn deltas(&self, before: Before, image: usize) -> Vec<f64> {
        let h = |p: f64| if p > 0. { p * p.ln() } else { 0. };
        let counts = self.values.iter().map(|&count| f64::from(count));
        match before {
            Before::Nothing => {
                let counted: f64 = counts.clone().sum();
                if counted == 0. {
                    return vec![0.; self.values.len()];
                }
                let all = counted + 1.;
                counts.map(|n| h((n + 1.) / all) - h(n / all)).collect()
            }
            Before::Assigned { ids, images } => {
                let (old, all) = (ids[image] as usize, images as f64);
                let left = f64::from(self.values[old]);
                let leaving = h((left - 1.) / all) - h(left / all);
                let joining = |n: f64| h((n + 1.) / all) - h(n / all) + leaving;
                counts.enumerate().map(|(k, n)| if k == old { 0. } else { joining(n) }).collect()
            }
        }
    }

    /// Takes into account that the images of a batch were given these clusters.
    fn follow(&mut self, ids: &[u32], before: Before) {
        match self.constraint {
            Constraint::Size { lower_bound, rate } => {
                let clusters = self.values.len() as f64;
                let mut shares = vec![0.; self.values.len()];
                ids.iter().for_each(|&id| shares[id as usize] += 1. / ids.len() as f64);
                for (dual, share) in self.values.iter_mut().zip(shares) {
                    let moved = f64::from(*dual) - rate * share + rate * lower_bound / clusters;
                    *dual = if lower_bound < 1. { moved.max(0.) } else { moved } as f32;
                }
            }
            Constraint::Entropy { .. } => {
                ids.iter().for_each(|&id| self.values[id as usize] += 1.);
                if let Before::Assigned { ids, .. } = before {
                    ids.iter().for_each(|&id| self.values[id as usize] -= 1.);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Constraint = Constraint::Size { lower_bound: 0.9, rate: 0.1 };

    fn entropy(weight: f64, counts: &[f32]) -> Balance {
        Balance { constraint: Constraint::Entropy { weight }, values: counts.to_vec() }
    }

    #[track_caller]
    fn assert_near(got: &[f64], want: &[f64], within: f64) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < within, "got {got}, want {want}");
        }
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&value| f64::from(value)).collect()
    }

    /// SeCu, case T4.
    #[test]
    fn duals_follow_the_sizes_step_by_step() {
        let mut balance = Balance::new(SIZE, 4);
        let batch = [0, 0, 0, 0, 0, 1, 1, 2];
        for want in [[0., 0., 0.01, 0.0225], [0., 0., 0.02, 0.045], [0., 0., 0.03, 0.0675]] {
            balance.follow(&batch, Before::Nothing);
            assert_near(&wide(balance.values()), &want, 1e-8);
        }
        // Without clipping, the steps add up to η (γ − 1) = −0.01.
        let mut free = Balance::new(Constraint::Size { lower_bound: 1., rate: 0.1 }, 4);
        free.follow(&batch, Before::Nothing);
        assert_near(&wide(free.values()), &[-0.0375, 0., 0.0125, 0.025], 1e-8);
        let mut high = Balance::new(SIZE, 4);
        high.values = vec![1.; 4];
        high.follow(&batch, Before::Nothing);
        assert_near(&[wide(high.values()).iter().sum::<f64>() - 4.], &[-0.01], 1e-6);
    }

    /// SeCu, case T5.
    #[test]
    fn duals_move_the_image_that_wavers_and_no_other() -> Result<()> {
        let similarity = [0.50, 0.47, 0.40, 0.495, 0.9, 0.1, 0.1, 0.1];
        let mut balance = Balance::new(SIZE, 4);
        assert_eq!(balance.clone().assign(&similarity, Before::Nothing)?, [0, 0]);
        balance.values = vec![0., 0., 0.03, 0.0675];
        assert_eq!(balance.assign(&similarity, Before::Nothing)?, [3, 0]);
        // And the batch was counted: one image each for clusters 3 and 0.
        assert_near(&wide(balance.values()), &[0., 0.0225, 0.0525, 0.04], 1e-7);
        let mut even = Balance::new(SIZE, 3);
        assert_eq!(even.assign(&[0.5, 0.5, 0.5, 0.1, 0.5, 0.5], Before::Nothing)?, [0, 1]);
        Ok(())
    }

    /// SeCu, case T6.
    #[test]
    fn entropy_deltas_have_the_specified_values() -> Result<()> {
        let balance = entropy(1., &[6., 3., 1., 0.]);
        let first = [0.042993, -0.013505, -0.091964, -0.217990];
        assert_near(&balance.deltas(Before::Nothing, 0), &first, 1e-6);
        let later = |old: u32| balance.deltas(Before::Assigned { ids: &[old], images: 10 }, 0);
        assert_near(&later(0), &[0., -0.045403, -0.131707, -0.270337], 1e-6);
        assert_near(&later(2), &[0.287081, 0.224934, 0., 0.], 1e-6);

        let similarity = [0.9, 0.8, 0.7, 0.6];
        for (weight, want) in [(0.1, 0), (0.5, 0), (2., 3)] {
            let mut balance = entropy(weight, &[6., 3., 1., 0.]);
            let before = Before::Assigned { ids: &[0], images: 10 };
            assert_eq!(balance.assign(&similarity, before)?, [want], "α = {weight}");
        }
        Ok(())
    }

    /// SeCu, case T7.
    #[test]
    fn counts_follow_the_images_that_move() {
        let mut balance = entropy(1., &[6., 3., 1., 0.]);
        balance.follow(&[0, 3, 1], Before::Assigned { ids: &[0, 0, 2], images: 10 });
        assert_eq!(balance.values(), [5., 4., 0., 1.]);
    }

    /// SeCu, case T8.
    #[test]
    fn at_the_published_weight_a_small_cluster_pays() {
        let mut sizes = vec![35_000. / 7.; 10];
        sizes[..3].copy_from_slice(&[6000., 4000., 5000.]);
        let deltas =
            entropy(6000., &sizes).deltas(Before::Assigned { ids: &[0], images: 50_000 }, 0);
        let weighted: Vec<f64> = deltas[..3].iter().map(|delta| 6000. * delta).collect();
        assert_near(&weighted, &[0., -0.048631, -0.021857], 1e-6);
    }

    /// SeCu, case T15.
    #[test]
    fn the_first_batch_of_all_is_not_constrained_by_entropy() -> Result<()> {
        let mut balance = entropy(6000., &[0.; 3]);
        assert_eq!(balance.assign(&[0.1, 0.3, 0.2, 0.9, 0.1, 0.1], Before::Nothing)?, [1, 0]);
        assert_eq!(balance.values(), [1., 1., 0.]);
        // The second is: the cluster without images is worth more than any similarity.
        assert_eq!(balance.assign(&[0.9, 0.9, -0.9], Before::Nothing)?, [2]);
        Ok(())
    }

    #[test]
    fn values_out_of_range_are_refused() {
        assert!(SIZE.check("c").is_ok() && Constraint::Entropy { weight: 0. }.check("c").is_ok());
        for wrong in [
            Constraint::Size { lower_bound: 1.1, rate: 0.1 },
            Constraint::Size { lower_bound: 0.9, rate: -0.1 },
            Constraint::Entropy { weight: f64::NAN },
        ] {
            assert!(wrong.check("c").is_err(), "{wrong:?}");
        }
        let error = Balance::new(SIZE, 2).assign(&[0.1, f32::NAN], Before::Nothing);
        assert!(error.expect_err("a NaN").is::<Diverged>());
    }
}
