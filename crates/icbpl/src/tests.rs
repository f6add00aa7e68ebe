//! Whole runs on tiny pictures, and what the parts do together.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use assignment::nearest_neighbours;
use backbone::published::{self, Provenance, PublishedNetwork};
use backbone::{Architecture, Depth, Segment, Stem, backbone_file, network_file, resnet};
use data::images::{self, StoredPicture};
use data::views::{Filter, Input, Operation, Pipeline};
use data::{Images, Picture};
use fixture::{Pictures, transformer};
use stage::Split;

use super::*;
use crate::neighbours::with_self;
use crate::network::IcbplPass;

/// Twenty-four pictures, every fourth for testing, a random backbone in the role `backbone`, and a
/// stage that reads them.
fn job(folder: &Path, out: &str) -> Job {
    if !folder.join("images.safetensors").exists() {
        let plan = resnet::plan(&BACKBONE, 1).expect("a plan");
        let backbone = Segment::random("backbone", plan, 7).expect("weights");
        backbone_file::write(folder, &backbone).expect("written");
    }
    let split = |number| if number % 4 == 3 { Split::Test } else { Split::Train };
    let pictures = Pictures { count: 24, pixel: fixture::scattered, split };
    let data = fixture::data(3, &[Split::Train, Split::Test]);
    let mut job = fixture::job("icbpl", folder, out, pictures, data);
    job.inputs.insert("backbone".to_owned(), folder.to_owned());
    job
}

/// The residual network of the table below.
const BACKBONE: Architecture = Architecture { depth: Depth::Ten, width: 2, stem: Stem::Plain };

fn config() -> Config {
    fixture::table(
        r#"
        discrepancy-weight = 2.0
        view-weight = 1.0
        neighbour-weight = 1.0
        least-distance-weight = 1.0
        pair-cosine-weight = 3.0
        pair-absolute-weight = 8.0
        neighbours = 4
        neighbours-include-self = false
        frozen = ["stem", "layer1", "layer2"]
        frozen-statistics = "running"
        centroids = { method = "closed-form" }
        kmeans-restarts = 2
        anchor = { operations = [] }
        augmented = { operations = [{ operation = "noise", deviation = 0.1 }] }
        [run]
        epochs = 5
        batch-size = 9
        batch-groups = 1
        precision = "f32"
        save-every = 2
        collapse-deviation = 1e-6
        [optimizer]
        backbone-learning-rate = 1e-3
        head-learning-rate = 5e-3
        beta-1 = 0.9
        beta-2 = 0.999
        epsilon = 1e-8
        weight-decay = 1e-4
        [schedule]
        learning-rate = "cosine"
        least-distance-delay = 2
        [start]
        kind = "stage"
        backbone = { depth = "10", width = 2, stem = "3x3" }
        [network]
        head = { hidden = 8, width = 6 }
        "#,
    )
}

/// The same with some other values.
fn with(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = config();
    change(&mut config);
    config
}

fn bytes(job: &Job, name: &str) -> Vec<u8> {
    fs::read(job.out.join(name)).expect(name)
}

