//! DINOv2's network as users of other libraries run it: transformers and timm in Python, and candle's own in Rust.
//!
//! A peer gets a file with weights, a picture and our feature of it. It fails unless it gives the same feature.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use bench::{BenchArguments, BenchUnit, ComparisonTable, Peers, Side, missing_packages};
use candle_core::Device::Cpu;
use candle_core::{Tensor, safetensors};
use layers::{Transformer, TransformerWeights};
use tempfile::TempDir;
use training::Precision::F32;

use crate::BenchNetwork::Vit;
use crate::{BATCHES, EmbedWork, WORKS, plan, tensors};

/// The libraries in Python.
const LIBRARIES: [&str; 2] = ["transformers", "timm"];

/// Adds a row for each Vision Transformer in f32 and each library that the user names.
///
/// - `candle`: the program `candle-dinov2`.
pub fn add_to(
    table: &mut ComparisonTable,
    arguments: &BenchArguments,
    candle: Option<&Path>,
) -> Result<()> {
    let python = arguments.peer_python.as_deref();
    let program = include_str!("../../../bench/library.py");
    let peers = python.map(|python| Peers::new(python, &["torch"], program)).transpose()?;
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let threads = arguments.threads();
    for work in WORKS.iter().filter(|work| work.precision == F32) {
        let Vit { width, .. } = work.network else { continue };
        let keys = work.keys().to_string();
        if let (Some(python), Some(peers)) = (python, &peers) {
            for library in LIBRARIES {
                let start = || {
                    if !missing_packages(python, &[library])?.is_empty() {
                        return Ok(None);
                    }
                    let weights = written(&folder, width)?;
                    let words =
                        [library, &keys, &weights, &BATCHES.to_string(), &threads.to_string()];
                    peers.start(library, &words, threads).map(Some)
                };
                add(table, arguments, work, library, start)?;
            }
        }
        if let Some(program) = candle {
            let start = || {
                let words = [&written(&folder, width)?, &*(BATCHES * work.batch).to_string()];
                Side::of_program(ONE_BY_ONE, program, &words, threads).map(Some)
            };
            add(table, arguments, work, "candle", start)?;
        }
    }
    Ok(())
}

/// The name of candle's side.
const ONE_BY_ONE: &str = "candle, one picture at a time";

/// Adds the row of one library, unless `--only` leaves it out. `start` returns nothing if it is not installed.
fn add(
    table: &mut ComparisonTable,
    arguments: &BenchArguments,
    work: &EmbedWork,
    library: &str,
    start: impl FnOnce() -> Result<Option<Side>>,
) -> Result<()> {
    let name = format!("{}, {library}", work.name());
    if !arguments.wants(&name) {
        return Ok(());
    }
    let ours = Side::ours(&["--side", &work.name()], arguments.threads())?;
    let peer = start()?;
    let is_missing = peer.is_none();
    let mut keys = work.keys();
    keys["library"] = library.into();
    let (unit, peers) = (BenchUnit::PerSecond("images"), peer.into_iter().collect());
    let mut row = bench::compare(arguments, &name, keys, unit, ours, peers)?;
    if is_missing {
        row.peer_name = Some(library.to_owned());
        row.peer_note = Some(format!("not installed; install it with `pip install {library}`"));
    }
    table.add(row)
}

/// The file of weights, a picture and its feature for networks of this width, which is written at the first call.
fn written(folder: &TempDir, width: usize) -> Result<String> {
    let path = folder.path().join(format!("{width}.safetensors"));
    let text = path.to_str().context("a temporary folder with a name in UTF-8")?.to_owned();
    if path.exists() {
        return Ok(text);
    }
    let mut given = tensors(width)?;
    for (name, (shape, values)) in &mut given {
        // Around 1, so that every layer changes the feature.
        if name.contains("norm") && name.ends_with("weight") || name.contains("scale") {
            values.iter_mut().for_each(|value| *value += 1.);
        }
        // Some libraries resample the positions, which does not change equal ones.
        if name == "positions" {
            let row = values[..shape[1]].to_vec();
            *values = row.repeat(shape[0]);
        }
    }
    let tensor = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
        Ok((name.clone(), Tensor::from_slice(values, &shape[..], &Cpu)?))
    };
    let mut file = given.iter().map(tensor).collect::<Result<HashMap<_, _>>>()?;
    let network =
        Transformer::new(&TransformerWeights::new(&plan(width), given)?, &Cpu, F32.into())?;
    let noise = training::noise(1., (1, PIXELS * PIXELS * 3), 1, &[], &Cpu)?;
    let picture = noise.context("noise")?.reshape((1, PIXELS, PIXELS, 3))?;
    let feature = network.forward(&picture)?.class.context("a class token")?;
    file.insert("feature".to_owned(), feature);
    file.insert("picture".to_owned(), picture.permute((0, 3, 1, 2))?.contiguous()?);
    safetensors::save(&file, &path)?;
    Ok(text)
}

/// The side of the picture.
const PIXELS: usize = 224;
