//! Times k-means, neighbours, scores and the map of a page beside other libraries.
//!
//! `cargo xtask bench assignment [--peer-python PATH] [--json] [-- [--only WORD] [--rounds N] [--small]]`
//!
//! All sides compute on the same numbers, which are in memory before the clock starts. Every side
//! writes the value that it computed (inertia, sum of products with the neighbours, sum of scores).
//! A row holds ours and the peers' (`value`, `peer-values`), and the bench fails if our inertia or
//! scores are worse than a peer's by more than 10⁻⁴, or the trustworthiness of our map by more than 10⁻²,
//! so that no side is fast by doing less. A row shows the fastest peer. `-- --large` clusters a million
//! points into 20,000 clusters, in memory and in shards, once and without peers. The peers are in
//! `bench/peer.py` of this crate.

use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use assignment::{
    KMeans, Metric, Shards, Streaming, TSne, adjusted_rand_index, contingency, k_means,
    k_means_from, k_means_mini_batch, k_means_streaming, nearest_neighbours, principal_plane,
    trustworthiness,
};
use bench::{BenchUnit, Comparison, ComparisonTable, Peers, Side};
use clap::Parser;
use metrics::agreement::{Mean, accuracy, normalized_mutual_information};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(name = "bench-assignment", about = "Times k-means, neighbours, scores and maps")]
struct AssignmentBench {
    #[command(flatten)]
    shared: bench::BenchArguments,
    /// Use a hundredth of the size, to test the bench.
    #[arg(long)]
    small: bool,
    /// Cluster a million points into 20,000 clusters, once in memory and in shards.
    #[arg(long)]
    large: bool,
    /// Do one work on the files of a folder. The program calls itself with this.
    #[arg(long, hide = true, num_args = 2, value_names = ["KIND", "FOLDER"])]
    side: Vec<String>,
}

/// A task of the bench.
struct AssignmentWork {
    name: &'static str,
    kind: &'static str,
    peers: &'static [&'static str],
    shape: WorkShape,
}

/// The file `shape.json` in the folder of a work.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct WorkShape {
    n: usize,
    /// Width of the points; none for scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    d: Option<usize>,
    clusters: usize,
    /// Most updates of the centres.
    iterations: usize,
    restarts: usize,
    neighbours: usize,
    threads: usize,
}

fn works(small: bool, threads: usize) -> Vec<AssignmentWork> {
    let divisor = if small { 100 } else { 1 };
    let shape = |n: usize, d, clusters: usize| WorkShape {
        n: n / divisor,
        d,
        clusters: clusters.min(n / divisor / 5),
        iterations: 300,
        restarts: 10,
        neighbours: 20,
        threads,
    };
    vec![
        AssignmentWork {
            name: "k-means 200,000x512 K 1,000, 20 iterations",
            kind: "k-means",
            peers: &["faiss", "scikit-learn", "torch"],
            shape: WorkShape { iterations: 20, ..shape(200_000, Some(512), 1000) },
        },
        AssignmentWork {
            name: "k-means 50,000x256 K 10, 10 restarts",
            kind: "restarts",
            peers: &["scikit-learn"],
            shape: shape(50_000, Some(256), 10),
        },
        AssignmentWork {
            name: "neighbours: exact 20 of 50,000x512",
            kind: "neighbours",
            peers: &["faiss", "torch-bf16"],
            shape: shape(50_000, Some(512), 100),
        },
        AssignmentWork {
            name: "map of 20,000x64 in 20 groups: t-SNE, 750 iterations, 15 neighbours",
            kind: "map",
            peers: &["openTSNE"],
            shape: WorkShape { iterations: 750, neighbours: 15, ..shape(20_000, Some(64), 20) },
        },
        AssignmentWork {
            name: "ACC+NMI+ARI of 1,000,000 labels, K 10",
            kind: "scores",
            peers: &["scikit-learn"],
            shape: shape(1_000_000, None, 10),
        },
        AssignmentWork {
            name: "ACC+NMI+ARI of 1,000,000 labels, K 1,000",
            kind: "scores",
            peers: &["scikit-learn"],
            shape: shape(1_000_000, None, 1000),
        },
    ]
}

fn main() -> ExitCode {
    let arguments = AssignmentBench::parse();
    let result = match &arguments.side[..] {
        [kind, folder] => side(kind, Path::new(folder)),
        _ if arguments.large => large(&arguments),
        _ => compare(&arguments),
    };
    bench::exit("bench-assignment", result)
}

