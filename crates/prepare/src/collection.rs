//! The pictures of a source, gathered in whatever order it gives them, written in order of content.
//!
//! Order is where ground truth leaks: sources are sorted by class, and file names tell classes. So
//! a picture's row depends on its bytes alone. Pictures with equal bytes lie side by side, and
//! which of them is which moves only names and labels: a data set renamed and sorted anew gives
//! the same images file, byte for byte.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use data::images::{Added, Id, Identical, Source, Writer, Written};
use data::{Labels, Names, Picture};
use rayon::prelude::*;
use serde::Serialize;
use stage::progress::Progress;
use stage::{Split, files};

use crate::{Config, IMAGES, LABELS, NAMES, SKIPPED, picture};

/// Where the bytes of a picture's file are.
#[derive(Debug)]
pub enum Load {
    /// In a file.
    File(PathBuf),
    /// Here.
    Bytes(Vec<u8>),
    /// Nowhere, for this reason.
    Broken(String),
}

/// `skipped.json`: what is in the source, but not, or not only once, among the images.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Pictures that do not decode.
    pub broken: Vec<Reason>,
    /// Files that are no pictures, and entries that are not looked at.
    pub ignored: Vec<Reason>,
    /// Pictures with the bytes of an earlier one: kept or dropped, as the experiment says.
    pub identical: Vec<Reason>,
}

/// A name in the source and a phrase that follows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Reason {
    /// Place in the source.
    pub name: String,
    /// Such as "is empty".
    pub reason: String,
}

/// What a source has handed over so far.
#[derive(Debug)]
pub struct Collection<'a> {
    config: &'a Config,
    out: &'a Path,
    writer: Writer,
    /// Name and class of each picture by its ticket.
    named: Vec<(String, Option<String>)>,
    /// The first picture with these bytes.
    first: HashMap<Id, usize>,
    /// Every class the source asked about, with the number of its pictures handed over.
    classes: BTreeMap<String, usize>,
    pending: Vec<Pending>,
    pending_bytes: usize,
    skipped: Skipped,
    progress: Progress,
}

#[derive(Debug)]
struct Pending {
    name: String,
    class: Option<String>,
    split: Split,
    load: Load,
}

/// How many files are checked at a time, over all threads.
const AT_A_TIME: usize = 64;

/// How many bytes of files from an archive wait to be checked, about.
const BYTES_AT_A_TIME: usize = 1 << 26;

impl<'a> Collection<'a> {
    /// An empty collection for the folder `out`; `expected` is how many pictures the source says
    /// it has, for the person who waits.
    ///
    /// # Errors
    ///
    /// The folder cannot be written to.
    pub fn new(config: &'a Config, out: &'a Path, expected: usize) -> Result<Self> {
        Ok(Self {
            config,
            out,
            writer: Writer::create(&out.join(IMAGES), config.channels, config.identical)?,
            named: Vec::new(),
            first: HashMap::new(),
            classes: BTreeMap::new(),
            pending: Vec::new(),
            pending_bytes: 0,
            skipped: Skipped::default(),
            progress: Progress::new("reading pictures", expected as u64),
        })
    }

    /// Whether the experiment keeps this class of the source.
    pub fn wants(&mut self, class: &str) -> bool {
        if !self.classes.contains_key(class) {
            self.classes.insert(class.to_owned(), 0);
        }
        self.config.keeps(class)
    }

    /// A picture given as pixels, of a class that is wanted.
    ///
    /// # Errors
    ///
    /// The disk refuses.
    pub fn raw(&mut self, name: String, class: &str, split: Split, raw: Picture) -> Result<()> {
        self.count(Some(class));
        let source = Source::raw(raw, self.config.channels)?;
        self.add(name, Some(class.to_owned()), split, &source)?;
        if self.named.len().is_multiple_of(1024) {
            self.show_progress();
        }
        Ok(())
    }

