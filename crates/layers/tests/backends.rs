//! Compares every other backend with the CPU kernels: values, gradients, updates. Backends must not mix.
//!
//! Tensor operations on candle's CPU device are always tested. With the features `cuda` and `metal`, so
//! are the backends of the first such device; these tests fail on a machine without one.

#[expect(dead_code, reason = "other tests use the rest")]
mod reference;

use candle_core::{DType, Device, Result, Tensor};
use layers::{
    Adam, BatchNorm, Builder, Convolution, Gradients, Mode, Modes, Network, Parameters, Pool,
    Precision, Sgd, Statistics, Tape,
};
use reference::{Case, Op, distance, fill, narrow_resnet, noise, wide};

/// A backend besides the CPU kernels.
#[derive(Debug)]
struct Other {
    device: Device,
    /// Whether tensor operations alone compute, where the device has kernels too.
    by_tensor_operations: bool,
}

impl Other {
    fn network(&self, kernels: &Network) -> Network {
        match self.by_tensor_operations {
            true => kernels.by_tensor_operations(&self.device),
            false => kernels.on(&self.device),
        }
    }
}

/// Every backend that this program was built for.
fn others() -> Result<Vec<Other>> {
    let tensors = |device| Other { device, by_tensor_operations: true };
    let mut others = vec![tensors(Device::Cpu)];
    if cfg!(feature = "cuda") {
        let device = Device::new_cuda(0)?;
        others.push(tensors(device.clone()));
        others.push(Other { device, by_tensor_operations: false });
    }
    if cfg!(feature = "metal") {
        others.push(tensors(Device::new_metal(0)?));
    }
    Ok(others)
}

/// A network with its numbers.
struct Subject {
    case: Case,
    network: Network,
    parameters: Parameters,
    statistics: Statistics,
    gradients: Gradients,
    modes: Modes,
}

/// The results of one pass, on the host.
struct Outcome {
    output: Vec<f32>,
    gradients: Vec<f32>,
    at_input: Vec<f32>,
    statistics: Vec<f32>,
}

impl Subject {
    /// On the CPU kernels, with some blocks in running mode and running statistics that are not 0 and 1.
    fn new(case: &Case, precision: Precision, running: &[&str]) -> Result<Subject> {
        let network = case.network(None)?.with_precision(precision);
        let mut parameters = network.parameters();
        fill(&mut parameters, 1)?;
        let mut statistics = network.statistics();
        for entry in statistics.entries().to_vec() {
            let shift = if entry.name.ends_with("var") { 1.5 } else { 0. };
            let values = noise(9, entry.range.len());
            let values: Vec<f32> = values.iter().map(|x| x * 0.5 + shift).collect();
            statistics.set(&entry.name, &values)?;
        }
        let mut modes = Modes::all(&network, Mode::Batch);
        for block in running {
            modes.set(block, Mode::Running)?;
        }
        let gradients = network.gradients();
        Ok(Subject { case: case.clone(), network, parameters, statistics, gradients, modes })
    }

    /// The same on another backend.
    fn on(&self, other: &Other) -> Result<Subject> {
        let network = other.network(&self.network);
        Ok(Subject {
            case: self.case.clone(),
            parameters: self.parameters.to(&network)?,
            statistics: self.statistics.to(&network)?,
            gradients: network.gradients(),
            modes: self.modes.clone(),
            network,
        })
    }

    fn input(&self, n: usize, seed: u64) -> Result<Tensor> {
        let input = self.case.tensor(n, &noise(seed, self.case.input_len(n)))?;
        input.to_device(&self.network.device())
    }

    fn gradient(&self, n: usize, seed: u64) -> Result<Tensor> {
        let d = self.network.output_width();
        Tensor::from_vec(noise(seed, n * d), (n, d), &self.network.device())
    }

    fn forward(&mut self, n: usize, seed: u64, tape: Option<&mut Tape>) -> Result<Vec<f32>> {
        let (input, p, s) = (self.input(n, seed)?, &self.parameters, &mut self.statistics);
        self.network.forward(p, s, &input, &self.modes, tape)?.flatten_all()?.to_vec1()
    }

