//! The whole stage on a small network and small pictures.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use backbone::{Configuration, network_file};
use candle_core::{Device, Tensor};
use data::images::{self, StoredPicture};
use data::views::Input;
use data::{Images, Loader, Picture, PseudoLabels};
use prototype_refinement::loss::Marks;
use prototype_refinement::{Config, PrototypeRefinement, PrototypeUpdate, draws};
use stage::{DataTable, Job, Split, Stage};
use training::loss::regression_loss;
use training::scatter::{Absent, scatter_loss};
use training::{Cosine, Learner, LearningRate, Precision, SgdTable, Target, TargetDecay, sampler};

const IMAGES: usize = 24;
const CLUSTERS: usize = 3;
const WIDTH: usize = 8;

const SGD: SgdTable = SgdTable {
    peak_learning_rate: 0.5,
    predictor_learning_rate_factor: 10.,
    momentum: 0.9,
    weight_decay: 5e-4,
};

/// A folder with pictures, a network of random weights, and pseudo-labels.
struct RefinementTest {
    folder: tempfile::TempDir,
}

impl RefinementTest {
    fn new() -> Result<Self> {
        let experiment = Self { folder: tempfile::tempdir()? };
        let source = |i| {
            // Taller than wide, and a pattern that no mirror image repeats.
            let pixels = (0..12 * 8).map(|p| ((p * p + 31 * i * (p % 7)) % 251) as u8).collect();
            Ok((StoredPicture::raw(Picture::new(12, 8, 1, pixels)?, 1)?, Split::Train))
        };
        let sources = (0..IMAGES).map(source).collect::<Result<_>>()?;
        images::write(&experiment.at("images.safetensors"), 1, sources)?;

        let configuration: Configuration = serde_json::from_value(serde_json::json!({
            "backbone": { "depth": "10", "width": 4, "stem": "3x3" },
            "projector": { "hidden": 16, "width": WIDTH },
            "predictor": { "hidden": 16 },
            "channels": 1,
            "input": { "height": 12, "width": 8, "channels": 1, "mean": [0.4], "std": [0.3],
                       "clean": [] },
        }))?;
        for name in ["network", "pseudo-labels"] {
            fs::create_dir(experiment.at(name))?;
        }
        let mut learner = Learner::random(&configuration, SGD, Precision::F32, 7)?;
        configuration.write(&experiment.at("network"))?;
        let tensors = training::network_tensors(&mut learner)?;
        network_file::write_tensors(&experiment.at("network"), &tensors)?;
        experiment.write_labels(0.8, None)?;
        Ok(experiment)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The network that refinement starts from.
    fn learner(&self) -> Result<Learner> {
        let configuration = Configuration::read(&self.at("network"))?;
        Learner::open(&self.at("network"), &configuration, SGD, Precision::F32)
    }

    /// Pseudo-labels in which every image of even number is reliable, with scores up to this one.
    fn write_labels(&self, score: f32, stability: Option<f64>) -> Result<()> {
        let images = Images::open(&self.at("images.safetensors"))?;
        let mut prototypes = vec![0.; CLUSTERS * WIDTH];
        (0..CLUSTERS).for_each(|k| prototypes[k * WIDTH + k] = 1.);
        PseudoLabels {
            data_set: images.data_set().clone(),
            clusters: CLUSTERS,
            index: (0..IMAGES as u32).collect(),
            assignment: (0..IMAGES as u32).map(|i| i % 3).collect(),
            kmeans_assignment: vec![0; IMAGES],
            confidence: vec![1.; IMAGES],
            score: (0..IMAGES).map(|i| score * (1. - (i % 5) as f32 / 10.)).collect(),
            reliable: (0..IMAGES).map(|i| i % 2 == 0).collect(),
            projection_width: WIDTH,
            prototypes,
            stability,
            head_agreement: None,
        }
        .write(&self.at("pseudo-labels").join("pseudo-labels.safetensors"))?;
        // Another stage's file beside them, which refinement must leave alone.
        Ok(fs::write(self.at("pseudo-labels").join("head.safetensors"), b"weights")?)
    }

    fn refine(
        &self,
        config: &Config,
        out: &str,
        round: usize,
        inputs: &[(&str, &str)],
    ) -> Result<Vec<u8>> {
        let job = self.job(out, round, inputs)?;
        PrototypeRefinement::run(config, &job)?;
        Ok(fs::read(job.out.join("network.safetensors"))?)
    }

    fn job(&self, out: &str, round: usize, inputs: &[(&str, &str)]) -> Result<Job> {
        let out = self.at(out);
        fs::create_dir_all(&out)?;
        let inputs: BTreeMap<String, PathBuf> =
            inputs.iter().map(|(role, name)| ((*role).to_owned(), self.at(name))).collect();
        let data = DataTable {
            clusters: CLUSTERS,
            train_on: vec![Split::Train],
            score_on: vec![Split::Train],
        };
        let images = self.at("images.safetensors");
        let job = Job::new("prototype-refinement", images, &out, data);
        Ok(Job { inputs, round, rounds: 2, seed: 3, ..job })
    }

    fn first_round(&self, config: &Config, out: &str) -> Result<Vec<u8>> {
        self.refine(config, out, 1, &[("network", "network"), ("pseudo-labels", "pseudo-labels")])
    }
}

fn config() -> Config {
    let text = r#"
        noise = 0.0
        sample-to-prototype-weight = 0.0
        sample-to-prototype-gate = 0.99
        scatter-weight = 0.0
        sample-to-prototype-temperature = 0.2
        scatter-temperature = 0.5
        ramp-epochs = 1.0
        prototypes = "epoch"
        sampling = "uniform"
        views = { operations = [{ operation = "flip", probability = 0.5 },
                                { operation = "noise", deviation = 0.1 }] }
        [run]
        epochs = 2
        batch-size = 8
        batch-groups = 1
        precision = "f32"
        save-every = 1
        collapse-deviation = 0.0
        [optimizer]
        peak-learning-rate = 0.5
        predictor-learning-rate-factor = 10.0
        momentum = 0.9
        weight-decay = 5e-4
        [schedule]
        warmup-epochs = 1.0
        cosine = "to-zero"
        target-decay = 0.9
        last-target-decay = 1.0
    "#;
    toml::from_str(text).expect("a table")
}

/// Refinement written out, from the experiment's network with the schedules of two rounds: BYOL,
/// as pretraining does it, and each loss of refinement where `config` gives it a weight. The gate is taken as
/// open.
///
/// - `epochs`: of the first round.
/// - `order`: which of the two views comes first.
fn by_hand(
    experiment: &RefinementTest,
    config: &Config,
    epochs: usize,
    order: [usize; 2],
) -> Result<Learner> {
    let images = Images::open(&experiment.at("images.safetensors"))?;
    let labels =
        PseudoLabels::open(&experiment.at("pseudo-labels").join("pseudo-labels.safetensors"))?;
    let mut learner = experiment.learner()?;
    let input: Input = Configuration::read(&experiment.at("network"))?.input()?;
    let Learner { online, target } = &mut learner;
    let steps = sampler::steps(IMAGES, 8);
    let rate = LearningRate::cosine(0.5 * 8. / 256., 1., 4, steps, Cosine::ToZero);
    let decay = TargetDecay::new(0.9, 1., 4 * steps);
    let rows: Vec<u32> = (0..IMAGES as u32).collect();
    let mut step = 0;
    for epoch in 0..epochs {
        let prototypes = prototypes_by_hand(&images, &labels, &input, target)?;
        let batches = sampler::uniform(&rows, 8, draws(3), epoch)?;
        let views = vec![config.views.clone(); 2];
        for batch in Loader::new(&images, batches, views, &input, draws(3), epoch as u64, 2)? {
            step += 1;
            let batch = batch?;
            let numbers = batch.rows.iter().map(|&row| row as usize);
            let weight = |i: usize| if labels.reliable[i] { labels.score[i] } else { 0. };
            let marks = Marks {
                pseudo_labels: numbers.clone().map(|i| labels.assignment[i]).collect(),
                weights: numbers.map(weight).collect(),
            };
            let view = |v: usize| Tensor::from_slice(&batch.views[v], (8, 12, 8, 1), &Device::Cpu);
            let views = [view(order[0])?, view(order[1])?];
            let targets = target.project([&views[0], &views[1]])?;
            let ramp = match config.ramp_epochs {
                0. => 1.,
                length => (step as f64 / steps as f64 / length).min(1.),
            };
            for (direction, view, projection) in
                [(0, &views[0], &targets[1]), (1, &views[1], &targets[0])]
            {
                let counters = [step as u64, direction];
                let noise =
                    training::noise(config.noise, (8, WIDTH), draws(3), &counters, &Device::Cpu)?;
                let pass = online.forward(view, noise.as_ref())?;
                let mut loss = regression_loss(&pass[2], projection)?;
                if config.sample_to_prototype_weight > 0. {
                    // −Σ w ln softmax(u · c / τ)_y / Σ w
                    let directions = training::ops::unit_rows(&pass[1])?;
                    let cosines = directions.matmul(&prototypes.t()?)?;
                    let exponentials = (cosines / 0.2)?.exp()?;
                    let shares = exponentials.broadcast_div(&exponentials.sum_keepdim(1)?)?;
                    let chosen = Tensor::new(marks.pseudo_labels.as_slice(), &Device::Cpu)?;
                    let chosen = shares.gather(&chosen.unsqueeze(1)?, 1)?.squeeze(1)?.log()?;
                    let weights = Tensor::new(marks.weights.as_slice(), &Device::Cpu)?;
                    let term = ((chosen * &weights)?.sum_all()? / weights.sum_all()?)?.neg()?;
                    loss = (loss + (term * (config.sample_to_prototype_weight * ramp))?)?;
                }
                if config.scatter_weight > 0. {
                    let term = scatter_loss(
                        &pass[1],
                        projection,
                        &marks.reliable(),
                        0.5,
                        Absent::LeftOut,
                    )?;
                    loss = (loss + (term * (config.scatter_weight * ramp))?)?;
                }
                online.backward(pass, &(loss * 0.5)?.backward()?)?;
            }
            online.step(rate.at(step))?;
            target.follow(online, decay.at(step))?;
        }
    }
    Ok(learner)
}

/// Unit-length means of the reliable images' projections, weighted by score, `(K, P)`: of un-augmented pictures
/// by the target on running statistics.
fn prototypes_by_hand(
    images: &Images,
    labels: &PseudoLabels,
    input: &Input,
    target: &mut Target,
) -> Result<Tensor> {
    let mut sums = vec![0f32; CLUSTERS * WIDTH];
    for i in (0..IMAGES).step_by(2) {
        let clean = Loader::clean(images, &[i as u32], input)?.next().expect("a picture")?;
        let picture = Tensor::from_slice(&clean.views[0], (1, 12, 8, 1), &Device::Cpu)?;
        let projection = target.embed(&picture)?.1.flatten_all()?.to_vec1::<f32>()?;
        let sums = &mut sums[i % 3 * WIDTH..][..WIDTH];
        sums.iter_mut().zip(projection).for_each(|(sum, x)| *sum += labels.score[i] * x);
    }
    Ok(training::ops::unit_rows(&Tensor::from_vec(sums, (CLUSTERS, WIDTH), &Device::Cpu)?)?)
}

fn bytes(experiment: &RefinementTest, mut learner: Learner) -> Result<Vec<u8>> {
    let out = experiment.at("by-hand");
    fs::create_dir_all(&out)?;
    network_file::write_tensors(&out, &training::network_tensors(&mut learner)?)?;
    Ok(fs::read(out.join("network.safetensors"))?)
}

fn log_of(folder: &Path) -> Result<Vec<serde_json::Value>> {
    let text = fs::read_to_string(folder.join("log.jsonl"))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

#[test]
fn without_its_losses_refinement_is_byol_bit_for_bit() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let want = bytes(&experiment, by_hand(&experiment, &config(), 2, [0, 1])?)?;
    assert!(experiment.first_round(&config(), "plain")? == want, "weights of 0");

    // No image is reliable: both losses are there, and exactly zero.
    experiment.write_labels(0., Some(1.))?;
    let config = Config { sample_to_prototype_weight: 0.1, scatter_weight: 0.1, ..config() };
    assert!(experiment.first_round(&config, "none-reliable")? == want, "an empty reliable set");
    Ok(())
}

/// All that the online network has learnt.
fn parameters(mut learner: Learner) -> Result<Vec<f32>> {
    let tensors = training::network_tensors(&mut learner)?;
    let is_learnt = |name: &str| name.starts_with("online.") && !name.contains(".running_");
    Ok(tensors.into_iter().filter(|t| is_learnt(&t.name)).flat_map(|t| t.values).collect())
}

#[test]
fn which_view_comes_first_has_no_meaning() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let config = Config { scatter_weight: 0.5, ramp_epochs: 0., ..config() };
    let job = experiment.first_round(&config, "out")?;
    let both_epochs = by_hand(&experiment, &config, 2, [0, 1])?;
    assert!(bytes(&experiment, both_epochs)? == job, "what is written out is the stage");

