//! Maps the names of a file's tensors to those of a plan.
//!
//! The plan's names are those of [`TransformerPlan::tensors`]. For each, a layout lists the possible
//! names in a file, and the rows of a packed tensor. Names of transformers' families do not collide, so
//! one table serves them all.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use layers::{
    Activation, FinalNorm, Mlp, Positions, Resampling, TransformerPlan, TransformerTensor,
};

use super::config::{ConfigForm, HubConfig, Projection};
use super::tensors::{FileTensors, ShapedNumbers};

/// Whether a published file has this tensor beside the backbone: masks, classifiers, text towers,
/// counters, and buffers that are computed here.
pub fn is_beside(name: &str) -> bool {
    const STARTS: [&str; 10] = [
        "pooler.",
        "vit.pooler.",
        "classifier.",
        "fc.",
        "text_model.",
        "text_projection.",
        "logit_scale",
        "logit_bias",
        "decoder.",
        "rope",
    ];
    const ENDS: [&str; 8] = [
        "mask_token",
        "position_ids",
        "num_batches_tracked",
        "attn.qkv.bias_mask",
        "attn.k_bias",
        "rope_embed.periods",
        "rope_embeddings.inv_freq",
        "rope.periods",
    ];
    STARTS.iter().any(|start| name.starts_with(start)) || ENDS.iter().any(|end| name.ends_with(end))
}

/// The form of a file's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// Transformers' names; a block's begin with this prefix and its number.
    Transformers { blocks: &'static str },
    /// Names of timm and of the publishers' programs.
    Timm,
}

impl Layout {
    /// The layout of a file. Removes prefixes, and heads that do not belong to the backbone.
    pub fn of(config: &HubConfig, tensors: &mut FileTensors) -> Result<Self> {
        let ConfigForm::Transformers { .. } = config.form else {
            if !is_timm_clip(config) {
                // A classifier.
                tensors.remove("head.weight");
                tensors.remove("head.bias");
            }
            return Ok(Self::Timm);
        };
        tensors.strip("vision_model.");
        let prefixes = ["encoder.layer.", "encoder.layers.", "layer.", "layers.", "model.layer."];
        let has = |prefix: &&&str| tensors.names().any(|name| name.starts_with(**prefix));
        let blocks = prefixes.iter().find(has).with_context(|| {
            format!(
                "{} has no block, such as `encoder.layer.0.norm1.weight`; transformers does not name its \
                 tensors like this",
                tensors.origin()
            )
        })?;
        Ok(Self::Transformers { blocks })
    }

    /// The plan of the network.
    pub fn plan(&self, config: &HubConfig, tensors: &FileTensors) -> Result<TransformerPlan> {
        match &config.form {
            ConfigForm::Transformers { plan, projection } => {
                let projection = match *projection {
                    Projection::None => None,
                    Projection::Always(width) => Some(width),
                    Projection::IfThere(width) => {
                        tensors.has("visual_projection.weight").then_some(width)
                    }
                };
                Ok(TransformerPlan { projection, ..(**plan).clone() })
            }
            ConfigForm::Timm { architecture, tag } => timm_plan(architecture, tag, tensors),
        }
    }

    /// The possible names of a plan's tensor in a file, and its part of their rows.
    fn candidates(&self, name: &str) -> Vec<CandidateTensor> {
        match self {
            Self::Transformers { blocks } => of_transformers(name, blocks),
            Self::Timm => of_timm(name),
        }
    }
}

fn is_timm_clip(config: &HubConfig) -> bool {
    matches!(&config.form, ConfigForm::Timm { architecture, .. } if architecture.contains("_clip_"))
}

/// A tensor of a file, or the `part`-th of `parts` equal groups of its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CandidateTensor {
    name: String,
    part: usize,
    parts: usize,
}