    /// Forward and backward; gradients add.
    fn pass(&mut self, n: usize, seed: u64) -> Result<Outcome> {
        let mut tape = self.network.tape();
        let output = self.forward(n, seed, Some(&mut tape))?;
        let (at_output, p, g) =
            (self.gradient(n, seed + 1)?, &self.parameters, &mut self.gradients);
        let at_input = self.network.backward(p, &mut tape, &at_output, g, true)?;
        assert!(tape.is_empty());
        Ok(Outcome {
            output,
            gradients: self.gradients.to_vec()?,
            at_input: at_input.expect("asked for").flatten_all()?.to_vec1()?,
            statistics: self.statistics.to_vec()?,
        })
    }
}

/// Compares one pass on every backend with that of the CPU kernels.
fn check(case: &Case, n: usize, running: &[&str]) -> Result<()> {
    for backend in others()? {
        let mut kernels = Subject::new(case, Precision::F32, running)?;
        let mut other = kernels.on(&backend)?;
        let (want, got) = (kernels.pass(n, 3)?, other.pass(n, 3)?);
        // Products of up to 171 terms, then sums over up to 1,000 values, in another order. Other tests
        // hold the kernels to 2e-6 and 3e-5 of the exact values.
        for (what, got, want, bound) in [
            ("output", &got.output, &want.output, 4e-6),
            ("input gradient", &got.at_input, &want.at_input, 3e-5),
            ("statistics", &got.statistics, &want.statistics, 2e-6),
        ] {
            let off = distance(got, &wide(want));
            assert!(off < bound, "{case:?} on {:?}: {what} is {off} off", backend);
        }
        for entry in kernels.parameters.entries() {
            let range = entry.range.clone();
            let off = distance(&got.gradients[range.clone()], &wide(&want.gradients[range]));
            let name = &entry.name;
            assert!(off < 3e-5, "{case:?} on {:?}: {name} is {off} off", backend);
        }
    }
    Ok(())
}

/// A layer after a norm, so that its input needs a gradient.
fn after_norm(h: usize, w: usize, c: usize, op: Op) -> Case {
    let norm = Op::Norm { name: "first", from: 0, relu: false, residual: None };
    Case { input: (h, w, c), ops: vec![Op::Block("all"), norm, op, Op::Average { from: 2 }] }
}

#[test]
fn convolutions_of_every_kind() -> Result<()> {
    for (from, to, kernel, stride, pad, h, w) in [
        (3, 5, 3, 1, 1, 5, 4),
        (19, 33, 3, 1, 1, 3, 4),
        (4, 6, 3, 2, 1, 5, 6),
        (4, 6, 3, 2, 1, 1, 1),
        (3, 4, 7, 2, 3, 9, 6),
        (3, 4, 7, 2, 3, 3, 2),
        (5, 18, 1, 1, 0, 3, 2),
        (20, 7, 1, 2, 0, 4, 5),
        (2, 3, 5, 3, 2, 7, 8),
        (2, 3, 2, 2, 0, 5, 4),
        (2, 3, 1, 3, 0, 5, 6),
        (1, 1, 4, 1, 3, 2, 3),
    ] {
        let conv = Op::Conv { name: "c", from: 1, to, kernel, stride, pad };
        check(&after_norm(h, w, from, conv), 3, &[])?;
    }
    Ok(())
}

#[test]
fn max_pools() -> Result<()> {
    for (kernel, stride, pad, h, w) in [
        (3, 2, 1, 5, 4),
        (3, 2, 1, 6, 7),
        (2, 2, 0, 4, 5),
        (2, 2, 1, 4, 5),
        (3, 1, 1, 3, 2),
        (2, 3, 0, 5, 7),
    ] {
        check(&after_norm(h, w, 18, Op::Max { from: 1, kernel, stride, pad }), 3, &[])?;
    }
    Ok(())
}

