//! Area-averaged thumbnails: pictures as vectors of pixels, the baseline without a network.

use crate::Picture;

/// The longest side of a thumbnail.
pub const SIDE: usize = 32;

/// A picture small enough for comparing pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Thumbnail {
    /// Rows: those of the picture, at most [`SIDE`].
    pub height: usize,
    /// Pixels in a row: those of the picture, at most [`SIDE`].
    pub width: usize,
    /// As the picture has.
    pub channels: usize,
    /// Values in `[0, 1]`, `(height, width, channels)`.
    pub values: Vec<f32>,
}

/// Returns the mean of each of at most 32×32 equal areas of the picture. A pixel on a border counts
/// for each area by its share. Sides of at most 32 pixels are not reduced.
pub fn thumbnail(picture: &Picture) -> Thumbnail {
    let channels = picture.channels;
    let (rows, columns) = (shares(picture.height), shares(picture.width));
    let mut values = Vec::with_capacity(rows.len() * columns.len() * channels);
    let mut mixed = vec![0f32; picture.width * channels];
    for (first, weights) in &rows {
        mixed.fill(0.);
        let lines = picture.pixels.chunks_exact(picture.width * channels).skip(*first);
        for (weight, line) in weights.iter().zip(lines) {
            for (mixed, &byte) in mixed.iter_mut().zip(line) {
                *mixed += weight * f32::from(byte);
            }
        }
        for (first, weights) in &columns {
            for channel in 0..channels {
                let pixels = mixed[first * channels + channel..].iter().step_by(channels);
                let mean: f32 = pixels.zip(weights).map(|(value, weight)| value * weight).sum();
                values.push(mean / 255.);
            }
        }
    }
    Thumbnail { height: rows.len(), width: columns.len(), channels, values }
}

/// Returns, for each of at most [`SIDE`] equal parts of a side, the first pixel that it covers, and the
/// share of the part that each covered pixel has.
fn shares(side: usize) -> Vec<(usize, Vec<f32>)> {
    let parts = side.min(SIDE);
    let part = |number: usize| {
        // In units of a pixel's `parts`-th, so that all borders are whole numbers.
        let (begin, end) = (number * side, (number + 1) * side);
        let (first, last) = (begin / parts, (end - 1) / parts);
        let covered = |pixel: usize| end.min((pixel + 1) * parts) - begin.max(pixel * parts);
        let weights = (first..=last).map(|pixel| covered(pixel) as f32 / side as f32).collect();
        (first, weights)
    };
    (0..parts).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::tests::example;

    #[test]
    fn a_small_picture_is_its_own_thumbnail() {
        let picture = example(5, 32, 3);
        let got = thumbnail(&picture);
        assert_eq!((got.height, got.width, got.channels), (5, 32, 3));
        for (value, &byte) in got.values.iter().zip(&picture.pixels) {
            assert!((value - f32::from(byte) / 255.).abs() < 1e-6);
        }
    }

    #[test]
    fn areas_are_averaged_by_their_shares_in_each_direction() {
        // 48 pixels in 32 parts: each part is a pixel and a half, 2/3 and 1/3 of the mean.
        let pixels = (0..48 * 3).map(|i| (i / 3 + 50 * (i % 3)) as u8).collect();
        let picture = Picture::new(48, 3, 1, pixels).expect("sound");
        let got = thumbnail(&picture);
        assert_eq!((got.height, got.width), (32, 3));
        for (row, base) in [(0, 0.), (2, 3.), (30, 45.)] {
            for column in 0..3 {
                let want = (base * 2. / 3. + (base + 1.) / 3. + 50. * column as f32) / 255.;
                let value = got.values[row * 3 + column];
                assert!((value - want).abs() < 1e-6, "{row}, {column}: {value}, {want}");
            }
        }
        let turned = (0..3 * 48).map(|i| (i % 48 + 50 * (i / 48)) as u8).collect();
        let turned = thumbnail(&Picture::new(3, 48, 1, turned).expect("sound"));
        assert_eq!((turned.height, turned.width), (3, 32));
        assert!((turned.values[2 * 32 + 1] - got.values[3 + 2]).abs() < 1e-6);
    }
}
