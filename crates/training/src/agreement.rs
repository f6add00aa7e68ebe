//! Compares a device with the CPU's kernels: one training step of small networks of every
//! architecture, an embedding, the optimizers and the moving average, on both.
//!
//! It needs no pictures and no compiler, so that a machine reached by copying one file can run it:
//! `assort gpu-check`.

use std::fmt;

use anyhow::Result;
use backbone::{Architecture, Depth, Segment, Stem, resnet};
use candle_core::{DType, Device, Tensor};
use collective::Communicator;
use layers::{Adam, BatchGroups, Gradients, Mode, Modes, Network, Parameters, Sgd};

use crate::Precision;

/// The difference between two results of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Agreement {
    /// Network, precision and result.
    pub what: String,
    /// Norm of the difference, relative to the kernels' result: `‖a − b‖ / ‖b‖`.
    pub off: f64,
    /// The largest allowed difference.
    pub bound: f64,
}

impl Agreement {
    /// Whether the difference is within its bound.
    pub fn holds(&self) -> bool {
        self.off <= self.bound // False for NaN.
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.holds() { "ok" } else { "WRONG" };
        write!(f, "{verdict:5} {:44} off by {:.1e}, bound {:.0e}", self.what, self.off, self.bound)
    }
}

/// Depth, stem and the sides of the pictures: odd ones, and one side short.
const NETWORKS: [(Depth, Stem, usize, usize); 4] = [
    (Depth::Eighteen, Stem::Plain, 11, 7),
    (Depth::Eighteen, Stem::PoolPadded, 13, 18),
    (Depth::ThirtyFour, Stem::Large, 45, 38),
    (Depth::Fifty, Stem::Pool, 36, 30),
];

/// Pictures in the step: not a multiple of the 16 that the kernels group.
const PICTURES: usize = 19;

/// Compares the results of one step on `device`, by candle's tensor operations or by cuDNN, with those
/// of the CPU's kernels.
pub fn compare(device: &Device) -> Result<Vec<Agreement>> {
    let mut found = Vec::new();
    for (depth, stem, height, width) in NETWORKS {
        let architecture = Architecture { depth, width: 8, stem };
        for precision in [Precision::F32, Precision::Bf16] {
            // In bf16 its roundings grow to the size of the gradient: nothing to compare.
            if depth == Depth::Fifty && precision == Precision::Bf16 {
                continue;
            }
            let plan = resnet::plan(&architecture, 3)?.with_precision(precision.into());
            let kernels = Segment::random("backbone", plan, 1)?;
            // On the CPU, `on` would give the kernels themselves.
            let network = match device.is_cpu() {
                true => kernels.network().by_tensor_operations(device),
                false => kernels.network().on(device),
            };
            let other = kernels.with_network(network)?;
            let (want, got) = (step(kernels, height, width)?, step(other, height, width)?);
            let name = format!("ResNet {depth:?}, {stem:?} stem, {precision:?}");
            found.extend(agreements(&name, &bounds(precision), &want, &got));
        }
    }
    Ok(found)
}

/// Compares what ranks share on `device` with what this rank computes alone: sums and gathers of vectors with
/// those in host memory, and a training step in groups with the same on one rank. They have the same bits. All
/// ranks call it.
///
/// # Errors
///
/// A rank has ended, or the GPUs cannot be connected.
pub fn compare_ranks(device: &Device, communicator: &Communicator) -> Result<Vec<Agreement>> {
    let groups = BatchGroups::new(2 * communicator.size(), communicator.clone())?;
    let alone = BatchGroups::new(2 * communicator.size(), Communicator::single())?;
    let plan =
        resnet::plan(&Architecture { depth: Depth::Eighteen, width: 8, stem: Stem::Plain }, 3)?;
    let mut found = Vec::new();
    for precision in [Precision::F32, Precision::Bf16] {
        let segment = Segment::random("backbone", plan.with_precision(precision.into()), 1)?;
        let network = match device.is_cpu() {
            true => segment.network().by_tensor_operations(device),
            false => segment.network().on(device),
        };
        let segment = segment.with_network(network)?;
        let step = |groups| step_in_groups(segment.in_groups(groups)?, groups);
        let (got, want) = (step(&groups)?, step(&alone)?);
        let results = ["output", "gradients", "statistics"].iter().zip(want.iter().zip(&got));
        found.extend(results.map(|(result, (want, got))| Agreement {
            what: format!("step in groups, {precision:?}: {result}"),
            off: distance(want, got),
            bound: 0.,
        }));
    }
    // Summed whole, and in parts of different lengths.
    for len in [500, 100_003, 2_000_003] {
        let own = numbers(communicator.rank() as u64, len);
        let tensor = Tensor::from_slice(&own, len, device)?;
        let mut sum = own.clone();
        communicator.all_reduce_sum(&mut sum)?;
        let gathered = communicator.all_gather(&own)?;
        let rows = groups.all_rows(&tensor.reshape((len, 1))?)?;
        for (kind, want, got) in
            [("sum", sum, groups.sum(tensor)?), ("gather", gathered, rows.flatten_all()?)]
        {
            let (what, off) =
                (format!("{kind} of {len} numbers"), distance(&want, &got.to_vec1()?));
            found.push(Agreement { what, off, bound: 0. });
        }
    }
    Ok(found)
}

