//! Converts a published network's `preprocessor_config.json`, or timm's `pretrained_cfg`, to the input of a
//! network: operations on a picture, then mean and deviation.
//!
//! Transformers resizes bytes, clips between the two passes and rounds margins down. [`Operation`]s do
//! the same without rounding to bytes; the difference is below one step of a byte.

use anyhow::{Context, Result, bail, ensure};
use backbone::published::{CheckpointFamily, timm_input};
use data::views::{Filter, Input, Operation};
use serde::Deserialize;
use serde_json::Value;

use crate::source::NetworkFiles;
use crate::text_of;

const IMAGENET: [[f64; 3]; 2] = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]];
const CLIP: [[f64; 3]; 2] =
    [[0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_58, 0.275_777_11]];
const HALF: [[f64; 3]; 2] = [[0.5; 3]; 2];

/// The side of the pictures that a network was trained on, if its tensors show it.
#[derive(Debug, Clone, Copy)]
pub struct NativeSide(Option<usize>);

impl NativeSide {
    /// The side of the grid of learned positions, in pixels.
    pub fn of(pixels: usize) -> Self {
        Self(Some(pixels))
    }

    /// Not known.
    pub fn unknown() -> Self {
        Self(None)
    }
}

/// The input of a network of `family`.
///
/// Without a file that describes it, the transform published for the family is used, and a log line says
/// so. Networks of timm that come with a `config.json` have no such transform: each was trained on its own size, filter,
/// mean and deviation.
///
/// # Errors
///
/// A file is damaged or has an unsupported value (the message names the key), or the `config.json` of a network of timm has no
/// `pretrained_cfg`.
pub fn input(family: CheckpointFamily, files: &NetworkFiles, side: NativeSide) -> Result<Input> {
    if let Some(path) = &files.preprocessor {
        let context = || format!("reading `{}`", path.display());
        return of_transformers(&text_of(path)?, family).with_context(context);
    }
    if let Some(path) = &files.configuration
        && let Some(table) = timm_input(&text_of(path)?)?
    {
        let context = || format!("reading `pretrained_cfg` of `{}`", path.display());
        return of_timm(&table).with_context(context);
    }
    if let Some(path) = &files.configuration
        && matches!(family, CheckpointFamily::Timm | CheckpointFamily::Residual)
    {
        bail!(
            "`{}` has no table `pretrained_cfg`, which says how pictures become the input of a network of timm; a \
             guess would give worse embeddings without an error. Take the config.json that was published \
             with the weights, or add the table with `input_size`, `interpolation`, `crop_pct`, `mean` and `std`",
            path.display()
        );
    }
    tracing::info!("no preprocessor_config.json: the input is the one published for {family:?}");
    Ok(published(family, side.0.unwrap_or(224)))
}

/// The transform of a family's publisher, for pictures of this side.
fn published(family: CheckpointFamily, side: usize) -> Input {
    let square = |filter| vec![Operation::Resize { pixels: side, filter }];
    let shorter = |pixels, filter| Operation::ResizeShorter { pixels, filter };
    let cut = Operation::CentreCropRoundedDown { pixels: 224 };
    match family {
        CheckpointFamily::Dinov2 => {
            square_input(224, IMAGENET, vec![shorter(256, Filter::Bicubic), cut])
        }
        CheckpointFamily::Vit => square_input(side, IMAGENET, square(Filter::Bilinear)),
        CheckpointFamily::Dinov3 => square_input(224, IMAGENET, square(Filter::Bilinear)),
        CheckpointFamily::Clip => {
            let cut = Operation::CentreCropRoundedDown { pixels: side };
            square_input(side, CLIP, vec![shorter(side, Filter::Bicubic), cut])
        }
        CheckpointFamily::Siglip => square_input(side, HALF, square(Filter::Bicubic)),
        CheckpointFamily::Timm | CheckpointFamily::Residual => {
            let cut = Operation::CentreCrop { pixels: 224 };
            square_input(224, IMAGENET, vec![shorter(256, Filter::Bilinear), cut])
        }
    }
}

fn square_input(side: usize, [mean, std]: [[f64; 3]; 2], clean: Vec<Operation>) -> Input {
    let (mean, std) = (mean.to_vec(), std.to_vec());
    Input { height: side, width: side, channels: 3, mean, std, clean }
}

/// Keys of `preprocessor_config.json`. An absent key has the default of the family's class.
#[derive(Debug, Deserialize)]
struct Preprocessor {
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<Value>,
    resample: Option<u32>,
    do_center_crop: Option<bool>,
    crop_size: Option<Value>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<Vec<f64>>,
    image_std: Option<Vec<f64>>,
    do_pad: Option<bool>,
}

