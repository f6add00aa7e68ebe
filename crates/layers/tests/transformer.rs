//! Transformers against reference values: narrow networks under the names of published files, computed in f64
//! by the libraries that published them.
//!
//! The values are not part of the repository. The tests read them from the folder that `ASSORT_GOLDEN` names,
//! and are skipped without it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{D, DType, Device, Result, Tensor, safetensors};
use kernels::Variant;
use layers::{
    Activation, FinalNorm, Mlp, Positions, Precision, Resampling, TokensAfter, Transformer,
    TransformerPlan, TransformerWeights,
};

/// The folder of reference values, or `None` with a message.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("ASSORT_GOLDEN").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: ASSORT_GOLDEN names no folder of reference values");
    }
    folder
}

/// The kind of file that a network comes from.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Dinov2,
    Vit,
    Dinov3,
    /// CLIP's and SigLIP's vision towers.
    Tower,
}

/// The name in the file of a tensor, without what is stacked or split there.
fn file_name(family: Family, name: &str) -> String {
    let common: &[(&str, &str)] =
        &[("scale1", "layer_scale1.lambda1"), ("scale2", "layer_scale2.lambda1")];
    let own: &[(&str, &str)] = match family {
        Family::Dinov2 => &[
            ("registers", "embeddings.register_tokens"),
            ("patch.", "embeddings.patch_embeddings.projection."),
            ("blocks.", "encoder.layer."),
            (".q.", ".attention.attention.query."),
            (".k.", ".attention.attention.key."),
            (".v.", ".attention.attention.value."),
            (".out.", ".attention.output.dense."),
            (".up.", ".mlp.fc1."),
            (".down.", ".mlp.fc2."),
        ],
        Family::Vit => &[
            ("patch.", "embeddings.patch_embeddings.projection."),
            ("blocks.", "encoder.layer."),
            (".q.", ".attention.attention.query."),
            (".k.", ".attention.attention.key."),
            (".v.", ".attention.attention.value."),
            (".out.", ".attention.output.dense."),
            (".up.", ".intermediate.dense."),
            (".down.", ".output.dense."),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
        ],
        Family::Dinov3 => &[
            ("cls", "embeddings.cls_token"),
            ("registers", "embeddings.register_tokens"),
            ("patch.", "embeddings.patch_embeddings."),
            ("blocks.", "layer."),
            (".q.", ".attention.q_proj."),
            (".k.", ".attention.k_proj."),
            (".v.", ".attention.v_proj."),
            (".out.", ".attention.o_proj."),
            (".gate.", ".mlp.gate_proj."),
            (".up.", ".mlp.up_proj."),
            (".down.", ".mlp.down_proj."),
        ],
        Family::Tower => &[
            ("patch.", "embeddings.patch_embedding."),
            ("pre.", "pre_layrnorm."),
            ("blocks.", "encoder.layers."),
            (".q.", ".self_attn.q_proj."),
            (".k.", ".self_attn.k_proj."),
            (".v.", ".self_attn.v_proj."),
            (".out.", ".self_attn.out_proj."),
            (".up.", ".mlp.fc1."),
            (".down.", ".mlp.fc2."),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("projection", "visual_projection"),
        ],
    };
    let mut file = name.to_owned();
    match (family, name.strip_prefix("norm.")) {
        (Family::Dinov2 | Family::Vit, Some(part)) => return format!("layernorm.{part}"),
        (Family::Tower, Some(part)) => return format!("post_layernorm.{part}"),
        _ => {}
    }
    if let (Family::Tower, Some(part)) = (family, name.strip_prefix("pool.")) {
        let part = part.replace("query", "probe").replace("out.", "attention.out_proj.");
        let part = part.replace("norm.", "layernorm.").replace("up.", "mlp.fc1.");
        return format!("head.{}", part.replace("down.", "mlp.fc2."));
    }
    for (ours, theirs) in common.iter().chain(own) {
        file = file.replace(ours, theirs);
    }
    file
}

