//! The one way a tensor file is written and read.
//!
//! Every file between the stages but the logs is a safetensors file whose metadata map has one key,
//! `assort`. Its value is a JSON object with sorted keys:
//!
//! - `kind`: what the file is, such as `"embeddings"`; a reader refuses another kind.
//! - `format-version`: a number; a reader refuses one it does not know.
//! - `sha256`: hex digest over the other header fields and every tensor's name, type, shape and
//!   bytes, so that a flipped bit is found wherever it lies.
//! - whatever else the kind's own documentation names.
//!
//! Nothing in it depends on time, host, path or thread count: equal contents are equal bytes.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::files;

/// The key of the safetensors metadata map that holds our header.
const KEY: &str = "assort";

/// The header fields of one kind of file, besides `kind`, `format-version` and `sha256`.
pub type Header = BTreeMap<String, Value>;

/// A tensor to be written: its little-endian bytes, borrowed.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    values: Values<'a>,
}

/// Where the bytes of a tensor are.
#[derive(Debug, Clone, Copy)]
enum Values<'a> {
    Held(&'a [u8]),
    /// In a temporary file, this many.
    Gathered(&'a File, u64),
}

impl Values<'_> {
    fn len(self) -> u64 {
        match self {
            Self::Held(bytes) => bytes.len() as u64,
            Self::Gathered(_, length) => length,
        }
    }

    /// Calls `visit` with all bytes, in order and in pieces.
    fn each(self, mut visit: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (mut file, length) = match self {
            Self::Held(bytes) => return visit(bytes),
            Self::Gathered(file, length) => (file, length),
        };
        file.rewind()?;
        let mut left = length;
        let mut buffer = vec![0; 1 << 16];
        while left > 0 {
            let piece = left.min(buffer.len() as u64) as usize;
            file.read_exact(&mut buffer[..piece])?;
            visit(&buffer[..piece])?;
            left -= piece as u64;
        }
        Ok(())
    }
}

/// The values of a tensor that is too long to be held: they are pushed one by one and wait in a
/// temporary file until [`write()`] or [`write_streamed`] reads them again.
#[derive(Debug)]
pub struct Column<T> {
    file: BufWriter<File>,
    values: u64,
    kind: PhantomData<T>,
}

/// A type that a [`Column`] can have.
pub trait Integer: bytemuck::NoUninit {
    /// Its name in the file.
    const DTYPE: Dtype;
}

impl Integer for u8 {
    const DTYPE: Dtype = Dtype::U8;
}

impl Integer for u32 {
    const DTYPE: Dtype = Dtype::U32;
}

impl Integer for u64 {
    const DTYPE: Dtype = Dtype::U64;
}

impl<T: Integer> Column<T> {
    /// An empty column, whose temporary file lies in `folder` without a name.
    ///
    /// # Errors
    ///
    /// The folder cannot be written to.
    pub fn create_in(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder)
            .with_context(|| format!("writing into `{}`", folder.display()))?;
        Ok(Self { file: BufWriter::with_capacity(1 << 16, file), values: 0, kind: PhantomData })
    }

    /// Adds values at the end.
    ///
    /// # Errors
    ///
    /// The disk refuses.
    pub fn push(&mut self, values: &[T]) -> Result<()> {
        self.file.write_all(bytemuck::cast_slice(values)).context("writing a temporary file")?;
        self.values += values.len() as u64;
        Ok(())
    }

    /// How many values were added.
    pub fn len(&self) -> u64 {
        self.values
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values == 0
    }

    /// The tensor of this name and shape, to be written.
    ///
    /// # Errors
    ///
    /// The disk refuses.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize]) -> Result<Tensor<'_>> {
        self.file.flush().context("writing a temporary file")?;
        let values =
            Values::Gathered(self.file.get_ref(), self.values * std::mem::size_of::<T>() as u64);
        Ok(Tensor { name: name.into(), dtype: T::DTYPE, shape: shape.to_vec(), values })
    }

    /// Calls `visit` with every value, in order.
    ///
    /// # Errors
    ///
    /// The disk refuses, or `visit` fails.
    pub fn each(&mut self, mut visit: impl FnMut(T) -> Result<()>) -> Result<()>
    where
        T: bytemuck::AnyBitPattern,
    {
        self.tensor("", &[])?.values.each(|bytes| {
            let size = std::mem::size_of::<T>();
            bytes.chunks_exact(size).try_for_each(|one| visit(bytemuck::pod_read_unaligned(one)))
        })
    }
}

