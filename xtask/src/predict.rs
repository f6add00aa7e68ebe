//! `cargo xtask predict`: which clusters other pictures belong to, by what a run has learnt.
//!
//! The pictures are prepared as the run's were, `embed` takes the run's last network to them, and
//! `predict` its last head; `metrics` scores the result where there is ground truth, and `report`
//! shows it. What is done already is not done again.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use toml::{Table, Value, toml};

use crate::finished::{Finished, Which, target};
use crate::key::{self, Key};
use crate::prepared::{self, Prepared};
use crate::programs::{PREPARE, Programs};
use crate::report::Metrics;
use crate::run::{Call, start};
use crate::store::{self, DONE, State, Store};
use stage::Experiment;

/// What is asked for on the command line.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    which: Which,
    /// Where the other pictures are: a folder, an archive, a manifest, an address.
    #[arg(long, value_name = "PATH")]
    images: PathBuf,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Build the programs with these features of cargo: cuda, cudnn, metal.
    #[arg(long, value_name = "LIST", conflicts_with = "programs")]
    features: Option<String>,
}

impl Options {
    /// Makes the paths absolute that are seen from where the user stands.
    pub fn resolve_paths(&mut self) -> Result<()> {
        self.images = prepared::absolute_source(&self.images)?;
        self.which.resolve_paths()
    }
}

const NETWORK: &str = "network.safetensors";
const HEAD: &str = "head.safetensors";
const PROGRAMS: [&str; 5] = [PREPARE, "embed", "predict", "metrics", "report"];

/// Prepares, embeds, predicts, scores and reports; prints where the result is.
///
/// # Errors
///
/// The run is not finished, or a program fails; it says why.
pub fn run(options: &Options) -> Result<()> {
    let run = options.which.find()?;
    let step_with = |file: &str| {
        run.last_with(file).with_context(|| {
            format!(
                "no step in `{}` has left `{file}`; let the run come to its end",
                run.folder.display()
            )
        })
    };
    let (network, head) = (step_with(NETWORK)?, step_with(HEAD)?);
    let file = run.experiment.as_ref().with_context(|| {
        format!(
            "the experiment of `{}` is not beside it; `cargo xtask reproduce` writes it there",
            run.folder.display()
        )
    })?;
    let learnt = Experiment::read(file)?;
    let experiment = experiment(&learnt, &network.place, &options.images)?;

    let programs = match &options.which.programs {
        Some(folder) => Programs::in_folder(&PROGRAMS, folder)?,
        None => Programs::build(&PROGRAMS, options.features.as_deref())?,
    };
    let prepare = programs.get(PREPARE);
    let pictures = Prepared::of(&experiment, Some(&options.images), prepare, &options.which.runs)?;
    let text = experiment.to_toml();
    let experiment_file = pictures.folder.with_extension("predict.toml");
    fs::create_dir_all(options.which.runs.join(".data"))
        .and_then(|()| fs::write(&experiment_file, &text))
        .with_context(|| format!("writing `{}`", experiment_file.display()))?;
    pictures.make(&experiment_file, Some(&options.images), prepare, None)?;

    let store = Store::new(options.which.runs.join(".store"));
    let versions = PROGRAMS[1..4].iter().map(|name| (*name, programs.get(name).version.clone()));
    let record = json!({
        "experiment": text,
        "programs": versions.collect::<BTreeMap<_, _>>(),
        "network": key::header_of(&network.folder.join(NETWORK))?,
        "head": key::header_of(&head.folder.join(HEAD))?,
        "images": pictures.images_identity()?,
        "device": options.device,
    });
    let key = Key::of("predictions", record);
    let folder = store.path(&key);
    let _claim = store.claim(&key)?;
    fs::create_dir_all(&folder).with_context(|| format!("creating `{}`", folder.display()))?;
    let view = run.folder.join("predictions").join(pictures.folder.file_name().unwrap_or_default());
    store::show(&view, &folder)?;
    let [embed, predict, metrics] = ["embed", "predict", "metrics"].map(|step| folder.join(step));
    if store.state(&key) != State::Done {
        let call = Call {
            experiment: &experiment_file,
            images: &pictures.images(),
            round: 0,
            rounds: 0,
            seed: options.which.seed,
            device: &options.device,
        };
        let of_embed = vec![("network", &network.folder)];
        let of_predict = vec![("embeddings", &embed), ("head", &head.folder)];
        let of_metrics = vec![("pseudo-labels", &predict), ("labels", &pictures.folder)];
        for (name, inputs, out) in [
            ("embed", of_embed, &embed),
            ("predict", of_predict, &predict),
            ("metrics", of_metrics, &metrics),
        ] {
            if out.join(DONE).exists() {
                continue;
            }
            fs::create_dir_all(out).with_context(|| format!("creating `{}`", out.display()))?;
            let inputs = inputs.into_iter().map(|(role, folder)| (role, folder.clone()));
            start(name, programs.get(name), &call.arguments(inputs, out))?;
        }
        fs::write(folder.join(DONE), "{}\n")
            .with_context(|| format!("marking `{}` as finished", folder.display()))?;
    }
    report(&run, &folder, &pictures, &programs)?;
    tell(&target(&view))
}

