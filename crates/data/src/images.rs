//! `images.safetensors`: the pictures, ordered by content.
//!
//! Kind `images`, format version 1. It has no names and no labels, so that neither can reach training.
//! Nor can the order of folders or classes, because rows ascend by the digest of the bytes.
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `id` | `(N, 32)` u8 | SHA-256 of each picture's own file or pixels, ascending; equal ones by split |
//! | `split` | `(N,)` u8 | 0 train, 1 test, 2 unlabelled |
//! | `encoding` | `(N,)` u8 | 0 raw pixels `(height, width, channels)`, 1 JPEG, 2 PNG, 3 WebP file |
//! | `size` | `(N, 2)` u32 | height and width of the picture |
//! | `offset` | `(N + 1,)` u64 | picture `n` is `bytes[offset[n]..offset[n + 1]]` |
//! | `bytes` | `(B,)` u8 | the stored bytes: unchanged files, or raw pixels |
//!
//! Header: `images`, N; `channels`, 1 if pictures are decoded to grey, 3 for colour; `fingerprint`, the
//! hex SHA-256 over `channels` as u32 and then, by row, id, split as u8, height and width as u32, all
//! little-endian.
//!
//! A picture may be stored smaller than it is ([`StoredPicture::file_within`]). It keeps the id and the
//! size of its own file, so that the data set is the same one. Then there are also
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `stored-id` | `(N, 32)` u8 | SHA-256 of the stored bytes of each picture |
//! | `stored-size` | `(N, 2)` u32 | height and width of the stored picture |
//!
//! More than [`PART_BYTES`] of pictures are stored in several files beside this one. This file then has
//! no `bytes`, but
//!
//! | tensor | shape, type | |
//! |---|---|---|
//! | `part` | `(S + 1,)` u64 | the offset of each part among all bytes, and of their end |
//!
//! Part `s`, counted from 1, is `images-<s>-of-<S>.safetensors` with both numbers in five digits:
//! kind `images-part`, format version 1, header field `fingerprint`, and a tensor `bytes` of the length
//! that `part` implies. No picture is split across two parts.
//!
//! The digest in the header covers all tensors but `bytes`, which the ids, or stored ids, cover. Opening checks
//! everything but the pictures, in time that does not depend on their size. Each picture is checked
//! once, when a program first reads it, in about a tenth of the time of decoding a JPEG file.

mod stored;
mod writer;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use stage::container::Contents;
use stage::digest::hex;
use stage::{Interrupt, Job, Split, files};

use crate::data_set::DataSet;
use crate::decoded::{Decoded, Wish, open_or_make};
use crate::picture::{Encoding, Picture, Pixels, decode_into};

pub use stored::{PictureRow, StoredPicture};
pub use writer::{SortedWriter, write};

const KIND: &str = "images";
const PART_KIND: &str = "images-part";
const VERSION: u64 = 1;

/// The most bytes of pictures in one file, roughly: 4 GiB. More are split into several files.
pub const PART_BYTES: u64 = 1 << 32;

/// The tensor of all pictures, which may be larger than memory.
const BYTES: &str = "bytes";

/// The tensor that replaces it if there are parts.
const PART: &str = "part";

/// The tensors of a file whose pictures are not all stored as they are.
const STORED: [&str; 2] = ["stored-id", "stored-size"];

/// The limit of decoded pictures in memory unless [`Images::keep_decoded`] sets another: 1 GiB, enough
/// for 38,000 pictures of 96×96 in colour.
pub const DECODED_BYTES: usize = 1 << 30;

/// SHA-256 of a picture's own file, or of its pixels.
pub type Id = [u8; 32];

/// The pictures of a data set, read from a memory-mapped file. Clones share everything.
#[derive(Debug, Clone)]
pub struct Images {
    shared: Arc<Shared>,
    interrupt: Interrupt,
}

#[derive(Debug)]
struct Shared {
    data_set: DataSet,
    channels: usize,
    /// The pictures' bytes: one part within the file itself, or several beside it.
    parts: Vec<MappedPart>,
    ids: Vec<Id>,
    /// The digests of the stored bytes, if those are not all the ids.
    stored_ids: Option<Vec<Id>>,
    splits: Vec<Split>,
    encodings: Vec<Encoding>,
    /// Height and width as stored.
    sizes: Vec<[u32; 2]>,
    offsets: Vec<u64>,
    /// Whether the digest of each row was verified.
    checked: Vec<AtomicBool>,
    /// Decoded pictures in memory.
    decoded: Vec<OnceLock<Arc<Picture>>>,
    room: AtomicUsize,
    /// The decoded copy on disk, once it is decided whether there is one.
    copy: OnceLock<Option<Decoded>>,
}

