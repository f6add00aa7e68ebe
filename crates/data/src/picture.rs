//! Decoded pictures, and decoding.

use std::io::Cursor;

use anyhow::{Context, Result, bail, ensure};
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageDecoder, RgbImage};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

/// The most pixels of a picture, 2²⁶: 512 MiB with 16-bit colour and alpha. Larger pictures are refused
/// before anything is allocated for them.
pub const MOST_PIXELS: usize = 1 << 26;

/// A picture in memory: 8 bits a channel, row by row, channels innermost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Rows.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
    /// 1 grey, 3 red, green, blue.
    pub channels: usize,
    /// `(height, width, channels)`.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// A picture of these pixels, `(height, width, channels)`.
    ///
    /// # Errors
    ///
    /// It has no pixel or too many, or neither 1 nor 3 channels, or `pixels` has another length.
    pub fn new(height: usize, width: usize, channels: usize, pixels: Vec<u8>) -> Result<Self> {
        check_extents(height, width)?;
        ensure!(channels == 1 || channels == 3, "{channels} channels; a picture has 1 or 3");
        ensure!(
            pixels.len() == height * width * channels,
            "{} bytes for a picture of {height}×{width} pixels with {channels} channels",
            pixels.len()
        );
        Ok(Self { height, width, channels, pixels })
    }

    /// Converts to grey (1) or colour (3). Grey is Rec. 601 luma, rounded as by Pillow; colour of a
    /// grey picture is the grey three times.
    pub(crate) fn with_channels(self, channels: usize) -> Self {
        let pixels = match (self.channels, channels) {
            (3, 1) => self.pixels.chunks_exact(3).map(luma).collect(),
            (1, 3) => self.pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
            _ => return self,
        };
        Self { channels, pixels, ..self }
    }
}

/// A picture whose pixels are borrowed from a [`Picture`] or from a mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pixels<'a> {
    /// Rows.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
    /// 1 grey, 3 red, green, blue.
    pub channels: usize,
    /// `(height, width, channels)`.
    pub bytes: &'a [u8],
}

impl<'a> From<&'a Picture> for Pixels<'a> {
    fn from(picture: &'a Picture) -> Self {
        let Picture { height, width, channels, pixels } = picture;
        Self { height: *height, width: *width, channels: *channels, bytes: pixels }
    }
}

/// The encoding of the bytes of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// The pixels themselves, row by row, channels innermost.
    Raw,
    /// A JPEG file.
    Jpeg,
    /// A PNG file.
    Png,
    /// A WebP file.
    WebP,
}

impl Encoding {
    /// Recognises the encoding by the first bytes of a file.
    pub fn of(file: &[u8]) -> Option<Self> {
        if file.starts_with(&[0xff, 0xd8, 0xff]) {
            Some(Self::Jpeg)
        } else if file.starts_with(b"\x89PNG\r\n\x1a\n") {
            Some(Self::Png)
        } else if file.starts_with(b"RIFF") && file.get(8..12) == Some(b"WEBP") {
            Some(Self::WebP)
        } else {
            None
        }
    }

    /// Its number in `images.safetensors`.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The encoding with this number in `images.safetensors`.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Raw, Self::Jpeg, Self::Png, Self::WebP]
            .into_iter()
            .find(|encoding| encoding.code() == code)
    }
}

/// Decodes a JPEG, PNG or WebP file to grey (1) or colour (3).
///
/// Drops transparency, reduces 16 bits to 8, takes the first frame of an animation, and rotates a
/// photograph by its EXIF orientation.
///
/// # Errors
///
/// The file is of another kind, broken, cut short, or has more than [`MOST_PIXELS`].
pub fn decode(file: &[u8], channels: usize) -> Result<Picture> {
    decode_into(Vec::new(), file, channels)
}

/// [`decode`] into the buffer of an earlier picture, where the decoder can.
pub(crate) fn decode_into(memory: Vec<u8>, file: &[u8], channels: usize) -> Result<Picture> {
    match Encoding::of(file) {
        Some(Encoding::Jpeg) => decode_jpeg(memory, file, channels),
        Some(Encoding::Png) => decode_png(file, channels),
        Some(Encoding::WebP) => decode_webp(file, channels),
        Some(Encoding::Raw) | None => bail!("neither a JPEG nor a PNG nor a WebP file"),
    }
}