#[test]
fn equal_runs_are_equal_bytes_and_what_varies_changes_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (first, again) = (job(folder.path(), "first"), job(folder.path(), "again"));
    Icbpl::run(&config(), &first)?;
    Icbpl::run(&config(), &again)?;
    for name in [network_file::NAME, PseudoLabels::FILE] {
        assert!(bytes(&first, name) == bytes(&again, name), "{name}");
    }
    for (what, other) in [
        ("delay", with(|c| c.schedule.least_distance_delay = 9)),
        ("neighbour", Config { neighbour_weight: 0., ..config() }),
        ("view", Config { view_weight: 0., ..config() }),
        ("discrepancy", Config { discrepancy_weight: 1., ..config() }),
        ("centroids", Config { centroids: Centroids::TurnedToGroups, ..config() }),
        ("schedule", with(|c| c.schedule.learning_rate = Schedule::Constant)),
    ] {
        let changed = job(folder.path(), what);
        // With a term less, all pictures may fall into one cluster; the network is written before.
        if let Err(error) = Icbpl::run(&other, &changed) {
            assert!(error.is::<stage::Diverged>(), "{what}: {error}");
        }
        assert!(bytes(&first, network_file::NAME) != bytes(&changed, network_file::NAME), "{what}");
    }
    let labels = PseudoLabels::open(&first.out.join(PseudoLabels::FILE))?;
    assert_eq!((labels.index.len(), labels.clusters, labels.projection_width), (24, 3, 6));
    assert_eq!(labels.prototypes, network_file::open(&first.out)?.f32("centroids")?);
    let head = data::head::open(&first.out)?;
    assert_eq!((head.header_text("form")?, head.f32("centres")?), ("centres", labels.prototypes));
    let log = fs::read_to_string(first.out.join("log.jsonl"))?;
    assert!(log.contains("role backbone") && log.contains("neighbour-distance"), "{log}");
    Ok(())
}

#[test]
fn ranks_write_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = with(|c| c.run.batch_groups = 4);
    fixture::assert_same_on_ranks::<Icbpl>(&config, |out| job(folder.path(), out));
    Ok(())
}

/// ICBPL written down once more: one loss, views backwards.
#[test]
fn a_run_is_icbpl() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (config, job) = (config(), job(folder.path(), "out"));
    Icbpl::run(&config, &job)?;
    let written = network_file::open(&job.out)?;

    let images = Images::open(&job.images)?;
    let rows = images.rows(&job.data.train_on);
    let [_, embeddings] = embed(&config, &images, &rows, &job, &Device::Cpu)?;
    let neighbours = Neighbours {
        nearest: assignment::nearest_neighbours(&embeddings, rows.len(), 16, 4)?,
        rows: rows.clone(),
        each: 4,
    };
    let views = config.views(&images, 3);
    let neighbour_views = config.neighbour_views(&images, 3);
    let mut networks = IcbplNetworks::new(&config, &job, &Device::Cpu)?;
    let mut step = 0;
    for epoch in 0..5 {
        let order = sampler::uniform(&rows, 9, 3, epoch)?;
        let beside = neighbours.draw(&order, 3, epoch)?;
        let beside = neighbour_views.epoch(epoch, beside, 0)?;
        for (batch, beside) in views.epoch(epoch, order, 0)?.zip(beside) {
            step += 1;
            let [anchors, augmented] = pictures(batch?, &Device::Cpu)?;
            let [beside] = pictures(beside?, &Device::Cpu)?;
            let anchor = networks.forward(&anchors)?;
            let view = networks.forward(&augmented)?;
            let neighbour = networks.forward(&beside)?;
            let z = unit_rows(&anchor.feature)?;
            // Nine targets for three centroids, in turn.
            let targets = networks.centroids.repeat((3, 1))?;
            let pair = |other: &Tensor| pair_distance(&z, &unit_rows(other)?, config.pair());
            let mut loss = (discrepancy(&z, &targets)? * 2.)?;
            loss = ((loss + pair(&view.feature)?)? + pair(&neighbour.feature)?)?;
            if epoch >= 2 {
                loss = (loss + least_distance(&z, &networks.centroids)?)?;
            }
            let gradients = loss.backward()?;
            networks.backward([neighbour, view, anchor], &gradients)?;
            let cosine = (1. + (std::f64::consts::PI * f64::from(step - 1) / 10.).cos()) / 2.;
            networks.step(config.adam(1e-3 * cosine), config.adam(5e-3 * cosine))?;
        }
    }
    assert_eq!(step, 10);
    // Adam divides by the root of small squares: rounding shows.
    fixture::assert_written(&written, &training::network_tensors(&mut networks)?, 1e-3);
    Ok(())
}

