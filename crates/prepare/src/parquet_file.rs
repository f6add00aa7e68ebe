//! Reads Parquet files: pictures as Hugging Face stores them, or a manifest.
//!
//! Pictures are a group of `bytes` and `path` of any name, or a column of bytes named `image`,
//! `img`, `jpg` or similar. Of several, the first with such a name is read, and the others are
//! listed as skipped. Without either, the file is a manifest: a text column named `path`, `file` or
//! similar gives paths relative to the Parquet file. The class is in the column `label`,
//! `fine_label` (`coarse_label` with `format = "cifar-20"`), `cls`, `class` or `target`. It is
//! text, a boolean, or a number, which the features in the file's metadata may name. Pages may be
//! compressed with snappy, gzip, zstd or lz4. Row groups are read one after the other, a few rows
//! at a time.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData};

use crate::collection::{Load, Sink};
use crate::folder::SOURCE;
use crate::labels::{class_for, distinct};
use crate::manifest::{self, PATHS};
use crate::names::{self, below_common_folder, split_of};
use crate::parquet_pages::open_column;
use crate::picture;
use crate::{Format, guard, parquet_pages};

/// Names of a column of pictures, preferred first. If no column has one of them, the first column
/// of pictures is read.
const IMAGES: [&str; 8] = ["image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo"];

/// Rows per read. Their pictures are in a page that is decompressed anyway.
const ROWS: usize = 32;

/// Whether a file is a Parquet file, by its first bytes.
pub fn is_parquet(start: &[u8]) -> bool {
    start.starts_with(b"PAR1")
}

/// Reads all files as one data set. A file belongs to the test split if its name says so.
///
/// # Errors
///
/// A file is damaged, has no pictures, or uses an unsupported codec.
pub fn read(
    files: &[PathBuf],
    format: Format,
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    files.iter().zip(below_common_folder(files)).try_for_each(|(path, shard)| {
        read_one(path, &shard, files.len() > 1, format, classes, sink)
    })
}

fn read_one(
    path: &Path,
    shard: &str,
    is_one_of_many: bool,
    format: Format,
    classes: &[String],
    sink: &mut dyn Sink,
) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening `{}`", path.display()))?;
    let file = Arc::new(file);
    let damaged = || {
        format!(
            "`{}` is damaged, or not a Parquet file of pictures; pass another source with {SOURCE}",
            path.display()
        )
    };
    let metadata = guarded(|| Ok(ParquetMetaDataReader::new().parse_and_finish(&*file)?));
    let metadata = metadata.with_context(damaged)?;
    let columns = guarded(|| Columns::of(&metadata, format)).with_context(|| {
        format!(
            "`{}` cannot be read as pictures; repair it, or pass another source with {SOURCE}",
            path.display()
        )
    })?;
    let split = split_of(shard);
    if let [first, others @ ..] = &columns.pictures[..] {
        for other in others {
            let reason = format!("is a further column of pictures: `{first}` is read");
            sink.ignored(format!("{shard}: column `{other}`"), reason)?;
        }
    }
    let mut row = 0u64;
    for group in metadata.row_groups() {
        let most = usize::try_from(sink.file_bytes() * 2)?;
        columns
            .check_memory(group, most)
            .with_context(|| format!("reading `{}`", path.display()))?;
        let mut rows = guarded(|| columns.open(&file, group, most)).with_context(damaged)?;
        loop {
            let some = guarded(|| rows.next()).with_context(damaged)?;
            if some.is_empty() {
                break;
            }
            for ParquetRow { bytes, path: inner, label } in some {
                let located = inner.as_deref().filter(|_| bytes.is_none());
                let located = located.map(|inner| manifest::locate(path, inner));
                let name = match (&located, columns.bytes) {
                    (Some((name, _)), None) => name.clone(),
                    _ if is_one_of_many => format!("{shard}:{row}"),
                    _ => format!("{row}"),
                };
                row += 1;
                let label = label.map(|label| columns.name_of(label));
                let class = class_for(label, &[inner.as_deref().unwrap_or("")], classes);
                if let Some(class) = &class
                    && !sink.wants(class)?
                {
                    continue;
                }
                let load = match (sink.is_known(), bytes, located) {
                    (true, ..) => Load::Known,
                    (_, Some(bytes), _) if bytes.len() as u64 > sink.file_bytes() => {
                        let reason = picture::too_many_bytes(bytes.len() as u64, sink.file_bytes());
                        Load::Broken(reason)
                    }
                    (_, Some(bytes), _) => Load::Bytes(bytes.data().to_vec()),
                    (_, None, Some((_, place))) => Load::File(place),
                    (_, None, None) => Load::Broken("has neither bytes nor a path".into()),
                };
                sink.picture(name, class.as_deref(), split, load)?;
            }
        }
    }
    Ok(())
}