    let distance = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
    };
    let start = parameters(experiment.learner()?)?;
    let one = parameters(by_hand(&experiment, &config, 1, [0, 1])?)?;
    let other = parameters(by_hand(&experiment, &config, 1, [1, 0])?)?;
    let (moved, apart) = (distance(&start, &one), distance(&one, &other));
    assert!(moved > 0. && apart < 1e-3 * moved, "moved by {moved}, apart by {apart}");
    Ok(())
}

/// PLDC's third stage with all of its losses, an open gate and noise.
#[test]
fn the_pull_to_the_prototypes_is_as_written_out() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let config = Config {
        sample_to_prototype_weight: 0.5,
        sample_to_prototype_gate: -1.,
        scatter_weight: 0.2,
        noise: 0.1,
        ..config()
    };
    experiment.first_round(&config, "out")?;
    let written = network_file::open(&experiment.at("out"))?;
    let mut learner = by_hand(&experiment, &config, 2, [0, 1])?;
    fixture::assert_written(&written, &training::network_tensors(&mut learner)?, 1e-4);
    Ok(())
}

#[test]
fn ranks_write_the_same_bytes() -> Result<()> {
    let experiment = RefinementTest::new()?;
    experiment.write_labels(0.8, Some(0.995))?;
    let weights =
        Config { sample_to_prototype_weight: 0.1, scatter_weight: 0.1, noise: 0.1, ..config() };
    for prototypes in [PrototypeUpdate::Epoch, PrototypeUpdate::MovingAverage] {
        let mut config = Config { prototypes, ..weights.clone() };
        config.run.batch_groups = 4;
        let inputs = [("network", "network"), ("pseudo-labels", "pseudo-labels")];
        let job = |out: &str| {
            experiment.job(&format!("{prototypes:?}, {out}"), 1, &inputs).expect("a folder")
        };
        fixture::assert_same_on_ranks::<PrototypeRefinement>(&config, job);
    }
    Ok(())
}