/// Output, gradients and statistics of a step whose images the groups share.
fn step_in_groups(mut segment: Segment, groups: &BatchGroups) -> Result<[Vec<f32>; 3]> {
    let network: Network = segment.network().clone();
    let device = network.device();
    let images = 2 * PICTURES;
    let rows = |counter: u64, width: usize| -> Result<Tensor> {
        let noise = crate::noise(1., (images, width), 1, &[counter], &device)?;
        let noise = noise.unwrap_or(Tensor::zeros((images, width), DType::F32, &device)?);
        Ok(groups.own_rows(&noise)?)
    };
    let pictures = rows(0, 11 * 7 * 3)?;
    let pictures = pictures.reshape((pictures.dim(0)?, 11, 7, 3))?;
    let (mut tape, mut gradients) = (network.tape(), network.gradients());
    let modes = Modes::all(&network, Mode::Batch);
    let output = segment.forward(&pictures, &modes, Some(&mut tape))?;
    segment.backward(&mut tape, &rows(1, network.output_width())?, &mut gradients, false)?;
    gradients.reduce()?;
    let output = groups.all_rows(&output)?.flatten_all()?.to_vec1()?;
    Ok([output, gradients.to_vec()?, segment.statistics.to_vec()?])
}

/// Numbers whose sum depends on the order of addition, different on each rank.
fn numbers(rank: u64, len: usize) -> Vec<f32> {
    let scale = [1e-7, 1., 3e4, 0.3][rank as usize % 4];
    let number = |at: u64| ((at * 7919 + rank * 104_729) % 1013) as f32 * scale - 0.1;
    (0..len as u64).map(number).collect()
}

/// The largest allowed difference of each of the [`RESULTS`].
///
/// Deep networks amplify rounding: a changed sign before a ReLU changes all gradients below it. On the
/// CPU, kernels and tensor operations differ by about 1e-6 in f32, by 1e-2 in gradients of ResNet-50;
/// in bf16 by up to 2e-2, in gradients by 4e-1. cuDNN multiplies with 10 bits of mantissa in f32, and
/// with 7 in bf16.
fn bounds(precision: Precision) -> [f64; 7] {
    let [values, gradients, statistics] = match precision {
        Precision::F32 if cfg!(feature = "cudnn") => [3e-2, 3e-1, 1e-2],
        Precision::F32 => [1e-4, 3e-2, 1e-4],
        Precision::Bf16 => [5e-2, 6e-1, 1e-2],
    };
    [values, gradients, statistics, values, gradients, gradients, gradients]
}

/// The results of a step; of updates, the change of each parameter.
const RESULTS: [&str; 7] =
    ["output", "gradients", "statistics", "embedding", "SGD", "Adam", "moving average"];

fn agreements(
    name: &str,
    bounds: &[f64; 7],
    want: &[Vec<f32>; 7],
    got: &[Vec<f32>; 7],
) -> Vec<Agreement> {
    let each = RESULTS.iter().zip(bounds).zip(want.iter().zip(got));
    each.map(|((result, &bound), (want, got))| Agreement {
        what: format!("{name}: {result}"),
        off: distance(want, got),
        bound,
    })
    .collect()
}

fn distance(want: &[f32], got: &[f32]) -> f64 {
    if want.len() != got.len() {
        return f64::INFINITY;
    }
    let square = |x: f64| x * x;
    let size: f64 = want.iter().map(|w| square(f64::from(*w))).sum();
    let off: f64 = want.iter().zip(got).map(|(w, g)| square(f64::from(*w) - f64::from(*g))).sum();
    (off / size.max(1e-24)).sqrt()
}