#[test]
fn of_equal_maxima_the_first_gets_the_gradient() -> Result<()> {
    let ops = vec![
        Op::Block("all"),
        Op::Max { from: 0, kernel: 3, stride: 2, pad: 1 },
        Op::Average { from: 1 },
    ];
    let case = Case { input: (3, 4, 1), ops };
    // All negative: padding must count as even less.
    let values = [-5f32, -1., -1., -1., -1., -5., -5., -1., -1., -1., -1., -1.];
    for backend in others()? {
        let kernels = Subject::new(&case, Precision::F32, &[])?;
        let other = kernels.on(&backend)?;
        let mut at_inputs = Vec::new();
        for mut bench in [kernels, other] {
            let device = bench.network.device();
            let x = Tensor::from_slice(&values, (1, 3, 4, 1), &device)?;
            let g = Tensor::from_slice(&[4f32], (1, 1), &device)?;
            let (p, s, mut tape) = (&bench.parameters, &mut bench.statistics, bench.network.tape());
            let y = bench.network.forward(p, s, &x, &bench.modes, Some(&mut tape))?;
            assert_eq!(y.to_device(&Device::Cpu)?.to_vec2::<f32>()?, [[-1.]]);
            let g = bench.network.backward(p, &mut tape, &g, &mut bench.gradients, true)?;
            at_inputs.push(g.expect("asked for").flatten_all()?.to_vec1::<f32>()?);
        }
        assert_eq!(at_inputs[0], at_inputs[1]);
        assert_eq!(at_inputs[0].iter().sum::<f32>(), 4.);
    }
    Ok(())
}

#[test]
fn batch_norms_in_both_modes_with_every_ending() -> Result<()> {
    for (relu, residual) in [(false, None), (true, None), (false, Some(1)), (true, Some(1))] {
        let ops = vec![
            Op::Block("below"),
            Op::Conv { name: "c", from: 0, to: 18, kernel: 3, stride: 1, pad: 1 },
            Op::Conv { name: "d", from: 1, to: 18, kernel: 1, stride: 1, pad: 0 },
            Op::Block("norm"),
            Op::Norm { name: "n", from: 2, relu, residual },
            Op::Average { from: 3 },
        ];
        let case = Case { input: (4, 3, 2), ops };
        check(&case, 5, &[])?;
        check(&case, 5, &["norm"])?;
    }
    Ok(())
}

#[test]
fn a_mean_far_from_zero_costs_no_digits() -> Result<()> {
    let ops = vec![
        Op::Block("norm"),
        Op::Norm { name: "n", from: 0, relu: false, residual: None },
        Op::Average { from: 1 },
    ];
    let case = Case { input: (9, 8, 3), ops };
    let values: Vec<f32> = noise(50, case.input_len(40)).iter().map(|x| x + 1000.).collect();
    for backend in others()? {
        let mut kernels = Subject::new(&case, Precision::F32, &[])?;
        let mut other = kernels.on(&backend)?;
        let mut outputs = Vec::new();
        for bench in [&mut kernels, &mut other] {
            let x = case.tensor(40, &values)?.to_device(&bench.network.device())?;
            let (p, s) = (&bench.parameters, &mut bench.statistics);
            let y = bench.network.forward(p, s, &x, &bench.modes, None)?;
            outputs.push(y.flatten_all()?.to_vec1::<f32>()?);
        }
        // The rounding of the input is 6e-5, a ten-thousandth of the deviation.
        let off = distance(&outputs[1], &wide(&outputs[0]));
        assert!(off < 1e-4, "{:?}: {off}", backend);
    }
    Ok(())
}

#[test]
fn linear_layers_with_norm_and_relu() -> Result<()> {
    let ops = vec![
        Op::Block("head"),
        Op::Linear { name: "a", from: 0, to: 40 },
        Op::Norm { name: "n", from: 1, relu: true, residual: None },
        Op::Linear { name: "b", from: 2, to: 17 },
        Op::Relu { from: 3 },
        Op::Linear { name: "c", from: 4, to: 33 },
    ];
    check(&Case { input: (1, 1, 20), ops }, 21, &[])
}

#[test]
fn whole_networks_of_odd_sizes_in_both_modes() -> Result<()> {
    check(&narrow_resnet(9, 7), 4, &[])?;
    check(&narrow_resnet(4, 3), 37, &["layer1"])?;
    check(&narrow_resnet(6, 11), 5, &["stem", "layer1", "layer2"])
}

#[test]
fn a_pass_that_keeps_nothing_gives_the_same_output() -> Result<()> {
    for backend in others()? {
        let mut b = Subject::new(&narrow_resnet(5, 7), Precision::F32, &[])?.on(&backend)?;
        let mut tape = b.network.tape();
        let with = b.forward(6, 1, Some(&mut tape))?;
        assert_eq!(with, b.forward(6, 1, None)?);
        assert!(b.forward(6, 1, Some(&mut tape)).is_err(), "the tape is in use");
        tape.clear();
        assert!(b.forward(6, 1, Some(&mut tape)).is_ok());
    }
    Ok(())
}

