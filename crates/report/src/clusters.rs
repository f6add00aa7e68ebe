//! The pictures of each cluster, in order of confidence, as the run has them or after corrections by hand.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use data::PseudoLabels;
use data::corrections::{CorrectedClusters, Membership, PictureMark};

/// A picture in its cluster.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClusterMember {
    /// Its row of `images.safetensors`.
    pub row: u32,
    /// Its position in the index of the pseudo-labels.
    pub place: u32,
    /// How sure the method is of its cluster, in `[0, 1]`; [`data::pseudo_labels`] says what it means.
    pub confidence: f32,
    /// Confidence × share of neighbours in the same cluster, in `[0, 1]`; the confidence if the method
    /// searches no neighbours.
    pub score: f32,
    /// Whether the experiment would train on its assignment.
    pub reliable: bool,
}

/// A cluster, or the pictures that were marked by hand and belong to none.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Its number in the pseudo-labels: arbitrary, and the same in all files of this result. Marked pictures
    /// have a number that no cluster has.
    pub number: usize,
    /// The name that a person gave to it.
    pub name: Option<String>,
    /// Why the pictures belong to no cluster, if they were marked.
    pub mark: Option<PictureMark>,
    /// Its pictures, by falling score; equal scores by row.
    pub members: Vec<ClusterMember>,
}

/// The index of a cluster of a picture that belongs to none.
pub const NO_CLUSTER: u32 = u32::MAX;

impl Cluster {
    /// Returns all clusters by number; some may be empty.
    pub fn all(labels: &PseudoLabels) -> Vec<Self> {
        let own = labels.assignment.iter().map(|&own| own as usize);
        Self::of(labels, own, (0..labels.clusters).map(|number| (number, None, None)))
    }

    /// Returns the clusters after corrections, by number, then the marked pictures, if there are any.
    pub fn corrected(labels: &PseudoLabels, corrected: &CorrectedClusters) -> Vec<Self> {
        let marks = [PictureMark::Wrong, PictureMark::Outlier];
        let number = |membership: &Membership| match *membership {
            Membership::Cluster(number) => number as usize,
            Membership::Marked(mark) => labels.clusters + mark as usize,
        };
        let named = corrected.names.iter().enumerate();
        let named = named.map(|(number, name)| (number, name.clone(), None));
        let marked = marks.map(|mark| (labels.clusters + mark as usize, None, Some(mark)));
        let own = corrected.memberships.iter().map(number);
        let mut clusters = Self::of(labels, own, named.chain(marked));
        clusters.retain(|cluster| match cluster.mark {
            Some(_) => !cluster.members.is_empty(),
            None => corrected.shown_as[cluster.number] as usize == cluster.number,
        });
        clusters
    }

    /// The clusters of these numbers, names and marks, with the pictures of each.
    ///
    /// - `own`: the number of each picture's cluster, by place.
    fn of(
        labels: &PseudoLabels,
        own: impl Iterator<Item = usize>,
        clusters: impl Iterator<Item = (usize, Option<String>, Option<PictureMark>)>,
    ) -> Vec<Self> {
        let empty = |(number, name, mark)| Self { number, name, mark, members: Vec::new() };
        let mut clusters: Vec<Self> = clusters.map(empty).collect();
        for (place, own) in own.enumerate() {
            clusters[own].members.push(ClusterMember {
                row: labels.index[place],
                place: place as u32,
                confidence: labels.confidence[place],
                score: labels.score[place],
                reliable: labels.reliable[place],
            });
        }
        clusters.iter_mut().for_each(Self::sort);
        clusters
    }

    /// What the page calls it: `cluster 3`, `cluster 3: Beaches`, `marked as wrong`.
    pub fn title(&self) -> String {
        match (self.mark, &self.name) {
            (Some(mark), _) => format!("marked as {}", mark.word()),
            (None, Some(name)) => format!("cluster {}: {name}", self.number),
            (None, None) => format!("cluster {}", self.number),
        }
    }

    /// Moves the pictures of the clusters of each group into the first one, and drops the others. The
    /// numbers of all that stay are those before.
    ///
    /// # Errors
    ///
    /// There is no cluster of a number, or it is in two groups.
    pub fn merged(mut clusters: Vec<Self>, groups: &[MergedNumbers]) -> Result<Vec<Self>> {
        let mut gone = Vec::new();
        for group in groups {
            let place = |clusters: &[Self], number: usize| {
                let is_it = |cluster: &Self| cluster.number == number && cluster.mark.is_none();
                let found = clusters.iter().position(is_it);
                found.filter(|_| !gone.contains(&number)).with_context(|| {
                    format!(
                        "--merge {group}: there is no cluster {number}, or it was merged into another \
                         one; name each cluster of the page once"
                    )
                })
            };
            let places = group.0.iter().map(|&number| place(&clusters, number));
            let places = places.collect::<Result<Vec<usize>>>()?;
            for &place in &places[1..] {
                let members = std::mem::take(&mut clusters[place].members);
                clusters[places[0]].members.extend(members);
            }
            clusters[places[0]].sort();
            gone.extend(&group.0[1..]);
        }
        clusters.retain(|cluster| !gone.contains(&cluster.number));
        Ok(clusters)
    }

