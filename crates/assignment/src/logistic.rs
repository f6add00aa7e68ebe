//! Logistic regression, and the generalisation score of a labelling.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use kernels::similarity::{add_row, product};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use stage::random::stream;

use crate::points;

/// How a labelling is scored by what a linear classifier can learn of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generalisation {
    /// Parts that are held out in turn, at least 2.
    pub folds: usize,
    /// Weight `C` of the cross-entropy against the penalty of the weights.
    pub weight: f64,
    /// Iterations of the optimiser at most.
    pub iterations: usize,
}

impl Generalisation {
    /// The generalisation score of a labelling: the accuracy with which logistic regression, trained on
    /// the other parts, predicts the labels of a held-out part; the mean over the parts. In `[0, 1]`.
    ///
    /// Gadetsky, Jiang and Brbić 2024 (arXiv:2406.07236): of several labellings of one set the one that
    /// linear classifiers learn best is often the true one. No truth is used. It favours few and unequal
    /// clusters, so only labellings with as many clusters should be compared by it.
    ///
    /// - `rows`: `(N, d)`.
    /// - `labels`: `(N,)`, below `clusters`.
    ///
    /// # Errors
    ///
    /// There are fewer than two parts or fewer rows than parts, a row is not finite, or a label is not
    /// below `clusters`.
    pub fn score(
        &self,
        rows: &[f32],
        d: usize,
        labels: &[u32],
        clusters: usize,
        seed: u64,
    ) -> Result<f64> {
        let n = labels.len();
        points::check(rows, n, d, "generalisation score")?;
        ensure!(
            (2..=n).contains(&self.folds),
            "generalisation score: {} parts of {n} rows; at least 2 and at most one for each row",
            self.folds
        );
        if let Some(i) = labels.iter().position(|&label| label as usize >= clusters) {
            anyhow::bail!(
                "generalisation score: row {i} is in cluster {}, but there are {clusters}",
                labels[i]
            );
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut stream(seed, "generalisation folds", &[]));
        let of_fold = |fold: usize| -> f64 {
            let (held, kept): (Vec<_>, Vec<_>) =
                order.iter().enumerate().partition(|(place, _)| place % self.folds == fold);
            let gather = |part: &[(usize, &usize)]| -> (Vec<f32>, Vec<u32>) {
                let rows = part.iter().flat_map(|&(_, &i)| &rows[i * d..][..d]).copied();
                (rows.collect(), part.iter().map(|&(_, &i)| labels[i]).collect())
            };
            let ((rows, labels), (held, truth)) = (gather(&kept), gather(&held));
            let found = LinearClassifier::fit(&rows, d, &labels, clusters, self);
            let right = found.predict(&held).iter().zip(&truth).filter(|(a, b)| a == b).count();
            right as f64 / truth.len() as f64
        };
        // Folds are shared out among the threads; each is computed in one order.
        let scores: Vec<f64> = (0..self.folds).into_par_iter().map(of_fold).collect();
        Ok(scores.iter().sum::<f64>() / self.folds as f64)
    }
}

/// A linear map to the logits of `K` classes.
#[derive(Debug, Clone)]
struct LinearClassifier {
    /// `(K, d + 1)`: weights and bias.
    values: Vec<f64>,
    d: usize,
}

impl LinearClassifier {
    /// Minimises `C Σᵢ −log softmax(W xᵢ + b)_{yᵢ} + ½ ‖W‖²` by L-BFGS from zero, until no part of the
    /// gradient is above 1e-4 or the iterations are used up: the setting of scikit-learn's
    /// `LogisticRegression`.
    fn fit(rows: &[f32], d: usize, labels: &[u32], clusters: usize, by: &Generalisation) -> Self {
        let value = |values: &[f64]| objective(rows, d, labels, values, by.weight);
        let values = minimised(vec![0.; clusters * (d + 1)], by.iterations, 1e-4, value);
        Self { values, d }
    }