const PACKAGES: [&str; 6] = ["numpy", "scipy", "sklearn", "faiss", "torch", "openTSNE"];

fn compare(AssignmentBench { shared, small, .. }: &AssignmentBench) -> Result<()> {
    let python = shared.peer_python.as_deref();
    let program = include_str!("../../bench/peer.py");
    let peers = python.map(|python| Peers::new(python, &PACKAGES, program)).transpose()?;
    let threads = shared.threads();
    let mut table = ComparisonTable::new(shared)?;
    for work in works(*small, threads).iter().filter(|work| shared.wants(work.name)) {
        let folder = tempfile::tempdir().context("making a temporary folder")?;
        write_data(work, folder.path())?;
        let place = folder.path().to_str().context("a folder whose name is text")?;
        let ours = Side::ours(&["--side", work.kind, place], threads)?;
        let started = peers.as_ref().map_or(Ok(vec![]), |peers| {
            let start = |&peer| peers.start(peer, &[peer, work.kind, place], threads);
            work.peers.iter().map(start).collect::<Result<Vec<Side>>>()
        })?;
        let keys = serde_json::to_value(&work.shape)?;
        let mut row = bench::compare(shared, work.name, keys, BenchUnit::Seconds, ours, started)?;
        let names = if peers.is_some() { work.peers } else { &[] };
        // A hundredth of the points has other local optima.
        let tolerance = if *small || work.kind == "map" { 1e-2 } else { 1e-4 };
        hold_values(work, folder.path(), names, tolerance, &mut row)?;
        table.add(row)?;
    }
    table.finish()
}

/// Adds the values that the sides computed to the row, and compares ours with those of the peers.
fn hold_values(
    work: &AssignmentWork,
    folder: &Path,
    peers: &[&str],
    tolerance: f64,
    row: &mut Comparison,
) -> Result<()> {
    if work.kind == "map" {
        peers.iter().chain(&["ours"]).try_for_each(|side| judge_map(&work.shape, folder, side))?;
    }
    let value = |side: &str| -> Result<f64> {
        let text = fs::read_to_string(folder.join(format!("{side}.value")));
        Ok(text.with_context(|| format!("{side} wrote no value"))?.parse()?)
    };
    let ours = value("ours")?;
    let mut theirs = serde_json::Map::new();
    for &peer in peers {
        let value = value(peer)?;
        theirs.insert(peer.to_owned(), json!(value));
        // A lower inertia is better, and a higher trustworthiness; neighbours and scores are right or wrong.
        let off = ours / value - 1.;
        let off = match work.kind {
            "restarts" => off.max(0.),
            "map" => (-off).max(0.),
            _ => off.abs(),
        };
        ensure!(off < tolerance, "{}: ours computed {ours}, {peer} {value}", work.name);
    }
    row.keys.insert("value".into(), json!(ours));
    row.keys.insert("peer-values".into(), Value::Object(theirs));
    Ok(())
}

/// Writes the trustworthiness of the map that a side left, from 1,000 of its points.
fn judge_map(shape: &WorkShape, folder: &Path, side: &str) -> Result<()> {
    let points = read(&folder.join("points.f32"), f32::from_le_bytes)?;
    let map: Vec<f32> = read(&folder.join(format!("{side}.map")), f32::from_le_bytes)?;
    let map: Vec<[f32; 2]> = map.chunks(2).map(|at| [at[0], at[1]]).collect();
    let (n, d, step) = (shape.n, shape.d.context("a width")?, shape.n.div_ceil(1000));
    let value = trustworthiness(&points, n, d, &map, shape.neighbours, step)?;
    Ok(fs::write(folder.join(format!("{side}.value")), value.to_string())?)
}

