//! The files of a run that a page shows.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use data::{Images, Labels, Names, PseudoLabels, RoundMetrics};
use stage::json;

use crate::analysis_cache::AnalysisCache;
use crate::curves::{self, Chart};

/// The files of a run, as the programs `report` and `view` take them.
#[derive(Debug, Clone, clap::Args)]
pub struct RunFiles {
    /// The prepared pictures: images.safetensors.
    #[arg(long, value_name = "FILE")]
    pub images: PathBuf,
    /// Their names: names.safetensors.
    #[arg(long, value_name = "FILE")]
    pub names: PathBuf,
    /// The clusters: pseudo-labels.safetensors.
    #[arg(long, value_name = "FILE")]
    pub pseudo_labels: PathBuf,
    /// The embeddings that were clustered: embeddings.safetensors. Without them there is no map.
    #[arg(long, value_name = "FILE")]
    pub embeddings: Option<PathBuf>,
    /// The ground truth to show beside the clusters: labels.safetensors.
    #[arg(long, value_name = "FILE")]
    pub labels: Option<PathBuf>,
    /// A step of the run, whose metrics.json and log.jsonl are shown. Repeat for several, in order.
    #[arg(long = "step", value_name = "NAME=DIR", value_parser = step)]
    pub steps: Vec<(String, PathBuf)>,
    /// Heading of the page.
    #[arg(long, value_name = "TEXT", default_value = "Clusters")]
    pub title: String,
    /// Folder to keep the map in for the next page of the run; created if missing. Without it, the map is
    /// computed each time.
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// The pictures of a run and their clusters.
pub struct ShownRun {
    /// The prepared pictures.
    pub images: Images,
    /// Their names.
    pub names: Names,
    /// Their clusters.
    pub labels: PseudoLabels,
    /// Ground truth, if the class of at least one picture is known.
    pub truth: Option<Labels>,
}

impl RunFiles {
    /// Opens the files of pictures and clusters.
    ///
    /// # Errors
    ///
    /// A file is missing or damaged, or the files are about different pictures.
    pub fn open(&self) -> Result<ShownRun> {
        let images = Images::open(&self.images)?;
        let names = Names::open(&self.names)?;
        let labels = PseudoLabels::open(&self.pseudo_labels)?;
        let remedy = "give the images and names that the run was made with";
        names.data_set.require(images.data_set(), remedy)?;
        labels.data_set.require(images.data_set(), remedy)?;
        images.keep_decoded(0); // Each picture is decoded once, for its thumbnail.
        let truth = self.labels.as_deref().map(Labels::open).transpose()?;
        if let Some(truth) = &truth {
            let remedy = "give the labels that were prepared with the images";
            truth.data_set.require(images.data_set(), remedy)?;
        }
        let truth = truth.filter(|truth| truth.labels.iter().any(Option::is_some));
        Ok(ShownRun { images, names, labels, truth })
    }

    /// What the embeddings say about the pictures of `labels`, where there are embeddings.
    pub fn analyses<'a>(&'a self, labels: &'a PseudoLabels) -> Option<AnalysisCache<'a>> {
        let embeddings = self.embeddings.as_deref();
        embeddings.map(|embeddings| AnalysisCache::new(self.cache.as_deref(), embeddings, labels))
    }

    /// Reads the scores and curves of the steps.
    ///
    /// # Errors
    ///
    /// The scores of a step are damaged.
    pub fn steps(&self) -> Result<ShownSteps> {
        let mut shown = ShownSteps::default();
        for (step, folder) in &self.steps {
            let path = folder.join(RoundMetrics::FILE);
            if path.exists() {
                let (round, _) = step.split_once('-').unwrap_or((step, ""));
                shown.metrics.push((round.to_owned(), RoundMetrics::read(&path)?));
            }
            match StepLog::read(folder) {
                Ok(log) => {
                    shown.between_heads = log.between_heads.or(shown.between_heads);
                    shown.charts.push((step.clone(), log.charts));
                }
                Err(error) => {
                    tracing::warn!("{error:#}; its curves are left out");
                    shown.facts.push(format!(
                        "The log of {step} was changed after it was written: its curves are left out."
                    ));
                }
            }
        }
        Ok(shown)
    }
}

/// Reads the value of `--step`.
pub(crate) fn step(word: &str) -> Result<(String, PathBuf), String> {
    let (name, folder) = word.split_once('=').ok_or("the form is NAME=DIR")?;
    Ok((name.to_owned(), folder.into()))
}

/// What the page shows of the steps of a run.
#[derive(Debug, Default)]
pub struct ShownSteps {
    /// The scores of each round.
    pub metrics: Vec<(String, RoundMetrics)>,
    /// The charts of each step.
    pub charts: Vec<(String, Vec<Chart>)>,
    /// Mean adjusted Rand index between pairs of heads.
    pub between_heads: Option<f64>,
    /// A sentence for each log that was left out.
    pub facts: Vec<String>,
}

/// What the page shows of the log of a step; nothing where it has no log.
#[derive(Default)]
struct StepLog {
    charts: Vec<Chart>,
    /// Mean adjusted Rand index between pairs of heads.
    between_heads: Option<f64>,
}

impl StepLog {
    fn read(folder: &Path) -> Result<Self> {
        stage::finished::require_log(folder)?;
        let log = folder.join("log.jsonl");
        if !log.exists() {
            return Ok(Self::default());
        }
        let name = || format!("reading the log `{}`", log.display());
        let text = fs::read_to_string(&log).with_context(name)?;
        let charts = curves::charts(&text).with_context(name)?;
        let lines = text.lines().filter_map(|line| json::of_line(line).ok());
        let mut indices = lines.filter_map(|line| line.get("rand-index-between-heads")?.as_f64());
        Ok(Self { charts, between_heads: indices.next_back() })
    }
}
