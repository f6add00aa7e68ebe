//! `pseudo-labels.safetensors`: the result of clustering, and the training target of refinement.
//!
//! Kind `pseudo-labels`, format version 1. `M` pictures, `K` clusters, projections of width `P`.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `index` | `(M,)` u32 | the pictures, as ascending rows of `images.safetensors` |
//! | `assignment` | `(M,)` u32 | cluster of each, by the clustering network |
//! | `kmeans-assignment` | `(M,)` u32 | cluster of each, by k-means on the same embeddings |
//! | `confidence` | `(M,)` f32 | how sure the method is of its cluster, in `[0, 1]`, see below |
//! | `score` | `(M,)` f32 | confidence × share of neighbours in the same cluster, in `[0, 1]` |
//! | `reliable` | `(M,)` u8 | 1 if the assignment may be trained on |
//! | `prototypes` | `(K, P)` f32 | centre of each cluster among the projections |
//! | `head-agreement` | `(M,)` f32 | share of the clustering networks that put the picture there, in `[0, 1]`; absent where none was trained |
//!
//! `confidence` has the unit of its method; `predict` computes it in the same way:
//!
//! - clustering network, IMC-SwAV: the probability of the cluster, a softmax of the output.
//! - SeCu: the softmax of `cos / temperature` over the centres, at the temperature of training.
//! - ProPos, clustering without a network: the softmax of `cos / 0.1` over the centres; with
//!   Euclidean k-means of `−d² / T` instead, where `T` is 0.2 times the variance of the projections.
//! - ICBPL: `(1 + cos) / 2` of the nearest centre.
//!
//! So confidences order the pictures of one result, and compare results of one method. Only the
//! first is trained to be a probability; `metrics.json` measures its agreement with the truth.
//!
//! Header: `images` and `fingerprint` of the whole data set, see [`DataSet`]; `clusters`, K; and, where it
//! was measured, `stability`, the share of pictures whose cluster by a freshly started network is
//! the last round's.

use std::path::Path;

use anyhow::{Result, ensure};
use stage::container::{self, Container, Tensor};
use stage::{Diverged, Job};

use crate::Images;
use crate::data_set::{DataSet, check_index, check_length};

const KIND: &str = "pseudo-labels";
const VERSION: u64 = 1;

/// The clusters of `M` pictures, with confidences and prototypes.
#[derive(Debug, Clone)]
pub struct PseudoLabels {
    /// The data set that the pictures belong to.
    pub data_set: DataSet,
    /// Number of clusters, `K`.
    pub clusters: usize,
    /// The pictures, as ascending rows of `images.safetensors`, `M`.
    pub index: Vec<u32>,
    /// Cluster of each picture by the clustering network, `M`.
    pub assignment: Vec<u32>,
    /// Cluster of each picture by k-means, `M`.
    pub kmeans_assignment: Vec<u32>,
    /// How sure the method is of each assignment, `M`, in `[0, 1]`; see the [module](self).
    pub confidence: Vec<f32>,
    /// Confidence × share of neighbours in the same cluster, `M`, in `[0, 1]`.
    pub score: Vec<f32>,
    /// Whether the assignment may be trained on, `M`.
    pub reliable: Vec<bool>,
    /// Share of pictures that a freshly started clustering network puts where the last round had
    /// them, in `[0, 1]`; `None` in the first round.
    pub stability: Option<f64>,
    /// Share of the clustering networks that put each picture where the one that was kept does, `M`, in
    /// `[0, 1]`; `None` if no network was trained.
    pub head_agreement: Option<Vec<f32>>,
    /// Width of a projection, `P`.
    pub projection_width: usize,
    /// Centre of each cluster among the projections, `(K, P)`.
    pub prototypes: Vec<f32>,
}

