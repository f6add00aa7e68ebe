//! Views: pictures as a network's input, augmented or not.
//!
//! A [`Pipeline`] is a list of [`Operation`]s from the experiment file, done in their order. Each
//! draws what it needs from the generator it is given, then the result is normalised by the
//! [`Input`] that the network expects. Values in between are 32-bit floats of range `[0, 1]` that
//! are never rounded to bytes; where torchvision has the operation, it is the same function of them.
//!
//! Adjacent `affine` and `elastic` operations are composed: a pixel's place goes through them from
//! the last to the first, and the picture is sampled once at the place where it ends up, so
//! nothing is blurred twice.
//!
//! To add an operation: a variant of [`Operation`], its ranges in [`Operation::check`], a line in
//! [`Pipeline::apply`].

mod blur;
mod canvas;
mod colour;
mod draw;
mod operation;
mod resize;
mod warp;

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::Picture;
use canvas::Canvas;
use draw::{chance, uniform};

pub use operation::{Filter, Operation};

/// What a network takes in: a table of the experiment file, and part of a network's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Input {
    /// Rows of pixels.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
    /// 1 grey, 3 red, green, blue.
    pub channels: usize,
    /// Mean of each channel, subtracted; of values in `[0, 1]`.
    pub mean: Vec<f64>,
    /// Standard deviation of each channel, divided by.
    pub std: Vec<f64>,
    /// What is done to a picture that is not augmented; nothing in it is drawn by chance.
    pub clean: Vec<Operation>,
}

impl Input {
    /// Checks what the types cannot say. `table` is how the experiment calls this, for messages.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names its key.
    pub fn check(&self, table: &str) -> Result<()> {
        let positive = self.height > 0 && self.width > 0;
        ensure!(
            positive,
            "`height` and `width` in `[{table}]` are {} and {}; at least 1 is needed",
            self.height,
            self.width
        );
        ensure!(
            self.channels == 1 || self.channels == 3,
            "`channels = {}` in `[{table}]`: 1 is grey, 3 is colour",
            self.channels
        );
        for (key, values) in [("mean", &self.mean), ("std", &self.std)] {
            ensure!(
                values.len() == self.channels && values.iter().all(|value| value.is_finite()),
                "`{key} = {values:?}` in `[{table}]`: one number for each of the {} channels is \
                 needed",
                self.channels
            );
        }
        ensure!(
            self.std.iter().all(|&std| std > 0.),
            "`std = {:?}` in `[{table}]`: each must be above 0",
            self.std
        );
        for (position, operation) in self.clean.iter().enumerate() {
            let key = format!("clean[{position}]` of `[{table}]");
            operation.check(&key)?;
            ensure!(
                !operation.is_random(),
                "`{key}` is drawn by chance; un-augmented pictures take resize-shorter, \
                 centre-crop and resize"
            );
        }
        Ok(())
    }

    /// The pipeline of un-augmented pictures.
    pub fn clean(&self) -> Pipeline {
        Pipeline { operations: self.clean.clone() }
    }

    /// Number of values in one picture, `height · width · channels`.
    pub fn values(&self) -> usize {
        self.height * self.width * self.channels
    }
}

/// Operations that make a view of a picture: a table of the experiment file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pipeline {
    /// What is done, in this order; normalising comes last by itself.
    pub operations: Vec<Operation>,
}

/// Memory that one thread needs to make views, reused from one to the next.
#[derive(Debug, Default)]
pub struct Workspace {
    canvas: Canvas,
    spare: Canvas,
    resize: resize::Buffers,
    blur: blur::Buffers,
    warp: warp::Buffers,
}

impl Pipeline {
    /// Checks the parameters of all operations. `table` is how the experiment calls this pipeline,
    /// for messages.
    ///
    /// # Errors
    ///
    /// A parameter is out of range; the message names the operation, the key and the range.
    pub fn check(&self, table: &str) -> Result<()> {
        for (position, operation) in self.operations.iter().enumerate() {
            operation.check(&format!("operations[{position}]` of `[{table}]"))?;
        }
        Ok(())
    }