/// What is asked of the programs: the clusters of the run, every split of the pictures, and a network
/// that computes as in training.
///
/// - `place`: of the step that left the network.
fn experiment(learnt: &Experiment, place: &str, images: &Path) -> Result<Experiment> {
    let known = |table: &str, key: &str| {
        let value = learnt.value(table).and_then(|table| table.get(key)).cloned();
        value.with_context(|| {
            format!("`{}` has no `{key}` in table `[{table}]`", learnt.path.display())
        })
    };
    let program = known("stages", place)?;
    let precision = known(program.as_str().unwrap_or(place), "precision")
        .unwrap_or_else(|_| Value::from("f32"));
    let mut tables = toml! {
        system = "predictions"
        [data]
        train-on = ["train", "test", "unlabelled"]
        score-on = ["train", "test", "unlabelled"]
        [prepare]
        format = "auto"
        classes = []
        images-per-class = 0
        images-at-most = 0
        identical = "keep"
        [embed]
        batch-size = 256
        views = 0
        pixels = false
        augmentation = { operations = [] }
        [predict]
        [metrics]
    };
    tables.insert("title".into(), learnt.title()?.into());
    let mut set = |table: &str, key: &str, value: Value| {
        if let Some(Value::Table(table)) = tables.get_mut(table) {
            table.insert(key.into(), value);
        }
    };
    set("data", "clusters", known("data", "clusters")?);
    set("prepare", "source", images.to_string_lossy().into_owned().into());
    set("prepare", "channels", known("prepare", "channels")?);
    set("prepare", "broken-share", known("prepare", "broken-share")?);
    set("embed", "precision", precision);
    Experiment::of_text(&learnt.name, &Table::to_string(&tables))
}

/// Writes the report of the predictions in `folder` beside them.
fn report(run: &Finished, folder: &Path, pictures: &Prepared, programs: &Programs) -> Result<()> {
    let mut step = OsString::from("0-metrics=");
    step.push(folder.join("metrics"));
    let mut arguments: Vec<OsString> = Vec::new();
    for (flag, value) in [
        ("--images", pictures.images().into()),
        ("--names", pictures.folder.join("names.safetensors").into()),
        ("--pseudo-labels", folder.join("predict/pseudo-labels.safetensors").into()),
        ("--step", step),
        ("--title", format!("Other pictures, by {}", run.name()).into()),
        ("--out", folder.join("report").into()),
    ] {
        arguments.extend([flag.into(), value]);
    }
    start("report", programs.get("report"), &arguments)
}

/// Prints the scores, if any, the sizes of the clusters, and where to look.
fn tell(folder: &Path) -> Result<()> {
    let found = Metrics::read(&folder.join("metrics"))?;
    let sizes: Vec<String> = found.sizes.iter().map(usize::to_string).collect();
    let scores = match found.head {
        Some(scores) if scores.acc.is_some() => {
            let percent = |score: Option<f64>| {
                score.map_or("-".into(), |score| format!("{:.1}", 100. * score))
            };
            format!(
                "ACC {}, NMI {}, ARI {}",
                percent(scores.acc),
                percent(scores.nmi),
                percent(scores.ari)
            )
        }
        _ => "no ground truth, so no scores".to_owned(),
    };
    println!("{} images: {scores}; cluster sizes {}", found.images, sizes.join(" "));
    println!("  table: {}", folder.join("report/clusters.csv").display());
    println!("  page: {}", folder.join("report/report.html").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_are_asked_for_what_the_run_was_asked_for() -> Result<()> {
        let learnt = Experiment::of_text(
            "photos",
            "title = 'Photos'\nsystem = 'PLDC'\n[data]\nclusters = 7\ntrain-on = ['train']\n\
             [prepare]\nsource = 'a'\nchannels = 1\nbroken-share = 0.2\nclasses = ['x']\n\
             [stages]\npretraining = 'propos'\nother = '/a/b'\n[propos]\nprecision = 'bf16'",
        )?;
        let asked = experiment(&learnt, "pretraining", Path::new("/new/ones"))?;
        let value =
            |table: &str, key: &str| asked.value(table).and_then(|table| table.get(key)).cloned();
        assert_eq!(value("data", "clusters"), Some(7.into()));
        assert_eq!(value("prepare", "source"), Some("/new/ones".into()));
        assert_eq!(value("prepare", "channels"), Some(1.into()));
        assert_eq!(value("prepare", "classes"), Some(Value::Array(vec![])), "all of them");
        assert_eq!(
            value("embed", "precision"),
            Some("bf16".into()),
            "that of the crate in its place"
        );
        let asked = experiment(&learnt, "other", Path::new("x"))?;
        let precision = asked.value("embed").and_then(|table| table.get("precision")).cloned();
        assert_eq!(precision, Some("f32".into()), "a foreign program has no table");
        assert!(experiment(&learnt, "none", Path::new("x")).is_err());
        Ok(())
    }
}
