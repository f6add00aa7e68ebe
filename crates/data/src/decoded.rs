//! `images-decoded.safetensors`: the decoded pictures, so that no epoch and no stage decodes them
//! again.
//!
//! It is a cache beside `images.safetensors` and may be removed at any time. Kind `images-decoded`,
//! format version 1; header field `fingerprint` of the pictures; one tensor `bytes`, u8: for each
//! row the pixels `(height, width, channels)` and their CRC-32 as u32, little-endian. Pictures that
//! are stored as raw pixels take no space: they are read from `images.safetensors`.
//!
//! It holds all pixels of a picture, 8 bits each, as [`crate::picture::decode`] returns them, so
//! results are bit-identical with and without the file. When decoding changes, the format version
//! is raised, and older files are replaced.
//!
//! Decoding to half the size, as JPEG allows, would not be faster: `jpeg-decoder` takes twice as
//! long for that as `zune-jpeg` for the whole picture (1.0 ms and 0.5 ms at 500 × 375 pixels), and
//! only crops of at least twice the view's side could use it.
//!
//! **When it is written.** Before the first batch of a [`crate::Loader`], if the decoded pictures
//! do not fit into the cache in memory, and there is room: twice as much available memory, so that
//! the mapped file stays cached, and four times as much disk space. The environment variable
//! `ASSORT_DECODED_COPY=never` disables it, `always` forces it. Without the file, every epoch
//! decodes. One process writes it at a time. An interrupt aborts that, and leftovers of a killed
//! process are removed.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use stage::container::{self, Contents, Header, Streamed};
use stage::{Claim, Interrupt, Interrupted, files};

use crate::Images;
use crate::images::{folder_of, open_map};
use crate::picture::{Encoding, Picture};

const KIND: &str = "images-decoded";
const VERSION: u64 = 1;
const BYTES: &str = "bytes";

/// The environment variable that overrides the rule.
pub const VARIABLE: &str = "ASSORT_DECODED_COPY";

/// Bytes of the checksum after each picture.
const CHECKSUM: u64 = 4;

/// A mapped file of decoded pictures.
#[derive(Debug)]
pub(crate) struct Decoded {
    path: PathBuf,
    map: Mmap,
    /// The bytes of the tensor within the file.
    bytes: Range<usize>,
    /// The offset of each picture in the tensor, and of its end.
    offsets: Vec<u64>,
    /// Whether the checksum of each picture was verified.
    checked: Vec<AtomicBool>,
}

/// Whether the decoded copy is made and used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Uses one that exists, and makes one that fits.
    IfItFits,
    /// Makes it even if it does not fit.
    Always,
    /// Decodes in every epoch.
    Never,
}

impl Wish {
    /// Reads the wish from the environment.
    ///
    /// # Errors
    ///
    /// The variable has an unknown value.
    pub(crate) fn of_environment() -> Result<Self> {
        wish(std::env::var(VARIABLE).ok().as_deref())
    }
}

/// The path of the copy of `images`.
pub fn path_beside(images: &Path) -> PathBuf {
    let stem = images.file_stem().unwrap_or_default().to_string_lossy();
    images.with_file_name(format!("{stem}-decoded.safetensors"))
}

/// Opens the copy of these pictures, or makes it if wanted and possible.
///
/// Logs a failure and returns no copy; the pictures are then decoded each time.
///
/// # Errors
///
/// The user interrupts.
pub(crate) fn open_or_make(
    images: &Images,
    wish: Wish,
    threads: usize,
    interrupt: &Interrupt,
) -> Result<Option<Decoded>> {
    if wish == Wish::Never {
        return Ok(None);
    }
    let path = path_beside(&images.data_set().path);
    if let Ok(found) = Decoded::open(images, &path) {
        return Ok(Some(found));
    }
    let length = offsets(images).pop().unwrap_or_default();
    if length == 0 || wish == Wish::IfItFits && !fits(images, &path, length) {
        return Ok(None);
    }
    match make_alone(images, &path, threads, interrupt) {
        Ok(made) => Ok(Some(made)),
        Err(error) if error.is::<Interrupted>() => Err(error),
        Err(error) => {
            tracing::warn!("no decoded copy, so every epoch decodes again: {error:#}");
            Ok(None)
        }
    }
}