    /// Makes one view of `picture` with the draws of `rng` and writes it, normalised, to `out`:
    /// `(height, width, channels)` as `input` says.
    ///
    /// # Errors
    ///
    /// The picture has other channels than the input, an operation cannot be done to a picture of
    /// its size, or the result has another size than the input.
    pub fn apply(
        &self,
        picture: &Picture,
        input: &Input,
        rng: &mut ChaCha8Rng,
        workspace: &mut Workspace,
        out: &mut [f32],
    ) -> Result<()> {
        ensure!(
            picture.channels == input.channels,
            "the picture has {} channels but the network takes {}; prepare the images again with \
             `channels = {}` in table `[prepare]`",
            picture.channels,
            input.channels,
            input.channels
        );
        let Workspace { canvas, spare, resize, blur, warp } = workspace;
        let mut source = Some(picture);
        let mut operations = self.operations.as_slice();
        while let Some((operation, rest)) = operations.split_first() {
            operations = rest;
            if let Some(area) = operation.area(picture_size(source, canvas), input, rng)? {
                match source.take() {
                    Some(picture) => resize::from_picture(picture, &area, canvas, resize),
                    None => {
                        resize::from_canvas(canvas, &area, spare, resize);
                        std::mem::swap(canvas, spare);
                    }
                }
                continue;
            }
            if let Some(picture) = source.take() {
                canvas.load(picture);
            }
            match *operation {
                Operation::Affine { .. } | Operation::Elastic { .. } => {
                    let further = rest.iter().take_while(|next| next.is_warp()).count();
                    let warps = std::iter::once(operation).chain(&rest[..further]);
                    warp::apply(warps, canvas, spare, warp, rng);
                    std::mem::swap(canvas, spare);
                    operations = &rest[further..];
                }
                Operation::Flip { probability } => {
                    if chance(rng, probability) {
                        canvas.flip();
                    }
                }
                Operation::Jitter { probability, brightness, contrast, saturation, hue } => {
                    let strength = colour::Strength { brightness, contrast, saturation, hue };
                    let jitter = strength.draw(rng);
                    if chance(rng, probability) {
                        jitter.apply(canvas);
                    }
                }
                Operation::Grey { probability } => {
                    if chance(rng, probability) {
                        colour::grey(canvas);
                    }
                }
                Operation::Blur { probability, kernel, deviation: [low, high] } => {
                    let deviation = uniform(rng, low, high);
                    if chance(rng, probability) {
                        blur::apply(canvas, spare, kernel, deviation, blur)?;
                        std::mem::swap(canvas, spare);
                    }
                }
                Operation::Solarise { probability, threshold } => {
                    if chance(rng, probability) {
                        colour::solarise(canvas, threshold);
                    }
                }
                Operation::Gamma { log_range } => {
                    colour::gamma(canvas, uniform(rng, -log_range, log_range).exp());
                }
                Operation::ContrastScale { range } => {
                    colour::scale(canvas, uniform(rng, 1. - range, 1. + range));
                }
                Operation::Noise { deviation } => colour::noise(canvas, deviation, rng),
                Operation::ResizedCrop { .. }
                | Operation::ResizeShorter { .. }
                | Operation::CentreCrop { .. }
                | Operation::Resize { .. } => {
                    anyhow::bail!("{operation:?} names no area of the picture")
                }
            }
        }
        if let Some(picture) = source {
            canvas.load(picture);
        }
        ensure!(
            (canvas.height, canvas.width) == (input.height, input.width),
            "the view is {}×{} pixels but the network takes {}×{}; let its operations begin with \
             resized-crop, or end with resize",
            canvas.height,
            canvas.width,
            input.height,
            input.width
        );
        canvas.normalise(input, out).context("writing the view")
    }
}

fn picture_size(source: Option<&Picture>, canvas: &Canvas) -> (usize, usize) {
    source.map_or((canvas.height, canvas.width), |picture| (picture.height, picture.width))
}
