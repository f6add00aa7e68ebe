//! Times whole steps of BYOL, ours beside PyTorch's where a Python has it.
//!
//! `cargo xtask bench train [--peer-python PATH] [--json] [-- [--only WORD] [--rounds N]
//! [--profile]]`
//!
//! A step is what [`pretraining::step`] does with two views of a batch: two forward and backward
//! passes of the online network, two forward passes of the target without gradient, loss, optimizer
//! and moving average. Views are noise that lies in memory, so that no picture is decoded. The peer
//! does the same with PyTorch as it is fastest there: channels last and, for bf16, autocast, without
//! `torch.compile`; see `bench/peer.py` of this crate. An image is two views.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use backbone::{Architecture, Configuration, Depth, Predictor, Projector, Stem};
use bench::{BenchUnit, ComparisonTable, Peers, Side};
use candle_core::{Device::Cpu, Tensor};
use clap::Parser;
use layers::profile;
use pretraining::Rates;
use serde_json::{Value, json};
use stage::{DataTable, Job};
use training::loss::regression_loss;
use training::{Advice, Learner, Precision, Run, RunPlan, SgdTable};

#[derive(Parser)]
#[command(name = "bench-train", about = "Times whole steps of BYOL")]
struct BenchTrainCli {
    #[command(flatten)]
    shared: bench::BenchArguments,
    /// Say where the time of our steps goes, instead of comparing them.
    #[arg(long, conflicts_with = "peer_python")]
    profile: bool,
    /// Do this work turn by turn; how the program calls itself.
    #[arg(long, hide = true, value_name = "WORK")]
    side: Option<String>,
}

/// Sizes of a network.
struct NetworkSizes {
    /// Channels of the pictures.
    channels: usize,
    /// Channels of the first stage.
    width: usize,
    /// The hidden width of both heads.
    hidden: usize,
    /// The width of projections.
    output: usize,
}

const PUBLISHED: NetworkSizes = NetworkSizes { channels: 3, width: 64, hidden: 4096, output: 256 };
const OF_DIGITS: NetworkSizes = NetworkSizes { channels: 1, width: 16, hidden: 512, output: 128 };

/// A network, the pictures it is fed with, and the number type.
struct TrainWork {
    depth: Depth,
    sizes: NetworkSizes,
    pixels: usize,
    batch: usize,
    precision: Precision,
}

const WORKS: [TrainWork; 5] = [
    TrainWork {
        depth: Depth::Ten,
        sizes: OF_DIGITS,
        pixels: 8,
        batch: 64,
        precision: Precision::F32,
    },
    TrainWork::published(Depth::Eighteen, 32, 128, Precision::Bf16),
    TrainWork::published(Depth::Eighteen, 32, 128, Precision::F32),
    TrainWork::published(Depth::ThirtyFour, 96, 64, Precision::Bf16),
    TrainWork::published(Depth::ThirtyFour, 224, 16, Precision::Bf16),
];

fn main() -> ExitCode {
    let arguments = BenchTrainCli::parse();
    let result = match &arguments.side {
        Some(name) => side(name),
        None if arguments.profile => profile(&arguments.shared),
        None => compare(&arguments.shared),
    };
    bench::exit("bench-train", result)
}

fn compare(arguments: &bench::BenchArguments) -> Result<()> {
    let python = arguments.peer_python.as_deref();
    let program = include_str!("../../bench/peer.py");
    let peers = python.map(|python| Peers::new(python, &["torch"], program)).transpose()?;
    let threads = arguments.threads();
    let mut table = ComparisonTable::new(arguments)?;
    for work in WORKS.iter().filter(|work| arguments.wants(&work.name())) {
        let (name, keys) = (work.name(), work.keys());
        let ours = Side::ours(&["--side", &name], threads)?;
        let peer = peers.as_ref().map(|peers| {
            let threads_word = threads.to_string();
            peers.start("PyTorch", &[&keys.to_string(), &threads_word], threads)
        });
        let peers = peer.transpose()?.into_iter().collect();
        table.add(bench::compare(
            arguments,
            &name,
            keys,
            BenchUnit::PerSecond("images"),
            ours,
            peers,
        )?)?;
    }
    table.finish()
}

impl TrainWork {
    const fn published(depth: Depth, pixels: usize, batch: usize, precision: Precision) -> Self {
        Self { depth, sizes: PUBLISHED, pixels, batch, precision }
    }

