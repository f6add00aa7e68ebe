//! Times two views of each picture, ours beside torchvision's and lightly's where a Python has them.
//!
//! `cargo xtask bench data [--peer-python PATH] [--json] [-- [--only WORD] [--rounds N] [--threads N]]`
//!
//! A turn is one epoch of a [`Loader`] over pictures with BYOL's pair of views: resized crop of 8 to
//! 100 percent of the area, flip, jitter, grey; blur always in view 1 and in one of ten of view 2;
//! solarise in one of five of view 2. The peers do the same, see `bench/peer.py` of this crate; the
//! row names the fastest of them.
//!
//! The pictures are synthetic, see [`bench::photograph`]: JPEG of 470 to 530 × 350 to 400 pixels. `arrays` are
//! such pictures of 32 × 32 pixels that are in memory decoded.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use bench::{BenchUnit, ComparisonTable, Peers, Side, photograph};
use clap::Parser;
use data::decoded::Wish;
use data::images::{self, Images, StoredPicture};
use data::views::{Input, Operation, Pipeline};
use data::{Loader, Picture};
use rand::Rng;
use serde_json::{Value, json};
use stage::Split;

#[derive(Parser)]
#[command(name = "bench-data", about = "Times the making of views")]
struct BenchDataCli {
    #[command(flatten)]
    shared: bench::BenchArguments,
    /// Do this work turn by turn; how the program calls itself.
    #[arg(long, hide = true, value_name = "WORK")]
    side: Option<String>,
    /// Where the pictures for a side are.
    #[arg(long, hide = true, value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// Pictures, and what is made of them.
struct DataWork {
    name: &'static str,
    source: DataWorkKind,
    pixels: usize,
    blur: bool,
    /// Pictures of one turn: ours, then of each of [`PEERS`]; about a second or two of work.
    images: [usize; 1 + PEERS.len()],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum DataWorkKind {
    /// Decoded each time, as by the peers.
    Jpeg,
    /// From a decoded copy on disk, made before the first turn; the peers still decode.
    Copy,
    /// Pixels that were never encoded.
    Arrays,
}

const PEERS: [&str; 3] = ["torchvision", "torchvision-v2", "lightly"];

const WORKS: [DataWork; 6] = [
    DataWork {
        name: "views @32 of arrays",
        source: DataWorkKind::Arrays,
        pixels: 32,
        blur: false,
        images: [65_536, 2_048, 1_024, 2_048],
    },
    DataWork {
        name: "views @32 with blur, of arrays",
        source: DataWorkKind::Arrays,
        pixels: 32,
        blur: true,
        images: [65_536, 1_024, 1_024, 1_024],
    },
    DataWork {
        name: "views @96 with blur, of JPEG 500x375",
        source: DataWorkKind::Jpeg,
        pixels: 96,
        blur: true,
        images: [2_048, 512, 512, 512],
    },
    DataWork {
        name: "views @224 with blur, of JPEG 500x375",
        source: DataWorkKind::Jpeg,
        pixels: 224,
        blur: true,
        images: [1_024, 128, 128, 256],
    },
    DataWork {
        name: "views @96 with blur, decoded copy",
        source: DataWorkKind::Copy,
        pixels: 96,
        blur: true,
        images: [4_096, 512, 512, 512],
    },
    DataWork {
        name: "views @224 with blur, decoded copy",
        source: DataWorkKind::Copy,
        pixels: 224,
        blur: true,
        images: [1_024, 128, 128, 256],
    },
];

/// Files and arrays made; an epoch takes each as often as it needs.
const FILES: u64 = 256;
const ARRAYS: u64 = 4_096;
const BATCH: usize = 64;

fn main() -> ExitCode {
    let arguments = BenchDataCli::parse();
    let result = match &arguments.side {
        Some(name) => side(name, &arguments.folder.unwrap_or_default(), arguments.shared.threads()),
        None => compare(&arguments.shared),
    };
    bench::exit("bench-data", result)
}

fn compare(arguments: &bench::BenchArguments) -> Result<()> {
    let program = include_str!("../../bench/peer.py");
    let packages = ["torch", "torchvision", "lightly", "numpy", "PIL"];
    let python = arguments.peer_python.as_deref();
    let peers = python.map(|python| Peers::new(python, &packages, program)).transpose()?;
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    make_pictures(folder.path())?;
    let place = folder.path().to_str().context("the temporary folder has a name in UTF-8")?;
    let (threads, mut table) = (arguments.threads(), ComparisonTable::new(arguments)?);
    let words = threads.to_string();
    for work in WORKS.iter().filter(|work| arguments.wants(work.name)) {
        let ours = ["--side", work.name, "--folder", place, "--threads", &words];
        let ours = Side::ours(&ours, threads)?;
        let start = |peers: &Peers| -> Result<Vec<Side>> {
            let one = |(name, images): (&&str, &usize)| {
                let asked = work.asked_of(name, *images).to_string();
                peers.start(name, &[&asked, place, &words], 1)
            };
            PEERS.iter().zip(&work.images[1..]).map(one).collect()
        };
        let sides = peers.as_ref().map(start).transpose()?.unwrap_or_default();
        let unit = BenchUnit::PerSecond("images");
        table.add(bench::compare(arguments, work.name, work.keys(), unit, ours, sides)?)?;
    }
    table.finish()
}

impl DataWork {
    fn keys(&self) -> Value {
        json!({ "pixels": self.pixels, "blur": self.blur })
    }

