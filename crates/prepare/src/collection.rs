//! Collects the pictures of a source in the order in which its reader finds them.
//!
//! A reader passes everything it finds to a [`Sink`]. The [`Collection`] is the sink of a real run:
//! it decodes each picture once, writes its bytes and metadata to the [journal](crate::journal),
//! and finally calls [`assemble`] to sort them. It holds one batch of pictures at a time and
//! nothing that grows with their number. A resumed run iterates over the source again, but does not
//! read or decode what is already in the journal.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use data::Picture;
use data::images::StoredPicture;
use rayon::prelude::*;
use stage::progress::{Progress, Unit};
use stage::{Interrupted, Split};

use crate::assemble::{self, Assembled};
use crate::journal::{Journal, JournalEntry, What};
use crate::labels::MOST_CLASSES;
use crate::picture::{self, Budget, StoredForm};
use crate::{Config, Options};

/// Receives what the reader of a source finds. A reader must use the same order each time.
pub trait Sink {
    /// Whether the experiment keeps this class of the source.
    ///
    /// # Errors
    ///
    /// There are too many classes.
    fn wants(&mut self, class: &str) -> Result<bool>;

    /// Whether the next item was read before an interruption. Then its bytes need not be loaded:
    /// pass [`Load::Known`].
    fn is_known(&self) -> bool;

    /// The size limit for the file of one picture, in bytes.
    fn file_bytes(&self) -> u64;

    /// A folder for temporary files.
    fn folder(&self) -> &Path;

    /// Adds a picture, of a class that is wanted or of none.
    ///
    /// # Errors
    ///
    /// The source changed since the interruption, the user interrupts, or writing fails.
    fn picture(
        &mut self,
        name: String,
        class: Option<&str>,
        split: Split,
        load: Load,
    ) -> Result<()>;

    /// Records something in the source that is ignored.
    ///
    /// # Errors
    ///
    /// As [`Sink::picture`].
    fn ignored(&mut self, name: String, reason: String) -> Result<()>;
}

/// Where the bytes of a picture are.
#[derive(Debug)]
pub enum Load {
    /// In a file.
    File(PathBuf),
    /// Here, encoded as in a file.
    Bytes(Vec<u8>),
    /// Here, decoded.
    Pixels(Picture),
    /// They cannot be read, for this reason.
    Broken(String),
    /// Already in the journal.
    Known,
}

/// What a reader has passed on so far.
#[derive(Debug)]
pub struct Collection<'a> {
    config: &'a Config,
    options: &'a Options<'a>,
    out: &'a Path,
    budget: Budget,
    journal: Journal,
    /// How many items were passed on.
    handed: u64,
    broken: u64,
    /// Every class that the reader asked about.
    classes: BTreeSet<String>,
    pending: Vec<Pending>,
    pending_bytes: u64,
    progress: Progress,
}

#[derive(Debug)]
struct Pending {
    name: String,
    what: Waiting,
}

#[derive(Debug)]
enum Waiting {
    Picture { class: Option<String>, split: Split, load: Load },
    Ignored(String),
}

/// How many pictures are checked in one batch, by all threads.
const AT_A_TIME: usize = 64;

impl<'a> Collection<'a> {
    /// Opens a collection in the folder `out`, resuming an interrupted one of the same `identity`.
    /// `expected` is the number of pictures that the source states, for the progress display.
    pub fn open(
        config: &'a Config,
        options: &'a Options<'a>,
        out: &'a Path,
        identity: &str,
        expected: usize,
    ) -> Result<Self> {
        let journal = Journal::open(out, identity)?;
        if journal.known_records() > 0 {
            tracing::info!("resuming after {} pictures and files", journal.known_records());
        }
        Ok(Self {
            config,
            options,
            out,
            budget: Budget::of(options.memory),
            journal,
            handed: 0,
            broken: 0,
            classes: BTreeSet::new(),
            pending: Vec::new(),
            pending_bytes: 0,
            progress: Progress::new("reading pictures", expected as u64, Unit::Images(1)),
        })
    }