/// Parses a tensor's name and part: `attn.qkv:0/3` is the first third of its rows.
fn candidate(words: &str, ending: &str, prefix: &str) -> CandidateTensor {
    let (word, part) = words.split_once(':').unwrap_or((words, "0/1"));
    let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut numbers = part.split('/');
    let (part, parts) = (number(numbers.next()), number(numbers.next()).max(1));
    // PyTorch's packed attention ends in `_weight` and `_bias`.
    let joint = if word.ends_with("in_proj") { "_" } else { "." };
    let ending = if ending.is_empty() { String::new() } else { format!("{joint}{ending}") };
    CandidateTensor { name: format!("{prefix}{word}{ending}"), part, parts }
}

/// Splits `blocks.3.q.weight` into block `3`, word `q` and ending `weight`.
fn split(name: &str) -> (Option<&str>, &str, &str) {
    let (block, rest) = match name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        Some((block, rest)) => (Some(block), rest),
        None => (None, name),
    };
    match rest.rsplit_once('.') {
        Some((word, ending @ ("weight" | "bias"))) => (block, word, ending),
        _ => (block, rest, ""),
    }
}

fn of_transformers(name: &str, blocks: &str) -> Vec<CandidateTensor> {
    let (block, word, ending) = split(name);
    let words: &[&str] = match (block, word) {
        (None, "cls") => &["embeddings.cls_token", "embeddings.class_embedding"],
        (None, "registers") => &["embeddings.register_tokens"],
        (None, "positions") => {
            &["embeddings.position_embeddings", "embeddings.position_embedding.weight"]
        }
        (None, "patch") => &[
            "embeddings.patch_embeddings.projection",
            "embeddings.patch_embeddings",
            "embeddings.patch_embedding",
        ],
        (None, "pre") => &["pre_layrnorm"],
        (None, "norm") => &["layernorm", "norm", "post_layernorm"],
        (None, "projection") => &["visual_projection"],
        (None, "pool.query") => &["head.probe"],
        (None, "pool.q") => &["head.attention.in_proj:0/3"],
        (None, "pool.k") => &["head.attention.in_proj:1/3"],
        (None, "pool.v") => &["head.attention.in_proj:2/3"],
        (None, "pool.out") => &["head.attention.out_proj"],
        (None, "pool.norm") => &["head.layernorm"],
        (None, "pool.up") => &["head.mlp.fc1"],
        (None, "pool.down") => &["head.mlp.fc2"],
        (Some(_), "norm1") => &["norm1", "layernorm_before", "layer_norm1"],
        (Some(_), "norm2") => &["norm2", "layernorm_after", "layer_norm2"],
        (Some(_), "q") => &["attention.attention.query", "attention.q_proj", "self_attn.q_proj"],
        (Some(_), "k") => &["attention.attention.key", "attention.k_proj", "self_attn.k_proj"],
        (Some(_), "v") => &["attention.attention.value", "attention.v_proj", "self_attn.v_proj"],
        (Some(_), "out") => &["attention.output.dense", "attention.o_proj", "self_attn.out_proj"],
        (Some(_), "scale1") => &["layer_scale1.lambda1"],
        (Some(_), "scale2") => &["layer_scale2.lambda1"],
        (Some(_), "gate") => &["mlp.weights_in:0/2", "mlp.gate_proj"],
        (Some(_), "up") => &["mlp.fc1", "mlp.up_proj", "intermediate.dense", "mlp.weights_in:1/2"],
        (Some(_), "down") => &["mlp.fc2", "mlp.down_proj", "output.dense", "mlp.weights_out"],
        _ => &[],
    };
    let prefix = block.map(|block| format!("{blocks}{block}.")).unwrap_or_default();
    words.iter().map(|words| candidate(words, ending, &prefix)).collect()
}

