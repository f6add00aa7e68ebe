//! The files of an archive, tar or zip: nothing is unpacked to disk.
//!
//! A tar archive may be compressed by gzip or xz; a plain one, and a zip file, are read by seeking.
//! What the files are is for [`packed`](crate::packed) and [`webdataset`](crate::webdataset).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;

use crate::folder::SOURCE;
use crate::names::safe_name;
use crate::tar_file::{self, Input, Stream};
use crate::{picture, zip_file};

/// The most memory that unpacking xz may take, in KiB: twice what `xz -9` needs.
const XZ_KIBIBYTES: u32 = 1 << 17;

/// The bytes of a file, unpacked if it is compressed: told by its first bytes, not by its name.
///
/// # Errors
///
/// The file cannot be read or is compressed in another way.
pub fn decompressed(mut reader: impl BufRead + 'static, path: &Path) -> Result<Box<dyn Read>> {
    let start = reader.fill_buf().with_context(|| format!("reading `{}`", path.display()))?;
    let other = match start {
        [0x1f, 0x8b, ..] => return Ok(Box::new(MultiGzDecoder::new(reader))),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let reader = XzReader::new_mem_limit(reader, true, XZ_KIBIBYTES);
            return Ok(Box::new(WithoutEmptyReads(reader)));
        }
        [b'B', b'Z', b'h', ..] => "bzip2",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => return Ok(Box::new(reader)),
    };
    bail!(
        "`{}` is packed by {other}, and only gzip and xz are read; unpack it and name its folder \
         with {SOURCE}",
        path.display()
    )
}

/// A reader that takes "nothing was read" for its end, also where nothing was asked for.
struct WithoutEmptyReads<R>(R);

impl<R: Read> Read for WithoutEmptyReads<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() { Ok(0) } else { self.0.read(buffer) }
    }
}

/// A file whose bytes can be passed over: by seeking, unless it is compressed.
fn open_input(path: &Path) -> Result<Box<dyn Input>> {
    let open = || File::open(path).with_context(|| format!("opening `{}`", path.display()));
    let mut start = Vec::new();
    open()?.take(6).read_to_end(&mut start)?;
    let reader = BufReader::with_capacity(1 << 16, open()?);
    match start[..] {
        [0x1f, 0x8b, ..] | [0xfd, b'7', ..] | [b'B', b'Z', b'h', ..] | [0x28, 0xb5, ..] => {
            Ok(Box::new(Stream(decompressed(reader, path)?)))
        }
        _ => Ok(Box::new(reader)),
    }
}

/// A file of an archive.
pub trait Member {
    /// Its path below the archive's root with `/` between its parts, or its name as it stands there
    /// and why it is passed over.
    fn name(&self) -> &Result<String, (String, String)>;

    /// How many bytes it has.
    fn size(&self) -> u64;

    /// Its first bytes; they are read again.
    ///
    /// # Errors
    ///
    /// The archive is damaged.
    fn start(&mut self) -> Result<Vec<u8>>;

    /// Its bytes, or why there are none to be had.
    ///
    /// # Errors
    ///
    /// The archive is damaged.
    fn read(&mut self, limit: u64) -> Result<Result<Vec<u8>, String>>;

    /// Its bytes, not yet read; none in a zip file.
    fn stream(&mut self) -> Option<&mut dyn Input>;
}

/// Calls `visit` with every file of an archive until it says `false`. Folders are no files.
///
/// # Errors
///
/// The archive cannot be read, is none, is damaged or cut short; or `visit` fails.
pub fn each(path: &Path, mut visit: impl FnMut(&mut dyn Member) -> Result<bool>) -> Result<()> {
    if is_zip(path)? {
        return each_of_zip(path, &mut visit);
    }
    let mut input = open_input(path)?;
    each_of_tar(&mut input, &path.display().to_string(), &mut visit)
}

/// Whether a file is a zip file, by its first bytes.
///
/// # Errors
///
/// It cannot be read.
pub fn is_zip(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = File::open(path).with_context(|| format!("opening `{}`", path.display()))?;
    file.take(4).read_to_end(&mut start)?;
    Ok([b"PK\x03\x04", b"PK\x05\x06"].iter().any(|magic| start == *magic))
}

type Visit<'a> = &'a mut dyn FnMut(&mut dyn Member) -> Result<bool>;

struct TarMember<'a, 'b> {
    name: Result<String, (String, String)>,
    size: u64,
    peeked: Vec<u8>,
    reader: &'a mut tar_file::Reader<&'b mut dyn Input>,
}