/// Makes the copy under a lock, unless another process has made it meanwhile.
fn make_alone(
    images: &Images,
    path: &Path,
    threads: usize,
    interrupt: &Interrupt,
) -> Result<Decoded> {
    let _claim = Claim::wait(path, interrupt)?;
    if let Ok(found) = Decoded::open(images, path) {
        return Ok(found);
    }
    // A killed process leaves its temporary file.
    files::remove_unfinished(folder_of(path))?;
    tracing::info!("decoding {} pictures once, to `{}`", images.len(), path.display());
    make(images, path, threads, interrupt)?;
    Decoded::open(images, path)
}

fn wish(word: Option<&str>) -> Result<Wish> {
    Ok(match word {
        None | Some("" | "auto") => Wish::IfItFits,
        Some("always") => Wish::Always,
        Some("never") => Wish::Never,
        Some(word) => bail!("{VARIABLE}={word}: may be auto, always or never"),
    })
}

/// Whether the copy would save work and fits, and its folder is writable.
fn fits(images: &Images, path: &Path, length: u64) -> bool {
    let folder = folder_of(path);
    if rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_err() {
        return false;
    }
    let disk = rustix::fs::statvfs(folder);
    let disk = disk.map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    length > images.room() as u64 && spare_memory() / 2 >= length && disk / 4 >= length
}

/// Available memory in bytes; 0 if the system does not report it.
fn spare_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kilobytes.and_then(|k| k.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The offset of each picture in the tensor, and of its end.
fn offsets(images: &Images) -> Vec<u64> {
    let channels = images.channels() as u64;
    let mut end = 0;
    let ends = images.encodings().map(|(encoding, [height, width])| {
        if encoding != Encoding::Raw {
            end += u64::from(height) * u64::from(width) * channels + CHECKSUM;
        }
        end
    });
    std::iter::once(0).chain(ends).collect()
}

/// Decodes all pictures on this many threads and writes them.
fn make(images: &Images, path: &Path, threads: usize, interrupt: &Interrupt) -> Result<()> {
    let length = offsets(images).pop().unwrap_or_default();
    let encoded = (0u32..).zip(images.encodings()).filter(|(_, (e, _))| *e != Encoding::Raw);
    let rows: Vec<u32> = encoded.map(|(row, _)| row).collect();
    let mut fill = |out: &mut dyn Write| {
        // A few pictures for each thread at a time, so that memory does not grow with their number.
        for some in rows.chunks(16 * threads.max(1)) {
            interrupt.check()?;
            for picture in decode_all(images, some, threads)? {
                out.write_all(&picture.pixels)?;
                out.write_all(&crc32fast::hash(&picture.pixels).to_le_bytes())?;
            }
        }
        Ok(())
    };
    let streamed = Streamed { name: BYTES, length, fill: &mut fill };
    let header = Header::from([("fingerprint".into(), images.fingerprint().into())]);
    container::write_streamed(path, KIND, VERSION, header, &[], Some(streamed))
}

fn decode_all(images: &Images, rows: &[u32], threads: usize) -> Result<Vec<Picture>> {
    let decode =
        |rows: &[u32]| rows.iter().map(|&row| images.decoded(row)).collect::<Result<Vec<_>>>();
    let parts: Vec<_> = thread::scope(|scope| {
        let share = rows.len().div_ceil(threads.max(1));
        let running: Vec<_> =
            rows.chunks(share).map(|rows| scope.spawn(move || decode(rows))).collect();
        running.into_iter().map(thread::ScopedJoinHandle::join).collect()
    });
    let mut pictures = Vec::new();
    for part in parts {
        let Ok(part) = part else { bail!("a thread that decoded pictures panicked") };
        pictures.extend(part?);
    }
    Ok(pictures)
}

impl Decoded {
    /// # Errors
    ///
    /// The file is missing, damaged, or is for other pictures.
    fn open(images: &Images, path: &Path) -> Result<Self> {
        let map = open_map(path)?;
        let contents = Contents::parse(path, &map, KIND, VERSION)?;
        contents.verify_around(path, &map, Some(BYTES))?;
        let stated = contents.header.get("fingerprint").and_then(serde_json::Value::as_str);
        ensure!(stated == Some(images.fingerprint()), "`{}` is for other pictures", path.display());
        let offsets = offsets(images);
        let place = contents.tensors.get(BYTES).context("no tensor `bytes`")?;
        let bytes = place.bytes.clone();
        ensure!(Some(&(bytes.len() as u64)) == offsets.last(), "`{}` is too short", path.display());
        let checked = (0..images.len()).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { path: path.to_owned(), map, bytes, offsets, checked })
    }

    /// The pixels of a picture, verified at first read; `None` if it is stored as raw pixels.
    ///
    /// # Errors
    ///
    /// They are damaged.
    pub(crate) fn pixels(&self, position: usize) -> Result<Option<&[u8]>> {
        let at = |offset: u64| self.bytes.start + offset as usize;
        let row = &self.map[at(self.offsets[position])..at(self.offsets[position + 1])];
        let Some((pixels, checksum)) = row.split_last_chunk::<{ CHECKSUM as usize }>() else {
            return Ok(None);
        };
        if !self.checked[position].load(Ordering::Relaxed) {
            ensure!(
                crc32fast::hash(pixels) == u32::from_le_bytes(*checksum),
                "picture {position} of `{}` is damaged; remove that file, and it is written again",
                self.path.display()
            );
            self.checked[position].store(true, Ordering::Relaxed);
        }
        Ok(Some(pixels))
    }
}

