//! The run behind the page: what is sent of it, its corrections, and the thumbnails that were made.
//!
//! Pictures are asked for by place, never by path. What is held for 100,000 pictures is their names, numbers and
//! neighbours; the pictures themselves are mapped files, and embeddings are not held at all.

use std::collections::{HashMap, VecDeque};
use std::io::Cursor;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use data::corrections::ClusteredPictures;
use data::picture::Encoding;
use data::{Images, Labels, Names, PseudoLabels, RoundMetrics};
use image::ImageFormat;
use serde_json::{Value, json};
use stage::console::printable;
use stage::{Interrupt, digest};

use crate::analysis::{Analysis, ClusterAnalysis};
use crate::clusters::{Cluster, NO_CLUSTER};
use crate::curves::Chart;
use crate::gallery::Gallery;
use crate::html::displayable;
use crate::page::{Page, whole_positions};
use crate::run_files::ShownRun;
use crate::trust::TrustMeasure;
use crate::view::ViewArguments;
use crate::view::edits::{EditError, EditRequest, EditSession};
use crate::{corrections_facts, export, facts, files, thumbnail, trust};

/// Most pictures of a cluster that one request gets.
const AT_ONCE: usize = 500;

/// Pictures of each cluster that are in its section before it is unfolded, as [`Cluster::shown`].
const SHOWN: usize = 24;

