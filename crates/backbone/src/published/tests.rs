use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use layers::{Activation, FinalNorm, Mlp, Mode, Modes, Positions, Resampling, TransformerPlan};
use serde_json::json;

use super::*;
use crate::{Depth, Stem, backbone_file, resnet, write_configuration};

type TestTensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A narrow network: two blocks of width 12 with three heads, patches of 2 × 2, a grid of 3 × 3.
fn dinov2() -> Value {
    json!({
        "model_type": "dinov2", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
        "mlp_ratio": 2, "patch_size": 2, "image_size": 6, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "initializer_range": 0.02
    })
}

fn with(mut value: Value, changes: Value) -> Value {
    let more = changes.as_object().expect("an object").clone();
    value.as_object_mut().expect("an object").extend(more);
    value
}

/// Reads `tensors` as a file beside `config`.
fn loaded(config: &Value, tensors: &TestTensors) -> Result<PublishedNetwork> {
    let folder = tempfile::tempdir()?;
    let [configuration, weights] =
        ["config.json", "model.safetensors"].map(|n| folder.path().join(n));
    std::fs::write(&configuration, config.to_string())?;
    save(tensors, &weights)?;
    read(Some(&configuration), &[weights])
}

fn save(tensors: &TestTensors, path: &Path) -> Result<()> {
    let tensor = |(name, (shape, numbers)): (&String, &(Vec<usize>, Vec<f32>))| {
        Ok((name.clone(), Tensor::from_vec(numbers.clone(), shape.as_slice(), &Device::Cpu)?))
    };
    let tensors = tensors.iter().map(tensor).collect::<Result<_>>()?;
    Ok(candle_core::safetensors::save(&tensors, path)?)
}

fn weights(network: PublishedNetwork) -> TransformerWeights {
    match network {
        PublishedNetwork::Transformer(weights) => *weights,
        PublishedNetwork::Residual { .. } => panic!("a transformer"),
    }
}

fn refusal(config: &Value, tensors: &TestTensors) -> String {
    format!("{:#}", loaded(config, tensors).err().expect("refused"))
}

/// Tensors of these names and shapes, each with numbers of its own.
fn filled(names: &[(String, Vec<usize>)]) -> TestTensors {
    let fill = |(at, (name, shape)): (usize, &(String, Vec<usize>))| {
        let count = shape.iter().product::<usize>();
        let numbers = (0..count).map(|i| at as f32 + i as f32 / 1024.).collect();
        (name.clone(), (shape.clone(), numbers))
    };
    names.iter().enumerate().map(fill).collect()
}

/// Weight and bias.
fn linear(name: &str, rows: usize, columns: usize) -> [(String, Vec<usize>); 2] {
    [(format!("{name}.weight"), vec![rows, columns]), (format!("{name}.bias"), vec![rows])]
}

fn norm(name: &str) -> [(String, Vec<usize>); 2] {
    [(format!("{name}.weight"), vec![12]), (format!("{name}.bias"), vec![12])]
}

/// The tensors of [`dinov2`] as transformers' files name them.
fn dinov2_tensors() -> TestTensors {
    let mut names = vec![
        ("embeddings.cls_token".to_owned(), vec![1, 1, 12]),
        ("embeddings.mask_token".to_owned(), vec![1, 12]),
        ("embeddings.position_embeddings".to_owned(), vec![1, 10, 12]),
        ("embeddings.patch_embeddings.projection.weight".to_owned(), vec![12, 3, 2, 2]),
        ("embeddings.patch_embeddings.projection.bias".to_owned(), vec![12]),
    ];
    for block in 0..2 {
        let at = format!("encoder.layer.{block}.");
        names.extend(norm(&format!("{at}norm1")));
        for part in ["query", "key", "value"] {
            names.extend(linear(&format!("{at}attention.attention.{part}"), 12, 12));
        }
        names.extend(linear(&format!("{at}attention.output.dense"), 12, 12));
        names.push((format!("{at}layer_scale1.lambda1"), vec![12]));
        names.extend(norm(&format!("{at}norm2")));
        names.extend(linear(&format!("{at}mlp.fc1"), 24, 12));
        names.extend(linear(&format!("{at}mlp.fc2"), 12, 24));
        names.push((format!("{at}layer_scale2.lambda1"), vec![12]));
    }
    names.extend(norm("layernorm"));
    filled(&names)
}

