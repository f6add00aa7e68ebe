//! The format of every tensor file: how it is written and read.
//!
//! Every file between the stages, except the logs, is a safetensors file whose metadata map has one
//! key, `assort`. Its value is a JSON object with sorted keys:
//!
//! - `kind`: what the file is, such as `"embeddings"`; a reader refuses another kind.
//! - `format-version`: a number; a reader refuses one it does not know.
//! - `sha256`: hex digest over the other header fields and every tensor's name, type, shape and
//!   bytes, so that any flipped bit is found.
//! - the fields that the kind's own documentation names.
//!
//! Nothing in it depends on time, host, path or thread count: equal contents are equal bytes.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::Value;
use sha2::{Digest, Sha256};

pub use crate::digest::hex;
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
    values: TensorBytes<'a>,
}

/// Where the bytes of a tensor are.
#[derive(Debug, Clone, Copy)]
enum TensorBytes<'a> {
    Held(&'a [u8]),
    /// In a temporary file, this many.
    Gathered(&'a File, u64),
}

impl TensorBytes<'_> {
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

/// A tensor that is too long for memory. Its values are appended to a temporary file, from which [`write()`] and
/// [`write_streamed`] copy them.
#[derive(Debug)]
pub struct Column<T> {
    file: BufWriter<File>,
    folder: PathBuf,
    values: u64,
    kind: PhantomData<T>,
}

/// A type of number that a [`Column`] can have.
pub trait ColumnNumber: bytemuck::NoUninit {
    /// Its name in the file.
    const DTYPE: Dtype;
}

impl ColumnNumber for u8 {
    const DTYPE: Dtype = Dtype::U8;
}

impl ColumnNumber for u32 {
    const DTYPE: Dtype = Dtype::U32;
}

impl ColumnNumber for u64 {
    const DTYPE: Dtype = Dtype::U64;
}

impl ColumnNumber for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl<T: ColumnNumber> Column<T> {
    /// An empty column, with an unnamed temporary file in `folder`.
    pub fn create_in(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder)
            .with_context(|| format!("writing into `{}`", folder.display()))?;
        let (file, folder) = (BufWriter::with_capacity(1 << 16, file), folder.to_owned());
        Ok(Self { file, folder, values: 0, kind: PhantomData })
    }

    /// Adds values at the end.
    pub fn push(&mut self, values: &[T]) -> Result<()> {
        let Self { file, folder, .. } = self;
        file.write_all(bytemuck::cast_slice(values)).with_context(|| writing_in(folder))?;
        self.values += values.len() as u64;
        Ok(())
    }

    /// Number of values.
    pub fn len(&self) -> u64 {
        self.values
    }

    /// True if the column has no values.
    pub fn is_empty(&self) -> bool {
        self.values == 0
    }

    /// Returns the column as a tensor of this name and shape, to be written.
    pub fn tensor(&mut self, name: impl Into<String>, shape: &[usize]) -> Result<Tensor<'_>> {
        self.file.flush().with_context(|| writing_in(&self.folder))?;
        let values = TensorBytes::Gathered(
            self.file.get_ref(),
            self.values * std::mem::size_of::<T>() as u64,
        );
        Ok(Tensor { name: name.into(), dtype: T::DTYPE, shape: shape.to_vec(), values })
    }

    /// Calls `visit` with every value, in order.
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
            let values = TensorBytes::Held(bytemuck::cast_slice(values));
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
/// A shape does not hold as many values as were given, or a 32-bit float is not finite. The message
/// names the file, and the tensor.
pub fn write(
    path: &Path,
    kind: &str,
    version: u64,
    header: Header,
    tensors: &[Tensor],
) -> Result<()> {
    write_streamed(path, kind, version, header, tensors, None)
}

/// Puts kind, version and digest into the header and returns its text.
fn seal(
    kind: &str,
    version: u64,
    header: &mut Header,
    mut parts: Vec<DigestPart>,
) -> Result<String> {
    header.insert("kind".into(), kind.into());
    header.insert("format-version".into(), version.into());
    parts.sort_by_key(|part| part.name);
    let digest = digest(&serde_json::to_string(&header)?, parts.into_iter())?;
    header.insert("sha256".into(), digest.into());
    Ok(serde_json::to_string(&header)?)
}