macro_rules! constructor {
    ($(#[$doc:meta])* $name:ident, $type:ty, $dtype:ident) => {
        $(#[$doc])*
        pub fn $name(name: impl Into<String>, shape: &[usize], values: &'a [$type]) -> Self {
            let values = Values::Held(bytemuck::cast_slice(values));
            Self { name: name.into(), dtype: Dtype::$dtype, shape: shape.to_vec(), values }
        }
    };
}

impl<'a> Tensor<'a> {
    constructor!(
        /// 32-bit floats, row by row.
        f32, f32, F32
    );
    constructor!(
        /// Unsigned 32-bit integers.
        u32, u32, U32
    );
    constructor!(
        /// Unsigned 64-bit integers.
        u64, u64, U64
    );
    constructor!(
        /// Signed 64-bit integers.
        i64, i64, I64
    );
    constructor!(
        /// Bytes.
        u8, u8, U8
    );
}

/// Writes a file of this kind and version, whole or not at all.
///
/// # Errors
///
/// A shape does not hold as many values as were given, a 32-bit float is not finite, or the file
/// system refuses. The message names the file, and the tensor.
pub fn write(
    path: &Path,
    kind: &str,
    version: u64,
    mut header: Header,
    tensors: &[Tensor],
) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let Values::Held(bytes) = tensor.values else {
            return write_streamed(path, kind, version, header, tensors, None);
        };
        let view = check_finite(tensor.dtype, bytes)
            .and_then(|()| Ok(TensorView::new(tensor.dtype, tensor.shape.clone(), bytes)?))
            .with_context(|| format!("tensor `{}` for `{}`", tensor.name, path.display()))?;
        views.push((tensor.name.as_str(), view));
    }
    let parts = tensors.iter().map(Part::of).collect();
    let metadata = HashMap::from([(KEY.to_owned(), seal(kind, version, &mut header, parts)?)]);
    files::replace(path, |file| {
        let bytes = safetensors::serialize(views, Some(metadata))?;
        Ok(std::io::Write::write_all(file, &bytes)?)
    })
}

/// Puts kind, version and digest into the header and returns its text.
fn seal(kind: &str, version: u64, header: &mut Header, mut parts: Vec<Part>) -> Result<String> {
    header.insert("kind".into(), kind.into());
    header.insert("format-version".into(), version.into());
    parts.sort_by_key(|part| part.name);
    let digest = digest(&serde_json::to_string(&header)?, parts.into_iter())?;
    header.insert("sha256".into(), digest.into());
    Ok(serde_json::to_string(&header)?)
}

/// A tensor of bytes too large to be held in memory, written as it is produced.
///
/// It lies last in the file, and the header's digest covers its name and length but not its bytes:
/// a kind of file that uses it carries digests of their parts in another tensor, and says so.
pub struct Streamed<'a> {
    /// Its name.
    pub name: &'a str,
    /// How many bytes `fill` writes.
    pub length: u64,
    /// Writes the bytes.
    pub fill: &'a mut dyn FnMut(&mut dyn Write) -> Result<()>,
}