#[test]
fn inference_is_a_pass_on_running_statistics_and_knows_when_they_changed() -> Result<()> {
    for backend in others()? {
        let mut b = Subject::new(&narrow_resnet(5, 7), Precision::F32, &[])?.on(&backend)?;
        let mut inference = b.network.inference(&b.parameters, &b.statistics)?;
        let found = inference.forward(&b.input(6, 1)?)?.flatten_all()?.to_vec1::<f32>()?;
        assert!(inference.is_current(&b.parameters, &b.statistics));
        b.forward(6, 2, None)?;
        assert!(!inference.is_current(&b.parameters, &b.statistics), "they follow the batch");
        let mut b =
            Subject::new(&narrow_resnet(5, 7), Precision::F32, &["stem", "layer1", "layer2"])?;
        let want = b.forward(6, 1, None)?;
        assert!(distance(&found, &wide(&want)) < 4e-6);
    }
    Ok(())
}

/// Steps of both optimizers and the moving average, with frozen blocks and two passes per step.
#[test]
fn updates_follow_the_kernels_and_frozen_blocks_stay() -> Result<()> {
    let sgd = Sgd { learning_rate: 0.05, momentum: 0.9, weight_decay: 5e-4 };
    let adam =
        Adam { learning_rate: 0.01, beta_1: 0.9, beta_2: 0.999, epsilon: 1e-3, weight_decay: 0.1 };
    let run = |b: &mut Subject| -> Result<[Vec<f32>; 4]> {
        let mut momenta = b.network.momenta();
        let mut moments = b.network.adam_moments();
        let mut target = b.parameters.clone();
        for block in ["layer1", "head"] {
            b.parameters.set_trainable(block, false)?;
        }
        for step in 0..3 {
            b.pass(4, 10 + step)?;
            b.pass(5, 20 + step)?;
            b.parameters.sgd(&b.gradients, &mut momenta, sgd)?;
            b.parameters.adam(&b.gradients, &mut moments, adam)?;
            target.follow(&b.parameters, 0.9)?;
            b.gradients.zero();
        }
        assert!(b.gradients.to_vec()?.iter().all(|g| *g == 0.));
        // A copy for the same backend has the same bits and the number of steps.
        let back = momenta.to(&b.network)?;
        assert_eq!(back.get("conv1.weight")?, momenta.get("conv1.weight")?);
        assert_eq!(moments.to(&b.network)?.steps(), 3);
        let momentum = momenta.get("conv1.weight")?;
        let second = moments.get("layer2.conv1.weight")?.1;
        Ok([b.parameters.to_vec()?, target.to_vec()?, momentum, second])
    };
    for backend in others()? {
        let mut kernels = Subject::new(&narrow_resnet(9, 7), Precision::F32, &[])?;
        let mut other = kernels.on(&backend)?;
        let before = kernels.parameters.clone();
        let (want, got) = (run(&mut kernels)?, run(&mut other)?);
        for (what, (got, want)) in
            ["parameters", "target", "momenta", "moments"].iter().zip(got.iter().zip(&want))
        {
            let off = distance(got, &wide(want));
            assert!(off < 1e-4, "{what} on {:?} are {off} off", backend);
        }
        for entry in before.entries() {
            let (old, new) = (before.get(&entry.name)?, other.parameters.get(&entry.name)?);
            let frozen = ["layer1", "head"].contains(&other.network.blocks()[entry.block].as_str());
            assert_eq!(old == new, frozen, "{}", entry.name);
        }
    }
    Ok(())
}

