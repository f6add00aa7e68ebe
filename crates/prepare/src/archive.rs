//! Iterates over the files of a tar or zip archive without unpacking it to disk.
//!
//! A tar archive may be compressed with gzip or xz. Uncompressed tar and zip are read by seeking.
//! [`packed`](crate::packed) and [`webdataset`](crate::webdataset) interpret the files.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;

use crate::folder::SOURCE;
use crate::names::{left_out_part, safe_name, split_name};
use crate::tar_file::{self, SkipRead, Stream};
use crate::{foreign, picture, zip_file};

/// Memory limit for decompressing xz, in KiB: twice what `xz -9` needs.
const XZ_KIBIBYTES: u32 = 1 << 17;

/// Decompresses gzip and xz, recognised by the first bytes, and returns other bytes unchanged.
///
/// # Errors
///
/// The file is compressed with bzip2 or zstd.
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
        "`{}` is compressed with {other}, but only gzip and xz are supported; unpack it and pass \
         its folder with {SOURCE}",
        path.display()
    )
}

/// Wraps a reader that treats an empty read as end of file.
struct WithoutEmptyReads<R>(R);

impl<R: Read> Read for WithoutEmptyReads<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() { Ok(0) } else { self.0.read(buffer) }
    }
}

/// Opens a file whose bytes can be skipped: by seeking, unless it is compressed.
fn open_input(path: &Path) -> Result<Box<dyn SkipRead>> {
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

/// The path of a file below the folder that is read, separated by `/`. For a skipped file, its name
/// and the reason, a phrase that follows the name.
pub type Name = Result<String, (String, &'static str)>;

/// A file of an archive.
pub trait Member {
    /// Its path, or why it is skipped.
    fn name(&self) -> &Name;

    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Peeks at its first bytes.
    ///
    /// # Errors
    ///
    /// The archive is damaged.
    fn start(&mut self) -> Result<Vec<u8>>;

    /// Reads its bytes, or returns why this one file cannot be read.
    ///
    /// # Errors
    ///
    /// The archive is damaged.
    fn read(&mut self, limit: u64) -> Result<Result<Vec<u8>, String>>;

    /// Its bytes as a stream; `None` in a zip file.
    fn stream(&mut self) -> Option<&mut dyn SkipRead>;
}

/// Calls `visit` with every file of an archive below the folder `within`, or with every file if
/// `within` is empty, until `visit` returns `false`. Folders are not visited.
///
/// # Errors
///
/// The archive is damaged or truncated, or has no folder `within`; or `visit` fails.
pub fn each(
    path: &Path,
    within: &str,
    mut visit: impl FnMut(&mut dyn Member) -> Result<bool>,
) -> Result<()> {
    let folder = within.trim_matches('/');
    let mut within = Within { folder, is_there: folder.is_empty(), others: Vec::new() };
    if is_zip(path)? {
        each_of_zip(path, &mut within, &mut visit)?;
    } else {
        let mut input = open_input(path)?;
        walk_tar(&mut input, &path.display().to_string(), &mut within, &mut visit)?;
    }
    within.check(path)
}

/// Calls `visit` with every file of a tar archive until it returns `false`. Messages call the
/// archive `shown`.
///
/// # Errors
///
/// As [`each`].
pub fn each_of_tar(input: &mut dyn SkipRead, shown: &str, visit: Visit) -> Result<()> {
    let mut all = Within { folder: "", is_there: true, others: Vec::new() };
    walk_tar(input, shown, &mut all, visit)
}

/// The folder of an archive that is read.
struct Within<'a> {
    folder: &'a str,
    is_there: bool,
    /// Some folders outside of it, for an error message.
    others: Vec<String>,
}

/// Most folders of an archive that an error message names.
const SOME_FOLDERS: usize = 5;

impl Within<'_> {
    /// The name below the folder of the entry `stated`; `None` if it is outside of the folder.
    /// `other` is the reason to skip an entry that is not a regular file.
    fn name(&mut self, stated: &str, other: Option<&'static str>) -> Option<Name> {
        let name = match safe_name(stated) {
            Ok(name) => name,
            Err(reason) if self.folder.is_empty() => return Some(Err((stated.to_owned(), reason))),
            Err(_) => return None,
        };
        let below = match self.folder {
            "" => Some(&*name),
            folder => name.strip_prefix(folder).and_then(|name| name.strip_prefix('/')),
        };
        let Some(below) = below else {
            let folder = split_name(&name).0;
            let is_known = self.others.iter().any(|known| known == folder);
            let is_shown = !folder.is_empty() && !is_known && left_out_part(folder).is_none();
            if is_shown && self.others.len() < SOME_FOLDERS {
                self.others.push(folder.to_owned());
            }
            return None;
        };
        self.is_there = true;
        let reason = left_out_part(below).or(other.map(|reason| (below, reason)));
        Some(match reason {
            Some((part, reason)) => Err((part.to_owned(), reason)),
            None => Ok(below.to_owned()),
        })
    }

    fn check(self, path: &Path) -> Result<()> {
        ensure!(
            self.is_there,
            "`{}` has no folder `{}`; {}",
            path.display(),
            self.folder,
            match self.others.is_empty() {
                true => "it has no folders at all".to_owned(),
                false => format!("some of its folders are `{}`", self.others.join("`, `")),
            }
        );
        Ok(())
    }
}

