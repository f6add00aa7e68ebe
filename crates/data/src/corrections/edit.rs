//! Edits of corrections.
//!
//! Every edit names clusters by their number in the run that the editor shows, and pictures by their place
//! in it. The number of a merged cluster means the cluster that it is shown as. An edit also gives the entries
//! the numbers and exemplars of that run. An entry whose cluster is not in the run keeps its exemplars, and gets
//! a number that no cluster of the run has. An edit that fails changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};

use super::run::ClusteredPictures;
use super::{
    CorrectedPicture, Corrections, KnownCluster, PictureCorrection, PictureMark, check_name,
};

impl Corrections {
    /// Names a cluster, or removes its name. Spaces around the name are removed.
    ///
    /// A name of a cluster that this run does not have is free: that cluster loses it.
    ///
    /// # Errors
    ///
    /// There is no such cluster, it is empty, another one has the name, or the name is not usable: blank, of
    /// over 100 characters, with control characters or marks of the direction of writing.
    pub fn rename(
        &mut self,
        run: &ClusteredPictures,
        cluster: u32,
        name: Option<&str>,
    ) -> Result<()> {
        self.edit(run, |next| {
            next.ensure_entry(run, cluster)?;
            let group = next.group(cluster);
            let name = name.map(str::trim);
            if let Some(name) = name {
                check_name(name)?;
                next.free_name(run, &group, name)?;
            }
            next.set_name(group[0], name.map(str::to_owned));
            Ok(())
        })
    }

    /// Shows these clusters as one, under the first of them. It gets the first name that one of them has; the
    /// others lose theirs.
    ///
    /// # Errors
    ///
    /// There is no such cluster, one is empty, or they are one cluster already.
    pub fn merge(&mut self, run: &ClusteredPictures, clusters: &[u32]) -> Result<()> {
        self.edit(run, |next| {
            let mut merged: Vec<u32> = Vec::new();
            let mut count = 0;
            for &cluster in clusters {
                next.ensure_entry(run, cluster)?;
                let group = next.group(cluster);
                if !merged.contains(&group[0]) {
                    merged.extend(group);
                    count += 1;
                }
            }
            ensure!(count > 1, "merging needs two or more different clusters, not {clusters:?}");
            let name = merged.iter().find_map(|number| next.clusters[number].name.clone());
            merged.iter().for_each(|&number| next.set_name(number, None));
            next.set_name(merged[0], name);
            next.merges.retain(|merge| !merged.contains(&merge[0]));
            next.merges.push(merged);
            Ok(())
        })
    }

    /// Shows the clusters that are merged in `cluster` on their own again. The name stays with the number
    /// that was shown.
    ///
    /// # Errors
    ///
    /// There is no such cluster, or it is not merged.
    pub fn unmerge(&mut self, run: &ClusteredPictures, cluster: u32) -> Result<()> {
        self.edit(run, |next| {
            next.ensure_entry(run, cluster)?;
            let group = next.group(cluster);
            ensure!(group.len() > 1, "cluster {cluster} is not merged with another one");
            let name = next.clusters[&group[0]].name.clone();
            next.set_name(group[0], None);
            next.set_name(shown(run, &group).unwrap_or(cluster), name);
            next.merges.retain(|merge| *merge != group);
            Ok(())
        })
    }

    /// Moves the pictures at these places, and those identical to them, to a cluster. Marks are removed.
    ///
    /// # Errors
    ///
    /// There is no such picture or cluster, or the cluster is empty.
    pub fn move_pictures(
        &mut self,
        run: &ClusteredPictures,
        places: &[u32],
        cluster: u32,
    ) -> Result<()> {
        self.edit(run, |next| {
            next.ensure_entry(run, cluster)?;
            let group = next.group(cluster);
            let target = shown(run, &group).unwrap_or(cluster);
            for (id, name) in run.named(places)? {
                let is_there = |&place: &u32| group.contains(&run.assignment[place as usize]);
                if run.places_of(&id).iter().all(is_there) {
                    next.pictures.remove(&id); // The run has put it there.
                } else {
                    let correction = PictureCorrection::MovedTo(target);
                    next.pictures
                        .insert(id, CorrectedPicture { name: name.to_owned(), correction });
                }
            }
            Ok(())
        })
    }

    /// Takes the pictures at these places, and those identical to them, out of all clusters.
    ///
    /// # Errors
    ///
    /// There is no such picture.
    pub fn mark(
        &mut self,
        run: &ClusteredPictures,
        places: &[u32],
        mark: PictureMark,
    ) -> Result<()> {
        self.edit(run, |next| {
            for (id, name) in run.named(places)? {
                let correction = PictureCorrection::Marked(mark);
                next.pictures.insert(id, CorrectedPicture { name: name.to_owned(), correction });
            }
            Ok(())
        })
    }

    /// Puts the pictures at these places, and those identical to them, back where the run has them: removes
    /// marks and moves.
    ///
    /// # Errors
    ///
    /// There is no such picture.
    pub fn unmark(&mut self, run: &ClusteredPictures, places: &[u32]) -> Result<()> {
        self.edit(run, |next| {
            run.named(places)?.iter().for_each(|(id, _)| drop(next.pictures.remove(id)));
            Ok(())
        })
    }

