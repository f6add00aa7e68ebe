//! Recognises and reads the content of an archive: pictures, or the published files of a data set.
//!
//! Pictures are in one folder per class (at any depth below common folders), in no folder at all,
//! or in one nested archive per class, like ILSVRC-2012's train archive. Photographs may lie at any
//! depth, as in a folder ([`read_photos`]). Otherwise the archive holds the binary files of CIFAR or
//! STL-10, or samples of [`webdataset`]. An entry that is not a regular file below the archive's root
//! is skipped and listed: links, devices, absolute names and names with `..`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use stage::Split;
use stage::console::printable;
use stage::files::RESULTS_MARK;

use crate::archive::{Member, each, each_of_tar};
use crate::collection::{Load, Sink};
use crate::folder::{HOLDS_RESULTS, SOURCE, log_no_classes};
use crate::labels::MOST_CLASSES;
use crate::names::{file_name, split_name};
use crate::{Format, cifar, picture, stl, webdataset};

/// The kind of content of an archive.
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

/// Recognises an archive by its first files below the folder `within`.
///
/// # Errors
///
/// The archive is damaged, or holds nothing that this crate can read.
pub fn recognise(path: &Path, within: &str) -> Result<Holds> {
    let mut glance = Glance::default();
    each(path, within, |member| glance.look_at(member))?;
    glance.conclude(path)
}

/// How many files are examined to distinguish class folders from samples of WebDataset: enough to
/// find a picture and its label in an archive in any order.
const MOST_LOOKED_AT: usize = 4096;

/// How many files are examined if there are pictures in two folders.
const LOOKED_AT_IN_CLASSES: usize = 64;

/// What is known about an archive so far.
#[derive(Default)]
struct Glance {
    /// Its content, once certain.
    holds: Option<Holds>,
    looked_at: usize,
    /// The first folder with pictures, and whether there are others.
    folder: Option<String>,
    has_more_folders: bool,
    /// Paths of pictures, and of `.cls` and labelled `.json` files, without their extensions.
    pictures: BTreeSet<String>,
    cls: BTreeSet<String>,
    json: BTreeSet<String>,
    /// The first skipped file, and the reason.
    left_out: Option<(String, &'static str)>,
}

impl Glance {
    /// Examines a file and returns whether to continue.
    fn look_at(&mut self, member: &mut dyn Member) -> Result<bool> {
        let name = match member.name().clone() {
            Ok(name) => name,
            Err((name, reason)) => {
                self.left_out.get_or_insert((name, reason));
                return Ok(true);
            }
        };
        let (folder, file) = split_name(&name);
        if self.folder.is_none() {
            self.holds = match file {
                file if cifar::recognise(file).is_some() => Some(Holds::Cifar),
                file if stl::recognise(file).is_some() => Some(Holds::Stl),
                // Archives of classes. Looking further is slow in a compressed archive.
                file if file.ends_with(".tar") && member.stream().is_some() => {
                    Some(Holds::Pictures)
                }
                _ => None,
            };
            if self.holds.is_some() {
                return Ok(false);
            }
        }
        let (stem, extension) = webdataset::stem_and_extension(&name);
        let is_first = self.folder.is_none();
        if picture::has_extension(file) || is_first && picture::is_start(&member.start()?) {
            self.has_more_folders |= self.folder.as_deref().is_some_and(|first| first != folder);
            self.folder.get_or_insert_with(|| folder.to_owned());
            self.pictures.insert(stem.to_owned());
        } else if extension.eq_ignore_ascii_case("cls") {
            self.cls.insert(stem.to_owned());
        } else if extension.eq_ignore_ascii_case("json")
            && webdataset::Sidecar::read(member)?.label.is_some()
        {
            self.json.insert(stem.to_owned());
        }
        if self.is_labelled(stem, &self.cls) {
            self.holds = Some(Holds::WebDataset);
            return Ok(false);
        }
        self.looked_at += usize::from(self.folder.is_some());
        let are_classes = self.has_more_folders && self.cls.is_empty();
        let most = if are_classes { LOOKED_AT_IN_CLASSES } else { MOST_LOOKED_AT };
        Ok(self.looked_at < most)
    }

    /// Whether one of `labels` belongs to a picture; `stem` is the last path seen.
    fn is_labelled(&self, stem: &str, labels: &BTreeSet<String>) -> bool {
        let mut keys = webdataset::keys(stem);
        let is_label_of_any = || {
            let with_point = format!("{stem}.");
            let next = self.pictures.range(with_point.clone()..).next();
            self.pictures.contains(stem) || next.is_some_and(|next| next.starts_with(&with_point))
        };
        self.pictures.contains(stem) && keys.any(|key| labels.contains(key))
            || labels.contains(stem) && is_label_of_any()
    }