fn of_timm(name: &str) -> Vec<CandidateTensor> {
    let (block, word, ending) = split(name);
    let is_bias = ending == "bias";
    let words: &[&str] = match (block, word) {
        (None, "cls") => &["cls_token"],
        (None, "registers") => &["reg_token", "register_tokens", "storage_tokens"],
        (None, "positions") => &["pos_embed"],
        (None, "patch") => &["patch_embed.proj"],
        (None, "pre") => &["norm_pre"],
        (None, "norm") => &["norm"],
        (None, "projection") => &["head"],
        (None, "pool.query") => &["attn_pool.latent"],
        (None, "pool.q") => &["attn_pool.q"],
        (None, "pool.k") => &["attn_pool.kv:0/2"],
        (None, "pool.v") => &["attn_pool.kv:1/2"],
        (None, "pool.out") => &["attn_pool.proj"],
        (None, "pool.norm") => &["attn_pool.norm"],
        (None, "pool.up") => &["attn_pool.mlp.fc1"],
        (None, "pool.down") => &["attn_pool.mlp.fc2"],
        (Some(_), "norm1") => &["norm1"],
        (Some(_), "norm2") => &["norm2"],
        (Some(_), "q") => &["attn.qkv:0/3"],
        (Some(_), "k") => &["attn.qkv:1/3"],
        (Some(_), "v") => &["attn.qkv:2/3"],
        (Some(_), "out") => &["attn.proj"],
        (Some(_), "scale1") => &["ls1.gamma", "gamma_1"],
        (Some(_), "scale2") => &["ls2.gamma", "gamma_2"],
        (Some(_), "gate") => &["mlp.fc1_g", "mlp.w12:0/2", "mlp.fc1:0/2"],
        (Some(_), "up") => &["mlp.fc1_x", "mlp.w12:1/2", "mlp.fc1:1/2"],
        (Some(_), "down") => &["mlp.fc2", "mlp.w3"],
        _ => &[],
    };
    let prefix = block.map(|block| format!("blocks.{block}.")).unwrap_or_default();
    let mut found: Vec<_> = words.iter().map(|words| candidate(words, ending, &prefix)).collect();
    if is_bias && matches!(word, "q" | "v") && block.is_some() {
        // DINOv3 in timm: one bias each, and none for the keys.
        let name = format!("{prefix}attn.{word}_bias");
        found.push(CandidateTensor { name, part: 0, parts: 1 });
    }
    found
}

/// Takes the tensors of the plan from those of the file.
///
/// # Errors
///
/// A tensor of the plan is missing or has another shape, or a tensor of the file is not used.
pub fn internal(
    layout: &Layout,
    plan: &TransformerPlan,
    tensors: &mut FileTensors,
) -> Result<BTreeMap<String, ShapedNumbers>> {
    let mut used = BTreeSet::new();
    let mut given = BTreeMap::new();
    settle_biases(layout, plan, tensors)?;
    let is_gated = matches!(plan.mlp, Mlp::Gated { .. });
    for TransformerTensor { name, shape } in plan.tensors() {
        let mut candidates = layout.candidates(&name);
        if !is_gated {
            whole_up(&mut candidates);
        }
        let there = candidates.iter().find(|candidate| tensors.has(&candidate.name));
        let Some(CandidateTensor { name: in_file, part, parts }) = there else {
            let names: Vec<_> = candidates.iter().map(|one| format!("`{}`", one.name)).collect();
            bail!("{} has no tensor {}", tensors.origin(), names.join(" or "))
        };
        used.insert(in_file.clone());
        let (found, numbers) = tensors.get(in_file).context("a tensor that was there")?;
        let wanted = Wanted { plan, name: &name, shape: &shape };
        let mut taken = wanted
            .take(found, numbers, *part, *parts)
            .with_context(|| format!("tensor `{in_file}` of {} is {found:?}", tensors.origin()))?;
        if name == "cls" {
            add_class_position(&mut taken, layout, plan, tensors);
        }
        given.insert(name, (shape, taken));
    }
    match tensors.names().find(|name| !used.contains(*name)) {
        Some(name) => bail!(
            "{} has a tensor `{name}`, which the network of its config.json does not have",
            tensors.origin()
        ),
        None => Ok(given),
    }
}

