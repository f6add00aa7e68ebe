//! The plan of a residual network (He et al. 2016, arXiv:1512.03385), with basic blocks or bottlenecks. It
//! has no classifier: the output is the global average of the last stage.
//!
//! Blocks, the units of mode and of freezing, are `stem`, `layer1`, `layer2`, `layer3`, `layer4`.
//! Parameters have timm's names: `conv1.weight`, `bn1.bias`, `layer2.0.downsample.0.weight`, …

use candle_core::Result;
use layers::{BatchNorm, Builder, Convolution, Network, Pool, Value};

use crate::{Architecture, Stem};

/// The plan from images `(N, H, W, channels)` to embeddings `(N, D)`, with `D = 8 · width`, or `32 · width`
/// with bottlenecks. A width or channel count of 0 is an error.
pub fn plan(architecture: &Architecture, channels: usize) -> Result<Network> {
    ResidualStages::from(*architecture).plan(channels)
}

/// The stages of a residual network, each with its own count of blocks and its own width. An [`Architecture`] is
/// one whose counts are published and whose width doubles from stage to stage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResidualStages {
    pub stem: Stem,
    /// Channels of the stem.
    pub stem_width: usize,
    /// Blocks of each stage.
    pub blocks: [usize; 4],
    /// Channels of the 3×3 convolutions of each stage.
    pub widths: [usize; 4],
    pub has_bottlenecks: bool,
}

impl From<Architecture> for ResidualStages {
    fn from(Architecture { depth, width, stem }: Architecture) -> Self {
        Self {
            stem,
            stem_width: width,
            blocks: depth.blocks(),
            widths: [1, 2, 4, 8].map(|factor| factor * width),
            has_bottlenecks: depth.has_bottlenecks(),
        }
    }
}

impl ResidualStages {
    /// The plan from images to embeddings, as [`plan`].
    pub fn plan(&self, channels: usize) -> Result<Network> {
        let Self { stem, stem_width, blocks, widths, has_bottlenecks } = *self;
        if stem_width == 0 || widths.contains(&0) || channels == 0 {
            candle_core::bail!(
                "resnet: a stem of width {stem_width}, stages of widths {widths:?} and {channels} input channels; \
                 all must be at least 1"
            )
        }
        let mut builder = Builder::images(channels);
        let mut value = plan_stem(&mut builder, stem, stem_width)?;
        let mut width_before = stem_width;
        for (stage, (count, width)) in blocks.into_iter().zip(widths).enumerate() {
            builder.block(&format!("layer{}", stage + 1));
            for block in 0..count {
                // Every stage but the first halves height and width in its first block.
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let name = format!("layer{}.{block}", stage + 1);
                let block = if has_bottlenecks { bottleneck } else { basic_block };
                value = block(&mut builder, &name, value, width_before, width, stride)?;
                width_before = if has_bottlenecks { 4 * width } else { width };
            }
        }
        let pooled = builder.global_average_pool(value)?;
        builder.finish(pooled)
    }
}

fn plan_stem(builder: &mut Builder, stem: Stem, width: usize) -> Result<Value> {
    builder.block("stem");
    let (kernel, stride, padding) = match stem {
        Stem::Plain | Stem::Pool | Stem::PoolPadded => (3, 1, 1),
        Stem::Large => (7, 2, 3),
    };
    let input = builder.input();
    let convolution = Convolution { out_channels: width, kernel, stride, padding };
    let value = builder.convolution("conv1", input, convolution)?;
    let value = builder.batch_norm("bn1", value, norm(true, None))?;
    let pool = match stem {
        Stem::Plain => return Ok(value),
        Stem::Pool => Pool { kernel: 2, stride: 2, padding: 0 },
        Stem::PoolPadded => Pool { kernel: 2, stride: 2, padding: 1 },
        Stem::Large => Pool { kernel: 3, stride: 2, padding: 1 },
    };
    builder.max_pool(value, pool)
}

/// `ReLU(bn2(conv2(ReLU(bn1(conv1(x))))) + shortcut(x))`.
fn basic_block(
    builder: &mut Builder,
    name: &str,
    input: Value,
    width_before: usize,
    width: usize,
    stride: usize,
) -> Result<Value> {
    let three = |stride| Convolution { out_channels: width, kernel: 3, stride, padding: 1 };
    let value = builder.convolution(&format!("{name}.conv1"), input, three(stride))?;
    let value = builder.batch_norm(&format!("{name}.bn1"), value, norm(true, None))?;
    let value = builder.convolution(&format!("{name}.conv2"), value, three(1))?;
    let shortcut = shortcut(builder, name, input, width_before, width, stride)?;
    builder.batch_norm(&format!("{name}.bn2"), value, norm(true, Some(shortcut)))
}