/// Calls `visit` with every file of the tar archive `shown` until it says `false`.
pub fn each_of_tar(input: &mut dyn Input, shown: &str, visit: Visit) -> Result<()> {
    let mut last = String::new();
    let damaged = |last: &str| {
        let place = if last.is_empty() { String::new() } else { format!(" around `{last}`") };
        format!("`{shown}` is not a tar archive, or is damaged or cut short{place}; get it again")
    };
    let mut reader = tar_file::Reader::new(input);
    loop {
        let Some(entry) = reader.next_entry().with_context(|| damaged(&last))? else {
            return Ok(());
        };
        last = entry.name;
        if entry.is_folder {
            continue;
        }
        let name = match entry.other {
            Some(reason) => Err((last.clone(), reason.to_owned())),
            None => safe_name(&last).map_err(|reason| (last.clone(), reason.to_owned())),
        };
        let mut member =
            TarMember { name, size: entry.size, peeked: Vec::new(), reader: &mut reader };
        if !visit(&mut member).with_context(|| format!("in `{shown}`"))? {
            return Ok(());
        }
    }
}

impl Member for TarMember<'_, '_> {
    fn name(&self) -> &Result<String, (String, String)> {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn start(&mut self) -> Result<Vec<u8>> {
        if self.peeked.is_empty() {
            let length = self.size.min(16);
            self.reader.by_ref().take(length).read_to_end(&mut self.peeked)?;
        }
        Ok(self.peeked.clone())
    }

    fn read(&mut self, limit: u64) -> Result<Result<Vec<u8>, String>> {
        if self.size > limit {
            return Ok(Err(picture::too_many_bytes(self.size, limit)));
        }
        let mut bytes = std::mem::take(&mut self.peeked);
        self.reader.read_to_end(&mut bytes)?;
        let name = self.name.as_ref().unwrap_or_else(|(name, _)| name);
        ensure!(
            bytes.len() as u64 == self.size,
            "it is damaged or cut short in `{name}`; get it again"
        );
        Ok(Ok(bytes))
    }

    fn stream(&mut self) -> Option<&mut dyn Input> {
        Some(self.reader)
    }
}

struct ZipMember<'a> {
    name: Result<String, (String, String)>,
    entry: zip_file::Entry,
    reader: &'a mut zip_file::Reader,
}

fn each_of_zip(path: &Path, visit: Visit) -> Result<()> {
    let damaged =
        || format!("`{}` is damaged or cut short as a zip file; get it again", path.display());
    let mut reader = zip_file::Reader::open(path).with_context(damaged)?;
    while let Some(entry) = reader.next_entry().with_context(damaged)? {
        if entry.is_folder {
            continue;
        }
        let name = match entry.other {
            Some(reason) => Err((entry.name.clone(), reason.to_owned())),
            None => safe_name(&entry.name).map_err(|r| (entry.name.clone(), r.to_owned())),
        };
        let mut member = ZipMember { name, entry, reader: &mut reader };
        if !visit(&mut member).with_context(|| format!("in `{}`", path.display()))? {
            break;
        }
    }
    Ok(())
}

impl Member for ZipMember<'_> {
    fn name(&self) -> &Result<String, (String, String)> {
        &self.name
    }

    fn size(&self) -> u64 {
        self.entry.size
    }

    fn start(&mut self) -> Result<Vec<u8>> {
        let mut bytes = self.read(1 << 26)?.unwrap_or_default();
        bytes.truncate(16);
        Ok(bytes)
    }

    fn read(&mut self, limit: u64) -> Result<Result<Vec<u8>, String>> {
        self.reader.read(&self.entry, limit).context("the zip file is damaged; get it again")
    }

    fn stream(&mut self) -> Option<&mut dyn Input> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::assert_has;

    #[test]
    fn xz_is_unpacked() {
        // `printf 'sorted by what is seen\n' | xz --format=xz`
        static PACKED: [u8; 80] = [
            253, 55, 122, 88, 90, 0, 0, 4, 230, 214, 180, 70, 2, 0, 33, 1, 22, 0, 0, 0, 116, 47,
            229, 163, 1, 0, 22, 115, 111, 114, 116, 101, 100, 32, 98, 121, 32, 119, 104, 97, 116,
            32, 105, 115, 32, 115, 101, 101, 110, 10, 0, 0, 0, 121, 31, 19, 198, 138, 14, 89, 0, 1,
            47, 23, 129, 8, 73, 177, 31, 182, 243, 125, 1, 0, 0, 0, 0, 4, 89, 90,
        ];
        let mut text = String::new();
        let mut reader = decompressed(&PACKED[..], Path::new("text.xz")).expect("xz");
        assert_eq!(reader.read(&mut []).expect("nothing"), 0); // As for an empty member.
        reader.read_to_string(&mut text).expect("sound");
        assert_eq!(text, "sorted by what is seen\n");
        let mut damaged = PACKED;
        damaged[30] ^= 1;
        let reader = io::Cursor::new(damaged);
        let mut reader = decompressed(reader, Path::new("text.xz")).expect("xz");
        assert!(reader.read_to_string(&mut text).is_err());
    }

    #[test]
    fn other_packings_are_named() {
        for (start, name) in [(&b"BZh91"[..], "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")] {
            let error = decompressed(start, Path::new("x")).map(|_| ()).expect_err("unknown");
            assert_has(&error.to_string(), &[name, "unpack it", "--source"]);
        }
    }
}