    fn conclude(self, path: &Path) -> Result<Holds> {
        if let Some(holds) = self.holds {
            return Ok(holds);
        }
        if self.folder.is_none() {
            let shown = path.display();
            match self.left_out {
                Some((name, reason)) => bail!(
                    "`{shown}` holds nothing that can be read: `{}` {reason}; unpack the archive and \
                     pass the folder of its pictures with {SOURCE}",
                    printable(&name)
                ),
                None => bail!(
                    "`{shown}` holds neither JPEG, PNG or WebP pictures nor the binary files of CIFAR \
                     or STL-10; pass another source with {SOURCE}"
                ),
            }
        }
        // Class folders may also hold annotation files. A label in those is not the class.
        let has_labels = self.json.iter().any(|stem| self.is_labelled(stem, &self.json));
        Ok(match has_labels && !self.has_more_folders {
            true => Holds::WebDataset,
            false => Holds::Pictures,
        })
    }
}

/// Reads the binary files of CIFAR. Makes two passes over the archive, because the list of classes
/// comes after some of the pictures.
///
/// # Errors
///
/// The archive is damaged, or see [`cifar::CifarLayout`].
pub fn read_cifar(path: &Path, within: &str, format: Format, sink: &mut dyn Sink) -> Result<()> {
    let mut layout = cifar::CifarLayout::new(format);
    let file_of = |member: &mut dyn Member| {
        member.name().as_ref().ok().map(|name| split_name(name).1.to_owned())
    };
    each(path, within, |member| {
        let Some(file) = file_of(member) else { return Ok(true) };
        if cifar::lists_classes(&file) {
            layout.list(&file, member.read(1 << 16)?.map_err(anyhow::Error::msg)?);
        }
        layout.found(&file)?;
        Ok(true)
    })?;
    each(path, within, |member| {
        let Some(file) = file_of(member) else { return Ok(true) };
        if cifar::recognise(&file).is_some() {
            let size = member.size();
            let stream = member.stream().context("CIFAR's files come as a tar archive")?;
            layout.read(&file, size, stream, sink)?;
        }
        Ok(true)
    })
}

/// Reads the binary files of STL-10, also in two passes, because labels come after pictures.
///
/// # Errors
///
/// The archive is damaged, or see [`stl::StlLabels`].
pub fn read_stl(path: &Path, within: &str, sink: &mut dyn Sink) -> Result<()> {
    let mut labels = stl::StlLabels::default();
    let file_of = |member: &mut dyn Member| {
        member.name().as_ref().ok().map(|name| split_name(name).1.to_owned())
    };
    each(path, within, |member| {
        if let Some(file) = file_of(member).filter(|file| stl::is_small(file)) {
            labels.add(&file, member.read(1 << 20)?.map_err(anyhow::Error::msg)?);
        }
        Ok(true)
    })?;
    each(path, within, |member| {
        let Some(file) = file_of(member) else { return Ok(true) };
        if stl::recognise(&file).is_some() {
            let size = member.size();
            let stream = member.stream().context("STL-10's files come as a tar archive")?;
            labels.read(&file, size, stream, sink)?;
        }
        Ok(true)
    })
}

/// Reads the pictures below the folder `within`, named by their path from there. The class of each
/// is its folder. `classes` are those that the experiment keeps; empty keeps all.
///
/// # Errors
///
/// The archive is damaged, or its class folders are at different levels.
pub fn read_pictures(
    path: &Path,
    within: &str,
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    let mut walk = Walk::new(path.display().to_string(), within, classes, sink);
    each(path, within, |member| walk.visit(member, None))?;
    walk.check()
}

/// Reads the photographs below the folder `within`, at any depth. Their folders are classes only if they are side by
/// side, which a first pass over the archive finds out. As in a folder of photographs, archives and labels beside the
/// pictures are ignored, and so are folders with results of assort.
///
/// # Errors
///
/// The archive is damaged.
pub fn read_photos(path: &Path, within: &str, sink: &mut dyn Sink) -> Result<()> {
    let mut walk = Walk::new(path.display().to_string(), within, &[], sink);
    walk.survey(path)?;
    each(path, within, |member| walk.visit(member, None))?;
    walk.check()
}

/// Reads one archive per class, as ILSVRC-2012's train archive unpacks to.
///
/// # Errors
///
/// An archive is damaged.
pub fn read_class_archives(
    paths: &[PathBuf],
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    let mut walk = Walk::new(String::new(), "", classes, sink);
    for path in paths {
        walk.shown = path.display().to_string();
        let class = file_name(path);
        let class = class.strip_suffix(".tar").unwrap_or(&class);
        if walk.sink.wants(class)? {
            each(path, "", |member| walk.visit(member, Some(class)))?;
        }
    }
    walk.check()
}

/// Reads an archive of pictures.
struct Walk<'a> {
    shown: String,
    within: &'a str,
    classes: &'a [String],
    /// Whether the pictures are photographs, of which labels and archives beside them are no part.
    are_photos: bool,
    /// Whether the folders are classes.
    has_classes: bool,
    /// Folders with results of assort, which are skipped.
    results: BTreeSet<String>,
    /// The first picture and its class folder. All class folders must be beside that one.
    first: Option<(String, String)>,
    /// The first `.cls` file in the folder of a picture without a class.
    label_file: Option<String>,
    sink: &'a mut dyn Sink,
}

