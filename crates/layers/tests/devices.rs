//! Networks by candle's tensor operations against the CPU's kernels: values, gradients, updates.
//!
//! On candle's CPU device always; with the features `cuda` and `metal`, on the first such device of
//! the machine too, and a machine without one fails these tests.

#[expect(dead_code, reason = "other tests use the rest")]
mod reference;

use candle_core::{Device, Result, Tensor};
use layers::{Adam, Gradients, Mode, Modes, Network, Parameters, Precision, Sgd, Statistics, Tape};
use reference::{Case, Op, distance, fill, narrow_resnet, noise, wide};

/// Every device that this program was built for.
fn devices() -> Result<Vec<Device>> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        devices.push(Device::new_cuda(0)?);
    }
    if cfg!(feature = "metal") {
        devices.push(Device::new_metal(0)?);
    }
    Ok(devices)
}

/// A network with its numbers.
struct Bench {
    case: Case,
    network: Network,
    parameters: Parameters,
    statistics: Statistics,
    gradients: Gradients,
    modes: Modes,
}

/// What one pass gives, on the host.
struct Found {
    output: Vec<f32>,
    gradients: Vec<f32>,
    at_input: Vec<f32>,
    statistics: Vec<f32>,
}

impl Bench {
    /// By the CPU's kernels, with running statistics of their own and some blocks in that mode.
    fn new(case: &Case, precision: Precision, running: &[&str]) -> Result<Bench> {
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
        Ok(Bench { case: case.clone(), network, parameters, statistics, gradients, modes })
    }

