//! Detects a collapse that the sizes of the clusters do not show.
//!
//! When all images of a batch look alike, all get one id; the dual variables then change it in the
//! next batch, and over an epoch every cluster holds the same number of whole batches. So we watch
//! the ids *within* a batch, and how alike its projections are.

use std::collections::BTreeSet;

use anyhow::Result;
use candle_core::Tensor;
use stage::Diverged;
use training::Checkpoint;

/// Counts batches of too few distinct ids.
#[derive(Debug, Clone)]
pub struct Monitor {
    /// Least number of distinct ids in a healthy batch.
    least: usize,
    /// This many batches with fewer, in a row, are a collapse.
    patience: u64,
    /// Batches with fewer in a row, up to the last one.
    in_a_row: u64,
}

impl Monitor {
    /// A monitor before the first batch.
    pub fn new(least: usize, patience: usize) -> Self {
        Self { least, patience: patience as u64, in_a_row: 0 }
    }

    /// Counts the ids of a batch; returns how many distinct ones there are.
    ///
    /// # Errors
    ///
    /// Too many batches in a row had too few ids: [`Diverged`].
    pub fn look(&mut self, ids: &[u32]) -> Result<usize> {
        let distinct = distinct(ids);
        self.in_a_row = if distinct < self.least.min(ids.len()) { self.in_a_row + 1 } else { 0 };
        if self.in_a_row >= self.patience {
            return Err(Diverged(format!(
                "the clusters collapsed: {} batches in a row had fewer than `least-distinct-ids` = \
                 {} clusters each, the last one {distinct}, though all batches together may fill \
                 the clusters evenly; with few steps an epoch, constrain by entropy (weight: 0.12 \
                 for each image); else try a lower `learning-rate`, `centre-learning-rate` or \
                 `rate` of the constraint",
                self.in_a_row, self.least
            ))
            .into());
        }
        Ok(distinct)
    }

    /// Saves or loads the count, as `stage.batches-of-few-ids`.
    pub(crate) fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        file.count("batches-of-few-ids", &mut self.in_a_row)
    }
}

/// The number of distinct ids.
pub fn distinct(ids: &[u32]) -> usize {
    ids.iter().collect::<BTreeSet<_>>().len()
}

/// Mean cosine of all pairs of different rows, for unit-length rows `(B, P)`; near 1 when all
/// images look alike. A scalar without gradient, for the log.
///
/// `(‖Σᵢ zᵢ‖² − B) / (B (B − 1))`.
///
/// # Errors
///
/// `rows` is not a matrix.
pub fn mean_cosine(rows: &Tensor) -> Result<Tensor> {
    let count = rows.dims2()?.0 as f64;
    let sum = rows.detach().sum(0)?.sqr()?.sum_all()?;
    Ok(((sum - count)? / (count * (count - 1.)).max(1.))?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;
    use crate::constraint::{Balance, Before, Constraint};

    /// SeCu, case T12: identical features, similarities about 0.01 apart.
    #[test]
    fn a_collapse_that_looks_balanced_is_seen() {
        const BATCHES: usize = 390;
        let mut balance = Balance::new(Constraint::Size { lower_bound: 0.9, rate: 0.1 }, 10);
        let row: Vec<f32> = (0..10).map(|k| 0.5 + 0.01 * (k as f32 * 0.7).sin()).collect();
        let batch = row.repeat(128);
        let mut monitor = Monitor::new(2, BATCHES);
        let mut sizes = [0usize; 10];
        let mut fired = None;
        for number in 1..=BATCHES {
            let ids = balance.assign(&batch, Before::Nothing).expect("finite");
            ids.iter().for_each(|&id| sizes[id as usize] += 1);
            if let Err(error) = monitor.look(&ids) {
                assert!(error.is::<Diverged>(), "{error}");
                fired = Some(number);
            }
        }
        assert_eq!(fired, Some(BATCHES));
        for size in sizes {
            assert!(size % 128 == 0 && (4736..=5248).contains(&size), "{sizes:?}");
        }
    }

    #[test]
    fn one_healthy_batch_begins_the_count_anew() {
        let mut monitor = Monitor::new(3, 4);
        for _ in 0..3 {
            for ids in [[0, 0, 1, 1], [2, 2, 2, 2], [4, 4, 4, 5]] {
                assert!(monitor.look(&ids).expect("not yet") < 3);
            }
            assert_eq!(monitor.in_a_row, 3);
            assert_eq!(monitor.look(&[0, 1, 2, 2]).expect("healthy"), 3);
        }
        assert_eq!(monitor.look(&[0, 0]).expect("once"), 1);
        assert_eq!(monitor.look(&[0, 1]).expect("all that two images can have"), 2);
        assert_eq!(monitor.in_a_row, 0);
        let mut resumed = Monitor { in_a_row: 3, ..monitor };
        assert!(resumed.look(&[0, 0, 1, 1]).is_err());
    }

    #[test]
    fn mean_cosine_is_that_of_all_pairs() -> Result<()> {
        let rows = Tensor::new(&[[1f32, 0.], [0.6, 0.8], [0., 1.]], &Cpu)?;
        let value =
            |rows: &Tensor| mean_cosine(rows)?.to_scalar::<f32>().map_err(anyhow::Error::from);
        assert!((value(&rows)? - (0.6 + 0. + 0.8) / 3.).abs() < 1e-6);
        assert!((value(&rows.narrow(0, 0, 1)?.repeat((4, 1))?)? - 1.).abs() < 1e-6);
        Ok(())
    }
}
