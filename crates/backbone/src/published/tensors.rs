//! The tensors of one or several safetensors files, by name.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use candle_core::safetensors::Load;
use candle_core::{DType, Device};
use safetensors::SafeTensors;

use super::layout::is_beside;

/// Shape and numbers.
pub type ShapedNumbers = (Vec<usize>, Vec<f32>);

/// Prefixes that programs add to all names; one of them is removed.
const WRAPPERS: [&str; 6] =
    ["module.", "backbone.", "vit.", "dinov2.", "dinov3_vit.", "vision_model."];

/// The tensors of a network, without those beside the backbone.
#[derive(Debug)]
pub struct FileTensors {
    files: Vec<PathBuf>,
    by_name: BTreeMap<String, ShapedNumbers>,
    /// Prefixes that were removed from names.
    stripped: Vec<String>,
}

impl FileTensors {
    /// Reads the files, one after another.
    pub fn open(files: &[PathBuf]) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for file in files {
            let shown = file.display();
            let bytes = fs::read(file).with_context(|| format!("opening the weights `{shown}`"))?;
            let tensors = SafeTensors::deserialize(&bytes).with_context(|| {
                format!(
                    "`{shown}` is not a complete safetensors file; download it again, or convert a .pth \
                     file with safetensors.torch.save_file"
                )
            })?;
            for (name, view) in tensors.iter().filter(|(name, _)| !is_beside(name)) {
                let context = || format!("reading tensor `{name}` of `{shown}`");
                let tensor = view.load(&Device::Cpu).with_context(context)?;
                ensure!(
                    [DType::F32, DType::F16, DType::BF16, DType::F64].contains(&tensor.dtype()),
                    "tensor `{name}` of `{shown}` is of type {:?}; a float type is needed",
                    tensor.dtype()
                );
                let numbers = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                if by_name.insert(name.to_owned(), (tensor.dims().to_vec(), numbers)).is_some() {
                    bail!("two shards have the tensor `{name}`; the second is `{shown}`")
                }
            }
        }
        let mut tensors = Self { files: files.to_vec(), by_name, stripped: vec![] };
        tensors.remove_wrapper();
        Ok(tensors)
    }

    /// Removes a prefix that all names share.
    fn remove_wrapper(&mut self) {
        let shared = |prefix: &&&str| self.by_name.keys().all(|name| name.starts_with(**prefix));
        if let Some(prefix) = WRAPPERS.iter().find(shared).filter(|_| !self.by_name.is_empty()) {
            self.strip(prefix);
        }
    }

    /// Removes a prefix from the names that have it.
    pub fn strip(&mut self, prefix: &str) {
        if self.by_name.keys().any(|name| name.starts_with(prefix)) {
            self.stripped.push(prefix.to_owned());
        }
        let names = std::mem::take(&mut self.by_name).into_iter();
        let stripped = |name: String| name.strip_prefix(prefix).unwrap_or(&name).to_owned();
        self.by_name = names
            .map(|(name, numbers)| (stripped(name), numbers))
            .filter(|(n, _)| !is_beside(n))
            .collect();
    }

    pub fn has(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.by_name.get(name).map(|(shape, _)| shape.as_slice())
    }

    pub fn get(&self, name: &str) -> Option<&ShapedNumbers> {
        self.by_name.get(name)
    }

    pub fn remove(&mut self, name: &str) -> Option<ShapedNumbers> {
        self.by_name.remove(name)
    }

    pub fn insert(&mut self, name: String, shape: Vec<usize>, numbers: Vec<f32>) {
        self.by_name.insert(name, (shape, numbers));
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The files, for messages, and the prefix that their names have there and not here.
    pub fn origin(&self) -> String {
        let names: Vec<_> = self.files.iter().map(|file| format!("`{}`", file.display())).collect();
        let files = names.join(", ");
        match self.stripped.concat() {
            prefix if prefix.is_empty() => files,
            prefix => format!("{files} (whose names begin with `{prefix}`)"),
        }
    }
}
