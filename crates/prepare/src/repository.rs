//! Data sets of the Hugging Face Hub: selects the files of a repository that are pictures. Crate
//! [`hub`] downloads them.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use hub::http::Client;
use hub::{Address, Settings, Snapshot};

use crate::names::is_like;
use crate::{Interrupt, picture};

/// Downloads the files of an address that are missing from the cache. Of a data set, these are its
/// Parquet files, or else its archives, or else its pictures, as a folder; of a model, the folder of all
/// files.
///
/// # Errors
///
/// The hub cannot be reached, refuses, or has no such files.
pub fn fetch(address: &str, interrupt: Interrupt) -> Result<Vec<PathBuf>> {
    let settings = Settings::read(|name| std::env::var(name).ok())?;
    let (address, client) = (Address::parse(address)?, Client::new(interrupt));
    let snapshot = hub::fetch(&address, &settings, &client, |names| chosen(&address, names))?;
    Ok(paths(&address, snapshot))
}

/// Returns which of a repository's files to download.
fn chosen(address: &Address, mut names: Vec<String>) -> Result<Vec<String>> {
    let pattern = &address.pattern;
    if !pattern.is_empty() {
        let below = format!("{}/", pattern.trim_end_matches('/'));
        names.retain(|name| is_like(name, pattern) || name.starts_with(&below));
    } else if address.is_dataset {
        let is_picture = |name: &String| picture::has_extension(name);
        let ends = |endings: &'static [&str]| {
            move |name: &String| endings.iter().any(|ending| name.ends_with(ending))
        };
        let parquet = ends(&[".parquet"]);
        let archives = ends(&[".tar", ".tar.gz", ".tgz", ".zip"]);
        if names.iter().any(parquet) {
            names.retain(parquet);
        } else if names.iter().any(archives) {
            names.retain(archives);
        } else {
            names.retain(is_picture);
        }
    }
    ensure!(
        !names.is_empty(),
        "{} at {} has no files{}; look at {} on the hub, and append a path, as in \
         hf://datasets/owner/name@revision/data/train-*.parquet",
        address.name,
        address.revision,
        if pattern.is_empty() { " of pictures".into() } else { format!(" like `{pattern}`") },
        address.name
    );
    Ok(names)
}

/// Returns the files as a source: files of one kind, or the folder that they are in.
fn paths(address: &Address, Snapshot { folder, names }: Snapshot) -> Vec<PathBuf> {
    let are_loose = names.iter().any(|name| picture::has_extension(name));
    if !address.is_dataset || are_loose {
        return vec![folder.join(address.pattern.split('*').next().unwrap_or_default())];
    }
    names.into_iter().map(|name| folder.join(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_data_set_its_parquet_files_come_first() {
        let all = ["README.md", "a.tar", "data/train-0.parquet", "x.png"];
        let names = |pattern: &str, names: &[&str]| {
            let text = format!("datasets/a/b@main/{pattern}");
            let address = Address::parse(text.trim_end_matches('/')).expect("an address");
            chosen(&address, names.iter().map(|name| (*name).to_owned()).collect())
        };
        assert_eq!(names("", &all).expect("some"), ["data/train-0.parquet"]);
        assert_eq!(names("", &all[..2]).expect("some"), ["a.tar"]);
        assert_eq!(names("x.*", &all).expect("some"), ["x.png"]);
        assert_eq!(names("data", &all).expect("some"), ["data/train-0.parquet"]);
        assert!(names("", &all[..1]).is_err() && names("y", &all).is_err());
    }
}