/// Writes the input of a work: unit rows around centres, or two related groupings.
fn write_data(work: &AssignmentWork, folder: &Path) -> Result<()> {
    let shape = &work.shape;
    fs::write(folder.join("shape.json"), serde_json::to_string(shape)?)?;
    let write = |name: &str, bytes: &[u8]| fs::write(folder.join(name), bytes);
    let Some(d) = shape.d else {
        let mut random = stage::random::stream(0, "bench labels", &[]);
        let k = shape.clusters as u32;
        let clusters: Vec<u32> = (0..shape.n).map(|_| random.random_range(0..k)).collect();
        let related = |&cluster: &u32| match random.random::<f32>() < 0.6 {
            true => (cluster * 7 + 3) % k,
            false => random.random_range(0..k),
        };
        let classes: Vec<u32> = clusters.iter().map(related).collect();
        write("clusters.u32", &bytes(&clusters, u32::to_le_bytes))?;
        return Ok(write("classes.u32", &bytes(&classes, u32::to_le_bytes))?);
    };
    let points = blobs(shape.n, d, shape.clusters);
    write("points.f32", &bytes(&points, f32::to_le_bytes))?;
    let centres: Vec<f32> = points
        .chunks(d)
        .step_by(shape.n / shape.clusters)
        .take(shape.clusters)
        .flatten()
        .copied()
        .collect();
    Ok(write("centres.f32", &bytes(&centres, f32::to_le_bytes))?)
}

fn bytes<T: Copy, const B: usize>(values: &[T], to_bytes: fn(T) -> [u8; B]) -> Vec<u8> {
    values.iter().flat_map(|&value| to_bytes(value)).collect()
}

/// Draws unit rows around `k` unit centres, with noise three times as long as a centre.
fn blobs(n: usize, d: usize, k: usize) -> Vec<f32> {
    use rayon::prelude::*;
    let normal = |purpose: &str, counter: usize, length: f32| -> Vec<f32> {
        let mut random = stage::random::stream(0, purpose, &[counter as u64]);
        // The sum of four uniform numbers is nearly normal, and the same on every machine.
        let mut draw = || (0..4).map(|_| random.random::<f32>() - 0.5).sum::<f32>();
        (0..d).map(|_| draw() * length * (3. / d as f32).sqrt()).collect()
    };
    let unit = |mut row: Vec<f32>| -> Vec<f32> {
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
        row
    };
    let centres: Vec<Vec<f32>> = (0..k).map(|c| unit(normal("bench centres", c, 1.))).collect();
    let mut random = stage::random::stream(0, "bench blobs", &[]);
    let own: Vec<usize> = (0..n).map(|_| random.random_range(0..k)).collect();
    own.par_iter()
        .enumerate()
        .flat_map_iter(|(i, &own)| {
            let noise = normal("bench noise", i, 3.);
            unit(noise.iter().zip(&centres[own]).map(|(x, c)| x + c).collect())
        })
        .collect()
}

/// Runs our side.
fn side(kind: &str, folder: &Path) -> Result<()> {
    let shape: WorkShape = serde_json::from_str(&fs::read_to_string(folder.join("shape.json"))?)?;
    let floats = |name: &str| read(&folder.join(name), f32::from_le_bytes);
    let leave = |value: f64| fs::write(folder.join("ours.value"), value.to_string());
    let (n, d) = (shape.n, shape.d.unwrap_or(0));
    let config = KMeans {
        clusters: shape.clusters,
        metric: Metric::Euclidean,
        restarts: shape.restarts,
        iterations: shape.iterations,
        tolerance: 1e-4,
    };
    match kind {
        "k-means" => {
            let (points, centres) = (floats("points.f32")?, floats("centres.f32")?);
            // As in the other libraries, the last assignment moves no centre.
            let config = KMeans { tolerance: 0., iterations: shape.iterations + 1, ..config };
            bench::serve(|| {
                leave(k_means_from(&points, n, d, &centres, &config)?.inertia)?;
                Ok(1.)
            })
        }
        "restarts" => {
            let points = floats("points.f32")?;
            bench::serve(|| {
                leave(k_means(&points, n, d, &config, 0)?.inertia)?;
                Ok(1.)
            })
        }
        "neighbours" => {
            let points = floats("points.f32")?;
            let mut is_first = true;
            bench::serve(|| {
                let found = nearest_neighbours(&points, n, d, shape.neighbours)?;
                if std::mem::take(&mut is_first) {
                    leave(sum_of_products(&points, d, &found, shape.neighbours))?;
                }
                Ok(1.)
            })
        }
        "map" => {
            let points = floats("points.f32")?;
            let mut schedule = TSne { early_iterations: 1, late_iterations: 1, ..TSne::STANDARD };
            bench::serve(|| {
                let near = nearest_neighbours(&points, n, d, shape.neighbours)?;
                let map = schedule.map(&principal_plane(&points, n, d)?, &near, 0, |_| Ok(()))?;
                fs::write(folder.join("ours.map"), bytes(map.as_flattened(), f32::to_le_bytes))?;
                schedule = TSne::STANDARD; // The first call warms up.
                Ok(1.)
            })
        }
        "scores" => {
            let clusters = read(&folder.join("clusters.u32"), u32::from_le_bytes)?;
            let classes = read(&folder.join("classes.u32"), u32::from_le_bytes)?;
            bench::serve(|| {
                let table = contingency(&clusters, &classes, shape.clusters, shape.clusters)?;
                leave(
                    accuracy(&table)
                        + normalized_mutual_information(&table, Mean::Arithmetic)
                        + adjusted_rand_index(&table),
                )?;
                Ok(1.)
            })
        }
        _ => once(kind, folder, &shape, &config),
    }
}