/// Takes the whole of a tensor for a plain MLP; a gated one has gate and up in it.
fn whole_up(candidates: &mut Vec<CandidateTensor>) {
    let plain = candidates
        .iter_mut()
        .find(|candidate| candidate.name.contains("mlp.fc1.") && candidate.parts == 2);
    if let Some(candidate) = plain.filter(|candidate| candidate.part == 1) {
        let whole = CandidateTensor { part: 0, parts: 1, ..candidate.clone() };
        *candidates = vec![whole];
    }
}

/// A tensor of a plan.
struct Wanted<'a> {
    plan: &'a TransformerPlan,
    name: &'a str,
    shape: &'a [usize],
}

impl Wanted<'_> {
    /// Takes this tensor out of one of a file.
    fn take(
        &self,
        found: &[usize],
        numbers: &[f32],
        part: usize,
        parts: usize,
    ) -> Result<Vec<f32>> {
        let Self { name, shape, .. } = *self;
        if name == "positions" {
            return self.positions(found, numbers);
        }
        let mut packed = shape.to_vec();
        packed[0] *= parts;
        // Published tokens have axes of one picture and one token in front.
        let leading = found.len().saturating_sub(packed.len());
        let is_same = found[leading..] == packed && found[..leading].iter().all(|&side| side == 1);
        ensure!(is_same, "its config.json needs {packed:?}");
        let length = numbers.len() / parts;
        Ok(numbers[part * length..(part + 1) * length].to_vec())
    }

    /// The positions of the patches, which follow that of the class token if there is one.
    fn positions(&self, found: &[usize], numbers: &[f32]) -> Result<Vec<f32>> {
        let (rows, width) = (self.shape[0], self.plan.width);
        let of_class = usize::from(self.plan.class_token);
        let leading = found.len().saturating_sub(2);
        let is_matrix = found.len() >= 2
            && found[..leading].iter().all(|&side| side == 1)
            && found[leading + 1] == width;
        ensure!(
            is_matrix && [rows, rows + of_class].contains(&found[leading]),
            "its config.json needs {rows} rows of {width}, and one more where the class token has a \
             position"
        );
        Ok(numbers[numbers.len() - rows * width..].to_vec())
    }
}

/// Adds the position of the class token: the first row, if the file has one row more than the grid.
/// timm's files with registers already include it in the token.
fn add_class_position(
    class: &mut [f32],
    layout: &Layout,
    plan: &TransformerPlan,
    tensors: &FileTensors,
) {
    let Positions::Absolute { grid, .. } = plan.positions else { return };
    let candidates = layout.candidates("positions");
    let found = candidates.iter().find_map(|candidate| tensors.get(&candidate.name));
    if let Some((_, numbers)) = found
        && numbers.len() == (grid * grid + 1) * plan.width
    {
        class.iter_mut().zip(numbers).for_each(|(class, position)| *class += position);
    }
}

/// Adapts the biases of timm's files to the plan: DINOv3's files may lack those of queries and values,
/// which are then zero; CLIP's projection has one, which must be zero.
fn settle_biases(layout: &Layout, plan: &TransformerPlan, tensors: &mut FileTensors) -> Result<()> {
    if *layout != Layout::Timm {
        return Ok(());
    }
    if let Positions::Rotary { .. } = plan.positions {
        for block in 0..plan.depth {
            let attention = format!("blocks.{block}.attn");
            for name in [format!("{attention}.q_bias"), format!("{attention}.v_bias")] {
                if !tensors.has(&format!("{attention}.qkv.bias")) && !tensors.has(&name) {
                    tensors.insert(name, vec![plan.width], vec![0.; plan.width]);
                }
            }
        }
    }
    if plan.projection.is_some()
        && let Some((_, numbers)) = tensors.remove("head.bias")
    {
        ensure!(
            numbers.iter().all(|&number| number == 0.),
            "tensor `head.bias` of {} is not zero; the projection has no bias",
            tensors.origin()
        );
    }
    Ok(())
}