/// Runs code of crate `parquet` and turns its panics on damaged files into errors.
fn guarded<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    guard::guarded(run).map_err(|text| anyhow!("reading it failed: {text}"))?
}

/// The columns to read, as indices of leaf columns.
struct Columns {
    bytes: Option<usize>,
    path: Option<usize>,
    label: Option<usize>,
    /// The name of each class number.
    names: Vec<String>,
    /// The columns that hold pictures, of which the first is read.
    pictures: Vec<String>,
}

/// One picture.
struct ParquetRow {
    bytes: Option<ByteArray>,
    path: Option<String>,
    label: Option<Label>,
}

enum Label {
    Number(i64),
    Text(String),
}

impl Columns {
    fn of(file: &ParquetMetaData, format: Format) -> Result<Self> {
        let metadata = file.file_metadata();
        let schema = metadata.schema_descr();
        let leaves: Vec<(String, Type)> = schema
            .columns()
            .iter()
            .map(|column| (column.path().string(), column.physical_type()))
            .collect();
        let position = |wanted: &str, kind: Option<Type>| {
            leaves
                .iter()
                .position(|(name, found)| name == wanted && kind.is_none_or(|kind| kind == *found))
        };
        // A group with bytes is a picture under any name; a plain column of bytes only under some.
        let rank = |name: &str| IMAGES.iter().position(|image| *image == name);
        let mut pictures: Vec<(usize, Option<&str>)> = leaves
            .iter()
            .enumerate()
            .filter(|(_, (_, kind))| *kind == Type::BYTE_ARRAY)
            .map(|(at, (name, _))| (at, name.strip_suffix(".bytes")))
            .filter(|(at, group)| group.is_some() || rank(&leaves[*at].0).is_some())
            .collect();
        let shown = |(at, group): (usize, Option<&str>)| group.unwrap_or(&leaves[at].0).to_owned();
        pictures.sort_by_key(|&picture| rank(&shown(picture)).unwrap_or(IMAGES.len()));
        let group = pictures.first().and_then(|picture| picture.1);
        let bytes = pictures.first().map(|picture| picture.0);
        let shown: Vec<String> = pictures.iter().copied().map(shown).collect();
        let path = match group {
            Some(group) => position(&format!("{group}.path"), Some(Type::BYTE_ARRAY)),
            None => PATHS.iter().find_map(|name| position(name, Some(Type::BYTE_ARRAY))),
        };
        // A text column `image` holds paths.
        let is_text = |at: usize| {
            matches!(
                schema.column(at).converted_type(),
                parquet::basic::ConvertedType::UTF8 | parquet::basic::ConvertedType::ENUM
            )
        };
        let (bytes, path) = match bytes {
            Some(at) if group.is_none() && is_text(at) => (None, Some(at)),
            _ => (bytes, path),
        };
        ensure!(
            bytes.is_some() || path.is_some(),
            "it has neither pictures nor paths; its columns are {}",
            leaves.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
        );
        let fine = if format == Format::Cifar20 { "coarse_label" } else { "fine_label" };
        let label = ["label", fine, "labels", "cls", "class", "target"]
            .into_iter()
            .find_map(|name| Some((name, position(name, None)?)));
        for at in [bytes, path, label.map(|label| label.1)].into_iter().flatten() {
            let (name, kind) = &leaves[at];
            ensure!(schema.column(at).max_rep_level() == 0, "its column `{name}` is a list");
            ensure!(
                !matches!(kind, Type::INT96 | Type::FIXED_LEN_BYTE_ARRAY),
                "its column `{name}` has values of type {kind}, but only numbers, text and bytes \
                 are supported; write it as one of these, or rename it"
            );
            let packed = file.row_groups().iter().map(|group| group.column(at).compression());
            if let Some(codec) = packed.into_iter().find(|codec| !parquet_pages::is_read(*codec)) {
                bail!(
                    "its column `{name}` is compressed with {codec}, but only snappy, gzip, zstd \
                     and lz4 are supported; write it again, in Python with compression=\"zstd\""
                );
            }
        }
        let features = metadata.key_value_metadata().and_then(|fields| {
            let field = fields.iter().find(|field| field.key == "huggingface")?;
            serde_json::from_str(field.value.as_deref()?).ok()
        });
        let names = label.and_then(|(name, _)| class_names(&features?, name)).unwrap_or_default();
        let names = distinct(names);
        Ok(Self { bytes, path, label: label.map(|label| label.1), names, pictures: shown })
    }