/// The class folder of a picture in this folder. Tiny-ImageNet has a folder `images` in each class folder.
fn class_folder(folder: &str) -> &str {
    folder.strip_suffix("/images").unwrap_or(folder)
}

impl<'a> Walk<'a> {
    fn new(shown: String, within: &'a str, classes: &'a [String], sink: &'a mut dyn Sink) -> Self {
        Self {
            shown,
            within: within.trim_matches('/'),
            classes,
            are_photos: false,
            has_classes: true,
            results: BTreeSet::new(),
            first: None,
            label_file: None,
            sink,
        }
    }

    /// Passes over an archive of photographs to find out which folders to skip, and whether the others are classes.
    fn survey(&mut self, path: &Path) -> Result<()> {
        // A picture in each folder.
        let mut folders: BTreeMap<String, String> = BTreeMap::new();
        each(path, self.within, |member| {
            match member.name().clone() {
                Ok(name) => {
                    let (folder, file) = split_name(&name);
                    let folder = class_folder(folder);
                    let is_new = folders.len() <= MOST_CLASSES && !folders.contains_key(folder);
                    if is_new
                        && (picture::has_extension(file) || picture::is_start(&member.start()?))
                    {
                        folders.insert(folder.to_owned(), name);
                    }
                }
                Err((name, _)) => {
                    if let (folder, RESULTS_MARK) = split_name(&name) {
                        self.results.insert(folder.to_owned());
                    }
                }
            }
            Ok(true)
        })?;
        folders.retain(|folder, _| self.results_above(folder).is_none());
        // Otherwise the archive may hold archives of classes.
        self.are_photos = !folders.is_empty();
        if let Err(error) = self.check_folders(&folders) {
            log_no_classes(&error);
            self.has_classes = false;
        }
        Ok(())
    }