/// A tensor of bytes too large to be held in memory, written as it is produced.
///
/// It is last in the file. The header's digest covers its name and length but not its bytes: a kind
/// of file that uses it keeps digests of their parts in another tensor.
pub struct Streamed<'a> {
    /// Its name.
    pub name: &'a str,
    /// How many bytes `fill` writes.
    pub length: u64,
    /// Writes the bytes.
    pub fill: &'a mut dyn FnMut(&mut dyn Write) -> Result<()>,
}

/// Writes a file like [`write()`], with an additional tensor whose bytes need not fit into memory.
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
    for tensor in tensors {
        check_finite(tensor)
            .and_then(|()| check_shape(tensor))
            .with_context(|| format!("tensor `{}` for `{}`", tensor.name, path.display()))?;
    }
    let mut parts: Vec<DigestPart> = tensors.iter().map(DigestPart::of).collect();
    let length = streamed.as_ref().map_or(Ok(0), |streamed| streamed.length.try_into())?;
    let streamed_shape = [length];
    if let Some(Streamed { name, .. }) = streamed {
        let values = TensorBytes::Held(&[]);
        parts.push(DigestPart { name, dtype: Dtype::U8, shape: &streamed_shape, values });
    }
    let text = seal(kind, version, &mut header, parts)?;

    let layout = TensorOrder::of(tensors, streamed.is_some());
    let tensors = layout.ordered(tensors);
    let mut end = 0;
    let mut entry = |name: &str, dtype, shape, length: usize| {
        let data_offsets = (end, end + length);
        end += length;
        (name.to_owned(), TensorInfo { dtype, shape, data_offsets })
    };
    let mut entries: Vec<_> = tensors
        .iter()
        .map(|t| entry(&t.name, t.dtype, t.shape.clone(), t.values.len() as usize))
        .collect();
    entries.extend(streamed.as_ref().map(|s| entry(s.name, Dtype::U8, vec![length], length)));
    let metadata = Metadata::new(Some(HashMap::from([(KEY.to_owned(), text)])), entries)?;
    let text = layout.text(&metadata)?;

    files::replace(path, |file| {
        let mut out = ByteCounter { inner: BufWriter::with_capacity(1 << 20, file), bytes: 0 };
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)?;
        for tensor in &tensors {
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

/// The order of the tensors in a file and in its contents list. Both keep every tensor aligned; two
/// exist because images files of earlier versions must stay reproducible byte by byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TensorOrder {
    /// As `safetensors` orders: by type, then by name; the list too.
    ByType,
    /// Of files with gathered or streamed tensors: the widest types first, then by name; the list
    /// by name.
    ByWidth,
}

impl TensorOrder {
    fn of(tensors: &[Tensor], is_streamed: bool) -> Self {
        let is_gathered = |tensor: &Tensor| matches!(tensor.values, TensorBytes::Gathered(..));
        if is_streamed || tensors.iter().any(is_gathered) { Self::ByWidth } else { Self::ByType }
    }

    fn ordered<'a, 'b>(self, tensors: &'b [Tensor<'a>]) -> Vec<&'b Tensor<'a>> {
        let mut ordered: Vec<_> = tensors.iter().collect();
        ordered.sort_by(|a, b| {
            let by_type = match self {
                Self::ByType => b.dtype.cmp(&a.dtype),
                Self::ByWidth => b.dtype.bitsize().cmp(&a.dtype.bitsize()),
            };
            by_type.then_with(|| a.name.cmp(&b.name))
        });
        ordered
    }

    /// The contents list as it is written, padded to a multiple of 8 bytes.
    fn text(self, metadata: &Metadata) -> Result<Vec<u8>> {
        let mut text = match self {
            Self::ByType => serde_json::to_vec(metadata)?,
            // A JSON value sorts its keys.
            Self::ByWidth => serde_json::to_vec(&serde_json::to_value(metadata)?)?,
        };
        text.resize(text.len().next_multiple_of(8), b' ');
        Ok(text)
    }
}