    fn name_of(&self, label: Label) -> String {
        match label {
            Label::Text(text) => text,
            Label::Number(number) => {
                let name = usize::try_from(number).ok().and_then(|number| self.names.get(number));
                name.cloned().unwrap_or_else(|| number.to_string())
            }
        }
    }

    /// Checks the size of each column of a row group, which bounds the pages that are held whole.
    fn check_memory(&self, group: &RowGroupMetaData, most: usize) -> Result<()> {
        for at in [self.bytes, self.path, self.label].into_iter().flatten() {
            let column = group.column(at);
            let bytes = column.uncompressed_size().max(column.compressed_size());
            ensure!(
                usize::try_from(bytes).is_ok_and(|bytes| bytes <= most),
                "a row group has {} MiB in column `{}`, more than the limit of {} MiB; write it in \
                 smaller row groups, or allow more with --memory",
                bytes >> 20,
                column.column_path().string(),
                most >> 20
            );
        }
        Ok(())
    }

    fn open(
        &self,
        file: &Arc<File>,
        group: &RowGroupMetaData,
        most: usize,
    ) -> Result<RowGroupReader> {
        let open = |at: Option<usize>| -> Result<Option<OpenColumn>> {
            let Some(at) = at else { return Ok(None) };
            let description = group.column(at).column_descr();
            let (name, levels) = (description.path().string(), description.max_def_level());
            Ok(Some(OpenColumn { name, reader: open_column(file, group, at, most)?, levels }))
        };
        let left = usize::try_from(group.num_rows()).unwrap_or(0);
        Ok(RowGroupReader {
            bytes: open(self.bytes)?,
            path: open(self.path)?,
            label: open(self.label)?,
            left,
        })
    }
}

/// Reads `info.features.<column>.names`, as Python's `datasets` writes it.
fn class_names(features: &serde_json::Value, column: &str) -> Option<Vec<String>> {
    let names = features.pointer(&format!("/info/features/{column}/names"))?.as_array()?;
    names.iter().map(|name| Some(name.as_str()?.to_owned())).collect()
}

struct OpenColumn {
    name: String,
    reader: ColumnReader,
    levels: i16,
}

/// The rows of a row group.
struct RowGroupReader {
    bytes: Option<OpenColumn>,
    path: Option<OpenColumn>,
    label: Option<OpenColumn>,
    left: usize,
}

impl RowGroupReader {
    /// Returns the next rows; empty at the end.
    fn next(&mut self) -> Result<Vec<ParquetRow>> {
        let count = self.left.min(ROWS);
        self.left -= count;
        let column = |column: &mut Option<OpenColumn>| match column {
            Some(column) => column.next(count),
            None => Ok((0..count).map(|_| None).collect()),
        };
        let (bytes, path) = (column(&mut self.bytes)?, column(&mut self.path)?);
        let label = column(&mut self.label)?;
        let text = |bytes: &ByteArray| String::from_utf8_lossy(bytes.data()).into_owned();
        let rows =
            bytes.into_iter().zip(path).zip(label).map(|((bytes, path), label)| ParquetRow {
                bytes: bytes.and_then(ColumnValue::bytes),
                path: path.and_then(ColumnValue::bytes).as_ref().map(text),
                label: label.and_then(|label| match label {
                    ColumnValue::Number(number) => Some(Label::Number(number)),
                    // pandas stores integers with missing values as floats, the missing as NaN.
                    ColumnValue::Real(real) if real.is_nan() => None,
                    ColumnValue::Real(real) if real == real.trunc() && real.abs() < 1e15 => {
                        Some(Label::Number(real as i64))
                    }
                    ColumnValue::Real(real) => Some(Label::Text(real.to_string())),
                    ColumnValue::Truth(truth) => Some(Label::Text(truth.to_string())),
                    ColumnValue::Bytes(bytes) => Some(Label::Text(names::text(bytes.data()))),
                }),
            });
        Ok(rows.collect())
    }
}

enum ColumnValue {
    Number(i64),
    Real(f64),
    Truth(bool),
    Bytes(ByteArray),
}

impl ColumnValue {
    fn bytes(self) -> Option<ByteArray> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Number(_) | Self::Real(_) | Self::Truth(_) => None,
        }
    }
}

impl OpenColumn {
    /// Returns the next `count` values; `None` for a null.
    fn next(&mut self, count: usize) -> Result<Vec<Option<ColumnValue>>> {
        self.read(count).with_context(|| format!("in column `{}`", self.name))
    }

