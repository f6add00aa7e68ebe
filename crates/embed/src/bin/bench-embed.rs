//! Times embedding, ours beside PyTorch's where a Python has it.
//!
//! `cargo xtask bench embed [--peer-python PATH] [--peer-candle] [--json] [-- [--only WORD] [--rounds N]]`
//!
//! What is timed is [`training::Target::embedding`] for residual networks, on running statistics, and
//! [`Transformer::forward`] for published Vision Transformers: batches of pictures, which are noise that
//! lies in memory. The peer does the same with PyTorch as it is fastest there: `torch.compile` with frozen
//! weights; residual networks channels last with bf16 by autocast, transformers with bf16 weights and
//! PyTorch's own attention. Where a machine cannot compile, without, and the row says so. See
//! `bench/peer.py` of this crate.
//!
//! Further rows compare transformers in f32 with libraries as their users run them ([`libraries`]):
//! transformers and timm where the Python has them, and candle's own DINOv2.
//!
//! The last row compares ours with ours: ViT-S/14 alone, and as its "peer" the programs `prepare` and
//! `embed` of `assort` on a folder of JPEG files ([`folder`]). Its ratio is the time of the programs
//! divided by that of the network; the target is at most 1.15. The peak memory and the processor time of
//! the programs are not measured.

#[path = "bench-embed/folder.rs"]
mod folder;
#[path = "bench-embed/libraries.rs"]
mod libraries;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use backbone::{Architecture, Configuration, Depth, Predictor, Projector, Stem};
use bench::{BenchUnit, ComparisonTable, Peers, Side};
use candle_core::Device::Cpu;
use clap::Parser;
use layers::{
    Activation, FinalNorm, Mlp, Positions, Resampling, Transformer, TransformerPlan,
    TransformerTensor, TransformerWeights,
};
use serde_json::{Value, json};
use training::{Learner, Precision, SgdTable, Target};

use BenchNetwork::{Residual, Vit};
use Precision::{Bf16, F32};

#[derive(Parser)]
#[command(name = "bench-embed", about = "Times the embedding of pictures")]
struct BenchEmbedCli {
    #[command(flatten)]
    shared: bench::BenchArguments,
    /// Do this work turn by turn; how the program calls itself.
    #[arg(long, hide = true, value_name = "WORK")]
    side: Option<String>,
    /// Pictures of the work that begins with JPEG files.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pictures: u64,
    /// The program candle-dinov2 of crates/bench/peers, which `cargo xtask bench embed --peer-candle` builds.
    #[arg(long, value_name = "PATH")]
    peer_candle: Option<PathBuf>,
    /// Where the pictures for a side are.
    #[arg(long, hide = true, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// A network, and the pictures it is fed with.
struct EmbedWork {
    network: BenchNetwork,
    pixels: usize,
    batch: usize,
    precision: Precision,
}

enum BenchNetwork {
    Residual(Depth),
    /// DINOv2's: patches of 14 pixels, a class token, LayerScale, heads of width 64.
    Vit {
        name: &'static str,
        width: usize,
    },
}

const SMALL: BenchNetwork = Vit { name: "vit-s14", width: 384 };
const BASE: BenchNetwork = Vit { name: "vit-b14", width: 768 };

#[rustfmt::skip]
const WORKS: [EmbedWork; 8] = [
    EmbedWork { network: Residual(Depth::Eighteen), pixels: 32, batch: 128, precision: Bf16 },
    EmbedWork { network: Residual(Depth::ThirtyFour), pixels: 96, batch: 64, precision: Bf16 },
    EmbedWork { network: Residual(Depth::ThirtyFour), pixels: 224, batch: 16, precision: Bf16 },
    EmbedWork { network: Residual(Depth::Fifty), pixels: 224, batch: 16, precision: Bf16 },
    EmbedWork { network: SMALL, pixels: 224, batch: 16, precision: Bf16 },
    EmbedWork { network: SMALL, pixels: 224, batch: 16, precision: F32 },
    EmbedWork { network: BASE, pixels: 224, batch: 8, precision: Bf16 },
    EmbedWork { network: BASE, pixels: 224, batch: 8, precision: F32 },
];

/// Batches of one turn, so that a turn is not over in a moment.
const BATCHES: usize = 4;

fn main() -> ExitCode {
    let arguments = BenchEmbedCli::parse();
    let result = match &arguments.side {
        Some(name) => match &arguments.folder {
            Some(folder) => folder::side(name, folder, arguments.pictures),
            None => side(name),
        },
        None => compare(&arguments),
    };
    bench::exit("bench-embed", result)
}

fn compare(cli: &BenchEmbedCli) -> Result<()> {
    let BenchEmbedCli { shared: arguments, pictures, peer_candle, .. } = cli;
    let python = arguments.peer_python.as_deref();
    let program = include_str!("../../bench/peer.py");
    let peers = python.map(|python| Peers::new(python, &["torch"], program)).transpose()?;
    let threads = arguments.threads();
    let mut table = ComparisonTable::new(arguments)?;
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
        )?)?;
    }
    libraries::add_to(&mut table, arguments, peer_candle.as_deref())?;
    if arguments.wants(folder::WORK) {
        table.add(folder::compare(arguments, *pictures)?)?;
    }
    table.finish()
}

