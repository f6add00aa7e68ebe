use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use backbone::published::{PublishedArchitecture, PublishedConfiguration};
use backbone::{Architecture, Depth, Segment, Stem, backbone_file, resnet};
use candle_core::{DType, Device, Tensor};
use data::views::Input;
use hub::Settings;
use stage::{DataTable, Split};

use super::*;
use crate::source::locate_with;

/// Writes a narrow DINO of transformers: one block of width 8, patches of 4 × 4, a grid of 2 × 2.
fn dino(folder: &Path, value: f64) -> Result<()> {
    let config = serde_json::json!({
        "model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "patch_size": 4, "image_size": 8
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    let processor = serde_json::json!({ "size": { "height": 8, "width": 8 }, "resample": 2 });
    fs::write(folder.join("preprocessor_config.json"), processor.to_string())?;
    let at = "encoder.layer.0.";
    let mut shapes = vec![
        ("embeddings.cls_token".to_owned(), vec![1, 1, 8]),
        ("embeddings.position_embeddings".to_owned(), vec![1, 5, 8]),
        ("embeddings.patch_embeddings.projection.weight".to_owned(), vec![8, 3, 4, 4]),
        ("embeddings.patch_embeddings.projection.bias".to_owned(), vec![8]),
        ("pooler.dense.weight".to_owned(), vec![8, 8]),
    ];
    for (name, rows, columns) in [
        ("attention.attention.query", 8, 8),
        ("attention.attention.key", 8, 8),
        ("attention.attention.value", 8, 8),
        ("attention.output.dense", 8, 8),
        ("intermediate.dense", 16, 8),
        ("output.dense", 8, 16),
    ] {
        shapes.push((format!("{at}{name}.weight"), vec![rows, columns]));
        shapes.push((format!("{at}{name}.bias"), vec![rows]));
    }
    for norm in ["encoder.layer.0.layernorm_before", "encoder.layer.0.layernorm_after", "layernorm"]
    {
        shapes.push((format!("{norm}.weight"), vec![8]));
        shapes.push((format!("{norm}.bias"), vec![8]));
    }
    let tensor = |(name, shape): (String, Vec<usize>)| {
        Ok((name, (Tensor::ones(shape, DType::F32, &Device::Cpu)? * value)?))
    };
    let tensors = shapes.into_iter().map(tensor).collect::<Result<HashMap<_, _>>>()?;
    Ok(candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?)
}

fn job(out: &Path) -> Job {
    let data =
        DataTable { clusters: 2, train_on: vec![Split::Train], score_on: vec![Split::Train] };
    Job::new("pretrained", out.join("images.safetensors"), out, data)
}

fn config(path: &Path) -> Config {
    Config { backbone: path.display().to_string() }
}

fn identity(path: &Path) -> String {
    let found = PretrainedNetwork::identity(&config(path), &Interrupt::default()).expect("found");
    found.expect("it reads from outside")
}

#[test]
fn a_folder_becomes_a_network_with_its_input_and_its_digest() -> Result<()> {
    let [source, out] = [tempfile::tempdir()?, tempfile::tempdir()?];
    dino(source.path(), 0.5)?;
    let config = config(source.path());
    PretrainedNetwork::check(&config, &job(out.path()))?;
    PretrainedNetwork::run(&config, &job(out.path()))?;
    let found = PublishedConfiguration::find(out.path())?.expect("published");
    let PublishedArchitecture::Transformer(plan) = &found.published else { panic!("it is one") };
    assert_eq!((plan.width, plan.depth, found.embedding_width()), (8, 1, 8));
    let input: Input = found.input()?;
    assert_eq!((input.height, input.width, input.channels), (8, 8, 3));
    let digest = sha256_of_file(&source.path().join("model.safetensors"))?;
    assert_eq!(found.provenance.sha256["model.safetensors"], digest);
    let PublishedNetwork::Transformer(weights) = found.network(out.path())? else { panic!("one") };
    assert_eq!(weights.get("cls"), Some(&[1.; 8][..]), "token and position");
    assert!(out.path().join(backbone_file::NAME).exists());
    Ok(())
}

#[test]
fn the_identity_follows_every_file_and_not_the_path() -> Result<()> {
    let [one, other] = [tempfile::tempdir()?, tempfile::tempdir()?];
    dino(one.path(), 0.5)?;
    dino(other.path(), 0.5)?;
    let first = identity(one.path());
    assert_eq!(identity(other.path()), first);
    dino(other.path(), 0.25)?;
    assert_ne!(identity(other.path()), first);
    dino(other.path(), 0.5)?;
    fs::write(other.path().join("preprocessor_config.json"), r#"{"size":8}"#)?;
    assert_ne!(identity(other.path()), first);
    Ok(())
}

#[test]
fn a_lone_residual_network_is_read_without_a_configuration() -> Result<()> {
    let [source, out] = [tempfile::tempdir()?, tempfile::tempdir()?];
    let architecture = Architecture { depth: Depth::Ten, width: 2, stem: Stem::Large };
    let segment = Segment::random("backbone", resnet::plan(&architecture, 3)?, 1)?;
    backbone_file::write(source.path(), &segment)?;
    let config = config(&source.path().join(backbone_file::NAME));
    PretrainedNetwork::run(&config, &job(out.path()))?;
    let found = PublishedConfiguration::find(out.path())?.expect("published");
    assert_eq!(found.published, PublishedArchitecture::Residual(architecture));
    assert_eq!(found.input::<Input>()?.height, 224);
    Ok(())
}

#[test]
fn what_is_wrong_is_said_before_the_run() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let refusal = |backbone: String| {
        let error = PretrainedNetwork::check(&Config { backbone }, &job(folder.path()));
        format!("{:#}", error.expect_err("refused"))
    };
    let shown = |path: PathBuf| path.display().to_string();
    let message = refusal("dinov2-smal".into());
    assert!(message.contains("dinov2-small") && message.contains("hf://"), "{message}");
    assert!(refusal(shown(path("none"))).contains("no such folder or file"));
    assert!(refusal("hf://owner".into()).contains("hf://owner"));
    fs::write(path("dino.pth"), "x")?;
    let message = refusal(shown(path("dino.pth")));
    assert!(message.contains("pickles") && message.contains("save_file"), "{message}");
    dino(folder.path(), 1.)?;
    fs::write(path("preprocessor_config.json"), r#"{"size": 8, "resample": 1}"#)?;
    let message = refusal(shown(folder.path().to_owned()));
    assert!(
        message.contains("preprocessor_config.json") && message.contains("`resample`"),
        "{message}"
    );
    fs::write(path("config.json"), r#"{"model_type": "bert"}"#)?;
    let message = refusal(shown(folder.path().to_owned()));
    assert!(message.contains("config.json") && message.contains("`bert`"), "{message}");
    // 10 pixels are not a multiple of the patch of 4.
    dino(folder.path(), 1.)?;
    fs::write(path("preprocessor_config.json"), r#"{"size": 10, "resample": 2}"#)?;
    let error =
        PretrainedNetwork::run(&config(folder.path()), &job(folder.path())).expect_err("10");
    assert!(format!("{error:#}").contains("multiples of 4"), "{error:#}");
    Ok(())
}

/// Settings of a cache in `folder` that may not be filled.
fn offline(folder: &Path) -> Settings {
    let endpoint = "http://127.0.0.1:1".to_owned();
    Settings { endpoint, cache: folder.to_owned(), token: None, is_offline: true }
}

#[test]
fn a_cached_network_needs_no_hub_and_one_that_is_not_says_what_to_fetch() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (settings, interrupt) = (offline(folder.path()), Interrupt::default());
    let error = locate_with("dino-small", &settings, &interrupt).expect_err("not cached");
    let error = format!("{error:#}");
    for part in ["hf download timm/vit_small_patch16_224.dino", "--backbone scratch"] {
        assert!(error.contains(part), "{part}: {error}");
    }

    let commit = "0123456789abcdef0123456789abcdef01234567";
    let root = folder.path().join("models--timm--vit_small_patch16_224.dino");
    let snapshot = root.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot)?;
    fs::create_dir_all(root.join("refs"))?;
    fs::write(root.join("refs/main"), commit)?;
    dino(&snapshot, 0.5)?;
    let located = locate_with("dino-small", &settings, &interrupt)?;
    let digest = sha256_of_file(&snapshot.join("model.safetensors"))?;
    let want = format!("timm/vit_small_patch16_224.dino@{commit} model.safetensors {digest}");
    assert_eq!(located.identity()?, want);
    assert_eq!(located.licence(), Some("Apache-2.0"));
    assert_eq!(located.fetch_with(&settings, &interrupt)?.weights.len(), 1);
    // The same by its address, at the commit.
    let address = format!("hf://timm/vit_small_patch16_224.dino@{commit}");
    assert_eq!(locate_with(&address, &settings, &interrupt)?.identity()?, want);

    // Other weights than those that a short name stands for.
    let named = names::find("dinov2-small").expect("known");
    let root = folder.path().join("models--facebook--dinov2-small");
    let snapshot = root.join("snapshots").join(named.commit.expect("pinned"));
    fs::create_dir_all(&snapshot)?;
    dino(&snapshot, 0.5)?;
    let error = locate_with("dinov2-small", &settings, &interrupt).expect_err("others").to_string();
    assert!(error.contains("stands for ae1e99fc"), "{error}");
    Ok(())
}
