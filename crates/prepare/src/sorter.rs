//! Sorts more records than fit into memory: sorted runs in temporary files, merged at the end.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// How many bytes of records are buffered before they are written as a run: 16 MiB.
const RUN_BYTES: usize = 1 << 24;

/// Read buffer of each run during the merge, in bytes.
const BUFFER: usize = 1 << 15;

/// Collects records and sorts them in lexicographic order of their bytes.
#[derive(Debug)]
pub struct Sorter {
    folder: PathBuf,
    run_bytes: usize,
    bytes: Vec<u8>,
    records: Vec<Range<usize>>,
    runs: Vec<File>,
}

impl Sorter {
    /// An empty sorter. Its temporary files in `folder` have no names.
    pub fn new(folder: &Path) -> Self {
        Self::with_run_bytes(folder, RUN_BYTES)
    }

    fn with_run_bytes(folder: &Path, run_bytes: usize) -> Self {
        let (bytes, records, runs) = (Vec::new(), Vec::new(), Vec::new());
        Self { folder: folder.to_owned(), run_bytes, bytes, records, runs }
    }

    /// Adds a record, the concatenation of `pieces`.
    pub fn push(&mut self, pieces: &[&[u8]]) -> Result<()> {
        let start = self.bytes.len();
        pieces.iter().for_each(|piece| self.bytes.extend_from_slice(piece));
        self.records.push(start..self.bytes.len());
        // Counts the index entry of a record too, so that empty records do not exceed the memory.
        let held = self.bytes.len() + self.records.len() * std::mem::size_of::<Range<usize>>();
        if held >= self.run_bytes { self.write_run() } else { Ok(()) }
    }

    fn write_run(&mut self) -> Result<()> {
        let bytes = &self.bytes;
        self.records.sort_by(|a, b| bytes[a.clone()].cmp(&bytes[b.clone()]));
        let write = || -> std::io::Result<File> {
            let mut out = BufWriter::new(tempfile::tempfile_in(&self.folder)?);
            for record in &self.records {
                out.write_all(&(record.len() as u32).to_le_bytes())?;
                out.write_all(&bytes[record.clone()])?;
            }
            let mut file = out.into_inner()?;
            file.rewind()?;
            Ok(file)
        };
        let run = write().with_context(|| format!("writing into `{}`", self.folder.display()))?;
        self.runs.push(run);
        self.bytes.clear();
        self.records.clear();
        Ok(())
    }

    /// Returns all records in order. Writes buffered records and frees their memory first.
    pub fn sorted(mut self) -> Result<SortedRecords> {
        if !self.records.is_empty() {
            self.write_run()?;
        }
        let mut sorted = SortedRecords { runs: Vec::new(), next: BinaryHeap::new() };
        for (number, run) in self.runs.into_iter().enumerate() {
            sorted.runs.push(BufReader::with_capacity(BUFFER, run));
            sorted.advance(number)?;
        }
        Ok(sorted)
    }
}

/// The records of a [`Sorter`] in order.
#[derive(Debug)]
pub struct SortedRecords {
    runs: Vec<BufReader<File>>,
    /// The next record of each run that is not exhausted.
    next: BinaryHeap<Reverse<(Vec<u8>, usize)>>,
}

impl SortedRecords {
    fn advance(&mut self, run: usize) -> Result<()> {
        let reader = &mut self.runs[run];
        let mut length = [0; 4];
        match reader.read_exact(&mut length) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            read => read.context("reading a temporary file")?,
        }
        let mut record = vec![0; u32::from_le_bytes(length) as usize];
        reader.read_exact(&mut record).context("reading a temporary file")?;
        self.next.push(Reverse((record, run)));
        Ok(())
    }
}

impl Iterator for SortedRecords {
    type Item = Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        let Reverse((record, run)) = self.next.pop()?;
        Some(self.advance(run).map(|()| record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_many_runs_come_in_order() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut sorter = Sorter::with_run_bytes(folder.path(), 400);
        let mut expected = Vec::new();
        for i in 0..1000u32 {
            let key = i.wrapping_mul(2_654_435_761).to_be_bytes();
            let tail = vec![b'x'; (i % 7) as usize];
            sorter.push(&[&key, &tail]).expect("added");
            expected.push([&key[..], &tail].concat());
        }
        assert!(sorter.runs.len() > 30);
        sorter.push(&[]).expect("an empty one");
        expected.push(Vec::new());
        expected.sort();
        let sorted: Vec<_> = sorter.sorted().expect("merged").map(|r| r.expect("read")).collect();
        assert_eq!(sorted, expected);
        assert_eq!(Sorter::new(folder.path()).sorted().expect("empty").count(), 0);
    }
}
