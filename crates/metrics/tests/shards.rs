//! k-means over embeddings in several files.

use std::path::{Path, PathBuf};

use anyhow::Result;
use assignment::{
    KMeans, Metric, Shards, Streaming, k_means, k_means_mini_batch, k_means_streaming,
};
use data::{DataSet, Embeddings};

const WIDTH: usize = 6;

/// Rows around four directions, the same for every range.
fn rows(from: usize, to: usize) -> Vec<f32> {
    let wave = |x: usize| ((x * 7919 % 1009) as f32 / 1009. - 0.5) * 0.8;
    let value = |i: usize| {
        let (row, column) = (i / WIDTH, i % WIDTH);
        let direction = if column == row % 4 { 1. } else { 0. };
        direction + wave(i)
    };
    (from * WIDTH..to * WIDTH).map(value).collect()
}

fn write(folder: &Path, name: &str, from: usize, to: usize) -> Result<PathBuf> {
    let path = folder.join(name);
    let embeddings = Embeddings {
        data_set: DataSet { path: path.clone(), images: to - from, fingerprint: "f".into() },
        index: (0..(to - from) as u32).collect(),
        width: 1,
        projection_width: WIDTH,
        views: 0,
        backbone: vec![0.; to - from].into(),
        projection: rows(from, to).into(),
        backbone_views: vec![].into(),
    };
    embeddings.write(&path)?;
    Ok(path)
}

#[test]
fn files_are_grouped_as_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let ends = [(0, 700), (700, 701), (701, 2000)];
    let files = ends
        .iter()
        .enumerate()
        .map(|(i, &(from, to))| write(folder.path(), &format!("{i}.safetensors"), from, to))
        .map(|path| Embeddings::open(&path?))
        .collect::<Result<Vec<_>>>()?;
    // A file may be one shard or several.
    let pieces: Vec<(usize, std::ops::Range<usize>)> = (files.iter().enumerate())
        .flat_map(|(file, rows)| {
            let len = rows.index.len();
            (0..len).step_by(500).map(move |first| (file, first..len.min(first + 500)))
        })
        .collect();
    let lengths = pieces.iter().map(|(_, rows)| rows.len()).collect();
    let read = |shard: usize| {
        let (file, rows) = &pieces[shard];
        Ok(files[*file].projection[rows.start * WIDTH..rows.end * WIDTH].to_vec())
    };
    let shards = Shards::new(WIDTH, lengths, read);
    assert_eq!(shards.points(), 2000);
    let config = KMeans {
        clusters: 4,
        metric: Metric::Spherical,
        restarts: 4,
        iterations: 100,
        tolerance: 1e-4,
    };
    let want = k_means(&rows(0, 2000), 2000, WIDTH, &config, 0)?;
    let streaming = Streaming { sample: 400, passes: 20 };
    let lloyd = k_means_streaming(&shards, &config, &streaming, 0)?;
    let batches = k_means_mini_batch(&shards, &config, &streaming, 200, 0)?;
    for found in [lloyd, batches] {
        assert!(found.inertia < 1.01 * want.inertia, "{} {}", found.inertia, want.inertia);
        assert_eq!(found.assignment.len(), 2000);
    }
    Ok(())
}
