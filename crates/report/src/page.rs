//! `report.html`: one file that needs nothing beside it, no network and no script.

use std::fmt::Write as _;

use anyhow::Result;
use data::{Images, Names};
use rayon::prelude::*;

use crate::clusters::{Cluster, Member};
use crate::curves::Chart;
use crate::scores::Scores;
use crate::thumbnail;

/// What the page tells.
pub struct Page<'a> {
    /// Its heading.
    pub title: &'a str,
    /// What was found, in a sentence each.
    pub facts: Vec<String>,
    /// By round, where there is ground truth.
    pub scores: Vec<(String, Scores)>,
    /// All clusters.
    pub clusters: &'a [Cluster],
    /// Pictures to show of each, at most.
    pub shown: usize,
    /// By step, its charts.
    pub charts: Vec<(String, Vec<Chart>)>,
}

impl Page<'_> {
    /// The page as HTML: the largest cluster first.
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
        if self.scores.is_empty() {
            return;
        }
        html.push_str(
            "<h2>Scores</h2>\n<p>Agreement with the ground truth, in percent. No training saw it.</p>\n\
             <table><tr><th>round<th>ACC<th>NMI<th>ARI<th>ACC of k-means</tr>\n",
        );
        for (step, scores) in &self.scores {
            let _ = write!(html, "<tr><td>{}", escaped(step));
            for score in [scores.acc, scores.nmi, scores.ari, scores.k_means_acc] {
                let _ = match score {
                    Some(score) => write!(html, "<td>{:.1}", score * 100.),
                    None => write!(html, "<td>–"),
                };
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</table>\n");
    }

    fn section(&self, cluster: &Cluster, images: &Images, names: &Names) -> Result<String> {
        let count = cluster.members.len();
        let reliable = match cluster.reliable() {
            all if all == count => String::new(),
            some => format!(", {some} reliable"),
        };
        let mut html = format!(
            "<section><h2>Cluster {} <small>{count} pictures{}, mean confidence {:.2}</small></h2>\n",
            cluster.number,
            reliable,
            cluster.confidence()
        );
        let (surest, least_sure) = cluster.shown(self.shown);
        for (caption, members) in [("", surest), ("least sure", least_sure)] {
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

fn image(member: &Member, images: &Images, names: &Names) -> Result<String> {
    let name = escaped(&names.names[member.row as usize]);
    let url = thumbnail::data_url(&*images.picture(member.row)?)?;
    let score = member.score;
    Ok(format!(
        "<img src=\"{url}\" alt=\"{name}\" title=\"{name}, score {score:.2}\" loading=\"lazy\">"
    ))
}

/// Three digits that mean something.
fn short(number: f64) -> String {
    match number.abs() {
        size if size == 0. || (0.01..1000.).contains(&size) => {
            let decimals = (2 - size.max(0.01).log10().floor() as i32).clamp(0, 4) as usize;
            format!("{number:.decimals$}")
        }
        _ => format!("{number:.2e}"),
    }
}

/// Text that is neither markup nor the end of an attribute.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
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
    use super::*;
    use crate::tests::{labels, names, prepared};

    #[test]
    fn the_page_shows_clusters_by_size_and_escapes_what_others_have_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, _) = prepared(folder.path())?;
        let clusters = Cluster::all(&labels());
        let chart = Chart { name: "loss".into(), lines: vec![vec![2., 1.]] };
        let page = Page {
            title: "<script>alert(1)</script>",
            facts: vec!["5 pictures & 3 clusters".into()],
            scores: vec![(
                "0".into(),
                Scores { acc: Some(0.5), nmi: Some(0.25), ari: Some(-0.125), k_means_acc: None },
            )],
            clusters: &clusters,
            shown: 2,
            charts: vec![("0-pretraining".into(), vec![chart]), ("0-embed".into(), vec![])],
        };
        let html = page.html(&images, &names())?;
        assert!(!html.contains("<script"), "{html}");
        assert!(html.contains("&lt;script&gt;alert(1)") && html.contains("5 pictures &amp; 3"));
        let at = |part: &str| html.find(part).unwrap_or_else(|| panic!("{part} is not in: {html}"));
        assert!(at("<h1>") < at("<td>50.0<td>25.0<td>-12.5<td>–"));
        assert!(at("ARI") < at("Cluster 0 <small>4 pictures, 2 reliable, mean confidence 0.62"));
        assert!(at("Cluster 0") < at("Cluster 2 <small>1 pictures"));
        assert!(at("Cluster 2 ") < at("Cluster 1 <small>0 pictures"));
        assert!(at("alt=\"photos/5.png\"") < at("alt=\"photos/1.png\""));
        assert!(at("alt=\"photos/1.png\"") < at("least sure"));
        assert!(at("least sure") < at("alt=\"&lt;photos&gt;/0.png\""));
        assert!(!html.contains("alt=\"photos/6"), "neither surest nor least sure");
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