/// The same tensors under other names.
fn renamed(tensors: &TestTensors, pairs: &[(&str, &str)]) -> TestTensors {
    let rename =
        |name: &str| pairs.iter().fold(name.to_owned(), |n, (from, to)| n.replace(from, to));
    tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
}

#[test]
fn every_tensor_of_a_transformers_file_comes_to_its_place() -> Result<()> {
    let tensors = dinov2_tensors();
    let found = weights(loaded(&dinov2(), &tensors)?);
    let plan = TransformerPlan {
        patch_pixels: 2,
        patch_bias: true,
        width: 12,
        depth: 2,
        heads: 3,
        key_bias: true,
        mlp: Mlp::Plain { hidden: 24, activation: Activation::GeluErf },
        layer_scale: true,
        class_token: true,
        registers: 0,
        positions: Positions::Absolute { grid: 3, resampling: Resampling::Size },
        pre_norm: false,
        final_norm: FinalNorm::AllTokens,
        epsilon: 1e-6,
        attention_pooling: false,
        projection: None,
    };
    assert_eq!(*found.plan(), plan);
    let same = |internal: &str, name: &str| {
        assert_eq!(found.get(internal), Some(&*tensors[name].1), "{internal}");
    };
    same("patch.weight", "embeddings.patch_embeddings.projection.weight");
    same("blocks.1.k.bias", "encoder.layer.1.attention.attention.key.bias");
    same("blocks.0.out.weight", "encoder.layer.0.attention.output.dense.weight");
    same("blocks.1.scale2", "encoder.layer.1.layer_scale2.lambda1");
    same("blocks.0.down.weight", "encoder.layer.0.mlp.fc2.weight");
    same("norm.bias", "layernorm.bias");
    // The class token has its position added; the others are the patches'.
    let positions = &tensors["embeddings.position_embeddings"].1;
    assert_eq!(found.get("positions"), Some(&positions[12..]));
    let class = tensors["embeddings.cls_token"].1.iter().zip(positions).map(|(a, b)| a + b);
    assert_eq!(found.get("cls"), Some(&*class.collect::<Vec<_>>()));
    Ok(())
}

/// Names of tensors in files of transformers, and those that its version 5 gives to the modules.
const OF_MODULES: [(&str, &str); 5] = [
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("encoder.layer.", "layers."),
];

/// Pretrained networks, case T13, and the wrappers that other programs put around a network.
#[test]
fn other_spellings_of_the_same_network_load_to_the_same_bits() -> Result<()> {
    let tensors = dinov2_tensors();
    let want = weights(loaded(&dinov2(), &tensors)?);
    for spelling in [
        renamed(&tensors, &OF_MODULES),
        renamed(&tensors, &[("encoder.layer.", "model.layer.")]),
        tensors.iter().map(|(name, tensor)| (format!("dinov2.{name}"), tensor.clone())).collect(),
    ] {
        assert_eq!(weights(loaded(&dinov2(), &spelling)?), want);
    }
    // In two shards.
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("config.json"), dinov2().to_string())?;
    let (first, second): (TestTensors, TestTensors) =
        tensors.into_iter().partition(|(name, _)| name.contains("layer.0"));
    save(&first, &path("a.safetensors"))?;
    save(&second, &path("b.safetensors"))?;
    let shards = [path("a.safetensors"), path("b.safetensors")];
    assert_eq!(weights(read(Some(&path("config.json")), &shards)?), want);
    let twice = [path("a.safetensors"), path("a.safetensors")];
    let error = read(Some(&path("config.json")), &twice).err().expect("twice").to_string();
    assert!(error.contains("two shards"), "{error}");
    Ok(())
}

