//! Measures k-means, neighbours and scores, beside other libraries where a Python has them.
//!
//! `bench-assignment [--work NAME] [--peer-python PATH] [--repeats R] [--small] [--json]`
//!
//! Ours and the peers take turns, each measurement in a process of its own, so that a slow minute
//! of the machine hits all of them and the peak memory is that of one. The time is that of the
//! computation alone, on numbers in memory; what is reported is the median, and how far the
//! measurements spread. `value` says what was computed (inertia, sum of neighbours, sum of scores),
//! so that nobody is fast by doing less.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use assignment::{KMeans, Metric, contingency, k_means, k_means_from, nearest_neighbours};
use clap::Parser;
use metrics::agreement::{Mean, accuracy, adjusted_rand_index, normalized_mutual_information};
use rand::RngExt;
use serde::{Deserialize, Serialize};

#[derive(Parser)]
struct Arguments {
    /// Measure only the works whose name begins so.
    #[arg(long, default_value = "")]
    work: String,
    /// A Python with numpy, scipy, scikit-learn and faiss-cpu (torch too, if wanted) to compare with.
    #[arg(long, value_name = "PATH")]
    peer_python: Option<PathBuf>,
    /// Measurements of each.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// A hundredth of the size, to see that everything runs.
    #[arg(long)]
    small: bool,
    /// Print one JSON array instead of lines.
    #[arg(long)]
    json: bool,
    /// Measure one work on the files of a folder; how the program calls itself.
    #[arg(long, hide = true, num_args = 2, value_names = ["KIND", "FOLDER"])]
    measure: Vec<String>,
}

/// A task, and what it is about.
struct Work {
    name: &'static str,
    kind: &'static str,
    peers: &'static [&'static str],
    shape: Shape,
}

/// `shape.json` of a work's folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Shape {
    n: usize,
    /// Width of the points; none for scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    d: Option<usize>,
    clusters: usize,
    iterations: usize,
    restarts: usize,
    neighbours: usize,
    threads: usize,
}

fn works(small: bool) -> Vec<Work> {
    let divisor = if small { 100 } else { 1 };
    let threads = rayon::current_num_threads();
    let shape = |n: usize, d, clusters: usize| Shape {
        n: n / divisor,
        d,
        clusters: clusters.min(n / divisor / 5),
        iterations: 300,
        restarts: 10,
        neighbours: 20,
        threads,
    };
    let k_means = |iterations, n, d, k| Shape { iterations, ..shape(n, Some(d), k) };
    vec![
        Work {
            name: "k-means 200,000 x 512, K 1,000, 20 iterations",
            kind: "k-means",
            peers: &["faiss", "scikit-learn", "torch"],
            shape: k_means(20, 200_000, 512, 1000),
        },
        Work {
            name: "restarts: k-means 50,000 x 256, K 10, 10 restarts to convergence",
            kind: "restarts",
            peers: &["scikit-learn"],
            shape: shape(50_000, Some(256), 10),
        },
        Work {
            name: "neighbours: exact 20 of 50,000 x 512",
            kind: "neighbours",
            peers: &["faiss", "torch-bf16", "torch"],
            shape: shape(50_000, Some(512), 100),
        },
        Work {
            name: "scores: ACC, NMI, ARI of 1,000,000 labels, K 10",
            kind: "scores",
            peers: &["scikit-learn"],
            shape: shape(1_000_000, None, 10),
        },
        Work {
            name: "scores: ACC, NMI, ARI of 1,000,000 labels, K 1,000",
            kind: "scores",
            peers: &["scikit-learn"],
            shape: shape(1_000_000, None, 1000),
        },
    ]
}

/// One measurement.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Measurement {
    seconds: f64,
    /// Seconds of all processors together; less troubled by what else the machine does.
    processor: f64,
    /// Bytes added to the peak memory of the process.
    memory: f64,
    value: f64,
}

/// What is said of one library at one work.
#[derive(Debug, Clone, Serialize)]
struct Summary {
    library: String,
    /// Median.
    seconds: f64,
    /// Least and most.
    range: [f64; 2],
    /// Seconds of all processors together, median.
    processor: f64,
    memory: f64,
    value: f64,
}