/// Counts the bytes that pass through.
struct ByteCounter<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> Write for ByteCounter<W> {
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

/// Type, shape and position of a tensor in its file.
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
        let broken = || broken(path);
        let (header_length, metadata) = SafeTensors::read_metadata(bytes).with_context(broken)?;
        let text = text_in(path, &metadata)?;
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
        Ok(Self { header, tensors, text: text.to_owned() })
    }

    /// Compares the digest in the header with the one of `bytes`, the whole file.
    ///
    /// # Errors
    ///
    /// They differ: the file was changed or damaged after it was written.
    pub fn verify(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.verify_around(path, bytes, None)
    }

    /// Like [`Contents::verify`], for a file of [`write_streamed`]: skips the bytes of the tensor
    /// `streamed`.
    pub fn verify_around(&self, path: &Path, bytes: &[u8], streamed: Option<&str>) -> Result<()> {
        let expected = self.header.get("sha256").and_then(Value::as_str).unwrap_or_default();
        let header = without_digest(&self.text, expected);
        let tensors = self.tensors.iter().map(|(name, place)| {
            let covered = streamed != Some(name.as_str());
            let bytes = if covered { &bytes[place.bytes.clone()] } else { &[] };
            let (dtype, shape) = (place.dtype, place.shape.as_slice());
            DigestPart { name, dtype, shape, values: TensorBytes::Held(bytes) }
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

/// Reads the header of a file as it is written, which holds the digest of the contents: the file's
/// identity, at the price of one small read. Neither kind, version nor digest is checked.
///
/// # Errors
///
/// The file is not a safetensors file or was not written by assort.
pub fn header_text(path: &Path) -> Result<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length).min(LONGEST_HEADER);
        let mut header = Vec::new();
        file.take(length).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = match read() {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Vec::new(),
        read => read.with_context(|| format!("opening `{}`", path.display()))?,
    };
    let metadata: Metadata = serde_json::from_slice(&header).with_context(|| broken(path))?;
    Ok(text_in(path, &metadata)?.to_owned())
}

/// The format allows no longer header.
const LONGEST_HEADER: u64 = 100_000_000;

fn broken(path: &Path) -> String {
    format!("`{}` is broken or cut short; remove it and run its stage again", path.display())
}

fn text_in<'a>(path: &Path, metadata: &'a Metadata) -> Result<&'a str> {
    let text = metadata.metadata().as_ref().and_then(|map| map.get(KEY));
    text.map(String::as_str).with_context(|| {
        format!("`{}` was not written by assort: its header has no key `{KEY}`", path.display())
    })
}

/// 32-bit floats, in memory or in a [mapped](Container::map) file. Clones of the latter copy nothing.
#[derive(Clone)]
pub struct Floats(FloatValues);

#[derive(Clone)]
enum FloatValues {
    Held(Vec<f32>),
    /// Checked and aligned.
    Mapped {
        map: Arc<Mmap>,
        bytes: Range<usize>,
    },
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            FloatValues::Held(values) => values,
            FloatValues::Mapped { map, bytes } => bytemuck::cast_slice(&map[bytes.clone()]),
        }
    }
}

impl From<Vec<f32>> for Floats {
    fn from(values: Vec<f32>) -> Self {
        Self(FloatValues::Held(values))
    }
}