    /// Applies `change` to a copy with the numbers of `run`, and keeps the copy if it passes the checks.
    fn edit(
        &mut self,
        run: &ClusteredPictures,
        change: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let mut next = self.renumbered_for(run);
        change(&mut next)?;
        next.remove_unused();
        next.check()?;
        *self = next;
        Ok(())
    }

    /// Gives the entries the numbers and exemplars of their clusters in `run`.
    ///
    /// Where several entries of a merge are one cluster of `run`, the first of them gets its number. The others
    /// get numbers from `K`, and so do entries whose cluster is not in `run`. Entries that claim one cluster keep
    /// their own exemplars, because another run may divide it again.
    fn renumbered_for(&self, run: &ClusteredPictures) -> Self {
        let locations = self.locate(run);
        let (mut numbers, mut taken) = (BTreeMap::new(), BTreeSet::new());
        for number in self.groups().concat() {
            if let Ok(cluster) = locations[&number]
                && taken.insert(cluster)
            {
                numbers.insert(number, cluster);
            }
        }
        let mut others: Vec<u32> = self.clusters.keys().copied().collect();
        others.retain(|number| !numbers.contains_key(number));
        let (kept, renumbered): (Vec<u32>, Vec<u32>) =
            others.into_iter().partition(|&number| number >= run.clusters);
        numbers.extend(kept.iter().map(|&number| (number, number)));
        taken.extend(kept);
        for number in renumbered {
            let free = (run.clusters..).find(|&number| taken.insert(number));
            numbers.extend(free.map(|free| (number, free)));
        }
        let mut claims: BTreeMap<u32, usize> = BTreeMap::new();
        for (cluster, _) in self.clusters.values().filter_map(|cluster| cluster.claim(run).ok()) {
            *claims.entry(cluster).or_default() += 1;
        }
        let clusters = self.clusters.iter().map(|(number, cluster)| {
            let (number, mut cluster) = (numbers[number], cluster.clone());
            if claims.get(&number) == Some(&1) {
                cluster.exemplars.clone_from(&run.exemplars[number as usize]);
            }
            (number, cluster)
        });
        let merge = |merge: &Vec<u32>| merge.iter().map(|number| numbers[number]).collect();
        let mut pictures = self.pictures.clone();
        for picture in pictures.values_mut() {
            if let PictureCorrection::MovedTo(number) = &mut picture.correction {
                *number = numbers[number];
            }
        }
        Self {
            clusters: clusters.collect(),
            merges: self.merges.iter().map(merge).collect(),
            pictures,
        }
    }

    /// Makes an entry for a cluster of `run`, unless there is one.
    fn ensure_entry(&mut self, run: &ClusteredPictures, cluster: u32) -> Result<()> {
        let exemplars = run.exemplars.get(cluster as usize);
        let exemplars = exemplars.with_context(|| {
            format!("there is no cluster {cluster}; the run has {}, from 0", run.clusters)
        })?;
        ensure!(
            !exemplars.is_empty(),
            "cluster {cluster} is empty, so that another run could not find it; choose another one"
        );
        let exemplars = exemplars.clone();
        self.clusters.entry(cluster).or_insert(KnownCluster { name: None, exemplars });
        Ok(())
    }

    fn set_name(&mut self, number: u32, name: Option<String>) {
        if let Some(cluster) = self.clusters.get_mut(&number) {
            cluster.name = name;
        }
    }

    /// Takes `name` from a cluster that `run` does not have.
    ///
    /// # Errors
    ///
    /// A cluster of `run` outside of `group` has it.
    fn free_name(&mut self, run: &ClusteredPictures, group: &[u32], name: &str) -> Result<()> {
        let has_it = |cluster: &KnownCluster| cluster.name.as_deref() == Some(name);
        let holder = self.clusters.iter().find(|(_, cluster)| has_it(cluster));
        let Some(holder) =
            holder.map(|(&number, _)| number).filter(|number| !group.contains(number))
        else {
            return Ok(());
        };
        if let Some(number) = shown(run, &self.group(holder)) {
            bail!(
                "cluster {number} has the name `{name}` already; choose another, or merge the two"
            );
        }
        self.set_name(holder, None);
        Ok(())
    }

    /// Removes the entries that correct nothing and that nothing names.
    fn remove_unused(&mut self) {
        let moved = self.pictures.values().filter_map(|picture| match picture.correction {
            PictureCorrection::MovedTo(number) => Some(number),
            PictureCorrection::Marked(_) => None,
        });
        let used: BTreeSet<u32> = self.merges.iter().flatten().copied().chain(moved).collect();
        self.clusters.retain(|number, cluster| cluster.name.is_some() || used.contains(number));
    }
}

/// The number of `run` that a group is shown as.
fn shown(run: &ClusteredPictures, group: &[u32]) -> Option<u32> {
    group.iter().copied().find(|&number| number < run.clusters)
}