fn decode_jpeg(pixels: Vec<u8>, file: &[u8], channels: usize) -> Result<Picture> {
    if has_end(file) {
        return decode_jpeg_to_its_end(pixels, file, channels);
    }
    // Decoders fill missing data with grey, so that a truncated file looks whole to them. Some
    // cameras and recovery programs overwrite just the end marker, most often with zeros. The file
    // is whole if the picture does not depend on the bits that come after its data.
    let data = &file[..file.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1)];
    let continued_by = |filler: [u8; 2], pixels| {
        let continued = [data, &filler.repeat(8), &END].concat();
        decode_jpeg_to_its_end(pixels, &continued, channels)
    };
    let picture = continued_by([0, 0], pixels)?;
    let is_whole = continued_by([0xff, 0], Vec::new()).is_ok_and(|other| other == picture);
    ensure!(is_whole, "the JPEG file is cut short");
    Ok(picture)
}

fn decode_jpeg_to_its_end(mut pixels: Vec<u8>, file: &[u8], channels: usize) -> Result<Picture> {
    let options = DecoderOptions::new_fast()
        .set_strict_mode(false)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(file), options);
    decoder.decode_headers().context("the JPEG header is broken")?;
    let (width, height) = decoder.dimensions().context("the JPEG header has no size")?;
    check_extents(height, width)?;
    // The luma plane of a JPEG file is the grey picture. Files that store red, green and blue, or
    // inks, are decoded to colour first.
    let has_luma = matches!(decoder.input_colorspace(), Some(ColorSpace::YCbCr | ColorSpace::Luma));
    let (space, decoded_channels) =
        if channels == 1 && has_luma { (ColorSpace::Luma, 1) } else { (ColorSpace::RGB, 3) };
    decoder.set_options(options.jpeg_set_out_colorspace(space));
    pixels.resize(height * width * decoded_channels, 0);
    decoder.decode_into(&mut pixels).context("the JPEG data are broken")?;
    let picture = Picture::new(height, width, decoded_channels, pixels)?;
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    turned(picture, orientation.unwrap_or(Orientation::NoTransforms))
        .map(|picture| picture.with_channels(channels))
}

/// The marker at the end of a JPEG file. It cannot occur within the pixel data.
const END: [u8; 2] = [0xff, 0xd9];

/// Whether the end marker follows the pixel data of a JPEG file.
fn has_end(file: &[u8]) -> bool {
    file.ends_with(&END) || file[data_start(file)..].windows(2).any(|pair| pair == END)
}

