//! Compares every layer, and a whole network, with an interpreter in f64 and its central differences.

#[expect(dead_code, reason = "other tests use the rest")]
mod reference;

use candle_core::{Result, Tensor};
use layers::{Mode, Modes};
use reference::{Case, Named, Op, distance, fill, named, narrow_resnet, noise, wide};

/// Compares output, parameter gradients and input gradient of one forward and backward pass.
fn check(case: &Case, n: usize, modes: &[(&str, Mode)]) -> Result<()> {
    let network = case.network(None)?;
    let mut parameters = network.parameters();
    fill(&mut parameters, 1)?;
    let mut statistics = network.statistics();
    for entry in statistics.entries().to_vec() {
        let shift = if entry.name.ends_with("var") { 1.5 } else { 0. };
        let values: Vec<f32> =
            noise(9, entry.range.len()).iter().map(|x| x * 0.5 + shift).collect();
        statistics.set(&entry.name, &values)?;
    }
    let running: Named = statistics
        .entries()
        .iter()
        .map(|e| Ok((e.name.clone(), wide(&statistics.get(&e.name)?))))
        .collect::<Result<_>>()?;
    let mut all = Modes::all(&network, Mode::Batch);
    for (block, mode) in modes {
        all.set(block, *mode)?;
    }
    let mode = |block: &str| modes.iter().find(|m| m.0 == block).map_or(Mode::Batch, |m| m.1);

    let input = noise(3, case.input_len(n));
    let weights = noise(4, n * network.output_width());
    let mut tape = network.tape();
    let x = case.tensor(n, &input)?;
    let output = network.forward(&parameters, &mut statistics, &x, &all, Some(&mut tape))?;
    let mut gradients = network.gradients();
    let gradient = Tensor::from_slice(&weights, (n, network.output_width()), x.device())?;
    let input_gradient =
        network.backward(&parameters, &mut tape, &gradient, &mut gradients, true)?;
    assert!(tape.is_empty());

    let values = named(&parameters)?;
    let wide_input = wide(&input);
    let want = case.interpret(n, &wide_input, &values, &running, mode);
    let got = output.flatten_all()?.to_vec1::<f32>()?;
    assert!(distance(&got, &want) < 2e-6, "{case:?}: output is {} off", distance(&got, &want));

    let loss = |parameters: &Named, input: &[f64]| -> f64 {
        let output = case.interpret(n, input, parameters, &running, mode);
        output.iter().zip(&weights).map(|(o, w)| o * f64::from(*w)).sum()
    };
    let step = 1e-7; // So small that hardly any ReLU or maximum switches.
    for entry in parameters.entries() {
        let got = gradients.get(&entry.name)?;
        let (mut some, mut want) = (Vec::new(), Vec::new());
        for at in (0..got.len()).step_by(got.len().div_ceil(6)) {
            let mut moved = values.clone();
            let mut at_offset = |offset: f64| {
                let value = values[&entry.name][at] + offset;
                moved.get_mut(&entry.name).expect("an entry")[at] = value;
                loss(&moved, &wide_input)
            };
            want.push((at_offset(step) - at_offset(-step)) / (2. * step));
            some.push(got[at]);
        }
        let off = distance(&some, &want);
        assert!(off < 3e-5, "{case:?}: {} is {off} off: {some:?}, want {want:?}", entry.name);
    }
    let got = input_gradient.expect("asked for").flatten_all()?.to_vec1::<f32>()?;
    let (mut some, mut want) = (Vec::new(), Vec::new());
    for at in (0..got.len()).step_by(got.len().div_ceil(12)) {
        let at_offset = |offset: f64| {
            let mut moved = wide_input.clone();
            moved[at] += offset;
            loss(&values, &moved)
        };
        want.push((at_offset(step) - at_offset(-step)) / (2. * step));
        some.push(got[at]);
    }
    let off = distance(&some, &want);
    assert!(off < 3e-5, "{case:?}: the input gradient is {off} off: {some:?}, want {want:?}");
    Ok(())
}

