//! Tables of scores, and training curves, as HTML.

use std::fmt::Write as _;

use data::RoundMetrics;
use data::metrics::Scores;

use crate::curves::Chart;
use crate::html::escaped;

/// Writes the scores of each round against the ground truth.
pub fn write_scores(html: &mut String, rounds: &[(String, RoundMetrics)]) {
    let scored = rounds.iter().filter_map(|(round, m)| Some((round, m.head?, m)));
    let scored: Vec<(&String, Scores, &RoundMetrics)> = scored.collect();
    let Some((.., last)) = scored.last() else { return };
    html.push_str(
        "<h2>Scores</h2>\n<p>Agreement with the ground truth, in percent. No stage trains on \
         it.</p>\n<div class=\"scroll\"><table><tr><th>round<th>ACC<th>NMI<th>ARI<th>AMI<th>ACC of k-means</tr>\n",
    );
    for (round, Scores { acc, nmi, ari, ami }, metrics) in &scored {
        let _ = write!(html, "<tr><td>{}", escaped(round));
        let k_means = metrics.kmeans.map(|scores| scores.acc);
        for score in [Some(*acc), Some(*nmi), Some(*ari), Some(*ami), k_means] {
            let _ = write!(html, "<td>{}", percent(score));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</table></div>\n");
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
pub fn write_classes(html: &mut String, rounds: &[(String, RoundMetrics)]) {
    let Some((_, RoundMetrics { classes: Some(classes), confusion: Some(confusion), .. })) =
        rounds.last()
    else {
        return;
    };
    html.push_str(
        "<h2>Classes</h2>\n<p>Each class with the cluster that the best one-to-one map gives it, \
         in percent: recall is the share of the class that is in the cluster, precision the share \
         of the cluster that is of the class.</p>\n\
         <div class=\"scroll\"><table><tr><th>class<th>pictures<th>cluster<th>recall<th>precision</tr>\n",
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
    html.push_str("</table></div>\n");
    if classes.len() * confusion.len() > MOST_CELLS {
        return;
    }
    html.push_str("<h2>Pictures of each class in each cluster</h2>\n<div class=\"scroll\"><table><tr><th>cluster");
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
    html.push_str("</table></div>\n");
}

/// Writes the training curves of each step.
pub fn write_charts(html: &mut String, charts: &[(String, Vec<Chart>)]) {
    for (step, charts) in charts.iter().filter(|(_, charts)| !charts.is_empty()) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