/// Forward, backward, forward by running statistics, and an update by each rule; the [`RESULTS`].
fn step(mut segment: Segment, height: usize, width: usize) -> Result<[Vec<f32>; 7]> {
    let network: Network = segment.network().clone();
    let device = network.device();
    let noise = |shape: (usize, usize), counter: u64| -> Result<Tensor> {
        let noise = crate::noise(1., shape, 1, &[counter], &device)?;
        Ok(noise.unwrap_or(Tensor::zeros(shape, DType::F32, &device)?))
    };
    let pictures = noise((PICTURES, height * width * 3), 0)?;
    let pictures = pictures.reshape((PICTURES, height, width, 3))?;
    let at_output = noise((PICTURES, network.output_width()), 1)?;

    let (mut tape, mut gradients): (_, Gradients) = (network.tape(), network.gradients());
    let modes = Modes::all(&network, Mode::Batch);
    let output = segment.forward(&pictures, &modes, Some(&mut tape))?;
    segment.backward(&mut tape, &at_output, &mut gradients, false)?;
    let statistics = segment.statistics.to_vec()?;
    let running = Modes::all(&network, Mode::Running);
    let embedding = segment.forward(&pictures, &running, None)?;

    let start = segment.parameters.clone();
    let rule = Sgd { learning_rate: 1e-3, momentum: 0.9, weight_decay: 5e-4 };
    segment.parameters.sgd(&gradients, &mut network.momenta(), rule)?;
    let by_sgd = change(&start, &segment.parameters)?;
    let mut other = start.clone();
    // With ε = 1 the step is not just the sign of the gradient, which rounding can flip.
    let (beta_1, beta_2, weight_decay) = (0.9, 0.999, 5e-4);
    let rule = Adam { learning_rate: 1e-3, beta_1, beta_2, epsilon: 1., weight_decay };
    other.adam(&gradients, &mut network.adam_moments(), rule)?;
    let by_adam = change(&start, &other)?;
    let mut target = start.clone();
    target.follow(&segment.parameters, 0.9)?;
    let followed = change(&start, &target)?;
    let values = |tensor: Tensor| tensor.flatten_all()?.to_vec1();
    let (output, embedding) = (values(output)?, values(embedding)?);
    Ok([output, gradients.to_vec()?, statistics, embedding, by_sgd, by_adam, followed])
}

fn change(from: &Parameters, to: &Parameters) -> Result<Vec<f32>> {
    let (from, to) = (from.to_vec()?, to.to_vec()?);
    Ok(to.iter().zip(&from).map(|(to, from)| to - from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_operations_on_the_cpu_agree_with_its_kernels() -> Result<()> {
        let found = compare(&Device::Cpu)?;
        assert_eq!(found.len(), (4 + 3) * 7);
        for agreement in &found {
            assert!(agreement.holds(), "{agreement}");
        }
        // Two ways to compute: not the same bits.
        assert!(found.iter().any(|agreement| agreement.off > 0.));
        Ok(())
    }

    #[test]
    fn ranks_share_a_step_of_tensor_operations_to_the_bit() -> Result<()> {
        let on_rank = |rank| compare_ranks(&Device::Cpu, &rank);
        let found: Vec<Result<Vec<Agreement>>> = std::thread::scope(|scope| {
            let ranks = Communicator::threads(4).expect("a power of two");
            let threads: Vec<_> =
                ranks.into_iter().map(|rank| scope.spawn(move || on_rank(rank))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        for found in found {
            let found = found?;
            assert_eq!(found.len(), 2 * 3 + 3 * 2);
            for agreement in &found {
                assert!(agreement.holds(), "{agreement}");
            }
        }
        Ok(())
    }

    #[cfg(any(feature = "cuda", feature = "metal"))]
    #[test]
    fn the_best_device_here_agrees_with_the_cpus_kernels() -> Result<()> {
        let device = crate::network_device(stage::DeviceChoice::Auto)?;
        assert!(!device.is_cpu(), "built for a GPU, but there is none");
        for agreement in compare(&device)? {
            assert!(agreement.holds(), "{agreement}");
        }
        Ok(())
    }

    #[test]
    fn a_difference_beyond_its_bound_or_a_nan_is_told() {
        let far = agreements(
            "n",
            &[0.1; 7],
            &[(); 7].map(|()| vec![3., 4.]),
            &[[3., 4.], [3., 3.], [3., f32::NAN], [3.3, 4.4], [3., 4.], [3., 4.], [3., 4.]]
                .map(Vec::from),
        );
        assert!(far[0].holds() && !far[1].holds() && !far[2].holds());
        assert_eq!(distance(&[1., 2.], &[1.]), f64::INFINITY);
        assert!((far[1].off - 0.2).abs() < 1e-12 && (far[3].off - 0.1).abs() < 1e-6);
        assert!(
            far[1].to_string().starts_with("WRONG") && far[0].to_string().contains("n: output")
        );
    }
}
