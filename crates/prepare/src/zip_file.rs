//! Reads zip files entry by entry from the central directory at their end.
//!
//! The directory is streamed, so memory does not grow with the number of entries. Zip64 is
//! supported; entries are stored or deflated. An entry's local header must be at the offset and
//! have the name that the directory states. This rejects zip bombs whose entries overlap.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::DeflateDecoder;

use crate::names;

/// An open archive.
pub struct ZipReader {
    directory: BufReader<File>,
    entries: BufReader<File>,
    /// Unread bytes of the directory, and its offset.
    left: u64,
    start: u64,
    /// How many bytes precede the archive in its file.
    shift: u64,
}

/// An entry of the directory.
#[derive(Debug, Clone)]
pub struct ZipEntry {
    /// The name rendered by [`names::text`], separated by `/`.
    pub name: String,
    /// What it is, if not a regular file: a phrase that follows the name.
    pub other: Option<&'static str>,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// The decompressed size in bytes.
    pub size: u64,
    raw_name: Vec<u8>,
    packed: u64,
    method: u16,
    is_encrypted: bool,
    crc: u32,
    place: u64,
}

const END: u32 = 0x0605_4b50;
const END_64: u32 = 0x0606_4b50;
const END_64_PLACE: u32 = 0x0706_4b50;
const DIRECTORY: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl ZipReader {
    /// Opens a file and finds its directory.
    ///
    /// # Errors
    ///
    /// The file is not a zip file, or is truncated.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        // The end record has 22 bytes and a comment of at most 65,535.
        let tail_start = length.saturating_sub(22 + 65_535);
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(tail_start))?;
        file.by_ref().take(22 + 65_535).read_to_end(&mut tail)?;
        let is_end = |&at: &usize| {
            u32_at(&tail, at) == END && at + 22 + usize::from(u16_at(&tail, at + 20)) == tail.len()
        };
        let end = (0..tail.len().saturating_sub(21)).rev().find(is_end);
        let end = end.context("it has no directory at its end")?;
        let (mut size, mut start) =
            (u64::from(u32_at(&tail, end + 12)), u64::from(u32_at(&tail, end + 16)));
        let mut after = tail_start + end as u64;
        if (end >= 20) && u32_at(&tail, end - 20) == END_64_PLACE {
            let mut record = [0; 56];
            file.seek(SeekFrom::Start(u64_at(&tail, end - 12)))?;
            file.read_exact(&mut record)?;
            ensure!(u32_at(&record, 0) == END_64, "its directory is damaged");
            (size, start) = (u64_at(&record, 40), u64_at(&record, 48));
            after = u64_at(&tail, end - 12);
        }
        let shift = after.checked_sub(size).and_then(|place| place.checked_sub(start));
        let shift = shift.context("its directory is damaged")?;
        let mut directory = BufReader::with_capacity(1 << 16, file);
        directory.seek(SeekFrom::Start(start + shift))?;
        let entries = BufReader::with_capacity(1 << 15, File::open(path)?);
        Ok(Self { directory, entries, left: size, start: start + shift, shift })
    }

    /// Returns the next entry of the directory, or `None` at the end.
    ///
    /// # Errors
    ///
    /// The directory is damaged.
    pub fn next_entry(&mut self) -> Result<Option<ZipEntry>> {
        if self.left == 0 {
            return Ok(None);
        }
        let mut head = [0; 46];
        self.take(&mut head)?;
        ensure!(u32_at(&head, 0) == DIRECTORY, "its directory is damaged");
        let [name, extra, comment] = [28, 30, 32]
            .map(|at| vec![0; u16_at(&head, at).into()])
            .map(|mut bytes: Vec<u8>| self.take(&mut bytes).map(|()| bytes));
        let (raw_name, extra) = (name?, extra?);
        comment?;
        let mut sizes = [24, 20, 42].map(|at| u64::from(u32_at(&head, at)));
        read_zip64(&extra, &mut sizes);
        let [size, packed, place] = sizes;
        let name = name_of(&raw_name, head[5], u16_at(&head, 8));
        // On Unix, the upper half of the attributes is the file mode.
        let is_link = u32_at(&head, 38) >> 28 == 0o12 && head[5] == 3;
        Ok(Some(ZipEntry {
            other: is_link.then_some("is a link"),
            is_folder: name.ends_with('/'),
            name,
            size,
            raw_name,
            packed,
            method: u16_at(&head, 10),
            is_encrypted: u16_at(&head, 8) & 1 == 1,
            crc: u32_at(&head, 16),
            place,
        }))
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<()> {
        let left = self.left.checked_sub(bytes.len() as u64);
        self.left = left.context("its directory is damaged")?;
        Ok(self.directory.read_exact(bytes)?)
    }

    /// Reads the bytes of an entry, or returns why they cannot be read: a phrase that follows its
    /// name.
    ///
    /// # Errors
    ///
    /// The entry is not at the offset that the directory states.
    pub fn read(&mut self, entry: &ZipEntry, limit: u64) -> Result<Result<Vec<u8>, String>> {
        if entry.size > limit {
            return Ok(Err(crate::picture::too_many_bytes(entry.size, limit)));
        }
        if entry.is_encrypted {
            return Ok(Err("is encrypted".into()));
        }
        let context = || format!("`{}` is not where its directory says", entry.name);
        self.find(entry).with_context(context)?;
        let packed = self.entries.by_ref().take(entry.packed);
        let mut bytes = Vec::new();
        let read = match entry.method {
            0 => packed.take(entry.size + 1).read_to_end(&mut bytes),
            8 => DeflateDecoder::new(packed).take(entry.size + 1).read_to_end(&mut bytes),
            other => {
                return Ok(Err(format!(
                    "is compressed by method {other}: only 0 and 8 are supported"
                )));
            }
        };
        let mut crc = flate2::Crc::new();
        crc.update(&bytes);
        let whole = read.is_ok() && bytes.len() as u64 == entry.size && crc.sum() == entry.crc;
        Ok(if whole { Ok(bytes) } else { Err("is damaged in the archive".into()) })
    }

    /// Seeks to the data of an entry.
    fn find(&mut self, entry: &ZipEntry) -> Result<()> {
        let place = entry.place.checked_add(self.shift).context("its offset is invalid")?;
        ensure!(place < self.start, "its offset is after the start of the directory");
        // A relative seek keeps the buffer if the target is in it.
        let ahead = i64::try_from(place)? - i64::try_from(self.entries.stream_position()?)?;
        self.entries.seek_relative(ahead)?;
        let mut head = [0; 30];
        self.entries.read_exact(&mut head)?;
        ensure!(u32_at(&head, 0) == LOCAL, "there is no entry");
        let mut name = vec![0; u16_at(&head, 26).into()];
        self.entries.read_exact(&mut name)?;
        if name != entry.raw_name {
            bail!("the entry there has another name");
        }
        let extra = u64::from(u16_at(&head, 28));
        let skipped = io::copy(&mut self.entries.by_ref().take(extra), &mut io::sink())?;
        ensure!(skipped == extra, "it is cut short");
        Ok(())
    }
}

