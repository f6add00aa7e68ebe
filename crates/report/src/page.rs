//! `report.html`: a self-contained page without scripts.

use std::fmt::Write as _;

use anyhow::Result;
use data::metrics::Scores;
use data::{Images, Names, RoundMetrics};
use rayon::prelude::*;

use crate::clusters::{Cluster, ClusterMember};
use crate::curves::Chart;
use crate::html::escaped;
use crate::thumbnail;

/// The content of the page.
pub struct Page<'a> {
    /// Its heading.
    pub title: &'a str,
    /// Paragraphs below the heading.
    pub facts: Vec<String>,
    /// The scores of each round.
    pub metrics: Vec<(String, RoundMetrics)>,
    /// All clusters.
    pub clusters: &'a [Cluster],
    /// Most pictures to show of each cluster, besides the ones of lowest score.
    pub shown: usize,
    /// The charts of each step.
    pub charts: Vec<(String, Vec<Chart>)>,
}

impl Page<'_> {
    /// Writes the page as HTML, the largest cluster first.
    ///
    /// # Errors
    ///
    /// A picture is damaged.
    pub fn html(&self, images: &Images, names: &Names) -> Result<String> {
        let title = escaped(self.title);
        let mut html = format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n<h1>{title}</h1>\n"
        );
        for fact in &self.facts {
            let _ = writeln!(html, "<p>{}</p>", escaped(fact));
        }
        self.write_scores(&mut html);
        self.write_classes(&mut html);
        let mut largest_first: Vec<&Cluster> = self.clusters.iter().collect();
        largest_first.sort_by_key(|cluster| std::cmp::Reverse(cluster.members.len())); // Stable.
        let sections: Vec<String> = largest_first
            .par_iter()
            .map(|cluster| self.section(cluster, images, names))
            .collect::<Result<_>>()?;
        html.extend(sections);
        self.write_charts(&mut html);
        Ok(html)
    }

    fn write_scores(&self, html: &mut String) {
        let scored = self.metrics.iter().filter_map(|(round, m)| Some((round, m.head?, m)));
        let scored: Vec<(&String, Scores, &RoundMetrics)> = scored.collect();
        let Some((.., last)) = scored.last() else { return };
        html.push_str(
            "<h2>Scores</h2>\n<p>Agreement with the ground truth, in percent. No stage trains on \
             it.</p>\n<table><tr><th>round<th>ACC<th>NMI<th>ARI<th>AMI<th>ACC of k-means</tr>\n",
        );
        for (round, Scores { acc, nmi, ari, ami }, metrics) in &scored {
            let _ = write!(html, "<tr><td>{}", escaped(round));
            let k_means = metrics.kmeans.map(|scores| scores.acc);
            for score in [Some(*acc), Some(*nmi), Some(*ari), Some(*ami), k_means] {
                let _ = write!(html, "<td>{}", percent(score));
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table>\n");
        if let Some(error) = last.calibration_error {
            let _ = writeln!(
                html,
                "<p>Confidence and accuracy of the last round differ by {:.1} percentage points on \
                 average (calibration error).</p>",
                100. * error
            );
        }
    }

    /// Writes the classes of the last round, and how the clusters divide them.
    fn write_classes(&self, html: &mut String) {
        let Some((_, RoundMetrics { classes: Some(classes), confusion: Some(confusion), .. })) =
            self.metrics.last()
        else {
            return;
        };
        html.push_str(
            "<h2>Classes</h2>\n<p>Each class with the cluster that the best one-to-one map gives it, \
             in percent: recall is the share of the class that is in the cluster, precision the share \
             of the cluster that is of the class.</p>\n\
             <table><tr><th>class<th>pictures<th>cluster<th>recall<th>precision</tr>\n",
        );
        for class in classes {
            let cluster = class.cluster.map_or("–".to_owned(), |cluster| cluster.to_string());
            let _ = writeln!(
                html,
                "<tr><td>{}<td>{}<td>{cluster}<td>{}<td>{}</tr>",
                escaped(&class.name),
                class.images,
                percent(class.recall),
                percent(class.precision)
            );
        }
        html.push_str("</table>\n");
        if classes.len() * confusion.len() > MOST_CELLS {
            return;
        }
        html.push_str("<h2>Pictures of each class in each cluster</h2>\n<table><tr><th>cluster");
        for class in classes {
            let _ = write!(html, "<th>{}", escaped(&class.name));
        }
        html.push_str("</tr>\n");
        for (cluster, counts) in confusion.iter().enumerate() {
            let _ = write!(html, "<tr><td>{cluster}");
            for count in counts {
                let _ = write!(html, "<td>{count}");
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table>\n");
    }

    fn section(&self, cluster: &Cluster, images: &Images, names: &Names) -> Result<String> {
        let count = cluster.members.len();
        let mut html = format!(
            "<section><h2>Cluster {} <small>{count} pictures, mean confidence {:.2}</small></h2>\n",
            cluster.number,
            cluster.confidence()
        );
        let (highest, lowest) = cluster.shown(self.shown);
        for (caption, members) in [("", highest), ("lowest score", lowest)] {
            if members.is_empty() {
                continue;
            }
            let _ = write!(html, "<figure>");
            if !caption.is_empty() {
                let _ = write!(html, "<figcaption>{caption}</figcaption>");
            }
            for member in members {
                html.push_str(&image(member, images, names)?);
            }
            html.push_str("</figure>\n");
        }
        html.push_str("</section>\n");
        Ok(html)
    }

    fn write_charts(&self, html: &mut String) {
        for (step, charts) in self.charts.iter().filter(|(_, charts)| !charts.is_empty()) {
            let _ = write!(html, "<h2>{}, by epoch</h2>\n<div class=\"charts\">", escaped(step));
            for chart in charts {
                let (least, most) = chart.range();
                let last = chart.last().unwrap_or(f64::NAN);
                let _ = write!(
                    html,
                    "<figure>{}<figcaption>{}<br>{} to {}, ends at {}</figcaption></figure>",
                    chart.svg(),
                    escaped(&chart.name),
                    short(least),
                    short(most),
                    short(last)
                );
            }
            html.push_str("</div>\n");
        }
    }
}

fn image(member: &ClusterMember, images: &Images, names: &Names) -> Result<String> {
    let name = escaped(&names.names[member.row as usize]);
    let url = thumbnail::data_url(&*images.picture(member.row)?)?;
    let score = member.score;
    Ok(format!(
        "<img src=\"{url}\" alt=\"{name}\" title=\"{name}, score {score:.2}\" loading=\"lazy\">"
    ))
}

/// Largest confusion matrix that the page shows.
const MOST_CELLS: usize = 2500;

/// Formats a fraction in percent.
fn percent(fraction: Option<f64>) -> String {
    fraction.map_or("–".to_owned(), |fraction| format!("{:.1}", 100. * fraction))
}

/// Formats a number with three significant digits.
fn short(number: f64) -> String {
    match number.abs() {
        size if size == 0. || (0.01..1000.).contains(&size) => {
            let decimals = (2 - size.max(0.01).log10().floor() as i32).clamp(0, 4) as usize;
            format!("{number:.decimals$}")
        }
        _ => format!("{number:.2e}"),
    }
}

const STYLE: &str = "
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h2 small { font-weight: normal; opacity: .7; }
figure { margin: .3rem 0; display: flex; flex-wrap: wrap; gap: 4px; align-items: flex-end; }
figcaption { font-size: 13px; opacity: .7; width: 100%; }
img { height: 80px; min-width: 40px; image-rendering: auto; border-radius: 3px; }
img[src^='data:image/png'] { image-rendering: pixelated; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
path { fill: none; stroke: currentColor; stroke-width: 1.5; opacity: .75; }
";

#[cfg(test)]
mod tests {
    use data::metrics::ClassScores;

    use super::*;
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

    #[test]
    fn the_page_shows_clusters_by_size_and_escapes_names() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        let clusters = Cluster::all(&labels());
        let chart = Chart { name: "loss".into(), lines: vec![vec![2., 1.]] };
        let page = Page {
            title: "<script>alert(1)</script>",
            facts: vec!["5 pictures & 3 clusters".into()],
            metrics: vec![("0".into(), metrics())],
            clusters: &clusters,
            shown: 2,
            charts: vec![("0-pretraining".into(), vec![chart]), ("0-embed".into(), vec![])],
        };
        let html = page.html(&images, &names())?;
        assert!(!html.contains("<script"), "{html}");
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
        assert!(at("Cluster 0") < at("Cluster 2 <small>1 pictures"));
        assert!(at("Cluster 2 ") < at("Cluster 1 <small>0 pictures"));
        assert!(at("alt=\"photos/5.png\"") < at("alt=\"photos/1.png\""));
        assert!(at("alt=\"photos/1.png\"") < at("lowest score"));
        assert!(at("lowest score") < at("alt=\"&lt;photos&gt;/0.png\""));
        assert!(
            !html.contains("alt=\"photos/6"),
            "neither among the highest nor the lowest scores"
        );
        assert_eq!(html.matches("<img ").count(), 4);
        assert!(at("0-pretraining, by epoch") > at("Cluster 1"));
        assert!(!html.contains("0-embed"), "without a chart there is no heading");
        assert!(html.contains("1.00 to 2.00, ends at 1.00"));
        Ok(())
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (number, want) in [
            (0., "0.0000"),
            (0.98765, "0.988"),
            (0.0123456, "0.0123"),
            (12.345, "12.3"),
            (-345.6, "-346"),
            (12345., "1.23e4"),
            (0.00012, "1.20e-4"),
        ] {
            assert_eq!(short(number), want);
        }
    }
}
