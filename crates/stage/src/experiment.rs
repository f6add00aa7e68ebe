//! The experiment file: one TOML table per program, each read by that program alone.

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// An experiment file, parsed but not yet understood: each program asks for its own table.
#[derive(Debug, Clone)]
pub struct Experiment {
    path: PathBuf,
    tables: toml::Table,
}

impl Experiment {
    /// Reads and parses the file.
    ///
    /// # Errors
    ///
    /// The file is missing or is not TOML; the message names it and, for TOML, the line.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("opening the experiment `{}`", path.display()))?;
        let tables = text
            .parse::<toml::Table>()
            .with_context(|| format!("the experiment `{}` is not TOML", path.display()))?;
        Ok(Self { path: path.to_owned(), tables })
    }

    /// Whether there is a table `[name]`: an experiment has those of the stages that it runs.
    pub fn has_table(&self, name: &str) -> bool {
        self.tables.contains_key(name)
    }

    /// The table `[name]` as a value of the caller's type. A missing table is read as an empty
    /// one, so that the error names the first key it lacks.
    ///
    /// # Errors
    ///
    /// A key is unknown, missing, or of the wrong type: there are no defaults in code.
    pub fn table<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = match self.tables.get(name) {
            None => toml::Table::new(),
            Some(toml::Value::Table(table)) => table.clone(),
            Some(other) => bail!(
                "`{name}` of `{}` is a {}, not a table `[{name}]`",
                self.path.display(),
                other.type_str()
            ),
        };
        // The last lines of toml's message say what is wrong; its first line repeats the place.
        value.try_into().map_err(|error: toml::de::Error| {
            anyhow::anyhow!(
                "table `[{name}]` of `{}` is not usable: {}",
                self.path.display(),
                error.to_string().trim()
            )
        })
    }
}

/// The table `[data]`, which every stage reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DataTable {
    /// Number of clusters K: a choice of the experiment, never counted from labels.
    pub clusters: usize,
    /// Splits whose pictures the networks learn from.
    pub train_on: Vec<Split>,
    /// Splits that are embedded, clustered and scored.
    pub score_on: Vec<Split>,
}

impl DataTable {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    ///
    /// Fewer than two clusters, or no split to train or score on.
    pub fn check(&self) -> Result<()> {
        if self.clusters < 2 {
            bail!("`clusters = {}` in table `[data]`: at least 2 are needed", self.clusters);
        }
        for (key, splits) in [("train-on", &self.train_on), ("score-on", &self.score_on)] {
            if splits.is_empty() {
                bail!("`{key} = []` in table `[data]`: name train, test or unlabelled");
            }
        }
        Ok(())
    }
}

/// Which part of a published data set a picture belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// The training part; pictures of a plain folder belong here.
    Train,
    /// The test part.
    Test,
    /// Pictures published without ground truth, as in STL-10.
    Unlabelled,
}

impl Split {
    /// The number that stands for the split in `images.safetensors`.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The split that a number in `images.safetensors` stands for.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Train, Self::Test, Self::Unlabelled].into_iter().find(|split| split.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn experiment(text: &str) -> (tempfile::TempDir, Result<Experiment>) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("example.toml");
        fs::write(&path, text).expect("written");
        let read = Experiment::read(&path);
        (folder, read)
    }

    #[test]
    fn a_table_is_read_and_an_unknown_key_is_named_with_table_and_file() {
        let good = "[data]\nclusters = 3\ntrain-on = [\"train\", \"test\"]\nscore-on = [\"test\"]";
        let data: DataTable = experiment(good).1.expect("TOML").table("data").expect("usable");
        assert_eq!(data.train_on, [Split::Train, Split::Test]);
        data.check().expect("sound");

        let typo = good.replace("clusters", "cluster");
        let error = experiment(&typo).1.expect("TOML").table::<DataTable>("data");
        let error = error.expect_err("a typo").to_string();
        for part in ["[data]", "example.toml", "cluster", "expected one of"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
    }

    #[test]
    fn missing_file_wrong_toml_missing_table_and_one_cluster_are_errors() {
        assert!(Experiment::read(Path::new("nowhere.toml")).is_err());
        assert!(experiment("[data").1.is_err());
        let empty = experiment("").1.expect("TOML");
        let error = empty.table::<DataTable>("data").expect_err("missing").to_string();
        assert!(error.contains("clusters"), "{error}");
        let scalar = experiment("data = 1").1.expect("TOML");
        assert!(scalar.table::<DataTable>("data").is_err());
        let one = DataTable { clusters: 1, train_on: vec![Split::Train], score_on: vec![] };
        assert!(one.check().is_err());
        assert!(DataTable { clusters: 2, ..one }.check().is_err());
    }

    #[test]
    fn split_codes_are_those_of_the_file_format() {
        for (split, code) in [(Split::Train, 0), (Split::Test, 1), (Split::Unlabelled, 2)] {
            assert_eq!(split.code(), code);
            assert_eq!(Split::from_code(code), Some(split));
        }
        assert_eq!(Split::from_code(3), None);
    }
}
