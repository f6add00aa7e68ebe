//! The result of a head: which assignments to trust, and `pseudo-labels.safetensors`.

use anyhow::Result;
use assignment::{optimal_map, prototypes, share_of_agreeing_neighbours};
use data::PseudoLabels;
use stage::{Diverged, Job};

use crate::rows::{FrozenEmbeddings, unit_rows};

/// What a head found for `N` pictures; one numbering of the clusters holds for all of it.
#[derive(Debug, Clone)]
pub struct HeadResult {
    /// Cluster of each picture, `(N,)`.
    pub assignment: Vec<u32>,
    /// Cluster of each picture by k-means, in any numbering, `(N,)`.
    pub kmeans_assignment: Vec<u32>,
    /// How sure the head is, `(N,)` in `[0, 1]`.
    pub confidence: Vec<f32>,
    /// Whether the head trusts its assignment, `(N,)`.
    pub trusted: Vec<bool>,
    /// Nearest neighbours of each picture, `(N, m)`; `m` may be 0.
    pub neighbours: Vec<u32>,
    /// Least share of the neighbours in the same cluster of a reliable picture.
    pub agreeing_neighbours: f64,
}

impl HeadResult {
    /// The map from this result's clusters to those of the last round, or of the run before; the
    /// identity where there is neither.
    ///
    /// # Errors
    ///
    /// A cluster is not below `clusters`.
    pub fn numbering(
        assignment: &[u32],
        embeddings: &FrozenEmbeddings,
        clusters: usize,
    ) -> Result<Vec<u32>> {
        match (&embeddings.previous, &embeddings.earlier) {
            (Some(previous), _) => optimal_map(assignment, previous, clusters),
            (None, Some(earlier)) => earlier.numbering(assignment, clusters),
            (None, None) => Ok((0..clusters as u32).collect()),
        }
    }

    /// The pseudo-labels. A picture is reliable if the head trusts its assignment and enough of its
    /// neighbours are in the same cluster. The score is the confidence times the share of such
    /// neighbours. k-means' clusters are numbered after the head's.
    ///
    /// # Errors
    ///
    /// All pictures are in one cluster of several ([`Diverged`]), or lengths contradict each other.
    pub fn pseudo_labels(self, embeddings: FrozenEmbeddings, job: &Job) -> Result<PseudoLabels> {
        let clusters = job.data.clusters;
        if clusters > 1 && self.assignment.windows(2).all(|pair| pair[0] == pair[1]) {
            let message = format!(
                "all images fell into one cluster; look at the values of `[{}]` that keep clusters in \
                 use, or take a better backbone",
                job.name
            );
            return Err(Diverged(message).into());
        }
        let agreeing = share_of_agreeing_neighbours(&self.assignment, &self.neighbours);
        let score: Vec<f32> = self.confidence.iter().zip(&agreeing).map(|(c, a)| c * a).collect();
        let least = self.agreeing_neighbours as f32;
        let reliable: Vec<bool> = self
            .trusted
            .iter()
            .zip(&agreeing)
            .map(|(&sure, &share)| sure && share >= least)
            .collect();
        let weights: Vec<f32> =
            score.iter().zip(&reliable).map(|(&s, &sure)| if sure { s } else { 0. }).collect();
        let map = optimal_map(&self.kmeans_assignment, &self.assignment, clusters)?;
        let stability = embeddings.previous.as_ref().map(|previous| {
            let same = previous.iter().zip(&self.assignment).filter(|(a, b)| a == b).count();
            same as f64 / previous.len() as f64
        });
        if let Some(earlier) = &embeddings.earlier {
            let (shared, kept) = earlier.kept(&self.assignment);
            tracing::info!(
                "{kept} of the {shared} pictures that the last run clustered have the same cluster number"
            );
        }
        let width = embeddings.projection_width;
        let unit = unit_rows(&embeddings.projections, width);
        Ok(PseudoLabels {
            data_set: embeddings.data_set,
            clusters,
            index: embeddings.index,
            prototypes: prototypes(&unit, width, &self.assignment, &weights, clusters)?,
            kmeans_assignment: self.kmeans_assignment.iter().map(|&k| map[k as usize]).collect(),
            assignment: self.assignment,
            confidence: self.confidence,
            score,
            reliable,
            projection_width: width,
            stability,
            head_agreement: None,
        })
    }
}