/// One entry of the JSON array: seconds; `peer` is the fastest one, `ratio` is `peer / ours`.
#[derive(Debug, Serialize)]
struct Entry {
    work: &'static str,
    ours: f64,
    peer: Option<f64>,
    ratio: Option<f64>,
    libraries: Vec<Summary>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.measure[..] {
        [kind, folder] => measure(kind, Path::new(folder)),
        _ => bench(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-assignment: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.repeats > 0, "--repeats is 0; at least one measurement is needed");
    let mut entries = vec![];
    for work in works(arguments.small).iter().filter(|w| w.name.starts_with(&arguments.work)) {
        let entry = bench_work(work, arguments)?;
        if !arguments.json {
            print_entry(&entry);
        }
        entries.push(entry);
    }
    ensure!(!entries.is_empty(), "no work begins with `{}`", arguments.work);
    if arguments.json {
        println!("{}", serde_json::to_string(&entries)?);
    }
    Ok(())
}

fn bench_work(work: &Work, arguments: &Arguments) -> Result<Entry> {
    let folder = std::env::temp_dir().join(format!("bench-assignment-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let measured = write_data(work, &folder).and_then(|()| take_turns(work, arguments, &folder));
    fs::remove_dir_all(&folder)?;
    let libraries: Vec<Summary> = measured?
        .into_iter()
        .filter(|(_, measurements)| !measurements.is_empty())
        .map(|(library, measurements)| summary(library, &measurements))
        .collect();
    let ours = libraries[0].seconds;
    let peer = libraries[1..].iter().map(|peer| peer.seconds).reduce(f64::min);
    Ok(Entry { work: work.name, ours, peer, ratio: peer.map(|peer| peer / ours), libraries })
}

/// Measures ours and each peer in turn; a peer that is not installed has no measurements.
fn take_turns(
    work: &Work,
    arguments: &Arguments,
    folder: &Path,
) -> Result<Vec<(String, Vec<Measurement>)>> {
    let script = folder.join("peer.py");
    fs::write(&script, include_str!("../../bench/peer.py"))?;
    let mut all = vec![("ours".to_owned(), vec![])];
    if arguments.peer_python.is_some() {
        all.extend(work.peers.iter().map(|&peer| (peer.to_owned(), vec![])));
    }
    for _ in 0..arguments.repeats {
        for (library, measurements) in &mut all {
            let mut command = match &arguments.peer_python {
                Some(python) if library != "ours" => {
                    let mut command = Command::new(python);
                    command.arg(&script).arg(&*library).arg(work.kind);
                    command
                }
                _ => {
                    let mut command = Command::new(std::env::current_exe()?);
                    command.arg("--measure").arg(work.kind);
                    command
                }
            };
            let output =
                command.arg(folder).output().with_context(|| format!("starting {library}"))?;
            match output.status.code() {
                Some(0) => {
                    let text = String::from_utf8_lossy(&output.stdout);
                    let line = text.lines().last().unwrap_or_default();
                    measurements.push(serde_json::from_str(line).with_context(|| {
                        format!("{library} was to print a measurement, not `{line}`")
                    })?);
                }
                Some(3) if library != "ours" => {}
                _ => bail!("{library} failed: {}", String::from_utf8_lossy(&output.stderr).trim()),
            }
        }
    }
    Ok(all)
}

fn summary(library: String, measurements: &[Measurement]) -> Summary {
    let sorted = |of: fn(&Measurement) -> f64| -> Vec<f64> {
        let mut values: Vec<f64> = measurements.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let seconds = sorted(|m| m.seconds);
    let processor = sorted(|m| m.processor);
    Summary {
        library,
        seconds: seconds[seconds.len() / 2],
        processor: processor[processor.len() / 2],
        range: [seconds[0], seconds[seconds.len() - 1]],
        memory: measurements.iter().map(|m| m.memory).fold(0., f64::max),
        value: measurements[0].value,
    }
}

fn print_entry(entry: &Entry) {
    println!("{}", entry.work);
    for Summary { library, seconds, range: [least, most], processor, memory, value } in
        &entry.libraries
    {
        let megabytes = memory / 1e6;
        println!(
            "  {library:13} {seconds:9.4} s ({least:.4} to {most:.4}), of processors \
             {processor:.4} s, {megabytes:.0} MB, value {value:.6}"
        );
    }
    if let Some(ratio) = entry.ratio {
        println!("  the fastest peer takes {ratio:.2} times as long");
    }
}

/// Writes what a work computes on: blobs of unit rows, or two related groupings.
fn write_data(work: &Work, folder: &Path) -> Result<()> {
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

/// Unit rows around `k` unit centres; the noise is three times as long as a centre.
fn blobs(n: usize, d: usize, k: usize) -> Vec<f32> {
    use rayon::prelude::*;
    let normal = |purpose: &str, counter: usize, length: f32| -> Vec<f32> {
        let mut random = stage::random::stream(0, purpose, &[counter as u64]);
        // The sum of four uniform numbers is normal enough, and the same everywhere.
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

/// Measures ours on the files of a folder, and prints the measurement.
fn measure(kind: &str, folder: &Path) -> Result<()> {
    let shape: Shape = serde_json::from_str(&fs::read_to_string(folder.join("shape.json"))?)?;
    let floats = |name: &str| read(folder, name, f32::from_le_bytes);
    let (n, d) = (shape.n, shape.d.unwrap_or(0));
    let config = KMeans {
        clusters: shape.clusters,
        metric: Metric::Euclidean,
        restarts: shape.restarts,
        iterations: shape.iterations,
        tolerance: 1e-4,
    };
    let measurement = match kind {
        "k-means" => {
            let (points, centres) = (floats("points.f32")?, floats("centres.f32")?);
            let config = KMeans { tolerance: 0., ..config };
            timed(|| Ok(k_means_from(&points, n, d, &centres, &config)?.inertia))?
        }
        "restarts" => {
            let points = floats("points.f32")?;
            timed(|| Ok(k_means(&points, n, d, &config, 0)?.inertia))?
        }
        "neighbours" => {
            let points = floats("points.f32")?;
            timed(|| {
                let found = nearest_neighbours(&points, n, d, shape.neighbours)?;
                Ok(found.iter().map(|&i| f64::from(i)).sum())
            })?
        }
        "scores" => {
            let clusters = read(folder, "clusters.u32", u32::from_le_bytes)?;
            let classes = read(folder, "classes.u32", u32::from_le_bytes)?;
            timed(|| {
                let table = contingency(&clusters, &classes, shape.clusters, shape.clusters)?;
                Ok(accuracy(&table)
                    + normalized_mutual_information(&table, Mean::Arithmetic)
                    + adjusted_rand_index(&table))
            })?
        }
        _ => bail!("no work is called `{kind}`"),
    };
    println!("{}", serde_json::to_string(&measurement)?);
    Ok(())
}

fn read<T>(folder: &Path, name: &str, from: fn([u8; 4]) -> T) -> Result<Vec<T>> {
    let bytes = fs::read(folder.join(name))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|&chunk| from(chunk)).collect())
}

fn timed(compute: impl FnOnce() -> Result<f64>) -> Result<Measurement> {
    // The threads are there before the clock starts, as they are in the peers.
    rayon::broadcast(|_| ());
    let (before, processor, start) = (peak_memory()?, processor_seconds(), Instant::now());
    let value = compute()?;
    let seconds = start.elapsed().as_secs_f64();
    let processor = processor_seconds() - processor;
    Ok(Measurement { seconds, processor, memory: peak_memory()? - before, value })
}

/// Seconds of all processors that this process has used; 0 where the system does not say.
fn processor_seconds() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may hold spaces: user and system time, in hundredths of a second.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.
}

/// The most memory that this process has held, in bytes; 0 where the system does not say.
fn peak_memory() -> Result<f64> {
    let Ok(status) = fs::read_to_string("/proc/self/status") else {
        return Ok(0.);
    };
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kilobytes.map_or(Ok(0.), str::parse::<f64>)? * 1024.)
}