/// The numbers of a file under the names of the plan.
fn weights(
    family: Family,
    plan: &TransformerPlan,
    file: &HashMap<String, Tensor>,
) -> Result<TransformerWeights> {
    let get = |name: &str| {
        let towered = format!("vision_model.{name}");
        let tensor = file.get(name).or_else(|| file.get(&towered));
        tensor.unwrap_or_else(|| panic!("the file has no `{name}`")).to_dtype(DType::F32)
    };
    let positions = || match family {
        Family::Tower => get("embeddings.position_embedding.weight"),
        _ => get("embeddings.position_embeddings")?.squeeze(0),
    };
    let part = |tensor: Tensor, part: usize, parts: usize| {
        let rows = tensor.dim(0)? / parts;
        tensor.narrow(0, part * rows, rows)
    };
    let mut given = BTreeMap::new();
    for wanted in plan.tensors() {
        let name = wanted.name.as_str();
        let gated = matches!(plan.mlp, Mlp::Gated { .. }) && family == Family::Dinov2;
        let (start, end) = name.rsplit_once('.').unwrap_or((name, ""));
        let block = start.rsplit_once('.').map_or("", |(block, _)| block);
        let packed =
            || get(&format!("{}.mlp.weights_in.{end}", block.replace("blocks", "encoder.layer")));
        let in_proj = || get(&format!("head.attention.in_proj_{end}"));
        let tensor = match start {
            "cls" if family == Family::Dinov3 => get("embeddings.cls_token")?,
            "cls" => {
                let class = match family {
                    Family::Tower => get("embeddings.class_embedding")?,
                    _ => get("embeddings.cls_token")?,
                };
                (class.flatten_all()? + positions()?.get(0)?)?
            }
            "positions" if plan.class_token => {
                let all = positions()?;
                all.narrow(0, 1, all.dim(0)? - 1)?
            }
            "positions" => positions()?,
            "pool.q" => part(in_proj()?, 0, 3)?,
            "pool.k" => part(in_proj()?, 1, 3)?,
            "pool.v" => part(in_proj()?, 2, 3)?,
            _ if gated && start.ends_with(".gate") => part(packed()?, 0, 2)?,
            _ if gated && start.ends_with(".up") => part(packed()?, 1, 2)?,
            _ if gated && start.ends_with(".down") => {
                get(&format!("{}.mlp.weights_out.{end}", block.replace("blocks", "encoder.layer")))?
            }
            _ => get(&file_name(family, name))?,
        };
        let tensor = tensor.reshape(wanted.shape.clone())?;
        given.insert(wanted.name.clone(), (wanted.shape, tensor.flatten_all()?.to_vec1()?));
    }
    TransformerWeights::new(plan, given)
}

/// The narrow networks: width 48, two blocks, three heads.
fn narrow(patch_pixels: usize, grid: usize) -> TransformerPlan {
    TransformerPlan {
        patch_pixels,
        patch_bias: true,
        width: 48,
        depth: 2,
        heads: 3,
        key_bias: true,
        mlp: Mlp::Plain { hidden: 192, activation: Activation::GeluErf },
        layer_scale: true,
        class_token: true,
        registers: 0,
        positions: Positions::Absolute { grid, resampling: Resampling::Size },
        pre_norm: false,
        final_norm: FinalNorm::AllTokens,
        epsilon: 1e-6,
        attention_pooling: false,
        projection: None,
    }
}

/// Positions on a grid of 5 × 5 under a rule.
fn five(resampling: Resampling) -> Positions {
    Positions::Absolute { grid: 5, resampling }
}

/// One network and the cases computed with it.
struct Model {
    family: Family,
    file: &'static str,
    plan: TransformerPlan,
    cases: &'static [&'static str],
}

