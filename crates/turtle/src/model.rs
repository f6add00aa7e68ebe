//! Task encoder and inner classifiers: labels, losses and gradients.
//!
//! Gadetsky, Jiang and Brbić 2024 (arXiv:2406.07236). Every space of features has a task encoder
//! `f = softmax(g ⊙ (v/‖v‖) z + b)`; the labels are their mean, `y = mean_s f_s`. A linear classifier in
//! each space, initialised again, learns the labels for some steps of Adam; the encoders are moved so that
//! its cross-entropy falls and their marginals stay even.

use anyhow::{Context, Result};
use frozen::product::{AdamStep, FlatMatrix, HeadFloat, SoftmaxRows, add_rows, dot};
use rayon::prelude::*;

/// A linear layer with `K` outputs: rows of weights, which are `v` in a task encoder, and biases.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearLayer<T> {
    /// `(K, d)`.
    pub weight: Vec<T>,
    /// `(K,)`.
    pub bias: Vec<T>,
}

/// The task encoder of one space.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskEncoder<T> {
    /// `v` and `b`.
    pub layer: LinearLayer<T>,
    /// `g`, `(K,)`: at first the lengths of the rows of `v`.
    pub scale: Vec<T>,
}

impl<T: HeadFloat> TaskEncoder<T> {
    /// An encoder whose map is that of `layer`.
    pub fn new(layer: LinearLayer<T>) -> Self {
        let width = layer.weight.len() / layer.bias.len();
        let scale = layer.weight.chunks_exact(width).map(length).collect();
        Self { layer, scale }
    }

    /// `g v/‖v‖` and `b`: the encoder as one linear layer.
    pub fn effective(&self) -> LinearLayer<T> {
        let width = self.layer.weight.len() / self.scale.len();
        let mut weight = self.layer.weight.clone();
        for (row, &scale) in weight.chunks_exact_mut(width).zip(&self.scale) {
            let factor = scale / length(row);
            row.iter_mut().for_each(|x| *x *= factor);
        }
        LinearLayer { weight, bias: self.layer.bias.clone() }
    }
}

fn length<T: HeadFloat>(row: &[T]) -> T {
    dot(row, row).sqrt().at_least(T::of(1e-12))
}

impl<T: HeadFloat> LinearLayer<T> {
    /// `softmax(W x + b)` of each row, `(N, K)`.
    ///
    /// # Errors
    ///
    /// The rows have another width.
    pub fn softmax(&self, rows: FlatMatrix<T>) -> Result<SoftmaxRows<T>> {
        let clusters = self.bias.len();
        let weight = FlatMatrix::new(&self.weight, self.weight.len() / clusters)?;
        let mut logits = rows.times(weight.transposed())?;
        for row in logits.chunks_exact_mut(clusters) {
            row.iter_mut().zip(&self.bias).for_each(|(x, &b)| *x += b);
        }
        Ok(SoftmaxRows::new(&logits, clusters, T::one()))
    }

    /// [`LinearLayer::softmax`] on all threads.
    ///
    /// # Errors
    ///
    /// The rows have another width.
    pub fn softmax_of_all(&self, rows: FlatMatrix<T>) -> Result<SoftmaxRows<T>> {
        let parts = rows.parts(ROWS).into_par_iter().map(|part| self.softmax(part));
        let mut all = SoftmaxRows::default();
        for part in parts.collect::<Result<Vec<SoftmaxRows<T>>>>()? {
            all.logs.extend(part.logs);
            all.memberships.extend(part.memberships);
        }
        Ok(all)
    }

    /// The gradient of a layer from that of its logits, `(n, K)`.
    fn gradient(by_logits: &[T], clusters: usize, rows: FlatMatrix<T>) -> Result<Self> {
        let weight = FlatMatrix::new(by_logits, clusters)?.transposed().times(rows)?;
        let mut bias = vec![T::zero(); clusters];
        add_rows(&mut bias, by_logits);
        Ok(Self { weight, bias })
    }

    fn add(&mut self, other: &Self) {
        self.weight.iter_mut().zip(&other.weight).for_each(|(x, &y)| *x += y);
        self.bias.iter_mut().zip(&other.bias).for_each(|(x, &y)| *x += y);
    }
}

/// Rows of one task. Sums over rows are those of the parts, added in order, whatever the threads.
const ROWS: usize = 512;

