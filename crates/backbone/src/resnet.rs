//! The plan of a residual network with basic blocks (He et al. 2016, arXiv:1512.03385), without
//! its last linear layer: the output is the global average of the last stage.
//!
//! Blocks, the units of mode and of freezing, are `stem`, `layer1`, `layer2`, `layer3`, `layer4`.
//! Parameters have timm's names: `conv1.weight`, `bn1.bias`, `layer2.0.downsample.0.weight`, …

use candle_core::Result;
use layers::{BatchNorm, Builder, Convolution, Network, Pool, Value};

use crate::{Architecture, Stem};

/// The plan for pictures of `channels` channels, `(N, H, W, C)` in and `(N, D)` out, with
/// `D = 8 · width`.
///
/// # Errors
///
/// A width or the number of channels is zero.
pub fn plan(architecture: &Architecture, channels: usize) -> Result<Network> {
    if architecture.width == 0 || channels == 0 {
        candle_core::bail!(
            "resnet: width {} and {channels} input channels; both must be positive",
            architecture.width
        )
    }
    let width = architecture.width;
    let widths = [width, 2 * width, 4 * width, 8 * width];
    plan_of_widths(architecture.stem, channels, width, architecture.depth.blocks(), widths)
}

/// As [`plan`], with the channels of stem and stages each on its own.
pub(crate) fn plan_of_widths(
    stem: Stem,
    channels: usize,
    stem_width: usize,
    blocks: [usize; 4],
    widths: [usize; 4],
) -> Result<Network> {
    let mut builder = Builder::images(channels);
    let mut value = plan_stem(&mut builder, stem, stem_width)?;
    let mut width_before = stem_width;
    for (stage, (count, width)) in blocks.into_iter().zip(widths).enumerate() {
        builder.block(&format!("layer{}", stage + 1));
        for block in 0..count {
            // Every stage but the first halves height and width in its first block.
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let name = format!("layer{}.{block}", stage + 1);
            value = basic_block(&mut builder, &name, value, width_before, width, stride)?;
            width_before = width;
        }
    }
    let pooled = builder.global_average_pool(value)?;
    builder.finish(pooled)
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

/// `ReLU(bn2(conv2(ReLU(bn1(conv1(x))))) + shortcut(x))`: the shortcut is a 1×1 convolution with
/// batch norm where the shape changes, else `x`.
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
    let shortcut = if stride == 1 && width_before == width {
        input
    } else {
        let one = Convolution { out_channels: width, kernel: 1, stride, padding: 0 };
        let short = builder.convolution(&format!("{name}.downsample.0"), input, one)?;
        builder.batch_norm(&format!("{name}.downsample.1"), short, norm(false, None))?
    };
    builder.batch_norm(&format!("{name}.bn2"), value, norm(true, Some(shortcut)))
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

    #[test]
    fn parameter_counts_are_the_published_ones() -> Result<()> {
        // 11.169 M and 21.285 M.
        let plan_of = |depth, stem| plan(&architecture(depth, 64, stem), 3);
        assert_eq!(count(&plan_of(Depth::Eighteen, Stem::Plain)?), 11_168_832);
        assert_eq!(count(&plan_of(Depth::Eighteen, Stem::Large)?), 11_176_512);
        assert_eq!(count(&plan_of(Depth::ThirtyFour, Stem::Large)?), 21_284_672);
        assert_eq!(count(&plan_of(Depth::ThirtyFour, Stem::Plain)?), 21_276_992);
        assert_eq!(plan_of(Depth::Ten, Stem::Plain)?.output_width(), 512);
        let blocks = ["stem", "layer1", "layer2", "layer3", "layer4"];
        assert_eq!(plan_of(Depth::ThirtyFour, Stem::Large)?.blocks(), blocks);
        Ok(())
    }

    #[test]
    fn every_stem_takes_pictures_that_are_not_square() -> Result<()> {
        for stem in [Stem::Plain, Stem::Pool, Stem::PoolPadded, Stem::Large] {
            let network = plan(&architecture(Depth::Ten, 2, stem), 1)?;
            let pictures = Tensor::ones((3, 21, 38, 1), DType::F32, &Cpu)?;
            let modes = Modes::all(&network, Mode::Running);
            let (parameters, mut statistics) = (network.parameters(), network.statistics());
            let output = network.forward(&parameters, &mut statistics, &pictures, &modes, None)?;
            assert_eq!(output.dims(), [3, 16]);
        }
        assert!(plan(&architecture(Depth::Ten, 0, Stem::Plain), 1).is_err());
        Ok(())
    }

    /// Values that another program makes too: `offset + scale · v`, with `v` in [−1, 1) from the
    /// tensor's name (FNV-1a, then splitmix64).
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

    #[test]
    fn the_projector_has_the_published_shape() -> Result<()> {
        let projector = crate::perceptron::plan(512, 4096, 256)?;
        assert_eq!(projector.output_width(), 256);
        // Two linear layers with bias, and weight and bias of the norm between them.
        assert_eq!(count(&projector), 512 * 4096 + 4096 + 2 * 4096 + 4096 * 256 + 256);
        Ok(())
    }

    /// The embedding that timm 1.0.31 (PyTorch 2.15, f64) computes from these weights and pictures.
    #[test]
    fn embedding_is_that_of_timm() -> Result<()> {
        let network = plan(&architecture(Depth::Eighteen, 64, Stem::Large), 3)?;
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
        let pictures = made("input.x", 2 * 3 * 96 * 96, 0., 2.);
        let pictures = Tensor::from_vec(pictures, (2, 3, 96, 96), &Cpu)?;
        let pictures = pictures.permute((0, 2, 3, 1))?.contiguous()?;
        let modes = Modes::all(&network, Mode::Running);
        let output = network.forward(&parameters, &mut statistics, &pictures, &modes, None)?;
        let output = output.to_vec2::<f32>()?;
        let want = [
            [0.7762, 11.8050, 46.7531, 25.3371, 21.1046, 38.3914, 85.4546, 54.9996f32],
            [0.0643, 9.2669, 47.6508, 36.2268, 19.8260, 40.0399, 79.9476, 53.2864],
        ];
        for (row, want) in output.iter().zip(want) {
            let ends = row[..4].iter().chain(&row[508..]);
            for (got, want) in ends.zip(want) {
                assert!((got - want).abs() < 5e-4 * want.max(1.), "got {got}, want {want}");
            }
        }
        Ok(())
    }
}