#[cfg(test)]
mod tests {
    use stage::{DataTable, Job, Split};

    use super::*;
    use crate::images::{DecodeBuffer, StoredPicture, write};
    use crate::picture::tests::{example, jpeg, png};

    /// Twelve pictures in a file: JPEG, PNG and raw ones.
    fn images(folder: &Path, first: usize) -> Images {
        let path = folder.join("images.safetensors");
        let source = |i: usize| {
            let picture = example(9 + i % 5, 8 + i, 3);
            let source = match i % 3 {
                0 => StoredPicture::file(jpeg(&picture), 3),
                1 => StoredPicture::file(png(&picture), 3),
                _ => StoredPicture::raw(picture, 3),
            };
            (source.expect("sound"), Split::Train)
        };
        write(&path, 3, (first..first + 12).map(source).collect()).expect("written");
        Images::open(&path).expect("sound")
    }

    #[test]
    fn decoded_pixels_are_correct_with_any_number_of_threads() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path(), 0);
        let path = path_beside(&images.data_set().path);
        assert_eq!(
            path.file_name().and_then(|name| name.to_str()),
            Some("images-decoded.safetensors")
        );
        let mut files = Vec::new();
        for threads in [0, 1, 3] {
            make(&images, &path, threads, &Interrupt::default()).expect("made");
            files.push(std::fs::read(&path).expect("there"));
        }
        assert!(files[0] == files[1] && files[1] == files[2]);
        let copy = Decoded::open(&images, &path).expect("sound");
        for row in 0..12u32 {
            let found = copy.pixels(row as usize).expect("sound");
            let encoding = images.encodings().nth(row as usize).map(|(encoding, _)| encoding);
            assert_eq!(found.is_none(), encoding == Some(Encoding::Raw));
            if let Some(pixels) = found {
                assert_eq!(pixels, images.picture(row).expect("sound").pixels);
            }
        }
    }

    #[test]
    fn views_are_the_same_with_and_without_the_copy() {
        let folder = tempfile::tempdir().expect("a folder");
        let without = images(folder.path(), 0);
        let path = path_beside(&without.data_set().path);
        make(&without, &path, 2, &Interrupt::default()).expect("made");
        let with = Images::open(&without.data_set().path).expect("sound");
        with.use_decoded_copy(Wish::IfItFits, 2).expect("opened");
        let (mut a, mut b) = (DecodeBuffer::default(), DecodeBuffer::default());
        for row in 0..12 {
            let mapped = with.pixels(row, &mut a).expect("sound");
            assert_eq!(mapped, without.pixels(row, &mut b).expect("sound"));
        }
        assert!(a.is_empty() && !b.is_empty(), "only one of them had to decode");
    }

    #[test]
    fn copies_that_are_damaged_or_for_other_pictures_are_not_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = images(folder.path(), 0);
        let path = path_beside(&first.data_set().path);
        make(&first, &path, 1, &Interrupt::default()).expect("made");
        let other = tempfile::tempdir().expect("a folder");
        let others = images(other.path(), 1);
        let error = Decoded::open(&others, &path).expect_err("others").to_string();
        assert!(error.contains("other pictures"), "{error}");
        let whole = std::fs::read(&path).expect("there");
        for position in (0..whole.len()).step_by(7) {
            let mut flipped = whole.clone();
            flipped[position] ^= 1;
            std::fs::remove_file(&path).expect("removed");
            std::fs::write(&path, &flipped).expect("written");
            let read = Decoded::open(&first, &path)
                .and_then(|copy| (0..12).try_for_each(|row| copy.pixels(row).map(|_| ())));
            let error = format!("{:#}", read.expect_err("a flipped byte"));
            assert!(error.contains("images-decoded.safetensors"), "byte {position}: {error}");
        }
        assert!(Decoded::open(&first, &folder.path().join("none")).is_err());
    }

    #[test]
    fn an_interrupt_ends_the_decoding_and_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path(), 0);
        let path = path_beside(&images.data_set().path);
        let data = DataTable { clusters: 2, train_on: vec![Split::Train], score_on: vec![] };
        let job = Job::new("example", &images.data_set().path, folder.path(), data);
        job.interrupt.raise();
        let stopping = Images::of_job(&job).expect("sound");
        let error = stopping.use_decoded_copy(Wish::Always, 2).expect_err("asked to stop");
        assert!(error.is::<Interrupted>(), "{error:#}");
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1, "the images alone");
        // Leftovers of a killed process are removed, and two that need the copy make it once.
        std::fs::write(folder.path().join(".unfinished-killed"), b"x").expect("written");
        let reader = || Images::open(&images.data_set().path).expect("sound");
        thread::scope(|scope| {
            for images in [reader(), reader()] {
                scope.spawn(move || images.use_decoded_copy(Wish::Always, 1).expect("made"));
            }
        });
        assert!(path.exists());
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 2);
    }

    #[test]
    fn small_collections_are_kept_in_memory_instead() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path(), 0);
        let path = path_beside(&images.data_set().path);
        assert!(!fits(&images, &path, 1000));
        images.keep_decoded(0);
        assert!(!fits(&images, &path, u64::MAX / 8));
        if cfg!(target_os = "linux") {
            assert!(fits(&images, &path, 1000));
        }
        for (word, want) in
            [(None, Wish::IfItFits), (Some("always"), Wish::Always), (Some("never"), Wish::Never)]
        {
            assert_eq!(wish(word).expect("a word"), want);
        }
        let error = wish(Some("yes")).expect_err("no such word").to_string();
        assert!(error.contains("ASSORT_DECODED_COPY=yes") && error.contains("never"), "{error}");
    }
}