    /// The folder of results that a folder is or is in. The archive as a whole is read, as is a folder with results
    /// that the user names.
    fn results_above(&self, folder: &str) -> Option<&str> {
        let is_above = |results: &&String| {
            let rest = folder.strip_prefix(results.as_str());
            !results.is_empty() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.results.iter().find(is_above).map(String::as_str)
    }

    /// Checks that these folders, each with a picture in it, are those of two classes or more, or that there is none.
    fn check_folders(&self, folders: &BTreeMap<String, String>) -> Result<()> {
        let Some((first, name)) = folders.first_key_value() else { return Ok(()) };
        ensure!(folders.len() <= MOST_CLASSES, "there are more than {MOST_CLASSES} folders");
        for (folder, other) in folders {
            self.check_layout((name, first), (other, folder))?;
        }
        ensure!(
            folders.len() > 1 || first.is_empty(),
            "all pictures are in one folder, `{}`",
            printable(first)
        );
        Ok(())
    }

    /// Reads a file. `archive_class` is the class of the archive that it is in, if any.
    fn visit(&mut self, member: &mut dyn Member, archive_class: Option<&str>) -> Result<bool> {
        let shown = |name: &str| match archive_class {
            Some(class) => format!("{class}/{name}"),
            None => name.to_owned(),
        };
        let (Ok(path) | Err((path, _))) = member.name();
        if let Some(results) = self.results_above(split_name(path).0) {
            let results = results.to_owned();
            self.sink.ignored(results, HOLDS_RESULTS.to_owned())?;
            return Ok(true);
        }
        let name = match member.name() {
            Ok(name) => name.clone(),
            Err((name, reason)) => {
                let folder = split_name(split_name(name).0).1;
                if archive_class.is_some() || folder.is_empty() || self.chooses(folder) {
                    self.sink.ignored(shown(name), (*reason).to_owned())?;
                }
                return Ok(true);
            }
        };
        let (folder, file) = split_name(&name);
        let may_be_archive = archive_class.is_none() && !self.are_photos;
        if may_be_archive && file.ends_with(".tar") && member.stream().is_some() {
            return self.visit_archive(member, file);
        }
        let folder = if archive_class.is_none() { class_folder(folder) } else { folder };
        let is_in_class = self.has_classes && !folder.is_empty();
        let class = archive_class.or(is_in_class.then(|| split_name(folder).1));
        let has_extension = picture::has_extension(file);
        if let Some(class) = class
            && !self.chooses(class)
        {
            // Recorded, so that a message can list the classes.
            if has_extension {
                self.sink.wants(class)?;
            }
            return Ok(true);
        }
        if !has_extension && !picture::is_start(&member.start()?) {
            if class.is_none()
                && !self.are_photos
                && webdataset::stem_and_extension(file).1 == "cls"
            {
                self.label_file.get_or_insert_with(|| name.clone());
            }
            self.sink.ignored(shown(&name), "is not a picture".into())?;
            return Ok(true);
        }
        match class {
            Some(class) => drop(self.sink.wants(class)?),
            None if self.classes.is_empty() => {}
            None => {
                self.sink.ignored(shown(&name), "is in no class folder".into())?;
                return Ok(true);
            }
        }
        let folder = archive_class.unwrap_or(folder);
        if let Some((first_name, first)) = &self.first
            && self.has_classes
        {
            self.check_layout((first_name, first), (&shown(&name), folder))?;
        }
        self.first.get_or_insert_with(|| (shown(&name), folder.to_owned()));
        let load = match self.sink.is_known() {
            true => Load::Known,
            false => match member.read(self.sink.file_bytes())? {
                Ok(bytes) => Load::Bytes(bytes),
                Err(reason) => Load::Broken(reason),
            },
        };
        self.sink.picture(shown(&name), class, Split::Train, load)?;
        Ok(true)
    }

    fn chooses(&self, class: &str) -> bool {
        self.classes.is_empty() || self.classes.iter().any(|chosen| chosen == class)
    }

    /// Reads the archive of one class, if that class is wanted.
    fn visit_archive(&mut self, member: &mut dyn Member, file: &str) -> Result<bool> {
        let class = file.strip_suffix(".tar").unwrap_or(file);
        if self.sink.wants(class)? {
            let shown = format!("{file} of {}", self.shown);
            let stream = member.stream().context("an archive in a zip file")?;
            each_of_tar(stream, &shown, &mut |inner| self.visit(inner, Some(class)))?;
        }
        Ok(true)
    }

    /// Checks that the class folders of two pictures are side by side, or that neither is in a folder. Takes name and
    /// class folder of each.
    fn check_layout(
        &self,
        (first_name, first): (&str, &str),
        (name, folder): (&str, &str),
    ) -> Result<()> {
        fn above(folder: &str) -> &str {
            split_name(folder).0
        }
        if first.is_empty() == folder.is_empty() && above(first) == above(folder) {
            return Ok(());
        }
        let within = self.within;
        // A folder above one of the two class folders, but not above the other.
        let hint =
            [(above(first), folder), (above(folder), first)].into_iter().find(|(above, other)| {
                !above.is_empty() && !format!("{other}/").starts_with(&format!("{above}/"))
            });
        let advice = match hint {
            Some((above, _)) => format!(
                "append the folder above the class folders to the archive, as in `{}#{}`",
                self.shown,
                if within.is_empty() { above.to_owned() } else { format!("{within}/{above}") }
            ),
            None => "put every picture directly into the folder of its class, or, without ground \
                     truth, none into a folder, and pack the archive again"
                .into(),
        };
        let place = |name: &str, folder: &str| match folder.is_empty() {
            true => format!("`{}` in no folder", printable(name)),
            false => format!("`{}` in `{}`", printable(name), printable(folder)),
        };
        bail!(
            "the pictures are not in folders side by side: {} and {}; {advice}",
            place(first_name, first),
            place(name, folder)
        )
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.first.is_some() || self.sink.is_known(),
            "`{}` holds no pictures{}; pass another source with {SOURCE}",
            self.shown,
            if self.classes.is_empty() { "" } else { " of the classes that the experiment names" }
        );
        if let Some(label_file) = &self.label_file {
            bail!(
                "`{}` holds labels of WebDataset, such as `{label_file}`, far from their pictures; pack \
                 it again with `tar --sort=name`, or set `format = \"webdataset\"`",
                self.shown
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {

    use tar::EntryType;

    use super::*;
    use crate::Config;
    use crate::example::{
        assert_has, config, gzip, jpeg, png, prepare, put, refusal, scratch, tar, zip,
    };

    use crate::tar_file::BLOCK;

    /// Adds an entry of any name and type.
    fn add(archive: &mut tar::Builder<Vec<u8>>, kind: EntryType, name: &[u8], bytes: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        header.set_cksum();
        archive.append(&header, bytes).expect("added");
    }

    #[test]
    fn an_archive_gives_the_same_images_as_its_folder() {
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
    fn entries_that_escape_from_the_archive_are_listed_and_not_read() {
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
        assert_has(&reason("a/9.png"), &["not a regular file"]);
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
    fn an_entry_with_a_huge_stated_size_is_not_held_in_memory() {
        let mut header = tar::Header::new_gnu();
        header.set_path("a/1.png").expect("fits");
        header.set_size(1 << 40);
        header.set_cksum();
        let (_folder, path) = scratch();
        put(&path.join("x.tar"), header.as_bytes());
        assert_has(&refusal(&path.join("x.tar"), &config()), &["x.tar", "cut short"]);
    }

    #[test]
    fn folders_that_are_not_classes_are_refused() {
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
    fn photos_of_an_archive_lie_at_any_depth_as_in_its_folder() {
        let photos = || Config { format: Format::Photos, ..config() };
        let nested = &["2023/summer/a.png", "2023/winter/b.png", "2024/c.png", "d.png"][..];
        for names in [
            nested,
            &["a.png", "2024/b.png", "2024/backup.tar", "0.cls"],
            &["all/a.png", "all/b.png", "all/notes.txt", "all/.hidden.png"],
            &[
                "holiday/1/a.png",
                "holiday/2/3/b.png",
                "holiday/page/.assort-results",
                "holiday/page/c.png",
            ],
            &["n1/a.png", "n2/b.png", "n2/images/c.png", "n2/notes.txt"],
            &["a.png", "b.png", "notes.txt"],
        ] {
            let (_folder, path) = scratch();
            let files: Vec<(&str, Vec<u8>)> = names
                .iter()
                .enumerate()
                .map(|(seed, name)| {
                    (*name, if name.ends_with(".png") { png(seed) } else { b"text".to_vec() })
                })
                .collect();
            for (name, bytes) in &files {
                put(&path.join("folder").join(name), bytes);
            }
            let folder = prepare(&path.join("folder"), &photos()).expect("sound");
            let entries: Vec<(&str, &[u8])> =
                files.iter().rev().map(|(name, bytes)| (*name, &**bytes)).collect();
            for archive in [tar(&entries), gzip(&tar(&entries)), zip(&entries)] {
                put(&path.join("archive"), &archive);
                let read = prepare(&path.join("archive"), &photos()).expect("sound");
                assert_eq!(read.bytes, folder.bytes, "{names:?}");
                assert_eq!(read.names, folder.names, "{names:?}");
                assert_eq!(read.classes, folder.classes, "{names:?}");
                assert_eq!(read.skipped, folder.skipped, "{names:?}");
            }
        }
        let (_folder, path) = scratch();
        let files: Vec<Vec<u8>> = (0..nested.len()).map(png).collect();
        let entries: Vec<(&str, &[u8])> =
            nested.iter().copied().zip(files.iter().map(Vec::as_slice)).collect();
        put(&path.join("x.tar"), &tar(&entries));
        let classes = ["summer", "winter"].map(String::from).to_vec();
        let chosen = prepare(&path.join("x.tar"), &Config { classes, ..photos() }).expect("sound");
        assert_eq!(chosen.class_names, ["summer", "winter"], "an experiment may ask for classes");
        assert_has(&refusal(&path.join("x.tar"), &config()), &["side by side"]);
        let of_archives = ["n1.tar", "n2.tar"];
        let inner: Vec<Vec<u8>> = files[..2].iter().map(|file| tar(&[("x.png", file)])).collect();
        let entries: Vec<(&str, &[u8])> =
            of_archives.into_iter().zip(inner.iter().map(Vec::as_slice)).collect();
        put(&path.join("x.tar"), &tar(&entries));
        let read = prepare(&path.join("x.tar"), &photos()).expect("sound");
        assert_eq!(
            read.class_names,
            ["n1", "n2"],
            "archives of classes have no pictures beside them"
        );
    }

    #[test]
    fn only_chosen_classes_are_read() {
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