/// A mapped file with pictures.
#[derive(Debug)]
struct MappedPart {
    map: Mmap,
    /// The range of the tensor `bytes` in the file.
    bytes: Range<usize>,
    /// The offset of these bytes among those of all parts.
    first: u64,
}

impl Images {
    /// Maps the file and checks everything but the bytes of pictures, which [`Images::picture`] checks.
    ///
    /// # Errors
    ///
    /// The file, or one of its parts, is missing, foreign, of another version, cut short or
    /// damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let map = open_map(path)?;
        let contents = Contents::parse(path, &map, KIND, VERSION)?;
        contents.verify_around(path, &map, Some(BYTES))?;
        let shared = Shared::read(path, map, &contents).with_context(|| {
            format!("`{}` contradicts itself; prepare the images again", path.display())
        })?;
        Ok(Self { shared: Arc::new(shared), interrupt: Interrupt::default() })
    }

    /// [`Images::open`] for the pictures of a job, whose interrupt ends the making of the
    /// [decoded copy](crate::decoded).
    ///
    /// # Errors
    ///
    /// As [`Images::open`].
    pub fn of_job(job: &Job) -> Result<Self> {
        Ok(Self { interrupt: job.interrupt.clone(), ..Self::open(&job.images)? })
    }

    /// Number of pictures, N.
    pub fn len(&self) -> usize {
        self.shared.data_set.images
    }

    /// Whether there are no pictures.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// 1 if pictures are decoded to grey, 3 for colour.
    pub fn channels(&self) -> usize {
        self.shared.channels
    }

    /// The identity of these pictures, to compare with that of other files.
    pub fn data_set(&self) -> &DataSet {
        &self.shared.data_set
    }

    /// Hex SHA-256 over the ids, splits and sizes of all pictures.
    pub fn fingerprint(&self) -> &str {
        &self.shared.data_set.fingerprint
    }

    /// The rows of the pictures in these splits, ascending.
    pub fn rows(&self, splits: &[Split]) -> Vec<u32> {
        let rows = self.shared.splits.iter().zip(0u32..);
        rows.filter(|(split, _)| splits.contains(split)).map(|(_, row)| row).collect()
    }

    /// The SHA-256 of a picture's own file, or of its pixels.
    ///
    /// # Errors
    ///
    /// There is no such row.
    pub fn id(&self, row: u32) -> Result<Id> {
        Ok(self.shared.ids[self.position(row)?])
    }

    /// The SHA-256 of a picture's stored bytes: what a network sees of it depends on this.
    ///
    /// # Errors
    ///
    /// There is no such row.
    pub fn stored_id(&self, row: u32) -> Result<Id> {
        Ok(*self.shared.stored_id(self.position(row)?))
    }

    /// Whether a picture is stored smaller than it is.
    ///
    /// # Errors
    ///
    /// There is no such row.
    pub fn is_reduced(&self, row: u32) -> Result<bool> {
        Ok(self.stored_id(row)? != self.id(row)?)
    }

    /// The shorter side of the pictures that are stored smaller than they are; `None` if there are
    /// none.
    pub fn reduced_side(&self) -> Option<usize> {
        let stored = self.shared.stored_ids.as_ref()?;
        let pairs = stored.iter().zip(&self.shared.ids).zip(&self.shared.sizes);
        let reduced = pairs.filter(|((stored, id), _)| stored != id);
        reduced.map(|(_, [height, width])| (*height).min(*width) as usize).max()
    }

    /// Height and width of a picture as it is stored, without decoding it.
    ///
    /// # Errors
    ///
    /// There is no such row.
    pub fn size(&self, row: u32) -> Result<(usize, usize)> {
        let [height, width] = self.shared.sizes[self.position(row)?];
        Ok((height as usize, width as usize))
    }

    /// Decodes the picture of a row. It stays in memory while there is room, see
    /// [`Images::keep_decoded`], so that small data sets are decoded once and not in every epoch.
    ///
    /// # Errors
    ///
    /// There is no such row, or its bytes are damaged. The message names file and row.
    pub fn picture(&self, row: u32) -> Result<Arc<Picture>> {
        let position = self.position(row)?;
        if let Some(picture) = self.shared.decoded[position].get() {
            return Ok(picture.clone());
        }
        let decoded = self.decode(position, Vec::new());
        let picture = Arc::new(decoded.with_context(|| self.damaged(row))?);
        // Raw pixels are read from the mapped file just as fast.
        if self.shared.encodings[position] != Encoding::Raw {
            self.keep(position, &picture);
        }
        Ok(picture)
    }

    /// The stored file of a row and its encoding: the picture's own, unless it
    /// [is reduced](Images::is_reduced). `None` for a picture stored as raw pixels.
    ///
    /// # Errors
    ///
    /// There is no such row, or its bytes are damaged.
    pub fn file(&self, row: u32) -> Result<Option<(Encoding, &[u8])>> {
        let position = self.position(row)?;
        match self.shared.encodings[position] {
            Encoding::Raw => Ok(None),
            encoding => {
                let bytes = self.checked_bytes(position);
                Ok(Some((encoding, bytes.with_context(|| self.damaged(row))?)))
            }
        }
    }

    /// [`Images::picture`] without a copy or an allocation: raw pixels are borrowed from the mapped
    /// file, others from the decoded pictures in memory or on disk, or decoded into `memory`.
    pub(crate) fn pixels<'a>(
        &'a self,
        row: u32,
        memory: &'a mut DecodeBuffer,
    ) -> Result<Pixels<'a>> {
        let position = self.position(row)?;
        let shared = &*self.shared;
        if let Some(picture) = shared.decoded[position].get() {
            return Ok(Pixels::from(&**picture));
        }
        if shared.encodings[position] == Encoding::Raw {
            let [height, width] = shared.sizes[position].map(|extent| extent as usize);
            let channels = shared.channels;
            let checked = self.checked_bytes(position).and_then(|bytes| {
                let fits = bytes.len() == height * width * channels;
                ensure!(fits, "{} bytes for {height}×{width} pixels", bytes.len());
                Ok(bytes)
            });
            let bytes = checked.with_context(|| self.damaged(row))?;
            return Ok(Pixels { height, width, channels, bytes });
        }
        if let Some(Some(copy)) = shared.copy.get()
            && let Some(bytes) = copy.pixels(position)?
        {
            let [height, width] = shared.sizes[position].map(|extent| extent as usize);
            return Ok(Pixels { height, width, channels: shared.channels, bytes });
        }
        let pixels = memory.0.take().map_or_else(Vec::new, |picture| picture.pixels);
        let picture = self.decode(position, pixels).with_context(|| self.damaged(row))?;
        if picture.pixels.len() <= self.room() {
            self.keep(position, &Arc::new(picture.clone()));
        }
        Ok(Pixels::from(&*memory.0.insert(picture)))
    }

    fn damaged(&self, row: u32) -> String {
        let path = self.shared.data_set.path.display();
        format!("picture {row} of `{path}` is damaged; prepare the images again")
    }

    /// Reads decoded pictures from disk from now on, see [`crate::decoded`]. The first call decides
    /// whether; a [`crate::Loader`] makes it as the environment wishes. What is read is the same either
    /// way.
    ///
    /// # Errors
    ///
    /// The user interrupts while the pictures are decoded.
    pub fn use_decoded_copy(&self, wish: Wish, threads: usize) -> Result<()> {
        if self.shared.copy.get().is_none() {
            let copy = open_or_make(self, wish, threads, &self.interrupt)?;
            // Another thread may have opened it meanwhile.
            let _ = self.shared.copy.set(copy);
        }
        Ok(())
    }

    /// The encoding, height and width of each picture.
    pub(crate) fn encodings(&self) -> impl Iterator<Item = (Encoding, [u32; 2])> {
        self.shared.encodings.iter().copied().zip(self.shared.sizes.iter().copied())
    }

    /// The bytes of decoded pictures that still fit in memory.
    pub(crate) fn room(&self) -> usize {
        self.shared.room.load(Ordering::Relaxed)
    }

    /// Decodes the picture of a row without keeping it in memory.
    pub(crate) fn decoded(&self, row: u32) -> Result<Picture> {
        self.decode(self.position(row)?, Vec::new()).with_context(|| self.damaged(row))
    }

    /// Keeps at most `bytes` more of decoded pictures in memory.
    pub fn keep_decoded(&self, bytes: usize) {
        self.shared.room.store(bytes, Ordering::Relaxed);
    }

    fn position(&self, row: u32) -> Result<usize> {
        let position = row as usize;
        ensure!(
            position < self.len(),
            "row {row} was requested, but `{}` has {} pictures",
            self.shared.data_set.path.display(),
            self.len()
        );
        Ok(position)
    }

    /// The stored bytes, after checking that their digest is the id.
    fn checked_bytes(&self, position: usize) -> Result<&[u8]> {
        let shared = &*self.shared;
        let bytes = shared.stored(position);
        if !shared.checked[position].load(Ordering::Relaxed) {
            let id: Id = Sha256::digest(bytes).into();
            ensure!(
                id == *shared.stored_id(position),
                "its bytes are damaged: their SHA-256 differs from the recorded one"
            );
            shared.checked[position].store(true, Ordering::Relaxed);
        }
        Ok(bytes)
    }

    /// Decodes into `memory`, the buffer of an earlier picture.
    fn decode(&self, position: usize, memory: Vec<u8>) -> Result<Picture> {
        let (shared, bytes) = (&*self.shared, self.checked_bytes(position)?);
        let [height, width] = shared.sizes[position].map(|extent| extent as usize);
        let picture = match shared.encodings[position] {
            Encoding::Raw => Picture::new(height, width, shared.channels, bytes.to_vec())?,
            Encoding::Jpeg | Encoding::Png | Encoding::WebP => {
                decode_into(memory, bytes, shared.channels)?
            }
        };
        ensure!(
            (picture.height, picture.width) == (height, width),
            "it is {}×{} pixels, not {height}×{width}",
            picture.height,
            picture.width
        );
        Ok(picture)
    }

    fn keep(&self, position: usize, picture: &Arc<Picture>) {
        let bytes = picture.pixels.len();
        let take = |room: usize| room.checked_sub(bytes);
        let room = &self.shared.room;
        let taken = room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        // Another thread may have decoded the same picture meanwhile.
        if taken && self.shared.decoded[position].set(picture.clone()).is_err() {
            room.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// The buffer that [`Images::pixels`] decodes into.
#[derive(Debug, Default)]
pub(crate) struct DecodeBuffer(Option<Picture>);

#[cfg(test)]
impl DecodeBuffer {
    /// Whether nothing was decoded.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}

fn unknown(what: &str, code: u8) -> String {
    format!("unknown code {code} of {what}: damaged, or newer than this program")
}

pub(crate) fn open_map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).with_context(|| {
        let path = path.display();
        format!("opening the images `{path}`; prepare them first, or name others with --images")
    })?;
    files::map(&file).with_context(|| format!("mapping `{}`", path.display()))
}

/// The folder that a file is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The file of part `part`, counted from 0, beside the file `images`.
pub fn part_path(images: &Path, part: usize, parts: usize) -> PathBuf {
    let stem = images.file_stem().unwrap_or_default().to_string_lossy();
    images.with_file_name(format!("{stem}-{:05}-of-{parts:05}.safetensors", part + 1))
}

impl Shared {
    fn read(path: &Path, map: Mmap, contents: &Contents) -> Result<Self> {
        let tensor = |name: &str, type_name: &str, shape: &[Option<usize>]| {
            let place =
                contents.tensors.get(name).with_context(|| format!("no tensor `{name}`"))?;
            let fits = place.shape.len() == shape.len()
                && place
                    .shape
                    .iter()
                    .zip(shape)
                    .all(|(found, want)| want.is_none_or(|w| w == *found));
            let dtype = format!("{:?}", place.dtype);
            ensure!(fits && dtype == type_name, "tensor `{name}` is {dtype} {:?}", place.shape);
            Ok(place.bytes.clone())
        };
        let number = |key: &str| -> Result<usize> {
            let value = contents.header.get(key).and_then(serde_json::Value::as_u64);
            Ok(usize::try_from(value.with_context(|| format!("no header field `{key}`"))?)?)
        };
        let (n, channels) = (number("images")?, number("channels")?);
        ensure!(channels == 1 || channels == 3, "`channels` is {channels}, not 1 or 3");
        let words = |range: Range<usize>| bytemuck::allocation::pod_collect_to_vec(&map[range]);

        let ids: Vec<Id> = bytemuck::allocation::pod_collect_to_vec(
            &map[tensor("id", "U8", &[Some(n), Some(32)])?],
        );
        let splits = map[tensor("split", "U8", &[Some(n)])?].iter();
        let encodings = map[tensor("encoding", "U8", &[Some(n)])?].iter();
        let size_pairs = |name: &str| -> Result<Vec<[u32; 2]>> {
            let sizes: Vec<u32> = words(tensor(name, "U32", &[Some(n), Some(2)])?);
            Ok(sizes.chunks_exact(2).map(|pair| [pair[0], pair[1]]).collect())
        };
        let sizes = size_pairs("size")?;
        let [stored_id, stored_size] = STORED;
        let stored: Option<(Vec<Id>, _)> = match contents.tensors.contains_key(stored_id) {
            true => {
                let range = tensor(stored_id, "U8", &[Some(n), Some(32)])?;
                let ids = bytemuck::allocation::pod_collect_to_vec(&map[range]);
                Some((ids, size_pairs(stored_size)?))
            }
            false => None,
        };
        let offsets: Vec<u64> = bytemuck::allocation::pod_collect_to_vec(
            &map[tensor("offset", "U64", &[Some(n + 1)])?],
        );
        let starts: Option<Vec<u64>> = match contents.tensors.contains_key(PART) {
            true => {
                Some(bytemuck::allocation::pod_collect_to_vec(&map[tensor(PART, "U64", &[None])?]))
            }
            false => None,
        };
        let bytes = match starts {
            None => Some(tensor(BYTES, "U8", &[None])?),
            Some(_) => None,
        };

        let mut shared = Self {
            data_set: DataSet { path: path.to_owned(), images: n, fingerprint: String::new() },
            channels,
            parts: Vec::new(),
            ids,
            splits: splits
                .map(|&code| Split::from_code(code).with_context(|| unknown("a split", code)))
                .collect::<Result<_>>()?,
            encodings: encodings
                .map(|&code| {
                    Encoding::from_code(code).with_context(|| unknown("an encoding", code))
                })
                .collect::<Result<_>>()?,
            stored_ids: None,
            sizes,
            offsets,
            checked: (0..n).map(|_| AtomicBool::new(false)).collect(),
            decoded: (0..n).map(|_| OnceLock::new()).collect(),
            room: AtomicUsize::new(DECODED_BYTES),
            copy: OnceLock::new(),
        };
        let ascending = |pair: &[Id]| pair[0] <= pair[1];
        ensure!(shared.ids.windows(2).all(ascending), "the ids do not ascend");
        let rows = shared.ids.iter().zip(&shared.splits).zip(&shared.sizes);
        let fingerprint =
            fingerprint(channels, rows.map(|((id, split), size)| (id, *split, *size)));
        let stated = contents.header.get("fingerprint").and_then(serde_json::Value::as_str);
        ensure!(stated == Some(&fingerprint), "the fingerprint is not that of its pictures");
        if let Some((ids, sizes)) = stored {
            (shared.stored_ids, shared.sizes) = (Some(ids), sizes);
        }
        shared.parts = match (bytes, starts) {
            (Some(bytes), _) => vec![MappedPart { map, bytes, first: 0 }],
            (None, starts) => {
                MappedPart::open_all(path, &starts.unwrap_or_default(), &fingerprint)?
            }
        };
        shared.data_set.fingerprint = fingerprint;
        shared.check_offsets()?;
        Ok(shared)
    }

    /// Fails unless every picture is within one part.
    fn check_offsets(&self) -> Result<()> {
        let rising = self.offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        let end = self.parts.last().map(MappedPart::end);
        ensure!(
            rising && self.offsets.first() == Some(&0) && self.offsets.last().copied() == end,
            "its offsets do not cover the bytes"
        );
        let whole = |part: &MappedPart| self.offsets.binary_search(&part.first).is_ok();
        ensure!(self.parts.iter().all(whole), "a picture is split across two parts");
        Ok(())
    }

    /// The digest of the stored bytes of a picture.
    fn stored_id(&self, position: usize) -> &Id {
        &self.stored_ids.as_ref().unwrap_or(&self.ids)[position]
    }

    /// The bytes of a picture in its mapped file. [`Shared::check_offsets`] has checked that they are
    /// inside.
    fn stored(&self, position: usize) -> &[u8] {
        let (from, to) = (self.offsets[position], self.offsets[position + 1]);
        if from == to {
            return &[];
        }
        let part = &self.parts[self.parts.partition_point(|part| part.first <= from) - 1];
        let at = |offset: u64| part.bytes.start + (offset - part.first) as usize;
        &part.map[at(from)..at(to)]
    }
}

impl MappedPart {
    fn end(&self) -> u64 {
        self.first + self.bytes.len() as u64
    }

    /// Opens the parts beside `images` that begin at `starts`.
    fn open_all(images: &Path, starts: &[u64], fingerprint: &str) -> Result<Vec<Self>> {
        ensure!(starts.len() > 1 && starts[0] == 0, "it names no parts");
        let count = starts.len() - 1;
        let open = |(number, pair): (usize, &[u64])| {
            let path = part_path(images, number, count);
            let map = open_map(&path)?;
            let contents = Contents::parse(&path, &map, PART_KIND, VERSION)?;
            contents.verify_around(&path, &map, Some(BYTES))?;
            let stated = contents.header.get("fingerprint").and_then(serde_json::Value::as_str);
            let place = contents.tensors.get(BYTES);
            let bytes = place.map(|place| place.bytes.clone()).unwrap_or_default();
            ensure!(
                stated == Some(fingerprint) && pair[0] + bytes.len() as u64 == pair[1],
                "`{}` belongs to other pictures",
                path.display()
            );
            Ok(Self { map, bytes, first: pair[0] })
        };
        starts.windows(2).enumerate().map(open).collect()
    }
}

fn fingerprint<'a>(
    channels: usize,
    rows: impl Iterator<Item = (&'a Id, Split, [u32; 2])>,
) -> String {
    let mut fingerprint = Fingerprint::new(channels);
    for (id, split, size) in rows {
        fingerprint.add(id, split, size);
    }
    fingerprint.text()
}

/// The digest that identifies a data set, computed row by row.
#[derive(Debug)]
struct Fingerprint(Sha256);

impl Fingerprint {
    fn new(channels: usize) -> Self {
        Self(Sha256::new_with_prefix((channels as u32).to_le_bytes()))
    }

    fn add(&mut self, id: &Id, split: Split, [height, width]: [u32; 2]) {
        self.0.update(id);
        self.0.update([split.code()]);
        self.0.update(height.to_le_bytes());
        self.0.update(width.to_le_bytes());
    }

    fn text(self) -> String {
        hex(&self.0.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::decode;
    use crate::picture::tests::{example, jpeg, png};

    fn sources() -> Vec<(StoredPicture, Split)> {
        let raw = StoredPicture::raw(example(5, 7, 3), 3).expect("sound");
        let grey = StoredPicture::raw(example(6, 4, 1), 3).expect("sound");
        let jpeg = StoredPicture::file(jpeg(&example(9, 13, 3)), 3).expect("sound");
        let png = StoredPicture::file(png(&example(8, 3, 1)), 3).expect("sound");
        [raw, grey, jpeg, png]
            .into_iter()
            .zip([Split::Train, Split::Test, Split::Unlabelled, Split::Train])
            .collect()
    }

    fn write_all(path: &Path, sources: &[(StoredPicture, Split)]) -> DataSet {
        write(path, 3, sources.to_vec()).expect("written")
    }

    /// The row of a picture.
    fn row_of(images: &Images, source: &StoredPicture) -> u32 {
        let mut rows = 0..images.len() as u32;
        rows.find(|&row| images.id(row).expect("there") == source.id()).expect("stored")
    }

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("images.safetensors");
        (folder, path)
    }

    #[test]
    fn pictures_are_read_as_written_by_ascending_id() {
        let (_folder, path) = scratch();
        let sources = sources();
        let written = write_all(&path, &sources);
        let images = Images::open(&path).expect("sound");
        assert_eq!((images.len(), images.channels()), (4, 3));
        images.data_set().require(&written, "").expect("the same");
        for (source, split) in &sources {
            let row = row_of(&images, source);
            let file = images.file(row).expect("there");
            let want = Encoding::of(source.bytes()).map(|encoding| (encoding, source.bytes()));
            assert_eq!(file, want, "pixels have no file");
            assert!(images.rows(&[*split]).contains(&row));
            let picture = images.picture(row).expect("sound");
            let size = (picture.height, picture.width);
            assert_eq!(images.size(row).expect("there"), size);
            assert_eq!(picture.channels, 3);
        }
        let raw = images.picture(row_of(&images, &sources[0].0)).expect("sound");
        assert_eq!(*raw, example(5, 7, 3));
        let grey = images.picture(row_of(&images, &sources[3].0)).expect("sound");
        assert_eq!(*grey, example(8, 3, 1).with_channels(3));
        let ids: Vec<Id> = (0..4).map(|row| images.id(row).expect("there")).collect();
        assert!(ids.is_sorted());
        assert_eq!(images.rows(&[Split::Train, Split::Unlabelled]).len(), 3);
        assert!(images.picture(4).expect_err("no row 4").to_string().contains("row 4"));
    }

    /// Writes in parts of at most this many bytes.
    fn write_parts(
        path: &Path,
        sources: &[(StoredPicture, Split)],
        part_bytes: u64,
    ) -> Result<DataSet> {
        let mut writer = SortedWriter::create(path, 3, part_bytes)?;
        sources.iter().try_for_each(|(source, split)| writer.push(&source.row(*split)))?;
        let mut rest = sources.iter();
        writer.finish(&mut |out| Ok(out.write_all(rest.next().expect("a row").0.bytes())?))
    }

    #[test]
    fn several_parts_are_read_like_one_and_a_foreign_or_missing_one_is_refused() {
        let (folder, path) = scratch();
        let mut sources = sources();
        sources.sort_by_key(|(source, _)| source.id());
        let whole = write_parts(&path, &sources, PART_BYTES).expect("written");
        let one = Images::open(&path).expect("sound");
        // At most one picture per part.
        let parts = write_parts(&path, &sources, 1).expect("written");
        assert_eq!(parts.fingerprint, whole.fingerprint);
        let several = Images::open(&path).expect("sound");
        several.data_set().require(one.data_set(), "").expect("the same");
        for row in 0..4 {
            assert_eq!(several.picture(row).expect("sound"), one.picture(row).expect("sound"));
            assert_eq!(several.id(row).expect("there"), one.id(row).expect("there"));
        }
        let files = std::fs::read_dir(folder.path()).expect("there").count();
        assert_eq!(files, 1 + 4, "no temporary file is left");

        let part = part_path(&path, 2, 4);
        assert!(part.ends_with("images-00003-of-00004.safetensors"));
        let bytes = std::fs::read(&part).expect("there");
        for position in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[position] ^= 1;
            std::fs::remove_file(&part).expect("removed");
            std::fs::write(&part, &flipped).expect("written");
            let read = Images::open(&path)
                .and_then(|images| (0..4).try_for_each(|row| images.picture(row).map(|_| ())));
            let error = format!("{:#}", read.expect_err("a flipped byte"));
            assert!(error.contains("images"), "byte {position}: {error}");
        }
        std::fs::copy(part_path(&path, 1, 4), &part).expect("copied");
        assert!(Images::open(&path).is_err(), "another part in its place");
        std::fs::remove_file(&part).expect("removed");
        let error = format!("{:#}", Images::open(&path).expect_err("missing"));
        assert!(error.contains("images-00003-of-00004.safetensors"), "{error}");

        sources.reverse();
        let error = write_parts(&path, &sources, 1).expect_err("out of order");
        assert!(error.to_string().contains("ascend"));
    }

    #[test]
    fn the_order_of_arrival_does_not_matter() {
        let (_folder, path) = scratch();
        let mut sources = sources();
        // The same picture for training and for testing: two rows.
        sources.push((sources[0].0.clone(), Split::Test));
        write_all(&path, &sources);
        let first = std::fs::read(&path).expect("there");
        let images = Images::open(&path).expect("sound");
        assert_eq!((images.len(), images.rows(&[Split::Test]).len()), (5, 2));
        sources.reverse();
        write_all(&path, &sources);
        assert_eq!(std::fs::read(&path).expect("there"), first);
    }

    #[test]
    fn pictures_stored_smaller_are_the_same_data_set() {
        let (_folder, path) = scratch();
        let whole = write_all(&path, &sources());
        let unchanged = std::fs::read(&path).expect("there");
        let files = [jpeg(&example(9, 13, 3)), png(&example(8, 3, 1))];
        let within = |shorter_side: usize| {
            let small = files.iter().map(|file| {
                StoredPicture::file_within(file.clone(), 3, shorter_side).expect("sound")
            });
            let mut all = sources();
            all.iter_mut().skip(2).zip(small).for_each(|(source, small)| source.0 = small);
            let data_set = write_all(&path, &all);
            (all, data_set, Images::open(&path).expect("sound"))
        };
        let (all, data_set, images) = within(6);
        assert_eq!(data_set.fingerprint, whole.fingerprint);
        assert_eq!(images.reduced_side(), Some(6));
        let [jpeg, png] = [2, 3].map(|number: usize| row_of(&images, &all[number].0));
        assert_eq!(images.size(jpeg).expect("there"), (6, 8));
        assert!(images.is_reduced(jpeg).expect("there") && !images.is_reduced(png).expect("there"));
        let stored = images.file(jpeg).expect("sound").expect("a file");
        assert_eq!(stored, (Encoding::Jpeg, all[2].0.bytes()));
        assert_eq!(*images.picture(jpeg).expect("sound"), decode(stored.1, 3).expect("sound"));
        let bytes = std::fs::read(&path).expect("there");
        for position in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[position] ^= 1;
            std::fs::remove_file(&path).expect("removed");
            std::fs::write(&path, &flipped).expect("written");
            let read = Images::open(&path)
                .and_then(|images| (0..4).try_for_each(|row| images.picture(row).map(drop)));
            read.expect_err("a flipped byte");
        }
        // A bound that no picture exceeds changes no byte.
        assert_eq!(within(9).2.reduced_side(), None);
        assert_eq!(std::fs::read(&path).expect("there"), unchanged);
    }

    #[test]
    fn no_picture_and_other_channels_are_refused() {
        let (_folder, path) = scratch();
        let error = write(&path, 3, Vec::new()).expect_err("empty").to_string();
        assert!(error.contains("no picture"), "{error}");
        let grey = StoredPicture::raw(example(2, 2, 1), 1).expect("sound");
        let error = write(&path, 3, vec![(grey, Split::Train)]).expect_err("grey").to_string();
        assert!(error.contains("1 channels"), "{error}");
    }

    #[test]
    fn fingerprints_depend_on_splits_and_pictures() {
        let (_folder, path) = scratch();
        let mut sources = sources();
        let mut fingerprints = vec![write_all(&path, &sources).fingerprint];
        sources[2].1 = Split::Train;
        fingerprints.push(write_all(&path, &sources).fingerprint);
        sources.pop();
        fingerprints.push(write_all(&path, &sources).fingerprint);
        fingerprints.sort();
        fingerprints.dedup();
        assert_eq!(fingerprints.len(), 3);
    }

    #[test]
    fn every_flipped_byte_is_found_on_opening_or_on_reading_its_picture() {
        let (_folder, path) = scratch();
        write_all(&path, &sources());
        let whole = std::fs::read(&path).expect("there");
        for position in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[position] ^= 1;
            // A file that is overwritten, not replaced, is flushed to disk by some file systems.
            std::fs::remove_file(&path).expect("removed");
            std::fs::write(&path, &flipped).expect("written");
            let read = Images::open(&path)
                .and_then(|images| (0..4).try_for_each(|row| images.picture(row).map(|_| ())));
            let error = format!("{:#}", read.expect_err("a flipped byte"));
            assert!(error.contains("images.safetensors"), "byte {position}: {error}");
        }
        for length in [0, 8, 100, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).expect("written");
            let error = format!("{:#}", Images::open(&path).expect_err("cut short"));
            assert!(error.contains("images.safetensors"), "{length} bytes: {error}");
        }
    }

    #[test]
    fn decoded_pictures_are_kept_while_there_is_room() {
        let (_folder, path) = scratch();
        let sources = sources();
        write_all(&path, &sources);
        let images = Images::open(&path).expect("sound");
        let [jpeg, png] = [2, 3].map(|number: usize| row_of(&images, &sources[number].0));
        images.keep_decoded(9 * 13 * 3);
        let first = images.picture(jpeg).expect("sound");
        assert!(Arc::ptr_eq(&first, &images.picture(jpeg).expect("sound")));
        let first = images.picture(png).expect("sound");
        assert!(!Arc::ptr_eq(&first, &images.picture(png).expect("sound")));
    }
}