impl EmbedWork {
    fn name(&self) -> String {
        let Self { pixels, batch, .. } = self;
        format!("{} @{pixels} batch {batch} {}", self.backbone(), self.precision_name())
    }

    fn keys(&self) -> Value {
        json!({
            "backbone": self.backbone(),
            "pixels": self.pixels,
            "batch": self.batch,
            "precision": self.precision_name(),
        })
    }

    fn precision_name(&self) -> &'static str {
        match self.precision {
            F32 => "f32",
            Bf16 => "bf16",
        }
    }

    fn backbone(&self) -> String {
        match self.network {
            Residual(depth) => {
                let layers = serde_json::to_value(depth).unwrap_or_default();
                format!("resnet{}", layers.as_str().unwrap_or_default())
            }
            Vit { name, .. } => name.to_owned(),
        }
    }
}

/// Our side.
fn side(name: &str) -> Result<()> {
    let work = WORKS.iter().find(|work| work.name() == name);
    let work = work.with_context(|| format!("no work `{name}`"))?;
    let &EmbedWork { ref network, pixels, batch, precision } = work;
    let noise = training::noise(1., (batch, pixels * pixels * 3), 1, &[], &Cpu)?;
    let pictures = noise.context("noise")?.reshape((batch, pixels, pixels, 3))?;
    match *network {
        Residual(depth) => {
            let mut target = residual(depth, pixels, precision)?;
            serve(batch, || target.embedding(&pictures).map(drop))
        }
        Vit { width, .. } => {
            let network = Transformer::new(&weights(width)?, &Cpu, precision.into())?;
            serve(batch, || network.forward(&pictures).map(drop))
        }
    }
}

fn serve(batch: usize, mut embed: impl FnMut() -> candle_core::Result<()>) -> Result<()> {
    bench::serve(|| {
        for _ in 0..BATCHES {
            embed()?;
        }
        Ok((BATCHES * batch) as f64)
    })
}

/// The published network for pictures of this size.
fn residual(depth: Depth, pixels: usize, precision: Precision) -> Result<Target> {
    let stem = if pixels <= 32 { Stem::Plain } else { Stem::Large };
    let configuration = Configuration {
        backbone: Architecture { depth, width: 64, stem },
        projector: Projector { hidden: 64, width: 64 },
        predictor: Predictor { hidden: 64 },
        channels: 3,
        input: Value::Null,
    };
    let optimizer = SgdTable {
        peak_learning_rate: 0.05,
        predictor_learning_rate_factor: 1.,
        momentum: 0.9,
        weight_decay: 0.,
    };
    Ok(Learner::random(&configuration, optimizer, precision, 0)?.target)
}

/// Small weights, which all take part, for DINOv2's network of this width.
fn weights(width: usize) -> Result<TransformerWeights> {
    Ok(TransformerWeights::new(&plan(width), tensors(width)?)?)
}

/// DINOv2's network of this width.
fn plan(width: usize) -> TransformerPlan {
    TransformerPlan {
        patch_pixels: 14,
        patch_bias: true,
        width,
        depth: 12,
        heads: width / 64,
        key_bias: true,
        mlp: Mlp::Plain { hidden: 4 * width, activation: Activation::GeluErf },
        layer_scale: true,
        class_token: true,
        registers: 0,
        positions: Positions::Absolute { grid: 16, resampling: Resampling::Size },
        pre_norm: false,
        final_norm: FinalNorm::AllTokens,
        epsilon: 1e-6,
        attention_pooling: false,
        projection: None,
    }
}

/// Shape and values of tensors by name.
type NamedTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Small random values for each tensor of the network.
fn tensors(width: usize) -> Result<NamedTensors> {
    let mut given = BTreeMap::new();
    for (at, TransformerTensor { name, shape }) in plan(width).tensors().into_iter().enumerate() {
        let noise = training::noise(0.05, (1, shape.iter().product()), at as u64, &[], &Cpu)?;
        given.insert(name, (shape, noise.context("noise")?.flatten_all()?.to_vec1()?));
    }
    Ok(given)
}