/// Writes a file like [`write()`], with one tensor more whose bytes need not fit into memory.
///
/// # Errors
///
/// As [`write()`]; also when `fill` fails or writes another number of bytes than it promised.
pub fn write_streamed(
    path: &Path,
    kind: &str,
    version: u64,
    mut header: Header,
    tensors: &[Tensor],
    streamed: Option<Streamed>,
) -> Result<()> {
    let mut sorted: Vec<&Tensor> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut parts: Vec<Part> = tensors.iter().map(Part::of).collect();
    let length = match &streamed {
        Some(streamed) => usize::try_from(streamed.length)?,
        None => 0,
    };
    let streamed_shape = [length];
    if let Some(Streamed { name, .. }) = streamed {
        let values = Values::Held(&[]);
        parts.push(Part { name, dtype: Dtype::U8, shape: &streamed_shape, values });
    }
    let text = seal(kind, version, &mut header, parts)?;

    // The widest types first keep every tensor aligned; the streamed bytes need no alignment.
    sorted.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize()));
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), json!({ KEY: text }));
    let mut end = 0;
    for tensor in &sorted {
        let finite = match tensor.values {
            Values::Held(bytes) => check_finite(tensor.dtype, bytes),
            Values::Gathered(..) => Ok(()),
        };
        finite
            .and_then(|()| check_shape(tensor))
            .with_context(|| format!("tensor `{}` for `{}`", tensor.name, path.display()))?;
        let range = [end, end + tensor.values.len()];
        end = range[1];
        let entry = json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": range });
        entries.insert(tensor.name.clone(), entry);
    }
    if let Some(streamed) = &streamed {
        let range = [end, end + streamed.length];
        let entry = json!({ "dtype": Dtype::U8, "shape": [length], "data_offsets": range });
        entries.insert(streamed.name.to_owned(), entry);
    }
    let mut text = serde_json::to_vec(&entries)?;
    text.resize(text.len().next_multiple_of(8), b' ');

    files::replace(path, |file| {
        let mut out = Counted { inner: BufWriter::with_capacity(1 << 20, file), bytes: 0 };
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)?;
        for tensor in &sorted {
            tensor.values.each(|bytes| Ok(out.write_all(bytes)?))?;
        }
        if let Some(streamed) = streamed {
            let before = out.bytes;
            (streamed.fill)(&mut out)?;
            let written = out.bytes - before;
            ensure!(
                written == streamed.length,
                "tensor `{}` got {written} bytes of {} promised",
                streamed.name,
                streamed.length
            );
        }
        Ok(out.flush()?)
    })
}

/// Counts what passes through.
struct Counted<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn check_shape(tensor: &Tensor) -> Result<()> {
    let wanted = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
    ensure!(
        wanted as u64 == tensor.values.len(),
        "shape {:?} holds {wanted} bytes, but {} are given",
        tensor.shape,
        tensor.values.len()
    );
    Ok(())
}

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes, counted from the start of the file.
    pub bytes: Range<usize>,
}

/// The contents list of a file: for readers that map a large file instead of holding it.
#[derive(Debug, Clone)]
pub struct Contents {
    /// Header fields, with `kind`, `format-version` and `sha256`.
    pub header: Header,
    /// The tensors by name.
    pub tensors: BTreeMap<String, Place>,
    /// The header as it is written. The digest is of this text and not of the parsed fields: a
    /// number read from text and written again may end in another digit.
    text: String,
}

