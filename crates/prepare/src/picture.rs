//! Recognises pictures and decodes each once as a check, within a memory limit.
//!
//! The first bytes of a file decide its format: ILSVRC-2012 itself has a PNG named `.JPEG`.
//! Decoding every picture here ensures that every stage can decode it, and is the time to reduce large
//! ones. JPEG could be decoded at a half or a quarter of its size, but `zune-jpeg` does not offer that,
//! and `jpeg-decoder`, which does, takes longer for it (`data::decoded`). The header is parsed first:
//! a picture that needs too much memory counts as broken, and pictures are decoded in parallel only
//! while they fit into memory together.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use data::images::StoredPicture;
use data::picture::Encoding;

use crate::Config;
use crate::foreign::{self, Foreign};
use crate::guard::guarded;

/// Approximate memory limit unless the command line sets another: 512 MiB.
pub const MEMORY: u64 = 1 << 29;

/// A memory limit shared by the threads that decode pictures.
#[derive(Debug)]
pub struct Budget {
    memory: u64,
    free: Mutex<u64>,
    freed: Condvar,
}

impl Budget {
    /// Divides `memory`: five eighths for decoding, one for pictures waiting to be decoded, one for
    /// the file being read, and one for everything else.
    pub fn of(memory: u64) -> Self {
        Self { memory, free: Mutex::new(memory / 8 * 5), freed: Condvar::new() }
    }

    /// The size limit for the file of one picture, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.memory / 8
    }

    /// The limit for files waiting to be decoded, in bytes.
    pub fn waiting_bytes(&self) -> u64 {
        self.memory / 8
    }

    fn decoding_bytes(&self) -> u64 {
        self.memory / 8 * 5
    }

    /// Waits until `bytes` are free and reserves them. `bytes` is at most
    /// [`Budget::decoding_bytes`].
    fn take(&self, bytes: u64) -> Taken<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free = self
            .freed
            .wait_while(free, |free| *free < bytes)
            .unwrap_or_else(PoisonError::into_inner);
        *free -= bytes;
        Taken { budget: self, bytes }
    }
}

/// Memory reserved from a budget; freed on drop.
struct Taken<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        *self.budget.free.lock().unwrap_or_else(PoisonError::into_inner) += self.bytes;
        self.budget.freed.notify_all();
    }
}

/// How pictures are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredForm {
    /// 1 grey, 3 colour.
    pub channels: usize,
    /// Longest shorter side in pixels; `None` stores every file as it is.
    pub shorter_side: Option<usize>,
}

impl StoredForm {
    /// The form that the experiment asks for.
    pub fn of(config: &Config) -> Self {
        let shorter_side = Some(config.stored_shorter_side).filter(|&side| side > 0);
        Self { channels: config.channels, shorter_side }
    }

    /// Peak memory of reading a picture: to decode it, or then to reduce the decoded pixels.
    ///
    /// Reducing holds three bytes a pixel; three floats a pixel of all rows at their new width, which
    /// are as many as the longer side times the new shorter side; three floats a pixel of the result;
    /// its bytes; and the file that is made of them.
    fn bytes(self, header: &PictureHeader) -> u64 {
        let (height, width) = (u64::from(header.height), u64::from(header.width));
        let pixels = height * width;
        let decoding = pixels.saturating_mul(header.bytes_a_pixel);
        let (shorter, side) = (height.min(width), self.shorter_side.map(|side| side as u64));
        match side.filter(|&side| side < shorter) {
            None => decoding,
            Some(side) => {
                let mixed = 12 * height.max(width) * side;
                let [to_height, to_width] = [height, width].map(|long| long * side / shorter);
                let result = 18 * to_height * to_width;
                decoding.max(pixels.saturating_mul(3).saturating_add(mixed + result))
            }
        }
    }
}

/// How many bytes of a file are searched for the size of its picture, which may follow profiles and
/// thumbnails.
const HEADER_BYTES: u64 = 1 << 20;