/// The labels `y`, `(N, K)`, and the memberships of each space, `(S, N, K)`.
///
/// # Errors
///
/// A space has another width than its encoder.
pub fn labels<T: HeadFloat>(
    encoders: &[TaskEncoder<T>],
    spaces: &[FlatMatrix<T>],
) -> Result<(Vec<T>, Vec<Vec<T>>)> {
    let mut each = Vec::with_capacity(encoders.len());
    for (encoder, rows) in encoders.iter().zip(spaces) {
        each.push(encoder.effective().softmax_of_all(*rows)?.memberships);
    }
    let share = T::of(1. / each.len() as f64);
    let mut mean = vec![T::zero(); each[0].len()];
    for memberships in &each {
        mean.iter_mut().zip(memberships).for_each(|(mean, &f)| *mean += share * f);
    }
    Ok((mean, each))
}

/// The cross-entropy `−1/N Σ_i Σ_c y_ic log softmax(W x_i)_c` of an inner classifier, and its gradient by
/// weights and biases. The labels are constants.
///
/// # Errors
///
/// The rows have another width.
pub fn inner_loss<T: HeadFloat>(
    classifier: &LinearLayer<T>,
    rows: FlatMatrix<T>,
    labels: &[T],
) -> Result<(T, LinearLayer<T>)> {
    let clusters = classifier.bias.len();
    let share = T::one() / T::of(rows.rows() as f64);
    let of_part = |(rows, labels): (FlatMatrix<T>, &[T])| -> Result<(T, LinearLayer<T>)> {
        let SoftmaxRows { logs, mut memberships } = classifier.softmax(rows)?;
        let loss = -share * dot(&logs, labels);
        memberships.iter_mut().zip(labels).for_each(|(p, &label)| *p = share * (*p - label));
        Ok((loss, LinearLayer::gradient(&memberships, clusters, rows)?))
    };
    let parts = rows.parts(ROWS).into_par_iter().zip(labels.par_chunks(ROWS * clusters));
    let mut parts = parts.map(of_part).collect::<Result<Vec<_>>>()?.into_iter();
    let (mut loss, mut gradient) = parts.next().context("there are no rows")?;
    for (part, of_part) in parts {
        loss += part;
        gradient.add(&of_part);
    }
    Ok((loss, gradient))
}

/// The outer objective `Σ_s CE(W_s z_s, y) − γ Σ_s H(mean_i f_s)` and its gradient by the encoders.
#[derive(Debug, Clone, PartialEq)]
pub struct OuterLoss<T> {
    /// `Σ_s CE`, in nats.
    pub cross_entropy: T,
    /// `Σ_s H`, in nats.
    pub entropy: T,
    /// By `v`, `b` and `g` of each encoder.
    pub gradients: Vec<TaskEncoder<T>>,
}

/// Computes the outer objective.
///
/// The inner classifiers are constants: the gradient reaches an encoder through `y` in the first term,
/// `∂/∂y_ic = −1/N Σ_s log softmax(W_s z_s)_ic`, and through its marginal in the second,
/// `∂(−γH)/∂f_ic = γ (log m_c + 1) / N`.
///
/// # Errors
///
/// A space has another width than its encoder or classifier.
pub fn outer_loss<T: HeadFloat>(
    encoders: &[TaskEncoder<T>],
    classifiers: &[LinearLayer<T>],
    spaces: &[FlatMatrix<T>],
    balance: f64,
) -> Result<OuterLoss<T>> {
    let (labels, each) = labels(encoders, spaces)?;
    let clusters = encoders[0].scale.len();
    let share = T::of(1. / (labels.len() / clusters) as f64);
    let mut by_labels = vec![T::zero(); labels.len()];
    for (classifier, rows) in classifiers.iter().zip(spaces) {
        let logs = classifier.softmax_of_all(*rows)?.logs;
        by_labels.iter_mut().zip(logs).for_each(|(sum, log)| *sum -= share * log);
    }
    let cross_entropy = labels.iter().zip(&by_labels).map(|(&y, &d)| y * d).sum();
    let of_space = T::of(1. / encoders.len() as f64);
    let (mut entropy, mut gradients) = (T::zero(), vec![]);
    for ((encoder, memberships), rows) in encoders.iter().zip(&each).zip(spaces) {
        let marginal: Vec<T> =
            column_sums(memberships, clusters).into_iter().map(|sum| sum * share).collect();
        let logs: Vec<T> =
            marginal.iter().map(|&m| m.at_least(T::min_positive_value()).ln()).collect();
        entropy -= marginal.iter().zip(&logs).map(|(&m, &log)| m * log).sum::<T>();
        let pull: Vec<T> =
            logs.iter().map(|&log| T::of(balance) * share * (log + T::one())).collect();
        let mut by_logits = Vec::with_capacity(labels.len());
        for (f, d) in memberships.chunks_exact(clusters).zip(by_labels.chunks_exact(clusters)) {
            let total = |k: usize| of_space * d[k] + pull[k];
            let mean = (0..clusters).map(|k| f[k] * total(k)).sum::<T>();
            by_logits.extend((0..clusters).map(|k| f[k] * (total(k) - mean)));
        }
        gradients.push(encoder_gradient(encoder, *rows, &by_logits)?);
    }
    Ok(OuterLoss { cross_entropy, entropy, gradients })
}

