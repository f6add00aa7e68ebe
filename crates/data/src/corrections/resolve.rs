//! What corrections mean for the clusters of a run.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use stage::console::{counted, printable};

use super::run::ClusteredPictures;
use super::{Corrections, KnownCluster, PictureCorrection, PictureMark};

/// Where a picture belongs after corrections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Membership {
    /// To the cluster of this number in the run.
    Cluster(u32),
    /// To no cluster.
    Marked(PictureMark),
}

/// The clusters of a run after corrections. Numbers are those of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorrectedClusters {
    /// Where each picture belongs, by place, `N`. No picture is in a cluster that is shown as another one.
    pub memberships: Vec<Membership>,
    /// The cluster that each cluster of the run is shown as, `K`: itself, unless it is merged.
    pub shown_as: Vec<u32>,
    /// The name of each cluster, `K`; `None` of clusters that are shown as another one.
    pub names: Vec<Option<String>>,
    /// Number of pictures that were moved to another cluster by hand.
    pub moved: usize,
    /// A sentence for each correction that could not be applied. Control characters in names are escaped.
    pub not_applied: Vec<String>,
}

/// The cluster of a run that an entry means, or why none is found.
type Location = Result<u32, String>;

impl Corrections {
    /// Applies the corrections to the clusters of a run.
    pub fn resolve(&self, run: &ClusteredPictures) -> CorrectedClusters {
        let locations = self.locate(run);
        let (shown_as, names, shown) = self.groups_in(run, &locations);
        let own = run.assignment.iter();
        let mut memberships: Vec<Membership> =
            own.map(|&own| Membership::Cluster(shown_as[own as usize])).collect();
        let (mut moved, mut missing, mut waiting) = (0, Vec::new(), BTreeMap::<u32, usize>::new());
        for (id, picture) in &self.pictures {
            let places = run.places_of(id);
            if places.is_empty() {
                missing.push(picture.name.as_str());
                continue;
            }
            let membership = match picture.correction {
                PictureCorrection::Marked(mark) => Membership::Marked(mark),
                PictureCorrection::MovedTo(number) => match shown.get(&number) {
                    Some(&cluster) => Membership::Cluster(cluster),
                    None => {
                        *waiting.entry(number).or_default() += places.len();
                        continue;
                    }
                },
            };
            for &place in places {
                let before = std::mem::replace(&mut memberships[place as usize], membership);
                moved += usize::from(
                    matches!(membership, Membership::Cluster(_)) && before != membership,
                );
            }
        }
        let mut not_applied = self.unapplied(&locations, &shown, &waiting);
        not_applied.extend(missing_sentence(&missing));
        CorrectedClusters { memberships, shown_as, names, moved, not_applied }
    }

    /// Shows the clusters of each group as one. Returns the cluster that each cluster is shown as, `K`, the name
    /// of each, `K`, and the cluster that shows each entry.
    fn groups_in(
        &self,
        run: &ClusteredPictures,
        locations: &BTreeMap<u32, Location>,
    ) -> (Vec<u32>, Vec<Option<String>>, BTreeMap<u32, u32>) {
        let mut shown_as: Vec<u32> = (0..run.clusters).collect();
        let mut names = vec![None; shown_as.len()];
        let mut shown = BTreeMap::new();
        for group in self.groups() {
            let found: Vec<u32> =
                group.iter().filter_map(|number| locations[number].clone().ok()).collect();
            let Some(&first) = found.first() else { continue };
            found.iter().for_each(|&cluster| shown_as[cluster as usize] = first);
            names[first as usize] = self.clusters[&group[0]].name.clone();
            shown.extend(group.iter().map(|&number| (number, first)));
        }
        (shown_as, names, shown)
    }

    /// Finds the cluster of the run that each entry means; see the documentation of the format.
    pub(super) fn locate(&self, run: &ClusteredPictures) -> BTreeMap<u32, Location> {
        let mut locations = BTreeMap::new();
        let mut claims = Vec::new();
        for (&number, cluster) in &self.clusters {
            match cluster.claim(run) {
                Ok((own, count)) => claims.push((Reverse(count), number, own)),
                Err(why) => drop(locations.insert(number, Err(why))),
            }
        }
        claims.sort_unstable();
        let mut owners: BTreeMap<u32, u32> = BTreeMap::new();
        for (_, number, own) in claims {
            let owner = *owners.entry(own).or_insert(number);
            let location = match self.group(owner).contains(&number) {
                true => Ok(own),
                false => Err(format!(
                    "its pictures are in cluster {own}, which has as many or more of cluster {}",
                    self.label_of(owner)
                )),
            };
            locations.insert(number, location);
        }
        locations
    }

