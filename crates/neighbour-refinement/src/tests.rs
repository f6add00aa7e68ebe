//! The whole stage on a small network and small pictures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use backbone::network_file;
use data::head;
use fixture::{Pictures, log, outputs as files};
use stage::container::{Container, Tensor as Stored};
use stage::{Interrupted, Split};
use training::{Cosine, LearningRate, Precision, SgdTable, TargetDecay};

use super::*;

const IMAGES: usize = 24;
const CLUSTERS: usize = 3;
const WIDTH: usize = 8;

pub(crate) fn config() -> Config {
    let text = r#"
        neighbour-share = 0.5
        neighbours = 2
        candidate-neighbours = 6
        cross-entropy-weight = 0.5
        cross-entropy-ramp-epochs = 1.0
        label-smoothing = 0.1
        smoothing-neighbours = 3
        least-agreement = 0.666667
        first-central-share = 0.8
        central-ramp = 0.25
        refresh-epochs = 1
        permuted-share = 0.0
        head-learning-rate-factor = 10.0
        new-schedule-each-round = false
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

fn with(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = config();
    change(&mut config);
    config
}

/// Writes a clustering network of even weights to `folder`.
pub(crate) fn write_head(folder: &Path, width: usize, clusters: usize) -> Result<()> {
    let hidden = 5;
    let values = |count: usize, salt: usize| -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + salt * 91) % 53) as f32 / 26.5 - 1.).collect()
    };
    let (w, b, v, c) = (
        values(hidden * width, 1),
        values(hidden, 2),
        values(clusters * hidden, 3),
        values(clusters, 4),
    );
    let tensors = [
        Stored::f32("hidden.weight", &[hidden, width], &w),
        Stored::f32("hidden.bias", &[hidden], &b),
        Stored::f32("output.weight", &[clusters, hidden], &v),
        Stored::f32("output.bias", &[clusters], &c),
    ];
    head::write(folder, clusters, "network", &tensors)
}

/// A folder with pictures, a network of random weights, and the result of a clustering.
struct RoundTest {
    folder: tempfile::TempDir,
}

const SGD: SgdTable = SgdTable {
    peak_learning_rate: 0.5,
    predictor_learning_rate_factor: 10.,
    momentum: 0.9,
    weight_decay: 5e-4,
};

impl RoundTest {
    fn new() -> Result<Self> {
        let test = Self { folder: tempfile::tempdir()? };
        test.job("network", 1, &[])?;
        let configuration: Configuration = serde_json::from_value(serde_json::json!({
            "backbone": { "depth": "10", "width": 2, "stem": "3x3" },
            "projector": { "hidden": 16, "width": WIDTH },
            "predictor": { "hidden": 16 },
            "channels": 1,
            "input": { "height": 6, "width": 7, "channels": 1, "mean": [0.4], "std": [0.3],
                       "clean": [] },
        }))?;
        let mut learner = Learner::random(&configuration, SGD, Precision::F32, 7)?;
        configuration.write(&test.at("network"))?;
        let tensors = training::network_tensors(&mut learner)?;
        network_file::write_tensors(&test.at("network"), &tensors)?;
        fs::create_dir(test.at("clusters"))?;
        test.write_clusters(1.)?;
        test.write_head_of_kinds(&mut learner.target)?;
        Ok(test)
    }

