//! The objective: pointwise mutual information of an image and its neighbour, balanced by the running
//! marginal of each head, weighted by what the targets of all heads agree on.
//!
//! Adaloglou et al. 2023 (arXiv:2303.17896). A head has logits for the two sides of `B` pairs, `(2, B,
//! K)`: all first sides, then all second sides. `p` are the memberships of the online head, `q` those of
//! the target head, without gradient.

use frozen::product::{HeadFloat, SoftmaxRows, add_rows};
use serde::{Deserialize, Serialize};

/// `[temi.objective]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Objective {
    /// Temperature τ of both softmaxes.
    pub temperature: f64,
    /// Exponent β of the product of memberships, above ½ and at most 1. 1 is the bound of the mutual
    /// information and leaves clusters empty; a smaller one favours even clusters.
    pub beta: f64,
    /// Exponent ρ of the marginal. 1 asks for clusters of equal size, 0 does not balance and collapses.
    pub balance: f64,
    /// The marginal is not taken below this.
    pub marginal_floor: f64,
}

/// Memberships `softmax(logits / τ)`, `(rows, K)`.
pub fn memberships<T: HeadFloat>(
    logits: &[T],
    clusters: usize,
    temperature: f64,
) -> SoftmaxRows<T> {
    SoftmaxRows::new(logits, clusters, T::of(1. / temperature))
}

/// Moves the marginal of a head: `m ← decay · m + (1 − decay) · mean over the 2B rows of q`. It sums to
/// 1 and stays positive.
///
/// - `target`: `q`, `(2B, K)`.
pub fn follow_marginal<T: HeadFloat>(marginal: &mut [T], target: &SoftmaxRows<T>, decay: f64) {
    let mut means = vec![T::zero(); marginal.len()];
    add_rows(&mut means, &target.memberships);
    let share = T::of((1. - decay) / (target.memberships.len() / marginal.len()) as f64);
    for (m, mean) in marginal.iter_mut().zip(means) {
        *m = T::of(decay) * *m + share * mean;
    }
}

/// How far one head agrees on the sides of each pair: `Σ_c q₁c q₂c`, `(B,)` in `[0, 1]`.
///
/// - `target`: `q`, `(2, B, K)`.
pub fn pair_agreement<T: HeadFloat>(
    target: &SoftmaxRows<T>,
    clusters: usize,
) -> impl Iterator<Item = T> {
    let (first, second) = target.memberships.split_at(target.memberships.len() / 2);
    let rows = first.chunks_exact(clusters).zip(second.chunks_exact(clusters));
    rows.map(|(first, second)| first.iter().zip(second).map(|(&a, &b)| a * b).sum())
}

/// The weight of each of `pairs` pairs, shared by all heads: `w = 1/H Σ_h Σ_c q₁c q₂c`, `(B,)` in `[0, 1]`.
///
/// - `agreements`: [`pair_agreement`] of each head, `(H, B)`.
pub fn pair_weights<T: HeadFloat>(agreements: &[T], pairs: usize) -> Vec<T> {
    let mut weights = vec![T::zero(); pairs];
    add_rows(&mut weights, agreements);
    let heads = T::of((agreements.len() / pairs) as f64);
    weights.iter_mut().for_each(|weight| *weight /= heads);
    weights
}

