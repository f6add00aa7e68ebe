//! Views: pictures as a network's input, augmented or not.
//!
//! A [`Pipeline`] is a list of [`Operation`]s from the experiment file, applied in their order. Each
//! draws its parameters from the given generator; the result is normalised as the [`Input`] of the
//! network says. Intermediate values are 32-bit floats in `[0, 1]` that are never rounded to bytes.
//! Where torchvision has the operation, ours is the same function.
//!
//! Adjacent `affine` and `elastic` operations are composed: a pixel's position passes through them
//! from the last to the first, and the picture is sampled once, so that nothing is blurred twice.
//!
//! ```
//! use data::Picture;
//! use data::views::{Input, Pipeline, Workspace};
//!
//! let input: Input = toml::from_str(
//!     r#"
//!     height = 8
//!     width = 8
//!     channels = 3
//!     mean = [0.5, 0.5, 0.5]
//!     std = [0.25, 0.25, 0.25]
//!     clean = [{ operation = "resize", pixels = 8, filter = "bicubic" }]
//!     "#,
//! )?;
//! let augmented: Pipeline = toml::from_str(
//!     r#"
//!     operations = [
//!       { operation = "resized-crop", scale = [0.2, 1.0], aspect = [0.75, 1.33] },
//!       { operation = "flip", probability = 0.5 },
//!     ]
//!     "#,
//! )?;
//! augmented.check("views")?;
//!
//! // A picture of 20 × 30 pixels; usually `Images::picture` decodes one.
//! let picture = Picture::new(20, 30, 3, vec![128; 20 * 30 * 3])?;
//! let mut view = vec![0f32; input.values()];
//! let mut rng = stage::random::stream(0, "views", &[7]);
//! augmented.apply(&picture, &input, &mut rng, &mut Workspace::default(), &mut view)?;
//! // (128 / 255 − 0.5) / 0.25, for every crop.
//! assert!(view.iter().all(|value| (value - 0.00784).abs() < 1e-4));
//! # anyhow::Ok(())
//! ```
//!
//! To add an operation: a variant of [`Operation`], its ranges in `Operation::check`, a line in
//! [`Pipeline::apply`].

#[cfg(test)]
mod agreement;
mod blur;
mod canvas;
mod colour;
mod draw;
mod operation;
pub(crate) mod resize;
mod warp;

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::picture::Pixels;
use canvas::Canvas;
use draw::{chance, uniform};

pub use operation::{Filter, Operation};

/// The input of a network: a table of the experiment file, and part of a network's `config.json`.
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
    /// The operations on a picture that is not augmented; none of them is random.
    pub clean: Vec<Operation>,
}

impl Input {
    /// Checks the values. `table` is the name of this table in the experiment, for messages.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names its key.
    pub fn check(&self, table: &str) -> Result<()> {
        let positive = self.height > 0 && self.width > 0;
        ensure!(
            positive,
            "`height` and `width` in `[{table}]` are {} and {}; both must be at least 1",
            self.height,
            self.width
        );
        ensure!(
            self.channels == 1 || self.channels == 3,
            "`channels` in `[{table}]` is {}; it must be 1 (grey) or 3 (colour)",
            self.channels
        );
        for (key, values) in [("mean", &self.mean), ("std", &self.std)] {
            ensure!(
                values.len() == self.channels && values.iter().all(|value| value.is_finite()),
                "`{key}` in `[{table}]` is {values:?}; it must have one number for each of the {} \
                 channels",
                self.channels
            );
        }
        ensure!(
            self.std.iter().all(|&std| std > 0.),
            "`std` in `[{table}]` is {:?}; each must be above 0",
            self.std
        );
        for (position, operation) in self.clean.iter().enumerate() {
            let key = format!("clean[{position}]` of `[{table}]");
            operation.check(&key)?;
            ensure!(
                !operation.is_random(),
                "`{key}` is a random operation; it must be resize-shorter, centre-crop or resize, \
                 because these pictures are not augmented"
            );
        }
        Ok(())
    }

    /// The pipeline of un-augmented pictures.
    pub fn clean(&self) -> Pipeline {
        Pipeline { operations: self.clean.clone() }
    }

