//! A narrow network in a layout of the Hugging Face Hub, with drawn weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

/// Writes a transformer in the layout of DINO: one block of width 8, patches of 4 x 4, a grid of 2 x 2.
pub fn write(folder: &Path) {
    let config = serde_json::json!({
        "model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "patch_size": 4, "image_size": 8
    });
    fs::write(folder.join("config.json"), config.to_string()).expect("written");
    let processor = serde_json::json!({ "size": { "height": 8, "width": 8 }, "resample": 2 });
    fs::write(folder.join("preprocessor_config.json"), processor.to_string()).expect("written");
    let block = |name: &str| format!("encoder.layer.0.{name}");
    let linear = |name: String, rows: usize, columns: usize| {
        [(format!("{name}.weight"), vec![rows, columns]), (format!("{name}.bias"), vec![rows])]
    };
    let norm =
        |name: String| [(format!("{name}.weight"), vec![8]), (format!("{name}.bias"), vec![8])];
    let shapes: Vec<(String, Vec<usize>)> = [
        ("embeddings.cls_token".to_owned(), vec![1, 1, 8]),
        ("embeddings.position_embeddings".to_owned(), vec![1, 5, 8]),
        ("embeddings.patch_embeddings.projection.weight".to_owned(), vec![8, 3, 4, 4]),
        ("embeddings.patch_embeddings.projection.bias".to_owned(), vec![8]),
    ]
    .into_iter()
    .chain(linear(block("attention.attention.query"), 8, 8))
    .chain(linear(block("attention.attention.key"), 8, 8))
    .chain(linear(block("attention.attention.value"), 8, 8))
    .chain(linear(block("attention.output.dense"), 8, 8))
    .chain(linear(block("intermediate.dense"), 16, 8))
    .chain(linear(block("output.dense"), 8, 16))
    .chain(norm(block("layernorm_before")))
    .chain(norm(block("layernorm_after")))
    .chain(norm("layernorm".to_owned()))
    .collect();
    let mut draw = 0.5;
    let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).flat_map(|_| {
                draw = (draw + 0.618_034) % 1.;
                (draw - 0.5_f32).to_le_bytes()
            });
            (name, (shape, values.collect()))
        })
        .collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("sound"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialised");
    fs::write(folder.join("model.safetensors"), bytes).expect("written");
}
