//! Which files are meant as pictures, and why one of them is broken.
//!
//! What a file is, is told by its first bytes: ILSVRC-2012 itself has a PNG named `.JPEG`. What
//! passes here, every stage can decode, because it was decoded here.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use data::images::Source;
use data::picture::Encoding;
use image::ImageFormat;

/// The largest file that is read as one picture: 128 MiB.
pub const BYTES_AT_MOST: u64 = 1 << 27;

/// The bytes of a file.
///
/// # Errors
///
/// Why not: a phrase that follows the picture's name.
pub fn read(path: &Path) -> Result<Vec<u8>, String> {
    let failed = |error: io::Error| format!("cannot be read: {error}");
    match fs::metadata(path).map_err(failed)?.len() {
        size if size > BYTES_AT_MOST => Err(too_many_bytes(size, BYTES_AT_MOST)),
        _ => fs::read(path).map_err(failed),
    }
}

/// The picture in these bytes, decoded once to make sure that it can be.
///
/// # Errors
///
/// Why not: a phrase that follows the picture's name.
pub fn check(bytes: Vec<u8>, channels: usize) -> Result<Source, String> {
    if bytes.is_empty() {
        return Err("is empty".into());
    }
    if Encoding::of(&bytes).is_none() {
        return Err(match image::guess_format(&bytes) {
            Ok(format) => {
                format!("is {}: only JPEG and PNG are read, convert it", name(format))
            }
            Err(_) => "is neither a JPEG nor a PNG file".into(),
        });
    }
    Source::file(bytes, channels).map_err(|error| format!("is broken: {error:#}"))
}

fn name(format: ImageFormat) -> String {
    format!("{format:?}").to_uppercase()
}

/// Why a file of this size is not read.
pub fn too_many_bytes(bytes: u64, limit: u64) -> String {
    format!("has {bytes} bytes, more than the {limit} that are read")
}

/// Whether a file is meant as a picture: by its extension, or failing that by its first bytes. A
/// broken file named `.jpg` counts as a broken picture; a text beside the pictures does not.
pub fn is_meant(path: &Path) -> bool {
    has_extension(path) || {
        let mut start = [0; 8];
        File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok()
            && Encoding::of(&start).is_some()
    }
}

/// Whether the name ends like a picture's, of whatever format.
pub fn has_extension(path: &Path) -> bool {
    const EXTENSIONS: [&str; 12] =
        ["jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "webp", "tif", "tiff", "avif", "heic"];
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str()))
}