/// Sums the products of every 50th row with its neighbours, in `f64`.
fn sum_of_products(points: &[f32], d: usize, found: &[u32], k: usize) -> f64 {
    let row = |i: usize| &points[i * d..][..d];
    let product = |i: usize, j: u32| -> f64 {
        row(i).iter().zip(row(j as usize)).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    };
    let of = |(i, neighbours): (usize, &[u32])| -> f64 {
        neighbours.iter().map(|&j| product(i, j)).sum()
    };
    found.chunks(k).enumerate().step_by(50).map(of).sum()
}

/// Points of a shard.
const SHARD: usize = 50_000;

/// Runs the large works one after the other, each in its own process.
fn large(AssignmentBench { shared, small, .. }: &AssignmentBench) -> Result<()> {
    let divisor = if *small { 100 } else { 1 };
    let (n, clusters) = (1_000_000 / divisor, 20_000 / divisor);
    let shape = WorkShape {
        n,
        d: Some(256),
        clusters,
        iterations: 10,
        restarts: 1,
        neighbours: 0,
        threads: shared.threads(),
    };
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    write_data(&AssignmentWork { name: "large", kind: "large", peers: &[], shape }, folder.path())?;
    let kinds = ["large: in memory", "large: streaming", "large: mini-batch"];
    for kind in kinds.into_iter().filter(|kind| shared.wants(kind)) {
        let mut command = Command::new(std::env::current_exe()?);
        command.env("RAYON_NUM_THREADS", shared.threads().to_string());
        let status = command.args(["--side", kind]).arg(folder.path()).status()?;
        ensure!(status.success(), "{kind} ended with {status}");
    }
    Ok(())
}

/// Does a large work once, and prints time and memory as a JSON object.
fn once(kind: &str, folder: &Path, shape: &WorkShape, config: &KMeans) -> Result<()> {
    let (n, d) = (shape.n, shape.d.unwrap_or(0));
    let path = folder.join("points.f32");
    let lengths: Vec<usize> = (0..n).step_by(SHARD).map(|i| SHARD.min(n - i)).collect();
    let shards = Shards::new(d, lengths.clone(), |shard| {
        let first = lengths[..shard].iter().sum::<usize>();
        read_part(&path, first * d, lengths[shard] * d, f32::from_le_bytes)
    });
    let streaming = Streaming { sample: 16 * shape.clusters, passes: shape.iterations };
    let start = Instant::now();
    let found = match kind {
        "large: in memory" => {
            let points = read(&path, f32::from_le_bytes)?;
            k_means(&points, n, d, config, 0)?
        }
        "large: streaming" => k_means_streaming(&shards, config, &streaming, 0)?,
        "large: mini-batch" => {
            let streaming = Streaming { passes: 2, ..streaming };
            k_means_mini_batch(&shards, config, &streaming, 4 * shape.clusters, 0)?
        }
        _ => bail!("there is no work `{kind}`"),
    };
    let object = json!({
        "work": format!("{kind}, {n}x{d} K {}", shape.clusters),
        "seconds": start.elapsed().as_secs_f64(),
        "peak-mb": bench::peak_megabytes(),
        "iterations": found.iterations,
        "inertia": found.inertia,
    });
    println!("{object}");
    Ok(())
}

fn read<T>(path: &Path, from: fn([u8; 4]) -> T) -> Result<Vec<T>> {
    let count = fs::metadata(path)?.len() as usize / 4;
    read_part(path, 0, count, from)
}

/// Reads `count` numbers of a file, from number `first` on.
fn read_part<T>(path: &Path, first: usize, count: usize, from: fn([u8; 4]) -> T) -> Result<Vec<T>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(4 * first as u64))?;
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        let mut bytes = [0; 4];
        file.read_exact(&mut bytes)?;
        values.push(from(bytes));
    }
    Ok(values)
}