fn of_transformers(text: &str, family: CheckpointFamily) -> Result<Input> {
    let keys: Preprocessor = serde_json::from_str(text).context("it has a wrong value")?;
    let fallback = published(family, 224);
    ensure!(keys.do_pad != Some(true), "`do_pad` is true, which is not supported");
    let mut clean = Vec::new();
    let mut side = None;
    if keys.do_resize.unwrap_or(true) {
        let filter = match keys.resample {
            Some(2) => Filter::Bilinear,
            Some(3) => Filter::Bicubic,
            None => default_filter(&fallback),
            Some(other) => {
                bail!("`resample` is {other}; 2 (bilinear) and 3 (bicubic) are supported")
            }
        };
        let (operation, square) = resize(&keys, filter, &fallback)?;
        clean.push(operation);
        side = square;
    }
    let crops = fallback.clean.len() > 1;
    if keys.do_center_crop.unwrap_or(crops && keys.crop_size.is_some()) {
        let pixels = match &keys.crop_size {
            Some(size) => square(size, "crop_size")?,
            None => fallback.height,
        };
        clean.push(Operation::CentreCropRoundedDown { pixels });
        side = Some(pixels);
    }
    let side = side.context(
        "neither `size` nor `crop_size` makes all pictures one square; a network needs pictures of one \
         size",
    )?;
    ensure!(keys.do_rescale != Some(false), "`do_rescale` is false, which is not supported");
    let factor = keys.rescale_factor.unwrap_or(1. / 255.);
    ensure!(
        (factor * 255. - 1.).abs() < 1e-6,
        "`rescale_factor` is {factor}; only 1/255 is supported"
    );
    let (mean, std) = match keys.do_normalize.unwrap_or(true) {
        true => (keys.image_mean.unwrap_or(fallback.mean), keys.image_std.unwrap_or(fallback.std)),
        false => (vec![0.; 3], vec![1.; 3]),
    };
    Ok(Input { height: side, width: side, channels: 3, mean, std, clean })
}

fn default_filter(input: &Input) -> Filter {
    match input.clean.first() {
        Some(Operation::Resize { filter, .. } | Operation::ResizeShorter { filter, .. }) => *filter,
        _ => Filter::Bilinear,
    }
}

/// The resize, and the side of its result if that is a square.
fn resize(
    keys: &Preprocessor,
    filter: Filter,
    fallback: &Input,
) -> Result<(Operation, Option<usize>)> {
    let Some(size) = &keys.size else {
        let operation = *fallback.clean.first().context("a resize")?;
        let is_square = matches!(operation, Operation::Resize { .. });
        return Ok((operation, is_square.then_some(fallback.height)));
    };
    let shortest = |pixels: usize| (Operation::ResizeShorter { pixels, filter }, None);
    let squeezed = |pixels: usize| (Operation::Resize { pixels, filter }, Some(pixels));
    if let Some(edge) = size.get("shortest_edge").and_then(number) {
        ensure!(
            size.get("longest_edge").is_none_or(Value::is_null),
            "`size` has a longest edge, which is not supported"
        );
        return Ok(shortest(edge));
    }
    if let Some(pixels) = number(size) {
        // Old files: a number is the shorter edge for CLIP's class, a square for the others.
        let types = [&keys.image_processor_type, &keys.feature_extractor_type];
        let is_clip = types.into_iter().flatten().any(|name| name.starts_with("CLIP"));
        return Ok(if is_clip { shortest(pixels) } else { squeezed(pixels) });
    }
    Ok(squeezed(square(size, "size")?))
}

fn number(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

/// The side of a square: a number, or equal height and width.
fn square(value: &Value, key: &str) -> Result<usize> {
    let sides = ["height", "width"].map(|side| value.get(side).and_then(number));
    match (number(value), sides) {
        (Some(side), _) => Ok(side),
        (None, [Some(height), Some(width)]) if height == width => Ok(height),
        _ => bail!("`{key}` is {value}; a number, or equal `height` and `width`, is supported"),
    }
}

/// Keys of timm's `pretrained_cfg`.
#[derive(Debug, Deserialize)]
struct TimmInput {
    input_size: [usize; 3],
    interpolation: String,
    crop_pct: f64,
    #[serde(default = "centre")]
    crop_mode: String,
    mean: Vec<f64>,
    std: Vec<f64>,
}

fn centre() -> String {
    "center".to_owned()
}

/// The transform that `timm.data.create_transform` makes for evaluation.
fn of_timm(table: &Value) -> Result<Input> {
    let keys = TimmInput::deserialize(table).context("it has a wrong or missing value")?;
    let [3, side, width] = keys.input_size else {
        bail!("`input_size` is {:?}; three channels are supported", keys.input_size)
    };
    ensure!(side == width, "`input_size` is {:?}; a square is supported", keys.input_size);
    ensure!(keys.crop_pct > 0., "`crop_pct` is {}; it must be above 0", keys.crop_pct);
    let filter = match keys.interpolation.as_str() {
        "bilinear" => Filter::Bilinear,
        "bicubic" => Filter::Bicubic,
        other => bail!("`interpolation` is `{other}`; bilinear and bicubic are supported"),
    };
    let pixels = (side as f64 / keys.crop_pct).floor() as usize;
    let resize = match keys.crop_mode.as_str() {
        "center" => Operation::ResizeShorter { pixels, filter },
        "squash" => Operation::Resize { pixels, filter },
        other => bail!("`crop_mode` is `{other}`; center and squash are supported"),
    };
    let clean = vec![resize, Operation::CentreCrop { pixels: side }];
    Ok(Input { height: side, width: side, channels: 3, mean: keys.mean, std: keys.std, clean })
}

#[cfg(test)]
mod tests;