impl PartialEq for Floats {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Floats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A file, checked and open for its tensors.
#[derive(Debug, Clone)]
pub struct Container {
    path: PathBuf,
    bytes: FileBytes,
    contents: Contents,
}

/// The bytes of a file.
#[derive(Debug, Clone)]
enum FileBytes {
    Read(Vec<u8>),
    Mapped(Arc<Mmap>),
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Read(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }
}

impl Container {
    /// Reads and checks the file: kind, version, digest.
    ///
    /// # Errors
    ///
    /// The file is missing, foreign, of another kind or version, cut short or damaged. The message
    /// names the file and what to do.
    pub fn open(path: &Path, kind: &str, version: u64) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| opening(kind, path))?;
        Self::checked(path, FileBytes::Read(bytes), kind, version)
    }

    /// Maps and checks the file, which may be larger than memory: the system reads its bytes when they are
    /// asked for.
    ///
    /// # Errors
    ///
    /// As [`Container::open`].
    pub fn map(path: &Path, kind: &str, version: u64) -> Result<Self> {
        let map = File::open(path).and_then(|file| files::map(&file));
        let map = map.with_context(|| opening(kind, path))?;
        Self::checked(path, FileBytes::Mapped(Arc::new(map)), kind, version)
    }

    fn checked(path: &Path, bytes: FileBytes, kind: &str, version: u64) -> Result<Self> {
        let contents = Contents::parse(path, &bytes, kind, version)?;
        contents.verify(path, &bytes)?;
        Ok(Self { path: path.to_owned(), bytes, contents })
    }

    /// The path it was read from, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header field `key`.
    pub fn header(&self, key: &str) -> Result<&Value> {
        self.contents
            .header
            .get(key)
            .with_context(|| format!("`{}` has no header field `{key}`", self.path.display()))
    }

    /// The header field `key` as text.
    pub fn header_text(&self, key: &str) -> Result<&str> {
        self.header(key)?.as_str().with_context(|| {
            format!("header field `{key}` of `{}` is not text", self.path.display())
        })
    }

    /// The header field `key` as a whole number.
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
        self.check_finite(name, bytes)?;
        Ok(bytemuck::allocation::pod_collect_to_vec(bytes))
    }

    fn check_finite(&self, name: &str, bytes: &[u8]) -> Result<()> {
        check_finite_bytes(bytes, 0)
            .with_context(|| format!("tensor `{name}` of `{}`", self.path.display()))
    }

    /// Tensor `name` as 32-bit floats, row by row; of a [mapped](Container::map) file without a copy.
    ///
    /// # Errors
    ///
    /// As [`Container::f32`].
    pub fn floats(&self, name: &str) -> Result<Floats> {
        let bytes = self.bytes_of(name, Dtype::F32)?;
        let FileBytes::Mapped(map) = &self.bytes else { return Ok(self.f32(name)?.into()) };
        // Other writers of the format may not align.
        if bytemuck::try_cast_slice::<u8, f32>(bytes).is_err() {
            return Ok(self.f32(name)?.into());
        }
        self.check_finite(name, bytes)?;
        let bytes = self.place(name)?.bytes.clone();
        Ok(Floats(FloatValues::Mapped { map: map.clone(), bytes }))
    }

    /// Tensor `name` as unsigned 32-bit integers.
    pub fn u32(&self, name: &str) -> Result<Vec<u32>> {
        Ok(bytemuck::allocation::pod_collect_to_vec(self.bytes_of(name, Dtype::U32)?))
    }

    /// Tensor `name` as unsigned 64-bit integers.
    pub fn u64(&self, name: &str) -> Result<Vec<u64>> {
        Ok(bytemuck::allocation::pod_collect_to_vec(self.bytes_of(name, Dtype::U64)?))
    }

    /// Tensor `name` as bytes.
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

/// Fails at the first 32-bit float that is not finite; the message gives its index.
fn check_finite(tensor: &Tensor) -> Result<()> {
    if tensor.dtype != Dtype::F32 {
        return Ok(());
    }
    let mut before = 0;
    tensor.values.each(|bytes| {
        check_finite_bytes(bytes, before)?;
        before += bytes.len() / size_of::<f32>();
        Ok(())
    })
}

/// As [`check_finite`], for a piece of a tensor that follows `before` numbers.
fn check_finite_bytes(bytes: &[u8], before: usize) -> Result<()> {
    for (position, value) in bytes.as_chunks().0.iter().enumerate() {
        let (position, value) = (before + position, f32::from_le_bytes(*value));
        ensure!(value.is_finite(), "value {position} is {value}, and every value must be finite");
    }
    Ok(())
}

fn writing_in(folder: &Path) -> String {
    format!("writing a temporary file in `{}`", folder.display())
}

fn opening(kind: &str, path: &Path) -> String {
    format!("opening the {kind} `{}`", path.display())
}

/// The part of a tensor that the digest covers.
struct DigestPart<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    values: TensorBytes<'a>,
}

impl<'a> DigestPart<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        let Tensor { name, dtype, shape, values } = tensor;
        Self { name, dtype: *dtype, shape, values: *values }
    }
}

