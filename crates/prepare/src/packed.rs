//! What an archive holds: pictures, or a data set in its published files.
//!
//! Pictures lie in one folder a class, below as many common folders as it likes, or without any
//! folder, or in an archive for each class as ILSVRC-2012's train archive has them. Or the archive
//! holds the binary files of CIFAR or STL-10, or the samples of [`webdataset`]. An entry that is not a
//! plain file below the archive's own root is passed over and listed: links, devices, absolute names
//! and names with `..`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use stage::Split;

use crate::archive::{Member, each, each_of_tar};
use crate::collection::{Load, Sink};
use crate::folder::SOURCE;
use crate::names::{file_name, split_name};
use crate::{Format, cifar, picture, stl, webdataset};

/// What an archive turns out to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// The binary files of CIFAR.
    Cifar,
    /// The binary files of STL-10.
    Stl,
    /// Samples of WebDataset.
    WebDataset,
    /// Pictures, or archives of pictures.
    Pictures,
}

/// How many files behind the first picture are looked at for what WebDataset puts beside it.
const LOOKED_AT: usize = 16;

/// Looks at an archive up to its first entries of use.
///
/// # Errors
///
/// It is no archive, is damaged, or holds nothing that is read.
pub fn recognise(path: &Path) -> Result<Holds> {
    let mut holds = None;
    let (mut keys, mut behind) = (Vec::new(), 0);
    each(path, |member| {
        let Ok(name) = member.name().clone() else { return Ok(true) };
        let file = split_name(&name).1;
        if holds.is_none() && cifar::recognise(file).is_some() {
            holds = Some(Holds::Cifar);
            return Ok(false);
        }
        if holds.is_none() && stl::recognise(file).is_some() {
            holds = Some(Holds::Stl);
            return Ok(false);
        }
        let (key, extension) = webdataset::key_and_extension(&name);
        let is_picture = picture::has_extension(&name);
        if webdataset::is_sidecar(extension) || is_picture {
            let other =
                |(known, was_picture): &(String, bool)| known == key && *was_picture != is_picture;
            if keys.iter().any(other) {
                holds = Some(Holds::WebDataset);
                return Ok(false);
            }
            keys.push((key.to_owned(), is_picture));
        }
        if holds.is_none() {
            if file.ends_with(".tar") && member.stream().is_some() {
                // Nothing more is to be learnt, and to skip archives in a packed one takes long.
                holds = Some(Holds::Pictures);
                return Ok(false);
            }
            if is_picture || picture::is_start(&member.start()?) {
                holds = Some(Holds::Pictures);
            }
        }
        behind += usize::from(holds.is_some());
        keys.truncate(LOOKED_AT);
        Ok(behind < LOOKED_AT)
    })?;
    holds.with_context(|| {
        format!(
            "`{}` holds neither JPEG, PNG or WebP pictures nor the binary files of CIFAR or STL-10; \
             name another source with {SOURCE}",
            path.display()
        )
    })
}

/// Reads the binary files of CIFAR. The archive is walked through twice, because the list of
/// classes comes behind some of the pictures.
///
/// # Errors
///
/// The archive is damaged, or see [`cifar::Layout`].
pub fn read_cifar(path: &Path, format: Format, sink: &mut dyn Sink) -> Result<()> {
    let mut layout = cifar::Layout::new(format);
    let file_of = |member: &mut dyn Member| {
        member.name().as_ref().ok().map(|name| split_name(name).1.to_owned())
    };
    each(path, |member| {
        let Some(file) = file_of(member) else { return Ok(true) };
        if cifar::lists_classes(&file) {
            layout.list(&file, member.read(1 << 16)?.map_err(anyhow::Error::msg)?);
        }
        layout.found(&file)?;
        Ok(true)
    })?;
    each(path, |member| {
        let Some(file) = file_of(member) else { return Ok(true) };
        if cifar::recognise(&file).is_some() {
            let size = member.size();
            let stream = member.stream().context("CIFAR's files come as a tar archive")?;
            layout.read(&file, size, stream, sink)?;
        }
        Ok(true)
    })
}

/// Reads the binary files of STL-10, also in two walks: labels come behind pictures.
///
/// # Errors
///
/// The archive is damaged, or see [`stl::Labels`].
pub fn read_stl(path: &Path, sink: &mut dyn Sink) -> Result<()> {
    let mut labels = stl::Labels::default();
    let file_of = |member: &mut dyn Member| {
        member.name().as_ref().ok().map(|name| split_name(name).1.to_owned())
    };
    each(path, |member| {
        if let Some(file) = file_of(member).filter(|file| stl::is_small(file)) {
            labels.add(&file, member.read(1 << 20)?.map_err(anyhow::Error::msg)?);
        }
        Ok(true)
    })?;
    each(path, |member| {
        let Some(file) = file_of(member) else { return Ok(true) };
        if stl::recognise(&file).is_some() {
            let size = member.size();
            let stream = member.stream().context("STL-10's files come as a tar archive")?;
            labels.read(&file, size, stream, sink)?;
        }
        Ok(true)
    })
}

/// Reads pictures, named by their path in the archive; each one's class is the folder it lies in.
/// Only what lies below the folder `within` counts, and its path is left out of the names.
///
/// # Errors
///
/// The archive is damaged, or its folders are not one layer of classes.
pub fn read_pictures(path: &Path, within: &str, sink: &mut dyn Sink) -> Result<()> {
    let mut walk = Walk { shown: path.display().to_string(), first: None, sink };
    let within = within.trim_matches('/');
    each(path, |member| {
        let below = match member.name() {
            Ok(name) if !within.is_empty() => {
                let below = name.strip_prefix(within).and_then(|name| name.strip_prefix('/'));
                let Some(below) = below else { return Ok(true) };
                Some(below.to_owned())
            }
            _ => None,
        };
        walk.visit(member, below, None)
    })?;
    walk.check_any()
}

