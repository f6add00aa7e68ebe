//! The table `[turtle]`.

use anyhow::{Result, ensure};
use assignment::Generalisation;
use frozen::rows::KMeansTable;
use serde::{Deserialize, Serialize};
use training::check::{above_zero, at_least, not_negative, within};

/// The table `[turtle]`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Steps `T` of the task encoder.
    pub steps: usize,
    /// Images of one step at most, drawn without replacement.
    pub batch_size: usize,
    /// Steps `M` of the inner classifier, which is initialised again at every step of the encoder.
    pub inner_steps: usize,
    /// Weight γ of the marginal's entropy: the larger, the more even the clusters.
    pub balance: f64,
    /// Learning rates to try. The labelling of the highest generalisation score is kept.
    pub rates: Vec<RatePair>,
    /// How labellings are scored.
    pub generalisation: GeneralisationTable,
    /// Which assignments are reliable.
    pub reliable: SureRule,
    /// k-means on the same embeddings.
    pub k_means: KMeansTable,
    /// Steps between checkpoints, and between lines of the log.
    pub save_every: usize,
}

/// Learning rates of Adam.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RatePair {
    /// Of the inner classifier.
    pub inner: f64,
    /// Of the task encoder.
    pub outer: f64,
}

/// `[turtle.generalisation]`, see [`Generalisation`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct GeneralisationTable {
    /// Parts that are held out in turn.
    pub folds: usize,
    /// Weight `C` of the cross-entropy against the penalty.
    pub weight: f64,
    /// Iterations of the optimiser at most.
    pub iterations: usize,
    /// Images to use at most, drawn at random.
    pub images: usize,
}

/// `[turtle.reliable]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SureRule {
    /// Least confidence.
    pub confidence: f64,
    /// Nearest neighbours by cosine to compare with.
    pub neighbours: usize,
    /// Least share of them in the same cluster.
    pub agreeing: f64,
}

impl Config {
    /// Checks the values.
    ///
    /// # Errors
    ///
    /// A value is out of range; the message names the key.
    pub fn check(&self) -> Result<()> {
        at_least(
            "turtle",
            1,
            &[
                ("steps", self.steps),
                ("batch-size", self.batch_size),
                ("inner-steps", self.inner_steps),
                ("save-every", self.save_every),
            ],
        )?;
        not_negative("turtle", &[("balance", self.balance)])?;
        ensure!(
            !self.rates.is_empty(),
            "`rates` in `[turtle]` is empty; it must name learning rates"
        );
        for pair in &self.rates {
            above_zero("turtle.rates", &[("inner", pair.inner), ("outer", pair.outer)])?;
        }
        let GeneralisationTable { folds, weight, iterations, images } = self.generalisation;
        at_least("turtle.generalisation", 2, &[("folds", folds)])?;
        at_least("turtle.generalisation", 1, &[("iterations", iterations)])?;
        at_least("turtle.generalisation", folds, &[("images", images)])?;
        above_zero("turtle.generalisation", &[("weight", weight)])?;
        within("turtle.reliable", "confidence", self.reliable.confidence, 0. ..=1.)?;
        within("turtle.reliable", "agreeing", self.reliable.agreeing, 0. ..=1.)?;
        self.k_means.check("turtle")
    }
}

impl GeneralisationTable {
    /// The parameters of the score.
    pub fn score(&self) -> Generalisation {
        let Self { folds, weight, iterations, .. } = *self;
        Generalisation { folds, weight, iterations }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_out_of_range_is_refused_with_its_table_and_key() {
        let published = fixture::published::<crate::Turtle>();
        published.check().expect("sound");
        let refused = |change: fn(&mut Config), place: &str| {
            let mut config = published.clone();
            change(&mut config);
            let error = config.check().expect_err(place).to_string();
            assert!(error.starts_with(place), "{place} does not start: {error}");
        };
        refused(|c| c.steps = 0, "`steps` in `[turtle]`");
        refused(|c| c.balance = -1., "`balance` in `[turtle]`");
        refused(|c| c.rates.clear(), "`rates` in `[turtle]`");
        refused(|c| c.rates[0].inner = 0., "`inner` in `[turtle.rates]`");
        refused(|c| c.generalisation.folds = 1, "`folds` in `[turtle.generalisation]`");
        refused(|c| c.generalisation.images = 2, "`images` in `[turtle.generalisation]`");
        refused(|c| c.reliable.confidence = 2., "`confidence` in `[turtle.reliable]`");
        refused(|c| c.k_means.iterations = 0, "`iterations` in `[turtle.k-means]`");
    }
}