/// `ReLU(bn3(conv3(ReLU(bn2(conv2(ReLU(bn1(conv1(x)))))))) + shortcut(x))`: 1×1, 3×3 and 1×1, the last with
/// four times the channels. The stride is in the 3×3 convolution, as in torchvision and timm; the paper has
/// it in the first 1×1.
fn bottleneck(
    builder: &mut Builder,
    name: &str,
    input: Value,
    width_before: usize,
    width: usize,
    stride: usize,
) -> Result<Value> {
    let one = |out_channels| Convolution { out_channels, kernel: 1, stride: 1, padding: 0 };
    let three = Convolution { out_channels: width, kernel: 3, stride, padding: 1 };
    let value = builder.convolution(&format!("{name}.conv1"), input, one(width))?;
    let value = builder.batch_norm(&format!("{name}.bn1"), value, norm(true, None))?;
    let value = builder.convolution(&format!("{name}.conv2"), value, three)?;
    let value = builder.batch_norm(&format!("{name}.bn2"), value, norm(true, None))?;
    let value = builder.convolution(&format!("{name}.conv3"), value, one(4 * width))?;
    let shortcut = shortcut(builder, name, input, width_before, 4 * width, stride)?;
    builder.batch_norm(&format!("{name}.bn3"), value, norm(true, Some(shortcut)))
}

/// The input, or if its shape changes, a 1×1 convolution of it with batch norm.
fn shortcut(
    builder: &mut Builder,
    name: &str,
    input: Value,
    width_before: usize,
    width: usize,
    stride: usize,
) -> Result<Value> {
    if stride == 1 && width_before == width {
        return Ok(input);
    }
    let one = Convolution { out_channels: width, kernel: 1, stride, padding: 0 };
    let short = builder.convolution(&format!("{name}.downsample.0"), input, one)?;
    builder.batch_norm(&format!("{name}.downsample.1"), short, norm(false, None))
}