#[test]
fn bf16_gives_what_the_kernels_give_up_to_its_rounding() -> Result<()> {
    // Without ReLU and max-pool, where a rounding can change which values pass.
    let ops = vec![
        Op::Block("all"),
        Op::Conv { name: "c", from: 0, to: 18, kernel: 3, stride: 1, pad: 1 },
        Op::Norm { name: "n", from: 1, relu: false, residual: None },
        Op::Conv { name: "d", from: 2, to: 18, kernel: 3, stride: 2, pad: 1 },
        Op::Norm { name: "m", from: 3, relu: false, residual: None },
        Op::Average { from: 4 },
        Op::Linear { name: "l", from: 5, to: 7 },
    ];
    for (case, smooth) in [(Case { input: (7, 6, 5), ops }, true), (narrow_resnet(9, 7), false)] {
        for backend in others()? {
            let mut kernels = Subject::new(&case, Precision::Bf16, &[])?;
            let mut other = kernels.on(&backend)?;
            let (want, got) = (kernels.pass(6, 3)?, other.pass(6, 3)?);
            let off = distance(&got.output, &wide(&want.output));
            assert!(off < 0.02, "{:?}: output is {off} off", backend);
            let off = distance(&got.gradients, &wide(&want.gradients));
            assert!(!smooth || off < 0.02, "{:?}: gradients are {off} off", backend);
        }
    }
    Ok(())
}

/// Asserts an error whose message contains all words.
#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else { panic!("not refused") };
    let message = error.to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
}

#[test]
fn numbers_of_two_backends_do_not_mix_and_the_error_names_both() -> Result<()> {
    const KERNELS: &str = "CPU kernels";
    const TENSORS: &str = "tensor operations on Cpu";
    let cpu = Other { device: Device::Cpu, by_tensor_operations: true };
    let mut a = Subject::new(&narrow_resnet(5, 4), Precision::F32, &[])?;
    let mut b = a.on(&cpu)?;
    let (x, g, modes) = (a.input(3, 1)?, a.gradient(3, 1)?, a.modes.clone());

    let forward =
        |n: &Network, p: &Parameters, s: &mut Statistics| n.forward(p, s, &x, &modes, None);
    let (kernels, tensors) = (&a.network, &b.network);
    let all = ["stored for", "computes with", KERNELS, TENSORS];
    refused(
        forward(tensors, &a.parameters, &mut b.statistics),
        &[&all[..], &["parameters"]].concat(),
    );
    refused(
        forward(tensors, &b.parameters, &mut a.statistics),
        &[&all[..], &["statistics"]].concat(),
    );
    refused(
        forward(kernels, &b.parameters, &mut a.statistics),
        &[&all[..], &["parameters"]].concat(),
    );
    refused(kernels.inference(&b.parameters, &a.statistics), &all);

    let mut tape = b.network.tape();
    b.network.forward(&b.parameters, &mut b.statistics, &x, &modes, Some(&mut tape))?;
    let with = |n: &Network, p: &Parameters, tape: &mut Tape, into: &mut Gradients| {
        n.backward(p, tape, &g, into, false)
    };
    refused(with(&b.network, &b.parameters, &mut tape, &mut a.gradients), &["gradients", KERNELS]);
    // The kernels' own numbers, but a tape of the tensor network.
    refused(
        with(&a.network, &a.parameters, &mut tape, &mut a.gradients),
        &["tape", "recorded with", KERNELS, TENSORS],
    );
    assert!(!tape.is_empty(), "an error keeps the pass");

    let sgd = Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 0. };
    let adam =
        Adam { learning_rate: 0.1, beta_1: 0.9, beta_2: 0.99, epsilon: 1e-8, weight_decay: 0. };
    let before = b.parameters.to_vec()?;
    let both = [KERNELS, TENSORS];
    let mut momenta = [a.network.momenta(), b.network.momenta()];
    let mut moments = [a.network.adam_moments(), b.network.adam_moments()];
    refused(b.parameters.sgd(&a.gradients, &mut momenta[1], sgd), &both);
    refused(b.parameters.sgd(&b.gradients, &mut momenta[0], sgd), &both);
    refused(b.parameters.adam(&a.gradients, &mut moments[1], adam), &both);
    refused(b.parameters.adam(&b.gradients, &mut moments[0], adam), &both);
    assert_eq!(moments.map(|moments| moments.steps()), [0, 0]);
    refused(b.parameters.follow(&a.parameters, 0.5), &both);
    refused(a.parameters.follow(&b.parameters, 0.5), &both);
    refused(b.gradients.add(&a.gradients), &both);
    assert_eq!(b.parameters.to_vec()?, before);

    b.parameters.set("conv1.weight", &vec![0.5; 6 * 3 * 9])?;
    refused(with(&b.network, &b.parameters, &mut tape, &mut b.gradients), &["changed"]);
    Ok(())
}

