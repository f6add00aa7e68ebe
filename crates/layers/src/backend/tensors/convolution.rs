//! Convolutions and linear layers: gathered maps and one matrix product.
//!
//! `y = columns(x) · W`, where a row of the columns holds the input pixels of one output pixel, tap by
//! tap (im2col). The weight gradient is `columns(x)ᵀ · g`. The input gradient with stride 1 is again a
//! convolution of `g`. With larger strides, `g · Wᵀ` gives what each tap sends back, and every pixel
//! adds what is sent to it (col2im).

use candle_core::{DType, Result, Tensor};
use kernels::Shape;
use kernels::convolution::Geometry;

use super::indices::{IndexTable, IndexTables, Windows};
use super::{add_to, matmul};

/// Most numbers in one matrix of columns; larger batches are split by images. 1 GiB of f32, and few
/// enough for 32-bit addresses in the kernels of the devices.
const COLUMNS: usize = 1 << 28;

/// A convolution by tensor operations; `weight` is (O, I, KH, KW) in f32 or, with kernel 1, (O, I).
pub(crate) struct TensorConvolution<'a> {
    tables: &'a IndexTables,
    g: Geometry,
    windows: Windows,
    /// Most numbers in one matrix of columns.
    limit: usize,
}

impl<'a> TensorConvolution<'a> {
    pub fn new(tables: &'a IndexTables, g: Geometry) -> TensorConvolution<'a> {
        TensorConvolution { tables, g, windows: Windows::of_convolution(&g), limit: COLUMNS }
    }

    /// (N, H·W, I) to (N, H'·W', O).
    pub fn forward(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let by_tap = self.weight(weight, [2, 3, 1, 0], x.dtype())?;
        self.by_images(self.g.input.channels, |first, count| {
            let columns = self.columns(&x.narrow(0, first, count)?)?;
            matmul(&columns, &by_tap)?.reshape(value(self.g.output, count))
        })
    }

    /// The gradient of the input, (N, H·W, I), from that of the output.
    pub fn input_gradient(&self, gradient: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (input, output) = (self.g.input, self.g.output);
        let (taps, pixels) = (self.windows.taps(), output.pixels());
        if self.g.stride == 1 {
            let by_tap = self.weight(weight, [2, 3, 0, 1], gradient.dtype())?;
            return self.by_images(output.channels, |first, count| {
                let windows =
                    self.gather(&gradient.narrow(0, first, count)?, IndexTable::WindowOfPixel)?;
                let rows = windows.reshape((count * input.pixels(), taps * output.channels))?;
                matmul(&rows, &by_tap)?.reshape(value(input, count))
            });
        }
        let to_taps = self.weight(weight, [0, 2, 3, 1], gradient.dtype())?;
        let to_taps = to_taps.reshape((output.channels, taps * input.channels))?;
        let taps_of_pixel = self.tables.get(self.windows, IndexTable::TapsOfPixel)?;
        self.by_images(input.channels, |first, count| {
            let rows = gradient.narrow(0, first, count)?;
            let rows = rows.reshape((count * pixels, output.channels))?;
            let sent = matmul(&rows, &to_taps)?;
            let sent = sent.reshape((count, pixels * taps, input.channels))?;
            let mut sum: Option<Tensor> = None;
            for taps in taps_of_pixel.iter() {
                sum = Some(add_to(sum, sent.index_select(taps, 1)?)?);
            }
            match sum {
                Some(sum) => Ok(sum),
                None => Tensor::zeros(value(input, count), gradient.dtype(), gradient.device()),
            }
        })
    }

    /// The gradient of the weights, flat in the order (O, I, KH, KW), f32.
    pub fn weight_gradient(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let (taps, to) = (self.windows.taps(), self.g.output.channels);
        let mut sum: Option<Tensor> = None;
        for (first, count) in self.ranges(self.g.input.channels) {
            let columns = self.columns(&x.narrow(0, first, count)?)?;
            let rows = gradient.narrow(0, first, count)?;
            let rows = rows.reshape((count * self.g.output.pixels(), to))?;
            let part = matmul(&columns.t()?, &rows)?.to_dtype(DType::F32)?;
            sum = Some(add_to(sum, part)?);
        }
        let sum = sum.expect("a batch has an image");
        sum.reshape((taps, self.g.input.channels, to))?.permute((2, 1, 0))?.flatten_all()
    }

    /// The input pixels of each output pixel, (N·H'·W', K·K·I).
    fn columns(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dim(0)? * self.g.output.pixels();
        let gathered = self.gather(x, IndexTable::PixelOfWindow)?;
        gathered.reshape((rows, self.windows.taps() * self.g.input.channels))
    }

    fn gather(&self, x: &Tensor, table: IndexTable) -> Result<Tensor> {
        if self.windows.are_pixels() {
            return Ok(x.clone());
        }
        x.contiguous()?.index_select(&self.tables.get(self.windows, table)?[0], 1)
    }

    /// The weights with their four axes permuted, as a matrix: the last axis are the columns.
    fn weight(&self, weight: &Tensor, order: [usize; 4], dtype: DType) -> Result<Tensor> {
        let Geometry { input, output, kernel, .. } = self.g;
        let weight = weight.reshape((output.channels, input.channels, kernel, kernel))?;
        let weight = weight.to_dtype(dtype)?.permute(order)?.contiguous()?;
        let columns = weight.dim(3)?;
        weight.reshape(((), columns))
    }

    /// Applies `f` to ranges of images whose columns, `channels` wide per tap, fit into the limit.
    fn by_images(
        &self,
        channels: usize,
        f: impl Fn(usize, usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let ranges = self.ranges(channels);
        if let [(first, count)] = ranges[..] {
            return f(first, count);
        }
        let parts: Vec<_> =
            ranges.into_iter().map(|(first, count)| f(first, count)).collect::<Result<_>>()?;
        Tensor::cat(&parts, 0)
    }

    fn ranges(&self, channels: usize) -> Vec<(usize, usize)> {
        let images = self.g.input.images;
        let pixels = self.g.input.pixels().max(self.g.output.pixels());
        let step = (self.limit / (pixels * self.windows.taps() * channels)).max(1);
        (0..images).step_by(step).map(|first| (first, step.min(images - first))).collect()
    }
}

fn value(shape: Shape, images: usize) -> (usize, usize, usize) {
    (images, shape.pixels(), shape.channels)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_batch_split_by_images_gives_what_the_whole_batch_gives() -> Result<()> {
        let tables = IndexTables::on(&Device::Cpu);
        for stride in [1, 2] {
            let g = Geometry::new(Shape::new(5, 4, 3, 2), 3, 3, stride, 1).expect("pixels");
            let whole = TensorConvolution::new(&tables, g);
            // Two images of 12 pixels and 9 taps at a time, of up to 3 channels.
            let split =
                TensorConvolution { limit: 2 * 12 * 9 * 3, ..TensorConvolution::new(&tables, g) };
            assert!(split.ranges(3) == [(0, 2), (2, 2), (4, 1)] && whole.ranges(3) == [(0, 5)]);
            let random = |shape| Tensor::rand(-1f32, 1., shape, &Device::Cpu);
            let x = random(value(g.input, 5))?;
            let (w, gradient) = (random((3, 2, 9))?, random(value(g.output, 5))?);
            let same = |a: Tensor, b: Tensor| -> Result<()> {
                let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1()?);
                assert!(a.iter().zip(&b).all(|(a, b): (_, &f32)| (a - b).abs() < 1e-5));
                Ok(())
            };
            same(whole.forward(&x, &w)?, split.forward(&x, &w)?)?;
            same(whole.input_gradient(&gradient, &w)?, split.input_gradient(&gradient, &w)?)?;
            same(whole.weight_gradient(&x, &gradient)?, split.weight_gradient(&x, &gradient)?)?;
        }
        Ok(())
    }
}
