//! Decompresses the pages of a Parquet file within a memory limit.
//!
//! Crate `parquet` trusts the length that a page states, up to 2 GiB, and decompresses gzip without
//! a limit. So its reader returns pages as they are stored, and pure Rust decoders decompress them
//! here.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use lz4_flex::block::{DecompressError, decompress_into};
use parquet::basic::Compression;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::{ColumnReader, get_column_reader};
use parquet::errors::ParquetError;
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::serialized_reader::SerializedPageReader;
use ruzstd::decoding::StreamingDecoder;

/// Opens the column `at` of a row group. No page of it takes more than `most` bytes.
///
/// # Errors
///
/// The metadata is inconsistent.
pub fn open_column(
    file: &Arc<File>,
    group: &RowGroupMetaData,
    at: usize,
    most: usize,
) -> Result<ColumnReader> {
    let column = group.column(at);
    let stored = column.clone().into_builder().set_compression(Compression::UNCOMPRESSED);
    let rows = usize::try_from(group.num_rows())?;
    let stored = SerializedPageReader::new(file.clone(), &stored.build()?, rows, None)?;
    let pages = Pages { stored, codec: column.compression(), most };
    Ok(get_column_reader(column.column_descr_ptr(), Box::new(pages)))
}

/// Whether pages of this codec can be decompressed.
pub fn is_read(codec: Compression) -> bool {
    !matches!(codec, Compression::BROTLI(_) | Compression::LZO)
}

struct Pages {
    stored: SerializedPageReader<File>,
    codec: Compression,
    most: usize,
}

impl Pages {
    /// Decompresses the buffer of a page after its first `plain` bytes.
    fn unpacked(&self, mut page: Page, plain: usize) -> Result<Page> {
        if self.codec == Compression::UNCOMPRESSED {
            return Ok(page);
        }
        let (Page::DataPage { buf, .. }
        | Page::DataPageV2 { buf, .. }
        | Page::DictionaryPage { buf, .. }) = &mut page;
        let (plain, packed) = buf.split_at_checked(plain).context("a page that is too short")?;
        let mut bytes = plain.to_vec();
        bytes.append(&mut unpack(self.codec, packed, self.most)?);
        *buf = bytes.into();
        Ok(page)
    }
}

impl Iterator for Pages {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        let Some(page) = self.stored.get_next_page()? else { return Ok(None) };
        let page = match page {
            Page::DataPageV2 { is_compressed: false, .. } => Ok(page),
            // The levels before the values are never compressed.
            Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } => {
                let levels = u64::from(def_levels_byte_len) + u64::from(rep_levels_byte_len);
                self.unpacked(page, usize::try_from(levels)?)
            }
            _ => self.unpacked(page, 0),
        };
        page.map(Some).map_err(|error| ParquetError::External(error.into()))
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        self.stored.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.stored.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool, ParquetError> {
        self.stored.at_record_boundary()
    }
}

fn unpack(codec: Compression, packed: &[u8], most: usize) -> Result<Vec<u8>> {
    let read_to_end = |reader: &mut dyn Read| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        reader.take(most as u64 + 1).read_to_end(&mut bytes)?;
        check(bytes.len(), most)?;
        Ok(bytes)
    };
    match codec {
        // A page without values.
        _ if packed.is_empty() => Ok(Vec::new()),
        Compression::GZIP(_) => read_to_end(&mut MultiGzDecoder::new(packed)),
        Compression::ZSTD(_) => read_to_end(&mut StreamingDecoder::new(packed)?),
        Compression::SNAPPY => {
            check(snap::raw::decompress_len(packed)?, most)?;
            Ok(snap::raw::Decoder::new().decompress_vec(packed)?)
        }
        Compression::LZ4_RAW => unpack_lz4(packed, most),
        Compression::LZ4 => unpack_lz4_of_hadoop(packed, most),
        _ => bail!("unsupported codec {codec}"),
    }
}

fn check(length: usize, most: usize) -> Result<()> {
    ensure!(length <= most, "a page has more than the limit of {} MiB", most >> 20);
    Ok(())
}

/// Decompresses an LZ4 block. It does not state its length, so the buffer grows until it fits.
fn unpack_lz4(packed: &[u8], most: usize) -> Result<Vec<u8>> {
    let mut length = packed.len().saturating_mul(4).min(most);
    loop {
        let mut bytes = vec![0; length];
        match decompress_into(packed, &mut bytes) {
            Ok(found) => {
                bytes.truncate(found);
                return Ok(bytes);
            }
            Err(DecompressError::OutputTooSmall { .. }) => {
                check(length.saturating_add(1), most)?;
                length = length.saturating_mul(2).min(most);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Decompresses LZ4 blocks as Hadoop and Spark write them: each follows its decompressed and its
/// compressed length, both big-endian.
fn unpack_lz4_of_hadoop(mut packed: &[u8], most: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some((lengths, rest)) = packed.split_first_chunk::<8>() {
        let [length, packed_length] = [&lengths[..4], &lengths[4..]]
            .map(|word| word.iter().fold(0, |length, &byte| length << 8 | usize::from(byte)));
        check(bytes.len() + length, most)?;
        let (block, rest) = rest.split_at_checked(packed_length).context("a block is too short")?;
        let start = bytes.len();
        bytes.resize(start + length, 0);
        let found = decompress_into(block, &mut bytes[start..])?;
        ensure!(found == length, "a block has {found} bytes, not {length}");
        packed = rest;
    }
    ensure!(packed.is_empty(), "{} bytes follow the last block", packed.len());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;
    use crate::example::gzip;

    #[test]
    fn every_codec_is_decompressed_within_the_limit() {
        let zeros = vec![0; 100_000];
        let text: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) % 251) as u8).collect();
        for bytes in [&zeros[..], &text, b"a"] {
            let block = lz4_flex::block::compress(bytes);
            let lengths = [bytes.len() as u32, block.len() as u32].map(u32::to_be_bytes);
            let hadoop = [lengths.as_flattened(), &block].concat().repeat(2);
            let snappy = snap::raw::Encoder::new().compress_vec(bytes).expect("packed");
            let zstd = compress_to_vec(bytes, CompressionLevel::Fastest);
            let cases = [
                (Compression::GZIP(Default::default()), gzip(bytes), 1),
                (Compression::ZSTD(Default::default()), zstd, 1),
                (Compression::SNAPPY, snappy, 1),
                (Compression::LZ4_RAW, block, 1),
                (Compression::LZ4, hadoop, 2),
            ];
            for (codec, packed, times) in cases {
                let want = bytes.repeat(times);
                let got = unpack(codec, &packed, want.len()).expect("fits");
                assert!(got == want, "{codec} of {} bytes", bytes.len());
                let error = unpack(codec, &packed, want.len() - 1).expect_err("too long");
                assert!(error.to_string().contains("a page has more than"), "{codec}: {error}");
                for length in 1..packed.len().min(40) {
                    // Damage gives an error or wrong bytes, but never exceeds the limit.
                    let cut = unpack(codec, &packed[..length], want.len());
                    assert!(cut.is_err() || cut.is_ok_and(|got| got.len() <= want.len()));
                }
            }
        }
        assert!(unpack(Compression::LZO, b"x", 9).is_err());
    }
}