/// The gradient of `v`, `g` and `b` from that of the logits: with `u = v/‖v‖` and `D_c = Σ_i ∂l_ic z_i`,
/// `∂g_c = D_c · u_c` and `∂v_c = g_c (I − u uᵀ) D_c / ‖v_c‖`.
fn encoder_gradient<T: HeadFloat>(
    encoder: &TaskEncoder<T>,
    rows: FlatMatrix<T>,
    by_logits: &[T],
) -> Result<TaskEncoder<T>> {
    let clusters = encoder.scale.len();
    let width = encoder.layer.weight.len() / clusters;
    let LinearLayer { mut weight, bias } = LinearLayer::gradient(by_logits, clusters, rows)?;
    let mut scale = Vec::with_capacity(clusters);
    let directions = encoder.layer.weight.chunks_exact(width);
    for ((gradient, v), &g) in weight.chunks_exact_mut(width).zip(directions).zip(&encoder.scale) {
        let length = length(v);
        let along = dot(gradient, v) / length;
        gradient.iter_mut().zip(v).for_each(|(d, &v)| *d = g * (*d - along * v / length) / length);
        scale.push(along);
    }
    Ok(TaskEncoder { layer: LinearLayer { weight, bias }, scale })
}

fn column_sums<T: HeadFloat>(values: &[T], columns: usize) -> Vec<T> {
    let mut sums = vec![T::zero(); columns];
    add_rows(&mut sums, values);
    sums
}

/// Adam for one list of parameters, see [`AdamStep`].
#[derive(Debug, Clone, PartialEq)]
pub struct ListAdam<T> {
    first: Vec<T>,
    second: Vec<T>,
    steps: usize,
}

impl<T: HeadFloat> ListAdam<T> {
    /// Before the first step of `count` parameters.
    pub fn new(count: usize) -> Self {
        Self { first: vec![T::zero(); count], second: vec![T::zero(); count], steps: 0 }
    }

    /// After `steps` steps, with the moments that they left.
    pub fn resumed(first: Vec<T>, second: Vec<T>, steps: usize) -> Self {
        Self { first, second, steps }
    }

    /// The moments of the gradient and of its square.
    pub fn moments(&self) -> (&[T], &[T]) {
        (&self.first, &self.second)
    }

