//! `report.html`: a self-contained page. Without JavaScript it is a list; the script adds a map and a view
//! of each picture.
//!
//! The page loads nothing. Its Content-Security-Policy allows the one script and the one style by their
//! digests, and pictures that are part of the page.
//!
//! [`crate::view`] serves the same page. Its script then fetches numbers, names and pictures when they are seen,
//! and its policy allows that, from the server of the page alone.

use std::borrow::Cow;
use std::fmt::Write as _;

use anyhow::Result;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use data::RoundMetrics;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use stage::console::counted;

use crate::analysis::{Analysis, MOST};
use crate::clusters::{Cluster, NO_CLUSTER};
use crate::curves::Chart;
use crate::gallery::Gallery;
use crate::html::escaped;
use crate::scores::{write_charts, write_classes, write_scores};
use crate::trust::TrustMeasure;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
const SERVED_SCRIPT: &str = include_str!("view/served.js");

/// The content of the page.
pub struct Page<'a> {
    /// Its heading.
    pub title: &'a str,
    /// Paragraphs below the heading.
    pub facts: Vec<String>,
    /// How far the clusters can be trusted.
    pub trust: Vec<TrustMeasure>,
    /// The scores of each round.
    pub metrics: Vec<(String, RoundMetrics)>,
    /// The pictures.
    pub gallery: Gallery<'a>,
    /// Most pictures with a thumbnail.
    pub thumbnails: usize,
    /// The charts of each step.
    pub charts: Vec<(String, Vec<Chart>)>,
    /// What the script needs to know of the server, where the page is served.
    pub served: Option<Value>,
}

/// The Content-Security-Policy of the page.
pub fn policy(is_served: bool) -> String {
    let digest = |text: &str| BASE64_STANDARD.encode(Sha256::digest(text));
    let sources = if is_served { "img-src 'self'; connect-src 'self'" } else { "img-src data:" };
    format!(
        "default-src 'none'; {sources}; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; \
         form-action 'none'",
        digest(STYLE),
        digest(&script(is_served))
    )
}

fn script(is_served: bool) -> Cow<'static, str> {
    if is_served { format!("{SCRIPT}{SERVED_SCRIPT}").into() } else { SCRIPT.into() }
}

