//! Journals on disk what was read so far, so that an interrupted run can resume.
//!
//! The folder `unfinished` of the output has two files: `pictures` is the concatenated bytes of all
//! pictures, `journal` has a record for every item of the source, in the order of reading. A record
//! is its length and CRC-32 as little-endian 32-bit numbers, then JSON. The first is the identity
//! of the source and table; a journal of another identity is discarded. The journal ends at the
//! first record that is truncated or whose picture is, and everything after it is read again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use data::images::Id;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use stage::Split;
use stage::digest::hex;

/// The folder in the output that holds the two files.
pub const FOLDER: &str = "unfinished";

/// One item of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Its path in the source.
    pub name: String,
    /// What became of it.
    pub what: What,
}

/// What became of an item of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A picture, whose bytes are the next ones in `pictures`.
    Picture {
        /// SHA-256 of its own file or pixels.
        #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
        id: Id,
        /// The split of the data set that it belongs to.
        split: Split,
        /// The code of the encoding of its bytes.
        encoding: u8,
        /// Height and width.
        size: [u32; 2],
        /// SHA-256 of the stored bytes.
        #[serde(serialize_with = "write_id", deserialize_with = "read_id")]
        stored_id: Id,
        /// Height and width as it is stored.
        stored_size: [u32; 2],
        /// Stored bytes.
        length: u64,
        /// Its class, if known.
        class: Option<String>,
    },
    /// A picture that cannot be read.
    Broken {
        /// Why not.
        reason: String,
        /// Its class, if known.
        class: Option<String>,
    },
    /// Something that is ignored.
    Ignored {
        /// Why not.
        reason: String,
    },
    /// The end of the source.
    End {
        /// Every class that the source has, wanted or not.
        classes: Vec<String>,
    },
}

fn write_id<S: Serializer>(id: &Id, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex(id))
}

fn read_id<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Id, D::Error> {
    let text = String::deserialize(deserializer)?;
    let mut id = Id::default();
    for (position, byte) in id.iter_mut().enumerate() {
        let digits = text.get(2 * position..2 * position + 2);
        let value = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        *byte = value.ok_or_else(|| serde::de::Error::custom("not 64 hexadecimal digits"))?;
    }
    Ok(id)
}

/// The open journal and the pictures beside it.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    journal: BufWriter<File>,
    pictures: BufWriter<File>,
    /// How many records there are, including those from before an interruption.
    records: u64,
    /// The records from before an interruption, to compare with what the source gives now.
    known: Option<Records>,
    known_records: u64,
    ended: bool,
    unsynced: u64,
}

/// How many bytes of pictures are written between calls of `sync`.
const BETWEEN_SYNCS: u64 = 1 << 29;

impl Journal {
    /// Opens the journal in `out`, resuming one of this identity or starting a new one.
    pub fn open(out: &Path, identity: &str) -> Result<Self> {
        let folder = out.join(FOLDER);
        Self::open_in(&folder, identity)
            .with_context(|| format!("writing into `{}`", folder.display()))
    }