/// Pretrained networks, case T14.
#[test]
fn a_missing_unknown_or_misshapen_tensor_is_named_and_those_beside_are_ignored() -> Result<()> {
    let tensors = dinov2_tensors();
    for name in tensors.keys().filter(|name| !name.ends_with("mask_token")) {
        let mut changed = tensors.clone();
        let (shape, mut numbers) = changed.remove(name).expect("there");
        let message = refusal(&dinov2(), &changed);
        assert!(message.contains(&format!("`{name}`")), "without {name}: {message}");

        // One column less.
        let last = shape.last().copied().expect("an axis");
        let mut narrower = shape.clone();
        *narrower.last_mut().expect("an axis") = last - 1;
        numbers.truncate(narrower.iter().product());
        changed.insert(name.clone(), (narrower, numbers));
        let message = refusal(&dinov2(), &changed);
        assert!(message.contains(&format!("`{name}`")), "narrower {name}: {message}");
    }
    let with = |name: &str| {
        let mut changed = tensors.clone();
        changed.insert(name.to_owned(), (vec![3], vec![1., 2., 3.]));
        changed
    };
    for unknown in ["encoder.layer.2.norm1.weight", "extra", "embeddings.register_tokens"] {
        let message = refusal(&dinov2(), &with(unknown));
        assert!(message.contains(&format!("`{unknown}`")), "{message}");
    }
    let want = weights(loaded(&dinov2(), &tensors)?);
    for beside in ["pooler.dense.weight", "text_model.x", "classifier.weight", "logit_scale"] {
        assert_eq!(weights(loaded(&dinov2(), &with(beside))?), want, "{beside}");
    }
    let mut infinite = tensors.clone();
    infinite.get_mut("layernorm.weight").expect("there").1[3] = f32::INFINITY;
    assert!(refusal(&dinov2(), &infinite).contains("`norm.weight`"));
    Ok(())
}

/// [`dinov2_tensors`] as timm packs and names them, with the class token's position added already.
fn timm_tensors(want: &TransformerWeights) -> TestTensors {
    let get = |name: &str| want.get(name).expect(name).to_vec();
    let mut all = TestTensors::from([
        ("cls_token".into(), (vec![1, 1, 12], get("cls"))),
        ("pos_embed".into(), (vec![1, 9, 12], get("positions"))),
        ("patch_embed.proj.weight".into(), (vec![12, 3, 2, 2], get("patch.weight"))),
        ("patch_embed.proj.bias".into(), (vec![12], get("patch.bias"))),
        ("norm.weight".into(), (vec![12], get("norm.weight"))),
        ("norm.bias".into(), (vec![12], get("norm.bias"))),
    ]);
    for block in 0..2 {
        let at = format!("blocks.{block}.");
        for (ending, shape) in [("weight", vec![36, 12]), ("bias", vec![36])] {
            let packed = ["q", "k", "v"].map(|part| get(&format!("{at}{part}.{ending}"))).concat();
            all.insert(format!("{at}attn.qkv.{ending}"), (shape, packed));
        }
        let same = [
            ("attn.proj.weight", "out.weight", vec![12, 12]),
            ("attn.proj.bias", "out.bias", vec![12]),
            ("norm1.weight", "norm1.weight", vec![12]),
            ("norm1.bias", "norm1.bias", vec![12]),
            ("norm2.weight", "norm2.weight", vec![12]),
            ("norm2.bias", "norm2.bias", vec![12]),
            ("ls1.gamma", "scale1", vec![12]),
            ("ls2.gamma", "scale2", vec![12]),
            ("mlp.fc1.weight", "up.weight", vec![24, 12]),
            ("mlp.fc1.bias", "up.bias", vec![24]),
            ("mlp.fc2.weight", "down.weight", vec![12, 24]),
            ("mlp.fc2.bias", "down.bias", vec![12]),
        ];
        for (name, internal, shape) in same {
            all.insert(format!("{at}{name}"), (shape, get(&format!("{at}{internal}"))));
        }
    }
    all
}

