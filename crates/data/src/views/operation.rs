//! Operations on a picture, as the experiment file lists them.

use anyhow::{Result, ensure};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::views::Input;
use crate::views::draw::{below, uniform};
use crate::views::resize::Area;

/// One operation on a picture. In the experiment file it is a table whose key `operation` is the
/// name of the variant in kebab-case; every other key must be present.
///
/// Warps measure lengths and shifts in half-widths (across) and half-heights (down) of the picture:
/// ±1 is the distance from the middle to the edge.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "operation",
    deny_unknown_fields,
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Operation {
    /// Crops a random part and resizes it to the network's input: torchvision's
    /// `RandomResizedCrop`, bilinear with antialiasing. It tries ten draws of area and aspect; if
    /// none fits, it crops the largest middle part of an allowed aspect.
    ResizedCrop {
        /// Smallest and largest share of the area.
        scale: [f64; 2],
        /// Smallest and largest ratio of width to height; its logarithm is uniform.
        aspect: [f64; 2],
    },
    /// Mirrors left and right.
    Flip {
        /// Probability of doing it.
        probability: f64,
    },
    /// Changes brightness, contrast, saturation and hue in random order: torchvision's
    /// `ColorJitter`. The last two leave grey pictures unchanged.
    Jitter {
        /// Probability of doing it.
        probability: f64,
        /// The factor is uniform between `max(0, 1 − b)` and `1 + b`.
        brightness: f64,
        /// As for brightness.
        contrast: f64,
        /// As for brightness.
        saturation: f64,
        /// Largest rotation of the hue, in turns of the colour circle, at most 0.5.
        hue: f64,
    },
    /// Converts to grey and keeps the channels.
    Grey {
        /// Probability of doing it.
        probability: f64,
    },
    /// Convolves with a Gaussian, the edges mirrored: torchvision's `GaussianBlur`.
    Blur {
        /// Probability of doing it.
        probability: f64,
        /// Extent of the kernel in pixels, odd.
        kernel: usize,
        /// Smallest and largest standard deviation in pixels.
        deviation: [f64; 2],
    },
    /// Rotates, scales, stretches, shears and shifts at once. Outside the picture, values are 0.
    Affine {
        /// Largest angle of rotation, in either direction.
        degrees: f64,
        /// Largest absolute logarithm of the scale.
        log_scale: f64,
        /// Largest absolute logarithm of the ratio of width to height.
        log_aspect: f64,
        /// Largest absolute shear: the shift across per length down.
        shear: f64,
        /// Largest absolute shift, across and down.
        shift: f64,
    },
    /// Displaces pixels smoothly: a bicubic surface through normal displacements on a coarse grid.
    /// Outside the picture, values are 0.
    Elastic {
        /// Grid points across, and as many down.
        grid: usize,
        /// Standard deviation of a displacement at a grid point.
        deviation: f64,
    },
    /// Raises values to the power `exp(u)`.
    Gamma {
        /// `u` is uniform between `−log_range` and `log_range`.
        log_range: f64,
    },
    /// Multiplies values by a factor, without clamping to `[0, 1]`.
    ContrastScale {
        /// The factor is uniform between `1 − range` and `1 + range`.
        range: f64,
    },
    /// Adds normal noise to every value, without clamping to `[0, 1]`.
    Noise {
        /// Its standard deviation, for values in `[0, 1]`.
        deviation: f64,
    },
    /// Inverts values at and above the threshold: `1 − value`.
    Solarise {
        /// Probability of doing it.
        probability: f64,
        /// In bytes: 128 is halfway between black and white.
        threshold: f64,
    },
    /// Resizes so that the shorter side has this length; the longer is rounded down.
    ResizeShorter {
        /// Length of the shorter side.
        pixels: usize,
        /// The filter of the interpolation.
        filter: Filter,
    },
    /// Crops the middle square, its margins rounded half to even: torchvision's `CenterCrop`.
    CentreCrop {
        /// Its side.
        pixels: usize,
    },
    /// Crops the middle square, the margins on top and at the left rounded down: transformers'.
    CentreCropRoundedDown {
        /// Its side.
        pixels: usize,
    },
    /// Resizes to a square and ignores the aspect.
    Resize {
        /// Its side.
        pixels: usize,
        /// The filter of the interpolation.
        filter: Filter,
    },
}