/// The result of a system that trains and clusters in one stage, for the `M` pictures that are scored,
/// in the order of their rows.
#[derive(Debug, Clone)]
pub struct Found {
    /// Cluster of each picture by the method, `M`.
    pub assignment: Vec<u32>,
    /// Cluster of each picture by k-means on its projections, `M`.
    pub kmeans_assignment: Vec<u32>,
    /// How sure the method is of each assignment, `M`, in `[0, 1]`.
    pub confidence: Vec<f32>,
    /// Width of a projection, `P`.
    pub projection_width: usize,
    /// Centre of each cluster among the projections, `(K, P)`.
    pub prototypes: Vec<f32>,
}

impl PseudoLabels {
    /// Name of the file in a stage's output folder.
    pub const FILE: &str = "pseudo-labels.safetensors";

    /// The pseudo-labels of a system of one phase. No stage trains on them, so every picture counts as
    /// reliable. The score is the confidence, because no neighbours are looked up.
    ///
    /// # Errors
    ///
    /// All pictures are in one cluster: [`Diverged`].
    pub fn of_one_phase(job: &Job, images: &Images, found: Found) -> Result<Self> {
        if found.assignment.windows(2).all(|pair| pair[0] == pair[1]) {
            let message = "all images fell into one cluster; a lower learning rate or more epochs \
                           are the usual cures";
            return Err(Diverged(message.into()).into());
        }
        let index = images.rows(&job.data.score_on);
        Ok(Self {
            data_set: images.data_set().clone(),
            clusters: job.data.clusters,
            reliable: vec![true; index.len()],
            index,
            assignment: found.assignment,
            kmeans_assignment: found.kmeans_assignment,
            score: found.confidence.clone(),
            confidence: found.confidence,
            stability: None,
            head_agreement: None,
            projection_width: found.projection_width,
            prototypes: found.prototypes,
        })
    }