/// Narrow networks have fewer than one head of 64, so the plan is completed by hand.
fn of_timm(architecture: &str, heads: usize, tensors: &TestTensors) -> Result<TransformerWeights> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    save(tensors, &path)?;
    let config = HubConfig::parse(&json!({ "architecture": architecture }).to_string())?;
    let mut tensors = super::tensors::FileTensors::open(&[path])?;
    let layout = Layout::of(&config, &mut tensors)?;
    let plan = TransformerPlan { heads, ..layout.plan(&config, &tensors)? };
    Ok(TransformerWeights::new(&plan, internal(&layout, &plan, &mut tensors)?)?)
}

#[test]
fn timm_s_packed_attention_is_taken_apart_and_resampled_by_timm_s_rule() -> Result<()> {
    let want = weights(loaded(&dinov2(), &dinov2_tensors())?);
    let packed = timm_tensors(&want);
    let found = of_timm("vit_small_patch14_dinov2", 3, &packed)?;
    let positions = Positions::Absolute { grid: 3, resampling: Resampling::Antialias };
    assert_eq!(*found.plan(), TransformerPlan { positions, ..want.plan().clone() });
    for tensor in want.plan().tensors() {
        assert_eq!(found.get(&tensor.name), want.get(&tensor.name), "{}", tensor.name);
    }
    // As files with a row for the class token.
    let mut with_row = packed.clone();
    let (shape, numbers) = with_row.get_mut("pos_embed").expect("there");
    *shape = vec![1, 10, 12];
    numbers.splice(0..0, [0.5; 12]);
    let found = of_timm("vit_small_patch14_dinov2", 3, &with_row)?;
    assert_eq!(found.get("positions"), want.get("positions"));
    let class = want.get("cls").expect("there").iter().map(|value| value + 0.5);
    assert_eq!(found.get("cls"), Some(&*class.collect::<Vec<_>>()));
    Ok(())
}

#[test]
fn dinov3_of_timm_has_no_key_bias_and_its_other_biases_may_be_missing() -> Result<()> {
    let want = weights(loaded(&dinov2(), &dinov2_tensors())?);
    let mut packed = timm_tensors(&want);
    packed.remove("pos_embed");
    packed.insert("reg_token".into(), (vec![1, 2, 12], vec![0.25; 24]));
    let names = [("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")];
    let masked = of_timm("vit_small_patch16_dinov3", 3, &renamed(&packed, &names))?;
    let plan = masked.plan();
    assert_eq!((plan.key_bias, plan.registers, plan.epsilon), (false, 2, 1e-5));
    assert_eq!(plan.positions, Positions::Rotary { base: 100. });
    assert_eq!(masked.get("blocks.0.v.bias"), want.get("blocks.0.v.bias"));
    packed.retain(|name, _| !name.ends_with("qkv.bias"));
    let bare = of_timm("vit_small_patch16_dinov3", 3, &renamed(&packed, &names))?;
    assert_eq!(bare.get("blocks.1.q.bias"), Some(&[0.; 12][..]));
    // Only there: elsewhere a missing bias is an error.
    packed.insert("pos_embed".into(), (vec![1, 9, 12], vec![0.; 108]));
    let error = of_timm("vit_small_patch14_dinov2", 3, &packed).expect_err("no bias");
    assert!(error.to_string().contains("attn.qkv.bias"), "{error}");
    Ok(())
}

