//! The clusters of a run, as corrections need them.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use super::EXEMPLARS;
use crate::images::Id;
use crate::{Images, Names, PseudoLabels};

/// The pictures of a run with their clusters, before corrections.
///
/// A picture is known by its *place*: its position in the index of the pseudo-labels. A cluster is known by
/// its number in the run.
#[derive(Debug, Clone)]
pub struct ClusteredPictures {
    pub(super) clusters: u32,
    /// By place.
    pub(super) assignment: Vec<u32>,
    pub(super) ids: Vec<Id>,
    pub(super) names: Vec<String>,
    /// All places by ascending id; of equal ids, by place.
    by_id: Vec<u32>,
    /// Of each cluster, the ids of its pictures of highest score.
    pub(super) exemplars: Vec<Vec<Id>>,
}

impl ClusteredPictures {
    /// The pictures that the pseudo-labels of a run are about.
    ///
    /// # Errors
    ///
    /// The files are about different pictures.
    pub fn of(labels: &PseudoLabels, images: &Images, names: &Names) -> Result<Self> {
        let remedy = "give the images and names that the run was made with";
        labels.data_set.require(images.data_set(), remedy)?;
        names.data_set.require(images.data_set(), remedy)?;
        let ids = labels.index.iter().map(|&row| images.id(row)).collect::<Result<_>>()?;
        let names = labels.index.iter().map(|&row| names.names[row as usize].clone()).collect();
        Self::new(labels.clusters, labels.assignment.clone(), &labels.score, ids, names)
    }

    /// `N` pictures in `clusters` clusters, by place.
    ///
    /// - `assignment`: the cluster of each, `N`.
    /// - `scores`: how sure the method is of each, `N`; those of highest score become exemplars.
    /// - `ids`, `names`: the identity of each and its name, `N`.
    ///
    /// # Errors
    ///
    /// The lengths differ, or a cluster is out of range.
    pub fn new(
        clusters: usize,
        assignment: Vec<u32>,
        scores: &[f32],
        ids: Vec<Id>,
        names: Vec<String>,
    ) -> Result<Self> {
        let count = assignment.len();
        ensure!(
            [scores.len(), ids.len(), names.len()] == [count; 3],
            "{count} pictures have {} scores, {} ids and {} names",
            scores.len(),
            ids.len(),
            names.len()
        );
        let clusters = u32::try_from(clusters)?;
        ensure!(assignment.iter().all(|&own| own < clusters), "a cluster is not below {clusters}");
        let mut by_id: Vec<u32> = (0..u32::try_from(count)?).collect();
        by_id.sort_by_key(|&place| (ids[place as usize], place));
        let exemplars = vec![vec![]; clusters as usize];
        let mut run = Self { clusters, assignment, ids, names, by_id, exemplars };
        run.choose_exemplars(scores);
        Ok(run)
    }

    /// Chooses, of each cluster, the pictures of highest score; equal scores by place. Of identical pictures
    /// the first counts.
    fn choose_exemplars(&mut self, scores: &[f32]) {
        let is_first = |&place: &u32| self.places_of(&self.ids[place as usize])[0] == place;
        let mut order: Vec<u32> = (0..self.len() as u32).filter(is_first).collect();
        order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b)));
        for place in order {
            let exemplars = &mut self.exemplars[self.assignment[place as usize] as usize];
            if exemplars.len() < EXEMPLARS {
                exemplars.push(self.ids[place as usize]);
            }
        }
    }

    /// Number of pictures, `N`.
    pub fn len(&self) -> usize {
        self.assignment.len()
    }

    /// Whether there are no pictures.
    pub fn is_empty(&self) -> bool {
        self.assignment.is_empty()
    }

    /// The places of the pictures with this id, ascending.
    pub fn places_of(&self, id: &Id) -> &[u32] {
        let id_of = |place: &u32| &self.ids[*place as usize];
        let from = self.by_id.partition_point(|place| id_of(place) < id);
        let count = self.by_id[from..].partition_point(|place| id_of(place) == id);
        &self.by_id[from..from + count]
    }

    /// The cluster of the first picture with this id.
    pub(super) fn cluster_of(&self, id: &Id) -> Option<u32> {
        self.places_of(id).first().map(|&place| self.assignment[place as usize])
    }

    /// The ids of the pictures at these places, each once, with their names.
    pub(super) fn named(&self, places: &[u32]) -> Result<Vec<(Id, &str)>> {
        let mut found = BTreeSet::new();
        let mut named = Vec::new();
        for &place in places {
            let id = self.ids.get(place as usize);
            let id = *id.with_context(|| format!("there is no picture {place}"))?;
            if found.insert(id) {
                named.push((id, self.names[place as usize].as_str()));
            }
        }
        Ok(named)
    }
}
