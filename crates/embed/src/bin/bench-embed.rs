//! Times embedding, ours beside PyTorch's where a Python has it.
//!
//! `cargo xtask bench embed [--peer-python PATH] [--json] [-- [--only WORD] [--rounds N]]`
//!
//! What is timed is [`training::Target::embedding`]: batches of pictures, which are noise that lies
//! in memory, through the backbone on running statistics. The peer does the same with PyTorch as it
//! is fastest there: `torch.compile` with frozen weights, channels last, bf16 by autocast; where a
//! machine cannot compile, without, and the row says so. See `bench/peer.py` of this crate.

use std::process::ExitCode;

use anyhow::{Context, Result};
use backbone::{Architecture, Configuration, Depth, Predictor, Projector, Stem};
use bench::{BenchUnit, ComparisonTable, Peers, Side};
use candle_core::Device::Cpu;
use clap::Parser;
use serde_json::{Value, json};
use training::{Learner, Precision, SgdTable};

#[derive(Parser)]
#[command(name = "bench-embed", about = "Times the embedding of pictures")]
struct BenchEmbedCli {
    #[command(flatten)]
    shared: bench::BenchArguments,
    /// Do this work turn by turn; how the program calls itself.
    #[arg(long, hide = true, value_name = "WORK")]
    side: Option<String>,
}

/// A network, and the pictures it is fed with.
struct EmbedWork {
    depth: Depth,
    pixels: usize,
    batch: usize,
}

const WORKS: [EmbedWork; 3] = [
    EmbedWork { depth: Depth::Eighteen, pixels: 32, batch: 128 },
    EmbedWork { depth: Depth::ThirtyFour, pixels: 96, batch: 64 },
    EmbedWork { depth: Depth::ThirtyFour, pixels: 224, batch: 16 },
];

/// Batches of one turn, so that a turn is not over in a moment.
const BATCHES: usize = 4;

fn main() -> ExitCode {
    let arguments = BenchEmbedCli::parse();
    let result = match &arguments.side {
        Some(name) => side(name),
        None => compare(&arguments.shared),
    };
    bench::exit("bench-embed", result)
}

fn compare(arguments: &bench::BenchArguments) -> Result<()> {
    let python = arguments.peer_python.as_deref();
    let program = include_str!("../../bench/peer.py");
    let peers = python.map(|python| Peers::new(python, &["torch"], program)).transpose()?;
    let threads = arguments.threads();
    let mut table = ComparisonTable::new(arguments.json);
    for work in WORKS.iter().filter(|work| arguments.wants(&work.name())) {
        let (name, keys) = (work.name(), work.keys());
        let ours = Side::ours(&["--side", &name], threads)?;
        let peer = peers.as_ref().map(|peers| {
            let words = [&keys.to_string(), &BATCHES.to_string(), &threads.to_string()];
            peers.start("PyTorch", &words.map(String::as_str), threads)
        });
        let peers = peer.transpose()?.into_iter().collect();
        table.add(bench::compare(
            arguments,
            &name,
            keys,
            BenchUnit::PerSecond("images"),
            ours,
            peers,
        )?);
    }
    table.finish()
}

impl EmbedWork {
    fn name(&self) -> String {
        let Self { pixels, batch, .. } = self;
        format!("{} @{pixels} batch {batch} bf16", self.backbone())
    }

    fn keys(&self) -> Value {
        json!({
            "backbone": self.backbone(),
            "pixels": self.pixels,
            "batch": self.batch,
            "precision": "bf16",
        })
    }

    fn backbone(&self) -> String {
        let layers = serde_json::to_value(self.depth).unwrap_or_default();
        format!("resnet{}", layers.as_str().unwrap_or_default())
    }

    /// The published network for pictures of this size.
    fn configuration(&self) -> Configuration {
        let stem = if self.pixels <= 32 { Stem::Plain } else { Stem::Large };
        Configuration {
            backbone: Architecture { depth: self.depth, width: 64, stem },
            projector: Projector { hidden: 64, width: 64 },
            predictor: Predictor { hidden: 64 },
            channels: 3,
            input: Value::Null,
        }
    }
}

/// Our side.
fn side(name: &str) -> Result<()> {
    let work = WORKS.iter().find(|work| work.name() == name);
    let work = work.with_context(|| format!("no work `{name}`"))?;
    let &EmbedWork { pixels, batch, .. } = work;
    let optimizer = SgdTable {
        peak_learning_rate: 0.05,
        predictor_learning_rate_factor: 1.,
        momentum: 0.9,
        weight_decay: 0.,
    };
    let Learner { mut target, .. } =
        Learner::random(&work.configuration(), optimizer, Precision::Bf16, 0)?;
    let noise = training::noise(1., (batch, pixels * pixels * 3), 1, &[], &Cpu)?;
    let pictures = noise.context("noise")?.reshape((batch, pixels, pixels, 3))?;
    bench::serve(|| {
        for _ in 0..BATCHES {
            target.embedding(&pictures)?;
        }
        Ok((BATCHES * batch) as f64)
    })
}
