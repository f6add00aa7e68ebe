//! From a folder of JPEG files to embeddings, by the programs, beside the network alone.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use backbone::published::{self, Provenance, PublishedNetwork};
use bench::{BenchArguments, BenchUnit, Comparison, Side, photograph};
use candle_core::Device::Cpu;
use data::views::{Filter, Input, Operation};
use layers::Transformer;
use serde_json::json;
use training::Precision;

/// The name of the work.
pub const WORK: &str = "vit-s14 @224 bf16 of JPEG 500 x 375";

/// The sides.
const NETWORK: &str = "network alone";
const PROGRAMS: &str = "prepare and embed";

/// Width of the network.
const WIDTH: usize = 384;

/// Pictures that the network sees at once, as in the experiment `photos`.
const BATCH: usize = 32;

const EXPERIMENT: &str = "
[data]
clusters = 2
train-on = ['train', 'test', 'unlabelled']
score-on = ['train', 'test', 'unlabelled']
[embed]
batch-size = 32
views = 0
precision = 'bf16'
pixels = false
augmentation = { operations = [] }
";

/// Lets the network and the programs take turns on as many pictures.
pub fn compare(arguments: &BenchArguments, pictures: u64) -> Result<Comparison> {
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    write(folder.path(), pictures)?;
    let place = folder.path().to_str().context("a temporary folder with a name in UTF-8")?;
    let count = pictures.to_string();
    let start = |name, side| {
        let words = ["--side", side, "--folder", place, "--pictures", &count];
        Side::of_this_program(name, &words, arguments.threads())
    };
    let (network, programs) = (start("ours", NETWORK)?, start(PROGRAMS, PROGRAMS)?);
    let keys = json!({ "pictures": pictures });
    bench::compare(arguments, WORK, keys, BenchUnit::PerSecond("images"), network, vec![programs])
}

/// Writes the pictures, the network and the experiment.
fn write(folder: &Path, pictures: u64) -> Result<()> {
    let [source, network] = ["pictures", "network"].map(|name| folder.join(name));
    fs::create_dir(&source)?;
    fs::create_dir(&network)?;
    fs::write(folder.join("bench.toml"), EXPERIMENT)?;
    for number in 0..pictures {
        let mut rng = stage::random::stream(0, "bench", &[2, number]);
        let file = photograph::jpeg(375, 500, &mut rng)?;
        fs::write(source.join(format!("{number:05}.jpg")), file)?;
    }
    let input = Input {
        height: 224,
        width: 224,
        channels: 3,
        mean: vec![0.485, 0.456, 0.406],
        std: vec![0.229, 0.224, 0.225],
        clean: vec![
            Operation::ResizeShorter { pixels: 256, filter: Filter::Bicubic },
            Operation::CentreCropRoundedDown { pixels: 224 },
        ],
    };
    let weights = PublishedNetwork::Transformer(Box::new(crate::weights(WIDTH)?));
    let provenance =
        Provenance { repository: None, commit: None, sha256: [].into(), licence: None };
    published::write(&network, &weights, &input, provenance)
}

/// One of the sides.
pub fn side(name: &str, folder: &Path, pictures: u64) -> Result<()> {
    match name {
        NETWORK => network_alone(pictures as usize),
        PROGRAMS => programs(folder, pictures),
        _ => bail!("no side `{name}`"),
    }
}

fn network_alone(pictures: usize) -> Result<()> {
    let network = Transformer::new(&crate::weights(WIDTH)?, &Cpu, Precision::Bf16.into())?;
    let noise = training::noise(1., (BATCH, 224 * 224 * 3), 1, &[], &Cpu)?;
    let batch = noise.context("noise")?.reshape((BATCH, 224, 224, 3))?;
    bench::serve(|| {
        for first in (0..pictures).step_by(BATCH) {
            network.forward(&batch.narrow(0, 0, BATCH.min(pictures - first))?)?;
        }
        Ok(pictures as f64)
    })
}

/// Prepares and embeds all pictures in each turn, as `assort cluster` does.
fn programs(folder: &Path, pictures: u64) -> Result<()> {
    let beside = env::current_exe().context("finding this program's file")?;
    let assort = beside.with_file_name(format!("assort{}", env::consts::EXE_SUFFIX));
    ensure!(
        assort.exists(),
        "`{}` is missing; build it with the same profile: cargo build --release --package assort",
        assort.display()
    );
    let path = |name: &str| folder.join(name).display().to_string();
    let run = |words: &[&str]| -> Result<String> {
        let output = Command::new(&assort).args(words).output().context("starting `assort`")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    bench::serve(|| {
        let runs = tempfile::tempdir_in(folder)?;
        let at = |name: &str| runs.path().join(name).display().to_string();
        let prepared = run(&[
            "prepare",
            &path("pictures"),
            "--set",
            "prepare.stored-shorter-side=512",
            "--runs",
            &at("runs"),
        ])?;
        let images = PathBuf::from(prepared).join("images.safetensors");
        let network = format!("network={}", path("network"));
        let (images, out, experiment) =
            (images.display().to_string(), at("embed"), path("bench.toml"));
        let steps = ["--round", "0", "--rounds", "0", "--seed", "0", "--device", "cpu"];
        let files = ["embed", "--experiment", &experiment, "--images", &images];
        run(&[&files[..], &["--in", &network, "--out", &out], &steps].concat())?;
        Ok(pictures as f64)
    })
}