    fn open_in(folder: &Path, identity: &str) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let open = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).open(folder.join(name))
        };
        let (mut journal, mut pictures) = (open("journal")?, open("pictures")?);
        let sound = match Records::begin(&journal, identity)? {
            Some(records) => records.sound_until(pictures.metadata()?.len())?,
            None => {
                journal.set_len(0)?;
                pictures.set_len(0)?;
                Sound::default()
            }
        };
        journal.set_len(sound.journal)?;
        pictures.set_len(sound.pictures)?;
        journal.seek(SeekFrom::End(0))?;
        pictures.seek(SeekFrom::End(0))?;
        let mut this = Self {
            folder: folder.to_owned(),
            journal: BufWriter::with_capacity(1 << 16, journal),
            pictures: BufWriter::with_capacity(1 << 20, pictures),
            records: sound.records,
            known: None,
            known_records: sound.records,
            ended: sound.ended,
            unsynced: 0,
        };
        if sound.journal == 0 {
            this.write(&identity)?;
            this.flush()?;
        }
        this.known = Some(this.read()?);
        Ok(this)
    }

    /// How many records it had when it was opened.
    pub fn known_records(&self) -> u64 {
        self.known_records
    }

    /// Whether the whole source was read.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Returns the next record from before the interruption, or `None` after the last.
    pub fn next_known(&mut self) -> Result<Option<JournalEntry>> {
        let Some(known) = &mut self.known else { return Ok(None) };
        let record = match known.next == self.known_records {
            true => None,
            false => known.next_record()?,
        };
        if record.is_none() {
            self.known = None;
        }
        Ok(record)
    }

    /// Appends a record, with the bytes if it is a picture.
    pub fn add(&mut self, record: &JournalEntry, bytes: &[u8]) -> Result<()> {
        let context = || format!("writing into `{}`", self.folder.display());
        self.pictures.write_all(bytes).with_context(context)?;
        self.write(record).with_context(|| format!("writing into `{}`", self.folder.display()))?;
        self.records += 1;
        self.ended = matches!(record.what, What::End { .. });
        self.unsynced += bytes.len() as u64;
        if self.unsynced > BETWEEN_SYNCS {
            self.sync()?;
        }
        Ok(())
    }

    fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let payload = serde_json::to_vec(value)?;
        self.journal.write_all(&(payload.len() as u32).to_le_bytes())?;
        self.journal.write_all(&crc(&payload).to_le_bytes())?;
        Ok(self.journal.write_all(&payload)?)
    }

    /// Flushes the buffers: pictures first, so that no record lacks its picture.
    pub fn flush(&mut self) -> Result<()> {
        let folder = &self.folder;
        self.pictures
            .flush()
            .and_then(|()| self.journal.flush())
            .with_context(|| format!("writing into `{}`", folder.display()))
    }

    /// Flushes everything to disk.
    pub fn sync(&mut self) -> Result<()> {
        self.flush()?;
        self.unsynced = 0;
        self.pictures
            .get_ref()
            .sync_data()
            .and_then(|()| self.journal.get_ref().sync_data())
            .with_context(|| format!("writing into `{}`", self.folder.display()))
    }

    /// Reads all records from the first. Call [`Journal::flush`] before.
    pub fn read(&self) -> Result<Records> {
        let file = File::open(self.folder.join("journal"))?;
        let mut records = Records::over(file);
        records.payload()?;
        Ok(records)
    }

    /// Opens the file of the pictures' bytes.
    pub fn pictures(&self) -> Result<File> {
        Ok(File::open(self.folder.join("pictures"))?)
    }

    /// The folder of the journal, which may hold other temporary files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How many records there are.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Removes the folder of `out`.
    pub fn remove(out: &Path) {
        // A leftover folder only takes space.
        let _ = fs::remove_dir_all(out.join(FOLDER));
    }
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// The valid length of the two files.
#[derive(Debug, Default)]
struct Sound {
    journal: u64,
    pictures: u64,
    records: u64,
    ended: bool,
}

/// Iterates over the records of a journal.
#[derive(Debug)]
pub struct Records {
    reader: BufReader<File>,
    position: u64,
    next: u64,
}

