//! The pictures of the page: each thumbnail once, in the section of its cluster, and links to them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use anyhow::Result;
use data::{Images, Labels, Names, PseudoLabels};
use rayon::prelude::*;
use stage::console::counted;

use crate::analysis::Analysis;
use crate::clusters::{Cluster, ClusterMember};
use crate::html::{escaped, inline};
use crate::thumbnail;

/// What the sections of pictures are made of.
pub struct Gallery<'a> {
    /// The prepared pictures.
    pub images: &'a Images,
    /// Their names.
    pub names: &'a Names,
    /// The pseudo-labels that the clusters are made of.
    pub labels: &'a PseudoLabels,
    /// All clusters, then the marked pictures.
    pub clusters: &'a [Cluster],
    /// Ground truth, where there is one.
    pub truth: Option<&'a Labels>,
    /// The analysis, where there are embeddings.
    pub analysis: Option<&'a Analysis>,
    /// For each of the clusters the others, the most similar first; nothing where there is no analysis.
    pub similar: &'a [Vec<u32>],
    /// Index of the second-best cluster of each analysed picture; nothing where the page is served, or where
    /// there is no analysis.
    pub second_best: &'a [u32],
    /// Most pictures of highest score to show of each cluster.
    pub shown: usize,
    /// Whether the page is served: the script then fills each figure when it is seen.
    pub is_served: bool,
}

/// Most groups of duplicates, and most pictures of one, that are listed.
const GROUPS: usize = 60;
const OF_GROUP: usize = 8;

/// Most pictures that disagree with the class of their cluster that are listed.
const DISAGREEING: usize = 48;

/// A picture whose class is not the most frequent one of its cluster.
struct Disagreement {
    place: u32,
    /// Index of the cluster.
    cluster: usize,
    class: u32,
    usual: u32,
}

