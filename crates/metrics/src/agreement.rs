//! Scores of a grouping against another one or the truth.
//!
//! All take a [`Contingency`] table, which [`assignment::contingency`] counts in one pass. Rows are
//! clusters, columns are classes, `n_kc` points are in both, `a_k` and `b_c` are the sums. Empty
//! clusters and classes change nothing. Logarithms are natural, scores have no unit.

use assignment::Contingency;

/// ACC: the share of points in the right cluster, under the best one-to-one map from clusters to
/// classes.
///
/// `max over one-to-one maps m of Σ_k n_{k, m(k)} / N`, by the Hungarian algorithm. If there are
/// more clusters than classes, all points of the surplus clusters are wrong. In `[0, 1]`; 1 for no
/// points.
pub fn accuracy(table: &Contingency) -> f64 {
    share(hits(table, &table.best_map()), points(table))
}

/// Counts the points whose class is the one that `map` gives their cluster.
pub fn hits(table: &Contingency, map: &[Option<u32>]) -> u64 {
    let hit = |(row, class): (usize, &Option<u32>)| -> u64 {
        class.map_or(0, |class| table.at(row, class as usize).into())
    };
    map.iter().enumerate().map(hit).sum()
}

/// The mean of the two entropies that mutual information is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mean {
    /// `(H(clusters) + H(classes)) / 2`, as clustering papers report it.
    Arithmetic,
    /// `√(H(clusters) · H(classes))`.
    Geometric,
    /// The larger entropy.
    Maximum,
    /// The smaller entropy.
    Minimum,
}

impl Mean {
    fn of(self, a: f64, b: f64) -> f64 {
        match self {
            Self::Arithmetic => (a + b) / 2.,
            Self::Geometric => (a * b).sqrt(),
            Self::Maximum => a.max(b),
            Self::Minimum => a.min(b),
        }
    }
}

/// NMI: mutual information divided by the mean of the entropies.
///
/// `I / mean(H(clusters), H(classes))`: Strehl and Ghosh 2002. In `[0, 1]`; 1 if both sides have a
/// single group or there are no points, 0 if only one side has a single group.
pub fn normalized_mutual_information(table: &Contingency, mean: Mean) -> f64 {
    let (a, b) = sums(table);
    if groups(&a) <= 1 && groups(&b) <= 1 {
        return 1.;
    }
    let information = mutual_information(table);
    if information == 0. {
        return 0.;
    }
    information / mean.of(entropy(&a), entropy(&b))
}

/// Logarithms of counts below this are computed once.
const FEW: u64 = 2048;

/// `I = Σ_kc (n_kc / N) ln(N n_kc / (a_k b_c))`, in nats; not below 0.
pub fn mutual_information(table: &Contingency) -> f64 {
    let (a, b) = sums(table);
    let n: u64 = a.iter().sum();
    // Empty cells add 0, so their logarithm may be any number.
    let logarithm = |n: u64| if n == 0 { 0. } else { (n as f64).ln() };
    let of_columns: Vec<f64> = b.iter().map(|&b| logarithm(b)).collect();
    let of_counts: Vec<f64> = (0..FEW).map(logarithm).collect();
    let of_count = |n: u32| match of_counts.get(n as usize) {
        Some(&logarithm) => logarithm,
        None => f64::from(n).ln(),
    };
    let mut information = 0f64;
    for (row, &a) in table.counts.chunks(table.columns).zip(&a).filter(|(_, a)| **a > 0) {
        // ln a − ln N, once a row.
        let offset = (n as f64).ln() - (a as f64).ln();
        for (&count, &of_column) in row.iter().zip(&of_columns) {
            let share = f64::from(count) / n as f64;
            information += share * (of_count(count) + offset - of_column);
        }
    }
    // For independent sides the sum is a rounding error of either sign.
    if information < 4. * f64::EPSILON { 0. } else { information }
}

/// `H = −Σ (a / N) ln(a / N)`, in nats.
pub fn entropy(sizes: &[u64]) -> f64 {
    let n = sizes.iter().sum::<u64>() as f64;
    let terms =
        sizes.iter().filter(|&&a| a > 0).map(|&a| a as f64 / n * ((a as f64).ln() - n.ln()));
    (-terms.sum::<f64>()).max(0.)
}