/// The offset of the pixel data of a JPEG file, after all segments. A segment may hold a thumbnail
/// with its own end marker.
fn data_start(file: &[u8]) -> usize {
    const START_OF_SCAN: u8 = 0xda;
    let mut position = 2;
    while let Some(&[0xff, marker, high, low]) = file.get(position..position + 4) {
        match marker {
            START_OF_SCAN => return position,
            // Any number of fill bytes may precede a marker.
            0xff => position += 1,
            // Markers without a segment.
            0x01 | 0xd0..=0xd8 => position += 2,
            _ => position += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    position.min(file.len())
}

fn decode_png(file: &[u8], channels: usize) -> Result<Picture> {
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(MOST_PIXELS as u64 * 8);
    let mut decoder =
        PngDecoder::with_limits(Cursor::new(file), limits).context("the PNG header is broken")?;
    let (width, height) = decoder.dimensions();
    check_extents(height as usize, width as usize)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut decoded =
        DynamicImage::from_decoder(decoder).context("the PNG data are broken or cut short")?;
    decoded.apply_orientation(orientation);
    Ok(from_dynamic(decoded)?.with_channels(channels))
}

fn decode_webp(file: &[u8], channels: usize) -> Result<Picture> {
    let mut decoder = WebPDecoder::new(Cursor::new(file)).context("the WebP header is broken")?;
    let (width, height) = decoder.dimensions();
    check_extents(height as usize, width as usize)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut decoded =
        DynamicImage::from_decoder(decoder).context("the WebP data are broken or cut short")?;
    decoded.apply_orientation(orientation);
    Ok(from_dynamic(decoded)?.with_channels(channels))
}

fn turned(picture: Picture, orientation: Orientation) -> Result<Picture> {
    if orientation == Orientation::NoTransforms {
        return Ok(picture);
    }
    let (width, height) = (u32::try_from(picture.width)?, u32::try_from(picture.height)?);
    let fits = "the number of pixels was checked";
    let mut dynamic = if picture.channels == 1 {
        DynamicImage::from(GrayImage::from_raw(width, height, picture.pixels).context(fits)?)
    } else {
        DynamicImage::from(RgbImage::from_raw(width, height, picture.pixels).context(fits)?)
    };
    dynamic.apply_orientation(orientation);
    from_dynamic(dynamic)
}

fn from_dynamic(decoded: DynamicImage) -> Result<Picture> {
    let (height, width) = (decoded.height() as usize, decoded.width() as usize);
    if decoded.color().has_color() {
        Picture::new(height, width, 3, decoded.into_rgb8().into_raw())
    } else {
        Picture::new(height, width, 1, decoded.into_luma8().into_raw())
    }
}

fn check_extents(height: usize, width: usize) -> Result<()> {
    ensure!(height > 0 && width > 0, "{height}×{width}: a picture without pixels");
    ensure!(
        height.checked_mul(width).is_some_and(|pixels| pixels <= MOST_PIXELS),
        "{height}×{width}: more than {MOST_PIXELS} pixels"
    );
    Ok(())
}

/// Rec. 601 luma in 16-bit fixed point, rounded: `L` of Pillow.
fn luma(rgb: &[u8]) -> u8 {
    let [red, green, blue] = [rgb[0], rgb[1], rgb[2]].map(u32::from);
    ((19_595 * red + 38_470 * green + 7_471 * blue + 0x8000) >> 16) as u8
}

#[cfg(test)]
pub(crate) mod tests {
    use image::codecs::jpeg::JpegEncoder;
    use image::codecs::png::PngEncoder;
    use image::{ExtendedColorType, ImageEncoder};

    use super::*;

    /// A smooth picture, neither square nor symmetric.
    pub(crate) fn example(height: usize, width: usize, channels: usize) -> Picture {
        let pixels = (0..height * width * channels).map(|i| {
            let (x, y) = (i / channels % width, i / channels / width);
            let falling = 200 + x * y / 8;
            let value = [20 + 7 * x + 3 * y, falling - 3 * x - 2 * y, 90 + 6 * y];
            value[i % channels].min(255) as u8
        });
        Picture::new(height, width, channels, pixels.collect()).expect("sound")
    }

    pub(crate) fn jpeg(picture: &Picture) -> Vec<u8> {
        let mut file = Vec::new();
        let color =
            if picture.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
        JpegEncoder::new_with_quality(&mut file, 95)
            .encode(&picture.pixels, picture.width as u32, picture.height as u32, color)
            .expect("encodes");
        file
    }

    pub(crate) fn png(picture: &Picture) -> Vec<u8> {
        let mut file = Vec::new();
        let color =
            if picture.channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
        PngEncoder::new(&mut file)
            .write_image(&picture.pixels, picture.width as u32, picture.height as u32, color)
            .expect("encodes");
        file
    }

    /// The JPEG file with an EXIF orientation.
    pub(crate) fn with_orientation(mut file: Vec<u8>, orientation: u8) -> Vec<u8> {
        let mut exif = *b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0\0\0\0\0";
        exif[25] = orientation;
        let segment = [&[0xff, 0xe1, 0, exif.len() as u8 + 2][..], &exif].concat();
        file.splice(2..2, segment);
        file
    }

    fn difference(a: &Picture, b: &Picture) -> u8 {
        assert_eq!((a.height, a.width, a.channels), (b.height, b.width, b.channels));
        a.pixels.iter().zip(&b.pixels).map(|(a, b)| a.abs_diff(*b)).max().expect("pixels")
    }

    #[test]
    fn png_and_jpeg_are_decoded_in_colour_and_grey() {
        let colour = example(11, 18, 3);
        let grey = colour.clone().with_channels(1);
        // By hand: the first pixel is (20, 200, 90), and 0.299·20 + 0.587·200 + 0.114·90 = 133.64.
        assert_eq!(grey.pixels[0], 134);
        assert_eq!(decode(&png(&colour), 3).expect("sound"), colour);
        assert_eq!(decode(&png(&colour), 1).expect("sound"), grey);
        assert_eq!(decode(&png(&grey), 3).expect("sound"), grey.clone().with_channels(3));
        assert!(difference(&decode(&jpeg(&colour), 3).expect("sound"), &colour) < 12);
        assert!(difference(&decode(&jpeg(&colour), 1).expect("sound"), &grey) < 6);
        assert!(difference(&decode(&jpeg(&grey), 1).expect("sound"), &grey) < 6);
    }

    #[test]
    fn an_exif_orientation_is_obeyed() {
        let picture = example(16, 24, 3);
        // To be turned a quarter clockwise.
        let turned = decode(&with_orientation(jpeg(&picture), 6), 3).expect("sound");
        assert_eq!((turned.height, turned.width), (24, 16));
        let at = |p: &Picture, y: usize, x: usize| p.pixels[(y * p.width + x) * 3];
        for (y, x) in [(0, 0), (3, 20), (15, 2)] {
            assert!(at(&turned, x, 15 - y).abs_diff(at(&picture, y, x)) < 12);
        }
    }

    #[test]
    fn broken_cut_empty_and_foreign_files_are_errors() {
        let picture = example(40, 50, 3);
        for file in [jpeg(&picture), png(&picture)] {
            for length in [0, 1, 4, 30, file.len() / 2, file.len() - 20] {
                assert!(decode(&file[..length], 3).is_err(), "{length} of {}", file.len());
            }
        }
        // A truncated file with a thumbnail: its end marker is not that of the picture.
        let mut file = jpeg(&picture);
        file.splice(2..2, [0xff, 0xe1, 0, 6, 0xff, 0xd9, 0, 0]);
        decode(&file, 3).expect("whole");
        let cut = file.len() / 2;
        assert!(decode(&file[..cut], 3).is_err());
        // Nor are zeros in place of the rest.
        file[cut..].fill(0);
        assert!(decode(&file, 3).is_err());
        assert!(decode(b"GIF89a", 3).expect_err("a GIF").to_string().contains("neither"));
    }

    #[test]
    fn fill_bytes_and_padding_do_not_make_a_jpeg_truncated() {
        let picture = example(40, 50, 3);
        let file = jpeg(&picture);
        let want = decode(&file, 3).expect("whole");
        let mut filled = file.clone();
        // The first marker after the start of the file, and one with a thumbnail's end marker.
        filled.splice(2..2, [0xff, 0xff, 0xff, 0xe1, 0, 6, 0xff, 0xd9, 0, 0, 0xff, 0xff]);
        assert_eq!(decode(&filled, 3).expect("whole"), want);
        assert!(decode(&filled[..filled.len() / 2], 3).is_err());
        filled.extend([0; 300]);
        assert_eq!(decode(&filled, 3).expect("whole"), want);
        // All pixels are there, but not the end marker.
        let data = file.len() - END.len();
        for padding in [0, 1, 2, 300] {
            let padded = [&file[..data], &vec![0; padding]].concat();
            assert_eq!(decode(&padded, 3).expect("whole"), want, "{padding} zeros");
            assert_eq!(decode(&padded, 1).expect("whole"), decode(&file, 1).expect("whole"));
        }
        for missing in 1..60 {
            let cut = [&file[..data - missing], &[0; 300][..]].concat();
            let read = decode(&cut, 3);
            assert!(read.is_err() || read.is_ok_and(|read| read == want), "{missing} bytes less");
        }
        assert!(decode(&[&file[..data - 20], &[0; 300][..]].concat(), 3).is_err());
    }

    #[test]
    fn webp_is_decoded_and_a_cut_file_refused() {
        let picture = example(11, 18, 3);
        let mut file = Vec::new();
        image::codecs::webp::WebPEncoder::new_lossless(&mut file)
            .encode(&picture.pixels, 18, 11, ExtendedColorType::Rgb8)
            .expect("encodes");
        assert_eq!(Encoding::of(&file), Some(Encoding::WebP));
        assert_eq!(decode(&file, 3).expect("sound"), picture);
        assert_eq!(decode(&file, 1).expect("sound"), picture.with_channels(1));
        for length in [4, 12, 20, 40, file.len() / 2, file.len() - 4] {
            assert!(decode(&file[..length], 3).is_err(), "{length} of {}", file.len());
        }
    }

    #[test]
    fn too_large_pictures_are_refused_before_they_are_decoded() {
        let mut file = png(&example(3, 4, 3));
        // Width and height follow the name of the first chunk, and its checksum follows them.
        file[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        let checksum = crc32(&file[12..29]);
        file[29..33].copy_from_slice(&checksum.to_be_bytes());
        let error = format!("{:#}", decode(&file, 3).expect_err("too large"));
        assert!(error.contains("more than 67108864 pixels"), "{error}");
        assert!(Picture::new(0, 3, 1, vec![]).is_err());
        assert!(Picture::new(1, 1, 2, vec![0; 2]).is_err());
        assert!(Picture::new(2, 2, 1, vec![0; 3]).is_err());
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |mut crc, byte| {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1));
            }
            crc
        })
    }
}