impl Gallery<'_> {
    /// Chooses the pictures that get a thumbnail, by place: first those of highest and lowest score of each
    /// cluster, then those that the lists name, then all others, each cluster in turn.
    pub fn chosen(&self, most: usize) -> Vec<bool> {
        let places = |members: &[ClusterMember]| -> Vec<u32> {
            members.iter().map(|member| member.place).collect()
        };
        let shown = self.clusters.iter().map(|cluster| {
            let (highest, lowest) = cluster.shown(self.shown);
            [places(highest), places(lowest)].concat()
        });
        let listed = self.listed_duplicates().flat_map(|(_, places)| places.to_vec());
        let listed = listed.chain(self.analysis.iter().flat_map(|found| found.outliers.clone()));
        let listed = listed
            .chain(self.disagreements().into_iter().take(DISAGREEING).map(|found| found.place));
        let all = self.clusters.iter().map(|cluster| places(&cluster.members));
        let order = by_turns(&shown.collect::<Vec<_>>()).into_iter().chain(listed);
        let order = order.chain(by_turns(&all.collect::<Vec<_>>()));
        let mut chosen = vec![false; self.labels.index.len()];
        let mut left = most;
        for place in order {
            let is_chosen = &mut chosen[place as usize];
            if left > 0 && !*is_chosen {
                *is_chosen = true;
                left -= 1;
            }
        }
        chosen
    }

    /// The sections of all clusters, the largest first, then those of marked pictures.
    ///
    /// # Errors
    ///
    /// A picture is damaged.
    pub fn sections(&self, chosen: &[bool]) -> Result<String> {
        let mut largest_first: Vec<(usize, &Cluster)> = self.clusters.iter().enumerate().collect();
        largest_first // Stable.
            .sort_by_key(|(_, cluster)| (cluster.mark, std::cmp::Reverse(cluster.members.len())));
        let sections =
            largest_first.par_iter().map(|(k, cluster)| self.section(*k, cluster, chosen));
        sections.collect()
    }

    fn section(&self, k: usize, cluster: &Cluster, chosen: &[bool]) -> Result<String> {
        let count = cluster.members.len();
        let mut html = format!(
            "<section class=\"cluster\" id=\"c{0}\"{3}><h3>{2} <small>{4}, mean confidence \
             {1:.2}</small></h3>\n",
            cluster.number,
            cluster.confidence(),
            heading(cluster),
            self.fingerprint(cluster),
            counted(count, "picture")
        );
        if count > 0 {
            self.write_about(&mut html, k, cluster);
        }
        let (highest, lowest) = cluster.shown(self.shown);
        let (first, last) = (highest.len(), count - lowest.len());
        for (caption, range) in [("highest score", 0..first), ("lowest score", last..count)] {
            if !range.is_empty() {
                let caption = format!("<figcaption>{caption}</figcaption>");
                let _ = writeln!(html, "{}", self.figure(cluster, range, &caption, chosen)?);
            }
        }
        let others = &cluster.members[first..last];
        let folded = others.iter().filter(|member| chosen[member.place as usize]).count();
        if folded > 0 {
            let figure = self.figure(cluster, first..last, "", chosen)?;
            let _ = writeln!(
                html,
                "<details><summary>{}</summary>{figure}</details>",
                counted(folded, "more picture")
            );
        }
        let left = cluster.members.iter().filter(|member| !chosen[member.place as usize]).count();
        if left > 0 {
            let _ = writeln!(
                html,
                "<p><small>Not on this page: {} of this cluster.</small></p>",
                counted(left, "picture")
            );
        }
        html.push_str("</section>\n");
        Ok(html)
    }

    /// Writes the line below the heading: how sure its pictures are, similar clusters, classes.
    fn write_about(&self, html: &mut String, k: usize, cluster: &Cluster) {
        let _ = write!(html, "<div class=\"about\">{}", histogram(cluster));
        if let Some(similar) = self.similar.get(k) {
            let others = similar.iter().map(|&other| &self.clusters[other as usize]);
            let others = others.filter(|other| !other.members.is_empty()).take(3);
            let links: Vec<String> = others.map(link_to).collect();
            if !links.is_empty() {
                let _ = write!(html, "<span>most similar: {}</span>", links.join(", "));
            }
        }
        if let Some(truth) = self.truth {
            let known = self.classes_of(cluster);
            let all: usize = known.iter().map(|&(count, _)| count).sum();
            let share = |&(count, class): &(usize, u32)| {
                let name = inline(&truth.classes[class as usize]);
                format!("{name} {:.0} %", 100. * count as f64 / all as f64)
            };
            let shares: Vec<String> = known.iter().take(3).map(share).collect();
            let _ = write!(html, "<span>classes: {}</span>", shares.join(", "));
        }
        html.push_str("</div>\n");
    }

    /// Known classes of a cluster's pictures with their counts, the most frequent first.
    fn classes_of(&self, cluster: &Cluster) -> Vec<(usize, u32)> {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for member in &cluster.members {
            if let Some(class) = self.truth.and_then(|truth| truth.labels[member.row as usize]) {
                *counts.entry(class).or_default() += 1;
            }
        }
        let mut counts: Vec<(usize, u32)> =
            counts.into_iter().map(|(class, count)| (count, class)).collect();
        counts.sort_by_key(|&(count, class)| (std::cmp::Reverse(count), class));
        counts
    }

    /// A figure of the chosen ones of some pictures of a cluster; an empty one where the page is served.
    fn figure(
        &self,
        cluster: &Cluster,
        range: Range<usize>,
        caption: &str,
        chosen: &[bool],
    ) -> Result<String> {
        if self.is_served {
            let (number, Range { start, end }) = (cluster.number, range);
            return Ok(format!(
                "<figure data-cluster=\"{number}\" data-from=\"{start}\" data-to=\"{end}\">{caption}</figure>"
            ));
        }
        let mut html = format!("<figure>{caption}");
        for member in cluster.members[range].iter().filter(|m| chosen[m.place as usize]) {
            let name = escaped(&self.names.names[member.row as usize]);
            let url = thumbnail::data_url(&*self.images.picture(member.row)?)?;
            let _ = write!(
                html,
                "<a class=\"p\" id=\"i{0}\" href=\"#i{0}\"><img src=\"{url}\" alt=\"{name}\" \
                 title=\"{name}, score {1:.2}\" loading=\"lazy\"></a>",
                member.place, member.score
            );
        }
        html.push_str("</figure>");
        Ok(html)
    }

    /// An attribute that changes with the pictures of a cluster, so that the script of a served page replaces
    /// the sections that changed and no other.
    fn fingerprint(&self, cluster: &Cluster) -> String {
        if !self.is_served {
            return String::new();
        }
        let places = cluster.members.iter().flat_map(|member| member.place.to_le_bytes());
        let digest = stage::digest::sha256(&places.collect::<Vec<u8>>());
        format!(" data-members=\"{}\"", &digest[..16])
    }

    /// A link to the thumbnail of a picture, or its name where it has none.
    fn link(&self, place: u32, chosen: &[bool]) -> String {
        let name = inline(&self.names.names[self.labels.index[place as usize] as usize]);
        match chosen[place as usize] {
            true => format!("<a class=\"ref\" href=\"#i{place}\">{name}</a>"),
            false => name,
        }
    }

    /// The listed groups of duplicates with their listed pictures.
    fn listed_duplicates(&self) -> impl Iterator<Item = (&crate::analysis::Duplicates, &[u32])> {
        let groups = self.analysis.iter().flat_map(|found| found.duplicates.iter().take(GROUPS));
        groups.map(|group| (group, &group.places[..group.places.len().min(OF_GROUP)]))
    }

    /// Writes the groups of near-duplicates.
    pub fn write_duplicates(&self, html: &mut String, chosen: &[bool]) {
        let Some(analysis) = self.analysis.filter(|found| !found.duplicates.is_empty()) else {
            return;
        };
        let count = analysis.duplicates.len();
        let _ = writeln!(
            html,
            "<h2>Near-duplicates</h2>\n<p>{} of pictures that are nearly the same to the network: nearer to each other than a fifth of the usual distance to the nearest picture (a cosine above \
             {:.4}). Exact ones come first.</p>\n<ul class=\"list\">",
            counted(count, "group"),
            analysis.duplicate_similarity
        );
        for (group, places) in self.listed_duplicates() {
            let links: Vec<String> = places.iter().map(|&place| self.link(place, chosen)).collect();
            let kind = match group.is_exact {
                true => "exact".to_owned(),
                false => format!("cosine {:.4}", group.similarity),
            };
            let more = group.places.len() - places.len();
            let more = if more > 0 { format!(", and {more} more") } else { String::new() };
            let _ = writeln!(
                html,
                "<li><div class=\"strip\">{}</div>{} pictures, {kind}{more}</li>",
                links.join(" "),
                group.places.len()
            );
        }
        html.push_str("</ul>\n");
        if count > GROUPS {
            let _ = writeln!(html, "<p>Left out: {}.</p>", counted(count - GROUPS, "group"));
        }
    }

    /// Writes the pictures with the fewest similar ones.
    pub fn write_outliers(&self, html: &mut String, chosen: &[bool]) {
        let Some(analysis) = self.analysis.filter(|found| !found.outliers.is_empty()) else {
            return;
        };
        html.push_str(
            "<h2>Outliers</h2>\n<p>Pictures with the fewest similar ones: their neighbours are the farthest \
             away. They may be damaged, or belong to no cluster.</p>\n<ul class=\"list\">\n",
        );
        for &place in &analysis.outliers {
            let cluster = self.cluster_of(place).map(link_to).unwrap_or_default();
            let link = self.link(place, chosen);
            let _ = writeln!(html, "<li><div class=\"strip\">{link}</div>in {cluster}</li>");
        }
        html.push_str("</ul>\n");
    }

    fn cluster_of(&self, place: u32) -> Option<&Cluster> {
        let has = |cluster: &&Cluster| cluster.members.iter().any(|member| member.place == place);
        self.clusters.iter().find(has)
    }

    /// The pictures that disagree with their cluster, the most confident first.
    fn disagreements(&self) -> Vec<Disagreement> {
        let Some(truth) = self.truth else { return vec![] };
        let mut found: Vec<(f32, Disagreement)> = Vec::new();
        let clusters = self.clusters.iter().enumerate();
        for (cluster, Cluster { members, .. }) in clusters.filter(|(_, own)| own.mark.is_none()) {
            let Some(&(_, usual)) = self.classes_of(&self.clusters[cluster]).first() else {
                continue;
            };
            for member in members {
                let class = truth.labels[member.row as usize].filter(|&class| class != usual);
                let place = member.place;
                found.extend(class.map(|class| {
                    (member.confidence, Disagreement { place, cluster, class, usual })
                }));
            }
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.place.cmp(&b.1.place)));
        found.into_iter().map(|(_, found)| found).collect()
    }

    /// Writes the pictures whose class is not that of most pictures of their cluster.
    pub fn write_disagreements(&self, html: &mut String, chosen: &[bool]) {
        let found = self.disagreements();
        let (Some(truth), false) = (self.truth, found.is_empty()) else { return };
        let _ = writeln!(
            html,
            "<h2>Pictures that disagree</h2>\n<p>Of another class than most of their cluster: {}. Listed are \
             the {} of highest confidence.</p>\n<ul class=\"list\">",
            counted(found.len(), "picture"),
            found.len().min(DISAGREEING)
        );
        for Disagreement { place, cluster, class, usual } in found.iter().take(DISAGREEING) {
            let _ = writeln!(
                html,
                "<li><div class=\"strip\">{}</div>{} in {}, which is mostly {}</li>",
                self.link(*place, chosen),
                inline(&truth.classes[*class as usize]),
                link_to(&self.clusters[*cluster]),
                inline(&truth.classes[*usual as usize])
            );
        }
        html.push_str("</ul>\n");
    }
}