impl Contents {
    /// Reads the contents list of `bytes`, the whole of the file at `path`, and checks kind and
    /// version. The digest is not computed: see [`Contents::verify`].
    ///
    /// # Errors
    ///
    /// The file is not a safetensors file, is cut short, is of another kind or of a version that
    /// this program does not know.
    pub fn parse(path: &Path, bytes: &[u8], kind: &str, version: u64) -> Result<Self> {
        let broken = || {
            format!(
                "`{}` is broken or cut short; remove it and run its stage again",
                path.display()
            )
        };
        let (header_length, metadata) = SafeTensors::read_metadata(bytes).with_context(broken)?;
        let text =
            metadata.metadata().as_ref().and_then(|map| map.get(KEY)).with_context(|| {
                format!(
                    "`{}` was not written by assort: its header has no key `{KEY}`",
                    path.display()
                )
            })?;
        let header: Header = serde_json::from_str(text).with_context(broken)?;
        let found = header.get("kind").and_then(Value::as_str).unwrap_or("nothing named");
        ensure!(
            found == kind,
            "`{}` holds {found}, not {kind}; name the folder of another stage",
            path.display()
        );
        let found = header.get("format-version").and_then(Value::as_u64).unwrap_or(0);
        ensure!(
            found == version,
            "`{}` has format version {found}, but this program reads version {version}; run its \
             stage again with this program",
            path.display()
        );
        let start = header_length + 8;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
                (name, Place { dtype: info.dtype, shape: info.shape.clone(), bytes })
            })
            .collect();
        Ok(Self { header, tensors, text: text.clone() })
    }

    /// Compares the digest in the header with the one of `bytes`, the whole file.
    ///
    /// # Errors
    ///
    /// They differ: the file was changed or damaged after it was written.
    pub fn verify(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.verify_around(path, bytes, None)
    }

    /// Like [`Contents::verify`] for a file of [`write_streamed`]: the bytes of the tensor
    /// `streamed` are not looked at.
    ///
    /// # Errors
    ///
    /// As [`Contents::verify`].
    pub fn verify_around(&self, path: &Path, bytes: &[u8], streamed: Option<&str>) -> Result<()> {
        let expected = self.header.get("sha256").and_then(Value::as_str).unwrap_or_default();
        let header = without_digest(&self.text, expected);
        let tensors = self.tensors.iter().map(|(name, place)| {
            let covered = streamed != Some(name.as_str());
            let bytes = if covered { &bytes[place.bytes.clone()] } else { &[] };
            let (dtype, shape) = (place.dtype, place.shape.as_slice());
            Part { name, dtype, shape, values: Values::Held(bytes) }
        });
        let found = digest(&header, tensors)?;
        ensure!(
            expected == found,
            "`{}` is damaged: its contents do not have the checksum in its header; remove it and \
             run its stage again",
            path.display()
        );
        Ok(())
    }
}

/// A file read whole, checked, and open for its tensors.
#[derive(Debug, Clone)]
pub struct Container {
    path: PathBuf,
    bytes: Vec<u8>,
    contents: Contents,
}

impl Container {
    /// Reads and checks the file: kind, version, digest.
    ///
    /// # Errors
    ///
    /// The file is missing, foreign, of another kind or version, cut short or damaged. The message
    /// names the file and what to do.
    pub fn open(path: &Path, kind: &str, version: u64) -> Result<Self> {
        let bytes =
            fs::read(path).with_context(|| format!("opening the {kind} `{}`", path.display()))?;
        let contents = Contents::parse(path, &bytes, kind, version)?;
        contents.verify(path, &bytes)?;
        Ok(Self { path: path.to_owned(), bytes, contents })
    }

    /// The path it was read from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header field `key`.
    ///
    /// # Errors
    ///
    /// It is missing.
    pub fn header(&self, key: &str) -> Result<&Value> {
        self.contents
            .header
            .get(key)
            .with_context(|| format!("`{}` has no header field `{key}`", self.path.display()))
    }

    /// The header field `key` as text.
    ///
    /// # Errors
    ///
    /// It is missing or not text.
    pub fn header_text(&self, key: &str) -> Result<&str> {
        self.header(key)?.as_str().with_context(|| {
            format!("header field `{key}` of `{}` is not text", self.path.display())
        })
    }

    /// The header field `key` as a whole number.
    ///
    /// # Errors
    ///
    /// It is missing or not a whole number.
    pub fn header_number(&self, key: &str) -> Result<u64> {
        self.header(key)?.as_u64().with_context(|| {
            format!("header field `{key}` of `{}` is not a whole number", self.path.display())
        })
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.contents.tensors.keys().map(String::as_str)
    }