/// A layer after a norm of `c` channels, so that its input needs a gradient.
fn after_norm(h: usize, w: usize, c: usize, op: Op) -> Case {
    let norm = Op::Norm { name: "first", from: 0, relu: false, residual: None };
    Case { input: (h, w, c), ops: vec![Op::Block("all"), norm, op, Op::Average { from: 2 }] }
}

#[test]
fn convolutions_of_every_kind() -> Result<()> {
    for (from, to, kernel, stride, pad, h, w) in [
        (3, 5, 3, 1, 1, 5, 4),
        (17, 33, 3, 1, 1, 3, 4),
        // Large enough for Winograd's form.
        (17, 18, 3, 1, 1, 7, 6),
        (4, 6, 3, 2, 1, 5, 6),
        (4, 6, 3, 2, 1, 1, 1),
        (3, 4, 7, 2, 3, 9, 6),
        (3, 4, 7, 2, 3, 3, 2),
        (5, 18, 1, 1, 0, 3, 2),
        (20, 7, 1, 2, 0, 4, 5),
        (2, 3, 5, 3, 2, 7, 8),
        (2, 3, 2, 2, 0, 5, 4),
        (1, 1, 4, 1, 3, 2, 3),
    ] {
        check(
            &after_norm(h, w, from, Op::Conv { name: "c", from: 1, to, kernel, stride, pad }),
            3,
            &[],
        )?;
    }
    Ok(())
}

#[test]
fn convolution_of_many_pixels_and_images() -> Result<()> {
    // More than one part of pixels, group of images and block of channels.
    let conv = Op::Conv { name: "c", from: 1, to: 35, kernel: 3, stride: 1, pad: 1 };
    check(&after_norm(5, 7, 19, conv), 19, &[])
}

#[test]
fn max_pools() -> Result<()> {
    for (kernel, stride, pad, h, w) in
        [(3, 2, 1, 5, 4), (3, 2, 1, 6, 7), (2, 2, 0, 4, 5), (2, 2, 1, 4, 5), (3, 1, 1, 3, 2)]
    {
        check(&after_norm(h, w, 18, Op::Max { from: 1, kernel, stride, pad }), 3, &[])?;
    }
    Ok(())
}

#[test]
fn batch_norms_in_both_modes() -> Result<()> {
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
        check(&case, 5, &[("norm", Mode::Running)])?;
    }
    Ok(())
}

#[test]
fn a_norm_whose_residual_is_its_own_input() -> Result<()> {
    let ops = vec![
        Op::Block("all"),
        Op::Conv { name: "c", from: 0, to: 4, kernel: 3, stride: 1, pad: 1 },
        Op::Norm { name: "n", from: 1, relu: true, residual: Some(1) },
        Op::Average { from: 2 },
    ];
    check(&Case { input: (4, 3, 2), ops }, 3, &[])
}

#[test]
fn linear_layers_with_norm_and_relu() -> Result<()> {
    for (input, hidden, output) in [(7, 5, 3), (20, 40, 33), (16, 16, 16)] {
        let ops = vec![
            Op::Block("head"),
            Op::Linear { name: "a", from: 0, to: hidden },
            Op::Norm { name: "n", from: 1, relu: true, residual: None },
            Op::Linear { name: "b", from: 2, to: hidden },
            Op::Relu { from: 3 },
            Op::Linear { name: "c", from: 4, to: output },
        ];
        check(&Case { input: (1, 1, input), ops }, 21, &[])?;
    }
    Ok(())
}

#[test]
fn a_narrow_resnet() -> Result<()> {
    check(&narrow_resnet(9, 7), 4, &[])
}

#[test]
fn a_resnet_wide_enough_for_winograds_form() -> Result<()> {
    let mut case = narrow_resnet(13, 12);
    for op in &mut case.ops {
        if let Op::Conv { to, .. } = op {
            *to += 11;
        }
    }
    check(&case, 5, &[])
}

#[test]
fn a_narrow_resnet_with_blocks_in_both_modes_and_a_last_batch_of_37() -> Result<()> {
    check(&narrow_resnet(4, 3), 37, &[("layer1", Mode::Running)])
}
