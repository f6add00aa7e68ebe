//! A clustering program that knows nothing of this workspace but the arguments of a stage and the
//! files it is given and must write: the example of a part that another crate can take.
//!
//! Its method is plain: the centres are the embeddings that lie farthest from those before, and
//! then the means of what is nearest to them, ten times.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use tests::tensors::{File, RawTensor};

fn main() -> Result<()> {
    let mut roles = BTreeMap::new();
    let mut flags = BTreeMap::new();
    let words: Vec<String> = env::args().skip(1).collect();
    let mut rest = words.iter().peekable();
    while let Some(flag) = rest.next() {
        match flag.as_str() {
            "--check" => return Ok(()),
            "--in" => {
                let value = rest.next().context("--in needs ROLE=DIR")?;
                let (role, folder) = value.split_once('=').context("--in needs ROLE=DIR")?;
                roles.insert(role.to_owned(), PathBuf::from(folder));
            }
            flag => {
                flags.insert(flag.to_owned(), rest.next().context("a value")?.clone());
            }
        }
    }
    let folder = roles.get("embeddings").context("--in embeddings=DIR is missing")?;
    let experiment: toml::Table = fs::read_to_string(&flags["--experiment"])?.parse()?;
    let clusters = experiment["data"]["clusters"].as_integer().context("clusters")?;
    let out = Path::new(&flags["--out"]);
    fs::create_dir_all(out)?;
    let embeddings = File::read(&folder.join("embeddings.safetensors"))?;
    pseudo_labels(&embeddings, usize::try_from(clusters)?)?
        .write(&out.join("pseudo-labels.safetensors"))
}

fn pseudo_labels(embeddings: &File, clusters: usize) -> Result<File> {
    let projection = &embeddings.tensors["projection"];
    let (m, width) = (projection.shape[0], projection.shape[1]);
    let values = projection.to_f32();
    let rows: Vec<&[f32]> = values.chunks_exact(width).collect();
    let mut centres = farthest(&rows, clusters);
    let mut assignment = nearest(&rows, &centres);
    for _ in 0..10 {
        centres = means(&rows, &assignment, &centres);
        assignment = nearest(&rows, &centres);
    }
    let ones = RawTensor::f32(&[m], &vec![1.; m]);
    let mut header = embeddings.header.clone();
    header.insert("kind".into(), "pseudo-labels".into());
    header.insert("clusters".into(), Value::from(clusters));
    let tensors = [
        ("index", embeddings.tensors["index"].clone()),
        ("assignment", RawTensor::u32(&[m], &assignment)),
        ("kmeans-assignment", RawTensor::u32(&[m], &assignment)),
        ("confidence", ones.clone()),
        ("score", ones),
        ("reliable", RawTensor::u8(&[m], &vec![1; m])),
        ("prototypes", RawTensor::f32(&[clusters, width], &centres.concat())),
    ];
    let tensors = tensors.map(|(name, tensor)| (name.to_owned(), tensor));
    Ok(File { header, tensors: BTreeMap::from(tensors) })
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

/// The first row, then always the one farthest from all before.
fn farthest(rows: &[&[f32]], clusters: usize) -> Vec<Vec<f32>> {
    let mut centres = vec![rows[0].to_vec()];
    let gap = |row: &[f32], centres: &[Vec<f32>]| {
        centres.iter().map(|centre| distance(row, centre)).fold(f32::INFINITY, f32::min)
    };
    while centres.len() < clusters {
        let next = rows.iter().max_by(|a, b| gap(a, &centres).total_cmp(&gap(b, &centres)));
        centres.extend(next.map(|row| row.to_vec()));
    }
    centres
}

fn nearest(rows: &[&[f32]], centres: &[Vec<f32>]) -> Vec<u32> {
    let of = |row: &&[f32]| {
        let gap = |k: &usize| distance(row, &centres[*k]);
        (0..centres.len()).min_by(|a, b| gap(a).total_cmp(&gap(b))).unwrap_or(0) as u32
    };
    rows.iter().map(of).collect()
}

/// Means of the clusters at unit length; one that lost all its rows stays where it was.
fn means(rows: &[&[f32]], assignment: &[u32], old: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mean = |(k, old): (usize, &Vec<f32>)| {
        let mut sum = vec![0f32; old.len()];
        for (row, _) in rows.iter().zip(assignment).filter(|(_, cluster)| **cluster == k as u32) {
            sum.iter_mut().zip(*row).for_each(|(sum, value)| *sum += value);
        }
        let length = sum.iter().map(|value| value * value).sum::<f32>().sqrt();
        if length == 0. { old.clone() } else { sum.iter().map(|value| value / length).collect() }
    };
    old.iter().enumerate().map(mean).collect()
}
