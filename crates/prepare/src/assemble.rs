//! Sorts the collected pictures by content and writes the output files.
//!
//! Row order can leak ground truth: sources are sorted by class, and file names contain classes. So
//! a picture's row depends on its bytes alone. Identical pictures are adjacent, and their order
//! affects only names and labels. A data set whose files are renamed and reordered gives a
//! byte-identical images file.
//!
//! Memory grows by one bit per picture only: the journal is streamed record by record and sorted on
//! disk ([`sorter`](crate::sorter)).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use data::images::{Id, PictureRow, SortedWriter};
use data::picture::Encoding;
use data::{labels, names};
use serde::Serialize;
use sha2::{Digest, Sha256};
use stage::console::{counted, printable};
use stage::{Interrupted, Split, files};

use crate::journal::{Journal, What};
use crate::labels::MOST_CLASSES;
use crate::sorter::Sorter;
use crate::{Config, Format, IMAGES, Identical, LABELS, NAMES, Options, SKIPPED};

/// The size of the data set that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assembled {
    /// Pictures in the images file.
    pub images: usize,
    /// Classes among them.
    pub classes: usize,
}

/// The lists of `skipped.json`, in file order: pictures that cannot be decoded; files that are not
/// pictures, and ignored entries; pictures with the same bytes as an earlier one, kept or dropped
/// as the experiment says.
const LISTS: [&str; 3] = ["broken", "ignored", "identical"];
const BROKEN: u8 = 0;
const IGNORED: u8 = 1;
const IDENTICAL: u8 = 2;

/// Why an archive entry is skipped if a later one has the same name.
const TWICE: &str = "occurs more than once: the last one counts";

/// An entry of `skipped.json`: a name in the source and a phrase that follows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Reason<'a> {
    name: &'a str,
    reason: &'a str,
}

