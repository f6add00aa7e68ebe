//! Pictures in a tar archive, read as a stream: nothing is unpacked to disk.
//!
//! The archive may be compressed by gzip or xz. It holds one folder a class, below as many common
//! folders as it likes, or pictures without any folder, or the binary files of CIFAR. An entry
//! that is not a plain file below the archive's own root is passed over and listed: links, devices,
//! absolute names and names with `..`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use data::picture::Encoding;
use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;
use stage::Split;
use tar::EntryType;

use crate::collection::{Collection, Load};
use crate::folder::{self, SOURCE};
use crate::{Format, cifar, picture};

/// The most memory that unpacking xz may take, in KiB: eight times what `xz -9` needs.
const XZ_KIBIBYTES: u32 = 1 << 19;

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
            return Ok(Box::new(XzReader::new_mem_limit(reader, true, XZ_KIBIBYTES)));
        }
        [b'B', b'Z', b'h', ..] => "bzip2",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [b'P', b'K', 3, 4, ..] => "zip",
        _ => return Ok(Box::new(reader)),
    };
    bail!(
        "`{}` is packed by {other}, and only gzip and xz are read; unpack it and name its folder \
         with {SOURCE}",
        path.display()
    )
}

/// What an archive turns out to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// The binary files of CIFAR.
    Cifar,
    /// Pictures.
    Pictures,
}

/// Looks at an archive up to its first entry of use.
///
/// # Errors
///
/// It is no archive, is damaged, or holds neither.
pub fn recognise(path: &Path) -> Result<Holds> {
    let mut archive = Archive::open(path)?;
    let mut holds = None;
    archive.each(|entry| {
        let Ok(name) = &entry.name else { return Ok(true) };
        let inner = folder::file_name(name);
        ensure!(
            !inner.ends_with(".tar"),
            "`{}` holds archives, such as `{inner}`, as ILSVRC-2012's train archive does; unpack \
             it, and each class's archive into a folder of its name (see data/README.md)",
            path.display()
        );
        if cifar::recognise(&inner).is_some() {
            holds = Some(Holds::Cifar);
        } else if picture::has_extension(name) || Encoding::of(&entry.start()?).is_some() {
            holds = Some(Holds::Pictures);
        }
        Ok(holds.is_none())
    })?;
    holds.with_context(|| {
        format!(
            "`{}` holds neither JPEG or PNG pictures nor CIFAR's binary files; name another source \
             with {SOURCE}",
            path.display()
        )
    })
}

/// Reads the binary files of CIFAR.
///
/// # Errors
///
/// The archive is damaged, or see [`cifar::Files::read`].
pub fn read_cifar(path: &Path, format: Format, collection: &mut Collection) -> Result<()> {
    let mut files = cifar::Files::default();
    Archive::open(path)?.each(|entry| {
        let Ok(name) = &entry.name else { return Ok(true) };
        let name = folder::file_name(name);
        if cifar::recognise(&name).is_some() || cifar::lists_classes(&name) {
            match entry.read(cifar::BYTES_AT_MOST)? {
                Ok(bytes) => files.insert(name, bytes),
                Err(reason) => bail!("`{name}` {reason}: this is not CIFAR"),
            }
        }
        Ok(true)
    })?;
    ensure!(!files.is_empty(), "`{}` holds no binary files of CIFAR", path.display());
    files.read(format, collection)
}

/// Reads pictures, named by their path in the archive; each one's class is the folder it lies in.
///
/// # Errors
///
/// The archive is damaged, or its folders are not one layer of classes.
pub fn read_pictures(path: &Path, collection: &mut Collection) -> Result<()> {
    let mut folders: BTreeSet<PathBuf> = BTreeSet::new();
    Archive::open(path)?.each(|entry| {
        let path = match &entry.name {
            Ok(path) => path.clone(),
            Err((name, reason)) => {
                collection.ignored(name.clone(), reason.clone());
                return Ok(true);
            }
        };
        let name = unix(&path);
        if folder::file_name(&path).starts_with('.') {
            collection.ignored(name, "is hidden".into());
            return Ok(true);
        }
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let class = (!folder.as_os_str().is_empty()).then(|| folder::file_name(&folder));
        let wanted = class.as_ref().is_none_or(|class| collection.wants(class));
        if !wanted && picture::has_extension(&path) {
            folders.insert(folder);
            return Ok(true);
        }
        let bytes = entry.read(picture::BYTES_AT_MOST)?;
        let meant = picture::has_extension(&path)
            || matches!(&bytes, Ok(bytes) if Encoding::of(bytes).is_some());
        if !meant {
            collection.ignored(name, "is not a picture".into());
            return Ok(true);
        }
        folders.insert(folder);
        if wanted {
            let load = match bytes {
                Ok(bytes) => Load::Bytes(bytes),
                Err(reason) => Load::Broken(reason),
            };
            collection.file(name, class.as_deref(), Split::Train, load)?;
        }
        Ok(true)
    })?;
    check_layout(path, &folders)
}

