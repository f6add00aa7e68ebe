//! `backbone.safetensors`: a backbone alone, under timm's names.
//!
//! [`write()`] writes a [container] of kind `backbone`, version 1. Its tensors are exactly timm's state
//! dictionary of the network without its classifier: f32 parameters and running statistics, and
//! `num_batches_tracked` (i64 scalars, always 0, since nothing here counts batches).
//!
//! [`read`] takes any safetensors file with those names, from timm, torchvision or a hub, in f32, f64, f16
//! or bf16, with or without a classifier (`fc.*`, `head.*`).

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use stage::container::{self, Container, Header};

use crate::{Segment, network_file};

/// Kind of the file.
pub const KIND: &str = "backbone";
/// Its format version.
pub const VERSION: u64 = 1;
/// Its name in the output folder of a stage.
pub const NAME: &str = "backbone.safetensors";

const COUNTER: &str = ".num_batches_tracked";

/// Writes `backbone.safetensors` in `folder` atomically. A value that is not finite is an error.
pub fn write(folder: &Path, backbone: &Segment) -> Result<()> {
    let mut tensors = network_file::tensors("", backbone)?;
    for tensor in &mut tensors {
        tensor.name.remove(0); // The dot after the empty prefix.
    }
    let counters: Vec<String> = tensors
        .iter()
        .filter_map(|t| Some(format!("{}{COUNTER}", t.name.strip_suffix(".running_mean")?)))
        .collect();
    let mut views: Vec<_> = tensors.iter().map(network_file::NamedTensor::as_f32).collect();
    views.extend(counters.iter().map(|name| container::Tensor::i64(name, &[], &[0])));
    container::write(&folder.join(NAME), KIND, VERSION, Header::new(), &views)
}

/// Loads `backbone` from the file at `path`, written by [`write()`] or by another program.
///
/// # Errors
///
/// The file is missing or damaged; a tensor is missing, of another shape, or not one of this network; or a
/// value is not finite. There is no partial loading.
pub fn read(path: &Path, backbone: &mut Segment) -> Result<()> {
    let mut tensors = open(path)?;
    let name_of_file = path.display();
    tensors.retain(|name, _| {
        !(name.ends_with(COUNTER) || name.starts_with("fc.") || name.starts_with("head."))
    });
    let parameters =
        backbone.parameters.entries().iter().map(|e| (e.name.clone(), e.shape.clone()));
    let statistics =
        backbone.statistics.entries().iter().map(|e| (e.name.clone(), e.shape.clone()));
    let wanted: Vec<_> = parameters.chain(statistics).collect();
    for (name, shape) in wanted {
        let tensor = tensors.remove(&name).with_context(|| {
            format!(
                "`{name_of_file}` has no tensor `{name}`; it must hold a backbone of this depth and stem under \
                 timm's names"
            )
        })?;
        ensure!(
            tensor.dims() == shape,
            "tensor `{name}` of `{name_of_file}` is {:?}, but the experiment's backbone needs \
             {shape:?}; set depth, width, stem and channels to those of the file",
            tensor.dims()
        );
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(place) = values.iter().position(|v| !v.is_finite()) {
            bail!("value {place} of tensor `{name}` in `{name_of_file}` is {}", values[place])
        }
        if name.ends_with(".running_mean") || name.ends_with(".running_var") {
            backbone.statistics.set(&name, &values)?;
        } else {
            backbone.parameters.set(&name, &values)?;
        }
    }
    if let Some(name) = tensors.keys().min() {
        bail!(
            "`{name_of_file}` has a tensor `{name}`, which the experiment's backbone lacks; set \
             depth, width, stem and channels to those of the file"
        )
    }
    Ok(())
}