/// What reaches the backbone through both sides of a pair is the slope of the loss along it.
#[test]
fn the_backbones_gradient_matches_central_differences() -> Result<()> {
    const WEIGHT: &str = "layer3.0.conv2.weight";
    let folder = tempfile::tempdir()?;
    let job = job(folder.path(), "out");
    let view = |number: u64| -> Result<Tensor> {
        let noise = training::noise(1., (8, 42), number, &[], &Device::Cpu)?;
        Ok(noise.context("a deviation above 0")?.reshape((8, 6, 7, 1))?)
    };
    let pictures = [view(1)?, view(2)?];
    let mut networks = IcbplNetworks::new(&config(), &job, &Device::Cpu)?;
    let cosine = loss::PairWeights { cosine: 1., absolute: 0. };
    let loss = |networks: &mut IcbplNetworks| -> Result<(Tensor, [IcbplPass; 2])> {
        let views = [networks.forward(&pictures[0])?, networks.forward(&pictures[1])?];
        let (a, b) = (unit_rows(&views[0].feature)?, unit_rows(&views[1].feature)?);
        Ok((pair_distance(&a, &b, cosine)?, views))
    };
    let (value, views) = loss(&mut networks)?;
    networks.backward(views, &value.backward()?)?;
    let gradient = residual(&mut networks).gradient(WEIGHT).context("a parameter")?;
    let length = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
    let at = residual(&mut networks).segment.parameters.get(WEIGHT)?;
    let mut value_at = |h: f32| -> Result<f32> {
        let moved = at.iter().zip(&gradient).map(|(x, g)| x + h * g / length).collect::<Vec<_>>();
        residual(&mut networks).segment.parameters.set(WEIGHT, &moved)?;
        Ok(loss(&mut networks)?.0.to_scalar()?)
    };
    let slope = (value_at(2e-3)? - value_at(-2e-3)?) / 4e-3;
    assert!((slope - length).abs() < 0.02 * length, "{slope}, want {length}");
    Ok(())
}

fn residual(networks: &mut IcbplNetworks) -> &mut training::TrainedSegment<layers::Adam> {
    match &mut networks.backbone {
        StartingBackbone::Residual { segment, .. } => segment,
        StartingBackbone::Transformer(_) => unreachable!("the table names a residual network"),
    }
}

/// ICBPL, case T14: two steps an epoch, five epochs.
#[test]
fn frozen_stages_and_centroids_stay_to_the_bit_and_the_rest_learns() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let job = job(folder.path(), "out");
    let mut before = IcbplNetworks::new(&config(), &job, &Device::Cpu)?;
    Icbpl::run(&config(), &job)?;
    let after = network_file::open(&job.out)?;
    let is_frozen = |name: &str| {
        ["conv1.", "bn1.", "layer1.", "layer2."].iter().any(|block| name.starts_with(block))
    };
    let mut frozen = 0;
    let before = training::network_tensors(&mut before)?;
    for tensor in &before {
        let same = after.f32(&tensor.name)? == tensor.values;
        let of_backbone = tensor.name.strip_prefix("online.backbone.");
        let stays = of_backbone.is_some_and(is_frozen) || tensor.name == "centroids";
        frozen += usize::from(stays);
        // A bias before batch statistics could stay at 0; nothing else may.
        assert_eq!(same, stays, "{}", tensor.name);
    }
    assert!(frozen > 20, "{frozen}");

    // On batch statistics the values stay, and the running statistics move.
    let moving = self::job(folder.path(), "moving");
    Icbpl::run(&Config { frozen_statistics: BatchNormStatistics::Batch, ..config() }, &moving)?;
    let file = network_file::open(&moving.out)?;
    for (name, stays) in [("layer1.0.conv1.weight", true), ("layer1.0.bn1.running_mean", false)] {
        let name = format!("online.backbone.{name}");
        let first = before.iter().find(|t| t.name == name).expect("there");
        assert_eq!(file.f32(&name)? == first.values, stays, "{name}");
    }
    Ok(())
}