    /// A sentence for each entry that the run does not have, with what is not applied because of that.
    fn unapplied(
        &self,
        locations: &BTreeMap<u32, Location>,
        shown: &BTreeMap<u32, u32>,
        waiting: &BTreeMap<u32, usize>,
    ) -> Vec<String> {
        let mut sentences = Vec::new();
        for (number, location) in locations {
            let Err(why) = location else { continue };
            let mut parts = Vec::new();
            let is_shown = shown.contains_key(number);
            parts.extend(
                (!is_shown && self.clusters[number].name.is_some()).then(|| "its name".into()),
            );
            parts.extend((self.group(*number).len() > 1).then(|| "its merge".to_owned()));
            parts.extend(waiting.get(number).map(|&count| counted(count, "moved picture")));
            if !parts.is_empty() {
                sentences.push(format!(
                    "Cluster {} of the corrections was not found: {why}. Not applied: {}.",
                    self.label_of(*number),
                    parts.join(", ")
                ));
            }
        }
        sentences
    }

    /// The number of an entry, and its name.
    fn label_of(&self, number: u32) -> String {
        match &self.clusters[&number].name {
            Some(name) => format!("{number} (`{name}`)"),
            None => number.to_string(),
        }
    }
}

impl KnownCluster {
    /// The cluster of `run` that has more than half of the exemplars that are left, and how many.
    pub(super) fn claim(&self, run: &ClusteredPictures) -> Result<(u32, usize), String> {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for own in self.exemplars.iter().filter_map(|id| run.cluster_of(id)) {
            *counts.entry(own).or_default() += 1;
        }
        let all: usize = counts.values().sum();
        let majority = counts.iter().find(|&(_, &count)| 2 * count > all);
        majority.map(|(&own, &count)| (own, count)).ok_or_else(|| {
            let numbers: Vec<String> = counts.keys().map(u32::to_string).collect();
            match all {
                0 => "none of its pictures is in this run".to_owned(),
                _ => format!("its pictures are divided among clusters {}", numbers.join(", ")),
            }
        })
    }
}

impl CorrectedClusters {
    /// The same clusters with other pictures, which came after the corrections: they get the cluster that
    /// theirs is shown as.
    ///
    /// - `assignment`: the cluster of each in the run, by place, below `K`.
    pub fn of_other_pictures(&self, assignment: &[u32]) -> Self {
        let shown = assignment.iter().map(|&own| Membership::Cluster(self.shown_as[own as usize]));
        Self { memberships: shown.collect(), moved: 0, ..self.clone() }
    }

    /// Says how many corrections were applied; `None` if there are none.
    pub fn summary(&self) -> Option<String> {
        let marked = |mark| {
            let is_it = |&&found: &&Membership| found == Membership::Marked(mark);
            self.memberships.iter().filter(is_it).count()
        };
        let named = self.names.iter().flatten().count();
        let merged = self.shown_as.iter().zip(0..).filter(|&(&as_, own)| as_ != own).count();
        let (wrong, outliers) = (marked(PictureMark::Wrong), marked(PictureMark::Outlier));
        let parts: Vec<String> = [
            (named, counted(named, "cluster") + " named"),
            (merged, counted(merged, "cluster") + " merged into another one"),
            (self.moved, counted(self.moved, "picture") + " moved"),
            (wrong, counted(wrong, "picture") + " marked as wrong"),
            (outliers, counted(outliers, "picture") + " marked as outlier"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(_, part)| part)
        .collect();
        (!parts.is_empty()).then(|| format!("Corrections by hand: {}.", parts.join(", ")))
    }
}

/// A sentence about corrected pictures that a run does not have.
fn missing_sentence(names: &[&str]) -> Option<String> {
    let some: Vec<String> =
        names.iter().take(3).map(|name| format!("`{}`", printable(name))).collect();
    let such_as = if names.len() > some.len() { "such as " } else { "" };
    let verb = if names.len() == 1 { "is" } else { "are" };
    (!names.is_empty()).then(|| {
        format!(
            "{} {verb} not in this run: {such_as}{}.",
            counted(names.len(), "corrected picture"),
            some.join(", ")
        )
    })
}