    fn asked_of(&self, peer: &str, images: usize) -> Value {
        let source = if self.source == DataWorkKind::Arrays { "arrays" } else { "jpeg" };
        json!({
            "peer": peer,
            "source": source,
            "pixels": self.pixels,
            "blur": self.blur,
            "batch": BATCH,
            "images": images,
        })
    }

    fn input(&self) -> Input {
        Input {
            height: self.pixels,
            width: self.pixels,
            channels: 3,
            mean: vec![0.485, 0.456, 0.406],
            std: vec![0.229, 0.224, 0.225],
            clean: vec![],
        }
    }

    /// BYOL's pair, of which the second is solarised and seldom blurred.
    fn pipelines(&self) -> Vec<Pipeline> {
        let one = |second: bool| {
            let aspect = [3. / 4., 4. / 3.];
            let mut operations = vec![
                Operation::ResizedCrop { scale: [0.08, 1.], aspect },
                Operation::Flip { probability: 0.5 },
                Operation::Jitter {
                    probability: 0.8,
                    brightness: 0.4,
                    contrast: 0.4,
                    saturation: 0.2,
                    hue: 0.1,
                },
                Operation::Grey { probability: 0.2 },
            ];
            if self.blur {
                let probability = if second { 0.1 } else { 1. };
                let kernel = (self.pixels / 20 * 2 + 1).max(3);
                operations.push(Operation::Blur { probability, kernel, deviation: [0.1, 2.] });
            }
            if second {
                operations.push(Operation::Solarise { probability: 0.2, threshold: 128. });
            }
            Pipeline { operations }
        };
        vec![one(false), one(true)]
    }
}

/// Our side.
fn side(name: &str, folder: &Path, threads: usize) -> Result<()> {
    let work = WORKS.iter().find(|work| work.name == name);
    let work = work.with_context(|| format!("no work `{name}`"))?;
    let file = if work.source == DataWorkKind::Arrays { RAW } else { ENCODED };
    let images = Images::open(&folder.join(file))?;
    images.keep_decoded(0);
    images.use_decoded_copy(
        if work.source == DataWorkKind::Copy { Wish::Always } else { Wish::Never },
        threads,
    )?;
    let rows: Vec<u32> =
        images.rows(&[Split::Train]).into_iter().cycle().take(work.images[0]).collect();
    let batches: Vec<Vec<u32>> = rows.chunks(BATCH).map(<[u32]>::to_vec).collect();
    let (pipelines, input) = (work.pipelines(), work.input());
    let mut epoch = 0;
    bench::serve(|| {
        epoch += 1;
        let loader =
            Loader::new(&images, batches.clone(), pipelines.clone(), &input, 0, epoch, threads)?;
        let mut count = 0;
        for batch in loader {
            count += batch?.rows.len();
        }
        Ok(count as f64)
    })
}

const ENCODED: &str = "encoded.safetensors";
const RAW: &str = "raw.safetensors";

/// Writes JPEG files and arrays, as files for the peers and as image files of ours.
fn make_pictures(folder: &Path) -> Result<()> {
    let mut sources = Vec::new();
    for number in 0..FILES {
        let mut rng = stage::random::stream(0, "bench", &[0, number]);
        let (width, height) = (470 + rng.next_u32() % 61, 350 + rng.next_u32() % 51);
        let file = photograph::jpeg(height as u16, width as u16, &mut rng)?;
        fs::write(folder.join(format!("{number:05}.jpg")), &file)?;
        sources.push((StoredPicture::file(file, 3)?, Split::Train));
    }
    images::write(&folder.join(ENCODED), 3, sources)?;
    let (mut sources, mut arrays) = (Vec::new(), Vec::new());
    for number in 0..ARRAYS {
        let mut rng = stage::random::stream(0, "bench", &[1, number]);
        let picture = Picture::new(32, 32, 3, photograph::pixels(32, 32, &mut rng))?;
        arrays.extend_from_slice(&picture.pixels);
        sources.push((StoredPicture::raw(picture, 3)?, Split::Train));
    }
    images::write(&folder.join(RAW), 3, sources)?;
    Ok(fs::write(folder.join("arrays"), arrays)?)
}
