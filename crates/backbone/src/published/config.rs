//! `config.json` of transformers and of timm.
//!
//! Files omit keys that have their default. So the defaults here are those of the classes of
//! transformers 5.24 that read the files; timm's widths follow from the shapes of the tensors.

use anyhow::{Context, Result, bail, ensure};
use layers::{Activation, FinalNorm, Mlp, Positions, Resampling, TransformerPlan};
use serde::Deserialize;
use serde_json::Value;

use super::CheckpointFamily;

/// The contents of a `config.json`.
#[derive(Debug)]
pub struct HubConfig {
    pub family: CheckpointFamily,
    pub form: ConfigForm,
}

/// The two forms of the file.
#[derive(Debug)]
pub enum ConfigForm {
    /// A file of transformers: it says everything except whether there is a projection.
    Transformers { plan: Box<TransformerPlan>, projection: Projection },
    /// A file of timm: the name of the architecture, and the tag of its training.
    Timm { architecture: String, tag: String },
}

/// Whether the class token is mapped linearly at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    None,
    /// To this width.
    Always(usize),
    /// To this width, if the file has the weights.
    IfThere(usize),
}

/// Keys of a file of transformers; an absent key has the default of its class.
#[derive(Debug, Default, Deserialize)]
struct HubKeys {
    architectures: Option<Vec<String>>,
    hidden_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    intermediate_size: Option<usize>,
    mlp_ratio: Option<f64>,
    patch_size: Option<usize>,
    image_size: Option<usize>,
    num_channels: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
    num_register_tokens: Option<usize>,
    use_swiglu_ffn: Option<bool>,
    use_gated_mlp: Option<bool>,
    qkv_bias: Option<bool>,
    query_bias: Option<bool>,
    key_bias: Option<bool>,
    value_bias: Option<bool>,
    proj_bias: Option<bool>,
    mlp_bias: Option<bool>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    projection_dim: Option<usize>,
    vision_use_head: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Rope {
    rope_theta: f64,
}

const KNOWN: &str = "dinov2, dinov2_with_registers, dinov3_vit, vit, vit_msn, clip, clip_vision_model, \
                     siglip and siglip_vision_model of transformers, and timm's architectures vit_* and \
                     resnet*";

impl HubConfig {
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value = serde_json::from_str(text).context("config.json is not JSON")?;
        let word = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        match (word("model_type"), word("architecture")) {
            (Some(kind), _) => transformers(&kind, &value),
            (None, Some(architecture)) => {
                let tag = value.pointer("/pretrained_cfg/tag").and_then(Value::as_str);
                let family = match architecture.as_str() {
                    name if name.starts_with("resnet") => CheckpointFamily::Residual,
                    name if name.starts_with("vit_") => CheckpointFamily::Timm,
                    name => bail!("timm's architecture `{name}` is not known; known are {KNOWN}"),
                };
                let tag = tag.unwrap_or_default().to_owned();
                Ok(Self { family, form: ConfigForm::Timm { architecture, tag } })
            }
            (None, None) => bail!(
                "config.json has neither `model_type`, as files of transformers have, nor \
                 `architecture`, as files of timm have"
            ),
        }
    }
}

fn transformers(kind: &str, value: &Value) -> Result<HubConfig> {
    let keys = |value: &Value| HubKeys::deserialize(value).context("config.json has a wrong value");
    let whole = keys(value)?;
    let vision = match (kind, value.get("vision_config")) {
        ("clip" | "siglip", Some(vision)) => keys(vision)?,
        ("clip" | "siglip", None) => HubKeys::default(),
        _ => keys(value)?,
    };
    let channels = vision.num_channels.unwrap_or(3);
    ensure!(channels == 3, "`num_channels` in config.json is {channels}; only 3 are supported");
    let (family, plan) = match kind {
        "dinov2" | "dinov2_with_registers" => (CheckpointFamily::Dinov2, dinov2(kind, &vision)?),
        "dinov3_vit" => (CheckpointFamily::Dinov3, dinov3(&vision)?),
        "vit" | "vit_msn" => (CheckpointFamily::Vit, vit(kind, &vision)?),
        "clip" | "clip_vision_model" => (CheckpointFamily::Clip, clip(&vision)?),
        "siglip" | "siglip_vision_model" => (CheckpointFamily::Siglip, siglip(&vision)?),
        other => bail!("the `model_type` `{other}` is not known; known are {KNOWN}"),
    };
    let width = whole.projection_dim.unwrap_or(512);
    let is_projecting = whole.architectures.iter().flatten().any(|a| a.contains("WithProjection"));
    let projection = match kind {
        "clip" => Projection::Always(width),
        "clip_vision_model" if is_projecting => Projection::Always(width),
        "clip_vision_model" => Projection::IfThere(width),
        _ => Projection::None,
    };
    let form = ConfigForm::Transformers { plan: Box::new(plan), projection };
    Ok(HubConfig { family, form })
}

