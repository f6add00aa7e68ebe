//! The results of a run: one table for people, one JSON object for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::gain::PairedGain;

/// `metrics.json` of the stage `metrics`. Scores are fractions, and `None` without ground truth.
#[derive(Debug, Clone, Deserialize)]
pub struct MetricsFile {
    /// Number of pictures that were clustered.
    pub images: usize,
    /// Number of clusters K.
    pub clusters: usize,
    /// Scores of the clustering network's assignments.
    pub head: Option<ClassAgreement>,
    /// Scores of k-means on the same embeddings.
    pub kmeans: Option<ClassAgreement>,
    /// The reliable pseudo-labels.
    pub reliable: Option<ReliableScore>,
    /// Share of pictures that kept their cluster since the last round.
    pub stability: Option<f64>,
    /// Pictures in each cluster, largest first.
    #[serde(default)]
    pub sizes: Vec<usize>,
    /// Other results of the same training, by name.
    #[serde(default)]
    pub others: BTreeMap<String, Option<ClassAgreement>>,
}

/// Agreement with the ground truth.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct ClassAgreement {
    /// Accuracy under the best one-to-one map of clusters to classes.
    pub acc: Option<f64>,
    /// Normalised mutual information.
    pub nmi: Option<f64>,
    /// Adjusted Rand index.
    pub ari: Option<f64>,
}

/// Size and quality of the reliable set.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct ReliableScore {
    /// Share of all pictures.
    pub share: Option<f64>,
    /// Accuracy inside the set.
    pub acc: Option<f64>,
}

impl MetricsFile {
    /// Reads `metrics.json` in `folder` and checks its digest.
    pub fn read(folder: &Path) -> Result<Self> {
        stage::json::read(&folder.join("metrics.json"))
    }
}

/// The result of one seed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Metrics of the experiment by round.
    pub rounds: Vec<MetricsFile>,
    /// Metrics of k-means on the pixels.
    pub pixels: Option<MetricsFile>,
    /// Metrics of the pretrained embedding; `None` for a system of one phase.
    pub embedding: Option<MetricsFile>,
    /// Metrics of the control by round, without the rounds that it shares with the experiment.
    pub control: Vec<(usize, MetricsFile)>,
    /// The folder of the last assignments.
    pub assignments: PathBuf,
}

/// The results of an experiment over all seeds.
#[derive(Debug, Clone)]
pub struct ExperimentResults {
    /// Name of the experiment.
    pub experiment: String,
    /// Its title.
    pub title: String,
    /// The method.
    pub system: String,
    /// Results by seed.
    pub outcomes: Vec<Outcome>,
    /// Recorded seconds of each step by seed, also of those that ran before.
    pub step_seconds: BTreeMap<String, Vec<f64>>,
    /// Elapsed time of the command in seconds.
    pub seconds: f64,
}

/// Mean and sample standard deviation (n − 1) over the seeds.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistic {
    /// Their mean.
    pub mean: f64,
    deviation: Option<f64>,
    values: Vec<f64>,
}

impl Statistic {
    /// Computes it over these values; `None` if one is `None`.
    pub fn of(values: impl Iterator<Item = Option<f64>>) -> Option<Self> {
        let values: Vec<f64> = values.collect::<Option<_>>()?;
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
        let deviation = (values.len() > 1).then(|| (squares / (n - 1.)).sqrt());
        (!values.is_empty()).then_some(Self { mean, deviation, values })
    }

    /// Formats it in percent.
    pub fn percent(&self) -> String {
        match self.deviation {
            Some(deviation) => format!("{:.1} ± {:.1}", 100. * self.mean, 100. * deviation),
            None => format!("{:.1}", 100. * self.mean),
        }
    }
}

/// A row of the table: one set of metrics per seed.
struct ScoreRow<'a> {
    label: String,
    metrics: Vec<&'a MetricsFile>,
}

impl ScoreRow<'_> {
    fn over(&self, value: impl Fn(&MetricsFile) -> Option<f64>) -> Option<Statistic> {
        Statistic::of(self.metrics.iter().map(|metrics| value(metrics)))
    }

    fn scores(&self, of: fn(&MetricsFile) -> Option<ClassAgreement>) -> [Option<Statistic>; 3] {
        [|s: ClassAgreement| s.acc, |s: ClassAgreement| s.nmi, |s: ClassAgreement| s.ari]
            .map(|part| self.over(|metrics| of(metrics).and_then(part)))
    }
}