fn norm(relu: bool, residual: Option<Value>) -> BatchNorm {
    BatchNorm { epsilon: 1e-5, momentum: 0.1, relu, residual }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device::Cpu, Tensor};
    use layers::{Mode, Modes};

    use super::*;
    use crate::Depth;

    fn count(network: &Network) -> usize {
        network.parameters().entries().iter().map(|entry| entry.range.len()).sum()
    }

    fn architecture(depth: Depth, width: usize, stem: Stem) -> Architecture {
        Architecture { depth, width, stem }
    }

    /// ProPos, case 16: parameters.
    #[test]
    fn parameter_counts_are_the_published_ones() -> Result<()> {
        // 11.169 M and 21.285 M.
        let plan_of = |depth, stem| plan(&architecture(depth, 64, stem), 3);
        assert_eq!(count(&plan_of(Depth::Eighteen, Stem::Plain)?), 11_168_832);
        assert_eq!(count(&plan_of(Depth::Eighteen, Stem::Large)?), 11_176_512);
        assert_eq!(count(&plan_of(Depth::ThirtyFour, Stem::Large)?), 21_284_672);
        assert_eq!(count(&plan_of(Depth::ThirtyFour, Stem::Plain)?), 21_276_992);
        // 25.557 M with the classifier's 2048 · 1000 + 1000.
        assert_eq!(count(&plan_of(Depth::Fifty, Stem::Large)?), 23_508_032);
        assert_eq!(plan_of(Depth::Fifty, Stem::Large)?.output_width(), 2048);
        assert_eq!(architecture(Depth::Fifty, 64, Stem::Large).embedding_width(), 2048);
        assert_eq!(plan_of(Depth::Ten, Stem::Plain)?.output_width(), 512);
        let blocks = ["stem", "layer1", "layer2", "layer3", "layer4"];
        assert_eq!(plan_of(Depth::ThirtyFour, Stem::Large)?.blocks(), blocks);
        Ok(())
    }

    #[test]
    fn every_stem_takes_images_that_are_not_square() -> Result<()> {
        for (depth, stem) in [
            (Depth::Ten, Stem::Plain),
            (Depth::Ten, Stem::Pool),
            (Depth::Ten, Stem::PoolPadded),
            (Depth::Ten, Stem::Large),
            (Depth::Fifty, Stem::Plain),
        ] {
            let network = plan(&architecture(depth, 2, stem), 1)?;
            let pictures = Tensor::ones((3, 21, 38, 1), DType::F32, &Cpu)?;
            let modes = Modes::all(&network, Mode::Running);
            let (parameters, mut statistics) = (network.parameters(), network.statistics());
            let output = network.forward(&parameters, &mut statistics, &pictures, &modes, None)?;
            assert_eq!(output.dims(), [3, architecture(depth, 2, stem).embedding_width()]);
        }
        assert!(plan(&architecture(Depth::Ten, 0, Stem::Plain), 1).is_err());
        Ok(())
    }

    /// Values that another program can reproduce: `offset + scale · v`, with `v` in [−1, 1) derived from the
    /// name of the tensor (FNV-1a, then splitmix64).
    fn made(name: &str, count: usize, offset: f32, scale: f32) -> Vec<f32> {
        let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
        });
        let start = hash.wrapping_add(21 << 32);
        let value = |j: u64| {
            let mut z = start.wrapping_add((j + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608. - 1.
        };
        (0..count as u64).map(|j| offset + scale * value(j)).collect()
    }

    /// Offset and scale of a made parameter: near the spread of usual first weights.
    fn spread(name: &str, shape: &[usize]) -> (f32, f32) {
        match shape[..] {
            [_, i, h, w] => {
                let fan_in = (i * h * w) as f32;
                (0., (3. / fan_in).sqrt().log2().ceil().exp2())
            }
            _ if name.ends_with("running_var") => (1., 0.5),
            _ if name.ends_with("weight") => (1., 0.25),
            _ => (0., 0.125),
        }
    }

    /// Pixels `m` of the last map for one square picture. The variance that batch norm keeps is
    /// `m / (m − 1)` times that of its values, so that a picture alone and the same one twice tell
    /// `m`: their variances are in the ratio `(2m − 1) / (2m − 2)`.
    fn last_map(network: &Network, last_norm: &str, side: usize) -> Result<f64> {
        let mut parameters = network.parameters();
        for entry in parameters.entries().to_vec() {
            let (offset, scale) = spread(&entry.name, &entry.shape);
            parameters.set(&entry.name, &made(&entry.name, entry.range.len(), offset, scale))?;
        }
        let picture = made("picture", side * side * 3, 0., 2.);
        let picture = Tensor::from_vec(picture, (1, side, side, 3), &Cpu)?;
        let modes = Modes::all(network, Mode::Batch);
        let variance = |pictures: &Tensor| -> Result<f64> {
            let mut statistics = network.statistics();
            network.forward(&parameters, &mut statistics, pictures, &modes, None)?;
            // A tenth of it was added to nine tenths of the first value, 1.
            let kept = statistics.get(&format!("{last_norm}.running_var"))?;
            Ok(kept.iter().map(|v| f64::from(*v) - 0.9).sum())
        };
        let ratio = variance(&picture)? / variance(&Tensor::cat(&[&picture, &picture], 0)?)?;
        Ok((2. * ratio - 1.) / (2. * ratio - 2.))
    }

    /// ProPos, case 16: maps and embeddings.
    #[test]
    fn last_maps_have_the_published_size() -> Result<()> {
        for (depth, stem, last_norm, picture, map) in [
            (Depth::Eighteen, Stem::Plain, "layer4.1.bn2", 32, 4),
            (Depth::ThirtyFour, Stem::Large, "layer4.2.bn2", 96, 3),
        ] {
            let network = plan(&architecture(depth, 4, stem), 3)?;
            let pixels = last_map(&network, last_norm, picture)?;
            assert!((pixels - f64::from(map * map)).abs() < 0.05, "{pixels} pixels, not {map}²");
            assert_eq!(plan(&architecture(depth, 64, stem), 3)?.output_width(), 512);
        }
        Ok(())
    }

    /// ProPos, case 16: the projector.
    #[test]
    fn the_projector_has_the_published_shape() -> Result<()> {
        let projector = crate::perceptron::plan(512, 4096, 256)?;
        assert_eq!(projector.output_width(), 256);
        // Two linear layers with bias, and weight and bias of the norm between them.
        assert_eq!(count(&projector), 512 * 4096 + 4096 + 2 * 4096 + 4096 * 256 + 256);
        Ok(())
    }

    /// The embeddings that timm 1.0.31 (PyTorch 2.15, f64) computes from these weights and pictures.
    #[test]
    fn embeddings_are_those_of_timm() -> Result<()> {
        let eighteen = [
            [0.7762, 11.8050, 46.7531, 25.3371, 21.1046, 38.3914, 85.4546, 54.9996f32],
            [0.0643, 9.2669, 47.6508, 36.2268, 19.8260, 40.0399, 79.9476, 53.2864],
        ];
        let fifty = [
            [170.1633, 3769.2816, 868.7833, 284.9142, 0., 1446.2208, 170.4518, 1387.1673],
            [214.559, 3683.574, 881.326, 334.8878, 0., 1302.4973, 200.1969, 1426.7556],
        ];
        for (depth, side, want) in [(Depth::Eighteen, 96, eighteen), (Depth::Fifty, 64, fifty)] {
            let network = plan(&architecture(depth, 64, Stem::Large), 3)?;
            let (mut parameters, mut statistics) = (network.parameters(), network.statistics());
            for entry in parameters.entries().to_vec() {
                let (offset, scale) = spread(&entry.name, &entry.shape);
                let values = made(&entry.name, entry.range.len(), offset, scale);
                parameters.set(&entry.name, &values)?;
            }
            for entry in statistics.entries().to_vec() {
                let (offset, scale) = spread(&entry.name, &entry.shape);
                let values = made(&entry.name, entry.range.len(), offset, scale);
                statistics.set(&entry.name, &values)?;
            }
            let pictures = made("input.x", 2 * 3 * side * side, 0., 2.);
            let pictures = Tensor::from_vec(pictures, (2, 3, side, side), &Cpu)?;
            let pictures = pictures.permute((0, 2, 3, 1))?.contiguous()?;
            let modes = Modes::all(&network, Mode::Running);
            let output = network.forward(&parameters, &mut statistics, &pictures, &modes, None)?;
            for (row, want) in output.to_vec2::<f32>()?.iter().zip(want) {
                let ends = row[..4].iter().chain(&row[row.len() - 4..]);
                for (got, want) in ends.zip(want) {
                    let near = (got - want).abs() < 5e-4 * want.max(1.);
                    assert!(near, "{depth:?}: got {got}, want {want}");
                }
            }
        }
        Ok(())
    }

    /// The backward pass through stride, bottleneck and shortcut, against central differences of a weighted
    /// sum of the output.
    #[test]
    fn gradients_through_bottlenecks_match_central_differences() -> Result<()> {
        // A stem and two blocks: in a deeper network, the kinks of ReLUs dominate the differences.
        let mut builder = Builder::images(2);
        let value = plan_stem(&mut builder, Stem::Plain, 3)?;
        let value = bottleneck(&mut builder, "layer2.0", value, 3, 2, 2)?;
        let value = bottleneck(&mut builder, "layer2.1", value, 8, 2, 1)?;
        let pooled = builder.global_average_pool(value)?;
        let network = builder.finish(pooled)?;
        let mut parameters = network.parameters();
        for entry in parameters.entries().to_vec() {
            let (offset, scale) = spread(&entry.name, &entry.shape);
            parameters.set(&entry.name, &made(&entry.name, entry.range.len(), offset, scale))?;
        }
        let modes = Modes::all(&network, Mode::Batch);
        let pictures =
            Tensor::from_vec(made("pictures", 4 * 9 * 14 * 2, 0., 2.), (4, 9, 14, 2), &Cpu)?;
        let weights = Tensor::from_vec(made("weights", 4 * 8, 0., 1.), (4, 8), &Cpu)?;
        let value = |parameters: &layers::Parameters| -> Result<f64> {
            let mut statistics = network.statistics();
            let output = network.forward(parameters, &mut statistics, &pictures, &modes, None)?;
            let products = (output.to_dtype(DType::F64)? * weights.to_dtype(DType::F64)?)?;
            products.sum_all()?.to_scalar()
        };
        let (mut tape, mut gradients) = (network.tape(), network.gradients());
        let mut statistics = network.statistics();
        network.forward(&parameters, &mut statistics, &pictures, &modes, Some(&mut tape))?;
        network.backward(&parameters, &mut tape, &weights, &mut gradients, false)?;
        for name in [
            "conv1.weight",
            "layer2.0.conv1.weight",
            "layer2.0.conv2.weight",
            "layer2.0.conv3.weight",
            "layer2.0.bn2.weight",
            "layer2.0.bn3.bias",
            "layer2.0.downsample.0.weight",
            "layer2.1.conv1.weight",
            "layer2.1.conv2.weight",
            "layer2.1.bn3.weight",
        ] {
            let (analytic, at) = (gradients.get(name)?, parameters.get(name)?);
            // Along the direction of the gradient, which involves all values of the tensor.
            let length = analytic.iter().map(|g| g * g).sum::<f32>().sqrt();
            let shifted = |h: f32| -> Result<f64> {
                let mut moved = parameters.clone();
                let along = at.iter().zip(&analytic).map(|(v, g)| v + h * g / length);
                moved.set(name, &along.collect::<Vec<_>>())?;
                value(&moved)
            };
            let h = 3e-4;
            let want = (shifted(h)? - shifted(-h)?) / f64::from(2. * h);
            let got = f64::from(length);
            assert!((got - want).abs() < 0.02 * want.abs(), "{name}: got {got}, want {want}");
        }
        Ok(())
    }
}