/// An interpolation filter of Pillow, with antialiasing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filter {
    /// A triangle, two pixels wide at the larger of the two scales.
    Bilinear,
    /// Keys' cubic with a = −0.5, four pixels wide.
    Bicubic,
}

/// How a margin that ends in half a pixel is rounded.
pub(super) type Rounding = fn(f64) -> f64;

impl Operation {
    /// Fails if a parameter is out of range. `place` says which operation it is, for messages.
    ///
    /// # Errors
    ///
    /// The message names key, place, value and range.
    pub(super) fn check(&self, place: &str) -> Result<()> {
        let within = |key: &str, value: f64, low: f64, high: f64| {
            ensure!(
                (low..=high).contains(&value),
                "`{key}` in `{place}` is {value}; it must be between {low} and {high}"
            );
            Ok(())
        };
        let ascending = |key: &str, [low, high]: [f64; 2], least: f64, most: f64| {
            within(key, low, least, most)?;
            within(key, high, least, most)?;
            ensure!(
                low <= high,
                "`{key}` in `{place}` is [{low}, {high}]; the first must not be above the second"
            );
            Ok(())
        };
        let positive = |key: &str, value: usize| {
            ensure!(value > 0, "`{key}` in `{place}` is 0; it must be at least 1");
            Ok(())
        };
        match *self {
            Self::ResizedCrop { scale, aspect } => {
                ascending("scale", scale, f64::MIN_POSITIVE, 1.)?;
                ascending("aspect", aspect, 1e-3, 1e3)
            }
            Self::Flip { probability } | Self::Grey { probability } => {
                within("probability", probability, 0., 1.)
            }
            Self::Jitter { probability, brightness, contrast, saturation, hue } => {
                within("probability", probability, 0., 1.)?;
                within("brightness", brightness, 0., 1e3)?;
                within("contrast", contrast, 0., 1e3)?;
                within("saturation", saturation, 0., 1e3)?;
                within("hue", hue, 0., 0.5)
            }
            Self::Blur { probability, kernel, deviation } => {
                within("probability", probability, 0., 1.)?;
                ascending("deviation", deviation, 1e-6, 1e3)?;
                ensure!(kernel % 2 == 1, "`kernel` in `{place}` is {kernel}; it must be odd");
                Ok(())
            }
            Self::Affine { degrees, log_scale, log_aspect, shear, shift } => {
                within("degrees", degrees, 0., 180.)?;
                within("log-scale", log_scale, 0., 5.)?;
                within("log-aspect", log_aspect, 0., 5.)?;
                within("shear", shear, 0., 10.)?;
                within("shift", shift, 0., 10.)
            }
            Self::Elastic { grid, deviation } => {
                within("grid", grid as f64, 1., 64.)?;
                within("deviation", deviation, 0., 10.)
            }
            Self::Gamma { log_range } => within("log-range", log_range, 0., 5.),
            Self::ContrastScale { range } => within("range", range, 0., 1.),
            Self::Noise { deviation } => within("deviation", deviation, 0., 1e3),
            Self::Solarise { probability, threshold } => {
                within("probability", probability, 0., 1.)?;
                within("threshold", threshold, 0., 256.)
            }
            Self::ResizeShorter { pixels, .. }
            | Self::CentreCrop { pixels }
            | Self::CentreCropRoundedDown { pixels }
            | Self::Resize { pixels, .. } => positive("pixels", pixels),
        }
    }

    /// Whether the result is random.
    pub(super) fn is_random(&self) -> bool {
        !matches!(self, Self::ResizeShorter { .. } | Self::Resize { .. }) && self.crop().is_none()
    }

    /// The side of the middle square that it crops, and how it rounds the margins.
    pub(super) fn crop(&self) -> Option<(usize, Rounding)> {
        match *self {
            Self::CentreCrop { pixels } => Some((pixels, f64::round_ties_even)),
            Self::CentreCropRoundedDown { pixels } => Some((pixels, f64::floor)),
            _ => None,
        }
    }