    fn read(&mut self, count: usize) -> Result<Vec<Option<ColumnValue>>> {
        macro_rules! values {
            ($reader:expr, $make:expr) => {{
                let (mut levels, mut values) = (Vec::new(), Vec::new());
                let (mut records, mut wanted) = (0, count);
                while wanted > 0 {
                    let given = (self.levels > 0).then_some(&mut levels);
                    let (read, _, _) = $reader.read_records(wanted, given, None, &mut values)?;
                    ensure!(read > 0, "it ends after {records} of {count} rows");
                    (records, wanted) = (records + read, wanted - read);
                }
                (levels, values.into_iter().map($make).collect::<Vec<ColumnValue>>())
            }};
        }
        let (levels, values) = match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(reader) => values!(reader, ColumnValue::Bytes),
            ColumnReader::Int32ColumnReader(reader) => {
                values!(reader, |number: i32| ColumnValue::Number(number.into()))
            }
            ColumnReader::Int64ColumnReader(reader) => values!(reader, ColumnValue::Number),
            ColumnReader::FloatColumnReader(reader) => {
                values!(reader, |real: f32| ColumnValue::Real(real.into()))
            }
            ColumnReader::DoubleColumnReader(reader) => values!(reader, ColumnValue::Real),
            ColumnReader::BoolColumnReader(reader) => values!(reader, ColumnValue::Truth),
            ColumnReader::Int96ColumnReader(_) | ColumnReader::FixedLenByteArrayColumnReader(_) => {
                bail!("neither numbers nor text nor bytes")
            }
        };
        let mut values = values.into_iter();
        if self.levels == 0 {
            return Ok(values.map(Some).collect());
        }
        let is_there = |&level: &i16| level == self.levels;
        Ok(levels.iter().map(|level| is_there(level).then(|| values.next()).flatten()).collect())
    }
}

#[cfg(test)]
mod tests {
    use parquet::basic::Compression;
    use parquet::data_type::{
        BoolType, ByteArrayType, DataType, DoubleType, FixedLenByteArrayType, FloatType, Int64Type,
    };
    use parquet::file::properties::{WriterProperties, WriterVersion};
    use parquet::file::writer::SerializedFileWriter;

    use super::*;
    use crate::Options;
    use crate::example::{
        assert_has, config, pixels, png, prepare, prepare_with, put, refusal, scratch,
    };

    /// A file of four pictures with labels of this schema type; the second has none.
    fn file<T: DataType>(
        kind: &str,
        labels: &[T::T],
        codec: Compression,
        version: WriterVersion,
    ) -> Vec<u8> {
        let schema = format!("message m {{ required binary image; optional {kind}; }}");
        let schema = parquet::schema::parser::parse_message_type(&schema).expect("a schema");
        let properties =
            WriterProperties::builder().set_compression(codec).set_writer_version(version).build();
        let mut writer =
            SerializedFileWriter::new(Vec::new(), schema.into(), properties.into()).expect("begun");
        let mut group = writer.next_row_group().expect("a group");
        let pictures: Vec<ByteArray> = (0..4).map(|seed| png(seed).into()).collect();
        let mut column = group.next_column().expect("sound").expect("a column");
        column.typed::<ByteArrayType>().write_batch(&pictures, None, None).expect("written");
        column.close().expect("closed");
        let mut column = group.next_column().expect("sound").expect("a column");
        column.typed::<T>().write_batch(labels, Some(&[1, 0, 1, 1]), None).expect("written");
        column.close().expect("closed");
        group.close().expect("closed");
        writer.into_inner().expect("whole")
    }

    /// A file of two rows with pictures in each of these columns, which may be groups, and a label.
    fn with_columns(columns: &[(&str, bool)]) -> Vec<u8> {
        let column = |(name, is_group): &(&str, bool)| match is_group {
            true => format!("required group {name} {{ required binary bytes; }}"),
            false => format!("required binary {name};"),
        };
        let columns: String = columns.iter().map(column).collect();
        let schema = format!("message schema {{ {columns} required int64 label; }}");
        let schema = parquet::schema::parser::parse_message_type(&schema).expect("a schema");
        let properties = WriterProperties::builder().build();
        let mut writer =
            SerializedFileWriter::new(Vec::new(), schema.into(), properties.into()).expect("begun");
        let mut group = writer.next_row_group().expect("a group");
        let mut seed = 0;
        while let Some(mut column) = group.next_column().expect("sound") {
            match column.untyped() {
                parquet::column::writer::ColumnWriter::Int64ColumnWriter(_) => {
                    column.typed::<Int64Type>().write_batch(&[0, 1], None, None).expect("written");
                }
                _ => {
                    let pictures = [png(seed), png(seed + 1)].map(ByteArray::from);
                    let typed = column.typed::<ByteArrayType>();
                    typed.write_batch(&pictures, None, None).expect("written");
                    seed += 2;
                }
            }
            column.close().expect("closed");
        }
        group.close().expect("closed");
        writer.into_inner().expect("whole")
    }