    /// Whether the whole source was read before an interruption, so that it need not be read
    /// again.
    pub fn is_whole(&self) -> bool {
        self.journal.has_ended()
    }

    fn hand_over(&mut self, name: String, what: Waiting) -> Result<()> {
        if (self.options.interrupted)() {
            self.journal.sync()?;
            return Err(Interrupted.into());
        }
        if let Some(known) = self.journal.next_known()? {
            ensure!(
                known.name == name,
                "the source changed since the interruption: where `{}` was there is now `{name}`; \
                 remove `{}` and prepare again",
                known.name,
                self.journal.folder().display()
            );
            self.handed += 1;
            self.broken += u64::from(matches!(known.what, What::Broken { .. }));
            return Ok(());
        }
        self.handed += 1;
        if let Waiting::Picture { load, .. } = &what {
            self.pending_bytes += match load {
                Load::Bytes(bytes) => bytes.len() as u64,
                Load::Pixels(picture) => picture.pixels.len() as u64,
                Load::File(_) | Load::Broken(_) | Load::Known => 0,
            };
        }
        self.pending.push(Pending { name, what });
        if self.pending.len() >= AT_A_TIME || self.pending_bytes >= self.budget.waiting_bytes() {
            self.check_pending()?;
        }
        Ok(())
    }

    /// Decodes the pending pictures on all threads and writes them to the journal in arrival order.
    fn check_pending(&mut self) -> Result<()> {
        let (form, budget) = (StoredForm::of(self.config), &self.budget);
        let pending = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        let checked: Vec<(JournalEntry, Vec<u8>)> =
            pending.into_par_iter().map(|pending| pending.check(form, budget)).collect();
        for (record, bytes) in checked {
            self.broken += u64::from(matches!(record.what, What::Broken { .. }));
            self.journal.add(&record, &bytes)?;
        }
        self.journal.flush()?;
        let note = if self.broken == 0 { String::new() } else { format!("{} broken", self.broken) };
        self.progress.at(self.handed, &note);
        Ok(())
    }

    /// Writes the output files in content order: images, names, labels, and the skipped list.
    /// Returns the number of images and of classes among them.
    ///
    /// # Errors
    ///
    /// A class of the experiment is missing or has a wrong number of pictures, there is only one
    /// class, too many pictures are broken, or none is left. The user interrupts, or writing fails.
    /// Then no file is written.
    pub fn finish(mut self) -> Result<Assembled> {
        if !self.is_whole() {
            self.check_pending()?;
            if let Some(known) = self.journal.next_known()? {
                bail!(
                    "the source changed since the interruption: `{}` is no longer there; remove \
                     `{}` and prepare again",
                    known.name,
                    self.journal.folder().display()
                );
            }
            let what = What::End { classes: self.classes.into_iter().collect() };
            self.journal.add(&JournalEntry { name: String::new(), what }, &[])?;
            self.journal.flush()?;
        }
        drop(self.progress);
        assemble::assemble(self.config, self.options, &self.journal, self.out)
    }
}

impl Sink for Collection<'_> {
    fn wants(&mut self, class: &str) -> Result<bool> {
        if !self.classes.contains(class) {
            self.classes.insert(class.to_owned());
            ensure!(
                self.classes.len() <= MOST_CLASSES,
                "the source has more than {MOST_CLASSES} classes, one of them `{class}`: its labels \
                 are probably not the ground truth"
            );
        }
        Ok(self.config.keeps(class))
    }

    fn is_known(&self) -> bool {
        self.handed < self.journal.known_records()
    }

    fn file_bytes(&self) -> u64 {
        self.budget.file_bytes()
    }

    fn folder(&self) -> &Path {
        self.journal.folder()
    }

    fn picture(
        &mut self,
        name: String,
        class: Option<&str>,
        split: Split,
        load: Load,
    ) -> Result<()> {
        let class = class.map(str::to_owned);
        self.hand_over(name, Waiting::Picture { class, split, load })
    }

    fn ignored(&mut self, name: String, reason: String) -> Result<()> {
        self.hand_over(name, Waiting::Ignored(reason))
    }
}