    /// Whether it moves pixels to places between pixels.
    pub(super) fn is_warp(&self) -> bool {
        matches!(self, Self::Affine { .. } | Self::Elastic { .. })
    }

    /// The area that a crop or a resize takes, and its new size; none for other operations.
    pub(super) fn area(
        &self,
        (height, width): (usize, usize),
        input: &Input,
        rng: &mut ChaCha8Rng,
    ) -> Result<Option<Area>> {
        if let Some((pixels, round)) = self.crop() {
            let whole = Area::new([0, 0, height, width], [height, width], Filter::Bilinear);
            return whole.cut_to_centre(pixels, round).map(Some);
        }
        Ok(Some(match *self {
            Self::ResizedCrop { scale, aspect } => {
                let part = random_crop(height, width, scale, aspect, rng);
                Area::new(part, [input.height, input.width], Filter::Bilinear)
            }
            Self::ResizeShorter { pixels, filter } => {
                Area::shorter([height, width], pixels, filter)
            }
            Self::Resize { pixels, filter } => {
                Area::new([0, 0, height, width], [pixels; 2], filter)
            }
            _ => return Ok(None),
        }))
    }
}

/// Top, left, height and width of a random part: `RandomResizedCrop.get_params` of torchvision.
pub(super) fn random_crop(
    height: usize,
    width: usize,
    scale: [f64; 2],
    aspect: [f64; 2],
    rng: &mut ChaCha8Rng,
) -> [usize; 4] {
    let area = (height * width) as f64;
    let log_aspect = aspect.map(f64::ln);
    for _ in 0..10 {
        let target = area * uniform(rng, scale[0], scale[1]);
        let ratio = uniform(rng, log_aspect[0], log_aspect[1]).exp();
        let crop_width = (target * ratio).sqrt().round_ties_even() as usize;
        let crop_height = (target / ratio).sqrt().round_ties_even() as usize;
        if (1..=width).contains(&crop_width) && (1..=height).contains(&crop_height) {
            let top = below(rng, height - crop_height + 1);
            let left = below(rng, width - crop_width + 1);
            return [top, left, crop_height, crop_width];
        }
    }
    let ratio = width as f64 / height as f64;
    let (crop_height, crop_width) = if ratio < aspect[0] {
        ((width as f64 / aspect[0]).round_ties_even() as usize, width)
    } else if ratio > aspect[1] {
        (height, (height as f64 * aspect[1]).round_ties_even() as usize)
    } else {
        (height, width)
    };
    let (crop_height, crop_width) = (crop_height.clamp(1, height), crop_width.clamp(1, width));
    [(height - crop_height) / 2, (width - crop_width) / 2, crop_height, crop_width]
}

#[cfg(test)]
mod tests {
    use stage::random::stream;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct OperationsTable {
        operations: Vec<Operation>,
    }

    fn parse(operation: &str) -> Result<Operation, toml::de::Error> {
        toml::from_str::<OperationsTable>(&format!("operations = [{operation}]"))
            .map(|t| t.operations[0])
    }

    #[test]
    fn operations_are_read_from_toml_and_written_to_it() {
        for (text, want) in [
            (
                "{ operation = \"resized-crop\", scale = [0.08, 1.0], aspect = [0.75, 1.33] }",
                Operation::ResizedCrop { scale: [0.08, 1.], aspect: [0.75, 1.33] },
            ),
            (
                "{ operation = \"affine\", degrees = 15, log-scale = 0.15, log-aspect = 0.1, \
                 shear = 0.2, shift = 0.25 }",
                Operation::Affine {
                    degrees: 15.,
                    log_scale: 0.15,
                    log_aspect: 0.1,
                    shear: 0.2,
                    shift: 0.25,
                },
            ),
            (
                "{ operation = \"resize-shorter\", pixels = 256, filter = \"bicubic\" }",
                Operation::ResizeShorter { pixels: 256, filter: Filter::Bicubic },
            ),
        ] {
            assert_eq!(parse(text).expect(text), want);
            let written = toml::to_string(&want).expect("serialises");
            assert_eq!(toml::from_str::<Operation>(&written).expect("parses"), want);
        }
    }