fn models() -> Vec<Model> {
    let with = |resampling| TransformerPlan { positions: five(resampling), ..narrow(14, 5) };
    let dinov3 = TransformerPlan {
        positions: Positions::Rotary { base: 100. },
        registers: 4,
        key_bias: false,
        epsilon: 1e-5,
        ..narrow(16, 4)
    };
    let siglip = TransformerPlan {
        mlp: Mlp::Plain { hidden: 192, activation: Activation::GeluTanh },
        layer_scale: false,
        class_token: false,
        attention_pooling: true,
        ..narrow(16, 4)
    };
    let clip = TransformerPlan {
        patch_bias: false,
        mlp: Mlp::Plain { hidden: 192, activation: Activation::GeluQuick },
        layer_scale: false,
        pre_norm: true,
        final_norm: FinalNorm::ClassToken,
        epsilon: 1e-5,
        projection: Some(32),
        ..narrow(16, 4)
    };
    let model = |family, file, plan, cases| Model { family, file, plan, cases };
    vec![
        // T1, T2
        model(
            Family::Dinov2,
            "hf_dinov2_narrow",
            narrow(14, 5),
            &[
                "hf_dinov2_narrow_70x70",
                "hf_dinov2_narrow_56x56",
                "hf_dinov2_narrow_56x84",
                "hf_dinov2_narrow_98x98",
            ],
        ),
        // T3, T4: the same numbers under other rules.
        model(
            Family::Dinov2,
            "hf_dinov2_narrow",
            with(Resampling::Offset),
            &["hub_dinov2_narrow_56x56"],
        ),
        model(
            Family::Dinov2,
            "hf_dinov2_narrow",
            with(Resampling::Antialias),
            &["timm_dinov2_narrow_56x56"],
        ),
        // T5
        model(
            Family::Dinov2,
            "hf_dinov2_swiglu_narrow",
            TransformerPlan { mlp: Mlp::Gated { hidden: 128 }, ..narrow(14, 4) },
            &["hf_dinov2_swiglu_narrow_56x56"],
        ),
        // T6
        model(
            Family::Dinov2,
            "hf_dinov2_reg_narrow",
            TransformerPlan { registers: 4, ..with(Resampling::Antialias) },
            &[
                "hf_dinov2_reg_narrow_70x70",
                "hf_dinov2_reg_narrow_56x56",
                "hf_dinov2_reg_narrow_56x84",
            ],
        ),
        // T7
        model(
            Family::Vit,
            "hf_vit_narrow",
            TransformerPlan { layer_scale: false, epsilon: 1e-12, ..narrow(16, 4) },
            &["hf_vit_narrow_64x64", "hf_vit_narrow_96x96", "hf_vit_narrow_80x48"],
        ),
        // T8
        model(
            Family::Tower,
            "hf_clip_narrow",
            clip,
            &["hf_clip_narrow_64x64", "hf_clip_narrow_96x96"],
        ),
        // T9
        model(
            Family::Tower,
            "hf_siglip_narrow",
            siglip,
            &["hf_siglip_narrow_64x64", "hf_siglip_narrow_96x96"],
        ),
        // T10
        model(
            Family::Dinov3,
            "hf_dinov3_gated_narrow",
            TransformerPlan { mlp: Mlp::Gated { hidden: 96 }, ..dinov3.clone() },
            &["hf_dinov3_gated_narrow_64x64"],
        ),
        model(
            Family::Dinov3,
            "hf_dinov3_narrow",
            dinov3,
            &["hf_dinov3_narrow_64x64", "hf_dinov3_narrow_96x96", "hf_dinov3_narrow_64x96"],
        ),
    ]
}

