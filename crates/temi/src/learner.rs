//! A head that learns: one step of all heads side by side.

use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use collective::Communicator;
use frozen::product::{AdamStep, FlatMatrix, HeadFloat, SoftmaxRows};
use rayon::prelude::*;

use crate::loss::{
    Objective, follow_marginal, head_loss, memberships, pair_agreement, pair_weights,
};
use crate::network::{HeadPass, HeadShape};

/// One head in training.
#[derive(Debug, Clone, PartialEq)]
pub struct LearningHead<T> {
    /// Parameters that the gradient moves, see [`HeadShape::places`].
    pub online: Vec<T>,
    /// Their moving average, whose memberships are the result.
    pub target: Vec<T>,
    /// Adam's moments, of the gradient and of its square.
    pub first_moments: Vec<T>,
    /// See [`LearningHead::first_moments`].
    pub second_moments: Vec<T>,
    /// Running marginal `m` of the target's memberships, `(K,)`.
    pub marginal: Vec<T>,
}

impl<T: HeadFloat> LearningHead<T> {
    /// A head before its first step; the target starts as a copy.
    pub fn new(shape: &HeadShape, online: Vec<T>) -> Self {
        let zeros = vec![T::zero(); online.len()];
        let even = T::of(1. / shape.clusters as f64);
        Self {
            target: online.clone(),
            online,
            first_moments: zeros.clone(),
            second_moments: zeros,
            marginal: vec![even; shape.clusters],
        }
    }
}

/// The values of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadUpdate {
    /// The objective.
    pub objective: Objective,
    /// Share of the marginal that a step keeps.
    pub marginal_decay: f64,
    /// Learning rate of AdamW.
    pub learning_rate: f64,
    /// Decoupled weight decay, of everything but biases.
    pub weight_decay: f64,
    /// Share of the target that a step keeps.
    pub target_decay: f64,
    /// The step, from 1.
    pub step: u64,
    /// First steps, in which directions and their scales are frozen: their gradients are dropped, and
    /// neither moments nor decay act on them.
    pub still_steps: u64,
}

/// One step of all heads on `B` pairs. Returns the loss of each head of all ranks before the step.
///
/// Heads interact through the weights of the pairs alone, so each rank takes some heads, each thread one at a
/// time, and the ranks exchange what their heads contribute to the weights. Sums have a fixed order, so
/// that the bits depend neither on the number of threads nor on that of ranks.
///
/// - `heads`: those of this rank.
/// - `rows`: the first sides of the pairs, then the second ones, `(2B, D)`.
///
/// # Errors
///
/// The rows have another width than the heads, or a rank has ended.
pub fn step<T: HeadFloat>(
    heads: &mut [LearningHead<T>],
    shape: &HeadShape,
    rows: FlatMatrix<T>,
    update: &HeadUpdate,
    ranks: &Communicator,
) -> Result<Vec<f64>> {
    let (clusters, temperature) = (shape.clusters, update.objective.temperature);
    let passes = PassPool(Mutex::new(vec![]));
    let target_of = |head: &mut LearningHead<T>| -> Result<SoftmaxRows<T>> {
        let found = passes.with(|pass| {
            pass.forward(shape, &head.target, rows)?;
            anyhow::Ok(memberships(&pass.logits, clusters, temperature))
        })?;
        follow_marginal(&mut head.marginal, &found, update.marginal_decay);
        Ok(found)
    };
    let targets = heads.par_iter_mut().map(target_of).collect::<Result<Vec<SoftmaxRows<T>>>>()?;
    let own: Vec<T> = targets.iter().flat_map(|target| pair_agreement(target, clusters)).collect();
    let agreements = ranks.all_gather(&own)?;
    let pairs = rows.rows() / 2;
    let (weights, count) = (pair_weights(&agreements, pairs), agreements.len() / pairs);
    let move_one = |(head, target): (&mut LearningHead<T>, &SoftmaxRows<T>)| -> Result<f64> {
        passes.with(|pass| {
            pass.forward(shape, &head.online, rows)?;
            let online = memberships(&pass.logits, clusters, temperature);
            let (loss, gradient) =
                head_loss(&online, target, &weights, &head.marginal, &update.objective, count);
            pass.backward(shape, &head.online, rows, gradient)?;
            descend(head, shape, &pass.gradient, update);
            Ok(loss.wide())
        })
    };
    let losses = heads.par_iter_mut().zip(&targets).map(move_one).collect::<Result<Vec<f64>>>()?;
    Ok(ranks.all_gather(&losses)?)
}

