//! Training steps: tapes, modes, frozen blocks, threads, updates, errors.

#[expect(dead_code, reason = "other tests use the rest")]
mod reference;

use candle_core::{DType, Device, Result, Tensor};
use kernels::Variant;
use layers::{
    Adam, EntryKind, Gradients, Mode, Modes, Network, Parameters, Precision, Sgd, Statistics,
};
use reference::{Case, Op, batch, distance, fill, named, narrow_resnet, noise, wide};

/// A network with everything that a step needs.
struct Subject {
    case: Case,
    network: Network,
    parameters: Parameters,
    statistics: Statistics,
    gradients: Gradients,
    modes: Modes,
}

impl Subject {
    fn new(case: Case, variant: Option<Variant>) -> Result<Subject> {
        Subject::with_precision(case, variant, Precision::F32)
    }

    fn with_precision(
        case: Case,
        variant: Option<Variant>,
        precision: Precision,
    ) -> Result<Subject> {
        let network = case.network(variant)?.with_precision(precision);
        let mut parameters = network.parameters();
        fill(&mut parameters, 1)?;
        let (statistics, gradients) = (network.statistics(), network.gradients());
        let modes = batch(&network);
        Ok(Subject { case, network, parameters, statistics, gradients, modes })
    }

    fn input(&self, seed: u64, n: usize) -> Result<Tensor> {
        self.case.tensor(n, &noise(seed, self.case.input_len(n)))
    }

    fn gradient(&self, seed: u64, n: usize) -> Result<Tensor> {
        let d = self.network.output_width();
        Tensor::from_vec(noise(seed, n * d), (n, d), &Device::Cpu)
    }