    fn named(name: &str) -> Result<&'static Self> {
        WORKS.iter().find(|work| work.name() == name).with_context(|| format!("no work `{name}`"))
    }

    fn name(&self) -> String {
        let Self { pixels, batch, .. } = self;
        format!("{} @{pixels} batch {batch} {}", self.backbone(), self.precision_name())
    }

    fn keys(&self) -> Value {
        json!({
            "backbone": self.backbone(),
            "width": self.sizes.width,
            "channels": self.sizes.channels,
            "hidden": self.sizes.hidden,
            "output": self.sizes.output,
            "pixels": self.pixels,
            "batch": self.batch,
            "precision": self.precision_name(),
        })
    }

    fn backbone(&self) -> String {
        let layers = serde_json::to_value(self.depth).unwrap_or_default();
        format!("resnet{}", layers.as_str().unwrap_or_default())
    }

    fn precision_name(&self) -> &'static str {
        match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    fn configuration(&self) -> Configuration {
        let stem = if self.pixels <= 32 { Stem::Plain } else { Stem::Large };
        Configuration {
            backbone: Architecture { depth: self.depth, width: self.sizes.width, stem },
            projector: Projector { hidden: self.sizes.hidden, width: self.sizes.output },
            predictor: Predictor { hidden: self.sizes.hidden },
            channels: self.sizes.channels,
            input: Value::Null,
        }
    }

    fn learner(&self) -> Result<Learner> {
        let optimizer = SgdTable {
            peak_learning_rate: 0.05,
            predictor_learning_rate_factor: 10.,
            momentum: 0.9,
            weight_decay: 5e-4,
        };
        Learner::random(&self.configuration(), optimizer, self.precision, 0)
    }

    /// Two views of noise.
    fn views(&self) -> Result<[Tensor; 2]> {
        let &Self { pixels, batch, .. } = self;
        let channels = self.sizes.channels;
        let view = |number| -> Result<Tensor> {
            let shape = (batch, pixels * pixels * channels);
            let noise = training::noise(1., shape, number, &[], &Cpu)?.context("noise")?;
            Ok(noise.reshape((batch, pixels, pixels, channels))?)
        };
        Ok([view(1)?, view(2)?])
    }
}

const RATES: Rates = Rates { learning_rate: 0.05, target_decay: 0.996, noise: 0., seed: 0 };

/// Our side: steps as a run of the stage takes them.
fn side(name: &str) -> Result<()> {
    let work = TrainWork::named(name)?;
    let folder = tempfile::tempdir()?;
    let data = DataTable { clusters: 2, train_on: vec![], score_on: vec![] };
    let job = Job::new("pretraining", "none", folder.path(), data);
    let plan = RunPlan {
        epochs: 1,
        steps_per_epoch: 1,
        batch_size: work.batch,
        save_every: 1,
        collapse_deviation: 0.,
        advice: Advice::BYOL,
    };
    let (mut learner, views) = (work.learner()?, work.views()?);
    let mut run = Run::resume_or_start(&job, &(), "none", plan, &mut learner)?;
    bench::serve(|| {
        pretraining::step(&mut run, &mut learner, &views, RATES)?;
        Ok(work.batch as f64)
    })
}

/// What [`pretraining::step`] is made of.
const PARTS: [&str; 6] =
    ["target", "online", "loss and its gradient", "backward", "optimizer", "moving average"];

/// Prints, over the rounds, the mean time of each part and of each kind of layer.
fn profile(arguments: &bench::BenchArguments) -> Result<()> {
    for work in WORKS.iter().filter(|work| arguments.wants(&work.name())) {
        let (mut learner, views) = (work.learner()?, work.views()?);
        timed_parts(&mut learner, &views)?; // Memory is taken, weights are arranged.
        let rounds = arguments.rounds as usize;
        let (mut sums, mut result) = ([0.; PARTS.len()], anyhow::Ok(()));
        let rows = profile::record(|| {
            result = (0..rounds).try_for_each(|_| {
                let parts = timed_parts(&mut learner, &views)?;
                sums.iter_mut().zip(parts).for_each(|(sum, part)| *sum += part);
                Ok(())
            });
        });
        result?;
        let all: f64 = sums.iter().sum();
        println!("{}, {:.1} images a second", work.name(), (work.batch * rounds) as f64 / all);
        println!("{:36} {:>9} {:>6}", "parts of a step", "ms a step", "share");
        for (part, sum) in PARTS.iter().zip(sums) {
            println!("{part:36} {:9.2} {:4.1} %", 1e3 * sum / rounds as f64, 100. * sum / all);
        }
        println!("{:36} {:9.2}", "all", 1e3 * all / rounds as f64);
        let network = learner.online.backbone.segment.network();
        println!("{}", profile::ProfileTable { rows: &rows, steps: rounds, network });
    }
    Ok(())
}

fn timed_parts(
    learner: &mut Learner,
    [view_1, view_2]: &[Tensor; 2],
) -> Result<[f64; PARTS.len()]> {
    let Learner { online, target } = learner;
    let mut parts = [0.; PARTS.len()];
    let mut start = Instant::now();
    let mut lap = |part: usize| {
        parts[part] += start.elapsed().as_secs_f64();
        start = Instant::now();
    };
    let projections = target.project([view_1, view_2])?;
    lap(0);
    for (view, projection) in [(view_1, &projections[1]), (view_2, &projections[0])] {
        let seams = online.forward(view, None)?;
        lap(1);
        let loss = regression_loss(&seams[2], projection)?;
        let gradients = (loss * 0.5)?.backward()?;
        lap(2);
        online.backward(seams, &gradients)?;
        lap(3);
    }
    online.step(RATES.learning_rate)?;
    lap(4);
    target.follow(online, RATES.target_decay)?;
    lap(5);
    Ok(parts)
}
