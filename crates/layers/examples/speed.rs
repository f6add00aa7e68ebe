//! Times the convolutions of a ResNet-18 on 32 × 32 pictures layer by layer, and whole steps of it,
//! of a ResNet-34 on 96 × 96 and of the small one for digits.
//!
//! `cargo run --example speed -p layers [-- layers|resnet|digits [f32|bf16]]`; `ASSORT_KERNEL`
//! chooses the kernels and `RAYON_NUM_THREADS` the threads. Best of several repetitions.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use kernels::convolution::{self, Finish, Geometry};
use kernels::{Buffer, Pool, Shape, Variant};
use layers::{BatchNorm, Builder, Convolution, Mode, Modes, Network, Precision, Sgd, Value};

fn main() -> Result<()> {
    let what = std::env::args().nth(1);
    let wants = |name: &str| what.as_deref().is_none_or(|w| w == name);
    let variant = Variant::selected().map_err(candle_core::Error::msg)?;
    println!("{variant} kernels, {} threads", rayon::current_num_threads());
    for precision in [Precision::F32, Precision::Bf16] {
        let name = if precision == Precision::F32 { "f32" } else { "bf16" };
        if std::env::args().nth(2).is_none_or(|only| only == name) {
            println!("{name}");
            run(variant, precision, &wants)?;
        }
    }
    Ok(())
}

fn run(variant: Variant, precision: Precision, wants: &dyn Fn(&str) -> bool) -> Result<()> {
    if wants("layers") {
        for (count, from, to, side, kernel, stride) in [
            (1, 3, 64, 32, 3, 1),
            (4, 64, 64, 32, 3, 1),
            (1, 64, 128, 32, 3, 2),
            (3, 128, 128, 16, 3, 1),
            (1, 128, 256, 16, 3, 2),
            (3, 256, 256, 8, 3, 1),
            (1, 256, 512, 8, 3, 2),
            (3, 512, 512, 4, 3, 1),
            (1, 64, 128, 32, 1, 2),
        ] {
            layer(variant, precision, count, Shape::new(64, side, side, from), to, kernel, stride);
        }
    }
    if wants("resnet") {
        let network = resnet(3, 64, [2; 4], false)?.with_precision(precision);
        step("ResNet-18 @32, batch 64", &network, [64, 32, 3, 3])?;
        let network = resnet(3, 64, [3, 4, 6, 3], true)?.with_precision(precision);
        step("ResNet-34 @96, batch 64", &network, [64, 96, 3, 3])?;
    }
    if wants("digits") {
        step(
            "ResNet-10 @8, width 16, batch 64",
            &resnet(1, 16, [1; 4], false)?.with_precision(precision),
            [64, 8, 1, 60],
        )?;
    }
    Ok(())
}

fn best(repetitions: usize, mut run: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..repetitions {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608. - 1.
    };
    (0..len).map(|_| next()).collect()
}

fn layer(
    variant: Variant,
    precision: Precision,
    count: usize,
    input: Shape,
    to: usize,
    kernel: usize,
    stride: usize,
) {
    let Some(g) = Geometry::new(input, to, kernel, stride, kernel / 2) else { return };
    let flops = 2. * (g.output.count() * g.weights_len()) as f64;
    let value = |shape: Shape| {
        let mut value = Buffer::zeros_of(precision, shape.len());
        shape.pack(&noise(shape.count() * shape.channels), &mut value);
        value
    };
    let (x, dy, mut y, mut dx) = (value(input), value(g.output), value(g.output), value(input));
    let weights = noise(g.weights_len());
    let mut packed = Buffer::zeros_of(precision, g.packed_len());
    let pool = Pool::new();
    let mut dw = vec![0.; g.weights_len()];
    let pack = best(4, || convolution::pack_forward(&g, &weights, &mut packed));
    let forward =
        best(6, || convolution::forward(variant, &g, &x, &packed, Finish::default(), &mut y, None));
    convolution::pack_backward(&g, &weights, &mut packed);
    let back = best(6, || convolution::input_gradient(variant, &g, &dy, &packed, &mut dx, false));
    let weight = best(6, || convolution::weight_gradient(variant, &g, &x, &dy, &pool, &mut dw));
    let show =
        |seconds: f64| format!("{:7.2} ms {:4.0} GF/s", 1e3 * seconds, flops / seconds / 1e9);
    println!(
        "{count} x {:3} -> {to:3} @{:2} {kernel}x{kernel}/{stride}: forward {}  dX {}  dW {}  pack {:.2} ms",
        input.channels,
        input.width,
        show(forward),
        show(back),
        show(weight),
        1e3 * pack
    );
}