    /// One forward and backward pass; returns the output.
    fn pass(&mut self, input: &Tensor, gradient: &Tensor) -> Result<Vec<f32>> {
        let mut tape = self.network.tape();
        let (p, s) = (&self.parameters, &mut self.statistics);
        let output = self.network.forward(p, s, input, &self.modes, Some(&mut tape))?;
        self.network.backward(p, &mut tape, gradient, &mut self.gradients, false)?;
        output.flatten_all()?.to_vec1()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn two_tapes_equal_two_separate_steps_added() -> Result<()> {
    let mut b = Subject::new(narrow_resnet(8, 7), None)?;
    let (x1, x2) = (b.input(10, 5)?, b.input(11, 20)?);
    let (g1, g2) = (b.gradient(12, 5)?, b.gradient(13, 20)?);

    let (mut tape_1, mut tape_2) = (b.network.tape(), b.network.tape());
    let (p, s) = (&b.parameters, &mut b.statistics);
    let y1 = b.network.forward(p, s, &x1, &b.modes, Some(&mut tape_1))?;
    let y2 = b.network.forward(p, s, &x2, &b.modes, Some(&mut tape_2))?;
    b.network.backward(p, &mut tape_1, &g1, &mut b.gradients, false)?;
    b.network.backward(p, &mut tape_2, &g2, &mut b.gradients, false)?;
    let together = b.gradients.to_vec()?;

    let mut c = Subject::new(narrow_resnet(8, 7), None)?;
    let mut d = Subject::new(narrow_resnet(8, 7), None)?;
    let z1 = c.pass(&x1, &g1)?;
    let z2 = d.pass(&x2, &g2)?;
    c.gradients.add(&d.gradients)?;
    assert_eq!(bits(&together), bits(&c.gradients.to_vec()?));
    assert_eq!(y1.flatten_all()?.to_vec1::<f32>()?, z1);
    assert_eq!(y2.flatten_all()?.to_vec1::<f32>()?, z2);
    assert!(together.iter().any(|g| *g != 0.));
    Ok(())
}

#[test]
fn crops_of_two_sizes_in_one_step() -> Result<()> {
    crops_in_one_step(narrow_resnet(12, 10), narrow_resnet(5, 6), Precision::F32)?;
    // With enough channels that the larger maps use Winograd's form and the smaller ones do not.
    for precision in [Precision::F32, Precision::Bf16] {
        crops_in_one_step(two_convolutions(9, 8), two_convolutions(5, 4), precision)?;
        crops_in_one_step(two_convolutions(5, 4), two_convolutions(9, 8), precision)?;
    }
    Ok(())
}

/// Two convolutions of 32 channels with batch norm, average and a linear layer.
fn two_convolutions(height: usize, width: usize) -> Case {
    let conv = |name, from, to| Op::Conv { name, from, to, kernel: 3, stride: 1, pad: 1 };
    let norm = |name, from| Op::Norm { name, from, relu: true, residual: None };
    let ops = vec![
        Op::Block("all"),
        conv("conv1", 0, 32),
        norm("bn1", 1),
        conv("conv2", 2, 32),
        norm("bn2", 3),
        Op::Average { from: 4 },
        Op::Linear { name: "fc", from: 5, to: 5 },
    ];
    Case { input: (height, width, 3), ops }
}

fn crops_in_one_step(large: Case, small: Case, precision: Precision) -> Result<()> {
    let bench = |case: &Case| Subject::with_precision(case.clone(), None, precision);
    let mut b = bench(&large)?;
    let (x1, x2) = (b.input(20, 4)?, small.tensor(8, &noise(21, small.input_len(8)))?);
    let (g1, g2) = (b.gradient(22, 4)?, b.gradient(23, 8)?);
    let (mut tape_1, mut tape_2) = (b.network.tape(), b.network.tape());
    let (p, s) = (&b.parameters, &mut b.statistics);
    b.network.forward(p, s, &x1, &b.modes, Some(&mut tape_1))?;
    b.network.forward(p, s, &x2, &b.modes, Some(&mut tape_2))?;
    b.network.backward(p, &mut tape_2, &g2, &mut b.gradients, false)?;
    b.network.backward(p, &mut tape_1, &g1, &mut b.gradients, false)?;

    let (mut c, mut d) = (bench(&large)?, bench(&small)?);
    c.pass(&x1, &g1)?;
    d.pass(&x2, &g2)?;
    d.gradients.add(&c.gradients)?;
    assert_eq!(bits(&b.gradients.to_vec()?), bits(&d.gradients.to_vec()?));
    Ok(())
}

#[test]
fn a_last_batch_of_37_is_the_first_37_of_a_larger_one() -> Result<()> {
    // On running statistics images are independent. 37 images leave a group of 16 partly filled.
    let mut b = Subject::new(narrow_resnet(6, 5), None)?;
    b.modes = Modes::all(&b.network, Mode::Running);
    let (x, g) = (b.input(30, 48)?, b.gradient(31, 48)?);
    let all = b.pass(&x, &g)?;
    let some = b.pass(&x.narrow(0, 0, 37)?, &g.narrow(0, 0, 37)?)?;
    assert_eq!(bits(&some), bits(&all[..some.len()]));

    // On batch statistics, against the interpreter: the padding of the group must not count.
    b.modes = batch(&b.network);
    let input = noise(32, b.case.input_len(37));
    let got = b.pass(&b.case.tensor(37, &input)?, &b.gradient(33, 37)?)?;
    let parameters = named(&b.parameters)?;
    let want =
        b.case.interpret(37, &wide(&input), &parameters, &Default::default(), |_| Mode::Batch);
    assert!(distance(&got, &want) < 2e-6, "{}", distance(&got, &want));
    Ok(())
}

#[test]
fn batch_statistics_without_a_tape_equal_those_with_one() -> Result<()> {
    let mut b = Subject::new(narrow_resnet(9, 7), None)?;
    let x = b.input(40, 21)?;
    let mut tape = b.network.tape();
    let (p, s) = (&b.parameters, &mut b.statistics);
    let with = b.network.forward(p, s, &x, &b.modes, Some(&mut tape))?;
    let mut other = b.network.statistics();
    let without = b.network.forward(p, &mut other, &x, &b.modes, None)?;
    assert_eq!(bits(&with.flatten_all()?.to_vec1()?), bits(&without.flatten_all()?.to_vec1()?));
    assert_eq!(bits(&b.statistics.to_vec()?), bits(&other.to_vec()?));
    assert_ne!(other.to_vec()?, b.network.statistics().to_vec()?);
    Ok(())
}

#[test]
fn running_statistics_follow_the_calls_in_order() -> Result<()> {
    let ops = vec![
        Op::Block("norm"),
        Op::Norm { name: "n", from: 0, relu: false, residual: None },
        Op::Linear { name: "l", from: 1, to: 1 },
    ];
    let mut b = Subject::new(Case { input: (1, 1, 1), ops }, None)?;
    let tensor = |values: &[f32]| Tensor::from_slice(values, (values.len(), 1), &Device::Cpu);
    // Means 2 and 10; variances without bias 4 and 2.
    let (first, second) = (tensor(&[0., 2., 4.])?, tensor(&[9., 11.])?);
    let (p, s) = (&b.parameters, &mut b.statistics);
    b.network.forward(p, s, &first, &b.modes, None)?;
    b.network.forward(p, s, &second, &b.modes, None)?;
    let (mean, variance) = (s.get("n.running_mean")?[0], s.get("n.running_var")?[0]);
    // 0 → 0.2 → 0.18 + 1; 1 → 0.9 + 0.4 → 1.17 + 0.2.
    assert!((mean - 1.18).abs() < 1e-6 && (variance - 1.37).abs() < 1e-6, "{mean} {variance}");

    let before = s.to_vec()?;
    b.modes.set("norm", Mode::Running)?;
    b.network.forward(p, s, &first, &b.modes, None)?;
    assert_eq!(bits(&before), bits(&s.to_vec()?));
    Ok(())
}

#[test]
fn batch_norm_has_the_values_of_pytorch() -> Result<()> {
    let ops = vec![Op::Block("norm"), Op::Norm { name: "n", from: 0, relu: false, residual: None }];
    let mut b = Subject::new(Case { input: (1, 1, 4), ops }, None)?;
    let tensor = |values: &[f32; 8]| Tensor::from_slice(values, (2, 4), &Device::Cpu);
    b.parameters.set("n.weight", &[1.1097001, 1.1646664, 1.0697173, 0.5557224])?;
    b.parameters.set("n.bias", &[1.5391682, -1.3183199, 2.0018475, 1.4401886])?;
    b.statistics.set("n.running_mean", &[0.2593284, -1.5257615, 0.4039752, 0.0910532])?;
    b.statistics.set("n.running_var", &[1.1477896, 1.7735919, 2.1219604, 1.0218018])?;
    let first = tensor(&[
        0.6780094, -0.1780583, 0.3602352, -0.8090167, 1.327_887, 0.8393384, 0.7311046, -1.3008009,
    ])?;
    let second = tensor(&[
        0.6506737, -0.5714458, 1.0604163, -0.2578658, -2.619_886, 0.6758679, -0.2342039, -0.2638858,
    ])?;
    let gradient = tensor(&[
        0.59737, 0.7539789, -0.6467543, 0.7950913, -0.6690153, -1.1613309, 0.3056909, 0.3272201,
    ])?;
    let near = |got: Vec<f32>, want: &[f32]| {
        let off = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0., f32::max);
        assert!(off < 2e-6, "{got:?}, want {want:?}");
    };
    near(
        b.pass(&first, &gradient)?,
        &[0.4295207, -2.4829638, 0.9322857, 1.9958651, 2.6488158, -0.153676, 3.0714093, 0.8845122],
    );
    near(b.statistics.get("n.running_mean")?, &[0.3336904, -1.3401213, 0.4181447, -0.023543]);
    near(b.statistics.get("n.running_var")?, &[1.0541277, 1.6479875, 1.9166416, 0.9317142]);
    near(b.gradients.get("n.weight")?, &[-1.2663254, -1.9152728, 0.9523067, 0.4678325]);
    near(b.gradients.get("n.bias")?, &[-0.0716453, -0.407352, -0.3410635, 1.1223115]);
    b.pass(&second, &gradient)?;
    near(b.statistics.get("n.running_mean")?, &[0.2018607, -1.2008881, 0.4176408, -0.0472762]);
    near(b.statistics.get("n.running_var")?, &[1.4835429, 1.5609783, 1.8087795, 0.8385446]);
    b.modes = Modes::all(&b.network, Mode::Running);
    near(
        b.pass(&second, &gradient)?,
        &[1.9480705, -0.7315637, 2.5130987, 1.3123892, -1.0316544, 0.4311623, 1.4833828, 1.3087359],
    );
    Ok(())
}

#[test]
fn batch_norm_survives_a_mean_far_from_zero() -> Result<()> {
    let ops = vec![
        Op::Block("norm"),
        Op::Norm { name: "n", from: 0, relu: false, residual: None },
        Op::Average { from: 1 },
    ];
    let mut b = Subject::new(Case { input: (9, 8, 3), ops }, None)?;
    b.parameters.set("n.weight", &[1.; 3])?;
    b.parameters.set("n.bias", &[0.; 3])?;
    let input: Vec<f32> = noise(50, b.case.input_len(40)).iter().map(|x| x + 1000.).collect();
    let x = b.case.tensor(40, &input)?;
    let got = b.network.forward(&b.parameters, &mut b.statistics, &x, &b.modes, None)?;
    let parameters = named(&b.parameters)?;
    let want =
        b.case.interpret(40, &wide(&input), &parameters, &Default::default(), |_| Mode::Batch);
    // The rounding of the input is 6e-5, a ten-thousandth of the deviation.
    let got = got.flatten_all()?.to_vec1()?;
    assert!(distance(&got, &want) < 1e-4, "{}", distance(&got, &want));
    let variance = b.statistics.get("n.running_var")?[0];
    // Uniform noise in −1 to 1 has variance 1/3: 0.9 · 1 + 0.1 / 3.
    assert!((variance - 0.9333).abs() < 2e-3, "{variance}");
    Ok(())
}

#[test]
fn frozen_blocks_stay_as_they_are_and_get_no_gradient() -> Result<()> {
    let mut b = Subject::new(narrow_resnet(8, 6), None)?;
    let (x, g) = (b.input(60, 6)?, b.gradient(61, 6)?);
    b.pass(&x, &g)?;
    let free = std::mem::replace(&mut b.gradients, b.network.gradients());
    for block in ["stem", "layer1"] {
        b.parameters.set_trainable(block, false)?;
    }
    assert!(!b.parameters.trainable("stem")? && b.parameters.trainable("head")?);
    b.pass(&x, &g)?;
    let before = b.parameters.clone();
    let mut momenta = b.network.momenta();
    let sgd = Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 0.1 };
    b.parameters.sgd(&b.gradients, &mut momenta, sgd)?;
    let mut moments = b.network.adam_moments();
    let adam =
        Adam { learning_rate: 0.1, beta_1: 0.9, beta_2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
    b.parameters.adam(&b.gradients, &mut moments, adam)?;
    for entry in b.parameters.entries() {
        let name = &entry.name;
        let gradient = b.gradients.get(name)?;
        let (old, new) = (bits(&before.get(name)?), bits(&b.parameters.get(name)?));
        if entry.block < 2 {
            assert!(gradient.iter().all(|g| *g == 0.), "{name}");
            assert_eq!(old, new, "{name}");
            assert!(momenta.get(name)?.iter().all(|m| *m == 0.), "{name}");
        } else {
            assert_eq!(bits(&gradient), bits(&free.get(name)?), "{name}");
            assert_ne!(old, new, "{name}");
        }
    }

    // A frozen block above a trained one passes gradients through and gets none.
    b.parameters = before;
    b.parameters.set_trainable("stem", true)?;
    b.parameters.set_trainable("layer2", false)?;
    b.gradients.zero();
    b.statistics = b.network.statistics();
    b.pass(&x, &g)?;
    assert_eq!(bits(&b.gradients.get("conv1.weight")?), bits(&free.get("conv1.weight")?));
    assert!(b.gradients.get("layer2.conv1.weight")?.iter().all(|g| *g == 0.));
    Ok(())
}

/// Output, parameters and statistics after steps of a narrow ResNet.
fn steps_on(
    threads: usize,
    variant: Variant,
    precision: Precision,
    images: usize,
) -> Result<[Vec<u32>; 3]> {
    let run = || {
        let mut b = Subject::with_precision(narrow_resnet(16, 12), Some(variant), precision)?;
        let (x, g) = (b.input(70, images)?, b.gradient(71, images)?);
        let mut momenta = b.network.momenta();
        let mut output = Vec::new();
        for _ in 0..2 {
            output = b.pass(&x, &g)?;
            let sgd = Sgd { learning_rate: 0.01, momentum: 0.9, weight_decay: 5e-4 };
            b.parameters.sgd(&b.gradients, &mut momenta, sgd)?;
        }
        Ok([bits(&output), bits(&b.parameters.to_vec()?), bits(&b.statistics.to_vec()?)])
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.expect("a pool").install(run)
}

#[test]
fn the_same_bits_on_any_number_of_threads_and_from_run_to_run() -> Result<()> {
    for precision in [Precision::F32, Precision::Bf16] {
        for variant in Variant::testable() {
            // Emulation is slow.
            let images = if variant.name() == "amx-emulated" { 20 } else { 70 };
            let once = steps_on(1, variant, precision, images)?;
            for threads in [1, 2, 3, 8] {
                let again = steps_on(threads, variant, precision, images)?;
                assert!(once == again, "{variant} {precision:?} on {threads} threads");
            }
        }
    }
    Ok(())
}

/// Output and gradients of one pass through a narrow ResNet.
fn pass_with(variant: Option<Variant>, precision: Precision) -> Result<(Vec<f32>, Vec<f32>)> {
    let mut b = Subject::with_precision(narrow_resnet(9, 10), variant, precision)?;
    let (x, g) = (b.input(80, 19)?, b.gradient(81, 19)?);
    let output = b.pass(&x, &g)?;
    Ok((output, b.gradients.to_vec()?))
}

#[test]
fn every_kernel_variant_gives_the_portable_result_up_to_rounding() -> Result<()> {
    // Products of up to 162 terms and sums over 19 images; in f32 each is rounded once or twice.
    // In bf16 a sum that differs in its last bit may round to the next of 256 steps.
    for (precision, bound) in [(Precision::F32, 2e-5), (Precision::Bf16, 2e-2)] {
        let (output, gradients) = pass_with(Some(Variant::PORTABLE), precision)?;
        for variant in Variant::testable() {
            let (other, others) = pass_with(Some(variant), precision)?;
            let off = (distance(&other, &wide(&output)), distance(&others, &wide(&gradients)));
            assert!(off.0 < bound && off.1 < bound, "{variant} {precision:?}: {off:?}");
        }
    }
    Ok(())
}

#[test]
fn bf16_gives_the_f32_result_up_to_its_rounding() -> Result<()> {
    let (output, _) = pass_with(None, Precision::F32)?;
    let (other, _) = pass_with(None, Precision::Bf16)?;
    let off = distance(&other, &wide(&output));
    assert!(1e-4 < off && off < 0.02, "output: {off}");

    // Gradients without ReLU and max-pool, where a rounding can change which values pass: roundings of
    // 2⁻⁸ through seven layers forward and back, mostly averaged out.
    let mut case = narrow_resnet(9, 10);
    for op in &mut case.ops {
        match op {
            Op::Norm { relu, .. } => *relu = false,
            Op::Max { kernel, stride, pad, .. } => (*kernel, *stride, *pad) = (1, 1, 0),
            _ => {}
        }
    }
    let run = |precision| -> Result<Subject> {
        let mut b = Subject::with_precision(case.clone(), None, precision)?;
        let (x, g) = (b.input(80, 19)?, b.gradient(81, 19)?);
        b.pass(&x, &g)?;
        Ok(b)
    };
    let (f32s, halves) = (run(Precision::F32)?, run(Precision::Bf16)?);
    // Gradients of biases before another norm are near zero, so relative errors mean nothing.
    for entry in f32s.gradients.entries().iter().filter(|e| e.kind != EntryKind::NormBias) {
        let (want, got) = (f32s.gradients.get(&entry.name)?, halves.gradients.get(&entry.name)?);
        let length = |values: &mut dyn Iterator<Item = f32>| -> f32 {
            values.map(|value| value * value).sum::<f32>().sqrt()
        };
        let off = length(&mut want.iter().zip(&got).map(|(w, g)| w - g));
        let off = off / length(&mut want.iter().copied());
        assert!(off < 0.02, "{}: {off}", entry.name);
    }
    Ok(())
}

#[test]
fn parameters_fit_networks_of_both_precisions() -> Result<()> {
    let b = Subject::new(narrow_resnet(6, 6), None)?;
    let half = b.network.with_precision(Precision::Bf16);
    assert_eq!((half.precision(), b.network.precision()), (Precision::Bf16, Precision::F32));
    let (x, mut s) = (b.input(85, 4)?, b.network.statistics());
    let wide_output = b.network.forward(&b.parameters, &mut s, &x, &b.modes, None)?;
    let half_output = half.forward(&b.parameters, &mut s, &x, &b.modes, None)?;
    let again = b.network.forward(&b.parameters, &mut s, &x, &b.modes, None)?;
    let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    assert_eq!(bits(&flat(&wide_output)?), bits(&flat(&again)?));
    assert_ne!(bits(&flat(&wide_output)?), bits(&flat(&half_output)?));
    // A tape of the one is not a tape of the other.
    let mut tape = b.network.tape();
    let y = b.network.forward(&b.parameters, &mut s, &x, &b.modes, Some(&mut tape))?;
    let mut gradients = half.gradients();
    assert!(half.backward(&b.parameters, &mut tape, &y, &mut gradients, false).is_err());
    Ok(())
}

#[test]
fn sgd_matches_the_published_numbers() -> Result<()> {
    let ops = vec![Op::Block("all"), Op::Linear { name: "l", from: 0, to: 1 }];
    let mut b = Subject::new(Case { input: (1, 1, 1), ops }, None)?;
    b.parameters.set("l.weight", &[1.])?;
    // The gradient of the weight is input · gradient = 0.1.
    let (x, g) = (
        Tensor::from_slice(&[0.1f32], (1, 1), &Device::Cpu)?,
        Tensor::from_slice(&[1f32], (1, 1), &Device::Cpu)?,
    );
    b.pass(&x, &g)?;
    let mut momenta = b.network.momenta();
    let sgd = Sgd { learning_rate: 0.05, momentum: 0.9, weight_decay: 5e-4 };
    for want in [0.994_975, 0.985_427_63f64] {
        b.parameters.sgd(&b.gradients, &mut momenta, sgd)?;
        let got = f64::from(b.parameters.get("l.weight")?[0]);
        assert!((got - want).abs() < 1e-7, "{got}, want {want}");
    }
    // A learning rate of 0 moves nothing but still updates the momentum.
    let (held, momentum) = (b.parameters.get("l.weight")?, momenta.get("l.weight")?);
    b.parameters.sgd(&b.gradients, &mut momenta, Sgd { learning_rate: 0., ..sgd })?;
    assert_eq!(held, b.parameters.get("l.weight")?);
    assert_ne!(momentum, momenta.get("l.weight")?);
    // A run resumes from its momenta.
    let (mut resumed, mut again) = (b.network.momenta(), b.parameters.clone());
    for entry in momenta.entries().to_vec() {
        resumed.set(&entry.name, &momenta.get(&entry.name)?)?;
    }
    again.sgd(&b.gradients, &mut resumed, sgd)?;
    b.parameters.sgd(&b.gradients, &mut momenta, sgd)?;
    assert_eq!(bits(&again.to_vec()?), bits(&b.parameters.to_vec()?));
    Ok(())
}

#[test]
fn adam_matches_hand_computation() -> Result<()> {
    let ops = vec![Op::Block("all"), Op::Linear { name: "l", from: 0, to: 1 }];
    let mut b = Subject::new(Case { input: (1, 1, 1), ops }, None)?;
    b.parameters.set("l.weight", &[1.])?;
    let (x, g) = (
        Tensor::from_slice(&[0.5f32], (1, 1), &Device::Cpu)?,
        Tensor::from_slice(&[1f32], (1, 1), &Device::Cpu)?,
    );
    b.pass(&x, &g)?;
    let mut moments = b.network.adam_moments();
    let adam =
        Adam { learning_rate: 0.1, beta_1: 0.9, beta_2: 0.99, epsilon: 1e-3, weight_decay: 0.2 };
    let (mut p, mut m, mut v) = (1f64, 0f64, 0f64);
    for step in 1..=3 {
        let gradient = 0.5 + 0.2 * p;
        m = 0.9 * m + 0.1 * gradient;
        v = 0.99 * v + 0.01 * gradient * gradient;
        let root = (v / (1. - 0.99f64.powi(step))).sqrt() + 1e-3;
        p -= 0.1 * m / (1. - 0.9f64.powi(step)) / root;
        b.parameters.adam(&b.gradients, &mut moments, adam)?;
        let got = f64::from(b.parameters.get("l.weight")?[0]);
        assert!((got - p).abs() < 1e-6, "step {step}: {got}, want {p}");
    }
    assert_eq!(moments.steps(), 3);
    Ok(())
}

#[test]
fn the_target_follows_as_published() -> Result<()> {
    let ops = vec![Op::Block("all"), Op::Linear { name: "l", from: 0, to: 2 }];
    let case = Case { input: (1, 1, 1), ops };
    let network = case.network(None)?;
    let (mut target, mut online) = (network.parameters(), network.parameters());
    online.set("l.bias", &[1., 2.])?;
    for _ in 0..3 {
        target.follow(&online, 0.996)?;
    }
    let got = target.get("l.bias")?;
    assert!(
        (f64::from(got[0]) - 0.01195206).abs() < 1e-8
            && (f64::from(got[1]) - 0.02390413).abs() < 2e-8,
        "{got:?}"
    );
    let still = target.clone();
    target.follow(&online, 1.)?;
    assert_eq!(bits(&still.to_vec()?), bits(&target.to_vec()?));
    target.follow(&online, 0.)?;
    assert_eq!(bits(&online.to_vec()?), bits(&target.to_vec()?));
    assert!(target.follow(&online, 1.5).is_err());
    Ok(())
}

#[test]
fn layers_match_hand_computation() -> Result<()> {
    // 2 × 3 pixels, one channel; weights 1 to 9; stride 2, padding 1: two output pixels at
    // (0, 0) and (0, 1) of the input's even columns.
    let ops = vec![
        Op::Block("all"),
        Op::Conv { name: "c", from: 0, to: 1, kernel: 3, stride: 2, pad: 1 },
        Op::Average { from: 1 },
        Op::Linear { name: "l", from: 2, to: 2 },
    ];
    let mut b = Subject::new(Case { input: (2, 3, 1), ops }, None)?;
    b.parameters.set("c.weight", &[1., 2., 3., 4., 5., 6., 7., 8., 9.])?;
    b.parameters.set("l.weight", &[1., -2.])?;
    b.parameters.set("l.bias", &[0.5, 0.25])?;
    let x = Tensor::from_slice(&[1f32, -2., 3., 4., 0., -1.], (1, 2, 3, 1), &Device::Cpu)?;
    let g = Tensor::from_slice(&[1f32, 0.], (1, 2), &Device::Cpu)?;
    let output = b.pass(&x, &g)?;
    // Left: 5·1 + 6·(−2) + 8·4 + 9·0 = 25. Right: 4·(−2) + 5·3 + 7·0 + 8·(−1) = −1. Mean 12.
    assert_eq!(output, [12.5, -23.75]);
    // Half of the input under each tap: left (5: 1, 6: −2, 8: 4, 9: 0), right (4: −2, 5: 3, 7: 0, 8: −1).
    assert_eq!(b.gradients.get("c.weight")?, [0., 0., 0., -1., 2., -1., 0., 1.5, 0.]);
    assert_eq!(b.gradients.get("l.weight")?, [12., 0.]);
    assert_eq!(b.gradients.get("l.bias")?, [1., 0.]);
    Ok(())
}

#[test]
fn max_pool_takes_the_first_of_equal_values_and_ignores_the_border() -> Result<()> {
    let ops = vec![
        Op::Block("all"),
        Op::Max { from: 0, kernel: 2, stride: 2, pad: 1 },
        Op::Average { from: 1 },
    ];
    let b = Subject::new(Case { input: (2, 3, 1), ops }, None)?;
    // Windows: {−5}, {−1, −1}, {−3}, {−1, −2}: zeros at the border would win.
    let x = Tensor::from_slice(&[-5f32, -1., -1., -3., -1., -2.], (1, 2, 3, 1), &Device::Cpu)?;
    let mut tape = b.network.tape();
    let mut statistics = b.network.statistics();
    let network = &b.network;
    let y = network.forward(&b.parameters, &mut statistics, &x, &b.modes, Some(&mut tape))?;
    assert_eq!(y.to_vec2::<f32>()?, [[-2.5]]);
    let g = Tensor::from_slice(&[4f32], (1, 1), &Device::Cpu)?;
    let mut gradients = network.gradients();
    let dx = network.backward(&b.parameters, &mut tape, &g, &mut gradients, true)?;
    let dx = dx.expect("asked for").flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(dx, [1., 1., 0., 1., 1., 0.]);
    Ok(())
}

#[test]
fn invalid_arguments_are_errors_that_name_them() -> Result<()> {
    let mut b = Subject::new(narrow_resnet(8, 8), None)?;
    let says = |result: Result<Tensor>, words: &[&str]| {
        let error = result.expect_err("an error").to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let (p, s, modes) = (&b.parameters, &mut b.statistics, &b.modes);
    let mut run = |input: &Tensor| b.network.forward(p, s, input, modes, None);
    says(run(&zeros(&[2, 8, 8, 4], DType::F32)?), &["(N, H, W, 3)", "[2, 8, 8, 4]"]);
    says(run(&zeros(&[2, 3], DType::F32)?), &["(N, H, W, 3)"]);
    says(run(&zeros(&[0, 8, 8, 3], DType::F32)?), &["empty"]);
    says(run(&zeros(&[2, 8, 8, 3], DType::F64)?), &["F64", "f32"]);
    // One image of one pixel: the variance of a single value.
    says(run(&zeros(&[1, 1, 1, 3], DType::F32)?), &["bn1", "single value"]);

    let x = b.input(1, 2)?;
    let mut tape = b.network.tape();
    let (p, s) = (&b.parameters, &mut b.statistics);
    let y = b.network.forward(p, s, &x, &b.modes, Some(&mut tape))?;
    says(b.network.forward(p, s, &x, &b.modes, Some(&mut tape)), &["tape", "clear"]);
    let wrong = zeros(&[3, 5], DType::F32)?;
    let g = &mut b.gradients;
    assert!(b.network.backward(p, &mut tape, &wrong, g, false).is_err());
    let other = Subject::new(narrow_resnet(8, 8), None)?;
    let changed = b.network.backward(&other.parameters, &mut tape, &y, g, false);
    assert!(changed.expect_err("other parameters").to_string().contains("changed"));
    b.network.backward(p, &mut tape, &y, g, false)?;
    assert!(b.network.backward(p, &mut tape, &y, g, false).is_err());

    // Arguments of another network.
    let ops = vec![Op::Block("all"), Op::Linear { name: "l", from: 0, to: 2 }];
    let mut foreign = Subject::new(Case { input: (1, 1, 3), ops }, None)?;
    assert!(b.network.forward(&foreign.parameters, s, &x, &b.modes, None).is_err());
    assert!(b.network.forward(p, &mut foreign.statistics, &x, &b.modes, None).is_err());
    assert!(b.network.forward(p, s, &x, &foreign.modes, None).is_err());
    assert!(b.gradients.add(&foreign.gradients).is_err());
    assert!(b.parameters.follow(&foreign.parameters, 0.5).is_err());
    assert!(b.modes.set("layer9", Mode::Running).is_err());
    assert!(b.parameters.set_trainable("layer9", false).is_err());

    // Invalid values of a parameter.
    assert!(b.parameters.set("fc.bias", &[0.; 4]).is_err());
    let error = b.parameters.set("fc.bias", &[0., f32::NAN, 0., 0., 0.]).expect_err("a NaN");
    assert!(error.to_string().contains("fc.bias"), "{error}");
    assert!(b.parameters.get("fc.scale").is_err());
    Ok(())
}

#[test]
fn invalid_plans_are_errors() {
    use layers::{BatchNorm, Builder, Convolution, Pool};
    let good = Convolution { out_channels: 4, kernel: 3, stride: 1, padding: 1 };
    let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
    let begin = || {
        let mut b = Builder::images(3);
        b.block("all");
        (b.input(), b)
    };
    let mut none = Builder::images(3);
    let input = none.input();
    assert!(none.convolution("c", input, good).is_err(), "no block");
    for bad in [
        Convolution { out_channels: 0, ..good },
        Convolution { kernel: 0, ..good },
        Convolution { stride: 0, ..good },
        Convolution { padding: 3, ..good },
        Convolution { out_channels: usize::MAX / 64, ..good },
    ] {
        let (x, mut b) = begin();
        assert!(b.convolution("c", x, bad).is_err(), "{bad:?}");
    }
    let (x, mut b) = begin();
    let y = b.convolution("c", x, good).expect("a convolution");
    assert!(b.convolution("c", y, good).is_err(), "name taken");
    assert!(b.linear("l", y, 3).is_err(), "a map");
    assert!(b.batch_norm("n", y, BatchNorm { epsilon: 0., ..norm }).is_err());
    assert!(b.batch_norm("n", y, BatchNorm { momentum: 1.5, ..norm }).is_err());
    assert!(b.batch_norm("n", y, BatchNorm { residual: Some(x), ..norm }).is_err());
    for bad in [(0, 1, 0), (3, 0, 1), (3, 2, 2), (17, 1, 0)] {
        let (kernel, stride, padding) = bad;
        assert!(b.max_pool(y, Pool { kernel, stride, padding }).is_err(), "{bad:?}");
    }
    let (_, foreign) = begin();
    assert!(b.global_average_pool(foreign.input()).is_err(), "another builder's value");
    assert!(b.finish(y).is_err(), "ends in a map");
    // A residual of another size is only found when the size of the input is known.
    let (x, mut b) = begin();
    let small = b.convolution("s", x, Convolution { stride: 2, ..good }).expect("small");
    let large = b.convolution("c", x, good).expect("large");
    let y = b.batch_norm("n", large, BatchNorm { residual: Some(small), ..norm }).expect("norm");
    let y = b.global_average_pool(y).expect("features");
    let network = b.finish(y).expect("a network");
    let input = Tensor::zeros((2, 4, 4, 3), DType::F32, &Device::Cpu).expect("zeros");
    let (p, mut s) = (network.parameters(), network.statistics());
    let error = network.forward(&p, &mut s, &input, &batch(&network), None);
    assert!(error.expect_err("shapes").to_string().contains("residual"));
}

#[test]
fn a_diverged_gradient_is_named() -> Result<()> {
    let mut b = Subject::new(narrow_resnet(5, 5), None)?;
    let (x, g) = (b.input(90, 3)?, b.gradient(91, 3)?);
    b.pass(&x, &g)?;
    assert!(b.gradients.is_finite()?);
    let g = (g * f64::INFINITY)?;
    b.pass(&x, &g)?;
    assert!(!b.gradients.is_finite()?);
    assert_eq!(b.gradients.first_non_finite()?, Some("conv1.weight"));
    Ok(())
}
