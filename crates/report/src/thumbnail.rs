//! Thumbnails, and their form as text of a page.

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use data::Picture;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::FilterType;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};

/// The longest side of a thumbnail in pixels: twice the size on the page, for high-density screens.
pub const SIDE: u32 = 160;

/// Converts a picture to an image of the library `image`.
///
/// # Errors
///
/// The number of pixels contradicts the sides.
pub fn to_image(picture: &Picture) -> Result<DynamicImage> {
    let (height, width) = (u32::try_from(picture.height)?, u32::try_from(picture.width)?);
    let pixels = picture.pixels.clone();
    let image = match picture.channels {
        1 => GrayImage::from_raw(width, height, pixels).map(DynamicImage::from),
        _ => RgbImage::from_raw(width, height, pixels).map(DynamicImage::from),
    };
    image.context("the number of pixels contradicts the sides of the picture")
}

/// Encodes a [thumbnail](encode) as a `data:` URL.
pub fn data_url(picture: &Picture) -> Result<String> {
    let (kind, bytes) = encode(picture)?;
    Ok(format!("data:{kind};base64,{}", BASE64_STANDARD.encode(bytes)))
}

/// Encodes a thumbnail of at most 160 × 160 pixels; returns its media type and bytes.
///
/// Small pictures keep their pixels, as PNG; others are scaled down in proportion, as JPEG.
pub fn encode(picture: &Picture) -> Result<(&'static str, Vec<u8>)> {
    let image = to_image(picture)?;
    let mut bytes = Vec::new();
    let small = image.width() <= SIDE / 2 && image.height() <= SIDE / 2;
    let kind = if small {
        image.write_to(&mut std::io::Cursor::new(&mut bytes), ImageFormat::Png)?;
        "image/png"
    } else {
        let fits = image.width() <= SIDE && image.height() <= SIDE;
        let scaled = if fits { image } else { image.resize(SIDE, SIDE, FilterType::Triangle) };
        scaled.write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, 80))?;
        "image/jpeg"
    };
    Ok((kind, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(picture: &Picture) -> Result<(String, Picture)> {
        let url = data_url(picture)?;
        let (kind, text) = url.split_once(";base64,").context("base64")?;
        let bytes = BASE64_STANDARD.decode(text)?;
        Ok((kind.to_owned(), data::picture::decode(&bytes, picture.channels)?))
    }

    fn gradient(height: usize, width: usize, channels: usize) -> Result<Picture> {
        let pixel = |i: usize| (i / channels % width * 200 / width + i % channels * 20) as u8;
        let pixels = (0..height * width * channels).map(pixel).collect();
        Picture::new(height, width, channels, pixels)
    }

    #[test]
    fn small_pictures_stay_as_they_are() -> Result<()> {
        for channels in [1, 3] {
            let picture = gradient(8, 10, channels)?;
            assert_eq!(decoded(&picture)?, ("data:image/png".into(), picture));
        }
        Ok(())
    }

    #[test]
    fn large_pictures_are_scaled_in_proportion() -> Result<()> {
        let picture = gradient(300, 900, 3)?;
        let (kind, small) = decoded(&picture)?;
        assert_eq!((kind.as_str(), small.height, small.width), ("data:image/jpeg", 53, 160));
        for place in [[10, 10], [40, 150], [20, 80]] {
            let [row, column] = place;
            let (near, far) =
                ((row * 160 + column) * 3, (row * 300 / 53 * 900 + column * 900 / 160) * 3);
            for channel in 0..3 {
                let (got, want) = (small.pixels[near + channel], picture.pixels[far + channel]);
                assert!(got.abs_diff(want) < 12, "{place:?}: {got}, want about {want}");
            }
        }
        for (height, width, want) in [
            (100, 90, [100, 90]),
            (40, 150, [40, 150]),
            (150, 40, [150, 40]),
            (100, 800, [20, 160]),
        ] {
            let (kind, small) = decoded(&gradient(height, width, 1)?)?;
            assert_eq!((kind.as_str(), [small.height, small.width]), ("data:image/jpeg", want));
        }
        Ok(())
    }
}
