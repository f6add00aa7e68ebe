//! The table `[data]`, which every stage reads.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// The table `[data]`, which every stage reads.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DataTable {
    /// Number of clusters K: a choice of the experiment, never counted from labels. 0 in the job of
    /// a stage whose results must not depend on it, see [`Spec::depends_on_clusters`].
    ///
    /// [`Spec::depends_on_clusters`]: crate::Spec::depends_on_clusters
    pub clusters: usize,
    /// Splits whose pictures the networks learn from.
    pub train_on: Vec<Split>,
    /// Splits that are embedded, clustered and scored.
    pub score_on: Vec<Split>,
}

impl DataTable {
    /// Fails if there are fewer than two clusters, or no split to train or score on.
    pub fn check(&self) -> Result<()> {
        let Self { clusters, .. } = self;
        ensure!(*clusters >= 2, "`clusters` in `[data]` is {clusters}; it must be at least 2");
        for (key, splits) in [("train-on", &self.train_on), ("score-on", &self.score_on)] {
            ensure!(
                !splits.is_empty(),
                "`{key}` in `[data]` is empty; it must name train, test or unlabelled"
            );
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
    /// The number of the split in `images.safetensors`.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The split of a number in `images.safetensors`.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Train, Self::Test, Self::Unlabelled].into_iter().find(|split| split.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_cluster_and_no_split_are_errors_that_name_the_key() {
        let sound = DataTable {
            clusters: 2,
            train_on: vec![Split::Train],
            score_on: vec![Split::Train, Split::Test],
        };
        sound.check().expect("sound");
        let message = |table: DataTable| table.check().expect_err("refused").to_string();
        let one = message(DataTable { clusters: 1, ..sound.clone() });
        assert_eq!(one, "`clusters` in `[data]` is 1; it must be at least 2");
        assert!(message(DataTable { train_on: vec![], ..sound.clone() }).contains("`train-on`"));
        assert!(message(DataTable { score_on: vec![], ..sound }).contains("`score-on`"));
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