    /// A picture given as a file, of a class that is wanted or of none.
    ///
    /// # Errors
    ///
    /// The disk refuses.
    pub fn file(
        &mut self,
        name: String,
        class: Option<&str>,
        split: Split,
        load: Load,
    ) -> Result<()> {
        self.count(class);
        if let Load::Bytes(bytes) = &load {
            self.pending_bytes += bytes.len();
        }
        self.pending.push(Pending { name, class: class.map(str::to_owned), split, load });
        if self.pending.len() >= AT_A_TIME || self.pending_bytes >= BYTES_AT_A_TIME {
            self.check_pending()?;
        }
        Ok(())
    }

    /// Something in the source that is not looked at.
    pub fn ignored(&mut self, name: String, reason: String) {
        self.skipped.ignored.push(Reason { name, reason });
    }

    fn count(&mut self, class: Option<&str>) {
        if let Some(class) = class {
            *self.classes.entry(class.to_owned()).or_default() += 1;
        }
    }

    /// Decodes what waits, on all threads, and adds it in the order in which it came.
    fn check_pending(&mut self) -> Result<()> {
        let channels = self.config.channels;
        let pending = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        let checked: Vec<_> =
            pending.into_par_iter().map(|pending| pending.check(channels)).collect();
        for (name, class, split, source) in checked {
            match source {
                Ok(source) => self.add(name, class, split, &source)?,
                Err(reason) => self.skipped.broken.push(Reason { name, reason }),
            }
        }
        self.show_progress();
        Ok(())
    }

    fn add(
        &mut self,
        name: String,
        class: Option<String>,
        split: Split,
        source: &Source,
    ) -> Result<()> {
        if let Some(&first) = self.first.get(&source.id()) {
            let reason = format!("has the same bytes as `{}`", self.named[first].0);
            self.skipped.identical.push(Reason { name: name.clone(), reason });
        }
        if let Added::Kept(ticket) = self.writer.add(source, split)? {
            self.first.entry(source.id()).or_insert(ticket);
            self.named.push((name, class));
        }
        Ok(())
    }

    fn show_progress(&mut self) {
        let broken = self.skipped.broken.len();
        let note = if broken == 0 { String::new() } else { format!("{broken} broken") };
        self.progress.at((self.named.len() + broken) as u64, &note);
    }

    /// Writes what was handed over, in order of content: images, names, labels, and what was
    /// skipped. Returns the number of images and of classes among them.
    ///
    /// # Errors
    ///
    /// A class that the experiment names is not there, a class has another number of pictures than
    /// the experiment says, there is one class only, too many pictures are broken, or none is left;
    /// then nothing is written. Or the disk refuses.
    pub fn finish(mut self) -> Result<(usize, usize)> {
        self.check_pending()?;
        self.check_classes()?;
        self.check_broken()?;
        let Self { writer, out, named, mut skipped, .. } = self;
        let at_most = Some(self.config.images_at_most).filter(|&most| most > 0);
        let written = writer.finish(at_most)?;
        skipped.broken.sort();
        skipped.ignored.sort();
        skipped.identical.sort();
        let counts = write_beside(out, &written, &named, &skipped);
        if counts.is_err() {
            // Not one of the files is of use without the others.
            for name in [IMAGES, NAMES, LABELS, SKIPPED] {
                let _ = fs::remove_file(out.join(name));
            }
        }
        counts
    }

    fn check_classes(&self) -> Result<()> {
        for class in &self.config.classes {
            let some: Vec<&str> = self.classes.keys().take(4).map(String::as_str).collect();
            ensure!(
                self.classes.contains_key(class),
                "the source has no class `{class}`; some of its {} classes are `{}`: correct \
                 `classes`, or name another source",
                self.classes.len(),
                some.join("`, `")
            );
        }
        let kept: Vec<(&str, usize)> = self
            .classes
            .iter()
            .filter(|(class, _)| self.config.keeps(class))
            .map(|(class, &count)| (class.as_str(), count))
            .collect();
        if let [(class, _)] = kept[..] {
            bail!(
                "the source has one class only, `{class}`; pictures without ground truth lie in no \
                 folder at all"
            );
        }
        self.config.check_images_per_class(&kept)
    }