/// All tensors of the file. If the file is a container, its checksum is checked.
fn open(path: &Path) -> Result<HashMap<String, Tensor>> {
    let bytes =
        fs::read(path).with_context(|| format!("opening the backbone `{}`", path.display()))?;
    let tensors =
        candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).with_context(|| {
            format!(
                "`{}` is not a complete safetensors file; download it again, or convert a .pth file \
                 with safetensors.torch.save_file",
                path.display()
            )
        })?;
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes)?;
    if metadata.metadata().as_ref().is_some_and(|map| map.contains_key("assort")) {
        Container::open(path, KIND, VERSION)?;
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{Architecture, Depth, Stem, resnet};

    fn backbone(width: usize, stem: Stem, seed: u64) -> Result<Segment> {
        let architecture = Architecture { depth: Depth::Eighteen, width, stem };
        let mut segment = Segment::random("backbone", resnet::plan(&architecture, 3)?, seed)?;
        let means: Vec<f32> = (0..width).map(|i| i as f32 + 0.5).collect();
        segment.statistics.set("bn1.running_mean", &means)?;
        Ok(segment)
    }

    fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>> {
        let tensors = open(path)?;
        Ok(tensors.into_iter().map(|(name, t)| (name, t.dims().to_vec())).collect())
    }

    /// The state dictionary of `timm.create_model("resnet18", num_classes=0)`, constructed from its rules.
    fn names_and_shapes_of_timm() -> BTreeMap<String, Vec<usize>> {
        let mut all = BTreeMap::new();
        let norm = |all: &mut BTreeMap<_, _>, name: String, width: usize| {
            for part in ["weight", "bias", "running_mean", "running_var"] {
                all.insert(format!("{name}.{part}"), vec![width]);
            }
            all.insert(format!("{name}.num_batches_tracked"), vec![]);
        };
        all.insert("conv1.weight".into(), vec![64, 3, 7, 7]);
        norm(&mut all, "bn1".into(), 64);
        let mut before = 64;
        for (stage, width) in [64, 128, 256, 512].into_iter().enumerate() {
            for block in 0..2 {
                let name = format!("layer{}.{block}", stage + 1);
                all.insert(format!("{name}.conv1.weight"), vec![width, before, 3, 3]);
                all.insert(format!("{name}.conv2.weight"), vec![width, width, 3, 3]);
                norm(&mut all, format!("{name}.bn1"), width);
                norm(&mut all, format!("{name}.bn2"), width);
                if before != width {
                    all.insert(format!("{name}.downsample.0.weight"), vec![width, before, 1, 1]);
                    norm(&mut all, format!("{name}.downsample.1"), width);
                }
                before = width;
            }
        }
        all
    }

    #[test]
    fn names_and_shapes_are_those_of_timm() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write(folder.path(), &backbone(64, Stem::Large, 1)?)?;
        let path = folder.path().join(NAME);
        assert_eq!(shapes(&path)?, names_and_shapes_of_timm());

        // With the 3×3 stem, the convolution that the documentation replaces it by.
        write(folder.path(), &backbone(64, Stem::Plain, 1)?)?;
        let mut want = names_and_shapes_of_timm();
        want.insert("conv1.weight".into(), vec![64, 3, 3, 3]);
        assert_eq!(shapes(&path)?, want);
        Ok(())
    }

    #[test]
    fn written_and_foreign_files_are_read() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let written = backbone(2, Stem::Large, 1)?;
        write(folder.path(), &written)?;
        let path = folder.path().join(NAME);
        let mut segment = backbone(2, Stem::Large, 2)?;
        read(&path, &mut segment)?;
        assert_eq!(segment.parameters.to_vec()?, written.parameters.to_vec()?);
        assert_eq!(segment.statistics.to_vec()?, written.statistics.to_vec()?);

        // Without our header, in f64, with a classifier.
        let mut tensors = open(&path)?;
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F64)?;
        }
        tensors.insert("fc.weight".into(), Tensor::zeros((10, 16), DType::F64, &Device::Cpu)?);
        let foreign = folder.path().join("foreign.safetensors");
        candle_core::safetensors::save(&tensors, &foreign)?;
        let mut segment = backbone(2, Stem::Large, 2)?;
        read(&foreign, &mut segment)?;
        assert_eq!(segment.parameters.to_vec()?, written.parameters.to_vec()?);
        assert_eq!(segment.statistics.to_vec()?, written.statistics.to_vec()?);
        Ok(())
    }

    #[test]
    fn other_networks_and_damaged_files_are_errors_that_name_them() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write(folder.path(), &backbone(2, Stem::Large, 1)?)?;
        let path = folder.path().join(NAME);
        let refused = |path: &Path, segment: &mut Segment, word: &str| {
            let message = format!("{:#}", read(path, segment).expect_err("refused"));
            assert!(message.contains("safetensors") && message.contains(word), "{message}");
        };
        refused(&path, &mut backbone(3, Stem::Large, 1)?, "set depth, width");
        refused(&path, &mut backbone(2, Stem::Plain, 1)?, "conv1.weight");
        refused(
            &folder.path().join("none.safetensors"),
            &mut backbone(2, Stem::Large, 1)?,
            "opening",
        );

        let whole = open(&path)?;
        let foreign = folder.path().join("foreign.safetensors");
        let changed = |name: &str, tensor: Option<Tensor>| -> Result<()> {
            let mut tensors = whole.clone();
            tensors.remove(name);
            tensors.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
            Ok(candle_core::safetensors::save(&tensors, &foreign)?)
        };
        let segment = &mut backbone(2, Stem::Large, 1)?;
        changed("layer3.1.bn2.running_var", None)?;
        refused(&foreign, segment, "no tensor `layer3.1.bn2.running_var`");
        changed("layer5.weight", Some(whole["bn1.bias"].clone()))?;
        refused(&foreign, segment, "`layer5.weight`");
        changed("bn1.bias", Some((&whole["bn1.bias"] / 0.)?))?;
        refused(&foreign, segment, "bn1.bias");

        let mut bytes = fs::read(&path)?;
        *bytes.last_mut().expect("a byte") ^= 1;
        fs::write(&path, &bytes)?;
        refused(&path, segment, "damaged");
        fs::write(&path, &bytes[..bytes.len() / 2])?;
        refused(&path, segment, "not a complete safetensors file");
        Ok(())
    }
}
