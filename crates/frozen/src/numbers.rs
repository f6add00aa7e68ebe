//! Numbers of clusters that last: a later run gives a cluster the number that it had before.
//!
//! A run on more pictures, or with other values, finds nearly the same clusters under arbitrary numbers.
//! So each run keeps which picture was in which cluster, in `numbers.safetensors`, kind
//! `cluster-numbers`, format version 1:
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `id` | `(M, 32)` u8 | the pictures, by the SHA-256 of their files |
//! | `cluster` | `(M,)` u32 | the cluster of each |
//!
//! Header: `clusters`, K. The next run reads it from the role `earlier`. The clusters themselves do not
//! depend on it, and their numbers have no meaning, so it is no part of a step's key.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, ensure};
use assignment::contingency;
use data::images::Id;
use data::{Images, PseudoLabels};
use stage::Job;
use stage::container::{self, Container, Header, Tensor};

const FILE: &str = "numbers.safetensors";
const KIND: &str = "cluster-numbers";
const VERSION: u64 = 1;

/// The clusters of an earlier run, for the `N` pictures of this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlierClusters {
    /// How many there were.
    pub clusters: usize,
    /// The cluster that each picture was in; `None` for a picture that is new, `(N,)`.
    pub of_picture: Vec<Option<u32>>,
}

impl EarlierClusters {
    /// What the role `earlier` says of the pictures in these rows; `None` where there is no earlier
    /// run, or where other steps learn from the clusters and would see their numbers. A damaged file is
    /// reported and not used.
    pub fn of_job(job: &Job, images: &Images, rows: &[u32]) -> Option<Self> {
        let path = job.optional_input("earlier")?.join(FILE);
        if job.rounds > 0 || !path.exists() {
            return None;
        }
        match Self::read(&path, images, rows) {
            Ok(found) => Some(found).filter(|found| found.of_picture.iter().any(Option::is_some)),
            Err(error) => {
                tracing::warn!("clusters get new numbers: {error:#}");
                None
            }
        }
    }

    fn read(path: &Path, images: &Images, rows: &[u32]) -> Result<Self> {
        let file = Container::open(path, KIND, VERSION)?;
        let clusters = usize::try_from(file.header_number("clusters")?)?;
        let (ids, numbers) = (file.u8("id")?, file.u32("cluster")?);
        let (ids, rest) = ids.as_chunks::<{ size_of::<Id>() }>();
        ensure!(
            ids.len() == numbers.len()
                && rest.is_empty()
                && numbers.iter().all(|&number| (number as usize) < clusters),
            "`{}` contradicts itself",
            path.display()
        );
        let known: HashMap<&Id, u32> = ids.iter().zip(numbers).collect();
        let of_picture = rows.iter().map(|&row| Ok(known.get(&images.id(row)?).copied()));
        Ok(Self { clusters, of_picture: of_picture.collect::<Result<_>>()? })
    }

    /// The map from the clusters of `assignment` `(N,)` to the numbers `0..clusters`.
    ///
    /// A cluster takes the number of the earlier cluster with which it shares most pictures: of all
    /// one-to-one maps the one that covers most (Hungarian algorithm). A cluster that shares none takes
    /// the next number that no earlier cluster had, or, if there is none, a free one. A number from
    /// `clusters` on, which only a larger earlier result has, is lost.
    ///
    /// # Errors
    ///
    /// The lengths differ, or a cluster is not below `clusters`.
    pub fn numbering(&self, assignment: &[u32], clusters: usize) -> Result<Vec<u32>> {
        ensure!(
            assignment.len() == self.of_picture.len()
                && assignment.iter().all(|&cluster| (cluster as usize) < clusters),
            "{} assignments to {clusters} clusters for {} pictures",
            assignment.len(),
            self.of_picture.len()
        );
        let kept = self.clusters.min(clusters);
        let shared = assignment.iter().zip(&self.of_picture);
        let shared = shared.filter_map(|(&new, old)| Some((new, (*old)?)));
        let (new, old): (Vec<u32>, Vec<u32>) =
            shared.filter(|&(_, old)| (old as usize) < kept).unzip();
        let table = contingency(&new, &old, clusters, kept)?;
        let map = table.best_map().into_iter().enumerate();
        let map: Vec<Option<u32>> =
            map.map(|(row, old)| old.filter(|&old| table.at(row, old as usize) > 0)).collect();
        let is_free = |number: &u32| !map.contains(&Some(*number));
        let mut free =
            (self.clusters as u32..clusters as u32).chain((0..kept as u32).filter(is_free));
        Ok(map.iter().map(|old| old.or_else(|| free.next()).unwrap_or(0)).collect())
    }

    /// How many pictures were there before, and how many of those have the same number in `assignment`.
    pub fn kept(&self, assignment: &[u32]) -> (usize, usize) {
        let shared = || self.of_picture.iter().zip(assignment).filter(|(old, _)| old.is_some());
        (shared().count(), shared().filter(|(old, new)| **old == Some(**new)).count())
    }
}

/// Saves the clusters for the next run.
///
/// # Errors
///
/// The pictures cannot be read, or the file cannot be written.
pub fn save(labels: &PseudoLabels, job: &Job) -> Result<()> {
    let images = Images::open(&job.images)?;
    let ids = labels.index.iter().map(|&row| images.id(row)).collect::<Result<Vec<_>>>()?;
    let count = ids.len();
    let tensors = [
        Tensor::u8("id", &[count, size_of::<Id>()], ids.as_flattened()),
        Tensor::u32("cluster", &[count], &labels.assignment),
    ];
    let header = Header::from([("clusters".into(), labels.clusters.into())]);
    container::write(&job.out.join(FILE), KIND, VERSION, header, &tensors)
}

