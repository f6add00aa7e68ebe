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
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
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
    bytes: &'a [u8],
}

macro_rules! constructor {
    ($(#[$doc:meta])* $name:ident, $type:ty, $dtype:ident) => {
        $(#[$doc])*
        pub fn $name(name: impl Into<String>, shape: &[usize], values: &'a [$type]) -> Self {
            Self { name: name.into(), dtype: Dtype::$dtype, shape: shape.to_vec(), bytes: bytemuck::cast_slice(values) }
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
    for tensor in tensors {
        check_finite(tensor.dtype, tensor.bytes)
            .with_context(|| format!("tensor `{}` for `{}`", tensor.name, path.display()))?;
    }
    header.insert("kind".into(), kind.into());
    header.insert("format-version".into(), version.into());
    let mut sorted: Vec<&Tensor> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let digest = digest(
        &header,
        sorted.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice(), t.bytes)),
    )?;
    header.insert("sha256".into(), digest.into());
    let metadata = HashMap::from([(KEY.to_owned(), serde_json::to_string(&header)?)]);

    let mut views = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), tensor.bytes)
            .with_context(|| format!("tensor `{}` for `{}`", tensor.name, path.display()))?;
        views.push((tensor.name.as_str(), view));
    }
    files::replace(path, |file| {
        let bytes = safetensors::serialize(views, Some(metadata))?;
        Ok(std::io::Write::write_all(file, &bytes)?)
    })
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
        Ok(Self { header, tensors })
    }

    /// Compares the digest in the header with the one of `bytes`, the whole file.
    ///
    /// # Errors
    ///
    /// They differ: the file was changed or damaged after it was written.
    pub fn verify(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut header = self.header.clone();
        let expected = header.remove("sha256");
        let tensors = self.tensors.iter().map(|(name, place)| {
            (name.as_str(), place.dtype, place.shape.as_slice(), &bytes[place.bytes.clone()])
        });
        let found = digest(&header, tensors)?;
        ensure!(
            expected.as_ref().and_then(Value::as_str) == Some(&found),
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

/// Hex SHA-256 over header and tensors; tensors come sorted by name.
fn digest<'a>(
    header: &Header,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(header)?);
    for (name, dtype, shape, bytes) in tensors {
        hash.update(format!("{name} {dtype:?} {shape:?} {}\n", bytes.len()));
        hash.update(bytes);
    }
    Ok(hex(&hash.finalize()))
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
    fn a_shape_that_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("short.safetensors");
        let tensors = [Tensor::f32("weight", &[2, 2], &[1., 2., 3.])];
        let message = message(write(&path, "network", 1, Header::new(), &tensors));
        assert!(message.contains("weight"), "{message}");
    }
}