#[test]
fn inputs_are_f32_of_any_strides() -> Result<()> {
    let kernels = Subject::new(&narrow_resnet(5, 4), Precision::F32, &[])?;
    let cpu = Other { device: Device::Cpu, by_tensor_operations: true };
    for mut bench in [kernels.on(&cpu)?, kernels] {
        let x = bench.input(3, 1)?;
        let strided = x.permute((0, 3, 1, 2))?.contiguous()?.permute((0, 2, 3, 1))?;
        assert!(!strided.is_contiguous());
        let mut forward = |x: &Tensor| {
            let (p, s) = (&bench.parameters, &mut bench.statistics);
            bench.network.forward(p, s, x, &bench.modes, None)?.to_vec2::<f32>()
        };
        assert_eq!(forward(&strided)?, forward(&x)?);
        refused(forward(&x.to_dtype(DType::F64)?), &["input", "F64", "f32"]);
    }
    Ok(())
}

/// Networks with equal entries and channels but different operations, such as a ReLU in place of a
/// max-pool: gradients would be lost if one took the tape of the other.
#[test]
fn a_tape_of_a_network_with_other_operations_is_refused() -> Result<()> {
    let network = |change: &str| -> Result<Network> {
        let mut b = Builder::images(3);
        b.block("all");
        let padding = if change == "padding" { 0 } else { 1 };
        let x = b.input();
        let z = b.convolution(
            "conv",
            x,
            Convolution { out_channels: 4, kernel: 3, stride: 1, padding },
        )?;
        let residual = (change == "residual").then_some(z);
        let relu = change != "relu of the norm";
        let y =
            b.batch_norm("norm", z, BatchNorm { epsilon: 1e-5, momentum: 0.1, relu, residual })?;
        let y = match change {
            "relu" => b.relu(y)?,
            _ => b.max_pool(y, Pool { kernel: 1, stride: 1, padding: 0 })?,
        };
        let y = b.global_average_pool(y)?;
        b.finish(y)
    };
    let cpu = Other { device: Device::Cpu, by_tensor_operations: true };
    for tensors in [false, true] {
        let of = |change: &str| -> Result<Network> {
            let network = network(change)?;
            Ok(if tensors { cpu.network(&network) } else { network })
        };
        let recorded = of("none")?;
        let (mut parameters, mut statistics) = (recorded.parameters(), recorded.statistics());
        fill(&mut parameters, 1)?;
        let x = Tensor::from_vec(noise(1, 2 * 6 * 5 * 3), (2, 6, 5, 3), &Device::Cpu)?;
        let (modes, mut tape) = (Modes::all(&recorded, Mode::Batch), recorded.tape());
        recorded.forward(&parameters, &mut statistics, &x, &modes, Some(&mut tape))?;
        let (g, mut gradients) =
            (Tensor::ones((2, 4), DType::F32, &Device::Cpu)?, recorded.gradients());
        for change in ["relu", "padding", "residual", "relu of the norm"] {
            let found = of(change)?.backward(&parameters, &mut tape, &g, &mut gradients, false);
            refused(found, &["tape", "another network"]);
        }
        // An equal network that was built separately may take it.
        of("none")?.backward(&parameters, &mut tape, &g, &mut gradients, false)?;
        assert!(gradients.to_vec()?.iter().any(|g| *g != 0.));
    }
    Ok(())
}

#[test]
fn numbers_that_are_not_finite_are_found_by_name() -> Result<()> {
    for backend in others()? {
        let mut b = Subject::new(&narrow_resnet(5, 4), Precision::F32, &[])?.on(&backend)?;
        b.pass(3, 1)?;
        assert_eq!(b.gradients.first_non_finite()?, None);
        assert_eq!(b.parameters.first_non_finite()?, None);
        let infinite = Tensor::new(&[[0f32, f32::INFINITY, 0., 0., 0.]], &backend.device)?;
        let (x, mut tape) = (b.input(1, 1)?, b.network.tape());
        let (p, s, g) = (&b.parameters, &mut b.statistics, &mut b.gradients);
        let modes = Modes::all(&b.network, Mode::Running);
        b.network.forward(p, s, &x, &modes, Some(&mut tape))?;
        b.network.backward(p, &mut tape, &infinite, g, false)?;
        assert!(b.gradients.first_non_finite()?.is_some());
        assert!(!b.gradients.is_finite()?);
    }
    Ok(())
}
