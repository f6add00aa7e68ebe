//! Networks defined once and run twice: by `layers`, and by an independent interpreter in f64.
//!
//! The interpreter follows the definitions loop by loop, (N, H, W, C). It has no backward pass:
//! gradients are compared with central differences of its loss.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};
use kernels::Variant;
use layers::{BatchNorm, Builder, Convolution, Mode, Modes, Network, Parameters, Pool, Value};

pub const EPSILON: f64 = 1e-5;

/// One operation. `from` is the index of a value: 0 is the input, then one for each operation except
/// `Block`.
#[derive(Clone, Debug)]
pub enum Op {
    Block(&'static str),
    Conv { name: &'static str, from: usize, to: usize, kernel: usize, stride: usize, pad: usize },
    Norm { name: &'static str, from: usize, relu: bool, residual: Option<usize> },
    Relu { from: usize },
    Max { from: usize, kernel: usize, stride: usize, pad: usize },
    Average { from: usize },
    Linear { name: &'static str, from: usize, to: usize },
}

/// A network and the size of its input: (H, W, C), or features (1, 1, D).
#[derive(Clone, Debug)]
pub struct Case {
    pub input: (usize, usize, usize),
    pub ops: Vec<Op>,
}

/// A map of the interpreter: (N, H, W, C).
#[derive(Clone)]
pub struct Map {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    v: Vec<f64>,
}

impl Map {
    fn zeros(n: usize, h: usize, w: usize, c: usize) -> Map {
        Map { n, h, w, c, v: vec![0.; n * h * w * c] }
    }

    fn at(&self, n: usize, y: usize, x: usize, c: usize) -> usize {
        ((n * self.h + y) * self.w + x) * self.c + c
    }
}

pub type Named = HashMap<String, Vec<f64>>;

impl Case {
    pub fn network(&self, variant: Option<Variant>) -> Result<Network> {
        let channels = self.input.2;
        let mut b = if self.takes_images() {
            Builder::images(channels)
        } else {
            Builder::features(channels)
        };
        let mut values: Vec<Value> = vec![b.input()];
        for op in &self.ops {
            let value = match *op {
                Op::Block(name) => {
                    b.block(name);
                    continue;
                }
                Op::Conv { name, from, to: out_channels, kernel, stride, pad: padding } => {
                    let c = Convolution { out_channels, kernel, stride, padding };
                    b.convolution(name, values[from], c)?
                }
                Op::Norm { name, from, relu, residual } => {
                    let residual = residual.map(|r| values[r]);
                    let norm = BatchNorm { epsilon: EPSILON, momentum: 0.1, relu, residual };
                    b.batch_norm(name, values[from], norm)?
                }
                Op::Relu { from } => b.relu(values[from])?,
                Op::Max { from, kernel, stride, pad: padding } => {
                    b.max_pool(values[from], Pool { kernel, stride, padding })?
                }
                Op::Average { from } => b.global_average_pool(values[from])?,
                Op::Linear { name, from, to } => b.linear(name, values[from], to)?,
            };
            values.push(value);
        }
        match variant {
            Some(variant) => b.finish_with(values[values.len() - 1], variant),
            None => b.finish(values[values.len() - 1]),
        }
    }

    pub fn input_len(&self, n: usize) -> usize {
        n * self.input.0 * self.input.1 * self.input.2
    }

    pub fn tensor(&self, n: usize, values: &[f32]) -> Result<Tensor> {
        let (h, w, c) = self.input;
        if self.takes_images() {
            Tensor::from_slice(values, (n, h, w, c), &Device::Cpu)
        } else {
            Tensor::from_slice(values, (n, c), &Device::Cpu)
        }
    }

    fn takes_images(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Average { .. }))
    }

    /// The output (N, D) of the interpreter. `running` holds the statistics for blocks in
    /// [`Mode::Running`].
    pub fn interpret(
        &self,
        n: usize,
        input: &[f64],
        parameters: &Named,
        running: &Named,
        mode: impl Fn(&str) -> Mode,
    ) -> Vec<f64> {
        let (h, w, c) = self.input;
        let mut values = vec![Map { n, h, w, c, v: input.to_vec() }];
        let mut block = "";
        for op in &self.ops {
            let get = |name: &str, part: &str| &parameters[&format!("{name}.{part}")];
            let value = match *op {
                Op::Block(name) => {
                    block = name;
                    continue;
                }
                Op::Conv { name, from, to, kernel, stride, pad } => {
                    convolve(&values[from], get(name, "weight"), to, kernel, stride, pad)
                }
                Op::Norm { name, from, relu, residual } => {
                    let z = &values[from];
                    let (mean, variance) = match mode(block) {
                        Mode::Batch => moments(z),
                        Mode::Running => (
                            running[&format!("{name}.running_mean")].clone(),
                            running[&format!("{name}.running_var")].clone(),
                        ),
                    };
                    let (weight, bias) = (get(name, "weight"), get(name, "bias"));
                    let mut y = z.clone();
                    for (at, y) in y.v.iter_mut().enumerate() {
                        let c = at % z.c;
                        let unit = (*y - mean[c]) / (variance[c] + EPSILON).sqrt();
                        *y = unit * weight[c] + bias[c] + residual.map_or(0., |r| values[r].v[at]);
                        if relu {
                            *y = y.max(0.);
                        }
                    }
                    y
                }
                Op::Relu { from } => {
                    let mut y = values[from].clone();
                    y.v.iter_mut().for_each(|y| *y = y.max(0.));
                    y
                }
                Op::Max { from, kernel, stride, pad } => {
                    maximum(&values[from], kernel, stride, pad)
                }
                Op::Average { from } => {
                    let (x, mut y) = (&values[from], Map::zeros(n, 1, 1, values[from].c));
                    for (at, value) in x.v.iter().enumerate() {
                        let image = at / (x.h * x.w * x.c);
                        y.v[image * x.c + at % x.c] += value / (x.h * x.w) as f64;
                    }
                    y
                }
                Op::Linear { name, from, to } => {
                    let mut y = convolve(&values[from], get(name, "weight"), to, 1, 1, 0);
                    let bias = get(name, "bias");
                    y.v.iter_mut().enumerate().for_each(|(at, y)| *y += bias[at % to]);
                    y
                }
            };
            values.push(value);
        }
        values.pop().map(|map| map.v).unwrap_or_default()
    }
}

fn side(side: usize, kernel: usize, stride: usize, pad: usize) -> usize {
    (side + 2 * pad - kernel) / stride + 1
}

fn convolve(x: &Map, weights: &[f64], to: usize, kernel: usize, stride: usize, pad: usize) -> Map {
    let (h, w) = (side(x.h, kernel, stride, pad), side(x.w, kernel, stride, pad));
    let mut y = Map::zeros(x.n, h, w, to);
    for n in 0..x.n {
        for oy in 0..h {
            for ox in 0..w {
                for o in 0..to {
                    let mut sum = 0.;
                    for i in 0..x.c {
                        for ky in 0..kernel {
                            for kx in 0..kernel {
                                let (iy, ix) = (oy * stride + ky, ox * stride + kx);
                                if iy < pad || ix < pad || iy - pad >= x.h || ix - pad >= x.w {
                                    continue;
                                }
                                let weight = weights[((o * x.c + i) * kernel + ky) * kernel + kx];
                                sum += weight * x.v[x.at(n, iy - pad, ix - pad, i)];
                            }
                        }
                    }
                    let at = y.at(n, oy, ox, o);
                    y.v[at] = sum;
                }
            }
        }
    }
    y
}

fn moments(z: &Map) -> (Vec<f64>, Vec<f64>) {
    let count = (z.n * z.h * z.w) as f64;
    let (mut mean, mut variance) = (vec![0.; z.c], vec![0.; z.c]);
    z.v.iter().enumerate().for_each(|(at, z_at)| mean[at % z.c] += z_at / count);
    for (at, z_at) in z.v.iter().enumerate() {
        variance[at % z.c] += (z_at - mean[at % z.c]).powi(2) / count;
    }
    (mean, variance)
}

fn maximum(x: &Map, kernel: usize, stride: usize, pad: usize) -> Map {
    let (h, w) = (side(x.h, kernel, stride, pad), side(x.w, kernel, stride, pad));
    let mut y = Map::zeros(x.n, h, w, x.c);
    for n in 0..x.n {
        for (oy, ox, c) in (0..h * w * x.c).map(|at| (at / x.c / w, at / x.c % w, at % x.c)) {
            let mut best = f64::NEG_INFINITY;
            for (ky, kx) in (0..kernel * kernel).map(|at| (at / kernel, at % kernel)) {
                let (iy, ix) = (oy * stride + ky, ox * stride + kx);
                if iy >= pad && ix >= pad && iy - pad < x.h && ix - pad < x.w {
                    best = best.max(x.v[x.at(n, iy - pad, ix - pad, c)]);
                }
            }
            let at = y.at(n, oy, ox, c);
            y.v[at] = best;
        }
    }
    y
}

/// Pseudo-random numbers in −1 to 1, the same on every machine.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608. - 1.
    };
    (0..len).map(|_| next()).collect()
}