impl Records {
    fn over(file: File) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, file), position: 0, next: 0 }
    }

    /// Returns the records of `file` after the identity, if that is `identity`.
    fn begin(file: &File, identity: &str) -> Result<Option<Self>> {
        let mut file = file.try_clone()?;
        file.rewind()?;
        let mut records = Self::over(file);
        let found = records.payload()?;
        let found: Option<String> = found.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Ok((found.as_deref() == Some(identity)).then_some(records))
    }

    /// Returns the next payload, or `None` at the end or if its CRC is wrong.
    fn payload(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut head = [0; 8];
        if !whole(self.reader.read_exact(&mut head))? {
            return Ok(None);
        }
        let [length, sum] = [0, 4]
            .map(|at| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let mut payload = Vec::new();
        self.reader.by_ref().take(length.into()).read_to_end(&mut payload)?;
        if payload.len() != length as usize || crc(&payload) != sum {
            return Ok(None);
        }
        self.position += 8 + u64::from(length);
        Ok(Some(payload))
    }

    /// Returns the next record, or `None` at the end.
    pub fn next_record(&mut self) -> Result<Option<JournalEntry>> {
        let payload = self.payload().context("reading the journal")?;
        let record = payload.and_then(|payload| serde_json::from_slice(&payload).ok());
        self.next += u64::from(record.is_some());
        Ok(record)
    }

    /// Returns the valid length of the journal, if `pictures` has this many bytes.
    fn sound_until(mut self, bytes: u64) -> Result<Sound> {
        let mut sound = Sound { journal: self.position, ..Sound::default() };
        while let Some(record) = self.next_record()? {
            let length = match record.what {
                What::Picture { length, .. } => length,
                _ => 0,
            };
            if sound.pictures + length > bytes {
                break;
            }
            sound.pictures += length;
            sound.journal = self.position;
            sound.records += 1;
            sound.ended = matches!(record.what, What::End { .. });
        }
        Ok(sound)
    }
}

/// Whether a read completed before the end of the file.
fn whole(read: io::Result<()>) -> io::Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(name: &str, bytes: &[u8]) -> JournalEntry {
        let what = What::Picture {
            id: [bytes.len() as u8; 32],
            split: Split::Test,
            encoding: 2,
            size: [3, 4],
            stored_id: [7; 32],
            stored_size: [2, 3],
            length: bytes.len() as u64,
            class: Some("cat".into()),
        };
        JournalEntry { name: name.into(), what }
    }

    fn add(journal: &mut Journal, names: &[&str]) {
        for name in names {
            journal.add(&picture(name, name.as_bytes()), name.as_bytes()).expect("added");
        }
        journal.sync().expect("synced");
    }

    fn known(out: &Path) -> Vec<String> {
        let mut journal = Journal::open(out, "this").expect("opened");
        let mut names = Vec::new();
        while let Some(record) = journal.next_known().expect("readable") {
            assert_eq!(record, picture(&record.name, record.name.as_bytes()));
            names.push(record.name);
        }
        assert_eq!(names.len() as u64, journal.records());
        names
    }

    #[test]
    fn intact_records_are_recovered_after_any_truncation() {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path();
        add(&mut Journal::open(out, "this").expect("opened"), &["a", "bb", "ccc"]);
        assert_eq!(known(out), ["a", "bb", "ccc"]);
        let [journal, pictures] = ["journal", "pictures"].map(|name| out.join(FOLDER).join(name));
        let whole = [&journal, &pictures].map(|path| fs::read(path).expect("there"));
        for cut in 0..whole[0].len() {
            fs::write(&journal, &whole[0][..cut]).expect("cut");
            fs::write(&pictures, &whole[1]).expect("whole");
            let names = known(out);
            assert!(
                ["a", "bb", "ccc"].starts_with(&names.iter().map(|n| &**n).collect::<Vec<_>>())
            );
            let mut journal = Journal::open(out, "this").expect("opened");
            let rest: Vec<&str> = ["a", "bb", "ccc"][names.len()..].to_vec();
            add(&mut journal, &rest);
            drop(journal);
            assert_eq!(known(out), ["a", "bb", "ccc"]);
            assert_eq!(fs::read(&pictures).expect("there"), b"abbccc");
        }
        for (cut, left) in [(0, 0), (1, 1), (2, 1), (3, 2), (5, 2), (6, 3)] {
            fs::write(&journal, &whole[0]).expect("whole");
            fs::write(&pictures, &whole[1][..cut]).expect("cut");
            assert_eq!(known(out).len(), left, "{cut} bytes of pictures");
        }
    }

    #[test]
    fn a_journal_of_another_source_is_discarded() {
        let folder = tempfile::tempdir().expect("a folder");
        add(&mut Journal::open(folder.path(), "other").expect("opened"), &["a"]);
        assert!(known(folder.path()).is_empty());
        assert_eq!(fs::read(folder.path().join(FOLDER).join("pictures")).expect("there"), b"");
    }
}