/// Decodes the name of an entry that was written on the system `host`.
///
/// It is UTF-8 if bit 11 of the flags is set, or if it was written on Unix or macOS, whose tools
/// omit the bit; else code page 437, by the specification. Old Windows tools separate folders by
/// `\`. It is not a separator in a name with `/`, nor after a byte above 127, where it is the
/// second byte of a Shift-JIS or GBK character.
fn name_of(raw: &[u8], host: u8, flags: u16) -> String {
    const UNIX: u8 = 3;
    const MACOS: u8 = 19;
    let is_unix = [UNIX, MACOS].contains(&host);
    let is_utf8 = is_unix || flags >> 11 & 1 == 1;
    let mut raw = raw.to_owned();
    if !is_unix && !raw.contains(&b'/') {
        for at in 0..raw.len() {
            if raw[at] == b'\\' && (is_utf8 || at == 0 || raw[at - 1].is_ascii()) {
                raw[at] = b'/';
            }
        }
    }
    match is_utf8 {
        true => names::text(&raw),
        false => names::text(code_page_437(&raw).as_bytes()),
    }
}

fn code_page_437(bytes: &[u8]) -> String {
    const UPPER: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐\
                         └┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";
    let upper: Vec<char> = UPPER.chars().collect();
    let sign = |&byte: &u8| match byte.checked_sub(128) {
        Some(place) => upper[usize::from(place)],
        None => char::from(byte),
    };
    bytes.iter().map(sign).collect()
}

/// Replaces the size, compressed size and offset that did not fit into 32 bits.
fn read_zip64(mut extra: &[u8], sizes: &mut [u64; 3]) {
    while extra.len() >= 4 {
        let (kind, length) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(mut field) = extra.get(4..4 + length) else { return };
        if kind == 1 {
            for size in sizes.iter_mut().filter(|size| **size == u64::from(u32::MAX)) {
                if field.len() >= 8 {
                    *size = u64_at(field, 0);
                    field = &field[8..];
                }
            }
        }
        extra = &extra[4 + length..];
    }
}