/// Reads the picture in a file, and decodes it once as a check.
///
/// # Errors
///
/// A phrase that follows the picture's name.
pub fn read(path: &Path, form: StoredForm, budget: &Budget) -> Result<StoredPicture, String> {
    let failed = |error: io::Error| format!("cannot be read: {error}");
    // Checked before opening, because opening a pipe blocks until a program writes to it.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err("is not a regular file".into());
    }
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size > budget.file_bytes() {
        return Err(too_many_bytes(size, budget.file_bytes()));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(HEADER_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    let needed = size + decoding_bytes(&bytes, form, budget)?;
    let _taken = budget.take(needed.min(budget.decoding_bytes()));
    // If the file grows meanwhile, no more is read than was reserved.
    file.take(size.saturating_sub(HEADER_BYTES)).read_to_end(&mut bytes).map_err(failed)?;
    decode(bytes, form)
}

/// Decodes the picture in these bytes once as a check.
///
/// # Errors
///
/// A phrase that follows the picture's name.
pub fn check(bytes: Vec<u8>, form: StoredForm, budget: &Budget) -> Result<StoredPicture, String> {
    let _taken = budget.take(decoding_bytes(&bytes, form, budget)?);
    decode(bytes, form)
}

fn decode(bytes: Vec<u8>, form: StoredForm) -> Result<StoredPicture, String> {
    let shorter_side = form.shorter_side.unwrap_or(usize::MAX);
    match guarded(|| StoredPicture::file_within(bytes, form.channels, shorter_side)) {
        Ok(read) => read.map_err(|error| format!("is broken: {error:#}")),
        Err(panic) => Err(format!("is broken: decoding it failed: {panic}")),
    }
}

/// Returns the peak memory of decoding and reducing a file, by its header.
fn decoding_bytes(bytes: &[u8], form: StoredForm, budget: &Budget) -> Result<u64, String> {
    if bytes.is_empty() {
        return Err("is empty".into());
    }
    let header = match Encoding::of(bytes) {
        Some(Encoding::Jpeg) => jpeg_header(bytes),
        Some(Encoding::Png) => png_header(bytes),
        Some(Encoding::WebP) => webp_header(bytes),
        Some(Encoding::Raw) | None => {
            return Err(match foreign::recognise(&bytes[..bytes.len().min(foreign::START)], "") {
                Some(Foreign { what, remedy }) => format!("is {what}: {remedy}"),
                None => {
                    "is neither a JPEG nor a PNG nor a WebP file, and only these are supported; \
                         convert it"
                        .into()
                }
            });
        }
    };
    let header = header.ok_or("is broken: its header has no size, or is cut short")?;
    let (needed, PictureHeader { height, width, .. }) = (form.bytes(&header), header);
    match needed <= budget.decoding_bytes() {
        true => Ok(needed),
        false => Err(format!(
            "is {height}×{width} pixels, which take {} MiB to decode, more than the {} MiB allowed; \
             reduce it, or allow more with --memory",
            needed >> 20,
            budget.decoding_bytes() >> 20
        )),
    }
}

/// The size of a picture, by the header of its file.
#[derive(Debug, PartialEq, Eq)]
struct PictureHeader {
    height: u32,
    width: u32,
    /// Peak memory of decoding: pixels as stored, converted to 8 bits, and rotated.
    bytes_a_pixel: u64,
}

/// Parses the largest frame header before the first scan.
fn jpeg_header(file: &[u8]) -> Option<PictureHeader> {
    let mut found: Option<PictureHeader> = None;
    let mut position = 2;
    loop {
        while file.get(position) == Some(&0xff) && file.get(position + 1) == Some(&0xff) {
            position += 1;
        }
        let marker = match file.get(position..position + 2) {
            Some([0xff, marker]) => *marker,
            _ => return found,
        };
        let segment = file.get(position + 2..)?;
        match marker {
            // A start of frame. Three markers in the same range are tables.
            0xc0..=0xcf if ![0xc4, 0xc8, 0xcc].contains(&marker) => {
                let &[_, _, _, a, b, c, d, components] = segment.first_chunk()?;
                let (height, width) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                // The decoder holds all coefficients of a progressive file until its end.
                let kept = if marker == 0xc0 || marker == 0xc1 { 0 } else { 2 };
                let bytes_a_pixel = 7 + kept * u64::from(components.max(1));
                let header =
                    PictureHeader { height: height.into(), width: width.into(), bytes_a_pixel };
                let pixels = |h: &PictureHeader| u64::from(h.height) * u64::from(h.width);
                if found.as_ref().is_none_or(|found| pixels(found) < pixels(&header)) {
                    found = Some(header);
                }
            }
            0xda | 0xd9 => return found,
            0x01 | 0xd0..=0xd8 => {
                position += 2;
                continue;
            }
            _ => {}
        }
        let &[high, low] = segment.first_chunk()?;
        position += 2 + usize::from(u16::from_be_bytes([high, low]));
    }
}

fn png_header(file: &[u8]) -> Option<PictureHeader> {
    let header = file.get(16..26)?;
    let word = |at: usize| {
        u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let samples = match header[9] {
        0 => 1,
        2 => 3,
        // The colours of a palette may be transparent.
        3 | 6 => 4,
        _ => 2,
    };
    let bytes_a_pixel = samples * if header[8] == 16 { 2 } else { 1 } + 6;
    Some(PictureHeader { height: word(4), width: word(0), bytes_a_pixel })
}

fn webp_header(file: &[u8]) -> Option<PictureHeader> {
    let chunk = file.get(12..30)?;
    let low = |bytes: &[u8]| u32::from(bytes[0]) | u32::from(bytes[1]) << 8;
    let (height, width) = match &chunk[..4] {
        b"VP8 " => (low(&chunk[16..]) & 0x3fff, low(&chunk[14..]) & 0x3fff),
        b"VP8L" => {
            let bits = low(&chunk[9..]) | low(&chunk[11..]) << 16;
            ((bits >> 14 & 0x3fff) + 1, (bits & 0x3fff) + 1)
        }
        b"VP8X" => {
            let extent = |at: usize| (low(&chunk[at..]) | u32::from(chunk[at + 2]) << 16) + 1;
            (extent(15), extent(12))
        }
        _ => return None,
    };
    Some(PictureHeader { height, width, bytes_a_pixel: 16 })
}

/// The reason for skipping a file of this size.
pub fn too_many_bytes(bytes: u64, limit: u64) -> String {
    format!("has {bytes} bytes, more than the limit of {limit}")
}

/// Whether a file should be a picture: by its extension, or else by its first bytes. A broken file
/// named `.jpg` is a broken picture; a text file beside the pictures is not.
pub fn is_meant(path: &Path) -> bool {
    has_extension(&path.to_string_lossy()) || {
        let mut start = Vec::new();
        let read = File::open(path)
            .and_then(|file| file.take(foreign::START as u64).read_to_end(&mut start));
        read.is_ok() && is_start(&start)
    }
}

/// Whether a file begins like a picture, even one of an unsupported format.
pub fn is_start(start: &[u8]) -> bool {
    let is_foreign = || foreign::recognise(start, "").is_some_and(|foreign| foreign.is_picture());
    Encoding::of(start).is_some() || is_foreign()
}

/// Whether a name has the extension of a picture or raw photograph, even of an unsupported format.
pub fn has_extension(name: &str) -> bool {
    #[rustfmt::skip]
    const EXTENSIONS: &[&str] = &[
        "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp",
        "gif", "bmp", "dib", "tif", "tiff", "tga", "ppm", "pgm", "pbm", "pnm", "pam", "qoi", "exr",
        "avif", "heic", "heif", "hif", "heics", "jxl", "jp2", "j2k", "j2c", "jpf", "jpx", "psd",
        "dng", "cr2", "cr3", "crw", "nef", "nrw", "arw", "sr2", "srf", "orf", "rw2", "raf", "pef",
        "srw", "3fr", "iiq", "erf", "x3f",
    ];
    Path::new(name)
        .extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str()))
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, ImageFormat};

    use super::*;
    use crate::Config;
    use crate::example::{
        assert_has, config, encoded, jpeg, pixels, prepare, put, refusal, scratch,
    };

    fn picture(height: u32, width: u32) -> DynamicImage {
        let raw = pixels(height as usize, width as usize, 3, 1);
        image::RgbImage::from_raw(width, height, raw).expect("fits").into()
    }

    #[test]
    fn sizes_are_read_from_headers() {
        for (height, width) in [(1, 1), (3, 7), (40, 300), (257, 16)] {
            let picture = picture(height, width);
            let file = |format| encoded(&picture, format);
            let size =
                |header: Option<PictureHeader>| header.map(|header| (header.height, header.width));
            let expected = Some((height, width));
            assert_eq!(size(jpeg_header(&file(ImageFormat::Jpeg))), expected);
            assert_eq!(size(png_header(&file(ImageFormat::Png))), expected);
            assert_eq!(size(webp_header(&file(ImageFormat::WebP))), expected);
        }
        let file = encoded(&picture(3, 7), ImageFormat::Jpeg);
        for length in 0..file.len().min(600) {
            jpeg_header(&file[..length]);
            png_header(&file[..length]);
            webp_header(&file[..length]);
        }
        // Fill bytes before a marker, and the larger of two frames.
        let frame = [0xff, 0xc0, 0, 8, 8, 0, 9, 0, 2, 3];
        let larger = [0xff, 0xff, 0xff, 0xc2, 0, 8, 8, 1, 0, 0, 2, 3];
        let file = [&[0xff, 0xd8][..], &frame, &larger, &frame].concat();
        let header = PictureHeader { height: 256, width: 2, bytes_a_pixel: 13 };
        assert_eq!(jpeg_header(&file), Some(header));
    }

    #[test]
    fn the_memory_of_reducing_counts_where_it_is_more_than_that_of_decoding() {
        let bytes = |height, width, side| {
            let header = PictureHeader { height, width, bytes_a_pixel: 7 };
            StoredForm { channels: 3, shorter_side: side }.bytes(&header)
        };
        assert_eq!(bytes(3000, 4000, None), 84_000_000);
        assert_eq!(bytes(3000, 4000, Some(3000)), 84_000_000);
        assert_eq!(bytes(3000, 4000, Some(512)), 84_000_000, "decoding takes more");
        // 3 · 1000 · 800 + 12 · 1000 · 700 + 18 · 875 · 700.
        assert_eq!(bytes(1000, 800, Some(700)), 2_400_000 + 8_400_000 + 11_025_000);
        assert_eq!(bytes(1000, 800, Some(700)), bytes(800, 1000, Some(700)));
    }

    #[test]
    fn large_pictures_are_stored_smaller_and_everything_else_stays() {
        let (_folder, path) = scratch();
        for seed in 0..4 {
            let picture = picture(20 + 10 * seed, 60);
            put(&path.join(format!("{seed}.jpg")), &encoded(&picture, ImageFormat::Jpeg));
        }
        put(&path.join("large-again.jpg"), &std::fs::read(path.join("3.jpg")).expect("there"));
        let whole = prepare(&path, &config()).expect("sound");
        let bounded = Config { stored_shorter_side: 30, ..config() };
        let small = prepare(&path, &bounded).expect("sound");
        assert_eq!(small.images.fingerprint(), whole.images.fingerprint());
        assert_eq!(small.names, whole.names);
        assert_eq!(small.skipped("identical"), whole.skipped("identical"));
        assert_eq!(small.skipped("identical").len(), 1);
        for (name, size) in [("0.jpg", (20, 60)), ("1.jpg", (30, 60)), ("3.jpg", (30, 36))] {
            let row = small.row(name);
            assert_eq!(small.images.size(row).expect("there"), size, "{name}");
            assert_eq!(small.images.is_reduced(row).expect("there"), name == "3.jpg");
            let picture = small.picture(name);
            assert_eq!((picture.height, picture.width), size);
        }
        assert_eq!(small.picture("0.jpg"), whole.picture("0.jpg"));
        assert_eq!(small.picture("3.jpg"), small.picture("large-again.jpg"));
        assert!(small.bytes.len() < whole.bytes.len());
    }

    #[test]
    fn pictures_of_unsupported_formats_are_counted_and_named() {
        let (_folder, path) = scratch();
        for seed in 0..4 {
            put(&path.join(format!("{seed}.jpg")), &jpeg(seed));
        }
        let tga = [0; 40].to_vec();
        let files: [(&str, Vec<u8>, &str); 8] = [
            ("a.heif", b"\0\0\0\x18ftypmif1\0\0".to_vec(), "is a HEIC picture"),
            ("b.jxl", b"\xff\x0a\xfa".to_vec(), "is a JPEG XL picture"),
            ("c.jp2", b"\0\0\0\x0cjP  \r\n\x87\n\0".to_vec(), "is a JPEG 2000 picture"),
            ("d.DNG", b"II*\0\x08\0\0\0".to_vec(), "a raw photograph"),
            ("e.CR2", b"II*\0\x10\0\0\0CR\x02\0".to_vec(), "is a raw photograph"),
            ("f.ppm", b"P6 1 1 255 abc".to_vec(), "is a PPM, PGM or PBM picture"),
            ("g.tga", tga, "is neither a JPEG nor a PNG nor a WebP file"),
            ("h", b"MM\0*\0\0\0\x08".to_vec(), "is a TIFF picture"),
        ];
        for (name, bytes, _) in &files {
            put(&path.join(name), bytes);
        }
        put(&path.join("notes.txt"), b"no picture");
        let read = prepare(&path, &Config { broken_share: 0.9, ..config() }).expect("sound");
        let broken = read.skipped("broken");
        assert_eq!(broken.len(), files.len());
        for ((name, reason), (file, _, part)) in broken.iter().zip(&files) {
            assert_eq!(name, file);
            assert_has(reason, &[part, "convert it"]);
        }
        assert_eq!(read.skipped("ignored").len(), 1);
        assert_has(&refusal(&path, &config()), &["8 of 12", "convert it"]);
    }

    #[test]
    fn pictures_decoded_in_parallel_fit_into_memory() {
        let budget = Budget::of(8 << 20);
        let most = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let _taken = budget.take(3 << 20);
                        let free = *budget.free.lock().expect("sound");
                        most.fetch_max((5 << 20) - free, std::sync::atomic::Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), 3 << 20, "two do not fit");
        assert_eq!(*budget.free.lock().expect("sound"), 5 << 20);
    }
}