/// A value of a case by its name, as this crate computes it; `None` for a name that is not an output of a network.
fn computed(network: &Transformer, pictures: &Tensor, name: &str) -> Result<Option<Tensor>> {
    let output = network.forward(pictures)?;
    let value = match name {
        "cls" => output.class.expect("a class token"),
        "mean_patch" => output.patch_mean,
        "pooler_output" => output.pooled.or(output.class).expect("a pooled output"),
        "image_embeds" => output.projection.expect("a projection"),
        "image_embeds_unit" => {
            let projection = output.projection.expect("a projection");
            projection.broadcast_div(&projection.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?
        }
        "embeddings" | "hidden_0" => network.tokens(pictures, TokensAfter::Embedding)?,
        "hidden_1" => network.tokens(pictures, TokensAfter::Blocks(1))?,
        "last_hidden_state" => network.tokens(pictures, TokensAfter::FinalNorm)?,
        _ => return Ok(None),
    };
    Ok(Some(value))
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f64::max)
}

/// The relative error of a row, by norm, and its cosine.
fn row_error(got: &[f64], want: &[f64]) -> (f64, f64) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let off: Vec<f64> = got.iter().zip(want).map(|(a, b)| a - b).collect();
    let norm = dot(want, want).sqrt();
    (dot(&off, &off).sqrt() / norm, dot(got, want) / (norm * dot(got, got).sqrt()))
}

/// (N, 3, H, W) as (N, H, W, 3), f32.
fn channels_last(pictures: &Tensor) -> Result<Tensor> {
    pictures.to_dtype(DType::F32)?.permute((0, 2, 3, 1))?.contiguous()
}

/// Runs `check(label, network, pictures, values)` on every case, with the values by name.
fn each_case(
    precision: Precision,
    check: impl Fn(&str, &Transformer, &Tensor, &[(String, Vec<f64>)]) -> Result<()>,
) -> Result<()> {
    let Some(folder) = golden().map(|folder| folder.join("vit")) else { return Ok(()) };
    let values = safetensors::load(folder.join("vit.safetensors"), &Device::Cpu)?;
    let mut cases = 0;
    for Model { family, file, plan, cases: names } in models() {
        let path = folder.join(format!("{file}_weights.safetensors"));
        let weights = weights(family, &plan, &safetensors::load(path, &Device::Cpu)?)?;
        let kernels = Variant::testable().into_iter().map(|variant| {
            (variant.name().to_owned(), Transformer::on_variant(&weights, variant, precision))
        });
        let tensors = Transformer::on_tensors(&weights, &Device::Cpu, precision)?;
        for (way, network) in kernels.chain([("tensors".to_owned(), tensors)]) {
            for case in names {
                // Two cases share the pictures of another one.
                let input = case.replace("hub_", "hf_").replace("timm_", "hf_");
                let pictures = channels_last(&values[&format!("{input}/in/x")])?;
                let prefix = format!("{case}/out/");
                let wanted = values.iter().filter_map(|(name, value)| {
                    let name = name.strip_prefix(&prefix)?.strip_suffix("@f64")?;
                    Some(numbers(value).map(|value| (name.to_owned(), value)))
                });
                let wanted: Vec<_> = wanted.collect::<Result<_>>()?;
                assert!(!wanted.is_empty(), "{case} has no values");
                check(&format!("{case} on {way}"), &network, &pictures, &wanted)?;
                cases += 1;
            }
        }
    }
    assert!(cases >= 21, "{cases}");
    Ok(())
}

/// Pretrained networks, cases T1 to T10.
#[test]
fn narrow_networks_match_their_libraries_in_f32() -> Result<()> {
    each_case(Precision::F32, |label, network, pictures, wanted| {
        for (name, want) in wanted {
            let Some(got) = computed(network, pictures, name)? else {
                assert!(name.starts_with("rope_"), "{name}");
                continue;
            };
            let off = largest_difference(&numbers(&got)?, want);
            assert!(off < 2e-5, "{label}, {name}: {off:e}");
        }
        Ok(())
    })
}