    fn check_broken(&self) -> Result<()> {
        let (whole, broken) = (self.named.len(), &self.skipped.broken);
        let dropped = match self.config.identical {
            Identical::Drop => self.skipped.identical.len(),
            Identical::Keep => 0,
        };
        let all = whole + dropped + broken.len();
        ensure!(all > 0, "the source holds no pictures; name another one");
        if broken.len() as f64 > self.config.broken_share * all as f64 {
            let mut first: Vec<&Reason> = broken.iter().collect();
            first.sort();
            let first: Vec<String> = first
                .iter()
                .take(5)
                .map(|reason| format!("`{}` {}", reason.name, reason.reason))
                .collect();
            bail!(
                "{} of {all} pictures cannot be read, a larger share than `broken-share = {}`; \
                 mend or remove them, or raise the share: {}{}",
                broken.len(),
                self.config.broken_share,
                first.join("; "),
                if broken.len() > 5 { "; ..." } else { "" }
            );
        }
        ensure!(whole > 0, "none of the {all} pictures can be read; name another source");
        Ok(())
    }
}

/// Names and labels by row, and what was skipped. Returns the number of images and of classes.
fn write_beside(
    out: &Path,
    written: &Written,
    named: &[(String, Option<String>)],
    skipped: &Skipped,
) -> Result<(usize, usize)> {
    let images = written.data_set.images;
    let kept = || named.iter().zip(&written.rows).filter_map(|(named, row)| Some((named, (*row)?)));
    let classes = sorted(kept().filter_map(|((_, class), _)| class.as_deref()));
    let number: HashMap<&str, u32> = classes.iter().map(String::as_str).zip(0u32..).collect();
    let mut names = vec![String::new(); images];
    let mut labels = vec![None; images];
    for ((name, class), row) in kept() {
        names[row as usize].clone_from(name);
        labels[row as usize] = class.as_deref().map(|class| number[class]);
    }
    let count = classes.len();
    let data_set = written.data_set.clone();
    Names { data_set: data_set.clone(), names }.write(&out.join(NAMES))?;
    Labels { data_set, labels, classes }.write(&out.join(LABELS))?;
    let mut json = serde_json::to_string_pretty(skipped)?;
    json.push('\n');
    files::write(&out.join(SKIPPED), json.as_bytes())?;
    Ok((images, count))
}

/// The classes that occur, as a person sorts them: 2 before 10.
fn sorted<'a>(classes: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut classes: Vec<String> = classes.map(str::to_owned).collect();
    classes.sort_by_cached_key(|class| (class.parse::<u64>().unwrap_or(u64::MAX), class.clone()));
    classes.dedup();
    classes
}

impl Pending {
    fn check(self, channels: usize) -> (String, Option<String>, Split, Result<Source, String>) {
        let bytes = match self.load {
            Load::Bytes(bytes) => Ok(bytes),
            Load::Broken(reason) => Err(reason),
            Load::File(path) => picture::read(&path),
        };
        let source = bytes.and_then(|bytes| picture::check(bytes, channels));
        (self.name, self.class, self.split, source)
    }
}

#[cfg(test)]
mod tests {
    use image::{DynamicImage, ImageFormat};

    use super::*;
    use crate::example::{
        assert_has, colour, config, encoded, grey, jpeg, png, prepare, put, refusal, scratch,
    };

