//! Area-averaged thumbnails: pictures as vectors of pixels, the baseline without a network.

use crate::Picture;

/// The longest side of a thumbnail.
pub const SIDE: usize = 32;

/// A picture small enough for comparing pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct Thumbnail {
    /// Rows.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
    /// As the picture has.
    pub channels: usize,
    /// Values in `[0, 1]`, `(height, width, channels)`.
    pub values: Vec<f32>,
}

/// Returns the height and width that thumbnails of pictures of these sizes share: the largest side
/// that occurs, at most [`SIDE`]. Pictures of one size of at most 32×32 pixels keep it.
pub fn common_size(sizes: impl IntoIterator<Item = (usize, usize)>) -> (usize, usize) {
    let largest = |(height, width): (usize, usize), size: (usize, usize)| {
        (height.max(size.0.min(SIDE)), width.max(size.1.min(SIDE)))
    };
    sizes.into_iter().fold((0, 0), largest)
}

/// Returns the mean of each of `height` × `width` equal areas of the picture. A pixel on a border
/// counts for each area by its share; an area smaller than a pixel has the pixel's value.
pub fn thumbnail(picture: &Picture, (height, width): (usize, usize)) -> Thumbnail {
    let channels = picture.channels;
    let (rows, columns) = (shares(picture.height, height), shares(picture.width, width));
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

/// Returns, for each of `parts` equal parts of a side, the first pixel that it covers, and the
/// share of the part that each covered pixel has.
fn shares(side: usize, parts: usize) -> Vec<(usize, Vec<f32>)> {
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

    fn own_thumbnail(picture: &Picture) -> Thumbnail {
        thumbnail(picture, common_size([(picture.height, picture.width)]))
    }

    #[test]
    fn pictures_of_several_sizes_share_the_largest_and_small_ones_are_enlarged() {
        assert_eq!(common_size([(8, 8), (8, 8)]), (8, 8));
        assert_eq!(common_size([(16, 16), (64, 9)]), (32, 16));
        let picture = Picture::new(2, 2, 1, vec![0, 51, 102, 204]).expect("sound");
        let got = thumbnail(&picture, (3, 4));
        assert_eq!((got.height, got.width), (3, 4));
        // Columns: each pixel twice. Rows: the first, the mean, the second.
        let want = [0., 0., 0.2, 0.2, 0.2, 0.2, 0.5, 0.5, 0.4, 0.4, 0.8, 0.8];
        for (value, want) in got.values.iter().zip(want) {
            assert!((value - want).abs() < 1e-6, "{:?}", got.values);
        }
    }

    #[test]
    fn a_small_picture_is_its_own_thumbnail() {
        let picture = example(5, 32, 3);
        let got = own_thumbnail(&picture);
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
        let got = own_thumbnail(&picture);
        assert_eq!((got.height, got.width), (32, 3));
        for (row, base) in [(0, 0.), (2, 3.), (30, 45.)] {
            for column in 0..3 {
                let want = (base * 2. / 3. + (base + 1.) / 3. + 50. * column as f32) / 255.;
                let value = got.values[row * 3 + column];
                assert!((value - want).abs() < 1e-6, "{row}, {column}: {value}, {want}");
            }
        }
        let turned = (0..3 * 48).map(|i| (i % 48 + 50 * (i / 48)) as u8).collect();
        let turned = own_thumbnail(&Picture::new(3, 48, 1, turned).expect("sound"));
        assert_eq!((turned.height, turned.width), (3, 32));
        assert!((turned.values[2 * 32 + 1] - got.values[3 + 2]).abs() < 1e-6);
    }
}
