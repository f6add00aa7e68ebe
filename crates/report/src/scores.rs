//! What `metrics` wrote of a round: `metrics.json`.

use serde::Deserialize;

/// Agreement with the ground truth, as fractions; absent where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Scores {
    /// Accuracy under the best one-to-one map of clusters to classes.
    pub acc: Option<f64>,
    /// Normalised mutual information.
    pub nmi: Option<f64>,
    /// Adjusted Rand index.
    pub ari: Option<f64>,
    /// Accuracy of k-means on the same embeddings.
    pub k_means_acc: Option<f64>,
}

impl Scores {
    /// Reads the text of the file; nothing where it has no score.
    ///
    /// # Errors
    ///
    /// It is not what `metrics` writes.
    pub fn of(json: &str) -> serde_json::Result<Option<Self>> {
        let File { head, kmeans } = serde_json::from_str(json)?;
        let head = head.unwrap_or_default();
        let k_means_acc = kmeans.unwrap_or_default().acc;
        Ok(head.acc.map(|_| Self { acc: head.acc, nmi: head.nmi, ari: head.ari, k_means_acc }))
    }
}

#[derive(Deserialize)]
struct File {
    head: Option<Agreement>,
    kmeans: Option<Agreement>,
}

#[derive(Deserialize, Default)]
struct Agreement {
    acc: Option<f64>,
    nmi: Option<f64>,
    ari: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_read_where_there_are_any() {
        let json =
            r#"{"head":{"acc":0.5,"nmi":0.25,"ari":0.125},"kmeans":{"acc":0.75},"images":4}"#;
        let want =
            Scores { acc: Some(0.5), nmi: Some(0.25), ari: Some(0.125), k_means_acc: Some(0.75) };
        assert_eq!(Scores::of(json).expect("sound"), Some(want));
        let none = r#"{"head":{"acc":null,"nmi":null,"ari":null},"kmeans":null}"#;
        assert_eq!(Scores::of(none).expect("sound"), None);
        assert!(Scores::of("{").is_err());
    }
}