    fn predict(&self, rows: &[f32]) -> Vec<u32> {
        let weights = weights_of(&self.values, self.d);
        let best = |row: &[f32]| {
            let logits = logits(row, &weights, &self.values, self.d);
            let better = |best: usize, k: usize| if logits[k] > logits[best] { k } else { best };
            (0..logits.len()).reduce(better).unwrap_or(0) as u32
        };
        rows.chunks_exact(self.d).map(best).collect()
    }
}

/// The weights without the biases, in the precision of the rows.
fn weights_of(values: &[f64], d: usize) -> Vec<f32> {
    values.chunks_exact(d + 1).flat_map(|row| row[..d].iter().map(|&x| x as f32)).collect()
}

fn logits(row: &[f32], weights: &[f32], values: &[f64], d: usize) -> Vec<f64> {
    let biases = values.iter().skip(d).step_by(d + 1);
    weights.chunks_exact(d).zip(biases).map(|(weight, bias)| product(weight, row) + bias).collect()
}

/// The penalised cross-entropy and its gradient.
fn objective(
    rows: &[f32],
    d: usize,
    labels: &[u32],
    values: &[f64],
    weight: f64,
) -> (f64, Vec<f64>) {
    let weights = weights_of(values, d);
    let mut gradient = vec![0.; values.len()];
    let mut sum = 0.;
    for (row, &label) in rows.chunks_exact(d).zip(labels) {
        let logits = logits(row, &weights, values, d);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        sum += total.ln() + largest - logits[label as usize];
        for (k, (logit, gradient)) in
            logits.iter().zip(gradient.chunks_exact_mut(d + 1)).enumerate()
        {
            let wanted = if k == label as usize { 1. } else { 0. };
            let by = weight * ((logit - largest).exp() / total - wanted);
            add_row(&mut gradient[..d], row, by);
            gradient[d] += by;
        }
    }
    let mut squares = 0.;
    for (values, gradient) in values.chunks_exact(d + 1).zip(gradient.chunks_exact_mut(d + 1)) {
        for (x, gradient) in values[..d].iter().zip(gradient) {
            squares += x * x;
            *gradient += x;
        }
    }
    (weight * sum + 0.5 * squares, gradient)
}

/// Minimises a smooth convex function by L-BFGS with 10 pairs and a backtracking search (Nocedal and
/// Wright 2006, algorithms 7.4 and 3.1).
fn minimised(
    mut at: Vec<f64>,
    iterations: usize,
    tolerance: f64,
    function: impl Fn(&[f64]) -> (f64, Vec<f64>),
) -> Vec<f64> {
    const PAIRS: usize = 10;
    let (mut value, mut gradient) = function(&at);
    let mut pairs: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
    for _ in 0..iterations {
        if gradient.iter().all(|x| x.abs() <= tolerance) {
            break;
        }
        let direction = quasi_newton(&gradient, &pairs);
        let slope = dot(&direction, &gradient);
        let length = dot(&gradient, &gradient).sqrt();
        let mut rate = if pairs.is_empty() { 1. / length.max(1.) } else { 1. };
        let (next, next_value, next_gradient) = loop {
            let next: Vec<f64> = at.iter().zip(&direction).map(|(x, d)| x + rate * d).collect();
            let (next_value, next_gradient) = function(&next);
            if next_value <= value + 1e-4 * rate * slope {
                break (next, next_value, next_gradient);
            }
            rate *= 0.5;
            if rate < 1e-12 {
                return at;
            }
        };
        let step: Vec<f64> = next.iter().zip(&at).map(|(a, b)| a - b).collect();
        let change: Vec<f64> = next_gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let curvature = dot(&step, &change);
        if curvature > 1e-12 * dot(&change, &change) {
            if pairs.len() == PAIRS {
                pairs.pop_front();
            }
            pairs.push_back((step, change, curvature));
        }
        (at, value, gradient) = (next, next_value, next_gradient);
    }
    at
}