fn head(metrics: &MetricsFile) -> Option<ClassAgreement> {
    metrics.head
}

fn kmeans(metrics: &MetricsFile) -> Option<ClassAgreement> {
    metrics.kmeans
}

const COLUMNS: [&str; 8] =
    ["", "ACC", "NMI", "ARI", "k-means ACC", "reliable share", "reliable ACC", "stability"];

impl ExperimentResults {
    /// The table, in percent, and the paths of the assignments.
    pub fn table(&self) -> String {
        let seeds: Vec<_> = self.outcomes.iter().map(|outcome| outcome.seed.to_string()).collect();
        let mut text = format!("{} ({})\n", self.title, self.system);
        if let Some(last) = self.outcomes.first().and_then(|outcome| outcome.rounds.last()) {
            let _ = writeln!(
                text,
                "{} images, {} clusters; {} {}; {:.0} s",
                last.images,
                last.clusters,
                if seeds.len() == 1 { "seed" } else { "seeds" },
                seeds.join(" "),
                self.seconds
            );
        }
        text.push('\n');
        text.push_str(&aligned(&self.cells()));
        text.push('\n');
        self.add_gains(&mut text);
        self.add_details(&mut text);
        text
    }

    /// The table of scores alone; `None` without ground truth.
    pub fn scores(&self) -> Option<String> {
        let last = self.outcomes.first()?.rounds.last()?;
        last.head.or(last.kmeans)?.acc?;
        Some(aligned(&self.cells()))
    }

    fn cells(&self) -> Vec<Vec<String>> {
        let mut lines = vec![COLUMNS.map(str::to_owned).to_vec()];
        let with_details = self.rounds().into_iter().chain(self.control());
        for row in with_details {
            let mut cells = row.scores(head).to_vec();
            cells.push(row.over(|metrics| metrics.kmeans.and_then(|scores| scores.acc)));
            cells.push(row.over(|metrics| metrics.reliable.and_then(|set| set.share)));
            cells.push(row.over(|metrics| metrics.reliable.and_then(|set| set.acc)));
            cells.push(row.over(|metrics| metrics.stability));
            lines.push(line(&row.label, &cells));
        }
        for (name, scores) in self.others() {
            lines.push(line(&name, &scores));
        }
        for row in [self.pixels(), self.embedding()].into_iter().flatten() {
            lines.push(line(&row.label, &row.scores(kmeans)));
        }
        lines
    }

    /// The last round's scores over those of the control's last round, if there is one with scores.
    fn add_gains(&self, text: &mut String) {
        let [Some(acc), Some(nmi), Some(ari)] = self.gains() else { return };
        let verdict = match (acc.is_gain(), nmi.is_gain(), ari.is_gain()) {
            (None, ..) => "one seed shows nothing",
            (Some(false), ..) => "no gain shown",
            (Some(true), Some(false), Some(false)) => "a doubtful gain, in ACC alone",
            (Some(true), ..) => "a gain",
        };
        let _ = writeln!(text, "over the control: ACC {acc}, NMI {nmi}, ARI {ari}: {verdict}\n");
    }

    /// ACC, NMI and ARI over the control, paired by seed.
    fn gains(&self) -> [Option<PairedGain>; 3] {
        let part = |of: fn(ClassAgreement) -> Option<f64>| {
            let score = |metrics: Option<&MetricsFile>| metrics?.head.and_then(of);
            PairedGain::of(self.outcomes.iter().map(|outcome| {
                let control = outcome.control.last().map(|(_, metrics)| metrics);
                (score(outcome.rounds.last()), score(control))
            }))
        };
        [part(|s| s.acc), part(|s| s.nmi), part(|s| s.ari)]
    }

    fn add_details(&self, text: &mut String) {
        for outcome in &self.outcomes {
            let Some(last) = outcome.rounds.last() else { continue };
            let sizes: Vec<_> = last.sizes.iter().map(usize::to_string).collect();
            let accuracy = match last.head.and_then(|scores| scores.acc) {
                Some(accuracy) => format!("ACC {:.2}", 100. * accuracy),
                None => "no ground truth, so no scores".to_owned(),
            };
            let assignments = outcome.assignments.as_path();
            let run = assignments.parent().and_then(Path::parent).unwrap_or(assignments);
            let _ = writeln!(
                text,
                "seed {}: {accuracy}; cluster sizes {}\n  assignments: {}\n  to look at them: assort \
                 report {}",
                outcome.seed,
                sizes.join(" "),
                assignments.display(),
                run.display()
            );
        }
    }