/// Fills every parameter with noise, scaled so that values stay near 1; weights of norms are near 1.
pub fn fill(parameters: &mut Parameters, seed: u64) -> Result<()> {
    for (at, entry) in parameters.entries().to_vec().into_iter().enumerate() {
        let fan: usize = entry.shape.iter().skip(1).product();
        let scale = if entry.shape.len() > 1 { (3. / fan as f32).sqrt() } else { 0.3 };
        let shift = if entry.kind == layers::EntryKind::NormWeight { 1. } else { 0. };
        let values = noise(seed + at as u64 * 7919, entry.range.len());
        let values: Vec<f32> = values.iter().map(|x| x * scale + shift).collect();
        parameters.set(&entry.name, &values)?;
    }
    Ok(())
}

pub fn named(parameters: &Parameters) -> Result<Named> {
    let entries = parameters.entries().iter();
    entries.map(|e| Ok((e.name.clone(), wide(&parameters.get(&e.name)?)))).collect()
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

pub fn batch(network: &Network) -> Modes {
    Modes::all(network, Mode::Batch)
}

/// Largest difference, relative to the largest expected number (at least 0.1).
pub fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(0.1f64, |m, x| m.max(x.abs()));
    got.iter().zip(want).fold(0f64, |d, (g, w)| d.max((f64::from(*g) - w).abs())) / size
}

