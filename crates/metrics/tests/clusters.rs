//! The program `clusters`, from a file to the recommendation.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use data::{DataSet, Embeddings};
use serde_json::Value;

fn clusters(file: &Path, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clusters"));
    Ok(command.arg("--embeddings").arg(file).args(arguments).output()?)
}

/// Writes rows around three directions.
fn write(path: &Path) -> Result<()> {
    let noise = |i: usize| ((i * 7919 % 1009) as f32 / 1009. - 0.5) * 0.3;
    let rows: Vec<f32> =
        (0..300 * 3).map(|i| if i % 3 == i / 3 % 3 { 1. } else { noise(i) }).collect();
    let embeddings = Embeddings {
        data_set: DataSet { path: path.to_owned(), images: 300, fingerprint: "f".into() },
        index: (0..300).collect(),
        width: 3,
        projection_width: 3,
        views: 0,
        backbone: rows.clone().into(),
        projection: rows.into(),
        backbone_views: vec![].into(),
    };
    embeddings.write(path)
}

#[test]
fn it_recommends_the_number_of_groups_and_says_that_it_guesses() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("embeddings.safetensors");
    write(&file)?;
    for space in ["projection", "backbone"] {
        let output = clusters(&file, &["--to", "6", "--json", "--space", space])?;
        let text = String::from_utf8(output.stdout)?;
        assert!(output.status.success() && text.contains("This is a guess"), "{text}");
        let json: Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
        assert_eq!((&json["recommended"], &json["images"]), (&3.into(), &300.into()));
        let curve = json["candidates"].as_array().expect("a curve");
        assert_eq!(curve.len(), 5);
        assert!(curve[1]["stability"].as_f64() > Some(0.99) && curve[1]["clusters"] == 3);
    }
    Ok(())
}

#[test]
fn bad_arguments_and_files_end_with_2_and_say_what_to_do() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("embeddings.safetensors");
    let message = |arguments: &[&str]| -> Result<String> {
        let output = clusters(&file, arguments)?;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        Ok(String::from_utf8(output.stderr)?)
    };
    assert!(message(&[])?.contains("embeddings.safetensors"));
    write(&file)?;
    assert!(message(&["--from", "1"])?.contains("--from 1"));
    assert!(message(&["--from", "9", "--to", "8"])?.contains("range is empty"));
    assert!(message(&["--to", "151"])?.contains("at most 150"));
    assert!(message(&["--space", "pixels"])?.contains("projection or backbone"));
    std::fs::write(&file, "no container")?;
    assert!(message(&[])?.contains("run its stage again"));
    Ok(())
}
