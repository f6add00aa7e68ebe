//! Operations on the values of pixels, wherever these lie.

use kernels::image;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::views::canvas::Canvas;
use crate::views::draw::{below, uniform};

/// How far jitter may go; see [`crate::views::Operation::Jitter`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Strength {
    pub(super) brightness: f64,
    pub(super) contrast: f64,
    pub(super) saturation: f64,
    pub(super) hue: f64,
}

/// One change of colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Change {
    Brightness(f64),
    Contrast(f64),
    Saturation(f64),
    Hue(f64),
}

/// Four changes in the order they are to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Jitter([Change; 4]);

impl Strength {
    /// Draws the four factors, then their order.
    pub(super) fn draw(&self, rng: &mut ChaCha8Rng) -> Jitter {
        let mut factor = |strength: f64| uniform(rng, (1. - strength).max(0.), 1. + strength);
        let mut changes = [
            Change::Brightness(factor(self.brightness)),
            Change::Contrast(factor(self.contrast)),
            Change::Saturation(factor(self.saturation)),
            Change::Hue(uniform(rng, -self.hue, self.hue)),
        ];
        for last in (1..changes.len()).rev() {
            changes.swap(last, below(rng, last + 1));
        }
        Jitter(changes)
    }
}

impl Jitter {
    pub(super) fn apply(&self, canvas: &mut Canvas) {
        for change in self.0 {
            change.apply(canvas);
        }
    }
}

impl Change {
    /// Makes the change; a factor of 1 or a turn of 0 is none.
    pub(super) fn apply(&self, canvas: &mut Canvas) {
        match *self {
            Self::Brightness(factor) if factor != 1. => {
                image::scale_and_shift_clamped(&mut canvas.values, factor as f32, 0.);
            }
            Self::Contrast(factor) if factor != 1. => {
                let shift = (1. - factor) * mean_grey(canvas);
                image::scale_and_shift_clamped(&mut canvas.values, factor as f32, shift as f32);
            }
            Self::Saturation(factor) if factor != 1. => {
                if let Some([red, green, blue]) = canvas.colours() {
                    image::saturate(red, green, blue, factor as f32);
                }
            }
            Self::Hue(turn) if turn != 0. => {
                if let Some([red, green, blue]) = canvas.colours() {
                    image::turn_hue(red, green, blue, turn as f32);
                }
            }
            _ => {}
        }
    }
}

fn mean_grey(canvas: &Canvas) -> f64 {
    let sums = canvas.planes().map(|plane| f64::from(image::sum(plane)));
    let sum: f64 = if canvas.channels == 3 {
        sums.zip(image::GREY).map(|(sum, weight)| sum * f64::from(weight)).sum()
    } else {
        sums.sum()
    };
    sum / canvas.pixels() as f64
}

/// Gives every channel the grey of its pixel.
pub(super) fn grey(canvas: &mut Canvas) {
    if let Some([red, green, blue]) = canvas.colours() {
        image::to_grey(red, green, blue);
    }
}

/// `1 − value` where the value is at least `threshold` of 255.
pub(super) fn solarise(canvas: &mut Canvas, threshold: f64) {
    image::solarise(&mut canvas.values, (threshold / 255.) as f32);
}

/// `value^exponent`; values outside `[0, 1]`, which only noise and scaling make, are held to it.
pub(super) fn gamma(canvas: &mut Canvas, exponent: f64) {
    image::scale_and_shift_clamped(&mut canvas.values, 1., 0.);
    image::power(&mut canvas.values, exponent as f32);
}

/// `factor · value`.
pub(super) fn scale(canvas: &mut Canvas, factor: f64) {
    image::scale_and_shift(&mut canvas.values, factor as f32, 0.);
}

/// Adds a normal number of this standard deviation to every value.
pub(super) fn noise(canvas: &mut Canvas, deviation: f64, rng: &mut ChaCha8Rng) {
    let deviation = deviation as f32;
    for value in &mut canvas.values {
        let normal: f32 = StandardNormal.sample(rng);
        *value += deviation * normal;
    }
}
