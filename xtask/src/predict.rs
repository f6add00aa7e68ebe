//! `assort predict`: assigns other pictures to the clusters of a run.
//!
//! The pictures are prepared like those of the run. `embed` applies the run's last network to them,
//! `predict` its last head, `metrics` scores the result if there is ground truth, and `report`
//! shows it. Finished steps are not repeated.
//!
//! If the run has corrections by hand, the report uses its cluster names and merges. The scores ignore them.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use stage::console::print_line;
use stage::finished::{self, Digests};
use stage::{DeviceChoice, Experiment, Spec, container, files};
use toml::{Table, Value, toml};

use crate::CommandContext;
use crate::advice::Advice;
use crate::clusters::EMBEDDINGS;
use crate::key::{self, StoreKey};
use crate::prepared::PreparedData;
use crate::process::Process;
use crate::programs::{Executable, Programs};
use crate::record::{Recorded, RecordedStep, Which};
use crate::report::{LABELS, REPORT, ReportSummary};
use crate::results::MetricsFile;
use crate::run::Call;
use crate::source::{absolute_source, text_of};
use crate::store::{self, Hold, StepState, Store};

/// The command line.
#[derive(Debug, clap::Args)]
pub struct PredictOptions {
    #[command(flatten)]
    which: Which,
    /// Where the other pictures are: one of them, a folder, an archive, a manifest, an address.
    #[arg(long, value_name = "PATH")]
    images: PathBuf,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

const NETWORK: &str = "network.safetensors";
const HEAD: &str = "head.safetensors";

/// The helper that applies the head.
pub const PREDICT: &str = "predict";

/// The programs of the steps, in order.
const STEPS: [&str; 3] = ["embed", PREDICT, "metrics"];

/// Prepares, embeds, predicts, scores and reports, and prints the paths of the result.
pub fn run(session: &CommandContext, options: &PredictOptions) -> Result<()> {
    let run = options.which.find()?;
    run.removing_damaged(predict(session, &run, options), &session.interrupt)
}

fn predict(session: &CommandContext, run: &Recorded, options: &PredictOptions) -> Result<()> {
    let learnt = Learnt::of(session, run)?;
    let source = absolute_source(&options.images)?;
    let experiment = experiment(&learnt.experiment, &learnt.network_step.place, &source)?;
    let pictures =
        PreparedData::of(session, &experiment, Some(&source), &run.runs, &Advice::Experiment)?;
    let _pictures = pictures.make(None, false)?;

    let prediction = Prediction {
        session,
        run,
        learnt,
        programs: Programs::find(&STEPS, &session.registry)?,
        device: (session.registry.devices.resolve)(options.device)?,
        seed: options.which.seed,
        pictures,
        experiment,
        store: Store::of_steps(&run.runs),
    };
    let folder = prediction.make()?;
    let shown = prediction.report(&folder)?;
    let view = prediction.view();
    // On a system without links, a view is a file.
    tell(if view.is_dir() { &view } else { &folder }, &shown)
}

/// The network and the head of a finished run.
struct Learnt<'a> {
    experiment: Experiment,
    network_step: &'a RecordedStep,
    network: PathBuf,
    /// The folder of the head and of the clusters.
    head: PathBuf,
    _held: Vec<Hold>,
}

impl<'a> Learnt<'a> {
    /// Finds the last network and the last head of one finished plan.
    fn of(session: &CommandContext, run: &'a Recorded) -> Result<Self> {
        if let Some(step) = run.unfinished() {
            bail!(
                "{} is not finished, {} is missing: its last network and its last head may not \
                 belong together; {} with the same values resumes it",
                run.name(),
                step.name,
                run.command()
            )
        }
        let stages = session.registry.specs();
        let step_with = |fits: fn(&Spec) -> bool, file: &str| {
            let step = run.last(&stages, fits).filter(|step| run.path(step).join(file).is_file());
            step.with_context(|| {
                format!(
                    "{} has no `{file}`: the last step that could write it did not, so it cannot \
                     predict",
                    run.name()
                )
            })
        };
        let network_step = step_with(Spec::trains, NETWORK)?;
        let head_step = step_with(Spec::clusters, HEAD)?;
        Ok(Self {
            experiment: run.experiment()?,
            network_step,
            network: run.path(network_step),
            head: run.path(head_step),
            _held: run.hold(&[network_step, head_step], &session.interrupt)?,
        })
    }
}

/// The prediction of a run for other pictures.
struct Prediction<'a> {
    session: &'a CommandContext,
    run: &'a Recorded,
    learnt: Learnt<'a>,
    programs: Programs,
    device: DeviceChoice,
    seed: u64,
    pictures: PreparedData<'a>,
    experiment: Experiment,
    store: Store,
}