/// All pictures in folders side by side, or none in a folder.
fn check_layout(archive: &Path, folders: &BTreeSet<PathBuf>) -> Result<()> {
    let archive = archive.display();
    let mut folders = folders.iter();
    let Some(first) = folders.next() else {
        bail!("`{archive}` holds no JPEG or PNG pictures; name another source with {SOURCE}")
    };
    for other in folders {
        ensure!(
            other.parent() == first.parent(),
            "the folders of `{archive}` do not lie side by side: it has pictures in `{}` and in \
             `{}`; class folders must share one folder: unpack it, and name that with {SOURCE}",
            unix(first),
            unix(other)
        );
    }
    Ok(())
}

/// A path with `/` between its parts, on every system.
fn unix(path: &Path) -> String {
    let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

/// An open archive.
struct Archive {
    path: PathBuf,
    tar: tar::Archive<Tail>,
    tail: Rc<RefCell<Vec<u8>>>,
}

/// A file of an archive.
struct Entry<'a, 'm> {
    /// Its path below the archive's root, or its name and why it is passed over.
    name: Result<PathBuf, (String, String)>,
    file: tar::Entry<'a, Tail>,
    /// For messages: the archive, and the entry's name as it stands there.
    archive: &'m Path,
    shown: &'m str,
}

impl Archive {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("opening `{}`", path.display()))?;
        let reader = decompressed(BufReader::with_capacity(1 << 16, file), path)?;
        let tail = Rc::new(RefCell::new(Vec::new()));
        let tar = tar::Archive::new(Tail { reader, tail: tail.clone() });
        Ok(Self { path: path.to_owned(), tar, tail })
    }

    /// Calls `visit` with every file until it says `false`.
    fn each(&mut self, mut visit: impl FnMut(Entry) -> Result<bool>) -> Result<()> {
        let path = &self.path;
        let mut last = String::new();
        for entry in self.tar.entries().with_context(|| damaged(path, &last))? {
            let file = entry.with_context(|| damaged(path, &last))?;
            last = String::from_utf8_lossy(&file.path_bytes()).into_owned();
            if !file.header().entry_type().is_dir() {
                let name = safe_path(&file).map_err(|reason| (last.clone(), reason));
                if !visit(Entry { name, file, archive: path, shown: &last })? {
                    return Ok(());
                }
            }
        }
        // An archive ends in blocks of zeros; one cut between two entries does not.
        ensure!(self.tail.borrow().iter().all(|&byte| byte == 0), damaged(path, &last));
        Ok(())
    }
}

/// The message about an archive that breaks off at the entry `last` or behind it.
fn damaged(archive: &Path, last: &str) -> String {
    let place = if last.is_empty() { String::new() } else { format!(" around `{last}`") };
    format!(
        "`{}` is not a tar archive, or is damaged or cut short{place}; get it again",
        archive.display()
    )
}

impl Entry<'_, '_> {
    /// The bytes, or why they are too many.
    fn read(self, limit: u64) -> Result<Result<Vec<u8>, String>> {
        let size = self.file.size();
        if size > limit {
            return Ok(Err(picture::too_many_bytes(size, limit)));
        }
        let bytes = self.bytes(size)?;
        Ok(Ok(bytes))
    }

    /// The first bytes.
    fn start(self) -> Result<Vec<u8>> {
        let length = self.file.size().min(16);
        self.bytes(length)
    }

    fn bytes(mut self, length: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let whole = match self.file.by_ref().take(length).read_to_end(&mut bytes) {
            Ok(read) if read as u64 != length => Err(io::ErrorKind::UnexpectedEof.into()),
            other => other,
        };
        whole.with_context(|| damaged(self.archive, self.shown))?;
        Ok(bytes)
    }
}