#[test]
fn gate_and_up_are_the_halves_of_one_tensor_gate_first() -> Result<()> {
    let config = with(dinov2(), json!({ "use_swiglu_ffn": true }));
    let mut tensors = dinov2_tensors();
    tensors.retain(|name, _| !name.contains("mlp."));
    for block in 0..2 {
        let at = format!("encoder.layer.{block}.mlp.weights");
        // ⌊24 · 2/3⌋ = 16, a multiple of 8.
        tensors.insert(
            format!("{at}_in.weight"),
            (vec![32, 12], (0..384).map(|i| i as f32).collect()),
        );
        tensors.insert(format!("{at}_in.bias"), (vec![32], (0..32).map(|i| i as f32).collect()));
        tensors.insert(format!("{at}_out.weight"), (vec![12, 16], vec![0.5; 192]));
        tensors.insert(format!("{at}_out.bias"), (vec![12], vec![0.5; 12]));
    }
    let found = weights(loaded(&config, &tensors)?);
    assert_eq!(found.plan().mlp, Mlp::Gated { hidden: 16 });
    assert_eq!(found.get("blocks.1.gate.bias").map(|bias| bias[0]), Some(0.));
    assert_eq!(found.get("blocks.1.up.bias").map(|bias| bias[0]), Some(16.));
    assert_eq!(found.get("blocks.1.up.weight").map(|weight| weight[0]), Some(192.));
    Ok(())
}

fn plan_of(config: Value) -> Result<TransformerPlan> {
    match HubConfig::parse(&config.to_string())?.form {
        config::ConfigForm::Transformers { plan, .. } => Ok(*plan),
        config::ConfigForm::Timm { .. } => panic!("of transformers"),
    }
}

#[test]
fn keys_that_a_file_leaves_out_have_the_defaults_of_their_class() -> Result<()> {
    let clip = plan_of(json!({ "model_type": "clip", "vision_config": {} }))?;
    let mlp = |hidden, activation| Mlp::Plain { hidden, activation };
    assert_eq!((clip.width, clip.depth, clip.heads, clip.patch_pixels), (768, 12, 12, 32));
    assert_eq!((clip.mlp, clip.epsilon), (mlp(3072, Activation::GeluQuick), 1e-5));
    assert_eq!(clip.positions, Positions::Absolute { grid: 7, resampling: Resampling::Size });
    assert!(clip.pre_norm && !clip.patch_bias && clip.final_norm == FinalNorm::ClassToken);
    let siglip =
        plan_of(json!({ "model_type": "siglip", "vision_config": { "image_size": 384 } }))?;
    assert_eq!((siglip.mlp, siglip.epsilon), (mlp(3072, Activation::GeluTanh), 1e-6));
    assert_eq!(siglip.positions, Positions::Absolute { grid: 24, resampling: Resampling::Size });
    assert!(siglip.attention_pooling && !siglip.class_token);
    let dinov3 =
        plan_of(json!({ "model_type": "dinov3_vit", "rope_parameters": { "rope_theta": 50 } }))?;
    assert_eq!((dinov3.width, dinov3.heads, dinov3.mlp), (384, 6, mlp(1536, Activation::GeluErf)));
    assert_eq!(dinov3.positions, Positions::Rotary { base: 50. });
    assert!(!dinov3.key_bias && dinov3.registers == 0);
    let vit = plan_of(json!({ "model_type": "vit" }))?;
    assert_eq!((vit.epsilon, vit.layer_scale, vit.patch_pixels), (1e-12, false, 16));
    assert_eq!(plan_of(json!({ "model_type": "vit_msn" }))?.epsilon, 1e-6);
    let giant = json!({ "model_type": "dinov2_with_registers", "hidden_size": 1536, "use_swiglu_ffn": true });
    let giant = plan_of(giant)?;
    assert_eq!((giant.mlp, giant.registers), (Mlp::Gated { hidden: 4096 }, 4));
    assert_eq!(
        giant.positions,
        Positions::Absolute { grid: 16, resampling: Resampling::Antialias }
    );
    Ok(())
}

#[test]
fn what_is_not_supported_is_an_error_that_names_it() {
    let cases = [
        (json!({ "model_type": "bert" }), "`bert`"),
        (json!({ "architecture": "swin_tiny" }), "`swin_tiny`"),
        (json!({}), "neither `model_type`"),
        (json!({ "model_type": "vit", "hidden_act": "relu" }), "`relu`"),
        (json!({ "model_type": "vit", "qkv_bias": false }), "`qkv_bias`"),
        (json!({ "model_type": "vit", "num_channels": 1 }), "`num_channels`"),
        (json!({ "model_type": "dinov3_vit", "mlp_bias": false }), "`mlp_bias`"),
        (
            json!({ "model_type": "dinov3_vit", "use_gated_mlp": true, "hidden_act": "gelu" }),
            "silu",
        ),
        (json!({ "model_type": "vit", "hidden_size": "wide" }), "wrong value"),
    ];
    for (config, part) in cases {
        let error = HubConfig::parse(&config.to_string()).expect_err(part);
        assert!(format!("{error:#}").contains(part), "{error:#}");
    }
}