impl Prediction<'_> {
    /// Runs the unfinished steps and returns the folder of the result.
    fn make(&self) -> Result<PathBuf> {
        let (key, interrupt) = (self.key()?, &self.session.interrupt);
        let folder = self.store.path(key.name());
        self.store.remove_abandoned()?;
        let _claim = self.store.claim(&key, interrupt)?;
        fs::create_dir_all(&folder).with_context(|| format!("creating `{}`", folder.display()))?;
        files::remove_abandoned(&folder)?;
        store::show(&self.view(), &folder)?;
        // A file of a finished step may be missing: that step runs again.
        let is_whole = STEPS.iter().all(|step| finished::is_finished(&folder.join(step)));
        if !is_whole || self.store.state(key.name()) != StepState::Done {
            let experiment_file = self.store.beside(key.name(), "toml");
            files::write(&experiment_file, self.experiment.to_toml().as_bytes())?;
            self.start_steps(&experiment_file, &folder)?;
            finished::mark(&folder, PREDICT, None, Digests::Listed)?;
        }
        Ok(folder)
    }

    /// The path of the link to the result.
    fn view(&self) -> PathBuf {
        self.run.folder.join("predictions").join(self.pictures.key.name())
    }

    fn key(&self) -> Result<StoreKey> {
        let programs: Vec<_> = STEPS.iter().map(|name| &self.programs.get(name).identity).collect();
        let record = json!({
            "experiment": self.experiment.to_toml(),
            "programs": programs,
            "network": container::header_text(&self.learnt.network.join(NETWORK))?,
            "head": container::header_text(&self.learnt.head.join(HEAD))?,
            "images": self.pictures.images_identity()?,
            "labels": self.pictures.labels_identity()?,
            "machine": key::machine(self.device, self.session.registry.devices.features),
        });
        Ok(StoreKey::of("predictions", record))
    }

    fn start_steps(&self, experiment: &Path, folder: &Path) -> Result<()> {
        let [embed, predict, metrics] = STEPS.map(|step| folder.join(step));
        let images = self.pictures.images();
        let (seed, device) = (self.seed, self.device);
        let call = Call { experiment, images: &images, round: 0, rounds: 0, seed, device };
        let of_embed = vec![("network", &self.learnt.network)];
        let of_predict = vec![("embeddings", &embed), ("head", &self.learnt.head)];
        let of_metrics = vec![("pseudo-labels", &predict), ("labels", &self.pictures.folder)];
        let steps = [(of_embed, &embed), (of_predict, &predict), (of_metrics, &metrics)];
        for (name, (inputs, out)) in STEPS.into_iter().zip(steps) {
            if finished::is_finished(out) {
                continue;
            }
            let inputs = inputs.into_iter().map(|(role, folder)| (role, folder.clone()));
            let arguments = call.arguments(inputs, out);
            self.process(name, self.programs.get(name), &arguments).run(None)?;
        }
        Ok(())
    }

    /// Writes the report of the predictions into their folder. Returns the clusters that it shows.
    fn report(&self, folder: &Path) -> Result<ReportSummary> {
        let mut step = OsString::from("0-metrics=");
        step.push(folder.join("metrics"));
        let mut arguments: Vec<OsString> = Vec::new();
        for (flag, value) in [
            ("--images", self.pictures.images().into()),
            ("--names", self.pictures.folder.join("names.safetensors").into()),
            ("--pseudo-labels", folder.join("predict/pseudo-labels.safetensors").into()),
            ("--step", step),
            ("--title", format!("Other pictures, by {}", self.run.name()).into()),
            ("--out", folder.join("report").into()),
        ] {
            arguments.extend([flag.into(), value]);
        }
        let of_run = [
            ("--embeddings", folder.join("embed").join(EMBEDDINGS)),
            ("--labels", self.pictures.folder.join("labels.safetensors")),
        ];
        for (flag, file) in of_run.into_iter().filter(|(_, file)| file.exists()) {
            arguments.extend([flag.into(), file.into()]);
        }
        if let Some(corrections) = self.run.corrections() {
            tracing::info!("applying the corrections of `{}`", corrections.display());
            for (flag, value) in [
                ("--corrections", corrections),
                ("--corrected-data", self.run.data()),
                ("--corrected-pseudo-labels", self.learnt.head.join(LABELS)),
            ] {
                arguments.extend([flag.into(), value.into()]);
            }
        }
        arguments.push("--json".into());
        let program = Executable::own(REPORT, &self.session.registry)?;
        let printed = self.process(REPORT, &program, &arguments).printed()?;
        serde_json::from_str(&printed)
            .with_context(|| format!("reading what the helper `{REPORT}` printed: {printed}"))
    }

    fn process<'b>(
        &'b self,
        name: &'b str,
        program: &'b Executable,
        arguments: &'b [OsString],
    ) -> Process<'b> {
        Process::of_helper(name, program, arguments, &self.session.interrupt)
    }
}

