//! `network.safetensors`: named segments with parameters and statistics.
//!
//! A [container] of kind `network`, version 1. Tensors, all f32:
//! `<segment>.<parameter>` and `<segment>.<statistic>`, where the segments are `online.backbone`,
//! `online.projector`, `online.predictor`, `target.backbone`, `target.projector`, and the names
//! below a backbone are timm's. Convolutions are `(O, I, KH, KW)`, linear weights `(out, in)`.
//!
//! [`tensors`] and [`load`] also serve files that hold more, such as the state of a run.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use stage::container::{self, Container, Header};

use crate::Segment;

/// Kind of the file.
pub const KIND: &str = "network";
/// Its format version.
pub const VERSION: u64 = 1;
/// Its name in the output folder of a stage.
pub const NAME: &str = "network.safetensors";

/// A tensor to be written to a file.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Values, row by row.
    pub values: Vec<f32>,
}

impl NamedTensor {
    /// The tensor in the form of the container.
    pub fn as_f32(&self) -> container::Tensor<'_> {
        container::Tensor::f32(&self.name, &self.shape, &self.values)
    }
}

/// Every parameter and statistic of `segment`, named `prefix.<name>`.
pub fn tensors(prefix: &str, segment: &Segment) -> Result<Vec<NamedTensor>> {
    let parameters = segment.parameters.entries().iter().map(|entry| {
        let values = segment.parameters.get(&entry.name)?;
        Ok(NamedTensor {
            name: format!("{prefix}.{}", entry.name),
            shape: entry.shape.clone(),
            values,
        })
    });
    let statistics = segment.statistics.entries().iter().map(|entry| {
        let values = segment.statistics.get(&entry.name)?;
        let shape = vec![values.len()];
        Ok(NamedTensor { name: format!("{prefix}.{}", entry.name), shape, values })
    });
    parameters.chain(statistics).collect()
}

/// Loads every parameter and statistic of `segment` from the tensors `prefix.<name>` of `file`.
///
/// # Errors
///
/// A tensor is missing, has another shape, or holds a value that is not finite; or the file has a tensor
/// below `prefix` that the segment lacks, so it belongs to another network.
pub fn load(file: &Container, prefix: &str, segment: &mut Segment) -> Result<()> {
    let mut known = Vec::new();
    for entry in segment.parameters.entries().to_vec() {
        let name = format!("{prefix}.{}", entry.name);
        segment.parameters.set(&entry.name, &read(file, &name, &entry.shape)?)?;
        known.push(name);
    }
    for entry in segment.statistics.entries().to_vec() {
        let name = format!("{prefix}.{}", entry.name);
        segment.statistics.set(&entry.name, &read(file, &name, &entry.shape)?)?;
        known.push(name);
    }
    let below = format!("{prefix}.");
    for name in file.names().filter(|name| name.starts_with(&below)) {
        ensure!(
            known.iter().any(|k| k == name),
            "`{}` has a tensor `{name}`, which the network of its config.json lacks; the two files \
             belong to different networks",
            file.path().display()
        );
    }
    Ok(())
}

fn read(file: &Container, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let found = file.shape(name)?;
    ensure!(
        found == shape,
        "tensor `{name}` of `{}` is {found:?}, but the network of its config.json needs {shape:?}; \
         the two files belong to different networks",
        file.path().display()
    );
    file.f32(name)
}

/// Writes `network.safetensors` in `folder` atomically. A value that is not finite is an error.
pub fn write(folder: &Path, segments: &[(&str, &Segment)]) -> Result<()> {
    let mut all = Vec::new();
    for (prefix, segment) in segments {
        all.extend(tensors(prefix, segment)?);
    }
    write_tensors(folder, &all)
}

/// Writes `network.safetensors` in `folder` from [`tensors`] and further tensors. A value that is not finite
/// is an error.
pub fn write_tensors(folder: &Path, tensors: &[NamedTensor]) -> Result<()> {
    let views: Vec<_> = tensors.iter().map(NamedTensor::as_f32).collect();
    container::write(&folder.join(NAME), KIND, VERSION, Header::new(), &views)
}

/// Opens and checks `network.safetensors` in `folder`, for [`load`]. An error says what to do about a missing,
/// foreign, truncated or damaged file.
pub fn open(folder: &Path) -> Result<Container> {
    Container::open(&folder.join(NAME), KIND, VERSION).with_context(|| {
        format!(
            "the network in `{}`; run the stage that trains it first, or name another folder with \
             --in network=DIR",
            folder.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Architecture, Configuration, Depth, Predictor, Projector, Stem};

    fn configuration(width: usize) -> Configuration {
        Configuration {
            backbone: Architecture { depth: Depth::Ten, width, stem: Stem::Pool },
            projector: Projector { hidden: 6, width: 4 },
            predictor: Predictor { hidden: 5 },
            channels: 1,
            input: serde_json::json!({ "height": 8 }),
        }
    }

    fn random_backbone(width: usize, seed: u64) -> Result<Segment> {
        Ok(Segment::random("backbone", configuration(width).backbone_plan()?, seed)?)
    }

    fn random_projector(seed: u64) -> Result<Segment> {
        Ok(Segment::random("projector", configuration(2).projector_plan()?, seed)?)
    }

    #[test]
    fn networks_are_read_as_written_and_equal_networks_are_equal_bytes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (backbone, projector) = (random_backbone(2, 1)?, random_projector(1)?);
        let segments = [("online.backbone", &backbone), ("target.projector", &projector)];
        write(folder.path(), &segments)?;
        let bytes = std::fs::read(folder.path().join(NAME))?;
        write(folder.path(), &segments)?;
        assert!(bytes == std::fs::read(folder.path().join(NAME))?);

        let file = open(folder.path())?;
        let mut read = random_projector(2)?;
        assert_ne!(read.parameters.to_vec()?, projector.parameters.to_vec()?);
        load(&file, "target.projector", &mut read)?;
        assert_eq!(read.parameters.to_vec()?, projector.parameters.to_vec()?);
        assert_eq!(read.statistics.to_vec()?, projector.statistics.to_vec()?);
        Ok(())
    }

    #[test]
    fn another_network_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let backbone = random_backbone(2, 1)?;
        write(folder.path(), &[("online.backbone", &backbone)])?;
        let file = open(folder.path())?;
        let refused = |prefix, mut segment: Segment, words: &str| {
            let message = load(&file, prefix, &mut segment).expect_err("refused").to_string();
            assert!(message.contains(NAME) && message.contains(words), "{message}");
        };
        refused("target.backbone", random_backbone(2, 1)?, "target.backbone");
        refused("online.backbone", random_backbone(3, 1)?, "different networks");
        refused("online", random_projector(1)?, "online.hidden.weight");
        let missing = format!("{:#}", open(&folder.path().join("none")).expect_err("no such file"));
        assert!(missing.contains("--in network=DIR"), "{missing}");
        Ok(())
    }

    #[test]
    fn configuration_is_read_as_written() -> Result<()> {
        let folder = tempfile::tempdir()?;
        configuration(2).write(folder.path())?;
        assert_eq!(Configuration::read(folder.path())?, configuration(2));
        let path = folder.path().join(crate::CONFIGURATION);
        std::fs::write(&path, "{\"backbone\": 1}")?;
        let message = format!("{:#}", Configuration::read(folder.path()).expect_err("foreign"));
        assert!(message.contains("config.json"), "{message}");
        Ok(())
    }
}
