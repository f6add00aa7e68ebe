//! In-place updates of flat parameters: optimizers and the moving average.
//!
//! All work element by element, so neither threads nor chunks can change a bit.

use rayon::prelude::*;

/// Numbers per task.
const CHUNK: usize = 1 << 16;

/// Calls `update` chunk by chunk, on several threads if there is more than one chunk.
fn chunks<const M: usize, const R: usize>(
    written: [&mut [f32]; M],
    read: [&[f32]; R],
    update: impl Fn([&mut [f32]; M], [&[f32]; R]) + Sync + Send,
) {
    let len = written.first().map_or(0, |slice| slice.len());
    assert!(written.iter().all(|s| s.len() == len) && read.iter().all(|s| s.len() == len));
    let mut written = written.map(|slice| slice.chunks_mut(CHUNK));
    let mut read = read.map(|slice| slice.chunks(CHUNK));
    let tasks: Vec<_> = (0..len.div_ceil(CHUNK))
        .map(|_| {
            let written = written.each_mut().map(|s| s.next().expect("equal lengths"));
            let read = read.each_mut().map(|s| s.next().expect("equal lengths"));
            (written, read)
        })
        .collect();
    if tasks.len() > 1 {
        tasks.into_par_iter().for_each(|(written, read)| update(written, read));
    } else {
        tasks.into_iter().for_each(|(written, read)| update(written, read));
    }
}

/// One step of stochastic gradient descent with momentum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Step length `lr`.
    pub learning_rate: f64,
    /// Weight `μ` of the last step's direction, 0 to 1.
    pub momentum: f64,
    /// Factor `λ`; `λ` times the weight is added to its gradient.
    pub weight_decay: f64,
}

/// `b ← μ·b + (g + λ·p)`, then `p ← p − lr·b`, without Nesterov or dampening. In the first step
/// `b = g + λ·p`, since momenta start at 0.
///
/// # Panics
///
/// If the lengths differ.
pub fn sgd(values: &mut [f32], gradients: &[f32], momenta: &mut [f32], with: Sgd) {
    let (rate, momentum) = (with.learning_rate as f32, with.momentum as f32);
    let decay = with.weight_decay as f32;
    chunks([values, momenta], [gradients], |[values, momenta], [gradients]| {
        for ((value, momentum_of), gradient) in values.iter_mut().zip(momenta).zip(gradients) {
            *momentum_of = momentum * *momentum_of + (gradient + decay * *value);
            *value -= rate * *momentum_of;
        }
    });
}

/// One step of Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Step length `α`.
    pub learning_rate: f64,
    /// Decay `β₁` of the mean of gradients.
    pub beta_1: f64,
    /// Decay `β₂` of the mean of squared gradients.
    pub beta_2: f64,
    /// `ε`, added to the square root.
    pub epsilon: f64,
    /// This factor times the weight is added to its gradient, before the means.
    pub weight_decay: f64,
}

/// `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`,
/// `p ← p − α · (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)`; `step` is `t`, from 1.
///
/// # Panics
///
/// If the lengths differ.
pub fn adam(
    values: &mut [f32],
    gradients: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    step: u64,
    with: Adam,
) {
    let power = |beta: f64| beta.powf(step as f64);
    let rate = (with.learning_rate / (1. - power(with.beta_1))) as f32;
    let root = (1. / (1. - power(with.beta_2))).sqrt() as f32;
    let (beta_1, beta_2) = (with.beta_1 as f32, with.beta_2 as f32);
    let (complement_1, complement_2) = ((1. - with.beta_1) as f32, (1. - with.beta_2) as f32);
    let (epsilon, decay) = (with.epsilon as f32, with.weight_decay as f32);
    chunks([values, first, second], [gradients], |[values, first, second], [gradients]| {
        let means = first.iter_mut().zip(second);
        for ((value, (first, second)), gradient) in values.iter_mut().zip(means).zip(gradients) {
            let gradient = gradient + decay * *value;
            *first = beta_1 * *first + complement_1 * gradient;
            *second = beta_2 * *second + complement_2 * gradient * gradient;
            *value -= rate * *first / (second.sqrt() * root + epsilon);
        }
    });
}

/// `t ← t + (1 − τ)·(o − t)`, the moving average `τ·t + (1 − τ)·o`. Where `o = t`, no bit of `t`
/// changes.
///
/// # Panics
///
/// If the lengths differ.
pub fn follow(target: &mut [f32], online: &[f32], decay: f64) {
    let share = (1. - decay) as f32;
    chunks([target], [online], |[target], [online]| {
        for (target, online) in target.iter_mut().zip(online) {
            *target += share * (online - *target);
        }
    });
}

/// `total ← total + values`.
///
/// # Panics
///
/// If the lengths differ.
pub fn add(total: &mut [f32], values: &[f32]) {
    chunks([total], [values], |[total], [values]| {
        for (total, value) in total.iter_mut().zip(values) {
            *total += value;
        }
    });
}

/// The index of the first NaN or infinity.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    // A whole chunk is looked at without a branch, in vector instructions.
    let is_finite = |chunk: &[f32]| chunk.iter().fold(true, |all, value| all & value.is_finite());
    let chunk = values.chunks(CHUNK).position(|chunk| !is_finite(chunk))?;
    let at = values[chunk * CHUNK..].iter().position(|value| !value.is_finite())?;
    Some(chunk * CHUNK + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_everything_once() {
        let len = 3 * CHUNK + 17;
        let mut total: Vec<f32> = (0..len).map(|at| at as f32).collect();
        let values = vec![0.5; len];
        add(&mut total, &values);
        assert!(total.iter().enumerate().all(|(at, total)| *total == at as f32 + 0.5));
        assert_eq!(first_non_finite(&total), None);
        total[CHUNK + 3] = f32::INFINITY;
        assert_eq!(first_non_finite(&total), Some(CHUNK + 3));
    }

    #[test]
    fn a_target_that_equals_the_online_stays() {
        let online: Vec<f32> = (1..100).map(|at| 1. / at as f32).collect();
        let mut target = online.clone();
        follow(&mut target, &online, 0.996);
        assert_eq!(target, online);
    }
}