    #[test]
    fn unknown_missing_and_misspelt_keys_are_errors() {
        for text in [
            "{ operation = \"flip\" }",
            "{ operation = \"flip\", probability = 0.5, chance = 1 }",
            "{ operation = \"flop\", probability = 0.5 }",
            "{ probability = 0.5 }",
            "{ operation = \"gamma\", log_range = 0.5 }",
            "{ operation = \"centre-crop\", pixels = 2.5 }",
            "{ operation = \"resize\", pixels = 2, filter = \"nearest\" }",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn parameters_out_of_range_are_named_with_their_place() {
        for (operation, key) in [
            (Operation::ResizedCrop { scale: [0., 1.], aspect: [0.5, 2.] }, "scale"),
            (Operation::ResizedCrop { scale: [0.5, 1.5], aspect: [0.5, 2.] }, "scale"),
            (Operation::ResizedCrop { scale: [0.5, 1.], aspect: [2., 0.5] }, "aspect"),
            (Operation::Flip { probability: -0.1 }, "probability"),
            (Operation::Grey { probability: f64::NAN }, "probability"),
            (Operation::Blur { probability: 1., kernel: 4, deviation: [1., 2.] }, "kernel"),
            (Operation::Blur { probability: 1., kernel: 3, deviation: [0., 2.] }, "deviation"),
            (Operation::Elastic { grid: 0, deviation: 1. }, "grid"),
            (Operation::Gamma { log_range: -1. }, "log-range"),
            (Operation::ContrastScale { range: 1.5 }, "range"),
            (Operation::Noise { deviation: f64::INFINITY }, "deviation"),
            (Operation::Solarise { probability: 0.5, threshold: 300. }, "threshold"),
            (Operation::CentreCrop { pixels: 0 }, "pixels"),
        ] {
            let error = operation.check("operations[3]").expect_err(key).to_string();
            assert!(error.contains(key) && error.contains("operations[3]"), "{error}");
        }
        let jitter = |hue| Operation::Jitter {
            probability: 1.,
            brightness: 0.,
            contrast: 0.,
            saturation: 0.,
            hue,
        };
        jitter(0.5).check("").expect("allowed");
        assert!(jitter(0.6).check("").is_err());
    }

    #[test]
    fn random_parts_have_the_area_and_aspect_asked_for_and_lie_inside() {
        let (height, width) = (90, 160);
        let mut rng = stream(3, "crops", &[]);
        let (mut least, mut most, mut corners) = (1f64, 0f64, [false; 4]);
        for _ in 0..5000 {
            let [top, left, h, w] =
                random_crop(height, width, [0.08, 1.], [0.75, 4. / 3.], &mut rng);
            assert!(top + h <= height && left + w <= width);
            let share = (h * w) as f64 / (height * width) as f64;
            least = least.min(share);
            most = most.max(share);
            // One pixel of rounding at sides of 22 pixels and more.
            assert!((0.7..1.42).contains(&(w as f64 / h as f64)), "{w}×{h}");
            let at = [top == 0, left == 0, top + h == height, left + w == width];
            corners.iter_mut().zip(at).for_each(|(corner, at)| *corner |= at);
        }
        // A part as wide as allowed of a 16:9 picture has 3/4 of its area.
        assert!((0.07..0.1).contains(&least) && (0.7..0.76).contains(&most), "{least}, {most}");
        assert_eq!(corners, [true; 4]);
    }

    #[test]
    fn a_picture_too_long_for_every_draw_gives_its_middle() {
        let mut rng = stream(3, "crops", &[]);
        let mut crop = |height, width| random_crop(height, width, [1., 1.], [0.75, 1.5], &mut rng);
        assert_eq!(crop(10, 100), [0, 42, 10, 15]);
        assert_eq!(crop(100, 9), [44, 0, 12, 9]);
    }
}