/// How a run begins: features around zero, and a centroid of its own for each group of k-means.
#[test]
fn each_group_is_handed_to_its_own_centroid() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (config, job) = (config(), job(folder.path(), "out"));
    let images = Images::open(&job.images)?;
    let rows = images.rows(&job.data.train_on);
    let [embeddings, unit] = embed(&config, &images, &rows, &job, &Device::Cpu)?;
    let mut networks = IcbplNetworks::new(&config, &job, &Device::Cpu)?;
    groups::hand_over(&config, &embeddings, &unit, &mut networks, &job, &Device::Cpu)?;

    let width = embeddings.len() / rows.len();
    let embeddings = Tensor::from_slice(&embeddings, (rows.len(), width), &Device::Cpu)?;
    let features = networks.head.evaluate(&embeddings)?;
    let largest = features.mean(0)?.abs()?.max(0)?.to_scalar::<f32>()?;
    assert!(largest < 1e-5, "the mean feature is {largest} away from zero");

    let k_means = assignment::KMeans::spherical(3, config.kmeans_restarts);
    let found = assignment::k_means(&unit, rows.len(), width, &k_means, job.seed)?;
    let cosines = unit_rows(&features)?.matmul(&networks.centroids.t()?)?.to_vec2::<f32>()?;
    let nearest = |group: u32| -> usize {
        let mut sums = [0f32; 3];
        for (row, _) in cosines.iter().zip(&found.assignment).filter(|(_, of)| **of == group) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        (0..3).max_by(|&a, &b| sums[a].total_cmp(&sums[b])).expect("three centroids")
    };
    let mut centroids = [0, 1, 2].map(nearest);
    centroids.sort_unstable();
    assert_eq!(centroids, [0, 1, 2]);
    Ok(())
}

/// ICBPL, case T13.
#[test]
fn neighbours_have_the_specified_order() -> Result<()> {
    let points = [1f32, 0., 0.96, 0.28, 0.6, 0.8, 0., 1., -0.8, 0.6];
    let found = with_self(&nearest_neighbours(&points, 5, 2, 4)?, 4);
    let want =
        [[0u32, 1, 2, 3, 4], [1, 0, 2, 3, 4], [2, 1, 3, 0, 4], [3, 2, 4, 1, 0], [4, 3, 2, 1, 0]];
    for (row, (got, mut want)) in found.chunks(5).zip(want).enumerate() {
        if row == 2 && got[1] == 3 {
            want.swap(1, 2); // Both lie at 0.8.
        }
        assert_eq!(got, want, "row {row}");
    }
    let without = nearest_neighbours(&points, 5, 2, 4)?;
    for (row, got) in without.chunks(4).enumerate() {
        assert!(!got.contains(&(row as u32)), "row {row}: {got:?}");
        assert_eq!(got[0], found[5 * row + 1], "row {row}");
    }
    Ok(())
}

/// ICBPL, case T13: the search in blocks.
#[test]
fn a_search_in_blocks_is_the_search_of_all_pairs() -> Result<()> {
    let (n, d, k) = (700, 12, 20);
    let mut points: Vec<f32> = (0..n * d).map(|i| ((i * 7919 % 1009) as f32 / 504.) - 1.).collect();
    for row in points.chunks_mut(d) {
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
    }
    let found = nearest_neighbours(&points, n, points.len() / n, k)?;
    let product = |a: usize, b: usize| -> f64 {
        (0..d).map(|c| f64::from(points[a * d + c]) * f64::from(points[b * d + c])).sum()
    };
    for row in (0..n).step_by(97) {
        let mut others: Vec<usize> = (0..n).filter(|&other| other != row).collect();
        others.sort_by(|&a, &b| product(row, b).total_cmp(&product(row, a)).then(a.cmp(&b)));
        let want: Vec<u32> = others[..k].iter().map(|&other| other as u32).collect();
        assert_eq!(found[row * k..(row + 1) * k], want, "row {row}");
    }
    Ok(())
}