    /// The results as one JSON object; scores are fractions.
    pub fn json(&self) -> Value {
        let rounds: Vec<_> = self.rounds().iter().enumerate().map(round_json).collect();
        let scores = self.rounds().last().map(|row| scores_json(&row.scores(head)));
        let baseline = |row: Option<ScoreRow>| row.map(|row| scores_json(&row.scores(kmeans)));
        let control = self.control();
        let [acc, nmi, ari] =
            self.gains().map(|gain| gain.as_ref().map_or(Value::Null, PairedGain::json));
        let gain = json!({ "acc": acc, "nmi": nmi, "ari": ari });
        let first = self.outcomes.first();
        let numbers = first.map(|outcome| outcome.control.iter().map(|(round, _)| *round));
        let control_rounds: Vec<_> =
            numbers.into_iter().flatten().zip(&control).map(round_json).collect();
        json!({
            "experiment": self.experiment,
            "system": self.system,
            "seeds": self.outcomes.iter().map(|outcome| outcome.seed).collect::<Vec<_>>(),
            "images": first.and_then(|outcome| outcome.rounds.last()).map(|last| last.images),
            "rounds": rounds,
            "scores": scores,
            "others": self.others().iter().map(|(name, scores)| (name.clone(), scores_json(scores)))
                .collect::<serde_json::Map<_, _>>(),
            "baselines": {
                "kmeans-pixels": baseline(self.pixels()),
                "kmeans-embedding": baseline(self.embedding()),
            },
            "control": control.last().map(|row| json!({
                "rounds": control_rounds,
                "scores": scores_json(&row.scores(head)),
                "gain": gain,
            })),
            "assignments":
                self.outcomes.iter().map(|outcome| &outcome.assignments).collect::<Vec<_>>(),
            "seconds": self.seconds,
        })
    }

    /// The rows of the experiment, one per round.
    fn rounds(&self) -> Vec<ScoreRow<'_>> {
        let count = self.outcomes.iter().map(|outcome| outcome.rounds.len()).min().unwrap_or(0);
        let row = |round: usize| ScoreRow {
            label: format!("round {round}"),
            metrics: self.outcomes.iter().map(|outcome| &outcome.rounds[round]).collect(),
        };
        (0..count).map(row).collect()
    }

    /// The rows of the control, one per round in which it differs.
    fn control(&self) -> Vec<ScoreRow<'_>> {
        let count = self.outcomes.iter().map(|outcome| outcome.control.len()).min().unwrap_or(0);
        let row = |position: usize| ScoreRow {
            label: format!("control, round {}", self.outcomes[0].control[position].0),
            metrics: self.outcomes.iter().map(|outcome| &outcome.control[position].1).collect(),
        };
        (0..count).map(row).collect()
    }

    /// Other results of the last round, by name.
    fn others(&self) -> Vec<(String, [Option<Statistic>; 3])> {
        let rounds = self.rounds();
        let Some(last) = rounds.last() else { return Vec::new() };
        let names = last.metrics.first().map(|metrics| metrics.others.keys().cloned());
        let scores = |name: String| {
            let part = |of: fn(ClassAgreement) -> Option<f64>| {
                last.over(|metrics| metrics.others.get(&name).copied().flatten().and_then(of))
            };
            let scores = [part(|s| s.acc), part(|s| s.nmi), part(|s| s.ari)];
            (name, scores)
        };
        names.into_iter().flatten().map(scores).collect()
    }

    /// The row of k-means on pixels.
    fn pixels(&self) -> Option<ScoreRow<'_>> {
        let metrics: Option<Vec<_>> =
            self.outcomes.iter().map(|outcome| outcome.pixels.as_ref()).collect();
        Some(ScoreRow { label: "k-means on pixels".into(), metrics: metrics? })
    }

    /// The row of k-means on the pretrained embedding.
    fn embedding(&self) -> Option<ScoreRow<'_>> {
        let metrics: Option<Vec<_>> =
            self.outcomes.iter().map(|outcome| outcome.embedding.as_ref()).collect();
        Some(ScoreRow { label: "k-means on the pretrained embedding".into(), metrics: metrics? })
    }
}