    /// The shape of tensor `name`.
    ///
    /// # Errors
    ///
    /// There is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.place(name)?.shape)
    }

    /// Tensor `name` as 32-bit floats, row by row.
    ///
    /// # Errors
    ///
    /// There is no such tensor, it has another type, or a value is not finite.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.bytes_of(name, Dtype::F32)?;
        check_finite(Dtype::F32, bytes)
            .with_context(|| format!("tensor `{name}` of `{}`", self.path.display()))?;
        Ok(bytemuck::allocation::pod_collect_to_vec(bytes))
    }

    /// Tensor `name` as unsigned 32-bit integers.
    ///
    /// # Errors
    ///
    /// There is no such tensor or it has another type.
    pub fn u32(&self, name: &str) -> Result<Vec<u32>> {
        Ok(bytemuck::allocation::pod_collect_to_vec(self.bytes_of(name, Dtype::U32)?))
    }

    /// Tensor `name` as unsigned 64-bit integers.
    ///
    /// # Errors
    ///
    /// There is no such tensor or it has another type.
    pub fn u64(&self, name: &str) -> Result<Vec<u64>> {
        Ok(bytemuck::allocation::pod_collect_to_vec(self.bytes_of(name, Dtype::U64)?))
    }

    /// Tensor `name` as bytes.
    ///
    /// # Errors
    ///
    /// There is no such tensor or it has another type.
    pub fn u8(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.bytes_of(name, Dtype::U8)?.to_vec())
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.contents.tensors.get(name).with_context(|| {
            format!("`{}` has no tensor `{name}`; run its stage again", self.path.display())
        })
    }

    fn bytes_of(&self, name: &str, dtype: Dtype) -> Result<&[u8]> {
        let place = self.place(name)?;
        if place.dtype != dtype {
            bail!(
                "tensor `{name}` of `{}` is {:?}, not {dtype:?}",
                self.path.display(),
                place.dtype
            );
        }
        Ok(&self.bytes[place.bytes.clone()])
    }
}

/// Fails at the first number of a float tensor that is not finite, and says which one it is.
fn check_finite(dtype: Dtype, bytes: &[u8]) -> Result<()> {
    if dtype != Dtype::F32 {
        return Ok(());
    }
    for (position, value) in bytes.chunks_exact(4).enumerate() {
        let value = f32::from_le_bytes([value[0], value[1], value[2], value[3]]);
        ensure!(value.is_finite(), "value {position} is {value}, and every value must be finite");
    }
    Ok(())
}

/// What the digest covers of a tensor.
struct Part<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    values: Values<'a>,
}

impl<'a> Part<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        let Tensor { name, dtype, shape, values } = tensor;
        Self { name, dtype: *dtype, shape, values: *values }
    }
}

/// Hex SHA-256 over header and tensors; tensors come sorted by name.
fn digest<'a>(header: &str, tensors: impl Iterator<Item = Part<'a>>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(header);
    for Part { name, dtype, shape, values } in tensors {
        hash.update(format!("{name} {dtype:?} {shape:?}\n"));
        values.each(|bytes| {
            hash.update(bytes);
            Ok(())
        })?;
    }
    Ok(hex(&hash.finalize()))
}