    /// A head that tells groups of pictures apart by the directions of their embeddings, which are above 0,
    /// so that ReLU passes them.
    fn write_head_of_kinds(&self, target: &mut training::Target) -> Result<()> {
        let images = Images::open(&self.at("images.safetensors"))?;
        let rows: Vec<u32> = (0..IMAGES as u32).collect();
        let input: Input = self.configuration()?.input()?;
        let loader = Loader::clean(&images, &rows, &input)?;
        let ranks = &self.job("head", 1, &[])?.communicator;
        let embed = |pictures: &Tensor| Ok([target.embed(pictures)?.0]);
        let [embeddings] = outputs(loader, &Device::Cpu, ranks, embed)?;
        let width = embeddings.len() / IMAGES;
        let k_means = assignment::KMeans::spherical(CLUSTERS, 5);
        let groups = assignment::k_means(&embeddings, IMAGES, width, &k_means, 1)?;
        let identity: Vec<f32> =
            (0..width * width).map(|i| f32::from(u8::from(i % (width + 1) == 0))).collect();
        let weight: Vec<f32> = groups.centres.iter().map(|x| 100. * x).collect();
        let none = vec![0.; width];
        let tensors = [
            Stored::f32("hidden.weight", &[width, width], &identity),
            Stored::f32("hidden.bias", &[width], &none),
            Stored::f32("output.weight", &[CLUSTERS, width], &weight),
            Stored::f32("output.bias", &[CLUSTERS], &[0.; CLUSTERS]),
        ];
        head::write(&self.at("clusters"), CLUSTERS, "network", &tensors)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn configuration(&self) -> Result<Configuration> {
        Configuration::read(&self.at("network"))
    }

    /// The result of a clustering on whose images this share of the heads agrees.
    fn write_clusters(&self, agreement: f32) -> Result<()> {
        let images = Images::open(&self.at("images.safetensors"))?;
        PseudoLabels {
            data_set: images.data_set().clone(),
            clusters: CLUSTERS,
            index: (0..IMAGES as u32).collect(),
            assignment: (0..IMAGES as u32).map(|i| i % 3).collect(),
            kmeans_assignment: vec![0; IMAGES],
            confidence: vec![1.; IMAGES],
            score: vec![1.; IMAGES],
            reliable: vec![true; IMAGES],
            projection_width: WIDTH,
            prototypes: vec![1.; CLUSTERS * WIDTH],
            stability: None,
            head_agreement: Some(vec![agreement; IMAGES]),
        }
        .write(&self.at("clusters").join(PseudoLabels::FILE))
    }

    fn job(&self, out: &str, round: usize, inputs: &[(&str, &str)]) -> Result<Job> {
        let pictures =
            Pictures { count: IMAGES, pixel: fixture::of_three_kinds, split: |_| Split::Train };
        let data = fixture::data(CLUSTERS, &[Split::Train]);
        let job = fixture::job("neighbour-refinement", self.folder.path(), out, pictures, data);
        let inputs: BTreeMap<String, PathBuf> =
            inputs.iter().map(|(role, name)| ((*role).to_owned(), self.at(name))).collect();
        Ok(Job { inputs, round, rounds: 2, ..job })
    }

    fn first_job(&self, out: &str) -> Result<Job> {
        self.job(out, 1, &[("network", "network"), ("pseudo-labels", "clusters")])
    }

    fn first_round(&self, config: &Config, out: &str) -> Result<Vec<u8>> {
        Ok(fixture::network::<NeighbourRefinement>(config, &self.first_job(out)?))
    }

    fn head(&self, out: &str) -> Vec<u8> {
        fs::read(self.at(out).join(head::FILE)).expect("a head")
    }

    /// Continued BYOL written out: the tensors of the network after the first round.
    fn byol_by_hand(&self) -> Result<Vec<u8>> {
        let images = Images::open(&self.at("images.safetensors"))?;
        let configuration = self.configuration()?;
        let mut learner = Learner::open(&self.at("network"), &configuration, SGD, Precision::F32)?;
        let input: Input = configuration.input()?;
        let steps = sampler::steps(IMAGES, 8);
        let rate = LearningRate::cosine(0.5 * 8. / 256., 1., 4, steps, Cosine::ToZero);
        let decay = TargetDecay::new(0.9, 1., 4 * steps);
        let rows: Vec<u32> = (0..IMAGES as u32).collect();
        let (config, mut step) = (config(), 0);
        let views = Views::new(&images, [&config.views; 2], &input, draws(3));
        for epoch in 0..2 {
            let batches = sampler::uniform(&rows, 8, draws(3), epoch)?;
            for batch in views.epoch(epoch, batches, 0)? {
                step += 1;
                let [view_1, view_2] = pictures(batch?, &Device::Cpu)?;
                let Learner { online, target } = &mut learner;
                let targets = target.project([&view_1, &view_2])?;
                for (view, projection) in [(&view_1, &targets[1]), (&view_2, &targets[0])] {
                    let seams = online.forward(view, None)?;
                    let loss = (regression_loss(&seams[2], projection)? * 0.5)?;
                    online.backward(seams, &loss.backward()?)?;
                }
                online.step(rate.at(step))?;
                target.follow(online, decay.at(step))?;
            }
        }
        let out = self.at("by-hand");
        fs::create_dir_all(&out)?;
        network_file::write_tensors(&out, &training::network_tensors(&mut learner)?)?;
        Ok(fs::read(out.join(network_file::NAME))?)
    }
}

/// Refinement, case 15.
#[test]
fn without_its_losses_it_is_byol_bit_for_bit_and_the_head_is_passed_on() -> Result<()> {
    let test = RoundTest::new()?;
    let want = test.byol_by_hand()?;
    let plain = with(|c| (c.neighbour_share, c.cross_entropy_weight) = (0., 0.));
    assert!(test.first_round(&plain, "plain")? == want, "weights of 0");
    assert!(test.head("plain") == test.head("clusters"));

    // Nobody is reliable: nothing but BYOL reaches the network, beside which the head lies.
    test.write_clusters(0.5)?;
    let labels = with(|c| c.neighbour_share = 0.);
    test.first_round(&labels, "none-reliable")?;
    let written = network_file::open(&test.at("none-reliable"))?;
    let by_hand = network_file::open(&test.at("by-hand"))?;
    for name in by_hand.names() {
        assert_eq!(written.f32(name)?, by_hand.f32(name)?, "{name}");
    }
    let epochs = log(&test.first_job("none-reliable")?);
    assert!(epochs.iter().all(|line| line["reliable-share"] == 0.));
    assert!(epochs.iter().all(|line| line.get("cross-entropy").is_none()));
    Ok(())
}

/// Refinement, case 15.
#[test]
fn without_a_cross_entropy_the_head_stays_as_it_is() -> Result<()> {
    let test = RoundTest::new()?;
    let neighbours = with(|c| c.cross_entropy_weight = 0.);
    test.first_round(&neighbours, "neighbours")?;
    assert!(test.head("neighbours") == test.head("clusters"), "it only finds borders");
    let alone = Config { first_central_share: 1., ..neighbours };
    test.first_round(&alone, "alone")?;
    assert!(test.head("alone") == test.head("clusters"), "none takes part");
    test.first_round(&config(), "learnt")?;
    assert!(test.head("learnt") != test.head("clusters"));
    Ok(())
}

#[test]
fn equal_runs_are_equal_bytes_and_every_value_changes_them() -> Result<()> {
    let test = RoundTest::new()?;
    let bytes = test.first_round(&config(), "first")?;
    assert!(bytes == test.first_round(&config(), "again")?);
    for (name, other) in [
        ("share", with(|c| c.neighbour_share = 0.25)),
        ("neighbours", with(|c| c.neighbours = 1)),
        ("candidates", with(|c| c.candidate_neighbours = 3)),
        ("weight", with(|c| c.cross_entropy_weight = 0.1)),
        ("ramp", with(|c| c.cross_entropy_ramp_epochs = 2.)),
        ("smoothing", with(|c| c.label_smoothing = 0.5)),
        ("smoothed", with(|c| c.smoothing_neighbours = 0)),
        ("central", with(|c| c.first_central_share = 0.3)),
        ("central-ramp", with(|c| (c.first_central_share, c.central_ramp) = (0.3, 1.))),
        ("refresh", with(|c| c.refresh_epochs = 2)),
        ("permuted", with(|c| c.permuted_share = 1.)),
        ("factor", with(|c| c.head_learning_rate_factor = 1.)),
    ] {
        assert!(bytes != test.first_round(&other, name)?, "{name}");
    }
    test.write_clusters(0.5)?;
    assert!(bytes != test.first_round(&config(), "disagreement")?);
    let lenient = with(|c| c.least_agreement = 0.5);
    assert!(bytes == test.first_round(&lenient, "lenient")?);
    let last = log(&test.first_job("lenient")?).pop().expect("an epoch");
    let positive =
        ["loss", "regression-loss", "cross-entropy", "reliable-share", "with-neighbours"];
    for key in positive {
        assert!(last[key].as_f64().is_some_and(|value| value > 0.), "{key} in {last}");
    }
    for key in ["changed-labels", "chance-corrected-agreement", "smallest-cluster"] {
        assert!(last[key].is_f64(), "{key} in {last}");
    }
    Ok(())
}

/// Refinement, case 15.
#[test]
fn interrupted_after_every_step_it_resumes_to_the_same_bytes() -> Result<()> {
    let test = RoundTest::new()?;
    let config = with(|c| c.refresh_epochs = 2);
    test.first_round(&config, "whole")?;
    let mut interruptions = 0;
    loop {
        let job = test.first_job("parts")?;
        job.interrupt.raise();
        match NeighbourRefinement::run(&config, &job) {
            Ok(()) => break,
            Err(error) => assert!(error.is::<Interrupted>(), "{error:#}"),
        }
        interruptions += 1;
    }
    assert_eq!(interruptions, 6, "three steps in each of two epochs");
    let without_log = |out: &str| {
        let mut files = files(&test.at(out));
        files.remove("log.jsonl");
        files
    };
    let (whole, parts) = (without_log("whole"), without_log("parts"));
    assert_eq!(whole.keys().collect::<Vec<_>>(), parts.keys().collect::<Vec<_>>());
    assert!(whole.contains_key("head.safetensors"));
    for (name, bytes) in &whole {
        assert!(&parts[name] == bytes, "{name}");
    }
    Ok(())
}

#[test]
fn a_second_round_continues_momenta_schedule_and_the_measure_of_labels() -> Result<()> {
    let test = RoundTest::new()?;
    test.first_round(&config(), "1")?;
    let inputs = [("network", "1"), ("pseudo-labels", "clusters"), ("previous", "1")];
    let run = |out: &str, round: usize, inputs: &[(&str, &str)]| -> Result<Vec<u8>> {
        NeighbourRefinement::run(&config(), &test.job(out, round, inputs)?)?;
        Ok(fs::read(test.at(out).join(network_file::NAME))?)
    };
    let second = run("2", 2, &inputs)?;
    let graph = |out: &str| -> Result<Vec<u32>> {
        let path = test.at(out).join("state.safetensors");
        Container::open(&path, "state", 2)?.u32("stage.first-neighbours")
    };
    assert_eq!(graph("2")?, graph("1")?, "labels of all rounds are measured alike");
    assert_eq!(graph("1")?.len(), IMAGES * 6);

    test.first_round(&with(|c| c.neighbour_share = 0.1), "other")?;
    let others = [inputs[0], inputs[1], ("previous", "other")];
    assert!(run("with-other-momenta", 2, &others)? != second);
    assert!(run("again", 1, &inputs[..2])? != second, "the learning rate continues to fall");
    let restart = with(|c| c.new_schedule_each_round = true);
    let job = |out: &str, inputs: &[(&str, &str)]| test.job(out, 2, inputs);
    let restarted = fixture::network::<NeighbourRefinement>(&restart, &job("new", &inputs)?);
    assert!(restarted != second);
    let other = fixture::network::<NeighbourRefinement>(&restart, &job("new-other", &others)?);
    assert!(restarted == other, "without momenta");
    let error = run("3", 2, &inputs[..2]).expect_err("no previous");
    assert!(format!("{error:#}").contains("--in previous=DIR"), "{error:#}");
    let error = run("4", 0, &inputs).expect_err("round 0");
    assert!(format!("{error:#}").contains("--round"), "{error:#}");
    Ok(())
}

/// Rank by rank, neighbours, labels and the clustering network learn what one process learns.
#[test]
fn ranks_write_the_same_bytes() -> Result<()> {
    let experiment = RoundTest::new()?;
    experiment.write_clusters(1.)?;
    let mut config = config();
    config.run.batch_groups = 4;
    fixture::assert_same_on_ranks::<NeighbourRefinement>(&config, |out| {
        experiment.first_job(out).expect("a folder")
    });
    Ok(())
}

#[test]
fn foreign_inputs_are_refused_and_inputs_are_left_as_they_are() -> Result<()> {
    let test = RoundTest::new()?;
    let before = [files(&test.at("network")), files(&test.at("clusters"))];
    test.first_round(&config(), "out")?;
    assert!(before == [files(&test.at("network")), files(&test.at("clusters"))]);

    let path = test.at("clusters").join(PseudoLabels::FILE);
    let good = PseudoLabels::open(&path)?;
    let refused = |labels: &PseudoLabels, words: &str| -> Result<()> {
        labels.write(&path)?;
        let error = NeighbourRefinement::run(&config(), &test.first_job("refused")?);
        let message = format!("{:#}", error.expect_err(words));
        assert!(message.contains(words), "{message}");
        Ok(())
    };
    let mut other = good.clone();
    other.data_set.fingerprint = "another".into();
    refused(&other, "cluster again")?;
    let mut more = good.clone();
    more.clusters = 4;
    more.prototypes.extend([1.; WIDTH]);
    refused(&more, "4 clusters")?;
    good.write(&path)?;
    fs::remove_file(test.at("clusters").join(head::FILE))?;
    for config in [config(), with(|c| (c.neighbour_share, c.cross_entropy_weight) = (0., 0.))] {
        let error = NeighbourRefinement::run(&config, &test.first_job("no-head")?);
        let message = format!("{:#}", error.expect_err("no head"));
        assert!(message.contains("head.safetensors"), "{message}");
    }
    Ok(())
}