impl Pending {
    fn check(self, form: StoredForm, budget: &Budget) -> (JournalEntry, Vec<u8>) {
        let Self { name, what } = self;
        let (class, split, load) = match what {
            Waiting::Ignored(reason) => {
                return (JournalEntry { name, what: What::Ignored { reason } }, Vec::new());
            }
            Waiting::Picture { class, split, load } => (class, split, load),
        };
        let source = match load {
            Load::File(path) => picture::read(&path, form, budget),
            Load::Bytes(bytes) => picture::check(bytes, form, budget),
            Load::Pixels(picture) => {
                StoredPicture::raw(picture, form.channels).map_err(|error| format!("{error:#}"))
            }
            Load::Broken(reason) => Err(reason),
            Load::Known => Err("is missing from the journal".into()),
        };
        match source {
            Ok(source) => {
                let row = source.row(split);
                let what = What::Picture {
                    id: row.id,
                    split,
                    encoding: row.encoding.code(),
                    size: row.size,
                    stored_id: row.stored_id,
                    stored_size: row.stored_size,
                    length: row.length,
                    class,
                };
                (JournalEntry { name, what }, source.into_bytes())
            }
            Err(reason) => {
                (JournalEntry { name, what: What::Broken { reason, class } }, Vec::new())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::{DynamicImage, ImageFormat};

    use super::*;
    use crate::Identical;
    use crate::example::{
        assert_has, colour, config, encoded, grey, jpeg, png, prepare, put, refusal, scratch,
    };

    #[test]
    fn renamed_and_reordered_files_give_the_same_images_byte_for_byte() {
        let (_folder, path) = scratch();
        for seed in 0..24 {
            let file = if seed % 3 == 0 { jpeg(seed) } else { png(seed) };
            put(&path.join(format!("first/{}/{seed:02}.png", ["cat", "dog"][seed % 2])), &file);
            put(&path.join(format!("second/{}/{}.jpg", ["z", "a"][seed % 2], 99 - seed)), &file);
        }
        // The same picture in both classes: their order must not depend on names either.
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
    fn images_at_most_keeps_the_first_by_content() {
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
    fn broken_pictures_are_skipped_and_listed_up_to_the_broken_share() {
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
        assert_has(&broken[3].1, &["GIF", "only JPEG, PNG and WebP"]);
        assert_has(&broken[4].1, &["is a web page"]);

        let fewer = Config { broken_share: 0.4, ..config() };
        let message = refusal(&path, &fewer);
        assert_has(&message, &["5 of 12", "40 %", "broken-share = 0.4", "`0/cut.jpg` is broken"]);
        let all = Config { broken_share: 0.99, classes: vec![], ..config() };
        put(&path.join("none/a.jpg"), b"");
        put(&path.join("none/b.jpg"), b"");
        assert_has(&refusal(&path.join("none"), &all), &["2 of 2"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_name_in_a_message_forges_no_line_and_moves_no_cursor() {
        let (_folder, path) = scratch();
        put(&path.join("0/x\nprepare: done\u{1b}[2J.jpg"), b"no picture");
        put(&path.join("0/a.png"), &png(1));
        put(&path.join("1/b.png"), &png(2));
        let message = refusal(&path, &config());
        assert_has(&message, &["1 of 3", r"`0/x\x0Aprepare: done\x1B[2J.jpg`"]);
        assert!(!message.contains('\n') && !message.contains('\u{1b}'), "{message}");
    }

    #[test]
    fn pictures_of_every_kind_are_converted_to_the_configured_channels() {
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
        large.and_then(|file| file.set_len(picture::MEMORY / 8 + 1)).expect("a sparse file");
        let read = prepare(&path, &Config { broken_share: 0.5, ..config() }).expect("sound");
        assert_has(&read.skipped("broken")[0].1, &["67108865 bytes, more than"]);
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
