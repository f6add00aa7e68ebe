//! The experiments in `configs`. An edit of a file that others extend shows here which experiments
//! it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::Path;

use anyhow::Result;
use stage::{Experiment, Library};

const CONFIGS: &str = "../../configs";

/// Digests of the resolved experiments, in the form of `sha256sum`.
const DIGESTS: &str = "../../configs/resolved.sha256";

/// Set when the list is to be written again.
const UPDATE: &str = "UPDATE_DIGESTS";

fn experiments() -> Result<Vec<Experiment>> {
    Library::in_folder(CONFIGS).experiments()
}

#[test]
fn resolved_experiments_have_the_digests_that_are_committed() -> Result<()> {
    let resolved: BTreeMap<String, String> =
        experiments()?.into_iter().map(|one| (one.name.clone(), one.digest())).collect();
    if env::var_os(UPDATE).is_some() {
        let lines = resolved.iter().map(|(name, digest)| format!("{digest}  {name}\n"));
        fs::write(DIGESTS, lines.collect::<String>())?;
    }
    let list = fs::read_to_string(DIGESTS)?;
    let committed: BTreeMap<String, String> = list
        .lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(digest, name)| (name.to_owned(), digest.to_owned()))
        .collect();
    let names: BTreeSet<&String> = resolved.keys().chain(committed.keys()).collect();
    let changed: Vec<&str> = names
        .into_iter()
        .filter(|&name| resolved.get(name) != committed.get(name))
        .map(String::as_str)
        .collect();
    assert!(
        changed.is_empty(),
        "these experiments have other values than `configs/resolved.sha256` was made from: {}. If \
         that is intended, write it again: {UPDATE}=1 cargo test -p stage --test experiments",
        changed.join(", ")
    );
    Ok(())
}

#[test]
fn every_experiment_has_a_title_a_system_and_an_order_of_steps() -> Result<()> {
    let experiments = experiments()?;
    assert!(experiments.len() >= 42);
    for experiment in experiments {
        let stages = experiment.stages()?;
        let rounds = experiment.rounds()?;
        for place in rounds.first.iter().chain(&rounds.then) {
            assert!(stages.contains_key(place), "{} has no stage in {place}", experiment.name);
        }
        assert!(!experiment.title()?.is_empty() && !experiment.system()?.is_empty());
        experiment.table::<stage::DataTable>("data")?.check()?;
    }
    Ok(())
}

/// The names of the files below `folder`, such as `data/digits`, with their text.
fn files(folder: &str) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(Path::new(CONFIGS).join(folder))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            files.push((
                Path::new(folder).join(stem).display().to_string(),
                fs::read_to_string(path)?,
            ));
        }
    }
    Ok(files)
}

#[test]
fn every_file_that_is_no_experiment_is_extended_by_one() -> Result<()> {
    let bases = [files("data")?, files("stage")?, files("method")?, files("embedding")?].concat();
    let mut extended = BTreeSet::new();
    for (_, text) in bases.iter().chain(&files("")?) {
        let tables: toml::Table = text.parse()?;
        let names = tables.get("extends").and_then(toml::Value::as_array);
        extended.extend(names.into_iter().flatten().filter_map(|n| n.as_str().map(str::to_owned)));
    }
    for (name, _) in bases {
        assert!(extended.contains(&name), "nothing extends `configs/{name}.toml`");
    }
    Ok(())
}

/// The text without one of its values, for each value that it gives.
fn with_one_value_less(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut shorter = Vec::new();
    let mut first = 0;
    while first < lines.len() {
        // A value ends where its brackets are closed.
        let (mut end, mut open) = (first, 0);
        loop {
            let line = lines[end].split('#').next().unwrap_or_default();
            let count = |brackets: [char; 2]| line.matches(brackets).count();
            open += count(['[', '{']);
            open -= count([']', '}']);
            end += 1;
            if open == 0 {
                break;
            }
        }
        if let Some((key, _)) = lines[first].split_once(" = ")
            && !key.starts_with('#')
            && key != "extends"
        {
            let rest = [&lines[..first], &lines[end..]].concat().join("\n");
            shorter.push((key.to_owned(), rest));
        }
        first = end;
    }
    shorter
}

#[test]
fn an_experiment_says_only_what_differs_from_what_it_extends() -> Result<()> {
    let library = Library::in_folder(CONFIGS);
    let folder = tempfile::tempdir()?;
    let mut values = 0;
    for (name, text) in files("")? {
        let whole = library.open(&name)?.digest();
        let path = folder.path().join(format!("without-one-value-{name}.toml"));
        for (key, shorter) in with_one_value_less(&text) {
            fs::write(&path, shorter)?;
            // Without some values it cannot be resolved at all.
            let same = library.read(&path).is_ok_and(|without| without.digest() == whole);
            assert!(!same, "`{key}` of `configs/{name}.toml` has this value without being said");
            values += 1;
        }
    }
    assert!(values > 100, "only {values} values were looked at");
    Ok(())
}