/// Number of pictures in each cluster.
pub fn cluster_sizes(assignment: &[u32], clusters: usize) -> Vec<usize> {
    let mut sizes = vec![0; clusters];
    assignment.iter().for_each(|&cluster| sizes[cluster as usize] += 1);
    sizes
}

#[cfg(test)]
mod tests {
    use data::DataSet;
    use stage::DataTable;

    use super::*;
    use crate::numbers::EarlierClusters;

    fn embeddings(previous: Option<Vec<u32>>) -> FrozenEmbeddings {
        FrozenEmbeddings {
            data_set: DataSet { path: "f".into(), images: 4, fingerprint: "f".into() },
            index: (0..4).collect(),
            width: 1,
            rows: vec![1., 2., 3., 4.].into(),
            projection_width: 2,
            projections: vec![3., 4., 1., 0., 0., 2., 0., 1.].into(),
            previous,
            earlier: None,
        }
    }

    fn result() -> HeadResult {
        HeadResult {
            assignment: vec![0, 0, 1, 1],
            kmeans_assignment: vec![1, 1, 0, 1],
            confidence: vec![0.9, 0.8, 0.6, 1.],
            trusted: vec![true, true, true, false],
            neighbours: vec![1, 2, 0, 3, 3, 2, 2, 3],
            agreeing_neighbours: 0.5,
        }
    }

    fn job() -> Job {
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
        Job::new("temi", "i.safetensors", "o", data)
    }

    #[test]
    fn reliable_is_trusted_with_agreeing_neighbours() -> Result<()> {
        let found = result().pseudo_labels(embeddings(None), &job())?;
        assert_eq!(found.reliable, [true, true, true, false]);
        assert_eq!(found.score, [0.45, 0.4, 0.6, 1.]);
        assert_eq!(found.kmeans_assignment, [0, 0, 1, 0], "numbered after the head");
        assert_eq!(found.prototypes[2..], [0., 1.], "the last picture does not count");
        assert_eq!(found.stability, None);
        let stricter = HeadResult { agreeing_neighbours: 0.6, ..result() };
        let found = stricter.pseudo_labels(embeddings(None), &job())?;
        assert_eq!(found.reliable, [false, false, true, false]);
        Ok(())
    }

    #[test]
    fn the_last_round_numbers_the_clusters() -> Result<()> {
        let embeddings = embeddings(Some(vec![1, 1, 0, 1]));
        assert_eq!(HeadResult::numbering(&[0, 0, 1, 1], &embeddings, 2)?, [1, 0]);
        let found = result().pseudo_labels(embeddings, &job())?;
        assert_eq!(found.stability, Some(0.25));
        Ok(())
    }

    #[test]
    fn the_run_before_numbers_the_clusters_of_a_first_round() -> Result<()> {
        let of_picture = vec![Some(1), None, Some(0), None];
        let earlier = Some(EarlierClusters { clusters: 2, of_picture });
        let alone = FrozenEmbeddings { earlier: earlier.clone(), ..embeddings(None) };
        assert_eq!(HeadResult::numbering(&[0, 0, 1, 1], &alone, 2)?, [1, 0]);
        let last_round = vec![0, 0, 1, 1];
        let both = FrozenEmbeddings { earlier, ..embeddings(Some(last_round)) };
        assert_eq!(HeadResult::numbering(&[0, 0, 1, 1], &both, 2)?, [0, 1]);
        assert_eq!(HeadResult::numbering(&[1, 0, 1, 1], &embeddings(None), 2)?, [0, 1]);
        Ok(())
    }

    #[test]
    fn one_cluster_is_a_collapse() {
        let one = HeadResult { assignment: vec![1; 4], ..result() };
        let error = one.pseudo_labels(embeddings(None), &job()).expect_err("a collapse");
        assert!(error.is::<Diverged>() && error.to_string().contains("[temi]"), "{error}");
        assert_eq!(cluster_sizes(&[1, 1, 0, 3], 4), [1, 2, 0, 1]);
    }
}
