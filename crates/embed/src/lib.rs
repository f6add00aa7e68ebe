//! Embed: what the trained target network makes of every picture that is scored.
//!
//! The target runs on its running statistics, so that a picture's embedding depends on nothing but
//! the picture. Its projection is made unit-length; embeddings of a few augmented views come beside
//! that of the clean picture, for a clustering network that knows no pictures.
//!
//! Reads `images.safetensors`, and `network.safetensors` with `config.json` from the role
//! `network`. Writes `embeddings.safetensors`. With `pixels = true` it reads no network: small
//! thumbnails of the pictures stand for embedding and projection, the baseline of every table.
//!
//! This stage trains nothing and knows no clusters.

use std::num::NonZero;
use std::time::Instant;

use anyhow::{Result, ensure};
use backbone::Configuration;
use candle_core::{Device, Tensor};
use data::views::{Input, Pipeline};
use data::{Batch, Embeddings, Images, Loader};
use rand::Rng;
use serde::{Deserialize, Serialize};
use stage::progress::Progress;
use stage::{Interrupted, Stage};
use training::Target;

/// Raised when the results change for the same table.
pub const ALGORITHM: u32 = 1;

/// What embedding can vary. The experiment file sets every field.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Pictures per forward pass; changes memory and time, not the result.
    pub batch_size: usize,
    /// Augmented views V of each picture.
    pub views: usize,
    /// Thumbnails instead of a network's embeddings.
    pub pixels: bool,
    /// From a picture to an augmented view; may be milder than in training.
    pub augmentation: Pipeline,
}

impl Config {
    /// Finds what is wrong before anything runs.
    ///
    /// # Errors
    ///
    /// A value lies outside its range, the device is not there, or the network's configuration,
    /// where it exists already, is not usable.
    pub fn check(&self, stage: &Stage) -> Result<()> {
        ensure!(self.batch_size > 0, "batch-size = 0: at least 1 is needed");
        self.augmentation.check("embed.augmentation")?;
        training::network_device(stage.device)?;
        match stage.optional_input("network") {
            Some(folder) if !self.pixels && folder.join(backbone::CONFIGURATION).exists() => {
                Configuration::read(folder)?.input::<Input>()?.check("input")
            }
            _ => Ok(()),
        }
    }
}

/// Files in, files out.
///
/// # Errors
///
/// An input is missing, damaged or foreign, or the program was interrupted.
pub fn run(config: &Config, stage: &Stage) -> Result<()> {
    let images = Images::open(&stage.images)?;
    let rows = images.rows(&stage.data.score_on);
    ensure!(
        !rows.is_empty(),
        "`{}` has no picture of the splits {:?}; see `score-on` in table `[data]`",
        stage.images.display(),
        stage.data.score_on
    );
    let began = Instant::now();
    let embeddings = if config.pixels {
        pixels(&images, rows, stage)?
    } else {
        embeddings(config, &images, rows, stage)?
    };
    let forwards = embeddings.index.len() * (1 + embeddings.views);
    let seconds = began.elapsed().as_secs_f64();
    stage.log(&serde_json::json!({
        "images": embeddings.index.len(),
        "views": embeddings.views,
        "seconds": seconds,
        "images-per-second": forwards as f64 / seconds.max(1e-9),
    }))?;
    embeddings.write(&stage.out.join("embeddings.safetensors"))
}

/// Embeddings of the target network.
fn embeddings(
    config: &Config,
    images: &Images,
    rows: Vec<u32>,
    stage: &Stage,
) -> Result<Embeddings> {
    let device = training::network_device(stage.device)?;
    let folder = stage.input("network")?;
    let configuration = Configuration::read(folder)?;
    let input: Input = configuration.input()?;
    input.check("input")?;
    let mut target = Target::open(folder, &configuration)?;
    let source = Source { config, images, rows: &rows, input: &input, stage, device };
    let mut progress = Progress::new("embed", (rows.len() * (1 + config.views)) as u64);

    let (mut backbone, mut projection) = (Vec::new(), Vec::new());
    source.each_batch(&input.clean(), 0, &mut progress, |pictures| {
        let (embedding, unit_projection) = target.embed(pictures)?;
        backbone.extend(embedding.flatten_all()?.to_vec1::<f32>()?);
        projection.extend(unit_projection.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    })?;
    let mut backbone_views = Vec::with_capacity(backbone.len() * config.views);
    for view in 0..config.views {
        source.each_batch(&config.augmentation, 1 + view, &mut progress, |pictures| {
            let embedding = target.embedding(pictures)?;
            backbone_views.extend(embedding.flatten_all()?.to_vec1::<f32>()?);
            Ok(())
        })?;
    }
    Ok(Embeddings {
        data_set: images.data_set().clone(),
        index: rows,
        width: configuration.backbone.embedding_width(),
        projection_width: configuration.projector.width,
        views: config.views,
        backbone,
        projection,
        backbone_views,
    })
}

/// Where views of the scored pictures come from.
struct Source<'a> {
    config: &'a Config,
    images: &'a Images,
    rows: &'a [u32],
    input: &'a Input,
    stage: &'a Stage,
    device: Device,
}

impl Source<'_> {
    /// Hands every picture, in order and once, to `take`, as batches `(B, H, W, C)`.
    ///
    /// - `pass`: 0 for the clean pictures, `v` from 1 for the augmented views: other draws each.
    fn each_batch(
        &self,
        pipeline: &Pipeline,
        pass: usize,
        progress: &mut Progress,
        mut take: impl FnMut(&Tensor) -> Result<()>,
    ) -> Result<()> {
        let batches = self.rows.chunks(self.config.batch_size).map(<[u32]>::to_vec).collect();
        // Draws of its own: those of training's epochs are other views.
        let seed =
            stage::random::stream(self.stage.seed, "embed", &[self.stage.round as u64]).next_u64();
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let pipelines = vec![pipeline.clone()];
        let loader =
            Loader::new(self.images, batches, pipelines, self.input, seed, pass as u64, threads)?;
        let mut done = pass * self.rows.len();
        for batch in loader {
            let Batch { rows, views, height, width, channels } = batch?;
            let shape = (rows.len(), height, width, channels);
            for view in views {
                take(&Tensor::from_vec(view, shape, &self.device)?)?;
            }
            done += rows.len();
            progress.at(done as u64, "");
            if self.stage.interrupted() {
                return Err(Interrupted.into());
            }
        }
        Ok(())
    }
}

/// Thumbnails as both embedding and projection, without augmented views.
fn pixels(images: &Images, rows: Vec<u32>, stage: &Stage) -> Result<Embeddings> {
    let mut values: Vec<f32> = Vec::new();
    let mut shape = None;
    for &row in &rows {
        let thumbnail = data::thumbnail(&*images.picture(row)?);
        let (height, width) = (thumbnail.height, thumbnail.width);
        let (first_height, first_width) = *shape.get_or_insert((height, width));
        ensure!(
            (height, width) == (first_height, first_width),
            "picture {row} of `{}` has a thumbnail of {height} x {width} pixels, but the first one \
             has {first_height} x {first_width}; the pixel baseline needs pictures of one size, or \
             of at least 32 x 32 pixels",
            stage.images.display()
        );
        values.extend(thumbnail.values);
        if stage.interrupted() {
            return Err(Interrupted.into());
        }
    }
    let width = values.len() / rows.len();
    Ok(Embeddings {
        data_set: images.data_set().clone(),
        index: rows,
        width,
        projection_width: width,
        views: 0,
        backbone: values.clone(),
        projection: values,
        backbone_views: Vec::new(),
    })
}
