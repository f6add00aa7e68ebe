//! Writes `images.safetensors`: any number of rows in order, or pictures in memory in any order.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use stage::Split;
use stage::container::{self, Column, Header, Streamed};

use crate::data_set::DataSet;
use crate::images::{
    BYTES, Fingerprint, Id, KIND, PART, PART_BYTES, PART_KIND, PictureRow, STORED, StoredPicture,
    VERSION, folder_of, part_path,
};

/// Writes pictures that are in memory, in any order, as grey (1) or colour (3).
///
/// # Errors
///
/// There is no picture, or one has other channels.
pub fn write(
    path: &Path,
    channels: usize,
    mut sources: Vec<(StoredPicture, Split)>,
) -> Result<DataSet> {
    // Stable: pictures with equal bytes and splits keep their order.
    sources.sort_by_key(|(source, split)| (source.id(), *split));
    let mut writer = SortedWriter::create(path, channels, PART_BYTES)?;
    for (source, split) in &sources {
        ensure!(
            source.channels() == channels,
            "a picture with {} channels for `{}`, which has {channels}",
            source.channels(),
            path.display()
        );
        writer.push(&source.row(*split))?;
    }
    let mut sources = sources.iter();
    writer.finish(&mut |out| {
        let (source, _) = sources.next().context("a picture for each row")?;
        Ok(out.write_all(source.bytes())?)
    })
}

/// Writes `images.safetensors` from rows that come in order. Its memory does not grow with their number:
/// the columns wait in temporary files in the same folder.
#[derive(Debug)]
pub struct SortedWriter {
    path: PathBuf,
    channels: usize,
    part_bytes: u64,
    fingerprint: Fingerprint,
    last: Option<(Id, Split)>,
    ids: Column<u8>,
    splits: Column<u8>,
    encodings: Column<u8>,
    sizes: Column<u32>,
    stored_ids: Column<u8>,
    stored_sizes: Column<u32>,
    /// Whether a picture is stored smaller than it is.
    has_reduced: bool,
    offsets: Column<u64>,
    end: u64,
    /// The offset and the first row of each part.
    parts: Vec<(u64, u64)>,
}

impl SortedWriter {
    /// Begins a file at `path` whose pictures are grey (1) or colour (3), in parts of at most about
    /// `part_bytes`: [`PART_BYTES`] outside tests.
    ///
    /// # Errors
    ///
    /// `channels` is neither, or the folder cannot be written to.
    pub fn create(path: &Path, channels: usize, part_bytes: u64) -> Result<Self> {
        ensure!(
            channels == 1 || channels == 3,
            "`channels` is {channels}; it must be 1 (grey) or 3 (colour)"
        );
        let folder = folder_of(path);
        let mut offsets = Column::create_in(folder)?;
        offsets.push(&[0])?;
        Ok(Self {
            path: path.to_owned(),
            channels,
            part_bytes,
            fingerprint: Fingerprint::new(channels),
            last: None,
            ids: Column::create_in(folder)?,
            splits: Column::create_in(folder)?,
            encodings: Column::create_in(folder)?,
            sizes: Column::create_in(folder)?,
            stored_ids: Column::create_in(folder)?,
            stored_sizes: Column::create_in(folder)?,
            has_reduced: false,
            offsets,
            end: 0,
            parts: vec![(0, 0)],
        })
    }

    /// Appends the next row.
    ///
    /// # Errors
    ///
    /// It is not in order.
    pub fn push(&mut self, row: &PictureRow) -> Result<()> {
        let place = Some((row.id, row.split));
        ensure!(self.last <= place, "rows must ascend by id, those of one id by split");
        self.last = place;
        let part = self.end - self.parts.last().map_or(0, |part| part.0);
        if part > 0 && part + row.length > self.part_bytes {
            self.parts.push((self.end, self.splits.len()));
        }
        self.fingerprint.add(&row.id, row.split, row.size);
        self.ids.push(&row.id)?;
        self.splits.push(&[row.split.code()])?;
        self.encodings.push(&[row.encoding.code()])?;
        self.sizes.push(&row.size)?;
        self.stored_ids.push(&row.stored_id)?;
        self.stored_sizes.push(&row.stored_size)?;
        self.has_reduced |= row.is_reduced();
        self.end += row.length;
        self.offsets.push(&[self.end])
    }

    /// Writes the file, and parts beside it if it would be too large. `next` is called once for each
    /// row, in order, and writes its bytes.
    ///
    /// # Errors
    ///
    /// There is no row, or `next` fails or writes another number of bytes than its row states.
    pub fn finish(mut self, next: &mut dyn FnMut(&mut dyn Write) -> Result<()>) -> Result<DataSet> {
        let n = usize::try_from(self.splits.len())?;
        ensure!(n > 0, "no picture was found, so `{}` is not written", self.path.display());
        let fingerprint = self.fingerprint.text();
        let data_set = DataSet { path: self.path.clone(), images: n, fingerprint };
        let mut header: Header = data_set.header();
        header.insert("channels".into(), self.channels.into());
        let mut starts: Vec<u64> = self.parts.iter().map(|part| part.0).collect();
        starts.push(self.end);
        let several = self.parts.len() > 1;
        if several {
            let mut rows: Vec<u64> = self.parts.iter().map(|part| part.1).collect();
            rows.push(n as u64);
            for part in 0..self.parts.len() {
                let path = part_path(&self.path, part, self.parts.len());
                let header =
                    Header::from([("fingerprint".into(), data_set.fingerprint.clone().into())]);
                let mut fill =
                    |out: &mut dyn Write| (rows[part]..rows[part + 1]).try_for_each(|_| next(out));
                let length = starts[part + 1] - starts[part];
                let streamed = Streamed { name: BYTES, length, fill: &mut fill };
                container::write_streamed(&path, PART_KIND, VERSION, header, &[], Some(streamed))?;
            }
        }
        let mut tensors = vec![
            self.ids.tensor("id", &[n, 32])?,
            self.splits.tensor("split", &[n])?,
            self.encodings.tensor("encoding", &[n])?,
            self.sizes.tensor("size", &[n, 2])?,
            self.offsets.tensor("offset", &[n + 1])?,
        ];
        if self.has_reduced {
            tensors.push(self.stored_ids.tensor(STORED[0], &[n, 32])?);
            tensors.push(self.stored_sizes.tensor(STORED[1], &[n, 2])?);
        }
        if several {
            tensors.push(container::Tensor::u64(PART, &[starts.len()], &starts));
        }
        let mut fill = |out: &mut dyn Write| (0..n).try_for_each(|_| next(out));
        let streamed = Streamed { name: BYTES, length: self.end, fill: &mut fill };
        let streamed = Some(streamed).filter(|_| !several);
        container::write_streamed(&self.path, KIND, VERSION, header, &tensors, streamed)?;
        Ok(data_set)
    }
}