/// AMI: mutual information adjusted for chance.
///
/// `(I − E[I]) / (mean(H(clusters), H(classes)) − E[I])`, the expectation over random groupings of
/// the same sizes: Vinh, Epps and Bailey 2010, arithmetic mean. At most 1, about 0 for random
/// groupings; 1 for equal groupings and for no points, 0 if only one side has a single group.
pub fn adjusted_mutual_information(table: &Contingency) -> f64 {
    let (a, b) = sums(table);
    // The quotient is 0 / 0 if all groupings of these sizes have equal scores.
    if is_renumbering(table) {
        return 1.;
    }
    if groups(&a) == 1 || groups(&b) == 1 {
        return 0.;
    }
    let expected = expected_mutual_information(&a, &b);
    let possible = Mean::Arithmetic.of(entropy(&a), entropy(&b));
    (mutual_information(table) - expected) / (possible - expected)
}

/// Tests whether both sides are the same grouping up to renumbering.
fn is_renumbering(table: &Contingency) -> bool {
    let (a, b) = sums(table);
    let cells = table.counts.iter().filter(|&&n| n > 0).count();
    cells == groups(&a) && cells == groups(&b)
}

/// Computes the expected mutual information of two random groupings of these sizes, in nats: Vinh et
/// al. 2010, Eq. 24a.
///
/// The number of points in a cell is hypergeometric. Its probabilities are computed from the most
/// likely value on, in both directions. Pairs of equal sizes are computed once.
pub fn expected_mutual_information(a: &[u64], b: &[u64]) -> f64 {
    let n: u64 = a.iter().sum();
    let logarithms = LogFactorials::new(n as usize);
    let mut expected = 0f64;
    for &(a, times_a) in &distinct(a) {
        for &(b, times_b) in &distinct(b) {
            expected += (times_a * times_b) as f64 * cell_expectation(a, b, n, &logarithms);
        }
    }
    expected
}

/// `E[(x / n) ln(n x / (a b))]` for the hypergeometric `x` with margins `a` and `b`.
fn cell_expectation(a: u64, b: u64, n: u64, logarithms: &LogFactorials) -> f64 {
    let (least, most) = ((a + b).saturating_sub(n).max(1), a.min(b));
    if least > most {
        return 0.;
    }
    let term = |x: u64, p: f64| {
        let information = (x as f64).ln() + (n as f64).ln() - (a as f64).ln() - (b as f64).ln();
        p * (x as f64 / n as f64) * information
    };
    // P(x + 1) / P(x).
    let ratio =
        |x: u64| ((a - x) as f64 * (b - x) as f64) / ((x + 1) as f64 * (n + x + 1 - a - b) as f64);
    let mode = (((a + 1) as f64 * (b + 1) as f64 / (n + 2) as f64) as u64).clamp(least, most);
    let peak = logarithms.hypergeometric(mode, a, b, n).exp();
    let mut sum = term(mode, peak);
    let mut p = peak;
    for x in mode..most {
        p *= ratio(x);
        sum += term(x + 1, p);
        if p < peak * 1e-25 {
            break;
        }
    }
    p = peak;
    for x in (least..mode).rev() {
        p /= ratio(x);
        sum += term(x, p);
        if p < peak * 1e-25 {
            break;
        }
    }
    sum
}

/// `ln i!` for `i` up to `n`.
struct LogFactorials(Vec<f64>);

impl LogFactorials {
    fn new(n: usize) -> Self {
        let mut logarithms = vec![0f64; n + 1];
        // Compensated summation (Kahan).
        let mut carry = 0f64;
        for i in 1..=n {
            let term = (i as f64).ln() - carry;
            logarithms[i] = logarithms[i - 1] + term;
            carry = (logarithms[i] - logarithms[i - 1]) - term;
        }
        Self(logarithms)
    }

    /// `ln P(x)`: `x` of `a` draws without replacement from `n` items are among the `b` marked ones.
    fn hypergeometric(&self, x: u64, a: u64, b: u64, n: u64) -> f64 {
        let f = |i: u64| self.0[i as usize];
        f(a) + f(b) + f(n - a) + f(n - b) - f(n) - f(x) - f(a - x) - f(b - x) - f(n + x - a - b)
    }
}