/// The heading of a cluster.
fn heading(cluster: &Cluster) -> String {
    let called = called(cluster);
    let (first, others) = called.split_at(1);
    first.to_uppercase() + others
}

/// A link to the section of a cluster.
fn link_to(cluster: &Cluster) -> String {
    format!("<a href=\"#c{}\">{}</a>", cluster.number, called(cluster))
}

/// [`Cluster::title`] as HTML.
fn called(cluster: &Cluster) -> String {
    match (cluster.mark, &cluster.name) {
        (None, Some(name)) => format!("cluster {}: {}", cluster.number, inline(name)),
        _ => cluster.title(),
    }
}

/// The first of each list, then the second of each, and so on.
fn by_turns(lists: &[Vec<u32>]) -> Vec<u32> {
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    (0..longest)
        .flat_map(|rank| lists.iter().filter_map(move |list| list.get(rank).copied()))
        .collect()
}

/// Draws how many pictures of a cluster have which confidence, in ten steps from 0 to 1.
fn histogram(cluster: &Cluster) -> String {
    let mut counts = [0usize; 10];
    for member in &cluster.members {
        counts[((10. * member.confidence) as usize).min(9)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let described: Vec<String> = counts.iter().map(usize::to_string).collect();
    let mut svg = format!(
        "<svg class=\"bars\" viewBox=\"0 0 110 28\" role=\"img\" aria-label=\"Pictures by confidence, in tenths \
         from 0 to 1: {}\">",
        described.join(", ")
    );
    for (step, &count) in counts.iter().enumerate() {
        let height = (26 * count).div_ceil(most);
        let _ = write!(
            svg,
            "<rect x=\"{}\" y=\"{}\" width=\"9\" height=\"{}\"/>",
            11 * step,
            27 - height,
            height + 1
        );
    }
    svg.push_str("</svg>");
    svg
}
