//! Where the time of a backbone goes: for ResNets of the sizes that the experiments use, a table of layer
//! kind × direction with milliseconds a step, share of the processor's peak and bytes moved. Whole steps
//! of BYOL: `cargo xtask bench train -- --profile`.
//!
//! `cargo run --example speed -p layers [-- r18-32|r34-96|r34-224|digits [f32|bf16 [batch]]]`;
//! `ASSORT_KERNEL` chooses the kernels and `RAYON_NUM_THREADS` the threads. A step here is one
//! forward pass with a tape, one without, a backward pass and an update.

use candle_core::{DType, Device, Result, Tensor};
use layers::profile::{self, Table};
use layers::{BatchNorm, Builder, Convolution, Mode, Modes, Network, Precision, Sgd, Value};

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let (what, precision, batch) = (words.next(), words.next(), words.next());
    let batch: Option<usize> = batch.and_then(|batch| batch.parse().ok());
    for (name, channels, width, blocks, large, side, usual) in [
        ("r18-32", 3, 64, [2; 4], false, 32, 128),
        ("r34-96", 3, 64, [3, 4, 6, 3], true, 96, 64),
        ("r34-224", 3, 64, [3, 4, 6, 3], true, 224, 16),
        ("digits", 1, 16, [1; 4], false, 8, 64),
    ] {
        for (word, stored) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            let wanted = what.as_deref().is_none_or(|what| what == name)
                && precision.as_deref().is_none_or(|precision| precision == word);
            if wanted {
                let batch = batch.unwrap_or(usual);
                println!("{name} {word}, batch {batch}");
                let network = resnet(channels, width, blocks, large)?.with_precision(stored);
                step(&network, [batch, side, channels])?;
            }
        }
    }
    Ok(())
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608. - 1.
    };
    (0..len).map(|_| next()).collect()
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

fn step(network: &Network, [batch, side, channels]: [usize; 3]) -> Result<()> {
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
    let mut step = || -> Result<()> {
        network.forward(&parameters, &mut statistics, &input, &modes, None)?;
        network.forward(&parameters, &mut statistics, &input, &modes, Some(&mut tape))?;
        network.backward(&parameters, &mut tape, &gradient, &mut gradients, false)?;
        parameters.sgd(&gradients, &mut momenta, sgd)?;
        gradients.zero();
        Ok(())
    };
    step()?;
    let mut result = Ok(());
    let table = profile::record(|| result = (0..STEPS).try_for_each(|_| step()));
    result?;
    println!("{}", Table { rows: &table, steps: STEPS, network });
    Ok(())
}

/// Steps that a table is the mean of.
const STEPS: usize = 3;
