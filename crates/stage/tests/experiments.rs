//! The experiments in `configs`. An edit of a file that others extend shows here which experiments
//! it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;

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