    /// The same by tensor operations.
    fn on(&self, device: &Device) -> Result<Bench> {
        let network = self.network.by_tensor_operations(device);
        Ok(Bench {
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
    fn pass(&mut self, n: usize, seed: u64) -> Result<Found> {
        let mut tape = self.network.tape();
        let output = self.forward(n, seed, Some(&mut tape))?;
        let (at_output, p, g) =
            (self.gradient(n, seed + 1)?, &self.parameters, &mut self.gradients);
        let at_input = self.network.backward(p, &mut tape, &at_output, g, true)?;
        assert!(tape.is_empty());
        Ok(Found {
            output,
            gradients: self.gradients.to_vec()?,
            at_input: at_input.expect("asked for").flatten_all()?.to_vec1()?,
            statistics: self.statistics.to_vec()?,
        })
    }
}

/// Compares one pass on every device with the kernels'.
fn check(case: &Case, n: usize, running: &[&str]) -> Result<()> {
    for device in devices()? {
        let mut kernels = Bench::new(case, Precision::F32, running)?;
        let mut other = kernels.on(&device)?;
        let (want, got) = (kernels.pass(n, 3)?, other.pass(n, 3)?);
        // Products of up to 171 terms, then sums over up to 1,000 values, in another order; the
        // kernels themselves are held to 2e-6 and 3e-5 of the truth.
        for (what, got, want, bound) in [
            ("output", &got.output, &want.output, 4e-6),
            ("input gradient", &got.at_input, &want.at_input, 3e-5),
            ("statistics", &got.statistics, &want.statistics, 2e-6),
        ] {
            let off = distance(got, &wide(want));
            assert!(off < bound, "{case:?} on {:?}: {what} is {off} off", device.location());
        }
        for entry in kernels.parameters.entries() {
            let range = entry.range.clone();
            let off = distance(&got.gradients[range.clone()], &wide(&want.gradients[range]));
            let name = &entry.name;
            assert!(off < 3e-5, "{case:?} on {:?}: {name} is {off} off", device.location());
        }
    }
    Ok(())
}

/// A layer after a norm, so that its input has a gradient to pass on.
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
    // Negative throughout: beyond the border counts as less than that.
    let values = [-5f32, -1., -1., -1., -1., -5., -5., -1., -1., -1., -1., -1.];
    for device in devices()? {
        let kernels = Bench::new(&case, Precision::F32, &[])?;
        let other = kernels.on(&device)?;
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
    for device in devices()? {
        let mut kernels = Bench::new(&case, Precision::F32, &[])?;
        let mut other = kernels.on(&device)?;
        let mut outputs = Vec::new();
        for bench in [&mut kernels, &mut other] {
            let x = case.tensor(40, &values)?.to_device(&bench.network.device())?;
            let (p, s) = (&bench.parameters, &mut bench.statistics);
            let y = bench.network.forward(p, s, &x, &bench.modes, None)?;
            outputs.push(y.flatten_all()?.to_vec1::<f32>()?);
        }
        // One unit in the last place of the input is 6e-5, a ten-thousandth of the deviation.
        let off = distance(&outputs[1], &wide(&outputs[0]));
        assert!(off < 1e-4, "{:?}: {off}", device.location());
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
    for device in devices()? {
        let mut b = Bench::new(&narrow_resnet(5, 7), Precision::F32, &[])?.on(&device)?;
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
    for device in devices()? {
        let mut b = Bench::new(&narrow_resnet(5, 7), Precision::F32, &[])?.on(&device)?;
        let mut inference = b.network.inference(&b.parameters, &b.statistics)?;
        let found = inference.forward(&b.input(6, 1)?)?.flatten_all()?.to_vec1::<f32>()?;
        assert!(inference.is_of(&b.parameters, &b.statistics));
        b.forward(6, 2, None)?;
        assert!(!inference.is_of(&b.parameters, &b.statistics), "they follow the batch");
        let mut b =
            Bench::new(&narrow_resnet(5, 7), Precision::F32, &["stem", "layer1", "layer2"])?;
        let want = b.forward(6, 1, None)?;
        assert!(distance(&found, &wide(&want)) < 4e-6);
    }
    Ok(())
}

/// Steps of both optimizers and the moving average; frozen blocks; two passes before a step.
#[test]
fn updates_follow_the_kernels_and_frozen_blocks_stay() -> Result<()> {
    let sgd = Sgd { learning_rate: 0.05, momentum: 0.9, weight_decay: 5e-4 };
    let adam =
        Adam { learning_rate: 0.01, beta_1: 0.9, beta_2: 0.999, epsilon: 1e-3, weight_decay: 0.1 };
    let run = |b: &mut Bench| -> Result<[Vec<f32>; 4]> {
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
        // Through other devices and back: no bit changes, and nothing is left behind.
        let back = momenta.to(&b.network)?;
        assert_eq!(back.get("conv1.weight")?, momenta.get("conv1.weight")?);
        assert_eq!(moments.to(&b.network)?.steps(), 3);
        let momentum = momenta.get("conv1.weight")?;
        let second = moments.get("layer2.conv1.weight")?.1;
        Ok([b.parameters.to_vec()?, target.to_vec()?, momentum, second])
    };
    for device in devices()? {
        let mut kernels = Bench::new(&narrow_resnet(9, 7), Precision::F32, &[])?;
        let mut other = kernels.on(&device)?;
        let before = kernels.parameters.clone();
        let (want, got) = (run(&mut kernels)?, run(&mut other)?);
        for (what, (got, want)) in
            ["parameters", "target", "momenta", "moments"].iter().zip(got.iter().zip(&want))
        {
            let off = distance(got, &wide(want));
            assert!(off < 1e-4, "{what} on {:?} are {off} off", device.location());
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
    // Without ReLU and max-pool, where one rounding changes which values pass.
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
        for device in devices()? {
            let mut kernels = Bench::new(&case, Precision::Bf16, &[])?;
            let mut other = kernels.on(&device)?;
            let (want, got) = (kernels.pass(6, 3)?, other.pass(6, 3)?);
            let off = distance(&got.output, &wide(&want.output));
            assert!(off < 0.02, "{:?}: output is {off} off", device.location());
            let off = distance(&got.gradients, &wide(&want.gradients));
            assert!(!smooth || off < 0.02, "{:?}: gradients are {off} off", device.location());
        }
    }
    Ok(())
}

#[test]
fn what_lies_elsewhere_is_refused_with_its_name() -> Result<()> {
    let mut here = Bench::new(&narrow_resnet(5, 4), Precision::F32, &[])?;
    let mut there = here.on(&Device::Cpu)?;
    let refused = |result: Result<Tensor>, words: &[&str]| {
        let message = result.expect_err("refused").to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    let x = here.input(3, 1)?;
    let (a, b) = (&mut here, &mut there);
    let modes = &a.modes;
    let s = &mut b.statistics;
    refused(b.network.forward(&a.parameters, s, &x, modes, None), &["parameters", "kernels"]);
    let s = &mut a.statistics;
    refused(b.network.forward(&b.parameters, s, &x, modes, None), &["statistics", "kernels"]);
    refused(a.network.forward(&b.parameters, s, &x, modes, None), &["parameters", "Cpu"]);
    let double = x.to_dtype(candle_core::DType::F64)?;
    let s = &mut b.statistics;
    refused(b.network.forward(&b.parameters, s, &double, modes, None), &["input", "F64"]);
    assert!(b.parameters.follow(&a.parameters, 0.5).is_err());
    assert!(b.gradients.add(&a.gradients).is_err());
    let tape = &mut b.network.tape();
    b.network.forward(&b.parameters, s, &x, modes, Some(tape))?;
    let g = b.gradient(3, 1)?;
    assert!(b.network.backward(&b.parameters, tape, &g, &mut a.gradients, false).is_err());
    assert!(!tape.is_empty(), "an error keeps the pass");
    b.parameters.set("conv1.weight", &vec![0.5; 6 * 3 * 9])?;
    let stale = b.network.backward(&b.parameters, tape, &g, &mut b.gradients, false);
    assert!(stale.expect_err("stale").to_string().contains("changed"));
    Ok(())
}

#[test]
fn numbers_that_are_not_finite_are_found_by_name() -> Result<()> {
    for device in devices()? {
        let mut b = Bench::new(&narrow_resnet(5, 4), Precision::F32, &[])?.on(&device)?;
        b.pass(3, 1)?;
        assert_eq!(b.gradients.first_non_finite()?, None);
        assert_eq!(b.parameters.first_non_finite()?, None);
        let infinite = Tensor::new(&[[0f32, f32::INFINITY, 0., 0., 0.]], &device)?;
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