    /// A warning where large pictures were stored at a shorter side of `stored` pixels and this input sees
    /// them larger.
    pub fn stored_too_small(&self, stored: Option<usize>) -> Option<String> {
        let resized = self.clean.iter().find_map(|operation| match *operation {
            Operation::ResizeShorter { pixels, .. } | Operation::Resize { pixels, .. } => {
                Some(pixels)
            }
            _ => None,
        });
        let (stored, seen) = (stored?, resized?);
        (stored < seen).then(|| {
            format!(
                "large pictures were stored at a shorter side of {stored} pixels, but this network sees \
                 them at {seen}; set `stored-shorter-side` in table `[prepare]` to {} or 0",
                2 * seen
            )
        })
    }

    /// Number of values in one picture, `height · width · channels`.
    pub fn values(&self) -> usize {
        self.height * self.width * self.channels
    }
}

/// The operations that turn a picture into a view: a table of the experiment file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pipeline {
    /// The operations, in their order; normalising follows and is not listed.
    pub operations: Vec<Operation>,
}

/// Buffers of one thread, reused from view to view.
#[derive(Debug, Default)]
pub struct Workspace {
    canvas: Canvas,
    spare: Canvas,
    resize: resize::ResizeBuffers,
    blur: blur::BlurBuffers,
    warp: warp::WarpBuffers,
}