#[test]
fn every_neighbour_is_drawn_and_nothing_else() -> Result<()> {
    let neighbours = Neighbours { rows: vec![3, 5, 8], nearest: vec![1, 2, 0, 2, 1, 0], each: 2 };
    let mut seen = std::collections::BTreeSet::new();
    for epoch in 0..40 {
        let drawn = neighbours.draw(&[vec![5], vec![3, 8]], 1, epoch)?;
        assert_eq!(drawn, neighbours.draw(&[vec![5], vec![3, 8]], 1, epoch)?);
        seen.insert((5, drawn[0][0]));
        seen.insert((3, drawn[1][0]));
        seen.insert((8, drawn[1][1]));
    }
    let want = [(3, 5), (3, 8), (5, 3), (5, 8), (8, 3), (8, 5)];
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), want);
    Ok(())
}

#[test]
fn neighbours_are_found_once_and_kept_with_the_run() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let job = job(folder.path(), "out");
    let images = Images::open(&job.images)?;
    let rows = images.rows(&job.data.train_on);
    let plan = config().plan(rows.len());
    let model = || -> Result<IcbplModel> {
        let networks = IcbplNetworks::new(&config(), &job, &Device::Cpu)?;
        Ok(IcbplModel { networks, neighbours: Neighbours::none(&rows, &config()) })
    };
    let fingerprint = images.fingerprint();
    let mut first = model()?;
    let mut again = model()?;
    let mut run = Run::resume_or_start(&job, &config(), fingerprint, plan, &mut first)?;
    assert!(first.neighbours.is_empty());
    let [_, embeddings] = embed(&config(), &images, &rows, &job, &Device::Cpu)?;
    first.neighbours.find(&config(), &embeddings, &job)?;
    for _ in 0..2 {
        run.end_step(&mut first)?;
        run.end_step(&mut first)?;
        run.end_epoch(&mut first)?; // The second epoch saves.
    }
    Run::resume_or_start(&job, &config(), fingerprint, plan, &mut again)?;
    assert!(!again.neighbours.is_empty());
    assert_eq!(again.neighbours, first.neighbours);
    Ok(())
}

#[test]
fn the_pretrained_file_is_read_and_checked_and_its_lack_is_told() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut job = job(folder.path(), "out");
    let file = folder.path().join(backbone_file::NAME);
    let pretrained = |config: &Config, job: &Job| -> Result<Vec<f32>> {
        let mut networks = IcbplNetworks::new(config, job, &Device::Cpu)?;
        Ok(residual(&mut networks).segment.parameters.to_vec()?)
    };
    let of_role = pretrained(&config(), &job)?;
    job.inputs.clear();
    let message = format!("{:#}", pretrained(&config(), &job).expect_err("none"));
    assert!(message.contains("--in backbone=DIR") && message.contains("sha256"), "{message}");
    let named = |file: PathBuf, sha256: &str| Config {
        start: StartTable::File { file, sha256: sha256.to_owned(), backbone: BACKBONE },
        ..config()
    };
    assert_eq!(pretrained(&named(file.clone(), ""), &job)?, of_role);
    let message =
        format!("{:#}", pretrained(&named(file, "00ff"), &job).expect_err("another file"));
    assert!(message.contains("00ff") && message.contains("SHA-256"), "{message}");
    let missing = named(folder.path().join("none"), "");
    assert!(pretrained(&missing, &job).is_err());
    let message = missing.check(&job).expect_err("none").to_string();
    assert!(message.contains("--set icbpl.start.file"), "{message}");
    job.images = folder.path().join("not-prepared-yet");
    missing.check(&job)?;
    Ok(())
}