/// Where an entry would lie below the root, or why it has no place there.
fn safe_path(file: &tar::Entry<Tail>) -> Result<PathBuf, String> {
    match file.header().entry_type() {
        EntryType::Regular | EntryType::Continuous => {}
        EntryType::Symlink | EntryType::Link => return Err("is a link".into()),
        other => return Err(format!("is no plain file but {other:?}")),
    }
    let path = file.path().map_err(|_| "has a name that is not text")?;
    let mut safe = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => safe.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err("has a name that leads out of the archive".into());
            }
        }
    }
    match safe.as_os_str().is_empty() {
        true => Err("has no name".into()),
        false => Ok(safe),
    }
}

/// Passes bytes on and keeps the last block.
struct Tail {
    reader: Box<dyn Read>,
    tail: Rc<RefCell<Vec<u8>>>,
}

/// Archives are made of blocks of this many bytes.
const BLOCK: usize = 512;

impl Read for Tail {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        let mut tail = self.tail.borrow_mut();
        let fresh = &buffer[read.saturating_sub(BLOCK)..read];
        let excess = (tail.len() + fresh.len()).saturating_sub(BLOCK);
        tail.drain(..excess);
        tail.extend_from_slice(fresh);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::example::{
        assert_has, config, gzip, jpeg, png, prepare, put, refusal, scratch, tar,
    };

    /// Adds an entry as a header says, with whatever name and type.
    fn add(archive: &mut tar::Builder<Vec<u8>>, kind: EntryType, name: &[u8], bytes: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        archive.append(&header, bytes).expect("added");
    }

