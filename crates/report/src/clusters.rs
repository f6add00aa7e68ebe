//! The pictures of each cluster, in order of confidence.

use data::PseudoLabels;

/// A picture in its cluster.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClusterMember {
    /// Its row of `images.safetensors`.
    pub row: u32,
    /// How sure the method is of its cluster, in `[0, 1]`; [`data::pseudo_labels`] says what it means.
    pub confidence: f32,
    /// Confidence × share of neighbours in the same cluster, in `[0, 1]`; the confidence if the method
    /// searches no neighbours.
    pub score: f32,
    /// Whether the experiment would train on its assignment.
    pub reliable: bool,
}

/// A cluster. Its number is arbitrary, and the same in all files of this result.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Its number in the pseudo-labels.
    pub number: usize,
    /// Its pictures, by falling score; equal scores by row.
    pub members: Vec<ClusterMember>,
}

impl Cluster {
    /// Returns all clusters by number; some may be empty.
    pub fn all(labels: &PseudoLabels) -> Vec<Self> {
        let empty = |number| Self { number, members: Vec::new() };
        let mut clusters: Vec<Self> = (0..labels.clusters).map(empty).collect();
        for (place, &row) in labels.index.iter().enumerate() {
            clusters[labels.assignment[place] as usize].members.push(ClusterMember {
                row,
                confidence: labels.confidence[place],
                score: labels.score[place],
                reliable: labels.reliable[place],
            });
        }
        for cluster in &mut clusters {
            cluster.members.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
        }
        clusters
    }

    /// Returns the mean confidence, in `[0, 1]`; 0 for an empty cluster.
    pub fn confidence(&self) -> f64 {
        let sum: f64 = self.members.iter().map(|member| f64::from(member.confidence)).sum();
        sum / self.members.len().max(1) as f64
    }

    /// Returns the pictures to show: the `most` of highest score, and of the others the ones of lowest
    /// score, a third as many, in falling order.
    pub fn shown(&self, most: usize) -> (&[ClusterMember], &[ClusterMember]) {
        let (highest, others) = self.members.split_at(most.min(self.members.len()));
        (highest, &others[others.len().saturating_sub(most.div_ceil(3))..])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tests::labels;

    #[test]
    fn members_are_in_their_cluster_by_falling_score() {
        let clusters = Cluster::all(&labels());
        let rows = |cluster: &Cluster| -> Vec<u32> {
            cluster.members.iter().map(|member| member.row).collect()
        };
        // Rows 1 and 6 have equal scores.
        assert_eq!(
            clusters.iter().map(rows).collect::<Vec<_>>(),
            [vec![5, 1, 6, 0], vec![], vec![3]]
        );
        assert_eq!(clusters.iter().map(|cluster| cluster.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(clusters[0].members[0].confidence, 0.75);
        assert!((clusters[0].confidence() - 0.625).abs() < 1e-9);
        assert_eq!(clusters[1].confidence(), 0.);
    }

    #[test]
    fn no_picture_is_shown_twice() {
        let cluster = &Cluster::all(&labels())[0];
        for (most, surest, least) in [
            (1, vec![5], vec![0]),
            (2, vec![5, 1], vec![0]),
            (3, vec![5, 1, 6], vec![0]),
            (9, vec![5, 1, 6, 0], vec![]),
        ] {
            let (first, last) = cluster.shown(most);
            let rows = |members: &[ClusterMember]| {
                members.iter().map(|member| member.row).collect::<Vec<_>>()
            };
            assert_eq!((rows(first), rows(last)), (surest, least), "{most}");
        }
    }
}