/// Memory of passes, one for each thread at work.
struct PassPool<T>(Mutex<Vec<HeadPass<T>>>);

impl<T: HeadFloat> PassPool<T> {
    fn with<R>(&self, work: impl FnOnce(&mut HeadPass<T>) -> R) -> R {
        let free = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = free().pop();
        let mut pass = taken.unwrap_or_default();
        let result = work(&mut pass);
        free().push(pass);
        result
    }
}

/// AdamW, and the moving average. Steps of directions and scales count from their first one.
fn descend<T: HeadFloat>(
    head: &mut LearningHead<T>,
    shape: &HeadShape,
    gradient: &[T],
    update: &HeadUpdate,
) {
    let places = shape.places();
    let decay = update.weight_decay;
    let late = update.step.saturating_sub(update.still_steps);
    for (place, decay, step) in [
        (places.hidden_weight, decay, update.step),
        (places.hidden_bias, 0., update.step),
        (places.bottleneck_weight, decay, update.step),
        (places.bottleneck_bias, 0., update.step),
        (places.directions, decay, late),
        (places.scales, decay, late),
    ] {
        if step > 0 {
            AdamStep::new(update.learning_rate, decay, step).apply_all(
                &mut head.online[place.clone()],
                &gradient[place.clone()],
                &mut head.first_moments[place.clone()],
                &mut head.second_moments[place],
            );
        }
    }
    let kept = T::of(update.target_decay);
    for (target, &x) in head.target.iter_mut().zip(&head.online) {
        *target = kept * *target + (T::one() - kept) * x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::tests::{OBJECTIVE, assert_near};

    /// The head of T6.
    const TINY: HeadShape = HeadShape { width: 3, hidden: 2, bottleneck: 2, clusters: 3 };
    const START: [f64; 23] = [
        0.5, -0.3, 0.2, 0.1, 0.4, -0.2, 0.1, -0.1, 0.6, -0.2, 0.3, 0.7, 0., 0.05, 1., 0., 0., 2.,
        -1., -1., 1., 1., 1.,
    ];
    const ROWS: [f64; 12] = [1., 0., 0.5, 0.2, -1., 0.3, 0.9, 0.1, 0.4, 0., -0.8, 0.5];

    const UPDATE: HeadUpdate = HeadUpdate {
        objective: OBJECTIVE,
        marginal_decay: 0.9,
        learning_rate: 0.01,
        weight_decay: 0.01,
        target_decay: 0.996,
        step: 1,
        still_steps: 0,
    };

    fn rows() -> FlatMatrix<'static, f64> {
        FlatMatrix::new(&ROWS, 3).expect("four rows")
    }

    fn heads(count: usize) -> Vec<LearningHead<f64>> {
        vec![LearningHead::new(&TINY, START.to_vec()); count]
    }

    fn step(
        heads: &mut [LearningHead<f64>],
        rows: FlatMatrix<f64>,
        update: &HeadUpdate,
    ) -> Result<Vec<f64>> {
        super::step(heads, &TINY, rows, update, &Communicator::single())
    }

    fn steps(heads: &mut [LearningHead<f64>], count: u64, update: HeadUpdate) -> Result<Vec<f64>> {
        let mut losses = vec![];
        for taken in 1..=count {
            losses = step(heads, rows(), &HeadUpdate { step: taken, ..update })?;
        }
        Ok(losses)
    }

    /// Heads on frozen embeddings, case T6.
    #[test]
    fn two_steps_have_the_specified_values() -> Result<()> {
        let places = TINY.places();
        let mut pass = HeadPass::default();
        pass.forward(&TINY, &START, rows())?;
        let want = [
            0.879812092,
            0.475321662,
            -0.958224267,
            0.977653758,
            0.210221620,
            -0.839954735,
            0.851519400,
            0.524323099,
            -0.972867560,
            0.990645085,
            0.136463607,
            -0.796986199,
        ];
        assert_near(&pass.logits, &want, 1e-9);

        let mut heads = heads(1);
        let losses = step(&mut heads, rows(), &UPDATE)?;
        assert_near(&losses, &[-0.887284852], 1e-9);
        assert_near(&heads[0].marginal, &[0.398639620, 0.301360379, 0.300000001], 1e-9);
        // Adam's first moment is a tenth of the gradient.
        let gradient: Vec<f64> = heads[0].first_moments.iter().map(|m| 10. * m).collect();
        let want =
            [-0.006332914, -0.001206733, -0.002658557, 0.038771192, 0.003859333, 0.017405545];
        assert_near(&gradient[places.hidden_weight.clone()], &want, 1e-9);
        assert_near(&gradient[places.bottleneck_bias.clone()], &[-0.070252089, 0.116985685], 1e-9);
        let want = [0., -0.016078638, 0.013389400, 0., 1.6e-8, -1.6e-8];
        assert_near(&gradient[places.directions.clone()], &want, 1e-9);
        let want = [-0.026778868, 0.016078616, -6.4e-8];
        assert_near(&gradient[places.scales.clone()], &want, 1e-9);
        let weight = places.bottleneck_weight;
        let want = [0.609939997, -0.209979945, 0.289970002, 0.709929970];
        assert_near(&heads[0].online[weight.clone()], &want, 1e-9);
        let directions = &heads[0].online[places.directions];
        assert_near(&directions[..4], &[0.9999, 0.009999994, -0.009999993, 1.9998], 1e-8);
        // The signs of gradients of 1e-8 decide these.
        assert_near(&directions[4..], &[-1.006107066, -0.993692934], 1e-2);
        let scales = &heads[0].online[places.scales];
        assert_near(&scales[..2], &[1.009899996, 0.989900006], 1e-8);
        assert_near(&scales[2..], &[1.008551400], 1e-2);
        let want = [0.600039760, -0.200039920, 0.299959880, 0.700039720];
        assert_near(&heads[0].target[weight.clone()], &want, 1e-9);

        let losses = step(&mut heads, rows(), &HeadUpdate { step: 2, ..UPDATE })?;
        // The third direction differs by up to 1e-2 from here on.
        assert_near(&losses, &[-0.756050525], 1e-6);
        assert_near(&heads[0].marginal, &[0.457422845, 0.272577153, 0.270000002], 1e-6);
        let want = [0.615385486, -0.214607937, 0.284843201, 0.714270129];
        assert_near(&heads[0].online[weight.clone()], &want, 1e-6);
        let want = [0.600101143, -0.200098192, 0.299899413, 0.700096642];
        assert_near(&heads[0].target[weight], &want, 1e-6);
        Ok(())
    }

    /// Heads on frozen embeddings, case T10. The mean over two heads halves their gradients, which Adam undoes up to its ε.
    #[test]
    fn equal_heads_stay_equal_and_equal_to_a_single_one() -> Result<()> {
        let (mut one, mut two) = (heads(1), heads(2));
        let single = steps(&mut one, 5, UPDATE)?;
        let double = steps(&mut two, 5, UPDATE)?;
        assert_eq!(two[0], two[1]);
        assert_near(&double, &[single[0]; 2], 1e-4);
        // What the tiny gradients of the third direction move is left out.
        let sure = ..TINY.places().directions.start;
        assert_near(&two[0].online[sure], &one[0].online[sure], 1e-4);
        Ok(())
    }

    /// Heads on frozen embeddings, case T11.
    #[test]
    fn permuted_heads_and_rows_give_permuted_results() -> Result<()> {
        let different = || -> Vec<LearningHead<f64>> {
            let head = |number| {
                let values = TINY.random(0.5, 1, number).into_iter().map(f64::from).collect();
                LearningHead::new(&TINY, values)
            };
            (0..3).map(head).collect()
        };
        let (mut heads, mut turned) = (different(), different());
        turned.rotate_left(1);
        let losses = steps(&mut heads, 3, UPDATE)?;
        let mut other = steps(&mut turned, 3, UPDATE)?;
        other.rotate_right(1);
        assert_near(&other, &losses, 1e-12);

        let mut swapped = different();
        let order = [3..6, 0..3, 9..12, 6..9].map(|row| &ROWS[row]).concat();
        let swapped_rows = FlatMatrix::new(&order, 3)?;
        let first = step(&mut swapped, swapped_rows, &UPDATE)?;
        let want = step(&mut different(), rows(), &UPDATE)?;
        assert_near(&first, &want, 1e-12);
        Ok(())
    }

    /// Heads on frozen embeddings, case T11, for clusters: a head whose directions are permuted learns the same, permuted.
    #[test]
    fn permuted_directions_give_permuted_clusters() -> Result<()> {
        let turn = |values: &[f64]| -> Vec<f64> {
            let (directions, scales) = (&values[14..20], &values[20..]);
            [&values[..14], &directions[4..], &directions[..4], &scales[2..], &scales[..2]].concat()
        };
        let values: Vec<f64> = TINY.random(0.5, 1, 0).into_iter().map(f64::from).collect();
        let mut head = [LearningHead::new(&TINY, values.clone())];
        let mut turned = [LearningHead::new(&TINY, turn(&values))];
        let losses = steps(&mut head, 4, UPDATE)?;
        assert_near(&steps(&mut turned, 4, UPDATE)?, &losses, 1e-9);
        assert_near(&turned[0].target, &turn(&head[0].target), 1e-7);
        Ok(())
    }

    /// Heads on frozen embeddings, case T13.
    #[test]
    fn directions_are_still_at_first() -> Result<()> {
        let places = TINY.places();
        let mut heads = heads(1);
        steps(&mut heads, 3, HeadUpdate { still_steps: 3, ..UPDATE })?;
        let still = places.directions.start..places.scales.end;
        assert_eq!(heads[0].online[still.clone()], START[still.clone()]);
        assert!(heads[0].first_moments[still.clone()].iter().all(|&m| m == 0.));
        assert!(heads[0].second_moments[still.clone()].iter().all(|&m| m == 0.));
        assert_ne!(heads[0].online[places.hidden_weight.clone()], START[places.hidden_weight]);
        let last = HeadUpdate { still_steps: 3, step: 4, ..UPDATE };
        step(&mut heads, rows(), &last)?;
        // The first step of Adam moves by the learning rate, whatever the gradient.
        let moved = heads[0].online[places.scales.start] - 1.;
        assert!((moved.abs() - 0.01).abs() < 2e-4, "{moved}");
        Ok(())
    }

    /// Where online and target head are the same, the gradient is that by the online head alone.
    #[test]
    fn no_gradient_passes_through_the_target() -> Result<()> {
        let loss = |online: &[f64], target: &[f64]| -> Result<f64> {
            let mut head = LearningHead::new(&TINY, online.to_vec());
            head.target = target.to_vec();
            Ok(step(&mut [head], rows(), &UPDATE)?[0])
        };
        let mut heads = heads(1);
        step(&mut heads, rows(), &UPDATE)?;
        let mut apart = 0f64;
        for i in 0..14 {
            let (mut up, mut down) = (START, START);
            up[i] += 1e-6;
            down[i] -= 1e-6;
            let online = (loss(&up, &START)? - loss(&down, &START)?) / 2e-6;
            let both = (loss(&up, &up)? - loss(&down, &down)?) / 2e-6;
            let got = 10. * heads[0].first_moments[i];
            assert!((got - online).abs() < 1e-7, "{i}: {got}, want {online}");
            apart = apart.max((both - online).abs());
        }
        assert!(apart > 1e-3, "a gradient through the target would not be seen: {apart}");
        Ok(())
    }
}