#[test]
fn a_residual_network_of_timm_or_torchvision_is_read_by_its_tensors() -> Result<()> {
    let architecture = Architecture { depth: Depth::Fifty, width: 2, stem: Stem::Large };
    let segment = Segment::random("backbone", resnet::plan(&architecture, 3)?, 7)?;
    let folder = tempfile::tempdir()?;
    backbone_file::write(folder.path(), &segment)?;
    let path = folder.path().join(backbone_file::NAME);
    let read_residual = |path: &Path| match read(None, &[path.to_owned()])? {
        PublishedNetwork::Residual { architecture, segment } => Ok((architecture, *segment)),
        PublishedNetwork::Transformer(_) => anyhow::bail!("a residual network"),
    };
    let (found, read) = read_residual(&path)?;
    assert_eq!(found, architecture);
    assert_eq!(read.parameters.to_vec()?, segment.parameters.to_vec()?);
    assert_eq!(read.statistics.to_vec()?, segment.statistics.to_vec()?);

    // As SwAV wraps it, with a classifier.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let wrapped: std::collections::HashMap<String, Tensor> =
        tensors.iter().map(|(name, tensor)| (format!("module.{name}"), tensor.clone())).collect();
    let other = folder.path().join("other.safetensors");
    candle_core::safetensors::save(&wrapped, &other)?;
    assert_eq!(read_residual(&other)?.1.parameters.to_vec()?, segment.parameters.to_vec()?);
    let mut cut = tensors;
    cut.remove("layer3.2.bn2.running_var");
    candle_core::safetensors::save(&cut, &other)?;
    let error = read_residual(&other).err().expect("not whole").to_string();
    assert!(error.contains("`layer3.2.bn2.running_var`"), "{error}");
    Ok(())
}

#[test]
fn a_network_is_found_as_it_was_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let network = loaded(&dinov2(), &dinov2_tensors())?;
    let provenance = Provenance { repository: Some("owner/name".into()), ..Provenance::default() };
    write(folder.path(), &network, &json!({ "height": 6 }), provenance.clone())?;
    let found = PublishedConfiguration::find(folder.path())?.expect("published");
    assert_eq!((found.embedding_width(), &found.provenance), (12, &provenance));
    assert_eq!(weights(found.network(folder.path())?), weights(network));

    // Of another plan than its configuration: an error that names the tensor.
    let mut other = found;
    let PublishedArchitecture::Transformer(plan) = &mut other.published else { panic!("it is") };
    plan.layer_scale = false;
    let error = format!("{:#}", other.network(folder.path()).err().expect("another plan"));
    assert!(error.contains("network.safetensors") && error.contains("scale1"), "{error}");

    let architecture = Architecture { depth: Depth::Ten, width: 2, stem: Stem::Large };
    let segment = Segment::random("backbone", resnet::plan(&architecture, 3)?, 7)?;
    let residual = PublishedNetwork::Residual { architecture, segment: Box::new(segment.clone()) };
    write(folder.path(), &residual, &json!({}), provenance)?;
    let found = PublishedConfiguration::find(folder.path())?.expect("published");
    let PublishedNetwork::Residual { segment: read, .. } = found.network(folder.path())? else {
        panic!("a residual network")
    };
    assert_eq!(read.parameters.to_vec()?, segment.parameters.to_vec()?);
    let mut of_stage = Segment::empty(resnet::plan(&architecture, 3)?);
    backbone_file::read(&folder.path().join(backbone_file::NAME), &mut of_stage)?;
    assert_eq!(of_stage.parameters.to_vec()?, segment.parameters.to_vec()?);

    write_configuration(folder.path(), &json!({ "backbone": architecture }))?;
    assert_eq!(PublishedConfiguration::find(folder.path())?, None);
    Ok(())
}

