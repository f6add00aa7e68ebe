//! Tensor files, read and written from their description, independently of the programs.
//!
//! A file is a safetensors file whose metadata map has one key, `assort`: a JSON object with sorted
//! keys, among them `sha256`, the digest over the text of the other keys and all tensors.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// A tensor: type, extents, little-endian bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian bytes.
    pub bytes: Vec<u8>,
}

impl RawTensor {
    /// 32-bit floats.
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    /// Unsigned 32-bit integers.
    pub fn u32(shape: &[usize], values: &[u32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: Dtype::U32, shape: shape.to_vec(), bytes }
    }

    /// Bytes.
    pub fn u8(shape: &[usize], values: &[u8]) -> Self {
        Self { dtype: Dtype::U8, shape: shape.to_vec(), bytes: values.to_vec() }
    }

    /// The values as 32-bit floats.
    pub fn to_f32(&self) -> Vec<f32> {
        let number = |bytes: &[u8]| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.bytes.chunks_exact(4).map(number).collect()
    }

    /// The values as unsigned 32-bit integers.
    pub fn to_u32(&self) -> Vec<u32> {
        let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.bytes.chunks_exact(4).map(number).collect()
    }
}

/// A tensor file in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct File {
    /// Header fields without the digest.
    pub header: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, RawTensor>,
}

impl File {
    /// Reads the file at `path`.
    ///
    /// # Errors
    ///
    /// It is not a tensor file, or its digest is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("reading `{}`", path.display()))?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
        let text = metadata.metadata().as_ref().and_then(|map| map.get("assort"));
        let text = text.with_context(|| format!("`{}` has no header", path.display()))?;
        let mut header: BTreeMap<String, Value> = serde_json::from_str(text)?;
        let digest = header.remove("sha256").context("no digest")?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let owned = |(name, view): (String, TensorView)| {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            (name, RawTensor { dtype, shape, bytes: view.data().to_vec() })
        };
        let file = Self { header, tensors: tensors.tensors().into_iter().map(owned).collect() };
        let without = text.replacen(&format!(",\"sha256\":{digest}"), "", 1);
        anyhow::ensure!(
            digest == file.digest(&without),
            "the digest of `{}` is not that of its contents",
            path.display()
        );
        Ok(file)
    }

    /// Writes the file with a digest that fits, whatever is in it.
    ///
    /// # Errors
    ///
    /// A shape does not hold its bytes, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut header = self.header.clone();
        let digest = self.digest(&serde_json::to_string(&header)?);
        header.insert("sha256".into(), digest.into());
        let metadata = HashMap::from([("assort".to_owned(), serde_json::to_string(&header)?)]);
        let views = self.tensors.iter().map(|(name, tensor)| {
            Ok((name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?))
        });
        let bytes = safetensors::serialize(views.collect::<Result<Vec<_>>>()?, Some(metadata))?;
        fs::write(path, bytes).with_context(|| format!("writing `{}`", path.display()))
    }

    /// Hex SHA-256 over the header's text without the digest, and all tensors by name.
    fn digest(&self, header: &str) -> String {
        let mut hash = Sha256::new();
        hash.update(header);
        for (name, RawTensor { dtype, shape, bytes }) in &self.tensors {
            hash.update(format!("{name} {dtype:?} {shape:?}\n"));
            hash.update(bytes);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