/// Pictures in colour, the input of a published network of this side, and a job that starts from it.
fn published_start(
    folder: &Path,
    network: &PublishedNetwork,
    side: usize,
) -> Result<(Config, Job)> {
    let images = folder.join("images.safetensors");
    let source = |number: usize| {
        let kind = fixture::of_three_kinds;
        let pixels = (0..3 * side * side).map(|i| kind(number, i / 3)).collect();
        Ok((StoredPicture::raw(Picture::new(side, side, 3, pixels)?, 3)?, Split::Train))
    };
    images::write(&images, 3, (0..12).map(source).collect::<Result<_>>()?)?;
    let input = Input {
        height: side,
        width: side,
        channels: 3,
        mean: vec![0.4, 0.5, 0.6],
        std: vec![0.25; 3],
        clean: vec![],
    };
    published::write(folder, network, &input, Provenance::default())?;
    let mut config = config();
    config.start = StartTable::Published {};
    config.frozen = vec!["all".to_owned()];
    config.centroids = Centroids::TurnedToGroups;
    config.input = input;
    config.anchor = Pipeline { operations: vec![] };
    config.run.batch_size = 6;
    let data = fixture::data(3, &[Split::Train]);
    let out = folder.join("out");
    fs::create_dir_all(&out)?;
    let mut job = Job { seed: 3, ..Job::new("icbpl", images, out, data) };
    job.inputs.insert("backbone".to_owned(), folder.to_owned());
    Ok((config, job))
}

/// A run whose pictures may fall into one cluster, because a network of random numbers groups nothing;
/// the trained network is written before.
fn run_to_the_network(config: &Config, job: &Job) {
    if let Err(error) = Icbpl::run(config, job) {
        assert!(error.is::<stage::Diverged>(), "{error}");
    }
}

#[test]
fn a_frozen_transformer_keeps_its_bits_and_the_head_learns() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let weights = transformer::weights(&transformer::narrow_plan(4));
    let network = PublishedNetwork::Transformer(Box::new(weights));
    let (config, job) = published_start(folder.path(), &network, 8)?;
    let files = [network_file::NAME, backbone_file::NAME, backbone::CONFIGURATION];
    let of_start = || files.map(|name| fs::read(folder.path().join(name)).expect(name));
    let given = of_start();
    config.check(&job)?;
    let mut before = IcbplNetworks::new(&config, &job, &Device::Cpu)?;
    let picture = Tensor::ones((1, 8, 8, 3), candle_core::DType::F32, &Device::Cpu)?;
    let embedding = before.backbone.evaluate(&picture)?.to_vec2::<f32>()?;
    run_to_the_network(&config, &job);

    let after = network_file::open(&job.out)?;
    for tensor in training::network_tensors(&mut before)? {
        assert_ne!(after.f32(&tensor.name)?, tensor.values, "{}", tensor.name);
    }
    // The transformer is where it was, and is not written again.
    assert!(after.names().all(|name| name.starts_with("head.") || name == "centroids"));
    assert!(!job.out.join(backbone_file::NAME).exists());
    assert!(given == of_start());
    let mut again = StartingBackbone::open(&config, &job, &Device::Cpu)?;
    assert_eq!(again.evaluate(&picture)?.to_vec2::<f32>()?, embedding);

    let learning = Config { frozen: vec!["stem".into()], ..config.clone() };
    let seen_as = |change: &dyn Fn(&mut Input)| {
        let mut config = config.clone();
        change(&mut config.input);
        config
    };
    let squeezed = Operation::Resize { pixels: 8, filter: Filter::Bilinear };
    let wrong = [
        (learning, "the head alone"),
        (
            seen_as(&|input| input.mean = vec![0.5; 3]),
            "`mean` is [0.5,0.5,0.5], and must be [0.4,0.5,0.6]",
        ),
        (
            seen_as(&|input| input.std = vec![0.5; 3]),
            "`std` is [0.5,0.5,0.5], and must be [0.25,0.25,0.25]",
        ),
        (seen_as(&|input| input.width = 9), "`width` is 9, and must be 8"),
        (
            seen_as(&|input| input.clean = vec![squeezed]),
            r#"`clean` is [{"filter":"bilinear","operation":"resize","pixels":8}], and must be []"#,
        ),
    ];
    fixture::assert_refused::<Icbpl>(&job, wrong);
    Ok(())
}

