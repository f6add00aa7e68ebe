//! What the stages on frozen embeddings share. They see no picture and train no backbone: rows of
//! `embeddings.safetensors` in, `pseudo-labels.safetensors` and `head.safetensors` out.
//!
//! - [`rows`]: the embeddings of a job, standardised, and k-means on them, which is always run.
//! - [`result`]: which assignments to trust, and the file of the result.
//! - [`numbers`]: clusters keep their numbers when pictures are added.
//! - [`product`]: matrix products, softmax and Adam in f32, and in f64 for tests.
//! - [`state`]: the state of an interrupted run.
//!
//! [`INPUTS`] and [`run`] make a method a stage. This crate knows no method.
//!
//! Several ranks can share a run: each has a [share](collective::Communicator::share) of the heads, and
//! the first one [gathers](collective::Communicator::gather) what it writes.
//!
//! ```
//! use collective::Communicator;
//! use frozen::rows::{KMeansTable, Standardisation};
//!
//! // Two groups, by the small second column; the first is large and means nothing.
//! let rows = [900., -1., -800., -1., 700., -1., -600., 1., 500., 1., -400., 1.];
//! let standard = Standardisation::of(&rows, 2);
//! assert_eq!(standard.apply(&rows)[1], standard.apply(&rows)[3]);
//!
//! let k_means = KMeansTable { restarts: 5, iterations: 100, standardise: true };
//! assert_eq!(k_means.assign(&rows, 2, 2, 0, &Communicator::single())?.len(), 6);
//! # anyhow::Ok(())
//! ```

pub mod numbers;
pub mod product;
pub mod result;
pub mod rows;
pub mod state;

use anyhow::{Result, ensure};
use data::PseudoLabels;
use stage::{DataTable, Job, Origin, Role};

use crate::rows::FrozenEmbeddings;

/// The inputs of a stage on frozen embeddings; `previous` is its own last round, `earlier` the run
/// before, after which it numbers the clusters ([`numbers`]).
pub const INPUTS: &[Role] = &[
    Role::new("embeddings", Origin::Embeddings),
    Role::new("previous", Origin::PreviousRound),
    Role::new("earlier", Origin::EarlierRun),
];

/// Fails unless `train-on` and `score-on` name the same splits. Heads learn from the embeddings, and `embed`
/// writes only those of the scored pictures.
///
/// # Errors
///
/// `train-on` and `score-on` name different splits.
pub fn check_splits(job: &Job) -> Result<()> {
    let DataTable { train_on, score_on, .. } = &job.data;
    let same = train_on.iter().all(|split| score_on.contains(split))
        && score_on.iter().all(|split| train_on.contains(split));
    ensure!(
        same,
        "`train-on` in `[data]` is {train_on:?} and `score-on` is {score_on:?}, but heads on \
         frozen embeddings learn from the pictures that are scored: set both to the same splits"
    );
    Ok(())
}

/// Runs a stage: reads the embeddings, writes the pseudo-labels that `cluster` returns, keeps their
/// numbers for the next run, and removes the state.
///
/// - `cluster`: returns `None` on all ranks but the first, which writes.
///
/// # Errors
///
/// Those of [`FrozenEmbeddings::open`] and of `cluster`; or a file cannot be written.
pub fn run(
    job: &Job,
    cluster: impl FnOnce(FrozenEmbeddings) -> Result<Option<PseudoLabels>>,
) -> Result<()> {
    let embeddings = FrozenEmbeddings::open(job)?;
    let Some(labels) = cluster(embeddings)? else { return Ok(()) };
    numbers::save(&labels, job)?;
    labels.write(&job.out.join(PseudoLabels::FILE))?;
    state::remove(job)
}

#[cfg(test)]
mod tests {
    use stage::Split::{Test, Train};

    use super::*;

    #[test]
    fn heads_learn_from_the_pictures_that_are_scored() {
        let check = |train_on: &[stage::Split], score_on: &[stage::Split]| {
            let data =
                DataTable { clusters: 2, train_on: train_on.into(), score_on: score_on.into() };
            check_splits(&Job::new("temi", "i.safetensors", "o", data))
        };
        assert!(check(&[Train, Test], &[Test, Train]).is_ok());
        for (train_on, score_on) in
            [([Train].as_slice(), [Test].as_slice()), (&[Train, Test], &[Test])]
        {
            for (train_on, score_on) in [(train_on, score_on), (score_on, train_on)] {
                let error = check(train_on, score_on).expect_err("other splits").to_string();
                assert!(error.contains("`train-on`"), "{error}");
            }
        }
    }
}