/// The golden files of published networks; `None`, and a line on stderr, if the folder `ASSORT_GOLDEN` is not named.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("ASSORT_GOLDEN").map(|path| PathBuf::from(path).join("vit"));
    if folder.is_none() {
        eprintln!("skipped: ASSORT_GOLDEN names no folder with golden files");
    }
    folder
}

/// The layouts of files for transformers of which there are golden files.
const LAYOUTS: [&str; 8] = [
    "hf_dinov2",
    "hf_dinov2_reg",
    "hf_dinov2_swiglu",
    "hf_dinov3",
    "hf_dinov3_gated",
    "hf_vit",
    "hf_clip",
    "hf_siglip",
];

/// The narrow networks of every layout, where the folder `ASSORT_GOLDEN` has them (Pretrained networks, cases
/// T1 to T10 and case T14).
#[test]
fn golden_files_of_every_layout_load_whole() -> Result<()> {
    let Some(golden) = golden() else { return Ok(()) };
    for name in LAYOUTS {
        let path = |end: &str| golden.join(format!("{name}_narrow_{end}"));
        let file = path("weights.safetensors");
        let network =
            weights(read(Some(&path("config.json")), std::slice::from_ref(&file)).context(name)?);
        assert_eq!(network.plan().width, 48, "{name}");
        let count: usize =
            network.plan().tensors().iter().map(|t| t.shape.iter().product::<usize>()).sum();
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
        let there: usize = tensors.values().map(Tensor::elem_count).sum();
        let beside = tensors.iter().filter(|(name, _)| name.ends_with("mask_token")).count() * 48;
        let class_position =
            tensors.keys().any(|n| n.contains("position")) && network.plan().class_token;
        assert_eq!(count, there - beside - usize::from(class_position) * 48, "{name}");
    }
    Ok(())
}

/// The narrow networks of every layout: each tensor that is missing or misshapen, and each unknown one, is named; those
/// beside the vision tower are ignored; and the names of transformers' modules load to the same bits (Pretrained networks,
/// cases T13 and T14, where the folder `ASSORT_GOLDEN` has them).
#[test]
fn golden_files_of_every_layout_name_what_is_wrong_with_them() -> Result<()> {
    let Some(golden) = golden() else { return Ok(()) };
    for layout in LAYOUTS {
        let path = |end: &str| golden.join(format!("{layout}_narrow_{end}"));
        let config = serde_json::from_str(&std::fs::read_to_string(path("config.json"))?)?;
        let tensors = candle_core::safetensors::load(path("weights.safetensors"), &Device::Cpu)?;
        let numbers = |tensor: &Tensor| -> Result<_> {
            Ok((tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1::<f32>()?))
        };
        let tensors: TestTensors = tensors
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), numbers(tensor)?)))
            .collect::<Result<_>>()?;
        let want = weights(loaded(&config, &tensors)?);

        for name in tensors.keys().filter(|name| !name.ends_with("mask_token")) {
            // A prefix of all names is told once.
            let names = |message: &str| match name.strip_prefix("vision_model.") {
                Some(rest) => ["vision_model.", rest].iter().all(|part| message.contains(part)),
                None => message.contains(&format!("`{name}`")),
            };
            let mut changed = tensors.clone();
            let (mut shape, numbers) = changed.remove(name).expect("there");
            let message = refusal(&config, &changed);
            assert!(names(&message), "{layout} without {name}: {message}");
            shape.push(1);
            changed.insert(name.clone(), (shape, numbers));
            let message = refusal(&config, &changed);
            assert!(names(&message), "{layout}, shape of {name}: {message}");
        }
        let with = |name: &str| {
            let mut changed = tensors.clone();
            changed.insert(name.to_owned(), (vec![3], vec![1., 2., 3.]));
            changed
        };
        let message = refusal(&config, &with("extra.weight"));
        assert!(message.contains("`extra.weight`"), "{layout}: {message}");
        for beside in ["text_model.x", "mask_token"] {
            assert_eq!(weights(loaded(&config, &with(beside))?), want, "{layout}: {beside}");
        }
        let renamed = renamed(&tensors, &OF_MODULES);
        if renamed != tensors {
            assert_eq!(weights(loaded(&config, &renamed)?), want, "{layout}");
        }
    }
    Ok(())
}