/// The plan of one of timm's Vision Transformers: widths from the tensors, the rest from its name.
fn timm_plan(architecture: &str, tag: &str, tensors: &FileTensors) -> Result<TransformerPlan> {
    let shape = |name: &str| {
        tensors.shape(name).with_context(|| format!("{} has no tensor `{name}`", tensors.origin()))
    };
    let &[width, 3, patch_pixels, _] = shape("patch_embed.proj.weight")? else {
        bail!("tensor `patch_embed.proj.weight` of {} is not a patch embedding", tensors.origin())
    };
    let has_block = |block: &usize| tensors.has(&format!("blocks.{block}.norm1.weight"));
    let is = |word: &str| architecture.contains(word);
    let (epsilon, activation) = match () {
        () if is("dinov3") => (1e-5, Activation::GeluErf),
        // OpenAI's weights were trained with it, although timm runs them with another.
        () if is("_clip_") && (is("quickgelu") || tag.starts_with("openai")) => {
            (1e-5, Activation::GeluQuick)
        }
        () if is("_clip_") => (1e-5, Activation::GeluErf),
        () if is("siglip") => (1e-6, Activation::GeluTanh),
        () => (1e-6, Activation::GeluErf),
    };
    let is_gated = |hidden: usize| {
        ["mlp.fc1_g.weight", "mlp.w12.weight"].iter().any(|n| tensors.has(&format!("blocks.0.{n}")))
            || tensors.shape("blocks.0.mlp.fc1.weight") == Some(&[2 * hidden, width])
    };
    let down = shape("blocks.0.mlp.fc2.weight").or_else(|_| shape("blocks.0.mlp.w3.weight"))?;
    let mlp = match down.last().copied().unwrap_or_default() {
        hidden if is_gated(hidden) => Mlp::Gated { hidden },
        hidden => Mlp::Plain { hidden, activation },
    };
    let class_token = tensors.has("cls_token");
    let mut registers = of_timm("registers").into_iter();
    let registers =
        registers.find_map(|one| tensors.shape(&one.name)?.iter().rev().nth(1).copied());
    Ok(TransformerPlan {
        patch_pixels,
        patch_bias: tensors.has("patch_embed.proj.bias"),
        width,
        depth: (0..).take_while(has_block).count(),
        // The one published network whose heads are not 64 wide has 72.
        heads: if is("so400m") { 16 } else { width / 64 },
        key_bias: !is("dinov3"),
        mlp,
        layer_scale: of_timm("blocks.0.scale1").iter().any(|one| tensors.has(&one.name)),
        class_token,
        registers: registers.unwrap_or(0),
        positions: timm_positions(class_token, is("dinov3"), tensors)?,
        pre_norm: tensors.has("norm_pre.weight"),
        final_norm: FinalNorm::AllTokens,
        epsilon,
        attention_pooling: tensors.has("attn_pool.latent"),
        projection: tensors.shape("head.weight").map(|shape| shape[0]),
    })
}

fn timm_positions(class_token: bool, is_rotary: bool, tensors: &FileTensors) -> Result<Positions> {
    if is_rotary {
        return Ok(Positions::Rotary { base: 100. });
    }
    let origin = tensors.origin();
    let shape = tensors.shape("pos_embed");
    let shape = shape.with_context(|| format!("{origin} has no tensor `pos_embed`"))?;
    let rows = shape.iter().rev().nth(1).copied().unwrap_or_default();
    let is_of = |grid: &usize| grid * grid == rows || class_token && grid * grid + 1 == rows;
    let grid =
        (1..=rows).take_while(|grid| grid * grid <= rows).find(is_of).with_context(|| {
            format!(
                "tensor `pos_embed` of {origin} has {rows} rows, which do not form a square grid"
            )
        })?;
    Ok(Positions::Absolute { grid, resampling: Resampling::Antialias })
}