#[test]
fn each_loss_acts_and_the_gate_holds_one_back() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let plain = experiment.first_round(&config(), "plain")?;
    let scatter = Config { scatter_weight: 0.1, ..config() };
    assert!(experiment.first_round(&scatter, "scatter")? != plain);

    let pull = Config { sample_to_prototype_weight: 0.1, ..config() };
    assert!(experiment.first_round(&pull, "no-stability")? == plain, "no stability, closed");
    experiment.write_labels(0.8, Some(0.98))?;
    assert!(experiment.first_round(&pull, "unstable")? == plain, "below the gate, closed");
    experiment.write_labels(0.8, Some(0.995))?;
    let pulled = experiment.first_round(&pull, "stable")?;
    assert!(pulled != plain, "above the gate, open");

    let moving =
        Config { prototypes: prototype_refinement::PrototypeUpdate::MovingAverage, ..pull };
    assert!(experiment.first_round(&moving, "moving")? != pulled);

    let last = log_of(&experiment.at("stable"))?.pop().expect("an epoch");
    for key in ["loss", "regression-loss", "sample-to-prototype-loss", "projection-length"] {
        assert!(last[key].as_f64().is_some_and(|value| value > 0.), "{key} in {last}");
    }
    Ok(())
}

#[test]
fn inputs_are_left_as_they_are() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let inputs = [
        "network/network.safetensors",
        "pseudo-labels/head.safetensors",
        "pseudo-labels/pseudo-labels.safetensors",
        "images.safetensors",
    ];
    let read = || inputs.map(|name| fs::read(experiment.at(name)).expect("an input"));
    let before = read();
    experiment.first_round(&Config { scatter_weight: 0.1, noise: 0.001, ..config() }, "out")?;
    assert!(read() == before);
    Ok(())
}

