//! Residual networks with the names of timm and torchvision.

use anyhow::{Context, Result, bail, ensure};
use layers::Network;

use super::PublishedNetwork;
use super::tensors::FileTensors;
use crate::{Architecture, Depth, Segment, Stem, resnet};

/// Reads a network whose depth and width follow from its tensors.
pub fn read(tensors: FileTensors) -> Result<PublishedNetwork> {
    let architecture = architecture(&tensors)?;
    let segment = Box::new(segment(tensors, resnet::plan(&architecture, 3)?)?);
    Ok(PublishedNetwork::Residual { architecture, segment })
}

/// Takes the parameters and statistics of `plan` from the tensors.
///
/// # Errors
///
/// A tensor is missing, unknown, of another shape or not finite.
pub fn segment(mut tensors: FileTensors, plan: Network) -> Result<Segment> {
    let mut segment = Segment::empty(plan);
    let origin = tensors.origin();
    let wanted = segment.parameters.entries().iter().chain(segment.statistics.entries());
    let wanted: Vec<_> = wanted.map(|entry| (entry.name.clone(), entry.shape.clone())).collect();
    for (name, shape) in wanted {
        let (found, values) = tensors
            .remove(&name)
            .with_context(|| format!("{origin} has no tensor `{name}`; the file is incomplete"))?;
        ensure!(found == shape, "tensor `{name}` of {origin} is {found:?}, and must be {shape:?}");
        if let Some(place) = values.iter().position(|value| !value.is_finite()) {
            bail!("value {place} of tensor `{name}` in {origin} is {}", values[place])
        }
        match name.ends_with(".running_mean") || name.ends_with(".running_var") {
            true => segment.statistics.set(&name, &values)?,
            false => segment.parameters.set(&name, &values)?,
        }
    }
    if let Some(name) = tensors.names().next() {
        bail!("{origin} has a tensor `{name}`, which a residual network of its depth does not have")
    }
    Ok(segment)
}

/// Depth, width and stem of the tensors: timm and torchvision have the 7×7 stem.
fn architecture(tensors: &FileTensors) -> Result<Architecture> {
    let stem = tensors.shape("conv1.weight").unwrap_or_default();
    let &[width, 3, 7, 7] = stem else {
        bail!(
            "tensor `conv1.weight` of {} is {stem:?}, and must be [width, 3, 7, 7]",
            tensors.origin()
        )
    };
    let has_block =
        |stage: usize, block: usize| tensors.has(&format!("layer{stage}.{block}.conv1.weight"));
    let blocks =
        [1, 2, 3, 4].map(|stage| (0..).take_while(|&block| has_block(stage, block)).count());
    let has_bottlenecks = tensors.has("layer1.0.conv3.weight");
    let depths = [Depth::Ten, Depth::Eighteen, Depth::ThirtyFour, Depth::Fifty];
    let depth = depths
        .into_iter()
        .find(|depth| depth.blocks() == blocks && depth.has_bottlenecks() == has_bottlenecks);
    let depth = depth.with_context(|| {
        format!(
            "{} has {blocks:?} blocks in its four stages; residual networks of 10, 18, 34 and 50 layers \
             are supported",
            tensors.origin()
        )
    })?;
    Ok(Architecture { depth, width, stem: Stem::Large })
}