/// A picture as it is sent: its media type and bytes.
pub type SentPicture = (&'static str, Arc<[u8]>);

/// A run that is served.
pub struct ServedRun {
    images: Images,
    names: Names,
    labels: PseudoLabels,
    truth: Option<Labels>,
    analysis: Option<Analysis>,
    /// Of the clusters that the run found.
    of_clusters: ClusterAnalysis,
    state: Mutex<ServedState>,
    title: String,
    facts: Vec<String>,
    trust: Vec<TrustMeasure>,
    metrics: Vec<(String, RoundMetrics)>,
    charts: Vec<(String, Vec<Chart>)>,
    thumbnails: Mutex<ThumbnailCache>,
    /// Names the pictures by content, in order: what is sent under an address with it never changes.
    pub set: String,
}

/// What edits change.
struct ServedState {
    session: EditSession,
    shown: Arc<CorrectedRun>,
}

/// The clusters after corrections.
struct CorrectedRun {
    revision: u64,
    can_undo: bool,
    is_corrected: bool,
    /// The clusters, then the marked pictures.
    clusters: Vec<Cluster>,
    /// The index in `clusters` of each picture, by place.
    own: Vec<u32>,
    /// The index in `clusters` of each cluster that the run found.
    shown_as: Vec<u32>,
    /// Numbers of clusters that several ones are shown as.
    merged: Vec<u32>,
    /// For each of the clusters the others, the most similar first.
    similar: Vec<Vec<u32>>,
    /// Paragraphs about the corrections.
    facts: Vec<String>,
}

impl CorrectedRun {
    /// - `found`: for each cluster that the run found the others, the most similar first.
    fn new(session: &EditSession, labels: &PseudoLabels, found: &[Vec<u32>]) -> Self {
        let corrected = session.corrected();
        let clusters = Cluster::corrected(labels, &corrected);
        let index = |number: u32| {
            let found = clusters.iter().position(|cluster| cluster.number == number as usize);
            found.map_or(NO_CLUSTER, |k| k as u32)
        };
        let shown_as: Vec<u32> = corrected.shown_as.iter().map(|&number| index(number)).collect();
        let similar = |cluster: &Cluster| {
            let found = found.get(cluster.number).into_iter().flatten();
            let (mut others, own) = (Vec::new(), index(cluster.number as u32));
            for other in found.map(|&other| shown_as[other as usize]) {
                if other != own && !others.contains(&other) {
                    others.push(other);
                }
            }
            others
        };
        let is_merged = |&number: &u32| {
            let shown = corrected.shown_as.iter().enumerate();
            shown.filter(|&(_, &as_)| as_ == number).any(|(k, _)| k as u32 != number)
        };
        Self {
            revision: session.revision(),
            can_undo: session.can_undo(),
            is_corrected: session.is_corrected(),
            own: Cluster::of_places(&clusters, labels.index.len()),
            similar: clusters.iter().map(similar).collect(),
            merged: (0..labels.clusters as u32).filter(is_merged).collect(),
            facts: corrections_facts(&corrected),
            shown_as,
            clusters,
        }
    }

    fn cluster_of(&self, place: u32) -> Option<&Cluster> {
        self.clusters.get(self.own[place as usize] as usize)
    }
}

impl ServedRun {
    /// Opens the run; computes the map where that was not done before.
    ///
    /// # Errors
    ///
    /// An input is missing or damaged, the inputs are about different pictures, or the program is interrupted.
    pub fn open(arguments: &ViewArguments, interrupt: &Interrupt) -> Result<Self> {
        let ShownRun { images, names, labels, truth } = arguments.run.open()?;
        let analyses = arguments.run.analyses(&labels);
        let analysis = analyses.as_ref().map(|found| found.of_pictures(interrupt)).transpose()?;
        let of_clusters =
            analyses.as_ref().map(|found| found.of_clusters(interrupt)).transpose()?;
        drop(analyses); // With the embeddings, if they were read.
        let (of_clusters, halves) =
            of_clusters.map_or_else(Default::default, |found| (found.analysis, found.halves));
        let steps = arguments.run.steps()?;
        let run = ClusteredPictures::of(&labels, &images, &names)?;
        let session = EditSession::open(arguments.corrections.clone(), run, interrupt)?;
        let shown = Arc::new(CorrectedRun::new(&session, &labels, &of_clusters.similar));
        let places: Vec<u8> = labels.index.iter().flat_map(|row| row.to_le_bytes()).collect();
        let set = [labels.data_set.fingerprint.as_bytes(), &places].concat();
        Ok(Self {
            trust: trust::measures(&labels, steps.between_heads, analysis.as_ref(), halves)?,
            set: digest::sha256(&set)[..16].to_owned(),
            truth,
            state: Mutex::new(ServedState { session, shown }),
            facts: facts(&labels).into_iter().chain(steps.facts).collect(),
            metrics: steps.metrics,
            charts: steps.charts,
            title: arguments.run.title.clone(),
            thumbnails: Mutex::default(),
            images,
            names,
            labels,
            analysis,
            of_clusters,
        })
    }

    /// Makes a correction, or undoes one.
    ///
    /// # Errors
    ///
    /// See [`EditError`].
    pub fn edit(&self, request: EditRequest) -> Result<(), EditError> {
        let mut state = self.state();
        let made = state.session.make(request);
        self.show(&mut state); // After a conflict too.
        made
    }

    fn state(&self) -> MutexGuard<'_, ServedState> {
        // What is shown changes in one assignment: a thread that panicked leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, state: &mut ServedState) {
        if state.shown.revision != state.session.revision() {
            let shown = CorrectedRun::new(&state.session, &self.labels, &self.of_clusters.similar);
            state.shown = Arc::new(shown);
        }
    }

    fn shown(&self) -> Arc<CorrectedRun> {
        self.state().shown.clone()
    }

    /// The page, with the corrections as they are in the file now.
    ///
    /// # Errors
    ///
    /// Another program made the file of corrections unusable.
    pub fn page(&self) -> Result<String> {
        let mut state = self.state();
        state.session.refresh()?;
        self.show(&mut state);
        let shown = state.shown.clone();
        drop(state);
        let analysis = self.analysis.as_ref();
        let served = json!({
            "set": self.set,
            "pictures": self.labels.index.len(),
            "mapped": analysis.map(|found| found.places.len()),
            "found": self.labels.clusters,
            "revision": shown.revision,
            "undo": shown.can_undo,
            "corrected": shown.is_corrected,
            "merged": shown.merged,
            "names": shown.clusters.iter().map(|cluster| &cluster.name).collect::<Vec<_>>(),
        });
        let page = Page {
            title: &self.title,
            facts: self.facts.iter().chain(&shown.facts).cloned().collect(),
            trust: self.trust.clone(),
            metrics: self.metrics.clone(),
            gallery: Gallery {
                images: &self.images,
                names: &self.names,
                labels: &self.labels,
                clusters: &shown.clusters,
                truth: self.truth.as_ref(),
                analysis,
                similar: &shown.similar,
                second_best: &[],
                shown: SHOWN,
                is_served: true,
            },
            thumbnails: 0,
            charts: self.charts.clone(),
            served: Some(served),
        };
        page.html()
    }

    /// By place, little-endian: the index of the cluster as u32 `(N,)`, then the confidence as u8 `(N,)`.
    pub fn assignment(&self) -> Vec<u8> {
        let shown = self.shown();
        let confidence = self.labels.confidence.iter().map(|&c| (255. * c.min(1.)).round() as u8);
        shown.own.iter().flat_map(|k| k.to_le_bytes()).chain(confidence).collect()
    }

    /// The analysed pictures, little-endian: their places as u32 `(A,)`, x as u16 `(A,)`, y as u16 `(A,)`.
    /// Nothing where there is no map.
    pub fn map(&self) -> Vec<u8> {
        let Some(Analysis { map, places, .. }) = &self.analysis else { return Vec::new() };
        let positions = whole_positions(map).concat();
        let places = places.iter().flat_map(|place| place.to_le_bytes());
        places.chain(positions.iter().flat_map(|x| x.to_le_bytes())).collect()
    }

    /// By place, little-endian: the class as u32 `(N,)`; 2³² − 1 where it is not known.
    pub fn classes(&self) -> Vec<u8> {
        let Some(truth) = &self.truth else { return Vec::new() };
        let class = |&row: &u32| truth.labels[row as usize].unwrap_or(u32::MAX).to_le_bytes();
        self.labels.index.iter().flat_map(class).collect()
    }

    /// Pictures of a cluster by falling score: place, name, score.
    ///
    /// # Errors
    ///
    /// There is no such cluster, or not so many pictures.
    pub fn members(&self, number: usize, from: usize, to: usize) -> Result<Value> {
        let shown = self.shown();
        let cluster = shown.clusters.iter().find(|cluster| cluster.number == number);
        let members = cluster.and_then(|cluster| cluster.members.get(from..to));
        let members =
            members.with_context(|| format!("there are no such pictures in cluster {number}"))?;
        ensure!(members.len() <= AT_ONCE, "more than {AT_ONCE} pictures at once");
        let sent = members.iter().map(|member| {
            let score = format!("{:.2}", member.score);
            json!([member.place, self.name(member.place), score])
        });
        Ok(sent.collect())
    }

    /// What the view of a picture shows: name, second-best cluster, neighbours, and those before and after it in
    /// its cluster.
    ///
    /// # Errors
    ///
    /// There is no such picture.
    pub fn picture(&self, place: u32) -> Result<Value> {
        self.row(place)?;
        let shown = self.shown();
        let members = &shown.cluster_of(place).context("a picture without cluster")?.members;
        let at = members.iter().position(|member| member.place == place).unwrap_or(0);
        let beside = |by: usize| members[(at + by) % members.len()].place;
        let analysed = self.analysis.as_ref().and_then(|analysis| {
            let row = analysis.row_of(place)?;
            let near = analysis.near(row).map(|other| json!([other, self.name(other)]));
            Some((near.collect::<Vec<Value>>(), self.of_clusters.second_best[row]))
        });
        let (near, second) = analysed.unwrap_or((vec![], NO_CLUSTER));
        let second = shown.shown_as.get(second as usize);
        let second = second.filter(|&&second| second != shown.own[place as usize]);
        Ok(json!({
            "name": self.name(place),
            "near": near,
            "second": second,
            "previous": beside(members.len() - 1),
            "next": beside(1),
        }))
    }

    /// A thumbnail; the latest ones are cached.
    ///
    /// # Errors
    ///
    /// There is no such picture, or it is damaged.
    pub fn thumbnail(&self, place: u32) -> Result<SentPicture> {
        let row = self.row(place)?;
        // A thread that panicked leaves a usable cache.
        let cache = || self.thumbnails.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = cache().found.get(&place) {
            return Ok(found.clone());
        }
        let (kind, bytes) = thumbnail::encode(&*self.images.picture(row)?)?;
        let made = (kind, Arc::from(bytes));
        cache().keep(place, &made);
        Ok(made)
    }

    /// The picture as it is stored; raw pixels as PNG.
    ///
    /// # Errors
    ///
    /// There is no such picture, or it is damaged.
    pub fn full(&self, place: u32) -> Result<SentPicture> {
        let row = self.row(place)?;
        if let Some((encoding, bytes)) = self.images.file(row)? {
            let kind = match encoding {
                Encoding::Jpeg => "image/jpeg",
                Encoding::WebP => "image/webp",
                Encoding::Png | Encoding::Raw => "image/png",
            };
            return Ok((kind, bytes.into()));
        }
        let mut bytes = Cursor::new(Vec::new());
        thumbnail::to_image(&*self.images.picture(row)?)?.write_to(&mut bytes, ImageFormat::Png)?;
        Ok(("image/png", bytes.into_inner().into()))
    }

    /// The corrected clusters as a table in a form: csv, json or parquet.
    ///
    /// # Errors
    ///
    /// There is no such form.
    pub fn table(&self, form: &str) -> Result<Vec<u8>> {
        let shown = self.shown();
        match form {
            "csv" => files::table(&shown.clusters, &self.names),
            "json" => export::clusters_as_json(&shown.clusters, &self.names),
            "parquet" => export::clusters_as_parquet(&shown.clusters, &self.names),
            _ => bail!("there is no table in the form `{}`", printable(form)),
        }
    }

    fn name(&self, place: u32) -> String {
        displayable(&self.names.names[self.labels.index[place as usize] as usize])
    }

    /// The row of a picture in the images file.
    ///
    /// # Errors
    ///
    /// There is no such picture.
    pub fn row(&self, place: u32) -> Result<u32> {
        let row = self.labels.index.get(place as usize);
        row.copied().with_context(|| format!("there is no picture {place}"))
    }
}

/// Most bytes of thumbnails in memory: about 5,000 of them.
const CACHED_BYTES: usize = 32 << 20;

/// The latest thumbnails.
#[derive(Default)]
struct ThumbnailCache {
    found: HashMap<u32, SentPicture>,
    /// The oldest first.
    order: VecDeque<u32>,
    bytes: usize,
}

impl ThumbnailCache {
    fn keep(&mut self, place: u32, (kind, bytes): &SentPicture) {
        if self.found.insert(place, (kind, bytes.clone())).is_some() {
            return; // Another thread made it meanwhile.
        }
        self.order.push_back(place);
        self.bytes += bytes.len();
        while self.bytes > CACHED_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            self.bytes -= self.found.remove(&oldest).map_or(0, |(_, bytes)| bytes.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_thumbnails_go_first() {
        let mut cache = ThumbnailCache::default();
        let half: SentPicture = ("image/png", vec![0; CACHED_BYTES / 2].into());
        for place in [1, 2, 2, 3] {
            cache.keep(place, &half);
        }
        assert_eq!(cache.order, [2, 3]);
        assert_eq!((cache.found.len(), cache.bytes), (2, CACHED_BYTES / 2 * 2));
    }
}