/// The header's text as it was before the digest was put in.
fn without_digest(text: &str, digest: &str) -> String {
    let field = format!("\"sha256\":\"{digest}\"");
    // `kind` and `format-version` come before it in every header, so that a comma does too.
    text.replacen(&format!(",{field}"), "", 1)
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a `String` cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(folder: &Path) -> PathBuf {
        let path = folder.join("example.safetensors");
        let header = Header::from([("clusters".into(), 3.into()), ("note".into(), "x".into())]);
        let tensors = [
            Tensor::u32("assignment", &[3], &[2, 0, 1]),
            Tensor::f32("centre", &[2, 2], &[0.5, -1., 2., 3.]),
            Tensor::u64("offset", &[2], &[0, u64::MAX]),
            Tensor::u8("byte", &[5], &[1, 2, 3, 4, 5]),
        ];
        write(&path, "example", 2, header, &tensors).expect("written");
        path
    }

    fn message(result: Result<impl Sized>) -> String {
        match result {
            Ok(_) => panic!("an error was expected"),
            Err(error) => format!("{error:#}"),
        }
    }

    #[test]
    fn what_is_written_is_read_and_equal_contents_are_equal_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = example(folder.path());
        let first = fs::read(&path).expect("there");
        let file = Container::open(&path, "example", 2).expect("sound");
        assert_eq!(file.u32("assignment").expect("there"), [2, 0, 1]);
        assert_eq!(file.f32("centre").expect("there"), [0.5, -1., 2., 3.]);
        assert_eq!(file.shape("centre").expect("there"), [2, 2]);
        assert_eq!(file.u64("offset").expect("there"), [0, u64::MAX]);
        assert_eq!(file.u8("byte").expect("there"), [1, 2, 3, 4, 5]);
        assert_eq!(file.header_number("clusters").expect("there"), 3);
        assert_eq!(file.header_text("note").expect("there"), "x");
        assert_eq!(file.names().collect::<Vec<_>>(), ["assignment", "byte", "centre", "offset"]);
        assert_eq!(fs::read(example(folder.path())).expect("there"), first);
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = example(folder.path());
        let whole = fs::read(&path).expect("there");
        for position in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[position] ^= 1;
            fs::write(&path, &flipped).expect("written");
            let message = message(Container::open(&path, "example", 2));
            assert!(message.contains("example.safetensors"), "byte {position}: {message}");
        }
        for length in [0, 7, 8, 20, whole.len() - 1] {
            fs::write(&path, &whole[..length]).expect("written");
            let message = message(Container::open(&path, "example", 2));
            assert!(message.contains("example.safetensors"), "{length} bytes: {message}");
        }
    }

    #[test]
    fn foreign_kind_version_tensor_and_type_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = example(folder.path());
        assert!(
            message(Container::open(&path, "network", 2)).contains("holds example, not network")
        );
        assert!(message(Container::open(&path, "example", 1)).contains("format version 2"));
        assert!(message(Container::open(Path::new("none"), "example", 1)).contains("`none`"));
        let file = Container::open(&path, "example", 2).expect("sound");
        assert!(message(file.f32("missing")).contains("missing"));
        assert!(message(file.f32("assignment")).contains("U32, not F32"));
        assert!(message(file.header("missing")).contains("missing"));

        let foreign = folder.path().join("foreign.safetensors");
        let view = TensorView::new(Dtype::U8, vec![1], &[1]).expect("one byte");
        let bytes = safetensors::serialize([("a", view)], None).expect("serialises");
        fs::write(&foreign, bytes).expect("written");
        assert!(message(Container::open(&foreign, "example", 2)).contains("not written by assort"));
    }

    #[test]
    fn numbers_that_are_not_finite_are_neither_written_nor_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("nan.safetensors");
        let tensors = [Tensor::f32("weight", &[3], &[1., f32::NAN, 0.])];
        let message = message(write(&path, "network", 1, Header::new(), &tensors));
        assert!(message.contains("weight") && message.contains("value 1 is NaN"), "{message}");
        assert!(!path.exists());
        assert!(check_finite(Dtype::F32, &f32::INFINITY.to_le_bytes()).is_err());
    }

    #[test]
    fn any_finite_number_may_stand_in_a_header() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("example.safetensors");
        for i in 1..10u32 {
            // Shares with many digits: some of them do not survive being read and written.
            let shares: Vec<f64> =
                (0..2000).map(|j| f64::from(i) / f64::from(i + 7 * j + 1)).collect();
            let header = Header::from([("shares".into(), json!(shares)), ("z".into(), 1.into())]);
            write(&path, "example", 1, header, &[]).expect("written");
            let file = Container::open(&path, "example", 1).expect("sound");
            let read: Vec<f64> =
                serde_json::from_value(file.header("shares").expect("there").clone())
                    .expect("numbers");
            assert!(read.iter().zip(&shares).all(|(a, b)| (a - b).abs() <= f64::EPSILON));
        }
    }

    #[test]
    fn streamed_bytes_are_written_last_and_outside_the_digest() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("streamed.safetensors");
        let write = |length| {
            let tensors = [Tensor::u8("a", &[3], &[1, 2, 3]), Tensor::u64("z", &[1], &[7])];
            let mut fill = |out: &mut dyn Write| Ok(out.write_all(b"streamed")?);
            let streamed = Streamed { name: "bytes", length, fill: &mut fill };
            write_streamed(&path, "example", 1, Header::new(), &tensors, Some(streamed))
        };
        assert!(message(write(9)).contains("8 bytes of 9 promised"));
        assert!(!path.exists());
        write(8).expect("written");

        let mut bytes = fs::read(&path).expect("there");
        let contents = Contents::parse(&path, &bytes, "example", 1).expect("sound");
        assert_eq!(&bytes[contents.tensors["bytes"].bytes.clone()], b"streamed");
        assert_eq!(bytes[contents.tensors["z"].bytes.clone()], 7u64.to_le_bytes());
        assert_eq!(contents.tensors["z"].bytes.start % 8, 0);
        assert_eq!(bytes[contents.tensors["a"].bytes.clone()], [1, 2, 3]);

        let verify = |bytes: &[u8]| contents.verify_around(&path, bytes, Some("bytes"));
        *bytes.last_mut().expect("some") ^= 1;
        verify(&bytes).expect("these bytes are not covered");
        bytes[contents.tensors["a"].bytes.start] ^= 1;
        assert!(message(verify(&bytes)).contains("damaged"));
    }

    #[test]
    fn gathered_values_are_written_like_held_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("gathered.safetensors");
        let long: Vec<u32> = (0..40_000).map(|i| i * i).collect();
        let mut numbers = Column::create_in(folder.path()).expect("created");
        let mut bytes = Column::<u8>::create_in(folder.path()).expect("created");
        long.chunks(999).try_for_each(|some| numbers.push(some)).expect("added");
        bytes.push(b"odd").expect("added");
        assert_eq!((numbers.len(), bytes.is_empty()), (40_000, false));
        let mut again = Vec::new();
        let keep = |number| {
            again.push(number);
            Ok(())
        };
        numbers.each(keep).expect("readable");
        assert_eq!(again, long);

        let gathered = [
            numbers.tensor("numbers", &[200, 200]).expect("flushed"),
            bytes.tensor("bytes", &[3]).expect("flushed"),
        ];
        write(&path, "example", 1, Header::new(), &gathered).expect("written");
        let first = Container::open(&path, "example", 1).expect("sound");
        assert_eq!(first.u32("numbers").expect("there"), long);
        assert_eq!(first.u8("bytes").expect("there"), b"odd");
        let held = [Tensor::u32("numbers", &[200, 200], &long), Tensor::u8("bytes", &[3], b"odd")];
        write(&path, "example", 1, Header::new(), &held).expect("written");
        let second = Container::open(&path, "example", 1).expect("sound");
        assert_eq!(first.header("sha256").expect("there"), second.header("sha256").expect("there"));
        let wrong = [bytes.tensor("bytes", &[4]).expect("flushed")];
        assert!(message(write(&path, "example", 1, Header::new(), &wrong)).contains("bytes"));
    }

    #[test]
    fn a_shape_that_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("short.safetensors");
        let tensors = [Tensor::f32("weight", &[2, 2], &[1., 2., 3.])];
        let message = message(write(&path, "network", 1, Header::new(), &tensors));
        assert!(message.contains("weight"), "{message}");
    }
}