/// The experiment for the programs: the clusters of the run, every split of the pictures, and the
/// precision of training.
///
/// - `place`: of the step that wrote the network.
fn experiment(learnt: &Experiment, place: &str, images: &Path) -> Result<Experiment> {
    let known = |table: &str, key: &str| {
        let value = learnt.value(table).and_then(|table| table.get(key)).cloned();
        value.with_context(|| {
            format!("`{}` has no `{key}` in table `[{table}]`", learnt.path.display())
        })
    };
    let program = known("stages", place)?;
    let precision = precision(learnt, program.as_str().unwrap_or(place))?;
    let mut tables = toml! {
        system = "predictions"
        [data]
        train-on = ["train", "test", "unlabelled"]
        score-on = ["train", "test", "unlabelled"]
        [prepare]
        format = "photos"
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
    set("prepare", "source", text_of(images).into());
    set("prepare", "channels", known("prepare", "channels")?);
    set("prepare", "broken-share", known("prepare", "broken-share")?);
    set("prepare", "stored-shorter-side", known("prepare", "stored-shorter-side")?);
    set("embed", "precision", precision);
    Experiment::of_text(&learnt.name, &Table::to_string(&tables))
}

/// The precision that the network was trained in: `run.precision` of its program's table. Where the
/// program does not train, as for a published network, or has no table, as a foreign one: `precision`
/// of the run's own `[embed]`, by which the head knows the network.
fn precision(learnt: &Experiment, program: &str) -> Result<Value> {
    let found = match learnt.value(program).and_then(|table| table.get("run")) {
        Some(run) => run.get("precision"),
        None => learnt.value("embed").and_then(|table| table.get("precision")),
    };
    found.cloned().with_context(|| {
        format!(
            "`{}` does not say in which precision to run the network of `{program}`: it has neither \
             `run.precision` in `[{program}]` nor, for a program that does not train, `precision` in \
             `[embed]`",
            learnt.path.display()
        )
    })
}

/// Prints the scores, if any, the cluster sizes, and the paths of the table and the page.
fn tell(folder: &Path, shown: &ReportSummary) -> Result<()> {
    let found = MetricsFile::read(&folder.join("metrics"))?;
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
    print_line(format_args!(
        "{} images: {scores}; cluster sizes {}\n  table: {}\n  page: {}",
        found.images,
        shown.sizes(),
        folder.join("report/clusters.csv").display(),
        folder.join("report/report.html").display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_get_the_values_of_the_run() -> Result<()> {
        let learnt = Experiment::of_text(
            "photos",
            "title = 'Photos'\nsystem = 'PLDC'\n[data]\nclusters = 7\ntrain-on = ['train']\n\
             [prepare]\nsource = 'a'\nchannels = 1\nbroken-share = 0.2\nclasses = ['x']\n\
             stored-shorter-side = 512\n\
             [stages]\npretraining = 'propos'\nother = '/a/b'\n[propos.run]\nprecision = 'bf16'",
        )?;
        let asked = experiment(&learnt, "pretraining", Path::new("/new/ones"))?;
        let value =
            |table: &str, key: &str| asked.value(table).and_then(|table| table.get(key)).cloned();
        assert_eq!(value("data", "clusters"), Some(7.into()));
        assert_eq!(value("prepare", "source"), Some("/new/ones".into()));
        assert_eq!(value("prepare", "channels"), Some(1.into()));
        assert_eq!(value("prepare", "classes"), Some(Value::Array(vec![])), "all of them");
        assert_eq!(value("prepare", "stored-shorter-side"), Some(512.into()));
        assert_eq!(
            value("embed", "precision"),
            Some("bf16".into()),
            "that of the crate in its place"
        );
        Ok(())
    }

    #[test]
    fn a_precision_that_is_not_found_is_an_error_not_f32() -> Result<()> {
        let of = |text: &str| precision(&Experiment::of_text("x", text)?, "propos");
        assert_eq!(
            of("[propos.run]\nprecision = 'bf16'\n[embed]\nprecision = 'f32'")?,
            "bf16".into()
        );
        assert_eq!(
            of("[embed]\nprecision = 'bf16'")?,
            "bf16".into(),
            "a foreign program has no table"
        );
        assert_eq!(
            of("[propos]\nbackbone = 'dinov2-small'\n[embed]\nprecision = 'bf16'")?,
            "bf16".into(),
            "a published network is not trained"
        );
        for text in ["[propos.run]\nepochs = 1\n[embed]\nprecision = 'f32'", "[embed]\nviews = 0"] {
            let error = of(text).expect_err("no precision").to_string();
            assert!(error.contains("run.precision") && error.contains("propos"), "{error}");
        }
        Ok(())
    }

    #[test]
    fn a_place_that_no_program_fills_is_an_error() -> Result<()> {
        let learnt = Experiment::of_text("x", "[stages]\npretraining = 'propos'")?;
        assert!(experiment(&learnt, "none", Path::new("x")).is_err());
        Ok(())
    }
}