/// Hex SHA-256 over header and tensors; tensors come sorted by name.
fn digest<'a>(header: &str, tensors: impl Iterator<Item = DigestPart<'a>>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(header);
    for DigestPart { name, dtype, shape, values } in tensors {
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

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;
    use serde_json::json;

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
    fn floats_of_a_mapped_file_are_those_of_one_that_is_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = example(folder.path());
        let mapped = Container::map(&path, "example", 2)?;
        let floats = mapped.floats("centre")?;
        assert!(matches!(floats.0, FloatValues::Mapped { .. }), "without a copy");
        assert_eq!(*floats, [0.5, -1., 2., 3.]);
        assert_eq!(Container::open(&path, "example", 2)?.floats("centre")?, floats);
        assert!(mapped.floats("byte").is_err(), "another type");
        fs::remove_file(&path)?;
        assert_eq!(*floats, [0.5, -1., 2., 3.], "the map outlives the name");
        Ok(())
    }

    #[test]
    fn a_column_of_floats_has_finite_numbers_alone() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("column.safetensors");
        let mut column = Column::create_in(folder.path())?;
        column.push(&vec![1f32; 40_000])?;
        column.push(&[f32::INFINITY])?;
        let tensors = [column.tensor("rows", &[40_001])?];
        let error = message(write(&path, "example", 1, Header::new(), &tensors));
        assert!(error.contains("value 40000 is inf") && error.contains("`rows`"), "{error}");
        Ok(())
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
        assert!(check_finite_bytes(&f32::INFINITY.to_le_bytes(), 0).is_err());
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

    /// Written down once: other bytes would be another result of every published run.
    #[test]
    fn the_bytes_of_a_file_never_change() {
        let folder = tempfile::tempdir().expect("a folder");
        let held = fs::read(example(folder.path())).expect("there");
        let contents = Contents::parse(Path::new("a"), &held, "example", 2).expect("sound");
        let listed = Metadata::new(
            Some(HashMap::from([(KEY.to_owned(), contents.text.clone())])),
            [
                ("offset", Dtype::U64, vec![2], (0, 16)),
                ("centre", Dtype::F32, vec![2, 2], (16, 32)),
                ("assignment", Dtype::U32, vec![3], (32, 44)),
                ("byte", Dtype::U8, vec![5], (44, 49)),
            ]
            .map(|(name, dtype, shape, data_offsets)| {
                (name.to_owned(), TensorInfo { dtype, shape, data_offsets })
            })
            .to_vec(),
        );
        let start = serde_json::to_string(&listed.expect("sound")).expect("JSON");
        assert!(held[8..].starts_with(start.as_bytes()));
        assert_eq!(crate::digest::sha256(&held), HELD);

        let path = folder.path().join("gathered.safetensors");
        let mut column = Column::<u32>::create_in(folder.path()).expect("created");
        column.push(&[1, 2]).expect("added");
        let mut fill = |out: &mut dyn Write| Ok(out.write_all(b"streamed")?);
        let streamed = Streamed { name: "bytes", length: 8, fill: &mut fill };
        let tensors = [
            Tensor::f32("z", &[1], &[0.5]),
            Tensor::u64("y", &[1], &[7]),
            column.tensor("b", &[2]).expect("flushed"),
        ];
        write_streamed(&path, "example", 1, Header::new(), &tensors, Some(streamed))
            .expect("written");
        let gathered = fs::read(&path).expect("there");
        assert_eq!(crate::digest::sha256(&gathered), GATHERED);
    }

    const HELD: &str = "90da73994a231fb6d2d2a2068b6d74dd91377e951c6cedaa090218f490966902";
    const GATHERED: &str = "ca924a77aa8f15ea79b7c47127ceecddfe0a0d917731f9b83f82b76b487a39ad";

    #[test]
    fn the_header_alone_is_read_and_a_foreign_file_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = example(folder.path());
        let whole = fs::read(&path).expect("there");
        let contents = Contents::parse(&path, &whole, "example", 2).expect("sound");
        assert_eq!(header_text(&path).expect("sound"), contents.text);
        for broken in [&whole[..20], &whole[..4], &[0xff; 64], b"\x02\0\0\0\0\0\0\0{}"] {
            fs::write(&path, broken).expect("written");
            assert!(message(header_text(&path)).contains("example.safetensors"));
        }
        assert!(message(header_text(Path::new("none"))).contains("opening `none`"));
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