    fn plain<T: DataType>(kind: &str, labels: &[T::T]) -> Vec<u8> {
        file::<T>(kind, labels, Compression::UNCOMPRESSED, WriterVersion::PARQUET_1_0)
    }

    #[test]
    fn labels_are_text_nullable_numbers_or_booleans() {
        let text = ["a", "b", "b"].map(ByteArray::from);
        let cases = [
            (
                plain::<DoubleType>("double label", &[0., 1., f64::NAN]),
                [Some("0"), Some("1"), None],
            ),
            (plain::<FloatType>("float label", &[2., -1., 0.5]), [Some("2"), None, Some("0.5")]),
            (plain::<BoolType>("boolean label", &[true, false, true]), {
                [Some("true"), Some("false"), Some("true")]
            }),
            (plain::<ByteArrayType>("binary label", &text), [Some("a"), Some("b"), Some("b")]),
        ];
        let (_folder, path) = scratch();
        let path = path.join("x.parquet");
        for (bytes, [a, c, d]) in cases {
            put(&path, &bytes);
            let read = prepare(&path, &config()).expect("sound");
            let classes = ["0", "1", "2", "3"].map(|name| read.class(name));
            assert_eq!(classes, [a, None, c, d]);
        }
    }

    #[test]
    fn errors_name_an_unsupported_column() {
        let (_folder, path) = scratch();
        let path = path.join("x.parquet");
        let labels = [b"ab", b"cd", b"ef"].map(|bytes| ByteArray::from(&bytes[..]).into());
        let kind = "fixed_len_byte_array(2) label";
        put(&path, &plain::<FixedLenByteArrayType>(kind, &labels));
        assert_has(&refusal(&path, &config()), &["x.parquet", "`label`", "FIXED_LEN_BYTE_ARRAY"]);
        let none = plain::<BoolType>("boolean other", &[true, false, true]);
        let large = Options { memory: 400, ..Options::default() };
        put(&path, &none);
        let message = prepare_with(&path, &config(), &large).map(|_| ()).expect_err("too large");
        assert_has(&format!("{message:#}"), &["x.parquet", "`image`", "smaller row groups"]);
    }

    #[test]
    fn compression_does_not_change_the_data_set() {
        let (_folder, path) = scratch();
        let path = path.join("x.parquet");
        let labels = [0., 1., 1.];
        put(&path, &plain::<DoubleType>("double label", &labels));
        let want = prepare(&path, &config()).expect("sound");
        let codecs = [
            Compression::SNAPPY,
            Compression::GZIP(Default::default()),
            Compression::LZ4,
            Compression::LZ4_RAW,
        ];
        for codec in codecs {
            for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
                put(&path, &file::<DoubleType>("double label", &labels, codec, version));
                let read = prepare(&path, &config()).expect("sound");
                assert!(read.bytes == want.bytes && read.classes == want.classes, "{codec}");
            }
        }
    }

    #[test]
    fn the_column_of_pictures_with_the_preferred_name_is_read_and_others_are_listed() {
        type Case<'a> = (&'a [(&'a str, bool)], usize, &'a [&'a str]);
        let cases: [Case; 4] = [
            (&[("mask", true), ("image", true)], 1, &["mask"]),
            (&[("image_a", true), ("image_b", true)], 0, &["image_b"]),
            (&[("thumb", true), ("jpg", false), ("img", true)], 2, &["jpg", "thumb"]),
            (&[("embedding", false), ("image", false)], 1, &[]),
        ];
        for (columns, position, others) in cases {
            let (_folder, path) = scratch();
            put(&path.join("x.parquet"), &with_columns(columns));
            let read = prepare(&path.join("x.parquet"), &config()).expect("sound");
            assert_eq!(read.picture("1").pixels, pixels(4, 6, 3, 2 * position + 1), "{columns:?}");
            let name = columns[position].0;
            let listed: Vec<_> = others
                .iter()
                .map(|other| {
                    let reason = format!("is a further column of pictures: `{name}` is read");
                    (format!("x.parquet: column `{other}`"), reason)
                })
                .collect();
            assert_eq!(read.skipped("ignored"), listed);
        }
    }
}