impl Page<'_> {
    /// Writes the page as HTML, the largest cluster first.
    ///
    /// # Errors
    ///
    /// A picture is damaged.
    pub fn html(&self) -> Result<String> {
        let chosen = match self.served {
            Some(_) => vec![true; self.gallery.labels.index.len()],
            None => self.gallery.chosen(self.thumbnails),
        };
        let mut sections: Vec<(&str, &str, String)> = Vec::new();
        let mut add = |id, name, write: &mut dyn FnMut(&mut String)| {
            let mut html = String::new();
            write(&mut html);
            if !html.is_empty() {
                sections.push((id, name, html));
            }
        };
        add("trust", "Trust", &mut |html| self.write_trust(html));
        add("scores", "Scores", &mut |html| write_scores(html, &self.metrics));
        let clusters = self.gallery.sections(&chosen)?;
        add("clusters", "Clusters", &mut |html| {
            self.write_left_out(html, &chosen);
            html.push_str(&clusters);
        });
        add("duplicates", "Near-duplicates", &mut |html| {
            self.gallery.write_duplicates(html, &chosen)
        });
        add("outliers", "Outliers", &mut |html| self.gallery.write_outliers(html, &chosen));
        add("classes", "Classes", &mut |html| write_classes(html, &self.metrics));
        add("disagreements", "Disagreements", &mut |html| {
            self.gallery.write_disagreements(html, &chosen);
        });
        add("training", "Training", &mut |html| write_charts(html, &self.charts));

        let mut html = self.head(&sections);
        for (place, (id, _, section)) in sections.iter().enumerate() {
            let _ = writeln!(html, "<section id=\"{id}\">\n{section}</section>");
            if place == 0 {
                html.push_str(if self.gallery.analysis.is_some() { MAP } else { NO_MAP });
            }
        }
        let data = self.data(&chosen).to_string().replace('<', "\\u003c");
        let is_served = self.served.is_some();
        let _ = write!(
            html,
            "</main>\n{VIEW}{}<script type=\"application/json\" id=\"data\">{data}</script>\n\
             <script>{}</script>\n</html>\n",
            if is_served { SERVED } else { "" },
            script(is_served)
        );
        Ok(html)
    }

    fn head(&self, sections: &[(&str, &str, String)]) -> String {
        let title = escaped(self.title);
        let mut html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n<header><h1>{title}</h1>\n",
            policy(self.served.is_some())
        );
        for fact in &self.facts {
            let _ = writeln!(html, "<p>{}</p>", escaped(fact));
        }
        html.push_str("<nav aria-label=\"Sections\">");
        for (id, name, _) in sections {
            let _ = write!(html, "<a href=\"#{id}\">{name}</a>");
        }
        html.push_str("</nav></header>\n<main>\n");
        html
    }

    fn write_trust(&self, html: &mut String) {
        html.push_str("<h2>How far to trust these clusters</h2>\n");
        let low = self.trust.iter().filter(|measure| measure.is_low()).count();
        if self.trust.is_empty() {
            html.push_str(
                "<p>Nothing could be measured: the run kept no embeddings, and no second method or head to \
                 compare with.</p>\n",
            );
        } else if low > 0 {
            let _ = writeln!(
                html,
                "<p class=\"warning\">Look before you rely on these clusters: of {}, {low} {} low.</p>",
                counted(self.trust.len(), "measure"),
                if low == 1 { "is" } else { "are" }
            );
        }
        html.push_str("<ul class=\"trust\">\n");
        for measure in &self.trust {
            let class = if measure.is_low() { " class=\"low\"" } else { "" };
            let warning = if measure.is_low() { measure.warning } else { "" };
            let _ = writeln!(
                html,
                "<li{class}><b>{:.2}</b> {} <br>{warning}</li>",
                measure.value,
                escaped(measure.question)
            );
        }
        let _ = writeln!(html, "</ul>\n<p>{CAUTION}</p>");
    }

    fn write_left_out(&self, html: &mut String, chosen: &[bool]) {
        html.push_str("<h2>Clusters</h2>\n");
        let left = chosen.iter().filter(|&&is_chosen| !is_chosen).count();
        if left > 0 {
            let _ = writeln!(
                html,
                "<p>The page has {} of {} pictures, so that it stays small. <code>clusters.csv</code> beside \
                 it names all; <code>--thumbnails N</code> puts more on the page.</p>",
                chosen.len() - left,
                chosen.len()
            );
        }
        let analysed = self.gallery.analysis.map_or(0, |found| found.places.len());
        if self.gallery.analysis.is_some() && analysed < chosen.len() {
            let _ = writeln!(
                html,
                "<p>Map, neighbours, near-duplicates and outliers are of a random sample of {MOST} \
                 pictures.</p>"
            );
        }
    }

    /// What the script reads. Lists of numbers are little-endian, in Base64. A served page fetches them.
    fn data(&self, chosen: &[bool]) -> Value {
        let Gallery { clusters, labels, truth, analysis, second_best, .. } = self.gallery;
        if let Some(served) = &self.served {
            return json!({
                "clusters": clusters.iter().map(|cluster| cluster.number).collect::<Vec<_>>(),
                "titles": clusters.iter().map(Cluster::title).collect::<Vec<_>>(),
                "classes": truth.map(|truth| &truth.classes),
                "served": served,
            });
        }
        let shown: Vec<u32> =
            (0..chosen.len() as u32).filter(|&place| chosen[place as usize]).collect();
        let confidence: Vec<u8> =
            labels.confidence.iter().map(|&c| (255. * c.min(1.)).round() as u8).collect();
        let own = Cluster::of_places(clusters, chosen.len());
        let mut data = json!({
            "clusters": clusters.iter().map(|cluster| cluster.number).collect::<Vec<_>>(),
            "titles": clusters.iter().map(Cluster::title).collect::<Vec<_>>(),
            "cluster": words(&own),
            "confidence": BASE64_STANDARD.encode(confidence),
            "shown": words(&shown),
            "near": "",
            "second": "",
        });
        if let Some(truth) = truth {
            let label = |&row: &u32| truth.labels[row as usize].unwrap_or(u32::MAX);
            data["classes"] = json!(truth.classes);
            data["label"] = words(&labels.index.iter().map(label).collect::<Vec<_>>()).into();
        }
        if let Some(analysis) = analysis {
            let (near, second) = of_shown(analysis, second_best, &shown);
            data["near"] = words(&near).into();
            data["second"] = words(&second).into();
            let [x, y] = whole_positions(&analysis.map);
            data["map"] =
                json!({ "places": words(&analysis.places), "x": halves(&x), "y": halves(&y) });
        }
        data
    }
}

