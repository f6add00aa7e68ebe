//! candle's own DINOv2 as a side of `bench-embed`: some pictures a turn, one at a time, since it takes no batch.
//!
//! `candle-dinov2 WEIGHTS PICTURES`
//!
//! The network gets the weights of the file, in our names, and must give the feature of the picture that the file
//! also has.

use std::collections::HashMap;
use std::env;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device::Cpu, IndexOp, Module, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::dinov2::DinoVisionTransformer;

fn main() -> ExitCode {
    bench::exit("candle-dinov2", side())
}

fn side() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [weights, pictures] = &words[..] else { bail!("candle-dinov2 WEIGHTS PICTURES") };
    let pictures: usize = pictures.parse().context("PICTURES is a number")?;
    let mut given = candle_core::safetensors::load(weights, &Cpu)?;
    let mut take = |name: &str| given.remove(name).with_context(|| format!("no tensor `{name}`"));
    let (picture, feature) = (take("picture")?, take("feature")?);
    let width = feature.elem_count();
    let variables = VarBuilder::from_tensors(renamed(&given, width)?, DType::F32, &Cpu);
    let network = DinoVisionTransformer::new(variables, DEPTH, width, width / 64)?;
    check(&network, &picture, &feature)?;
    bench::serve(|| {
        for _ in 0..pictures {
            network.forward(&picture)?;
        }
        Ok(pictures as f64)
    })
}

const DEPTH: usize = 12;

/// Patches on a side of the pictures that candle's network has positions for.
const GRID: usize = 37;

/// The classes of candle's network.
const CLASSES: usize = 1000;

/// Our tensors by the names of candle. The classifier's first outputs are the feature.
fn renamed(given: &HashMap<String, Tensor>, width: usize) -> Result<HashMap<String, Tensor>> {
    let ours = |name: &str| given.get(name).with_context(|| format!("no tensor `{name}`"));
    // All patches have equal positions, and the class token has none.
    let row = ours("positions")?.i(..1)?;
    let positions = Tensor::cat(&[&row.zeros_like()?, &row.repeat((GRID * GRID, 1))?], 0)?;
    let identity = Tensor::eye(width, DType::F32, &Cpu)?;
    let head = identity.pad_with_zeros(1, 0, width)?.pad_with_zeros(0, 0, CLASSES - width)?;
    let mut named = HashMap::from([
        ("cls_token".to_owned(), ours("cls")?.reshape((1, 1, width))?),
        ("pos_embed".to_owned(), positions.unsqueeze(0)?),
        ("head.weight".to_owned(), head),
        ("head.bias".to_owned(), Tensor::zeros(CLASSES, DType::F32, &Cpu)?),
    ]);
    let mut layer = |theirs: &str, name: &str| -> Result<()> {
        for kind in ["weight", "bias"] {
            named.insert(format!("{theirs}.{kind}"), ours(&format!("{name}.{kind}"))?.clone());
        }
        Ok(())
    };
    layer("patch_embed.proj", "patch")?;
    layer("norm", "norm")?;
    for number in 0..DEPTH {
        let names = [
            ("norm1", "norm1"),
            ("attn.proj", "out"),
            ("norm2", "norm2"),
            ("mlp.fc1", "up"),
            ("mlp.fc2", "down"),
        ];
        for (theirs, name) in names {
            layer(&format!("blocks.{number}.{theirs}"), &format!("blocks.{number}.{name}"))?;
        }
    }
    for number in 0..DEPTH {
        for kind in ["weight", "bias"] {
            let part = |name: &str| ours(&format!("blocks.{number}.{name}.{kind}"));
            let fused = Tensor::cat(&[part("q")?, part("k")?, part("v")?], 0)?;
            named.insert(format!("blocks.{number}.attn.qkv.{kind}"), fused);
        }
        for scale in [1, 2] {
            let scales = ours(&format!("blocks.{number}.scale{scale}"))?;
            named.insert(format!("blocks.{number}.ls{scale}.gamma"), scales.clone());
        }
    }
    Ok(named)
}

/// Fails unless candle's network gives our feature of the picture, up to its approximation of GELU by tanh and its
/// larger epsilon of the norms.
fn check(network: &DinoVisionTransformer, picture: &Tensor, feature: &Tensor) -> Result<()> {
    let found = network.forward(picture)?.i((0, ..feature.elem_count()))?;
    let largest = |tensor: Tensor| -> Result<f32> { Ok(tensor.abs()?.max_all()?.to_scalar()?) };
    let feature = feature.flatten_all()?;
    let difference = largest((found - &feature)?)? / largest(feature)?;
    ensure!(
        difference < MOST_DIFFERENCE,
        "not the network that ours is: its feature differs by {difference:.1e} of the largest value"
    );
    Ok(())
}

const MOST_DIFFERENCE: f32 = 1e-2;
