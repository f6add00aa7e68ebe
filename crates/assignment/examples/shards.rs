//! Runs k-means over shards of random points, which ranks share, and prints time, memory and a digest of the
//! centres, the same on any number of ranks.
//!
//! ```console
//! cargo build --package assignment --features mpi --example shards
//! mpirun -n 4 target/debug/examples/shards 1000000 256 20000 10
//! ```
//!
//! Numbers of points, of their values, of clusters, and of passes over all points. Without `mpirun`, and then also
//! without the feature, it runs alone. Points are drawn shard by shard from a seed, again whenever a shard is read,
//! around as many centres as clusters.

use std::env;
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};
use assignment::{KMeans, Metric, Shards, Streaming, k_means_streaming};
use collective::Communicator;
use rand::RngExt;
use stage::digest::sha256;
use stage::random::stream;

const SEED: u64 = 0;
const SHARDS: usize = 64;
/// Points of the first sample for each cluster.
const SAMPLED: usize = 16;

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let numbers: Vec<usize> = words.iter().map_while(|word| word.parse().ok()).collect();
    let &[points, width, clusters, passes] = numbers.as_slice() else {
        anyhow::bail!(
            "give numbers of points, of their values, of clusters and of passes, not {words:?}"
        )
    };
    let ranks = Communicator::of_environment()?;
    let began = Instant::now();
    let centres = uniform(clusters * width, "centres", 0);
    let starts: Vec<usize> = (0..=SHARDS).map(|shard| shard * points / SHARDS).collect();
    let lengths: Vec<usize> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let read = |shard: usize| {
        let mut rows = uniform(lengths[shard] * width, "noise", shard as u64);
        let mut random = stream(SEED, "clusters", &[shard as u64]);
        for row in rows.chunks_exact_mut(width) {
            let centre = &centres[random.random_range(0..clusters) * width..][..width];
            row.iter_mut().zip(centre).for_each(|(x, centre)| *x += centre);
        }
        Ok(rows)
    };
    let shards = Shards::new(width, lengths.clone(), read).shared_by(&ranks);
    let metric = Metric::Euclidean;
    let config = KMeans { clusters, metric, restarts: 1, iterations: passes, tolerance: 1e-4 };
    let streaming = Streaming { sample: (SAMPLED * clusters).min(points), passes };
    let found = k_means_streaming(&shards, &config, &streaming, SEED)?;
    let seconds = began.elapsed().as_secs_f64();

    let peaks = ranks.all_gather(&[peak_megabytes()?])?;
    if ranks.is_first() {
        let bytes: Vec<u8> = found.centres.iter().flat_map(|x| x.to_le_bytes()).collect();
        println!("{points} × {width} points, {clusters} clusters, {} ranks", ranks.size());
        println!("{seconds:.1} s, {} passes, inertia {}", found.iterations, found.inertia);
        println!("peak memory of each rank in MB: {peaks:?}");
        println!("SHA-256 of the centres: {}", sha256(&bytes));
    }
    Ok(())
}

/// Numbers in [−1, 1).
fn uniform(count: usize, purpose: &str, counter: u64) -> Vec<f32> {
    let mut random = stream(SEED, purpose, &[counter]);
    (0..count).map(|_| random.random_range(-1f32..1.)).collect()
}

/// The most memory that this process has held.
fn peak_megabytes() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("this needs Linux")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no peak")?;
    Ok(kilobytes.parse::<u64>()? / 1000)
}
