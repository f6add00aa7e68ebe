use std::path::PathBuf;

use data::Picture;
use data::views::{Pipeline, Workspace};
use serde_json::json;
use stage::Library;

use super::*;

fn of(keys: Value, family: CheckpointFamily) -> Result<Input> {
    of_transformers(&keys.to_string(), family)
}

fn shorter(pixels: usize, filter: Filter) -> Operation {
    Operation::ResizeShorter { pixels, filter }
}

#[test]
fn published_processors_become_operations() -> Result<()> {
    let dinov2 = json!({
        "crop_size": { "height": 224, "width": 224 }, "do_center_crop": true, "do_convert_rgb": true,
        "do_normalize": true, "do_rescale": true, "do_resize": true,
        "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225], "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": { "shortest_edge": 256 }
    });
    let cut = Operation::CentreCropRoundedDown { pixels: 224 };
    let want = square_input(224, IMAGENET, vec![shorter(256, Filter::Bicubic), cut]);
    assert_eq!(of(dinov2, CheckpointFamily::Dinov2)?, want);
    assert_eq!(published(CheckpointFamily::Dinov2, 518), want, "as where the file is missing");
    // ICBPL repeats the input of its published network, because its views are made for it.
    let mut repeated = 0;
    for experiment in Library::in_folder("../../configs").experiments()? {
        let is_both = experiment.has_table("icbpl") && experiment.has_table("pretrained");
        if is_both && experiment.table::<Value>("pretrained")?["backbone"] == "dinov2-small" {
            let table = experiment.table::<Value>("icbpl")?;
            assert_eq!(Input::deserialize(&table["input"])?, want);
            repeated += 1;
        }
    }
    assert!(repeated > 0, "no experiment repeats it");

    let dinov3 = json!({
        "do_resize": true, "size": { "height": 224, "width": 224 }, "resample": 2,
        "do_center_crop": null, "image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]
    });
    let squeezed = Operation::Resize { pixels: 224, filter: Filter::Bilinear };
    let satellite = [[0.43, 0.411, 0.296], [0.213, 0.156, 0.143]];
    assert_eq!(of(dinov3, CheckpointFamily::Dinov3)?, square_input(224, satellite, vec![squeezed]));

    // Old files, whose size is a number: the shorter edge of CLIP, a square of the others.
    let old = |kind: &str| json!({ "feature_extractor_type": kind, "size": 224, "resample": 3 });
    let with_crop = |mut value: Value| {
        value["crop_size"] = json!(224);
        value["do_center_crop"] = json!(true);
        value
    };
    let clip = of(with_crop(old("CLIPFeatureExtractor")), CheckpointFamily::Clip)?;
    assert_eq!(clip, square_input(224, CLIP, vec![shorter(224, Filter::Bicubic), cut]));
    let squeezed = Operation::Resize { pixels: 224, filter: Filter::Bicubic };
    let vit = of(old("ViTFeatureExtractor"), CheckpointFamily::Vit)?;
    assert_eq!(vit, square_input(224, IMAGENET, vec![squeezed]));
    let plain = of(
        json!({ "size": { "height": 8, "width": 8 }, "do_normalize": false }),
        CheckpointFamily::Siglip,
    )?;
    assert_eq!((plain.height, plain.mean, plain.std), (8, vec![0.; 3], vec![1.; 3]));
    assert_eq!(plain.clean, [Operation::Resize { pixels: 8, filter: Filter::Bicubic }]);
    Ok(())
}

#[test]
fn a_network_of_timm_without_its_table_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("config.json");
    std::fs::write(&path, json!({ "architecture": "vit_small_patch14_dinov2" }).to_string())?;
    let mut files =
        NetworkFiles { configuration: Some(path), preprocessor: None, weights: Vec::new() };
    let error = input(CheckpointFamily::Timm, &files, NativeSide::of(518)).expect_err("a guess");
    for part in ["config.json`", "`pretrained_cfg`", "`crop_pct`"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(input(CheckpointFamily::Residual, &files, NativeSide::unknown()).is_err());
    // Weights alone are those of torchvision, Barlow Twins or DINO.
    files.configuration = None;
    let cut = Operation::CentreCrop { pixels: 224 };
    let want = square_input(224, IMAGENET, vec![shorter(256, Filter::Bilinear), cut]);
    assert_eq!(input(CheckpointFamily::Residual, &files, NativeSide::unknown())?, want);
    Ok(())
}