#[test]
fn a_published_resnet_50_is_fine_tuned_or_keeps_its_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // Under torchvision's names, as Barlow Twins and DINO publish theirs.
    let architecture = Architecture { depth: Depth::Fifty, width: 2, stem: Stem::Large };
    let drawn = Segment::random("backbone", resnet::plan(&architecture, 3)?, 5)?;
    backbone_file::write(folder.path(), &drawn)?;
    let file = folder.path().join("resnet50.safetensors");
    fs::rename(folder.path().join(backbone_file::NAME), &file)?;
    let network = published::read(None, &[file])?;
    let (config, job) = published_start(folder.path(), &network, 32)?;
    let weight = "online.backbone.layer4.0.conv2.weight";
    let weight_after = |config: &Config| -> Result<(Vec<f32>, Vec<f32>)> {
        let mut networks = IcbplNetworks::new(config, &job, &Device::Cpu)?;
        let before =
            residual(&mut networks).segment.parameters.get(&weight["online.backbone.".len()..])?;
        run_to_the_network(config, &job);
        let after = network_file::open(&job.out)?.f32(weight)?;
        fs::remove_dir_all(&job.out)?;
        fs::create_dir(&job.out)?;
        Ok((before, after))
    };
    let (before, after) = weight_after(&config)?;
    assert!(before == after);
    let upper = vec!["stem".to_owned(), "layer1".to_owned(), "layer2".to_owned()];
    let tuned = Config { frozen: upper, ..config.clone() };
    let (again, after) = weight_after(&tuned)?;
    assert!(before == again && before != after);

    // One that learns may be taught another size, and no other mean.
    let larger = |config: &Config| {
        let mut config = config.clone();
        config.input.width = 40;
        config
    };
    larger(&tuned).check(&job)?;
    let mut darker = larger(&tuned);
    darker.input.mean = vec![0.1; 3];
    let wrong = [(larger(&config), "`width` is 40"), (darker, "`mean` is [0.1,0.1,0.1]")];
    fixture::assert_refused::<Icbpl>(&job, wrong);
    Ok(())
}

#[test]
fn what_cannot_work_is_refused_before_anything_runs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let job = job(folder.path(), "out");
    config().check(&job)?;
    let without_terms =
        Config { discrepancy_weight: 0., view_weight: 0., neighbour_weight: 0., ..config() };
    let wrong = [
        (with(|c| c.run.batch_size = 2), "batch-size"),
        (with(|c| c.run.epochs = 0), "epochs"),
        (with(|c| c.optimizer.head_learning_rate = 0.), "head-learning-rate"),
        (Config { view_weight: -1., ..config() }, "view-weight"),
        (without_terms, "nothing would be learnt"),
        (Config { neighbours: 0, ..config() }, "neighbours"),
        (Config { neighbours: 30, ..config() }, "neighbours"),
        (Config { frozen: vec!["layer5".into()], ..config() }, "layer5"),
        (with(|c| c.network.head = HeadWidths { hidden: 8, width: 2 }), "closed form"),
    ];
    fixture::assert_refused::<Icbpl>(&job, wrong);
    Ok(())
}

#[test]
fn rates_are_constant_or_fall_to_nothing() -> Result<()> {
    let rates = |config: &Config, step: usize| -> [f64; 2] {
        config.learning_rates(2).map(|rate| rate.at(step - 1))
    };
    let constant = with(|c| c.schedule.learning_rate = Schedule::Constant);
    assert_eq!(rates(&constant, 9), [1e-3, 5e-3]);
    let near = |got: [f64; 2], want: [f64; 2]| {
        got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-12)
    };
    assert!(near(rates(&config(), 1), [1e-3, 5e-3]));
    assert!(near(rates(&config(), 6), [5e-4, 2.5e-3]));
    Ok(())
}

#[test]
fn advice_names_keys_of_the_table() {
    let training::Advice { divergence, collapse } = config().plan(20).advice;
    fixture::assert_names_keys([divergence, collapse], &config());
}

#[test]
fn every_experiment_of_the_project_has_a_usable_table() {
    fixture::assert_experiments_are_usable::<Icbpl>();
}