/// Reads the journal and writes the files into `out`, all of them or none.
///
/// # Errors
///
/// See [`Collection::finish`](crate::collection::Collection::finish).
pub fn assemble(
    config: &Config,
    options: &Options,
    journal: &Journal,
    out: &Path,
) -> Result<Assembled> {
    let assembler = Assembler { config, options, journal, out };
    let twice = assembler.find_names_twice()?;
    let counted = assembler.count(&twice)?;
    let written = assembler.write(counted);
    if written.is_err() {
        // Each file is useless without the others.
        for entry in fs::read_dir(out).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if [NAMES, LABELS, SKIPPED].contains(&&*name) || name.starts_with("images") {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    written
}

struct Assembler<'a> {
    config: &'a Config,
    options: &'a Options<'a>,
    journal: &'a Journal,
    out: &'a Path,
}

/// The result of one pass over the journal.
struct JournalCount {
    /// Pictures sorted by id, split and arrival; see [`SortedPicture::of`].
    pictures: Sorter,
    /// List, name and reason of each skipped entry.
    skipped: Sorter,
    /// The classes of the pictures, in order of first occurrence.
    classes: Vec<String>,
}

/// A parsed record of [`JournalCount::pictures`].
struct SortedPicture {
    row: PictureRow,
    start: u64,
    class: Option<u32>,
    name: String,
}

/// Marks a picture without a class.
const NO_CLASS: u32 = u32::MAX;

impl SortedPicture {
    /// Parses a record of id 32, split 1, arrival 8, encoding 1, height 4, width 4, length 8,
    /// start 8, class 4, stored height 4, stored width 4 and stored id 32 bytes, then the name. The
    /// first three decide the order.
    fn of(record: &[u8]) -> Result<Self> {
        let short = "a record of pictures is cut short";
        let array = |at: usize| record.get(at..at + 8).and_then(|b| <[u8; 8]>::try_from(b).ok());
        let long = |at: usize| array(at).map(u64::from_be_bytes).context(short);
        let (size, class, stored_size) = (long(42)?, long(66)?, long(70)?);
        let [id, stored_id]: [&[u8]; 2] =
            [record.get(..32).context(short)?, record.get(78..110).context(short)?];
        let pair = |size: u64| [(size >> 32) as u32, size as u32];
        let row = PictureRow {
            id: id.try_into()?,
            split: Split::from_code(record[32]).context("a split")?,
            encoding: Encoding::from_code(record[41]).context("an encoding")?,
            size: pair(size),
            stored_id: stored_id.try_into()?,
            stored_size: pair(stored_size),
            length: long(50)?,
        };
        let class = (class >> 32) as u32;
        let name = String::from_utf8_lossy(&record[110..]).into_owned();
        Ok(Self { row, start: long(58)?, class: (class != NO_CLASS).then_some(class), name })
    }
}

impl Assembler<'_> {
    fn check_interrupted(&self) -> Result<()> {
        if (self.options.interrupted)() { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Finds the records whose name occurs again later. Of archive entries with the same name the
    /// last counts, as it does when the archive is unpacked.
    fn find_names_twice(&self) -> Result<Bits> {
        let mut sorter = Sorter::new(self.journal.folder());
        let mut records = self.journal.read()?;
        let mut number = 0u64;
        while let Some(record) = records.next_record()? {
            if !matches!(record.what, What::Ignored { .. } | What::End { .. }) {
                let digest = Sha256::digest(record.name.as_bytes());
                sorter.push(&[&digest[..16], &number.to_be_bytes()])?;
            }
            number += 1;
        }
        let mut twice = Bits::new(number);
        let mut last: Vec<u8> = Vec::new();
        for record in sorter.sorted()? {
            let record = record?;
            if last.get(..16) == Some(&record[..16]) {
                twice.set(u64::from_be_bytes(last[16..24].try_into()?));
            }
            last = record;
        }
        Ok(twice)
    }

    /// Counts classes and broken pictures and checks them against the experiment.
    fn count(&self, twice: &Bits) -> Result<JournalCount> {
        let folder = self.journal.folder();
        let mut counted = JournalCount {
            pictures: Sorter::new(folder),
            skipped: Sorter::new(folder),
            classes: Vec::new(),
        };
        let mut tally = Tally::default();
        let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
        let mut records = self.journal.read()?;
        let (mut arrival, mut start) = (0u64, 0u64);
        while let Some(record) = records.next_record()? {
            let name = record.name.as_bytes();
            let is_twice = twice.get(arrival);
            arrival += 1;
            let length = match &record.what {
                What::Picture { length, .. } => *length,
                _ => 0,
            };
            match record.what {
                _ if is_twice => {
                    counted.skipped.push(&[&[IGNORED], name, &[0], TWICE.as_bytes()])?;
                }
                What::Picture {
                    id,
                    split,
                    encoding,
                    size,
                    stored_id,
                    stored_size,
                    length,
                    class,
                } => {
                    let class = match &class {
                        Some(class) => number_of(class, &mut numbers, &mut counted.classes)?,
                        None => NO_CLASS,
                    };
                    tally.count(counted.classes.get(class as usize));
                    counted.pictures.push(&[
                        &id,
                        &[split.code()],
                        &arrival.to_be_bytes(),
                        &[encoding],
                        &size[0].to_be_bytes(),
                        &size[1].to_be_bytes(),
                        &length.to_be_bytes(),
                        &start.to_be_bytes(),
                        &class.to_be_bytes(),
                        &stored_size[0].to_be_bytes(),
                        &stored_size[1].to_be_bytes(),
                        &stored_id,
                        name,
                    ])?;
                }
                What::Broken { reason, class } => {
                    tally.count(class.as_ref());
                    counted.skipped.push(&[&[BROKEN], name, &[0], reason.as_bytes()])?;
                    tally.count_broken(record.name, reason);
                }
                What::Ignored { reason } => {
                    counted.skipped.push(&[&[IGNORED], name, &[0], reason.as_bytes()])?;
                }
                What::End { classes } => tally.mention(classes),
            }
            start += length;
        }
        tally.check_classes(self.config)?;
        tally.check_broken(self.config)?;
        Ok(counted)
    }

    fn write(&self, counted: JournalCount) -> Result<Assembled> {
        let JournalCount { pictures, mut skipped, classes } = counted;
        let (config, folder) = (self.config, self.journal.folder());
        let mut images =
            SortedWriter::create(&self.out.join(IMAGES), config.channels, self.options.part_bytes)?;
        let mut names = names::NamesWriter::create_in(folder)?;
        let mut labels = labels::LabelsWriter::create_in(folder)?;
        let mut places = BufWriter::new(tempfile::tempfile_in(folder)?);
        let mut used = vec![false; classes.len()];
        let at_most = if config.images_at_most == 0 { usize::MAX } else { config.images_at_most };
        let mut count = 0;
        let mut first: Option<(Id, String)> = None;
        for record in pictures.sorted()? {
            let SortedPicture { row, start, class, name } = SortedPicture::of(&record?)?;
            let same = first.as_ref().filter(|(id, _)| *id == row.id);
            if let Some((_, first)) = same {
                let reason = format!("has the same bytes as `{first}`");
                skipped.push(&[&[IDENTICAL], name.as_bytes(), &[0], reason.as_bytes()])?;
                if config.identical == Identical::Drop {
                    continue;
                }
            } else {
                first = Some((row.id, name.clone()));
            }
            if count == at_most {
                continue;
            }
            count += 1;
            images.push(&row)?;
            names.push(&name)?;
            labels.push(class)?;
            if let Some(class) = class {
                used[class as usize] = true;
            }
            places.write_all(&start.to_le_bytes())?;
            places.write_all(&row.length.to_le_bytes())?;
            places.write_all(&row.stored_id)?;
            if count.is_multiple_of(1 << 12) {
                self.check_interrupted()?;
            }
        }
        let mut places = places.into_inner()?;
        places.rewind()?;
        let mut places = BufReader::new(places);
        let mut stored = self.journal.pictures()?;
        let data_set = images.finish(&mut |out| {
            self.check_interrupted()?;
            self.copy_next(&mut places, &mut stored, out)
        })?;
        names.finish(&data_set, &self.out.join(NAMES))?;
        let (numbers, classes) = sorted(classes, &used);
        labels.finish(&data_set, &self.out.join(LABELS), &numbers, &classes)?;
        let file = self.out.join(SKIPPED);
        write_skipped(&file, skipped)?.report(self.config.identical, &file);
        Ok(Assembled { images: data_set.images, classes: classes.len() })
    }

    /// Copies the picture that the next record of `places` points to.
    fn copy_next(
        &self,
        places: &mut impl Read,
        stored: &mut File,
        out: &mut dyn Write,
    ) -> Result<()> {
        let mut place = [0; 48];
        places.read_exact(&mut place)?;
        let [start, length] = [0, 8].map(|at| place[at..at + 8].try_into().map(u64::from_le_bytes));
        let mut bytes = Vec::new();
        stored.seek(SeekFrom::Start(start?))?;
        stored.take(length?).read_to_end(&mut bytes)?;
        // A power failure may leave a file of the right length that holds zeros.
        ensure!(
            Sha256::digest(&bytes)[..] == place[16..],
            "the pictures saved before an interruption are damaged; remove `{}` and prepare again",
            self.journal.folder().display()
        );
        Ok(out.write_all(&bytes)?)
    }
}

/// Returns the number of a class, assigning the next one to a new class.
fn number_of(
    class: &str,
    numbers: &mut BTreeMap<String, u32>,
    classes: &mut Vec<String>,
) -> Result<u32> {
    if let Some(&number) = numbers.get(class) {
        return Ok(number);
    }
    ensure!(classes.len() < MOST_CLASSES, "the source has more than {MOST_CLASSES} classes");
    let number = classes.len() as u32;
    numbers.insert(class.to_owned(), number);
    classes.push(class.to_owned());
    Ok(number)
}

/// Sorts the classes that occur, numbers by value (2 before 10). Also returns, for each index into
/// `classes`, the index after sorting.
fn sorted(classes: Vec<String>, used: &[bool]) -> (Vec<u32>, Vec<String>) {
    let mut order: Vec<usize> = (0..classes.len()).filter(|&class| used[class]).collect();
    order.sort_by_cached_key(|&class| {
        (classes[class].parse::<u64>().unwrap_or(u64::MAX), classes[class].clone())
    });
    let mut numbers = vec![u32::MAX; classes.len()];
    for (&class, number) in order.iter().zip(0..) {
        numbers[class] = number;
    }
    (numbers, order.into_iter().map(|class| classes[class].clone()).collect())
}

/// Writes `skipped.json`, list by list. A skipped folder of an archive is in `skipped` once per
/// file, but is written only once.
fn write_skipped(path: &Path, skipped: Sorter) -> Result<Skipped> {
    let mut counts = Skipped::default();
    files::replace(path, |file| {
        let mut out = BufWriter::new(file);
        let (mut list, mut is_first) = (0, true);
        write!(out, "{{\n  \"{}\": [", LISTS[0])?;
        let next_list = |out: &mut BufWriter<&mut File>, name: &str, is_first: bool| {
            let end = if is_first { "" } else { "\n  " };
            write!(out, "{end}],\n  \"{name}\": [")
        };
        let mut last = Vec::new();
        for record in skipped.sorted()? {
            let record = record?;
            if record == last && record[0] == IGNORED && !record.ends_with(TWICE.as_bytes()) {
                continue;
            }
            last.clone_from(&record);
            while list < usize::from(record[0]) {
                list += 1;
                next_list(&mut out, LISTS[list], is_first)?;
                is_first = true;
            }
            let text = &record[1..];
            // This crate writes the reasons; they have no zero byte.
            let end = text.iter().rposition(|&byte| byte == 0).context("a name and a reason")?;
            let [name, reason] = [&text[..end], &text[end + 1..]].map(String::from_utf8_lossy);
            counts.count(record[0], &reason);
            write!(out, "{}\n    ", if is_first { "" } else { "," })?;
            serde_json::to_writer(&mut out, &Reason { name: &name, reason: &reason })?;
            is_first = false;
        }
        for name in &LISTS[list + 1..] {
            next_list(&mut out, name, is_first)?;
            is_first = true;
        }
        writeln!(out, "{}]\n}}", if is_first { "" } else { "\n  " })?;
        Ok(out.flush()?)
    })?;
    Ok(counts)
}

/// Counts of skipped entries, by list and reason.
#[derive(Default)]
struct Skipped([BTreeMap<String, usize>; LISTS.len()]);

impl Skipped {
    /// Counts a reason without its file-specific parts: numbers, names and the decoder's message.
    fn count(&mut self, list: u8, reason: &str) {
        let common = reason.split([':', '`']).next().unwrap_or_default().trim_end();
        let words =
            common.split(' ').map(|word| match word.contains(|c: char| c.is_ascii_digit()) {
                true => "…",
                false => word,
            });
        let common = words.collect::<Vec<_>>().join(" ");
        *self.0[usize::from(list)].entry(common).or_default() += 1;
    }

    /// Logs the counts, and which file has the names.
    fn report(&self, identical: Identical, file: &Path) {
        let by_reason = |list: u8| {
            let counts = &self.0[usize::from(list)];
            let mut counts: Vec<_> =
                counts.iter().map(|(reason, count)| (*count, reason)).collect();
            counts.sort_by_key(|&(count, _)| std::cmp::Reverse(count));
            let texts = counts.iter().map(|(count, reason)| format!("{count} × {reason}"));
            texts.collect::<Vec<_>>().join(", ")
        };
        let count = |list: u8| self.0[usize::from(list)].values().sum::<usize>();
        if count(BROKEN) > 0 {
            let pictures = counted(count(BROKEN), "picture");
            tracing::warn!("cannot read {pictures}: {}", by_reason(BROKEN));
        }
        if count(IGNORED) > 0 {
            tracing::warn!("skipped files or folders: {}", by_reason(IGNORED));
        }
        if count(IDENTICAL) > 0 {
            let fate = if identical == Identical::Drop { "dropped" } else { "kept" };
            let pictures = counted(count(IDENTICAL), "picture");
            tracing::info!("identical to an earlier one, and {fate}: {pictures}");
        }
        if self.0.iter().any(|counts| !counts.is_empty()) {
            tracing::info!("`{}` lists them by name", file.display());
        }
    }
}

/// One bit for each record.
struct Bits(Vec<u64>);

impl Bits {
    fn new(bits: u64) -> Self {
        Self(vec![0; bits.div_ceil(64) as usize])
    }

    fn set(&mut self, bit: u64) {
        self.0[(bit / 64) as usize] |= 1 << (bit % 64);
    }

    fn get(&self, bit: u64) -> bool {
        self.0[(bit / 64) as usize] >> (bit % 64) & 1 == 1
    }
}

/// Counts of pictures: all, broken, and by class.
#[derive(Default)]
struct Tally {
    all: usize,
    broken: usize,
    /// The first few broken pictures by name, with the reasons.
    examples: BTreeSet<(String, String)>,
    /// Every class of the source, with its number of pictures.
    classes: BTreeMap<String, usize>,
}

/// Most broken pictures that an error message names.
const EXAMPLES: usize = 5;

impl Tally {
    fn count(&mut self, class: Option<&String>) {
        self.all += 1;
        match class {
            Some(class) if self.classes.contains_key(class) => {
                *self.classes.entry(class.clone()).or_default() += 1;
            }
            Some(class) => drop(self.classes.insert(class.clone(), 1)),
            None => {}
        }
    }

    fn count_broken(&mut self, name: String, reason: String) {
        self.broken += 1;
        self.examples.insert((name, reason));
        if self.examples.len() > EXAMPLES {
            self.examples.pop_last();
        }
    }

    fn mention(&mut self, classes: Vec<String>) {
        for class in classes {
            self.classes.entry(class).or_default();
        }
    }

    fn check_classes(&self, config: &Config) -> Result<()> {
        for class in &config.classes {
            let some: Vec<_> = self.classes.keys().take(4).map(|name| printable(name)).collect();
            ensure!(
                self.classes.contains_key(class),
                "the source has no class `{class}`; some of its {} classes are `{}`: correct \
                 `classes`, or use another source",
                self.classes.len(),
                some.join("`, `")
            );
        }
        let kept: Vec<(&str, usize)> = self
            .classes
            .iter()
            .filter(|(class, _)| config.keeps(class))
            .map(|(class, &count)| (class.as_str(), count))
            .collect();
        if let [(class, _)] = kept[..] {
            bail!(
                "the source has one class only, `{}`; if there is no ground truth, put the \
                 pictures into no folder",
                printable(class)
            );
        }
        config.check_images_per_class(&kept)
    }

    fn check_broken(&self, config: &Config) -> Result<()> {
        let Self { all, broken, .. } = *self;
        ensure!(all > 0, "the source holds no pictures; use another one");
        if broken as f64 > config.broken_share * all as f64 {
            let example = |(name, reason): &(String, String)| {
                format!("`{}` {}", printable(name), printable(reason))
            };
            let first: Vec<String> = self.examples.iter().map(example).collect();
            // Who groups photographs has no table to change.
            let raise = match config.format {
                Format::Photos => String::new(),
                _ => format!(", or raise `broken-share = {}`", config.broken_share),
            };
            bail!(
                "{broken} of {all} pictures cannot be read, more than the {} % that may be skipped; repair or \
                 remove them{raise}: {}{}",
                (1e4 * config.broken_share).round() / 100.,
                first.join("; "),
                if broken > first.len() { "; ..." } else { "" }
            );
        }
        ensure!(all > broken, "none of the {all} pictures can be read; use another source");
        Ok(())
    }
}
