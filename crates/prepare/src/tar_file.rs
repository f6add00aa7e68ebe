//! Reads tar files as a stream, skipping the data of unwanted entries.
//!
//! Crate `tar` parses the headers. We iterate over the entries ourselves, for three reasons: to
//! seek past unwanted data, even in nested archives; to limit names in extension headers to 1 MiB,
//! whatever length the header states; and to detect an archive truncated between two entries.

use std::fs::File;
use std::io::{self, BufReader, Read};

use anyhow::{Result, bail, ensure};
use tar::{EntryType, Header};

use crate::names;

/// A reader that can skip bytes.
pub trait SkipRead: Read {
    /// Skips this many bytes. A skip past the end may fail only at the next read.
    ///
    /// # Errors
    ///
    /// The input ends before.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

impl SkipRead for BufReader<File> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        self.seek_relative(i64::try_from(bytes).map_err(|_| io::ErrorKind::UnexpectedEof)?)
    }
}

/// A stream without seek, such as decompressed bytes: skipping reads and discards.
pub struct Stream<R>(pub R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> SkipRead for Stream<R> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        match io::copy(&mut self.0.by_ref().take(bytes), &mut io::sink())? == bytes {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl<I: SkipRead + ?Sized> SkipRead for Box<I> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        (**self).skip(bytes)
    }
}

impl<I: SkipRead + ?Sized> SkipRead for &mut I {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        (**self).skip(bytes)
    }
}

/// The size of a tar block in bytes.
pub const BLOCK: usize = 512;

/// The size limit for a name and for an extension header, in bytes.
const MOST_NAME_BYTES: u64 = 1 << 20;

/// Reads a tar file entry by entry. As a reader, it gives the data of the current entry.
pub struct TarReader<I> {
    input: I,
    /// Unread bytes of the current entry, and the padding after it.
    left: u64,
    filling: u64,
}

/// The metadata of an entry.
#[derive(Debug)]
pub struct TarEntry {
    /// The name in the header, rendered by [`names::text`].
    pub name: String,
    /// What it is, if not a regular file: a phrase that follows the name.
    pub other: Option<&'static str>,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// The size of the file in bytes.
    pub size: u64,
}

impl<I: SkipRead> TarReader<I> {
    /// A reader at the first header.
    pub fn new(input: I) -> Self {
        Self { input, left: 0, filling: 0 }
    }

    /// Moves to the next entry, skipping unread data of the last one. Returns `None` at the end.
    ///
    /// # Errors
    ///
    /// A header is damaged, or the archive ends without its final block of zeros.
    pub fn next_entry(&mut self) -> Result<Option<TarEntry>> {
        let (mut name, mut size) = (None, None);
        loop {
            self.input.skip(self.left + self.filling)?;
            (self.left, self.filling) = (0, 0);
            let mut block = [0; BLOCK];
            self.input.read_exact(&mut block)?;
            if block == [0; BLOCK] {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check_sum(&block, header)?;
            let kind = header.entry_type();
            let stated = size.take().map_or_else(|| header.entry_size(), Ok)?;
            let has_data = !(kind.is_dir()
                || kind.is_symlink()
                || kind.is_hard_link()
                || kind.is_fifo()
                || kind.is_character_special()
                || kind.is_block_special());
            self.left = if has_data { stated } else { 0 };
            self.filling = self.left.next_multiple_of(BLOCK as u64) - self.left;
            match kind {
                EntryType::GNULongName => {
                    let mut bytes = self.extension()?;
                    bytes.truncate(bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len()));
                    name = Some(bytes);
                }
                EntryType::XHeader => {
                    for (key, value) in pax_fields(&self.extension()?) {
                        match key {
                            b"path" => name = Some(value.to_vec()),
                            b"size" => size = std::str::from_utf8(value)?.parse().ok(),
                            _ => {}
                        }
                    }
                }
                EntryType::GNULongLink | EntryType::XGlobalHeader => {}
                kind => {
                    if kind == EntryType::GNUSparse {
                        self.skip_sparse_headers(&block)?;
                    }
                    let name = name.unwrap_or_else(|| header.path_bytes().into_owned());
                    let name = names::text(&name);
                    let other = what_else(kind);
                    let is_folder = kind.is_dir() || other.is_none() && name.ends_with('/');
                    return Ok(Some(TarEntry { name, other, is_folder, size: self.left }));
                }
            }
        }
    }