    /// Returns the index of each picture's cluster or mark, by place, of `count` pictures.
    pub fn of_places(clusters: &[Self], count: usize) -> Vec<u32> {
        let mut found = vec![NO_CLUSTER; count];
        for (k, cluster) in clusters.iter().enumerate() {
            cluster.members.iter().for_each(|member| found[member.place as usize] = k as u32);
        }
        found
    }

    fn sort(&mut self) {
        self.members.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
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

/// Numbers of clusters to show as one, under the first of them: `3,7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedNumbers(Vec<usize>);

impl MergedNumbers {
    /// What the page says about it.
    pub fn fact(&self) -> String {
        let numbers = self.to_string().replace(',', ", ");
        format!(
            "Clusters {numbers} are shown as cluster {}; the scores are those of the clusters before.",
            self.0[0]
        )
    }
}

impl FromStr for MergedNumbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<usize>> =
            text.split(',').map(|number| number.trim().parse().ok()).collect();
        let numbers = numbers.filter(|numbers| {
            let repeats = |i: usize| numbers[..i].contains(&numbers[i]);
            numbers.len() > 1 && !(0..numbers.len()).any(repeats)
        });
        numbers.map(Self).ok_or_else(|| "give two or more different numbers, as in 3,7".to_owned())
    }
}

impl fmt::Display for MergedNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&numbers.join(","))
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
    fn corrected_clusters_have_names_and_marked_pictures_come_last() -> Result<()> {
        let cluster = Membership::Cluster;
        let corrected = CorrectedClusters {
            memberships: vec![
                cluster(2),
                Membership::Marked(PictureMark::Outlier),
                cluster(2),
                cluster(0),
                cluster(2),
            ],
            shown_as: vec![0, 0, 2],
            names: vec![None, None, Some("Beaches".into())],
            moved: 2,
            not_applied: vec![],
        };
        let clusters = Cluster::corrected(&labels(), &corrected);
        let found: Vec<_> = clusters
            .iter()
            .map(|cluster| {
                (cluster.title(), cluster.members.iter().map(|member| member.row).collect())
            })
            .collect();
        let want: [(&str, Vec<u32>); 3] = [
            ("cluster 0", vec![5]),
            ("cluster 2: Beaches", vec![3, 6, 0]),
            ("marked as outlier", vec![1]),
        ];
        assert_eq!(found, want.map(|(title, rows)| (title.to_owned(), rows)));
        assert_eq!(Cluster::of_places(&clusters, 5), [1, 2, 1, 0, 1]);
        let numbers = |clusters: &[Cluster]| clusters.iter().map(|c| c.number).collect::<Vec<_>>();
        assert_eq!(numbers(&clusters), [0, 2, 4]);
        // What was marked is not a cluster to merge.
        let merge =
            |text: &str| Cluster::merged(clusters.clone(), &[text.parse().expect("numbers")]);
        assert!(merge("0,4").is_err() && merge("0,1").is_err());
        assert_eq!(numbers(&merge("2,0")?), [2, 4]);
        Ok(())
    }

    #[test]
    fn merged_clusters_keep_the_first_number_and_the_order() -> Result<()> {
        let merged = |groups: &[&str]| {
            let groups: Vec<MergedNumbers> = groups.iter().map(|g| g.parse().expect(g)).collect();
            Cluster::merged(Cluster::all(&labels()), &groups)
        };
        let found = merged(&["2,0"])?;
        assert_eq!(found.iter().map(|cluster| cluster.number).collect::<Vec<_>>(), [1, 2]);
        let rows: Vec<u32> = found[1].members.iter().map(|member| member.row).collect();
        assert_eq!(rows, [3, 5, 1, 6, 0], "by falling score");
        assert_eq!(merged(&["0,1,2"])?.len(), 1);
        for groups in [&["0,3"][..], &["0,1", "1,2"], &["0,1", "2,1"]] {
            let error = merged(groups).expect_err("refused").to_string();
            assert!(error.contains("--merge"), "{error}");
        }
        assert_eq!(merged(&["0,1", "0,2"])?.len(), 1, "what was merged can grow");
        for text in ["3", "3,3", "", "a,b", "1,-2"] {
            assert!(text.parse::<MergedNumbers>().is_err(), "{text}");
        }
        Ok(())
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