#[test]
fn a_second_round_takes_over_momenta_and_schedule() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let config = Config { scatter_weight: 0.1, ..config() };
    experiment.first_round(&config, "1")?;
    let inputs = [("network", "1"), ("pseudo-labels", "pseudo-labels"), ("previous", "1")];
    let second = experiment.refine(&config, "2", 2, &inputs)?;

    // The same network with other momenta ends with other weights.
    experiment.first_round(&Config { noise: 0.1, ..config.clone() }, "other")?;
    let others = [inputs[0], inputs[1], ("previous", "other")];
    assert!(experiment.refine(&config, "with-other-momenta", 2, &others)? != second);
    // The second round differs from a first one: its learning rate continues to fall.
    assert!(experiment.refine(&config, "again", 1, &inputs[..2])? != second);
    let error = experiment.refine(&config, "3", 2, &inputs[..2]).expect_err("no previous");
    assert!(format!("{error:#}").contains("--in previous=DIR"), "{error:#}");
    let error = experiment.refine(&config, "4", 0, &inputs).expect_err("round 0");
    assert!(format!("{error:#}").contains("--round"), "{error:#}");
    Ok(())
}

#[test]
fn foreign_pseudo_labels_are_refused() -> Result<()> {
    let experiment = RefinementTest::new()?;
    let path = experiment.at("pseudo-labels").join("pseudo-labels.safetensors");
    let good = PseudoLabels::open(&path)?;

    let mut other = good.clone();
    other.data_set.fingerprint = "another".into();
    other.write(&path)?;
    let error = experiment.first_round(&config(), "out").expect_err("another data set");
    assert!(format!("{error:#}").contains("cluster again"), "{error:#}");

    let mut more = good.clone();
    more.clusters = 4;
    more.prototypes.extend([0.; WIDTH]);
    more.write(&path)?;
    let error = experiment.first_round(&config(), "out").expect_err("four clusters");
    assert!(format!("{error:#}").contains("4 clusters"), "{error:#}");

    let mut fewer = good.clone();
    fewer.index.pop();
    fewer.assignment.pop();
    fewer.kmeans_assignment.pop();
    fewer.confidence.pop();
    fewer.score.pop();
    fewer.reliable.pop();
    fewer.write(&path)?;
    let error = experiment.first_round(&config(), "out").expect_err("an image is missing");
    let error = format!("{error:#}");
    assert!(error.contains("pseudo-labels.safetensors") && error.contains("23"), "{error}");
    Ok(())
}