/// Stem, two blocks (one with stride and shortcut), average and a linear layer.
pub fn narrow_resnet(height: usize, width: usize) -> Case {
    let conv =
        |name, from, to, kernel, stride, pad| Op::Conv { name, from, to, kernel, stride, pad };
    let norm = |name, from, relu, residual| Op::Norm { name, from, relu, residual };
    Case {
        input: (height, width, 3),
        ops: vec![
            Op::Block("stem"),
            conv("conv1", 0, 6, 3, 1, 1),
            norm("bn1", 1, true, None),
            Op::Max { from: 2, kernel: 3, stride: 2, pad: 1 },
            Op::Block("layer1"),
            conv("layer1.conv1", 3, 6, 3, 1, 1),
            norm("layer1.bn1", 4, true, None),
            conv("layer1.conv2", 5, 6, 3, 1, 1),
            norm("layer1.bn2", 6, true, Some(3)),
            Op::Block("layer2"),
            conv("layer2.conv1", 7, 18, 3, 2, 1),
            norm("layer2.bn1", 8, true, None),
            conv("layer2.conv2", 9, 18, 3, 1, 1),
            conv("layer2.downsample.0", 7, 18, 1, 2, 0),
            norm("layer2.downsample.1", 11, false, None),
            norm("layer2.bn2", 10, true, Some(12)),
            Op::Block("head"),
            Op::Average { from: 13 },
            Op::Linear { name: "fc", from: 14, to: 5 },
        ],
    }
}