/// Pretrained networks, case T15: the features of a narrow ResNet-50 as timm computes them, where the folder
/// `ASSORT_GOLDEN` has them.
///
/// Its stages have 1, 2, 1 and 1 blocks, so that no [`Architecture`] is of its shape. Loader and layers are those
/// of a published ResNet-50.
#[test]
fn golden_features_of_a_narrow_residual_network_are_met() -> Result<()> {
    let Some(golden) = golden() else { return Ok(()) };
    let stages = resnet::ResidualStages {
        stem: Stem::Large,
        stem_width: 64,
        blocks: [1, 2, 1, 1],
        widths: [8, 12, 16, 24],
        has_bottlenecks: true,
    };
    let file = golden.join("timm_resnet50_narrow_weights.safetensors");
    let mut network = residual::segment(FileTensors::open(&[file])?, stages.plan(3)?)?;
    let values = candle_core::safetensors::load(golden.join("vit.safetensors"), &Device::Cpu)?;
    let case = "timm_resnet50_narrow_64x64";
    let pictures = values[&format!("{case}/in/x")].permute((0, 2, 3, 1))?.contiguous()?;
    let want = values[&format!("{case}/out/features@f64")].to_vec2::<f64>()?;
    assert_eq!((want.len(), want[0].len()), (2, 96));
    let modes = Modes::all(network.network(), Mode::Running);
    let forward = network.forward(&pictures, &modes, None)?;
    for got in [forward, network.infer(&pictures)?] {
        for (got, want) in got.to_vec2::<f32>()?.concat().iter().zip(want.concat()) {
            assert!((f64::from(*got) - want).abs() < 1e-4, "{got}, not {want}");
        }
    }
    Ok(())
}

/// The features of narrow networks of every layout, as the programs that publish them compute them, where
/// the folder `ASSORT_GOLDEN` has them (Pretrained networks, cases T1 to T10).
#[test]
fn golden_features_are_met_by_networks_as_they_are_read() -> Result<()> {
    let Some(golden) = golden() else { return Ok(()) };
    let values = candle_core::safetensors::load(golden.join("vit.safetensors"), &Device::Cpu)?;
    let manifest = std::fs::read_to_string(golden.join("vit_manifest.json"))?;
    let manifest: serde_json::Map<String, Value> = serde_json::from_str(&manifest)?;
    let mut cases = 0;
    for (case, note) in manifest.iter().filter(|(case, _)| case.starts_with("hf_")) {
        let model = note["model"].as_str().context("a model")?;
        let path = |end: &str| golden.join(format!("{model}_{end}"));
        let network = read(Some(&path("config.json")), &[path("weights.safetensors")])?;
        let network =
            layers::Transformer::new(&weights(network), &Device::Cpu, layers::Precision::F32)?;
        let pictures = values[&format!("{case}/in/x")].permute((0, 2, 3, 1))?.contiguous()?;
        let got = network.forward(&pictures)?.feature().flatten_all()?.to_vec1::<f32>()?;
        let mut outputs = ["image_embeds", "pooler_output", "cls"].iter();
        let want = outputs.find_map(|name| values.get(&format!("{case}/out/{name}@f64")));
        let want = want.with_context(|| format!("{case} has no feature"))?;
        for (got, want) in got.iter().zip(want.flatten_all()?.to_vec1::<f64>()?) {
            assert!((f64::from(*got) - want).abs() < 2e-5, "{case}: {got}, not {want}");
        }
        cases += 1;
    }
    assert!(cases >= 15, "{cases} cases");
    Ok(())
}