/// The direction of descent: two loops over the remembered steps and changes of the gradient.
fn quasi_newton(gradient: &[f64], pairs: &VecDeque<(Vec<f64>, Vec<f64>, f64)>) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|x| -x).collect();
    let mut factors = Vec::with_capacity(pairs.len());
    for (step, change, curvature) in pairs.iter().rev() {
        let factor = dot(step, &direction) / curvature;
        direction.iter_mut().zip(change).for_each(|(d, c)| *d -= factor * c);
        factors.push(factor);
    }
    if let Some((_, change, curvature)) = pairs.back() {
        let scale = curvature / dot(change, change);
        direction.iter_mut().for_each(|d| *d *= scale);
    }
    for ((step, change, curvature), factor) in pairs.iter().zip(factors.iter().rev()) {
        let other = dot(change, &direction) / curvature;
        direction.iter_mut().zip(step).for_each(|(d, s)| *d += (factor - other) * s);
    }
    direction
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    /// As TURTLE scores labellings.
    const PUBLISHED: Generalisation = Generalisation { folds: 10, weight: 1., iterations: 1000 };

    #[test]
    fn the_minimum_has_no_gradient_and_that_matches_central_differences() {
        let rows = [1f32, 0., 0.5, 1., -1., 0.25, 0.5, -1., 2., 1., -0.5, -0.5];
        let labels = [0, 1, 2, 0, 1, 2];
        let at: Vec<f64> = (0..9).map(|i| f64::from(i) / 7. - 0.5).collect();
        let value = |values: &[f64]| objective(&rows, 2, &labels, values, 1.5);
        let (_, gradient) = value(&at);
        for i in 0..9 {
            let (mut up, mut down) = (at.clone(), at.clone());
            // Weights are rounded to f32: steps that f32 represents.
            up[i] = f64::from((at[i] + 1e-2) as f32);
            down[i] = f64::from((at[i] - 1e-2) as f32);
            let want = (value(&up).0 - value(&down).0) / (up[i] - down[i]);
            assert!((gradient[i] - want).abs() < 1e-3, "{i}: {}, {want}", gradient[i]);
        }
        let found = minimised(vec![0.; 9], 1000, 1e-6, value);
        let (least, gradient) = value(&found);
        assert!(gradient.iter().all(|x| x.abs() < 1e-4), "{gradient:?}");
        assert!(least < value(&at).0);
    }

    /// One weight and one bias a class, by symmetry `w` and `−w`: the minimum of
    /// `2 C ln(1 + e^(−2w)) + w²` for rows ±1 has `2 C σ(−2w) = w`.
    #[test]
    fn two_points_have_the_weight_of_the_formula() {
        let found = LinearClassifier::fit(&[1., -1.], 1, &[0, 1], 2, &PUBLISHED);
        let w = found.values[0];
        assert!((2. / (1. + (2. * w).exp()) - w).abs() < 1e-4, "{:?}", found.values);
        assert!((found.values[2] + w).abs() < 1e-6 && found.values[1].abs() < 1e-6);
        assert_eq!(found.predict(&[3., -0.1, 0.2]), [0, 1, 0]);
    }

    #[test]
    fn a_labelling_that_lines_separate_scores_high_and_a_random_one_low() -> Result<()> {
        let mut random = stream(3, "test", &[]);
        let mut rows = vec![];
        let (mut by_side, mut by_chance) = (vec![], vec![]);
        for _ in 0..300 {
            let row = [random.random_range(-1f32..1.), random.random_range(-1f32..1.)];
            by_side.push(u32::from(row[0] > row[1]));
            by_chance.push(random.random_range(0..2));
            rows.extend(row);
        }
        let by = Generalisation { folds: 5, ..PUBLISHED };
        let (side, chance) =
            (by.score(&rows, 2, &by_side, 2, 0)?, by.score(&rows, 2, &by_chance, 2, 0)?);
        assert!(side > 0.95 && (0.35..0.65).contains(&chance), "{side}, {chance}");
        assert_eq!(by.score(&rows, 2, &by_side, 2, 0)?, side);
        assert!(by.score(&rows, 2, &by_side, 1, 0).is_err());
        assert!(Generalisation { folds: 1, ..by }.score(&rows, 2, &by_side, 2, 0).is_err());
        Ok(())
    }
}