#[test]
fn what_a_processor_asks_for_and_is_not_done_is_an_error_that_names_the_key() {
    let square = json!({ "height": 8, "width": 8 });
    let cases = [
        (json!({ "size": square, "resample": 0 }), "`resample` is 0"),
        (json!({ "size": { "height": 8, "width": 9 } }), "`size`"),
        (json!({ "size": { "shortest_edge": 8, "longest_edge": 9 } }), "longest edge"),
        (json!({ "size": { "shortest_edge": 8 }, "do_center_crop": false }), "one square"),
        (json!({ "do_resize": false }), "one square"),
        (json!({ "size": square, "do_rescale": false }), "`do_rescale`"),
        (json!({ "size": square, "rescale_factor": 0.5 }), "`rescale_factor` is 0.5"),
        (json!({ "size": square, "do_pad": true }), "`do_pad`"),
        (json!({ "size": square, "do_resize": "yes" }), "wrong value"),
    ];
    for (keys, part) in cases {
        let error = format!("{:#}", of(keys, CheckpointFamily::Dinov2).expect_err(part));
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn timm_s_evaluation_resizes_by_its_share_and_crops() -> Result<()> {
    let table = json!({
        "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "tag": "dino"
    });
    let cut = Operation::CentreCrop { pixels: 224 };
    // ⌊224 / 0.9⌋.
    assert_eq!(of_timm(&table)?, square_input(224, HALF, vec![shorter(248, Filter::Bicubic), cut]));
    let with = |key: &str, value: Value| {
        let mut table = table.clone();
        table[key] = value;
        of_timm(&table)
    };
    let squashed = Operation::Resize { pixels: 248, filter: Filter::Bicubic };
    assert_eq!(with("crop_mode", json!("squash"))?.clean, [squashed, cut]);
    for (key, value) in [
        ("crop_mode", json!("border")),
        ("interpolation", json!("lanczos")),
        ("crop_pct", json!(0.)),
    ] {
        let error = with(key, value).expect_err(key).to_string();
        assert!(error.contains(&format!("`{key}`")), "{error}");
    }
    assert!(with("input_size", json!([3, 224, 192])).is_err());
    Ok(())
}

/// A picture through the operations of an input: `(height, width, 3)`.
fn view(input: &Input, picture: &Picture) -> Result<Vec<f32>> {
    let mut out = vec![0f32; input.values()];
    let mut rng = stage::random::stream(0, "transform", &[]);
    input.clean().apply(picture, input, &mut rng, &mut Workspace::default(), &mut out)?;
    Ok(out)
}

#[test]
fn a_margin_of_half_a_pixel_is_rounded_down() -> Result<()> {
    // 3 × 8 pixels to the middle 3 × 3: the margin is 2.5, which rounds to 2.
    let pixels = (0..24).flat_map(|i| [i as u8 * 10; 3]).collect();
    let picture = Picture::new(3, 8, 3, pixels)?;
    let cut = Operation::CentreCropRoundedDown { pixels: 3 };
    let input = square_input(3, [[0.; 3], [1.; 3]], vec![cut]);
    assert!((view(&input, &picture)?[0] * 255. - 20.).abs() < 1e-4);
    let even = Input { clean: vec![Operation::CentreCrop { pixels: 3 }], ..input };
    assert!((view(&even, &picture)?[0] * 255. - 20.).abs() < 1e-4);
    // 3 × 6: the margin is 1.5, which rounds down to 1, and half to even to 2.
    let pixels = (0..18).flat_map(|i| [i as u8 * 10; 3]).collect();
    let picture = Picture::new(3, 6, 3, pixels)?;
    let down = Input { clean: vec![cut], ..even.clone() };
    assert!((view(&down, &picture)?[0] * 255. - 10.).abs() < 1e-4);
    assert!((view(&even, &picture)?[0] * 255. - 20.).abs() < 1e-4);
    let pipeline = Pipeline { operations: vec![shorter(4, Filter::Bilinear), cut] };
    pipeline.check("example")?;
    Ok(())
}

/// Pretrained networks, case T16: five processors on two noise pictures, where the folder `ASSORT_GOLDEN` has them.
#[test]
fn golden_processors_are_met_within_a_step() -> Result<()> {
    let Some(golden) = std::env::var_os("ASSORT_GOLDEN").map(PathBuf::from) else {
        eprintln!("skipped: ASSORT_GOLDEN names no folder with golden files");
        return Ok(());
    };
    let file = golden.join("vit/vit.safetensors");
    let tensors = candle_core::safetensors::load(file, &candle_core::Device::Cpu)?;
    let manifest = std::fs::read_to_string(golden.join("vit/vit_manifest.json"))?;
    let manifest: Value = serde_json::from_str(&manifest)?;
    for case in ["prep", "prep_big"] {
        let picture = &tensors[&format!("{case}/in/u8")];
        let (height, width, _) = picture.dims3()?;
        let picture = Picture::new(height, width, 3, picture.flatten_all()?.to_vec1()?)?;
        for (name, family) in [
            ("dinov2", CheckpointFamily::Dinov2),
            ("vit", CheckpointFamily::Vit),
            ("clip", CheckpointFamily::Clip),
            ("siglip", CheckpointFamily::Siglip),
            ("dinov3", CheckpointFamily::Dinov3),
        ] {
            let mut keys = manifest[format!("{case}_{name}")]["values"].clone();
            keys["do_center_crop"] = json!(keys.get("crop_size").is_some());
            let input = of(keys, family)?;
            let got = view(&input, &picture)?;
            for back_end in ["pil", "torchvision"] {
                let Some(want) = tensors.get(&format!("{case}/out/{name}_{back_end}")) else {
                    continue;
                };
                let want = want.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
                let steps = got.iter().zip(&want).enumerate().map(|(at, (got, want))| {
                    f64::from((got - want).abs()) * 255. * input.std[at % 3]
                });
                let (largest, sum) =
                    steps.fold((0f64, 0.), |(largest, sum), step| (largest.max(step), sum + step));
                let mean = sum / want.len() as f64;
                // DINOv3's resizes floats, so that only rounding to f32 is left: 3e-6 after normalising.
                let (most, most_mean) = if name == "dinov3" { (2e-4, 5e-5) } else { (1., 0.35) };
                assert!(
                    largest < most && mean <= most_mean,
                    "{case} {name} {back_end}: largest {largest}, mean {mean}"
                );
            }
        }
    }
    Ok(())
}
