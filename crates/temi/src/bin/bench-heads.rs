//! Times training steps of TEMI's heads beside PyTorch.
//!
//! `cargo xtask bench heads [--peer-python PATH] [--json] [-- [--only WORD] [--rounds N] [--small]]`
//!
//! Both sides train the same heads, from the same parameters, on the same batch: forward pass of the targets, forward and
//! backward pass of the online heads, AdamW, moving average. PyTorch multiplies all heads in one batched product. Each side
//! writes its mean loss after the steps that warm it up, and the bench fails if they differ by more than 10⁻³: then one side
//! did other work. The peer is in `bench/peer.py` of this crate.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use bench::{BenchUnit, ComparisonTable, Peers, Side};
use clap::Parser;
use collective::Communicator;
use frozen::product::FlatMatrix;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::json;
use temi::learner::{HeadUpdate, LearningHead, step};
use temi::loss::Objective;
use temi::network::HeadShape;

#[derive(Parser)]
#[command(name = "bench-heads", about = "Times training steps of TEMI's heads")]
struct HeadBench {
    #[command(flatten)]
    shared: bench::BenchArguments,
    /// Use a few small heads, to test the bench.
    #[arg(long)]
    small: bool,
    /// Train the heads in a folder. The program calls itself with this.
    #[arg(long, hide = true, value_name = "FOLDER")]
    side: Option<String>,
}

/// The file `shape.json` in the folder of a work.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct WorkShape {
    heads: usize,
    width: usize,
    hidden: usize,
    bottleneck: usize,
    clusters: usize,
    pairs: usize,
    /// Steps in a turn, and before the first one.
    steps: usize,
    threads: usize,
}

impl WorkShape {
    fn head(&self) -> HeadShape {
        let Self { width, hidden, bottleneck, clusters, .. } = *self;
        HeadShape { width, hidden, bottleneck, clusters }
    }
}

fn works(small: bool, threads: usize) -> Vec<(String, WorkShape)> {
    let shape = |heads, width, hidden, clusters, pairs, steps| {
        let bottleneck = hidden / 2;
        WorkShape { heads, width, hidden, bottleneck, clusters, pairs, steps, threads }
    };
    let shapes = match small {
        true => vec![shape(2, 24, 16, 3, 8, 2)],
        false => vec![shape(16, 384, 512, 10, 256, 10), shape(16, 768, 512, 100, 256, 10)],
    };
    let name = |shape: &WorkShape| {
        let WorkShape { heads, width, hidden, bottleneck, clusters, pairs, .. } = shape;
        format!("{heads} heads {width}-{hidden}-{bottleneck}-{clusters}, {pairs} pairs, f32")
    };
    shapes.into_iter().map(|shape| (name(&shape), shape)).collect()
}

fn main() -> ExitCode {
    let arguments = HeadBench::parse();
    let result = match &arguments.side {
        Some(folder) => side(Path::new(folder)),
        None => compare(&arguments),
    };
    bench::exit("bench-heads", result)
}

fn compare(HeadBench { shared, small, .. }: &HeadBench) -> Result<()> {
    let python = shared.peer_python.as_deref();
    let program = include_str!("../../bench/peer.py");
    let peers =
        python.map(|python| Peers::new(python, &["numpy", "torch"], program)).transpose()?;
    let threads = shared.threads();
    let mut table = ComparisonTable::new(shared)?;
    for (name, shape) in works(*small, threads).iter().filter(|(name, _)| shared.wants(name)) {
        let folder = tempfile::tempdir().context("making a temporary folder")?;
        write_data(shape, folder.path())?;
        let place = folder.path().to_str().context("a folder whose name is text")?;
        let ours = Side::ours(&["--side", place], threads)?;
        let peer =
            peers.as_ref().map(|peers| peers.start("torch", &[place], threads)).transpose()?;
        let sides: Vec<Side> = peer.into_iter().collect();
        let has_peer = !sides.is_empty();
        let unit = BenchUnit::PerSecond("pairs");
        let mut row =
            bench::compare(shared, name, serde_json::to_value(shape)?, unit, ours, sides)?;
        let loss = |side: &str| -> Result<f64> {
            let text = fs::read_to_string(folder.path().join(format!("{side}.loss")));
            Ok(text.with_context(|| format!("{side} wrote no loss"))?.parse()?)
        };
        let ours = loss("ours")?;
        row.keys.insert("loss".into(), json!(ours));
        if has_peer {
            let theirs = loss("torch")?;
            let is_near = (ours - theirs).abs() < 1e-3;
            ensure!(is_near, "{name}: the loss is {ours} with ours, and {theirs} with PyTorch");
            row.keys.insert("peer-loss".into(), json!(theirs));
        }
        table.add(row)?;
    }
    table.finish()
}

/// Writes random rows around as many centres as clusters, and the parameters of the heads.
fn write_data(shape: &WorkShape, folder: &Path) -> Result<()> {
    fs::write(folder.join("shape.json"), serde_json::to_string(shape)?)?;
    let mut random = stage::random::stream(0, "bench heads", &[]);
    let mut draw =
        |count: usize| -> Vec<f32> { (0..count).map(|_| random.random_range(-1f32..1.)).collect() };
    let centres = draw(shape.clusters * shape.width);
    let mut rows = draw(2 * shape.pairs * shape.width);
    for (at, row) in rows.chunks_exact_mut(shape.width).enumerate() {
        let centre = &centres[at % shape.pairs % shape.clusters * shape.width..];
        row.iter_mut().zip(centre).for_each(|(x, centre)| *x += 2. * centre);
    }
    let heads = (0..shape.heads as u64).flat_map(|head| shape.head().random(0.02, 0, head));
    write(&folder.join("rows.f32"), &rows)?;
    write(&folder.join("heads.f32"), &heads.collect::<Vec<f32>>())
}

fn write(path: &Path, numbers: &[f32]) -> Result<()> {
    Ok(fs::write(path, numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?)
}

fn read(path: &Path) -> Result<Vec<f32>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(bytes.as_chunks().0.iter().map(|&number| f32::from_le_bytes(number)).collect())
}

/// Trains our heads.
fn side(folder: &Path) -> Result<()> {
    let shape: WorkShape = serde_json::from_str(&fs::read_to_string(folder.join("shape.json"))?)?;
    let rows = read(&folder.join("rows.f32"))?;
    let parameters = read(&folder.join("heads.f32"))?;
    let head = shape.head();
    let mut heads: Vec<LearningHead<f32>> = parameters
        .chunks_exact(head.parameters())
        .map(|online| LearningHead::new(&head, online.to_vec()))
        .collect();
    let mut taken = 0;
    bench::serve(|| {
        let mut losses = vec![];
        for _ in 0..shape.steps {
            taken += 1;
            let update = HeadUpdate {
                objective: Objective {
                    temperature: 0.1,
                    beta: 0.6,
                    balance: 1.,
                    marginal_floor: 1e-8,
                },
                marginal_decay: 0.9,
                learning_rate: 2e-4,
                weight_decay: 1e-4,
                target_decay: 0.99,
                step: taken,
                still_steps: 0,
            };
            let rows = FlatMatrix::new(&rows, shape.width)?;
            losses = step(&mut heads, &head, rows, &update, &Communicator::single())?;
        }
        if taken == shape.steps as u64 {
            let mean = losses.iter().sum::<f64>() / losses.len() as f64;
            fs::write(folder.join("ours.loss"), mean.to_string())?;
        }
        Ok((shape.steps * shape.pairs) as f64)
    })
}
