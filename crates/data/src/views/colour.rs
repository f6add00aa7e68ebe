//! Operations on the values of pixels.

use kernels::image;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::views::canvas::Canvas;
use crate::views::draw::{below, uniform};

/// The limits of jitter; see [`crate::views::Operation::Jitter`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Strength {
    pub(super) brightness: f64,
    pub(super) contrast: f64,
    pub(super) saturation: f64,
    pub(super) hue: f64,
}

/// One change of colour.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum ColourChange {
    Brightness(f64),
    Contrast(f64),
    Saturation(f64),
    Hue(f64),
}

/// Four changes in their order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Jitter([ColourChange; 4]);

impl Strength {
    /// Draws the four factors, then their order.
    pub(super) fn draw(&self, rng: &mut ChaCha8Rng) -> Jitter {
        let mut factor = |strength: f64| uniform(rng, (1. - strength).max(0.), 1. + strength);
        let mut changes = [
            ColourChange::Brightness(factor(self.brightness)),
            ColourChange::Contrast(factor(self.contrast)),
            ColourChange::Saturation(factor(self.saturation)),
            ColourChange::Hue(uniform(rng, -self.hue, self.hue)),
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

impl ColourChange {
    /// Applies the change. A factor of 1 or a rotation of 0 changes nothing.
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
    let weights = if canvas.channels == 3 { image::GREY } else { [1.; 3] };
    let sum: f64 = canvas
        .planes()
        .zip(weights)
        .map(|(plane, weight)| {
            let mut total = 0.;
            image::add_up(plane, &mut total);
            f64::from(total) * f64::from(weight)
        })
        .sum();
    sum / canvas.pixels() as f64
}

/// Sets every channel to the grey of its pixel.
pub(super) fn grey(canvas: &mut Canvas) {
    if let Some([red, green, blue]) = canvas.colours() {
        image::to_grey(red, green, blue);
    }
}

/// `1 − value` where the value is at least `threshold` of 255.
pub(super) fn solarise(canvas: &mut Canvas, threshold: f64) {
    image::solarise(&mut canvas.values, (threshold / 255.) as f32);
}

/// `value^exponent`, after clamping to `[0, 1]`, which only noise and scaling leave.
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

#[cfg(test)]
mod tests {
    use stage::random::stream;

    use super::*;

    const PIXELS: [[f32; 3]; 5] = [
        [0.7372988, 0.4921367, 0.7162594],
        [0.1435229, 0.2116342, 0.8238248],
        [0.835711, 0.1852112, 0.141226],
        [0.4631552, 0.5195767, 0.9304064],
        [0.0565417, 0.6795097, 0.7454618],
    ];

    /// One row of these pixels, as planes.
    fn canvas(pixels: &[[f32; 3]]) -> Canvas {
        let values = (0..3).flat_map(|c| pixels.iter().map(move |pixel| pixel[c])).collect();
        Canvas { height: 1, width: pixels.len(), channels: 3, values }
    }

    fn assert_close(got: &Canvas, want: &[[f32; 3]], what: &str) {
        for (got, want) in got.values.iter().zip(&canvas(want).values) {
            assert!((got - want).abs() < 2e-6, "{what}: {got}, not {want}");
        }
    }

    #[test]
    fn changes_of_colour_match_torchvision() {
        // What its `adjust_…` functions give in float64.
        for (change, want) in [
            (
                ColourChange::Brightness(1.4),
                [
                    [1.0, 0.6889913, 1.0],
                    [0.2009321, 0.2962879, 1.0],
                    [1.0, 0.2592957, 0.1977164],
                    [0.6484172, 0.7274073, 1.0],
                    [0.0791584, 0.9513136, 1.0],
                ],
            ),
            (
                ColourChange::Saturation(1.4),
                [
                    [0.7958518, 0.4526248, 0.7663965],
                    [0.0965144, 0.1918702, 1.0],
                    [1.0, 0.1094506, 0.0478713],
                    [0.4286192, 0.5076094, 1.0],
                    [0.0, 0.7510115, 0.8433444],
                ],
            ),
            (
                ColourChange::Hue(-0.1),
                [
                    [0.6112411, 0.4921367, 0.7372988],
                    [0.1435229, 0.6198152, 0.8238248],
                    [0.835711, 0.141226, 0.5139318],
                    [0.4631551, 0.7999274, 0.9304064],
                    [0.0565417, 0.7454618, 0.398062],
                ],
            ),
            (
                ColourChange::Hue(0.5),
                [
                    [0.4921367, 0.7372988, 0.5131762],
                    [0.8238248, 0.7557137, 0.1435229],
                    [0.141226, 0.7917257, 0.835711],
                    [0.9304064, 0.8739849, 0.4631551],
                    [0.7454618, 0.1224939, 0.0565417],
                ],
            ),
        ] {
            let mut got = canvas(&PIXELS);
            change.apply(&mut got);
            assert_close(&got, &want, &format!("{change:?}"));
        }
        let mut got = canvas(&PIXELS);
        grey(&mut got);
        let want = [0.5909164, 0.2610443, 0.3746127, 0.5494949, 0.5007552].map(|grey| [grey; 3]);
        assert_close(&got, &want, "grey");
    }

    #[test]
    fn contrast_mixes_with_the_mean_grey_and_hue_keeps_grey_pixels() {
        let mut got = canvas(&PIXELS);
        ColourChange::Contrast(0.5).apply(&mut got);
        // The mean of the five greys above.
        let mean = (0.5909164 + 0.2610443 + 0.3746127 + 0.5494949 + 0.5007552) / 5.;
        assert_close(&got, &PIXELS.map(|pixel| pixel.map(|v| 0.5 * v + 0.5 * mean)), "contrast");

        let greys = [[0.; 3], [0.5; 3], [1.; 3]];
        let mut got = canvas(&greys);
        ColourChange::Hue(0.3).apply(&mut got);
        assert_close(&got, &greys, "grey pixels");
    }

    #[test]
    fn one_channel_takes_brightness_and_contrast_alone() {
        let mut got = Canvas { height: 1, width: 2, channels: 1, values: vec![0.2, 0.6] };
        for change in [ColourChange::Saturation(0.1), ColourChange::Hue(0.4)] {
            change.apply(&mut got);
        }
        grey(&mut got);
        assert_eq!(got.values, [0.2, 0.6]);
        ColourChange::Contrast(0.5).apply(&mut got);
        assert!((got.values[0] - 0.3).abs() < 1e-6 && (got.values[1] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn jitter_draws_every_order_and_stays_in_its_ranges() {
        let strength = Strength { brightness: 0.4, contrast: 1.5, saturation: 0., hue: 0.1 };
        let mut rng = stream(5, "jitter", &[]);
        let mut orders = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            let Jitter(changes) = strength.draw(&mut rng);
            let order = changes.map(|change| match change {
                ColourChange::Brightness(factor) => {
                    assert!((0.6..1.4).contains(&factor));
                    0
                }
                ColourChange::Contrast(factor) => {
                    assert!((0. ..2.5).contains(&factor));
                    1
                }
                ColourChange::Saturation(factor) => {
                    assert_eq!(factor, 1.);
                    2
                }
                ColourChange::Hue(turn) => {
                    assert!((-0.1..0.1).contains(&turn));
                    3
                }
            });
            orders.insert(order);
        }
        assert_eq!(orders.len(), 24);
    }

    #[test]
    fn solarise_gamma_scale_and_noise_do_what_they_say() {
        let row = |values: &[f32]| Canvas {
            height: 1,
            width: values.len(),
            channels: 1,
            values: values.to_vec(),
        };
        let mut got = row(&[127. / 255., 128. / 255., 1.]);
        solarise(&mut got, 128.);
        assert_eq!(got.values, [127. / 255., 1. - 128. / 255., 0.]);

        let mut got = row(&[0., 0.25, 1., 1.5, -0.5]);
        gamma(&mut got, 1.5);
        for (got, want) in got.values.iter().zip([0., 0.125, 1., 1., 0.]) {
            assert!((got - want).abs() < 1e-6, "{got}, {want}");
        }
        let mut got = row(&[0.5, 1.]);
        scale(&mut got, 1.25);
        assert_eq!(got.values, [0.625, 1.25]);

        let mut got = row(&[0.5; 4000]);
        noise(&mut got, 0.05, &mut stream(1, "noise", &[]));
        let mean = got.values.iter().sum::<f32>() / 4000.;
        let variance = got.values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 4000.;
        // Five standard deviations of the mean and of the deviation.
        assert!((mean - 0.5).abs() < 0.004, "{mean}");
        assert!((variance.sqrt() - 0.05).abs() < 0.003, "{}", variance.sqrt());
    }
}