fn line(label: &str, cells: &[Option<Statistic>]) -> Vec<String> {
    let cell = |cell: &Option<Statistic>| cell.as_ref().map_or("-".to_owned(), Statistic::percent);
    [label.to_owned()].into_iter().chain(cells.iter().map(cell)).collect()
}

/// Aligns lines as columns: the first column to the left, the others to the right.
pub fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max()
    };
    let mut text = String::new();
    for line in lines {
        for (column, cell) in line.iter().enumerate() {
            let width = width(column).unwrap_or(0);
            let _ = match column {
                0 => write!(text, "{cell:width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

fn round_json((round, row): (usize, &ScoreRow)) -> Value {
    json!({
        "round": round,
        "head": scores_json(&row.scores(head)),
        "kmeans": scores_json(&row.scores(kmeans)),
        "reliable": {
            "share": statistic_json(&row.over(|m| m.reliable.and_then(|set| set.share))),
            "acc": statistic_json(&row.over(|m| m.reliable.and_then(|set| set.acc))),
        },
        "stability": statistic_json(&row.over(|m| m.stability)),
    })
}

/// ACC, NMI and ARI as JSON.
pub fn scores_json([acc, nmi, ari]: &[Option<Statistic>; 3]) -> Value {
    json!({
        "acc": statistic_json(acc),
        "nmi": statistic_json(nmi),
        "ari": statistic_json(ari),
    })
}

/// A statistic as JSON; null for `None`.
fn statistic_json(statistic: &Option<Statistic>) -> Value {
    statistic.as_ref().map_or(Value::Null, |statistic| {
        json!({
            "mean": statistic.mean,
            "std": statistic.deviation,
            "values": statistic.values,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(acc: f64, labelled: bool) -> MetricsFile {
        let scores = |acc: f64| json!({"acc": acc, "nmi": acc - 0.1, "ari": acc - 0.2});
        let text = json!({
            "images": 30,
            "clusters": 3,
            "head": labelled.then(|| scores(acc)),
            "kmeans": labelled.then(|| scores(acc - 0.05)),
            "reliable": { "share": 0.5, "acc": labelled.then_some(0.99) },
            "stability": null,
            "sizes": [12, 10, 8],
        });
        serde_json::from_value(text).expect("as metrics writes it")
    }

    fn report(labelled: bool, accuracies: &[f64]) -> ExperimentResults {
        let outcome = |(seed, acc): (usize, &f64)| Outcome {
            seed: seed as u64,
            rounds: vec![metrics(acc - 0.1, labelled), metrics(*acc, labelled)],
            pixels: Some(metrics(0.5, labelled)),
            embedding: Some(metrics(acc - 0.1, labelled)),
            control: vec![(1, metrics(acc - 0.02, labelled))],
            assignments: format!("runs/example/{seed}/1-clustering/pseudo-labels.safetensors")
                .into(),
        };
        ExperimentResults {
            experiment: "example".into(),
            title: "Example".into(),
            system: "PLDC".into(),
            outcomes: accuracies.iter().enumerate().map(outcome).collect(),
            step_seconds: BTreeMap::new(),
            seconds: 12.3,
        }
    }

    #[test]
    fn mean_and_deviation_are_those_of_a_sample() {
        let statistic = Statistic::of([Some(1.), Some(2.), Some(4.)].into_iter()).expect("there");
        assert!((statistic.mean - 7. / 3.).abs() < 1e-12);
        // ((4/3)² + (1/3)² + (5/3)²) / 2 = 7/3.
        assert!((statistic.deviation.expect("three") - (7f64 / 3.).sqrt()).abs() < 1e-12);
        assert_eq!(Statistic::of([Some(1.)].into_iter()).expect("there").deviation, None);
        assert_eq!(Statistic::of([Some(1.), None].into_iter()), None);
        assert_eq!(Statistic::of(std::iter::empty()), None);
    }

    #[test]
    fn the_table_has_a_row_for_each_round_then_control_then_baselines() {
        let text = report(true, &[0.9, 0.8]).table();
        let rows: Vec<&str> = text.lines().skip(3).take(6).collect();
        assert!(rows[0].trim_start().starts_with("ACC"), "{text}");
        for (row, start) in rows[1..].iter().zip([
            "round 0  ",
            "round 1  ",
            "control, round 1  ",
            "k-means on pixels  ",
            "k-means on the pretrained embedding  ",
        ]) {
            assert!(row.starts_with(start), "{text}");
        }
        assert!(rows[2].contains("85.0 ± 7.1") && rows[2].contains("80.0 ± 7.1"), "{text}");
        assert!(rows[3].contains("83.0 ± 7.1"), "{text}");
        assert!(rows[4].contains("45.0 ± 0.0"), "{text}");
        assert!(rows[5].contains("70.0 ± 7.1"), "{text}");
        assert!(text.contains("seed 1: ACC 80.00; cluster sizes 12 10 8"), "{text}");
        assert!(text.contains("runs/example/1/1-clustering/pseudo-labels.safetensors"), "{text}");
    }

    #[test]
    fn the_table_says_what_is_gained_over_the_control() {
        let sure = report(true, &[0.9, 0.8]).table();
        let differences = "ACC +2.0 (95 % bound +2.0), NMI +2.0 (95 % bound +2.0)";
        assert!(sure.contains(&format!("over the control: {differences}")), "{sure}");
        assert!(sure.contains(": a gain\n"), "{sure}");
        assert!(report(true, &[0.9]).table().contains(": one seed shows nothing\n"));

        let mut scattered = report(true, &[0.9, 0.8]);
        scattered.outcomes[1].control = vec![(1, metrics(0.82, true))];
        assert!(scattered.table().contains(": no gain shown\n"), "{}", scattered.table());
        let mut without = report(true, &[0.9, 0.8]);
        without.outcomes[0].control.clear();
        assert!(!without.table().contains("over the control"));
        assert!(!report(false, &[0.9]).table().contains("over the control"));

        let mut doubtful = report(true, &[0.9, 0.8]);
        for outcome in &mut doubtful.outcomes {
            let scores = outcome.rounds.last_mut().and_then(|last| last.head.as_mut());
            let scores = scores.expect("scored");
            (scores.nmi, scores.ari) = (Some(0.1), Some(0.1));
        }
        assert!(doubtful.table().contains("a doubtful gain, in ACC alone"), "{}", doubtful.table());
    }

    #[test]
    fn a_system_of_one_phase_has_no_row_of_a_pretrained_embedding() {
        let mut report = report(true, &[0.9, 0.8]);
        for outcome in &mut report.outcomes {
            (outcome.embedding, outcome.pixels) = (None, None);
        }
        assert!(!report.table().contains("k-means on"), "{}", report.table());
        let baselines = &report.json()["baselines"];
        assert!(baselines["kmeans-embedding"].is_null() && baselines["kmeans-pixels"].is_null());
    }

    #[test]
    fn without_ground_truth_the_sizes_and_the_assignments_remain() {
        let text = report(false, &[0.9]).table();
        assert!(text.contains("no ground truth"), "{text}");
        assert!(text.contains("cluster sizes 12 10 8"), "{text}");
        assert!(text.contains("50.0"), "the reliable share needs no labels: {text}");
        assert!(!text.contains("90.0") && !text.contains("NaN"), "{text}");
        let json = report(false, &[0.9]).json();
        assert_eq!(json["scores"]["acc"], Value::Null);
        assert_eq!(json["rounds"][1]["reliable"]["share"]["mean"], 0.5);
    }

    #[test]
    fn the_json_object_has_its_documented_fields() {
        let json = report(true, &[0.9, 0.8]).json();
        let close = |pointer: &str, want: f64| {
            let got = json.pointer(pointer).and_then(Value::as_f64).expect(pointer);
            assert!((got - want).abs() < 1e-9, "{pointer} is {got}, not {want}");
        };
        close("/scores/acc/mean", 0.85);
        close("/scores/acc/std", 0.005f64.sqrt());
        close("/scores/nmi/mean", 0.75);
        close("/scores/ari/mean", 0.65);
        close("/baselines/kmeans-pixels/acc/mean", 0.45);
        close("/baselines/kmeans-embedding/acc/mean", 0.70);
        close("/control/scores/acc/mean", 0.83);
        close("/control/rounds/0/round", 1.);
        close("/control/gain/acc/mean", 0.02);
        close("/control/gain/ari/values/1", 0.02);
        assert_eq!(json.pointer("/control/gain/acc/gain"), Some(&json!(true)));
        close("/rounds/0/kmeans/acc/mean", 0.70);
        close("/seconds", 12.3);
        assert_eq!(json["seeds"], json!([0, 1]));
        assert_eq!(json["experiment"], "example");
        assert_eq!(json["system"], "PLDC");
    }
}