/// Neighbours `(T, k)` and second-best clusters `(T,)` of the shown pictures; `u32::MAX` where there is none.
fn of_shown(analysis: &Analysis, second_best: &[u32], shown: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let (mut near, mut second) = (Vec::new(), Vec::new());
    for &place in shown {
        let row = analysis.row_of(place);
        second.push(row.map_or(NO_CLUSTER, |row| second_best[row]));
        match row {
            Some(row) => near.extend(analysis.near(row)),
            None => near.extend(vec![u32::MAX; analysis.each]),
        }
    }
    (near, second)
}

/// Positions in `0..65536`, in proportion, in the middle of the shorter side.
pub fn whole_positions(map: &[[f32; 2]]) -> [Vec<u16>; 2] {
    let range = |a: usize| {
        let low = map.iter().map(|y| y[a]).fold(f32::INFINITY, f32::min);
        let high = map.iter().map(|y| y[a]).fold(f32::NEG_INFINITY, f32::max);
        (low, high)
    };
    let ranges = [range(0), range(1)];
    let longer = ranges.iter().map(|(low, high)| high - low).fold(0., f32::max);
    let factor = if longer > 0. { 65535. / longer } else { 0. };
    [0, 1].map(|a| {
        let (low, high) = ranges[a];
        let middle = (low + high) / 2.;
        map.iter().map(|y| (32767.5 + (y[a] - middle) * factor) as u16).collect()
    })
}