/// Returns the different sizes above 0, and how often each occurs.
fn distinct(sizes: &[u64]) -> Vec<(u64, usize)> {
    let mut sorted: Vec<u64> = sizes.iter().copied().filter(|&size| size > 0).collect();
    sorted.sort_unstable();
    sorted.chunk_by(|x, y| x == y).map(|equal| (equal[0], equal.len())).collect()
}

/// Precision and recall of one class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassScore {
    /// Share of the points mapped to this class that belong to it; `None` if there are none.
    pub precision: Option<f64>,
    /// Share of the points of this class that are mapped to it; `None` if it has none.
    pub recall: Option<f64>,
}

/// Computes precision and recall of every class under a map from clusters to classes, such as
/// [`Contingency::best_map`].
pub fn class_scores(table: &Contingency, map: &[Option<u32>]) -> Vec<ClassScore> {
    let (clusters, classes) = sums(table);
    let mut right = vec![0u64; table.columns];
    let mut mapped = vec![0u64; table.columns];
    for (row, class) in map.iter().enumerate() {
        if let Some(class) = class.map(|class| class as usize) {
            right[class] += u64::from(table.at(row, class));
            mapped[class] += clusters[row];
        }
    }
    let part = |of: u64, all: u64| (all > 0).then(|| of as f64 / all as f64);
    (0..table.columns)
        .map(|c| ClassScore {
            precision: part(right[c], mapped[c]),
            recall: part(right[c], classes[c]),
        })
        .collect()
}

fn sums(table: &Contingency) -> (Vec<u64>, Vec<u64>) {
    (table.row_sums(), table.column_sums())
}

fn points(table: &Contingency) -> u64 {
    table.row_sums().iter().sum()
}

fn groups(sizes: &[u64]) -> usize {
    sizes.iter().filter(|&&size| size > 0).count()
}