    #[test]
    fn a_data_set_renamed_and_sorted_anew_gives_the_same_images_byte_for_byte() {
        let (_folder, path) = scratch();
        for seed in 0..24 {
            let file = if seed % 3 == 0 { jpeg(seed) } else { png(seed) };
            put(&path.join(format!("first/{}/{seed:02}.png", ["cat", "dog"][seed % 2])), &file);
            put(&path.join(format!("second/{}/{}.jpg", ["z", "a"][seed % 2], 99 - seed)), &file);
        }
        // The same picture in both classes: which is which must not show either.
        for (name, class) in [("first/cat/x", "first/dog/y"), ("second/z/x", "second/a/y")] {
            put(&path.join(name).with_extension("png"), &png(77));
            put(&path.join(class).with_extension("png"), &png(77));
        }
        let first = prepare(&path.join("first"), &config()).expect("sound");
        let second = prepare(&path.join("second"), &config()).expect("sound");
        assert_eq!(first.bytes, second.bytes);
        assert_ne!(first.names, second.names);
        assert_eq!(first.class("cat/00.png"), Some("cat"));
        assert_eq!(first.row("cat/00.png"), second.row("z/99.jpg"));
        assert!(!first.classes.is_sorted(), "rows are not sorted by class");
        let drop = Config { identical: Identical::Drop, images_at_most: 7, ..config() };
        let first = prepare(&path.join("first"), &drop).expect("sound");
        assert_eq!(first.bytes, prepare(&path.join("second"), &drop).expect("sound").bytes);
    }

    #[test]
    fn identical_pictures_are_listed_and_kept_or_dropped() {
        let (_folder, path) = scratch();
        put(&path.join("a/1.png"), &png(0));
        put(&path.join("a/2.png"), &png(1));
        put(&path.join("b/3.png"), &png(0));
        let kept = prepare(&path, &config()).expect("sound");
        assert_eq!(kept.names.len(), 3);
        let same = ("b/3.png".to_owned(), "has the same bytes as `a/1.png`".to_owned());
        assert_eq!(kept.skipped("identical"), std::slice::from_ref(&same));
        assert_eq!(kept.picture("b/3.png"), kept.picture("a/1.png"));
        assert_eq!(kept.class("b/3.png"), Some("b"));
        let drop = Config { identical: Identical::Drop, ..config() };
        let dropped = prepare(&path, &drop).expect("sound");
        assert_eq!(dropped.skipped("identical"), [same]);
        let mut names = dropped.names.clone();
        names.sort();
        assert_eq!(names, ["a/1.png", "a/2.png"]);
        // A picture that was dropped is still one of those that could be read.
        put(&path.join("b/4.png"), b"");
        let quarter = Config { broken_share: 0.25, ..drop };
        assert_eq!(prepare(&path, &quarter).expect("1 of 4 is broken").names.len(), 2);
    }

    #[test]
    fn of_more_pictures_than_asked_for_the_first_by_content_are_kept() {
        let (_folder, path) = scratch();
        for seed in 0..9 {
            put(&path.join(format!("{}/{seed}.png", seed % 3)), &png(seed));
        }
        let all = prepare(&path, &config()).expect("sound");
        let some = Config { images_at_most: 4, ..config() };
        let some = prepare(&path, &some).expect("sound");
        assert_eq!(some.names, all.names[..4]);
        assert_eq!(some.classes, all.classes[..4]);
    }

    #[test]
    fn broken_pictures_are_skipped_and_listed_up_to_the_share_that_is_stated() {
        let (_folder, path) = scratch();
        for seed in 0..7 {
            put(&path.join(format!("{}/{seed}.jpg", seed % 2)), &jpeg(seed));
        }
        let (whole_jpeg, whole_png) = (jpeg(7), png(8));
        put(&path.join("0/cut.jpg"), &whole_jpeg[..whole_jpeg.len() - 30]);
        put(&path.join("0/cut.png"), &whole_png[..whole_png.len() - 30]);
        put(&path.join("1/empty.jpg"), b"");
        put(&path.join("1/page.jpg"), b"<!DOCTYPE html>");
        put(&path.join("1/moving.gif"), b"GIF89a, and so on");
        let half = Config { broken_share: 5.0 / 12.0, ..config() };
        let read = prepare(&path, &half).expect("5 of 12 are broken");
        assert_eq!(read.names.len(), 7);
        let broken = read.skipped("broken");
        let names: Vec<&str> = broken.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["0/cut.jpg", "0/cut.png", "1/empty.jpg", "1/moving.gif", "1/page.jpg"]);
        assert_has(&broken[0].1, &["is broken", "cut short"]);
        assert_has(&broken[1].1, &["is broken"]);
        assert_has(&broken[2].1, &["is empty"]);
        assert_has(&broken[3].1, &["GIF", "only JPEG and PNG"]);
        assert_has(&broken[4].1, &["neither a JPEG nor a PNG"]);