    #[test]
    fn an_archive_gives_the_images_of_its_folder() {
        let (_folder, path) = scratch();
        let files = [("cat/a.jpg", jpeg(0)), ("dog/b.png", png(1)), ("dog/c.png", png(2))];
        for (name, bytes) in &files {
            put(&path.join("folder").join(name), bytes);
        }
        let folder = prepare(&path.join("folder"), &config()).expect("sound");
        for (prefix, packed) in [("", false), ("./", false), ("top/train/", true)] {
            let names: Vec<String> =
                files.iter().rev().map(|(name, _)| format!("{prefix}{name}")).collect();
            let entries: Vec<(&str, &[u8])> =
                names.iter().zip(files.iter().rev()).map(|(n, (_, b))| (&**n, &**b)).collect();
            let archive = if packed { gzip(&tar(&entries)) } else { tar(&entries) };
            put(&path.join("archive"), &archive);
            let read = prepare(&path.join("archive"), &config()).expect("sound");
            assert_eq!(read.bytes, folder.bytes);
            assert_eq!(read.classes, folder.classes);
        }
    }

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
        for (start, name) in [(&b"BZh91"[..], "bzip2"), (b"PK\x03\x04", "zip")] {
            let error = decompressed(start, Path::new("x")).map(|_| ()).expect_err("unknown");
            assert_has(&error.to_string(), &[name, "unpack it", "--source"]);
        }
    }

    #[test]
    fn entries_that_lead_elsewhere_are_listed_and_not_read() {
        let (one, two) = (png(0), png(1));
        let mut archive = tar::Builder::new(Vec::new());
        add(&mut archive, EntryType::Regular, b"a/1.png", &one);
        add(&mut archive, EntryType::Regular, b"b/2.png", &two);
        let files: [(&[u8], &[u8]); 4] = [
            (b"../a/3.png", &png(2)),
            (b"/a/4.png", &png(3)),
            (b"a/../../5.png", &png(4)),
            (b"a/.6.png", &png(5)),
        ];
        for (name, bytes) in files {
            add(&mut archive, EntryType::Regular, name, bytes);
        }
        add(&mut archive, EntryType::Symlink, b"a/7.png", b"");
        add(&mut archive, EntryType::Link, b"a/8.png", b"");
        add(&mut archive, EntryType::Fifo, b"a/9.png", b"");
        add(&mut archive, EntryType::Regular, b"a/notes.txt", b"not a picture");
        let (_folder, path) = scratch();
        put(&path.join("x.tar"), &archive.into_inner().expect("whole"));
        let read = prepare(&path.join("x.tar"), &config()).expect("sound");
        assert_eq!(read.names.len(), 2);
        let ignored = read.skipped("ignored");
        let reason = |name: &str| {
            let found = ignored.iter().find(|(other, _)| other == name);
            found.unwrap_or_else(|| panic!("no {name} in {ignored:?}")).1.clone()
        };
        for name in ["../a/3.png", "/a/4.png", "a/../../5.png"] {
            assert_has(&reason(name), &["leads out"]);
        }
        assert_has(&reason("a/.6.png"), &["hidden"]);
        assert_has(&reason("a/7.png"), &["link"]);
        assert_has(&reason("a/8.png"), &["link"]);
        assert_has(&reason("a/9.png"), &["no plain file"]);
        assert_has(&reason("a/notes.txt"), &["not a picture"]);
        assert_eq!(ignored.len(), 8);
    }

    #[test]
    fn an_archive_cut_anywhere_is_refused() {
        let (_folder, path) = scratch();
        let path = path.join("x.tar");
        let whole = tar(&[("a/1.png", &png(0)), ("b/2.png", &png(1)), ("b/3.png", &png(2))]);
        put(&path, &whole);
        prepare(&path, &config()).expect("sound");
        for length in (0..whole.len() - 2 * BLOCK).step_by(97).chain([BLOCK, 2 * BLOCK, 4 * BLOCK])
        {
            put(&path, &whole[..length]);
            assert_has(&refusal(&path, &config()), &["x.tar"]);
        }
        put(&path, &gzip(&whole)[..200]);
        assert_has(&refusal(&path, &config()), &["x.tar", "damaged or cut short"]);
        put(&path, &[7; 3000]);
        assert_has(&refusal(&path, &config()), &["x.tar", "not a tar archive"]);
    }

    #[test]
    fn an_entry_too_large_to_be_a_picture_is_broken() {
        let mut archive = tar(&[("a/1.png", &png(0)), ("b/2.png", &png(1))]);
        archive.truncate(archive.len() - 2 * BLOCK);
        let mut header = tar::Header::new_gnu();
        header.set_path("b/3.png").expect("fits");
        header.set_size(picture::BYTES_AT_MOST + 1);
        header.set_cksum();
        archive.extend(header.as_bytes());
        let (_folder, path) = scratch();
        let path = path.join("x.tar");
        put(&path, &archive);
        let length = archive.len() as u64 + picture::BYTES_AT_MOST + 3 * BLOCK as u64;
        let file = std::fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.set_len(length)).expect("a sparse file");
        let read = prepare(&path, &Config { broken_share: 0.4, ..config() }).expect("sound");
        assert_has(&read.skipped("broken")[0].1, &["134217729 bytes, more than"]);
    }

    #[test]
    fn an_entry_that_says_it_is_huge_is_not_held_in_memory() {
        let mut header = tar::Header::new_gnu();
        header.set_path("a/1.png").expect("fits");
        header.set_size(1 << 40);
        header.set_cksum();
        let (_folder, path) = scratch();
        put(&path.join("x.tar"), header.as_bytes());
        assert_has(&refusal(&path.join("x.tar"), &config()), &["x.tar", "cut short"]);
    }

    #[test]
    fn folders_that_are_no_classes_are_refused() {
        let cases: [(&[&str], &[&str]); 5] = [
            (&["n02085936.tar", "n02086646.tar"], &["holds archives", "`n02085936.tar`"]),
            (&["train/a/1.png", "val/a/2.png"], &["side by side", "`train/a`", "`val/a`"]),
            (&["1.png", "a/2.png"], &["side by side", "`a`"]),
            (&["a/1.png", "a/2.png"], &["one class only, `a`"]),
            (&["notes.txt"], &["neither JPEG or PNG", "--source"]),
        ];
        for (names, parts) in cases {
            let (_folder, path) = scratch();
            let files: Vec<Vec<u8>> = (0..names.len()).map(png).collect();
            let entries: Vec<(&str, &[u8])> = names
                .iter()
                .zip(&files)
                .map(|(name, file)| (*name, if name.ends_with("txt") { b"text" } else { &**file }))
                .collect();
            put(&path.join("x.tar"), &tar(&entries));
            assert_has(&refusal(&path.join("x.tar"), &config()), parts);
        }
    }

    #[test]
    fn chosen_classes_alone_are_read() {
        let (_folder, path) = scratch();
        let path = path.join("x.tar");
        let files = [png(0), png(1), png(2)];
        put(&path, &tar(&[("a/1.png", &files[0]), ("b/2.png", &files[1]), ("c/3.png", &files[2])]));
        let chosen =
            |names: [&str; 2]| Config { classes: names.map(String::from).to_vec(), ..config() };
        assert_eq!(prepare(&path, &chosen(["c", "a"])).expect("sound").names.len(), 2);
        assert_has(&refusal(&path, &chosen(["a", "d"])), &["no class `d`", "`b`"]);
    }
}