#[cfg(test)]
mod tests {
    use data::images::{self, StoredPicture};
    use data::{DataSet, Picture};
    use stage::{DataTable, Split};

    use super::*;

    fn earlier(clusters: usize, of_picture: &[Option<u32>]) -> EarlierClusters {
        EarlierClusters { clusters, of_picture: of_picture.to_vec() }
    }

    #[test]
    fn a_cluster_takes_the_number_of_the_earlier_one_with_most_shared_pictures() -> Result<()> {
        let old = earlier(3, &[Some(2), Some(2), Some(0), Some(0), Some(1), None, None]);
        let new = [0, 0, 1, 1, 2, 2, 0];
        assert_eq!(old.numbering(&new, 3)?, [2, 0, 1]);
        assert_eq!(old.kept(&[2, 2, 0, 0, 0, 1, 2]), (5, 4));
        // The map that covers most is not the greedy one: 5 + 0 against 4 + 4.
        let pairs = [(0, 0, 5), (0, 1, 4), (1, 0, 4)];
        let (mut new, mut before) = (Vec::new(), Vec::new());
        for (cluster, old, count) in pairs {
            new.extend(vec![cluster; count]);
            before.extend(vec![Some(old); count]);
        }
        assert_eq!(earlier(2, &before).numbering(&new, 2)?, [1, 0]);
        Ok(())
    }

    #[test]
    fn new_clusters_take_new_numbers_and_fewer_clusters_the_first() -> Result<()> {
        // Cluster 0 has only new pictures.
        let old = earlier(2, &[Some(0), Some(1), None, None]);
        assert_eq!(old.numbering(&[1, 3, 0, 2], 4)?, [2, 0, 3, 1]);
        assert_eq!(old.numbering(&[1, 2, 0, 0], 3)?, [2, 0, 1]);
        // The earlier cluster 1 is gone, and there is no new number.
        assert_eq!(earlier(2, &[Some(0), None]).numbering(&[1, 0], 2)?, [1, 0]);
        // The earlier cluster 2 keeps its pictures together, but 2 is no number any more.
        let old = earlier(3, &[Some(2), Some(2), Some(1), Some(1), Some(0)]);
        assert_eq!(old.numbering(&[1, 1, 0, 0, 0], 2)?, [1, 0]);
        assert!(old.numbering(&[0; 3], 2).is_err());
        assert!(old.numbering(&[3; 5], 2).is_err());
        Ok(())
    }

    /// A job on these grey pictures of one pixel.
    fn job(folder: &Path, values: &[u8]) -> Result<Job> {
        let path = folder.join(format!("{}.safetensors", values.len()));
        let picture = |&value: &u8| {
            Ok((StoredPicture::raw(Picture::new(1, 1, 1, vec![value])?, 1)?, Split::Train))
        };
        images::write(&path, 1, values.iter().map(picture).collect::<Result<_>>()?)?;
        let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![Split::Train] };
        Ok(Job::new("temi", path, folder.to_owned(), data))
    }

    fn labels(data_set: &DataSet, assignment: Vec<u32>) -> PseudoLabels {
        let n = assignment.len();
        PseudoLabels {
            data_set: data_set.clone(),
            clusters: 2,
            index: (0..n as u32).collect(),
            kmeans_assignment: assignment.clone(),
            assignment,
            confidence: vec![1.; n],
            score: vec![1.; n],
            reliable: vec![true; n],
            stability: None,
            head_agreement: None,
            projection_width: 1,
            prototypes: vec![0.; 2],
        }
    }

    #[test]
    fn pictures_are_found_again_by_their_content_and_not_by_their_row() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let before = job(folder.path(), &[10, 20, 30])?;
        let images = Images::open(&before.images)?;
        let value = |images: &Images, row: u32| images.picture(row).map(|p| p.pixels[0]);
        let cluster = |row| Ok(u32::from(value(&images, row)? > 15));
        let assignment = (0..3).map(cluster).collect::<Result<Vec<u32>>>()?;
        save(&labels(images.data_set(), assignment), &before)?;

        let mut after = job(folder.path(), &[40, 30, 20, 10, 50])?;
        let images = Images::open(&after.images)?;
        let rows: Vec<u32> = (0..5).collect();
        assert_eq!(EarlierClusters::of_job(&after, &images, &rows), None, "none is given");
        after.inputs.insert("earlier".into(), folder.path().to_owned());
        let found = EarlierClusters::of_job(&after, &images, &rows).expect("given");
        for row in rows.clone() {
            let want = match value(&images, row)? {
                10 => Some(0),
                20 | 30 => Some(1),
                _ => None,
            };
            assert_eq!(found.of_picture[row as usize], want);
        }
        // Where rounds follow, other steps learn from the numbers.
        let with_rounds = Job { rounds: 2, ..after.clone() };
        assert_eq!(EarlierClusters::of_job(&with_rounds, &images, &rows), None);
        // Other pictures, and a damaged file.
        let other = job(folder.path(), &[70, 80])?;
        let other = Job { inputs: after.inputs.clone(), ..other };
        let images_of_other = Images::open(&other.images)?;
        assert_eq!(EarlierClusters::of_job(&other, &images_of_other, &[0, 1]), None);
        std::fs::write(folder.path().join(FILE), "damaged")?;
        assert_eq!(EarlierClusters::of_job(&after, &images, &rows), None);
        Ok(())
    }
}