/// Whether a file is a zip file, by its first bytes.
pub fn is_zip(path: &Path) -> Result<bool> {
    let mut start = Vec::new();
    let file = File::open(path).with_context(|| format!("opening `{}`", path.display()))?;
    file.take(4).read_to_end(&mut start)?;
    Ok([b"PK\x03\x04", b"PK\x05\x06"].iter().any(|magic| start == *magic))
}

/// The callback for each file.
pub type Visit<'a> = &'a mut dyn FnMut(&mut dyn Member) -> Result<bool>;

struct TarMember<'a, 'b> {
    name: Name,
    size: u64,
    peeked: Vec<u8>,
    reader: &'a mut tar_file::TarReader<&'b mut dyn SkipRead>,
}

fn walk_tar(
    input: &mut dyn SkipRead,
    shown: &str,
    within: &mut Within,
    visit: Visit,
) -> Result<()> {
    let mut last = String::new();
    let damaged = |last: &str| {
        let place = if last.is_empty() { String::new() } else { format!(" around `{last}`") };
        format!("`{shown}` is not a tar archive, or is damaged or cut short{place}; get it again")
    };
    let mut reader = tar_file::TarReader::new(input);
    loop {
        let Some(entry) = reader.next_entry().with_context(|| damaged(&last))? else {
            return Ok(());
        };
        last = entry.name;
        if entry.is_folder {
            continue;
        }
        let Some(name) = within.name(&last, entry.other) else { continue };
        let mut member =
            TarMember { name, size: entry.size, peeked: Vec::new(), reader: &mut reader };
        if !visit(&mut member).with_context(|| format!("in `{shown}`"))? {
            return Ok(());
        }
    }
}

impl Member for TarMember<'_, '_> {
    fn name(&self) -> &Name {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn start(&mut self) -> Result<Vec<u8>> {
        if self.peeked.is_empty() {
            let length = self.size.min(foreign::START as u64);
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

    fn stream(&mut self) -> Option<&mut dyn SkipRead> {
        Some(self.reader)
    }
}

struct ZipMember<'a> {
    name: Name,
    entry: zip_file::ZipEntry,
    reader: &'a mut zip_file::ZipReader,
}

fn each_of_zip(path: &Path, within: &mut Within, visit: Visit) -> Result<()> {
    let damaged =
        || format!("`{}` is damaged or cut short as a zip file; get it again", path.display());
    let mut reader = zip_file::ZipReader::open(path).with_context(damaged)?;
    while let Some(entry) = reader.next_entry().with_context(damaged)? {
        if entry.is_folder {
            continue;
        }
        let Some(name) = within.name(&entry.name, entry.other) else { continue };
        let mut member = ZipMember { name, entry, reader: &mut reader };
        if !visit(&mut member).with_context(|| format!("in `{}`", path.display()))? {
            break;
        }
    }
    Ok(())
}

impl Member for ZipMember<'_> {
    fn name(&self) -> &Name {
        &self.name
    }

    fn size(&self) -> u64 {
        self.entry.size
    }

    fn start(&mut self) -> Result<Vec<u8>> {
        let mut bytes = self.read(1 << 26)?.unwrap_or_default();
        bytes.truncate(foreign::START);
        Ok(bytes)
    }

    fn read(&mut self, limit: u64) -> Result<Result<Vec<u8>, String>> {
        self.reader.read(&self.entry, limit).context("the zip file is damaged; get it again")
    }

    fn stream(&mut self) -> Option<&mut dyn SkipRead> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::assert_has;

    #[test]
    fn xz_is_decompressed() {
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
    fn unsupported_compression_is_named() {
        for (start, name) in [(&b"BZh91"[..], "bzip2"), (b"\x28\xb5\x2f\xfd", "zstd")] {
            let error = decompressed(start, Path::new("x")).map(|_| ()).expect_err("unknown");
            assert_has(&error.to_string(), &[name, "unpack it", "--source"]);
        }
    }
}