fn share(part: u64, all: u64) -> f64 {
    if all == 0 { 1. } else { part as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use assignment::{adjusted_rand_index, contingency};

    use super::*;

    fn table(clusters: &[u32], classes: &[u32]) -> Contingency {
        let count = |x: &[u32]| x.iter().max().map_or(1, |&m| m as usize + 1);
        contingency(clusters, classes, count(clusters), count(classes)).expect("valid")
    }

    fn near(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-6, "got {got}, want {want}");
    }

    /// ProPos, case 10: NMI by each mean, ARI and ACC.
    #[test]
    fn the_worked_examples_have_their_scores() {
        let t = table(&[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], &[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]);
        near(normalized_mutual_information(&t, Mean::Arithmetic), 0.496_646);
        near(normalized_mutual_information(&t, Mean::Geometric), 0.507_913);
        near(normalized_mutual_information(&t, Mean::Maximum), 0.410_634);
        near(normalized_mutual_information(&t, Mean::Minimum), 0.628_236);
        near(adjusted_rand_index(&t), 0.316_109);

        let t = table(&[1, 1, 0, 0, 0, 0, 2, 2, 2, 1], &[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]);
        near(accuracy(&t), 0.8);
        near(adjusted_rand_index(&t), 0.431_818);
    }

    /// IMC-SwAV, case T16.
    #[test]
    fn scores_of_ten_images_have_the_specified_digits() {
        let t = table(&[1, 1, 2, 2, 2, 2, 0, 0, 0, 1], &[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]);
        assert_eq!(accuracy(&t), 0.8);
        let nmi = normalized_mutual_information(&t, Mean::Arithmetic);
        assert!((nmi - 0.618065646).abs() < 1e-9, "{nmi}");
        let ari = adjusted_rand_index(&t);
        assert!((ari - 0.431818182).abs() < 1e-9, "{ari}");
    }

    /// ProPos, case 10: the best map, neither 5/13 nor 9/13.
    #[test]
    fn accuracy_is_neither_greedy_nor_many_to_one() {
        let t = Contingency { rows: 2, columns: 2, counts: vec![5, 4, 4, 0] };
        near(accuracy(&t), 8. / 13.);
    }

    #[test]
    fn surplus_clusters_and_classes_count_as_errors() {
        let t = Contingency { rows: 3, columns: 2, counts: vec![4, 0, 3, 1, 0, 2] };
        near(accuracy(&t), 0.6);
        let t = Contingency { rows: 1, columns: 3, counts: vec![1, 2, 3] };
        near(accuracy(&t), 0.5);
    }

    #[test]
    fn classes_have_precision_and_recall_under_a_map() {
        let t = Contingency { rows: 3, columns: 3, counts: vec![4, 1, 0, 0, 0, 0, 2, 3, 0] };
        let scores = class_scores(&t, &[Some(0), None, Some(1)]);
        assert_eq!(scores[0], ClassScore { precision: Some(0.8), recall: Some(4. / 6.) });
        assert_eq!(scores[1], ClassScore { precision: Some(0.6), recall: Some(0.75) });
        assert_eq!(scores[2], ClassScore { precision: None, recall: None });
    }

    #[test]
    fn no_point_and_one_group_are_defined() {
        let none = contingency(&[], &[], 2, 3).expect("valid");
        let one = table(&[0, 0], &[0, 0]);
        for t in [none, one] {
            assert_eq!(accuracy(&t), 1.);
            assert_eq!(adjusted_rand_index(&t), 1.);
            assert_eq!(normalized_mutual_information(&t, Mean::Geometric), 1.);
            assert_eq!(adjusted_mutual_information(&t), 1.);
        }
    }

    #[test]
    fn large_counts_lose_nothing() {
        // The same result with and without the table of logarithms.
        let t = Contingency { rows: 2, columns: 2, counts: vec![30_000, 10_000, 0, 40_000] };
        let small = Contingency { counts: vec![3, 1, 0, 4], ..t.clone() };
        assert!((mutual_information(&t) - mutual_information(&small)).abs() < 1e-14);
    }

    #[test]
    fn class_scores_agree_with_scikit_learn() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../tests/classes.json")).expect("JSON");
        for case in fixture["cases"].as_array().expect("cases") {
            let list = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone());
            let scores = |key: &str| serde_json::from_value::<Vec<Option<f64>>>(case[key].clone());
            let (clusters, classes) =
                (list("clusters").expect("u32"), list("classes").expect("u32"));
            let k = case["k"].as_u64().expect("a number") as usize;
            let t = contingency(&clusters, &classes, k, k).expect("valid");
            let found = class_scores(&t, &(0..k as u32).map(Some).collect::<Vec<_>>());
            let (precision, recall) = (scores("precision"), scores("recall"));
            for (c, (precision, recall)) in
                precision.expect("f64").into_iter().zip(recall.expect("f64")).enumerate()
            {
                let ClassScore { precision: p, recall: r } = found[c];
                for (got, want) in [(p, precision), (r, recall)] {
                    assert_eq!(got.is_some(), want.is_some(), "class {c}");
                    let off = got.unwrap_or(0.) - want.unwrap_or(0.);
                    assert!(off.abs() < 1e-12, "class {c}: {got:?} {want:?}");
                }
            }
        }
    }

    #[test]
    fn scores_agree_with_scikit_learn() {
        let fixture: serde_json::Value =
            serde_json::from_str(include_str!("../tests/agreement.json")).expect("JSON");
        let cases = fixture["cases"].as_array().expect("cases");
        assert_eq!(cases.len(), 200);
        for (i, case) in cases.iter().enumerate() {
            let labels = |key: &str| -> Vec<u32> {
                let text = case[key].as_str().expect("labels");
                // One printable character per point, from `0` on.
                text.bytes().map(|byte| u32::from(byte - b'0')).collect()
            };
            let t = table(&labels("clusters"), &labels("classes"));
            for (name, got) in [
                ("acc", accuracy(&t)),
                ("nmi", normalized_mutual_information(&t, Mean::Arithmetic)),
                ("nmi-geometric", normalized_mutual_information(&t, Mean::Geometric)),
                ("nmi-max", normalized_mutual_information(&t, Mean::Maximum)),
                ("nmi-min", normalized_mutual_information(&t, Mean::Minimum)),
                ("ami", adjusted_mutual_information(&t)),
                ("ari", adjusted_rand_index(&t)),
            ] {
                let want = case[name].as_f64().expect("a score");
                assert!((got - want).abs() < 1e-12, "case {i}, {name}: got {got}, want {want}");
            }
        }
    }
}
