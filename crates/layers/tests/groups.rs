//! Training in groups of a batch: the same bits on any number of ranks.

use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor};
use collective::Communicator;
use layers::{
    BatchGroups, BatchNorm, Builder, Convolution, Gradients, Mode, Modes, Network, Pool, Precision,
    Sgd,
};

/// All operations: convolutions with one in Winograd's form, norms with and without a residual, both
/// pools, a ReLU and a linear layer.
fn network(precision: Precision) -> Result<Network> {
    let mut b = Builder::images(3);
    let c = Convolution { out_channels: 18, kernel: 3, stride: 1, padding: 1 };
    let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
    b.block("stem");
    let x = b.input();
    let z = b.convolution("conv1", x, c)?;
    let y = b.batch_norm("bn1", z, norm)?;
    let z = b.convolution("conv2", y, c)?;
    let y = b.batch_norm("bn2", z, BatchNorm { residual: Some(y), ..norm })?;
    let y = b.max_pool(y, Pool { kernel: 3, stride: 2, padding: 1 })?;
    b.block("head");
    let y = b.global_average_pool(y)?;
    let y = b.linear("hidden", y, 5)?;
    let y = b.relu(y)?;
    let y = b.linear("output", y, 4)?;
    let y = b.batch_norm("bn3", y, BatchNorm { relu: false, ..norm })?;
    Ok(b.finish(y)?.with_precision(precision))
}

/// Numbers in [−1, 1), different in every place.
fn numbers(seed: usize, shape: &[usize]) -> Result<Tensor> {
    let number = |at: usize| ((at * 7919 + seed * 104_729 + at * at) % 2017) as f32 / 1008.5 - 1.;
    let numbers: Vec<f32> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu)
}

/// Everything that a step computes, of two passes of different batches and one by running statistics.
#[derive(Debug, PartialEq)]
struct Step {
    outputs: Vec<Vec<f32>>,
    of_input: Vec<f32>,
    gradients: Vec<f32>,
    parameters: Vec<f32>,
    statistics: Vec<f32>,
}

/// Two passes and a step of one rank.
///
/// - `expected`: backward passes that are announced.
fn step(
    network: &Network,
    groups: &BatchGroups,
    frozen: bool,
    expected: Option<usize>,
) -> Result<Step> {
    let network = network.in_groups(groups)?;
    let (mut parameters, mut gradients) = (network.parameters(), network.gradients());
    let (mut statistics, mut momenta) = (network.statistics(), network.momenta());
    for (seed, entry) in network.parameters().entries().iter().enumerate() {
        let values = numbers(seed, &[entry.range.len()])?.to_vec1::<f32>()?;
        parameters.set(&entry.name, &values)?;
    }
    let mut modes = Modes::all(&network, Mode::Batch);
    if frozen {
        parameters.set_trainable("stem", false)?;
        modes.set("stem", Mode::Running)?;
    }
    if let Some(passes) = expected {
        gradients.expect_passes(passes)?;
    }
    let (mut outputs, mut of_input) = (Vec::new(), Vec::new());
    for (pass, images) in [11, 8].into_iter().enumerate() {
        let input = groups.own_rows(&numbers(20 + pass, &[images, 7, 9, 3])?)?;
        let mut tape = network.tape();
        let output =
            network.forward(&parameters, &mut statistics, &input, &modes, Some(&mut tape))?;
        outputs.push(groups.all_rows(&output)?.flatten_all()?.to_vec1()?);
        let gradient = groups.own_rows(&numbers(30 + pass, &[images, 4])?)?;
        let found = network.backward(&parameters, &mut tape, &gradient, &mut gradients, true)?;
        let found = found.expect("asked for");
        let found = found.reshape((found.dim(0)?, 7 * 9 * 3))?;
        of_input.extend(groups.all_rows(&found)?.flatten_all()?.to_vec1::<f32>()?);
    }
    let running = Modes::all(&network, Mode::Running);
    let input = groups.own_rows(&numbers(40, &[13, 7, 9, 3])?)?;
    let output = network.forward(&parameters, &mut statistics, &input, &running, None)?;
    outputs.push(groups.all_rows(&output)?.flatten_all()?.to_vec1()?);
    gradients.reduce()?;
    let sgd = Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 5e-4 };
    parameters.sgd(&gradients, &mut momenta, sgd)?;
    let (gradients, parameters) = (gradients.to_vec()?, parameters.to_vec()?);
    Ok(Step { outputs, of_input, gradients, parameters, statistics: statistics.to_vec()? })
}

/// The step on so many ranks.
fn steps(
    network: &Network,
    groups: usize,
    ranks: usize,
    frozen: bool,
    expected: Option<usize>,
) -> Vec<Step> {
    let ranks = Communicator::threads(ranks).expect("a power of two");
    on_ranks(ranks, |rank| step(network, &BatchGroups::new(groups, rank)?, frozen, expected))
}