impl Pipeline {
    /// Checks the parameters of all operations. `table` is the name of this pipeline in the
    /// experiment, for messages.
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
    /// The picture has other channels than the input, an operation does not apply to a picture of
    /// this size, or the result has another size than the input.
    pub fn apply<'a>(
        &self,
        picture: impl Into<Pixels<'a>>,
        input: &Input,
        rng: &mut ChaCha8Rng,
        workspace: &mut Workspace,
        out: &mut [f32],
    ) -> Result<()> {
        let picture = picture.into();
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
            if let Some(mut area) = operation.area(picture_size(source, canvas), input, rng)? {
                // Only the middle is resized if the next operation crops it.
                if let Some((next, further)) = rest.split_first()
                    && let Some((pixels, round)) = next.crop()
                {
                    area = area.cut_to_centre(pixels, round)?;
                    operations = further;
                }
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
                | Operation::CentreCropRoundedDown { .. }
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

fn picture_size(source: Option<Pixels<'_>>, canvas: &Canvas) -> (usize, usize) {
    source.map_or((canvas.height, canvas.width), |picture| (picture.height, picture.width))
}

#[cfg(test)]
mod tests {
    use stage::random::stream;

    use super::*;
    use crate::Picture;
    use crate::picture::tests::example;

    const INPUT: &str = r#"
        height = 7
        width = 11
        channels = 3
        mean = [0.5, 0.4, 0.3]
        std = [0.2, 0.25, 0.5]
        clean = []
    "#;

    /// The views of propos.md, section 4, then those of pldc.md, section 10.
    const OPERATIONS: &str = r#"
        operations = [
          { operation = "resized-crop", scale = [0.08, 1.0], aspect = [0.75, 1.3333333333] },
          { operation = "flip", probability = 0.5 },
          { operation = "jitter", probability = 0.8, brightness = 0.4, contrast = 0.4, saturation = 0.4, hue = 0.1 },
          { operation = "grey", probability = 0.2 },
          { operation = "blur", probability = 0.5, kernel = 5, deviation = [0.1, 2.0] },
          { operation = "solarise", probability = 0.2, threshold = 128.0 },
          { operation = "affine", degrees = 15.0, log-scale = 0.15, log-aspect = 0.1, shear = 0.15, shift = 0.15 },
          { operation = "elastic", grid = 4, deviation = 0.06 },
          { operation = "gamma", log-range = 0.5 },
          { operation = "contrast-scale", range = 0.4 },
          { operation = "noise", deviation = 0.05 },
        ]
    "#;

    fn input() -> Input {
        toml::from_str(INPUT).expect("sound")
    }

    fn pipeline(operations: Vec<Operation>) -> Pipeline {
        Pipeline { operations }
    }

    fn view(pipeline: &Pipeline, picture: &Picture, input: &Input, draw: u64) -> Result<Vec<f32>> {
        let mut out = vec![f32::NAN; input.values()];
        let mut rng = stream(1, "views", &[draw]);
        pipeline.apply(picture, input, &mut rng, &mut Workspace::default(), &mut out)?;
        Ok(out)
    }

    #[test]
    fn without_operations_a_view_is_the_normalised_picture() {
        let (picture, input) = (example(7, 11, 3), input());
        let got = view(&input.clean(), &picture, &input, 0).expect("made");
        for (i, (got, &byte)) in got.iter().zip(&picture.pixels).enumerate() {
            let want = (f64::from(byte) / 255. - input.mean[i % 3]) / input.std[i % 3];
            assert!((f64::from(*got) - want).abs() < 1e-5, "{i}: {got}, {want}");
        }
        let grey = Input { channels: 1, mean: vec![0.3], std: vec![0.35], ..input };
        let picture = example(7, 11, 1);
        let got = view(&grey.clean(), &picture, &grey, 0).expect("made");
        let want = (f32::from(picture.pixels[40]) / 255. - 0.3) / 0.35;
        assert!((got[40] - want).abs() < 1e-5);
    }

    #[test]
    fn a_view_has_the_same_bytes_in_a_workspace_that_was_used() {
        let pipeline: Pipeline = toml::from_str(OPERATIONS).expect("sound");
        pipeline.check("views").expect("in range");
        let (picture, input) = (example(30, 20, 3), input());
        let mut workspace = Workspace::default();
        let mut different = std::collections::BTreeSet::new();
        for draw in 0..40 {
            let mut out = vec![f32::NAN; input.values()];
            let mut rng = stream(1, "views", &[draw]);
            pipeline.apply(&picture, &input, &mut rng, &mut workspace, &mut out).expect("made");
            assert!(out.iter().all(|value| value.is_finite()));
            assert_eq!(out, view(&pipeline, &picture, &input, draw).expect("made"));
            different.insert(out[50].to_bits());
        }
        assert_eq!(different.len(), 40);
    }

    #[test]
    fn every_operation_stands_for_itself() {
        // A flip and the same by hand; each of the others changes the picture.
        let (picture, input) = (example(7, 11, 3), input());
        let plain = view(&pipeline(vec![]), &picture, &input, 3).expect("made");
        let flipped = pipeline(vec![Operation::Flip { probability: 1. }]);
        let flipped = view(&flipped, &picture, &input, 3).expect("made");
        for (i, value) in flipped.iter().enumerate() {
            let (channel, x, y) = (i % 3, i / 3 % 11, i / 33);
            assert_eq!(*value, plain[(y * 11 + 10 - x) * 3 + channel]);
        }
        let all: Pipeline = toml::from_str(OPERATIONS).expect("sound");
        for operation in all.operations {
            let always = match operation {
                Operation::Jitter { brightness, contrast, saturation, hue, .. } => {
                    Operation::Jitter { probability: 1., brightness, contrast, saturation, hue }
                }
                Operation::Grey { .. } => Operation::Grey { probability: 1. },
                Operation::Flip { .. } => Operation::Flip { probability: 1. },
                Operation::Blur { kernel, .. } => {
                    Operation::Blur { probability: 1., kernel, deviation: [1., 1.] }
                }
                Operation::Solarise { threshold, .. } => {
                    Operation::Solarise { probability: 1., threshold }
                }
                other => other,
            };
            let got = view(&pipeline(vec![always]), &picture, &input, 3).expect("made");
            assert_ne!(got, plain, "{always:?}");
            assert!(got.iter().all(|value| value.is_finite()), "{always:?}");
        }
    }

    #[test]
    fn never_is_never() {
        let (picture, input) = (example(7, 11, 3), input());
        let never = pipeline(vec![
            Operation::Flip { probability: 0. },
            Operation::Jitter {
                probability: 0.,
                brightness: 1.,
                contrast: 1.,
                saturation: 1.,
                hue: 0.5,
            },
            Operation::Grey { probability: 0. },
            Operation::Blur { probability: 0., kernel: 5, deviation: [1., 1.] },
            Operation::Solarise { probability: 0., threshold: 0. },
        ]);
        let plain = view(&pipeline(vec![]), &picture, &input, 3).expect("made");
        assert_eq!(view(&never, &picture, &input, 3).expect("made"), plain);
    }

    #[test]
    fn un_augmented_photographs_are_resized_cut_and_resized_again() {
        let clean: Input = toml::from_str(
            r#"
            height = 6
            width = 6
            channels = 3
            mean = [0.0, 0.0, 0.0]
            std = [1.0, 1.0, 1.0]
            clean = [
              { operation = "resize-shorter", pixels = 16, filter = "bilinear" },
              { operation = "centre-crop", pixels = 14 },
              { operation = "resize", pixels = 6, filter = "bicubic" },
            ]
        "#,
        )
        .expect("sound");
        clean.check("embed.input").expect("in range");
        // A ramp across, constant down: 20×33 → 16×26, cut at 1 and 6, → 6×6.
        let pixels = (0..20 * 33 * 3).map(|i| (7 * (i / 3 % 33)) as u8).collect();
        let picture = Picture::new(20, 33, 3, pixels).expect("sound");
        let got = view(&clean.clean(), &picture, &clean, 0).expect("made");
        for (i, &value) in got.iter().enumerate() {
            let x = i / 3 % 6;
            // Resampling a ramp gives a ramp: the middle of pixel x of 6 lies at (x + ½)·14/6 + 6
            // of 26, which is at (…)·33/26 of 33.
            let at = ((x as f64 + 0.5) * 14. / 6. + 6.) * 33. / 26. - 0.5;
            let want = 7. * at / 255.;
            // The outermost cubics, 4⅔ pixels to each side, lean on the edge of the cut.
            let tolerance = if (2..4).contains(&x) { 1e-3 } else { 0.02 };
            assert!((f64::from(value) - want).abs() < tolerance, "{i}: {value}, {want}");
        }
    }

    #[test]
    fn wrong_sizes_and_channels_are_errors_with_a_remedy() {
        let input = input();
        let error = |picture: &Picture, operations| {
            let made = view(&pipeline(operations), picture, &input, 0);
            made.expect_err("an error").to_string()
        };
        let text = error(&example(7, 12, 3), vec![]);
        assert!(text.contains("7×12") && text.contains("resized-crop"), "{text}");
        let text = error(&example(7, 11, 1), vec![]);
        assert!(text.contains("1 channels") && text.contains("channels = 3"), "{text}");
        let text = error(&example(7, 11, 3), vec![Operation::CentreCrop { pixels: 8 }]);
        assert!(text.contains("resize-shorter"), "{text}");
        let blur = Operation::Blur { probability: 1., kernel: 15, deviation: [1., 1.] };
        let text = error(&example(7, 11, 3), vec![blur]);
        assert!(text.contains("`kernel` of a blur is 15"), "{text}");
    }

    #[test]
    fn pictures_stored_smaller_than_the_input_sees_them_are_warned_of() {
        let clean = vec![
            Operation::ResizeShorter { pixels: 256, filter: Filter::Bicubic },
            Operation::CentreCrop { pixels: 224 },
        ];
        let [mean, std] = [vec![0.; 3], vec![1.; 3]];
        let input = Input { height: 224, width: 224, channels: 3, mean, std, clean };
        for stored in [None, Some(256), Some(257)] {
            assert_eq!(input.stored_too_small(stored), None);
        }
        let warning = input.stored_too_small(Some(255)).expect("too small");
        assert!(warning.contains("stored-shorter-side") && warning.contains("512"), "{warning}");
    }

    #[test]
    fn an_input_that_contradicts_itself_is_named() {
        input().check("pretraining.input").expect("sound");
        type Spoil = fn(&mut Input);
        let spoilt: [(&str, Spoil); 6] = [
            ("height", |input| input.height = 0),
            ("channels", |input| input.channels = 2),
            ("mean", |input| input.mean.truncate(2)),
            ("std", |input| input.std[1] = 0.),
            ("std", |input| input.std[1] = f64::INFINITY),
            ("clean", |input| input.clean = vec![Operation::Flip { probability: 0.5 }]),
        ];
        for (key, spoil) in spoilt {
            let mut input = input();
            spoil(&mut input);
            let error = input.check("pretraining.input").expect_err(key).to_string();
            assert!(error.contains(key) && error.contains("[pretraining.input]"), "{error}");
        }
        let broken = pipeline(vec![
            Operation::Gamma { log_range: 0.5 },
            Operation::Flip { probability: 2. },
        ]);
        let error = broken.check("pretraining.views").expect_err("2").to_string();
        for part in ["`probability` in `operations[1]` of `[pretraining.views]` is 2", "between"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