    /// Moves the parameters along their gradients.
    pub fn step<'a>(
        &mut self,
        learning_rate: f64,
        parameters: impl Iterator<Item = &'a mut T>,
        gradients: impl Iterator<Item = &'a T>,
    ) where
        T: 'a,
    {
        self.steps += 1;
        let adam = AdamStep::new(learning_rate, 0., self.steps as u64);
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((x, &d), (first, second)) in parameters.zip(gradients).zip(moments) {
            adam.apply(x, d, first, second);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(weight: &[f64], bias: [f64; 2]) -> TaskEncoder<f64> {
        TaskEncoder::new(LinearLayer { weight: weight.to_vec(), bias: bias.to_vec() })
    }

    fn encoders() -> Vec<TaskEncoder<f64>> {
        vec![
            encoder(&[1., 0.5, -0.5, 1.], [0.1, -0.1]),
            encoder(&[0.4, 0.2, -0.6, -0.3, 0.1, 0.5], [0., 0.05]),
        ]
    }

    fn spaces() -> Vec<FlatMatrix<'static, f64>> {
        static FIRST: [f64; 8] = [1., 0., 0.8, 0.6, 0., 1., -0.6, 0.8];
        static SECOND: [f64; 12] = [0.5, 0.5, 0., 1., 0., 0., 0., 0., 1., 0., -0.5, 0.5];
        vec![
            FlatMatrix::new(&FIRST, 2).expect("four rows"),
            FlatMatrix::new(&SECOND, 3).expect("four rows"),
        ]
    }

    fn classifiers() -> Vec<LinearLayer<f64>> {
        vec![
            LinearLayer { weight: vec![0.2, -0.1, 0., 0.3], bias: vec![0., 0.] },
            LinearLayer { weight: vec![0.1, 0., 0.2, -0.2, 0.3, 0.], bias: vec![0.1, -0.1] },
        ]
    }

    #[track_caller]
    fn assert_near(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (got_one, want_one) in got.iter().zip(want) {
            assert!((got_one - want_one).abs() < 2e-9, "got {got:?}, want {want:?}");
        }
    }

    /// Heads on frozen embeddings, case T7.
    #[test]
    fn labels_inner_and_outer_steps_have_the_specified_values() -> Result<()> {
        let (encoders, spaces, mut classifiers) = (encoders(), spaces(), classifiers());
        let (y, _) = labels(&encoders, &spaces)?;
        let want = [
            0.716076157,
            0.283923843,
            0.703635284,
            0.296364716,
            0.333023283,
            0.666976717,
            0.296364716,
            0.703635284,
        ];
        assert_near(&y, &want);

        let mut adam = [ListAdam::new(6), ListAdam::new(8)];
        for step in 0..2 {
            let mut loss = 0.;
            for ((classifier, rows), adam) in classifiers.iter_mut().zip(&spaces).zip(&mut adam) {
                let (part, gradient) = inner_loss(classifier, *rows, &y)?;
                loss += part;
                if step == 0 && gradient.weight.len() == 4 {
                    let want = [-0.100591903, 0.002603821, 0.100591903, -0.002603821];
                    assert_near(&gradient.weight, &want);
                    assert_near(&gradient.bias, &[-0.056550368, 0.056550368]);
                }
                let LinearLayer { weight, bias } = classifier;
                let gradients = gradient.weight.iter().chain(&gradient.bias);
                adam.step(0.1, weight.iter_mut().chain(bias), gradients);
            }
            if step == 0 {
                assert_near(&[loss], &[1.376453666]);
            }
        }
        let want = [0.396055952, -0.291777061, -0.196055952, 0.491777061];
        assert_near(&classifiers[0].weight, &want);
        let want = [0.299999951, 0.198770152, 0.003249375, -0.399999951, 0.101229848, 0.196750625];
        assert_near(&classifiers[1].weight, &want);
        assert!((classifiers[1].bias[0].abs() - 0.090161958).abs() < 2e-9);

        let found = outer_loss(&encoders, &classifiers, &spaces, 10.)?;
        assert_near(&[found.cross_entropy, found.entropy], &[1.263005952, 1.373338468]);
        let [first, second] = &found.gradients[..] else { panic!("two spaces") };
        let want = [-0.136583923, 0.273167846, -0.201815159, -0.100907579];
        assert_near(&first.layer.weight, &want);
        assert_near(&first.scale, &[0.225636207, -0.305410936]);
        assert_near(&first.layer.bias, &[0.516270966, -0.516270966]);
        let want =
            [-0.174967146, -0.025490445, -0.125141579, 0.188460648, 0.036556256, 0.105765138];
        assert_near(&second.layer.weight, &want);
        Ok(())
    }

    #[test]
    fn outer_gradients_match_central_differences_with_constant_classifiers() -> Result<()> {
        let (encoders, spaces, classifiers) = (encoders(), spaces(), classifiers());
        let value = |encoders: &[TaskEncoder<f64>]| -> Result<f64> {
            let found = outer_loss(encoders, &classifiers, &spaces, 3.)?;
            Ok(found.cross_entropy - 3. * found.entropy)
        };
        type Part = fn(&mut TaskEncoder<f64>) -> &mut Vec<f64>;
        let parts: [Part; 3] = [|e| &mut e.layer.weight, |e| &mut e.layer.bias, |e| &mut e.scale];
        let mut found = outer_loss(&encoders, &classifiers, &spaces, 3.)?;
        for space in 0..2 {
            for part in parts {
                for i in 0..part(&mut encoders[space].clone()).len() {
                    let (mut up, mut down) = (encoders.clone(), encoders.clone());
                    part(&mut up[space])[i] += 1e-6;
                    part(&mut down[space])[i] -= 1e-6;
                    let want = (value(&up)? - value(&down)?) / 2e-6;
                    let got = part(&mut found.gradients[space])[i];
                    assert!((got - want).abs() < 1e-8, "space {space}, {i}: {got}, {want}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn inner_gradients_match_central_differences_with_constant_labels() -> Result<()> {
        let (spaces, classifiers) = (spaces(), classifiers());
        let (y, _) = labels(&encoders(), &spaces)?;
        let (_, gradient) = inner_loss(&classifiers[1], spaces[1], &y)?;
        for i in 0..6 {
            let (mut up, mut down) = (classifiers[1].clone(), classifiers[1].clone());
            up.weight[i] += 1e-6;
            down.weight[i] -= 1e-6;
            let up = inner_loss(&up, spaces[1], &y)?.0;
            let want = (up - inner_loss(&down, spaces[1], &y)?.0) / 2e-6;
            assert!((gradient.weight[i] - want).abs() < 1e-8, "{i}: {want}");
        }
        Ok(())
    }
}