/// A ResNet of basic blocks, as many as asked for in each stage; its stem is 3×3 or, for large
/// pictures, 7×7 with stride 2 and a max-pool.
fn resnet(channels: usize, width: usize, blocks: [usize; 4], large: bool) -> Result<Network> {
    let mut b = Builder::images(channels);
    let norm = |relu, residual| BatchNorm { epsilon: 1e-5, momentum: 0.1, relu, residual };
    let conv = |b: &mut Builder, name: &str, x, out_channels, kernel, stride| {
        b.convolution(name, x, Convolution { out_channels, kernel, stride, padding: kernel / 2 })
    };
    b.block("stem");
    let input = b.input();
    let (kernel, stride) = if large { (7, 2) } else { (3, 1) };
    let x = conv(&mut b, "conv1", input, width, kernel, stride)?;
    let mut x: Value = b.batch_norm("bn1", x, norm(true, None))?;
    if large {
        x = b.max_pool(x, layers::Pool { kernel: 3, stride: 2, padding: 1 })?;
    }
    for (stage, blocks) in blocks.into_iter().enumerate() {
        let out = width << stage;
        for block in 0..blocks {
            let name = format!("layer{}.{block}", stage + 1);
            b.block(&name);
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let shortcut = if stride == 2 {
                let z = conv(&mut b, &format!("{name}.downsample.0"), x, out, 1, stride)?;
                b.batch_norm(&format!("{name}.downsample.1"), z, norm(false, None))?
            } else {
                x
            };
            let z = conv(&mut b, &format!("{name}.conv1"), x, out, 3, stride)?;
            let y = b.batch_norm(&format!("{name}.bn1"), z, norm(true, None))?;
            let z = conv(&mut b, &format!("{name}.conv2"), y, out, 3, 1)?;
            x = b.batch_norm(&format!("{name}.bn2"), z, norm(true, Some(shortcut)))?;
        }
    }
    let output = b.global_average_pool(x)?;
    b.finish(output)
}

fn step(
    title: &str,
    network: &Network,
    [batch, side, channels, repetitions]: [usize; 4],
) -> Result<()> {
    let mut parameters = network.parameters();
    for entry in parameters.entries().to_vec() {
        if entry.shape.len() > 1 {
            let fan: usize = entry.shape[1..].iter().product();
            let scale = (2. / fan as f32).sqrt();
            let values: Vec<f32> = noise(entry.range.len()).iter().map(|x| x * scale).collect();
            parameters.set(&entry.name, &values)?;
        }
    }
    let input = Tensor::from_vec(
        noise(batch * side * side * channels),
        (batch, side, side, channels),
        &Device::Cpu,
    )?;
    let gradient = Tensor::ones((batch, network.output_width()), DType::F32, &Device::Cpu)?;
    let modes = Modes::all(network, Mode::Batch);
    let (mut statistics, mut gradients) = (network.statistics(), network.gradients());
    let (mut momenta, mut tape) = (network.momenta(), network.tape());
    let sgd = Sgd { learning_rate: 1e-4, momentum: 0.9, weight_decay: 5e-4 };
    let mut error = None;
    let (mut forward, mut backward, mut update) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    let bare = best(repetitions, || {
        let all = (|| -> Result<()> {
            network.forward(&parameters, &mut statistics, &input, &modes, None)?;
            Ok(())
        })();
        error = all.err();
    });
    let all = best(repetitions, || {
        let all = (|| -> Result<()> {
            let start = Instant::now();
            network.forward(&parameters, &mut statistics, &input, &modes, Some(&mut tape))?;
            forward = forward.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            network.backward(&parameters, &mut tape, &gradient, &mut gradients, false)?;
            backward = backward.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            parameters.sgd(&gradients, &mut momenta, sgd)?;
            gradients.zero();
            update = update.min(start.elapsed().as_secs_f64());
            Ok(())
        })();
        error = all.err();
    });
    if let Some(error) = error {
        return Err(error);
    }
    println!(
        "{title}: step {:.2} ms (forward {:.2}, backward {:.2}, update {:.2}); without tape {:.2}",
        1e3 * all,
        1e3 * forward,
        1e3 * backward,
        1e3 * update,
        1e3 * bare
    );
    Ok(())
}