        let fewer = Config { broken_share: 0.4, ..config() };
        let message = refusal(&path, &fewer);
        assert_has(&message, &["5 of 12", "broken-share = 0.4", "`0/cut.jpg` is broken", "mend"]);
        let all = Config { broken_share: 0.99, classes: vec![], ..config() };
        put(&path.join("none/a.jpg"), b"");
        put(&path.join("none/b.jpg"), b"");
        assert_has(&refusal(&path.join("none"), &all), &["2 of 2"]);
    }

    #[test]
    fn pictures_of_every_kind_become_the_channels_that_are_asked_for() {
        let (_folder, path) = scratch();
        let kinds: [(&str, DynamicImage); 6] = [
            ("grey.png", grey(0)),
            ("grey16.png", grey(1).into_luma16().into()),
            ("grey-alpha.png", grey(2).into_luma_alpha8().into()),
            ("colour.png", colour(3)),
            ("colour16.png", colour(4).into_rgb16().into()),
            ("colour-alpha.png", colour(5).into_rgba8().into()),
        ];
        for (name, picture) in &kinds {
            put(&path.join(name), &encoded(picture, ImageFormat::Png));
        }
        put(&path.join("grey.jpg"), &encoded(&grey(6), ImageFormat::Jpeg));
        let in_colour = prepare(&path, &config()).expect("sound");
        let in_grey = prepare(&path, &Config { channels: 1, ..config() }).expect("sound");
        for (name, picture) in &kinds {
            let read = in_colour.picture(name);
            assert_eq!((read.height, read.width, read.channels), (4, 6, 3));
            assert_eq!(read.pixels, picture.to_rgb8().into_raw(), "{name}");
            let read = in_grey.picture(name);
            assert_eq!((read.height, read.width, read.channels), (4, 6, 1));
            if name.starts_with("grey") {
                assert_eq!(read.pixels, picture.to_luma8().into_raw(), "{name}");
            }
        }
        assert_eq!(in_colour.picture("grey.jpg").channels, 3);
        assert_eq!(in_grey.picture("grey.jpg").channels, 1);
    }

    #[test]
    fn a_file_too_large_to_be_a_picture_is_not_read() {
        let (_folder, path) = scratch();
        put(&path.join("a.png"), &png(0));
        put(&path.join("large.png"), &png(1));
        let large = fs::OpenOptions::new().write(true).open(path.join("large.png"));
        large.and_then(|file| file.set_len(picture::BYTES_AT_MOST + 1)).expect("a sparse file");
        let read = prepare(&path, &Config { broken_share: 0.5, ..config() }).expect("sound");
        assert_has(&read.skipped("broken")[0].1, &["134217729 bytes, more than"]);
    }

    #[test]
    fn a_picture_that_claims_to_be_huge_is_broken() {
        let (_folder, path) = scratch();
        for seed in 0..2 {
            put(&path.join(format!("{seed}.png")), &png(seed));
        }
        // The header of a PNG file of 4 x 6 pixels, rewritten to 2^20 x 2^20 with its checksum.
        let mut huge = png(2);
        huge[16..24].copy_from_slice(&[0, 16, 0, 0, 0, 16, 0, 0]);
        let mut crc = flate2::Crc::new();
        crc.update(&huge[12..29]);
        huge[29..33].copy_from_slice(&crc.sum().to_be_bytes());
        put(&path.join("huge.png"), &huge);
        let read = prepare(&path, &Config { broken_share: 0.5, ..config() }).expect("sound");
        assert_has(&read.skipped("broken")[0].1, &["1048576×1048576", "more than"]);
    }
}