/// Does `work` on every rank, with kernels on threads of its own.
fn on_ranks<R: Send>(
    ranks: Vec<Communicator>,
    work: impl Fn(Communicator) -> Result<R> + Sync,
) -> Vec<R> {
    std::thread::scope(|scope| {
        let work = |rank| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
            pool.install(|| work(rank))
        };
        let threads: Vec<_> =
            ranks.into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
        let ends = threads.into_iter().map(|thread| thread.join().expect("no panic"));
        ends.collect::<Result<_>>().expect("all ranks run")
    })
}

#[test]
fn a_step_has_the_same_bits_on_1_2_and_4_ranks() -> Result<()> {
    for precision in [Precision::F32, Precision::Bf16] {
        let by_kernels = network(precision)?;
        let by_tensors = by_kernels.by_tensor_operations(&Device::Cpu);
        for (network, frozen) in
            [(&by_kernels, false), (&by_kernels, true), (&by_tensors, false), (&by_tensors, true)]
        {
            let one = steps(network, 4, 1, frozen, None).remove(0);
            assert!(one.gradients.iter().any(|gradient| *gradient != 0.));
            // Summed at the end; during the second pass; at the end, since the third pass does not come.
            for expected in [None, Some(2), Some(3)] {
                for ranks in [1, 2, 4] {
                    for step in steps(network, 4, ranks, frozen, expected) {
                        let case = format!("{ranks} ranks, frozen: {frozen}, {expected:?} passes");
                        assert!(step == one, "{precision:?}, {case}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// The groups are one batch: their statistics and gradients are its own but for the rounding.
#[test]
fn groups_compute_what_the_whole_batch_does() -> Result<()> {
    let by_kernels = network(Precision::F32)?;
    let by_tensors = by_kernels.by_tensor_operations(&Device::Cpu);
    for (network, frozen) in
        [(&by_kernels, false), (&by_kernels, true), (&by_tensors, false), (&by_tensors, true)]
    {
        let whole = step(&by_kernels, &BatchGroups::one(), frozen, None)?;
        let groups = steps(network, 8, 2, frozen, None).remove(0);
        assert_ne!(whole.gradients, groups.gradients, "nothing was divided");
        let near = |a: &[f32], b: &[f32], what: &str| {
            assert_eq!(a.len(), b.len(), "{what}");
            let scale = b.iter().fold(1f32, |most, value| most.max(value.abs()));
            let most = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f32::max);
            assert!(most < 2e-5 * scale, "{what}, frozen {frozen}: {most} of {scale}");
        };
        near(&groups.outputs.concat(), &whole.outputs.concat(), "outputs");
        near(&groups.of_input, &whole.of_input, "gradient of the input");
        near(&groups.gradients, &whole.gradients, "gradients");
        near(&groups.statistics, &whole.statistics, "statistics");
    }
    Ok(())
}

#[test]
fn gradients_of_groups_are_added_before_they_are_read() -> Result<()> {
    let groups = BatchGroups::new(4, Communicator::single())?;
    let network = network(Precision::F32)?.in_groups(&groups)?;
    let (parameters, mut gradients) = (network.parameters(), network.gradients());
    let mut statistics = network.statistics();
    let modes = Modes::all(&network, Mode::Batch);
    let input = numbers(1, &[5, 7, 9, 3])?;
    let mut pass = |gradients: &mut _| -> Result<()> {
        let mut tape = network.tape();
        let statistics = &mut statistics;
        let output = network.forward(&parameters, statistics, &input, &modes, Some(&mut tape))?;
        network.backward(&parameters, &mut tape, &output, gradients, false).map(|_| ())
    };
    pass(&mut gradients)?;
    let error = gradients.to_vec().expect_err("four parts").to_string();
    assert!(error.contains("call `reduce` first"), "{error}");
    gradients.reduce()?;
    let sum = gradients.to_vec()?;
    gradients.reduce()?;
    assert_eq!(gradients.to_vec()?, sum, "a second call changes nothing");
    let error = pass(&mut gradients).expect_err("already added").to_string();
    assert!(error.contains("`zero`"), "{error}");
    gradients.zero();
    assert!(gradients.to_vec()?.iter().all(|gradient| *gradient == 0.));
    let three = numbers(1, &[3, 7, 9, 3])?;
    let error = network.forward(&parameters, &mut network.statistics(), &three, &modes, None);
    let error = error.expect_err("an empty group").to_string();
    assert!(error.contains("3 images for 4 groups"), "{error}");
    Ok(())
}

/// Blocks of a convolution and a norm, of fewer numbers than ranks would sum in parts.
fn blocks(count: usize) -> Result<Network> {
    let mut b = Builder::images(3);
    let c = Convolution { out_channels: 4, kernel: 3, stride: 1, padding: 1 };
    let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
    let mut y = b.input();
    for block in 0..count {
        b.block(&format!("block{block}"));
        let z = b.convolution(&format!("conv{block}"), y, c)?;
        y = b.batch_norm(&format!("bn{block}"), z, norm)?;
    }
    // In the first block again: its gradients are complete last, and in two places of the memory.
    b.block("block0");
    let y = b.global_average_pool(y)?;
    let y = b.linear("output", y, 4)?;
    b.finish(y)
}

/// Forward and backward passes of one rank, which add to gradients.
struct Passes {
    network: Network,
    groups: BatchGroups,
    gradients: Gradients,
}

impl Passes {
    fn new(network: &Network, rank: Communicator) -> Result<Self> {
        let groups = BatchGroups::new(4, rank)?;
        let network = network.in_groups(&groups)?;
        let gradients = network.gradients();
        Ok(Self { network, groups, gradients })
    }

    fn pass(&mut self, seed: usize) -> Result<()> {
        let Self { network, groups, gradients } = self;
        let mut parameters = network.parameters();
        for (at, entry) in network.parameters().entries().iter().enumerate() {
            let values = numbers(at, &[entry.range.len()])?.to_vec1::<f32>()?;
            parameters.set(&entry.name, &values)?;
        }
        let (modes, mut tape) = (Modes::all(network, Mode::Batch), network.tape());
        let input = groups.own_rows(&numbers(seed, &[8, 5, 7, 3])?)?;
        let statistics = &mut network.statistics();
        network.forward(&parameters, statistics, &input, &modes, Some(&mut tape))?;
        let gradient = groups.own_rows(&numbers(seed + 1, &[8, 4])?)?;
        network.backward(&parameters, &mut tape, &gradient, gradients, false).map(|_| ())
    }
}

#[test]
fn the_last_pass_begins_the_sum_of_every_block() -> Result<()> {
    let blocks_of_network = 5;
    let network = blocks(blocks_of_network)?;
    let ranks = Communicator::threads(2).expect("a power of two");
    on_ranks(ranks, |rank| {
        let mut passes = Passes::new(&network, rank)?;
        passes.gradients.expect_passes(2)?;
        passes.pass(1)?;
        assert_eq!(passes.groups.communicator().sums_made(), 0);
        passes.pass(2)?;
        let begun = Instant::now();
        while passes.groups.communicator().sums_made() < blocks_of_network {
            assert!(begun.elapsed() < Duration::from_secs(60), "nobody makes the sums");
            std::thread::sleep(Duration::from_millis(1));
        }
        passes.gradients.reduce()
    });
    Ok(())
}

#[test]
fn no_pass_adds_to_gradients_that_are_being_summed() -> Result<()> {
    let network = blocks(2)?;
    for ranks in [1, 2] {
        let ranks = Communicator::threads(ranks).expect("a power of two");
        on_ranks(ranks, |rank| {
            let mut passes = Passes::new(&network, rank)?;
            passes.gradients.expect_passes(2)?;
            passes.pass(1)?;
            passes.pass(2)?;
            let other = passes.network.gradients();
            for error in [
                passes.pass(3).expect_err("a third pass"),
                passes.gradients.add(&other).expect_err("further gradients"),
                passes.gradients.expect_passes(1).expect_err("too late"),
            ] {
                assert!(error.to_string().contains("`expect_passes`"), "{error}");
            }
            let error = passes.gradients.to_vec().expect_err("not added").to_string();
            assert!(error.contains("call `reduce` first"), "{error}");
            passes.gradients.reduce()?;
            let sum = passes.gradients.to_vec()?;
            passes.gradients.reduce()?;
            assert_eq!(passes.gradients.to_vec()?, sum, "a second call changes nothing");

            // A step that is abandoned after its last pass, and another one of two passes.
            passes.gradients.zero();
            passes.gradients.expect_passes(1)?;
            passes.pass(4)?;
            passes.gradients.zero();
            assert!(passes.gradients.to_vec()?.iter().all(|gradient| *gradient == 0.));
            passes.pass(1)?;
            passes.pass(2)?;
            passes.gradients.reduce()?;
            assert_eq!(passes.gradients.to_vec()?, sum);
            Ok(())
        });
    }
    Ok(())
}

#[test]
fn gradients_that_a_rank_never_sent_are_not_read() -> Result<()> {
    let network = blocks(2)?;
    let ranks = Communicator::threads(2).expect("a power of two");
    on_ranks(ranks, |rank| {
        let is_first = rank.is_first();
        let mut passes = Passes::new(&network, rank)?;
        passes.pass(1)?;
        passes.gradients.expect_passes(1)?;
        if is_first {
            return Ok(());
        }
        let error = passes.pass(2).expect_err("a norm of one rank").to_string();
        assert!(error.contains("rank 0 has ended while rank 1 waited for it"), "{error}");
        Ok(())
    });
    // A rank that ends after its passes, before its sums are made.
    let ranks = Communicator::threads(2).expect("a power of two");
    on_ranks(ranks, |rank| {
        let is_first = rank.is_first();
        let mut passes = Passes::new(&network, rank)?;
        passes.gradients.expect_passes(if is_first { 2 } else { 1 })?;
        passes.pass(1)?;
        if is_first {
            return Ok(());
        }
        let error = passes.gradients.reduce().expect_err("never sent").to_string();
        assert!(error.contains("rank 0 has ended while rank 1 waited for it"), "{error}");
        let error = passes.gradients.reduce().expect_err("still incomplete").to_string();
        assert!(error.contains("call `zero`"), "{error}");
        Ok(())
    });
    Ok(())
}