fn words(numbers: &[u32]) -> String {
    BASE64_STANDARD.encode(numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
}

fn halves(numbers: &[u16]) -> String {
    BASE64_STANDARD.encode(numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
}

/// What no measure can find out.
const CAUTION: &str = "These measures find out whether the clusters are there for the network, not whether they \
                       are the ones that you want: clusters by background, colour or style can have high values. \
                       Look at the pictures of a few clusters, above all at those of lowest score. The page warns \
                       below 0.5; the first two limits were found on synthetic groups, the third on a few runs, and the fourth is a guess.";

const NO_MAP: &str = "<p>There is no map, and no list of neighbours, near-duplicates and outliers: the run kept no \
                      embeddings of these pictures.</p>\n";

const MAP: &str = r#"<noscript><p>The map and the view of a picture need JavaScript.</p></noscript>
<section id="map" hidden>
<h2>Map</h2>
<p>Similar pictures are near each other. Distances between clusters, and their sizes on the map, mean nothing.</p>
<div class="tools">
<button type="button" id="zoom-in" aria-label="Zoom in">+</button>
<button type="button" id="zoom-out" aria-label="Zoom out">−</button>
<button type="button" id="zoom-reset">Whole map</button>
<button type="button" id="lasso" aria-pressed="false">Draw a selection</button>
<button type="button" id="colour">Colour by class</button>
</div>
<div id="map-frame">
<canvas id="map-canvas" tabindex="0" role="img" aria-label="Map of all pictures. Arrow keys move it, plus and minus zoom, Enter opens the picture in the middle, 0 shows all. The sections below list the same pictures.">The sections below list the pictures of the map.</canvas>
<div id="tip" hidden></div>
</div>
<div class="tools" id="legend" role="group" aria-label="Show only"></div>
<div id="chosen" hidden>
<div class="tools"><b id="chosen-count" aria-live="polite"></b> <button type="button" id="clear">Show all</button></div>
<div class="strip" id="chosen-strip"></div>
</div>
</section>
"#;

const VIEW: &str = r#"<dialog id="view" aria-labelledby="view-name">
<div class="tools">
<button type="button" id="view-back">← Previous</button>
<button type="button" id="view-next">Next →</button>
<button type="button" id="view-close">Close</button>
</div>
<img id="view-picture" alt="">
<h2><bdi id="view-name"></bdi></h2>
<dl id="view-facts"></dl>
<h3 id="view-near-title">Most similar pictures</h3>
<div class="strip" id="view-near"></div>
</dialog>
"#;

/// What only a served page has.
const SERVED: &str = r#"<div id="trouble" class="warning" role="alert" hidden>
<span id="trouble-text"></span> <button type="button" id="trouble-close">Close</button>
</div>
<div id="edits" class="tools" role="region" aria-label="Corrections">
<button type="button" id="select" aria-pressed="false" title="Or hold Ctrl, or press Space on a picture; with Shift, all up to it">Select pictures</button>
<b id="selected-count" aria-live="polite"></b>
<span id="with-selected" class="tools" hidden>
<button type="button" id="move">Move to …</button>
<button type="button" id="mark-wrong">Mark as wrong</button>
<button type="button" id="mark-outlier">Mark as outlier</button>
<button type="button" id="unmark" title="Puts pictures back where the run has them">Move back</button>
<button type="button" id="deselect">Deselect</button>
</span>
<button type="button" id="undo" title="Ctrl-Z" disabled>Undo</button>
<span id="saved" role="status"></span>
<details id="exports"><summary>Export</summary><div>
<a href="export/clusters.csv" download>CSV</a>
<a href="export/clusters.json" download>JSON</a>
<a href="export/clusters.parquet" download>Parquet</a>
<p>Folders of pictures: <code>assort report RUN --copy-to DIR</code></p>
</div></details>
</div>
<dialog id="rename" aria-labelledby="rename-title">
<h2 id="rename-title"></h2>
<label>Name <input id="rename-name" maxlength="100" autocomplete="off"></label>
<div class="tools"><button type="button" id="rename-save">Save</button> <button type="button" id="rename-cancel">Cancel</button></div>
</dialog>
<dialog id="merge" aria-labelledby="merge-title">
<h2 id="merge-title"></h2>
<select id="merge-with" aria-labelledby="merge-title"></select>
<div class="tools"><button type="button" id="merge-save">Merge</button> <button type="button" id="merge-cancel">Cancel</button></div>
</dialog>
<dialog id="move-dialog" aria-labelledby="move-title">
<h2 id="move-title"></h2>
<select id="move-to" aria-labelledby="move-title"></select>
<div class="tools"><button type="button" id="move-save">Move</button> <button type="button" id="move-cancel">Cancel</button></div>
</dialog>
"#;

#[cfg(test)]
mod tests {
    use data::metrics::{ClassScores, Scores};
    use data::{Images, Labels, Names, PseudoLabels};
    use stage::Interrupt;

    use super::*;
    use crate::analysis::{ClusterAnalysis, UnitRows};
    use crate::tests::{labels, names, prepared};

    fn metrics() -> RoundMetrics {
        let scores = Scores { acc: 0.5, nmi: 0.25, ari: -0.125, ami: 0.125 };
        let class = ClassScores {
            name: "<cats>".into(),
            images: 4,
            cluster: Some(2),
            precision: None,
            recall: Some(0.25),
        };
        RoundMetrics {
            head: Some(scores),
            calibration_error: Some(0.075),
            classes: Some(vec![class]),
            confusion: Some(vec![vec![3], vec![0], vec![1]]),
            ..crate::tests::metrics()
        }
    }

    struct Shown<'a> {
        images: &'a Images,
        names: Names,
        labels: PseudoLabels,
        clusters: Vec<Cluster>,
    }

    impl<'a> Shown<'a> {
        fn new(images: &'a Images) -> Self {
            let labels = labels();
            Self { images, names: names(), clusters: Cluster::all(&labels), labels }
        }

        fn page<'b>(
            &'b self,
            truth: Option<&'b Labels>,
            analysis: Option<&'b (Analysis, ClusterAnalysis)>,
        ) -> Page<'b> {
            let chart = Chart { name: "loss".into(), lines: vec![vec![2., 1.]] };
            Page {
                title: "<script>alert(1)</script>",
                facts: vec!["5 pictures & 3 clusters".into()],
                trust: vec![],
                metrics: vec![("0".into(), metrics())],
                gallery: Gallery {
                    images: self.images,
                    names: &self.names,
                    labels: &self.labels,
                    clusters: &self.clusters,
                    truth,
                    analysis: analysis.map(|(pictures, _)| pictures),
                    similar: analysis.map_or(&[], |(_, clusters)| &clusters.similar),
                    second_best: analysis.map_or(&[], |(_, clusters)| &clusters.second_best),
                    shown: 2,
                    is_served: false,
                },
                thumbnails: 4,
                charts: vec![("0-pretraining".into(), vec![chart]), ("0-embed".into(), vec![])],
                served: None,
            }
        }
    }

    #[test]
    fn the_page_shows_clusters_by_size_and_escapes_names() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        let shown = Shown::new(&images);
        let html = shown.page(None, None).html()?;
        assert_eq!(html.matches("<script").count(), 2, "the data and the script");
        assert!(html.contains("&lt;script&gt;alert(1)") && html.contains("5 pictures &amp; 3"));
        let at = |part: &str| html.find(part).unwrap_or_else(|| panic!("{part} is not in: {html}"));
        assert!(at("<h1>") < at("<td>50.0<td>25.0<td>-12.5<td>12.5<td>–"));
        assert!(html.contains("differ by 7.5 percentage points"));
        assert!(html.contains("<tr><td>&lt;cats&gt;<td>4<td>2<td>25.0<td>–</tr>"), "{html}");
        assert!(
            html.contains("<tr><th>cluster<th>&lt;cats&gt;</tr>\n<tr><td>0<td>3</tr>"),
            "{html}"
        );
        assert!(at("ARI") < at("Cluster 0 <small>4 pictures, mean confidence 0.62"));
        assert!(at("Cluster 0") < at("Cluster 2 <small>1 picture,"));
        assert!(at("Cluster 2 ") < at("Cluster 1 <small>0 pictures"));
        assert!(at("alt=\"photos/5.png\"") < at("alt=\"photos/1.png\""));
        assert!(at("alt=\"photos/1.png\"") < at("<figcaption>lowest score"));
        assert!(at("<figcaption>lowest score") < at("alt=\"&lt;photos&gt;/0.png\""));
        assert!(!html.contains("alt=\"photos/6"), "not among the four that the page has room for");
        assert!(html.contains("Not on this page: 1 picture of this cluster"));
        assert!(html.contains("The page has 4 of 5 pictures"));
        assert_eq!(html.matches("<a class=\"p\"").count(), 4);
        assert!(at("0-pretraining, by epoch") > at("Cluster 1"));
        assert!(!html.contains("0-embed"), "without a chart there is no heading");
        assert!(html.contains("1.00 to 2.00, ends at 1.00"));
        assert!(html.contains("There is no map") && html.contains("Nothing could be measured"));
        // With room for all, the last picture is folded away.
        let all = Page { thumbnails: 5, ..shown.page(None, None) }.html()?;
        assert!(
            all.contains("<summary>1 more picture</summary>") && !all.contains("Not on this page")
        );
        Ok(())
    }

    #[test]
    fn script_and_style_are_allowed_by_their_digests_and_nothing_else_is() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        let html = Shown::new(&images).page(None, None).html()?;
        let between = |start: &str, end: &str| {
            html.split_once(start).and_then(|(_, rest)| rest.split_once(end)).expect("there").0
        };
        for (kind, text) in [
            ("style", between("<style>", "</style>")),
            ("script", between("<script>", "</script>")),
        ] {
            let digest = BASE64_STANDARD.encode(Sha256::digest(text));
            assert!(html.contains(&format!("{kind}-src 'sha256-{digest}'")), "{kind}");
        }
        assert!(html.contains("default-src 'none'; img-src data:;"));
        for part in [" style=", " onclick=", "http:", "https:", "//cdn"] {
            assert!(!html.contains(part), "{part}");
        }
        Ok(())
    }

    #[test]
    fn classes_and_the_pictures_that_disagree_are_shown_where_there_is_ground_truth() -> Result<()>
    {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        let shown = Shown::new(&images);
        let truth = Labels {
            data_set: shown.labels.data_set.clone(),
            labels: vec![Some(0), Some(1), None, Some(1), None, Some(1), None],
            classes: vec!["<b>cat".into(), "dog".into()],
        };
        let html = shown.page(Some(&truth), None).html()?;
        assert!(html.contains("<bdi>dog</bdi> 67 %, <bdi>&lt;b&gt;cat</bdi> 33 %"), "{html}");
        assert!(html.contains("Of another class than most of their cluster: 1 picture."), "{html}");
        assert!(html.contains(
            "<a class=\"ref\" href=\"#i0\"><bdi>&lt;photos&gt;/0.png</bdi></a></div><bdi>&lt;b&gt;cat</bdi> in \
             <a href=\"#c0\">cluster 0</a>, which is mostly <bdi>dog</bdi>"
        ));
        Ok(())
    }

    #[test]
    fn one_cluster_and_few_pictures_make_a_page_with_a_map() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        for count in 0..=3 {
            let mut shown = Shown::new(&images);
            let labels = &mut shown.labels;
            labels.clusters = 1;
            labels.index.truncate(count);
            labels.assignment = vec![0; count];
            labels.kmeans_assignment = vec![0; count];
            labels.confidence.truncate(count);
            labels.score.truncate(count);
            labels.reliable.truncate(count);
            shown.clusters = Cluster::all(&shown.labels);
            let rows = UnitRows::of(&[1., 0., 0., 1., 0.6, 0.8][..2 * count], 2);
            let clusters = ClusterAnalysis::of(&rows, &vec![0; count], 1);
            let analysis = (Analysis::of(&rows, &Interrupt::default())?, clusters);
            let html = shown.page(None, Some(&analysis)).html()?;
            assert_eq!(html.matches("<a class=\"p\"").count(), count);
            assert!(html.contains("id=\"map-canvas\"") && html.contains("Cluster 0"), "{count}");
        }
        Ok(())
    }

    #[test]
    fn data_for_the_script_cannot_end_it() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        let shown = Shown::new(&images);
        let truth = Labels {
            data_set: shown.labels.data_set.clone(),
            labels: vec![Some(0); 7],
            classes: vec!["</script><script>alert(1)//<!--".into()],
        };
        let html = shown.page(Some(&truth), None).html()?;
        assert_eq!(html.matches("</script>").count(), 2);
        let (_, data) = html.split_once("id=\"data\">").expect("data");
        let data: Value = serde_json::from_str(data.split_once("</script>").expect("an end").0)?;
        assert_eq!(data["classes"][0], truth.classes[0]);
        assert_eq!(data["clusters"], json!([0, 1, 2]));
        let little_endian = BASE64_STANDARD.decode(data["cluster"].as_str().expect("text"))?;
        assert_eq!(
            little_endian,
            [[0; 8], [2, 0, 0, 0, 0, 0, 0, 0]]
                .concat()
                .into_iter()
                .chain([0; 4])
                .collect::<Vec<u8>>()
        );
        Ok(())
    }

    #[test]
    fn positions_fill_a_square_in_proportion() {
        let [x, y] = whole_positions(&[[-1., 0.], [3., 0.5], [1., 1.]]);
        assert_eq!((x, y), (vec![0, 65535, 32767], vec![24575, 32767, 40959]));
        assert_eq!(whole_positions(&[[2., 2.]]), [vec![32767], vec![32767]]);
    }
}