/// The part that most families share, with the defaults of one.
fn base(keys: &HubKeys, patch: usize, epsilon: f64, image: usize) -> Result<TransformerPlan> {
    ensure!(
        keys.qkv_bias != Some(false),
        "`qkv_bias` in config.json is false, which is not supported"
    );
    let patch_pixels = keys.patch_size.unwrap_or(patch);
    let width = keys.hidden_size.unwrap_or(768);
    Ok(TransformerPlan {
        patch_pixels,
        patch_bias: true,
        width,
        depth: keys.num_hidden_layers.unwrap_or(12),
        heads: keys.num_attention_heads.unwrap_or(12),
        key_bias: true,
        mlp: Mlp::Plain {
            hidden: keys.intermediate_size.unwrap_or(3072),
            activation: activation(keys.hidden_act.as_deref().unwrap_or("gelu"))?,
        },
        layer_scale: false,
        class_token: true,
        registers: 0,
        positions: Positions::Absolute {
            grid: keys.image_size.unwrap_or(image) / patch_pixels.max(1),
            resampling: Resampling::Size,
        },
        pre_norm: false,
        final_norm: FinalNorm::AllTokens,
        epsilon: keys.layer_norm_eps.unwrap_or(epsilon),
        attention_pooling: false,
        projection: None,
    })
}

fn activation(name: &str) -> Result<Activation> {
    Ok(match name {
        "gelu" => Activation::GeluErf,
        "quick_gelu" => Activation::GeluQuick,
        "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluTanh,
        other => bail!(
            "`hidden_act` in config.json is `{other}`; gelu, quick_gelu and gelu_pytorch_tanh are \
             supported"
        ),
    })
}

fn dinov2(kind: &str, keys: &HubKeys) -> Result<TransformerPlan> {
    let plan = base(keys, 14, 1e-6, 224)?;
    let hidden = (plan.width as f64 * keys.mlp_ratio.unwrap_or(4.)) as usize;
    let mlp = match (keys.use_swiglu_ffn.unwrap_or(false), plan.mlp) {
        // Rounded up to a multiple of 8, as in `Dinov2SwiGLUFFN`.
        (true, _) => Mlp::Gated { hidden: (hidden * 2 / 3).div_ceil(8) * 8 },
        (false, Mlp::Plain { activation, .. }) => Mlp::Plain { hidden, activation },
        (false, gated) => gated,
    };
    let (registers, positions) = match (kind, plan.positions) {
        ("dinov2_with_registers", Positions::Absolute { grid, .. }) => (
            keys.num_register_tokens.unwrap_or(4),
            Positions::Absolute { grid, resampling: Resampling::Antialias },
        ),
        (_, positions) => (0, positions),
    };
    Ok(TransformerPlan { mlp, registers, positions, layer_scale: true, ..plan })
}

fn dinov3(keys: &HubKeys) -> Result<TransformerPlan> {
    let biases = [
        ("query_bias", keys.query_bias),
        ("value_bias", keys.value_bias),
        ("proj_bias", keys.proj_bias),
        ("mlp_bias", keys.mlp_bias),
    ];
    if let Some((name, _)) = biases.iter().find(|(_, bias)| *bias == Some(false)) {
        bail!("`{name}` in config.json is false, which is not supported")
    }
    let with_defaults = HubKeys {
        hidden_size: keys.hidden_size.or(Some(384)),
        num_attention_heads: keys.num_attention_heads.or(Some(6)),
        intermediate_size: keys.intermediate_size.or(Some(1536)),
        num_hidden_layers: keys.num_hidden_layers,
        patch_size: keys.patch_size,
        layer_norm_eps: keys.layer_norm_eps,
        // A gated MLP has silu; a plain one follows the key.
        hidden_act: keys.hidden_act.clone().filter(|_| !keys.use_gated_mlp.unwrap_or(false)),
        ..HubKeys::default()
    };
    let plan = base(&with_defaults, 16, 1e-5, 224)?;
    let mlp = match keys.use_gated_mlp.unwrap_or(false) {
        true => {
            let name = keys.hidden_act.as_deref().unwrap_or("gelu");
            ensure!(
                name == "silu",
                "`hidden_act` in config.json is `{name}`, but a gated MLP is supported with silu alone"
            );
            Mlp::Gated { hidden: plan.mlp.hidden() }
        }
        false => plan.mlp,
    };
    let theta = keys.rope_theta.or(keys.rope_parameters.as_ref().map(|rope| rope.rope_theta));
    Ok(TransformerPlan {
        mlp,
        key_bias: keys.key_bias.unwrap_or(false),
        registers: keys.num_register_tokens.unwrap_or(0),
        positions: Positions::Rotary { base: theta.unwrap_or(100.) },
        layer_scale: true,
        ..plan
    })
}

fn vit(kind: &str, keys: &HubKeys) -> Result<TransformerPlan> {
    base(keys, 16, if kind == "vit_msn" { 1e-6 } else { 1e-12 }, 224)
}

fn clip(keys: &HubKeys) -> Result<TransformerPlan> {
    let hidden_act = keys.hidden_act.as_deref().unwrap_or("quick_gelu");
    let plan = base(keys, 32, 1e-5, 224)?;
    Ok(TransformerPlan {
        mlp: Mlp::Plain { hidden: plan.mlp.hidden(), activation: activation(hidden_act)? },
        patch_bias: false,
        pre_norm: true,
        final_norm: FinalNorm::ClassToken,
        ..plan
    })
}

fn siglip(keys: &HubKeys) -> Result<TransformerPlan> {
    let hidden_act = keys.hidden_act.as_deref().unwrap_or("gelu_pytorch_tanh");
    let plan = base(keys, 16, 1e-6, 224)?;
    Ok(TransformerPlan {
        mlp: Mlp::Plain { hidden: plan.mlp.hidden(), activation: activation(hidden_act)? },
        class_token: false,
        attention_pooling: keys.vision_use_head.unwrap_or(true),
        ..plan
    })
}