/// Returns the loss of one head, and the gradient of the mean over `heads` heads by its logits, `(2, B, K)`.
///
/// `L = ½ [mean_B w ℓ(p₁, q₂) + mean_B w ℓ(p₂, q₁)]` with `ℓ(p, q) = −log Σ_c (p_c q_c)^β / m_c^ρ`. A side
/// never meets its own target. With `r_c ∝ (p_c q_c)^β / m_c^ρ` and `Σ r = 1`, the gradient of `L / H` by
/// a side's logits is `w (β/τ) (p − r) / (2BH)`. Logarithms are summed, so that memberships near 0 are
/// exact.
///
/// - `online`, `target`: `p` and `q`, `(2, B, K)`. No gradient reaches `q`, `m`, `w`.
///
/// The loss is in nats: 0 for one cluster, `−(2 − 2β) ln K` times `1/K` for uniform memberships, and
/// `−ln K` at best, for ρ = 1.
pub fn head_loss<T: HeadFloat>(
    online: &SoftmaxRows<T>,
    target: &SoftmaxRows<T>,
    weights: &[T],
    marginal: &[T],
    objective: &Objective,
    heads: usize,
) -> (T, Vec<T>) {
    let (clusters, pairs) = (marginal.len(), weights.len());
    let half = pairs * clusters;
    let Objective { temperature, beta, balance, marginal_floor } = *objective;
    let floor = T::of(marginal_floor);
    let log_marginal: Vec<T> =
        marginal.iter().map(|&m| m.at_least(floor).ln() * T::of(balance)).collect();
    // Each side of a pair with the target of the other: `r`, and the logarithm of its sum.
    let sides = online.logs[..half]
        .chunks_exact(clusters)
        .chain(online.logs[half..].chunks_exact(clusters));
    let others = target.logs[half..]
        .chunks_exact(clusters)
        .chain(target.logs[..half].chunks_exact(clusters));
    let (mut terms, mut logs) = (Vec::with_capacity(2 * half), Vec::with_capacity(2 * pairs));
    for (p, q) in sides.zip(others) {
        let row = p.iter().zip(q).zip(&log_marginal);
        terms.extend(row.map(|((&p, &q), &m)| T::of(beta) * (p + q) - m));
        let row = &mut terms[logs.len() * clusters..];
        let largest = row.iter().fold(T::neg_infinity(), |largest, &x| largest.at_least(x));
        row.iter_mut().for_each(|x| *x -= largest);
        logs.push(largest);
    }
    terms.iter_mut().for_each(|x| *x = x.exponential());
    let scale = T::of(beta / temperature / (2 * pairs * heads) as f64);
    let mut loss = T::zero();
    let rows = terms.chunks_exact_mut(clusters).zip(online.memberships.chunks_exact(clusters));
    for (((terms, p), &log), &weight) in rows.zip(&logs).zip(weights.iter().chain(weights)) {
        let sum = terms.iter().copied().sum::<T>();
        loss -= weight * (log + sum.ln());
        let (factor, share) = (weight * scale, T::one() / sum);
        terms.iter_mut().zip(p).for_each(|(x, &p)| *x = factor * (p - *x * share));
    }
    (loss / T::of((2 * pairs) as f64), terms)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const OBJECTIVE: Objective =
        Objective { temperature: 0.1, beta: 0.6, balance: 1., marginal_floor: 1e-8 };

    /// `[head][side][pair][cluster]`.
    const ONLINE: [[f64; 12]; 2] = [
        [0.10, -0.05, 0., 0.02, 0.08, -0.10, 0.05, 0.05, -0.05, -0.02, 0.12, 0.01],
        [0., 0.10, -0.10, 0.03, -0.03, 0.06, 0.02, 0.07, 0., 0.10, 0., 0.04],
    ];
    const TARGET: [[f64; 12]; 2] = [
        [0.12, -0.02, 0., 0., 0.05, -0.05, 0.08, 0., -0.04, 0.01, 0.10, 0.],
        [0.02, 0.06, -0.08, 0., -0.02, 0.09, 0., 0.09, 0.01, 0.06, 0.02, 0.05],
    ];

    #[track_caller]
    pub(crate) fn assert_near(got: &[f64], want: &[f64], within: f64) {
        assert_eq!(got.len(), want.len());
        for (got_one, want_one) in got.iter().zip(want) {
            assert!((got_one - want_one).abs() < within, "got {got:?}, want {want:?}");
        }
    }

    struct Case {
        online: Vec<SoftmaxRows<f64>>,
        target: Vec<SoftmaxRows<f64>>,
        marginals: Vec<Vec<f64>>,
        weights: Vec<f64>,
    }

    fn case() -> Case {
        let both = |logits: &[[f64; 12]; 2]| logits.map(|logits| memberships(&logits, 3, 0.1));
        let (online, target) = (both(&ONLINE).to_vec(), both(&TARGET).to_vec());
        let mut marginals = vec![vec![1. / 3.; 3]; 2];
        for (marginal, target) in marginals.iter_mut().zip(&target) {
            follow_marginal(marginal, target, 0.9);
        }
        let agreements: Vec<f64> = target.iter().flat_map(|q| pair_agreement(q, 3)).collect();
        let weights = pair_weights(&agreements, 2);
        Case { online, target, marginals, weights }
    }

    fn losses(case: &Case, objective: &Objective) -> Vec<(f64, Vec<f64>)> {
        (0..2)
            .map(|h| {
                let (p, q, m) = (&case.online[h], &case.target[h], &case.marginals[h]);
                head_loss(p, q, &case.weights, m, objective, 2)
            })
            .collect()
    }

    /// Heads on frozen embeddings, case T1.
    #[test]
    fn memberships_marginals_weights_and_losses_have_the_specified_values() {
        let case = case();
        let want = [0.628531719, 0.140244383, 0.231223898, 0.320172841, 0.583392953, 0.096434206];
        assert_near(&case.online[0].memberships[..6], &want, 1e-9);
        let want = [0.646081988, 0.159321857, 0.194596155, 0.307195886, 0.506480391, 0.186323723];
        assert_near(&case.target[0].memberships[..6], &want, 1e-9);
        assert_near(&case.marginals[0], &[0.343841503, 0.337151003, 0.319007495], 1e-9);
        assert_near(&case.marginals[1], &[0.329770426, 0.337804070, 0.332425504], 1e-9);
        assert_near(&case.weights, &[0.416147814, 0.368513009], 1e-9);
        let found = losses(&case, &OBJECTIVE);
        assert_near(&[found[0].0, found[1].0], &[-0.342349186, -0.341210481], 1e-9);
        let want =
            [-0.005907048, -0.008075706, 0.013982754, 0.019437929, -0.011972365, -0.007465564];
        assert_near(&found[0].1[..6], &want, 1e-9);
        let want =
            [-0.008818302, -0.017155500, 0.025973802, 0.040405349, 0.003727571, -0.044132920];
        assert_near(&found[1].1[6..], &want, 1e-9);
        for (beta, want) in
            [(1., [-0.072584010, -0.040827643]), (0.5, [-0.418592844, -0.421493635])]
        {
            let found = losses(&case, &Objective { beta, ..OBJECTIVE });
            assert_near(&[found[0].0, found[1].0], &want, 1e-9);
        }
    }

    /// Heads on frozen embeddings, case T2.
    #[test]
    fn a_second_step_moves_the_marginals_on() {
        let mut case = case();
        for (marginal, target) in case.marginals.iter_mut().zip(&case.target) {
            follow_marginal(marginal, target, 0.9);
        }
        assert_near(&case.marginals[0], &[0.353298855, 0.340586905, 0.306114240], 1e-9);
        assert_near(&case.marginals[1], &[0.326563809, 0.341827733, 0.331608458], 1e-9);
    }

    /// Heads on frozen embeddings, case T3: uniform, balanced and sure, collapsed; ten clusters, the true marginal.
    #[test]
    fn limits_are_those_of_the_formula() {
        let of = |logits: &dyn Fn(usize, usize) -> f64, beta: f64| -> [f64; 2] {
            let logits: Vec<f64> = (0..200).map(|i| logits(i / 10 % 10, i % 10)).collect();
            let both = memberships(&logits, 10, 0.1);
            let mut marginal = vec![0.1; 10];
            follow_marginal(&mut marginal, &both, 0.);
            let weights = pair_weights(&pair_agreement(&both, 10).collect::<Vec<_>>(), 10);
            let objective = Objective { beta, ..OBJECTIVE };
            [weights[0], head_loss(&both, &both, &weights, &marginal, &objective, 1).0]
        };
        assert_near(&of(&|_, _| 0., 0.6), &[0.1, -0.184206807], 1e-9);
        assert_near(&of(&|_, _| 0., 1.), &[0.1, 0.], 1e-9);
        for beta in [0.5, 0.6, 1.] {
            let sure = of(&|row, k| if row == k { 100. } else { 0. }, beta);
            assert_near(&sure, &[1., -std::f64::consts::LN_10], 1e-9);
            let collapsed = of(&|_, k| if k == 0 { 100. } else { 0. }, beta);
            assert_near(&collapsed, &[1., 0.], 1e-9);
        }
    }

    #[test]
    fn the_gradient_matches_central_differences() {
        let case = case();
        let objective = Objective { balance: 0.7, ..OBJECTIVE };
        let mean = |online: &[[f64; 12]; 2]| -> f64 {
            let online = online.map(|logits| memberships(&logits, 3, 0.1)).to_vec();
            let case = Case {
                online,
                target: case.target.clone(),
                marginals: case.marginals.clone(),
                weights: case.weights.clone(),
            };
            losses(&case, &objective).iter().map(|(loss, _)| loss / 2.).sum()
        };
        let found = losses(&case, &objective);
        for h in 0..2 {
            for i in 0..12 {
                let (mut up, mut down) = (ONLINE, ONLINE);
                up[h][i] += 1e-6;
                down[h][i] -= 1e-6;
                let want = (mean(&up) - mean(&down)) / 2e-6;
                assert!((found[h].1[i] - want).abs() < 1e-8, "{h}, {i}: {}, {want}", found[h].1[i]);
            }
        }
    }

    /// Heads on frozen embeddings, case T14.
    #[test]
    fn the_marginal_stays_a_distribution() {
        let mut marginal = vec![0.2; 5];
        for step in 0..500 {
            let logits: Vec<f64> =
                (0..40).map(|i| if i % 5 == step / 50 % 5 { 3. } else { 0. }).collect();
            follow_marginal(&mut marginal, &memberships(&logits, 5, 0.1), 0.9);
            assert!(marginal.iter().all(|&m| m > 0.), "{marginal:?}");
            assert!((marginal.iter().sum::<f64>() - 1.).abs() < 1e-12, "step {step}");
        }
    }

    /// Heads on frozen embeddings, case T11: permuted clusters permute the gradient; the order of pairs does not matter.
    #[test]
    fn clusters_and_pairs_may_be_permuted() {
        let case = case();
        let (loss, gradient) = losses(&case, &OBJECTIVE).remove(0);
        type Turn<'a> = &'a dyn Fn(&[f64]) -> Vec<f64>;
        let turn = |rows: &[f64]| -> Vec<f64> {
            rows.chunks(3).flat_map(|row| [row[2], row[0], row[1]]).collect()
        };
        let swap = |rows: &[f64]| -> Vec<f64> {
            [&rows[3..6], &rows[..3], &rows[9..], &rows[6..9]].concat()
        };
        let (p, q, m, w) = (&case.online[0], &case.target[0], &case.marginals[0], &case.weights);
        let both = |rows: &SoftmaxRows<f64>, change: Turn| SoftmaxRows {
            logs: change(&rows.logs),
            memberships: change(&rows.memberships),
        };
        let turned = head_loss(&both(p, &turn), &both(q, &turn), w, &turn(m), &OBJECTIVE, 2);
        assert_near(&[turned.0], &[loss], 1e-12);
        assert_near(&turned.1, &turn(&gradient), 1e-12);
        let swapped = head_loss(&both(p, &swap), &both(q, &swap), &[w[1], w[0]], m, &OBJECTIVE, 2);
        assert_near(&[swapped.0], &[loss], 1e-12);
        assert_near(&swapped.1, &swap(&gradient), 1e-12);
    }
}