/// Reads the archives of a folder, one a class, as ILSVRC-2012's train archive unpacks to.
///
/// # Errors
///
/// An archive is damaged.
pub fn read_class_archives(paths: &[PathBuf], sink: &mut dyn Sink) -> Result<()> {
    let mut walk = Walk { shown: String::new(), first: None, sink };
    for path in paths {
        walk.shown = path.display().to_string();
        let class = file_name(path);
        let class = class.strip_suffix(".tar").unwrap_or(&class);
        if walk.sink.wants(class)? {
            each(path, |member| walk.visit(member, None, Some(class)))?;
        }
    }
    walk.check_any()
}

/// A walk through an archive of pictures.
struct Walk<'a> {
    shown: String,
    /// The first folder with pictures: all others must lie beside it.
    first: Option<String>,
    sink: &'a mut dyn Sink,
}

impl Walk<'_> {
    /// Takes a file: `below` is its name if that is another than its own, `class` that of the
    /// archive of one class which it lies in.
    fn visit(
        &mut self,
        member: &mut dyn Member,
        below: Option<String>,
        class: Option<&str>,
    ) -> Result<bool> {
        let name = match (member.name(), below) {
            (Ok(_), Some(below)) => below,
            (Ok(name), None) => name.clone(),
            (Err((name, reason)), _) => {
                self.sink.ignored(name.clone(), reason.clone())?;
                return Ok(true);
            }
        };
        let (folder, file) = split_name(&name);
        let shown_name = match class {
            Some(class) => format!("{class}/{file}"),
            None => name.clone(),
        };
        if file.starts_with('.') {
            self.sink.ignored(shown_name, "is hidden".into())?;
            return Ok(true);
        }
        if class.is_none() && file.ends_with(".tar") && member.stream().is_some() {
            return self.visit_archive(member, file);
        }
        // Tiny-ImageNet has a folder `images` within that of each class.
        let folder = match folder.strip_suffix("/images") {
            Some(above) if class.is_none() => above,
            _ => folder,
        };
        let class = class.or((!folder.is_empty()).then(|| split_name(folder).1));
        let is_wanted = match class {
            Some(class) => self.sink.wants(class)?,
            None => true,
        };
        let has_extension = picture::has_extension(file);
        if !is_wanted && has_extension {
            return Ok(true);
        }
        if !has_extension && !picture::is_start(&member.start()?) {
            self.sink.ignored(shown_name, "is not a picture".into())?;
            return Ok(true);
        }
        if !is_wanted {
            return Ok(true);
        }
        self.check_layout(folder)?;
        let load = match self.sink.is_known() {
            true => Load::Known,
            false => match member.read(self.sink.file_bytes())? {
                Ok(bytes) => Load::Bytes(bytes),
                Err(reason) => Load::Broken(reason),
            },
        };
        self.sink.picture(shown_name, class, Split::Train, load)?;
        Ok(true)
    }

    /// Takes the archive of one class, if that is wanted.
    fn visit_archive(&mut self, member: &mut dyn Member, file: &str) -> Result<bool> {
        let class = file.strip_suffix(".tar").unwrap_or(file);
        if self.sink.wants(class)? {
            let shown = format!("{file} of {}", self.shown);
            let stream = member.stream().context("an archive in a zip file")?;
            each_of_tar(stream, &shown, &mut |inner| self.visit(inner, None, Some(class)))?;
        }
        Ok(true)
    }

    /// All pictures lie in folders side by side, or none in a folder.
    fn check_layout(&mut self, folder: &str) -> Result<()> {
        let first = self.first.get_or_insert_with(|| folder.to_owned());
        let is_flat = |folder: &str| folder.is_empty();
        ensure!(
            is_flat(first) == is_flat(folder) && split_name(first).0 == split_name(folder).0,
            "the folders of `{0}` do not lie side by side: it has pictures in `{first}` and in \
             `{folder}`; class folders must share one folder: name that behind the archive, as in \
             `{0}#{1}`",
            self.shown,
            split_name(first).0
        );
        Ok(())
    }

    fn check_any(&self) -> Result<()> {
        ensure!(
            self.first.is_some() || self.sink.is_known(),
            "`{}` holds no pictures of the classes that are wanted; name another source with {SOURCE}",
            self.shown
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {

    use tar::EntryType;

    use super::*;
    use crate::Config;
    use crate::example::{
        assert_has, config, gzip, jpeg, png, prepare, put, refusal, scratch, tar,
    };

    use crate::tar_file::BLOCK;

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
        header.set_size(picture::MEMORY / 8 + 1);
        header.set_cksum();
        archive.extend(header.as_bytes());
        let (_folder, path) = scratch();
        let path = path.join("x.tar");
        put(&path, &archive);
        let length = archive.len() as u64 + picture::MEMORY / 8 + 3 * BLOCK as u64;
        let file = std::fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.set_len(length)).expect("a sparse file");
        let read = prepare(&path, &Config { broken_share: 0.4, ..config() }).expect("sound");
        assert_has(&read.skipped("broken")[0].1, &["67108865 bytes, more than"]);
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
        let cases: [(&[&str], &[&str]); 4] = [
            (&["train/a/1.png", "val/a/2.png"], &["side by side", "`train/a`", "`val/a`"]),
            (&["1.png", "a/2.png"], &["side by side", "`a`"]),
            (&["a/1.png", "a/2.png"], &["one class only, `a`"]),
            (&["notes.txt"], &["neither JPEG, PNG or WebP", "--source"]),
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