    /// Writes the file.
    ///
    /// # Errors
    ///
    /// A length contradicts another, a cluster is out of range, a number is not finite, or the
    /// file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check(path)?;
        let m = [self.index.len()];
        let reliable: Vec<u8> = self.reliable.iter().map(|&reliable| reliable.into()).collect();
        let mut tensors = vec![
            Tensor::u32("index", &m, &self.index),
            Tensor::u32("assignment", &m, &self.assignment),
            Tensor::u32("kmeans-assignment", &m, &self.kmeans_assignment),
            Tensor::f32("confidence", &m, &self.confidence),
            Tensor::f32("score", &m, &self.score),
            Tensor::u8("reliable", &m, &reliable),
            Tensor::f32("prototypes", &[self.clusters, self.projection_width], &self.prototypes),
        ];
        let agreement = self.head_agreement.as_ref();
        tensors.extend(agreement.map(|share| Tensor::f32("head-agreement", &m, share)));
        let mut header = self.data_set.header();
        header.insert("clusters".into(), self.clusters.into());
        if let Some(stability) = self.stability {
            header.insert("stability".into(), stability.into());
        }
        container::write(path, KIND, VERSION, header, &tensors)
    }

    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// It is missing, foreign, damaged, or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Container::open(path, KIND, VERSION)?;
        let read = Self {
            data_set: DataSet::of(&file)?,
            clusters: usize::try_from(file.header_number("clusters")?)?,
            index: file.u32("index")?,
            assignment: file.u32("assignment")?,
            kmeans_assignment: file.u32("kmeans-assignment")?,
            confidence: file.f32("confidence")?,
            score: file.f32("score")?,
            reliable: file.u8("reliable")?.iter().map(|&reliable| reliable != 0).collect(),
            head_agreement: file
                .names()
                .any(|name| name == "head-agreement")
                .then(|| file.f32("head-agreement"))
                .transpose()?,
            stability: file.header("stability").ok().and_then(serde_json::Value::as_f64),
            projection_width: file.shape("prototypes")?.last().copied().unwrap_or(0),
            prototypes: file.f32("prototypes")?,
        };
        read.check(path)?;
        Ok(read)
    }

    /// The clusters in the folder that a job has as `pseudo-labels`: of these images, all that are scored,
    /// in as many clusters as the experiment asks for.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of other images or clusters; the message says what to do.
    pub fn of_job(job: &Job, images: &Images) -> Result<Self> {
        let found = Self::open(&job.input("pseudo-labels")?.join(Self::FILE))?;
        found.data_set.require(images.data_set(), "cluster again from these images")?;
        found.require_clusters(job.data.clusters)?;
        let scored = images.rows(&job.data.score_on);
        ensure!(
            found.index == scored,
            "`{}` has {} assignments but {} images are to be scored; cluster again",
            found.data_set.path.display(),
            found.index.len(),
            scored.len()
        );
        Ok(found)
    }

    /// Fails unless there are `clusters` clusters, the number that the experiment asks for.
    ///
    /// # Errors
    ///
    /// The number differs; the message names the file and what to do.
    pub fn require_clusters(&self, clusters: usize) -> Result<()> {
        ensure!(
            self.clusters == clusters,
            "`{}` has {} clusters but the experiment asks for {clusters}; cluster again with \
             `clusters = {clusters}` in table `[data]`",
            self.data_set.path.display(),
            self.clusters
        );
        Ok(())
    }

    fn check(&self, path: &Path) -> Result<()> {
        let m = self.index.len();
        check_index(path, &self.index, self.data_set.images)?;
        for (name, length) in [
            ("assignment", self.assignment.len()),
            ("kmeans-assignment", self.kmeans_assignment.len()),
            ("confidence", self.confidence.len()),
            ("score", self.score.len()),
            ("reliable", self.reliable.len()),
            ("head-agreement", self.head_agreement.as_ref().map_or(m, Vec::len)),
        ] {
            check_length(path, name, length, m)?;
        }
        let prototypes = self.clusters * self.projection_width;
        check_length(path, "prototypes", self.prototypes.len(), prototypes)?;
        for (name, clusters) in
            [("assignment", &self.assignment), ("kmeans-assignment", &self.kmeans_assignment)]
        {
            if let Some(cluster) = clusters.iter().find(|&&c| c as usize >= self.clusters) {
                anyhow::bail!(
                    "tensor `{name}` of `{}` names cluster {cluster}, but there are {}; cluster \
                     again",
                    path.display(),
                    self.clusters
                );
            }
        }
        if let Some(stability) = self.stability {
            ensure!(
                (0. ..=1.).contains(&stability),
                "header field `stability` of `{}` is {stability}, outside [0, 1]; cluster again",
                path.display()
            );
        }
        let shares = self.head_agreement.as_ref();
        let values = [("confidence", &self.confidence), ("score", &self.score)];
        for (name, values) in values.into_iter().chain(shares.map(|of| ("head-agreement", of))) {
            if let Some(value) = values.iter().find(|value| !(0. ..=1.00001).contains(*value)) {
                anyhow::bail!(
                    "tensor `{name}` of `{}` has the value {value}, outside [0, 1]; cluster again",
                    path.display()
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use stage::Split;

    use super::*;
    use crate::Picture;
    use crate::images::{StoredPicture, write};

    fn example(path: &Path) -> PseudoLabels {
        PseudoLabels {
            data_set: DataSet { path: path.to_owned(), images: 4, fingerprint: "f".into() },
            clusters: 2,
            index: vec![0, 1, 3],
            assignment: vec![1, 0, 1],
            kmeans_assignment: vec![0, 0, 1],
            confidence: vec![1., 0.5, 0.25],
            score: vec![0.5, 0.5, 0.],
            reliable: vec![true, true, false],
            stability: Some(0.75),
            head_agreement: Some(vec![1., 0.5, 0.75]),
            projection_width: 3,
            prototypes: vec![1., 0., 0., 0., 0., -1.],
        }
    }

    #[test]
    fn pseudo_labels_are_read_as_written() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pseudo-labels.safetensors");
        let mut written = example(&path);
        written.write(&path).expect("written");
        let read = PseudoLabels::open(&path).expect("sound");
        assert_eq!(read.stability, Some(0.75));
        assert_eq!(read.head_agreement, written.head_agreement);
        (written.stability, written.head_agreement) = (None, None);
        written.write(&path).expect("written");
        let without = PseudoLabels::open(&path).expect("sound");
        assert_eq!((without.stability, without.head_agreement), (None, None));
        assert_eq!(read.clusters, 2);
        assert_eq!(read.index, written.index);
        assert_eq!(read.assignment, written.assignment);
        assert_eq!(read.kmeans_assignment, written.kmeans_assignment);
        assert_eq!(read.confidence, written.confidence);
        assert_eq!(read.score, written.score);
        assert_eq!(read.reliable, written.reliable);
        assert_eq!(read.projection_width, 3);
        assert_eq!(read.prototypes, written.prototypes);

        read.require_clusters(2).expect("two");
        let error = read.require_clusters(3).expect_err("two").to_string();
        assert!(error.contains("2 clusters") && error.contains("pseudo-labels"), "{error}");
    }

    #[test]
    fn a_system_of_one_phase_labels_only_the_scored_pictures() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let images = folder.path().join("images.safetensors");
        let source = |number: u8| {
            let picture = Picture::new(2, 3, 1, (0..6).map(|i| i * number).collect())?;
            let split = if number.is_multiple_of(2) { Split::Train } else { Split::Test };
            Ok((StoredPicture::raw(picture, 1)?, split))
        };
        write(&images, 1, (0..6).map(source).collect::<Result<_>>()?)?;
        let images = Images::open(&images)?;
        let data = stage::DataTable { clusters: 2, train_on: vec![], score_on: vec![Split::Test] };
        let job = Job::new("example", "i", folder.path(), data);
        let found = Found {
            assignment: vec![0, 1, 1],
            kmeans_assignment: vec![1, 1, 0],
            confidence: vec![0.5, 1., 0.75],
            projection_width: 1,
            prototypes: vec![1., -1.],
        };
        let labels = PseudoLabels::of_one_phase(&job, &images, found.clone())?;
        let path = folder.path().join(PseudoLabels::FILE);
        labels.write(&path)?;
        let read = PseudoLabels::open(&path)?;
        assert_eq!(read.index, images.rows(&[Split::Test]));
        assert_eq!((read.assignment, read.kmeans_assignment), (vec![0, 1, 1], vec![1, 1, 0]));
        assert_eq!((read.score, read.reliable), (vec![0.5, 1., 0.75], vec![true; 3]));
        assert_eq!(read.stability, None);

        let one = Found { assignment: vec![1; 3], ..found };
        let error = PseudoLabels::of_one_phase(&job, &images, one).expect_err("one cluster");
        assert!(error.is::<Diverged>(), "{error}");
        Ok(())
    }

    #[test]
    fn contradictions_are_refused() {
        let path = Path::new("pseudo-labels.safetensors");
        example(path).check(path).expect("sound");
        let spoilt: [fn(&mut PseudoLabels); 12] = [
            |p| p.index[2] = 4,
            |p| p.assignment[0] = 2,
            |p| p.kmeans_assignment[0] = 2,
            |p| p.confidence[0] = 1.5,
            |p| p.score[0] = -0.5,
            |p| p.reliable.truncate(2),
            |p| p.score.truncate(2),
            |p| p.projection_width = 2,
            |p| p.data_set.images = 3,
            |p| p.stability = Some(1.5),
            |p| p.head_agreement = Some(vec![1.; 2]),
            |p| p.head_agreement = Some(vec![1., 1., 1.5]),
        ];
        for (case, spoil) in spoilt.iter().enumerate() {
            let mut labels = example(path);
            spoil(&mut labels);
            assert!(labels.check(path).is_err(), "case {case}");
        }
    }
}