#[test]
fn features_of_narrow_networks_in_bf16_are_near_their_libraries() -> Result<()> {
    each_case(Precision::Bf16, |label, network, pictures, wanted| {
        let feature = ["image_embeds", "pooler_output", "cls"];
        let name = feature.into_iter().find(|name| wanted.iter().any(|(n, _)| n == name));
        let name = name.expect("a feature");
        let (_, want) = wanted.iter().find(|(n, _)| n == name).expect("found");
        let got = network.forward(pictures)?.feature().clone();
        let width = got.dim(1)?;
        for (got, want) in numbers(&got)?.chunks(width).zip(want.chunks(width)) {
            let (error, cosine) = row_error(got, want);
            assert!(error <= 3e-2 && cosine >= 0.9995, "{label}: {error}, {cosine}");
        }
        Ok(())
    })
}

/// Pretrained networks, case T17: a real DINOv2 ViT-S/14 in the layout of `facebook/dinov2-small`. `ASSORT_DINOV2_SMALL` names its
/// `model.safetensors`; the reference values are those of the one with fine-tuned last layers.
#[test]
fn a_real_checkpoint_matches_its_library() -> Result<()> {
    let (Some(folder), Some(file)) = (golden(), std::env::var_os("ASSORT_DINOV2_SMALL")) else {
        eprintln!(
            "skipped: ASSORT_DINOV2_SMALL names no checkpoint, or there are no values for it"
        );
        return Ok(());
    };
    let plan = TransformerPlan {
        width: 384,
        depth: 12,
        heads: 6,
        mlp: Mlp::Plain { hidden: 1536, activation: Activation::GeluErf },
        ..narrow(14, 37)
    };
    let file = safetensors::load(PathBuf::from(file), &Device::Cpu)?;
    let weights = weights(Family::Dinov2, &plan, &file)?;
    let pictures: Vec<f32> = stream("input.real", 61, 3 * 224 * 224).map(|v| 2. * v).collect();
    let pictures = Tensor::from_vec(pictures, (1, 3, 224, 224), &Device::Cpu)?;
    let pictures = channels_last(&pictures)?;
    let values = safetensors::load(folder.join("vit/vit.safetensors"), &Device::Cpu)?;
    let want = |name: &str| numbers(&values[&format!("real_dinov2s_224/out/{name}@f64")]);

    let variant = Variant::available().pop().expect("one");
    let network = Transformer::on_variant(&weights, variant, Precision::F32);
    let output = network.forward(&pictures)?;
    let token = |after, at: usize| network.tokens(&pictures, after)?.narrow(1, at, 1)?.squeeze(1);
    for (name, got) in [
        ("cls", output.feature().clone()),
        ("mean_patch", output.patch_mean.clone()),
        ("token_17", token(TokensAfter::FinalNorm, 17)?),
        ("hidden_0_token_17", token(TokensAfter::Embedding, 17)?),
        ("hidden_11_cls", token(TokensAfter::Blocks(11), 0)?),
    ] {
        let off = largest_difference(&numbers(&got)?, &want(name)?);
        assert!(off < 1e-4, "{name}: {off:e}");
    }

    // The last variant multiplies bf16 numbers on every x86 processor with AVX2, in emulation if need be.
    let variant = Variant::testable().pop().expect("one");
    let in_bf16 = [
        Transformer::on_variant(&weights, variant, Precision::Bf16),
        Transformer::on_tensors(&weights, &Device::Cpu, Precision::Bf16)?,
    ];
    for network in in_bf16 {
        let got = numbers(network.forward(&pictures)?.feature())?;
        let (error, cosine) = row_error(&got, &want("cls")?);
        assert!(error <= 3e-2 && cosine >= 0.9995, "{error}, {cosine}");
    }
    Ok(())
}

/// Numbers in [-1, 1) made from a name: FNV-1a, then splitmix64.
fn stream(name: &str, seed: u64, len: usize) -> impl Iterator<Item = f32> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let start = hash.wrapping_add(seed << 32);
    (1..=len as u64).map(move |j| {
        let mut z = start.wrapping_add(j.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        2. * ((z ^ (z >> 31)) >> 40) as f32 / 16_777_216. - 1.
    })
}