    /// Reads the data of an extension header.
    fn extension(&mut self) -> Result<Vec<u8>> {
        ensure!(self.left <= MOST_NAME_BYTES, "a name of {} bytes", self.left);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        ensure!(self.left == 0, "it is cut short");
        Ok(bytes)
    }

    /// Skips the extra header blocks of an old GNU sparse file.
    fn skip_sparse_headers(&mut self, block: &[u8; BLOCK]) -> Result<()> {
        let mut goes_on = block[482] != 0;
        while goes_on {
            let mut block = [0; BLOCK];
            self.input.read_exact(&mut block)?;
            goes_on = block[504] != 0;
        }
        Ok(())
    }
}

/// Reads the remaining bytes of the current entry.
impl<I: SkipRead> Read for TarReader<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.input.read(&mut buffer[..most])?;
        self.left -= read as u64;
        Ok(read)
    }
}

impl<I: SkipRead> SkipRead for TarReader<I> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.left {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= bytes;
        self.input.skip(bytes)
    }
}

fn check_sum(block: &[u8; BLOCK], header: &Header) -> Result<()> {
    let sum = |range: std::ops::Range<usize>| -> u32 {
        block[range].iter().map(|&byte| u32::from(byte)).sum()
    };
    let found = sum(0..148) + 8 * u32::from(b' ') + sum(156..BLOCK);
    match header.cksum() {
        Ok(stated) if stated == found => Ok(()),
        _ => bail!("a header does not have its checksum"),
    }
}

/// Parses lines of `length key=value`, where `length` counts the whole line. Stops at the first
/// malformed line.
fn pax_fields(mut bytes: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut fields = Vec::new();
    while let Some(space) = bytes.iter().position(|&byte| byte == b' ') {
        let length = std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse().ok());
        let line =
            length.and_then(|length: usize| bytes.get(space + 1..length)?.strip_suffix(b"\n"));
        let (Some(line), Some(length)) = (line, length) else { break };
        if let Some(equals) = line.iter().position(|&byte| byte == b'=') {
            fields.push((&line[..equals], &line[equals + 1..]));
        }
        bytes = &bytes[length..];
    }
    fields
}

fn what_else(kind: EntryType) -> Option<&'static str> {
    match kind {
        EntryType::Regular | EntryType::Continuous => None,
        EntryType::Symlink | EntryType::Link => Some("is a link"),
        EntryType::GNUSparse => Some("is a sparse file"),
        _ => Some("is not a regular file"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: EntryType, name: &str, size: u64) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn padded(bytes: &[u8]) -> Vec<u8> {
        let mut block = bytes.to_vec();
        block.resize(bytes.len().next_multiple_of(BLOCK), 0);
        block
    }

    fn entries(archive: &[u8]) -> Result<Vec<(String, String)>> {
        let mut reader = TarReader::new(Stream(archive));
        let mut found = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            let mut text = String::new();
            reader.read_to_string(&mut text)?;
            found.push((entry.name, entry.other.unwrap_or(&text).to_owned()));
        }
        Ok(found)
    }

    #[test]
    fn long_names_and_sizes_in_extension_headers_are_read() {
        let long = "folder/".repeat(40) + "name";
        let pax = "20 path=other/name!\n10 size=5\n";
        let archive = [
            header(EntryType::GNULongName, "././@LongLink", long.len() as u64 + 1),
            padded(format!("{long}\0").as_bytes()),
            header(EntryType::Regular, "short", 3),
            padded(b"one"),
            header(EntryType::XGlobalHeader, "global", 4),
            padded(b"skip"),
            header(EntryType::XHeader, "pax", pax.len() as u64),
            padded(pax.as_bytes()),
            header(EntryType::Regular, "unused", 0),
            padded(b"seven"),
            header(EntryType::Symlink, "link", 9),
            header(EntryType::Regular, "last", 0),
            vec![0; BLOCK],
        ]
        .concat();
        let found = entries(&archive).expect("sound");
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [long.as_str(), "other/name!", "link", "last"]);
        let texts: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["one", "seven", "is a link", ""]);
    }

    #[test]
    fn a_name_with_a_huge_stated_length_is_not_read() {
        for kind in [EntryType::GNULongName, EntryType::XHeader] {
            let archive = header(kind, "x", 1 << 40);
            let error = entries(&archive).expect_err("huge").to_string();
            assert!(error.contains("a name of 1099511627776 bytes"), "{error}");
        }
        let archive = header(EntryType::Regular, "x", u64::MAX >> 2);
        assert!(entries(&archive).is_err());
    }
}
